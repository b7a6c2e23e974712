"""Tables of activations: made once, as exact as they say; the limit has the same bits under any number of workers."""

from __future__ import annotations

import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from infinite_oracle import Act
from torch import nn

from ntkit import InfiniteKernel
from ntkit.kernels.infinite import limit_tiles, quadrature

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(40, 6, generator=DRAW, dtype=torch.float64)
W, B = 1.4, 0.1


def mlp(function):
    return nn.Sequential(nn.Linear(6, 8), Act(function), nn.Linear(8, 8), Act(function), nn.Linear(8, 1))


@pytest.fixture
def made(monkeypatch):
    """Names of the tables made since; none is known at the start."""
    computed, names = quadrature._computed, []

    def counted(function, low, high):
        names.append((low, high))
        return computed(function, low, high)

    monkeypatch.setattr(quadrature, "_TABLES", type(quadrature._TABLES)())
    monkeypatch.setattr(quadrature, "_computed", counted)
    return names


def test_one_table_serves_all_layers_and_kernels(made):
    function = lambda z: torch.tanh(0.9 * z)
    wanted = InfiniteKernel(mlp(function), "ntk", W, B)(X)
    assert len(made) == 1
    assert torch.equal(InfiniteKernel(mlp(lambda z: torch.tanh(z * 0.9)), "ntk", W, B)(X), wanted)
    InfiniteKernel(mlp(function), "nngp", W, B).diagonal(1.1 * X)
    assert len(made) == 1


def test_threads_at_once_make_one_table(made):
    found, start = [], threading.Barrier(3)

    def work():
        start.wait()
        found.append(InfiniteKernel(mlp(F.elu), "ntk", W, B)(X))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 3
    assert all(torch.equal(one, found[0]) for one in found)


def test_the_number_of_tables_is_bounded(monkeypatch):
    monkeypatch.setattr(quadrature, "_TABLES", type(quadrature._TABLES)())
    monkeypatch.setattr(quadrature, "_computed", lambda function, low, high: (low, high))
    for i in range(2 * quadrature._KEPT):
        quadrature._table(str(i % (quadrature._KEPT + 3)), torch.tanh, -1, 1)
    assert len(quadrature._TABLES) == quadrature._KEPT


def plane_integrals(function, slope, a, b, rho):
    """Correlations of values and of slopes by the trapezoidal rule in Cartesian coordinates."""
    z = torch.arange(-9.5, 9.5, 0.02, dtype=torch.float64)
    density = torch.exp(-z * z / 2) * 0.02 / math.sqrt(2 * math.pi)
    u = math.sqrt(a) * z
    v = math.sqrt(b) * (rho * z[:, None] + math.sqrt(1 - rho * rho) * z)
    found = []
    for f in (function, slope):
        squares = (f(u).square() @ density) * (f(math.sqrt(b) * z).square() @ density)
        found.append(((f(u) * density) @ f(v) @ density) / squares.sqrt())
    return torch.stack(found)


SMOOTH = {
    "tanh": (torch.tanh, lambda z: torch.cosh(z) ** -2),
    "softplus": (F.softplus, torch.sigmoid),
    "z tanh z": (lambda z: z * torch.tanh(z), lambda z: torch.tanh(z) + z * torch.cosh(z) ** -2),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_a_table_is_as_exact_as_it_says(name):
    function, slope = SMOOTH[name]
    variances = torch.tensor([0.3, 0.9, 2.1, 4.0], dtype=torch.float64)
    table = quadrature.Tabulated(function, name)
    state = [t.reshape(*t.shape[:-1], 1, 1, -1) for t in table.state(variances)]
    one, two = [t[..., None] for t in state], [t[..., None, :] for t in state]
    scale = (variances[:, None] * variances).sqrt()
    assert table.error < 1e-12
    for rho in (-0.97, -0.2, 0.0, 0.4, 0.93, 0.9999):
        K, T = (rho * scale)[None, None].clone(), torch.ones(1, 1, 4, 4, dtype=torch.float64)
        pairs = [t[..., None].clone() for t in (rho * variances[None, None], torch.ones(1, 1, 4).double())]
        table.apply(K, T, tuple(one), tuple(two))
        table.apply(*pairs, tuple(one), tuple(one))
        values, slopes = (s.sqrt() for s in table.diagonal(variances))
        got = torch.stack([K[0, 0] / (values[:, None] * values), T[0, 0] / (slopes[:, None] * slopes)])
        for i, a in enumerate(variances.tolist()):
            wanted = [plane_integrals(function, slope, a, b, rho) for b in variances.tolist()]
            assert float((got[:, i] - torch.stack(wanted, 1)).abs().max()) < 1e-12
        for whole, pair in zip((K, T), pairs, strict=True):
            torch.testing.assert_close(whole[0, 0].diagonal(), pair[0, 0, :, 0], rtol=1e-13, atol=1e-15)


def test_a_table_of_many_kinks_says_how_inexact_it_is():
    function = lambda z: torch.sin(z).clamp(-0.5, 0.5)
    table = quadrature.Tabulated(function, "")
    variances = torch.tensor([0.3, 1.1, 4.0], dtype=torch.float64)
    table.state(variances)
    slope = lambda z: torch.cos(z) * (torch.sin(z).abs() < 0.5)
    a, b = (t.flatten() for t in torch.meshgrid(variances, variances, indexing="ij"))
    worst = 0.0
    for rho in (-0.9, 0.0, 0.5, 0.95):
        got = table._table.correlations(a, b, torch.full_like(a, math.acos(rho)))
        wanted = [plane_integrals(function, slope, *at, rho) for at in zip(a.tolist(), b.tolist(), strict=True)]
        worst = max(worst, float((got - torch.stack(wanted, 1)).abs().max()))
    assert 1e-6 < worst < 2 * table.error


class Twice(nn.Module):
    """One layer at two depths, behind a norm over the batch or none."""

    def __init__(self, norm=False):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8) if norm else None

    def forward(self, x):
        h = self.inner(torch.tanh(self.inner(torch.tanh(self.first(x)))))
        return self.last(torch.tanh(h) if self.norm is None else torch.relu(self.norm(h)))


class Tags(nn.Module):
    """A value per position, of positions weighted by numbers of the input."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, x):
        x = x.reshape(-1, 3, 2)
        return self.last(torch.softmax(x @ x.transpose(1, 2), -1) @ torch.tanh(self.first(x)))


def images(*end):
    return nn.Sequential(nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 8, 1), nn.Tanh(), *end)


def calls(k):
    return k, lambda x: k(x, x[:2]), k.diagonal, lambda x: k.paired(x, x.flip(0))


TOLD = {
    "layers": (lambda: mlp(torch.tanh), calls),
    "positions": (lambda: images(nn.Conv2d(8, 1, 1)), lambda k: (*calls(k), k.positions)),
    "a walk over positions": (
        lambda: images(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)), lambda k: (*calls(k), k.positions)
    ),
    "weights of each sample's own": (Tags, lambda k: (*calls(k), k.positions)),
    "shared weights": (Twice, calls),
    "a norm over the batch": (lambda: Twice(norm=True), lambda k: (k,)),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_every_call_tells_of_an_inexact_table(name, monkeypatch):
    """Once for a table; those of smooth functions are so exact that the threshold is lowered."""
    make, of_kernel = TOLD[name]
    kernel = InfiniteKernel(make().double(), "ntk", W, B)
    of_kernel(kernel)[0](X[:4])
    assert 0 < kernel.error < 1e-9
    monkeypatch.setattr(limit_tiles, "_INEXACT", 0.0)
    for call in of_kernel(kernel):
        with pytest.warns(UserWarning, match=r"its kernel is computed with a relative error of"):
            call(X[:4])
    monkeypatch.setattr(limit_tiles, "_INEXACT", 2 * kernel.error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in of_kernel(kernel):
            call(X[:4])


def conv(inputs):
    return nn.Conv2d(inputs, 8, 3, padding=1)


POOL = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
NETWORKS = {
    "dense": (lambda: mlp(F.softplus), (600, 6)),
    "global pool": (lambda: nn.Sequential(conv(2), nn.ReLU(), conv(8), nn.GELU(), *POOL), (7, 2, 5, 4)),
    "pools": (lambda: nn.Sequential(conv(2), nn.ELU(), nn.AvgPool2d(2), conv(8), nn.ReLU(), *POOL), (40, 2, 4, 4)),
    "flatten": (lambda: nn.Sequential(conv(2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 1)), (70, 2, 4, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_workers_gives_the_same_bits(name, made):
    make, shape = NETWORKS[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            quadrature._TABLES.clear()  # so that each number of workers computes the tables
            kernel = InfiniteKernel(make(), "ntk", W, B)
            found.append((kernel(x), kernel(x, x[:9]), kernel.diagonal(x), kernel.paired(x, x.flip(0))))
            assert torch.get_num_threads() == number
            elsewhere = []
            thread = threading.Thread(target=lambda seen=elsewhere: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert elsewhere == [number]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            assert torch.equal(got, wanted)
