"""Values of the limit without an autograd graph, tile by tile: of all pairs of samples, or of paired ones."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ntkit.base.workers import spread, workers
from ntkit.kernels.infinite.all_pairs import AllPairs, mixes
from ntkit.kernels.infinite.kept_planes import walk_keeps
from ntkit.kernels.infinite.layers import Flatten, Graph, Layer
from ntkit.kernels.infinite.limit_tiles import (
    BATCH,
    BATCH_OF_GRIDS,
    CACHE_BYTES,
    check_size,
    each,
    extend_tables,
    inexact,
    plane_elements,
    positions,
    side_of,
    state_size,
    table_versions,
    tile_size,
    walks,
    warn_of_errors,
)
from ntkit.kernels.infinite.planes import Planes, walk, walked_samples
from ntkit.kernels.infinite.positions import equal_parts
from ntkit.kernels.infinite.sample_sides import Side

Data = dict[int, Tensor]  # samples at the input layers, [H, W, n, C], by index on the tape


def matrix(graph: Graph, data1: Data, data2: Data | None, tangent: bool, out: Tensor) -> Tensor:
    """k(x1, x2) written into `out`, [n1, n2]; exactly symmetric for data2 = None."""
    same, data2 = data2 is None, data1 if data2 is None else data2
    like, (n1, n2) = next(iter(data1.values())), out.shape
    size = tile_size(graph, like, n1, n2)
    tiles = [(i, j) for i in range(0, n1, size) for j in range(i if same else 0, n2, size)]
    spread_within = walks(graph) and len(tiles) < 2 * workers()  # else whole tiles are spread

    @lru_cache(max(4, int(CACHE_BYTES / (8 * size * state_size(graph)))))
    def side(second: bool, start: int) -> Side:
        return side_of(graph, data2 if second else data1, slice(start, start + size))

    def tile(at: tuple[int, int]) -> float:
        i, j = at
        with torch.no_grad():
            one, two = spread(lambda which: side(*which), [(False, i), (not same, j)])
            block = _values(graph, one, two, False, same and i == j, tangent)
            out[i : i + size, j : j + size] = block
            return max(abs(float(end)) for end in block.aminmax())

    versions = extend_tables(graph, data1, data2)
    sizes = each(tile, tiles, like, spread_within)
    if same:
        for i in range(0, n1, size):
            out[i : i + size, :i] = out[:i, i : i + size].T
            block = out[i : i + size, i : i + size]
            block.copy_(block.triu() + block.triu(1).T)
    if table_versions(graph) != versions:  # another thread extended a table
        return matrix(graph, data1, None if same else data2, tangent, out)
    check_size(max(sizes), out.dtype)
    warn_of_errors(inexact(graph))
    return out


def pairs(graph: Graph, data1: Data, data2: Data | None, tangent: bool, dtype: torch.dtype) -> Tensor:
    """k(x1_i, x2_i), [n], in this dtype."""
    same, data2 = data2 is None, data1 if data2 is None else data2
    like = next(iter(data1.values()))
    n = like.shape[2]
    out = torch.empty(n, dtype=like.dtype, device=like.device)
    size = BATCH if positions(graph) == 1 else BATCH_OF_GRIDS

    def batch(start: int) -> None:
        samples = slice(start, start + size)
        with torch.no_grad():
            one = side_of(graph, data1, samples)
            two = one if same else side_of(graph, data2, samples)
            out[samples] = _values(graph, one, two, True, same, tangent)

    starts, versions = list(range(0, n, size)), extend_tables(graph, data1, data2)
    each(batch, starts, like, walks(graph) and len(starts) < 2 * workers())
    if table_versions(graph) != versions:
        return pairs(graph, data1, None if same else data2, tangent, dtype)
    check_size(float(out.abs().max()), dtype)
    warn_of_errors(inexact(graph))
    return out.to(dtype)


def _values(graph: Graph, one: Side, two: Side, paired: bool, symmetric: bool, tangent: bool) -> Tensor:
    """The kernel of two sides, [p, q]; of pairs [p]."""
    layer = graph.layers[graph.output]
    if mixes(graph):
        return AllPairs(graph, one, two, paired, symmetric, tangent).output()
    elements = plane_elements(next(iter(one.data.values())))
    out = Planes(graph, one, two, paired, symmetric, tangent, elements)(layer)[-1, 0, 0]
    return out[:, 0] if paired else out


def output_layer(graph: Graph) -> Layer:
    """The layer of the model's output, at its positions."""
    layer = graph.layers[graph.output]
    return layer.source if isinstance(layer, Flatten) else layer


def at_positions(graph: Graph, data1: Data, data2: Data | None, tangent: bool, dtype: torch.dtype) -> Tensor:
    """The kernel of all pairs of positions of the output, [n1, n2, P, P]; exactly symmetric for data2 = None."""
    same, data2 = data2 is None, data1 if data2 is None else data2
    like, layer = next(iter(data1.values())), output_layer(graph)
    n1, n2 = (next(iter(data.values())).shape[2] for data in (data1, data2))
    out = torch.empty(n1, n2, *layer.size, *layer.size, dtype=dtype, device=like.device)
    size = tile_size(graph, like, n1, n2)
    tiles = [(i, j) for i in range(0, n1, size) for j in range(i if same else 0, n2, size)]

    def tile(at: tuple[int, int]) -> float:
        (i, j), mirrored = at, same and at[0] == at[1]
        with torch.no_grad():
            one, two = side_of(graph, data1, slice(i, i + size)), side_of(graph, data2, slice(j, j + size))
            block = out[i : i + size, j : j + size]
            if mixes(graph):
                values = AllPairs(graph, one, two, False, mirrored, tangent)
                block.copy_(values.between_positions(layer).reshape(block.shape))
            else:
                planes = Planes(graph, one, two, False, mirrored, tangent, plane_elements(like))
                _all_offsets(planes, layer, block)
            if mirrored:
                _mirror(block)
            elif same:
                out[j : j + size, i : i + size] = block.permute(1, 0, 4, 5, 2, 3)
            return max(abs(float(end)) for end in block.aminmax())

    versions = extend_tables(graph, data1, data2)
    sizes = each(tile, tiles, like, len(tiles) < 2 * workers())
    if table_versions(graph) != versions:
        return at_positions(graph, data1, None if same else data2, tangent, dtype)
    check_size(max(sizes), dtype)
    warn_of_errors(inexact(graph))
    count = math.prod(layer.size)
    return out.reshape(n1, n2, count, count)


def _all_offsets(planes: Planes, layer: Layer, block: Tensor) -> None:
    """Write the values at all pairs of positions into a block, [p, q, H, W, H, W]; of a mirrored one, half of them."""
    height, width = layer.size
    parts = equal_parts(planes.one.count, walked_samples(planes.graph, layer, planes.two.count))
    half = planes.symmetric and len(parts) == 1

    def row(of: Planes, dh: int) -> None:
        some = block[of.first : of.first + of.one.count]
        for dw in range(0 if half and dh == 0 else 1 - width, width):
            at = some.diagonal(dh, 2, 4).diagonal(dw, 2, 3)  # [p, q, positions]
            own = of if walk_keeps(of.graph) else of.subset(slice(0, of.one.count))  # nothing to keep: a new cache
            at.copy_(own(layer, (dh, dw))[-1].permute(2, 3, 0, 1))

    for samples in parts:
        walk(planes.subset(samples), layer, range(0 if half else 1 - height, height), row)


def _mirror(block: Tensor) -> None:
    """Make a block of samples with themselves symmetric: the pairs with the earlier position first count."""
    samples, positions = torch.arange(len(block)), torch.arange(block[0, 0, 0, 0].numel())
    first, p = samples.to(block.device), positions.view(block.shape[2:4]).to(block.device)
    one, two = p[:, :, None, None], p[None, None]
    kept = (one < two) | ((one == two) & (first[:, None] <= first)[:, :, None, None, None, None])
    block.copy_(torch.where(kept, block, block.permute(1, 0, 4, 5, 2, 3)))
