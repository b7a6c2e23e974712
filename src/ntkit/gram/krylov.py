"""Leading eigenpairs from products with blocks of vectors, repeated eigenvalues included."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from ntkit.base.operation_threads import limited, one_thread, threads_of_caller
from ntkit.base.workers import product as by_workers

Product = Callable[[np.ndarray], np.ndarray]
_Product = Callable[[Tensor], Tensor]

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
    as_outside = nullcontext if limited() else threads_of_caller

    def scaled(v: Tensor) -> Tensor:
        """Squares of very small or large entries are not representable; a power of two changes no bit of others."""
        nonlocal scale
        with as_outside():
            image = np.asarray(product(v.numpy()), dtype=np.float64)
        if scale == 0.0:
            largest = float(np.abs(image).max())
            scale = 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
        return torch.from_numpy(image / scale)  # a new array: the user's may be read-only

    start = _normal(draw, N, min(N, _block(k)))
    with one_thread():  # of PyTorch's, which wait for each other in small operations; workers have the large ones
        values, vectors, residuals, status = _leading(scaled, start, k, tolerance, draw)
    return (values * scale).numpy(), vectors.numpy(), (residuals * scale).numpy(), status


def _leading(
    product: _Product, start: Tensor, k: int, tolerance: float, draw: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, str]:
    """As `leading`, of a matrix whose largest entries are near 1."""
    N, block = start.shape
    basis, image, good = _grow(product, start, k, block, tolerance, draw)
    while True:
        values, turn = _ritz(basis, image, k)
        vectors, image_k = by_workers(basis, turn), by_workers(image, turn)
        residuals = (image_k - vectors * values).norm(dim=0)
        if not good or k == 1 or basis.shape[1] >= N:  # a copy of the one value wanted would not change it
            return values, vectors, residuals, "converged" if good else "block Krylov iteration did not converge"

        low = 2 * min(float(values[-1]), 0.0)  # what the vectors found are given for a value: one below those sought

        def outside(v: Tensor, basis: Tensor = vectors, low: float = low) -> Tensor:
            inside = by_workers(basis.T, v)
            v = product(v - by_workers(basis, inside))
            return v - by_workers(basis, by_workers(basis.T, v) - low * inside)

        first, last = float(values[0]), float(values[-1])
        threshold = last + max(1e-10, 10 * tolerance) * max(abs(first), abs(last))
        start = _normal(draw, N, block)
        enough = max(1e-3 / math.sqrt(N), tolerance * abs(first) / threshold) if threshold > 0 else 1e-3 / math.sqrt(N)
        missed, image, converged = _grow(outside, start, 1, block, enough, draw, threshold)
        missed = by_workers(missed, _ritz(missed, image, block)[1])
        missed, _ = torch.linalg.qr(missed - by_workers(vectors, by_workers(vectors.T, missed)))
        largest = float(_ritz(missed, product(missed), 1)[0])
        if not converged or largest <= threshold:
            status = "converged" if converged else "search for repeated eigenvalues did not converge"
            return values, vectors, residuals, status
        basis, image, good = _grow(product, torch.cat([vectors, missed], dim=1), k, block, tolerance, draw)


def _normal(draw: np.random.Generator, N: int, count: int) -> Tensor:
    return torch.from_numpy(draw.standard_normal((N, count)))


def _ritz(basis: Tensor, image: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rayleigh-Ritz: the top k values in a space, and their vectors in its basis."""
    small = by_workers(basis.T, image)
    values, turn = torch.linalg.eigh((small + small.T) / 2)
    return values.flip(0)[:k], turn.flip(1)[:, :k].contiguous()


def _grow(
    product: _Product,
    start: Tensor,
    k: int,
    block: int,
    tolerance: float,
    draw: np.random.Generator,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, bool]:
    """Grow a basis until its top k pairs converge, or it is clear on which side of `threshold` the first is.

    Returns basis, image, and whether that was reached.
    """
    N, tiny = len(start), np.finfo(float).tiny
    basis, _ = torch.linalg.qr(start)
    image = product(basis)
    limit = min(N, max(2 * k, basis.shape[1]) + 6 * block)
    best, stalled = math.inf, 0
    for _ in range(_ROUNDS):
        top = min(k + block, basis.shape[1])
        values, turn = _ritz(basis, image, top)
        vectors, residuals = by_workers(basis, turn), by_workers(image, turn)
        if basis.shape[1] + block > limit:  # restart with the best
            basis, image = vectors, residuals.clone()
        residuals -= vectors * values
        first, norms = float(values[0]), residuals.norm(dim=0)
        sizes = norms / max(abs(first), tiny)
        worst = float(sizes[:k].max())
        if top >= k and worst <= tolerance:
            return basis, image, True
        # A direction u of value m has |<u, v>| |m - values[0]| <= |residual| for the first vector v, of which a random
        # start left hardly less than 1 / (10 sqrt(N)) along u.
        margin = 10 * math.sqrt(N) * float(norms[0])
        if threshold is not None and (first > threshold or first + margin <= threshold):
            return basis, image, True
        # Rounding sets a floor, which the matrix's own precision decides: below it no iteration improves.
        stalled = 0 if worst < 0.5 * best else stalled + 1
        best = min(best, worst)
        if top >= k and stalled >= 12 and worst <= max(1e-8, 10 * tolerance):
            return basis, image, True
        open_ = (sizes > tolerance).nonzero()[:block, 0]
        more = _outside(basis, residuals[:, open_] / norms[open_].clamp(min=1e-300))
        if more.shape[1] == 0:  # an invariant space, and yet too small
            more = _outside(basis, _normal(draw, N, min(block, N - basis.shape[1])))
        if more.shape[1] == 0:
            return basis, image, True
        basis, image = torch.cat([basis, more], dim=1), torch.cat([image, product(more)], dim=1)
    return basis, image, False


def _outside(basis: Tensor, more: Tensor) -> Tensor:
    """An orthonormal basis of the part of `more` outside the span of `basis`."""

    def projected(more: Tensor) -> Tensor:
        return more - by_workers(basis, by_workers(basis.T, more))

    for _ in range(2):  # once more, since the first projection leaves rounding that the normalization magnifies
        more, r = torch.linalg.qr(projected(more))
        more = more[:, r.diagonal().abs() > 1e-10] if more.shape[1] else more
    return projected(more) if more.shape[1] else more
