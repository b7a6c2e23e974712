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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.infinite.activations import Activation, Function, fingerprint, scratch, values_and_slopes

_REACH = 13  # radius: the density beyond is below 1e-36
_NODES, _ANGLES = 12, 33  # nodes in log a, and in the angle, doubled up to 96 and 129 where the values ask for more
_TAIL = 1e-13  # last coefficients, relative to the largest, up to which there are nodes enough
_TOLERANCE = 1e-12  # error, relative to the diagonal, at which the table is not enlarged further
_PROBES = 48
_STEP = math.log(16)  # in log a: ranges of tables end on its multiples, so that one table serves many sets of samples
_KEPT = 24  # tables, of this process


class _Table(NamedTuple):
    low: float  # range of log a
    high: float
    nodes: Tensor  # in log a, scaled to [-1, 1]
    basis: Tensor  # of the rows, [nodes, rank]
    core: Tensor  # coefficients of the correlations of s(u), s(v) and of s'(u), s'(v), [2, angles, rank, rank]
    squares: Tensor  # log E[s(u)^2] and log E[s'(u)^2], [nodes, 2]
    error: float = 0.0

    def rows(self, v: Tensor) -> Tensor:
        """Barycentric weights of the nodes at variances v, [..., count], flat."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        x = ((v.double().cpu().clamp(min=math.exp(self.low)).log() - middle) / half).clamp(-1, 1).flatten()
        count = len(self.nodes)
        angles = (torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count
        weights = angles.sin() * (-1.0) ** torch.arange(count)
        difference = x[:, None] - self.nodes
        exact = difference == 0
        quotient = weights / difference.masked_fill(exact, 1)
        quotient = torch.where(exact.any(1, keepdim=True), exact.double(), quotient)
        return quotient / quotient.sum(1, keepdim=True)

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


class Tabulated(Activation):
    """Any elementwise function s.

    `error` is the largest difference, relative to the root of the two diagonal values, between the interpolated table
    and finer quadrature at random variances and angles, in the range of variances so far. Kinks at 0 (ELU, SELU) are
    as exact as smooth functions. For kinks elsewhere (hardtanh, ReLU6) the error tells how exact the table is.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.name, self._function, self._key = name, function, fingerprint(function)
        self._steps = (math.inf, -math.inf)  # range of log a, in steps
        self.version = 0  # of the table: states and tables must have the same version
        self._lock = threading.RLock()

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        self._cover(v)
        rows = self._table.rows(v)
        basis = (rows @ self._table.basis).reshape(*v.shape, -1).movedim(-1, 0)
        value, slope = self._table.roots(v, rows)
        rounded = v * (1 - 8 * torch.finfo(v.dtype).eps)
        return basis.to(v.dtype).to(v.device).contiguous(), rounded, value, slope

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        root, x = scratch(0, K), scratch(1, K)
        torch.mul(one[1], two[1], out=root).addcmul_(K, K, value=-1).clamp_(min=0).sqrt_()
        torch.atan2(root, K, out=x).mul_(4 / math.pi).sub_(2)  # twice the coordinate in [-1, 1]
        core = self._table.core.to(K)
        for which, target in ((1, T), (0, K)):
            if target is None:
                continue
            previous, last = torch.zeros_like(K), torch.zeros_like(K)
            for k in range(core.shape[1] - 1, 0, -1):  # Clenshaw
                previous.neg_().addcmul_(x, last).add_(_between(one[0], core[which, k], two[0]))
                previous, last = last, previous
            value = previous.neg_().addcmul_(x, last, value=0.5).add_(_between(one[0], core[which, 0], two[0]))
            value.mul_(one[2 + which] * two[2 + which])
            if which:
                target.mul_(value)
            else:
                target.copy_(value)
        return 1.0

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        self._cover(v)
        value, slope = self._table.roots(v, self._table.rows(v))
        return value.square(), slope.square()

    def _cover(self, v: Tensor) -> None:
        """Extend the table to the range of these variances, if it is not covered.

        One thread at a time. The version changes before and after, so that other threads can tell that the table
        changed while they computed.
        """
        with self._lock:
            high = float(v.max())
            high = math.log(high) if high > 0 else 0.0
            low = math.log(max(float(v.min()), 1e-14 * math.exp(high)))
            steps = (min(self._steps[0], math.floor(low / _STEP)), max(self._steps[1], math.ceil(high / _STEP)))
            if steps == self._steps:
                return
            self.version += 1
            self._steps = steps if steps[1] > steps[0] else (steps[0], steps[0] + 1)
            self._table = _table(self._key, self._function, *self._steps)
            self.error = self._table.error
            self.version += 1


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
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(np.exp(rng.uniform(low, high, _PROBES))) for _ in range(2))
    a[:2], b[:2] = math.exp(low), math.exp(high)
    b[2:12] = a[2:12]  # equal norms, as of normalized inputs
    t = torch.from_numpy(rng.uniform(0, 1, _PROBES))
    t[::4] **= 4  # many samples are close to each other
    t = (t * math.pi).clamp(1e-6, math.pi - 1e-6)
    exact = torch.stack([_integrals(function, a[i : i + 1], b[i : i + 1], float(t[i]), 2)[:, 0, 0]
                         for i in range(_PROBES)], 1)  # fmt: skip
    exact /= (_squares(function, a).sqrt() * _squares(function, b).sqrt()).T
    count, angles = _NODES, _ANGLES
    best, more_nodes, more_angles = _interpolation(function, low, high, count, angles)
    best = best._replace(error=float((best.correlations(a, b, t) - exact).abs().max()))
    while best.error > _TOLERANCE and (count, angles) != (8 * _NODES, 4 * _ANGLES - 3):
        count = min(2 * count, 8 * _NODES) if more_nodes else count
        angles = min(2 * angles - 1, 4 * _ANGLES - 3) if more_angles else angles
        table, more_nodes, more_angles = _interpolation(function, low, high, count, angles)
        error = float((table.correlations(a, b, t) - exact).abs().max())
        stalled = error > best.error / 3  # by a kink, or by rounding
        best = table._replace(error=error) if error < best.error else best
        if stalled or not (more_nodes or more_angles):
            break
    return best


def _interpolation(function: Function, low: float, high: float, count: int, angles: int) -> tuple[_Table, bool, bool]:
    """A table, and whether the values ask for more nodes and for more angles."""
    nodes, places = _chebyshev(count), _chebyshev(angles)
    a = ((low + high) / 2 + (high - low) / 2 * nodes).exp()
    values = torch.stack([_integrals(function, a, a, math.pi * (1 + float(x)) / 2, 1) for x in places], 1)
    squares = _squares(function, a)
    # correlations, since the values of samples of very different size would drown in the rounding of the largest
    values /= (squares.sqrt()[:, None] * squares.sqrt()).movedim(2, 0)[:, None]
    coefficients = torch.einsum("kx,fxpq->fkpq", _transform(places), values)
    over_nodes = torch.einsum("np,fkpq->fknq", _transform(nodes), coefficients).abs().amax((0, 1, 3))
    size = coefficients.abs().amax((0, 2, 3))
    more = [bool(t[-2:].max() > _TAIL * t.max()) for t in (over_nodes, size)]
    coefficients = coefficients[:, : int((size > 1e-15 * size.max()).nonzero().max()) + 1]
    sides = torch.cat([coefficients, coefficients.mT]).movedim(2, 0).flatten(1)
    u, s, _ = torch.linalg.svd(sides, full_matrices=False)
    basis = u[:, : int((s > 1e-15 * s[0]).sum())]
    core = torch.einsum("ps,fkpq,qt->fkst", basis, coefficients, basis)
    return _Table(low, high, nodes, basis, core, squares.log()), more[0], more[1]


def _transform(places: Tensor) -> Tensor:
    """Chebyshev coefficients from values at the nodes."""
    k = torch.arange(len(places), dtype=torch.float64)
    transform = torch.cos(k[:, None] * torch.acos(places)) * (2 / len(places))
    transform[0] /= 2
    return transform


def _between(one: Tensor, core: Tensor, two: Tensor) -> Tensor:
    """sum_st one_s core_st two_t, for a grid of samples or for pairs, in the shape of a plane."""
    left = one[..., 0].movedim(0, -1) @ core  # [h, w, p, rank]
    if two.shape[-2] == 1:
        return left @ two[..., 0, :].movedim(0, -2)
    return (left * two[..., 0].movedim(0, -1)).sum(-1, keepdim=True)


def _chebyshev(count: int) -> Tensor:
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count).cos()


def _radii(density: int, lowest: float, finer: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the integral of r^(density - 1) exp(-r^2 / 2), equidistant in log r, as far as it counts."""
    step = 0.13 / finer
    r = torch.arange(lowest, math.log(_REACH), step, dtype=torch.float64).exp()
    return r, step * r**density * torch.exp(-r.square() / 2)


def _sectors(count: int, ends: list[float]) -> tuple[Tensor, Tensor]:
    """Nodes and weights between neighbors of `ends`, denser near them, where a steep function changes its sign."""
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(count))
    places, weights = (3 * nodes - nodes**3) / 2, weights * (3 - 3 * nodes**2) / 2
    at = torch.tensor(ends, dtype=torch.float64)
    middle, half = (at[:-1, None] + at[1:, None]) / 2, at.diff()[:, None] / 2
    return (middle + half * places).flatten(), (half * weights).flatten()


def _integrals(function: Function, a: Tensor, b: Tensor, angle: float, finer: int) -> Tensor:
    """E[s(u) s(v)] and E[s'(u) s'(v)] for all variances a and b at one angle, [2, len(a), len(b)]."""
    r, of_r = _radii(2, -16.0, finer)
    half, shift = math.pi / 2, angle / 2
    # u = r cos(w + shift), v = r cos(w - shift): the nodes are symmetric, so v at w equals u at -w
    ends = [-half - shift, -half + shift, half - shift, half + shift, 3 * half - shift]
    w, of_w = _sectors(56 * finer, ends)
    mirrored = torch.arange(len(w)).reshape(4, -1)[[2, 1, 0, 3]].flip(1).flatten()
    weights = (of_r[:, None] * of_w / (2 * math.pi)).flatten()
    roots = a.sqrt() if a is b else torch.cat([a, b]).sqrt()
    both = values_and_slopes(function, roots[:, None, None] * (r[:, None] * (w + shift).cos()))
    moments = []
    for f in both:
        u, v = f[: len(a)], f[-len(b) :][..., mirrored]
        moments.append((u.flatten(1) * weights) @ v.flatten(1).T)
    return torch.stack(moments)


def _squares(function: Function, v: Tensor) -> Tensor:
    """E[s(u)^2] and E[s'(u)^2], [n, 2]."""
    x, weights = _radii(1, -34.0, 1)
    weights = torch.cat([weights, weights]) / math.sqrt(2 * math.pi)
    both = values_and_slopes(function, v.sqrt()[:, None] * torch.cat([x, -x]))
    return torch.stack([f.square() @ weights for f in both], 1).clamp(min=1e-300)
