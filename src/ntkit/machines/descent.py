"""Function-space training under any loss: an ordinary differential equation, integrated to 1e-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal

_RTOL, _ATOL = 1e-10, 1e-12  # the latter of outputs of size 1, or of smaller targets and initial outputs
_BALANCE = 1e-6  # relative: above it, an integration is not accurate enough to use

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Descent:
    """Dual coefficients at the times asked for, [T, n, ...] (NaN at times that were not reached)."""

    dual: Tensor
    residual: float
    status: str
    advice: str


def gradient(loss: Loss, outputs: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient of a loss at `outputs`, in float64.

    Raises
    ------
    Refused
        When the loss does not take the outputs, or is no scalar tensor that depends on them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_(True)
        try:
            value = loss(leaf, y)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            got = f"{error} on outputs {list(leaf.shape)} in float64 and y {list(y.shape)} in {y.dtype}"
            fix = "Give y as the loss takes it. Outputs have the shape of y, or that of initial, such as zeros [n, C]."
            raise refusal("loss", got=got, expected="a loss of these outputs and targets", fix=fix) from error
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            fix = "Let loss(outputs, y) return the mean over samples, computed by torch operations on outputs."
            raise refusal("loss", got=got, expected="a scalar tensor that depends on the outputs", fix=fix)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().sum(), slope


def descend(K: Tensor, loss: Loss, y: Any, start: Tensor, times: Tensor) -> Descent:
    """Solve df/dt = -K dL/df from `start`, [n, ...], and return a(t) with f(t) = start + K a(t) at the `times`, [T].

    da/dt = -dL/df and the decrease of the loss, dq/dt = (dL/df)^T K (dL/df), are integrated along with f, by the
    Runge-Kutta method of order 8 of Dormand and Prince. The certificate is the defect of L(f_0) - L(f_t) = q(t).
    Below 1, what counts as small is relative: to the targets, if they are floats, and initial outputs; for q to L(f_0).
    """
    from scipy.integrate import solve_ivp

    size = start.numel()

    def split(state: np.ndarray) -> tuple[Tensor, Tensor]:
        dual, outputs = torch.from_numpy(state[: 2 * size]).to(start).reshape(2, *start.shape)
        return dual, outputs

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        g = gradient(loss, split(state)[1], y)[1]
        moved = K @ g
        parts = [-g.reshape(-1), -moved.reshape(-1), (g * moved).sum().reshape(1)]
        return torch.cat(parts).cpu().numpy()

    initial = torch.cat([torch.zeros_like(start).reshape(-1), start.reshape(-1), start.new_zeros(1)]).cpu().numpy()
    first, _ = gradient(loss, start, y)
    largest = max([t.abs().max().item() for t in (start, y) if t.is_floating_point()])
    least = np.full(2 * size + 1, _ATOL * min(1.0, largest or 1.0))
    least[-1] = _ATOL * min(1.0, abs(first.item()) or 1.0)
    asked, place = np.unique(times.cpu().numpy(), return_inverse=True)
    reached, states, message = 0.0, [initial] * int(asked[0] == 0), ""
    if asked[-1] > 0:
        later = asked[asked > 0]
        with np.errstate(all="ignore"):  # a trial step may overflow: it is rejected
            path = solve_ivp(slope, (0.0, later[-1]), initial, "DOP853", t_eval=later, rtol=_RTOL, atol=least)
        states += list(path.y.T) if len(path.t) else []
        reached, message = float(path.t[-1]) if len(path.t) else 0.0, "" if path.success else path.message
    worst = 0.0
    for state in states:
        value, _ = gradient(loss, split(state)[1], y)
        scale = max(abs(first.item()), abs(value.item()), 1e-300)
        balance = abs(first.item() - value.item() - float(state[-1])) / scale
        worst = max(worst, balance if np.isfinite(balance) else np.inf)
    dual = torch.full((len(asked), *start.shape), torch.nan, dtype=start.dtype, device=start.device)
    for i, state in enumerate(states):
        dual[i] = split(state)[0]
    status, advice = "solved", ""
    if message or not worst <= _BALANCE:
        status = "failed" if message else "inaccurate"
        reason = f"the solver stopped: {message}"
        if not message:
            reason = f"the loss and its integrated decrease agree only to {worst:.1e}"
        advice = (
            f"Not integrated as asked: {reason} (last time reached: {reached:g} of {asked[-1]:g}). Check that the "
            "loss is bounded below and smooth, or ask for shorter times."
        )
    return Descent(dual[torch.from_numpy(place.reshape(-1))], worst, status, advice)
