"""Calls of a model that leave it as it was: its parameters, its mode, its outputs, and what is refused."""

from __future__ import annotations

import inspect
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ntkit.base.batch import Batch, call_with, copied, leaves
from ntkit.base.caller_context import caller_context, own_context
from ntkit.base.checks import Refused, nearest, refusal

Outputs = Literal["full", "diagonal", "trace", "sum"] | Callable[[Any], Tensor]
Params = Iterable[str] | Callable[..., bool] | None  # names, a predicate of the name (or name and parameter), or all

_ONE_AT_A_TIME: Any = threading.RLock()
_ON_BEHALF: ContextVar[bool] = ContextVar("inside `untouched`, or at work for a thread that is", default=False)


def _new_lock() -> None:
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.RLock()  # whoever held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)

MODES = ("full", "diagonal", "trace", "sum")
_CALLS = "; a list or tuple is passed as model(*x), a dict as model(**x)."


def select_parameters(model: nn.Module, params: Params) -> dict[str, nn.Parameter]:
    """Parameters by name: all trainable ones (None), those named, or those a predicate accepts; a tied one once."""
    named = dict(model.named_parameters())
    if params is None:
        parameters = {name: p for name, p in named.items() if p.requires_grad}
        wish = "a model with at least one parameter that requires grad"
    elif callable(params):
        takes_two = required_arguments(params) > 1
        accepted = {
            id(p)
            for name, p in model.named_parameters(remove_duplicate=False)  # a tied parameter under each of its names
            if (params(name, p) if takes_two else params(name))
        }
        parameters = {name: p for name, p in named.items() if id(p) in accepted}
        wish = "a predicate that accepts at least one parameter name"
    else:
        names = [params] if isinstance(params, str) else list(params)
        alias = dict(model.named_parameters(remove_duplicate=False))
        if missing := [name for name in names if name not in alias]:
            raise refusal("params", got=repr(missing[0]), expected="a parameter's name", fix=nearest(missing[0], alias))
        wanted = {id(alias[name]) for name in names}
        parameters = {name: p for name, p in named.items() if id(p) in wanted}
        wish = "at least one name"
    if odd := [name for name, p in parameters.items() if not p.is_floating_point()]:
        got = str(parameters[odd[0]].dtype)
        fix = "Store its parts as a real parameter (torch.view_as_complex), or leave it out: params=..."
        raise refusal(f"parameter '{odd[0]}'", got=got, expected="real floating point", fix=fix)
    if not parameters:
        raise refusal(
            "params", got="no parameter", expected=wish, fix="See dict(model.named_parameters()) for the names."
        )
    return parameters


def hooks(model: nn.Module) -> list[str]:
    """The hooks that may change gradients, as texts: on parameters, and on layers."""
    of_parameters = [
        f"the gradient hook on parameter '{name}'" for name, p in model.named_parameters() if p._backward_hooks
    ]
    of_layers = [
        f"the backward hook on layer '{name}'"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    return of_parameters + of_layers


def required_arguments(function: Callable[..., Any]) -> int:
    """Number of positional arguments a callable requires; 1 where Python cannot tell."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except ValueError:
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in arguments)


class PlainWeightNorm(TorchFunctionMode):
    """Weight norms by their formula: the second derivative of PyTorch's own (2.13) takes the norm for a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        return _weight_norm(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [axis for axis in range(v.dim()) if dim == -1 or axis != dim]
    return v * (g / v.square().sum(others, keepdim=dim != -1).sqrt())


def check_module(model: Any, subject: str = "model", fix: str = "Wrap it in a module.") -> None:
    """Refuse what is not a module."""
    if not isinstance(model, nn.Module):
        raise refusal(subject, got=type(model).__name__, expected="a torch.nn.Module", fix=fix)


def check_mode(
    model: nn.Module, random: tuple[type[nn.Module], ...] = (), mixing: tuple[type[nn.Module], ...] = ()
) -> None:
    """Refuse layers whose output for one sample depends on the others, on chance or on earlier calls, by name.

    random : modules that may draw at random.
    mixing : modules that may compute statistics over the batch.
    """
    _check_tensors(model)
    for name, module in model.named_modules():
        where = f"layer '{name}' ({type(module).__name__})"
        if computes_statistics(module) and type(module) not in mixing:
            own = "train mode" if module.training else "batch statistics (track_running_stats=False)"
            raise refusal(
                where,
                got=own,
                expected="eval mode with running statistics, "
                "or the samples of a batch mix and no kernel k(x, x') exists",
                fix="Call model.eval(), or replace the layer by GroupNorm.",
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
            got = "scale_grad_by_freq, which divides gradients by counts over the batch"
            expected = "gradients of one sample that do not depend on the others"
            raise refusal(where, got=got, expected=expected, fix="Set scale_grad_by_freq = False.")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            got = "max_norm, which changes its weight at every call"
            expected = "parameters that a forward pass does not change"
            raise refusal(where, got=got, expected=expected, fix="Renormalize the weight once and set max_norm = None.")
        if _has_power_iteration(module):
            raise refusal(
                where,
                got="a spectral norm in train mode, whose power iteration changes the weight at every call",
                expected="a weight that a forward pass does not change",
                fix="Call model.eval().",
            )
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            rate = module.dropout
        else:
            continue
        if module.training and rate > 0 and type(module) not in random:
            raise refusal(where, got=f"dropout p={rate} active", expected="no randomness", fix="Call model.eval().")


def computes_statistics(module: nn.Module) -> bool:
    """Whether it is a batch norm that takes its statistics from the batch."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or module.running_mean is None)


def _has_power_iteration(module: nn.Module) -> bool:
    """Whether a forward pass changes the layer's weight: spectral norm in train mode, in its new and its old form."""
    lists = getattr(module, "parametrizations", None)
    new = lists.modules() if isinstance(lists, nn.ModuleDict) else ()
    old = module._forward_pre_hooks.values() if module.training else ()
    return any(isinstance(m, _SpectralNorm) and m.training for m in new) or any(
        isinstance(h, SpectralNorm) for h in old
    )


def _check_tensors(model: nn.Module) -> None:
    """Refuse parameters and buffers that hold no values yet, or that take no gradient by how they were built."""
    for where, module in model.named_modules():
        held = [("parameter", *item) for item in module._parameters.items()]
        for kind, name, tensor in held + [("buffer", *item) for item in module._buffers.items()]:
            if tensor is None:
                continue
            if is_lazy(tensor):
                got, fix = "no values yet (a lazy layer)", "Call the model once on a batch, which gives it its shape."
            elif tensor.is_inference():
                got = "a tensor built under torch.inference_mode, which takes no part in gradients"
                fix = "Build or load the model outside of torch.inference_mode."
            elif is_functorch_wrapped_tensor(tensor):
                got, fix = "a tensor of a transform of torch.func", "Call ntkit outside of vmap, grad and jvp."
            elif is_traceable_wrapper_subclass(tensor):
                kind_of = type(tensor.data).__name__
                got = f"a {kind_of}, which holds its values in a form of its own (sharded, quantized)"
                fix = "Load the full weights into a model of plain tensors."
            elif tensor.is_meta:
                got = "no values (device meta)"
                fix = "Load its weights first, e.g. model.to_empty(device='cpu') and load_state_dict."
            else:
                continue
            name = f"{where}.{name}".removeprefix(".")
            raise refusal(f"{kind} '{name}'", got=got, expected="a tensor with values", fix=fix)


@contextmanager
def untouched(model: nn.Module, params: dict[str, nn.Parameter]) -> Iterator[None]:
    """Differentiate with respect to `params` only, and leave the model and the RNGs as they were found.

    requires_grad, buffers and random states are restored, also when threads share a model: one at a time gets in.
    .grad is never written (gradients are returned, not accumulated); the mode (train or eval) is not touched at all.
    A model that drew random numbers inside, or wrote to its parameters, is refused at the end.
    Compiled modules run uncompiled, since a compiled graph hides what it does with its parameters; convolutions on a
    GPU use TF32 only where matrix products may (`torch.set_float32_matmul_precision`).
    """
    global _entered
    if _ON_BEHALF.get() and not _ONE_AT_A_TIME._is_owned():  # that thread would wait for its caller for ever
        raise RuntimeError("a use of ntkit inside of a model's forward pass, in another thread than the caller's")
    parameters = {id(p) for p in params.values()}
    with _ONE_AT_A_TIME, own_context(), _uncompiled(), _no_tf32_unasked(model):
        flags = [(p, p.requires_grad) for p in model.parameters()]
        owned = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        versions = [(name, p, _version(p)) for name, p in model.named_parameters()]
        devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        outer, states, behalf, changed = _entered, _random_states(), _ON_BEHALF.get(), False

        def put_back() -> None:
            global _entered
            nonlocal changed
            _entered = states
            _ON_BEHALF.set(behalf)
            for p, flag in flags:
                p.requires_grad_(flag)
            with torch.no_grad():
                for module, name, buffer in owned:  # a forward may bind another tensor to the name
                    module._buffers[name] = buffer
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            changed = drew()
            if changed:
                _, python, numpy = _entered
                random.setstate(python)
                np.random.set_state(numpy)  # noqa: NPY002 (put back, not used)
            _entered = outer

        try:
            _entered = states
            _ON_BEHALF.set(True)
            for p, _ in flags:
                p.requires_grad_(id(p) in parameters)
            with torch.random.fork_rng(devices), torch.enable_grad(), _no_overwritten_tensors(model):
                yield
        finally:
            try:
                put_back()
            except KeyboardInterrupt:  # while it is put back: all of it, then stop
                put_back()
                raise
        if changed:
            raise random_forward(model)
        if written := [name for name, p, version in versions if _version(p) != version]:
            raise _changed_parameter(written[0])


def _version(p: Tensor) -> tuple[int, int]:
    """What changes where a tensor is written to, or its `.data` is replaced (but not where that is written to)."""
    return (0 if p.is_inference() else p._version), p.data_ptr()


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Refuse a model that wrote to the `.data` of a parameter inside, which no version shows."""
    before = _sums(model)
    yield
    now = _sums(model)
    for name, value in before.items():
        if not torch.equal(value, now[name]) and not value.isnan():
            raise _changed_parameter(name)


def _sums(model: nn.Module) -> dict[str, Tensor]:
    """The sum of every parameter: a copy would take as much memory as the model."""
    return {name: p.detach().sum(dtype=torch.float64) for name, p in model.named_parameters() if not p.is_complex()}


def _changed_parameter(name: str) -> Refused:
    """The refusal of a model whose forward pass changes a parameter."""
    fix = "Change it outside of forward, and load the weights again: this call has changed them."
    return refusal(
        f"parameter '{name}'",
        got="a forward pass that changes it",
        expected="parameters that a forward pass does not change",
        fix=fix,
    )


@contextmanager
def _no_overwritten_tensors(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise refusal(
            f"model {type(model).__name__}",
            got=f"a forward pass that overwrites a tensor which its gradient needs ({str(error).split(';')[0]})",
            expected="a forward pass that autograd can differentiate",
            fix="Replace the operation in place, e.g. y.mul_(2) by y * 2.",
        ) from error


_entered: Any = None  # random states on entering `untouched`


def drew() -> bool:
    """Whether random numbers were drawn, from a generator of the CPU, since `untouched` was entered."""
    (torch1, python1, numpy1), (torch2, python2, numpy2) = _entered, _random_states()
    pointer = [(state["state"]["pos"], state["has_gauss"]) for state in (numpy1, numpy2)]
    same = python1 == python2 and pointer[0] == pointer[1]
    return not (same and np.array_equal(numpy1["state"]["key"], numpy2["state"]["key"]) and torch1.equal(torch2))


def random_forward(model: nn.Module) -> Exception:
    """The refusal of a model whose forward pass draws random numbers."""
    return refusal(
        f"model {type(model).__name__}",
        got="a forward pass that draws random numbers",
        expected="the same output at every call",
        fix="Call model.eval(), or switch off dropout, stochastic depth and sampling.",
    )


def _random_states() -> tuple[Tensor, tuple, dict[str, Any]]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 (kept, not used)


def _uncompiled() -> Any:
    """Make compiled modules run eagerly; only where something was compiled, since asking is slow to import."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _no_tf32_unasked(model: nn.Module) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    on_gpu = any(p.device.type == "cuda" for p in model.parameters())
    if not on_gpu or not cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest":
        yield
        return
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = True


@contextmanager
def without_fused_rnn(wanted: bool) -> Iterator[None]:
    """Run recurrent layers step by step, in the backward pass (of a checkpoint) too."""
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32 acceleration.*")
        cudnn = torch.backends.cudnn
        flags = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
        with torch.backends.mkldnn.flags(enabled=False), cudnn.flags(enabled=False, **flags):
            yield


def call(model: nn.Module, x: Batch) -> Any:
    """Run the model on a copy of a batch (it may write to it); says which input it got when the model refuses it."""
    with refused_input(model, x), caller_context():
        return call_with(model, copied(x))


@contextmanager
def refused_input(model: nn.Module, x: Batch) -> Iterator[None]:
    """Turn an error of the model's forward pass into a refusal that says which input it got."""
    try:
        yield
    except Refused:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in leaves(x))
        fix = "Check channels, sizes and dtype against the model's first layer"
        if isinstance(error, TypeError) and "argument" in str(error):
            fix = "Give the arguments that its forward takes"
        of_model = {p.dtype for p in model.parameters() if p.is_floating_point()}
        of_input = {t.dtype for t in leaves(x) if t.is_floating_point()}
        if len(of_model) == 1 and of_input != of_model and "dtype" in str(error):
            (dtype,) = of_model
            name = str(dtype).removeprefix("torch.")
            fix = f"Check the dtype: the model's is {name}; convert one of the two, such as model.double() for float64"
        raise refusal(
            f"model {type(model).__name__}",
            got=f"input {shapes}, on which its forward failed ({error})",
            expected="input that the model accepts",
            fix=fix + ("." if isinstance(x, Tensor) and fix.startswith("Check") else _CALLS),
        ) from error
