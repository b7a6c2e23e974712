"""Checks of a recorded run and of the model, data and loss for its replay."""

from __future__ import annotations

import copy
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.jacobian.model_calls import check_mode, check_module
from ntkit.jacobian.model_outputs import PartHook, Select, check_select
from ntkit.trajectory.objective import Inputs, Loss, Objective, loss_name
from ntkit.trajectory.optimizer_updates import check_clip
from ntkit.trajectory.recorded_run import Trajectory, snapshots_in, tied_names
from ntkit.trajectory.snapshots import snapshot_rule


def training_arguments(
    trajectory: Trajectory,
    model: nn.Module | None,
    data: tuple[Inputs, Tensor] | None,
    loss: Loss | None,
    select: Select | None,
) -> tuple[nn.Module, tuple[Inputs, Tensor], Loss, Select | None]:
    """Model, data, loss and select; those that are None are taken from the trajectory that `train` returned."""
    values: dict[str, Any] = {"model": model, "data": data, "loss": loss}
    for name, value in zip(values, trajectory.origin or (), strict=False):
        values[name] = value if values[name] is None else values[name]
    if missing := [name for name, value in values.items() if value is None]:
        got = "nothing, and the trajectory was opened from disk"
        expected = "the arguments that the run was trained with; only the trajectory that train returns has them"
        fix = f"Pass {', '.join(f'{name}=' for name in missing)} (data as (x, y))."
        raise refusal(", ".join(missing), got=got, expected=expected, fix=fix)
    check_module(values["model"], fix="Pass the model that the run was trained with.")
    if not callable(values["loss"]):
        got, fix = f"a {type(values['loss']).__name__}", "Pass the loss that the run was trained with."
        raise refusal("loss", got=got, expected="a function of model(x) and y", fix=fix)
    check_select(select)
    if select is None and (select := trajectory.select) is None and trajectory.settings.get("select") is not None:
        got, expected = "nothing, and the trajectory was opened from disk", "the function that the run was trained with"
        raise refusal("select", got=got, expected=expected, fix="Pass select=.")
    return values["model"], values["data"], values["loss"], select


def checked_clip(settings: dict[str, Any], objective: Objective, clip: float | None) -> float | None:
    """Compare data, loss and clip with the run's settings, as far as they are recorded; return the clip."""
    check_clip(clip)
    if "data" in settings and objective.data_hash() != settings["data"]:
        other = "other data, or the same in another order or dtype"
        got = other if objective.n == settings["n"] else f"{objective.n} examples"
        expected = f"the {settings['n']} examples that the run was trained on, unchanged"
        raise refusal("data", got=got, expected=expected, fix="Pass the same (x, y); batches are rows of it.")
    name = loss_name(objective.loss)
    if "loss" in settings and name != settings["loss"]:
        raise refusal("loss", got=name, expected=f"{settings['loss']}, as in training", fix="Pass that function.")
    if settings.get("kind") == "recorded":
        return clip
    if clip is not None and clip != settings.get("clip"):
        got, expected = f"a max norm of {clip}", f"{settings.get('clip')}, as in training"
        raise refusal("clip", got=got, expected=expected, fix="Remove the argument: the run has recorded it.")
    return settings.get("clip")


def replay_model(
    model: nn.Module, settings: dict[str, Any], in_train_mode: bool, select: Select | None = None
) -> nn.Module:
    """Copy of the network that returns the part of its output that is looked at, in eval mode; checked for this run."""
    try:
        model = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        got, expected = f"a module that cannot be copied ({error})", "a module without tensors that have a graph"
        fix = "Build the model again, or detach the tensors that its forward pass stores."
        raise refusal("model", got=got, expected=expected, fix=fix) from error
    parameters = {names[0]: [list(tensor.shape), str(tensor.dtype)] for names, tensor in tied_names(model)}
    recorded = settings["parameters"]
    for name in [*recorded, *parameters]:
        if recorded.get(name) != parameters.get(name):
            got = f"'{name}' {parameters.get(name, 'absent')}"
            expected = f"{recorded.get(name, 'absent')}, as in the run"
            raise refusal("model", got=got, expected=expected, fix="Build the model as it was built for that run.")
    check_mode(model.train(in_train_mode))
    check_mode(model.eval())
    for name, p in model.named_parameters():
        p.requires_grad_(name in settings["trainable"])
    model.register_forward_hook(PartHook(select))
    return model


def replayable_steps(trajectory: Trajectory) -> int:
    """Number of steps that can be replayed, after a check that no snapshot is missing."""
    settings, stop = trajectory.settings, trajectory.stop
    if trajectory.status == "running":
        expected, fix = "a run that has ended", "Let it end, or continue it with resume=True; then open it again."
        raise refusal(str(trajectory.path), got="a run that is running or was killed", expected=expected, fix=fix)
    last, record = stop["step"], settings["record"]
    # A function is recorded by its name only, and a budget deletes snapshots.
    unknown = settings.get("budget") is not None or (isinstance(record, str) and record not in ("log", "all"))
    expected = {0, last} if unknown else {0, last, *filter(snapshot_rule(record), range(last))}
    if missing := sorted(expected - set(snapshots_in(trajectory.path))):
        got = f"no snapshot of step {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}"
        fix = "A file was deleted: restore the run's folder from its source, or record the run again."
        raise refusal(str(trajectory.path), got=got, expected=f"one at each recorded step (record={record!r})", fix=fix)
    if trajectory.status == "diverged" and settings.get("kind") == "recorded":
        return max(step for step in trajectory.steps if step <= stop["diverged_at"])
    return last


def check_any_steps(steps: int) -> None:
    """Refuse a run without a step, of which there is nothing to explain."""
    if not steps:
        fix = "Train with a lower target, or a smaller learning rate."
        raise refusal("trajectory", got="a run that ended before its first step", expected="at least one step", fix=fix)


def checked_rates(trajectory: Trajectory, steps: int) -> Tensor:
    """Learning rates of each step, [S, groups]; those in run.json must agree with them."""
    groups, rates = trajectory.settings["optimizer"]["groups"], trajectory.learning_rates[:steps]
    if len(rates) < steps or (steps and (rates.shape[1] != len(groups) or not bool(torch.isfinite(rates).all()))):
        got = f"{list(rates.shape)}, {int((~torch.isfinite(rates)).sum())} of them missing"
        expected = f"one for each of {steps} steps and each of {len(groups)} groups of the optimizer, from the start"
        fix = "Record a run with constant groups; if a file of the log was deleted, restore the run's folder."
        raise refusal(f"learning rates of {trajectory.path.name}", got=got, expected=expected, fix=fix)
    constant = trajectory.settings.get("kind") != "recorded" and trajectory.settings.get("schedule") is None
    for place, group in enumerate(groups if constant else []):
        rate = group["lr"]
        if isinstance(rate, Real) and (other := rates[rates[:, place] != rate, place]).numel():
            raise refusal(
                f"optimizer.groups.{place}.lr in run.json of {trajectory.path.name}",
                got=rate,
                expected=f"{other[0].item()}, as in the log of the steps (no schedule)",
                fix="One of the two files was changed: restore the run's folder, or record the run again.",
            )
    return rates


def checked_outputs(outputs: Any, rows: int) -> Tensor:
    """The network's outputs for a batch, after a check that they are one tensor that depends on the parameters."""
    if isinstance(outputs, Tensor) and outputs.ndim and len(outputs) == rows and outputs.requires_grad:
        return outputs
    got = f"a {type(outputs).__name__}"
    if isinstance(outputs, Tensor):
        got = f"shape {list(outputs.shape)}{'' if outputs.requires_grad else ', without a gradient'}"
    expected = f"one tensor of shape [{rows}, ...] that depends on the parameters"
    fix = "Pick one with select=, the part that the loss takes, with examples along its first axis."
    raise refusal("the model's output", got=got, expected=expected, fix=fix)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes."""
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


def norm(tensor: Tensor) -> float:
    """Euclidean norm, summed up in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
