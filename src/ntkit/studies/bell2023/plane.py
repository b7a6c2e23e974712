"""Three clusters in the plane, a small MLP: rules of integration against each other, and maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.measures.eigenfunctions import grid
from ntkit.measures.novelty import novelty
from ntkit.studies.bell2023.setting import cross_entropy, errors, sgd, summed_changes
from ntkit.studies.judged import device
from ntkit.studies.parts import Part, Work
from ntkit.trajectory import Trajectory, train

LABELS = {"tanh": "tanh", "relu": "ReLU"}
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
TRAIN, TEST, WIDTH, LR = 30, 20, 32, 0.5
REACH = 3.0  # the maps show [-REACH, REACH]^2
CENTRES = ((0.0, 1.2), (-1.1, -0.7), (1.1, -0.7))
SPREAD = 0.5
LEFT = (1, 10, 100)
MIDPOINT = (1, 2, 5, 10, 20, 50, 100, 200)
GAUSS = (2, 4, 8, 16, 32)
RULES: list[Any] = [*(("left", n) for n in LEFT), *(("midpoint", n) for n in MIDPOINT), *(("gauss", n) for n in GAUSS)]
_AT_ONCE = 64  # nodes


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of three Gaussian clusters in turn, [n, 2], and their labels."""
    y = torch.arange(n) % len(CENTRES)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor(CENTRES, dtype=torch.float64)[y] + SPREAD * noise, y


def mlp(activation: str, seed: int) -> nn.Sequential:
    """2-32-32-3 in float64, PyTorch's own initialisation."""
    act = ACTIVATIONS[activation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(2, WIDTH), act(), nn.Linear(WIDTH, WIDTH), act(), nn.Linear(WIDTH, len(CENTRES))
        ).to(device(), torch.float64)


def trained(work: Work, activation: str, seed: int) -> tuple[nn.Module, Trajectory, Tensor, Tensor]:
    """Network, run and training data."""
    x, y = (t.to(device()) for t in clusters(TRAIN, seed))
    model = mlp(activation, seed)
    run = train(
        model, (x, y), cross_entropy, sgd(LR), work.scale.plane_steps, record="all", seed=seed, resume=True,
        path=work.trajectory(f"plane-{activation}-seed-{seed}"),
    )  # fmt: skip
    return model, run, x, y


def measure(work: Work, activation: str, seed: int) -> Part:
    """Errors of the rebuilt logits of new points, by every rule."""
    return work.kept(
        f"plane-{activation}-seed-{seed}",
        f"the plane, {activation}, seed {seed}",
        lambda: _measure(work, activation, seed),
    )


def _measure(work: Work, activation: str, seed: int) -> Part:
    model, run, _, _ = trained(work, activation, seed)
    x = clusters(TEST, 1000 + seed)[0].to(device())
    found: dict[str, Any] = {}
    exact = PathKernel(run).decompose(x)
    prediction = exact.prediction
    found["secant"] = errors(prediction + exact.residual, prediction)
    for integration in ("left", "ntk"):
        other = PathKernel(run, integration=integration).decompose(x)
        found[integration] = errors(prediction + other.residual, prediction)
    changes = summed_changes(model, run, x, RULES, _AT_ONCE)
    apart = 0.0
    for rule, nodes in RULES:
        rebuilt = exact.initial + changes[rule, nodes].cpu()
        found[f"{rule} {nodes}"] = errors(rebuilt, prediction)
        if rule != "left" and nodes <= work.scale.direct:  # the sum of contributions themselves
            own = PathKernel(run, integration="quadrature", rule=rule, nodes=nodes).decompose(x)
            apart = max(apart, errors(rebuilt, prediction + own.residual)["relative"])
            found[f"{rule} {nodes}"] = errors(prediction + own.residual, prediction)
    numbers = {
        "activation": activation,
        "seed": seed,
        "errors": found,
        "apart": apart,
        "largest_output": float(prediction.abs().max()),
        "loss": float(run.losses[-1]),
    }
    return Part(numbers, {})


def maps(work: Work, activation: str, seed: int) -> Part:
    """The plane as the network, the kernel machine, frozen gradients and the posterior see it."""
    return work.kept(f"maps-{activation}-seed-{seed}", "maps of the plane", lambda: _maps(work, activation, seed))


def _maps(work: Work, activation: str, seed: int) -> Part:
    _, run, x, y = trained(work, activation, seed)
    points = grid(work.scale.side, -REACH, REACH).to(device())
    exact = PathKernel(run).decompose(points)
    frozen = PathKernel(run, integration="ntk").decompose(points)
    kernel = PathKernel(run, outputs="trace")
    seen = novelty(kernel, x, points)
    values = torch.linalg.eigvalsh(kernel(x))
    rebuilt = exact.prediction + exact.residual
    regions = {"network": exact.prediction, "kernel": rebuilt, "ntk": frozen.prediction + frozen.residual}
    shape = (work.scale.side, work.scale.side)
    arrays = {name: logits.argmax(1).reshape(shape).numpy().astype(np.uint8) for name, logits in regions.items()}
    arrays |= {
        "deviation": seen.deviation.reshape(shape).cpu().numpy(),
        "norm": seen.norm.reshape(shape).cpu().numpy(),
        "outside": seen.outside.reshape(shape).cpu().numpy(),
        "points": x.cpu().numpy(),
        "labels": y.cpu().numpy(),
        # the first example of each class, on its own class's output
        "contributions": torch.stack([exact.contributions[:, c, c] for c in range(len(CENTRES))])
        .reshape(len(CENTRES), *shape)
        .numpy(),
    }
    distance = torch.cdist(points, x).min(1).values
    numbers = {
        "agree": float((arrays["network"] == arrays["kernel"]).mean()),
        "agree_ntk": float((arrays["network"] == arrays["ntk"]).mean()),
        "errors": errors(rebuilt, exact.prediction),
        "rank_correlation": _rank_correlation(seen.deviation, distance),
        "deviation_near": float(seen.deviation[distance < SPREAD].mean()),
        "deviation_far": float(seen.deviation[distance > 3 * SPREAD].mean()),
        "least_eigenvalue": float(values[0] / values[-1]),
        "residual": seen.residual,
        "floor": seen.floor,
        "rank": seen.rank,
    }
    return Part(numbers, arrays)


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, for values without ties."""
    ranks = [value.argsort().argsort().double() for value in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
