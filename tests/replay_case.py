"""Runs to replay, for the tests of `Replay`."""

from __future__ import annotations

import copy
import json

import torch
from run_folders import as_an_earlier_version_wrote
from torch import nn

from ntkit.trajectory import Trajectory, record
from ntkit.trajectory.replay import Replay

F32, F64 = torch.float32, torch.float64
N, D = 11, 3


def groups(p):
    return [{"params": p[2:], "lr": 0.02}, {"params": p[:2], "weight_decay": 0.1}]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, dampening=0.3),
    "l2": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, weight_decay=0.2, maximize=True),
    "sgd groups": lambda p: torch.optim.SGD(groups(p), lr=0.1, momentum=0.5),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam l2": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, betas=(0.7, 0.95), eps=1e-3),
    "adam maximize": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, maximize=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, betas=(0.5, 0.6)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, amsgrad=True, betas=(0.5, 0.6)),
    "adamw groups": lambda p: torch.optim.AdamW(groups(p), lr=0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "adam fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
}
SGD, ADAM = OPTIMIZERS["sgd"], OPTIMIZERS["adam"]


def mse(outputs, y):
    return ((outputs - y) ** 2).mean()


def summed(outputs, y):
    return ((outputs - y) ** 2).sum()


def halved(step):
    return 0.5 ** (step // 3)


def data(dtype=F64):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(5), dtype=F64)
    return x.to(dtype), torch.stack([torch.sin(x.sum(1)), x[:, 0]], 1).to(dtype)


def mlp(*middle, dtype=F64):
    model = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), *middle, nn.Linear(7, 2)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=F64))
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def size(tensor):
    return float(torch.linalg.vector_norm(tensor.double()))


def loop(folder, optimizer=OPTIMIZERS["momentum"], steps=8, indices=True, clip=None, model=None, **options):
    """A loop of the user's own, recorded; batches grow and shrink."""
    model, (x, y) = model or mlp(), data()
    opt = optimizer(list(model.parameters()))
    with record(model, opt, folder, **options) as rec:
        for step in range(steps):
            rows = torch.randperm(N, generator=torch.Generator().manual_seed(step))[: 3 + step % 3]
            loss = mse(model(x[rows]), y[rows])
            opt.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            rec.step(rows if indices else None, loss)
    return Trajectory.open(folder)


def of_loop(trajectory, **given):
    return Replay(trajectory, **({"model": mlp(), "data": data(), "loss": mse} | given))


def check_updates(replay, tolerance):
    """The updates, rebuilt from the slopes by a recursion of its own, are those that took place."""
    steps = list(replay.backwards())[::-1]
    assert [step.step for step in steps] == list(range(replay.steps))
    buffers = {name: 0.0 for name in replay.names}
    model = copy.deepcopy(replay.model)
    for step in steps:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in step.before:
                    p.copy_(step.before[name])
        outputs = model(step.x)
        assert step.slope.shape == outputs.shape
        wanted = dict(model.named_parameters())
        gradients = torch.autograd.grad(outputs, [wanted[name] for name in replay.names], step.slope)
        for name, gradient in zip(replay.names, gradients, strict=True):
            u, theta = step.updates[name], step.before[name]
            d = u.gradient * gradient + u.coupled * theta
            buffers[name] = u.carry * buffers[name] + u.entering * d
            made = -u.direct * d - u.buffered * buffers[name] - u.decoupled * theta
            took = step.after[name] - theta
            assert size(made - took) <= tolerance * size(took), (step.step, name)
            assert size(took) > 0
    return steps


def edit(folder, change):
    as_an_earlier_version_wrote(folder)
    run = json.loads((folder / "run.json").read_text())
    change(run)
    (folder / "run.json").write_text(json.dumps(run))


def checked(folder, **given):
    replay = of_loop(Trajectory.open(folder), **given)
    replay.check()
    return replay
