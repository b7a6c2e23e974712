"""The work of a kernel matrix on disk: how large its tiles are, whether they fit, and their values."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.batch import Batch, checked, count, leaves, take, with_leaves
from ntkit.base.checks import refusal
from ntkit.base.memory import free_memory, parse_memory
from ntkit.gram.arrays import not_finite, shared
from ntkit.gram.tile_files import DTYPES, TileFiles, TileGrid
from ntkit.jacobian.plan import Plan
from ntkit.kernels.kernel import Kernel

_TILE_BYTES = 2**24  # the largest tile by default: less costs more files, more takes more memory in every product
_SHARE = 4  # of the free memory, one part for factors


def as_samples(x: Any) -> Batch:
    """Take samples as a kernel does, and numpy arrays and memmaps in place of tensors: over the same memory or disk."""
    if isinstance(x, np.ndarray):
        x = _tensor(x)
    elif isinstance(x, (tuple, list, dict)):
        x = with_leaves(x, [_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves(x)])
    return checked(x, "x")


def _tensor(array: np.ndarray) -> Tensor:
    try:
        return shared(array)
    except TypeError as error:
        raise refusal("x", got=f"{array.dtype} values", expected="numbers", fix="Convert the array.") from error


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
    elif isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise refusal("tile", got=repr(size), expected="samples along a side", fix="Give a positive integer, or None.")
    return TileGrid(n, min(size, n), first.shape[2] if first.dim() == 4 else 0, dtype)


def check_disk(folder: Path, grid: TileGrid, tiles: int) -> None:
    """Refuse what the disk has no room for, before anything is computed: with both sizes and what would fit."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(place).free, tiles * grid.bytes_per_tile
    if needed <= free:
        return
    side = (math.isqrt(1 + 8 * (free // grid.bytes_per_tile)) - 1) // 2  # side (side + 1) / 2 tiles fit
    got = f"{needed / 1e9:.1f} GB of tiles for {grid.n:,} samples in {grid.dtype}"
    fix = f"Take at most {side * grid.size:,} samples, or a folder on a larger disk."
    if grid.dtype == "float64":
        fix += " In float32 (model.float(), x.float()) it is half."
    raise refusal(str(folder), got=got, expected=f"at most {free / 1e9:.1f} GB, which are free there", fix=fix)


class TileWork:
    """Computes tiles of one kernel on one set of samples, all of them under one plan.

    The bits of a tile depend on the plan and the samples of its row and column alone.

    Parameters
    ----------
    kernel, x, size : the kernel, the samples, samples along a side of a tile.
    memory : see `budget`.
    device : where the kernel's values come out.
    """

    def __init__(self, kernel: Kernel, x: Batch, size: int, memory: int | str | None, device: torch.device) -> None:
        self._kernel: Any = kernel  # `tile` and `factors` are not of every kernel
        self._x, self._n, self._size = x, count(x), size
        self._budget = budget(memory, device)
        self._factors: dict[int, Any] = {}  # by row or column of tiles
        self.plan: Plan | None = None
        self.factors_kept = False

    def make_plan(self) -> None:
        """Plan the kernel, and choose whether factors are kept: two blocks of them have to fit into the memory."""
        if not hasattr(self._kernel, "plan_for_tiles"):
            return
        self.plan = self._kernel.plan_for_tiles(self._x, self._size)
        self.factors_kept = self._blocks_that_fit() >= 2
        if not self.factors_kept and self._n > self._size:
            self.plan = self._kernel.plan(self._block(0), self._block(1))
        elif not self.factors_kept:
            self.plan = self._kernel.plan(self._x)

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
        return take(self._x, slice(i * self._size, (i + 1) * self._size))

    def _factors_of(self, i: int, wanted: set[int]) -> Any:
        """Factors of a block, kept; those that are not wanted again make room."""
        if i not in self._factors:
            unwanted = [block for block in self._factors if block not in wanted]
            while len(self._factors) >= self._most_blocks() and unwanted:
                del self._factors[unwanted.pop(0)]
            self._factors[i] = self._kernel.factors(self._block(i), self.plan)
        return self._factors[i]

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
