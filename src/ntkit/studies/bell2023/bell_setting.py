"""What the experiments share: data, networks, training, integrals along a step, tables of errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn import functional as F

from ntkit.data import load
from ntkit.kernels.path.integration import Integration, points
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.studies.claim import Bound
from ntkit.studies.part import Result, Work
from ntkit.studies.study import device
from ntkit.trajectory import Trajectory

METHODS: dict[Integration, str] = {"secant": "exact (secant)", "left": "start of each step", "ntk": "initial gradients"}
ROUNDING = Bound("at most", 1)  # of an error in units of `rounding`
SEEDS = (0, 1, 2, 3, 4)


class Images(NamedTuple):
    """Training and test images, standardized by the training images' mean and deviation; labels from 0."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: float
    deviation: float


def images(work: Work, name: str, train: int, test: int, whole: bool = False, **more: Any) -> Images:
    """Draw images of a data set in float64, averaged down to the size's pixels unless they are to be `whole`."""
    data = load(name, work.folder_of(name), train=train, test=test, **more)
    x, x_test = data.x_train.double().to(device()), data.x_test.double().to(device())
    if not whole and x.shape[-1] > work.sizes.pixels:
        x, x_test = (F.adaptive_avg_pool2d(part, work.sizes.pixels) for part in (x, x_test))
    mean, deviation = float(x.mean()), float(x.std())
    y, y_test = data.y_train.to(device()), data.y_test.to(device())
    return Images((x - mean) / deviation, y, (x_test - mean) / deviation, y_test, mean, deviation)


def gray(x: Tensor, data: Images) -> np.ndarray:
    """Images before standardization, 0 to 255: uint8 [..., H, W, 1]."""
    pixels = (x * data.deviation + data.mean).clamp(0, 1)[..., 0, :, :, None]
    return (255 * pixels).round().to(torch.uint8).cpu().numpy()


def cnn(pixels: int, classes: int, width: int, seed: int) -> nn.Sequential:
    """Two 3 x 3 convolutions (`width` and twice that, the second in strides of two), ReLU, one dense layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = (pixels - 3 - 2) // 2 + 1
        return nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * side**2, classes),
        ).to(device(), torch.float64)


def weighted_cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of losses times weights: y is [n, 2], a label and a weight. Weight 0 removes an example."""
    return (F.cross_entropy(out, y[:, 0].long(), reduction="none") * y[:, 1].to(out)).mean()


def weighted(y: Tensor, removed: Tensor | None = None) -> Tensor:
    """Labels with weights: 1, or 0 for removed examples."""
    weights = torch.ones(len(y), dtype=torch.float64, device=y.device)
    if removed is not None:
        weights[removed.to(y.device)] = 0
    return torch.stack([y.double(), weights], 1)


def sgd(lr: float, **more: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """SGD as a function of the parameters; plain without further options."""
    return partial(torch.optim.SGD, lr=lr, **more)


def summed_changes(
    model: nn.Module, run: Trajectory, x: Tensor, rules: Sequence[tuple[str, int]], at_once: int
) -> dict[tuple[str, int], Tensor]:
    """Change of the outputs over the run, as integrals of d f / d t along every step, by rules (name, nodes).

    The examples' gradients sum to the update. So this is the sum of all contributions to an output when the test side
    is integrated by the rule: it gives the rule's error without any contribution. Every step must be recorded.

    Returns
    -------
    dict
        [m, C] by rule; rules are "left", "midpoint" and "gauss".
    """
    total: dict[tuple[str, int], Any] = dict.fromkeys(rules, 0.0)
    for before, after in states(run, model, x):
        speed = {name: after[name] - before[name] for name in before}

        def change(t: Tensor, before: Any = before, speed: Any = speed) -> Tensor:
            place = {name: before[name] + t * speed[name] for name in before}
            return jvp(lambda at: functional_call(model, at, (x,)), (place,), (speed,))[1]

        for rule, nodes in rules:
            t, weights = nodes_of(rule, nodes)
            with warnings.catch_warnings():  # on its first use jvp calls functions that torch itself deprecates
                warnings.simplefilter("ignore", DeprecationWarning)
                changes = vmap(change, chunk_size=at_once)(torch.as_tensor(t).to(x))
            total[rule, nodes] = total[rule, nodes] + torch.einsum("t,tmc->mc", torch.as_tensor(weights).to(x), changes)
    return {rule: value.detach() for rule, value in total.items()}


def nodes_of(rule: str, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [0, 1] and weights.

    >>> nodes_of("left", 2)[0].tolist()
    [0.0, 0.5]
    """
    return (np.arange(nodes) / nodes, np.full(nodes, 1 / nodes)) if rule == "left" else points(rule, nodes)


def rounding(terms: int, dtype: torch.dtype = torch.float64) -> float:
    """Error, relative to the largest output, that adding so many terms leaves when each addition is rounded at random.

    >>> rounding(100) == 10 * 2.0**-52
    True
    """
    return math.sqrt(terms) * torch.finfo(dtype).eps


def errors(rebuilt: Tensor, prediction: Tensor) -> dict[str, float]:
    """Largest error of the rebuilt outputs: absolute, and relative to the largest output."""
    largest = float((rebuilt.cpu() - prediction.cpu()).abs().max())
    return {"largest": largest, "relative": largest / float(prediction.abs().max())}


def errors_by_rule(
    model: nn.Module,
    run: Trajectory,
    x: Tensor,
    rules: Sequence[tuple[Any, int]],
    ends: tuple[Tensor, Tensor],
    direct: int,
    at_once: int,
) -> dict[str, Any]:
    """Errors of the outputs rebuilt by rules (name, nodes), from the network's outputs before and after training.

    Up to `direct` nodes the contributions themselves are summed, except for left end points; ``apart`` is the largest
    distance of that sum from the integrals of `summed_changes`, which stand for it elsewhere.
    """
    initial, prediction = ends
    changes = summed_changes(model, run, x, rules, at_once)
    by_rule, apart = {}, 0.0
    for rule, nodes in rules:
        rebuilt = (initial.to(x) + changes[rule, nodes]).cpu()
        by_rule[f"{rule} {nodes}"] = errors(rebuilt, prediction)
        if rule != "left" and nodes <= direct:
            parts = PathKernel(run, integration="quadrature", rule=rule, nodes=nodes).decompose(x)
            own = parts.prediction + parts.residual
            apart = max(apart, errors(rebuilt, own)["relative"])
            by_rule[f"{rule} {nodes}"] = errors(own, parts.prediction)
    return {"errors": by_rule, "apart": apart}


def slope(network: Tensor, rebuilt: Tensor) -> float:
    """Least-squares slope of rebuilt outputs against the network's own, with an intercept."""
    a = network.flatten() - network.mean()
    return float(a @ (rebuilt.flatten() - rebuilt.mean()) / (a @ a))


def gradients(model: nn.Module, at: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Jacobian of the outputs by all parameters, [m, C, P], by plain autograd: no code of a kernel is in it."""

    def outputs(values: Mapping[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, dict(values), (one[None],))[0]

    rows = vmap(jacrev(outputs), (None, 0))(dict(at), x)
    return torch.cat([row.flatten(2) for row in rows.values()], 2).detach()


def states(run: Trajectory, model: nn.Module, x: Tensor) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Parameters before and after each step, on the device of `x`. Every step must be recorded."""
    names = [name for name, _ in model.named_parameters()]
    after = {name: run.state(0)[name].to(x.device) for name in names}
    for step in range(run.steps[-1]):
        before, after = after, {name: run.state(step + 1)[name].to(x.device) for name in names}
        yield before, after


def between(before: Mapping[str, Tensor], after: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """Parameters at a place of a step, 0 to 1."""
    return {name: torch.lerp(before[name], after[name], t) for name in before}


def slopes(model: nn.Module, at: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Derivatives of the mean cross-entropy by the outputs, [n, C]."""
    with torch.no_grad():
        shares = functional_call(model, dict(at), (x,)).softmax(1)
    return (shares - F.one_hot(y, shares.shape[1]).to(shares)) / len(y)


def order(nodes: Sequence[int], values: Sequence[float]) -> float:
    """Order p of an error proportional to nodes^-p: slope of a line through the logarithms.

    >>> round(order([1, 10, 100], [3.0, 0.03, 0.0003]), 6)
    2.0
    """
    return -float(np.polyfit(np.log(nodes), np.log(values), 1)[0])


def relative(parts: list[Result], method: str) -> list[float]:
    """Largest error of each seed's rebuilt outputs, relative to the largest output."""
    return [part.numbers["errors"][method]["relative"] for part in parts]
