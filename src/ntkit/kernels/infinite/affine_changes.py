"""Activations p s(q z) + r z + t of one whose closed form is known."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.kernels.infinite.activations import Activation, Erf, Gelu
from ntkit.kernels.infinite.exponentials import multiple, sum_text


class AffineChange(Activation):
    """p s(q z) + r z + t: by Stein's lemma E[s(u) v] = c E[s'(u)], so the means of s and s' are all it takes."""

    def __init__(self, base: Erf | Gelu, p: float, q: float, r: float, t: float) -> None:
        self.base, self.numbers = base, (p, q, r, t)
        linear = [multiple(r, "z")] * (r != 0) + [f"{t:g}"] * (t != 0)
        self.name = sum_text([multiple(p, f"{base.name}({multiple(q, 'z')})"), *linear])

    def __call__(self, z: Tensor) -> Tensor:
        """Its value."""
        p, q, r, t = self.numbers
        return p * self.base(q * z) + r * z + t

    def state(self, v: Tensor) -> tuple[Tensor, ...]:
        scaled = self.numbers[1] ** 2 * v
        return *self.base.means(scaled), *self.base.state(scaled)

    def apply(self, K: Tensor, T: Tensor | None, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
        value, slope = self.numbers[1] ** 2 * K, torch.ones_like(K)
        factor = self.base.apply(value, None if T is None else slope, one[2:], two[2:])
        value, slope = self.changed(K, factor * value, factor * slope, one, two)
        K.copy_(value)
        if T is not None:
            T.mul_(slope)
        return 1.0

    def diagonal(self, v: Tensor) -> tuple[Tensor, Tensor]:
        side = self.state(v)
        return self.changed(v, *self.base.diagonal(self.numbers[1] ** 2 * v), side, side)

    def changed(
        self, c: Tensor, value: Tensor, slope: Tensor, one: tuple[Tensor, ...], two: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """From E[s s] and E[s' s'] of the base those of the change; the sides begin with the means of s and s'."""
        p, q, r, t = self.numbers
        means, slopes = one[0] + two[0], one[1] + two[1]
        changed = p * p * value + r * r * c + p * q * r * (c * slopes) + p * t * means + t * t
        return changed, (p * q) ** 2 * slope + p * q * r * slopes + r * r
