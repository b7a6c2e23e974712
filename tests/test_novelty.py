"""Novelty against explicit Jacobians: the part outside the training gradients' span, the posterior, their laws."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import ntkit
from ntkit.base.checks import Refused
from ntkit.measures import novelty as novel

N, M = 12, 9


def network(outputs: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs)).to(dtype)


def points(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def jacobian(model: nn.Module, x: torch.Tensor, scalar=lambda out: out) -> torch.Tensor:
    """[n, outputs x parameters]: the vector whose inner products are the trace kernel."""
    params = dict(model.named_parameters())
    of_one = lambda p, one: scalar(functional_call(model, p, (one[None],)))[0]
    found = vmap(jacrev(of_one), (None, 0))(params, x)
    return torch.cat([found[name].reshape(len(x), -1) for name in params], 1).detach().double()


CASES = {"trace": ("trace", lambda out: out), "callable": (lambda out: out[:, 0], lambda out: out[:, 0])}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_projection_and_the_posterior(case):
    mode, scalar = CASES[case]
    model, x_train, x = network(), points(N, 1), points(M, 2)
    found = ntkit.novelty(ntkit.TangentKernel(model, outputs=mode), x_train, x, ridge=0.3)
    A, B = jacobian(model, x_train, scalar), jacobian(model, x, scalar)
    Q, _ = torch.linalg.qr(A.T)
    outside = (B - B @ Q @ Q.T).norm(dim=1) / B.norm(dim=1)
    torch.testing.assert_close(found.outside, outside, rtol=1e-8, atol=1e-10)
    K, k_x = A @ A.T, B @ A.T
    variance = (B * B).sum(1) - (k_x @ torch.linalg.inv(K + 0.3 * torch.eye(N, dtype=torch.float64)) * k_x).sum(1)
    torch.testing.assert_close(found.deviation, variance.sqrt(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.norm, B.norm(dim=1))
    assert (found.rank, found.ridge) == (N, 0.3)
    assert found.residual < 1e-12
    assert found.floor < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_training_points_lie_inside(dtype):
    model, x_train = network(dtype=dtype), points(N, 1, dtype)
    found = ntkit.novelty(ntkit.TangentKernel(model, outputs="trace"), x_train, x_train.flip(0), ridge=1e-9)
    assert found.outside.max() <= 3 * found.floor
    assert found.floor < (1e-2 if dtype == torch.float32 else 1e-6)
    assert found.deviation.max() < 1e-2 * found.norm.max()


def test_laws():
    model, x_train, x = network(), points(N, 1), points(M, 2)
    kernel = ntkit.TangentKernel(model, outputs="trace")
    found = ntkit.novelty(kernel, x_train, x)
    assert found.outside.min() >= 0
    assert found.outside.max() <= 1
    assert bool((found.deviation <= found.norm).all())
    assert bool((found.deviation >= found.norm * found.outside - 1e-9).all())
    assert found.ridge == pytest.approx(novel.RIDGE * float(kernel.diagonal(x_train).mean()))
    parts = ntkit.novelty(kernel, x_train, x, batch_size=4)  # tiles change nothing but rounding
    torch.testing.assert_close(parts.outside, found.outside)
    torch.testing.assert_close(parts.deviation, found.deviation)
    bare = ntkit.novelty(kernel, x_train, x, ridge=0)
    torch.testing.assert_close(bare.deviation, bare.norm * bare.outside)
    more = ntkit.novelty(kernel, torch.cat([x_train, points(5, 3)]), x)  # more to lean on
    assert bool((more.outside <= found.outside + 1e-9).all())
    half, whole = x[:4] * 0.5, ntkit.novelty(kernel, torch.cat([x_train, x_train[:3]]), x)  # repeated examples
    assert whole.rank == N
    torch.testing.assert_close(whole.outside, found.outside, atol=1e-6, rtol=1e-6)
    assert len(ntkit.novelty(kernel, x_train, half).outside) == 4


def test_more_examples_than_parameters_leave_nothing_outside():
    model = nn.Linear(4, 1).double()
    found = ntkit.novelty(ntkit.TangentKernel(model, outputs="trace"), points(N, 1), points(M, 2))
    assert found.rank == 5
    assert found.outside.max() <= 2 * found.floor


def test_a_gradient_of_zero_is_inside_and_one_of_others_outside():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x_train = torch.eye(4, dtype=torch.float64)[:2]
    x = torch.tensor([[-1.0, 0, 0, 0], [0, 0, 3, 0], [1, 0, 0, 1]], dtype=torch.float64)
    found = ntkit.novelty(ntkit.TangentKernel(model, outputs="trace"), x_train, x, ridge=0.25)
    torch.testing.assert_close(found.outside, torch.tensor([0.0, 1.0, 0.5**0.5], dtype=torch.float64))
    torch.testing.assert_close(found.deviation, torch.tensor([0.0, 3.0, (2 - 1 / 1.25) ** 0.5], dtype=torch.float64))


@pytest.mark.parametrize("factor", [1e-80, 1e100])
def test_gradients_whose_fourth_powers_float64_does_not_hold_are_refused(factor):
    kernel = ntkit.TangentKernel(nn.Linear(3, 1, bias=False).double(), outputs="trace")
    x = points(4, 0)[:, :3] * factor
    with pytest.raises(Refused, match=r"k\(x_train\): got a largest entry of .*; expected between 1e-140 and 1e140"):
        ntkit.novelty(kernel, x, x)


def test_it_takes_any_kernel():
    model, x_train, x = network(2), points(N, 1), points(M, 2)
    y = (x_train[:, 0] > 0).long()
    run = ntkit.train(model, (x_train, y), nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.3), 6)
    path = ntkit.PathKernel(run, outputs="trace")
    found = ntkit.novelty(path, x_train, x, ridge=0.1)
    K, k_x = path(x_train), path(x, x_train)
    variance = path.diagonal(x) - (k_x @ torch.linalg.inv(K + 0.1 * torch.eye(N, dtype=torch.float64)) * k_x).sum(1)
    torch.testing.assert_close(found.deviation, variance.sqrt(), rtol=1e-8, atol=1e-10)
    hidden = ntkit.novelty(ntkit.ConjugateKernel(model), x_train, x)
    A, B = (model[:2](part).detach() for part in (x_train, x))  # 12 vectors of 16 features
    Q, _ = torch.linalg.qr(A.T)
    outside = (B - B @ Q @ Q.T).norm(dim=1) / B.norm(dim=1)
    torch.testing.assert_close(hidden.outside, outside, rtol=1e-6, atol=1e-8)


def test_refusals():
    kernel, x = ntkit.TangentKernel(network(), outputs="trace"), points(N, 1)
    with pytest.raises(Refused, match=r"kernel: got Tensor; expected an ntkit kernel"):
        ntkit.novelty(kernel(x), x, x)
    for mode in ("full", "diagonal"):
        with pytest.raises(Refused, match=r"kernel: got values of shape .* one number per pair"):
            ntkit.novelty(ntkit.TangentKernel(network(), outputs=mode), x, x)
    for ridge in (-1.0, float("nan"), float("inf"), "0.1", True):
        with pytest.raises(Refused, match="ridge"):
            ntkit.novelty(kernel, x, x, ridge=ridge)
    for batch in (0, 2.0, True):
        with pytest.raises(Refused, match="batch_size"):
            ntkit.novelty(kernel, x, x, batch_size=batch)
    for wrong in (x[:0], x * float("nan"), "x"):
        with pytest.raises(Refused, match=r"^x_test: got"):
            ntkit.novelty(kernel, x, wrong)
        with pytest.raises(Refused, match=r"^x_train: got"):
            ntkit.novelty(kernel, wrong, x)
