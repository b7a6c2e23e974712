"""Models that several threads may not run at once, or not as copies: what shows it, and right values all the same."""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from dataclasses import replace

import pytest
import torch
from torch import nn

import ntkit
from ntkit.jacobian import lockstep

pytestmark = pytest.mark.usefixtures("threads")
LOCAL, LOCK, BARE, STATE = threading.local(), threading.RLock(), threading.Lock(), {}
VARIABLE: contextvars.ContextVar[dict | None] = contextvars.ContextVar("variable", default=None)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 30), nn.Linear(30, 2)
        self.number, self.queue, self.hidden = 0, deque(), [nn.Linear(4, 30, bias=False).double()]
        self.bound = self.scaled

    def scaled(self, h):
        return torch.tanh(h) * (1 + self.number)

    def forward(self, x):
        return self.b(self.middle(torch.tanh(self.a(x))))


class BoundMethod(Net):
    """Reads, through a method bound to the model, what a copy has written to itself."""

    def middle(self, h):
        self.number = 3
        h = self.bound(h)
        self.number = 0
        return h


class Queue(Net):
    """In strict turn each of two threads takes its own out again."""

    def middle(self, h):
        self.queue.append(h)
        self.queue.append(h * 2)
        h = self.queue.popleft()
        return h * self.queue.popleft()


class Scratch(torch.autograd.Function):
    """Shares, in the backward pass, a buffer for each size."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return torch.sin(h)

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        buffer = STATE.setdefault(h.shape, torch.empty_like(h))
        torch.cos(h, out=buffer)
        time.sleep(0.001)
        buffer.mul_(g)
        return buffer.clone()


class InBackward(Net):
    def middle(self, h):
        return Scratch.apply(h)


class Swapped(Net):
    """A network of no layer of the model, whose weights are put in for a while."""

    def forward(self, x):
        weight = {"weight": self.a.weight * 2}
        return self.b(torch.tanh(torch.func.functional_call(self.hidden[0], weight, (x,)) + self.a(x)))


class OfThisThread(Net):
    def middle(self, h):
        return h * getattr(LOCAL, "scale", 1.0)


class CallersLock(Net):
    def middle(self, h):
        with LOCK:
            return h * 2


class BareLock(Net):
    def middle(self, h):
        BARE.acquire()
        h = h * 2
        h = h + 1
        BARE.release()
        return h


class ContextVariable(Net):
    def middle(self, h):
        kept = VARIABLE.get()
        if kept is None:
            return h
        kept["h"] = h
        time.sleep(0.001)
        return kept["h"] * 2


class Kernel(Net):
    def forward(self, x):
        return self.b(torch.tanh(self.a(ntkit.ConjugateKernel(INNER)(x, Z))))


INNER, Z = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), torch.eye(4).double()
KINDS = (BoundMethod, Queue, InBackward, Swapped, OfThisThread, CallersLock, BareLock, ContextVariable, Kernel)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_model_as_with_one_thread(threads, monkeypatch, kind):
    monkeypatch.setattr(lockstep, "_PATIENCE", 0.5)
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(48, 4).double()
    weight = model.hidden[0].weight
    LOCAL.scale, token = 3.0, VARIABLE.set({})
    try:
        with LOCK:
            threads(1)
            kernel = ntkit.TangentKernel(model)
            plan = replace(kernel.plan(x), batch=8, strip=8, block=8)
            expected = kernel.tile(x, None, plan)
            for number in (2, 5):
                threads(number)
                for _ in range(2):
                    value = ntkit.TangentKernel(model).tile(x, None, plan)
                    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    finally:
        VARIABLE.reset(token)
    assert not model.queue
    assert model.hidden[0].weight is weight
    assert not BARE.locked()


def test_a_finalizer_of_the_model_runs_for_no_copy(threads):
    threads(2)
    ended = []

    class Ends(Net):
        def middle(self, h):
            return h

        def __del__(self):
            ended.append(1)

    model, x = Ends().double(), torch.randn(48, 4).double()
    kernel = ntkit.TangentKernel(model)
    kernel.tile(x, None, replace(kernel.plan(x), batch=8))
    assert not ended


def test_a_layer_under_a_forward_of_its_own_is_found(threads):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double(), torch.randn(400, 4).double()
    model.forward = model.forward  # as wrappers do
    threads(1)
    expected = ntkit.ConjugateKernel(model, layer="1").features(x)
    threads(2)
    assert torch.equal(ntkit.ConjugateKernel(model, layer="1").features(x), expected)


def test_convolution_of_one_pixel_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 2, padding=2), nn.Flatten(), nn.Linear(32, 2)).double()
    x = torch.randn(20, 3, 1, 1).double()
    last = x.as_strided(x.shape, (3, 1, 3, 3))
    kernel = ntkit.TangentKernel(model, routes={"0.weight": "rows"})
    torch.testing.assert_close(kernel(last), kernel(x.contiguous()), rtol=1e-12, atol=1e-12)
