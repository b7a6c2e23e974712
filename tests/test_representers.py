"""Generalized representers: importances against their definitions, `explain`, TracIn, axioms, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, mse_loss

import ntkit
from ntkit.base.checks import Refused
from ntkit.explanations import representers, surrogate
from ntkit.testing import assert_equal

F64 = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(outputs=3, width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def linear(outputs=3):
    torch.manual_seed(1)
    return nn.Linear(4, outputs).double()


N = 9
X, LABELS, TEST = drawn(N, 4), torch.arange(N) % 3, drawn(5, 4, seed=1)
SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "L2": {"weight_decay": 0.2},
    "momentum and L2": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3},
    "maximize": {"momentum": 0.5, "weight_decay": 0.2, "maximize": True},
}


def sgd(**settings):
    return lambda params: torch.optim.SGD(params, lr=0.05, **settings)


def size_of(model):
    return float(model(TEST).detach().abs().max())


# ---------------------------------------------------------------------- target


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_target_importance_is_minus_the_slope_of_one_examples_loss(reduction):
    model = network()
    loss = lambda out, y: cross_entropy(out, y, reduction=reduction)
    found = ntkit.target_importance(model, X, LABELS, loss)
    expected = nn.functional.one_hot(LABELS, 3) - model(X).detach().softmax(1)
    assert_equal(found.values, expected, 1e-14, "target importance")
    assert found.certificate["loss_is_mean"] == (reduction == "mean")


def test_target_importance_of_several_inputs_and_output_axes():
    class Two(nn.Module):
        def forward(self, a, b):
            return torch.stack([a, b], 1)

    x, y = {"a": drawn(N, 2), "b": drawn(N, 2, seed=4)}, drawn(N, 2, 2, seed=5)
    found = ntkit.target_importance(Two(), x, y, mse_loss)
    assert_equal(found.values, -2 * (Two()(**x) - y).flatten(1) / 4, 1e-14, "two axes")


# ---------------------------------------------------------------------- tracking


@pytest.mark.parametrize("settings", SGD.values(), ids=SGD)
@pytest.mark.parametrize("clip", [None, 0.2], ids=["", "clipped"])
def test_tracking_importance_of_a_linear_model_is_exact(settings, clip):
    """f_T(x) = initial_factor f_0(x) + sum_i alpha_i K(x_i, x)."""
    model = linear()
    before = model(TEST).detach()
    schedule = lambda step: 1 + 0.3 * (step % 3)
    run = ntkit.train(
        model, (X, LABELS), cross_entropy, sgd(**settings), steps=40, batch_size=4, clip=clip, schedule=schedule
    )
    importance = ntkit.tracking_importance(run)
    factor = importance.certificate["initial_factor"]
    expected = model(TEST).detach() - factor * before
    kernel = ntkit.TangentKernel(model)
    for output in range(3):
        found = ntkit.explain(kernel, importance, X, TEST, output=output, expected=expected)
        assert float(found.residual.abs().max()) < 1e-12 * size_of(model)
    assert (factor == 1) == ("weight_decay" not in settings)
    assert float(importance.values.abs().max()) > 1e-3
    scalar = ntkit.explain(
        lambda a, b: a @ b.T + 1, importance, X, TEST, output=0, expected=expected
    )  # the same kernel
    assert float(scalar.residual.abs().max()) < 1e-12 * size_of(model)


def test_tracking_importance_from_zero_gives_the_outputs_themselves():
    model = linear()
    for p in model.parameters():
        nn.init.zeros_(p)
    run = ntkit.train(model, (X, LABELS), cross_entropy, sgd(), steps=30, batch_size=2)
    kernel, importance = ntkit.TangentKernel(model), ntkit.tracking_importance(run)
    found = ntkit.explain(kernel, importance, X, TEST, expected=model(TEST))
    assert torch.equal(found.outputs, model(TEST).argmax(1))
    assert float(found.residual.abs().max()) < 1e-12 * size_of(model)


def test_tracking_by_a_definition_written_out():
    """Plain SGD on a network: minus the learning rate times the slope of each batch's mean loss, at its parameters."""
    model = network()
    run = ntkit.train(model, (X, LABELS), cross_entropy, sgd(), steps=12, batch_size=4, record="all")
    alpha, copy = torch.zeros(N, 3, dtype=F64), network()
    for step in range(12):
        rows = run.batch(step)
        run.load(copy, step)
        p = copy(X[rows]).detach().softmax(1)
        alpha[rows] -= 0.05 * (p - nn.functional.one_hot(LABELS[rows], 3)) / len(rows)
    assert_equal(ntkit.tracking_importance(run).values, alpha, 1e-13, "tracking")


@pytest.mark.parametrize("settings", SGD.values(), ids=SGD)
def test_live_and_replayed_tracking_have_the_same_bits(settings, tmp_path):
    """A loop of the user's own, with repeated rows, a schedule and a network that is not linear."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **settings)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    tracking = ntkit.TrackingImportance(N, 3)
    with ntkit.record(model, optimizer, tmp_path / "run") as rec:
        for step in range(10):
            rows = torch.tensor([step % N, (3 * step) % N, 0])
            out = model(X[rows])
            out.retain_grad()
            loss = cross_entropy(out, LABELS[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tracking.add(rows, out.grad, optimizer)
            rec.step(rows, loss)
            scheduler.step()
    replayed = ntkit.tracking_importance(
        ntkit.Trajectory.open(tmp_path / "run"), model=network(), data=(X, LABELS), loss=cross_entropy
    )
    assert replayed.certificate["bitwise"] == 1
    assert torch.equal(tracking.importance().values, replayed.values)
    assert tracking.importance().certificate["initial_factor"] == replayed.certificate["initial_factor"]


def test_a_parameter_that_never_has_a_gradient_changes_nothing():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = linear(), nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, x):
            return self.used(x)

    first, second = (
        ntkit.tracking_importance(ntkit.train(model, (X, LABELS), cross_entropy, sgd(momentum=0.9), steps=5)).values
        for model in (linear(), Spare())
    )
    assert torch.equal(first, second)


def test_tracking_of_adam_and_of_groups_with_other_rates_is_refused(tmp_path):
    adam = ntkit.train(network(), (X, LABELS), cross_entropy, torch.optim.Adam, steps=2)
    with pytest.raises(Refused, match=r"Adam.*no such coefficient exists.*PathKernel"):
        ntkit.tracking_importance(adam)
    groups = lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "lr": 0.02}], lr=0.1)
    run = ntkit.train(network(), (X, LABELS), cross_entropy, groups, steps=2)
    with pytest.raises(Refused, match=r"differ from parameter to parameter.*PathKernel"):
        ntkit.tracking_importance(run)
    model = network()
    with pytest.raises(Refused, match="Adam"):
        ntkit.TrackingImportance(N, 3).add(torch.tensor([0]), drawn(1, 3), torch.optim.Adam(model.parameters()))
    with pytest.raises(Refused, match="differ from parameter"):
        ntkit.TrackingImportance(N, 3).add(torch.tensor([0]), drawn(1, 3), groups(list(model.parameters())))


def test_a_run_that_did_not_end_is_refused(tmp_path):
    model = linear()
    optimizer = sgd()(model.parameters())
    arguments = {"model": linear(), "data": (X, LABELS), "loss": cross_entropy}
    with ntkit.record(model, optimizer, tmp_path / "run") as rec:
        loss = cross_entropy(model(X), LABELS)
        loss.backward()
        optimizer.step()
        rec.step(torch.arange(N), loss)
        running = ntkit.Trajectory.open(tmp_path / "run")
        with pytest.raises(Refused, match="a run that is running or was killed"):
            ntkit.tracking_importance(running, **arguments)
        with pytest.raises(Refused, match="a run that is running or was killed"):
            ntkit.tracin(running, TEST, **arguments)
        with pytest.raises(Refused, match="a run that is running or was killed"):
            ntkit.InfluenceKernel(model, (X, LABELS), cross_entropy, time=running)


@pytest.mark.parametrize(
    ("rows", "slope", "message"),
    [
        (torch.tensor([0, N]), drawn(2, 3), f"rows: got 0 to {N}"),
        (torch.tensor([-1, 0]), drawn(2, 3), "rows: got -1 to 0"),
        (torch.tensor([0.0, 1.0]), drawn(2, 3), "torch.float32"),
        (torch.tensor([0, 1]), drawn(3, 3), "slope [3, 3]"),
        (torch.tensor([0, 1]), drawn(2, 4), "slope [2, 4]"),
        (torch.tensor([0]), torch.full((1, 3), float("nan")), "slope: got nan"),
    ],
)
def test_steps_that_do_not_fit_are_refused_and_leave_no_trace(rows, slope, message):
    tracking, optimizer = ntkit.TrackingImportance(N, 3), sgd()(linear().parameters())
    with pytest.raises(Refused) as refused:
        tracking.add(rows, slope, optimizer)
    assert message in str(refused.value)
    assert tracking.importance().certificate["steps"] == 0
    assert not tracking.importance().values.any()


# ---------------------------------------------------------------------- surrogate


def gram(outputs=1):
    kernel = ntkit.TangentKernel(network(), "full" if outputs > 1 else "trace")
    return kernel(X)


def huber(g, f):
    return (1 + (g - f).square()).sqrt().sum(1).mean()


@pytest.mark.parametrize("outputs", [1, 3], ids=["one kernel", "kernel of outputs"])
@pytest.mark.parametrize("l2", [1.0, 1e-4])
@pytest.mark.parametrize("dense", [True, False], ids=["factorized", "by products"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared", huber], ids=["cross-entropy", "squared", "callable"])
def test_the_surrogate_is_a_fixed_point(outputs, l2, dense, loss, monkeypatch):
    if not dense:
        monkeypatch.setattr(surrogate, "_DENSE", 0)
    K, f = gram(outputs), 3 * network()(X).detach()
    found = ntkit.surrogate_importance(K, f, loss=loss, l2=l2)
    flat = K.permute(0, 2, 1, 3).reshape(N * 3, N * 3) if outputs > 1 else torch.kron(K, torch.eye(3, dtype=F64))
    g = (flat @ found.values.reshape(-1)).view(N, 3).requires_grad_()
    if loss == "cross-entropy":
        value = -(f.softmax(1) * log_softmax(g, 1)).sum(1).mean()
    else:
        value = (g - f).square().sum(1).mean() / 2 if loss == "squared" else huber(g, f)
    (slope,) = torch.autograd.grad(value, g)
    gap = float((found.values + slope / l2).norm() / found.values.norm())
    assert gap < 1e-8
    assert found.certificate["kkt_residual"] < 1e-8
    assert found.certificate["kkt_residual"] == pytest.approx(gap, abs=1e-10)
    assert float(found.values.abs().max()) > 1e-4


def test_the_surrogates_minimum_is_below_its_neighbors():
    K, f, l2 = gram(), network()(X).detach(), 0.01
    alpha = ntkit.surrogate_importance(K, f, l2=l2).values

    def objective(a):
        return float(-(f.softmax(1) * log_softmax(K @ a, 1)).sum(1).mean() + l2 / 2 * (a * (K @ a)).sum())

    for seed in range(5):
        change = 1e-3 * drawn(N, 3, seed=seed)
        assert objective(alpha) < min(objective(alpha + change), objective(alpha - change))


def test_the_squared_surrogate_is_ridge_regression():
    K, f = gram(), network()(X).detach()
    ridge = ntkit.KernelRidge(N * 0.3).fit(K, f)
    assert_equal(ntkit.surrogate_importance(K, f, loss="squared", l2=0.3).values, ridge.alpha_, 1e-13, "ridge")
    own = lambda g, f: (g - f).square().sum(1).mean() / 2
    assert_equal(ntkit.surrogate_importance(K, f, loss=own, l2=0.3).values, ridge.alpha_, 1e-12, "by Newton's method")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": torch.diag(torch.tensor([1.0] * (N - 1) + [-0.5], dtype=F64))}, "an eigenvalue of -0.5"),
        ({"K": drawn(N, N)}, "expected a symmetric matrix"),
        ({"K": torch.eye(4)}, "f: got"),
        ({"l2": 0.0}, "l2: got 0.0"),
        ({"loss": "hinge"}, "loss: got 'hinge'"),
        ({"loss": lambda g, f: -(g - f).square().mean()}, "convex in g"),
        ({"loss": lambda g, f: (g - f).square().mean() + g.mean() ** 2}, "depends on the other examples"),
        ({"f": torch.full((N, 3), float("inf"))}, "f: got inf"),
    ],
)
def test_refusals_of_the_surrogate(change, message):
    with pytest.raises(Refused) as refused:
        ntkit.surrogate_importance(**({"K": gram(), "f": network()(X).detach(), "l2": 0.1} | change))
    assert message in str(refused.value)


def test_an_indefinite_matrix_is_noticed_by_the_products_too(monkeypatch):
    monkeypatch.setattr(surrogate, "_DENSE", 0)
    monkeypatch.setattr(surrogate, "_CHECKED", 0)
    Q = torch.linalg.qr(drawn(N, N))[0]
    K = Q @ torch.diag(torch.tensor([1.0] * (N - 1) + [-0.5], dtype=F64)) @ Q.T
    with pytest.raises(Refused, match="positive semidefinite"):
        ntkit.surrogate_importance((K + K.T) / 2, network()(X).detach(), l2=1e-3)


# ---------------------------------------------------------------------- explain


def by_hand(kernel, alpha, outputs):
    values = kernel(TEST, X)
    return torch.stack(
        [
            torch.stack([values[j, i, outputs[j]] @ alpha[i] for i in range(N)])
            if values.ndim == 4
            else values[j] * alpha[:, outputs[j]]
            for j in range(len(TEST))
        ]
    )


@pytest.mark.parametrize("mode", ["full", "trace"])
@pytest.mark.parametrize("memory", [None, 1], ids=["at once", "in strips"])
def test_scores_are_importance_times_kernel(mode, memory):
    kernel, alpha = ntkit.TangentKernel(network(), mode), drawn(N, 3, seed=6)
    alpha -= alpha.mean(0)
    for output in (0, 2, torch.tensor([0, 1, 2, 1, 0])):
        found = ntkit.explain(kernel, alpha, X, TEST, output=output, memory=memory)
        expected = by_hand(kernel, alpha, torch.as_tensor(output).expand(5))
        assert_equal(found.scores, expected, 1e-13, "scores")
        assert_equal(found.total, expected.sum(1), 1e-13, "total")
    sums = torch.stack([ntkit.explain(kernel, alpha, X, TEST, output=c).total for c in range(3)], 1)
    assert torch.equal(ntkit.explain(kernel, alpha, X, TEST, memory=memory).outputs, sums.argmax(1))
    assert len(set(sums.argmax(1).tolist())) > 1


def test_scores_permute_with_the_data():
    order, model = torch.randperm(N, generator=torch.Generator().manual_seed(3)), network()
    kernels = (ntkit.TangentKernel(model), ntkit.ConjugateKernel(model))
    for kernel in kernels:
        first, second = (
            ntkit.explain(kernel, ntkit.target_importance(model, x, y, cross_entropy), x, TEST, output=1).scores
            for x, y in ((X, LABELS), (X[order], LABELS[order]))
        )
        assert_equal(second, first[:, order], 1e-13, "permuted")
    first, second = (
        ntkit.explain(
            ntkit.InfluenceKernel(model, (x, y), cross_entropy, time=20.0),
            ntkit.target_importance(model, x, y, cross_entropy), x, TEST, output=1,
        ).scores
        for x, y in ((X, LABELS), (X[order], LABELS[order]))
    )  # fmt: skip
    assert_equal(second, first[:, order], 1e-11, "permuted, influence")
    alphas = [ntkit.surrogate_importance(gram()[o][:, o], network()(X[o]).detach()) for o in (torch.arange(N), order)]
    assert_equal(alphas[1].values, alphas[0].values[order], 1e-9, "permuted, surrogate")


def test_every_kernel_explains():
    alpha = drawn(N, 3, seed=6)
    model = network()
    kernels = [ntkit.ConjugateKernel(model), ntkit.SketchedKernel(model, 64), ntkit.InfiniteKernel(model)]
    for kernel in (*kernels, lambda a, b: (a @ b.T).exp()):
        for output in (0, 2):
            found = ntkit.explain(kernel, alpha, X, TEST, output=output).scores
            assert_equal(found, by_hand(kernel, alpha, [output] * 5), 1e-12, type(kernel).__name__)


def test_without_an_output_it_is_the_largest_of_the_sums():
    """By a kernel that is not symmetric in its outputs, so that one and the other cannot be mixed up."""
    alpha, blocks = drawn(N, 3, seed=6), drawn(4, 3, 3, 4, seed=7)
    values = torch.einsum("jp,pcdq,iq->jicd", TEST, blocks, X)
    sums = torch.einsum("jicd,id->jc", values, alpha)
    assert (sums.argmax(1) != torch.einsum("jidc,id->jc", values, alpha).argmax(1)).any()
    for memory in (None, 24 * N * 9):  # the second: one test point at a time
        kernel = lambda a, b: torch.einsum("jp,pcdq,iq->jicd", a, blocks, b)
        found = ntkit.explain(kernel, alpha, X, TEST, memory=memory)
        assert found.outputs.tolist() == sums.argmax(1).tolist()
        for j, c in enumerate(found.outputs.tolist()):
            torch.testing.assert_close(found.scores[j], (values[j, :, c] * alpha).sum(1), rtol=1e-12, atol=1e-12)


def test_top_gives_the_largest_scores_and_those_against():
    scores = drawn(4, 6)
    found = ntkit.Explanation(scores)
    for against in (False, True):
        top = found.top(6, against=against)
        expected = scores.argsort(1, descending=not against)
        assert torch.equal(top.examples, expected)
        assert torch.equal(top.values, scores.gather(1, expected))
    for k in (0, 7, 1.5, True):
        with pytest.raises(Refused, match="expected 1 <= k <= 6"):
            found.top(k)


def test_a_path_decomposition_is_an_explanation():
    run = ntkit.train(network(), (X, LABELS), cross_entropy, sgd(weight_decay=0.1), steps=10, batch_size=4)
    path = ntkit.PathKernel(run).decompose(TEST)
    for output in (None, 1, -1):
        found = ntkit.Explanation.of_path(path, output)
        assert torch.equal(found.scores, path.of(output))
        assert float(found.residual.abs().max()) < 1e-12
        assert float(found.expected.abs().max()) > 1e-2
        assert torch.equal(found.top(2).values, path.top(2, output=output).values)
    assert found.outputs.tolist() == [2] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"importance": drawn(N - 1, 3)}, f"x_train: got {N} samples; expected {N - 1}"),
        ({"importance": drawn(N, 2)}, "kernel: got values of shape [5, 9, 3, 3]"),
        ({"importance": torch.full((N, 3), float("nan"))}, "importance: got nan"),
        ({"importance": drawn(N, 3, 1)}, "importance: got shape"),
        ({"output": 3}, "output: got 3; expected an integer from 0 to 2"),
        ({"output": -1}, "output: got -1"),
        ({"output": torch.tensor([0, 1])}, "output: got outputs [0, 1]; expected an integer from 0 to 2, or 5 of them"),
        ({"output": torch.tensor([0, 1, 2, 3, 0])}, "output: got outputs [0, 1, 2, 3, 0]"),
        ({"output": 1.0}, "output: got 1.0"),
        ({"expected": drawn(4)}, "expected: got shape [4]"),
        ({"kernel": "ntk"}, "kernel: got a str"),
        ({"kernel": lambda a, b: a @ b.T / 0}, "kernel: got "),
        ({"x_test": TEST[:0]}, "x_test: got an empty set"),
        ({"memory": "much"}, "memory: got 'much'"),
    ],
)
def test_refusals_of_explain(change, message):
    arguments = {"kernel": ntkit.TangentKernel(network()), "importance": drawn(N, 3), "x_train": X, "x_test": TEST}
    with pytest.raises(Refused) as refused:
        ntkit.explain(**(arguments | change))
    assert message in str(refused.value)


# ---------------------------------------------------------------------- other libraries


def test_explainer_has_the_interfaces_of_other_libraries():
    model = network()
    kernel, alpha = ntkit.TangentKernel(model), ntkit.target_importance(model, X, LABELS, cross_entropy)
    explainer = ntkit.Explainer(
        lambda x, targets: ntkit.explain(kernel, alpha, X, x, output=targets), X, LABELS, batch_size=4
    )
    targets = [0, 1, 2, 0, 1]
    expected = ntkit.explain(kernel, alpha, X, TEST, output=torch.tensor(targets)).scores
    assert_equal(explainer.explain(test_data=TEST, targets=targets), expected, 1e-13, "explain")
    own = ntkit.explain(kernel, alpha, X, X, output=LABELS).scores.diagonal()
    assert_equal(explainer.self_influence(batch_size=2), own, 1e-13, "self-influence")
    assert_equal(explainer.self_influence(), own, 1e-13, "self-influence")
    predicted = ntkit.explain(kernel, alpha, X, TEST).scores
    assert_equal(explainer.influence(TEST), predicted, 1e-13, "influence")
    examples, values = explainer.influence(TEST, k=2, proponents=False)
    assert torch.equal(examples, predicted.argsort(1)[:, :2])
    assert_equal(values, predicted.sort(1).values[:, :2], 1e-13, "opponents")
    with pytest.raises(Refused, match=r"targets: got shape \[2\]"):
        explainer.explain(TEST, [0, 1])
    with pytest.raises(Refused, match=r"scores: got shape \[1, 2\]"):
        ntkit.Explainer(lambda x, targets: drawn(1, 2), X).explain(TEST)
    with pytest.raises(Refused, match="y_train"):
        ntkit.Explainer(lambda x, targets: drawn(1, 2), X, LABELS[:2])


def test_memory_of_explain_is_bounded_by_strips():
    """20,000 test points x 500 training examples: 80 MB of scores, strips of a tenth of that."""
    sizes = []

    def kernel(a, b):
        sizes.append(len(a) * len(b))
        return a @ b.T

    x, test = drawn(500, 2), drawn(20_000, 2, seed=1)
    found = ntkit.explain(kernel, drawn(500), x, test, memory="24 MB")
    assert max(sizes) <= 1_000_000
    assert len(sizes) == 10
    assert found.scores.shape == (20_000, 500)
    assert representers.Explanation is ntkit.Explanation
