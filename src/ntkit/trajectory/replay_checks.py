"""What a recorded run, and what is given with it, must be so that the run can be made again: checks at the door."""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.jacobian.model_calls import check_mode
from ntkit.trajectory.batch_order import recorded_at
from ntkit.trajectory.optimizer_updates import check_clip
from ntkit.trajectory.recorded_run import Trajectory, tied_names
from ntkit.trajectory.train import Problem, loss_name


def given(
    trajectory: Trajectory, model: Any, data: Any, loss: Any
) -> tuple[nn.Module, tuple[Any, Tensor], Callable[[Any, Tensor], Tensor]]:
    """Complete what is given by what `train` was called with."""
    found = {"model": model, "data": data, "loss": loss}
    for name, value in zip(found, trajectory.origin or (), strict=False):
        found[name] = value if found[name] is None else found[name]
    if missing := [name for name, value in found.items() if value is None]:
        raise refusal(
            ", ".join(missing),
            got="nothing, and the trajectory was opened from disk",
            expected="what the run was trained with: only train's own trajectory remembers it",
            fix=f"Pass {', '.join(f'{name}=' for name in missing)} (data as (x, y)).",
        )
    for name, right, wish in (
        ("model", isinstance(found["model"], nn.Module), "a torch.nn.Module"),
        ("loss", callable(found["loss"]), "a function of model(x) and y"),
    ):
        if not right:
            got = f"a {type(found[name]).__name__}"
            raise refusal(name, got=got, expected=wish, fix="Pass the one the run was trained with.")
    return found["model"], found["data"], found["loss"]


def checked_clip(settings: dict[str, Any], problem: Problem, clip: float | None) -> float | None:
    """Compare data, loss and clip with those of the run, as far as it tells; give the clip."""
    check_clip(clip)
    if "data" in settings and problem.hash() != settings["data"]:
        other = "other data, or the same in another order or dtype"
        raise refusal(
            "data",
            got=other if problem.n == settings["n"] else f"{problem.n} examples",
            expected=f"the {settings['n']} examples that the run was trained on, as they were",
            fix="Pass the same (x, y); batches are rows of it.",
        )
    name = loss_name(problem.loss_function)
    if "loss" in settings and name != settings["loss"]:
        raise refusal("loss", got=name, expected=f"{settings['loss']}, as in training", fix="Pass that function.")
    if settings.get("kind") == "recorded":
        return clip
    if clip is not None and clip != settings.get("clip"):
        got, expected = f"a max norm of {clip}", f"{settings.get('clip')}, as in training"
        raise refusal("clip", got=got, expected=expected, fix="Leave it out: the run has recorded it.")
    return settings.get("clip")


def copied(model: nn.Module, settings: dict[str, Any], in_train_mode: bool) -> nn.Module:
    """Copy the network, in eval mode, and check that it is one the run can be made again with."""
    try:
        made = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        fix = "Build it anew; call nothing on it that leaves tensors with a graph behind."
        raise refusal(
            "model", got=f"one that cannot be copied ({error})", expected="a plain module", fix=fix
        ) from error
    found = {names[0]: [list(tensor.shape), str(tensor.dtype)] for names, tensor in tied_names(made)}
    told = settings["parameters"]
    if wrong := [name for name in [*told, *found] if told.get(name) != found.get(name)]:
        raise refusal(
            "model",
            got=f"'{wrong[0]}' {found.get(wrong[0], 'absent')}",
            expected=f"{told.get(wrong[0], 'absent')}, as in the run",
            fix="Build the model as it was built for that run.",
        )
    check_mode(made.train(in_train_mode))
    check_mode(made.eval())
    for name, p in made.named_parameters():
        p.requires_grad_(name in settings["trainable"])
    return made


def sound_steps(trajectory: Trajectory) -> int:
    """Give the steps that can be made again; all snapshots that the run should have must be there."""
    settings, stop = trajectory.settings, trajectory.stop
    if trajectory.status == "running":
        raise refusal(
            str(trajectory.path),
            got="a run that is running or was killed",
            expected="one that has ended",
            fix="Let it end, or go on with resume=True; then open it again.",
        )
    last, record = stop["step"], settings["record"]
    # Of a function only the name is known, and a run held to a budget gives snapshots up.
    unknown = settings.get("budget") is not None or (isinstance(record, str) and record not in ("log", "all"))
    due = {0, last} if unknown else {0, last, *filter(recorded_at(record), range(last))}
    if missing := sorted(due - set(trajectory.steps)):
        raise refusal(
            str(trajectory.path),
            got=f"no snapshot of step {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}",
            expected=f"one at each recorded step (record={record!r})",
            fix="A file was deleted: fetch the run's folder anew, or record it again.",
        )
    if trajectory.status == "diverged" and settings.get("kind") == "recorded":
        return max(step for step in trajectory.steps if step <= stop["diverged_at"])
    return last


def checked_rates(trajectory: Trajectory, steps: int) -> Tensor:
    """Give the learning rates of each step, [S, groups]; they must agree with run.json where that tells them."""
    groups, rates = trajectory.settings["optimizer"]["groups"], trajectory.learning_rates[:steps]
    if len(rates) < steps or (steps and (rates.shape[1] != len(groups) or not bool(torch.isfinite(rates).all()))):
        raise refusal(
            f"learning rates of {trajectory.path.name}",
            got=f"{list(rates.shape)}, {int((~torch.isfinite(rates)).sum())} of them missing",
            expected=f"one for each of {steps} steps and each of {len(groups)} groups of the optimiser, from the start",
            fix="Record a run whose groups stay; if a file of the log was deleted, fetch the folder anew.",
        )
    constant = trajectory.settings.get("kind") != "recorded" and trajectory.settings.get("schedule") is None
    for place, group in enumerate(groups if constant else []):
        told = group["lr"]
        if isinstance(told, Real) and (other := rates[rates[:, place] != told, place]).numel():
            raise refusal(
                f"optimizer.groups.{place}.lr in run.json of {trajectory.path.name}",
                got=told,
                expected=f"{other[0].item()}, as in the log of the steps (no schedule)",
                fix="One of the two was changed: record the run again, or fetch its folder anew.",
            )
    return rates
