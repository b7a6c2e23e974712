"""Whether several threads may run a model at once: seen by running it in two, step by step in turn.

What a pass writes somewhere and reads again (a list, an object, a global, what a hook keeps) is its own only if no
other pass comes in between. Here another pass always comes in between: at every instruction of the model's code
(PyTorch's own aside, whose modules keep nothing), or at every line where that is too much, two threads take turns, with
other samples and other numbers of samples. Where each still gets the outputs and gradients that the model itself gives
in the caller's thread, nothing is shared that should not be.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, leaves, take
from ntkit.base.caller_context import same_context
from ntkit.base.operation_threads import one_thread
from ntkit.jacobian.replicas import StateOfModules, refers_past_copies, replica

_PATIENCE = 2.0  # seconds beside ten passes until a thread that waits takes the model for one with locks of its own
_MOST = 20_000  # turns: what comes later in a very long pass is not looked at
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__)
_OWN = (_HERE + os.sep, os.path.join(os.path.dirname(_HERE), "base") + os.sep)  # this package, and base
Pass = Callable[[nn.Module, Batch], list[Tensor]]
Found = list[Tensor] | None  # of a pass; None: it failed

_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def known(model: nn.Module, kind: Any, look: Callable[[], bool]) -> bool:
    """`runs_together` of a model on one kind of pass and samples: looked at once, for it takes a tenth of a second."""
    key = (kind, tuple(type(module) for module in model.modules()))
    try:
        answers = _KNOWN.setdefault(model, {})
        if key not in answers:
            answers[key] = look()
        return answers[key]
    except TypeError:  # a model or a function that cannot be a key
        return look()


def runs_together(model: nn.Module, run: Pass, samples: tuple[Batch, ...]) -> bool:
    """Whether two threads that take turns get what the model itself gives.

    Parameters
    ----------
    model : whose modules each thread has its own copies of (`replicas.replica`).
    run : from a model and samples to outputs and gradients; what it gives may change by rounding from thread to thread.
    samples : three batches, see `three_sets`.
    """
    if refers_past_copies(model):
        return False
    before = StateOfModules(model)
    try:
        start = time.monotonic()
        expected = [[t.detach() for t in run(model, x)] for x in samples]
        seconds = max((time.monotonic() - start) / 3, 1e-4)  # of a pass
        patience = 4 * _PATIENCE + 60 * seconds
        between, counter = StateOfModules(model), _Counter()
        works = [partial(_traced, counter, 0, model, run, x) for x in samples]
        alone = [_in_threads([work], counter, patience)[0] for work in works]
        if between.changed() or not all(_alike(a, b) for a, b in zip(alone, expected, strict=True)):
            return False
        length = counter.instructions // 3
        turns = _Turns(length <= _MOST, _PATIENCE + 10 * seconds)  # the other's instruction may be a whole pass
        works = [partial(_traced, turns, i, model, run, x) for i, x in enumerate(samples[:2])]
        found = _in_threads(works, turns, patience)
        if turns.stuck or not all(_alike(a, b) for a, b in zip(found, expected, strict=False)):
            return False

        def other(i: int) -> bool:
            counter = _Counter()
            work = partial(_traced, counter, 1, model, run, samples[i])
            return _alike(_in_threads([work], counter, patience)[0], expected[i])

        within = _Within(length, min(64, max(8, int(0.5 / seconds))), other)
        mine = _in_threads([partial(_traced, within, 0, model, run, samples[0])], within, 64 * patience)[0]
        return within.right and _alike(mine, expected[0])
    finally:
        before.put_back()


def three_sets(x: Batch, most: int = 8) -> tuple[Batch, Batch, Batch] | None:
    """Some samples, others and one fewer, and others equally many; None if all samples are equal."""
    n = count(x)
    other = next((i for i in range(n - 1, 0, -1) if any(not torch.equal(t[i], t[0]) for t in leaves(x))), None)
    if other is None:
        return None
    first = [*range(min(n, most) - 1), other]
    return take(x, first), take(x, [other, *first[:-2]]), take(x, first[::-1])


def _alike(found: list[Tensor] | None, expected: list[Tensor]) -> bool:
    if found is None or len(found) != len(expected):
        return False
    largest = max((float(b.abs().max()) for b in expected if b.numel()), default=0.0)
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if b.numel():  # gradients that vanish by symmetry are rounding of larger ones
            bound = 1e3 * torch.finfo(b.dtype).eps * (float(b.abs().max()) + 0.01 * largest)
            if not ((a - b).abs() <= bound).all():
                return False
    return True


def _in_threads(works: list[partial[Any]], turns: _Turns | _Counter | _Within, patience: float) -> list[Found]:
    """Results of works, each in a thread of its own, as the caller would do them; None for what failed.

    A pass that does not end waits for what the caller has (a lock): it is left, and ends on its copies some time.
    """
    results: list[Found] = [None] * len(works)
    context, grad = same_context(), torch.is_grad_enabled()

    def do(i: int) -> None:
        with context(), one_thread(), torch.set_grad_enabled(grad):
            results[i] = works[i]()

    def run(i: int) -> None:
        try:
            contexts[i].run(do, i)
        except Exception:
            results[i] = None

    contexts = [contextvars.copy_context() for _ in works]
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    interrupt: BaseException | None = None
    end = time.monotonic() + patience
    while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
        try:
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
        except KeyboardInterrupt as again:
            interrupt = again
            turns.end()
    if interrupt is not None:
        raise interrupt
    return list(results)


class _Counter:
    """Counts the instructions of a pass."""

    by_instruction = True

    def __init__(self) -> None:
        self.instructions = 0

    def wait(self, number: int) -> None:
        """Take one in."""
        self.instructions += 1

    def end(self) -> None:
        """Nothing to do."""


class _Within:
    """Another pass, whole, at some places of a pass: what both put into a queue and take out in one order shows so."""

    by_instruction = True

    def __init__(self, instructions: int, places: int, other: Callable[[int], bool]) -> None:
        self.right, self._other, self._count = True, other, 0
        self._step = max(1, instructions // places)

    def wait(self, number: int) -> None:
        """At every so many instructions, the other pass."""
        self._count += 1
        if self.right and self._count % self._step == 0:
            self.right = self._other(1 + self._count // self._step % 2)  # of another size, then of the same

    def end(self) -> None:
        """Nothing to do."""


class _Turns:
    """Two threads in turn; one goes on alone when the other has ended or does not come."""

    def __init__(self, by_instruction: bool, patience: float) -> None:
        self.by_instruction, self.stuck = by_instruction, False
        self._patience = patience  # seconds to wait for one's turn
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
            if not self._change.wait_for(lambda: self._over or self._turn == number, self._patience):
                self._over = self.stuck = True  # the other waits for a lock that this one has: let go
                self._change.notify_all()

    def end(self) -> None:
        """Leave the other alone."""
        with self._change:
            self._over = True
            self._change.notify_all()


def _traced(turns: _Turns | _Counter | _Within, number: int, model: nn.Module, run: Pass, x: Batch) -> list[Tensor]:
    """One pass through copies of the modules, in turn with another."""
    own = replica(model)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            if frame.f_code.co_filename.startswith((_TORCH, *_OWN)):  # the model's own instructions alone count
                return None
            frame.f_trace_opcodes = turns.by_instruction
        elif event == ("opcode" if turns.by_instruction else "line"):
            turns.wait(number)
        return trace

    sys.settrace(trace)  # of this thread alone, which ends with it
    try:
        return [t.detach() for t in run(own, x)]
    finally:
        sys.settrace(None)
        turns.end()
