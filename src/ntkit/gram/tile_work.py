"""The work of a kernel matrix on disk: how large its tiles are, whether they fit, and their values."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ntkit.base.batch import Batch, checked, count, leaves, take, with_leaves
from ntkit.base.checks import refusal
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.numbers import as_integer
from ntkit.data.streamed_samples import StreamedSamples
from ntkit.gram.arrays import not_finite
from ntkit.gram.tile_files import DTYPES, TileFiles, TileGrid
from ntkit.jacobian.plan import Plan
from ntkit.kernels.kernel import Kernel

_TILE_BYTES = 2**24  # the largest tile by default: less costs more files, more takes more memory in every product
_SHARE = 4  # of the free memory, one part for factors
_TILES = 3  # in a process at a time: computed, checked, written

Samples = Batch | StreamedSamples


def as_samples(x: Any) -> Samples:
    """Take samples as a kernel does; numpy arrays in place of tensors, over the same memory or disk; and datasets."""
    if isinstance(x, StreamedSamples):
        return x
    if isinstance(x, (Dataset, DataLoader)):
        return StreamedSamples(x)
    return checked(x, "x", infinite=True)  # tiles that may not be infinite are refused by the kernel


def number_of(x: Samples) -> int:
    """Number of samples."""
    return len(x) if isinstance(x, StreamedSamples) else count(x)


def part_of(x: Samples, index: slice, device: torch.device | None) -> Batch:
    """Some samples, in the memory of a device."""
    part = x.block(index) if isinstance(x, StreamedSamples) else take(x, index)
    return part if device is None else with_leaves(part, [t.to(device) for t in leaves(part)])


def device_of(kernel: Kernel) -> torch.device | None:
    """Where the kernel's network is; samples on a disk go there block by block."""
    models = [value for value in kernel.settings().values() if isinstance(value, nn.Module)]
    parameter = next((parameter for model in models for parameter in model.parameters()), None)
    return None if parameter is None else parameter.device


def budget(memory: int | str | None, device: torch.device) -> int:
    """Bytes for factors that several tiles have in common; a quarter of what is free if None."""
    return parse_memory(memory) or free_memory(device) // _SHARE


def grid_of(first: Tensor, n: int, size: int | None) -> TileGrid:
    """Choose tiles for n samples, of whose kernel `first` is the first value, [1, 1] or [1, 1, C, C]."""
    if first.dim() not in (2, 4):
        fix = 'Use outputs="full", "trace", "sum", or a callable that picks the output: lambda y: y[:, 0].'
        raise refusal("kernel", got="one matrix per output", expected="one matrix", fix=fix)
    dtype = next((name for name, kind in DTYPES.items() if kind == first.dtype), None)
    if dtype is None:
        fix = "Convert the model and the data with .float()."
        raise refusal("kernel", got=f"values in {first.dtype}", expected="float32 or float64", fix=fix)
    if size is None:
        size = max(1, math.isqrt(_TILE_BYTES // (first.element_size() * first.numel())))
        size = math.ceil(n / math.ceil(n / size))  # equal tiles: the last is not a sliver
    size = as_integer(size, "tile", "samples along a side", "Give a positive integer, or None.", least=1)
    return TileGrid(n, min(size, n), first.shape[2] if first.dim() == 4 else 0, dtype)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(place).free


def check_disk(folder: Path, grid: TileGrid, tiles: int) -> None:
    """Refuse what the disk has no room for, before anything is computed: with both sizes and what would fit."""
    free, needed = free_disk(folder), tiles * grid.bytes_per_tile
    if needed <= free:
        return
    side = (math.isqrt(1 + 8 * (free // grid.bytes_per_tile)) - 1) // 2  # side (side + 1) / 2 tiles fit
    got = f"{needed / 1e9:.1f} GB of tiles for {grid.n:,} samples in {grid.dtype}"
    fix = f"Take at most {side * grid.size:,} samples, or a folder on a larger disk."
    if grid.dtype == "float64":
        fits = "it fits" if needed / 2 <= free else "it is half"
        fix += f" In float32 (--dtype float32; model.float(), x.float()) {fits}: {needed / 2e9:.1f} GB."
    fix += " All samples without a matrix: kernel.operator(x), or ntkit.SketchedKernel."
    raise refusal(str(folder), got=got, expected=f"at most {free / 1e9:.1f} GB, which are free there", fix=fix)


def check_memory(grid: TileGrid, copied: int, workers: int) -> None:
    """Refuse processes of this machine whose tiles, and the bytes of samples `copied` to each, do not fit into it."""
    each, free = _TILES * grid.bytes_per_tile + copied, free_memory(torch.device("cpu"))
    if workers * each <= free:
        return
    got = f"{workers} x {each / 1e9:.1f} GB for samples and tiles"
    fix = "Give samples as a numpy.memmap, which all processes share, and smaller tiles: tile=..."
    if each <= free:
        fix = f"Take at most {free // each} workers. {fix}"
    raise refusal("workers", got=got, expected=f"at most {free / 1e9:.1f} GB, the free memory", fix=fix)


class TileWork:
    """Computes tiles of one kernel on one set of samples, all of them under one plan.

    The bits of a tile depend on the plan and the samples of its row and column alone.

    Parameters
    ----------
    kernel, x, size : the kernel, the samples, samples along a side of a tile.
    memory : see `budget`.
    device : where the kernel's values come out.

    Attributes
    ----------
    seconds : that each block took to go through the model, whose factors are kept.
    """

    def __init__(self, kernel: Kernel, x: Samples, size: int, memory: int | str | None, device: torch.device) -> None:
        self._kernel: Any = kernel  # `tile` and `factors` are not of every kernel
        self._x, self._n, self._size = x, number_of(x), size
        self._budget, self._to = budget(memory, device), device_of(kernel)
        self._factors: dict[int, Any] = {}  # by row or column of tiles
        self.plan: Plan | None = None
        self.factors_kept = False
        self.seconds: list[float] = []

    def make_plan(self) -> None:
        """Plan the kernel, and choose whether factors are kept: two blocks of them have to fit into the memory."""
        if not hasattr(self._kernel, "plan_for_tiles"):
            return
        there = not isinstance(self._x, StreamedSamples) and self._to in (None, leaves(self._x)[0].device)
        some = self._x if there else self._block(0)
        self.plan = self._kernel.plan_for_tiles(some, self._size, self._n)
        self.factors_kept = self._blocks_that_fit() >= 2
        if not self.factors_kept and self._n > self._size:
            self.plan = self._kernel.plan(self._block(0), self._block(1))
        elif not self.factors_kept:
            self.plan = self._kernel.plan(self._block(0))

    def follow(self, files: TileFiles) -> None:
        """Go on under the plan of a store that is begun."""
        self.plan, self.factors_kept = files.plan, files.factors_kept

    def bands(self, tiles: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Tiles in an order in which few blocks go through the model: by bands of rows, column after column."""
        rows = max(1, self._most_blocks() - 1) if self.factors_kept else 1
        by_band: dict[int, list[tuple[int, int]]] = {}
        for i, j in tiles:
            by_band.setdefault(i // rows, []).append((i, j))
        return [sorted(by_band[band], key=lambda tile: (tile[1], tile[0])) for band in sorted(by_band)]

    def seconds_for(self, tiles: Iterable[tuple[int, int]], each: float) -> float:
        """Time that tiles will take in this process: `each` of them, and the model as long as it took last."""
        bands, passes, kept = self.bands(tiles), 0, dict.fromkeys(self._factors)
        for band in bands if self.factors_kept else []:
            rows = {i for i, _ in band}
            for i, j in band:
                for block in (i, j):
                    if block not in kept:
                        self._make_room(kept, rows | {j})
                        kept[block] = None
                        passes += 1
        return passes * (self.seconds[-1] if self.seconds else 0.0) + sum(map(len, bands)) * each

    def release(self) -> None:
        """Release the factors that are kept."""
        self._factors.clear()

    def value(self, i: int, j: int, rows: set[int]) -> Tensor:
        """Values of a tile; `rows` are those of the band, which stay in memory.

        Raises
        ------
        Refused
            For a value that is not finite, by its samples.
        """
        values = self._tile(i, j, rows | {j})
        self._check_finite(values, i, j)
        return values

    def _blocks_that_fit(self) -> int:
        assert self.plan is not None
        per_block = self._size * sum(step.bytes_per_sample for step in self.plan.steps) + 1
        return self._budget // per_block

    def _most_blocks(self) -> int:
        return max(
            2, self._blocks_that_fit()
        )  # a store begun with more memory may ask for factors where two do not fit

    def _block(self, i: int) -> Batch:
        return part_of(self._x, slice(i * self._size, min((i + 1) * self._size, self._n)), self._to)

    def _factors_of(self, i: int, wanted: set[int]) -> Any:
        """Factors of a block, kept; those that are not wanted again make room."""
        if i not in self._factors:
            self._make_room(self._factors, wanted)
            start = time.perf_counter()
            self._factors[i] = self._kernel.factors(self._block(i), self.plan)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - start)
        return self._factors[i]

    def _make_room(self, kept: dict[int, Any], wanted: set[int]) -> None:
        unwanted = [block for block in kept if block not in wanted]
        while len(kept) >= self._most_blocks() and unwanted:
            del kept[unwanted.pop(0)]

    def _tile(self, i: int, j: int, wanted: set[int]) -> Tensor:
        if self.factors_kept:
            first = self._factors_of(i, wanted)
            return self._kernel.product(first, None if i == j else self._factors_of(j, wanted))
        rows, columns = self._block(i), None if i == j else self._block(j)
        return self._kernel(rows, columns) if self.plan is None else self._kernel.tile(rows, columns, self.plan)

    def _check_finite(self, values: Tensor, i: int, j: int) -> None:
        low, high = values.aminmax()  # NaN and infinities of either sign come out here
        if bool((high - low).isfinite()):
            return
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column, *rest = bad[0].tolist()
            at = [i * self._size + row, j * self._size + column, *rest]
            raise not_finite("kernel", float(values[tuple(bad[0].tolist())]), at)
