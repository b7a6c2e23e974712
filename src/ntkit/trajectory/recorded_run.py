"""Trajectory: a folder with a training run, opened for reading."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from re import fullmatch
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypedDict
from weakref import finalize

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.base.files import read_json
from ntkit.base.integrity import check_place, damaged, fingerprint
from ntkit.base.numbers import as_integer
from ntkit.base.run_files import EndedRun, LoopSettings, TrainSettings, described
from ntkit.base.tensors import read_tensors_and_metadata
from ntkit.base.versions import check_format
from ntkit.jacobian.model_outputs import Select
from ntkit.trajectory.batch_order import batch_indices
from ntkit.trajectory.objective import Inputs, Loss
from ntkit.trajectory.step_log import read_indices, read_log

FORMAT = "ntkit-trajectory"
VERSION = 1


class Trajectory:
    """A training run on disk: parameters at recorded steps, batches, losses and settings.

    Step s means: after s optimization steps, so step 0 is the initial network. `ntkit.train` and `ntkit.record` write
    it. `Trajectory.open` opens it at any time, also while another process is writing it: open it again to see new
    steps. ``len(trajectory)`` is the number of recorded steps.

    Attributes
    ----------
    path : the folder.
    settings : settings of the run (``run.json``): kind (``"recorded"``; absent for `train`), record,
        optimizer (class, defaults, groups), parameters (shape and dtype by name, buffers too), aliases of tied
        tensors; for `train` also steps, batch_size, seed, target, loss, schedule, clip, n, hash of the data.
    status : ``"running"`` (also when killed), ``"complete"`` or ``"diverged"`` (a loss that is not finite).
    stop : why and where the run ended: ``reason`` (``"steps"``, ``"target"``, ``"diverged"``; ``"ended"`` for a
        recorded loop), ``step`` (the last one), ``loss`` at that step if it was computed; a diverged run adds
        ``diverged_at`` and ``diverged_loss``. Empty while running.
    steps : the recorded steps, ascending.
    origin : the arguments (model, (x, y), loss) of `train`, on the Trajectory it returns; None after `open`.
    select : of `train`, likewise.

    Examples
    --------
    >>> import torch, ntkit.trajectory
    >>> x = torch.linspace(-1, 1, 5)[:, None]
    >>> model = torch.nn.Linear(1, 1)
    >>> traj = ntkit.trajectory.train(
    ...     model, (x, 2 * x), torch.nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.5), steps=8
    ... )
    >>> traj.steps, traj.losses.shape, traj.status
    ([0, 1, 2, 3, 4, 6, 8], torch.Size([8]), 'complete')
    >>> traj.load(model, 0)
    >>> traj.batch(3)
    tensor([0, 1, 2, 3, 4])
    """

    def __init__(self, path: str | Path, *, temporary: TemporaryDirectory[str] | None = None) -> None:
        self.path = Path(path)
        run = read_run(self.path)
        self.settings: dict[str, Any] = run["settings"]
        self.status: Literal["running", "complete", "diverged"] = run["status"]
        self.stop: dict[str, Any] = run.get("stop", {})
        self._is_recorded_loop = self.settings.get("kind") == "recorded"
        self._id = run_id(run)
        self._listed = "snapshots" in run  # which snapshots a run has that has ended
        self.steps: list[int] = run["snapshots"] if self._listed else snapshots_in(self.path)
        self.origin: tuple[nn.Module, tuple[Inputs, Tensor], Loss] | None = None
        self.select: Select | None = None
        if temporary is not None:
            finalize(self, temporary.cleanup)

    @classmethod
    def open(cls, path: str | Path) -> Trajectory:
        """Open the folder of a run, whether it is complete, running or was killed.

        Every file is compared with its checksum when it is read.

        Raises
        ------
        Refused
            When the folder holds no run, or one of another format; here and when a file is read, when it is damaged:
            changed, cut off, missing, or of another run or step.
        """
        return cls(path)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"Trajectory({str(self.path)!r}, status={self.status!r}, recorded={len(self)})"

    @cached_property
    def losses(self) -> Tensor:
        """Loss before each step: float64 [S], entry s on ``batch(s)`` at the parameters of step s (S: number of steps).

        NaN where a recorded loop passed no loss.
        """
        return self._log["losses"]

    @cached_property
    def learning_rates(self) -> Tensor:
        """Learning rate of each step's update: float64 [S, groups of the optimizer].

        NaN where a group has none, or was added later.
        """
        return self._log["learning_rates"]

    @cached_property
    def _log(self) -> dict[str, Tensor]:
        ended = self.stop["step"] if self.status != "running" else None
        groups = len(self.settings["optimizer"]["groups"])
        if self._is_recorded_loop:
            return read_log(self.path / "log", self._id, groups, ended)
        for name in ("losses.safetensors", "checkpoint.safetensors"):
            if ended is not None or (self.path / name).exists():
                return read_losses(self.path / name, self._id, ended)
        empty = torch.zeros(0, groups, dtype=torch.float64)
        return {"losses": empty[:, 0], "learning_rates": empty}

    def batch(self, step: int) -> Tensor:
        """Indices (int64 [rows]) of the training examples that step `step` used.

        Raises
        ------
        Refused
            When the run has no such step, or was recorded without indices.
        """
        last = len(self.losses) if self._is_recorded_loop else self.stop.get("step", self.settings.get("steps"))
        fix = "Step s leads from state s to state s + 1."
        step = as_integer(step, "step", f"0 <= step < {last}", fix, least=0, most=last - 1)
        if not self._is_recorded_loop:
            return batch_indices(self.settings["seed"], self.settings["n"], self.settings["batch_size"], step)
        indices = read_indices(self.path / "log", self._id, step)
        if indices is None:
            expected, fix = "its rows of the training set", "Call rec.step(indices, loss) in the loop that is recorded."
            raise refusal(f"batch of step {step}", got="a step recorded without indices", expected=expected, fix=fix)
        return indices

    def state(self, step: int) -> dict[str, Tensor]:
        """Parameters and buffers at a recorded step, by name; tied tensors appear under each of their names.

        Raises
        ------
        Refused
            When the step was not recorded; names the nearest recorded steps. When its file is damaged or missing.
        """
        step = as_integer(step, "step", "one of trajectory.steps", "Pass one integer.")
        if step not in self.steps:
            near = sorted(sorted(self.steps, key=lambda s: abs(s - step))[:3])
            expected = f"one of trajectory.steps; nearest: {', '.join(map(str, near)) or 'none yet'}"
            fix = "Ask for one of those, or train again with record='all' or record=[steps]."
            raise refusal(f"step {step}", got="a step that was not recorded", expected=expected, fix=fix)
        if not self._listed and not snapshot_path(self.path, step).exists():
            got = "a snapshot that the run deleted to stay within its budget"
            fix = "Open the trajectory again and choose one of its steps."
            raise refusal(f"step {step}", got=got, expected="a snapshot that still exists", fix=fix)
        tensors = read_snapshot(self.path, step, self._id, self.settings)
        return tensors | {alias: tensors[name] for alias, name in self.settings["aliases"].items()}

    def load(self, model: nn.Module, step: int) -> None:
        """Load parameters and buffers of a recorded step into `model`, in place.

        Raises
        ------
        Refused
            When names, shapes or dtypes do not fit; the model is then unchanged.
        """
        assign(model, self.state(step), f"step {step} of {self.path.name}")


def assign(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy named tensors into a model's parameters and buffers, after a check of all of them."""
    groups = tied_names(model)
    targets = {names[0]: tensor for names, tensor in groups}
    canonical = {name: names[0] for names, _ in groups for name in names}
    # non-persistent buffers may be absent
    needed = set(model.state_dict()) | {name for name, _ in model.named_parameters()}
    errors: dict[str, list[str]] = {
        "missing": [names[0] for names, _ in groups if not tensors.keys() & set(names) and needed & set(names)],
        "unexpected": sorted(tensors.keys() - canonical.keys()),
        "of another shape": [],
        "of a dtype that would lose digits": [],
        "tied in the model, different here": [],
    }
    new: dict[str, Tensor] = {}
    two = False  # outputs for two classes
    for name in [name for name in canonical if name in tensors]:
        tensor, target = tensors[name], targets[canonical[name]]
        if tensor.shape != target.shape:
            errors["of another shape"].append(f"{name} {list(tensor.shape)} (model: {list(target.shape)})")
            two |= tensor.shape[:1] == (2,) and target.shape == (1, *tensor.shape[1:])
        elif not _keeps_digits(tensor.dtype, target.dtype):
            errors["of a dtype that would lose digits"].append(f"{name} {tensor.dtype} (model: {target.dtype})")
        elif (first := new.setdefault(canonical[name], tensor)) is not tensor and not torch.equal(first, tensor):
            errors["tied in the model, different here"].append(name)
    if any(errors.values()):
        texts = {what: ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") for what, names in errors.items()}
        got = "; ".join(f"{len(names)} {what}: {texts[what]}" for what, names in errors.items() if names)
        fix = "Build the model as it was built for that file. Nothing was loaded."
        if two:
            fix += (
                " ntkit asks for one output for two classes: of a last layer with two, the second row minus the first."
            )
        raise refusal(source, got=got, expected="the model's parameters and buffers by name, shape and dtype", fix=fix)
    with torch.no_grad():
        for name, tensor in new.items():
            targets[name].copy_(tensor)


def _keeps_digits(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether all values of a dtype are values of the other, and of its kind: integers are no weights."""
    if (source.is_floating_point, source.is_complex) != (target.is_floating_point, target.is_complex):
        return False
    try:
        return torch.promote_types(source, target) == target
    except RuntimeError:  # eight-bit floats
        return source == target


def tied_names(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each parameter and buffer once, with all of its names: a tied tensor has several."""
    names_by_id: dict[int, tuple[list[str], Tensor]] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names_by_id.setdefault(id(tensor), ([], tensor.detach()))[0].append(name)
    return list(names_by_id.values())


def snapshot_path(folder: Path, step: int) -> Path:
    """File of the snapshot of a step."""
    return folder / "snapshots" / f"step-{step:08d}.safetensors"


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json`` of a trajectory's folder; refuse any other file."""
    run = read_json(folder / "run.json")
    path = folder / "run.json"
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        got = f"format {run.get('format') if isinstance(run, dict) else type(run).__name__}"
        fix = "Name the folder that ntkit.train wrote."
        raise refusal(str(path), got=got, expected=FORMAT, fix=fix)
    check_format(path, run.get("version"), VERSION, "Open it with the release that wrote it.")
    described(path, run, _AnyRun if run.get("status") == "running" else _Ended)
    recorded = run["settings"].get("kind") is not None
    described(path, run["settings"], LoopSettings if recorded else TrainSettings, "settings")
    if unknown := sorted(set(run["settings"]["aliases"].values()) - run["settings"]["parameters"].keys()):
        raise damaged(path, f"settings.aliases names {unknown[0]!r}, which is none of settings.parameters")
    return run


class _AnyRun(TypedDict):
    status: Literal["running", "complete", "diverged"]
    initial: str
    settings: dict[str, Any]


class _Ended(_AnyRun, EndedRun):
    pass


def run_id(run: dict[str, Any]) -> str:
    """What the files of a run have in common and carry: its settings and initial network, as 16 hex digits."""
    return fingerprint([run["initial"], run["settings"]])


def snapshots_in(folder: Path) -> list[int]:
    """Steps of the snapshots that lie in a run's folder, ascending."""
    names = (fullmatch(r"step-(\d+)", path.stem) for path in (folder / "snapshots").glob("step-*.safetensors"))
    return sorted(int(name[1]) for name in names if name)


def read_snapshot(folder: Path, step: int, run: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters and buffers of a snapshot, a tied one once; refuse a damaged or missing file, and one of another run.

    `run` is the run's id, `settings` are its settings.
    """
    path = snapshot_path(folder, step)
    if not path.exists():
        raise damaged(path, "no such file")
    tensors, metadata = read_tensors_and_metadata(path)
    check_place(path, metadata, run=run, step=f"{step:08d}")
    if differ := sorted(tensors.keys() ^ settings["parameters"].keys()):
        there = "a tensor" if differ[0] in tensors else "no tensor"
        raise damaged(path, f"{there} {differ[0]!r}, unlike settings.parameters in run.json")
    return tensors


def read_losses(path: Path, run: str, steps: int | None) -> dict[str, Tensor]:
    """Losses and learning rates of a run of `train`; of a run that has ended all its `steps` must be there."""
    if not path.exists():
        raise damaged(path, "no such file")
    tensors, metadata = read_tensors_and_metadata(path)
    check_place(path, metadata, run=run)
    losses, rates = tensors.get("losses"), tensors.get("learning_rates")
    if losses is None or rates is None or losses.dim() != 1 or rates.dim() != 2 or len(losses) != len(rates):
        raise damaged(path, "no losses [S] and learning rates [S, groups]")
    if steps is not None and len(losses) != steps:
        raise damaged(path, f"losses of {len(losses)} steps, not of the {steps} in run.json")
    return {"losses": losses, "learning_rates": rates}
