"""Networks, optimizers and trained runs, for the tests of the path kernel."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import ntkit


class Attention(nn.Module):
    """Embedding, attention with a causal mask, layer norm, GELU, head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.qkv, self.mix = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        h = self.embed(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + F.gelu(self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return (h @ self.embed.weight.T).mean(1)[:, :3]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Gated(nn.Module):
    """RMS norm, SiLU gate, residual sum, a raw parameter."""

    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(6)), nn.RMSNorm(6)
        self.up, self.gate, self.down, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        h = self.norm(x * self.scale)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))[:, :3]


class Sets(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi, self.rho = nn.Sequential(nn.Linear(4, 6), nn.Softplus()), nn.Linear(12, 3)

    def forward(self, x):
        h = self.phi(x)
        return self.rho(torch.cat([h.sum(1), h.amax(1)], 1)).log_softmax(1)


def mlp(act):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3))


def conv(*layers):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(3))


def images(n):
    return torch.randn(n, 1, 4, 4)


def rows(n):
    return torch.randn(n, 6)


def series(n):
    return torch.randn(n, 5, 4)


def tokens(n):
    return torch.randint(0, 7, (n, 5))


NETWORKS = {
    "tanh": (lambda: mlp(nn.Tanh()), images),
    "relu": (lambda: mlp(nn.ReLU()), images),
    "max pool": (lambda: conv(nn.ReLU(inplace=True), nn.MaxPool2d(2)), images),
    "group norm, average pool": (lambda: conv(nn.GroupNorm(2, 4), nn.Hardswish(), nn.AdaptiveAvgPool2d(2)), images),
    "strided, grouped, dilated": (
        lambda: conv(nn.LeakyReLU(), nn.Conv2d(4, 4, 2, groups=2, dilation=2, stride=2), nn.ELU()),
        images,
    ),
    "transposed, upsampled": (
        lambda: conv(nn.Mish(), nn.ConvTranspose2d(4, 2, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")),
        images,
    ),
    "instance norm": (lambda: conv(nn.InstanceNorm2d(4, affine=True), nn.ReLU6()), images),
    "attention": (Attention, tokens),
    "LSTM": (lambda: Recurrent(nn.LSTM), series),
    "GRU": (lambda: Recurrent(nn.GRU), series),
    "gated": (Gated, rows),
    "sets": (Sets, series),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.PReLU(), nn.Linear(8, 3)),
        rows,
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.SELU(), nn.Linear(8, 3)), rows),
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.2),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "dampening": partial(torch.optim.SGD, lr=0.2, momentum=0.9, dampening=0.3),
    "decay": partial(torch.optim.SGD, lr=0.2, weight_decay=0.05),
    "adam": partial(torch.optim.Adam, lr=0.02, weight_decay=0.01),
    "amsgrad": partial(torch.optim.Adam, lr=0.02, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
}


def drawn(name, dtype=torch.float64, n=11, m=3):
    """Network, training inputs and targets, test points."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        make, data = NETWORKS[name]
        model, x, test = make(), data(n), data(m)
        model(x[:2])  # lazy layers
        y = torch.randint(0, 3, (n,))
    convert = (lambda t: t.to(dtype)) if x.is_floating_point() else (lambda t: t)
    return model.to(dtype), convert(x), y, convert(test)


def trained(name="relu", optimizer="sgd", dtype=torch.float64, steps=9, batch_size=4, **settings):
    model, x, y, test = drawn(name, dtype)
    run = ntkit.train(
        model, (x, y), F.cross_entropy, OPTIMIZERS[optimizer], steps=steps, batch_size=batch_size, **settings
    )
    return run, model, x, y, test
