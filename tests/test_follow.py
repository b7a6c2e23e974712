"""`ntkit track`: on a run of analyze, on a recorded loop, while it trains, and killed at any moment."""

from __future__ import annotations

import signal
import sys
import textwrap
import time

import numpy as np
import processes
import pytest
import torch

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.files import read_arrays
from ntkit.commands.settings import TrackSettings
from ntkit.commands.track import track_run
from ntkit.tracking import Tracked, track

FACTORY = """
    import torch
    from torch import nn


    def make(outputs=1):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, outputs))
"""

LOOP = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import torch
    import ntkit
    from net import make

    data = ntkit.data.load("digits", classes=(3, 8))
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ntkit.record(model, optimizer, path=sys.argv[1] + "/run", record=10) as rec:
        for step in range(60):
            out = model(data.x_train[:100])[:, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(out, data.y_train[:100].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.step(loss=loss)
            time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "net.py").write_text(textwrap.dedent(FACTORY))
    (tmp_path / "loop.py").write_text(textwrap.dedent(LOOP))
    rng = np.random.default_rng(0)
    x = rng.random((40, 1, 8, 8), dtype=np.float32)
    y = rng.integers(0, 2, 40)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    return tmp_path


def trained(place, pause: float = 0.0) -> processes.Running:
    return processes.script(place / "loop.py", place, pause)


def tracking(place, *more: object) -> processes.Running:
    return processes.command(
        "track", place / "run", "--model", f"{place}/net.py:make", "--data", f"{place}/set.npz", "--k", 5, *more
    )


def test_a_run_of_analyze_is_known(tmp_path):
    settings = ntkit.Settings(classes=("3", "8"), train=60, test=20, model="mlp", epochs=1, track_points=20)
    run = ntkit.analyze(settings, out=tmp_path / "run", say=lambda line: None)
    lines = []
    out = track_run(run, TrackSettings(points=15, k=4), say=lines.append)
    assert out == run / "track"
    assert (out / "track.html").exists()
    tracked = Tracked.open(out)
    assert len(lines) == 2 + len(tracked.steps)  # titles, rows, the report's place
    assert tracked.steps == ntkit.Trajectory.open(run / "trajectory").steps
    assert tracked.settings["points"] == 15
    images = read_arrays(out / "images.safetensors")
    data, vectors = ntkit.data.load("digits", classes=("3", "8"), train=60, test=20), tracked.eigenvectors(0)
    x = data.x_train[torch.linspace(0, 59, 15).long()].double()
    expected = sum(vectors[j, 1] * x[j, 0] for j in range(15))
    assert torch.allclose(torch.from_numpy(images["eigenfunctions"][0, 1]).double(), expected, atol=1e-5)
    assert "mean image" in (out / "track.html").read_text()
    lines.clear()
    track_run(run, TrackSettings(points=15, k=4), say=lines.append)
    assert len(lines) == 2  # nothing is measured twice


def test_follow_a_loop_while_it_trains(place):
    loop = trained(place, 0.05)
    try:
        loop.until((place / "run" / "run.json").exists)
        done = tracking(place, "--follow").done()
    finally:
        loop.wait(60)
    assert done.returncode == 0, done.stderr
    assert Tracked.open(place / "run" / "track").steps == list(range(0, 61, 10))
    rows = done.stdout.splitlines()
    assert rows[0].split()[0] == "step"
    assert len(rows) == 1 + 7 + 1


def test_killed_at_any_moment_the_numbers_are_the_same(place):
    assert trained(place).wait(60) == 0
    assert tracking(place, "--out", place / "whole").wait() == 0
    whole, kills = Tracked.open(place / "whole"), 0
    for wait in (0.0, 0.03, 0.15, 0.4):
        torn = tracking(place, "--out", place / "torn")
        torn.until(lambda torn=torn: "\n" in torn.stdout)  # the titles: the work begins
        time.sleep(wait)
        torn.send_signal(signal.SIGKILL)
        kills += torn.wait() == -signal.SIGKILL
    assert tracking(place, "--out", place / "torn").wait() == 0
    torn = Tracked.open(place / "torn")
    assert kills > 0
    assert torn.series == whole.series
    assert all((torn.eigenvectors(s) == whole.eigenvectors(s)).all() for s in whole.steps)


def test_a_recorded_run_needs_model_and_data(place):
    assert trained(place).wait(60) == 0
    with pytest.raises(Refused, match="--model and --data"):
        track_run(place / "run")
    with pytest.raises(Refused, match="no such file"):
        track_run(place / "nowhere")


def test_operator_and_matrix_agree_on_a_trained_network(place):
    assert trained(place).wait(60) == 0
    sys.path.insert(0, str(place))
    try:
        from net import make
    finally:
        sys.path.pop(0)
    data, model = ntkit.data.load(str(place / "set.npz")), make().double()
    trajectory = ntkit.Trajectory.open(place / "run")
    x, y = data.x_train.double(), data.y_train
    both = [track(trajectory, x, y, model=model, k=6, steps=[0, 60], memory=m) for m in (None, "2 kB")]
    assert [t.settings["kernel"] for t in both] == ["dense", "matrix-free"]
    for name in ("trace", "tail", "sharpness", "loss"):
        assert both[0].series[name] == pytest.approx(both[1].series[name], rel=1e-4)
    for a, b in zip(both[0].series["energy_target"], both[1].series["energy_target"], strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert torch.tensor(both[0].series["eigenvalues"]).allclose(torch.tensor(both[1].series["eigenvalues"]), rtol=1e-8)
