"""A kernel matrix that is known by its products alone, read like any other Gram."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.gram.gram_matrix import Gram, Index
from ntkit.kernels.kernel import KernelOperator

_COLUMNS = 64  # of K, computed by one product


class OperatorGram(Gram):
    """K = k(x, x) that is never formed: a row of K is its product with a unit vector.

    Parameters
    ----------
    operator : ``kernel.operator(x)``, [N, N], of any kernel. Products are in the operator's dtype, results in float64.

    Notes
    -----
    Finiteness and symmetry are not checked: that would take all of K. `largest` is that of the diagonal, as in every
    positive semi-definite matrix.

    Examples
    --------
    >>> import ntkit
    >>> kernel, x = ntkit.TangentKernel(torch.nn.Linear(2, 1), outputs="trace"), torch.eye(2)
    >>> OperatorGram(kernel.operator(x)).rows([1])
    tensor([[1., 2.]], dtype=torch.float64)
    """

    def __init__(self, operator: KernelOperator) -> None:
        self._operator = operator
        self.shape, self.outputs = operator.shape, 1
        self.dtype, self.device = operator.dtype, operator.device
        self.precision = torch.finfo(operator.dtype).eps
        self.exact, self.on_torch = True, True

    @cached_property
    def largest(self) -> float:  # pyrefly: ignore[bad-override]
        """Largest entry of the diagonal."""
        return float(self.diagonal().max())

    def tile(self, rows: Index, columns: Index) -> Tensor:
        """``K[rows][:, columns]`` in float64, from products with unit vectors."""
        places, others = self._places(rows) % len(self), self._places(columns)
        result = torch.empty(len(places), len(others), dtype=torch.float64, device=self.device)
        for start in range(0, len(places), _COLUMNS):
            part = places[start : start + _COLUMNS]
            units = torch.zeros(len(self), len(part), dtype=self.dtype, device=self.device)
            units[part, torch.arange(len(part), device=self.device)] = 1
            result[start : start + len(part)] = (self._operator @ units)[others].T
        return result

    def diagonal(self) -> Tensor:
        """The diagonal of K in float64, [N]."""
        return self._diagonal.clone()

    @cached_property
    def _diagonal(self) -> Tensor:
        return self._operator.diagonal().detach().to(torch.float64).reshape(-1)

    def _product(self, block: Tensor) -> Tensor:
        return (self._operator @ block).detach().to(torch.float64)

    @property
    def identity(self) -> str:
        """Refused: an operator does not say which kernel and data it is of."""
        fix = "Compute the matrix: Gram(kernel(x), kernel, x)."
        raise refusal("identity", got="an operator", expected="a matrix with its kernel and data", fix=fix)

    def __repr__(self) -> str:
        return f"OperatorGram({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device})"
