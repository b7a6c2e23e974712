"""(K + shift I)^-1 y from products with K alone: conjugate gradients, preconditioned by a low-rank part of K."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntkit.base.memory import free_memory
from ntkit.base.numbers import relative_residual, scales
from ntkit.base.progress import Task, task
from ntkit.gram.gram_matrix import Gram, check_squares
from ntkit.gram.operator_gram import OperatorGram
from ntkit.gram.pivoted_cholesky import pivoted_cholesky

_PASSES = 1000  # products with K at most
_PATIENCE = 200  # products without half the residual, after which rounding is taken to allow no less
_RANK = 20  # rows of the preconditioner, times sqrt(n)
_FLOOR = (
    1e-12  # smallest shift in the preconditioner, relative to the trace of K's part: below it only rounding is left
)
_WIDTH = 64  # columns multiplied at a time, where an entry of K is read once for all: random ones fill up
_DEPENDENT = 1e-8  # singular value of a block of directions, relative to the largest
_STRIP = 128  # right-hand sides of test points solved at a time
_RESIDUAL = 1e-8  # of the solve for given targets, relative to them
_VARIANCE = 1e-8  # error of a posterior variance, relative to the prior one, at which its solve may stop


class Preconditioner:
    """The inverse of F^T F + shift I, which is near K + shift I: F from rows of K drawn at random (`pivoted_cholesky`).

    Memory: n x rank numbers, rank = 20 sqrt(n) at most; for products alone, where a row costs one, sqrt(n).

    Notes
    -----
    Diaz, Epperly, Frangella, Tropp, Webber (2023), "Robust, randomized preconditioning for kernel ridge regression",
    algorithm 1. What is left to conjugate gradients has a condition number of at most 1 + trace(K - F^T F) / shift.
    """

    def __init__(self, K: Gram, shift: float) -> None:
        n = len(K)
        rank = (1 if isinstance(K, OperatorGram) else _RANK) * n**0.5
        rank = max(1, min(n, int(rank), free_memory(K.device) // (4 * 8 * n)))
        self.F, left = pivoted_cholesky(K, rank, shift)
        inner = self.F @ self.F.T
        self.shift = max(shift or left / n, _FLOOR * float(inner.diagonal().sum())) or 1.0
        inner.diagonal().add_(self.shift)
        self._lower = torch.linalg.cholesky(inner)

    def __call__(self, block: Tensor) -> Tensor:
        """Apply it to [n, k]."""
        return (block - self.F.T @ torch.cholesky_solve(self.F @ block, self._lower)) / self.shift


@dataclass
class Iterated:
    """An approximate solution of (K + shift I) alpha = y, [n, C], and how it went.

    Attributes
    ----------
    rest : y - (K + shift I) alpha, [n, C], from a product of its own at the end.
    residual : its norm over that of y (Frobenius).
    passes : products with K.
    """

    alpha: Tensor
    rest: Tensor
    residual: float
    passes: int
    status: str
    advice: str


def conjugate_gradients(
    K: Gram, shift: float, y: Tensor, goals: Tensor, precondition: Preconditioner, name: str
) -> Iterated:
    """Solve (K + shift I) alpha = y, [n, C], until the norm of each column's residual is at most its goal, [C].

    In blocks: every product serves all columns, and each column is improved in the directions of all. Where K has
    entries, of which most time goes into reading, random columns are added: each pass then finds more directions, and
    fewer are needed. The residual that the steps carry along drifts from the true one: this is computed afresh once the
    steps say that it is small enough, and the steps go on from there if it is not. `name` is what the user calls the
    shift.

    Notes
    -----
    O'Leary (1980), "The block conjugate gradient algorithm and related methods", with orthonormal directions; those
    that depend on others are left out, and so are those of columns that are done.
    """
    alpha, rest, passes = torch.zeros_like(y), y.clone(), 0
    sizes, indefinite = rest.norm(dim=0), False
    with task("conjugate gradients", total=1.0) as progress:
        while len(open_ := (sizes > goals).nonzero().ravel()) and passes < _PASSES and not indefinite:
            left = _PASSES - passes
            change, used, indefinite = _steps(K, shift, rest[:, open_], goals[open_] / 2, precondition, left, progress)
            trial = alpha.clone()
            trial[:, open_] += change
            fresh = y - K @ trial - shift * trial
            passes += used + 1
            new = fresh.norm(dim=0)
            better = new < sizes
            alpha, rest = torch.where(better, trial, alpha), torch.where(better, fresh, rest)
            stuck = not bool((new[open_] < sizes[open_] / 2).any())
            sizes = torch.where(better, new, sizes)
            if stuck:
                break
        progress.advance(1.0 - progress.done)
    residual = relative_residual(rest, y)
    if bool((sizes <= goals).all()):
        return Iterated(alpha, rest, residual, passes, "solved", "")
    reached = float((sizes / y.norm(dim=0).clamp(min=1e-300)).max())
    why = f"K in {K.dtype} allows no smaller residual"
    why = f"K + {shift:g} I is not positive definite to working precision" if indefinite else why
    why = f"{passes} products with K were not enough" if passes >= _PASSES else why
    advice = f"The relative residual is {reached:.1e}: {why}. Use a larger {name}, or K in float64."
    return Iterated(alpha, rest, residual, passes, "inaccurate", advice)


def _steps(
    K: Gram, shift: float, y: Tensor, goals: Tensor, precondition: Preconditioner, most: int, progress: Task
) -> tuple[Tensor, int, bool]:
    """Block conjugate gradients from zero: the solution, products, and whether K + shift I is not positive definite."""
    wanted, first = y.shape[1], y.norm(dim=0)
    alpha, rest = torch.zeros_like(y), torch.cat([y, _random_columns(K, wanted)], dim=1)
    others = torch.arange(wanted, rest.shape[1], device=y.device)
    directions, best, since = _orthonormal(precondition(rest)), torch.inf, 0
    for passes in range(1, most + 1):
        images = K @ directions + shift * directions
        inner = directions.T @ images
        lower, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        if failed:
            return alpha, passes, True
        steps = torch.cholesky_solve(directions.T @ rest, lower)
        alpha, rest = alpha + directions @ steps[:, :wanted], rest - images @ steps
        sizes = rest[:, :wanted].norm(dim=0)
        going = (sizes > goals).nonzero().ravel()
        share = (first / sizes.clamp(min=1e-300)).log() / (first / goals.clamp(min=1e-300)).log()
        progress.advance(max(0.0, float(share.min().clamp(max=0.99)) - progress.done))
        worst = float((sizes / goals)[going].max()) if len(going) else 0.0
        best, since = (worst, 0) if worst <= best / 2 else (best, since + 1)
        if not len(going) or since >= _PATIENCE:
            break
        towards = precondition(rest[:, torch.cat([going, others])])
        directions = _orthonormal(towards - directions @ torch.cholesky_solve(images.T @ towards, lower))
    return alpha, passes, False


def _random_columns(K: Gram, wanted: int) -> Tensor:
    """Columns that fill up a block, [n, count]: none where each would cost a product of its own."""
    count = 0 if isinstance(K, OperatorGram) else max(0, min(_WIDTH, len(K) // 8) - wanted)
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(len(K), count, dtype=torch.float64, generator=generator, device="cpu")
    return columns.to(K.device)


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns that span those of a block; what depends on the others, to rounding, is left out."""
    q, r = torch.linalg.qr(block / block.norm(dim=0).clamp(min=1e-300))
    turn, sizes, _ = torch.linalg.svd(r)
    return q @ turn[:, sizes > _DEPENDENT * sizes[0]]


class Solver:
    """Solves with K + shift I, for targets and for test points; `name` is what the user calls the shift."""

    def __init__(self, K: Gram, shift: float, name: str) -> None:
        check_squares(K)
        self.K, self.shift, self.name = K, shift, name
        self._precondition = Preconditioner(K, shift)

    def solve(self, y: Tensor) -> Iterated:
        """Solve for y, [n, C], to a relative residual of 1e-8 per column."""
        scale = scales(y)  # squares of very small or large targets are not representable
        one = self._solved(y / scale, _RESIDUAL * (y / scale).norm(dim=0))
        alpha, rest = one.alpha * scale, one.rest * scale
        return replace(one, alpha=alpha, rest=rest, residual=relative_residual(rest, y))

    def _solved(self, y: Tensor, goals: Tensor) -> Iterated:
        return conjugate_gradients(self.K, self.shift, y, goals, self._precondition, self.name)

    def explained(self, cross: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, int]:
        """What observations explain of a prior (co)variance: cross (K + shift I)^-1 cross^T, for cross [m, n].

        With x an approximate solution for k and r its residual, k^T A^-1 k = k^T x + r^T x + r^T A^-1 r. The last term,
        which is left out, lies between 0 and |r|^2 / shift where K is positive semi-definite.

        Parameters
        ----------
        prior : [m, m], or its diagonal, [m]: says which of the two is wanted.

        Returns
        -------
        explained [m, m] or [m], the bound |r|^2 / shift of what each diagonal entry lacks [m], products with K.
        """
        full, variances = prior.ndim == 2, prior if prior.ndim == 1 else prior.diagonal()
        m, passes = len(cross), 0
        bounds, found = prior.new_empty(m), torch.empty_like(prior)
        solved, rests = (prior.new_empty(len(self.K), m if full else 0) for _ in range(2))
        for part in _strips(m):
            right = cross[part].T.to(torch.float64)
            goals = _RESIDUAL * right.norm(dim=0)
            if self.shift > 0:
                enough = (_VARIANCE * self.shift * variances[part].clamp(min=0)).sqrt()
                goals = torch.maximum(enough, 1e-4 * goals)  # or where float64 ends
            one = self._solved(right, goals)
            passes += one.passes
            sizes = one.rest.square().sum(0)
            bounds[part] = sizes / self.shift if self.shift > 0 else torch.inf
            if full:
                solved[:, part], rests[:, part] = one.alpha, one.rest
            else:
                found[part] = ((right + one.rest) * one.alpha).sum(0)
        for part in _strips(m) if full else ():
            found[part] = cross[part].to(torch.float64) @ solved + solved[:, part].T @ rests
        return found, bounds, passes


def _strips(m: int) -> list[slice]:
    """Test points solved at a time."""
    return [slice(start, start + _STRIP) for start in range(0, m, _STRIP)]
