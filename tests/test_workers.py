"""Workers: same values for any number of them, errors and interrupts whole, threads as they were, forks, no mix-ups."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from cases import CASES, make
from torch import nn

import ntkit
from ntkit.base import workers as pool
from ntkit.base.caller_context import own_context
from ntkit.base.workers import spread, workers
from ntkit.jacobian import lockstep
from ntkit.jacobian.lockstep import runs_together, three_sets
from ntkit.jacobian.oracle import tangent_kernel
from ntkit.jacobian.replicas import in_one_thread

pytestmark = pytest.mark.usefixtures("threads")
NUMBERS = (1, 2, 5)


def in_new_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


# ---------------------------------------------------------------------- the mechanism


@pytest.mark.parametrize("number", NUMBERS)
def test_results_in_order_and_every_item_told(threads, number):
    threads(number)
    told = []
    assert spread(lambda i: i * i, range(23), told.append) == [i * i for i in range(23)]
    assert sorted(told) == list(range(23))
    assert spread(lambda i: i, []) == []


@pytest.mark.parametrize("number", [2, 5])
def test_each_worker_has_one_thread_and_all_others_what_they_had(threads, number):
    threads(number)
    before = in_new_thread(torch.get_num_threads)
    barrier = threading.Barrier(number)

    def work(_):
        barrier.wait(30)  # all at once: that many workers there are
        return torch.get_num_threads(), threading.get_ident(), workers()

    found = spread(work, range(number))
    assert {threads for threads, _, _ in found} == {1}
    assert len({ident for _, ident, _ in found}) == number
    assert {inner for _, _, inner in found} == {1}  # work within work stays there
    assert torch.get_num_threads() == number
    assert in_new_thread(torch.get_num_threads) == before


def test_no_more_cores_than_one_call_may_take(threads):
    threads(2)
    running, most = 0, 0
    lock = threading.Lock()

    def work(_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    spread(work, range(2))
    size = pool._POOL._threads
    callers = [threading.Thread(target=lambda: (torch.set_num_threads(2), spread(work, range(8)))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert pool._POOL._threads == size
    assert most <= size


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_error_comes_out_and_nothing_more_begins(threads, number):
    threads(number)
    begun = []

    def work(i):
        begun.append(i)
        if i == 3:
            raise KeyError(i)
        time.sleep(0.001)

    with pytest.raises(KeyError, match="3"):
        spread(work, range(1000))
    assert len(begun) < 3 + 1 + 2 * number + 20
    assert spread(lambda i: i, range(9)) == list(range(9))  # the workers are as before


def test_grad_mode_and_context_go_along(threads):
    threads(2)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert set(spread(lambda _: torch.is_grad_enabled(), range(6))) == {enabled}
    linear, x = nn.Linear(3, 3), torch.ones(2, 3)
    with torch.autocast("cpu", torch.bfloat16), own_context():
        from ntkit.base.caller_context import caller_context

        def work(_):
            with caller_context():
                inside = linear(x).dtype
            return inside, linear(x).dtype

        assert set(spread(work, range(6))) == {(torch.bfloat16, torch.float32)}


def test_an_interrupt_waits_for_what_is_begun(threads):
    threads(2)
    ended: queue.SimpleQueue = queue.SimpleQueue()

    def work(i):
        if i == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        ended.put(i)

    with pytest.raises(KeyboardInterrupt):
        spread(work, range(50))
    seen = ended.qsize()
    assert 1 <= seen < 50
    time.sleep(0.5)
    assert ended.qsize() == seen  # nothing goes on behind the caller's back


_FORK = """
import os, torch, ntkit
torch.set_num_threads(2)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2)).double()
x = torch.randn(40, 64).double()
kernel = ntkit.TangentKernel(model, memory="1 GB")
K = kernel(x)
pid = os.fork()
if pid == 0:
    again = kernel(x)
    os._exit(0 if torch.equal(again, K) and torch.get_num_threads() == 2 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use():
    assert subprocess.run([sys.executable, "-c", _FORK], timeout=120).returncode == 0


# ---------------------------------------------------------------------- the engine


class Plain(nn.Module):
    """A convolutional net large enough for several batches and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8 * 6 * 6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))).flatten(1))


def images(n, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def values_of(model, x1, x2, plans=None):
    kernel = ntkit.TangentKernel(model, memory="1 GB")
    sketch, conjugate = ntkit.SketchedKernel(model, 64), ntkit.ConjugateKernel(model)
    v = torch.linspace(-1, 1, 3 * len(x1)).double()
    found = {
        "k(x1, x2)": kernel(x1, x2), "k(x1)": kernel(x1), "diagonal": kernel.diagonal(x1),
        "layers": torch.stack(list(kernel.layers(x1, x2).values())), "operator": kernel.operator(x1) @ v,
        "sketch": sketch(x1, x2), "conjugate": conjugate(x1, x2),
    }  # fmt: skip
    if plans is not None:
        found |= {"tile": kernel.tile(x1, x2, plans[0]), "symmetric tile": kernel.tile(x1, None, plans[1])}
    return found


def test_same_values_for_any_number_of_workers(threads):
    torch.manual_seed(0)
    model, x1, x2 = Plain().double(), images(70), images(45, 1)
    threads(5)
    kernel = ntkit.TangentKernel(model, memory="1 GB")
    plans = [replace(kernel.plan(x1, other), batch=11, strip=16, block=20) for other in (x2, None)]
    by_number = {}
    for number in NUMBERS:
        threads(number)
        by_number[number] = values_of(model, x1, x2, plans)
        assert torch.get_num_threads() == number
    oracle = tangent_kernel(model, x1[:4], x2[:4])
    for found in by_number.values():
        torch.testing.assert_close(found["k(x1, x2)"][:4, :4], oracle, rtol=1e-10, atol=1e-12)
        for name, value in found.items():
            first = by_number[1][name]
            if "tile" in name:
                assert torch.equal(value, first), name
            torch.testing.assert_close(value, first, rtol=1e-12, atol=1e-12 * float(first.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_every_case_of_the_law_grid_with_five_workers(threads, case):
    threads(5)
    model, x1, x2 = make(case)
    for outputs in ("full", "trace"):
        kernel = ntkit.TangentKernel(model, outputs=outputs)
        expected = tangent_kernel(model, x1, x2, outputs=outputs)
        scale = float(expected.abs().max())
        small = kernel.tile(x1, x2, replace(kernel.plan(x1, x2), batch=2, strip=2, block=2))
        torch.testing.assert_close(small, expected, rtol=1e-9, atol=1e-9 * scale)
        torch.testing.assert_close(kernel(x1, x2), expected, rtol=1e-9, atol=1e-9 * scale)


def test_two_threads_of_the_user_at_once(threads):
    torch.manual_seed(0)
    models, x = [Plain().double() for _ in range(2)], images(60)
    threads(2)
    expected = [ntkit.TangentKernel(model)(x) for model in models]
    found: dict = {}

    def call(i):
        torch.set_num_threads(2)
        found[i] = [ntkit.TangentKernel(models[i % 2])(x) for _ in range(3)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for i, values in found.items():
        for value in values:
            torch.testing.assert_close(value, expected[i % 2], rtol=1e-12, atol=1e-12)
    assert len(found) == 4


_INTERRUPTED = """
import os, signal, threading, torch, ntkit
torch.set_num_threads(2)
class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__(); self.a, self.b = torch.nn.Linear(5, 30), torch.nn.Linear(30, 2)
        self.a.bias.requires_grad_(False); self.register_buffer("seen", torch.zeros(3))
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if len(x) > 5: os.kill(os.getpid(), signal.SIGINT)
        return self.b(h)
model, x = Slow().double(), torch.randn(900, 5).double()
kernel = ntkit.TangentKernel(model, memory="1 MB")
kernel(x[:4])
before = {name: (p.clone(), p.requires_grad, p._version, p.grad) for name, p in model.named_parameters()}
try:
    kernel(x)
except KeyboardInterrupt:
    pass
else:
    raise SystemExit("not interrupted")
for name, p in model.named_parameters():
    value, flag, version, grad = before[name]
    assert torch.equal(p, value) and p.requires_grad == flag and p._version == version and p.grad is grad
assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
assert kernel(x[:5]).shape == (5, 5, 2, 2)
"""


def test_an_interrupt_within_a_call_leaves_nothing_changed():
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


BOX: dict = {}


class KeepsThroughAHook(Plain):
    def __init__(self):
        super().__init__()
        self.two.register_forward_hook(lambda module, args, out: BOX.update(h=out))

    def forward(self, x):
        self.two(torch.tanh(self.one(x)))
        time.sleep(0.002)
        return self.head(torch.tanh(BOX["h"]).flatten(1))


def forward(own, x):
    out = own(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(own.parameters()))]


def test_a_lock_of_the_model_is_no_deadlock(monkeypatch):
    monkeypatch.setattr(lockstep, "_PATIENCE", 0.5)
    lock = threading.Lock()

    class Locked(Plain):
        def forward(self, x):
            with lock:
                return super().forward(x)

    model = Locked().double()
    assert not runs_together(model, forward, three_sets(images(4)))
    assert not lock.locked()


def test_a_slow_operation_is_no_lock(monkeypatch):
    """A thread whose turn it is may take as long as a pass does, as in a large model or on a busy machine."""
    monkeypatch.setattr(lockstep, "_PATIENCE", 0.02)

    class Slow(Plain):
        def forward(self, x):
            time.sleep(0.1)
            return super().forward(x)

    assert runs_together(Slow().double(), forward, three_sets(images(4)))


def test_what_runs_in_one_thread():
    assert in_one_thread(KeepsThroughAHook())
    assert not in_one_thread(Plain())
    assert not in_one_thread(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert in_one_thread(torch.jit.trace(Plain().double(), images(2)))
