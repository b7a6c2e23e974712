"""One folder per paper: its experiments, and each of its claims with the numbers that test it."""

from __future__ import annotations

from ntkit.studies.study import study

__all__ = ["study"]
