"""Eigenvalues, eigenfunctions, alignment and effective rank of a kernel's Gram matrix, all in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ntkit.base.checks import refusal, undefined
from ntkit.base.memory import free_memory
from ntkit.base.notebook_figures import curves
from ntkit.base.numbers import as_integer
from ntkit.base.shown import Shown
from ntkit.gram.arrays import Matrix, as_floats, check_finite, refuse_labels
from ntkit.gram.gram_matrix import Gram, as_gram, fits_dense
from ntkit.gram.krylov import Product, leading

_COPIES = 3  # of a matrix, that its dense decomposition takes
_ROUNDING = 4e-16  # of a mean in float64


class Operator(Protocol):
    """A symmetric matrix given by its products, such as ``kernel.operator(x)``."""

    shape: tuple[int, int]

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``."""


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Shown):
    """Leading eigenpairs of a Gram matrix, largest eigenvalue first, with their certificate.

    Attributes
    ----------
    eigenvalues : Tensor [k], float64, descending. Of K itself: divide by n for those of the integral operator.
    eigenvectors : Tensor [N, k], orthonormal columns, each with its entry of largest magnitude positive; N = n, or n C
        for a kernel [n, n, C, C] (row i C + c).
    trace : sum of the diagonal (not of the eigenvalues); None for an operator that offers neither trace nor diagonal.
    residuals : Tensor [k], |K v - lambda v| / |lambda_1|: the certificate of each pair.
    floor : eigenvalues up to this size are rounding of K's own precision, not information.
    outputs : C of a kernel [n, n, C, C], 1 for [n, n], None for an operator.
    status : "converged", or what the iteration did not reach (`residuals` say how far it got).
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    trace: float | None
    residuals: Tensor
    floor: float = 0.0
    outputs: int | None = 1
    status: str = "converged"

    @property
    def tail(self) -> float | None:
        """The rest of the trace, ``trace - sum(eigenvalues)`` over the eigenvalues computed; None without a trace."""
        return None if self.trace is None else self.trace - float(self.eigenvalues.sum())

    def plot(self) -> Any:
        """The eigenvalues against their number, both on logarithmic axes, as a plotly figure; those above `floor`."""
        positive = [(i, float(v)) for i, v in enumerate(self.eigenvalues, 1) if v > max(self.floor, 0.0)]
        series = {"eigenvalues": ([i for i, _ in positive], [v for _, v in positive])}
        return curves("Spectrum", "number", "eigenvalue", series, log_x=True, log_y=True)

    def energy(self, v: ArrayLike | Tensor) -> Tensor:
        """Cumulative relative energy of `v` in the leading eigenvectors (Kopitkov & Indelman 2020).

        ``E(k) = sum_{i <= k} <v_i, v>^2 / |v|^2``, in [0, 1], and 1 when all eigenvectors were computed.

        Parameters
        ----------
        v : [n], or [n, C] (targets, outputs, residuals), as for `alignment`: numbers, no class labels. Against a kernel
            [n, n] the energies of the columns are summed; against [n, n, C, C] (or an operator of that size) `v` is
            flattened to one vector of n C.

        Returns
        -------
        Tensor [k], float64

        Raises
        ------
        Refused
            When the shape does not fit, a value is not finite, `v` is zero, which has no direction, or class labels.

        Examples
        --------
        >>> spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).energy([1.0, 0.0, 1.0]).tolist()
        [0.5, 0.5, 1.0]
        """
        if self.outputs == 1:
            refuse_labels(v, "v")
        N, C, v = self.eigenvectors.shape[0], self.outputs or 1, as_floats(v, "v").to(self.eigenvectors)
        flat = v.ndim == 2 and v.numel() == N and self.outputs in (None, v.shape[1])
        if v.ndim not in (1, 2) or v.numel() == 0 or (v.shape[0] != N and not flat):
            expected = f"[{N}] or [{N // C}, {C}]" if C > 1 else f"[{N}] or [{N}, C]"
            fix = "Give one value per row of the Gram matrix, in the same order."
            raise refusal("v", got=f"shape {list(v.shape)}", expected=expected, fix=fix)
        v = check_finite(v, "v")
        v = v.reshape(N, -1) if v.shape[0] == N else v.reshape(N, 1)
        if not bool(v.any()):
            fix = "Zero targets or residuals have no energies: leave them out."
            raise undefined("v", got="zeros only", expected="values that differ from zero", fix=fix)
        v = v / v.abs().max()  # squares of very small or large values stay representable
        return ((self.eigenvectors.T @ v) ** 2).sum(1).cumsum(0) / (v**2).sum()

    def extend(self, K_test: Matrix) -> Tensor:
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
        usable = int((self.eigenvalues > self.floor).to(torch.int64).cumprod(0).sum())
        if usable < k:
            raise refusal(
                "extend",
                got=f"eigenvalue {usable + 1} of {k} = {float(self.eigenvalues[usable]):.3g}",
                expected=f"positive eigenvalues, above rounding ({self.floor:.1g})",
                fix=f"Only the top {usable} of the {k} are usable: take spectrum(K, k={usable})." * (usable > 0)
                or "None is usable: this Gram matrix has no positive eigenvalue.",
            )
        K = as_floats(K_test, "K_test").to(self.eigenvectors)
        shape, C = list(K.shape), self.outputs or 1
        if K.ndim == 4 and shape[2] == shape[3]:
            K = K.transpose(1, 2).reshape(shape[0] * shape[2], -1)
        if K.ndim != 2 or K.shape[1] != N:
            expected = f"[m, {N // C}, {C}, {C}]" if C > 1 else f"[m, {N}]"
            fix = "Compute it as k(x_test, x_train), with the same training points."
            raise refusal("K_test", got=f"shape {shape}", expected=expected, fix=fix)
        return check_finite(K, "K_test") @ self.eigenvectors / self.eigenvalues


def spectrum(K: Gram | Matrix | Operator, k: int | None = None) -> Spectrum:
    """Eigenpairs of a Gram matrix: all of them, or the top `k`.

    All of them by a dense float64 eigendecomposition of (K + K^T)/2. The top `k` by block Krylov iteration
    (fixed start), and further ones outside that subspace, which look for copies of repeated eigenvalues: no residual
    shows those that the start missed. Each step reads K once, for 16 vectors (32 for k >= 64); memory about
    10 N (k + 50) numbers. Where the dense matrices exceed the free memory, an iteration that does not converge
    says so in `status`.

    Parameters
    ----------
    K : [n, n] symmetric (torch or numpy, any real dtype); [n, n, C, C], taken as the n C x n C matrix with row i C + c;
        or an operator with ``.shape``, ``@`` and ``.to_scipy()``, such as ``kernel.operator(x)``, which is never formed
        unless k > N/3.
    k : how many, 1 to N; None = all. Needed for an operator. For k > N/3 the dense route, then faster, is taken where
        there is memory for it.

    Returns
    -------
    Spectrum
        On the device of `K`; same input, same result.

    Raises
    ------
    Refused
        When K is not square, symmetric and finite, as `Gram` says (for an operator symmetry is not checked: see the
        residuals), or zero; when k is out of range, or all eigenpairs exceed the free memory.

    References
    ----------
    Kopitkov & Indelman 2020, Neural Spectrum Alignment. Jacot et al. 2018, section 4: kernel principal components.

    Examples
    --------
    >>> s = spectrum(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    >>> s.eigenvalues.tolist(), s.trace, s.tail
    ([3.0, 2.0, 1.0], 6.0, 0.0)
    """
    gram, outputs, device = None, None, torch.device("cpu")
    product: Product
    if not isinstance(K, Gram | Tensor | np.ndarray) and hasattr(K, "to_scipy"):
        product, N, eps = _operator(K, k)
        trace = _operator_trace(K)
    else:
        gram = _nonzero(as_gram(K), "K")  # pyrefly: ignore[bad-argument-type]
        outputs, device, N, eps = gram.outputs, gram.device, len(gram), gram.precision
        product, trace = gram.__matmul__, float(gram.diagonal().sum())
    fix = "Use k = None for all of them."
    k = N if k is None else as_integer(k, "k", f"an integer from 1 to {N}", fix, least=1, most=N)
    status = "converged"
    pairs = None
    dense = gram is None or fits_dense(gram, _COPIES)
    if not dense and k == N:
        got = f"all {N:,} eigenpairs, {_COPIES * 8e-9 * N**2:.1f} GB of matrices"
        fix = "Ask for the top ones: spectrum(K, k=50)."
        raise refusal("spectrum", got=got, expected=f"{free_memory(device) / 1e9:.1f} GB, the free memory", fix=fix)
    if 3 * k <= N or not dense:
        *pairs, status = leading(product, N, k, 1e-12 if eps < 1e-15 or gram is not None else 8 * eps)
    if pairs is None or (status != "converged" and gram is not None and dense):
        matrix = _formed(product, N) if gram is None else gram.dense()
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors, status = values.flip(0)[:k], vectors.flip(1)[:, :k], "converged"
        scale = 2.0 ** math.floor(math.log2(largest)) if (largest := float(values.abs().max())) > 0 else 1.0
        residuals = (matrix @ vectors / scale - vectors * (values / scale)).norm(dim=0) * scale
    else:
        values, vectors, residuals = (torch.from_numpy(a).to(device) for a in pairs)
    size = float(values.abs().nan_to_num().max())
    floor = max(N * 2.0**-52, eps) * size
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return Spectrum(values, vectors, trace, residuals / size, floor, outputs, status)


def effective_rank(K: Gram | Matrix | Operator) -> float:
    """Return ``trace(K) / lambda_max(K)``: how many directions carry the kernel (Long 2021).

    1 for a rank-one kernel, n for the identity. Other definitions are in use under this name (the exponential of the
    entropy of the normalized eigenvalues; trace^2 over the sum of squared eigenvalues): they give other numbers.

    Parameters
    ----------
    K : as in `spectrum`; an operator must offer its trace or its diagonal.

    Returns
    -------
    float

    Raises
    ------
    Refused
        As `spectrum`; when an operator offers no trace; when no eigenvalue is positive (then K is no kernel's matrix).

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
    if not largest > 0:
        fix = "Check that it is a kernel matrix and not, for example, a distance or its negative."
        raise undefined("effective_rank", got=f"largest eigenvalue {largest:.3g}", expected="a positive one", fix=fix)
    return top.trace / largest


def alignment(K1: Gram | Matrix, K2_or_y: Gram | Matrix, *, centered: bool = False) -> float:
    """Cosine between two kernels, or between a kernel and its targets: ``<K1, K2>_F / (|K1|_F |K2|_F)``.

    Accumulated in float64 over blocks of rows: no Gram matrix is copied.

    Parameters
    ----------
    K1 : [n, n] or [n, n, C, C], symmetric.
    K2_or_y : a second kernel of the same shape, or targets: y [n] or Y [n, C], meaning ``K2 = Y Y^T``, never formed.
        Against [n, n, C, C], targets are [n, C], taken as one vector of n C. Whatever has K1's shape is a kernel.
        Classes are written as numbers: ``2.0 * y - 1`` for labels 0 and 1, ``one_hot(y)`` for more.
    centered : center both with ``H = I - 1 1^T / n``: K -> H K H, Y -> H Y (Cortes et al. 2012; CKA). For
        [n, n, C, C] the mean over samples is removed per output (as Baratin et al. 2021 do), so that a constant added
        to one output changes nothing.

    Returns
    -------
    float
        In [0, 1] for positive semi-definite kernels.

    Raises
    ------
    Refused
        When the shapes do not match; when one of the two is not symmetric, not finite, empty or zero; when centering
        leaves nothing, or the rounding of its dtype (a constant kernel, equal targets): that has no direction; when y
        holds class
        labels (integers of at most 20 values that recur), since the result would depend on how classes are numbered.

    References
    ----------
    Cristianini et al. 2001; Cortes, Mohri, Rostamizadeh 2012; Baratin et al. 2021. Long 2021 uses the uncentered form.

    Examples
    --------
    >>> alignment(torch.eye(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    0.5
    """
    A = _nonzero(as_gram(K1, "K1"), "K1")
    n, C = len(A) // A.outputs, A.outputs
    if not isinstance(K2_or_y, Gram):
        refuse_labels(K2_or_y, "K2_or_y", centered=centered)
    other = K2_or_y if isinstance(K2_or_y, Gram) else as_floats(K2_or_y, "K2_or_y").to(A.device)
    aa = ab = bb = 0.0
    means = _means(A) if centered else None
    if isinstance(other, Gram) or list(other.shape) in ([n, n, C, C], [n, n, C, C][: 4 if C > 1 else 2]):
        B = _nonzero(as_gram(other, "K2"), "K2")
        if len(B) != len(A) or B.outputs != C:
            raise _unlike(list(B.shape), n, C)
        others = _means(B) if centered else None
        for (_, a), (_, b) in zip(_rows(A, means), _rows(B, others), strict=True):
            aa, ab, bb = aa + float((a * a).sum()), ab + float((a * b).sum()), bb + float((b * b).sum())
        sizes, second, constant = (aa, bb), ("K2", "kernel"), _rounding(others, B.precision)
    else:
        Y = _targets(other, n, C)
        middle = Y.mean(0)
        Y = Y - middle if centered else Y
        for rows, a in _rows(A, means):
            aa += float((a * a).sum())
            ab += float((torch.einsum("icjd,jdm->icm", a, Y) * Y[rows]).sum())
        bb = float((torch.einsum("icm,icp->mp", Y, Y) ** 2).sum())  # |Y Y^T| = |Y^T Y|
        sizes, second = (aa, float((Y * Y).sum())), ("y", "target")
        constant = max(_ROUNDING, torch.finfo(other.dtype).eps) ** 2 * n * float((middle**2).sum()) * centered
    nothing = [aa <= _rounding(means, A.precision), sizes[1] <= constant]
    if any(nothing):
        name, what = ("K1", "kernel") if nothing[0] else second
        got = f"one constant {what}, of which centering leaves nothing"
        fix = "Add samples that differ, such as those of another class, or use centered=False."
        raise undefined(f"alignment: {name}", got=got, expected="values that differ between samples", fix=fix)
    return ab / math.sqrt(aa * bb)


def _unlike(shape: list[int], n: int, C: int) -> Exception:
    expected = f"[{n}, {n}, {C}, {C}] or [{n}, {C}]" if C > 1 else f"[{n}, {n}], [{n}] or [{n}, C]"
    fix = "Compute both on the same samples, in the same order."
    return refusal("K2_or_y", got=f"shape {shape}", expected=expected, fix=fix)


def _targets(Y: Tensor, n: int, C: int) -> Tensor:
    """Targets as [sample, output of the kernel, column], scaled to entries of at most 1."""
    if tuple(Y.shape) != (n, C) and (C > 1 or Y.ndim not in (1, 2) or Y.shape[0] != n or Y.numel() == 0):
        raise _unlike(list(Y.shape), n, C)
    check_finite(Y, "y")
    if not bool(Y.any()):
        raise undefined("y", got="zeros only", expected="targets that differ from zero", fix="Check the targets.")
    return (Y.to(torch.float64) / Y.abs().max()).reshape(n, C, -1)


def _nonzero(K: Gram, name: str) -> Gram:
    if K.largest == 0:
        fix = "A network without gradients has such a kernel: check it."
        raise undefined(name, got="zeros only", expected="a kernel that differs from zero", fix=fix)
    return K


def _rows(K: Gram, means: tuple[Tensor, Tensor] | None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks [i, c, j, d] of K / its largest entry with the samples they are of; less means over samples, if any."""
    n, C = len(K) // K.outputs, K.outputs
    for rows, entries in K.blocks():
        samples, block = slice(rows.start // C, rows.stop // C), (entries / K.largest).reshape(-1, C, n, C)
        yield samples, block if means is None else block - means[0][samples, :, None] - means[1]


def _means(K: Gram) -> tuple[Tensor, Tensor]:
    """What centering subtracts from entry [i, c, j, d]: [i, c, d] and [c, j, d], the latter of mean 0 over samples."""
    n, C = len(K) // K.outputs, K.outputs
    over_rows = torch.zeros(C, n, C, dtype=torch.float64, device=K.device)
    over_columns = torch.zeros(n, C, C, dtype=torch.float64, device=K.device)
    for samples, block in _rows(K, None):
        over_rows += block.sum(0) / n
        over_columns[samples] = block.mean(2)
    return over_columns, over_rows - over_rows.mean(1, keepdim=True)  # so that the grand mean is subtracted once


def _rounding(means: tuple[Tensor, Tensor] | None, precision: float) -> float:
    """Square of the norm up to which what centering leaves is rounding of what it subtracts; 0 where it does not."""
    if means is None:
        return 0.0
    squares = sum(float((part**2).sum()) for part in means)
    return max(_ROUNDING, precision) ** 2 * len(means[0]) * squares


def _formed(product: Product, N: int) -> Tensor:
    """The matrix of an operator, symmetric."""
    matrix = np.concatenate([product(np.eye(N, min(64, N - i), -i)) for i in range(0, N, 64)], axis=1)
    return torch.from_numpy((matrix + matrix.T) / 2)


def _operator(K: Any, k: int | None) -> tuple[Product, int, float]:
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
    check_finite(torch.from_numpy(once), "operator @ vector")
    if not once.any():
        fix = "A network without gradients has such a kernel: check it."
        raise undefined("operator", got="zeros only", expected="a kernel that differs from zero", fix=fix)
    dtype = getattr(K, "dtype", None)  # the precision of the products, whatever to_scipy() converts them to
    finfo = torch.finfo(dtype) if isinstance(dtype, torch.dtype) else np.finfo(dtype or inner.dtype)
    return product, int(shape[0]), float(finfo.eps)


def _operator_trace(K: Any) -> float | None:
    if callable(getattr(K, "diagonal", None)):
        diagonal = torch.as_tensor(K.diagonal()).detach().to(torch.float64)  # [N], [n, C], or [n, C, C]
        return float(diagonal.diagonal(dim1=1, dim2=2).sum() if diagonal.ndim == 3 else diagonal.sum())
    trace = getattr(K, "trace", None)
    return None if trace is None else float(trace() if callable(trace) else trace)
