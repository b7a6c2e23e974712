"""The training objective: a loss on rows of a data set, both checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntkit.base.batch import Batch, as_batch, call_with, checked, copied, count, take
from ntkit.base.checks import Refused, refusal
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
        if len(pair) != 2 or pair[1] is None:
            got, expected = type(data).__name__, "(x, y) tensors, or a dataset of such pairs"
            raise refusal("data", got=got, expected=expected, fix="Pass data=(x, y).")
        if not callable(loss):
            fix = "Pass e.g. torch.nn.functional.cross_entropy."
            raise refusal("loss", got=repr(loss), expected="a function of outputs and targets", fix=fix)
        x, y = with_labels(*pair)
        y = as_batch(y, "y")
        if not isinstance(y, Tensor):
            fix = "Pass data=(x, y), y a tensor or an array of numbers."
            raise refusal("y", got=type(y).__name__, expected="a tensor", fix=fix)
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
        """Inputs and targets of these rows, None = all: copies, as a model or a loss may write into them."""
        rows = slice(None) if rows is None else rows
        x, y = take(self.x, rows), self.y[rows]
        return (copied(x), y.clone()) if isinstance(rows, slice) else (x, y)

    def value(self, model: nn.Module, rows: Tensor | slice | None) -> Tensor:
        """Value of the loss on these rows."""
        x, y = self.batch(rows)
        return self.loss(part_of(call_with(model, x), self.select), y)

    def mean(self, model: nn.Module, batch_size: int) -> float:
        """Mean over all rows of the losses of batches, in eval mode; the model is in train mode afterwards."""
        total = 0.0
        with _evaluated(model), torch.no_grad():
            for start in range(0, self.n, batch_size):
                rows = slice(start, min(start + batch_size, self.n))
                total += float(self.value(model, rows)) * (rows.stop - rows.start)
        return total / self.n

    def check(self, model: nn.Module, rows: int) -> None:
        """Evaluate the loss once, in eval mode, so that a wrong one is refused before anything is written."""
        x, y = self.batch(slice(0, rows))
        with _evaluated(model):
            outputs = part_of(call_with(model, x), self.select)
            with _failing(outputs, y):
                out = paired(self.loss, outputs, y)
        if not isinstance(out, Tensor) or out.ndim != 0:
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise refusal("loss", got=got, expected="a scalar tensor", fix="Return the mean over the batch.")
        if not out.requires_grad:
            expected = "a differentiable function of model(x)"
            fix = "Do not detach, round or argmax the outputs, and do not use torch.no_grad in the model."
            raise refusal("loss", got="a value that does not depend on the parameters", expected=expected, fix=fix)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode; at the end train mode, and the buffers as they were: some networks count their calls."""
    buffers = [
        (m._buffers, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    model.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                buffer.copy_(value)
                owner[name] = buffer
        model.train()


@contextmanager
def _failing(outputs: Any, y: Tensor) -> Iterator[None]:
    """Turn an error of the user's loss into a refusal that says what it was called on."""
    try:
        yield
    except Refused:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shape = f"{_form(outputs)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        values = f", {y.min().item():g} to {y.max().item():g}" if y.numel() and not y.is_complex() else ""
        got = f"a function that failed on outputs {shape} and targets {_form(y)}{values} ({error})"
        fix = "Change the shape, dtype or numbers of the targets, or pass e.g. lambda out, y: loss(out[:, 0], y)."
        raise refusal("loss", got=got, expected="a loss of these outputs and targets", fix=fix) from error


def paired(loss: Loss, outputs: Any, y: Tensor) -> Any:
    """Value of a loss; refuse one that compares each output with each target, because [n, 1] and [n] broadcast."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")  # `_check_pairs` says more
        with _Shapes() as shapes:
            value = loss(outputs, y)
        if shapes.met(len(y)):
            _check_pairs(loss, outputs, y)
    return value


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class _Shapes(TorchFunctionMode):
    """The shapes of the tensors that functions of torch are called with together."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: set[frozenset[torch.Size]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls.add(frozenset(value.shape for value in args if isinstance(value, Tensor)))
        return func(*args, **(kwargs or {}))

    def met(self, n: int) -> bool:
        """Whether one function has been called with [n] and [n, 1], which broadcast to [n, n]."""
        return n > 1 and any({torch.Size([n]), torch.Size([n, 1])} <= shapes for shapes in self._calls)


def _check_pairs(loss: Loss, outputs: Any, y: Tensor) -> None:
    """Refuse a loss that compares each output with each target, because [n, 1] and [n] broadcast to [n, n].

    That is: one example's target changes the gradients of the others, and no longer does in another shape.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or y.is_complex():
        return
    if not len(y) == y.numel() == outputs.numel():
        return
    with torch.random.fork_rng(devices=[]):
        if not _mixes(loss, outputs, y):
            return
        for other in (y.reshape(-1), y.reshape(-1, 1)):
            if _mixes(loss, outputs, other) is False:
                got = f"outputs {list(outputs.shape)} and targets {list(y.shape)}, which it compares each with each"
                form = ", ".join(["-1", "1"][: other.ndim])
                fix = f"Give it targets of shape {list(other.shape)}: y.reshape({form})."
                expected = "a loss that compares each output with its own target"
                raise refusal("loss", got=got, expected=expected, fix=fix)


def _mixes(loss: Loss, outputs: Tensor, y: Tensor) -> bool | None:
    """Whether the first target changes the gradients of other examples' outputs; None where there is no loss."""
    out = outputs.detach().requires_grad_()
    both = torch.cat([out.detach().flatten(), y.flatten().to(out.dtype)])
    targets = [y.clone(), y.clone()]
    low, high = both.min() - 1, both.max() + 1  # on either side of all outputs
    targets[0][0], targets[1][0] = (low, high) if y.is_floating_point() else (y.min(), y.max())
    try:
        one, two = (torch.autograd.grad(loss(out.clone(), target), out)[0] for target in targets)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    return not torch.equal(one[1:], two[1:])


def loss_name(loss: Loss) -> str:
    """Name of a loss in run.json."""
    return getattr(loss, "__qualname__", type(loss).__qualname__)
