"""Finished experiments kept as files, so that a stopped study goes on; figures and tables of its sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkit.base.files import ensure_folder, read_arrays, read_json, write_arrays, write_json

Say = Callable[[str], None]
Item = dict[str, Any]


class Part(NamedTuple):
    """One finished experiment: numbers as JSON has them, and arrays."""

    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Work:
    """What every experiment is given: sizes, the study's folder, that of MNIST's files, where to say what is done."""

    scale: Any  # the study's own sizes
    folder: Path
    data_dir: str | Path | None
    say: Say

    def kept(self, name: str, line: str, make: Callable[[], Part]) -> Part:
        """Read a part that was finished before, or make and keep it: numbers last, for they say that it is whole."""
        numbers, arrays = (self.folder / "parts" / f"{name}.{kind}" for kind in ("json", "safetensors"))
        if not numbers.exists():
            self.say(line)
            ensure_folder(self.folder / "parts")
            made = make()
            if made.arrays:
                write_arrays(arrays, made.arrays)
            write_json(numbers, made.numbers)
        return Part(read_json(numbers), read_arrays(arrays) if arrays.exists() else {})

    def trajectory(self, name: str) -> Path:
        """Folder of a run, which goes on where it was stopped."""
        return self.folder / "runs" / name / "trajectory"


# ---------------------------------------------------------------------- what a report's section holds


def lines(title: str, reading: str, x: Item, y: Item, panels: Sequence[Item], **more: Any) -> Item:
    """A figure of curves; `panels` hold a heading and series, `x` and `y` what `axis` gives."""
    return {"kind": "lines", "title": title, "reading": reading, "x": x, "y": y, "panels": list(panels)} | more


def axis(title: str, scale: str = "linear") -> Item:
    """Linear or "log"."""
    return {"title": title, "scale": scale}


def table(title: str, columns: Sequence[str], rows: list[list[str]], note: str = "", folded: bool = False) -> Item:
    """A table of texts, perhaps behind its title."""
    return {"kind": "table", "title": title, "columns": list(columns), "rows": rows, "note": note, "folded": folded}
