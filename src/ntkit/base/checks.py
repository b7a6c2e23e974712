"""Checks of user input. Every refusal says what was given, what was expected, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class Refused(ValueError):
    """Input that cannot give a right answer. The message says what was given, what was expected, and what to do."""

    __module__ = "ntkit"  # the name that users import it by


class Damaged(Refused):
    """A file of a run that is not what was written there: changed, cut off, missing, or of another run."""


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
    return Refused(f"{subject}: got {got}; expected {expected}. {fix}")


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
    """Bytes from a number or a text such as "500 MB" or "2 GB".

    >>> parse_bytes("2 GB", "memory", "Give the scratch memory allowed.")
    2000000000
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", str(size))
    value = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if isinstance(size, bool) or value <= 0:
        raise refusal(subject, got=repr(size), expected='bytes, or text such as "500 MB" or "2 GB"', fix=fix)
    return value
