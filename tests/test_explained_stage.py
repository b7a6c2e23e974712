"""Predictions explained in a run of `ntkit analyze`: the same numbers as `ntkit explain`, and why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import ntkit
from ntkit.base.files import read_arrays, read_json
from ntkit.commands import explained_stage as stage
from ntkit.commands.explain import explain_run
from ntkit.commands.verify import verify
from ntkit.networks.built_in import build

SMALL = {"classes": ("3", "8"), "train": 40, "test": 12, "epochs": 3, "track_points": 20, "probe_points": 4}
NET = """
from torch import nn
def make(outputs):
    return nn.Sequential(nn.Flatten(), {layer}, nn.Linear(64, outputs))
"""


def explained(folder: Path, **more: Any) -> dict[str, Any] | None:
    ntkit.analyze(ntkit.Settings(**SMALL | more), out=folder)
    results = read_json(folder / "results.json")
    assert not [c["what"] for c in results["certificates"] if not c["ok"]]
    return results["explained"]


def by_net(folder: Path, layer: str, **more: Any) -> dict[str, Any] | None:
    (folder / "net.py").write_text(NET.format(layer=layer))
    return explained(folder / "run", model=f"{folder}/net.py:make", **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained") / "run"
    explained(folder, model="mlp", optimizer="adam", weight_decay=0.01)
    return folder


def test_the_numbers_are_those_of_ntkit_explain(run: Path) -> None:
    found, whole = read_json(run / "results.json")["explained"], read_json(explain_run(run, say=str) / "results.json")
    assert [p["test_index"] for p in found["points"]] == [p["test_index"] for p in whole["points"]]
    assert found["steps_shown"] == whole["training"]["steps_shown"]
    assert found["influence"]["checked"] == 1
    assert found["influence"]["metasmoothness"] == pytest.approx(whole["influence"]["metasmoothness"])
    for own, other in zip(found["points"], whole["points"], strict=True):
        assert own["weight_decay"] != 0
        for key in ("why", "predicted", "margin", "residual", "accounting", "influence"):
            assert own[key] == other[key]
        assert [(d["method"], d["size"]) for d in own["deletions"]] == [
            ("accounting", 5), ("influence", 5), ("random", 5)
        ]  # fmt: skip
        small = {d["method"]: d for d in other["deletions"] if d["size"] == 5}
        for d in own["deletions"][:2]:
            assert d["predicted"] == pytest.approx(small[d["method"]]["predicted"])
            assert d["real"] == pytest.approx(small[d["method"]]["real"], abs=1e-5)
            assert d["spread"] is None
        assert own["deletions"][2]["spread"] > 0


def test_verify_knows_its_files_and_pictures_are_the_examples(run: Path) -> None:
    assert {record.status for record in verify(run)} == {"ok"}
    data = ntkit.data.load("digits", classes=("3", "8"), train=40, test=12)
    arrays, points = read_arrays(run / "arrays" / "explained.safetensors"), read_json(run / "results.json")["explained"]
    tests = [p["test_index"] for p in points["points"]]
    assert (arrays["test"][..., 0] == (255 * data.x_test[tests, 0]).round().numpy()).all()
    shown = arrays["train_index"].tolist()
    assert (arrays["train"][..., 0] == (255 * data.x_train[shown, 0]).round().numpy()).all()


@pytest.mark.parametrize(
    ("layer", "why"), [("nn.Dropout(0.2)", "(Dropout): dropout p=0.2 active"), ("nn.BatchNorm1d(64)", "(BatchNorm1d)")]
)
def test_a_network_whose_training_cannot_be_replayed(layer: str, why: str, tmp_path: Path) -> None:
    found = by_net(tmp_path, layer, epochs=1)
    assert found is not None
    assert found.keys() == {"unexplained"}
    assert f"each sample alone and without chance, unlike layer '1' {why}" in found["unexplained"]
    assert "Not here: a training is replayed only if each layer" in (tmp_path / "run" / "report.html").read_text()


def test_a_training_that_diverged(tmp_path: Path) -> None:
    ntkit.analyze(ntkit.Settings(**SMALL, model="mlp", lr=1e9, momentum=0.0), out=tmp_path / "run")
    results = read_json(tmp_path / "run" / "results.json")
    assert results["training"]["stop"] == "diverged"
    assert results["explained"].keys() == {"unexplained"}
    assert "a run that ended before its first step" in results["explained"]["unexplained"]


def test_loaded_weights(tmp_path: Path) -> None:
    save_file(build("linear", (1, 8, 8), 1, 0).state_dict(), tmp_path / "w.safetensors")
    kept = {name: value for name, value in SMALL.items() if name != "epochs"}
    s = ntkit.Settings(model="linear", weights=str(tmp_path / "w.safetensors"), **kept)
    run = ntkit.analyze(s, out=tmp_path / "run")
    assert read_json(run / "results.json")["explained"] is None
    assert "so there was no training to replay" in (run / "report.html").read_text()


def test_a_training_that_would_take_longer_than_the_rest(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stage, "COST", 1e6)
    found = explained(tmp_path / "run", model="mlp")
    assert found == {"unexplained": stage.LONG}
    assert not (tmp_path / "run" / "arrays" / "explained.safetensors").exists()


def test_other_errors_are_not_hidden(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **named: Any) -> Any:
        raise ntkit.Refused("no room") from OSError(28, "no space left on device")

    monkeypatch.setattr(stage, "influence", full)
    with pytest.raises(ntkit.Refused, match="no room"):
        explained(tmp_path / "run", model="mlp")
