"""Networks of `benchmarks.infinite` and `benchmarks.widths` beside plain stacks of layers, as PyTorch modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """A skip beside a pool, a convolution and a transposed one, joined along channels."""

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.joined = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU())
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, 1] of images."""
        skip = self.first(x)
        h = self.joined(torch.cat([skip, self.up(self.down(skip))], dim=1))
        return self.last(h.mean((2, 3)))


class Attention(nn.Module):
    """One layer of self-attention as neural-tangents has it: keys are the queries, scores are divided by their size."""

    def __init__(self, channels: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.last = nn.Linear(channels, width), nn.Linear(width, 1)
        self.key, self.value = (nn.Linear(width, heads * width, bias=False) for _ in range(2))
        self.out = nn.Linear(heads * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, 1] of sequences [n, positions, channels]."""
        h = self.first(x).relu()
        k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.key, self.value))
        weights = (k @ k.transpose(2, 3) / k.shape[3]).softmax(3)
        return self.last(self.out((weights @ v).transpose(1, 2).flatten(2)).mean(1))


def transposed(channels: int, width: int = 8) -> nn.Module:
    """Two transposed convolutions, each of which doubles height and width."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1),
    )  # fmt: skip


def stack(channels: int, depth: int, images: bool, activation: str, width: int = 8) -> nn.Module:
    """Dense layers, or 3 x 3 convolutions with a global pool, each with an activation; a dense layer."""
    layers: list[nn.Module] = []
    for i in range(depth):
        inputs = channels if i == 0 else width
        layers.append(nn.Conv2d(inputs, width, 3, padding=1) if images else nn.Linear(inputs, width))
        layers.append(nn.Tanh() if activation == "tanh" else nn.ReLU())
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if images else []
    return nn.Sequential(*layers, *end, nn.Linear(width, 1))
