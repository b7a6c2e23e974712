"""Importance by projection: a kernel machine fitted to the network's outputs, and its coefficients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ntkit.base.caller_context import own_context
from ntkit.base.checks import nearest, refusal
from ntkit.base.numbers import as_number
from ntkit.explanations.importances import Importance
from ntkit.gram.arrays import Matrix
from ntkit.gram.gram_matrix import Gram, as_gram
from ntkit.kernels.output_loss import OutputLoss
from ntkit.machines.machine_input import as_targets, solve

_STEPS, _HALVINGS = 100, 40
_NEAR = 1e-8  # relative residual below which a step that does not halve it is the last
_DENSE = 2000  # unknowns whose Newton system is factorized; above, conjugate gradients, faster from 1,000 on
_CHECKED = 6000  # rows of K whose eigenvalues are checked; above, the solver notices a negative one that it meets
_PRODUCTS, _ACCURACY = 20_000, 1e-13  # of conjugate gradients, for a step
_EPS = torch.finfo(torch.float64).eps

SurrogateLoss = Literal["cross-entropy", "squared"] | Callable[[Tensor, Tensor], Tensor]


@own_context()
def surrogate_importance(
    K: Gram | Matrix, f: Matrix, *, loss: SurrogateLoss = "cross-entropy", l2: float = 1e-3
) -> Importance:
    r"""Alpha of the kernel machine nearest to a network, alpha_i = - (1 / (n l2)) dL(g(x_i), f(x_i)) / dg(x_i).

    .. math:: g = \arg\min_{g \in H} \tfrac1n \sum_i L(g(x_i), f(x_i)) + \tfrac{l2}{2} \|g\|_H^2
        = \sum_i \alpha_i K(x_i, \cdot)

    Parameters
    ----------
    K : k(x_train), [n, n] (then each of the C outputs has it) or [n, n, C, C], or a Gram of one of them; positive
        semidefinite.
    f : the network's outputs on the training set, [n] or [n, C].
    loss : L. "cross-entropy": of softmax(g) against softmax(f). "squared": |g - f|^2 / 2, in closed form. Or a callable
        ``loss(g, f)`` -> the mean over examples (or the sum) of a convex loss, twice differentiable, for g [n, C].
    l2 : weight of the norm, > 0.

    Returns
    -------
    Importance
        values [n, C]. Its certificate: ``kkt_residual``, |alpha + (1 / (n l2)) dL/dg| / |alpha| at the solution; the
        ``largest_gap`` between g and f; ``newton_steps``.

    Raises
    ------
    Refused
        When K is not symmetric and positive semidefinite, f does not fit it, or the loss is not convex there.

    Notes
    -----
    Tsai, Yeh, Ravikumar 2023 (surrogate derivative); with a last-layer kernel the representer points of
    Yeh et al. 2018. Newton's method in float64: the system of a step is n C x n C, factorized up to 2,000 unknowns,
    solved by conjugate gradients above.

    Examples
    --------
    >>> K, f = torch.eye(2), torch.tensor([4.0, 2.0])
    >>> surrogate_importance(K, f, loss="squared", l2=0.5).values.ravel()
    tensor([2.0000, 1.0000], dtype=torch.float64)
    """
    if not callable(loss) and loss not in ("cross-entropy", "squared"):
        fix = nearest(str(loss)[:80], ("cross-entropy", "squared"))
        raise refusal("loss", got=repr(loss)[:80], expected='"cross-entropy", "squared" or a callable', fix=fix)
    weight = as_number(l2, "l2", lambda v: 0 < v < float("inf"), "a finite number > 0", "It weighs the norm of g.")
    gram = as_gram(K)
    n = len(gram) // gram.outputs
    target = as_targets(f, "f", n, "Pass the outputs on the training set.").to(gram.device).reshape(n, -1)
    if gram.outputs not in (1, target.shape[1]):
        fix = "Use the kernel of these outputs, or one value per pair."
        raise refusal("f", got=f"{target.shape[1]} outputs", expected=f"{gram.outputs}, as K has", fix=fix)
    _check_semidefinite(gram)
    problem = _Problem(gram, target, loss, weight)
    alpha, steps = problem.closed_form() if loss == "squared" else problem.solution()
    g = problem.fitted(alpha)
    residual = float(problem.residual(alpha, g).norm()) / (float(alpha.norm()) or 1.0)
    gap = float((g - target).abs().max())
    certificate = {"kkt_residual": residual, "largest_gap": gap, "newton_steps": float(steps), "l2": weight}
    return Importance(alpha.cpu(), "surrogate", certificate)


def _check_semidefinite(gram: Gram) -> None:
    """Refuse a matrix with an eigenvalue below rounding."""
    if len(gram) > _CHECKED:
        return
    allowed = 100 * len(gram) * gram.precision * gram.largest
    matrix = gram.dense()
    matrix.diagonal().add_(allowed)
    if torch.linalg.cholesky_ex(matrix).info:
        lowest = float(torch.linalg.eigvalsh(gram.dense())[0])
        if lowest < -allowed:
            raise _indefinite(f"an eigenvalue of {lowest:.3g}, with entries up to {gram.largest:.3g}")


def _indefinite(got: str) -> Exception:
    fix = "Check that K is k(x_train), not a distance, centered or cross matrix."
    return refusal("K", got=got, expected="a positive semidefinite matrix", fix=fix)


class _Problem:
    """Find alpha = - (1 / l2) d mean loss / d g at g = K alpha; all of it [n, C]."""

    def __init__(self, gram: Gram, target: Tensor, loss: Any, l2: float) -> None:
        self.gram, self.target, self.loss, self.l2 = gram, target, loss, l2
        self.n, self.C = target.shape
        self.dense = gram.dense() if len(gram) <= _DENSE and target.numel() <= _DENSE else None
        self.log_target, self.probability = target.log_softmax(1), target.softmax(1)

    def fitted(self, alpha: Tensor) -> Tensor:
        """K alpha."""
        if self.gram.outputs == 1:
            return self.gram @ alpha
        return (self.gram @ alpha.reshape(-1)).view(self.n, self.C)

    def value(self, g: Tensor) -> float:
        """Mean loss."""
        if self.loss == "cross-entropy":
            gap = self.log_target - g.log_softmax(1)  # less the entropy of the target: small numbers cancel less
            return float((self.probability * gap).sum() / self.n)
        value = float(self.loss(g.clone(), self.target))
        return value if self._own(g).of_mean else value / self.n

    def slope(self, g: Tensor) -> Tensor:
        """Slope of each example's own loss, [n, C]."""
        if self.loss == "cross-entropy":
            return g.softmax(1) - self.probability
        return g - self.target if self.loss == "squared" else self._own(g).slopes

    def curvature(self, g: Tensor) -> Tensor:
        """Second derivative of each example's own loss, [n, C, C]."""
        if self.loss == "cross-entropy":
            p = g.softmax(1)
            return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return self._own(g).curvature()

    def _own(self, g: Tensor) -> OutputLoss:
        return OutputLoss(self.loss, g, self.target)

    def residual(self, alpha: Tensor, g: Tensor) -> Tensor:
        """What must vanish: alpha + slope / (n l2)."""
        return alpha + self.slope(g) / (self.n * self.l2)

    def closed_form(self) -> tuple[Tensor, int]:
        """(K + n l2 I) alpha = f, for the squared loss."""
        columns = self.target if self.gram.outputs == 1 else self.target.reshape(-1, 1)
        solution = solve(self.gram, self.n * self.l2, columns, "l2 (times n)")
        if solution.status != "solved":
            fix = solution.advice
            raise refusal("l2", got=f"{self.l2:g}", expected="a well-posed problem", fix=fix)
        return solution.alpha.view(self.n, self.C), 0

    def solution(self) -> tuple[Tensor, int]:
        """Newton's method with halved steps, from alpha = 0, until rounding stops it."""
        alpha = best = torch.zeros_like(self.target)
        g = torch.zeros_like(self.target)
        residual = self.residual(alpha, g)
        lowest = size = float(residual.norm())
        for step in range(_STEPS):
            change = self._newton(g, residual)
            image, start, length = self.fitted(change), self._objective(alpha, g), 1.0
            for _ in range(_HALVINGS):
                trial, there = alpha + length * change, g + length * image
                near = float(self.residual(trial, there).norm()) <= 0.9 * size
                if near or self._objective(trial, there) < start:
                    break
                length /= 2
            else:
                return best, step
            alpha, g = trial, self.fitted(trial)
            residual = self.residual(alpha, g)
            size = float(residual.norm())
            done = lowest <= _NEAR * float(best.norm()) and size > lowest / 2  # rounding, no progress
            if size < lowest:
                best, lowest = alpha, size
            if done or size == 0:
                return best, step + 1
        return best, _STEPS

    def _objective(self, alpha: Tensor, g: Tensor) -> float:
        return self.value(g) + self.l2 / 2 * float((alpha * g).sum())

    def _newton(self, g: Tensor, residual: Tensor) -> Tensor:
        """Solve (I + H K / (n l2)) change = - residual; with H = R R^T by the symmetric n l2 I + R^T K R."""
        values, vectors = torch.linalg.eigh(self.curvature(g))
        if float(values.min()) < -1e-8 * max(float(values.abs().max()), _EPS):
            got, fix = f"a second derivative of {float(values.min()):.3g} by g", "Use a convex loss."
            raise refusal("loss", got=got, expected="a loss that is convex in g", fix=fix)
        root = vectors * values.clamp(min=0).sqrt()[:, None, :]
        shift = self.n * self.l2

        def turned(v: Tensor) -> Tensor:  # R^T v
            return (root.transpose(1, 2) @ v[..., None])[..., 0]

        image = turned(self.fitted(-residual))
        if self.dense is not None:
            inner = self._factorized(root, shift, image)
        else:
            inner = self._by_products(lambda v: turned(self.fitted((root @ v[..., None])[..., 0])), shift, image)
        return -residual - (root @ inner[..., None])[..., 0]

    def _factorized(self, root: Tensor, shift: float, image: Tensor) -> Tensor:
        assert self.dense is not None
        n, C = self.n, self.C
        if self.gram.outputs == 1:
            half = torch.einsum("ij,jce->icje", self.dense, root)
        else:
            half = self.dense.view(n, C, n, C).permute(2, 0, 1, 3).reshape(n, n * C, C) @ root
            half = half.view(n, n, C, C).permute(1, 2, 0, 3)
        matrix = (root.transpose(1, 2) @ half.reshape(n, C, n * C)).view(n * C, n * C)
        matrix = (matrix + matrix.T) / 2
        matrix.diagonal().add_(shift)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            raise _indefinite("a matrix whose Newton system has no Cholesky factor")
        return torch.cholesky_solve(image.reshape(-1, 1), lower).view(n, C)

    def _by_products(self, product: Callable[[Tensor], Tensor], shift: float, image: Tensor) -> Tensor:
        """Conjugate gradients for (product + shift) inner = image.

        To a residual near rounding from the first step on: K multiplies an error of `inner` by its eigenvalues.
        """
        inner, rest = torch.zeros_like(image), image.clone()
        direction, size = rest.clone(), float(rest.square().sum())
        allowed = size * _ACCURACY**2
        for _ in range(_PRODUCTS):
            if size <= allowed:
                break
            moved = product(direction)
            along, own = float((direction * moved).sum()), float(direction.square().sum())
            if along < -100 * len(self.gram) * self.gram.precision * self.gram.largest * own:
                raise _indefinite(f"a direction of negative curvature, {along / own:.3g}")
            length = size / (along + shift * own)
            inner, rest = inner + length * direction, rest - length * (moved + shift * direction)
            before, size = size, float(rest.square().sum())
            direction = rest + (size / before) * direction
        return inner
