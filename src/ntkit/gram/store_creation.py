"""Creation of a kernel matrix on disk, or its continuation: checks, messages, and who computes the tiles."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ntkit.base.caller_context import threads
from ntkit.base.checks import refusal
from ntkit.base.files import ASIDE
from ntkit.base.lock import LOCK, FolderLock
from ntkit.base.memory import bytes_in_words, parse_memory
from ntkit.base.progress import clock, task
from ntkit.base.versions import versions
from ntkit.gram.gram_identity import identity, what_it_depends_on
from ntkit.gram.named_kernel import NamedKernel
from ntkit.gram.tile_files import DESCRIPTION, TileFiles, TileGrid
from ntkit.gram.tile_work import (
    TileWork,
    as_samples,
    budget,
    check_disk,
    check_memory,
    device_of,
    free_disk,
    grid_of,
    number_of,
    part_of,
)
from ntkit.gram.tile_workers import Say, Sent, by_file_names, check_workers, compute, copied_bytes
from ntkit.kernels.kernel import Kernel

_MEASURED = 2  # tiles, one of them off the diagonal where there are two blocks


def create_store(
    path: str | Path,
    source: Kernel | NamedKernel,
    x: Any,
    workers: int,
    scheduler: str | None,
    memory: int | str | None,
    tile: int | None,
    say: Say | None,
) -> Path:
    """Compute a kernel's matrix into a folder (see `GramStore.create`); return the folder."""
    kernel = source.kernel if isinstance(source, NamedKernel) else source
    if not isinstance(kernel, Kernel):
        fix = "Pass e.g. ntkit.TangentKernel(model)."
        raise refusal("kernel", got=type(kernel).__name__, expected="a kernel of ntkit", fix=fix)
    check_workers(workers, scheduler)
    folder, given, x = Path(path).absolute(), x, as_samples(x)
    first = kernel(part_of(x, slice(0, 1), device_of(kernel)))
    grid = grid_of(first, number_of(x), tile)
    depends_on = what_it_depends_on(kernel, x) | {"dtype": grid.dtype, "samples": f"{grid.n}"}
    depends_on |= {name: version for name, version in versions().items() if name in ("ntkit", "torch")}
    if isinstance(source, NamedKernel) and source.code:
        depends_on["code"] = source.code
    if not (folder / DESCRIPTION).exists():
        _check_empty(folder)
        check_disk(folder, grid, len(grid.tiles))
    with FolderLock(folder):
        files = _begun(folder, depends_on, grid, tile) if (folder / DESCRIPTION).exists() else None
        share = budget(memory, first.device) // workers
        work = TileWork(kernel, x, (files.grid if files else grid).size, share, first.device)
        if files is None:
            work.make_plan()
            which = identity((kernel, x), first.dtype)
            settings = source.settings if isinstance(source, NamedKernel) else {}
            files = TileFiles.create(folder, grid, which, depends_on, work.plan, work.factors_kept, settings)
        else:
            work.follow(files)
        missing = _missing(files)
        check_disk(folder, files.grid, len(missing))
        each = share if scheduler is None else parse_memory(memory)
        sent = Sent(folder, files.identity, source, by_file_names(given, x), each, first.device)
        _compute_missing(files, work, missing, sent, workers, scheduler, say)
    return folder


def _compute_missing(
    files: TileFiles,
    work: TileWork,
    missing: list[tuple[int, int]],
    sent: Sent,
    workers: int,
    scheduler: str | None,
    say: Say | None,
) -> None:
    """Compute and write the tiles that are not there, here or by workers, and tell what it takes."""
    here = scheduler is None
    check_memory(files.grid, copied_bytes(sent.x) if workers > 1 else 0, workers)
    if say is not None:
        say(_size(files, len(missing), sent.memory))
    with task("kernel matrix", total=len(missing)) as progress, _counted(files, len(missing), say):
        if say is not None and here and len(missing) > 2 * _MEASURED:
            measured = work.bands(missing)[0][:_MEASURED]
            each = [_seconds(files, work, tile, progress.advance) for tile in measured][-1]
            missing = [tile for tile in missing if tile not in measured]
            say(_time(work.seconds_for(missing, each), workers))
            if workers > 1:
                work.release()
        if not missing or (workers == 1 and here):
            _fill(files, work, work.bands(missing), progress.advance)
        else:
            compute(sent, work.bands(missing), workers, scheduler, progress.advance, say)


def _seconds(files: TileFiles, work: TileWork, tile: tuple[int, int], advance: Callable[[float], None]) -> float:
    """Compute and write a tile: the time that it took, that of the model not counted."""
    start, before = time.perf_counter(), sum(work.seconds)
    _fill(files, work, [[tile]], advance)
    return time.perf_counter() - start - (sum(work.seconds) - before)


def _size(files: TileFiles, missing: int, memory: int | None) -> str:
    grid = files.grid
    there = len(grid.tiles) - missing
    begun = f", of which {there:,} are there" if there else ""
    tiles = _tiles(len(grid.tiles))
    text = f"{grid.n:,} samples, {tiles} of {grid.size:,} x {grid.size:,} in {grid.dtype}{begun}: "
    needed, free = bytes_in_words(missing * grid.bytes_per_tile), bytes_in_words(free_disk(files.folder))
    text += f"{needed} on the disk, which has {free} free"
    extra = "" if memory is None else f"; memory per process, beside model and samples: {bytes_in_words(memory)}"
    return text + extra


def _time(seconds: float, workers: int) -> str:
    """The time that is left: this process, with its threads, has measured what worker processes of one thread do."""
    if workers == 1:
        return f"about {clock(seconds)}, by the first tiles"
    cores = min(workers, os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count() or 1)
    return f"about {clock(seconds * threads() / cores)} with {workers} workers, by the first tiles"


def _tiles(number: int) -> str:
    return f"{number:,} tile{'s' * (number != 1)}"


@contextmanager
def _counted(files: TileFiles, missing: int, say: Say | None) -> Iterator[None]:
    """Tell at the end, whatever ends it, how many tiles there are."""
    start, total = time.monotonic(), len(files.grid.tiles)
    try:
        yield
    except BaseException:
        if say is not None:
            there = sum(files.file(*tile).exists() for tile in files.grid.tiles)
            say(f"stopped with {there:,} of {_tiles(total)}; the same call goes on")
        raise
    if say is not None and missing:
        say(f"{_tiles(missing)} computed in {clock(time.monotonic() - start)}")


def _check_empty(folder: Path) -> None:
    """Refuse a folder that has other files."""
    if folder.exists() and not folder.is_dir():
        raise refusal(str(folder), got="a file", expected="a folder", fix="Name another folder.")
    there = os.listdir(folder) if folder.is_dir() else []
    other = [name for name in there if name != LOCK and not name.endswith(ASIDE)]
    if other:
        fix = "Name another folder, or delete this one."
        raise refusal(str(folder), got=f"a folder with {sorted(other)[0]!r}", expected="an empty folder", fix=fix)


def _begun(folder: Path, depends_on: dict[str, str], grid: TileGrid, tile: int | None) -> TileFiles:
    """The files of a store that is begun, if it is of this matrix."""
    files = TileFiles(folder)
    there = files.depends_on
    other = [name for name in {**there, **depends_on} if there.get(name) != depends_on.get(name)]
    if tile is not None and files.grid.size != grid.size:
        other.append("tile")
        there, depends_on = there | {"tile": f"{files.grid.size}"}, depends_on | {"tile": f"{grid.size}"}
    if not other:
        return files
    said = [f"{name} ({_short(there, name)}, not {_short(depends_on, name)})" for name in other]
    fix = "Name another folder, or delete this one."
    raise refusal(str(folder), got=f"a kernel matrix of another {', '.join(said)}", expected="the same", fix=fix)


def _short(values: dict[str, str], name: str) -> str:
    value = values.get(name, "none")
    return value if len(value) < 64 else value[:8]


def _missing(files: TileFiles) -> list[tuple[int, int]]:
    """Tiles that are not there; those that are not as they were written are deleted."""
    files.sweep()
    tiles = files.grid.tiles
    missing = [tile for tile in tiles if not files.file(*tile).exists()]
    with task("checking tiles", total=len(tiles)) as progress:
        for bad in files.bad() if len(missing) < len(tiles) else ():
            progress.advance()
            if bad is not None and bad.reason != "missing":
                files.delete(bad.row, bad.column)
                missing.append((bad.row, bad.column))
    return missing


def _fill(
    files: TileFiles, work: TileWork, bands: list[list[tuple[int, int]]], advance: Callable[[float], None]
) -> None:
    """Compute tiles in this process."""
    for band in bands:
        rows = {i for i, _ in band}
        for i, j in band:
            files.write(i, j, work.value(i, j, rows))
            advance(1)
