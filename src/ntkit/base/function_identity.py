"""What a function computes, as a short text: to notice another one."""

from __future__ import annotations

import dis
import hashlib
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property, partial
from numbers import Number
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.tensors import tensor_hash

OTHER_VERSION = "Where all is the same, another version of ntkit or Python wrote it, which names functions otherwise."
"""Of a folder that is refused because functions or data in it have another identity."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_BY_TEXT = (slice, range, torch.dtype, torch.device, Enum, Number)  # what these are is in their text
_NAMESPACES = (SimpleNamespace, Namespace)
_BY_VALUE = (*_PLAIN, Tensor, np.ndarray, list, tuple)
_HELD = (*_PLAIN, Tensor, np.ndarray)
_LISTS = (tuple, list, deque)
_TOLD = (*_BY_VALUE, *_BY_TEXT, *_NAMESPACES, set, frozenset)  # `_of_value` tells more of these than their type
# What torch keeps of each module, its mode among it; of recurrent layers their weights once more, in copies otherwise.
_OF_MODULES = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}


def function_identity(function: Any) -> str:
    """Name and code of a function, or type and settings of a callable object: what it computes, in files.

    What a function encloses, its defaults and what it reads from its module count by their values: plain ones, tensors,
    arrays, functions, lists, tuples, dicts, sets, data classes and namespaces of them. A module's tensors count where
    none of them is trained: those of a network in training are other ones at each call. Of everything else the type
    counts.

    Examples
    --------
    >>> def weighted(w):
    ...     return lambda out: out @ w
    >>> function_identity(weighted(torch.ones(2))) == function_identity(weighted(torch.ones(2)))
    True
    >>> function_identity(weighted(torch.ones(2))) == function_identity(weighted(torch.zeros(2)))
    False
    """
    seen = {id(function)}
    if getattr(function, "__code__", None) is not None:
        return f"{function.__qualname__} {_short(_of_function(function, seen))}"
    own = _attributes(function)
    settings = {k: v for k, v in own.items() if isinstance(v, (bool, int, float, str)) or v is None}
    name, rest = f"{type(function).__name__} {settings}", list(_of_object(function, seen))
    return f"{name} {_short(iter(rest))}" if rest else name


def module_identity(module: nn.Module) -> Iterator[str]:
    """What a network computes, beside its parameters and buffers: settings, hooks and code of all modules in it.

    Attributes count as `function_identity` says of what a function encloses, and of other objects among them (a
    configuration) what they hold as plain values, tensors and arrays, as do objects in these, in lists and in dicts if
    their class is of the model's own package; code where neither torch nor ntkit has it.
    """
    for name, part in module.named_modules():
        yield f"{name} {type(part).__module__}.{type(part).__qualname__}"
        seen = {id(part)}
        attributes = {k: v for k, v in vars(part).items() if k not in _OF_MODULES}
        yield from _told(attributes, seen)
        for value in attributes.values():
            yield from _held(value, _package(part), seen, inside=False)
        yield from _told([*part._forward_pre_hooks.values(), *part._forward_hooks.values()], seen)
        of_gradients = [part._backward_pre_hooks, part._backward_hooks]
        of_gradients += [p._backward_hooks or {} for p in part._parameters.values() if p is not None]
        yield from _told([hook for hooks in of_gradients for hook in hooks.values()], seen)
        for kind in type(part).__mro__:
            if kind.__module__.partition(".")[0] not in ("torch", "ntkit", "builtins"):
                yield from _told(_of_class(kind), seen)


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _held(value: Any, package: str, seen: set[int], inside: bool = True) -> Iterator[str]:
    """What objects hold of which `_of_value` tells the type alone; of those `inside` others, only the package's own."""
    several = isinstance(value, (*_LISTS, Mapping))
    if id(value) in seen or callable(value) or is_dataclass(value) or (isinstance(value, _TOLD) and not several):
        return
    seen, entries = seen | {id(value)}, []
    if several:
        entries += value.values() if isinstance(value, Mapping) else value
    if not inside or _package(value) == package:
        own = _attributes(value)
        yield from _told({k: v for k, v in own.items() if isinstance(v, _HELD)}, seen)
        entries += own.values()
    for place, entry in enumerate(entries):
        if told := list(_held(entry, package, seen)):
            yield from (f"{place}", type(entry).__qualname__, *told)


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object by name, those in slots too."""
    own = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                own[name] = getattr(value, name)
    return own


def _of_class(kind: type) -> Iterator[Any]:
    """Code of a class, and its plain attributes."""
    for name, value in vars(kind).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            yield from (f for f in (value.fget, value.fset) if isinstance(f, FunctionType))
        elif isinstance(value, cached_property):
            yield value.func
        elif isinstance(value, FunctionType):
            yield value
        elif isinstance(value, _PLAIN) and not name.startswith("__"):
            yield (name, value)


def _short(parts: Iterator[Any]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:8]


def _of_function(function: Any, seen: set[int]) -> Iterator[Any]:
    """Code, and the values that it works with."""
    code = function.__code__
    yield from _of_code(code)
    yield from _told(function.__defaults__ or (), seen)
    yield from _told(function.__kwdefaults__ or (), seen)
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # its variable is not bound yet
            continue
        yield from _of_value(value, seen)
    owner = getattr(function, "__self__", None)  # of a method
    if owner is not None and id(owner) not in seen:
        yield from _of_instance(owner, seen | {id(owner)})
    module = getattr(function, "__globals__", {})
    for name in sorted(_names_in_module(code)):
        value = module.get(name)
        if name in module and (isinstance(value, _BY_VALUE) or getattr(value, "__globals__", None) is module):
            yield name
            yield from _of_value(value, seen)


def _of_instance(value: Any, seen: set[int]) -> Iterator[Any]:
    """Type and settings of an object."""
    yield type(value).__qualname__
    own = _attributes(value).items()
    yield {k: v for k, v in own if isinstance(v, _PLAIN) and k != "training"}  # the mode of a network in training
    yield from _of_object(value, seen)


def _of_object(value: Any, seen: set[int]) -> Iterator[Any]:
    """Of an object what its type and its plain settings do not tell."""
    if isinstance(value, partial):
        yield from _told((value.func, value.args, value.keywords), seen)
    elif isinstance(value, nn.Module):
        named = dict([*value.named_parameters(), *value.named_buffers()])
        if list(value.children()):
            yield repr(value)
        if named and not any(tensor.requires_grad for tensor in named.values()):
            yield from _told(named, seen)
    elif type(value).__module__ in ("operator", "_operator"):  # itemgetter(0): its arguments are in its text alone
        yield repr(value)
    else:
        if isinstance(
            name := getattr(value, "__qualname__", None), str
        ):  # of a built-in function, or a tensor's method
            yield name
            yield from _of_value(getattr(value, "__self__", None), seen)
        rest = {k: v for k, v in _attributes(value).items() if not isinstance(v, _PLAIN)}
        yield from _told(rest, seen) if rest else ()


def _of_code(code: CodeType) -> Iterator[Any]:
    """Instructions, names and constants; those of functions within, since their ``repr`` has an address."""
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        elif isinstance(constant, frozenset):  # in another order in each process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _names_in_module(code: CodeType) -> set[str]:
    """Names that a function, or one within it, reads from its module."""
    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_names_in_module(c) for c in code.co_consts if isinstance(c, CodeType)))


def _told(values: Any, seen: set[int]) -> Iterator[str]:
    """Each of several values."""
    for value in values.items() if isinstance(values, Mapping) else values:
        yield from _of_value(value, seen)


def _of_value(value: Any, seen: set[int]) -> Iterator[str]:
    """A value, or where only its type counts, that."""
    if isinstance(value, _PLAIN):
        yield repr(value)
        return
    yield type(value).__qualname__
    inner = seen | {id(value)}
    if isinstance(value, Tensor):
        yield _of_tensor(value)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    elif id(value) in seen:  # a list that holds itself, a function that calls itself
        return
    elif isinstance(value, (*_LISTS, Mapping)):
        yield from _told(value, inner)
    elif isinstance(value, (set, frozenset)):  # in another order in each process
        yield from sorted(" ".join(_of_value(entry, inner)) for entry in value)
    elif isinstance(value, _BY_TEXT):
        yield str(value)
    elif isinstance(value, (FunctionType, MethodType)):
        yield from map(str, _of_function(value, inner))
    elif callable(value) and not isinstance(value, type):
        yield from map(str, _of_instance(value, inner))
    elif isinstance(value, _NAMESPACES):
        yield from _told(vars(value), inner)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _told({f.name: getattr(value, f.name, None) for f in fields(value)}, inner)


def _of_tensor(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"{tensor.dtype} {tuple(tensor.shape)}"
    return tensor_hash([tensor.detach().resolve_conj().resolve_neg()])
