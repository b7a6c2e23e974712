"""Errors of compared runs on the same test examples: of each run, over seeds, and the differences with their tests."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ntkit.commands.compared_runs import ComparedRun
from ntkit.commands.seed_statistics import holm, over_seeds, paired_errors, paired_squares, welch

Errors = dict[str, list[np.ndarray | None]]
"""By measure and run: wrong answers, or squared errors, of the common test examples; None where there are none."""


def errors_of(found: list[ComparedRun]) -> tuple[str, Errors]:
    """By measure and run: wrong answers or squared errors of the common test examples, None where there are none.

    The machine is the hard-margin SVM where it was solved on every kernel of every run, else ridge regression.
    """
    if found[0].data.targets is not None:

        def squares(run: ComparedRun, stage: str) -> np.ndarray | None:
            predicted = run.stages[stage].get("predicted")
            y = run.data.y_test.double().numpy().reshape(len(run.data.y_test), -1)
            return None if predicted is None else ((predicted.reshape(y.shape) - y) ** 2).mean(1)[run.rows.numpy()]

        places = {"network": "network", "init": "machine-init", "after": "machine-after"}
        return "ridge", {key: [squares(run, stage) for run in found] for key, stage in places.items()}
    statuses = [m["status"] for run in found for m in run.results["machines"] if m["kernel"] in ("init", "after")]
    machine = "svm" if set(statuses) == {"optimal"} else "ridge"
    of = "wrong" if machine == "svm" else "ridge_wrong"
    places = {"network": ("network", "wrong"), "init": ("machine-init", of), "after": ("machine-after", of)}

    def wrong(run: ComparedRun, stage: str, name: str) -> np.ndarray | None:
        arrays = run.stages[stage]
        return arrays[name].astype(bool)[run.rows.numpy()] if name in arrays else None

    return machine, {key: [wrong(run, *place) for run in found] for key, place in places.items()}


def group_of(number: int, label: str, found: list[ComparedRun], errors: Errors) -> dict[str, Any]:
    """A group: its runs and, over its seeds, the mean of each error with Student's interval."""
    members = [run for run in found if run.group == number]
    result: dict[str, Any] = {"label": label, "runs": [run.place for run in members], "errors": {}, "alignment": {}}
    for key, values in errors.items():
        known = _seeds(members, values)
        result["errors"][key] = over_seeds(known) if known else None
    for key in ("init", "after"):
        alignments = [
            q["alignment_centered"]
            for run in members
            if not run.repeats
            for q in run.results["quality"]
            if q["kernel"] == key and q["alignment_centered"] is not None
        ]
        result["alignment"][key] = over_seeds(alignments) if alignments else None
    return result | {"seeds": sum(not run.repeats for run in members)}


def _seeds(members: list[ComparedRun], values: list[np.ndarray | None]) -> list[float]:
    """Mean errors of the runs of different seeds that have some."""
    return [float(own.mean()) for run in members if not run.repeats and (own := values[run.place]) is not None]


def between_groups(found: list[ComparedRun], errors: Errors, groups: int) -> list[dict[str, Any]]:
    """Each pair of groups and each error: difference over seeds (Welch), its p value after Holm's correction.

    Machines on initial kernels are left out where architecture and sample size agree: they differ in nothing.
    """
    tests = []
    for first, second in itertools.combinations(range(groups), 2):
        sides = [[run for run in found if run.group == group] for group in (first, second)]
        alike = all(sides[0][0].setting(name) == sides[1][0].setting(name) for name in ("model", "train"))
        for key, values in errors.items():
            known = [_seeds(members, values) for members in sides]
            if all(known) and not (key == "init" and alike):  # else equal by construction: nothing to test
                tests.append({"first": first, "second": second, "of": key, **welch(*known)})
    return _corrected(tests)


def between_runs(found: list[ComparedRun], errors: Errors) -> list[dict[str, Any]]:
    """Each pair of runs and each error: difference on the same test examples, its p value after Holm's correction."""
    is_regression = found[0].data.targets is not None
    test = paired_squares if is_regression else paired_errors
    tests = []
    for first, second in itertools.combinations(found, 2):
        for key, values in errors.items():
            ours, theirs = values[first.place], values[second.place]
            if ours is not None and theirs is not None and not (key == "init" and same_start(first, second)):
                tests.append({"first": first.place, "second": second.place, "of": key, **test(ours, theirs)})
    return _corrected(tests)


def same_start(first: ComparedRun, second: ComparedRun) -> bool:
    """Whether two runs have the same initial kernel on the same data."""
    return all(first.identity.get(key) == second.identity.get(key) for key in ("initial parameters", "data")) and (
        first.setting("model") == second.setting("model")
    )


def _corrected(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    corrected = holm([test["p"] for test in tests])
    return [test | {"p_holm": p} for test, p in zip(tests, corrected, strict=True)]
