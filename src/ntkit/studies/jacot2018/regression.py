"""Figure 2: networks trained on four points of the circle, against the Gaussian of infinitely wide ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from scipy import stats

from ntkit.machines.flow import GradientFlow
from ntkit.machines.gaussian_process import Posterior
from ntkit.report.words import plain
from ntkit.studies.claim import Claim, Condition, Estimate, Within, mean
from ntkit.studies.jacot2018.interval_tests import ERRORS, mean_test, not_rejected, variance_test
from ntkit.studies.jacot2018.jacot_setting import DEPTH, by_width, circle, descend, limit, network, short_curve
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, device, lines

ANGLES = torch.linspace(-math.pi, math.pi, 61, dtype=torch.float64)
POINTS = (-2.2, -1.0, 1.0, 2.2)  # not in the paper: see the departures
TARGETS = (-0.4, -0.2, 0.3, 0.3)
PERCENTILES = (10, 50, 90)
TESTED = [0, 15, 25, 30, 45]  # places of the angles -pi, -pi/2, -pi/6, 0, pi/2: far from training points
_DRAWS = 4000


@cache
def gaussian() -> Posterior:
    """Output of networks of infinite width around the circle after infinite time.

    >>> output = gaussian()
    >>> round(float(output.mean[30]), 5), round(float(output.std[30]), 5)
    (0.04393, 0.13728)
    """
    x, test = circle(torch.tensor(POINTS, dtype=torch.float64)), circle(ANGLES)
    flow = GradientFlow().fit(limit(DEPTH, x), torch.tensor(TARGETS, dtype=torch.float64))
    return flow.ensemble(
        limit(DEPTH, test, x),
        nngp_train=limit(DEPTH, x, kind="nngp"),
        nngp_test_train=limit(DEPTH, test, x, kind="nngp"),
        nngp_test_test=limit(DEPTH, test, kind="nngp"),
        t=math.inf,
    )


def parts(work: Work) -> Iterator[StudyPart]:
    """Trained networks by width."""
    for width in work.sizes.curve_widths:
        for seed in range(work.sizes.curve_seeds):
            yield StudyPart("regression", width, f"curves-{width}-seed-{seed}", _outputs, (width, seed))


def _outputs(work: Work, width: int, seed: int) -> Result:
    """Outputs of one trained network around the circle, float32 network: [angles]."""
    x = circle(torch.tensor(POINTS)).to(device())
    y = torch.tensor(TARGETS).to(x)
    twin = network(x, width, DEPTH, seed)
    descend(twin, x, y, work.sizes.curve_steps)
    with torch.no_grad():
        outputs = twin.model(circle(ANGLES).to(x))[:, 0].double().cpu()
        off = float((twin.model(x)[:, 0] - y).abs().max())
    return Result({"off": off}, {"curve": outputs.numpy()})


def inside(curves: np.ndarray) -> list[float]:
    """Share of the circle on which each curve, [curves, angles], is between the 10 % and the 90 % percentile."""
    low, _, high = gaussian().percentiles(PERCENTILES).numpy()
    return ((curves >= low) & (curves <= high)).mean(1).tolist()


@cache
def spread() -> float:
    """Standard deviation of that share from draw to draw of the Gaussian itself."""
    return float(np.std(inside(gaussian().sample(_DRAWS).numpy())))


def _curves(runs: list[Result]) -> np.ndarray:
    """Outputs of trained networks, [seeds, angles]."""
    return np.stack([r.arrays["curve"] for r in runs])


def _percent_inside(results: Results) -> dict[int, Estimate]:
    return {n: mean([100 * share for share in inside(_curves(r))]) for n, r in results["regression"].items()}


def tests(curves: np.ndarray) -> tuple[float, float, np.ndarray]:
    """P values for the mean and the variance of curves, [curves, angles], at the tested angles being the Gaussian's,
    and the ratios of variances, [tested].
    """
    exact, seen = gaussian(), curves[:, TESTED]
    means, deviations = exact.mean.numpy()[TESTED], exact.std.numpy()[TESTED]
    ratios = ((seen - means) ** 2).mean(0) / deviations**2
    return mean_test(seen, means), variance_test(seen, means, deviations), ratios


def claims(results: Results) -> Iterator[Claim]:
    """Trained networks against the Gaussian: its band, means and variances, on both sides."""
    seeds, expected = results.work.sizes.curve_seeds, PERCENTILES[-1] - PERCENTILES[0]
    percents = {n: p.value for n, p in _percent_inside(results).items()}
    error = 100 * spread() / seeds**0.5
    low, high = (100 * q for q in stats.chi2(seeds).ppf([0.025, 0.975]) / seeds)
    found = {n: tests(_curves(runs)) for n, runs in results["regression"].items()}
    texts = ("Narrow networks agree with it, too", "Wide networks after training are draws from the limit’s Gaussian")
    for n, text in zip(sorted(found), texts, strict=True):
        p_mean, p_variance, ratios = found[n]
        yield Claim(
            f"{text}: percentiles, means and variances, n = {n:,}",
            f"{percents[n]:.0f} % between its {PERCENTILES[0]} % and {PERCENTILES[-1]} % percentiles; p value of the "
            f"means {p_mean:.2g}, of the variances {p_variance:.2g}; variances over the Gaussian’s "
            f"{', '.join(f'{100 * r:.0f} %' for r in ratios)}",
            [Condition("the share between the percentiles is", [Estimate(percents[n], error)],
                       Within(ERRORS, of=expected, unit=" standard errors")),
             not_rejected("the means", p_mean), not_rejected("the variances", p_variance)],
            f"{seeds} networks, whose share would be {expected} ± {error:.0f} % if they were draws, and each variance, "
            f"19 times in 20, {low:.0f} to {high:.0f} %; two-sided tests at {len(TESTED)} angles, together",
        )  # fmt: skip


def sections(results: Results) -> list[Section]:
    """Trained networks over the limit's percentiles."""
    s = results.work.sizes
    low, middle, high = gaussian().percentiles(PERCENTILES)
    band = f"infinite width, {PERCENTILES[0]} % and {PERCENTILES[-1]} %"
    limits = [short_curve(band, ANGLES, bound, dash="dash") for bound in (low, high)]
    limits.append(short_curve(f"infinite width, {PERCENTILES[1]} %", ANGLES, middle, dash="dot"))
    limits += [short_curve("training points", [g], [y]) for g, y in zip(POINTS, TARGETS, strict=True)]
    panels = [
        (f"n = {n:,}", [*(short_curve("trained networks", ANGLES, c) for c in _curves(runs[: s.seeds])), *limits])
        for n, runs in results["regression"].items()
    ]
    off = max(r.numbers["off"] for runs in results["regression"].values() for r in runs)
    figure = lines(
        "Trained networks and the limit’s percentiles",
        f"Between the {PERCENTILES[0]} % and the {PERCENTILES[-1]} % percentile: "
        f"{by_width(_percent_inside(results), 0, ' %')} of the circle; {PERCENTILES[-1] - PERCENTILES[0]} % expected "
        f"in the limit. At the training points networks are off by at most {plain(off, 2)}.",
        "angle γ", "f", panels, wide=True,
    )  # fmt: skip
    text = (
        f"Four training points, {s.curve_steps:,} steps, {s.curve_seeds} networks of each width; outputs of {s.seeds} "
        "around the circle against percentiles of the Gaussian that infinite networks follow at t = ∞."
    )
    return [Section("Figure 2: regression as a Gaussian process", "Regression", text, [figure])]
