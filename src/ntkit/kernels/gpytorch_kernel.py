"""Any kernel as one of GPyTorch: `GPyTorchKernel`, created on first use; this module does not import GPyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.kernel import Kernel


class _GPyTorchKernel:
    """A kernel of this library for GPyTorch's models: ``ScaleKernel(GPyTorchKernel(kernel))`` as the covariance module.

    GPyTorch's own parameters (scale, noise, mean) are fitted, the network's are not. Inputs may require gradients (to
    search for the best next point) where the kernel passes them on: `InfiniteKernel`; elsewhere the values are
    constants. So may its `w_std` and `b_std`, if the caller gives them to the optimizer.

    Parameters
    ----------
    kernel : with one value per pair of samples, such as ``TangentKernel(model, "trace")`` or `InfiniteKernel`.
    shape : of a sample, where it is no vector: GPyTorch's inputs are [n, d].

    Raises
    ------
    Refused
        For something else than a kernel, one with several values per pair, inputs with batch axes, of another size, or
        that require gradients where the kernel has none; and, where GPyTorch is not installed, when the name is
        imported.
    """

    def __init__(self, kernel: Kernel, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if not isinstance(kernel, Kernel):
            fix = 'Pass one such as ntkit.TangentKernel(model, "trace").'
            raise refusal("kernel", got=type(kernel).__name__, expected="a kernel of ntkit", fix=fix)
        self.kernel, self.shape = kernel, None if shape is None else tuple(shape)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """k(x1, x2), [n1, n2]; with `diag` k(x1_i, x2_i), [n]."""
        wanted = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
        if wanted and not self.kernel._differentiable:
            fix = "Detach the inputs, or call within torch.no_grad()."
            got = f"inputs that require grad, while the values of {type(self.kernel).__name__} are constants"
            raise refusal("x", got=got, expected="inputs without gradients", fix=fix)
        # with gradients, equal samples in two tensors are two arguments
        same = x1 is x2 or (not wanted and x1.shape == x2.shape and torch.equal(x1, x2))
        first = self._samples(x1)
        if diag:
            values = self.kernel.diagonal(first) if same else self.kernel.paired(first, self._samples(x2))
        else:
            values = self.kernel(first) if same else self.kernel(first, self._samples(x2))
        if values.dim() != (1 if diag else 2):
            fix = 'Use outputs="trace", or a function that picks one output.'
            raise refusal("kernel", got="several values per pair of samples", expected="one", fix=fix)
        return values

    def _samples(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            fix = "Use a model without batch_shape."
            raise refusal("x", got=f"shape {list(x.shape)}", expected="[n, d]", fix=fix)
        if self.shape is None:
            return x
        if x.shape[1] != torch.Size(self.shape).numel():
            fix = "Flatten samples of that shape."
            raise refusal("x", got=f"{x.shape[1]} numbers a sample", expected=f"those of {list(self.shape)}", fix=fix)
        return x.reshape(-1, *self.shape)


def __getattr__(name: str) -> Any:
    if name != "GPyTorchKernel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import gpytorch
    except ImportError as error:
        fix = "Run: pip install gpytorch"
        raise refusal(name, got="no gpytorch in this Python", expected="the package gpytorch", fix=fix) from error
    base = gpytorch.kernels.Kernel
    own = type(name, (_GPyTorchKernel, base), {"__doc__": _GPyTorchKernel.__doc__, "__module__": __name__})
    globals()[name] = own
    return own
