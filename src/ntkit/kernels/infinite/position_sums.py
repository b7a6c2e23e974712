"""Planes of layers that add up positions, from the planes of their source at several offsets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ntkit.kernels.infinite.layers import Pool, PositionMap
from ntkit.kernels.infinite.positions import Offset, extent, mapped_from, overlap, sum_of_slices


def mapped(plane: Callable[[Offset], Tensor], layer: PositionMap, offset: Offset) -> Tensor | None:
    """A plane of a linear map of positions from those of its source; None where there is nothing but padding."""
    height, width = offset[::-1] if layer.exchanged else offset
    total: Tensor | None = None
    for dh, rows in mapped_from(layer, 0, height):
        for dw, columns in mapped_from(layer, 1, width):
            x = plane((dh, dw))
            x = torch.einsum("oh,thwpq->towpq", rows.to(x), x)
            x = torch.einsum("ow,thwpq->thopq", columns.to(x), x)
            total = x if total is None else total.add_(x)
    if total is None:
        return None
    return total.transpose(1, 2).contiguous() if layer.exchanged else total


def averaged(plane: Callable[[Offset], Tensor], layer: Pool, offset: Offset) -> Tensor:
    """A plane of averages over windows from those of its source."""
    ranges = [range(s * d - k + 1, s * d + k) for s, d, k in zip(layer.stride, offset, layer.kernel_size, strict=True)]
    count = extent(offset, layer.size)
    total: Tensor | None = None
    for dh in ranges[0]:
        for dw in ranges[1]:
            if min(extent((dh, dw), layer.source.size)) == 0:
                continue
            x = plane((dh, dw))
            for axis, inner in ((0, dh), (1, dw)):
                stride, m = layer.stride[axis], layer.source.size[axis]
                apart = inner - stride * offset[axis]  # distance of the two positions within their windows
                shared = range(max(0, -apart), min(layer.kernel_size[axis], layer.kernel_size[axis] - apart))
                start = max(0, -offset[axis])
                slices = [
                    overlap(start, count[axis], max(0, -inner), m - abs(inner), stride, t - layer.padding[axis])
                    for t in shared
                ]
                x = sum_of_slices(x, slices, 1 + axis, count[axis])
            total = x if total is None else total.add_(x)
    assert total is not None
    return total.div_(layer.divisor**2)
