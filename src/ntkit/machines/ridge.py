"""Kernel ridge regression, with its leave-one-out residuals in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkit.base.numbers import as_number
from ntkit.gram.arrays import AnyMatrix, Matrix, same_kind
from ntkit.gram.gram_matrix import Gram
from ntkit.kernels.kernel import KernelOperator
from ntkit.machines.conjugate_gradients import Solver
from ntkit.machines.machine_input import (
    Machine,
    as_targets,
    factorizes,
    solve,
    test_product,
    training_gram,
    unfitted,
)


class KernelRidge(Machine):
    """Kernel ridge regression: alpha = (K + ridge I)^-1 y, prediction K_test alpha, no bias, in float64.

    One Cholesky factorization serves all targets. Where two float64 matrices of K's size exceed the free memory, and
    for ``kernel.operator(x)``, conjugate gradients instead: from products with K alone, each for all targets at once,
    to a relative residual of 1e-8 per target. Memory: 20 n sqrt(n) numbers at most, beside what a product reads.

    Parameters
    ----------
    ridge : added to the diagonal of K as it is: an ABSOLUTE number in the units of K, not divided by n, the number
        of points, and not relative to the diagonal. Multiplying K and ridge by the same number changes no prediction.

    Attributes
    ----------
    alpha_ : [n], or [n, C]: the dual coefficients; NaN where singular, and so are the predictions.
    residual_ : relative residual of the solve, |(K + ridge I) alpha - y| / |y| (Frobenius).
        It bounds the error of alpha: |error| <= residual_ |y| / ridge where K is positive semi-definite.
    loo_ : [n], or [n, C]: y_i minus the prediction for x_i of the machine fitted without point i,
        alpha_i / [(K + ridge I)^-1]_ii. NaN with conjugate gradients, which do not give the inverse.
    method_ : "Cholesky" | "conjugate gradients".
    passes_ : products with K that conjugate gradients took, each one pass over the matrix; 0 for Cholesky.
    status_ : "solved" | "singular" (K + ridge I has no Cholesky factor to working precision) | "inaccurate" (conjugate
        gradients did not reach the residual of 1e-8; `residual_` says how far they got).
    advice_ : what to do when the status is not "solved", else "".

    Raises
    ------
    Refused
        When `ridge` is negative or not finite.

    Notes
    -----
    Leave-one-out: Rasmussen and Williams (2006), "Gaussian Processes for Machine Learning", section 5.4.2. Conjugate
    gradients with a randomly pivoted Cholesky preconditioner: Diaz, Epperly, Frangella, Tropp, Webber (2023), "Robust,
    randomized preconditioning for kernel ridge regression".

    Examples
    --------
    >>> machine = KernelRidge(ridge=1.0).fit(torch.eye(2), torch.tensor([4.0, 2.0]))
    >>> print(machine.predict(torch.eye(2)), machine.loo_)
    tensor([2.0000, 1.0000], dtype=torch.float64) tensor([4.0000, 2.0000], dtype=torch.float64)
    """

    alpha_: Matrix
    residual_: float
    loo_: Matrix
    method_: str
    passes_: int

    def __init__(self, ridge: float):
        fix = "It is added to the diagonal of K."
        self._ridge = as_number(ridge, "ridge", lambda r: 0 <= r < math.inf, "a finite number >= 0", fix)
        self.ridge = ridge
        self._alpha: Tensor | None = None

    def fit(self, K: Gram | Matrix | KernelOperator, y: Matrix) -> KernelRidge:
        """Fit on K, [n, n] symmetric, or ``kernel.operator(x)``, and real targets y, [n] or [n, C].

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal, or y does not fit it.
        """
        gram = training_gram(K)
        values = as_targets(y, "y", len(gram), "Pass [n] or [n, C] targets.").to(gram.device)
        columns = values.reshape(len(gram), -1)
        self.passes_ = 0
        if factorizes(gram):
            self.method_, solution = "Cholesky", solve(gram, self._ridge, columns, "ridge")
            alpha, self.residual_ = solution.alpha, solution.residual
            solved = solution.status == "solved"
            loo = alpha / torch.cholesky_inverse(solution.lower).diagonal()[:, None] if solved else alpha
        else:
            self.method_, solution = "conjugate gradients", Solver(gram, self._ridge, "ridge").solve(columns)
            alpha, self.passes_, self.residual_ = solution.alpha, solution.passes, solution.residual
            loo = torch.full_like(alpha, torch.nan)
        self.status_, self.advice_ = solution.status, solution.advice
        self._alpha = alpha.reshape(values.shape)
        self.alpha_ = same_kind(self._alpha, gram)
        self.loo_ = same_kind(loo.reshape(values.shape), gram)
        return self

    def predict(self, K_test: AnyMatrix) -> AnyMatrix:
        """Return the predictions for test points, [m] or [m, C], from K_test = k(x_test, x_train), [m, n].

        K_test is read in strips of rows; one on disk (``numpy.memmap``) stays there.

        Raises
        ------
        Refused
            Before fit; when K_test is not a finite [m, n].
        """
        if self._alpha is None:
            raise unfitted(self)
        return same_kind(test_product(K_test, self._alpha), K_test)
