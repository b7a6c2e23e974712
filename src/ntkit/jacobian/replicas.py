"""One model in several threads at once: copies of its modules over the same parameters, and when that is safe.

A forward pass may store a value on its module and read it again (``self.hidden = h``). In two threads each would read
the other's. So each worker calls its own copies of the modules, which share parameters and buffers. What copies of the
modules do not keep apart (a list that grows, a buffer that is overwritten) shows in `jacobian.lockstep`: such a model
goes through in one thread.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ntkit.jacobian.model_outputs import PartHook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
_DEPTH = 4  # of containers and objects looked into
_MOST = 100_000  # values looked at; a model with more goes through in one thread


def replica(model: nn.Module) -> nn.Module:
    """A copy of a model's modules, each with attributes of its own, over the same parameters and buffers."""
    return replicas(model)[model]


def replicas(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The copy of each module of a model (see `replica`)."""
    copies: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        copy = copies[module] = object.__new__(type(module))
        copy.__dict__ = module.__dict__.copy()
        for name in ("_parameters", "_buffers", *_HOOKS):
            copy.__dict__[name] = module.__dict__[name].copy()
    for module, copy in copies.items():
        children = module.__dict__["_modules"]
        copy.__dict__["_modules"] = type(children)(
            (name, None if child is None else copies[child]) for name, child in children.items()
        )
    return copies


def in_one_thread(model: nn.Module) -> bool:
    """Whether a model has what its copies would share or lack.

    Hooks of the user's, scripted or compiled modules, a forward that was put on a module, a module that does something
    when it is thrown away.
    """
    if any(getattr(torch_modules, name, None) for name in _EVERYWHERE) or modes_open():
        return True
    return any(
        isinstance(module, torch.jit.ScriptModule)
        or not isinstance(module.__dict__.get("_modules"), dict)
        or "_orig_mod" in module.__dict__["_modules"]
        or "forward" in module.__dict__
        or module.__dict__.get("_compiled_call_impl") is not None
        or hasattr(type(module), "__del__")
        or any(_users(hook) for name in _HOOKS for hook in module.__dict__.get(name, {}).values())
        for module in model.modules()
    )


def refers_past_copies(model: nn.Module) -> bool:
    """Whether something on the modules leads to a module otherwise than as a child: it would lead to the original."""
    own, values = set(model.modules()), _values(model)
    children = {id(module._modules) for module in own}
    return values is None or any(
        (isinstance(value, nn.Module) and value not in own)
        or (id(value) not in children and any(isinstance(part, nn.Module) for part in _held(value)))
        for value, _ in values
    )


def _held(value: Any) -> list[Any]:
    """What a container, a module's own dictionary, a method, a partial function or a closure holds."""
    if isinstance(value, nn.Module):
        return list(vars(value).values())
    if isinstance(value, partial):
        return [*value.args, *value.keywords.values(), *_held(value.func)]
    if not callable(value):
        return list(_parts(value))
    cells = []
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # its variable is not bound yet
            cells.append(cell.cell_contents)
    return [getattr(value, "__self__", None), *cells]


def _users(hook: Any) -> bool:
    """Whether a hook is not one of PyTorch's own or ours, which keep nothing."""
    if isinstance(hook, PartHook):
        return False
    owner = getattr(hook, "__func__", hook)
    where = getattr(owner, "__module__", None) or type(owner).__module__
    return not where.startswith("torch.")


def modes_open() -> bool:
    """Whether the caller's thread watches or changes operations, as no other thread would."""
    overrides: Any = torch.overrides
    dispatch: Any = sys.modules.get("torch.utils._python_dispatch")
    return bool(overrides._get_current_function_mode_stack()) or bool(
        dispatch is not None and dispatch._get_current_dispatch_mode_stack()
    )


class StateOfModules:
    """What the modules of a model hold beside parameters: to see whether a pass has left something there."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values = None if (values := _values(model)) is None else list(values)
        self._contents = [(value, _copied(value)) for value, _ in self._values or () if _container(value)]

    def changed(self) -> bool:
        """Whether anything was bound, appended or overwritten since; True where there is too much to look at."""
        now = _values(self._model)
        if self._values is None or now is None or len(now) != len(self._values):
            return True
        return any(a is not b or v != w for (a, v), (b, w) in zip(self._values, now, strict=True))

    def put_back(self) -> None:
        """Give containers and objects what they held."""
        for value, held in self._contents:
            if isinstance(value, (list, deque)):
                if len(value) != len(held) or any(a is not b for a, b in zip(value, held, strict=True)):
                    value.clear()
                    value.extend(held)
            elif (own := value if isinstance(value, (dict, set)) else vars(value)) != held:
                own.clear()
                own.update(held)


def _container(value: Any) -> bool:
    """Whether a value can be changed in place, and put back: not a module, which every thread has copies of."""
    return type(value) in (list, deque, set, dict) or (
        not isinstance(value, (nn.Module, Tensor, type)) and not callable(value) and hasattr(value, "__dict__")
    )


def _copied(value: Any) -> Any:
    return (
        list(value)
        if isinstance(value, (list, deque))
        else (value.copy() if isinstance(value, (dict, set)) else vars(value).copy())
    )


def _values(model: nn.Module) -> list[tuple[Any, int]] | None:
    """Every value that hangs on the modules, and of tensors how often they were written to; None for too many."""
    found: list[tuple[Any, int]] = []
    waiting: deque[tuple[Any, int]] = deque((module, 0) for module in model.modules())
    seen: set[int] = set()
    while waiting:
        value, depth = waiting.popleft()
        found.append((value, value._version if isinstance(value, Tensor) and not value.is_inference() else 0))
        if len(found) > _MOST:
            return None
        if id(value) not in seen and depth < _DEPTH:
            seen.add(id(value))
            waiting.extend((part, depth + (not isinstance(value, nn.Module))) for part in _parts(value))
    return found


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield part
    elif isinstance(value, nn.Module) or not (isinstance(value, (Tensor, type, str, bytes)) or callable(value)):
        yield from getattr(value, "__dict__", {}).values()
