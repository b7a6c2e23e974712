"""Long 2021, what the paper did not ask: layers sum to the kernel, networks equal the oracle, a tiny study, resumed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from ntkit import ConjugateKernel, HardMarginSVM, KernelRidge, TangentKernel
from ntkit.data import from_tensors, load
from ntkit.gram.gram_matrix import Gram
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.studies.long2021 import STUDY, beyond, beyond_claims, long_setting
from ntkit.studies.long2021.along import spaced
from ntkit.studies.long2021.beyond_claims import gained
from ntkit.studies.long2021.by_layer import by_layer, layer_part, total
from ntkit.studies.long2021.long_setting import (
    ADDED,
    PAPER,
    START,
    Extent,
    Setting,
    network,
    sample,
    training_part,
)
from ntkit.studies.long2021.many_classes import RIDGES, SOFT, chosen_ridge, of_classes
from ntkit.studies.long2021.moments import moment_part
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results
from ntkit.testing import assert_equal, check_kernel

TOY = Sizes(train=60, test=40, losses=(2.5, 0.6), epochs=6, vgg_epochs=3, seeds=1, few=1, probed=6)
FEW = Extent(train=60, test=40, epochs=2, seeds=1, added=1, kernel_train=60, kernel_test=40, ratio=4, probed=6)
MAIN = [Setting("digits 3/8", name) for name in beyond.PAPER_NETWORKS]


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize(("pair", "shape"), [("digits 3/8", (1, 8, 8)), ("digits ten classes", (3, 8, 8))])
def test_kernels_of_the_added_networks_equal_the_oracle(name, pair, shape):
    model = network(Setting(pair, name), shape, seed=0).double()
    assert 95_000 < sum(p.numel() for p in model.parameters()) < 110_000
    x1, x2 = torch.rand(3, *shape, dtype=torch.float64), torch.rand(2, *shape, dtype=torch.float64)
    kernel = TangentKernel(model, outputs="trace")
    assert kernel.fallback(x1) == {}
    check_kernel(kernel, x1, x2)
    assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2, "trace"), 1e-10, "kernel = oracle")
    features = ConjugateKernel(model)(x1, x2)
    outputs = model(x1).shape[1]
    last = by_layer(kernel.layers(x1, x2))["last"]
    assert_equal(last, outputs * (features + 1), 1e-10, "share of the last layer = conjugate kernel + 1 per output")


def test_networks_depend_on_their_seed_alone():
    for name in ADDED:
        torch.manual_seed(1)
        a, b, c = (network(Setting("digits 3/8", name), (1, 8, 8), seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(a[key], c[key]) for key in a)


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("setting", MAIN, ids=lambda setting: setting.network)
def test_layers_sum_to_the_kernel_and_so_do_their_machines(setting):
    data = sample(load("digits", classes=(3, 8)), 40, 20)
    model, x, x_test = network(setting, data.input_shape, 0).double(), data.x_train.double(), data.x_test.double()
    kernel = TangentKernel(model, outputs="trace")
    train, test = by_layer(kernel.layers(x)), by_layer(kernel.layers(x_test, x))
    assert len(train) == 5
    assert list(train) == list(test) == [name for name, m in model.named_modules() if list(m.parameters(False))]
    K, K_test = kernel(x), kernel(x_test, x)
    assert_equal(total(train), K, 1e-12, "layers sum to the kernel")
    assert_equal(total(test), K_test, 1e-12, "layers sum to the kernel of test images")
    for name in train:
        rest = total(train, [other for other in train if other != name])
        assert_equal(rest + train[name], K, 1e-12, f"{name} and the others sum to the kernel")
    machines = [HardMarginSVM().fit(k, data.y_train) for k in (K, total(train))]
    assert machines[0].status_ == machines[1].status_ == "optimal"
    decisions = [m.decision_function(k) for m, k in zip(machines, (K_test, total(test)), strict=True)]
    assert_equal(decisions[1], decisions[0], 1e-6, "machine of the sum = machine of the kernel")


# ---------------------------------------------------------------------- ten classes


def three_classes(n: int = 30):
    """Three Gaussian clusters in the plane, and the kernel 1 + x x'."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    centers = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], dtype=torch.float64)
    x = centers[y] + 0.9 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    data = from_tensors((x[: 2 * n // 3], y[: 2 * n // 3]), (x[2 * n // 3 :], y[2 * n // 3 :]))
    features = [torch.cat([part, part**2, torch.ones(len(part), 1)], 1) for part in (data.x_train, data.x_test)]
    return data, features[0] @ features[0].T, features[1] @ features[0].T


def test_machines_of_many_classes_are_machines_of_two():
    data, K, K_test = three_classes()
    entry, predicted = of_classes(K, K_test, data)
    assert entry["status"] == "optimal"
    decisions = [HardMarginSVM().fit(K, (data.y_train == c).long()).decision_function(K_test) for c in range(3)]
    assert torch.equal(predicted, torch.stack(decisions, 1).argmax(1))
    assert entry["test_error"] == pytest.approx(float((predicted != data.y_test).double().mean()))


def test_classes_that_nothing_separates_get_machines_with_squared_hinge_loss():
    data, K, K_test = three_classes()
    rows = torch.arange(len(K))
    rows[1] = 0  # the same features, another class
    K, K_test = K[rows][:, rows], K_test[:, rows]
    entry, predicted = of_classes(K, K_test, data)
    assert entry["status"] == "not separable"
    soft = K + SOFT * K.diagonal().mean() * torch.eye(len(K), dtype=K.dtype)
    assert torch.equal(predicted, HardMarginSVM().fit(soft, data.y_train).predict(K_test))
    assert entry["machine"].startswith("squared hinge, optimal")
    assert entry["margin"] == 0


def test_the_ridge_is_the_one_of_least_leave_one_out_error():
    data, K, K_test = three_classes()
    targets = torch.nn.functional.one_hot(data.y_train, 3).double() - 1 / 3
    scale, errors = float(K.diagonal().mean()), {}
    for ridge in RIDGES:
        wrong = 0
        for i in range(len(K)):
            rest = [j for j in range(len(K)) if j != i]
            machine = KernelRidge(ridge * scale).fit(K[rest][:, rest], targets[rest])
            wrong += int(machine.predict(K[i : i + 1, rest])[0].argmax() != data.y_train[i])
        errors[ridge] = wrong
    best = chosen_ridge(Gram(K), targets, data.y_train)
    assert best == max(ridge for ridge in RIDGES if errors[ridge] == min(errors.values()))
    assert len(set(errors.values())) > 1  # else any ridge would pass
    predicted = KernelRidge(best * scale).fit(K, targets).predict(K_test).argmax(1)
    assert of_classes(K, K_test, data)[0]["ridge_error"] == float((predicted != data.y_test).double().mean())


# ---------------------------------------------------------------------- samples, steps, names


def test_a_sample_holds_the_first_images_of_each_class_in_order():
    data = load("digits")
    few = sample(data, 50, 20)
    assert few.y_train.bincount().tolist() == [5] * 10
    assert few.y_test.bincount().tolist() == [2] * 10
    rows = sorted(chain.from_iterable((data.y_train == c).nonzero()[:5, 0].tolist() for c in range(10)))
    assert torch.equal(few.x_train, data.x_train[rows])
    pair = load("digits", classes=(3, 8))
    assert sample(pair, 10_000, 10_000).hash == pair.hash  # where there are fewer: all of them


def test_steps_are_spaced_and_the_last_one_is_kept():
    assert spaced([0, 1, 2, 3, 4, 9, 10], 3) == [0, 1, 3, 9, 10]
    assert spaced([0], 3) == [0]


def test_when_most_of_the_gain_is_made():
    rows = [{"test_error": e, "epochs": i} for i, e in enumerate((0.5, 0.2, 0.13, 0.16, 0.1))]
    assert gained(rows)["epochs"] == 2  # nine tenths of 0.4 are gained at 0.14
    assert gained([*rows[:1], {"test_error": 0.6}]) is None


@pytest.mark.parametrize("sets", [["digits"], ["digits", "mnist", "cifar10"], ["mnist", "cifar10"], ["cifar10"]])
def test_every_part_has_a_name_of_its_own_and_the_papers_parts_keep_theirs(sets, tmp_path):
    work = Work(STUDY.scales["quick"], STUDY.seeds, sets, tmp_path)
    parts = [part for listed in STUDY.parts for part in listed(work)]
    assert [name for name, times in Counter(part.name for part in parts).items() if times > 1] == []
    added = {part.name for part in beyond.parts(work)}
    assert not any("layers" in name or "along" in name for name in {part.name for part in parts} - added)
    runs = {part.arguments[0].file(part.arguments[1]) for part in beyond.parts(work)}
    learned = {setting.file(seed) for setting, seed in beyond.added_runs(work)}
    trained_already = {part.name.removesuffix("-training") for part in parts if part.experiment == "training"}
    assert runs <= trained_already
    assert learned
    assert Setting("MNIST 3/8", "vgg").file(0) == "mnist-3-8-vgg-0.01-seed-0"
    assert moment_part(Setting("MNIST 3/8", "vgg"), 0, "0.1").name == "mnist-3-8-vgg-0.01-seed-0-loss-0.1"
    assert (
        training_part(Setting("digits 3/8", "mlp", 0.1, True), 2).name == "digits-3-8-mlp-0.1-augmented-seed-2-training"
    )


def test_sizes_follow_the_scale(tmp_path):
    works = [Work(STUDY.scales[scale], STUDY.seeds, ["mnist"], tmp_path) for scale in ("quick", "paper")]
    assert [long_setting.extent(work) for work in works] == [long_setting.QUICK, PAPER]
    assert [len(list(beyond.added_runs(work))) for work in works] == [6 * 1, 6 * 3]  # 4 of ten classes, 2 of two


# ---------------------------------------------------------------------- a tiny study


def base_parts(work):
    """The paper's main setting alone."""
    for setting, seed in beyond.main_runs(work):
        yield moment_part(setting, seed, START)
        yield training_part(setting, seed)
        yield from (moment_part(setting, seed, str(loss)) for loss in work.sizes.losses)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, short_pages):
    """The study's folder, stopped and resumed; how many sections and claims there were when it was stopped."""
    place, said = tmp_path_factory.mktemp("long") / "run", []
    study = replace(STUDY, scales={"quick": TOY}, seeds=(0,), parts=[base_parts, beyond.parts], unfinished=False)

    def stop(line):
        said.append(line)
        if line.endswith("vgg-0.1-seed-0-training"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_setting, "QUICK", FEW)
        with pytest.raises(KeyboardInterrupt):
            study.run("quick", place, stop)
        work = Work(TOY, (0,), ["digits"], place)
        half = study.results(work, finished=True)
        counts = [sum(len(list(f(half))) for f in listed) for listed in (study.claims, study.sections)]
        text = json.dumps([s.record() for listed in study.sections for s in listed(half)])
        first = list(said)
        study.run("quick", place, said.append)
        assert said[len(first)] == first[-1]  # the stopped part is computed again, nothing else
        assert len(set(said)) == len(said) - 1
        again: list[str] = []
        study.run("quick", place, again.append)
        assert again == []
        yield place, work, counts, text


def test_a_tiny_study_has_every_section_and_claim(tiny):
    place, _, counts, text = tiny
    results = json.loads((place / "results.json").read_text())
    claims = [c for c in results["claims"] if c["claim"].startswith("Not in the paper")]
    titles = [section["title"] for section in results["sections"]]
    for title in (
        "What the paper did not ask", "Which layers carry the gain", "When along training the kernel becomes good",
        "Does the machine decide as the network?", "digits ten classes", "Other networks: digits 3/8",
    ):  # fmt: skip
        assert title in titles
    assert "All parts are there." in results["sections"][titles.index("What the paper did not ask")]["text"]
    assert "Not there yet" in text
    assert "Training and kernels: digits 3/8, residual" in text
    assert 0 < counts[0] < len(results["claims"])
    assert 0 < counts[1] < len(titles)
    assert all(any(ch.isdigit() for ch in c["number"]) for c in claims)
    kinds = ("each layer", "along training", "machine and network agree", "more accurate", "more invariant", "global")
    for kind in kinds:
        assert any(kind in c["claim"] for c in claims), kind
    page = (place / "report.html").read_text()
    assert all(title in page for title in titles)


def test_the_layers_machine_is_the_scatter_and_the_shares_sum_to_one(tiny):
    _, work, _, _ = tiny
    for setting in MAIN:
        result = work.result(layer_part(setting, 0, START))
        shares = [layer["share"] for layer in result.numbers["layers"].values()]
        assert len(shares) == len(result.numbers["kinds"]) == len(result.arrays["alone.wrong"])
        assert sum(shares) == pytest.approx(1, rel=1e-5)
        wrong = result.arrays["whole.wrong"]
        assert result.numbers["whole"]["test_error"] == pytest.approx(wrong.mean())
        agreed = (result.arrays["decision"] > 0) == (result.arrays["logit"] > 0)
        labels = np.where(wrong == 1, result.arrays["decision"] <= 0, result.arrays["decision"] > 0)
        assert result.numbers["test_error"] == pytest.approx(((result.arrays["logit"] > 0) != labels).mean())
        assert 0 < agreed.mean() <= 1


def test_steps_along_training_meet_the_moments_of_the_same_step(tiny):
    _, work, _, _ = tiny
    for setting in MAIN:
        rows = work.result(beyond.along_part(setting, 0)).numbers["steps"]
        assert rows[0]["step"] == 0
        layers = work.result(layer_part(setting, 0, START)).numbers  # the same images, the same network
        assert rows[0]["test_error"] == layers["whole"]["test_error"]
        assert rows[0]["network_error"] == layers["test_error"]


def test_the_linearized_network_is_set_beside_the_network_of_the_same_seeds(tmp_path):
    setting = Setting("digits 3/8", "mlp")

    def run(seed, error, told):
        numbers = {"seed": seed, "status": "measured", "test_error": error, **told}
        return Result(numbers, {})

    start = [run(0, 0.5, {"linearized": [{"loss": 0.6, "test_error": 0.2}]}), run(1, 0.5, {"linearized": []})]
    after = [run(0, 0.1, {}), run(1, 0.9, {})]  # the linearization of seed 1 did not reach the loss
    by_case = {(setting, START): start, (setting, "0.6"): after}
    results = Results(Work(TOY, (0, 1), ["digits"], tmp_path), {"moment": by_case})
    (claim,) = beyond_claims.linearized(results)
    assert claim.number == "test error by loss: 0.6: 20.00 % against 10.00 %"
    assert not claim.conditions
