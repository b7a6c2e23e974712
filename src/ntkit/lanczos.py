"""Leading eigenpairs from products alone, repeated eigenvalues included (ARPACK, asked until nothing is missed)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def leading(product: Callable[[np.ndarray], np.ndarray], N: int, k: int, tolerance: float) -> tuple:
    """Top k eigenpairs through products alone: values, vectors, norms of residuals, status.

    A Krylov space of one vector holds one direction of every eigenspace: copies of a repeated eigenvalue (a kernel
    G (x) I has them) appear only through rounding, or not at all. Hence the second search, outside the subspace
    found, until nothing there exceeds the smallest eigenvalue kept.
    """
    starts = np.random.default_rng(0)  # a new start each time: the old one has no part in the copies that it missed
    _, basis, good = _arpack(product, N, k, tolerance, starts)
    if basis.shape[1] < k:
        return np.full(k, np.nan), np.full((N, k), np.nan), np.full(k, np.nan), "Lanczos iteration did not converge"
    while True:
        basis, _ = np.linalg.qr(basis)
        image = product(basis)
        small = basis.T @ image
        values, turn = np.linalg.eigh((small + small.T) / 2)  # Rayleigh-Ritz
        values, turn = values[::-1][:k].copy(), turn[:, ::-1][:, :k]
        basis, image = basis @ turn, image @ turn

        def outside(v: np.ndarray, basis: np.ndarray = basis) -> np.ndarray:
            v = product(v - basis @ (basis.T @ v))
            return v - basis @ (basis.T @ v)

        threshold = max(values[-1], 0.0) + max(1e-10, 10 * tolerance) * abs(values[0])
        largest, missed, good = _arpack(outside, N, 1, 1e-3, starts)
        if good and largest[0] > threshold:
            largest, missed, good = _arpack(outside, N, min(k, 4), tolerance, starts)
        if not good or largest.max() <= threshold:
            status = "converged" if good else "search for repeated eigenvalues did not converge"
            return values, basis, np.linalg.norm(image - basis * values, axis=0), status
        basis = np.concatenate([basis, missed], axis=1)


def _arpack(
    product: Callable[..., np.ndarray], N: int, k: int, tolerance: float, starts: np.random.Generator
) -> tuple[Any, np.ndarray, bool]:
    """Lanczos from a drawn start: what had converged, and whether all had."""
    import scipy.sparse.linalg as sparse

    linear: Any = sparse.LinearOperator
    start, matrix = starts.standard_normal(N), linear((N, N), product, dtype=np.float64)
    try:
        found = sparse.eigsh(matrix, k=k, which="LA", v0=start, tol=tolerance)
    except sparse.ArpackNoConvergence as stop:
        return stop.eigenvalues, stop.eigenvectors, False
    return *found, True
