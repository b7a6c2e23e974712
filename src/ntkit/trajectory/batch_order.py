"""Which steps are recorded and which rows each step sees: pure functions, so that a resumed run needs no state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from ntkit.base.checks import nearest, refusal

Record = Literal["log", "all"] | int | Iterable[int] | Callable[[int], bool]


def recorded_at(record: Record) -> Callable[[int], bool]:
    """Say of any step whether it is recorded, whatever number of steps will be made.

    Parameters
    ----------
    record : ``"log"`` (0 and round(2^(k/2)): about seven a decade), ``"all"``, an integer n (every n-th step), a list
        of steps, or a function of the step (a pure one: a resumed run asks it again).

    Raises
    ------
    Refused
        When the word is unknown, n is below 1, or a step is not an integer >= 0.

    Examples
    --------
    >>> [step for step in range(30) if recorded_at("log")(step)]
    [0, 1, 2, 3, 4, 6, 8, 11, 16, 23]
    >>> [step for step in range(30) if recorded_at(10)(step)]
    [0, 10, 20]
    """
    if isinstance(record, str) and record in ("log", "all"):
        return _on_log_grid if record == "log" else lambda step: True
    if callable(record):
        return lambda step: bool(record(step))
    if isinstance(record, Integral) and not isinstance(record, bool) and record >= 1:
        return lambda step: step % int(record) == 0
    if isinstance(record, (str, Integral)) or not isinstance(record, Iterable):
        raise refusal(
            "record",
            got=repr(record),
            expected="'log', 'all', every how many steps (>= 1), a list of steps or a function of the step",
            fix=nearest(str(record), ["log", "all"]),
        )
    listed = list(record)
    for s in listed:
        if isinstance(s, bool) or not isinstance(s, Integral) or s < 0:
            raise refusal("record", got=f"step {s!r}", expected="integers >= 0", fix="Leave that step out.")
    return frozenset(map(int, listed)).__contains__


def _on_log_grid(step: int) -> bool:
    return step < 1 or step == round(2 ** (round(2 * math.log2(step)) / 2))


def snapshot_steps(record: Record, steps: int) -> Collection[int]:
    """Give the steps to record of a run of `steps` optimisation steps; 0 and `steps` are always among them.

    Parameters
    ----------
    record : as in `recorded_at`.
    steps : number of optimisation steps.

    Raises
    ------
    Refused
        As in `recorded_at`, and when a listed step is beyond `steps`.

    Examples
    --------
    >>> sorted(snapshot_steps("log", 20))
    [0, 1, 2, 3, 4, 6, 8, 11, 16, 20]
    """
    if isinstance(record, Iterable) and not isinstance(record, str):
        record = list(record)
        beyond = [s for s in record if isinstance(s, Integral) and s > steps]
        if beyond:
            raise refusal(
                "record",
                got=f"step {beyond[0]}",
                expected=f"integers from 0 to steps = {steps}",
                fix="Leave that step out or train for more steps.",
            )
    due = recorded_at(record)
    return range(steps + 1) if record == "all" else frozenset({0, steps, *filter(due, range(steps))})


def thinned(sizes: Mapping[int, int], budget: int | None) -> list[int]:
    """Choose the steps to give up so that the rest fits: those whose absence leaves log(1 + step) most evenly spaced.

    One after the other, the interior step whose two neighbours are nearest in log(1 + step) goes; the first and the
    last never do. The choice depends on steps and sizes only, so a resumed run makes it again.

    Parameters
    ----------
    sizes : bytes of each recorded step.
    budget : bytes allowed together; None = any number.

    Examples
    --------
    >>> thinned({0: 8, 1: 8, 2: 8, 3: 8, 4: 8, 8: 8}, budget=40)
    [3]
    """
    steps, total, gone = sorted(sizes), sum(sizes.values()), []
    while budget is not None and total > budget and len(steps) > 2:
        place = min(range(1, len(steps) - 1), key=lambda i: (1 + steps[i + 1]) / (1 + steps[i - 1]))
        gone.append(steps.pop(place))
        total -= sizes[gone[-1]]
    return gone


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
