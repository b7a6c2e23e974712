"""What an analysis will take in time, memory and disk, from a few measured steps: printed before long work."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from ntkit.base.memory import bytes_in_words
from ntkit.base.progress import clock
from ntkit.commands.against_loss import cost_of_kernels
from ntkit.commands.network_measures import TrainingTask, spread
from ntkit.commands.settings import Settings
from ntkit.kernels.tangent import TangentKernel
from ntkit.probes import standard
from ntkit.trajectory.snapshots import snapshot_steps

SAMPLES = 64  # of the kernel that is timed, at most
LONG = 20.0  # seconds from which an estimate is worth a line
EXPLAINED = 40  # runs of training that three explained predictions take (digits, 450 steps: cnn 35, mlp 48)


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
    along = {"points": min(settings.track_points, n), "steps": range(snapshots)}
    transforms = standard(tuple(data.x_test.shape[1:])) if data.kind == "images" else {}
    cost = cost_of_kernels(data, along, settings.probe_samples, transforms)
    seconds = gradient * cost + step * steps * (1 + EXPLAINED * (settings.weights is None))
    if seconds < LONG:
        return None
    memory = 20 * n**2 + 4 * 4 * parameters
    disk = 3 * 4 * n * (n + tests) + 4 * parameters * snapshots
    return (
        f"This will take about {clock(seconds)} on this machine, {bytes_in_words(memory)} of memory beside the "
        f"{settings.memory} that --memory allows, and {bytes_in_words(disk)} on disk until it is complete. Ctrl-C "
        "keeps what is finished."
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
