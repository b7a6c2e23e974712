"""The Gaussian process posterior on a kernel matrix, and the Gaussian that it and an ensemble of networks return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.gram import machine_input as _gram


@dataclass(frozen=True, eq=False)
class Posterior:
    """A Gaussian over the values at m test points: N(mean, covariance), the same covariance for each of C outputs.

    Attributes
    ----------
    mean : [m], or [m, C].
    covariance : [m, m]; [m] where only variances were asked for; None where only the mean was. Never clipped: a
        variance that should be zero is zero to rounding, of either sign.

    Examples
    --------
    >>> p = Posterior(torch.tensor([1.0, 2.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    >>> p.std.tolist(), p.percentiles([50]).tolist(), p.sample(3, seed=0).shape
    ([2.0, 0.0], [[1.0, 2.0]], torch.Size([3, 2]))
    """

    mean: Any
    covariance: Any = None

    @property
    def std(self) -> Any:
        """Standard deviations, [m]: the root of each variance, 0 where rounding made it negative."""
        return _gram.same_kind(self._std(), self.mean)

    def percentiles(self, q: Any) -> Any:
        """Percentiles `q` (in percent, between 0 and 100) at each point: [*q.shape, m] or [*q.shape, m, C].

        Raises
        ------
        Refused
            When a `q` is not between 0 and 100, or only the mean is known.
        """
        levels = torch.as_tensor(np.asarray(q, dtype=np.float64))
        if not bool(((levels > 0) & (levels < 100)).all()):
            raise refusal("q", got=q, expected="percentiles between 0 and 100", fix="Pass e.g. [10, 50, 90].")
        mean = torch.as_tensor(self.mean).to(torch.float64)
        spread = self._std().reshape([-1] + [1] * (mean.ndim - 1))
        score = torch.special.ndtri(levels / 100).to(mean.device).reshape([*levels.shape] + [1] * mean.ndim)
        return _gram.same_kind(mean + score * spread, self.mean)

    def sample(self, n: int, seed: int = 0) -> Any:
        """Draw `n` functions at the test points, [n, m] or [n, m, C]; the same `seed`, the same draws.

        Raises
        ------
        Refused
            When `n` is not positive, or the full covariance is not known.
        """
        covariance = self._known("covariance [m, m]")
        if covariance.ndim != 2:
            raise refusal(
                "sample", got="variances only", expected="a covariance [m, m]", fix="Pass the test points' full kernel."
            )
        if n < 1:
            raise refusal("n", got=n, expected="at least one draw", fix="Pass how many functions to draw.")
        mean = torch.as_tensor(self.mean).to(covariance)
        values, vectors = torch.linalg.eigh(covariance)  # singular at training points: no Cholesky factor there
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, *mean.shape, generator=generator, dtype=torch.float64).to(covariance.device)
        root = vectors * values.clamp(min=0).sqrt()
        return _gram.same_kind(mean + torch.einsum("ij,nj...->ni...", root, noise), self.mean)

    def _known(self, wanted: str) -> Tensor:
        if self.covariance is None:
            raise refusal(
                "Posterior", got="a mean alone", expected=wanted, fix="Pass the test points' kernel, or its diagonal."
            )
        return torch.as_tensor(self.covariance).to(torch.float64)

    def _std(self) -> Tensor:
        covariance = self._known("a covariance")
        return (covariance if covariance.ndim == 1 else covariance.diagonal()).clamp(min=0).sqrt()


class GaussianProcess:
    r"""Gaussian process regression: prior N(0, K), observations with independent noise, by Cholesky in float64.

    .. math:: m = K_* (K + s I)^{-1} y, \qquad S = K_{**} - K_* (K + s I)^{-1} K_*^\top

    of the function itself (its observations have variance s more).

    Parameters
    ----------
    noise : the VARIANCE s of the observations' noise, added to the diagonal of K as it is: absolute, in the units of K.
        No jitter is ever added to it.

    Attributes
    ----------
    alpha_ : [n], or [n, C]: (K + s I)^-1 y; NaN where singular, and so is everything predicted.
    log_marginal_likelihood_ : log N(y; 0, K + s I) in nats, summed over the outputs.
    residual_ : relative residual of the solve, |(K + s I) alpha - y| / |y| (Frobenius).
    status_ : "solved" | "singular" (K + s I has no Cholesky factor to working precision).
    advice_ : what to do when singular, else "".

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

    alpha_: Any
    log_marginal_likelihood_: float
    residual_: float
    status_: str
    advice_: str

    def __init__(self, noise: float = 0.0):
        if not 0 <= noise < float("inf"):
            raise refusal("noise", got=noise, expected="a finite variance >= 0", fix="It is added to the diagonal.")
        self.noise = float(noise)
        self._alpha: Tensor | None = None

    def fit(self, K: Any, y: Any) -> GaussianProcess:
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
        targets, n = targets.to(matrix.device), len(matrix)
        shifted = matrix.clone() if symmetric else (matrix + matrix.T) / 2
        shifted.diagonal().add_(self.noise)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        rounding = n * torch.finfo(torch.float64).eps * shifted.diagonal().max().item()
        if failed or lower.diagonal().square().min() <= rounding:
            alpha, lower = torch.full_like(targets, torch.nan), torch.full_like(lower, torch.nan)
            self.status_ = "singular"
            self.residual_ = self.log_marginal_likelihood_ = float("nan")
            self.advice_ = (
                f"K + {self.noise:g} I is not positive definite to working precision: points repeat, or K has a lower "
                f"rank than points. Use a noise well above {max(rounding, self.noise):.1e}."
            )
        else:
            alpha = torch.cholesky_solve(targets, lower)
            size = torch.linalg.vector_norm(targets).item()
            self.residual_ = torch.linalg.vector_norm(shifted @ alpha - targets).item() / (size or 1.0)
            volume = 2 * lower.diagonal().log().sum().item() + n * math.log(2 * math.pi)
            self.log_marginal_likelihood_ = -0.5 * ((targets * alpha).sum().item() + targets.shape[1] * volume)
            self.status_, self.advice_ = "solved", ""
        self._lower, self._alpha = lower, alpha[:, 0] if flat else alpha
        self.alpha_ = _gram.same_kind(self._alpha, K)
        return self

    def predict(self, K_test: Any, K_test_test: Any = None) -> Posterior:
        """Return the posterior at test points.

        Parameters
        ----------
        K_test : k(x_test, x_train), [m, n].
        K_test_test : k(x_test, x_test), [m, m], for the covariance; its diagonal, [m], for the variances alone (memory
            m n instead of m^2); None for the mean alone.

        Raises
        ------
        Refused
            Before fit; when K_test is not a finite [m, n], or K_test_test no finite [m, m] or [m].
        """
        if self._alpha is None:
            raise _gram.unfitted("GaussianProcess")
        matrix = _gram.as_test_matrix(K_test, len(self._alpha), self._alpha)
        mean = _gram.same_kind(matrix @ self._alpha, K_test)
        if K_test_test is None:
            return Posterior(mean)
        prior = as_prior(K_test_test, len(matrix), "K_test_test").to(matrix.device)
        known = torch.linalg.solve_triangular(self._lower, matrix.T, upper=False)
        removed = known.square().sum(0) if prior.ndim == 1 else known.T @ known
        return Posterior(mean, _gram.same_kind(prior - removed, K_test))


def as_prior(value: Any, m: int, name: str) -> Tensor:
    """Take a kernel of m points with themselves, [m, m], or its diagonal, [m]; symmetric to the last bit.

    Raises
    ------
    Refused
        For another shape, values that are not finite, or a matrix that is not symmetric to rounding.
    """
    given = _gram.as_tensor(value, name)
    if given.ndim == 1:
        given = _gram.as_matrix(given[:, None], name)[:, 0]
    else:
        given = _gram.as_matrix(given, name)
    if list(given.shape) not in ([m], [m, m]):
        raise refusal(
            name,
            got=f"shape {list(given.shape)}",
            expected=f"[{m}, {m}], or its diagonal [{m}]",
            fix="Pass the kernel of the test points with themselves.",
        )
    if given.ndim == 1:
        return given
    if (given - given.T).abs().max() > 1e-5 * given.diagonal().abs().max():
        raise refusal(
            name,
            got="a matrix that is not symmetric",
            expected="the kernel of the test points with themselves",
            fix="Pass k(x_test), both sides in one order.",
        )
    return (given + given.T) / 2
