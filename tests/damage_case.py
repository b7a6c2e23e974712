"""Folders of every kind that ntkit writes, small; what can happen to a file; and every reader as a function."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.commands import analyze as analysis
from ntkit.commands.settings import TrackSettings
from ntkit.commands.track import track_run
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report import render
from ntkit.studies.claim import Bound, Claim, Condition
from ntkit.studies.part import Result, Sizes, StudyPart, Work
from ntkit.studies.study import Section, Study, table
from ntkit.tracking import Tracked
from ntkit.trajectory import Trajectory, record, run_writer, train

SETTINGS = ntkit.Settings(
    classes=("3", "8"), train=20, test=8, epochs=3, batch_size=8, track_points=8, probe_points=2, model="mlp"
)
X = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
Y = torch.sin(3 * X)
mse = nn.functional.mse_loss


def net(width: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


def trained(folder: Path, resume: bool = False, **more: Any) -> Trajectory:
    return train(net(), (X, Y), mse, sgd, steps=8, batch_size=4, path=folder, resume=resume, **more)


def looped(folder: Path, resume: bool = False, until: int = 8) -> Trajectory:
    """A recorded loop; stopped by an exception before the last of eight steps if `until` is less."""
    model = net()
    opt = sgd(model.parameters())
    try:
        with record(model, opt, folder, record="all", resume=resume) as rec:
            for step in range(rec.done, 8):
                if step == until:
                    raise KeyboardInterrupt
                rows = torch.arange(step % 4, 8, 2)
                loss = mse(model(X[rows]), Y[rows])
                opt.zero_grad()
                loss.backward()
                opt.step()
                rec.step(rows, loss)
    except KeyboardInterrupt:
        pass
    return Trajectory.open(folder)


def _part(work: Work, seed: int) -> Result:
    run = train(net(), (X, Y), mse, sgd, 4, path=work.trajectory(f"seed-{seed}"), resume=True, seed=seed)
    return Result({"loss": float(run.losses[-1])}, {"losses": run.losses.numpy()})


STUDY = Study(
    name="tiny",
    title="A tiny study",
    paper={"authors": "Nobody", "title": "Nothing", "year": 2000, "reference": "none"},
    scales={"quick": Sizes(steps=4)},
    parts=[lambda work: [StudyPart("loss", None, f"loss-{seed}", _part, (seed,)) for seed in work.seeds]],
    claims=[
        lambda results: [
            Claim("It is small", "a", [Condition("it is", [r.numbers["loss"] for r in results["loss"][None]],
                                                  Bound("at most", 10.0))])
        ]
    ],
    sections=[
        lambda results: [
            Section("Losses", "losses", "By step.",
                    [table("Losses", ["last"], [[f"{r.numbers['loss']:.12g}"] for r in results["loss"][None]])],
                    {"losses": np.stack([r.arrays["losses"] for r in results["loss"][None]])})
        ]
    ],
    seeds=(0, 1),
)  # fmt: skip


class Stopped(Exception):
    """Stops an analysis in a test, as a kill would."""


def build_sample(folder: Path) -> Path:
    """Make one folder of each kind."""
    run = ntkit.analyze(SETTINGS, out=folder / "run")
    track_run(run, TrackSettings(points=6, k=2), say=lambda line: None)
    write = analysis.write_json

    def stopping(path: Path, value: Any) -> None:
        if Path(path).name == "invariances.json":
            raise Stopped
        write(path, value)

    analysis.write_json = stopping
    try:
        ntkit.analyze(SETTINGS, out=folder / "unfinished")
    except Stopped:
        pass
    finally:
        analysis.write_json = write
    trained(folder / "trained")
    looped(folder / "loop")
    PathKernel(Trajectory.open(folder / "trained"), model=net(), data=(X, Y), loss=mse).decompose(
        X[:3] + 0.1, path=folder / "decomposition"
    )

    def kill(step: int, loss: float) -> None:
        if step == 5:
            shutil.copytree(folder / "killing", folder / "killed")

    often = {"CHECKPOINT_SECONDS": 0.0, "CHECKPOINT_SHARE": math.inf}
    usual = {name: getattr(run_writer, name) for name in often}
    vars(run_writer).update(often)
    try:
        trained(folder / "killing", on_step=kill)
    finally:
        vars(run_writer).update(usual)
    shutil.rmtree(folder / "killing")
    (folder / "killed" / ".ntkit-lock").unlink()
    looped(folder / "broken", until=5)
    STUDY.run("quick", folder / "study")
    shutil.copytree(folder / "study", folder / "studying")  # to be resumed: nothing but its parts and runs
    for name in ("results.json", "figures.safetensors", "report.html", "parts/loss-1.json"):
        (folder / "studying" / name).unlink()
    return folder


def _hash(tensors: Iterable[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def _states(trajectory: Trajectory) -> list[Any]:
    batches = [trajectory.batch(s).tolist() for s in range(len(trajectory.losses))]
    states = {step: _hash(trajectory.state(step).values()) for step in trajectory.steps}
    return [trajectory.status, trajectory.losses.tolist(), trajectory.learning_rates.tolist(), batches, states]


def read_trajectory(folder: Path) -> Any:
    return _states(Trajectory.open(folder))


def read_path_kernel(folder: Path) -> Any:
    kernel = PathKernel(Trajectory.open(folder), model=net(), data=(X, Y), loss=mse)
    return kernel.decompose(X[:3] + 0.1).contributions.tolist()


def read_tracked(folder: Path) -> Any:
    tracked = Tracked.open(folder)
    return [tracked.steps, tracked.series, [tracked.eigenvectors(s).tolist() for s in tracked.steps]]


def read_report(folder: Path) -> Any:
    return hashlib.sha256(render(folder).read_bytes()).hexdigest()


def resume_training(folder: Path) -> Any:
    return _states(trained(folder, resume=True))


def resume_loop(folder: Path) -> Any:
    return _states(looped(folder, resume=True))


def resume_study(folder: Path) -> Any:
    STUDY.run("quick", folder)
    return json.loads((folder / "results.json").read_text())


def resume_analysis(folder: Path) -> Any:
    ntkit.analyze(from_run=folder)
    files = [folder / "results.json", *sorted(folder.glob("arrays/*"))]
    states = _states(Trajectory.open(folder / "trajectory"))
    return [{file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}, states]


def track_again(folder: Path) -> Any:
    place = track_run(folder, TrackSettings(points=6, k=2), say=lambda line: None)
    return read_tracked(place)


def decompose_again(folder: Path) -> Any:
    kernel = PathKernel(Trajectory.open(folder.parent / "trained"), model=net(), data=(X, Y), loss=mse)
    return kernel.decompose(X[:3] + 0.1, path=folder).contributions.tolist()


# kind of folder -> readers; those of the second are slower, and may write
QUICK: dict[str, list[Callable[[Path], Any]]] = {
    "trained": [read_trajectory],
    "loop": [read_trajectory],
    "run/trajectory": [read_trajectory],
    "run/track": [read_tracked, read_report],
    "run": [read_report],
    "study": [read_report],
}
SLOW: dict[str, list[Callable[[Path], Any]]] = {
    "trained": [read_path_kernel, resume_training],
    "loop": [resume_loop],
    "run": [track_again],
    "killed": [resume_training, read_trajectory],
    "broken": [resume_loop, read_trajectory],
    "unfinished": [resume_analysis],
    "studying": [resume_study],
    "decomposition": [decompose_again],
}


def outcome(read: Callable[[Path], Any], folder: Path) -> Any:
    """What a reader returns, or its refusal. Warnings that a file is computed again are not errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(folder)
        except Refused as refused:
            return refused


def same(a: Any, b: Any) -> bool:
    """Equal, where a number that is not finite equals itself."""
    return repr(a) == repr(b)


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


TWINS = [{"trained", "killed"}, {"loop", "broken"}, {"run", "unfinished"}, {"study", "studying"}]


def is_earlier(other: Path, file: Path) -> bool:
    """Whether a file is the same one at another time of the same run: going back in time is no damage."""
    return any(twins & {*other.parts} and twins & {*file.parts} for twins in TWINS)


def flip(file: Path, files: list[Path], draw: random.Random) -> None:
    blob = bytearray(file.read_bytes())
    blob[draw.randrange(len(blob))] ^= 1 << draw.randrange(8)
    file.write_bytes(blob)


def digit(file: Path, files: list[Path], draw: random.Random) -> None:
    """Another digit in text: still JSON. In other files a byte."""
    blob = bytearray(file.read_bytes())
    bytes_of = np.frombuffer(bytes(blob), np.uint8)
    places = np.flatnonzero((bytes_of >= 48) & (bytes_of < 58)).tolist()
    place = draw.choice(places or range(len(blob)))
    blob[place] = 48 + (blob[place] - 47) % 10
    file.write_bytes(blob)


def cut(file: Path, files: list[Path], draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(1, file.stat().st_size)])


def empty(file: Path, files: list[Path], draw: random.Random) -> None:
    file.write_bytes(b"")


def zeros(file: Path, files: list[Path], draw: random.Random) -> None:
    """A block that the disk lost."""
    blob = bytearray(file.read_bytes())
    start = draw.randrange(len(blob))
    blob[start : start + 64] = bytes(len(blob[start : start + 64]))
    if bytes(blob) == file.read_bytes():
        blob[start] = 1
    file.write_bytes(blob)


PAGES = (".html", ".md")  # for people: written again from the results, and no program reads them


def another(file: Path, files: list[Path], draw: random.Random) -> None:
    """A complete file of the same kind in its place."""
    kinds = PAGES if file.suffix in PAGES else (file.suffix,)
    others = [f for f in files if f.suffix in kinds and f.read_bytes() != file.read_bytes()]
    others = [f for f in others if not (f.name == file.name and is_earlier(f, file))]
    file.write_bytes(draw.choice(others).read_bytes())


def gone(file: Path, files: list[Path], draw: random.Random) -> None:
    file.unlink()


DAMAGE = [flip, digit, cut, empty, zeros, another, gone]
