"""Values that are 0 in every network (black images, padding, without biases): s(0) and autograd's s'(0) count there."""

from __future__ import annotations

import math

import pytest
import torch
from infinite_oracle import Act
from torch import nn

from ntkit import InfiniteKernel

ALPHA, SCALE = 1.6732632423543772, 1.0507009873554805
X = torch.tensor([[0, 0, 0], [0, 0, 0], [2.0, -1, 3]], dtype=torch.float64)  # two black samples and one of variance v
V = 14 / 9  # by torch's own weights, of variance 1 / 9
ROOT = math.sqrt(V)


def bent(slope, scale=1.0):
    """E[s'(v)] of scale times z above 0 and slope (e^z - 1) below."""
    return scale * (0.5 + slope * math.exp(V / 2) * math.erfc(ROOT / math.sqrt(2)) / 2)


# module; s(0), s'(0) as PyTorch has it; E[s(v)], E[s'(v)]
CASES = {
    "relu": (nn.ReLU(), 0, 0, ROOT / math.sqrt(2 * math.pi), 0.5),
    "leaky": (nn.LeakyReLU(2.0), 0, 2, -ROOT / math.sqrt(2 * math.pi), 1.5),
    "leaky, opposite slopes": (nn.LeakyReLU(-1.0), 0, -1, 2 * ROOT / math.sqrt(2 * math.pi), 0),
    "selu": (nn.SELU(), 0, SCALE * ALPHA, None, bent(ALPHA, SCALE)),
    "elu, opposite slopes": (nn.ELU(-1.0), 0, -1, None, bent(-1)),
    "threshold": (nn.Threshold(0, 20), 20, 0, 10 + ROOT / math.sqrt(2 * math.pi), 0.5),
    "step": (Act(lambda z: (z > 0).to(z)), 0, 0, 0.5, 0),
    "step from 0 on": (Act(lambda z: (z >= 0).to(z)), 1, 0, 0.5, 0),
    "sign": (Act(torch.sign), 0, 0, 0, 0),
    "relu6": (nn.ReLU6(), 0, 0, None, math.erf(6 / ROOT / math.sqrt(2)) / 2),
    "even, with a slope at 0": (
        Act(lambda z: torch.where(z >= 0, z, -z).clamp(max=2)), 0, 1, None, 0,
    ),
}  # fmt: skip


def network(activation):
    model = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 1)).double()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    return model


@pytest.mark.parametrize("name", CASES)
def test_values_and_slopes_at_zero_are_those_of_the_function(name):
    activation, value, slope, mean, mean_slope = CASES[name]
    model = network(activation)
    covariance = InfiniteKernel(model, "nngp")  # E[s s] / 3
    for p in (model[0].weight, model[2].weight, model[2].bias):
        p.requires_grad_(False)
    kernel = InfiniteKernel(model, "ntk")  # E[s' s'] / 3, of the first bias alone
    for k, own, other in ((covariance, value, mean), (kernel, slope, mean_slope)):
        for got in (k(X), k(X, X.clone())):
            blacks = torch.full((2, 2), own * own / 3, dtype=torch.float64)
            torch.testing.assert_close(got[:2, :2], blacks, rtol=1e-13, atol=1e-190)
            if other is not None or own == 0:
                beside = torch.full((2,), own * (other or 0) / 3, dtype=torch.float64)
                torch.testing.assert_close(got[:2, 2], beside, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(got[2, :2], beside, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(k.diagonal(X), k(X).diagonal(), rtol=1e-14, atol=0)
        torch.testing.assert_close(k.paired(X[:2], X[1:]), k(X)[[0, 1], [1, 2]], rtol=1e-13, atol=1e-190)


@pytest.mark.parametrize("name", ["relu", "leaky", "leaky, opposite slopes"])
def test_with_gradients_they_are_the_same(name):
    model = network(CASES[name][0])
    kernel = InfiniteKernel(model, "ntk")
    x = X.clone().requires_grad_()
    for got, wanted in ((kernel(x), kernel(X)), (kernel(x, X), kernel(X, X)), (kernel.diagonal(x), kernel.diagonal(X))):
        assert got.requires_grad
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-13, atol=1e-15)


def test_positions_of_padding_are_black():
    """A convolution without bias sees nothing but padding at the border; SELU has a slope there, and bias gradients."""
    first = nn.Conv2d(1, 8, 1, padding=1)
    model = nn.Sequential(first, nn.SELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)).double()
    nn.init.zeros_(first.bias)
    nn.init.zeros_(model[4].bias)
    for p in (first.weight, model[4].weight, model[4].bias):
        p.requires_grad_(False)
    x = torch.full((1, 1, 1, 1), math.sqrt(3 * V), dtype=torch.float64)  # variance V at the middle of 3 x 3 positions
    one = (math.erfc(ROOT * math.sqrt(2)) * math.exp(2 * V) * ALPHA**2 + 1) / 2 * SCALE**2  # E[s'(v)^2]
    zero, mean = SCALE * ALPHA, bent(ALPHA, SCALE)
    wanted = (one + 16 * zero * mean + 64 * zero**2) / 81 / 3
    got = InfiniteKernel(model, "ntk")(x)
    torch.testing.assert_close(got, torch.full_like(got, wanted), rtol=1e-11, atol=0)


def test_batch_norm_of_equal_samples_has_the_slope_at_zero():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.LeakyReLU(-1.0), nn.Linear(8, 1)).double().train()
    nn.init.zeros_(model[3].bias)
    for p in (model[0].weight, model[0].bias, model[1].weight, model[3].weight, model[3].bias):
        p.requires_grad_(False)
    x = torch.ones(3, 3, dtype=torch.float64)
    got = InfiniteKernel(model, "ntk")(x)  # of the norm's bias alone: s'(0)^2 / 3
    torch.testing.assert_close(got, torch.full_like(got, 1 / 3), rtol=1e-12, atol=0)


def test_pytorch_has_these_values_and_slopes_at_zero():
    """What the numbers above take for granted of PyTorch."""
    for name, (activation, value, slope, _, _) in CASES.items():
        z = torch.zeros((), dtype=torch.float64, requires_grad=True)
        out = activation(z * 1)
        assert float(out.detach()) == value, name
        if out.requires_grad:
            (g,) = torch.autograd.grad(out, z)
            torch.testing.assert_close(float(g), float(slope), rtol=1e-15, atol=0)
