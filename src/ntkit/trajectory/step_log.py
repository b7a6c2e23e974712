"""The log of a recorded loop: loss, learning rates and batch indices of every step, 1000 steps per file."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ntkit.base.files import remove
from ntkit.base.integrity import check_place, damaged
from ntkit.base.tensors import read_tensors_and_metadata, write_tensors

SEGMENT = 1000  # steps per file


class LogEntry(NamedTuple):
    """Numbers of one step. Tensors on a device stay there until they are written: reading them would wait."""

    loss: float | Tensor | None
    rates: list[float | Tensor]
    indices: Tensor | None


class StepLog:
    """Writes the log: entries are appended in memory; `flush` updates the files, each complete or absent.

    `run` is the id of the run that the files are of.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, ""
        self.diverged: tuple[int, str] | None = None  # the first step whose loss is not finite, and that loss
        # First step of the open segment, entries from there on, number of these on disk. One tuple, so that a Ctrl-C
        # never finds a part of it changed.
        self._open: tuple[int, list[LogEntry], int] = (0, [], 0)

    def __len__(self) -> int:
        return self._open[0] + len(self._open[1])

    def append(self, entry: LogEntry) -> None:
        """Add the next step."""
        self._open[1].append(entry)

    def flush(self) -> None:
        """Write every segment that has new steps, earlier ones first."""
        first, rows, written = self._open
        if written == len(rows):
            return
        rows[written:] = fresh = _on_cpu(rows[written:])
        for step, row in enumerate(fresh, first + written):
            if self.diverged is None and isinstance(row.loss, float) and not math.isfinite(row.loss):
                self.diverged = (step, str(row.loss))
        while rows:
            self._write(first, rows[:SEGMENT])
            if len(rows) < SEGMENT:
                break
            first, rows = first + SEGMENT, rows[SEGMENT:]
            self._open = (first, rows, 0)
        self._open = (first, rows, len(rows))

    def truncate(self, steps: int, diverged: tuple[int, str] | None) -> None:
        """Delete all but the first `steps` steps: a resumed run repeats those after its checkpoint."""
        first = steps // SEGMENT * SEGMENT
        rows = _entries(_segment(self.folder, first), self.run)[: steps - first] if steps > first else []
        for other in sorted(_segments(self.folder), reverse=True):
            if other > first or (other == first and not rows):
                remove(_segment(self.folder, other))
        if rows:
            self._write(first, rows)
        self.diverged, self._open = diverged, (first, rows, len(rows))

    def _write(self, first: int, rows: list[LogEntry]) -> None:
        write_tensors(_segment(self.folder, first), _as_tensors(rows), {"run": self.run, "step": f"{first:08d}"})


def read_log(folder: Path, run: str, groups: int, steps: int | None = None) -> dict[str, Tensor]:
    """Losses [S] and learning rates [S, groups] (float64) of the steps written so far.

    `groups` is the number at the start: some may have come later. Of a run that has ended all its `steps` are there: a
    missing file is refused by name.
    """
    losses, rates = [torch.zeros(0, dtype=torch.float64)], []
    for first in sorted(_segments(folder)):
        if first != sum(map(len, losses)) or not _segment(folder, first).exists():
            break
        segment = _tensors(_segment(folder, first), run)
        losses.append(segment["losses"])
        rates.append(segment["learning_rates"])
    if steps is not None and (found := sum(map(len, losses))) < steps:
        last = found // SEGMENT * SEGMENT
        raise damaged(_segment(folder, last), f"no step {found} in it, of {steps}")
    groups = max([groups, *(part.shape[1] for part in rates)])
    parts = [torch.full((0, groups), math.nan, dtype=torch.float64), *(_padded(part, groups) for part in rates)]
    return {"losses": torch.cat(losses), "learning_rates": torch.cat(parts)}


def check_log(folder: Path, run: str, steps: int) -> None:
    """Refuse a log whose first `steps` steps are not all there, as they were written."""
    for first in range(0, steps, SEGMENT):
        if len(_tensors(path := _segment(folder, first), run)["losses"]) < min(steps - first, SEGMENT):
            raise damaged(path, f"cut off before step {steps}")


def read_indices(folder: Path, run: str, step: int) -> Tensor | None:
    """Batch indices of a step; None if none were recorded."""
    path = _segment(folder, step // SEGMENT * SEGMENT)
    try:
        now = path.stat()  # a file that grew since the last call is read again
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    entries = _cached_entries(path, run, (now.st_ino, now.st_mtime_ns, now.st_size))
    if step % SEGMENT >= len(entries):
        raise damaged(path, f"no step {step} in it")
    indices = entries[step % SEGMENT].indices
    return None if indices is None else indices.clone()


@lru_cache(maxsize=4)  # a replay asks for one step after the other
def _cached_entries(path: Path, run: str, _version: tuple[int, ...]) -> list[LogEntry]:
    return _entries(path, run)


def _entries(path: Path, run: str) -> list[LogEntry]:
    segment = _tensors(path, run)
    sizes = segment["sizes"].tolist()
    indices = iter(segment["indices"].split([size for size in sizes if size >= 0]))
    numbers = zip(segment["losses"].tolist(), segment["learning_rates"].tolist(), sizes, strict=True)
    return [LogEntry(loss, rates, None if size < 0 else next(indices)) for loss, rates, size in numbers]


def _tensors(path: Path, run: str) -> dict[str, Tensor]:
    """The tensors of a segment, as `_as_tensors` made them."""
    if not path.exists():
        raise damaged(path, "no such file")
    segment, metadata = read_tensors_and_metadata(path)
    check_place(path, metadata, run=run, step=path.stem)
    forms = {"losses": 1, "learning_rates": 2, "sizes": 1, "indices": 1}
    if {name: tensor.dim() for name, tensor in segment.items()} != forms or (
        len({len(segment[name]) for name in ("losses", "learning_rates", "sizes")}) > 1
        or int(segment["sizes"].clamp(min=0).sum()) != len(segment["indices"])
    ):
        raise damaged(path, "no log of steps")  # complete, but never written by us
    return segment


def _as_tensors(rows: list[LogEntry]) -> dict[str, Tensor]:
    groups = max(len(row.rates) for row in rows)
    rates = [_padded(torch.tensor([row.rates], dtype=torch.float64), groups) for row in rows]
    batches = [row.indices for row in rows if row.indices is not None]
    return {
        "losses": torch.tensor([math.nan if row.loss is None else row.loss for row in rows], dtype=torch.float64),
        "learning_rates": torch.cat(rates),
        "sizes": torch.tensor([-1 if row.indices is None else len(row.indices) for row in rows]),
        "indices": torch.cat([torch.zeros(0, dtype=torch.int64), *batches]),
    }


def _padded(rates: Tensor, groups: int) -> Tensor:
    """Rates with NaN for missing groups: a group added during the run had no learning rate before."""
    return torch.nn.functional.pad(rates, (0, groups - rates.shape[1]), value=math.nan)


def _on_cpu(rows: list[LogEntry]) -> list[LogEntry]:
    """Entries without tensors on a device: losses and learning rates as numbers."""
    return [
        LogEntry(
            None if row.loss is None else float(row.loss),
            [float(rate) for rate in row.rates],
            None if row.indices is None else row.indices.cpu(),
        )
        for row in rows
    ]


def _segments(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdecimal()]


def _segment(folder: Path, first: int) -> Path:
    return folder / f"{first:08d}.safetensors"
