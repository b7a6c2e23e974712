"""The layers of `planes` once more, out of place: values that autograd follows, one offset between positions at a time.

Slower than `planes` and with a memory of each plane, so it runs only where a gradient is wanted. Variances of weights
and biases are those of the layers times two tensors: the squares of `w_std` and `b_std`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.activations import Activation
from ntkit.kernels.infinite.differentiable_moments import has_derivatives, moments, moments_of_one
from ntkit.kernels.infinite.kept_planes import splits
from ntkit.kernels.infinite.layers import (
    Affine,
    Channels,
    Concat,
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
from ntkit.kernels.infinite.positions import Offset, extent, mapped_from, overlap, window
from ntkit.kernels.infinite.prepared_sides import check_range

Plane = tuple[Tensor, Tensor | None]  # covariance and tangent kernel, [h, w, p, q] each; None: 0 so far
_WITHOUT = "Pass samples and stds that do not require grad, or call the kernel in torch.no_grad()."


@dataclass
class Scales:
    """Squares of `w_std` and `b_std`, by which the layers' variances are multiplied."""

    weight: Tensor
    bias: Tensor


@dataclass
class Half:
    """One side of a kernel.

    data : values of the input layers, [H, W, n, C] each, by index on the tape.
    labels : equal integers for equal samples, [n].
    variances : by the id of an activation or a norm, those of its source, [H, W, n].
    """

    data: dict[int, Tensor]
    labels: Tensor
    variances: dict[int, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.labels)


@dataclass
class DifferentiablePlanes:
    """Values of a graph's layers for two sides, as `Planes`.

    paired : sample i of one side with sample i of the other only.
    tangent : whether to compute the tangent kernel beside the covariance.
    """

    graph: Graph
    one: Half
    two: Half
    scales: Scales
    paired: bool
    tangent: bool

    def __post_init__(self) -> None:
        a, b = self.one.labels[:, None], self.two.labels
        self.same = a == (b[:, None] if self.paired else b)
        self.own = self.paired and self.one is self.two
        self.cache: dict[tuple[int, Offset], Plane] = {}

    def __call__(self, layer: Layer, offset: Offset = (0, 0)) -> Plane:
        """The plane of a layer at an offset; computed once."""
        key = (id(layer), offset)
        if key not in self.cache:
            rule = _RULES.get(type(layer))
            if rule is None:
                raise _without_derivatives(layer.name, type(layer).__name__)
            self.cache[key] = rule(self, layer, offset)
        return self.cache[key]

    def output(self) -> Tensor:
        """The kernel, [p, q]; of pairs [p, 1]."""
        K, T = self(self.graph.layers[self.graph.output])
        return (K if T is None else T)[0, 0]

    def alike(self) -> DifferentiablePlanes:
        """The same with an empty cache."""
        return DifferentiablePlanes(self.graph, self.one, self.two, self.scales, self.paired, self.tangent)

    def zeros(self, size: Size) -> Plane:
        """A plane of values without a partner."""
        like = next(iter(self.one.data.values()))
        K = like.new_zeros(*size, self.one.count, 1 if self.paired else self.two.count)
        return K, torch.zeros_like(K) if self.tangent else None

    def at(self, offset: Offset, size: Size, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the sides at the positions of a plane: of the first at p, of the second at p + offset."""
        first, second = window(offset, size)
        a, b = one[first][..., :, None], two[second]
        return a, b[..., :, None] if self.paired else b[..., None, :]


def variances(graph: Graph, data: dict[int, Tensor], labels: Tensor, scales: Scales) -> Half:
    """One side, with the variances at its activations and norms, from the first layer to the last."""
    half = Half(data, labels)
    planes = DifferentiablePlanes(graph, half, half, scales, paired=True, tangent=False)
    for layer in graph.layers:
        if isinstance(layer, (Pointwise, Norm)):
            half.variances[id(layer)] = planes(layer.source)[0][..., 0]
            if isinstance(layer, Pointwise):
                check_range(layer, half.variances[id(layer)].detach())
    return half


def check_derivatives(graph: Graph) -> None:
    """Refuse, by its name, a layer without derivatives here."""
    for layer in graph.layers:
        if type(layer) not in _RULES:
            raise _without_derivatives(layer.name, type(layer).__name__)
        for activation in (layer.activation, layer.weighted) if isinstance(layer, Pointwise) else ():
            if activation is not None and not has_derivatives(activation):
                raise _without_derivatives(layer.name, f"an activation without them ({activation.name})")


def _without_derivatives(name: str, got: str) -> Exception:
    expected = (
        "a layer whose derivatives are known (activations: ReLU and its kind, erf, GELU, polynomials, exponentials, "
        "sin, cos, bells)"
    )
    return refusal(name, got=f"gradients of the kernel through {got}", expected=expected, fix=_WITHOUT)


# ---------------------------------------------------------------------- one rule per layer


def _both(planes: DifferentiablePlanes, function: Callable[[Tensor], Tensor], plane: Plane) -> Plane:
    return function(plane[0]), None if plane[1] is None else function(plane[1])


def _input(planes: DifferentiablePlanes, layer: Input, offset: Offset) -> Plane:
    first, second = window(offset, layer.size)
    a, b = planes.one.data[layer.key][first], planes.two.data[layer.key][second]
    if layer.channels < a.shape[-1]:
        share = math.sqrt(a.shape[-1] / layer.channels)
        a, b = (t[..., layer.first : layer.first + layer.channels] * share for t in (a, b))
    return (torch.einsum("hwpc,hwpc->hwp", a, b)[..., None] if planes.paired else a @ b.transpose(2, 3)), None


def _affine(planes: DifferentiablePlanes, layer: Affine, offset: Offset) -> Plane:
    inner = (offset[0] * layer.stride[0], offset[1] * layer.stride[1])
    if min(extent(inner, layer.source.size)) == 0:  # no partner on the grid: only padding and the bias
        K, T = planes.zeros(extent(offset, layer.size))
    else:
        K, T = planes(layer.source, inner)
        for axis in (0, 1):
            if layer.kernel_size[axis] > 1 or layer.stride[axis] > 1 or layer.padding[axis]:
                n, m = layer.size[axis], layer.source.size[axis]
                start, count = max(0, -offset[axis]), n - abs(offset[axis])
                shifts = [t * layer.dilation[axis] - layer.padding[axis] for t in range(layer.kernel_size[axis])]
                low, length = max(0, -inner[axis]), m - abs(inner[axis])
                slices = [overlap(start, count, low, length, layer.stride[axis], s) for s in shifts]
                K, T = _both(planes, lambda x, axis=axis, s=slices, n=count: _summed(x, s, axis, n), (K, T))
    w, b = planes.scales.weight / math.prod(layer.kernel_size), planes.scales.bias
    new = w * layer.weight_var * K + b * layer.bias_var
    if not planes.tangent:
        return new, None
    own = w * layer.weight_ntk * K + b * layer.bias_ntk
    return new, own if T is None else w * layer.weight_var * T + own


def _summed(x: Tensor, slices: list[tuple[slice, slice]], dim: int, count: int) -> Tensor:
    """As `sum_of_slices`: the second of each pair of slices of x, added at the first."""
    total = x.new_zeros(*x.shape[:dim], count, *x.shape[dim + 1 :])
    for out, source in slices:
        if out.stop > out.start:
            part = x[(slice(None),) * dim + (source,)]
            behind = (0, 0) * (x.dim() - 1 - dim)
            total = total + F.pad(part, (*behind, out.start, count - out.stop))
    return total


def _pointwise(planes: DifferentiablePlanes, layer: Pointwise, offset: Offset) -> Plane:
    (c, T), norm = planes(layer.source, offset), layer.source
    v1, v2 = planes.one.variances[id(layer)], planes.two.variances[id(layer)]
    a, b = planes.at(offset, layer.size, v1, v2)

    def of(activation: Activation) -> tuple[Tensor, Tensor]:
        if planes.own and offset == (0, 0):
            return moments_of_one(activation, c)
        return moments(activation, a, b, c, planes.same if offset == (0, 0) else None)

    K, slope = of(layer.activation)
    if T is None:
        return K, None
    if layer.weighted is not None and isinstance(norm, Norm) and (offset == (0, 0) or not norm.per_position):
        # the norm's weight contributes E[u s'(u) v s'(v)], not E[u v] E[s' s']
        share = norm.weight_ntk / norm.weight_sq
        return K, (T - share * c) * slope + share * of(layer.weighted)[0]
    return K, T * slope


def _sum(planes: DifferentiablePlanes, layer: Sum, offset: Offset) -> Plane:
    return _weighted_sum([(factor**2, planes(term, offset)) for factor, term in layer.terms])


def _concat(planes: DifferentiablePlanes, layer: Concat, offset: Offset) -> Plane:
    return _weighted_sum([(share, planes(part, offset)) for share, part in layer.parts])


def _weighted_sum(terms: list[tuple[float, Plane]]) -> Plane:
    K = sum(w * plane[0] for w, plane in terms)
    tangents = [w * plane[1] for w, plane in terms if plane[1] is not None]
    return K, sum(tangents) if tangents else None  # pyrefly: ignore


def _product(planes: DifferentiablePlanes, layer: Product, offset: Offset) -> Plane:
    (K1, T1), (K2, T2) = planes(layer.one, offset), planes(layer.two, offset)
    tangents = [T * K for T, K in ((T1, K2), (T2, K1)) if T is not None]
    return K1 * K2, sum(tangents) if tangents else None  # pyrefly: ignore


def _position_map(planes: DifferentiablePlanes, layer: PositionMap, offset: Offset) -> Plane:
    height, width = offset[::-1] if layer.exchanged else offset
    terms: list[tuple[float, Plane]] = []
    for dh, rows in mapped_from(layer, 0, height):
        for dw, columns in mapped_from(layer, 1, width):

            def mapped(x: Tensor, rows: Tensor = rows, columns: Tensor = columns) -> Tensor:
                return torch.einsum("oh,hwpq,vw->ovpq", rows.to(x), x, columns.to(x))

            terms.append((1.0, _both(planes, mapped, planes(layer.source, (dh, dw)))))
    if not terms:  # nothing but padding
        terms.append((1.0, planes.zeros(extent((height, width), layer.size[::-1] if layer.exchanged else layer.size))))
    plane = _weighted_sum(terms)
    return _both(planes, lambda x: x.transpose(0, 1), plane) if layer.exchanged else plane


def _norm(planes: DifferentiablePlanes, layer: Norm, offset: Offset) -> Plane:
    of = [half.variances[id(layer)] for half in (planes.one, planes.two)]
    scales = [((v if layer.alone else v.mean((0, 1), keepdim=True)) + layer.eps).rsqrt() for v in of]
    one, two = planes.at(*((offset, layer.size) if layer.alone else ((0, 0), (1, 1))), scales[0], scales[1])
    K, T = _both(planes, lambda x: x * (one * two), planes(layer.source, offset))
    if T is not None:
        T = layer.weight_sq * T
        if not layer.per_position or offset == (0, 0):
            T = T + layer.weight_ntk * K + layer.bias_ntk
    return layer.weight_sq * K, T


def _flatten(planes: DifferentiablePlanes, layer: Flatten, offset: Offset) -> Plane:
    return _both(planes, lambda x: x.mean((0, 1), keepdim=True), planes(layer.source))


def _pool(planes: DifferentiablePlanes, layer: Pool, offset: Offset) -> Plane:
    ranges = [range(s * d - k + 1, s * d + k) for s, d, k in zip(layer.stride, offset, layer.kernel_size, strict=True)]
    count = extent(offset, layer.size)
    terms: list[tuple[float, Plane]] = []
    for dh in ranges[0]:
        for dw in ranges[1]:
            if min(extent((dh, dw), layer.source.size)) == 0:
                continue
            plane = planes(layer.source, (dh, dw))
            for axis, inner in ((0, dh), (1, dw)):
                stride, m = layer.stride[axis], layer.source.size[axis]
                apart = inner - stride * offset[axis]  # distance of the two positions within their windows
                shared = range(max(0, -apart), min(layer.kernel_size[axis], layer.kernel_size[axis] - apart))
                low, length, start = max(0, -inner), m - abs(inner), max(0, -offset[axis])
                slices = [overlap(start, count[axis], low, length, stride, t - layer.padding[axis]) for t in shared]
                plane = _both(planes, lambda x, axis=axis, s=slices: _summed(x, s, axis, count[axis]), plane)
            terms.append((1 / layer.divisor**2, plane))
    return _weighted_sum(terms)


def _global_pool(planes: DifferentiablePlanes, layer: GlobalPool, offset: Offset) -> Plane:
    """The mean over all pairs of positions, one row of offsets at a time: its planes are computed again backwards.

    Of one set with itself, K_-d(i, j) = K_d(j, i): half of the offsets, and the transpose.
    """
    height, width = layer.source.size
    apart, half = splits(planes.graph) and height > 1, planes.one is planes.two
    share = 1 / (height * width) ** 2

    def row(dh: int, columns: range) -> Plane:
        inner = planes.alike() if apart else planes
        found = [inner(layer.source, (dh, dw)) for dw in columns]
        return _weighted_sum([(share, _both(inner, lambda x: x.sum((0, 1), keepdim=True), p)) for p in found])

    def total(dh: int, columns: range) -> Plane:
        return checkpoint(row, dh, columns, **_AGAIN) if apart else row(dh, columns)  # pyrefly: ignore

    heights = range(1 if half else 1 - height, height)
    rows = [total(dh, range(1 - width, width)) for dh in heights]
    if not half:
        return _weighted_sum([(1.0, plane) for plane in rows])
    rows += [total(0, range(1, width))] if width > 1 else []
    turned = [_both(planes, lambda x: x if planes.paired else x.mT, plane) for plane in rows]
    return _weighted_sum([(1.0, plane) for plane in (total(0, range(1)), *rows, *turned)])


_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}

_RULES: dict[type[Layer], Callable[[DifferentiablePlanes, Any, Offset], Plane]] = {
    Input: _input,
    Affine: _affine,
    Pointwise: _pointwise,
    Sum: _sum,
    Norm: _norm,
    Flatten: _flatten,
    Pool: _pool,
    GlobalPool: _global_pool,
    PositionMap: _position_map,
    Concat: _concat,
    Product: _product,
    Channels: lambda planes, layer, offset: planes(layer.source, offset),
}
