"""The writing side of a run's folder: run.json first, then snapshots and checkpoints, each whole or absent."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkit.checks import refusal
from ntkit.files import ensure_folder, write_json
from ntkit.trajectory.trajectory import (
    FORMAT,
    VERSION,
    assign,
    read_run,
    read_tensors,
    read_tensors_and_metadata,
    snapshot_path,
    tensor_hash,
    tied_names,
    write_tensors,
)

CHECKPOINT_SECONDS = 10.0  # a kill loses at most about this much work
CHECKPOINT_SHARE = 0.05  # and checkpoints at snapshots take at most about this share of the time


class Run:
    """A run being written: the model and optimiser at work, and a held copy of the network at the last sound step."""

    def __init__(self, model: nn.Module, opt: Optimizer, folder: Path, settings: dict[str, Any]) -> None:
        self.model, self.opt, self.folder = model, opt, folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.step = 0
        self.losses: list[float] = []
        self._live = {names[0]: tensor for names, tensor in tied_names(model)}
        trained = {name for name, _ in model.named_parameters()}
        self._buffers = [name for name in self._live if name not in trained]
        self._held = {name: tensor.clone() for name, tensor in self._live.items()}
        self._written_at, self._cost = -math.inf, 0.0

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def ended(self, resume: bool) -> bool:
        """Check the folder against the settings; if its run has ended, load the network it ended with."""
        if not (self.folder / "run.json").exists():
            return False
        if not resume:
            raise refusal(
                str(self.folder),
                got="a folder that holds a run",
                expected="a new folder",
                fix="Pass resume=True to go on with it, or name another folder.",
            )
        run = read_run(self.folder)
        changes = _differences(run["settings"], self.settings)
        if changes:
            raise refusal(
                f"resume of {self.folder}",
                got="other settings: " + "; ".join(changes[:5]) + ("; ..." if len(changes) > 5 else ""),
                expected="those the run was started with",
                fix="Pass the same model, data and settings, or name another folder.",
            )
        if run["status"] == "running":
            return False
        assign(self.model, read_tensors(snapshot_path(self.folder, run["stop"]["step"])), str(self.folder))
        self._checkpoint.unlink(missing_ok=True)  # a kill between run.json and its removal
        return True

    def start(self, resume: bool) -> None:
        """Write run.json and the first checkpoint, or take up the one there is."""
        if resume and self._checkpoint.exists():
            return self._take_up()
        ensure_folder(self.folder / "snapshots")
        initial = tensor_hash(self._held)
        if (self.folder / "run.json").exists():
            begun = read_run(self.folder)["initial"]
            if begun != initial:  # killed before the first checkpoint: the start exists nowhere else
                raise refusal(
                    f"resume of {self.folder}",
                    got=f"initial parameters with hash {initial[:12]}",
                    expected=f"those the run was started with, {begun[:12]}, as it has no checkpoint yet",
                    fix="Build the model with the same seed, or name another folder.",
                )
        self._write_run("running", {}, initial)
        self.checkpoint(0)

    def _take_up(self) -> None:
        tensors, metadata = read_tensors_and_metadata(self._checkpoint)
        rest = json.loads(metadata["ntkit"])
        network = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        assign(self.model, network, str(self._checkpoint))
        self.opt.load_state_dict(_unpacked(rest["optimizer"], tensors))
        self.step, self.losses = rest["step"], tensors["losses"].tolist()
        self.hold()

    def buffers(self) -> list[Tensor]:
        """Copy the buffers."""
        return [self._live[name].clone() for name in self._buffers]

    def hold(self, buffers: list[Tensor] | None = None) -> None:
        """Hold a copy of the network as it is now, with these buffers if given."""
        for name, tensor in self._live.items():
            self._held[name].copy_(tensor)
        for name, tensor in zip(self._buffers, buffers or [], strict=False):
            self._held[name].copy_(tensor)

    def keep(self, step: int, recorded: bool) -> None:
        """Write the held network if `step` is recorded, and a checkpoint if it is time for one."""
        if recorded:
            write_tensors(snapshot_path(self.folder, step), self._held)
        age = time.monotonic() - self._written_at
        if age >= CHECKPOINT_SECONDS or (recorded and age * CHECKPOINT_SHARE >= self._cost):
            self.checkpoint(step)

    def checkpoint(self, step: int) -> None:
        """Write all that is needed to go on from `step`: the held network, optimiser state, losses so far."""
        started = time.monotonic()
        tensors = {f"model.{name}": tensor for name, tensor in self._held.items()}
        state = _packed(self.opt.state_dict(), tensors)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        write_tensors(self._checkpoint, tensors, {"ntkit": json.dumps({"step": step, "optimizer": state})})
        self._written_at = time.monotonic()
        self._cost = self._written_at - started

    def end(self, step: int, reason: str, loss: float | None, **more: Any) -> None:
        """Leave the held network, which is that of `step`, in the model and as the last snapshot."""
        with torch.no_grad():
            for name, tensor in self._live.items():
                tensor.copy_(self._held[name])
        write_tensors(snapshot_path(self.folder, step), self._held)
        losses = torch.tensor(self.losses[:step], dtype=torch.float64)
        write_tensors(self.folder / "losses.safetensors", {"losses": losses})
        stop = {"reason": reason, "step": step, "loss": loss, **more}
        self._write_run("diverged" if reason == "diverged" else "complete", stop, read_run(self.folder)["initial"])
        # An ended run needs no checkpoint; without it the folder is the same bytes, interrupted or not.
        self._checkpoint.unlink(missing_ok=True)

    def end_diverged(self, step: int, loss: float) -> None:
        """End at the step before `step`, whose loss (or parameters) are not finite."""
        last = max(step - 1, 0)
        known = self.losses[last] if step > 0 else None
        self.end(last, "diverged", known, diverged_at=step, diverged_loss=str(loss))

    def _write_run(self, status: str, stop: dict[str, Any], initial: str) -> None:
        write_json(
            self.folder / "run.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "torch": torch.__version__,
                "status": status,
                "stop": stop,
                "initial": initial,
                "settings": self.settings,
            },
        )


def described(model: nn.Module, opt: Optimizer) -> dict[str, Any]:
    """Describe network and optimiser as JSON: what a resumed run must agree on and a replay needs."""
    groups = tied_names(model)
    trained = {id(p): name for name, p in model.named_parameters()}
    return {
        "optimizer": {
            "class": f"{type(opt).__module__}.{type(opt).__qualname__}",
            "defaults": {name: _plain(value) for name, value in opt.defaults.items()},
            "groups": [
                {n: [trained[id(p)] for p in v] if n == "params" else _plain(v) for n, v in group.items()}
                for group in opt.param_groups
            ],
        },
        "parameters": {names[0]: [list(tensor.shape), str(tensor.dtype)] for names, tensor in groups},
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "aliases": {alias: names[0] for names, _ in groups for alias in names[1:]},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn an optimiser's state into JSON, its tensors moved to `tensors`."""
    if isinstance(value, Tensor):
        name = f"optimizer.{len(tensors)}"
        tensors[name] = value.clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_packed(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise refusal(
        "optimizer",
        got=f"state of type {type(value).__name__}",
        expected="tensors, numbers, text, lists and dicts",
        fix="Use an optimiser whose state_dict() holds only these.",
    )


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in content}
    items = [_unpacked(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Name what differs between two JSON values: ``optimizer.groups.0.lr (was 0.1, now 0.2)``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        pairs = [(key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and _of_dicts(old + new):
        pairs = [(index, *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{name} (was {_short(old)}, now {_short(new)})"]
    return [change for key, a, b in pairs for change in _differences(a, b, f"{name}.{key}" if name else str(key))]


def _of_dicts(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:37] + "..."
