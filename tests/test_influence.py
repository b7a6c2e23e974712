"""Exact influence: against finite differences of training itself, closed forms, and real deletions.

Long because every part uses one slow reference: training repeated with other weights of the examples.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.trajectory.replay import Replay
from ntkit.trajectory.reruns import Reruns

F64 = torch.float64
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "heavy ball, L2, dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.02, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.02),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5, maximize=True),
    "adam, L2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True, betas=(0.8, 0.9)),
    "two groups": lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "momentum": 0.7}], lr=0.1),
}


class Attention(nn.Module):
    """A transformer block on tokens, small."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        self.last = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.block(self.words(tokens)).mean(1))


def mlp(dtype=F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, 3)).double()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Attention().double()


def lstm() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    return Last().double()


def vectors(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g)


def images(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g)


def tokens(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (n, 4), generator=g), torch.randint(0, 3, (n,), generator=g)


def series(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 2, generator=g, dtype=F64), torch.randint(0, 3, (n,), generator=g)


def trained(make=mlp, data=vectors, optimizer="sgd", n=13, loss=nn.functional.cross_entropy, **settings):
    settings = {"steps": 17, "batch_size": 5, "record": "log"} | settings
    return ntkit.train(make(), data(n), loss, OPTIMIZERS[optimizer], **settings)


def differences(run, x, y, examples, measure="margin", at=1.0, h=2e-4, dtype=F64):
    """Central differences of fourth order, by runs of their own: plain loops, nothing stacked."""
    model, (inputs, targets), loss = run.origin
    settings, groups = run.settings, run.settings["optimizer"]["groups"]
    make = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[
        settings["optimizer"]["class"].split(".")[-1]
    ]

    def measured(weights):
        net = copy.deepcopy(model)
        run.load(net, 0)
        params = dict(net.named_parameters())
        plain = [{**g, "params": [params[name] for name in g["params"]]} for g in groups]
        plain = [{k: v for k, v in g.items() if k != "decoupled_weight_decay"} for g in plain]
        opt = make(plain)
        for step in range(run.stop["step"]):
            rows = run.batch(step)
            out = net(inputs[rows])
            each = torch.stack([loss(out[i : i + 1], targets[r : r + 1]) for i, r in enumerate(rows)])
            opt.zero_grad()
            (each * weights[rows]).mean().backward()
            if settings["clip"] is not None:
                nn.utils.clip_grad_norm_(net.parameters(), settings["clip"])
            for group, rate in zip(opt.param_groups, run.learning_rates[step].tolist(), strict=True):
                group["lr"] = rate
            opt.step()
        out = net(x)
        if measure == "loss":
            return torch.stack([loss(out[j : j + 1], y[j : j + 1]) for j in range(len(y))]).detach()
        own = out.gather(1, y[:, None])[:, 0]
        if measure == "logit":
            return own.detach()
        return (own - out.masked_fill(y[:, None] == torch.arange(out.shape[1]), -math.inf).logsumexp(1)).detach()

    columns = []
    for i in examples:
        values = []
        for k in (1, -1, 2, -2):
            weights = torch.full((len(targets),), at, dtype=dtype)
            weights[i] += k * h
            values.append(measured(weights))
        columns.append((8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h))
    return torch.stack(columns, 1)


def close(a, b, relative):
    assert float((a - b).norm() / b.norm()) <= relative
    assert not float((a * (1 + 20 * relative) - b).norm() / b.norm()) <= relative  # the comparison can fail


# ---------------------------------------------------------------------- finite differences


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finite_differences_of_each_optimizer(optimizer):
    run = trained(optimizer=optimizer)
    x, y = vectors(4, seed=2)
    result = ntkit.influence(run, x, y)
    close(result.scores[:, [0, 7, 12]], differences(run, x, y, [0, 7, 12]), 1e-7)
    assert result.check.error < 1e-7
    assert result.bitwise


@pytest.mark.parametrize("name", ["cnn", "transformer", "lstm"])
@pytest.mark.parametrize("optimizer", ["heavy ball, L2, dampening", "adamw"])
def test_finite_differences_of_networks(name, optimizer):
    make, data = {"cnn": (cnn, images), "transformer": (transformer, tokens), "lstm": (lstm, series)}[name]
    run = trained(make, data, optimizer, steps=11)
    x, y = data(3, seed=2)
    result = ntkit.influence(run, x, y, measure="loss")
    close(result.scores[:, [1, 8]], differences(run, x, y, [1, 8], "loss"), 1e-6)
    assert result.check.error < 1e-6


@pytest.mark.parametrize(
    "more", [{"clip": 0.2}, {"schedule": lambda s: 1 / (1 + s)}, {"batch_size": None}, {"at": 0.5}]
)
@pytest.mark.parametrize("optimizer", ["nesterov", "adam, L2"])
def test_clipping_schedules_full_batches_and_half_weights(more, optimizer):
    at = more.get("at", 1.0)
    run = trained(optimizer=optimizer, **{k: v for k, v in more.items() if k != "at"})
    x, y = vectors(4, seed=2)
    result = ntkit.influence(run, x, y, measure="logit", at=at)
    close(result.scores[:, [0, 5]], differences(run, x, y, [0, 5], "logit", at), 1e-7)


def test_a_recorded_loop_with_an_example_twice_in_a_batch(tmp_path):
    model, (x, y) = mlp(), vectors(9)
    opt = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    with ntkit.record(model, opt, path=tmp_path / "run") as rec:
        for step in range(8):
            rows = torch.tensor([step % 9, (step + 1) % 9, step % 9])
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
            rec.step(rows, loss)
    run = ntkit.Trajectory.open(tmp_path / "run")
    test = vectors(2, seed=3)
    result = ntkit.influence(run, *test, model=model, data=(x, y), loss=nn.functional.cross_entropy)
    assert result.check.error < 1e-7


def test_the_own_loop_of_this_test_and_the_stacked_runs_agree():
    run = trained(optimizer="adamw", clip=0.3)
    replay = Replay(run)
    weights = torch.ones(3, 13, dtype=F64)
    weights[1, 4], weights[2] = 0.0, 0.5
    x, y = vectors(4, seed=2)
    reruns = Reruns(replay)
    values, ends = reruns.run(weights, lambda out, _: out.gather(1, y[:, None])[:, 0], x)
    for name, p in run.origin[0].named_parameters():
        assert torch.allclose(ends[name][0], p, rtol=0, atol=1e-13)
    alone, _ = reruns.run(weights[1:2], lambda out, _: out.gather(1, y[:, None])[:, 0], x)
    assert torch.allclose(values[1:2], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(values[0], values[1], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- closed forms


def test_a_quadratic_loss_on_a_linear_model_has_the_derivative_of_its_closed_form():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=g, dtype=F64), torch.randn(8, 1, generator=g, dtype=F64)
    test = torch.randn(4, 3, generator=g, dtype=F64)
    model = nn.Linear(3, 1, bias=False).double()
    start, lr, steps = model.weight.detach()[0].clone(), 0.1, 25
    run = ntkit.train(model, (x, y), lambda f, t: ((f - t) ** 2).mean() / 2, lambda p: torch.optim.SGD(p, lr=lr), steps)
    result = ntkit.influence(run, test, measure="logit")

    def closed(weights):
        C = (x * weights[:, None]).T @ x / 8
        values, Q = torch.linalg.eigh(C)
        b = (x * weights[:, None]).T @ y[:, 0] / 8
        decay = (1 - lr * values) ** steps
        theta = Q @ (decay * (Q.T @ start) + (1 - decay) / values * (Q.T @ b))
        return test @ theta

    exact = torch.autograd.functional.jacobian(closed, torch.ones(8, dtype=F64))
    close(result.scores, exact, 1e-10)


def test_at_convergence_it_is_the_classical_influence_function():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=g, dtype=F64), torch.randint(0, 3, (12,), generator=g)
    test = torch.randn(3, 4, generator=g, dtype=F64), torch.tensor([0, 1, 2])
    model, decay = nn.Linear(4, 3).double(), 0.05
    sgd = lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=decay)
    run = ntkit.train(model, (x, y), nn.functional.cross_entropy, sgd, steps=2000)
    result = ntkit.influence(run, *test)
    params = [p.detach() for p in model.parameters()]

    def flat(theta):
        return theta[:12].view(3, 4), theta[12:]

    def each(theta, inputs, targets):
        W, b = flat(theta)
        return nn.functional.cross_entropy(inputs @ W.T + b, targets, reduction="none")

    def margin(theta):
        W, b = flat(theta)
        f = test[0] @ W.T + b
        own = f.gather(1, test[1][:, None])[:, 0]
        return own - f.masked_fill(test[1][:, None] == torch.arange(3), -math.inf).logsumexp(1)

    theta = torch.cat([p.flatten() for p in params])
    H = torch.autograd.functional.hessian(lambda t: each(t, x, y).mean(), theta) + decay * torch.eye(15, dtype=F64)
    G = torch.autograd.functional.jacobian(lambda t: each(t, x, y), theta)
    V = torch.autograd.functional.jacobian(margin, theta)
    close(result.scores, -V @ torch.linalg.solve(H, G.T) / 12, 1e-8)


def test_the_gauss_newton_matrix_is_the_hessian_of_a_linear_model():
    run = trained(lambda: nn.Linear(5, 3).double(), optimizer="heavy ball, L2, dampening")
    x, y = vectors(4, seed=2)
    exact, approximate = (ntkit.influence(run, x, y, curvature=c) for c in ("hessian", "gauss-newton"))
    close(approximate.scores, exact.scores, 1e-12)
    nonlinear = trained(optimizer="sgd")
    exact, approximate = (ntkit.influence(nonlinear, x, y, curvature=c) for c in ("hessian", "gauss-newton"))
    assert float((approximate.scores - exact.scores).norm() / exact.scores.norm()) > 1e-3


def test_the_gauss_newton_matrix_of_one_step_by_hand():
    """After two full-batch steps: scores of the first step by V (1 - lr G), with G = J^T D J formed."""
    x, y = vectors(6)
    test = vectors(3, seed=2)
    model = mlp()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    run = ntkit.train(model, (x, y), nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.3), 2, record="all")
    result = ntkit.influence(run, *test, measure="logit", curvature="gauss-newton", steps=True)
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def f(theta, inputs):
        parts = torch.split(theta, [s.numel() for s in shapes])
        params = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, params, (inputs,))

    middle = torch.cat([run.state(1)[name].flatten() for name in names])
    end = torch.cat([run.state(2)[name].flatten() for name in names])
    V = torch.autograd.functional.jacobian(lambda t: f(t, test[0]).gather(1, test[1][:, None])[:, 0], end)
    J = torch.autograd.functional.jacobian(lambda t: f(t, x), middle)
    p = f(middle, x).softmax(1).detach()
    D = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    GN = torch.einsum("ncp,ncd,ndq->pq", J, D, J) / 6
    each = lambda t: nn.functional.cross_entropy(f(t, x), y, reduction="none")
    first = V - 0.3 * V @ GN
    expected = -0.3 * first @ torch.autograd.functional.jacobian(each, start).T / 6
    close(result.steps[0][2], expected, 1e-10)
    assert result.steps[0][0] == 0


# ---------------------------------------------------------------------- parts, order, memory, precision


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_layers_and_steps_sum_to_the_scores(curvature):
    run = trained(optimizer="adamw", clip=0.3)
    x, y = vectors(4, seed=2)
    result = ntkit.influence(run, x, y, curvature=curvature, layers=True, steps=True)
    assert set(result.layers) == {name for name, _ in run.origin[0].named_parameters()}
    close(sum(result.layers.values()), result.scores, 1e-12)
    total = torch.zeros_like(result.scores)
    for _, rows, scores in result.steps:
        total.index_add_(1, rows, scores)
    close(total, result.scores, 1e-12)
    assert [step for step, _, _ in result.steps] == list(range(17))


def test_memory_and_workers_change_nothing_but_rounding(monkeypatch):
    monkeypatch.setattr("ntkit.explanations.unrolled._SHARE", 1)  # one test point is enough for a worker
    run = trained(optimizer="nesterov")
    x, y = vectors(7, seed=2)
    whole = ntkit.influence(run, x, y)
    close(ntkit.influence(run, x, y, memory=9000).scores, whole.scores, 1e-11)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        close(ntkit.influence(run, x, y).scores, whole.scores, 1e-11)
    finally:
        torch.set_num_threads(before)


def test_scores_permute_with_the_data():
    x, y = vectors(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    results = []
    for rows in (torch.arange(10), order):
        sgd = OPTIMIZERS["heavy ball, L2, dampening"]
        run = ntkit.train(mlp(), (x[rows], y[rows]), nn.functional.cross_entropy, sgd, steps=12)
        results.append(ntkit.influence(run, *vectors(3, seed=2)).scores)
    close(results[1], results[0][:, order], 1e-10)


def test_float32_agrees_with_float64():
    x, y = vectors(13)
    test = vectors(3, seed=2)
    scores = []
    for dtype in (torch.float32, F64):
        model = mlp(torch.float32).to(dtype)
        adamw = OPTIMIZERS["adamw"]
        run = ntkit.train(model, (x.to(dtype), y), nn.functional.cross_entropy, adamw, steps=17, batch_size=5)
        result = ntkit.influence(run, test[0].to(dtype), test[1])
        assert result.check.error < (1e-3 if dtype == torch.float32 else 1e-7)
        scores.append(result.scores)
    assert float((scores[0] - scores[1]).norm() / scores[1].norm()) < 1e-3


def test_a_tied_and_an_unused_parameter_and_a_frozen_one():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.unused, self.frozen = nn.Embedding(11, 4), nn.Linear(2, 2), nn.Linear(4, 4)
            self.last = nn.Linear(4, 11, bias=False)
            self.last.weight = self.words.weight
            self.frozen.requires_grad_(False)

        def forward(self, t: Tensor) -> Tensor:
            return self.last(torch.tanh(self.frozen(self.words(t).mean(1))))

    torch.manual_seed(0)
    x, y = tokens(9)
    run = ntkit.train(Tied().double(), (x, y), nn.functional.cross_entropy, OPTIMIZERS["adamw"], steps=7, batch_size=4)
    assert ntkit.influence(run, *tokens(2, seed=2)).check.error < 1e-7


def test_a_loss_that_couples_examples_and_writes_over_the_outputs():
    def coupled(f, y):
        f -= f.mean(0)
        return (f.square().sum(1) * (1 + y)).mean()

    x, y = vectors(9)
    run = ntkit.train(mlp(), (x, y), coupled, OPTIMIZERS["nesterov"], steps=6, batch_size=4)
    test = vectors(2, seed=2)[0]
    for at in (1.0, 0.5):
        assert ntkit.influence(run, test, measure=lambda f: f.square().sum(1), at=at).check.error < 1e-7


# ---------------------------------------------------------------------- real deletions


def test_it_predicts_leaving_one_out():
    data = ntkit.data.load("digits", train=120, seed=0)
    x, y = data.x_train.double().flatten(1), data.y_train
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)
    run = ntkit.train(model, (x, y), nn.functional.cross_entropy, sgd, steps=120, batch_size=30)
    tx, ty = data.x_test[:12].double().flatten(1), data.y_test[:12]
    result = ntkit.influence(run, tx, ty)
    weights = torch.cat([torch.ones(1, 120), 1 - torch.eye(120)])

    def margins(out, _):
        own = out.gather(1, ty[:, None])[:, 0]
        return own - out.masked_fill(ty[:, None] == torch.arange(10), -math.inf).logsumexp(1)

    values, _ = Reruns(Replay(run)).run(weights, margins, tx)
    real = (values[1:] - values[0]).T
    assert _correlation(-result.scores, real) > 0.95
    assert torch.allclose(values[0], result.values, rtol=0, atol=1e-10)
    assert result.smooth
    shuffled = result.scores[:, torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    assert abs(_correlation(-shuffled, real)) < 0.3


def _correlation(a, b):
    """Mean over test points."""
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]).mean())


def test_without_examples_that_change_nothing_the_measures_are_those_of_the_network():
    x, y = vectors(13)
    run = ntkit.train(mlp(), (x, y), nn.functional.cross_entropy, OPTIMIZERS["adamw"], steps=3, batch_size=4)
    unseen = sorted(set(range(13)) - set(torch.cat([run.batch(step) for step in range(3)]).tolist()))
    again = ntkit.Retrainings(run, *vectors(5, seed=2))
    assert torch.allclose(again.without([unseen])[0], again.values, rtol=0, atol=1e-12)
    assert float((again.without([[int(run.batch(0)[0])]])[0] - again.values).abs().min()) > 1e-9
    assert torch.allclose(ntkit.influence(run, *vectors(5, seed=2)).values, again.values, rtol=0, atol=1e-12)
    assert not ntkit.influence(run, *vectors(5, seed=2)).scores[:, unseen].any()


def deep(lr):
    data = ntkit.data.load("digits", train=300, seed=0)
    x, y = data.x_train.double().flatten(1), data.y_train
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(64, 10)).double()
    sgd = lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9)
    run = ntkit.train(model, (x, y), nn.functional.cross_entropy, sgd, steps=200, batch_size=32)
    return run, data.x_test[:5].double().flatten(1), data.y_test[:5]


@pytest.mark.filterwarnings("ignore:The derivatives of")
def test_a_chaotic_run_is_said_to_be_so_first():
    result = ntkit.influence(*deep(0.05))
    assert not result.smooth
    assert result.miss > 0.5
    first = str(result).split("\n")[0]
    assert first.startswith("Do not trust these scores")
    assert f"metasmoothness {result.metasmoothness:.2f}" in first
    assert "InfluenceKernel" in first
    calm = ntkit.influence(*deep(0.002))
    assert calm.smooth
    assert calm.miss < 0.2
    assert str(calm).startswith("Influence of 300")


def test_a_trial_that_diverges_is_said():
    model = nn.Linear(1, 1, bias=False)
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    loss = lambda f, t: ((f - t) ** 2).mean() / 2
    run = ntkit.train(model, (x, y), loss, lambda p: torch.optim.SGD(p, lr=1.999), steps=1000)
    result = ntkit.influence(run, x, measure="logit")
    assert result.miss == math.inf
    assert result.metasmoothness == -1
    assert not result.trusted
    assert result.record()["miss"] is None
    assert str(result).startswith("Do not trust these scores")


def test_the_trial_is_the_change_of_the_measures_with_other_weights():
    run = trained(optimizer="nesterov")
    x, y = vectors(4, seed=2)
    result = ntkit.influence(run, x, y, measure="logit")
    change = 0.05 * torch.randn(13, generator=torch.Generator().manual_seed(0), dtype=F64)
    outputs = Reruns(Replay(run)).run((1 + change)[None], lambda out, _: out.gather(1, y[:, None])[:, 0], x)[0][0]
    real = outputs - result.values
    expected = (result.scores @ change - real).norm() / real.norm()
    assert abs(result.miss - float(expected)) < 1e-9
    assert 1e-4 < result.miss < 0.5


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measure": "margn"}, "Did you mean margin"),
        ({"curvature": "fisher"}, "hessian or gauss-newton"),
        ({"at": 0}, "a weight > 0"),
        ({"measure": "loss"}, "targets for the loss"),
        ({"y_test": torch.zeros(3, dtype=torch.int64)}, "one target per test point"),
        ({"y_test": torch.full((2,), 7)}, "classes from 0 to 2"),
        ({"measure": lambda f: f}, "one scalar per sample"),
        ({"measure": lambda f, t: f[:, 0]}, "targets if"),
        ({"x_test": torch.full((2, 5), math.nan, dtype=F64)}, "finite values"),
    ],
)
def test_refusals(arguments, message):
    run = trained(steps=2)
    arguments = {"x_test": vectors(2, seed=2)[0]} | arguments
    with pytest.raises(Refused, match=message):
        ntkit.influence(run, **arguments)


def test_refuses_what_is_no_run_or_one_opened_without_its_data(tmp_path):
    with pytest.raises(Refused, match="Trajectory"):
        ntkit.influence(mlp(), vectors(2)[0])
    ntkit.train(mlp(), vectors(5), nn.functional.cross_entropy, OPTIMIZERS["sgd"], steps=2, path=tmp_path / "run")
    with pytest.raises(Refused, match="model=, data=, loss="):
        ntkit.influence(ntkit.Trajectory.open(tmp_path / "run"), vectors(2)[0])


def test_an_operation_that_can_be_differentiated_only_once_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Once.apply(torch.tanh(self.first(x))))

    run = ntkit.train(Model().double(), vectors(6), nn.functional.cross_entropy, OPTIMIZERS["sgd"], steps=2)
    with pytest.raises(Refused, match="differentiate only once"):
        ntkit.influence(run, *vectors(2, seed=2))


def test_finite_differences_take_smaller_steps_where_weights_move_units_over_their_kinks():
    data = ntkit.data.load("digits", classes=(3, 8), train=100)
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*first, nn.Flatten(), nn.Linear(256, 2)).double()
    sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)
    loss, x = nn.functional.cross_entropy, data.x_train.double()
    run = ntkit.train(model, (x, data.y_train), loss, sgd, steps=80, batch_size=25)
    result = ntkit.influence(run, data.x_test[:3].double(), data.y_test[:3])
    assert result.check.step < 1e-4
    assert result.check.error < 1e-4
    smooth = ntkit.influence(trained(), *vectors(3, seed=2))
    assert smooth.check.step == 1e-6
    weights, reruns = torch.ones(100, dtype=F64), Reruns(Replay(run), F64)
    y = data.y_test[:3]
    margin = lambda out, _: (2 * out.gather(1, y[:, None])[:, 0] - out.sum(1)).double()
    one_sided = []
    for step in (1e-4, -1e-4):
        large = weights.clone()
        large[result.check.examples[0]] += step
        ends = reruns.run(torch.stack([weights, large]), margin, data.x_test[:3].double(), keep=0)[0]
        one_sided.append((ends[1] - ends[0]) / step)
    assert float((one_sided[0] - one_sided[1]).norm() / one_sided[0].norm()) > 1e-2  # a kink lies between


def test_how_many_examples_are_compared_with_finite_differences():
    run, (x, y) = trained(), vectors(4, seed=2)
    three, one, all_of_them = (ntkit.influence(run, x, y, checks=k) for k in (3, 1, 99))
    best = three.scores.norm(dim=0).argsort(descending=True)
    for result, k in ((three, 3), (one, 1), (all_of_them, 13)):
        assert result.check.examples.tolist() == best[:k].tolist()
        assert result.check.values.shape == (4, k)
        assert result.check.error < 1e-7
    close(all_of_them.check.values[:, [0, 7]], differences(run, x, y, best[[0, 7]]), 1e-7)
    assert "Finite differences of 1 examples" not in str(one)
    for bad in (0, -1, True, 1.5):
        with pytest.raises(Refused, match=r"checks.*at least 1"):
            ntkit.influence(run, x, y, checks=bad)
