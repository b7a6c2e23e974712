"""Wide networks, really trained, against the limit's closed form: within Monte-Carlo error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ntkit import GradientFlow, InfiniteKernel, to_ntk_parametrization, widened

WIDTH, SEEDS = 512, 30


@pytest.mark.parametrize(("steps", "momentum"), [((30, 300), 0.0), ((30,), 0.8)])
def test_the_gaussian_of_trained_networks(steps, momentum):
    generator = torch.Generator().manual_seed(0)
    x, x_test = (torch.nn.functional.normalize(torch.randn(n, 3, generator=generator).double()) for n in (6, 4))
    y = torch.randn(6, generator=generator).double()
    x32, y32 = x.float(), y.float()
    small = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)).double()
    small = to_ntk_parametrization(small, w_std=1.4, b_std=0.3)
    ntk, nngp = (InfiniteKernel(small, kind, 1.4, 0.3) for kind in ("ntk", "nngp"))
    flow = GradientFlow(lr=0.5, momentum=momentum).fit(ntk(x), y)
    outputs: dict[int, list[torch.Tensor]] = {t: [] for t in steps}
    for seed in range(SEEDS):
        model = widened(small, WIDTH, x, seed=seed).float()  # rounding is far below what 30 networks can tell
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=momentum)
        for t in range(1, max(steps) + 1):
            optimizer.zero_grad()
            ((model(x32)[:, 0] - y32).square().sum() / (2 * len(x))).backward()
            optimizer.step()
            if t in outputs:
                outputs[t].append(model(x_test.float())[:, 0].detach().double())
    for t in steps:
        limit, found = (
            flow.ensemble(
                ntk(x_test, x), nngp_train=nngp(x), nngp_test_train=nngp(x_test, x), nngp_test_test=nngp(x_test), t=t
            ),
            torch.stack(outputs[t]),
        )
        z = (found.mean(0) - limit.mean) / (limit.std / math.sqrt(SEEDS))
        assert z.abs().max() < 3.5, t
        ratio = found.std(0) / limit.std
        assert (ratio.log().abs() < 3.5 / math.sqrt(2 * SEEDS)).all(), t
        # an untrained network's mean, 0, would fail
        assert (limit.mean.abs() / limit.std * math.sqrt(SEEDS)).max() > 7, t
