"""How far a sample lies outside the training set, measured by the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.base.batch import Batch, checked, count, take
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integer, as_number
from ntkit.base.shown import Shown
from ntkit.data.streamed_samples import in_memory
from ntkit.gram.gram_matrix import as_gram, check_squares
from ntkit.kernels.kernel import Kernel
from ntkit.measures.spectra import spectrum

RIDGE = 1e-4  # of the mean diagonal of the training Gram matrix
_FLOOR_SAMPLES = 64  # training samples whose own score gives the floor


@dataclass(frozen=True, eq=False, repr=False)
class Novelty(Shown):
    """Scores of m samples against n training samples, larger for more novel, with their certificate. See `novelty`.

    Attributes
    ----------
    outside : [m], in [0, 1]: norm of the sample's gradient outside the span of the training samples' gradients,
        relative to its whole norm. 0 for a gradient of zero.
    deviation : [m]: posterior standard deviation of the Gaussian process with this kernel, in the outputs' units.
    norm : [m]: norm of the gradient, sqrt k(x, x): the deviation without any training sample.
    rank : dimension of the training gradients' span: eigenvalues of K above rounding.
    ridge : the number that was added to the diagonal.
    residual : largest relative residual of the solves, |(K + ridge I) a - k_x| / |k_x|.
    floor : size of an `outside` that is 0 but for rounding, from 64 training samples and the kernel's precision.
    """

    outside: Tensor
    deviation: Tensor
    norm: Tensor
    rank: int
    ridge: float
    residual: float
    floor: float


def novelty(
    kernel: Kernel, x_train: Batch, x_test: Batch, *, ridge: float | None = None, batch_size: int = 1024
) -> Novelty:
    """Score how novel samples are: their gradient's part outside the training gradients, and the posterior deviation.

    With K = k(x_train), k_x = k(x, x_train):

        outside(x)^2   = 1 - k_x K^+ k_x^T / k(x, x)                    K^+: pseudo-inverse above rounding
        deviation(x)^2 = k(x, x) - k_x (K + ridge I)^-1 k_x^T

    A step of gradient descent moves the parameters within the training gradients' span, so a sample with `outside` = 1
    is one about whose outputs the training set (of the kernel's parameters) says nothing.

    Parameters
    ----------
    kernel : any kernel that gives one number per pair, [n, n]: ``outputs="trace"`` (gradients of all outputs as one
        vector) or a callable. `TangentKernel` after training, `PathKernel` for the whole run, `ConjugateKernel`.
    x_train : n training samples; their [n, n] Gram matrix and its eigenpairs are computed.
    x_test : m samples.
    ridge : variance of the noise, added to the diagonal of K: an absolute number in the units of K, as for
        `KernelRidge`. None = 1e-4 of K's mean diagonal. `outside` does not depend on it.
    batch_size : samples at a time: memory is batch_size x n.

    Returns
    -------
    Novelty
        In float64, on the kernel's device.

    Raises
    ------
    Refused
        For a kernel with more than one number per pair, or whose largest value between training samples is not between
        1e-140 and 1e140; a ridge that is negative or not finite; samples that the kernel refuses.

    Notes
    -----
    Squares are compared, so in float64 `outside` below about 1e-7 (float32: 1e-3) is 0; see `floor`.

    References
    ----------
    Rasmussen & Williams 2006, section 2.2 (deviation). Bell, Geyer, Glickenstein, Fernandez, Moore 2023 use the Gram
    matrix of the path kernel in this way.

    Examples
    --------
    Gradients of a linear model are its inputs; the training set spans the first two axes of three:

    >>> import ntkit
    >>> kernel = ntkit.TangentKernel(torch.nn.Linear(3, 1, bias=False).double(), outputs="trace")
    >>> x_train = torch.tensor([[1.0, 0, 0], [1, 2, 0]]).double()
    >>> scores = novelty(kernel, x_train, torch.tensor([[5.0, 1, 0], [0, 3, 4], [0, 0, 2]]).double(), ridge=1e-9)
    >>> [round(v, 6) for v in scores.outside.tolist()], [round(v, 3) for v in scores.deviation.tolist()]
    ([0.0, 0.8, 1.0], [0.0, 4.0, 2.0])
    """
    if not isinstance(kernel, Kernel):
        fix = 'Pass e.g. ntkit.TangentKernel(model, outputs="trace").'
        raise refusal("kernel", got=type(kernel).__name__, expected="an ntkit kernel", fix=fix)
    if ridge is not None:
        expected = "a finite number >= 0, or None"
        ridge = as_number(ridge, "ridge", lambda r: 0 <= r < math.inf, expected, "None = 1e-4 of K's size.")
    fix = "It is the number of samples in memory at a time."
    batch_size = as_integer(batch_size, "batch_size", "an integer >= 1", fix, least=1)
    x_train, x = checked(in_memory(x_train), "x_train"), checked(in_memory(x_test), "x_test")
    K = kernel(x_train)
    if K.dim() != 2:
        got = f"values of shape {tuple(K.shape)}"
        fix = 'Use outputs="trace", or a callable that gives one scalar per sample.'
        raise refusal("kernel", got=got, expected="[n, n]: one number per pair of samples", fix=fix)
    gram = as_gram(K)
    check_squares(gram, "k(x_train)")
    pairs, diagonal = spectrum(gram), gram.diagonal()
    values, vectors = pairs.eigenvalues, pairs.eigenvectors
    added = RIDGE * float(diagonal.mean()) if ridge is None else ridge
    usable = values > pairs.floor
    inverse = torch.where(usable, 1 / values, 0.0)
    shifted = values.clamp(min=0) + added
    inverse_shifted = torch.where(shifted > pairs.floor, 1 / shifted, 0.0)
    parts = []
    for start in range(0, count(x), batch_size):
        part = take(x, slice(start, start + batch_size))
        k_x, own = kernel(part, x_train).double(), kernel.diagonal(part).double()
        squares = (k_x @ vectors) ** 2
        residual = k_x @ vectors * inverse_shifted @ vectors.T
        residual = ((gram @ residual.T).T + added * residual - k_x).norm(dim=1) / k_x.norm(dim=1).clamp(min=1e-300)
        parts.append((_outside(own, squares @ inverse), own - squares @ inverse_shifted, own, residual))
    outside, variance, own, residual = (torch.cat(column) for column in zip(*parts, strict=True))
    some = slice(0, _FLOOR_SAMPLES)  # computed again: K itself would hide its rounding
    inside = (kernel(take(x_train, some), x_train).double() @ vectors) ** 2 @ inverse
    rounding = (1 - inside / diagonal[some].clamp(min=1e-300)).abs()[diagonal[some] > 0]
    return Novelty(
        outside=outside,
        deviation=variance.clamp(min=0).sqrt(),
        norm=own.clamp(min=0).sqrt(),
        rank=int(usable.sum()),
        ridge=added,
        residual=float(residual.max()),
        floor=max([gram.precision, *rounding.tolist()]) ** 0.5,
    )


def _outside(own: Tensor, inside: Tensor) -> Tensor:
    """Relative norm of the rest, from squared norms `own` and the part of them inside a subspace."""
    share = torch.where(own > 0, inside / own.clamp(min=1e-300), 1.0)
    return (1 - share).clamp(0, 1).sqrt()
