"""Scalars of a network's outputs that are explained: margin, loss, logit, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, has_infinity, outputs_of
from ntkit.base.checks import nearest, refusal
from ntkit.jacobian.model_calls import required_arguments
from ntkit.jacobian.model_outputs import check_finite_outputs
from ntkit.trajectory.objective import Loss
from ntkit.trajectory.reruns import plain_attention

MEASURES = ("margin", "loss", "logit")
Measure = Literal["margin", "loss", "logit"] | Callable[..., Tensor]


class OutputMeasure:
    """One scalar per test point, from the network's outputs for it.

    Parameters
    ----------
    measure : see `ntkit.influence`.
    loss : the loss of the run.
    x, y : test points and their targets.
    model : the trained network, whose predicted classes stand in for absent targets.

    Attributes
    ----------
    name : the measure in words.
    targets : targets or classes of the test points, if any.
    """

    def __init__(self, measure: Measure, loss: Loss, x: Batch, y: Tensor | None, model: nn.Module) -> None:
        if not callable(measure) and measure not in MEASURES:
            fix = nearest(str(measure), MEASURES)
            raise refusal("measure", got=repr(measure), expected="a measure's name or a callable", fix=fix)
        self._measure, self._loss, self._m = measure, loss, count(x)
        if y is not None and (not isinstance(y, Tensor) or y.dim() == 0 or len(y) != self._m):
            got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise refusal(
                "y_test", got=got, expected=f"one target per test point, {self._m}", fix="Pass a tensor [m, ...]."
            )
        with torch.no_grad():
            outputs = outputs_of(model, x)
        if isinstance(outputs, Tensor) and has_infinity(x):
            check_finite_outputs(model, outputs)
        self.targets, self.name = y, measure if isinstance(measure, str) else getattr(measure, "__name__", "measure")
        if measure == "loss":
            if y is None:
                raise refusal(
                    "y_test", got="None", expected="targets for the loss", fix="Pass y_test, or another measure."
                )
        elif callable(measure):
            if (required_arguments(measure) > 1) != (y is not None):
                got = "targets" if y is not None else "none"
                expected = "targets if, and only if, the measure takes two arguments"
                raise refusal("y_test", got=got, expected=expected, fix="measure(outputs) or measure(outputs, y).")
        else:
            self.targets = self._classes(measure, outputs, y)
        self.values(outputs)

    def _classes(self, measure: str, outputs: Any, y: Tensor | None) -> Tensor:
        """Class of each test point, int64 [m]: as given, or predicted."""
        if not isinstance(outputs, Tensor) or outputs.dim() > 2 or (measure == "margin" and outputs[0].numel() < 2):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            least = "two classes or more, [m, C]" if measure == "margin" else "outputs [m, C]"
            fix = 'Use measure="logit" for a single output, or a callable that picks a scalar.'
            raise refusal(f'outputs for measure="{measure}"', got=got, expected=least, fix=fix)
        classes = outputs[0].numel()
        if classes == 1:
            return torch.zeros(self._m, dtype=torch.int64, device=outputs.device)
        if y is None:
            return outputs.argmax(1)
        if y.is_floating_point() or y.dim() != 1 or not bool(((y >= 0) & (y < classes)).all()):
            expected = f"classes from 0 to {classes - 1}, int64 [{self._m}]"
            fix = 'For targets that are no classes use measure="loss" or a callable.'
            raise refusal("y_test", got=f"{y.dtype} {tuple(y.shape)}", expected=expected, fix=fix)
        return y.to(outputs.device)

    @torch.no_grad()
    def of_network(self, model: nn.Module, x: Batch) -> Tensor:
        """Measures of all test points by a network, [m] in float64, on the CPU."""
        with plain_attention():
            return self.values(outputs_of(model, x)).double().cpu()

    def values(self, outputs: Any) -> Tensor:
        """Measures of all test points, [m]."""
        return torch.stack([self.value(_row(outputs, j), j) for j in range(self._m)])

    def value(self, outputs: Any, j: int) -> Tensor:
        """Measure of test point j, a scalar, from the outputs of a batch with that point alone."""
        y = None if self.targets is None else self.targets[j : j + 1]
        if self._measure == "loss":
            return self._loss(outputs, y)  # pyrefly: ignore
        if callable(self._measure):
            found = self._measure(outputs) if y is None else self._measure(outputs, y)
            if not isinstance(found, Tensor) or tuple(found.shape) != (1,):
                got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                fix = "It is called on the outputs of a batch; reduce every axis but the first."
                raise refusal("measure", got=got, expected="one scalar per sample", fix=fix)
            return found[0]
        row, c = outputs.reshape(-1), int(y[0])  # pyrefly: ignore
        if self._measure == "logit":
            return row[c]
        return row[c] - torch.logsumexp(torch.cat([row[:c], row[c + 1 :]]), 0)


def _row(outputs: Any, j: int) -> Any:
    if isinstance(outputs, Tensor):
        return outputs[j : j + 1]
    if isinstance(outputs, dict):
        return type(outputs)({name: _row(value, j) for name, value in outputs.items()})
    return type(outputs)(_row(value, j) for value in outputs)
