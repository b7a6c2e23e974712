"""Wide networks against their limit: Monte Carlo with standard errors, and the rate at which kernels converge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel
from ntkit.measures.convergence import Twin, convergence, finite_kernel, fitted_slope, monte_carlo
from ntkit.networks.parametrization import plain, to_ntk_parametrization
from ntkit.networks.widening import widened

ANGLES = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64) * math.pi
X = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
JACOT = 0.52, 0.340534, 0.096216, -0.011317  # Theta of one hidden layer at these angles, beta = 0.1
JACOT_3 = 0.4025, 0.249001, 0.107849, 0.051957  # of two


def relu(hidden: int, outputs: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(2, 6), nn.ReLU()]
        for _ in range(hidden - 1):
            layers += [nn.Linear(6, 6), nn.ReLU()]
        return to_ntk_parametrization(nn.Sequential(*layers, nn.Linear(6, outputs)).to(dtype), 1.0, 0.1)


def test_one_network_s_kernel_is_that_of_its_parameters():
    model = relu(2, outputs=3)
    expected = ntkit.TangentKernel(model, outputs="trace")(X, X[:2]) / 3
    torch.testing.assert_close(finite_kernel(model, X, X[:2]), expected, rtol=1e-12, atol=1e-14)
    features = model[:-1](X).detach()
    nngp = features @ features.T / 6 + 0.01
    torch.testing.assert_close(finite_kernel(model, X, kind="nngp"), nngp, rtol=1e-12, atol=1e-14)
    outputs = nn.Sequential(model, nn.Tanh())  # no last dense layer: the outputs themselves
    f = outputs(X).detach()
    torch.testing.assert_close(finite_kernel(outputs, X, kind="nngp"), f @ f.T / 3, rtol=1e-12, atol=1e-14)


def test_gradient_descent_of_the_twin_is_that_of_the_parametrization():
    model = relu(2)
    twin, y = Twin.of(model), X[:, :1] * X[:, 1:]
    for net, optimizer in ((model, torch.optim.SGD(model.parameters(), lr=0.7)), (twin.model, twin.sgd(0.7))):
        for _ in range(5):
            optimizer.zero_grad()
            (net(X) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(twin.model(X), model(X), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(twin(X), finite_kernel(model, X), rtol=1e-12, atol=1e-14)
    assert (twin.model(X) - relu(2)(X)).abs().max() > 1e-3


def test_biases_that_start_at_zero_count_nothing():
    model = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 1)).double()
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[2].bias)
    for kind in ("ntk", "nngp"):
        found = monte_carlo(to_ntk_parametrization(model, 1.0), X, width=200, seeds=20, kind=kind)
        expected = InfiniteKernel(model, kind=kind, w_std=1.0, b_std=1e-9)(X)
        z = (found.mean - expected) / (found.standard_error + 1e-12)  # opposite points: exactly zero
        assert z.abs().max() < 5


@pytest.mark.parametrize(("hidden", "expected"), [(1, JACOT), (2, JACOT_3)])
def test_monte_carlo_meets_the_closed_form(hidden, expected):
    found = monte_carlo(relu(hidden), X[:1], X, width=400, seeds=40)
    z = (found.mean[0] - torch.tensor(expected)) / found.standard_error[0]
    assert z.abs().max() < 4.5
    assert found.standard_error.max() < 0.02  # or nothing would be tested
    wrong = (found.mean[0] - 1.3 * torch.tensor(expected)) / found.standard_error[0]
    assert wrong.abs().max() > 4.5


def test_standard_errors_are_those_of_the_mean():
    found = torch.stack([monte_carlo(relu(1), X[:1], width=30, seeds=s).standard_error[0, 0] for s in (20, 320)])
    assert 2.5 < float(found[0] / found[1]) < 6.5  # 4
    a, b = (monte_carlo(relu(1), X, width=30, seeds=3) for _ in range(2))
    assert torch.equal(a.mean, b.mean)  # seeded
    made = [finite_kernel(widened(relu(1), 30, X, seed=seed), X) for seed in range(3)]
    torch.testing.assert_close(a.mean, torch.stack(made).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_single_networks_converge_as_one_over_the_root_of_the_width(kind):
    found = convergence(relu(2), X, widths=(32, 128, 512), seeds=16, kind=kind)
    assert abs(found.slope + 0.5) < 3 * found.slope_error
    assert found.slope_error < 0.1
    assert found.agrees
    assert (found.mean_distance < found.distance).all()
    torch.testing.assert_close(found.limit, InfiniteKernel(plain(relu(2)), kind, 1.0, 0.1)(X), rtol=1e-12, atol=0)
    single = (found.deviation.square().sum((1, 2)) * 15 / 16 + (found.mean - found.limit).square().sum((1, 2))).sqrt()
    torch.testing.assert_close(found.distance, single / found.limit.norm(), rtol=1e-10, atol=0)


def test_a_wrong_limit_is_seen(monkeypatch):
    own = InfiniteKernel.__call__
    monkeypatch.setattr(InfiniteKernel, "__call__", lambda self, x1, x2=None: 1.5 * own(self, x1, x2))
    found = convergence(relu(1), X, widths=(64, 512), seeds=20)
    assert not found.agrees
    assert found.slope > -0.3


def test_torch_own_initialisation_converges_to_its_own_limit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 3))
    found = convergence(model, X.float(), widths=(100, 400), seeds=16)
    assert found.agrees
    assert found.mean_error[-1] < 0.1


def convolution() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
        ).double()  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kind"), [((1.4, 0.2), "ntk"), ((1.4, 0.2), "nngp"), ((None, None), "ntk"), ((None, None), "nngp")]
)
def test_convolutions_converge_to_their_limit(given, kind):
    x = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    model = to_ntk_parametrization(convolution(), *given)
    found = convergence(model, x, widths=(20, 160), seeds=12, kind=kind)
    assert found.agrees
    assert found.mean_error[-1] < 0.1
    z = (found.mean[-1] - found.limit) / found.standard_error[-1]
    assert z.abs().max() < 5


def test_slopes():
    assert fitted_slope([1, 2, 4], [8.0, 4.0, 2.0], [0.1, 0.1, 0.1])[0] == pytest.approx(-1)
    near = fitted_slope([1, 2, 4], [8.0, 4.0, 3.0], [0.01, 0.01, 10.0])[0]
    assert near == pytest.approx(-1, abs=1e-3)  # what is not known well counts little


def test_refusals():
    with pytest.raises(Refused, match=r"seeds: got 1; expected an integer, at least 2"):
        monte_carlo(relu(1), X, width=10, seeds=1)
    with pytest.raises(Refused, match=r"widths: got \(64,\); expected two widths or more"):
        convergence(relu(1), X, widths=(64,))
    for wrong in ([64, 128.5], [True, 64], "64", [0, 64]):
        with pytest.raises(Refused, match=r"widths: got .*; expected a list of positive integers"):
            convergence(relu(1), X, widths=wrong)
    with pytest.raises(Refused, match=r"kind: got 'gp'; expected ntk or nngp"):
        monte_carlo(relu(1), X, width=10, kind="gp")


def test_widths_of_numpy():
    found = [convergence(relu(1), X, widths=w, seeds=2) for w in ([8, 16], np.array([8, 16]), [np.int64(8), 16])]
    assert len({one.slope for one in found}) == 1
    assert {one.widths for one in found} == {(8, 16)}
