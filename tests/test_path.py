"""The exact path kernel: every architecture and optimiser rebuilds its predictions; the laws of its parts."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from path_case import (
    NETWORKS,
    OPTIMIZERS,
    drawn,
    trained,
)
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.kernels.path import sweep
from ntkit.testing import check_kernel

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# ---------------------------------------------------------------------- the certificate


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_are_rebuilt_exactly(name, optimizer):
    run, model, _, _, test = trained(name, optimizer)
    found = ntkit.PathKernel(run).decompose(test)
    with torch.no_grad():
        torch.testing.assert_close(found.prediction, model(test), rtol=1e-13, atol=1e-15)
    assert (found.prediction - found.initial).abs().max() > 1e-3  # something was learned
    assert found.contributions.abs().max() > 1e-3
    assert found.bitwise
    assert found.error <= 1e-12, found.error
    assert (found.regularization != 0).any() == bool(OPTIMIZERS[optimizer].keywords.get("weight_decay"))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("name", ["relu", "max pool"])
def test_in_single_precision(name, optimizer):
    run, _, _, _, test = trained(name, optimizer, torch.float32, steps=25)
    assert ntkit.PathKernel(run).decompose(test).error <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": lambda step: 0.9**step},
        {"clip": 0.05},
        {"batch_size": None},
        {"batch_size": 1},
        {"record": "all"},
        {"clip": 0.05, "schedule": lambda step: 1 / (1 + step), "optimizer": "adamw"},
        {"clip": 0.05, "optimizer": "nesterov", "record": 4},
    ],
    ids=lambda s: ", ".join(s),
)
def test_schedules_clipping_batches(settings):
    run, _, _, _, test = trained(**settings)
    assert ntkit.PathKernel(run).decompose(test).error <= 1e-12


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        partial(F.cross_entropy, label_smoothing=0.1),
        partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), reduction="sum"),
        F.multi_margin_loss,
        lambda out, y: F.mse_loss(out, F.one_hot(y, 3).to(out)),
        lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 3).to(out)),
        lambda out, y: F.cross_entropy(out, y) + out.std(0).sum(),  # couples the samples of a batch
    ],
)
def test_any_loss_of_the_outputs(loss):
    model, x, y, test = drawn("relu")
    run = ntkit.train(model, (x, y), loss, OPTIMIZERS["momentum"], steps=6, batch_size=4)
    assert ntkit.PathKernel(run).decompose(test).error <= 1e-12


def test_groups_frozen_parameters_and_an_unused_one():
    class Extra(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.register_parameter("extra", nn.Parameter(torch.ones(2, dtype=torch.float64)))  # of no use

    model, x, y, test = drawn("relu")
    model = Extra(*model)
    model[1].weight.requires_grad_(False)

    def two(params):
        return torch.optim.SGD([{"params": params[:2], "lr": 0.3}, {"params": params[2:], "momentum": 0.9}], lr=0.1)

    run = ntkit.train(model, (x, y), F.cross_entropy, two, steps=7, batch_size=4)
    found = ntkit.PathKernel(run).decompose(test, layers=True)
    assert found.error <= 1e-12
    assert "1.weight" not in found.layers


def test_several_inputs_and_named_ones():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, first, second):
            return torch.tanh(self.a(first)) * self.b(second)

    first, second, y = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.arange(6) % 4
    for x in ((first, second), {"second": second, "first": first}):
        run = ntkit.train(Two().double(), (x, y), F.cross_entropy, OPTIMIZERS["adam"], steps=5, batch_size=4)
        found = ntkit.PathKernel(run).decompose(x)
        assert found.error <= 1e-12
        scalar = ntkit.PathKernel(run, outputs=lambda out, y: F.cross_entropy(out, y, reduction="none"))
        assert scalar.decompose(x, y).error <= 1e-12


def test_a_loop_of_ones_own(tmp_path):
    model, x, y, test = drawn("tanh")
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with ntkit.record(model, optimizer, tmp_path / "run") as rec:
        for step in range(7):
            chosen = torch.tensor([step, step + 1, 2, 2])  # one example twice
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            (optimizer.zero_grad(), loss.backward(), nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            (optimizer.step(), rec.step(chosen, loss))
    run = ntkit.Trajectory.open(tmp_path / "run")
    found = ntkit.PathKernel(run, model=start, data=(x, y), loss=F.cross_entropy, clip=0.1).decompose(test)
    assert found.error <= 1e-12
    assert (found.contributions[:, :, 10] == 0).all()  # never used
    with pytest.raises(ntkit.Refused, match="clip"):
        ntkit.PathKernel(run, model=start, data=(x, y), loss=F.cross_entropy).decompose(test)


def test_the_certificate_notices_what_is_wrong():
    run, _, _, _, test = trained("relu", "momentum")
    stepped = sweep.Sweep.step

    def wrong(self, step):
        changed = {name: replace(u, carry=u.carry * (1 + 1e-9)) for name, u in step.updates.items()}
        stepped(self, replace(step, updates=changed))

    with mock.patch.object(sweep.Sweep, "step", wrong):
        assert ntkit.PathKernel(run).decompose(test).error > 1e-11


# ---------------------------------------------------------------------- laws


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_shares_of_layers_and_steps_sum_to_the_whole(optimizer):
    run, *_, test = trained("max pool", optimizer)
    found = ntkit.PathKernel(run).decompose(test, layers=True, steps=True)
    whole = found.contributions
    torch.testing.assert_close(sum(found.layers.values()), whole, rtol=1e-10, atol=1e-13)
    summed = torch.zeros_like(whole)
    for share in found.steps:
        summed.index_add_(2, share.rows, share.values)
    torch.testing.assert_close(summed, whole, rtol=1e-10, atol=1e-13)
    assert [share.step for share in found.steps] == list(range(9))
    torch.testing.assert_close(found.over_time()[-1], whole.sum(2), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.example_over_time(3)[-1], whole[:, :, 3], rtol=1e-10, atol=1e-13)
    plain = ntkit.PathKernel(run).decompose(test)
    torch.testing.assert_close(plain.contributions, whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_parts_of_the_test_set_and_of_memory_change_nothing(optimizer):
    run, _, _, _, test = trained("max pool", optimizer, steps=4)
    whole = ntkit.PathKernel(run).decompose(test)
    tiny = ntkit.PathKernel(run, memory="1 kB").decompose(test)
    torch.testing.assert_close(tiny.contributions, whole.contributions, rtol=1e-10, atol=1e-13)
    alone = ntkit.PathKernel(run).decompose(test[1:2])
    torch.testing.assert_close(alone.contributions[0], whole.contributions[1], rtol=1e-9, atol=1e-13)


def test_snapshots_recorded_or_made_again_give_the_same():
    every, *_, test = trained("relu", "momentum", record="all", steps=20)
    few, *_ = trained("relu", "momentum", record=[7], steps=20)
    one, other = (ntkit.PathKernel(run).decompose(test) for run in (every, few))
    assert torch.equal(one.contributions, other.contributions)


def test_contributions_permute_with_the_data():
    model, x, y, test = drawn("relu")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    found = []
    for rows_ in (torch.arange(len(x)), order):
        run = ntkit.train(copy.deepcopy(model), (x[rows_], y[rows_]), F.cross_entropy, OPTIMIZERS["momentum"], steps=9)
        found.append(ntkit.PathKernel(run).decompose(test).contributions)
    torch.testing.assert_close(found[1], found[0][:, :, order], rtol=1e-8, atol=1e-11)


def test_a_linear_model_is_tracking_importance():
    """Its kernel is constant: contribution_i = - sum_s lr k(x, x_i) slope_is, k = <x, x'> + 1."""
    model, lr = nn.Linear(6, 3).double(), 0.3
    x, y, test = torch.randn(9, 6).double(), torch.arange(9) % 3, torch.randn(4, 6).double()
    run = ntkit.train(model, (x, y), F.cross_entropy, lambda p: torch.optim.SGD(p, lr=lr), steps=12, record="all")
    total = torch.zeros(9, 3).double()
    for step in range(12):
        run.load(model, step)
        total += (model(x).softmax(1) - F.one_hot(y, 3)).detach() / 9
    expected = torch.einsum("mi,ic->mci", test @ x.T + 1, -lr * total)
    for way in ({}, {"integration": "left"}, {"integration": "ntk"}, {"integration": "quadrature", "nodes": 1}):
        found = ntkit.PathKernel(run, **way).decompose(test)
        torch.testing.assert_close(found.contributions, expected, rtol=1e-11, atol=1e-13)
        assert found.error <= 1e-13


def test_small_steps_tend_to_the_tangent_kernel_at_first_order():
    model, x, y, test = drawn("tanh")
    gaps = []
    for lr in (4e-3, 2e-3, 1e-3):
        sgd = partial(torch.optim.SGD, lr=lr)
        run = ntkit.train(copy.deepcopy(model), (x, y), F.cross_entropy, sgd, steps=10, record="all")
        exact, lazy = (ntkit.PathKernel(run, integration=i).decompose(test).contributions for i in ("secant", "ntk"))
        gaps.append(float((exact - lazy).abs().max() / exact.abs().max()))
    assert all(0.45 < b / a < 0.55 for a, b in zip(gaps, gaps[1:], strict=False)), gaps


def test_scalars_of_the_outputs():
    run, _, x, y, test = trained("relu", "momentum")
    full = ntkit.PathKernel(run).decompose(test)
    margin = ntkit.PathKernel(run, outputs=lambda out: out[:, 2] - out[:, 0]).decompose(test)
    expected = full.contributions[:, 2] - full.contributions[:, 0]
    torch.testing.assert_close(margin.contributions[:, 0], expected, rtol=1e-9, atol=1e-12)
    losses = ntkit.PathKernel(run, outputs=lambda out, y: F.cross_entropy(out, y, reduction="none")).decompose(x, y)
    assert losses.error <= 1e-12
    after = F.cross_entropy(run.origin[0](x), y, reduction="none")
    torch.testing.assert_close(losses.prediction[:, 0], after.detach().double())
    assert (losses.prediction < losses.initial).double().mean() > 0.5  # it learned them


# ---------------------------------------------------------------------- quadrature


def test_gauss_is_exact_for_smooth_networks_and_midpoint_of_second_order():
    run, _, _, _, test = trained("tanh", "momentum", record="all")

    def error(**way):
        return ntkit.PathKernel(run, integration="quadrature", **way).decompose(test).error

    assert error(nodes=8) <= 1e-12
    orders = [error(rule="midpoint", nodes=n) for n in (2, 4, 8)]
    assert all(3.8 < a / b < 4.2 for a, b in zip(orders, orders[1:], strict=False)), orders
    assert error(nodes=1, tolerance=1e-9) <= 1e-8
    exact, near = ntkit.PathKernel(run), ntkit.PathKernel(run, integration="quadrature", nodes=12)
    gap = exact.decompose(test).contributions - near.decompose(test).contributions
    assert gap.abs().max() < 1e-3 * near.decompose(test).contributions.abs().max()  # secant and integral: both weights


def test_left_end_and_tangent_kernel_are_approximations():
    run, _, _, _, test = trained("relu", "sgd", record="all")
    left, lazy = (ntkit.PathKernel(run, integration=i).decompose(test) for i in ("left", "ntk"))
    assert 1e-4 < left.error < lazy.error < 1
    assert left.integration == "left"
    hard = ntkit.PathKernel(run, integration="quadrature", rule="midpoint", tolerance=1e-14)
    with mock.patch("ntkit.kernels.path.integration.MOST", 32), pytest.raises(ntkit.Refused, match="tolerance"):
        hard.decompose(test)


# ---------------------------------------------------------------------- as a kernel


@pytest.mark.parametrize("integration", ["secant", "quadrature", "left"])
@pytest.mark.parametrize("outputs", ["full", "trace", lambda out: out[:, 0] - out[:, 1]])
def test_it_is_a_kernel(integration, outputs):
    run, _, x, _, test = trained("tanh", steps=3)
    kernel = ntkit.PathKernel(run, outputs=outputs, integration=integration)
    check_kernel(kernel, x[:5].clone(), test)


def test_the_kernel_of_a_run_that_hardly_moves_is_the_tangent_kernel():
    model, x, y, _ = drawn("tanh")
    run = ntkit.train(model, (x, y), F.cross_entropy, partial(torch.optim.SGD, lr=1e-9), steps=3)
    expected = ntkit.TangentKernel(model)(x)
    torch.testing.assert_close(ntkit.PathKernel(run)(x), expected, rtol=1e-6, atol=1e-8)
    with pytest.raises(ntkit.Refused, match="targets"):
        ntkit.PathKernel(run, outputs=lambda out, y: out[:, 0])(x)


def test_parameters_are_kept_in_memory_or_read_again(monkeypatch):
    run, *_, test = trained("relu", "adam", record="all")
    read, state = [], type(run).state
    monkeypatch.setattr(type(run), "state", lambda self, step: read.append(step) or state(self, step))
    found = []
    one_step = sum(p.nbytes for p in run.origin[0].parameters())
    for size in (2**28, 14 * one_step, 0):  # room for all of nine steps, for what is not on disk, for nothing
        with mock.patch("ntkit.trajectory.replay.MEMORY", size):
            read.clear()
            found.append((ntkit.PathKernel(run).decompose(test), len(read)))
    assert all(torch.equal(one.contributions, found[0][0].contributions) for one, _ in found)
    assert found[0][1] + 9 == found[1][1] < found[2][1]


# ---------------------------------------------------------------------- results, refusals


def test_who_contributed():
    run, _, _, y, test = trained("relu", "momentum")
    found = ntkit.PathKernel(run).decompose(test)
    best = found.top(3)
    own = found.of()
    assert torch.equal(best.values, own.gather(1, best.examples))
    assert (best.values[:, 0] == own.max(1).values).all()
    assert (found.top(2, output=1, against=True).values[:, 0] == found.contributions[:, 1].min(1).values).all()
    mass = found.by_class(y)
    assert mass.shape == (3, 3, 3)
    torch.testing.assert_close(mass.sum(2), found.contributions.sum(2))
    assert found.record()["error"] == found.error
    for call, words in (
        (lambda: found.top(99), "k: got 99"),
        (lambda: found.of(7), "output"),
        (lambda: found.top(2.0), "k: got 2.0"),
        (lambda: found.top(True), "k: got True"),
        (lambda: found.of(1.0), "output: got 1.0"),
        (lambda: found.of(torch.tensor([True, False, True])), r"output: got tensor\(\[ True, False,  True\]\)"),
        (lambda: found.of(torch.tensor([0, 1])), r"output: got 2 outputs; expected an integer, or int64 \[3\]"),
        (lambda: found.plot(1.5), "point: got 1.5"),
        (lambda: found.by_class(y[:2]), "labels"),
        (lambda: found.by_class(y > 0), "labels"),
        (lambda: found.by_class(y - 1), "labels: got class -1"),
        (lambda: found.example_over_time(11), "example: got 11; expected 0 to 10"),
        (lambda: found.example_over_time(-1), "example: got -1"),
        (found.over_time, "steps=True"),
    ):
        with pytest.raises(ntkit.Refused, match=words):
            call()


@CUDA
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_on_a_gpu(optimizer):
    model, x, y, test = drawn("max pool")
    model, x, y, test = model.cuda(), x.cuda(), y.cuda(), test.cuda()
    run = ntkit.train(model, (x, y), F.cross_entropy, OPTIMIZERS[optimizer], steps=6, batch_size=4, record="all")
    assert ntkit.PathKernel(run).decompose(test).error <= 1e-12


def test_the_identity_of_a_function_is_the_same_in_every_process():
    code = (
        "from ntkit.base.function_identity import function_identity\n"
        "def outer(c):\n"
        "    return lambda out: sum([(lambda v: v * c)(v) for v in out if v not in {'a', 'b', 'c'}])\n"
        "print(function_identity(outer(1)), function_identity(outer(2)))\n"
    )
    texts = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    one, other = texts[0].split("outer.<locals>.<lambda> ")[1:]
    assert one.strip() != other.strip()


def test_second_moments_that_vanish_in_half_precision_are_refused():
    """Adam with fused=True trains with them: it works in float32 within a step. The factor is infinite afterwards."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3).half(), 0.01 * torch.randn(6, 1).half()
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
        fused = lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)
        run = ntkit.train(net, (x.to(dtype), y.to(dtype)), F.mse_loss, fused, steps=3)
        assert run.status == "complete"
        calls = [lambda run=run: ntkit.PathKernel(run).decompose(x[:2].to(run.origin[1][0].dtype)).contributions]
        if dtype == torch.float16:
            calls += [lambda run=run: ntkit.influence(run, x[:2], y[:2], measure="loss")]
        for call in calls:
            if dtype == torch.bfloat16:  # of float32's range
                assert bool(call().isfinite().all())
                continue
            with pytest.raises(ntkit.Refused, match=r"at step \d: got second moments of Adam that vanish in float16"):
                call()
