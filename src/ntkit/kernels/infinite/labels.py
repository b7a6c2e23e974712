"""Which channel of which position of which sample each number of a value is, however the value is laid out.

A call that only moves numbers (views, transposes, chunks, indices) moves their labels: it is run on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.kernels.infinite.position_layers import FAR, position_function
from ntkit.kernels.infinite.tape import Op


class Labels:
    """Labels of a value's numbers: (sample, channel, position) as one integer each, in the shape of the value."""

    def __init__(self, ids: Tensor, channels: int, positions: int) -> None:
        self.ids, self.channels, self.positions = ids, channels, positions

    @classmethod
    def at(cls, samples: Tensor, channels: Tensor, positions: Tensor, count: int, grid: int) -> Labels:
        """Of broadcast samples, channels and positions; `count` channels at `grid` positions."""
        return cls((samples * count + channels) * grid + positions, count, grid)

    @property
    def sample(self) -> Tensor:
        """Of each number."""
        return self.ids // (self.channels * self.positions)

    @property
    def channel(self) -> Tensor:
        """Of each number."""
        return self.ids // self.positions % self.channels

    @property
    def position(self) -> Tensor:
        """Of each number."""
        return self.ids % self.positions

    def moved(self, ids: Tensor) -> Labels:
        """Of other numbers of the same value."""
        return Labels(ids, self.channels, self.positions)

    def same(self, other: Labels) -> bool:
        """Whether two values have equal labels."""
        shape = (self.channels, self.positions) == (other.channels, other.positions)
        return shape and torch.equal(self.ids, other.ids)

    def canonical(self) -> bool:
        """Whether the value is laid out as [samples, channels, positions ...]."""
        return torch.equal(self.ids.flatten(), torch.arange(3 * self.channels * self.positions))


def moves(op: Op, before: Tensor) -> Tensor | None:
    """Where each number of a call's result comes from, as flat indices of its one value; None if it computes."""
    if len(op.refs) != 1 or op.in_place or not (before.is_floating_point() and op.out.is_floating_point()):
        return None
    function, shape = position_function(op), before.shape
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.random.fork_rng([]), torch.no_grad():
        try:
            numbers = function(torch.arange(z.numel(), dtype=torch.float64).reshape(shape))
            values, far = function(z * 1), function(z * FAR)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
    if numbers.shape != op.out.shape or not numbers.numel() or numbers.is_complex():
        return None
    inside = (numbers >= 0) & (numbers < z.numel()) & (numbers == numbers.round())
    if not bool(inside.all()):
        return None
    picked = z.flatten()[numbers.long()]
    if not torch.equal(values, picked) or not torch.equal(far, picked * FAR):
        return None
    return numbers.long()
