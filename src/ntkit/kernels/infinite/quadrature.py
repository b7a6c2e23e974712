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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.infinite.activations import Activation, Function, scratch, values_and_slopes

_REACH = 13  # radius: the density beyond is below 1e-36
_SIZES = ((6, 17), (12, 33), (24, 65), (48, 129))  # nodes in log a, and in the angle
_TOLERANCE = 1e-12  # error, relative to the diagonal, at which the table is not enlarged further
_PROBES = 48
_MARGIN = 1.3  # factor by which a table exceeds the range of variances, so that it is seldom recomputed


class _Table(NamedTuple):
    middle: float  # of the range of log a
    half: float  # width of the range
    nodes: Tensor  # in log a, scaled to [-1, 1]
    basis: Tensor  # of the rows, [nodes, rank]
    core: Tensor  # coefficients, [2, angles, rank, rank]
    squares: Tensor  # E[s(u)^2] and E[s'(u)^2], [nodes, 2]


class Tabulated(Activation):
    """Any elementwise function s.

    `error` is the largest difference, relative to the root of the two diagonal values, between the interpolated table
    and finer quadrature at random variances and angles, in the range of variances so far. Kinks at 0 (ELU, SELU) are
    as exact as smooth functions. For kinks elsewhere (hardtanh, ReLU6) the error tells how exact the table is.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.name, self._function = name, function
        self._low, self._high = math.inf, 0.0
        self.version = 0  # of the table: states and tables must have the same version
        self._lock = threading.RLock()

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        self._cover(v)
        rows = (self._rows(v) @ self._table.basis).reshape(*v.shape, -1).movedim(-1, 0)
        rounded = v * (1 - 8 * torch.finfo(v.dtype).eps)
        return rows.to(v.dtype).to(v.device).contiguous(), rounded

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
            if which:
                target.mul_(value)
            else:
                target.copy_(value)
        return 1.0

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        self._cover(v)
        squares = (self._rows(v) @ self._table.squares).reshape(*v.shape, 2).to(v)
        return squares[..., 0], squares[..., 1]

    # ------------------------------------------------------------------ the table

    def _cover(self, v: Tensor) -> None:
        """Extend the table to the range of these variances, if it is not covered.

        One thread at a time. The version changes before and after, so that other threads can tell that the table
        changed while they computed.
        """
        with self._lock:
            self._extend(v)

    def _extend(self, v: Tensor) -> None:
        high = float(v.max())
        high = high if high > 0 else 1.0
        low = max(float(v.min()), 1e-14 * high)
        if low >= self._low and high <= self._high:
            return
        if low < self._low:
            self._low = low / _MARGIN
        if high > self._high:
            self._high = high * _MARGIN
        self.version += 1
        rng = np.random.default_rng(0)
        low, high = math.log(self._low), math.log(self._high)
        a, b = (torch.from_numpy(np.exp(rng.uniform(low, high, _PROBES))) for _ in range(2))
        a[:2], b[:2] = self._low, self._high
        b[2:12] = a[2:12]  # equal norms, as of normalized inputs
        t = torch.from_numpy(rng.uniform(0, 1, _PROBES))
        t[::4] **= 4  # many samples are close to each other
        t = (t * math.pi).clamp(1e-6, math.pi - 1e-6)
        exact = torch.stack([_integrals(self._function, a[i : i + 1], b[i : i + 1], float(t[i]), 2)[:, 0, 0]
                             for i in range(_PROBES)], 1)  # fmt: skip
        scale = (_squares(self._function, a) * _squares(self._function, b)).sqrt().T
        best: tuple[float, _Table] | None = None
        for count, angles in _SIZES:
            self._table = self._tabulate(count, angles)
            self.error = float(((self._at(a, b, t) - exact).abs() / scale.clamp(min=1e-300)).max())
            if self.error < _TOLERANCE:
                break
            if best is not None and self.error > best[0]:  # rounding: the smaller table is as good
                self.error, self._table = best
                break
            best = self.error, self._table
        self.version += 1

    def _tabulate(self, count: int, angles: int) -> _Table:
        middle, half = math.log(self._low * self._high) / 2, math.log(self._high / self._low) / 2
        nodes, places = _chebyshev(count), _chebyshev(angles)
        a = (middle + half * nodes).exp()
        values = torch.stack([_integrals(self._function, a, a, math.pi * (1 + float(x)) / 2, 1) for x in places], 1)
        k = torch.arange(angles, dtype=torch.float64)
        transform = torch.cos(k[:, None] * torch.acos(places)) * (2 / angles)
        transform[0] /= 2
        coefficients = torch.einsum("kx,fxpq->fkpq", transform, values)
        size = coefficients.abs().amax((0, 2, 3))
        coefficients = coefficients[:, : int((size > 1e-15 * size.max()).nonzero().max()) + 1]
        sides = torch.cat([coefficients, coefficients.mT]).movedim(2, 0).flatten(1)
        u, s, _ = torch.linalg.svd(sides, full_matrices=False)
        basis = u[:, : int((s > 1e-15 * s[0]).sum())]
        core = torch.einsum("ps,fkpq,qt->fkst", basis, coefficients, basis)
        return _Table(middle, half, nodes, basis, core, _squares(self._function, a))

    def _rows(self, v: Tensor) -> Tensor:
        """Barycentric weights of the nodes in log a, [..., count], flat."""
        table = self._table
        x = ((v.double().cpu().clamp(min=self._low).log() - table.middle) / table.half).clamp(-1, 1).flatten()
        count = len(table.nodes)
        angles = (torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count
        weights = angles.sin() * (-1.0) ** torch.arange(count)
        difference = x[:, None] - table.nodes
        exact = difference == 0
        quotient = weights / difference.masked_fill(exact, 1)
        quotient = torch.where(exact.any(1, keepdim=True), exact.double(), quotient)
        return quotient / quotient.sum(1, keepdim=True)

    def _at(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        """Interpolated values and slopes, [2, n]."""
        one, two = self._rows(a) @ self._table.basis, self._rows(b) @ self._table.basis
        k = torch.arange(self._table.core.shape[1], dtype=torch.float64)
        waves = torch.cos(k * torch.acos((2 * t / math.pi - 1).clamp(-1, 1))[:, None])
        return torch.einsum("ns,fkst,nt,nk->fn", one, self._table.core, two, waves)


def _between(one: Tensor, core: Tensor, two: Tensor) -> Tensor:
    """sum_st one_s core_st two_t, for a grid of samples or for pairs, in the shape of a plane."""
    left = one[..., 0].movedim(0, -1) @ core  # [h, w, p, rank]
    if two.shape[-2] == 1:
        return left @ two[..., 0, :].movedim(0, -2)
    return (left * two[..., 0].movedim(0, -1)).sum(-1, keepdim=True)


def _chebyshev(count: int) -> Tensor:
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count).cos()


def _legendre(count: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights between every two neighbours of `ends`."""
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(count))
    width = ends.diff()[:, None]
    return (ends[:-1, None] + width * (nodes + 1) / 2).flatten(), (width * weights / 2).flatten()


def _integrals(function: Function, a: Tensor, b: Tensor, angle: float, finer: int) -> Tensor:
    """E[s(u) s(v)] and E[s'(u) s'(v)] for all variances a and b at one angle, [2, len(a), len(b)]."""
    r, of_r = _legendre(16, torch.arange(0, _REACH + 0.5 / finer, 1 / finer, dtype=torch.float64))
    of_r = of_r * r * torch.exp(-r.square() / 2)
    half, shift = math.pi / 2, angle / 2
    # u = r cos(w + shift), v = r cos(w - shift): the nodes are symmetric, so v at w equals u at -w
    ends = [-half - shift, -half + shift, half - shift, half + shift, 3 * half - shift]
    w, of_w = _legendre(32 * finer, torch.tensor(ends, dtype=torch.float64))
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
    x, weights = _legendre(14, torch.arange(-_REACH, _REACH + 0.25, 0.5, dtype=torch.float64))
    weights = weights * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    both = values_and_slopes(function, v.sqrt()[:, None] * x)
    return torch.stack([f.square() @ weights for f in both], 1)
