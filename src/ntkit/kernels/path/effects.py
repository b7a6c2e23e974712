"""The effects Lambda of a sweep, [m, C, entries] per parameter: gradients added to them, and products with them.

Here are the memory and the time of a sweep with momentum, so the work is spread over the workers. All cuts are of fixed
sizes: a sweep has the same bits with any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ntkit.base.workers import spread
from ntkit.jacobian.contraction import Scratch, Tile, multiply
from ntkit.jacobian.pairs import Pairs, Rows, Whole
from ntkit.kernels.path.row_gradients import RowGradient, along, row_gradient
from ntkit.trajectory.optimizer_updates import Update

_PIECE = 2**21  # bytes of effects in hand at a time: gradients and sums stay in a core's cache
_ENTRIES = 2**14  # of a parameter that are multiplied at a time
_CUTS = 16  # pieces of a product at most: each result is as large as the whole
_FACTORS = 2**20  # numbers in the factors of a piece of a tile
_LANES = 8  # pieces of a tile at a time, at most: they share the scratch memory

Delta = tuple[float, Tensor]  # a factor, and values [m, C, entries]


class Addition(NamedTuple):
    """Gradients of some test points by one parameter, and the sums that they go into.

    Lambda = carry * Lambda - weight * buffered * gradients, Phi += weight * gradients.
    """

    update: Update
    factor: Whole
    buffer: Tensor | None  # Lambda, [n, C, entries]
    carry: float
    direct: Tensor | None  # Phi, [n, C, entries]
    theta: Tensor  # [entries]
    decay: Tensor  # [n, C]: what decoupled weight decay did, in float64


def has_buffer(u: Update) -> bool:
    """Whether a parameter's gradients act on later steps."""
    return isinstance(u.buffered, Tensor) or u.buffered != 0.0


def add_all(additions: Sequence[Addition], weight: float) -> None:
    """Do these additions, of different parameters, some test points at a time."""
    pieces, decays = [], []
    for a in additions:
        points, outputs = a.decay.shape
        factor = a.factor if isinstance(a.factor, Pairs) else Rows(a.factor.rows())
        at_a_time = max(1, _PIECE // (outputs * a.theta.nbytes + 1))
        for start in range(0, points, at_a_time):
            some = slice(start, start + at_a_time)
            own = factor.part(some) if isinstance(factor, Pairs) else Rows(factor.rows()[some])
            sums = [None if t is None else t[some] for t in (a.buffer, a.direct)]
            pieces.append(a._replace(factor=own, buffer=sums[0], direct=sums[1]))
            decays.append(a.decay[some])
    results = spread(lambda piece: _add(piece, weight), pieces)
    for decay, result in zip(decays, results, strict=True):  # one sum for all parameters: in order
        if result is not None:
            decay -= result


def _add(a: Addition, weight: float) -> Tensor | None:
    """Do one addition; returns what decoupled weight decay does."""
    u, outer, decay = a.update, _outer(a.factor, a.theta.dtype), None
    if a.buffer is not None and a.carry != 1.0:
        a.buffer.mul_(a.carry)
    if (selected := row_gradient(a.factor)) is not None:
        return _add_rows(a, selected, weight)
    varied = isinstance(u.buffered, Tensor)
    rows = None
    if outer is None:
        rows = a.factor.rows()
    elif varied or u.decoupled:
        rows = (outer[0] * outer[1]).flatten(2)
    if u.decoupled and rows is not None:
        decay = (weight * u.decoupled) * (rows @ a.theta.to(rows)).double()
    if isinstance(u.buffered, Tensor):
        assert rows is not None
        assert a.buffer is not None
        a.buffer.addcmul_(rows, u.buffered.reshape(-1).to(rows), value=-weight)
    elif a.buffer is not None and u.buffered:
        _accumulate(a.buffer, outer, rows, -weight * u.buffered)
    if a.direct is not None:
        _accumulate(a.direct, outer, rows, weight)
    return decay


def _add_rows(a: Addition, gradient: RowGradient, weight: float) -> Tensor | None:
    """Do one addition to some rows of the sums only, after the carry; returns what decoupled weight decay does."""
    u = a.update
    if isinstance(u.buffered, Tensor):
        assert a.buffer is not None
        gradient.scaled(u.buffered).add_to(a.buffer, -weight)
    elif a.buffer is not None and u.buffered:
        gradient.add_to(a.buffer, -weight * u.buffered)
    if a.direct is not None:
        gradient.add_to(a.direct, weight)
    return (weight * u.decoupled) * along(a.factor, a.theta).double() if u.decoupled else None


def _outer(factor: Whole, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The gradient as one outer product per sample and output, [n, C, l, 1] and [n, C, 1, r], if it is one."""
    if not isinstance(factor, Pairs) or len(factor.parts) > 1:
        return None
    (p,) = factor.parts
    if p.positions > 1 or p.block is not None or p.data.dtype != dtype:
        return None
    return p.left[:, :, 0, :, None], p.right[:, :, 0, None, :]


def _accumulate(total: Tensor, outer: tuple[Tensor, Tensor] | None, rows: Tensor | None, alpha: float) -> None:
    """Add a gradient to `total` [n, C, entries], in one pass where it is an outer product."""
    if outer is not None:
        left, right = outer
        total.view(*total.shape[:2], left.shape[2], right.shape[3]).addcmul_(left, right, value=alpha)
    elif rows is not None:
        total.add_(rows, alpha=alpha)


def times(deltas: Mapping[str, Delta | None], gradients: Mapping[str, Whole]) -> dict[str, Tensor]:
    """Products [b, m, C] of Delta with gradients of one output, by parameter; only for those that have a Delta."""
    cuts: list[tuple[Tensor, Tensor]] = []
    owners: list[str] = []
    for name, gradient in gradients.items():
        if (delta := deltas[name]) is None:
            continue
        entries, values = _matched(gradient, delta[1].flatten(0, 1))
        width = max(_ENTRIES, -(-entries.shape[1] // _CUTS))
        for start in range(0, entries.shape[1], width):
            columns = slice(start, start + width)
            cuts.append((entries[:, columns], values[:, columns]))
            owners.append(name)
    sums: dict[str, Tensor] = {}
    for name, product in zip(owners, spread(lambda cut: (cut[0] @ cut[1].T).double(), cuts), strict=True):
        sums[name] = sums[name].add_(product) if name in sums else product
    result = {}
    for name, total in sums.items():
        factor, values = deltas[name] or (0.0, total)
        result[name] = (factor * total).view(-1, *values.shape[:2])
    return result


def _matched(gradient: Whole, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [b, entries] of one output and Delta [m C, entries]: of those rows alone that a gradient is in."""
    if (selected := row_gradient(gradient)) is None:
        return gradient.rows()[:, 0], delta
    rows, entries = selected.gathered()
    return entries[:, 0], delta.unflatten(1, selected.shape).index_select(1, rows).flatten(1)


def multiplied(test: Tile, train: Tile, scratch: int) -> Tensor:
    """Kernel values [m, b, C] of test points and training examples of one output each, some test points at a time."""
    if test.late:  # training gradients would be multiplied out again for each piece
        return multiply(test, train, "full", Scratch(scratch))[..., 0]
    numbers = sum(p.left.numel() + p.right.numel() for own in test.pairs.values() for p in own.parts)
    size = max(1, min(test.n, _FACTORS * test.n // (numbers + 1)))
    starts = range(0, test.n, size)
    lanes = [starts[k::_LANES] for k in range(min(_LANES, len(starts)))]
    share = scratch // len(lanes)

    def some(lane: range) -> list[Tensor]:
        own = Scratch(share)
        return [multiply(test.part(start, min(start + size, test.n)), train, "full", own)[..., 0] for start in lane]

    results = spread(some, lanes)
    return torch.cat([results[k % len(lanes)][k // len(lanes)] for k in range(len(starts))])
