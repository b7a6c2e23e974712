"""Polynomials as activations, monomials and Hermite polynomials among them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.infinite.activations import Activation
from ntkit.kernels.infinite.exponentials import multiple, sum_text

MOST = 12  # degree of a polynomial that is recognized


class PolynomialActivation(Activation):
    """s(z) = sum of c_n z^n: E[s(u) s(v)] = sum over m of E[s^(m)(u)] E[s^(m)(v)] c^m / m!, s^(m) the m-th derivative.

    This is the expansion in Hermite polynomials (Mehler 1866) without roots of variances: s^(m) has the Hermite
    coefficient of degree m, and E[u^(2 k)] = (2 k - 1)!! a^k. For E[s' s'] it begins with s'.
    """

    def __init__(self, coefficients: list[float]) -> None:
        self._derivatives = [coefficients]  # of order 0, 1, ...
        while len(self._derivatives[-1]) > 1:
            self._derivatives.append(np.polynomial.polynomial.polyder(self._derivatives[-1]).tolist())
        powers = ["", "z", *(f"z^{n}" for n in range(2, len(coefficients)))]
        terms = [multiple(c, power) for c, power in zip(coefficients, powers, strict=False) if c]
        self.name = f"polynomial {sum_text(terms)}"

    def __call__(self, z: Tensor) -> Tensor:
        """s(z)."""
        out = torch.zeros_like(z)
        for c in reversed(self._derivatives[0]):
            out = out * z + c
        return out

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        return self.means(v)

    def means(self, v: Tensor) -> tuple[Tensor, ...]:
        """Mean of each derivative at variance v."""
        means = []
        for coefficients in self._derivatives:
            mean = torch.zeros_like(v)
            for k in reversed(range((len(coefficients) + 1) // 2)):
                mean = mean * v + coefficients[2 * k] * math.prod(range(1, 2 * k, 2))
            means.append(mean)
        return tuple(means)

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        if T is not None:
            T.mul_(_series(K, one[1:], two[1:]))
        K.copy_(_series(K, one, two))
        return 1.0

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        K, T, side = v.clone(), torch.ones_like(v), self.state(v)
        self.apply(K, T, side, side)
        return K, T


def _series(c: Tensor, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> Tensor:
    """Sum of one_m two_m c^m / m!."""
    total = torch.zeros_like(c)
    for m in reversed(range(len(one))):
        total.mul_(c).div_(m + 1).addcmul_(one[m], two[m])
    return total
