"""What stands around the figures: the certificate, what was done, what the paper leaves open."""

from __future__ import annotations

from typing import Any

from ntkit.report.words import listed, plain
from ntkit.studies.jacot2018 import component, regression
from ntkit.studies.jacot2018.found import Found
from ntkit.studies.jacot2018.setting import BETA, DEPTH, LR, Scale

DIGITS = {"mnist": "MNIST digits", "digits": "scikit-learn digits"}


def certificate(found: Found) -> dict[str, Any]:
    """The limit against networks of growing width."""
    rate = found.rate.numbers
    rows = [
        [f"{n:,}", f"{d:.3f} ± {e:.3f}", f"{m:.4f}", f"{c:.4f}"]
        for n, d, e, m, c in zip(
            *(rate[k] for k in ("widths", "distance", "distance_error", "mean_distance", "mean_error")), strict=True
        )
    ]
    exact = max(part.numbers["pythagoras"] for parts in found.learned.values() for part in parts)
    last = f"{100 * rate['mean_distance'][-1]:.1f} %"
    chance = f"{100 * rate['mean_error'][-1]:.1f} %"
    return {
        "text": f"The mean kernel of {rate['seeds']} networks of width {rate['widths'][-1]:,} lies {last} from the "
        f"closed-form limit; Monte Carlo alone makes {chance}.",
        "cards": [
            {"name": "Mean kernel against the limit", "big": last, "small": f"Monte-Carlo error {chance}"},
            {
                "name": "Single networks: slope in the width",
                "big": f"{rate['slope']:.2f}".replace("-", "−"),
                "small": f"± {rate['slope_error']:.2f}; −1/2 expected",
            },
            {
                "name": "Residual of eigenpairs",
                "big": plain(found.eigenvalues.numbers["residual"], 2),
                "small": "relative to λ₁, float64",
            },
            {"name": "‖g‖² + ‖h‖² − ‖residual‖²", "big": plain(exact, 2), "small": "largest, over all steps"},
        ],
        "table": {
            "title": "Distance of the kernel to its limit, relative, Frobenius norm",
            "columns": ["Width", "Single networks", "Their mean", "Monte-Carlo error of the mean"],
            "rows": rows,
        },
    }


def about(s: Scale, data: str) -> str:
    """What was done, in a paragraph."""
    return (
        f"Fully connected ReLU networks in the NTK parametrization, z = W a / √n + β b with standard normal W and b, "
        f"β = {BETA}, one output; full-batch gradient descent at learning rate {LR:g} on Σ (f − f*)² / 2N. The kernel "
        f"of networks with {DEPTH} weight layers on the unit circle, before and after {s.kernel_steps} steps on "
        f"{s.inputs} normal inputs with target x₁x₂; regression on four points of the circle, {s.curve_steps:,} steps; "
        f"and one kernel principal component of {s.batch} {DIGITS[data]}, learned in {s.component_steps:,} steps by "
        f"networks with {component.DEPTH} weight layers. {s.seeds}, {s.curve_seeds} and {s.trials} seeds of each "
        "width; ± is one standard error. Networks and their training in float32, limits, spectra and the rate "
        "of convergence in float64."
    )


def departures(s: Scale, data: str) -> list[str]:
    """What differs from the paper, and what it does not state."""
    points = ", ".join(
        f"({g:g}, {y:g})".replace("-", "−") for g, y in zip(regression.POINTS, regression.TARGETS, strict=True)
    )
    told = [
        f"The number of training inputs of figure 1 is not stated: {s.inputs} here, drawn anew for each seed.",
        "The four points of figure 2 are not in the text: angle and target are those that a reproduction by others "
        f"guessed, {points}.",
        "The limit is in closed form; the paper stands in a network of width 10,000 for the Gaussian of figure 2 and "
        "for the components of figure 3.",
        "Depth, learning rate and pixel scaling of figure 3 are not stated. Pixels in [0, 1] and learning rate 1 are "
        f"ours; the networks have {component.DEPTH} weight layers, not the {DEPTH} of the other figures, chosen by the "
        "printed eigenvalues (see the table).",
        f"Widths: {listed([f'{n:,}' for n in s.kernel_widths])} (figure 1), "
        f"{listed([f'{n:,}' for n in s.curve_widths])} (figure 2), {listed([f'{n:,}' for n in s.component_widths])} "
        "(figure 3); in the paper 500 and 10,000; 50 and 1,000; 100, 1,000 and 10,000.",
        f"{s.curve_seeds} networks of each width for figure 2, of which it shows the paper’s 10; "
        "how near a share of 10 networks comes to 80 % is chance.",
    ]
    if s.component_steps != 4000:
        told.append(f"Figure 3 ends at step {s.component_steps:,}; the paper’s at 4,000.")
    missing = "The paper’s digits are MNIST’s: here only where --data-dir names its files; scikit-learn’s stand in."
    return told if data == "mnist" else [*told, missing]
