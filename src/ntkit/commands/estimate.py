"""What an analysis will take in time, memory and disk, from a few measured steps: printed before long work."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from ntkit.base.memory import bytes_in_words
from ntkit.base.progress import clock
from ntkit.commands import explained_stage, limit_measures
from ntkit.commands.against_loss import affordable_trainings, cost_of_kernels
from ntkit.commands.network_measures import TrainingTask, spread
from ntkit.commands.settings import Settings
from ntkit.kernels.tangent import TangentKernel
from ntkit.probes import standard
from ntkit.trajectory.snapshots import snapshot_steps

SAMPLES = 64  # of the kernel that is timed, at most
LONG = 20.0  # seconds from which an estimate is worth a line
TRAINED_AGAIN = {"limit": (2, limit_measures.COST), "explained": (40, explained_stage.COST)}
"""Runs of training that a section takes (digits, 450 steps: explained 35 for cnn, 48 for mlp), and its cost as it is
compared with that of the kernels."""


def estimate(task: TrainingTask, model: nn.Module, settings: Settings, steps: int, batch: int | None) -> str | None:
    """One line on time, memory and disk; None where it will not take long.

    Models are copied, and the caller's random state is kept: what follows has the same bits with or without this.
    """
    data, n, tests = task.data, len(task.data.x_train), len(task.data.x_test)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.random.fork_rng(devices=[data.x_train.device] if data.x_train.is_cuda else []):
        gradient = _seconds_per_gradient(model, task)
        step = _seconds_per_step(model, task, settings, batch) if settings.weights is None else 0.0
    snapshots = len(snapshot_steps("log", steps)) if settings.weights is None else 0
    followed = snapshots if "training" not in settings.without else 0
    along = {"points": min(settings.track_points, n), "steps": range(followed)}
    shown = data.kind == "images" and "invariances" not in settings.without
    transforms = standard(tuple(data.x_test.shape[1:])) if shown else {}
    training, seen = step * steps, steps * (batch or n)
    cost = cost_of_kernels(data, along, settings.probe_points, transforms)
    parts = {"kernels": gradient * cost, "training": training}
    most = affordable_trainings(data, parameters, cost)
    for section, (runs, of_example) in TRAINED_AGAIN.items():
        if section not in settings.without and of_example * seen <= most:  # else the stage leaves itself out
            parts[section] = runs * training
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    seconds = sum(parts.values())
    if seconds < LONG:
        return None
    memory = 20 * n**2 + 4 * 4 * parameters
    disk = 3 * 4 * n * (n + tests) + 4 * parameters * snapshots
    each = ", ".join(f"{name} {clock(own)}" for name, own in parts.items())
    return (
        f"This will take about {clock(seconds)} on this machine ({each}; --without leaves sections out), "
        f"{bytes_in_words(memory)} of memory beside the {settings.memory} that --memory allows, and "
        f"{bytes_in_words(disk)} on disk until it is complete. Ctrl-C keeps what is finished."
    )


def _seconds_per_gradient(model: nn.Module, task: TrainingTask) -> float:
    """Seconds of a kernel of some samples, over its cost in gradients of a sample; the second of two calls."""
    x = task.data.x_train[spread(len(task.data.x_train), SAMPLES)]
    kernel = TangentKernel(copy.deepcopy(model), outputs="trace")
    kernel(x)
    begin = time.perf_counter()
    kernel(x)
    return (time.perf_counter() - begin) / len(x)


def _seconds_per_step(model: nn.Module, task: TrainingTask, settings: Settings, batch: int | None) -> float:
    """Seconds of a step of training, the faster of two."""
    model = copy.deepcopy(model)
    optimizer = settings.make_optimizer(model.parameters())
    x, y = task.data.x_train[:batch], task.data.y_train[:batch]
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
