"""The kernel gradient: d f / d t of networks in training against -K grad C, at finite and at infinite width."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.measures.convergence import Twin
from ntkit.report.words import plain
from ntkit.studies.claim import Between, Bound, Claim, Condition, Estimate, mean
from ntkit.studies.jacot2018.interval_tests import ERRORS, power, slope
from ntkit.studies.jacot2018.jacot_setting import DEPTH, by_width, limit, network, outputs, short_curve
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, device, lines, table

TRAIN, NEW = 20, 10  # inputs, standard normal in the plane
RATES = tuple(2.0**-k for k in range(10, 19))  # of one step of gradient descent
NEAR = float(torch.finfo(torch.float64).eps) ** (1 / 3)  # step of central differences
COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": lambda f, y: (f - y).square().sum() / (2 * len(y)),
    "logistic": lambda f, y: F.binary_cross_entropy_with_logits(f, (y > 0).to(f)),
}


def parts(work: Work) -> Iterator[StudyPart]:
    """Networks by width."""
    for width in work.sizes.gradient_widths:
        yield StudyPart("gradient", width, f"gradient-{width}", _gradients, (width,))


def _gradients(work: Work, width: int) -> Result:
    """Errors of the kernel gradient by network, cost and rate, and distances to the limit's."""
    numbers: dict[str, dict[str, list]] = {cost: {"central": [], "errors": [], "limit": []} for cost in COSTS}
    for seed in range(work.sizes.gradient_seeds):
        x = torch.randn(TRAIN + NEW, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device())
        twin = network(x, width, DEPTH, 2_000_000 + seed)
        K, infinite = twin(x, x[:TRAIN]), limit(DEPTH, x, x[:TRAIN])
        y, f = (x[:, 0] * x[:, 1])[:TRAIN], outputs(twin, x)
        for name, cost in COSTS.items():
            slopes = cost_gradient(cost, f[:TRAIN], y)
            predicted, exact = -K @ slopes, -infinite @ slopes
            ahead, behind = (moved(twin, x, y, cost, rate) for rate in (NEAR, -NEAR))
            found = numbers[name]
            found["central"].append(_distance((ahead - behind) / (2 * NEAR), predicted))
            found["errors"].append([_distance((moved(twin, x, y, cost, r) - f) / r, predicted) for r in RATES])
            found["limit"].append(_distance(predicted, exact))
    return Result(numbers, {})


def cost_gradient(cost: Callable[[Tensor, Tensor], Tensor], f: Tensor, y: Tensor) -> Tensor:
    """Derivatives of a cost in the outputs, [n].

    >>> cost_gradient(COSTS["square"], torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])).tolist()
    [0.5, 0.0]
    """
    leaf = f.detach().requires_grad_()
    return torch.autograd.grad(cost(leaf, y), leaf)[0]


def moved(twin: Twin, x: Tensor, y: Tensor, cost: Callable[[Tensor, Tensor], Tensor], rate: float) -> Tensor:
    """Outputs after one step of gradient descent at this rate (up the gradient for a negative one); weights return."""
    before = [p.detach().clone() for p in twin.model.parameters()]
    optimizer = twin.sgd(abs(rate))
    optimizer.zero_grad()
    (cost(twin.model(x[: len(y)])[:, 0], y) * (1 if rate > 0 else -1)).backward()
    optimizer.step()
    after = outputs(twin, x)
    with torch.no_grad():
        for p, old in zip(twin.model.parameters(), before, strict=True):
            p.copy_(old)
    return after


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def orders(errors: list[list[float]]) -> list[float]:
    """Order of the change's error in the rate, of each network: slope of rate x error on logarithmic axes.

    >>> [round(order, 6) for order in orders([[3 * r for r in RATES], [0.01 for r in RATES]])]
    [2.0, 1.0]
    """
    x = np.log(RATES)
    return [float(np.polyfit(x, x + np.log(e), 1)[0]) for e in errors]


def _to_limit(results: Results, cost: str) -> dict[int, Estimate]:
    return {n: mean(run[0].numbers[cost]["limit"]) for n, run in results["gradient"].items()}


def claims(results: Results) -> Iterator[Claim]:
    """The kernel gradient of finite networks, and of the limit."""
    runs = {n: found[0].numbers for n, found in results["gradient"].items()}
    seeds = results.work.sizes.gradient_seeds
    central = [e for run in runs.values() for cost in COSTS for e in run[cost]["central"]]
    order = {cost: mean([o for run in runs.values() for o in orders(run[cost]["errors"])]) for cost in COSTS}
    yield Claim(
        "In training the network’s function follows the kernel gradient: d f / d t = −K ∂C/∂f, at every width",
        f"largest relative difference {plain(max(central), 2)}; order in the rate of what a step leaves out: "
        + ", ".join(f"{found:.3f} ({cost} cost)" for cost, found in order.items()),
        [Condition("each difference is", central, Bound("at most", NEAR)),
         *(Condition(f"the interval of the mean order ± {ERRORS} standard errors, {cost} cost, is",
                     [found.value - ERRORS * found.error, found.value + ERRORS * found.error], Between(1.5, 2.5))
           for cost, found in order.items())],
        f"{seeds} networks each of n = {', '.join(f'{n:,}' for n in runs)}, {TRAIN} training inputs and {NEW} "
        f"new ones; central differences with the step {plain(NEAR, 2)}, the cube root of the rounding; the order is 2, "
        "and 1 if the kernel were another; in one network ReLU’s kinks make it uneven",
    )  # fmt: skip
    for cost in COSTS:
        off = _to_limit(results, cost)
        rate = slope(off)
        yield Claim(
            f"In the limit of infinite width the kernel of that gradient is the limit’s: {cost} cost",
            f"relative distance of −K ∂C/∂f from the limit’s: {by_width(off, 3)}; slope {rate:.3f}",
            [power("the slope is", rate, -0.5)],
            f"{seeds} networks of each width; the spread of random kernels falls as 1/√n",
        )


def sections(results: Results) -> list[Section]:
    """Errors by rate, distances by width."""
    runs = {n: found[0].numbers for n, found in results["gradient"].items()}
    by_rate = [
        short_curve(f"n = {n:,}, {cost} cost", RATES, np.mean(run[cost]["errors"], 0))
        for n, run in runs.items() for cost in COSTS
    ]  # fmt: skip
    by_rate.append(short_curve("slope 1", RATES, np.asarray(RATES) / RATES[0] * by_rate[0]["y"][0], dash="dot"))
    rows = [[f"{n:,}", *(f"{_to_limit(results, cost)[n]:.3f}" for cost in COSTS)] for n in runs]
    items = [
        lines("What one step of descent leaves out", "Relative to the step that the kernel gradient predicts.",
              "learning rate", "relative difference", [("", by_rate)], log="xy", ordered=True),
        table("Distance to the limit’s kernel gradient", ["Width", *(f"{cost} cost" for cost in COSTS)], rows,
              f"Relative, mean over {results.work.sizes.gradient_seeds} networks."),
    ]  # fmt: skip
    text = f"One step of gradient descent from the start, at {TRAIN} training inputs and {NEW} new ones, float64."
    return [Section("The kernel gradient", "Gradient", text, items)]
