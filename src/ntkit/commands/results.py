"""The numbers of all stages in one form: ``results.json``, from which alone the report is made."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ntkit
from ntkit.base.checks import refusal
from ntkit.base.factory import source_hash
from ntkit.base.files import read_json
from ntkit.base.run_files import AnalysisRun, check_is_folder, described
from ntkit.base.tensors import tensor_hash
from ntkit.base.versions import RESULTS_FORMAT, check_format, versions
from ntkit.commands.network_measures import LABELS, TrainingTask
from ntkit.commands.settings import Settings, in_present_names
from ntkit.data import Data
from ntkit.trajectory import Trajectory

KERNELS = ("init", "after", "conjugate")


def earlier_run(folder: Path, settings: Settings | None) -> dict[str, Any]:
    """Read the ``run.json`` of an earlier run; refuse any other file, and settings given in addition."""
    check_is_folder(folder)
    run = read_json(folder / "run.json")
    if not isinstance(run, dict) or not isinstance(run.get("format"), int) or "kind" in run:
        expected, fix = "the run.json of ntkit analyze", "Name the run's own folder, not the trajectory/ inside it."
        raise refusal(str(folder / "run.json"), got="another file", expected=expected, fix=fix)
    run = checked_run(folder / "run.json", run)
    if settings not in (None, Settings()):
        expected, fix = "none: they come from the run", "Leave them out, or start a new run without --from."
        raise refusal(f"--from {folder}", got="further settings", expected=expected, fix=fix)
    return run


def checked_run(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The `run.json` of a run of `analyze`, if this version knows its format and all of its settings."""
    check_format(path, run.get("format"), RESULTS_FORMAT, "Name a run folder of ntkit analyze.")
    described(path, run, AnalysisRun)
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(in_present_names(run["settings"]).keys() - known):
        got = f"settings that ntkit {ntkit.__version__} does not have: {', '.join(unknown)}"
        fix = "Upgrade ntkit, or use the version that wrote the folder."
        raise refusal(str(path), got=got, expected="those of ntkit analyze", fix=fix)
    return run


def settings_of(path: Path, run: dict[str, Any]) -> Settings:
    """The settings in the `run.json` of a run of `analyze`."""
    return described(path, in_present_names(run["settings"]), Settings, "settings")


def told_by(run: Path) -> dict[str, Any]:
    """The `run.json` of a run of `analyze`; refuses other folders, and says what they hold."""
    expected, fix = "a run folder of ntkit analyze", "Name the folder that ntkit analyze wrote."
    check_is_folder(run)
    if not (run / "run.json").exists() and (run / "track.json").exists():
        raise refusal(str(run), got="a tracking", expected=expected, fix="Name the run that it follows.")
    told = read_json(run / "run.json")
    told = told if isinstance(told, dict) else {}
    if "identity" in told:
        return checked_run(run / "run.json", told)
    kinds = {
        "a study": told.get("kind") == "study",
        "a recorded trajectory": told.get("format") == "ntkit-trajectory",
        "a run of ntkit infinite": told.keys() == {"settings", "versions"},
    }
    got = next((kind for kind, is_it in kinds.items() if is_it), "a run.json of something else")
    if got == "a recorded trajectory":
        fix = "From Python: ntkit.influence, ntkit.PathKernel and ntkit.Retrainings take it. Else: " + fix
    raise refusal(str(run), got=got, expected=expected, fix=fix)


def data_of(run: Path, settings: Settings, identity: dict[str, Any]) -> Data:
    """Load the data of a run again; refuses others than those that it noted."""
    data = settings.load_data()
    if data.hash != (noted := identity.get("data")):
        fix = f"Restore the files, or repeat the run: ntkit analyze --from {shlex.quote(str(run))} --out NEW"
        if settings.seed and (settings.train or settings.test):
            fix += ". If an earlier version made the run, repeat it: there, --seed chose the examples, too."
        got, expected = f"data with hash {data.hash}", f"those of the run {run}, {noted}"
        raise refusal(f"--data {settings.data}", got=got, expected=expected, fix=fix)
    return data


def identity_of_run(
    settings: Settings, data: str, before: nn.Module, after: nn.Module, device: torch.device
) -> dict[str, Any]:
    """Hashes and versions by which a run is known again; `data` is the hash of the data set."""
    return {
        "data": data,
        "initial parameters": tensor_hash(before.state_dict()),
        "weights": settings.weights and tensor_hash(after.state_dict()),
        **{f"{option[2:]} file": source_hash(option, name) for option, name in settings.named_code().items()},
        "device": str(device),
        "threads": torch.get_num_threads(),
        **versions(),
    }


def assemble(
    settings: Settings,
    task: TrainingTask,
    model: nn.Module,
    trajectory: Trajectory | None,
    stages: dict[str, Any],
    device: torch.device,
    memory: int,
) -> dict[str, Any]:
    """Put the numbers of the stages (`stages`: name -> numbers) into the form of ``results.json``.

    No times and no dates: the same run gives the same bytes.
    """
    s, data = settings, task.data
    absent = {name: numbers["absent"] for name, numbers in stages.items() if numbers and "absent" in numbers}
    stages = {name: None if name in absent else numbers for name, numbers in stages.items()}
    machines = [m for key in KERNELS if (m := stages[f"machine-{key}"]) is not None]
    oracle = stages["oracle"] or {"checks": [], "fallback": {}, "text": ""}
    return {
        "format": RESULTS_FORMAT,
        "title": _title(s, data),
        "data": _data(data),
        "model": {
            "name": s.model,
            "parameters": sum(p.numel() for p in model.parameters()),
            "outputs": task.outputs,
            "loss": task.name,
            "weights": s.weights,
            "kernel_outputs": "trace",
            "fallback": oracle["fallback"],
            "text": oracle["text"],
        },
        "training": None
        if trajectory is None
        else {
            "optimizer": s.describe_optimizer(),
            "batch_size": trajectory.settings["batch_size"] or len(data.x_train),
            "steps": trajectory.stop["step"],
            "stop": trajectory.stop["reason"],
            "losses": trajectory.losses.tolist(),
            "seed": s.seed,
        },
        "network": stages["network"],
        "machines": machines,
        "quality": [q for key in KERNELS if (q := stages[f"gram-{key}"]) is not None],
        **{name: stages[name] for name in ("similarity", "along", "invariances", "neighbors")},
        "against_loss": stages["against-loss"],
        "comparisons": stages["comparisons"],
        "limit": stages["limit"],
        "explained": stages["explained"],
        "left_out": list(s.without),
        "certificates": [*oracle["checks"], *_certificates(machines, stages["along"], absent)],
        "reproduce": {
            "command": "ntkit analyze " + " ".join(map(shlex.quote, s.arguments())),
            "versions": versions(),
            "seed": s.seed,
            "device": str(device),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "memory": memory,
        },
    }


def _title(s: Settings, data: Data) -> str:
    """Network and data, and the classes that were chosen or the targets."""
    title = f"{s.model} on {data.name}"
    if data.targets is not None:
        return f"{title}, target{'s' if data.outputs > 1 else ''} {', '.join(data.targets.names)}"
    return title + (f", classes {' and '.join(data.classes)}" if s.classes else "")


def _data(data: Data) -> dict[str, Any]:
    """What is said of the data."""
    return {
        "name": data.name,
        "kind": data.kind,
        "classes": list(data.classes),
        "train": len(data.x_train),
        "test": len(data.x_test),
        "input_shape": list(data.input_shape),
        "normalization": data.normalization,
        "source": data.source,
        "hash": data.hash,
        **({} if data.targets is None else {"targets": data.targets._asdict()}),
    }


def _certificates(machines: list, along: dict[str, Any] | None, absent: dict[str, str]) -> list[dict[str, Any]]:
    """What certifies the machines and the eigenpairs; and, as failures, the stages without numbers."""
    rows: list[tuple[str, float | None, float | None, bool]] = [_certificate(m) for m in machines]
    if along is not None:
        what = "eigenpairs along training: largest |K v - lambda v| / lambda_1 (of K as computed)"
        rows.append((what, along["residual"], 1e-8, along["residual"] <= 1e-8))
    for stage, reason in absent.items():
        kind, _, key = stage.partition("-")
        if kind == "machine" and f"gram-{key}" in absent:
            continue  # said once, of the kernel
        of = {"gram": "kernel matrix", "machine": "machine"}
        name = f"{of[kind]} of the {LABELS[key]}" if kind in of else stage
        rows.append((f"{name}: not measured. {reason}", None, None, False))
    return [dict(zip(("what", "value", "tolerance", "ok"), row, strict=True)) for row in rows]


def _certificate(m: dict[str, Any]) -> tuple[str, float | None, float | None, bool]:
    """Check of a machine; where the kernel does not separate the classes, of ridge regression in its place."""
    ridge = f"ridge regression on the {m['label']}: relative residual"
    if "gap" not in m:
        return ridge, m["residual"], 1e-8, m["status"] == "solved"
    if m["status"] == "not separable":
        residual = m["ridge_residual"]
        return ridge, residual, 1e-8, m["ridge_status"] == "solved" and residual is not None and residual <= 1e-8
    return f"hard-margin SVM on the {m['label']}: relative duality gap", m["gap"], 1e-6, m["status"] == "optimal"
