"""Three clusters in the plane, a small MLP: rules of integration against each other, and maps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.measures.eigenfunctions import grid
from ntkit.report.words import plain
from ntkit.studies.bell2023.bell_setting import ROUNDING, errors, errors_by_rule, order, relative, rounding, sgd
from ntkit.studies.bell2023.own_kernel import own_kernel, posterior
from ntkit.studies.claim import RISES, SURE, Bound, Claim, Condition, Within, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, Section, curve, device, lines, mlp, table
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import Trajectory, train

LABELS = {"tanh": "tanh", "relu": "ReLU"}
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
TRAIN, TEST, WIDTH, LR = 30, 20, 32, 0.5
REACH = 3.0  # the maps show [-REACH, REACH]^2
CENTERS = ((0.0, 1.2), (-1.1, -0.7), (1.1, -0.7))
SPREAD = 0.5
MAP_NODES = 1  # midpoints per step for the values of the kernel
NEAR, FAR = SPREAD, 3 * SPREAD  # distances to the nearest training point
LEFT = (1, 10, 100)
MIDPOINT = (1, 2, 5, 10, 20, 50, 100, 200)
GAUSS = (2, 4, 8, 16, 32)
_NODES = {"left": LEFT, "midpoint": MIDPOINT, "gauss": GAUSS}
RULES: list[tuple[Any, int]] = [(rule, n) for rule, nodes in _NODES.items() for n in nodes]
FITTED = {"midpoint": (5, 10, 20, 50, 100), "left": (10, 100)}  # nodes for the orders: past the first, before rounding
_AT_ONCE = 64  # nodes


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of three Gaussian clusters in turn, [n, 2], and their labels."""
    y = torch.arange(n) % len(CENTERS)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor(CENTERS, dtype=torch.float64)[y] + SPREAD * noise, y


def trained(work: Work, activation: str, seed: int) -> tuple[nn.Module, Trajectory, Tensor, Tensor]:
    """Network, run and training data."""
    x, y = (t.to(device()) for t in clusters(TRAIN, seed))
    model = mlp(2, len(CENTERS), 3, WIDTH, seed, ACTIVATIONS[activation]).to(device(), torch.float64)
    run = train(
        model, (x, y), cross_entropy, sgd(LR), work.sizes.plane_steps, record="all", seed=seed, resume=True,
        path=work.trajectory(f"plane-{activation}-seed-{seed}"),
    )  # fmt: skip
    return model, run, x, y


def parts(work: Work) -> Iterator[StudyPart]:
    """Errors of the rules by activation."""
    for name in ACTIVATIONS:
        for seed in work.seeds:
            yield StudyPart("plane", name, f"plane-{name}-seed-{seed}", _rule_errors, (name, seed))


def map_parts(work: Work) -> Iterator[StudyPart]:
    """Maps of one ReLU network, of those that `parts` has trained."""
    for seed in work.seeds:
        yield StudyPart("maps", None, f"maps-relu-seed-{seed}", _maps, ("relu", seed))


def _rule_errors(work: Work, activation: str, seed: int) -> Result:
    """Errors of the rebuilt logits of new points, by every rule."""
    model, run, _, _ = trained(work, activation, seed)
    x = clusters(TEST, 1000 + seed)[0].to(device())
    exact = PathKernel(run).decompose(x)
    ends = exact.initial, exact.prediction
    numbers = errors_by_rule(model, run, x, RULES, ends, work.sizes.direct, _AT_ONCE)
    numbers["errors"]["secant"] = errors(exact.prediction + exact.residual, exact.prediction)
    about = {"activation": activation, "seed": seed, "largest_output": float(ends[1].abs().max())}
    about["terms"] = work.sizes.plane_steps * TRAIN
    return Result(about | numbers | {"loss": float(run.losses[-1])}, {})


def _maps(work: Work, activation: str, seed: int) -> Result:
    """The plane by the network, the kernel machine, initial gradients and the posterior."""
    model, run, x, y = trained(work, activation, seed)
    points = grid(work.sizes.side, -REACH, REACH).to(device())
    exact = PathKernel(run).decompose(points)
    initial = PathKernel(run, integration="ntk").decompose(points)
    rebuilt = exact.prediction + exact.residual
    regions = {"network": exact.prediction, "kernel": rebuilt, "ntk": initial.prediction + initial.residual}
    shape = (work.sizes.side, work.sizes.side)
    arrays = {name: logits.argmax(1).reshape(shape).numpy().astype(np.uint8) for name, logits in regions.items()}
    numbers: dict[str, Any] = {"errors": errors(rebuilt, exact.prediction)}
    numbers |= {f"agree {name}": float((arrays["network"] == arrays[name]).mean()) for name in ("kernel", "ntk")}
    if seed == 0:
        own = own_kernel(model, run, (x, y), LR, points, MAP_NODES)
        deviation, outside = posterior(own)
        for name, values in (("deviation", deviation), ("norm", own.own.sqrt()), ("outside", outside)):
            arrays[name] = values.reshape(shape).cpu().numpy()
        arrays |= {"points": x.cpu().numpy(), "labels": y.cpu().numpy()}
        of_class = [exact.contributions[:, c, c] for c in range(len(CENTERS))]  # a class's first example on its output
        arrays["contributions"] = torch.stack(of_class).reshape(len(CENTERS), *shape).numpy()
        distance = torch.cdist(points, x).min(1).values
        numbers["deviation_near"] = float(deviation[distance < NEAR].mean())
        numbers["deviation_far"] = float(deviation[distance > FAR].mean())
    return Result(numbers, arrays)


def rule_claims(results: Results) -> Iterator[Claim]:
    """Orders of the rules of integration, for a smooth and for a kinked activation."""
    orders = {
        (name, rule): [order(nodes, [relative([r], f"{rule} {n}")[0] for n in nodes]) for r in runs]
        for name, runs in results["plane"].items()
        for rule, nodes in FITTED.items()
    }
    text = {key: f"{mean(values):.2f}" for key, values in orders.items()}
    ranges = {rule: f"{nodes[0]} to {nodes[-1]}" for rule, nodes in FITTED.items()}
    yield Claim(
        "Smooth networks: the left end point errs with 1 / T, the midpoint with 1 / T²",
        f"orders {text['tanh', 'left']} and {text['tanh', 'midpoint']} (tanh); {text['relu', 'left']} and "
        f"{text['relu', 'midpoint']} (ReLU)",
        [Condition("for tanh the left end point’s orders are", orders["tanh", "left"], Within(0.2, of=1)),
         Condition("the midpoint’s", orders["tanh", "midpoint"], Within(0.2, of=2))],
        f"fitted over {ranges['left']} and {ranges['midpoint']} nodes per step",
        further=True,
    )  # fmt: skip
    gauss = {name: np.log10(relative(runs, "gauss 8")) for name, runs in results["plane"].items()}
    smallest = [math.log10(rounding(r.numbers["terms"])) for r in results["plane"]["relu"]]
    above = mean(gauss["relu"] - smallest)
    yield Claim(
        "Kinks destroy high orders",
        f"eight Gauss–Legendre nodes: relative error 10^({mean(gauss['relu']):.2f}) for ReLU, "
        f"10^({mean(gauss['tanh']):.2f}) for tanh",
        [Condition("for ReLU the logarithm of the error over rounding is", [above], RISES),
         Condition("for ReLU’s over tanh’s, paired, it is", [mean(gauss["relu"] - gauss["tanh"])],
                   RISES)],
        "the secant form has no nodes and is exact for both",
        further=True,
    )  # fmt: skip


def integral_claims(results: Results) -> Iterator[Claim]:
    """The paper's own integral, by enough points."""
    runs = results["plane"]["tanh"]
    found = relative(runs, f"gauss {GAUSS[-1]}")
    units = [error / rounding(r.numbers["terms"]) for error, r in zip(found, runs, strict=True)]
    yield Claim(
        "The paper’s own integral rebuilds a smooth network’s predictions to machine precision",
        f"largest relative error {plain(max(found), 2)} with {GAUSS[-1]} Gauss–Legendre nodes per step (tanh)",
        [Condition("in units of the rounding of the sum every error is", units, ROUNDING)],
        f"{len(runs)} seeds; kinks need the secant form, or thousands of points",
    )


def map_claims(results: Results) -> Iterator[Claim]:
    """Regions of the plane."""
    runs = [r.numbers for r in results["maps"][None]]
    own, initial = ([100 * r[f"agree {name}"] for r in runs] for name in ("kernel", "ntk"))
    yield Claim(
        "The kernel machine draws the network’s own regions in the plane",
        f"at least {min(own):.2f} % of the map agree; with gradients at initialization {mean(initial):.1f} %",
        [Condition("every agreement is", own, Bound("at least", 100, " %")),
         Condition("that of initial gradients", [mean(initial)], Bound("under", 100, " %", errors=SURE))],
        f"largest output at each of {results.work.sizes.side}² pixels; ReLU, {len(runs)} seeds",
    )  # fmt: skip


def sections(results: Results) -> list[Section]:
    """Rules of integration, and maps."""
    maps, runs = results.one("maps"), results["plane"]  # the first seed's maps
    numbers = maps.numbers
    contributions = _map(
        "What one training point contributed to its class’s output",
        "The ringed point’s contribution everywhere in the plane: orange adds to the output, blue takes away.",
        *[(f"class {c + 1}", "contributions", "signed") for c in range(len(CENTERS))],
    )
    for c, panel in enumerate(contributions["panels"]):
        panel |= {"index": c, "ring": c}
    items = [
        *(_rule_figure(name, runs[name]) for name in runs),
        _map(
            "Regions: which output is largest",
            f"Network and kernel machine agree on {100 * numbers['agree kernel']:.2f} % of the map; with initial "
            f"gradients {100 * numbers['agree ntk']:.1f} %. ReLU, one seed.",
            ("the network", "network", "classes"),
            ("the kernel machine", "kernel", "classes"),
            ("with initial gradients", "ntk", "classes"),
        ),
        _map(
            "How novel is a point, by the representation’s own kernel?",
            "Training points at the start of each step, new points along it. The deviation averages "
            f"{numbers['deviation_near']:.1f} near training points and {numbers['deviation_far']:.1f} far from them.",
            ("prior deviation, √k(x, x)", "norm", "ramp"),
            ("posterior deviation", "deviation", "ramp"),
            ("gradient outside the span, share", "outside", "ramp"),
        ),
        contributions,
        _rule_table(runs),
    ]
    text = (
        "Every rule rebuilds the logits of new points as initial output plus contributions of the training points; its "
        "error is that of its integrals along the steps."
    )
    return [Section("In the plane", "Plane", text, items, {f"maps/{key}": a for key, a in maps.arrays.items()})]


def _map(title: str, reading: str, *panels: tuple[str, str, str]) -> Item:
    return {
        "kind": "maps", "title": title, "reading": reading,
        "panels": [{"heading": heading, "array": f"maps/{key}", "colours": colors} for heading, key, colors in panels],
        "extent": [-REACH, REACH], "points": "maps/points", "labels": "maps/labels",
    }  # fmt: skip


def _rule_figure(name: str, runs: list[Result]) -> Item:
    def error(method: str) -> float:
        return mean(relative(runs, method)).value

    kinds = (("left", "left end point", LEFT), ("midpoint", "midpoint", MIDPOINT), ("gauss", "Gauss–Legendre", GAUSS))
    curves = [curve(words, nodes, [error(f"{rule} {n}") for n in nodes]) for rule, words, nodes in kinds]
    curves.append(curve("secant (no nodes)", [1, max(MIDPOINT)], [error("secant")] * 2, dash="dash"))
    return lines(
        f"Error against nodes per step, {LABELS[name]}",
        f"Mean over {len(runs)} seeds. Secant {plain(error('secant'), 2)}, eight Gauss nodes "
        f"{plain(error('gauss 8'), 2)}, 200 midpoints {plain(error('midpoint 200'), 2)}, left end point "
        f"{plain(error('left 1'), 2)}.",
        "nodes per step", "relative error", [("", curves)], log="xy",
    )  # fmt: skip


def _rule_table(runs: dict[str, list[Result]]) -> Item:
    rules = [("secant", "secant (exact)")]
    rules += [(f"left {n}", f"left end point, {n}") for n in LEFT]
    rules += [(f"midpoint {n}", f"midpoint, {n}") for n in (1, 10, 100, 200)]
    rules += [(f"gauss {n}", f"Gauss–Legendre, {n}") for n in GAUSS]
    rows = [
        [words, *(plain(mean(relative(r, rule)).value, 2) for r in runs.values()),
         *(plain(r[0].numbers["errors"][rule]["largest"], 2) for r in runs.values())]
        for rule, words in rules
    ]  # fmt: skip
    apart = max(r.numbers["apart"] for group in runs.values() for r in group)
    return table(
        "Error of the rebuilt logits, by rule and nodes per step",
        ["Rule, nodes", *(f"{kind}, {LABELS[name]}" for kind in ("relative", "absolute") for name in runs)],
        rows,
        "Relative to the largest logit: mean over seeds. Absolute: the first seed. With many nodes it is the error of "
        "Jacobian–vector products along each step, which the contributions sum to; where both were computed they agree "
        f"to {plain(apart, 2)}.",
        folded=True,
    )
