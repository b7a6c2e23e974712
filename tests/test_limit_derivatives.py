"""Derivatives of the limit: finite differences of the values without gradients, tips, and a fit of w_std and b_std."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Act, gaussian
from test_infinite import CLOSED, IMAGES, OPEN, S1, S2, V1, V2, VECTORS, X1, X2, B, W, mlp
from test_limit_positions import NETWORKS
from torch import nn

import ntkit
from ntkit import InfiniteKernel, Refused
from ntkit.kernels.infinite import limit_gradients
from ntkit.kernels.infinite.activations import Activation, Rectifier, closed_form
from ntkit.kernels.infinite.differentiable_moments import moments, moments_of_one
from ntkit.kernels.infinite.layers import Layer

R = nn.ReLU
DRAW = torch.Generator().manual_seed(5)
TABLES = {  # networks with an activation by table
    "tanh, flat": r"layer '1' \(Tanh\)",
    "elu, pool": r"layer '1' \(ELU\)",
    "dropout": r"layer '3' \(Tanh\)",
    "layer norm, tanh, layer norm": r"layer '2' \(Tanh\)",
    "ends in an activation": r"layer '1' \(Softplus\)",
}
CASES = {
    **{name: (lambda make=make: nn.Sequential(*make()), X1, X2) for name, make in IMAGES.items()},
    **{f"vectors, {name}": (make, V1, V2) for name, make in VECTORS.items()},
    **{f"positions, {name}": (lambda make=make: make(8), X1, X2) for name, make in NETWORKS.items()},
    "sequences": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 8, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv1d(8, 8, 3),
            Act(torch.erf),
            nn.AvgPool1d(2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(8, 1),
        ),
        S1,
        S2,
    ),
    "smooth images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            Act(torch.sin),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 8, 2, bias=False),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(8, 1),
        ),
        X1,
        X2,
    ),
    "some layers without a bias": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), R(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1, bias=False)),
        V1,
        V2,
    ),
}
TABLE_CASES = {name: TABLES[name.split(", ", 1)[-1] if name.startswith("vectors") else name] for name in CASES if
               (name.split(", ", 1)[-1] if name.startswith("vectors") else name) in TABLES}
DIFFERENTIABLE = [name for name in CASES if name not in TABLE_CASES]


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def network(name):
    """A network, and two samples on the first side, one or two on the second."""
    make, x1, x2 = CASES[name]
    return make().double().eval(), x1[:2], x2[: 1 if x1.dim() > 2 else 2]


def leaf(value):
    return torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_()


def draw(*shape):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


def check(values, derivative, tolerance=1e-8):
    """The derivative of a function of a number at 0 against central differences with two steps.

    Their own error, known from the difference of the two, must be small, too.
    """

    def central(h):
        return float(values(h) - values(-h)) / (2 * h)

    with torch.no_grad():
        rough, fine, scale = central(2e-3), central(1e-3), float(values(0.0).abs())
    wanted, error = (4 * fine - rough) / 3, abs(fine - rough) / 3
    scale += abs(wanted)
    assert error < 1e-4 * scale, f"finite differences know it to {error / scale:.0e} only"
    assert abs(float(derivative) - wanted) <= tolerance * scale, (float(derivative), wanted, error)


# ------------------------------------------------------------------ every layer


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_are_those_without_gradients(name):
    model, x1, x2 = network(name)
    for kind, stds in (("ntk", (W, B)), ("nngp", ())):
        kernel = InfiniteKernel(model, kind, *stds)
        a, b = leaf(x1), leaf(x2)
        for got, wanted in (
            (kernel(a, b), kernel(x1, x2)),
            (K := kernel(a), kernel(x1)),
            (kernel.diagonal(a), kernel.diagonal(x1)),
            (kernel.paired(a[:1], b[:1]), kernel.paired(x1[:1], x2[:1])),
        ):
            assert got.requires_grad and not wanted.requires_grad
            assert float((got.detach() - wanted).abs().max()) <= 1e-13 * float(wanted.abs().max())
        assert torch.equal(K, K.T)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_equal_finite_differences(name):
    """By both sides, `w_std` and `b_std`, of two sets and of one, with random weights of the entries.

    Vectors along each of the four, images along a random direction in all four at once.
    """
    model, x1, x2 = network(name)
    one, two = draw(len(x1), len(x2)), draw(len(x1), len(x1))

    def values(place, kind):
        kernel = InfiniteKernel(model, kind, *place[2:])
        return (kernel(*place[:2]) * one).sum() + (kernel(place[0]) * two).sum()

    at = [leaf(t) for t in (x1, x2, W, B)]
    for kind in ("ntk", "nngp") if x1.dim() < 4 else ("ntk",):
        grads = torch.autograd.grad(values(at, kind), at)
        assert all(g.isfinite().all() for g in grads)
        whole = [draw(*t.shape) / math.sqrt(max(1, t.numel())) for t in at]
        alone = [[u * (i == j) for j, u in enumerate(whole)] for i in range(4)]
        for direction in alone if x1.dim() < 4 else [whole]:
            wanted = sum((g * u).sum() for g, u in zip(grads, direction, strict=True))

            def along(t, direction=direction, kind=kind):
                return values([p.detach() + t * u for p, u in zip(at, direction, strict=True)], kind)

            check(along, wanted)


@pytest.mark.parametrize("name", TABLE_CASES)
def test_activations_by_table_are_refused_by_name(name):
    model, x1, _ = network(name)
    kernel = InfiniteKernel(model, "ntk", W, B)
    with pytest.raises(Refused, match=f"{TABLE_CASES[name]}.*gradients of the kernel.*no_grad"):
        kernel(leaf(x1))
    with torch.no_grad():
        assert torch.equal(kernel(leaf(x1)), kernel(x1))


def test_piecewise_activations_and_unknown_layers_are_refused_by_name(monkeypatch):
    with pytest.raises(Refused, match=r"layer '1' \(ReLU6\): got gradients"):
        InfiniteKernel(mlp(nn.ReLU6()), "ntk", leaf(W), B)(V1)
    kernel = InfiniteKernel(mlp(R()), "ntk", W, B)

    class New(Layer):
        pass

    graph = kernel._read(V1, keep=True)[0]
    graph.layers.insert(1, New((1, 1), "layer 'new' (New)"))
    with pytest.raises(Refused, match=r"layer 'new' \(New\): got gradients"):
        kernel(leaf(V1))
