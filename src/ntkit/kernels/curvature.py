"""Curvature of the mean training loss by the parameters, and what a filter makes of its eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.base.batch import Batch, count, take
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_number
from ntkit.jacobian.engine import Engine
from ntkit.jacobian.model_calls import call, untouched
from ntkit.jacobian.model_outputs import Select, part_of
from ntkit.trajectory.objective import Loss

_TERMS = 20  # of the series: 1 / 22! is below the rounding of float64
_BATCH = 128


class SpectralFilter:
    """F of an eigenvalue: 1 / (eigenvalue + damping), or (1 - exp(-time eigenvalue)) / eigenvalue.

    The second is what gradient flow of this length leaves of an inverse: 1 / eigenvalue where it had the time, `time`
    where it had not. It is positive for every real eigenvalue.

    Examples
    --------
    >>> SpectralFilter(time=2.0).values(torch.tensor([0.0, 1e9]))
    tensor([2.0000e+00, 1.0000e-09])
    """

    def __init__(self, damping: Any = None, time: Any = None) -> None:
        if (damping is None) == (time is None):
            got = "both" if damping is not None else "neither"
            fix = (
                "time= is the sum of the learning rates of a run (or the run itself); damping= is added to eigenvalues."
            )
            raise refusal("damping, time", got=got, expected="exactly one of them", fix=fix)
        name = "damping" if time is None else "time"
        value = damping if time is None else time
        fix = "It is in the units of the curvature." if time is None else "It is a sum of learning rates."
        number = as_number(value, name, lambda v: 0 < v < math.inf, "a finite number > 0", fix)
        self.damping, self.time = (number, None) if time is None else (None, number)
        self.at_zero = number if self.time is not None else 1 / number

    def values(self, eigenvalues: Tensor) -> Tensor:
        """F(eigenvalue); accurate where the eigenvalue is tiny."""
        if self.damping is not None:
            return 1 / (eigenvalues + self.damping)
        u = self.at_zero * eigenvalues
        small = u.abs() < 1e-8
        return self.at_zero * torch.where(small, 1 - u / 2, -torch.expm1(-u) / torch.where(small, 1.0, u))

    def missing(self, eigenvalues: Tensor) -> Tensor:
        """(F(0) - F(eigenvalue)) / eigenvalue, for eigenvalues >= 0; accurate where the eigenvalue is tiny."""
        if self.damping is not None:
            return 1 / (self.damping * (eigenvalues + self.damping))
        u = self.at_zero * eigenvalues  # at_zero^2 (u - 1 + exp(-u)) / u^2, which cancels for small u
        low = torch.where(u < 1, u, 0.0)
        series = sum((-low) ** k / float(math.factorial(k + 2)) for k in range(_TERMS))
        high = torch.where(u < 1, 1.0, u)
        return self.at_zero * self.at_zero * torch.where(u < 1, series, (high + torch.expm1(-high)) / high / high)


def jacobian_rows(engine: Engine, x: Batch) -> Tensor:
    """J(x) with the parameters side by side: [n, C, P], in the precision of the network."""
    parts = []
    for _, factors in engine.batches(x, 0.3):
        parts.append(torch.cat([factors[name].rows().detach() for name in engine.params], 2))
    return torch.cat(parts)


def gauss_newton(engine: Engine, x: Batch, blocks: Tensor) -> Tensor:
    """(1/n) sum_i J(x_i)^T D_i J(x_i), float64 [P, P], from the blocks D, [n, C, C]."""
    total: Tensor | None = None
    for part, factors in engine.batches(x, 0.1):
        rows = torch.cat([factors[name].rows().detach() for name in engine.params], 2).to(torch.float64)
        share = rows.flatten(0, 1).T @ (blocks[part] @ rows).flatten(0, 1)
        total = share if total is None else total.add_(share)
    assert total is not None
    return (total + total.T) / (2 * len(blocks))


def hessian(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    x: Batch,
    y: Tensor,
    loss: Loss,
    of_mean: bool,
    select: Select | None = None,
) -> Tensor:
    """Second derivative of the mean training loss by the parameters, float64 [P, P]; P backward passes."""
    n, size = count(x), sum(p.numel() for p in params.values())
    own = list(params.values())
    total = torch.zeros(size, size, dtype=torch.float64, device=own[0].device)
    again: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    with untouched(model, params), sdpa_kernel(SDPBackend.MATH):
        for start in range(0, n, _BATCH):
            rows = slice(start, min(start + _BATCH, n))
            value = loss(part_of(call(model, take(x, rows)), select), y[rows])
            value = value * ((rows.stop - rows.start) / n if of_mean else 1 / n)
            slopes = torch.autograd.grad(value, own, create_graph=True, **again)
            flat = torch.cat([slope.reshape(-1) for slope in slopes])
            if not flat.requires_grad:
                continue
            for k in range(size):
                row = torch.autograd.grad(flat[k], own, retain_graph=True, **again)
                total[k] += torch.cat([entry.reshape(-1) for entry in row])
    return (total + total.T) / 2


def leading_eigenpairs(product: Callable[[Tensor], Tensor], N: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, ascending, and eigenvectors [N, k] of a positive semidefinite matrix by its products.

    Fewer where the others are rounding, or did not converge; `like` has the precision and the device of the products.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    def apply(v: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(v.reshape(N, -1)).to(like.device)).cpu().numpy().reshape(v.shape)

    eps = torch.finfo(like.dtype).eps
    operator: Any = LinearOperator  # type checkers read its __init__, which takes less than its __new__
    matrix, start = operator((N, N), matvec=apply, dtype="float64"), np.random.default_rng(0).standard_normal(N)
    try:
        values, vectors = eigsh(matrix, k, which="LA", v0=start, tol=eps**0.5, maxiter=100)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    order = np.argsort(values)
    good = order[values[order] > N * eps * max(values.max(initial=0.0), 1e-300)]
    if not len(good):
        fix = "Use fewer training examples or parameters, so that the matrix is decomposed as a whole."
        raise refusal("the curvature", got="no leading eigenpair that converged", expected="at least one", fix=fix)
    return torch.from_numpy(values[good]).to(like.device), torch.from_numpy(vectors[:, good]).to(like.device)
