"""Attention whose scores tend to constants: beside numpy over all positions, finite networks, and other writings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_case import (
    FEATURES,
    LENGTH,
    B,
    Encoder,
    Net,
    W,
    X,
    Y,
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
    own,
    relu,
    scores,
    seeded,
    softmax,
    start,
)
from torch import nn

from ntkit import InfiniteKernel, Refused


def erf(state):
    k, t = state
    v = 1 + 2 * own(k)
    outer = v[:, None, :, None] * v[None, :, None, :]
    return 2 / math.pi * np.arcsin(2 * k / np.sqrt(outer)), t * 4 / math.pi / np.sqrt(outer - 4 * k * k)


CAUSAL = np.where(np.tril(np.ones((LENGTH, LENGTH))) > 0, 0.0, -np.inf)


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


ENDS = {
    "mean": mean,
    "first": lambda s: tuple(t[:, :, :1, :1] for t in s),
    "flat": lambda s: tuple(np.einsum("ijaa->ij", t)[:, :, None, None] / LENGTH for t in s),
}


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


def unit(model):
    """With positions of exactly mean 0 and variance 1: their distribution is measured."""
    p = model.positions.data
    p.sub_(p.mean()).div_(p.square().mean().sqrt())
    return model


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
