"""Newton steps projected onto a >= 0 (Bertsekas 1982), for a dense quadratic, by Cholesky, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
_DAMPING, _MOST_DAMPING = 1e3 * _EPS, 1e-6  # relative to the trace of the system solved
_AT_ONCE = 4  # trial lengths of a step compared in one product
_PATIENCE = 10  # steps without a smaller gap or a larger dual objective


class ProjectedNewton:
    """Minimize 1/2 a^T Q a - sum a over a >= 0, for one symmetric Q, [s, s].

    Each step solves for the exact minimizer on the free points (the support and those that violate their margin),
    ignoring signs, and goes towards it along the projection onto a >= 0 as far as is best: all the way, or until all,
    half, a quarter, ... or the first of the points that reach zero on the way have left. Up to the first the objective
    falls whatever Q is, so a step that is not lost in rounding either arrives or lets a point go. The gradient is
    computed afresh at every step, so the damping of the factorization only affects speed: it is its own refinement.

    Parameters
    ----------
    Q : [s, s] float64.
    floor : a^T Q a at or below this times a^T a cannot be told from 0.

    Attributes
    ----------
    steps : steps taken.
    flat : whether a combination without energy was found: Q has no minimizer, or none that can be computed.
    """

    def __init__(self, Q: Tensor, floor: float):
        self.Q, self.floor = Q, floor
        self.steps, self.flat = 0, False
        self._damping = _DAMPING
        self._factored: tuple[float, Tensor] | None = None
        self._lower = Q[:0, :0]

    def solve(self, a: Tensor, target: float, most_steps: int) -> Tensor:
        """Go from a, [s], until the relative gap is at most `target`, or as far as rounding lets; return the new a."""
        gradient, most = self.Q @ a - 1, len(a)
        best_gap, best_dual, stalled = float("inf"), 0.0, 0
        while self.steps < most_steps and stalled < _PATIENCE:
            block = violators(a, gradient, most, target / 10)
            step = self._step(a, gradient, block)
            self.steps += 1
            if step is None:
                if len(block) > 0:
                    most = len(block) // 8 or int(len(block) > 1)
                elif self._damping < _MOST_DAMPING:
                    # dependent features: the step was lost in the rounding of a nearly singular solve
                    self._damping, most = 100 * self._damping, len(a)
                else:
                    break
                continue
            a, most = step, len(a)
            self._damping = max(_DAMPING, self._damping / 10)
            margins = self.Q @ a
            total, energy = a.sum().item(), (a @ margins).item()
            if energy <= self.floor * (a @ a).item():
                self.flat = True
                break
            gap, dual = relative_gap(total, energy, margins.min().item()), total**2 / energy
            if gap <= target:
                break
            stalled = 0 if gap < 0.9 * best_gap or dual > best_dual * (1 + 1e-6) else stalled + 1
            best_gap, best_dual = min(best_gap, gap), max(best_dual, dual)
            gradient = margins - 1
        return a

    def _step(self, a: Tensor, gradient: Tensor, block: Tensor) -> Tensor | None:
        """Return the best point on the projected Newton arc from a, or None where none lowers the objective."""
        support = torch.nonzero(a).ravel()
        free = torch.cat([support, block])
        if self._factored is None or self._factored[0] != self._damping or not torch.equal(free, self._factored[1]):
            self._lower = self._lower[:0, :0]  # free the memory of the previous one first
            self._lower = _cholesky(self.Q, free, self._damping)
            self._factored = (self._damping, free)
        start = a[free, None]
        direction = self._direction(gradient[free, None], len(support))
        new = torch.zeros_like(a)
        leaves = torch.where(direction < 0, start / -direction, torch.inf)  # step lengths at which points reach zero
        if (leaves >= 1).all():
            new[free] = (start + direction)[:, 0].clamp_(min=0)
            return new
        best, chosen = 0.0, None
        for lengths in _trial_lengths(leaves).split(_AT_ONCE):
            reached = torch.where(leaves <= lengths, 0.0, start + direction * lengths).clamp_(min=0)
            moves = a.new_zeros(len(a), len(lengths))
            moves[free] = reached - start
            # differences, not values, of the objective: no cancellation near the optimum
            change = gradient @ moves + 0.5 * (moves * (self.Q @ moves)).sum(0)
            k = int(change.argmin())
            if change[k] < best:
                best, chosen = change[k].item(), reached[:, k]
            if best < 0 and k < len(lengths) - 1:
                break
        if chosen is None:
            return None
        new[free] = chosen
        return new

    def _direction(self, slope: Tensor, old: int) -> Tensor:
        """Solve for the Newton direction, [m, 1], with the new points that would go below zero held at zero.

        A zero that wants to go below zero only bends the path of the others. Holding it takes the Schur complement of
        the new points, which is the trailing block of the factor times its transpose: no new factorization.
        """
        L = self._lower
        u = torch.linalg.solve_triangular(L, -slope, upper=False)
        trailing = L[old:, old:]
        complement, right = trailing @ trailing.T, trailing @ u[old:]
        moves = torch.zeros_like(right)
        moving = torch.arange(len(right), device=L.device)
        while len(moving):
            change = torch.cholesky_solve(right[moving], _cholesky(complement, moving, 4 * _EPS))
            if (change >= 0).all():
                moves[moving] = change
                break
            moving = moving[change[:, 0] >= 0]
        # with this right side the whole factor gives back `moves`; a part of it would first be copied
        direction = torch.linalg.solve_triangular(L.T, torch.cat([u[:old], trailing.T @ moves]), upper=True)
        direction[old:] = moves
        return direction


def _trial_lengths(leaves: Tensor) -> Tensor:
    """Step lengths, falling: the whole step, then until all, half, a quarter, ... one of the points have left."""
    on_the_way = leaves[leaves < 1].sort().values
    left = len(on_the_way)
    counts = [left]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return torch.cat([leaves.new_ones(1), on_the_way[[count - 1 for count in counts]]])


def violators(a: Tensor, gradient: Tensor, most: int, tolerance: float) -> Tensor:
    """Up to `most` points outside the support whose gradient is below -`tolerance`, the lowest first."""
    outside = torch.where(a > 0, torch.inf, gradient)
    count = min(most, int((outside < -tolerance).sum()))
    return outside.topk(count, largest=False).indices


def relative_gap(total: float, energy: float, smallest: float) -> float:
    """Compute 1 - D/P for the best multiple of a in the dual, and w rescaled to margin 1 in the primal."""
    return 1.0 if smallest <= 0 else max(0.0, 1.0 - (total * smallest / energy) ** 2)


def _cholesky(Q: Tensor, free: Tensor, damping: float) -> Tensor:
    """Factorize Q over the free points, in place of its copy, plus a multiple of I.

    The multiple is `damping`, relative to the trace, or more where that is not enough for rounding. Where the trace is
    zero (features that are zero), it is relative to 1, Q's mean diagonal over all points.
    """
    while True:
        # the transpose has the order of entries that LAPACK overwrites in place
        H = Q[free[:, None], free].T
        H.diagonal().add_(damping * (H.diagonal().sum().item() or 1.0))
        lower, failed = torch.linalg.cholesky_ex(H, out=(H, torch.empty((), dtype=torch.int32, device=H.device)))
        if not failed:
            return lower
        damping *= 30
