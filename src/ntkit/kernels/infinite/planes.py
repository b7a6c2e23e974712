"""Kernels carried through the layers, one offset between positions at a time.

A kernel of images is a function of two samples and two positions, p and p + d. Convolutions (with their strides) and
activations never mix offsets d: the values at one offset, a plane, pass through the whole network on their own, in the
processor's caches. Only pools sum over offsets. So the n^2 (HW)^2 array of all pairs is never allocated, and a network
that ends in `Flatten` needs one offset of its last layers only.

A plane is [2, height, width, p, q]: covariance and tangent kernel, at all positions whose partner lies on the grid, of
p x q pairs of samples (or of p paired samples, q = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from ntkit.base.workers import spread, workers
from ntkit.kernels.infinite.kept_planes import (
    heights_needed,
    kept_elements,
    several_uses,
    shared_out,
    walk_keeps,
)
from ntkit.kernels.infinite.layers import (
    Affine,
    Channels,
    Concat,
    Dropout,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Layer,
    Norm,
    Pointwise,
    Pool,
    PositionMap,
    Product,
    Size,
    Sum,
)
from ntkit.kernels.infinite.position_sums import averaged, mapped
from ntkit.kernels.infinite.positions import Offset, chunks, equal_parts, extent, overlap, sum_of_slices, window
from ntkit.kernels.infinite.sample_sides import Side, State

Result = TypeVar("Result")


@dataclass
class Planes:
    """Values of a graph's layers for two sides.

    paired : sample i of one side with sample i of the other only.
    symmetric : the two sides are the same: the covariance of a sample with itself at offset 0 is its variance.
    tangent : whether to compute the tangent kernel beside the covariance.
    plane_elements : elements of a plane that fit into the caches.
    first : index of the first side's first sample on the second side, if the two sides are the same.
    cache_all : keep the planes of all layers, not only of those that are used several times.
    """

    graph: Graph
    one: Side
    two: Side
    paired: bool
    symmetric: bool
    tangent: bool
    plane_elements: int
    first: int = 0
    cache_all: bool = False

    def __post_init__(self) -> None:
        self.again = several_uses(self.graph)
        self.cache: dict[tuple[int, Offset], Tensor] = {}

    def __call__(self, layer: Layer, offset: Offset = (0, 0)) -> Tensor:
        """A plane that the caller may write into."""
        plane, factor = self.up_to_factor(layer, offset)
        return plane if factor == 1 else plane.mul_(factor)

    def up_to_factor(self, layer: Layer, offset: Offset) -> tuple[Tensor, float]:
        """A plane that the caller may write into and must multiply by the factor."""
        key = (id(layer), offset)
        if key in self.cache:
            return self.cache[key].clone(), 1.0
        if isinstance(layer, Pointwise):
            plane, factor = _pointwise(self, layer, offset)
        else:
            plane, factor = _RULES[type(layer)](self, layer, offset), 1.0
        if self.cache_all or id(layer) in self.again:
            self.cache[key] = plane if factor == 1 else plane.mul_(factor)
            return plane.clone(), 1.0
        return plane, factor

    def subset(self, samples: slice) -> Planes:
        """The same for some of the first side's samples (and, if paired, their partners)."""
        two = self.two.subset(samples) if self.paired else self.two
        first = self.first + samples.start
        return replace(self, one=self.one.subset(samples), two=two, first=first, cache_all=False)

    def discard(self, layer: Layer, height: int) -> None:
        """Drop the planes that no offset of `layer` with this height or more uses."""
        needed = heights_needed(self.graph, layer, (height, max(height, layer.size[0] - 1)))
        for key in [k for k in self.cache if k[0] not in needed or k[1][0] < needed[k[0]][0]]:
            del self.cache[key]

    def states_at(self, offset: Offset, size: Size, state1: State, state2: State) -> tuple[State, State]:
        """States of both sides at the positions of a plane: of the first at p, of the second at p + offset."""
        first, second = window(offset, size)
        one = tuple(t[(..., *first, slice(None), None)] for t in state1)
        if self.paired:
            return one, tuple(t[(..., *second, slice(None), None)] for t in state2)
        return one, tuple(t[(..., *second, None, slice(None))] for t in state2)

    def zeros(self, size: Size) -> Tensor:
        """A plane of zeros."""
        pairs = (self.one.count, 1 if self.paired else self.two.count)
        return next(iter(self.one.data.values())).new_zeros(1 + self.tangent, *size, *pairs)


# ---------------------------------------------------------------------- one rule per layer


def _input(planes: Planes, layer: Input, offset: Offset) -> Tensor:
    first, second = window(offset, layer.size)
    a, b = planes.one.data[layer.key][first], planes.two.data[layer.key][second]
    if layer.channels < a.shape[-1]:  # some of the channels; the data are divided by the root of the number of all
        share = math.sqrt(a.shape[-1] / layer.channels)
        a, b = (t[..., layer.first : layer.first + layer.channels] * share for t in (a, b))
    K = torch.einsum("hwpc,hwpc->hwp", a, b)[..., None] if planes.paired else a @ b.transpose(2, 3)
    return K[None]


def _affine(planes: Planes, layer: Affine, offset: Offset) -> Tensor:
    inner = (offset[0] * layer.stride[0], offset[1] * layer.stride[1])
    factor = 1.0
    if min(extent(inner, layer.source.size)) == 0:  # no partner on the grid: only padding and the bias
        out = planes.zeros(extent(offset, layer.size))
    else:
        out, factor = planes.up_to_factor(layer.source, inner)
        for axis in (0, 1):
            if layer.kernel_size[axis] > 1 or layer.stride[axis] > 1 or layer.padding[axis]:
                out = _summed(out, layer, axis, offset[axis], inner[axis])
    share = factor / math.prod(layer.kernel_size)
    bias, gain = (_number(b, out.dtype, out.device) for b in (layer.bias_var, layer.bias_ntk))
    all_trained = (layer.weight_var, layer.bias_var) == (layer.weight_ntk, layer.bias_ntk)
    K = out[0]
    if planes.tangent and len(out) == 1:  # no trained parameter before
        both = out.new_empty(2, *K.shape)
        torch.add(bias, K, alpha=layer.weight_var * share, out=both[0])
        if all_trained:
            both[1].copy_(both[0])
        else:
            torch.add(gain, K, alpha=layer.weight_ntk * share, out=both[1])
        return both
    if planes.tangent and not all_trained:
        out[1].mul_(layer.weight_var * share).add_(K, alpha=layer.weight_ntk * share).add_(gain)
    torch.add(bias, K, alpha=layer.weight_var * share, out=K)
    if planes.tangent and all_trained:
        torch.add(K, out[1], alpha=layer.weight_var * share, out=out[1])
    return out


@lru_cache(256)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def _summed(x: Tensor, layer: Affine, axis: int, offset: int, inner: int) -> Tensor:
    """Sums over the kernel of a convolution along one axis."""
    n, m = layer.size[axis], layer.source.size[axis]
    start, count = max(0, -offset), n - abs(offset)
    shifts = [t * layer.dilation[axis] - layer.padding[axis] for t in range(layer.kernel_size[axis])]
    slices = [overlap(start, count, max(0, -inner), m - abs(inner), layer.stride[axis], s) for s in shifts]
    return sum_of_slices(x, slices, 1 + axis, count)


def _pointwise(planes: Planes, layer: Pointwise, offset: Offset) -> tuple[Tensor, float]:
    out, norm = planes(layer.source, offset), layer.source
    weighted = len(out) > 1 and layer.weighted is not None
    if weighted and isinstance(norm, Norm) and (offset == (0, 0) or not norm.per_position):
        return _after_norm(planes, layer, norm, offset, out), 1.0
    return _applied(planes, layer, offset, out)


def _after_norm(planes: Planes, layer: Pointwise, norm: Norm, offset: Offset, out: Tensor) -> Tensor:
    """An activation of a trained norm, whose weight contributes E[u s'(u) v s'(v)], not E[u v] E[s' s']."""
    share = norm.weight_ntk / norm.weight_sq
    out[1].sub_(out[0], alpha=share)
    extra = out[:1].clone()
    out, factor = _applied(planes, layer, offset, out)
    out.mul_(factor)
    extra, factor = _applied(planes, layer, offset, extra, weighted=True)
    out[1].add_(extra[0], alpha=share * factor)
    return out


def _applied(
    planes: Planes, layer: Pointwise, offset: Offset, out: Tensor, weighted: bool = False
) -> tuple[Tensor, float]:
    activation, key = (layer.weighted, -id(layer)) if weighted else (layer.activation, id(layer))
    assert activation is not None
    T = out[1] if len(out) > 1 else None
    diagonal = planes.one.diagonal[key] if planes.symmetric and offset == (0, 0) else None
    if diagonal is not None and planes.paired:
        out[0].copy_(diagonal[0][..., None])
        if T is not None:
            T.mul_(diagonal[1][..., None])
        return out, 1.0
    one, two = planes.states_at(offset, layer.size, planes.one.states[key], planes.two.states[key])
    if diagonal is None:
        return out, activation.apply(out[0], T, one, two)
    # the values of each sample with itself are replaced by those without rounding error
    K_diagonal, *T_diagonal = (t.diagonal(planes.first, -2, -1) for t in out)
    tangent = [t.clone() for t in T_diagonal]
    factor = activation.apply(out[0], T, one, two)
    K_diagonal.copy_(diagonal[0] / factor)
    for t, old in zip(T_diagonal, tangent, strict=True):
        t.copy_(old.mul_(diagonal[1]).div_(factor))
    return out, factor


def _sum(planes: Planes, layer: Sum, offset: Offset) -> Tensor:
    total: Tensor | None = None
    for factor, term in layer.terms:
        plane = planes(term, offset)
        if planes.tangent and len(plane) == 1:
            plane = torch.cat([plane, torch.zeros_like(plane)])
        if factor not in (1.0, -1.0):
            plane.mul_(factor**2)
        total = plane if total is None else total.add_(plane)
    assert total is not None
    return total


def _concat(planes: Planes, layer: Concat, offset: Offset) -> Tensor:
    # the mean over channels: the next layer has weights of its own for each
    terms = [(math.sqrt(share), part) for share, part in layer.parts]
    return _sum(planes, Sum(layer.size, layer.name, terms), offset)


def _product(planes: Planes, layer: Product, offset: Offset) -> Tensor:
    one, two = planes(layer.one, offset), planes(layer.two, offset)
    K = one[0] * two[0]
    if not planes.tangent:
        return K[None]
    T = torch.zeros_like(K)
    for a, b in ((one, two), (two, one)):
        if len(a) > 1:
            T.addcmul_(a[1], b[0])
    return torch.stack([K, T])


def _position_map(planes: Planes, layer: PositionMap, offset: Offset) -> Tensor:
    found = mapped(lambda inner: planes(layer.source, inner), layer, offset)
    return planes.zeros(extent(offset, layer.size)) if found is None else found


def _pool(planes: Planes, layer: Pool, offset: Offset) -> Tensor:
    return averaged(lambda inner: planes(layer.source, inner), layer, offset)


def _dropout(planes: Planes, layer: Dropout, offset: Offset) -> Tensor:
    out = planes(layer.source, offset)
    if planes.symmetric and (layer.whole or offset == (0, 0)):  # one mask, multiplied by itself
        same = out if planes.paired else out.diagonal(planes.first, -2, -1)
        same.mul_(layer.scale)
    return out


def _norm(planes: Planes, layer: Norm, offset: Offset) -> Tensor:
    out = planes(layer.source, offset)
    where = (offset, layer.size) if layer.alone else ((0, 0), (1, 1))
    one, two = planes.states_at(*where, planes.one.states[id(layer)], planes.two.states[id(layer)])
    out.mul_(one[0] * two[0])
    K = out[0]
    if len(out) > 1:
        out[1].mul_(layer.weight_sq)
        if not layer.per_position or offset == (0, 0):
            out[1].add_(K, alpha=layer.weight_ntk).add_(layer.bias_ntk)
    K.mul_(layer.weight_sq)
    return out


def _flatten(planes: Planes, layer: Flatten, offset: Offset) -> Tensor:
    return planes(layer.source, (0, 0)).mean((1, 2), keepdim=True)


def _global_pool(planes: Planes, layer: GlobalPool, offset: Offset) -> Tensor:
    """The mean over all pairs of positions: one offset at a time, of as many samples as the caches hold."""
    source = layer.source
    p, q = planes.one.count, 1 if planes.paired else planes.two.count
    parts = equal_parts(p, walked_samples(planes.graph, source, q))
    # of one set with itself, K_-d(i, j) = K_d(j, i): half of the offsets, and the transpose
    half = planes.symmetric and len(parts) == 1
    heights = range(0 if half else 1 - source.size[0], source.size[0])
    totals = []
    for samples in parts:
        rows = walk(planes.subset(samples), source, heights, partial(_row_of_offsets, source, half))
        middle = rows[0].pop(0) if half else None
        total = _total([whole for found in rows for whole in found])
        if middle is not None:
            total = middle if total is None else middle + total + (total if planes.paired else total.mT)
        assert total is not None
        totals.append(total)
    return torch.cat(totals, 3).div_(math.prod(source.size) ** 2)


def walk(planes: Planes, layer: Layer, heights: range, row: Callable[[Planes, int], Result]) -> list[Result]:
    """The results of `row`, one for each height of the offsets of a layer, by workers.

    Where planes are kept for the next offsets, each worker has consecutive heights and keeps its own.
    """
    if not walk_keeps(planes.graph):
        first = sorted(heights, key=abs)  # the expensive ones
        found = dict(zip(first, spread(partial(row, planes), first), strict=True))
        return [found[height] for height in heights]

    def some(part: slice) -> list[Result]:
        own, results = planes.subset(slice(0, planes.one.count)), []
        for height in heights[part]:
            results.append(row(own, height))
            own.discard(layer, height + 1)
        return results

    costs = [layer.size[0] - abs(height) for height in heights]
    on_cpu = next(iter(planes.one.data.values())).device.type == "cpu"
    ranges = shared_out(costs, workers() if on_cpu else 1)
    return [result for results in spread(some, ranges) for result in results]


def walked_samples(graph: Graph, layer: Layer, others: int) -> int:
    """Samples on the first side, beside `others`, whose planes a walk can keep."""
    kept = kept_elements(graph, layer) if walk_keeps(graph) else 0
    return max(1, _KEPT // (kept * others)) if kept else 1 << 30


def _total(terms: list[Tensor]) -> Tensor | None:
    return reduce(torch.Tensor.add_, terms) if terms else None


def _row_of_offsets(layer: Layer, half: bool, planes: Planes, dh: int) -> list[Tensor]:
    """Sums over all positions, and over the offsets of one height; of half of them, that at offset 0 apart, first."""
    height, width = layer.size
    q, keeps = 1 if planes.paired else planes.two.count, walk_keeps(planes.graph)
    middle, total = [], None
    for dw in range(0 if half and dh == 0 else 1 - width, width):
        area = (height - abs(dh)) * (width - abs(dw))
        rows = planes.one.count if keeps else max(1, planes.plane_elements // (area * q))
        sums = []
        for some in chunks(planes.one.count, rows):
            part = planes if keeps else planes.subset(some)
            x, factor = part.up_to_factor(layer, (dh, dw))
            sums.append(x.sum((1, 2), keepdim=True).mul_(factor))
        whole = torch.cat(sums, 3)
        if half and (dh, dw) == (0, 0):
            middle = [whole]
        else:
            total = whole if total is None else total.add_(whole)
    return middle if total is None else [*middle, total]


_KEPT = 1 << 24  # elements of the planes that a worker keeps for the next offsets


_RULES: dict[type[Layer], Callable[[Planes, Any, Offset], Tensor]] = {
    Input: _input,
    Affine: _affine,
    Sum: _sum,
    Norm: _norm,
    Flatten: _flatten,
    Pool: _pool,
    GlobalPool: _global_pool,
    PositionMap: _position_map,
    Concat: _concat,
    Product: _product,
    Dropout: _dropout,
    Channels: lambda planes, layer, offset: planes(layer.source, offset),
}
