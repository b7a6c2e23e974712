"""Closed forms of activations: affine changes, exponentials, bells, polynomials, steps; recognized, and exact."""

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
from ntkit.kernels.infinite.activations import values_and_slopes
from ntkit.kernels.infinite.affine_changes import AffineChange
from ntkit.kernels.infinite.exponentials import Exponentials
from ntkit.kernels.infinite.piecewise import Piecewise, piecewise
from ntkit.kernels.infinite.polynomials import PolynomialActivation
from ntkit.kernels.infinite.recognition import closed_form

RATE = math.sqrt(2 * 0.7)
FORMS = {
    "erf, scaled": (AffineChange, lambda z: torch.erf(1.7 * z)),
    "(erf + 1) / 2": (AffineChange, lambda z: (torch.erf(z) + 1) / 2),
    "normal distribution function": (AffineChange, torch.special.ndtr),
    "erf and a line": (AffineChange, lambda z: 0.3 * z - 2 * torch.erf(z / 3) - 0.2),
    "gelu, scaled": (AffineChange, lambda z: 1.7015 * F.gelu(z)),
    "gelu, steeper": (AffineChange, lambda z: F.gelu(2 * z) - 0.1),
    "gelu, mirrored": (AffineChange, lambda z: F.gelu(-z)),
    "gelu by its formula": (AffineChange, lambda z: z * torch.special.ndtr(1.702 * z)),
    "sin": (Exponentials, torch.sin),
    "sin with a phase": (Exponentials, lambda z: 2 * torch.sin(3 * z + 0.4) + 1),
    "rbf": (Exponentials, lambda z: math.sqrt(2) * torch.sin(RATE * z + math.pi / 4)),
    "snake": (Exponentials, lambda z: z + torch.sin(2 * z) ** 2 / 2),
    "slow sin": (Exponentials, lambda z: torch.sin(1e-3 * z)),
    "exp": (Exponentials, lambda z: torch.exp(-0.6 * z)),
    "1 - exp": (Exponentials, lambda z: 1 - torch.exp(z / 2)),
    "sinh": (Exponentials, lambda z: torch.sinh(z / 2)),
    "damped wave": (Exponentials, lambda z: torch.exp(-z / 2) * torch.sin(2 * z)),
    "bell": (Exponentials, lambda z: torch.exp(-z * z / 3)),
    "bell, moved": (Exponentials, lambda z: torch.exp(-((z - 1.3) ** 2))),
    "bell and a line": (Exponentials, lambda z: torch.exp(-z * z) + 0.5 * z - 1),
    "gabor": (Exponentials, lambda z: torch.exp(-z * z) * torch.sin(z)),
    "gabor, even": (Exponentials, lambda z: torch.exp(-z * z) * torch.cos(3 * z)),
    "gabor, moved": (Exponentials, lambda z: torch.exp(-((z - 0.5) ** 2)) * torch.sin(2 * z + 1)),
    "constant": (PolynomialActivation, lambda z: 3 + 0 * z),
    "line": (PolynomialActivation, lambda z: 2 * z + 1),
    "cubic": (PolynomialActivation, lambda z: z**3 - z),
    "monomial": (PolynomialActivation, lambda z: 0.01 * z**7),
    "Hermite 6": (PolynomialActivation, lambda z: (z**6 - 15 * z**4 + 45 * z**2 - 15) / 27),
}
CASES = [(1, 1, 1 - 1e-7), (0.3, 4, 0.9), (2, 0.5, -0.999), (2.5, 2.5, 0), (1.1, 1.1, 1), (1, 3, -1), (0.04, 1, 0.3)]


def in_the_plane(function, a, b, rho):
    """E[s(u) s(v)] and E[s'(u) s'(v)] by the trapezoidal rule, all digits for functions without kinks."""
    x = torch.arange(-12, 12, 0.02, dtype=torch.float64)
    density = torch.exp(-x * x / 2) * 0.02 / math.sqrt(2 * math.pi)
    found = []
    for f in (lambda z: values_and_slopes(function, z)[0], lambda z: values_and_slopes(function, z)[1]):
        u = f(math.sqrt(a) * x) * density
        if abs(rho) == 1:
            found.append(float(u @ f(math.sqrt(b) * rho * x)))
        else:
            v = math.sqrt(b) * (rho * x[:, None] + math.sqrt(1 - rho * rho) * x)
            found.append(float(u @ (f(v) @ density)))
    return found


def applied(activation, a, b, c):
    """E[s(u) s(v)] and E[s'(u) s'(v)] of one pair."""
    one, two = (torch.full((1, 1, 1, 1), float(v), dtype=torch.float64) for v in (a, b))
    K, T = torch.full_like(one, float(c)), torch.ones_like(one)
    factor = activation.apply(K, T, activation.state(one), activation.state(two))
    return float(K) * factor, float(T) * factor


@pytest.mark.parametrize("name", FORMS)
def test_a_closed_form_is_recognized_and_equals_quadrature(name):
    kind, function = FORMS[name]
    activation = closed_form(function)
    assert type(activation) is kind
    for a, b, rho in CASES:
        own = [in_the_plane(function, v, v, 1) for v in (a, b)]
        got = applied(activation, a, b, rho * math.sqrt(a * b))
        for g, w, x, y in zip(got, in_the_plane(function, a, b, rho), *own, strict=True):
            assert abs(g - w) <= 1e-12 * math.sqrt(x * y) + 1e-300, (a, b, rho)
        for v, squares in zip((a, b), own, strict=True):
            for g, w in zip(activation.diagonal(torch.tensor([v], dtype=torch.float64)), squares, strict=True):
                assert abs(float(g) - w) <= 1e-12 * w


def sine(a, b, c):
    return mp.exp(-(a + b) / 2) * mp.sinh(c), mp.exp(-(a + b) / 2) * mp.cosh(c)


def expm1(a, b, c):
    return mp.exp((a + b) / 2 + c) - mp.exp(a / 2) - mp.exp(b / 2) + 1, mp.exp((a + b) / 2 + c)


def hermite12(a, b, c):  # E[z^m z^n] by pairs of equal and unequal factors
    def moment(m, n):
        pairs = lambda k: mp.fac2(k - 1) if k else 1
        return mp.fsum(
            mp.binomial(m, k) * mp.binomial(n, k) * mp.factorial(k) * c**k
            * pairs(m - k) * pairs(n - k) * a ** ((m - k) // 2) * b ** ((n - k) // 2)
            for k in range(m % 2, min(m, n) + 1, 2)
        )  # fmt: skip

    numbers = {12: 1, 10: -66, 8: 1485, 6: -13860, 4: 51975, 2: -62370, 0: 10395}
    slopes = {n - 1: n * w for n, w in numbers.items() if n}
    return [mp.fsum(w * x * moment(m, n) for m, w in s.items() for n, x in s.items()) for s in (numbers, slopes)]


HERMITE = [10395, 0, -62370, 0, 51975, 0, -13860, 0, 1485, 0, -66, 0, 1]
EXACT = {
    "sin": (torch.sin, sine, [1e-24, 1e-8, 0.7, 40.0, 3600.0]),
    "expm1": (torch.expm1, expm1, [1e-24, 1e-8, 0.7, 40.0, 170.0]),
    "Hermite 12": (lambda z: sum(w * z**n for n, w in enumerate(HERMITE) if w), hermite12, [1e-8, 0.7, 1.0, 3600.0]),
}


@pytest.mark.parametrize("name", EXACT)
def test_tiny_and_large_variances(name):
    """With 60 digits: nothing overflows on the way, and the remainders of terms that cancel keep their digits."""
    function, exact, variances = EXACT[name]
    activation = closed_form(function)
    with mp.workdps(60):
        for a in variances:
            for b in variances:
                for rho in (1.0, 0.999, 0.3, 0.0, -0.8):
                    c = rho * math.sqrt(a * b)
                    wanted = exact(*(mp.mpf(v) for v in (a, b, c)))
                    scale = [mp.sqrt(x * y) for x, y in zip(*(exact(*[mp.mpf(v)] * 3) for v in (a, b)), strict=True)]
                    for got, w, size in zip(applied(activation, a, b, c), wanted, scale, strict=True):
                        # an exponent of size 3600 is known to 4e-13
                        assert abs(got - w) <= 1e-13 * (1 + max(a, b)) * size, (a, b, rho)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.sin(z) + 1e-9 * torch.tanh(z), lambda z: torch.exp(z.clamp(max=20)), torch.tanh, F.elu, F.silu,
        lambda z: torch.erf(z) + 1e-9 * torch.tanh(z), lambda z: torch.exp(-z.abs()), lambda z: z**3 + 1e-9 * z.abs(),
        lambda z: F.gelu(z, approximate="tanh"), lambda z: torch.exp(-(z**4)), lambda z: torch.sin(z.abs()),
        lambda z: torch.sin(z) - z, lambda z: torch.cos(z) - 1,  # remainders of terms that cancel at 0
    ],
)  # fmt: skip
def test_what_only_looks_like_one_is_not_taken_for_it(function):
    assert closed_form(function) is None


def test_a_slope_that_is_not_the_derivative_is_not_taken_for_it():
    class Straight(torch.autograd.Function):
        """The sine with a slope of 1."""

        @staticmethod
        def forward(ctx, z):
            return z.sin()

        @staticmethod
        def backward(ctx, g):
            return g

    assert closed_form(Straight.apply) is None


# ------------------------------------------------------------------ steps

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp(activation, width=8):
    return nn.Sequential(
        nn.Linear(6, width), activation, nn.Linear(width, width), activation, nn.Linear(width, 1)
    ).double()


def test_sign_and_step_by_angles():
    """E[sign u sign v] = 1 - 2 angle / pi (Grothendieck); no gradient passes through them."""
    S = (X @ X.T / 6 * 2.25 + 0.01).numpy()
    for function, rise in ((torch.sign, 2.0), (lambda z: (z > 0).double(), 1.0)):
        activation = piecewise(function)
        assert isinstance(activation, Piecewise)
        rho = np.clip(S / np.sqrt(np.outer(S.diagonal(), S.diagonal())), -1, 1)
        signs = 1 - 2 * np.arccos(rho) / math.pi
        wanted = signs if rise == 2 else (1 + signs) / 4
        model = nn.Sequential(nn.Linear(6, 8), Act(function), nn.Linear(8, 1)).double()
        for kind in ("nngp", "ntk"):  # of the tangent kernel only the last layer's weights are left
            got = InfiniteKernel(model, kind, 1.5, 0.1)(X).numpy()
            np.testing.assert_allclose(got, wanted * 2.25 + 0.01, rtol=1e-7)
            np.testing.assert_allclose(got.diagonal(), wanted.diagonal() * 2.25 + 0.01, rtol=1e-13)


# ------------------------------------------------------------------ in networks

WIDE = ["(erf + 1) / 2", "gelu, steeper", "rbf", "1 - exp", "gabor, moved", "bell and a line", "cubic"]


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("name", [*WIDE, "sign", "relu and a constant"])
def test_wide_networks_tend_to_it(name, kind):
    others = {"sign": torch.sign, "relu and a constant": lambda z: F.relu(z) + 0.5}
    function = others[name] if name in others else FORMS[name][1]
    model = ntkit.to_ntk_parametrization(mlp(Act(function)), 0.9, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ntkit.convergence(model, X, widths=(64, 1024), seeds=12, kind=kind)
    error = found.standard_error[-1].clamp(min=1e-13)  # the square of a sign is not random
    assert ((found.mean[-1] - found.limit) / error).abs().max() < 5
    assert found.distance[1] < found.distance[0] / 2


@pytest.mark.parametrize("function", [torch.exp, torch.sinh, lambda z: z**12], ids=["exp", "sinh", "power"])
def test_moments_that_overflow_are_refused_by_their_layer(function):
    model = nn.Sequential(nn.Linear(6, 8), Act(function), nn.Linear(8, 1)).double()
    size = 1e15 if function not in (torch.exp, torch.sinh) else 60
    with pytest.raises(Refused, match=r"layer '1' \(Act\).*moments that overflow at standard deviations up to"):
        InfiniteKernel(model, "ntk", 1.5, 0.1)(size * X)
    assert InfiniteKernel(model, "ntk", 1.5, 0.1)(X).isfinite().all()
