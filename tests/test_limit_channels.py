"""Parts of channels: slices, chunks, gates, shuffles; beside branches with weights of their own, and wide networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Act, Add, Cat, Mul, Oracle
from torch import nn

from ntkit import InfiniteKernel, Refused
from ntkit.testing import check_kernel

W, B = 1.3, 0.2
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(4, 2, 4, 3, generator=DRAW, dtype=torch.float64)
V = torch.randn(4, 6, generator=DRAW, dtype=torch.float64)


class Net(nn.Module):
    """Layers a, b, c, d and what is done with them, then a mean over positions and a dense layer."""

    def __init__(self, call, head, **layers):
        super().__init__()
        self.call, self.head = call, head
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        h = self.call(self, x)
        return self.head(h.mean((2, 3)) if h.dim() == 4 else h)


def conv(a, b, k=1):
    return nn.Conv2d(a, b, k)


def dense(a, b):
    return nn.Linear(a, b)


def halves(m, x):
    one, two = m.a(x).chunk(2, 1)
    return F.relu(m.b(one * torch.sigmoid(two)))


def three(m, x):
    one, two, three = m.a(x).split([len(m.b.weight)] * 3, 1)
    return F.relu(m.b(one * torch.erf(two) - 0.5 * three))


def shuffled(m, x):
    h = F.relu(m.a(x))
    n = h.shape[1] // 2
    h = torch.cat([h[:, :n], F.relu(m.b(h[:, n:]))], 1)
    return F.relu(m.c(h))


def permuted(m, x):
    h = m.a(x)
    order = torch.arange(h.shape[1]).flip(0)
    return F.relu(m.b(F.relu(h[:, order]).flip(1)))


def of_a_sum(m, x):
    h = m.a(x) + m.b(F.relu(m.c(x)))
    n = h.shape[1] // 2
    return F.relu(m.d(h[:, n:] * torch.erf(h[:, :n])))


def of_a_norm(m, x):
    h = m.a(x)
    h = F.layer_norm(h, h.shape[1:])
    n = h.shape[1] // 2
    return F.relu(m.b(h[:, :n] * torch.erf(h[:, n:])))


def at_the_border(m, x):
    a = m.a(x)
    h = torch.cat([a, F.relu(m.b(x))], 1)
    return F.relu(m.c(h[:, : a.shape[1]] * h[:, a.shape[1] :]))


def across_the_border(m, x):
    a = m.a(x)
    h, n = torch.cat([a, F.relu(m.b(x))], 1), a.shape[1]
    return m.c(h[:, n // 2 : n + n // 2])


def of_a_part(m, x):
    h = m.a(x)
    n = h.shape[1] // 2
    second = h[:, n:]
    return F.relu(m.b(second[:, : n // 2] - second[:, n // 2 :]))


# by name: the network at a width; the same with a layer of weights for each part, for brute force; samples
NETWORKS = {
    "gate": (
        lambda n: Net(lambda m, x: F.relu(m.b(F.glu(m.a(x), 1))), dense(n, 1), a=dense(6, 2 * n), b=dense(n, n)),
        lambda: [Mul(dense(6, 8), nn.Sequential(dense(6, 8), nn.Sigmoid())), dense(8, 8), nn.ReLU(), dense(8, 1)],
        V,
    ),
    "gate behind an activation": (
        lambda n: Net(
            lambda m, x: F.relu(m.c(F.glu(m.b(F.relu(m.a(x))), 1))), dense(n, 1),
            a=conv(2, n, 2), b=conv(n, 2 * n, 2), c=conv(n, n),
        ),
        lambda: [
            conv(2, 8, 2), nn.ReLU(), Mul(conv(8, 8, 2), nn.Sequential(conv(8, 8, 2), nn.Sigmoid())), conv(8, 8),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), dense(8, 1),
        ],
        X,
    ),
    "halves": (
        lambda n: Net(halves, dense(n, 1), a=conv(2, 2 * n, 2), b=conv(n, n)),
        lambda: [
            Mul(conv(2, 8, 2), nn.Sequential(conv(2, 8, 2), nn.Sigmoid())), conv(8, 8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), dense(8, 1),
        ],
        X,
    ),
    "three parts": (
        lambda n: Net(three, dense(n, 1), a=dense(6, 3 * n), b=dense(n, n)),
        lambda: [
            Add(Mul(dense(6, 8), nn.Sequential(dense(6, 8), Act(torch.erf))), Halved(dense(6, 8))), dense(8, 8),
            nn.ReLU(), dense(8, 1),
        ],
        V,
    ),
    "a branch on half of the channels": (
        lambda n: Net(shuffled, dense(n, 1), a=conv(2, 2 * n, 2), b=conv(n, n), c=conv(2 * n, n)),
        lambda: [
            conv(2, 8, 2), nn.ReLU(), Cat(nn.Identity(), nn.Sequential(conv(8, 8), nn.ReLU())), conv(8, 8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), dense(8, 1),
        ],
        X,
    ),
    "permuted": (
        lambda n: Net(permuted, dense(n, 1), a=dense(6, n), b=dense(n, n)),
        lambda: [dense(6, 8), nn.ReLU(), dense(8, 8), nn.ReLU(), dense(8, 1)],
        V,
    ),
    "parts of a sum": (
        lambda n: Net(of_a_sum, dense(n, 1), a=dense(6, 2 * n), b=dense(n, 2 * n), c=dense(6, n), d=dense(n, n)),
        None,
        V,
    ),
    "parts of a norm": (lambda n: Net(of_a_norm, dense(n, 1), a=dense(6, 2 * n), b=dense(n, n)), None, V),
    "at the border": (
        lambda n: Net(at_the_border, dense(n, 1), a=dense(6, n), b=dense(6, n), c=dense(n, n)),
        lambda: [Mul(dense(6, 8), nn.Sequential(dense(6, 8), nn.ReLU())), dense(8, 8), nn.ReLU(), dense(8, 1)],
        V,
    ),
    "across the border": (
        lambda n: Net(across_the_border, dense(n, 1), a=dense(6, n), b=dense(6, n), c=dense(n, n)),
        lambda: [Cat(dense(6, 8), nn.Sequential(dense(6, 8), nn.ReLU())), dense(8, 8), dense(8, 1)],
        V,
    ),
    "parts of a part": (
        lambda n: Net(of_a_part, dense(n, 1), a=dense(6, 4 * n), b=dense(n, n)),
        lambda: [Add(dense(6, 8), dense(6, 8)), dense(8, 8), nn.ReLU(), dense(8, 1)],
        V,
    ),
}  # fmt: skip


class Halved(nn.Sequential):
    """Half of a layer."""


class WithFactors(Oracle):
    """The oracle with halves of layers."""

    def go(self, m, s):
        found = super().go(nn.Sequential(*m) if isinstance(m, Halved) else m, s)
        return tuple(t / 4 for t in found) if isinstance(m, Halved) else found


@pytest.mark.parametrize("name", [name for name, (_, branches, _) in NETWORKS.items() if branches])
def test_equal_branches_with_weights_of_their_own(name):
    build, branches, x = NETWORKS[name]
    K, T = WithFactors(W, B)(nn.Sequential(*branches()).double(), x)
    for kind, wanted in (("nngp", K), ("ntk", T)):
        kernel = InfiniteKernel(build(8).double(), kind, W, B)
        torch.testing.assert_close(kernel(x[:2], x[2:]), wanted[:2, 2:], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(kernel(x), wanted, rtol=2e-8, atol=1e-12)
        torch.testing.assert_close(kernel.diagonal(x), wanted.diagonal(), rtol=1e-10, atol=0)


def drawn(build, width, seed, outputs=1):
    """A network with standard normal weights in the NTK parametrization, written into its own."""
    model = build(width)
    model.head = nn.Linear(model.head.in_features, outputs)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_parameter("w", nn.Parameter(torch.randn(layer.weight.shape, generator=generator).double()))
            layer.register_parameter("b", nn.Parameter(torch.randn(layer.bias.shape, generator=generator).double()))
    return model


class Scaled(nn.Module):
    """A model whose layers use w_std / sqrt(fan in) w and b_std b."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        scaled = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                scaled[f"{name}.weight"] = layer.w * (W / layer.w[0].numel() ** 0.5)
                scaled[f"{name}.bias"] = layer.b * B
        return torch.func.functional_call(self.model, scaled, (x,))


def gradients(model, x):
    """The tangent kernel by plain autograd."""
    own = [p for n, p in model.named_parameters() if n.endswith((".w", ".b"))]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, own, retain_graph=True)]) for out in model(x)[:, 0]
    ]
    rows = torch.stack(rows)
    return rows @ rows.T


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("name", NETWORKS)
def test_wide_networks_tend_to_it(name, kind):
    build, _, x = NETWORKS[name]
    x = x[:3]
    limit, distances, seeds = InfiniteKernel(build(8).double(), kind, W, B)(x), [], 16 if kind == "ntk" else 32
    for width in (16, 256):
        found = []
        for seed in range(seeds):
            if kind == "ntk":
                found.append(gradients(Scaled(drawn(build, width, seed + 1000 * width)), x))
            else:
                with torch.no_grad():
                    out = Scaled(drawn(build, width, seed + 1000 * width, 512))(x)
                found.append(out @ out.T / 512)
        values = torch.stack(found)
        error = values.std(0) / seeds**0.5
        distances.append(float((values - limit).square().mean().sqrt()))
    assert float(((values.mean(0) - limit) / error).abs().max()) < 6
    assert distances[1] < distances[0] / 2


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_laws(kind):
    build, _, x = NETWORKS["a branch on half of the channels"]
    check_kernel(InfiniteKernel(build(8).double(), kind, W, B), x[:3], x[2:])


def test_the_layers_say_which_channels():
    text = InfiniteKernel(NETWORKS["halves"][0](8).double(), "ntk", W, B).describe(X)
    assert "8 of 16 channels of layer 'a' (Conv2d)" in text


REFUSED = {
    "parts that overlap": (lambda m, x: (lambda h: h[:, :5] * F.relu(h[:, 3:]))(m.a(x)), "depend on each other"),
    "sums of overlapping parts": (lambda m, x: (lambda h: h[:, :5] + h[:, 3:])(m.a(x)), "depend on each other"),
    "a part and the whole": (
        lambda m, x: (lambda h: h * F.relu(torch.cat([h[:, :4], h[:, 4:]], 1)))(m.a(x)), "depend on each other",
    ),
    "the whole in another order": (lambda m, x: (lambda h: h + h.flip(1))(m.a(x)), "depend on each other"),
    "a part in another order": (
        lambda m, x: (lambda h: h[:, :4] * torch.erf(h[:, [3, 2, 1, 0]]))(m.a(x)), "depend on each other",
    ),
    "sums of activations of parts": (
        lambda m, x: (lambda h: h[:, :4] + h[:, 4:])(F.relu(m.a(x))), "depend on each other",
    ),
    "channels twice": (lambda m, x: F.relu(m.a(x))[:, [0, 0, 1, 2]], "channels that it repeats"),
    "one channel": (lambda m, x: F.relu(m.a(x))[:, 0][:, None], "mixes channels"),
    "all channels one by one": (lambda m, x: torch.stack(m.a(x).unbind(1)[:4], 1), "mixes channels"),
    "halves of positions": (lambda m, x: F.glu(m.a(x), 2), "halves along axis 2"),
    "some of flattened positions": (lambda m, x: m.a(x).flatten(1)[:, :7], "features of flattened positions"),
    "a depthwise layer's": (lambda m, x: m.c(m.a(x))[:, :4], "whose weights are in groups"),
    "branches in another order": (
        lambda m, x: torch.cat([m.a(x), F.relu(m.b(x))], 1).flip(1), "several branches in another order",
    ),
    "channels rolled and added up": (lambda m, x: m.a(x).cumsum(1), "cumsum, which mixes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_limit_is_refused(name):
    call, reason = REFUSED[name]
    torch.manual_seed(0)
    layers = {"a": conv(2, 8), "b": conv(2, 8), "c": nn.Conv2d(8, 8, 1, groups=8)}
    last = nn.LazyLinear(1)
    model = Net(call, last, **layers).double()
    with torch.no_grad():
        model(X)
    with pytest.raises(Refused, match=reason):
        InfiniteKernel(model, w_std=W, b_std=B)(X)
