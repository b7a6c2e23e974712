"""Dropout in train mode: independent masks of samples; beside brute force, and wide networks with random masks."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Oracle
from torch import nn

from ntkit import InfiniteKernel, Refused

W, B, P = 1.3, 0.2, 0.3
DRAW = torch.Generator().manual_seed(0)
V = torch.randn(4, 6, generator=DRAW, dtype=torch.float64)
X = torch.randn(3, 2, 4, 3, generator=DRAW, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:.*dropout is active")
R, D = nn.ReLU, nn.Dropout


class Masked(Oracle):
    """Multiplies the kernel of a sample with itself: at one position, or at all pairs of positions."""

    def go(self, m, s):
        if not isinstance(m, (nn.Dropout, nn.Dropout2d)) or not m.training:
            return super().go(m, s)
        n, h, w = s[0].shape[0], *s[0].shape[2:4]
        same = torch.eye(n, dtype=torch.float64)[:, :, None, None, None, None]
        if isinstance(m, nn.Dropout):
            same = same * torch.eye(h * w, dtype=torch.float64).reshape(h, w, h, w)
        return tuple(t * (1 + same * m.p / (1 - m.p)) for t in s)


NETWORKS = {
    "dense": (lambda n: nn.Sequential(nn.Linear(6, n), R(), D(P), nn.Linear(n, n), R(), D(0.5), nn.Linear(n, 1)), V),
    "of a weight layer": (lambda n: nn.Sequential(nn.Linear(6, n), D(P), nn.Linear(n, n), R(), nn.Linear(n, 1)), V),
    "convolutions": (
        lambda n: nn.Sequential(
            nn.Conv2d(2, n, 3, padding=1), R(), D(P), nn.Conv2d(n, n, 3, padding=1), R(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), D(0.5), nn.Linear(n, 1),
        ), X,
    ),
    "whole channels": (
        lambda n: nn.Sequential(
            nn.Conv2d(2, n, 3, padding=1), R(), nn.Dropout2d(P), nn.Conv2d(n, n, 2), R(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(n, 1),
        ), X,
    ),
    "before a pool, flattened": (
        lambda n: nn.Sequential(
            nn.Conv2d(2, n, 2, padding=1), R(), D(P), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * n, 1)
        ), X,
    ),
    "in place": (
        lambda n: nn.Sequential(nn.Linear(6, n), R(), D(P, inplace=True), nn.Linear(n, n), R(), nn.Linear(n, 1)), V,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_brute_force(name):
    build, x = NETWORKS[name]
    model = build(8).double().train()
    K, T = Masked(W, B)(model, x)
    for kind, wanted in (("nngp", K), ("ntk", T)):
        kernel = InfiniteKernel(model, kind, W, B)
        torch.testing.assert_close(kernel(x), wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(kernel.diagonal(x), wanted.diagonal(), rtol=1e-9, atol=0)
        torch.testing.assert_close(kernel(x[:1], x[1:]), wanted[:1, 1:], rtol=1e-9, atol=1e-12)
        # as a sample of both sides it has two masks
        apart = kernel(x, x.clone())
        torch.testing.assert_close(apart.triu(1), wanted.triu(1), rtol=1e-9, atol=1e-12)
        assert (apart.diagonal() < wanted.diagonal()).all()
        in_eval_mode = InfiniteKernel(build(8).double().eval(), kind, W, B)(x)
        assert (in_eval_mode.diagonal() < wanted.diagonal()).all()


def test_many_samples_in_tiles():
    """Tiles off the diagonal have no sample twice; those on it have each once."""
    x = torch.randn(600, 6, generator=DRAW, dtype=torch.float64)
    kernel = InfiniteKernel(NETWORKS["dense"][0](8).double().train(), "ntk", W, B)
    whole = kernel(x)
    torch.testing.assert_close(whole.diagonal(), kernel.diagonal(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole[:5, 590:], kernel(x[:5], x[590:]), rtol=1e-12, atol=0)
    some = kernel(x[300:303])
    torch.testing.assert_close(whole[300:303, 300:303], some, rtol=1e-12, atol=0)


def masked_values(build, x, width, seed, outputs):
    """Outputs and gradients of one random network in the NTK parametrization, with one draw of masks."""
    torch.manual_seed(seed)
    model = build(width)
    model[-1] = nn.Linear(model[-1].in_features, outputs)
    model = model.double().train()
    draws, scaled = [], {}
    for name, p in model.named_parameters():
        draws.append(torch.randn_like(p).requires_grad_())
        scaled[name] = draws[-1] * (B if p.dim() == 1 else W / math.sqrt(p[0].numel()))
    return torch.func.functional_call(model, scaled, (x,)), draws


@pytest.mark.parametrize("name", ["dense", "of a weight layer", "convolutions", "whole channels"])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_wide_networks_with_random_masks_tend_to_it(name, kind):
    build, x = NETWORKS[name]
    x = x[:3]
    limit, seeds = InfiniteKernel(build(8).double().train(), kind, W, B)(x), 40
    distances = []
    with torch.random.fork_rng([]):
        for width in (16, 256):
            found = []
            for seed in range(seeds):
                out, draws = masked_values(build, x, width, seed, 1 if kind == "ntk" else 256)
                if kind == "nngp":
                    found.append((out @ out.T / 256).detach())
                    continue
                grads = [torch.autograd.grad(o, draws, retain_graph=True) for o in out[:, 0]]
                rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
                found.append(rows @ rows.T)
            values = torch.stack(found)
            error = values.std(0) / math.sqrt(seeds)
            distances.append(float((values - limit).square().mean().sqrt()))
    assert float(((values.mean(0) - limit) / error).abs().max()) < 5
    assert distances[1] < distances[0] / 2


def test_it_is_described():
    model = NETWORKS["dense"][0](8).double().train()
    assert "layer '2' (Dropout): dropout" in InfiniteKernel(model, "ntk", W, B).describe(V)
    model[2].eval()
    assert "layer '2' (Dropout)" not in InfiniteKernel(model, "ntk", W, B).describe(V)


class Net(nn.Module):
    """Two dense layers and what is done with them."""

    def __init__(self, call):
        super().__init__()
        self.call, self.a, self.b, self.c = call, nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.call(self, x)


REFUSED = {
    "of the input": (lambda m, x: m.c(F.relu(m.a(F.dropout(x, 0.5)))), "dropout of the input"),
    "of everything": (lambda m, x: m.c(F.dropout(F.relu(m.a(x)), 1.0)), "Nothing is left"),
    "before an activation": (lambda m, x: m.c(F.relu(F.dropout(m.a(x), 0.5))), "not Gaussian"),
    "before a norm": (lambda m, x: m.c(F.layer_norm(F.dropout(m.a(x), 0.5), (8,))), "not centered|not Gaussian"),
    "added to what it drops": (lambda m, x: m.c((lambda h: h + F.dropout(h, 0.5))(m.a(x))), "depend on each other"),
    "alpha dropout": (lambda m, x: m.c(F.alpha_dropout(F.relu(m.a(x)), 0.5, True)), "alpha_dropout|random"),
    "at random without a layer": (lambda m, x: m.c(m.a(x) * (torch.rand(3, 8) > 0.5)), "random|different numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_limit_is_refused(name):
    call, reason = REFUSED[name]
    with pytest.raises(Refused, match=reason):
        InfiniteKernel(Net(call).double().train(), "ntk", W, B)(V)


def test_the_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    InfiniteKernel(NETWORKS["dense"][0](8).double().train(), "ntk", W, B)
    torch.random.set_rng_state(before)
    model = NETWORKS["dense"][0](8).double().train()
    before = torch.random.get_rng_state()
    InfiniteKernel(model, "ntk", W, B)(V)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_train_mode_is_told_once():
    model = NETWORKS["dense"][0](8).double().train()
    kernel = InfiniteKernel(model, "ntk", W, B)
    with pytest.warns(UserWarning, match=r"layer '2' \(Dropout\): dropout is active.*model.eval\(\)"):
        kernel(V)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(V)
        InfiniteKernel(model.eval(), "ntk", W, B)(V)
