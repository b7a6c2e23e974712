"""`ntkit analyze` of a regression: its numbers against plain formulas, its words on both sides of each threshold."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from processes import command

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.files import read_json
from ntkit.commands import regression_measures as regression
from ntkit.commands.explain import explain_run
from ntkit.commands.explained_points import chosen_points
from ntkit.commands.infinite_width import infinite
from ntkit.commands.settings import ExplainSettings, InfiniteSettings, Settings, TrackSettings
from ntkit.commands.track import track_run
from ntkit.data import from_tensors
from ntkit.networks.built_in import build
from ntkit.report import regression_text as text
from ntkit.report import render

FACTORY = """
import torch
def one():
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    return x, 1000 * (x[:, 0] * x[:, 1]) + 5000
def two():
    x, y = one()
    return x, torch.stack([y, x[:, 2].sin()], 1)
def net(shape, outputs):
    return torch.nn.Sequential(torch.nn.Linear(shape[0], 24), torch.nn.Tanh(), torch.nn.Linear(24, outputs))
def dead(shape, outputs):
    first = torch.nn.Linear(shape[0], 16)
    with torch.no_grad():
        first.bias.fill_(-100.0)
    return torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(16, outputs, bias=False))
def wrong(shape):
    return torch.nn.Linear(shape[0], 5)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(FACTORY)
    return path


def settings(code, data="one", **more):
    small = {"epochs": 6, "batch_size": None, "lr": 0.1, "momentum": 0.0, "track_points": 30}
    return Settings(data=f"{code}:{data}", model=f"{code}:net", **small | more)


@pytest.fixture(scope="module")
def run(code, tmp_path_factory):
    return ntkit.analyze(settings(code), out=tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def results(run):
    return read_json(run / "results.json")


def noisy(n=400, C=1, seed=0):
    """Data with n test examples, and predictions that miss them by half of their deviation."""
    draw = np.random.default_rng(seed)
    y = draw.normal(size=(n, C)) * [10.0, 0.01][:C]
    data = from_tensors((np.zeros((n, 1)), y), (np.zeros((n, 1)), y))
    return data, data.y_test + 0.5 * torch.from_numpy(draw.normal(size=(n, C)))


@pytest.mark.parametrize("C", [1, 2])
def test_errors_are_those_of_plain_formulas(C):
    data, predicted = noisy(C=C)
    found = regression.errors(predicted, data.y_test, data, "test")
    y, f = data.targets.in_units(data.y_test).numpy(), data.targets.in_units(predicted).numpy()
    r2 = 1 - ((y - f) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    for c, own in enumerate(found["targets"]):
        assert own["r2"]["value"] == pytest.approx(r2[c], rel=1e-12)
        assert own["rmse"]["value"] == pytest.approx(np.sqrt(((y - f)[:, c] ** 2).mean()), rel=1e-12)
        assert own["mae"]["value"] == pytest.approx(abs(y - f)[:, c].mean(), rel=1e-12)
    residuals = (predicted - data.y_test).numpy()
    assert found["r2"]["value"] == pytest.approx(r2.mean(), rel=1e-12)
    assert found["rmse"]["value"] == pytest.approx(np.sqrt((residuals**2).mean()), rel=1e-12)
    assert found["mae"]["value"] == pytest.approx(abs(residuals).mean(), rel=1e-12)


def test_intervals_are_those_of_large_samples():
    """Central limit theorem: the mean absolute error, and by the delta method the root mean squared one."""
    data, predicted = noisy(n=4000)
    found = regression.errors(predicted, data.y_test, data, "test")
    residuals = (predicted - data.y_test).numpy()[:, 0]
    deviations = {
        "mae": abs(residuals).std() / 4000**0.5,
        "rmse": (residuals**2).std() / 4000**0.5 / (2 * np.sqrt((residuals**2).mean())),
    }
    for name, deviation in deviations.items():
        assert found[name]["error"] == pytest.approx(deviation, rel=0.1)
        assert found[name]["low"] == pytest.approx(found[name]["value"] - 1.96 * deviation, abs=0.3 * deviation)
        assert found[name]["high"] == pytest.approx(found[name]["value"] + 1.96 * deviation, abs=0.3 * deviation)


def test_a_set_without_variance_has_no_r2():
    data, predicted = noisy(n=30)
    found = regression.errors(predicted[:5], torch.ones(5, 1), data, "test")
    assert (found["r2"]["value"], found["r2"]["low"]) == (None, None)
    assert found["rmse"]["low"] <= found["rmse"]["value"] <= found["rmse"]["high"]


def test_ridge_regression_has_the_ridge_of_least_leave_one_out_error():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=draw, dtype=torch.float64)
    y = x[:, :2] ** 2 + 0.3 * torch.randn(24, 2, generator=draw, dtype=torch.float64)
    data = from_tensors((x[:16], y[:16]), (x[16:], y[16:]))
    K = torch.exp(-(torch.cdist(x, x) ** 2) / 8)
    found, arrays = regression.machine(K[:16, :16], K[16:, :16], data)
    Y, losses = data.y_train, {}
    for ridge in regression.RIDGES:
        residuals = []
        for i in range(16):  # the machine without example i
            rest = [j for j in range(16) if j != i]
            A = K[rest][:, rest] + ridge * torch.eye(15, dtype=torch.float64)
            residuals.append(Y[i] - K[i, rest] @ torch.linalg.solve(A, Y[rest]))
        losses[ridge] = float((torch.stack(residuals) ** 2).mean()) ** 0.5
    best = min(losses, key=losses.__getitem__)
    assert found["ridge"] == best
    assert found["loo"] == pytest.approx(losses[best], rel=1e-9)
    alpha = torch.linalg.solve(K[:16, :16] + best * torch.eye(16, dtype=torch.float64), Y)
    assert np.allclose(arrays["predicted"], K[16:, :16] @ alpha, atol=1e-10)
    assert found["status"] == "solved"
    assert found["edge"] is (best in (regression.RIDGES[0], regression.RIDGES[-1]))


def test_comparisons_are_in_pairs():
    """A small constant gain on every example is beyond noise, although the errors themselves vary much more."""
    data, predicted = noisy(n=200)
    worse = data.y_test + 1.05 * (predicted - data.y_test)
    told = regression.comparisons(
        {"after": predicted.numpy(), "init": worse.numpy(), "network": predicted.numpy()}, data
    )
    by_name = {entry["with"]: entry for entry in told["compared"]}
    squares = ((predicted - data.y_test) ** 2).numpy()
    assert by_name["init"]["value"] == pytest.approx(squares.mean() * (1 - 1.05**2), rel=1e-9)
    assert by_name["init"]["high"] < 0
    assert by_name["network"]["value"] == by_name["network"]["low"] == by_name["network"]["high"] == 0
    assert set(by_name) == {"init", "network"}
    rows = told["scatter"]["test_index"]
    true = data.targets.in_units(data.y_test)[rows, 0]
    assert told["scatter"]["targets"][0]["true"] == pytest.approx(true.tolist())


def test_the_run_holds_what_the_library_says(run, results, code):
    data = ntkit.data.load(f"{code}:one")
    model = build(f"{code}:net", data.input_shape, 1, seed=0)
    trajectory = ntkit.Trajectory.open(run / "trajectory")
    trajectory.load(model, trajectory.steps[-1])
    with torch.no_grad():
        residual = (model(data.x_test) - data.y_test).double()
    deviation = data.targets.deviation[0]
    rmse = float((residual**2).mean().sqrt()) * deviation
    assert results["network"]["test"]["targets"][0]["rmse"]["value"] == pytest.approx(rmse, rel=1e-6)
    assert results["network"]["test_loss"]["value"] == pytest.approx(float((residual**2).mean()) / 2, rel=1e-6)
    assert results["data"]["targets"]["names"] == ["y"]
    assert results["data"]["targets"]["deviation"] == [pytest.approx(deviation)]
    K = ntkit.TangentKernel(model, outputs="trace")(data.x_train)
    assert results["quality"][1]["alignment"] == pytest.approx(ntkit.alignment(K, data.y_train), rel=1e-5)
    along = results["along"]  # half the squared error of one output: sharpness is lambda_1 / n
    assert along["sharpness"][0] == pytest.approx(along["eigenvalues"][0][0] / 30, rel=1e-4)
    assert along["sharpness_bound"] == [pytest.approx(2 / 0.1)] * len(along["steps"])
    assert "test_error" not in along
    assert along["test_loss"][-1] == pytest.approx(results["network"]["test_loss"]["value"], rel=1e-5)
    assert all(c["ok"] for c in results["certificates"]), results["certificates"]
    shown = {row["label"] for row in results["neighbors"]["rows"]}
    assert shown <= {data.shown(y) for y in data.y_test}


def test_the_run_is_repeated_resumed_and_tracked(run, code, tmp_path):
    again = ntkit.analyze(from_run=run, out=tmp_path / "again")
    assert (again / "results.json").read_bytes() == (run / "results.json").read_bytes()
    (again / "results.json").unlink()
    (again / "stages" / "comparisons.json").unlink()
    ntkit.analyze(from_run=again)
    assert (again / "results.json").read_bytes() == (run / "results.json").read_bytes()
    place = track_run(run, TrackSettings(points=20, k=3, out=tmp_path / "track"), say=lambda line: None)
    first = read_json(place / "step-00000000.json")
    data = ntkit.data.load(f"{code}:one")
    rows = torch.linspace(0, len(data.x_train) - 1, 20).long()
    with torch.no_grad():
        residual = build(f"{code}:net", (3,), 1, seed=0)(data.x_train[rows]) - data.y_train[rows]
    assert first["loss"] == pytest.approx(float((residual**2).mean()) / 2, rel=1e-6)


def test_the_path_kernel_takes_the_targets(run, code):
    data = ntkit.data.load(f"{code}:one")
    model = build(f"{code}:net", (3,), 1, seed=0)
    trajectory = ntkit.Trajectory.open(run / "trajectory")
    task = regression.RegressionTask(model, data)
    kernel = ntkit.PathKernel(trajectory, model=model, data=(data.x_train, data.y_train), loss=task.loss)
    parts = kernel.decompose(data.x_test[:4])
    trajectory.load(model, trajectory.steps[-1])
    with torch.no_grad():
        assert np.allclose(parts.prediction, model(data.x_test[:4]).double(), atol=1e-6)
    sums = parts.initial + parts.contributions.sum(-1) + parts.regularization
    assert np.allclose(sums, parts.prediction, atol=1e-9)


def test_predictions_are_explained_in_the_units_of_the_target(run, code, tmp_path):
    """Accounting sums to the prediction; without an example the network trained again is what `train` gives."""
    data = ntkit.data.load(f"{code}:one")
    place = explain_run(run, ExplainSettings(test=(2,), out=tmp_path / "explain"), say=lambda line: None)
    told = read_json(place / "results.json")
    point = told["points"][0]
    model = build(f"{code}:net", (3,), 1, seed=0)
    trajectory = ntkit.Trajectory.open(run / "trajectory")

    def prediction(at):
        trajectory.load(model, at)
        with torch.no_grad():
            return float(data.targets.in_units(model(data.x_test[2:3]))[0, 0])

    assert point["margin"] == pytest.approx(prediction(trajectory.steps[-1]), rel=1e-6)
    assert point["initial"] == pytest.approx(prediction(0), rel=1e-6)
    assert point["initial"] + point["examples"] == pytest.approx(point["margin"], rel=1e-6)
    assert (point["label"], point["target"]) == (data.shown(data.y_test[2]), "y")
    again = build(f"{code}:net", (3,), 1, seed=0)
    task, deletion = regression.RegressionTask(again, data), point["deletions"][0]
    removed = torch.tensor([entry["index"] for entry in point["accounting"]["helped"]][: deletion["size"]])
    weights = torch.ones(len(data.x_train))
    weights[removed] = 0
    for _ in range(trajectory.stop["step"]):  # full-batch gradient descent, as the run
        each = task.loss(again(data.x_train), data.y_train, reduction="none")
        slopes = torch.autograd.grad((weights * each).sum() / len(each), list(again.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(again.parameters(), slopes, strict=True):
                parameter -= 0.1 * slope
    trajectory.load(model, trajectory.steps[-1])
    with torch.no_grad():
        both = [float(data.targets.in_units(net(data.x_test[2:3]))[0, 0]) for net in (again, model)]
    assert deletion["method"] == "accounting"
    assert deletion["real"] == pytest.approx(both[0] - both[1], rel=1e-3)
    page = (place / "explain.html").read_text()
    assert f"network says {point['predicted']}, it is {point['label']}" in page
    assert "raised the prediction" in page
    assert "margin" not in re.sub(r"<(style|script).*?</\1>", "", page, flags=re.S).replace("margin:", "")


def test_the_points_of_the_report_are_the_largest_the_smallest_and_the_median_error(run, results, code):
    data, model = ntkit.data.load(f"{code}:one"), build(f"{code}:net", (3,), 1, seed=0)
    trajectory = ntkit.Trajectory.open(run / "trajectory")
    trajectory.load(model, trajectory.steps[-1])
    with torch.no_grad():
        order = (model(data.x_test) - data.y_test)[:, 0].abs().argsort().tolist()
    task = regression.RegressionTask(model, data)
    points = {point.why: point.index for point in chosen_points(task, model, None)}
    assert points == {"largest error": order[-1], "smallest error": order[0], "median error": order[len(order) // 2]}


@pytest.mark.parametrize(("shuffled", "low", "high"), [(False, 0.99, 1.0), (True, -2.0, 0.3)])
def test_the_limit_predicts_targets(tmp_path, shuffled, low, high):
    """A linear target is predicted by every machine, and a shuffled one by none."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(90, 3))
    y = np.stack([50 * x[:, 0] + 7, x[:, 1] - x[:, 2]], 1)
    np.savez(tmp_path / "a.npz", x=x, y=draw.permutation(y) if shuffled else y)
    said = []
    found = infinite(
        InfiniteSettings(data=str(tmp_path / "a.npz"), model="linear", folds=3, epochs=30), say=said.append
    )
    assert "accuracies" not in found
    assert [entry["name"] for entry in found["r2"]][2] == "kernel ridge, RBF"
    scores = {entry["name"]: (entry["mean"], entry["test"]) for entry in found["r2"]}
    for name, values in scores.items():
        assert all((low if "RBF" not in name else low - 0.1) <= value <= high for value in values), scores
    assert any("fold 1 of 3: R2" in line for line in said)
    with pytest.raises(Refused, match="got 60 folds, and 72 examples; expected at least two examples in every fold"):
        infinite(InfiniteSettings(data=str(tmp_path / "a.npz"), model="linear", folds=60))


def test_several_targets_have_a_row_each(code, tmp_path):
    run = ntkit.analyze(settings(code, "two", epochs=1), out=tmp_path / "run")
    results = read_json(run / "results.json")
    assert results["data"]["targets"]["names"] == ["y0", "y1"]
    page = (run / "report.html").read_text()
    assert "Each target, in its own units" in page
    assert "mine.py:net on two, targets y0, y1" in page


def test_the_command_line_prints_r2(code, tmp_path):
    words = ["analyze", "--data", f"{code}:one", "--model", f"{code}:net", "--epochs", "1", "--track-points", "5"]
    done = command(*words, "--out", tmp_path / "run").done()
    assert done.returncode == 0, done.stderr
    assert "ridge, after kernel" in " ".join(done.stdout.split())
    assert "R² (95 %)" in done.stdout
    assert "SVM" not in done.stdout


@pytest.mark.parametrize(
    ("lr", "first"), [(50.0, "The network hardly"), (1e30, "Training diverged"), (1e-3, "The network hardly")]
)
def test_a_run_without_a_trained_network_has_a_report(code, tmp_path, lr, first):
    run = ntkit.analyze(settings(code, lr=lr, epochs=4), out=tmp_path / "run")
    results = read_json(run / "results.json")
    assert text.warnings(results)[0].startswith(first)
    assert first in (run / "report.html").read_text()
    assert results["machines"][0]["test"]["r2"]["value"] is not None  # the kernel at initialization is measured


def test_a_dead_network_has_a_report(code, tmp_path):
    run = ntkit.analyze(Settings(data=f"{code}:one", model=f"{code}:dead", epochs=1), out=tmp_path / "run")
    results = read_json(run / "results.json")
    assert text.warnings(results)[0].startswith("The network hardly fits its training set")
    assert results["comparisons"]["compared"] == []
    assert "undefined" in text.in_short(results)[0][1]


def test_a_network_with_other_outputs_is_refused(code, tmp_path):
    with pytest.raises(Refused, match="got 5 outputs for 1 target; expected one output per target"):
        ntkit.analyze(Settings(data=f"{code}:one", model=f"{code}:wrong"), out=tmp_path / "run")


def test_the_report_says_ridge_and_not_svm(run):
    page = render(run).read_text()
    for words in (
        "Ridge on the after kernel, test R²",
        "Predictions of test examples",
        "in units of y",
        "Kernel ridge",
    ):
        assert words in page
    for words in ("support vector", "Hard-margin", "0 classes", "Traceback"):
        assert words not in page


# --- words on both sides of their thresholds ---


def changed(results, **more):
    told = copy.deepcopy(results)
    for place, value in more.items():
        *path, last = place.split("__")
        inner = told
        for key in path:
            inner = inner[int(key) if key.isdecimal() else key]
        inner[last] = value
    return told


@pytest.mark.parametrize(
    ("low", "high", "lead", "reading"),
    [
        (-0.2, -0.001, "Training made a better kernel.", "is lower than that on"),
        (-0.2, 0.0, "No difference beyond noise between the kernels", "is no different, beyond noise, from that on"),
        (-0.001, 0.2, "No difference beyond noise between the kernels", "is no different, beyond noise, from that on"),
        (0.001, 0.2, "Training made a worse kernel.", "is higher than that on"),
        (None, None, "The kernels before and after training cannot be compared.", "is not comparable with that on"),
    ],
)
def test_no_verdict_without_an_interval_that_leaves_out_zero(results, low, high, lead, reading):
    value = None if low is None else (low + high) / 2
    found = {"with": "init", "value": value, "low": low, "high": high, "of": 1.0}
    told = changed(results, comparisons__compared=[found])
    assert text.in_short(told)[0][0].startswith(lead)
    assert reading in text.answer(told)
    assert text.in_short(told)[1][0] == "The after kernel cannot be compared with its network."


@pytest.mark.parametrize(("learned", "said"), [(0.199, True), (0.201, False), (-3.0, True), (None, True)])
def test_a_network_that_hardly_fits_is_said_to_be_so_first(results, learned, said):
    told = changed(results, network__train__r2__value=learned)
    warnings = text.warnings(told)
    assert any("fits its training set" in warning for warning in warnings[:1]) is said
    if said and learned is not None:
        assert f"{text.digits(learned)}; less than 0.2 is little." in warnings[0]
    diverged = changed(told, training__stop="diverged")
    assert text.warnings(diverged)[0].startswith("Training diverged")


@pytest.mark.parametrize(("status", "edge", "words"), [
    ("solved", False, None), ("solved", True, "is at the end of the range"), ("singular", False, "singular. Use more."),
])  # fmt: skip
def test_machines_that_say_less_are_named(results, status, edge, words):
    told = changed(results, machines__0__status=status, machines__0__edge=edge, machines__0__advice="Use more.",
                   machines__1__edge=False, machines__2__edge=False, network__train__r2__value=0.9)  # fmt: skip
    warnings = text.warnings(told)
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]


def test_differences_have_the_interval_of_student():
    rng = np.random.default_rng(0)
    for n in (2, 3, 8):  # of a symmetric distribution around 0, so that 5 % of the intervals leave it out
        found = [regression._paired(rng.normal(size=n)) for _ in range(2000)]
        out = np.mean([f["low"] > 0 or f["high"] < 0 for f in found])
        assert abs(out - 0.05) < 0.02
    alone = regression._paired(np.array([0.3]))
    assert alone["low"] is None
    assert text.judgments.different_squares(alone["low"], alone["high"], alone["value"], 1.0) == "unknown"


def test_one_test_example_has_no_interval():
    data = from_tensors((torch.randn(20, 2), torch.randn(20)), (torch.randn(1, 2), torch.randn(1)))
    found = regression.errors(torch.zeros(1, 1), data.y_test, data, "test")
    assert found["rmse"]["low"] is None
    assert found["r2"]["value"] is None


def test_several_targets_are_quoted_by_what_is_judged(results):
    told = changed(results, data__targets__names=["a", "b"])
    assert "Test root mean squared error, in standard deviations, of ridge" in text.in_short(told)[0][1]
    assert "Test R² of ridge" in text.in_short(results)[0][1]


def test_loaded_weights_are_not_called_training(results):
    told = changed(results, training=None)
    lead = text.in_short(told)[0][0]
    assert "raining" not in lead
    assert "fresh random" in lead
