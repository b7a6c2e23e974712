"""Checks of user input. Every refusal says what was given, what was expected, and what to do."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_OF_ARRAY = 80  # characters of an array's numbers that a message quotes
_ARRAY = re.compile(r"[\[({]*(tensor|array|Parameter containing|<Tensor)\b")

_ODD = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, lone surrogates (bytes that are no UTF-8), line breaks
_REORDER = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # show a line in another order than it has


class Refused(ValueError):
    """Input that cannot give a right answer. The message says what was given, what was expected, and what to do."""

    __module__ = "ntkit"  # the name that users import it by


class Damaged(Refused):
    """A file of a run that is not what was written there: changed, cut off, missing, or of another run."""

    __module__ = "ntkit"


class NewerFormat(Refused):
    """A file whose format has a higher number than this version of ntkit reads."""


class Undefined(Refused):
    """A number that the input does not define: a cosine with zero, a ratio of zeros."""

    __module__ = "ntkit"


class NoLimit(Refused):
    """A network whose limit of infinite width does not exist, or is not known in closed form."""

    __module__ = "ntkit"


def undefined(subject: str, *, got: Any, expected: Any, fix: str) -> Undefined:
    """Build the refusal of a number that is not defined, in the words of `refusal`."""
    return Undefined(str(refusal(subject, got=got, expected=expected, fix=fix)))


def defined(function: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """The function's value, or None where it is not defined: for pages that say so and go on.

    >>> import ntkit, torch
    >>> defined(ntkit.alignment, torch.eye(3), torch.ones(3), centered=True) is None
    True
    """
    try:
        return function(*args, **kwargs)
    except Undefined:
        return None


def fault(error: Exception) -> str:
    """What is wrong according to a refusal, without what was expected and the advice.

    >>> fault(ValueError("layer '4' (MaxPool2d): got max_pool2d; expected another. Use it."))
    "layer '4' (MaxPool2d): max_pool2d"
    """
    return str(error).partition("; expected ")[0].replace(": got ", ": ", 1)


def refusal(subject: str, *, got: Any, expected: Any, fix: str) -> Refused:
    """Build a refusal; the caller raises it.

    Parameters
    ----------
    subject : what is refused, in the user's terms: an argument, a layer's name, a file.
    got, expected : short descriptions.
    fix : one sentence that says what to do.

    Returns
    -------
    Refused
        With the message ``subject: got X; expected Y. Fix.``

    Examples
    --------
    >>> str(refusal("--classes", got="3 3", expected="two different classes", fix="Name another class."))
    '--classes: got 3 3; expected two different classes. Name another class.'
    """
    subject, got, expected = (_shortened(str(part)) for part in (subject, got, expected))
    return Refused(printable(f"{subject}: got {got}; expected {expected}. {fix}"))


def _shortened(text: str) -> str:
    """Text without its middle if it is very long (a library's error may quote a whole file); of an array, its start."""
    if len(text) > _OF_ARRAY and _ARRAY.match(text):  # given in the place of a word: its numbers say nothing
        return f"{' '.join(text[:_OF_ARRAY].split())} ..."
    return text if len(text) <= 20_000 else f"{text[:5_000]} ... {text[-500:]}"


def printable(text: str) -> str:
    r"""Text as one line: control characters, line breaks and bytes that are no UTF-8 as their escapes.

    A name read from a file could otherwise move the cursor of a terminal and hide what was printed before it.

    >>> printable("two\nlines"), printable("naïve 模型")
    ('two\\nlines', 'naïve 模型')
    """
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if _is_odd(c) else c for c in text)


def _is_odd(character: str) -> bool:
    return unicodedata.category(character) in _ODD or character in _REORDER


def check_name(subject: str, name: str, fix: str) -> None:
    """Refuse a name that no report can show: control characters, line breaks, bytes that are no UTF-8."""
    odd = [c for c in name if _is_odd(c)]
    if odd:
        what = "bytes that are not UTF-8" if "\ud800" <= odd[0] <= "\udfff" else f"the character {odd[0]!r}"
        raise refusal(subject, got=f"{name!r}, with {what}", expected="a name that can be printed", fix=fix)


def nearest(name: str, names: Iterable[str]) -> str:
    """List the valid names, those nearest to a wrong one first.

    >>> nearest("vg", ["mlp", "cnn", "vgg"])
    'Did you mean vgg? Options: cnn, mlp, vgg.'
    """
    valid = sorted(names)
    close = difflib.get_close_matches(name, valid, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Options: {', '.join(valid)}."


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(size: int | str | None, subject: str, fix: str) -> int | None:
    """Bytes from a number or a text such as "500 MB" or "2 GB"; a text of a small number alone has lost its unit.

    >>> parse_bytes("2 GB", "memory", "Give the scratch memory allowed.")
    2000000000
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", str(size))
    number = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0.0
    value = int(number) if number < 2**63 else 0
    if isinstance(size, str) and match and not match[2] and 0 < value < 10**6:
        raise refusal(subject, got=repr(size), expected="a number with its unit", fix=f"Such as '{size} GB'.")
    if isinstance(size, bool) or value <= 0:
        raise refusal(subject, got=repr(size), expected='bytes, or text such as "500 MB" or "2 GB"', fix=fix)
    return value
