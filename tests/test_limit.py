"""`ntkit infinite`: accuracies of the limit beside others, on real digits."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from processes import command

from ntkit.base.checks import Refused
from ntkit.base.files import read_json
from ntkit.commands.infinite_width import infinite
from ntkit.commands.settings import InfiniteSettings

FACTORY = """
    from torch import nn


    def factory(shape, outputs):
        return nn.Sequential(
            nn.Conv2d(shape[0], 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 32), nn.ReLU(),
            nn.Linear(32, outputs),
        )
"""


def test_accuracies_of_the_limit_beside_others(tmp_path):
    (tmp_path / "net.py").write_text(textwrap.dedent(FACTORY))
    lines: list[str] = []
    name = f"{tmp_path / 'net.py'}:factory"
    found = infinite(InfiniteSettings(model=name, train=300, folds=3, epochs=3, out=tmp_path / "run"), say=lines.append)
    rows = {row["name"]: row for row in found["accuracies"]}
    assert list(rows) == ["NTK, kernel ridge", "NNGP, kernel ridge", "SVM, RBF", "the network, trained"]
    for kernel in ("NTK, kernel ridge", "NNGP, kernel ridge", "SVM, RBF"):
        assert rows[kernel]["mean"] > 0.9
        assert rows[kernel]["test"] > 0.9
        assert 0 < rows[kernel]["error"] < 0.05
    assert 0.2 < rows["the network, trained"]["mean"] < rows["NTK, kernel ridge"]["mean"]
    assert 0 < found["distance"] < 1
    assert any("layer '0' (Conv2d): weights of std 0.5774" in line for line in lines)
    assert read_json(tmp_path / "run" / "results.json") == found
    assert read_json(tmp_path / "run" / "run.json")["settings"]["train"] == 300
    with pytest.raises(Refused, match="another run"):
        infinite(InfiniteSettings(model=name, train=200, folds=3, epochs=3, out=tmp_path / "run"))


def test_the_command_prints_a_table_and_refuses_in_a_line(tmp_path):
    words = ["infinite", "--train", "150", "--folds", "2", "--epochs", "1"]
    script = [Path(sys.executable).with_name("ntkit"), *words, "--w-std", "1.4", "--b-std", "0.1"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in (
        "mlp at infinite width on digits, 150 examples",
        "NTK, kernel ridge",
        "SVM, RBF",
        "the network, trained",
    ):
        assert text in done.stdout
    refused = command(*words, "--model", "cnn").done()
    assert refused.returncode == 2
    assert "layer '4' (MaxPool2d)" in refused.stderr
    assert "average pooling" in refused.stderr


def test_refusals():
    for arguments, message in (
        ({"folds": 1}, "--folds"),
        ({"train": 20, "folds": 5}, "one example per class in every fold"),
        ({"w_std": 1.0}, "b_std"),
        ({"model": "mlpp"}, "Did you mean mlp"),
        ({"device": "gpu"}, "--device: got 'gpu'; expected one of auto, cpu, cuda"),
    ):
        with pytest.raises(Refused, match=message):
            infinite(InfiniteSettings(**{"train": 100, "folds": 2, **arguments}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(Refused, match="--device: got cuda; expected a device of this machine"):
        infinite(InfiniteSettings(train=100, folds=2, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sample", [None, 2])
def test_the_accuracies_do_not_depend_on_the_device(sample):
    found = {
        device: infinite(InfiniteSettings(train=200, folds=2, epochs=2, sample=sample, device=device))
        for device in ("cpu", "cuda")
    }
    for mine, other in zip(found["cuda"]["accuracies"], found["cpu"]["accuracies"], strict=True):
        assert mine["name"] == other["name"]
        assert mine["mean"] == pytest.approx(other["mean"], abs=0.01)  # one or two of the 200 examples
        assert mine["test"] == pytest.approx(other["test"], abs=0.01)
    assert found["cuda"]["distance"] == pytest.approx(found["cpu"]["distance"], rel=1e-3)
