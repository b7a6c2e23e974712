"""Gradient flow and SGD with momentum in function space, in closed form: against training itself, laws, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ntkit.base.checks import Refused
from ntkit.machines.flow import GradientFlow

INF = float("inf")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(kind: str = "full") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and targets, two outputs, of training and test points."""
    p = {"full": 19, "deficient": 5, "zero": 19}[kind]
    phi, phi_test = normal(13, p), normal(7, p, seed=1)
    return (0.0 if kind == "zero" else 1.0) * phi, phi_test, normal(13, 2, seed=2), normal(7, 2, seed=3)


def close(a, b, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def run_sgd(phi, y, lr, momentum, steps, start=None, costs=None) -> list[torch.Tensor]:
    """Weights after every step of torch's own SGD on the linear model phi w + start."""
    w = torch.zeros(phi.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    seen = [w.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        cost = ((phi @ w + (0 if start is None else start) - y) ** 2).sum() / (2 * len(y))
        cost.backward()
        optimizer.step()
        seen.append(w.detach().clone())
        if costs is not None:
            costs.append(cost.item())
    return seen


@pytest.mark.parametrize("kind", ["full", "deficient"])
@pytest.mark.parametrize("lr", [None, 0.05])
def test_it_starts_at_f0_and_ends_at_ridgeless_regression(kind, lr):
    phi, phi_test, y, _ = problem(kind)
    K, K_test, f0, f0_test = phi @ phi.T, phi_test @ phi.T, normal(13, 2, seed=4), normal(7, 2, seed=5)
    flow = GradientFlow(lr).fit(K, y, initial=f0)
    assert flow.status_ == "solved"
    assert flow.residual_ < 1e-13
    close(flow.predict_train(0), f0)
    close(flow.predict(K_test, 0, initial=f0_test), f0_test, rtol=0, atol=0)
    weights = torch.linalg.pinv(phi) @ (y - f0)  # least squares of least norm
    close(flow.predict(K_test, INF, initial=f0_test), f0_test + phi_test @ weights)
    close(flow.predict_train(INF), f0 + phi @ weights)
    close(flow.predict(K_test, 1e7 if lr is None else 10**7, initial=f0_test), f0_test + phi_test @ weights, atol=1e-8)
    if kind == "full":
        close(flow.predict_train(INF), y)
        close(flow.predict(K_test, INF), K_test @ torch.linalg.solve(K, y - f0))


@pytest.mark.parametrize("lr", [None, 0.05])
def test_semigroup(lr):
    phi, phi_test, y, _ = problem()
    K, K_test = phi @ phi.T, phi_test @ phi.T
    s, t = (0.7, 1.9) if lr is None else (5, 17)
    whole = GradientFlow(lr).fit(K, y)
    again = GradientFlow(lr).fit(K, y, initial=whole.predict_train(s))
    close(again.predict_train(t), whole.predict_train(s + t))
    close(again.predict(K_test, t, initial=whole.predict(K_test, s)), whole.predict(K_test, s + t))
    assert not torch.allclose(again.predict_train(t), whole.predict_train(t))  # time itself matters


@pytest.mark.parametrize("kind", ["full", "deficient"])
@pytest.mark.parametrize(("lr", "momentum"), [(0.02, 0.0), (0.15, 0.0), (0.02, 0.9), (0.1, 0.5), (1e-4, 0.99)])
def test_steps_are_those_of_torch_sgd_on_the_linear_model(kind, lr, momentum):
    phi, phi_test, y, _ = problem(kind)
    f0, f0_test = normal(13, 2, seed=4), normal(7, 2, seed=5)
    seen = run_sgd(phi, y, lr, momentum, 60, f0)
    flow = GradientFlow(lr, momentum=momentum).fit(phi @ phi.T, y, initial=f0)
    times = np.array([0, 1, 2, 3, 10, 60])
    train, test = flow.predict_train(times), flow.predict(phi_test @ phi.T, times, initial=f0_test)
    for i, t in enumerate(times):
        close(train[i], phi @ seen[t] + f0, rtol=1e-10, atol=1e-10)
        close(test[i], phi_test @ seen[t] + f0_test, rtol=1e-10, atol=1e-10)
    # the comparison tells neighbouring steps, and momentum from none, apart
    assert (train[5] - (phi @ seen[59] + f0)).abs().max() > 1e-7
    other = GradientFlow(lr, momentum=momentum + 0.005).fit(phi @ phi.T, y, initial=f0)
    assert (other.predict_train(60) - train[5]).abs().max() > 1e-7


def test_momentum_where_the_recursion_has_a_double_root():
    beta, lr = 0.25, 0.1
    rates = torch.tensor([(1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2, 0.0, 1.0], dtype=torch.float64) / lr
    phi, y = torch.diag((4 * rates).sqrt()), torch.ones(4, 1, dtype=torch.float64)
    flow = GradientFlow(lr, momentum=beta).fit(phi @ phi.T, y)
    for t in (0, 1, 2, 7, 40):
        close(flow.predict_train(t), phi @ run_sgd(phi, y, lr, beta, t)[-1])
    # the same by the recursion e+ = (1 + beta - lr lambda) e - beta e-
    before = now = torch.ones(4, dtype=torch.float64)
    for _ in range(40):
        before, now = now, (1 + beta - lr * rates) * now - beta * before
    close(flow.modes(40)[:, 0].abs().sort().values, now.abs().sort().values)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_small_steps_tend_to_the_flow(momentum):
    phi, phi_test, y, _ = problem()
    K, K_test = phi @ phi.T, phi_test @ phi.T
    exact = GradientFlow().fit(K, y).predict(K_test, 0.8)
    errors = []
    for lr in (1e-3, 1e-4, 1e-5):
        steps = round(0.8 * (1 - momentum) / lr)
        errors.append((GradientFlow(lr, momentum=momentum).fit(K, y).predict(K_test, steps) - exact).abs().max().item())
    assert errors[1] < 0.15 * errors[0]
    assert errors[2] < 0.15 * errors[1] < 1e-3


def test_the_loss_falls_as_the_kernel_says():
    phi, _, y, _ = problem()
    K, n, t, h = phi @ phi.T, 13, 0.4, 1e-5
    flow = GradientFlow().fit(K, y)
    r = flow.predict_train(t) - y
    slope = (flow.cost(t + h) - flow.cost(t - h)) / (2 * h)
    expected = -(r * (K @ r)).sum().item() / n**2
    assert slope == pytest.approx(expected, rel=1e-8)
    assert slope != pytest.approx(expected * n, rel=0.1)
    times = torch.linspace(0, 5, 40)
    assert (flow.cost(times).diff() < 0).all()
    assert flow.cost(t) == pytest.approx((r**2).sum().item() / (2 * n), rel=1e-12)


def test_the_modes_decay_at_their_rates_and_add_up():
    phi, _, y, _ = problem()
    K = phi @ phi.T
    flow = GradientFlow().fit(K, y)
    values = torch.linalg.eigvalsh(K / 13).flip(0)
    close(flow.eigenvalues_, values)
    close(flow.modes(0.3), torch.exp(-0.3 * values)[:, None] * flow.modes(0))
    close(flow.eigenvectors_ @ flow.modes([0.3, 2.0]), flow.predict_train([0.3, 2.0]) - y)
    assert flow.max_learning_rate_ == pytest.approx(2 / values[0].item())


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_the_bound_on_the_learning_rate(momentum):
    phi, _, y, _ = problem()
    K = phi @ phi.T
    bound = GradientFlow(0.01, momentum=momentum).fit(K, y).max_learning_rate_
    below, above = (GradientFlow(c * bound, momentum=momentum).fit(K, y) for c in (0.98, 1.02))
    assert below.status_ == "solved"
    assert below.cost(4000) < below.cost(0)
    assert above.status_ == "unstable"
    assert "max_learning_rate_" in above.advice_
    assert above.cost(4000) > 1e6 * above.cost(0)
    assert math.isnan(above.cost(INF))
    close(below.predict_train(INF), y)


def test_rescaling():
    phi, phi_test, y, _ = problem()
    K, K_test, c, times = phi @ phi.T, phi_test @ phi.T, 37.0, torch.tensor([0.1, 1.0, INF], dtype=torch.float64)
    one = GradientFlow().fit(K, y).predict(K_test, times)
    close(GradientFlow().fit(c * K, y).predict(c * K_test, times / c), one)
    close(GradientFlow().fit(K, c * y).predict(K_test, times), c * one)
    close(
        GradientFlow(0.05 / c, momentum=0.5).fit(c * K, y).predict(c * K_test, 30),
        GradientFlow(0.05, momentum=0.5).fit(K, y).predict(K_test, 30),
    )
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    close(GradientFlow().fit(K[order][:, order], y[order]).predict(K_test[:, order], times), one)


def test_one_column_and_arrays_and_no_kernel_at_all():
    phi, phi_test, y, _ = problem()
    K, K_test = phi @ phi.T, phi_test @ phi.T
    both = GradientFlow().fit(K, y)
    one = GradientFlow().fit(K.numpy(), y[:, 0].numpy())
    assert isinstance(one.predict(K_test.numpy(), 1.0), np.ndarray)
    assert one.predict(K_test.numpy(), [1.0, 2.0]).shape == (2, 7)
    assert both.predict(K_test, [1.0, 2.0]).shape == (2, 7, 2)
    assert both.predict(K_test, [1.0]).shape == (1, 7, 2)
    close(one.predict(K_test, 1.0), both.predict(K_test, 1.0)[:, 0])
    zero = GradientFlow().fit(0 * K, y)
    assert zero.max_learning_rate_ == INF
    assert (zero.predict(0 * K_test, [0.0, 1e300, INF]) == 0).all()
    assert (zero.predict_train(INF) == 0).all()


def test_rounding_below_zero_is_not_learned_and_said():
    phi, phi_test, y, _ = problem("deficient")
    rough = (phi.float() @ phi.float().T).double()  # rank 5, and rounding of 1e-6 of either sign
    flow = GradientFlow().fit(rough, y)
    assert flow.eigenvalues_[-1] < 0
    assert flow.status_ == "indefinite"
    assert "float64" in flow.advice_
    exact = GradientFlow().fit(phi @ phi.T, y)
    K_test = phi_test @ phi.T
    for t in (1.0, 1e3, 1e12):
        close(flow.predict_train(t), exact.predict_train(t), rtol=0, atol=1e-4)
        close(exact.predict(K_test, t), phi_test @ torch.linalg.pinv(phi) @ exact.predict_train(t), rtol=0, atol=1e-7)
    in_float = GradientFlow().fit(phi.float() @ phi.float().T, y)  # known to be float32: its rounding is expected
    assert in_float.status_ == "solved"


def test_a_spectrum_down_to_the_rounding_is_followed_at_usual_times():
    x = torch.linspace(0, 1, 30, dtype=torch.float64)[:, None]
    K = torch.exp(-((x - x.T) ** 2) / 2)
    y = torch.sin(5 * x)
    lower = torch.linalg.cholesky(K + 1e-13 * torch.eye(30, dtype=torch.float64))
    seen = run_sgd(lower, y, 0.5, 0.0, 200)
    close(GradientFlow(0.5).fit(K, y).predict_train(200), lower @ seen[200], rtol=0, atol=1e-9)


def test_a_direction_below_the_rounding_still_moves_test_points():
    phi, phi_test, y, _ = problem("deficient")
    phi, phi_test = torch.cat([phi, 1e-9 * normal(13, 1, seed=6)], 1), torch.cat([phi_test, normal(7, 1, seed=7)], 1)
    seen = run_sgd(phi, y, 0.1, 0.9, 300)[300]
    flow = GradientFlow(0.1, momentum=0.9).fit(phi @ phi.T, y)
    assert flow.eigenvalues_[5] < flow.noise_
    close(flow.predict(phi_test @ phi.T, 300), phi_test @ seen, rtol=0, atol=1e-10)
    assert (phi_test[:, -1:] @ seen[-1:]).abs().max() > 1e-8  # its share is above that tolerance


@pytest.mark.parametrize(("lr", "momentum"), [(None, 0.0), (0.01, 0.0), (0.01, 0.8)])
def test_when_to_stop(lr, momentum):
    phi, phi_test = normal(40, 30), normal(200, 30, seed=1)
    w = normal(30, 1, seed=2)
    y, y_val = phi @ w + 6 * normal(40, 1, seed=3), phi_test @ w
    flow = GradientFlow(lr, momentum=momentum).fit(phi @ phi.T, y)
    found = flow.best_time(phi_test @ phi.T, y_val)
    assert not found.at_end

    def error(t):
        return ((flow.predict(phi_test @ phi.T, t) - y_val) ** 2).sum().item() / 400

    assert error(found.t) == pytest.approx(found.error, rel=1e-10)
    if lr is None:
        dense = [error(t) for t in torch.logspace(-3, 3, 500, dtype=torch.float64)]
        assert found.error <= min(dense)
        assert min(dense) < 1.001 * found.error
    else:
        assert found.t == round(found.t)
        assert found.error == pytest.approx(min(error(t) for t in range(0, 1500)), rel=1e-12)


def test_when_to_stop_after_very_many_steps():
    phi, phi_test = normal(40, 30), normal(200, 30, seed=1)
    y, y_val = phi @ normal(30, 1, seed=2) + 6 * normal(40, 1, seed=3), phi_test @ normal(30, 1, seed=2)
    flow = GradientFlow(1e-6, momentum=0.5).fit(phi @ phi.T, y)
    found = flow.best_time(phi_test @ phi.T, y_val)
    assert found.t > 10_000
    steps = found.t + torch.tensor([-3000.0, -30.0, -1.0, 0.0, 1.0, 30.0, 3000.0], dtype=torch.float64)
    errors = ((flow.predict(phi_test @ phi.T, steps) - y_val) ** 2).sum((1, 2)) / 400
    assert found.error == pytest.approx(errors[3].item(), rel=1e-12)
    assert (errors >= errors[3] * (1 - 1e-12)).all()
    assert (errors[[0, 1, 5, 6]] > errors[3] * (1 + 1e-12)).all()


def test_when_stopping_does_not_help():
    phi, phi_test, y, _ = problem()
    K, K_test = phi @ phi.T, phi_test @ phi.T
    flow = GradientFlow().fit(K, y)
    clean = flow.best_time(K_test, K_test @ torch.linalg.solve(K, y))
    assert (clean.t, clean.at_end) == (INF, True)
    assert clean.error < 1e-20
    never = flow.best_time(K_test, -flow.predict(K_test, INF))
    assert (never.t, never.at_end) == (0.0, True)
    shifted = GradientFlow().fit(K, y + 1, initial=torch.ones_like(y))
    one = shifted.best_time(K_test, 1 + K_test @ y / 13, initial_val=torch.ones(7, 2))
    other = flow.best_time(K_test, K_test @ y / 13)
    assert one.t == pytest.approx(other.t, rel=1e-3)
    assert one.error == pytest.approx(other.error, rel=1e-9)


# ------------------------------------------------------------------ any other loss


def half_mse(outputs, y):
    return 0.5 * ((outputs - y) ** 2).sum() / len(y)


def test_any_loss_equals_the_closed_form_where_there_is_one():
    phi, phi_test, y, _ = problem()
    K, K_test, f0, f0_test = phi @ phi.T, phi_test @ phi.T, normal(13, 2, seed=4), normal(7, 2, seed=5)
    closed, solved = GradientFlow().fit(K, y, initial=f0), GradientFlow(loss=half_mse).fit(K, y, initial=f0)
    times = [2.0, 0.0, 0.3, 10.0]
    close(
        solved.predict(K_test, times, initial=f0_test),
        closed.predict(K_test, times, initial=f0_test),
        rtol=0,
        atol=1e-8,
    )
    assert solved.status_ == "solved"
    assert solved.residual_ < 1e-8
    close(solved.predict_train(times), closed.predict_train(times), rtol=0, atol=1e-8)
    close(solved.cost(times), closed.cost(times), rtol=0, atol=1e-8)
    doubled = GradientFlow(loss=lambda f, y: 2 * half_mse(f, y)).fit(K, y, initial=f0)
    close(doubled.predict(K_test, 1.0), closed.predict(K_test, 2.0), rtol=0, atol=1e-8)
    assert (doubled.predict(K_test, 1.0) - closed.predict(K_test, 1.0)).abs().max() > 1e-2


def test_cross_entropy_equals_many_small_steps():
    phi, phi_test, _, _ = problem()
    labels, K = torch.arange(13) % 3, phi @ phi.T
    flow = GradientFlow(loss=nn.functional.cross_entropy).fit(K, labels, initial=torch.zeros(13, 3))
    w = torch.zeros(19, 3, dtype=torch.float64)
    for _ in range(4000):  # midpoint rule, time 2
        at = w
        for step in (2.5e-4, 5e-4):
            at = at.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(phi @ at, labels), at)
            at = w - step * slope
        w = at
    close(flow.predict(phi_test @ phi.T, 2.0), phi_test @ w, rtol=0, atol=1e-6)
    assert flow.cost(2.0) < flow.cost(0.0) == pytest.approx(math.log(3))


def test_a_flow_that_diverges_is_reported():
    phi, _, y, _ = problem()
    flow = GradientFlow(loss=lambda f, y: -(f**4).mean()).fit(phi @ phi.T, y, initial=torch.ones(13, 2))
    found = flow.predict_train([0.0, 1e-6, 5.0])
    assert flow.status_ == "failed"
    assert "time reached" in flow.advice_
    close(found[0], torch.ones(13, 2, dtype=torch.float64))
    assert torch.isfinite(found[1]).all()
    assert torch.isnan(found[2]).all()


def test_a_gradient_that_is_not_of_the_loss_is_reported():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f):
            return (f**2).mean()

        @staticmethod
        def backward(ctx, g):
            return torch.ones(13, 2, dtype=torch.float64) * g / 26

    phi, _, y, _ = problem()
    flow = GradientFlow(loss=lambda f, y: Wrong.apply(f)).fit(phi @ phi.T, y, initial=torch.ones(13, 2))
    flow.predict_train(0.1)
    assert flow.status_ == "inaccurate"
    assert flow.residual_ > 1e-3


def test_refusals():
    phi, phi_test, y, _ = problem()
    K, K_test = phi @ phi.T, phi_test @ phi.T
    flow, steps = GradientFlow().fit(K, y), GradientFlow(0.1).fit(K, y)
    solved = GradientFlow(loss=half_mse).fit(K, y)
    for call, message in [
        (lambda: GradientFlow(lr=0.0), "lr: got 0.0; expected a learning rate > 0"),
        (lambda: GradientFlow(momentum=0.9), "momentum: got no lr"),
        (lambda: GradientFlow(0.1, momentum=1.0), r"momentum: got 1.0; expected a number in \[0, 1\)"),
        (lambda: GradientFlow(0.1, loss=half_mse), "loss: got lr as well"),
        (lambda: GradientFlow(loss="mse"), "loss: got str"),
        (lambda: GradientFlow().predict(K_test), "GradientFlow: got no fitted machine"),
        (lambda: GradientFlow().fit(K[:5], y), "K: got shape"),
        (lambda: GradientFlow().fit(K, y[:5]), "y: got 5 entries; expected 13"),
        (lambda: GradientFlow().fit(K, 5.0), "y: got 1 entries; expected 13"),
        (lambda: GradientFlow().fit(K, y, initial=y[:, 0]), r"initial: got shape \[13\]; expected \[13, 2\]"),
        (lambda: flow.predict(K_test[:, :5]), r"K_test: got shape \[7, 5\]"),
        (lambda: flow.predict(K_test, -1.0), "t: got -1.0; expected times >= 0, or inf"),
        (lambda: flow.predict(K_test, [0.5, math.nan]), "t: got"),
        (lambda: flow.predict(K_test, []), "t: got"),
        (lambda: flow.predict(K_test, 1.0, initial=y), r"initial: got shape \[13, 2\]; expected \[7, 2\]"),
        (lambda: steps.predict(K_test, 1.5), "t: got 1.5; expected whole steps >= 0"),
        (lambda: solved.predict(K_test), "finite ones: a loss has no closed form"),
        (lambda: solved.modes(1.0), "modes: got a flow with loss="),
        (lambda: solved.best_time(K_test, y[:7]), "best_time: got a flow with loss="),
        (lambda: GradientFlow(loss=lambda f, y: f).fit(K, y), r"loss: got shape \[13, 2\]; expected a scalar"),
        (lambda: GradientFlow(loss=lambda f, y: 1.0).fit(K, y), "loss: got float"),
        (
            lambda: GradientFlow(loss=torch.nn.functional.cross_entropy).fit(K, torch.arange(13) % 3),
            r"loss: got .* on outputs \[13\] in float64 and y \[13\] in torch.int64; .*initial, such as zeros \[n, C\]",
        ),
        (lambda: GradientFlow(loss=lambda f, y: f.log().sum()).fit(K, y), "loss: got no finite value"),
        (
            lambda: flow.ensemble(
                K_test, nngp_train=K, nngp_test_train=K_test, nngp_test_test=K_test @ K_test.T, t=[1.0, 2.0]
            ),
            "ensemble: got several times",
        ),
        (
            lambda: (
                GradientFlow()
                .fit(K, y, initial=y)
                .ensemble(K_test, nngp_train=K, nngp_test_train=K_test, nngp_test_test=torch.ones(7), t=1.0)
            ),
            "got initial outputs",
        ),
        (
            lambda: solved.ensemble(K_test, nngp_train=K, nngp_test_train=K_test, nngp_test_test=torch.ones(7), t=1.0),
            "ensemble: got a flow with loss=",
        ),
        (
            lambda: flow.ensemble(
                K_test, nngp_train=K[:3, :3], nngp_test_train=K_test, nngp_test_test=torch.ones(7), t=1.0
            ),
            "nngp_train: got shape",
        ),
        (
            lambda: flow.ensemble(
                K_test, nngp_train=K, nngp_test_train=K_test[:3], nngp_test_test=torch.ones(7), t=1.0
            ),
            "nngp_test_train: got 3 rows",
        ),
        (
            lambda: flow.ensemble(K_test, nngp_train=K, nngp_test_train=K_test, nngp_test_test=torch.ones(6), t=1.0),
            "nngp_test_test: got shape",
        ),
    ]:
        with pytest.raises(Refused, match=message):
            call()
