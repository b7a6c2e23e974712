"""Norms whose weight is not 1 and whose eps counts, in front of a ReLU: every way to compute them, in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ntkit import InfiniteKernel

W, B, WEIGHT, EPS = 1.3, 0.2, 0.7, 0.4
DRAW = torch.Generator().manual_seed(0)
X1, X2 = (torch.randn(n, 4, 2, 3, generator=DRAW, dtype=torch.float64) for n in (3, 2))
TRAINED = [(True, True), (True, False), (False, True)]  # weight and bias


class Sequence(nn.Module):
    """Features last, and a mean over some of the positions: weights of attention, though constant ones."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8, eps=EPS), nn.Linear(8, 1)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x.flatten(2).transpose(1, 2))))
        return self.last(h[:, :4].mean(1))


def images(norm):
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
    return nn.Sequential(nn.Conv2d(4, 8, 1), norm, nn.ReLU(), *pool)


def vectors():
    first = nn.Linear(24, 8), nn.LayerNorm(8, eps=EPS)
    return nn.Sequential(nn.Flatten(), *first, nn.ReLU(), nn.Linear(8, 1))


# how to build it, whether each position has its own variance, and its own weights, and the share of each position
CASES = {
    "vectors": (vectors, True, False, [1.0]),
    "one weight for all positions": (lambda: images(nn.GroupNorm(1, 8, eps=EPS)), False, False, [1 / 6] * 6),
    "weights of each position": (lambda: images(nn.LayerNorm([8, 2, 3], eps=EPS)), False, True, [1 / 6] * 6),
    "features of a sequence": (Sequence, True, False, [0.25] * 4 + [0.0] * 2),
}


def arc_cosines(K):
    """E[relu(u) relu(v)] and E[relu'(u) relu'(v)] of covariances [n, n]."""
    root = K.diagonal().sqrt()
    size = torch.outer(root, root)
    angle = torch.acos((K / size).clamp(-1, 1).fill_diagonal_(1))
    value = size * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    return value, (math.pi - angle) / (2 * math.pi)


def formula(name, x, weight_trained, bias_trained):
    """Both kernels: a row of a matrix is a position of a sample."""
    _, alone, own_weights, share = CASES[name]
    count, positions = len(x), len(share)
    rows = x.flatten(1) if positions == 1 else x.flatten(2).transpose(1, 2).reshape(count * positions, 4)
    S = W**2 * rows @ rows.T / rows.shape[1] + B**2
    v = S.diagonal().reshape(count, positions)
    v = v if alone else v.mean(1, keepdim=True).expand(count, positions)
    scale = (v + EPS).rsqrt().flatten()
    S = S * torch.outer(scale, scale)
    here = torch.eye(positions).repeat(count, count).double() if own_weights else torch.ones_like(S)
    value, slope = arc_cosines(WEIGHT**2 * S)
    # of the normalized y, the weight's gradient y relu'(w y) is relu(w y) / w
    T = (WEIGHT**2 * S + bias_trained * here) * slope + weight_trained * here * value / WEIGHT**2
    mean = torch.block_diag(*[torch.tensor([share], dtype=torch.float64)] * count)
    value, T = (mean @ t @ mean.T for t in (value, T))
    return W**2 * value + B**2, W**2 * (T + value) + B**2


@pytest.mark.parametrize("trained", TRAINED, ids=["weight and bias", "weight", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_a_weight_before_relu_equals_the_formula(name, trained):
    model = CASES[name][0]().double()
    for norm in model.modules():
        if isinstance(norm, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.constant_(norm.weight, WEIGHT)
            norm.weight.requires_grad_(trained[0])
            norm.bias.requires_grad_(trained[1])
    for kind, wanted in zip(("nngp", "ntk"), formula(name, torch.cat([X1, X2]), *trained), strict=True):
        kernel = InfiniteKernel(model, kind, W, B)
        whole, across = wanted[:3, :3], wanted[:3, 3:]
        found = [(kernel(X1), whole), (kernel(X1, X2), across), (kernel.diagonal(X1), whole.diagonal())]
        found.append((kernel.paired(X1[:2], X2), across.diagonal()))
        if name != "features of a sequence":  # with weights between positions it has no gradients
            leaf = X1.clone().requires_grad_()
            found += [(kernel(leaf).detach(), whole), (kernel(leaf, X2).detach(), across)]
        for got, expected in found:
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)  # an arc cosine of 1 loses half of the digits
