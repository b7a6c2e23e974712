"""Random networks of every layer with a limit, against finite ones: six, or `NTKIT_FUZZ=100 pytest -m fuzz`."""

from __future__ import annotations

import os
import random

import pytest
import torch
from infinite_oracle import Add
from torch import nn

import ntkit

SEEDS = range(int(os.environ.get("NTKIT_FUZZ", "6").partition(":")[0]))
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Tanh, nn.ELU, nn.SiLU, nn.Sigmoid, nn.Softplus, lambda: nn.LeakyReLU(0.2)]


def draw(r: random.Random) -> tuple[nn.Module, bool]:
    """A network of dense layers, or of convolutions."""
    images = r.random() < 0.6

    def activation():
        return r.choice(ACTIVATIONS)()

    def weights(inputs=8):
        return nn.Conv2d(inputs, 8, r.choice([1, 3]), padding=1) if images else nn.Linear(inputs, 8)

    def norm():
        affine = r.random() < 0.6
        return nn.GroupNorm(1, 8, affine=affine) if images else nn.LayerNorm(8, elementwise_affine=affine)

    def branch(*before):
        last = nn.Conv2d(8, 8, 3, padding=1) if images else nn.Linear(8, 8)
        return Add(nn.Identity(), nn.Sequential(*before, activation(), last))

    layers: list[nn.Module] = [weights(2 if images else 6)]
    for _ in range(r.randint(1, 3)):
        kind = r.choice(["norm", "residual", "residual with a norm", "pool", "dropout", "plain"])
        if kind.startswith("residual"):
            layers.append(branch(norm()) if kind.endswith("norm") else branch())
            continue
        if kind == "pool" and images:
            layers.append(nn.AvgPool2d(2, 1))
        layers += [norm()] * (kind == "norm") + [activation()] + [nn.Dropout(0.3)] * (kind == "dropout") + [weights()]
    layers += [norm()] * (r.random() < 0.3) + [activation()]
    if images:
        layers += [nn.AvgPool2d(2, 1)] * (r.random() < 0.4) + [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 1)).double().eval(), images


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_tend_to_their_limit(seed):
    r = random.Random(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model, images = draw(r)
        x = torch.randn(3, 2, 4, 4).double() if images else torch.randn(3, 6).double()
    model = ntkit.to_ntk_parametrization(model, 1.4, 0.3)
    found = ntkit.convergence(model, x, widths=(48, 192), seeds=10, kind=r.choice(["ntk", "ntk", "nngp"]))
    z = (found.mean[-1] - found.limit) / found.standard_error[-1]
    assert z.abs().max() < 6, f"{model}: {z}"
