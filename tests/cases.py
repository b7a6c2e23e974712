"""One grid of small networks, each with two sets of coprime sizes: what every kernel test runs over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N1, N2 = 7, 4


def images(n: int, channels: int = 2, size: int = 6) -> Tensor:
    return torch.randn(n, channels, size, size, dtype=torch.float64)


def vectors(n: int, d: int = 5) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def tokens(n: int, length: int = 4) -> Tensor:
    return torch.randint(0, 9, (n, length))


class TiedLM(nn.Module):
    """Embedding, LayerNorm, and the embedding's weight again as output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.embed(x))).mean(1))


class Reused(nn.Module):
    """One layer three times, once through its transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return self.out(h @ self.layer.weight)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) * self.net(x.flip(-1))).sum(1)


class Attention(nn.Module):
    """A class token, position embeddings and packed self-attention; sequence-major inside."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        h = self.norm(h)
        if not self.batch_first:
            h = h.transpose(0, 1)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h[:, 0] if self.batch_first else h[0])


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], batch_first: bool = True) -> None:
        super().__init__()
        self.rnn, self.head, self.batch_first = kind(5, 4, batch_first=batch_first), nn.Linear(4, 2), batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(x if self.batch_first else x.transpose(0, 1))[0]
        return self.head(h[:, -1] if self.batch_first else h[-1])


class Raw(nn.Module):
    """Parameters outside modules: products, quotients, a weight on the left, a bias at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.left = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 4))
        self.scale, self.top, self.shift = (nn.Parameter(torch.rand(s) + 0.5) for s in ((4,), (1,), (3,)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x @ self.w) * self.scale
        return self.top / (1 + (self.left @ h.T).T.square()) - self.shift


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.PReLU(4),
            nn.Conv2d(4, 4, 3),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.Conv2d(4, 4, 1),
            nn.InstanceNorm2d(4, affine=True),
            nn.Flatten(),
            nn.RMSNorm(64),
            nn.LayerNorm(64),
            nn.Linear(64, 2),
        )
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class FramesConv(nn.Module):
    """Each sample holds several images: the convolution's batch axis is samples x frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x.flatten(0, 1))).mean((2, 3))
        return self.head(h.unflatten(0, (len(x), 3)).sum(1))


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Experts(nn.Module):
    """Each sample goes to the expert its first entry chooses: rows do not grow with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        choice = (x[:, 0] > 0).long()
        for e, expert in enumerate(self.experts):
            rows = choice == e
            if rows.any():
                out = out.index_put((rows.nonzero().flatten(),), expert(x[rows]))
        return out


class Unruled(nn.Module):
    """One parameter taken in by an operation that has no rule, between two layers that have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(5, 6), nn.Linear(6, 2), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.lerp(h, torch.sin(h), self.mix))


class Positions(nn.Module):
    """Embeddings of positions, cross-attention with its packed projection cut in parts, and a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 6), nn.Embedding(7, 6)
        self.attention, self.bias = nn.MultiheadAttention(6, 3, batch_first=True), nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        h = h + self.attention(h, torch.tanh(h), h * h, need_weights=False)[0]
        return F.linear(h[:, -1], self.tokens.weight, self.bias)


class Adapted(nn.Module):
    """Low-rank adapters merged into the weight, a spectral norm, a bilinear layer and a bag of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(s)) for s in ((4, 5), (2, 5), (4, 2)))
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.pair, self.bag = nn.Bilinear(4, 3, 2), nn.EmbeddingBag(9, 3, mode="mean", padding_idx=0)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.w + 0.5 * self.b @ self.a))
        return self.pair(torch.sin(self.normed(h)), self.bag(ids))


class Contracted(nn.Module):
    """Parameters in einsum, batched products, vectors, powers, choices and instance norms."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.mix = nn.Parameter(torch.randn(2, 5, 3)), nn.Parameter(torch.randn(4, 4))
        self.v, self.power, self.floor = (nn.Parameter(torch.rand(s) + 0.5) for s in ((3,), (3,), (1,)))
        self.norm = nn.InstanceNorm1d(2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bti,hio->bhto", x, self.heads)
        h = torch.einsum("st,bhto->bhso", self.mix, h).abs() + 0.1
        h = self.norm((h**self.power).flatten(2))
        h = torch.where(h > 0, h, self.floor).unflatten(2, (4, 3))
        return (h @ self.v).flatten(1)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.b(checkpoint(lambda t: torch.tanh(self.a(t)), x, use_reentrant=False))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.embed = nn.Linear(5, 4), nn.Linear(4, 1), nn.Embedding(9, 4, padding_idx=0)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) + self.embed(ids).sum(1)).squeeze(1)


def _cnn(*layers: nn.Module, features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(features, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], object]]] = {
    "linear": (lambda: nn.Linear(5, 3), vectors),
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), vectors),
    "one output": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)), vectors),
    "no bias": (lambda: nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)), vectors),
    "conv": (lambda: _cnn(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), features=36)(), images),
    "conv strided dilated": (lambda: _cnn(nn.Conv2d(2, 4, 2, stride=2, dilation=2, padding=1), features=36)(), images),
    "conv grouped": (lambda: _cnn(nn.Conv2d(2, 4, 3, groups=2), features=64)(), images),
    "conv depthwise": (
        lambda: _cnn(nn.Conv2d(2, 2, 3, groups=2, padding="same", padding_mode="reflect"), features=72)(),
        images,
    ),
    "conv transposed": (lambda: _cnn(nn.ConvTranspose2d(2, 3, 2, stride=2), features=432)(), images),
    "conv 1d": (
        lambda: _cnn(nn.Conv1d(3, 4, 3, stride=2, padding=2), features=16)(),
        lambda n: torch.randn(n, 3, 5).double(),
    ),
    "conv 3d": (
        lambda: _cnn(nn.Conv3d(1, 2, 2, dilation=2), features=16)(),
        lambda n: torch.randn(n, 1, 4, 4, 4).double(),
    ),
    "frames": (FramesConv, lambda n: torch.randn(n, 3, 2, 5, 5).double()),
    "channels last": (
        lambda: _cnn(nn.Conv2d(2, 4, 3), features=64)(),
        lambda n: images(n).to(memory_format=torch.channels_last),
    ),
    "norms": (Norms, images),
    "tied": (TiedLM, tokens),
    "reused": (Reused, vectors),
    "siamese": (Siamese, images),
    "attention, batch first": (lambda: Attention(True), tokens),
    "attention, sequence first": (lambda: Attention(False), tokens),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(18, 2)),
        lambda n: torch.randn(n, 3, 6).double(),
    ),
    "tokens through linear": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2), nn.Flatten()),
        lambda n: torch.randn(n, 3, 5).double(),
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda n: torch.randn(n, 3, 5).double()),
    "gru, sequence first": (lambda: Recurrent(nn.GRU, False), lambda n: torch.randn(n, 3, 5).double()),
    "raw parameters": (Raw, vectors),
    "weight norm": (WeightNormed, vectors),
    "experts": (Experts, vectors),
    "no rule": (Unruled, vectors),
    "positions": (Positions, tokens),
    "adapters": (Adapted, lambda n: (vectors(n), tokens(n))),
    "contractions": (Contracted, lambda n: torch.randn(n, 4, 5).double()),
    "conv transposed grouped": (
        lambda: _cnn(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), features=784
        )(),
        images,
    ),
    "checkpointed": (Checkpointed, vectors),
    "two inputs": (TwoInputs, lambda n: (vectors(n), tokens(n))),
    "dict input": (TwoInputs, lambda n: {"x": vectors(n), "ids": tokens(n)}),
}


def make(name: str) -> tuple[nn.Module, object, object]:
    """Model in float64 and eval mode, x1, x2: the same every time."""
    factory, data = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory().double().eval(), data(N1), data(N2)


def tiny_mlp(inputs: int = 5, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def softplus_sum(y: Tensor) -> Tensor:
    return F.softplus(y.reshape(len(y), -1)).sum(1)
