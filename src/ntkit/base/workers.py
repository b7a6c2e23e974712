"""Workers: threads of our own, one core each, over parts of a task; PyTorch's threads within an operation stay out.

PyTorch splits each operation among its threads, and every small one ends with all of them waiting for the slowest. On
a busy machine that is whoever lost its core. A worker waits for nobody until its part is done. The caller's
``torch.get_num_threads()``, the user's word for the cores that a call may take, is the number of workers. PyTorch
releases Python's lock inside its operations, so threads are enough where these are large.

The workers of a process are shared: calls in several threads take turns with them, so that no more cores are busy than
one call may take. A call from within a worker does its work there and then.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ntkit.base.caller_context import same_context, threads
from ntkit.base.operation_threads import limited, one_thread

_ROWS = 256  # of a product, by one worker

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Here(threading.local):
    inside = False  # whether this thread is a worker with a task in hand


_HERE = _Here()


def workers() -> int:
    """Workers that a call from here may use: the caller's ``torch.get_num_threads()``; one inside a worker."""
    return 1 if _HERE.inside else threads()


def spread(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    done: Callable[[Item], None] | None = None,
) -> list[Result]:
    """``[work(item) for item in items]``, the items shared out among `workers`; each has one thread of PyTorch.

    Parameters
    ----------
    work : called in any order, in several threads at once, in the caller's grad mode and context variables. What it
        changes must belong to its item alone.
    items : as many as `workers` and more, of about the same cost; the expensive ones first.
    done : called in the caller's thread after each item, in the order in which they end.

    Raises
    ------
    Exception
        Of an item, the first in order of those that failed; items not begun are left out. After an interrupt (Ctrl-C),
        too, those begun are ended before it goes on to the caller.

    Examples
    --------
    >>> spread(lambda number: number**2, [1, 2, 3])
    [1, 4, 9]
    """
    if workers() == 1 or not items or (len(items) == 1 and limited()):
        results = []
        for item in items:
            results.append(work(item))
            if done is not None:
                done(item)
        return results
    call = _Call(work, items)
    _POOL.serve(call, min(workers(), len(items)))
    return call.wait(done)


class _Call(Generic[Item, Result]):
    """One call of `spread`: its items, which of them are begun, and what came of them."""

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self._work, self._items = work, items
        self._left = iter(range(len(items)))
        self._change = threading.Condition()  # of what follows
        self._running, self._stopped = 0, False
        self._results: dict[int, Result] = {}
        self._errors: dict[int, BaseException] = {}
        self._grad = torch.is_grad_enabled()
        self._context = same_context()
        self._variables = contextvars.copy_context()

    def take_part(self) -> None:
        """Do items until none is left; called by a worker."""
        with torch.set_grad_enabled(self._grad), self._context():
            self._variables.copy().run(self._do_items)

    def _do_items(self) -> None:
        while (i := self._begin()) is not None:
            try:
                self._end(i, self._results, self._work(self._items[i]))
            except BaseException as error:  # whatever it is, it is the caller's
                self._end(i, self._errors, error)

    def _end(self, i: int, where: dict[int, Any], what: Any) -> None:
        with self._change:
            where[i] = what
            self._stopped = self._stopped or bool(self._errors)
            self._running -= 1
            self._change.notify()

    def _begin(self) -> int | None:
        with self._change:
            i = None if self._stopped else next(self._left, None)
            self._running += i is not None
            return i

    def wait(self, done: Callable[[Item], None] | None) -> list[Result]:
        """Wait for the items; all results, in order."""
        told: set[int] = set()
        try:
            while len(told) < len(self._items) and not self._errors:
                with self._change:
                    while not (new := self._results.keys() - told) and not self._errors:
                        self._change.wait()
                told |= new
                if done is not None:
                    for i in sorted(new):
                        done(self._items[i])
        finally:
            self._finish()
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._results[i] for i in range(len(self._items))]

    def _finish(self) -> None:
        """Begin nothing more, and wait for what is begun: it may be at work on what the caller is about to put back."""
        interrupt: BaseException | None = None
        while True:
            try:
                with self._change:
                    self._stopped = True
                    self._change.wait_for(lambda: not self._running)
                break
            except KeyboardInterrupt as again:
                interrupt = again
        if interrupt is not None:
            raise interrupt


class _Pool:
    """The worker threads of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call[Any, Any]] = queue.SimpleQueue()
        self._threads = 0

    def serve(self, call: _Call[Any, Any], number: int) -> None:
        """Put `number` workers to a call, as they become free."""
        with self._lock:
            if self._threads < number:
                self._start(number - self._threads)
        for _ in range(number):
            self._calls.put(call)

    def _start(self, number: int) -> None:
        for _ in range(number):
            threading.Thread(target=self._run, args=(self._calls,), name="ntkit worker", daemon=True).start()
        self._threads += number

    @staticmethod
    def _run(calls: queue.SimpleQueue[_Call[Any, Any]]) -> None:
        _HERE.inside = True
        with one_thread():
            while True:
                calls.get().take_part()


_POOL = _Pool()


def _forget_workers() -> None:
    global _POOL
    _POOL, _HERE.inside = _Pool(), False  # a fork copies no threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices, some rows by each worker; on a GPU as it is.

    Examples
    --------
    >>> product(torch.ones(2, 3), torch.ones(3, 1)).tolist()
    [[3.0], [3.0]]
    """
    if a.device.type != "cpu":
        return a @ b
    out = a.new_empty(len(a), b.shape[1])

    def work(start: int) -> None:
        torch.mm(a[start : start + _ROWS], b, out=out[start : start + _ROWS])

    with torch.no_grad():
        spread(work, range(0, len(a), _ROWS))
    return out
