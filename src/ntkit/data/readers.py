"""Readers of data files: a file is read completely and checked, or refused with its name and the bad byte or row."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkit.base.checks import Refused, refusal

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_MNIST_FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
MNIST_EXPECTED = f"the four MNIST files {', '.join(_MNIST_FILES)}, each with or without .gz"
CIFAR10_EXPECTED = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin (or the Python version's data_batch_1 to data_batch_5 and "
    "test_batch), here or in cifar-10-batches-bin (cifar-10-batches-py)"
)
_DIGITS = tuple(str(digit) for digit in range(10))

_RECORD = 1 + 3 * 32 * 32  # CIFAR-10: a label byte, then 1024 red, 1024 green and 1024 blue bytes
_AGAIN = "Download this file again from its official source. Nothing was loaded."
NO_DOWNLOAD = "Put the official files there or name another folder; nothing is ever downloaded."
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class Files(NamedTuple):
    """Content of the files: ``(x, y)`` for training and for testing (None: no test set)."""

    train: tuple[Any, Any]
    test: tuple[Any, Any] | None
    classes: Sequence[str] | None
    source: str
    scale: float = 255.0  # the uint8 pixel value that becomes 1


def _read_bytes(path: Path, expected: str, limit: int = -1) -> bytes:
    try:
        with open(path, "rb") as handle:
            blob = handle.read(limit)
    except OSError as error:
        fix = "Check its name and permissions."
        raise refusal(str(path), got=error.strerror or error, expected=expected, fix=fix) from error
    if not blob:
        raise refusal(str(path), got="an empty file (0 bytes)", expected=expected, fix=_AGAIN)
    # Often the "corrupt download" is the web page of a proxy or login.
    if blob[:512].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise refusal(str(path), got="an HTML page (a web page saved as data)", expected=expected, fix=_AGAIN)
    return blob


def _gunzip(path: Path, blob: bytes) -> bytes:
    parts = []
    packed = blob
    while packed:
        inflate = zlib.decompressobj(wbits=31)
        try:
            parts.append(inflate.decompress(packed))
        except zlib.error as error:
            at = len(blob) - len(packed)
            got = f"gzip data that cannot be unpacked, in the part from byte {at:,} ({error})"
            raise refusal(str(path), got=got, expected="an intact gzip file", fix=_AGAIN) from error
        if not inflate.eof:
            got = f"a gzip file cut short at byte {len(blob):,} ({sum(map(len, parts)):,} bytes unpacked, no end)"
            raise refusal(str(path), got=got, expected="a complete gzip file", fix=_AGAIN)
        packed = inflate.unused_data
    return b"".join(parts)


def read_idx(path: Path, content: str) -> np.ndarray:
    """Read one idx file of uint8 ``"images"`` [n, h, w] or ``"labels"`` [n], gzipped or not whatever its name."""
    magic, rank = {"images": (2051, 3), "labels": (2049, 1)}[content]
    expected = f"an idx file of {content} (magic number {magic})"
    blob = _read_bytes(path, expected)
    if blob[:2] == b"\x1f\x8b":
        blob = _gunzip(path, blob)
    header = 4 + 4 * rank
    number = int.from_bytes(blob[:4], "big")
    if len(blob) >= 4 and number != magic:
        meaning = {2051: ", a file of images", 2049: ", a file of labels"}.get(number, "")
        got = f"magic number {number} at byte 0{meaning}"
        raise refusal(str(path), got=got, expected=expected, fix="Check that no file was renamed or swapped.")
    if len(blob) < header:
        raise refusal(str(path), got=f"{len(blob)} bytes", expected=f"a header of {header} bytes", fix=_AGAIN)
    shape = [int.from_bytes(blob[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank)]
    size = header + math.prod(shape)
    if len(blob) != size:
        what = "cut short" if len(blob) < size else f"{len(blob) - size:,} trailing bytes from byte {size:,}"
        expected = f"{size:,} bytes for {' x '.join(f'{extent:,}' for extent in shape)} {content}"
        raise refusal(str(path), got=f"{len(blob):,} bytes ({what})", expected=expected, fix=_AGAIN)
    return np.frombuffer(bytearray(blob), np.uint8, offset=header).reshape(shape)


def _check_labels(y: np.ndarray, path: Path, offset: int, stride: int) -> None:
    bad = np.flatnonzero(y >= 10)
    if len(bad):
        row = int(bad[0])
        got = f"label {int(y[row])} in row {row:,} (byte {offset + row * stride:,})"
        raise refusal(str(path), got=got, expected="labels 0 to 9", fix=_AGAIN)


def read_digits() -> Files:
    """Read the 1,797 digits in scikit-learn, pixels 0 to 16."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    source = "scikit-learn digits, 1,797 images embedded in the package"
    return Files((bunch.images[:, None].astype(np.uint8), bunch.target), None, _DIGITS, source, scale=16.0)


def read_mnist(folder: Path) -> Files:
    """Read the four MNIST files of a folder: official names or a dot before ``idx``, gzipped or not."""
    paths, missing = [], []
    for name in _MNIST_FILES:
        dotted = name.replace("-idx", ".idx")
        candidates = [folder / f"{stem}{end}" for stem in (name, dotted) for end in ("", ".gz")]
        existing = [path for path in candidates if path.is_file()]
        paths += existing[:1]
        missing += [] if existing else [name]
    if missing:
        raise refusal(str(folder), got=f"no {', '.join(missing)}", expected=MNIST_EXPECTED, fix=NO_DOWNLOAD)
    splits = []
    for images, labels in (paths[:2], paths[2:]):
        x, y = read_idx(images, "images"), read_idx(labels, "labels")
        if len(x) != len(y):
            expected = f"{len(x):,}, as many as {images.name} has"
            raise refusal(str(labels), got=f"{len(y):,} labels", expected=expected, fix=_AGAIN)
        _check_labels(y, labels, offset=8, stride=1)
        splits.append((x[:, None], y))
    return Files(splits[0], splits[1], _DIGITS, f"MNIST idx files {', '.join(path.name for path in paths)}")


def read_cifar10(folder: Path) -> Files:
    """Read CIFAR-10, binary or Python version, any number of records per file, in `folder` or its official subfolder.

    Nothing in a pickle is executed: it may hold only NumPy arrays and plain values.
    """
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    places = [
        (folder / sub, end)
        for end, official in ((".bin", "cifar-10-batches-bin"), ("", "cifar-10-batches-py"))
        for sub in (".", official)
    ]
    counts = [sum((place / f"{name}{end}").is_file() for name in batches) for place, end in places]
    place, end = places[int(np.argmax(counts))]  # the place with most files, so that an error names those missing there
    names = [f"{name}{end}" for name in batches]
    missing = [name for name in names if not (place / name).is_file()]
    if missing:
        got = f"no {', '.join(missing)}" if max(counts) else "no CIFAR-10 files"
        raise refusal(str(place), got=got, expected=CIFAR10_EXPECTED, fix=NO_DOWNLOAD)
    read = _cifar_binary if end else _cifar_pickle
    parts = [read(place / name) for name in names]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    test_x, test_y = parts[-1]
    kind = "binary" if end else "python"
    rows = ", ".join(f"{name} ({len(part[1]):,})" for name, part in zip(names, parts, strict=True))
    shape = (-1, 3, 32, 32)
    return Files((x.reshape(shape), y), (test_x.reshape(shape), test_y), CIFAR10_CLASSES, f"CIFAR-10 {kind}: {rows}")


def _cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    blob = _read_bytes(path, f"CIFAR-10 records of {_RECORD} bytes")
    rows, rest = divmod(len(blob), _RECORD)
    if rest:
        got = f"{len(blob):,} bytes: {rows:,} complete records up to byte {rows * _RECORD:,}, then {rest:,} bytes"
        raise refusal(str(path), got=got, expected=f"a multiple of {_RECORD:,} bytes", fix=_AGAIN)
    records = np.frombuffer(blob, np.uint8).reshape(rows, _RECORD)
    _check_labels(records[:, 0], path, offset=0, stride=_RECORD)
    return records[:, 1:], records[:, 0]


def _latin1(text: str, encoding: str = "") -> bytes:
    """Replace ``_codecs.encode``, which NumPy's protocol-2 pickles use for raw bytes; only this codec is allowed."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin-1")


class _Array:
    """Replace a pickled array by its state as plain values: NumPy's own code does not check it."""

    state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype:
    """Replace a pickled dtype by its name."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("latin-1") if isinstance(name, bytes) else str(name)

    def __setstate__(self, state: Any) -> None:
        pass


_PERMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickler of arrays, dicts, lists, strings, bytes, numbers; refuses any other global before looking it up."""

    def __init__(self, path: Path, blob: bytes) -> None:
        super().__init__(io.BytesIO(blob), encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Look up a permitted global."""
        if (module, name) not in _PERMITTED:
            expected = "a pickle of NumPy arrays, dicts, lists, strings and numbers only"
            fix = "This is not an official CIFAR-10 file and may be malicious: delete it. Nothing was executed."
            raise refusal(str(self._path), got=f"a pickle that asks for {module}.{name}", expected=expected, fix=fix)
        return _PERMITTED[module, name]


def _cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    blob = _read_bytes(path, "a CIFAR-10 python batch")
    try:
        batch = _ArraysOnly(path, blob).load()
    except Refused:
        raise
    except Exception as error:  # a broken pickle may raise almost anything
        got = f"a pickle of {len(blob):,} bytes that cannot be read ({error})"
        raise refusal(str(path), got=got, expected="a CIFAR-10 python batch", fix=_AGAIN) from error
    entries = batch if isinstance(batch, dict) else {}
    # keys are bytes from Python 2, str if the batch was pickled again under Python 3
    array, labels = (entries.get(key.encode(), entries.get(key)) for key in ("data", "labels"))
    state = array.state if isinstance(array, _Array) else ()
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
        raise refusal(str(path), got="no array under the key data", expected="a CIFAR-10 python batch", fix=_AGAIN)
    _, shape, dtype, by_columns, raw = state
    rows = len(labels) if isinstance(labels, list) else 0
    if dtype.name != "u1" or shape != (rows, _RECORD - 1) or not isinstance(raw, bytes) or len(raw) != math.prod(shape):
        got = f"data {dtype.name} of shape {shape} and {rows:,} labels"
        expected = f"data u1 (uint8) of shape (n, {_RECORD - 1}) and a list of n labels"
        raise refusal(str(path), got=got, expected=expected, fix=_AGAIN)
    x = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label <= 9:
            raise refusal(str(path), got=f"label {label!r} in row {row:,}", expected="labels 0 to 9", fix=_AGAIN)
    return x, np.array(labels, np.uint8)


def read_npz(path: Path) -> Files:
    """Read the arrays of an ``.npz`` file: x_train, y_train, x_test, y_test, or x and y. Never unpickles."""
    _read_bytes(path, "an .npz file", limit=512)
    expected = "x_train, y_train, x_test, y_test, or x and y"
    if not zipfile.is_zipfile(path):
        got = "a file that is not a zip archive, or one cut short"
        raise refusal(str(path), got=got, expected="an .npz file", fix="Write it again with numpy.savez.")
    key = "its table of contents"
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = set(archive.files)
            split = {"x_train", "y_train", "x_test", "y_test"} <= keys
            if not split and not {"x", "y"} <= keys:
                got = f"keys {', '.join(sorted(keys)) or '(none)'}"
                raise refusal(str(path), got=got, expected=expected, fix="Use these names in numpy.savez.")
            arrays = {}
            for key in ("x_train", "y_train", "x_test", "y_test") if split else ("x", "y"):
                arrays[key] = archive[key]
    except Refused:
        raise
    except Exception as error:  # a malicious or damaged archive may raise almost anything
        got = f"{key} cannot be read ({error})"
        expected = "plain numeric arrays (no Python objects), undamaged"
        raise refusal(str(path), got=got, expected=expected, fix="Write it again with numpy.savez.") from error
    values = tuple(arrays.values())
    return Files(values[:2], values[2:] or None, None, f"npz file {path.name}: {', '.join(arrays)}")


def read_image_folder(folder: Path) -> Files:
    """Read FOLDER/train/CLASS/* and FOLDER/test/CLASS/*, or FOLDER/CLASS/*: PNG and JPEG, one size, gray or RGB."""
    split = (folder / "train").is_dir() and (folder / "test").is_dir()
    roots = [folder / "train", folder / "test"] if split else [folder]
    folders = [_class_folders(root) for root in roots]
    classes = tuple(path.name for path in folders[0])
    for other in folders[1:]:
        odd = sorted(set(classes) ^ {path.name for path in other})
        if odd:
            got = f"class {odd[0]!r} in only one of train and test"
            raise refusal(str(folder), got=got, expected="the same class folders in both", fix="Add or remove it.")
    labels = [[label for label, path in enumerate(group) for _ in _visible(path)] for group in folders]
    pixels = _read_images([path for group in folders for inner in group for path in _visible(inner)])
    n = len(labels[0])
    train = (pixels[:n], np.array(labels[0]))
    test = (pixels[n:], np.array(labels[1])) if split else None
    layout = "train/CLASS and test/CLASS" if split else "CLASS"
    return Files(train, test, classes, f"images in {folder.name}/, {layout}: {', '.join(classes)}")


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        fix = "Check its permissions."
        raise refusal(str(folder), got=error.strerror or error, expected="a readable folder", fix=fix) from error


def _class_folders(root: Path) -> list[Path]:
    folders = [path for path in _visible(root) if path.is_dir()]
    if not folders:
        fix = "Name the folder that holds the class folders."
        raise refusal(str(root), got="no class folders", expected="one folder of images per class", fix=fix)
    for folder in folders:
        if not _visible(folder):
            raise refusal(str(folder), got="an empty class folder", expected="images", fix="Add some or remove it.")
    return folders


def _read_images(paths: list[Path]) -> np.ndarray:
    from PIL import Image

    pixels = np.empty(0, np.uint8)
    first = ""
    for row, path in enumerate(paths):
        if path.suffix.lower() not in _IMAGE_SUFFIXES or not path.is_file():
            got = f"{'a folder' if path.is_dir() else 'a file'} that is not {', '.join(_IMAGE_SUFFIXES)}"
            expected = "only PNG and JPEG images in a class folder"
            raise refusal(str(path), got=got, expected=expected, fix="Move it elsewhere.")
        blob = _read_bytes(path, "a PNG or JPEG image")
        try:
            with Image.open(io.BytesIO(blob), formats=("PNG", "JPEG")) as image:
                mode = image.mode
                array = np.array(image)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... on damaged files
            got = f"an image that cannot be read ({error})"
            raise refusal(str(path), got=got, expected="an intact PNG or JPEG image", fix="Replace it.") from error
        if mode not in ("L", "RGB"):
            fix = "Convert all images to one of them."
            raise refusal(str(path), got=f"mode {mode}", expected="8-bit gray (L) or RGB", fix=fix)
        if row == 0:
            pixels = np.empty((len(paths), *array.shape), np.uint8)
            first = f"{image.width} x {image.height} {mode}, as {path.name}"
        elif array.shape != pixels.shape[1:]:
            got = f"{image.width} x {image.height} {mode}"
            raise refusal(str(path), got=got, expected=first, fix="Bring all images to one size and mode.")
        pixels[row] = array
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
