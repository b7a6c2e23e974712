"""Training outside the leading eigenvectors: polynomials in the rest of the kernel, with bounds of their error."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ntkit.gram.gram_matrix import Gram

_DEGREE = 8  # products with K; the bounds are of use up to a time of about this many over the largest rate left

Filter = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rates [n], times [T] -> r, phi, each [T, n]


class Tail:
    r"""What training does to f_0 - y outside the leading eigenvectors V of K.

    There K is A = P K P with P = I - V V^T, its eigenvalues between 0 and n `rate`. The share r(A/n) of the error that
    remains after time t, and phi(A/n), are applied to P (f_0 - y) by interpolation in d + 1 Chebyshev nodes of that
    interval: d <= 8 products with K for all times together. The m-th derivative of r is at most T^m, that of phi at
    most T^(m+1) / (m+1), with T = t or lr t. So the error is at most 2 (T rate / 4)^(d+1) / (d+1)! for r, and
    T / (d+2) times that for phi; and never more than the largest value of the polynomial and of the function together.
    For each time the degree with the least bound is taken.

    Parameters
    ----------
    K : positive semi-definite.
    vectors, values : leading eigenpairs of K, [n, k] and [k].
    defect : |K V - V diag(values)| (Frobenius): the pairs are exact for a matrix that differs from K by that much.
    trace : of A; it bounds A's largest eigenvalue, and so does the least of `values`.
    noise : eigenvalues of K/n up to this count as 0: what has no others is not learned.
    gap : f_0 - y, [n, C].
    filters : r and phi of rates and times.
    lr : None for continuous time.

    Attributes
    ----------
    rate : a bound of the largest eigenvalue of A, over n.
    blocks : Chebyshev polynomials of A times P (f_0 - y), [d + 1, n, C].
    """

    def __init__(
        self,
        K: Gram,
        vectors: Tensor,
        values: Tensor,
        defect: float,
        trace: float,
        noise: float,
        gap: Tensor,
        filters: Filter,
        lr: float | None,
    ) -> None:
        n = len(K)
        self._vectors, self._filters, self._lr = vectors, filters, lr
        rate = min(float(values[-1]) + defect, trace) / n
        self.rate = rate if rate > noise else 0.0
        self._defect, self._gap = defect / n, gap.norm(dim=0)
        blocks = [self.outside(gap)]
        self._size = blocks[0].norm(dim=0)
        while len(blocks) <= _DEGREE and self.rate > 0 and self._size.any():
            image = self.outside(K @ blocks[-1]) * (2 / (n * self.rate)) - blocks[-1]
            blocks.append(image if len(blocks) == 1 else 2 * image - blocks[-2])
        self.blocks = torch.stack(blocks)

    def outside(self, block: Tensor) -> Tensor:
        """P times a block, [n, ...]."""
        return block - self._vectors @ (self._vectors.T @ block)

    def left(self, times: Tensor) -> Tensor:
        """r(A/n) P (f_0 - y), [T, n, C]."""
        return torch.einsum("td,dnc->tnc", self._weights(times, 0)[0], self.blocks)

    def done(self, times: Tensor) -> Tensor:
        """Weights of `blocks`, [T, d + 1], of which phi(A/n) P (f_0 - y) is made."""
        return self._weights(times, 1)[0]

    def left_error(self, times: Tensor) -> Tensor:
        """Bound of the error of f_t over the training points, in the 2-norm, [T, C]: of `left`, and of the pairs."""
        moved = (self._horizon(times) * max(self._defect, 1e-300)).clamp(max=1)
        return self._weights(times, 0)[1][:, None] * self._size + moved[:, None] * self._gap

    def done_error(self, times: Tensor, rows: Tensor) -> Tensor:
        """Bound of the error of f_t at test points, [T, m, C], from their rows of the kernel, [m, n]."""
        rows = rows.to(torch.float64)
        moved = self._horizon(times).square() * max(self._defect, 1e-300) / 2
        error = _outer(self._weights(times, 1)[1], self.outside(rows.T).norm(dim=0), self._size)
        return (error + _outer(moved, rows.norm(dim=1), self._gap)) / rows.shape[1]

    def _horizon(self, times: Tensor) -> Tensor:
        return times if self._lr is None else self._lr * times

    def _weights(self, times: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Weights of the blocks, [T, d + 1], for r (0) or phi (1), and the bound of the polynomial's error, [T]."""
        count = len(self.blocks)
        horizon = self._horizon(times)
        best, bound = times.new_zeros(len(times), count), torch.full_like(times, torch.inf)
        most = torch.ones_like(times) if which == 0 else horizon
        if self.rate == 0:
            return best + (which == 0), torch.zeros_like(times)
        for d in range(count):
            angles = (torch.arange(d + 1, dtype=torch.float64, device=times.device) + 0.5) * (math.pi / (d + 1))
            values = self._filters(self.rate * (1 + angles.cos()) / 2, times)[which]
            turn = torch.cos(torch.outer(angles, torch.arange(d + 1, dtype=torch.float64, device=times.device)))
            weights = values @ turn * (2 / (d + 1))
            weights[:, 0] /= 2
            remainder = (d + 1) * (horizon * self.rate / 4).log() - math.lgamma(d + 2) + math.log(2)
            remainder = remainder.exp() * (1 if which == 0 else horizon / (d + 2))
            remainder = torch.where(horizon * self.rate > 0, remainder, 0.0)
            error = torch.minimum(remainder, weights.abs().sum(1) + most)
            better = error < bound if d else torch.ones_like(bound, dtype=torch.bool)
            best[better] = 0
            best[better, : d + 1] = weights[better]
            bound = torch.where(better, error, bound)
        return best, bound


def _outer(bounds: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Products of all entries, [T, m, C]; 0 where a size is 0, also where the bound is infinite."""
    sizes = torch.outer(rows, columns)
    return torch.where(sizes > 0, bounds[:, None, None] * sizes, 0.0)
