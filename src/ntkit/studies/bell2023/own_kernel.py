"""The representation's own kernel: which one it is, when it is a kernel, and what its posterior knows.

In the theorem the gradients of a training point are those at the start of each step, the gradients of a new point those
along it. With features that differ in this way the values of one step are inner products:

    k_s(z, z') = int_0^1 <phi_s,t(z), phi_s,t(z')> dt,    phi_s,t(z) = J(theta_s; z)               z a training point
                                                                       J(theta_s + t u_s; z)       any other point

The mean over steps of k_s, summed over outputs, is the scalar kernel whose posterior is taken here.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ntkit.measures.novelty import RIDGE
from ntkit.studies.bell2023.bell_setting import between, gradients, nodes_of, slopes, states
from ntkit.trajectory import Trajectory


class Own(NamedTuple):
    """Values of the kernel, mean over steps and sum over outputs, and what they rebuild."""

    train: Tensor  # [n, n]
    cross: Tensor  # [m, n]: the values that the representation itself adds up
    own: Tensor  # [m]: of each new point with itself
    rebuilt: Tensor  # [m, C]: initial outputs plus values times slopes, over the steps that were taken


def own_kernel(
    model: nn.Module,
    run: Trajectory,
    data: tuple[Tensor, Tensor],
    lr: float,
    x: Tensor,
    nodes: int,
    every: int = 1,
) -> Own:
    """Training points at the start of each step, new points `x` along it by so many midpoints.

    The mean is over every step, or over each `every`-th. The run is full-batch gradient descent on the mean
    cross-entropy of `data`, every step recorded.
    """
    steps, total = len(range(0, run.steps[-1], every)), [torch.zeros((), dtype=x.dtype, device=x.device)] * 4
    for before, after in islice(states(run, model, x), 0, None, every):
        start = gradients(model, before, data[0])
        flat = start.flatten(1)
        mean, squares = _along(model, before, after, x, nodes)
        pull = -lr * torch.einsum("icp,ic->p", start, slopes(model, before, *data))
        added = (flat @ flat.T / steps, mean.flatten(1) @ flat.T / steps, squares / steps, mean @ pull)
        total = [sum_ + value for sum_, value in zip(total, added, strict=True)]
    with torch.no_grad():
        first = {name: value.to(x.device) for name, value in run.state(0).items()}
        initial = functional_call(model, first, (x,))
    return Own(total[0], total[1], total[2], initial + total[3])


def _along(
    model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor, nodes: int
) -> tuple[Tensor, Tensor]:
    """Mean gradients along a step [m, C, P], and mean squared norm of them [m]."""
    mean: Any = 0.0
    squares: Any = 0.0
    for t, weight in zip(*nodes_of("midpoint", nodes), strict=True):
        here = gradients(model, between(before, after, float(t)), x)
        mean, squares = mean + float(weight) * here, squares + float(weight) * here.square().sum((1, 2))
    return mean, squares


def posterior(values: Own) -> tuple[Tensor, Tensor]:
    """Posterior deviation of new points, and the share of their gradients outside the training points' span: [m] each.

    The Gaussian process with this kernel, with a ridge as `ntkit.novelty` adds it.
    """
    pairs, vectors = torch.linalg.eigh(values.train)
    noise = len(pairs) * torch.finfo(pairs.dtype).eps * pairs[-1]
    squares = (values.cross @ vectors) ** 2
    inverse = torch.where(pairs > noise, 1 / pairs, 0.0)
    ridged = 1 / (pairs.clamp(min=0) + RIDGE * values.train.diagonal().mean())
    deviation = (values.own - squares @ ridged).clamp(min=0).sqrt()
    return deviation, (1 - squares @ inverse / values.own).clamp(0, 1).sqrt()


class Definiteness(NamedTuple):
    """Of the kernels on training and new points together; each number relative to the size of its matrix."""

    least: float  # smallest eigenvalue of any step's kernel over rounding: matrix size x 2^-52 x largest eigenvalue
    mean_least: float  # the same of the mean over steps
    both_roles: float  # asymmetry if every point is averaged on the left and at the start on the right
    jump: float  # change of the values between training points when one side counts as new
    single: float  # asymmetry of the form with one kernel, sum over steps of values times slope ratios
    single_least: float  # smallest eigenvalue of its symmetric part over the largest
    error: float  # of the outputs rebuilt by the kernels, relative to the largest output
    single_error: float  # of the outputs rebuilt by the one kernel


def definiteness(
    model: nn.Module, run: Trajectory, data: tuple[Tensor, Tensor], lr: float, x: Tensor, rule: str, nodes: int
) -> Definiteness:
    """Symmetry and eigenvalues, all pairs of outputs: matrices of (n + m) C rows."""
    everything, n = torch.cat([data[0], x]), len(data[0])
    least, asymmetries, jumps, whole, used, pulls = [], [], [], [], [], []
    for before, after in states(run, model, x):
        start = gradients(model, before, everything)
        mean: Any = 0.0
        square: Any = 0.0
        for t, weight in zip(*nodes_of(rule, nodes), strict=True):
            here = gradients(model, between(before, after, float(t)), everything)
            new = here[n:].flatten(0, 1)
            mean, square = mean + float(weight) * here, square + float(weight) * new @ new.T
        a, b, along = start[:n].flatten(0, 1), mean[n:].flatten(0, 1), mean.flatten(0, 1)
        whole.append(torch.cat([torch.cat([a @ a.T, a @ b.T], 1), torch.cat([b @ a.T, square], 1)]))
        least.append(_least(whole[-1]))
        asymmetries.append(_asymmetry(along @ start.flatten(0, 1).T))
        jumps.append(float((along[: len(a)] @ a.T - a @ a.T).norm() / (a @ a.T).norm()))
        used.append(torch.cat([a @ a.T, b @ a.T]))
        pulls.append(-lr * slopes(model, before, *data).flatten())
    rows = len(pulls[0])
    one = torch.stack([values * (pull / pulls[0]) for values, pull in zip(used, pulls, strict=True)]).sum(0)
    symmetric = torch.linalg.eigvalsh((one[:rows] + one[:rows].T) / 2)
    changes = [values[rows:] @ pull for values, pull in zip(used, pulls, strict=True)]
    with torch.no_grad():
        first, last = (
            functional_call(model, {name: v.to(x.device) for name, v in run.state(step).items()}, (x,))
            for step in (0, run.steps[-1])
        )
    rebuilt = first.flatten() + torch.stack(changes).sum(0), first.flatten() + one[rows:] @ pulls[0]
    missed = [float((r - last.flatten()).abs().max() / last.abs().max()) for r in rebuilt]
    return Definiteness(
        min(least),
        _least(torch.stack(whole).mean(0)),
        float(np.mean(asymmetries)),
        float(np.mean(jumps)),
        _asymmetry(one[:rows]),
        float(symmetric[0] / symmetric[-1]),
        *missed,
    )


def _least(kernel: Tensor) -> float:
    """Smallest eigenvalue of a matrix that should be symmetric, over the rounding of its eigenvalues."""
    values = torch.linalg.eigvalsh(kernel)
    return float(values[0] / (len(values) * torch.finfo(kernel.dtype).eps * values[-1]))


def _asymmetry(kernel: Tensor) -> float:
    return float((kernel - kernel.T).norm() / kernel.norm())


def ranks(values: Tensor) -> Tensor:
    """Ranks of values without ties, from 0."""
    return values.argsort().argsort().double()


def rank_correlations(score: Tensor, distance: Tensor, error: Tensor) -> dict[str, float]:
    """Rank correlations of a score and of a distance with an error, and the score's once the distance is known.

    Returns
    -------
    dict
        "score", "distance": with the error; "both": of score and distance; "beyond": partial correlation of score and
        error, given the distance.
    """
    c = torch.corrcoef(torch.stack([ranks(v.double().cpu()) for v in (score, distance, error)]))
    both, own, other = float(c[0, 1]), float(c[0, 2]), float(c[1, 2])
    beyond = (own - both * other) / ((1 - both**2) * (1 - other**2)) ** 0.5
    return {"score": own, "distance": other, "both": both, "beyond": beyond}
