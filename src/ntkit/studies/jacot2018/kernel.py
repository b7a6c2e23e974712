"""Figure 1: the kernel of random networks, its spread, its limit, and how it grows in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkit.measures.convergence import convergence
from ntkit.networks.parametrization import to_ntk_parametrization
from ntkit.studies.jacot2018.setting import BETA, DEPTH, Part, Work, circle, descend, limit, network, sizes, template
from ntkit.studies.judged import device

ANGLES = torch.linspace(-3, 3, 61, dtype=torch.float64)
ZERO = 30  # where the angle is 0: the diagonal
_PROBED = torch.arange(8, dtype=torch.float64) * math.pi / 4


def rate(work: Work) -> Part:
    """Distance of the kernels of untrained networks to their limit, against their width."""
    return work.kept("kernel-rate", "the kernel's limit: rate of convergence", lambda: _rate(work))


def _rate(work: Work) -> Part:
    s = sizes(work)
    x = circle(_PROBED).to(device())
    model = to_ntk_parametrization(template(x, DEPTH), w_std=1.0, b_std=BETA)
    found = convergence(model, x, s.rate_widths, s.rate_seeds)
    numbers = {
        "widths": list(found.widths),
        "seeds": found.seeds,
        "slope": found.slope,
        "slope_error": found.slope_error,
        "agrees": found.agrees,
        "limit_at_0": float(found.limit[0, 0]),
        **{
            name: getattr(found, name).tolist()
            for name in ("distance", "distance_error", "mean_distance", "mean_error")
        },
        "mean_at_0": found.mean[:, 0, 0].tolist(),
        "deviation_at_0": found.deviation[:, 0, 0].tolist(),
    }
    return Part(numbers, {})


def overlaid() -> Tensor:
    """The limit along the circle, Theta_inf(x_0, x(g)), [angles]."""
    return limit(DEPTH, circle(ANGLES[ZERO : ZERO + 1]), circle(ANGLES))[0]


def trained(work: Work, width: int, seed: int) -> Part:
    """Kernel of one network along the circle before and after training, float32: [2, angles]."""
    return work.kept(
        f"kernel-{width}-seed-{seed}",
        f"the kernel in training, width {width}, seed {seed}",
        lambda: _trained(work, width, seed),
    )


def _trained(work: Work, width: int, seed: int) -> Part:
    s = sizes(work)
    x = torch.randn(s.inputs, 2, generator=torch.Generator().manual_seed(1000 + seed)).to(device())
    around = circle(ANGLES).to(x)
    twin = network(x, width, DEPTH, seed)
    before = twin(around[ZERO : ZERO + 1], around)[0]
    losses: list[float] = []
    y = x[:, 0] * x[:, 1]

    def watch(step: int, out: Tensor) -> None:
        if step in (0, s.kernel_steps):
            losses.append(float((out - y).square().mean() / 2))

    descend(twin, x, y, s.kernel_steps, watch)
    after = twin(around[ZERO : ZERO + 1], around)[0]
    numbers = {
        "losses": losses,
        "before_at_0": float(before[ZERO]),
        "inflation": float(after[ZERO] / before[ZERO]) - 1,
    }
    return Part(numbers, {"curves": torch.stack([before, after]).cpu().double().numpy()})
