"""One thread within an operation, for the thread that asks and for no other: OpenMP's number and MKL's.

``torch.set_num_threads`` would set the number of threads that start later, too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations called inside, by this thread, run in it alone."""
    torch.get_num_threads()  # a thread's first question sets its number, so it must come before ours
    before = _mkl()(1)
    try:
        with _openmp().limit(limits=1):
            yield
    finally:
        _mkl()(before)


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
