"""Readers of data files: a file is read completely and checked, or refused with its name and the bad byte or row."""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkit.base.checks import refusal
from ntkit.base.imports import same_random_numbers
from ntkit.base.memory import check_room
from ntkit.base.regular_files import check_start, open_regular

_MNIST_FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
MNIST_EXPECTED = f"the four MNIST files {', '.join(_MNIST_FILES)}, each with or without .gz"
_DIGITS = tuple(str(digit) for digit in range(10))

AGAIN = "Download this file again from its official source. Nothing was loaded."
NO_DOWNLOAD = "Put the official files there or name another folder; nothing is ever downloaded."
_PIECE = 2**16  # bytes of a compressed file that are unpacked at a time


class Files(NamedTuple):
    """Content of the files: ``(x, y)`` for training and for testing (None: no test set)."""

    train: tuple[Any, Any]
    test: tuple[Any, Any] | None
    classes: Sequence[str] | None
    source: str
    scale: float = 255.0  # the uint8 pixel value that becomes 1
    vocabulary: tuple[str, ...] | None = None  # the word of each token number; of all words, without a test set
    targets: Sequence[str] | None = None  # names of the targets of a regression
    numeric: Sequence[bool] | None = None  # of a table: the columns of x that are numbers, to be standardized
    columns: Sequence[str] | None = None  # of a table: names of the columns of x


def open_data(path: Path, expected: str) -> tuple[io.BufferedReader, int]:
    """Open a data file, neither empty nor a web page nor a pointer, and return it with its size in bytes."""
    handle = open_regular(path, expected)
    try:
        start, size = handle.read(512), os.fstat(handle.fileno()).st_size
        handle.seek(0)
        if not start:
            fix = "Write it again, or download it again from its official source. Nothing was loaded."
            raise refusal(str(path), got="an empty file (0 bytes)", expected=expected, fix=fix)
        check_start(path, start, expected, AGAIN)
    except OSError as error:
        handle.close()
        fix = "Check its name and permissions."
        raise refusal(str(path), got=error.strerror or error, expected=expected, fix=fix) from error
    except BaseException:
        handle.close()
        raise
    return handle, size


def read_whole(path: Path, expected: str) -> bytes:
    """Read all bytes of a data file, at most those that it has when it is opened."""
    handle, size = open_data(path, expected)
    with handle:
        check_room(str(path), size)
        return handle.read(size)


class _Gunzip(io.RawIOBase):
    """Unpacks a gzip file as far as it is read, and no further."""

    def __init__(self, path: Path, handle: io.BufferedReader) -> None:
        self._path, self._handle = path, handle
        self._inflate: Any = None
        self._packed = b""
        self._member = self._unpacked = 0  # byte at which the part begins, bytes unpacked so far

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpack up to the length of `buffer` into it; 0 at the end."""
        while True:
            self._packed = self._packed or self._handle.read(_PIECE)
            if self._inflate is None:
                if not self._packed:
                    return 0
                self._member = self._handle.tell() - len(self._packed)
                self._inflate = zlib.decompressobj(wbits=31)
            try:
                out = self._inflate.decompress(self._packed, len(buffer))
            except zlib.error as error:
                got = f"gzip data that cannot be unpacked, in the part from byte {self._member:,} ({error})"
                raise refusal(str(self._path), got=got, expected="an intact gzip file", fix=AGAIN) from error
            at_end = not self._packed
            self._packed = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._inflate = None
            elif at_end and not out:
                size = self._handle.tell()
                got = f"a gzip file cut short at byte {size:,} ({self._unpacked:,} bytes unpacked, no end)"
                raise refusal(str(self._path), got=got, expected="a complete gzip file", fix=AGAIN)
            if out:
                buffer[: len(out)] = out
                self._unpacked += len(out)
                return len(out)


def read_idx(path: Path, content: str) -> np.ndarray:
    """Read one idx file of uint8 ``"images"`` [n, h, w] or ``"labels"`` [n], gzipped or not whatever its name."""
    magic, rank = {"images": (2051, 3), "labels": (2049, 1)}[content]
    expected = f"an idx file of {content} (magic number {magic})"
    handle, stored = open_data(path, expected)
    with handle:
        packed = handle.read(2) == b"\x1f\x8b"
        handle.seek(0)
        stream = io.BufferedReader(_Gunzip(path, handle), _PIECE) if packed else handle
        header = 4 + 4 * rank
        head = stream.read(header)
        number = int.from_bytes(head[:4], "big")
        if len(head) >= 4 and number != magic:
            meaning = {2051: ", a file of images", 2049: ", a file of labels"}.get(number, "")
            got = f"magic number {number} at byte 0{meaning}"
            raise refusal(str(path), got=got, expected=expected, fix="Check that no file was renamed or swapped.")
        if len(head) < header:
            raise refusal(str(path), got=f"{len(head)} bytes", expected=f"a header of {header} bytes", fix=AGAIN)
        shape = [int.from_bytes(head[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank)]
        extents = " x ".join(f"{extent:,}" for extent in shape)
        if 0 in shape and math.prod(extent for extent in shape if extent) > 2**31:
            raise refusal(str(path), got=f"a header of {extents}", expected="at least one example", fix=AGAIN)
        values = math.prod(shape)
        size = header + values
        expected = f"{size:,} bytes for {extents} {content}"
        if not packed and stored != size:
            what = "cut short" if stored < size else f"{stored - size:,} trailing bytes from byte {size:,}"
            raise refusal(str(path), got=f"{stored:,} bytes ({what})", expected=expected, fix=AGAIN)
        check_room(str(path), values, stored)
        array = np.empty(values, np.uint8)
        have, view = 0, array.data
        while have < values and (count := stream.readinto(view[have : have + _PIECE])):
            have += count
        if have < values or stream.read(1):
            got = "trailing bytes" if have == values else f"{header + have:,} bytes (cut short)"
            raise refusal(str(path), got=got, expected=expected, fix=AGAIN)
    return array.reshape(shape)


def check_labels(y: np.ndarray, path: Path, offset: int, stride: int) -> None:
    """Refuse labels above 9, with row and byte."""
    bad = np.flatnonzero(y >= 10)
    if len(bad):
        row = int(bad[0])
        got = f"label {int(y[row])} in row {row:,} (byte {offset + row * stride:,})"
        raise refusal(str(path), got=got, expected="labels 0 to 9", fix=AGAIN)


def read_digits() -> Files:
    """Read the 1,797 digits in scikit-learn, pixels 0 to 16.

    The file is read without importing scikit-learn, which would draw from Python's random numbers, set environment
    variables and add warning filters, and take a second.
    """
    spec = importlib.util.find_spec("sklearn")
    file = Path(str(spec and spec.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        with gzip.open(file, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    else:  # a release of scikit-learn that keeps it elsewhere
        with same_random_numbers():
            from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        images, labels = bunch.images.astype(np.uint8), bunch.target
    source = "scikit-learn digits, 1,797 images embedded in the package"
    return Files((images[:, None], labels), None, _DIGITS, source, scale=16.0)


def read_mnist(folder: Path) -> Files:
    """Read the four MNIST files of a folder: official names or a dot before ``idx``, gzipped or not."""
    paths, missing = [], []
    for name in _MNIST_FILES:
        dotted = name.replace("-idx", ".idx")
        candidates = [folder / f"{stem}{end}" for stem in (name, dotted) for end in ("", ".gz")]
        existing = [path for path in candidates if os.path.isfile(path)]
        paths += existing[:1]
        missing += [] if existing else [name]
    if missing:
        raise refusal(str(folder), got=f"no {', '.join(missing)}", expected=MNIST_EXPECTED, fix=NO_DOWNLOAD)
    splits = []
    for images, labels in (paths[:2], paths[2:]):
        x, y = read_idx(images, "images"), read_idx(labels, "labels")
        if len(x) != len(y):
            expected = f"{len(x):,}, as many as {images.name} has"
            raise refusal(str(labels), got=f"{len(y):,} labels", expected=expected, fix=AGAIN)
        check_labels(y, labels, offset=8, stride=1)
        splits.append((x[:, None], y))
    return Files(splits[0], splits[1], _DIGITS, f"MNIST idx files {', '.join(path.name for path in paths)}")
