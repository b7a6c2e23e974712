"""Models that keep something between calls have the same kernel with any number of workers."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from test_workers import BOX, KeepsThroughAHook, Plain, forward, images
from torch import nn

import ntkit
from ntkit.jacobian.lockstep import runs_together, three_sets
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.jacobian.replicas import in_one_thread, replica

pytestmark = pytest.mark.usefixtures("threads")


class Keeps(Plain):
    """Stores a value on itself, waits, and reads it again: wrong as soon as two threads share the module."""

    def forward(self, x):
        self.hidden = torch.tanh(self.two(torch.tanh(self.one(x))))
        time.sleep(0.002)
        return self.head(self.hidden.flatten(1))


class KeepsInAList(Plain):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(torch.tanh(self.two(torch.tanh(self.one(x)))))
        time.sleep(0.002)
        return self.head(self.seen.pop().flatten(1)) if len(self.seen) < 99 else self.head(self.seen[0].flatten(1))


class KeepsInABuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).double())

    def forward(self, x):
        with torch.no_grad():
            self.scale.fill_(float(len(x)))
        h = torch.tanh(self.two(torch.tanh(self.one(x))))
        time.sleep(0.002)
        return self.head(h.flatten(1)) * (len(x) / self.scale)


class KeepsInAGlobal(Plain):
    def forward(self, x):
        BOX["h"] = torch.tanh(self.two(torch.tanh(self.one(x))))
        time.sleep(0.002)
        return self.head(BOX["h"].abs().flatten(1))


class KeepsInAnObject(Plain):
    """As it was when a pass ends: only in between something is there."""

    class Cache:
        h = None

    def __init__(self):
        super().__init__()
        self.cache = self.Cache()

    def forward(self, x):
        self.cache.h = torch.tanh(self.two(torch.tanh(self.one(x))))
        time.sleep(0.002)
        out = self.head((self.cache.h + 1).flatten(1))
        self.cache.h = None
        return out


class KeepsItsNumber(Plain):
    """Counts through its layers on itself, and ends at the number at which it began."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def forward(self, x):
        for layer in (self.one, self.two):
            self.number += 1
            x = torch.tanh(layer(x)) * self.number
            time.sleep(0.002)
        self.number = 0
        return self.head(x.flatten(1))


class KeepsByShape(Plain):
    """A buffer of its own for each number of samples."""

    def __init__(self):
        super().__init__()
        self.rooms: dict = {}

    def forward(self, x):
        h = torch.tanh(self.two(torch.tanh(self.one(x))))
        room = self.rooms.setdefault(len(x), [])
        room[:] = [h]
        time.sleep(0.002)
        return self.head((room[0] * 1).flatten(1))


class KeepsInAQueue(Plain):
    """First in, first out: two passes step by step in turn get their own, and others do not."""

    def forward(self, x):
        QUEUE.append(torch.tanh(self.two(torch.tanh(self.one(x)))))
        time.sleep(0.002)
        return self.head(QUEUE.pop(0).flatten(1))


class RefersToItself(Plain):
    """Its activation is a closure over the model: it would read the number of the original, not of a copy."""

    def __init__(self):
        super().__init__()
        self.number = 0
        self.activation = lambda h: torch.tanh(h) * self.number

    def __deepcopy__(self, memo):
        new = type(self)().double()
        new.load_state_dict(self.state_dict())
        return new

    def forward(self, x):
        self.number = 1
        h = self.activation(self.one(x))
        self.number = 2
        return self.head(self.activation(self.two(h)).flatten(1))


class KeepsByThread(Plain):
    """Reads what the caller's thread has set."""

    def forward(self, x):
        return super().forward(x) * getattr(OF_THREAD, "scale", 1.0)


class KeepsInBackward(Plain):
    """A function of the user's whose backward pass counts."""

    def forward(self, x):
        return self.head(torch.tanh(Counting.apply(self.two(torch.tanh(self.one(x))))).flatten(1))


class Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        BOX["grad"] = grad
        time.sleep(0.001)
        return BOX["grad"] * 1


QUEUE: list = []
OF_THREAD = threading.local()
OF_THREAD.scale = 3.0

KEEPERS = {
    KeepsByShape: False, KeepsInAQueue: False, RefersToItself: False, KeepsByThread: False, KeepsInBackward: False,
    Keeps: True, KeepsInAList: False, KeepsInABuffer: False, KeepsThroughAHook: False, KeepsInAGlobal: False,
    KeepsInAnObject: False, KeepsItsNumber: True, Plain: True,
}  # fmt: skip


@pytest.mark.parametrize("kind", KEEPERS)
def test_a_model_that_keeps_something_is_right(threads, kind):
    torch.manual_seed(0)
    model, x = kind().double(), images(40)
    expected = tangent_kernel(model, x)
    threads(5)
    kernel = ntkit.TangentKernel(model)
    plan = kernel.plan(x)
    small = replace(plan, batch=5, strip=8)
    for _ in range(3):
        torch.testing.assert_close(kernel.tile(x, None, small), expected, rtol=1e-9, atol=1e-10)
    features = ntkit.ConjugateKernel(model).features(x)
    threads(1)
    assert torch.equal(ntkit.ConjugateKernel(model).features(x), features)


def test_a_copy_shares_parameters_and_nothing_that_is_written():
    model = Keeps()
    model.extra = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))})
    copy = replica(model)
    assert [id(p) for p in copy.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in copy.buffers()] == [id(b) for b in model.buffers()]
    assert not {id(m) for m in copy.modules()} & {id(m) for m in model.modules()}
    copy.hidden, copy.extra["a"].training = 1, False
    copy.extra["a"].register_forward_hook(lambda *_: None)
    assert "hidden" not in vars(model)
    assert model.extra["a"].training
    assert not model.extra["a"]._forward_hooks


@pytest.mark.parametrize(("kind", "together"), KEEPERS.items())
def test_two_passes_in_turn_show_what_is_shared(kind, together):
    torch.manual_seed(0)
    model = kind().double()
    expected = model(images(4))  # and what a first pass builds is there
    assert (runs_together(model, forward, three_sets(images(4))) and not in_one_thread(model)) is together
    assert three_sets(images(1).expand(4, 1, 8, 8)) is None  # equal samples show nothing
    assert torch.equal(model(images(4)), expected)


def test_another_layer_is_looked_at_again(threads):
    torch.manual_seed(0)
    threads(5)
    model, x = nn.Sequential(Plain(), nn.Linear(3, 2)).double(), images(40)
    for layer in (Plain(), KeepsInAGlobal(), Plain()):
        model[0] = layer.double()
        kernel = ntkit.TangentKernel(model)
        small = replace(kernel.plan(x), batch=5, strip=8)
        expected = tangent_kernel(model, x)
        torch.testing.assert_close(kernel.tile(x, None, small), expected, rtol=1e-9, atol=1e-10)
        (structure,) = kernel._engine._gradients.structures.values()
        assert structure.together is (type(layer) is Plain)
