"""Writes a run's folder: run.json first, then snapshots and checkpoints, each complete or absent."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkit.base.checks import Damaged, refusal
from ntkit.base.files import ensure_folder, remove, write_json
from ntkit.base.integrity import check_place, damaged
from ntkit.base.lock import FolderLock
from ntkit.base.tensors import read_tensors_and_metadata, tensor_hash, write_tensors
from ntkit.trajectory.recorded_run import (
    FORMAT,
    VERSION,
    assign,
    read_losses,
    read_run,
    read_snapshot,
    run_id,
    snapshot_path,
    tied_names,
)
from ntkit.trajectory.step_log import check_log

CHECKPOINT_SECONDS = 10.0  # a kill loses about this much work at most, or what the share below implies
CHECKPOINT_SHARE = 0.05  # largest share of the time that checkpoints take


class CheckpointTimer:
    """Decides when a checkpoint is due: often, but at a small share of the time."""

    def __init__(self) -> None:
        self._last, self._cost = -math.inf, 0.0

    def due(self, snapshot: bool) -> bool:
        """Whether a checkpoint is due: at a snapshot, or when the last one is old."""
        age = time.monotonic() - self._last
        return age >= self._cost / CHECKPOINT_SHARE and (snapshot or age >= CHECKPOINT_SECONDS)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the writing of a checkpoint."""
        started = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - started


class RunWriter:
    """Writes the folder of a run of this model and optimizer, while it holds `lock`.

    Its files carry `id`, that of the run.
    """

    def __init__(self, model: nn.Module, opt: Optimizer, folder: Path, settings: dict[str, Any]) -> None:
        self.model, self.opt, self.folder = model, opt, folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.timer, self.lock = CheckpointTimer(), FolderLock(folder)
        self.id: str = "0" * 16
        self._checkpoint = folder / "checkpoint.safetensors"

    def label(self, step: int) -> dict[str, str]:
        """Metadata of a file of this run: of constant length, so that the sizes of snapshots do not depend on it."""
        return {"run": self.id, "step": f"{step:08d}"}

    def load_if_ended(self, resume: bool) -> bool:
        """Compare the settings with those of a run in the folder; if it has ended, load its last network.

        A damaged run that can start from the beginning has not ended: `begin` starts it.
        """
        if not (self.folder / "run.json").exists():
            return False
        if not resume:
            self.lock.check()
            fix = "Pass resume=True to continue that run, or name another folder."
            raise refusal(str(self.folder), got="a folder that holds a run", expected="a new folder", fix=fix)
        run = read_run(self.folder)
        if changes := _differences(run["settings"], self.settings):
            got = "other settings: " + "; ".join(changes[:5]) + ("; ..." if len(changes) > 5 else "")
            fix = "Pass the same model, data and settings, or name another folder."
            raise refusal(f"resume of {self.folder}", got=got, expected="those the run was started with", fix=fix)
        if run["status"] == "running":
            return False
        try:
            last = self._ended(run)
        except Damaged as error:
            if tensor_hash(self.tensors()) != run["initial"]:
                raise _without_start(error) from error
            return False
        assign(self.model, last, str(self.folder))
        self.lock.sweep()
        remove(self._checkpoint)  # the run was killed between run.json and this removal
        return True

    def _ended(self, run: dict[str, Any]) -> dict[str, Tensor]:
        """The last network of a run that has ended, after a check of all its files."""
        self.id, last, settings = run_id(run), run["stop"]["step"], run["settings"]
        for step in run.get("snapshots", []):
            read_snapshot(self.folder, step, self.id, settings)
        if settings.get("kind") == "recorded":
            check_log(self.folder / "log", self.id, last)
        else:
            read_losses(self.folder / "losses.safetensors", self.id, last)
        return read_snapshot(self.folder, last, self.id, settings)

    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters and buffers as they are now (a forward pass may replace a buffer), a tied one once."""
        return {names[0]: tensor for names, tensor in tied_names(self.model)}

    def begin(
        self, network: dict[str, Tensor], resume: bool, recorded: Iterable[int] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Write run.json; or load the last checkpoint, and return its tensors and metadata.

        Where the checkpoint, or what was written before it, is damaged, the run starts from the beginning.

        Parameters
        ----------
        network : the model's parameters and buffers.
        resume : whether a run in the folder goes on.
        recorded : the steps that have a snapshot, as far as the checkpoint does not say it.
        """
        initial = tensor_hash(network)
        run = read_run(self.folder) if (self.folder / "run.json").exists() else None
        if resume and run is not None:
            try:
                if run["status"] != "running":
                    self._ended(run)  # damaged: else `load_if_ended` had loaded it
                elif self._checkpoint.exists():
                    return self._restored(run, recorded)
            except Damaged as error:
                if run["initial"] != initial:
                    raise _without_start(error) from error
                warnings.warn(f"{error} This run starts from the beginning.", stacklevel=4)
                for name in ("snapshots", "log", "losses.safetensors", self._checkpoint.name):
                    remove(self.folder / name)
        ensure_folder(self.folder / "snapshots")
        if run is not None and (start := run["initial"]) != initial:
            raise refusal(  # killed before the first checkpoint: no file holds the initial network
                f"resume of {self.folder}",
                got=f"initial parameters with hash {initial[:12]}",
                expected=f"those the run was started with, {start[:12]}, as it has no checkpoint yet",
                fix="Build the model with the same seed, or name another folder.",
            )
        self._write_run("running", {"stop": {}, "initial": initial})
        return None

    def _restored(self, run: dict[str, Any], recorded: Iterable[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata of the last checkpoint, loaded, after a check of all that was written before it."""
        self.id = run_id(run)
        tensors, rest = read_tensors_and_metadata(self._checkpoint)
        check_place(self._checkpoint, rest, run=self.id)
        prefix = "model."
        try:
            step, state = int(rest["step"]), _from_json(rest["optimizer"], tensors)
            parameters = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            before = map(int, rest["kept"]) if "kept" in rest else (s for s in recorded if s < step)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(self._checkpoint, f"no checkpoint ({type(error).__name__}: {error})") from error
        for earlier in before:
            # a budget may have deleted it after the checkpoint, and then will again
            if run["settings"].get("budget") is None or snapshot_path(self.folder, earlier).exists():
                read_snapshot(self.folder, earlier, self.id, run["settings"])
        if run["settings"].get("kind") == "recorded":
            check_log(self.folder / "log", self.id, step)
        sizes, own = (
            [len(group["params"]) for group in groups] for groups in (state["param_groups"], self.opt.param_groups)
        )
        if sizes != own:
            got, expected = f"groups of {sizes} parameters in its checkpoint", f"{own}, as the optimizer has now"
            fix = "A run whose groups changed on the way cannot go on: start it again in another folder."
            raise refusal(f"resume of {self.folder}", got=got, expected=expected, fix=fix)
        assign(self.model, parameters, str(self._checkpoint))
        _load_state(self.opt, state)
        return tensors, rest

    def write_checkpoint(self, step: int, network: dict[str, Tensor], more: dict[str, Tensor], **rest: Any) -> None:
        """Write what a resume at `step` needs: network, optimizer state, and more tensors and JSON values."""
        tensors = {f"model.{name}": tensor for name, tensor in network.items()}
        state = _to_json(self.opt.state_dict(), tensors)
        write_tensors(self._checkpoint, tensors | more, {"run": self.id, "step": step, "optimizer": state, **rest})

    def finish(self, status: str, stop: dict[str, Any], snapshots: Iterable[int]) -> None:
        """Write into run.json how the run ended, and the steps of its snapshots; nothing is written after it."""
        steps = sorted(snapshots)
        missing = [s for s in steps if not snapshot_path(self.folder, s).exists()]
        if self.settings.get("budget") is not None:  # this, or a longer run that was resumed here, deleted some
            steps = sorted(set(steps) - set(missing))
        elif missing:
            raise damaged(snapshot_path(self.folder, missing[0]), "no such file")
        initial = read_run(self.folder)["initial"]
        self._write_run(status, {"stop": stop, "initial": initial, "snapshots": steps})
        # Without it the folder has the same bytes whether the run was interrupted or not.
        remove(self._checkpoint)

    def _write_run(self, status: str, more: dict[str, Any]) -> None:
        self.id = run_id(more | {"settings": self.settings})
        run = {"format": FORMAT, "version": VERSION, "torch": torch.__version__, "status": status}
        write_json(self.folder / "run.json", run | more | {"settings": self.settings})


def _load_state(opt: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state with its own dtypes: `load_state_dict` casts it to those of the parameters."""
    opt.load_state_dict(state)
    params = [p for group in opt.param_groups for p in group["params"]]
    for place, saved in state["state"].items():
        entries = opt.state[params[place]]
        for name, value in saved.items():
            if isinstance(value, Tensor) and entries[name].dtype != value.dtype:
                entries[name] = value.to(entries[name].device)


def _without_start(error: Damaged) -> Damaged:
    return Damaged(f"{error} Or pass the network that the run was started with: it then starts from the beginning.")


def network_and_optimizer(model: nn.Module, opt: Optimizer) -> dict[str, Any]:
    """Network and optimizer as JSON: a resumed run must have the same, and a replay needs them."""
    groups = tied_names(model)
    names_by_id = {id(p): name for name, p in model.named_parameters()}
    return {
        "optimizer": {
            "class": f"{type(opt).__module__}.{type(opt).__qualname__}",
            "defaults": {name: _json_value(value) for name, value in opt.defaults.items()},
            "groups": [
                {n: [names_by_id[id(p)] for p in v] if n == "params" else _json_value(v) for n, v in group.items()}
                for group in opt.param_groups
            ],
        },
        "parameters": {names[0]: [list(tensor.shape), str(tensor.dtype)] for names, tensor in groups},
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "aliases": {alias: names[0] for names, _ in groups for alias in names[1:]},
    }


def _json_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)


def _to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """An optimizer's state as JSON; its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        name = f"optimizer.{len(tensors)}"
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _to_json(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_to_json(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    expected, fix = "tensors, numbers, text, lists and dicts", "Use an optimizer whose state_dict() holds only these."
    raise refusal("optimizer", got=f"state of type {type(value).__name__}", expected=expected, fix=fix)


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _from_json(item, tensors) for key, item in content}
    items = [_from_json(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Differences between two JSON values, such as ``optimizer.groups.0.lr (was 0.1, now 0.2)``."""
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = [(key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    elif lists and all(isinstance(item, dict) for item in [*old, *new]):
        pairs = [(index, *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{name} (was {_short(old)}, now {_short(new)})"]
    return [change for key, a, b in pairs for change in _differences(a, b, f"{name}.{key}" if name else str(key))]


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:37] + "..."
