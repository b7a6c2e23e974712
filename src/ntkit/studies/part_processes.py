"""Parts of a study by several processes of one thread each: small networks gain nothing from threads in operations."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from ntkit.base.checks import refusal
from ntkit.base.memory import free_memory
from ntkit.base.progress import show
from ntkit.studies.part import StudyPart, Work

_EACH = 3 * 2**30  # bytes of a process: PyTorch itself, and a part of the scale quick, together at most 1.6 GB
# NumPy and SciPy bring threads of their own, which PyTorch's number does not reach: two processes with two each wait
# for each other more than they compute.
_ALONE = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def processes() -> int:
    """Number of processes for small parts: as many as threads, as far as memory goes; one on a GPU, which is shared."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(torch.get_num_threads(), free_memory(torch.device("cpu")) // _EACH))


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: in small networks threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(work: Work, parts: Sequence[StudyPart], number: int, between: Callable[[bool], None]) -> None:
    """Compute those of the parts that are not finished, by `number` processes.

    With one process in the given order, here. Finished parts are read; damaged ones are computed again.

    Parameters
    ----------
    between : called before the first part that is not finished, with False, and after each, with True.

    Raises
    ------
    Refused
        Where the system has ended a process.
    Exception
        What the first part ended with that failed. Then, and after Ctrl-C, the other processes are ended, too: parts
        they have begun are computed again in the next call, their training from its last checkpoint on.
    """
    left = [part for part in parts if not work.finished(part)]
    begun = {part.name for part in left}
    for part in parts:
        if part.name not in begun:
            work.result(part)
    if left:
        between(False)
    if min(number, len(left)) > 1:
        _by_processes(work, left, number, between)
        return
    for part in left:
        work.result(part)
        between(True)


def _by_processes(work: Work, parts: Sequence[StudyPart], number: int, between: Callable[[bool], None]) -> None:
    from joblib.externals.loky import get_reusable_executor, wait  # slow to import
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    silent = replace(work, progress=_say_nothing)  # lines of several processes would mix
    work.progress(f"{len(parts)} parts by {number} processes: {parts[0].name} to {parts[-1].name}")
    pool, count = get_reusable_executor(max_workers=number, initializer=_start, env=_ALONE), 0
    waiting = reversed(parts)  # widths grow along a list: the long ones first, so that no process waits at the end
    running: set[Any] = set()
    try:
        running |= {pool.submit(_finish, silent, part) for part in islice(waiting, number)}
        while running:
            done, running = wait(running, return_when="FIRST_COMPLETED")
            for name in [future.result() for future in done]:
                running |= {pool.submit(_finish, silent, part) for part in islice(waiting, 1)}
                count += 1
                work.progress(f"[{count} of {len(parts)}] {name}")
                between(True)
    except TerminatedWorkerError as error:
        got, fix = "a process that the system has ended", "If memory is short, use one: OMP_NUM_THREADS=1. Then go on."
        raise refusal("study", got=got, expected="processes that live until the end", fix=fix) from error
    except BaseException:
        # a pool that is killed before it has passed on what it was given prints an error of its own
        while not all(future.running() or future.done() for future in running):
            time.sleep(0.01)
        pool.shutdown(kill_workers=True)
        raise


def _start() -> None:
    """Prepare a process: Ctrl-C, which reaches all of them, is the first one's, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    show(False)


def _finish(work: Work, part: StudyPart) -> str:
    work.result(part)
    return part.name


def _say_nothing(line: str) -> None:
    """Leave out a line."""
