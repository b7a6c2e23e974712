"""Data: examples with labels, from embedded digits, official files, arrays or a torch dataset, checked at the door.

Longer than most files here: every way in ends in the same `_build`, and what it refuses stands beside it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import nearest, refusal
from ntkit.base.factory import find
from ntkit.data import readers as data_files
from ntkit.data.readers import Files
from ntkit.data.splits import draw, held_out_quotas, stratified

Kind = Literal["images", "vectors", "tokens"]

_NAMES = ("digits", "mnist", "cifar10")
_SPLIT_SEED = 0  # of every train/test split made here: the same split whatever `seed` draws from it


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Examples and labels for training and testing.

    Attributes
    ----------
    x_train, x_test : Tensor
        Images ``[n, channels, h, w]`` (pixels from files in [0, 1]), vectors ``[n, ...]``, or int64 tokens ``[n, t]``.
    y_train, y_test : Tensor
        int64 ``[n]``, values 0 to ``len(classes) - 1``.
    classes : tuple of str
        The name of each label.
    name : str
        Short name of the data set.
    normalisation : str
        What was done to the values of x, as a sentence.
    source : str
        The files or records, the split, the classes chosen and the sub-sample drawn.
    kind : {"images", "vectors", "tokens"}
        What x holds.

    Examples
    --------
    >>> load("digits", classes=(3, 8))
    Data(digits: 285 train, 72 test, 2 classes, images 1 x 8 x 8)
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    name: str
    normalisation: str
    source: str
    kind: Kind

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x_train.shape[1:])

    @property
    def hash(self) -> str:
        """First 16 hex digits of the sha256 of the four arrays' dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{array.dtype} {tuple(array.shape)} ".encode())
            digest.update(array.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.input_shape))
        counts = f"{len(self.y_train)} train, {len(self.y_test)} test, {len(self.classes)} classes"
        return f"Data({self.name}: {counts}, {self.kind} {shape})"


def load(
    name_or_path: str | Path = "digits",
    data_dir: str | Path | None = None,
    classes: Sequence[str | int] | None = None,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Data:
    """Load a data set by name or from files. Nothing is ever downloaded, and no pickle runs code.

    Parameters
    ----------
    name_or_path : ``"digits"`` (embedded in scikit-learn, 8 x 8 pixels / 16; a fixed stratified split, 1,437 / 360),
        ``"mnist"`` or ``"cifar10"`` (official files in `data_dir`), or a path: an ``.npz`` file, or a folder of PNG or
        JPEG images laid out ``train/CLASS/`` and ``test/CLASS/``, or ``CLASS/``. What has no test set is split 80/20,
        stratified, the same way every time. In an ``.npz``: uint8 of rank 3 or 4 is images (/ 255), floats become
        float32 as given, int16/32/64 of rank 2 is tokens. Or your own: ``file.py:factory`` or
        ``package.module:factory``, a function without arguments that returns a torch dataset, a pair of them (training,
        test), tensors ``(x, y)``, a pair of such pairs, or a `Data`.
    data_dir : folder of the official MNIST or CIFAR-10 files.
    classes : the classes to keep, by name or else by index; their order gives the labels 0, 1, ...
    train, test : how many examples to keep, drawn stratified, in the data's order; None keeps all.
    seed : of that draw.

    Returns
    -------
    Data

    Raises
    ------
    Refused
        An unknown name, absent or damaged files (names the file and the byte or row), a bad choice of classes,
        more examples asked for than there are, non-finite values, labels that are not integers in range.

    Examples
    --------
    >>> data = load("digits", classes=(3, 8), train=20, seed=1)
    >>> data.classes, data.x_train.shape, data.y_train.bincount().tolist()
    (('3', '8'), torch.Size([20, 1, 8, 8]), [10, 10])
    """
    files, name, subject = _read(name_or_path, data_dir)
    return _build(files, name, subject, torch.float32, classes, (train, test), seed)


def from_tensors(
    train: tuple[Any, Any],
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str = "tensors",
) -> Data:
    """Take tensors or arrays ``(x, y)``; without a test set, split them 80/20, stratified, the same way every time.

    Floats keep their dtype and are not copied; uint8 of rank 3 or 4 is taken as images and divided by 255; int16, int32
    and int64 of rank 2 are tokens.

    Parameters
    ----------
    train, test : pairs of x ``[n, ...]`` and integer labels y ``[n]``.
    classes : the names of labels 0, 1, ...; None names them by their numbers.
    name : short name of the data set.

    Raises
    ------
    Refused
        Empty, non-finite, different lengths, labels that are not integers from 0 in range.

    Examples
    --------
    >>> x, y = torch.linspace(0, 1, 30).reshape(10, 3), torch.arange(10) % 2
    >>> from_tensors((x, y), classes=["even", "odd"])
    Data(tensors: 8 train, 2 test, 2 classes, vectors 3)
    """
    return _build(Files(train, test, classes, f"tensors given as {name}"), name, name)


def from_dataset(
    dataset: torch.utils.data.Dataset[Any],
    test: torch.utils.data.Dataset[Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Data:
    """Take a map-style torch dataset of ``(x, label)`` pairs, each item read once, in order.

    Pillow images (gray or RGB) become float32 ``[channels, h, w]``, pixels / 255; tensors and arrays are stacked and
    treated as in `from_tensors`. Random transforms give one fixed draw; the global random states are restored.

    Parameters
    ----------
    dataset, test : the training and test sets; without a test set, split 80/20, stratified, the same way every time.
    classes : class names; None takes ``dataset.classes`` where there is one.
    name : short name; None takes the dataset's type.

    Raises
    ------
    Refused
        An item that is no such pair or differs in shape or dtype (names its index), and what `from_tensors` refuses.

    Examples
    --------
    >>> pairs = torch.utils.data.TensorDataset(torch.linspace(0, 1, 30).reshape(10, 3), torch.arange(10) % 2)
    >>> from_dataset(pairs, name="toy")
    Data(toy: 8 train, 2 test, 2 classes, vectors 3)
    """
    name = name or type(dataset).__name__
    if classes is None:
        found = getattr(dataset, "classes", None)
        classes = [str(known) for known in found] if isinstance(found, list | tuple) else None
    with _random_states_kept():
        pair = _stack(dataset, name)
        held_out = None if test is None else _stack(test, f"{name} (test)")
    return _build(Files(pair, held_out, classes, f"torch dataset {type(dataset).__name__}"), name, name)


def _read(name_or_path: str | Path, data_dir: str | Path | None) -> tuple[Files, str, str]:
    """Return the files' content, a name, and what refusals call the data."""
    if name_or_path == "digits":
        return data_files.read_digits(), "digits", "digits"
    official = {
        "mnist": (data_files.read_mnist, data_files.MNIST_EXPECTED),
        "cifar10": (data_files.read_cifar10, data_files.CIFAR10_EXPECTED),
    }
    if isinstance(name_or_path, str) and name_or_path in official:
        read, wanted = official[name_or_path]
        if data_dir is None:
            expected = f"the folder of {wanted}"
            raise refusal(f"data_dir for {name_or_path}", got="none", expected=expected, fix=data_files.NO_DOWNLOAD)
        folder = Path(data_dir).expanduser()
        return read(folder), name_or_path, str(folder)
    path = Path(name_or_path).expanduser()
    if ":" in str(name_or_path) and not path.exists():
        return _made(str(name_or_path))
    if path.is_dir():
        return data_files.read_image_folder(path), path.resolve().name, str(path)
    if path.suffix == ".npz":
        return data_files.read_npz(path), path.stem, str(path)
    expected = "digits, mnist, cifar10, the path of an .npz file or of a folder of images, or file.py:factory"
    if path.exists():
        raise refusal(str(path), got="another kind of file", expected=expected, fix="Save arrays with numpy.savez.")
    fix = nearest(str(name_or_path), ["digits", *official])
    raise refusal("data", got=f"{str(name_or_path)!r}, no known name and no file", expected=expected, fix=fix)


def _made(place: str) -> tuple[Files, str, str]:
    """Call the user's factory and take whatever kind of data it returns."""
    made = find("--data", place, ())()
    name = place.rpartition(":")[2]
    if not isinstance(made, Data):
        pair: Any = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
        if isinstance(pair[0], torch.utils.data.Dataset):
            made = from_dataset(*pair, name=name)
        elif isinstance(pair[0], tuple | list):
            made = from_tensors(*pair, name=name)
        elif pair[1] is not None:
            made = from_tensors(pair, name=name)
        else:
            expected = "a torch dataset or a pair of tensors (x, y), or two of either (training, test)"
            got = f"a factory that returned a {type(made).__name__}"
            raise refusal(f"--data {place}", got=got, expected=expected, fix="Return one of those.")
    sets = (made.x_train, made.y_train), (made.x_test, made.y_test)
    return Files(*sets, made.classes, f"{made.source}, made by {place}"), name, place


def _build(
    files: Files,
    name: str,
    subject: str,
    float_dtype: torch.dtype | None = None,
    chosen: Sequence[str | int] | None = None,
    counts: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
) -> Data:
    """Check, split, choose classes, sub-sample; only then turn pixels into floats."""
    source = files.source
    x, y, kind = _door(files.train, subject if files.test is None else f"{subject}, training set", float_dtype)
    if files.test is None:
        known = _class_names(files.classes, {subject: y})
        held_out = stratified(y, held_out_quotas(y, subject), _SPLIT_SEED)
        kept = torch.ones(len(y), dtype=torch.bool)
        kept[held_out] = False
        rows = [kept.nonzero().squeeze(1), held_out]
        sets = [(x, y), (x, y)]
        source += f"; fixed stratified split, {len(rows[0]):,} train / {len(held_out):,} test, independent of seed"
    else:
        x_test, y_test, kind_test = _door(files.test, f"{subject}, test set", float_dtype)
        if x.shape[1:] != x_test.shape[1:] or x.dtype != x_test.dtype or kind != kind_test:
            got = f"examples {list(x_test.shape[1:])} {x_test.dtype}"
            expected = f"{list(x.shape[1:])} {x.dtype}, as in the training set"
            raise refusal(f"{subject}, test set", got=got, expected=expected, fix="Prepare both sets the same way.")
        known = _class_names(files.classes, {f"{subject}, training set": y, f"{subject}, test set": y_test})
        sets = [(x, y), (x_test, y_test)]
        rows = [torch.arange(len(y)), torch.arange(len(y_test))]
    labels = [y[index] for (_, y), index in zip(sets, rows, strict=True)]
    if chosen is not None:
        picked = _resolve(chosen, known)
        table = torch.full((len(known),), -1)
        table[picked] = torch.arange(len(picked))
        for part, where in enumerate(("training", "test")):
            new = table[labels[part]]
            rows[part], labels[part] = rows[part][new >= 0], new[new >= 0]
            absent = (labels[part].bincount(minlength=len(picked)) == 0).nonzero()
            if len(absent):
                got = f"{known[picked[int(absent[0])]]!r}, which has no examples in the {where} set"
                raise refusal("classes", got=got, expected="classes with examples in both sets", fix="Choose another.")
        known = tuple(known[label] for label in picked)
        source += f"; classes {', '.join(known)}"
    for part, (count, where) in enumerate(zip(counts, ("train", "test"), strict=True)):
        if count is not None:
            keep = draw(labels[part], count, where, seed, part)
            source += f"; {count:,} of {len(labels[part]):,} {where} examples, stratified, seed {seed}"
            rows[part], labels[part] = rows[part][keep], labels[part][keep]
    inputs = [x if len(index) == len(x) else x[index] for (x, _), index in zip(sets, rows, strict=True)]
    normalisation = "token ids as given" if kind == "tokens" else "values as given, no scaling or centering"
    if x.dtype == torch.uint8:
        inputs = [x.to(torch.float32, memory_format=torch.contiguous_format).div_(files.scale) for x in inputs]
        normalisation = f"pixels / {files.scale:.0f}, no centering"
    y_train, y_test = (y.to(x.device) for y in labels)
    return Data(inputs[0], y_train, inputs[1], y_test, known, name, normalisation, source, kind)


def _door(pair: tuple[Any, Any], subject: str, float_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Kind]:
    """Turn one (x, y) into tensors with x laid out as documented, or refuse it."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = f"a {type(pair).__name__}"
        raise refusal(subject, got=got, expected="a pair (x, y)", fix="Put examples and labels in one tuple.")
    x, y = (_tensor(value, f"{subject}, {part}") for value, part in zip(pair, "xy", strict=True))
    if x.ndim < 2 or x.numel() == 0:
        got = f"an empty set, shape {list(x.shape)}" if x.numel() == 0 else f"shape {list(x.shape)}"
        raise refusal(f"{subject}, x", got=got, expected="[n, ...] with n >= 1", fix="One row an example.")
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = f"{y.dtype} of shape {list(y.shape)}"
        fix = "Give class indices 0, 1, ... as one integer array (y.ravel(), y.long())."
        raise refusal(f"{subject}, labels y", got=got, expected="integers of shape [n]", fix=fix)
    if len(x) != len(y):
        got = f"{len(x):,} examples and {len(y):,} labels"
        raise refusal(subject, got=got, expected="one label an example", fix="Check how x and y were put together.")
    if x.is_floating_point():
        x = x if float_dtype is None else x.to(float_dtype)
        bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero()
        if len(bad):
            row = int(bad[0])
            value = x[row].flatten()[~torch.isfinite(x[row]).flatten()][0].item()
            got = f"{value} in row {row:,} ({len(bad):,} such rows)"
            raise refusal(f"{subject}, x", got=got, expected="finite values", fix="Repair or drop these rows.")
        return x, y.to("cpu", torch.int64), "images" if x.ndim == 4 else "vectors"
    if x.dtype == torch.uint8 and x.ndim in (3, 4):
        return _images(x, subject), y.to("cpu", torch.int64), "images"
    if x.dtype in (torch.int16, torch.int32, torch.int64) and x.ndim == 2:
        return x.to(torch.int64), y.to("cpu", torch.int64), "tokens"
    raise refusal(
        f"{subject}, x",
        got=f"{x.dtype} of shape {list(x.shape)}",
        expected="floats, uint8 images [n, h, w] or [n, c, h, w] or [n, h, w, c], or integer tokens [n, t]",
        fix="Convert x to float32 and scale it as you mean it.",
    )


def _tensor(value: Any, subject: str) -> Tensor:
    try:
        if isinstance(value, Tensor):
            return value.detach()
        array = np.asarray(value)
        # torch takes neither foreign byte orders nor, without a warning, read-only memory
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError) as error:
        got = f"{type(value).__name__} that is no numeric array ({error})"
        raise refusal(subject, got=got, expected="a tensor or a numeric array", fix="Convert it first.") from error


def _images(x: Tensor, subject: str) -> Tensor:
    """Bring uint8 images to [n, c, h, w]; where both orders could be meant, torch's is."""
    if x.ndim == 3:
        return x[:, None]
    if x.shape[1] in (1, 3):
        return x
    if x.shape[3] in (1, 3):
        return x.permute(0, 3, 1, 2)
    fix = "Give [n, c, h, w] floats, scaled as you mean them."
    got = f"uint8 of shape {list(x.shape)}"
    raise refusal(f"{subject}, x", got=got, expected="1 or 3 channels, in the second or last place", fix=fix)


def _class_names(names: Sequence[str] | None, sets: dict[str, Tensor]) -> tuple[str, ...]:
    # Without names the largest label tells how many classes there are; a target or an id taken for one must not.
    limit = max(1000, *map(len, sets.values())) if names is None else len(names)
    for subject, y in sets.items():
        bad = ((y < 0) | (y >= limit)).nonzero()
        if len(bad):
            row = int(bad[0])
            got = f"label {int(y[row])} in row {row:,}"
            fix = "Number the classes from 0, or give all their names."
            raise refusal(f"{subject}, labels y", got=got, expected=f"0 to {limit - 1}", fix=fix)
    largest = max(int(y.max()) for y in sets.values())
    known = tuple(str(label) for label in range(largest + 1)) if names is None else tuple(map(str, names))
    if len(set(known)) < len(known):
        raise refusal("classes", got=", ".join(known), expected="different names", fix="Rename one.")
    return known


def _resolve(chosen: Sequence[str | int], known: tuple[str, ...]) -> list[int]:
    expected = "a sequence of at least two different classes, by name or index"
    if isinstance(chosen, str) or not isinstance(chosen, Sequence):
        raise refusal("classes", got=repr(chosen), expected=expected, fix="For example classes=(3, 8).")
    picked = []
    for item in chosen:
        word = str(item)
        if word not in known and not (word.isdecimal() and int(word) < len(known)):
            raise refusal("classes", got=repr(item), expected="a class of the data", fix=nearest(word, known))
        picked.append(known.index(word) if word in known else int(word))
    if len(set(picked)) < max(2, len(picked)):
        got = ", ".join(map(str, chosen)) or "none"
        raise refusal("classes", got=got, expected=expected, fix="Name each class once, and at least two.")
    return picked


def _stack(dataset: Any, subject: str) -> tuple[Tensor, Tensor]:
    try:
        size = len(dataset)
    except (TypeError, NotImplementedError) as error:
        fix = "Collect a streaming dataset into tensors and use from_tensors."
        got = f"{type(dataset).__name__}, without a length"
        raise refusal(subject, got=got, expected="a map-style dataset", fix=fix) from error
    x, y = torch.empty(0, 0), torch.empty(size, dtype=torch.int64)
    for index in range(size):
        item = dataset[index]
        where = f"{subject}, index {index}"
        if not isinstance(item, tuple | list) or len(item) != 2:
            got = f"a {type(item).__name__}"
            raise refusal(where, got=got, expected="a pair (x, label)", fix="Wrap it in a dataset of pairs.")
        value = _example(item[0], where)
        if index == 0:
            x = torch.empty((size, *value.shape), dtype=value.dtype)
        elif value.shape != x.shape[1:] or value.dtype != x.dtype:
            expected = f"{list(x.shape[1:])} {x.dtype}, as at index 0"
            got = f"{list(value.shape)} {value.dtype}"
            raise refusal(where, got=got, expected=expected, fix="Resize or pad the examples alike.")
        label = np.asarray(item[1].cpu() if isinstance(item[1], Tensor) else item[1])
        if label.ndim or label.dtype.kind not in "iu":
            got = f"label {item[1]!r}"
            raise refusal(where, got=got, expected="an integer", fix="Give class indices 0, 1, ...")
        x[index], y[index] = value, int(label)
    return x, y


def _example(value: Any, subject: str) -> Tensor:
    if not (hasattr(value, "getbands") and hasattr(value, "mode")):
        return _tensor(value, subject)
    if value.mode not in ("L", "RGB"):  # a Pillow image, as torchvision's datasets give
        raise refusal(subject, got=f"an image of mode {value.mode}", expected="L or RGB", fix="Convert the images.")
    image = torch.from_numpy(np.array(value))
    return image[None] if image.ndim == 2 else image.permute(2, 0, 1)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (kept, not used)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
