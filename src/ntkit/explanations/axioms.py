"""Whether scores on the training set can be alpha_i K(x_i, x_j) at all, axiom by axiom."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.gram.arrays import Matrix, as_floats, as_matrix, check_finite


@own_context()
def check_axioms(scores: Matrix, expected: Matrix | None = None, *, zero: float = 1e-12) -> dict[str, float]:
    r"""Largest violation of each axiom of generalized representers, by scores of the training set on itself.

    Scores of the form alpha_i K(x_i, x_j), K a positive semidefinite kernel, satisfy all but efficiency, and no other
    scores satisfy all of these (Tsai, Yeh, Ravikumar 2023). Write phi_ij for what example i contributes to x_j, and
    c_ij for phi_ij / a_i, with factors a that make c as symmetric as the ratios phi_ij / phi_ji allow.

    Parameters
    ----------
    scores : [n, n], ``scores[j, i]`` = phi_ij: test points along the rows, as in an `ntkit.Explanation` of the training
        set.
    expected : [n], the values f_j that the scores of each point should sum to, for efficiency.
    zero : entries of at most this part of the largest one count as zero.

    Returns
    -------
    dict
        "self-explanation": largest phi_ij of an example with phi_ii = 0, over the largest entry.
        "symmetric zero": largest phi_ji where phi_ij = 0, over the largest entry; examples with phi_ii != 0.
        "symmetric cycle": largest abs(c_ij - c_ji) / sqrt(abs(c_ii c_jj)): 0 exactly when the products along every
        cycle and along its reverse agree.
        "irreducibility": minus the smallest eigenvalue of c_ij / sqrt(abs(c_ii c_jj)), or 0: its minors must not be
        negative.
        "efficiency", with `expected`: largest abs(sum_i phi_ij - f_j) over the largest abs(f_j).
        The axiom of continuity in x cannot be seen on a matrix.

    Raises
    ------
    Refused
        For scores that are not a finite square matrix, or expected values of another number.

    Examples
    --------
    >>> K, alpha = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([3.0, -1.0])
    >>> max(check_axioms(alpha * K).values())
    0.0
    """
    matrix = as_matrix(scores, "scores", "Pass the scores of the training set on itself.").to(torch.float64)
    n = len(matrix)
    if matrix.shape[1] != n:
        fix = "Explain the training examples themselves."
        raise refusal("scores", got=f"shape {list(matrix.shape)}", expected="[n, n]", fix=fix)
    phi = matrix.T.cpu().numpy()
    scale = float(np.abs(phi).max()) or 1.0
    small, own = np.abs(phi) <= zero * scale, np.abs(phi.diagonal()) > zero * scale
    result = {"self-explanation": float(np.abs(phi[~own]).max(initial=0.0)) / scale}
    active = np.ix_(own, own)
    phi_active, zeros = phi[active], small[active]
    result["symmetric zero"] = float(np.abs(phi_active.T[zeros]).max(initial=0.0)) / scale
    cosine = _normalized(phi_active, zeros)
    result["symmetric cycle"] = float(np.abs(cosine - cosine.T).max(initial=0.0))
    lowest = float(np.linalg.eigvalsh((cosine + cosine.T) / 2)[0]) if len(cosine) else 0.0
    result["irreducibility"] = max(0.0, -lowest)
    if expected is not None:
        result["efficiency"] = _efficiency(matrix, expected)
    return result


def _efficiency(matrix: Tensor, expected: Matrix) -> float:
    target = check_finite(as_floats(expected, "expected"), "expected").to(matrix)
    if target.shape != (len(matrix),):
        fix = "Pass the output that the scores explain, at each training point."
        raise refusal("expected", got=f"shape {list(target.shape)}", expected=f"[{len(matrix)}]", fix=fix)
    gap = float((matrix.sum(1) - target).abs().max())
    return gap / (float(target.abs().max()) or 1.0)


def _normalized(phi: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """c_ij / sqrt(|c_ii c_jj|), c_ij = phi_ij / a_i, with a_i / a_j = phi_ij / phi_ji along a tree of large entries."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    n = len(phi)
    if not n:
        return phi
    both = ~(zeros | zeros.T)
    np.fill_diagonal(both, False)
    size = np.abs(phi * phi.T) / np.abs(np.outer(phi.diagonal(), phi.diagonal()))
    lengths = np.where(both, 1.0 + np.log1p(1 / np.where(both, size, 1.0)), 0.0)  # > 0, and short where size is large
    tree = minimum_spanning_tree(csr_matrix(lengths))
    factor, seen = np.ones(n), np.zeros(n, dtype=bool)
    for root in range(n):
        if seen[root]:
            continue
        factor[root] = phi[root, root]  # so that c of the root is 1
        order, parents = breadth_first_order(tree, root, directed=False)
        seen[order] = True
        for j in order[1:]:
            i = parents[j]
            factor[j] = factor[i] * phi[j, i] / phi[i, j]
    c = phi / factor[:, None]
    return c / np.sqrt(np.abs(np.outer(c.diagonal(), c.diagonal())))
