"""What a model returns: the part of it that is wanted, and its outputs as one row per sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import main_output
from ntkit.base.caller_context import caller_context
from ntkit.base.checks import Refused, refusal
from ntkit.jacobian.model_calls import Outputs, check_module

Select = Callable[[Any], Any]  # from a model's output to the part that is looked at
_ERRORS = (LookupError, AttributeError, TypeError, ValueError, RuntimeError)  # of a user's function


def check_select(select: Any) -> None:
    """Refuse what is no function."""
    if select is not None and not callable(select):
        fix = "Pass a function of the model's output, such as lambda out: out.last_hidden_state."
        raise refusal("select", got=repr(select), expected="a function of the model's output", fix=fix)


def picked(output: Any, select: Select | None) -> Any:
    """The part of a model's output that the user's function picks; None: all of it."""
    if select is None:
        return output
    try:
        with caller_context():
            part = select(output)
    except Refused:  # of an operation that the path kernel has no rule for
        raise
    except _ERRORS as error:
        got = f"a function that failed on the model's output, {type(output).__name__} ({error})"
        raise refusal("select", got=got, expected="one that picks a tensor", fix="Look at the output.") from error
    if part is None:
        fix = "Ask the model for that part, e.g. output_hidden_states=True."
        raise refusal("select", got="a function that returned None", expected="a tensor", fix=fix)
    return part


def part_of(output: Any, select: Select | None = None) -> Any:
    """The part of a model's output that is looked at: what the user's function picks, or the logits if it has any."""
    return main_output(picked(output, select))


class PartHook:
    """A forward hook that puts the part that is looked at in place of a model's whole output."""

    def __init__(self, select: Select | None) -> None:
        self.select = select

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """The part."""
        return part_of(output, self.select)


def selected(model: nn.Module, select: Select | None) -> nn.Module:
    """The model with the part of its output that is looked at in place of the whole: the same parameters and layers."""
    check_module(model)
    check_select(select)
    if isinstance(model, torch.jit.ScriptModule):  # it takes no hooks
        if select is None:
            return model
        fix = "Pass the module from which it was scripted."
        raise refusal("select", got="a scripted module", expected="a module that runs in Python", fix=fix)
    own = copy.copy(model)
    own._forward_hooks = model._forward_hooks.copy()  # or the hook would be the model's, too
    own.register_forward_hook(PartHook(select))
    return own


def selected_as(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with the same part of its output in place of the whole as in another one, of `selected`."""
    for hook in other._forward_hooks.values():
        if isinstance(hook, PartHook):
            model = selected(model, hook.select)
    return model


def check_finite_outputs(model: nn.Module, out: Tensor) -> None:
    """Refuse outputs [n, ...] that are infinite or undefined."""
    if not (finite := torch.isfinite(out)).all():
        sample = int((~finite).nonzero()[0, 0])
        got = f"an output that is not finite (sample {sample} of a batch of {len(out)})"
        fix = "Look for overflow or a division by zero on that input; a diverged network has no kernel."
        raise refusal(f"model {type(model).__name__}", got=got, expected="finite outputs", fix=fix)


def refuse_infinite_input(what: str = "gradients") -> Refused:
    """The refusal of infinite input that makes something infinite or undefined, though the outputs are finite."""
    got = f"an infinite input, on which the outputs are finite and {what} are not"
    fix = "Remove that sample, or pass a large number in place of infinity."
    return refusal("x", got=got, expected=f"finite {what}", fix=fix)


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
    flat = real_rows(raw, n).reshape(n, -1)
    return flat.sum(1, keepdim=True) / flat.shape[1] ** 0.5 if outputs == "sum" else flat


def real_rows(raw: Any, n: int) -> Tensor:
    """The outputs of n samples, [n, ...], real: the tensor itself, or the logits of an object that has some."""
    raw = main_output(raw)
    if not isinstance(raw, Tensor):
        raise refusal(
            "the model's output",
            got=type(raw).__name__,
            expected="a tensor",
            fix="Pick a tensor with select=lambda y: ..., or one scalar per sample with outputs=lambda y: ...; for a "
            "command, wrap the model in a module that returns a tensor.",
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
    return _real(raw)


def _scalar(outputs: Callable[[Any], Tensor], raw: Any, n: int) -> Any:
    """What the user's callable returns; an error of it says what it was called on."""
    main = main_output(raw)
    try:
        with caller_context():
            if main is not raw:  # an object with logits: a callable may ask for its fields, or take it for a tensor
                with suppress(*_ERRORS):
                    return outputs(raw)
            return outputs(main)
    except _ERRORS as error:
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
