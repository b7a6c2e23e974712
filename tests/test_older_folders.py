"""Folders that older versions wrote, in `tests/older/COMMIT`, and folders of formats that are still to come.

They were written by the code of those commits: f963d39 (2026-11-21, files without checksums) and 42a2571 (2026-11-29,
with checksums, `ntkit explain` and `GramStore`). Only their pages were deleted, since each has all of plotly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.base.checks import NewerFormat
from ntkit.base.files import read_json, write_json
from ntkit.base.tensors import read_tensors_and_metadata, write_tensors
from ntkit.base.versions import earlier_versions, versions
from ntkit.commands.compare import compare
from ntkit.commands.explain import explain_run
from ntkit.commands.track import track_run
from ntkit.commands.verify import verify
from ntkit.gram import tile_files
from ntkit.report import render
from ntkit.studies import study
from ntkit.tracking import Tracked, track
from ntkit.trajectory import Trajectory, record, train

OLDER = Path(__file__).parent / "older"
FIRST, LATER = "f963d39", "42a2571"

pytestmark = pytest.mark.filterwarnings("ignore::ntkit.base.integrity.WithoutChecksum")
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 2


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def trained(path=None, resume=False):
    return train(model(), (X, Y), F.cross_entropy, sgd, steps=8, batch_size=4, seed=5, path=path, resume=resume)


def tracked(run, path=None):
    return track(run, X, Y, model=model(), k=4, path=path)


def decomposed(run, path):
    points = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    return ntkit.PathKernel(run, model=model(), data=(X, Y), loss=F.cross_entropy).decompose(points, path=path)


def retrainings(run, folder):
    given = {"model": model(), "data": (X, Y), "loss": F.cross_entropy}
    return ntkit.Retrainings(run, X[:3], Y[:3], measure="loss", path=folder, **given)


@pytest.fixture
def older(tmp_path):
    """A copy of an older folder."""

    def copied(commit, name):
        return Path(shutil.copytree(OLDER / commit / name, tmp_path / name))

    return copied


def assert_same_run(found, expected):
    assert found.steps == expected.steps
    torch.testing.assert_close(found.losses, expected.losses)
    for step in expected.steps:
        torch.testing.assert_close(found.state(step), expected.state(step))


# ---------------------------------------------------------------------- what is read


def test_a_trajectory_is_read(older):
    found = Trajectory.open(older(FIRST, "train"))
    assert_same_run(found, trained())
    assert [found.batch(s).tolist() for s in range(8)] == [trained().batch(s).tolist() for s in range(8)]


def test_a_training_that_was_stopped_goes_on(older):
    folder = older(FIRST, "half")
    assert Trajectory.open(folder).status == "running"
    assert_same_run(trained(folder, resume=True), trained())


def test_a_recorded_loop_that_was_stopped_goes_on(older):
    folder, m = older(FIRST, "record-half"), model()
    opt = sgd(m.parameters())
    with record(m, opt, path=folder, resume=True) as rec:
        assert rec.done == 5
        for s in range(rec.done, 8):
            rows = torch.arange(4) + 4 * (s % 3)
            loss = F.cross_entropy(m(X[rows]), Y[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
            rec.step(rows, loss)
    again = model()
    opt, losses = sgd(again.parameters()), []
    for s in range(8):
        rows = torch.arange(4) + 4 * (s % 3)
        loss = F.cross_entropy(again(X[rows]), Y[rows])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    found = Trajectory.open(folder)
    assert found.status == "complete"
    torch.testing.assert_close(found.losses.float(), torch.tensor(losses))
    assert found.batch(1).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("commit", [FIRST, LATER])
def test_a_tracking_is_read(commit, older):
    found, expected = Tracked.open(older(commit, "track")), tracked(trained())
    assert found.steps == expected.steps
    for name in ("loss", "trace", "eigenvalues", "alignment_centered", "distance", "sharpness", "energy_target"):
        values = torch.tensor(found.series[name], dtype=torch.float64)
        torch.testing.assert_close(
            values, torch.tensor(expected.series[name], dtype=torch.float64), rtol=1e-4, atol=1e-6
        )
    assert render(found.path).read_text().endswith("-->\n")


def test_a_kernel_matrix_on_disk_is_read(older):
    pytest.importorskip("zarr")
    K = ntkit.GramStore.open(older(LATER, "store"))
    assert K.verify() == []
    torch.testing.assert_close(K.rows(slice(0, 12)).float(), ntkit.TangentKernel(model(), outputs="trace")(X))


def test_results_of_a_run_with_checksums_are_shown(older):
    run = older(LATER, "run")
    assert {record.status for record in verify(run) if record.file != "report.html"} == {"ok"}
    assert "linear on digits" in render(run).read_text()


# ---------------------------------------------------------------------- what is refused, and what to do


@pytest.mark.parametrize("commit", [FIRST, LATER])
def test_what_functions_were_called_otherwise_for_is_not_mixed(commit, older):
    run, again = trained(), "another version of ntkit or Python wrote it"
    for name, call in (("track", tracked), ("path", decomposed)):
        folder = older(commit, name)
        before = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".lock"}
        with pytest.raises(ntkit.Refused, match=rf"(Give|Name) another folder.*{again}"):
            call(run, folder)
        assert {name: (folder / name).read_bytes() for name in before} == before


def test_retrainings_of_another_version_are_not_mixed(older):
    with pytest.raises(ntkit.Refused, match=r"retrainings of something else.*another version of ntkit or Python"):
        retrainings(trained(), older(LATER, "retrainings"))


def test_a_run_with_other_keys_is_refused_with_the_command_that_repeats_it(older, tmp_path, monkeypatch):
    run = older(FIRST, "run")
    again = rf"ntkit analyze --from {run} --out NEW"
    calls = (
        lambda: render(run),
        lambda: ntkit.analyze(from_run=run),
        lambda: compare([run, OLDER / LATER / "run"], out=tmp_path / "compared"),
    )
    for call in calls:
        with pytest.raises(ntkit.Refused, match=f"of an earlier version.*{again}"):
            call()
    with pytest.raises(ntkit.Refused, match=rf"got data with hash .*{again}.*there, --seed chose the examples, too"):
        explain_run(run, say=lambda line: None)
    sample = ntkit.data.load("digits", classes=(3, 8), train=16, test=8, seed=3)  # as the run drew it
    monkeypatch.setattr(ntkit.Settings, "load_data", lambda settings: sample)
    with pytest.raises(ntkit.Refused, match=rf"whose loss is called Task\.loss.*{again}"):
        explain_run(run, say=lambda line: None)


def test_an_unfinished_run_with_fewer_settings_is_refused_with_the_command_for_a_new_run(older):
    run = older(LATER, "run")
    told = read_json(run / "run.json")
    assert "without" not in told["settings"]
    write_json(run / "run.json", told | {"status": "running"})
    (run / "results.json").unlink()
    words = r"version of ntkit \(settings without .*without\).*ntkit analyze .*--data digits --model linear .*--out NEW"
    with pytest.raises(ntkit.Refused, match=words):
        ntkit.analyze(from_run=run)


# ---------------------------------------------------------------------- formats that are still to come


def refused(*calls):
    for call in calls:
        with pytest.raises(
            NewerFormat, match=r"got format 2, of a newer ntkit; expected format 1, which ntkit .* reads\. Upgrade"
        ):
            call()


def changed(file, **entries):
    write_json(file, read_json(file) | entries)


def test_a_newer_trajectory(older):
    folder = older(FIRST, "train")
    changed(folder / "run.json", version=2)
    refused(lambda: Trajectory.open(folder), lambda: trained(folder, resume=True), lambda: verify(folder))


def test_a_newer_tracking(older):
    folder = older(LATER, "track")
    changed(folder / "track.json", version=2)
    refused(
        lambda: Tracked.open(folder),
        lambda: tracked(trained(), folder),
        lambda: render(folder),
        lambda: verify(folder),
    )


def test_a_newer_run(older, tmp_path):
    run, other = older(LATER, "run"), OLDER / LATER / "run"
    changed(run / "run.json", format=2)
    refused(
        lambda: ntkit.analyze(from_run=run),
        lambda: ntkit.analyze(out=run, overwrite=True),
        lambda: track_run(run),
        lambda: explain_run(run),
        lambda: compare([other, run], out=tmp_path / "compared"),
        lambda: verify(run),
    )
    changed(run / "run.json", format=1)
    changed(run / "results.json", format=2)
    refused(lambda: render(run))


def test_a_run_with_settings_that_are_not_known(older):
    run = older(LATER, "run")
    told = read_json(run / "run.json")
    changed(run / "run.json", settings=told["settings"] | {"augment": True})
    for call in (lambda: ntkit.analyze(from_run=run), lambda: track_run(run), lambda: explain_run(run)):
        with pytest.raises(ntkit.Refused, match=r"settings that ntkit .* does not have: augment; .*Upgrade ntkit"):
            call()


@pytest.mark.parametrize("kind", ["study", "explanation", "comparison"])
def test_newer_results_of_other_commands(kind, tmp_path):
    write_json(tmp_path / "results.json", {"kind": kind, "format": 2})
    refused(lambda: render(tmp_path))


def test_a_newer_study(tmp_path):
    write_json(tmp_path / "run.json", {"kind": "study", "format": 2, "name": "jacot2018"})
    refused(lambda: study("jacot2018", out=tmp_path), lambda: verify(tmp_path))


def test_a_newer_kernel_matrix(older):
    pytest.importorskip("zarr")
    folder = older(LATER, "store")
    said = json.loads((folder / "zarr.json").read_text())
    del said["attributes"]["ntkit"]["checksum"]
    said["attributes"]["ntkit"]["format"] = 2
    (folder / "zarr.json").write_bytes(tile_files._sealed(json.dumps(said).encode()))
    refused(lambda: ntkit.GramStore.open(folder), lambda: verify(folder))


def test_a_newer_decomposition_and_retrainings_stay_as_they_are(older):
    run = trained()
    for name, call in (("path", decomposed), ("retrainings", retrainings)):
        folder = older(LATER, name)
        (file,) = folder.glob("*.safetensors")
        tensors, told = read_tensors_and_metadata(file)
        of = {"of": retrainings(run, None)._id} if name == "retrainings" else {}
        tensors = {key: value for key, value in tensors.items() if key != "trained"}
        write_tensors(file, tensors, {key: told[key] for key in told if key != "sha256"} | of | {"version": 2})
        before = file.read_bytes()
        refused(lambda call=call, folder=folder: call(run, folder))
        assert file.read_bytes() == before


def test_versions_that_worked_in_a_folder_before_are_named_once():
    old = {"ntkit": "0.1.0"}
    assert earlier_versions({"versions": old}) == [old]
    assert earlier_versions({"versions": old, "earlier_versions": [old]}) == [old]
    assert earlier_versions({"versions": versions(), "earlier_versions": [old]}) == [old]
    assert earlier_versions({"versions": versions()}) == earlier_versions({}) == []
