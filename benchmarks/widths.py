"""How finite networks tend to the limit, for every kind of layer it knows: ``python -m benchmarks.widths [NAME ...]``.

Root mean square over 40 random networks of |K_n - K| / |K|, on 5 inputs, in the NTK parametrization; its slope against
the width in logarithms (-1/2 expected) with its standard error; and whether the mean kernel of the widest lies within
Monte-Carlo error of the limit. What `ntkit.convergence` does not widen is enlarged by one factor instead; where there
is no limit in closed form, the mean over networks twice as wide as the widest stands for it. Networks named on the
command line are merged into the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ntkit
from benchmarks.common import RESULTS, save
from benchmarks.peers import limit_networks
from ntkit.kernels.infinite.sampled import WeightedKernel
from ntkit.measures.convergence import fitted_slope
from ntkit.networks.larger_copies import larger_copy

WIDTHS = {"dense": (64, 128, 256, 512, 1024), "images": (32, 64, 128, 256, 512)}
FACTORS = (4, 8, 16, 32, 64)  # of the width 8
SEEDS = 40
W_STD, B_STD = 1.4, 0.2


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.branch(x)


def dense(activation: type[nn.Module], norm: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    """Three weight layers."""
    layers = [nn.Linear(6, 8), norm(), activation(), nn.Linear(8, 8), norm(), activation()]
    return nn.Sequential(*layers, nn.Linear(8, 1))


def image(*middle: nn.Module, features: int = 8, end: tuple[nn.Module, ...] = ()) -> nn.Module:
    """A convolution, what is tested, and a dense layer."""
    end = end or (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), *middle, *end, nn.Linear(features, 1))


def conv(**more: Any) -> nn.Module:
    """A 3 x 3 convolution of hidden channels."""
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **more})


NETWORKS = {
    "dense, ReLU": dense(nn.ReLU),
    "dense, GELU": dense(nn.GELU),
    "dense, tanh": dense(nn.Tanh),
    "dense, ELU": dense(nn.ELU),
    "LayerNorm": dense(nn.ReLU, lambda: nn.LayerNorm(8)),
    "residual": nn.Sequential(nn.Linear(6, 8), Residual(nn.ReLU(), nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 1)),
    "convolution, flattened": image(conv(), nn.ReLU(), features=200, end=(nn.Flatten(),)),
    "convolution, global pool": image(conv(), nn.ReLU()),
    "stride and dilation": image(conv(stride=2), nn.ReLU(), conv(dilation=2, padding=2), nn.ReLU()),
    "average pool": image(conv(), nn.ReLU(), nn.AvgPool2d(2), conv(), nn.ReLU()),
    "GroupNorm": image(conv(), nn.GroupNorm(1, 8), nn.ReLU()),
    "residual convolution": image(conv(), Residual(nn.ReLU(), conv()), nn.ReLU()),
    "1-D": nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1)),  # noqa: E501
}  # fmt: skip
SHAPES = {"1-D": (2, 9)} | {name: (6,) for name in NETWORKS if not any(isinstance(m, (nn.Conv1d, nn.Conv2d)) for m in NETWORKS[name].modules())}  # noqa: E501  # fmt: skip


ENLARGED = {
    "transposed convolutions": (limit_networks.transposed(2), (2, 2, 2)),
    "like a U-Net": (limit_networks.UNet(2), (2, 4, 4)),
    "gates": (nn.Sequential(nn.Linear(6, 16), nn.GLU(1), nn.Linear(8, 16), nn.GLU(1), nn.Linear(8, 1)), (6,)),
    "attention": (limit_networks.Attention(3, width=8), (5, 3)),
}


def main(names: Sequence[str] = ()) -> None:
    """Every network, or those named."""
    file = RESULTS / "widths.json"
    known = {row["network"]: row for row in json.loads(file.read_text())["rows"]} if names and file.exists() else {}
    for name in names or (*NETWORKS, *ENLARGED):
        if name in NETWORKS:
            x = samples(SHAPES.get(name, (2, 5, 5)))
            widths = WIDTHS["dense" if SHAPES.get(name) == (6,) else "images"]
            known[name] = {"network": name, **widened(NETWORKS[name].double(), x, widths)}
        else:
            network, shape = ENLARGED[name]
            known[name] = {"network": name, **enlarged(network.double(), samples(shape))}
        print(known[name], flush=True)
        save("widths", [known[n] for n in (*NETWORKS, *ENLARGED) if n in known], networks_of_each_width=SEEDS)


def samples(shape: tuple[int, ...]) -> Tensor:
    """Five of them."""
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).double()


def widened(network: nn.Module, x: Tensor, widths: tuple[int, ...]) -> dict[str, Any]:
    """Hidden layers of each width."""
    model = ntkit.to_ntk_parametrization(network, w_std=W_STD, b_std=B_STD)
    try:
        found = ntkit.convergence(model, x, widths=widths, seeds=SEEDS)
    except ntkit.Refused as refused:
        return {"refused": str(refused)}
    return {
        "widths": list(widths), "slope": found.slope, "slope_error": found.slope_error, "agrees": found.agrees,
        "distance": found.distance.tolist(), "distance_of_the_mean": found.mean_distance.tolist(),
        "Monte Carlo error of the mean": found.mean_error.tolist(),
    }  # fmt: skip


def enlarged(network: nn.Module, x: Tensor, factors: tuple[int, ...] = FACTORS) -> dict[str, Any]:
    """Hidden widths times each factor."""
    limit, error = limit_of(network, x, 2 * factors[-1])
    found = [kernels(network, x, factor, place) for place, factor in enumerate(factors)]
    away = torch.stack([(k - limit).flatten(1).norm(dim=1) / limit.norm() for k in found])
    distance = away.square().mean(1).sqrt()
    distance_error = away.square().std(1) / SEEDS**0.5 / (2 * distance)
    slope, slope_error = fitted_slope(factors, distance.tolist(), distance_error.tolist())
    mean_distance = torch.stack([(k.mean(0) - limit).norm() / limit.norm() for k in found])
    errors = torch.stack([(k.var(0) / SEEDS + error.square()).sum().sqrt() / limit.norm() for k in found])
    return {
        "widths": [8 * factor for factor in factors], "slope": slope, "slope_error": slope_error,
        "agrees": bool(mean_distance[-1] <= 3 * errors[-1]), "distance": distance.tolist(),
        "distance_of_the_mean": mean_distance.tolist(), "Monte Carlo error of the mean": errors.tolist(),
        "limit": "mean of networks twice as wide" if bool(error.any()) else "closed form",
    }  # fmt: skip


def limit_of(network: nn.Module, x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The limit in closed form, or the mean of networks of this factor; its standard error."""
    try:
        limit = ntkit.InfiniteKernel(network, "ntk", W_STD, B_STD)(x)
    except ntkit.Refused:
        found = kernels(network, x, factor, len(FACTORS))
        return found.mean(0), found.std(0) / SEEDS**0.5
    return limit, torch.zeros_like(limit)


def kernels(network: nn.Module, x: Tensor, factor: int, place: int) -> Tensor:
    """Tangent kernels of random networks enlarged by a factor, [seeds, n, n]; each place has seeds of its own."""
    larger = larger_copy(network, factor, x[:3], (W_STD, B_STD))
    kernel, found = WeightedKernel(larger, "ntk", x[:3]), []
    for seed in range(SEEDS):
        larger.draw(100_000 * place + seed)
        found.append(kernel.gram(x, None))
    return torch.stack(found)


if __name__ == "__main__":
    main(sys.argv[1:])
