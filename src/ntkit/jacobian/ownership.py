"""Which sample does a row belong to? Established by experiment on the user's model, never assumed.

A node's output may hold the batch as its first axis, as a later one (sequence-major), or folded with others into one
(tokens flattened before a linear layer). In all these the axis has size before * n * after, and the entry at
(i, s, j) belongs to sample s. Two experiments decide: the shape at two batch sizes tells which axis grows with n; a
backward pass with the cotangent of one sample at a time tells which rows are its own, since the others must be zero.

Where data decides which rows there are (a mixture of experts hands each expert the tokens routed to it), every batch
has owners of its own. One more cotangent, coded by sample, tells them: see `Code`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Owner:
    """The batch lies in axis ``dim``, whose size is ``before * n * after``."""

    dim: int
    before: int
    after: int

    def fits(self, shape: tuple[int, ...], n: int) -> bool:
        """Whether a node output of this shape can be cut into n samples this way."""
        return self.dim < len(shape) and shape[self.dim] == self.before * n * self.after

    def split(self, t: Tensor, n: int, lead: int = 0) -> Tensor:
        """Move the samples to the front: [*lead, ..., before*n*after, ...] -> [n, *lead, ..., before*after, ...].

        ``lead`` axes stand before the node's own (the outputs differentiated). A view where strides allow.
        """
        dim = lead + self.dim
        parts = t.unflatten(dim, (self.before, n, self.after)).movedim(dim + 1, 0)
        return parts.flatten(dim + 1, dim + 2)


@dataclass(frozen=True)
class Assigned:
    """Owners row by row along the first axis, for one batch: ``rows`` [n, T] lists each sample's, padded with zeros.

    The padding points one row past the end.
    """

    rows: Tensor
    dim: int = 0

    def split(self, t: Tensor, n: int, lead: int = 0) -> Tensor:
        """As `Owner.split`: [*lead, R, ...] -> [n, *lead, T, ...]."""
        padded = torch.cat([t, t.new_zeros(*t.shape[:lead], 1, *t.shape[lead + 1 :])], lead)
        parts = padded.index_select(lead, self.rows.flatten()).unflatten(lead, self.rows.shape)
        return parts.movedim(lead, 0)


class Code:
    """One more cotangent, each sample's scaled by a number of its own: a row that follows another is another sample's.

    With g a direction of the outputs, the backward pass of s_i g must be s_i times that of g on every row of sample i,
    and nothing else is linear in the same way: foreign rows and mixtures of samples show.
    """

    def __init__(self, basis: Tensor, eps: float) -> None:
        outputs, n = basis.shape[:2]
        draw = torch.Generator().manual_seed(n)
        # evenly spaced, so that two samples' numbers can be told apart
        scale = (1 + torch.randperm(n, generator=draw) / n) * (1 - 2 * torch.randint(0, 2, (n,), generator=draw))
        self.eps, self.scale = eps, scale.to(basis)
        self.direction = (1 + torch.rand(outputs, generator=draw)).to(basis)
        combined = torch.einsum("k,knc->nc", self.direction, basis)
        self.basis = torch.cat([basis, (self.scale[:, None] * combined)[None]])

    def owned(self, cot: Tensor) -> bool:
        """Whether cotangents [n, K + 1, ...] (the coded one last) belong to the samples they are said to."""
        plain = torch.einsum("k,nk...->n...", self.direction.to(cot), cot[:, :-1])
        expected = self.scale.to(cot).reshape(-1, *(1,) * (plain.dim() - 1)) * plain
        error = (cot[:, -1] - expected).abs().max() if plain.numel() else plain.sum()
        peak = cot.abs().max() if cot.numel() else error
        return bool(error <= self.eps**0.5 * peak)

    def assign(self, cot: Tensor) -> Assigned | None:
        """Owners of the rows of cotangents [K + 1, R, ...] (the coded one last); None if a row is no one sample's."""
        if not cot.numel():  # an expert that no row was handed to
            return Assigned(torch.full((len(self.scale), 1), cot.shape[1], device=cot.device))
        flat = cot.flatten(2) if cot.dim() > 2 else cot[..., None]
        plain, coded = torch.einsum("k,kra->ra", self.direction.to(flat), flat[:-1]), flat[-1]
        norm, scale = plain.square().sum(1), self.scale.to(flat)
        ratio = (coded * plain).sum(1) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        owner = (ratio[:, None] - scale).abs().argmin(1)
        peak = flat.abs().amax((0, 2))
        wrong = (coded - scale[owner][:, None] * plain).abs().amax(1) > self.eps**0.5 * peak
        hidden = norm.sqrt() <= self.eps**0.5 * peak  # all outputs cancel in the direction: it tells nothing
        if (wrong | hidden)[peak > 0].any():
            return None
        n, rows = len(self.scale), cot.shape[1]
        order = owner.argsort(stable=True)
        counts = owner.bincount(minlength=n)
        place = torch.arange(rows, device=cot.device) - (counts.cumsum(0) - counts)[owner[order]]
        table = torch.full((n, max(int(counts.max()), 1)), rows, device=cot.device)
        table[owner[order], place] = order
        return Assigned(table)


def establish(
    cotangents: Tensor,  # [n, *shape]: entry s is the backward pass of sample s's outputs alone
    shape_fewer: tuple[int, ...],  # the node's shape at another batch size
    n_fewer: int,
) -> tuple[Owner | None, bool]:
    """Find the layout that explains which rows each sample's outputs reach, and say whether it is sure.

    It is sure when every row was reached by the sample that owns it. A dead or gated branch, or tokens that no output
    reads, leave rows unreached: then several layouts may fit, one is proposed, and each batch must check it again.
    None if no layout fits.
    """
    n, shape = cotangents.shape[0], tuple(cotangents.shape[1:])
    if len(shape) != len(shape_fewer):
        return None, True
    growing = [d for d, (size, fewer) in enumerate(zip(shape, shape_fewer, strict=True)) if size != fewer]
    if len(growing) != 1:
        return None, True
    dim = growing[0]
    if shape[dim] % n or shape[dim] // n * n_fewer != shape_fewer[dim]:
        return None, True
    folds = shape[dim] // n
    reached = cotangents.movedim(1 + dim, 1).flatten(2).ne(0).any(-1) if len(shape) > 1 else cotangents.ne(0)
    own = torch.eye(n, dtype=torch.bool, device=cotangents.device)[:, None, :, None]
    candidates = []
    for before in (d for d in range(1, folds + 1) if folds % d == 0):
        rows = reached.unflatten(1, (before, n, folds // before))  # [sample, before, owner, after]
        if not (rows & ~own).any():
            candidates.append((Owner(dim, before, folds // before), bool((rows | ~own).all())))
    # All rows reached: only the true layout fits. The first proposal otherwise is sample-major, the commonest.
    return next((c for c in candidates if c[1]), candidates[0] if candidates else (None, True))
