"""The limit kernel is right to 1e-6 in float32 however near the samples are; the caller's modes change no bit of it."""

from __future__ import annotations

import contextlib
import math

import mpmath as mp
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.kernels.infinite.activations import Rectifier
from ntkit.kernels.infinite.differentiable_moments import moments
from ntkit.kernels.infinite.planes import Planes
from ntkit.kernels.infinite.recognition import closed_form

mp.mp.dps = 40
W, B = 1.5, 0.05


class Act(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


def rectifier(p, q):
    def moments(a, b, c):
        even, odd = mp.mpf(p - q) ** 2 / 4, mp.mpf(p + q) ** 2 / 4
        root = mp.sqrt(max(a * b - c * c, mp.mpf(0)))
        arc = mp.atan2(c, root) if root or c else mp.mpf(0)
        return odd * c + even * 2 / mp.pi * (root + c * arc), odd + even * 2 / mp.pi * arc

    return moments


def erf(a, b, c):
    r = 2 * c / mp.sqrt((1 + 2 * a) * (1 + 2 * b))
    slope = 4 / mp.pi / mp.sqrt((1 + 2 * a) * (1 + 2 * b) - 4 * c * c)
    return 2 / mp.pi * mp.asin(r), slope


def gelu(a, b, c):
    P = (1 + a) * (1 + b)
    D, e, t = mp.sqrt(P - c * c), (1 - a * b) / P, mp.asin(c / mp.sqrt(P))
    top = a * b + e * c * c
    value = c / 4 + (c * t + top / D) / (2 * mp.pi)
    return value, mp.mpf(1) / 4 + (t + c * (1 + 2 * e) / D + c * top / D**3) / (2 * mp.pi)


def wave(sign):
    def moments(a, b, c):
        near, far = mp.exp(c - (a + b) / 2) / 2, mp.exp(-c - (a + b) / 2) / 2
        return near + sign * far, near - sign * far

    return moments


def bell(a, b, c):  # exp(-z^2 / 3)
    q = mp.mpf(1) / 3
    root = 1 / mp.sqrt((1 + 2 * q * a) * (1 + 2 * q * b) - 4 * q * q * c * c)
    return root, 4 * q * q * c * root**3


CLOSED = {
    "relu": (F.relu, rectifier(1, 0)),
    "leaky": (lambda z: F.leaky_relu(z, 0.125), rectifier(1, 0.125)),
    "abs": (torch.abs, rectifier(1, -1)),
    "erf": (torch.erf, erf),
    "gelu": (F.gelu, gelu),
    "sin": (torch.sin, wave(-1)),
    "cos": (torch.cos, wave(1)),
    "bell": (lambda z: torch.exp(-z * z / 3), bell),
}


def exact(moments, x, kind, depth=2, b=B):
    """Dense network with `depth` activations, entry by entry with 40 digits."""
    rows = [[mp.mpf(v) for v in row] for row in x.double().tolist()]
    w2, b2 = mp.mpf(W) ** 2, mp.mpf(b) ** 2

    def entry(u, v):
        s, t, c = (w2 * mp.fdot(p, q) / len(u) + b2 for p, q in ((u, u), (v, v), (u, v)))
        tangent = c
        for _ in range(depth):
            (value, slope), own, other = moments(s, t, c), moments(s, s, s)[0], moments(t, t, t)[0]
            value = w2 * value + b2
            s, t, c, tangent = w2 * own + b2, w2 * other + b2, value, w2 * tangent * slope + value
        return float(tangent if kind == "ntk" else c)

    return torch.tensor([[entry(u, v) for v in rows] for u in rows], dtype=torch.float64)


def near(seed, d=5):
    """Samples of which some are equal, neighbors in float32, nearly opposite, tiny, large or zero."""
    draw = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, d, generator=draw)
    step = torch.zeros(d)
    step[seed % d] = 1e-4
    rows = [x, x, torch.nextafter(x, x + 1), x + step, x * (1 + 2**-20), -x, -x + step, 1e-3 * x, 30 * x, 0 * x, other]
    return torch.stack(rows)


def mlp(function, d=5, dtype=torch.float32):
    layers = [nn.Linear(d, 8), Act(function), nn.Linear(8, 8), Act(function), nn.Linear(8, 1)]
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_are_right_to_1e_6_in_float32(name, kind):
    function, moments = CLOSED[name]
    for seed in (11, 12):
        x = near(seed)
        wanted = exact(moments, x, kind)
        scale = (wanted.diagonal()[:, None] * wanted.diagonal()).sqrt()
        # odd functions have entries that cancel; the others are compared entry by entry
        size = scale if name in ("erf", "sin") else wanted.abs().clamp(min=1e-6 * scale)
        kernel = ntkit.InfiniteKernel(mlp(function), kind, W, B)
        for got in (kernel(x), kernel(x, x.clone())):
            assert got.dtype == torch.float32
            assert float(((got.double() - wanted).abs() / size).max()) < 1e-6
        off = kernel.paired(x, x.flip(0)).double() - wanted.flip(1).diagonal()
        assert float((off.abs() / size.flip(1).diagonal()).max()) < 1e-6


def test_a_kernel_of_points_on_a_line_has_its_small_eigenvalues():
    """60 points and more of one coordinate: their angles are tiny, and float32 alone gave eigenvalues of -1.6."""
    for n, end in ((61, 10 * torch.pi), (75, 7.0)):
        x = torch.linspace(-end, end, n)[:, None]
        wanted = exact(rectifier(1, 0), x, "ntk")
        got = ntkit.InfiniteKernel(mlp(F.relu, 1), "ntk", W, B)(x)
        assert float(((got.double() - wanted) / wanted).abs().max()) < 1e-6
        # what rounding the exact matrix to float32 moves an eigenvalue by
        rounding = float((wanted.float().double() - wanted).norm())
        gap = torch.linalg.eigvalsh(got.double())[0] - torch.linalg.eigvalsh(wanted)[0]
        assert abs(float(gap)) < 2 * rounding
        double = ntkit.InfiniteKernel(mlp(F.relu, 1), "ntk", W, B)(x.double())
        assert float(((double - wanted) / wanted).abs().max()) < 1e-9


@pytest.mark.parametrize("layers", ["pools", "flatten", "norm", "residual"])
def test_other_layers_in_float32_equal_float64(layers):
    """Every layer carries float64: float32 samples give what the same numbers give in float64, rounded once."""
    conv = lambda c: nn.Conv2d(c, 4, 3, padding=1)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.ReLU(), conv(4))

        def forward(self, h):
            return h + self.inner(h)

    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
    model = {
        "pools": [conv(2), nn.ReLU(), nn.AvgPool2d(2, 1), conv(4), nn.GELU(), *pool],
        "flatten": [conv(2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 1)],
        "norm": [conv(2), nn.GroupNorm(1, 4), nn.ReLU(), *pool],
        "residual": [conv(2), Residual(), nn.ReLU(), *pool],
    }[layers]
    model = nn.Sequential(*model).eval()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    x = torch.cat([x, torch.nextafter(x[:1], x[:1] + 1), -x[:1], 1e-6 * x[1:2], x[:1] + 1e-5])
    for kind in ("ntk", "nngp"):
        kernel = ntkit.InfiniteKernel(model, kind, W, B)
        assert torch.equal(kernel(x), kernel(x.double()).float())
        for half in (torch.bfloat16, torch.float16):
            assert torch.equal(kernel(x.to(half)), kernel(x.to(half).double()).to(half))


def test_tables_are_exact_for_samples_of_very_different_size():
    """The table of a closed form, against it: correlations are tabulated, so small samples do not drown."""
    from ntkit.kernels.infinite.quadrature import Tabulated
    from ntkit.kernels.infinite.recognition import closed_form

    for v in ([0.0, 1e-22, 1e-12, 1e-4, 0.7, 1.5], [0.4, 40.0]):
        closed, table = closed_form(F.gelu), Tabulated(F.gelu, "")
        v = torch.tensor(v, dtype=torch.float64)
        for got, want in zip(table.diagonal(v), closed.diagonal(v), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
        rho = torch.tensor([1 - 1e-9, 1 - 1e-4, 0.3, -0.99999], dtype=torch.float64)
        a, b, r = (t.flatten() for t in torch.meshgrid(v[v > 0], v[v > 0], rho, indexing="ij"))
        c = r * (a * b).sqrt()
        K, T = c.clone(), torch.ones_like(c)
        factor = closed.apply(K, T, closed.state(a), closed.state(b))
        one, two = ([t.reshape(*t.shape[:-1], 1, 1, -1, 1) for t in table.state(s)] for s in (a, b))
        K2, T2 = c.reshape(1, 1, -1, 1).clone(), torch.ones(1, 1, len(c), 1, dtype=torch.float64)
        table.apply(K2, T2, tuple(one), tuple(two))
        size = (closed.diagonal(a)[0] * closed.diagonal(b)[0]).sqrt()
        off = (K2.flatten() - K * factor).abs() / size
        small = torch.minimum(a, b) < 1e-14 * float(v.max())  # below the table, its low end stands for them
        assert float(off[~small].max()) < 1e-10
        assert not small.any() or float(off[small].max()) < 1e-7
        # the angle of a correlation of 1 that is rounded to 1 - eps
        assert float((T2.flatten() - T * factor).abs().max()) <= (2 * torch.finfo(torch.float64).eps) ** 0.5
        assert table.error < 1e-11


def test_a_table_serves_other_objects_and_other_samples():
    from ntkit.kernels.infinite import quadrature

    x = torch.linspace(0.4, 1.7, 12, dtype=torch.float64).reshape(6, 2)
    net = lambda: mlp(lambda z: torch.tanh(1.25 * z), 2, torch.float64)
    wanted = ntkit.InfiniteKernel(net(), "ntk", W, B)(x)
    known = set(quadrature._TABLES)
    assert torch.equal(ntkit.InfiniteKernel(net(), "ntk", W, B)(x), wanted)
    ntkit.InfiniteKernel(net(), "ntk", W, B)(1.01 * x)
    assert set(quadrature._TABLES) == known


def test_values_beyond_the_samples_dtype_are_refused():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    kernel = ntkit.InfiniteKernel(mlp(F.relu), "ntk", W, 0.0)
    for scale in (1e25, 1e-25):
        with pytest.raises(ntkit.Refused, match=r"the kernel: got values up to .*float32.*float64"):
            kernel(scale * x)
        with pytest.raises(ntkit.Refused, match=r"the kernel: got values up to"):
            kernel.diagonal(scale * x)
        torch.testing.assert_close(kernel(scale * x.double()), scale**2 * kernel(x.double()), rtol=1e-12, atol=0)
    torch.testing.assert_close(kernel(1e-12 * x), 1e-24 * kernel(x), rtol=1e-6, atol=0)
    with pytest.raises(ntkit.Refused, match=r"float16"):
        kernel(300 * x.half())


# ------------------------------------------------------------------ modes of the caller


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
}


def everything(x, net, y):
    """Numbers of all that measures and learns, on a fixed network."""
    limit = ntkit.InfiniteKernel(net, "ntk", W, B)
    K, K_test = limit(x), limit(x[:4], x)
    nngp = ntkit.InfiniteKernel(net, "nngp", W, B)
    ridge, process = ntkit.KernelRidge(0.1).fit(K, y), ntkit.GaussianProcess(0.1).fit(K, y)
    svm, flow = ntkit.HardMarginSVM().fit(K, y > 0), ntkit.GradientFlow().fit(K, y)
    momentum = ntkit.GradientFlow(lr=0.01, momentum=0.5).fit(K, y)
    values = ntkit.spectrum(K)
    posterior = process.predict(K_test, limit(x[:4]))
    yield from (K, K_test, limit.diagonal(x), limit.paired(x, x.flip(0)), limit.operator(x) @ torch.ones(len(x)))
    yield from (ridge.alpha_, ridge.loo_, ridge.predict(K_test), posterior.mean, posterior.covariance)
    yield from (posterior.sample(2), posterior.percentiles([10, 90]), svm.alpha_, svm.decision_function(K_test))
    yield from (flow.predict(K_test, [1.0, 9.0]), flow.modes(2.0), momentum.predict(K_test, [3, float("inf")]))
    yield flow.ensemble(
        K_test, nngp_train=nngp(x), nngp_test_train=nngp(x[:4], x), nngp_test_test=nngp(x[:4]), t=3.0
    ).covariance
    numbers = [flow.best_time(K_test, y[:4]).t, ntkit.alignment(K, y), ntkit.effective_rank(K)]
    yield torch.tensor(numbers, dtype=torch.float64)
    yield from (values.eigenvalues, values.energy(y), ntkit.spectrum(K, k=2).eigenvalues)
    yield ntkit.bandwidth(x.reshape(-1, 4, 5))


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_change_no_bit(mode):
    draw = torch.Generator().manual_seed(3)
    x, net = torch.randn(12, 5, generator=draw), mlp(F.gelu)
    y = torch.where(torch.arange(12) % 3 == 0, 1.0, -1.0)
    wanted = list(everything(x, net, y))
    with MODES[mode]():
        got = list(everything(x, net, y))
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(torch.as_tensor(g), torch.as_tensor(w)), i


@pytest.mark.parametrize("mode", [m for m in MODES if m != "autocast"])
def test_the_callers_modes_change_no_bit_of_the_conjugate_kernel(mode):
    x, net = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)), mlp(torch.tanh)
    kernel = ntkit.ConjugateKernel(net)
    wanted = kernel(x), kernel(x, x[:2]), kernel.diagonal(x), kernel.operator(x) @ torch.ones(6)
    with MODES[mode]():
        got = kernel(x), kernel(x, x[:2]), kernel.diagonal(x), kernel.operator(x) @ torch.ones(6)
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


def test_under_autocast_the_conjugate_kernel_is_the_exact_product_of_the_models_features():
    """The forward is the caller's, in bfloat16; the products are ours, in the precision of the weights."""
    x, net = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)), mlp(torch.tanh)
    kernel = ntkit.ConjugateKernel(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, phi, product = kernel(x), kernel.features(x), kernel.operator(x) @ torch.ones(6)
    assert got.dtype == phi.dtype == torch.float32
    assert not torch.equal(phi, kernel.features(x))
    torch.testing.assert_close(got.double(), phi.double() @ phi.double().T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(product.double(), (phi.double() @ phi.double().T).sum(1), rtol=1e-6, atol=1e-5)


def test_the_number_of_threads_changes_nothing_beyond_rounding():
    x, net = torch.randn(30, 5, generator=torch.Generator().manual_seed(7)), mlp(F.relu)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ntkit.InfiniteKernel(net, "ntk", W, B)(x))
        torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    finally:
        torch.set_num_threads(before)


def test_of_float32_samples_all_layers_compute_in_float64(monkeypatch):
    """Black images, too: the slope at 0 of a leaky ReLU is no number of float32."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(4, 1))
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    seen, plain = set(), Planes.up_to_factor

    def watched(self, layer, offset):
        states = [
            t for side in (self.one, self.two) for of in (side.states, side.diagonal) for s in of.values() for t in s
        ]
        seen.update(t.dtype for t in states)
        found = plain(self, layer, offset)
        seen.add(found[0].dtype)
        return found

    monkeypatch.setattr(Planes, "up_to_factor", watched)
    kernel = ntkit.InfiniteKernel(model, w_std=1.3, b_std=0.0)
    values = kernel(x)
    assert values.dtype == torch.float32
    assert seen == {torch.float64}
    torch.testing.assert_close(values.double(), kernel(x.double()), rtol=1e-6, atol=1e-30)


def test_slope_at_zero_is_in_double_precision():
    """Variance 0 and 1: the side's mean slope is at_zero, here 0.1, and (p + q) / 2."""
    leaky = Rectifier(1.0, 0.1, at_zero=0.1)
    slope = leaky.state(torch.tensor([0.0, 1.0], dtype=torch.float64))[1]
    assert slope.tolist() == [0.1, 1.1 / 2]


def in_sixty_digits(name, a, b, c):
    """E[s(u) s(v)] and E[s'(u) s'(v)] by their formulas, as published."""
    with mp.workdps(60):
        a, b, c = mp.mpf(a), mp.mpf(b), mp.mpf(c)
        if name == "erf":
            P = (1 + 2 * a) * (1 + 2 * b)
            return 2 / mp.pi * mp.asin(2 * c / mp.sqrt(P)), 4 / mp.pi / mp.sqrt(P - 4 * c * c)
        if name == "gelu":
            P = (1 + a) * (1 + b)
            D, e, t = mp.sqrt(P - c * c), (1 - a * b) / P, mp.asin(c / mp.sqrt(P))
            top = a * b + e * c * c
            slope = (t + c * (1 + 2 * e) / D + c * top / D**3) / (2 * mp.pi)
            return c / 4 + (c * t + top / D) / (2 * mp.pi), mp.mpf(1) / 4 + slope
        if name == "sin":
            return mp.exp(-(a + b) / 2) * mp.sinh(c), mp.exp(-(a + b) / 2) * mp.cosh(c)
        if name == "odd gabor":  # z up to a relative error of the size of the variance
            return c, mp.mpf(1)
        even = 1 - mp.exp(-2 * a) - mp.exp(-2 * b) + mp.exp(-2 * a - 2 * b) * mp.cosh(4 * c)
        return c + even / 4, 1 + mp.exp(-2 * a - 2 * b) * mp.sinh(4 * c)


SIZES = {
    "erf": (torch.erf, (1e-24, 1e-8, 1.0, 1e6, 1e12, 1e18)),
    "gelu": (torch.nn.functional.gelu, (1e-24, 1e-8, 1.0, 1e6, 1e12, 1e18)),
    "sin": (torch.sin, (1e-24, 1e-16, 1e-8, 1.0)),
    "snake": (lambda z: z + torch.sin(z) ** 2, (1e-24, 1e-16, 1e-8, 1.0)),
    "odd gabor": (lambda z: torch.exp(-z * z) * torch.sin(z), (1e-24, 1e-16)),
}


@pytest.mark.parametrize("name", SIZES)
def test_tiny_and_large_samples_lose_no_digits_with_gradients_or_without(name):
    function, sizes = SIZES[name]
    activation = closed_form(function)
    equal = torch.ones((), dtype=torch.bool)
    for v in sizes:
        for rho in (1.0, 1 - 2.0**-30, 0.9, -0.6, -1.0):
            b = v if abs(rho) > 0.99 else v / 4
            c = rho * math.sqrt(v * b)
            wanted = [float(w) for w in in_sixty_digits(name, v, b, c)]
            at = [torch.full((1, 1, 1, 1), t, dtype=torch.float64) for t in (v, b, c)]
            K, T = at[2].clone(), torch.ones_like(at[2])
            factor = activation.apply(K, T, activation.state(at[0]), activation.state(at[1]))
            same = equal if rho == 1 else None
            with_gradients = moments(activation, *(t.clone().requires_grad_() for t in at), same)
            own = zip(*(in_sixty_digits(name, t, t, t) for t in (v, b)), strict=True)
            scales = [math.sqrt(float(one) * float(two)) for one, two in own]
            # 1 - rho^2 = 2^-29 is known up to 2^-52 only
            tolerance = 1e-6 if 0.99 < abs(rho) < 1 else 1e-13
            for found in ((float(K) * factor, float(T) * factor), [float(t.detach()) for t in with_gradients]):
                for got, w, scale in zip(found, wanted, scales, strict=True):
                    assert abs(got - w) <= tolerance * scale, (v, rho)
            if rho == 1:
                for got, w in zip(activation.diagonal(at[0]), wanted, strict=True):
                    assert abs(float(got) - w) <= 1e-14 * abs(w), v
                # of equal samples whose covariance rounding has moved
                for c in (v * (1 - 2e-16), v * (1 + 2e-16)):
                    K, T = torch.full_like(K, c), torch.ones_like(T)
                    factor = activation.apply(K, T, activation.state(at[0]), activation.state(at[1]))
                    assert abs(float(T) * factor - wanted[1]) <= 1e-8 * wanted[1], (v, c)
