"""Kernels of networks that mix positions with weights of each sample's own, for all pairs of positions at once.

Attention whose scores tend to constants takes every position of a sample to every other, so that no offset between
positions stays apart, as in `planes`. Here the positions of a tile's samples stand beside each other, as if they were
samples: covariance and tangent kernel are matrices [B, R, S], with R = p P rows for the P positions of p samples
(B = 1), or one block for each of B paired samples. Layers that act on each position alone need nothing else; a mixture
multiplies rows and columns by the maps of its samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.layers import (
    Affine,
    Channels,
    Concat,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Layer,
    Mixture,
    Norm,
    Pointwise,
    Product,
    Sum,
    sources,
)
from ntkit.kernels.infinite.prepared_sides import check_moments, check_range
from ntkit.kernels.infinite.sample_sides import Side, State

Values = tuple[Tensor, Tensor | None]  # covariance and tangent kernel, [B, R, S] each; None: 0 so far


def mixes(graph: Graph) -> bool:
    """Whether a graph has weights of each sample's own between its positions."""
    return any(isinstance(layer, Mixture) for layer in graph.layers)


@dataclass
class AllPairs:
    """Values of a graph's layers for two sides, at all pairs of their positions.

    paired : sample i of one side with sample i of the other only.
    symmetric : the two sides are the same.
    tangent : whether to compute the tangent kernel beside the covariance.
    keep : keep the values of all layers, not only of those that are used several times.
    """

    graph: Graph
    one: Side
    two: Side
    paired: bool
    symmetric: bool
    tangent: bool
    keep: bool = False

    def __post_init__(self) -> None:
        needed = {id(self.graph.layers[self.graph.output])}
        self.uses: Counter[int] = Counter()
        for layer in reversed(self.graph.layers):  # not what only the scores need
            if id(layer) in needed:
                of = [id(source) for source in sources(layer)]
                needed.update(of)
                self.uses.update(of)
        self.cache: dict[int, Values] = {}

    def __call__(self, layer: Layer) -> Values:
        """The values of a layer, which the caller may write into."""
        if id(layer) not in self.cache:
            values = _RULES[type(layer)](self, layer)
            if not self.keep and self.uses[id(layer)] < 2:
                return values
            self.cache[id(layer)] = values
        K, T = self.cache[id(layer)]
        return K.clone(), None if T is None else T.clone()

    def output(self) -> Tensor:
        """The kernel, [p, q]; of pairs [p]."""
        K, T = self(self.graph.layers[self.graph.output])
        out = K if T is None or not self.tangent else T
        return out[:, 0, 0] if self.paired else out[0]

    def between_positions(self, layer: Layer) -> Tensor:
        """The kernel of a layer at all pairs of positions, [p, q, P, P]."""
        K, T = self(layer)
        out = K if T is None or not self.tangent else T
        return self.apart(out, math.prod(layer.size))[0].transpose(1, 2)

    def states(self, key: int) -> tuple[State, State]:
        """States of both sides, [..., samples, positions], as rows and columns."""
        one, two = self.one.states[key], self.two.states[key]
        if self.paired:
            return tuple(t[..., :, None] for t in one), tuple(t[..., None, :] for t in two)
        return tuple(t.flatten(-2)[..., None, :, None] for t in one), tuple(
            t.flatten(-2)[..., None, None, :] for t in two
        )

    def apart(self, x: Tensor, positions: int) -> Tensor:
        """[B, p, P, q, P] of a matrix."""
        return x.unflatten(2, (-1, positions)).unflatten(1, (-1, positions))


# ---------------------------------------------------------------------- one rule per layer


def _input(values: AllPairs, layer: Input) -> Values:
    a, b = (side.data[layer.key].flatten(0, 1).transpose(0, 1) for side in (values.one, values.two))  # [n, P, C]
    if layer.channels < a.shape[-1]:  # some of the channels; the data are divided by the root of the number of all
        share = math.sqrt(a.shape[-1] / layer.channels)
        a, b = (t[..., layer.first : layer.first + layer.channels] * share for t in (a, b))
    if not values.paired:
        a, b = a.flatten(0, 1)[None], b.flatten(0, 1)[None]
    return a @ b.mT, None


def _affine(values: AllPairs, layer: Affine) -> Values:
    K, T = values(layer.source)
    all_trained = (layer.weight_var, layer.bias_var) == (layer.weight_ntk, layer.bias_ntk)
    if values.tangent and not all_trained:
        T = K * layer.weight_ntk if T is None else T.mul_(layer.weight_var).add_(K, alpha=layer.weight_ntk)
        T.add_(layer.bias_ntk)
    K.mul_(layer.weight_var)
    if layer.bias_var:
        K.add_(layer.bias_var)
    if values.tangent and all_trained:
        T = K.clone() if T is None else torch.add(K, T, alpha=layer.weight_var, out=T)
    return K, T


def _pointwise(values: AllPairs, layer: Pointwise) -> Values:
    (K, T), norm = values(layer.source), layer.source
    if T is None or layer.weighted is None or not isinstance(norm, Norm):
        return _applied(values, layer, K, T)
    # the norm's weight contributes E[u s'(u) v s'(v)], not E[u v] E[s' s']
    share, extra = norm.weight_ntk / norm.weight_sq, K.clone()
    T.sub_(K, alpha=share)
    K, T = _applied(values, layer, K, T)
    assert T is not None
    return K, T.add_(_applied(values, layer, extra, None, weighted=True)[0], alpha=share)


def _applied(values: AllPairs, layer: Pointwise, K: Tensor, T: Tensor | None, weighted: bool = False) -> Values:
    activation, key = (layer.weighted, -id(layer)) if weighted else (layer.activation, id(layer))
    assert activation is not None
    own = [] if T is None or not values.symmetric else [T.diagonal(0, 1, 2).clone()]
    # activations take planes: four axes, as of a grid of one row
    one, two = (tuple(t.unsqueeze(-4) for t in state) for state in values.states(key))
    factor = activation.apply(K[None], None if T is None else T[None], one, two)
    if factor != 1:
        K.mul_(factor)
        T = None if T is None else T.mul_(factor)
    if values.symmetric:  # a position with itself: without rounding error
        value, slope = (t if values.paired else t.flatten()[None] for t in values.one.diagonal[key])
        K.diagonal(0, 1, 2).copy_(value)
        if T is not None:
            T.diagonal(0, 1, 2).copy_(own[0].mul_(slope))
    return K, T


def _added(terms: list[tuple[float, Values]]) -> Values:
    (factor, (K, T)), *others = terms
    K = K if factor == 1 else K.mul_(factor)
    T = T if T is None or factor == 1 else T.mul_(factor)
    for factor, (of_K, of_T) in others:
        K.add_(of_K, alpha=factor)
        if of_T is not None:
            T = of_T.mul_(factor) if T is None else T.add_(of_T, alpha=factor)
    return K, T


def _sum(values: AllPairs, layer: Sum) -> Values:
    return _added([(factor**2, values(term)) for factor, term in layer.terms])


def _concat(values: AllPairs, layer: Concat) -> Values:
    return _added([(share, values(part)) for share, part in layer.parts])


def _product(values: AllPairs, layer: Product) -> Values:
    (K1, T1), (K2, T2) = values(layer.one), values(layer.two)
    T = None if T1 is None else T1.mul_(K2)
    if T2 is not None:
        T2.mul_(K1)
        T = T2 if T is None else T.add_(T2)
    return K1.mul_(K2), T


def _norm(values: AllPairs, layer: Norm) -> Values:
    K, T = values(layer.source)
    one, two = values.states(id(layer))
    K.mul_(one[0] * two[0])
    if T is not None:
        T.mul_(one[0] * two[0] * layer.weight_sq)
        if layer.weight_ntk:
            T.add_(K, alpha=layer.weight_ntk)
        if layer.bias_ntk:
            T.add_(layer.bias_ntk)
    return K.mul_(layer.weight_sq), T


def _global_pool(values: AllPairs, layer: GlobalPool) -> Values:
    K, T = values(layer.source)
    count = math.prod(layer.source.size)
    return _mean(values, K, count), None if T is None else _mean(values, T, count)


def _mean(values: AllPairs, x: Tensor, count: int) -> Tensor:
    return values.apart(x, count).mean((2, 4))


def _flatten(values: AllPairs, layer: Flatten) -> Values:
    count = math.prod(layer.source.size)
    K, T = (None if x is None else values.apart(x, count).diagonal(0, 2, 4).mean(-1) for x in values(layer.source))
    assert K is not None
    return K, T


def _mixture(values: AllPairs, layer: Mixture) -> Values:
    K, T = values(layer.source)
    rows, columns = values.one.states[id(layer)][0], values.two.states[id(layer)][0]
    return _mixed(values, K, rows, columns), None if T is None else _mixed(values, T, rows, columns)


def _mixed(values: AllPairs, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns of each sample multiplied by its map, [n, positions, positions of the source]."""
    if values.paired:
        return rows @ x @ columns.mT
    p, q, new, old = len(rows), len(columns), rows.shape[1], rows.shape[2]
    x = (rows @ x.reshape(p, old, q * old)).reshape(p * new, q, old).transpose(0, 1)  # [q, p new, old]
    return torch.bmm(x, columns.mT).transpose(0, 1).reshape(1, p * new, q * new)


_RULES: dict[type[Layer], Callable[[AllPairs, Any], Values]] = {
    Input: _input,
    Affine: _affine,
    Pointwise: _pointwise,
    Sum: _sum,
    Norm: _norm,
    Flatten: _flatten,
    GlobalPool: _global_pool,
    Mixture: _mixture,
    Concat: _concat,
    Product: _product,
    Channels: lambda values, layer: values(layer.source),
}


def check_layers(graph: Graph) -> None:
    """Refuse, by its name, a layer of a graph with mixtures that takes part of the positions to others."""
    for layer in graph.layers if mixes(graph) else ():
        one_tap = not isinstance(layer, Affine) or (layer.kernel_size, layer.stride, layer.padding) == _ONE_TAP
        if type(layer) not in _RULES or not one_tap or (isinstance(layer, Norm) and not layer.alone):
            got = f"{type(layer).__name__} over positions in a network with attention"
            fix = "Let all other layers act on each position alone (nn.Linear, LayerNorm over the features)."
            raise refusal(layer.name, got=got, expected="a layer that acts on each position alone", fix=fix)


_ONE_TAP = ((1, 1), (1, 1), (0, 0))


# ---------------------------------------------------------------------- one side


def prepare(graph: Graph, data: dict[int, Tensor]) -> Side:
    """Compute what the layers need of a side: variances and maps, from the first layer to the last."""
    side = Side(data)
    values = AllPairs(graph, side, side, True, True, tangent=False, keep=True)
    for layer in graph.layers:
        if isinstance(layer, (Pointwise, Norm)):
            v = values(layer.source)[0].diagonal(0, 1, 2)  # [n, positions]
            if isinstance(layer, Norm):
                side.states[id(layer)] = ((v + layer.eps).rsqrt(),)
                continue
            check_range(layer, v.T[None])
            for key, activation in ((id(layer), layer.activation), (-id(layer), layer.weighted)):
                if activation is not None:
                    side.states[key], side.diagonal[key] = activation.state(v), activation.diagonal(v)
                    check_moments(layer, side.diagonal[key], v)
        elif isinstance(layer, Mixture):
            scores = side.data[next(iter(side.data))].new_zeros(side.count, *layer.score_grid)
            for factor, source in layer.scores:
                scores.add_(values(source)[0], alpha=factor)
            given = [side.data[k.key][0, 0] for k in layer.given]
            maps = layer.weights(scores, given)
            if not maps.isfinite().all():
                got, expected = "weights of attention that are no finite numbers", "finite ones"
                raise refusal(layer.name, got=got, expected=expected, fix="Let each query see a key.")
            side.states[id(layer)] = (maps,)
    return side
