"""The rows that each step trains on: a pure function of seed and step, so that a resumed run needs no state."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """Combine a seed with its purpose, so that successive steps and epochs get independent random numbers.

    Examples
    --------
    >>> derived_seed("epoch", 0, 1) == derived_seed("epoch", 0, 1) != derived_seed("epoch", 1, 0)
    True
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def steps_per_epoch(n: int, batch_size: int | None) -> int:
    """Number of batches per epoch: ceil(n / batch_size), the last one smaller; one for full batch (None)."""
    return 1 if batch_size is None else -(-n // batch_size)


def batch_indices(seed: int, n: int, batch_size: int | None, step: int) -> Tensor:
    """Rows that step `step` (from 0) trains on, int64 [rows]: over an epoch a permutation of 0 .. n-1.

    With `batch_size` None, all `n` rows in order.

    Examples
    --------
    >>> [len(batch_indices(0, 7, 3, step)) for step in range(4)]
    [3, 3, 1, 3]
    """
    if batch_size is None:
        return torch.arange(n)
    epoch, place = divmod(step, steps_per_epoch(n, batch_size))
    return _permutation(seed, n, epoch)[place * batch_size : (place + 1) * batch_size].clone()


@lru_cache(maxsize=4)  # successive steps ask for the same epoch
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derived_seed("epoch", seed, epoch)))
