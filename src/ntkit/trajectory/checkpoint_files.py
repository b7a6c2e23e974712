"""Weights from files that others wrote: safetensors, PyTorch and Lightning checkpoints, Hugging Face folders.

Nothing in a file is executed: pickles are read by ``torch.load(weights_only=True)``, which knows tensors and plain
containers alone. Of other objects, such as the settings beside the weights, only the names are read.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ntkit.base.checks import Refused, refusal
from ntkit.base.files import read_bytes
from ntkit.base.integrity import stored_checksum
from ntkit.base.numbers import check_dense
from ntkit.base.regular_files import check_start
from ntkit.trajectory.checkpoint_names import Named, listed, nearest_names, same_shapes, under_model_names
from ntkit.trajectory.recorded_run import assign

_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net")  # keys of a checkpoint
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # of Hugging Face; `.index.json` beside it where it is cut
_BESIDE = ("optimizer", "scheduler", "scaler", "training_args", "rng_state")  # begin names of a training's other files
_DEPTH = 4  # of mappings in a checkpoint
_EXPECTED = "a file of weights (.safetensors, .pt, .pth, .ckpt, .bin) or a folder of Hugging Face"


def load_weights(model: nn.Module, file: str | Path) -> str:
    """Load a file of weights into `model`, in place: everything or nothing.

    Parameters
    ----------
    model : any module; of tied tensors one name in the file is enough.
    file : a ``.safetensors`` file; a checkpoint of PyTorch or Lightning (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), whose
        weights may lie under "state_dict", "model_state_dict" or "model", or else under the only key whose tensors have
        the model's names; or a folder of Hugging Face's ``save_pretrained``, or with one such file. A prefix that all
        of the model's names have in the file, such as ``module.`` or ``model.``, is left out, as are the names of
        wrappers (``_orig_mod.`` of torch.compile) in the file or in the model. No code in a file is run.

    Returns
    -------
    str
        What was taken: where the weights lay, the prefix, and what beside them is not the model's or was not read.

    Raises
    ------
    Refused
        When the file is absent or none of these; when it holds several networks that fit; when names or shapes differ,
        or a dtype would lose digits: with the names that are missing and unexpected, and the nearest ones.

    Examples
    --------
    >>> import tempfile
    >>> model = nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": nn.Sequential(model).state_dict(prefix="model.")}, folder + "/last.ckpt")
    ...     load_weights(nn.Sequential(nn.Linear(2, 1)), folder + "/last.ckpt")
    'last.ckpt: state_dict; without the prefix "model."'
    """
    file = Path(file)
    _check_model(model)
    content, unread = _contents(file)
    place, named, beside = _weights(content, file, model, unread)
    notes = ([place] if place else []) + ([f"not {listed(beside)}"] if beside else []) + named.notes
    if unread:
        notes.append(f"not read: {listed(unread)}")
    try:
        assign(model, named.tensors, file.name)
    except Refused as error:
        raise Refused(str(error) + nearest_names(named.tensors, model)) from None
    return f"{file.name}: {'; '.join(notes)}" if notes else file.name


def _check_model(model: nn.Module) -> None:
    """Refuse a model whose parameters hold no values: nothing can be copied into them."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        got, fix = "no values (device meta)", "Build the model on another device."
        if is_lazy(tensor):
            got, fix = "no values yet (a lazy layer)", "Call the model once on a batch, which gives it its shape."
        elif not tensor.is_meta:
            continue
        raise refusal(f"'{name}'", got=got, expected="a tensor with values", fix=fix)


# ---------------------------------------------------------------------- files


class _Content(NamedTuple):
    """What is in a file, and the names of the objects in it that were not read."""

    value: Any
    unread: list[str]


def _contents(path: Path) -> _Content:
    """What is in a file, or in the files of a folder."""
    if not path.is_dir():
        return _content(path)
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return _content(path / name)
        if (index := path / f"{name}.index.json").is_file():
            return _Content(_pieces(path, index), [])
    suffixes = (".safetensors", *_PICKLES)
    found = sorted(f for f in path.iterdir() if f.suffix.lower() in suffixes and not f.name.startswith((".", *_BESIDE)))
    if len(found) == 1:
        return _content(found[0])
    inner = sorted(folder.name for folder in path.iterdir() if any((folder / name).is_file() for name in _IN_FOLDER))
    got = f"a folder with {listed([f.name for f in found])}" if found else "a folder without weights"
    got += f"; there are some in {listed(inner)}" if inner else ""
    fix = f"Name the file itself, or a folder with {' or '.join(_IN_FOLDER)}."
    raise refusal(str(path), got=got, expected=_EXPECTED, fix=fix)


def _pieces(folder: Path, index: Path) -> dict[str, Tensor]:
    """Weights that are spread over several files."""
    blob = read_bytes(index, "the list of a checkpoint's files", "Copy the folder again.")
    try:
        names = sorted(set(json.loads(blob)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got, fix = f"no list of files ({type(error).__name__})", "Copy the folder again."
        raise refusal(str(index), got=got, expected='JSON with "weight_map"', fix=fix) from error
    pieces: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            fix = "Copy the folder again, from a source that you trust."
            raise refusal(str(index), got=f"the file {name!r}", expected="names of files in this folder", fix=fix)
        piece = _content(folder / name).value
        if not isinstance(piece, Mapping):
            fix = "Copy the folder again."
            raise refusal(str(folder / name), got=f"a {type(piece).__name__}", expected="tensors by name", fix=fix)
        if twice := [key for key in piece if key in places]:
            got, fix = (
                f"'{twice[0]}' in {places[twice[0]]} and in {name}",
                "Copy the folder again, or save it as one file.",
            )
            raise refusal(str(index), got=got, expected="each tensor in one file", fix=fix)
        places |= dict.fromkeys(piece, name)
        pieces |= piece
    return pieces


def _content(path: Path) -> _Content:
    """Read a file as what its first bytes say that it is."""
    blob = read_bytes(path, "a file of weights", "Check the name.")
    check_start(path, blob, _EXPECTED)
    suffix = path.suffix.lower()
    if suffix == ".safetensors" and not blob.startswith(b"PK"):
        stored_checksum(path, blob)
        return _Content(_safe(path, blob), [])
    if blob[8:9] == b"{":  # after the length of its header
        return _Content(_safe(path, blob), [])
    if blob.startswith((b"PK", b"\x80")) or suffix in _PICKLES:
        return _unpickled(path, blob)
    got = "a file that neither safetensors nor torch.save wrote"
    raise refusal(str(path), got=got, expected=_EXPECTED, fix="Save the weights with torch.save(model.state_dict()).")


def _safe(path: Path, blob: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a checksum of ours is checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(sorted(load(blob).items()))
    except SafetensorError as error:
        got, fix = f"a file that is not a complete safetensors file ({error})", "Save or copy it again."
        raise refusal(str(path), got=got, expected=_EXPECTED, fix=fix) from error


# ---------------------------------------------------------------------- pickles


class _NotRead:
    """Stands for an object of the file: its class is not imported, its arguments and its state are dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> _NotRead:
        """An object without anything of the file."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _unpickled(path: Path, blob: bytes) -> _Content:
    """What torch.save wrote: tensors in plain containers; other objects become `_NotRead`."""
    unread: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol|.*TorchScript archive")
            if zipfile.is_zipfile(io.BytesIO(blob)):
                unread = sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(blob)))
            while True:  # a file of the older format names its objects one by one
                try:
                    with safe_globals([_stand_in(name) for name in unread]):
                        return _Content(torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True), unread)
                except pickle.UnpicklingError as error:
                    name = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
                    if name is None or _full(name[1]) in unread:
                        raise
                    unread.append(_full(name[1]))
    except pickle.UnpicklingError as error:
        raise _no_weights(path, error) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        text = str(error)
        if "torchscript" in text.lower():
            got, fix = "a TorchScript program", "torch.save(torch.jit.load(file).state_dict(), 'weights.pt')."
            raise refusal(str(path), got=got, expected=_EXPECTED, fix=f"Save its weights alone: {fix}") from None
        got = f"a file that torch.load cannot read ({type(error).__name__}: {text.partition(chr(10))[0][:200]})"
        fix = "Save or copy it again."
        if path.suffix.lower() == ".npz":
            got, fix = "NumPy's arrays", "Save them as tensors, with torch.save."
        raise refusal(str(path), got=got, expected=_EXPECTED, fix=fix) from error


def _stand_in(name: str) -> type:
    """A class that the unpickler takes for the one of this name."""
    module, _, own = name.rpartition(".")
    return type(own, (_NotRead,), {"__module__": module, "__qualname__": own})


def _full(name: str) -> str:
    return name if "." in name else f"builtins.{name}"


def _no_weights(path: Path, error: pickle.UnpicklingError) -> Refused:
    """The refusal of a pickle in which code would have to run."""
    start = (text := str(error)).find("GLOBAL ")
    if start < 0 and not re.search(r"Can only|reduce|Trying|persistent", text):
        got = f"a file that torch.load cannot read ({text.partition(chr(10))[0][:100]})"
        return refusal(str(path), got=got, expected=_EXPECTED, fix="Save or copy it again.")
    what = text[start + 7 :].split()[0] if start >= 0 else "an object"
    got = f"a pickle with {what}, more than tensors and plain containers: to read it would run code"
    fix = "Where you trust it: torch.save(torch.load(file, weights_only=False)['state_dict'], 'weights.pt')."
    return refusal(str(path), got=got, expected="tensors", fix=fix)


# ---------------------------------------------------------------------- places


def _weights(content: Any, path: Path, model: nn.Module, unread: list[str]) -> tuple[str, Named, list[str]]:
    """The key under which the weights lay, the weights under the model's names, and keys of other tensors beside it."""
    places = dict(_places(content))
    usual = _usual_place(content)
    if usual not in places and len(places) == 1:
        usual = next(iter(places))
    named = under_model_names(places[usual], model) if usual in places else None
    if named is None or not named.complete:
        fitting = {
            place: other
            for place, tensors in places.items()
            if place != usual and (other := under_model_names(tensors, model)).complete
        }
        if len(fitting) > 1:  # as of a generator and its critic
            fitting = {place: other for place, other in fitting.items() if same_shapes(other.tensors, model)} or fitting
        if len(fitting) > 1:
            got = f"several networks of these names, under {listed(['.'.join(place) for place in fitting])}"
            fix = "Save the state dict of the one that you want."
            raise refusal(str(path), got=got, expected="one", fix=fix)
        for place, other in fitting.items():
            usual, named = place, other
    if named is None:
        raise _no_place(content, path, bool(places), unread)
    for name, tensor in named.tensors.items():  # refuse what cannot be copied as it is, before anything is
        check_dense(tensor, f"{path.name}, '{name}'")
    return ".".join(usual), named, _beside(content, usual)


def _no_place(content: Any, path: Path, has_tensors: bool, unread: list[str]) -> Refused:
    """The refusal of a checkpoint in which no tensors are the model's."""
    if isinstance(content, _NotRead):
        got = f"a whole {type(content).__module__}.{type(content).__name__}, which to read would run code"
        fix = "Where you trust it: torch.save(torch.load(file, weights_only=False).state_dict(), 'weights.pt')."
        return refusal(str(path), got=got, expected="tensors", fix=fix)
    keys = listed([repr(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
    expected = f"tensors by name, or these under one of {', '.join(_INSIDE)}"
    if has_tensors:
        expected = "tensors of the model's names under one of its keys"
    got = f"a checkpoint with {keys}" if keys else "nothing"
    others = f"; not read: {listed(unread)}" if unread else ""
    return refusal(str(path), got=got + others, expected=expected, fix="Save model.state_dict() alone.")


def _usual_place(content: Any) -> tuple[str, ...]:
    """Keys that usually hold the weights, one within another."""
    place: list[str] = []
    while isinstance(content, Mapping) and len(place) < _DEPTH:
        inner = next((key for key in _INSIDE if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        place.append(inner)
        content = content[inner]
    return tuple(place)


def _places(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Tensors by name, wherever a mapping holds some; each with its keys."""
    if not isinstance(content, Mapping) or len(place) > _DEPTH:
        return
    if own := {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}:
        yield place, own
    for key, value in content.items():
        if isinstance(key, str):
            yield from _places(value, (*place, key))


def _beside(content: Any, place: tuple[str, ...]) -> list[str]:
    """Keys of other tensors on the way to the weights."""
    beside: list[str] = []
    for step in place:
        beside += [str(key) for key in content if key != step and _holds_tensors(content[key])]
        content = content[step]
    return beside


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())
