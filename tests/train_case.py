"""Small trainings, for the tests of `train`."""

from __future__ import annotations

import torch
from torch import nn

F64 = torch.float64
N, D = 11, 3

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "groups": lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.2}, {"params": p[1:]}], lr=0.1, momentum=0.5),
}
SGD = OPTIMIZERS["sgd"]


def mse(outputs, y):
    return ((outputs - y) ** 2).mean()


def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, D, generator=generator, dtype=F64)
    return x, torch.sin(x.sum(1, keepdim=True))


def mlp(*middle):
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), *middle, nn.Linear(7, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=F64))
    return model


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a
    )


def halved(step):
    return 0.5 ** (step // 3)


class Noisy(nn.Module):
    """Dropout, running statistics, a tied pair and a non-persistent buffer that moves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.norm, self.drop = nn.Linear(D, 7), nn.BatchNorm1d(7), nn.Dropout(0.4)
        self.middle, self.again = nn.Linear(7, 7), nn.Linear(7, 7)
        self.again.weight = self.middle.weight
        self.last = nn.Linear(7, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.double()

    def forward(self, x):
        if self.training:
            self.calls += 1
        h = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(self.again(self.middle(h)))) * (1 + 0.01 * self.calls)
