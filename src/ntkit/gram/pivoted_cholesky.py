"""A low-rank part of a kernel matrix from its diagonal and a few of its rows, drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.gram.gram_matrix import Gram

_EPS = torch.finfo(torch.float64).eps
_ROUNDS = 8  # times that rows are read where none is drawn in vain: each time at most that part of the rank


def pivoted_cholesky(K: Gram, rank: int, enough: float) -> tuple[Tensor, float]:
    """Randomly pivoted Cholesky: F, [<= rank, N], with K - F^T F positive semi-definite, and the trace of that.

    A point is drawn with probability proportional to the diagonal of what is left of K; the factor of its row is
    subtracted, and so on. Several points are drawn at a time from the same diagonal, and each is kept with the
    probability that makes the result one of single draws. Rows of those drawn are read once; nothing else of K is.

    Parameters
    ----------
    K : with a non-negative diagonal.
    rank : most rows of F.
    enough : stop once the trace left is at most this, or at the rounding of K.

    Notes
    -----
    Chen, Epperly, Tropp, Webber (2022), "Randomly pivoted Cholesky", algorithm 2.1; in blocks: Epperly, Tropp, Webber
    (2024), "Embrace rejection". The same draws at every call.
    """
    generator = torch.Generator().manual_seed(0)
    left = K.diagonal().clamp(min=0).clone()
    size, at_once = float(left.sum()), max(1, rank // _ROUNDS)
    smallest = max(K.precision, _EPS) * left
    F, count = torch.empty(rank, len(K), dtype=torch.float64, device=K.device), 0
    while count < rank and float(left.sum()) > max(enough, K.precision * size):
        draws = torch.rand(at_once, 2, dtype=torch.float64, generator=generator, device="cpu").to(K.device)
        sums = left.cumsum(0)
        drawn = torch.searchsorted(sums, draws[:, 0] * sums[-1], right=True).clamp(max=len(K) - 1)
        points = torch.tensor(list(dict.fromkeys(drawn.tolist())), device=K.device)
        rows = K.rows(points)
        known = F[:count, points]
        inside = rows[:, points] - known.T @ known
        entries, least = inside.diagonal(), smallest[points]
        kept, lower = _kept(inside, entries * draws[: len(points), 1], least, rank - count)
        left[points] = entries.where(entries > least, 0.0)  # rounding alone would be drawn again and again
        if not len(kept):
            continue
        new = rows[kept] - known[:, kept].T @ F[:count]
        new = torch.linalg.solve_triangular(lower, new, upper=False)
        F[count : count + len(kept)] = new
        count += len(kept)
        left = (left - new.square().sum(0)).clamp(min=0)
        left[points[kept]] = 0
    return F[:count], float(left.sum())


def _kept(inside: Tensor, thresholds: Tensor, smallest: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Which of the points drawn are kept, in order, and the Cholesky factor of `inside` at these.

    A point is kept if what those before it leave of its diagonal entry exceeds its threshold, which is uniform between
    0 and the entry itself.
    """
    rest, kept, columns = inside.clone(), [], []
    for i in range(len(rest)):
        pivot = float(rest[i, i])
        if pivot <= float(smallest[i]) or pivot <= float(thresholds[i]):
            continue
        column = rest[:, i] / pivot**0.5
        rest -= torch.outer(column, column)
        kept.append(i)
        columns.append(column)
        if len(kept) == most:
            break
    chosen = torch.tensor(kept, dtype=torch.long, device=inside.device)
    lower = torch.stack(columns, dim=1)[chosen].tril() if columns else inside[:0, :0]
    return chosen, lower
