"""BatchNorm over a batch: its limit against random channels, quadrature in the plane, and wide networks."""

from __future__ import annotations

import math

import infinite_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

import ntkit
from ntkit import InfiniteKernel
from ntkit.base.checks import NoLimit
from ntkit.kernels.infinite.activations import Rectifier
from ntkit.kernels.infinite.batch_norm import BatchNorm

W, B = 1.3, 0.4
SLOPES = {"identity": (1.0, 1.0), "relu": (1.0, 0.0), "leaky relu": (1.0, 0.3), "abs": (1.0, -1.0)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariances(n, seed=0):
    """Two positive matrices whose samples share a part: the mean over the batch matters."""
    one, two = normal(2, n, n + 3, seed=seed)
    return one @ one.T / n + 0.5, two @ two.T / n + 0.7


def kinked(slopes):
    p, q = slopes
    return lambda z: torch.where(z > 0, p * z, q * z)


def of_channels(z, T, slopes, eps, weight):
    """Channels z [n, channels] behind F.batch_norm and a function, with what autograd says of them.

    Of each channel: h h^T, J T J^T, the parts of weight and bias, and J T J^T as if the statistics were constants.
    """
    n, channels = z.shape
    z = z.clone().requires_grad_()
    scale = torch.full((channels,), weight, dtype=z.dtype, requires_grad=True)
    shift = torch.zeros(channels, dtype=z.dtype, requires_grad=True)
    b = F.batch_norm(z, None, None, scale, shift, training=True, eps=eps)
    h = kinked(slopes)(b)
    rows = [torch.autograd.grad(h[i].sum(), (z, scale, shift, b), retain_graph=True) for i in range(n)]
    J, of_scale, of_shift, slope = (torch.stack(parts) for parts in zip(*rows, strict=True))
    slope = slope.diagonal(dim1=0, dim2=1).T * weight / (z.detach().var(0, correction=0) + eps).sqrt()
    h = h.detach()
    return {
        "covariance": torch.einsum("ir,jr->rij", h, h),
        "tangent": torch.einsum("iar,ab,jbr->rij", J, T, J),
        "of the weight": torch.einsum("ir,jr->rij", of_scale, of_scale),
        "of the bias": torch.einsum("ir,jr->rij", of_shift, of_shift),
        "constant statistics": torch.einsum("ir,ij,jr->rij", slope, T, slope),
    }


@pytest.mark.parametrize(("eps", "weight"), [(1e-5, 1.0), (0.7, -0.6)])
@pytest.mark.parametrize("name", SLOPES)
def test_moments_are_those_of_random_channels(name, eps, weight):
    n, channels = 6, 60_000
    S, T = covariances(n)
    drawn = of_channels(torch.linalg.cholesky(S) @ normal(n, channels, seed=1), T, SLOPES[name], eps, weight)
    values = {}
    for gains, parts in (((0.0, 0.0), "tangent"), ((1.0, 0.0), "of the weight"), ((0.0, 1.0), "of the bias")):
        V, values[parts] = BatchNorm("", eps, weight**2, *gains, Rectifier(*SLOPES[name])).moments(S, T)
        values["covariance"] = V
    values["of the weight"] = values["of the weight"] - values["tangent"]
    values["of the bias"] = values["of the bias"] - values["tangent"]
    for what, exact in values.items():
        mean, error = drawn[what].mean(0), drawn[what].std(0) / math.sqrt(channels)
        assert error.max() < 0.01 * exact.abs().max(), what
        assert ((mean - exact).abs() < 4 * error + 1e-12).all(), what
    naive, error = drawn["constant statistics"].mean(0), drawn["tangent"].std(0) / math.sqrt(channels)
    assert ((naive - values["tangent"]).abs() > 20 * error).any()  # the channels tell the terms apart


def in_the_plane(L, T, slopes, eps):
    """E[h h^T] and E[J T J^T] for z = L g with g of dimension 1 or 2, by quadrature in the sectors between kinks."""
    dims, y = L.shape[1], L - L.mean(0)
    v, log_step = torch.arange(-26, 2.3, 0.1, dtype=torch.float64), 0.1
    radius = v.exp()
    if dims == 1:
        points, weights = torch.cat([radius, -radius])[:, None], log_step * radius * (-radius.square() / 2).exp()
        weights = torch.cat([weights, weights]) / math.sqrt(2 * math.pi)
    else:
        angles = torch.atan2(y[:, 0], -y[:, 1])
        ends = torch.cat([angles, angles + math.pi]).remainder(2 * math.pi).unique()
        ends = torch.cat([ends, ends[:1] + 2 * math.pi])
        x, w = (torch.from_numpy(t) for t in oracle.np.polynomial.legendre.leggauss(20))
        half, middle = ends.diff()[:, None] / 2, (ends[1:] + ends[:-1])[:, None] / 2
        angle, of_angle = (middle + half * x).flatten(), (half * w).flatten()
        points = radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], 1)
        of_radius = log_step * radius.square() * (-radius.square() / 2).exp() / (2 * math.pi)
        points, weights = points.flatten(0, 1), torch.outer(of_radius, of_angle).flatten()
    drawn = of_channels(L @ points.T, T, slopes, eps, 1.0)
    return tuple(torch.einsum("r,rij->ij", weights, drawn[what]) for what in ("covariance", "tangent"))


DEGENERATE = {
    "two samples": normal(2, 1, seed=2),
    "three samples": normal(3, 2, seed=3),
    "one direction": normal(5, 1, seed=4),
    "two directions": normal(5, 2, seed=5),
    "equal samples": normal(3, 2, seed=6)[[0, 1, 0, 2, 1, 0]],
    "two kinds of samples": normal(2, 1, seed=7)[[0, 1, 0, 0]],
    "a zero sample": torch.cat([torch.zeros(1, 2, dtype=torch.float64), normal(3, 2, seed=8)]),
}


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("name", ["identity", "leaky relu"])
@pytest.mark.parametrize("batch", DEGENERATE)
def test_moments_of_singular_covariances(batch, name, eps):
    L = DEGENERATE[batch]
    _, T = covariances(len(L), seed=9)
    if "kind" in batch or "equal" in batch:  # equal samples have equal gradients
        same = (L[:, None] == L).all(2).double()
        T = same @ T @ same
    norm = BatchNorm("", eps, 1.0, 0.0, 0.0, Rectifier(*SLOPES[name]))
    found = norm.moments(L @ L.T, T)
    assert norm.error < 1e-11
    for value, exact in zip(found, in_the_plane(L, T, SLOPES[name], eps), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-7, atol=1e-8 * float(exact.abs().max()))


def test_a_large_eps_leaves_centered_values():
    S, T = covariances(5)
    G = torch.eye(5, dtype=torch.float64) - 0.2
    C = G @ S @ G
    value, slope = oracle.gaussian(torch.relu, C.diagonal()[:, None], C.diagonal()[None, :], C)
    V, J = BatchNorm("", 1e9, 1.0, 0.0, 0.0, Rectifier(1.0, 0.0)).moments(S, T)
    torch.testing.assert_close(1e9 * V, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(1e9 * J, slope * (G @ T @ G), rtol=1e-6, atol=1e-6)


def test_eps_is_that_of_the_layer():
    """Between eps = 0.1 and 0.2 the kernel changes by a hundred times what random channels leave open."""
    S, T = covariances(6)
    near, far = (BatchNorm("", eps, 1.0, 0.0, 0.0, Rectifier(1.0, 0.0)).moments(S, T)[1] for eps in (0.1, 0.2))
    drawn = of_channels(torch.linalg.cholesky(S) @ normal(6, 60_000, seed=2), T, SLOPES["relu"], 0.2, 1.0)["tangent"]
    error = drawn.std(0) / math.sqrt(60_000)
    assert ((drawn.mean(0) - far).abs() < 4 * error).all()
    assert ((drawn.mean(0) - near).abs() > 20 * error).any()


# ---------------------------------------------------------------------- networks


class Scaled(nn.Module):
    """z = W_STD / sqrt(fan in) w a + B_STD b with standard normal w and b."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight.T * (W / math.sqrt(x.shape[1])) + B * self.bias


def norm(width, **kwargs):
    """Batch norm whose runs leave nothing behind."""
    layer = nn.BatchNorm1d(width, track_running_stats=False, **kwargs)
    if layer.affine:
        nn.init.constant_(layer.weight, 0.8)
    return layer


class Skip(nn.Module):
    """h + linear(relu(norm(h)))."""

    def __init__(self, linear, width):
        super().__init__()
        self.norm, self.linear = norm(width), linear(width, width)

    def forward(self, h):
        return h + self.linear(torch.relu(self.norm(h)))


NETWORKS = {
    "relu": lambda linear, n: [linear(9, n), norm(n), nn.ReLU(), linear(n, 1)],
    "bare": lambda linear, n: [linear(9, n), norm(n, affine=False), nn.ReLU(), linear(n, 1)],
    "identity": lambda linear, n: [linear(9, n), norm(n), linear(n, n), nn.Tanh(), linear(n, 1)],
    "two norms": lambda linear, n: [
        linear(9, n), norm(n, eps=0.3), nn.LeakyReLU(0.2), linear(n, n), norm(n, affine=False), nn.ReLU(), linear(n, 1)
    ],
    "behind a smooth layer": lambda linear, n: [
        linear(9, n), nn.Tanh(), linear(n, n), norm(n), nn.ReLU(), linear(n, n), nn.GELU(), linear(n, 1)
    ],
    "skip": lambda linear, n: [linear(9, n), Skip(linear, n), Skip(linear, n), linear(n, 1)],
}  # fmt: skip
BATCH = normal(7, 9, seed=11)  # six directions: with few, 1 / s has heavy tails


def limit(name, kind="ntk"):
    return InfiniteKernel(nn.Sequential(*NETWORKS[name](nn.Linear, 8)), kind, W, B)


def finite(name, width, networks, x=BATCH):
    """Tangent kernels of random networks as functions of the whole batch, [networks, n, n]."""
    found = []
    for seed in range(networks):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * width + seed)
            network = nn.Sequential(*NETWORKS[name](Scaled, width)).double()
        parameters = dict(network.named_parameters())
        rows = jacrev(lambda p, network=network: functional_call(network, p, (x,))[:, 0])(parameters)
        found.append(sum(row.flatten(1) @ row.flatten(1).T for row in rows.values()).detach())
    return torch.stack(found)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_mean_of_wide_networks(name):
    exact, networks = limit(name)(BATCH), 60
    values = finite(name, 256, networks)
    error = values.std(0) / math.sqrt(networks)
    assert error.max() < 0.03 * exact.abs().max()
    assert ((values.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("name", ["relu", "two norms"])
def test_networks_tend_to_the_limit(name):
    exact, widths = limit(name)(BATCH), [32, 64, 128, 256, 512]
    distances = [(finite(name, n, 24) - exact).flatten(1).norm(dim=1).log().mean() for n in widths]
    slope = oracle.np.polyfit([math.log(n) for n in widths], [float(d) for d in distances], 1)[0]
    assert abs(slope + 0.5) < 0.1


@pytest.mark.parametrize("name", ["relu", "two norms"])
def test_the_covariance_of_outputs(name):
    exact, networks, rows = limit(name, "nngp")(BATCH), 2000, []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for _ in range(networks):
            rows.append(nn.Sequential(*NETWORKS[name](Scaled, 64)).double()(BATCH)[:, 0])
    products = torch.stack([torch.outer(f, f) for f in rows])
    error = products.std(0) / math.sqrt(networks)
    assert error.max() < 0.05 * exact.abs().max()
    assert ((products.mean(0) - exact).abs() < 4 * error).all()


def test_equal_samples_only():
    """Then every value behind the norm is 0, and the kernel is that of the last layer's bias, at any width."""
    x, exact = BATCH[:1].expand(4, 9), torch.full((4, 4), B**2, dtype=torch.float64)
    torch.testing.assert_close(limit("relu")(x), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(limit("bare")(x), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(finite("bare", 8, 1, x)[0], exact, rtol=1e-9, atol=1e-9)


def test_the_kernel_is_of_the_whole_batch():
    kernel = limit("two norms")
    K = kernel(BATCH)
    assert torch.equal(K, K.T)
    assert kernel.error < 1e-11
    order = torch.tensor([3, 0, 5, 1, 6, 4, 2])
    torch.testing.assert_close(kernel(BATCH[order]), K[order][:, order], rtol=1e-10, atol=1e-10)
    assert (kernel(BATCH[:4]) - K[:4, :4]).abs().max() > 0.1
    operator = kernel.operator(BATCH)
    torch.testing.assert_close(operator @ torch.ones(7), K.sum(1))
    assert torch.equal(operator.diagonal(), K.diagonal())
    assert "what layer '1' (BatchNorm1d) makes of the whole batch" in kernel.describe(BATCH)
    torch.testing.assert_close(kernel(BATCH.float()), K.float(), rtol=1e-5, atol=1e-5)


def test_the_model_is_not_changed():
    model = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    K = InfiniteKernel(model, "ntk", W, B)(BATCH)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    frozen = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 1))
    assert (K - InfiniteKernel(frozen, "ntk", W, B)(BATCH)).diagonal().min() > 0.1


class Functional(nn.Module):
    """Batch norm without a module, and its output times a factor in front of the activation."""

    def __init__(self, factor, activation=torch.relu):
        super().__init__()
        self.first, self.last, self.factor, self.activation = nn.Linear(9, 8), nn.Linear(8, 1), factor, activation

    def forward(self, x):
        return self.last(self.activation(self.factor * F.batch_norm(self.first(x), None, None, training=True)))


class Affine(nn.Module):
    """Batch norm with a trained weight and bias, times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.first, self.norm, self.last, self.factor = nn.Linear(9, 8), norm(8), nn.Linear(8, 1), factor

    def forward(self, x):
        return self.last(torch.relu(self.factor * self.norm(self.first(x))))


def test_factors_and_functions():
    plain = InfiniteKernel(Functional(1.0), "nngp", W, B)(BATCH) - B**2
    for factor in (2.0, -0.5):
        torch.testing.assert_close(InfiniteKernel(Functional(factor), "nngp", W, B)(BATCH) - B**2, factor**2 * plain)
        of_gradients, twice = (InfiniteKernel(Affine(f), "ntk", W, B)(BATCH) - B**2 for f in (1.0, abs(factor)))
        torch.testing.assert_close(twice, factor**2 * of_gradients)  # relu(c z) = c relu(z)
    with_norm = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 1))
    torch.testing.assert_close(InfiniteKernel(with_norm, "nngp", W, B)(BATCH) - B**2, plain)


# ---------------------------------------------------------------------- refusals


def of_batch(*middle, width=8, inputs=9):
    return nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), *middle, nn.Linear(width, 1))


@pytest.mark.parametrize(
    ("got", "call"),
    [
        ("two sets of samples", lambda k: k(BATCH, BATCH[:2])),
        ("two sets of samples", lambda k: k(BATCH, BATCH)),
        ("pairs of samples", lambda k: k.diagonal(BATCH)),
        ("pairs of samples", lambda k: k.paired(BATCH, BATCH)),
        ("a single sample", lambda k: k(BATCH[:1])),
    ],
)
def test_what_no_batch_defines_is_refused(got, call):
    expected = rf"layer '1' \(BatchNorm1d\): got {got}; expected one whole batch, kernel\(x\).*depends on all samples"
    with pytest.raises(ntkit.Refused, match=expected + r".*Call kernel\(x\) once.*model\.eval\(\)"):
        call(InfiniteKernel(of_batch(nn.ReLU()), "ntk", W, B))


def test_a_store_of_tiles_is_refused(tmp_path):
    with pytest.raises(ntkit.Refused, match="one whole batch"):
        ntkit.GramStore.create(tmp_path / "store", InfiniteKernel(of_batch(nn.ReLU()), "ntk", W, B), BATCH)


def changed(name, *values):
    model = of_batch(nn.ReLU())
    getattr(model[1], name).data.copy_(torch.tensor(values).repeat(8 // len(values)))
    return model


class TwoFunctions(nn.Module):
    """Two activations of one batch norm, added."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x):
        h = self.norm(self.first(x))
        return self.last(torch.relu(h) + h.abs())


class Twice(nn.Module):
    """One batch norm at two depths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 1)])
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(self.norm(layer(x)))
        return self.layers[-1](x)


IMAGES = normal(4, 2, 4, 4, seed=12).float()
REFUSED = {
    "tanh": (of_batch(nn.Tanh()), BATCH, r"layer '2' \(Tanh\).*behind batch norm.*layer '1' \(BatchNorm1d\)"),
    "gelu": (of_batch(nn.GELU()), BATCH, r"layer '2' \(GELU\).*functions with two slopes"),
    "relu6": (of_batch(nn.ReLU6()), BATCH, r"layer '2' \(ReLU6\).*functions with two slopes"),
    "two activations": (of_batch(nn.ReLU(), nn.LeakyReLU()), BATCH, r"layer '3' \(LeakyReLU\).*behind batch norm"),
    "of the input": (
        nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 1)), BATCH,
        r"layer '0' \(BatchNorm1d\): got batch norm of the input.*outside the model",
    ),
    "of an activation": (
        nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1)), BATCH,
        r"layer '2' \(BatchNorm1d\).*not Gaussian.*before the activation",
    ),
    "images": (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1)), IMAGES,
        r"layer '1' \(BatchNorm2d\): got statistics over the samples of a batch and over positions.*GroupNorm",
    ),
    "sequences": (
        nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)),
        IMAGES[:, 0, :2],
        r"layer '1' \(BatchNorm1d\): got statistics over the samples of a batch and over positions",
    ),
    "a bias": (changed("bias", 0.5), BATCH, r"layer '1' \(BatchNorm1d\).*bias '1.bias' that is not zero"),
    "zeros": (changed("weight", 0.0), BATCH, r"layer '1' \(BatchNorm1d\).*weight of zeros"),
    "unequal weights": (changed("weight", 1.0, 1.1), BATCH, "weight '1.weight' that differs between channels"),
    "two functions": (TwoFunctions(), BATCH, "another activation.*values that depend on each other"),
    "twice": (Twice(), BATCH, r"layer 'norm' \(BatchNorm1d\).*'norm.weight' a second time"),
    "a function": (Functional(1.0, torch.tanh), BATCH, "got tanh behind batch norm"),
    "the input behind it": (
        oracle.Add(nn.Sequential(oracle.Act(lambda x: 2 * x), nn.Linear(9, 1)), of_batch(nn.ReLU())), BATCH,
        r"layer 'branches.1.1' \(BatchNorm1d\).*in front of what the model computes from its input alone",
    ),
    "dropout": (of_batch(nn.ReLU(), nn.Dropout(0.2)), BATCH, r"layer '3' \(Dropout\): got dropout"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "sample"), [("ntk", None), ("ntk", 3), ("nngp", 3)])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, kind, sample):
    model, x, message = REFUSED[name]
    with pytest.raises(NoLimit, match=message + r".*no sample=, either"):
        InfiniteKernel(model, kind, W, B, sample=sample)(x)


def test_gradients_are_refused():
    with pytest.raises(ntkit.Refused, match="batch norm, with samples or stds that require grad"):
        InfiniteKernel(of_batch(nn.ReLU()), "ntk", W, B)(BATCH.clone().requires_grad_())


def test_in_eval_mode_the_statistics_are_given():
    """What the refusals advise: running statistics make it a kernel of two samples, by sampling."""
    model = of_batch(nn.ReLU()).eval()
    with pytest.raises(NoLimit, match=r"layer '1' \(BatchNorm1d\).*sample=16"):
        InfiniteKernel(model, "ntk", W, B)(BATCH)
    assert InfiniteKernel(model, "ntk", W, B, sample=3)(BATCH, BATCH[:2]).shape == (7, 2)
