"""Values of the limit without an autograd graph, tile by tile: of all pairs of samples, or of paired ones."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ntkit.base.workers import spread, workers
from ntkit.kernels.infinite.layers import Graph
from ntkit.kernels.infinite.limit_tiles import (
    BATCH,
    BATCH_OF_GRIDS,
    CACHE_BYTES,
    check_size,
    each,
    extend_tables,
    plane_elements,
    positions,
    side_of,
    state_size,
    table_versions,
    tile_size,
    walks,
    warn_of_errors,
)
from ntkit.kernels.infinite.planes import Planes
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
            planes = Planes(graph, one, two, False, same and i == j, tangent, plane_elements(like))
            block = planes(graph.layers[graph.output])[-1, 0, 0]
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
    warn_of_errors(graph)
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
            planes = Planes(graph, one, two, True, same, tangent, plane_elements(like))
            out[samples] = planes(graph.layers[graph.output])[-1, 0, 0, :, 0]

    starts, versions = list(range(0, n, size)), extend_tables(graph, data1, data2)
    each(batch, starts, like, walks(graph) and len(starts) < 2 * workers())
    if table_versions(graph) != versions:
        return pairs(graph, data1, None if same else data2, tangent, dtype)
    check_size(float(out.abs().max()), dtype)
    warn_of_errors(graph)
    return out.to(dtype)
