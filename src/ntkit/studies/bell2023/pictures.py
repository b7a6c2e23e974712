"""Images and a small convolutional network: exactness under gradient descent and under other optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report.words import plain
from ntkit.studies.bell2023.bell_setting import (
    METHODS,
    ROUNDING,
    Images,
    cnn,
    errors,
    errors_by_rule,
    images,
    relative,
    rounding,
    sgd,
    slope,
    weighted,
    weighted_cross_entropy,
)
from ntkit.studies.claim import SURE, Bound, Claim, Condition, Order, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, Section, curve, lines, table
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import Trajectory, train

BATCH, OTHER_TEST = 32, 20
AGREEMENT = 1e-3  # error, relative to the largest logit, up to which a rule agrees with the network
FORMULATIONS_SHOWN = {"left": "start of each step", "trained": "linearized, trained", "after": "after kernel"}
_AT_ONCE = 25  # nodes


class Recipe(NamedTuple):
    """A way to train on minibatches: an optimizer, its schedule and clipping."""

    title: str
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    schedule: Callable[..., float] | None = None  # of the step, and of their number as `steps`
    clip: float | None = None


def cosine(step: int, steps: int, warm: int = 5) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


RECIPES = {
    "sgd": Recipe("SGD", sgd(0.2)),
    "momentum": Recipe(
        "SGD with Nesterov momentum 0.9 and weight decay", sgd(0.02, momentum=0.9, weight_decay=1e-3, nesterov=True)
    ),
    "adam": Recipe("Adam", partial(torch.optim.Adam, lr=0.005)),
    "adamw": Recipe(
        "AdamW, warm-up and cosine schedule, clipped gradients",
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        schedule=cosine,
        clip=1.0,
    ),
}


def parts(work: Work) -> Iterator[StudyPart]:
    """Rebuilt logits by data set."""
    yield from (rebuilt(name, seed) for name in work.sets for seed in work.seeds)


def further_parts(work: Work) -> Iterator[StudyPart]:
    """Errors by number of nodes, of the networks that `parts` has trained; the other optimizers, on digits."""
    for name in work.sets:
        for seed in work.seeds:
            yield StudyPart("nodes", name, f"{name}-nodes-seed-{seed}", _nodes, (name, seed))
    for name in RECIPES:
        for seed in work.seeds:
            yield StudyPart("recipes", name, f"optimizer-{name}-seed-{seed}", _optimizer, (name, seed))


def rebuilt(name: str, seed: int) -> StudyPart:
    """Rebuilt logits of a data set's test images, in the exact form."""
    return StudyPart("images", name, f"{name}-seed-{seed}", _rebuilt, (name, seed))


def learned(work: Work, name: str, seed: int) -> tuple[nn.Module, Trajectory, Images]:
    """Network, run and data: full-batch gradient descent, every step recorded."""
    data = images(work, name, work.sizes.train, work.sizes.test, seed=seed)
    model = cnn(data.x.shape[-1], int(data.y.max()) + 1, work.sizes.width, seed)
    run = train(
        model, (data.x, weighted(data.y)), weighted_cross_entropy, sgd(work.sizes.lr), work.sizes.steps, record="all",
        seed=seed, path=work.trajectory(f"{name}-seed-{seed}"), resume=True,
    )  # fmt: skip
    return model, run, data


def _rebuilt(work: Work, name: str, seed: int) -> Result:
    model, run, data = learned(work, name, seed)
    exact = PathKernel(run).decompose(data.x_test)
    logits = exact.prediction + exact.residual
    numbers = {
        "seed": seed,
        "errors": {"secant": errors(logits, exact.prediction) | {"slope": slope(exact.prediction, logits)}},
        "terms": work.sizes.steps * work.sizes.train,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(run.losses[-1]),
        "accuracy": accuracy(exact.prediction, data.y_test),
        "largest_output": float(exact.prediction.abs().max()),
    }
    arrays = {"network": exact.prediction, "secant": logits, "contributions": exact.of()}  # of the predicted output
    return Result(numbers, {key: array.numpy() for key, array in arrays.items()})


def _nodes(work: Work, name: str, seed: int) -> Result:
    """Error of the rebuilt logits against the number of nodes per step."""
    model, run, data = learned(work, name, seed)
    rules = [(rule, n) for rule in ("left", "midpoint") for n in work.sizes.nodes]
    x = data.x_test[: work.sizes.probed]
    ends = _outputs(model, run, 0, x), _outputs(model, run, run.steps[-1], x)
    return Result(errors_by_rule(model, run, x, rules, ends, work.sizes.direct, _AT_ONCE), {})


def _optimizer(work: Work, name: str, seed: int) -> Result:
    """Errors of a run on digits under one recipe, in float64 and float32."""
    recipe, numbers = RECIPES[name], {"terms": work.sizes.other_steps * BATCH}
    data = images(work, "digits", work.sizes.train, OTHER_TEST, seed=seed)
    for dtype in (torch.float64, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        model = cnn(data.x.shape[-1], 10, work.sizes.width, seed).to(dtype)
        schedule = None if recipe.schedule is None else partial(recipe.schedule, steps=work.sizes.other_steps)
        run = train(
            model, (data.x.to(dtype), data.y), cross_entropy, recipe.optimizer, work.sizes.other_steps,
            batch_size=BATCH, schedule=schedule, clip=recipe.clip, seed=seed, resume=True,
            path=work.trajectory(f"optimizer-{name}-{kind}-seed-{seed}"),
        )  # fmt: skip
        for method in METHODS if dtype == torch.float64 else ("secant",):
            parts = PathKernel(run, integration=method).decompose(data.x_test.to(dtype))
            numbers[f"{method} {kind}"] = parts.error
            numbers |= {"loss": float(run.losses[-10:].mean()), "accuracy": accuracy(parts.prediction, data.y_test)}
    return Result(numbers, {})


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of samples whose largest logit is that of their class."""
    return float((logits.argmax(1) == y.cpu()).double().mean())


@torch.no_grad()
def _outputs(model: nn.Module, run: Trajectory, step: int, x: Tensor) -> Tensor:
    run.load(model, step)
    return model(x)


def in_units(runs: list[Result], method: str = "secant") -> list[float]:
    """Largest error of each seed's rebuilt outputs over that of as many random roundings."""
    return [error / rounding(r.numbers["terms"]) for error, r in zip(relative(runs, method), runs, strict=True)]


def exactness_claims(results: Results) -> Iterator[Claim]:
    """Residuals of the exact decompositions."""
    for name, runs in results["images"].items():
        slopes = [abs(r.numbers["errors"]["secant"]["slope"] - 1) for r in runs]
        units = [value / rounding(r.numbers["terms"]) for value, r in zip(slopes, runs, strict=True)]
        yield Claim(
            f"Kernel prediction against network logit lies on the diagonal, {name}",
            f"largest distance of the slope from 1: {plain(max(slopes), 2)}; largest error "
            f"{plain(max(relative(runs, 'secant')), 2)} of the largest logit; {len(runs)} seeds",
            [Condition("every slope’s distance from 1, in units of the rounding of the sum, is", units, ROUNDING),
             Condition("every error, in the same units, is", in_units(runs), ROUNDING)],
            f"least squares over all logits of {results.work.sizes.test} test images; rounding: √(steps x examples) "
            "x 2⁻⁵²",
        )  # fmt: skip


def recipe_claims(results: Results) -> Iterator[Claim]:
    """Residuals of other optimizers in both precisions."""
    runs = [r for of_one in results["recipes"].values() for r in of_one]
    if not runs:
        return
    for kind, title in (
        (
            "float64",
            "Momentum, weight decay, Adam, schedules, clipping and minibatches have an exact representation, too",
        ),
        ("float32", "With these optimizers the residual is rounding in single precision, too"),
    ):
        dtype = getattr(torch, kind)
        residuals = [r.numbers[f"secant {kind}"] for r in runs]
        units = [value / rounding(r.numbers["terms"], dtype) for value, r in zip(residuals, runs, strict=True)]
        yield Claim(
            title,
            f"largest relative residual: {plain(max(residuals), 2)} ({kind}); {plain(max(units), 2)} of the rounding",
            [Condition("in units of the rounding of the sum every residual is", units, ROUNDING)],
            f"{len(results['recipes'])} optimizers, every seed",
            further=True,
        )


def node_claims(results: Results) -> Iterator[Claim]:
    """Errors by number of nodes: few do not agree with the network, many do, and none is exact."""
    s = results.work.sizes
    few, many = [n for n in s.nodes if n in (1, 10)], s.nodes[-1]
    for name, runs in results["nodes"].items():
        for rule, words in (("left", "left end points"), ("midpoint", "midpoints")):
            values = {n: mean(np.log10(relative(runs, f"{rule} {n}"))) for n in (*few, many)}
            yield Claim(
                f"On images only many integration points agree: {words}, {name}",
                "relative error " + ", ".join(f"10^({v:.2f}) with {n}" for n, v in values.items()),
                [Condition(f"with {' and '.join(map(str, few))} per step its logarithm is",
                           [values[n] for n in few], Bound("over", math.log10(AGREEMENT), errors=SURE)),
                 Condition(f"with {many}", [values[many]], Bound("under", math.log10(AGREEMENT), errors=SURE)),
                 Condition("from each to the next the errors", list(values.values()), Order("decrease", errors=SURE))],
                f"agreement: three digits of the largest logit; {min(s.probed, s.test)} test images, {len(runs)} seeds",
            )  # fmt: skip


def section(results: Results, name: str) -> Section:
    """Kernel predictions against logits, and errors against the number of nodes."""
    s = results.work.sizes
    runs, others = results["images"][name], results["formulations"][name]
    error = max(relative(runs, "secant"))
    slope_off = max(abs(r.numbers["errors"]["secant"]["slope"] - 1) for r in runs)
    shown = {"secant": ("exact (secant)", f"images/{name}/secant")}
    shown |= {m: (words, f"formulations/{name}/{m}") for m, words in FORMULATIONS_SHOWN.items()}
    scatter = {
        "kind": "scatter",
        "title": "Kernel prediction against network logit",
        "reading": f"{s.test} test images, ten outputs each, one seed; the line is the diagonal. Largest error over "
        f"{len(runs)} seeds: {plain(error, 2)} of the largest logit (slope − 1: {plain(slope_off, 2)}).",
        "x": "network logit",
        "y": "kernel prediction",
        "panels": [{"heading": words, "x": f"images/{name}/network", "y": array} for words, array in shown.values()],
    }
    nodes = results["nodes"][name]
    values = {(rule, n): mean(relative(nodes, f"{rule} {n}")).value for rule in ("left", "midpoint") for n in s.nodes}
    kinds = (("left", "left end points"), ("midpoint", "midpoints"))
    curves = [curve(words, s.nodes, [values[rule, n] for n in s.nodes]) for rule, words in kinds]
    curves.append(curve("secant (no nodes)", [1, s.nodes[-1]], [error] * 2, dash="dash"))
    some = [n for n in s.nodes if n in (1, 10, s.nodes[-1])]
    by_rule = {rule: ", ".join(plain(values[rule, n], 2) for n in some) for rule, _ in kinds}
    against_nodes = lines(
        "Error against integration points per step",
        f"{min(s.probed, s.test)} test images, mean over {len(nodes)} seeds. With {', '.join(map(str, some))} left end "
        f"points: {by_rule['left']} of the largest logit; midpoints: {by_rule['midpoint']}.",
        "points per step", "relative error", [("", curves)], log="xy", wide=True,
    )  # fmt: skip
    arrays = {f"images/{name}/{key}": runs[0].arrays[key] for key in ("network", "secant")}
    arrays |= {f"formulations/{name}/{key}": others[0].arrays[key] for key in FORMULATIONS_SHOWN}
    return Section(
        f"Images: {name}",
        name.capitalize(),
        f"A convolutional ReLU network with {runs[0].numbers['parameters']:,} parameters, {s.train:,} images, "
        f"{s.steps} steps of full-batch gradient descent; test accuracy "
        f"{mean([r.numbers['accuracy'] for r in runs]):.2f}.",
        [scatter, against_nodes, *([_recipe_table(results)] if name == "digits" else [])],
        arrays,
    )


def _recipe_table(results: Results) -> Item:
    rows = []
    for name, runs in results["recipes"].items():
        values = {key: [r.numbers[key] for r in runs] for key in runs[0].numbers}
        exact = [plain(max(values[f"secant {kind}"]), 2) for kind in ("float64", "float32")]
        others = [f"{mean(values[f'{method} float64']):.3f}" for method in ("left", "ntk")]
        rows.append([RECIPES[name].title, *exact, *others, f"{mean(values['accuracy']):.2f}"])
    return table(
        "Other optimizers: error of the rebuilt logits, relative to the largest",
        ["Optimizer", "Exact, float64", "Exact, float32", "Start of each step", "Initial gradients", "Test accuracy"],
        rows,
        f"{results.work.sizes.other_steps} steps on minibatches of {BATCH}; {OTHER_TEST} test images; exact: the "
        "largest over seeds.",
    )
