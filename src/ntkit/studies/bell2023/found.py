"""All that the experiments found, and numbers taken from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkit.studies.bell2023.pictures import RECIPES
from ntkit.studies.bell2023.plane import LABELS
from ntkit.studies.parts import Part


@dataclass(frozen=True)
class Found:
    """Parts by name; lists are over seeds, or over test images for `removed`."""

    plane: dict[str, list[Part]]  # by activation
    maps: Part
    images: dict[str, list[Part]]  # by data set, as all below
    nodes: dict[str, Part]
    recipes: dict[str, list[Part]]  # by optimiser
    explained: dict[str, Part]
    removed: dict[str, list[Part]]
    unseen: dict[str, list[Part]]


def relative(parts: list[Part], method: str) -> list[float]:
    """Largest error of each seed's rebuilt outputs, relative to the largest output."""
    return [part.numbers["errors"][method]["relative"] for part in parts]


def certificates(found: Found) -> list[tuple[str, list[float]]]:
    """Relative residuals of all exact decompositions in float64: what was rebuilt, one number per trained network."""
    told = [(f"three clusters, MLP, {LABELS[name]}", relative(parts, "secant")) for name, parts in found.plane.items()]
    for name, parts in found.images.items():
        told.append((f"{name}, CNN, full-batch gradient descent", relative(parts, "secant")))
    for name, parts in found.recipes.items():
        told.append((f"digits, CNN, {RECIPES[name].title}", [part.numbers["secant float64"] for part in parts]))
    return told


def removed(parts: list[Part], share: float, kind: str, what: str) -> list[float]:
    """A number about removing examples, one per test image: the mean over draws."""
    return [
        float(np.mean([r[what] for r in part.numbers["removed"] if r["share"] == share and r["kind"] == kind]))
        for part in parts
    ]


def auroc(parts: list[Part], kind: str, score: str) -> list[float]:
    """One per seed."""
    return [part.numbers["auroc"][kind][score] for part in parts]
