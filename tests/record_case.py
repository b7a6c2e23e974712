"""A plain loop to record, for the tests of `record`."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import nn

from ntkit.base.tensors import safetensors_bytes
from ntkit.trajectory import Trajectory, record

F64 = torch.float64
N = 16


class Net(nn.Module):
    """Dropout, running statistics, a tied pair and a non-persistent buffer that moves."""

    def __init__(self, dtype=F64):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.drop = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.middle, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.again.weight = self.middle.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.to(dtype)

    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1  # another tensor each time
        h = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(self.again(self.middle(h))))


def data(dtype=F64):
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(5), dtype=F64)
    return x.to(dtype), torch.sin(x.sum(1, keepdim=True)).to(dtype)


def adam(model):
    groups = [{"params": [model.last.weight], "lr": 0.05}, {"params": model.first.parameters()}]
    return torch.optim.Adam(groups, lr=0.01, eps=1e-4)  # eps must not be zero in float16


def batch(step):
    return torch.randperm(N, generator=torch.Generator().manual_seed(step))[: 3 + step % 3]


def advance(model, opt, step, dtype=F64):
    """One step of the loop, without the recorder."""
    torch.manual_seed(step)
    rows, (x, y) = batch(step), data(dtype)
    loss = ((model(x[rows]) - y[rows]) ** 2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return rows, loss


def factor(step):
    return 1 / (1 + step)


def run(model, opt, folder, until, scheduled=True, on_step=None, **options):
    with record(model, opt, folder, **options) as rec:
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, factor, last_epoch=rec.done - 1) if scheduled else None
        for step in range(rec.done, until):
            rows, loss = advance(model, opt, step)
            rec.step(rows, loss)
            if scheduler is not None:
                scheduler.step()
            if on_step is not None:
                on_step(step)
    return Trajectory.open(folder)


def state_of(model):
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: tensor.detach().clone() for name, tensor in tensors}


def bits(tensor):
    return str(tensor.dtype), list(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist()


def same_bits(a, b):
    return a.keys() == b.keys() and all(bits(a[k]) == bits(b[k]) for k in a)


def bytes_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


UNTIL = 11


def options(folder):
    size = len(safetensors_bytes({k: v for k, v in state_of(Net()).items() if k != "again.weight"}))
    return dict(folder=folder, until=UNTIL, record=lambda step: step % 5 != 3, budget=5 * size)
