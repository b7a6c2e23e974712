"""A model's run on a tape: every torch function it calls on its input or its parameters, with the layer that called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntkit.base.checks import Refused, refusal
from ntkit.jacobian.model_calls import check_mode, untouched


@dataclass(frozen=True)
class Ref:
    """A place on the tape, where an argument was a value of the run."""

    place: int


@dataclass
class Op:
    """One call: its function, its arguments with a `Ref` for every value of the run, what it gave, and who called."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    layer: str
    writes: bool = False  # into one of its arguments
    stopped: bool = False  # it ran where gradients do not flow

    @property
    def name(self) -> str:
        """As a reader of the model would know it: relu, softmax, __add__."""
        return getattr(self.func, "__name__", str(self.func))

    @property
    def refs(self) -> list[Ref]:
        """The values of the run it takes."""
        return [a for a in flat((self.args, self.kwargs)) if isinstance(a, Ref)]


@dataclass
class Tape:
    """Calls in their order. Place 0 is the input; a parameter enters as an `Op` without arguments at its first use."""

    ops: list[Op]
    output: int
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of the parameters, by place


def flat(value: Any) -> Iterator[Any]:
    """Leaves of nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from flat(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from flat(v)
    else:
        yield value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with every leaf changed."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    return change(value)


class _Stop(Exception):
    """The rest of the run is not wanted."""


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, x: Tensor, last: int | None) -> None:
        super().__init__()
        self.ops = [Op(torch.Tensor, (), {}, x, "")]
        self.known: dict[int, tuple[int, int]] = {id(x): (0, x._version)}  # place and version by identity
        self.kept: list[Tensor] = [x]  # identities stay taken as long as the tape lives
        self.own = {id(p): (name, p) for name, p in model.named_parameters()}
        self.parameters: dict[int, nn.Parameter] = {}
        self.names: dict[int, str] = {}
        self.layers: list[str] = []
        self.last = last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
        if not any(id(t) in self.known or id(t) in self.own for t in found):
            return func(*args, **kwargs)
        before = mapped((args, kwargs), self._ref)
        versions = [t._version for t in found]
        out = func(*args, **kwargs)
        if func is Tensor.__setitem__ and id(args[0]) not in self.known:
            raise refusal(
                self._where(),
                got="values of the run written into a tensor made elsewhere",
                expected="values that are made and then only read",
                fix="Make the tensor with torch.cat or torch.stack.",
            )
        if isinstance(out, Tensor):
            self._write(func, before, out, any(t._version != v for t, v in zip(found, versions, strict=True)))
        elif isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out):
            for i, o in enumerate(out):
                if isinstance(o, Tensor):
                    self._write(_Item(func, i), before, o)
        elif (
            not _of_shape(func)
            and isinstance(out, (bool, int, float, complex, list))
            and any(id(t) in self.known and id(t) not in self.own for t in found)
        ):
            raise refusal(
                self._where(),
                got=f"{getattr(func, '__name__', func)}, a number made of the data",
                expected="a run that is the same for all data",
                fix="A network that decides by its values has no infinite-width limit of this kind.",
            )
        return out

    def _where(self) -> str:
        return f"layer '{self.layers[-1]}'" if self.layers and self.layers[-1] else "the model"

    def _ref(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.known and id(value) in self.own:
            name, p = self.own[id(value)]
            self.parameters[len(self.ops)], self.names[len(self.ops)] = p, name
            self.known[id(value)] = (len(self.ops), value._version)
            self.ops.append(Op(nn.Parameter, (), {}, value, name))
        if id(value) not in self.known:
            return value
        place, version = self.known[id(value)]
        if version != value._version:
            raise refusal(
                self._where(),
                got="a tensor written in place through a view",
                expected="values that are made and then only read",
                fix="Write it without in-place operations on views.",
            )
        return Ref(place)

    def _write(self, func: Any, before: Any, out: Tensor, writes: bool = False) -> None:
        self.known[id(out)] = (len(self.ops), out._version)
        self.kept.append(out)
        layer, stopped = self.layers[-1] if self.layers else "", not torch.is_grad_enabled()
        self.ops.append(Op(func, before[0], before[1], out, layer, writes, stopped))
        if self.last is not None and len(self.ops) > self.last:
            raise _Stop


class _Item:
    """One of several results of a function."""

    def __init__(self, func: Any, index: int) -> None:
        self._func, self._index = func, index
        self.__name__ = getattr(func, "__name__", str(func))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._func(*args, **kwargs)[self._index]


_SHAPES = {
    "size",
    "dim",
    "numel",
    "stride",
    "__len__",
    "ndimension",
    "nelement",
    "element_size",
    "data_ptr",
    "__hash__",
}
_SHAPES |= {"storage_offset", "is_contiguous", "is_floating_point", "is_complex", "get_device", "_is_view"}
_SHAPES |= {
    "is_same_size",
    "is_inference",
    "is_conj",
    "is_neg",
    "is_pinned",
    "is_shared",
    "is_signed",
    "is_nonzero_numel",
}


def _of_shape(func: Any) -> bool:
    """A property, or a method that tells of a tensor's form and not of its values."""
    name = getattr(func, "__name__", "")
    return name == "__get__" or name in _SHAPES


@contextmanager
def _layers(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """The names of the modules being run, innermost last."""
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: _left(stack), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _left(stack: list[str]) -> None:
    stack.pop()


def record(model: nn.Module, x: Tensor, last: int | None = None) -> Tape:
    """Run the model on a batch and keep the calls; with `last`, only up to that place.

    Raises
    ------
    Refused
        For a train mode that mixes samples or draws at random, numbers made of the data, writes through views, input
        that the forward fails on, and an output that is not one tensor.
    """
    check_mode(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise refusal(
                f"layer '{name}'" if name else "the model",
                got="a scripted module, whose operations cannot be seen",
                expected="a module run by Python",
                fix="Pass the module it was scripted from.",
            )
    output: Any = None
    # with gradients for a reading: where the model itself switches them off, they are off
    with untouched(model, dict(model.named_parameters())), torch.set_grad_enabled(last is None):
        x = x.detach().clone()  # the model may write into it
        recorder = _Recorder(model, x, last)
        with _layers(model, recorder.layers):
            try:
                with recorder:
                    output = model(x)
            except _Stop:
                output = recorder.ops[-1].out
            except Refused:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                shape = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
                raise refusal(
                    f"model {type(model).__name__}",
                    got=f"input {shape}, on which its forward failed ({error})",
                    expected="input that the model accepts",
                    fix="Check channels, sizes and dtype against the model's first layer.",
                ) from error
    if not isinstance(output, Tensor):
        raise refusal(
            "the model's output",
            got=type(output).__name__,
            expected="one tensor",
            fix="Wrap the model in a module that returns the tensor wanted.",
        )
    if id(output) not in recorder.known:
        raise refusal(
            "the model's output", got="a constant", expected="a function of the input", fix="Check its forward."
        )
    return Tape(recorder.ops, recorder.known[id(output)][0], recorder.parameters, recorder.names)
