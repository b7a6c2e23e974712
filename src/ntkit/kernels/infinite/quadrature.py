"""Activations without a closed form: a table computed by quadrature, with a measured error.

With variances a, b and angle t = acos(c / sqrt(a b)), u = sqrt(a) r cos w and v = sqrt(b) r cos(w - t) for a radius r
with density r exp(-r^2 / 2) and a uniform angle w. So E[s(u) s(v)] is an integral over four sectors, between the lines
u = 0 and v = 0. In each the integrand is smooth even where s has a kink at 0, and the value is smooth in t up to its
ends (it is not smooth in the correlation c / sqrt(a b)), and smooth in log a and log b. So it is tabulated on Chebyshev
nodes in log a, log b and t and interpolated. The table is stored in factors of its numerical rank in a and b.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.activations import Activation, Function, scratch, square_root, values_and_slopes
from ntkit.kernels.infinite.gaussian_integrals import (
    as_correlations,
    barycentric,
    chebyshev_nodes,
    chebyshev_transform,
    family_values,
    mean_squares,
    means,
    moments_at,
    values_one_by_one,
)
from ntkit.kernels.infinite.piecewise import Piecewise
from ntkit.kernels.infinite.recognition import fingerprint
from ntkit.kernels.infinite.split_integrals import Kinked, kinked

_NODES, _MOST_NODES = 12, 96  # nodes in log a per step below; doubled where the values ask for more
_ANGLES, _MOST_ANGLES = 65, 129  # nodes in the angle, likewise
_NODES_BESIDE, _ANGLES_BESIDE = 20, 49  # beside a piecewise polynomial: each costs a thousand times as much
_TAIL = 1e-13  # last coefficients, relative to the largest, up to which there are nodes enough
_TOLERANCE = 1e-12  # error, relative to the diagonal, at which the table is not enlarged further
_ROUNDING, _NOTHING = 1e-14, 1e-15  # relative size up to which a coefficient, a factor is left out
_DIGITS = -math.log(1e-15)
_ROUGH = 1e-6  # error above which s has a kink elsewhere than at 0, and shortcuts may be the less exact way
_NARROW = 1e-2  # below this share, the equidistant values are the less exact ones
_PROBES = (6, 4)  # angles, and variances for each
_STEP, _PARTS = math.log(16), 32  # in log a: ranges end on its multiples, so that one table serves many sets of samples
_KEPT = 24  # tables, of this process

Values = Callable[[Function, Tensor, Tensor, Tensor], Tensor]


class _Table(NamedTuple):
    low: float  # range of log a
    high: float
    nodes: Tensor  # in log a, scaled to [-1, 1]
    basis: Tensor  # of the rows, [nodes, rank]
    core: Tensor  # coefficients of the correlations of s(u), s(v) and of s'(u), s'(v), [2, angles, rank, rank]
    ranks: list[list[int]]  # that count, of each [rank, rank] of the core; last ones of 0 are left out
    squares: Tensor  # log E[s(u)^2] and log E[s'(u)^2], [nodes, 2]
    means: Tensor  # E[s(u)] and E[s'(u)], likewise
    error: float = 0.0
    corner: Piecewise | None = None  # its moments are not in the table: see `split_integrals`

    def rows(self, v: Tensor) -> Tensor:
        """Barycentric weights of the nodes at variances v, [..., count], flat."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        x = ((v.double().cpu().clamp(min=math.exp(self.low)).log() - middle) / half).clamp(-1, 1).flatten()
        return barycentric(self.nodes, x)

    def roots(self, v: Tensor, rows: Tensor) -> Tensor:
        """Roots of E[s(u)^2] and E[s'(u)^2], [2, *v.shape]: below the range by the power of v at its low end."""
        step = (self.nodes[-1] - self.nodes[-2]) * (self.high - self.low) / 2
        power = ((self.squares[-1] - self.squares[-2]) / step).round()
        below = (v.double().cpu().flatten().log() - self.low).clamp(max=0)[:, None]
        logs = rows @ self.squares + torch.where(power > 0, below * power, 0.0)
        return (logs / 2).exp().T.reshape(2, *v.shape).to(v)

    def correlations(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        """Of values and of slopes, [2, n]."""
        one, two = self.rows(a) @ self.basis, self.rows(b) @ self.basis
        k = torch.arange(self.core.shape[1], dtype=torch.float64)
        waves = torch.cos(k * torch.acos((2 * t / math.pi - 1).clamp(-1, 1))[:, None])
        return torch.einsum("ns,fkst,nt,nk->fn", one, self.core, two, waves)

    def narrowed(self, low: float, high: float) -> _Table:
        """The same in a part of its range, where a few nodes, factors and angles are enough."""
        ratio = (self.high - self.low) / (high - low)
        strip = math.sinh(_DIGITS / len(self.nodes))  # where it is analytic, if its nodes were enough for all digits
        nodes = chebyshev_nodes(min(len(self.nodes), 1 + math.ceil(_DIGITS / math.asinh(strip * ratio))))
        rows = self.rows(((low + high) / 2 + (high - low) / 2 * nodes).exp())
        basis = rows @ self.basis
        coefficients = torch.einsum("ps,fkst,qt->fkpq", basis, self.core, basis)
        table = _factored(low, high, nodes, coefficients, rows @ self.squares, rows @ self.means)
        rng = np.random.default_rng(1)
        a, b = (torch.from_numpy(np.exp(rng.uniform(low, high, 200))) for _ in range(2))
        t = torch.from_numpy(rng.uniform(0, math.pi, 200))
        apart = (table.correlations(a, b, t) - self.correlations(a, b, t)).abs().max()
        return table._replace(error=self.error + float(apart), corner=self.corner)


class Tabulated(Activation):
    """Any elementwise function s.

    `error` is the largest difference, relative to the root of the two diagonal values, between the interpolated table
    and finer quadrature at random variances and angles, in the range of variances so far. Kinks at 0 (ELU, SELU) are
    as exact as smooth functions. With kinks elsewhere, between pieces that are no polynomials, it is a table of what is
    left beside a piecewise polynomial (see `split_integrals`); with many, the error tells how inexact.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.name, self._function, self._key = name, function, fingerprint(function)
        self._steps = (math.inf, -math.inf)  # range of log a so far, in parts of a step
        # The function's value and autograd's slope at 0 count where values are 0 in every network.
        self._at_zero = [float(t) for t in values_and_slopes(function, torch.zeros(1, dtype=torch.float64))]
        self.version = 0  # of the table: states and tables must have the same version
        self._lock = threading.RLock()

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        self._cover(v)
        rows = self._table.rows(v)
        basis = (rows @ self._table.basis).reshape(*v.shape, -1).movedim(-1, 0)
        value, slope = self._table.roots(v, rows)
        rounded = v * (1 - 8 * torch.finfo(v.dtype).eps)
        means = (rows @ self._table.means).T.reshape(2, *v.shape).to(v)
        means = [t.masked_fill(v == 0, at_zero) for t, at_zero in zip(means, self._at_zero, strict=True)]
        corner = self._table.corner.state(v) if self._table.corner else ()
        return basis.to(v.dtype).to(v.device).contiguous(), rounded, value, slope, *means, *corner

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        beyond = None
        if self._table.corner:
            beyond = K.clone(), torch.ones_like(K)
            self._table.corner.apply(beyond[0], None if T is None else beyond[1], one[6:], two[6:])
        root, x = scratch(0, K), scratch(1, K)
        torch.mul(one[1], two[1], out=root).addcmul_(K, K, value=-1)
        square_root(root, x)
        torch.atan2(root, K, out=x).mul_(4 / math.pi).sub_(2)  # twice the coordinate in [-1, 1]
        black = None if one[1].all() and two[1].all() else (one[1] == 0) | (two[1] == 0)
        axis = -2 if two[0].shape[-2] == 1 else -1  # a grid of samples, or pairs
        for which, target in ((1, T), (0, K)):
            if target is None:
                continue
            left, right = (  # [positions, samples, rank]
                (side[0] * side[2 + which]).squeeze(at).movedim(0, -1).flatten(0, 1)
                for side, at in ((one, -1), (two, axis))
            )
            value = self._series(which, x.flatten(0, 1), left, right).view(K.shape)
            value = value if beyond is None else value + beyond[which]
            value = value if black is None else torch.where(black, one[4 + which] * two[4 + which], value)
            if which:
                target.mul_(value)
            else:
                target.copy_(value)
        return 1.0

    def _series(self, which: int, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Sum over k of (left core_k right) cos(k t), by Clenshaw's recursion; x = 2 cos t.

        Of an even or odd function of cos t there is every other term only: cos((k + 2) t) = y cos(k t) - cos((k - 2) t)
        with y = 2 cos(2 t).
        """
        ranks, core = self._table.ranks[which], self._table.core[which].to(x)
        odd = int(not any(ranks[::2]))
        step = 2 if odd or not any(ranks[1::2]) else 1
        y = torch.mul(x, x, out=scratch(4, x)).sub_(2) if step == 2 else x
        previous, last = scratch(2, x).zero_(), scratch(3, x).zero_()
        sign = last_sign = 1  # in place of a sign, previous and last carry one

        def add(k: int, sign: int) -> None:
            if r := ranks[k]:
                part = left[..., :r] @ core[k, :r, :r]
                if x.shape[-1] == right.shape[-2]:
                    previous.baddbmm_(part, right[..., :r].mT, alpha=sign)
                else:  # of pairs
                    previous.add_((part * right[..., :r]).sum(-1, keepdim=True), alpha=sign)

        for k in range(len(ranks) - 1 - (len(ranks) - 1 - odd) % step, odd, -step):
            add(k, -sign)
            previous.addcmul_(y, last, value=-sign * last_sign)
            previous, last, sign, last_sign = last, previous, last_sign, -sign
        add(odd, -sign)
        previous.addcmul_(y, last, value=-sign * last_sign / (1 if odd else 2))
        if odd:  # cos(-t) = cos(t), where the even ones have 1
            previous.add_(last, alpha=sign * last_sign).mul_(x)
        return previous.mul_(-sign / (2 if odd else 1))

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        self._cover(v)
        value, slope = (
            root.masked_fill(v == 0, at_zero).square()
            for root, at_zero in zip(self._table.roots(v, self._table.rows(v)), self._at_zero, strict=True)
        )
        return value, slope

    def _cover(self, v: Tensor) -> None:
        """Extend the table to the range of these variances, if it is not covered.

        One thread at a time. The version changes before and after, so that other threads can tell that the table
        changed while they computed.
        """
        high = float(v.max())
        high = math.log(high) if high > 0 else 0.0
        part, smallest = _STEP / _PARTS, high + math.log(1e-14)  # below, the low end of the range stands for all
        low = math.log(float(v.min())) if float(v.min()) > math.exp(smallest) else _STEP * math.floor(smallest / _STEP)
        with self._lock:
            steps = (min(self._steps[0], math.floor(low / part)), max(self._steps[1], math.ceil(high / part)))
            if steps == self._steps:
                return
            self.version += 1
            self._steps = steps if steps[1] > steps[0] else (steps[0], steps[0] + 1)
            low, high = (n / _PARTS for n in self._steps)
            # most networks keep their variances between 1 / 16 and 16: one table for all their layers
            low, high = (-1, 1) if low >= -1 and high <= 1 else (math.floor(low), math.ceil(high))
            self._table = self._checked(low, high, float(v.max()) ** 0.5).narrowed(*(n * part for n in self._steps))
            self.error = self._table.error
            self.version += 1

    def _checked(self, low: float, high: float, largest: float) -> _Table:
        """The table of a range, or a refusal: of values that overflow, or that are 0 as far as they count."""
        ends = torch.tensor([math.exp(low * _STEP), math.exp(high * _STEP)], dtype=torch.float64)
        squares = mean_squares(self._function, ends)
        got = ""
        if not squares.isfinite().all():
            got = f"values or slopes that overflow at standard deviations up to {largest:.2g}"
        elif float(squares[1, 0]) < 1e-280:
            got = f"values that vanish up to ten standard deviations, of {largest:.2g} at most"
        else:
            try:
                table = _table(self._key, self._function, low, high)
            except (RuntimeError, np.linalg.LinAlgError):
                table = None
            if table is not None and table.error < 1:
                return table
            got = f"a function whose kernel cannot be computed at standard deviations up to {largest:.2g}"
        fix = "Scale its input, or choose an activation that changes less."
        raise refusal(self.name, got=got, expected="an activation with finite moments", fix=fix)


_TABLES: OrderedDict[tuple, _Table] = OrderedDict()  # the least recently used is dropped first
_ONE_AT_A_TIME = threading.RLock()


def _table(key: str, function: Function, low: float, high: float) -> _Table:
    """The table of a function for a range of log a, in steps; computed once in a process."""
    with _ONE_AT_A_TIME:
        found = _TABLES.pop((key, low, high), None) or _computed(function, low * _STEP, high * _STEP)
        _TABLES[key, low, high] = found
        while len(_TABLES) > _KEPT:
            _TABLES.popitem(last=False)
        return found


def _computed(function: Function, low: float, high: float) -> _Table:
    """A table whose error is within the tolerance, or the most exact."""
    if (split := kinked(function)) is not None:
        return _computed_with_corner(split, low, high)
    probes = _Probes(function, low, high)
    tables: list[_Table] = []
    for values in (family_values, values_one_by_one):
        count, angles, last = min(_NODES * math.ceil((high - low) / _STEP), _MOST_NODES), _ANGLES, math.inf
        while True:
            a = _variances(low, high, count)
            squares = mean_squares(function, a), means(function, a)
            table, more_nodes, more_angles = _interpolation(function, low, high, squares, angles, values)
            table = table._replace(error=probes.error(table))
            stalled, last = table.error > last / 3, table.error  # by a kink, or by rounding
            tables.append(table)
            best = min(tables, key=lambda table: table.error)
            more_nodes, more_angles = more_nodes and count < _MOST_NODES, more_angles and angles < _MOST_ANGLES
            if best.error <= _TOLERANCE or stalled or probes.overlooked or not (more_nodes or more_angles):
                break
            count = min(3 * count // 2, _MOST_NODES) if more_nodes else count
            angles = angles + 32 if more_angles else angles
        if best.error <= _ROUGH or probes.overlooked:  # what no quadrature here sees, no other table has
            break
    return min(tables, key=lambda table: table.error)


def _computed_with_corner(split: Kinked, low: float, high: float) -> _Table:
    """The same of a function with kinks elsewhere than at 0: a table of the rest beside a piecewise polynomial."""
    count, angles = min(_NODES_BESIDE * math.ceil((high - low) / _STEP), _MOST_NODES), _ANGLES_BESIDE
    v = _variances(low, high, count)
    squares = split.squares(v), split.means(v)
    table = _interpolation(split.function, low, high, squares, angles, split.family_values)[0]
    rng, worst = np.random.default_rng(0), 0.0
    for number in range(24):
        v = np.exp(rng.uniform(low, high, 4))
        t = math.pi * rng.uniform()
        if number % 3:  # it is the least smooth where u and v nearly coincide
            v = v[number % 4] * (1 + 0.3 * np.array([0, *10 ** rng.uniform(-4, 0, 3)]))
            t = 10 ** rng.uniform(-4, 0)
        v = torch.from_numpy(np.minimum(v, math.exp(high)))
        exact = torch.stack([split.moments(v, b, t, 16) for b in v.tolist()], 2)
        at = [s.expand(4, 4) for s in (v[:, None], v, torch.tensor(t, dtype=torch.float64))]
        own = split.squares(v)
        worst = max(worst, float((table.roots(v, table.rows(v)).square().T / own - 1).abs().max()))
        exact = as_correlations(exact - split.of_corner(*at), own)
        worst = max(worst, float((table.correlations(*(s.flatten() for s in at)) - exact.flatten(1)).abs().max()))
    return table._replace(error=worst, corner=split.corner)


def _variances(low: float, high: float, count: int) -> Tensor:
    return ((low + high) / 2 + (high - low) / 2 * chebyshev_nodes(count)).exp()


class _Probes:
    """Correlations at random variances and angles, by finer quadrature than the table's and without its shortcuts."""

    def __init__(self, function: Function, low: float, high: float) -> None:
        rng, (angles, sides) = np.random.default_rng(0), _PROBES
        t = torch.from_numpy(rng.uniform(0, 1, angles))
        t[::3] **= 4  # many samples are close to each other
        t = (t * math.pi).clamp(1e-6, math.pi - 1e-6)
        v = torch.from_numpy(np.exp(rng.uniform(low, high, (angles, sides))))
        v[::2, 0], v[1::2, 0] = math.exp(low), math.exp(high)
        exact = [
            as_correlations(moments_at(function, a, x, 2), mean_squares(function, a)) for a, x in zip(v, t, strict=True)
        ]
        self._exact = torch.stack(exact, 1).flatten(1)
        self.overlooked = _overlooked(function, v[:2, 0])
        shape = (angles, sides, sides)
        self._at = [s.expand(shape).flatten() for s in (v[:, :, None], v[:, None], t[:, None, None])]

    def error(self, table: _Table) -> float:
        """Largest difference of a table from them."""
        return max(float((table.correlations(*self._at) - self._exact).abs().max()), self.overlooked)


def _overlooked(function: Function, v: Tensor) -> float:
    """Share of E[s(u)^2] that only 26001 equidistant values see: a feature too narrow for the quadrature."""
    x = torch.linspace(-13, 13, 26001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) * (1e-3 / math.sqrt(2 * math.pi))
    dense = function((v.sqrt()[:, None] * x).flatten()).detach().double().reshape(len(v), -1).square() @ density
    share = float((1 - mean_squares(function, v)[:, 0] / dense.clamp(min=1e-300)).abs().max())
    return share if share > _NARROW else 0.0


def _interpolation(
    function: Function, low: float, high: float, own: tuple[Tensor, Tensor], angles: int, values: Values
) -> tuple[_Table, bool, bool]:
    """A table, and whether the values ask for more nodes and for more angles.

    own : mean squares and means of values and slopes at the nodes, [nodes, 2] each.
    """
    squares, count = own[0], len(own[0])
    nodes, places, a = chebyshev_nodes(count), chebyshev_nodes(angles), _variances(low, high, count)
    coefficients = torch.einsum("kx,fxpq->fkpq", chebyshev_transform(angles), values(function, a, squares, places))
    over_nodes = torch.einsum("np,fkpq->fknq", chebyshev_transform(count), coefficients).abs().amax((0, 1, 3))
    size = coefficients.abs().amax((0, 2, 3))
    more = [bool(t[-2:].max() > _TAIL * t.max()) for t in (over_nodes, size)]
    return _factored(low, high, nodes, coefficients, squares.log(), own[1]), more[0], more[1]


def _factored(low: float, high: float, nodes: Tensor, coefficients: Tensor, squares: Tensor, means: Tensor) -> _Table:
    """A table from coefficients of the correlations at the nodes, [2, angles, nodes, nodes]; of numerical rank."""
    size = coefficients.abs().amax((2, 3))
    counts = [int((s >= _ROUNDING * s.max()).nonzero().max()) + 1 for s in size]
    coefficients = coefficients[:, : max(counts)].clone()
    for part, count in zip(coefficients, counts, strict=True):
        part[count:] = 0
    sides = torch.cat([coefficients, coefficients.mT]).movedim(2, 0).flatten(1)
    u, s, _ = torch.linalg.svd(sides, full_matrices=False)
    basis = u[:, : int((s > _NOTHING * s[0]).sum())]
    core = torch.einsum("ps,fkpq,qt->fkst", basis, coefficients, basis)
    return _Table(low, high, nodes, basis, core, [_ranks(part) for part in core], squares, means)


def _ranks(core: Tensor) -> list[int]:
    """Of each matrix of a core, the size of its leading part beyond which nothing counts."""
    size, ranks = core.abs(), torch.zeros(len(core), dtype=torch.int64)
    for r in range(core.shape[-1]):
        edge = torch.maximum(size[:, r, : r + 1].amax(1), size[:, : r + 1, r].amax(1))
        ranks[edge >= _NOTHING * size.max()] = r + 1
    return ranks[: int(ranks.nonzero().max()) + 1].tolist()
