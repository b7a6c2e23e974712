"""Training in function space: gradient flow and gradient descent on a kernel matrix, in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integer, as_number, scales
from ntkit.gram.arrays import AnyMatrix, Matrix, as_tensor, float64_product, same_kind
from ntkit.gram.gram_matrix import Gram, check_squares
from ntkit.kernels.kernel import KernelOperator
from ntkit.machines.descent import Loss, descend, gradient
from ntkit.machines.gaussian_process import Posterior, trained_covariance
from ntkit.machines.machine_input import (
    Machine,
    as_targets,
    as_test_matrix,
    check_length,
    test_product,
    training_gram,
    unfitted,
)
from ntkit.machines.modes import BestTime, as_times, decomposed, filters, search
from ntkit.machines.tail import Tail

_EPS = torch.finfo(torch.float64).eps


class GradientFlow(Machine):
    r"""What a network with a constant kernel predicts after training for time t (a linearized, or infinitely wide one).

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
    k : None for all eigenvectors, by a dense decomposition. Else the top `k`, from products with K alone (`spectrum`),
        for kernel matrices larger than memory and ``kernel.operator(x)``; training outside them by a polynomial in K of
        degree 8, with a bound (`error_bound`): small up to about t = 5 N / lambda_k, so for early stopping; infinite at
        test points for t = inf. Memory: n (k + 9 C) numbers, and those of `spectrum`.

    Attributes
    ----------
    eigenvalues_, eigenvectors_ : of K/N (the rates of learning), [n] descending, and [n, n] orthonormal columns; with
        `k`, [k] and [n, k].
    noise_ : eigenvalues up to this size (the rounding of K in its dtype, or 4 times the most negative one) cannot be
        told from 0 and count as 0: their modes are not learned, and t = inf is the ridgeless regression of least norm.
    max_learning_rate_ : 2 (1 + momentum) / lambda_max; gradient descent converges below it. Infinite for K = 0.
    residual_ : |K V - V L| / |K| (Frobenius) of the eigendecomposition. With `loss`: of the last prediction, the
        largest relative defect of L(f_0) - L(f_t) = int_0^t (dL/df)^T K (dL/df) ds.
    status_ : "solved" | "indefinite" (an eigenvalue is negative by more than rounding) | "unstable" (`lr` is not below
        `max_learning_rate_`: predictions grow without bound, NaN at t = inf) | "inaccurate" (the top `k` did not
        converge) | with `loss`, of the last prediction:
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

    eigenvalues_: Matrix
    eigenvectors_: Matrix
    noise_: float
    max_learning_rate_: float
    residual_: float

    def __init__(
        self, lr: float | None = None, *, momentum: float = 0.0, loss: Loss | None = None, k: int | None = None
    ):
        rate = None
        if lr is not None:
            expected = "a learning rate > 0, or None"
            rate = as_number(lr, "lr", lambda v: 0 < v < float("inf"), expected, "None is continuous time.")
        fix = "0 is plain gradient descent."
        heavy = as_number(momentum, "momentum", lambda v: 0 <= v < 1, "a number in [0, 1)", fix)
        if heavy and lr is None:
            raise refusal("momentum", got="no lr", expected="discrete time", fix="Pass lr= as to torch.optim.SGD.")
        if loss is not None and (lr is not None or not callable(loss)):
            got = "lr as well" if lr is not None else type(loss).__name__
            raise refusal(
                "loss", got=got, expected="a function of outputs and y, in continuous time", fix="Leave out lr=."
            )
        if k is not None:
            k = as_integer(k, "k", "None, or an integer from 1", "None takes all eigenvectors.", least=1)
        if k is not None and (heavy or loss is not None):
            got = "momentum" if heavy else "a loss"
            raise refusal("k", got=got, expected="the quadratic cost without momentum", fix=f"Leave out k= or {got}.")
        self.lr, self.momentum, self.loss, self.k = lr, momentum, loss, k
        self._lr, self._momentum = rate, heavy
        self._start: Tensor | None = None

    def fit(self, K: Gram | Matrix | KernelOperator, y: Any, *, initial: Matrix | None = None) -> GradientFlow:
        """Fit on K, [n, n] symmetric, targets y, [n] or [n, C], and the outputs at t = 0 (of y's shape; 0 if None).

        With `k`, K may be ``kernel.operator(x)``.

        With `loss`, y may be anything with n entries that the loss takes (class indices); `initial` then says what
        shape the outputs have, [n] or [n, C].

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal, its largest entry is not between
            1e-140 and 1e140, or y or `initial` do not fit it, or the loss does not take them.
        """
        gram = training_gram(K)
        check_squares(gram)
        n = len(gram)
        y_ = as_tensor(y, "y")
        check_length(torch.atleast_1d(y_), n)
        shape = list(y_.shape)
        if self.loss is None or y_.is_floating_point():
            y_ = as_targets(y_, "y", n, "Pass [n] or [n, C] targets.")
        y_ = y_.to(gram.device)
        start = torch.zeros(shape, dtype=torch.float64, device=gram.device)
        if initial is not None:
            expected = shape if self.loss is None else None
            start = as_targets(initial, "initial", n, "Pass the outputs on the training points.", expected)
        start = start.to(gram.device)
        modes = decomposed(K, gram, self.k)
        vectors, values = modes.vectors, modes.values / n
        top, lowest = max(values[0].item(), 0.0), values[-1].item()
        rounding = max(n * _EPS, gram.precision) * top
        self.noise_ = rounding if self.k else max(rounding, -4 * lowest)  # rounding is of either sign, not of one size
        self.residual_ = modes.defect / (modes.size or 1.0)
        self.max_learning_rate_ = 2 * (1 + self._momentum) / top if top > 0 else float("inf")
        self.status_, self.advice_ = "inaccurate" if modes.advice else "solved", modes.advice
        if lowest < -rounding:
            self.status_ = "indefinite"
            self.advice_ = (
                f"K has the eigenvalue {n * lowest:.1e}, below the rounding of {n * rounding:.1e}; eigenvalues up to "
                "its size are taken as 0. Compute K in float64."
            )
        if self._lr is not None and self._lr >= self.max_learning_rate_:
            self.status_ = "unstable"
            self.advice_ = (
                f"lr = {self._lr:g} diverges: use one below max_learning_rate_ = {self.max_learning_rate_:g}."
            )
        if self.loss is not None:
            value, slope = gradient(self.loss, start, y_)
            if not (torch.isfinite(value) and torch.isfinite(slope).all()):
                raise refusal("loss", got="no finite value", expected="one at the initial outputs", fix="Look at y.")
        self._matrix = None if self.loss is None else gram.dense()  # not the user's memory, which may change
        self._y, self._start, self._zero_mean = y_, start, initial is None
        self._rates = values.where(values > self.noise_, 0.0)
        self._vectors = vectors
        # a mode that counts as 0 still moves test points a little; beyond this time only its rounding would grow
        self._longest = (self.noise_ * top) ** -0.5 if top > 0 else 0.0
        self._tail = None
        if self.loss is None:
            gap = self._columns(start - y_)
            self._gap = vectors.T @ gap
            if modes.trace is not None:
                phases = lambda rates, times: filters(rates, times, self._lr, 0.0)
                self._tail = Tail(
                    gram, vectors, modes.values, modes.defect, modes.trace, self.noise_, gap, phases, self._lr
                )
        self.eigenvalues_, self.eigenvectors_ = same_kind(values, gram), same_kind(vectors, gram)
        return self

    def predict(
        self, K_test: AnyMatrix, t: ArrayLike | Tensor = float("inf"), *, initial: Matrix | None = None
    ) -> AnyMatrix:
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
        times, single = self._times(t)
        dual = self._dual(times)
        flat = test_product(K_test, dual.transpose(0, 1).reshape(len(start), -1))  # [m, T C]
        outputs = flat.reshape(len(flat), *dual.shape[::2]).transpose(0, 1)
        if initial is not None:
            shape = [len(flat), *start.shape[1:]]
            at0 = as_targets(initial, "initial", len(flat), "Pass the outputs on the test points.", shape)
            outputs = outputs + self._columns(at0.to(flat.device))
        return self._shaped(outputs, single, K_test)

    def predict_train(self, t: ArrayLike | Tensor) -> Matrix:
        """Return f_t on the training points, [n] or [n, C]; for several times [T, ...]. Raises as `predict`."""
        start = self._fitted()
        times, single = self._times(t)
        if self._matrix is not None:
            outputs = self._columns(start) + self._matrix @ self._dual(times)
        else:
            outputs = self._columns(self._y) + self._vectors @ self._left(times)
            outputs = outputs if self._tail is None else outputs + self._tail.left(times)
        return self._shaped(outputs, single, self.eigenvalues_)

    def modes(self, t: ArrayLike | Tensor) -> Matrix:
        """Return what is left to learn by eigenvector, V^T (f_t - y): [n] or [n, C], in the order of `eigenvalues_`.

        For several times [T, ...]. In closed form exp(-t lambda_i) times its value at 0. Raises as `predict`, and where
        a `loss` was given.
        """
        self._fitted()
        self._quadratic("modes")
        times, single = self._times(t)
        return self._shaped(self._left(times), single, self.eigenvalues_)

    def cost(self, t: ArrayLike | Tensor) -> Any:
        """Return the cost C(f_t), or the loss given: a float, or [T] for several times. Raises as `predict`."""
        start = self._fitted()
        times, single = self._times(t)
        if self.loss is None or self._matrix is None:
            left = self._left(times).square().sum((1, 2))
            left = left if self._tail is None else left + self._tail.left(times).square().sum((1, 2))
            costs = left / (2 * len(start))
        else:
            outputs = self._columns(start) + self._matrix @ self._dual(times)
            costs = torch.stack([gradient(self.loss, f.reshape(start.shape), self._y)[0] for f in outputs])
        return costs[0].item() if single else same_kind(costs, self.eigenvalues_)

    def best_time(self, K_val: Matrix, y_val: Matrix, *, initial_val: Matrix | None = None) -> BestTime:
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
        matrix = as_test_matrix(K_val, len(start), start)
        shape = [len(matrix), *start.shape[1:]]
        target = as_targets(y_val, "y_val", len(matrix), "Pass the targets of the validation points.", shape)
        if initial_val is not None:
            fix = "Pass their outputs at t = 0."
            target = target - as_targets(initial_val, "initial_val", len(matrix), fix, shape)
        rest, seen = self._columns(target.to(matrix.device)), float64_product(matrix, self._vectors) / len(start)
        tail, at = self._tail, lambda t: torch.tensor([t], dtype=torch.float64, device=rest.device)
        others = None if tail is None else float64_product(matrix, tail.blocks) / len(start)

        def off(t: Tensor) -> Tensor:
            _, phi = self._filters(t)
            moved = rest + seen @ (phi[0, :, None] * self._gap)
            return moved if tail is None else moved + torch.einsum("d,dmc->mc", tail.done(t)[0], others)

        scale = scales(torch.stack([rest.abs().max(), (start - self._y).abs().max()])).item()

        def error(t: float) -> float:
            value = (off(at(t)) / scale).square().sum().item()
            return value / (2 * len(rest)) if value == value else float("inf")

        best = search(error, self._rates, self._lr, self._momentum)
        best = replace(best, error=best.error * scale * scale)
        if tail is None:
            return best
        bound = tail.done_error(at(best.t), matrix).norm().item()
        return replace(best, bound=(2 * off(at(best.t)).norm().item() * bound + bound**2) / (2 * len(rest)))

    def error_bound(self, K_test: AnyMatrix | None, t: ArrayLike | Tensor = float("inf")) -> Any:
        """Bound how far `predict` with the top `k` may be from `predict` with all eigenvectors, in the same shape.

        It holds for a positive semi-definite K, and is 0 where all were computed. K_test = None: one row, [1] or
        [1, C], which bounds the error of `predict_train` in the 2-norm over the training points. Raises as `predict`.
        """
        start, tail = self._fitted(), self._tail
        times, single = self._times(t)
        like = self.eigenvalues_ if K_test is None else K_test
        matrix = start.new_zeros(1, len(start)) if K_test is None else as_test_matrix(K_test, len(start), start)
        if tail is None:
            return self._shaped(start.new_zeros(len(times), len(matrix), self._gap.shape[1]), single, like)
        bound = tail.left_error(times)[:, None] if K_test is None else tail.done_error(times, matrix)
        return self._shaped(bound, single, like)

    def ensemble(
        self,
        K_test: AnyMatrix,
        *,
        nngp_train: Gram | Matrix,
        nngp_test_train: Matrix,
        nngp_test_test: Gram | Matrix,
        t: float,
    ) -> Posterior[AnyMatrix]:
        r"""Return the Gaussian of infinitely wide networks trained for time t, each from its own initialization.

        .. math:: A_t = T_{xX} T^{-1} (I - e^{-t T/N}), \quad m = A_t y, \quad
                  S = S_{xx} - A_t S_{Xx} - S_{xX} A_t^\top + A_t S_{XX} A_t^\top

        with T the tangent kernel given to `fit` and S the NNGP kernel, from which f_0 is drawn.

        Parameters
        ----------
        K_test : tangent kernel of test and training points, [m, n], as in `predict`.
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
        >>> one = torch.eye(2)
        >>> flow = GradientFlow().fit(one, torch.tensor([1.0, 2.0]))
        >>> flow.ensemble(one, nngp_train=one, nngp_test_train=one, nngp_test_test=one, t=float("inf")).std.tolist()
        [0.0, 0.0]
        """
        start = self._fitted()
        self._quadratic("ensemble")
        if self._tail is not None:
            fix = "Leave out k=."
            raise refusal("ensemble", got=f"the top {self.k} eigenvectors", expected="all of them", fix=fix)
        times, single = self._times(t)
        if not single or not self._zero_mean:
            got, fix = ("initial outputs", "Fit without initial=.") if single else ("several times", "Pass one time.")
            raise refusal("ensemble", got=got, expected="one time, and random initial outputs", fix=fix)
        matrix = as_test_matrix(K_test, len(start), start, "K_test")
        _, phi = self._filters(times)
        weights = (float64_product(matrix, self._vectors) * phi[0] / len(start)) @ self._vectors.T
        covariance = trained_covariance(nngp_train, nngp_test_train, nngp_test_test, weights)
        mean = self._shaped((weights @ self._columns(self._y))[None], True, K_test)
        return Posterior(mean, same_kind(covariance, K_test))

    # ------------------------------------------------------------------ one eigenvalue at a time

    def _filters(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of each mode, and what was done divided by its eigenvalue, [T, n] each."""
        left, done = filters(self._rates, times, self._lr, self._momentum)
        return left, done.where((self._rates > 0) | (done <= self._longest), 0.0)

    def _left(self, times: Tensor) -> Tensor:
        """V^T (f_t - y), [T, n, C]."""
        return self._filters(times)[0][:, :, None] * self._gap

    def _dual(self, times: Tensor) -> Tensor:
        """a_t with f_t(x) = f_0(x) + k(x, X) a_t, [T, n, C]."""
        start = self._fitted()
        if self.loss is None or self._matrix is None:
            moved = self._vectors @ (self._filters(times)[1][:, :, None] * self._gap)
            if self._tail is not None:
                moved += torch.einsum("td,dnc->tnc", self._tail.done(times), self._tail.blocks)
            return moved / -len(start)
        descent = descend(self._matrix, self.loss, self._y, start, times)
        self.residual_, self.status_, self.advice_ = descent.residual, descent.status, descent.advice
        return descent.dual.reshape(len(times), len(start), -1)

    # ------------------------------------------------------------------ times and shapes

    def _times(self, t: ArrayLike | Tensor) -> tuple[Tensor, bool]:
        """The times, [T], on the machine's device, and whether it was a single number."""
        return as_times(t, self._lr is not None, self.loss is not None, self._fitted().device)

    def _fitted(self) -> Tensor:
        if self._start is None:
            raise unfitted(self)
        return self._start

    def _quadratic(self, name: str) -> None:
        if self.loss is not None:
            raise refusal(name, got="a flow with loss=", expected="the quadratic cost", fix="Leave out loss=.")

    def _columns(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1)

    def _shaped(self, values: Tensor, single: bool, like: Any) -> Any:
        """[T, m, C] as the user asked: without C for [n] targets, without T for one time."""
        values = values[:, :, 0] if self._fitted().ndim == 1 else values
        return same_kind(values[0] if single else values, like)
