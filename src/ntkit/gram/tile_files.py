"""The files of a kernel matrix on disk: one Zarr array, of which each chunk is a tile of the upper triangle.

A tile is written under another name and renamed, so it is whole or absent, and has its crc32c behind its numbers.
``zarr.json`` says what the matrix is of, and has a checksum of all that it says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import Damaged
from ntkit.base.files import read_bytes, remove, unwritable, write_bytes
from ntkit.base.integrity import damaged
from ntkit.base.versions import check_format
from ntkit.jacobian.plan import Plan, Step

DESCRIPTION = "zarr.json"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_FORMAT = 1
_AGAIN = "GramStore.create(...) with the same arguments, or the same ntkit gram, computes it again."


class BadTile(NamedTuple):
    """A tile of a `GramStore` that is not there, or not as it was written: its place, and what is wrong."""

    row: int
    column: int
    reason: str


@dataclass(frozen=True)
class TileGrid:
    """An [n, n] matrix of `outputs` x `outputs` entries (0: of plain numbers), cut into `size` x `size` tiles."""

    n: int
    size: int
    outputs: int
    dtype: str

    @property
    def count(self) -> int:
        """Tiles along one side."""
        return -(-self.n // self.size)

    @property
    def tail(self) -> tuple[int, ...]:
        """Axes of an entry."""
        return (self.outputs, self.outputs) if self.outputs else ()

    @property
    def bytes_per_tile(self) -> int:
        """Bytes of a tile's file: the last ones are filled up, and each has four bytes of checksum."""
        return self.size**2 * math.prod(self.tail) * np.dtype(self.dtype).itemsize + 4

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """Places of the tiles of the upper triangle, row by row."""
        return [(i, j) for i in range(self.count) for j in range(i, self.count)]

    def samples(self, i: int) -> slice:
        """Samples of a row or column of tiles."""
        return slice(i * self.size, min((i + 1) * self.size, self.n))


class TileFiles:
    """The files of one matrix, opened for reading; `write` and `sweep` are for whoever holds the folder's lock.

    Raises
    ------
    Refused
        Where there is no such folder.
    Damaged
        Where ``zarr.json`` is not as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fix = "Name a folder that GramStore.create has written."
        blob = read_bytes(folder / DESCRIPTION, "a kernel matrix on disk", fix, most=2**25)
        document = _unsealed(folder / DESCRIPTION, blob)
        try:
            said = document["attributes"]["ntkit"]
            check_format(folder / DESCRIPTION, said["format"], _FORMAT, "Compute it again, in a new folder.")
            self.grid = TileGrid(**said["grid"])
            _check_array(folder / DESCRIPTION, document, self.grid)
            self.identity, self.depends_on = str(said["identity"]), dict(said["depends_on"])
            self.factors_kept = bool(said["factors_kept"])
            self.settings = dict(said.get("command", {}))  # of the command that made it, if one did
            self.plan = None if said["plan"] is None else _plan(said["plan"])
        except (KeyError, TypeError) as error:
            raise damaged(folder / DESCRIPTION, f"of another format ({error})") from error
        import zarr  # slow to import, and for this alone

        self._array = zarr.open_array(folder, mode="r+")

    @staticmethod
    def create(
        folder: Path,
        grid: TileGrid,
        identity: str,
        depends_on: dict[str, str],
        plan: Plan | None,
        factors_kept: bool,
        settings: Mapping[str, Any] | None = None,
    ) -> TileFiles:
        """Write the description; the tiles are absent."""
        import zarr
        from zarr.codecs import BytesCodec, Crc32cCodec
        from zarr.storage import MemoryStore

        said = {"format": _FORMAT, "identity": identity, "depends_on": depends_on, "grid": asdict(grid)}
        said |= {"plan": None if plan is None else asdict(plan), "factors_kept": factors_kept}
        said |= {"command": dict(settings)} if settings else {}
        made: dict[str, Any] = {}
        zarr.create_array(
            MemoryStore(made),
            shape=(grid.n, grid.n, *grid.tail),
            chunks=(grid.size, grid.size, *grid.tail),
            dtype=grid.dtype,
            fill_value=float("nan"),
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            attributes={"ntkit": said},
        )
        write_bytes(folder / DESCRIPTION, _sealed(made[DESCRIPTION].to_bytes()))
        return TileFiles(folder)

    def file(self, i: int, j: int) -> Path:
        """The file of a tile."""
        return self.folder.joinpath("c", str(i), str(j), *("0" for _ in self.grid.tail))

    def read(self, i: int, j: int) -> np.ndarray:
        """A tile of the upper triangle, [rows, columns] or [rows, columns, C, C].

        Raises
        ------
        Damaged
            Where it is not there, or not as it was written; names the file.
        """
        rows, columns = self.grid.samples(i), self.grid.samples(j)
        try:
            values = np.asarray(self._array[rows, columns])
        except OSError as error:
            raise self._damaged(i, j, error.strerror or str(error)) from error
        except Exception as error:  # what a codec raises of too few bytes depends on the codec
            raise self._damaged(i, j, "changed since it was written, or cut off (its crc32c differs)") from error
        if np.isnan(values.flat[0]):  # what Zarr gives for a file that is not there; no tile is written with it
            raise self._damaged(i, j, "not there")
        return values

    def _damaged(self, i: int, j: int, why: str) -> Damaged:
        return Damaged(f"{self.file(i, j)}: got tile ({i}, {j}) {why}; expected it as it was written. {_AGAIN}")

    def write(self, i: int, j: int, values: Tensor) -> None:
        """Write a tile, which is whole or absent whatever happens."""
        try:
            self._array[self.grid.samples(i), self.grid.samples(j)] = values.detach().cpu().numpy()
        except OSError as error:
            raise unwritable(self.file(i, j), error) from error

    def checksum(self) -> str:
        """SHA-256 over the crc32c of all tiles, which are the last four bytes of their files; refuses a missing one."""
        digest = hashlib.sha256(f"{self.grid}".encode())
        for i, j in self.grid.tiles:
            try:
                with open(self.file(i, j), "rb") as handle:
                    handle.seek(-4, os.SEEK_END)
                    digest.update(handle.read())
            except OSError as error:
                raise self._damaged(i, j, "not there") from error
        return digest.hexdigest()

    def delete(self, i: int, j: int) -> None:
        """Delete a tile that is to be computed again."""
        remove(self.file(i, j))

    def sweep(self) -> None:
        """Delete what a killed process was writing."""
        for leftover in (self.folder / "c").rglob("*.partial"):
            with suppress(OSError):
                leftover.unlink()

    def bad(self) -> Iterator[BadTile | None]:
        """Compare each tile of the triangle with its checksum, in order: what is wrong, or None."""
        for i, j in self.grid.tiles:
            if not self.file(i, j).exists():
                yield BadTile(i, j, "missing")
                continue
            try:
                self.read(i, j)
                yield None
            except Damaged as error:
                yield BadTile(i, j, str(error).partition(f"tile ({i}, {j}) ")[2].partition(";")[0])


def _plan(said: dict[str, Any]) -> Plan:
    steps = tuple(Step(**step) for step in said["steps"])
    return Plan(steps, **{name: int(size) for name, size in said.items() if name != "steps"})


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sealed(blob: bytes) -> bytes:
    """The JSON of an array, with a checksum of all that it says among its attributes."""
    document = json.loads(blob)
    checksum = _checksum(document)
    document["attributes"]["ntkit"]["checksum"] = checksum
    return json.dumps(document, indent=1).encode()


def _unsealed(file: Path, blob: bytes) -> dict[str, Any]:
    """What is said of the array, after a comparison with the checksum."""
    try:
        document = json.loads(blob)
        rest = copy.deepcopy(document)
        checksum = rest["attributes"]["ntkit"].pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, f"no description of a kernel matrix ({type(error).__name__}: {error})") from error
    if checksum != _checksum(rest):
        raise damaged(file, "changed since it was written (its checksum differs)")
    return rest


def _check_array(file: Path, document: dict[str, Any], grid: TileGrid) -> None:
    """Refuse an array other than that of the grid: its codecs are code that Zarr finds by the names in the file."""
    side, tile = [grid.n, grid.n, *grid.tail], [grid.size, grid.size, *grid.tail]
    found = (document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"], document["data_type"])
    codecs = [codec["name"] for codec in document["codecs"]]
    if found != (side, tile, grid.dtype) or grid.dtype not in DTYPES or codecs != ["bytes", "crc32c"]:
        raise damaged(file, "an array of another kind than GramStore writes")
