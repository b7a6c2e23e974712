"""A kernel matrix on disk, computed in a process that may be killed at any moment."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from file_operations import FileOperations
from torch import Tensor, nn

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
