"""What the three experiments share: sizes, networks in the NTK parametrization, their training, their limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel, Kind
from ntkit.measures.convergence import Twin
from ntkit.networks.parametrization import to_ntk_parametrization
from ntkit.networks.widening import widened
from ntkit.studies.parts import Part, Work

__all__ = ["BETA", "DEPTH", "LR", "Part", "Scale", "Work", "circle", "descend", "limit", "network", "sizes"]

BETA, LR = 0.1, 1.0
DEPTH = 4  # weight layers of the first two experiments


@dataclass(frozen=True)
class Scale:
    """Sizes of all experiments.

    Attributes
    ----------
    rate_widths, rate_seeds : networks whose kernels give the rate of convergence, without training.
    kernel_widths, seeds, inputs, kernel_steps : figure 1.
    curve_widths, curve_seeds, curve_steps : figure 2.
    component_widths, trials, batch, component_steps, batches : figure 3; how many batches tell the eigenvalues' spread.
    """

    rate_widths: tuple[int, ...]
    rate_seeds: int
    kernel_widths: tuple[int, ...]
    seeds: int
    inputs: int
    kernel_steps: int
    curve_widths: tuple[int, ...]
    curve_seeds: int
    curve_steps: int
    component_widths: tuple[int, ...]
    trials: int
    batch: int
    component_steps: int
    batches: int


def sizes(work: Work) -> Scale:
    """Sizes of this run."""
    return work.scale


def template(example: Tensor, depth: int) -> nn.Sequential:
    """A ReLU network of `depth` weight layers and one output, of any width, where the example is."""
    with torch.random.fork_rng(devices=[]):
        layers: list[nn.Module] = [nn.Linear(example.shape[1], 8)]
        for layer in range(1, depth):
            layers += [nn.ReLU(), nn.Linear(8, 8 if layer < depth - 1 else 1)]
    return nn.Sequential(*layers).to(example)


def network(example: Tensor, width: int, depth: int, seed: int) -> Twin:
    """A network of this width with standard normal parameters, w_std = 1 and b_std = beta, and its tangent kernel."""
    small = to_ntk_parametrization(template(example, depth), w_std=1.0, b_std=BETA)
    return Twin.of(widened(small, width, example[:2], seed))


def limit(depth: int, x1: Tensor, x2: Tensor | None = None, kind: Kind = "ntk", beta: float = BETA) -> Tensor:
    """Theta_inf^(depth), or Sigma^(depth) for "nngp": [n1, n2], float64.

    >>> round(float(limit(4, torch.tensor([[1.0, 0.0]]))), 12)
    0.2825
    """
    kernel = InfiniteKernel(template(x1.double(), depth), kind=kind, w_std=1.0, b_std=beta)
    return kernel(x1.double(), None if x2 is None else x2.double())


def descend(twin: Twin, x: Tensor, y: Tensor, steps: int, watch: Callable[[int, Tensor], Any] | None = None) -> None:
    """Full-batch gradient descent on 1/(2N) sum (f(x_i) - y_i)^2, in place; `watch` sees step and outputs before it."""
    optimizer = twin.sgd(LR)
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
