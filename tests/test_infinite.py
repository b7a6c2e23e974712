"""The limit of infinite width: against brute force, stored values of another program, wide networks, and by its laws.

Long because of its tables of networks. Networks without a limit: test_infinite_refusals.py.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from infinite_oracle import Act, Add, Oracle, gaussian
from torch import nn

from ntkit import InfiniteKernel, Refused, TangentKernel
from ntkit.kernels.infinite import limit_tiles
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.recognition import closed_form
from ntkit.testing import check_kernel

W, B = 1.3, 0.2
GENERATOR = torch.Generator().manual_seed(0)
X1, X2 = (torch.randn(n, 2, 5, 4, generator=GENERATOR, dtype=torch.float64) for n in (3, 2))
S1, S2 = (torch.randn(n, 2, 9, generator=GENERATOR, dtype=torch.float64) for n in (3, 2))
V1, V2 = (torch.randn(n, 6, generator=GENERATOR, dtype=torch.float64) for n in (5, 3))


def conv(a, b, k=3, **more):
    return nn.Conv2d(a, b, k, **more)


def head():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)


def mlp(*activations, width=8):
    layers = [nn.Linear(6, width)]
    for a in activations:
        layers += [a, nn.Linear(width, width)]
    return nn.Sequential(*layers[:-1], nn.Linear(width, 1))


R = nn.ReLU
IMAGES = {
    "stride": lambda: (conv(2, 8, stride=2, padding=1), R(), conv(8, 8, padding=1), R(), *head()),
    "dilation": lambda: (conv(2, 8, dilation=2, padding=2), R(), conv(8, 8, dilation=(2, 1), padding=1), R(), *head()),
    "no padding": lambda: (conv(2, 8, (3, 2)), R(), conv(8, 8, 1, padding=1), R(), *head()),
    "padding same, even": lambda: (conv(2, 8, 2, padding="same"), R(), *head()),
    "positions far apart": lambda: (
        conv(2, 8, padding=3, stride=3),
        R(),
        conv(8, 8, padding=2, stride=4),
        R(),
        *head(),
    ),
    "layers behind the pool": lambda: (
        conv(2, 8),
        R(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        R(),
        nn.Linear(8, 1),
    ),
    "pool between weights and activation": lambda: (
        conv(2, 8, padding=1),
        nn.AvgPool2d(2),
        R(),
        conv(8, 8, padding=1),
        R(),
        *head(),
    ),
    "overlapping pool": lambda: (
        conv(2, 8, padding=1),
        R(),
        nn.AvgPool2d(3, stride=2, padding=1),
        conv(8, 8, 2),
        R(),
        *head(),
    ),
    "two pools, flat": lambda: (
        conv(2, 8, padding=1),
        R(),
        nn.AvgPool2d(2),
        conv(8, 8, padding=1),
        R(),
        nn.AvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(16, 8),
        R(),
        nn.Linear(8, 1),
    ),
    "two pools, global": lambda: (
        conv(2, 8, padding=1),
        R(),
        nn.AvgPool2d(2, stride=1),
        conv(8, 8, padding=1),
        R(),
        nn.AvgPool2d(2),
        conv(8, 8, padding=1),
        R(),
        *head(),
    ),
    "residual, down": lambda: (
        conv(2, 8, padding=1),
        Add(nn.Sequential(R(), conv(8, 8, stride=2, padding=1), R(), conv(8, 8, padding=1)), conv(8, 8, 1, stride=2)),
        R(),
        *head(),
    ),
    "norms": lambda: (
        conv(2, 8, padding=1),
        nn.LayerNorm([8, 5, 4]),
        R(),
        conv(8, 8, padding=1),
        nn.GroupNorm(1, 8),
        R(),
        *head(),
    ),
    "groups": lambda: (
        conv(2, 8),
        R(),
        conv(8, 8, padding=1, groups=2),
        R(),
        conv(8, 8, (3, 2), groups=4),
        nn.Flatten(),
        nn.Linear(8, 1),
    ),
    "tanh, flat": lambda: (
        conv(2, 8, padding=1),
        nn.Tanh(),
        conv(8, 8, stride=2),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(16, 1),
    ),
    "elu, pool": lambda: (conv(2, 8, stride=2), nn.ELU(), nn.AvgPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 1)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_equal_all_pairs_of_positions(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")
        compare(nn.Sequential(*IMAGES[name]()), X1, X2)


def test_sequences_equal_all_pairs_of_positions():
    layers = [nn.Conv1d(2, 8, 3, stride=2, padding=1), R(), nn.Conv1d(8, 8, 3), nn.SELU(), nn.AvgPool1d(2)]
    compare(nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1)), S1, S2)


VECTORS = {
    "residual": lambda: nn.Sequential(
        nn.Linear(6, 8), Add(nn.Identity(), nn.Sequential(R(), nn.Linear(8, 8))), R(), nn.Linear(8, 1)
    ),
    "layer norm with affine": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), R(), nn.Linear(8, 1)),
    "two branches of the input": lambda: nn.Sequential(
        Add(nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 8), R(), nn.Linear(8, 8))), nn.GELU(), nn.Linear(8, 1)
    ),
    "dropout": lambda: mlp(nn.Sequential(R(), nn.Dropout(0.5)), nn.Tanh()),
    "sum with an activation": lambda: nn.Sequential(
        nn.Linear(6, 8), R(), Add(nn.Identity(), nn.Linear(8, 8)), nn.Linear(8, 8), R(), nn.Linear(8, 1)
    ),
    "layer norm, tanh, layer norm": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ELU(), nn.Linear(8, 1)
    ),
    "layer norm, then weights": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), R(), nn.Linear(8, 1)
    ),
    "dropout between weights and norm": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.Dropout(0.5), nn.LayerNorm(8), R(), nn.Linear(8, 1)
    ),
    "no hidden layer": lambda: nn.Linear(6, 1),
    "ends in an activation": lambda: nn.Sequential(nn.Linear(6, 8), nn.Softplus()),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_equal_brute_force(name):
    compare(VECTORS[name](), V1, V2)


def compare(model, x1, x2):
    """Both kernels, of two sets and of one; the oracle's quadrature has its own error of 1e-10."""
    model = model.double().eval()
    K, T = Oracle(W, B)(model, torch.cat([x1, x2]))
    n = len(x1)
    nngp, ntk = InfiniteKernel(model, "nngp", W, B), InfiniteKernel(model, "ntk", W, B)
    assert worst(nngp(x1, x2), K[:n, n:]) < 1e-10
    assert worst(ntk(x1, x2), T[:n, n:]) < 1e-10
    assert worst(nngp(x1), K[:n, :n]) < 1e-10
    assert worst(ntk(x1), T[:n, :n]) < 1e-10


def worst(got, wanted):
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


# ------------------------------------------------------------------ stored values


def vector_net(depth, activation, width=8):
    sizes = [10, *[width] * (depth - 1), 1]
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def block(layer):
    return Add(nn.Identity(), nn.Sequential(R(), layer(8, 8), R(), layer(8, 8)))


def plain_norm():
    return nn.LayerNorm(8, elementwise_affine=False, eps=1e-12)


def same(a, b):
    return conv(a, b, padding=1)


GOLDEN = {
    "fc_relu_L2": (lambda: vector_net(2, R), 1.0, 0.1),
    "fc_relu_L4": (lambda: vector_net(4, R), 1.0, 0.1),
    "fc_relu_he_L5": (lambda: vector_net(5, R), math.sqrt(2), 0.05),
    "fc_erf_L3": (lambda: vector_net(3, lambda: Act(torch.erf)), 1.5, 0.2),
    "fc_leaky_L3": (lambda: vector_net(3, lambda: nn.LeakyReLU(0.1)), 1.0, 0.1),
    "fc_gelu_L3": (lambda: vector_net(3, nn.GELU), 1.3, 0.1),
    "fc_sin_L3": (lambda: vector_net(3, lambda: Act(torch.sin)), 1.3, 0.1),
    "fc_res_relu": (
        lambda: nn.Sequential(nn.Linear(10, 8), block(nn.Linear), block(nn.Linear), R(), nn.Linear(8, 1)),
        1.0,
        0.1,
    ),
    "fc_layernorm_relu": (
        lambda: nn.Sequential(nn.Linear(10, 8), plain_norm(), R(), nn.Linear(8, 8), plain_norm(), R(), nn.Linear(8, 1)),
        1.0,
        0.1,
    ),
    "conv_relu_gap": (lambda: nn.Sequential(same(3, 8), R(), same(8, 8), R(), *head()), 1.2, 0.1),
    "conv_relu_flat": (
        lambda: nn.Sequential(same(3, 8), R(), same(8, 8), R(), nn.Flatten(), nn.Linear(512, 1)),
        1.2,
        0.1,
    ),
    "conv_relu_avg": (
        lambda: nn.Sequential(same(3, 8), R(), same(8, 8), R(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 1)),
        1.2,
        0.1,
    ),
    "conv_res_relu_gap": (lambda: nn.Sequential(same(3, 8), block(same), R(), *head()), 1.0, 0.1),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_values_of_neural_tangents(name):
    path = SHARED / "golden" / "infinite_width.npz"
    if not path.is_file():
        pytest.skip("no shared/golden beside the project")
    stored, (make, w, b) = np.load(path), GOLDEN[name]
    if name.startswith("fc"):
        x1, x2 = (torch.from_numpy(stored[f"vector_x{i}"]) for i in (1, 2))
    else:
        x1, x2 = (torch.from_numpy(stored[f"image_x{i}_nhwc"]).permute(0, 3, 1, 2) for i in (1, 2))
    for kind in ("nngp", "ntk"):
        kernel = InfiniteKernel(make().double(), kind, w, b)
        wanted, wanted_same = (torch.from_numpy(stored[f"{name}/{kind}{s}"]) for s in ("", "_same"))
        torch.testing.assert_close(kernel(x1, x2), wanted, rtol=1e-10, atol=0)
        got = kernel(x1)
        # Of a sample with itself the stored tangent kernels are off by up to 1e-8 where rounding made a cosine of 1
        # smaller: its angle is then sqrt(2 eps). Ours are checked against the exact recursion below.
        off = ~torch.eye(len(x1), dtype=torch.bool)
        torch.testing.assert_close(got[off], wanted_same[off], rtol=1e-10, atol=0)
        torch.testing.assert_close(got.diagonal(), wanted_same.diagonal(), rtol=3e-8, atol=0)


def test_of_a_sample_with_itself_without_rounding():
    """ReLU: s -> s / 2 w^2 + b^2, slope 1 / 2, exactly."""
    model = vector_net(4, R).double()
    x = torch.randn(40, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 30
    s = x.square().mean(1) * W**2 + B**2
    t = s.clone()
    for _ in range(3):
        s, t = s / 2 * W**2 + B**2, t / 2 * W**2 + s / 2 * W**2 + B**2
    kernel = InfiniteKernel(model, "ntk", W, B)
    for got in (kernel(x).diagonal(), kernel.diagonal(x), kernel(x, x).diagonal(), kernel(x.clone(), x).diagonal()):
        torch.testing.assert_close(got, t, rtol=1e-14, atol=0)


def test_the_circle_of_jacot():
    """Reference numbers of the analytic recursion, float64."""
    g = torch.tensor([0, math.pi / 8, math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi], dtype=torch.float64)
    x = torch.stack([g.cos(), g.sin()], 1)
    wanted = {
        2: [0.52, 0.454304, 0.340534, 0.096216, -0.020961, -0.011317],
        3: [0.4025, 0.335198, 0.249001, 0.107849, 0.052936, 0.051957],
        4: [0.2825, 0.227084, 0.169971, 0.092702, 0.066036, 0.064354],
    }
    for depth, values in wanted.items():
        sizes = [2, *[7] * (depth - 1), 1]
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), R())][:-1]
        got = InfiniteKernel(nn.Sequential(*layers), w_std=1.0, b_std=0.1)(x[:1], x)[0]
        torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float64), rtol=0, atol=6e-7)


# ------------------------------------------------------------------ activations

CLOSED = {
    "relu": F.relu,
    "leaky": lambda z: F.leaky_relu(z, 0.1),
    "abs": torch.abs,
    "by a comparison": lambda z: z * (z > 0),
    "erf": torch.erf,
    "gelu": F.gelu,
    "sin": torch.sin,
    "cos": torch.cos,
    "bell": lambda z: torch.exp(-z * z / 3),
    "clamp": lambda z: z.clamp(min=0),
    "polynomial": lambda z: z**3 - 2 * z * z + 1,
}
OPEN = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "mish": F.mish,
    "tanh gelu": lambda z: F.gelu(z, approximate="tanh"),
    "sign": torch.sign,
}


@pytest.mark.parametrize("name", [*CLOSED, *OPEN])
def test_activations_equal_quadrature(name):
    function = (CLOSED | OPEN)[name]
    activation = closed_form(function)
    assert (activation is not None) == (name in CLOSED)
    activation = activation or Tabulated(function, name)
    a, b = torch.tensor([0.2, 1.0, 2.5]).double(), torch.tensor([0.4, 1.7]).double()
    c = torch.tensor([[0.2, -0.5], [0.3, 1.1], [-0.9, 2.06]]).double()
    wanted = gaussian(function, a[:, None], b, c)
    if isinstance(activation, Tabulated):
        activation.diagonal(torch.cat([a, b]))  # before any state: one table for both
    one, two = (
        tuple(t[(..., *place)] for t in activation.state(v))
        for v, place in ((a, (slice(None), None)), (b, (None, slice(None))))
    )
    K, T = c.clone(), torch.ones_like(c)
    if isinstance(activation, Tabulated):  # planes have two axes of positions in front
        one, two = (tuple(t.reshape(*t.shape[:-2], 1, 1, *t.shape[-2:]) for t in s) for s in (one, two))
        K, T = K[None, None], T[None, None]
        assert activation.error < 1e-10
    factor = activation.apply(K, T, one, two)
    for got, w in zip((K * factor, T * factor), wanted, strict=True):
        torch.testing.assert_close(got.reshape(c.shape), w, rtol=1e-10, atol=1e-11)
    for got, w in zip(activation.diagonal(a), gaussian(function, a, a, a), strict=True):
        torch.testing.assert_close(got, w, rtol=1e-10, atol=1e-11)


def test_what_only_looks_like_a_closed_form_is_not_taken_for_it():
    assert closed_form(F.relu6) is None
    assert closed_form(lambda z: F.hardtanh(z, -1e4, 1e4)) is None
    assert closed_form(lambda z: torch.erf(z) + 1e-9 * torch.tanh(z)) is None

    class Straight(torch.autograd.Function):
        """ReLU with the slope of the identity."""

        @staticmethod
        def forward(ctx, z):
            return z.clamp(min=0)

        @staticmethod
        def backward(ctx, g):
            return g

    assert closed_form(Straight.apply) is None


def test_many_kinks_between_other_than_polynomials_are_computed_with_a_warning_that_says_how_well():
    model = mlp(Act(lambda z: torch.tanh(z) + sum((z - k / 4).abs() for k in range(1, 7)) / 10)).double()
    kernel = InfiniteKernel(model, "ntk", W, B)
    with pytest.warns(UserWarning, match=r"layer '1' \(Act\).*relative error of"):
        got = kernel(V1, V2)
    assert kernel.error > 1e-6
    _, T = Oracle(W, B)(model, torch.cat([V1, V2]))  # also inexact at kinks, but in another way
    assert worst(got, T[: len(V1), len(V1) :]) < kernel.error


def test_tables_reach_over_both_sides():
    """The second side's variances are far outside those of the first."""
    model = mlp(nn.Tanh(), nn.ELU()).double()
    kernel = InfiniteKernel(model, "ntk", W, B)
    small, large = 0.1 * V1, 3 * V2
    got = kernel(small, large)
    assert worst(got, InfiniteKernel(model, "ntk", W, B)(large, small).T) < 1e-8
    torch.testing.assert_close(kernel.paired(small[:3], large), got.diagonal(), rtol=1e-8, atol=1e-9)


def test_tables_of_a_norms_weight_reach_over_both_sides():
    """GELU is in closed form, z GELU'(z) is not; behind a GroupNorm, variances differ from position to position."""
    layers = conv(2, 8, padding=1), nn.GroupNorm(1, 8), nn.GELU()
    kernel = InfiniteKernel(nn.Sequential(*layers, *head()).double(), "ntk", W, B)
    even = torch.ones(2, 2, 4, 2, dtype=torch.float64) + 0.1 * X2[:, :, :4, :2]
    uneven = X1[:, :, :4, :2] * torch.logspace(-3, 1, 8, dtype=torch.float64).reshape(4, 2)
    got = kernel(even, uneven)
    _, T = Oracle(W, B)(nn.Sequential(*layers, *head()).double(), torch.cat([even, uneven]))
    assert worst(got, T[: len(even), len(even) :]) < 1e-8
    assert 0 < kernel.error < 1e-8


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize(
    ("model", "x1", "x2"),
    [
        (mlp(R(), nn.GELU()), V1, V2),
        (mlp(nn.Tanh()), V1, V2),
        (nn.Sequential(*IMAGES["two pools, global"]()), X1, X2),
        (nn.Sequential(*IMAGES["norms"]()), X1, X2),
    ],
)
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_laws(model, x1, x2, kind):
    check_kernel(InfiniteKernel(model, kind, W, B), x1, x2)


def test_no_tiling_and_no_number_of_threads_changes_a_value(monkeypatch):
    model = nn.Sequential(*IMAGES["two pools, global"]()).double()
    x = torch.randn(21, 2, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted, wanted_two = (
        f()
        for f in (lambda: InfiniteKernel(model, "ntk", W, B)(x), lambda: InfiniteKernel(model, "ntk", W, B)(x, x[:9]))
    )
    threads = torch.get_num_threads()
    try:
        for cells, number in ((64, 1), (1 << 10, 3), (1 << 20, 2)):
            monkeypatch.setitem(limit_tiles._PLANE_ELEMENTS, "cpu", cells)
            monkeypatch.setattr(limit_tiles, "_TILE_PAIRS", 64)
            torch.set_num_threads(number)
            torch.testing.assert_close(InfiniteKernel(model, "ntk", W, B)(x), wanted, rtol=1e-13, atol=0)
            torch.testing.assert_close(InfiniteKernel(model, "ntk", W, B)(x, x[:9]), wanted_two, rtol=1e-13, atol=0)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)


def test_the_dtype_is_that_of_the_samples():
    model = mlp(R())  # float32 weights
    exact, single = InfiniteKernel(model, "ntk", W, B)(V1), InfiniteKernel(model, "ntk", W, B)(V1.float())
    assert exact.dtype == torch.float64
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)
    _, wanted = Oracle(W, B)(model.double(), V1)
    assert worst(exact, wanted) < 1e-10


def test_writes_into_the_users_array():
    out = np.empty((5, 5))
    got = InfiniteKernel(mlp(R()), "ntk", W, B)(V1, out=out)
    assert np.array_equal(out, got.numpy())


def test_what_comes_before_the_weights_is_run_as_it_is():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(R())

        def forward(self, x):
            x = (x - 0.5) / 2
            return self.net(x / x.norm(dim=1, keepdim=True))

    before = (V1 - 0.5) / 2
    wanted = InfiniteKernel(mlp(R()), "ntk", W, B)(before / before.norm(dim=1, keepdim=True))
    torch.testing.assert_close(InfiniteKernel(Model().double(), "ntk", W, B)(V1), wanted, rtol=1e-13, atol=0)


def test_a_compiled_model_is_read_as_it_was():
    model = mlp(R())
    got = InfiniteKernel(torch.compile(model, backend="eager"), "ntk", W, B)(V1.float())
    torch.testing.assert_close(got, InfiniteKernel(model, "ntk", W, B)(V1.float()))


def test_functions_of_any_spelling():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x):
            z = self.a(x.reshape(len(x), -1))
            h = 0.5 * z.relu_()
            h = self.b(h) + 0
            h = h * torch.sigmoid(h)  # SiLU
            return self.c(-h / 2.0)

    by_hand = nn.Sequential(
        nn.Linear(6, 8), Act(lambda z: 0.5 * F.relu(z)), nn.Linear(8, 8), Act(lambda z: F.silu(z) / 2), nn.Linear(8, 1)
    )
    wanted = InfiniteKernel(by_hand, "ntk", W, B)(V1)
    torch.testing.assert_close(InfiniteKernel(Model(), "ntk", W, B)(V1), wanted, rtol=1e-10, atol=0)


SPELLED = {
    "sigmoid by hand": (lambda z: 1 / (1 + torch.exp(-z)), torch.sigmoid),
    "by a comparison": (lambda z: z * (z > 0), F.relu),
    "where": (lambda z: torch.where(z > 0, z, 0.1 * z), lambda z: F.leaky_relu(z, 0.1)),
    "a mask as numbers": (lambda z: z * (z > 0).to(z.dtype), F.relu),
    "gelu by hand": (
        lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        lambda z: F.gelu(z, approximate="tanh"),
    ),
    "scaled inside": (lambda z: (2 * z + z / 2).relu() - z, lambda z: 2.5 * F.relu(z) - z),
    "a difference the other way round": (lambda z: z.__rsub__(3 * z).relu(), lambda z: 2 * F.relu(z)),
    "a difference with alpha": (lambda z: torch.sub(z, z / 4, alpha=2).relu(), lambda z: F.relu(z) / 2),
    "of integers": (lambda z: (z.relu().to(torch.int) * 0).to(z.dtype) + z, lambda z: z * 1),
    "nothing": (lambda z: torch.zeros_like(z), lambda z: z * 0),
    "nothing, clamped": (lambda z: z.clamp(0, 0), lambda z: z * 0),
}


@pytest.mark.parametrize("name", SPELLED)
def test_an_activation_is_what_it_computes_and_not_how_it_is_spelled(name):
    one, two = SPELLED[name]
    for kind in ("ntk", "nngp"):
        got, wanted = (InfiniteKernel(mlp(Act(f), nn.GELU()), kind, W, B)(V1) for f in (one, two))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)


def test_a_cast_that_rounds_is_not_the_identity():
    got = InfiniteKernel(mlp(Act(lambda z: (3 * z).to(torch.int).to(z.dtype))), "nngp", W, 0.0).describe(V1)
    assert "slopes 3 and 3" not in got


def test_positions_flattened_before_an_activation_keep_their_variances():
    for activation in (R(), nn.GELU()):
        x = X1 * torch.arange(1, 5)  # of different size everywhere
        before = nn.Sequential(conv(2, 8), activation, nn.Flatten(), nn.Linear(48, 8), R(), nn.Linear(8, 1))
        behind = nn.Sequential(conv(2, 8), nn.Flatten(), activation, nn.Linear(48, 8), R(), nn.Linear(8, 1))
        got, wanted = (InfiniteKernel(m.double(), "ntk", W, B)(x) for m in (behind, before))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_norms_in_any_spelling_and_behind_sums_of_centred_branches():
    plain = InfiniteKernel(nn.Sequential(nn.Linear(6, 8), plain_norm(), R(), nn.Linear(8, 1)), "ntk", W, B)(V1)
    direct = mlp(Act(lambda z: torch.layer_norm(z, [8], eps=1e-12).relu()))
    torch.testing.assert_close(InfiniteKernel(direct, "ntk", W, B)(V1), plain, rtol=1e-13, atol=0)
    norms = plain_norm(), Add(nn.Identity(), nn.Sequential(R(), nn.Linear(8, 8))), nn.LayerNorm(8)
    compare(nn.Sequential(nn.Linear(6, 8), *norms, R(), nn.Linear(8, 1)), V1, V2)


def test_a_model_changed_since_is_read_again():
    model = mlp(R()).double()
    kernels = InfiniteKernel(model), InfiniteKernel(model, "ntk", W, B)
    for k in kernels:
        k(V1), k(V1.float())
    model[0].weight.requires_grad_(False)
    model[2].weight.data.mul_(3)
    for k, again in zip(kernels, (InfiniteKernel(model), InfiniteKernel(model, "ntk", W, B)), strict=True):
        assert torch.equal(k(V1), again(V1))
        assert torch.equal(k(V1.float()), again(V1.float()))


def test_in_inference_mode():
    model = mlp(R(), nn.GELU()).double()
    wanted = InfiniteKernel(model, "ntk", W, B)(V1)
    with torch.inference_mode():
        x = V1.clone()
        got = InfiniteKernel(model, "ntk", W, B)(x)
    assert torch.equal(got, wanted)
    assert torch.equal(InfiniteKernel(model, "ntk", W, B)(x), wanted)


def test_halves_are_rounded_once():
    model, x = mlp(R()), V1.bfloat16()
    got = InfiniteKernel(model, "ntk", W, B)(x)
    assert torch.equal(got, InfiniteKernel(model, "ntk", W, B)(x.double()).bfloat16())
    assert torch.equal(InfiniteKernel(model, "ntk", W, B).diagonal(x), got.diagonal())


@pytest.mark.parametrize("scale", [1e80, 1e-80])
def test_variances_beyond_the_dtype_are_refused(scale):
    with pytest.raises(Refused, match=r"layer '1' \(ReLU\).*float64"):
        InfiniteKernel(mlp(R()), "ntk", W, 0.0)(scale * V1)


# ------------------------------------------------------------------ the module's own initialisation


@pytest.mark.parametrize(("activation", "slope"), [(R(), 0.0), (nn.LeakyReLU(0.3), 0.3), (Act(torch.abs), 0.0)])
def test_a_black_sample_has_the_slope_of_autograd_at_zero(activation, slope):
    """Biases that start at 0: all values are 0 at any width, and only the biases' gradients are not."""
    model = mlp(activation).double()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    x = V1.clone()
    x[0] = 0
    kernel = InfiniteKernel(model)
    got = kernel(x)
    # of the biases: the last layer's, and the first's through weights of variance 1 / (3 width)
    torch.testing.assert_close(got[0, 0], torch.tensor(1 + slope**2 / 3, dtype=x.dtype), rtol=1e-7, atol=0)
    torch.testing.assert_close(kernel.paired(x[:1], x[1:2]), got[0, 1:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(kernel(x, x), got, rtol=1e-6, atol=0)


def test_own_initialisation_is_that_of_wide_networks():
    """torch's own parametrization: the mean tangent kernel of wide networks, entry by entry, within its error."""
    width, seeds = 512, 12
    kernels, covariances = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, width), R(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        ).double()
        nn.init.kaiming_normal_(model[0].weight, nonlinearity="relu")
        nn.init.zeros_(model[0].bias)
        kernels.append(TangentKernel(model, outputs="trace")(V1) / 2)
        with torch.no_grad():
            covariances.append(sum(torch.outer(y, y) for y in model(V1).T) / 2)
    limit = InfiniteKernel(model)(V1)
    mean, error = torch.stack(kernels).mean(0), torch.stack(kernels).std(0) / math.sqrt(seeds)
    assert ((mean - limit).abs() / (error + 0.01 * limit.abs())).max() < 4  # 1 %: of order 1 / width
    assert error.max() < 0.05 * limit.max()
    nngp = InfiniteKernel(model, "nngp")(V1)
    mean, error = torch.stack(covariances).mean(0), torch.stack(covariances).std(0) / math.sqrt(seeds)
    assert ((mean - nngp).abs() / error).max() < 4.5


def test_frozen_parameters_bring_nothing():
    model = mlp(R()).double()
    for p in model[2].parameters():
        p.requires_grad_(False)
    last = InfiniteKernel(model, "ntk", W, B)(V1)
    whole = InfiniteKernel(mlp(R()), "ntk", W, B)(V1)
    torch.testing.assert_close(whole - last, InfiniteKernel(mlp(R()), "nngp", W, B)(V1), rtol=1e-12, atol=0)


def test_describe_says_how_the_stds_were_found():
    text = InfiniteKernel(mlp(R(), nn.Tanh(), width=400)).describe(V1)
    assert "torch's default (uniform)" in text
    assert "layer '1' (ReLU): piecewise linear, slopes 1 and 0" in text


def test_biases_that_are_not_centred_are_refused_unless_the_stds_are_given():
    model = mlp(R(), width=64)
    nn.init.normal_(model[0].bias, 1.0, 0.1)
    InfiniteKernel(model, "ntk", W, B)(V1)
    with pytest.raises(Refused, match=r"layer '0' \(Linear\).*'0.bias' of mean"):
        InfiniteKernel(model)(V1)


def test_the_users_samples_are_left_as_they_were():
    x = V1.clone()
    with pytest.raises(Refused, match="in place"):
        InfiniteKernel(nn.Sequential(R(inplace=True), nn.Linear(6, 1)), "ntk", W, B)(x)
    assert torch.equal(x, V1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", IMAGES)
def test_a_gpu_gives_the_same(name):
    model = nn.Sequential(*IMAGES[name]()).double()
    wanted = InfiniteKernel(model, "ntk", W, B)(X1, X2)
    got = InfiniteKernel(model.cuda(), "ntk", W, B)(X1.cuda(), X2.cuda())
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-10, atol=0)
