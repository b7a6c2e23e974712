"""Gradients of embeddings: each sample has a gradient in the rows of its own words alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ntkit.jacobian.pairs import Pair, Pairs, Whole


class RowGradient(NamedTuple):
    """A parameter's gradient as a sum over positions: row ``rows[i, t]`` has ``values[i, c, t]`` of sample i.

    Attributes
    ----------
    rows : int64 [n, T]; a row may come more than once.
    values : [n, C, T, r].
    shape : (l, r), the parameter's as a matrix.
    """

    rows: Tensor
    values: Tensor
    shape: tuple[int, int]

    def scaled(self, factors: Tensor) -> RowGradient:
        """The gradient times factors for the parameter's entries."""
        own = factors.reshape(self.shape)[self.rows].to(self.values)
        return self._replace(values=self.values * own[:, None])

    def add_to(self, total: Tensor, alpha: float) -> None:
        """Add it, times a factor, to `total` [n, C, l * r]."""
        (n, outputs), (l, r) = self.values.shape[:2], self.shape  # noqa: E741
        first = torch.arange(n * outputs, device=self.rows.device).view(n, outputs, 1) * l
        places = (first + self.rows[:, None]).flatten()
        total.view(-1, r).index_add_(0, places, self.values.reshape(-1, r).to(total), alpha=alpha)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """The rows in which any sample has a gradient, int64 [u], and the gradients there, [n, C, u * r]."""
        rows, places = self.rows.unique(return_inverse=True)
        pair = Pair(places[:, None], self.values, len(rows), self.shape[1], data_left=True)
        return rows, pair.rows()


def row_gradient(factor: Whole) -> RowGradient | None:
    """A gradient as one of rows, if it is."""
    if not isinstance(factor, Pairs) or len(factor.parts) > 1 or not factor.parts[0].selects:
        return None
    (pair,) = factor.parts
    return RowGradient(pair.data[:, 0], pair.cotangent, (pair.l, pair.r))


def along(factor: Whole, direction: Tensor) -> Tensor:
    """Products of each sample's gradient with a direction [entries]: [n, C]."""
    if (selected := row_gradient(factor)) is None:
        rows = factor.rows()
        return rows @ direction.to(rows)
    return selected.scaled(direction).values.sum((2, 3))
