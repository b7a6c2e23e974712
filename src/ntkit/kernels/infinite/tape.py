"""A recorded run of a model: every torch function called on its input or its parameters, and the calling module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ntkit.base.checks import NoLimit, refusal
from ntkit.jacobian.model_calls import check_mode, refused_input, untouched, unwritten


@dataclass(frozen=True)
class Ref:
    """An argument that is the output of an earlier call, by its index on the tape."""

    index: int


@dataclass
class Op:
    """One call: its function, its arguments with a `Ref` for every value of the run, its output and the module."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    layer: str
    in_place: bool = False  # it writes into one of its arguments
    no_grad: bool = False  # it ran where gradients do not flow

    @property
    def name(self) -> str:
        """As a reader of the model would know it: relu, softmax, __add__."""
        return getattr(self.func, "__name__", str(self.func))

    @property
    def refs(self) -> list[Ref]:
        """The values of the run among its arguments."""
        return [a for a in tree_leaves((self.args, self.kwargs)) if isinstance(a, Ref)]


@dataclass
class Tape:
    """Calls in their order. Index 0 is the input; a parameter enters as an `Op` without arguments at its first use."""

    ops: list[Op]
    output: int
    parameters: dict[int, tuple[str, nn.Parameter]] = field(default_factory=dict)  # name and parameter by index


DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d}
_DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def dropout_rate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The share of values that a call drops: 0 in eval mode."""
    given = {"p": 0.5, "training": True} | dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    return float(given["p"]) if given["training"] else 0.0


class _Stop(Exception):
    """The rest of the run is not needed."""


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, x: Tensor, last: int | None) -> None:
        super().__init__()
        self.ops = [Op(torch.Tensor, (), {}, x, "")]
        self.indices: dict[int, tuple[int, int]] = {id(x): (0, x._version)}  # index and version by identity
        self.tensors: list[Tensor] = [x]  # a reference to each, so that no identity is used again
        self.model_parameters = {id(p): (name, p) for name, p in model.named_parameters()}
        self.parameters: dict[int, tuple[str, nn.Parameter]] = {}
        self.layers: list[str] = []
        self.last = last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(id(t) in self.indices or id(t) in self.model_parameters for t in inputs):
            return func(*args, **kwargs)
        arguments = tree_map(self._ref, (args, kwargs))
        versions = [t._version for t in inputs]
        if func in DROPOUTS and dropout_rate(args, kwargs) > 0:  # recorded without its draw
            out = args[0] if (len(args) > 3 and args[3]) or kwargs.get("inplace") else args[0].clone()
        else:
            out = func(*args, **kwargs)
        if func is Tensor.__setitem__ and id(args[0]) not in self.indices:
            got = "values of the run written into a tensor created elsewhere"
            expected = "values that are not written into after they are computed"
            fix = "Create the tensor with torch.cat or torch.stack."
            raise NoLimit(str(refusal(self._where(), got=got, expected=expected, fix=fix)))
        if isinstance(out, Tensor):
            in_place = any(t._version != v for t, v in zip(inputs, versions, strict=True))
            self._append(func, arguments, out, in_place)
        elif isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out):
            for i, o in enumerate(out):
                if isinstance(o, Tensor):
                    self._append(_Item(func, i), arguments, o)
        elif (
            getattr(func, "__name__", "") not in _SHAPE_FUNCTIONS
            and isinstance(out, (bool, int, float, complex, list, np.ndarray))
            and any(id(t) in self.indices and id(t) not in self.model_parameters for t in inputs)
        ):
            got = f"{getattr(func, '__name__', func)}, a Python number computed from the data"
            fix = "A network that branches on its values has no infinite-width limit of this kind."
            expected = "a run that is the same for all data"
            raise NoLimit(str(refusal(self._where(), got=got, expected=expected, fix=fix)))
        return out

    def _where(self) -> str:
        return f"layer '{self.layers[-1]}'" if self.layers and self.layers[-1] else "the model"

    def _ref(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.indices and id(value) in self.model_parameters:
            name, p = self.parameters[len(self.ops)] = self.model_parameters[id(value)]
            self.indices[id(value)] = (len(self.ops), value._version)
            self.ops.append(Op(nn.Parameter, (), {}, p, name))
        if id(value) not in self.indices:
            return value
        index, version = self.indices[id(value)]
        if version != value._version:
            expected = "values that are not written into after they are computed"
            fix = "Replace in-place operations on views by operations that return new tensors."
            got = "a tensor written in place through a view"
            raise NoLimit(str(refusal(self._where(), got=got, expected=expected, fix=fix)))
        return Ref(index)

    def _append(self, func: Any, arguments: Any, out: Tensor, in_place: bool = False) -> None:
        self.indices[id(out)] = (len(self.ops), out._version)
        self.tensors.append(out)
        (args, kwargs), layer = arguments, self.layers[-1] if self.layers else ""
        self.ops.append(Op(func, args, kwargs, out, layer, in_place, not torch.is_grad_enabled()))
        if self.last is not None and len(self.ops) > self.last:
            raise _Stop


class _Item:
    """One of several results of a function."""

    def __init__(self, func: Any, index: int) -> None:
        self._func, self._index = func, index
        self.__name__ = getattr(func, "__name__", str(func))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._func(*args, **kwargs)[self._index]


_SHAPE_FUNCTIONS = {  # they depend on a tensor's shape, dtype or layout and not on its values
    "__get__", "size", "dim", "numel", "stride", "__len__", "ndimension", "nelement", "element_size",
    "data_ptr", "__hash__", "storage_offset", "is_contiguous", "is_floating_point", "is_complex", "get_device",
    "_is_view", "is_same_size", "is_inference", "is_conj", "is_neg", "is_pinned", "is_shared", "is_signed",
}  # fmt: skip


@contextmanager
def _module_names(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the running modules on the stack, the innermost last."""
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: stack.__delitem__(-1), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record(model: nn.Module, x: Tensor, last: int | None = None, graph: bool = False) -> Tape:
    """Run the model on a batch and record the calls; with `last`, only up to that index.

    graph : the values are functions of x in its autograd graph.

    Raises
    ------
    NoLimit
        For Python numbers computed from the data, and writes through views.
    Refused
        For a train mode that draws at random (other than dropout), input on which the forward fails,
        and an output that is not one tensor.
    """
    check_mode(model, random=_DROPOUT_LAYERS, mixing=_BATCH_NORMS)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            got = "a scripted module, whose operations cannot be recorded"
            expected = "a module that runs in Python"
            fix = "Pass the module from which it was scripted."
            raise refusal(f"layer '{name}'" if name else "the model", got=got, expected=expected, fix=fix)
    output: Any = None
    # a complete run has gradients on, so that the places where the model itself switches them off are seen
    params = dict(model.named_parameters())
    with untouched(model, params), unwritten(model), torch.set_grad_enabled(last is None or graph):
        x = (x if graph else x.detach()).clone()  # the model may write into it
        recorder = _Recorder(model, x, last)
        with _module_names(model, recorder.layers):
            try:
                with refused_input(model, x), recorder:
                    output = model(x)
            except _Stop:
                output = recorder.ops[-1].out
    if not isinstance(output, Tensor):
        fix = "Pick one with select=lambda out: ..., or wrap the model in a module that returns one tensor."
        raise refusal("the model's output", got=type(output).__name__, expected="one tensor", fix=fix)
    if id(output) not in recorder.indices:
        fix = "Check its forward."
        raise refusal("the model's output", got="a constant", expected="a function of the input", fix=fix)
    return Tape(recorder.ops, recorder.indices[id(output)][0], recorder.parameters)
