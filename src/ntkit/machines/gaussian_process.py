"""The Gaussian process posterior on a kernel matrix, and the Gaussian that it and an ensemble of networks return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integer, as_number, scales
from ntkit.base.shown import Shown
from ntkit.gram.arrays import AnyMatrix, Matrix, as_floats, as_tensor, check_finite, float64_product, same_kind
from ntkit.gram.gram_matrix import Gram, as_gram
from ntkit.kernels.kernel import KernelOperator
from ntkit.machines.conjugate_gradients import Solver
from ntkit.machines.machine_input import (
    Machine,
    as_targets,
    as_test_matrix,
    factorizes,
    solve,
    test_product,
    training_gram,
    unfitted,
)


@dataclass(frozen=True, eq=False, repr=False)
class Posterior(Shown, Generic[AnyMatrix]):
    """A Gaussian over the values at m test points: N(mean, covariance), the same covariance for each of C outputs.

    Attributes
    ----------
    mean : [m], or [m, C].
    covariance : [m, m]; [m] where only variances were asked for; None where only the mean was. Never clipped: a
        variance that should be zero is zero to rounding, of either sign.
    variance_error : [m] where the variances come from conjugate gradients: each lies above the exact one by at most
        that much (K positive semi-definite; inf without noise). None where they are exact to rounding.

    Examples
    --------
    >>> p = Posterior(torch.tensor([1.0, 2.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    >>> p.std.tolist(), p.percentiles([50]).tolist(), p.sample(3, seed=0).shape
    ([2.0, 0.0], [[1.0, 2.0]], torch.Size([3, 2]))
    """

    mean: AnyMatrix
    covariance: AnyMatrix | None = None
    variance_error: AnyMatrix | None = None

    @property
    def std(self) -> AnyMatrix:
        """Standard deviations, [m]: the root of each variance, 0 where rounding made it negative."""
        return same_kind(self._std(), self.mean)

    def percentiles(self, q: ArrayLike) -> AnyMatrix:
        """Percentiles `q` (in percent, between 0 and 100) at each point: [*q.shape, m] or [*q.shape, m, C].

        Raises
        ------
        Refused
            When a `q` is not between 0 and 100, or the posterior has a mean only.
        """
        levels = as_floats(q, "q").double().cpu()
        if not bool(((levels > 0) & (levels < 100)).all()):
            raise refusal("q", got=q, expected="percentiles between 0 and 100", fix="Pass e.g. [10, 50, 90].")
        mean = torch.as_tensor(self.mean).to(torch.float64)
        spread = self._std().reshape([-1] + [1] * (mean.ndim - 1))
        score = torch.special.ndtri(levels / 100).to(mean.device).reshape([*levels.shape] + [1] * mean.ndim)
        return same_kind(mean + score * spread, self.mean)

    def sample(self, n: int, seed: int = 0) -> AnyMatrix:
        """Draw `n` functions at the test points, [n, m] or [n, m, C]; the same `seed`, the same draws.

        Raises
        ------
        Refused
            When `n` is not positive, or the posterior has no full covariance.
        """
        covariance = self._needed("covariance [m, m]")
        if covariance.ndim != 2:
            raise refusal(
                "sample", got="variances only", expected="a covariance [m, m]", fix="Pass the test points' full kernel."
            )
        fix = "Pass how many functions to draw, and any seed."
        n = as_integer(n, "n", "an integer >= 1", fix, least=1)
        seed = as_integer(seed, "seed", "an integer >= 0", fix, least=0)
        mean = torch.as_tensor(self.mean).to(covariance)
        values, vectors = torch.linalg.eigh(covariance)  # singular at training points: no Cholesky factor there
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, *mean.shape, generator=generator, dtype=torch.float64).to(covariance.device)
        root = vectors * values.clamp(min=0).sqrt()
        return same_kind(mean + torch.einsum("ij,nj...->ni...", root, noise), self.mean)

    def _needed(self, wanted: str) -> Tensor:
        if self.covariance is None:
            raise refusal(
                "Posterior", got="a mean alone", expected=wanted, fix="Pass the test points' kernel, or its diagonal."
            )
        return torch.as_tensor(self.covariance).to(torch.float64)

    def _std(self) -> Tensor:
        covariance = self._needed("a covariance")
        return (covariance if covariance.ndim == 1 else covariance.diagonal()).clamp(min=0).sqrt()


class GaussianProcess(Machine):
    r"""Gaussian process regression: prior N(0, K), observations with independent noise, by Cholesky in float64.

    .. math:: m = K_* (K + s I)^{-1} y, \qquad S = K_{**} - K_* (K + s I)^{-1} K_*^\top

    of the function itself (its observations have variance s more).

    Where two float64 matrices of K's size exceed the free memory, and for ``kernel.operator(x)``, by conjugate
    gradients instead, as `KernelRidge`: the mean to a relative residual of 1e-8, variances to 1e-8 of the prior ones,
    test points solved in strips (`Posterior.variance_error` says what was reached). K is then read at every prediction
    of a variance: leave it unchanged.

    Parameters
    ----------
    noise : the VARIANCE s of the observations' noise, added to the diagonal of K as it is: absolute, in the units of K.
        No jitter is ever added to it.

    Attributes
    ----------
    alpha_ : [n], or [n, C]: (K + s I)^-1 y; NaN where singular, and so is everything predicted.
    log_marginal_likelihood_ : log N(y; 0, K + s I) in nats, summed over the outputs. NaN with conjugate gradients,
        which do not give the determinant.
    residual_ : relative residual of the solve, |(K + s I) alpha - y| / |y| (Frobenius).
    method_ : "Cholesky" | "conjugate gradients".
    passes_ : products with K that conjugate gradients have taken, in fit and all predictions; 0 for Cholesky.
    status_ : "solved" | "singular" (K + s I has no Cholesky factor to working precision) | "inaccurate" (conjugate
        gradients did not reach the residual of 1e-8 in fit).
    advice_ : what to do when the status is not "solved", else "".

    Raises
    ------
    Refused
        When `noise` is negative or not finite.

    Notes
    -----
    Rasmussen and Williams (2006), "Gaussian Processes for Machine Learning", algorithm 2.1. With the NNGP kernel this
    is the posterior of an infinitely wide network (Lee et al. 2018); for networks trained by gradient descent see
    `GradientFlow.ensemble`, which is another Gaussian.

    Examples
    --------
    >>> gp = GaussianProcess(noise=1.0).fit(torch.eye(2), torch.tensor([4.0, 2.0]))
    >>> p = gp.predict(torch.eye(2), torch.eye(2))
    >>> print(p.mean, p.covariance.diagonal())
    tensor([2.0000, 1.0000], dtype=torch.float64) tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    alpha_: Matrix
    log_marginal_likelihood_: float
    residual_: float
    method_: str
    passes_: int

    def __init__(self, noise: float = 0.0):
        fix = "It is added to the diagonal."
        self._noise = as_number(noise, "noise", lambda s: 0 <= s < math.inf, "a finite variance >= 0", fix)
        self.noise = noise
        self._alpha: Tensor | None = None

    def fit(self, K: Gram | Matrix | KernelOperator, y: Matrix) -> GaussianProcess:
        """Fit on K, [n, n] symmetric, or ``kernel.operator(x)``, and real targets y, [n] or [n, C].

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal, or y does not fit it.
        """
        gram = training_gram(K)
        values = as_targets(y, "y", len(gram), "Pass [n] or [n, C] targets.").to(gram.device)
        columns = values.reshape(len(gram), -1)
        self.passes_, self._lower, self._solver = 0, None, None
        if factorizes(gram):
            self.method_, solution = "Cholesky", solve(gram, self._noise, columns, "noise")
            self.residual_, self._lower = solution.residual, solution.lower
            volume = 2 * solution.lower.diagonal().log().sum().item() + len(gram) * math.log(2 * math.pi)
        else:
            self.method_, self._solver = "conjugate gradients", Solver(gram, self._noise, "noise")
            solution = self._solver.solve(columns)
            self.residual_, self.passes_, volume = solution.residual, solution.passes, math.nan
        self.status_, self.advice_ = solution.status, solution.advice
        scale = scales(columns.reshape(-1)).item()  # products of large values of either sign could overflow
        energy = ((columns / scale) * (solution.alpha / scale)).sum().item() * scale * scale
        self.log_marginal_likelihood_ = -0.5 * (energy + columns.shape[1] * volume)
        self._alpha = solution.alpha.reshape(values.shape)
        self.alpha_ = same_kind(self._alpha, gram)
        return self

    def predict(self, K_test: AnyMatrix, K_test_test: Gram | Matrix | None = None) -> Posterior[AnyMatrix]:
        """Return the posterior at test points.

        Parameters
        ----------
        K_test : k(x_test, x_train), [m, n].
        K_test_test : k(x_test, x_test), [m, m], for the covariance; its diagonal, [m], for the variances alone (memory
            m n instead of m^2); None for the mean alone: K_test is then read in strips of rows.

        Raises
        ------
        Refused
            Before fit; when K_test is not a finite [m, n], or K_test_test no finite [m, m] or [m].
        """
        if self._alpha is None:
            raise unfitted(self)
        if K_test_test is None:
            return Posterior(same_kind(test_product(K_test, self._alpha), K_test))
        matrix = as_test_matrix(K_test, len(self._alpha), self._alpha)
        mean = same_kind(float64_product(matrix, self._alpha), K_test)
        prior = as_prior(K_test_test, len(matrix), "K_test_test").to(matrix.device)
        if self._solver is not None:
            removed, error, passes = self._solver.explained(matrix, prior)
            self.passes_ += passes
            return Posterior(mean, same_kind(prior - removed, K_test), same_kind(error, K_test))
        whitened = torch.linalg.solve_triangular(self._lower, matrix.T.to(torch.float64), upper=False)
        removed = whitened.square().sum(0) if prior.ndim == 1 else whitened.T @ whitened
        return Posterior(mean, same_kind(prior - removed, K_test))


def as_prior(value: Gram | Matrix, m: int, name: str) -> Tensor:
    """Take a kernel of m points with themselves, [m, m], or its diagonal, [m]; symmetric to the last bit.

    Raises
    ------
    Refused
        For another shape, values that are not finite, or a matrix that is not symmetric to rounding.
    """
    values = value if isinstance(value, Gram) else as_tensor(value, name)
    if list(values.shape) not in ([m], [m, m]):
        fix = "Pass the kernel of the test points with themselves."
        raise refusal(name, got=f"shape {list(values.shape)}", expected=f"[{m}, {m}], or its diagonal [{m}]", fix=fix)
    if isinstance(values, Tensor) and values.ndim == 1:
        return check_finite(values, name).to(torch.float64)
    return as_gram(values, name).dense()


def trained_covariance(
    nngp_train: Gram | Matrix, nngp_test_train: Matrix, nngp_test_test: Gram | Matrix, weights: Tensor
) -> Tensor:
    """S - A S_Xx - S_xX A^T + A S_XX A^T for A = `weights`, [m, n]; or its diagonal, where S is given by that.

    Raises
    ------
    Refused
        For kernels of other points than those of A.
    """
    m, n = weights.shape
    own = training_gram(nngp_train, "nngp_train")
    if len(own) != n:
        fix = "Use the points of fit."
        raise refusal("nngp_train", got=f"shape {list(own.shape)}", expected=f"[{n}, {n}]", fix=fix)
    cross = as_test_matrix(nngp_test_train, n, weights, "nngp_test_train")
    prior = as_prior(nngp_test_test, m, "nngp_test_test").to(weights.device)
    if len(cross) != m:
        got, expected = f"{len(cross)} rows", f"{m}, as K_test"
        raise refusal("nngp_test_train", got=got, expected=expected, fix="Use the test points of K_test.")
    half = (own @ weights.T).T.to(weights.device) / 2 - cross
    if prior.ndim == 1:
        return prior + 2 * (half * weights).sum(1)
    moved = half @ weights.T
    return prior + (moved + moved.T)
