"""Kernels carried through the layers, one offset between positions at a time.

A kernel of images is a function of two samples and two positions, p and p + d. Convolutions (with their strides) and
activations never mix offsets d: the values at one offset, a plane, go through the whole network on their own, in the
processor's caches; only pools sum over offsets. So the n^2 (HW)^2 array of all pairs is never formed, and a network
that ends in `Flat` needs one offset of its last layers only.

A plane is [2, height, width, p, q]: covariance and tangent kernel, at all positions whose partner lies on the grid, of
p x q pairs of samples (or of p paired samples, q = 1).

A little over 400 lines: one rule per layer, and what makes a plane of them, are read together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.layers import (
    Everywhere,
    Flat,
    Graph,
    Layer,
    Norm,
    Pointwise,
    Pool,
    Size,
    Source,
    Sum,
    Weights,
    sources,
)

Offset = tuple[int, int]
State = tuple[Tensor, ...]


@dataclass
class Side:
    """Samples of one side: the sources' numbers, [H, W, n, C] each, and what layers need of them, [..., H, W, n]."""

    data: dict[int, Tensor]
    states: dict[int, State] = field(default_factory=dict)
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def part(self, chosen: slice) -> Side:
        """Some of the samples."""
        data = {k: t[:, :, chosen] for k, t in self.data.items()}
        states = {k: tuple(t[..., chosen] for t in s) for k, s in self.states.items()}
        return Side(data, states, {k: (a[..., chosen], b[..., chosen]) for k, (a, b) in self.own.items()})

    @property
    def count(self) -> int:
        """Number of samples."""
        return next(iter(self.data.values())).shape[2]


class Planes:
    """Values of a graph's layers for two sides.

    paired : sample i of one side with sample i of the other only.
    same : the two sides are one: of each sample with itself the covariances at offset 0 are variances.
    first : where the first side's samples begin on the second, if the two sides are one.
    tangent : whether the tangent kernel is wanted, beside the covariance.
    cells : numbers in a plane that stay in the caches.
    """

    def __init__(self, graph: Graph, one: Side, two: Side, paired: bool, same: bool, tangent: bool, cells: int) -> None:
        self.graph, self.one, self.two, self.first = graph, one, two, 0
        self.paired, self.same, self.tangent, self.cells = paired, same, tangent, cells
        self.uses: dict[int, int] = {}
        for layer in graph.layers:
            for source in sources(layer):
                self.uses[id(source)] = self.uses.get(id(source), 0) + 1
            if isinstance(layer, Pool):
                self.uses[id(layer.source)] = 2  # neighbouring offsets take in some of the same planes
        self.kept: dict[tuple[int, Offset], Tensor] = {}
        self.keep_all = False

    def __call__(self, layer: Layer, offset: Offset = (0, 0)) -> Tensor:
        """A plane the caller may write into."""
        plane, factor = self.but_for_a_factor(layer, offset)
        return plane if factor == 1 else plane.mul_(factor)

    def but_for_a_factor(self, layer: Layer, offset: Offset) -> tuple[Tensor, float]:
        """A plane the caller may write into and has to multiply by the factor."""
        key = (id(layer), offset)
        if key in self.kept:
            return self.kept[key].clone(), 1.0
        if isinstance(layer, Pointwise):
            plane, factor = _pointwise(self, layer, offset)
        else:
            plane, factor = _RULES[type(layer)](self, layer, offset), 1.0
        if self.keep_all or self.uses.get(id(layer), 0) > 1:
            self.kept[key] = plane if factor == 1 else plane.mul_(factor)
            return plane.clone(), 1.0
        return plane, factor

    def narrowed(self, chosen: slice) -> Planes:
        """The same for some of the first side's samples (and of their partners)."""
        two = self.two.part(chosen) if self.paired else self.two
        part = Planes(self.graph, self.one.part(chosen), two, self.paired, self.same, self.tangent, self.cells)
        part.first = self.first + chosen.start
        return part

    def forget(self, layer: Layer, first: int) -> None:
        """Drop the planes that offsets of `layer` from the height `first` on have no use for."""
        needed = {id(layer): first}
        for above in reversed(self.graph.layers):
            if id(above) in needed:
                low = needed[id(above)]
                low = low * above.stride[0] if isinstance(above, (Weights, Pool)) else low
                low = low - above.taps[0] + 1 if isinstance(above, Pool) else low
                for source in sources(above):
                    needed[id(source)] = min(low, needed.get(id(source), low))
        for key in [k for k in self.kept if k[1][0] < needed.get(k[0], first)]:
            del self.kept[key]

    def sides(self, offset: Offset, size: Size, state1: State, state2: State) -> tuple[State, State]:
        """States of both sides where a plane has them: at p and at p + offset."""
        first, second = _window(offset, size)
        one = tuple(t[(..., *first, slice(None), None)] for t in state1)
        if self.paired:
            return one, tuple(t[(..., *second, slice(None), None)] for t in state2)
        return one, tuple(t[(..., *second, None, slice(None))] for t in state2)


def _window(offset: Offset, size: Size) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Positions p of a plane, and their partners p + offset."""
    first = tuple(slice(max(0, -d), min(n, n - d)) for d, n in zip(offset, size, strict=True))
    second = tuple(slice(max(0, d), min(n, n + d)) for d, n in zip(offset, size, strict=True))
    return first, second  # pyrefly: ignore


def extent(offset: Offset, size: Size) -> Size:
    """Height and width of a plane."""
    return max(0, size[0] - abs(offset[0])), max(0, size[1] - abs(offset[1]))


# ---------------------------------------------------------------------- one rule per layer


def _source(planes: Planes, layer: Source, offset: Offset) -> Tensor:
    first, second = _window(offset, layer.size)
    a, b = planes.one.data[layer.place][first], planes.two.data[layer.place][second]
    K = torch.einsum("hwpc,hwpc->hwp", a, b)[..., None] if planes.paired else a @ b.transpose(2, 3)
    return K[None]


def _weights(planes: Planes, layer: Weights, offset: Offset) -> Tensor:
    inner = (offset[0] * layer.stride[0], offset[1] * layer.stride[1])
    factor = 1.0
    if min(extent(inner, layer.source.size)) == 0:  # far apart: only zeros and the bias meet
        pairs = (planes.one.count, 1 if planes.paired else planes.two.count)
        like = next(iter(planes.one.data.values()))
        out = like.new_zeros(1 + planes.tangent, *extent(offset, layer.size), *pairs)
    else:
        out, factor = planes.but_for_a_factor(layer.source, inner)
        for axis in (0, 1):
            if layer.taps[axis] > 1 or layer.stride[axis] > 1 or layer.before[axis]:
                out = _summed(out, layer, axis, offset[axis], inner[axis])
    share = factor / math.prod(layer.taps)
    bias, gain = (out.new_tensor(b) for b in (layer.bias, layer.bias_gain))
    K = out[0]
    if not planes.tangent:
        torch.add(bias, K, alpha=layer.weight * share, out=K)
        return out
    if len(out) == 1:  # nothing trained before
        T = torch.add(gain, K, alpha=layer.weight_gain * share)
        return torch.stack([torch.add(bias, K, alpha=layer.weight * share), T])
    T = out[1]
    if (layer.weight, layer.bias) == (layer.weight_gain, layer.bias_gain):
        torch.add(bias, K, alpha=layer.weight * share, out=K)
        torch.add(K, T, alpha=layer.weight * share, out=T)
    else:
        T.mul_(layer.weight * share).add_(K, alpha=layer.weight_gain * share).add_(gain)
        torch.add(bias, K, alpha=layer.weight * share, out=K)
    return out


def _overlap(
    start: int, count: int, inner_start: int, inner_count: int, stride: int, shift: int
) -> tuple[slice, slice]:
    """Where position stride * o + shift of outputs o lies on an inner plane: their places on both planes."""
    low = max(start, -(-(inner_start - shift) // stride))
    high = min(start + count, (inner_start + inner_count - 1 - shift) // stride + 1)
    if high <= low:
        return slice(0, 0), slice(0, 0)
    begin = stride * low + shift - inner_start
    return slice(low - start, high - start), slice(begin, begin + stride * (high - low - 1) + 1, stride)


def _summed(x: Tensor, layer: Weights, axis: int, offset: int, inner: int) -> Tensor:
    """Sums over the taps of a convolution along one axis."""
    n, m = layer.size[axis], layer.source.size[axis]
    start, count = max(0, -offset), n - abs(offset)
    shifts = [t * layer.dilation[axis] - layer.before[axis] for t in range(layer.taps[axis])]
    places = [_overlap(start, count, max(0, -inner), m - abs(inner), layer.stride[axis], s) for s in shifts]
    return _accumulated(x, places, 1 + axis, count)


def _accumulated(x: Tensor, places: list[tuple[slice, slice]], dim: int, count: int) -> Tensor:
    """Sum of slices of x along an axis, each put in its place."""
    whole = [p for p in places if p[0].stop - p[0].start == count and count > 0]
    some = [p for p in places if p not in whole and p[0].stop > p[0].start]

    def at(t: Tensor, s: slice) -> Tensor:
        if s.step in (None, 1):
            return t.narrow(dim, s.start, s.stop - s.start)
        return t[(slice(None),) * dim + (s,)]

    if len(whole) >= 2:
        out = at(x, whole[0][1]) + at(x, whole[1][1])
        whole = whole[2:]
    elif len(whole) == 1:
        middle = whole.pop()
        if some and all(p[1].step == 1 for p in some):
            # both of the first two places as one pass: the rest of the axis is copied
            (o, i), *some = some
            out = torch.empty_like(at(x, middle[1]))
            torch.add(at(at(x, middle[1]), o), at(x, i), out=at(out, o))
            for rest in (slice(0, o.start), slice(o.stop, count)):
                if rest.stop > rest.start:
                    at(out, rest).copy_(at(at(x, middle[1]), rest))
        else:
            out = at(x, middle[1]).clone()
    else:
        shape = list(x.shape)
        shape[dim] = count
        out = x.new_zeros(shape)
    for o, i in (*whole, *some):
        at(out, o).add_(at(x, i))
    return out


def _pointwise(planes: Planes, layer: Pointwise, offset: Offset) -> tuple[Tensor, float]:
    out = planes(layer.source, offset)
    T = out[1] if len(out) > 1 else None
    if T is not None and isinstance(s := layer.source, Norm) and layer.weighted is not None:
        if offset != (0, 0) and s.by_position:
            return _applied(planes, layer, offset, out)
        return _behind_norm(planes, layer, offset, out), 1.0
    return _applied(planes, layer, offset, out)


def _behind_norm(planes: Planes, layer: Pointwise, offset: Offset, out: Tensor) -> Tensor:
    """An activation of a trained norm: the share of the norm's weight is E[u s'(u) v s'(v)], not E[u v] E[s' s']."""
    share = layer.source.scale_gain / layer.source.scale  # pyrefly: ignore
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
    own = planes.one.own[key] if planes.same and offset == (0, 0) else None
    if own is not None and planes.paired:
        out[0].copy_(own[0][..., None])
        if T is not None:
            T.mul_(own[1][..., None])
        return out, 1.0
    one, two = planes.sides(offset, layer.size, planes.one.states[key], planes.two.states[key])
    if own is None:
        return out, activation.apply(out[0], T, one, two)
    # of each sample with itself without rounding
    shown = [None if t is None else t.diagonal(planes.first, -2, -1) for t in (out[0], T)]
    tangent = None if shown[1] is None else shown[1].clone()
    factor = activation.apply(out[0], T, one, two)
    shown[0].copy_(own[0] / factor)  # pyrefly: ignore
    if tangent is not None:
        shown[1].copy_(tangent.mul_(own[1]).div_(factor))  # pyrefly: ignore
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


def _norm(planes: Planes, layer: Norm, offset: Offset) -> Tensor:
    out = planes(layer.source, offset)
    one, two = planes.sides((0, 0), (1, 1), planes.one.states[id(layer)], planes.two.states[id(layer)])
    out.mul_(one[0] * two[0])
    K = out[0]
    if len(out) > 1:
        out[1].mul_(layer.scale)
        if not layer.by_position or offset == (0, 0):
            out[1].add_(K, alpha=layer.scale_gain).add_(layer.shift_gain)
    K.mul_(layer.scale)
    return out


def _flat(planes: Planes, layer: Flat, offset: Offset) -> Tensor:
    return planes(layer.source, (0, 0)).mean((1, 2), keepdim=True)


def _pool(planes: Planes, layer: Pool, offset: Offset) -> Tensor:
    ranges = [range(s * d - k + 1, s * d + k) for s, d, k in zip(layer.stride, offset, layer.taps, strict=True)]
    count = extent(offset, layer.size)
    total: Tensor | None = None
    for dh in ranges[0]:
        for dw in ranges[1]:
            if min(extent((dh, dw), layer.source.size)) == 0:
                continue
            x = planes(layer.source, (dh, dw))
            for axis, inner in ((0, dh), (1, dw)):
                stride, m = layer.stride[axis], layer.source.size[axis]
                apart = inner - stride * offset[axis]  # of the two places in their windows
                taps = range(max(0, -apart), min(layer.taps[axis], layer.taps[axis] - apart))
                start = max(0, -offset[axis])
                places = [
                    _overlap(start, count[axis], max(0, -inner), m - abs(inner), stride, t - layer.before[axis])
                    for t in taps
                ]
                x = _accumulated(x, places, 1 + axis, count[axis])
            total = x if total is None else total.add_(x)
    assert total is not None
    return total.div_(layer.divisor**2)


def _everywhere(planes: Planes, layer: Everywhere, offset: Offset) -> Tensor:
    """The mean over all pairs of positions: every offset on its own, as many samples at a time as the caches hold."""
    height, width = layer.source.size
    p, q = planes.one.count, 1 if planes.paired else planes.two.count
    pools = [k for k in planes.graph.layers if isinstance(k, Pool)]
    before = sum(math.prod(k.source.size) for k in pools)  # planes kept for the next offsets, by their positions
    # of one set with itself, K_-d(i, j) = K_d(j, i): half of the offsets, and the transpose
    chunks = _parts(p, max(1, _KEPT // (6 * width * before * q)) if before else p)
    half = planes.same and len(chunks) == 1
    totals = []
    for chosen in chunks:
        inner = planes.narrowed(chosen)
        total, middle = None, None
        for dh in range(0 if half else 1 - height, height):
            for dw in range(0 if half and dh == 0 else 1 - width, width):
                area = (height - abs(dh)) * (width - abs(dw))
                rows = inner.one.count if before else max(1, planes.cells // (area * q))
                found = []
                for few in _parts(inner.one.count, rows):
                    part = inner if before else inner.narrowed(few)
                    x, factor = part.but_for_a_factor(layer.source, (dh, dw))
                    found.append(x.sum((1, 2), keepdim=True).mul_(factor))
                whole = torch.cat(found, 3)
                if half and (dh, dw) == (0, 0):
                    middle = whole
                else:
                    total = whole if total is None else total.add_(whole)
            inner.forget(layer.source, dh + 1)
        if middle is not None:
            total = middle if total is None else middle + total + (total if planes.paired else total.mT)
        assert total is not None
        totals.append(total)
    return torch.cat(totals, 3).div_((height * width) ** 2)


_KEPT = 1 << 23  # numbers in planes kept for the offsets to come


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


_RULES: dict[type[Layer], Callable[[Planes, Any, Offset], Tensor]] = {
    Source: _source,
    Weights: _weights,
    Sum: _sum,
    Norm: _norm,
    Flat: _flat,
    Pool: _pool,
    Everywhere: _everywhere,
}


# ---------------------------------------------------------------------- one side


def prepared(graph: Graph, data: dict[int, Tensor], cells: int) -> Side:
    """A side with what its layers need of it: variances, from the first layer to the last."""
    side = Side(data)
    planes = Planes(graph, side, side, paired=True, same=True, tangent=False, cells=cells)
    planes.keep_all = True
    for layer in graph.layers:
        if isinstance(layer, Pointwise):
            v = planes(layer.source)[0][..., 0]
            _check_range(layer, v)
            side.states[id(layer)], side.own[id(layer)] = layer.activation.state(v), layer.activation.own(v)
            if layer.weighted is not None:
                side.states[-id(layer)], side.own[-id(layer)] = layer.weighted.state(v), layer.weighted.own(v)
        elif isinstance(layer, Norm):
            v = planes(layer.source)[0][..., 0]
            side.states[id(layer)] = ((v.mean((0, 1), keepdim=True) + layer.eps).rsqrt(),)
    return side


def _check_range(layer: Layer, v: Tensor) -> None:
    """Refuse variances whose products would overflow, or vanish although the variances do not."""
    info = torch.finfo(v.dtype)
    largest = v.amax((0, 1))
    if not bool((largest < info.max**0.5 / 4).all()) or bool(((largest > 0) & (largest < 10 * info.tiny**0.5)).any()):
        raise refusal(
            layer.name,
            got=f"variances from {float(largest.min()):.0e} to {float(largest.max()):.0e} in {v.dtype}",
            expected="values whose fourth powers the dtype can hold",
            fix="Scale the data, or pass them in float64.",
        )
