"""CIFAR-10: the binary version, and the Python version, whose pickles are read as data and never executed."""

from __future__ import annotations

import math
import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.checks import Refused, refusal
from ntkit.data.readers import AGAIN, NO_DOWNLOAD, Files, check_labels, read_whole

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_EXPECTED = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin (or the Python version's data_batch_1 to data_batch_5 and "
    "test_batch), here or in cifar-10-batches-bin (cifar-10-batches-py)"
)

_RECORD = 1 + 3 * 32 * 32  # CIFAR-10: a label byte, then 1024 red, 1024 green and 1024 blue bytes


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
    counts = [sum(os.path.isfile(place / f"{name}{end}") for name in batches) for place, end in places]
    place, end = places[int(np.argmax(counts))]  # the place with most files, so that an error names those missing there
    names = [f"{name}{end}" for name in batches]
    missing = [name for name in names if not os.path.isfile(place / name)]
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
    blob = read_whole(path, f"CIFAR-10 records of {_RECORD} bytes")
    rows, rest = divmod(len(blob), _RECORD)
    if rest:
        got = f"{len(blob):,} bytes: {rows:,} complete records up to byte {rows * _RECORD:,}, then {rest:,} bytes"
        raise refusal(str(path), got=got, expected=f"a multiple of {_RECORD:,} bytes", fix=AGAIN)
    records = np.frombuffer(blob, np.uint8).reshape(rows, _RECORD)
    check_labels(records[:, 0], path, offset=0, stride=_RECORD)
    return records[:, 1:], records[:, 0]


def _cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    blob = read_whole(path, "a CIFAR-10 python batch")
    try:
        batch = _PickleAsData(path, blob).value
    except Refused:
        raise
    except Exception as error:  # a broken pickle may raise almost anything
        got = f"a pickle of {len(blob):,} bytes that cannot be read ({error})"
        raise refusal(str(path), got=got, expected="a CIFAR-10 python batch", fix=AGAIN) from error
    entries = batch if isinstance(batch, dict) else {}
    # keys are bytes from Python 2, str if the batch was pickled again under Python 3
    array, labels = (entries.get(key.encode(), entries.get(key)) for key in ("data", "labels"))
    state = array.state if isinstance(array, _Array) else ()
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
        raise refusal(str(path), got="no array under the key data", expected="a CIFAR-10 python batch", fix=AGAIN)
    _, shape, dtype, by_columns, raw = state
    rows = len(labels) if isinstance(labels, list) else 0
    plain = isinstance(shape, tuple) and all(type(extent) is int for extent in shape)
    if (
        not plain
        or dtype.name != "u1"
        or shape != (rows, _RECORD - 1)
        or not isinstance(raw, bytes)
        or len(raw) != math.prod(shape)
    ):
        got = f"data {dtype.name} of shape {shape if plain else '(no numbers)'} and {rows:,} labels"
        expected = f"data u1 (uint8) of shape (n, {_RECORD - 1}) and a list of n labels"
        raise refusal(str(path), got=got, expected=expected, fix=AGAIN)
    x = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label <= 9:
            what = repr(label) if isinstance(label, int) else type(label).__name__
            raise refusal(str(path), got=f"label {what} in row {row:,}", expected="labels 0 to 9", fix=AGAIN)
    return x, np.array(labels, np.uint8)


class _Array:
    """A pickled array: its state as plain values."""

    state: Any = ()


class _Dtype:
    """A pickled dtype: its name."""

    state: Any = ()

    def __init__(self, name: Any = b"", *_: Any) -> None:
        if not isinstance(name, str | bytes):
            raise ValueError("a dtype without a name")
        self.name = name.decode("latin-1") if isinstance(name, bytes) else name


def _latin1(text: Any, encoding: Any = "") -> bytes:
    """Replace ``_codecs.encode``, which NumPy's protocol-2 pickles use for raw bytes; only this codec is allowed."""
    if encoding not in ("latin1", "latin-1", b"latin1"):
        raise ValueError(f"codec {encoding!r}" if isinstance(encoding, str | bytes) else "a codec without a name")
    return text.encode("latin-1")


# Every name that such a pickle may ask for, and what stands for it here; none of it is NumPy's.
_PERMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}

_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_BYTES = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # of Python 2
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _PickleAsData:
    """What a pickle's instructions would build, of dicts, lists, tuples, texts and numbers; nothing is imported.

    Python's own unpickler takes memory for a number in the file that says how much, and can be made to hash nested
    tuples for ever; here every step costs what its bytes cost.
    """

    def __init__(self, path: Path, blob: bytes) -> None:
        self.path, self.stack, self.below, self.memo = path, [], [], {}
        self.room = len(blob)  # bytes that texts may become, all together
        most = 10_000 + len(blob) // 256  # a record of 3,073 bytes has a label and a file name
        for count, (op, argument, _) in enumerate(pickletools.genops(blob)):
            if count > most:
                raise ValueError("more instructions than such a file needs")
            self._step(op.name, argument)
        self.value: Any = self.stack[-1]

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _NUMBERS or name in _TEXTS:
            stack.append(argument)
        elif name in _BYTES:
            stack.append(argument.encode("latin-1"))
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._since_mark()
            self.stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _entries({}, items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
            _entries(self._top(dict), items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = argument.split(" ", 1) if argument else (stack.pop(-2), stack.pop())
            stack.append(self._permitted(module, attribute))
        elif name == "REDUCE":
            self._call(stack.pop(-2), stack.pop())
        elif name == "BUILD":
            state = stack.pop()
            (self._top(_Array) if isinstance(stack[-1], _Array) else self._top(_Dtype)).state = state
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the instruction {name}")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a {type(self.stack[-1]).__name__} in place of a {kind.__name__}")
        return self.stack[-1]

    def _permitted(self, module: Any, name: Any) -> Callable[..., Any]:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a global without a name")
        if (module, name) not in _PERMITTED:
            expected = "a pickle of NumPy arrays, dicts, lists, strings and numbers only"
            fix = "This is not an official CIFAR-10 file and may be malicious: delete it. Nothing was executed."
            raise refusal(str(self.path), got=f"a pickle that asks for {module}.{name}", expected=expected, fix=fix)
        return _PERMITTED[module, name]

    def _call(self, function: Any, arguments: Any) -> None:
        if function not in _PERMITTED.values() or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        if function is _latin1:
            self.room -= len(arguments[0])
            if self.room < 0:
                raise ValueError("texts longer than the file")
        self.stack.append(function(*arguments))


def _entries(entries: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | bytes):
            raise ValueError("a key that is no text")
        entries[key] = value
    return entries
