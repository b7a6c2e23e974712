"""The study of Bell et al. 2023: a toy size from end to end, numbers against formulas of their own, claims failing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.files import read_arrays
from ntkit.report import render
from ntkit.studies import bell2023 as bell
from ntkit.studies.bell2023 import (
    architectures,
    bell_setting,
    contributions,
    generalization,
    integral,
    other_kernels,
    own_kernel,
    pictures,
    plane,
    realistic,
    removal,
    unseen,
)
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results
from ntkit.tracking.losses import cross_entropy

SMALL = Sizes(
    plane_steps=2, side=5, direct=1, nodes=(1, 2), probed=3, pixels=8, width=2, train=50, test=6, steps=5, lr=0.2,
    other_steps=4, shrinks=2, kind_steps=2, judged=20, large_train=60, large_test=3, large_steps=2, removals=2,
    shares=(0.04, 0.08), draws=2, unseen=12, unseen_steps=4,
)  # fmt: skip
MACHINE = "A model trained by gradient descent is a kernel machine, to machine precision, whatever its architecture"


def small(sizes):
    """The study with two seeds at these sizes."""
    return replace(bell.STUDY, scales=bell.SCALES | {"quick": sizes}, seeds=(0, 1))


@pytest.fixture(scope="module")
def bell_folder(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("bell") / "run", []

    def stop(line):
        said.append(line)
        if "removed" in line:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bell, "STUDY", small(SMALL))
        patch.setattr(pictures, "RECIPES", {name: pictures.RECIPES[name] for name in ("momentum", "adamw")})
        with pytest.raises(KeyboardInterrupt):
            ntkit.study("bell2023", out=place, say=stop)
        assert said.pop().startswith("Stopped.")
        assert json.loads((place / "run.json").read_text())["status"] == "running"
        first = list(said)
        ntkit.study("bell2023", out=place, say=said.append)
        assert said[len(first)] == first[-1]  # the stopped part is computed again, nothing else
        assert len(set(said)) == len(said) - 1
        before = (place / "results.json").read_bytes()
        again: list[str] = []
        ntkit.study("bell2023", out=place, say=again.append)
        assert (place / "results.json").read_bytes() == before  # same run, same bytes
        assert not again
        with pytest.raises(Refused, match="another run"):
            ntkit.study("bell2023", scale="paper", out=place)
        patch.setattr(bell, "STUDY", small(Sizes(**vars(SMALL) | {"steps": 6})))
        with pytest.raises(Refused, match="another run"):
            ntkit.study("bell2023", out=place)
    return place


@pytest.fixture(scope="module")
def results(bell_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "RECIPES", {name: pictures.RECIPES[name] for name in ("momentum", "adamw")})
        work = Work(SMALL, (0, 1), ["digits"], bell_folder, progress=lambda line: pytest.fail("computed again"))
        return small(SMALL).results(work)


def test_bell_judges_what_is_finished(results, monkeypatch):
    monkeypatch.setattr(pictures, "RECIPES", {name: pictures.RECIPES[name] for name in ("momentum", "adamw")})
    whole = {claim.text for claims in bell.STUDY.claims for claim in claims(results)}
    groups = results.by_experiment
    for experiment, cases in groups.items():
        case, runs = list(cases.items())[-1]
        without = groups | {experiment: cases | {case: runs[:-1]}}  # a part is missing; then it is the only one
        for missing, found in ({experiment}, without), (groups.keys(), {experiment: {case: runs[-1:]}}):
            partial = Results(results.work, found, frozenset(missing))
            told = {claim.text for claims in bell.STUDY.claims for claim in claims(partial)}
            assert told < whole or (experiment in ("images", "realistic", "explained") and told == whole)
            exact = any(partial[name] for name in ("plane", "images", "architectures", "recipes", "realistic"))
            assert bool(bell.STUDY.certificate(partial)) == exact
        assert all(section.items for listed in bell.STUDY.sections for section in listed(partial))
    assert list(bell.STUDY.sections[0](Results(results.work, groups, frozenset({"maps"})))) == []
    monkeypatch.setattr(Work, "finished", lambda work, part: part.name != "maps-relu-seed-1")
    partial = small(SMALL).results(results.work, finished=True)
    assert (partial.missing, len(partial["maps"][None])) == ({"maps"}, 1)
    assert (
        bell.about(partial)
        == bell.about(results) + " Not all of this is computed yet: claims and figures are of what is."
    )


def test_bell_has_numbers_verdicts_and_a_certificate(bell_folder):
    results = json.loads((bell_folder / "results.json").read_text())
    claims = results["claims"]
    assert all(c["claim"] and any(ch.isdigit() for ch in c["number"]) and c["how"] for c in claims)
    assert all(c["holds"] in (True, False, None) for c in claims)
    assert all(c["holds"] is not None for c in claims if not c.get("further"))  # what the paper claims is judged
    assert results["certificate"]["count"] == 2 * (
        2 + 1 + 6 + 2 + 1
    )  # seeds x (plane, digits, kinds, optimizers, large)
    assert 0 < results["certificate"]["value"] < 1e-12
    assert json.loads((bell_folder / "run.json").read_text())["status"] == "complete"


def test_exactness_holds_even_at_a_toy_size(results):
    claims = {claim.text: claim for claims in bell.STUDY.claims for claim in claims(results)}
    for text in (
        "Kernel prediction against network logit lies on the diagonal, digits",
        "Momentum, weight decay, Adam, schedules, clipping and minibatches have an exact representation, too",
        "The kernel of a realistic network is computed up to machine precision, digits",
        "In single precision, up to that precision, digits",
        "The paper’s own integral rebuilds a smooth network’s predictions to machine precision",
        "The kernel of each step is symmetric and positive semidefinite, with training points held at the step’s start",
    ):
        assert claims[text].record()["holds"], text
    assert claims[MACHINE].conditions[0].holds()


def changed(results, experiment, case, path, value):
    """The same results with one number of every seed replaced."""
    groups = {name: dict(cases) for name, cases in results.by_experiment.items()}
    runs = []
    for run in groups[experiment][case]:
        numbers = json.loads(json.dumps(run.numbers))
        *way, last = path
        place = numbers
        for key in way:
            place = place[key]
        place[last] = value
        runs.append(Result(numbers, run.arrays))
    groups[experiment][case] = runs
    return Results(results.work, groups)


@pytest.mark.parametrize(
    ("experiment", "case", "path", "value", "claims", "text"),
    [
        ("architectures", "transformer", ("errors", "secant", "relative"), 1e-10, architectures.claims, "A model"),
        ("images", "digits", ("errors", "secant", "slope"), 1 + 1e-10, pictures.exactness_claims, "Kernel prediction"),
        ("definite", "relu", ("least",), -2.0, generalization.kernel_claims, "The kernel of each step"),
        ("definite", "tanh", ("error",), 1e-10, generalization.kernel_claims, "The kernel of each step"),
        ("formulations", "relu", ("trained", "relative"), 1e-14, other_kernels.claims, "The tangent kernel"),
        ("formulations", "tanh", ("left", "relative"), 0.9, other_kernels.claims, "The path kernel by one"),
        ("realistic", "digits", ("float64",), 1e-10, realistic.claims, "The kernel of a realistic"),
        ("realistic", "digits", ("parameters",), 99_999, realistic.claims, "The kernel of a realistic"),
        ("realistic", "digits", ("float32",), 1e-3, realistic.claims, "In single"),
        ("maps", None, ("agree kernel",), 0.99, plane.map_claims, "The kernel machine"),
        ("posterior", "tanh", ("both",), 0.0, generalization.claims, "The posterior of the"),
        ("posterior", "digits", ("beyond",), 0.0, generalization.claims, "The posterior knows something of the "
         "network’s errors that the distance to the data does not, digits"),
        ("made of", "digits", ("same top",), 0.0, generalization.claims, "Predictions rest"),
    ],
)  # fmt: skip
def test_each_claim_can_fail(results, experiment, case, path, value, claims, text):
    record = next(
        c.record() for c in claims(changed(results, experiment, case, path, value)) if c.text.startswith(text)
    )
    assert record["holds"] is False


def test_bell_shows_its_results(bell_folder, results):
    record, arrays = (
        json.loads((bell_folder / "results.json").read_text()),
        read_arrays(bell_folder / "figures.safetensors"),
    )
    np.testing.assert_allclose(arrays["images/digits/secant"], arrays["images/digits/network"], atol=1e-12)
    np.testing.assert_array_equal(arrays["maps/kernel"], arrays["maps/network"])
    page = render(bell_folder).read_text()
    for section in record["sections"]:
        assert section["title"].split(":")[0] in page
    assert page.index(record["certificate"]["cards"][0]["name"]) < page.index("What the paper claims")
    assert page.index("What the paper claims") < page.index("Further claims, which the paper does not make")
    markdown = (bell_folder / "claims.md").read_text()
    further = markdown.index("## Further, not in the paper")
    assert markdown.index(MACHINE) < further < markdown.index("Without its top contributors")
    for case in results.one("explained", "digits").numbers["cases"]:
        total = case["initial"] + sum(case["classes"])
        assert total == pytest.approx(case["logit"], abs=1e-12)
        assert case["over_time"]["logit"][-1] == pytest.approx(case["logit"], abs=1e-12)
        assert case["over_time"]["own"][-1] == pytest.approx(case["classes"][case["predicted"]], abs=1e-12)


# ---------------------------------------------------------------------- numbers against formulas of their own


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A ReLU network in the plane, its run, its data, and new points."""
    work = Work(Sizes(**vars(SMALL) | {"plane_steps": 6}), (0, 1), ["digits"], tmp_path_factory.mktemp("plane"))
    return (*plane.trained(work, "relu", 3), plane.clusters(5, 9)[0])


def jacobian(model, run, step, x):
    """Gradients of the outputs, [m C, P], one backward pass for each."""
    run.load(model, step)
    rows = []
    for out in model(x).flatten():
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(out, list(model.parameters()), retain_graph=True)])
        )
    return torch.stack(rows)


def initial(model, run, x):
    run.load(model, 0)
    return model(x).detach()


def test_the_integral_along_the_steps_is_what_contributions_sum_to(trained):
    model, run, _, _, x = trained
    changes = bell_setting.summed_changes(model, run, x, [("left", 1), ("left", 2), ("midpoint", 1), ("gauss", 3)], 4)
    for (rule, nodes), change in changes.items():
        if (rule, nodes) != ("left", 2):
            settings = {"integration": "left"} if rule == "left" else {"integration": "quadrature", "rule": rule}
            parts = ntkit.PathKernel(run, nodes=nodes, **settings).decompose(x)
            torch.testing.assert_close(parts.initial + change, parts.prediction + parts.residual, rtol=0, atol=1e-12)
    halves = (changes["left", 1] + changes["midpoint", 1]) / 2  # two left end points: the left one and the middle
    torch.testing.assert_close(changes["left", 2], halves, rtol=0, atol=1e-12)


def test_contributions_of_the_integral_are_those_of_the_path_kernel(trained):
    model, run, x, y, points = trained
    rules = [("midpoint", 3), ("gauss", 4)]
    own = integral.contributions(model, run, (x, y), plane.LR, points, rules)
    for rule, nodes in rules:
        parts = ntkit.PathKernel(run, integration="quadrature", rule=rule, nodes=nodes).decompose(points)
        torch.testing.assert_close(own[rule, nodes], parts.contributions, rtol=0, atol=1e-12)


def test_formulations_are_what_they_say(trained):
    model, run, x, y, points = trained
    found = other_kernels.formulations(other_kernels.TrainedNetwork(model, run, x, y, plane.LR), points)
    assert found.keys() == other_kernels.FORMULATIONS.keys()
    for name, integration in (("left", "left"), ("initial", "ntk")):
        parts = ntkit.PathKernel(run, integration=integration).decompose(points)
        torch.testing.assert_close(found[name], parts.prediction + parts.residual, rtol=0, atol=1e-12)
    targets, steps = nn.functional.one_hot(y, 3).double(), run.steps[-1]
    weights = torch.zeros(len(y), 3, dtype=torch.float64)  # of the network's own slopes
    for step in range(steps):
        run.load(model, step)
        weights -= plane.LR * (model(x).detach().softmax(1) - targets) / len(y)
    for step, network, machine in ((0, "initial", "trained"), (steps, "after", "after trained")):
        train, test = jacobian(model, run, step, x), jacobian(model, run, step, points)
        start = initial(model, run, points)
        torch.testing.assert_close(found[network], start + (test @ train.T @ weights.flatten()).view(-1, 3))
        outputs, new = initial(model, run, x), start.clone()  # gradient descent in the space of functions
        for _ in range(steps):
            slopes = ((outputs.softmax(1) - targets) / len(y)).flatten()
            outputs = outputs - plane.LR * (train @ train.T @ slopes).view(-1, 3)
            new = new - plane.LR * (test @ train.T @ slopes).view(-1, 3)
        torch.testing.assert_close(found[machine], new, rtol=0, atol=1e-11)


def test_the_own_kernel_holds_training_points_at_the_start_of_each_step(trained):
    model, run, x, y, points = trained
    own = own_kernel.own_kernel(model, run, (x, y), plane.LR, points, 2)
    starts = [jacobian(model, run, step, x).view(len(x), -1) for step in range(run.steps[-1])]
    torch.testing.assert_close(own.train, torch.stack([j @ j.T for j in starts]).mean(0))
    parts = ntkit.PathKernel(run, integration="quadrature", rule="midpoint", nodes=2).decompose(points)
    torch.testing.assert_close(own.rebuilt, parts.prediction + parts.residual, rtol=0, atol=1e-12)
    along = ntkit.PathKernel(run, outputs="trace", integration="quadrature", rule="midpoint", nodes=2)
    torch.testing.assert_close(own.own, along.diagonal(points))
    assert not torch.allclose(own.train, along(x), rtol=1e-4)  # both points along the step: another kernel


def test_the_posterior_is_that_of_novelty_where_the_kernel_is_constant():
    x, y = plane.clusters(12, 0)
    points = plane.clusters(5, 1)[0] * 2
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    run = ntkit.train(model, (x, y), cross_entropy, bell_setting.sgd(0.1), 3, record="all")
    deviation, outside = own_kernel.posterior(own_kernel.own_kernel(model, run, (x, y), 0.1, points, 1))
    expected = ntkit.novelty(ntkit.TangentKernel(model, outputs="trace"), x, points)
    torch.testing.assert_close(deviation, expected.deviation)
    torch.testing.assert_close(outside, expected.outside, rtol=0, atol=1e-6)


def test_definiteness_sees_what_is_no_kernel(trained):
    model, run, x, y, points = trained
    found = own_kernel.definiteness(model, run, (x, y), plane.LR, points, "midpoint", 4)
    parts = ntkit.PathKernel(run, integration="quadrature", rule="midpoint", nodes=4).decompose(points)
    missed = float(parts.residual.abs().max() / parts.prediction.abs().max())
    assert found.error == pytest.approx(missed, rel=1e-6)
    assert found.single_error == pytest.approx(missed, rel=1e-6)  # the one kernel rebuilds the outputs, too
    assert found.least > -1
    assert min(found.both_roles, found.jump, found.single) > 1e-4
    matrix = torch.eye(4).double() + torch.ones(4, 4).double()
    assert own_kernel._least(matrix) == pytest.approx(1 / (4 * 2.0**-52 * 5))
    assert own_kernel._least(matrix - 2 * torch.eye(4)) < -1
    assert own_kernel._asymmetry(torch.tensor([[0.0, 1], [0, 0]])) == pytest.approx(math.sqrt(2))


def test_scores_of_errors():
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    draw = torch.Generator().manual_seed(0)
    score, distance, error = (torch.rand(60, generator=draw) for _ in range(3))
    error = error + score + distance
    found = own_kernel.rank_correlations(score, distance, error)
    assert found["score"] == pytest.approx(spearmanr(score, error).statistic)
    assert found["both"] == pytest.approx(spearmanr(score, distance).statistic)
    a, b, c = (t.argsort().argsort().numpy().astype(float) for t in (score, distance, error))
    rest = [v - np.polyval(np.polyfit(b, v, 1), b) for v in (a, c)]
    assert found["beyond"] == pytest.approx(np.corrcoef(*rest)[0, 1])
    wrong = error > 1.8
    assert generalization.auroc(score, wrong) == pytest.approx(roc_auc_score(wrong, score))
    assert generalization.auroc(score, wrong | ~wrong) is None


def test_removing_nothing_changes_nothing_and_weights_are_a_smaller_set(tmp_path):
    work = Work(SMALL, (0, 1), ["digits"], tmp_path)
    network = torch.from_numpy(work.result(pictures.rebuilt("digits", 1)).arrays["network"])
    data = bell_setting.images(work, "digits", SMALL.train, SMALL.test, seed=1)
    torch.testing.assert_close(removal.retrained(work, data, torch.tensor([], dtype=torch.int64), 1), network)
    keep = torch.arange(SMALL.train) >= 7
    model = bell_setting.cnn(8, 10, SMALL.width, 0)
    share = float(keep.double().mean())
    ntkit.train(
        model, (data.x[keep], data.y[keep]), lambda out, y: share * torch.nn.functional.cross_entropy(out, y),
        bell_setting.sgd(SMALL.lr), SMALL.steps,
    )  # fmt: skip
    torch.testing.assert_close(removal.retrained(work, data, torch.arange(7)), model(data.x_test).detach())


def test_orders_slopes_rounding_and_patches():
    assert bell_setting.slope(
        torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[3.0, 5.0], [9.0, 1.0]])
    ) == pytest.approx(2)
    assert bell_setting.order([2, 4], [1.0, 0.25]) == pytest.approx(2)
    assert bell_setting.rounding(9, torch.float32) == 3 * 2.0**-23
    patches = unseen.patches(6, 8, seed=0)
    assert patches.shape == (6, 1, 8, 8)
    assert torch.equal(patches.amin((1, 2, 3)), torch.zeros(6).double())
    assert torch.equal(patches.amax((1, 2, 3)), torch.ones(6).double())
    assert torch.equal(patches, unseen.patches(6, 8, seed=0))
    assert not torch.equal(patches, unseen.patches(6, 8, seed=1))
    logits = torch.tensor([[3.0, 0, 0], [0, 1, 0], [0, 5, 0], [0, 0, 2]])
    truth = torch.tensor([0, 1, 0, 2])
    assert contributions.spread(logits, truth).tolist() == [2, 1, 3, 0]  # from the worst margin to the best
    assert pictures.accuracy(logits, truth) == 0.75
    assert math.isclose(pictures.cosine(0, 60), 0.2)
    assert pictures.cosine(59, 60) < 1e-2


def test_the_larger_network_on_mnist_where_its_files_are_at_hand(shared_data, tmp_path):
    sizes = Sizes(**vars(SMALL) | {"pixels": 28, "large_train": 100, "large_steps": 2, "large_test": 2})
    work = Work(sizes, (0,), ["mnist"], tmp_path, {"mnist": shared_data / "mnist"})
    (part,) = realistic.parts(work)
    numbers = work.result(part).numbers
    assert numbers["parameters"] >= realistic.LEAST
    assert numbers["float64"] <= bell_setting.rounding(numbers["terms"])
    assert numbers["float32"] <= bell_setting.rounding(numbers["terms"], torch.float32)
    assert numbers["left"] > 1e-4
