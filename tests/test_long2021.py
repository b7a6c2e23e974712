"""The study of the after kernel: its protocol against slow computations, stopped and resumed, losses never reached."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.data import from_tensors
from ntkit.networks.linearization import linearized as linearized_module
from ntkit.probes import shift
from ntkit.studies import long2021
from ntkit.studies.claim import Bound, Estimate
from ntkit.studies.long2021 import beyond, evidence, figures, long_setting, moments, sentences
from ntkit.studies.long2021.long_setting import START, Setting
from ntkit.studies.official_files import official_files
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results
from ntkit.trajectory.batch_order import batch_indices

TOY = Sizes(train=100, test=60, losses=(0.6, 0.3, 1e-9), epochs=30, vgg_epochs=1, seeds=2, few=1, probed=20)
SETTING = Setting("digits 3/8", "mlp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("after") / "run", []

    def stop(line):
        said.append(line)
        if len(said) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        parts = [figures.picture_parts, moments.parts]  # the others: tests/test_long2021_beyond.py
        toy = replace(long2021.STUDY, scales={"quick": TOY, "paper": TOY}, parts=parts)
        patch.setattr(long2021, "STUDY", toy)
        patch.setattr(long_setting, "settings", lambda work: settings(work))
        patch.setattr(moments, "settings", lambda work: settings(work))
        with pytest.raises(KeyboardInterrupt):
            ntkit.study("long2021", out=place, say=stop)
        early = json.loads((place / "results.json").read_text())  # written while the study runs
        assert "report.html" in {path.name for path in place.iterdir()}
        ntkit.study("long2021", out=place)
        before = (place / "results.json").read_bytes()
        assert len(early["claims"]) < len(json.loads(before)["claims"])
        shutil.rmtree(place / "runs")  # what is committed: parts without their runs
        (place / "parts" / "digits-3-8-mlp-0.01-seed-1-loss-0.3.json").unlink()
        again: list[str] = []
        ntkit.study("long2021", out=place, say=again.append)
        assert again == ["digits-3-8-mlp-0.01-seed-1-loss-0.3"]  # trained again for this part alone
        assert (place / "results.json").read_bytes() == before
        (place / "results.json").unlink()  # parts of another machine were copied here
        (place / "parts" / "digits-3-8-mlp-0.01-seed-1-loss-0.3.json").unlink()

        def interrupt(line):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ntkit.study("long2021", out=place, say=interrupt)
        assert (place / "results.json").exists()  # of what was there
        ntkit.study("long2021", out=place)
        assert (place / "results.json").read_bytes() == before
    return place


def settings(work):
    """A short list: two seeds of one setting, one of each other kind."""
    yield from ((SETTING, seed) for seed in (0, 1))
    yield from ((SETTING._replace(lr=0.1), 0), (SETTING._replace(augmented=True), 0), (Setting("digits 3/8", "sum"), 0))


def test_a_loss_that_is_never_reached_is_a_status(folder):
    told = json.loads((folder / "parts" / "digits-3-8-mlp-0.01-seed-0-loss-1e-09.json").read_text())["numbers"]
    assert told["status"] == "not reached"
    assert told["lowest"] > 1e-9
    (section,) = [s for s in json.loads((folder / "results.json").read_text())["sections"] if s["title"] == "Runs"]
    rows = section["items"][0]["rows"]
    assert all(row[3] == "1e-09" or "1e-09" in row[3] for row in rows)


def test_claims_have_numbers_and_rules(folder):
    claims = json.loads((folder / "results.json").read_text())["claims"]
    assert all(c["claim"] and any(ch.isdigit() for ch in c["number"]) and c["how"] for c in claims)
    (control,) = [c for c in claims if c["claim"].startswith("Control")]
    assert control["holds"]
    assert any(c["claim"].startswith("Augmentation") for c in claims)
    assert any(c["claim"].startswith("A larger learning rate") for c in claims)


def test_numbers_of_a_moment_equal_their_definitions(folder):
    """SVM error, alignment of the kernels and agreement, again from the network of the moment."""
    data = ntkit.data.load("digits", classes=(3, 8))
    model = long_setting.network(SETTING, data.input_shape, 0)
    told = json.loads((folder / "parts" / "digits-3-8-mlp-0.01-seed-0-start.json").read_text())["numbers"]
    tangent, conjugate = ntkit.TangentKernel(model, outputs="trace"), ntkit.ConjugateKernel(model)
    K, K_test = tangent(data.x_train), tangent(data.x_test, data.x_train)
    svm = ntkit.HardMarginSVM().fit(K, data.y_train)
    assert told["tangent"]["test_error"] == (svm.predict(K_test) != data.y_test).double().mean().item()
    alignment = ntkit.alignment(K, conjugate(data.x_train))
    assert told["tangent_conjugate_alignment"] == pytest.approx(alignment, rel=1e-6)
    with torch.no_grad():
        logits = model(data.x_test)[:, 0]
    agree = ((svm.decision_function(K_test) > 0) == (logits > 0)).double().mean().item()
    assert told["tangent"]["agreement"] == agree


def test_centered_features_are_features_minus_their_mean():
    g = torch.Generator().manual_seed(0)
    phi, phi_test = torch.randn(40, 7, generator=g).double() + 3, torch.randn(9, 7, generator=g).double() + 3
    K = phi @ phi.T
    K, K_test = moments.features_centered((K + K.T) / 2, phi_test @ phi.T)
    mean = phi.mean(0)
    assert torch.allclose(K, (phi - mean) @ (phi - mean).T, atol=1e-12)
    assert torch.allclose(K_test, (phi_test - mean) @ (phi - mean).T, atol=1e-12)
    assert torch.equal(K, K.T)


def test_centered_features_that_rounding_leaves_have_no_negative_norm():
    """Features that hardly differ: in float32 nothing but rounding, of either sign, is left of their squared norms."""
    g = torch.Generator().manual_seed(0)
    phi = 100 + 1e-3 * torch.randn(200, 3, generator=g)
    K, K_test = moments.features_centered(phi @ phi.T, phi[:5] @ phi.T)
    exact = (phi.double() - phi.double().mean(0)).square().sum(1)
    assert (K.diagonal() == 0).sum() > 10
    assert (K.diagonal() >= 0).all()
    assert (K.diagonal() - exact).abs().max() < 100**2 * 3 * 1e-6  # the rounding of K
    y = torch.arange(200) % 2
    data = from_tensors((phi, y), (phi[:5], y[:5]))
    assert moments.quality(K, K_test, data)[0]["status"] in ("not separable", "inaccurate")


def test_cosines_have_the_errors_of_the_probes():
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    kernel = ntkit.ConjugateKernel(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double())
    numbers = moments.cosines(kernel, x).numbers
    transformed, different = ntkit.probes.cosines(kernel, x)
    for name, found in [*transformed.items(), ("pairs", different)]:
        for form in ("raw", "centered", "paper"):
            one = getattr(found, form)
            assert numbers[name][form] == {"mean": one.mean, "error": one.standard_error}, (name, form)


def test_the_correlation_of_constant_outputs_is_undefined():
    x = torch.arange(4.0)
    assert moments.correlation(x, torch.zeros(4)) is None
    assert moments.correlation(x, 1 - 2 * x) == pytest.approx(-1)


def test_linearized_training_is_sgd_of_the_linearized_module():
    g = torch.Generator().manual_seed(1)
    x, x_test = (torch.randn(n, 5, generator=g).double() for n in (90, 30))
    y, y_test = (part[:, 0] > 0 for part in (x, x_test))
    data = from_tensors((x, y.long()), (x_test, y_test.long()))
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    kernel = ntkit.TangentKernel(model, outputs="trace")
    work = SimpleNamespace(sizes=Sizes(losses=(0.6, 0.5), epochs=40))
    args = (kernel(data.x_train), kernel(data.x_test, data.x_train))
    found = moments.linearized(work, Setting("", "mlp", 0.1), 0, data, model, *args)
    assert [entry["loss"] for entry in found] == [0.6, 0.5]
    twin = linearized_module(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(found[-1]["step"]):
        rows = batch_indices(0, 90, long_setting.BATCH, step)
        optimizer.zero_grad()
        long_setting.logistic(twin(data.x_train[rows]), data.y_train[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(long_setting.logistic(twin(data.x_train), data.y_train)) <= 0.5
        error = ((twin(data.x_test)[:, 0] > 0).long() != data.y_test).double().mean().item()
    assert error == found[-1]["test_error"]


@pytest.mark.parametrize("moved", [(0, 0), (1, 0), (0, 1)])
def test_augmentation_without_a_rotation_is_a_shift(monkeypatch, moved):
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.full(size, 0.5))
    monkeypatch.setattr(torch, "randint", lambda low, high, size, **more: -torch.tensor([moved]).expand(size))
    assert torch.allclose(long_setting.augmented(x), shift(*moved)(x), atol=1e-6)


def test_augmentation_changes_images_in_train_mode_alone():
    model = long_setting.Augmented(nn.Flatten())
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(model.eval()(x), x.flatten(1))
    assert not torch.allclose(model.train()(x), x.flatten(1))


def test_augmentation_rotates_by_at_most_15_degrees():
    """The image moves no farther than a turn of 15 degrees and a pixel each way can move it."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 65)] * 2, indexing="ij")
    spot = torch.exp(-((x - 0.5) ** 2 + y**2) / 0.005).expand(200, 1, 65, 65)
    out = long_setting.augmented(spot)
    mass = out.sum((1, 2, 3))
    angle = torch.atan2((out * y).sum((1, 2, 3)) / mass, (out * x).sum((1, 2, 3)) / mass)
    slack = math.atan(2 * 2**0.5 / 65 / 0.45)  # a pixel each way, seen from the center
    assert float(angle.abs().max()) <= math.pi / 12 + slack
    assert float(angle.max()) > math.pi / 24
    assert float(angle.min()) < -math.pi / 24


def test_moments_are_the_first_recorded_steps_with_the_loss(tmp_path):
    setting, seed = SETTING._replace(lr=0.1, augmented=True), 1
    sizes = Sizes(train=None, test=None, losses=(0.6, 0.3, 1e-9), epochs=10, vgg_epochs=1)
    work = Work(sizes, [seed], ["digits"], tmp_path)
    told = long_setting.training(work, setting, seed).numbers
    data = long_setting.examples(work, setting)
    model = long_setting.network(setting, data.input_shape, seed)
    run = long_setting.trained(work, setting, seed, data, model)
    losses = {}
    for step in run.steps:
        run.load(model, step)
        with torch.no_grad():
            losses[step] = float(long_setting.logistic(model(data.x_train), data.y_train))
    first = {str(loss): next((s for s in run.steps if losses[s] <= loss), None) for loss in sizes.losses}
    assert told["steps"] == first


def part(seed, error, wrong):
    numbers = {"seed": seed, "status": "measured", "tangent": {"test_error": error}}
    return Result(numbers, {"tangent.wrong": np.array(wrong, np.uint8)})


def test_differences_are_paired_by_seed_and_by_image():
    work = SimpleNamespace(sizes=Sizes(losses=(0.5,)))
    before = [part(0, 0.5, [1, 1, 0, 0]), part(1, 0.75, [1, 1, 1, 0]), part(2, 0.25, [1, 0, 0, 0])]
    after = [part(1, 0.25, [0, 0, 1, 0]), part(0, 0.25, [0, 1, 0, 0])]  # another order, one seed less
    results = Results(work, {"moment": {(SETTING, START): before, (SETTING, "0.5"): after}})
    found = evidence.error_change(results, SETTING, "0.5")
    assert found.seeds == 2
    assert found.value == pytest.approx((-0.25 - 0.5) / 2)
    assert found.over_seeds == pytest.approx(0.125)
    each = [-1, -0.5, 0, 0]  # mean over the two seeds, by image
    assert found.over_images == pytest.approx(np.std(each, ddof=1) / 2)
    assert found.estimate() == Estimate(found.value, found.over_seeds, 2)  # Student's interval of two is the wider one


def test_a_seed_that_is_not_trained_yet_does_not_count_as_a_gain():
    images = np.zeros(1000)
    # the poor seed 0 has no kernel after training yet
    seeds = [(0, START, 500), (1, START, 100), (2, START, 100), (1, "0.5", 80), (2, "0.5", 80)]
    listed = {START: [], "0.5": []}
    for seed, moment, count in seeds:
        wrong = images.copy()
        wrong[:count] = 1
        one = part(seed, count / 1000, wrong)
        one.numbers["test_error"] = 0.1
        listed[moment].append(one)
    work = SimpleNamespace(sizes=Sizes(losses=(0.5,), seeds=2))
    results = Results(work, {"moment": {(SETTING, moment): runs for moment, runs in listed.items()}})
    (claim,) = sentences.accuracy(results, SETTING, "Better")
    assert claim.number.startswith("test error 10.00 ± 0.00 % → 8.00 ± 0.00 % (loss 0.5)")
    ratio, change = claim.conditions
    assert ratio.values == [pytest.approx(0.8)]
    assert not ratio.holds()
    assert change.holds()
    work.sizes.seeds = 3
    (claim,) = sentences.accuracy(results, SETTING, "Better")
    assert not claim.conditions  # the study is not finished: a verdict would stop at the seeds that happen to be there
    assert "2 of 3 seeds so far, not judged" in claim.note
    for runs in results.by_experiment["moment"].values():
        runs.pop()
    (claim,) = sentences.accuracy(results, SETTING, "Better")
    assert not claim.conditions  # one seed left
    assert "not judged" in claim.note


def test_cosines_of_example_images_are_of_seeds_that_reached_both_moments():
    def run(seed, cosine):
        numbers = {"seed": seed, "status": "measured", "tangent": {"cosines": {"shift": {}, "pairs": {}}}}
        return Result(numbers, {"tangent.cosine.raw": np.array([[cosine]])})

    runs = {(SETTING, START): [run(0, 0.9), run(1, 0.1)], (SETTING, "0.3"): [run(1, 0.2)]}
    results = Results(SimpleNamespace(sizes=TOY), {"moment": runs})
    (case,) = figures._examples(results, SETTING.pair, SETTING, Result({"labels": ["3"]}, {}))["cases"]
    assert case["strips"][0]["images"][0]["value"] == "0.10 → 0.20"
    assert case["text"] == "A test image, 3. Mean over 1 seed."


def test_runs_at_equal_loss_are_compared_by_their_common_seeds():
    def run(seed, error):
        cosines = {name: {"raw": {"mean": 0.5}} for name in (*evidence.INVARIANT, evidence.SWAP)}
        return Result({"seed": seed, "status": "measured", "tangent": {"test_error": error, "cosines": cosines}}, {})

    other = SETTING._replace(lr=0.1)
    moments = {(SETTING, "0.3"): [run(0, 0.5), run(1, 0.2)], (other, "0.3"): [run(1, 0.1)]}
    results = Results(SimpleNamespace(sizes=TOY), {"moment": moments})
    rows = figures._comparison_section(results, [(SETTING, other)]).items[0]["rows"]
    assert [row[1:] for row in rows] == [
        ["0.01", "0.3", "0.2000", *["0.500"] * 4],
        ["0.1", "0.3", "0.1000", *["0.500"] * 4],
    ]


def test_what_is_not_reached_is_not_measured():
    runs = [part(0, 0.5, [1, 0]), Result({"seed": 1, "status": "not reached"}, {})]
    results = Results(SimpleNamespace(sizes=TOY), {"moment": {(SETTING, "0.3"): runs}})
    assert " 1 moments are measured so far" in long2021.about(results)


def test_an_undefined_error_is_no_case_against_the_conjugate_kernel():
    one = part(0, None, [1, 0])
    one.numbers["conjugate"] = {"test_error": 0.5}
    results = Results(SimpleNamespace(sizes=TOY), {"moment": {(SETTING, START): [one]}})
    assert list(sentences.conjugate(results)) == []


def test_a_claim_says_where_it_holds():
    rises = Bound("over", 0, errors=2)
    changes = {"0.3": [Estimate(0.1, 0.01)], "0.1": [Estimate(-0.1, 0.01)]}
    assert sentences._by_loss(changes, rises) == "at loss 0.3 only. By loss: 0.3: +0.100 ± 0.010; 0.1: −0.100 ± 0.010"


def test_official_files_in_one_folder_or_in_two(shared_data):
    found = official_files(("mnist", "cifar10"), shared_data)
    assert found == {"mnist": shared_data / "mnist", "cifar10": shared_data / "cifar-10"}
    assert official_files(("mnist", "cifar10"), shared_data / "mnist") == {"mnist": shared_data / "mnist"}


def test_a_folder_without_official_files_is_refused(tmp_path):
    with pytest.raises(Refused, match="train-images"):
        official_files(("mnist", "cifar10"), tmp_path)


def test_ridge_in_place_of_a_machine_that_nothing_separates():
    """Two features and a constant a hundred times as large: centered in float32, K is not positive to its rounding."""
    g = torch.Generator().manual_seed(0)
    x, x_test = (torch.cat([torch.randn(n, 2, generator=g), torch.full((n, 1), 1e2)], 1) for n in (300, 100))
    y, y_test = (torch.randint(0, 2, (n,), generator=g) for n in (300, 100))
    data = from_tensors((x, y), (x_test, y_test))
    K, K_test = moments.features_centered(x @ x.T, x_test @ x.T)
    entry, decision, svm = moments.quality((K + K.T) / 2, K_test, data)
    assert entry["status"] in ("not separable", "inaccurate")
    if entry["test_error"] is None:
        assert decision.isnan().all()
        assert "singular" in entry["machine"]
    else:
        assert "solved" in entry["machine"]
        assert entry["test_error"] == ((decision > 0).long() != y_test).double().mean().item()
    phi = x[:, :2].double() - x[:, :2].double().mean(0)
    entry, decision, _ = moments.quality(
        phi @ phi.T, (x_test[:, :2] - x[:, :2].mean(0)).double() @ phi.T, data, start=svm
    )
    ridge = 1e-4 * float((phi @ phi.T).diagonal().mean())
    w = torch.linalg.solve(phi.T @ phi + ridge * torch.eye(2).double(), phi.T @ (2.0 * y.double() - 1))
    expected = (x_test[:, :2] - x[:, :2].mean(0)).double() @ w
    assert torch.allclose(decision, expected, atol=1e-6)
    assert entry["machine"].startswith("ridge 0.0001, solved")


def test_no_correlation_with_a_constant_or_nan():
    assert moments.correlation(torch.full((4,), torch.nan), torch.arange(4.0)) is None
    assert moments.correlation(torch.ones(4), torch.arange(4.0)) is None
    assert moments.correlation(torch.arange(4.0), torch.arange(4.0)) == pytest.approx(1)


def test_a_loss_that_is_measured_for_some_of_the_runs_alone_is_left_out():
    listed = {"0.6": [0, 1], "0.3": [0, 1], "0.1": [1]}
    moments = {(SETTING, loss): [part(seed, 0.5, [1, 0]) for seed in seeds] for loss, seeds in listed.items()}
    work = SimpleNamespace(sizes=Sizes(losses=(0.6, 0.3, 0.1)))
    assert evidence.losses(Results(work, {"moment": moments}), SETTING) == ["0.6", "0.3"]
    moments[SETTING, "0.1"].insert(0, part(0, 0.5, [1, 0]))
    assert evidence.losses(Results(work, {"moment": moments}), SETTING) == ["0.6", "0.3", "0.1"]
    moments[SETTING, "0.1"][0] = Result({"seed": 0, "status": "not reached"}, {})
    assert evidence.losses(Results(work, {"moment": moments}), SETTING) == ["0.6", "0.3"]


@pytest.mark.parametrize("scale", ["quick", "paper"])
def test_the_seeds_that_a_verdict_waits_for_are_those_that_are_to_come(scale):
    study = long2021.STUDY
    work = Work(study.scales[scale], study.seeds, ["digits", "mnist", "cifar10"], Path())
    runs = Counter(setting for setting, _ in [*long_setting.settings(work), *beyond.added_runs(work)])
    assert len(runs) > 10
    assert {setting: long_setting.most_seeds(work, setting) for setting in runs} == runs
