"""The training objective: a loss on rows of a data set, both checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, call_with, checked, count, take
from ntkit.base.checks import refusal
from ntkit.base.tensors import points_hash
from ntkit.data.streamed_samples import with_labels
from ntkit.jacobian.model_outputs import Select, check_select, part_of

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Loss = Callable[[Any, Tensor], Tensor]  # (model(x), y) -> scalar; a model may return anything


class Objective:
    """The loss of a model on the rows of a data set.

    Attributes
    ----------
    x, y, n : inputs (a tensor, a tuple or a dict of tensors), targets, number of examples.
    loss : ``loss(model(x), y)`` -> scalar.
    select : the part of the model's output that the loss takes; None: all of it, or its logits if it has any.
    """

    def __init__(self, data: Any, loss: Loss, select: Select | None = None) -> None:
        check_select(select)
        pair = data if isinstance(data, (tuple, list)) else with_labels(data)
        if len(pair) != 2 or not isinstance((pair := with_labels(*pair))[1], Tensor):
            got, expected = type(data).__name__, "(x, y) tensors, or a dataset of such pairs"
            raise refusal("data", got=got, expected=expected, fix="Pass data=(x, y).")
        x, y = pair
        self.x: Batch = checked(x, "x", infinite=True)
        self.y: Tensor = checked(y, "y")
        self.n, self.loss, self.select = len(y), loss, select
        if count(self.x) != self.n:
            fix = "Give one target per example."
            raise refusal("x", got=f"{count(self.x)} rows", expected=f"{self.n}, as y has", fix=fix)

    def data_hash(self) -> str:
        """Hash of all examples, in their order."""
        return points_hash(self.x, self.y)

    def batch(self, rows: Tensor | slice | None) -> tuple[Batch, Tensor]:
        """Inputs and targets of these rows; None = all."""
        return (self.x, self.y) if rows is None else (take(self.x, rows), self.y[rows])

    def value(self, model: nn.Module, rows: Tensor | slice | None) -> Tensor:
        """Value of the loss on these rows."""
        x, y = self.batch(rows)
        return self.loss(part_of(call_with(model, x), self.select), y)

    def mean(self, model: nn.Module, batch_size: int) -> float:
        """Mean loss over all rows, in eval mode and in batches; the model is in train mode afterwards."""
        total = 0.0
        model.eval()
        with torch.no_grad():
            for start in range(0, self.n, batch_size):
                rows = slice(start, min(start + batch_size, self.n))
                total += float(self.value(model, rows)) * (rows.stop - rows.start)
        model.train()
        return total / self.n

    def check(self, model: nn.Module, rows: int) -> None:
        """Evaluate the loss once, in eval mode, so that a wrong one is refused before anything is written."""
        model.eval()
        out = self.value(model, slice(0, rows))
        model.train()
        if not isinstance(out, Tensor) or out.ndim != 0:
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise refusal("loss", got=got, expected="a scalar tensor", fix="Return the mean over the batch.")
        if not out.requires_grad:
            expected = "a differentiable function of model(x)"
            fix = "Do not detach, round or argmax the outputs, and do not use torch.no_grad in the model."
            raise refusal("loss", got="a value that does not depend on the parameters", expected=expected, fix=fix)


def loss_name(loss: Loss) -> str:
    """Name of a loss in run.json."""
    return getattr(loss, "__qualname__", type(loss).__qualname__)
