"""Multiply: from factors of two sets of samples to their kernel, along the routes of a `jacobian.plan.Plan`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ntkit.base.batch import Batch, count
from ntkit.jacobian.batches import each_batch
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.pairs import Convolved, Pair, Pairs, Whole, comparable, inner
from ntkit.jacobian.plan import Plan
from ntkit.jacobian.self_check import part_of
from ntkit.jacobian.structure import Irregular, Structure

_LARGE = 4096  # entries of a parameter from which a matrix product of its own costs nothing extra


@dataclass
class Tile:
    """Prepared factors of n samples: gradient entries, and the pairs of the other parameters.

    ``rows`` [n, C, E] holds the entries of all small parameters, ``large`` those of each large one; ``spans``: columns
    of ``rows`` by parameter; ``nested``: parameters whose pairs are contracted one side first; ``late``: those
    multiplied out when their turn comes; ``shared``: bias -> weight whose pairs it shares.
    """

    rows: Tensor
    large: dict[str, Tensor]
    pairs: dict[str, Pairs]
    spans: dict[str, tuple[int, int]]
    nested: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Samples."""
        return self.rows.shape[0]

    def part(self, start: int, stop: int) -> Tile:
        """Some of the samples, as views."""
        if stop - start == self.n:
            return self
        index = slice(start, stop)
        return replace(
            self,
            rows=self.rows[index],
            large={name: entries[index] for name, entries in self.large.items()},
            pairs={name: p.part(index) for name, p in self.pairs.items()},
        )

    def only(self, name: str) -> Tile:
        """One parameter."""
        none = self.rows[:, :, :0]
        if name in self.shared:
            return Tile(none, {}, {name: self.pairs[self.shared[name]].bias()}, {})
        if name in self.pairs:
            return Tile(none, {}, {name: replace(self.pairs[name], ones=False)}, {}, self.nested, self.late)
        if name in self.large:
            return Tile(none, {name: self.large[name]}, {}, {})
        start, stop = self.spans[name]
        return Tile(self.rows[:, :, start:stop], {}, {}, {name: (0, stop - start)})


@torch.no_grad()
def prepare(
    gradients: Gradients,
    x: Batch,
    structure: Structure,
    plan: Plan,
    done: Callable[[slice], None] = lambda _: None,
) -> Tile:
    """Run the samples of `x` forward and backward, batch by batch, and keep what the plan's routes need."""
    n, spans, width = count(x), {}, 0
    entries = {name: structure.sizes[name].entries for name in plan.on_rows}
    for name in (name for name, size in entries.items() if size < _LARGE):
        spans[name], width = (width, width + entries[name]), width + entries[name]
    shared = {step.name: structure.shared[step.name] for step in plan.steps if step.route == "shared"}
    factored = [step.name for step in plan.steps if step.name not in entries and step.name not in shared]
    assert set(shared.values()) <= set(factored)
    empty = {"dtype": gradients.dtype, "device": next(iter(gradients.params.values())).device}
    rows = torch.empty(n, structure.outputs, width, **empty)
    large = {name: torch.empty(n, structure.outputs, entries[name], **empty) for name in entries.keys() - spans.keys()}
    pairs: dict[str, Pairs] = {}
    creating = threading.Lock()

    def keep(part: slice, factors: dict[str, Whole]) -> None:
        for name, (first, last) in spans.items():
            rows[part, :, first:last] = factors[name].rows()
        for name, whole in large.items():
            target = whole[part]
            values = factors[name].rows(target)
            if values is not target:
                target.copy_(values)
        for name in factored:
            kept = _pairs_to_keep(factors[name], name)
            with creating:
                _make_room(pairs, name, kept, part, n, gradients.dtype, name in shared.values())
            _keep_pairs(pairs[name], name, kept, part)

    parts = [slice(begin, min(begin + plan.batch, n)) for begin in range(0, n, plan.batch)]
    each_batch(gradients, x, parts, structure, keep, done)
    nested = frozenset(step.name for step in plan.steps if step.route == "nested")
    late = frozenset(step.name for step in plan.steps if step.late)
    return Tile(rows, large, pairs, spans, nested, late, shared)


def _pairs_to_keep(factor: Whole, name: str) -> Pairs:
    if isinstance(factor, Convolved) and factor.groups == 1:
        factor = Pairs((factor.pair(),), (factor.l, factor.r))
    if not isinstance(factor, Pairs):
        raise Irregular({name: "its gradient has no factors in some batch"})
    return factor


def _make_room(
    pairs: dict[str, Pairs], name: str, factor: Pairs, part: slice, n: int, dtype: torch.dtype, ones: bool
) -> None:
    """Give the pairs of one parameter for n samples a place in `pairs`, unless they have one."""
    if name in pairs:
        return
    if part == slice(0, n) and all(p.left.dtype == p.right.dtype == dtype for p in factor.parts):
        pairs[name] = Pairs(tuple(p.detach() for p in factor.parts), factor.shape, ones)  # all samples: no copy
    else:
        pairs[name] = Pairs(tuple(_empty_like(p, n, dtype) for p in factor.parts), factor.shape, ones)


def _keep_pairs(whole: Pairs, name: str, factor: Pairs, part: slice) -> None:
    """Put the pairs of some samples where those of all are."""
    if [part_of(p) for p in whole.parts] != [part_of(p) for p in factor.parts]:
        raise Irregular({name: "its number of positions changes from batch to batch"})
    for target, p in zip(whole.parts, factor.parts, strict=True):
        if target.left.data_ptr() != p.left.data_ptr():
            target.left[part] = p.left
            target.right[part] = p.right


def _empty_like(pair: Pair, n: int, dtype: torch.dtype) -> Pair:
    """An empty pair like `pair` for n samples; its numbers in the precision of results."""
    left, right = (
        t.new_empty(n, *t.shape[1:], dtype=t.dtype if t.dtype == torch.int64 else dtype)
        for t in (pair.left, pair.right)
    )
    return replace(pair, left=left, right=right)


class Scratch:
    """Bytes that products may take for what they hold in between, and buffers used again and again.

    A CPU pays for every page of fresh memory; the entries of one parameter after the other go into the same.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffers: dict[str, Tensor] = {}

    def rows(self, pairs: Pairs, side: str) -> Tensor:
        """Multiply pairs out, [n, C, entries]; valid until the next call for the same side."""
        n, outputs = pairs.parts[0].cotangent.shape[:2]
        numbers = n * outputs * pairs.shape[0] * pairs.shape[1]
        buffer = self._buffers.get(side)
        if buffer is None or buffer.numel() < numbers:
            buffer = self._buffers[side] = pairs.parts[0].cotangent.new_empty(numbers)
        return pairs.rows(buffer[:numbers].view(n, outputs, -1))


def multiply(t1: Tile, t2: Tile, mode: str, scratch: Scratch) -> Tensor:
    """Kernel of two tiles: [n1, n2, C1, C2] "full", [n1, n2, C] "diagonal", [n1, n2] "trace"."""
    n1, n2, outputs, outputs2 = t1.n, t2.n, t1.rows.shape[1], t2.rows.shape[1]
    if mode == "full":
        flat = t1.rows.reshape(n1 * outputs, -1) @ t2.rows.reshape(n2 * outputs2, -1).T
        total = flat.view(n1, outputs, n2, outputs2)
    elif mode == "diagonal":
        flat = total = torch.bmm(t1.rows.transpose(0, 1), t2.rows.permute(1, 2, 0))
    else:
        flat = total = t1.rows.reshape(n1, -1) @ t2.rows.reshape(n2, -1).T
    for r1, r2 in _entries(t1, t2, scratch):
        if mode == "full":
            flat.addmm_(r1.flatten(0, 1), r2.flatten(0, 1).T)
        elif mode == "diagonal":
            flat.baddbmm_(r1.transpose(0, 1), r2.permute(1, 2, 0))
        else:
            flat.addmm_(r1.flatten(1), r2.flatten(1).T)
    for name, pairs in t1.pairs.items():
        for p in pairs.parts if name not in t1.late else ():
            for q in t2.pairs[name].parts:
                if comparable(p, q):
                    _add(total, p, q, mode, scratch.limit, ones=pairs.ones, nested=name in t1.nested)
    if mode == "full":
        return total.permute(0, 2, 1, 3)
    return total.permute(1, 2, 0) if mode == "diagonal" else total


def _entries(t1: Tile, t2: Tile, scratch: Scratch) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries of one large parameter after the other, [n, C, entries]: those kept, then those multiplied out."""
    for name, entries in t1.large.items():
        yield entries, t2.large[name]
    for name in sorted(t1.late):
        if name in t1.pairs:
            first = scratch.rows(t1.pairs[name], "first")
            yield first, first if t1 is t2 else scratch.rows(t2.pairs[name], "second")


def _add(total: Tensor, p: Pair, q: Pair, mode: str, scratch: int, ones: bool, nested: bool) -> None:
    """Add the products of two pairs to total, block by block so that no intermediate exceeds `scratch` bytes."""
    n1, outputs, t1 = p.cotangent.shape[:3]
    n2, t2 = q.cotangent.shape[0], q.positions
    crossed = p.data_left != q.data_left
    nested = nested and not crossed
    limit = max(1, scratch // (3 * p.cotangent.element_size()))
    if nested:
        step2 = max(1, min(n2, 256))
        step1 = max(1, min(n1, limit // (t1 * (t2 * step2 + outputs * p.cotangent.shape[3]))))
    else:
        limit //= t1 * t2 * (outputs * q.cotangent.shape[1] if mode == "full" else outputs if crossed else 1)
        step2 = max(1, min(n2, limit))
        step1 = max(1, min(n1, limit // step2))
    for a in range(0, n1, step1):
        i = slice(a, min(a + step1, n1))
        for b in range(0, n2, step2):
            j = slice(b, min(b + step2, n2))
            u, v = p.part(i), q.part(j)
            if crossed:
                _add_crossed(_at(total, i, j, mode), u, v, mode)
            elif nested:
                _add_nested(_at(total, i, j, mode), u, v, ones)
            else:
                _add_tokens(_at(total, i, j, mode), u, v, mode, ones)


def _at(total: Tensor, i: slice, j: slice, mode: str) -> Tensor:
    return total[i, :, j] if mode == "full" else total[:, i, j] if mode == "diagonal" else total[i, j]


def _data_products(p: Pair, q: Pair, ones: bool) -> Tensor:
    """Inner products of the data factors, [n1 T1, n2 T2], and one more for the bias."""
    near = inner(p.data, q.data).to(p.cotangent.dtype)
    return near.add_(1) if ones else near


def _add_tokens(total: Tensor, p: Pair, q: Pair, mode: str, ones: bool) -> None:
    """Data products times cotangent products, summed over pairs of positions."""
    near = _data_products(p, q, ones)
    c1, c2 = p.cotangent, q.cotangent
    (n1, outputs, t1, _), n2, t2 = c1.shape, c2.shape[0], q.positions
    if mode == "full":
        far = inner(c1, c2).view(n1, outputs, t1, n2, c2.shape[1], t2)
        near = near.view(n1, 1, t1, n2, 1, t2)
        if t1 == t2 == 1:
            total.addcmul_(far[:, :, 0, :, :, 0], near[:, :, 0, :, :, 0])
        else:
            total += far.mul_(near).sum((2, 5))
    elif mode == "diagonal":
        for c in range(outputs):
            _add_positions(total[c], inner(c1[:, c], c2[:, c]), near, t1, t2)
    else:
        # [n, T, C * o]: the sum over outputs is part of the product
        far = inner(c1.transpose(1, 2).flatten(2), c2.transpose(1, 2).flatten(2))
        _add_positions(total, far, near, t1, t2)


def _add_positions(total: Tensor, far: Tensor, near: Tensor, t1: int, t2: int) -> None:
    if t1 == t2 == 1:
        total.addcmul_(far, near)
    else:
        total += far.mul_(near).view(total.shape[0], t1, total.shape[1], t2).sum((1, 3))


def _add_nested(total: Tensor, p: Pair, q: Pair, ones: bool) -> None:
    """All pairs of outputs: data products into one sample's cotangents, then the other side's cotangents with these."""
    (n1, outputs, t1, o), n2, t2 = p.cotangent.shape, q.cotangent.shape[0], q.positions
    outputs2 = q.cotangent.shape[1]
    near = _data_products(p, q, ones).view(n1 * t1, n2, t2)
    first = p.cotangent.reshape(n1, outputs, t1 * o)
    second = q.cotangent.permute(0, 2, 3, 1).reshape(n2, t2, o * outputs2)
    mixed = near.new_empty(n1 * t1, o * outputs2)  # one for all: fresh memory costs more than the product
    for j in range(n2):
        torch.mm(near[:, j], second[j], out=mixed)
        total[:, :, j] += torch.bmm(first, mixed.view(n1, t1 * o, outputs2))


def _add_crossed(total: Tensor, p: Pair, q: Pair, mode: str) -> None:
    """One pair has its cotangents left, the other right: each product holds the outputs of one side."""
    (n1, outputs, t1), (n2, outputs2, t2) = p.cotangent.shape[:3], q.cotangent.shape[:3]
    if p.data_left:  # right: p's cotangents with q's data; left: p's data with q's cotangents
        first, second = inner(p.right, q.right), inner(p.left, q.left)
    else:
        first, second = inner(p.left, q.left), inner(p.right, q.right)
    first = first.view(n1, outputs, t1, n2, t2).permute(0, 3, 1, 2, 4)  # [i, j, c, t, s]
    second = second.view(n1, t1, n2, outputs2, t2).permute(0, 2, 3, 1, 4)  # [i, j, d, t, s]
    if mode == "full":
        products = first.reshape(n1 * n2, outputs, -1) @ second.reshape(n1 * n2, outputs2, -1).transpose(1, 2)
        total += products.view(n1, n2, outputs, outputs2).permute(0, 2, 1, 3)
    else:
        products = (first * second).sum((3, 4))  # [i, j, c]
        total += products.sum(2) if mode == "trace" else products.permute(2, 0, 1)


def multiply_aligned(t1: Tile, t2: Tile, mode: str) -> Tensor:
    """Kernel of pairs (i, i) only: [n, C, C] "full", [n, C] "diagonal", [n] "trace"."""
    total: Tensor | float = 0.0
    for r1, r2 in [(t1.rows, t2.rows), *((entries, t2.large[name]) for name, entries in t1.large.items())]:
        if mode == "full":
            total = total + torch.bmm(r1, r2.transpose(1, 2))
        else:
            total = total + torch.einsum("nce,nce->nc", r1, r2)
    assert isinstance(total, Tensor)
    for name, pairs in t1.pairs.items():
        for p in pairs.parts:
            for q in t2.pairs[name].parts:
                if comparable(p, q):
                    total += _aligned(p, q, mode)
    return total.sum(1) if mode == "trace" else total


def _aligned(p: Pair, q: Pair, mode: str) -> Tensor:
    """Products of two pairs, sample by sample: [n, C, C] "full", else [n, C]."""
    n, outputs, t1 = p.cotangent.shape[:3]
    if p.data_left != q.data_left:
        side = ("right", "left") if p.data_left else ("left", "right")
        first, second = (_aligned_inner(getattr(p, s), getattr(q, s)) for s in side)  # [n, (C T), T], [n, T, (C T)]
        first = first.view(n, outputs, t1, -1)
        second = second.view(n, t1, outputs, -1).transpose(1, 2)
        if mode == "full":
            return first.flatten(2) @ second.flatten(2).transpose(1, 2)
        return (first * second).sum((2, 3))
    near = _aligned_inner(p.data, q.data).to(p.cotangent.dtype)  # [n, T1, T2]
    mixed = near[:, None] @ q.cotangent  # [n, C, T1, o]
    if mode == "full":
        return p.cotangent.flatten(2) @ mixed.flatten(2).transpose(1, 2)
    return (p.cotangent * mixed).sum((2, 3))


def _aligned_inner(u: Tensor, v: Tensor) -> Tensor:
    """`inner`, sample by sample: [n, C1 T1, C2 T2]."""
    if u.dtype == v.dtype == torch.int64:
        return u.flatten(1)[:, :, None] == v.flatten(1)[:, None, :]
    if u.dtype == torch.int64:
        return _aligned_inner(v, u).transpose(1, 2)
    if v.dtype == torch.int64:
        u = u.flatten(1, 2)
        return u.gather(2, v.flatten(1)[:, None, :].expand(-1, u.shape[1], -1))
    return u.flatten(1, 2) @ v.flatten(1, 2).transpose(1, 2)


def blocks(n1: int, n2: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut n1 x n2 into blocks of at most `rows` x `columns`, about equal: a sliver multiplies slowly."""
    for a in _cuts(n1, rows):
        for b in _cuts(n2, columns):
            yield a, b


def _cuts(n: int, size: int) -> list[slice]:
    pieces = -(-n // size)
    edges = [n * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def triangle(start: int, stop: int, size: int, leaf: int) -> Iterator[tuple[slice, slice]]:
    """Cut the upper half of a symmetric square into blocks, halving it: half the work in large products.

    Squares on the diagonal are done whole once they are no larger than `leaf`.
    """
    if stop - start <= leaf:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield from triangle(start, middle, size, leaf)
    for a, b in blocks(middle - start, stop - middle, size, size):
        yield slice(start + a.start, start + a.stop), slice(middle + b.start, middle + b.stop)
    yield from triangle(middle, stop, size, leaf)


def store(result: Tensor, block: Tensor, i: int, j: int, mirrored: bool) -> None:
    """Write a block [lead, m1, m2, ...] at (i, j), and its mirror image at (j, i)."""
    m1, m2 = block.shape[1:3]
    result[:, i : i + m1, j : j + m2] = block
    if not mirrored:
        return
    full = block.dim() == 5
    if i == j:  # rounding may differ between the halves: the upper one counts
        _mirror(result[:, i : i + m1, j : j + m2], full)
        return
    flipped = block.transpose(1, 2)
    result[:, j : j + m2, i : i + m1] = flipped.transpose(3, 4) if full else flipped


def _mirror(block: Tensor, full: bool) -> None:
    """Copy the upper triangle of [lead, n, n, ...] to the lower."""
    n = block.shape[1]
    i, j = torch.triu_indices(n, n, 1, device=block.device)
    upper = block[:, i, j]
    block[:, j, i] = upper.transpose(-1, -2) if full else upper
    if full:  # and each sample's own C x C block
        own = block[:, range(n), range(n)]
        block[:, range(n), range(n)] = own.triu() + own.triu(1).transpose(-1, -2)
