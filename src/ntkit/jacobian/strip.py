"""A strip of rows of a kernel: from samples to values, tile by tile, written where they belong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.base.batch import Batch, alike, count, join, take
from ntkit.base.workers import spread
from ntkit.jacobian.contraction import Scratch, Tile, blocks, multiply, prepare, store, triangle
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.plan import Job
from ntkit.jacobian.structure import Structure

_LEAF = 128  # samples: smaller products are not worth saving half of


@dataclass(frozen=True)
class Strip:
    """A strip of rows of a kernel; of a symmetric one only from the diagonal on, and its mirror image."""

    gradients: Gradients
    job: Job
    mode: str
    names: tuple[str, ...] | None  # parameters whose shares are wanted; None: their sum
    advance: Callable[[int], None]

    def fill(self, result: Tensor, rows: slice, x1: Batch, x2: Batch | None) -> None:
        """Compute ``result[:, rows]`` (and ``result[:, :, rows]`` of a symmetric kernel)."""
        plan, same = self.job.plan, x2 is None
        other = x1 if x2 is None else x2
        n1, n2 = count(x1), count(other)
        right: Tile | None = None
        if not same and self._fit_in_one_pass(x1, other):
            whole = self._tile(join(x1, other), self.job.left)
            left, right = whole.part(0, n1), whole.part(n1, n1 + n2)
        else:
            left = self._tile(take(x1, rows), self.job.left)
        if same:
            self.multiply(result, left, left, rows.start, rows.start, mirrored=True)
        for j in range(rows.stop if same else 0, n2, plan.columns):
            if right is None:
                right = self._tile(take(other, slice(j, j + plan.columns)), self.job.right)
            self.multiply(result, left, right, rows.start, j, mirrored=same)
            right = None

    def multiply(self, result: Tensor, left: Tile, right: Tile, i: int = 0, j: int = 0, mirrored: bool = False) -> None:
        """Write the kernel of two tiles at (i, j) of the result, block by block, each by a worker.

        Of a tile with itself, the upper half is computed and mirrored.
        """
        plan = self.job.plan
        if left is right:
            # leaves of a sixteenth: the squares on the diagonal, done whole, cost little of the half saved
            pieces = list(triangle(0, left.n, plan.block, max(min(_LEAF, plan.strip), left.n // 16)))
        else:
            pieces = list(blocks(left.n, right.n, plan.strip, plan.block))
        mirrored = mirrored or left is right
        scratches: dict[int, Scratch] = {}  # by thread
        pieces.sort(key=lambda piece: _size(piece), reverse=True)  # the largest first: none is left for the end

        def work(piece: tuple[slice, slice]) -> None:
            a, b = piece
            scratch = scratches.setdefault(threading.get_ident(), Scratch(self.job.plan.scratch))
            upper = left.part(a.start, a.stop)
            block = self._product(upper, upper if left is right and a == b else right.part(b.start, b.stop), scratch)
            store(result, block, i + a.start, j + b.start, mirrored=mirrored)

        if result.device.type == "cpu":
            spread(work, pieces)
        else:
            for piece in pieces:
                work(piece)

    def _fit_in_one_pass(self, x1: Batch, x2: Batch) -> bool:
        """Whether the factors of both sides are in memory at once, so that they may go through the model together."""
        plan, n1, n2 = self.job.plan, count(x1), count(x2)
        return n1 <= plan.tile and n2 <= plan.columns and self.job.left is self.job.right and alike(x1, x2)

    def _tile(self, x: Batch, structure: Structure) -> Tile:
        return prepare(self.gradients, x, structure, self.job.plan, lambda part: self.advance(part.stop - part.start))

    def _product(self, left: Tile, right: Tile, scratch: Scratch) -> Tensor:
        if self.names is None:
            return multiply(left, right, self.mode, scratch)[None]
        shares = []
        for name in self.names:
            own = left.only(name)
            shares.append(multiply(own, own if left is right else right.only(name), self.mode, scratch))
        return torch.stack(shares)


def _size(piece: tuple[slice, slice]) -> int:
    a, b = piece
    return (a.stop - a.start) * (b.stop - b.start)
