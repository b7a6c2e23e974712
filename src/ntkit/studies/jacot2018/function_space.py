"""Training in function space: networks against the linear differential equation of the limit, at old and new inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.infinite.infinite_kernel import Kind
from ntkit.machines.flow import GradientFlow
from ntkit.measures.convergence import Twin
from ntkit.studies.claim import Bound, Claim, Condition, Estimate, Within, mean
from ntkit.studies.jacot2018.component import digits
from ntkit.studies.jacot2018.interval_tests import ERRORS, power, slope
from ntkit.studies.jacot2018.jacot_setting import (
    DEPTH,
    by_width,
    descend,
    limit,
    network,
    outputs,
    short_curve,
)
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, lines, table

TRAIN, NEW = 60, 200
LR = 8.0
STEPS = (1, 4, 16, 64, 256)
MOMENTS = (2, 4)  # of the claims: early, and at the end
KERNELS: dict[Kind, str] = {"ntk": "tangent kernel", "nngp": "covariance"}  # of the limit; the second is the control


def parts(work: Work) -> Iterator[StudyPart]:
    """Networks by width."""
    (data,) = work.sets
    for width in work.sizes.flow_widths:
        yield StudyPart("function space", width, f"function-space-{data}-{width}", _networks, (data, width))


def task(work: Work, data: str, seed: int) -> tuple[Tensor, Tensor]:
    """Digits and targets: 1 for digits from 5 on, -1 for the others; the first 60 are for training."""
    x, labels = digits(work, data, 500 + seed, TRAIN + NEW)
    return x, torch.where(labels >= 5, 1.0, -1.0).double().to(x.device)


def _networks(work: Work, data: str, width: int) -> Result:
    """Distances from the closed form, relative to the way that the network went: [networks, steps]."""
    distances: dict[str, list] = {f"{kind} {where}": [] for kind in KERNELS for where in ("train", "new")}
    errors: dict[str, list] = {"network": [], "limit": []}
    for seed in range(work.sizes.flow_seeds):
        x, y = task(work, data, seed)
        twin = network(x.float(), width, DEPTH, 5_000_000 + 1_000 * width + seed)
        start = outputs(twin, x.float()).double()
        seen = trained(twin, x, y)
        for kind in KERNELS:
            expected = predicted(kind, x, y, start)
            way = (seen - start).square()
            for where, part in (("train", slice(TRAIN)), ("new", slice(TRAIN, None))):
                off = (seen - expected).square()[:, part].mean(1) / way[:, part].mean(1)
                distances[f"{kind} {where}"].append(off.sqrt().tolist())
            if kind == "ntk":
                for name, f in (("network", seen), ("limit", expected)):
                    errors[name].append((f - y)[:, TRAIN:].square().mean(1).tolist())
    return Result({"errors": errors}, {name.replace(" ", "_"): np.asarray(v) for name, v in distances.items()})


def trained(twin: Twin, x: Tensor, y: Tensor) -> Tensor:
    """Outputs at all inputs after each number of steps on the first ones, [steps, n] float64."""
    seen, done = [], 0
    for step in STEPS:
        descend(twin, x[:TRAIN].float(), y[:TRAIN].float(), step - done, lr=LR)
        done = step
        seen.append(outputs(twin, x.float()).double())
    return torch.stack(seen)


def predicted(kind: Kind, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The closed form with a kernel of the limit from the network's own start, [steps, n]."""
    K = limit(DEPTH, x, x[:TRAIN], kind=kind)
    if kind == "nngp":  # at the same speed: only the shape of the kernel differs
        K = K * (limit(DEPTH, x[:TRAIN]).trace() / K[:TRAIN].trace())
    flow = GradientFlow(lr=LR).fit(K[:TRAIN], y[:TRAIN], initial=start[:TRAIN])
    return flow.predict(K, t=STEPS, initial=start)


def _off(results: Results, name: str, moment: int) -> dict[int, Estimate]:
    """Distance at a moment by width, in percent."""
    return {n: mean(100 * run[0].arrays[name][:, moment]) for n, run in results["function space"].items()}


def claims(results: Results) -> Iterator[Claim]:
    """The linear equation, new inputs, the control."""
    runs = {n: found[0] for n, found in results["function space"].items()}
    wide, seeds = max(runs), results.work.sizes.flow_seeds
    how = f"{seeds} networks of each width, each with its own {TRAIN} training digits"
    for name, words in (
        (
            "ntk_train",
            "In least squares wide networks follow the limit’s linear differential equation in training",
        ),
        ("ntk_new", "So the limit’s kernel says how they generalize: what they answer at new inputs"),
    ):
        for moment in MOMENTS:
            off = _off(results, name, moment)
            fall = slope(off)
            yield Claim(
                f"{words}, until time {LR * STEPS[moment]:,.0f}",
                f"distance from the closed form, of the way since the start: {by_width(off, 1, ' %')}; "
                f"slope {fall:.3f}",
                [power("the slope is", fall, -0.5)],
                f"{how}{'' if name == 'ntk_train' else f', {NEW} new ones'}, {STEPS[moment]} steps at rate {LR:g}; "
                "random kernels spread as 1/√n",
            )
    gap = mean(100 * (runs[wide].arrays["nngp_new"] - runs[wide].arrays["ntk_new"])[:, -1])
    yield Claim(
        "It is the tangent kernel that says so, not the covariance of the start",
        f"distance at new inputs with the covariance in its place, at the same speed, less that with the tangent "
        f"kernel, n = {wide:,}: {gap:.2f} % of the way",
        [Condition("the difference is", [gap], Bound("over", 0, errors=ERRORS))],
        f"{how}, {STEPS[-1]} steps",
    )
    ratio = {n: 100 * (_last(run, "network") / _last(run, "limit") - 1) for n, run in runs.items()}
    size = {n: mean(np.abs(r)) for n, r in ratio.items()}
    yield Claim(
        "Test errors of wide networks are those that the limit predicts",
        f"squared error at new inputs over the predicted one, less 1: "
        f"{by_width({n: mean(r) for n, r in ratio.items()}, 1, ' %')}; its size {by_width(size, 1, ' %')}",
        [
            Condition("the slope of its size against the width is", [slope(size)], Bound("under", 0, errors=ERRORS)),
            Condition(
                f"the mean at n = {wide:,} is", [mean(ratio[wide])], Within(ERRORS, of=0, unit=" standard errors")
            ),
        ],
        f"{how}, {STEPS[-1]} steps",
    )


def _last(run: Result, name: str) -> np.ndarray:
    return np.asarray(run.numbers["errors"][name])[:, -1]


def sections(results: Results) -> list[Section]:
    """Distances and test errors along training."""
    runs = {n: found[0] for n, found in results["function space"].items()}
    panels = [
        (words, [short_curve(f"n = {n:,}", STEPS, run.arrays[name].mean(0)) for n, run in runs.items()])
        for name, words in (("ntk_train", "training inputs"), ("ntk_new", "new inputs"))
    ]
    names = [f"{kind}_{where}" for kind in KERNELS for where in ("train", "new")]
    rows = [
        [f"{n:,}", *(f"{_off(results, name, -1)[n]:.1f}" for name in names), f"{mean(_last(run, 'network')):.3f}",
         f"{mean(_last(run, 'limit')):.3f}"]
        for n, run in runs.items()
    ]  # fmt: skip
    columns = ["Width", *(f"{kind}, {where}" for kind in ("Θ∞", "Σ∞") for where in ("training", "new"))]
    items = [
        lines("Distance from the closed form", "Relative to the way since the start, mean over networks.",
              "step", "|f − closed form| / |f − f₀|", panels, log="xy", wide=True),
        table("At the last step", [*columns, "Error", "predicted"], rows,
              f"Distances with the {KERNELS['ntk']} Θ∞ and the {KERNELS['nngp']} Σ∞ in its place, in %; squared errors "
              "at new inputs."),
    ]  # fmt: skip
    text = (
        f"Networks learn whether a digit is at least 5 from {TRAIN} digits, targets ±1; beside them the closed form "
        "from their own outputs at the start."
    )
    return [Section("Training in function space", "Function space", text, items)]
