"""Sums of exponentials exp(b z - q z^2) with complex b: exp, sin, cos, sinh, bells, Gabor functions, snake.

s(z) = r z + t + sum of exp(l + b z - q z^2), complex terms in conjugate pairs. For two terms i, j and (u, v) of
variances a, b and covariance c, with P_i = 1 + 2 q_i a, P_j = 1 + 2 q_j b and D = P_i P_j - 4 q_i q_j c^2, the Gaussian
integral is E_i E_j exp(L) with the means E_i, E_j of the terms and

    L = -log(D / P_i P_j) / 2 + (b_i b_j c - (q_j b_i^2 / P_i + q_i b_j^2 / P_j) c^2) / D,

which is 0 at c = 0. So E[s s] is the product of the means plus a sum of E_i E_j (exp(L) - 1): the terms of an odd
function do not cancel where it is small. By Price's theorem E[s' s'] is the derivative by c.
"""

from __future__ import annotations

import cmath
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ntkit.kernels.infinite.activations import Activation, gap


class Term(NamedTuple):
    """The real part of exp(log_weight + slope z - decay z^2)."""

    log_weight: complex
    slope: complex
    decay: float

    def text(self) -> str:
        """As in `describe`."""
        weight, slope, decay = self
        size, wave = abs(cmath.exp(weight)), ""
        if slope.imag == 0:
            size = math.copysign(size, math.cos(weight.imag))
        else:
            turn = weight.imag
            is_sine = math.isclose(turn, -math.pi / 2)
            shift = "" if is_sine or abs(turn) < 1e-12 else f" {'+' if turn > 0 else '-'} {abs(turn):.4g}"
            wave = f"{'sin' if is_sine else 'cos'}({multiple(slope.imag, 'z')}{shift})"
        power = [multiple(slope.real, "z")] * (slope.real != 0) + [multiple(-decay, "z^2")] * (decay != 0)
        exponential = f"exp({' '.join(power)})" if power else ""
        return multiple(size, " ".join(part for part in (exponential, wave) if part))


def multiple(number: float, what: str) -> str:
    """Text such as "2 z", "-z" or "3".

    >>> multiple(2, "z"), multiple(-1, "z"), multiple(3, "")
    ('2 z', '-z', '3')
    """
    if not what:
        return f"{number:g}"
    text = f"{number:g}"
    return what if text == "1" else f"-{what}" if text == "-1" else f"{text} {what}"


def sum_text(parts: list[str]) -> str:
    """Text of a sum.

    >>> sum_text(["2 z", "-3"])
    '2 z - 3'
    """
    return " + ".join(parts).replace("+ -", "- ")


class Exponentials(Activation):
    """s(z) = r z + t + a sum of terms; `at_zero` are s(0) and s'(0)."""

    def __init__(self, terms: list[Term], r: float, t: float, at_zero: tuple[float, float]) -> None:
        self.r, self.t, self._at_zero = r, t, at_zero
        linear = [multiple(r, "z")] * (r != 0) + [f"{t:g}"] * (t != 0)
        self.name = sum_text([term.text() for term in terms] + linear)
        self.terms: list[Term] = []  # of a conjugate pair both
        self.firsts: list[tuple[int, int]] = []  # without the second ones of pairs; how many terms each stands for
        for weight, b, q in terms:
            self.firsts.append((len(self.terms), 1 if b.imag == 0 else 2))
            if b.imag == 0:
                self.terms.append(Term(weight, b, q))
            else:
                half = weight - math.log(2)
                self.terms += [Term(half, b, q), Term(half.conjugate(), b.conjugate(), q)]

    def __call__(self, z: Tensor) -> Tensor:
        """s(z)."""
        out = self.r * z + self.t
        for weight, b, q in self.terms:
            part = torch.exp(weight.real + _number(b) * z - q * z.square())
            out = out + _real(part, weight)
        return out

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        value, slope = torch.full_like(v, self._at_zero[0]), torch.full_like(v, self._at_zero[1])
        logs = []
        for weight, b, q in self.terms:
            p = 1 + 2 * q * v
            log = -0.5 * p.log() + _number(b * b) * v / (2 * p)
            value += _real(_grown(weight, log), weight)
            slope += _real(_grown(weight, log - p.log()), weight, b)
            logs.append(log)
        if any(log.is_complex() for log in logs):
            logs = [torch.complex(log.real, log.imag if log.is_complex() else torch.zeros_like(v)) for log in logs]
        return v, value, slope, torch.stack(logs)

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        value, slope = self.moments(K, gap(one[0], two[0], K), one, two, T is not None)
        K.copy_(value)
        if T is not None:
            T.mul_(slope)
        return 1.0

    def moments(
        self, c: Tensor, gap: Tensor, one: tuple[Tensor, ...], two: tuple[Tensor, ...], slopes: bool
    ) -> tuple[Tensor, Tensor]:
        """E[s(u) s(v)] and, if wanted, E[s'(u) s'(v)], with the gap a b - c^2."""
        value, slope = one[1] * two[1], one[2] * two[2]
        value = value.addcmul(c, one[2] + two[2] - self.r, value=self.r)
        for i, count in self.firsts:
            for j in range(len(self.terms)):
                sides = (one[0], one[3][i]), (two[0], two[3][j])
                of_values, of_slopes = _beyond_means(self.terms[i], self.terms[j], c, gap, *sides, slopes)
                value, slope = value.add_(of_values, alpha=count), slope.add_(of_slopes, alpha=count)
        return value, slope

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        K, T, side = v.clone(), torch.ones_like(v), self.state(v)
        self.apply(K, T, side, side)
        return K, T


def _beyond_means(
    first: Term,
    second: Term,
    c: Tensor,
    gap: Tensor,
    one: tuple[Tensor, Tensor],
    two: tuple[Tensor, Tensor],
    slopes: bool,
) -> tuple[Tensor, Tensor]:
    """What two terms add to E[s s] and to E[s' s'] beyond the products of their means; (variance, log mean) of each."""
    (weight1, b1, q1), (weight2, b2, q2) = first, second
    product, weight, log = _number(b1 * b2), weight1 + weight2, one[1] + two[1]
    if q1 == q2 == 0:
        value = _grown(weight, product * c, log)
        return _real(value, weight), _real(value, weight, product)
    p1, p2, q = 1 + 2 * q1 * one[0], 1 + 2 * q2 * two[0], 4 * q1 * q2
    D = 1 + 2 * q1 * one[0] + 2 * q2 * two[0] + q * gap
    x = q * c * c / (p1 * p2)
    B = _number(b1 * b1) * q2 / p1 + _number(b2 * b2) * q1 / p2
    N = c * (product - B * c)
    L = N / D - 0.5 * torch.where(x < 0.5, torch.log1p(-x.clamp(max=0.5)), (D / (p1 * p2)).log())
    value = _grown(weight, L, log)
    if not slopes:
        return _real(value, weight), torch.zeros_like(c)
    increase = (product * x + c * (q - 2 * B) + N * (2 * q * c) / D) / D  # of L', from its value at c = 0
    slope = value * (product / (p1 * p2) + increase) + torch.exp(log + weight.real) * increase
    return _real(value, weight), _real(slope, weight)


def _number(z: complex) -> Any:
    """A real number where it is one, so that tensors stay real."""
    return z.real if z.imag == 0 else z


def _real(part: Tensor, log_weight: complex, factor: complex = 1) -> Tensor:
    """The real part, with the phase of exp(log_weight) and a factor."""
    phase = cmath.exp(1j * log_weight.imag)
    factor = factor * complex(*(x if abs(x) > 1e-15 else 0.0 for x in (phase.real, phase.imag)))  # quarter turns
    return (part * factor).real if part.is_complex() else part * factor.real


def _grown(log_weight: complex, L: Tensor, log: Tensor | float = 0.0) -> Tensor:
    """|exp(log_weight)| exp(log) (exp(L) - 1), without overflow of one factor where the other is tiny."""
    log = log + log_weight.real
    start = torch.exp(log) if isinstance(log, Tensor) else math.exp(log)
    if L.is_complex():  # exp(x + i y) - 1 = (exp(x) - 1) cos y - 2 sin^2(y / 2) + i exp(x) sin y
        x, y = L.real.clamp(max=1), L.imag
        near = torch.complex(torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())
    else:
        near = torch.expm1(L.clamp(max=1))
    return torch.where(L.real < 1, start * near, torch.exp(L + log) - start)
