"""The files that the stages of `ntkit analyze` leave: numbers, arrays, Gram matrices; and a run that is replaced."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import Damaged
from ntkit.base.files import (
    file_digest,
    read_arrays_and_metadata,
    read_json_and_checksum,
    remove,
    write_arrays,
    write_atomically,
)
from ntkit.base.integrity import check_place, damaged
from ntkit.base.lock import FolderLock
from ntkit.base.regular_files import open_regular
from ntkit.base.run_files import StageFile, described

_OWN = ("run.json", "results.json", "report.html", "trajectory", "stages", "arrays", "work", "track", "explain")
REPLACED = ".replaced"  # in a run's folder: the run before, until the new one has begun


class StageFiles:
    """The files of a run's stages; those of other runs, and damaged ones, are refused.

    Attributes
    ----------
    run : the id of the run, which the files carry.
    digests : of the files that stages wrote beside their numbers, by their place in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.run = folder, ""
        self.digests: dict[str, str] = {}
        self._checked: set[str] = set()  # Gram matrices that this process wrote, or compared with their digests

    def stage(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left (`StageFile`); its Gram matrices are checked when they are read."""
        file = self._folder / "stages" / f"{name}.json"
        if not file.exists():
            return None
        told, checksum = read_json_and_checksum(file)
        if checksum is None and not (isinstance(told, dict) and "stage" in told):  # an earlier version: numbers alone
            return {"result": told}
        described(file, told, StageFile)
        check_place(file, told, stage=name, run=self.run)
        for place, digest in told["files"].items():
            if place == f"arrays/{name}.safetensors":
                if not (path := self._folder / place).exists():
                    raise damaged(path, "no such file")
                if read_arrays_and_metadata(path)[1].get("sha256") != digest:
                    raise damaged(path, f"not the file that {file.name} was written with")
        self.digests |= told["files"]
        return told

    def finished(
        self, name: str, result: Any, arrays: dict[str, np.ndarray], before: set[str]
    ) -> tuple[Path, dict[str, Any]]:
        """Write the arrays of a stage; return the file of its numbers and its content, which is to be written last.

        `before` are the places of `digests` before the stage began.
        """
        if arrays:
            place = f"arrays/{name}.safetensors"
            self.digests[place] = write_arrays(self._folder / place, arrays)
        files = {place: digest for place, digest in self.digests.items() if place not in before}
        content = {"stage": name, "run": self.run, "result": result, "files": files}
        return self._folder / "stages" / f"{name}.json", content

    def write_gram(self, name: str, K: Tensor) -> None:
        """Write a Gram matrix."""

        def write(aside: Path) -> None:
            with open(aside, "wb") as handle:
                np.save(handle, K.cpu().numpy(), allow_pickle=False)

        write_atomically(file := self._gram_file(name), write)
        self.digests[f"work/{name}.npy"] = file_digest(file)
        self._checked.add(name)

    def read_gram(self, name: str) -> Tensor:
        """Read a Gram matrix, after a comparison with its digest if another process wrote it."""
        file = self._gram_file(name)
        digest = None if name in self._checked else self.digests.get(f"work/{name}.npy")
        if digest is not None and file_digest(file) != digest:
            raise damaged(file, "changed since it was written (its SHA-256 differs)")
        self._checked.add(name)
        try:
            with open_regular(file, "a matrix") as handle:
                np.lib.format.read_magic(handle)
                shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
                size = os.fstat(handle.fileno()).st_size - handle.tell()
                if len(shape) != 2 or dtype.kind != "f" or size != math.prod(shape) * dtype.itemsize:
                    raise damaged(file, f"{size} bytes for an array of shape {shape} and type {dtype}")
                handle.seek(0)
                return torch.from_numpy(np.load(handle, allow_pickle=False))
        except Damaged:
            raise
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise damaged(file, f"no matrix ({error})") from error

    def _gram_file(self, name: str) -> Path:
        return self._folder / "work" / f"{name}.npy"


def put_aside(folder: Path) -> None:
    """Move what ntkit wrote into a run's folder into a folder inside it, ``run.json`` first; other files stay."""
    entries = [entry for entry in folder.iterdir() if entry.name in _OWN]
    (folder / REPLACED).mkdir(exist_ok=True)
    for entry in sorted(entries, key=lambda entry: entry.name != "run.json"):
        entry.rename(folder / REPLACED / entry.name)


def put_back(folder: Path) -> None:
    """Undo `put_aside`, ``run.json`` last."""
    if (folder / REPLACED).is_dir() and not (folder / REPLACED).is_symlink():
        for entry in sorted((folder / REPLACED).iterdir(), key=lambda entry: entry.name == "run.json"):
            entry.rename(folder / entry.name)
        (folder / REPLACED).rmdir()


def recover(folder: Path) -> None:
    """End what a process left that was killed while it replaced a run: back to the old run, if no new one has begun."""
    if (folder / REPLACED).is_dir():
        with FolderLock(folder):
            if (folder / "run.json").exists():
                remove(folder / REPLACED)
            else:
                put_back(folder)
