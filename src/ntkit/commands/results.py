"""What a run found, in one form: ``results.json``, of which the report is a pure function."""

from __future__ import annotations

import shlex
from typing import Any

import torch
from torch import nn

from ntkit.base.versions import RESULTS_FORMAT, versions
from ntkit.commands.network_measures import Task
from ntkit.commands.settings import Settings
from ntkit.trajectory import Trajectory

KERNELS = ("init", "after", "conjugate")


def assemble(
    settings: Settings,
    task: Task,
    model: nn.Module,
    trajectory: Trajectory | None,
    done: dict[str, Any],
    device: torch.device,
    memory: int,
) -> dict[str, Any]:
    """Put what the stages left (`done`: stage -> numbers) into the form of ``results.json``.

    No times and no dates: the same run gives the same bytes.
    """
    s, data = settings, task.data
    absent = {stage: found["absent"] for stage, found in done.items() if found is not None and "absent" in found}
    done = {stage: None if stage in absent else found for stage, found in done.items()}
    machines = [m for key in KERNELS if (m := done[f"machine-{key}"]) is not None]
    svm = [
        {
            "what": f"hard-margin SVM on the {m['label']}: relative duality gap",
            "value": m["gap"],
            "tolerance": 1e-6,
            "ok": m["status"] == "optimal",
        }
        for m in machines
    ]
    along = done["along"]
    eigen = (
        []
        if along is None
        else [
            {
                "what": "eigenpairs along training: largest |K v - lambda v| / lambda_1 (of K as computed)",
                "value": along["residual"],
                "tolerance": 1e-8,
                "ok": along["residual"] <= 1e-8,
            }
        ]
    )
    missing = [
        {"what": f"{stage}: not measured. {reason}", "value": None, "tolerance": None, "ok": False}
        for stage, reason in absent.items()
    ]
    oracle = done["oracle"] or {"checks": [], "fallback": {}, "text": ""}
    training = None
    if trajectory is not None:
        training = {
            "optimizer": s.describe_optimizer(),
            "batch_size": trajectory.settings["batch_size"] or len(data.x_train),
            "steps": trajectory.stop["step"],
            "stop": trajectory.stop["reason"],
            "losses": trajectory.losses.tolist(),
            "seed": s.seed,
        }
    return {
        "format": RESULTS_FORMAT,
        "title": f"{s.model} on {data.name}" + (f", classes {' and '.join(data.classes)}" if s.classes else ""),
        "data": {
            "name": data.name,
            "kind": data.kind,
            "classes": list(data.classes),
            "train": len(data.x_train),
            "test": len(data.x_test),
            "input_shape": list(data.input_shape),
            "normalisation": data.normalisation,
            "source": data.source,
            "hash": data.hash,
        },
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
        "training": training,
        "network": done["network"],
        "machines": machines,
        "quality": [q for key in KERNELS if (q := done[f"gram-{key}"]) is not None],
        "similarity": done["similarity"],
        "along": along,
        "invariances": done["invariances"],
        "neighbours": done["neighbours"],
        "certificates": [*oracle["checks"], *svm, *eigen, *missing],
        "reproduce": {
            "command": "ntkit analyze " + " ".join(map(shlex.quote, s.arguments())),
            "versions": versions(),
            "seed": s.seed,
            "device": str(device),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "memory": memory,
        },
    }
