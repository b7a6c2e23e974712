"""Progress of long work: a bar on a terminal and in a notebook, plain lines elsewhere, no output for short work."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ntkit.base.imports import same_random_numbers

_SILENT = 2.0  # seconds before the first output: short calls print nothing
_LONG = 20.0  # expected seconds from which the duration is printed beforehand
_LINE_EVERY = 20.0  # seconds between plain lines, where no terminal redraws a bar
_BAR, _BAR_EVERY = 30, 0.2  # of a notebook's bar: characters, and seconds between drawings


@contextmanager
def stop_note(say: Callable[[str], None]) -> Iterator[None]:
    """On Ctrl-C, say that what is finished is kept, where the same command or call goes on from it."""
    try:
        yield
    except KeyboardInterrupt:
        say("Stopped. What is finished is kept; the same command or call goes on.")
        raise


class Task:
    """One piece of long work; call `advance` after each part."""

    def __init__(self, label: str, total: float, stream: TextIO) -> None:
        self.label, self.total, self.done = label, total, 0.0
        self._stream, self._start, self._last = stream, time.monotonic(), 0.0
        self._bar = None
        self.silent = False

    def advance(self, amount: float = 1.0) -> None:
        """Report that `amount` more of `total` is done."""
        self.done += amount
        elapsed = time.monotonic() - self._start
        if self.silent or elapsed < _SILENT:
            return
        left = elapsed * (self.total - self.done) / self.done if self.done else float("nan")
        if self._stream.isatty():
            self._draw()
        elif in_notebook(self._stream):
            if elapsed - self._last > _BAR_EVERY or self.done >= self.total:
                self._last = elapsed
                full = round(_BAR * self.done / self.total) if self.total else _BAR
                bar = "█" * full + "░" * (_BAR - full)
                print(f"\r{self.label} {bar} {clock(left)} left ", end="", file=self._stream, flush=True)
        elif elapsed - self._last > _LINE_EVERY or (self.done >= self.total and self._last):
            self._last = elapsed
            print(f"{self.label}: {self.done / self.total:.0%}, {clock(left)} left", file=self._stream, flush=True)

    def expect(self, seconds: float) -> None:
        """Print how long the work will take, if it will take long."""
        if not self.silent and seconds > _LONG:
            print(f"{self.label}: about {clock(seconds)}", file=self._stream, flush=True)

    def _draw(self) -> None:
        if self._bar is None:
            with same_random_numbers():
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("left"))
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._bar.start()
            self._id = self._bar.add_task(self.label, total=self.total)
        self._bar.update(self._id, completed=self.done)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last and in_notebook(self._stream):
            print(file=self._stream)


def in_notebook(stream: TextIO) -> bool:
    """Whether a stream is that of a Jupyter kernel, which overwrites a line after a carriage return."""
    return type(stream).__module__.startswith("ipykernel.")


def clock(seconds: float) -> str:
    """Text such as "3 min 07 s" or "2 h 05 min"."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


_active: list[Task] = []
_shown = True
_log = logging.getLogger("ntkit")
_log.addHandler(logging.NullHandler())  # a library prints no records unless its user asks


def show(wanted: bool) -> None:
    """Show the progress of all further work, or none of it. The logger "ntkit" gets its records in any case."""
    global _shown
    _shown = wanted


@contextmanager
def task(label: str, total: float) -> Iterator[Task]:
    """Show the progress of `total` units of work under a label; tasks inside another task print nothing.

    Examples
    --------
    >>> with task("counting", total=3) as work:
    ...     for _ in range(3):
    ...         work.advance()
    >>> work.done
    3.0
    """
    work = Task(label, total, sys.stderr)
    work.silent = bool(_active) or not _shown
    _active.append(work)
    try:
        yield work
    finally:
        _active.remove(work)
        work._close()
        seconds = time.monotonic() - work._start
        if not _active and seconds >= _SILENT:
            _log.info("%s: %.0f of %.0f in %s", label, work.done, total, clock(seconds))
