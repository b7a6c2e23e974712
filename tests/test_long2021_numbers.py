"""Long 2021: every number of a part against its definition, from gradients that plain autograd gives one by one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit import HardMarginSVM
from ntkit.data import from_tensors
from ntkit.gram.gram_matrix import Gram
from ntkit.probes import standard
from ntkit.studies.claim import Estimate
from ntkit.studies.long2021 import (
    along,
    beyond_claims,
    beyond_figures,
    by_layer,
    evidence,
    figures,
    long_setting,
    moments,
    sentences,
)
from ntkit.studies.long2021.long_setting import START, Extent, Setting
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results
from ntkit.trajectory.batch_order import batch_indices

N, M = 24, 20


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the only output by each parameter, side by side in float64: [n, numbers]."""
    model, rows = copy.deepcopy(model).double(), []
    params = dict(model.named_parameters())
    for one in x.double():
        found = torch.autograd.grad(model(one[None])[0, 0], [*params.values()])
        rows.append({name: g.flatten() for name, g in zip(params, found, strict=True)})
    return {name: torch.stack([row[name] for row in rows]) for name in params}


def joined(parts: dict[str, Tensor], layer: str | None = None, but: str | None = None) -> Tensor:
    names = [n for n in parts if (layer is None or n.startswith(layer + ".")) and not (but and n.startswith(but + "."))]
    return torch.cat([parts[name] for name in names], 1)


class Machine:
    """The hard-margin machine on features, with what is said of it."""

    def __init__(self, phi: Tensor, phi_test: Tensor, data) -> None:
        K, self.decision = phi @ phi.T, None
        K = (K + K.T) / 2
        fitted = HardMarginSVM().fit(K, data.y_train)
        assert fitted.gap_ < 1
        self.decision = torch.as_tensor(fitted.decision_function(phi_test @ phi.T))
        assert float(self.decision.abs().min()) > 1e-4  # no label that rounding decides
        self.wrong = ((self.decision > 0).long() != data.y_test).numpy()
        self.scale = float(phi.square().sum(1).mean()) ** 0.5
        self.margin = fitted.margin_ / self.scale
        s = (2.0 * data.y_train.double() - 1)[:, None]
        self.alignment = float((K * (s @ s.T)).sum() / (K.norm() * len(s)))
        center = torch.eye(len(K), dtype=torch.float64) - 1 / len(K)
        K_centered, s = center @ K @ center, center @ s
        self.alignment_centered = float((K_centered * (s @ s.T)).sum() / (K_centered.norm() * (s @ s.T).norm()))
        self.effective_rank = float(K.trace() / torch.linalg.eigvalsh(K)[-1])
        self.K = K

    def check(self, entry, tolerance: float = 1e-5) -> None:
        assert entry["status"] == "optimal"
        assert entry["test_error"] == pytest.approx(self.wrong.mean(), abs=1e-12)
        for name in ("scale", "margin", "alignment", "alignment_centered", "effective_rank"):
            if name in entry:
                assert entry[name] == pytest.approx(getattr(self, name), rel=tolerance), name


def mean_loss(logits: Tensor, y: Tensor) -> float:
    return float(torch.log1p(torch.exp(-(2 * y - 1) * logits)).mean())


@pytest.fixture(scope="module")
def moment():
    """Random images, a small network, and what is measured of it."""
    g = torch.Generator().manual_seed(4)
    x, x_test = (torch.rand(n, 1, 8, 8, generator=g, dtype=torch.float64) for n in (N, M))
    labels = [
        (part[:, 0, 2:5].mean((1, 2)) + 0.1 * torch.rand(len(part), generator=g) > 0.55).long() for part in (x, x_test)
    ]
    data = from_tensors((x, labels[0]), (x_test, labels[1]))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 1)).double().eval()
    return model, data, moments.measured(SimpleNamespace(sizes=Sizes(probed=7)), model, data)


def features(model: nn.Module, data) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, of in (
        ("tangent", lambda x: joined(gradients(model, x))),
        ("conjugate", lambda x: model[:3](x).detach()),
    ):
        phi, phi_test = of(data.x_train), of(data.x_test)
        found[name] = (phi, phi_test)
        found[f"{name} centered"] = (phi - phi.mean(0), phi_test - phi.mean(0))
    return found


def test_the_networks_losses_and_errors(moment):
    model, data, (numbers, arrays, _) = moment
    with torch.no_grad():
        logits, logits_test = model(data.x_train)[:, 0], model(data.x_test)[:, 0]
    assert numbers["loss"] == pytest.approx(mean_loss(logits, data.y_train), rel=1e-12)
    assert numbers["test_loss"] == pytest.approx(mean_loss(logits_test, data.y_test), rel=1e-12)
    wrong, wrong_test = ((out > 0).long() != y for out, y in ((logits, data.y_train), (logits_test, data.y_test)))
    assert numbers["error"] == pytest.approx(float(wrong.double().mean()))
    assert numbers["test_error"] == pytest.approx(float(wrong_test.double().mean()))
    assert arrays["network.wrong"].tolist() == wrong_test.int().tolist()
    assert len({numbers["error"], numbers["test_error"], 1 - numbers["error"], 0.5, 0.0}) == 5


def test_machines_and_kernels_of_a_moment(moment):
    model, data, (numbers, arrays, (K, K_test)) = moment
    with torch.no_grad():
        logits = model(data.x_test)[:, 0]
    machines = {name: Machine(*phi, data) for name, phi in features(model, data).items()}
    for name, machine in machines.items():
        machine.check(numbers[name], 1e-4)
        assert arrays[f"{name}.wrong"].tolist() == machine.wrong.astype(int).tolist()
    for name in ("tangent", "conjugate"):
        decision = machines[name].decision
        agreement = float(((decision > 0) == (logits > 0)).double().mean())
        assert numbers[name]["agreement"] == pytest.approx(agreement)
        both = torch.stack([decision, logits])
        assert numbers[name]["correlation"] == pytest.approx(float(both.corrcoef()[0, 1]), rel=1e-4)
    one, other = machines["tangent"].K, machines["conjugate"].K
    aligned = float((one * other).sum() / (one.norm() * other.norm()))
    assert numbers["tangent_conjugate_alignment"] == pytest.approx(aligned, rel=1e-9)
    phi, phi_test = features(model, data)["tangent"]
    torch.testing.assert_close(K, phi @ phi.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(K_test, phi_test @ phi.T, rtol=1e-9, atol=1e-9)
    assert len({tuple(machine.wrong) for machine in machines.values()}) > 2  # machines that can be told apart


def test_cosines_of_a_moment(moment):
    model, data, (numbers, arrays, _) = moment
    x = data.x_test[:7]
    of = {"tangent": lambda x: joined(gradients(model, x)), "conjugate": lambda x: model[:3](x).detach()}
    for kernel, phi in of.items():
        own = phi(x)
        for form, mean in (("raw", 0 * own.mean(0)), ("centered", own.mean(0))):
            for row, (name, group) in enumerate(standard((1, 8, 8)).items()):
                each = [F.cosine_similarity(own - mean, phi(moved(x)) - mean) for moved in group]
                cosine = sum(each) / len(each)
                told = numbers[kernel]["cosines"][name][form]
                assert told["mean"] == pytest.approx(float(cosine.mean()), rel=1e-8)
                assert told["error"] == pytest.approx(float(cosine.std() / 7**0.5), rel=1e-8)
                stored = torch.from_numpy(arrays[f"{kernel}.cosine.{form}"][row]).double()
                torch.testing.assert_close(stored, cosine, rtol=1e-6, atol=1e-6)
            unit = F.normalize(own - mean)
            pairs = (unit @ unit.T)[~torch.eye(7, dtype=torch.bool)].mean()
            assert numbers[kernel]["cosines"]["pairs"][form]["mean"] == pytest.approx(float(pairs), rel=1e-8)


def test_the_ridge_is_a_share_of_the_mean_diagonal():
    """One feature is a hundredth of the others: its squares are as small as the ridge."""
    g = torch.Generator().manual_seed(0)
    phi = torch.randn(20, 3, generator=g, dtype=torch.float64) * torch.tensor([3.0, 3.0, 0.02])
    K, targets = phi @ phi.T, torch.randint(0, 2, (20,), generator=g) * 2.0 - 1
    K, targets = (K + K.T) / 2, targets.double()
    scale = float(K.diagonal().mean()) ** 0.5
    machine, weights = moments._ridge(Gram(K), targets, scale)
    assert machine.startswith("ridge 0.0001, solved")
    expected = torch.linalg.solve(K + 1e-4 * K.diagonal().mean() * torch.eye(20), targets)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0.0)


def test_the_linearization_reaches_each_loss_at_the_step_of_its_own_training():
    """Batches of 32, 32 and 6, in the order of the seed."""
    g = torch.Generator().manual_seed(1)
    x, x_test = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (70, 30))
    labels = [(part[:, 0] + 0.5 * torch.randn(len(part), generator=g) > 0).long() for part in (x, x_test)]
    data = from_tensors((x, labels[0]), (x_test, labels[1]))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    jacobian, jacobian_test = (joined(gradients(model, part)) for part in (x, x_test))
    with torch.no_grad():
        start, start_test = model(x)[:, 0], model(x_test)[:, 0]
    moved, losses, errors = torch.zeros(jacobian.shape[1], dtype=torch.float64), [], []
    for step in range(60):
        logits, logits_test = start + jacobian @ moved, start_test + jacobian_test @ moved
        losses.append(mean_loss(logits, labels[0]))
        errors.append(float(((logits_test > 0).long() != labels[1]).double().mean()))
        rows = batch_indices(3, 70, 32, step)
        assert len(rows) == (6 if step % 3 == 2 else 32)
        slope = torch.sigmoid(logits[rows]) - labels[0][rows]
        moved -= 0.05 * jacobian[rows].T @ slope / len(rows)
    wanted = tuple((losses[k - 1] + losses[k]) / 2 for k in range(1, 60) if losses[k] < min(losses[:k]))
    work = SimpleNamespace(sizes=Sizes(losses=wanted, epochs=20))
    kernels = jacobian @ jacobian.T, jacobian_test @ jacobian.T
    found = moments.linearized(work, Setting("", "mlp", 0.05), 3, data, model, *kernels)
    first = [next(step for step, loss in enumerate(losses) if loss <= one) for one in wanted]
    assert [entry["step"] for entry in found] == first
    assert [entry["test_error"] for entry in found] == [errors[step] for step in first]
    assert len(first) > 20


# ---------------------------------------------------------------------- parts of a run


SETTING = Setting("digits 3/8", "mlp", lr=0.1)
SIZES = Sizes(train=60, test=40, losses=(1e-9,), epochs=2, vgg_epochs=1, seeds=1, few=1, probed=6)
FEW = Extent(train=60, test=40, epochs=2, seeds=1, added=1, kernel_train=N, kernel_test=M, ratio=6, probed=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run, its work, the sample of its images, and the network at each recorded step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_setting, "QUICK", FEW)
        work = Work(SIZES, (1,), ["digits"], tmp_path_factory.mktemp("long"))
        whole = long_setting.examples(work, SETTING)
        model = long_setting.network(SETTING, whole.input_shape, 1)
        trajectory = long_setting.trained(work, SETTING, 1, whole, model)

        def at(step: int) -> nn.Module:
            trajectory.load(model, step)
            return model

        yield work, whole, long_setting.sample(whole, N, M), trajectory.steps, at


def outputs(model: nn.Module, data) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(data.x_train)[:, 0], model(data.x_test)[:, 0]


def test_numbers_along_a_run(run):
    work, whole, data, steps, at = run
    rows = along.along(work, SETTING, 1).numbers["steps"]
    assert [row["step"] for row in rows] == along.spaced(steps, 6)
    assert len(rows) > 2
    for row in (rows[0], rows[1], rows[-1]):
        model = at(row["step"])
        logits, logits_test = outputs(model, data)
        machine = Machine(joined(gradients(model, data.x_train)), joined(gradients(model, data.x_test)), data)
        machine.check(row, 1e-3)
        assert row["epochs"] == row["step"] / math.ceil(len(whole.x_train) / 32)
        assert row["loss"] == pytest.approx(mean_loss(logits, data.y_train), rel=1e-5)
        assert row["network_error"] == pytest.approx(float(((logits_test > 0).long() != data.y_test).double().mean()))
        agreement = float(((machine.decision > 0) == (logits_test > 0)).double().mean())
        assert row["agreement"] == pytest.approx(agreement)
        both = torch.stack([machine.decision, logits_test.double()])
        assert row["correlation"] == pytest.approx(float(both.corrcoef()[0, 1]), rel=1e-3)
    assert len({row["network_error"] for row in rows}) > 1


def test_without_a_machine_nothing_agrees_with_the_network(run, monkeypatch):
    """Decisions that are NaN are in no class."""
    nothing = torch.full((M,), torch.nan, dtype=torch.float64)
    entry = dict.fromkeys(along.KEPT)
    monkeypatch.setattr(along, "quality", lambda K, K_test, data, start: (entry, nothing, None))
    for row in along.along(run[0], SETTING, 1).numbers["steps"]:
        assert row["agreement"] is row["correlation"] is row["test_error"] is None


def test_a_share_that_is_zero_separates_nothing(moment):
    _, data, _ = moment
    entry, decision = by_layer.separated(torch.zeros(N, N), torch.zeros(M, N), data)
    assert entry == {"status": "zero", "test_error": None, "alignment": None, "margin": 0.0}
    assert torch.equal(decision, torch.zeros(M))
    phi = joined(gradients(moment[0], data.x_train))
    assert by_layer.separated(phi @ phi.T, torch.zeros(M, N), data)[0]["status"] == "optimal"


@pytest.mark.parametrize("moment", [START, by_layer.END])
def test_numbers_of_layers(run, moment):
    work, _, data, steps, at = run
    found, arrays = by_layer.layers(work, SETTING, 1, moment)
    model = at(0 if moment == START else steps[-1])
    logits, logits_test = outputs(model, data)
    assert found["step"] == (0 if moment == START else steps[-1])
    assert found["loss"] == pytest.approx(mean_loss(logits, data.y_train), rel=1e-5)
    assert found["test_error"] == pytest.approx(float(((logits_test > 0).long() != data.y_test).double().mean()))
    torch.testing.assert_close(torch.from_numpy(arrays["logit"]).float(), logits_test)
    train, test = gradients(model, data.x_train), gradients(model, data.x_test)
    whole = Machine(joined(train), joined(test), data)
    whole.check(found["whole"], 1e-3)
    assert arrays["whole.wrong"].tolist() == whole.wrong.astype(int).tolist()
    np.testing.assert_allclose(arrays["decision"], whole.decision, rtol=1e-2, atol=1e-3)
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in train))
    assert list(found["layers"]) == [str(place) for place in range(len(layers))]
    for place, layer in enumerate(layers):
        own, told = joined(train, layer), found["layers"][str(place)]
        share = float(own.square().sum() / joined(train).square().sum())
        assert told["share"] == pytest.approx(share, rel=1e-4)
        alone = Machine(own, joined(test, layer), data)
        others = Machine(joined(train, but=layer), joined(test, but=layer), data)
        alone.check(told["alone"], 1e-3)
        others.check(told["without"], 1e-3)
        assert arrays["alone.wrong"][place].tolist() == alone.wrong.astype(int).tolist()
        assert arrays["without.wrong"][place].tolist() == others.wrong.astype(int).tolist()


# ---------------------------------------------------------------------- differences and means over seeds


def measured(seed: int, **cosines: tuple[list[float], list[float]]) -> Result:
    """A part with raw and centered cosines of each image, by name of the transform."""
    numbers = {
        name: {"raw": {"mean": float(np.mean(raw))}, "centered": {"mean": float(np.mean(centered))}}
        for name, (raw, centered) in cosines.items()
    }
    arrays = {
        f"tangent.cosine.{form}": np.array([both[k] for both in cosines.values()])
        for k, form in enumerate(("raw", "centered"))
    }
    tangent = {"cosines": numbers | {"pairs": {}}}
    return Result({"seed": seed, "status": "measured", "tangent": tangent, "value": float(seed**2)}, arrays)


def test_the_change_of_a_cosine_is_that_of_its_transform_and_form():
    setting = Setting("digits 3/8", "mlp")
    g = np.random.default_rng(0)
    draws = g.random((2, 3, 2, 2, 5))  # before and after, seeds, transforms, forms, images
    names = ("shift", "zoom")
    runs = {
        (setting, moment): [
            measured(seed, **dict(zip(names, draws[k, seed].tolist(), strict=True))) for seed in range(3)
        ]
        for k, moment in enumerate((START, "0.3"))
    }
    results = Results(SimpleNamespace(sizes=Sizes(losses=(0.3,))), {"moment": runs})
    assert evidence.probes(results, setting) == list(names)
    for row, name in enumerate(names):
        for k, form in enumerate(("raw", "centered")):
            found = evidence.cosine_change(results, (setting, "0.3"), (setting, START), name, form)
            change = (draws[1] - draws[0])[:, row, k]  # [seeds, images]
            assert found.value == pytest.approx(change.mean())
            assert found.over_seeds == pytest.approx(change.mean(1).std(ddof=1) / 3**0.5)
            assert found.over_images == pytest.approx(change.mean(0).std(ddof=1) / 5**0.5)
            assert found.seeds == 3
            assert found.images == 5
            wider = max((4.527 * found.over_seeds, 0), (2.869 * found.over_images, 1))[1]  # Student's t of 3 and of 5
            assert found.estimate() == Estimate(found.value, *((found.over_seeds, 3), (found.over_images, 5))[wider])


def test_a_mean_over_some_seeds_is_of_these_alone():
    setting = Setting("digits 3/8", "mlp")
    runs = [measured(seed, shift=([0.0], [0.0])) for seed in range(4)]
    results = Results(SimpleNamespace(sizes=Sizes(losses=(0.3,))), {"moment": {(setting, START): runs}})
    every = evidence.estimate(results, setting, START, "value")
    assert (every.value, every.error) == (3.5, pytest.approx(np.std([0, 1, 4, 9], ddof=1) / 2))
    some = evidence.estimate(results, setting, START, "value", seeds={1, 3})
    assert (some.value, some.error) == (5.0, pytest.approx(4.0))


def test_both_kernels_machines_are_compared_where_there_are_both():
    """The second seed has no machine with the tangent kernel: its other error would be set beside that of the first."""
    setting, runs = Setting("digits 3/8", "mlp"), []
    for seed, (conjugate, tangent) in enumerate([([1, 1, 1, 0, 0], [1, 0, 0, 0, 0]), ([0, 0, 0, 0, 0], None)]):
        errors = {"conjugate": np.mean(conjugate), "tangent": None if tangent is None else np.mean(tangent)}
        numbers = {name: {"test_error": error} for name, error in errors.items()}
        numbers |= {"seed": seed, "status": "measured", "tangent_conjugate_alignment": 0.5 + seed / 4}
        wrong = {"conjugate.wrong": conjugate, "tangent.wrong": tangent or [1, 1, 1, 1, 1]}
        runs.append(Result(numbers, {name: np.array(values, np.uint8) for name, values in wrong.items()}))
    results = Results(SimpleNamespace(sizes=Sizes(losses=(), seeds=2)), {"moment": {(setting, START): runs}})
    claim, total = sentences.conjugate(results)
    assert claim.number == "test error 60.00 % against 20.00 %; alignment of the two kernels 0.50"
    # 0.4 above, with a standard error of 0.24 over the images: within two of them
    assert np.std([0, 1, 1, 0, 0], ddof=1) / 5**0.5 == pytest.approx(0.245, abs=1e-3)
    assert claim.note.endswith("yes")
    assert total.number.endswith("in 1 of 1 cases")
    results.work.sizes.seeds = 3
    (claim,) = sentences.conjugate(results)  # told, and not counted
    assert claim.note.endswith("2 of 3 seeds so far, not judged")


def test_errors_before_and_after_are_of_the_seeds_that_have_both():
    """Seed 0 has no machine before training: its error afterwards, 0, would make the kernel look better."""
    setting = Setting("digits 3/8", "mlp")

    def one(seed: int, error: float | None) -> Result:
        wrong = np.zeros(10, np.uint8)
        wrong[: round(10 * (error or 0))] = 1
        tangent = {"test_error": error, "agreement": error, "correlation": 0.5}
        numbers = {"seed": seed, "status": "measured", "test_error": 0.1, "tangent": tangent, "conjugate": tangent}
        arrays = {"tangent.wrong": wrong, "network.wrong": np.zeros(10, np.uint8)}
        return Result(numbers, arrays)

    runs = {
        (setting, START): [one(seed, error) for seed, error in enumerate((None, 0.4, 0.4))],
        (setting, "0.3"): [one(seed, error) for seed, error in enumerate((0.0, 0.3, 0.3))],
    }
    results = Results(SimpleNamespace(sizes=Sizes(losses=(0.3,), seeds=3)), {"moment": runs})
    (claim,) = sentences.accuracy(results, setting, "Better")
    assert claim.number.startswith("test error 40.00 ± 0.00 % → 30.00 ± 0.00 % (loss 0.3)")
    assert claim.conditions[0].values == [pytest.approx(0.75)]
    (claim,) = beyond_claims.agreement(results)
    assert "tangent kernel 40.00 ± 0.00 % → 30.00 ± 0.00 %, correlation 0.500" in claim.number

    moments = {}
    for moment, errors in ((START, (None, 0.4)), (by_layer.END, (0.0, 0.3))):
        moments[setting, moment] = []
        for seed, error in enumerate(errors):
            layer = {"alone": {"test_error": error}, "without": {"test_error": 0.2}}
            numbers = {"seed": seed, "status": "measured", "kinds": ["dense"], "whole": {"test_error": error}}
            result = Result(numbers | {"layers": {"0": layer}}, {"alone.wrong": np.zeros((1, 10), np.uint8)})
            moments[setting, moment].append(result)
    work = Work(SIZES, (0, 1), ["digits"], Path())
    (claim,) = beyond_claims.layers(Results(work, {"layers": moments}))
    assert claim.number == "all layers 40.00 % → 30.00 %; alone: 1 (dense) 40.00 % → 30.00 %, without it 20.00 ± 0.00 %"
    before, after = ([one] for one in (0.4, 0.3))
    for moment, errors in ((START, before), (by_layer.END, after), (START, before)):
        found = beyond_figures._layer_errors(Results(work, {"layers": moments}), setting, moment, "alone")
        assert [value.value for value in found] == errors
        if moment == by_layer.END:
            del moments[setting, moment]  # unfinished: the first moment alone is shown


def test_a_curve_along_training_is_of_all_seeds_at_each_step():
    """Seed 1 has no machine at step 8: the mean over the other would be a step of the curve."""
    setting = Setting("digits 3/8", "mlp")

    def one(seed: int, errors: list[float | None]) -> Result:
        steps = [
            {"step": step, "epochs": step / 4, "loss": 0.5, "test_error": error, "network_error": 0.5}
            for step, error in zip((0, 4, 8, 12), errors, strict=True)
        ]
        return Result({"seed": seed, "steps": steps}, {})

    runs = [one(0, [0.5, 0.4, 0.1, 0.2]), one(1, [0.5, 0.2, None, 0.4])]
    names = {"test_error": "SVM", "network_error": "network"}
    results = Results(SimpleNamespace(), {"along": {setting: runs}})
    found = {c["name"]: c for c in beyond_figures._along_curves(results, setting, names, "epochs", 100)}
    assert found["SVM"]["x"] == [1.0, 3.0]
    assert found["SVM"]["y"] == pytest.approx([30.0, 30.0])
    assert found["network"]["x"] == [1.0, 2.0, 3.0]


def test_a_table_at_equal_loss_is_of_the_seeds_that_both_have():
    one, names = Setting("digits 3/8", "mlp"), (*evidence.INVARIANT, evidence.SWAP)
    runs, other = {}, one._replace(lr=0.1)
    for setting, errors in ((one, (None, 0.4)), (other, (0.1, 0.3))):
        tangent = {"cosines": {name: {"raw": {"mean": 0.5}} for name in names}}
        numbers = [
            {"seed": s, "status": "measured", "tangent": tangent | {"test_error": e}} for s, e in enumerate(errors)
        ]
        runs[setting, "0.3"] = [Result(n, {}) for n in numbers]
    results = Results(SimpleNamespace(sizes=Sizes(losses=(0.3,))), {"moment": runs})
    rows = figures._comparison_section(results, [(one, other)]).items[0]["rows"]
    assert [row[3] for row in rows] == ["0.4000", "0.3000"]


def test_a_setting_of_one_seed_is_not_counted(monkeypatch):
    """Its claim has no condition, and all of no conditions hold: a kernel that got worse counted as much better."""
    setting = Setting("digits 3/8", "mlp")

    def one(seed: int, wrong: int) -> Result:
        tangent = {"test_error": wrong / 10}
        numbers = {"seed": seed, "status": "measured", "test_error": 0.1, "tangent": tangent}
        return Result(numbers, {"tangent.wrong": np.arange(10) < wrong})

    monkeypatch.setattr(beyond_claims, "added_runs", lambda work: [(setting, 0)])
    monkeypatch.setattr(beyond_claims, "cosine_claim", lambda *_, **named: iter(()))
    for seeds, told in ((1, []), (3, ["in 0 of 1 settings"])):
        runs = {(setting, m): [one(seed, wrong) for seed in range(seeds)] for m, wrong in ((START, 2), ("0.3", 8))}
        results = Results(SimpleNamespace(sizes=Sizes(losses=(0.3,), seeds=seeds)), {"moment": runs})
        first, *rest = beyond_claims.added(results)
        assert first.record()["holds"] is (None if seeds == 1 else False)
        assert [claim.number for claim in rest] == told


def test_layers_and_agreement_of_one_seed_are_not_judged():
    setting = Setting("digits 3/8", "mlp")
    tangent = {"test_error": 0.4, "agreement": 0.4, "correlation": 0.5}
    layer = {"alone": {"test_error": 0.3}, "without": {"test_error": 0.2}}
    numbers = {
        "seed": 0,
        "status": "measured",
        "kinds": ["dense"],
        "whole": {"test_error": 0.3},
        "layers": {"0": layer},
    }
    numbers |= {"tangent": tangent, "conjugate": tangent}
    names = ("tangent.wrong", "network.wrong")
    run = Result(numbers, {"alone.wrong": np.zeros((1, 10))} | dict.fromkeys(names, np.zeros(10)))
    work = Work(SIZES, (0,), ["digits"], Path())
    moments = {(setting, START): [run], (setting, by_layer.END): [run]}
    (claim,) = beyond_claims.layers(Results(work, {"layers": moments}))
    assert (claim.record()["holds"], claim.note.partition("; ")[2]) == (None, "one seed, not judged")
    runs = {(setting, START): [run], (setting, "0.3"): [run]}
    (claim,) = beyond_claims.agreement(Results(SimpleNamespace(sizes=Sizes(losses=(0.3,))), {"moment": runs}))
    assert (claim.record()["holds"], claim.note) == (None, "one seed, not judged")
