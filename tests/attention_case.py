"""Attention whose scores tend to constants, as formulas over all positions and as modules."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ntkit import InfiniteKernel

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


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def attention(state, mechanism, shared=True, bias=True):
    query = dense(state, bias)[0]
    of = scores(query) if shared else 0 * scores(query)
    return dense(mixed(dense(state, bias), mechanism(of)))


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


def block(state):
    h = norm(state)
    state = plus(state, attention(h, softmax))
    return plus(state, dense(relu(dense(norm(state)))))
