"""Single contributions by the paper's own integral, beside those of the secant form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report.words import plain
from ntkit.studies.bell2023 import plane
from ntkit.studies.bell2023.bell_setting import ROUNDING, gradients, nodes_of, order, rounding, sgd, slopes, states
from ntkit.studies.bell2023.own_kernel import ranks
from ntkit.studies.claim import RISES, Claim, Condition, Within, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, curve, device, lines, mlp
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import Trajectory, train

TEST = 6
SHRINK = (1, 2, 4, 8)  # the step size is divided by these, their number multiplied
POINTS = (1, 2, 4, 8, 16, 32)  # midpoints per step
FITTED = POINTS[1:5]  # of the order of their error: past the first, before the converged integral's own error
CONVERGED = {"tanh": ("gauss", 12), "relu": ("midpoint", 50)}


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each activation and seed."""
    for name in plane.ACTIVATIONS:
        for seed in work.seeds:
            yield StudyPart("integral", name, f"integral-{name}-seed-{seed}", _compare, (name, seed))


def contributions(
    model: nn.Module,
    run: Trajectory,
    data: tuple[Tensor, Tensor],
    lr: float,
    x: Tensor,
    rules: Sequence[tuple[str, int]],
) -> dict[tuple[str, int], Tensor]:
    """Contributions of the training examples to the outputs for `x`, [m, C, n], by rules (name, nodes).

    The theorem's sum term by term, by plain autograd: full-batch gradient descent on the mean cross-entropy of `data`.
    """
    total: dict[tuple[str, int], Any] = dict.fromkeys(rules, 0.0)
    for before, after in states(run, model, x):
        pulls = -lr * torch.einsum("icp,ic->ip", gradients(model, before, data[0]), slopes(model, before, *data))
        for rule in rules:
            total[rule] = total[rule] + _mean_gradients(model, before, after, x, *rule) @ pulls.T
    return total


def _mean_gradients(
    model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor, rule: str, nodes: int
) -> Tensor:
    """Gradients averaged over the nodes of a step, all of them at once, [m, C, P]."""
    t, weights = (torch.as_tensor(values).to(x) for values in nodes_of(rule, nodes))
    places = {name: start + t.view(-1, *[1] * start.dim()) * (after[name] - start) for name, start in before.items()}
    return torch.einsum("t,tmcp->mcp", weights, vmap(lambda at: gradients(model, at, x))(places))


def _compare(work: Work, activation: str, seed: int) -> Result:
    """Distances of single contributions and of their sums: by step size, and by points per step."""
    x, y = (t.to(device()) for t in plane.clusters(plane.TRAIN, seed))
    points = plane.clusters(TEST, 1000 + seed)[0].to(x)
    by_size, numbers = [], {"terms": work.sizes.plane_steps * len(y)}
    for shrink in SHRINK[: work.sizes.shrinks]:
        model = mlp(2, len(plane.CENTERS), 3, plane.WIDTH, seed, plane.ACTIVATIONS[activation]).to(x)
        lr = plane.LR / shrink
        run = train(model, (x, y), cross_entropy, sgd(lr), work.sizes.plane_steps * shrink, record="all", seed=seed)
        exact = PathKernel(run).decompose(points)
        rules = [CONVERGED[activation], *([("midpoint", n) for n in POINTS] if shrink == 1 else [])]
        found = {rule: value.cpu() for rule, value in contributions(model, run, (x, y), lr, points, rules).items()}
        integral, secant = found.pop(CONVERGED[activation]), exact.contributions
        apart = (integral.sum(2) - secant.sum(2)).abs().max() / exact.prediction.abs().max()
        rank = [
            float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])
            for a, b in zip(integral.flatten(0, 1), secant.flatten(0, 1), strict=True)
        ]
        by_size.append({
            "shrink": shrink,
            "single": _apart(secant, integral),
            "sum": float(apart),
            "least rank correlation": min(rank),
        })  # fmt: skip
        for (_, n), value in found.items():
            numbers[f"{n} points"] = {"integral": _apart(value, integral), "secant": _apart(value, secant)}
    return Result(numbers | {"sizes": by_size}, {})


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def claims(results: Results) -> Iterator[Claim]:
    """Same sums, other terms, and how their distance shrinks."""
    groups = {name: [r.numbers for r in runs] for name, runs in results["integral"].items()}
    if groups.keys() != plane.ACTIVATIONS.keys():
        return
    single, sums = (
        {name: [r["sizes"][0][what] for r in runs] for name, runs in groups.items()} for what in ("single", "sum")
    )
    units = [value / rounding(r["terms"]) for value, r in zip(sums["tanh"], groups["tanh"], strict=True)]
    least = {name: min(r["sizes"][0]["least rank correlation"] for r in runs) for name, runs in groups.items()}
    gaps = {name: mean(np.log10(single[name]) - np.log10(sums[name])) for name in groups}
    texts = [
        f"{plane.LABELS[name]}: single ones {mean(single[name]):.2g} of their size, sums {plain(max(sums[name]), 2)} "
        f"of the largest logit, least rank correlation {least[name]:.4f}"
        for name in groups
    ]
    yield Claim(
        "The integral and the secant form have the same sum, of different terms",
        "distances, " + "; ".join(texts),
        [Condition("the sums’ distance for tanh, in units of the rounding of the sum, is", units, ROUNDING),
         Condition("for both networks the logarithm of the terms’ distance over the sums’ is", list(gaps.values()),
                   RISES)],
        f"integral by {CONVERGED['tanh'][1]} Gauss–Legendre nodes (tanh) and {CONVERGED['relu'][1]} midpoints (ReLU, "
        f"whose sums miss by the integral’s own error); {TEST} new points",
        further=True,
    )  # fmt: skip
    shrinks = [size["shrink"] for size in groups["tanh"][0]["sizes"]]
    by_size = {name: [order(shrinks, [s["single"] for s in r["sizes"]]) for r in runs] for name, runs in groups.items()}
    falls = [
        mean([np.log2(r["sizes"][k]["single"] / r["sizes"][k + 1]["single"]) for r in groups["relu"]])
        for k, _ in enumerate(pairwise(shrinks))
    ]
    yield Claim(
        "The distance of single contributions shrinks with the step size, of smooth networks with its square",
        f"orders {mean(by_size['tanh']):.2f} (tanh) and {mean(by_size['relu']):.2f} (ReLU)",
        [Condition("for tanh every order is", by_size["tanh"], Within(0.2, of=2)),
         Condition("for ReLU the binary logarithm of each fall is", falls, RISES)],
        f"the step size divided by {', '.join(map(str, shrinks))}, as many more steps",
        further=True,
    )  # fmt: skip
    by_points = {
        name: [order(FITTED, [r[f"{n} points"]["integral"] for n in FITTED]) for r in runs]
        for name, runs in groups.items()
    }
    plateau = {name: mean([r[f"{POINTS[-1]} points"]["secant"] for r in runs]) for name, runs in groups.items()}
    yield Claim(
        "More points per step bring single contributions to the integral’s, not to the secant’s",
        f"orders {mean(by_points['tanh']):.2f} (tanh) and {mean(by_points['relu']):.2f} (ReLU); with {POINTS[-1]} "
        f"midpoints {plateau['tanh']:.2g} and {plateau['relu']:.2g} from the secant’s",
        [Condition("for tanh every order is", by_points["tanh"], Within(0.2, of=2)),
         Condition("for ReLU the orders are", [mean(by_points["relu"])], RISES),
         Condition("the distances from the secant’s are", list(plateau.values()), RISES)],
        f"fitted over {FITTED[0]} to {FITTED[-1]} midpoints per step",
        further=True,
    )  # fmt: skip


def section(results: Results) -> Section:
    """Distances of single contributions by step size and by points."""
    groups = {name: [r.numbers for r in runs] for name, runs in results["integral"].items()}
    sizes, points = [], []
    for name, runs in groups.items():
        shrinks = [size["shrink"] for size in runs[0]["sizes"]]
        for what, words, dash in (("single", "single contributions", "solid"), ("sum", "their sum", "dash")):
            values = [mean([r["sizes"][k][what] for r in runs]).value for k in range(len(shrinks))]
            sizes.append(curve(f"{words}, {plane.LABELS[name]}", shrinks, values, dash=dash))
        for what, dash in (("integral", "solid"), ("secant", "dash")):
            values = [mean([r[f"{n} points"][what] for r in runs]).value for n in POINTS]
            points.append(curve(f"from the {what}’s, {plane.LABELS[name]}", POINTS, values, dash=dash))
    return Section(
        "The paper’s integral and the secant form",
        "Integral, secant",
        "Both give each training point a contribution to each output of new points, and both sum to the network’s "
        f"output. Single contributions are compared here, over {len(next(iter(groups.values())))} seeds.",
        [
            lines(
                "Distance of integral and secant, by step size",
                "Of single contributions, relative to their norm; of their sums, relative to the largest logit.",
                "steps per step of the run", "distance", [("", sizes)], log="xy",
            ),
            lines(
                "Single contributions by midpoints per step",
                "They tend to the integral’s; from the secant’s they keep a distance.",
                "points per step", "distance", [("", points)], log="xy",
            ),
        ],
    )  # fmt: skip
