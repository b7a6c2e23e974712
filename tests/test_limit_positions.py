"""Layers that move or add up positions, and branches side by side or multiplied: brute force, and wide networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Cat, Move, Mul, Oracle
from torch import nn
from torch.nn.utils import parametrize

from ntkit import InfiniteKernel, Refused
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.kernels.infinite.layers import Affine
from ntkit.networks.parametrization import Scaled
from ntkit.testing import check_kernel

W, B = 1.3, 0.2
DRAW = torch.Generator().manual_seed(0)
X1, X2 = (torch.randn(n, 2, 5, 4, generator=DRAW, dtype=torch.float64) for n in (3, 2))
S1, S2 = (torch.randn(n, 2, 9, generator=DRAW, dtype=torch.float64) for n in (3, 2))
V1, V2 = (torch.randn(n, 6, generator=DRAW, dtype=torch.float64) for n in (3, 2))
R = nn.ReLU


def conv(a, b, k=3, **more):
    return nn.Conv2d(a, b, k, **more)


def start(n=8):
    return conv(2, n, padding=1), R()


def pooled(n=8):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 1)


def between(layer, n=8):
    """An image network with a layer between two convolutions, behind an activation."""
    return nn.Sequential(*start(n), layer, conv(n, n, padding=1), R(), *pooled(n))


MOVES = {
    "slice": lambda z: z[:, :, 1:4, ::2],
    "index": lambda z: z[:, :, [4, 0, 0, 2]],
    "narrow": lambda z: z.narrow(3, 1, 2),
    "flip": lambda z: z.flip(2),
    "flip both": lambda z: torch.flip(z, (2, 3)),
    "roll": lambda z: torch.roll(z, (1, -1), (2, 3)),
    "transposed": lambda z: z.transpose(2, 3),
    "pad with zeros": lambda z: F.pad(z, (1, 2, 0, 1)),
    "pad around": lambda z: F.pad(z, (1, 2, 1, 1), mode="circular"),
    "pad by reflection": lambda z: F.pad(z, (1, 2, 1, 1), mode="reflect"),
    "pad by the border": lambda z: F.pad(z, (1, 2, 3, 0), mode="replicate"),
    "crop": lambda z: F.pad(z, (-1, 0, 0, -2)),
    "nearest": lambda z: F.interpolate(z, scale_factor=2),
    "bilinear": lambda z: F.interpolate(z, size=(7, 3), mode="bilinear"),
    "bilinear, corners": lambda z: F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=True),
    "mean over one axis": lambda z: z.mean(2, keepdim=True),
    "sum over the other": lambda z: z.sum(3, keepdim=True),
    "cumulative": lambda z: z.cumsum(2),
    "uneven pool": lambda z: F.avg_pool2d(z, 3, 2, ceil_mode=True),
    "pool without the padding": lambda z: F.avg_pool2d(z, 3, 2, 1, count_include_pad=False),
    "adaptive pool": lambda z: F.adaptive_avg_pool2d(z, (3, 2)),
    "mask of rows": lambda z: z * torch.tensor([1.0, 0, 1, 0, 2], dtype=z.dtype)[:, None],
}
NETWORKS = {
    **{name: (lambda n, f=f: between(Move(f), n)) for name, f in MOVES.items()},
    "one position": lambda n: nn.Sequential(*start(n), Move(lambda z: z[:, :, 2, 1]), nn.Linear(n, 1)),
    "mean of one row": lambda n: nn.Sequential(*start(n), Move(lambda z: z[:, :, 2].mean(-1)), nn.Linear(n, 1)),
    "before the activation": lambda n: nn.Sequential(
        conv(2, n), Move(lambda z: F.interpolate(z, scale_factor=2, mode="bilinear")), R(), *pooled(n)
    ),
    "two in a row, flat": lambda n: nn.Sequential(
        *start(n), Move(lambda z: z.flip(3)), Move(lambda z: z[:, :, ::3]), nn.Flatten(), nn.Linear(8 * n, 1)
    ),
    "padding around": lambda n: between(conv(n, n, padding=1, padding_mode="circular"), n),
    "padding by reflection": lambda n: between(conv(n, n, (3, 2), stride=2, padding=1, padding_mode="reflect"), n),
    "padding by the border": lambda n: between(conv(n, n, 3, dilation=2, padding=2, padding_mode="replicate"), n),
    "nothing the same along both axes": lambda n: nn.Sequential(
        conv(2, n, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        R(),
        nn.AvgPool2d((2, 3), stride=(1, 2), padding=(0, 1)),
        conv(n, n, (1, 2), stride=(3, 1), padding=(2, 1)),
        R(),
        *pooled(n),
    ),
    "transposed, stride": lambda n: between(nn.ConvTranspose2d(n, n, 3, stride=2), n),
    "transposed, all": lambda n: between(
        nn.ConvTranspose2d(n, n, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2), dilation=(1, 2)), n
    ),
    "transposed, of the input": lambda n: nn.Sequential(
        nn.ConvTranspose2d(2, n, 3, stride=2, padding=1), R(), *pooled(n)
    ),
    "transposed, groups": lambda n: between(nn.ConvTranspose2d(n, n, 2, stride=2, groups=2), n),
    "channels side by side": lambda n: nn.Sequential(
        *start(n), Cat(nn.Identity(), nn.Sequential(conv(n, n, padding=1), R())), conv(2 * n, n), R(), *pooled(n)
    ),
    "side by side, then an activation": lambda n: nn.Sequential(
        *start(n),
        Cat(conv(n, n), nn.Sequential(conv(n, 3 * n, padding=1), R(), conv(3 * n, 3 * n)), shares=[1 / 4, 3 / 4]),
        R(),
        *pooled(4 * n),
    ),
    "positions side by side": lambda n: nn.Sequential(
        *start(n), Cat(conv(n, n), conv(n, n), axis=2), R(), conv(n, n, 2), R(), *pooled(n)
    ),
    "one value twice": lambda n: between(Move(lambda z: torch.cat([z, z.flip(2)[:, :, :2]], 2)), n),
    "U-net": lambda n: nn.Sequential(
        conv(2, n, padding=1),
        R(),
        Cat(
            nn.Identity(),
            nn.Sequential(
                nn.AvgPool2d((1, 2)), conv(n, n, padding=1), R(), nn.ConvTranspose2d(n, n, (1, 2), stride=(1, 2))
            ),
        ),
        conv(2 * n, n, padding=1),
        R(),
        *pooled(n),
    ),
    "gates": lambda n: nn.Sequential(
        *start(n), Mul(nn.Sequential(conv(n, n), nn.GELU()), conv(n, n)), conv(n, n, 1), R(), *pooled(n)
    ),
    "a layer times one behind it": lambda n: nn.Sequential(
        conv(2, n, padding=1),
        Mul(nn.Identity(), nn.Sequential(R(), conv(n, n, padding=1))),
        conv(n, n),
        R(),
        *pooled(n),
    ),
    "depthwise": lambda n: nn.Sequential(*start(n), conv(n, n, padding=1, groups=n), conv(n, n, 1), R(), *pooled(n)),
    "groups of the input": lambda n: nn.Sequential(conv(2, n, groups=2), R(), conv(n, n, padding=1), R(), *pooled(n)),
}


class ClosedOracle(Oracle):
    """Brute force with ReLU in closed form (Cho and Saul 2009), since grids grow here."""

    def go(self, m, s):
        if not isinstance(m, nn.ReLU) or s[2].any():
            return super().go(m, s)
        own = s[0].diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)  # [n, H, W]
        scale = (own[:, None, :, :, None, None] * own[None, :, None, None]).sqrt()
        cosine = torch.where(scale > 0, s[0] / scale.clamp(min=1e-300), 0.0)
        cosine = torch.where(cosine > 1 - 1e-14, 1.0, cosine.clamp(min=-1))
        angle = torch.acos(cosine)
        K = scale * (torch.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
        slope = (math.pi - angle) / (2 * math.pi)
        # PyTorch's slope of ReLU at 0, where a value is 0 in every network, is 0
        return K, s[1] * slope * (scale > 0), torch.zeros_like(K)


def worst(got, wanted):
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


SEVERAL = "side by side, then an activation", "groups of the input"  # channels with kernels of their own


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in SEVERAL])
def test_equal_all_pairs_of_positions(name):
    model = NETWORKS[name](8).double().eval()
    K, T = ClosedOracle(W, B)(model, torch.cat([X1, X2]))
    for kind, wanted in (("nngp", K), ("ntk", T)):
        kernel = InfiniteKernel(model, kind, W, B)
        assert worst(kernel(X1, X2), wanted[:3, 3:]) < 1e-11
        assert worst(kernel(X1), wanted[:3, :3]) < 1e-11
        assert worst(kernel.diagonal(X1), wanted[:3, :3].diagonal()) < 1e-11


def test_an_activation_of_branches_side_by_side_is_that_of_each():
    outside = NETWORKS["side by side, then an activation"](8).double()
    cat = outside[2]
    inside = nn.Sequential(
        *outside[:2], Cat(*(nn.Sequential(b, R()) for b in cat.branches), shares=cat.shares), *outside[4:]
    )
    K, T = ClosedOracle(W, B)(inside, torch.cat([X1, X2]))
    for kind, wanted in (("nngp", K), ("ntk", T)):
        assert worst(InfiniteKernel(outside, kind, W, B)(X1, X2), wanted[:3, 3:]) < 1e-11
        assert worst(InfiniteKernel(inside, kind, W, B)(X1), wanted[:3, :3]) < 1e-11


def test_groups_of_the_input_are_branches_of_its_channels():
    model, oracle, x = NETWORKS["groups of the input"](8).double(), ClosedOracle(W, B), torch.cat([X1, X2])
    states = []
    for z in x.split(1, 1):
        K = torch.einsum("ichw,jcxy->ijhwxy", z, z)
        states.append(oracle.go(nn.Sequential(conv(1, 8), R()), (K, torch.zeros_like(K), torch.zeros_like(K))))
    mean = tuple((one + two) / 2 for one, two in zip(*states, strict=True))
    K, T, _ = (t[:, :, 0, 0, 0, 0] for t in oracle.go(model[2:], mean))
    for kind, wanted in (("nngp", K), ("ntk", T)):
        assert worst(InfiniteKernel(model, kind, W, B)(X1, X2), wanted[:3, 3:]) < 1e-11
        assert worst(InfiniteKernel(model, kind, W, B).diagonal(X1), wanted[:3, :3].diagonal()) < 1e-11


SEQUENCES = {
    "as an image": lambda n: nn.Sequential(
        nn.Conv1d(2, n, 3), R(), Move(lambda z: z.unflatten(2, (7, 1))), conv(n, n, (3, 1)), R(), *pooled(n)
    ),
    "transposed, reflected, reversed": lambda n: nn.Sequential(
        nn.Conv1d(2, n, 3, padding=2, padding_mode="reflect"),
        R(),
        nn.ConvTranspose1d(n, n, 3, stride=2, padding=1, output_padding=1),
        R(),
        Move(lambda z: F.interpolate(z.flip(2)[:, :, 3:], size=8, mode="linear")),
        nn.Conv1d(n, n, 2, stride=2),
        R(),
        nn.Flatten(),
        nn.Linear(4 * n, 1),
    ),
    "last position": lambda n: nn.Sequential(nn.Conv1d(2, n, 3), R(), Move(lambda z: z[..., -1]), nn.Linear(n, 1)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_equal_all_pairs_of_positions(name):
    model = SEQUENCES[name](8).double()
    K, T = ClosedOracle(W, B)(model, torch.cat([S1, S2]))
    for kind, wanted in (("nngp", K), ("ntk", T)):
        assert worst(InfiniteKernel(model, kind, W, B)(S1, S2), wanted[:3, 3:]) < 1e-11


def test_gates_of_vectors_and_branches_of_several_widths():
    """SwiGLU without a bias on paper: the product of two kernels, and K1 T2 + T1 K2."""
    model = nn.Sequential(nn.Linear(6, 8), R(), Mul(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 1)).double()
    x = torch.cat([V1, V2])
    S = x @ x.T / 6 * W**2 + B**2
    scale = (S.diagonal()[:, None] * S.diagonal()).sqrt()
    angle = torch.acos((S / scale).clamp(-1, 1).fill_diagonal_(1))
    K = scale * (torch.sin(angle) + (math.pi - angle) * torch.cos(angle)) / (2 * math.pi) * W**2 + B**2
    T = S * (math.pi - angle) / (2 * math.pi) * W**2 + K
    nngp, ntk = K * K * W**2 + B**2, 2 * K * T * W**2 + K * K * W**2 + B**2
    torch.testing.assert_close(InfiniteKernel(model, "nngp", W, B)(x), nngp, rtol=1e-12, atol=0)
    torch.testing.assert_close(InfiniteKernel(model, "ntk", W, B)(x), ntk, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["U-net", "flip", "bilinear", "transposed, all", "gates", "groups of the input"])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_laws(name, kind):
    check_kernel(InfiniteKernel(NETWORKS[name](8).double(), kind, W, B), X1, X2)


# ------------------------------------------------------------------ wide networks

WIDE = [  # one of each layer; the others are of the same layers
    "bilinear", "transposed, all", "U-net", "gates", "a layer times one behind it", "depthwise", "groups of the input",
    "side by side, then an activation",
]  # fmt: skip


def drawn(name, width, seed, outputs=1):
    """A network in the NTK parametrization."""
    model = NETWORKS[name](width)
    model[-1] = nn.Linear(model[-1].in_features, outputs)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            with torch.no_grad():
                for p in layer.parameters(recurse=False):
                    p.zero_()
            transposed = isinstance(layer, nn.ConvTranspose2d)
            inputs = layer.weight[:, 0].numel() / layer.groups if transposed else layer.weight[0].numel()
            parametrize.register_parametrization(layer, "weight", Scaled(W / math.sqrt(inputs)))
            parametrize.register_parametrization(layer, "bias", Scaled(B))
            with torch.no_grad():
                for p in layer.parameters():
                    p.normal_(generator=generator)
    return model.double()


@pytest.mark.parametrize("name", WIDE)
def test_wide_networks_tend_to_it(name):
    """Both kernels of networks of two widths: the mean within six standard errors, the distance falls."""
    for kind in ("ntk", "nngp"):
        limit = InfiniteKernel(NETWORKS[name](8).double(), kind, W, B)(X1)
        distances, seeds = [], 16 if kind == "ntk" else 32
        for width in (16, 64 if "then an activation" in name else 256):  # it has four times as many channels
            found = []
            for seed in range(1000, 1000 + seeds):
                if kind == "ntk":
                    found.append(tangent_kernel(drawn(name, width, seed * width), X1).reshape(3, 3))
                else:
                    with torch.no_grad():
                        out = drawn(name, width, seed * width, 512)(X1)
                    found.append(out @ out.T / 512)
            values = torch.stack(found)
            distances.append(float((values - limit).flatten(1).norm(dim=1).square().mean().sqrt() / limit.norm()))
        z = (values.mean(0) - limit) / (values.std(0) / math.sqrt(seeds))
        assert z.abs().max() < 6, (kind, z)
        assert distances[1] < 0.75 * distances[0], (kind, distances)


def test_own_initialization_of_a_transposed_convolution():
    """torch draws its weights uniformly with variance 1 / (3 outputs taps); an output adds up inputs taps of them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(conv(2, 48), R(), nn.ConvTranspose2d(48, 96, 3, stride=2), R(), *pooled(96)).double()
    layers = InfiniteKernel(model)._read(X1)[0].layers
    found = next(k for k in layers if isinstance(k, Affine) and "'2'" in k.name)
    assert found.weight_var == pytest.approx(48 / (3 * 96), rel=1e-12)
    assert found.weight_ntk == 48 * 9


# ------------------------------------------------------------------ refusals


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c, self.function = conv(2, 8, padding=1), conv(8, 8, padding=1), nn.Linear(8, 1), function

    def forward(self, x):
        return self.c(self.function(self, x).mean((2, 3)))


REFUSED = {
    "product of what depends on each other": (
        lambda m, x: (h := F.relu(m.a(x))) * F.relu(m.b(h)),
        "product of branches that depend",
    ),
    "activation of a product": (lambda m, x: F.relu((h := F.relu(m.a(x))) * m.b(h)), "not Gaussian"),
    "the input beside": (lambda m, x: torch.cat([x, m.a(x)[:, :6]], 1), "mixes channels|input itself"),
    "the input side by side": (
        lambda m, x: torch.cat([m.a(x), x.repeat(1, 4, 1, 1)], 2),
        "the input itself beside a wide layer",
    ),
    "positions that depend on each other": (
        lambda m, x: torch.cat([h := F.relu(m.a(x)), F.relu(m.b(h))], 2),
        "sum of branches that depend on each other",
    ),
    "samples side by side": (lambda m, x: torch.cat([m.a(x), m.a(x)], 0)[:3], "second time|along the samples"),
    "channels added up": (lambda m, x: m.a(x).cumsum(1), r"cumsum, which mixes"),
    "maximum over positions": (lambda m, x: F.adaptive_max_pool2d(m.a(x), 2), "average pooling"),
    "padding with ones": (lambda m, x: F.pad(m.a(x), (1, 1), value=1.0), "pad, which mixes"),
    "activation of a depthwise convolution": (
        lambda m, x: F.relu(F.conv2d(F.relu(m.a(x)), m.b.weight[:, :1], groups=8)),
        "computed from b.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    function, message = REFUSED[name]
    with pytest.raises(Refused, match=message):
        InfiniteKernel(Net(function).double(), "ntk", W, B)(X1)


def test_positions_in_one_axis_are_those_of_the_grid():
    flat = Net(lambda m, x: m.a(x).flatten(2).flip(2).reshape(-1, 8, 5, 4)).double()
    other = Net(lambda m, x: m.a(x).flip((2, 3))).double()
    for kind in ("nngp", "ntk"):
        found, wanted = (InfiniteKernel(model, kind, W, B)(X1) for model in (flat, other))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_an_activation_of_a_depthwise_convolution_is_refused():
    model = nn.Sequential(*start(), conv(8, 8, groups=8), R(), *pooled()).double()
    with pytest.raises(Refused, match=r"layer '3' \(ReLU\).*not Gaussian"):
        InfiniteKernel(model, "ntk", W, B)(X1)


def test_a_product_of_flattened_positions_is_refused_and_one_of_the_grids_is_not():
    branch = lambda: nn.Sequential(*start(), conv(8, 8, padding=1), nn.Flatten())
    model = nn.Sequential(Mul(branch(), branch()), nn.Linear(160, 1)).double()
    with pytest.raises(Refused, match="product of values of several branches or flattened positions"):
        InfiniteKernel(model, "ntk", W, B)(X1)
    grids = nn.Sequential(Mul(*(b[:-1] for b in model[0].branches)), nn.Flatten(), model[1])
    _, T = ClosedOracle(W, B)(grids, X1)
    assert worst(InfiniteKernel(grids, "ntk", W, B)(X1), T) < 1e-11


def test_products_in_which_one_channel_meets_itself_are_refused():
    """A depthwise convolution keeps to its channel, and so does a product: E[z z' h h'] is not E[z z'] E[h h']."""
    depthwise = Mul(nn.Identity(), conv(8, 8, padding=1, groups=8))
    gates = Mul(nn.Identity(), Mul(nn.Identity(), conv(8, 8, padding=1)))
    for product in (depthwise, gates):
        model = nn.Sequential(*start(), product, conv(8, 8), R(), *pooled()).double()
        with pytest.raises(Refused, match="product of branches that depend on each other"):
            InfiniteKernel(model, "ntk", W, B)(X1)


def test_outputs_of_several_branches_are_refused():
    model = nn.Sequential(nn.Linear(6, 8), R(), Cat(nn.Linear(8, 1), nn.Linear(8, 1))).double()
    with pytest.raises(Refused, match="several branches"):
        InfiniteKernel(model, "ntk", W, B)(V1)


def test_a_map_as_the_output_equals_the_oracle():
    model = nn.Sequential(*start(), conv(8, 1), Move(lambda z: z.flip(2)), Move(lambda z: z[:, :, 0, 1])).double()
    K, T = ClosedOracle(W, B)(model, X1)
    assert worst(InfiniteKernel(model, "nngp", W, B)(X1), K) < 1e-11
    assert worst(InfiniteKernel(model, "ntk", W, B)(X1), T) < 1e-11


def test_describe_names_them():
    text = InfiniteKernel(NETWORKS["U-net"](8).double(), "ntk", W, B).describe(X1)
    assert "branches side by side" in text
    assert "sums over positions" in text


def test_a_pool_with_a_divisor_of_its_own():
    """Windows of four, divided by three."""

    class Net(nn.Module):
        def __init__(self, pool):
            super().__init__()
            self.first, self.last, self.pool = nn.Conv2d(2, 8, 1), nn.Linear(8, 1), pool

        def forward(self, x):
            return self.last(self.pool(torch.relu(self.first(x))).mean((2, 3)))

    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own, factor = (
        InfiniteKernel(Net(pool).double(), "ntk", W, B)
        for pool in (lambda z: F.avg_pool2d(z, 2, divisor_override=3), lambda z: F.avg_pool2d(z, 2) * (4 / 3))
    )
    torch.testing.assert_close(own(x), factor(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(own(x.clone().requires_grad_()).detach(), factor(x), rtol=1e-12, atol=0)
    assert (own(x) > 1.2 * InfiniteKernel(Net(nn.AvgPool2d(2)).double(), "ntk", W, B)(x)).all()
