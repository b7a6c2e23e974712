"""What a limit reads of a module: calls that look like others, the order of samples, masks and settings that change."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ntkit import InfiniteKernel, Refused

W, B = 1.4, 0.3


class Net(nn.Module):
    """Layers of 8 features and a forward."""

    def __init__(self, forward, **own):
        super().__init__()
        self.e, self.hd = nn.Linear(4, 8), nn.Linear(8, 1)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(8, 8))
        for name, value in own.items():
            setattr(self, name, value)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def attention(s, h, weights=lambda a: a.softmax(-1)):
    z = s.q(h)
    return weights(z @ z.mT / z.shape[-1]) @ s.v(h)


def kernel(forward, kind="ntk", **own):
    return InfiniteKernel(Net(forward, **own), kind, w_std=W, b_std=B)


@pytest.fixture
def tokens():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def deep(s, h):
    return s.hd(F.relu(s.o(h)))


STOPPED = {
    "vectors": lambda s, x: deep(s, F.relu(s.e(x[:, 0])).detach()),
    "torch.detach": lambda s, x: deep(s, torch.detach(F.relu(s.e(x[:, 0])))),
    "a weight twice": lambda s, x: deep(s, s.q(F.relu(s.q(F.relu(s.e(x[:, 0])).detach())))),
    "values of attention": lambda s, x: deep(s, attention(s, s.e(x).detach())).mean(1),
}


@pytest.mark.parametrize("name", STOPPED)
def test_detached_layers_are_refused(name, tokens):
    with pytest.raises(Refused, match="detach"):
        kernel(STOPPED[name])(tokens)


def test_detached_weights_of_attention_are_read(tokens):
    # their gradients vanish with the width: with and without them the limit is one
    one, two = (
        kernel(lambda s, x, f=f: deep(s, attention(s, s.e(x), f)).mean(1))(tokens)
        for f in (lambda a: a.softmax(-1), lambda a: a.softmax(-1).detach())
    )
    assert torch.equal(one, two)


CLAMPED = {  # a forward, and how many weight layers stand before the clamp
    "vectors": (lambda s, x: s.hd(s.e(x[:, 0]).clamp(min=-4)), 1),
    "images": (lambda s, x: s.hd(s.c(x.mT).clamp(min=-4).mean(2)), 1),
    "attention": (lambda s, x: s.hd(s.o(attention(s, s.e(x))).clamp(min=-4)).mean(1), 3),
}


@pytest.mark.parametrize("name", CLAMPED)
def test_a_clamp_far_out_is_no_identity(name):
    # -4 is behind most draws of a standard normal, by which calls are tried; of one token attention is the identity
    x = 9 * torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    forward, layers = CLAMPED[name]
    found = kernel(forward, "nngp", c=nn.Conv1d(4, 8, 1)).diagonal(x)
    z = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    for value, sample in zip(found, x, strict=True):
        variance = float(sample.square().mean())
        for _ in range(layers):
            variance = W**2 * variance + B**2
        clamped = (math.sqrt(variance) * z).clamp(min=-4)
        expected = W**2 * torch.trapezoid(density * clamped**2, z) + B**2
        assert abs(value - expected) < 1e-7 * expected


MOVED = {
    "at the end": lambda s, x: s.hd(attention(s, s.e(x)).mean(1)).flip(0),
    "in the middle": lambda s, x: deep(s, attention(s, s.e(x)).flip(0).mean(1)),
    "per position": lambda s, x: s.hd(attention(s, s.e(x))).roll(1, 0),
    "by an index": lambda s, x: s.hd(attention(s, s.e(x)).mean(1))[torch.arange(len(x) - 1, -1, -1)],
    "positions by samples": lambda s, x: s.hd(attention(s, s.e(x)))[torch.arange(3), torch.arange(3)],
    "samples as positions": lambda s, x: s.hd(attention(s, s.e(x[:, :3].transpose(0, 1))).mean(1)),
}


@pytest.mark.parametrize("name", MOVED)
def test_samples_in_another_order_are_refused(name, tokens):
    with pytest.raises(Refused) as refusal:
        kernel(MOVED[name])(tokens)
    assert re.search("Keep the samples at the first axis|in another order", str(refusal.value))
    assert "sample=" not in str(refusal.value)  # it refuses networks that mix samples, too


@pytest.mark.parametrize(
    ("forward", "why", "sampled"),
    [
        (
            lambda s, x: deep(s, attention(s, s.e(x), lambda a: F.dropout(a.softmax(-1)))).mean(1),
            "got dropout in train mode",
            "got a forward pass that draws random numbers",
        ),
        (
            lambda s, x: s.hd(attention(s, F.rms_norm(s.e(x), (8,)))),
            "got rms_norm, which mixes channels or positions",
            r"got shape \(5, 1\) per sample; expected a vector",
        ),
    ],
    ids=["random masks", "a value per position"],
)
def test_what_cannot_be_sampled_is_not_offered(forward, why, sampled, tokens):
    with pytest.raises(Refused) as refusal:
        kernel(forward)(tokens)
    assert why in str(refusal.value)
    assert "sample=" not in str(refusal.value)
    with pytest.raises(Refused, match=sampled):
        InfiniteKernel(Net(forward), sample=2)(tokens)


def test_a_sampled_network_with_a_layer_that_it_does_not_use(tokens):
    forward = lambda s, x: s.hd(F.rms_norm(F.relu(s.e(x[:, 0])), (s.e.out_features,)))
    found = InfiniteKernel(Net(forward, unused=nn.Linear(3, 8)), w_std=W, b_std=B, sample=64)(tokens)
    expected = InfiniteKernel(Net(forward), w_std=W, b_std=B, sample=64)(tokens)
    assert torch.allclose(found, expected, rtol=0.2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_frozen_bias_of_positions_is_used_as_it_is_indexed(fused, tokens):
    tokens = tokens.float()
    table = torch.arange(25.0).reshape(5, 5) / 8  # of mean 1.5

    def forward(bias):
        def run(s, x):
            h = s.e(x)
            if fused:
                z = s.q(h)
                return s.hd(F.scaled_dot_product_attention(z, z, s.v(h), bias(s), scale=1 / z.shape[-1])[:, 1])
            return s.hd(attention(s, h, lambda a: (a + bias(s)).softmax(-1))[:, 1])

        return run

    frozen = nn.Parameter(table.clone(), requires_grad=False)
    expected = kernel(forward(lambda s: 2 * table.T))(tokens)
    assert torch.allclose(kernel(forward(lambda s: 2 * s.table.T), table=frozen)(tokens), expected, rtol=1e-6)
    index = (torch.arange(5)[:, None] - torch.arange(5)) + 4
    frozen = nn.Parameter(torch.linspace(-1, 2, 9), requires_grad=False)
    expected = kernel(forward(lambda s: frozen.detach()[index]))(tokens)
    assert torch.allclose(kernel(forward(lambda s: s.table[index]), table=frozen)(tokens), expected, rtol=1e-6)


def test_changes_between_calls_are_seen(tokens):
    def run(s, x):
        h = attention(s, s.e(x), lambda a: (a + s.mask + (s.upper if s.causal else 0)).softmax(-1))
        return s.hd(s.act(s.o(h)))[:, 1]

    lower, upper = (torch.full((5, 5), -9.0).triu(1), torch.full((5, 5), -9.0).tril(-1))
    model = Net(run, causal=False, act=F.relu, mask=nn.Parameter(lower.clone(), False), upper=torch.zeros(5, 5))
    k = InfiniteKernel(model, w_std=W, b_std=B)
    before = k(tokens)

    def changed(name, value):
        nonlocal before
        if name == "mask":
            model.mask.data.copy_(value)  # of the same sum
        else:
            setattr(model, name, value)
        found = k(tokens)
        assert not torch.allclose(found, before, rtol=1e-6)
        assert torch.equal(found, InfiniteKernel(model, w_std=W, b_std=B)(tokens))
        before = found

    changed("mask", upper)
    changed("act", torch.erf)
    model.upper = lower
    assert torch.equal(k(tokens), before)  # not used yet
    changed("causal", True)
    changed("upper", 2 * lower)


@pytest.mark.parametrize("name", ["tanh", "silu", "hardswish", "softplus"])
def test_tables_and_pieces_behind_attention(name, tokens):
    # independent queries and keys: the weights tend to 1 / 5, and attention to the mean over the tokens
    act = getattr(F, name)

    def run(s, x):
        h = s.e(x)
        q, k = s.q(h), s.k(h)
        return s.hd(act(s.o((q @ k.mT / q.shape[-1]).softmax(-1) @ s.v(h))))

    of_means = kernel(lambda s, x: s.hd(act(s.o(s.v(s.e(x))))))
    k, means = kernel(run), tokens.mean(1)
    assert torch.allclose(k(tokens), of_means(means), rtol=1e-9)
    assert torch.allclose(k(tokens, tokens.flip(0)), of_means(means, means.flip(0)), rtol=1e-9)
    assert torch.allclose(k.diagonal(tokens), of_means(means).diagonal(), rtol=1e-9)
    assert torch.allclose(k.paired(tokens, tokens.flip(0)), of_means(means, means.flip(0)).diagonal(), rtol=1e-9)


def test_hard_attention(tokens):
    # orthogonal tokens of one size: each finds itself
    x = 3 * torch.eye(4)[None].expand(2, 4, 4) * torch.tensor([1.0, -2.0]).view(2, 1, 1)
    hard = lambda a: F.one_hot(a.argmax(-1), 4).float()
    found = kernel(lambda s, x: deep(s, attention(s, s.e(x), hard)).mean(1))(x)
    assert torch.allclose(found, kernel(lambda s, x: deep(s, s.v(s.e(x))).mean(1))(x), rtol=1e-6)
