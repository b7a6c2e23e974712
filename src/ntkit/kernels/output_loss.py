"""A batch's loss as a function of the model's outputs: the slope and the curvature of each example's own loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, has_infinity
from ntkit.base.checks import refusal
from ntkit.jacobian.forwards import each_forward
from ntkit.jacobian.model_calls import call, check_mode, check_module, untouched, unwritten
from ntkit.jacobian.model_outputs import Select, check_finite_outputs, check_select, part_of, real_rows
from ntkit.trajectory.objective import Loss

_BATCH = 128


def model_outputs(model: nn.Module, x: Batch, select: Select | None = None) -> Tensor:
    """The outputs of a model for samples that are already checked, [n, *outputs], without a graph.

    Parameters
    ----------
    select : the part of the output that is wanted; None: all of it, or its logits if it has any.

    Raises
    ------
    Refused
        For a model in train mode where that matters, and outputs that are not one tensor with samples first.
    """
    check_module(model)
    check_select(select)
    check_mode(model)

    def outputs(modules: dict[nn.Module, nn.Module], part: Batch) -> Tensor:
        raw = part_of(call(modules[model], part), select)
        rows = real_rows(raw, count(part)).detach()
        if has_infinity(part):
            check_finite_outputs(model, rows)
        return rows

    with untouched(model, {}), torch.no_grad(), unwritten(model):
        return torch.cat(each_forward(model, x, _BATCH, outputs, select))


class OutputLoss:
    """loss(outputs, y) of a batch as what each example adds to it, as a function of that example's outputs.

    The loss of one example is ``loss(outputs[i : i + 1], y[i : i + 1])``. The batch's loss must be the mean of these,
    or their sum; three examples are computed alone to tell which.

    Parameters
    ----------
    loss : ``loss(outputs, y)`` -> scalar.
    outputs : [n, *outputs].
    y : targets, [n, ...].

    Attributes
    ----------
    n, C : the numbers of examples, and of outputs of each (all axes but the first together).
    slopes : float64 [n, C], d loss_i / d outputs_i.
    of_mean : whether the batch's loss is the mean (else the sum).
    eps : relative rounding of the outputs' precision.

    Raises
    ------
    Refused
        When the loss is not a differentiable scalar, or neither mean nor sum of the examples' own losses.

    Examples
    --------
    >>> outputs, y = torch.tensor([[1.0], [4.0]]), torch.zeros(2, 1)
    >>> one = OutputLoss(torch.nn.functional.mse_loss, outputs, y)
    >>> one.slopes.ravel().tolist(), one.curvature().ravel().tolist()
    ([2.0, 8.0], [2.0, 2.0])
    """

    def __init__(self, loss: Loss, outputs: Tensor, y: Tensor) -> None:
        if not callable(loss):
            fix = "Pass e.g. torch.nn.functional.cross_entropy."
            raise refusal("loss", got=f"a {type(loss).__name__}", expected="a function of outputs and targets", fix=fix)
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(outputs):
            got = f"{len(y)} targets" if isinstance(y, Tensor) and y.ndim else f"a {type(y).__name__}"
            fix = "Give one target per example."
            raise refusal("y", got=got, expected=f"a tensor of {len(outputs)} targets", fix=fix)
        self._loss, self._outputs, self._y = loss, outputs.detach(), y.detach()
        self.n, self.C, self.eps = len(outputs), outputs[0].numel(), torch.finfo(outputs.dtype).eps
        slopes = self._gradient(slice(None))
        self.of_mean = self._is_mean(slopes)
        self._factor = self.n if self.of_mean else 1
        self.slopes = slopes.to(torch.float64) * self._factor

    def curvature(self) -> Tensor:
        """Second derivative of each example's loss by its outputs: float64 [n, C, C], symmetric."""
        blocks = self._second(slice(None)).to(torch.float64) * self._factor
        return (blocks + blocks.transpose(1, 2)) / 2

    def _second(self, rows: slice) -> Tensor:
        """Second derivative of the loss of some examples by the outputs of each: [k, C, C]."""
        with torch.enable_grad():
            out = self._outputs[rows].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self._value(out, rows), out, create_graph=True)
            flat, columns = slope.reshape(len(out), self.C), []
            signs = 1 - 2 * (torch.arange(len(out), device=out.device)[:, None] % 2)  # other examples do not cancel
            for c in range(self.C):
                column = torch.zeros_like(out)
                if flat.requires_grad:
                    again = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
                    (column,) = torch.autograd.grad((flat[:, c : c + 1] * signs).sum(), out, **again)
                columns.append(column.detach().reshape(len(out), self.C) * signs)
        return torch.stack(columns, 2)

    def _value(self, outputs: Tensor, rows: slice) -> Tensor:
        value = self._loss(outputs.clone(), self._y[rows])  # a loss may overwrite what it gets
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad or not bool(torch.isfinite(value)):
            got = f"a {type(value).__name__}"
            if isinstance(value, Tensor):
                got = f"{value.tolist()}" if value.ndim == 0 else f"shape {list(value.shape)}"
                got += "" if value.requires_grad else ", without a gradient"
            fix = "Return the mean over the batch, a differentiable function of the outputs."
            raise refusal("loss", got=got, expected="a finite scalar that depends on the outputs", fix=fix)
        return value

    def _gradient(self, rows: slice) -> Tensor:
        with torch.enable_grad():
            out = self._outputs[rows].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self._value(out, rows), out)
        return slope.reshape(len(slope), self.C)

    def _is_mean(self, slopes: Tensor) -> bool:
        together, derivative = slopes, self._gradient
        if not bool(slopes.any()):  # at a minimum the slopes do not tell
            together, derivative = self._second(slice(None)), self._second
        chosen = sorted({0, self.n - 1, int(together.flatten(1).abs().amax(1).argmax())})
        alone = torch.cat([derivative(slice(i, i + 1)) for i in chosen])
        allowed = torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().max())
        together = together[chosen]
        gaps = [float((alone - factor * together).abs().max()) for factor in (self.n, 1)]
        if min(gaps) > allowed or min(gaps) != min(gaps):
            raise refusal(
                "loss", got="a loss whose slope for an example depends on the other examples of the batch",
                expected="the mean, or the sum, of one loss per example",
                fix="Use a loss without batch statistics; for weights of classes pass loss=lambda out, y: "
                "(weight[y] * cross_entropy(out, y, reduction='none')).mean().",
            )  # fmt: skip
        return gaps[0] <= allowed
