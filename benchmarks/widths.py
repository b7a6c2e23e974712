"""How finite networks tend to the limit, for every kind of layer it knows: ``python -m benchmarks.widths``.

Root mean square over 40 random networks of |K_n - K| / |K|, on 5 inputs, in the NTK parametrization; its slope against
the width in logarithms (-1/2 expected) with its standard error; and whether the mean kernel of the widest lies within
Monte-Carlo error of the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ntkit
from benchmarks.common import save, words

WIDTHS = {"dense": (64, 128, 256, 512, 1024), "images": (32, 64, 128, 256, 512)}
SEEDS = 40


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


def main() -> None:
    """Every network, both kernels."""
    rows: list[dict[str, Any]] = []
    for name, network in NETWORKS.items():
        widths = WIDTHS["dense" if SHAPES.get(name) == (6,) else "images"]
        x = torch.randn(5, *SHAPES.get(name, (2, 5, 5)), generator=torch.Generator().manual_seed(0)).double()
        model = ntkit.to_ntk_parametrization(network.double(), w_std=1.4, b_std=0.2)
        try:
            found = ntkit.convergence(model, x, widths=widths, seeds=SEEDS)
        except ntkit.Refused as refused:
            rows.append({"network": name, "refused": str(refused)})
            print(rows[-1], flush=True)
            continue
        rows.append({
            "network": name, "widths": list(widths), "slope": found.slope, "slope_error": found.slope_error,
            "agrees": found.agrees,
            "distance": found.distance.tolist(), "distance_of_the_mean": found.mean_distance.tolist(),
            "Monte Carlo error of the mean": found.mean_error.tolist(),
        })  # fmt: skip
        print(rows[-1], flush=True)
    save("widths", rows, networks_of_each_width=SEEDS)


if __name__ == "__main__":
    words(__doc__)
    main()
