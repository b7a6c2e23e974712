"""The writing side of a run's folder: run.json first, then snapshots and checkpoints, each whole or absent."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkit.base.checks import refusal
from ntkit.base.files import ensure_folder, write_json
from ntkit.base.tensors import read_tensors, read_tensors_and_metadata, tensor_hash, write_tensors
from ntkit.trajectory.recorded_run import FORMAT, VERSION, assign, read_run, snapshot_path, tied_names

CHECKPOINT_SECONDS = 10.0  # a kill loses at most about this much work, and what the share below says
CHECKPOINT_SHARE = 0.05  # checkpoints take at most about this share of the time


class Pace:
    """When a checkpoint is due: often enough, and little of the time."""

    def __init__(self) -> None:
        self._last, self._cost = -math.inf, 0.0

    def due(self, recorded: bool) -> bool:
        """Say whether it is time: at a recorded step, or when the last is long ago."""
        age = time.monotonic() - self._last
        return age >= self._cost / CHECKPOINT_SHARE and (recorded or age >= CHECKPOINT_SECONDS)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the writing of a checkpoint."""
        started = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost = self._last - started


class Run:
    """A run being written: its folder, the model and optimiser at work, and when a checkpoint is due."""

    def __init__(self, model: nn.Module, opt: Optimizer, folder: Path, settings: dict[str, Any]) -> None:
        self.model, self.opt, self.folder = model, opt, folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.pace = Pace()

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
        # What an older release did not know, and is None here, is no difference.
        known = {name: None for name, value in self.settings.items() if value is None}
        changes = _differences(known | run["settings"], self.settings)
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

    def begin(self, network: Mapping[str, Tensor], resume: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Write run.json; or take up the last checkpoint and give what it holds beside network and optimiser."""
        if resume and self._checkpoint.exists():
            return self._taken_up()
        ensure_folder(self.folder / "snapshots")
        initial = tensor_hash(network)
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
        return None

    def _taken_up(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, metadata = read_tensors_and_metadata(self._checkpoint)
        rest = json.loads(metadata["ntkit"])
        network = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        assign(self.model, network, str(self._checkpoint))
        self.opt.load_state_dict(_unpacked(rest["optimizer"], tensors))
        return tensors, rest

    def write_checkpoint(
        self, step: int, network: Mapping[str, Tensor], more: Mapping[str, Tensor], **rest: Any
    ) -> None:
        """Write all that is needed to go on from `step`: the network there, optimiser state, and more."""
        tensors = {f"model.{name}": tensor for name, tensor in network.items()}
        state = _packed(self.opt.state_dict(), tensors)
        content = json.dumps({"step": step, "optimizer": state, **rest})
        write_tensors(self._checkpoint, tensors | dict(more), {"ntkit": content})

    def finish(self, status: str, stop: dict[str, Any]) -> None:
        """Say in run.json how the run ended: the last thing written."""
        self._write_run(status, stop, read_run(self.folder)["initial"])
        # An ended run needs no checkpoint; without it the folder is the same bytes, interrupted or not.
        self._checkpoint.unlink(missing_ok=True)

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
        tensors[name] = value.detach().cpu()
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
