"""Ridge regression and Gaussian processes from products with K alone, against dense float64 solves."""

from __future__ import annotations

import pytest
import torch
from streamed_gram import LargestTensor, StreamedGram
from torch import Tensor, nn

import ntkit
import ntkit.gram.gram_matrix as gram_matrix
import ntkit.machines.conjugate_gradients as cg
from ntkit.gram.pivoted_cholesky import pivoted_cholesky

N = 397


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rbf(x: Tensor, z: Tensor | None = None, scale: float = 5.0) -> Tensor:
    z = x if z is None else z
    return torch.exp(-((x[:, None] - z[None]) ** 2).sum(-1) / scale)


def problem(dtype: torch.dtype = torch.float64, n: int = N, m: int = 31) -> tuple[Tensor, Tensor, Tensor]:
    """K, Y with three outputs, K_test; eigenvalues of K fall over ten decades."""
    x = draw(n + m, 3)
    y = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2], x.norm(dim=1)], dim=1) + 0.1 * draw(n + m, 3, seed=1)
    K = rbf(x).to(dtype)
    return K[:n, :n].contiguous(), y[:n], K[n:, :n].contiguous()


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(gram_matrix, "free_memory", lambda device: 0)


# ---------------------------------------------------------------------- the low-rank part


def test_the_low_rank_part_leaves_a_positive_matrix_of_the_trace_it_says():
    K = problem()[0]
    values = torch.linalg.eigvalsh(K).flip(0)
    for rank in (7, 40, 120):
        F, left = pivoted_cholesky(ntkit.Gram(K), rank, 0.0)
        rest = K - F.T @ F
        assert F.shape == (rank, N)
        assert float(rest.trace()) == pytest.approx(left, rel=1e-9, abs=1e-12)
        assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-12
        # no matrix of that rank leaves less; on average at most twice what rank k leaves, where
        # rank >= k + k log(trace / what rank k leaves) (Chen et al. 2022, theorem 5.1)
        tails = values.sum() - values.cumsum(0)
        k = torch.arange(1, N + 1)
        sure = k[k * (1 + (values.sum() / tails.clamp(min=1e-12)).log()) <= rank]
        assert float(tails[rank - 1]) * (1 - 1e-6) <= left <= 2 * float(tails[sure.max() - 1])
    assert torch.equal(F, pivoted_cholesky(ntkit.Gram(K), 120, 0.0)[0])


def test_points_are_drawn_as_one_by_one():
    # the chance that the second point is j given the first i is proportional to the diagonal left, K_jj - K_ij^2/K_ii
    x = torch.tensor([[0.0], [0.3], [2.0], [2.1], [5.0]], dtype=torch.float64)
    K = rbf(x, scale=1.0)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        left = (K.diagonal() - K[i] ** 2 / K[i, i]).clamp(min=0)
        expected[i] = left / left.sum() / 5
    counts, draws = torch.zeros(5, 5, dtype=torch.float64), torch.Generator().manual_seed(7)
    for _ in range(4000):
        thresholds = torch.rand(60, dtype=torch.float64, generator=draws)
        points = torch.randint(5, (60,), generator=draws)
        inside = K[points][:, points]
        kept, lower = cg_kept(inside, thresholds * inside.diagonal())
        counts[points[kept[0]], points[kept[1]]] += 1
        chosen = inside[kept][:, kept]
        assert torch.allclose(lower @ lower.T, chosen, atol=1e-12)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((counts / 4000 - expected).abs() <= 4.5 * error + 1e-12).all())


def cg_kept(inside: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    from ntkit.gram.pivoted_cholesky import _kept

    return _kept(inside, thresholds, torch.full_like(thresholds, 1e-14), 2)


def test_a_matrix_of_low_rank_is_found_exactly_and_the_search_ends():
    A = draw(61, 5)
    K = torch.cat([A, A[:20]]) @ torch.cat([A, A[:20]]).T  # repeated points, rank 5
    F, left = pivoted_cholesky(ntkit.Gram(K), 40, 0.0)
    assert 5 <= len(F) <= 8
    assert left <= 1e-10 * float(K.trace())
    assert torch.allclose(F.T @ F, K, atol=1e-10 * float(K.abs().max()))


def test_only_a_few_rows_are_read_for_it():
    K = StreamedGram(problem()[0])
    pivoted_cholesky(K, 64, 0.0)
    assert K.products == 0
    assert K.most_rows <= 8
    assert 64 <= K.rows_read <= 3 * 64


# ---------------------------------------------------------------------- ridge regression


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_ridge_by_products_is_the_dense_solution(no_room, dtype, ridge):
    K, Y, K_test = problem(dtype)
    A = K.double() + ridge * torch.eye(N, dtype=torch.float64)
    exact = torch.linalg.solve(A, Y)
    machine = ntkit.KernelRidge(ridge).fit(StreamedGram(K), Y)
    assert (machine.method_, machine.status_, machine.advice_) == ("conjugate gradients", "solved", "")
    defect = A @ machine.alpha_ - Y
    rounding = 2.0**-52 * N**0.5 * float(torch.linalg.matrix_norm(A, 2) * machine.alpha_.norm())  # of either product
    assert machine.residual_ * float(Y.norm()) == pytest.approx(float(defect.norm()), rel=1e-6, abs=rounding)
    assert bool((defect.norm(dim=0) <= 1e-8 * Y.norm(dim=0) + rounding).all())
    assert float((machine.alpha_ - exact).norm()) <= (machine.residual_ * float(Y.norm()) + 2 * rounding) / ridge
    predicted, wanted = machine.predict(K_test), K_test.double() @ exact
    assert float((predicted - wanted).norm() / wanted.norm()) < 1e-6
    assert bool(machine.loo_.isnan().all())


def test_where_there_is_room_ridge_factorizes():
    K, Y, _ = problem()
    machine = ntkit.KernelRidge(1e-3).fit(K, Y)
    assert (machine.method_, machine.passes_) == ("Cholesky", 0)
    assert machine.residual_ < 1e-12


def test_all_outputs_take_the_passes_of_the_hardest(no_room):
    K, Y, _ = problem()
    Y = torch.cat([Y, Y.sum(1, keepdim=True), torch.zeros(N, 1, dtype=torch.float64)], dim=1)  # dependent, and nothing
    alone = [ntkit.KernelRidge(1e-4).fit(K, Y[:, c]).passes_ for c in range(4)]
    gram = StreamedGram(K)
    together = ntkit.KernelRidge(1e-4).fit(gram, Y)
    assert together.status_ == "solved"
    assert together.passes_ == gram.products <= max(alone)
    assert gram.widest <= 64
    exact = torch.linalg.solve(K + 1e-4 * torch.eye(N, dtype=torch.float64), Y)
    assert torch.allclose(together.alpha_, exact, atol=1e-8 * float(Y.norm()) / 1e-4)
    assert not together.alpha_[:, 4].any()
    nothing = ntkit.KernelRidge(1e-4).fit(K, torch.zeros(N))
    assert nothing.status_ == "solved"
    assert not nothing.alpha_.any()


def test_the_low_rank_part_saves_passes(no_room, monkeypatch):
    K, Y, _ = problem()
    passes = {}
    for rank in (20, 1, 0.01):
        monkeypatch.setattr(cg, "_RANK", rank)
        passes[rank] = ntkit.KernelRidge(1e-5).fit(K, Y).passes_
    assert passes[20] < 0.5 * passes[1] < 0.5 * passes[0.01]
    assert passes[20] <= 12


def test_memory_is_a_few_columns(no_room, monkeypatch):
    monkeypatch.setattr(cg, "_RANK", 2)
    n = 1201
    x = draw(n, 3)
    K, y = rbf(x).float(), draw(n, 3, seed=1)
    gram = StreamedGram(K)
    with LargestTensor(K) as largest:
        machine = ntkit.KernelRidge(1e-2).fit(gram, y)
    assert machine.status_ == "solved"
    rank = int(2 * n**0.5)
    assert n * 64 <= largest.numbers <= 2 * n * rank < n * n / 8
    assert gram.most_rows <= rank


def test_a_matrix_that_is_not_positive_is_said(no_room):
    values = torch.linspace(0.1, 3, 60, dtype=torch.float64)
    values[0] = -0.5
    Q = torch.linalg.qr(draw(60, 60))[0]
    K = (Q * values) @ Q.T
    K = (K + K.T) / 2
    machine = ntkit.KernelRidge(0.1).fit(K, draw(60, 2, seed=3))
    assert machine.status_ == "inaccurate"
    assert "K + 0.1 I is not positive definite" in machine.advice_
    fine = ntkit.KernelRidge(0.6).fit(K, draw(60, 2, seed=3))
    assert fine.status_ == "solved"


def test_a_residual_that_cannot_be_reached_is_said(no_room, monkeypatch):
    monkeypatch.setattr(cg, "_PASSES", 3)
    monkeypatch.setattr(cg, "_RANK", 0.01)
    K, Y, _ = problem()
    machine = ntkit.KernelRidge(1e-3).fit(K, Y)
    assert machine.status_ == "inaccurate"
    assert machine.residual_ > 1e-8
    assert "products with K were not enough" in machine.advice_
    assert machine.passes_ <= 5


# ---------------------------------------------------------------------- Gaussian processes


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 3.0])
def test_posterior_by_products_is_the_dense_one(no_room, monkeypatch, noise):
    K, Y, K_test = problem()
    A = K + noise * torch.eye(N, dtype=torch.float64)
    prior = rbf(draw(N + 31, 3)[N:])
    exact = prior - K_test @ torch.linalg.solve(A, K_test.T)
    gp = ntkit.GaussianProcess(noise).fit(StreamedGram(K), Y)
    assert (gp.method_, gp.status_) == ("conjugate gradients", "solved")
    assert gp.log_marginal_likelihood_ != gp.log_marginal_likelihood_
    mean = K_test @ torch.linalg.solve(A, Y)
    monkeypatch.setattr(cg, "_STRIP", 13)
    for full in (False, True):
        posterior = gp.predict(K_test, prior if full else prior.diagonal())
        assert torch.allclose(posterior.mean, mean, atol=1e-6)
        variance = posterior.covariance.diagonal() if full else posterior.covariance
        above = variance - exact.diagonal()
        assert bool((above >= -1e-11).all())
        assert bool((above <= posterior.variance_error + 1e-11).all())
        assert bool((posterior.variance_error <= 1.01e-8).all())
    assert torch.allclose(posterior.covariance, exact, atol=2e-8)
    assert gp.passes_ == gp._solver.K.products


def test_posterior_bound_is_what_was_left_out(no_room, monkeypatch):
    # a loose goal makes the error visible: above the exact variance, and below its bound
    K, Y, K_test = problem()
    monkeypatch.setattr(cg, "_VARIANCE", 1e-2)
    monkeypatch.setattr(cg, "_RANK", 0.1)
    gp = ntkit.GaussianProcess(1e-2).fit(K, Y)
    posterior = gp.predict(K_test, torch.ones(31, dtype=torch.float64))
    exact = 1 - (K_test @ torch.linalg.solve(K + 1e-2 * torch.eye(N, dtype=torch.float64), K_test.T)).diagonal()
    above = posterior.covariance - exact
    assert float(above.max()) > 1e-7
    assert bool((above >= -1e-12).all())
    assert bool((above <= posterior.variance_error).all())


def test_without_noise_there_is_no_bound(no_room):
    K, Y, K_test = problem()
    K = K + 0.3 * torch.eye(N, dtype=torch.float64)
    posterior = ntkit.GaussianProcess(0.0).fit(K, Y).predict(K_test, torch.ones(31))
    assert bool(posterior.variance_error.isinf().all())
    exact = 1 - (K_test @ torch.linalg.solve(K, K_test.T)).diagonal()
    assert torch.allclose(posterior.covariance, exact, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-170, 1e170])
def test_matrices_whose_squares_float64_does_not_hold(no_room, monkeypatch, factor):
    K, targets, _ = problem()
    fits = {
        "ridge": lambda K: ntkit.KernelRidge(factor).fit(K, targets),
        "noise": lambda K: ntkit.GaussianProcess(noise=factor).fit(K, targets),
        "flow": lambda K: ntkit.GradientFlow(k=4).fit(K, targets),
    }
    for fit in fits.values():
        with pytest.raises(ntkit.Refused, match=r"K: got a largest entry of .*; expected between 1e-140 and 1e140"):
            fit(K * factor)
    monkeypatch.undo()  # with room Cholesky is taken, which squares nothing
    small, one = fits["ridge"](K * factor), ntkit.KernelRidge(1.0).fit(K, targets)
    assert torch.allclose(small.alpha_ * factor, one.alpha_, rtol=1e-9)


def test_by_cholesky_nothing_changes():
    K, Y, K_test = problem()
    gp = ntkit.GaussianProcess(1e-2).fit(K, Y)
    assert (gp.method_, gp.passes_) == ("Cholesky", 0)
    assert gp.predict(K_test, torch.ones(31)).variance_error is None


# ---------------------------------------------------------------------- predictions, operators


def test_predictions_read_the_test_matrix_in_strips(no_room):
    K, Y, _ = problem()
    K_test = torch.rand(20_001, N)
    machine = ntkit.KernelRidge(1e-2).fit(K, Y)
    with LargestTensor(K_test) as largest:
        predicted = machine.predict(K_test)
    assert torch.allclose(predicted, K_test.double() @ machine.alpha_, atol=1e-10)
    assert largest.numbers <= 2**20 < K_test.numel() / 4
    again = machine.predict(StreamedGram(K))  # the training set itself, which cannot be formed
    assert torch.allclose(again, K @ machine.alpha_, atol=1e-10)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)


def test_ridge_of_an_operator_is_that_of_its_matrix():
    x, y = draw(90, 4), draw(90, 2, seed=1)
    kernel = ntkit.TangentKernel(network(torch.float64), outputs="trace")
    K = kernel(x)
    ridge = 1e-2 * float(K.diagonal().mean())
    machine = ntkit.KernelRidge(ridge).fit(kernel.operator(x), y)
    exact = torch.linalg.solve(K + ridge * torch.eye(90, dtype=torch.float64), y)
    assert (machine.method_, machine.status_) == ("conjugate gradients", "solved")
    assert torch.allclose(machine.predict(K), K @ exact, atol=1e-6)
    x_test = draw(7, 4, seed=2)
    gp = ntkit.GaussianProcess(ridge).fit(kernel.operator(x), y)
    K_test = kernel(x_test, x)
    posterior = gp.predict(K_test, kernel.diagonal(x_test))
    variance = (
        kernel.diagonal(x_test)
        - (K_test @ torch.linalg.solve(K + ridge * torch.eye(90, dtype=torch.float64), K_test.T)).diagonal()
    )
    assert torch.allclose(posterior.covariance, variance, atol=1e-7)


def test_ridge_of_a_float32_operator_reports_its_true_residual():
    x, y = draw(90, 4).float(), draw(90, seed=1)
    model = network(torch.float32)
    kernel = ntkit.TangentKernel(model, outputs="trace")
    exact = ntkit.TangentKernel(network(torch.float32).double(), outputs="trace")(x.double())
    ridge = 1e-7 * float(exact.diagonal().mean())
    machine = ntkit.KernelRidge(ridge).fit(kernel.operator(x), y)
    assert machine.status_ == "inaccurate"
    assert "K in torch.float32 allows no smaller residual" in machine.advice_
    defect = exact @ machine.alpha_ + ridge * machine.alpha_ - y
    assert float(defect.norm() / y.norm()) < 10 * machine.residual_
    assert machine.residual_ < 10 * float(defect.norm() / y.norm())


def test_ridge_of_sketched_features_is_that_of_their_matrix():
    x, y = draw(120, 4), draw(120, seed=1)
    kernel = ntkit.SketchedKernel(network(torch.float64), dim=64, outputs="trace")
    K = kernel(x)
    machine = ntkit.KernelRidge(0.1).fit(kernel.operator(x), y)
    exact = torch.linalg.solve(K + 0.1 * torch.eye(120, dtype=torch.float64), y)
    assert machine.status_ == "solved"
    assert float((machine.alpha_ - exact).norm()) <= machine.residual_ * float(y.norm()) / 0.1 + 1e-9


def test_svm_of_an_operator_is_that_of_its_matrix():
    x = draw(90, 4)
    y = x[:, 0] * x[:, 1] > 0
    kernel = ntkit.TangentKernel(network(torch.float64), outputs="trace")
    K = kernel(x)
    exact, machine = ntkit.HardMarginSVM().fit(K, y), ntkit.HardMarginSVM().fit(kernel.operator(x), y)
    assert machine.status_ == exact.status_ == "optimal"
    assert torch.equal(machine.support_, exact.support_)
    assert torch.allclose(machine.decision_function(K), exact.decision_function(K), atol=1e-5)


def test_rows_and_tiles_of_an_operator():
    from ntkit.gram.operator_gram import OperatorGram

    x = draw(23, 4)
    kernel = ntkit.TangentKernel(network(torch.float64), outputs="trace")
    K, gram = kernel(x), OperatorGram(kernel.operator(x))
    assert torch.allclose(gram.rows([3, 7, -1]), K[[3, 7, -1]], atol=1e-12)
    assert torch.allclose(gram.tile(slice(2, 5), [0, 22]), K[2:5][:, [0, 22]], atol=1e-12)
    assert torch.allclose(gram.dense(), K, atol=1e-12)
    assert torch.allclose(gram.diagonal(), K.diagonal(), atol=1e-12)
    assert gram.largest == pytest.approx(float(K.abs().max()), rel=1e-12)
    assert torch.allclose(gram @ draw(23, 2), K @ draw(23, 2), atol=1e-11)
    with pytest.raises(ntkit.Refused, match="identity"):
        gram.identity
