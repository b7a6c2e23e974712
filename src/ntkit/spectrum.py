"""Eigenvalues, eigenfunctions, alignment and effective rank of a kernel's Gram matrix, all in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.checks import refusal

# Largest |K - K^T| relative to the largest |K| that is rounding and not a mistake, by the precision K was computed in.
_ASYMMETRY = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_BLOCK = 2**22  # float64 values worked on at once: 32 MiB
_Product = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Leading eigenpairs of a Gram matrix, largest eigenvalue first, with their certificate.

    Attributes
    ----------
    eigenvalues : Tensor [k], float64, descending. Of K itself: divide by n for those of the kernel's integral operator.
    eigenvectors : Tensor [N, k], orthonormal columns; N = n, or n C for a kernel [n, n, C, C] (row i C + c). The sign is
        chosen so that the entry of largest magnitude is positive.
    trace : float or None
        Sum of the diagonal (exact, not the sum of the eigenvalues); None for an operator that does not offer it.
    residuals : Tensor [k]
        |K v - lambda v| / |lambda_1|: the certificate of each pair.
    noise : float
        Eigenvalues up to this size are rounding of K's own precision, not information.
    outputs : int or None
        C of a kernel [n, n, C, C], 1 for [n, n], None (not known) for an operator.
    status : str
        "converged", or what the iteration did not reach (the pairs not found are NaN).
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    trace: float | None
    residuals: Tensor
    noise: float = 0.0
    outputs: int | None = 1
    status: str = "converged"

    @property
    def tail(self) -> float | None:
        """What the eigenvalues at hand leave of the trace: ``trace - sum(eigenvalues)``; None without a trace."""
        return None if self.trace is None else self.trace - float(self.eigenvalues.sum())

    def energy(self, v: Any) -> Tensor:
        """Cumulative relative energy of `v` in the leading eigenvectors (Kopitkov & Indelman 2020).

        ``E(k) = sum_{i <= k} <v_i, v>^2 / |v|^2``, in [0, 1], and 1 when all eigenvectors are at hand.

        Parameters
        ----------
        v : [n], or [n, C] (targets, outputs, residuals). Against a kernel [n, n] the energies of the columns are summed;
            against a kernel [n, n, C, C] (or an operator of that size) `v` is flattened to one vector of n C.

        Returns
        -------
        Tensor [k], float64
            NaN where `v` is zero, which has no direction.

        Raises
        ------
        Refused
            When the shape does not fit, or a value is not finite.

        Examples
        --------
        >>> spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).energy([1.0, 0.0, 1.0]).tolist()
        [0.5, 0.5, 1.0]
        """
        N, v = self.eigenvectors.shape[0], _vector(v, "v")
        flat = v.ndim == 2 and v.numel() == N and self.outputs in (None, v.shape[1])
        if v.ndim not in (1, 2) or (v.shape[0] != N and not flat):
            C = self.outputs or 1
            raise refusal(
                "v",
                got=f"shape {list(v.shape)}",
                expected=f"[{N}], or [{N // C}, {C}]" if C > 1 else f"[{N}] or [{N}, C]",
                fix="Give one value per row of the Gram matrix, in the same order.",
            )
        if v.shape[0] != N:
            v = v.reshape(N)
        v = v.reshape(N, -1).to(self.eigenvectors.device)
        v = v / v.abs().max()  # squares of very small or large values stay representable
        return ((self.eigenvectors.T @ v) ** 2).sum(1).cumsum(0) / (v**2).sum()

    def extend(self, K_test: Any) -> Tensor:
        """Nystrom extension: the eigenfunctions at new points, ``v_i(x) = (1/lambda_i) sum_j k(x, x_j) v_i[j]``.

        On the training points it returns the eigenvectors (Kopitkov & Indelman 2020; Jacot et al. 2018, section 4).

        Parameters
        ----------
        K_test : [m, n], test points against the training points; [m, n, C, C] for a kernel with outputs.

        Returns
        -------
        Tensor [m, k], float64
            [m C, k] for a kernel with outputs, in the order of the eigenvectors' rows.

        Raises
        ------
        Refused
            When an eigenvalue is not positive (it has no eigenfunction to extend), a shape does not fit, or a value is
            not finite.

        Examples
        --------
        >>> K = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> s = spectrum(K)
        >>> torch.allclose(s.extend(K), s.eigenvectors)
        True
        """
        N, k = self.eigenvectors.shape
        positive = self.eigenvalues > self.noise
        if not bool(positive.all()):
            usable = int(positive.to(torch.int64).cumprod(0).sum())
            raise refusal(
                "extend",
                got=f"eigenvalue {usable + 1} of {k} = {float(self.eigenvalues[usable]):.3g}, zero to rounding",
                expected="positive eigenvalues",
                fix=f"Only the top {usable} are usable: take spectrum(K, k={usable})."
                if usable
                else "None is usable: this Gram matrix has no positive eigenvalue.",
            )
        K = _real(K_test, "K_test")
        if K.ndim == 4 and K.shape[2] == K.shape[3]:
            K = K.permute(0, 2, 1, 3).reshape(K.shape[0] * K.shape[2], -1)
        if K.ndim != 2 or K.shape[1] != N:
            C = self.outputs or 1
            raise refusal(
                "K_test",
                got=f"shape {list(torch.as_tensor(K_test).shape)}",
                expected=f"[m, {N // C}, {C}, {C}]" if C > 1 else f"[m, {N}]",
                fix="Compute it as k(x_test, x_train), with the same training points.",
            )
        K = K.to(self.eigenvectors)
        _refuse_not_finite(K, "K_test")
        return K @ self.eigenvectors / self.eigenvalues


def spectrum(K: Any, k: int | None = None) -> Spectrum:
    """Eigenpairs of a Gram matrix: all of them, or the top `k`.

    All of them by a dense float64 eigendecomposition of (K + K^T)/2. The top `k` by Lanczos iteration (ARPACK, fixed
    start), with two additions: a second iteration outside the subspace found looks for copies of repeated eigenvalues,
    which Lanczos can miss and no residual shows, and a final Rayleigh-Ritz step makes the vectors orthonormal.

    Parameters
    ----------
    K : [n, n] symmetric (torch or numpy, any real dtype); [n, n, C, C], taken as the n C x n C matrix with row i C + c;
        or an operator with ``.shape``, ``@`` and ``.to_scipy()``, such as ``kernel.operator(x)``, which is never formed
        unless k > N/3.
    k : how many, 1 to N; None = all. Needed for an operator. For k > N/3 the dense route is the faster one and is taken.

    Returns
    -------
    Spectrum
        On the device of `K`; same input, same bits.

    Raises
    ------
    Refused
        When K is not square, not symmetric (largest |K - K^T| over largest |K| above 1e-10 in float64, 1e-4 in float32),
        not finite, empty or zero; when k is out of range.

    References
    ----------
    Kopitkov & Indelman 2020, Neural Spectrum Alignment. Jacot et al. 2018, section 4: kernel principal components.

    Examples
    --------
    >>> s = spectrum(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    >>> s.eigenvalues.tolist(), s.trace, s.tail
    ([3.0, 2.0, 1.0], 6.0, 0.0)
    """
    if hasattr(K, "to_scipy"):
        return _operator_spectrum(K, k)
    K4, _, asymmetry = _gram(K, "K")
    n, C = K4.shape[0], K4.shape[2]
    N, device = n * C, K4.device
    k = _count(k, N)
    matrix = K4.permute(0, 2, 1, 3).reshape(N, N).to(torch.float64)
    if asymmetry:
        matrix = (matrix + matrix.T) / 2
    trace = float(matrix.diagonal().sum())
    eps = torch.finfo(K4.dtype).eps

    def product(v: np.ndarray) -> np.ndarray:
        return (matrix @ torch.from_numpy(v).to(device)).cpu().numpy()

    if 3 * k <= N:
        values, vectors, residuals, status = _leading(product, N, k, 0.0)
        if status == "converged":
            return _spectrum(*(torch.from_numpy(a).to(device) for a in (values, vectors, residuals)), trace, eps, C)
    return _spectrum(*_dense(matrix, k), trace, eps, C)


def effective_rank(K: Any) -> float:
    """Return ``trace(K) / lambda_max(K)``: how many directions carry the kernel (Long 2021).

    1 for a rank-one kernel, n for the identity. Other definitions are in use under this name (the exponential of the
    entropy of the normalised eigenvalues; trace^2 over the sum of squared eigenvalues): they give other numbers.

    Parameters
    ----------
    K : as in `spectrum`; an operator must offer its trace or its diagonal.

    Returns
    -------
    float
        NaN when no eigenvalue is positive (then K is no kernel's Gram matrix).

    Raises
    ------
    Refused
        As `spectrum`; or when an operator offers no trace.

    Examples
    --------
    >>> effective_rank(torch.eye(7))
    7.0
    """
    top = spectrum(K, k=1)
    if top.trace is None:
        raise refusal(
            "effective_rank",
            got=f"{type(K).__name__} without trace or diagonal",
            expected="a Gram matrix, or an operator with .diagonal()",
            fix="Give the Gram matrix.",
        )
    largest = float(top.eigenvalues[0])
    return top.trace / largest if largest > 0 else math.nan


def alignment(K1: Any, K2_or_y: Any, centered: bool = False) -> float:
    """Cosine between two kernels, or between a kernel and its targets: ``<K1, K2>_F / (|K1|_F |K2|_F)``.

    Accumulated in float64 over blocks of rows: no copy of a Gram matrix is made.

    Parameters
    ----------
    K1 : [n, n] or [n, n, C, C], symmetric.
    K2_or_y : a second kernel of the same shape, or targets: y [n] or Y [n, C], meaning ``K2 = Y Y^T``, never formed. Against
        [n, n, C, C], targets are [n, C], taken as one vector of n C. Anything of the shape [n, n] against a kernel [n, n] is
        read as a kernel.
    centered : centre both with ``H = I - 1 1^T / n``: K -> H K H, Y -> H Y (Cortes et al. 2012; CKA). For [n, n, C, C] the
        mean over samples is removed per output (H on the samples, identity on the outputs; as Baratin et al. 2021 do), so
        a constant added to one output changes nothing.

    Returns
    -------
    float
        In [0, 1] for positive semi-definite kernels. NaN when nothing is left after centring (a constant kernel, targets
        all equal), which has no direction.

    Raises
    ------
    Refused
        When the shapes do not match, or one of the two is not symmetric, not finite, empty or zero.

    References
    ----------
    Cristianini et al. 2001; Cortes, Mohri, Rostamizadeh 2012; Baratin et al. 2021. Long 2021 uses the uncentred form.

    Examples
    --------
    >>> alignment(torch.eye(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    0.5
    """
    A, peak_a, _ = _gram(K1, "K1")
    n, C = A.shape[0], A.shape[2]
    other = _real(K2_or_y, "K2_or_y").to(A.device)
    nothing = (n * C * 4e-16) ** 2  # squared norm of what rounding leaves of a constant with entries of size 1
    aa = ab = bb = 0.0
    if other.shape == torch.as_tensor(K1).shape:
        B, peak_b, _ = _gram(other, "K2")
        for (_, a), (_, b) in zip(_rows(A, peak_a, centered), _rows(B, peak_b, centered), strict=True):
            aa, ab, bb = aa + float((a * a).sum()), ab + float((a * b).sum()), bb + float((b * b).sum())
    else:
        Y = _targets(other, n, C)
        Y = Y - Y.mean(0) if centered else Y
        bb = float((torch.einsum("icm,icp->mp", Y, Y) ** 2).sum())
        for rows, a in _rows(A, peak_a, centered):
            aa += float((a * a).sum())
            ab += float((torch.einsum("ijcd,jdm->icm", a, Y) * Y[rows]).sum())
        nothing_left = float((Y * Y).sum()) <= nothing
        if nothing_left:
            return math.nan
    return ab / math.sqrt(aa * bb) if min(aa, bb) > nothing**2 and aa > nothing else math.nan
