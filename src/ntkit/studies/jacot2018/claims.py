"""What the paper claims, judged by what was found."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from ntkit.report.words import listed, plain
from ntkit.studies.jacot2018 import component, regression
from ntkit.studies.jacot2018.found import (
    Found,
    beside,
    gap,
    half,
    half_told,
    inflation,
    minus,
    off_curve,
    off_limit,
    own_rate,
    spread,
)
from ntkit.studies.jacot2018.setting import DEPTH, Scale
from ntkit.studies.judged import claimed, mean_error, told

Claim = dict[str, Any]

AT_0 = 0.2825  # of the closed form, worked out apart from this library
WITHIN = 3.0  # standard errors
INFLATED, CALM = (0.1, 0.3), 0.06
FOLD = (5.0, 20.0)  # "about ten times"


def judge(s: Scale, found: Found) -> list[Claim]:
    """All claims, in the order of the figures."""
    return [*_kernel(s, found), *_regression(s, found), *_eigenvalues(s, found), *_component(s, found)]


def _kernel(s: Scale, found: Found) -> list[Claim]:
    rate = found.rate.numbers
    value = rate["limit_at_0"]
    constants = [d * n**0.5 for d, n in zip(rate["deviation_at_0"], rate["widths"], strict=True)]
    off = {n: off_limit(parts) for n, parts in found.kernels.items()}
    narrow, wide = min(found.kernels), max(found.kernels)
    grown = {n: inflation(found.kernels[n]) for n in (narrow, wide)}
    return [
        claimed(
            f"The kernel of a random network tends to a limit that is known: Θ∞ at angle 0, {DEPTH} weight layers",
            f"{value:.6f}; the {rate['seeds']} widest networks (n = {rate['widths'][-1]:,}) have "
            f"{rate['mean_at_0'][-1]:.4f} ± {rate['deviation_at_0'][-1] / rate['seeds'] ** 0.5:.4f}",
            abs(value - AT_0) < 1e-9 and rate["agrees"],
            f"the recursion gives {AT_0}, which the figure’s axis fits; holds if it is met to 1e-9, and by the widest "
            "networks’ mean kernel, over the whole circle, within three Monte-Carlo errors",
        ),
        claimed(
            "Wider networks’ kernels spread less: as 1/√n",
            f"slope of log distance against log width {minus(rate['slope'])} ± {rate['slope_error']:.3f}; standard "
            f"deviation at angle 0 times √n: {', '.join(f'{c:.2f}' for c in constants)}",
            abs(rate["slope"] + 0.5) <= WITHIN * rate["slope_error"],
            f"{rate['seeds']} networks each of widths {listed([f'{n:,}' for n in rate['widths']])}; the paper shows "
            "that it falls; holds if the slope is −1/2 within three standard errors",
        ),
        claimed(
            "The mean is nearly the same for both widths",
            "distance of the mean from the limit, in Monte-Carlo errors: "
            + ", ".join(f"{v:.1f} (n = {n:,})" for n, v in off.items()),
            all(v <= WITHIN for v in off.values()),
            f"{s.seeds} networks each, along the circle; holds at {WITHIN:g} or less",
        ),
        claimed(
            "The kernel inflates in training, much less in wide networks",
            f"at angle 0 after {s.kernel_steps} steps: "
            + ", ".join(f"{told([100 * v for v in of], 1)} % (n = {n:,})" for n, of in grown.items()),
            INFLATED[0] < mean_error(grown[narrow])[0] < INFLATED[1] and mean_error(grown[wide])[0] < CALM,
            f"the paper gives no number; holds if between {100 * INFLATED[0]:g} and {100 * INFLATED[1]:g} % in the "
            f"narrow and under {100 * CALM:g} % in the wide ones",
        ),
    ]


def _regression(s: Scale, found: Found) -> list[Claim]:
    curves = {n: regression.drawn(parts) for n, parts in found.curves.items()}
    shares = {n: regression.inside(of) for n, of in curves.items()}
    low, wide = min(shares), max(shares)
    error = regression.spread() / s.curve_seeds**0.5
    limit = regression.gaussian()
    off = {n: float(np.abs(of.mean(0) - limit.mean.numpy()).max()) for n, of in curves.items()}
    largest = float(limit.std.max())
    return [
        claimed(
            "Trained networks are draws from the limit’s Gaussian: 80 % lie between its 10 % and 90 % percentiles",
            ", ".join(f"{100 * mean_error(v)[0]:.0f} % (n = {n:,})" for n, v in shares.items())
            + f", where {s.curve_seeds} draws would have 80 ± {100 * error:.0f} %",
            mean_error(shares[wide])[0] >= 0.8 - 2 * error,
            f"share of the circle, mean over {s.curve_seeds} networks; ± is the standard error of as many draws from "
            f"the Gaussian; holds if not under 80 % by more than two of it at n = {wide:,}",
        ),
        claimed(
            "Narrow networks agree with it, too, on the whole",
            f"largest distance of the mean curve from the Gaussian’s mean: {off[low]:.3f} (n = {low}), "
            f"{off[wide]:.3f} (n = {wide:,}), where the Gaussian’s deviation is up to {largest:.3f}",
            off[low] < WITHIN * largest / s.curve_seeds**0.5,
            f"holds if within three standard errors of the mean of {s.curve_seeds} draws, at the widest place, for "
            f"n = {low}",
        ),
    ]


def _eigenvalues(s: Scale, found: Found) -> list[Claim]:
    claims = []
    mnist = found.data == "mnist"
    printed = listed([f"{v:g}" for v in component.PAPER])
    for depth in component.DEPTHS:
        mean, deviation = spread(found, depth)
        claims.append(
            claimed(
                f"The top eigenvalues are {printed}: {depth} weight layers",
                ", ".join(f"{m:.{k}f} ± {d:.{k}f}" for m, d, k in zip(mean, deviation, (4, 5, 5), strict=True)),
                bool((np.abs(mean - component.PAPER) <= WITHIN * deviation).all()) if mnist else None,
                f"of Θ∞ / N; mean and standard deviation over {s.batches} batches of {s.batch}. The paper does not "
                + ("state the depth; " if mnist else "state the depth, and its digits are MNIST’s; ")
                + f"holds if each lies within {WITHIN:g} standard deviations",
            )
        )
    flat = found.eigenvalues.numbers["mean_1"]
    gaps = {depth: gap(found, depth) for depth in component.DEPTHS}
    return [
        *claims,
        claimed(
            "The first component is almost constant",
            f"|mean| over root mean square: {flat:.4f}",
            flat > 0.95,
            "1 for a constant; holds over 0.95",
        ),
        claimed(
            "With β = 1 the gap between the first two eigenvalues is about ten times bigger (footnote 3)",
            ", ".join(f"λ₁/λ₂ {ratio:.1f}, × {times:.1f} ({d} layers)" for d, (ratio, times) in gaps.items()),
            all(FOLD[0] < times < FOLD[1] for _, times in gaps.values()),
            f"holds between {FOLD[0]:g} and {FOLD[1]:g} times",
        ),
    ]


def _component(s: Scale, found: Found) -> list[Claim]:
    def by_width(of: dict[int, list[float]]) -> str:
        return ", ".join(f"{told(v, 3)} (n = {n:,})" for n, v in of.items())

    widths = sorted(found.learned)
    apart, aside = ({n: take(found, n) for n in widths} for take in (off_curve, beside))
    means = {name: [mean_error(v)[0] for v in of.values()] for name, of in (("a", apart), ("h", aside))}
    times = [sum(half(found, n)) / s.trials for n in widths]
    halves = ", ".join(f"{half_told(found, n)} (n = {n:,})" for n in widths)
    rate, trials = own_rate(found), f"{s.trials} trials each"
    limit = math.log(2) / rate
    return [
        claimed(
            "Along a principal component learning tends to exp(−λ₂ t) as the width grows",
            f"largest distance to it: {by_width(apart)}",
            all(b < a for a, b in pairwise(means["a"])),
            f"λ₂ = {plain(rate)}; {trials}; holds if each width is nearer than the one before",
        ),
        claimed(
            "What is learned beside the component is smaller in wider networks",
            f"largest ‖h‖: {by_width(aside)}",
            all(b < a for a, b in pairwise(means["h"])),
            f"{trials}; holds if each width has less than the one before",
        ),
        claimed(
            "Narrower networks converge faster",
            f"steps until half of the component is learned: {halves}; limit {limit:.0f}",
            all(a < b for a, b in pairwise([*times, limit])),
            f"{trials}; holds if the narrower need fewer, and all fewer than the limit",
        ),
    ]
