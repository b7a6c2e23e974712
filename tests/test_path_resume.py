"""The exact path kernel, interrupted and resumed, by any number of workers; what it cannot integrate is refused."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from path_case import (
    OPTIMIZERS,
    trained,
)
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.kernels.path import effects, sweep
from ntkit.testing import assert_equal


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_a_killed_decomposition_goes_on(optimizer, tmp_path):
    run, *_, test = trained("relu", optimizer)
    whole = ntkit.PathKernel(run).decompose(test, layers=True, steps=True)
    taken, stepped = [], sweep.Sweep.step

    def until(limit):
        def step(self, made):
            if len(taken) == limit:
                raise KeyboardInterrupt
            taken.append(made.step)
            stepped(self, made)

        return step

    def again(limit=None):
        kernel = ntkit.PathKernel(run, memory="40 kB")  # in parts
        with mock.patch.object(sweep.Sweep, "step", until(limit)):
            return kernel.decompose(test, layers=True, steps=True, path=tmp_path / "found")

    with (
        mock.patch("ntkit.trajectory.run_writer.CHECKPOINT_SECONDS", 0),
        mock.patch("ntkit.trajectory.run_writer.CHECKPOINT_SHARE", 99),
    ):
        for limit in (4, 13, 22):
            with pytest.raises(KeyboardInterrupt):
                again(limit)
        found = again()
    assert len(taken) == 27  # three parts of nine steps, none of them twice
    assert torch.equal(again(limit=27).contributions, found.contributions)  # read, not made
    torch.testing.assert_close(found.contributions, whole.contributions, rtol=1e-10, atol=1e-13)
    assert found.error <= 1e-12
    assert [s.step for s in found.steps] == [s.step for s in whole.steps]
    for name, share in whole.layers.items():
        torch.testing.assert_close(found.layers[name], share, rtol=1e-10, atol=1e-13)
    with pytest.raises(ntkit.Refused, match=r"another decomposition \(x differ"):
        ntkit.PathKernel(run).decompose(test + 1, layers=True, steps=True, path=tmp_path / "found")


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def _small_cuts(monkeypatch):
    for name, size in {"_PIECE": 400, "_ENTRIES": 16, "_FACTORS": 40}.items():
        monkeypatch.setattr(effects, name, size)


@pytest.mark.usefixtures("_small_cuts")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["relu", "max pool"])
def test_any_number_of_workers_gives_the_same_values(name, optimizer, tmp_path):
    run, *_, test = trained(name, optimizer, steps=4)
    calls, spread = [], effects.spread

    def counted(work, items):
        calls.append(len(items))
        return spread(work, items)

    found = []
    with mock.patch.object(effects, "spread", counted):
        for number in (1, 2, 5):
            with threads(number):
                found.append(ntkit.PathKernel(run, memory="1 GB").decompose(test, layers=True, steps=True))
    assert max(calls) > 1
    for one in found[1:]:
        assert_equal(one.contributions, found[0].contributions, 1e-11, "contributions")
        assert_equal(one.regularization, found[0].regularization, 1e-11, "regularization")
        for name, share in one.layers.items():
            assert_equal(share, found[0].layers[name], 1e-11, name)
    assert found[0].error <= 1e-12


@pytest.mark.usefixtures("_small_cuts")
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_gone_on_with_other_workers_it_gives_the_same_values(optimizer, tmp_path):
    run, *_, test = trained("relu", optimizer)
    stepped, taken = sweep.Sweep.step, []

    def step(self, made):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(made.step)
        stepped(self, made)

    with (
        mock.patch("ntkit.trajectory.run_writer.CHECKPOINT_SECONDS", 0),
        mock.patch("ntkit.trajectory.run_writer.CHECKPOINT_SHARE", 99),
    ):
        with mock.patch.object(sweep.Sweep, "step", step), threads(1), pytest.raises(KeyboardInterrupt):
            ntkit.PathKernel(run, memory="1 GB").decompose(test, path=tmp_path / "found")
        with threads(5):
            found = ntkit.PathKernel(run, memory="1 GB").decompose(test, path=tmp_path / "found")
    whole = ntkit.PathKernel(run, memory="1 GB").decompose(test)
    assert_equal(found.contributions, whole.contributions, 1e-11, "contributions")
    assert_equal(found.regularization, whole.regularization, 1e-11, "regularization")


class Routed(nn.Module):
    """The largest of two scores decides which expert is used: the output jumps when it changes."""

    def __init__(self):
        super().__init__()
        self.score, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x):
        choice = self.score(x).argmax(1)
        return torch.stack([self.experts[int(c)](row) for row, c in zip(x, choice, strict=True)])


def test_what_jumps_and_what_is_unknown_is_refused_by_name():
    torch.manual_seed(0)
    x, y = torch.randn(8, 6).double(), torch.arange(8) % 3
    model = Routed().double()
    run = ntkit.train(model, (x, y), F.cross_entropy, partial(torch.optim.SGD, lr=0.1), steps=3)
    moved = ntkit.train(
        model, (x, y), F.cross_entropy, partial(torch.optim.SGD, lr=0.1, weight_decay=5.0), steps=3, record="all"
    )
    assert ntkit.PathKernel(run).decompose(x).error <= 1e-12  # the scores get no gradient: no choice changes
    with mock.patch.object(Routed, "forward", lambda self, x: x @ torch.linalg.inv(self.experts[0].weight[:, :3])):
        odd, wide = Routed().double(), torch.randn(8, 3).double()
        inverse = ntkit.train(odd, (wide, y), F.cross_entropy, partial(torch.optim.SGD, lr=1e-4), steps=2)
        assert ntkit.PathKernel(inverse).decompose(wide).error <= 1e-12  # no rule: by its averaged Jacobian
        assert ntkit.PathKernel(inverse, integration="quadrature").decompose(wide).error <= 1e-9
    turned = lambda self, x: torch.complex(x @ self.experts[0].weight[:3, :3], x).angle()
    with mock.patch.object(Routed, "forward", turned):
        odd = Routed().double()
        angle = ntkit.train(odd, (wide, y), F.cross_entropy, partial(torch.optim.SGD, lr=1e-4), steps=2)
        with pytest.raises(ntkit.NoSecant, match=r"aten\.angle.*complex numbers.*quadrature"):
            ntkit.PathKernel(angle).decompose(wide)
    with pytest.raises(ntkit.Refused, match="outputs"):
        ntkit.PathKernel(run, outputs="sum")
    for way, words in (
        ({"integration": "exact"}, "integration: got 'exact'"),
        ({"rule": "simpson"}, "rule"),
        ({"nodes": 0}, "nodes"),
        ({"tolerance": 2.0}, "tolerance"),
    ):
        with pytest.raises(ntkit.Refused, match=words):
            ntkit.PathKernel(run, **way)
    with pytest.raises(ntkit.Refused, match="y_test: got"):
        ntkit.PathKernel(run).decompose(x, y)
    assert moved.status == "complete"


def test_a_route_that_changes_within_a_step_is_refused():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 0.9], dtype=torch.float64))

        def forward(self, x):
            return x * self.w[self.w.argmax()] * torch.tensor([1.0, -1.0]).double()[self.w.argmax()]

    x, y = torch.ones(4, 1).double(), torch.zeros(4, 1).double()
    sgd = partial(torch.optim.SGD, lr=0.4)
    run = ntkit.train(Switch(), (x, y), F.mse_loss, sgd, steps=2)
    with pytest.raises(ntkit.NoSecant, match="a choice made from the parameters"):
        ntkit.PathKernel(run).decompose(x)


def test_a_folder_of_other_outputs_is_refused(tmp_path):
    """Functions of one name, told apart by their code and by what they enclose."""
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    run = ntkit.train(net, (x, y), nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1), steps=3)

    def picks(c):
        return lambda out: out[:, c]

    first = ntkit.PathKernel(run, picks(0)).decompose(x[:2], path=tmp_path / "d")
    again = ntkit.PathKernel(run, picks(0)).decompose(x[:2], path=tmp_path / "d")
    assert torch.equal(first.contributions, again.contributions)
    with pytest.raises(ntkit.Refused, match="got another decomposition"):
        ntkit.PathKernel(run, picks(1)).decompose(x[:2], path=tmp_path / "d")
