"""What the layers need of the samples on one side of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

State = tuple[Tensor, ...]


@dataclass
class Side:
    """Samples of one side.

    data : values of the input layers, [H, W, n, C] each, by index on the tape.
    states : what activations and norms need of this side, [..., H, W, n].
    diagonal : of activations, E[s(u)^2] and E[s'(u)^2].
    """

    data: dict[int, Tensor]
    states: dict[int, State] = field(default_factory=dict)
    diagonal: dict[int, State] = field(default_factory=dict)

    def subset(self, samples: slice) -> Side:
        """Some of the samples."""
        data = {k: t[:, :, samples] for k, t in self.data.items()}
        states, diagonal = (
            {k: tuple(t[..., samples] for t in s) for k, s in by_layer.items()}
            for by_layer in (self.states, self.diagonal)
        )
        return Side(data, states, diagonal)

    @property
    def count(self) -> int:
        """Number of samples."""
        return next(iter(self.data.values())).shape[2]
