"""Whether several threads may run a model at once: seen by running it in two, line by line in turn.

What a forward pass writes somewhere and reads again (a list, an object, a global, what a hook keeps) is its own only if
no other pass comes in between. Here another pass always comes in between: at every line of the model's code (PyTorch's
own aside, whose modules keep nothing) the two threads take turns, with other samples and other numbers of samples.
Where each still gets its own outputs, to the bit, nothing is shared that should not be.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, leaves, take
from ntkit.base.caller_context import same_context
from ntkit.jacobian.replicas import StateOfModules, replica

_PATIENCE = 20.0  # seconds until a thread that waits for its turn takes the model for one with locks of its own

_MOST = 20_000  # turns: what comes later in a very long pass is not looked at
_TORCH = os.path.dirname(torch.__file__) + os.sep


def runs_together(model: nn.Module, forward: Callable[[nn.Module, Batch], Any], x: Batch) -> bool:
    """Whether two threads that take turns at every line get the outputs that each gets alone.

    Parameters
    ----------
    model : whose modules each thread has its own copies of (`replicas.replica`).
    forward : from model and samples to outputs.
    x : samples; without two different ones nothing can be seen, and the answer is no.
    """
    n = count(x)
    other = next((i for i in range(n - 1, 0, -1) if any(not torch.equal(t[i], t[0]) for t in leaves(x))), None)
    if other is None:
        return False
    samples = [take(x, [0, other]), take(x, [other, 0, other])]
    state = StateOfModules(model)
    alone = [_in_threads([partial(_alone, model, forward, own)])[0] for own in samples]
    if state.changed():
        return False
    turns = _Turns()
    taking = [partial(_with_turns, turns, i, model, forward, own) for i, own in enumerate(samples)]
    return all(_same(a, b) for a, b in zip(alone, _in_threads(taking), strict=True))


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def _in_threads(works: list[partial[Any]]) -> list[Any]:
    """Results of works, each in a thread of its own, as the caller would do them; None for what failed."""
    results: list[Any] = [None] * len(works)
    context, grad = same_context(), torch.is_grad_enabled()

    def run(i: int) -> None:
        try:
            with context(), torch.set_grad_enabled(grad):
                out = works[i]()
            results[i] = out.detach() if isinstance(out, Tensor) else None
        except Exception:
            results[i] = None

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class _Turns:
    """Two threads in turn; one goes on alone when the other has ended or does not come."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._turn, self._over, self._left = 0, False, _MOST

    def wait(self, number: int) -> None:
        """Hand the turn on, and wait for one's own."""
        with self._change:
            self._left -= 1
            if self._over or self._left < 0:
                self._over = True
                self._change.notify_all()
                return
            self._turn = 1 - number
            self._change.notify_all()
            if not self._change.wait_for(lambda: self._over or self._turn == number, _PATIENCE):
                self._over = True
                raise TimeoutError

    def end(self) -> None:
        """Leave the other alone."""
        with self._change:
            self._over = True
            self._change.notify_all()


def _tracer(turns: _Turns, number: int) -> Callable[..., Any]:
    """For `sys.settrace`: waits for the turn of its thread before every line of code that is not PyTorch's."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            return None if frame.f_code.co_filename.startswith(_TORCH) else trace
        if event == "line":
            turns.wait(number)
        return trace

    return trace


def _alone(model: nn.Module, forward: Callable[[nn.Module, Batch], Any], x: Batch) -> Any:
    return forward(replica(model), x)


def _with_turns(
    turns: _Turns, number: int, model: nn.Module, forward: Callable[[nn.Module, Batch], Any], x: Batch
) -> Any:
    own = replica(model)
    sys.settrace(_tracer(turns, number))  # of this thread alone, which ends with it
    try:
        return forward(own, x)
    finally:
        sys.settrace(None)
        turns.end()
