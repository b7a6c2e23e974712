"""Kernel machines that are not exact: the tangent kernel at either end of the run, path kernels by few points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from ntkit.networks.linearization import linearized
from ntkit.report.words import plain
from ntkit.studies.bell2023 import pictures, plane
from ntkit.studies.bell2023.bell_setting import between, errors, nodes_of, rounding, sgd, slopes, states, summed_changes
from ntkit.studies.claim import RISES, SURE, Bound, Claim, Condition, Estimate, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, table
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import Trajectory, train

BOTH = 4  # nodes
FORMULATIONS = {
    "left": "gradients at the start of each step",
    "left 10": "test side by 10 left end points per step",
    "midpoint": "test side at the middle of each step",
    "both": f"both sides along the step, {BOTH} midpoints",
    "trained": "linearized network, trained",
    "initial": "gradients at initialization, the network’s slopes",
    "after": "after kernel, the network’s slopes",
    "after trained": "after kernel, trained",
}
TANGENT, PATH = ("trained", "initial"), ("left", "both")
_ORDERS = 2  # "by orders of magnitude": at least two


class TrainedNetwork(NamedTuple):
    """A network that full-batch gradient descent on the mean cross-entropy trained, and its run."""

    model: nn.Module
    run: Trajectory
    x: Tensor
    y: Tensor
    lr: float


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each network and seed."""
    for case in (*plane.ACTIVATIONS, *work.sets):
        for seed in work.seeds:
            yield StudyPart("formulations", case, f"formulations-{case}-seed-{seed}", _compare, (case, seed))


def _compare(work: Work, case: str, seed: int) -> Result:
    """Errors of every formulation's outputs for test points."""
    if case in plane.ACTIVATIONS:
        model, run, x, y = plane.trained(work, case, seed)
        at, test = TrainedNetwork(model, run, x, y, plane.LR), plane.clusters(plane.TEST, 1000 + seed)
        x_test, truth = (t.to(x) if t.is_floating_point() else t for t in test)
    else:
        model, run, data = pictures.learned(work, case, seed)
        at, x_test, truth = TrainedNetwork(model, run, data.x, data.y, work.sizes.lr), data.x_test, data.y_test
    network = _outputs(at, run.steps[-1], x_test)
    numbers: dict[str, Any] = {"terms": run.steps[-1] * len(at.y), "network accuracy": _share(network, truth)}
    arrays = {"network": network.cpu().numpy()}
    for name, rebuilt in formulations(at, x_test).items():
        agree = float((rebuilt.argmax(1) == network.argmax(1)).double().mean())
        numbers[name] = errors(rebuilt, network) | {"agree": agree, "accuracy": _share(rebuilt, truth)}
        arrays[name] = rebuilt.cpu().numpy()
    return Result(numbers, arrays)


def _share(logits: Tensor, truth: Tensor) -> float:
    return float((logits.argmax(1).cpu() == truth.cpu()).double().mean())


def formulations(at: TrainedNetwork, x: Tensor) -> dict[str, Tensor]:
    """Outputs for `x` [m, C] by each of `FORMULATIONS`.

    All start at the network's initial outputs f_0 and add, for each step and training example, a kernel value times
    the slope of the loss; with u the step from theta_s to theta_{s+1} and J the Jacobian of the outputs for x:

        left, left 10, midpoint:  sum_s of J u at these places of the step
        both:                     sum_s of J(theta) times (- lr * gradient of the loss at theta), along the step
        initial, after:           J(theta*) times - lr sum_s sum_i J_i(theta*)^T slope_is, theta* the first or the last
        trained, after trained:   f_0 + J(theta*) delta, delta trained from 0 by the same steps with its own slopes
    """
    first, last = _outputs(at, 0, x), at.run.steps[-1]
    rules = {"left": ("left", 1), "left 10": ("left", 10), "midpoint": ("midpoint", 1)}
    changes = summed_changes(at.model, at.run, x, list(rules.values()), 10)
    rebuilt = {name: first + changes[rule] for name, rule in rules.items()}
    rebuilt["both"] = first + _both_sides(at, x)
    weights: Any = 0.0
    for before, _ in states(at.run, at.model, at.x):
        weights = weights - at.lr * slopes(at.model, before, at.x, at.y)
    for name, step in (("initial", 0), ("after", last)):
        rebuilt[name] = first + _pulled(at, step, weights, x)
        machine = f"{name} trained" if step else "trained"
        rebuilt[machine] = first + _trained(at, step)(x)
    return {name: rebuilt[name] for name in FORMULATIONS if name in rebuilt}


def _state(at: TrainedNetwork, step: int) -> dict[str, Tensor]:
    return {name: at.run.state(step)[name].to(at.x.device) for name, _ in at.model.named_parameters()}


@torch.no_grad()
def _outputs(at: TrainedNetwork, step: int, x: Tensor) -> Tensor:
    return functional_call(at.model, _state(at, step), (x,))


def _along(model: nn.Module, place: Mapping[str, Tensor], x: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    """The Jacobian of the outputs for `x` times a direction of the parameters, [m, C]."""
    with warnings.catch_warnings():  # on its first use jvp calls functions that torch itself deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        return jvp(lambda values: functional_call(model, values, (x,)), (dict(place),), (dict(direction),))[1].detach()


def _against(model: nn.Module, place: Mapping[str, Tensor], x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Weights of the training outputs [n, C] times their Jacobian: a direction of the parameters."""
    return vjp(lambda values: functional_call(model, values, (x,)), dict(place))[1](weights)[0]


def _both_sides(at: TrainedNetwork, x: Tensor, nodes: int = BOTH) -> Tensor:
    """The path kernel of gradient flow (Domingos) on the steps as they were: everything taken along the step."""
    total: Any = 0.0
    for before, after in states(at.run, at.model, at.x):
        for t, weight in zip(*nodes_of("midpoint", nodes), strict=True):
            place = between(before, after, float(t))
            pull = _against(at.model, place, at.x, -at.lr * slopes(at.model, place, at.x, at.y))
            total = total + weight * _along(at.model, place, x, pull)
    return total


def _pulled(at: TrainedNetwork, step: int, weights: Tensor, x: Tensor) -> Tensor:
    """Kernel at one step's parameters times weights of the training outputs."""
    place = _state(at, step)
    return _along(at.model, place, x, _against(at.model, place, at.x, weights))


class _Machine(nn.Module):
    """J(theta*) delta plus given outputs: a machine of one tangent kernel, whose outputs start where they should."""

    def __init__(self, model: nn.Module, known: Tensor, known_outputs: Tensor) -> None:
        super().__init__()
        self.moving = linearized(model)
        with torch.no_grad():
            self.register_buffer("start", known_outputs - self.moving(known))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for the known points."""
        return self.moving(x) + self.start


def _trained(at: TrainedNetwork, step: int) -> Callable[[Tensor], Tensor]:
    """Train the network's first-order expansion around a step as the run did; returns its change of outputs."""
    at.run.load(at.model, step)
    machine = _Machine(at.model, at.x, _outputs(at, 0, at.x))
    start = linearized(at.model)
    train(machine, (at.x, at.y), cross_entropy, sgd(at.lr), at.run.steps[-1], record=[0])

    @torch.no_grad()
    def change(x: Tensor) -> Tensor:
        return machine.moving(x) - start(x)

    return change


def _logs(runs: list[Result], name: str) -> np.ndarray:
    """Logarithm of each seed's largest error, relative to the largest output."""
    return np.log10([r.numbers[name]["relative"] for r in runs])


def _exact(results: Results, case: str) -> np.ndarray:
    """The same of the exact form: the errors of its residual, or the size of rounding where it has none."""
    runs = results["plane" if case in plane.ACTIVATIONS else "images"][case]
    smallest = [rounding(r.numbers["terms"]) for r in runs]
    found = [r.numbers["errors"]["secant"]["relative"] for r in runs]
    return np.log10(np.maximum(found, smallest))


def _text(values: Estimate) -> str:
    return f"10^({values:.2f})"


def claims(results: Results) -> Iterator[Claim]:
    """Errors of what is not exact, beside the exact form's; one over the other; which is the nearest."""
    protocol = (
        "largest error over test points and outputs, relative to the largest output; mean of its logarithm over seeds; "
        "the exact form’s is its residual, at least the rounding of the sum"
    )
    for group, title in (
        (TANGENT, "The tangent kernel errs by orders of magnitude more than the exact representation"),
        (PATH, "Path kernels by one point per step, or of gradient flow, err by orders of magnitude more"),
        (("after", "after trained"), "The after kernel errs by orders of magnitude more than the exact representation"),
    ):
        gaps, texts = [], []
        for case, runs in results["formulations"].items():
            gaps += [mean(_logs(runs, name) - _exact(results, case)) for name in group]
            own = [f"{FORMULATIONS[name]} {_text(mean(_logs(runs, name)))}" for name in group]
            own.append(f"exact {_text(mean(_exact(results, case)))}")
            texts.append(f"{plane.LABELS.get(case, case)}: {', '.join(own)}")
        words = "every paired difference of logarithms from the exact form’s is"
        conditions = [Condition(words, gaps, Bound("over", _ORDERS, errors=SURE))]
        yield Claim(title, "; ".join(texts), conditions, protocol, further="after" in group)
    for better, worse, title, further in (
        ("left", "trained", "The path kernel by one point per step is nearer than the tangent kernel", False),
        ("both", "trained", "The path kernel of gradient flow, on such steps, is nearer than the tangent one", False),
        ("trained", "initial", "A trained linearized network is nearer than initial gradients with the network’s "
         "slopes", True),
        ("after", "initial", "The after kernel is nearer than initial gradients, both with the network’s slopes", True),
        ("midpoint", "left", "One point at the middle of each step is nearer than one at its start", True),
        ("both", "left", "Both sides along the step, as in gradient flow, are nearer than both at its start", True),
    ):  # fmt: skip
        gaps = {case: mean(_logs(runs, worse) - _logs(runs, better)) for case, runs in results["formulations"].items()}
        yield Claim(
            title,
            "ratio of the errors "
            + ", ".join(f"{plane.LABELS.get(case, case)} {_text(gap)}" for case, gap in gaps.items()),
            [Condition("for each network the logarithm of the ratio is", list(gaps.values()),
                       RISES)],
            f"{FORMULATIONS[worse]}, over {FORMULATIONS[better]}; paired by seed",
            further=further,
        )  # fmt: skip


def item(results: Results) -> Item:
    """Errors and predicted classes, for every network."""
    groups = results["formulations"]
    rows = [
        [words, *(f"{mean([r.numbers[name]['relative'] for r in runs]):.2g}" for runs in groups.values()),
         ", ".join(f"{100 * mean([r.numbers[name]['agree'] for r in runs]).value:.0f} %" for runs in groups.values())]
        for name, words in FORMULATIONS.items()
    ]  # fmt: skip
    exact = [plain(float(10 ** _exact(results, case).max()), 2) for case in groups]
    rows.insert(0, ["exact form (secant), at most", *exact, ", ".join(["100 %"] * len(groups))])
    return table(
        "Formulations that are not exact: error of the outputs, and share of the test points with the same class",
        ["Formulation", *(plane.LABELS.get(case, case) for case in groups), "Same class"],
        rows,
        "Largest error over test points and outputs, relative to the largest output; mean over "
        f"{len(next(iter(groups.values())))} seeds ± standard error. A trained machine has its own slopes.",
    )
