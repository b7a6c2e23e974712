"""The kernel of `ntkit analyze` against the training loss: test error of its machine, and cosines, at a few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ntkit.base import progress
from ntkit.commands.kernel_measures import machine
from ntkit.commands.network_measures import (
    TrainingTask,
    finite,
    mean_cosine,
    outputs_of,
    rate,
    spread,
)
from ntkit.data import Data
from ntkit.kernels.tangent import TangentKernel
from ntkit.probes import Cosines, cosines, standard
from ntkit.trajectory import Trajectory

SNAPSHOTS, FEWEST = 6, 3  # snapshots at most; with fewer than the latter there is no curve
POINTS, TESTED, PROBED = 250, 500, 30  # at most: points followed, test examples, test images that are transformed
SHARE = 0.1  # of the run's time, about, at most
PAIRS = 300  # products of two samples' gradients that take as long as one gradient (300 to 600 for cnn and mlp)
LITTLE = 1e10  # parameters times gradients of a sample that are always affordable: a minute of one core for an mlp
FOLLOWING = 4  # kernels that take as long as all that is measured at a step along training (4 to 7 for cnn and mlp)


def against_loss(
    task: TrainingTask, model: nn.Module, trajectory: Trajectory, along: dict[str, Any], samples: int, memory: int
) -> dict[str, Any] | None:
    """Machine and cosines of the tangent kernel at some snapshots; None where that would take too long.

    Parameters
    ----------
    model : a copy, which is changed.
    along : the kernel along training: steps, losses and number of the points followed; the machine learns from those.
    samples : test images on which invariances are measured.
    """
    data = _part(task.data, along["points"])
    images = task.data.x_test[spread(len(task.data.x_test), min(samples, PROBED))]
    transforms = standard(tuple(images.shape[1:])) if data.kind == "images" else {}
    count = affordable(task.data, data, along, samples, transforms)
    if count < FEWEST:
        return None
    places = spaced(along["steps"], along["loss"], count)
    kernel = TangentKernel(model, outputs="trace", memory=memory)
    entries = []
    with progress.task("kernel against training loss", total=len(places)) as bar:
        for place in places:
            trajectory.load(model, along["steps"][place])
            K, K_test = kernel(data.x_train).cpu(), kernel(data.x_test, data.x_train).cpu()
            told, _ = machine(K, K_test, data)
            wrong = task.predict(outputs_of(model, data.x_test)).cpu() != data.y_test
            entry: dict[str, Any] = {
                "step": along["steps"][place],
                "loss": along["loss"][place],
                "network_error": rate(wrong, "test examples"),
                "status": told["status"],
                "kernel_error": told["test_error"],
                "ridge_error": told["ridge_test_error"],
                "cosines": [],
                "different": None,
            }
            if transforms:
                transformed, different = cosines(kernel, images, transforms)
                entry["cosines"] = [{"name": name, **_forms(three)} for name, three in transformed.items()]
                entry["different"] = _forms(different)
            entries.append(entry)
            bar.advance()
    return {
        "points": len(data.x_train),
        "tests": len(data.x_test),
        "samples": len(images) if transforms else 0,
        "machine": "ridge" if any(entry["status"] == "not separable" for entry in entries) else "svm",
        "snapshots": entries,
    }


def _forms(three: Cosines) -> dict[str, Any]:
    return {"raw": mean_cosine(three.raw), "centered": mean_cosine(three.centered)}


def _part(data: Data, points: int) -> Data:
    """Points that are followed along training, and test examples; labels on the CPU, for the machine."""
    followed, test = spread(len(data.x_train), points), spread(len(data.x_test), TESTED)
    train = followed[spread(len(followed), POINTS)]
    return replace(
        data,
        x_train=data.x_train[train],
        y_train=data.y_train[train].cpu(),
        x_test=data.x_test[test],
        y_test=data.y_test[test].cpu(),
    )


def affordable(whole: Data, part: Data, along: dict[str, Any], samples: int, transforms: dict[str, Any]) -> int:
    """How many snapshots, at most `SNAPSHOTS`, take no more than `SHARE` of what the rest of the run takes.

    Counted, not timed, so that the same run gives the same results.
    """
    few, tests = len(part.x_train), len(whole.x_test)
    own = _cost(few) + _cost(few, len(part.x_test))
    if transforms:
        own += _cost((1 + sum(map(len, transforms.values()))) * min(samples, tests, PROBED))
    return min(SNAPSHOTS, int(SHARE * cost_of_kernels(whole, along, samples, transforms) / own))


def cost_of_kernels(whole: Data, along: dict[str, Any], samples: int, transforms: dict[str, Any]) -> float:
    """Cost of the kernels of a run, before, along and after training, in gradients of a sample."""
    n, tests, followed = len(whole.x_train), len(whole.x_test), along["points"]
    cost = 2 * (_cost(n) + _cost(n, tests)) + len(along["steps"]) * FOLLOWING * _cost(followed)
    if transforms:
        cost += 2 * _cost((1 + sum(map(len, transforms.values()))) * min(samples, tests))
    return cost


def affordable_trainings(data: Data, parameters: int, cost: float) -> float:
    """Gradients of a sample that a section which trains again may take: what the kernels cost, and a little at least.

    A little is known only of plain vectors, where a gradient takes as many operations as there are parameters.
    """
    return max(cost, LITTLE / parameters) if data.kind == "vectors" else cost


def _cost(n: int, others: int | None = None) -> float:
    """Cost of a kernel of n samples with one another, or with others, in gradients of a sample."""
    return n + n * n / 2 / PAIRS if others is None else n + others + n * others / PAIRS


def spaced(steps: Sequence[int], losses: Sequence[float | None], count: int) -> list[int]:
    """At most `count` places in the lists: the first, the last, and others evenly spaced in the logarithm of the loss.

    Between the ends, each is the first at which the loss is at most a target.

    >>> spaced([0, 1, 2, 4, 8], [2.0, 1.9, 0.6, 0.2, 0.1], 4)
    [0, 2, 3, 4]
    >>> spaced([0, 1], [None, None], 4)
    [0, 1]
    """
    known = [(i, math.log(v)) for i, v in enumerate(losses) if v is not None and finite(v) is not None and v > 0]
    places = {0, len(steps) - 1}
    if known:
        targets = np.linspace(known[0][1], min(v for _, v in known), count)[1:-1]
        places |= {next(i for i, v in known if v <= target) for target in targets}
    return sorted(places)[:count]
