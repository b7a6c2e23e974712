"""The door: input is checked here once, in one voice. Every refusal says got, expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class Refused(ValueError):
    """Input that cannot give a right answer. The message says what was got, what was expected, and what to do."""


def refusal(subject: str, *, got: Any, expected: Any, fix: str) -> Refused:
    """Build the one form every refusal takes (raise what it returns).

    Parameters
    ----------
    subject : the thing refused, as the user knows it: an argument, a layer's name, a file.
    got, expected : short descriptions.
    fix : one sentence that tells what to do.

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
    """Say which known names are nearest to an unknown one.

    >>> nearest("vg", ["mlp", "cnn", "vgg"])
    'Did you mean vgg? Known: cnn, mlp, vgg.'
    """
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
