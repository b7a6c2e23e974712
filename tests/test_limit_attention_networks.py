"""Whole networks with attention of constant scores: equal to their formulas, and what finite networks tend to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_case import (
    FEATURES,
    LENGTH,
    B,
    Block,
    Encoder,
    Net,
    W,
    X,
    attention,
    block,
    by_softmax,
    check,
    close,
    dense,
    gram,
    mean,
    mixed,
    norm,
    relu,
    seeded,
    softmax,
    start,
)
from torch import nn

from ntkit import InfiniteKernel
from ntkit.kernels.infinite.sampled import WeightedKernel
from ntkit.networks.larger_copies import larger_copy


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


def test_flattened_words():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(16, 1)).double()
    p = model[0].weight.data
    p.sub_(p.mean()).div_(p.square().mean().sqrt())
    words = torch.tensor([[1, 2], [1, 3], [4, 4]])
    same = (words[:, None] == words[None]).double().mean(2)
    torch.testing.assert_close(InfiniteKernel(model, "nngp", W, B)(words), W**2 * same + B**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(InfiniteKernel(model, "ntk", W, B)(words), 2 * W**2 * same + B**2, rtol=1e-12, atol=0)
