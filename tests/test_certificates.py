"""Certificates of explanations tell a fault: each by value, where what it certifies is wrong on purpose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import ntkit
from ntkit.explanations import importances, surrogate
from ntkit.kernels.curvature import SpectralFilter

F64 = torch.float64
N = 7


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y = drawn(N, 4), drawn(N, 1, seed=1)


def half_square(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (out - y).square().sum(1).mean() / 2


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)).double()


def jacobian(model: nn.Module) -> torch.Tensor:
    rows = []
    for one in X:
        grads = torch.autograd.grad(model(one[None])[0, 0], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_the_error_by_samples_is_what_the_kernel_misses(monkeypatch):
    """The filter subtracts too much by one percent."""
    model, right = network(5), SpectralFilter.missing
    monkeypatch.setattr(SpectralFilter, "missing", lambda own, values: 1.01 * right(own, values))
    kernel = ntkit.InfluenceKernel(model, (X, Y), half_square, damping=0.3)
    J = jacobian(model)
    exact = J @ torch.linalg.solve(J.T @ J / N + 0.3 * torch.eye(J.shape[1], dtype=F64), J.T)
    gap = float((kernel(X)[:, :, 0, 0] - exact).abs().max() / exact.abs().max())
    assert kernel.certificate["route"] == "samples"
    assert kernel.certificate["error"] == pytest.approx(gap, rel=1e-6)
    assert gap > 1e-3


def test_the_error_by_parameters_is_the_residual_of_the_decomposition(monkeypatch):
    """Eigenvalues that are wrong by one percent."""
    model, right = network(1), torch.linalg.eigh
    J = jacobian(model)
    C = J.T @ J / N
    values, vectors = right(C)

    def wrong(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = right(matrix)
        return values * 1.01, vectors

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    kernel = ntkit.InfluenceKernel(model, (X, Y), half_square, damping=0.3)
    residual = float((C @ vectors - vectors * values * 1.01).norm() / (1.01 * values[-1]))
    assert kernel.certificate["route"] == "parameters"
    assert kernel.certificate["error"] == pytest.approx(residual, rel=1e-6)
    assert residual > 1e-3


@pytest.mark.parametrize("width", [5, 1], ids=["by samples", "by parameters"])
def test_eigenvalues_are_those_of_the_curvature(width):
    """By samples of J J' / n, which has the others of J' J / n."""
    model = network(width)
    J = jacobian(model)
    found = ntkit.InfluenceKernel(model, (X, Y), half_square, time=2.0).certificate
    values = torch.linalg.eigvalsh((J @ J.T if width == 5 else J.T @ J) / N)
    assert found["largest_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-10)
    assert found["smallest_eigenvalue"] == pytest.approx(float(values[0]), rel=1e-6, abs=1e-12)
    assert values[-1] > 2 * abs(values[0])


@pytest.mark.parametrize("loss", ["cross-entropy", "squared"])
def test_a_surrogate_that_is_not_solved_says_so(loss, monkeypatch):
    """Newton's method after one step; a ridge that is solved with another matrix."""
    features, f, l2 = drawn(N, 5, seed=2), 2 - 3 * drawn(N, 3, seed=3), 1e-3
    K = features @ features.T
    K = (K + K.T) / 2
    monkeypatch.setattr(surrogate, "_STEPS", 1)
    wrong = lambda gram, ridge, columns, name: SimpleNamespace(
        status="solved", alpha=torch.linalg.solve(K + 1.5 * ridge * torch.eye(N, dtype=F64), columns)
    )
    monkeypatch.setattr(surrogate, "solve", wrong)
    found = ntkit.surrogate_importance(K, f, loss=loss, l2=l2)
    g = (K @ found.values).requires_grad_()
    of_g = -(f.softmax(1) * g.log_softmax(1)).sum(1) if loss == "cross-entropy" else (g - f).square().sum(1) / 2
    (slope,) = torch.autograd.grad(of_g.sum(), g)
    residual = float((found.values + slope / (N * l2)).norm() / found.values.norm())
    assert found.certificate["kkt_residual"] == pytest.approx(residual, rel=1e-9)
    assert residual > 1e-3
    gap = (g - f).detach()
    assert found.certificate["largest_gap"] == pytest.approx(float(gap.abs().max()), rel=1e-12)
    assert float(gap.abs().max()) > float(gap.max())  # g lies below f there


def test_tracking_of_a_run_that_is_not_replayed_bit_by_bit_says_so(monkeypatch):
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    run = ntkit.train(network(3), (X, Y), mse_loss, sgd, steps=3, batch_size=4)
    assert ntkit.tracking_importance(run).certificate["bitwise"] == 1.0

    class Near(importances.Replay):
        def backwards(self):
            yield from super().backwards()
            self.bitwise = False

    monkeypatch.setattr(importances, "Replay", Near)
    assert ntkit.tracking_importance(run).certificate["bitwise"] == 0.0
