"""``.npz`` files: sizes are read from the table of contents and the arrays' headers before memory is taken."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.checks import Refused, refusal
from ntkit.base.memory import check_room
from ntkit.data.readers import Files, open_data

_KEYS = tuple(keys for x in ("x", "X") for keys in ((f"{x}_train", "y_train", f"{x}_test", "y_test"), (x, "y")))
_DIRECTORY = 2**22  # bytes of a zip file's table of contents that are read: 50,000 arrays
_HEADER = 10_000  # characters of an array's header
_PIECE = 2**18  # bytes unpacked at a time
_AGAIN = "Write it again with numpy.savez."


class _Archive(io.BufferedReader):
    """A zip file whose table of contents is not read when it is absurdly large: zipfile reads it at once."""

    def read(self, size: int | None = -1) -> bytes:
        """Read bytes, at most those of the largest table."""
        size = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if size > _DIRECTORY:
            raise zipfile.BadZipFile(f"a table of contents of more than {_DIRECTORY:,} bytes")
        return super().read(size)


def read_npz(path: Path) -> Files:
    """Read the arrays of an ``.npz`` file: x and y, or x_train, y_train, x_test, y_test (or X). Never unpickles."""
    handle, stored = open_data(path, "an .npz file")
    key = "its table of contents"
    with handle:
        try:
            archive = zipfile.ZipFile(_Archive(handle.raw))
        except Exception as error:  # zipfile raises almost anything on a malicious file
            got = f"a file that is not a zip archive, or one cut short ({error})"
            raise refusal(str(path), got=got, expected="an .npz file", fix=_AGAIN) from error
        keys = _keys(path, archive)
        try:
            opened = []
            for key in keys:
                opened.append(_open(archive, key))
            check_room(str(path), sum(size for _, size, _ in opened), stored)
            arrays = []
            for key, member in zip(keys, opened, strict=True):  # noqa: B007 (names the array that fails)
                arrays.append(_fill(*member))
        except Refused:
            raise
        except Exception as error:  # a malicious or damaged archive may raise almost anything
            got = f"{key} cannot be read ({error})"
            expected = "plain numeric arrays (no Python objects), undamaged"
            raise refusal(str(path), got=got, expected=expected, fix=_AGAIN) from error
    train, test = (arrays[0], arrays[1]), (arrays[2], arrays[3]) if len(arrays) == 4 else None
    return Files(train, test, None, f"npz file {path.name}: {', '.join(keys)}")


def _keys(path: Path, archive: zipfile.ZipFile) -> Sequence[str]:
    """Names of the arrays to read, those of a split first."""
    names = archive.namelist()
    found = {name.removesuffix(".npy") for name in names if name.endswith(".npy")}
    for keys in _KEYS:
        if found.issuperset(keys):
            if twice := [key for key in keys if names.count(f"{key}.npy") > 1]:
                got = f"two arrays {twice[0]}"
                raise refusal(str(path), got=got, expected="one array of each name", fix=_AGAIN)
            return keys
    listed = sorted(found)
    got = f"keys {', '.join(listed[:20]) or '(none)'}{', ...' if len(listed) > 20 else ''}"
    expected = "x_train, y_train, x_test, y_test, or x and y (or with a capital X)"
    raise refusal(str(path), got=got, expected=expected, fix="Use these names in numpy.savez.")


def _open(archive: zipfile.ZipFile, key: str) -> tuple[Any, int, Any]:
    """Open a member and read its header: the stream of its data, their bytes, and a function that makes the array."""
    member = archive.getinfo(f"{key}.npy")
    if member.flag_bits & 1:
        raise ValueError("it is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression method {member.compress_type}, which numpy does not write")
    stream = archive.open(member)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format {version}, of structured arrays")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream, max_header_size=_HEADER)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    if dtype.kind not in ("biufcSU" if key.startswith("y") else "biufc"):
        raise ValueError(f"it is not a numeric array, but of type {dtype}")
    if any(type(extent) is not int or extent < 0 for extent in shape) or len(shape) > 32:
        raise ValueError("its shape is none")
    size = math.prod(shape) * dtype.itemsize
    held = member.file_size - stream.tell()
    if size != held or (size == 0 and math.prod(extent for extent in shape if extent) > 2**31):
        raise ValueError(f"its header says {shape} {dtype}, {size:,} bytes; there are {held:,}")
    return stream, size, lambda: np.empty(shape, dtype, order="F" if by_columns else "C")


def _fill(stream: Any, size: int, empty: Any) -> np.ndarray:
    array = empty()
    # the bytes in the order of the file: by rows, or by columns of the transposed array
    view = array.reshape(-1, order="A").view(np.uint8).data
    have = 0
    while have < size and (count := stream.readinto(view[have : have + _PIECE])):
        have += count
    if have < size or stream.read(1):  # reading to the end also compares the checksum
        raise ValueError(f"{have:,} bytes of {size:,}")
    return array
