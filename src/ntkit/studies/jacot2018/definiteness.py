"""Positive definiteness of the limit, and the convergence of training that follows from it or fails without it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel
from ntkit.report.words import plain
from ntkit.studies.claim import Bound, Claim, Condition, mean
from ntkit.studies.jacot2018.interval_tests import against, power, slope
from ntkit.studies.jacot2018.jacot_setting import BETA, DEPTH, by_width, circle, course, limit, network, short_curve
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, device, lines, mlp, table

ROUNDING = 1e-12  # relative to the largest eigenvalue: what float64 and its sums leave of a 0
SIZES = (2, 3, 4, 5)  # points of a set
HALF_LIVES = 7.0  # of the slowest mode's residual, until the end of training
LR = 1.5  # with the largest eigenvalue near 0.15: a step is short, as in continuous time
KERNELS = 20  # kernels on the way, beside that at the start


class Square(nn.Module):
    """The polynomial activation z^2."""

    def forward(self, z: Tensor) -> Tensor:
        """Square each entry."""
        return z * z


def point_set(n: int, seed: int) -> Tensor:
    """Points of the circle, each within a third of their mean distance of a regular place: [n, 2] float64."""
    shift = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 0.5
    return circle((torch.arange(n, dtype=torch.float64) + shift * 2 / 3) * 2 * math.pi / n)


def smallest(K: Tensor) -> float:
    """Smallest eigenvalue relative to the largest.

    >>> smallest(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    0.5
    """
    values = torch.linalg.eigvalsh(K)
    return float(values[0] / values[-1])


def parts(work: Work) -> Iterator[StudyPart]:
    """Eigenvalues of the limit on sets of points; training on sets by width, and on sets with a point twice."""
    yield StudyPart("definiteness", None, "definiteness", _eigenvalues)
    for width in work.sizes.descent_widths:
        yield StudyPart("descent", width, f"descent-{width}", _descents, (width, False))
    yield StudyPart("descent", "twice", "descent-twice", _descents, (work.sizes.descent_widths[-2], True))


def _eigenvalues(work: Work) -> Result:
    """Smallest eigenvalues of the limit, over the largest, on sets of eight points: [sets] each."""
    found: dict[str, list[float]] = {"relu": [], "two layers": [], "square": [], "linear": [], "twice": []}
    for seed in range(work.sizes.sets):
        x = point_set(8, 100 + seed)
        square = InfiniteKernel(mlp(2, 1, 2, 8, 0, Square).double(), w_std=1.0, b_std=BETA)
        found["relu"].append(smallest(limit(DEPTH, x)))
        found["two layers"].append(smallest(limit(2, x)))
        found["square"].append(smallest(square(x)))
        found["linear"].append(smallest(limit(1, x)))
        found["twice"].append(smallest(limit(DEPTH, torch.cat([x, x[:1]]))))
    return Result(
        {name: [abs(v) for v in values] if name in SINGULAR else values for name, values in found.items()}, {}
    )


SINGULAR = {"square": "activation z², two layers", "linear": "one layer", "twice": f"{DEPTH} layers, a point twice"}
DEFINITE = {"relu": f"{DEPTH} layers", "two layers": "two layers"}


def _descents(work: Work, width: int, twice: bool) -> Result:
    """Costs of networks along training, one on each set; smallest positive eigenvalues of the limit and their own."""
    numbers: dict[str, list[float]] = {"limit": [], "own": [], "floor": [], "points": []}
    costs = []
    for trial in range(work.sizes.sets):
        n = SIZES[trial % len(SIZES)]
        x = point_set(n, 200 + trial)
        y = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(trial))
        if twice:
            x, y = torch.cat([x, x[:1]]), torch.cat([y, -y[:1]])
        low = _low(limit(DEPTH, x), twice)
        steps = math.ceil(HALF_LIVES * math.log(2) / (low * LR))
        x, y = x.to(device()), y.to(device())
        twin = network(x, width, DEPTH, 4_000_000 + 1_000 * width + trial)
        stretches: list[Tensor] = []
        own = [_low(twin(x), twice)]
        for k in range(KERNELS):  # the bound takes the smallest along training
            part = steps * (k + 1) // KERNELS - steps * k // KERNELS
            seen = course(twin, x, y, part, LR)
            own.append(_low(twin(x), twice))
            stretches.append(seen[1:] if k else seen)  # a stretch begins where the one before ends
        costs.append(((torch.cat(stretches) - y).square().mean(1) / 2).cpu().numpy())
        numbers["limit"].append(low)
        numbers["own"].append(min(own))
        numbers["floor"].append(float((y[0] - y[-1]).square() / (4 * len(y))) if twice else 0.0)
        numbers["points"].append(n)
    return Result(numbers, {f"cost {trial}": cost for trial, cost in enumerate(costs)})


def _low(K: Tensor, twice: bool) -> float:
    """Smallest eigenvalue of K / N; the smallest but one where the last point is the first: then that one is 0."""
    return float(torch.linalg.eigvalsh(K)[1 if twice else 0]) / len(K)


def above_floor(run: Result, trial: int) -> np.ndarray:
    """A network's cost along training, less the part that no function takes away."""
    return run.arrays[f"cost {trial}"] - run.numbers["floor"][trial]


def over_bound(run: Result) -> list[float]:
    """By network, the largest ratio along training of the cost to exp(-2 lambda t) of its start, in whole steps
    (1 - lr lambda)^2t, lambda the smallest eigenvalue that its own kernel has on the way.

    >>> cost = 3 * (1 - LR * 0.01) ** (2 * np.arange(100))
    >>> [round(r, 9) for r in over_bound(Result({"floor": [0.0], "own": [0.01]}, {"cost 0": cost}))]
    [1.0]
    """
    ratios = []
    for trial, low in enumerate(run.numbers["own"]):
        cost = above_floor(run, trial)
        bound = cost[0] * (1 - LR * low) ** (2 * np.arange(len(cost)))
        ratios.append(float((cost / bound)[1:].max()))
    return ratios


def rates(run: Result) -> np.ndarray:
    """Rate at which each network's residual falls at last, over an eighth of training, per unit of time: [sets].

    >>> cost = 3 * (1 - LR * 0.01) ** (2 * np.arange(100))
    >>> rates(Result({"floor": [0.0]}, {"cost 0": cost})).round(12).tolist()
    [0.01]
    """
    found = []
    for trial in range(len(run.numbers["floor"])):
        cost = above_floor(run, trial)
        k = len(cost) // 8
        found.append(float((1 - (cost[-1] / cost[-1 - k]) ** (1 / (2 * k))) / LR))
    return np.asarray(found)


def claims(results: Results) -> Iterator[Claim]:
    """Eigenvalues, the bound, the speed, and what a singular kernel leaves."""
    values, count = results.one("definiteness").numbers, f"{results.work.sizes.sets} sets"
    ratios = {name: mean(values[name]) for name in DEFINITE}
    yield Claim(
        "On the circle the limit is positive definite with two or more layers and an activation that is no polynomial; "
        "otherwise it may be singular",
        "smallest over largest eigenvalue: "
        + ", ".join(f"{ratios[name]:.4f} ({words})" for name, words in DEFINITE.items())
        + "; at most " + ", ".join(f"{plain(max(values[name]), 1)} ({words})" for name, words in SINGULAR.items()),
        [Condition("with ReLU each is", [v for name in DEFINITE for v in values[name]], Bound("over", ROUNDING)),
         Condition("in the other cases each is", [v for name in SINGULAR for v in values[name]],
                   Bound("at most", ROUNDING))],
        f"{count} of eight points of the circle; {ROUNDING:g} is what rounding leaves of a zero",
    )  # fmt: skip
    runs = {n: found[0] for n, found in results["descent"].items() if n != "twice"}
    twice, wide = results.one("descent", "twice"), max(runs)
    ratios = [ratio for run in runs.values() for ratio in over_bound(run)]
    yield Claim(
        "A positive definite kernel makes training converge: the cost stays under exp(−2 λ_min t) of its start",
        f"largest ratio to that bound {max(ratios):.4f}; cost at the end over cost at the start at most "
        f"{max(_left(run) for run in runs.values()):.1g}",
        [Condition("every ratio is", ratios, Bound("at most", 1))],
        f"{len(ratios)} networks of widths {', '.join(f'{n:,}' for n in runs)}, on {count} of {SIZES[0]} to "
        f"{SIZES[-1]} points with normal targets; λ_min the smallest of their own kernel at {KERNELS + 1} moments",
    )
    relative = {n: rates(run) / np.asarray(run.numbers["limit"]) for n, run in runs.items()}
    off = {n: mean(np.abs(r - 1)) for n, r in relative.items()}
    fall = slope(off)
    speed = against(runs[wide].numbers["limit"], rates(runs[wide]))
    yield Claim(
        "In wide networks the residual falls at last at the rate of the limit’s smallest eigenvalue",
        f"rate over λ_min {by_width({n: mean(r) for n, r in relative.items()}, 3)}; slope of log rate against log "
        f"λ_min {speed:.3f}; slope of the relative distance against the width {fall:.3f}",
        [power(f"rate over λ_min at n = {wide:,} is", mean(relative[wide]), 1),
         power("the slope against λ_min is", speed, 1), power("the slope against the width is", fall, -0.5)],
        f"the last eighth of training, {count} by width",
    )  # fmt: skip
    stays = [float(twice.arrays[f"cost {k}"][-1] / floor) for k, floor in enumerate(twice.numbers["floor"])]
    ratios = over_bound(twice)
    yield Claim(
        "Where the kernel is singular the cost does not go to zero: a point twice, with opposite targets",
        f"cost at the end over the part that no function takes away: {mean(stays):.5f}; largest ratio of the rest to "
        f"its bound {max(ratios):.4f}",
        [Condition("each cost over that part is", stays, Bound("at least", 1)),
         Condition("every ratio of the rest to exp(−2 λ t) is", ratios, Bound("at most", 1))],
        f"{count}, n = {wide:,}, λ the smallest positive eigenvalue",
    )  # fmt: skip


def _left(run: Result) -> float:
    costs = [run.arrays[f"cost {k}"] for k in range(len(run.numbers["floor"]))]
    return max(float(cost[-1] / cost[0]) for cost in costs)


def sections(results: Results) -> list[Section]:
    """Costs along training against their bound."""
    wide, panels = max(n for n in results["descent"] if n != "twice"), []
    for case, heading in ((wide, "distinct points"), ("twice", "a point twice")):
        run, curves = results.one("descent", case), []
        for k, (points, low) in enumerate(zip(run.numbers["points"], run.numbers["limit"], strict=True)):
            cost = run.arrays[f"cost {k}"]
            t = np.unique(np.linspace(0, len(cost) - 1, 60).astype(int))
            if k < len(SIZES):
                curves.append(short_curve(f"{points} points", LR * low * t, cost[t] / cost[0]))
        grid = np.linspace(0, HALF_LIVES * math.log(2), 20)
        curves.append(short_curve("exp(−2 λ t)", grid, np.exp(-2 * grid), dash="dash"))
        panels.append((heading, curves))
    values = results.one("definiteness").numbers
    rows = [
        [words, plain(min(values[name]), 2), plain(max(values[name]), 2)]
        for name, words in (DEFINITE | SINGULAR).items()
    ]
    items = [
        lines("Cost along training", f"Networks of width {wide:,}, λ of the limit.", "λ t", "cost, of the start",
              panels, wide=True, ordered=True),
        table("Smallest over largest eigenvalue", ["Limit", "smallest", "largest"], rows,
              f"{len(values['relu'])} sets of eight points of the circle. Rounding leaves up to {plain(ROUNDING)}."),
    ]  # fmt: skip
    text = "Costs are relative to their start; λ is the limit’s smallest positive eigenvalue on the training points."
    return [Section("Positive definiteness and convergence", "Convergence", text, items)]
