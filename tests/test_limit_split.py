"""Kinks elsewhere than at 0 between pieces that are no polynomials: found, and tables exact beside their corners."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Act
from test_limit_kinks import CASES, split
from torch import nn

import ntkit
from ntkit import InfiniteKernel, Refused
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.split_integrals import kinked


def of_where(z):
    return torch.where(z > 1, torch.exp(1 - z), z)


# function; value, slope and kinks written down once more for numpy
FUNCTIONS = {
    "clamped tanh": (
        lambda z: torch.tanh(z).clamp(max=0.5),
        lambda z: np.minimum(np.tanh(z), 0.5), lambda z: (np.tanh(z) < 0.5) / np.cosh(z) ** 2, [math.atanh(0.5)],
    ),
    "elu, moved": (
        lambda z: F.elu(z - 1),
        lambda z: np.where(z > 1, z - 1, np.expm1(np.minimum(z, 1) - 1)), lambda z: np.exp(np.minimum(z, 1) - 1), [1.0],
    ),
    "a jump and a kink at 0": (
        lambda z: torch.where(z > 0.5, torch.sigmoid(z), F.elu(z)),
        lambda z: np.where(z > 0.5, 1 / (1 + np.exp(-z)), np.where(z > 0, z, np.expm1(np.minimum(z, 0)))),
        lambda z: np.where(z > 0.5, np.exp(-z) / (1 + np.exp(-z)) ** 2, np.exp(np.minimum(z, 0))), [0.0, 0.5],
    ),
}  # fmt: skip


def test_kinks_are_found():
    cases = {
        "where": (of_where, [1.0]),
        "a silu that ends": (lambda z: F.silu(z).clamp(max=6), [6.014656129136664]),
        "two": (lambda z: F.selu(z).clamp(max=2), [0.0, 2 / 1.0507009873554805]),
        "curvature": (FUNCTIONS["elu, moved"][0], [1.0]),
        "an absolute value": (lambda z: torch.tanh((z - 0.3).abs()), [0.3]),
    }
    for name, (function, places) in cases.items():
        found = kinked(function)
        assert found is not None, name
        np.testing.assert_allclose(found.kinks, places, rtol=1e-9, atol=1e-12, err_msg=name)
    many = lambda z: torch.sin(z).clamp(-0.5, 0.5)
    for function in (torch.tanh, F.elu, F.silu, F.mish, torch.floor, many, lambda z: F.gelu(z, approximate="tanh")):
        assert kinked(function) is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_table_equals_integration_between_the_kinks(name):
    function, value, slope, kinks = FUNCTIONS[name]
    table = Tabulated(function, name)
    table.diagonal(torch.tensor([1 / 16, 16.0], dtype=torch.float64))
    assert table.error < (1e-5 if "jump" in name else 1e-6)  # a jump of values: above 1e-6, and so with a warning
    for a, b, rho in [*CASES, (1, 1.01, 0.9999), (0.5, 0.6, 0.99), (7, 7.5, 1 - 1e-6)]:
        one, two = (torch.full((1, 1, 1, 1), float(v), dtype=torch.float64) for v in (a, b))
        K, T = torch.full_like(one, rho * math.sqrt(a * b)), torch.ones_like(one)
        table.apply(K, T, table.state(one), table.state(two))
        own = [split(value, slope, kinks, v, v, 1) for v in (a, b)]
        for i, (got, wanted) in enumerate(zip((K, T), split(value, slope, kinks, a, b, rho), strict=True)):
            scale = math.sqrt(own[0][i] * own[1][i])
            assert abs(float(got) - wanted) <= (3 * table.error + 1e-9) * scale, (a, b, rho, i)
        for v, squares in zip((a, b), own, strict=True):
            for got, wanted in zip(table.diagonal(torch.tensor([v], dtype=torch.float64)), squares, strict=True):
                assert abs(float(got) - wanted) <= 1e-8 * wanted


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp(function, width=8):
    layers = [nn.Linear(6, width), Act(function), nn.Linear(width, width), Act(function), nn.Linear(width, 1)]
    return nn.Sequential(*layers).double()


def test_wide_networks_tend_to_it():
    model = ntkit.to_ntk_parametrization(mlp(FUNCTIONS["clamped tanh"][0]), 1.4, 0.3)
    for kind in ("ntk", "nngp"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ntkit.convergence(model, X, widths=(64, 1024), seeds=12, kind=kind)
        assert ((found.mean[-1] - found.limit) / found.standard_error[-1]).abs().max() < 5
        assert found.distance[1] < found.distance[0] / 2


# ------------------------------------------------------------------ far out


def test_a_narrow_feature_far_out_is_seen():
    """Of a tent at 40, at standard deviation 60: the mean of squares is its area times the density there."""
    for width in (0.1, 1.0):
        model = nn.Sequential(nn.Linear(6, 8), Act(lambda z, w=width: F.relu(w - (z - 40).abs())), nn.Linear(8, 1))
        x = torch.full((1, 6), 40.0, dtype=torch.float64)
        variance = 2.25 * 1600
        kernel = InfiniteKernel(model.double(), "nngp", 1.5, 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the narrower one cancels to five digits, and says so
            value = float(kernel(x)) / 2.25
        assert kernel.error < 1e-4
        z = torch.linspace(40 - width, 40 + width, 20001, dtype=torch.float64)
        density = torch.exp(-z * z / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        wanted = float(torch.trapezoid((width - (z - 40).abs()).square() * density, z))
        assert value == pytest.approx(wanted, rel=max(kernel.error, 1e-6))


def test_a_feature_too_narrow_for_the_quadrature_is_refused():
    spike = lambda z: torch.tanh(z) + 300 * torch.exp(-((200 * (z - 3.1234)) ** 4))
    with pytest.raises(Refused, match="layer of a spike: got a function whose kernel cannot be computed"):
        Tabulated(spike, "layer of a spike").diagonal(torch.tensor([4.0], dtype=torch.float64))


@pytest.mark.parametrize("function", [lambda z: torch.where(z > 1, torch.exp(z), 0 * z), of_where], ids=["exp", "left"])
def test_what_overflows_is_refused_by_its_layer(function):
    with pytest.raises(Refused, match=r"layer '1' \(Act\).*overflow at standard deviations up to"):
        InfiniteKernel(mlp(function), "ntk", 1.5, 0.1)(600 * X)
