"""Images and a small convolutional network: exactness under gradient descent and under other optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report.words import plain
from ntkit.studies.bell2023.bell_setting import (
    EXACT,
    METHODS,
    Images,
    cnn,
    decompositions,
    errors,
    errors_by_rule,
    images,
    relative,
    sgd,
    slope,
    weighted,
    weighted_cross_entropy,
)
from ntkit.studies.bell2023.plane import LABELS
from ntkit.studies.claim import Bound, Claim, Condition, Within, mean
from ntkit.studies.study import Item, Result, Results, Section, StudyPart, Work, curve, lines, table
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import Trajectory, train

BATCH, OTHER_TEST = 32, 20
AGREEMENT = 1e-3  # error, relative to the largest logit, up to which a rule agrees with the network
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
    """Rebuilt logits by data set; errors by number of nodes; the other optimizers, on digits."""
    yield from (rebuilt(name, seed) for name in work.sets for seed in work.seeds)
    yield from (StudyPart("nodes", name, f"{name}-nodes", _nodes, (name,)) for name in work.sets)
    for name in RECIPES:
        for seed in work.seeds:
            yield StudyPart("recipes", name, f"optimizer-{name}-seed-{seed}", _optimizer, (name, seed))


def rebuilt(name: str, seed: int) -> StudyPart:
    """Rebuilt logits of a data set's test images: exact, by the left end point, by initial gradients."""
    return StudyPart("images", name, f"{name}-seed-{seed}", _rebuilt, (name, seed))


def learned(work: Work, name: str, seed: int) -> tuple[nn.Module, Trajectory, Images]:
    """Network, run and data: full-batch gradient descent, every step recorded."""
    data = images(work, name, work.sizes.train, work.sizes.test)
    model = cnn(data.x.shape[-1], int(data.y.max()) + 1, work.sizes.width, seed)
    run = train(
        model, (data.x, weighted(data.y)), weighted_cross_entropy, sgd(work.sizes.lr), work.sizes.steps, record="all",
        seed=seed, path=work.trajectory(f"{name}-seed-{seed}"), resume=True,
    )  # fmt: skip
    return model, run, data


def _rebuilt(work: Work, name: str, seed: int) -> Result:
    model, run, data = learned(work, name, seed)
    by_method, arrays = {}, {}
    rebuilt_by = decompositions(run, data.x_test)
    exact = rebuilt_by["secant"]
    for method, parts in rebuilt_by.items():
        logits = parts.prediction + parts.residual
        by_method[method] = errors(logits, parts.prediction) | {"slope": slope(parts.prediction, logits)}
        arrays[method] = logits.numpy()
    arrays |= {"network": exact.prediction.numpy(), "contributions": exact.contributions.numpy()}
    numbers = {
        "seed": seed,
        "errors": by_method,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(run.losses[-1]),
        "accuracy": accuracy(exact.prediction, data.y_test),
        "largest_output": float(exact.prediction.abs().max()),
    }
    return Result(numbers, arrays)


def _nodes(work: Work, name: str) -> Result:
    """Error of the rebuilt logits against the number of nodes per step, for the first seed."""
    model, run, data = learned(work, name, 0)
    rules = [(rule, n) for rule in ("left", "midpoint") for n in work.sizes.nodes]
    x = data.x_test[: work.sizes.probed]
    ends = _outputs(model, run, 0, x), _outputs(model, run, run.steps[-1], x)
    return Result(errors_by_rule(model, run, x, rules, ends, work.sizes.direct, _AT_ONCE), {})


def _optimizer(work: Work, name: str, seed: int) -> Result:
    """Errors of a run on digits under one recipe, in float64 and float32."""
    recipe, numbers = RECIPES[name], {}
    data = images(work, "digits", work.sizes.train, OTHER_TEST)
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


def exactness_claims(results: Results) -> Iterator[Claim]:
    """Residuals of all exact decompositions."""
    residuals = {f"three clusters, {LABELS[name]}": relative(r, "secant") for name, r in results["plane"].items()}
    residuals |= {name: relative(r, "secant") for name, r in results["images"].items()}
    yield Claim(
        "A network trained by gradient descent is a kernel machine, to machine precision",
        "largest relative residual: " + ", ".join(f"{name} {plain(max(v), 2)}" for name, v in residuals.items()),
        [Condition("every residual is", [v for of_one in residuals.values() for v in of_one], EXACT)],
        "float64, secant form, every seed; relative to the largest logit",
    )
    for name, runs in results["images"].items():
        slopes = {m: [r.numbers["errors"][m]["slope"] for r in runs] for m in METHODS}
        yield Claim(
            f"Kernel prediction against network logit lies on the diagonal, {name}",
            f"slope − 1: {plain(max(abs(v - 1) for v in slopes['secant']), 2)} (exact); slope "
            f"{mean(slopes['left']):.3f} with gradients at the start of each step, {mean(slopes['ntk']):.3f} with "
            "those at initialization",
            [Condition("every exact slope is", slopes["secant"], Within(EXACT.limit, of=1))],
            "least squares over all logits of all test images",
        )
    double, single = (
        max(r.numbers[f"secant {kind}"] for runs in results["recipes"].values() for r in runs)
        for kind in ("float64", "float32")
    )
    yield Claim(
        "The same for momentum, weight decay, Adam, schedules, clipping and minibatches",
        f"largest relative residual: {plain(double, 2)} (float64)",
        [Condition("it is", [double], EXACT)],
        f"not in the paper; {len(results['recipes'])} optimizers, every seed",
    )
    yield Claim(
        "In single precision the residual is rounding, too",
        f"largest relative residual: {plain(single, 2)} (float32)",
        [Condition("it is", [single], Bound("at most", 1e-5))],
        "the same optimizers",
    )


def other_gradient_claims(results: Results) -> Iterator[Claim]:
    """Left end points and initial gradients against the integral."""
    ratios, texts = [], []
    for name, runs in {**results["plane"], **results["images"]}.items():
        fine_runs = results["nodes"].get(name, runs)
        measured = "midpoint 200" in fine_runs[0].numbers["errors"]
        fine = max(relative(fine_runs, "midpoint 200")) if measured else None
        left, ntk = relative(runs, "left"), relative(runs, "ntk")
        addition = f" (200 nodes: {plain(fine, 2)})" if fine else ""
        texts.append(f"{LABELS.get(name, name)}: {mean(left):.3f} and {mean(ntk):.2f}{addition}")
        ratios += [min(min(left), min(ntk)) / fine] if fine else []
    words = "every error divided by that of the integral with 200 midpoints is"
    yield Claim(
        "Gradients at the start of each step, or at initialization, err by orders of magnitude more",
        "relative error, " + "; ".join(texts),
        [Condition(words, ratios, Bound("over", 100))] if ratios else [],
        "start of each step: the discretized path kernel; initialization: the tangent kernel",
    )


def node_claims(results: Results) -> Iterator[Claim]:
    """Errors by number of nodes."""
    s = results.work.sizes
    few, many = [n for n in s.nodes if n in (1, 10)], s.nodes[-1]
    for name in results["nodes"]:
        numbers = results.one("nodes", name).numbers["errors"]
        for rule, words in (("left", "left end points"), ("midpoint", "midpoints")):
            values = {n: numbers[f"{rule} {n}"]["relative"] for n in (*few, many)}
            yield Claim(
                f"On images only many integration points agree: {words}, {name}",
                "relative error " + ", ".join(f"{plain(v, 2)} with {n}" for n, v in values.items()),
                [Condition(f"with {' and '.join(map(str, few))} per step it is", [values[n] for n in few],
                           Bound("over", AGREEMENT)),
                 Condition(f"with {many}", [values[many]], Bound("at most", AGREEMENT))],
                f"{min(s.probed, s.test)} test images; relative to the largest logit",
            )  # fmt: skip


def section(results: Results, name: str) -> Section:
    """Kernel predictions against logits, and errors against the number of nodes."""
    s = results.work.sizes
    runs, nodes = results["images"][name], results.one("nodes", name).numbers["errors"]
    error = {method: relative(runs, method) for method in METHODS}
    slope_off = max(abs(r.numbers["errors"]["secant"]["slope"] - 1) for r in runs)
    scatter = {
        "kind": "scatter",
        "title": "Kernel prediction against network logit",
        "reading": f"{s.test} test images, ten outputs each, one seed; the line is the diagonal. Largest error: "
        f"{plain(max(error['secant']), 2)} of the largest logit (slope − 1: {plain(slope_off, 2)}), with gradients at "
        f"the start of each step {mean(error['left']):.3f}, with initial ones {mean(error['ntk']):.2f}.",
        "x": "network logit",
        "y": "kernel prediction",
        "panels": [
            {"heading": words, "x": f"images/{name}/network", "y": f"images/{name}/{method}"}
            for method, words in METHODS.items()
        ],
    }
    kinds = (("left", "left end points"), ("midpoint", "midpoints"))
    curves = [curve(words, s.nodes, [nodes[f"{rule} {n}"]["relative"] for n in s.nodes]) for rule, words in kinds]
    curves.append(curve("secant (no nodes)", [1, s.nodes[-1]], [error["secant"][0]] * 2, dash="dash"))
    some = [n for n in s.nodes if n in (1, 10, s.nodes[-1])]
    by_rule = {rule: ", ".join(plain(nodes[f"{rule} {n}"]["relative"], 2) for n in some) for rule, _ in kinds}
    against_nodes = lines(
        "Error against integration points per step",
        f"{min(s.probed, s.test)} test images, one seed. With {', '.join(map(str, some))} left end points: "
        f"{by_rule['left']} of the largest logit; midpoints: {by_rule['midpoint']}.",
        "points per step", "relative error", [("", curves)], log=True, wide=True,
    )  # fmt: skip
    return Section(
        f"Images: {name}",
        name.capitalize(),
        f"A convolutional ReLU network with {runs[0].numbers['parameters']:,} parameters, {s.train:,} images, "
        f"{s.steps} steps of full-batch gradient descent; test accuracy "
        f"{mean([r.numbers['accuracy'] for r in runs]):.2f}.",
        [scatter, against_nodes, *([_recipe_table(results)] if name == "digits" else [])],
        {f"images/{name}/{key}": runs[0].arrays[key] for key in ("network", *METHODS)},
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
