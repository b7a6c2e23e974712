# ruff: noqa: D101, D102 (a network's class name and its forward say what it is)
"""Model families of today: what `benchmarks.coverage` and `tests/test_families.py` run over.

Depth and topology are those of the real networks, widths are small: the oracle takes one sample and one output at a
time, in float64. A new family is one class (or none) and one line in `FAMILIES`.

Long because of the number of families.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

from ntkit.jacobian.model_calls import call
from ntkit.networks.built_in import build

OWN = "written here"


@dataclass(frozen=True)
class Family:
    """A network and its data.

    ``make()`` and ``data(n)`` draw from the global random state, which `draw` seeds. ``source`` is the library the
    network comes from. ``outputs`` is a mode or, where outputs are wide or no tensor, a callable to one scalar per
    sample. ``share`` of the parameter entries are on the fast path; ``note`` says why where that is not all. ``slow``
    families are left to the script, ``refused`` ones have no kernel.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], Any]
    note: str = ""
    source: str = OWN
    outputs: str | Callable[[Any], Tensor] = "full"
    share: float = 1.0
    slow: bool = False
    refused: bool = False

    def missing(self) -> str | None:
        """Why the family cannot run here; None if it can."""
        return _missing(self.source) if self.source in ("torchvision", "transformers") else None

    def draw(self) -> tuple[nn.Module, Any, Any]:
        """Model in float64 and eval mode, 3 samples, 2 samples: the same every time."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = self.make().double().eval()
            _stir(model, self.data(8))
            return model, self.data(3), self.data(2)


@torch.no_grad()
def _stir(model: nn.Module, x: Any) -> None:
    """Bring every layer to life: behind a dead or tiny branch a wrong gradient would not show.

    Scales and shifts leave 1 and 0, matrices get at least about what `nn.Linear` starts with (some libraries start with
    less, for wide networks, or with 0), batch norms the statistics of a batch.
    """
    for p in model.parameters():
        if p.numel() == max(p.shape, default=1):
            p.add_(0.2 * torch.randn_like(p))
        elif p.std() < (least := 0.5 * p[0].numel() ** -0.5):
            p.normal_(std=least)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.momentum = 1.0
        module.train()
    if norms:
        call(model, x)
    for module in norms:
        module.eval()


@cache
def _missing(library: str) -> str | None:
    try:
        try:
            import_module("torchvision")
        except RuntimeError as error:  # its compiled operators were built for another torch: no model here calls them
            if "nms" not in str(error):
                raise
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            for name in ("nms", "qnms"):
                _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except ImportError:
            if library == "torchvision":
                raise
        import_module(library + ".models")
    except Exception as error:
        return f"{library} cannot be imported ({type(error).__name__}: {error})"
    return None


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


# ---------------------------------------------------------------------- data and scalars of wide outputs


def vectors(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64)


def ids(n: int, length: int, vocabulary: int = 61) -> Tensor:
    return torch.randint(0, vocabulary, (n, length))


def data(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: vectors(n, *shape)


def tokens(length: int = 10) -> Callable[[int], Tensor]:
    return lambda n: ids(n, length)


def masked(n: int) -> dict[str, Tensor]:
    """Token ids and a 2-D mask; every sample has a length of its own."""
    length = torch.arange(n) * 2 + 5
    return {"input_ids": ids(n, 12), "attention_mask": (torch.arange(12) < length[:, None]).long()}


def mean_square(y: Tensor) -> Tensor:
    return y.flatten(1).square().mean(1)


def next_token(y: Any) -> Tensor:
    """Log-probability of token 0 after the last position."""
    logits = y if isinstance(y, Tensor) else y.logits
    return logits[:, -1].log_softmax(-1)[:, 0]


def first_class(y: Any) -> Tensor:
    return y.logits.log_softmax(-1)[:, 0]


# ---------------------------------------------------------------------- building blocks


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def swap() -> nn.Module:
    return Apply(lambda x: x.transpose(1, 2))


def conv_block(channels_in: int, channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a in (channels_in, channels):
        layers += [nn.Conv2d(a, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


# ---------------------------------------------------------------------- convolutional


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 3),
    )  # fmt: skip


class UNet(nn.Module):
    """Three levels, skip connections, transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 32)
        self.down = nn.ModuleList(conv_block(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in (16, 8))
        self.join = nn.ModuleList(conv_block(2 * w, w) for w in (16, 8))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.head(x)


def conv_1d() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((2, 16), (16, 32), (32, 32)):
        layers += [nn.Conv1d(a, b, 5, stride=2, padding=2), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 3))


def conv_3d() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((1, 8), (8, 16)):
        layers += [nn.Conv3d(a, b, 3, padding=1), nn.BatchNorm3d(b), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3))


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates, residual and skip connections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv1d(1, width, 1)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(4))
        self.out = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(4))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        h, skips = self.embed(x), 0
        for gated, out in zip(self.gated, self.out, strict=True):
            a, b = gated(F.pad(h, (gated.dilation[0], 0))).chunk(2, 1)
            residual, skip = out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            h, skips = h + residual, skips + skip
        return self.head(skips)[:, :, -1]


def instance_norm() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((3, 8), (8, 16)):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.InstanceNorm2d(b, affine=True), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 3))


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 12), nn.Linear(12, 256), nn.Unflatten(1, (16, 4, 4)), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1),
    )  # fmt: skip


class Spectral(nn.Module):
    """One Fourier layer: complex weights, kept as real pairs, on the lowest frequencies."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, modes, 2) / width)
        self.skip = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.fft.rfft(x)[..., : self.weight.shape[2]]
        mixed = torch.einsum("bim,iom->bom", kept, torch.view_as_complex(self.weight))
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.skip(x))


def fourier_operator() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 8, 1), *(Spectral(8, 5) for _ in range(3)), nn.Conv1d(8, 1, 1))


# ---------------------------------------------------------------------- attention


def mixer(width: int = 24, patches: int = 16) -> nn.Module:
    def over(axis: int) -> list[nn.Module]:
        return [nn.Linear(axis, 2 * axis), nn.GELU(), nn.Linear(2 * axis, axis)]

    blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=4), nn.Flatten(2), swap()]
    for _ in range(4):
        blocks.append(Residual(nn.LayerNorm(width), swap(), *over(patches), swap()))
        blocks.append(Residual(nn.LayerNorm(width), *over(width)))
    return nn.Sequential(*blocks, nn.LayerNorm(width), Apply(lambda h: h.mean(1)), nn.Linear(width, 3))


class Encoder(nn.Module):
    """Embedded tokens, learned positions, four encoder layers; with `tied`, causal and with the embedding as head."""

    def __init__(self, batch_first: bool = True, tied: bool = False, width: int = 24) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 48, activation="gelu", batch_first=batch_first, norm_first=tied, dropout=0.1
        )
        self.embed, self.position = nn.Embedding(61, width), nn.Embedding(10, width)
        self.layers = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 61 if tied else 3, bias=not tied)
        self.batch_first, self.tied = batch_first, tied
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype) if self.tied else None
        if self.batch_first:
            h = self.layers(h, mask=mask)
        else:
            h = self.layers(h.transpose(0, 1), mask=mask).transpose(0, 1)
        return self.head(h if self.tied else h.mean(1))


class LlamaBlock(nn.Module):
    """Pre-norm block: grouped-query attention with rotary positions, then a gated (SwiGLU) feed-forward."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, 80, bias=False), nn.Linear(width, 80, bias=False)
        self.down = nn.Linear(80, width, bias=False)

    def rotated(self, x: Tensor) -> Tensor:
        rate = 10000 ** -(torch.arange(0, self.size, 2, dtype=x.dtype) / self.size)
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rate
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (t.unflatten(2, (-1, self.size)).transpose(1, 2) for t in (self.q(h), self.k(h), self.v(h)))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (self.rotated(k), v))
        mixed = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def llama_like() -> nn.Module:
    last = Apply(lambda h: h[:, -1])
    return nn.Sequential(
        nn.Embedding(61, 32), *(LlamaBlock() for _ in range(4)), nn.RMSNorm(32), last, nn.Linear(32, 3)
    )


class Perceiver(nn.Module):
    """Learned queries, the same for every sample, read a set through cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 16))
        self.cross = nn.MultiheadAttention(16, 2, kdim=6, vdim=6, batch_first=True)
        self.own = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cross(self.queries.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return self.head(self.own(h).flatten(1))


# ---------------------------------------------------------------------- recurrent


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 12, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(24 if self.rnn.bidirectional else 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class StateSpace(nn.Module):
    """A selective state-space layer (as in Mamba), its recurrence unrolled: h = exp(dt A) h + dt B x, y = C h + D x."""

    def __init__(self, width: int = 12, state: int = 4) -> None:
        super().__init__()
        self.inner, self.state = width, state
        self.inside, self.conv = nn.Linear(5, 2 * width), nn.Conv1d(width, width, 3, groups=width, padding=2)
        self.select, self.step = nn.Linear(width, 2 * state + 1, bias=False), nn.Linear(1, width)
        self.log_a = nn.Parameter(torch.rand(width, state))
        self.d, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inside(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, b, c = self.select(u).split((1, self.state, self.state), -1)
        dt, h, out = F.softplus(self.step(dt)), 0, []
        for t in range(x.shape[1]):
            h = torch.exp(-dt[:, t, :, None] * self.log_a.exp()) * h + (dt * u)[:, t, :, None] * b[:, t, None]
            out.append((h * c[:, t, None]).sum(-1) + self.d * u[:, t])
        return self.head((torch.stack(out, 1) * F.silu(gate)).mean(1))


# ---------------------------------------------------------------------- sets, graphs, fields, pairs


class GraphConvolution(nn.Module):
    """Two layers of h <- relu(A h W) with each sample's own normalised adjacency A."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = torch.relu(adjacency @ self.a(x))
        return self.head(torch.relu(adjacency @ self.b(h)).mean(1))


def graphs(n: int) -> tuple[Tensor, Tensor]:
    edges = (torch.rand(n, 7, 7) < 0.4).double()
    edges = ((edges + edges.transpose(1, 2)) > 0).double().logical_or(torch.eye(7)).double()
    scale = edges.sum(2).rsqrt()
    return vectors(n, 7, 4), scale[:, :, None] * edges * scale[:, None]


class NeRF(nn.Module):
    """Density and colour of the points of a ray, composed along it; a sample is a ray of 6 points and its direction."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3 * 9, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width + 3 * 9, width), nn.ReLU())
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.colour = nn.Sequential(nn.Linear(width + 3, 16), nn.ReLU(), nn.Linear(16, 3), nn.Sigmoid())

    def forward(self, points: Tensor, direction: Tensor) -> Tensor:
        waves = [f(2**k * points) for k in range(4) for f in (torch.sin, torch.cos)]
        code = torch.cat([points, *waves], -1)
        h = self.second(torch.cat([self.first(code), code], -1))
        opacity = 1 - torch.exp(-0.2 * F.softplus(self.density(h)))
        seen = torch.cumprod(torch.cat([torch.ones_like(opacity[:, :1]), 1 - opacity[:, :-1]], 1), 1)
        along = direction[:, None].expand(-1, points.shape[1], -1)
        return (seen * opacity * self.colour(torch.cat([self.feature(h), along], -1))).sum(1)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


def siren() -> nn.Module:
    layers = [layer for a in (2, 32, 32) for layer in (nn.Linear(a, 32), Sine())]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def deep_sets() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), Apply(lambda h: h.sum(1)),
        nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3),
    )  # fmt: skip


class Siamese(nn.Module):
    """One network on both inputs of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv_block(1, 8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 16))
        self.head = nn.Linear(16, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.net(a) - self.net(b)).abs())


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(5, 8), nn.Linear(4, 6), nn.Bilinear(8, 6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.a(x)), torch.tanh(self.b(y)))


class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(61, 16, mode="mean"), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


# ---------------------------------------------------------------------- weights that are computed


def normed(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        wrap(nn.Conv2d(3, 8, 3, stride=2)), nn.LeakyReLU(0.2), wrap(nn.Conv2d(8, 16, 3, stride=2)), nn.LeakyReLU(0.2),
        nn.Flatten(), wrap(nn.Linear(144, 3)),
    )  # fmt: skip


class LoRA(nn.Module):
    """W x + B A x (two more linear layers), or merged, (W + B A) x."""

    def __init__(self, inputs: int, outputs: int, merged: bool, frozen: bool, rank: int = 2) -> None:
        super().__init__()
        self.base, self.merged = nn.Linear(inputs, outputs).requires_grad_(not frozen), merged
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.b.weight @ self.a.weight, self.base.bias)
        return self.base(x) + self.b(self.a(x))


def lora(merged: bool, frozen: bool) -> nn.Module:
    sizes = ((12, 32), (32, 32), (32, 3))
    layers = [layer for a, b in sizes for layer in (LoRA(a, b, merged, frozen), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class HyperNetwork(nn.Module):
    """A network whose weights another network computes from a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 5 * 8 + 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        weight, bias = self.hyper(task).split((40, 8), 1)
        return self.head(torch.tanh(torch.bmm(x[:, None], weight.view(-1, 5, 8))[:, 0] + bias))


class Experts(nn.Module):
    """Token-level mixture of experts: each token goes to the one its router likes best, scaled by the router."""

    def __init__(self, width: int = 16, count: int = 4) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(61, width), nn.Linear(width, count, bias=False)
        expert = partial(nn.Sequential, nn.Linear(width, 32))
        self.experts = nn.ModuleList(expert(nn.GELU(), nn.Linear(32, width)) for _ in range(count))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        flat = h.flatten(0, 1)
        weight, choice = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows = (choice == e).nonzero()[:, 0]
            out = out.index_add(0, rows, weight[rows, None] * expert(flat[rows]))
        return self.head((h + out.view_as(h)).mean(1))


class NeuralODE(nn.Module):
    """dx/dt = f(x, t) from 0 to 1 in four Runge-Kutta steps: the same layers sixteen times."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))
        self.inside, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def slope(self, x: Tensor, t: float) -> Tensor:
        return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], 1))

    def forward(self, x: Tensor) -> Tensor:
        x, step = self.inside(x), 0.25
        for i in range(4):
            t = i * step
            k1 = self.slope(x, t)
            k2 = self.slope(x + step / 2 * k1, t + step / 2)
            k3 = self.slope(x + step / 2 * k2, t + step / 2)
            k4 = self.slope(x + step * k3, t + step)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(x)


class Raw(nn.Module):
    """Parameters outside modules, in functional calls."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "kernel": (6, 2, 3, 3), "shift": (6,), "einsum": (6, 4, 8), "heads": (4, 8, 5), "left": (7, 4),
            "linear": (3, 35), "bias": (3,), "scale": (5,),
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.conv2d(x, self.kernel, self.shift, padding=1)).mean(3)  # [n, 6, 8]
        h = torch.tanh(torch.einsum("nct,chd->nhd", h, self.einsum))  # [n, 4 heads, 8]
        h = torch.bmm(h.transpose(0, 1), self.heads).transpose(0, 1)  # a matrix per head: [n, 4, 5]
        h = torch.matmul(self.left, torch.sin(h) * self.scale)  # [n, 7, 5]
        return F.linear(h.flatten(1), self.linear, self.bias)


def rms_norm() -> nn.Module:
    block = [Residual(nn.RMSNorm(24), nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 24)) for _ in range(3)]
    return nn.Sequential(nn.Linear(12, 24), *block, nn.RMSNorm(24), nn.Linear(24, 3))


class TwoHeads(nn.Module):
    """Output is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


# ---------------------------------------------------------------------- libraries


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(import_module("torchvision.models"), name)(**options)


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(6, 12, 24, 16), num_init_features=16, num_classes=3)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths = (16, 32, 64, 128, None)
    blocks = zip(widths, widths[1:], (3, 3, 9, 3), strict=False)
    return ConvNeXt([CNBlockConfig(*block) for block in blocks], num_classes=3)


class _Float64(TorchFunctionMode):
    """Where a library asks for float32 by name, give it float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: wide.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Wide(nn.Module):
    """A language model whose norms, rotations and routers, float32 in the library, follow a model in float64.

    Rounding to float32 half-way would hide errors below 1e-7.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *x: Tensor, **named: Tensor) -> Any:
        with _Float64() if self.model.dtype == torch.float64 else nullcontext():
            return self.model(*x, **named)


def language(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Make a Hugging Face model from a small configuration, with random weights."""

    def make() -> nn.Module:
        library = import_module("transformers")
        chosen = getattr(library, config)(vocab_size=61, bos_token_id=0, eos_token_id=1, use_cache=False, **options)
        return Wide(getattr(library, model)(chosen))

    return make


GPT2 = {"n_positions": 16, "n_embd": 32, "n_layer": 12, "n_head": 4}
DECODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.15,
}  # fmt: skip
BERT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4,
    "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 6, "num_heads": 4, "decoder_start_token_id": 0}
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 12, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
SWIN = {
    "patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2, 6, 2], "num_heads": [1, 2, 4, 8], "window_size": [4, 4],
}  # fmt: skip

FLOAT64 = "the library's float32 steps in float64"
ROUTED = "rows routed to experts have no owner known beforehand"
TV: dict[str, Any] = {"source": "torchvision"}
HF: dict[str, Any] = {"source": "transformers", "outputs": next_token}

FAMILIES: dict[str, Family] = {
    "MLP": Family(lambda: build("mlp", (64,), 3, 0), data(64), source="ntkit.networks.built_in"),
    "LeNet": Family(lenet, data(1, 28, 28)),
    "VGG": Family(lambda: build("vgg", (3, 32, 32), 3, 0), data(3, 32, 32), source="ntkit.networks.built_in"),
    "ResNet-18": Family(vision("resnet18", num_classes=3), data(3, 32, 32), slow=True, **TV),
    "ResNet-50": Family(vision("resnet50", num_classes=2), data(3, 32, 32), slow=True, **TV),
    "MobileNetV3-small": Family(vision("mobilenet_v3_small", num_classes=3), data(3, 64, 64), slow=True, **TV),
    "DenseNet-121, narrow": Family(densenet, data(3, 32, 32), **TV),
    "EfficientNet-B0": Family(vision("efficientnet_b0", num_classes=3), data(3, 64, 64), slow=True, **TV),
    "ConvNeXt-tiny, narrow": Family(convnext, data(3, 32, 32), **TV),
    "U-Net": Family(UNet, data(3, 16, 16), outputs=mean_square),
    "1-D CNN": Family(conv_1d, data(2, 40)),
    "3-D CNN": Family(conv_3d, data(1, 8, 8, 8)),
    "WaveNet": Family(WaveNet, data(1, 20)),
    "autoencoder": Family(autoencoder, data(1, 16, 16), outputs=mean_square),
    "Fourier neural operator": Family(
        fourier_operator, data(1, 16), "complex products have no rule", outputs=mean_square, share=0.1
    ),
    "MLP-Mixer": Family(mixer, data(3, 16, 16)),
    "ViT": Family(vision("VisionTransformer", num_classes=3, **VIT), data(3, 32, 32), **TV),
    "Swin-tiny, narrow": Family(vision("SwinTransformer", num_classes=3, **SWIN), data(3, 32, 32), **TV),
    "GPT-2": Family(language("GPT2LMHeadModel", "GPT2Config", **GPT2), tokens(), "sdpa attention, tied head", **HF),
    "GPT-2, eager": Family(
        language("GPT2LMHeadModel", "GPT2Config", attn_implementation="eager", **GPT2), tokens(), "tied head", **HF
    ),
    "BERT": Family(
        language("BertForSequenceClassification", "BertConfig", **BERT), masked, "2-D mask", "transformers", first_class
    ),
    "T5": Family(
        language("T5ForConditionalGeneration", "T5Config", **T5),
        lambda n: {"input_ids": ids(n, 10), "decoder_input_ids": ids(n, 6)},
        "one embedding for encoder, decoder and head; " + FLOAT64,
        **HF,
    ),
    "Llama": Family(language("LlamaForCausalLM", "LlamaConfig", **DECODER), tokens(), FLOAT64, **HF),
    "Mixtral": Family(
        language("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, experts_implementation="eager", **DECODER),
        tokens(),
        ROUTED + "; " + FLOAT64,
        share=0.14,
        **HF,
    ),
    "Llama-like blocks": Family(llama_like, tokens()),
    "tied language model": Family(partial(Encoder, tied=True), tokens(), outputs=next_token),
    "Transformer encoder, batch first": Family(Encoder, tokens()),
    "Transformer encoder, sequence first": Family(partial(Encoder, False), tokens()),
    "Perceiver": Family(Perceiver, data(7, 6)),
    "LSTM": Family(partial(Recurrent, nn.LSTM, bidirectional=True), data(8, 5), "two layers, both directions"),
    "GRU": Family(partial(Recurrent, nn.GRU), data(8, 5), "two layers"),
    "state-space model": Family(StateSpace, data(8, 5)),
    "graph convolution": Family(GraphConvolution, graphs),
    "NeRF": Family(NeRF, lambda n: (vectors(n, 6, 3), vectors(n, 3))),
    "SIREN": Family(siren, data(2)),
    "DeepSets": Family(deep_sets, data(9, 4)),
    "Siamese": Family(Siamese, lambda n: (vectors(n, 1, 8, 8), vectors(n, 1, 8, 8))),
    "EmbeddingBag": Family(BagOfWords, tokens()),
    "bilinear": Family(Bilinear, lambda n: (vectors(n, 5), vectors(n, 4))),
    "instance norm": Family(instance_norm, data(3, 16, 16)),
    "RMSNorm": Family(rms_norm, data(12)),
    "weight norm": Family(partial(normed, parametrizations.weight_norm), data(3, 16, 16)),
    "spectral norm": Family(partial(normed, parametrizations.spectral_norm), data(3, 16, 16)),
    "LoRA, base frozen": Family(partial(lora, merged=False, frozen=True), data(12)),
    "LoRA, all trained": Family(partial(lora, merged=False, frozen=False), data(12)),
    "LoRA merged, base frozen": Family(partial(lora, merged=True, frozen=True), data(12)),
    "LoRA merged, all trained": Family(partial(lora, merged=True, frozen=False), data(12)),
    "hypernetwork": Family(HyperNetwork, lambda n: (vectors(n, 5), vectors(n, 4))),
    "mixture of experts": Family(Experts, tokens(), ROUTED, share=0.29),
    "neural ODE": Family(NeuralODE, data(5)),
    "raw parameters": Family(Raw, data(2, 8, 8)),
    "complex output": Family(
        lambda: nn.Sequential(nn.Linear(5, 3), Apply(torch.fft.fft)), data(5), "the door names the dtype", refused=True
    ),
    "tuple output": Family(TwoHeads, data(5), "pass a callable that picks a scalar", refused=True),
}
