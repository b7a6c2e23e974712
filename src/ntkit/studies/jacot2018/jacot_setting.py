"""What the three experiments share: sizes, networks in the NTK parametrization, their training, their limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel, Kind
from ntkit.measures.convergence import Twin
from ntkit.networks.parametrization import to_ntk_parametrization
from ntkit.networks.widening import widened
from ntkit.studies.study import Item, curve, mlp

BETA, LR = 0.1, 1.0
DEPTH = 4  # weight layers of the first two experiments


def template(example: Tensor, depth: int) -> nn.Sequential:
    """A ReLU network of `depth` weight layers and one output, with the example's dtype and device; width 8."""
    return mlp(example.shape[1], 1, depth, 8, 0, nn.ReLU).to(example)


def network(example: Tensor, width: int, depth: int, seed: int) -> Twin:
    """A network of this width with standard normal parameters, w_std = 1 and b_std = beta, and its tangent kernel."""
    small = to_ntk_parametrization(template(example, depth), w_std=1.0, b_std=BETA)
    return Twin.of(widened(small, width, example[:2], seed=seed))


def limit(depth: int, x1: Tensor, x2: Tensor | None = None, kind: Kind = "ntk", beta: float = BETA) -> Tensor:
    """Theta_inf^(depth), or Sigma^(depth) for "nngp": [n1, n2], float64.

    >>> round(float(limit(4, torch.tensor([[1.0, 0.0]]))), 12)
    0.2825
    """
    kernel = InfiniteKernel(template(x1.double(), depth), kind=kind, w_std=1.0, b_std=beta)
    return kernel(x1.double(), None if x2 is None else x2.double())


def descend(
    twin: Twin,
    x: Tensor,
    y: Tensor,
    steps: int,
    watch: Callable[[int, Tensor], Any] | None = None,
    lr: float = LR,
) -> None:
    """Full-batch gradient descent on 1/(2N) sum (f(x_i) - y_i)^2, in place; `watch` gets step and outputs before it."""
    optimizer = twin.sgd(lr)
    for step in range(steps):
        out = twin.model(x)[:, 0]
        if watch is not None:
            watch(step, out.detach())
        optimizer.zero_grad()
        ((out - y).square().sum() / (2 * len(y))).backward()
        optimizer.step()
    if watch is not None:
        with torch.no_grad():
            watch(steps, twin.model(x)[:, 0])


def circle(angles: Tensor) -> Tensor:
    """Points (cos g, sin g) of the unit circle, [n, 2]."""
    return torch.stack([angles.cos(), angles.sin()], 1)


def course(twin: Twin, x: Tensor, y: Tensor, steps: int, lr: float) -> Tensor:
    """Outputs of a network on its way, before each step and after the last: [steps + 1, n]; it is trained in place."""
    seen: list[Tensor] = []
    descend(twin, x, y, steps, lambda step, out: seen.append(out), lr)
    return torch.stack(seen)


def outputs(twin: Twin, x: Tensor) -> Tensor:
    """Outputs of a network with one output, without gradients: [n]."""
    with torch.no_grad():
        return twin.model(x)[:, 0]


def short(values: Any) -> list[float]:
    """Values with the digits that a figure needs."""
    return [float(f"{v:.5g}") for v in np.ravel(values)]


def short_curve(name: str, x: Any, y: Any, **more: Any) -> Item:
    """A curve of a figure, with the digits that it needs."""
    return curve(name, short(x), short(y), **more)


def by_width(values: Mapping[int, Any], digits: int, unit: str = "") -> str:
    """Write estimates or numbers by width."""
    return ", ".join(f"{value:.{digits}f}{unit} (n = {n:,})" for n, value in values.items())
