"""`ntkit track`: the kernel along a recorded run, also while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.checks import Refused, defined, refusal
from ntkit.base.files import read_json
from ntkit.base.lock import FolderLock
from ntkit.base.progress import stop_note
from ntkit.base.regular_files import check_folder
from ntkit.base.run_files import check_is_folder
from ntkit.base.tensors import chosen_device
from ntkit.base.trust import code_of_run, code_of_user
from ntkit.commands.results import checked_run, data_of, settings_of
from ntkit.commands.settings import DataSettings, Settings, TrackSettings
from ntkit.measures.eigenfunctions import bandwidth, patterns
from ntkit.networks.built_in import build
from ntkit.tracking import Tracked, scalars, track, write_images
from ntkit.trajectory import Trajectory

_DRAWN = 6  # eigenvectors that the page shows as images
_OF_DATA = [field.name for field in fields(DataSettings) if field.name != "data"]  # of a recorded trajectory
_PAUSE = 2.0  # seconds between looks at a run that is still training

_COLUMNS = (
    ("step", "step", "{:>9,}"),
    ("loss", "loss", "{:>9.4g}"),
    ("lambda 1", "eigenvalues/1", "{:>9.4g}"),
    ("sharpness", "sharpness", "{:>9.4g}"),
    ("2/lr", "bound", "{:>9.4g}"),
    ("E(y,10)", "energy_target/10", "{:>8.3f}"),
    ("E(f,10)", "energy_output/10", "{:>8.3f}"),
    ("E(m,10)", "energy_residual/10", "{:>8.3f}"),
    ("align", "alignment_centered", "{:>7.3f}"),
    ("1-cos K0", "distance", "{:>9.3g}"),
    ("1st order", "first_order/cosine", "{:>9.4f}"),
)


def track_run(
    run: Path, settings: TrackSettings | None = None, say: Callable[[str], None] = print, trust: bool = False
) -> Path:
    """Track a run of `ntkit analyze`, or a trajectory of `ntkit.train` or `ntkit.record`; return the folder written.

    Parameters
    ----------
    run : a run folder of `analyze`, which names model and data; or a trajectory's folder (then the settings name both).
    settings : what to follow, and how.
    say : called with each line.
    trust : run the code that the run folder names even if it has never been run here; without it, name the same `model`
        (and `data`) in the settings.

    Raises
    ------
    Refused
        When the folder holds no run, or model and data are missing. When the folder names code that has not been run
        here, before any of it is imported.
    """
    s = settings or TrackSettings()
    s.check()
    device = chosen_device(s.device)
    check_folder(s.out or run, "--out" if s.out else "run")
    folder, network, x, y = _run_to_follow(run, s, trust)
    network, x, y = network.to(device), x.to(device), y.to(device)
    place = s.out or run / "track"
    say(" ".join(f"{title:>{len(form.format(0))}}" for title, _, form in _COLUMNS))
    with stop_note(say):
        tracked = _followed(folder, network, x, y, s, place, say)
    if s.tensorboard is not None:
        tracked.to_tensorboard(s.tensorboard)
    from ntkit.report import render_tracked

    with FolderLock(place):
        if x.dim() == 4 and s.outputs == "trace":
            _draw(tracked, x, place)
        say(f"report: {render_tracked(place)}")
    return place


def _followed(
    folder: Path, network: nn.Module, x: Tensor, y: Tensor, s: TrackSettings, place: Path, say: Callable[[str], None]
) -> Tracked:
    """Track the snapshots that are there; with `follow`, also those that come, until the run ends."""
    while True:
        trajectory = Trajectory.open(folder)
        ended = trajectory.status != "running"
        steps = trajectory.steps if ended or not s.follow else trajectory.steps[:-1] or trajectory.steps
        try:
            tracked = track(
                trajectory, x, y, model=network, k=min(s.k, len(y)), outputs=cast(Any, s.outputs), memory=s.memory,
                path=place, steps=steps, on_snapshot=lambda record: say(_row(record)),
            )  # fmt: skip
        except Refused:
            # a recorder deletes snapshots to stay within its disk budget, perhaps between our listing and reading
            if set(trajectory.steps) <= set(Trajectory.open(folder).steps):
                raise
            continue
        if ended or not s.follow:
            return tracked
        time.sleep(_PAUSE)


def _draw(tracked: Tracked, x: Tensor, place: Path) -> None:
    """Write the top eigenvectors as images, with their frequencies, for the page."""
    images = [patterns(np.nan_to_num(tracked.eigenvectors(step)[:, :_DRAWN]), x) for step in tracked.steps]
    widths = defined(bandwidth, torch.stack(images))  # not defined where every kernel is zero
    arrays = {
        "mean": x.double().mean((0, 1)).float().cpu().numpy(),
        "steps": np.asarray(tracked.steps),
        "eigenfunctions": torch.stack(images).float().numpy(),
        "bandwidth": (torch.full((len(images), len(images[0])), torch.nan) if widths is None else widths).numpy(),
    }
    write_images(place, arrays)


def _run_to_follow(run: Path, settings: TrackSettings, trust: bool) -> tuple[Path, nn.Module, Tensor, Tensor]:
    """Trajectory folder, model and points."""
    check_is_folder(run)
    told = read_json(run / "run.json")
    if isinstance(told, dict) and "identity" in told and (run / "trajectory").is_dir():
        checked_run(run / "run.json", told)
        s, folder = settings_of(run / "run.json", told), run / "trajectory"
        given = {"--model": settings.model, "--data": settings.data}
        if extra := [name for name in _OF_DATA if getattr(settings, name) is not None]:
            got, expected = f"--{extra[0].replace('_', '-')} for a run of ntkit analyze", "none: its data are the run's"
            raise refusal(str(run), got=got, expected=expected, fix="Leave it out.")
        code = code_of_run(run, s.named_code(), told["identity"], given, trust)
        data = partial(data_of, run, s, told["identity"])
    elif isinstance(told, dict) and "identity" in told:
        fix = "Track a run that was trained: ntkit analyze without --weights."
        raise refusal(str(run), got="a run of ntkit analyze without a training", expected="one with", fix=fix)
    elif settings.model is None or settings.data is None:
        got, expected = "a recorded trajectory without --model and --data", "both, or a run folder of ntkit analyze"
        fix = "Name the factory of its architecture and the data to follow: --model net.py:make --data set.npz."
        raise refusal(str(run), got=got, expected=expected, fix=fix)
    else:
        chosen = {name: getattr(settings, name) for name in _OF_DATA}
        s, folder = Settings(model=settings.model, data=settings.data, **chosen), run
        code, data = code_of_user(s.named_code()), s.load_data
    with code:
        sets = data()
        network = build(s.model, sets.input_shape, sets.outputs, s.seed, sets.tokens)
    rows = torch.linspace(0, len(sets.x_train) - 1, min(settings.points, len(sets.x_train))).long()
    return folder, network, sets.x_train[rows], sets.y_train[rows]


def _row(record: dict[str, Any]) -> str:
    """One line of the table, for one snapshot."""
    lr = record.get("learning_rate")
    values = {"step": record["step"], **scalars(record), "bound": 2 / lr if lr else None}
    cells = [(values.get(name), form) for _, name, form in _COLUMNS]
    return " ".join(f"{'-':>{len(form.format(0))}}" if value is None else form.format(value) for value, form in cells)
