"""Commands on what people have: brackets in names, one test example, machines that do not exist, constant samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from processes import command
from sklearn.metrics import r2_score

import ntkit
from ntkit.base.checks import Refused
from ntkit.commands import tables
from ntkit.commands.gram_on_disk import gram
from ntkit.commands.infinite_width import _score, infinite
from ntkit.commands.option_file import with_options_of
from ntkit.commands.settings import FULL_BATCH, GramSettings, InfiniteSettings, Settings, SolveSettings
from ntkit.commands.solve_store import solve


@pytest.mark.parametrize("text", ["speed [m/s]", "[/bold] x", "[red]a[/red]", ":cat: a|b", "> 3"])
def test_names_with_brackets_are_printed_as_they_are(text, capsys):
    tables.print_table(text, (f">{text}", "other"), [(text, "1")])
    assert capsys.readouterr().out.count(text) == 3


def told_by(*words) -> dict:
    """What a command prints on standard output, as strict JSON."""
    done = command(*words, "--json", "--quiet").done()
    assert done.returncode == 0, done.stderr

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(done.stdout, parse_constant=fail)


def test_a_machine_that_does_not_exist_has_no_errors(tmp_path, capsys):
    """Two linear features do not separate these classes, and give a matrix of rank 2."""
    x = np.random.default_rng(0).normal(size=(40, 2)).astype("f4")
    np.savez(tmp_path / "a.npz", x=x, y=(x[:, 0] * x[:, 1] > 0).astype(int))
    store = gram("linear", str(tmp_path / "a.npz"), GramSettings(dtype="float64"), out=tmp_path / "K")
    found = solve(tmp_path / "K", SolveSettings(ridge=0.0, svm=True))
    for name, status in (("ridge", "singular"), ("svm", "not separable")):
        assert (found[name]["status"], found[name]["training_error"], found[name]["test_error"]) == (status, None, None)
    told = told_by("solve", tmp_path / "K", "--ridge", "0", "--svm")
    assert told == found
    assert json.loads((tmp_path / "K" / "solved.json").read_text())["svm"] == found["svm"]
    tables.print_solved(found)
    shown = capsys.readouterr().out
    assert found["ridge"]["advice"] in shown
    assert found["svm"]["advice"] in shown
    with pytest.raises(Refused, match=f"--spectrum: got 99; expected an integer from 1 to {len(store)}"):
        solve(tmp_path / "K", SolveSettings(spectrum=99))


def test_r2_is_scikit_learns_and_undefined_of_a_constant():
    draw = np.random.default_rng(1)
    y, predicted = draw.normal(size=(2, 9, 3)).astype("f4")
    assert _score(predicted, y) == pytest.approx(r2_score(y.astype("f8"), predicted.astype("f8")))
    y[:, 1] = 0.1  # whose computed mean is another number
    assert np.isnan(_score(predicted, y))
    assert np.isnan(_score(predicted[:1], y[:1]))


def test_one_test_example_has_no_r2(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(13, 4)).astype("f4")
    sets = {"x_train": x[:12], "y_train": x[:12, 0] * 3.3, "x_test": x[12:], "y_test": x[12:, 0]}
    np.savez(tmp_path / "a.npz", **sets)
    words = ("--data", tmp_path / "a.npz", "--model", "mlp", "--folds", "2", "--epochs", "1", "--out", tmp_path / "out")
    told = told_by("infinite", *words)
    assert [row["test"] for row in told["r2"]] == [None] * 4
    assert all(np.isfinite(row["mean"]) for row in told["r2"])
    tables.print_accuracies(told)
    assert "-" in capsys.readouterr().out


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_samples_that_are_all_the_same_are_refused(tmp_path, value):
    np.savez(tmp_path / "a.npz", x=np.full((60, 4), value, "f4"), y=np.arange(60) % 2)
    with pytest.raises(Refused, match="--data: got training examples that are all the same"):
        infinite(InfiniteSettings(data=str(tmp_path / "a.npz"), model="mlp", folds=3, epochs=1))


def test_a_full_batch_stays_one_in_the_command_and_in_a_file(tmp_path):
    s = Settings(batch_size=None)
    assert "None" not in s.arguments()
    words = s.arguments()
    assert int(words[words.index("--batch-size") + 1]) == FULL_BATCH
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"batch_size": None, "train": None, "lr": 0.5}}))
    words = with_options_of(tmp_path / "run.json", ["analyze"])
    assert words == ["analyze", "--batch-size", str(FULL_BATCH), "--lr", "0.5"]
    assert with_options_of(tmp_path / "run.json", ["analyze", "--batch-size", "8"])[-2:] == ["--lr", "0.5"]
    quick = {"train": 30, "test": 10, "epochs": 2, "without": ("training", "limit", "invariances", "explained")}
    runs = [
        ntkit.analyze(Settings(model="linear", batch_size=size, **quick), out=tmp_path / str(size))
        for size in (None, FULL_BATCH)
    ]
    losses = [json.loads((run / "results.json").read_text())["training"]["losses"] for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_names_of_classes_make_no_folders():
    assert Settings(classes=("a/b", "../c\\d")).slug() == "cnn-digits-a_b-.._c_d"
    assert Path(Settings(classes=("a/b", "c")).slug()).parent == Path()
