"""What stands around the figures: the certificate, what was done, what differs from the paper."""

from __future__ import annotations

from typing import Any

from ntkit.report.words import plain
from ntkit.studies.bell2023 import pictures, plane
from ntkit.studies.bell2023.found import Found, certificates, relative
from ntkit.studies.bell2023.setting import Scale


def certificate(found: Found) -> dict[str, Any]:
    """The certificate of the whole study: first on its page."""
    rows = certificates(found)
    values = [value for _, of_one in rows for value in of_one]
    single = max(part.numbers["secant float32"] for parts in found.recipes.values() for part in parts)
    cards = (
        ("Largest relative residual", max(values), f"{len(values)} networks, float64"),
        ("In single precision", single, "minibatch runs, float32"),
        ("Gradients at the start of each step", _largest(found, "left"), "largest error, discretised path kernel"),
        ("Gradients at initialisation", _largest(found, "ntk"), "largest error, tangent kernel"),
    )
    return {
        "value": max(values),
        "count": len(values),
        "text": f"{len(values)} trained networks, each rebuilt as a sum over its training examples: the largest "
        f"residual is {plain(max(values), 2)} of the largest logit.",
        "cards": [{"name": name, "big": plain(value, 2), "small": small} for name, value, small in cards],
        "table": {
            "title": "Certificates: error of the rebuilt logits, relative to the largest logit",
            "columns": ["Network", "Seeds", "Largest residual"],
            "rows": [[name, str(len(of_one)), plain(max(of_one), 2)] for name, of_one in rows],
        },
    }


def _largest(found: Found, method: str) -> float:
    """Largest relative error of a method under full-batch gradient descent."""
    groups = (*found.plane.values(), *found.images.values())
    return max(value for parts in groups for value in relative(parts, method))


def about(s: Scale, sets: list[str], seeds: int) -> str:
    """What was done, in a paragraph."""
    return (
        f"Three Gaussian clusters in the plane ({plane.TRAIN} training points) are learned by MLPs 2-32-32-3 with "
        f"tanh and ReLU: {s.plane_steps} steps of full-batch gradient descent on the mean cross-entropy, learning rate "
        f"{plane.LR}. {' and '.join(sets).capitalize()} ({s.train:,} training images, ten classes, {s.pixels} pixels a "
        f"side at most) by a ReLU network of two convolutions and a dense layer: {s.steps} full-batch steps at "
        f"learning rate {s.lr}; and {s.other_steps} steps of {len(pictures.RECIPES)} optimisers of today on "
        f"minibatches of {pictures.BATCH}. Float64; {seeds} seeds; ± is one standard error."
    )


def departures(with_mnist: bool) -> list[str]:
    """What differs from the paper."""
    told = [
        "Sizes of the networks, numbers of steps and learning rates of the paper were not at hand; these are ours. The "
        "paper sums the loss over the data; here it is a mean: its learning rate is ours over the number of examples.",
        "By default the test side is the secant Jacobian, which is exact, instead of the integral by 200 points; the "
        "integral is computed beside it. Which rule gives the paper’s own 1, 10 and 200 points is not stated in the "
        "sources at hand: left end points (one is the discretised path kernel) and midpoints are both here.",
        "The posterior deviation is in closed form instead of sampled.",
        "Optimisers of today, examples removed, and images of other kinds with AUROC are not in the paper. The span of "
        "training gradients is its follow-up’s, “Exact Path Kernels Naturally Decompose Model Predictions”.",
    ]
    missing = "The paper’s images are MNIST’s: here only where --data-dir names its files; digits stand in for them."
    return told if with_mnist else [*told, missing]
