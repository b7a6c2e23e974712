"""Plan and multiply: from factors of two sets of samples to their kernel, by the cheapest exact route per parameter.

Routes for a parameter with data factor A [n, T, a] and cotangent factor B [n, C, T, o]:

- ``outer``  (T = 1): (A1 A2^T) * (B1 B2^T); nothing of size n x P is formed;
- ``tokens`` (few T): the same over pairs of positions, summed;
- ``rows``   (many T, or no factors): per-sample gradient entries [n, C, a*o], then one matrix product.

All ``rows`` parameters of a tile share one matrix, so that small ones (biases, scales) do not cost a product each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.inputs import Batch, count, take
from ntkit.jacobian.rules import Pair
from ntkit.jacobian.structure import Irregular, Size, Structure

# One entry read, multiplied and written back costs about as much as this many floating-point operations of a matrix
# product (memory against compute, on CPUs and GPUs of the last years). It only steers the choice of a route.
_ENTRY = 30

# Bytes of activations, cotangents and receptive fields that one forward batch may hold. Past the caches, and with fresh
# pages for every large tensor, a sample of a convolutional net costs two to three times as much on a CPU (LOG.md).
_FORWARD = 32e6

_BLOCK = 1024  # samples multiplied at a time: large enough for the full rate of a matrix product


@dataclass(frozen=True)
class Step:
    """The plan for one parameter: its route and what that costs for the whole product."""

    name: str
    route: str
    flops: float
    bytes_per_sample: int


@dataclass(frozen=True)
class Plan:
    """How a kernel will be computed: one `Step` per parameter, and sizes in samples.

    The rows of the kernel are done ``tile`` at a time, whose factors stay in memory while the columns pass by,
    ``columns`` at a time: so the columns are prepared once per tile of rows. ``block`` samples are multiplied at a
    time, ``batch`` go through the model at a time.
    """

    steps: tuple[Step, ...]
    tile: int
    columns: int
    block: int
    batch: int

    def route(self, name: str) -> str:
        """Route of a parameter."""
        return next(step.route for step in self.steps if step.name == name)

    @property
    def on_rows(self) -> list[str]:
        """Parameters that share the matrix of gradient entries."""
        return [step.name for step in self.steps if step.route in ("rows", "fallback")]


def _cost(size: Size, route: str, outputs: int, mode: str, n1: int, n2: int) -> float:
    """Floating-point operations (entries weighted) of n1 x n2 products of one parameter's gradients."""
    results = outputs**2 if mode == "full" else 1 if mode == "trace" else outputs
    products = outputs**2 if mode == "full" else outputs
    pairs = float(n1) * n2
    if route == "outer":
        return pairs * (2 * size.a * (not size.gather) + 2 * products * size.o + _ENTRY * results)
    if route == "tokens":
        per = 2 * size.a * (not size.gather) + 2 * products * size.o + _ENTRY * results
        return pairs * size.positions**2 * per
    form = (n1 + n2) * outputs * (2.0 * max(size.positions, 1) * size.o * size.a + _ENTRY * size.entries)
    return form + pairs * 2 * products * size.entries


def make_plan(known: Structure, mode: str, n1: int, n2: int, budget: int, like: Tensor, aligned: bool = False) -> Plan:
    """Choose routes, then tile and batch sizes under a memory budget.

    Parameters
    ----------
    known : structure of the model on these inputs.
    mode : "full", "diagonal" or "trace" ("sum" and callables have one output and are "trace").
    n1, n2 : samples on each side; `aligned` when only pairs (i, i) are wanted.
    budget : bytes of scratch memory, beside inputs and result.
    like : a parameter, for its device and its bytes per number.
    """
    outputs, itemsize = known.outputs, like.element_size()
    pairs1, pairs2 = (1, 1) if aligned else (n1, n2)
    steps = []
    for name, size in known.sizes.items():
        row_bytes = outputs * size.entries * itemsize
        pair_bytes = size.positions * (size.a * (not size.gather) + outputs * size.o) * itemsize
        rows = Step(name, "rows", _cost(size, "rows", outputs, mode, pairs1, pairs2), row_bytes)
        if name in known.fallback or size.positions == 0:
            steps.append(Step(name, "fallback", rows.flops, row_bytes) if name in known.fallback else rows)
            continue
        route = "outer" if size.positions == 1 else "tokens"
        pair = Step(name, route, _cost(size, route, outputs, mode, pairs1, pairs2), pair_bytes)
        too_big = 4 * row_bytes > budget  # two samples a side would not fit: never form these rows
        steps.append(pair if pair.flops <= rows.flops or too_big else rows)
    prepared = sum(step.bytes_per_sample for step in steps)
    # Beside the tiles: cotangents and saved tensors of the forward batch, and for the parameter in hand its two factors
    # (receptive fields included) and, on the rows route, its entries.
    factors = max((s.positions * (s.a + outputs * s.o) * itemsize for s in known.sizes.values()), default=0)
    entries = max((step.bytes_per_sample for step in steps if step.route != "outer"), default=0)
    transient = known.bytes_per_sample * (outputs + 1) + 2 * factors + entries + 1
    batch = max(
        1,
        min(256, int(min(budget * 0.3, _FORWARD if like.device.type == "cpu" else math.inf) / transient), max(n1, n2)),
    )
    results = outputs**2 if mode == "full" else 1 if mode == "trace" else outputs
    block = max(1, min(_BLOCK, math.isqrt(int(budget * 0.1 / (3 * results * itemsize)))))
    room = budget * 0.7 / (prepared + 1)  # samples whose factors fit
    if aligned:
        tile = columns = max(1, min(int(room / 2), n1, _BLOCK))
    else:
        columns = max(1, min(int(room * 0.15), n2, _BLOCK))
        tile = max(1, min(int(room) - columns, n1))
        tile = math.ceil(n1 / math.ceil(n1 / tile))  # equal tiles: the last is not a sliver
    return Plan(tuple(steps), tile, columns, block, min(batch, max(tile, columns)))


@dataclass
class Tile:
    """Prepared factors of n samples: one matrix of gradient entries [n, C, E] and the pairs of the other parameters."""

    rows: Tensor
    pairs: dict[str, Pair]
    spans: dict[str, tuple[int, int]]  # columns of `rows` by parameter

    @property
    def n(self) -> int:
        """Samples."""
        return self.rows.shape[0]

    def part(self, start: int, stop: int) -> Tile:
        """Some of the samples, as views."""
        cut = {
            name: Pair(p.data[start:stop], p.cotangent[start:stop], p.a, p.data_first) for name, p in self.pairs.items()
        }
        return Tile(self.rows[start:stop], cut, self.spans)

    def only(self, name: str) -> Tile:
        """One parameter."""
        if name in self.pairs:
            return Tile(self.rows[:, :, :0], {name: self.pairs[name]}, {})
        start, stop = self.spans[name]
        return Tile(self.rows[:, :, start:stop], {}, {name: (0, stop - start)})


@torch.no_grad()
def prepare(
    gradients: Gradients, x: Batch, known: Structure, plan: Plan, advance: Callable[[int], None] | None = None
) -> Tile:
    """Forward and backward the samples of `x` batch by batch and keep what the plan's routes need."""
    n, spans, start = count(x), {}, 0
    for name in plan.on_rows:
        entries = known.sizes[name].entries
        spans[name], start = (start, start + entries), start + entries
    rows: Tensor | None = None
    pairs: dict[str, Pair] = {}
    for begin in range(0, n, plan.batch):
        stop = min(begin + plan.batch, n)
        factors = gradients.batch(take(x, slice(begin, stop)), known)
        for name, (first, last) in spans.items():
            factor = factors[name]
            values = factor.rows() if isinstance(factor, Pair) else factor.values
            if rows is None:
                rows = values.new_empty(n, values.shape[1], start, dtype=gradients.dtype)
            rows[begin:stop, :, first:last] = values
        for step in plan.steps:
            if step.name in spans:
                continue
            factor = factors[step.name]
            if not isinstance(factor, Pair) or factor.groups > 1:
                raise Irregular({step.name: "its gradient has no factors in some batch"})
            if step.name not in pairs:
                wide = None if factor.data.dtype == torch.int64 else gradients.dtype
                data = factor.data.new_empty(n, *factor.data.shape[1:], dtype=wide)
                cotangent = factor.cotangent.new_empty(n, *factor.cotangent.shape[1:], dtype=gradients.dtype)
                pairs[step.name] = Pair(data, cotangent, factor.a, factor.data_first)
            kept = pairs[step.name]
            if kept.data.shape[1] != factor.data.shape[1]:
                raise Irregular({step.name: "its number of positions changes from batch to batch"})
            kept.data[begin:stop] = factor.data
            kept.cotangent[begin:stop] = factor.cotangent
        if advance is not None:
            advance(stop - begin)
    if rows is None:
        some = next(iter(pairs.values())).cotangent
        rows = some.new_empty(n, some.shape[1], 0)
    return Tile(rows, pairs, spans)


def multiply(t1: Tile, t2: Tile, mode: str, scratch: int) -> Tensor:
    """Kernel of two tiles: [n1, n2, C, C] "full", [n1, n2, C] "diagonal", [n1, n2] "trace"."""
    n1, n2, outputs = t1.n, t2.n, t1.rows.shape[1]
    if mode == "full":
        flat = t1.rows.reshape(n1 * outputs, -1) @ t2.rows.reshape(n2 * outputs, -1).T
        total = flat.view(n1, outputs, n2, outputs)
    elif mode == "diagonal":
        total = torch.bmm(t1.rows.transpose(0, 1), t2.rows.permute(1, 2, 0))
    else:
        total = t1.rows.reshape(n1, -1) @ t2.rows.reshape(n2, -1).T
    for name, p1 in t1.pairs.items():
        assert p1.data_first == t2.pairs[name].data_first, name
        for i, j, block in _pair_blocks(p1, t2.pairs[name], mode, scratch):
            if mode == "full":
                total[i, :, j] += block
            elif mode == "diagonal":
                total[:, i, j] += block
            else:
                total[i, j] += block
    if mode == "full":
        return total.permute(0, 2, 1, 3)
    return total.permute(1, 2, 0) if mode == "diagonal" else total


def _pair_blocks(p1: Pair, p2: Pair, mode: str, scratch: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Contributions of one factored parameter, block by block so that no intermediate exceeds `scratch` bytes."""
    n1, outputs, t1, o = p1.cotangent.shape
    n2, _, t2, _ = p2.cotangent.shape
    wide = outputs**2 if mode == "full" else 1
    room = max(1, scratch // (3 * t1 * t2 * wide * p1.cotangent.element_size()))
    step2 = max(1, min(n2, room))
    step1 = max(1, min(n1, room // step2))
    for a in range(0, n1, step1):
        i = slice(a, min(a + step1, n1))
        for b in range(0, n2, step2):
            j = slice(b, min(b + step2, n2))
            near = _data_products(p1, p2, i, j)  # [i T1, j T2]
            c1, c2 = p1.cotangent[i], p2.cotangent[j]
            m1, m2 = c1.shape[0], c2.shape[0]
            if mode == "full":
                far = (c1.reshape(-1, o) @ c2.reshape(-1, o).T).view(m1, outputs, t1, m2, outputs, t2)
                block = far.mul_(near.view(m1, 1, t1, m2, 1, t2))
                yield i, j, block[:, :, 0, :, :, 0] if t1 == t2 == 1 else block.sum((2, 5))
            elif mode == "diagonal":
                result = near.new_empty(outputs, m1, m2)
                for c in range(outputs):
                    far = (c1[:, c].reshape(-1, o) @ c2[:, c].reshape(-1, o).T).mul_(near)
                    result[c] = _sum_positions(far, m1, t1, m2, t2)
                yield i, j, result
            else:
                far = c1.transpose(1, 2).reshape(m1 * t1, -1) @ c2.transpose(1, 2).reshape(m2 * t2, -1).T
                yield i, j, _sum_positions(far.mul_(near), m1, t1, m2, t2)


def _sum_positions(far: Tensor, m1: int, t1: int, m2: int, t2: int) -> Tensor:
    return far if t1 == t2 == 1 else far.view(m1, t1, m2, t2).sum((1, 3))


def _data_products(p1: Pair, p2: Pair, i: slice, j: slice) -> Tensor:
    """Inner products of the data factors, [i T1, j T2]; for row selections whether the rows are the same."""
    d1, d2 = p1.data[i], p2.data[j]
    if d1.dtype == torch.int64:
        return (d1.reshape(-1, 1) == d2.reshape(1, -1)).to(p1.cotangent.dtype)
    return d1.reshape(-1, p1.a) @ d2.reshape(-1, p2.a).T


def multiply_aligned(t1: Tile, t2: Tile, mode: str) -> Tensor:
    """Kernel of pairs (i, i) only: [n, C, C] "full", [n, C] "diagonal", [n] "trace"."""
    if mode == "full":
        total = torch.bmm(t1.rows, t2.rows.transpose(1, 2))
    elif mode == "diagonal":
        total = torch.einsum("nce,nce->nc", t1.rows, t2.rows)
    else:
        total = torch.einsum("nce,nce->n", t1.rows, t2.rows)
    for name, p1 in t1.pairs.items():
        p2 = t2.pairs[name]
        if p1.data.dtype == torch.int64:
            near = (p1.data[:, :, None] == p2.data[:, None, :]).to(p1.cotangent.dtype)
        else:
            near = p1.data @ p2.data.transpose(1, 2)  # [n, T1, T2]
        if near.shape[1:] == (1, 1):
            c1, c2 = p1.cotangent[:, :, 0], p2.cotangent[:, :, 0]
            if mode == "full":
                total += near * (c1 @ c2.transpose(1, 2))
            else:
                far = near[:, 0] * (c1 * c2).sum(2)
                total += far if mode == "diagonal" else far.sum(1)
            continue
        for s in range(t1.n):  # sample by sample: [C T1, C T2] is the only intermediate
            c1, c2 = p1.cotangent[s], p2.cotangent[s]
            if mode == "full":
                far = torch.einsum("cto,dso->cdts", c1, c2)
                total[s] += (far * near[s]).sum((2, 3))
            else:
                far = (torch.einsum("cto,cso->cts", c1, c2) * near[s]).sum((1, 2))
                total[s] += far if mode == "diagonal" else far.sum()
    return total
