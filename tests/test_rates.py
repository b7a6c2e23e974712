"""Rates of the machine: measured once, kept in a file, set by hand, never in the way."""

from __future__ import annotations

import json

import pytest
import torch
from cases import make

import ntkit
from ntkit.jacobian import machine_rates as rates
from ntkit.jacobian.machine_rates import Rates, calibrate, rates_for

SLOW_MEMORY, SLOW_PRODUCTS = Rates(1e12, 1e12, 1e3, 1e3), Rates(1e3, 1e3, 1e12, 1e12)


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_KNOWN", {})
    return tmp_path / "ntkit" / "rates.json"


def test_measured_once_and_kept(own_file, monkeypatch):
    like = torch.zeros(1)
    first = rates_for(like)
    assert all(value > 1e6 for value in (first.product, first.batched, first.entries, first.fresh))
    assert list(json.loads(own_file.read_text()).values()) == [vars(first)]
    monkeypatch.setattr(rates, "_measure", lambda like: pytest.fail("measured again"))
    assert rates_for(like) == first
    monkeypatch.setattr(rates, "_KNOWN", {})  # as a new process would
    assert rates_for(like) == first


def test_each_precision_has_its_own():
    calibrate(torch.zeros(1), SLOW_MEMORY)
    calibrate(torch.zeros(1).double(), SLOW_PRODUCTS)
    assert (rates_for(torch.ones(3)), rates_for(torch.ones(3).double())) == (SLOW_MEMORY, SLOW_PRODUCTS)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": {"product": 1}}', '{"a": {"product": "x"}}'])
def test_a_file_that_is_not_ours_is_measured_over(own_file, content):
    own_file.parent.mkdir()
    own_file.write_text(content)
    assert rates_for(torch.zeros(1)).product > 1e6
    assert rates._read()


def test_where_nothing_can_be_kept_defaults_hold(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert rates_for(torch.zeros(1)) == rates._DEFAULT


def test_they_choose_the_route():
    model, x1, x2 = make("tokens through linear")
    chosen = []
    for set_to in (SLOW_MEMORY, SLOW_PRODUCTS):
        calibrate(torch.zeros(1).double(), set_to)
        kernel = ntkit.TangentKernel(model)
        chosen.append({step.name: step.route for step in kernel.plan(x1, x2).steps})
    assert chosen[0] != chosen[1]


def test_measuring_leaves_the_generator_alone():
    state = torch.get_rng_state()
    rates._measure(torch.zeros(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_arithmetic_that_is_very_slow_is_measured_on_less_and_seldom(monkeypatch):
    """Half precision on some CPUs: a product of side 1024 takes seconds, where all rates should take one."""
    calls = []
    rates._seconds(lambda: calls.append(1), torch.device("cpu"))
    assert len(calls) == 9
    monkeypatch.setattr(rates, "_ENOUGH", 0.0)
    rates._seconds(lambda: calls.append(1), torch.device("cpu"))
    assert len(calls) == 9 + 2
    sides, seconds = [], rates._seconds
    monkeypatch.setattr(rates, "_seconds", lambda work, *more: sides.append(work().shape[-1]) or seconds(work, *more))
    assert all(value > 1e6 for value in vars(rates._measure(torch.zeros(1))).values())
    assert sides[:2] == [256, 256]
