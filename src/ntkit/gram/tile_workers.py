"""Tiles of a kernel matrix by other processes, through Dask: of this machine, or wherever a scheduler has workers.

The kernel and the samples go to each worker once, in memory between processes of one user: a `NamedKernel` as its
factory's name and safetensors, another one as a pickle; nothing is ever unpickled from a file. Workers write the tiles
themselves: the folder must be the same for all of them.
"""

from __future__ import annotations

import logging
import mmap
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntkit.base.batch import mapped
from ntkit.base.checks import Refused, refusal
from ntkit.base.numbers import as_integer
from ntkit.base.versions import versions
from ntkit.data.streamed_samples import StreamedSamples
from ntkit.gram.named_kernel import NamedKernel
from ntkit.gram.tile_files import TileFiles
from ntkit.gram.tile_work import Samples, TileWork, as_samples
from ntkit.kernels.kernel import Kernel

Tile = tuple[int, int]
Say = Callable[[str], None]

_RETRIES = 3
_PATIENCE = 60.0  # seconds without a worker, before a message says so and it is waited for
_TASKS = 4  # per worker at least: the last to end leaves the others idle for a quarter of its time
_LARGEST = 16  # tiles of a task: what a worker loses of its work at most when it dies, written tiles apart


def check_workers(workers: int, scheduler: str | None) -> None:
    """Refuse a number that is none, both a number and a scheduler, and other processes where Dask is not installed."""
    as_integer(workers, "workers", "a positive integer", "Take the number of cores.", least=1)
    if scheduler is not None and workers != 1:
        fix = "Leave workers out: the scheduler has its own."
        raise refusal("workers", got="a number and a scheduler", expected="one of them", fix=fix)
    if workers > 1 or scheduler is not None:
        distributed()


@dataclass(frozen=True)
class Sent:
    """What a worker needs, once for all of its tiles; `x` has arrays on disk by the names of their files."""

    folder: Path
    identity: str
    kernel: Kernel | NamedKernel
    x: Any
    memory: int | None
    device: torch.device


@dataclass(frozen=True)
class _FileArray:
    """An array on disk that workers open by themselves."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    order: str

    def open(self) -> np.ndarray:
        return np.memmap(self.name, self.dtype, "r", self.offset, self.shape, self.order)  # pyrefly: ignore


def by_file_names(given: Any, x: Samples) -> Any:
    """The samples `x` as they were given, each ``numpy.memmap`` of a whole file by the name of the file."""
    if isinstance(x, StreamedSamples):
        return x

    def named(leaf: Any) -> Any:
        if not isinstance(leaf, np.memmap) or not isinstance(leaf.base, mmap.mmap) or leaf.filename is None:
            return leaf
        order = "C" if leaf.flags.c_contiguous else "F"
        return _FileArray(str(leaf.filename), leaf.dtype.str, leaf.shape, leaf.offset, order)

    return mapped(given, named)


def copied_bytes(sent: Any) -> int:
    """Bytes of the samples that each worker has a copy of, of what `by_file_names` returned."""
    if isinstance(sent, StreamedSamples):
        return 0
    found = 0

    def add(part: Any) -> None:
        nonlocal found
        found += getattr(part, "nbytes", 0)  # of tensors and arrays

    mapped(sent, add)
    return found


def _opened(x: Any) -> Samples:
    if isinstance(x, StreamedSamples):
        return x

    return as_samples(mapped(x, lambda leaf: leaf.open() if isinstance(leaf, _FileArray) else leaf))


def compute(
    sent: Sent,
    bands: list[list[Tile]],
    workers: int,
    scheduler: str | None,
    advance: Callable[[float], None],
    say: Say | None = None,
) -> None:
    """Have all tiles computed and written; a tile that fails again and again is set aside until the others are done.

    Raises
    ------
    Refused
        At the end, for tiles that failed: says which, and what the first ended with.
    """
    as_completed = distributed().as_completed
    with _client(workers, scheduler, say) as client:
        number = max(1, len(client.ncores()))
        if say is not None:
            page = f"; Dask shows what they do: {client.dashboard_link}" if find_spec("bokeh") else ""
            say(f"{number} worker{'s' * (number != 1)}{page}")
        total = sum(len(band) for band in bands)
        size = max(1, min(_LARGEST, total // (_TASKS * number)))
        strips = [band[i : i + size] for band in bands for i in range(0, len(band), size)]
        given = client.scatter(sent, broadcast=True, hash=False)
        how = {"pure": False, "retries": _RETRIES, "resources": _resources(client, sent.device)}
        tasks = {client.submit(compute_strip, given, strip, **how): strip for strip in strips}
        failed: dict[str, tuple[list[Tile], str]] = {}
        # futures that are held would be computed again when the worker that has them dies
        ended = as_completed(list(tasks), loop=client.loop)
        for future in ended:
            strip = tasks.pop(future)
            if future.status == "finished":
                advance(len(strip))
            elif future.status in ("cancelled", "lost"):
                fix = "Start it again; the tiles that are written are kept, and the same call goes on."
                raise refusal("scheduler", got="one that is gone", expected="a running Dask scheduler", fix=fix)
            else:
                failed[str(strip)] = (strip, _reason(future))
            future.release()
            del future
    if failed:
        raise _summary(sent.folder, list(failed.values()), total)


def distributed() -> Any:
    """The package, or a refusal that says how it is installed."""
    try:
        import distributed
    except ImportError as error:
        got, fix = "no distributed in this Python", "Run: pip install dask distributed"
        raise refusal("workers", got=got, expected="the package distributed", fix=fix) from error
    return distributed


def _resources(client: Any, device: torch.device) -> dict[str, float] | None:
    """One GPU for each task of a kernel on GPUs, where the scheduler's workers say which have one."""
    if device.type == "cpu":
        return None
    own = [worker.get("resources", {}) for worker in client.scheduler_info()["workers"].values()]
    return {"GPU": 1} if any("GPU" in resources for resources in own) else None


def _reason(future: Any) -> str:
    error = future.exception()
    return error.reason if isinstance(error, TilesFailed) else f"{type(error).__name__}: {error}"


def _summary(folder: Path, failed: list[tuple[list[Tile], str]], total: int) -> Refused:
    files = TileFiles(folder)
    missing = [tile for strip, _ in failed for tile in strip if not files.file(*tile).exists()]
    reason = next((why for strip, why in failed if any(not files.file(*tile).exists() for tile in strip)), failed[0][1])
    print(reason, file=sys.stderr)
    got = f"{len(missing)} of {total} tiles that failed {_RETRIES + 1} times, {missing[:5]} first, with {_last(reason)}"
    fix = "The other tiles are in the store; the same call goes on with those that are missing."
    return refusal(str(folder), got=got, expected="all tiles", fix=fix)


def _last(reason: str) -> str:
    return reason.strip().splitlines()[-1] if reason.strip() else "no message"


@contextmanager
def _client(workers: int, scheduler: str | None, say: Say | None) -> Iterator[Any]:
    """Connect to a scheduler, or to worker processes of this machine that end with the work.

    Never as the default client: the arrays of the user would go to it, and wait for ever where there is no scheduler.
    """
    dask = distributed()
    if scheduler is None:
        how = {"dashboard_address": ":0", "memory_limit": None, "silence_logs": logging.ERROR}
        cluster = dask.LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, **how)
        with cluster, dask.Client(cluster, set_as_default=False) as client:
            client.register_plugin(_without_interrupts())
            yield client
        return
    try:
        client = dask.Client(scheduler, timeout=30, set_as_default=False)
    except (OSError, ValueError) as error:
        fix = "Start it with `dask scheduler`, and give the address that it prints."
        expected = "the address of a running Dask scheduler"
        raise refusal("scheduler", got=f"{scheduler} ({error})", expected=expected, fix=fix) from error
    with _quiet(), client:
        while not client.ncores():  # a cluster's queue may take hours
            with suppress(TimeoutError):
                client.wait_for_workers(1, timeout=_PATIENCE)
                break
            (say or _print)(f"waiting for a worker of {scheduler}; start one with: dask worker {scheduler}")
        yield client


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Dask logs of a connection that breaks: the end of the call says it."""
    logger = logging.getLogger("distributed.client")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- in a worker


def _without_interrupts() -> Any:
    """Ctrl-C reaches all processes of a terminal: that of the call ends the workers, which need not answer it."""
    from distributed import WorkerPlugin

    class WithoutInterrupts(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            logging.getLogger("distributed").setLevel(logging.ERROR)

    return WithoutInterrupts()


class TilesFailed(Exception):
    """Tiles that could not be computed; `reason` is the traceback of the first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_AT_HAND: dict[tuple[str, str], tuple[TileFiles, TileWork]] = {}  # by folder and identity: of the last store only
_ONE = threading.Lock()  # a worker's threads take turns: the factors are kept once


def compute_strip(sent: Sent, tiles: list[Tile]) -> None:
    """Compute and write those tiles of a strip that are not there."""
    with _ONE:
        files, work = _at_hand(sent)
        rows, reasons = {i for i, _ in tiles}, []
        for i, j in tiles:
            if files.file(i, j).exists():  # of an attempt that failed, or whose worker died, later
                continue
            try:
                files.write(i, j, work.value(i, j, rows))
            except Exception:  # reported at the end; the other tiles are computed
                reasons.append(f"tile ({i}, {j}):\n{traceback.format_exc()}")
        if reasons:
            raise TilesFailed(reasons[0])


def _keep_global_generator() -> None:
    """Give Dask's modules in this worker a random generator of their own.

    Its event loop draws waiting times from Python's global one while a network runs in another thread, and a network
    during whose run that changes is refused as one that draws random numbers.
    """
    own, everyones = random.Random(), getattr(random.random, "__self__", None)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("dask", "distributed", "tornado"):
            continue
        for entry, value in list(vars(module).items()):
            if value is random:
                vars(module)[entry] = own
            elif everyones is not None and getattr(value, "__self__", None) is everyones:  # from random import randint
                vars(module)[entry] = getattr(own, value.__name__)


def _at_hand(sent: Sent) -> tuple[TileFiles, TileWork]:
    key = (str(sent.folder), sent.identity)
    if key not in _AT_HAND:
        _AT_HAND.clear()
        _keep_global_generator()
        files = TileFiles(sent.folder)
        own = {name: files.depends_on.get(name) for name in ("ntkit", "torch")}
        here = {name: version for name, version in versions().items() if name in own}
        if files.identity != sent.identity or own != here:
            got = f"{here} and the matrix {files.identity[:8]}"
            expected = f"{own} and {sent.identity[:8]}, as the process that began"
            raise refusal("worker", got=got, expected=expected, fix="Give all workers one folder and one environment.")
        kernel = sent.kernel.kernel if isinstance(sent.kernel, NamedKernel) else sent.kernel
        work = TileWork(kernel, _opened(sent.x), files.grid.size, sent.memory, sent.device)
        work.follow(files)
        _AT_HAND[key] = files, work
    return _AT_HAND[key]
