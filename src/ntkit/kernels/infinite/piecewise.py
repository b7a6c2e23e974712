"""Piecewise polynomial activations with kinks anywhere: ReLU6, hardtanh, hardswish, softshrink, threshold, sign, steps.

s(z) = P(z) + sum of w (e z - |k|)_+^d over kinks k and degrees d, with the polynomial P around 0 and e the sign of k:
the terms begin away from 0, so that little cancels. E[s(u) s(v)] is a sum over pairs of terms, which are truncated
moments of two Gaussians, and P meets P and the terms by its few Hermite coefficients.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.activations import Activation, Function, values_and_slopes
from ntkit.kernels.infinite.kinks import Pieces, jumps_at, pieces
from ntkit.kernels.infinite.truncated_moments import Orthant, one_sided

_AT_ZERO = 1e-150  # a kink at 0 lies here: ratios of thresholds are then defined
_BEYOND = 1e3  # standard deviations: nothing lies beyond
_SMALLEST = 1e-200  # variance in place of 0
_NO_DIGIT = 0.1  # relative error of E[s(u)^2] above which it is refused
_EPS = torch.finfo(torch.float64).eps

Terms = dict[tuple[int, int], float]  # weight of (e z - |k|)_+^d, by the number of the kink and d


class Piecewise(Activation):
    """A function that is a polynomial between its kinks.

    `error` bounds the rounding error of E[s(u)^2] and E[s'(u)^2] at the variances so far, relative to them: where s is
    bounded and the variances are large, or s is zero up to its kinks and they are small, terms cancel.
    """

    def __init__(self, function: Function, found: Pieces) -> None:
        self.name = f"piecewise polynomial, kinks at {', '.join(f'{k:g}' for k in found.kinks)}"
        self.error = 0.0
        polynomial = found.polynomials[sum(k < 0 for k in found.kinks)]
        self._signs = [-1 if k < 0 else 1 for k in found.kinks]
        self._places = [abs(k) or _AT_ZERO for k in found.kinks]
        terms, slopes = _terms(found), {}
        for (i, d), weight in terms.items():
            if d:
                slopes[i, d - 1] = d * weight * self._signs[i]
        # of the value and of the slope
        self._polynomials = polynomial, np.polynomial.polynomial.polyder(polynomial)
        self._terms: tuple[Terms, Terms] = terms, slopes
        # The function's value and autograd's slope at a kink at 0 count where values are 0 in every network.
        self._at_zero = [float(t) for t in values_and_slopes(function, torch.zeros(1, dtype=torch.float64))]

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        deviation = v.clamp(min=_SMALLEST).sqrt()
        black = v == 0
        h = torch.stack([torch.where(black, _BEYOND, place / deviation) for place in self._places])
        hermite = [self._hermite(which, h, deviation) for which in (0, 1)]
        for (inner, _), at_zero in zip(hermite, self._at_zero, strict=True):
            inner[0].masked_fill_(black, at_zero)
        return deviation, h, *hermite[0], *hermite[1]

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        r = K / (one[0] * two[0])
        # as in `Rectifier`: a correlation of 1 that rounding has reduced is 1 again
        s = ((1 - 16 * _EPS) - r * r).clamp_(min=0).sqrt_().clamp_(min=1e-100)
        orthants: dict[tuple[float, float, int], Orthant] = {}
        if T is not None:
            T.mul_(self._moments(1, r, s, one, two, orthants))
        K.copy_(self._moments(0, r, s, one, two, orthants))
        return 1.0

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        K, T, side = v.clone(), torch.ones_like(v), self.state(v)
        self.apply(K, T, side, side)
        self._bound(0, K, side)
        self._bound(1, T, side)
        return K, T

    def _moments(
        self, which: int, r: Tensor, s: Tensor, one: tuple[Tensor, ...], two: tuple[Tensor, ...], orthants: dict
    ) -> Tensor:
        """E[s(u) s(v)], or E[s'(u) s'(v)] for which = 1."""
        (inner1, outer1), (inner2, outer2) = (side[2 + 2 * which : 4 + 2 * which] for side in (one, two))
        total = torch.zeros_like(r)
        for m in reversed(range(len(inner1))):
            part = inner1[m] * (inner2[m] + outer2[m]) + outer1[m] * inner2[m]
            total = total.mul_(r / (m + 1)).add_(part)  # of degree m: r^m / m!
        for (i, d), w1 in self._terms[which].items():
            for (j, e), w2 in self._terms[which].items():
                sign = self._signs[i] * self._signs[j]
                key = self._places[i], self._places[j], sign
                if key not in orthants:
                    orthants[key] = Orthant(one[1][i], two[1][j], sign * r, s)
                scale = (w1 * w2) * one[0] ** d * two[0] ** e
                total.addcmul_(scale, orthants[key].moment(d, e))
        return total

    def _hermite(self, which: int, h: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """E[f(u) He_m(u / deviation)] for f the polynomial and for f the terms, [degrees, ...]."""
        inner, outer = [], []
        for m in range(len(self._polynomials[0])):
            own, others = torch.zeros_like(deviation), torch.zeros_like(deviation)
            for n, coefficient in enumerate(self._polynomials[which].tolist()):
                if n >= m and (n - m) % 2 == 0:
                    k = (n - m) // 2
                    own += deviation**n * (coefficient * math.factorial(n) / (2**k * math.factorial(k)))
            for (i, d), weight in self._terms[which].items():
                others += one_sided(h[i], d, m) * deviation**d * (weight * self._signs[i] ** m)
            inner.append(own)
            outer.append(others)
        return torch.stack(inner), torch.stack(outer)

    def _bound(self, which: int, values: Tensor, side: tuple[Tensor, ...]) -> None:
        """Raise the error to that of E[s(u)^2] or E[s'(u)^2]: machine precision times the share that cancels."""
        deviation, h, inner = *side[:2], side[2 + 2 * which]
        squares = [inner[m].square() / math.factorial(m) for m in range(len(inner))]
        parts = torch.stack(squares).sum(0).sqrt()
        for (i, d), weight in self._terms[which].items():
            # Beyond a far threshold the moment is smaller than the terms that add up to it, and rounding of the
            # threshold changes all of them by h^2 times as much.
            far = h[i].clamp(max=_BEYOND)
            size = one_sided(h[i], 0, 0) * (1 + far) ** (2 * d) * (1 + far.square() / 16)
            parts = parts + size.sqrt() * deviation**d * abs(weight)
        cancels = torch.where(values.abs() > 1e-250, parts.square() / values.abs(), 0.0)
        error = 16 * _EPS * float(cancels.max())
        if which == 0 and error > _NO_DIGIT:
            got = f"standard deviations up to {float(deviation.max()):.2g}, at which its kinks are lost in rounding"
            fix = "Scale the samples, e.g. to zero mean and unit variance."
            raise refusal(self.name, got=got, expected="values near its kinks", fix=fix)
        self.error = max(self.error, error)


def _terms(found: Pieces) -> Terms:
    """Weights of the terms, from the jumps of the derivatives at the kinks."""
    terms: Terms = {}
    for i, (place, one, two) in enumerate(zip(found.kinks, found.polynomials, found.polynomials[1:], strict=False)):
        scale = max(np.abs(one).max(), np.abs(two).max())
        for d, jump in enumerate(jumps_at(place, one, two)):
            if abs(jump) > 1e-12 * scale:
                away = jump if place >= 0 else -jump * (-1) ** d
                terms[i, d] = float(away) / math.factorial(d)
    return terms


def piecewise(function: Function) -> Piecewise | None:
    """The activation of a function that is a polynomial between kinks; else None."""
    found = pieces(function)
    return None if found is None else Piecewise(function, found)
