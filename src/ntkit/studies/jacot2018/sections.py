"""The report's sections, with figures and tables, as ``results.json`` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkit.report.words import plain
from ntkit.studies.jacot2018 import component, kernel, regression
from ntkit.studies.jacot2018.found import (
    Found,
    at,
    beside,
    gap,
    half_told,
    inflation,
    minus,
    off_curve,
    off_limit,
    own_rate,
    spread,
    steps,
)
from ntkit.studies.jacot2018.page import DIGITS
from ntkit.studies.jacot2018.setting import BETA, DEPTH, Scale
from ntkit.studies.judged import told
from ntkit.studies.parts import Item, axis, lines, table

SHOWN = (0, 1, 7)  # digits that are marked


def sections(s: Scale, found: Found) -> list[Item]:
    """All sections."""
    return [_kernel(s, found), _regression(s, found), _eigenvalues(s, found), _component(s, found)]


def _series(name: str, x: Any, y: Any, **more: Any) -> Item:
    return {"name": name, "x": _short(x), "y": _short(y)} | more


def _short(values: Any) -> list[float]:
    return [float(f"{v:.5g}") for v in np.ravel(values)]


# ---------------------------------------------------------------------- figure 1


def _kernel(s: Scale, found: Found) -> Item:
    rate, limit = found.rate.numbers, _series("infinite width", kernel.ANGLES, kernel.overlaid(), dash="dash")
    random, means, after = [], [], f"mean after {s.kernel_steps} steps"
    for n, parts in found.kernels.items():
        of = [_series("random networks", kernel.ANGLES, curve) for curve in at(parts, 0)]
        random.append({"heading": f"n = {n:,}", "series": [*of, limit]})
        of = [
            _series(name, kernel.ANGLES, at(parts, time).mean(0))
            for time, name in ((0, "mean at the start"), (1, after))
        ]
        means.append({"heading": f"n = {n:,}", "series": [*of, limit]})
    grown = ", ".join(f"{told([100 * v for v in inflation(p)], 1)} % (n = {n:,})" for n, p in found.kernels.items())
    widths = np.asarray(rate["widths"], dtype=float)
    at_least = rate["distance"][0] * (widths / widths[0]) ** -0.5
    rows = [
        [
            f"{n:,}",
            str(len(parts)),
            told(at(parts, 0)[:, kernel.ZERO].tolist(), 4),
            f"{at(parts, 0)[:, kernel.ZERO].std(ddof=1):.4f}",
            f"{at(parts, 0)[:, kernel.ZERO].std(ddof=1) * n**0.5:.2f}",
            f"{off_limit(parts):.1f}",
            f"{told([100 * v for v in inflation(parts)], 1)} %",
        ]
        for n, parts in found.kernels.items()
    ]
    columns = ["Width", "Networks", "Θ at 0", "Deviation", "times √n", "Mean off the limit", "Inflation"]
    return {
        "title": "Figure 1: the kernel of random networks",
        "short": "Kernel",
        "text": f"Θ(x₀, x) with x₀ = (1, 0) and x at angle γ on the circle, of {s.seeds} networks with {DEPTH} weight "
        "layers, before and after training, beside the limit of infinite width.",
        "items": [
            lines("Tangent kernels along the circle, at the start",
                  f"{s.seeds} networks of each width; their deviation at γ = 0 is in the table.",
                  axis("angle γ"), axis("Θ(x₀, x)"), random, wide=True),
            lines("Their mean, before and after training", f"At γ = 0 the kernel grows by {grown}.",
                  axis("angle γ"), axis("Θ(x₀, x)"), means, wide=True),
            lines(
                "Distance to the limit",
                f"Single networks: slope {minus(rate['slope'])} ± {rate['slope_error']:.3f} (−1/2 expected). The "
                f"mean of {rate['seeds']} of the largest width is {100 * rate['mean_distance'][-1]:.1f} % off; Monte "
                f"Carlo alone makes {100 * rate['mean_error'][-1]:.1f} %.",
                axis("width n", "log"), axis("|K − Θ∞| / |Θ∞|", "log"),
                [{"heading": "", "series": [
                    _series("single networks", widths, rate["distance"], error=_short(rate["distance_error"])),
                    _series("their mean", widths, rate["mean_distance"]),
                    _series("Monte-Carlo error of the mean", widths, rate["mean_error"], dash="dash"),
                    _series("slope −1/2", widths, at_least, dash="dot"),
                ]}], wide=True,
            ),
            table("At angle 0", columns, rows,
                  f"Limit {rate['limit_at_0']:.4f}. Mean off the limit: over the whole curve, in Monte-Carlo errors."),
        ],
    }  # fmt: skip


# ---------------------------------------------------------------------- figure 2


def _regression(s: Scale, found: Found) -> Item:
    angles = regression.ANGLES
    low, middle, high = regression.gaussian().percentiles(regression.PERCENTILES)
    panels = []
    for n, parts in found.curves.items():
        series = [_series("trained networks", angles, part.arrays["curve"]) for part in parts[: s.seeds]]
        series += [
            _series("infinite width, 10 % and 90 %", angles, low, dash="dash"),
            _series("infinite width, 10 % and 90 %", angles, high, dash="dash"),
            _series("infinite width, 50 %", angles, middle, dash="dot"),
        ]
        series += [
            _series("training points", [g], [y]) for g, y in zip(regression.POINTS, regression.TARGETS, strict=True)
        ]
        panels.append({"heading": f"n = {n:,}", "series": series})
    shares = ", ".join(
        f"{told([100 * v for v in regression.inside(regression.drawn(parts))], 0)} % (n = {n:,})"
        for n, parts in found.curves.items()
    )
    off = max(part.numbers["off"] for parts in found.curves.values() for part in parts)
    return {
        "title": "Figure 2: regression as a Gaussian process",
        "short": "Regression",
        "text": f"Four training points, {s.curve_steps:,} steps, {s.curve_seeds} networks of each width; outputs of "
        f"{s.seeds} around the circle against percentiles of the Gaussian that infinite networks follow at t = ∞.",
        "items": [
            lines("Trained networks and the limit’s percentiles",
                  f"Between the 10 % and the 90 % percentile: {shares} of the circle; 80 % expected in the limit. At "
                  f"the training points networks are off by at most {plain(off, 2)}.",
                  axis("angle γ"), axis("f"), panels, wide=True),
        ],
    }  # fmt: skip


# ---------------------------------------------------------------------- figure 3


def _eigenvalues(s: Scale, found: Found) -> Item:
    rows: list[list[str]] = []
    for depth in component.DEPTHS:
        for beta in (BETA, component.WIDE_BETA):
            values = [_eigenvalue(k, m, d) for k, (m, d) in enumerate(zip(*spread(found, depth, beta), strict=True))]
            rows.append([f"{depth} weight layers, β = {beta:g}", *values])
    rows.append(["printed in the paper, β = 0.1", *(_eigenvalue(k, v) for k, v in enumerate(component.PAPER))])
    vectors, labels = found.eigenvalues.arrays["components"], found.eigenvalues.arrays["labels"]
    places = [(f"digit {c}", labels == c) for c in SHOWN] + [("other digits", ~np.isin(labels, SHOWN))]
    classes = [_series(name, vectors[chosen, 1], vectors[chosen, 2]) for name, chosen in places]
    gaps = ", ".join(f"× {gap(found, depth)[1]:.1f} with {depth} layers" for depth in component.DEPTHS)
    return {
        "title": f"Figure 3a: principal components of {DIGITS[found.data]}",
        "short": "Components",
        "text": f"Eigenvalues of Θ∞ / N over {s.batches} batches of {s.batch} images, pixels in [0, 1], not centred; "
        "± is the standard deviation from batch to batch.",
        "items": [
            table("Top eigenvalues", ["Network", "λ₁", "λ₂, 10⁻³", "λ₃, 10⁻³"], rows,
                  f"β = 1 widens λ₁/λ₂ {gaps}."
                  + ("" if found.data == "mnist" else " The paper’s digits are MNIST’s: not to be compared.")),
            lines("The batch in the second and third component",
                  f"{component.DEPTH} weight layers; components have mean square 1. The first, not shown, is almost "
                  f"constant: |mean| {found.eigenvalues.numbers['mean_1']:.4f}.",
                  axis("second component"), axis("third component"), [{"heading": "", "series": classes}],
                  style="dots", wide=True),
        ],
    }  # fmt: skip


def _eigenvalue(k: int, value: float, deviation: float | None = None) -> str:
    """The first as it is, the others in 10⁻³."""
    scale, digits = (1, 4) if k == 0 else (1e3, 2)
    return f"{scale * value:.{digits}f}" + (f" ± {scale * deviation:.{digits}f}" if deviation is not None else "")


def _component(s: Scale, found: Found) -> Item:
    rate, t = own_rate(found), steps(found)
    limit = _series("infinite width", t, component.expected(rate, t), dash="dash")

    def of(what: str) -> list[Item]:
        return [
            _series(f"n = {n:,}", t, part.arrays[what]) for n, parts in sorted(found.learned.items()) for part in parts
        ]

    def by_width(values: dict[int, Sequence[float]], digits: int = 3) -> str:
        return ", ".join(f"{told(v, digits)} (n = {n:,})" for n, v in values.items())

    widths = sorted(found.learned)
    rates = {n: [[1e3 * part.numbers["rates"][i] for part in found.learned[n]] for i in (0, 1)] for n in widths}
    rows = [
        [f"{n:,}", told(rates[n][0], 3), told(rates[n][1], 3), half_told(found, n), told(off_curve(found, n), 3),
         told(beside(found, n), 4)]
        for n in widths
    ]  # fmt: skip
    return {
        "title": "Figures 3b and 3c: learning along one component",
        "short": "Learning",
        "text": "Networks go from f₀ towards f₀ + f⁽²⁾/2. Of the residual, g is left along the second component, h "
        "is what has come up beside it; norms are root mean squares over the batch.",
        "items": [
            lines("Left along the component, ‖g‖",
                  f"Limit ½ exp(−λ₂t), λ₂ = {plain(rate)}. Largest distance to it: "
                  f"{by_width({n: off_curve(found, n) for n in widths})}.",
                  axis("step t"), axis("‖g‖"), [{"heading": "", "series": [*of("g"), limit]}]),
            lines("Beside the component, ‖h‖",
                  f"Largest: {by_width({n: beside(found, n) for n in widths})}.",
                  axis("step t"), axis("‖h‖"), [{"heading": "", "series": of("h")}]),
            table("By width",
                  ["Width", "Rate at the start, 10⁻³", "at the end, 10⁻³", "Steps to half", "Off the limit’s curve",
                   "Largest ‖h‖"], rows,
                  f"Rate: ⟨f⁽²⁾, Θ f⁽²⁾⟩ / N² of the network’s own kernel; {1e3 * rate:.3f} · 10⁻³ in the limit."),
        ],
    }  # fmt: skip
