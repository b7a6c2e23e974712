"""What a function computes, as a short text: to notice another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import CodeType
from typing import Any

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def function_identity(function: Any) -> str:
    """Name and code of a function, or type and plain settings of a callable object: what it computes, in files.

    Of what a function encloses only plain values count: two that differ by an enclosed tensor are taken for one.
    """
    code = getattr(function, "__code__", None)
    if code is None:
        own = getattr(function, "__dict__", {}).items()
        settings = {k: v for k, v in own if isinstance(v, (bool, int, float, str)) or v is None}
        return f"{type(function).__name__} {settings}"
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    parts = [*_of_code(code), *_plain(function.__defaults__ or ()), *_plain(cells)]
    return f"{function.__qualname__} {hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _of_code(code: CodeType) -> Iterator[Any]:
    """Instructions, names and constants; those of functions within, since their ``repr`` has an address."""
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        elif isinstance(constant, frozenset):  # in another order in each process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _plain(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield type(value).__name__
            yield from _plain(value)
        else:
            yield repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__
