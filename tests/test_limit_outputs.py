"""Networks with a value per position (segmentation, sequence tags): all pairs of positions, and their mean."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Add, Cat, Move
from test_limit_positions import B, ClosedOracle, W, conv, worst
from torch import nn

from ntkit import InfiniteKernel, Refused, TangentKernel
from ntkit.kernels.infinite import limit_tiles, planes
from ntkit.networks.parametrization import Scaled
from ntkit.testing import check_kernel

R = nn.ReLU
DRAW = torch.Generator().manual_seed(0)
X1, X2 = (torch.randn(n, 2, 4, 3, generator=DRAW, dtype=torch.float64) for n in (3, 2))
S1, S2 = (torch.randn(n, 2, 6, generator=DRAW, dtype=torch.float64) for n in (3, 2))


def unet(n, outputs=2):
    down = [R(), nn.AvgPool2d((2, 1)), conv(n, n, padding=1), R(), nn.ConvTranspose2d(n, n, (2, 1), stride=(2, 1))]
    return nn.Sequential(
        conv(2, n, padding=1),
        Cat(nn.Identity(), nn.Sequential(*down)),
        conv(2 * n, n, padding=1),
        R(),
        conv(n, outputs, 1),
    )


def tagger(n, outputs=2):
    layers = [nn.Conv1d(2, n, 3, padding=1), R(), nn.Conv1d(n, n, 3, padding=2, dilation=2), R()]
    return nn.Sequential(*layers, nn.Conv1d(n, outputs, 1))


NETWORKS = {
    "U-Net": (unet, X1, X2),
    "sequence tags": (tagger, S1, S2),
    "residual": (
        lambda n, c=2: nn.Sequential(
            conv(2, n, 2), Add(nn.Identity(), nn.Sequential(R(), conv(n, n, padding=1))), R(), conv(n, c, 1)
        ), X1, X2
    ),
    "fewer positions": (
        lambda n, c=2: nn.Sequential(conv(2, n, 2), R(), nn.AvgPool2d((1, 2), 1), conv(n, c, 2, padding=1)), X1, X2
    ),
    "upsampled": (
        lambda n, c=2: nn.Sequential(
            conv(2, n), R(), conv(n, c, 1), Move(lambda z: F.interpolate(z, size=(4, 3), mode="bilinear"))
        ), X1, X2
    ),
    "one position": (lambda n, c=2: nn.Sequential(conv(2, n, 3), R(), conv(n, c, (2, 1))), X1, X2),
    "ends in an activation": (lambda n, c=2: nn.Sequential(conv(2, n, 3), R(), conv(n, c, 1), R()), X1, X2),
}  # fmt: skip


def of_all_pairs(name):
    """The oracle's kernels of X1, X2: [5, 5, H, W, H, W] each."""
    network, x1, x2 = NETWORKS[name]
    x = torch.cat([x1, x2])
    grid = x.reshape(*x.shape[:2], *(1,) * (4 - x.dim()), *x.shape[2:])
    K = torch.einsum("ichw,jcxy->ijhwxy", grid, grid) / grid.shape[1]
    K, T, _ = ClosedOracle(W, B).go(network(8).double(), (K, torch.zeros_like(K), torch.zeros_like(K)))
    return {"nngp": K, "ntk": T}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("small", [False, True])
def test_equal_all_pairs_of_positions(name, small, monkeypatch):
    if small:  # several tiles, and each in parts
        monkeypatch.setattr(limit_tiles, "_LEAST_ELEMENTS", 1)
        monkeypatch.setattr(planes, "_KEPT", 1)
        monkeypatch.setattr(limit_tiles, "workers", lambda: 4)
    network, x1, x2 = NETWORKS[name]
    for kind, wanted in of_all_pairs(name).items():
        kernel, count = InfiniteKernel(network(8).double(), kind, W, B), math.prod(wanted.shape[2:4])
        wanted = wanted.reshape(5, 5, count, count)
        mean = wanted.diagonal(dim1=2, dim2=3).mean(-1)
        square = kernel.positions(x1)
        assert worst(square, wanted[:3, :3]) < 1e-11
        assert torch.equal(square, square.permute(1, 0, 3, 2))
        assert worst(kernel.positions(x1, x2), wanted[:3, 3:]) < 1e-11
        assert worst(kernel.positions(x2, x1), wanted[3:, :3]) < 1e-11
        assert worst(kernel(x1), mean[:3, :3]) < 1e-11
        assert worst(kernel(x1, x2), mean[:3, 3:]) < 1e-11
        assert worst(kernel.diagonal(x1), mean[:3, :3].diagonal()) < 1e-11


@pytest.mark.parametrize("name", ["U-Net", "sequence tags"])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_laws(name, kind):
    network, x1, x2 = NETWORKS[name]
    check_kernel(InfiniteKernel(network(8).double(), kind, W, B), x1, x2)


def test_channels_behind_the_positions_and_single_precision():
    network, x1, _ = NETWORKS["sequence tags"]
    last = nn.Sequential(*network(8), Move(lambda z: z.transpose(1, 2))).double()
    image = nn.Sequential(*unet(8), Move(lambda z: z.permute(0, 2, 3, 1))).double()
    for model, plain, x in ((last, network(8).double(), x1), (image, unet(8).double(), X1)):
        kernel, other = (InfiniteKernel(m, "ntk", W, B) for m in (model, plain))
        assert torch.equal(kernel(x), other(x))
        assert torch.equal(kernel.positions(x), other.positions(x))
        single = kernel.positions(x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), kernel.positions(x), rtol=1e-5, atol=1e-6)


def test_a_vector_of_outputs_has_one_position():
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), R(), nn.Linear(8, 2)).double()
    kernel = InfiniteKernel(model, "ntk", W, B)
    torch.testing.assert_close(kernel.positions(X1, X2)[..., 0, 0], kernel(X1, X2), rtol=1e-13, atol=0)


def test_gradients_of_the_mean_are_finite_differences():
    kernel = InfiniteKernel(unet(8).double(), "ntk", W, B)
    x = X1[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kernel(z, X2), x, eps=1e-6, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------ wide networks


def drawn(network, width, seed, outputs=2):
    """A network in the NTK parametrization: weights and biases standard normal, factors in the forward pass."""
    model, generator = network(width, outputs).double(), torch.Generator().manual_seed(seed)
    for layer in list(model.modules()):
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            weight = layer.weight.detach()
            inputs = weight[:, 0].numel() if isinstance(layer, nn.ConvTranspose2d) else weight[0].numel()
            for what, factor in (("weight", W / math.sqrt(inputs)), ("bias", B)):
                nn.utils.parametrize.register_parametrization(layer, what, Scaled(factor))
                with torch.no_grad():
                    getattr(layer.parametrizations, what).original.normal_(generator=generator)
    return model


@pytest.mark.parametrize("name", ["U-Net", "sequence tags"])
def test_wide_networks_tend_to_it(name):
    """The full tangent kernel, all outputs and positions: within six standard errors of the mean, and ever closer."""
    network, x, _ = NETWORKS[name]
    kernel = InfiniteKernel(network(8).double(), "ntk", W, B)
    each, distances = kernel.positions(x), []
    count = each.shape[2]
    limit = torch.einsum("ijpq,cd->ijcpdq", each, torch.eye(2, dtype=each.dtype))
    for width in (8, 64):
        full = [
            TangentKernel(drawn(network, width, 1000 * width + s), "full")(x).reshape(3, 3, 2, count, 2, count)
            for s in range(24)
        ]
        values = torch.stack(full)
        distances.append(float((values - limit).flatten(1).norm(dim=1).square().mean().sqrt() / limit.norm()))
    z = (values.mean(0) - limit) / (values.std(0) / math.sqrt(24))
    assert z.abs().max() < 6
    assert distances[1] < 0.6 * distances[0]
    model = drawn(network, 64, 5)
    trace, whole = TangentKernel(model, "trace")(x) / (2 * count), TangentKernel(model, "full")(x)
    parts = whole.reshape(3, 3, 2 * count, 2 * count).diagonal(dim1=2, dim2=3).mean(-1)
    torch.testing.assert_close(
        trace, parts, rtol=1e-10, atol=0
    )  # the same mean of a network, which k(x) is of the limit


def test_covariances_of_wide_networks_tend_to_it():
    network, x, _ = NETWORKS["U-Net"]
    limit = InfiniteKernel(network(8).double(), "nngp", W, B).positions(x)
    found = []
    for seed in range(40):
        with torch.no_grad():
            out = drawn(network, 128, seed, 512)(x).flatten(2)
        found.append(torch.einsum("icp,jcq->ijpq", out, out) / 512)
    values = torch.stack(found)
    z = (values.mean(0) - limit) / (values.std(0) / math.sqrt(40))
    assert z.abs().max() < 6


# ------------------------------------------------------------------ refusals


def test_refusals():
    kernel = InfiniteKernel(unet(8).double(), "ntk", W, B)
    with pytest.raises(Refused, match=r"positions.*require grad"):
        kernel.positions(X1.clone().requires_grad_())
    flat = nn.Sequential(conv(2, 8), R(), nn.Flatten()).double()
    with pytest.raises(Refused, match="flattened positions"):
        InfiniteKernel(flat, "ntk", W, B)(X1)
    pooled = nn.Sequential(conv(2, 8), R(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 1)).double()
    with pytest.raises(Refused, match="a graph of layers"):
        InfiniteKernel(pooled, "ntk", W, B, sample=2).positions(X1)
    with pytest.raises(Refused, match=r"the kernel: got values up to .*float32"):
        InfiniteKernel(tagger(8), "ntk", W, B).positions(1e25 * S1.float())
