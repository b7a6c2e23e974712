"""The forms a parameter's per-sample gradient comes in: entries, two factors, or a convolution not yet unfolded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ntkit.jacobian.convolution_gradients import Shape, backward_call, receptive_fields, weight_gradients

Block = tuple[int, int]  # first row and first column of a part of a parameter
Place = tuple[bool, Block | None]  # whether a source is the parameter transposed, and which part of it


@dataclass(frozen=True)
class Rows:
    """Gradient entries, [n, C, entries], in the parameter's own order."""

    values: Tensor

    def rows(self, out: Tensor | None = None) -> Tensor:
        """The entries."""
        return self.values

    def first(self) -> Rows:
        """The first sample alone."""
        return Rows(self.values[:1])


@dataclass(frozen=True)
class Pair:
    """Gradient in factors: W[l, r] += left[i, c, t, l] * right[i, c, t, r], summed over positions t = 1..T.

    W is the parameter as a matrix, or the part of it whose first entry is at ``block``. The data factor (left if
    ``data_left``) is [n, 1, T, size], the same for all outputs; the cotangent factor [n, C, T, size]. An integer data
    factor [n, 1, T] selects rows or columns (an embedding): it stands for one-hot vectors.
    """

    left: Tensor
    right: Tensor
    l: int  # noqa: E741 (the formula's own letter)
    r: int
    data_left: bool
    block: Block | None = None

    @property
    def positions(self) -> int:
        """T."""
        return self.left.shape[2]

    @property
    def data(self) -> Tensor:
        """The factor that is the same for all outputs."""
        return self.left if self.data_left else self.right

    @property
    def cotangent(self) -> Tensor:
        """The other one."""
        return self.right if self.data_left else self.left

    @property
    def selects(self) -> bool:
        """Whether all but some rows of the whole parameter have a gradient of zero: an embedding's, by its indices."""
        return self.data_left and self.block is None and self.data.dtype == torch.int64

    def placed(self, place: Place) -> Pair:
        """The same gradient as a part of the parameter."""
        turned, block = place
        if turned:
            return Pair(self.right, self.left, self.r, self.l, not self.data_left, block)
        return replace(self, block=block)

    def rows(self, out: Tensor | None = None) -> Tensor:
        """Multiply out: [n, C, l * r]; into `out` where that is the product's own layout."""
        n, outputs = self.cotangent.shape[:2]
        if self.data.dtype == torch.int64:
            values = self.cotangent.new_zeros(n, outputs, self.l if self.data_left else self.r, self.cotangent.shape[3])
            values.scatter_add_(2, self.data[..., None].expand_as(self.cotangent), self.cotangent)
            return (values if self.data_left else values.transpose(2, 3)).flatten(2)
        # one product per sample with all outputs stacked: the data factor is read once
        if self.data_left:
            right = self.right.transpose(1, 2).reshape(n, self.positions, -1)
            values = torch.bmm(self.left[:, 0].transpose(1, 2), right).view(n, self.l, outputs, self.r)
            return values.transpose(1, 2).reshape(n, outputs, -1)
        left = self.left.transpose(2, 3).reshape(n, -1, self.positions)
        return _stacked(left, self.right[:, 0], outputs, out)

    def part(self, index: slice) -> Pair:
        """Some of the samples, as views."""
        return replace(self, left=self.left[index], right=self.right[index])

    def detach(self) -> Pair:
        """The same numbers, without the graph that made them."""
        return replace(self, left=self.left.detach(), right=self.right.detach())


@dataclass(frozen=True)
class Pairs:
    """A parameter's gradient as a sum of pairs; ``shape`` is the parameter's as a matrix.

    ``ones``: the gradient of a bias of the same layer is meant too: its data factor is 1 at every position.
    """

    parts: tuple[Pair, ...]
    shape: tuple[int, int]
    ones: bool = False

    def rows(self, out: Tensor | None = None) -> Tensor:
        """Multiply out: [n, C, entries]."""
        first = self.parts[0]
        if len(self.parts) == 1 and first.block is None:
            return first.rows(out)
        n, outputs = first.cotangent.shape[:2]
        values = first.cotangent.new_zeros(n, outputs, *self.shape)
        for part in self.parts:
            if part.block is None:
                values += part.rows().view_as(values)
            else:
                i, j = part.block
                values[:, :, i : i + part.l, j : j + part.r] += part.rows().view(n, outputs, part.l, part.r)
        return values.flatten(2)

    def part(self, index: slice) -> Pairs:
        """Some of the samples, as views."""
        return replace(self, parts=tuple(part.part(index) for part in self.parts))

    def first(self) -> Pairs:
        """The first sample alone."""
        return self.part(slice(0, 1))

    def bias(self) -> Pairs:
        """The gradient of the bias that `ones` speaks of, alone."""
        (whole,) = self.parts
        cot = whole.cotangent
        ones = cot.new_ones(()).expand(cot.shape[0], 1, cot.shape[2], 1)
        return Pairs((Pair(cot, ones, cot.shape[3], 1, False),), (cot.shape[3], 1))


def _stacked(left: Tensor, right: Tensor, outputs: int, out: Tensor | None) -> Tensor:
    """Products [n, C * l, T] @ [n, T, r] as [n, C, l * r]."""
    n, rows, columns = left.shape[0], left.shape[1], right.shape[2]
    if out is not None and out.is_contiguous() and out.dtype == left.dtype:
        torch.bmm(left, right, out=out.view(n, rows, columns))
        return out
    return torch.bmm(left, right).reshape(n, outputs, -1)


def comparable(p: Pair, q: Pair) -> bool | None:
    """Whether two parts of a parameter are the same (True), apart (False), or overlap in some other way (None)."""
    if (p.l, p.r, p.block) == (q.l, q.r, q.block):
        return True
    if p.block is None or q.block is None:
        return None
    rows = p.block[0] < q.block[0] + q.l and q.block[0] < p.block[0] + p.l
    columns = p.block[1] < q.block[1] + q.r and q.block[1] < p.block[1] + p.r
    return None if rows and columns else False


@dataclass(frozen=True)
class Convolved:
    """Gradient of a convolution's weight [o, a / groups, *kernel], from its input and its cotangent.

    ``x`` [n, F, a, *space] holds F images a sample; ``cotangent`` is [n, C, F, o, *positions].
    """

    x: Tensor
    cotangent: Tensor
    shape: Shape
    groups: int

    @property
    def positions(self) -> int:
        """T: images times places of the kernel."""
        return self.x.shape[1] * math.prod(self.cotangent.shape[4:])

    @property
    def l(self) -> int:  # noqa: E743
        """Channels out."""
        return self.cotangent.shape[3]

    @property
    def r(self) -> int:
        """Entries of one receptive field."""
        return self.x.shape[2] // self.groups * math.prod(self.shape.kernel)

    def first(self) -> Convolved:
        """The first sample alone."""
        return replace(self, x=self.x[:1], cotangent=self.cotangent[:1])

    def pair(self) -> Pair:
        """Unfold the receptive fields; for one group."""
        n, outputs = self.cotangent.shape[:2]
        fields = self._fields().transpose(2, 3).reshape(n, 1, self.positions, self.r)
        left = self.cotangent.flatten(4).transpose(3, 4).reshape(n, outputs, self.positions, self.l)
        return Pair(left, fields, self.l, self.r, data_left=False)

    def rows(self, out: Tensor | None = None) -> Tensor:
        """Gradient entries, [n, C, entries]; into `out` where one is given."""
        n, outputs, images, o = self.cotangent.shape[:4]
        if self.groups == 1 and images == 1:
            return weight_gradients(self.x[:, 0], self.cotangent[:, :, 0], self.shape, out)
        if self.groups == 1:
            return self.pair().rows(out)
        if self._few():
            return self._one_by_one()
        g = self.groups
        fields = self._fields().reshape(n, images, g, self.r, -1)
        left = self.cotangent.flatten(4).unflatten(3, (g, o // g))  # [n, C, F, g, o/g, L]
        left = left.permute(0, 3, 1, 4, 2, 5).reshape(n * g, outputs * (o // g), -1)
        right = fields.permute(0, 2, 1, 4, 3).reshape(n * g, -1, self.r)
        values = torch.bmm(left, right).reshape(n, g, outputs, o // g, self.r)
        return values.transpose(1, 2).reshape(n, outputs, -1)

    def _fields(self) -> Tensor:
        """Receptive fields, [n, F, a * prod(kernel), L]."""
        return receptive_fields(self.x.flatten(0, 1), self.shape).unflatten(0, self.x.shape[:2])

    def _few(self) -> bool:
        """Whether a call per sample and output is cheaper than unfolding, for several groups (LOG.md)."""
        _, outputs, _, o = self.cotangent.shape[:4]
        native = self.x.device.type == "cpu" and self.x.dtype == torch.float32 and len(self.shape.kernel) == 2
        few = outputs * (o // self.groups) < self.r and math.prod(self.shape.kernel) > 1
        return native and few and self.positions >= 64

    def _one_by_one(self) -> Tensor:
        """Gradient entries by one backward call per sample and output."""
        n, outputs, _, o = self.cotangent.shape[:4]
        values = self.x.new_empty(n, outputs, o, self.x.shape[2] // self.groups, *self.shape.kernel)
        for s, x in enumerate(self.x.unbind()):
            for c, cot in enumerate(self.cotangent[s].unbind()):
                values[s, c] = backward_call(cot, x, self.shape, self.groups)
        return values.flatten(2)


Factor = Rows | Pair | Convolved  # of one use
Whole = Rows | Pairs | Convolved  # of a parameter
AnyFactor = TypeVar("AnyFactor", bound="Rows | Pair | Pairs | Convolved")


def widened(factor: AnyFactor, dtype: torch.dtype) -> AnyFactor:
    """The same gradient with its numbers in this precision, so that products of them are rounded to it, too."""
    if isinstance(factor, Pairs):
        return replace(factor, parts=tuple(widened(part, dtype) for part in factor.parts))
    tensors = {name: t for name, t in vars(factor).items() if isinstance(t, Tensor) and t.is_floating_point()}
    narrow = {name: t.to(dtype) for name, t in tensors.items() if t.dtype != dtype}
    return replace(factor, **narrow) if narrow else factor


def inner(u: Tensor, v: Tensor) -> Tensor:
    """Inner products of two factors of one kind, [n1, C1, T1, size] and [n2, C2, T2, size] -> [n1 C1 T1, n2 C2 T2].

    Integer factors stand for one-hot vectors: then it is a comparison, or a selection of columns.
    """
    if u.dtype == v.dtype == torch.int64:
        return u.reshape(-1, 1) == v.reshape(1, -1)
    if u.dtype == torch.int64:
        return v.reshape(-1, v.shape[-1]).index_select(1, u.reshape(-1)).T
    if v.dtype == torch.int64:
        return u.reshape(-1, u.shape[-1]).index_select(1, v.reshape(-1))
    return u.reshape(-1, u.shape[-1]) @ v.reshape(-1, v.shape[-1]).T
