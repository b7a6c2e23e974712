"""The path kernel of unusual runs: half and mixed precision, groups, no step or one, gradients at the start only."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.kernels.path import effects
from ntkit.kernels.path.decomposition import PathDecomposition
from ntkit.testing import assert_equal


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, X_TEST = draw(7, 3), torch.arange(7) % 3, draw(4, 3, seed=1)


class Mixed(nn.Module):
    """Words and a hidden layer in one precision, the last layer in another."""

    def __init__(self, first: torch.dtype, last: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.last = nn.Embedding(5, 3), nn.Linear(3, 6), nn.Linear(6, 3)
        self.embed.to(first), self.hidden.to(first), self.last.to(last)

    def forward(self, x):
        return self.last(torch.tanh(self.hidden(self.embed(x).mean(1))).to(self.last.weight))


def trained(model, optimizer, steps=4, x=X, y=Y, loss=F.cross_entropy, **more):
    return ntkit.train(model, (x, y), loss, optimizer, steps=steps, **more)


def gradients(model, x, slope=None):
    """Per-sample gradients by the outputs, or by the outputs times given numbers, summed, over all parameters."""
    params = dict(model.named_parameters())
    out = lambda p: torch.func.functional_call(model, p, (x,))
    J = torch.cat([j.flatten(2) for j in torch.func.jacrev(out)(params).values()], 2).detach()
    return J if slope is None else (J * slope[:, :, None]).sum(1)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_of_two_precisions(optimizer):
    x, x_test = torch.tensor([[0, 1], [2, 3], [4, 4], [1, 2]]), torch.randint(0, 5, (90, 2))
    y, results = torch.tensor([0, 1, 2, 1]), []
    whole = Mixed(torch.float32, torch.float32).double()  # the same start, in one precision
    for model in (whole, Mixed(torch.float32, torch.float64), Mixed(torch.float64, torch.float32)):
        run = trained(model, OPTIMIZERS[optimizer], x=x, y=y)
        results.append(ntkit.PathKernel(run).decompose(x_test, layers=True))
    for other in results[1:]:
        scale = results[0].contributions.abs().max()
        for name in ("contributions", "regularization", "prediction"):
            assert (getattr(other, name) - getattr(results[0], name)).abs().max() < 1e-5 * scale, name
        assert other.layers.keys() == results[0].layers.keys()
    with warnings.catch_warnings():  # what bfloat16 rounds is no sign of a wrong gradient
        warnings.simplefilter("error")
        run = trained(Mixed(torch.bfloat16, torch.float32), OPTIMIZERS[optimizer], x=x, y=y)
        half = ntkit.PathKernel(run).decompose(x_test)
    assert (half.contributions - results[0].contributions).abs().max() < 0.05 * scale


def test_the_mean_over_many_steps_in_half_precision():
    x = X.bfloat16()
    run = trained(nn.Linear(3, 1).bfloat16(), lambda p: torch.optim.SGD(p, lr=0.0), 400, x, x[:, :1], F.mse_loss)
    K = ntkit.PathKernel(run, "trace", integration="left")(x)
    assert K.dtype == torch.bfloat16
    expected = x.double() @ x.double().T + 1
    assert (K.double() - expected).norm() < 0.01 * expected.norm()  # eps is 0.008


def test_a_run_without_a_step(tmp_path):
    model = nn.Linear(3, 3).double()
    with ntkit.record(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "run"):
        pass
    kernel = ntkit.PathKernel(ntkit.Trajectory.open(tmp_path / "run"), model=model, data=(X, Y), loss=F.cross_entropy)
    for _ in range(2):  # the second from its file
        result = kernel.decompose(X_TEST, steps=True, path=tmp_path / "result")
        assert torch.equal(result.prediction, model(X_TEST).detach())
        assert result.error == 0
        assert not result.contributions.any()
        assert result.over_time().shape == result.example_over_time(1).shape == (0, 4, 3)
    for call in (kernel, kernel.diagonal):
        with pytest.raises(ntkit.Refused, match="trajectory: got a run that ended before its first step"):
            call(X_TEST)


def test_one_step_of_momentum():
    model = nn.Linear(3, 3).double()
    start = copy.deepcopy(model)
    run = trained(model, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, dampening=0.5), 1)
    out = start(X)
    slope = torch.autograd.grad(F.cross_entropy(out, Y), out)[0]
    expected = -0.3 * gradients(start, X_TEST) @ gradients(start, X, slope).T
    assert_equal(ntkit.PathKernel(run).decompose(X_TEST).contributions, expected, 1e-12, "one step")


@pytest.mark.parametrize("layers", [False, True])
def test_groups_of_plain_descent_with_rates_of_their_own(layers):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    groups = lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.5, "weight_decay": 0.2}, {"params": p[2:]}], lr=0.1)
    start = copy.deepcopy(model)
    run = trained(model, groups, 1)
    result = ntkit.PathKernel(run, integration="left").decompose(X_TEST, layers=layers)
    out = start(X)
    slope = torch.autograd.grad(F.cross_entropy(out, Y), out)[0]
    first = 3 * 4 + 4
    rates = torch.full((first + 15,), 0.1, dtype=torch.float64).index_fill(0, torch.arange(first), 0.5)
    J = gradients(start, X_TEST)
    assert_equal(result.contributions, -(J * rates) @ gradients(start, X, slope).T, 1e-12, "groups")
    theta = torch.cat([p.detach().flatten() for p in start.parameters()])[:first]
    assert_equal(result.regularization, -0.5 * 0.2 * J[:, :, :first] @ theta, 1e-12, "weight decay")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_gradients_at_the_start(momentum):
    """With "ntk" both sides are at the initial parameters; slopes are those of the run."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    start = copy.deepcopy(model)
    run = trained(model, lambda p: torch.optim.SGD(p, lr=0.5, momentum=momentum), 3, record="all")
    buffer, expected, at = 0.0, 0.0, copy.deepcopy(model)
    for step in range(3):
        run.load(at, step)
        out = at(X)
        slope = torch.autograd.grad(F.cross_entropy(out, Y), out)[0]
        buffer = momentum * buffer + gradients(start, X, slope)
        expected = expected - 0.5 * gradients(start, X_TEST) @ buffer.T
    result = ntkit.PathKernel(run, integration="ntk").decompose(X_TEST)
    assert_equal(result.contributions, expected, 1e-12, "at the start")


def test_the_kernel_at_the_start():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    start = copy.deepcopy(model)
    J = gradients(start, X_TEST)
    kernel = ntkit.PathKernel(trained(model, OPTIMIZERS["sgd"], 3), integration="ntk")
    assert_equal(kernel(X_TEST), torch.einsum("icp,jdp->ijcd", J, J), 1e-12, "ntk")


def test_a_folder_of_another_number_of_nodes(tmp_path):
    run = trained(nn.Linear(3, 3).double(), OPTIMIZERS["sgd"], 1)
    ntkit.PathKernel(run, integration="quadrature", nodes=1).decompose(X_TEST, path=tmp_path / "result")
    with pytest.raises(ntkit.Refused, match=r"another decomposition \(integration differ\)"):
        ntkit.PathKernel(run, integration="quadrature", nodes=2).decompose(X_TEST, path=tmp_path / "result")


def test_weight_decay_of_adamw_at_several_nodes():
    """Embedding rows and dense layers: the sum is the prediction, to the error of the quadrature."""
    x, y = torch.tensor([[0, 1], [2, 3], [4, 4]]), torch.tensor([0, 1, 2])
    run = trained(Mixed(torch.float64, torch.float64), OPTIMIZERS["adamw"], 3, x, y)
    result = ntkit.PathKernel(run, integration="quadrature", nodes=8).decompose(x)
    assert result.regularization.abs().max() > 1e-3
    assert result.error < 1e-11


def test_many_test_points_in_pieces(monkeypatch):
    run = trained(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), OPTIMIZERS["sgd"], 2)
    x = draw(21, 3, seed=2)
    whole = ntkit.PathKernel(run).decompose(x).contributions
    monkeypatch.setattr(effects, "_FACTORS", 1)  # one point at a time: more pieces than lanes
    assert_equal(ntkit.PathKernel(run).decompose(x).contributions, whole, 1e-13, "pieces")


def test_the_tolerance_holds_at_every_point_and_step():
    """One of many test points moves; the first step is short, the second long."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    run = trained(model, lambda p: torch.optim.SGD(p, lr=6.0), 2, schedule=lambda step: (1e-6, 1.0)[step])
    x = torch.cat([X_TEST[:1], torch.zeros(60, 3, dtype=torch.float64)])
    for tolerance, words in ((1e-3, "gauss, at most 2 nodes per step"), (0.9, "gauss, at most 1 node per step")):
        kernel = ntkit.PathKernel(run, integration="quadrature", nodes=4, tolerance=tolerance)
        result = kernel.decompose(x)
        assert result.error <= tolerance
        assert result.integration == words


def test_labels_as_a_list():
    contributions = draw(2, 3, 4)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    result = PathDecomposition(contributions, zero, zero, zero, zero)
    own = result.by_class([0, 1, 0, 2])
    assert_equal(own, torch.stack([contributions[..., k].sum(2) for k in ([0, 2], [1], [3])], 2), 1e-15, "classes")
    assert torch.equal(own, result.by_class(torch.tensor([0, 1, 0, 2]).numpy()))
