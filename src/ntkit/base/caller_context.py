"""What is open around a call: autocast, inference mode, a default device. It is meant for the model, not for our sums.

Everything of ours runs in `own_context`, as if nothing were open; the model's own forward pass runs in
`caller_context`, as the caller wrote it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ntkit.base.checks import refusal
from ntkit.base.operation_threads import one_thread


@dataclass(frozen=True)
class _Open:
    """Autocast dtype by device type, the default device where it is not the CPU, number of threads, grad mode."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    device: torch.device | None
    threads: int
    grad: bool = False


class _Caller(threading.local):
    now: _Open | None = None  # of the call in hand; None outside of every call


_CALLER = _Caller()
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


@contextmanager
def own_context() -> Iterator[None]:
    """Switch off autocast, inference mode, a default device and threads within operations, and remember them.

    The first three come back in `caller_context`. Threads do not: our `base.workers` take their place.

    It may be opened again inside. Use it as a context or, with its parentheses, as a decorator.

    Raises
    ------
    Refused
        Inside a transform of ``torch.func`` (vmap, grad, jvp ...): no values exist there to compute with.
    """
    if _CALLER.now is not None:
        yield
        return
    if _inside_transform():
        raise refusal(
            "ntkit",
            got="a call inside a transform of torch.func",
            expected="plain tensors",
            fix="Call it outside of vmap, grad and jvp.",
        )
    _CALLER.now = caller = _what_is_open()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            for device, dtype in caller.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled=False))
            if caller.device is not None:
                stack.enter_context(torch.device("cpu"))
            if caller.threads > 1:
                stack.enter_context(one_thread())
            yield
    finally:
        _CALLER.now = None


def grad_mode() -> bool:
    """The caller's ``torch.is_grad_enabled()``; inside, switching off inference mode has switched it on."""
    return torch.is_grad_enabled() if _CALLER.now is None else _CALLER.now.grad


def threads() -> int:
    """The caller's ``torch.get_num_threads()``."""
    return torch.get_num_threads() if _CALLER.now is None else _CALLER.now.threads


@contextmanager
def no_context() -> Iterator[None]:
    """As `own_context`, and the model runs so, too: in a recorded run the context of today means nothing."""
    with own_context():
        before, _CALLER.now = _CALLER.now, replace(_NOTHING, threads=threads())
        try:
            yield
        finally:
            _CALLER.now = before


def same_context() -> Callable[[], AbstractContextManager[None]]:
    """A context for other threads in which they work as this one does now."""
    caller = _CALLER.now

    @contextmanager
    def carried() -> Iterator[None]:
        before, _CALLER.now = _CALLER.now, caller
        try:
            yield
        finally:
            _CALLER.now = before

    return carried


@contextmanager
def caller_context() -> Iterator[None]:
    """Open again, for the model's own forward pass, what the caller had open around the call."""
    caller = _CALLER.now
    if caller is None or not (caller.autocast or caller.device):
        yield
        return
    with ExitStack() as stack:
        for device, dtype in caller.autocast:
            # without its cache: that may hold casts of parameters that were made without a graph
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        if caller.device is not None:
            stack.enter_context(caller.device)
        yield


_NOTHING = _Open((), None, 1)


def _what_is_open() -> _Open:
    # newer releases know more device types, older ones raise for those that they do not know
    types = [t for t in _DEVICES if _autocast(t)]
    device = torch.empty(0).device  # torch.get_default_device() of torch 2.6 says cpu inside torch.device(...)
    autocast = tuple((t, torch.get_autocast_dtype(t)) for t in types)
    return _Open(autocast, None if device.type == "cpu" else device, torch.get_num_threads(), torch.is_grad_enabled())


def _autocast(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:
        return False


def _inside_transform() -> bool:
    functorch: Any = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None
