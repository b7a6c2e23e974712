"""Learning rates: those of an optimizer, and those that a schedule sets for each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from ntkit.base.checks import refusal
from ntkit.trajectory.recorded_run import Trajectory

_SGD = f"{SGD.__module__}.{SGD.__qualname__}"  # another class of this name may have other updates


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
        for group in opt.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].clone()  # the caller's own keeps its value

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


def sharpness_bound(optimizer: dict[str, Any], rate: float) -> float | None:
    """Largest sharpness at which an optimizer with full batches is stable on a quadratic; None where none is known.

    2 / rate for plain gradient descent, 2 (1 + b) / rate with momentum b, 2 (1 + b) / ((1 + 2 b) rate) by Nesterov,
    less the weight decay. For Adam and others no number of the loss alone decides.

    Source: Cohen et al. 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, section 2.

    Parameters
    ----------
    optimizer : of the settings of a recorded run: "class" and "groups".
    rate : learning rate of the first group.

    Examples
    --------
    >>> group = {"momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 0, "maximize": False}
    >>> round(sharpness_bound({"class": "torch.optim.sgd.SGD", "groups": [group]}, 0.1), 9)
    38.0
    >>> sharpness_bound({"class": "torch.optim.adamw.AdamW", "groups": [{"betas": [0.9, 0.999]}]}, 0.1)
    """
    names = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
    settings = {tuple(group.get(name) for name in (*names, "lr")) for group in optimizer["groups"]}
    if optimizer["class"] != _SGD or len(settings) != 1 or not rate > 0:
        return None
    momentum, dampening, nesterov, decay, maximize = next(iter(settings))[:-1]
    b = momentum or 0.0
    if maximize or b >= 1 or (b and dampening == 1):
        return None
    free = 2 * (1 + b) / rate / (1 + 2 * b if nesterov else 1 - (dampening or 0.0) if b else 1.0)
    return free - (decay or 0.0)


def flow_time(trajectory: Trajectory) -> float:
    """Length of gradient flow that a run of SGD amounts to: sum_s lr_s (1 - dampening) / (1 - momentum).

    Raises
    ------
    Refused
        When the run has not ended, its optimizer is not SGD or maximizes, its groups have different settings, or its
        momentum is not below 1.
    """
    if trajectory.status == "running":
        expected, fix = "a run that has ended", "Let it end, or continue it with resume=True; then open it again."
        raise refusal(str(trajectory.path), got="a run that is running or was killed", expected=expected, fix=fix)
    name, groups = (trajectory.settings["optimizer"][key] for key in ("class", "groups"))
    settings = {(group.get("momentum"), group.get("dampening")) for group in groups}
    rates = trajectory.learning_rates
    if any(group.get("maximize") for group in groups):
        expected, fix = "a run that goes downhill", "Minimize -loss, pass the time as a number, or damping=."
        raise refusal("time", got="a run with maximize=True", expected=expected, fix=fix)
    if name != _SGD or len(settings) > 1 or not bool((rates == rates[:, :1]).all()):
        got = name if name != _SGD else "groups of parameters with different settings"
        fix = "Pass the time as a number, or use damping=."
        raise refusal("time", got=got, expected="a run of torch.optim.SGD with one learning rate", fix=fix)
    ((momentum, dampening),) = settings
    if momentum >= 1:
        fix = "Pass the time as a number, or use damping=."
        raise refusal("time", got=f"a run with momentum={momentum}", expected="a momentum below 1", fix=fix)
    return float(rates[:, 0].sum()) * ((1 - dampening) / (1 - momentum) if momentum else 1.0)
