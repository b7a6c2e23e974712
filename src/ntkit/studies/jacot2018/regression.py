"""Figure 2: networks trained on four points of the circle, against the Gaussian of infinitely wide ones."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from ntkit.machines.flow import GradientFlow
from ntkit.machines.gaussian_process import Posterior
from ntkit.studies.jacot2018.setting import DEPTH, Part, Work, circle, descend, limit, network, sizes
from ntkit.studies.judged import device

ANGLES = torch.linspace(-math.pi, math.pi, 61, dtype=torch.float64)
POINTS = (-2.2, -1.0, 1.0, 2.2)  # not in the paper: see the departures
TARGETS = (-0.4, -0.2, 0.3, 0.3)
PERCENTILES = (10, 50, 90)
_DRAWS = 4000


@cache
def gaussian() -> Posterior:
    """What networks of infinite width compute around the circle after infinite time.

    >>> found = gaussian()
    >>> round(float(found.mean[30]), 5), round(float(found.std[30]), 5)
    (0.04393, 0.13728)
    """
    x, test = circle(torch.tensor(POINTS, dtype=torch.float64)), circle(ANGLES)
    flow = GradientFlow().fit(limit(DEPTH, x), torch.tensor(TARGETS, dtype=torch.float64))
    return flow.ensemble(
        limit(DEPTH, test, x),
        limit(DEPTH, x, kind="nngp"),
        limit(DEPTH, test, x, kind="nngp"),
        limit(DEPTH, test, kind="nngp"),
        t=math.inf,
    )


def curves(work: Work, width: int, seed: int) -> Part:
    """Outputs of one trained network around the circle, float32 network: [angles]."""
    return work.kept(
        f"curves-{width}-seed-{seed}", f"regression, width {width}, seed {seed}", lambda: _curves(work, width, seed)
    )


def _curves(work: Work, width: int, seed: int) -> Part:
    x = circle(torch.tensor(POINTS)).to(device())
    y = torch.tensor(TARGETS).to(x)
    twin = network(x, width, DEPTH, seed)
    descend(twin, x, y, sizes(work).curve_steps)
    with torch.no_grad():
        found = twin.model(circle(ANGLES).to(x))[:, 0].double().cpu()
        off = float((twin.model(x)[:, 0] - y).abs().max())
    return Part({"off": off}, {"curve": found.numpy()})


def inside(curves: np.ndarray) -> list[float]:
    """Share of the circle on which each curve, [curves, angles], is between the 10 % and the 90 % percentile."""
    low, _, high = gaussian().percentiles(PERCENTILES).numpy()
    return ((curves >= low) & (curves <= high)).mean(1).tolist()


@cache
def spread() -> float:
    """Standard deviation of that share from draw to draw of the Gaussian itself."""
    return float(np.std(inside(gaussian().sample(_DRAWS).numpy())))


def drawn(parts: list[Part]) -> np.ndarray:
    """Curves of trained networks, [seeds, angles]."""
    return np.stack([part.arrays["curve"] for part in parts])
