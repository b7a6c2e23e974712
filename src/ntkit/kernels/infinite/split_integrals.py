"""Integrals of two functions of a pair of Gaussian variables where a function has kinks elsewhere than at 0.

E[s(u) s(v)] is integrated over u and over v given u, in panels between all kinks. As a function of variances and angle
it has a corner where u and v coincide; a piecewise cubic with the jumps of s and of its derivatives up to the third has
nearly the same one. Its moments are known (`piecewise`): a table of the difference is exact to many more digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from ntkit.kernels.infinite.activations import Function, values_and_slopes
from ntkit.kernels.infinite.gaussian_integrals import legendre
from ntkit.kernels.infinite.kinks import Pieces
from ntkit.kernels.infinite.piecewise import Piecewise
from ntkit.kernels.infinite.recognition import derivatives

_DEGREE = 3  # of the piecewise polynomial
_MOST = 4  # kinks: the cost grows with their number
_REACH = 9.0  # standard deviations: the density beyond is below 1e-17
_NODES = 10  # of a panel


class Kinked(NamedTuple):
    """A function, its kinks, and a piecewise polynomial with the same jumps."""

    function: Function
    kinks: list[float]
    corner: Piecewise

    def squares(self, v: Tensor) -> Tensor:
        """E[s(u)^2] and E[s'(u)^2], [n, 2]."""
        return self.means(v, 2).clamp(min=1e-300)

    def means(self, v: Tensor, power: int = 1) -> Tensor:
        """E[s(u)^power] and E[s'(u)^power], [n, 2]."""
        found = []
        for a in v.tolist():
            x, weights = _panels(_edges(math.sqrt(a), self.kinks, [math.sqrt(a)]), 2 * _NODES)
            both = values_and_slopes(self.function, math.sqrt(a) * x)
            found.append(torch.stack([f**power @ weights for f in both]))
        return torch.stack(found)

    def moments(self, a: Tensor, b: float, t: float, nodes: int = _NODES) -> Tensor:
        """E[s(u) s(v)] and E[s'(u) s'(v)] for all variances a of u, one of v and one angle, [2, len(a)]."""
        rho, tau, root_a, root_b = math.cos(t), math.sin(t), a.sqrt(), math.sqrt(b)
        edges = [_edges(float(root_a.max()), self.kinks, root_a.tolist())]
        if abs(rho) > 1e-3:  # where the conditional mean of v crosses a kink, on its own scale
            around = torch.tensor([-9.0, -6, -4, -2.5, -1.2, 0, 1.2, 2.5, 4, 6, 9], dtype=torch.float64)
            edges += [((k / root_b + around * tau) / rho).clamp(-_REACH, _REACH) for k in self.kinks]
        x, of_x = _panels(torch.unique(torch.cat(edges)), nodes)
        mean, spread = root_b * rho * x[:, None], root_b * tau
        places = torch.cat([_places(_REACH * root_b), torch.tensor(self.kinks, dtype=torch.float64)])
        own = torch.linspace(-_REACH, _REACH, 13, dtype=torch.float64).expand(len(x), 13)
        inner_edges = torch.cat([own, ((places - mean) / spread).clamp(-_REACH, _REACH)], 1).sort(1)[0]
        rows, columns = (inner_edges.diff(dim=1) > 0).nonzero(as_tuple=True)  # panels that have a width
        ends = torch.stack([inner_edges[rows, columns], inner_edges[rows, columns + 1]], 1)
        y, of_y = _panels(ends, nodes)
        both = values_and_slopes(self.function, mean[rows] + spread * y)
        inner = [torch.zeros_like(x).index_add_(0, rows, (f * of_y).sum(1)) for f in both]
        outer = values_and_slopes(self.function, root_a[:, None] * x)
        return torch.stack([(f * of_x) @ g for f, g in zip(outer, inner, strict=True)])

    def of_corner(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        """The moments of the piecewise polynomial, [2, ...]."""
        a, b, t = (s.contiguous() for s in torch.broadcast_tensors(a, b, t))
        K, T = (a * b).sqrt() * t.cos(), torch.ones_like(a)
        self.corner.apply(K, T, self.corner.state(a), self.corner.state(b))
        return torch.stack([K, T])

    def family_values(self, function: Function, a: Tensor, squares: Tensor, places: Tensor) -> Tensor:
        """Correlations less those of the piecewise polynomial at all variances a, [2, angles, a, a]."""
        angles, found = math.pi * (1 + places) / 2, []
        for t in angles.tolist():
            of_t = torch.stack([self.moments(a, b, t) for b in a.tolist()], 2)
            found.append((of_t + of_t.mT) / 2 - self.of_corner(a[:, None], a, torch.tensor(t, dtype=torch.float64)))
        scale = squares.sqrt().T
        return torch.stack(found, 1) / (scale[:, :, None] * scale[:, None])[:, None]


def kinked(function: Function) -> Kinked | None:
    """The kinks of a function between pieces of any kind, if it has some elsewhere than at 0, and not many."""
    try:
        with np.errstate(all="ignore"):
            kinks = _kinks(function)
            if not any(kinks) or len(kinks) > _MOST:
                return None
            corner = Piecewise(function, _with_jumps(function, kinks))
    except RuntimeError:  # no derivatives of higher order
        return None
    return Kinked(function, kinks, corner)


def _kinks(function: Function) -> list[float]:
    """Places where s or one of its first derivatives jumps: cells without a good fit, divided until they are tiny."""
    x = -np.cos((np.arange(16) + 0.5) * math.pi / 16)
    far = np.geomspace(12, 400, 40)
    ends = np.concatenate([-far[::-1], np.linspace(-12, 12, 193)[1:-1], far]) + 0.00123
    low, high = ends[:-1], ends[1:]
    size = 0.0
    for divided in range(9):
        at = torch.from_numpy((low + high)[:, None] / 2 + (high - low)[:, None] / 2 * x)
        with torch.no_grad():
            values = function(at.flatten()).double().numpy().reshape(at.shape)
        size = size or float(np.abs(values[np.abs(low) < 12]).max())
        tail = np.abs(np.polynomial.chebyshev.chebfit(x, values.T, 15)[-3:]).max(0)
        bad = ~(tail <= 1e-11 * np.abs(values).max(1) + 1e-14 * size)
        if bad.sum() > 16 * _MOST or (not bad.any() and divided < 3):  # many kinks, or a good fit in small cells
            return []
        if not bad.any():  # the jump of a higher derivative is too small to see from here on
            break
        cuts = np.linspace(low[bad], high[bad], 7)
        low, high = cuts[:-1].ravel(), cuts[1:].ravel()
    found: list[float] = []
    for cell in zip(low, high, strict=True):
        place = _jump_in(function, *cell)
        if place is not None and all(abs(place - other) > 1e-9 * (1 + abs(place)) for other in found):
            found.append(place)
    return sorted(found)


def _jump_in(function: Function, low: float, high: float) -> float | None:
    """Where in a small cell the lowest derivative jumps, to the last digit."""
    for order in range(_DEGREE + 1):
        first, last = (float(d) for d in derivatives(function, _at(low, high), order)[order])
        below, above = low, high
        while abs(first - last) > 1e-9 * abs(first) and below < (middle := (below + above) / 2) < above:
            value = float(derivatives(function, _at(middle), order)[order])
            below, above = (middle, above) if abs(value - first) < abs(value - last) else (below, middle)
        found = _beside(function, below)
        step, size = abs(float(found[order].diff())), float(found[order].abs().sum())
        change = 1e-10 * (1 + abs(below)) * float(found[order + 1].abs().sum())  # of a smooth function, over this step
        if step > 1e-6 * size + 100 * change:
            return 0.0 if abs(below) < 1e-12 else float(below)
    return None


def _beside(function: Function, place: float) -> list[Tensor]:
    """The function and its derivatives on both sides of a place."""
    apart = 1e-10 * (1 + abs(place))
    return derivatives(function, _at(place - apart, place + apart), _DEGREE + 1)


def _at(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float64)


def _with_jumps(function: Function, kinks: list[float]) -> Pieces:
    """A piecewise polynomial that is 0 around 0 and jumps as the function and its derivatives do."""
    center = sum(k < 0 for k in kinks)
    steps = []
    for k in kinks:
        found = _beside(function, k)[: _DEGREE + 1]
        sizes = [float(d.abs().max()) for d in found]
        jumps = [float(d[1] - d[0]) for d in found]
        terms = [j / math.factorial(n) if abs(j) > 1e-8 * max(sizes) else 0.0 for n, j in enumerate(jumps)]
        steps.append(sum((w * Polynomial([-k, 1]) ** n for n, w in enumerate(terms)), Polynomial([0.0])))
    polynomials = [Polynomial([0.0] * (_DEGREE + 1))]
    for step in steps[center:]:
        polynomials.append(polynomials[-1] + step)
    for step in reversed(steps[:center]):
        polynomials.insert(0, polynomials[0] - step)
    return Pieces(kinks, [np.pad(p.coef, (0, _DEGREE + 1 - len(p.coef))) for p in polynomials])


def _places(reach: float) -> Tensor:
    """Edges of panels for values of this size: 2 apart around 0, further out a third of their place."""
    outer = [2.0, 4.0, 6.0]
    while outer[-1] < reach:
        outer.append(1.35 * outer[-1])
    half = torch.tensor(outer, dtype=torch.float64)
    return torch.cat([-half.flip(0), torch.zeros(1, dtype=torch.float64), half]).clamp(-reach, reach)


def _edges(largest: float, kinks: list[float], roots: list[float]) -> Tensor:
    """Edges of panels for s(root x), for all these roots of variances at once."""
    own = torch.linspace(-_REACH, _REACH, 13, dtype=torch.float64)
    of_kinks = torch.tensor([k / root for k in kinks for root in roots], dtype=torch.float64)
    return torch.unique(torch.cat([own, _places(_REACH * largest) / largest, of_kinks]).clamp(-_REACH, _REACH))


def _panels(edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Nodes between neighbors of the last axis, and weights with the normal density."""
    nodes, weights = legendre(count)
    middle, half = (edges[..., :-1, None] + edges[..., 1:, None]) / 2, edges.diff(dim=-1)[..., None] / 2
    x = middle + half * nodes
    return x.flatten(-2), (half * weights * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)).flatten(-2)
