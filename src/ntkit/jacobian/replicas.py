"""One model in several threads at once: copies of its modules over the same parameters, and when that is safe.

A forward pass may store a value on its module and read it again (``self.hidden = h``). In two threads each would read
the other's. So each worker calls its own copies of the modules, which share parameters and buffers. What copies of the
modules do not keep apart (a list that grows, a buffer that is overwritten, what a hook writes) is looked for in the
self-check: such a model goes through in one thread.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
_DEPTH = 4  # of containers and objects looked into
_MOST = 100_000  # values looked at; a model with more goes through in one thread


def replica(model: nn.Module) -> nn.Module:
    """A copy of a model's modules, each with attributes of its own, over the same parameters and buffers."""
    copies: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        copy = copies[module] = object.__new__(type(module))
        copy.__dict__ = module.__dict__.copy()
        for name in ("_parameters", "_buffers"):
            copy.__dict__[name] = module.__dict__[name].copy()
    for module, copy in copies.items():
        children = module.__dict__["_modules"]
        copy.__dict__["_modules"] = type(children)(
            (name, None if child is None else copies[child]) for name, child in children.items()
        )
    return copies[model]


def in_one_thread(model: nn.Module) -> bool:
    """Whether a model has what its copies would share or lack: hooks of the user's, scripted or compiled modules."""
    if any(getattr(torch_modules, name, None) for name in _EVERYWHERE) or modes_open():
        return True
    return any(
        isinstance(module, torch.jit.ScriptModule)
        or not isinstance(module.__dict__.get("_modules"), dict)
        or "_orig_mod" in module.__dict__["_modules"]
        or any(_users(hook) for name in _HOOKS for hook in module.__dict__.get(name, {}).values())
        for module in model.modules()
    )


def _users(hook: Any) -> bool:
    """Whether a hook is not one of PyTorch's own, which keep nothing."""
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
    """What the modules of a model hold beside parameters: to see whether a forward pass has left something there."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values = None if (values := _values(model)) is None else list(values)

    def changed(self) -> bool:
        """Whether anything was bound, appended or overwritten since; True where there is too much to look at."""
        now = _values(self._model)
        if self._values is None or now is None or len(now) != len(self._values):
            return True
        return any(a is not b or v != w for (a, v), (b, w) in zip(self._values, now, strict=True))


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
    elif not isinstance(value, (Tensor, type, str, bytes)) and hasattr(value, "__dict__") and not callable(value):
        yield from vars(value).values()
    elif isinstance(value, nn.Module):
        yield from vars(value).values()
