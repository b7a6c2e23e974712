"""Learning rates: those of an optimizer, and those that a schedule sets for each step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from ntkit.base.checks import refusal


def learning_rates(opt: Optimizer) -> list[float]:
    """Learning rates of an optimizer's groups; NaN for a group without one (as Adafactor's may be)."""
    return [math.nan if group.get("lr") is None else float(group["lr"]) for group in opt.param_groups]


class RateSchedule:
    """The learning rates of each step: the optimizer's initial ones, times the schedule's factor."""

    def __init__(self, opt: Optimizer, schedule: Callable[[int], float] | None) -> None:
        self.opt, self.schedule, self.initial = opt, schedule, learning_rates(opt)
        if schedule is None:
            return
        fix = "Pass e.g. schedule=lambda step: 0.99**step."
        if not callable(schedule):
            got = f"a {type(schedule).__name__}"
            raise refusal("schedule", got=got, expected="a function of the step that returns a factor", fix=fix)
        if not all(map(math.isfinite, self.initial)):
            got = f"{type(opt).__name__} with learning rates {self.initial}"
            raise refusal("schedule", got=got, expected="finite learning rates", fix="Give every group an lr.")
        self._factor(0)

    def set(self, step: int) -> list[float]:
        """Set the optimizer to the learning rates of a step, and return them."""
        if self.schedule is None:
            return self.initial
        factor = self._factor(step)
        for group, initial in zip(self.opt.param_groups, self.initial, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(initial * factor)
            else:
                group["lr"] = initial * factor
        return learning_rates(self.opt)

    def _factor(self, step: int) -> float:
        value = self.schedule(step) if self.schedule else 1.0
        try:
            factor = float(value)
        except (TypeError, ValueError):
            factor = math.nan
        if not math.isfinite(factor):
            fix = "Return a number for every step from 0 on."
            raise refusal("schedule", got=f"{value!r} at step {step}", expected="a finite factor", fix=fix)
        return factor
