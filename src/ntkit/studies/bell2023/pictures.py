"""Images and a small convolutional network: exactness, today's optimisers, and what predictions are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.kernels.path.decomposition import PathDecomposition
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.studies.bell2023.setting import (
    Images,
    cnn,
    cross_entropy,
    errors,
    grey,
    images,
    sgd,
    slope,
    summed_changes,
    weighted,
    weighted_cross_entropy,
)
from ntkit.studies.parts import Part, Work
from ntkit.trajectory import Trajectory, train

CASES, SHOWN = 4, 5  # test images explained, training images shown for and against each
METHODS = ("secant", "left", "ntk")
_AT_ONCE = 25  # nodes


def learned(work: Work, name: str, seed: int) -> tuple[nn.Module, Trajectory, Images]:
    """Network, run and data: full-batch gradient descent, every step recorded."""
    data = images(work, name, work.scale.train, work.scale.test)
    model = cnn(data.x.shape[-1], int(data.y.max()) + 1, work.scale.width, seed)
    run = train(
        model, (data.x, weighted(data.y)), weighted_cross_entropy, sgd(work.scale.lr), work.scale.steps, record="all",
        seed=seed, path=work.trajectory(f"{name}-seed-{seed}"), resume=True,
    )  # fmt: skip
    return model, run, data


def measure(work: Work, name: str, seed: int) -> Part:
    """Rebuilt logits of the test images: exact, by the left end point, by frozen gradients."""
    return work.kept(f"{name}-seed-{seed}", f"{name}, seed {seed}", lambda: _measure(work, name, seed))


def _measure(work: Work, name: str, seed: int) -> Part:
    model, run, data = learned(work, name, seed)
    found: dict[str, Any] = {}
    arrays = {}
    exact = PathKernel(run).decompose(data.x_test)
    for integration in METHODS:
        made = exact if integration == "secant" else PathKernel(run, integration=integration).decompose(data.x_test)
        rebuilt = made.prediction + made.residual
        found[integration] = errors(rebuilt, made.prediction) | {"slope": slope(made.prediction, rebuilt)}
        arrays[integration] = rebuilt.numpy()
    arrays |= {"network": exact.prediction.numpy(), "contributions": exact.contributions.numpy()}
    numbers = {
        "seed": seed,
        "errors": found,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": float(run.losses[-1]),
        "accuracy": accuracy(exact.prediction, data.y_test),
        "largest_output": float(exact.prediction.abs().max()),
    }
    return Part(numbers, arrays)


def nodes(work: Work, name: str) -> Part:
    """Error of the rebuilt logits against the number of nodes per step, for the first seed."""
    return work.kept(f"{name}-nodes", f"{name}, number of nodes", lambda: _nodes(work, name))


def _nodes(work: Work, name: str) -> Part:
    model, run, data = learned(work, name, 0)
    rules = [(rule, n) for rule in ("left", "midpoint") for n in work.scale.nodes]
    x = data.x_test[: work.scale.probed]
    changes = summed_changes(model, run, x, rules, _AT_ONCE)
    network = {step: _outputs(model, run, step, x) for step in (0, run.steps[-1])}
    initial, prediction = network[0], network[run.steps[-1]]
    found = {f"{rule} {n}": errors(initial + changes[rule, n], prediction) for rule, n in rules}
    apart = 0.0
    for n in (n for n in work.scale.nodes if n <= work.scale.direct):
        made = PathKernel(run, integration="quadrature", rule="midpoint", nodes=n).decompose(x)
        own = made.prediction + made.residual
        apart = max(apart, errors((initial + changes["midpoint", n]).cpu(), own)["relative"])
        found[f"midpoint {n}"] = errors(own, made.prediction)
    return Part({"errors": found, "apart": apart}, {})


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of samples whose largest logit is that of their class."""
    return float((logits.argmax(1) == y.cpu()).double().mean())


@torch.no_grad()
def _outputs(model: nn.Module, run: Trajectory, step: int, x: Tensor) -> Tensor:
    run.load(model, step)
    return model(x)


# ---------------------------------------------------------------------- optimisers of today


class Recipe(NamedTuple):
    """How to train on minibatches: an optimiser, its schedule and clipping."""

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
BATCH, OTHER_TEST = 32, 20


def optimizer(work: Work, name: str, seed: int) -> Part:
    """Certificates of a run on digits under one recipe, in float64 and float32."""
    return work.kept(
        f"optimizer-{name}-seed-{seed}",
        f"{RECIPES[name].title}, seed {seed}",
        lambda: _optimizer(work, name, seed),
    )


def _optimizer(work: Work, name: str, seed: int) -> Part:
    recipe, numbers = RECIPES[name], {}
    data = images(work, "digits", work.scale.train, OTHER_TEST)
    for dtype in (torch.float64, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        model = cnn(data.x.shape[-1], 10, work.scale.width, seed).to(dtype)
        schedule = None if recipe.schedule is None else partial(recipe.schedule, steps=work.scale.other_steps)
        run = train(
            model, (data.x.to(dtype), data.y), cross_entropy, recipe.optimizer, work.scale.other_steps,
            batch_size=BATCH, schedule=schedule, clip=recipe.clip, seed=seed, resume=True,
            path=work.trajectory(f"optimizer-{name}-{kind}-seed-{seed}"),
        )  # fmt: skip
        methods = METHODS if dtype == torch.float64 else METHODS[:1]
        for integration in methods:
            made = PathKernel(run, integration=integration).decompose(data.x_test.to(dtype))
            numbers[f"{integration} {kind}"] = made.error
            numbers |= {"loss": float(run.losses[-10:].mean()), "accuracy": accuracy(made.prediction, data.y_test)}
    return Part(numbers, {})


# ---------------------------------------------------------------------- what predictions are made of


def explained(work: Work, name: str) -> Part:
    """For some test images: examples for and against, each class's mass, contributions over time."""
    return work.kept(f"{name}-explained", f"{name}, explained", lambda: _explained(work, name))


def _explained(work: Work, name: str) -> Part:
    _, run, data = learned(work, name, 0)
    network = torch.from_numpy(measure(work, name, 0).arrays["network"])
    labels, truth = data.y.cpu(), data.y_test.cpu()
    chosen = spread(network, truth)
    made = PathKernel(run).decompose(data.x_test[chosen], steps=True)
    best, worst = made.top(SHOWN), made.top(SHOWN, against=True)
    predicted = made.prediction.argmax(1)
    cases = []
    for i, index in enumerate(chosen.tolist()):
        c = int(predicted[i])
        cases.append({
            "index": index,
            "predicted": c,
            "label": int(truth[index]),
            "initial": float(made.initial[i, c]),
            "logit": float(made.prediction[i, c]),
            "for": {"labels": labels[best.examples[i]].tolist(), "values": best.values[i].tolist()},
            "against": {"labels": labels[worst.examples[i]].tolist(), "values": worst.values[i].tolist()},
            "classes": made.by_class(labels)[i, c].tolist(),
            "half": _half(made.contributions[i, c]),
            "over_time": _over_time(made, labels, i, c),
        })  # fmt: skip
    arrays = {
        "test": grey(data.x_test[chosen], data),
        "for": grey(data.x[best.examples.to(data.x.device)], data),
        "against": grey(data.x[worst.examples.to(data.x.device)], data),
    }
    return Part({"cases": cases, "error": made.error, "largest_output": float(made.prediction.abs().max())}, arrays)


def spread(network: Tensor, truth: Tensor) -> Tensor:
    """Test images from the worst margin of the true class to the best, evenly spread over the ranks."""
    own = network.gather(1, truth[:, None])[:, 0]
    others = network.scatter(1, truth[:, None], -math.inf).max(1).values
    ranked = (own - others).argsort()
    return ranked[torch.linspace(0, len(ranked) - 1, min(CASES, len(ranked))).round().long()]


def _half(contributions: Tensor) -> int:
    """How many examples make half of the sum of the contributions' sizes."""
    sizes = contributions.abs().sort(descending=True).values.cumsum(0)
    return int((sizes < sizes[-1] / 2).sum()) + 1


def _over_time(made: PathDecomposition, labels: Tensor, i: int, c: int) -> dict[str, list[float]]:
    """Logit made up to each step by the examples of class `c`, by all others, and in all."""
    own, rest = [], []
    for share in made.steps or []:
        mine = labels[share.rows] == c
        own.append(float(share.values[i, c, mine].sum()))
        rest.append(float(share.values[i, c, ~mine].sum()))
    totals = {"own": np.cumsum([0.0, *own]), "others": np.cumsum([0.0, *rest])}
    totals["logit"] = float(made.initial[i, c]) + totals["own"] + totals["others"]
    return {name: value.tolist() for name, value in totals.items()}
