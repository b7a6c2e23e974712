"""A kernel matrix on disk, computed in a process that may be killed at any moment."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from file_operations import FileOperations
from torch import Tensor, nn
from torch.utils.data import Dataset

import ntkit

TILE, N = 5, 18  # four tiles a side, the last not whole


def samples(n: int = N) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def kernel(seed: int = 0, outputs: object = "trace") -> ntkit.TangentKernel:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    return ntkit.TangentKernel(model, outputs=outputs, memory="50 MB")  # a plan that does not depend on free memory


def create(folder: Path, n: int = N) -> ntkit.GramStore:
    return ntkit.GramStore.create(folder, kernel(), samples(n), tile=TILE, memory="50 MB")


def killed(folder: Path, n: int, last: int | None, log: Path) -> None:
    """Create the store; the process kills itself before the file operation number `last`, if any."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    torch.set_num_threads(1)
    operations = FileOperations(folder, last)
    create(folder, n)
    log.write_text(f"{operations.count}")


def with_workers(folder: Path, n: int, log: Path) -> None:
    """The same by three worker processes, from samples in a file."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    given = np.load(folder.with_name("samples.npy"), mmap_mode="r")
    ntkit.GramStore.create(folder, kernel(), given, workers=3, tile=TILE, memory="50 MB")


class Stubborn(nn.Module):
    """A model that cannot take samples with a negative first number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0] < -5).any()):
            raise RuntimeError("these samples are too negative")
        return self.inner(x)


class Rows(Dataset):
    """Samples one by one, with labels; those from number `wrong` on are others at every reading."""

    def __init__(self, n: int = N, wrong: int | None = None) -> None:
        self.x, self.wrong, self.asked = samples(n), wrong, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.asked += 1
        return self.x[i] + (self.asked if self.wrong is not None and i >= self.wrong else 0), i


def files_of(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found
    return found


def tiles_in(folder: Path) -> int:
    """How many tiles are written: a killed process leaves one it was writing, under a name of its own."""
    return sum(file.suffix != ".partial" for file in folder.glob("c/*/*"))


def counted(function, calls):
    def counted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counted
