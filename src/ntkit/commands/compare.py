"""`ntkit compare`: several runs of `ntkit analyze` on the same data, on one page.

In the folder: ``compare.json`` (which runs; first), ``arrays/`` (the kernels of each run on the common points), then
``results.json`` and ``report.html``. Stopped, the same command goes on. No code of a run is executed unless the user
has run it or named it (`base/trust`).
"""

from __future__ import annotations

import copy
import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import Damaged, Refused, defined, refusal
from ntkit.base.files import read_arrays_and_metadata, read_json, remove, write_arrays, write_json
from ntkit.base.integrity import check_place, fingerprint
from ntkit.base.lock import FolderLock, check_unused
from ntkit.base.memory import parse_memory
from ntkit.base.progress import stop_note, task
from ntkit.base.regular_files import check_folder
from ntkit.base.tensors import tensor_hash
from ntkit.base.versions import check_format, versions
from ntkit.commands import compared_runs as runs_of
from ntkit.commands.compared_errors import Errors, between_groups, between_runs, errors_of, group_of, same_start
from ntkit.commands.compared_runs import ComparedRun
from ntkit.commands.network_measures import finite, outputs_of, spread
from ntkit.commands.regression_measures import task_of
from ntkit.commands.settings import CompareSettings
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.spectra import alignment
from ntkit.networks.built_in import build
from ntkit.report.compare_page import COMPARE_FORMAT, KIND, render_comparison
from ntkit.trajectory import Trajectory, load_weights

Kernels = dict[str, Tensor | None]
"""Initial and after kernel of a run, None where there is none."""
_OWN = ("compare.json", "arrays", "results.json", "report.html")
_SAME = 1e-4  # of predictions of numbers, in deviations of the target: a hundred times what rounding in float32 leaves
_DRAWN = 60  # eigenvalues of a spectrum that are kept for the page, spaced evenly on a logarithmic axis


def compare(
    runs: Sequence[str | Path],
    *,
    points: int = 200,
    memory: int | str | None = None,
    model: Sequence[str] | None = None,
    data: str | None = None,
    out: str | Path = "runs/comparison",
    overwrite: bool = False,
    trust: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Compare runs of `ntkit analyze` on the same data; return the folder written.

    Parameters
    ----------
    runs : two or more run folders. Those that differ in the seed alone are a group.
    points : test examples on which the kernels of all runs are compared, spread evenly.
    memory : that a kernel computation may use at a time, such as "3 GB"; None = as each run.
    model, data : those of the runs again, if they are code that you have not run here; of models as many as you like.
    out : folder for the results. A comparison that was stopped goes on there.
    overwrite : replace a comparison of other runs in that folder.
    trust : run the code that the run folders name even if it has never been run here.
    say : called with each line.

    Raises
    ------
    Refused
        For fewer than two folders, for other folders than complete runs of `analyze`, for runs on different data or
        without common test examples, for code that has not been run here; when the folder holds something else, or
        another process is writing there.

    Examples
    --------
    >>> compare(["runs/one"])
    Traceback (most recent call last):
    ...
    ntkit.Refused: runs: got 1 folder; expected at least two. Name the run folders: ntkit compare RUN RUN.
    """
    models = None if model is None else (model,) if isinstance(model, str) else tuple(model)
    limit = None if memory is None else str(memory)
    s = CompareSettings(points=points, memory=limit, model=models, data=data, out=Path(out))
    s.check()
    parse_memory(s.memory)
    place = Path(s.out)
    check_folder(place, "--out")
    found = runs_of.opened_runs([Path(run) for run in runs], s, trust)
    common = spread(len(found[0].rows), s.points)
    own = {"format": COMPARE_FORMAT, "kind": KIND, "of": [run.id for run in found], "points": len(common)}
    work = _Work(place, s, trust, say, own)
    with stop_note(say), FolderLock(place):
        _begin(place, own, overwrite)
        if not _is_complete(place, own, found):
            write_json(place / "results.json", _results(found, work))
        say(f"report: {render_comparison(place)}")
    return place


class _Work(NamedTuple):
    """What the parts of a comparison share; `own` is the content of ``compare.json``."""

    place: Path
    settings: CompareSettings
    trust: bool
    say: Callable[[str], None]
    own: dict[str, Any]


def _results(found: list[ComparedRun], work: _Work) -> dict[str, Any]:
    """What `results.json` holds; no times and no dates."""
    kernels = []
    with task("kernels", total=len(found)) as progress:
        for run in found:
            kernels.append(_kernels(run, len(found), work))
            progress.advance()
    machine, errors = errors_of(found)
    labels = runs_of.group_labels(found)
    names = runs_of.differing(found)
    first = found[0].results
    command = ["ntkit", "compare", *(str(run.folder) for run in found), "--points", str(work.settings.points)]
    return work.own | {
        "title": f"{len(found)} runs on {first['data']['name']}",
        "data": {key: first["data"][key] for key in ("name", "kind", "classes", "input_shape", "normalization")}
        | {"regression": "targets" in first["data"], "hashes": sorted({run.identity["data"] for run in found})},
        "test": {"common": len(found[0].rows), "of": sorted({len(run.data.x_test) for run in found})},
        "machine": machine,
        "settings": names,
        "runs": [_told_of(run, errors, runs_of.settings_shown(run, names, found)) for run in found],
        "groups": [group_of(i, label, found, errors) for i, label in enumerate(labels)],
        "over_seeds": between_groups(found, errors, len(labels)),
        "between_runs": between_runs(found, errors),
        "kernels": _alignments(found, [pair for pair, _ in kernels]) | {"points": work.own["points"]},
        "certificates": [certificate for _, certificate in kernels],
        "versions": {"now": versions(), "differ": _versions_that_differ(found)},
        "command": shlex.join([*command, "--out", str(work.place)]),
    }


def _told_of(run: ComparedRun, errors: Errors, shown: dict[str, str]) -> dict[str, Any]:
    """What the page says of one run."""
    r, along = run.results, run.results["along"]
    quality = {q["kernel"]: q for q in r["quality"]}
    kept = ("steps", "loss", "distance", "alignment_centered")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "group": run.group,
        "seed": run.settings.seed,
        "repeats": run.repeats,
        "settings": shown,
        "parameters": r["model"]["parameters"],
        "steps": r["training"]["steps"] if r["training"] else None,
        "stop": r["training"]["stop"] if r["training"] else None,
        "errors": {key: _mean(run_errors) for key, run_errors in _of_run(run, errors).items()},
        "loss": {part: r["network"][f"{part}_loss"]["value"] if r["network"] else None for part in ("train", "test")},
        "alignment": {k: quality[k]["alignment_centered"] if k in quality else None for k in ("init", "after")},
        "effective_rank": {k: quality[k]["effective_rank"] if k in quality else None for k in ("init", "after")},
        "spectrum": {k: _spectrum(run.stages[f"gram-{k}"]) for k in ("init", "after")},
        "along": {key: along[key] for key in kept if key in along} if along else None,
    }


def _of_run(run: ComparedRun, errors: Errors) -> dict[str, np.ndarray | None]:
    return {key: values[run.place] for key, values in errors.items()}


def _mean(errors: np.ndarray | None) -> float | None:
    return None if errors is None else finite(float(errors.mean()))


def _spectrum(arrays: dict[str, np.ndarray]) -> dict[str, list] | None:
    """Some eigenvalues on the training set as shares of their sum, none below rounding; their numbers, from 1."""
    values = arrays.get("eigenvalues")
    if values is None or not (total := float(values.sum())) > 0:
        return None
    places = np.unique(np.round(np.geomspace(1, len(values), _DRAWN)).astype(int))
    floor = float(values[0]) * np.finfo(np.float32).eps
    kept = [int(i) for i in places if values[i - 1] > floor]
    return {"index": kept, "share": [float(f"{values[i - 1] / total:.5g}") for i in kept]}


# ---------------------------------------------------------------------- kernels


def _kernels(run: ComparedRun, count: int, work: _Work) -> tuple[Kernels, dict[str, Any]]:
    """Initial and after kernel of a run on the common points, and the check of the network rebuilt for them.

    Under "absent" the check says why a kernel is None: a training that diverged leaves none.
    """
    file = work.place / "arrays" / f"kernels-{run.place + 1}.safetensors"
    x = run.data.x_test[run.rows[spread(len(run.rows), work.settings.points)]]
    of = fingerprint([run.id, tensor_hash([x])])
    if file.exists():
        try:
            arrays, told = read_arrays_and_metadata(file)
            check_place(file, told, of=of)
            kept = {key: torch.from_numpy(arrays[key]) if key in arrays else None for key in ("init", "after")}
            return kept, told["certificate"]
        except Damaged as error:
            work.say(f"{error} It is computed again.")
    work.say(f"[{run.place + 1} of {count}] kernels on {len(x):,} test examples: {run.name}")
    models, certificate = _networks(run, work.settings, work.trust)
    kernels: Kernels = {}
    memory = run.settings.memory if work.settings.memory is None else work.settings.memory
    for key, model in models.items():
        kernel = TangentKernel(model, outputs="trace", memory=memory)
        try:
            kernels[key] = kernel(x.to(next(model.parameters()).device)).cpu()
        except Refused as refused:
            if isinstance(refused.__cause__, OSError):
                raise
            kernels[key], certificate["absent"][key] = None, f"{run.name}: {refused}"
    arrays = {key: K.numpy() for key, K in kernels.items() if K is not None}
    write_arrays(file, arrays, {"of": of, "certificate": certificate})
    return kernels, certificate


def _networks(run: ComparedRun, s: CompareSettings, trust: bool) -> tuple[dict[str, torch.nn.Module], dict[str, Any]]:
    """The network of a run before and after training, and whether it answers the test set as the run has noted."""
    settings, data = run.settings, run.data
    with runs_of.code_of(run, s, trust):
        model = build(settings.model, data.input_shape, data.outputs, settings.seed, data.tokens)
    on_gpu = str(run.identity.get("device", "cpu")) != "cpu" and torch.cuda.is_available()
    model = model.to("cuda" if on_gpu else "cpu").eval()
    after = copy.deepcopy(model)
    if settings.weights is not None:
        load_weights(after, settings.weights)
        if (now := tensor_hash(after.state_dict())) != run.identity["weights"]:
            fix = "Restore the file, or repeat the run."
            raise refusal(settings.weights, got=f"weights {now[:16]}", expected=run.identity["weights"][:16], fix=fix)
    else:
        trajectory = Trajectory.open(run.folder / "trajectory")
        try:
            trajectory.load(model, 0)
            trajectory.load(after, trajectory.stop["step"])
        except Damaged:
            raise
        except Refused as error:
            raise Refused(f"{run.folder}: {error}") from error
    return {"init": model, "after": after}, _as_noted(run, after)


def _as_noted(run: ComparedRun, after: torch.nn.Module) -> dict[str, Any]:
    """Compare the answers of a rebuilt network with those that the run has noted: wrong code would give others."""
    device = next(after.parameters()).device
    x, y = run.data.x_test.to(device), run.data.y_test.to(device)
    out, noted = outputs_of(after, x), run.stages["network"]
    if "predicted" in noted:
        what, tolerance = "largest difference of a prediction from the noted one, in deviations", _SAME
        now = out.double().cpu().numpy().reshape(noted["predicted"].shape)
        value = float(np.where(np.isnan(now) & np.isnan(noted["predicted"]), 0, np.abs(now - noted["predicted"])).max())
    else:
        what, tolerance = "answers that are not as noted", 0.0
        wrong = (task_of(after, run.data).predict(out) != y).cpu().numpy()
        value = float((wrong != noted["wrong"].astype(bool)).sum()) if "wrong" in noted else np.nan
    value_or_none = finite(value)
    return {
        "what": f"{run.name}, network rebuilt: {what}",
        "value": value_or_none,
        "tolerance": tolerance,
        "ok": value_or_none is not None and value_or_none <= tolerance,
        "absent": {},
    }


def _alignments(found: list[ComparedRun], kernels: list[Kernels]) -> dict[str, Any]:
    """Centered alignment of each two runs' kernels, initial and after, and of each run's own two; their means."""
    n = len(found)

    def cosine(first: Tensor | None, second: Tensor | None) -> float | None:
        return None if first is None or second is None else defined(alignment, first, second, centered=True)

    result: dict[str, Any] = {}
    for key in ("init", "after"):
        matrix: list[list[float | None]] = [[None] * n for _ in range(n)]
        for i in range(n):
            matrix[i][i] = cosine(kernels[i][key], kernels[i][key])
        for i, j in itertools.combinations(range(n), 2):
            value = cosine(kernels[i][key], kernels[j][key])
            matrix[i][j] = matrix[j][i] = value
        result[key] = matrix
    result["own"] = [cosine(pair["init"], pair["after"]) for pair in kernels]
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if not a.repeats and not b.repeats]
    kinds = {
        "within": [(a, b) for a, b in pairs if a.group == b.group],
        "same_start": [(a, b) for a, b in pairs if a.group != b.group and same_start(a, b)],
        "between": [(a, b) for a, b in pairs if a.group != b.group and not same_start(a, b)],
    }
    for name, chosen in kinds.items():
        result[name] = {"pairs": len(chosen)}
        for key in ("init", "after"):
            known = [value for a, b in chosen if (value := result[key][a.place][b.place]) is not None]
            result[name][key] = float(np.mean(known)) if known else None
    return result


def _versions_that_differ(found: list[ComparedRun]) -> dict[str, list[str]]:
    """What the runs were made with, where it is not the same in all."""
    names = ("device", "threads", *versions())
    values = {name: list(dict.fromkeys(str(run.identity.get(name)) for run in found)) for name in names}
    return {name: each for name, each in values.items() if len(each) > 1}


# ---------------------------------------------------------------------- the folder


def _begin(place: Path, own: dict[str, Any], overwrite: bool) -> None:
    """Write ``compare.json``, or compare the one that is there."""
    file = place / "compare.json"
    if file.exists():
        try:
            told = read_json(file)
        except Damaged:
            told = None
        if isinstance(told, dict):
            check_format(file, told.get("format", COMPARE_FORMAT), COMPARE_FORMAT, "Name another folder (--out).")
        if told == own:
            return
        if told is not None and not overwrite:
            fix = "Replace it (--overwrite), or name another folder (--out)."
            got = "a comparison of other runs, or on other points"
            raise refusal(str(place), got=got, expected="the same runs, or a new folder", fix=fix)
        for name in _OWN:
            remove(place / name)
    else:
        check_unused(place)
    write_json(file, own)


def _is_complete(place: Path, own: dict[str, Any], found: list[ComparedRun]) -> bool:
    """Whether the results are there, and of these runs in these folders."""
    try:
        told = read_json(place / "results.json") if (place / "results.json").exists() else None
        if not isinstance(told, dict) or any(told.get(key) != value for key, value in own.items()):
            return False
        return [run.get("folder") for run in told.get("runs", [])] == [str(run.folder) for run in found]
    except Damaged:
        return False
