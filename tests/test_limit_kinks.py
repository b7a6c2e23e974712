"""Activations with kinks elsewhere than at 0: exact, found wherever they are, and as exact as they say."""

from __future__ import annotations

import math
import warnings

import mpmath as mp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Act
from torch import nn

import ntkit
from ntkit import InfiniteKernel, Refused
from ntkit.kernels.infinite.activations import times_slope, values_and_slopes
from ntkit.kernels.infinite.kinks import pieces
from ntkit.kernels.infinite.layers import Pointwise
from ntkit.kernels.infinite.piecewise import Piecewise, piecewise

PIECES = {
    "relu6": (F.relu6, [0, 6], [[0], [0, 1], [6]]),
    "hardtanh": (F.hardtanh, [-1, 1], [[-1], [0, 1], [1]]),
    "hardtanh, far": (lambda z: F.hardtanh(z, -1e4, 1e4), [-1e4, 1e4], [[-1e4], [0, 1], [1e4]]),
    "hardswish": (F.hardswish, [-3, 3], [[0], [0, 1 / 2, 1 / 6], [0, 1]]),
    "hardsigmoid": (F.hardsigmoid, [-3, 3], [[0], [1 / 2, 1 / 6], [1]]),
    "softshrink": (F.softshrink, [-0.5, 0.5], [[0.5, 1], [0], [-0.5, 1]]),
    "hardshrink": (F.hardshrink, [-0.5, 0.5], [[0, 1], [0], [0, 1]]),
    "threshold": (lambda z: F.threshold(z, 0.3, -1.0), [0.3], [[-1], [0, 1]]),
    "step": (lambda z: (z > 0.7).double(), [0.7], [[0], [1]]),
    "clamp": (lambda z: z.clamp(-0.37, 2.2), [-0.37, 2.2], [[-0.37], [0, 1], [2.2]]),
    "relu, moved": (lambda z: F.relu(z - 1 / 3), [1 / 3], [[0], [-1 / 3, 1]]),
    "tent": (lambda z: F.relu(1 - z.abs()), [-1, 0, 1], [[0], [1, 1], [1, -1], [0]]),
    "curvature jumps": (lambda z: F.relu(z - 1) ** 2, [1], [[0], [1, -2, 1]]),
    "a user's": (
        lambda z: torch.where(z < -1, -z - 2, torch.where(z < 0.5, z**3, 0.125 + 0 * z)),
        [-1, 0.5],
        [[-2, -1], [0, 0, 0, 1], [0.125]],
    ),
    "sign": (torch.sign, [0], [[-1], [1]]),
    "step at 0": (lambda z: (z > 0).double(), [0], [[0], [1]]),
    "relu squared": (lambda z: F.relu(z) ** 2, [0], [[0], [0, 0, 1]]),
    "abs and a line": (lambda z: z.abs() + 0.3 * z - 1, [0], [[-1, -0.7], [-1, 1.3]]),
    "z times the slope of hardtanh": (times_slope(F.hardtanh), [-1, 1], [[0], [0, 1], [0]]),
}


@pytest.mark.parametrize("name", PIECES)
def test_kinks_and_polynomials_are_found(name):
    function, kinks, polynomials = PIECES[name]
    found = pieces(function)
    assert found is not None
    np.testing.assert_allclose(found.kinks, kinks, rtol=1e-13, atol=0)
    for got, wanted in zip(found.polynomials, polynomials, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "function",
    [torch.tanh, F.elu, lambda z: z**3 - z, lambda z: torch.tanh(z).clamp(max=0.5), torch.floor],
    ids=["tanh", "elu", "cubic", "clamped tanh", "floor"],
)
def test_what_has_no_such_pieces_is_left_alone(function):
    assert pieces(function) is None


def test_a_slope_that_is_not_the_derivative_is_left_alone():
    class Straight(torch.autograd.Function):
        """Hardtanh with the slope of the identity."""

        @staticmethod
        def forward(ctx, z):
            return z.clamp(-1, 1)

        @staticmethod
        def backward(ctx, g):
            return g

    assert pieces(Straight.apply) is None


# ------------------------------------------------------------------ against integration split at the kinks

NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)
REACH = 12


def panels(edges):
    """Nodes and weights, times the normal density, between neighbors of the last axis."""
    low, high = edges[..., :-1, None], edges[..., 1:, None]
    x = (low + high) / 2 + (high - low) / 2 * NODES
    return x, (high - low) / 2 * WEIGHTS * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def split(function, slope, kinks, a, b, rho):
    """E[s(u) s(v)] and E[s'(u) s'(v)]: Gauss-Legendre over u, and over v given u, between all kinks."""
    root_a, root_b, tau = math.sqrt(a), math.sqrt(b), math.sqrt(max(1 - rho * rho, 0.0))
    edges = [*np.linspace(-REACH, REACH, 25), *(k / root_a for k in kinks)]
    for k in kinks:  # where the conditional mean of v crosses a kink, on its own scale
        if rho:
            edges += [k / root_b / rho + d * tau / rho for d in (-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 10)]
    x, of_x = panels(np.unique(np.clip(edges, -REACH, REACH)))
    x, of_x = x.ravel(), of_x.ravel()
    if not tau:
        return [float(of_x @ (f(root_a * x) * f(root_b * rho * x))) for f in (function, slope)]
    inner = np.tile(np.linspace(-REACH, REACH, 13), (len(x), 1))
    crossings = np.stack([(k / root_b - rho * x) / tau for k in kinks], 1)
    inner = np.sort(np.concatenate([inner, np.clip(crossings, -REACH, REACH)], 1), 1)
    y, of_y = panels(inner)
    v = root_b * (rho * x[:, None, None] + tau * y)
    return [
        float(of_x @ (f(root_a * x) * (f(v.ravel()).reshape(v.shape) * of_y).sum((1, 2)))) for f in (function, slope)
    ]


def by_pieces(kinks, polynomials, order):
    def function(z):
        which = np.searchsorted(kinks, z)
        whole = [np.polynomial.Polynomial(p) for p in polynomials]
        return np.choose(which, [(p.deriv() if order else p)(z) for p in whole])

    return function


CASES = [(1, 1, 1 - 1e-7), (0.3, 4, 0.9), (2, 0.5, -0.999), (9, 9, 0), (1.1, 1.1, 1), (2, 0.7, 1), (1, 3, -1)]


@pytest.mark.parametrize("name", [n for n in PIECES if "far" not in n])
def test_values_slopes_and_diagonals_equal_integration_between_the_kinks(name):
    function, kinks, polynomials = PIECES[name]
    activation = piecewise(function)
    exact, slope = (by_pieces(kinks, polynomials, order) for order in (0, 1))
    for a, b, rho in CASES:
        one, two = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (a, b))
        K, T = torch.full_like(one, rho * math.sqrt(a * b)), torch.ones_like(one)
        assert activation.apply(K, T, activation.state(one), activation.state(two)) == 1
        wanted = split(exact, slope, kinks, a, b, rho)
        own = [activation.diagonal(v) for v in (one, two)]
        for i, got in enumerate((K, T)):
            scale = math.sqrt(float(own[0][i] * own[1][i])) + 1e-300
            # rounding moves a correlation by eps, the angle by eps / sin, and slopes that jump as the angle does
            sine = max(math.sqrt(1 - rho * rho), 1e-8)
            assert abs(float(got) - wanted[i]) <= (1e-12 + activation.error + 1e-14 / sine) * scale, (
                name,
                a,
                b,
                rho,
                i,
            )
        for v, found in ((a, own[0]), (b, own[1])):
            for got, w in zip(found, split(exact, slope, kinks, v, v, 1), strict=True):
                assert abs(float(got) - w) <= (1e-12 + activation.error) * abs(w) + 1e-15, (name, v)
    assert 0 < activation.error < 1e-9


def test_the_error_says_the_truth_where_terms_cancel():
    """Of a bounded function at large variance: 1 is left of terms of the size of the variance."""
    function, kinks, polynomials = PIECES["a user's"]
    exact, slope = (by_pieces(kinks, polynomials, order) for order in (0, 1))
    errors = []
    for variance in (1.0, 1e2, 1e4):
        activation = piecewise(function)
        v = torch.full((1, 1, 1), variance, dtype=torch.float64)
        wanted = split(exact, slope, kinks, variance, variance, 1)
        for got, w in zip(activation.diagonal(v), wanted, strict=True):
            assert abs(float(got) - w) <= activation.error * w
        errors.append(activation.error)
    assert errors[0] < 1e-10
    assert errors[0] < errors[1] < errors[2]


def test_the_error_says_the_truth_where_the_function_is_zero_up_to_far_kinks():
    """Softshrink at small variance: E[s^2] and E[s'^2] by tails in 50 digits."""
    for threshold in (4, 8, 12, 20, 30):
        activation = piecewise(F.softshrink)
        v = torch.full((1, 1, 1), (0.5 / threshold) ** 2, dtype=torch.float64)
        with mp.workdps(50):
            h = mp.mpf("0.5") / mp.sqrt(mp.mpf(float(v)))
            tail, density = mp.erfc(h / mp.sqrt(2)) / 2, mp.exp(-h * h / 2) / mp.sqrt(2 * mp.pi)
            wanted = 2 * mp.mpf(float(v)) * ((1 + h * h) * tail - h * density), 2 * tail
            found = [float(abs(float(g) / w - 1)) for g, w in zip(activation.diagonal(v), wanted, strict=True)]
        assert max(found) <= activation.error < 1e-13 * threshold**6, (threshold, found, activation.error)


# ------------------------------------------------------------------ in networks

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp(activation, width=8):
    return nn.Sequential(
        nn.Linear(6, width), activation, nn.Linear(width, width), activation, nn.Linear(width, 1)
    ).double()


def test_a_network_of_relu6_by_hand():
    """Two layers of weights and activations, entry by entry, from the integrals above."""
    w2, b2 = 2.25, 0.01
    relu6, slope = (by_pieces([0, 6], [[0], [0, 1], [6]], order) for order in (0, 1))
    x = 3 * X[:3]
    S = (x @ x.T / 6 * w2 + b2).numpy()
    T = S.copy()
    for _ in range(2):
        own = S.diagonal()
        cosines = S / np.sqrt(own[:, None] * own)
        moments = np.array(
            [[split(relu6, slope, [0, 6], own[i], own[j], cosines[i, j]) for j in range(3)] for i in range(3)]
        )
        S, T = moments[..., 0] * w2 + b2, T * moments[..., 1] * w2 + moments[..., 0] * w2 + b2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, wanted in (("nngp", S), ("ntk", T)):
            kernel = InfiniteKernel(mlp(nn.ReLU6()), kind, 1.5, 0.1)
            np.testing.assert_allclose(kernel(x).numpy(), wanted, rtol=1e-11)
            np.testing.assert_allclose(kernel.diagonal(x).numpy(), np.diag(wanted), rtol=1e-11)
            assert 0 < kernel.error < 1e-12
    assert "piecewise polynomial, kinks at 0, 6" in kernel.describe(x)


def test_samples_that_coincide_or_nearly_do():
    """Equal samples have the diagonal's value; near ones tend to it linearly in their distance, as at kinks."""
    for activation in (nn.Hardtanh(), nn.Hardswish(), nn.Softshrink()):
        kernel = InfiniteKernel(mlp(activation), "ntk", 1.5, 0.1)
        whole = kernel(torch.cat([X, X]))
        torch.testing.assert_close(whole[:5, 5:], whole[:5, :5], rtol=1e-7, atol=0)
        torch.testing.assert_close(whole.diagonal()[:5], kernel.diagonal(X), rtol=1e-14, atol=0)
        gaps = [float((kernel.diagonal(X) - kernel.paired(X, X + d)).abs().max()) for d in (1e-4, 1e-6)]
        assert gaps[1] < gaps[0] / 50


def test_a_black_sample_has_the_slope_of_autograd_at_zero():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU6(), nn.Linear(8, 1)).double()
    x = torch.cat([torch.zeros(1, 6, dtype=torch.float64), X[:2]])
    got = InfiniteKernel(model, "ntk", 1.5, 0.1)(x)
    # ReLU6 is 0 at 0 and PyTorch's slope there is 0: only the last bias is left
    torch.testing.assert_close(got[0], torch.full((3,), 0.01, dtype=torch.float64), rtol=1e-13, atol=0)


def test_a_norms_weight_before_a_kink():
    """The activation z s'(z) jumps at the kinks."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU6(), nn.Linear(8, 1)).double()
    kernel = InfiniteKernel(model, "ntk", 1.5, 0.1)
    layer = next(layer for layer in kernel._read(X)[0].layers if isinstance(layer, Pointwise))
    assert isinstance(layer.weighted, Piecewise)
    assert kernel(X).isfinite().all()
    assert kernel.error < 1e-11


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize(
    "activation", [nn.ReLU6(), nn.Hardswish(), nn.Softshrink(), Act(lambda z: z.clamp(-0.5, 2))], ids=str
)
def test_wide_networks_tend_to_it(activation, kind):
    x = 2 * X[:4]
    model = ntkit.to_ntk_parametrization(mlp(activation), 1.4, 0.3)
    found = ntkit.convergence(model, x, widths=(64, 1024), seeds=10, kind=kind)
    z = (found.mean[-1] - found.limit) / found.standard_error[-1]
    assert z.abs().max() < 5
    assert found.distance[1] < found.distance[0] / 2


def test_slopes_are_those_of_autograd():
    for name, (function, kinks, polynomials) in PIECES.items():
        z = torch.linspace(-5, 5, 101, dtype=torch.float64) + 0.0123
        wanted = by_pieces(kinks, polynomials, 1)(z.numpy())
        # PyTorch's own slope of hardsigmoid is 1 / 6 in float32
        np.testing.assert_allclose(values_and_slopes(function, z)[1].numpy(), wanted, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.Hardtanh(), nn.Hardswish()])
def test_samples_so_large_that_the_kinks_are_lost_in_rounding_are_refused(activation):
    """At norm 1e9 a bounded function had a second moment of -90, with a warning."""
    model = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 1)).double()
    kernel = InfiniteKernel(model, "nngp", w_std=1.0, b_std=0.0)
    x = torch.tensor([[1.0, 2, 3], [3, -1, 2]], dtype=torch.float64)
    with pytest.raises(Refused, match=r"got standard deviations up to 2.2e\+08, .*rounding; .* Scale the samples"):
        kernel(1e8 * x)
    with pytest.raises(Refused, match="Scale the samples"):
        kernel.diagonal(1e8 * x)
    assert kernel(x).isfinite().all()  # the same kernel object, afterwards


def test_the_error_bounds_what_rounding_takes_of_a_bounded_function():
    model = nn.Sequential(nn.Linear(3, 8), nn.Hardtanh(), nn.Linear(8, 1)).double()
    kernel = InfiniteKernel(model, "nngp", w_std=1.0, b_std=0.0)
    for size in (1e3, 1e4, 1e5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = float(kernel(torch.tensor([[size, 0, 0]], dtype=torch.float64)))
        h = 3**0.5 / size  # E = 1 - P(|z| < h) + E[(z / h)^2; |z| < h], to second order in h
        exact = 1 - (2 / math.pi) ** 0.5 * h * (2 / 3)
        assert abs(got - exact) <= kernel.error + h**3
        assert kernel.error < 1e3 * torch.finfo(torch.float64).eps * size**2  # of terms as large as the variance
