# ruff: noqa: D101, D102 (a network's class name and its forward say what it is)
"""What the engine benchmark measures: networks, data and sizes, the same for ntkit and for every peer.

Needs torch alone, so that a peer's environment without ntkit can load the networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Workload:
    """A kernel to compute: of ``make()`` on samples of `shape`, k(x1, x2) with n1 x n2 samples, or k(x1) if n2 is 0.

    ``vocabulary``: samples are that many tokens' indices instead of normal draws. ``outputs`` is ntkit's mode.
    ``family`` names the definition in `benchmarks.peers.neural_tangents`. ``note`` goes into the table.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n1: int
    n2: int
    outputs: str = "full"
    vocabulary: int = 0
    note: str = ""

    @property
    def symmetric(self) -> bool:
        """Whether k(x1) is asked for."""
        return self.n2 == 0

    def draw(self, n: int, seed: int) -> Tensor:
        """Give n samples."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randint(0, self.vocabulary, (n, *self.shape), generator=generator)
        return torch.randn(n, *self.shape, generator=generator)

    def model(self) -> nn.Module:
        """Give the network, in eval mode, with the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, outputs))


def tutorial_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 26 * 26, 10))


def vgg(outputs: int) -> nn.Module:
    from ntkit.networks.built_in import build

    return build("vgg", (1, 28, 28), outputs, 0)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.short = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.short(x))


class ResNet18(nn.Module):
    """For 3 x 32 x 32 images: 3 x 3 stem, no max-pool."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        sizes += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.ModuleList(BasicBlock(*size) for size in sizes)
        self.head = nn.Linear(512, outputs)
        # running statistics as of a trained network, not the identity
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((2, 3)))


class Block(nn.Module):
    """Transformer block, norm first. ``causal``: a position sees the earlier ones only."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # softmax written out: the fused attention has no forward-mode derivative, which one of the peers needs
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -1e9)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ViTTiny(nn.Module):
    """32 x 32 images in patches of 4 x 4: 64 tokens and a class token."""

    def __init__(self, outputs: int = 10, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class GPT2(nn.Module):
    """Two layers of GPT-2 with the head tied to the embedding; output: mean log-likelihood of the next tokens."""

    def __init__(self, vocabulary: int = 50257, width: int = 768, depth: int = 2, heads: int = 12) -> None:
        super().__init__()
        self.tokens, self.position = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        likely = self.head(self.norm(h))[:, :-1].log_softmax(-1)
        return likely.gather(2, x[:, 1:, None]).mean((1, 2))[:, None]


_MLP10 = partial(mlp, 10)
_IMAGE, _DIGIT = (3, 32, 32), (1, 28, 28)

WORKLOADS = (
    Workload("mlp-1-64", "sequential", partial(mlp, 1), (784,), 64, 64),
    Workload("mlp-10-64", "sequential", _MLP10, (784,), 64, 64),
    Workload("mlp-1-1000", "sequential", partial(mlp, 1), (784,), 1000, 1000),
    Workload("mlp-10-1000", "sequential", _MLP10, (784,), 1000, 1000),
    Workload("mlp-1-4000", "sequential", partial(mlp, 1), (784,), 4000, 4000),
    Workload("mlp-10-4000", "sequential", _MLP10, (784,), 4000, 4000, "trace", note="all outputs would be 6.4 GB"),
    Workload("cnn-10-20", "sequential", tutorial_cnn, _IMAGE, 20, 5),
    Workload("vgg-1-100", "sequential", partial(vgg, 1), _DIGIT, 100, 100),
    Workload("vgg-10-100", "sequential", partial(vgg, 10), _DIGIT, 100, 100),
    Workload("vgg-1-1000", "sequential", partial(vgg, 1), _DIGIT, 1000, 1000),
    Workload("vgg-10-1000", "sequential", partial(vgg, 10), _DIGIT, 1000, 1000, "trace"),
    Workload("resnet18-10-32", "resnet18", ResNet18, _IMAGE, 32, 0),
    Workload("vit-10-32", "vit", ViTTiny, _IMAGE, 32, 0),
    Workload("gpt2-1-16", "gpt2", GPT2, (64,), 16, 0, vocabulary=50257),
)
