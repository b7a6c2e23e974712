"""`ntkit explain`: what training examples did for some predictions of a run, and what happens without them.

In ``RUN/explain``: ``explain.json`` (which run and which points; first), ``accounting/`` (the path kernel's
decomposition), ``influence.safetensors``, ``retrainings/``, then ``images.safetensors``, ``results.json`` and
``explain.html``. What is finished is kept, whatever stops the command.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ntkit.base.checks import Damaged, Refused, refusal
from ntkit.base.files import read_json, remove, write_arrays, write_json
from ntkit.base.integrity import check_place, fingerprint
from ntkit.base.lock import FolderLock, check_unused
from ntkit.base.memory import parse_memory
from ntkit.base.numbers import is_integer
from ntkit.base.progress import stop_note
from ntkit.base.regular_files import check_folder
from ntkit.base.tensors import read_tensors_and_metadata, write_tensors
from ntkit.base.trust import code_of_run
from ntkit.base.versions import check_format, versions
from ntkit.commands import explained_points as points_of
from ntkit.commands.explained_points import Point
from ntkit.commands.network_measures import TrainingTask
from ntkit.commands.regression_measures import task_of
from ntkit.commands.results import data_of, settings_of, told_by
from ntkit.commands.settings import ExplainSettings, Settings
from ntkit.explanations.influence import influence
from ntkit.explanations.retrainings import Retrainings
from ntkit.jacobian.model_calls import check_mode
from ntkit.kernels.path.decomposition import PathDecomposition
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.networks.built_in import build
from ntkit.report.explain_page import EXPLAIN_FORMAT, KIND, render_explanation
from ntkit.trajectory import Trajectory
from ntkit.trajectory.objective import loss_name
from ntkit.trajectory.replay import Replay

_OWN = ("explain.json", "accounting", "influence.safetensors", "retrainings", "images.safetensors", "results.json",
        "explain.html")  # fmt: skip


class _Opened(NamedTuple):
    """A run of `ntkit analyze`: its id, what it says of itself, its network at the end of training, its trajectory.

    `memory` is what a computation may take of it at a time.
    """

    id: str
    settings: Settings
    identity: dict[str, Any]
    task: TrainingTask
    model: nn.Module
    trajectory: Trajectory
    memory: int | None

    @property
    def training(self) -> dict[str, Any]:
        """What a replay of the run needs."""
        data = self.task.data
        return {"model": self.model, "data": (data.x_train, data.y_train), "loss": self.task.loss}


def explain_run(
    run: Path,
    settings: ExplainSettings | None = None,
    overwrite: bool = False,
    trust: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Explain predictions of a run of `ntkit analyze`; return the folder written.

    Parameters
    ----------
    run : a run folder of `analyze`.
    settings : which test examples; where.
    overwrite : replace an explanation of other test examples, or of another run, in that folder.
    trust : run the code that the run folder names even if it has never been run here.
    say : called with each line.

    Raises
    ------
    Refused
        When the folder holds no such run, or one that cannot be replayed; for test examples out of range; when the
        folder holds another explanation, or another process is writing there.
    """
    s, run = settings or ExplainSettings(), Path(run)
    check_folder(s.out or run, "--out" if s.out else "run")
    opened = _opened(run, s, trust)
    points = points_of.chosen_points(opened.task, opened.model, _checked_indices(s.test, opened.task))
    place = s.out or run / "explain"
    with stop_note(say), FolderLock(place):
        _begin(place, opened, points, overwrite)
        if not _is_complete(place, opened):
            _explain(place, opened, points, run, say)
        say(f"report: {render_explanation(place)}")
    return place


def _explain(place: Path, opened: _Opened, points: list[Point], run: Path, say: Callable[[str], None]) -> None:
    """The three parts, and their results."""
    data, device = opened.task.data, opened.task.data.x_test.device
    x = data.x_test[[point.index for point in points]]
    y = torch.tensor([point.predicted for point in points], device=device)
    if not (place / "accounting" / "decomposition.safetensors").exists():
        say(f"[1 of 4] replaying the training run: {opened.trajectory.stop['step']:,} steps")
        _check_replay(opened, run)
    say("[2 of 4] accounting: what each training example added, by the path kernel")
    measure = cast(Any, points_of.measure_of(data))
    kernel = PathKernel(opened.trajectory, measure, memory=opened.memory, **opened.training)
    parts = kernel.decompose(x, y, steps=True, path=place / "accounting")
    say("[3 of 4] influence: what each training example's weight would change")
    scores, influence_along, certificate = _influence(place, opened, points, x, y, say)
    added, added_along = points_of.contributions(parts, points_of.steps_shown(opened.trajectory.stop["step"]))
    by_method = {"accounting": added, "influence": scores}
    along = {"accounting": added_along, "influence": influence_along}
    sizes = points_of.sizes(len(data.x_train))
    sets = points_of.removed_sets(by_method, sizes)
    count = sum(map(len, sets.values()))
    say(f"[4 of 4] training again: {count} networks, each without {' or '.join(map(str, sizes))} examples")
    again = Retrainings(
        opened.trajectory, x, y, measure=points_of.measure_of(data), path=place / "retrainings", **opened.training
    )
    told = points_of.explained(data, points, parts, by_method, along, again, sets)
    results = _results(opened, parts, certificate, told, run)
    if pictures := points_of.pictures(data, told):
        results["images"] = write_arrays(place / "images.safetensors", pictures)
    write_json(place / "results.json", results)


def _results(
    opened: _Opened, parts: PathDecomposition, certificate: dict[str, Any], told: list[dict[str, Any]], run: Path
) -> dict[str, Any]:
    """What `results.json` holds; no times and no dates."""
    data, n = opened.task.data, len(opened.task.data.x_train)
    return {
        "format": EXPLAIN_FORMAT,
        "kind": KIND,
        "run": opened.id,
        "title": f"{opened.settings.model} on {data.name}"
        + ("" if data.targets is None else f", target {data.targets.names[0]}"),
        **({} if data.targets is None else {"quantity": "prediction"}),
        "data": {"name": data.name, "kind": data.kind, "classes": list(data.classes), "train": n,
                 "test": len(data.x_test)},
        "training": {"optimizer": opened.settings.describe_optimizer(), "steps": opened.trajectory.stop["step"],
                     "loss": opened.task.name, "steps_shown": points_of.steps_shown(opened.trajectory.stop["step"])},
        "accounting": parts.record(),
        "influence": certificate,
        "random_sets": points_of.RANDOM_SETS,
        "points": told,
        "command": "ntkit explain " + shlex.join([str(run), "--test", *(str(t["test_index"]) for t in told)]),
        "versions": versions(),
    }  # fmt: skip


# ---------------------------------------------------------------------- the run


def _opened(run: Path, s: ExplainSettings, trust: bool) -> _Opened:
    """Rebuild model, data and trajectory of a run."""
    told = told_by(run)
    settings = settings_of(run / "run.json", told)
    memory = parse_memory(settings.memory if s.memory is None else s.memory)
    folder, repeat = run / "trajectory", f"ntkit analyze --from {shlex.quote(str(run))}"
    given = {"--model": s.model, "--data": s.data}
    with code_of_run(run, settings.named_code(), told["identity"], given, trust):
        if settings.weights is not None:
            got, fix = "a run of ntkit analyze without a training", "Explain a run without --weights."
            raise refusal(str(run), got=got, expected="a run that was trained", fix=fix)
        if not folder.is_dir() or (trajectory := Trajectory.open(folder)).status == "running":
            got = "a run whose training has not ended"
            raise refusal(str(run), got=got, expected="a trained network", fix=f"Let it end, or go on with: {repeat}")
        data = data_of(run, settings, told["identity"])
        model = build(settings.model, data.input_shape, data.outputs, settings.seed, data.tokens)
    device = str(told["identity"].get("device", "cpu"))
    if device != "cpu" and not torch.cuda.is_available():
        fix = "Explain it on that device, or repeat the run here: " + repeat + " --out NEW"
        raise refusal(str(run), got=f"a run that was trained on {device}", expected="a device of this machine", fix=fix)
    moved = {part: getattr(data, part).to(device) for part in ("x_train", "y_train", "x_test", "y_test")}
    data, model = type(data)(**{**vars(data), **moved}), model.to(device)
    task = task_of(model, data)
    try:
        check_mode(model.train())  # as it was trained
    except Refused as error:
        got, expected = str(error).partition("; expected")[0], "layers that treat each sample alone, without chance"
        fix = "Train without dropout, and with GroupNorm or LayerNorm."
        raise refusal(str(run), got=f"a network whose training cannot be replayed ({got})", expected=expected,
                      fix=fix) from error  # fmt: skip
    trajectory.load(model, trajectory.stop["step"])
    own = fingerprint([told["settings"], told["identity"]])
    return _Opened(own, settings, told["identity"], task, model.eval(), trajectory, memory)


def _checked_indices(index: tuple[int, ...] | None, task: TrainingTask) -> list[int] | None:
    if index is None:
        return None
    n = len(task.data.x_test)
    bad = [i for i in index if not is_integer(i) or not 0 <= i < n]
    if bad or not index:
        fix = "Test examples are numbered from 0, as in the run's report."
        raise refusal("--test", got=bad[0] if bad else "no number", expected=f"numbers from 0 to {n - 1}", fix=fix)
    return list(dict.fromkeys(index))


def _check_replay(opened: _Opened, run: Path) -> None:
    """Refuse a run that cannot be replayed; says how to record it again."""
    again = f"ntkit analyze --from {shlex.quote(str(run))} --out NEW"
    own, recorded = loss_name(opened.task.loss), opened.trajectory.settings.get("loss")
    if own != recorded:  # the name of the same function, before it was another class's
        got, expected = f"a run whose loss is called {recorded}, by an earlier version of ntkit", own
        raise refusal(str(run), got=got, expected=expected, fix=f"Record it again: {again}")
    replay = Replay(opened.trajectory, **opened.training)
    try:
        replay.check()
    except Damaged:
        raise
    except Refused as error:
        now = {"threads": torch.get_num_threads(), **versions()}
        changed = [f"{name} {opened.identity[name]} (now {value})" for name, value in now.items()
                   if name in opened.identity and opened.identity[name] != value]  # fmt: skip
        made = f" The run was made with {', '.join(changed)}." if changed else ""
        raise Refused(f"{error}{made} To record the run again here: {again}") from error


# ---------------------------------------------------------------------- the folder


def _begin(place: Path, opened: _Opened, points: list[Point], overwrite: bool) -> None:
    """Write ``explain.json``, or compare the one that is there."""
    own = {"run": opened.id, "test": [point.index for point in points], "why": [point.why for point in points],
           "format": EXPLAIN_FORMAT}  # fmt: skip
    file = place / "explain.json"
    if file.exists():
        with contextlib.suppress(Damaged):
            told = read_json(file)
            told = told if isinstance(told, dict) else {}
            check_format(file, told.get("format", EXPLAIN_FORMAT), EXPLAIN_FORMAT, "Name another folder (--out).")
            if all(told.get(name) == own[name] for name in ("run", "test")):  # `why` is in words, which may change
                return
            if not overwrite:
                tests = told.get("test")
                named = f"test examples {', '.join(map(str, tests))}" if isinstance(tests, list) else "something else"
                got = f"an explanation of {named}" + ("" if told.get("run") == opened.id else ", of another run")
                fix = "Replace it (--overwrite), or name another folder (--out)."
                raise refusal(str(place), got=got, expected="the same test examples of this run", fix=fix)
        for name in _OWN:
            remove(place / name)
    else:
        check_unused(place)
    write_json(file, own)


def _is_complete(place: Path, opened: _Opened) -> bool:
    """Whether the results are there, and of this run."""
    try:
        told = read_json(place / "results.json") if (place / "results.json").exists() else None
        return isinstance(told, dict) and told.get("kind") == KIND and told.get("run") == opened.id
    except Damaged:
        return False


def _influence(
    place: Path, opened: _Opened, points: list[Point], x: Tensor, y: Tensor, say: Callable[[str], None]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Scores [m, n], sums along training of the strongest examples, certificate: from their file, or computed."""
    file = place / "influence.safetensors"
    own = fingerprint([opened.id, [point.index for point in points]])
    if file.exists():
        try:
            tensors, told = read_tensors_and_metadata(file)
            check_place(file, told, of=own)
            along = {side: tensors[f"along.{side}"] for side in ("helped", "hurt")}
            return tensors["scores"], along, json.loads(told["certificate"])
        except (Damaged, LookupError) as error:
            say(f"{error} It is computed again.")
    measure, memory = points_of.measure_of(opened.task.data), opened.memory
    result = influence(opened.trajectory, x, y, measure=measure, steps=True, memory=memory, **opened.training)
    certificate = points_of.influence_in_numbers(result)
    shown = points_of.steps_shown(opened.trajectory.stop["step"])
    along = points_of.strongest_along(result.steps or (), result.scores, shown)
    tensors = {"scores": result.scores, **{f"along.{side}": values for side, values in along.items()}}
    write_tensors(file, tensors, {"of": own, "certificate": json.dumps(certificate)})
    return result.scores, along, certificate
