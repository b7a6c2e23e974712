"""Two networks that are not in the paper: a residual network and a vision transformer of about 100,000 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.networks.built_in import glorot

WIDTH = 30  # channels before the stride, twice as many behind it
FEATURES, HEADS, BLOCKS = 64, 4, 3  # features per token
PLACE = 0.5  # deviation of the learned places at first


def residual(shape: Sequence[int], outputs: int) -> nn.Module:
    """Convolution, residual block, convolution in strides of two, residual block, mean over places, dense layer."""
    return glorot(Residual(shape, outputs))


def transformer(shape: Sequence[int], outputs: int) -> nn.Module:
    """Patches as tokens, three blocks of self-attention and two dense layers, mean over tokens, dense layer."""
    return glorot(Transformer(shape, outputs))


class Residual(nn.Module):
    """Residual network with ReLU and without normalization."""

    def __init__(self, shape: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape[0], WIDTH, 3, padding=1)
        self.first = _ResidualBlock(WIDTH)
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.second = _ResidualBlock(2 * WIDTH)
        self.last = nn.Linear(2 * WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, outputs] of images [n, channels, h, w]."""
        x = self.first(self.stem(x))
        x = self.second(self.down(F.relu(x)))
        return self.last(F.relu(x).mean((2, 3)))


class _ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.relu(self.inner(F.relu(x))))


class Transformer(nn.Module):
    """Vision transformer: learned places, GELU, LayerNorm before each half of a block. Sides are multiples of four."""

    def __init__(self, shape: Sequence[int], outputs: int) -> None:
        super().__init__()
        side = 2 if min(shape[1:]) < 16 else 4  # of a patch
        self.patches = nn.Conv2d(shape[0], FEATURES, side, stride=side)
        self.places = nn.Parameter(PLACE * torch.randn((shape[1] // side) * (shape[2] // side), FEATURES))
        self.blocks = nn.Sequential(*(_AttentionBlock() for _ in range(BLOCKS)))
        self.norm, self.last = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, outputs] of images [n, channels, h, w]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.last(self.norm(self.blocks(tokens)).mean(1))


class _AttentionBlock(nn.Module):
    """Tokens [n, t, features] plus their attention, plus two dense layers of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixed = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES)
        self.queries, self.keys, self.values = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.second_norm = nn.LayerNorm(FEATURES)
        self.up, self.down = nn.Linear(FEATURES, 2 * FEATURES), nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        queries, keys, values = (
            layer(normed).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.queries, self.keys, self.values)
        )
        x = x + self.mixed(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second_norm(x))))
