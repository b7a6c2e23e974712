"""Training by eigenvectors: these, the share of each one's error that remains after time t, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.gram.arrays import Matrix, as_tensor
from ntkit.gram.gram_matrix import Gram
from ntkit.kernels.kernel import KernelOperator
from ntkit.machines.machine_input import factorizes
from ntkit.measures.spectra import spectrum

_COPIES = 4  # of a matrix, that its dense decomposition takes
_GRID = 241  # times at which the error is evaluated first


@dataclass(frozen=True)
class BestTime:
    """The training time of smallest validation error.

    Attributes
    ----------
    t : the time (with a learning rate: the number of steps); 0 and inf are possible.
    error : 1/(2m) sum_i |f_t(x_i) - y_i|^2 over the m validation points at that time.
    at_end : whether t is 0 (best not to train at all) or inf (best to train to the end).
    bound : how far `error` may be from that of all eigenvectors at the same t; 0 where all were used.
    """

    t: float
    error: float
    at_end: bool
    bound: float = 0.0


@dataclass(frozen=True)
class Modes:
    """Eigenpairs of K, largest first, and how exact they are.

    Attributes
    ----------
    values, vectors : [k], and [n, k] orthonormal columns.
    defect : |K V - V diag(values)| (Frobenius).
    size : |K| (Frobenius), or a lower bound of it.
    trace : what the values leave of the trace of K; None where all were computed.
    advice : what to do where the iteration did not converge, else "".
    """

    values: Tensor
    vectors: Tensor
    defect: float
    size: float
    trace: float | None = None
    advice: str = ""


def all_modes(K: Gram) -> Modes:
    """All eigenpairs, by a dense decomposition."""
    matrix = K.dense()
    size = torch.linalg.matrix_norm(matrix).item()
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    return Modes(values, vectors, torch.linalg.matrix_norm(K @ vectors - vectors * values).item(), size)


def top_modes(K: Gram | KernelOperator, k: int, device: torch.device) -> Modes:
    """The `k` largest eigenpairs, from products with K."""
    top = spectrum(K, k)
    values, vectors = top.eigenvalues.to(device), top.eigenvectors.to(device)
    defect = float((top.residuals * values.abs().max()).norm())
    rest = math.inf if top.tail is None else max(top.tail, 0.0)
    advice = "" if top.status == "converged" else f"The top {k} eigenpairs: {top.status}. Use fewer."
    return Modes(values, vectors, defect, float(values.norm()), rest, advice)


def decomposed(K: Gram | Matrix | KernelOperator, gram: Gram, k: int | None) -> Modes:
    """All eigenpairs of `gram`, or the top `k`; K is what it was made of.

    Raises
    ------
    Refused
        Where all are wanted of an operator, or of a matrix whose decomposition exceeds the free memory.
    """
    if k is not None:
        if k > len(gram):
            raise refusal("k", got=k, expected=f"at most {len(gram)}, the rows of K", fix="None takes all.")
        return top_modes(K if isinstance(K, KernelOperator) else gram, k, gram.device)
    if not factorizes(gram, _COPIES):
        got, expected = f"all eigenvectors of {len(gram):,} points", "the top ones, where K is not formed or too large"
        raise refusal("GradientFlow", got=got, expected=expected, fix="Use GradientFlow(k=100).")
    return all_modes(gram)


def as_times(t: ArrayLike | Tensor, steps: bool, finite: bool, device: torch.device) -> tuple[Tensor, bool]:
    """Take times, [T], and say whether it was a single number; whole ones with `steps`.

    Raises
    ------
    Refused
        For negative times, steps that are not whole, and infinite ones where they must be `finite`.
    """
    times = as_tensor(t, "t").to(torch.float64)
    ok = times.ndim <= 1 and times.numel() > 0 and bool((times >= 0).all())
    if ok and steps:
        ok = bool(((times == times.floor()) & ((times < 2.0**53) | times.isinf())).all())
    if ok and finite:
        ok = bool(torch.isfinite(times).all())
    if not ok:
        kind = "whole steps >= 0" if steps else "times >= 0"
        kind += " (finite ones: a loss has no closed form)" if finite else ", or inf"
        got = t if times.numel() < 9 else f"shape {list(times.shape)}"
        raise refusal("t", got=got, expected=f"{kind}; one, or a 1-D array", fix="Check its values.")
    return times.reshape(-1).to(device), times.ndim == 0


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
        left = torch.zeros_like(rates).where(lr * rates < 2 * (1 + momentum), torch.nan).where(rates > 0, 1.0)
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
