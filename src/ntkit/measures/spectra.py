"""Eigenvalues, eigenfunctions, alignment and effective rank of a kernel's Gram matrix, all in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.gram.krylov import leading

# Largest |K - K^T| relative to the largest |K| that is rounding and not a mistake, by the precision K was computed in.
_ASYMMETRY = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_BLOCK = 2**18  # float64 values worked on at once: 2 MiB, which stays in cache


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Leading eigenpairs of a Gram matrix, largest eigenvalue first, with their certificate.

    Attributes
    ----------
    eigenvalues : Tensor [k], float64, descending. Of K itself: divide by n for those of the integral operator.
    eigenvectors : Tensor [N, k], orthonormal columns, each with its entry of largest magnitude positive; N = n, or n C
        for a kernel [n, n, C, C] (row i C + c).
    trace : sum of the diagonal (not of the eigenvalues); None for an operator that offers neither trace nor diagonal.
    residuals : Tensor [k], |K v - lambda v| / |lambda_1|: the certificate of each pair.
    noise : eigenvalues up to this size are rounding of K's own precision, not information.
    outputs : C of a kernel [n, n, C, C], 1 for [n, n], None (not known) for an operator.
    status : "converged", or what the iteration did not reach (`residuals` say how far it got).
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
        v : [n], or [n, C] (targets, outputs, residuals). Against a kernel [n, n] the energies of the columns are
            summed; against [n, n, C, C] (or an operator of that size) `v` is flattened to one vector of n C.

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
        N, C, v = self.eigenvectors.shape[0], self.outputs or 1, _real(v, "v").to(self.eigenvectors)
        flat = v.ndim == 2 and v.numel() == N and self.outputs in (None, v.shape[1])
        if v.ndim not in (1, 2) or v.numel() == 0 or (v.shape[0] != N and not flat):
            expected = f"[{N}] or [{N // C}, {C}]" if C > 1 else f"[{N}] or [{N}, C]"
            fix = "Give one value per row of the Gram matrix, in the same order."
            raise refusal("v", got=f"shape {list(v.shape)}", expected=expected, fix=fix)
        _refuse_not_finite(v, "v")
        v = v.reshape(N, -1) if v.shape[0] == N else v.reshape(N, 1)
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
            When an eigenvalue is not positive (it has no eigenfunction), a shape does not fit, a value is not finite.

        Examples
        --------
        >>> K = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> s = spectrum(K)
        >>> torch.allclose(s.extend(K), s.eigenvectors)
        True
        """
        N, k = self.eigenvectors.shape
        usable = int((self.eigenvalues > self.noise).to(torch.int64).cumprod(0).sum())
        if usable < k:
            raise refusal(
                "extend",
                got=f"eigenvalue {usable + 1} of {k} = {float(self.eigenvalues[usable]):.3g}",
                expected=f"positive eigenvalues, above rounding ({self.noise:.1g})",
                fix=f"Only the top {usable} of the {k} are usable: take spectrum(K, k={usable})." * (usable > 0)
                or "None is usable: this Gram matrix has no positive eigenvalue.",
            )
        K = _real(K_test, "K_test").to(self.eigenvectors)
        shape, C = list(K.shape), self.outputs or 1
        if K.ndim == 4 and shape[2] == shape[3]:
            K = K.transpose(1, 2).reshape(shape[0] * shape[2], -1)
        if K.ndim != 2 or K.shape[1] != N:
            expected = f"[m, {N // C}, {C}, {C}]" if C > 1 else f"[m, {N}]"
            fix = "Compute it as k(x_test, x_train), with the same training points."
            raise refusal("K_test", got=f"shape {shape}", expected=expected, fix=fix)
        _refuse_not_finite(K, "K_test")
        return K @ self.eigenvectors / self.eigenvalues


def spectrum(K: Any, k: int | None = None) -> Spectrum:
    """Eigenpairs of a Gram matrix: all of them, or the top `k`.

    All of them by a dense float64 eigendecomposition of (K + K^T)/2. The top `k` by block Krylov iteration
    (fixed start), and a second one outside the subspace found, which looks for copies of repeated eigenvalues: those
    that the start missed show in no residual.

    Parameters
    ----------
    K : [n, n] symmetric (torch or numpy, any real dtype); [n, n, C, C], taken as the n C x n C matrix with row i C + c;
        or an operator with ``.shape``, ``@`` and ``.to_scipy()``, such as ``kernel.operator(x)``, which is never formed
        unless k > N/3.
    k : how many, 1 to N; None = all. Needed for an operator. For k > N/3 the dense route, then faster, is taken.

    Returns
    -------
    Spectrum
        On the device of `K`; same input, same result.

    Raises
    ------
    Refused
        When K is not square, not symmetric (largest |K - K^T| over largest |K| above 1e-10 in float64, 1e-4 in
        float32; not checked for an operator: see the residuals), not finite, empty or zero; when k is out of range.

    References
    ----------
    Kopitkov & Indelman 2020, Neural Spectrum Alignment. Jacot et al. 2018, section 4: kernel principal components.

    Examples
    --------
    >>> s = spectrum(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    >>> s.eigenvalues.tolist(), s.trace, s.tail
    ([3.0, 2.0, 1.0], 6.0, 0.0)
    """
    product: Callable[[np.ndarray], np.ndarray]
    matrix, outputs, device = None, None, torch.device("cpu")
    if hasattr(K, "to_scipy"):
        product, N, eps = _operator(K, k)
        trace = _operator_trace(K)
    else:
        K4, _, asymmetry = _gram(K, "K")
        outputs, device, eps = K4.shape[2], K4.device, torch.finfo(K4.dtype).eps
        N = K4.shape[0] * outputs
        matrix = K4.transpose(1, 2).reshape(N, N).to(torch.float64)
        matrix = (matrix + matrix.T) / 2 if asymmetry else matrix
        trace = float(matrix.diagonal().sum())
        product = lambda v: (matrix @ torch.from_numpy(v).to(device)).cpu().numpy()
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= N):
        raise refusal("k", got=repr(k), expected=f"an integer from 1 to {N}", fix="Ask for at most all eigenpairs.")
    k, status = int(k or N), "converged"
    pairs = None
    if 3 * k <= N:
        *pairs, status = leading(product, N, k, 1e-12 if eps < 1e-15 or matrix is not None else 8 * eps)
    if pairs is None or (status != "converged" and matrix is not None):
        if matrix is None:
            matrix = np.concatenate([product(np.eye(N, min(64, N - i), -i)) for i in range(0, N, 64)], axis=1)
            matrix = torch.from_numpy((matrix + matrix.T) / 2)
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors, status = values.flip(0)[:k], vectors.flip(1)[:, :k], "converged"
        residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    else:
        values, vectors, residuals = (torch.from_numpy(a).to(device) for a in pairs)
    size = float(values.abs().nan_to_num().max())
    noise = max(N * 2.0**-52, eps) * size
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return Spectrum(values, vectors, trace, residuals / size, noise, outputs, status)


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
    >>> round(effective_rank(torch.eye(7)), 12)
    7.0
    """
    top = spectrum(K, k=1)
    if top.trace is None:
        expected = "a Gram matrix, or an operator with .diagonal()"
        raise refusal("effective_rank", got="an operator without trace", expected=expected, fix="Give the Gram matrix.")
    largest = float(top.eigenvalues[0])
    return top.trace / largest if largest > 0 else math.nan


def alignment(K1: Any, K2_or_y: Any, centered: bool = False) -> float:
    """Cosine between two kernels, or between a kernel and its targets: ``<K1, K2>_F / (|K1|_F |K2|_F)``.

    Accumulated in float64 over blocks of rows: no copy of a Gram matrix is made.

    Parameters
    ----------
    K1 : [n, n] or [n, n, C, C], symmetric.
    K2_or_y : a second kernel of the same shape, or targets: y [n] or Y [n, C], meaning ``K2 = Y Y^T``, never formed.
        Against [n, n, C, C], targets are [n, C], taken as one vector of n C. Whatever has K1's shape is a kernel.
    centered : centre both with ``H = I - 1 1^T / n``: K -> H K H, Y -> H Y (Cortes et al. 2012; CKA). For
        [n, n, C, C] the mean over samples is removed per output (as Baratin et al. 2021 do), so that a constant added
        to one output changes nothing.

    Returns
    -------
    float
        In [0, 1] for positive semi-definite kernels. NaN when centring leaves nothing (a constant kernel, equal
        targets), which has no direction.

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
    aa = ab = bb = 0.0
    if tuple(other.shape) == np.shape(K1):
        B, peak_b, _ = _gram(other, "K2")
        for (_, a), (_, b) in zip(_rows(A, peak_a, centered), _rows(B, peak_b, centered), strict=True):
            aa, ab, bb = aa + float((a * a).sum()), ab + float((a * b).sum()), bb + float((b * b).sum())
        left = min(aa, bb)
    else:
        Y = _targets(other, n, C)
        Y = Y - Y.mean(0) if centered else Y
        for rows, a in _rows(A, peak_a, centered):
            aa += float((a * a).sum())
            ab += float((torch.einsum("ijcd,jdm->icm", a, Y) * Y[rows]).sum())
        bb = float((torch.einsum("icm,icp->mp", Y, Y) ** 2).sum())  # |Y Y^T| = |Y^T Y|
        left = min(aa, float((Y * Y).sum()))
    # Entries were scaled to at most 1, so this is what rounding leaves of a constant.
    return ab / math.sqrt(aa * bb) if left > (n * C * 4e-16) ** 2 else math.nan


def _real(value: Any, name: str) -> Tensor:
    """Turn arrays, lists and tensors into a real floating tensor without gradient (no copy where none is needed)."""
    if isinstance(value, np.ndarray):
        if value.dtype not in (np.float16, np.float32, np.float64) and not np.iscomplexobj(value):
            value = value.astype(np.float64)
        value = np.require(value, requirements=["C", "W"])  # torch warns on a read-only array
    value = torch.as_tensor(value).detach()
    if value.is_complex():
        raise refusal(name, got=f"{value.dtype}", expected="real numbers", fix="Take the real part, if that is meant.")
    return value if value.is_floating_point() else value.to(torch.float64)


def _refuse_not_finite(values: Tensor, name: str, offset: int = 0) -> None:
    good = values.isfinite()
    if not bool(good.all()):
        first = (~good).nonzero()[0].tolist()
        got = f"{float(values[tuple(first)])} at index {[first[0] + offset, *first[1:]]}"
        raise refusal(name, got=got, expected="finite values", fix="Look for it in the data and the parameters.")


def _targets(Y: Tensor, n: int, C: int) -> Tensor:
    """Targets as [sample, output of the kernel, column], scaled to entries of at most 1."""
    if tuple(Y.shape) != (n, C) and (C > 1 or Y.ndim not in (1, 2) or Y.shape[0] != n or Y.numel() == 0):
        expected = f"[{n}, {n}, {C}, {C}] or [{n}, {C}]" if C > 1 else f"[{n}, {n}], [{n}] or [{n}, C]"
        fix = "Compute both on the same samples, in the same order."
        raise refusal("K2_or_y", got=f"shape {list(Y.shape)}", expected=expected, fix=fix)
    _refuse_not_finite(Y, "y")
    if not bool(Y.any()):
        raise refusal("y", got="zeros only", expected="targets that differ from zero", fix="Check the targets.")
    return (Y.to(torch.float64) / Y.abs().max()).reshape(n, C, -1)


def _gram(K: Any, name: str) -> tuple[Tensor, float, float]:
    """Check a Gram matrix, block by block; return it as [n, n, C, C] (a view), its largest entry and its asymmetry."""
    K = _real(K, name)
    shape = list(K.shape)
    if K.ndim not in (2, 4) or shape[0] != shape[1] or shape[2:3] != shape[3:4] or K.numel() == 0:
        fix = "Compute it as k(x), with one set of points."
        got = f"shape {shape}, empty" if K.numel() == 0 else f"shape {shape}"
        raise refusal(name, got=got, expected="a square [n, n] or [n, n, C, C], n >= 1", fix=fix)
    K4 = K if K.ndim == 4 else K[:, :, None, None]
    peak = gap = 0.0
    for rows in _blocks(K4):
        _refuse_not_finite(K[rows], name, offset=rows.start)
        block = K4[rows].to(torch.float64)
        peak = max(peak, float(block.abs().max()))
        mirrored = K4[rows.start :, rows].transpose(0, 1).transpose(2, 3)
        gap = max(gap, float((block[:, rows.start :] - mirrored).nan_to_num().abs().max()))
    if peak == 0:
        raise refusal(name, got="zeros only", expected="a kernel that differs from zero", fix="Check what made it.")
    if gap > _ASYMMETRY[K.dtype] * peak:
        raise refusal(
            name,
            got=f"|K - K^T| up to {gap / peak:.1e} of the largest entry",
            expected=f"a symmetric matrix (to {_ASYMMETRY[K.dtype]:.0e} in {K.dtype})",
            fix="Compute it as k(x); if the difference is rounding, give (K + K.T) / 2.",
        )
    return K4, peak, gap


def _blocks(K4: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // K4[0].numel())
    for start in range(0, K4.shape[0], step):
        yield slice(start, min(start + step, K4.shape[0]))


def _rows(K4: Tensor, scale: float, centered: bool) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of ``K4 / scale`` in float64; centred over samples, per pair of outputs, if asked."""
    over_rows = torch.zeros(K4.shape[1:], dtype=torch.float64, device=K4.device)
    over_columns = torch.zeros_like(over_rows)
    for rows in _blocks(K4) if centered else ():
        block = K4[rows].to(torch.float64) / scale
        over_rows += block.sum(0) / K4.shape[0]
        over_columns[rows] = block.mean(1)
    over_rows -= over_rows.mean(0)  # so the grand mean comes off once
    for rows in _blocks(K4):
        block = K4[rows].to(torch.float64) / scale
        yield rows, block - over_columns[rows, None] - over_rows if centered else block


def _operator(K: Any, k: int | None) -> tuple[Callable[[np.ndarray], np.ndarray], int, float]:
    """Product in float64, size and precision of an operator; refused where one product shows it unusable."""
    shape = tuple(K.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise refusal("operator", got=f"shape {list(shape)}", expected="a square [N, N]", fix="Use kernel.operator(x).")
    if k is None:
        fix = "Say how many eigenpairs, or give the Gram matrix."
        raise refusal("k", got="None with an operator", expected=f"an integer from 1 to {shape[0]}", fix=fix)
    inner = K.to_scipy()
    product = lambda v: np.asarray(inner @ v, dtype=np.float64)
    once = product(np.random.default_rng(1).standard_normal(shape[0]))
    _refuse_not_finite(torch.from_numpy(once), "operator @ vector")
    if not once.any():
        raise refusal("operator", got="zeros only", expected="a kernel that differs from zero", fix="Check the model.")
    dtype = getattr(K, "dtype", None)  # the precision of the products, whatever to_scipy() converts them to
    known = isinstance(dtype, torch.dtype)
    return product, int(shape[0]), float(torch.finfo(dtype).eps if known else np.finfo(dtype or inner.dtype).eps)


def _operator_trace(K: Any) -> float | None:
    if callable(getattr(K, "diagonal", None)):
        diagonal = torch.as_tensor(K.diagonal()).detach().to(torch.float64)  # [N], [n, C], or [n, C, C]
        return float(diagonal.diagonal(dim1=1, dim2=2).sum() if diagonal.ndim == 3 else diagonal.sum())
    trace = getattr(K, "trace", None)
    return None if trace is None else float(trace() if callable(trace) else trace)
