"""Work that leaves a folder, to be killed at any moment: each function begins it, or goes on where it was killed."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from file_operations import FileOperations
from torch import Tensor, nn

import ntkit
from ntkit.base.files import read_json
from ntkit.cli import main
from ntkit.commands import analyze as analysis
from ntkit.commands import track as tracking
from ntkit.studies import kopitkov2019 as kopitkov
from ntkit.studies.kopitkov2019 import learned_pictures, optimizers
from ntkit.studies.part import Sizes, StudyPart, Work
from ntkit.studies.study import Results, Section, table
from ntkit.trajectory import run_writer

IMPORTED = (analysis, tracking)  # a command would import them in the time in which it is killed
DIGITS = ["analyze", "--classes", "3", "8", "--train", "60", "--test", "20", "--track-points", "8"]
DIGITS += ["--probe-points", "2", "--batch-size", "8"]
ANALYZE = [*DIGITS, "--model", "mlp", "--epochs", "4"]
OLDER = [*DIGITS, "--model", "linear", "--epochs", "1", "--seed", "1"]
TOY = Sizes(seeds=2, side=4, width=4, steps=8, lr=0.05, decay=4, k=12, top=2, points=12, digit_steps=8)
STEPS = 1010  # two files of the log of a recorded loop
X = torch.linspace(-1, 1, 24)[:, None]
Y = torch.sin(3 * X)
mse = nn.functional.mse_loss


def command(*words: object) -> None:
    """The command line, as ``ntkit WORDS``."""
    sys.argv = ["ntkit", *map(str, words)]
    main()


def analyze(folder: Path) -> None:
    if (folder / "run.json").exists():
        command("analyze", "--from", folder)
    else:
        command(*ANALYZE, "--out", folder)


def analyze_over_an_older_run(folder: Path) -> None:
    begun = (folder / "run.json").exists() and read_json(folder / "run.json")["settings"]["seed"] == 0
    if begun:
        command("analyze", "--from", folder)
    else:
        command(*ANALYZE, "--out", folder, "--overwrite")


def track(folder: Path) -> None:
    command("track", folder, "--points", 12, "--k", 4)


def network() -> nn.Module:
    """With running statistics and dropout: buffers and random numbers have to be right, too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def adam(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def factor(step: int) -> float:
    return 1 / (1 + step / 100)


def rows(step: int) -> Tensor:
    return torch.arange(step % 3, len(X), 3)


def train(folder: Path) -> None:
    ntkit.train(network(), (X, Y), mse, adam, 1000, batch_size=7, path=folder, resume=True, schedule=factor)


def record(folder: Path) -> None:
    """A loop of one's own, with a scheduler, that depends on the step only; the budget deletes snapshots."""
    model = network()
    optimizer = adam(model.parameters())
    with ntkit.record(model, optimizer, folder, record="log", budget="20 kB", resume=True) as rec:
        if rec.done == STEPS:
            return
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=rec.done - 1)
        for step in range(rec.done, STEPS):
            torch.manual_seed(step)
            batch = rows(step)
            loss = mse(model(X[batch]), Y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(batch, loss)
            scheduler.step()


def bandwidths(results: Results) -> Iterator[Section]:
    arrays = {f"seed {i}": result.arrays["bandwidth"] for i, result in enumerate(results["picture"]["ripples", 2])}
    yield Section(
        "Bandwidths", "bandwidths", "By seed.", [table("Seeds", ["seed"], [[name] for name in arrays])], arrays
    )


def few(work: Work) -> Iterator[StudyPart]:
    """The ripples at depth 2, and Adam on digits beside untrained networks."""
    wanted = (("ripples", 2), "digits", "adam")
    every = (part for parts in (learned_pictures.parts, optimizers.parts) for part in parts(work))
    return (part for part in every if part.case in wanted)


def study(folder: Path) -> None:
    """Two trainings with their trackings and pages for each of two experiments, parts, figures, a report."""
    kopitkov.STUDY = replace(
        kopitkov.STUDY, scales={"quick": TOY}, seeds=(0, 1), parts=[few], sections=[bandwidths], certificate=None
    )
    command("study", "kopitkov2019", "--out", folder)


WORK: dict[str, Callable[[Path], None]] = {
    "analyze": analyze,
    "track": track,
    "record": record,
    "study": study,
    "train": train,
    "analyze --overwrite": analyze_over_an_older_run,
}
OTHER: dict[str, Callable[[Path], None]] = {
    "verify": lambda folder: command("verify", folder),
    "older": lambda folder: command(*OLDER, "--out", folder),
}


def prepare(kind: str, folder: Path, given: Path) -> None:
    """What lies in the folder before the work begins, from the folder of complete runs."""
    if kind == "track":
        shutil.copytree(given / "analyze", folder)
    elif kind == "analyze --overwrite":
        shutil.copytree(given / "older", folder)


def process(kind: str, folder: Path, often: bool, last: int | None, log: Path, ready: Connection) -> None:
    """The life of a process: all that it prints goes to `log`; `often` makes many more checkpoints than usual.

    It kills itself before the file operation number `last`, if any.
    """
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    if often:
        run_writer.CHECKPOINT_SECONDS, run_writer.CHECKPOINT_SHARE = 0.02, math.inf
    operations = FileOperations(folder, last)
    ready.send(None)
    try:
        (WORK | OTHER)[kind](folder)
    finally:
        print(f"{operations.count} file operations", flush=True)
