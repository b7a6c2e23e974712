"""Embeddings in a graph: derivatives in the rows that a batch looks up, without a tensor as large as the parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ntkit.jacobian.graph import Node, nodes_behind


class Lookups(NamedTuple):
    """Where a graph looks up rows of a parameter [l, d] that is used for nothing else.

    Attributes
    ----------
    rows : int64 [r], the rows that have a gradient: those looked up, without padding.
    edges : the tensors [*indices, d] that the lookups give, as edges of the graph.
    positions : for each lookup the positions that have a gradient, in its indices as a line.
    places : and which of `rows` is there.
    """

    rows: Tensor
    edges: list[GradientEdge]
    positions: list[Tensor]
    places: list[Tensor]

    def gathered(self, vectors: Tensor) -> list[Tensor]:
        """Vectors [k, r, d] looked up: [k, *indices, d] for each lookup, zero where there is no gradient."""
        looked_up = []
        for edge, positions, places in zip(self.edges, self.positions, self.places, strict=True):
            shape = edge.node._input_metadata[0].shape
            flat = vectors.new_zeros(len(vectors), math.prod(shape[:-1]), shape[-1])
            flat[:, positions] = vectors[:, places]
            looked_up.append(flat.view(len(vectors), *shape))
        return looked_up

    def summed(self, values: Sequence[Tensor]) -> Tensor:
        """The transpose of `gathered`: sums [k, r, d] over the positions of each row."""
        k, d = len(values[0]), values[0].shape[-1]
        total = values[0].new_zeros(k, len(self.rows), d)
        for value, positions, places in zip(values, self.positions, self.places, strict=True):
            total.index_add_(1, places, value.reshape(k, -1, d)[:, positions])
        return total


def find_lookups(outputs: Tensor, params: Mapping[str, nn.Parameter]) -> dict[str, Lookups]:
    """The lookups of each parameter that the graph behind `outputs` uses as an embedding's weight and nowhere else.

    Examples
    --------
    >>> words = nn.Embedding(9, 2, padding_idx=0)
    >>> outputs = words(torch.tensor([[7, 0, 3], [3, 3, 0]])).sum((1, 2))
    >>> found = find_lookups(outputs, {"words": words.weight})["words"]
    >>> found.rows, found.summed(found.gathered(torch.ones(1, 2, 2)))
    (tensor([3, 7]), tensor([[[3., 3.],
             [1., 1.]]]))
    """
    names = {id(p): name for name, p in params.items() if not p._backward_hooks}  # hooks see the whole gradient
    found: dict[str, list[Node]] = {}
    for node in nodes_behind(outputs):
        for child, _ in node.next_functions:
            if child is not None and (name := names.get(id(getattr(child, "variable", None)))) is not None:
                found.setdefault(name, []).append(node)
    return {name: _lookups(nodes, len(params[name])) for name, nodes in found.items() if all(map(_by_row, nodes))}


def _by_row(node: Node) -> bool:
    """Whether a node adds the gradient at each position to the row that was looked up there."""
    return node.name() == "EmbeddingBackward0" and not node._saved_scale_grad_by_freq


def _lookups(nodes: Sequence[Node], l: int) -> Lookups:  # noqa: E741
    positions, looked_up = [], []
    for node in nodes:
        indices, padding = node._saved_indices.reshape(-1), node._saved_padding_idx
        # autograd stores "no padding index" as the largest unsigned number
        own = (indices != padding) if 0 <= padding < l else torch.ones_like(indices, dtype=torch.bool)
        positions.append(own.nonzero()[:, 0])
        looked_up.append(indices[positions[-1]])
    rows, places = torch.cat(looked_up).long().unique(return_inverse=True)
    edges = [GradientEdge(node, 0) for node in nodes]
    return Lookups(rows, edges, positions, list(places.split([len(own) for own in positions])))
