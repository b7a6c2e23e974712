"""What a model returns: the part of it that is wanted, and its outputs as one row per sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ntkit.base.batch import main_output
from ntkit.base.caller_context import caller_context
from ntkit.base.checks import refusal
from ntkit.jacobian.model_calls import Outputs, check_module


def check_select(select: Any) -> None:
    """Refuse what is no function."""
    if select is not None and not callable(select):
        fix = "Pass a function of the model's output, such as lambda out: out.last_hidden_state."
        raise refusal("select", got=repr(select), expected="a function of the model's output", fix=fix)


def picked(output: Any, select: Callable[[Any], Any] | None) -> Any:
    """The part of a model's output that the user's function picks; None: all of it."""
    if select is None:
        return output
    try:
        with caller_context():
            part = select(output)
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        got = f"a function that failed on the model's output, {type(output).__name__} ({error})"
        raise refusal("select", got=got, expected="one that picks a tensor", fix="Look at the output.") from error
    if part is None:
        fix = "Ask the model for that part, e.g. output_hidden_states=True."
        raise refusal("select", got="a function that returned None", expected="a tensor", fix=fix)
    return part


def selected(model: nn.Module, select: Callable[[Any], Any] | None) -> nn.Module:
    """The model with a part of its output in place of the whole: its parameters and layers, under the same names."""
    check_module(model)
    check_select(select)
    if select is None:
        return model
    own = copy.copy(model)
    own._forward_hooks = model._forward_hooks.copy()  # or the hook would be the model's, too
    own.register_forward_hook(lambda module, arguments, output: picked(output, select))
    return own


def reduce_outputs(raw: Any, outputs: Outputs, n: int) -> Tensor:
    """Outputs to differentiate, [n, C]: C outputs for "full", "diagonal" and "trace"; one for "sum" and a callable."""
    if callable(outputs):
        scalar = _scalar(outputs, raw, n)
        if not isinstance(scalar, Tensor) or tuple(scalar.shape) != (n,):
            got = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
            got = f"a callable that returned {got}"
            fix = "It is called on the outputs of a whole batch; reduce every axis but the first."
            raise refusal("outputs", got=got, expected=f"one scalar per sample, shape ({n},)", fix=fix)
        return _real(scalar[:, None])
    raw = main_output(raw)
    if not isinstance(raw, Tensor):
        raise refusal(
            "the model's output",
            got=type(raw).__name__,
            expected="a tensor",
            fix="Pick a tensor with select=lambda y: ..., or one scalar per sample with outputs=lambda y: ...",
        )
    if raw.dim() == 0 or raw.shape[0] != n:
        got = f"shape {tuple(raw.shape)} for {n} samples"
        fix = "Samples must lie along the first axis of input and output; wrap the model if they do not."
        if n == 1:
            fix += " One sample loses that axis in squeeze(): write squeeze(-1) or flatten(1)."
        raise refusal("the model's output", got=got, expected=f"({n}, ...)", fix=fix)
    if raw.numel() == 0:
        fix = "Check the model's last layer."
        raise refusal("the model's output", got=f"shape {tuple(raw.shape)}", expected="at least one output", fix=fix)
    flat = _real(raw.reshape(n, -1))
    return flat.sum(1, keepdim=True) / flat.shape[1] ** 0.5 if outputs == "sum" else flat


def _scalar(outputs: Callable[[Any], Tensor], raw: Any, n: int) -> Any:
    """What the user's callable returns; an error of it says what it was called on."""
    try:
        with caller_context():
            return outputs(raw)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        raise refusal(
            "outputs",
            got=f"a callable that failed on the outputs of {n} samples ({error})",
            expected=f"one scalar per sample, shape ({n},), of whatever part of the samples it is called on",
            fix="Labels belong into the batch: a module whose forward(x, y) returns the losses [n], called on (x, y).",
        ) from error


def _real(out: Tensor) -> Tensor:
    if not out.is_floating_point():
        fix = "Return real outputs, e.g. torch.view_as_real for complex ones."
        raise refusal("the model's output", got=str(out.dtype), expected="real floating point", fix=fix)
    return out
