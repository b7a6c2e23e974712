"""What all machines share: input checks, the solve of a linear system, and how they print."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ntkit.base.checks import Refused, nearest, refusal
from ntkit.base.numbers import relative_residual
from ntkit.gram.arrays import Matrix, as_floats, as_matrix, check_finite, float64_product
from ntkit.gram.gram_matrix import Gram, as_gram, fits_dense
from ntkit.gram.operator_gram import OperatorGram
from ntkit.kernels.kernel import KernelOperator

_EPS = torch.finfo(torch.float64).eps
_ONE_OUTPUT = 'A kernel with outputs="full" has one block per pair of outputs: choose "trace" or "sum".'


class Machine:
    """Base of the machines: prints its settings and, after fit, its status; `sklearn.base.clone` copies it unfitted."""

    status_: str
    advice_: str

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the settings, as given, by name. `deep` is there for scikit-learn: no setting has settings."""
        return {n: getattr(self, n) for n in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change settings by name; what was fitted is forgotten.

        Raises
        ------
        Refused
            For another name, and for a value that the class refuses.
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise refusal(type(self).__name__, got=repr(name), expected="a setting", fix=nearest(name, known))
        new = type(self)(**known | params)  # refused before anything changes
        vars(self).clear()
        vars(self).update(vars(new))
        return self

    def __repr__(self) -> str:
        text = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({text}): {vars(self).get('status_', 'not fitted')}"


def training_gram(K: Gram | Matrix | KernelOperator, name: str = "K") -> Gram:
    """Take the kernel of the training set, with one value per pair and no negative value on the diagonal.

    ``kernel.operator(x)`` becomes a Gram whose rows are products.

    Raises
    ------
    Refused
        As `Gram`; also for a kernel with outputs, and for a negative diagonal.
    """
    gram = OperatorGram(K) if isinstance(K, KernelOperator) else as_gram(K, name)
    if gram.outputs > 1:
        n, C = len(gram) // gram.outputs, gram.outputs
        raise refusal(name, got=f"shape {[n, n, C, C]}", expected="one value per pair, [n, n]", fix=_ONE_OUTPUT)
    diagonal = gram.diagonal()
    worst = int(diagonal.argmin())
    if diagonal[worst] < 0:
        got = f"{diagonal[worst].item():.6g} on the diagonal at index {worst}"
        fix = "Check that K is a kernel matrix, not a distance or centered cross matrix."
        raise refusal(name, got=got, expected="a kernel: K[i, i] = |phi(x_i)|^2 >= 0", fix=fix)
    return gram


def as_test_matrix(K_test: Gram | Matrix, n: int, like: Tensor, name: str = "K_test") -> Tensor:
    """Take the kernel of test points with the `n` training points, [m, n], in its dtype, on the device of `like`.

    Raises
    ------
    Refused
        As `as_matrix`; also for another number of columns.
    """
    matrix = K_test if isinstance(K_test, Gram) else as_matrix(K_test, name, _ONE_OUTPUT)
    if matrix.shape[1] != n:
        got, expected = f"shape {list(matrix.shape)}", f"[m, {n}]: one column per training point"
        raise refusal(name, got=got, expected=expected, fix="Pass k(x_test, x_train), test points along the rows.")
    return (matrix.dense() if isinstance(matrix, Gram) else matrix).to(like.device)


def test_product(K_test: Gram | Matrix, weights: Tensor) -> Tensor:
    """K_test @ weights, [m, ...], for weights [n] or [n, k]; K_test is read in strips. Raises as `as_test_matrix`."""
    if isinstance(K_test, Gram) and len(K_test) == len(weights):
        return (K_test @ weights).to(weights.device)
    return float64_product(as_test_matrix(K_test, len(weights), weights), weights)


def factorizes(K: Gram, copies: int = 2) -> bool:
    """Whether an algorithm may hold `copies` dense float64 matrices of K's size: K has entries, and there is room."""
    return not isinstance(K, OperatorGram) and fits_dense(K, copies)


def as_targets(value: Any, name: str, n: int, fix: str, shape: list[int] | None = None) -> Tensor:
    """Take finite numbers, [n] or [n, C], in float64; of exactly `shape` where one is given.

    Raises
    ------
    Refused
        For another shape, or a value that is not finite.
    """
    values = as_floats(value, name)
    if values.ndim not in (1, 2) or values.numel() == 0 or (shape and list(values.shape) != shape):
        expected = shape or f"[{n}] or [{n}, C]"
        raise refusal(name, got=f"shape {list(values.shape)}", expected=expected, fix=fix)
    check_length(values, n, name)
    return check_finite(values, name).to(torch.float64)


def check_length(values: Any, n: int, name: str = "y") -> None:
    """Refuse `values` unless they have one entry per row of K."""
    if len(values) != n:
        fix = "Pass the values of the same points."
        raise refusal(name, got=f"{len(values)} entries", expected=f"{n}, one per row of K", fix=fix)


def unfitted(machine: Machine) -> Refused:
    """Build the refusal of a machine that is asked before it was fitted."""
    name = type(machine).__name__
    return refusal(name, got="no fitted machine", expected="fit(K, y) first", fix="Call fit before predicting.")


@dataclass
class Solution:
    """alpha = (K + shift I)^-1 y, [n, C], the Cholesky factor, and how it went; NaN where singular."""

    alpha: Tensor
    lower: Tensor
    residual: float
    status: str
    advice: str


def solve(K: Gram, shift: float, y: Tensor, name: str) -> Solution:
    """Solve (K + shift I) alpha = y, [n, C], by Cholesky in float64; `name` is what the user calls the shift."""
    matrix = K.dense().T  # symmetric: the transpose only has the order of entries that LAPACK overwrites in place
    matrix.diagonal().add_(shift)
    rounding = len(K) * _EPS * matrix.diagonal().max().item()
    lower, failed = torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty((), dtype=torch.int32, device=K.device)))
    if failed or lower.diagonal().square().min() <= rounding:
        advice = (
            f"K + {shift:g} I is not positive definite to working precision: points repeat, or K has a lower rank "
            f"than points. Use a {name} well above {max(rounding, shift):.1e}."
        )
        nan = float("nan")
        return Solution(torch.full_like(y, nan), lower.fill_(nan), nan, "singular", advice)
    alpha = torch.cholesky_solve(y, lower)
    return Solution(alpha, lower, relative_residual(K @ alpha + shift * alpha - y, y), "solved", "")
