"""The log of a recorded loop: loss, learning rates and batch indices of every step, 1000 steps per file."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ntkit.base.tensors import read_tensors, read_tensors_if_present, write_tensors

SEGMENT = 1000  # steps per file


class LogEntry(NamedTuple):
    """Numbers of one step. Tensors on a device stay there until they are written: reading them would wait."""

    loss: float | Tensor | None
    rates: list[float | Tensor]
    indices: Tensor | None


class StepLog:
    """Writes the log: entries are appended in memory; `flush` updates the files, each complete or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
            write_tensors(_segment(self.folder, first), _as_tensors(rows[:SEGMENT]))
            if len(rows) < SEGMENT:
                break
            first, rows = first + SEGMENT, rows[SEGMENT:]
            self._open = (first, rows, 0)
        self._open = (first, rows, len(rows))

    def truncate(self, steps: int, diverged: tuple[int, str] | None) -> None:
        """Delete all but the first `steps` steps: a resumed run repeats those after its checkpoint."""
        first = steps // SEGMENT * SEGMENT
        rows = _entries(_segment(self.folder, first))[: steps - first] if steps > first else []
        for other in sorted(_segments(self.folder), reverse=True):
            if other > first or (other == first and not rows):
                _segment(self.folder, other).unlink()
        if rows:
            write_tensors(_segment(self.folder, first), _as_tensors(rows))
        self.diverged, self._open = diverged, (first, rows, len(rows))


def read_log(folder: Path) -> dict[str, Tensor]:
    """Losses [S] and learning rates [S, groups] (float64) of the steps written so far."""
    losses, rates = [torch.zeros(0, dtype=torch.float64)], []
    for first in sorted(_segments(folder)):
        segment = read_tensors_if_present(_segment(folder, first))
        if segment is None or first != sum(map(len, losses)):
            break
        losses.append(segment["losses"])
        rates.append(segment["learning_rates"])
    groups = max((part.shape[1] for part in rates), default=0)
    parts = [torch.full((0, groups), math.nan, dtype=torch.float64), *(_padded(part, groups) for part in rates)]
    return {"losses": torch.cat(losses), "learning_rates": torch.cat(parts)}


def read_indices(folder: Path, step: int) -> Tensor | None:
    """Batch indices of a step; None if none were recorded."""
    path = _segment(folder, step // SEGMENT * SEGMENT)
    now = path.stat()  # a file that grew since the last call is read again
    indices = _cached_entries(path, (now.st_ino, now.st_mtime_ns, now.st_size))[step % SEGMENT].indices
    return None if indices is None else indices.clone()


@lru_cache(maxsize=4)  # a replay asks for one step after the other
def _cached_entries(path: Path, _version: tuple[int, ...]) -> list[LogEntry]:
    return _entries(path)


def _entries(path: Path) -> list[LogEntry]:
    segment = read_tensors(path)
    sizes = segment["sizes"].tolist()
    indices = iter(segment["indices"].split([size for size in sizes if size >= 0]))
    return [
        LogEntry(loss, rates, None if size < 0 else next(indices))
        for loss, rates, size in zip(segment["losses"].tolist(), segment["learning_rates"].tolist(), sizes, strict=True)
    ]


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
    return [int(path.stem) for path in folder.glob("*.safetensors")]


def _segment(folder: Path, first: int) -> Path:
    return folder / f"{first:08d}.safetensors"
