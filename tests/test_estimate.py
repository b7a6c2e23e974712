"""The estimate before a long analysis: there, plausible, and without any effect on what follows."""

from __future__ import annotations

import re

import pytest
import torch

import ntkit
from ntkit.commands import estimate as module
from ntkit.commands.estimate import estimate
from ntkit.commands.network_measures import TrainingTask
from ntkit.commands.settings import Settings
from ntkit.networks.built_in import build
from ntkit.probes import standard


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LONG", 0.0)
    data = ntkit.data.load("digits", classes=("3", "8"), train=60, test=30)
    model = build("cnn", data.input_shape, 1, seed=0)
    return TrainingTask(model, data), model


def _seconds(line: str) -> int:
    found = re.search(r"about (?:(\d+) h )?(?:(\d+) min ?)?(?:(\d+) s)? on this machine", line.replace("min 0", "min "))
    assert found, line
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def test_it_says_time_memory_and_disk(case, monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = case
    monkeypatch.setattr(module, "_seconds_per_gradient", lambda *_: 0.01)
    monkeypatch.setattr(module, "_seconds_per_step", lambda *_: 0.5)
    snapshots = len({round(2 ** (k / 2)) for k in range(29)}) + 2  # to 2^14, step 0 and the last
    parameters = sum(p.numel() for p in model.parameters())
    disk = 3 * 4 * 60 * 90 + 4 * parameters * snapshots
    line = estimate(task, model, Settings(memory="2 GB"), steps=20_000, batch=32)
    assert line is not None
    assert f"{(20 * 60**2 + 16 * parameters) / 1e6:.1f} MB of memory beside the 2 GB that --memory allows" in line
    assert f"{disk / 1e6:.1f} MB on disk" in line
    kernels = _seconds(line) - 0.5 * 20_000  # training; it is too long to be repeated
    # gradients of a sample: two kernels of 60 with themselves and with 30 others, and 31 steps at 4 kernels of 60, and
    # two of 30 images and their transforms
    own, cross = 60 + 60**2 / 600, 60 + 30 + 60 * 30 / 300
    probes = 30 * (1 + sum(map(len, standard((1, 8, 8)).values())))
    wanted = 0.01 * (2 * (own + cross) + snapshots * 4 * own + 2 * (probes + probes**2 / 600))
    assert kernels == pytest.approx(wanted, abs=61)  # said to the minute


def test_sections_that_train_again_are_counted_where_they_are_done(case, monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = case
    monkeypatch.setattr(module, "_seconds_per_gradient", lambda *_: 0.0)
    monkeypatch.setattr(module, "_seconds_per_step", lambda *_: 10.0)

    def parts(steps: int, **settings) -> str:
        line = estimate(task, model, Settings(**settings), steps=steps, batch=32)
        assert line is not None
        return line.partition("(")[2].partition(";")[0]

    assert parts(10) == "training 1 min 40 s, limit 3 min 20 s, explained 1 h 06 min"
    assert parts(10, without=("explained",)) == "training 1 min 40 s, limit 3 min 20 s"
    assert parts(10, without=("explained", "limit")) == "training 1 min 40 s"
    assert (
        parts(10_000) == "training 27 h 46 min"
    )  # three gradients for each of 320,000 examples: more than the kernels


def test_short_work_has_none(case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", 1e9)
    assert estimate(*case, Settings(), steps=10, batch=None) is None


def test_weights_that_are_loaded_cost_no_training(case) -> None:
    line = estimate(*case, Settings(weights="net.safetensors"), steps=10**9, batch=32)
    assert line is not None
    assert _seconds(line) < 3600


def test_it_changes_neither_models_nor_random_numbers(case) -> None:
    task, model = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate(task, model, Settings(), steps=10, batch=None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
