"""Imports of libraries that change what is global in a process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Keep the state of Python's ``random`` over the imports within.

    Importing rich or scikit-learn draws from it, once a process: a script with a seed would get other numbers when it
    uses a part of ntkit for the first time.

    Examples
    --------
    >>> import random
    >>> before = random.getstate()
    >>> with same_random_numbers():
    ...     import rich.console
    >>> random.getstate() == before
    True
    """
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
