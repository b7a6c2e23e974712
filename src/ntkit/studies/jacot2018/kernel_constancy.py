"""The kernel's randomness at the start and its change along training, by width."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from ntkit.studies.claim import Bound, Claim, Condition, Estimate, mean
from ntkit.studies.jacot2018.interval_tests import ERRORS, jackknife, power, slope
from ntkit.studies.jacot2018.jacot_setting import DEPTH, by_width, circle, descend, limit, network, outputs, short_curve
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, device, lines, table

PROBES = torch.arange(8, dtype=torch.float64) * math.pi / 4
INPUTS = 20
MOMENTS = (0.05, 0.1, 0.25, 0.5, 1.0)  # of the training time


def parts(work: Work) -> Iterator[StudyPart]:
    """Networks by width."""
    for width in work.sizes.constancy_widths:
        yield StudyPart("constancy", width, f"constancy-{width}", _kernels, (width,))


def moments(steps: int) -> list[int]:
    """Steps at which kernels are compared with those at the start."""
    return sorted({max(1, round(share * steps)) for share in MOMENTS})


def _kernels(work: Work, width: int) -> Result:
    """Kernels of untrained networks, [networks, 36], and their relative change at moments of training."""
    s = work.sizes
    probes = circle(PROBES).to(device())
    upper = torch.triu_indices(len(PROBES), len(PROBES))
    start, change, losses = [], [], []
    for seed in range(s.constancy_seeds):
        x = torch.randn(INPUTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3_000 + seed))
        x = x.to(device())
        y = x[:, 0] * x[:, 1]
        twin = network(x, width, DEPTH, 3_000_000 + seed)
        K = twin(probes)
        start.append(K[upper[0], upper[1]].cpu().numpy())
        own: list[float] = []
        cost = [float((outputs(twin, x) - y).square().mean()) / 2]
        done = 0
        for step in moments(s.constancy_steps):
            descend(twin, x, y, step - done)
            done = step
            own.append(float((twin(probes) - K).norm() / K.norm()))
        cost.append(float((outputs(twin, x) - y).square().mean()) / 2)
        change.append(own)
        losses.append(cost)
    return Result({"losses": losses}, {"start": np.stack(start), "change": np.asarray(change)})


def variance(start: np.ndarray) -> Estimate:
    """Variance over networks, [networks, 36], relative to the limit's squares: summed over pairs of probes."""
    i, j = np.triu_indices(len(PROBES))
    exact = limit(DEPTH, circle(PROBES)).numpy()[i, j]
    return jackknife(start / np.linalg.norm(exact))


def claims(results: Results) -> Iterator[Claim]:
    """Random at the start, less so with the width; constant along training, the more so with the width."""
    runs = {n: found[0] for n, found in results["constancy"].items()}
    s = results.work.sizes
    wide = max(runs)
    spread = {n: variance(run.arrays["start"]) for n, run in runs.items()}
    rate = slope(spread)
    yield Claim(
        "At the start the kernel is random, its variance falls as 1/n",
        f"relative variance over networks: {by_width(spread, 4)}; slope {rate:.3f}",
        [Condition("each variance is", list(spread.values()), Bound("over", 0, errors=2)),
         power("the slope is", rate, -1)],
        f"{s.constancy_seeds} networks of each width, {len(PROBES)} points of the circle, jackknife errors; the paper "
        "shows that it falls",
    )  # fmt: skip
    change = {n: mean(100 * run.arrays["change"].max(1)) for n, run in runs.items()}
    rate = slope(change)
    losses = {n: np.asarray(run.numbers["losses"]) for n, run in runs.items()}
    learned = {n: mean(100 * (1 - loss[:, 1] / loss[:, 0])) for n, loss in losses.items()}
    yield Claim(
        "Along training the kernel is constant in the limit: its change falls with the width, at least as 1/√n",
        f"largest relative change: {by_width(change, 1, ' %')}; slope {rate:.3f}",
        [Condition("the slope is", [rate], Bound("under", 0, errors=ERRORS)),
         Condition("and", [rate], Bound("at most", -0.5, errors=-ERRORS)),
         Condition("meanwhile the cost falls, in percent,", [learned[wide]], Bound("over", 0, errors=2))],
        f"{s.constancy_seeds} networks of each width, {s.constancy_steps} steps, which take {learned[wide]:.0f} % off "
        f"the cost at n = {wide:,}; 1/√n bounds the change in the paper’s proof",
    )  # fmt: skip


def sections(results: Results) -> list[Section]:
    """Variance and change by width."""
    runs = {n: found[0] for n, found in results["constancy"].items()}
    widths = list(runs)
    spread = [variance(run.arrays["start"]) for run in runs.values()]
    steps = moments(results.work.sizes.constancy_steps)
    change = {n: [mean(column) for column in run.arrays["change"].T] for n, run in runs.items()}
    deviation = [v.value**0.5 for v in spread]
    last = [c[-1] for c in change.values()]
    by_n = [
        short_curve("deviation at the start", widths, deviation),
        short_curve("change in training", widths, [c.value for c in last], error=[c.error for c in last]),
        short_curve("slope −1/2", widths, deviation[0] * (np.asarray(widths) / widths[0]) ** -0.5, dash="dot"),
    ]
    along = [short_curve(f"n = {n:,}", steps, [c.value for c in own]) for n, own in change.items()]
    rows = [
        [f"{n:,}", f"{v:.5f}", *(f"{100 * c.value:.2f} ± {100 * c.error:.2f}" for c in change[n])]
        for n, v in zip(widths, spread, strict=True)
    ]
    items = [
        lines("By width", "Both are relative, in the Frobenius norm.", "width n", "relative size", [("", by_n)],
              log="xy"),
        lines("Along training", "Mean over networks.", "step", "|Θ(t) − Θ(0)| / |Θ(0)|", [("", along)]),
        table("By width", ["Width", "Variance at the start", *(f"Change, step {t}, %" for t in steps)], rows),
    ]  # fmt: skip
    text = (
        f"Kernels at {len(PROBES)} points of the circle; {results.work.sizes.constancy_seeds} networks of each width "
        f"learn x₁x₂ at {INPUTS} normal inputs, new ones for each."
    )
    return [Section("Randomness at the start, constancy in training", "Constancy", text, items)]
