"""BatchNorm over a batch, and the piecewise linear activation behind it: a kernel of the whole batch at once.

A channel is z ~ N(0, S) over the B samples. With y = z - mean(z) of covariance C, s = |y|^2 / B + eps, b = y / sqrt s
it becomes f(b). Because f(x b) = x f(b) for x > 0, values and slopes are those of f(y), divided by powers of s, and
1 / s^k = integral of t^(k - 1) e^(-t s) / (k - 1)! dt. Under e^(-t |y|^2 / B) a Gaussian stays one, of covariance
K = C (I + 2 t C / B)^-1, times det(I + 2 t C / B)^(-1/2): what is left is one integral over t of moments in closed form
(Yang et al. 2019, A mean field theory of batch normalization; Yang 2020, Tensor Programs II).

Let F = E[f(y_i) f(y_j)] and D = E[f'(y_i) f'(y_j)] under K (arc-cosine kernels), R = E[f(y_i) f''(y_j)], M the tangent
kernel of y, a = t / B and N = I - a K. Then by Stein's lemma, with weights w(t) = e^(-t eps) det(I + 2 t C / B)^(-1/2),

    E[f(b) f(b)^T] = integral of w F dt,
    E[J T J^T]     = integral of w {D * (N M N) + R v + (R v)^T + a^2 / 2 tr(M K) F} dt,

where * is elementwise, R v has the entries R_ij v_j, v_j = (a^2 / 2 K M K - a M K)_jj; J is the Jacobian of f(b(z)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.activations import Rectifier

_FIRST = -20.0  # log of the first t, relative to where the integrand falls: up to there it is constant to 2e-9
_DIGITS = 39.0  # the integrand has fallen by e^-39 behind the last t
_STEP, _MOST = 0.5, 6  # in log t; how often it is halved
_AGREES = 1e-11  # difference of two steps, relative to the largest value, at which it is not halved further
_ROUNDING = 16 * torch.finfo(torch.float64).eps

Both = tuple[Tensor, Tensor]  # covariance and tangent kernel, [n, n]


class BatchNorm:
    """BatchNorm in train mode with weight w and bias 0, followed by a piecewise linear function.

    rectifier : the function.
    scale : w^2.
    weight_gain, bias_gain : 1 where weight and bias are trained.
    where : the layer's name.
    error : largest difference of the last two quadratures so far, relative to the largest value.
    """

    def __init__(
        self, where: str, eps: float, scale: float, weight_gain: float, bias_gain: float, rectifier: Rectifier
    ) -> None:
        self.where, self.eps, self.scale, self.rectifier = where, eps, scale, rectifier
        self.weight_gain, self.bias_gain = weight_gain, bias_gain
        self.name = f"{rectifier.name}, of what {where} makes of the whole batch"
        self.error = 0.0

    @property
    def alone(self) -> bool:
        """Whether no activation follows."""
        return self.rectifier.even == 0

    def followed_by(self, rectifier: Rectifier, factor: float) -> BatchNorm:
        """Its output times a factor, in an activation."""
        square = factor**2
        gains = self.weight_gain * square, self.bias_gain * square
        return BatchNorm(self.where, self.eps, self.scale * square, *gains, rectifier)

    def moments(self, S: Tensor, T: Tensor) -> Both:
        """Covariance and tangent kernel behind it, from those in front of it."""
        integrand = _Integrand(self.rectifier, self.eps, S, T)
        coarse = integrand.sum(0.0, _STEP)
        for halvings in range(_MOST):
            step = _STEP / 2**halvings
            between = integrand.sum(step / 2, step)
            fine = tuple((a + b) / 2 for a, b in zip(coarse, between, strict=True))
            error = max(_distance(a, b) for a, b in zip(coarse, fine, strict=True))
            coarse = fine
            if error < _AGREES:
                break
        else:
            got = f"an integral over the variances of the batch with a relative error of {error:.0e}"  # pyrefly: ignore
            raise refusal(self.where, got=got, expected=f"less than {_AGREES:.0e}", fix="Scale the data.")
        self.error = max(self.error, error)
        V, J = coarse
        # d f(w b + c) / dw = f'(w b) b = f(w b) / w, and d / dc = f'(w b), whose sign is that of y
        T = J * self.scale + V * self.weight_gain + integrand.slopes() * self.bias_gain
        return V * self.scale, T


class _Integrand:
    """The function of t under both integrals, as a function of u = log(t / t0)."""

    def __init__(self, rectifier: Rectifier, eps: float, S: Tensor, T: Tensor) -> None:
        n = len(S)
        self.eps, self.n = eps, n
        self.linear, self.kinked = rectifier.odd, rectifier.even * 2 / math.pi
        largest = float(S.diagonal().max())
        C, self.M = _centered(S), _centered(T)
        variances, vectors = torch.linalg.eigh((C + C.T) / 2)
        real = variances > _ROUNDING * n * largest  # noise in a direction without variance would count far out
        self.variances, self.U = variances[real], vectors[:, real]
        still = C.diagonal() <= 4 * _ROUNDING * largest  # always the mean of the batch, up to rounding
        self.U = self.U.masked_fill(still[:, None], 0.0)
        mean = rectifier.mean_slope(still, S.diagonal())
        self.linear_slopes = torch.outer(mean, mean)
        self.UM = self.U.T @ self.M
        self.inner = self.UM @ self.U
        self.t0 = 1 / (float(self.variances.sum()) / n + eps)
        self.last = self._end()

    def sum(self, start: float, step: float) -> Both:
        """The trapezoidal rule on start, start + step, ... from the first t on; before it, the integrand is e^u."""
        V, J = torch.zeros_like(self.M), torch.zeros_like(self.M)
        u, factor = _FIRST + start, step / -math.expm1(-step)
        while u < self.last:
            t = self.t0 * math.exp(u)
            weight = factor * t * math.exp(float(self._log_weight(torch.tensor([t], dtype=V.dtype, device=V.device))))
            self._add(t, weight, V, J)
            u, factor = u + step, step
        return (V + V.T) / 2, (J + J.T) / 2

    def slopes(self) -> Tensor:
        """E[f'(y_i) f'(y_j)], without a weight."""
        _, D, _ = self._arc_cosines(self._covariance(0.0)[1])
        return D

    def _log_weight(self, t: Tensor) -> Tensor:
        return -t * self.eps - torch.log1p(2 / self.n * t[:, None] * self.variances).sum(1) / 2

    def _end(self) -> float:
        """Where t w(t), of which all terms are less than a multiple, has fallen behind its largest value."""
        u = torch.arange(_FIRST, 700, 0.5, dtype=torch.float64, device=self.M.device)
        size = u + self._log_weight(self.t0 * u.exp())
        return float(u[size > size.max() - _DIGITS].max()) + 0.5

    def _covariance(self, t: float) -> Both:
        """K as its eigenvalues, and as a matrix."""
        k = self.variances / (1 + 2 * t / self.n * self.variances)
        return k, (self.U * k) @ self.U.T

    def _arc_cosines(self, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F, D and R."""
        own = K.diagonal()
        # as in `Rectifier`: slightly too small, so that a correlation of 1 is one
        root = (torch.outer(own, own) * (1 - _ROUNDING) - K.square()).clamp_(min=0).sqrt_()
        angle = torch.atan2(K, root)
        F = self.linear * K + self.kinked * (K * angle + root)
        D = self.linear_slopes + self.kinked * angle
        return F, D, self.kinked * root / torch.where(own > 0, own, 1.0)

    def _add(self, t: float, weight: float, V: Tensor, J: Tensor) -> None:
        k, K = self._covariance(t)
        F, D, R = self._arc_cosines(K)
        V.add_(F, alpha=weight)
        a = t / self.n
        KM, KMK = (self.U * k) @ self.UM, (self.U * k) @ (self.inner * k) @ self.U.T
        v = a * a / 2 * KMK.diagonal() - a * KM.diagonal()
        trace = a * a / 2 * float((self.inner.diagonal() * k).sum())
        middle = (self.M - a * (KM + KM.T)).add_(KMK, alpha=a * a)
        J.add_((D * middle).add_(R * v, alpha=2).add_(F, alpha=trace), alpha=weight)


def _centered(K: Tensor) -> Tensor:
    """The covariance of y = z - mean(z)."""
    rows = K - K.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def _distance(one: Tensor, two: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((one - two).abs().max()) / max(float(two.abs().max()), 1e-300)
