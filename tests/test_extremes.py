"""Kernels, targets and images at the ends of what numbers hold: each against its answer at an ordinary size."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.function_identity import module_identity
from ntkit.commands import network_measures, regression_measures
from ntkit.gram.gram_identity import identity
from ntkit.gram.gram_matrix import Gram
from ntkit.machines import GaussianProcess, GradientFlow, HardMarginSVM, KernelRidge, gaussian_process, ridge
from ntkit.machines.estimators import NTKRegressor
from ntkit.measures.eigenfunctions import bandwidth
from ntkit.measures.spectra import alignment, spectrum

N, SHIFT = 6, 0.1
SIZES = [1e-300, 1e-200, 1e-160, 1e160, 1e200, 1e300]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """K, targets, and (K + SHIFT I)^-1 y."""
    phi, y = draw(N, N + 3), torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0, 1.0], dtype=torch.float64)
    K = (phi @ phi.T + phi @ phi.T) / 2
    return K, y, torch.linalg.solve(K + SHIFT * torch.eye(N, dtype=torch.float64), y)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dense", [True, False])
def test_targets_of_any_size_are_solved_for_and_certified(monkeypatch, dense, size):
    for module in (ridge, gaussian_process):
        monkeypatch.setattr(module, "factorizes", lambda *_: dense)
    K, y, alpha = problem()
    for machine in (KernelRidge(SHIFT).fit(K, y * size), GaussianProcess(SHIFT).fit(K, y * size)):
        assert machine.status_ == "solved"
        torch.testing.assert_close(machine.alpha_ / size, alpha, rtol=1e-7, atol=1e-9)
        rest = (K @ machine.alpha_ + SHIFT * machine.alpha_ - y * size) / size
        assert machine.residual_ == pytest.approx(float(rest.norm() / y.norm()), rel=1e-6, abs=1e-15)
        assert 0 < machine.residual_ <= 1e-8


def test_targets_of_very_different_sizes_are_each_solved_for(monkeypatch):
    monkeypatch.setattr(ridge, "factorizes", lambda *_: False)
    K, y, alpha = problem()
    sizes = torch.tensor([1.0, 1e-200, 1e100, 0.0], dtype=torch.float64)
    found = KernelRidge(SHIFT).fit(K, y[:, None] * sizes).alpha_
    torch.testing.assert_close(found[:, :3] / sizes[:3], alpha[:, None].expand(N, 3), rtol=1e-7, atol=1e-9)
    assert not found[:, 3].any()


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_the_marginal_likelihood_is_that_of_the_density(size):
    K, y, _ = problem()
    covariance = K + SHIFT * torch.eye(N, dtype=torch.float64)
    expected = -0.5 * (torch.logdet(2 * torch.pi * covariance).item() + (y @ torch.linalg.solve(covariance, y)).item())
    if size < 1:
        expected = -0.5 * torch.logdet(2 * torch.pi * covariance).item()
    found = GaussianProcess(SHIFT).fit(K, y * size).log_marginal_likelihood_
    assert found == (-np.inf if size > 1 else pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200])
def test_when_to_stop_does_not_depend_on_the_size_of_the_targets(size):
    K, y, _ = problem()
    best, expected = (GradientFlow().fit(K, y * s).best_time(K, 0.9 * y * s) for s in (size, 1.0))
    assert not expected.at_end
    assert best.t == pytest.approx(expected.t, rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-4, 1e8])
def test_a_loss_of_targets_of_any_size_is_integrated(size):
    K, y, _ = problem()
    flow = GradientFlow(loss=lambda out, y: 0.5 * F.mse_loss(out, y)).fit(K, y * size)
    values, vectors = torch.linalg.eigh(K / N)
    for t in (0.3, 3.0):
        expected = y - vectors @ ((-t * values).exp() * (vectors.T @ y))
        torch.testing.assert_close(flow.predict_train(t) / size, expected, rtol=1e-8, atol=1e-9)
        assert flow.status_ == "solved"


def test_the_end_of_training_in_steps_with_the_top_eigenvectors():
    K, y, _ = problem()
    lr = 0.5 * N / float(torch.linalg.eigvalsh(K)[-1])
    top, all_ = GradientFlow(lr, k=2).fit(K, y), GradientFlow(lr).fit(K, y)
    off = (top.predict_train(float("inf")) - y).norm()
    assert float(off) <= float(top.error_bound(None, float("inf"))) + 1e-9
    torch.testing.assert_close(all_.predict_train(float("inf")), y)


# ---------------------------------------------------------------------- spectra


@pytest.mark.parametrize("shift", [-1.0, -1e-3])
def test_repeated_negative_eigenvalues_are_all_found(shift):
    phi = draw(100, 50)
    K = -(phi @ phi.T) + shift * torch.eye(100, dtype=torch.float64)  # the largest of its eigenvalues 50 times
    top = spectrum((K + K.T) / 2, 33)
    assert top.status == "converged"
    torch.testing.assert_close(top.eigenvalues, torch.full((33,), shift, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_rounding_of_a_constant_has_no_direction(dtype):
    n = 40
    y = draw(n).sign()
    noise = (draw(n, n) + draw(n, n).T) * 0.02 * torch.finfo(dtype).eps
    varies = torch.eye(n, dtype=torch.float64)
    constant = (0.3 + noise).to(dtype)
    if dtype == torch.float32:  # in narrower ones the noise is lost already
        assert len(constant.unique()) > 1
    for call in (lambda: alignment(constant, y, centered=True), lambda: alignment(varies, constant, centered=True)):
        with pytest.raises(Refused, match="constant kernel"):
            call()
    with pytest.raises(Refused, match="constant target"):
        alignment(varies, (1 + 0.2 * torch.finfo(dtype).eps * draw(n)).to(dtype), centered=True)
    small = 0.3 + 40 * torch.finfo(dtype).eps * torch.outer(y, y)  # what rounding leaves of this is its direction
    assert alignment(((small + small.T) / 2).to(dtype), y, centered=True) > 0.9


def test_one_large_entry_is_no_constant():
    """What rounding can be is relative to what centering subtracts, not to the largest entry."""
    K = torch.eye(600, dtype=torch.bfloat16) * 1e-3
    K[0, 0] = 1.0
    assert alignment(K, torch.eye(600)[0], centered=True) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e160, 1e300])
def test_the_bandwidth_does_not_depend_on_the_size_of_values(size):
    wave = torch.sin(2 * torch.pi * 3 * (torch.arange(32, dtype=torch.float64) + 0.5) / 32).expand(32, 32)
    images = torch.stack([wave * size, torch.ones(32, 32)])
    assert bandwidth(images)[0].item() == pytest.approx(3.0)
    assert bandwidth(images)[1].isnan()
    with pytest.raises(Refused, match="finite"):
        bandwidth(wave * float("nan"))


def test_the_bandwidth_of_images_that_are_not_square_around_any_level():
    """Five waves down, at the frequencies of the rows; a constant added has no frequency."""
    down = torch.cos(2 * torch.pi * 5 * torch.arange(24, dtype=torch.float64) / 24)[:, None].expand(24, 10)
    for image in (down, down.T, down + 7.0):
        assert bandwidth(image).item() == pytest.approx(5.0)


def test_the_floor_is_above_the_rounding_of_the_decomposition():
    """Eigenvalues of a matrix of rank one, in float64, but for the first: of rounding alone."""
    n = 200
    pairs = spectrum(torch.ones(n, n, dtype=torch.float64))
    assert pairs.floor == pytest.approx(n * 2.0**-52 * n)
    assert int((pairs.eigenvalues > pairs.floor).sum()) == 1


def test_places_in_arrays_of_any_layout():
    K, _, _ = problem()
    G, flat = Gram(K), Gram(torch.kron(K, torch.eye(2, dtype=torch.float64)).reshape(N, 2, N, 2).transpose(1, 2))
    K = G.dense()
    for index in (np.array([1, 2, 3])[::-1], np.array([3, 2, 1], ">i4"), torch.tensor([3, 2, 1], dtype=torch.uint8)):
        assert torch.equal(G.rows(index), K[[3, 2, 1]])
    for index in (slice(None, None, -1), slice(4, 0, -2), slice(0, 4, -1), slice(5, 2)):
        places = list(range(N))[index]
        assert torch.equal(G.rows(index), K[places])
        assert torch.equal(G.tile([0], index), K[[0]][:, places])
        assert len(flat.rows(index)) == len(range(2 * N)[index])


# ---------------------------------------------------------------------- arrays


def packed(values: Tensor) -> np.ndarray:
    """Floats that do not begin at multiples of their size."""
    rows = np.zeros(values.shape, [("flag", "u1"), ("value", "f8")])
    rows["value"] = values.numpy()
    return rows["value"]


def test_samples_in_a_packed_array():
    kernel, x = ntkit.TangentKernel(nn.Linear(3, 1).double(), "trace"), draw(4, 3)
    assert torch.equal(kernel(packed(x)), kernel(x))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((4, 4))[::-1],
        np.empty((4, 4), ">f8"),
        packed(torch.zeros(4, 4)),
        np.lib.stride_tricks.as_strided(np.empty(7), (4, 4), (8, 8)),
        torch.empty(4, dtype=torch.float64).expand(4, 4),
    ],
)
def test_results_are_written_only_where_each_has_its_place(out):
    kernel = ntkit.TangentKernel(nn.Linear(3, 1).double(), "trace")
    with pytest.raises(Refused, match=r"out: got an? .*Allocate"):
        kernel(draw(4, 3), out=out)


def test_results_are_written_into_every_second_column():
    kernel, x, out = ntkit.TangentKernel(nn.Linear(3, 1).double(), "trace"), draw(4, 3), np.empty((4, 8))[:, ::2]
    kernel(x, out=out)
    assert np.array_equal(out, kernel(x).numpy())


def test_what_a_mask_hides_is_no_number():
    x, y = draw(10, 3).numpy(), np.arange(10) % 2
    hidden = np.ma.masked_array
    for call in (
        lambda: ntkit.data.from_tensors((hidden(x, x > 1), y)),
        lambda: ntkit.data.from_tensors((x, hidden(y, y > 0))),
        lambda: ntkit.data.from_tensors((x, hidden(x[:, 0], x[:, 0] > 0))),
        lambda: KernelRidge(1.0).fit(hidden(x @ x.T, x @ x.T > 1), x[:, 0]),
        lambda: KernelRidge(1.0).fit(x @ x.T, hidden(x[:, 0], x[:, 0] > 0)),
        lambda: HardMarginSVM().fit(np.eye(10), hidden(y, y > 0)),
    ):
        with pytest.raises(Refused, match="mask would be lost"):
            call()


def test_targets_in_bfloat16_of_a_dataset():
    x, y = draw(10, 3), draw(10)
    pairs = torch.utils.data.TensorDataset(x, y.bfloat16())
    given, expected = ntkit.data.from_dataset(pairs), ntkit.data.from_tensors((x, y.bfloat16().double()))
    assert torch.equal(given.y_train, expected.y_train)


# ---------------------------------------------------------------------- which kernel it is


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by(x) if callable(self.by) else x * self.by


def network(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 7))


def heads(number: int) -> nn.Module:
    return nn.TransformerEncoderLayer(4, number, 8, dropout=0.0, batch_first=True)


def hooked(by: float) -> nn.Module:
    part = nn.Identity()
    part.register_forward_hook(lambda module, given, out: out * by)
    return part


def keyword(default: float):
    def picked(y, *, by=default):
        return y[:, 0] * by

    return picked


READOUTS = [
    lambda y: y[:, [0, 1, 2]].sum(1), lambda y: y[:, [0, 1, 3]].sum(1), lambda y: y[:, (0, 1, 2)].sum(1),
    lambda y: (lambda z: 2 * z)(y[:, 0]), lambda y: (lambda z: 3 * z)(y[:, 0]), keyword(2.0), keyword(3.0),
]  # fmt: skip
PARTS = [
    lambda: Scaled(1.0), lambda: Scaled(2.0), lambda: Scaled(torch.tensor(1.0)), lambda: Scaled(torch.tensor(2.0)),
    lambda: Scaled(torch.tanh), lambda: Scaled(torch.sin), lambda: heads(1), lambda: heads(2), lambda: hooked(1.0),
    lambda: hooked(2.0),
]  # fmt: skip


def test_networks_that_differ_in_more_than_parameters_have_other_matrices():
    x = draw(3, 4).float()

    def named(part):
        return identity((ntkit.TangentKernel(network(part()).eval(), "trace"), x), torch.float32)

    assert len({named(part) for part in PARTS}) == len(PARTS)
    assert [named(part) for part in PARTS] == [named(part) for part in PARTS]


def test_functions_that_differ_in_constants_have_other_matrices():
    x, model = draw(3, 4).float(), network(nn.Tanh())
    names = [identity((ntkit.TangentKernel(model, read), x), torch.float32) for read in READOUTS]
    assert len(set(names)) == len(READOUTS)


def test_layers_that_are_equal_but_elsewhere_have_other_matrices():
    x, model = draw(3, 4).float(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    one, other = (identity((ntkit.ConjugateKernel(model, layer), x), torch.float32) for layer in ("1", "3"))
    assert one != other


def test_a_store_of_another_network_is_refused(tmp_path):
    x = draw(3, 4).float()
    ntkit.GramStore.create(tmp_path / "k", ntkit.TangentKernel(network(Scaled(1.0)), "trace"), x)
    with pytest.raises(Refused, match="another model"):
        ntkit.GramStore.create(tmp_path / "k", ntkit.TangentKernel(network(Scaled(2.0)), "trace"), x)


def test_frozen_parameters_are_no_others_in_the_cache():
    X = draw(8, 4).numpy()

    def scale(frozen: bool) -> float:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        for p in model.parameters():
            nn.init.zeros_(p)
        model[0].requires_grad_(not frozen)
        kernel = ntkit.InfiniteKernel(model.double(), w_std=2**0.5, b_std=0.1)
        found = NTKRegressor(model).fit(X, X[:, 0]).scale_
        assert found == pytest.approx(float(kernel.diagonal(torch.from_numpy(X)).mean()))
        return found

    assert scale(True) < scale(False)


# ---------------------------------------------------------------------- reports


def test_errors_of_a_network_that_diverged_are_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = regression_measures._resampled(np.array([[1e200], [1.0], [3.0]]), np.array([[1.0], [2.0], [3.0]]), "")
        paired = regression_measures._paired(np.array([1e200, -1e200]))
    assert found["rmse"]["value"] is None
    assert found["mae"]["value"] == pytest.approx(1e200 / 3)
    assert paired["value"] == 0
    assert paired["error"] is None


@pytest.mark.parametrize("pixels", [torch.tensor([-6e4, 0, 6e4]).half(), torch.tensor([-1e-20, 0, 1e-20])])
def test_pixels_of_any_range_are_stretched(pixels):
    assert network_measures.as_pixels(pixels.reshape(1, 1, 1, 3)).ravel().tolist() == [0, 128, 255]


def test_a_networks_identity_is_that_of_its_copies():
    """Recurrent layers keep references to their weights, which copies have in another form."""
    model = nn.Sequential(nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2))
    stored = io.BytesIO()
    pickle.dump(model, stored)
    for other in (copy.deepcopy(model), pickle.loads(stored.getvalue())):
        assert list(module_identity(other)) == list(module_identity(model))
    model[0].dropout = 0.5
    assert list(module_identity(other)) != list(module_identity(model))
