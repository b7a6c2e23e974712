"""All that the experiments found, and numbers taken from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkit.studies.jacot2018 import component, kernel
from ntkit.studies.jacot2018.setting import BETA, Part
from ntkit.studies.judged import told


@dataclass(frozen=True)
class Found:
    """Parts by width; lists are over seeds."""

    rate: Part
    kernels: dict[int, list[Part]]
    curves: dict[int, list[Part]]
    data: str
    eigenvalues: Part
    learned: dict[int, list[Part]]


def at(parts: list[Part], time: int) -> np.ndarray:
    """Kernels along the circle before (0) or after training (1), [seeds, angles]."""
    return np.stack([part.arrays["curves"][time] for part in parts])


def off_limit(parts: list[Part]) -> float:
    """Distance of the untrained networks' mean kernel from the limit, in Monte-Carlo errors (of the whole curve)."""
    found, limit = at(parts, 0), kernel.overlaid().numpy()
    error = found.std(0, ddof=1) / len(found) ** 0.5
    return float(np.linalg.norm(found.mean(0) - limit) / np.linalg.norm(error))


def inflation(parts: list[Part]) -> list[float]:
    """Growth of the kernel at angle 0 in training, one per seed."""
    return [part.numbers["inflation"] for part in parts]


def spread(found: Found, depth: int, beta: float = BETA) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over batches of the top eigenvalues, [3] each."""
    values = np.asarray(found.eigenvalues.numbers["values"][f"{depth} {beta}"])
    return values.mean(0), values.std(0, ddof=1)


def gap(found: Found, depth: int) -> tuple[float, float]:
    """lambda_1 / lambda_2 with beta = 0.1, and how many times larger it is with beta = 1 (means over batches)."""
    ratios = []
    for beta in (BETA, component.WIDE_BETA):
        values = np.asarray(found.eigenvalues.numbers["values"][f"{depth} {beta}"])
        ratios.append(float((values[:, 0] / values[:, 1]).mean()))
    return ratios[0], ratios[1] / ratios[0]


def own_rate(found: Found) -> float:
    """lambda_2 of the batch that is learned."""
    return found.eigenvalues.numbers["values"][f"{component.DEPTH} {BETA}"][0][1]


def steps(found: Found) -> np.ndarray:
    """Steps at which the networks were looked at."""
    return np.asarray(next(iter(found.learned.values()))[0].numbers["steps"])


def off_curve(found: Found, width: int) -> list[float]:
    """Largest difference of what is left of the component from the limit's, one per trial."""
    limit = component.expected(own_rate(found), steps(found))
    return [float(np.abs(part.arrays["g"] - limit).max()) for part in found.learned[width]]


def beside(found: Found, width: int) -> list[float]:
    """Largest part of the residual beside the component, one per trial."""
    return [float(part.arrays["h"].max()) for part in found.learned[width]]


def half(found: Found, width: int) -> list[float]:
    """Steps until half of the component is learned, interpolated, one per trial; infinite where it is not."""
    return [_crossing(steps(found), part.arrays["g"], component.SIZE / 2) for part in found.learned[width]]


def half_told(found: Found, width: int) -> str:
    """Write these steps as mean and standard error."""
    values = half(found, width)
    return told(values, 0) if math.isfinite(max(values)) else f"not by step {int(steps(found)[-1]):,}"


def _crossing(t: np.ndarray, values: np.ndarray, level: float) -> float:
    """Where a curve first falls to a level.

    >>> _crossing(np.array([0, 10, 20]), np.array([1.0, 0.6, 0.2]), 0.5)
    12.5
    """
    below = np.flatnonzero(values <= level)
    if not len(below):
        return math.inf
    i = int(below[0])
    return float(t[i] if i == 0 else np.interp(-level, -values[i - 1 : i + 1], t[i - 1 : i + 1]))


def minus(value: float) -> str:
    """Write a slope.

    >>> minus(-0.5)
    '−0.500'
    """
    return f"{value:.3f}".replace("-", "−")
