"""Gradient flow from the top of the spectrum, against all eigenvectors, with its bound."""

from __future__ import annotations

import math

import pytest
import torch
from streamed_gram import StreamedGram
from torch import Tensor, nn

import ntkit
import ntkit.gram.gram_matrix as gram_matrix
from ntkit.machines.flow import GradientFlow
from ntkit.machines.modes import Modes, filters
from ntkit.machines.tail import Tail

N, M, K_TOP = 293, 29, 12
TIMES = torch.tensor([0.0, 0.3, 3.0, 30.0, 300.0, 3000.0, 3e4])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K, K_test and targets of both, two outputs; twelve eigenvalues hold about three quarters of the trace."""
    x = draw(N + M, 5)
    K = torch.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 10).to(dtype)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], dim=1) + 0.3 * draw(N + M, 2, seed=1)
    return K[:N, :N].contiguous(), K[N:, :N].contiguous(), y[:N], y[N:]


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(gram_matrix, "free_memory", lambda device: 0)


@pytest.mark.parametrize("lr", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_flow_of_all_eigenvectors_within_its_bound(lr, dtype):
    K, K_test, y, _ = problem(dtype)
    times = TIMES if lr is None else TIMES.ceil()
    exact = GradientFlow(lr).fit(K.double(), y, initial=0.1 * y)
    flow = GradientFlow(lr, k=K_TOP).fit(StreamedGram(K), y, initial=0.1 * y)
    assert flow.status_ == "solved"
    assert flow.eigenvalues_.shape == (K_TOP,)
    assert torch.allclose(flow.eigenvalues_, exact.eigenvalues_[:K_TOP], rtol=1e-10)
    off = (flow.predict(K_test, times) - exact.predict(K_test, times)).abs()
    bound = flow.error_bound(K_test, times)
    assert bound.shape == off.shape
    assert bool((off <= bound + 1e-10).all())
    train = (flow.predict_train(times) - exact.predict_train(times)).norm(dim=1)
    sure = flow.error_bound(None, times)[:, 0]
    assert bool((train <= sure + 1e-10).all())
    # the bound is of use well beyond the time at which the first eigenvector left out is learned
    next_rate = float(exact.eigenvalues_[K_TOP])
    early = times * (1 if lr is None else lr) * next_rate < 3
    assert early.sum() >= 4
    assert float(bound[early].max()) < 1e-2
    assert float(sure[early].max()) < 1e-2 * float(y.norm())
    # and honest: later there is an error that can be seen, at a bound above it
    assert float(off[-1].max()) > 1e-3
    assert float(flow.cost(times[2])) == pytest.approx(float(exact.cost(times[2])), rel=1e-8)


def test_the_bound_of_the_polynomials_is_that_of_the_worst_eigenvalue():
    # on a diagonal matrix the tail is a set of single eigenvalues: the error of r and phi at each is seen alone
    rates = torch.cat([torch.tensor([5.0, 4.0]), torch.linspace(0, 2, 401)]).double()
    n = len(rates)
    K, one = torch.diag(rates * n), torch.ones(n, 1, dtype=torch.float64)
    vectors = torch.eye(n, dtype=torch.float64)[:, :2]
    phases = lambda r, t: filters(r, t, None, 0.0)
    tail = Tail(ntkit.Gram(K), vectors, n * torch.tensor([5.0, 2.0]).double(), 0.0, 1e9, 0.0, one, phases, None)
    assert tail.rate == pytest.approx(2.0)
    times = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 40.0]).double()
    left, done = phases(rates[2:], times)
    found = torch.einsum("td,dnc->tnc", tail.done(times), tail.blocks)[:, 2:, 0]
    size = (n - 2) ** 0.5
    for worst, bound in (
        ((tail.left(times)[:, 2:, 0] - left).abs().amax(1), tail.left_error(times)[:, 0] / size),
        ((found - done).abs().amax(1), tail._weights(times, 1)[1]),
    ):
        assert bool((worst <= bound + 1e-12).all())
        # neither is far from the other until the trivial bound takes over
        assert bool((bound[1:6] <= 30 * worst[1:6] + 1e-12).all())
    assert bool((tail.left_error(times)[:, 0] <= 1.6 * size).all())


def test_the_bound_counts_pairs_that_are_not_exact(monkeypatch):
    """The first vector turned a little to one outside the pairs: the bound of exact pairs no longer holds."""
    K, K_test, y, _ = problem()
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(K))
    exact, small = GradientFlow().fit(K, y), []
    for angle in (0.0, 1e-3):
        V = vectors[:, :K_TOP].clone()
        V[:, 0] = math.cos(angle) * V[:, 0] + math.sin(angle) * vectors[:, K_TOP + 3]
        own = (V * (K @ V)).sum(0)
        defect = float((K @ V - V * own).norm())
        assert defect == pytest.approx(angle * float(values[0] - values[K_TOP + 3]), rel=1e-4, abs=1e-9)
        pairs = Modes(own, V, defect, float(values.norm()), float(K.trace() - own.sum()))
        monkeypatch.setattr("ntkit.machines.flow.decomposed", lambda *_, pairs=pairs: pairs)
        flow, times = GradientFlow(k=K_TOP).fit(K, y), TIMES[1:4]
        off = (flow.predict(K_test, times) - exact.predict(K_test, times)).abs()
        train = (flow.predict_train(times) - exact.predict_train(times)).norm(dim=1)
        bound, sure = flow.error_bound(K_test, times), flow.error_bound(None, times)[:, 0]
        assert bool((off <= bound + 1e-10).all())
        assert bool((train <= sure + 1e-10).all())
        small.append((bound, sure))
    assert bool((off > small[0][0]).any())  # so it could not be left out
    assert bool((train > small[0][1]).any())


def test_nothing_is_read_but_products_and_no_more_for_more_times(no_room):
    K, K_test, y, _ = problem()
    gram = StreamedGram(K)
    flow = GradientFlow(k=K_TOP).fit(gram, y)
    spectrum = StreamedGram(K)
    ntkit.spectrum(spectrum, K_TOP)
    assert gram.rows_read == 0
    assert gram.products == spectrum.products + 8
    flow.predict(K_test, TIMES)
    flow.best_time(K_test, K_test @ y)
    assert gram.products == spectrum.products + 8


def test_the_best_time_is_that_of_all_eigenvectors(no_room, monkeypatch):
    K, K_test, y, y_test = problem()
    flow = GradientFlow(k=60).fit(K, y)
    best = flow.best_time(K_test, y_test)
    monkeypatch.undo()
    exact = GradientFlow().fit(K, y)
    wanted = exact.best_time(K_test, y_test)
    assert wanted.bound == 0
    true = float((exact.predict(K_test, best.t) - y_test).square().sum()) / (2 * M)
    assert abs(best.error - true) <= best.bound + 1e-12
    assert best.bound < 1e-2 * best.error
    assert wanted.error * (1 - 1e-9) <= true <= wanted.error + 2 * best.bound  # as good a time, to the bound
    few = GradientFlow(k=2).fit(K, y).best_time(K_test, y_test)  # too few: said by the bound
    true = float((exact.predict(K_test, few.t) - y_test).square().sum()) / (2 * M)
    assert abs(few.error - true) <= few.bound
    assert few.bound > best.bound


def test_the_end_of_training_has_no_bound_at_test_points(no_room):
    K, K_test, y, _ = problem()
    flow = GradientFlow(k=K_TOP).fit(K, y)
    assert bool(flow.error_bound(K_test).isinf().all())
    assert bool(flow.predict(K_test).isfinite().all())
    at_end = flow.error_bound(None)
    assert bool(at_end.isfinite().all())
    left = flow.predict_train(float("inf")) - y  # all eigenvectors leave nothing
    assert bool((left.norm(dim=0) <= at_end[0] + 1e-9).all())


def test_of_a_matrix_of_low_rank_nothing_is_left(no_room):
    phi, phi_test, y = draw(60, 4), draw(9, 4, seed=1), draw(60, 2, seed=2)
    flow = GradientFlow(k=6).fit(phi @ phi.T, y)
    least = phi_test @ torch.linalg.pinv(phi) @ y  # ridgeless regression
    assert torch.allclose(flow.predict(phi_test @ phi.T), least, atol=1e-10)
    assert float(flow.error_bound(phi_test @ phi.T, 5.0).max()) < 1e-9
    assert torch.allclose(flow.predict_train(float("inf")), phi @ torch.linalg.pinv(phi) @ y, atol=1e-10)


def test_of_an_operator(no_room):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, y = draw(80, 3), draw(80, seed=1)
    kernel = ntkit.TangentKernel(model, outputs="trace")
    K = kernel(x)
    flow = GradientFlow(k=9).fit(kernel.operator(x), y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_matrix, "free_memory", lambda device: 1 << 40)
        exact = GradientFlow().fit(K, y)
    off = (flow.predict(K, 2.0) - exact.predict(K, 2.0)).abs()
    assert bool((off <= flow.error_bound(K, 2.0) + 1e-10).all())
    assert float(flow.error_bound(K, 2.0).max()) < 1e-2
    with pytest.raises(ntkit.Refused, match="GradientFlow"):
        GradientFlow().fit(kernel.operator(x), y)


def test_refusals(no_room):
    K, K_test, y, _ = problem()
    with pytest.raises(ntkit.Refused, match="all eigenvectors of 293 points"):
        GradientFlow().fit(StreamedGram(K), y)
    for k in (0, 2.5, True):
        with pytest.raises(ntkit.Refused, match="k: got"):
            GradientFlow(k=k)
    with pytest.raises(ntkit.Refused, match="momentum"):
        GradientFlow(lr=0.1, momentum=0.5, k=3)
    with pytest.raises(ntkit.Refused, match="a loss"):
        GradientFlow(loss=nn.functional.mse_loss, k=3)
    with pytest.raises(ntkit.Refused, match="at most 293"):
        GradientFlow(k=294).fit(K, y)
    with pytest.raises(ntkit.Refused, match="top 3 eigenvectors"):
        GradientFlow(k=3).fit(K, y).ensemble(
            K_test, nngp_train=K, nngp_test_train=K_test, nngp_test_test=torch.ones(M), t=1.0
        )
