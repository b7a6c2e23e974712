"""Moments of a pair of unit normal variables beyond two thresholds, in closed form up to Owen's T function."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_NODES = 16  # of the integral in Owen's T function: its error is below 1e-20
_PLACES, _WEIGHTS = (half[_NODES:] for half in np.polynomial.legendre.leggauss(2 * _NODES))


def density(x: Tensor) -> Tensor:
    """Of the standard normal distribution."""
    return (x * x).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))


def tail(x: Tensor) -> Tensor:
    """P(X > x) of a standard normal X."""
    return torch.special.erfc(x * math.sqrt(0.5)).mul_(0.5)


def one_sided(h: Tensor, power: int, order: int) -> Tensor:
    """E[(X - h)_+^power He_order(X)] of a standard normal X."""
    if order > power:  # each Hermite degree takes one derivative
        hermite = np.polynomial.hermite_e.herme2poly([0] * (order - power - 1) + [1])
        total = torch.zeros_like(h)
        for coefficient in hermite[::-1]:
            total = total * h + float(coefficient)
        return total * density(h) * math.factorial(power)
    moments = [density(h), tail(h)]
    for n in range(1, power - order + 1):
        moments.append(max(n - 1, 1) * moments[-2] - h * moments[-1])
    return moments[-1] * (math.factorial(power) / math.factorial(power - order))


class Orthant:
    """E[(X - h)_+^m (Y - k)_+^n] of unit normal X, Y with correlation r, for thresholds h, k > 0.

    E[X g(X, Y)] = E[dg/dX] + r E[dg/dY] leads to lower powers, down to P(X > h, Y > k) and to the moments of one
    variable at the other's threshold. `s` is sqrt(1 - r^2), given because it is known to more digits than r.
    """

    def __init__(self, h: Tensor, k: Tensor, r: Tensor, s: Tensor) -> None:
        self.h, self.k, self.r, self.s = h, k, r, s
        less = torch.where(r > 0, s * s / (1 + r.abs()), 1 - r)  # 1 - r
        apart = k - h
        self._above_k = apart + h * less  # distance of k from the mean of Y at X = h
        self._above_h = k * less - apart
        self._moments: dict[tuple[int, int], Tensor] = {}
        self._beyond: dict[tuple[bool, int], Tensor] = {}

    def moment(self, m: int, n: int) -> Tensor:
        """E[(X - h)_+^m (Y - k)_+^n]."""
        if (m, n) not in self._moments:
            self._moments[m, n] = self._moment(m, n)
        return self._moments[m, n]

    def _moment(self, m: int, n: int) -> Tensor:
        if m == n == 0:
            both = (tail(self.h) + tail(self.k)) / 2
            return (both - self._owen(self.h, self._above_k) - self._owen(self.k, self._above_h)).clamp_(min=0)
        if m == 0:
            lower = (n - 1) * self.moment(0, n - 2) if n > 1 else density(self.k) * self._at(True, 0)
            return lower + self.r * density(self.h) * self._at(False, n - 1) - self.k * self.moment(0, n - 1)
        lower = (m - 1) * self.moment(m - 2, n) if m > 1 else density(self.h) * self._at(False, n)
        other = n * self.moment(m - 1, n - 1) if n else density(self.k) * self._at(True, m - 1)
        return lower + self.r * other - self.h * self.moment(m - 1, n)

    def _at(self, of_x: bool, n: int) -> Tensor:
        """E[(X - h)_+^n] at Y = k, or E[(Y - k)_+^n] at X = h."""
        if (of_x, n) not in self._beyond:
            distance = self._above_h if of_x else self._above_k
            if n == 0:
                moment = tail(distance / self.s)
            else:
                first = self.s * density(distance / self.s) if n == 1 else (n - 1) * self.s**2 * self._at(of_x, n - 2)
                moment = first - distance * self._at(of_x, n - 1)
            self._beyond[of_x, n] = moment
        return self._beyond[of_x, n]

    def _owen(self, h: Tensor, distance: Tensor) -> Tensor:
        """Owen's T(h, a) at a = distance / (h s) (Owen 1956, Tables for computing bivariate normal probabilities).

        T(h, a) is the integral of exp(-h^2 (1 + x^2) / 2) / (1 + x^2) / (2 pi) from 0 to a. For |a| > 1 that from 0 to
        1 / |a| takes its place.
        """
        q = distance / self.s
        size = q.abs()
        h, size = torch.broadcast_tensors(h, size)
        larger = torch.maximum(h, size)
        ratio = torch.minimum(h, size) / larger
        exponent, square = larger.square().mul_(-0.5), ratio.square()
        total, part = torch.zeros_like(ratio), torch.empty_like(ratio)
        for place, weight in zip(_PLACES.tolist(), _WEIGHTS.tolist(), strict=True):
            factor = 1 + square * place**2
            torch.mul(exponent, factor, out=part)
            total.addcdiv_(part.exp_(), factor, value=weight / (2 * math.pi))
        total *= ratio
        one, two = tail(h), tail(size)
        return torch.where(size <= h, total, (one + two) / 2 - one * two - total) * q.sign()
