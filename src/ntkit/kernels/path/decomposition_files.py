"""A decomposition on disk: its result, or the state of an unfinished sweep."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkit.base.checks import Damaged, refusal
from ntkit.base.files import remove
from ntkit.base.function_identity import OTHER_VERSION
from ntkit.base.integrity import damaged
from ntkit.base.lock import FolderLock
from ntkit.base.tensors import read_tensors_and_metadata, write_tensors
from ntkit.base.versions import check_format
from ntkit.kernels.path.decomposition import PathDecomposition, StepShare
from ntkit.trajectory.run_writer import CheckpointTimer

if TYPE_CHECKING:
    from ntkit.kernels.path.sweep import Sweep

_FORMAT, _VERSION = "ntkit-decomposition", 1
_PLAIN = ("contributions", "initial", "regularization", "prediction", "residual")


class DecompositionFiles:
    """The folder of a decomposition: ``decomposition.safetensors`` at the end, until then one file per part of it.

    A ``with`` statement holds its lock. A damaged file is computed again, with a warning.

    Parameters
    ----------
    folder : None writes nothing.
    identity : all that the numbers depend on, as JSON; a folder with another identity is refused.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._lock = None if folder is None else FolderLock(folder)
        self._identity = json.loads(json.dumps(identity))
        self._timer = CheckpointTimer()

    def __enter__(self) -> DecompositionFiles:
        if self._lock is not None:
            self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def result(self) -> PathDecomposition | None:
        """The finished decomposition, if there is one."""
        stored = self._read("decomposition")
        return None if stored is None else _unpacked(*stored)

    def finish(self, result: PathDecomposition) -> None:
        """Write the result and delete the parts."""
        if self._folder is None:
            return
        self._write("decomposition", *_packed(result))
        for file in self._folder.glob("part-*.safetensors"):
            remove(file)

    def size(self, fit: int) -> int:
        """Test points per part: as in the stored parts; `fit` in a new folder."""
        stored = self._read("part-0")
        return fit if stored is None else stored[1]["size"]

    def restore(self, sweep: Sweep, start: int) -> int | None:
        """Restore the sweep of the part from `start`; returns its last step, None without a stored state."""
        stored = self._read(f"part-{start}")
        if stored is None:
            return None
        sweep.restore(stored[0], stored[1]["carry"])
        return stored[1]["step"]

    def keep(self, sweep: Sweep, start: int, size: int, step: int) -> None:
        """Write the state of a sweep: at its end, and from time to time."""
        if self._folder is None or not (step == 0 or self._timer.due(False)):
            return
        with self._timer.measured():
            tensors, carry = sweep.state(done=step == 0)
            self._write(f"part-{start}", tensors, {"size": size, "step": step, "carry": carry})

    def _write(self, name: str, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        assert self._folder is not None
        told = {"file": name, "format": _FORMAT, "identity": self._identity, **rest}
        write_tensors(self._folder / f"{name}.safetensors", tensors, told)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self._folder is None or not (path := self._folder / f"{name}.safetensors").exists():
            return None
        try:
            tensors, rest = read_tensors_and_metadata(path)
            check_format(path, rest.get("version", _VERSION), _VERSION, "Give another folder.")  # absent: 1
            needed = ("integration", "bitwise", "steps") if name == "decomposition" else ("size", "step", "carry")
            if rest.get("file", name) != name or rest.get("format") != _FORMAT or not rest.keys() >= {*needed}:
                raise damaged(path, f"another file ({rest.get('file')})")
        except Damaged as error:
            warnings.warn(f"{error} It is computed again.", stacklevel=5)
            remove(path)
            return None
        if rest.get("identity") != self._identity:
            theirs = rest.get("identity") or {}
            keys = dict.fromkeys([*self._identity, *theirs])
            differs = [key for key in keys if theirs.get(key) != self._identity.get(key)]
            got = f"another decomposition ({', '.join(differs) or 'unknown'} differ)"
            fix = f"Give another folder. {OTHER_VERSION}"
            raise refusal(str(self._folder), got=got, expected="one of the same run, test points and settings", fix=fix)
        return tensors, rest


def _packed(result: PathDecomposition) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: getattr(result, name) for name in _PLAIN}
    tensors |= {f"layers.{name}": value for name, value in (result.layers or {}).items()}
    for share in result.steps or []:
        tensors |= {f"rows.{share.step}": share.rows, f"values.{share.step}": share.values}
    steps = None if result.steps is None else [share.step for share in result.steps]
    return tensors, {"integration": result.integration, "bitwise": result.bitwise, "steps": steps}


def _unpacked(tensors: dict[str, Tensor], rest: dict[str, Any]) -> PathDecomposition:
    layers = {name.removeprefix("layers."): t for name, t in tensors.items() if name.startswith("layers.")}
    steps = rest["steps"] and [StepShare(s, tensors[f"rows.{s}"], tensors[f"values.{s}"]) for s in rest["steps"]]
    plain: dict[str, Any] = {name: tensors[name].to(torch.float64) for name in _PLAIN}
    rest = {"layers": layers or None, "steps": steps, "integration": rest["integration"], "bitwise": rest["bitwise"]}
    return PathDecomposition(**plain, **rest)
