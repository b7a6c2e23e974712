"""The hard-margin support vector machine without bias, on a kernel matrix, with a certificate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.base.numbers import as_number
from ntkit.gram.arrays import AnyMatrix, Matrix, as_array, as_tensor, float64_product, same_kind
from ntkit.gram.gram_matrix import Gram
from ntkit.machines.machine_input import Machine, as_test_matrix, check_length, training_gram, unfitted

_EPS = torch.finfo(torch.float64).eps
_BLOCK = 128  # new points per step, or a quarter of the support where that is more
_MAX_STEPS = 2000
_PATIENCE = 100  # steps without a smaller gap or a larger dual objective
_DAMPING, _MOST_DAMPING = 1e3 * _EPS, 1e-6  # relative to the trace of the system solved
_ARC = 26  # trial steps 1, 1/4, 1/16, ... down to the rounding


class HardMarginSVM(Machine):
    r"""Hard-margin SVM without bias: the separator of largest margin in the feature space of a kernel.

    Solves, in float64, the dual

    .. math:: \max_{a \ge 0} \sum_i a_i - \tfrac12 (a y)^\top K (a y)

    with the separator w = sum_i a_i y_i phi(x_i) with y_i <w, phi(x_i)> >= 1. More than two labels are solved
    one against the rest. Multiplying K by a positive number changes no prediction.

    Parameters
    ----------
    tol : relative duality gap at which the answer counts as optimal.

    Attributes
    ----------
    alpha_ : [n], or [n, C] one-vs-rest. The dual variables, >= 0, scaled so that sum(a) = (a y)^T K (a y). Where the
        data are not separable: a unit-sum combination under which the signed features cancel.
    margin_ : 1 / sqrt((a y)^T K (a y)), in units of the feature norm; [C] one-vs-rest; 0 where not separable.
        No separator has a larger margin; this one attains ``margin_ * sqrt(1 - gap_)``.
    gap_ : relative duality gap (P - D) / P over all points with K as given (if K is asymmetric by rounding: its
        symmetric part), the primal P being that of w rescaled to smallest functional margin 1. The worst class.
    kkt_ : largest violation of y_i <w, phi_i> >= 1 and of a_i (y_i <w, phi_i> - 1) = 0, a relative to its largest.
    support_ : indices with alpha > 0; one-vs-rest: a list, one per class.
    status_ : "optimal" (gap_ <= tol) | "not separable" (to the precision of K) | "inaccurate". The worst class.
    advice_ : what to do when the status is not "optimal", else "".
    iterations_ : Newton steps taken, all classes together.
    classes_ : the distinct labels, sorted. A positive binary decision means ``classes_[1]``.

    Raises
    ------
    Refused
        When `tol` is not between 0 and 1.

    Notes
    -----
    The problem of Long (2021), "Properties of the After Kernel", section 2 (there solved by gradient methods under a
    time limit). ``sklearn.svm.SVC`` has a bias and so solves another problem. Method: projected Newton steps
    (Bertsekas 1982) on the support and the most violating points, by Cholesky, until the gap closes. Memory: two
    float64 matrices of the size of the support and a quarter of it; K itself is not copied.

    For a kernel with negative eigenvalues (rounding) a closed gap certifies the optimality conditions for K as it is.

    Examples
    --------
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> svm = HardMarginSVM().fit(x @ x.T, torch.tensor([1, 1, 0]))
    >>> svm.status_, round(svm.margin_, 6), svm.predict(x @ x.T).tolist()
    ('optimal', 0.707107, [1, 1, 0])
    """

    alpha_: Matrix
    margin_: float | Matrix
    gap_: float
    kkt_: float
    support_: Any
    iterations_: int
    classes_: Matrix

    def __init__(self, tol: float = 1e-6):
        expected = "a number between 0 and 1"
        self._tol = as_number(tol, "tol", lambda t: 0 < t < 1, expected, "The default is 1e-6.")
        self.tol = tol
        self._weights: Tensor | None = None

    def fit(self, K: Gram | Matrix, y: Any) -> HardMarginSVM:
        """Fit on K, [n, n] symmetric, and labels y, [n] with at least two distinct values.

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal, or y does not fit it.
        """
        gram = training_gram(K)
        labels, codes = _classes(y, len(gram))
        diagonal = gram.diagonal()
        scale = 1.0 / diagonal.mean().item() if diagonal.any() else 0.0
        if not 0 < scale < float("inf"):
            raise refusal("K", got="a zero diagonal", expected="K[i, i] > 0", fix="Check the features: all are zero.")
        positives = [1] if len(labels) == 2 else range(len(labels))
        signs = [torch.from_numpy(np.where(codes == c, 1.0, -1.0)).to(gram.device) for c in positives]
        solutions = [_solve(gram, sign, scale, self._tol) for sign in signs]

        alpha = torch.stack([one.alpha for one in solutions], dim=1)
        margin = torch.stack([one.margin for one in solutions])
        supports = [same_kind(torch.nonzero(one.alpha).ravel(), K) for one in solutions]
        self._weights = alpha * torch.stack(signs, dim=1)
        binary = len(solutions) == 1
        self.alpha_ = same_kind(alpha[:, 0] if binary else alpha, K)
        self.margin_ = margin.item() if binary else same_kind(margin, K)
        self.support_ = supports[0] if binary else supports
        self.gap_ = max(one.gap for one in solutions)
        self.kkt_ = max(one.kkt for one in solutions)
        self.iterations_ = sum(one.steps for one in solutions)
        severity = {"optimal": 0, "inaccurate": 1, "not separable": 2}
        worst = max(range(len(solutions)), key=lambda c: severity[solutions[c].status])
        self.status_ = solutions[worst].status
        self.advice_ = _advice(solutions[worst], gram, signs[worst], self._tol)
        if self.advice_ and not binary:
            self.advice_ = f"Class {labels[worst]} against the rest. {self.advice_}"
        self.classes_ = torch.from_numpy(labels).to(y.device) if isinstance(y, Tensor) else labels
        return self

    def decision_function(self, K_test: AnyMatrix) -> AnyMatrix:
        """Return <w, phi(x)> of test points, [m] or one-vs-rest [m, C], from K_test = k(x_test, x_train), [m, n].

        Raises
        ------
        Refused
            Before fit; when K_test is not a finite [m, n].
        """
        return same_kind(self._decide(K_test), K_test)

    def predict(self, K_test: Gram | Matrix) -> Matrix:
        """Return the labels of test points, [m], of the kind given to fit, from K_test = k(x_test, x_train), [m, n].

        Raises
        ------
        Refused
            As `decision_function`.
        """
        values = self._decide(K_test)
        index = (values > 0).long() if values.ndim == 1 else values.argmax(dim=1)
        labels = self.classes_
        return labels[index.to(labels.device)] if isinstance(labels, Tensor) else labels[index.cpu().numpy()]

    def _decide(self, K_test: Gram | Matrix) -> Tensor:
        if self._weights is None:
            raise unfitted(self)
        values = float64_product(as_test_matrix(K_test, len(self._weights), self._weights), self._weights)
        return values[:, 0] if values.shape[1] == 1 else values


@dataclass
class _Solution:
    alpha: Tensor
    margin: Tensor
    gap: float
    kkt: float
    status: str
    steps: int
    energy: float  # a^T Q a / (sum a)^2, K at unit mean diagonal: the square of a bound on the relative margin


def _classes(y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct labels, sorted, and each point's place among them; as scikit-learn, no numbers with fractions."""
    fix = "Pass integers, booleans or strings."
    values = as_tensor(y, "y").cpu() if isinstance(y, Tensor) else as_array(y, "y", "class labels", fix)
    if isinstance(values, Tensor):
        values = (values.double() if values.dtype.itemsize < 4 and values.is_floating_point() else values).numpy()
    if values.ndim != 1:
        raise refusal("y", got=f"shape {list(values.shape)}", expected="[n] labels", fix="Pass one label per point.")
    check_length(values, n)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise refusal("y", got=f"{values[bad]} at index {bad}", expected="labels", fix="Drop the unlabelled points.")
    if values.dtype.kind == "f" and (values != np.floor(values)).any():
        bad = int(np.flatnonzero(values != np.floor(values))[0])
        fix = "Fit them with KernelRidge, or round them to classes."
        raise refusal("y", got=f"continuous values ({values[bad]:g} at index {bad})", expected="class labels", fix=fix)
    if values.dtype.kind not in "fiubUST" and not _of_strings(values):
        raise refusal("y", got=f"{values.dtype} values", expected="class labels", fix=fix)
    labels, codes = np.unique(values, return_inverse=True)
    if len(labels) < 2:
        raise refusal("y", got=f"one class, {labels[0]}", expected="two or more", fix="Add points of another class.")
    return labels, codes


def _of_strings(values: np.ndarray) -> bool:
    return values.dtype.kind == "O" and all(isinstance(v, str) for v in values)


def _solve(K: Gram, y: Tensor, scale: float, tol: float) -> _Solution:
    """Minimize 1/2 a^T Q a - sum a over a >= 0, Q = scale * y y^T * K; see `HardMarginSVM`.

    Each step solves for the exact minimizer on the free points (the support and a block of the most violating ones),
    ignoring signs, and goes towards it along the projection onto a >= 0 as far as is best. The gradient is computed
    afresh from K at every step, so the damping of the factorization only affects speed: it is its own refinement.
    K is read by rows of the support and of each block; float32 entries become float64 as they are read.
    """
    n = len(y)

    def product(v: Tensor) -> Tensor:
        return (scale * y) * (K @ (y * v))

    # Below this, a^T Q a cannot be told from 0: rounding of the products, and of the entries of K themselves.
    floor = 2 * _EPS * n + K.precision * n**0.5
    target = 1e-3 * tol  # one or two steps beyond tol settle the support itself, not only the objective
    a, gradient = torch.zeros_like(y), -torch.ones_like(y)
    factor, status, steps, stalled = _Factor(K, y, scale), "inaccurate", 0, 0
    best, best_gap, best_dual = a, float("inf"), 0.0
    most, mean = _BLOCK, product(torch.ones_like(y))
    block = mean.topk(min(most, n), largest=False).indices  # the first block: hardest for the class means
    while steps < _MAX_STEPS and stalled < _PATIENCE:
        step = factor.step(a, gradient, block)
        steps += 1
        if step is None:
            if len(block) > 0:
                most = len(block) // 8 or int(len(block) > 1)
            elif factor.damping < _MOST_DAMPING:
                # dependent features: the step was lost in the rounding of a nearly singular solve
                factor.damping, most = 100 * factor.damping, _BLOCK
            else:
                break
        else:
            a = step
            factor.damping = max(_DAMPING, factor.damping / 10)
            margins = product(a)
            energy, size = (a @ margins).item(), (a @ a).item()
            if energy <= floor * size:
                if best_gap >= 1:  # no step gave a separator
                    best, status = a, "not separable" if energy >= -floor * size else "inaccurate"
                break
            total = a.sum().item()
            gap, dual = _gap(total, energy, margins.min().item()), total**2 / energy
            stalled = 0 if gap < 0.9 * best_gap or dual > best_dual * (1 + 1e-6) else stalled + 1
            if gap <= best_gap:
                best, best_gap = a, gap
            best_dual = max(best_dual, dual)
            if gap <= target or (best_gap <= tol and stalled >= 10):
                break
            gradient, most = margins - 1, max(_BLOCK, int((a > 0).sum()) // 4)
        block = _violators(a, gradient, most, target)
    return _certify(best, product, status, scale, tol, steps)


def _gap(total: float, energy: float, smallest: float) -> float:
    """Compute 1 - D/P for the best multiple of a in the dual, and w rescaled to margin 1 in the primal."""
    return 1.0 if smallest <= 0 else max(0.0, 1.0 - (total * smallest / energy) ** 2)


def _certify(
    a: Tensor, product: Callable[[Tensor], Tensor], status: str, scale: float, tol: float, steps: int
) -> _Solution:
    margins = product(a)
    total, energy = a.sum(), a @ margins
    relative = (energy / total.square()).item()
    if status == "not separable" or energy <= 0:
        # no multiple of a is a dual optimum: report the combination under which the features cancel
        return _Solution(a / total, torch.zeros_like(total), 1.0, float("inf"), status, steps, relative)
    gap = _gap(total.item(), energy.item(), margins.min().item())
    rescale = total / energy
    a, margins = a * rescale, margins * rescale
    violation = torch.maximum((1 - margins).clamp(min=0), (a / a.max()) * (margins - 1).abs()).max()
    status = "optimal" if gap <= tol else status
    a = a * scale
    return _Solution(a, a.sum().rsqrt(), gap, violation.item(), status, steps, relative)


def _violators(a: Tensor, gradient: Tensor, most: int, target: float) -> Tensor:
    """Up to `most` points outside the support, those that violate their margin most."""
    outside = torch.where(a > 0, torch.inf, gradient)
    count = min(most, int((outside < -target / 10).sum()))
    return outside.topk(count, largest=False).indices


class _Factor:
    """The Cholesky factor of Q over the support and a block of new points (in this order), kept while they stay."""

    def __init__(self, K: Gram, y: Tensor, scale: float):
        self.K, self.y, self.scale = K, y, scale
        self.damping = _DAMPING
        self.key = (0.0, torch.empty(0, dtype=torch.long, device=y.device))

    def step(self, a: Tensor, gradient: Tensor, block: Tensor) -> Tensor | None:
        """Return the best point on the projected Newton arc from a, or None where none lowers the objective."""
        support = torch.nonzero(a).ravel()
        free = torch.cat([support, block])
        if self.key[0] != self.damping or not torch.equal(free, self.key[1]):
            self._factorize(free)
        start, slope = a[free, None], gradient[free, None]
        direction = self._direction(slope, len(support))
        reached = start + direction
        if (reached < 0).any():
            lengths = 0.25 ** torch.arange(_ARC, dtype=a.dtype, device=a.device)
            moves = (start + direction * lengths).clamp_(min=0) - start
            # differences, not values, of the objective: no cancellation near the optimum
            change = (slope * moves).sum(0) + 0.5 * (moves * (self.Q @ moves)).sum(0)
            k = int(change.argmin())
            if change[k] >= 0:
                return None
            reached = start + moves[:, k : k + 1]
        new = torch.zeros_like(a)
        new[free] = reached[:, 0].clamp(min=0)
        return new

    def _direction(self, slope: Tensor, old: int) -> Tensor:
        """Solve for the Newton direction, [m, 1], with the new points that would go below zero held at zero.

        A zero that wants to go below zero only bends the path of the others. Holding it takes the Schur complement of
        the new points, which is the trailing block of the factor times its transpose: no new factorization.
        """
        L = self.lower
        u = torch.linalg.solve_triangular(L, -slope, upper=False)
        trailing = L[old:, old:]
        complement, right = trailing @ trailing.T, trailing @ u[old:]
        moves = torch.zeros_like(right)
        moving = torch.arange(len(right), device=L.device)
        while len(moving):
            part = _cholesky(complement[moving[:, None], moving], 4 * _EPS)
            change = torch.cholesky_solve(right[moving], part)
            if (change >= 0).all():
                moves[moving] = change
                break
            moving = moving[change[:, 0] >= 0]
        rest = torch.linalg.solve_triangular(L[:old, :old].T, u[:old] - L[old:, :old].T @ moves, upper=True)
        return torch.cat([rest, moves])

    def _factorize(self, free: Tensor) -> None:
        self.Q = self.lower = torch.empty(0)  # free the memory of the previous ones first
        Q = self.K.tile(free, free)
        Q *= (self.scale * self.y[free])[:, None]
        Q *= self.y[free]
        self.lower, self.Q, self.key = _cholesky(Q, self.damping), Q, (self.damping, free)


def _cholesky(H: Tensor, damping: float) -> Tensor:
    """Factorize H + a multiple of I: damping, relative to the trace, or more where that is not enough for rounding."""
    diagonal = H.diagonal().clone()
    while True:
        H.diagonal().copy_(diagonal + damping * diagonal.sum())
        lower, failed = torch.linalg.cholesky_ex(H)
        H.diagonal().copy_(diagonal)
        if not failed:
            return lower
        damping *= 30


def _advice(solution: _Solution, K: Gram, y: Tensor, tol: float) -> str:
    if solution.status == "optimal":
        return ""
    if solution.status == "inaccurate":
        if solution.energy <= 0:
            reason = "K has negative eigenvalues"
        else:
            bound = solution.energy**0.5
            reason = (
                f"gap {solution.gap:.1e} above tol {tol:.1e}; the margin is at most {bound:.1e} of the feature norm"
            )
        return (
            f"Not solved to tolerance: {reason}. Compute K in float64, or use KernelRidge, which does not need "
            "separable data."
        )
    support = torch.nonzero(solution.alpha).ravel()
    zero = support[K.diagonal()[support] == 0]
    if len(zero):
        return (
            f"Point {int(zero[0])} has a zero feature vector, on no side of any separator. Drop it or use KernelRidge."
        )
    pairs = _contradictions(K, y)
    named = ", ".join(f"{i} and {j}" for i, j in pairs)
    cause = f"Points with the same features and different labels: {named}. " if pairs else ""
    return (
        f"{cause}No separator without bias exists at the precision of K. Correct or drop contradictory points, use a "
        "richer kernel, or use KernelRidge, which does not need separable data."
    )


def _contradictions(K: Gram, y: Tensor, most: int = 3) -> list[tuple[int, int]]:
    """Up to `most` pairs with K_ii = K_jj = K_ij to rounding and different labels, each positive point once."""
    diagonal, pairs = K.diagonal(), []
    for i in torch.nonzero(y > 0).ravel().tolist():
        tolerance = max(1e-12, 32 * K.precision) * diagonal[i]
        same = (
            (y < 0)
            & ((K.rows([i])[0] - diagonal[i]).abs() <= tolerance)
            & ((diagonal - diagonal[i]).abs() <= tolerance)
        )
        if same.any():
            j = int(same.nonzero()[0])
            pairs.append((min(i, j), max(i, j)))
            if len(pairs) == most:
                break
    return pairs
