"""The runs that `ntkit compare` takes: read and checked, named, in groups, with the test examples that all have."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.base.files import read_arrays, read_json
from ntkit.base.integrity import damaged, fingerprint
from ntkit.base.results_file import AnalysisResults, RegressionResults
from ntkit.base.run_files import described
from ntkit.base.trust import code_of_run
from ntkit.base.versions import RESULTS_FORMAT, check_format
from ntkit.commands.results import data_of, settings_of, told_by
from ntkit.commands.settings import CompareSettings, Settings
from ntkit.commands.stage_files import StageFiles
from ntkit.data import Data

_OF_DATA = ("data", "data_dir", "classes", "class_names", "task", "target", "resize")
_OF_TRAINING = ("model", "weights", "train", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay",
                "target_loss")  # fmt: skip
"""Settings that change the network; runs that agree in all of these differ in the seed alone."""
_OF_ALL = ("model", "weights", "train")  # which runs of loaded weights have, too
_WORDS = {"lr": "lr", "epochs": "epochs", "batch_size": "batch", "momentum": "momentum", "target_loss": "to loss",
          "weight_decay": "weight decay", "train": "examples"}  # fmt: skip


@dataclass(eq=False)
class ComparedRun:
    """One run: its folder and id, what it says of itself, its results and data; its place, name and group here.

    `repeats`: it has the settings and the seed of an earlier one, and is no further seed.
    """

    folder: Path
    id: str
    settings: Settings
    identity: dict[str, Any]
    results: dict[str, Any]
    stages: dict[str, dict[str, np.ndarray]]
    data: Data = field(init=False)
    place: int = 0
    name: str = ""
    group: int = 0
    repeats: bool = False
    rows: Tensor = field(init=False)
    """Of the test examples that all runs have."""

    def setting(self, name: str) -> Any:
        """A setting as it changes the network: none where it has no effect; files of weights and code by content."""
        value = getattr(self.settings, name)
        if name == "weights":
            return self.identity.get("weights")
        if self.settings.weights is not None and name not in _OF_ALL:
            return None
        if name == "momentum" and self.settings.optimizer != "sgd":
            return None
        if name == "batch_size":
            n = self.results["data"]["train"]
            return None if value is None or value >= n else value
        if name == "model":
            return [value, self.identity.get("model file")]
        if name == "train":  # None is all of them
            return self.results["data"]["train"]
        return value

    @property
    def key(self) -> str:
        """What the runs of a group have in common."""
        return fingerprint([self.setting(name) for name in _OF_TRAINING])

    @property
    def luck(self) -> Any:
        """What tells the runs of a group apart: the seed; of loaded weights nothing does."""
        return "loaded" if self.settings.weights is not None else self.settings.seed


def opened_runs(runs: Sequence[Path], s: CompareSettings, trust: bool) -> list[ComparedRun]:
    """Read all runs, load their data, name and group them.

    Raises
    ------
    Refused
        For fewer than two folders or one named twice, for other folders than complete runs, for runs on other data, and
        where no test example is common to all.
    """
    if len(runs) < 2:
        got, fix = f"{len(runs)} folder{'s' * (len(runs) != 1)}", "Name the run folders: ntkit compare RUN RUN."
        raise refusal("runs", got=got, expected="at least two", fix=fix)
    twice = [str(run) for run, times in Counter(Path(run).resolve() for run in runs).items() if times > 1]
    if twice:
        raise refusal("runs", got=f"{twice[0]} twice", expected="different folders", fix="Name each once.")
    found = [_read(Path(run)) for run in runs]
    _load(found, s, trust)
    _check_same_data(found)
    _find_common_rows(found)
    _name(found)
    return found


@contextmanager
def code_of(run: ComparedRun, s: CompareSettings, trust: bool) -> Iterator[None]:
    """Let the code that a run names run in this context, as `--from` of `ntkit analyze` does."""
    named = run.settings.model if run.settings.model in (s.model or ()) else None
    with code_of_run(run.folder, run.settings.named_code(), run.identity, {"--model": named, "--data": s.data}, trust):
        yield


def _read(folder: Path) -> ComparedRun:
    told = told_by(folder)
    settings = settings_of(folder / "run.json", told)
    if told["status"] != "complete" or not (folder / "results.json").exists():
        fix = f"Let it end, or go on with: ntkit analyze --from {shlex.quote(str(folder))}"
        raise refusal(str(folder), got="a run that is not complete", expected="a complete run", fix=fix)
    results = read_json(folder / "results.json")
    fix = f"Repeat it: ntkit analyze --from {shlex.quote(str(folder))} --out NEW"
    check_format(
        folder / "results.json", results.get("format") if isinstance(results, dict) else None, RESULTS_FORMAT, fix
    )
    if "neighbors" not in results:
        raise refusal(str(folder), got="results of an earlier version", expected="those of this version", fix=fix)
    is_regression = isinstance(results.get("data"), dict) and "targets" in results["data"]
    described(folder / "results.json", results, RegressionResults if is_regression else AnalysisResults)
    own = fingerprint([told["settings"], told["identity"]])
    if results.get("run", own) != own:
        raise damaged(folder / "results.json", "the results of another run than run.json")
    files, stages = StageFiles(folder), {}
    files.run = own
    for name in ("network", "machine-init", "machine-after", "gram-init", "gram-after"):
        there = files.stage(name) is not None and (folder / "arrays" / f"{name}.safetensors").exists()
        stages[name] = read_arrays(folder / "arrays" / f"{name}.safetensors") if there else {}
    return ComparedRun(folder, own, settings, told["identity"], results, stages)


def _check_same_data(found: Sequence[ComparedRun]) -> None:
    """Refuse runs on other data; of one data set, samples may differ in size (`--train`, `--test`)."""
    first = found[0]
    for run in found[1:]:
        if run.identity["data"] == first.identity["data"]:
            continue
        differ = [name for name in _OF_DATA if getattr(run.settings, name) != getattr(first.settings, name)]
        if run.identity.get("data file") != first.identity.get("data file"):
            differ.append("content of the file of data")
        got = f"data with hash {run.identity['data']} ({run.results['data']['name']})"
        expected = f"the data of {first.folder}, {first.identity['data']} ({first.results['data']['name']})"
        if differ:
            what = f"They differ in {', '.join(differ)}. "
            fix = what + "Compare runs on the same data, or repeat one of them on the data of the other."
            raise refusal(str(run.folder), got=got, expected=expected, fix=fix)
        if "targets" in run.results["data"]:
            fix = "Targets are standardized on each run's own sample, so their errors have different units. " \
                  "Repeat the runs with the same --train and --test."  # fmt: skip
            raise refusal(str(run.folder), got=f"another sample: {got}", expected=expected, fix=fix)


def _load(found: Sequence[ComparedRun], s: CompareSettings, trust: bool) -> None:
    loaded: dict[str, Data] = {}
    for run in found:
        noted = run.identity["data"]
        if noted not in loaded:
            with code_of(run, s, trust):
                loaded[noted] = data_of(run.folder, run.settings, run.identity)
        run.data = loaded[noted]


def _find_common_rows(found: Sequence[ComparedRun]) -> None:
    """Rows of the test examples that all runs have, in the order of the first run."""
    hashes = {run.identity["data"]: run.data for run in found}
    names = {key: _names_of_examples(data) for key, data in hashes.items()} if len(hashes) > 1 else {}
    common = set.intersection(*map(set, names.values())) if names else set()
    order = [name for name in names.get(found[0].identity["data"], []) if name in common]
    if names and not order:
        got, fix = "no test example that all runs have", "Repeat the runs with the same --test."
        if found[0].data.columns is not None:
            fix = "Columns are standardized on each run's own sample. Repeat the runs with the same --train."
        raise refusal("runs", got=got, expected="test examples in common", fix=fix)
    for run in found:
        if not names:
            run.rows = torch.arange(len(run.data.x_test))
            continue
        places = {name: i for i, name in enumerate(names[run.identity["data"]])}
        run.rows = torch.tensor([places[name] for name in order])


def _names_of_examples(data: Data) -> list[tuple[str, int]]:
    """Each test example by its content, input and label; equal ones are numbered."""
    seen: Counter[str] = Counter()
    names = []
    for x, y in zip(data.x_test, data.y_test, strict=True):
        own = hashlib.sha256(x.contiguous().numpy().tobytes() + y.contiguous().numpy().tobytes()).hexdigest()
        names.append((own, seen[own]))
        seen[own] += 1
    return names


# ---------------------------------------------------------------------- names


def _name(found: Sequence[ComparedRun]) -> None:
    """Number the groups in the order of their first runs, mark repetitions, give each run a name of its own."""
    groups = {key: i for i, key in enumerate(dict.fromkeys(run.key for run in found))}
    seen: set[tuple[int, Any]] = set()
    for place, run in enumerate(found):
        run.place, run.group = place, groups[run.key]
        run.repeats = (run.group, run.luck) in seen
        seen.add((run.group, run.luck))
    labels = group_labels(found)
    names = _told_apart([f"{labels[run.group]} · seed {run.settings.seed}" for run in found], found)
    for run, name in zip(found, names, strict=True):
        run.name = name


def _told_apart(names: Sequence[str], runs: Sequence[ComparedRun]) -> list[str]:
    """Names of runs; those that are the same with the end of the folder, as much of it as tells these apart."""
    told = list(names)
    for name, times in Counter(names).items():
        if times > 1:
            same = [i for i, other in enumerate(names) if other == name]
            for i, end in zip(same, _ends([runs[i].folder.parts for i in same]), strict=True):
                told[i] = f"{name} ({end})"
    return told


def _ends(parts: Sequence[Sequence[str]]) -> list[str]:
    """Of each path's parts as many last ones as no other path ends in; all where there are none.

    >>> _ends([("runs", "a", "net"), ("runs", "b", "net"), ("runs", "cnn")])
    ['a/net', 'b/net', 'cnn']
    """
    ends = []
    for own in parts:
        others = [other for other in parts if other is not own]
        count = next((k for k in range(1, len(own)) if all(other[-k:] != own[-k:] for other in others)), len(own))
        ends.append(str(Path(*own[-count:])))
    return ends


def differing(found: Sequence[ComparedRun]) -> list[str]:
    """Settings that are not the same in all runs; those of the training are compared among the runs that trained."""
    trained = [run for run in found if run.settings.weights is None]
    return [
        name
        for name in _OF_TRAINING
        if len({fingerprint(run.setting(name)) for run in (found if name in _OF_ALL else trained)}) > 1
    ]


def group_labels(found: Sequence[ComparedRun]) -> list[str]:
    """A short label per group: the settings that differ, or the model where none does."""
    firsts = {run.group: run for run in reversed(found)}
    names, labels = differing(found) or ["model"], []
    for i in range(len(firsts)):
        loaded = firsts[i].settings.weights is not None
        own = [name for name in names if (name in _OF_ALL if loaded else name != "weights")] or ["weights"]
        labels.append(" · ".join(_shown(firsts[i], name, found) for name in own))
    return _told_apart(labels, [firsts[i] for i in range(len(firsts))])


def _file_of(run: ComparedRun, name: str, found: Sequence[ComparedRun]) -> str:
    """A model or a file of weights by its name, with its factory and folders as far as others have the same name."""
    values = list(dict.fromkeys(getattr(other.settings, name) for other in found))
    values.remove(value := getattr(run.settings, name))
    if value is None:
        return "trained"
    if name == "weights":
        own, others = Path(value).parts, [Path(other).parts for other in values if other is not None]
        return _ends([own, *others])[0]
    names = [_parts_of_model(other) for other in (value, *values)]
    short = [parts[-2] for parts in names]  # without the factory
    if short.count(short[0]) == 1:
        return short[0]
    factories = [(*parts[:-2], f"{parts[-2]}:{parts[-1]}" if parts[-1] else parts[-2]) for parts in names]
    return _ends(factories)[0]


def _parts_of_model(value: str) -> tuple[str, ...]:
    """Folders or packages, name and factory of a model; a built-in one has no factory.

    >>> _parts_of_model("nets/small.py:make"), _parts_of_model("lab.nets:make"), _parts_of_model("mlp")
    (('nets', 'small', 'make'), ('lab', 'nets', 'make'), ('mlp', ''))
    """
    place, _, factory = value.rpartition(":")
    if not place:
        return value, ""
    path = Path(place)
    return (*path.parts[:-1], path.stem, factory) if path.suffix == ".py" else (*place.split("."), factory)


def _shown(run: ComparedRun, name: str, found: Sequence[ComparedRun]) -> str:
    value = getattr(run.settings, name)
    if name in ("model", "weights"):
        return _file_of(run, name, found)
    if name == "train":
        return f"{run.results['data']['train']:,} examples"
    if name in ("optimizer", "lr", "epochs", "batch_size", "momentum", "weight_decay", "target_loss"):
        value = run.setting(name)
    if run.settings.weights is not None:
        return "–"
    if value is None:
        return "full batch" if name == "batch_size" else f"no {_WORDS.get(name, name)}"
    shown = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return shown if name == "optimizer" else f"{_WORDS[name]} {shown}"


def settings_shown(run: ComparedRun, names: Sequence[str], found: Sequence[ComparedRun]) -> dict[str, str]:
    """Setting -> its value as text, for the table of what differs."""
    return {name: _shown(run, name, found).removeprefix(f"{_WORDS.get(name, '')} ") for name in names}
