"""How near a network is to infinite width, in `ntkit analyze`: two-sided, against the library's own pieces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ntkit
from ntkit.base.files import read_json
from ntkit.commands import limit_measures as measures
from ntkit.commands.network_measures import TrainingTask, spread
from ntkit.commands.regression_measures import RegressionTask
from ntkit.data import Data
from ntkit.networks.built_in import build
from ntkit.report.limit_section import finding, limit_section
from ntkit.trajectory import Trajectory, train

LARGE = 1e12  # gradients: everything is affordable


def digits() -> Data:
    return ntkit.data.load("digits", classes=("3", "8"), train=60, test=40)


def trained(task: TrainingTask, model: nn.Module, settings: ntkit.Settings, path: Path, steps: int) -> Trajectory:
    data, n = (task.data.x_train, task.data.y_train), settings.batch_size
    model.load_state_dict(model.state_dict())
    return train(
        model, data, task.loss, settings.make_optimizer, steps, batch_size=n, seed=settings.seed, path=path
    )  # fmt: skip


def first_order(model: nn.Module, path: Path, steps: int = 40, affordable: float = LARGE, **more: Any) -> dict:
    task = TrainingTask(model, digits())
    settings = ntkit.Settings(**{"batch_size": 20, "lr": 0.1, "momentum": 0.9} | more)
    trajectory = trained(task, copy.deepcopy(model), settings, path / "run", steps)
    return measures.first_order(task, model, trajectory, settings, affordable)


def test_a_model_linear_in_its_parameters_is_its_own_first_order_network(tmp_path: Path) -> None:
    told = first_order(build("linear", (1, 8, 8), 1, seed=0), tmp_path)
    assert told["distance"][0] is None
    assert max(told["distance"][1:]) < 1e-5
    assert told["paired"]["p"] == 1.0
    assert told["test_loss"]["network"] == pytest.approx(told["test_loss"]["first_order"], rel=1e-5)


def test_wide_networks_train_like_their_first_order_network_and_narrow_ones_do_not(tmp_path: Path) -> None:
    distances = []
    for width in (8, 4096):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 1))
        model = ntkit.to_ntk_parametrization(model, w_std=2**0.5, b_std=0.1)
        told = first_order(model, tmp_path / str(width), momentum=0.0, lr=0.5)
        distances.append(told["distance"][-1])
    narrow, wide = distances
    assert wide < 0.05
    assert narrow > 4 * wide


def test_the_numbers_are_those_of_both_networks(tmp_path: Path) -> None:
    model = build("mlp", (1, 8, 8), 1, seed=0)
    told = first_order(model, tmp_path, optimizer="adam", lr=0.003)
    data = digits()
    linear = ntkit.linearized(model)
    task, settings = TrainingTask(model, data), ntkit.Settings(batch_size=20, optimizer="adam", lr=0.003)
    train(
        linear, (data.x_train, data.y_train), task.loss, settings.make_optimizer, 40, batch_size=20, seed=0
    )  # fmt: skip
    start = model(data.x_test).detach()
    Trajectory(tmp_path / "run").load(model, 40)
    f, g = model(data.x_test).detach().double(), linear(data.x_test).detach().double()
    assert told["steps"][-1] == 40
    assert told["distance"][-1] == pytest.approx(float((f - g).norm() / (f - start).norm()), rel=1e-5)
    for name, out in (("network", f), ("first_order", g)):
        wrong = ((out[:, 0] > 0).long() != data.y_test).double().mean()
        assert told["test_error"][name][-1]["value"] == pytest.approx(float(wrong))
        assert told["test_loss"][name][-1] == pytest.approx(float(task.loss(out, data.y_test)), rel=1e-5)


def test_a_regression_has_losses_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(50, 3)
    folder = tmp_path / "table.csv"
    rows = ["a,b,c,price", *(f"{a:.4f},{b:.4f},{c:.4f},{a * b - c:.4f}" for a, b, c in x.tolist())]
    folder.write_text("\n".join(rows))
    data = ntkit.data.load(str(folder), target=("price",))
    model = build("mlp", data.input_shape, 1, seed=0)
    task = RegressionTask(model, data)
    settings = ntkit.Settings(batch_size=10, lr=0.05)
    trajectory = trained(task, copy.deepcopy(model), settings, tmp_path / "run", 30)
    told = measures.first_order(task, model, trajectory, settings, LARGE)
    assert "test_error" not in told
    assert len(told["test_loss"]["network"]) == len(told["steps"])
    assert told["test_loss"]["network"][0] == told["test_loss"]["first_order"][0]


def test_what_is_too_long_diverged_or_not_differentiable_forward_is_said(tmp_path: Path) -> None:
    model = build("mlp", (1, 8, 8), 1, seed=0)
    assert "longer" in first_order(model, tmp_path / "long", affordable=1.0)["absent"]
    assert "diverged" in first_order(model, tmp_path / "diverged", lr=1e30)["absent"]

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.lstm(x[:, 0])[0][:, -1])

    assert "forward-mode" in first_order(Last(), tmp_path / "lstm")["absent"]


def test_the_kernel_beside_its_closed_form() -> None:
    model, data = build("mlp", (1, 8, 8), 1, seed=0), digits()
    after = build("mlp", (1, 8, 8), 1, seed=7)
    told = measures.kernel_beside_limit(TrainingTask(model, data), {"init": model, "after": after}, LARGE)
    x = data.x_train[spread(len(data.x_train), told["samples"])]
    assert len(x) == told["samples"] > 10
    limit = ntkit.InfiniteKernel(model)(x.double())
    own = {"init": ntkit.TangentKernel(model)(x).double(), "after": ntkit.TangentKernel(after)(x).double()}
    assert told["networks"] is None
    assert told["distance"] == pytest.approx(float((own["init"][..., 0, 0] - limit).norm() / limit.norm()), rel=1e-4)
    for key, K in own.items():
        assert told["cosines"][key] == pytest.approx(ntkit.alignment(K[..., 0, 0], limit, centered=True), rel=1e-4)


def test_a_dead_network_has_no_cosine_with_the_limit() -> None:
    model, data = build("mlp", (1, 8, 8), 1, seed=0), digits()
    dead = copy.deepcopy(model)
    for p in dead.parameters():
        nn.init.constant_(p, -1.0)
    dead[-1].requires_grad_(False)
    told = measures.kernel_beside_limit(TrainingTask(model, data), {"init": model, "after": dead}, LARGE)
    assert told["cosines"]["after"] is None
    assert told["cosines"]["init"] > 0


def test_without_a_closed_form_random_wide_networks_stand_for_it() -> None:
    model, data = build("cnn", (1, 8, 8), 1, seed=0), digits()
    task = TrainingTask(model, data)
    short = measures.kernel_beside_limit(task, {"init": model, "after": model}, 1000.0)
    assert "max_pool2d" in short["absent"]
    assert "ntkit infinite --sample 16" in short["absent"]


def test_the_report_says_why_there_is_nothing() -> None:
    absent = {"kernel": {"absent": "layer 'a': odd"}}
    told = limit_section({"limit": {"first_order": None, **absent}})
    assert told is not None
    assert "weights were loaded" in told["missing"]
    assert "layer 'a': odd" in told["kernel"]
    assert not told["figures"]
    told = limit_section({"limit": {"first_order": {"absent": "training diverged"}, **absent}})
    assert told is not None
    assert told["missing"] == "No first-order network: training diverged."
    assert limit_section({}) is None
    assert finding({"limit": {"first_order": {"absent": "training diverged"}, **absent}}) is None


def test_sections_are_left_out(tmp_path: Path) -> None:
    small = {"classes": ("3", "8"), "train": 60, "test": 30, "epochs": 2, "track_points": 20, "probe_points": 8}
    sections = ("training", "limit", "invariances", "neighbors", "explained")
    run = ntkit.analyze(ntkit.Settings(**small, model="mlp", without=sections), out=tmp_path / "run")
    results, page = read_json(run / "results.json"), (run / "report.html").read_text()
    assert results["left_out"] == list(sections)
    for key in ("along", "against_loss", "limit", "invariances", "neighbors", "explained"):
        assert results[key] is None
    for section in sections:
        assert f"--without {section}</code>" in page
    assert "--without training limit invariances neighbors explained" in results["reproduce"]["command"]
    stages = {file.stem for file in (run / "stages").glob("*.json")}
    assert not stages & {"along", "against-loss", "limit", "invariances", "neighbors", "explained"}
    assert "machine-after" in stages
    with pytest.raises(ntkit.Refused, match="Did you mean limit"):
        ntkit.Settings(without=("limits",)).check()
