"""Positions on a grid and offsets between them: index ranges, and sums of slices."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.kernels.infinite.layers import PositionMap, Size

Offset = tuple[int, int]


def window(offset: Offset, size: Size) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Positions p on the grid for which p + offset is on the grid, and these partners."""
    first = tuple(slice(max(0, -d), min(n, n - d)) for d, n in zip(offset, size, strict=True))
    second = tuple(slice(max(0, d), min(n, n + d)) for d, n in zip(offset, size, strict=True))
    return first, second  # pyrefly: ignore


def extent(offset: Offset, size: Size) -> Size:
    """Height and width of the window."""
    return max(0, size[0] - abs(offset[0])), max(0, size[1] - abs(offset[1]))


def chunks(count: int, size: int) -> list[slice]:
    """Consecutive ranges of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def equal_parts(count: int, most: int) -> list[slice]:
    """Consecutive ranges of at most `most`, of about equal size."""
    return chunks(count, -(-count // -(-count // most)))


def mapped_from(layer: PositionMap, axis: int, offset: int) -> list[tuple[int, Tensor]]:
    """Along an axis: offsets of the source that a linear map takes to an offset of its result, each with its matrix.

    The covariance of results o and o + offset is the sum over sources i and j of matrix[o, i] matrix[o + offset, j]
    times theirs; i and j = i + d have offset d. The matrix of d is [o, i], of those whose partner is on the grid.
    """
    if (axis, offset) in layer.by_offset:
        return layer.by_offset[axis, offset]
    matrix = layer.maps[axis]
    n, m = matrix.shape
    one, two = matrix[max(0, -offset) : n - max(0, offset)], matrix[max(0, offset) : n - max(0, -offset)]
    found = []
    for d in range(1 - m, m):
        first, second = max(0, -d), max(0, d)
        weights = one[:, first : m - second] * two[:, second : m - first]
        if weights.any():
            found.append((d, weights))
    layer.by_offset[axis, offset] = found
    return found


def overlap(start: int, count: int, inner_start: int, inner_count: int, stride: int, shift: int) -> tuple[slice, slice]:
    """Outputs o whose position stride * o + shift is on an inner plane: their indices on both planes."""
    low = max(start, -(-(inner_start - shift) // stride))
    high = min(start + count, (inner_start + inner_count - 1 - shift) // stride + 1)
    if high <= low:
        return slice(0, 0), slice(0, 0)
    begin = stride * low + shift - inner_start
    return slice(low - start, high - start), slice(begin, begin + stride * (high - low - 1) + 1, stride)


def sum_of_slices(x: Tensor, slices: list[tuple[slice, slice]], dim: int, count: int) -> Tensor:
    """Sum along an axis of `count` outputs: for each pair of slices, the second of x added to the first of the sum."""
    whole = [p for p in slices if p[0].stop - p[0].start == count and count > 0]
    partial = [p for p in slices if p not in whole and p[0].stop > p[0].start]

    def at(t: Tensor, s: slice) -> Tensor:
        if s.step in (None, 1):
            return t.narrow(dim, s.start, s.stop - s.start)
        return t[(slice(None),) * dim + (s,)]

    if len(whole) >= 2:
        out = at(x, whole[0][1]) + at(x, whole[1][1])
        whole = whole[2:]
    elif len(whole) == 1:
        middle = at(x, whole.pop()[1])
        if partial and all(p[1].step == 1 for p in partial):
            # the first two terms in one pass over memory; the rest of the axis is copied
            (o, i), *partial = partial
            out = torch.empty_like(middle)
            torch.add(at(middle, o), at(x, i), out=at(out, o))
            for rest in (slice(0, o.start), slice(o.stop, count)):
                if rest.stop > rest.start:
                    at(out, rest).copy_(at(middle, rest))
        else:
            out = middle.clone()
    else:
        out = x.new_zeros(*x.shape[:dim], count, *x.shape[dim + 1 :])
    for o, i in (*whole, *partial):
        at(out, o).add_(at(x, i))
    return out
