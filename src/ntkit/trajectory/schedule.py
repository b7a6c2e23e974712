"""Which steps are recorded and which rows each step sees: pure functions, so that a resumed run needs no state."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from functools import lru_cache
from numbers import Integral

import torch
from torch import Tensor

from ntkit.checks import nearest, refusal


def snapshot_steps(record: str | Iterable[int], steps: int) -> Collection[int]:
    """Give the steps to record of a run of `steps` optimisation steps; 0 and `steps` are always among them.

    Parameters
    ----------
    record : ``"log"`` (0 and round(2^(k/2)): about seven a decade), ``"all"``, or a list of steps.
    steps : number of optimisation steps.

    Raises
    ------
    Refused
        When the word is unknown, or a step is not an integer from 0 to `steps`.

    Examples
    --------
    >>> sorted(snapshot_steps("log", 20))
    [0, 1, 2, 3, 4, 6, 8, 11, 16, 20]
    """
    if isinstance(record, str) and record == "all":
        return range(steps + 1)
    if isinstance(record, str) and record == "log":
        powers = (round(2 ** (k / 2)) for k in range(2 * steps.bit_length()))
        return frozenset({0, steps, *(s for s in powers if s < steps)})
    if isinstance(record, str) or not isinstance(record, Iterable):
        fix = nearest(str(record), ["log", "all"])
        raise refusal("record", got=repr(record), expected="'log', 'all' or a list of steps", fix=fix)
    listed = list(record)
    for s in listed:
        if isinstance(s, bool) or not isinstance(s, Integral) or not 0 <= s <= steps:
            raise refusal(
                "record",
                got=f"step {s!r}",
                expected=f"integers from 0 to steps = {steps}",
                fix="Leave that step out or train for more steps.",
            )
    return frozenset({0, steps, *map(int, listed)})


def derived_seed(*parts: int | str) -> int:
    """Mix a seed with what it is for, so that neighbouring steps and epochs get unrelated random numbers.

    Examples
    --------
    >>> derived_seed("epoch", 0, 1) == derived_seed("epoch", 0, 1) != derived_seed("epoch", 1, 0)
    True
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def steps_per_epoch(n: int, batch_size: int | None) -> int:
    """Count the batches of an epoch: ceil(n / batch_size), the last one ragged; one when full batch (None)."""
    return 1 if batch_size is None else -(-n // batch_size)


def batch_indices(seed: int, n: int, batch_size: int | None, step: int) -> Tensor:
    """Give the rows that step `step` trains on: a pure function of its arguments.

    Parameters
    ----------
    seed : the run's seed.
    n : number of training examples.
    batch_size : rows per batch, or None for all rows in order at every step.
    step : the step, from 0.

    Returns
    -------
    Tensor
        int64 indices, shape [rows]; over an epoch they are a permutation of 0 .. n-1.

    Examples
    --------
    >>> [len(batch_indices(0, 7, 3, step)) for step in range(4)]
    [3, 3, 1, 3]
    """
    if batch_size is None:
        return torch.arange(n)
    epoch, place = divmod(step, steps_per_epoch(n, batch_size))
    return _permutation(seed, n, epoch)[place * batch_size : (place + 1) * batch_size].clone()


@lru_cache(maxsize=4)  # a step asks for its epoch's order; a sweep forward or backward asks for the same one again
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derived_seed("epoch", seed, epoch)))
