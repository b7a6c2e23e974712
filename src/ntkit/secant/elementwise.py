"""Rules of elementwise functions: the slope of the chord between the ends, the derivative where they coincide.

Slopes are computed by arithmetic: on a CPU comparisons and ``torch.where`` cost ten to thirty times an addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntkit.secant.secant_tensor import (
    SecantTensor,
    at_both_ends,
    aten,
    discrete,
    from_slopes,
    is_float,
    jump,
    no_rule,
    rule,
    secant_tensors,
)

# ---------------------------------------------------------------------- two lines that meet at 0


def ramp(z0: Tensor, z1: Tensor) -> Tensor:
    """Slope of the chord of max(z, 0): the part of the step above 0; for two equal ends 1 above 0, else 0."""
    top = torch.maximum(z0, z1)
    way = (z1 - z0).abs_()  # where it is 0 the quotient is infinite, or undefined for a top of 0
    return top.div_(way).nan_to_num_(nan=0.0).clamp_(0, 1)


_LINES: dict[Any, Callable[..., Tensor]] = {  # slopes from the two ends
    aten.relu: ramp,
    aten.abs: lambda z0, z1: ramp(z0, z1).mul_(2).sub_(torch.sign(z0.abs() + z1.abs())),  # 0 where both are 0
    aten.leaky_relu: lambda z0, z1, slope=0.01: ramp(z0, z1).mul_(1 - slope).add_(slope),
}

# ---------------------------------------------------------------------- curved

# Where both ends nearly coincide, rounding errors dominate the slope of the chord, and the derivative at the mean is
# better. It is used wherever it satisfies the mean-value property up to the rounding of the function's values and
# arguments: also for functions with kinks, if none lies between the ends. The slope of the chord amplifies rounding by
# the inverse of the distance, and a library may round one element differently in another place of a tensor (sigmoid by
# 1 unit in the last place, gelu by 20). So for smooth functions the derivative is used at all distances below
# eps^(1/3): it violates the mean-value property by the third derivative times distance^3 / 24, less than eps.
_DERIVATIVES: dict[Any, Callable[..., Tensor]] = {  # others by autograd
    aten.tanh: lambda z: 1 - torch.tanh(z) ** 2,
    aten.sigmoid: lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
    aten.gelu: lambda z, approximate="none": aten.gelu_backward(torch.ones_like(z), z, approximate=approximate),
    aten.silu: lambda z: aten.silu_backward(torch.ones_like(z), z),
    aten.mish: lambda z: aten.mish_backward(torch.ones_like(z), z),
    aten.elu: lambda z, alpha=1, scale=1, inner=1: aten.elu_backward(torch.ones_like(z), alpha, scale, inner, False, z),
    aten.softplus: lambda z, beta=1, threshold=20: aten.softplus_backward(torch.ones_like(z), z, beta, threshold),
    aten.hardtanh: lambda z, low=-1, high=1: aten.hardtanh_backward(torch.ones_like(z), z, low, high),
    aten.hardsigmoid: lambda z: aten.hardsigmoid_backward(torch.ones_like(z), z),
    aten.hardswish: lambda z: aten.hardswish_backward(torch.ones_like(z), z),
    aten.sin: torch.cos,
    aten.cos: lambda z: -torch.sin(z),
    aten.exp: torch.exp,
    aten.log: torch.reciprocal,
    aten.pow: lambda z, p: p * torch.pow(z, p - 1),
}
_SMOOTH = {aten.gelu, aten.mish, aten.silu, aten.tanh, aten.sigmoid, aten.sin, aten.cos}
_SIGNED = {aten.atan2, aten.copysign}  # they distinguish 0 and -0
_HOLOMORPHIC = {aten.exp, aten.sin, aten.cos, aten.tanh, aten.sigmoid, aten.pow, aten.sqrt, aten.log}


@rule(None)
def elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Slope of the chord; with two arguments the mean over the two paths that change one after the other."""
    o0, o1 = at_both_ends(func, args, kwargs)
    if not is_float(o0):
        return discrete(func, o0, o1)
    places = [k for k, a in enumerate(args) if isinstance(a, SecantTensor)]
    if secant_tensors(kwargs) or len(places) > 2:
        raise no_rule(func)
    if len(places) == 1:
        return from_slopes(o0, o1, (_slope(func, args, kwargs, places[0], o0, o1), args[places[0]].mid))
    terms = []
    for place, other in (places, places[::-1]):
        slopes = []
        for end in ("start", "end"):
            fixed = [getattr(a, end) if k == other else a for k, a in enumerate(args)]
            slopes.append(_slope(func, fixed, kwargs, place, *at_both_ends(func, fixed, kwargs)))
        terms.append(((slopes[0] + slopes[1]) / 2, args[place].mid))
    return from_slopes(o0, o1, *terms)


def _slope(func: Any, args: Any, kwargs: Any, place: int, o0: Tensor, o1: Tensor) -> Tensor:
    """Slope by the one argument that varies."""
    z, packet, first = args[place], func._overloadpacket, place == 0
    if (z.is_complex() or o0.is_complex()) and packet not in _HOLOMORPHIC:
        raise no_rule(func, "complex numbers")
    if packet in _SIGNED and ((z.start == z.end) & (o0 != o1)).any():
        raise jump(func)
    if packet in _LINES and first:
        return _LINES[packet](z.start, z.end, *args[1:], **kwargs)
    middle = torch.lerp(z.start, z.end, 0.5)
    derivative = _DERIVATIVES.get(packet) if first and not z.is_complex() else None
    tangent = derivative(middle, *args[1:], **kwargs) if derivative else _by_autograd(func, args, kwargs, place, middle)
    tangent = tangent.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # as of sqrt at 0, if it stays there
    kind, step, change = torch.finfo(o0.dtype), _difference(z.start, z.end), _difference(o0, o1)
    rounding = (o0.abs() + o1.abs()).add_((middle * tangent).abs().clamp_(max=1)).mul_(4 * kind.eps)
    room = rounding - torch.addcmul(change, step, tangent, value=-1).abs()
    if packet in _SMOOTH:
        room = torch.maximum(room, kind.eps ** (1 / 3) - step.abs())
    least = kind.tiny if kind.tiny < 1e-30 else kind.tiny * kind.eps  # in float16 the normal numbers end at 6e-5
    near = room.div_(least).add_(1).nan_to_num_(nan=0.0).clamp_(0, 1)  # 1 or 0
    chord = change.div_(step).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return torch.lerp(chord, tangent, near.to(chord.dtype))


def _difference(t0: Tensor, t1: Tensor) -> Tensor:
    return (t1 - t0).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)  # between two infinities, 0


def _by_autograd(func: Any, args: Any, kwargs: Any, place: int, middle: Tensor) -> Tensor:
    """Derivative of an elementwise function by one argument, from autograd."""
    shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor)))
    with torch.enable_grad():
        leaf = middle.expand(shape).clone().requires_grad_()
        try:
            out = func(*args[:place], leaf, *args[place + 1 :], **kwargs)
            (derivative,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        except RuntimeError:
            raise no_rule(func) from None
    return derivative.conj().resolve_conj()


@rule(aten.log_sigmoid_forward)
def log_sigmoid(func: Any, args: Any, kwargs: Any) -> Any:
    """-softplus(-z)."""
    return -torch.nn.functional.softplus(-args[0]), args[0].start.new_empty(0)


@rule(aten.abs)
def absolute(func: Any, args: Any, kwargs: Any) -> Any:
    """For a complex number the norm of its real and imaginary part."""
    (z,) = args
    if not z.is_complex():
        return elementwise(func, args, kwargs)
    parts = torch.view_as_real(z)
    return torch.sqrt((parts * parts).sum(-1))


@rule(aten.sqrt)
def square_root(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """sqrt(z') - sqrt(z) = (z' - z) / (sqrt(z) + sqrt(z')); 0 where both are 0."""
    o0, o1 = at_both_ends(func, args, kwargs)
    slope = (o0 + o1).reciprocal_()
    return from_slopes(o0, o1, (slope.nan_to_num_(nan=0.0, posinf=0.0), args[0].mid))


@rule(aten.rsqrt)
def inverse_root(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """With r = 1 / sqrt(z): r' - r = -(z' - z) r^2 r'^2 / (r + r')."""
    o0, o1 = at_both_ends(func, args, kwargs)
    both = o0 * o1
    return from_slopes(o0, o1, (-both * (both / (o0 + o1)), args[0].mid))


@rule(aten.pow)
def power(func: Any, args: Any, kwargs: Any) -> Any:
    """Squares and cubes by their factors, others elementwise."""
    base, exponent = args
    if isinstance(exponent, (int, float)) and exponent in (1, 2, 3):
        z0, z1 = base.start, base.end
        slope = {1: 1.0, 2: z0 + z1, 3: z0 * z0 + z0 * z1 + z1 * z1}[int(exponent)]
        return from_slopes(*at_both_ends(func, args, kwargs), (slope, base.mid))
    return elementwise(func, args, kwargs)


@rule(aten.clamp, aten.clamp_min, aten.clamp_max)
def clamped(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise between fixed bounds; maximum and minimum where bounds vary."""
    if len(secant_tensors(args, kwargs)) == 1 and isinstance(args[0], SecantTensor):
        return elementwise(func, args, kwargs)
    z, name = args[0], func._overloadpacket.__name__
    bounds = list(args[1:]) + [None] * (3 - len(args))
    low = kwargs.get("min", bounds[0] if name != "clamp_max" else None)
    high = kwargs.get("max", bounds[1] if name == "clamp" else bounds[0] if name == "clamp_max" else None)
    z = z if low is None else torch.maximum(z, torch.as_tensor(low, dtype=z.dtype))
    return z if high is None else torch.minimum(z, torch.as_tensor(high, dtype=z.dtype))
