"""Situations of everyday use that were reported in public, and what is right in each: a number, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import ntkit


class Situation(NamedTuple):
    """A name, `repository#number` of its report, what is done in a folder, and the refusal that is right, if one is."""

    name: str
    source: str
    do: Callable[[Path], None]
    refused: str | None

    def check(self, folder: Path) -> None:
        """Do it: it checks its own numbers, or is refused with got, expected and what to do."""
        if self.refused is None:
            self.do(folder)
            return
        with pytest.raises(ntkit.Refused, match=self.refused) as caught:
            self.do(folder)
        assert "; expected " in str(caught.value)
        assert str(caught.value).rstrip(".") != str(caught.value)  # ends in a sentence: what to do


class Table(list[Situation]):
    """The situations of a file."""

    def of(self, source: str, refused: str | None = None) -> Callable[[Callable[[Path], None]], Callable]:
        """Add a function; its name is the situation's."""

        def add(do: Callable[[Path], None]) -> Callable[[Path], None]:
            self.append(Situation(do.__name__, source, do, refused))
            return do

        return add

    def parametrized(self) -> Callable:
        """A mark that runs a test for each, named by what happens and its source."""
        names = [f"{s.name} {s.source}" for s in self]
        return pytest.mark.parametrize("situation", self, ids=names)
