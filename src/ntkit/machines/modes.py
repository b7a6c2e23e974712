"""Training by eigenvectors: the share of each one's error that remains after time t, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GRID = 241  # times at which the error is evaluated first


@dataclass(frozen=True)
class BestTime:
    """The training time of smallest validation error.

    Attributes
    ----------
    t : the time (with a learning rate: the number of steps); 0 and inf are possible.
    error : 1/(2m) sum_i |f_t(x_i) - y_i|^2 over the m validation points at that time.
    at_end : whether t is 0 (best not to train at all) or inf (best to train to the end).
    """

    t: float
    error: float
    at_end: bool


def filters(rates: Tensor, times: Tensor, lr: float | None, momentum: float) -> tuple[Tensor, Tensor]:
    """Remaining share of a mode's error, r(lambda, t), and phi = (1 - r)/lambda, defined at lambda = 0, too.

    Continuous time: r = exp(-t lambda), phi(0) = t.

    Parameters
    ----------
    rates : lambda >= 0, [n].
    times : t >= 0, [T]; inf allowed; whole numbers with `lr`.

    Returns
    -------
    r, phi : [T, n] each.
    """
    if lr is not None:
        pairs = [_steps(rates, step, lr, momentum) for step in times.tolist()]
        return torch.stack([remaining for remaining, _ in pairs]), torch.stack([phi for _, phi in pairs])
    t = times[:, None]
    decay = torch.where(rates > 0, t * rates, 0.0)
    return torch.exp(-decay), torch.where(rates > 0, -torch.expm1(-decay) / rates, t)


def _steps(rates: Tensor, t: float, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    """The same after t steps of gradient descent with momentum, [n] each.

    phi and the buffer c go c <- momentum c + 1 - lambda phi, phi <- phi + lr c: an affine map. Its power, by repeated
    squaring, needs no eigenvalues: repeated and complex ones are no special case.
    """
    if t == float("inf"):
        left = torch.where(lr * rates < 2 * (1 + momentum), 0.0, torch.nan).where(rates > 0, 1.0)
        return left, ((1 - left) / rates).where(rates > 0, torch.inf)
    one, zero = torch.ones_like(rates), torch.zeros_like(rates)
    rows = [1 - lr * rates, lr * momentum * one, lr * one, -rates, momentum * one, one, zero, zero, one]
    power = torch.linalg.matrix_power(torch.stack(rows, 1).reshape(-1, 3, 3), int(t))
    return power[:, 0, 0], power[:, 0, 2]


def search(error: Callable[[float], float], rates: Tensor, lr: float | None, momentum: float) -> BestTime:
    """Find the time of smallest error: on a grid from 0 to inf, then between the neighbours of its best time."""
    grid = _grid(rates, lr, momentum)
    errors = [error(t) for t in grid]
    k = min(range(len(grid)), key=errors.__getitem__)
    best, least = grid[k], errors[k]
    if 0 < k < len(grid) - 1:
        low, high = max(grid[k - 1], grid[1]), grid[min(k + 1, len(grid) - 2)]
        refined = _between(error, low, high) if lr is None else _between_steps(error, low, high)
        if (value := error(refined)) < least:
            best, least = refined, value
    if errors[-1] <= least * (1 + 1e-12) + 1e-28 * errors[0]:  # a tail that is flat to rounding: its end
        best, least = grid[-1], errors[-1]
    return BestTime(best, least, best in (0.0, float("inf")))


def _grid(rates: Tensor, lr: float | None, momentum: float) -> list[float]:
    positive = rates[rates > 0]
    if not len(positive):
        return [0.0, float("inf")]
    first, last = 1e-3 / positive.max().item(), 40 / positive.min().item()
    if lr is not None:
        first, last = 1.0, max(last * (1 - momentum) / lr, 80 / (1 - momentum))
    inner = torch.logspace(math.log10(first), math.log10(last), _GRID, dtype=torch.float64)
    return [0.0, *(inner if lr is None else inner.round().unique()).tolist(), float("inf")]


def _between(error: Callable[[float], float], low: float, high: float) -> float:
    """Brent's method in log t."""
    from scipy.optimize import minimize_scalar

    limits = (math.log(low), math.log(high))
    minimum: Any = minimize_scalar(
        lambda s: error(math.exp(s)), bounds=limits, method="bounded", options={"xatol": 1e-9}
    )
    return math.exp(minimum.x)


def _between_steps(error: Callable[[float], float], low: float, high: float) -> float:
    """Grids of whole steps, each finer than the one before."""
    while True:
        steps = torch.linspace(low, high, 33, dtype=torch.float64).round().unique().tolist()
        k = min(range(len(steps)), key=[error(s) for s in steps].__getitem__)
        if high - low <= 32:
            return steps[k]
        low, high = steps[max(k - 1, 0)], steps[min(k + 1, len(steps) - 1)]
