"""Training in function space: gradient flow and gradient descent on a kernel matrix, in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.gram import machine_input as _gram
from ntkit.machines.descent import Loss, descend, gradient
from ntkit.machines.gaussian_process import Posterior, as_prior
from ntkit.machines.modes import BestTime, filters, search

_EPS = torch.finfo(torch.float64).eps


class GradientFlow:
    r"""What a network with a constant kernel predicts after training for time t (a linearised, or infinitely wide one).

    For the cost C(f) = 1/(2N) sum_i |f(x_i) - y_i|^2 of N samples

    .. math:: f_t(X) = y + e^{-t K/N} (f_0 - y), \qquad
              f_t(x) = f_0(x) + K_{xX} K^{-1} (I - e^{-t K/N}) (y - f_0)

    evaluated eigenvector by eigenvector of K/N, without an inverse. In discrete time exp(-t lambda) is replaced by what
    t steps of gradient descent do, (1 - lr lambda)^t, or with momentum those of ``torch.optim.SGD(lr, momentum)``.

    Parameters
    ----------
    lr : None for continuous time; a learning rate for gradient descent, where t counts whole steps.
    momentum : heavy-ball momentum in [0, 1) of ``torch.optim.SGD``; needs `lr`. (As lr -> 0 it only makes time run
        1/(1 - momentum) times faster: there is no other continuous limit, and so none here.)
    loss : None for the cost above. Otherwise ``loss(outputs, y)``, a scalar (the mean over samples is in it) made of
        torch operations: df/dt = -K dL/df is then integrated numerically, in continuous time, for finite t, at a price
        of some hundred gradients, 2 t lambda_max for long t; ``0.5 * MSELoss`` on [n] targets is the cost above.

    Attributes
    ----------
    eigenvalues_, eigenvectors_ : of K/N (the rates of learning), [n] descending, and [n, n] orthonormal columns.
    noise_ : eigenvalues up to this size (the rounding of K in its dtype, or 4 times the most negative one) cannot be
        told from 0 and count as 0: their modes are not learned, and t = inf is the ridgeless regression of least norm.
    max_learning_rate_ : 2 (1 + momentum) / lambda_max; gradient descent converges below it. Infinite for K = 0.
    residual_ : |K V - V L| / |K| (Frobenius) of the eigendecomposition. With `loss`: of the last prediction, the
        largest relative defect of L(f_0) - L(f_t) = int_0^t (dL/df)^T K (dL/df) ds.
    status_ : "solved" | "indefinite" (an eigenvalue is negative by more than rounding) | "unstable" (`lr` is not below
        `max_learning_rate_`: predictions grow without bound, NaN at t = inf) | with `loss`, of the last prediction:
        "failed" (NaN at the times not reached) | "inaccurate" (`residual_` above 1e-6).
    advice_ : what to do when the status is not "solved", else "".

    Raises
    ------
    Refused
        When `lr` is not positive, `momentum` not in [0, 1) or without `lr`, or `loss` given together with `lr`.

    Notes
    -----
    Jacot, Gabriel, Hongler (2018), "Neural Tangent Kernel", sections 4 and 5. A kernel with outputs="full" is passed as
    the [n C, n C] matrix with targets [n C]; then N = n C, the mean over all entries, as in ``0.5 * MSELoss``.
    Multiplying K by a number divides times and learning rates by it.

    Examples
    --------
    >>> K, y = torch.diag(torch.tensor([2.0, 0.2])), torch.tensor([1.0, 1.0])
    >>> flow = GradientFlow().fit(K, y)
    >>> print(flow.predict_train(1.0), flow.predict(K, t=float("inf")))
    tensor([0.6321, 0.0952], dtype=torch.float64) tensor([1., 1.], dtype=torch.float64)
    >>> print(GradientFlow(lr=0.5).fit(K, y).predict(K, t=[0, 1, 2]))
    tensor([[0.0000, 0.0000],
            [0.5000, 0.0500],
            [0.7500, 0.0975]], dtype=torch.float64)
    """

    eigenvalues_: Any
    eigenvectors_: Any
    noise_: float
    max_learning_rate_: float
    residual_: float
    status_: str
    advice_: str

    def __init__(self, lr: float | None = None, momentum: float = 0.0, loss: Loss | None = None):
        if lr is not None and not 0 < lr < float("inf"):
            raise refusal("lr", got=lr, expected="a learning rate > 0, or None", fix="None is continuous time.")
        if not 0 <= momentum < 1:
            raise refusal("momentum", got=momentum, expected="a number in [0, 1)", fix="0 is plain gradient descent.")
        if momentum and lr is None:
            raise refusal("momentum", got="no lr", expected="discrete time", fix="Pass lr= as to torch.optim.SGD.")
        if loss is not None and (lr is not None or not callable(loss)):
            got = "lr as well" if lr is not None else type(loss).__name__
            raise refusal(
                "loss", got=got, expected="a function of outputs and y, in continuous time", fix="Leave out lr=."
            )
        self.lr, self.momentum, self.loss_fn = None if lr is None else float(lr), float(momentum), loss
        self._start: Tensor | None = None

    def fit(self, K: Any, y: Any, initial: Any = None) -> GradientFlow:
        """Fit on K, [n, n] symmetric, targets y, [n] or [n, C], and the outputs at t = 0 (of y's shape; 0 if None).

        With `loss`, y may be anything with n entries that the loss takes (class indices); `initial` then says what
        shape the outputs have, [n] or [n, C].

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal, or y or `initial` do not fit it.
        """
        matrix, symmetric, eps = _gram.as_gram(K)
        n = len(matrix)
        matrix = matrix if symmetric else (matrix + matrix.T) / 2
        given = _gram.as_tensor(y, "y")
        _gram.check_length(torch.atleast_1d(given), n)
        shape = list(given.shape)
        if self.loss_fn is None or given.is_floating_point():
            given = _values(given, "y", n, None, "Pass [n] or [n, C] targets.")
        y_ = given.to(matrix.device)
        if initial is not None:
            expected = shape if self.loss_fn is None else None
            start = _values(initial, "initial", n, expected, "Pass the outputs on the training points.")
        else:
            start = torch.zeros(shape, dtype=torch.float64)
        start = start.to(matrix.device)
        values, vectors = torch.linalg.eigh(matrix / n)
        values, vectors = values.flip(0), vectors.flip(1)
        top, lowest = max(values[0].item(), 0.0), values[-1].item()
        size = torch.linalg.matrix_norm(matrix).item()
        defect = torch.linalg.matrix_norm(matrix @ vectors - vectors * (n * values)).item()
        rounding = max(n * _EPS, eps) * top
        self.noise_ = max(rounding, -4 * lowest)  # rounding is of either sign, and not of one size
        self.residual_ = defect / (size or 1.0)
        self.max_learning_rate_ = 2 * (1 + self.momentum) / top if top > 0 else float("inf")
        self.status_, self.advice_ = "solved", ""
        if lowest < -rounding:
            self.status_ = "indefinite"
            self.advice_ = (
                f"K has the eigenvalue {n * lowest:.1e}, below the rounding of {n * rounding:.1e}; eigenvalues up to "
                "its size are taken as 0. Compute K in float64."
            )
        if self.lr is not None and self.lr >= self.max_learning_rate_:
            self.status_ = "unstable"
            self.advice_ = f"lr = {self.lr:g} diverges: use one below max_learning_rate_ = {self.max_learning_rate_:g}."
        if self.loss_fn is not None:
            value, slope = gradient(self.loss_fn, start, y_)
            if not (torch.isfinite(value) and torch.isfinite(slope).all()):
                raise refusal("loss", got="no finite value", expected="one at the initial outputs", fix="Look at y.")
        self._matrix, self._y, self._start, self._like, self._zero_mean = matrix, y_, start, K, initial is None
        self._rates = values.where(values > self.noise_, 0.0)
        self._vectors = vectors
        # a mode that counts as 0 still moves test points a little; beyond this time only its rounding would grow
        self._longest = (self.noise_ * top) ** -0.5 if top > 0 else 0.0
        if self.loss_fn is None:
            self._gap = vectors.T @ self._columns(start - y_)
        self.eigenvalues_, self.eigenvectors_ = _gram.same_kind(values, K), _gram.same_kind(vectors, K)
        return self

    def predict(self, K_test: Any, t: Any = float("inf"), initial: Any = None) -> Any:
        """Return f_t at test points, [m] or [m, C], from K_test = k(x_test, x_train), [m, n].

        Parameters
        ----------
        K_test : [m, n].
        t : time (steps with `lr`), a number >= 0 or inf; or several, [T]: then they lie along the first axis.
        initial : the outputs f_0 at the test points, [m] or [m, C]; 0 if None.

        Raises
        ------
        Refused
            Before fit; when K_test, t or `initial` are not of the form said.
        """
        start = self._fitted()
        matrix = _gram.as_test_matrix(K_test, len(start), start)
        times, single = self._times(t)
        found = matrix @ self._dual(times)
        if initial is not None:
            shape = [len(matrix), *start.shape[1:]]
            at0 = _values(initial, "initial", len(matrix), shape, "Pass the outputs on the test points.")
            found = found + self._columns(at0.to(matrix.device))
        return self._shaped(found, single, K_test)

    def predict_train(self, t: Any) -> Any:
        """Return f_t on the training points, [n] or [n, C]; for several times [T, ...]. Raises as `predict`."""
        start = self._fitted()
        times, single = self._times(t)
        if self.loss_fn is not None:
            found = self._columns(start) + self._matrix @ self._dual(times)
        else:
            found = self._columns(self._y) + self._vectors @ self._left(times)
        return self._shaped(found, single, self._like)

    def modes(self, t: Any) -> Any:
        """Return what is left to learn by eigenvector, V^T (f_t - y): [n] or [n, C], in the order of `eigenvalues_`.

        For several times [T, ...]. In closed form exp(-t lambda_i) times its value at 0. Raises as `predict`, and where
        a `loss` was given.
        """
        self._fitted()
        self._quadratic("modes")
        times, single = self._times(t)
        return self._shaped(self._left(times), single, self._like)

    def loss(self, t: Any) -> Any:
        """Return the cost C(f_t), or the loss given: a float, or [T] for several times. Raises as `predict`."""
        start = self._fitted()
        times, single = self._times(t)
        if self.loss_fn is None:
            costs = self._left(times).square().sum((1, 2)) / (2 * len(start))
        else:
            outputs = self._columns(start) + self._matrix @ self._dual(times)
            costs = torch.stack([gradient(self.loss_fn, f.reshape(start.shape), self._y)[0] for f in outputs])
        return costs[0].item() if single else _gram.same_kind(costs, self._like)

    def best_time(self, K_val: Any, y_val: Any, initial_val: Any = None) -> BestTime:
        """Find the time at which to stop: where the error on validation points is smallest along the flow.

        Looks at t = 0, at times in geometric progression from a thousandth of the fastest mode's to 40 times the
        slowest one's, and at inf; then between the neighbours of the best. A second, separate minimum narrower than
        that grid can be missed.

        Parameters
        ----------
        K_val : k(x_val, x_train), [m, n].
        y_val, initial_val : targets and f_0 of the validation points, [m] or [m, C] as y; f_0 = 0 if None.

        Raises
        ------
        Refused
            As `predict`, and where a `loss` was given.
        """
        start = self._fitted()
        self._quadratic("best_time")
        matrix = _gram.as_test_matrix(K_val, len(start), start)
        shape = [len(matrix), *start.shape[1:]]
        target = _values(y_val, "y_val", len(matrix), shape, "Pass the targets of the validation points.")
        if initial_val is not None:
            target = target - _values(initial_val, "initial_val", len(matrix), shape, "Pass their outputs at t = 0.")
        rest, seen = self._columns(target.to(matrix.device)), matrix @ self._vectors / len(start)

        def error(t: float) -> float:
            _, phi = self._filters(torch.tensor([t], dtype=torch.float64, device=rest.device))
            value = (rest + seen @ (phi[0, :, None] * self._gap)).square().sum().item() / (2 * len(rest))
            return value if value == value else float("inf")

        return search(error, self._rates, self.lr, self.momentum)

    def ensemble(self, T_test: Any, nngp_train: Any, nngp_test_train: Any, nngp_test_test: Any, t: Any) -> Posterior:
        r"""Return the Gaussian of infinitely wide networks trained for time t, each from its own initialisation.

        .. math:: A_t = T_{xX} T^{-1} (I - e^{-t T/N}), \quad m = A_t y, \quad
                  S = S_{xx} - A_t S_{Xx} - S_{xX} A_t^\top + A_t S_{XX} A_t^\top

        with T the tangent kernel given to `fit` and S the NNGP kernel, from which f_0 is drawn.

        Parameters
        ----------
        T_test : tangent kernel of test and training points, [m, n].
        nngp_train, nngp_test_train, nngp_test_test : NNGP kernel, [n, n], [m, n], and [m, m] or its diagonal [m].
        t : one time; inf for networks trained to the end.

        Raises
        ------
        Refused
            As `predict`; for several times, where a `loss` was given, or where `initial` was: it is random here.

        Notes
        -----
        Jacot et al. (2018), section 5; Lee et al. (2019), "Wide Neural Networks of Any Depth Evolve as Linear Models",
        section 2.4.

        Examples
        --------
        >>> flow = GradientFlow().fit(torch.eye(2), torch.tensor([1.0, 2.0]))
        >>> flow.ensemble(torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2), t=float("inf")).std.tolist()
        [0.0, 0.0]
        """
        start = self._fitted()
        self._quadratic("ensemble")
        times, single = self._times(t)
        if not single or not self._zero_mean:
            got, fix = ("initial outputs", "Fit without initial=.") if single else ("several times", "Pass one time.")
            raise refusal("ensemble", got=got, expected="one time, and random initial outputs", fix=fix)
        n = len(start)
        matrix = _gram.as_test_matrix(T_test, n, start)
        own, symmetric, _ = _gram.as_gram(nngp_train)
        if len(own) != n:
            raise refusal(
                "nngp_train", got=f"shape {list(own.shape)}", expected=f"[{n}, {n}]", fix="Use the points of fit."
            )
        own = (own if symmetric else (own + own.T) / 2).to(start.device)
        cross = _gram.as_test_matrix(nngp_test_train, n, start)
        prior = as_prior(nngp_test_test, len(matrix), "nngp_test_test").to(start.device)
        if len(cross) != len(matrix):
            raise refusal(
                "nngp_test_train", got=f"{len(cross)} rows", expected=f"{len(matrix)}, as T_test", fix="Use its points."
            )
        _, phi = self._filters(times)
        weights = (matrix @ self._vectors * phi[0] / n) @ self._vectors.T
        half = weights @ own / 2 - cross  # S - A S_Xx - S_xX A^T + A S_XX A^T = S + half A^T + A half^T
        if prior.ndim == 1:
            covariance = prior + 2 * (half * weights).sum(1)
        else:
            moved = half @ weights.T
            covariance = prior + (moved + moved.T)
        mean = self._shaped((weights @ self._columns(self._y))[None], True, T_test)
        return Posterior(mean, _gram.same_kind(covariance, T_test))

    # ------------------------------------------------------------------ one eigenvalue at a time

    def _filters(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of each mode, and what was done divided by its eigenvalue, [T, n] each."""
        left, done = filters(self._rates, times, self.lr, self.momentum)
        return left, done.where((self._rates > 0) | (done <= self._longest), 0.0)

    def _left(self, times: Tensor) -> Tensor:
        """V^T (f_t - y), [T, n, C]."""
        return self._filters(times)[0][:, :, None] * self._gap

    def _dual(self, times: Tensor) -> Tensor:
        """a_t with f_t(x) = f_0(x) + k(x, X) a_t, [T, n, C]."""
        start = self._fitted()
        if self.loss_fn is None:
            return self._vectors @ (self._filters(times)[1][:, :, None] * self._gap) / -len(start)
        found = descend(self._matrix, self.loss_fn, self._y, start, times)
        self.residual_, self.status_, self.advice_ = found.residual, found.status, found.advice
        return found.dual.reshape(len(times), len(start), -1)

    # ------------------------------------------------------------------ times

    def _times(self, t: Any) -> tuple[Tensor, bool]:
        given = _gram.as_tensor(t, "t").to(torch.float64)
        ok = given.ndim <= 1 and given.numel() > 0 and bool((given >= 0).all())
        if ok and self.lr is not None:
            ok = bool(((given == given.floor()) & ((given < 2.0**53) | given.isinf())).all())
        if ok and self.loss_fn is not None:
            ok = bool(torch.isfinite(given).all())
        if not ok:
            kind = "whole steps >= 0" if self.lr is not None else "times >= 0"
            kind += " (finite ones: a loss has no closed form)" if self.loss_fn is not None else ", or inf"
            shown = t if given.numel() < 9 else f"shape {list(given.shape)}"
            raise refusal("t", got=shown, expected=f"{kind}; one, or a 1-D array", fix="Look at its values.")
        device = self._fitted().device
        return given.reshape(-1).to(device), given.ndim == 0

    # ------------------------------------------------------------------ shapes

    def _fitted(self) -> Tensor:
        if self._start is None:
            raise _gram.unfitted("GradientFlow")
        return self._start

    def _quadratic(self, name: str) -> None:
        if self.loss_fn is not None:
            raise refusal(name, got="a flow with loss=", expected="the quadratic cost", fix="Leave out loss=.")

    def _columns(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1)

    def _shaped(self, found: Tensor, single: bool, like: Any) -> Any:
        """[T, m, C] as the user asked: without C for [n] targets, without T for one time."""
        found = found[:, :, 0] if self._fitted().ndim == 1 else found
        return _gram.same_kind(found[0] if single else found, like)


def _values(value: Any, name: str, n: int, shape: list[int] | None, fix: str) -> Tensor:
    """Take [n] or [n, C] finite numbers in float64; of exactly `shape` where one is given."""
    given = _gram.as_tensor(value, name)
    matrix = _gram.as_matrix(given[:, None] if given.ndim == 1 else given, name, fix=fix)
    if list(given.shape) != (shape or list(given.shape)) or len(matrix) != n:
        raise refusal(
            name,
            got=f"shape {list(given.shape)}",
            expected=f"{shape or [n]}" + (" or [n, C]" if not shape else ""),
            fix=fix,
        )
    return matrix[:, 0] if given.ndim == 1 else matrix
