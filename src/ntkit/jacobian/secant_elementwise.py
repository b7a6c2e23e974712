"""Rules of elementwise functions: the slope of the chord between the ends, the derivative where they coincide.

Comparisons and ``torch.where`` cost ten to thirty times an addition on a CPU: slopes are put together by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from ntkit.jacobian.ends import Ends, aten, between, both, combined, jumps, paired, rule, settled, varying

# ---------------------------------------------------------------------- two lines that meet at 0


def ramp(z0: Tensor, z1: Tensor) -> Tensor:
    """Slope of the chord of max(z, 0): the part of the way that lies above 0; at two equal ends 1 above 0, else 0."""
    top = torch.maximum(z0, z1)
    way = (z1 - z0).abs_().add_(torch.finfo(z0.dtype).tiny)
    return top.div_(way).nan_to_num_(nan=0.0).clamp_(0, 1)


_LINES: dict[Any, Callable[..., Tensor]] = {  # slopes from the two ends
    aten.relu: ramp,
    aten.abs: lambda z0, z1: ramp(z0, z1).mul_(2).sub_(torch.sign(z0.abs() + z1.abs())),  # 0 where both are 0
    aten.leaky_relu: lambda z0, z1, slope=0.01: ramp(z0, z1).mul_(1 - slope).add_(slope),
}

# ---------------------------------------------------------------------- smooth

# Where both ends nearly coincide the slope of the chord is all cancellation; the derivative between is better. Its
# error is of second order for a smooth function, so below a distance of eps^(1/3) it is rounding (in the law, far
# below).
_SMOOTH: dict[Any, Callable[..., Tensor]] = {  # derivatives
    aten.tanh: lambda z: 1 - torch.tanh(z) ** 2,
    aten.sigmoid: lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
    aten.gelu: lambda z, approximate="none": aten.gelu_backward(torch.ones_like(z), z, approximate=approximate),
    aten.silu: lambda z: aten.silu_backward(torch.ones_like(z), z),
    aten.mish: lambda z: aten.mish_backward(torch.ones_like(z), z),
    aten.erf: lambda z: 2 / math.sqrt(math.pi) * torch.exp(-z * z),
    aten.erfc: lambda z: -2 / math.sqrt(math.pi) * torch.exp(-z * z),
    aten.sin: torch.cos,
    aten.cos: lambda z: -torch.sin(z),
    aten.exp: torch.exp,
    aten.exp2: lambda z: math.log(2) * torch.exp2(z),
    aten.expm1: torch.exp,
    aten.sinh: torch.cosh,
    aten.cosh: torch.sinh,
    aten.atan: lambda z: 1 / (1 + z * z),
    aten.asinh: lambda z: torch.rsqrt(1 + z * z),
}
_SCALED: dict[Any, Callable[..., Tensor]] = {  # smooth away from 0: near by relative distance
    aten.log: torch.reciprocal,
    aten.log2: lambda z: 1 / (math.log(2) * z),
    aten.log10: lambda z: 1 / (math.log(10) * z),
    aten.pow: lambda z, p: p * torch.pow(z, p - 1),
}

# ---------------------------------------------------------------------- with kinks: near only where the ends coincide

_KINKED: dict[Any, Callable[..., Tensor]] = {  # derivatives
    aten.elu: lambda z, alpha=1, scale=1, inner=1: aten.elu_backward(torch.ones_like(z), alpha, scale, inner, False, z),
    aten.softplus: lambda z, beta=1, threshold=20: aten.softplus_backward(torch.ones_like(z), z, beta, threshold),
    aten.hardtanh: lambda z, low=-1, high=1: aten.hardtanh_backward(torch.ones_like(z), z, low, high),
    aten.hardsigmoid: lambda z: aten.hardsigmoid_backward(torch.ones_like(z), z),
    aten.hardswish: lambda z: aten.hardswish_backward(torch.ones_like(z), z),
}


@rule(None)
def elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Slope of the chord; the derivative where the ends coincide."""
    (z,) = varying(args, kwargs) or (None,)
    if z is None or z.mid is None:
        raise jumps(func)
    o0, o1 = both(func, args, kwargs)
    if not o0.is_floating_point():
        return paired(o0, o1, None)
    packet, first = func._overloadpacket, args[0] is z
    if packet in _LINES and first:
        return combined(o0, o1, (_LINES[packet](z.e0, z.e1, *args[1:], **kwargs), z.mid))
    tiny, infinity = torch.finfo(o0.dtype).tiny, math.inf
    step = (z.e1 - z.e0).nan_to_num_(nan=0.0, posinf=infinity, neginf=-infinity)  # between two infinities
    chord = (o1 - o0).nan_to_num_(nan=0.0, posinf=infinity, neginf=-infinity).div_(step + tiny)
    bound, middle = torch.finfo(step.dtype).eps ** (1 / 3), z.e0
    derivative = _KINKED.get(packet) if first else None
    if packet in _SMOOTH:
        room, middle, derivative = bound - step.abs(), torch.lerp(z.e0, z.e1, 0.5), _SMOOTH[packet]
    elif packet in _SCALED and first:
        room = bound * torch.minimum(z.e0.abs(), z.e1.abs()) - step.abs()
        middle, derivative = torch.lerp(z.e0, z.e1, 0.5), _SCALED[packet]
    else:
        room = tiny - step.abs()
    near = room.div_(tiny).clamp_(0, 1)  # 1 or 0
    if derivative is not None:
        slope = torch.lerp(chord, derivative(middle, *args[1:], **kwargs).nan_to_num_(), near)
        return combined(o0, o1, (slope, z.mid))
    tangent = between(func, args, kwargs)  # its own derivative, taken between
    with enable_reentrant_dispatch(), torch.enable_grad():
        mid = near * tangent + (1 - near) * chord * z.mid
    return settled(o0, o1, mid)


@rule(aten.log_sigmoid_forward)
def log_sigmoid(func: Any, args: Any, kwargs: Any) -> Any:
    """-softplus(-z)."""
    return -torch.nn.functional.softplus(-args[0]), args[0].e0.new_empty(0)


@rule(aten.sqrt)
def square_root(func: Any, args: Any, kwargs: Any) -> Ends:
    """sqrt(z') - sqrt(z) = (z' - z) / (sqrt(z) + sqrt(z'))."""
    o0, o1 = both(func, args, kwargs)
    return combined(o0, o1, (1 / (o0 + o1), args[0].mid))


@rule(aten.rsqrt)
def inverse_root(func: Any, args: Any, kwargs: Any) -> Ends:
    """Of r = 1 / sqrt(z): r' - r = -(z' - z) r^2 r'^2 / (r + r')."""
    o0, o1 = both(func, args, kwargs)
    return combined(o0, o1, (-((o0 * o1) ** 2) / (o0 + o1), args[0].mid))


@rule(aten.pow)
def power(func: Any, args: Any, kwargs: Any) -> Any:
    """Squares and cubes by their factors, other powers elementwise; a power of two that vary by exp and log."""
    base, exponent = args
    if isinstance(base, Ends) and isinstance(exponent, Ends):
        return torch.exp(exponent * torch.log(base))
    if isinstance(exponent, (int, float)) and exponent in (1, 2, 3):
        z0, z1 = base.e0, base.e1
        slope = {1: 1.0, 2: z0 + z1, 3: z0 * z0 + z0 * z1 + z1 * z1}[int(exponent)]
        return combined(*both(func, args, kwargs), (slope, base.mid))
    return elementwise(func, args, kwargs)


@rule(aten.clamp, aten.clamp_min, aten.clamp_max)
def clamped(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise between fixed bounds; maximum and minimum where bounds vary."""
    if len(varying(args, kwargs)) == 1 and isinstance(args[0], Ends):
        return elementwise(func, args, kwargs)
    z, name = args[0], func._overloadpacket.__name__
    bounds = list(args[1:]) + [None] * (3 - len(args))
    low = kwargs.get("min", bounds[0] if name != "clamp_max" else None)
    high = kwargs.get("max", bounds[1] if name == "clamp" else bounds[0] if name == "clamp_max" else None)
    z = z if low is None else torch.maximum(z, torch.as_tensor(low))
    return z if high is None else torch.minimum(z, torch.as_tensor(high))
