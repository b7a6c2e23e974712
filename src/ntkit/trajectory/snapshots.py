"""The steps that get a snapshot, and the snapshots that a budget removes: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral
from typing import Literal

from ntkit.base.checks import nearest, refusal
from ntkit.base.numbers import is_integer

SnapshotSteps = Literal["log", "all"] | int | Iterable[int] | Callable[[int], bool]


def snapshot_rule(record: SnapshotSteps | str) -> Callable[[int], bool]:
    """Return a function that tells whether a step gets a snapshot; the length of the run does not matter.

    Parameters
    ----------
    record : ``"log"`` (0 and round(2^(k/2)): about seven per decade), ``"all"``, an integer n (every n-th step), a list
        of steps, or a pure function of the step (a resumed run calls it again).

    Raises
    ------
    Refused
        When the word is unknown, n is below 1, or a step is not an integer >= 0.

    Examples
    --------
    >>> [step for step in range(30) if snapshot_rule("log")(step)]
    [0, 1, 2, 3, 4, 6, 8, 11, 16, 23]
    >>> [step for step in range(30) if snapshot_rule(10)(step)]
    [0, 10, 20]
    """
    if isinstance(record, str) and record in ("log", "all"):
        return _on_log_grid if record == "log" else lambda step: True
    if callable(record):
        return lambda step: bool(record(step))
    if is_integer(record) and record >= 1:
        return lambda step: step % int(record) == 0
    if isinstance(record, (str, Integral)) or not isinstance(record, Iterable):
        expected = "'log', 'all', an interval in steps (>= 1), a list of steps or a function of the step"
        raise refusal("record", got=repr(record), expected=expected, fix=nearest(str(record), ["log", "all"]))
    steps = list(record)
    for s in steps:
        if not is_integer(s) or s < 0:
            raise refusal("record", got=f"step {s!r}", expected="integers >= 0", fix="Remove that step.")
    return frozenset(map(int, steps)).__contains__


def _on_log_grid(step: int) -> bool:
    return step < 1 or step == round(2 ** (round(2 * math.log2(step)) / 2))


def snapshot_steps(record: SnapshotSteps, steps: int) -> Collection[int]:
    """Steps that get a snapshot in a run of `steps` steps, 0 and `steps` always; refuses a listed step beyond `steps`.

    Examples
    --------
    >>> sorted(snapshot_steps("log", 20))
    [0, 1, 2, 3, 4, 6, 8, 11, 16, 20]
    """
    if isinstance(record, Iterable) and not isinstance(record, str):
        record = list(record)
        if beyond := [s for s in record if isinstance(s, Integral) and s > steps]:
            fix = "Remove that step or train for more steps."
            raise refusal("record", got=f"step {beyond[0]}", expected=f"integers from 0 to steps = {steps}", fix=fix)
    rule = snapshot_rule(record)
    return range(steps + 1) if record == "all" else frozenset({0, steps, *filter(rule, range(steps))})


def surplus_snapshots(sizes: Mapping[int, int], budget: int | None) -> list[int]:
    """Steps whose snapshots to delete so that the bytes of the rest fit in the budget, evenly spaced in log(1 + step).

    Repeatedly, the interior step whose two neighbors are nearest in log(1 + step) is removed; the first and the last
    never are. The result depends on steps and sizes only, so a resumed run finds the same.

    Examples
    --------
    >>> surplus_snapshots({0: 8, 1: 8, 2: 8, 3: 8, 4: 8, 8: 8}, budget=40)
    [3]
    """
    steps, total, surplus = sorted(sizes), sum(sizes.values()), []
    while budget is not None and total > budget and len(steps) > 2:
        place = min(range(1, len(steps) - 1), key=lambda i: (1 + steps[i + 1]) / (1 + steps[i - 1]))
        surplus.append(steps.pop(place))
        total -= sizes[surplus[-1]]
    return surplus
