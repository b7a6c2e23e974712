"""E[s(u) s(v)] and E[s'(u) s'(v)] as functions that autograd differentiates, also where u and v coincide.

(u, v) have variances a, b and covariance c. By Price's theorem the derivative by c is E[s'(u) s'(v)], and that by a is
E[s''(u) s(v)] / 2. Where s has a kink, E[s'(u) s'(v)] falls with the angle between the samples: it has a tip where they
coincide (rho = 1), and so it has at opposite samples. There the derivative is that of the smooth part: the mean of the
one-sided derivatives in a direction and its opposite, as autograd's derivative of |x| at 0 is 0. Where a variance is 0,
E[s(u) s(v)] is a cone, and its smooth part is taken likewise; E[s'(u) s'(v)] jumps there, to autograd's slope at 0.
Derivatives of higher order are refused there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.activations import Activation, Erf, Gelu, Rectifier
from ntkit.kernels.infinite.affine_changes import AffineChange
from ntkit.kernels.infinite.exponentials import Exponentials
from ntkit.kernels.infinite.polynomials import PolynomialActivation

_EPS = torch.finfo(torch.float64).eps
_COINCIDE = 256 * _EPS  # 1 - rho^2 up to here is rounding, and so would be the direction in which the angle grows


def moments(activation: Activation, a: Tensor, b: Tensor, c: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """E[s(u) s(v)] and E[s'(u) s'(v)], in the shape of the covariances c.

    same : where u and v are the same variable, whatever rounding made of a, b and c.
    """
    same = torch.zeros_like(c, dtype=torch.bool) if same is None else same.expand_as(c)
    return _MOMENTS[type(activation)](activation, a.expand_as(c), b.expand_as(c), c, same)


def moments_of_one(activation: Activation, v: Tensor) -> tuple[Tensor, Tensor]:
    """E[s(u)^2] and E[s'(u)^2] as functions of the variance: without the tip of two samples that coincide."""
    if isinstance(activation, Rectifier):
        total = activation.odd + activation.even
        slope = torch.full_like(v, total)
        return v * total, slope.masked_fill(v == 0, activation.at_zero**2) if activation.even else slope
    return moments(activation, v, v, v, torch.ones_like(v, dtype=torch.bool))


def has_derivatives(activation: Activation) -> bool:
    """Whether `moments` knows the activation."""
    return type(activation) in _MOMENTS


# ---------------------------------------------------------------------- kinks at 0


def _rectifier(s: Rectifier, a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    if s.even == 0:  # linear
        return s.odd * c, torch.full_like(c, s.odd)
    factor = s.even * 2 / math.pi
    K = _Rectified.apply(a, b, c, same, factor, s.odd / factor)
    slope = factor * (_Angle.apply(a, b, c, same) + s.odd / factor)
    if s.at_zero != s.mean:
        slope = slope + (s.mean_slope(a == 0, a) * s.mean_slope(b == 0, b) - s.odd)
    return K, slope


def _root_and_angle(a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a b - c^2) and asin rho, with the rounding of `Rectifier`."""
    shrunk = 1 - 8 * _EPS
    root = ((a * shrunk) * (b * shrunk) - c * c).masked_fill_(same, 0).clamp_(min=0).sqrt_()
    return root, torch.atan2(c, root)


def _tip(a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> Tensor:
    """Where the angle has no derivative."""
    return same | (a * b - c * c <= _COINCIDE * a * b)


class _Angle(torch.autograd.Function):
    """asin rho: derivatives 1 / root by c, -c / (2 a root) by a, with root = sqrt(a b - c^2)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c, same)
        return _root_and_angle(a, b, c, same)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, c, same = ctx.saved_tensors
        tip = _tip(a, b, c, same)
        # in both branches of `where` all is finite: 0 times infinity would be NaN
        by_c = grads[0] * torch.where(tip, 1.0, a * b - c * c).rsqrt()
        parts = [by_c * c / torch.where(tip, -2.0, -2 * v) for v in (a, b)]
        found = [torch.where(tip, 0.0, t) for t in (*parts, by_c)]
        return *_smooth(found, tip, grads[0]), None


class _Rectified(torch.autograd.Function):
    """factor (c A + root) with A = asin rho + constant: derivatives factor A by c, factor root / (2 a) by a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, same: Tensor, factor: float, constant: float) -> Tensor:
        ctx.save_for_backward(a, b, c, same)
        ctx.factor, ctx.constant = factor, constant
        root, angle = _root_and_angle(a, b, c, same)
        return factor * (c * (angle + constant) + root)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, c, same = ctx.saved_tensors
        tip, scaled = _tip(a, b, c, same), ctx.factor * grads[0]
        root = torch.where(tip, 0.0, torch.where(tip, 1.0, a * b - c * c).sqrt())
        parts = [scaled * root / torch.where(tip, 2.0, 2 * v) for v in (a, b)]
        by_c = scaled * (_Angle.apply(a, b, c, same) + ctx.constant)
        return *_smooth([*parts, by_c], (a == 0) | (b == 0), grads[0]), None, None, None


def _smooth(found: list[Tensor], tip: Tensor, grad: Tensor) -> list[Tensor]:
    """The derivatives, whose own derivatives are refused at tips that count."""
    if not torch.is_grad_enabled():
        return found
    tip = tip & (grad != 0)
    return [_Smooth.apply(t, tip) for t in found]


class _Smooth(torch.autograd.Function):
    """The identity, whose own derivative is refused at some entries."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, tip: Tensor) -> Tensor:
        ctx.save_for_backward(tip)
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (tip,) = ctx.saved_tensors
        if bool(grads[0].masked_fill(~tip, 0).any()):
            raise refusal(
                "the infinite kernel",
                got="a higher derivative where two samples coincide or are opposite, or a value is 0, of an activation "
                "with a kink",
                expected="one that exists",
                fix="Use a smooth activation (erf, GELU, sin), or leave these pairs of samples out of the sum.",
            )
        return grads[0], None


# ---------------------------------------------------------------------- smooth functions: autograd's own derivatives


def _gap(a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> Tensor:
    """The difference a b - c^2, with the value 0 where u = v, and the derivatives that it has there."""
    gap = a * b - c * c
    rounding = same | (gap <= 16 * _EPS * a * b)
    return gap - torch.where(rounding, gap.detach(), 0.0)


def _erf(_: Erf, a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """(2 / pi) asin(2 c / sqrt P) and (4 / pi) / sqrt(P - 4 c^2), P = (1 + 2 a)(1 + 2 b)."""
    root = (1 + 2 * (a + b) + 4 * _gap(a, b, c, same)).rsqrt()
    return torch.atan(2 * c * root) * (2 / math.pi), (4 / math.pi) * root


def _gelu(_: Gelu, a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """As in `Gelu`."""
    P = (1 + a) * (1 + b)
    D = (1 + a + b + _gap(a, b, c, same)).sqrt()
    ratio = c / D
    t = torch.atan(ratio)
    K = c / 4 + (c * t + (a * b * D + c * ratio) / P) / (2 * math.pi)
    return K, 0.25 + (t + ratio * (3 + a + b + ratio * ratio) / P) / (2 * math.pi)


def _affine_change(s: AffineChange, a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """As in `AffineChange`."""
    square = s.numbers[1] ** 2
    value, slope = moments(s.base, square * a, square * b, square * c, same)
    return s.changed(c, value, slope, s.base.means(square * a), s.base.means(square * b))


def _exponentials(s: Exponentials, a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """As in `Exponentials`."""
    return s.moments(c, _gap(a, b, c, same), s.state(a), s.state(b), True)


def _polynomial(s: PolynomialActivation, a: Tensor, b: Tensor, c: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """As in `PolynomialActivation`."""
    means = [s.means(v) for v in (a, b)]
    K, T = torch.zeros_like(c), torch.zeros_like(c)
    for m, (one, two) in enumerate(zip(*means, strict=True)):
        K = K + one * two * c**m / math.factorial(m)
        if m:
            T = T + one * two * c ** (m - 1) / math.factorial(m - 1)
    return K, T


_MOMENTS: dict[type[Activation], Callable[[Any, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    Rectifier: _rectifier,
    Erf: _erf,
    Gelu: _gelu,
    AffineChange: _affine_change,
    Exponentials: _exponentials,
    PolynomialActivation: _polynomial,
}
