"""Leading eigenpairs from products with blocks of vectors, repeated eigenvalues included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Product = Callable[[np.ndarray], np.ndarray]

_ROUNDS = 500


def _block(k: int) -> int:
    """Vectors per product: most of a matrix product's rate, and few spent on pairs that have converged (LOG.md)."""
    return 2 if k == 1 else 16 if k < 64 else 32


def leading(product: Product, N: int, k: int, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Top k eigenpairs of a symmetric matrix given by its products: values, vectors, norms of residuals, status.

    Block Krylov iteration with full reorthogonalization and thick restarts: the basis grows by the residuals of the
    first pairs that have not converged; memory 2 N (2 k + 6 blocks) numbers. A space grown from b vectors holds at most
    b directions of every eigenspace (a kernel G (x) I has C), and no residual shows a direction that the start missed.
    Hence further searches, outside that space, until nothing there exceeds the smallest eigenvalue found.

    Parameters
    ----------
    product : [N, b] -> [N, b], float64.
    N, k : size of the matrix, pairs wanted.
    tolerance : largest |K v - lambda v| over |lambda_1| that counts as converged.
    """
    draw = np.random.default_rng(0)
    scale = 0.0

    def scaled(v: np.ndarray) -> np.ndarray:
        """Squares of very small or large entries are not representable; a power of two changes no bit of others."""
        nonlocal scale
        image = product(v)
        if scale == 0.0:
            largest = np.abs(image).max()
            scale = 2.0 ** np.floor(np.log2(largest)) if 0 < largest < np.inf else 1.0
        return image / scale

    start = draw.standard_normal((N, min(N, _block(k))))
    values, vectors, residuals, status = _leading(scaled, start, k, tolerance, draw)
    return values * scale, vectors, residuals * scale, status


def _leading(
    product: Product, start: np.ndarray, k: int, tolerance: float, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """As `leading`, of a matrix whose largest entries are near 1."""
    N, block = start.shape
    basis, image, good = _grow(product, start, k, block, tolerance, draw)
    while True:
        values, turn = _ritz(basis, image, k)
        vectors, image_k = basis @ turn, image @ turn
        residuals = np.linalg.norm(image_k - vectors * values, axis=0)
        if not good or k == 1 or basis.shape[1] >= N:  # a copy of the one value wanted would not change it
            return values, vectors, residuals, "converged" if good else "block Krylov iteration did not converge"

        low = 2 * min(values[-1], 0.0)  # what the vectors found are given for a value: one below those still sought

        def outside(v: np.ndarray, basis: np.ndarray = vectors, low: float = low) -> np.ndarray:
            inside = basis.T @ v
            v = product(v - basis @ inside)
            return v - basis @ (basis.T @ v - low * inside)

        threshold = values[-1] + max(1e-10, 10 * tolerance) * max(abs(values[0]), abs(values[-1]))
        start = draw.standard_normal((N, block))
        enough = max(1e-3 / np.sqrt(N), tolerance * abs(values[0]) / threshold) if threshold > 0 else 1e-3 / np.sqrt(N)
        missed, image, converged = _grow(outside, start, 1, block, enough, draw, threshold)
        missed = missed @ _ritz(missed, image, block)[1]
        missed, _ = np.linalg.qr(missed - vectors @ (vectors.T @ missed))
        largest = np.linalg.eigvalsh(missed.T @ product(missed))[-1]
        if not converged or largest <= threshold:
            status = "converged" if converged else "search for repeated eigenvalues did not converge"
            return values, vectors, residuals, status
        basis, image, good = _grow(product, np.concatenate([vectors, missed], axis=1), k, block, tolerance, draw)


def _ritz(basis: np.ndarray, image: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rayleigh-Ritz: the top k values in a space, and their vectors in its basis."""
    small = basis.T @ image
    values, turn = np.linalg.eigh((small + small.T) / 2)
    return values[::-1][:k].copy(), turn[:, ::-1][:, :k]


def _grow(
    product: Product,
    start: np.ndarray,
    k: int,
    block: int,
    tolerance: float,
    draw: np.random.Generator,
    threshold: float | None = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Grow a basis until its top k pairs converge, or it is clear on which side of `threshold` the first is.

    Returns basis, image, and whether that was reached.
    """
    N = len(start)
    basis, _ = np.linalg.qr(start)
    image = product(basis)
    limit = min(N, max(2 * k, basis.shape[1]) + 6 * block)
    best, stalled = np.inf, 0
    for _ in range(_ROUNDS):
        top = min(k + block, basis.shape[1])
        values, turn = _ritz(basis, image, top)
        vectors, residuals = basis @ turn, image @ turn
        if basis.shape[1] + block > limit:  # restart with the best
            basis, image = vectors, residuals.copy()
        residuals -= vectors * values
        sizes = np.linalg.norm(residuals, axis=0) / max(abs(values[0]), np.finfo(float).tiny)
        worst = sizes[:k].max()
        if top >= k and worst <= tolerance:
            return basis, image, True
        # A direction u of value m has |<u, v>| |m - values[0]| <= |residual| for the first vector v, of which a random
        # start left hardly less than 1 / (10 sqrt(N)) along u.
        margin = 10 * np.sqrt(N) * np.linalg.norm(residuals[:, 0])
        if threshold is not None and (values[0] > threshold or values[0] + margin <= threshold):
            return basis, image, True
        # Rounding sets a floor, which the matrix's own precision decides: below it no iteration improves.
        stalled = 0 if worst < 0.5 * best else stalled + 1
        best = min(best, worst)
        if top >= k and stalled >= 12 and worst <= max(1e-8, 10 * tolerance):
            return basis, image, True
        open_ = np.flatnonzero(sizes > tolerance)[:block]
        more = residuals[:, open_] / np.maximum(sizes[open_] * max(abs(values[0]), np.finfo(float).tiny), 1e-300)
        more = _outside(basis, more)
        if more.shape[1] == 0:  # an invariant space, and yet too small
            more = _outside(basis, draw.standard_normal((N, min(block, N - basis.shape[1]))))
        if more.shape[1] == 0:
            return basis, image, True
        basis, image = np.concatenate([basis, more], axis=1), np.concatenate([image, product(more)], axis=1)
    return basis, image, False


def _outside(basis: np.ndarray, more: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the part of `more` outside the span of `basis`."""
    for _ in range(2):  # once more, since the first projection leaves rounding that the normalization magnifies
        more = more - basis @ (basis.T @ more)
        more, r = np.linalg.qr(more)
        more = more[:, np.abs(np.diag(r)) > 1e-10] if more.shape[1] else more
    return more - basis @ (basis.T @ more) if more.shape[1] else more
