"""`ntkit solve`: spectra and classifiers from a kernel matrix on disk, against the same in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import command
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import ntkit
from ntkit.base.checks import Damaged, Refused
from ntkit.commands.gram_on_disk import gram
from ntkit.commands.settings import GramSettings, SolveSettings
from ntkit.commands.solve_store import solve
from ntkit.commands.verify import verify
from ntkit.networks.built_in import build

NETWORK = """
from torch import nn

def make(outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, outputs))
"""
ALL = SolveSettings(spectrum=5, ridge=1e-2, svm=True)


@pytest.fixture(scope="module", params=["digits of ten", "two classes"])
def case(request, tmp_path_factory):
    """A store, and its kernel, data and machines in memory."""
    place = tmp_path_factory.mktemp("solve")
    (place / "net.py").write_text(NETWORK)
    settings = {"classes": ("3", "8")} if request.param == "two classes" else {}
    sets = ntkit.data.load("digits", train=120, **settings)
    model = build(f"{place}/net.py:make", (1, 8, 8), 1 if settings else 10, 3).double()
    tensors = {name: 2 * p.detach().float() for name, p in model.named_parameters()}
    save_file(tensors, place / "w.safetensors")
    model.load_state_dict(tensors)
    weights = place / "w.safetensors"
    chosen = GramSettings(train=120, tile=50, dtype="float64", weights=weights, seed=0, **settings)
    K = gram(f"{place}/net.py:make", "digits", chosen, out=place / "store")
    return place, K, ntkit.TangentKernel(model, outputs="trace"), sets


def copied(case, tmp_path: Path) -> Path:
    return shutil.copytree(case[0] / "store", tmp_path / "store")


@pytest.mark.parametrize("method", ["Cholesky", "conjugate gradients"])
def test_the_numbers_are_those_in_memory(method, case, monkeypatch):
    place, _, kernel, sets = case
    if method != "Cholesky":
        monkeypatch.setattr("ntkit.gram.gram_matrix.free_memory", lambda device: 0)
    found = solve(place / "store", ALL)
    x, x_test = sets.x_train.double(), sets.x_test.double()
    K, K_test = kernel(x), kernel(x_test, x)
    assert found["samples"] == 120
    spectrum = ntkit.spectrum(K, k=5)
    np.testing.assert_allclose(found["spectrum"]["eigenvalues"], spectrum.eigenvalues, rtol=1e-9)
    assert found["spectrum"]["status"] == "converged"
    np.testing.assert_allclose(found["spectrum"]["trace"], float(K.trace()), rtol=1e-12)
    ridge = 1e-2 * float(K.diagonal().mean())
    np.testing.assert_allclose(found["ridge"]["ridge"], ridge, rtol=1e-12)
    assert found["ridge"]["method"] == method
    assert found["ridge"]["residual"] <= 1e-8
    targets = F.one_hot(sets.y_train).double() - 1 / len(sets.classes)
    alpha = torch.linalg.solve(K + ridge * torch.eye(120), targets)
    svm = ntkit.HardMarginSVM().fit(K, sets.y_train)
    for name, training, test in (
        ("ridge", (K @ alpha).argmax(1), (K_test @ alpha).argmax(1)),
        ("svm", svm.predict(K), svm.predict(K_test)),
    ):
        assert found[name]["training_error"] == float((training != sets.y_train).double().mean())
        error = float((test != sets.y_test).double().mean())
        assert found[name]["test_error"]["value"] == error
        assert error > 0 or len(sets.classes) == 2
        m = len(sets.y_test)
        assert found[name]["test_error"]["examples"] == m
        np.testing.assert_allclose(found[name]["test_error"]["error"], (error * (1 - error) / m) ** 0.5)
    np.testing.assert_allclose(found["svm"]["margins"], torch.as_tensor(svm.margin_).reshape(-1), rtol=1e-6)
    assert found["svm"]["status"] == "optimal"


def test_strips_of_the_test_set_change_nothing(case, monkeypatch):
    before = solve(case[0] / "store", ALL)
    monkeypatch.setattr("ntkit.commands.solve_store._STRIP", 120 * 7)
    assert solve(case[0] / "store", ALL) == before


def test_what_was_solved_stays_in_the_folder(case, tmp_path, monkeypatch):
    store = copied(case, tmp_path)
    (store / "solved.json").unlink(missing_ok=True)
    first = solve(store, SolveSettings(spectrum=3))
    assert set(first) == {"tiles", "samples", "dtype", "spectrum"}
    both = first | solve(store, SolveSettings(svm=True))
    told = json.loads((store / "solved.json").read_text())
    assert told.pop("checksum").startswith("sha256:")
    assert told == both
    assert {record.status for record in verify(store)} == {"ok"}
    text = (store / "solved.json").read_text()
    (store / "solved.json").write_text(text.replace('"optimal"', '"Optimal"'))
    assert {r.file for r in verify(store) if r.status == "damaged"} == {"solved.json"}
    monkeypatch.setattr("ntkit.commands.solve_store._svm", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what was finished before is kept, in place of the damaged file
        solve(store, SolveSettings(spectrum=3, svm=True))
    assert json.loads((store / "solved.json").read_text())["spectrum"] == first["spectrum"]
    assert {record.status for record in verify(store)} == {"ok"}


def test_labels_from_a_file(case, tmp_path):
    place, _, kernel, sets = case
    expected = solve(place / "store", SolveSettings(ridge=1e-2))["ridge"]
    names = np.array([7, -3, 5, 11, 4, 2, 9, 100, 55, 1])  # any integers
    np.save(tmp_path / "y.npy", names[sets.y_train.numpy()])
    other = ntkit.GramStore.create(tmp_path / "s", kernel, sets.x_train.double(), tile=50)
    for store in (place / "store", other.path):
        found = solve(store, SolveSettings(ridge=1e-2, labels=tmp_path / "y.npy"))["ridge"]
        assert found["test_error"] is None
        assert found["training_error"] == expected["training_error"]
    with pytest.raises(Refused, match=r"got a store made in Python; .*--labels"):
        solve(other.path, SolveSettings(svm=True))
    assert set(solve(other.path, SolveSettings(spectrum=2))) >= {"spectrum"}
    wrong = (
        (np.zeros(119, int), r"integers of shape \[120\]"),
        (np.zeros(120), "float64"),
        (np.zeros(120, int), "one cl"),
    )
    for values, message in wrong:
        np.save(tmp_path / "y.npy", values)
        with pytest.raises(Refused, match=message):
            solve(place / "store", SolveSettings(svm=True, labels=tmp_path / "y.npy"))


def test_a_store_that_is_not_whole_is_refused(case, tmp_path):
    store = copied(case, tmp_path)
    (store / "c" / "0" / "1").unlink()
    with pytest.raises(Damaged, match=r"tile \(0, 1\) not there"):
        solve(store, ALL)


def test_another_network_or_code_is_refused(case, tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    (place / "net.py").write_text(NETWORK)
    weights = place / "w.safetensors"
    shutil.copy(case[0] / "w.safetensors", weights)
    classes = ("3", "8") if len(case[3].classes) == 2 else None
    settings = GramSettings(train=60, weights=weights, dtype="float64", classes=classes)
    gram(f"{place}/net.py:make", "digits", settings, out=place / "store")
    svm = SolveSettings(svm=True)
    solve(place / "store", svm)
    tensors = {name: 3 * t for name, t in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(Refused, match="another model than when the store was made"):
        solve(place / "store", svm)
    shutil.copy(case[0] / "w.safetensors", weights)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "someone else"))
    with pytest.raises(Refused, match="code of which you have run the same file"):
        solve(place / "store", svm)
    solve(place / "store", svm, trust=True)
    solve(place / "store", SolveSettings(svm=True, model=f"{place}/net.py:make"))
    (place / "net.py").write_text(NETWORK.replace("Tanh", "ReLU"))
    with pytest.raises(Refused, match="not the file that the run noted"):
        solve(place / "store", svm)


def test_the_command(case):
    store = case[0] / "store"
    done = command("solve", store, "--spectrum", 25, "--ridge", "0.01", "--svm").done()
    assert done.returncode == 0, done.stderr
    told = json.loads((store / "solved.json").read_text())
    for text in (
        "spectrum of 120 samples, converged",
        f"{told['spectrum']['eigenvalues'][0]:.6g}",
        "hard-margin SVM",
        f"{100 * told['svm']['test_error']['value']:.2f}",
        f"numbers: {store}/solved.json",
    ):
        assert text in done.stdout.replace("\n", " ") or text in done.stdout
    refused = command("solve", store).done()
    assert refused.returncode == 2
    assert "solve: got nothing to do" in refused.stderr
    with pytest.raises(Refused, match="--ridge: got -1"):
        solve(store, SolveSettings(ridge=-1.0))
    with pytest.raises(Refused, match="--spectrum: got 500; expected an integer from 1 to 120"):
        solve(store, SolveSettings(spectrum=500))
