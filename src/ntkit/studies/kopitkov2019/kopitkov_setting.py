"""What the experiments share: pictures as functions of position, the recorded run, numbers that claims are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.base.checks import refusal
from ntkit.base.imports import same_random_numbers
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.eigenfunctions import grid
from ntkit.measures.spectra import alignment
from ntkit.studies.claim import mean
from ntkit.studies.part import Result, Work
from ntkit.studies.study import device, mlp
from ntkit.tracking import Tracked, half_squared
from ntkit.trajectory import Trajectory, train

RIPPLES = {"ripples": 10.0, "wide ripples": 5.0, "narrow ripples": 15.0}  # picture: frequency of sin(frequency |x|)
PHOTOGRAPH = "photograph"
PICTURES = (*RIPPLES, PHOTOGRAPH)
DISPLACED = "displaced"  # the learned picture, moved by half its side: the same frequencies, not learned
DEPTHS = (2, 4, 6)


def picture(name: str, side: int) -> Tensor:
    """A gray picture on a grid of [-1, 1]^2, standardized, row by row: [side^2, 1], float64.

    Ripples around the center, sin(frequency |x|); or the middle of scikit-learn's photograph of a flower, each pixel
    the mean of the photograph's pixels there.
    """
    if name == PHOTOGRAPH:
        with same_random_numbers():
            from sklearn.datasets import load_sample_image

        pixels = torch.from_numpy(load_sample_image("flower.jpg").mean(2))
        height, width = pixels.shape
        square = pixels[:, (width - height) // 2 :][:, :height]
        values = F.adaptive_avg_pool2d(square[None], side)[0].reshape(-1, 1)
    else:
        values = torch.sin(RIPPLES[name] * grid(side).norm(dim=1, keepdim=True))
    return (values - values.mean()) / values.std()


def displaced(values: Tensor, side: int) -> Tensor:
    """A picture moved by half its side in both directions; what leaves on one side comes in on the other."""
    return values.reshape(side, side).roll((side // 2, side // 2), (0, 1)).reshape(-1, 1)


def decayed(step: int, at: int) -> float:
    """Half the learning rate from step `at` on."""
    return 1.0 if step < at else 0.5


def file_of(name: str, depth: int, seed: int) -> str:
    """Name of a run's files."""
    return f"{name.replace(' ', '-')}-depth-{depth}-seed-{seed}"


class LearnedPicture(NamedTuple):
    """A network that learned a picture."""

    x: Tensor  # [n, 2], the points
    y: Tensor  # [n, 1], the picture there
    model: nn.Module
    run: Trajectory


def recorded_steps(steps: int, decay: int) -> list[int]:
    """Powers of the square root of 2, the start, the end, and some steps around the decay and after it."""
    around = [decay - 1, decay, decay + 1, decay + decay // 8, decay + decay // 2]
    return sorted({0, steps, *(round(2 ** (j / 2)) for j in range(2 * int(math.log2(steps)) + 1)), *around})


def learned(work: Work, name: str, depth: int, seed: int) -> LearnedPicture:
    """The recorded run of a picture, trained if it is not there.

    Raises
    ------
    Refused
        When a loss was not finite: such a run has no end to compare.
    """
    s = work.sizes
    x, y = grid(s.side).float().to(device()), picture(name, s.side).float().to(device())
    model = mlp(2, 1, depth, s.width, seed).to(device())
    place = work.trajectory(file_of(name, depth, seed))
    run = train(
        model, (x, y), half_squared, partial(torch.optim.SGD, lr=s.lr), path=place, resume=True, steps=s.steps,
        record=recorded_steps(s.steps, s.decay), schedule=partial(decayed, at=s.decay), seed=seed,
    )  # fmt: skip
    if run.status == "diverged":
        got, fix = f"a loss that is not finite at step {run.steps[-1]:,}", "Choose a smaller rate in the study's sizes."
        raise refusal(f"learning rate {s.lr}", got=got, expected="a run to its end", fix=fix)
    return LearnedPicture(x, y, model, run)


def numbers_of(tracked: Tracked) -> Result:
    """What claims and curves need of a tracking: series of numbers, and energies and eigenvalues as arrays [T, k]."""
    series = tracked.series
    names = ("loss", "learning_rate", "sharpness", "trace", "distance", "cka", "alignment_centered")
    told: dict[str, Any] = {name: series[name] for name in names}
    told["first_order_error"] = [f and f["relative_error"] for f in series["first_order"]]
    arrays = {
        name: np.asarray(series[name], dtype=np.float32)  # None becomes NaN
        for name in ("eigenvalues", "energy_target", "energy_output", "energy_residual")
    }
    return Result({"steps": tracked.steps, "series": told}, arrays)


def energy(result: Result, name: str, k: int) -> np.ndarray:
    """Energy of the target, output or residual in the top k at every snapshot."""
    return result.arrays[f"energy_{name}"][:, k - 1].astype(float)


def energy_at(vectors: np.ndarray, values: Tensor, k: int) -> float:
    """Energy of values [n, C] in the first k of orthonormal columns [n, K]."""
    v = values.double().cpu().numpy()
    return float(((vectors[:, :k].T.astype(float) @ v) ** 2).sum() / (v**2).sum())


def initial_kernels(models: Iterable[nn.Module], x: Tensor) -> dict[str, Any]:
    """Between untrained networks: 1 - cosine of their kernels, the same centered, and the logarithm of their traces."""
    kernels = []
    for model in models:
        K = TangentKernel(model, "trace")(x)
        assert isinstance(K, Tensor)
        kernels.append(K)
    distances = {
        name: [[1 - alignment(a, b, centered=name == "centered") for b in kernels] for a in kernels]
        for name in ("plain", "centered")
    }
    return {"distances": distances, "log_trace": [math.log10(float(K.diagonal().double().sum())) for K in kernels]}


class Change(NamedTuple):
    """How far kernels went, one number for each seed, and how far the initial kernels of other seeds are."""

    distance: np.ndarray
    by_chance: np.ndarray
    centered: np.ndarray
    centered_by_chance: np.ndarray
    growth: np.ndarray  # logarithm (base 10) of the trace at the end over that at the start
    growth_by_chance: np.ndarray


def changes(runs: Sequence[Result], chance: dict[str, Any]) -> Change:
    """Changes from start to end beside the differences between untrained networks of different seeds."""

    def mean_to_others(rows: Any) -> np.ndarray:
        a = np.asarray(rows, dtype=float)
        return (a.sum(1) - a.diagonal()) / (len(a) - 1)

    logs = np.asarray(chance["log_trace"])
    of_traces = mean_to_others(np.abs(logs[:, None] - logs))
    series = [r.numbers["series"] for r in runs]
    n = len(runs)
    return Change(
        np.array([s["distance"][-1] for s in series]),
        mean_to_others(chance["distances"]["plain"])[:n],
        np.array([1 - s["cka"][-1] for s in series]),
        mean_to_others(chance["distances"]["centered"])[:n],
        np.array([math.log10(s["trace"][-1] / s["trace"][0]) for s in series]),
        of_traces[:n],
    )


def text(values: Any, digits: int = 2) -> str:
    """Mean over seeds with its standard error."""
    return f"{mean(values):.{digits}f}"
