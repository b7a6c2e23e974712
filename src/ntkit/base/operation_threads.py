"""One thread within an operation, for the thread that asks and for no other: OpenMP's number and MKL's.

``torch.set_num_threads`` would set the number of threads that start later, too.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


class _Before(threading.local):
    numbers: tuple[int, int] | None = None  # PyTorch's and MKL's, outside of `one_thread`


_BEFORE = _Before()


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations called inside, by this thread, run in it alone."""
    number = torch.get_num_threads()  # a thread's first question sets its number, so it must come before ours
    outer, mkl = _BEFORE.numbers, _mkl()(1)
    _BEFORE.numbers = outer or (number, mkl)
    try:
        with _openmp().limit(limits=1):
            yield
    finally:
        _mkl()(mkl)
        _BEFORE.numbers = outer


def limited() -> bool:
    """Whether this thread is inside of `one_thread`."""
    return _BEFORE.numbers is not None


@contextmanager
def threads_of_caller() -> Iterator[None]:
    """Inside of `one_thread`, with as many threads as outside: what is repeated of a run must be so to the last bit."""
    if _BEFORE.numbers is None:
        yield
        return
    number, mkl = _BEFORE.numbers
    inner = _mkl()(mkl)
    try:
        with _openmp().limit(limits=number):
            yield
    finally:
        _mkl()(inner)


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


@cache
def _mkl() -> Callable[[int], int]:
    """MKL's own setter of this thread's number (0: none of its own), which gives the number before."""
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        return library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # a PyTorch without MKL
        return lambda number: number
