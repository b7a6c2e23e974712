"""The hard-margin support vector machine without bias, on a kernel matrix, with a certificate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_number
from ntkit.gram.arrays import BLOCK, AnyMatrix, Matrix, as_array, as_tensor, same_kind
from ntkit.gram.gram_matrix import Gram
from ntkit.kernels.kernel import KernelOperator
from ntkit.machines.machine_input import Machine, as_targets, check_length, test_product, training_gram, unfitted
from ntkit.machines.working_set import DualSolution, solve_duals


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
        symmetric part), the primal P being that of w rescaled to smallest functional margin 1. The margins count less
        the rounding of their sums: at 2e-5 of the feature norm and less that alone is a gap of 1e-6. The worst class.
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
    (Bertsekas 1982) by Cholesky on a working set, the support and the most violating points; then the margins of all
    points from the rows of the support, in float64; until the gap over all points closes. One-vs-rest problems share
    these rows. Memory: float64 matrices of the size of the working set (up to one and a quarter times the largest
    support), one per class and two; K itself is not copied. If K is asymmetric by rounding: also rows in
    use, up to n^2 bytes.

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

    @own_context()  # its many small operations in one thread each; problems are shared out among workers
    def fit(
        self, K: Gram | Matrix | KernelOperator, y: Any, *, start: HardMarginSVM | Matrix | None = None
    ) -> HardMarginSVM:
        """Fit on K, [n, n] symmetric, or ``kernel.operator(x)``, and labels y, [n] with at least two distinct values.

        `start` is where to start from: a machine fitted on as many points and classes (on the kernel of an earlier
        step of training, say), or dual variables as in `alpha_`. The answer is as exact without, and found later.

        Raises
        ------
        Refused
            When K is not square, symmetric and finite with a non-negative diagonal whose mean is above 1e-290 and below
            1e290, or y or `start` does not fit it.
        """
        gram = training_gram(K)
        labels, codes = _classes(y, len(gram))
        scale = _scale(gram)
        positives = [1] if len(labels) == 2 else range(len(labels))
        signs = [torch.from_numpy(np.where(codes == c, 1.0, -1.0)).to(gram.device) for c in positives]
        solutions = solve_duals(gram, signs, scale, self._tol, _start(start, len(gram), len(signs), gram.device))

        alpha = torch.stack([one.alpha for one in solutions], dim=1)
        margin = torch.stack([one.margin for one in solutions])
        supports = [same_kind(torch.nonzero(one.alpha).ravel(), gram) for one in solutions]
        self._weights = alpha * torch.stack(signs, dim=1)
        binary = len(solutions) == 1
        self.alpha_ = same_kind(alpha[:, 0] if binary else alpha, gram)
        self.margin_ = margin.item() if binary else same_kind(margin, gram)
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
        values = test_product(K_test, self._weights)
        return values[:, 0] if values.shape[1] == 1 else values


def _scale(K: Gram) -> float:
    """What K is multiplied by to have unit mean diagonal."""
    mean = K.diagonal().mean().item()
    if mean == 0:
        raise refusal("K", got="a zero diagonal", expected="K[i, i] > 0", fix="Check the features: all are zero.")
    if not 1e-290 < mean < 1e290:  # dual variables may be 1e16 times 1 / mean, which float64 must hold
        fix = "Multiply K by a number: that changes no prediction."
        raise refusal("K", got=f"a mean diagonal of {mean:g}", expected="between 1e-290 and 1e290", fix=fix)
    return 1.0 / mean


def _start(start: Any, n: int, problems: int, device: torch.device) -> Tensor | None:
    """Dual variables to start from, [n, problems]."""
    if start is None:
        return None
    if isinstance(start, HardMarginSVM):
        if start._weights is None:
            raise unfitted(start)
        start = start.alpha_
    shape = [n] if problems == 1 else [n, problems]
    fix = "Pass a machine fitted on as many points and classes, or its alpha_."
    alpha = as_targets(start, "start", n, fix, shape).to(device)
    if alpha.min() < 0:
        got = f"a negative value, {alpha.min().item():g}"
        raise refusal("start", got=got, expected="dual variables >= 0", fix=fix)
    if not alpha.reshape(n, problems).any(0).all():
        raise refusal("start", got="zeros", expected="dual variables, some > 0 per class", fix=fix)
    return alpha.reshape(n, problems)


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


def _advice(solution: DualSolution, K: Gram, y: Tensor, tol: float) -> str:
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
    diagonal, precision = K.diagonal(), max(1e-12, 32 * K.precision)
    negative = torch.nonzero(y < 0).ravel()
    norms = diagonal[negative].sort().values
    positive = torch.nonzero(y > 0).ravel()
    low, high = (diagonal[positive] * (1 + side * precision) for side in (-1, 1))
    # rows are read only of points whose norm some point of the other class has
    positive = positive[torch.searchsorted(norms, low) < torch.searchsorted(norms, high, right=True)]
    pairs: list[tuple[int, int]] = []
    for part in positive.split(max(1, BLOCK // len(K))):
        own = diagonal[part, None]
        same = ((K.rows(part)[:, negative] - own).abs() <= precision * own) & (
            (diagonal[negative] - own).abs() <= precision * own
        )
        for k in torch.nonzero(same.any(dim=1)).ravel().tolist():
            i, j = int(part[k]), int(negative[same[k].nonzero()[0]])
            pairs.append((min(i, j), max(i, j)))
            if len(pairs) == most:
                return pairs
    return pairs
