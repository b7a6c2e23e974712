"""A GPU gives what the CPU gives, by every public call and command. `test_second_device` runs it without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_around import VALUES, Case, cases, plain, tensors

import ntkit
from ntkit.base.run_files import read_steps, read_track_settings
from ntkit.commands.explain import explain_run
from ntkit.commands.gram_on_disk import gram
from ntkit.commands.settings import ExplainSettings, GramSettings, TrackSettings
from ntkit.commands.track import track_run
from ntkit.studies.jacot2018 import random_kernels
from ntkit.studies.part import Sizes, Work
from ntkit.testing import assert_equal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SMALL = ntkit.Settings(train=60, test=30, model="mlp", epochs=3, track_points=20, probe_points=5)


@cache
def there() -> dict[str, Case]:
    return cases("cuda")


@pytest.mark.parametrize("name", VALUES)
def test_every_call(name):
    thing, ask = there()[name]
    for value, expected in zip(tensors(ask(thing)), plain(name), strict=True):
        assert_equal(value.detach(), expected.detach(), 1e-4, name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on the CPU and on the GPU."""
    folder = tmp_path_factory.mktemp("runs")
    for device in ("cpu", "cuda"):
        ntkit.analyze(replace(SMALL, device=device), out=folder / device)
    return folder / "cpu", folder / "cuda"


def floats(value: Any, path: str = "") -> dict[str, float]:
    """The floats of a JSON document by their places."""
    if isinstance(value, float):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {place: number for key, part in items for place, number in floats(part, f"{path}/{key}").items()}


@pytest.mark.parametrize("part", ["training", "network", "machines", "quality", "similarity", "along", "limit"])
def test_analyze(runs, part):
    here, there = (floats(json.loads((run / "results.json").read_text())[part]) for run in runs)
    assert here.keys() == there.keys()
    differ = {place: (v, there[place]) for place, v in here.items() if abs(v - there[place]) > 1e-3 * abs(v) + 1e-6}
    assert here
    assert not differ


def test_compare_runs_of_both(runs, tmp_path):
    found = json.loads((ntkit.compare(runs, out=tmp_path / "compared") / "results.json").read_text())
    assert all(certificate["ok"] for certificate in found["certificates"])
    assert float(np.min(found["kernels"]["after"])) == pytest.approx(1, abs=1e-3)


def test_track_and_explain(runs, tmp_path):
    series = []
    for run in runs:
        settings = TrackSettings(out=tmp_path / run.name)
        series.append(floats(read_steps(track_run(run, settings), read_track_settings(tmp_path / run.name))))
        explain_run(run, ExplainSettings(test=(3,), out=tmp_path / f"{run.name}-3"), say=str)
    assert series[1] == pytest.approx(series[0], rel=1e-2, abs=1e-5)


def test_a_kernel_on_disk(tmp_path):
    stores = [
        gram("mlp", "digits", GramSettings(train=60, test=30, device=device), out=tmp_path / device)
        for device in ("cpu", "cuda")
    ]
    assert_equal(stores[1].dense().cpu(), stores[0].dense(), 1e-5, "a kernel on disk")


def test_a_study_goes_to_the_gpu():
    work = Work(Sizes(rate_widths=(20, 60), rate_seeds=4), (0,), ["digits"], Path("unused"))
    assert random_kernels._rate(work).numbers["limit_at_0"] == pytest.approx(0.2825, abs=1e-9)
