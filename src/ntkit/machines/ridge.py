"""Kernel ridge regression, with its leave-one-out residuals in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkit.base.numbers import as_number
from ntkit.gram.arrays import AnyMatrix, Matrix, float64_product, same_kind
from ntkit.gram.gram_matrix import Gram
from ntkit.machines.machine_input import Machine, as_targets, as_test_matrix, solve, training_gram, unfitted


class KernelRidge(Machine):
    """Kernel ridge regression: alpha = (K + ridge I)^-1 y, prediction K_test alpha, no bias, in float64.

    One Cholesky factorization serves all targets.

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

    alpha_: Matrix
    residual_: float
    loo_: Matrix

    def __init__(self, ridge: float):
        fix = "It is added to the diagonal of K."
        self._ridge = as_number(ridge, "ridge", lambda r: 0 <= r < math.inf, "a finite number >= 0", fix)
        self.ridge = ridge
        self._alpha: Tensor | None = None

    def fit(self, K: Gram | Matrix, y: Matrix) -> KernelRidge:
        """Fit on K, [n, n] symmetric, and real targets y, [n] or [n, C].

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal, or y does not fit it.
        """
        gram = training_gram(K)
        values = as_targets(y, "y", len(gram), "Pass [n] or [n, C] targets.").to(gram.device)
        solution = solve(gram, self._ridge, values.reshape(len(gram), -1), "ridge")
        self.status_, self.advice_, self.residual_ = solution.status, solution.advice, solution.residual
        solved = solution.status == "solved"
        loo = solution.alpha / torch.cholesky_inverse(solution.lower).diagonal()[:, None] if solved else solution.alpha
        self._alpha = solution.alpha.reshape(values.shape)
        self.alpha_ = same_kind(self._alpha, K)
        self.loo_ = same_kind(loo.reshape(values.shape), K)
        return self

    def predict(self, K_test: AnyMatrix) -> AnyMatrix:
        """Return the predictions for test points, [m] or [m, C], from K_test = k(x_test, x_train), [m, n].

        Raises
        ------
        Refused
            Before fit; when K_test is not a finite [m, n].
        """
        if self._alpha is None:
            raise unfitted(self)
        return same_kind(float64_product(as_test_matrix(K_test, len(self._alpha), self._alpha), self._alpha), K_test)
