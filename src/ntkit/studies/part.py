"""A part of a study: one experiment, computed once, whose finished result is kept as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ntkit.base.checks import Damaged
from ntkit.base.files import read_arrays_and_metadata, read_json_and_checksum, remove, write_arrays, write_json
from ntkit.base.integrity import check_place, damaged
from ntkit.base.run_files import PartFile, described
from ntkit.trajectory import Trajectory


class Sizes(SimpleNamespace):
    """Sizes of a study's experiments by name: numbers, and tuples of numbers."""


class Result(NamedTuple):
    """Result of one part: numbers as JSON has them, and arrays."""

    numbers: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class StudyPart:
    """One experiment, whose finished result is kept as a file.

    Attributes
    ----------
    experiment, case : claims and sections find the result in ``results[experiment][case]``, a list over seeds.
    name : name of its files in the folder ``parts``, and its progress line.
    compute, arguments : ``compute(work, *arguments)`` gives the result.
    """

    experiment: str
    case: Any
    name: str
    compute: Callable[..., Result]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Work:
    """Input of every part: the study's sizes, seeds, data sets and folder, folders of official files, progress."""

    sizes: Sizes
    seeds: Sequence[int]
    sets: Sequence[str]
    folder: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda line: None
    id: str = ""
    earlier: dict[str, Any] = field(default_factory=dict)  # the entry of run.json on other versions that worked here

    def folder_of(self, data: str) -> Path | None:
        """Folder of a data set's official files; None for the digits, which come with scikit-learn."""
        return None if data == "digits" else self.files[data]

    def result(self, part: StudyPart) -> Result:
        """Read a finished part, or compute it and write its files; a damaged one is computed again."""
        numbers, arrays = (self.folder / "parts" / f"{part.name}.{kind}" for kind in ("json", "safetensors"))
        if numbers.exists():
            try:
                return self._stored(part.name, numbers, arrays)
            except Damaged as error:
                self.progress(f"{error} This part is computed again.")
        self.progress(part.name)
        result = part.compute(self, *part.arguments)
        digest = write_arrays(arrays, result.arrays) if result.arrays else None
        # written last: with this file the part counts as finished
        write_json(numbers, {"part": part.name, "study": self.id, "numbers": result.numbers, "arrays": digest})
        return self._stored(part.name, numbers, arrays)

    def finished(self, part: StudyPart) -> bool:
        """Whether the part's files are there."""
        return (self.folder / "parts" / f"{part.name}.json").exists()

    def _stored(self, name: str, numbers: Path, arrays: Path) -> Result:
        told, checksum = read_json_and_checksum(numbers)
        if checksum is None and not (isinstance(told, dict) and "part" in told):  # an earlier version: numbers alone
            return Result(told, read_arrays_and_metadata(arrays)[0] if arrays.exists() else {})
        described(numbers, told, PartFile)
        check_place(numbers, told, part=name, study=self.id or told["study"])
        if told["arrays"] is None:
            return Result(told["numbers"], {})
        if not arrays.exists():
            raise damaged(arrays, "no such file")
        found, metadata = read_arrays_and_metadata(arrays)
        if metadata.get("sha256") != told["arrays"]:
            raise damaged(arrays, f"not the file that {numbers.name} was written with")
        return Result(told["numbers"], found)

    def trajectory(self, name: str) -> Path:
        """Folder of a training run, which is resumed where it was stopped; one that cannot be read is deleted."""
        folder = self.folder / "runs" / name / "trajectory"
        try:
            if (folder / "run.json").exists():
                Trajectory.open(folder)
        except Damaged as error:
            self.progress(f"{error} The network is trained again.")
            remove(folder)
        return folder
