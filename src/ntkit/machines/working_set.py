"""The duals of hard-margin SVMs on one Gram: each solved on a working set of points, certified over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.base.workers import spread
from ntkit.gram.gram_matrix import Gram
from ntkit.machines.projected_newton import ProjectedNewton, relative_gap, violators

_EPS = torch.finfo(torch.float64).eps
_ALL = 512  # up to so many points all are in the working set
_BLOCK = 96  # new points per round, or a quarter of the support where that is more
_SAMPLE = 256  # points whose mean per class gives the first working set
_MAX_STEPS = 20_000  # Newton steps per problem: of a few milliseconds each
_PATIENCE = 10  # rounds without a smaller gap or a larger dual objective
_ROWS = 8  # rows kept in float64: one in so many, which takes a quarter of K in float32


@dataclass
class DualSolution:
    """The answer to one problem: see `HardMarginSVM` for its attributes of the same names."""

    alpha: Tensor
    margin: Tensor
    gap: float
    kkt: float
    status: str
    steps: int
    energy: float  # a^T Q a / (sum a)^2, K at unit mean diagonal: the square of a bound on the relative margin


def solve_duals(K: Gram, signs: list[Tensor], scale: float, tol: float, start: Tensor | None) -> list[DualSolution]:
    """Minimize 1/2 a^T Q a - sum a over a >= 0, Q = scale * y y^T * K, for each y of `signs`; see `HardMarginSVM`.

    In rounds: the problem restricted to a working set is solved by Newton steps; then the margins of all points are
    computed afresh from K, in float64, and the working set becomes the support and the points that violate their
    margin most. A round reads the rows of the supports of all problems, each once, and nothing else of K but what
    lies in rows and columns of a working set. Workers share the problems of a round. `start`, [n, problems], are dual
    variables to start from.
    """
    problems = [_Problem(K, y, scale, tol) for y in signs]
    rows = _Rows(K)
    if start is None and len(K) > _ALL:
        # which points are hard is first judged by the means of the classes: one product for all problems
        for one, values in zip(problems, rows.product(_class_means(signs)).T, strict=True):
            one.begin(values)
    if start is None:
        spread(_Problem.improve, problems)
    else:
        for c, one in enumerate(problems):
            one.a = start[:, c] / start[:, c].max()  # squares of what is passed could over- or underflow
    active = problems
    while active:
        values = rows.product(torch.stack([one.y * one.a for one in active], dim=1))
        for one, column in zip(active, values.T, strict=True):
            one.judge(scale * one.y * column)
            if one.done:
                one.Q = one.Q.new_empty(0, 0)
        active = [one for one in active if not one.done]
        spread(_Problem.improve, active)
    return [one.solution() for one in problems]


def _class_means(signs: list[Tensor]) -> Tensor:
    """Weights of the mean of each problem's positives less that of its negatives, over some points of each class."""
    sides = [y > 0 for y in signs] + [signs[0] < 0] * (len(signs) == 1)
    places = []
    for side in sides:
        points = torch.nonzero(side).ravel()
        count = min(len(points), max(2, _SAMPLE // len(sides)))
        places.append(points[torch.arange(count, device=points.device) * len(points) // count])
    chosen = torch.cat(places)
    weights = torch.stack(signs, dim=1).new_zeros(len(signs[0]), len(signs))
    for c, y in enumerate(signs):
        side = y[chosen]
        weights[chosen, c] = side / torch.where(side > 0, (side > 0).sum(), (side < 0).sum())
    return weights


class _Problem:
    """One dual: the current a, the working set, and the best answer so far."""

    def __init__(self, K: Gram, y: Tensor, scale: float, tol: float):
        n = len(y)
        self.K, self.y, self.scale, self.tol = K, y, scale, tol
        # Below this, a^T Q a cannot be told from 0: rounding of the products, and of the entries of K themselves.
        self.floor = 2 * _EPS * n + K.precision * n**0.5
        self.target = 1e-3 * tol  # one or two steps beyond tol settle the support itself, not only the objective
        self.points = torch.arange(min(n, _ALL), device=y.device)  # the working set
        self.Q, self.place = y.new_empty(0, 0), torch.full((n,), -1, device=y.device)  # the last Q; points in it
        self.a, self.steps, self.stalled, self.done, self.status = torch.zeros_like(y), 0, 0, False, "inaccurate"
        self.best, self.best_margins, self.gap, self.dual = self.a, self.a, float("inf"), 0.0

    def begin(self, values: Tensor) -> None:
        """Take as working set the points of each class that a first separator is most wrong about."""
        lowest = []
        for sign in (1.0, -1.0):
            points = torch.nonzero(self.y == sign).ravel()
            margins = sign * values[points]
            lowest.append(points[margins.topk(min(_BLOCK // 2, len(points)), largest=False).indices])
        self.points = torch.cat(lowest)

    def improve(self) -> None:
        """Solve on the working set, the more exactly the smaller the gap over all points is."""
        newton = ProjectedNewton(self._quadratic(), self.floor)
        target = max(self.target / 2, 0.5 * min(self.gap, 1.0) ** 2)
        solved = newton.solve(self.a[self.points], target, _MAX_STEPS - self.steps)
        self.a = torch.zeros_like(self.a)
        self.a[self.points] = solved
        self.steps += newton.steps

    def _quadratic(self) -> Tensor:
        """Q over the working set; what was there in the last round is not read again."""
        count, old = len(self.points), self.place[self.points]
        kept, new = torch.nonzero(old >= 0).ravel(), torch.nonzero(old < 0).ravel()
        rows = self.K.tile(self.points[new], self.points)
        rows *= (self.scale * self.y[self.points[new]])[:, None]
        rows *= self.y[self.points]
        Q = rows.new_empty(count, count)
        Q[new] = rows
        Q[kept[:, None], new] = rows[:, kept].T
        Q[kept[:, None], kept] = self.Q[old[kept][:, None], old[kept]]
        self.place.fill_(-1)
        self.place[self.points] = torch.arange(count, device=Q.device)
        self.Q = Q
        return Q

    def judge(self, margins: Tensor) -> None:
        """From the margins of all points under a: is it the answer, and if not, which points to work on next."""
        total, energy, size = self.a.sum().item(), (self.a @ margins).item(), (self.a @ self.a).item()
        if energy <= self.floor * size:
            if self.gap >= 1:  # no round gave a separator
                self.best, self.best_margins = self.a, margins
                self.status = "not separable" if energy >= -self.floor * size else "inaccurate"
            self.done = True
            return
        best_multiple = total / energy
        self.a, margins = self.a * best_multiple, margins * best_multiple
        gap, dual = relative_gap(total, energy, margins.min().item() / best_multiple), total**2 / energy
        self.stalled = 0 if gap < 0.9 * self.gap or dual > self.dual * (1 + 1e-6) else self.stalled + 1
        if gap <= self.gap:
            self.best, self.best_margins, self.gap = self.a, margins, gap
        self.dual = max(self.dual, dual)
        self.done = (
            gap <= self.target
            or (self.gap <= self.tol and self.stalled >= 1)
            or self.stalled >= _PATIENCE
            or self.steps >= _MAX_STEPS
        )
        if len(self.a) > _ALL:
            support = torch.nonzero(self.a).ravel()
            most = max(_BLOCK, len(support) // 4)
            self.points = torch.cat([support, violators(self.a, margins - 1, most, self.target / 10)])

    def solution(self) -> DualSolution:
        """The best answer, with its certificate over all points."""
        a, margins = self.best, self.best_margins
        total, energy = a.sum(), a @ margins
        relative = (energy / total.square()).item()
        if self.status == "not separable" or energy <= 0:
            # no multiple of a is a dual optimum: report the combination under which the features cancel
            nothing = torch.zeros_like(total)
            return DualSolution(a / total, nothing, 1.0, float("inf"), self.status, self.steps, relative)
        # the margins carry the rounding of their own sums: a gap that hides in it is not closed
        size = (self.scale * self.K.diagonal()).clamp(min=0).sqrt()
        rounding = _EPS * size * (a @ size)
        self.gap = max(self.gap, relative_gap(total.item(), energy.item(), (margins - rounding).min().item()))
        violation = torch.maximum((1 - margins).clamp(min=0), (a / a.max()) * (margins - 1).abs()).max()
        status = "optimal" if self.gap <= self.tol else self.status
        a = a * self.scale
        return DualSolution(a, a.sum().rsqrt(), self.gap, violation.item(), status, self.steps, relative)


class _Rows:
    """Products with K. Where K is symmetric only to rounding, each row takes a column too: rows in use are kept."""

    def __init__(self, K: Gram):
        self.K = K
        self.kept = torch.empty(0 if K.exact else len(K) // _ROWS, len(K), dtype=torch.float64, device=K.device)
        self.owner = torch.full((len(self.kept),), -1, device=K.device)  # which row of K a kept row is

    def product(self, weights: Tensor) -> Tensor:
        """K @ weights, [n, problems]."""
        if not len(self.kept):
            return self.K @ weights
        used = weights.any(dim=1)
        stale = torch.cat([(self.owner < 0).nonzero(), ((self.owner >= 0) & ~used[self.owner]).nonzero()]).ravel()
        missing = used.clone()
        missing[self.owner[self.owner >= 0]] = False
        new = torch.nonzero(missing).ravel()[: len(stale)]
        for places, slots in zip(new.split(64), stale[: len(new)].split(64), strict=True):
            self.kept[slots] = self.K.rows(places)
        self.owner[stale[: len(new)]] = new
        slots = torch.nonzero((self.owner >= 0) & used[self.owner]).ravel()
        rest = weights.clone()
        rest[self.owner[slots]] = 0
        result = self.K @ rest
        for part in slots.split(64):
            result += self.kept[part].T @ weights[self.owner[part]]
        return result
