"""Activations: E[s(u) s(v)] and E[s'(u) s'(v)] of Gaussian pairs, in closed form.

An activation is recognized by its values and slopes, not by its name. (u, v) have variances a, b and covariance c;
rho = c / sqrt(a b). By Price's theorem E[s'(u) s'(v)] is the derivative of E[s(u) s(v)] by c.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class Activation(ABC):
    """`state` of each side from its variances, then `apply` in place to covariances."""

    name: str = ""

    @abstractmethod
    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        """What `apply` needs of one side, each in the shape of the variances `v`."""

    @abstractmethod
    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        """Write E[s(u) s(v)] / f into K, which holds c, multiply T by E[s'(u) s'(v)] / f, and return f.

        The factor is left to the caller, who multiplies by another factor anyway.
        """

    @abstractmethod
    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """E[s(u)^2] and E[s'(u)^2] at variance v: what `apply` gives for two equal sides, without rounding error."""


class Rectifier(Activation):
    """s(z) = p z for z > 0, q z for z < 0: ReLU, LeakyReLU, abs, the identity.

    With m = (p + q) / 2 and d = (p - q) / 2, s(z) = m z + d |z|, and z and |v| are uncorrelated:
    E[s s] = m^2 c + d^2 (2 / pi) sqrt(a b) (sqrt(1 - rho^2) + rho asin rho); E[s' s'] = m^2 + d^2 (2 / pi) asin rho
    (Cho and Saul 2009, arc-cosine kernels of degree 1 and 0).
    """

    def __init__(self, p: float, q: float, at_zero: float | None = None) -> None:
        self.slope, self.mean = p, (p + q) / 2
        self.even, self.odd = ((p - q) / 2) ** 2, self.mean * self.mean
        # Autograd's slope at 0 counts where values are 0 in every network: black images, padding, zero biases.
        self.at_zero = self.mean if at_zero is None else at_zero
        self.name = f"piecewise linear, slopes {p:g} and {q + 0.0:g}"

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        # Slightly too small, so that a correlation of 1 that rounding has reduced is 1 again: the angle would turn an
        # error of eps into one of sqrt(2 eps).
        rounded = v * (1 - 8 * torch.finfo(v.dtype).eps)
        return (rounded,) if self.at_zero == self.mean or v.all() else (rounded, self.mean_slope(v == 0, v))

    def mean_slope(self, black: Tensor, like: Tensor) -> Tensor:
        """E[s'(u)], which is autograd's slope at 0 where u is always 0."""
        return torch.full_like(like, self.mean).masked_fill_(black, self.at_zero)

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        if self.even == 0 == self.odd:  # the caller divides by the factor
            for values in (K,) if T is None else (K, T):
                values.zero_()
            return 1.0
        if self.even == 0:
            return self.odd
        # With root = sqrt(a b - c^2), asin rho = atan(c / root) and A = asin rho + odd / factor:
        # E[s s] = factor (c A + root), E[s' s'] = factor A.
        factor = self.even * 2 / math.pi
        root, angle = scratch(0, K), scratch(1, K)
        torch.mul(one[0], two[0], out=root).addcmul_(K, K, value=-1)
        square_root(root, angle)
        torch.atan2(K, root, out=angle).add_(self.odd / factor)
        torch.addcmul(root, K, angle, out=K)
        if T is not None:
            first, second = (side[1] if len(side) > 1 else self.mean for side in (one, two))
            if isinstance(first, Tensor) or isinstance(second, Tensor):  # of a black side the angle is 0
                angle.add_(first * second - self.odd, alpha=1 / factor)
            T.mul_(angle)
        return factor

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.full_like(v, self.odd + self.even)
        return v * (self.odd + self.even), slope.masked_fill_(v == 0, self.at_zero**2) if self.even else slope


class Erf(Activation):
    """s(z) = erf(z): E[s s] = (2 / pi) asin(2 c / sqrt((1 + 2a)(1 + 2b))) (Williams 1997)."""

    name = "erf"

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        return (v,)

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        # With root^2 = (1 / 2 + a)(1 / 2 + b) - c^2, the angle is atan(c / root), and E[s' s'] = (2 / pi) / root.
        root = gap(one[0], two[0], K).add_((one[0] + two[0]).mul_(0.5).add_(0.25)).sqrt_()
        if T is not None:
            T.div_(root)
        torch.atan2(K, root, out=K)
        return 2 / math.pi

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        root = (0.25 + v).sqrt()
        return torch.atan2(v, root) * (2 / math.pi), (2 / math.pi) / root

    def __call__(self, z: Tensor) -> Tensor:
        """s(z)."""
        return torch.erf(z)

    def means(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """E[s(u)] and E[s'(u)]."""
        return torch.zeros_like(v), 2 / math.sqrt(math.pi) * (1 + 2 * v).rsqrt()


class Gelu(Activation):
    """s(z) = z Phi(z), with the standard normal distribution function Phi.

    With P = (1 + a)(1 + b), D^2 = P - c^2, t = asin(c / sqrt P):
    E[s s] = c / 4 + (c t + (a b D + c^2 / D) / P) / (2 pi);
    E[s' s'] = 1 / 4 + (t + c / D (3 + a + b + c^2 / D^2) / P) / (2 pi).
    By Stein's lemma twice and by tilting the Gaussian with its density at u or v; no terms cancel.
    """

    name = "gelu"

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        return (v,)

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        a, b = one[0], two[0]
        P, more = (1 + a) * (1 + b), a + b
        D = gap(a, b, K).add_(more).add_(1).sqrt_()
        ratio, t = K / D, torch.atan2(K, D)
        if T is not None:
            slope = more.add_(3).addcmul_(ratio, ratio).mul_(ratio).div_(P).add_(t)
            T.mul_(slope.mul_(1 / (2 * math.pi)).add_(0.25))
        top = D.mul_(a * b).addcmul_(K, ratio).div_(P)
        K.mul_(t.mul_(1 / (2 * math.pi)).add_(0.25)).add_(top, alpha=1 / (2 * math.pi))
        return 1.0

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        K, T = v.clone(), torch.ones_like(v)
        self.apply(K, T, self.state(v), self.state(v))
        return K, T

    def __call__(self, z: Tensor) -> Tensor:
        """s(z)."""
        return torch.nn.functional.gelu(z)

    def means(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """E[s(u)] and E[s'(u)]."""
        return v * (2 * math.pi * (1 + v)).rsqrt(), torch.full_like(v, 0.5)


_MEMORY = threading.local()


def scratch(which: int, like: Tensor) -> Tensor:
    """Memory of this thread in the shape of `like`, used again: to allocate it costs as much as the arithmetic."""
    if like.device.type != "cpu":
        return torch.empty_like(like)
    buffers: dict[str, Tensor] = _MEMORY.__dict__
    key = f"{which} {like.dtype}"
    if key not in buffers or buffers[key].numel() < like.numel():
        buffers[key] = torch.empty(like.numel(), dtype=like.dtype)
    return buffers[key][: like.numel()].view(like.shape)


def gap(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The difference a b - c^2; 0 where rounding is as large, for it may be added to far smaller numbers."""
    product = a * b
    difference = torch.addcmul(product, c, c, value=-1)
    return difference.masked_fill_(difference <= product.mul_(16 * torch.finfo(c.dtype).eps), 0)


def square_root(x: Tensor, other: Tensor) -> Tensor:
    """Root of x in place, 0 where x < 0: x / sqrt(x), which the CPU computes faster. `other` is overwritten."""
    x.clamp_(min=0)
    return x.mul_(torch.rsqrt(x, out=other).clamp_(max=torch.finfo(x.dtype).max))


def times_slope(function: Function) -> Function:
    """For a function s, the function z s'(z)."""

    def product(z: Tensor) -> Tensor:
        with torch.enable_grad():
            at = z if z.requires_grad else z.detach().requires_grad_()
            slope = torch.autograd.grad(function(at * 1).sum(), at, create_graph=True, allow_unused=True)[0]
            return at * (0 if slope is None else slope)

    return product


def values_and_slopes(function: Function, z: Tensor) -> tuple[Tensor, Tensor]:
    """s(z) and s'(z), elementwise; the slope is autograd's, as training uses it."""
    with torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        out = function(z * 1)
        slope = torch.autograd.grad(out.sum(), z)[0] if out.requires_grad else torch.zeros_like(z)
    return out.detach(), slope.detach()
