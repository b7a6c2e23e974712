"""Explanations of runs with settings and networks that are rarely tried, each beside a computation of its own."""

from __future__ import annotations

import copy
import inspect
import math
import tempfile

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkit
from ntkit.base.checks import Refused
from ntkit.explanations.importances import tracking_importance
from ntkit.explanations.surrogate import _Problem
from ntkit.gram.gram_matrix import as_gram
from ntkit.kernels.output_loss import OutputLoss
from ntkit.trajectory.batch_order import batch_indices
from ntkit.trajectory.learning_rates import flow_time
from ntkit.trajectory.replay import Replay
from ntkit.trajectory.reruns import Reruns

F64 = torch.float64
SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y, TEST = drawn(9, 3), torch.arange(9) % 3, drawn(4, 3, seed=1)


# ---------------------------------------------------------------------- contributions of each example

OPTIMIZERS = {
    "dampening, L2, maximize": (
        SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1, "maximize": True}
    ),
    "dampening of 1": (SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 1.0}),
    "nesterov, L2": (SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "L2": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "amsgrad, L2, maximize": (
        Adam,
        {"lr": 0.05, "betas": (0.6, 0.7), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
    ),
    "decoupled": (AdamW, {"lr": 0.05, "betas": (0.7, 0.9), "weight_decay": 0.5}),
}  # fmt: skip
if "decoupled_weight_decay" in inspect.signature(Adam).parameters:  # from torch 2.7
    OPTIMIZERS["decoupled, by Adam"] = (Adam, OPTIMIZERS["decoupled"][1] | {"decoupled_weight_decay": True})


def parts_of_a_linear_model(run, kind, settings: dict, factor, rate):
    """theta as a sum over examples (and, last, of weight decay alone), by the formulas of torch's documentation."""
    n, adam = len(X), kind is not SGD
    decoupled = kind is AdamW or settings.get("decoupled_weight_decay", False)
    theta = run.state(0)["weight"]
    parts, buffer = torch.zeros(n + 1, 3, 3, dtype=F64), torch.zeros(n + 1, 3, 3, dtype=F64)
    square, largest = torch.zeros(3, 3, dtype=F64), torch.zeros(3, 3, dtype=F64)
    beta1, beta2 = settings.get("betas", (settings.get("momentum", 0.0), 0.0))
    decay = settings.get("weight_decay", 0.0)
    for step in range(run.stop["step"]):
        rows = run.batch(step)
        out = X[rows] @ (theta + parts.sum(0)).T
        slope = (out.softmax(1) - F.one_hot(Y[rows], 3)) / len(rows)
        d = torch.zeros(n + 1, 3, 3, dtype=F64)
        for i, s in zip(rows.tolist(), slope, strict=True):
            d[i] += torch.outer(s, X[i])
        whole = d.sum(0)
        d *= factor(whole) * (-1 if settings.get("maximize") else 1)
        lr, before = settings["lr"] * rate(step), theta + parts.sum(0)
        if decay and not decoupled:
            d[-1] += decay * before
        if decoupled:
            parts[-1] -= lr * decay * before
        if adam:
            buffer = beta1 * buffer + (1 - beta1) * d
            square = beta2 * square + (1 - beta2) * d.sum(0) ** 2
            largest = torch.maximum(largest, square) if settings.get("amsgrad") else square
            root = (largest / (1 - beta2 ** (step + 1))).sqrt() + settings.get("eps", 1e-8)
            parts -= lr / (1 - beta1 ** (step + 1)) * buffer / root
        elif beta1:
            buffer = d.clone() if step == 0 else beta1 * buffer + (1 - settings.get("dampening", 0.0)) * d
            parts -= lr * (d + beta1 * buffer if settings.get("nesterov") else buffer)
        else:
            parts -= lr * d
    return parts


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("more", [{}, {"clip": 0.2, "schedule": lambda step: (step > 0) * (step != 4) / (1 + step)}])
def test_contributions_to_a_linear_model_are_those_of_its_optimizer_taken_apart(name, more):
    kind, settings = OPTIMIZERS[name]
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(drawn(3, 3, seed=2))
    run = ntkit.train(
        model, (X, Y), F.cross_entropy, lambda p: kind(p, **settings), steps=7, batch_size=4, **more
    )  # 4, 4, 1: the last batch is shorter
    clip, rate = more.get("clip"), more.get("schedule", lambda step: 1.0)
    factor = lambda g: 1.0 if clip is None else min(1.0, clip / (float(g.norm()) + 1e-6))
    parts = parts_of_a_linear_model(run, kind, settings, factor, rate)
    torch.testing.assert_close(run.state(0)["weight"] + parts.sum(0), model.weight.detach(), rtol=0, atol=1e-12)
    found = ntkit.PathKernel(run).decompose(TEST)
    torch.testing.assert_close(found.contributions, torch.einsum("mp,ncp->mcn", TEST, parts[:-1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.regularization, TEST @ parts[-1].T, rtol=0, atol=1e-12)
    assert found.contributions.abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 1.0},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=lambda s: ", ".join(s),
)
@pytest.mark.parametrize("rate", [lambda s: min(1, s / 3), lambda s: float(s != 4)], ids=["warmup", "pause"])
def test_the_buffer_of_momentum_fills_up_at_a_learning_rate_of_zero(settings, rate):
    model, y = nn.Linear(3, 2, bias=False).double(), drawn(9, 2, seed=3)
    before = model(TEST).detach()
    sgd = lambda params: SGD(params, lr=0.1, **settings)
    run = ntkit.train(model, (X, y), F.mse_loss, sgd, steps=8, batch_size=4, schedule=rate)
    found = tracking_importance(run)
    outputs = found.certificate["initial_factor"] * before + TEST @ X.T @ found.values
    torch.testing.assert_close(outputs, model(TEST).detach(), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- parameters of one number


class Scaled(nn.Module):
    """Two layers, times a parameter without an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(3, 4), nn.Parameter(torch.tensor(1.3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.first(x)))


def outcome(run, before: nn.Module, optimizer, weights: Tensor, clip: float) -> Tensor:
    """Outputs of class 0 after the run with other weights: a plain loop."""
    net = copy.deepcopy(before)
    opt = optimizer(net.parameters())
    for step in range(run.stop["step"]):
        rows = run.batch(step)
        opt.zero_grad()
        (F.cross_entropy(net(X[rows]), Y[rows], reduction="none") * weights[rows]).mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        opt.step()
    return net(TEST).detach()[:, 0]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: SGD(p, lr=0.3, momentum=0.5, nesterov=True),
        lambda p: Adam(p, lr=0.02, betas=(0.5, 0.8), eps=1e-3, amsgrad=True, weight_decay=0.1),
    ],
    ids=["sgd", "adam"],
)
def test_clipping_with_a_parameter_without_an_axis(optimizer):
    torch.manual_seed(0)
    model = Scaled().double()
    before = copy.deepcopy(model)
    run = ntkit.train(model, (X, Y), F.cross_entropy, optimizer, steps=6, batch_size=4, clip=0.1)
    first = lambda out: out[:, 0]
    result = ntkit.influence(run, TEST, measure=first)
    ones, h = torch.ones(9, dtype=F64), 1e-5
    columns = []
    for i in range(3):
        up, down = (outcome(run, before, optimizer, ones + k * h * torch.eye(9)[i], 0.1) for k in (1, -1))
        columns.append((up - down) / (2 * h))
    torch.testing.assert_close(result.scores[:, :3], torch.stack(columns, 1), rtol=1e-6, atol=1e-9)
    assert result.scores[:, :3].abs().min() > 1e-7
    found = ntkit.Retrainings(run, TEST, measure=first).without([[0], [1, 5]])
    for row, removed in zip(found, ([0], [1, 5]), strict=True):
        weights = ones.clone()
        weights[removed] = 0
        torch.testing.assert_close(row, outcome(run, before, optimizer, weights, 0.1), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- outputs without a second axis


def test_a_network_with_outputs_of_one_axis():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    flat, y = nn.Sequential(*copy.deepcopy(model), nn.Flatten(0)), drawn(9, seed=4)
    sgd = lambda params: SGD(params, lr=0.1, momentum=0.5)
    two = ntkit.train(model, (X, y[:, None]), F.mse_loss, sgd, steps=5, batch_size=4)
    one = ntkit.train(flat, (X, y), F.mse_loss, sgd, steps=5, batch_size=4)
    for integration in ("secant", "left"):
        found, same = (ntkit.PathKernel(run, integration=integration).decompose(TEST) for run in (one, two))
        torch.testing.assert_close(found.contributions, same.contributions, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.prediction[:, 0], flat(TEST).detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(ntkit.tracin(one, TEST).scores, ntkit.tracin(two, TEST).scores, rtol=0, atol=1e-13)
    full = ntkit.InfluenceKernel(flat, (X, y), F.mse_loss, damping=0.5)(TEST)[:, :, 0, 0]
    doubled = ntkit.InfluenceKernel(flat, (X, y), F.mse_loss, damping=0.5, outputs=lambda out: 2 * out)(TEST)
    torch.testing.assert_close(doubled, 4 * full, rtol=1e-10, atol=0)
    theta, like = ntkit.TangentKernel(model)(X)[:, :, 0, 0], ntkit.TangentKernel(model)(TEST, X)[:, :, 0, 0]
    inverse = torch.linalg.inv(theta / 9 + 0.5 / 2 * torch.eye(9, dtype=F64))  # D = 2, by Woodbury
    expected = (ntkit.TangentKernel(model)(TEST)[:, :, 0, 0] - like @ inverse @ like.T / 9) / 0.5
    torch.testing.assert_close(full, expected, rtol=1e-10, atol=0)


# ---------------------------------------------------------------------- sums and means, directions


@pytest.mark.parametrize("total", [torch.mean, torch.sum], ids=["mean", "sum"])
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_at_a_minimum_the_curvature_tells_a_sum_from_a_mean(total, curvature):
    loss = lambda out, y: total((out - y) ** 2) / 2
    out = torch.zeros(5, 1, dtype=F64)
    assert OutputLoss(loss, out, out).curvature().ravel().tolist() == [1.0] * 5
    assert OutputLoss(loss, out, out).of_mean == (total is torch.mean)
    model = nn.Linear(3, 1, bias=False).double()
    y = model(X).detach()
    found = ntkit.InfluenceKernel(model, (X, y), loss, damping=0.7, curvature=curvature)(TEST)[:, :, 0, 0]
    C = X.T @ X / 9
    torch.testing.assert_close(found, TEST @ torch.linalg.inv(C + 0.7 * torch.eye(3, dtype=F64)) @ TEST.T)


def test_at_a_minimum_a_loss_that_mixes_examples_is_refused():
    out = torch.zeros(5, 1, dtype=F64)
    with pytest.raises(Refused, match="depends on the other examples"):
        OutputLoss(lambda f, y: ((f - f.mean()) ** 2).mean(), out, out)


@pytest.mark.parametrize("maximize", [False, True])
def test_tracin_of_a_run_that_maximizes_has_the_sign_of_its_steps(maximize):
    model = nn.Linear(3, 3).double()
    before = model(TEST).detach()
    sgd = lambda params: SGD(params, lr=0.1, maximize=maximize)
    run = ntkit.train(model, (X, Y), F.cross_entropy, sgd, steps=1)
    found = ntkit.tracin(run, TEST, output=1, steps=[0]).total / 9
    torch.testing.assert_close(found, (model(TEST).detach() - before)[:, 1], rtol=0, atol=1e-12)


def test_runs_that_maximize_have_no_length_of_flow_and_no_two_directions():
    up = lambda params: SGD(params, lr=0.1, maximize=True)
    run = ntkit.train(nn.Linear(3, 3).double(), (X, Y), F.cross_entropy, up, steps=2)
    with pytest.raises(Refused, match="maximize=True"):
        flow_time(run)
    run = ntkit.train(nn.Linear(3, 3).double(), (X, Y), F.cross_entropy, lambda p: SGD(p, lr=0.1, momentum=1.0), 2)
    with pytest.raises(Refused, match=r"momentum=1\.0"):
        flow_time(run)
    both = lambda params: SGD([{"params": params[:1], "maximize": True}, {"params": params[1:]}], lr=0.1)
    run = ntkit.train(nn.Linear(3, 3).double(), (X, Y), F.cross_entropy, both, steps=2)
    with pytest.raises(Refused, match="some are maximized"):
        ntkit.tracin(run, TEST)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 9], ids=["by samples", "by parameters"])
def test_the_influence_kernel_in_half_precision_is_that_of_the_same_network_in_double(dtype, n):
    torch.manual_seed(3)
    model, x = nn.Linear(3, 3).to(dtype), X[:n].to(dtype)
    half = ntkit.InfluenceKernel(model, (x, Y[:n]), F.cross_entropy, damping=1.0)(TEST.to(dtype))
    double = copy.deepcopy(model).double()
    exact = ntkit.InfluenceKernel(double, (x.double(), Y[:n]), F.cross_entropy, damping=1.0)(TEST.to(dtype).double())
    assert float((half - exact).abs().max() / exact.abs().max()) < 4 * torch.finfo(dtype).eps
    assert math.isfinite(float(half.sum()))


# ---------------------------------------------------------------------- runs again


@pytest.mark.parametrize("together", [64, 2, 1])
def test_runs_with_batches_and_weights_of_their_own(together, monkeypatch):
    """Three runs beside plain loops: each with its own start, rows and weights, some at a time."""
    monkeypatch.setattr("ntkit.trajectory.reruns._TOGETHER", together)
    torch.manual_seed(0)
    model = Scaled().double()
    sgd = lambda params: SGD(params, lr=0.2, momentum=0.5)
    schedule = lambda step: 1 / (1 + step)
    run = ntkit.train(model, (X, Y), F.cross_entropy, sgd, steps=6, batch_size=4, schedule=schedule)
    weights, starts = drawn(3, 9, seed=5).abs(), [Scaled().double() for _ in range(3)]
    batches = torch.randint(0, 9, (3, 3, 4), generator=torch.Generator().manual_seed(6))  # step, run, row
    start = {name: torch.stack([dict(net.named_parameters())[name].detach() for net in starts]) for name in _names()}
    values, ends = Reruns(Replay(run)).run(
        weights, lambda out, k: out[:, k], TEST, start, lambda step: batches[step], steps=3, keep=2
    )
    for k, net in enumerate(starts):
        opt = sgd(net.parameters())
        for step, rows in enumerate(batches[:, k]):
            opt.zero_grad()
            (F.cross_entropy(net(X[rows]), Y[rows], reduction="none") * weights[k, rows]).mean().backward()
            opt.param_groups[0]["lr"] = 0.2 * schedule(2 * step)  # three steps go through the schedule of six
            opt.step()
        torch.testing.assert_close(values[k], net(TEST).detach()[:, k], rtol=0, atol=1e-12)
        if k < 2:
            for name, p in net.named_parameters():
                torch.testing.assert_close(ends[name][k], p.detach(), rtol=0, atol=1e-12)
    assert {len(value) for value in ends.values()} == {2}


def _names() -> list[str]:
    return [name for name, _ in Scaled().named_parameters()]


def test_fresh_runs_have_as_many_epochs_of_batches_as_the_run():
    """7 of 9 examples in batches of 4 are two steps in place of three; a part of an epoch is rounded."""
    sgd = lambda params: SGD(params, lr=0.2)
    made: list[int] = []

    def make(seed: int) -> nn.Module:
        made.append(seed)
        return nn.Linear(3, 3).double()

    for batch, removed, steps, expected in ((4, [0, 1], 6, 4), (2, [0, 8], 9, 7), (4, [3], 7, 5)):
        run = ntkit.train(nn.Linear(3, 3).double(), (X, Y), F.cross_entropy, sgd, steps=steps, batch_size=batch)
        found = ntkit.Retrainings(run, TEST, measure=lambda out: out[:, 0], make=make).without([removed], fresh=1)
        kept = torch.tensor([i for i in range(9) if i not in removed])
        torch.manual_seed(made[-1])
        net = nn.Linear(3, 3).double()
        opt = sgd(net.parameters())
        for step in range(expected):
            rows = kept[batch_indices(made[-1], len(kept), batch, step)]
            opt.zero_grad()
            F.cross_entropy(net(X[rows]), Y[rows]).backward()
            opt.step()
        torch.testing.assert_close(found[0, 0], net(TEST).detach()[:, 0], rtol=0, atol=1e-12)


def test_a_run_without_steps_is_not_trained_again():
    sgd = lambda params: SGD(params, lr=0.2)
    run = ntkit.train(nn.Linear(3, 3).double(), (X, Y), F.cross_entropy, sgd, steps=5, target_loss=100.0)
    assert run.stop["step"] == 0
    with pytest.raises(Refused, match="before its first step"):
        ntkit.Retrainings(run, TEST)


def test_a_folder_of_retrainings_tells_runs_and_targets_apart_whose_measures_are_equal(tmp_path):
    model, slow = nn.Linear(3, 3).double(), lambda params: SGD(params, lr=1e-12)
    for p in model.parameters():
        nn.init.zeros_(p)
    one, two = (ntkit.train(copy.deepcopy(model), (X, Y), F.cross_entropy, slow, steps=k, batch_size=4) for k in (3, 4))
    zeros = torch.zeros(4, dtype=torch.int64)
    ntkit.Retrainings(one, TEST, zeros, measure="logit", path=tmp_path).without([[0]])
    ntkit.Retrainings(one, TEST, zeros, measure="logit", path=tmp_path)
    for run, targets in ((two, zeros), (one, zeros + 1)):
        with pytest.raises(Refused, match="something else"):
            ntkit.Retrainings(run, TEST, targets, measure="logit", path=tmp_path)


def test_tracin_of_a_loop_that_diverged_takes_the_checkpoints_before():
    model = nn.Linear(3, 3).double()
    opt = SGD(model.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as folder:
        with ntkit.record(model, opt, path=f"{folder}/run", record="all") as rec:
            for step in range(5):
                loss = F.cross_entropy(model(X), Y) * (math.nan if step == 2 else 1.0)
                opt.zero_grad()
                loss.backward()
                opt.step()
                rec.step(torch.arange(9), loss)
        run = ntkit.Trajectory.open(f"{folder}/run")
        found = ntkit.tracin(run, TEST, output=0, model=model, data=(X, Y), loss=F.cross_entropy)
        some = ntkit.tracin(run, TEST, output=0, model=model, data=(X, Y), loss=F.cross_entropy, steps=[0, 1, 2])
    assert found.certificate["checkpoints"] == 3
    assert torch.equal(found.scores, some.scores)


def test_the_factors_of_the_axioms_come_from_large_entries():
    """A small entry that is off by 1 % changes the cycles by its own error, not by 1 %."""
    K, alpha = torch.eye(3, dtype=F64) * 2, torch.tensor([3.0, -1.0, 2.0], dtype=F64)
    K[0, 1] = K[1, 0] = K[1, 2] = K[2, 1] = 1.0
    K[0, 2] = K[2, 0] = 1e-6
    scores = K * alpha
    scores[2, 0] += 3e-8
    assert ntkit.check_axioms(scores)["symmetric cycle"] == pytest.approx(1e-8 / 2, rel=1e-6)


def test_the_objective_of_the_surrogate_is_the_same_for_a_mean_and_a_sum():
    f, g, gram = drawn(5, 2), drawn(5, 2, seed=1), as_gram(torch.eye(5, dtype=F64))
    losses = (lambda a, b: ((a - b) ** 2).sum(1).mean() / 2, lambda a, b: ((a - b) ** 2).sum() / 2)
    for loss in losses:
        assert _Problem(gram, f, loss, 1.0).value(g) == pytest.approx(float(((g - f) ** 2).sum()) / 10, rel=1e-12)


@pytest.mark.parametrize("total", [torch.mean, torch.sum], ids=["mean", "sum"])
def test_the_hessian_over_batches_of_unequal_sizes(total):
    x, y, model = drawn(150, 3), drawn(150, 1, seed=1), nn.Linear(3, 1, bias=False).double()
    loss = lambda out, y: total((out - y) ** 2) / 2
    found = ntkit.InfluenceKernel(model, (x, y), loss, damping=0.7, curvature="hessian")(TEST)[:, :, 0, 0]
    C = x.T @ x / 150
    torch.testing.assert_close(found, TEST @ torch.linalg.inv(C + 0.7 * torch.eye(3, dtype=F64)) @ TEST.T)
