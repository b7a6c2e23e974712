"""Which sample does a row belong to? Established by experiment on the user's model, never assumed.

A node's output may hold the batch as its first axis, as a later one (sequence-major), or folded with others into one
(tokens flattened before a linear layer). In all these the axis has size before * n * after, and the entry at
(i, s, j) belongs to sample s. Two experiments decide: the shape at two batch sizes tells which axis grows with n; a
backward pass with the cotangent of one sample at a time tells which rows are its own, since the others must be zero.
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
