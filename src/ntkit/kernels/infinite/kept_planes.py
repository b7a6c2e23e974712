"""A walk over the offsets of a layer: which planes it needs again, how much memory they take, who computes which."""

from __future__ import annotations

from collections.abc import Sequence

from ntkit.kernels.infinite.layers import (
    Affine,
    Flatten,
    GlobalPool,
    Graph,
    Layer,
    Pool,
    PositionMap,
    sources,
)
from ntkit.kernels.infinite.positions import mapped_from

Heights = tuple[int, int]  # of offsets, the lowest and the highest


def heights_needed(graph: Graph, layer: Layer, heights: Heights) -> dict[int, Heights]:
    """Heights of the offsets at which the planes of `layer` at these heights need those of each layer, by its id."""
    needed = {id(layer): heights}
    for user in reversed(graph.layers):
        if id(user) in needed and (of_source := _of_source(user, needed[id(user)])) is not None:
            for source in sources(user):
                low, high = needed.get(id(source), of_source)
                needed[id(source)] = min(low, of_source[0]), max(high, of_source[1])
    return needed


def _of_source(user: Layer, heights: Heights) -> Heights | None:
    """Heights of the source's offsets for those of its user; None if it needs none."""
    low, high = heights
    if isinstance(user, (Affine, Pool)):
        low, high, most = low * user.stride[0], high * user.stride[0], user.source.size[0] - 1
        if isinstance(user, Pool):
            low, high = low - user.kernel_size[0] + 1, high + user.kernel_size[0] - 1
        return max(low, -most), min(high, most)
    if isinstance(user, GlobalPool) or (isinstance(user, PositionMap) and user.exchanged):
        return 1 - user.source.size[0], user.source.size[0] - 1
    if isinstance(user, Flatten):
        return 0, 0
    if isinstance(user, PositionMap):
        found = [d for height in range(low, high + 1) for d, _ in mapped_from(user, 0, height)]
        return (min(found), max(found)) if found else None
    return heights


def several_uses(graph: Graph) -> set[int]:
    """The layers whose planes a walk needs several times: of several users, or of neighboring offsets."""
    seen, found = set[int](), set[int]()
    for layer in graph.layers:
        for source in sources(layer):
            if id(source) in seen or isinstance(layer, (Pool, PositionMap)):
                found.add(id(source))
            seen.add(id(source))
    return found


def walk_keeps(graph: Graph) -> bool:
    """Whether planes of one offset are used at the next ones."""
    return any(isinstance(layer, (Pool, PositionMap)) for layer in graph.layers)


def splits(graph: Graph) -> bool:
    """Whether each height of a walk can be computed on its own: there is one, and no plane is used at the next."""
    return any(isinstance(layer, GlobalPool) for layer in graph.layers) and not walk_keeps(graph)


def kept_elements(graph: Graph, layer: Layer) -> int:
    """Elements per pair of samples, covariance and tangent kernel, that a walk over the offsets of `layer` keeps."""
    again, most = several_uses(graph), layer.size[0] - 1

    def at(height: int) -> int:
        """What is kept when the planes of one height have been computed."""
        later, now = (heights_needed(graph, layer, (height, high)) for high in (most, height))
        total = 0
        for one in graph.layers:
            if id(one) in again and id(one) in now:
                rows = range(later[id(one)][0], now[id(one)][1] + 1)
                total += 2 * one.size[1] ** 2 * sum(one.size[0] - abs(row) for row in rows)
        return total

    return max(at(height) for height in range(-most, most + 1))


def shared_out(costs: Sequence[float], number: int) -> list[slice]:
    """Consecutive ranges of about equal cost, at most `number`, none of them empty."""
    ranges, start, spent, whole = [], 0, 0.0, sum(costs)
    for i, cost in enumerate(costs):
        left = number - len(ranges)
        if left > 1 and i > start and spent + cost / 2 > (whole / left):
            ranges.append(slice(start, i))
            whole, start, spent = whole - spent, i, 0.0
        spent += cost
    return [*ranges, slice(start, len(costs))]
