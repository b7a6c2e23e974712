"""Attention whose scores tend to constants: beside numpy over all positions, finite networks, and other writings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ntkit import InfiniteKernel, Refused
from ntkit.kernels.infinite.sampled import WeightedKernel
from ntkit.networks.larger_copies import larger_copy

W, B = 1.3, 0.4
LENGTH, FEATURES = 5, 3
X = torch.randn(4, LENGTH, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(3, LENGTH, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---------------------------------------------------------------------- the limit in numpy: arrays [n, n, P, P]


def gram(x):
    return np.einsum("iac,jbc->ijab", x, x) / x.shape[2]


def dense(state, bias=True, w=W):
    k, t = state
    b = B**2 if bias else 0
    new = w**2 * k + b
    return new, w**2 * t + new


def own(k):
    """Variances of each position, [n, P]."""
    return np.einsum("iiaa->ia", k)


def relu(state):
    k, t = state
    v = own(k)
    root = np.sqrt(v[:, None, :, None] * v[None, :, None, :])
    c = np.clip(k / root, -1, 1)
    angle = np.arccos(c)
    return root * (np.sqrt(1 - c * c) + (math.pi - angle) * c) / (2 * math.pi), t * (math.pi - angle) / (2 * math.pi)


def erf(state):
    k, t = state
    v = 1 + 2 * own(k)
    outer = v[:, None, :, None] * v[None, :, None, :]
    return 2 / math.pi * np.arcsin(2 * k / np.sqrt(outer)), t * 4 / math.pi / np.sqrt(outer - 4 * k * k)


def norm(state, eps=1e-5):
    """Each position over its features, with a trained weight of ones and a trained bias of zeros."""
    k, t = state
    r = 1 / np.sqrt(own(k) + eps)
    scale = r[:, None, :, None] * r[None, :, None, :]
    return k * scale, t * scale + k * scale + 1


def mixed(state, maps):
    return tuple(np.einsum("ioa,ijab,jqb->ijoq", maps, s, maps) for s in state)


def mean(state):
    return tuple(s.mean((2, 3), keepdims=True) for s in state)


def plus(one, two):
    return one[0] + two[0], one[1] + two[1]


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(k):
    return np.einsum("iiab->iab", k)


def start(x):
    k = gram(x.numpy())
    return k, 0 * k


CAUSAL = np.where(np.tril(np.ones((LENGTH, LENGTH))) > 0, 0.0, -np.inf)


# ---------------------------------------------------------------------- networks as users write them


class Net(nn.Module):
    """A dense layer, a block, the mean over positions, a dense layer; q and k share a layer or have their own."""

    def __init__(self, attend, width=16, heads=2, shared=True, bias=True, end="mean"):
        super().__init__()
        self.attend, self.heads, self.end = attend, heads, end
        self.first = nn.Linear(FEATURES, width)
        self.q, self.v = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
        self.k = self.q if shared else nn.Linear(width, width, bias=bias)
        self.shared = shared
        self.out = nn.Linear(width, width)
        self.last = nn.Linear(width * LENGTH if end == "flat" else width, 1)

    def split(self, h):
        return h.view(*h.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x):
        h = self.first(x).relu()
        q = self.split(self.q(h))
        k = q if self.shared else self.split(self.k(h))
        h = self.out(self.attend(q, k, self.split(self.v(h))).transpose(1, 2).reshape(h.shape))
        if self.end == "first":
            return self.last(h[:, 0])
        if self.end in ("each", "turned"):
            return self.last(h if self.end == "each" else h.flip(1))
        return self.last(h.flatten(1) if self.end == "flat" else h.mean(1))


def by_softmax(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1], -1) @ v


def causal(q, k, v):
    s = q @ k.transpose(-2, -1) * (1 / k.size(-1))
    mask = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
    return F.softmax(s.masked_fill(mask, float("-inf")), dim=-1) @ v


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-1])


def fused_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=1 / q.shape[-1], is_causal=True)


BIAS = torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ALLOWED = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) + torch.eye(LENGTH) > 0.5


def fused_bias(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=BIAS, scale=1 / q.shape[-1])


def fused_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ALLOWED, scale=1 / q.shape[-1])


def identity(q, k, v):
    return (q @ k.mT) / q.shape[-1] @ v


def rectified(q, k, v):
    return torch.relu(torch.matmul(q, k.mT) / q.shape[-1] - 0.5) @ v / LENGTH


def normalized(q, k, v):
    s = (q @ k.mT / q.shape[-1]).square() + 0.1
    return (s / s.sum(-1, keepdim=True)) @ v


def roots(q, k, v):
    return torch.softmax((q / q.shape[-1] ** 0.5) @ (k / k.shape[-1] ** 0.5).mT, -1) @ v


def batched(q, k, v):
    flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    s = torch.bmm(flat[0], flat[1].transpose(1, 2)) / q.shape[-1]
    return torch.bmm(s.softmax(2), flat[2]).view(v.shape)


def seen(q, k, v):
    """With a temperature, and twice: of what the first has mixed."""
    return by_softmax(2 * q, k, by_softmax(q, k, v))


MECHANISMS = {
    "softmax": (by_softmax, softmax),
    "causal": (causal, lambda s: softmax(s + CAUSAL)),
    "fused": (fused, softmax),
    "fused, causal": (fused_causal, lambda s: softmax(s + CAUSAL)),
    "fused, bias": (fused_bias, lambda s: softmax(s + BIAS.numpy())),
    "fused, mask": (fused_mask, lambda s: softmax(np.where(ALLOWED.numpy(), s, -np.inf))),
    "identity": (identity, lambda s: s),
    "relu over the length": (rectified, lambda s: np.maximum(s - 0.5, 0) / LENGTH),
    "normalized": (normalized, lambda s: (s**2 + 0.1) / (s**2 + 0.1).sum(-1, keepdims=True)),
    "roots on both sides": (roots, softmax),
    "heads and samples in one axis": (batched, softmax),
    "twice": (seen, lambda s: softmax(2 * s) @ softmax(s)),
}


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def attention(state, mechanism, shared=True, bias=True):
    query = dense(state, bias)[0]
    of = scores(query) if shared else 0 * scores(query)
    return dense(mixed(dense(state, bias), mechanism(of)))


ENDS = {
    "mean": mean,
    "first": lambda s: tuple(t[:, :, :1, :1] for t in s),
    "flat": lambda s: tuple(np.einsum("ijaa->ij", t)[:, :, None, None] / LENGTH for t in s),
}


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def check(model, state_of, x=X):
    """Both kernels, of two sets and of one, and their diagonals."""
    for kind, place in (("nngp", 0), ("ntk", 1)):
        kernel = InfiniteKernel(model, kind, W, B)
        both = torch.cat([x, Y]) if x.shape[1:] == Y.shape[1:] else x
        wanted, n = state_of(both)[place][:, :, 0, 0], len(x)
        close(kernel(x).numpy(), wanted[:n, :n])
        close(kernel.diagonal(x).numpy(), np.diag(wanted)[:n])
        if len(both) > n:
            close(kernel(x, Y).numpy(), wanted[:n, n:])
            close(kernel.paired(x[:3], Y).numpy(), np.diag(wanted[:3, n:]))


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_is_that_of_the_covariance(name):
    attend, mechanism = MECHANISMS[name]
    model = seeded(lambda: Net(attend))
    check(model, lambda x: dense(mean(attention(relu(dense(start(x))), mechanism))))


@pytest.mark.parametrize("name", ["softmax", "fused, causal", "identity"])
def test_independent_queries_and_keys_have_scores_of_zero(name):
    attend, mechanism = MECHANISMS[name]
    model = seeded(lambda: Net(attend, shared=False))
    if name == "identity":
        assert float(InfiniteKernel(model, "nngp", W, 0.0)(X).abs().max()) == 0
        return
    check(model, lambda x: dense(mean(attention(relu(dense(start(x))), mechanism, shared=False))))


@pytest.mark.parametrize("end", ENDS)
def test_what_follows(end):
    model = seeded(lambda: Net(by_softmax, end=end))
    check(model, lambda x: dense(ENDS[end](attention(relu(dense(start(x))), softmax))))


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_a_value_per_position(kind):
    model, both = seeded(lambda: Net(causal, end="each")), torch.cat([X, Y])
    wanted = dense(attention(relu(dense(start(both))), lambda s: softmax(s + CAUSAL)))[kind == "ntk"]
    kernel, n = InfiniteKernel(model, kind, W, B), len(X)
    close(kernel.positions(X).numpy(), wanted[:n, :n])
    close(kernel.positions(X, Y).numpy(), wanted[:n, n:])
    close(kernel(X, Y).numpy(), np.einsum("ijaa->ij", wanted[:n, n:]) / LENGTH)
    close(kernel.diagonal(X).numpy(), np.einsum("iiaa->i", wanted[:n, :n]) / LENGTH)
    turned = seeded(lambda: Net(causal, end="turned"))
    with pytest.raises(Refused, match="positions in another order"):
        InfiniteKernel(turned, kind, W, B)(X)


@pytest.mark.parametrize("heads", [1, 4])
def test_the_number_of_heads_is_of_no_influence(heads):
    model, other = seeded(lambda: Net(by_softmax, heads=heads)), seeded(lambda: Net(by_softmax, 32))
    close(InfiniteKernel(model, "ntk", W, B)(X).numpy(), InfiniteKernel(other, "ntk", W, B)(X).numpy())


class Block(nn.Module):
    """A block of a transformer with scores over the size of the heads."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.scale = 1.0 / self.head_dim
        self.qk, self.v, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        n, length, width = x.shape
        h = self.norm1(x)
        q, v = (f(h).reshape(n, length, self.heads, self.head_dim).permute(0, 2, 1, 3) for f in (self.qk, self.v))
        mixed = (q @ q.transpose(-1, -2) * self.scale).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Two blocks between dense layers, with learned positions."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, width), nn.Linear(width, 1)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        h = self.norm(self.blocks(self.first(x) + self.positions))
        return self.last(h.mean(1))


def unit(model):
    """With positions of exactly mean 0 and variance 1: their distribution is measured."""
    p = model.positions.data
    p.sub_(p.mean()).div_(p.square().mean().sqrt())
    return model


def block(state):
    h = norm(state)
    state = plus(state, attention(h, softmax))
    return plus(state, dense(relu(dense(norm(state)))))


def encoder(x):
    state = dense(start(x))
    state = tuple(s + np.eye(LENGTH) for s in state)
    return dense(mean(norm(block(block(state)))))


def test_an_encoder_equals_the_formulas():
    check(unit(seeded(Encoder)), encoder)


def test_finite_networks_tend_to_the_encoder_s_limit():
    model, seeds, factors = unit(seeded(Encoder)), 40, (2, 4, 8, 16)
    x = X[:3]
    distances, last = [], None
    limit = InfiniteKernel(model, "ntk", W, B)(x)
    for place, factor in enumerate(factors):
        found = []
        for seed in range(seeds):
            found.append(finite(16 * factor, 1000 * place + seed, x))
        last = torch.stack(found)
        distances.append(float((last - limit).norm() / limit.norm() / seeds**0.5))
    slope = np.polyfit(np.log(factors), np.log(distances), 1)[0]
    assert abs(slope + 0.5) < 0.15
    error = last.std(0) / seeds**0.5
    assert float((last.mean(0) - limit).norm()) < 3 * float(error.norm()) < 0.1 * float(limit.norm())


def finite(width, seed, x):
    """Kernel of one wide encoder in the NTK parametrization, by torch.func on standard normal parameters."""
    model = seeded(lambda: Encoder(width))
    generator = torch.Generator().manual_seed(seed)
    normal, scales = {}, {}
    for name, p in model.named_parameters():
        normal[name] = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        scales[name] = W / math.sqrt(p.shape[-1]) if name.endswith("weight") else B
        if "norm" in name:
            normal[name], scales[name] = p.detach().clone(), 1.0
        elif name == "positions":
            scales[name] = 1.0

    def outputs(normal, sample):
        values = {name: scales[name] * t for name, t in normal.items()}
        return torch.func.functional_call(model, values, (sample[None],))[0, 0]

    rows = torch.func.vmap(torch.func.grad(outputs), (None, 0))(normal, x)
    return sum(t.flatten(1) @ t.flatten(1).T for t in rows.values())


# ---------------------------------------------------------------------- other networks, and finite ones


class Padded(Net):
    """A mask that is computed from the input."""

    def forward(self, x):
        keep = x[:, :, 0] > -0.5

        def attend(q, k, v):
            s = (q @ k.mT / q.shape[-1]).masked_fill(~keep[:, None, None, :], -1e9)
            return s.softmax(-1) @ v

        self.attend = attend
        return super().forward(x)


class Einsum(Net):
    """Axes in another order; heads are not moved."""

    def forward(self, x):
        h = self.first(x).relu()
        q, v = (f(h).unflatten(2, (self.heads, -1)) for f in (self.q, self.v))
        s = torch.einsum("bqhd,bkhd->bhqk", q, q) / q.shape[-1]
        return self.last(self.out(torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v).flatten(2)).mean(1))


class Projected(Net):
    """Queries, keys and values from one layer."""

    def __init__(self, width=16):
        super().__init__(None, width)
        self.qkv = nn.Linear(width, 3 * width)
        del self.q, self.k, self.v

    def forward(self, x):
        h = self.first(x).relu()
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.last(self.out(by_softmax(q, k, v)).mean(1))


class Channels(nn.Module):
    """Images with features first; a patch is a position."""

    def __init__(self, width=16):
        super().__init__()
        self.patches, self.block = nn.Conv2d(2, width, 2, stride=2), Block(width)
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        return self.last(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Words(nn.Module):
    """An embedding in front of a block."""

    def __init__(self, width=16):
        super().__init__()
        self.embed, self.block, self.last = nn.Embedding(7, width), Block(width), nn.Linear(width, 1)

    def forward(self, words):
        return self.last(self.block(self.embed(words)).mean(1))


class Fixed(Encoder):
    """Encodings of positions as a buffer."""

    def __init__(self, width=16, heads=2):
        super().__init__(width, heads)
        del self.positions
        places, rates = torch.arange(LENGTH)[:, None], torch.exp(-torch.arange(0, width, 2) / 4)
        table = torch.cat([torch.sin(places * rates), torch.cos(places * rates)], 1)
        self.register_buffer("positions", table[None])


class Graph(nn.Module):
    """The edges of each sample are part of it: five positions of three features and five edges."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x):
        h, edges = x[:, :, :3], x[:, :, 3:]
        h = self.second(edges @ self.first(h).relu())
        return self.last((edges @ h.relu()).mean(1))


def padded(x):
    keep = x.numpy()[:, None, :, 0] > -0.5
    return dense(mean(attention(relu(dense(start(x))), lambda s: softmax(np.where(keep, s, -1e9)))))


def projected(x):
    return dense(mean(attention(relu(dense(start(x))), softmax, shared=False)))


def patches(x):
    n = len(x)
    cut = x.numpy().reshape(n, 2, 3, 2, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(n, 9, 8)
    k = gram(cut)
    return dense(mean(block(dense((k, 0 * k)))))


def words(x):
    same = (x.numpy()[:, None, :, None] == x.numpy()[None, :, None, :]).astype(float)
    return dense(mean(block((same, same))))


def fixed(x):
    table = Fixed().positions[0].double().numpy()
    table = table - table.mean(1, keepdims=True)
    k, t = dense(start(x))
    return dense(mean(norm(block(block((k + table @ table.T / table.shape[1], t))))))


def graph(x):
    k, edges = gram(x.numpy()[:, :, :3]), x.numpy()[:, :, 3:]
    state = mixed(relu(dense((k, 0 * k))), edges)
    return dense(mean(mixed(relu(dense(state)), edges)))


IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TEXT = torch.randint(0, 7, (4, LENGTH), generator=torch.Generator().manual_seed(6))
EDGES = torch.cat([X, (torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(7)) < 0.6).double()], 2)
NETWORKS = {
    "a mask of the input": (lambda: Padded(None), padded, X),
    "einsum": (lambda: Einsum(None), lambda x: dense(mean(attention(relu(dense(start(x))), softmax))), X),
    "one projection": (Projected, projected, X),
    "patches": (Channels, patches, IMAGES),
    "words": (Words, words, TEXT),
    "a buffer of positions": (Fixed, fixed, X),
    "a graph of each sample": (Graph, graph, EDGES),
}


def of_unit_words(model):
    """With words of exactly mean 0 and variance 1: their distribution is measured."""
    if isinstance(model, Words):
        p = model.embed.weight.data
        p.sub_(p.mean()).div_(p.square().mean().sqrt())
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_equal_the_formulas(name):
    make, formula, x = NETWORKS[name]
    check(of_unit_words(seeded(make)), formula, x)


@pytest.mark.parametrize(
    "name", ["a mask of the input", "one projection", "patches", "words", "a graph of each sample"]
)
def test_finite_networks_agree(name):
    make, _, x = NETWORKS[name]
    model, x = of_unit_words(seeded(make)), x[:3]
    larger, found = larger_copy(model, 8, x, (W, B)), []
    kernel = WeightedKernel(larger, "ntk", x)
    for seed in range(30):
        larger.draw(seed)
        found.append(kernel.gram(x, None))
    values, limit = torch.stack(found), InfiniteKernel(model, "ntk", W, B)(x)
    error = float(values.std(0).norm()) / 30**0.5
    assert float((values.mean(0) - limit).norm()) < 3 * error < 0.2 * float(limit.norm())


def test_the_samples_may_be_few_or_many():
    model = seeded(lambda: Padded(None))
    kernel = InfiniteKernel(model, "ntk", W, B)
    many = torch.randn(29, LENGTH, FEATURES, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    whole = kernel(many)
    close(whole.numpy(), padded(many)[1][:, :, 0, 0])
    close(kernel(many[:1]).numpy(), whole[:1, :1].numpy())
    close(kernel(many, many[3:5]).numpy(), whole[:, 3:5].numpy())
    assert torch.equal(whole, whole.T)
    low = InfiniteKernel(seeded(lambda: Padded(None)).float(), "ntk", W, B)(many.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), whole, rtol=2e-6, atol=0)


def test_torch_s_own_parametrization():
    model = seeded(lambda: Net(by_softmax, width=400, bias=False))
    kernel = InfiniteKernel(model, "nngp")
    assert "attention, scores that tend to their mean" in kernel.describe(X)
    third = 1 / 3  # of torch's default: variance 1 / (3 fan_in), of biases the same

    def layer(k, fan_in, bias=True):
        return third * k + (third / fan_in if bias else 0)

    k = layer(gram(X.numpy()), FEATURES)
    k = relu((k, 0 * k))[0]
    maps = softmax(scores(layer(k, 400, False)))
    k = layer(mixed((layer(k, 400, False),), maps)[0], 400)
    close(kernel(X).numpy(), layer(mean((k,))[0], 400)[:, :, 0, 0])


# ---------------------------------------------------------------------- refusals


def of_scores(function):
    return lambda: Net(lambda q, k, v: torch.softmax(function(q, k), -1) @ v)


class Trained(Net):
    def __init__(self, what):
        super().__init__(None)
        self.number = nn.Parameter(torch.ones(()) if what == "temperature" else torch.zeros(LENGTH, LENGTH))
        scaled = lambda q, k: q @ k.mT / q.shape[-1]
        if what == "temperature":
            self.attend = lambda q, k, v: torch.softmax(self.number * scaled(q, k), -1) @ v
        else:
            self.attend = lambda q, k, v: torch.softmax(scaled(q, k) + self.number, -1) @ v


class OfTorch(Net):
    def __init__(self):
        super().__init__(None)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.attention(h, h, h)[0].mean(1))


def across_samples(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1], 0) @ v


SLOPES = torch.arange(2.0).double()[:, None, None] * BIAS
REFUSED = {
    "root": (
        of_scores(lambda q, k: q @ k.mT / q.shape[-1] ** 0.5),
        "square root of their 8 features, which stay random",
    ),
    "fused": (lambda: Net(F.scaled_dot_product_attention), "square root of their 8 features, which stay random"),
    "independent, root": (
        lambda: Net(F.scaled_dot_product_attention, shared=False),
        "square root of their 8 features, which stay random",
    ),
    "of torch": (OfTorch, r"layer 'attention' \(MultiheadAttention\).*stay random"),
    "no scale": (of_scores(lambda q, k: q @ k.mT), "does not fall as 1 / features"),
    "a constant scale": (of_scores(lambda q, k: q @ k.mT * 0.1), "does not fall as 1 / features"),
    "a literal that is the size": (of_scores(lambda q, k: q @ k.mT / 8), "a factor 8 in its forward pass"),
    "a literal that is its inverse": (of_scores(lambda q, k: q @ k.mT * 0.125), "a factor 0.125 in its forward pass"),
    "the square": (of_scores(lambda q, k: q @ k.mT / q.shape[-1] ** 2), "does not fall as 1 / features"),
    "temperature": (lambda: Trained("temperature"), "trained parameter 'number' in the scores"),
    "trained bias": (lambda: Trained("bias"), "trained parameter 'number' in the scores"),
    "heads with biases of their own": (
        of_scores(lambda q, k: q @ k.mT / q.shape[-1] + SLOPES),
        "heads with different masks",
    ),
    "sum of scores": (
        of_scores(lambda q, k: q @ k.mT / q.shape[-1] + 2 * q @ k.mT / q.shape[-1]),
        "several calls",
    ),
    "a size of heads in a view": (
        lambda: Net(lambda q, k, v: by_softmax(*(t.reshape(len(t), -1, LENGTH, 8) for t in (q, k, v)))),
        "a factor 8 in its forward pass",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(Refused, match=rf"(?s){message}.*sample=16"):
        InfiniteKernel(seeded(make), "ntk", W, B)(X)


def test_softmax_over_samples_is_refused_with_sampling_too():
    model = seeded(lambda: Net(across_samples))
    with pytest.raises(Refused, match="depend on other samples") as refusal:
        InfiniteKernel(model, "ntk", W, B)(X)
    assert "sample=" not in str(refusal.value)
    with pytest.raises(Refused, match="evaluated alone"):
        InfiniteKernel(model, "ntk", W, B, sample=2)(X)


def test_refused_beside_the_input():
    model = seeded(lambda: Net(by_softmax))
    with pytest.raises(Refused, match="gradients of the kernel through Mixture"):
        InfiniteKernel(model, "ntk", W, B)(X.clone().requires_grad_())
    frozen = seeded(lambda: Trained("bias"))
    frozen.number.requires_grad_(False)
    close(InfiniteKernel(frozen, "ntk", W, B)(X).numpy(), InfiniteKernel(model, "ntk", W, B)(X).numpy())


def test_a_mask_of_the_input_that_is_the_same_for_all():
    """Of three positions: nothing but a run on two samples tells it from a mask of three samples."""

    class Same(Net):
        def forward(self, x):
            mask = x.new_ones(3, 3)
            self.attend = lambda q, k, v: torch.softmax(q @ k.mT / q.shape[-1] + mask.log(), -1) @ v
            return super().forward(x)

    with pytest.raises(Refused, match="of two samples"):
        InfiniteKernel(seeded(lambda: Same(None)), "ntk", W, B)(X[:, :3])


def test_features_last_are_those_of_a_convolution_of_one_tap():
    last = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(80, 1)).double()
    first = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 1)).double()
    x = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for kind in ("nngp", "ntk"):
        found = InfiniteKernel(last, kind, W, B)(x)
        close(found.numpy(), InfiniteKernel(first, kind, W, B)(x.permute(0, 3, 1, 2)).numpy())


def test_flattened_words():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(16, 1)).double()
    p = model[0].weight.data
    p.sub_(p.mean()).div_(p.square().mean().sqrt())
    words = torch.tensor([[1, 2], [1, 3], [4, 4]])
    same = (words[:, None] == words[None]).double().mean(2)
    torch.testing.assert_close(InfiniteKernel(model, "nngp", W, B)(words), W**2 * same + B**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(InfiniteKernel(model, "ntk", W, B)(words), 2 * W**2 * same + B**2, rtol=1e-12, atol=0)
