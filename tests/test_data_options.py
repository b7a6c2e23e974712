"""The options of data are those of every command: classes, samples, names, targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.files import read_json
from ntkit.commands.infinite_width import infinite
from ntkit.commands.settings import DataSettings, InfiniteSettings, Settings, TrackSettings
from ntkit.commands.track import track_run
from ntkit.networks.built_in import build


def silent(line):
    return None


def recorded(folder, data):
    """A short run of the linear network, recorded from Python."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    ntkit.train(
        build("linear", data.input_shape, 1, seed=0), (data.x_train, data.y_train),
        lambda out, y: loss(out[:, 0], y.to(out)), lambda p: torch.optim.SGD(p, lr=0.1), steps=3, path=folder,
    )  # fmt: skip
    return folder


def test_labels_7_and_9_are_tracked(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4))
    np.savez(tmp_path / "a.npz", X=x, y=np.where(x[:, 0] > 0, 7, 9))
    run = recorded(tmp_path / "run", ntkit.data.load(tmp_path / "a.npz"))
    settings = TrackSettings(model="linear", data=str(tmp_path / "a.npz"), points=10, k=2)
    assert read_json(track_run(run, settings, say=silent) / "track.json")["points"] == 10


def test_a_recorded_run_is_tracked_on_the_classes_and_sample_asked_for(tmp_path):
    data = ntkit.data.load("digits", classes=(3, 8), train=20)
    run = recorded(tmp_path / "run", data)
    settings = TrackSettings(model="linear", data="digits", classes=("3", "8"), train=20, k=3)
    place = track_run(run, settings, say=silent)
    found = ntkit.track(
        ntkit.Trajectory.open(run), data.x_train, data.y_train, model=build("linear", data.input_shape, 1, 0), k=3,
        outputs="trace",
    )  # fmt: skip
    first = read_json(place / "step-00000000.json")
    assert first["eigenvalues"] == pytest.approx(found.series["eigenvalues"][0], rel=1e-12)
    assert first["alignment"] == pytest.approx(found.series["alignment"][0], rel=1e-12)


def test_a_run_of_analyze_has_its_own_data(tmp_path):
    settings = Settings(classes=("3", "8"), train=20, test=10, epochs=1, model="linear", track_points=5)
    run = ntkit.analyze(settings, out=tmp_path / "run")
    with pytest.raises(Refused, match="got --class-names for a run of ntkit analyze; expected none: its data are"):
        track_run(run, TrackSettings(class_names=("a", "b")), say=silent)


def test_the_limit_takes_classes_and_a_test_sample(tmp_path):
    settings = InfiniteSettings(classes=("3", "8"), train=40, test=20, folds=2, epochs=1, out=tmp_path / "run")
    found = infinite(settings)
    assert found["settings"] | {"train": 40, "test": 20, "classes": ["3", "8"]} == found["settings"]
    assert found["accuracies"][0]["test"] > 0.8
    infinite(settings)
    with pytest.raises(Refused, match="which holds another run"):
        infinite(InfiniteSettings(classes=("1", "8"), train=40, test=20, folds=2, epochs=1, out=tmp_path / "run"))


def test_names_of_classes_are_in_the_results(tmp_path):
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    small = {"train": 20, "test": 10, "epochs": 1, "model": "linear", "track_points": 5}
    settings = Settings(classes=("three", "eight"), class_names=names, **small)
    run = ntkit.analyze(settings, out=tmp_path / "run")
    results = read_json(run / "results.json")
    assert results["data"]["classes"] == ["three", "eight"]
    assert {row["label"] for row in results["neighbors"]["rows"]} == {"three", "eight"}
    assert "--class-names zero one" in results["reproduce"]["command"]
    again = ntkit.analyze(from_run=run, out=tmp_path / "again")
    assert (again / "results.json").read_bytes() == (run / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": 0}, "--train: got 0; expected an integer of at least 1"),
        ({"test": 1.5}, "--test: got 1.5"),
        ({"resize": -1}, "--resize: got -1"),
        ({"task": "regresion"}, "--task: got 'regresion'; expected classification or regression. Did you mean regres"),
        ({"data": "a\nb"}, "--data: got"),
    ],
)
@pytest.mark.parametrize("kind", [DataSettings, Settings, TrackSettings, InfiniteSettings])
def test_invalid_options_are_refused_by_name(kind, values, message):
    with pytest.raises(Refused, match=message):
        kind(**values).check_data()


def test_one_target_may_be_given_without_a_tuple():
    assert Settings(target="price").target == ("price",)
    assert Settings(classes=(3, 8)).classes == ("3", "8")
