"""One file or folder per paper: its experiments, run and judged claim by claim."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal

from ntkit.base.checks import nearest, refusal

STUDIES = ("jacot2018", "kopitkov2019", "bell2023")
SCALES = ("quick", "paper")


def study(
    name: Literal["jacot2018", "kopitkov2019", "bell2023"],
    scale: Literal["quick", "paper"] = "quick",
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    data_dir: str | Path | None = None,
) -> Path:
    """Reproduce a paper: run its experiments, judge its claims, write a report.

    Parameters
    ----------
    name : "jacot2018", "kopitkov2019" or "bell2023".
    scale : "quick" (minutes on two cores) or "paper" (its own sizes: days, for a GPU).
    out : run folder, runs/NAME-SCALE by default. A study that was stopped goes on there.
    say : called with a line at each stage.
    data_dir : folder with the official files of MNIST: experiments on it are made, too.

    Returns
    -------
    Path
        The folder: ``results.json`` (claims, curves), ``report.html``, ``runs/`` (trajectories and trackings).

    Raises
    ------
    Refused
        For an unknown name or scale, a `data_dir` without the files, or a folder with another study.
    """
    for what, value, known in (("study", name, STUDIES), ("scale", scale, SCALES)):
        if value not in known:
            raise refusal(what, got=repr(value), expected=" or ".join(known), fix=nearest(value, known))
    if data_dir is not None:
        from ntkit.data import load

        load("mnist", data_dir)  # a folder without the files is refused now, not after the first experiments
    folder = Path(out) if out is not None else Path("runs") / f"{name}-{scale}"
    return import_module(f"ntkit.studies.{name}").run(scale, folder, say, data_dir)
