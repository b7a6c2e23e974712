"""What all studies share: means over seeds in words, the form of a judged claim, the device they run on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (NaN for one seed).

    >>> mean_error([1.0, 3.0])
    (2.0, 1.0)
    """
    a = np.asarray(values, dtype=float)
    return float(a.mean()), float(a.std(ddof=1) / len(a) ** 0.5) if len(a) > 1 else math.nan


def told(values: Sequence[float], digits: int = 2) -> str:
    """Write the mean over seeds with its standard error.

    >>> told([1.0, 3.0])
    '2.00 ± 1.00'
    """
    mean, error = mean_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def claimed(claim: str, number: str, holds: bool | None, how: str) -> dict[str, Any]:
    """A claim, the number found, whether it holds, and by what rule; the form of ``results.json``."""
    return {"claim": claim, "number": number, "holds": None if holds is None else bool(holds), "how": how}


@contextmanager
def one_thread() -> Iterator[None]:
    """For small networks: threads would wait for each other, and most for those of other programs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
