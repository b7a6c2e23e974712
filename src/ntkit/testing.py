"""The laws that every kernel obeys; one call tests a new kernel, also yours."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.base.batch import Batch, count, take
from ntkit.kernels.kernel import Kernel


def assert_equal(got: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Compare tensors; the error is relative to the largest expected magnitude.

    Raises
    ------
    AssertionError
        With the measured error; also for NaN and for different shapes.
    """
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    scale = float(expected.double().abs().max())
    error = float((got.double() - expected.double()).abs().max())
    assert error <= relative * scale, f"{what}: error {error:.3g} > {relative:g} x {scale:.3g}"


def check_kernel(kernel: Kernel, x1: Batch, x2: Batch, *, tolerance: float = 1e-10) -> None:
    """Check the laws of a kernel on two sets of different sizes.

    Symmetry; k(x) = k(x, x); k(x1, x2) is the transpose of k(x2, x1); smallest eigenvalue >= -tolerance x largest;
    diagonal and pairs equal those of the matrix; a row does not depend on other samples; operator products equal matrix
    products; the layers' shares sum to the kernel.

    Parameters
    ----------
    kernel : the kernel.
    x1, x2 : two sets of different sizes, so that a transposed result is detected.
    tolerance : relative; 1e-10 suits float64, 1e-4 float32.

    Raises
    ------
    AssertionError
        Names the violated law and the error.

    Examples
    --------
    >>> from ntkit import TangentKernel
    >>> model = torch.nn.Linear(3, 2).double()
    >>> check_kernel(TangentKernel(model), torch.randn(4, 3).double(), torch.randn(3, 3).double())
    """
    n1, n2 = count(x1), count(x2)
    assert n1 != n2, "give sets of different sizes"
    K, K12, K21, K_twice = kernel(x1), kernel(x1, x2), kernel(x2, x1), kernel(x1, x1)
    flip = (lambda t: t.permute(1, 0, 3, 2)) if K.dim() == 4 else (lambda t: t.transpose(0, 1))
    assert torch.equal(K, flip(K)), "k(x) is not exactly symmetric"
    assert_equal(K, K_twice, tolerance, "k(x) = k(x, x)")
    assert_equal(K12, flip(K21), tolerance, "k(x1, x2) = k(x2, x1) transposed")
    own = torch.arange(n1)
    assert_equal(kernel.diagonal(x1), K[own, own], tolerance, "diagonal(x) = diag(k(x))")
    few = min(n1, n2)
    pairs = kernel.paired(take(x1, slice(0, few)), take(x2, slice(0, few)))
    assert_equal(pairs, K12[own[:few], own[:few]], tolerance, "paired(x1, x2) = diag(k(x1, x2))")
    assert_equal(kernel(take(x1, slice(1, 2)), x2), K12[1:2], tolerance, "a row does not depend on the others")
    order = torch.arange(n1 - 1, -1, -1)
    assert_equal(kernel(take(x1, order), x2), K12.flip(0), tolerance, "permuting samples permutes rows")
    flat = K.permute(0, 2, 1, 3).reshape(n1 * K.shape[2], -1) if K.dim() == 4 else K
    if flat.dim() == 2:
        spectrum = torch.linalg.eigvalsh(flat.double())
        assert spectrum[0] >= -tolerance * spectrum[-1].abs(), (
            f"eigenvalue {spectrum[0]:.3g} of largest {spectrum[-1]:.3g}"
        )
        operator = kernel.operator(x1)
        assert operator.shape == tuple(flat.shape), f"operator shape {operator.shape}"
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(flat.shape[0], 2, generator=generator, dtype=torch.float64).to(flat)
        assert_equal(operator @ v, flat @ v, tolerance, "operator @ block = k(x) @ block")
        assert_equal(operator @ v[:, 0], flat @ v[:, 0], tolerance, "operator @ v = k(x) @ v")
        assert_equal(operator.diagonal(), flat.diagonal(), tolerance, "operator.diagonal()")
    if hasattr(kernel, "layers"):
        shares = kernel.layers(x1, x2)
        assert_equal(sum(shares.values(), torch.zeros_like(K12)), K12, tolerance, "layers sum to the whole")
