"""The stage of `ntkit analyze` that explains three test points: in short what `ntkit explain` does for any."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.checks import Damaged, Refused, fault
from ntkit.commands import explained_points as points_of
from ntkit.commands.explained_points import Point
from ntkit.commands.network_measures import TrainingTask
from ntkit.explanations.influence import influence
from ntkit.explanations.retrainings import Retrainings
from ntkit.jacobian.model_calls import check_mode
from ntkit.jacobian.structure import SelfCheckError
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.trajectory import Trajectory

CHECKED = 1  # examples whose influence is compared with finite differences
RANDOM_SETS = 3
LONG = (
    "training again so often would take longer than the rest of the report; ntkit explain RUN does it in its own time"
)
COST = 3  # of the whole stage, per example of every batch, in gradients of a sample as `cost_of_kernels` counts them


def explained_stage(
    task: TrainingTask, model: nn.Module, trajectory: Trajectory, affordable: float, memory: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Numbers of the three points and their images; or, under ``unexplained``, why there are none.

    Parameters
    ----------
    model : the trained network.
    memory : bytes that a computation may use at a time.
    affordable : gradients of a sample that this may take. Counted, not timed: the same run gives the same results.
    """
    seen = trajectory.stop["step"] * (trajectory.settings["batch_size"] or len(task.data.x_train))
    if COST * seen > affordable:
        return {"unexplained": LONG}, {}
    try:
        check_mode(copy.deepcopy(model).train())  # as it was trained
    except Refused as error:
        why = "a training is replayed only if each layer treats each sample alone and without chance"
        return {"unexplained": f"{why}, unlike {fault(error)}"}, {}
    points = points_of.chosen_points(task, model, None)
    try:
        return _explained(task, model, trajectory, points, memory)
    except Damaged:
        raise
    except (Refused, SelfCheckError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        return {"unexplained": f"the training of this run cannot be explained ({fault(error)})"}, {}


def _explained(
    task: TrainingTask, model: nn.Module, trajectory: Trajectory, points: list[Point], memory: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    data, steps = task.data, points_of.steps_shown(trajectory.stop["step"])
    training: dict[str, Any] = {"model": model, "data": (data.x_train, data.y_train), "loss": task.loss}
    measure = points_of.measure_of(data)
    x = data.x_test[[point.index for point in points]]
    y = torch.tensor([point.predicted for point in points], device=x.device)
    parts = PathKernel(trajectory, cast(Any, measure), memory=memory, **training).decompose(x, y, steps=True)
    added, added_along = points_of.contributions(parts, steps)
    found = influence(trajectory, x, y, measure=measure, steps=True, checks=CHECKED, memory=memory, **training)
    scores: dict[str, Tensor] = {"accounting": added, "influence": found.scores}
    along = {
        "accounting": added_along,
        "influence": points_of.strongest_along(found.steps or (), found.scores, steps),
    }
    sets = points_of.removed_sets(scores, [max(1, min(points_of.SHOWN, len(data.x_train) // 2))], RANDOM_SETS)
    again = Retrainings(trajectory, x, y, measure=measure, **training)
    told = points_of.explained(data, points, parts, scores, along, again, sets)
    result = {
        "steps_shown": steps,
        "accounting": parts.record(),
        "influence": points_of.influence_in_numbers(found),
        "random_sets": RANDOM_SETS,
        "points": told,
        **({} if data.targets is None else {"quantity": "prediction"}),
    }
    return result, points_of.pictures(data, told)
