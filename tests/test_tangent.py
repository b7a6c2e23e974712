"""The engine equals the oracle: every case, every output mode, every route, any tiling.

One law grid: every case runs every mode, route and tiling.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from cases import CASES, make, softplus_sum, tiny_mlp, vectors
from layout_judge import combined
from torch import nn
from torch.nn import functional as F

import ntkit
from ntkit.base.batch import take
from ntkit.base.checks import Refused
from ntkit.jacobian import contraction as contract
from ntkit.jacobian import engine, rules, strip
from ntkit.jacobian import plan as planning
from ntkit.jacobian.graph import find_uses
from ntkit.jacobian.oracle import jacobian, tangent_kernel
from ntkit.jacobian.plan import ROUTES
from ntkit.jacobian.structure import SelfCheckError
from ntkit.testing import assert_equal, check_kernel

MODES = ["full", "diagonal", "trace", "sum", softplus_sum]


# what has no rule, by case; everything else must be on the fast path
FALLBACK = {"no rule": {"mix"}}


@pytest.mark.parametrize("outputs", MODES, ids=lambda m: m if isinstance(m, str) else "callable")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name, outputs):
    model, x1, x2 = make(name)
    kernel = ntkit.TangentKernel(model, outputs=outputs)
    assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2, outputs), 1e-10, "k(x1, x2)")
    assert_equal(kernel(x1), tangent_kernel(model, x1, None, outputs), 1e-10, "k(x1)")


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_oracle(name):
    model, x1, x2 = make(name)
    exact = tangent_kernel(model, x1, x2)

    def single(x):
        if isinstance(x, dict):
            return {k: single(v) for k, v in x.items()}
        return tuple(map(single, x)) if isinstance(x, tuple) else x.float() if x.is_floating_point() else x

    assert_equal(ntkit.TangentKernel(model.float())(single(x1), single(x2)), exact, 1e-4, "float32")


@pytest.mark.parametrize("name", CASES)
def test_laws(name):
    model, x1, x2 = make(name)
    for outputs in ("full", "trace", "diagonal"):
        check_kernel(ntkit.TangentKernel(model, outputs=outputs), x1, x2)


@pytest.mark.parametrize("name", CASES)
def test_the_fast_path_is_taken(name):
    model, x1, _ = make(name)
    missing = ntkit.TangentKernel(model).fallback(x1)
    assert set(missing) == FALLBACK.get(name, set()), missing


@cache
def jacobians(name, outputs):
    """The oracle's Jacobians of a case's two sets, by parameter."""
    model, x1, x2 = make(name)
    return jacobian(model, x1, outputs), jacobian(model, x2, outputs)


@cache
def kernel_of(name, outputs):
    """A case's kernel, whose self-check serves all routes, and its two sets."""
    model, x1, x2 = make(name)
    return ntkit.TangentKernel(model, outputs=outputs), x1, x2


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same(route):
    """All parameters whose gradients come in this form take the route at once: each one's share, and the sum of all."""
    taken = set()
    for name in CASES:
        for outputs in MODES:
            kernel, x1, x2 = kernel_of(name, outputs)
            j1, j2 = jacobians(name, outputs if callable(outputs) else "full")
            engine, routes = kernel._engine, {}
            for parameter in j1:
                with suppress(Refused):  # that parameter's gradient does not come in this form
                    structure, wish = engine.structure(x1, unseen=True), {parameter: route}
                    planning.make_plan(structure, engine.mode, 7, 4, engine.memory(), engine.like, routes=wish)
                    routes |= wish
            engine._routes, engine._plans = routes, {}
            plan, K, shares = kernel.plan(x1, x2), kernel(x1, x2), kernel.layers(x1, x2)
            exact = {parameter: combined(j1[parameter], j2[parameter], outputs) for parameter in j1}
            assert_equal(K, sum(exact.values()), 1e-9, f"{name} {outputs}")
            for parameter in routes:
                assert plan.route(parameter) in (route, "fallback")
                if exact[parameter].abs().max() > 1e-20:  # less is rounding of a gradient that vanishes by symmetry
                    taken.add(name)
                    assert_equal(shares[parameter], exact[parameter], 1e-9, f"{name} {outputs} {parameter}")
    assert len(taken) >= {"outer": 12, "tokens": 12, "nested": 10, "rows": 25}[route], taken


def test_routes_are_checked_at_the_door():
    model, x1, _ = make("mlp")
    with pytest.raises(ntkit.Refused, match=r"0\.weight"):
        ntkit.TangentKernel(model, routes={"0.wieght": "rows"})
    with pytest.raises(ntkit.Refused, match="outer"):
        ntkit.TangentKernel(model, routes={"0.weight": "auter"})
    with pytest.raises(ntkit.Refused, match="tokens"):
        ntkit.TangentKernel(model, routes={"0.weight": "tokens"})(x1)


def test_plan_prints_route_and_cost_of_every_parameter():
    model, x1, x2 = make("attention, batch first")
    plan = ntkit.TangentKernel(model).plan(x1, x2)
    text = str(plan)
    for step in plan.steps:
        assert any(line.split()[:2] == [step.name, step.route] for line in text.splitlines())
    assert plan.flops == sum(step.flops for step in plan.steps) > 0
    assert plan.seconds > 0
    assert "GFLOP" in text


def test_outer_flops_are_those_of_its_two_products():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    kernel = ntkit.TangentKernel(model, routes={"0.weight": "outer", "2.weight": "outer"})
    plan = kernel.plan(torch.randn(6, 5), torch.randn(7, 5))
    assert {step.name: step.flops for step in plan.steps} == {
        "0.weight": 6 * 7 * 2 * (5 + 9 * 4), "2.weight": 6 * 7 * 2 * (4 + 9 * 3), "0.bias": 0, "2.bias": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "experts"])
@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace"])
def test_the_result_goes_where_the_user_says(name, outputs, tmp_path):
    model, x1, x2 = make(name)
    kernel = ntkit.TangentKernel(model, outputs=outputs, memory=30_000)
    for sets in ((x1, x2), (x1,)):
        expected = kernel(*sets)
        mapped = np.lib.format.open_memmap(tmp_path / "K.npy", "w+", np.float64, tuple(expected.shape))
        result = kernel(*sets, out=mapped)
        mapped.flush()
        assert_equal(torch.from_numpy(np.load(tmp_path / "K.npy")), expected, 1e-14, "memmap")
        assert result.data_ptr() == mapped.ctypes.data
        own = torch.full((2, *expected.shape), torch.nan).double()
        kernel(*sets, out=own[1])
        assert_equal(own[1], expected, 1e-14, "tensor")
        assert own[0].isnan().all()


def test_a_result_that_does_not_fit_is_refused():
    model, x1, x2 = make("mlp")
    kernel = ntkit.TangentKernel(model, outputs="trace")
    for wrong in (torch.empty(4, 7).double(), torch.empty(7, 4), np.empty((7, 4), np.float32), [[0.0] * 4] * 7):
        with pytest.raises(ntkit.Refused, match="out"):
            kernel(x1, x2, out=wrong)
    fixed = np.zeros((7, 4))
    fixed.flags.writeable = False
    with pytest.raises(ntkit.Refused, match="read-only"):
        kernel(x1, x2, out=fixed)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention, batch first"])
def test_out_of_memory_halves_the_budget_and_goes_on(name, monkeypatch):
    """As a device would: every batch above two samples fails, at any moment."""
    model, x1, x2 = make(name)
    whole = contract.prepare

    def small(gradients, x, known, plan, advance=None):
        if plan.tile > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(gradients, x, known, plan, advance)

    monkeypatch.setattr("ntkit.jacobian.strip.prepare", small)
    kernel = ntkit.TangentKernel(model, memory="1 MB")
    assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2), 1e-10, "k(x1, x2)")
    kernel = ntkit.TangentKernel(model, memory="1 MB")
    assert_equal(kernel(x1), tangent_kernel(model, x1), 1e-10, "k(x1)")
    own = torch.arange(7)
    kernel = ntkit.TangentKernel(model, memory="1 MB")
    assert_equal(kernel.diagonal(x1), tangent_kernel(model, x1)[own, own], 1e-10, "diagonal")


def test_out_of_memory_on_single_samples_is_said(monkeypatch):
    def never(*rest):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("ntkit.jacobian.strip.prepare", never)
    model, x1, _ = make("mlp")
    with pytest.raises(torch.OutOfMemoryError):
        ntkit.TangentKernel(model, memory=1)(x1)


@pytest.mark.parametrize("outputs", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "attention, batch first", "experts", "no rule", "positions"])
def test_any_tiling_gives_the_same(name, outputs, monkeypatch):
    """The values under every budget, the laws under every way to cut the work into tiles that they lead to."""
    monkeypatch.setattr(planning, "_BLOCK", {"cpu": 9 * 3})
    model, x1, x2 = make(name)
    exact, own, ways = tangent_kernel(model, x1, x2, outputs), tangent_kernel(model, x1, None, outputs), []
    for memory in (1, 3000, 20000, 200_000, "1 MB"):
        kernel = ntkit.TangentKernel(model, outputs=outputs, memory=memory)
        assert_equal(kernel(x1, x2), exact, 1e-10, f"memory {memory}")
        assert_equal(kernel(x1), own, 1e-10, f"memory {memory}")
        way = [replace(kernel.plan(*sets), scratch=0) for sets in ((x1, x2), (x1,))]
        if way not in ways:
            ways.append(way)
            check_kernel(kernel, x1, x2)
    assert len(ways) > 1


def test_a_small_budget_makes_small_tiles():
    model, x1, x2 = make("mlp")
    assert ntkit.TangentKernel(model, memory=2000).plan(x1, x2).tile < 7
    assert ntkit.TangentKernel(model, memory="1 GB").plan(x1, x2).tile == 7


def test_linear_model_is_the_gram_matrix_of_inputs():
    x = vectors(6)
    K = ntkit.TangentKernel(nn.Linear(5, 2, bias=False).double())(x)
    assert_equal(K, torch.einsum("ij,cd->ijcd", x @ x.T, torch.eye(2).double()), 1e-12, "X X^T (x) I")


def test_trace_is_a_sum_and_sum_is_scaled_by_outputs():
    model, x1, x2 = make("mlp")
    full = ntkit.TangentKernel(model)(x1, x2)
    assert_equal(
        ntkit.TangentKernel(model, outputs="trace")(x1, x2), full.diagonal(dim1=2, dim2=3).sum(-1), 1e-12, "trace"
    )
    assert_equal(ntkit.TangentKernel(model, outputs="sum")(x1, x2), full.sum((2, 3)) / 3, 1e-12, "sum")


def test_parameters_are_selected_by_name_predicate_and_grad():
    model, x1, x2 = make("mlp")
    shares = ntkit.TangentKernel(model).layers(x1, x2)
    for params in (
        ["0.weight", "2.bias"],
        lambda name: name in ("0.weight", "2.bias"),
        lambda name, p: name in ("0.weight", "2.bias"),
    ):
        K = ntkit.TangentKernel(model, params=params)(x1, x2)
        assert_equal(K, shares["0.weight"] + shares["2.bias"], 1e-10, "chosen")
    model[0].requires_grad_(False)
    rest = sum(v for name, v in shares.items() if not name.startswith("0."))
    assert_equal(ntkit.TangentKernel(model)(x1, x2), rest, 1e-10, "frozen layers are left out")
    assert_equal(ntkit.TangentKernel(model, params=["0.weight"])(x1, x2), shares["0.weight"], 1e-10, "unless named")
    assert not model[0].weight.requires_grad


def test_one_sample_and_unused_parameters():
    model = tiny_mlp()
    model.spare = nn.Linear(2, 2).double()

    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net[2](self.net[1](self.net[0](x)))

    x = vectors(1)
    kernel = ntkit.TangentKernel(Partial())
    assert_equal(kernel(x), tangent_kernel(Partial(), x), 1e-10, "one sample")
    assert kernel.layers(x)["net.spare.weight"].abs().max() == 0


def test_compiled_and_wrapped_input_types():
    model, x1, x2 = make("mlp")
    exact = tangent_kernel(model, x1, x2)
    strided = torch.stack([x1, x1], -1)[..., 0]
    assert not strided.is_contiguous()
    assert_equal(ntkit.TangentKernel(model)(strided, x2), exact, 1e-10, "non-contiguous")
    assert_equal(ntkit.TangentKernel(nn.DataParallel(model))(x1, x2), exact, 1e-10, "DataParallel")


def test_operator_works_with_scipy():
    from scipy.sparse.linalg import eigsh

    model, x1, _ = make("mlp")
    operator = ntkit.TangentKernel(model).operator(x1)
    top = eigsh(operator.to_scipy(), k=2, return_eigenvectors=False)
    K = tangent_kernel(model, x1).permute(0, 2, 1, 3).reshape(21, 21)
    assert_equal(torch.as_tensor(top), torch.linalg.eigvalsh(K)[-2:], 1e-10, "eigsh")


@pytest.mark.parametrize("name", ["mlp", "transformer", "tied", "adapters", "experts", "no rule"])
def test_products_with_the_jacobian(name):
    model, x1, _ = make(name)
    kernel = ntkit.TangentKernel(model)
    exact = jacobian(model, x1)
    shapes = {parameter: p.shape for parameter, p in model.named_parameters() if parameter in exact}
    u = {parameter: torch.randn(shape).double() for parameter, shape in shapes.items()}
    v = torch.randn(next(iter(exact.values())).shape[:2]).double()
    expected = sum(exact[parameter] @ u[parameter].flatten() for parameter in exact)
    assert_equal(kernel.jvp(x1, u), expected, 1e-10, "J u")
    one = next(iter(exact))
    assert_equal(kernel.jvp(x1, {one: u[one]}), exact[one] @ u[one].flatten(), 1e-10, "others at rest")
    pulled = kernel.vjp(x1, v)
    scale = max(float(p.abs().max()) for p in pulled.values())
    for parameter, values in exact.items():
        error = (pulled[parameter].flatten() - torch.einsum("ncp,nc->p", values, v)).abs().max()
        assert error <= 1e-10 * scale, parameter
    with pytest.raises(ntkit.Refused, match="cotangent"):
        kernel.vjp(x1, v[:, :0])
    with pytest.raises(ntkit.Refused, match="parameter's name"):
        kernel.jvp(x1, {"nothing": v})
    with pytest.raises(ntkit.Refused, match="shape"):
        kernel.jvp(x1, {one: v[None, None]})


@pytest.mark.parametrize(("node", "parameter"), [("AddmmBackward0", "0.weight"), ("ConvolutionBackward0", "0.weight")])
def test_self_check_names_the_parameter_whose_gradient_is_wrong(node, parameter, monkeypatch):
    model, x1, _ = make("mlp" if node.startswith("Add") else "conv")
    true = rules.RULES[node]

    def wrong(use, owner, n, cot):
        return true(use, owner, n, cot * 1.001 if use.params == (parameter,) else cot)

    monkeypatch.setitem(rules.RULES, node, wrong)
    with pytest.raises(SelfCheckError, match=f"parameter '{parameter}' differs from plain autograd"):
        ntkit.TangentKernel(model)(x1)


def test_self_check_catches_a_gradient_the_graph_does_not_show(monkeypatch):
    model, x1, _ = make("mlp")
    monkeypatch.setattr(
        "ntkit.jacobian.self_check.find_uses", lambda *a: [use for use in find_uses(*a) if use.params != ("2.bias",)]
    )
    with pytest.raises(SelfCheckError, match=r"2\.bias"):
        ntkit.TangentKernel(model)(x1)


class Rounded(nn.Module):
    """An MLP whose hidden units are rounded down in batches of one, up in larger ones, as PyTorch's sums may be.

    `kink`: where units are zero; units of a sample that are zero up to rounding are on two sides of it.
    """

    def __init__(self, kind: str, fallback: bool = False, alone: float = -1.0, change: str = ""):
        super().__init__()
        self.first, self.last, self.kind, self.alone, self.change = (
            nn.Linear(5, 6),
            nn.Linear(6, 2),
            kind,
            alone,
            change,
        )
        self.mix = nn.Parameter(torch.linspace(0, 1, 6)) if fallback else None
        self.register_buffer("kink", torch.zeros(6))

    def hidden(self, x):
        h = self.first(x)
        return h if self.mix is None else torch.lerp(h, torch.sin(h), self.mix)  # which has no rule

    def forward(self, x):
        h = self.hidden(x) - self.kink
        h = h + (self.alone if len(x) == 1 else 1) * 8 * torch.finfo(h.dtype).eps
        if self.change == "size":
            h = h.detach() + len(x) * (h - h.detach())
        elif self.change and h.requires_grad:
            h.register_hook({"mean": lambda g: g - g.mean(0) / 2, "hook": lambda g: g * len(g)}[self.change])
        h = F.relu(h) if self.kind == "relu" else F.max_pool1d(torch.stack([h, torch.zeros_like(h)], 2), 2)[:, :, 0]
        return self.last(h)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("fallback", [False, True], ids=["rules", "fallback"])
@pytest.mark.parametrize("kind", ["relu", "max_pool"])
def test_a_sample_whose_units_are_zero_up_to_rounding_has_a_kernel(kind, fallback, place):
    """Alone it is on the other side of the kink: gradients differ, neither is wrong, and a batch has its own."""
    torch.manual_seed(0)
    model, x = Rounded(kind, fallback).double(), torch.randn(5, 5).double()
    with torch.no_grad():
        model.kink[:] = model.hidden(x)[place]
    rules = ["first.weight", "first.bias", "last.weight", "last.bias"]
    one_by_one = tangent_kernel(model, x, params=rules)
    expected = tangent_kernel(model, x, params=["mix"]) if fallback else 0  # what has no rule is computed one by one
    model.alone = 1.0
    together = tangent_kernel(model, x, params=rules)
    model.alone = -1.0
    assert (one_by_one - together).abs().max() > 1e-2 * together.abs().max()
    kernel = ntkit.TangentKernel(model)
    assert_equal(kernel(x), together + expected, 1e-10, "kernel")
    assert set(kernel.fallback(x)) == ({"mix"} if fallback else set())


@pytest.mark.parametrize("change", ["size", "mean", "hook"])
@pytest.mark.parametrize("at_kink", [False, True])
def test_gradients_that_depend_on_the_batch_are_refused_at_a_kink_as_elsewhere(change, at_kink):
    torch.manual_seed(0)
    model, x = Rounded("relu", change=change).double(), torch.randn(5, 5).double()
    if at_kink:
        model.kink[:] = model.hidden(x)[0].detach()
    with pytest.raises((Refused, SelfCheckError), match="gradient"):
        ntkit.TangentKernel(model)(x)


def test_dead_layers_are_right_and_come_alive():
    """A zero-initialised output layer hides which rows belong to whom; the result must still be exact."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2), nn.Flatten()).double()
    nn.init.zeros_(model[2].weight)
    x1, x2 = torch.randn(5, 3, 5).double(), torch.randn(4, 3, 5).double()
    kernel = ntkit.TangentKernel(model)
    assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2), 1e-10, "dead")
    nn.init.normal_(model[2].weight)
    assert_equal(kernel(x1, x2), tangent_kernel(model, x1, x2), 1e-10, "alive again")


def test_comparison_fails_on_ten_times_its_tolerance():
    K = torch.rand(3, 3).double()
    K[0, 0] = 1
    with pytest.raises(AssertionError, match="error"):
        assert_equal(K + 1e-9 * torch.eye(3), K, 1e-10, "perturbed")
    with pytest.raises(AssertionError):
        assert_equal(torch.full((3, 3), torch.nan), K, 1e-10, "nan")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", CASES)
def test_gpu_equals_the_oracle(name):
    model, x1, x2 = make(name)
    exact = tangent_kernel(model, x1, x2)

    def move(x):
        if isinstance(x, dict):
            return {k: move(v) for k, v in x.items()}
        return tuple(map(move, x)) if isinstance(x, tuple) else x.cuda()

    assert_equal(ntkit.TangentKernel(model.cuda())(move(x1), move(x2)).cpu(), exact, 1e-10, "GPU float64")


class Cells(nn.Module):
    """A step after the other, the state of a cell after the last one, as an output or as a later input."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell, self.head = kind(3, 4, **options), nn.Linear(4, 2)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[1] * state[0] if isinstance(state, tuple) else state)


RECURRENT = {
    "LSTM": lambda: nn.LSTM(3, 4, batch_first=True),
    "LSTM, both directions, two layers": lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(3, 4, batch_first=True, proj_size=2),
    "GRU, both directions, two layers": lambda: nn.GRU(3, 4, 2, batch_first=True, bidirectional=True),
    "LSTM without biases": lambda: nn.LSTM(3, 4, batch_first=True, bias=False),
    "LSTM cells": lambda: Cells(nn.LSTMCell),
    "GRU cells": lambda: Cells(nn.GRUCell),
    "GRU cells without biases": lambda: Cells(nn.GRUCell, bias=False),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("frozen", [None, "weight", "weight_hh"])
@pytest.mark.parametrize("name", RECURRENT)
def test_fused_cells_on_a_gpu(name, frozen):
    """Their biases have a rule: nothing is computed sample by sample."""
    torch.manual_seed(0)
    model, x = RECURRENT[name]().double(), torch.randn(5, 3, 3, dtype=torch.float64)
    for p_name, p in model.named_parameters():
        p.requires_grad_(frozen is None or frozen not in p_name or "head" in p_name)
    if not any(p.requires_grad for p in model.parameters()):
        return
    last = None if isinstance(model, Cells) else lambda out: out[0][:, -1]
    exact = ntkit.TangentKernel(model, "full", select=last)(x)
    kernel = ntkit.TangentKernel(copy.deepcopy(model).cuda(), "full", select=last)
    assert_equal(kernel(x.cuda()).cpu(), exact, 1e-12, name)
    assert kernel.fallback(x.cuda()) == {}


@pytest.mark.parametrize("name", ["mlp", "conv", "tied", "attention, batch first", "experts", "no rule"])
def test_one_plan_serves_many_tiles_and_decides_their_bits(name):
    """A tile has the same bits whoever computes it, whatever was computed before, however much memory is free."""
    model, x1, _ = make(name)
    first = ntkit.TangentKernel(model, outputs="trace")
    plan = first.plan(x1)
    exact = tangent_kernel(model, x1, None, "trace")
    cut, rest = slice(0, 4), slice(4, 7)
    tiles = [first.tile(take(x1, cut), take(x1, rest), plan), first.tile(take(x1, cut), None, plan)]
    assert_equal(tiles[0], exact[cut, rest], 1e-10, "tile")
    assert_equal(tiles[1], exact[cut, cut], 1e-10, "tile on the diagonal")
    other = ntkit.TangentKernel(model, outputs="trace", memory=20_000)
    other(take(x1, slice(1, 3)))
    assert str(other.plan(x1)) != str(plan)
    assert torch.equal(other.tile(take(x1, cut), take(x1, rest), plan), tiles[0])
    assert torch.equal(other.tile(take(x1, cut), None, plan), tiles[1])


class Rare(nn.Module):
    """Uses its weight once more where a sample is extreme."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        y = self.layer(x)
        extreme = (x[:, :1] > 10).to(x)
        return y + extreme * (x.sin() @ self.layer.weight.T).square() if extreme.any() else y


def test_a_plan_made_before_serves_a_graph_that_changes():
    """The weight goes to the fallback route; the bias, planned to share its products, must not go with it."""
    model, x = Rare().double(), vectors(7)
    kernel = ntkit.TangentKernel(model)
    plan = kernel.plan(x)
    assert plan.route("layer.bias") == "shared"
    x = x.clone()
    x[4, 0] = 20
    assert_equal(kernel.tile(x, None, plan), tangent_kernel(model, x), 1e-10, "tile")


def test_a_plan_is_refused_where_it_does_not_fit_and_raises_where_memory_ends(monkeypatch):
    model, x = tiny_mlp(), vectors(7)
    kernel = ntkit.TangentKernel(model)
    with pytest.raises(Refused, match="plan: got a plan of other parameters"):
        kernel.tile(x, None, ntkit.TangentKernel(nn.Linear(5, 3).double()).plan(x))
    plan = kernel.plan(x)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(strip, "prepare", full)
    with pytest.raises(torch.OutOfMemoryError):  # under a given plan another try would be the same
        kernel.tile(x, None, plan)


def test_a_mapping_of_names_selects_by_its_names():
    model, x = tiny_mlp(), vectors(4)
    exact = ntkit.TangentKernel(model, params=["0.weight"])(x)
    assert torch.equal(ntkit.TangentKernel(model, params={"0.weight": None})(x), exact)
    with pytest.raises(Refused, match="params: got no parameter"):
        ntkit.TangentKernel(model, params={})


def test_the_number_of_stored_plans_is_limited():
    kernel, x = ntkit.TangentKernel(tiny_mlp(), memory="1 MB"), vectors(20)
    for n in range(1, 10):
        for m in range(1, 10):
            kernel(x[:n], x[:m])
    assert len(kernel._engine._plans) == engine._PLANS
