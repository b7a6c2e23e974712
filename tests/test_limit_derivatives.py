"""Derivatives of the limit: finite differences of the values without gradients, tips, and a fit of w_std and b_std."""

from __future__ import annotations

import math

import pytest
import torch
from infinite_oracle import Act, gaussian
from test_infinite import CLOSED, IMAGES, S1, S2, V1, V2, VECTORS, X1, X2, B, W, mlp
from test_limit_positions import NETWORKS
from torch import nn

import ntkit
from ntkit import InfiniteKernel, Refused
from ntkit.kernels.infinite import limit_gradients
from ntkit.kernels.infinite.differentiable_moments import moments, moments_of_one
from ntkit.kernels.infinite.layers import Layer
from ntkit.kernels.infinite.recognition import closed_form

R = nn.ReLU
DRAW = torch.Generator().manual_seed(5)
TABLES = {  # networks with an activation by table
    "tanh, flat": r"layer '1' \(Tanh\)",
    "elu, pool": r"layer '1' \(ELU\)",
    "dropout": r"layer '3' \(Tanh\)",
    "layer norm, tanh, layer norm": r"layer '2' \(Tanh\)",
    "ends in an activation": r"layer '1' \(Softplus\)",
}
POSITIONS = [  # one of each layer; the others are of the same layers
    "slice", "transposed", "bilinear", "mean of one row", "padding by the border", "transposed, all", "gates",
    "nothing the same along both axes", "channels side by side", "U-net", "depthwise", "groups of the input",
]  # fmt: skip
CASES = {
    **{name: (lambda make=make: nn.Sequential(*make()), X1, X2) for name, make in IMAGES.items()},
    **{f"vectors, {name}": (make, V1, V2) for name, make in VECTORS.items()},
    **{f"positions, {name}": (lambda make=NETWORKS[name]: make(8), X1, X2) for name in POSITIONS},
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
    **{
        f"vectors, {name}": (
            lambda f=f: nn.Sequential(nn.Linear(6, 8), Act(f), nn.Linear(8, 8), Act(f), nn.Linear(8, 1)),
            V1,
            V2,
        )
        for name, f in {
            "exponential": lambda z: torch.exp(z / 5),
            "Gabor": lambda z: torch.exp(-z * z) * torch.cos(2 * z),
            "snake": lambda z: z + torch.sin(z) ** 2,
            "polynomial": lambda z: z**3 / 30 - z / 2 + 0.2,
            "erf changed": lambda z: torch.erf(z / 2) + 0.3 * z + 1,
            "GELU changed": lambda z: 2 * nn.functional.gelu(z / 2) + 0.3 * z,
        }.items()
    },
    "gate of channels": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 16), Act(lambda z: z[:, :8]), R(), nn.Linear(8, 1)),
        V1,
        V2,
    ),
    "some layers without a bias": (
        lambda: nn.Sequential(
            nn.Linear(6, 8, bias=False), R(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1, bias=False)
        ),
        V1,
        V2,
    ),
}
TABLE_CASES = {name: TABLES[key] for name in CASES if (key := name.removeprefix("vectors, ")) in TABLES}
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


def check(values, derivative, tolerance=1e-8, step=1e-3):
    """The derivative of a function of a number at 0 against central differences with two steps.

    Their own error, known from the difference of the two, must be small, too.
    """

    def central(h):
        return float(values(h) - values(-h)) / (2 * h)

    with torch.no_grad():
        rough, fine, scale = central(2 * step), central(step), float(values(0.0).abs())
    wanted, error = (4 * fine - rough) / 3, abs(fine - rough) / 3
    scale += abs(wanted)
    assert error < 1e-4 * scale, f"finite differences know it to {error / scale:.0e} only"
    assert abs(float(derivative) - wanted) <= tolerance * scale, (float(derivative), wanted, error)


# ------------------------------------------------------------------ every layer


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_are_those_without_gradients(name):
    model, x1, x2 = network(name)
    for kind, stds in (("ntk", (W, B)), ("nngp", ()))[x1.dim() > 3 :]:  # of images the test below compares the former
        kernel = InfiniteKernel(model, kind, *stds)
        a, b = leaf(x1), leaf(x2)
        for got, wanted in (
            (kernel(a, b), kernel(x1, x2)),
            (K := kernel(a), kernel(x1)),
            (kernel.diagonal(a), kernel.diagonal(x1)),
            (kernel.paired(a[:1], b[:1]), kernel.paired(x1[:1], x2[:1])),
        ):
            assert got.requires_grad
            assert not wanted.requires_grad
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
        value = values(at, kind)
        grads = torch.autograd.grad(value, at)
        with torch.no_grad():
            wanted = values(at, kind)
        assert abs(float(value.detach() - wanted)) < 1e-12 * float(wanted.abs())
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


# ------------------------------------------------------------------ every closed form

PLACES = [(0.4, 1.7, 0.3), (1.0, 0.8, -0.6), (2.5, 0.2, 0.6)]  # variances and covariance


@pytest.mark.parametrize("name", CLOSED)
def test_derivatives_of_closed_forms_equal_those_of_quadrature(name):
    """Along each of a, b and c; all integrals at once."""
    function, activation, step = CLOSED[name], closed_form(CLOSED[name]), 5e-4
    shifts = step * torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).double()
    points = torch.tensor(PLACES).double()[:, None, None] + shifts[:, None] * torch.eye(3).double()[:, None]
    for which, integrals in enumerate(gaussian(function, *points.unbind(-1))):  # [places, directions, shifts]
        for place, integral in zip(PLACES, integrals, strict=True):
            at = [leaf(v) for v in place]
            value = moments(activation, *at, None)[which]
            if not value.requires_grad:  # a constant slope
                assert integral.std() < 1e-9
                continue
            for g, along in zip(torch.autograd.grad(value, at), integral, strict=True):
                known = dict(zip([-2, -1, 0, 1, 2], along, strict=True))
                check(lambda t, known=known: known[round(t / step)], g, tolerance=1e-7, step=step)


@pytest.mark.parametrize("name", CLOSED)
def test_where_the_variables_coincide_the_derivatives_by_both_are_those_of_one_variable(name):
    """d/dv of E[s(u)^2], along a = b = c = v, from the three derivatives and from the function of v alone."""
    activation = closed_form(CLOSED[name])
    for v in (0.3, 2.0, 70.0):
        at, alone = [leaf(v) for _ in range(3)], leaf(v)
        same = torch.ones((), dtype=torch.bool)
        for two, one in zip(moments(activation, *at, same), moments_of_one(activation, alone), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-13, atol=0)
            if one.requires_grad:
                total = sum(torch.autograd.grad(two, at, retain_graph=True))
                (wanted,) = torch.autograd.grad(one, alone, retain_graph=True)
                torch.testing.assert_close(total, wanted, rtol=1e-10, atol=1e-15)


def test_the_same_variable_has_no_angle_whatever_rounding_made_of_its_covariance():
    """ReLU at a = b = 1: K = (a + b) / 4 along a and b, slope 1 / 2 without a derivative."""
    same = torch.ones((), dtype=torch.bool)
    at = [leaf(v) for v in (1.0, 1.0, 1 - 1e-12)]
    K, slope = moments(closed_form(nn.functional.relu), *at, same)
    assert float(slope.detach()) == 0.5
    assert [float(g) for g in torch.autograd.grad(slope, at)] == [0, 0, 0]
    grads = torch.autograd.grad(K, at)
    assert sum(float(g) for g in grads) == pytest.approx(0.5, abs=1e-15)
    slope = moments(closed_form(torch.erf), *at, same)[1]  # 4 / pi / sqrt(1 + 4 v)
    assert float(slope.detach()) == pytest.approx(4 / math.pi / math.sqrt(5), rel=1e-14, abs=0)


# ------------------------------------------------------------------ where samples coincide


def one_sided(values, h):
    """Derivatives to the right and to the left at 0, by two steps each."""
    with torch.no_grad():
        middle = float(values(0.0))
        right, left = ([(float(values(s * t)) - middle) / t for t in (h, h / 2)] for s in (1, -1))
    return 2 * right[1] - right[0], -(2 * left[1] - left[0])


def test_the_tip_of_a_tangent_kernel_has_the_mean_of_the_one_sided_derivatives():
    """K(x1, x2) of ReLU falls to all sides of x1 = x2; at opposite samples (no biases) it has a tip, too.

    At a black sample the covariance is a cone, and the tangent kernel jumps.
    """
    deep = nn.Sequential(nn.Linear(6, 8, bias=False), R(), nn.Linear(8, 8, bias=False), R(), nn.Linear(8, 1))
    flat = nn.Sequential(nn.Linear(6, 8, bias=False), R(), nn.Linear(8, 1))
    for model, sign, kind in ((mlp(R(), R()), 1, "ntk"), (deep, -1, "ntk"), (flat, 0, "nngp")):
        kernel = InfiniteKernel(model.double(), kind, W, B)
        x2 = V1[:1].clone()
        place = sign * x2
        x1 = leaf(place)
        (g,) = torch.autograd.grad(kernel(x1, x2).sum(), x1)
        assert g.isfinite().all()
        apart = 0.0
        for u in torch.eye(6).double()[:, None]:
            right, left = one_sided(lambda t, u=u, k=kernel, p=place, x2=x2: k(p + t * u, x2).sum(), 1e-4)
            scale = max(abs(right), abs(left))
            apart = max(apart, abs(right - left) / scale)
            assert abs(float((g * u).sum()) - (right + left) / 2) < 1e-5 * scale
        assert apart > 0.1, "there is no tip"


def test_the_covariance_has_no_tip():
    kernel = InfiniteKernel(mlp(R(), R()).double(), "nngp", W, B)
    x1, x2 = leaf(V1), V1.clone()
    (g,) = torch.autograd.grad(kernel(x1, x2).diagonal().sum(), x1)
    (whole,) = torch.autograd.grad(kernel.diagonal(x1).sum(), x1)
    torch.testing.assert_close(2 * g, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("activation", [R(), nn.GELU(), Act(torch.erf), Act(torch.cos)])
def test_equal_opposite_black_and_nearly_equal_samples_have_finite_derivatives(activation):
    x = V1[:1].repeat(7, 1)
    x[1], x[2], x[3] = -x[0], 0, 3 * x[0]
    x[5:] += 1e-9 * draw(2, 6)
    for b_std in (0.0, B):
        for kind in ("ntk", "nngp"):
            x1, x2, w, b = leaf(x), leaf(x), leaf(W), leaf(b_std)
            kernel = InfiniteKernel(mlp(activation, activation).double(), kind, w, b)
            for values in (kernel(x1), kernel(x1, x2), kernel.diagonal(x1), kernel.paired(x1, x2)):
                used = [x1, w, b]
                grads = torch.autograd.grad(values.sum(), used)
                assert all(g.isfinite().all() for g in grads)


def test_black_images_and_padding():
    model = nn.Sequential(*IMAGES["positions far apart"]()).double()
    x = torch.cat([X1[:1], torch.zeros_like(X1[:1])])
    for b_std in (0.0, B):
        at = [leaf(x), leaf(W), leaf(b_std)]
        kernel = InfiniteKernel(model, "ntk", *at[1:])
        grads = torch.autograd.grad(kernel(at[0]).sum(), at)
        assert all(g.isfinite().all() for g in grads)

        def along_w(t, b_std=b_std):
            return InfiniteKernel(model, "ntk", W + t, b_std)(x).sum()

        check(along_w, grads[1])


# ------------------------------------------------------------------ second derivatives


@pytest.mark.parametrize(
    "activation", [Act(torch.erf), nn.GELU(), Act(torch.sin), R()], ids=["erf", "gelu", "sin", "relu"]
)
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_first_and_second_derivatives_by_gradcheck(activation, kind):
    """Of one set (with the diagonal) and of two; ReLU's, too, where no two samples coincide."""
    model = mlp(activation, activation).double()
    places = leaf(V1[:2]), leaf(V2[:2]), leaf(W), leaf(B)

    def values(x1, x2, w, b):
        kernel = InfiniteKernel(model, kind, w, b)
        return kernel(x1, x2), kernel(x1), kernel.diagonal(x2)

    assert torch.autograd.gradcheck(values, places)
    assert torch.autograd.gradgradcheck(values, places, fast_mode=True)  # along random directions


def test_second_derivatives_through_tiles_and_rows_that_are_computed_again(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 8, 2), nn.GELU(), *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)))
    places = leaf(X1[:2, :, :3, :2]), leaf(X2[:1, :, :3, :2]), leaf(W)

    def values(x1, x2, w):
        kernel = InfiniteKernel(model.double(), "ntk", w, B)
        return kernel(x1, x2), kernel(x1)

    whole = values(*places)
    wanted = torch.autograd.grad(sum(t.square().sum() for t in whole), places)
    monkeypatch.setattr(limit_gradients, "_ELEMENTS", 1)
    tiled = values(*places)
    got = torch.autograd.grad(sum(t.square().sum() for t in tiled), places)
    for a, b in zip((*got, *tiled), (*wanted, *whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradgradcheck(values, places, fast_mode=True)


def test_second_derivatives_at_a_tip_are_refused_and_those_beside_it_are_not():
    x = leaf(V1[:2])
    ntk, nngp = (InfiniteKernel(mlp(R()).double(), kind, W, B) for kind in ("ntk", "nngp"))

    def mixed(K, x1, x2):
        """d^2 K[0, 0] / dx1 dx2."""
        (g,) = torch.autograd.grad(K[0, 0], x1, create_graph=True)
        return torch.stack([torch.autograd.grad(entry, x2, retain_graph=True)[0][0] for entry in g[0]])

    other = leaf(V1[:2])
    with pytest.raises(Refused, match="higher derivative where two samples coincide"):
        mixed(ntk(x, other), x, other)
    # the covariance of the network's gradients by its input: w^4 / 2 of one layer's, over the number of inputs
    torch.testing.assert_close(mixed(nngp(x, other), x, other), W**4 / 2 / 6 * torch.eye(6).double())
    far = leaf(V2[:2])
    assert mixed(ntk(x, far), x, far).isfinite().all()
    (g,) = torch.autograd.grad(ntk.diagonal(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x)[0].isfinite().all()


# ------------------------------------------------------------------ at the door


def test_without_grad_mode_nothing_changes():
    model = mlp(R()).double()
    plain, kernel = InfiniteKernel(model, "ntk", W, B), InfiniteKernel(model, "ntk", leaf(W), leaf(B))
    x = leaf(V1)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for got, wanted in (
                (kernel(x), plain(V1)),
                (kernel(x, V2), plain(V1, V2)),
                (kernel.diagonal(x), plain.diagonal(V1)),
                (kernel.operator(x) @ torch.eye(5).double(), plain(V1)),
            ):
                assert torch.equal(got, wanted)
                assert not got.requires_grad
    with torch.no_grad():
        assert torch.equal(kernel(x, out=(out := torch.empty(5, 5).double())), out)


def test_what_cannot_have_gradients_is_refused():
    x, model = leaf(V1), mlp(R()).double()
    for kernel, samples in ((InfiniteKernel(model, "ntk", W, B), x), (InfiniteKernel(model, "ntk", leaf(W), B), V1)):
        with pytest.raises(Refused, match=r"operator: got a matrix-free product.*no_grad"):
            kernel.operator(samples)
        with pytest.raises(Refused, match=r"out: got memory to write into.*no_grad"):
            kernel(samples, out=torch.empty(5, 5).double())
        with torch.no_grad():
            operator = kernel.operator(samples)
        product = operator @ torch.ones(5).double()  # built without gradients, it has none
        assert not product.requires_grad
        assert not operator.diagonal().requires_grad
    for bad in (leaf(-1.0), leaf(math.nan), leaf(math.inf), leaf([1.0, 2.0]), leaf(1e200)):
        with pytest.raises(Refused, match="w_std: got"):
            InfiniteKernel(model, "ntk", bad, B)
    w = leaf(W)
    kernel = InfiniteKernel(model, "ntk", w, B)
    with torch.no_grad():
        w.fill_(-1)
    for call in (lambda: kernel(V1), lambda: torch.no_grad()(kernel)(V1)):
        with pytest.raises(Refused, match="w_std: got -1"):
            call()


def test_one_kernel_follows_its_stds_and_its_identity_does():
    w, b, model = leaf(W), leaf(B), mlp(R()).double()
    kernel = InfiniteKernel(model, "ntk", w, b)
    before = ntkit.Gram(kernel(V1), kernel, V1).identity
    for value in (0.7, 1.9):
        with torch.no_grad():
            w.fill_(value)
        wanted = InfiniteKernel(model, "ntk", value, B)(V1)
        torch.testing.assert_close(kernel(V1).detach(), wanted, rtol=1e-13, atol=0)
        with torch.no_grad():
            assert torch.equal(kernel(V1), wanted)
    assert ntkit.Gram(kernel(V1), kernel, V1).identity != before
    assert torch.autograd.grad(kernel(V1, V2).sum(), [w, b])[0] > 0


def test_each_side_alone_and_half_precision():
    model = mlp(R(), nn.GELU())
    kernel = InfiniteKernel(model, "ntk", W, B)
    a, b = leaf(V1), leaf(V2)
    wanted = torch.autograd.grad(kernel(a, b).square().sum(), [a, b])
    for x1, x2, g in ((a, V2, wanted[0]), (V1, b, wanted[1])):
        x = x1 if x1.requires_grad else x2
        torch.testing.assert_close(torch.autograd.grad(kernel(x1, x2).square().sum(), x)[0], g, rtol=1e-12, atol=1e-14)
    assert torch.equal(kernel(a, a), kernel(a))
    w = torch.tensor(W, requires_grad=True)  # float32
    InfiniteKernel(model, "ntk", w, B)(V1, V2).square().sum().backward()
    exact = leaf(W)
    InfiniteKernel(model, "ntk", exact, B)(V1, V2).square().sum().backward()
    torch.testing.assert_close(w.grad.double(), exact.grad, rtol=1e-5, atol=0)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        x = V1.to(dtype).requires_grad_()
        K = kernel(x, b)
        assert K.dtype == dtype
        (g,) = torch.autograd.grad(K.square().sum(), x)
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), wanted[0], rtol=rtol, atol=rtol * float(wanted[0].abs().max()))


def test_what_the_model_computes_of_its_input_is_in_the_graph():
    class Front(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(R())

        def forward(self, x):
            x = x / x.square().mean(1, keepdim=True).sqrt()
            return self.net(torch.sin(x) + x * x)

    model, u = Front().double(), draw(5, 6)
    kernel, x = InfiniteKernel(model, "ntk", W, B), leaf(V1)
    (g,) = torch.autograd.grad((kernel(x) * torch.arange(25).reshape(5, 5)).sum(), x)
    check(lambda t: (kernel(V1 + t * u) * torch.arange(25).reshape(5, 5)).sum(), (g * u).sum())
    assert all(t.grad is None for t in (x, *model.parameters()))


def test_tensors_that_require_no_gradient_are_numbers():
    kernel = InfiniteKernel(mlp(R()).double(), "ntk", torch.tensor(1.3), torch.tensor(0.2))
    assert not kernel(V1).requires_grad
    assert kernel(leaf(V1)).requires_grad


# ------------------------------------------------------------------ a use


def test_marginal_likelihood_recovers_the_stds_that_drew_the_data():
    """Of a Gaussian process with this covariance, 150 points and 8 functions: within 3 of its own standard errors."""
    generator = torch.Generator().manual_seed(2)
    model, noise, truth = mlp(Act(torch.erf)).double(), 0.05, (1.8, 0.6)
    x = torch.randn(150, 6, generator=generator, dtype=torch.float64)
    eye = torch.eye(150).double()
    covariance = InfiniteKernel(model, "nngp", *truth)(x) + noise**2 * eye
    y = torch.linalg.cholesky(covariance) @ torch.randn(150, 8, generator=generator, dtype=torch.float64)

    def loss(logs):
        factor = torch.linalg.cholesky(InfiniteKernel(model, "nngp", *logs.exp())(x) + noise**2 * eye)
        fit = torch.linalg.solve_triangular(factor, y, upper=False).square().sum() / 2
        return fit + y.shape[1] * factor.diagonal().log().sum()

    logs = torch.zeros(2, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logs)
        value.backward()
        return value

    optimizer.step(closure)
    assert logs.grad.abs().max() < 1e-3
    errors = torch.linalg.inv(torch.autograd.functional.hessian(loss, logs.detach())).diagonal().sqrt()
    away = (logs.detach() - torch.tensor(truth).log()).abs()
    assert (errors < 0.3).all(), errors  # else anything would be within
    assert (away < 3 * errors).all(), (logs, errors)
