"""Kernels in GPyTorch's models, beside our own Gaussian process."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

import ntkit


@pytest.fixture
def gpytorch():
    return pytest.importorskip("gpytorch", reason="gpytorch is not installed")


def kernels():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    images = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2)).double()
    return {
        "limit": (ntkit.InfiniteKernel(dense), None),
        "tangent": (ntkit.TangentKernel(dense, "trace"), None),
        "images": (ntkit.TangentKernel(images, "trace"), (2, 2, 2)),
    }


@pytest.mark.parametrize("name", ["limit", "tangent", "images"])
def test_posterior_and_likelihood_are_those_of_our_gaussian_process(gpytorch, name):
    from ntkit import GPyTorchKernel

    kernel, shape = kernels()[name]
    torch.manual_seed(1)
    x, x_test = torch.randn(17, 8).double(), torch.randn(5, 8).double()
    y = torch.sin(x[:, 0])

    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), GPyTorchKernel(kernel, shape)

        def forward(self, points):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(points), self.covar_module(points))

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.3
    model = Model(likelihood).double()
    own = (lambda t: t.view(-1, *shape)) if shape else (lambda t: t)
    K, cross, prior = kernel(own(x)), kernel(own(x_test), own(x)), kernel(own(x_test))
    ours = ntkit.GaussianProcess(0.3).fit(K, y)
    expected = ours.predict(cross, prior)
    scale = float(K.diagonal().mean())
    model.eval()
    with torch.no_grad():
        theirs = model(x_test)
        assert float((theirs.mean - expected.mean.ravel()).abs().max()) < 1e-6
        assert float((theirs.covariance_matrix - expected.covariance).abs().max()) < 1e-6 * scale
        assert float((model.covar_module(x_test, diag=True) - kernel.diagonal(own(x_test))).abs().max()) < 1e-12 * scale
    model.train()
    likelihood.train()
    with torch.no_grad():
        value = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model(x), y)
    noisy = K + 0.3 * torch.eye(17).double()
    exact = -0.5 * (y @ torch.linalg.solve(noisy, y) + torch.linalg.slogdet(noisy)[1] + 17 * math.log(2 * math.pi))
    assert abs(float(value) - float(exact) / 17) < 1e-6


def test_scale_and_noise_are_fitted(gpytorch):
    from ntkit import GPyTorchKernel

    kernel, _ = kernels()["limit"]
    module = gpytorch.kernels.ScaleKernel(GPyTorchKernel(kernel)).double()
    x = torch.randn(4, 8).double()
    module(x).to_dense().sum().backward()
    assert module.raw_outputscale.grad is not None
    assert all(p.grad is None for p in kernel._model.parameters())


def test_gradients_reach_inputs_and_stds(gpytorch):
    """Of a posterior variance, as in a search for the next point: finite differences."""
    from ntkit import GPyTorchKernel

    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 1)).double()
    w = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    x, y, start = torch.randn(6, 3).double(), torch.randn(6).double(), torch.randn(2, 3).double()

    class Model(gpytorch.models.ExactGP):
        def __init__(self, w_std):
            likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
            likelihood.noise = 0.1
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = GPyTorchKernel(ntkit.InfiniteKernel(network, w_std=w_std, b_std=0.1))

        def forward(self, points):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(points), self.covar_module(points))

    def value(points, w_std=w):
        with gpytorch.settings.detach_test_caches(False):  # else GPyTorch takes the training covariance as a constant
            posterior = Model(w_std).double().eval()(points)
            return posterior.variance.sum() + posterior.mean.sin().sum() + posterior.covariance_matrix[0, 1]

    points = start.clone().requires_grad_()
    value(points).backward()
    step = 1e-5
    for i, j in ((0, 0), (0, 2), (1, 1)):
        moved = []
        for sign in (1, -1):
            other = start.clone()
            other[i, j] += sign * step
            moved.append(float(value(other).detach()))
        assert abs(float(points.grad[i, j]) - (moved[0] - moved[1]) / (2 * step)) < 1e-6
    moved = [float(value(start, 1.3 + sign * step).detach()) for sign in (1, -1)]
    assert abs(float(w.grad) - (moved[0] - moved[1]) / (2 * step)) < 1e-6


def test_equal_samples_in_two_tensors_are_two_arguments(gpytorch):
    from ntkit import GPyTorchKernel

    kernel = kernels()["limit"][0]
    constant = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    one, two = constant.clone().requires_grad_(), constant.clone().requires_grad_()
    GPyTorchKernel(kernel)(one, constant).to_dense().sum().backward()
    kernel(two, constant).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=0)


def test_refusals(gpytorch):
    from ntkit import GPyTorchKernel

    kernel, _ = kernels()["tangent"]
    x = torch.randn(4, 8).double()
    with pytest.raises(ntkit.Refused, match="kernel: got Linear; expected a kernel of ntkit"):
        GPyTorchKernel(nn.Linear(2, 1))
    with pytest.raises(ntkit.Refused, match="several values per pair"):
        GPyTorchKernel(ntkit.TangentKernel(kernel._engine.model, "full"))(x).to_dense()
    with pytest.raises(ntkit.Refused, match=r"inputs that require grad, while the values of TangentKernel are const"):
        GPyTorchKernel(kernel)(x.clone().requires_grad_()).to_dense()
    with pytest.raises(ntkit.Refused, match=r"x: got shape \[2, 4, 8\]; expected \[n, d\]"):
        GPyTorchKernel(kernel)(x.expand(2, 4, 8)).to_dense()
    with pytest.raises(ntkit.Refused, match=r"x: got 8 numbers a sample; expected those of \[3, 3\]"):
        GPyTorchKernel(kernel, (3, 3))(x).to_dense()


def test_without_gpytorch(monkeypatch):
    import ntkit.kernels.gpytorch_kernel as module

    monkeypatch.setitem(sys.modules, "gpytorch", None)
    monkeypatch.delitem(vars(module), "GPyTorchKernel", raising=False)
    with pytest.raises(ntkit.Refused, match="got no gpytorch in this Python"):
        _ = module.GPyTorchKernel
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = module.Other
