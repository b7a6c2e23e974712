"""The numbers of `ntkit analyze`, each against an independent computation on a small case."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.commands import against_loss as against
from ntkit.commands import kernel_measures
from ntkit.commands import network_measures as measures
from ntkit.data import Data
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.networks.built_in import build


def case(classes: tuple[str, ...], outputs: int, steps: int = 12, **sgd: float):
    """Data, task and a recorded training of a small net on some digits."""
    data = ntkit.data.load("digits", classes=classes, train=24, test=15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, outputs))
    task = measures.TrainingTask(model, data)
    trajectory = ntkit.train(
        model, (data.x_train, data.y_train), task.loss, lambda p: torch.optim.SGD(p, lr=0.2, **sgd), steps, record="all"
    )
    return data, task, model, trajectory


@pytest.mark.parametrize(("classes", "outputs"), [(("3", "8"), 1), (("3", "8"), 2), (("0", "1", "2"), 3)])
def test_along_training(classes, outputs):
    data, task, model, trajectory = case(classes, outputs)
    found, arrays = measures.along(task, model, trajectory, points=100, memory=10**8)
    assert found["points"] == 24
    assert found["steps"] == list(range(13))
    at = 7
    trajectory.load(model, at)
    K = tangent_kernel(model, data.x_train, outputs="trace").numpy()
    values, vectors = np.linalg.eigh(K)
    values, vectors = values[::-1], vectors[:, ::-1]
    assert np.allclose(found["eigenvalues"][at], values[:20], rtol=1e-4, atol=1e-5 * values[0])
    assert found["trace"][at] == pytest.approx(np.trace(K), rel=1e-5)
    assert found["effective_rank"][at] == pytest.approx(np.trace(K) / values[0], rel=1e-5)
    if outputs == 1:
        targets = np.where(data.y_train.numpy() == 1, 1.0, -1.0)[:, None]
    else:
        targets = np.eye(outputs)[data.y_train.numpy()]
    wanted = targets @ targets.T
    assert found["alignment"][at] == pytest.approx(
        (K * wanted).sum() / np.linalg.norm(K) / np.linalg.norm(wanted), rel=1e-5
    )
    H = np.eye(24) - 1 / 24
    A, B = H @ K @ H, H @ wanted @ H
    assert found["alignment_centered"][at] == pytest.approx(
        (A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B), rel=1e-4
    )
    out = model(data.x_train).detach().requires_grad_(True)
    (residual,) = torch.autograd.grad(task.loss(out, data.y_train), out)  # by autograd, up to the factor n of the mean
    for name, v in (("target", targets), ("output", out.detach().numpy()), ("residual", residual.numpy())):
        energy = np.cumsum(((vectors.T @ v) ** 2).sum(1)) / (v**2).sum()
        for k, e in zip(found["energy_ks"], found[f"energy_{name}"][at], strict=True):
            assert e == pytest.approx(energy[k - 1], abs=1e-4), (name, k)
    trajectory.load(model, 0)
    K0 = tangent_kernel(model, data.x_train, outputs="trace").numpy()
    distance = 1 - (K * K0).sum() / np.linalg.norm(K) / np.linalg.norm(K0)
    assert found["distance"][at] == pytest.approx(distance, rel=1e-4)
    assert found["loss"][at] == pytest.approx(float(trajectory.losses[at]), rel=1e-5)
    assert arrays["eigenvectors"].shape == (13, 24, 20)


def test_eigenvalues_that_are_rounding_are_not_reported():
    """A linear model on 24 points in 3 dimensions: rank 4 with the bias, and nothing is said beyond."""
    x, y = torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2
    data = ntkit.data.from_tensors((x, y), (x, y))
    model = nn.Linear(3, 1)
    task = measures.TrainingTask(model, data)
    trajectory = ntkit.train(model, (x, y), task.loss, lambda p: torch.optim.SGD(p, lr=0.1), 2)
    found, _ = measures.along(task, model, trajectory, points=24, memory=10**8)
    assert [value is not None for value in found["eigenvalues"][-1]] == [True] * 4 + [False] * 16
    assert found["energy_target"][-1][found["energy_ks"].index(5)] is None


def test_a_dead_network_has_a_zero_kernel_and_no_other_numbers():
    data = ntkit.data.load("digits", classes=("3", "8"), train=24, test=15)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    nn.init.constant_(model[1].bias, -1e4)
    task = measures.TrainingTask(model, data)
    trajectory = ntkit.train(model, (data.x_train, data.y_train), task.loss, lambda p: torch.optim.SGD(p, lr=0.1), 2)
    found, _ = measures.along(task, model, trajectory, points=24, memory=10**8)
    assert found["trace"] == [0.0, 0.0, 0.0]
    assert found["alignment"] == [None] * 3
    assert found["eigenvalues"][0] == [None] * 20
    numbers, arrays = kernel_measures.quality(torch.zeros(4, 4), torch.ones(4), torch.ones(4))
    assert numbers == {"alignment": None, "alignment_centered": None, "effective_rank": None, "trace": 0, "scale": 0}
    assert (arrays["eigenvalues"] == 0).all()
    assert np.isnan(arrays["picture"]).all()  # cosines of zeros


@pytest.mark.parametrize(("classes", "outputs"), [(("3", "8"), 1), (("0", "1", "2"), 3)])
def test_the_network_and_its_errors(classes, outputs):
    data, task, model, _ = case(classes, outputs)
    found, arrays = measures.network(task, model)
    out = model(data.x_test).detach()
    if outputs == 1:
        losses = F.softplus(-(2.0 * data.y_test - 1) * out[:, 0])
        wrong = (out[:, 0] > 0) != (data.y_test == 1)
    else:
        losses = -out.log_softmax(1)[range(15), data.y_test]
        wrong = out.argmax(1) != data.y_test
    p = float(wrong.double().mean())
    assert found["test_error"]["value"] == pytest.approx(p)
    assert found["test_error"]["error"] == pytest.approx((p * (1 - p) / 15) ** 0.5)
    assert found["test_loss"]["value"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["test_loss"]["error"] == pytest.approx(float(losses.double().std()) / 15**0.5, rel=1e-4)
    assert (arrays["wrong"] == wrong.numpy()).all()
    table = np.array(found["confusion"])
    assert table.sum(1).tolist() == [int((data.y_test == c).sum()) for c in range(len(classes))]
    assert table.trace() == int((~wrong).sum())
    shares = np.bincount(data.y_train.numpy()) / 24
    constant = -(shares * np.log(shares)).sum()  # logits of the frequencies give this loss
    assert found["fit"]["value"] == pytest.approx(1 - found["train_loss"]["value"] / constant, rel=1e-6)


def kernels_with_three_classes() -> tuple[torch.Tensor, torch.Tensor, Data]:
    data = ntkit.data.load("digits", classes=("0", "1", "2"), train=40, test=20)
    kernel = ntkit.TangentKernel(build("mlp", data.input_shape, 3, seed=0), outputs="trace")
    return kernel(data.x_train), kernel(data.x_test, data.x_train), data


def test_machines():
    K, K_test, data = kernels_with_three_classes()
    found, arrays = kernel_measures.machine(K, K_test, data)
    wide, test = K.double().numpy(), K_test.double().numpy()
    targets = np.eye(3)[data.y_train.numpy()]
    mean = targets.mean(0)
    solved = np.linalg.solve(wide + 1e-4 * np.trace(wide) / 40 * np.eye(40), targets - mean)
    predicted = (test @ solved + mean).argmax(1)
    assert found["ridge_test_error"]["value"] == pytest.approx((predicted != data.y_test.numpy()).mean())
    assert found["status"] == "optimal"
    assert found["test_error"]["value"] == pytest.approx((arrays["decision"].argmax(1) != data.y_test.numpy()).mean())
    scaled, _ = kernel_measures.machine(4 * K, 4 * K_test, data)
    assert np.allclose(scaled["margin"], found["margin"], rtol=1e-6)  # a kernel's scale does not matter
    assert scaled["support"] == found["support"]


def test_a_machine_that_does_not_exist_has_no_error():
    K = torch.ones(4, 4)  # all alike, labels not
    data = ntkit.data.from_tensors(
        (torch.arange(4.0)[:, None], torch.tensor([0, 1, 0, 1])), (torch.arange(2.0)[:, None], torch.tensor([0, 1]))
    )
    found, arrays = kernel_measures.machine(K, torch.ones(2, 4), data)
    assert found["status"] == "not separable"
    assert "wrong" not in arrays
    assert arrays["ridge_wrong"].shape == (2,)
    assert found["ridge_status"] == "solved"
    assert found["test_error"]["value"] is None
    assert "KernelRidge" in found["advice"]


def test_errors_are_compared_on_the_same_examples():
    rng = np.random.default_rng(3)
    truth = rng.random((4, 200)) < np.array([0.1, 0.2, 0.1, 0.3])[:, None]
    wrong = {
        "network": {"wrong": truth[0]}, "init": {"wrong": truth[1], "ridge_wrong": truth[2]},
        "after": {"wrong": truth[3], "ridge_wrong": truth[0]}, "conjugate": {"ridge_wrong": truth[1]},
    }  # fmt: skip
    found = {c["with"]: c for c in kernel_measures.comparisons(wrong)["compared"]}
    assert {name: c["machine"] for name, c in found.items()} == {"init": "svm", "conjugate": "ridge", "network": "svm"}
    for name, (a, b) in {"init": (3, 1), "conjugate": (0, 1), "network": (3, 0)}.items():
        pair, difference = found[name], truth[a].astype(float) - truth[b]
        assert pair["value"] == pytest.approx(difference.mean())
        assert pair["error"] == pytest.approx(difference.std() / 200**0.5)
        assert [pair["only_after"], pair["only_other"]] == [(difference > 0).sum(), (difference < 0).sum()]
        table = [[0, pair["only_after"]], [pair["only_other"], 0]]
        assert pair["p"] == pytest.approx(scipy.stats.binomtest(table[0][1], table[0][1] + table[1][0]).pvalue)
        coins = rng.integers(0, 2, (20_000, int(np.abs(difference).sum()))).sum(1)
        middle = np.abs(difference).sum() / 2
        assert pair["p"] == pytest.approx((np.abs(coins - middle) >= abs(pair["only_after"] - middle)).mean(), abs=0.02)
    assert "after" not in kernel_measures.comparisons({"init": wrong["init"]})["compared"]


def test_changes_of_cosines_are_paired_over_images():
    data = ntkit.data.load("digits", classes=("3", "8"), train=24, test=12)
    models = [build("cnn", data.input_shape, 1, seed=s) for s in (0, 1)]
    kernels = {key: ntkit.TangentKernel(m, outputs="trace") for key, m in zip(("init", "after"), models, strict=True)}
    told, _ = measures.invariances(kernels, data, 12)
    both = [ntkit.probes.cosines(k, data.x_test) for k in kernels.values()]
    for row in told["rows"]:
        for entry, form in ((row, "raw"), (row["centered"], "centered")):
            before, after = (getattr(found[row["name"]], form).per_sample for found, _ in both)
            assert entry["change"]["value"] == pytest.approx(float((after - before).mean()), rel=1e-5, abs=1e-7)
            assert entry["change"]["error"] == pytest.approx(float((after - before).std()) / 12**0.5, rel=1e-4)
    first, second = (different.raw.per_sample for _, different in both)
    assert told["different"]["change"]["value"] == pytest.approx(float((second - first).mean()), rel=1e-5, abs=1e-7)
    # jackknife over images of: mean change of a transform minus mean change over pairs of different images
    one, pair = told["rows"][0], []
    before, after = (found[one["name"]].raw.per_sample for found, _ in both)
    K = [k(data.x_test).double() for k in kernels.values()]
    cosine = [k / k.diagonal().sqrt().outer(k.diagonal().sqrt()) for k in K]
    for out in range(12):
        keep = [i for i in range(12) if i != out]
        change = (cosine[1] - cosine[0])[keep][:, keep]
        different = (change.sum() - change.trace()) / (11 * 10)
        pair.append(float((after - before)[keep].mean() - different))
    error = (11 / 12 * ((np.array(pair) - np.mean(pair)) ** 2).sum()) ** 0.5
    assert one["beyond"]["error"] == pytest.approx(error, rel=1e-4)


def test_the_picture_of_a_kernel_is_sorted_by_class():
    K, _, data = kernels_with_three_classes()
    found, arrays = kernel_measures.quality(K, F.one_hot(data.y_train, 3).double(), data.y_train)
    order = arrays["pictured"]
    assert (np.diff(data.y_train.numpy()[order]) >= 0).all()
    assert found["pictured"] == np.bincount(data.y_train.numpy()[order]).tolist()
    root = np.sqrt(np.diag(K.double().numpy()))
    assert np.allclose(arrays["picture"], (K.double().numpy() / np.outer(root, root))[np.ix_(order, order)], atol=1e-6)
    assert np.allclose(arrays["eigenvalues"], np.linalg.eigvalsh(K.double().numpy())[::-1], atol=1e-4)


def test_neighbors_are_the_largest_cosines():
    K, K_test, data = kernels_with_three_classes()
    shown, predicted = torch.tensor([2, 5]), torch.zeros(20, dtype=torch.int64)
    own = torch.tensor([4.0, 9.0])
    found, arrays = measures.neighbors(data, shown, predicted, {"init": (K_test[shown], own, K.diagonal())})
    cosine = K_test[shown].numpy() / np.sqrt(own.numpy()[:, None] * K.diagonal().numpy())
    for row, values in zip(found["rows"], cosine, strict=True):
        best = np.argsort(-values)[:5]
        assert [n["index"] for n in row["init"]] == best.tolist()
        assert np.allclose([n["similarity"] for n in row["init"]], values[best])
    index = [n["index"] for n in found["rows"][1]["init"]]
    pixels = (data.x_train[index] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (arrays["init"][1] == pixels).all()


def test_shown_tests_are_errors_first():
    data, task, model, _ = case(("3", "8"), 1, steps=1)
    shown, predicted = measures.select_examples(task, model)
    wrong = (predicted != data.y_test).nonzero().flatten().tolist()
    assert shown.tolist()[: min(4, len(wrong))] == wrong[:4]
    assert len(set(shown.tolist())) == len(shown) == 8


def test_invariances_agree_with_the_kernel():
    data, _, model, _ = case(("3", "8"), 1)
    kernel = ntkit.TangentKernel(model, outputs="trace")
    found, arrays = measures.invariances({"after": kernel}, data, samples=15)
    row = next(r for r in found["rows"] if r["name"] == "quadrant swap")
    swapped = ntkit.probes.swap_quadrants()(data.x_test)
    K = kernel(torch.cat([data.x_test, swapped])).double()
    own = K.diagonal().sqrt()
    cosine = torch.stack([K[i, 15 + i] / (own[i] * own[15 + i]) for i in range(15)])
    assert row["after"]["value"] == pytest.approx(float(cosine.mean()), rel=1e-5)
    assert row["after"]["error"] == pytest.approx(float(cosine.std()) / 15**0.5, rel=1e-4)
    assert row["init"]["value"] is None
    norms = own[:15]
    pairs = (K[:15, :15] / norms.outer(norms)).fill_diagonal_(0).sum() / (15 * 14)
    assert found["different"]["after"]["value"] == pytest.approx(float(pairs), rel=1e-5)
    H = torch.eye(15, dtype=torch.float64) - 1 / 15
    C = H @ K[:15, :15] @ H
    pairs = (C / C.diagonal().outer(C.diagonal()).sqrt()).fill_diagonal_(0).sum() / (15 * 14)
    assert found["different"]["centered"]["after"]["value"] == pytest.approx(float(pairs), rel=1e-4)
    shown = found["examples"][1]
    place = (torch.linspace(0, len(data.x_test) - 1, 15).long() == shown["test_index"]).nonzero().item()
    assert shown["cosines"][3]["name"] == "quadrant swap"
    assert shown["cosines"][3]["raw"]["after"] == pytest.approx(float(cosine[place]), rel=1e-5)
    assert shown["label"] == data.classes[data.y_test[shown["test_index"]]]
    bytes_ = (swapped[shown["test_index"]] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (arrays["images"][1, 4] == bytes_).all()


@pytest.mark.parametrize("classes", [("3", "8"), ("0", "1", "2")])
def test_against_loss_agrees_with_kernel_and_machine(classes, monkeypatch):
    data, task, model, trajectory = case(classes, len(classes) - (len(classes) == 2), momentum=0.9)
    tracked, _ = measures.along(task, model, trajectory, points=20, memory=10**8)
    monkeypatch.setattr(against, "affordable", lambda *sizes: 4)
    found = against.against_loss(task, model, trajectory, tracked, 9, 10**8)
    steps = [s["step"] for s in found["snapshots"]]
    assert (found["points"], found["tests"], found["samples"]) == (20, 15, 9)
    assert steps[0] == 0
    assert steps[-1] == 12
    assert 2 < len(steps) <= 4
    for snapshot in found["snapshots"]:
        trajectory.load(model, snapshot["step"])
        rows = torch.linspace(0, 23, 20).long()
        kernel = ntkit.TangentKernel(model, outputs="trace")
        svm = ntkit.HardMarginSVM().fit(kernel(data.x_train[rows]), data.y_train[rows])
        wrong = svm.predict(kernel(data.x_test, data.x_train[rows])) != data.y_test
        assert snapshot["status"] == svm.status_ == "optimal"
        assert snapshot["kernel_error"]["value"] == pytest.approx(float(wrong.double().mean()))
        out = task.predict(measures.outputs_of(model, data.x_test))
        assert snapshot["network_error"]["value"] == pytest.approx(float((out != data.y_test).double().mean()))
        out = measures.outputs_of(model, data.x_train[rows])
        assert snapshot["loss"] == pytest.approx(float(task.loss(out, data.y_train[rows]).detach()), rel=1e-5)
        transformed, different = ntkit.probes.cosines(kernel, data.x_test[torch.linspace(0, 14, 9).long()])
        for row in snapshot["cosines"]:
            assert row["raw"]["value"] == pytest.approx(transformed[row["name"]].raw.mean, rel=1e-5)
            assert row["centered"]["value"] == pytest.approx(transformed[row["name"]].centered.mean, rel=1e-4)
        assert snapshot["different"]["raw"]["value"] == pytest.approx(different.raw.mean, rel=1e-5)


def test_snapshots_are_spaced_in_the_logarithm_of_the_loss():
    losses = [float(v) for v in np.geomspace(2, 0.01, 104)]
    assert against.spaced(range(104), losses, 6) == [0, 21, 42, 62, 83, 103]
    assert against.spaced(range(104), losses[::-1], 6) == [0, 103]  # it diverges
    assert against.spaced([0, 1, 2], [1.0, None, 0.0], 6) == [0, 2]
    assert against.spaced([0], [1.0], 6) == [0]


def test_what_takes_too_long_is_left_out():
    """Counted from the sizes alone: more snapshots where the rest of the run is larger, never more than six."""
    data = ntkit.data.load("digits")
    part = replace(data, x_train=data.x_train[:250], y_train=data.y_train[:250])
    transforms = ntkit.probes.standard((1, 8, 8))
    counts = [
        against.affordable(data, part, {"points": 500, "steps": list(range(steps))}, 200, transforms)
        for steps in (0, 5, 10, 15, 20, 1000)
    ]
    assert counts == sorted(counts)
    assert counts[0] < against.FEWEST
    assert counts[-1] == against.SNAPSHOTS
    tiny = ntkit.data.load("digits", classes=("3", "8"), train=24, test=15)
    assert against.affordable(tiny, tiny, {"points": 24, "steps": [0, 1, 2]}, 8, transforms) == 0
    few = ntkit.data.load("digits", train=24, test=15)
    task = measures.TrainingTask(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), few)
    along = {"points": 24, "steps": [0, 1, 2], "loss": [2.0, 1.0, 0.5]}
    assert against.against_loss(task, nn.Module(), None, along, 8, 10**8) is None  # nothing is computed


def test_a_little_training_is_affordable_on_vectors_alone():
    images = ntkit.data.load("digits", classes=("3", "8"), train=24, test=15)
    vectors = replace(images, kind="vectors")
    assert against.affordable_trainings(vectors, 1000, cost=5.0) == against.LITTLE / 1000
    assert against.affordable_trainings(vectors, 1000, cost=1e9) == 1e9
    assert against.affordable_trainings(images, 1000, cost=5.0) == 5.0  # a convolution takes more than its parameters
