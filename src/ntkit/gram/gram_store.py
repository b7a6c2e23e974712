"""A kernel matrix on disk: computed tile by tile, resumed, verified, and read as any other Gram."""

from __future__ import annotations

import math
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.base.files import write_atomically
from ntkit.base.progress import task
from ntkit.gram.arrays import BLOCK
from ntkit.gram.gram_matrix import Gram, Index
from ntkit.gram.named_kernel import NamedKernel
from ntkit.gram.store_creation import create_store
from ntkit.gram.tile_files import DTYPES, BadTile, TileFiles
from ntkit.kernels.kernel import Kernel

_KEPT = 2**28  # bytes of tiles that a store keeps in memory once they are read


class GramStore(Gram):
    """A `Gram` on disk: a kernel's values on more samples than memory holds the matrix of.

    A folder with a Zarr array (version 3): one chunk per tile of the upper triangle, each with its crc32c; and what the
    matrix is of, in the array's attributes. `create` computes it and goes on after any kill; `open` opens it. Whatever
    takes a `Gram` takes it unchanged. Several processes need the packages dask and distributed.

    Attributes
    ----------
    path : the folder.
    size : samples along a side of a tile.

    Notes
    -----
    `rows` and `tile` read whole tiles: ask for many rows at a time. ``@`` reads the triangle once for all columns of
    the block that it multiplies, each tile for both halves. Numbers that machines and measures compute from it are in
    float64, whatever dtype it is kept in.

    Examples
    --------
    >>> import tempfile, ntkit
    >>> kernel, x = ntkit.TangentKernel(torch.nn.Linear(3, 1), outputs="trace"), torch.rand(7, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     K = GramStore.create(folder + "/kernel", kernel, x, tile=3)
    ...     K.shape, K.verify(), torch.allclose((K @ torch.ones(7)).float(), kernel(x).sum(1))
    ((7, 7), [], True)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._files = TileFiles(self.path)
        grid = self._files.grid
        self.size = grid.size
        self.outputs = max(1, grid.outputs)
        self.shape = (grid.n * self.outputs,) * 2
        self.dtype, self.device = DTYPES[grid.dtype], torch.device("cpu")
        self.precision = torch.finfo(self.dtype).eps
        self.exact, self.on_torch = True, True
        self._identity = self._files.identity
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._reading = threading.Lock()

    # ------------------------------------------------------------------ on disk

    @classmethod
    @own_context()
    def create(
        cls,
        path: str | Path,
        kernel: Kernel | NamedKernel,
        x: Any,
        *,
        workers: int = 1,
        scheduler: str | None = None,
        memory: int | str | None = None,
        tile: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> GramStore:
        """Compute ``kernel(x)`` into a folder, or go on with one that is begun.

        Tiles that are there, with their checksum, are not computed again; so a run killed at any moment loses at most
        the tile in hand, and ends with the same bytes as an undisturbed one.

        Parameters
        ----------
        path : the folder, new or begun with the same kernel and data.
        kernel : with values [n, n] or [n, n, C, C], in float32 or float64. Leave its model unchanged meanwhile.
            (`ntkit gram` passes one by the name of its network's factory.)
        x : n samples: a tensor, a tuple or dict of tensors, or numpy arrays in their place (a memmap stays on disk); or
            a map-style dataset of samples, or of pairs (sample, label), or a DataLoader of one that does not shuffle:
            its samples are read block by block, and are the same whenever they are read.
        workers : processes of this machine, of one thread each; 1: this process, with its own threads. In a script,
            more need ``if __name__ == "__main__":`` around the call, as all processes that Python starts.
        scheduler : the address of a running Dask scheduler, such as "tcp://10.0.0.1:8786", whose workers compute in
            place of this process. They see the folder under the same name, and have the same ntkit and torch.
        memory : bytes, or text such as "2 GB", for what several tiles have in common; a quarter of what is free if
            None. With a scheduler: of each worker. Bits do not depend on it once the store is begun.
        tile : samples along a side of a tile; None chooses tiles of at most 16 MiB.
        say : called with each line on what is to come: tiles, disk and memory; then, after a first tile, the time.

        Raises
        ------
        Refused
            For a folder with the matrix of another kernel, other data, another dtype or version (says which), or with
            something else in it; a disk without room; a value that is not finite; a folder that another process writes;
            samples that are not what they were when they are read again.
        """
        return cls(create_store(path, kernel, x, workers, scheduler, memory, tile, say))

    @classmethod
    def open(cls, path: str | Path) -> GramStore:
        """Open the store in a folder, complete or not; a tile that is not there is refused where it is needed.

        Raises
        ------
        Refused
            For a folder without a store.
        Damaged
            Where the description of the store is not as it was written.
        """
        return cls(path)

    def verify(self) -> list[BadTile]:
        """Read every tile and compare it with its checksum: what is missing or damaged, as ``(row, column, reason)``.

        `create`, with the arguments that the store was made with, computes them again.
        """
        with task("checking tiles", total=len(self._files.grid.tiles)) as progress:
            found = []
            for bad in self._files.bad():
                found += [bad] if bad is not None else []
                progress.advance()
        return found

    @property
    def checksum(self) -> str:
        """One checksum of all tiles, from those that each tile has: stores of the same bytes have the same.

        Raises
        ------
        Damaged
            Where a tile is not there.
        """
        return self._files.checksum()

    def to_dask(self) -> Any:
        """All of K as a ``dask.array``, [n, n] or [n, n, C, C], in the dtype it is kept in; both halves have values."""
        try:
            import dask.array as da
        except ImportError as error:
            got, fix = "no dask in this Python", "Run: pip install dask distributed"
            raise refusal("to_dask", got=got, expected="the package dask", fix=fix) from error
        grid = self._files.grid
        sides = tuple(grid.samples(i).stop - grid.samples(i).start for i in range(grid.count))
        chunks = (sides, sides, *((C,) for C in grid.tail))
        return da.map_blocks(
            _mirrored_tile,
            self,
            chunks=chunks,
            dtype=np.dtype(grid.dtype),
            meta=np.empty((0,) * len(chunks), grid.dtype),
        )

    def export(self, path: str | Path) -> None:
        """Write all of K, both halves, as one ``.npy`` file in the dtype it is kept in.

        Raises
        ------
        Refused
            Where the disk has no room, or the file cannot be written.
        """
        path, grid = Path(path), self._files.grid
        shape = (grid.n, grid.n, *grid.tail)
        needed = math.prod(shape) * np.dtype(grid.dtype).itemsize
        free = shutil.disk_usage(path.absolute().parent).free
        if needed > free:
            expected = f"at most {free / 1e9:.1f} GB, which are free there"
            fix = "Name a file on a larger disk, or read the store as it is."
            raise refusal(str(path), got=f"{needed / 1e9:.1f} GB", expected=expected, fix=fix)

        def write(aside: Path) -> None:
            whole = np.lib.format.open_memmap(aside, "w+", np.dtype(grid.dtype), shape)
            for i, j in grid.tiles:
                values = self._files.read(i, j)
                whole[grid.samples(i), grid.samples(j)] = values
                if i != j:
                    whole[grid.samples(j), grid.samples(i)] = _mirror(values)
            whole.flush()

        write_atomically(path, write)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    # ------------------------------------------------------------------ access

    @cached_property
    def largest(self) -> float:  # pyrefly: ignore[bad-override]
        """Largest |entry|, from one pass over the triangle."""
        return max(float(self._tile(i, j).abs().max()) for i, j in self._files.grid.tiles)

    def _tile(self, i: int, j: int) -> Tensor:
        """A tile of the upper triangle as a matrix with row i C + c, in the dtype it is kept in."""
        with self._reading:
            if (i, j) in self._kept:
                self._kept.move_to_end((i, j))
                return self._kept[i, j]
        values = torch.from_numpy(self._files.read(i, j))
        if values.dim() == 4:
            C = self.outputs
            values = values.permute(0, 2, 1, 3).reshape(values.shape[0] * C, values.shape[1] * C)
        with self._reading:
            self._kept[i, j] = values
            while len(self._kept) * self._files.grid.bytes_per_tile > _KEPT:
                self._kept.popitem(last=False)
        return values

    def _part(self, i: int, j: int) -> Tensor:
        """A tile of either half."""
        return self._tile(i, j) if i <= j else self._tile(j, i).T

    def _span(self, i: int) -> slice:
        """Rows of the matrix that a row of tiles has."""
        samples = self._files.grid.samples(i)
        return slice(samples.start * self.outputs, samples.stop * self.outputs)

    def tile(self, rows: Index, columns: Index) -> Tensor:
        """``K[rows][:, columns]`` in float64, each index a slice or a list of places."""
        places = self._places(rows) % len(self), self._places(columns) % len(self)
        step = self.size * self.outputs
        result = torch.empty(len(places[0]), len(places[1]), dtype=torch.float64)
        across, down = ({int(b): (p // step == b).nonzero().ravel() for b in (p // step).unique()} for p in places)
        for i, at in across.items():
            for j, to in down.items():
                inside = self._part(i, j)[places[0][at] - i * step][:, places[1][to] - j * step]
                result[at[:, None], to] = inside.to(torch.float64)
        return result

    def diagonal(self) -> Tensor:
        """The diagonal of K in float64, [N]."""
        return torch.cat([self._tile(i, i).diagonal() for i in range(self._files.grid.count)]).to(torch.float64)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The blocks of rows in float64 that a `Gram` of the same shape has; a row of tiles is in memory at a time."""
        samples = max(1, BLOCK // (len(self) * self.outputs)) * self.outputs
        bands: dict[int, Tensor] = {}
        step = self.size * self.outputs
        for start in range(0, len(self), samples):
            index = slice(start, min(start + samples, len(self)))
            here = range(start // step, (index.stop - 1) // step + 1)
            bands = {b: bands[b] if b in bands else self._band(b) for b in here}
            parts = [bands[b][max(start - b * step, 0) : index.stop - b * step] for b in here]
            yield index, torch.cat(parts).to(torch.float64)

    def _band(self, i: int) -> Tensor:
        return torch.cat([self._part(i, j) for j in range(self._files.grid.count)], dim=1)

    def _product(self, block: Tensor) -> Tensor:
        """K times a float64 vector or block: each tile is read once and serves both halves, converted by rows."""
        result = torch.zeros_like(block)
        used = [bool(block[self._span(i)].any()) for i in range(self._files.grid.count)]
        for i, j in self._files.grid.tiles:
            if not used[i] and not used[j]:
                continue
            rows, columns = self._span(i), self._span(j)
            values = self._tile(i, j)
            step = max(1, BLOCK // values.shape[1])
            for start in range(0, len(values), step):
                part = values[start : start + step].to(torch.float64)
                here = slice(rows.start + start, rows.start + start + len(part))
                result[here] += part @ block[columns]
                if i != j:
                    result[columns] += part.T @ block[here]
        return result

    def dense(self) -> Tensor:
        """All of K as a new float64 tensor, [N, N], for algorithms that factorize it; they may overwrite it."""
        result = torch.empty(self.shape, dtype=torch.float64)
        for i, j in self._files.grid.tiles:
            values = self._tile(i, j)
            result[self._span(i), self._span(j)] = values
            result[self._span(j), self._span(i)] = values.T
        return result

    def __repr__(self) -> str:
        return f"GramStore({str(self.path)!r}): {super().__repr__()}"


def _mirror(values: np.ndarray) -> np.ndarray:
    """A tile as it is in the other half."""
    return values.swapaxes(0, 1) if values.ndim == 2 else values.transpose(1, 0, 3, 2)


def _mirrored_tile(store: GramStore, block_id: tuple[int, ...] | None = None) -> np.ndarray:
    """A tile of either half, read by a worker of Dask."""
    assert block_id is not None
    i, j = block_id[:2]
    return store._files.read(i, j) if i <= j else _mirror(store._files.read(j, i))
