"""Data sets by name or from files: digits, official files, arrays, tables, images, or the user's own function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ntkit.base.checks import check_name, nearest, refusal
from ntkit.base.factory import check_call, find, is_code
from ntkit.data.cifar_reader import CIFAR10_EXPECTED, read_cifar10
from ntkit.data.dataset import Data, build, from_dataset, from_tensors
from ntkit.data.image_reader import read_image_folder
from ntkit.data.npz_reader import read_npz
from ntkit.data.readers import MNIST_EXPECTED, NO_DOWNLOAD, Files, read_digits, read_mnist
from ntkit.data.table_reader import TABLES, read_table
from ntkit.data.targets import Task
from ntkit.data.text_reader import TEXT_SETS, read_text, text_expected

_OFFICIAL = ("digits", "mnist", "cifar10", *TEXT_SETS)


def load(
    name_or_path: str | Path = "digits",
    data_dir: str | Path | None = None,
    *,
    classes: Sequence[str | int] | None = None,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    task: Task | None = None,
    target: str | Sequence[str] | None = None,
    resize: int | None = None,
) -> Data:
    """Load a data set by name or from files. Nothing is ever downloaded, and no pickle runs code.

    Parameters
    ----------
    name_or_path : ``"digits"`` (embedded in scikit-learn, 8 x 8 pixels / 16; a fixed stratified split, 1,437 / 360),
        ``"mnist"`` or ``"cifar10"`` (official files in `data_dir`); ``"trec"``, ``"sst2"``, ``"rt-polarity"`` or
        ``"subj"``: sentences as token numbers, see `Data.sentence`; or a path: an ``.npz`` file, a table (``.csv``,
        ``.tsv``, ``.parquet``, ``.jsonl`` with an object in each line: columns of numbers are standardized on the
        training set, columns of text become indicators; a single column of sentences becomes token numbers: words in
        small letters, numbered as in text sets, by the training sentences), or a folder of PNG or JPEG images in
        ``train/CLASS/`` and ``test/CLASS/`` (or ``val/CLASS/``), or in ``CLASS/`` (pixels as stored: EXIF orientation
        does not turn them). Data without a test set is split 80/20, stratified, always in the same way. In an ``.npz``
        (``x`` or ``X``, and ``y``; or ``x_train``, ``y_train``, ...): uint8 of rank 3 or 4 is images (/ 255), floats
        become float32 unscaled, int16/32/64 of rank 2 is tokens. Or ``file.py:factory`` or ``package.module:factory``:
        a function without arguments that returns tensors ``(x, y)`` or ``(x_train, y_train, x_test, y_test)``, a torch
        dataset or loader, a pair of any of these (training, test), or a `Data`. Labels are integers, text, booleans or
        one-hot rows; floats are the targets of a regression and are standardized; floats that may be labels are refused
        without `task`.
    data_dir : folder of the official MNIST or CIFAR-10 files, or of the text sets' files (or with a folder ``text`` of
        them): lines of a label, a blank and words. Their vocabulary is that of the whole training set. Short sentences
        are padded with 0; those longer than the longest of the training set, or than 128 words, are cut there.
    classes : the classes to use, by name or else by index; their order defines the labels 0, 1, ...
    train, test : sizes of stratified samples, in the data's order; None = all examples.
    seed : of these samples.
    class_names : names of labels 0, 1, ..., or one per different label, in ascending order; None = the labels.
    task : ``"classification"`` or ``"regression"``; None = a regression where the targets are floats (of a table: more
        than 20 different numbers, numbers that hardly recur, or fractions).
    target : of a table: the column to predict, or several columns of numbers.
    resize : of a folder of images: the shorter side of each is resized to this many pixels (Pillow's bilinear filter,
        antialiased), and the square in its center is cut out.

    Raises
    ------
    Refused
        For an unknown name, absent or damaged files (with file and byte or row), invalid classes, samples larger than
        the data, non-finite values, labels or targets that are missing or of mixed kinds.

    Examples
    --------
    >>> data = load("digits", classes=(3, 8), train=20, seed=1)
    >>> data.classes, data.x_train.shape, data.y_train.bincount().tolist()
    (('3', '8'), torch.Size([20, 1, 8, 8]), [10, 10])
    """
    files, name, subject = _read(name_or_path, data_dir, task, target, resize)
    if class_names is not None:
        files = _renamed(files, class_names)
    return build(files, name, subject, torch.float32, classes, (train, test), seed, task)


def _read(
    name_or_path: str | Path,
    data_dir: str | Path | None,
    task: Task | None,
    target: str | Sequence[str] | None,
    resize: int | None,
) -> tuple[Files, str, str]:
    """The content of the files, the name of the data set, and its subject in errors."""
    path = Path(os.path.expanduser(name_or_path))
    named = isinstance(name_or_path, str) and (name_or_path in _OFFICIAL or is_code("--data", name_or_path))
    suffix = "" if named or os.path.isdir(path) else path.suffix.lower()
    is_table = suffix in TABLES
    is_other = suffix not in ("", ".npz", *TABLES) and os.path.lexists(path)  # refused below
    if target is not None and not is_table and not is_other:
        got, expected = f"{target!r} for data that are no table", f"none, or a table ({', '.join(TABLES)})"
        raise refusal("target (--target)", got=got, expected=expected, fix="Leave it out.")
    if resize is not None and (named or not os.path.isdir(path)):
        got, expected = f"{resize} for data that are no folder of images", "none, or a folder of images"
        raise refusal("resize (--resize)", got=got, expected=expected, fix="Leave it out.")
    if name_or_path == "digits":
        return read_digits(), "digits", "digits"
    official: dict[str, tuple[Callable[[Path], Files], str]] = {
        "mnist": (read_mnist, MNIST_EXPECTED),
        "cifar10": (read_cifar10, CIFAR10_EXPECTED),
        **{text: (partial(read_text, name=text), text_expected(text)) for text in TEXT_SETS},
    }
    if isinstance(name_or_path, str) and name_or_path in official:
        read, files = official[name_or_path]
        if data_dir is None:
            expected = f"the folder of {files}"
            raise refusal(f"data_dir for {name_or_path}", got="none", expected=expected, fix=NO_DOWNLOAD)
        folder = Path(os.path.expanduser(data_dir))
        return read(folder), name_or_path, str(folder)
    if is_code("--data", str(name_or_path)):
        return _from_factory(str(name_or_path), task)
    name = os.path.basename(os.path.abspath(path))
    if os.path.isdir(path):
        check_name("data", name, "Rename the folder.")
        return read_image_folder(path, resize), name, str(path)
    if suffix == ".npz":
        check_name("data", name, "Rename the file.")
        return read_npz(path), path.stem, str(path)
    if is_table and os.path.lexists(path):
        check_name("data", name, "Rename the file.")
        return read_table(path, (target,) if isinstance(target, str) else target), path.stem, str(path)
    names = ", ".join(["digits", *official])
    paths = f"the path of an .npz file, of a table ({', '.join(TABLES)}) or of a folder of images"
    expected = f"{names}, {paths}, or file.py:factory"
    if os.path.lexists(path):
        fix = "Save arrays with numpy.savez, and a table as CSV."
        raise refusal(str(path), got="another kind of file", expected=expected, fix=fix)
    got = f"{str(name_or_path)!r}, neither the name of a data set nor a file"
    raise refusal("data", got=got, expected=expected, fix=nearest(str(name_or_path), ["digits", *official]))


def _from_factory(place: str, task: Task | None) -> tuple[Files, str, str]:
    """Call the user's factory and convert its result, as `_read`."""
    factory = find("--data", place, ())
    check_call(factory, f"--data {place}", {}, "a callable without required arguments")
    data = factory()
    name = place.rpartition(":")[2]
    if not isinstance(data, Data):
        parts: Any = data if isinstance(data, tuple | list) and len(data) in (2, 4) else (data, None)
        if isinstance(parts[0], Dataset | DataLoader):
            data = from_dataset(*parts, name=name, task=task)
        elif len(parts) == 4:
            data = from_tensors(parts[:2], parts[2:], name=name, task=task)
        elif isinstance(parts[0], tuple | list):
            data = from_tensors(*parts, name=name, task=task)
        elif parts[1] is not None:
            data = from_tensors(parts, name=name, task=task)
        else:
            expected = (
                "tensors (x, y) or (x_train, y_train, x_test, y_test), a torch dataset or loader, or two of them "
                "(training, test)"
            )
            got = f"a factory that returned a {type(data).__name__}"
            raise refusal(f"--data {place}", got=got, expected=expected, fix="Return one of those.")
    y_train, y_test = data.y_train, data.y_test
    if data.targets is not None:
        y_train, y_test = data.targets.in_units(y_train), data.targets.in_units(y_test)
    elif task == "regression":
        fix = "Leave out the task, or return targets that are floats."
        raise refusal(f"--data {place}", got="a Data with classes", expected="targets", fix=fix)
    sets = (data.x_train, y_train), (data.x_test, y_test)
    source, classes = f"{data.source}, made by {place}", data.classes or None
    targets = None if data.targets is None else data.targets.names
    return Files(*sets, classes, source, vocabulary=data.vocabulary, targets=targets), name, place


def _renamed(files: Files, names: Sequence[str]) -> Files:
    """The files with other names of the classes; refuses another number of names."""
    if files.classes is not None and len(files.classes) != len(names):
        got, expected = f"{len(names)} names", f"{len(files.classes)}: of {', '.join(files.classes)}"
        raise refusal("class_names (--class-names)", got=got, expected=expected, fix="Give a name for each class.")
    return files._replace(classes=tuple(names))
