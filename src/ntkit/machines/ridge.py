"""Kernel ridge regression, with its leave-one-out residuals in closed form."""

from __future__ import annotations

from typing import Any

import torch

from ntkit.base.checks import refusal
from ntkit.gram import machine_input as _gram


class KernelRidge:
    """Kernel ridge regression: alpha = (K + ridge I)^-1 y, prediction K_test alpha, no bias, in float64.

    One Cholesky factorisation serves all targets.

    Parameters
    ----------
    ridge : added to the diagonal of K as it is: an ABSOLUTE number in the units of K, not divided by n, the number
        of points, and not relative to the diagonal. Multiplying K and ridge by the same number changes no prediction.

    Attributes
    ----------
    alpha_ : [n], or [n, C]: the dual coefficients; NaN where singular, and so are the predictions.
    residual_ : relative residual of the solve, |(K + ridge I) alpha - y| / |y| (Frobenius).
    loo_ : [n], or [n, C]: y_i minus the prediction for x_i of the machine fitted without point i,
        alpha_i / [(K + ridge I)^-1]_ii.
    status_ : "solved" | "singular" (K + ridge I has no Cholesky factor to working precision).
    advice_ : what to do when singular, else "".

    Raises
    ------
    Refused
        When `ridge` is negative or not finite.

    Notes
    -----
    Leave-one-out: Rasmussen and Williams (2006), "Gaussian Processes for Machine Learning", section 5.4.2.

    Examples
    --------
    >>> machine = KernelRidge(ridge=1.0).fit(torch.eye(2), torch.tensor([4.0, 2.0]))
    >>> print(machine.predict(torch.eye(2)), machine.loo_)
    tensor([2.0000, 1.0000], dtype=torch.float64) tensor([4.0000, 2.0000], dtype=torch.float64)
    """

    alpha_: Any
    residual_: float
    loo_: Any
    status_: str
    advice_: str

    def __init__(self, ridge: float):
        if not 0 <= ridge < float("inf"):
            raise refusal("ridge", got=ridge, expected="a finite number >= 0", fix="It is added to the diagonal of K.")
        self.ridge = float(ridge)
        self._alpha: torch.Tensor | None = None

    def fit(self, K: Any, y: Any) -> KernelRidge:
        """Fit on K, [n, n] symmetric, and real targets y, [n] or [n, C].

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal, or y does not fit it.
        """
        matrix, symmetric, _ = _gram.as_gram(K)
        targets = _gram.as_tensor(y, "y")
        flat = targets.ndim == 1
        targets = _gram.as_matrix(targets[:, None] if flat else targets, "y", fix="Pass [n] or [n, C] targets.")
        _gram.check_length(targets, len(matrix))
        targets = targets.to(matrix.device)
        shifted = matrix.clone() if symmetric else (matrix + matrix.T) / 2
        shifted.diagonal().add_(self.ridge)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        pivots, largest = lower.diagonal().square(), shifted.diagonal().max().item()
        rounding = len(matrix) * torch.finfo(torch.float64).eps * largest
        if failed or pivots.min() <= rounding:
            alpha = loo = torch.full_like(targets, torch.nan)
            self.status_, self.residual_ = "singular", float("nan")
            self.advice_ = (
                f"K + {self.ridge:g} I is not positive definite to working precision: points repeat, or K has a lower "
                f"rank than points. Use a ridge well above {max(rounding, self.ridge):.1e}."
            )
        else:
            alpha = torch.cholesky_solve(targets, lower)
            size = torch.linalg.vector_norm(targets).item()
            self.residual_ = torch.linalg.vector_norm(shifted @ alpha - targets).item() / (size or 1.0)
            del shifted
            loo = alpha / torch.cholesky_inverse(lower).diagonal()[:, None]
            self.status_, self.advice_ = "solved", ""
        self._alpha = alpha[:, 0] if flat else alpha
        self.alpha_ = _gram.same_kind(self._alpha, K)
        self.loo_ = _gram.same_kind(loo[:, 0] if flat else loo, K)
        return self

    def predict(self, K_test: Any) -> Any:
        """Return the predictions for test points, [m] or [m, C], from K_test = k(x_test, x_train), [m, n].

        Raises
        ------
        Refused
            Before fit; when K_test is not a finite [m, n].
        """
        if self._alpha is None:
            raise _gram.unfitted("KernelRidge")
        return _gram.same_kind(_gram.as_test_matrix(K_test, len(self._alpha), self._alpha) @ self._alpha, K_test)
