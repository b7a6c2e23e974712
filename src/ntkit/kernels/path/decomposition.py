"""A prediction as a sum of contributions of training examples, with the residual that certifies it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.base.notebook_figures import bars
from ntkit.base.numbers import as_integer, integers_of
from ntkit.base.shown import Shown


class Top(NamedTuple):
    """Training examples and their contributions, the largest first: [m, k] each."""

    examples: Tensor
    values: Tensor


class StepShare(NamedTuple):
    """Contributions of one optimization step: the examples of its batch (int64 [B]), and values [m, C, B]."""

    step: int
    rows: Tensor
    values: Tensor


@dataclass(eq=False, repr=False)
class PathDecomposition(Shown):
    """f_S(x) = initial + sum_i contributions_i + regularization, up to the residual: per test point and output.

    The result of `ntkit.PathKernel.decompose`, for m test points, C outputs and n training examples; all tensors are in
    float64, on the CPU.

    Attributes
    ----------
    contributions : [m, C, n]; what training example i added to the output, over all steps that used it.
    initial : [m, C], the network's outputs before training.
    regularization : [m, C], what weight decay added.
    prediction : [m, C], the trained network's outputs, computed by the network itself.
    residual : [m, C], initial + sum of contributions + regularization - prediction: the certificate.
    layers : parameter name -> its share of the contributions, [m, C, n]; their sum is `contributions`. None by default.
    steps : one `StepShare` per optimization step, in order. None by default.
    integration : the rule by which the test side was integrated over each step.
    bitwise : whether the replayed run had the recorded bits.
    """

    contributions: Tensor
    initial: Tensor
    regularization: Tensor
    prediction: Tensor
    residual: Tensor
    layers: dict[str, Tensor] | None = None
    steps: list[StepShare] | None = field(default=None, repr=False)
    integration: str = "secant"
    bitwise: bool = True

    @property
    def error(self) -> float:
        """Largest residual relative to the largest output: the one number of the certificate."""
        scale = torch.maximum(self.prediction.abs().max(), self.initial.abs().max())
        return float(self.residual.abs().max() / scale) if scale > 0 else float(self.residual.abs().max())

    def top(self, k: int, *, output: int | Tensor | None = None, against: bool = False) -> Top:
        """Training examples with the largest positive contribution to an output, or the largest negative one.

        Parameters
        ----------
        k : number of examples.
        output : which output: one for all test points, one per test point (int64 [m]), or None for the largest
            (predicted) output of each.
        against : the most negative contributions instead of the most positive.
        """
        n = self.contributions.shape[2]
        k = as_integer(k, "k", f"1 <= k <= {n} training examples", "Use a smaller k.", least=1, most=n)
        values, examples = self.of(output).topk(k, dim=1, largest=not against)
        return Top(examples, values)

    def of(self, output: int | Tensor | None = None) -> Tensor:
        """Contributions to one output, [m, n]; `output` as in `top`."""
        return self.contributions[torch.arange(len(self.prediction)), self.chosen_outputs(output)]

    def chosen_outputs(self, output: int | Tensor | None = None) -> Tensor:
        """The number of one output for each test point, int64 [m]; `output` as in `top`."""
        m, outputs = self.prediction.shape
        index = self.prediction.argmax(1) if output is None else integers_of(output)
        if index is None or index.shape not in ((), (1,), (m,)):
            got = repr(output)[:80] if index is None else f"{len(index)} outputs"
            expected = f"an integer, or int64 [{m}]"
            raise refusal("output", got=got, expected=expected, fix="Pass one output, or one for each test point.")
        index = index.cpu().expand(m)
        if not bool(((index >= -outputs) & (index < outputs)).all()):
            raise refusal("output", got=output, expected=f"outputs below {outputs}", fix="Outputs are numbered from 0.")
        return index % outputs

    def plot(self, point: int = 0, *, k: int = 10, output: int | None = None) -> Any:
        """The k training examples with the largest contributions to one prediction, by size, as a plotly figure.

        Parameters
        ----------
        point : the test point.
        k : examples.
        output : which output; None for the largest (predicted) one.
        """
        m, n = len(self.prediction), self.contributions.shape[2]
        fix = "Test points are numbered from 0."
        point = as_integer(point, "point", f"0 to {m - 1}", fix, least=0, most=m - 1)
        k = as_integer(k, "k", "a whole number of examples, at least 1", "Use k=10.", least=1)
        own = self.of(output)[point]
        order = own.abs().topk(min(k, n)).indices
        title = f"Contributions to the output of test point {point}"
        names = [f"example {int(i)}" for i in order]
        return bars(title, "contribution", "training example", names, own[order].tolist())

    def by_class(self, labels: Tensor) -> Tensor:
        """Sum of the contributions of each class's examples: [m, C, classes]; labels int64 [n]."""
        labels = torch.as_tensor(labels)
        integers = labels.dtype != torch.bool and not labels.is_floating_point()
        if labels.shape != (self.contributions.shape[2],) or not integers:
            expected = f"one integer per training example, shape ({self.contributions.shape[2]},)"
            fix = "Pass the classes of the training data in its order."
            raise refusal("labels", got=f"shape {tuple(labels.shape)}, {labels.dtype}", expected=expected, fix=fix)
        labels = labels.long().cpu()
        if (lowest := int(labels.min())) < 0:
            fix = "Give the examples without a class one of their own."
            raise refusal("labels", got=f"class {lowest}", expected="classes numbered from 0", fix=fix)
        total = self.contributions.new_zeros(*self.prediction.shape, int(labels.max()) + 1)
        return total.index_add_(2, labels, self.contributions)

    def over_time(self) -> Tensor:
        """Sum of the contributions up to each step: [S, m, C]; needs ``decompose(..., steps=True)``."""
        return self._cumulated([share.values.sum(2) for share in self._steps_or_refusal()])

    def example_over_time(self, example: int) -> Tensor:
        """One training example's contribution up to each step: [S, m, C]; needs ``decompose(..., steps=True)``."""
        n = self.contributions.shape[2]
        fix = "Training examples are numbered from 0."
        example = as_integer(example, "example", f"0 to {n - 1}", fix, least=0, most=n - 1)
        own = [(share.values * (share.rows == example)).sum(2) for share in self._steps_or_refusal()]
        return self._cumulated(own)

    def _cumulated(self, own: list[Tensor]) -> Tensor:
        return torch.stack(own).cumsum(0) if own else self.initial.new_zeros(0, *self.initial.shape)

    def _steps_or_refusal(self) -> list[StepShare]:
        if self.steps is None:
            raise refusal(
                "steps", got="a decomposition without contributions per step", expected="contributions per step",
                fix="Call decompose(x, steps=True).",
            )  # fmt: skip
        return self.steps

    def record(self) -> dict[str, Any]:
        """Numbers for a report, as plain JSON: sizes and the certificate."""
        m, outputs, n = self.contributions.shape
        return {
            "test_points": m,
            "outputs": outputs,
            "training_examples": n,
            "integration": self.integration,
            "bitwise": self.bitwise,
            "error": self.error,
            "largest_residual": float(self.residual.abs().max()),
            "largest_output": float(self.prediction.abs().max()),
        }
