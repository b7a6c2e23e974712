"""Weights from files that others wrote: safetensors, PyTorch and Lightning checkpoints, Hugging Face folders.

Nothing in a file is executed: pickles are read by ``torch.load(weights_only=True)``, which knows tensors and plain
containers alone.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import Refused, refusal
from ntkit.base.files import read_bytes
from ntkit.base.integrity import stored_checksum
from ntkit.base.numbers import check_dense
from ntkit.trajectory.recorded_run import assign, tied_names

_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net")  # keys of a checkpoint
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "base_model.model.")
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # of Hugging Face; `.index.json` beside it where it is cut
_EXPECTED = "a file of weights (.safetensors, .pt, .pth, .ckpt, .bin) or a folder of Hugging Face"


def load_weights(model: nn.Module, file: str | Path) -> str:
    """Load a file of weights into `model`, in place: everything or nothing.

    Parameters
    ----------
    model : any module; of tied tensors one name in the file is enough.
    file : a ``.safetensors`` file; a checkpoint of PyTorch or Lightning (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), whose
        weights may lie under "state_dict", "model_state_dict" or "model"; or a folder of Hugging Face's
        ``save_pretrained``. A prefix that all of the model's names have in the file, such as ``module.`` or ``model.``,
        is left out. No code in a file is run.

    Returns
    -------
    str
        What was taken: where the weights lay, the prefix, and entries beside it that are not the model's.

    Raises
    ------
    Refused
        When the file is absent or none of these; when names or shapes differ, or a dtype would lose digits: with the
        names that are missing and unexpected, and the nearest ones.

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
    content, notes = _contents(file), []
    tensors, place, beside = _tensors(content, file)
    if place:
        notes.append(place)
    if beside:
        notes.append(f"not {_listed(beside)}")
    _check_values(tensors, file)
    tensors, prefix, others = _without_prefix(tensors, model)
    if prefix:
        notes.append(f'without the prefix "{prefix}"')
    if others:
        notes.append(f"left out: {_listed(others)}")
    try:
        assign(model, tensors, file.name)
    except Refused as error:
        raise Refused(str(error) + _nearest(tensors, model)) from None
    return f"{file.name}: {'; '.join(notes)}" if notes else file.name


# ---------------------------------------------------------------------- reading


def _contents(path: Path) -> Any:
    """What is in a file, or in the files of a folder."""
    if not path.is_dir():
        return _content(path)
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return _content(path / name)
        if (index := path / f"{name}.index.json").is_file():
            return _pieces(path, index)
    fix = f"Name the file itself, or a folder with {' or '.join(_IN_FOLDER)}."
    raise refusal(str(path), got="a folder without weights", expected=_EXPECTED, fix=fix)


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
        piece = _content(folder / name)
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


def _content(path: Path) -> Any:
    blob = read_bytes(path, "a file of weights", "Check the name.")
    if path.suffix in _PICKLES or zipfile.is_zipfile(io.BytesIO(blob)):
        return _unpickled(path, blob)
    return _safe(path, blob)


def _safe(path: Path, blob: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a checksum of ours is checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if blob and path.suffix == ".safetensors":
        stored_checksum(path, blob)
    try:
        return dict(sorted(load(blob).items()))
    except SafetensorError as error:
        got, fix = f"a file that is not a complete safetensors file ({error})", "Save or copy it again."
        raise refusal(str(path), got=got, expected=_EXPECTED, fix=fix) from error


def _unpickled(path: Path, blob: bytes) -> Any:
    """What torch.save wrote, if it is tensors in plain containers."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        start = text.find("GLOBAL ")
        what = text[start + 7 :].split()[0] if start >= 0 else "an object"
        got = f"a pickle with {what}, more than tensors and plain containers: to read it would run code"
        fix = (
            "Where you trust it, save its weights alone: "
            "safetensors.torch.save_file(torch.load(file, weights_only=False)['state_dict'], 'weights.safetensors')."
        )
        raise refusal(str(path), got=got, expected="tensors", fix=fix) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        first = str(error).partition("\n")[0][:200]
        got = f"a file that torch.load cannot read ({type(error).__name__}: {first})"
        raise refusal(str(path), got=got, expected=_EXPECTED, fix="Save or copy it again.") from error


def _tensors(content: Any, path: Path) -> tuple[dict[str, Tensor], str, list[str]]:
    """Weights by name, the key under which they lay, and keys of other tensors beside it."""
    place: list[str] = []
    beside: list[Any] = []
    while isinstance(content, Mapping):
        inner = next((key for key in _INSIDE if isinstance(content.get(key), Mapping)), None)
        beside += [key for key in content if key != inner and _holds_tensors(content[key])] if inner is not None else []
        if inner is None:
            own = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
            if not own:
                break
            return own, ".".join(place), [str(key) for key in beside]
        place.append(inner)
        content = content[inner]
    keys = _listed([repr(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
    fix = "Save model.state_dict() alone."
    expected = f"tensors by name, or these under one of {', '.join(_INSIDE)}"
    raise refusal(str(path), got=f"a checkpoint with {keys}" if keys else "nothing", expected=expected, fix=fix)


# ---------------------------------------------------------------------- names


def _without_prefix(tensors: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str, list[str]]:
    """Names as the model has them: without a prefix that all of its names have in the file, if they have one."""
    groups = [set(names) for names, _ in tied_names(model)]
    needed = set(model.state_dict()) | {name for name, _ in model.named_parameters()}
    groups = [names for names in groups if names & needed]

    def complete(names: set[str]) -> bool:
        return all(group & names for group in groups)

    if complete(set(tensors)):
        return tensors, "", []
    firsts = {name.partition(".")[0] + "." for name in tensors if "." in name}
    known = [a + b for a in ("", *_PREFIXES) for b in ("", *_PREFIXES)]
    others = [a + b for a in sorted(firsts) for b in ("", *_PREFIXES, *sorted(firsts))]
    for candidates in (known, others):
        fitting = {}
        for prefix in dict.fromkeys(candidate for candidate in candidates if candidate):
            under = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            if groups and complete(set(under)):
                fitting[prefix] = under
        if len(fitting) > 1:
            fix = "Save the state dict of the one that you want."
            got = f"several networks of these names, under {_listed(list(fitting))}"
            raise refusal("weights", got=got, expected="one", fix=fix)
        for prefix, under in fitting.items():
            return under, prefix, sorted(name for name in tensors if not name.startswith(prefix))
    return tensors, "", []


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


def _check_values(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that cannot be copied as they are, before anything is."""
    for name, tensor in tensors.items():
        check_dense(tensor, f"{path.name}, '{name}'")


def _nearest(tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    """For a missing name the nearest one in the file."""
    own = [name for names, _ in tied_names(model) for name in names]
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    pairs = [(name, near[0]) for name in missing[:50] if (near := get_close_matches(name, unexpected, 1, 0.6))]
    return f" The nearest names: {_listed([f'{a} ~ {b}' for a, b in pairs])}." if pairs else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
