"""The hard-margin SVM's working set, against Lawson and Hanson's least distance programming on explicit features."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import LinAlgWarning
from scipy.optimize import nnls
from torch import Tensor

from ntkit.base.checks import Refused
from ntkit.gram.gram_matrix import Gram
from ntkit.machines import HardMarginSVM, working_set


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def separator(x: Tensor, y: Tensor) -> Tensor | None:
    """The shortest w with y_i <w, x_i> >= 1, or None where there is none: Lawson and Hanson (1974), chapter 23."""
    system = torch.cat([(y[:, None] * x).T, torch.ones(1, len(y), dtype=torch.float64)]).numpy()
    right = np.zeros(len(system))
    right[-1] = 1.0
    with warnings.catch_warnings():  # scipy 1.12 warns of its own steps
        warnings.simplefilter("ignore", LinAlgWarning)
        u, distance = nnls(system, right, maxiter=100 * len(y))
    rest = system @ u - right
    return None if distance < 1e-8 else torch.from_numpy(-rest[:-1] / rest[-1])


@pytest.fixture
def small_sets(monkeypatch):
    """Working sets so small that problems of tens of points take many rounds."""
    for name, value in {"_ALL": 12, "_BLOCK": 8, "_SAMPLE": 6}.items():
        monkeypatch.setattr(working_set, name, value)


def problem(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Features and labels of +-1 that some plane through the origin separates."""
    n = 40 + 13 * (seed % 9)
    p = {"low rank": 3, "tiny margin": 5, "square": n}.get(kind, 2 * n)
    x, w = draw(n, p, seed=seed), draw(p, seed=seed + 1000)
    if kind == "near-duplicates":
        x = x[: n // 2].repeat(2, 1) + 1e-5 * draw(2 * (n // 2), p, seed=seed + 2000)
    if kind == "scales":
        x = x * 10 ** (-3 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    values = x @ w / w.norm()
    if kind == "tiny margin":
        x = x - torch.outer(values - 1e-4 * torch.sign(values) * (1 + values.abs()), w / w.norm())
    y = torch.sign(x @ w)
    if kind == "one against many":
        y = torch.where(values >= values.topk(3).values[-1], 1.0, -1.0).double()
    return x, y


KINDS = ["wide", "square", "low rank", "near-duplicates", "scales", "tiny margin", "one against many"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sets", ["all", "small"])
def test_the_separator_is_that_of_least_distance_programming(kind, sets, request):
    if sets == "small":
        request.getfixturevalue("small_sets")
    unit = 1e-4 if kind == "tiny margin" else 1.0  # of the margin's size: scipy before 1.15 needs it to converge
    for seed in range(20):
        x, y = problem(kind, seed)
        svm = HardMarginSVM().fit(x @ x.T, y)
        found = separator(x / unit, y)
        assert found is not None
        expected = found / unit
        assert svm.status_ == "optimal", seed
        assert svm.gap_ <= 1e-6
        assert svm.kkt_ <= 1e-6
        w = x.T @ (svm.alpha_ * y)
        assert (y * (x @ w)).min() >= 1 - 1e-6
        torch.testing.assert_close(svm.margin_, 1 / expected.norm().item(), rtol=1e-6, atol=0)
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-3 * expected.norm().item())


@pytest.mark.parametrize("tol", [1e-6, 1e-9])
def test_the_gap_goes_well_beyond_the_tolerance(small_sets, tol):
    for seed in range(20):
        x, y = problem("wide", seed)
        assert HardMarginSVM(tol).fit(x @ x.T, y).gap_ <= 1e-3 * tol


def test_the_oracle_and_the_machine_agree_on_which_points_can_be_separated(small_sets):
    statuses = []
    for seed in range(60):
        n, p = 30 + seed % 17, 3 + seed % 21
        x = draw(n, p, seed=seed)
        x = x.round() if seed % 3 == 0 else x  # repeated and dependent points
        y = torch.where(draw(n, seed=seed + 1) < 0, -1.0, 1.0).double()
        y[:2] = torch.tensor([-1.0, 1.0])
        svm = HardMarginSVM().fit(x @ x.T, y)
        assert svm.status_ == ("not separable" if separator(x, y) is None else "optimal"), seed
        statuses.append(svm.status_)
        if svm.status_ == "not separable":
            assert svm.alpha_.min() >= 0
            torch.testing.assert_close(svm.alpha_.sum().item(), 1.0)
            assert (x.T @ (svm.alpha_ * y)).norm() < 1e-6
    assert len(set(statuses)) == 2


# ---------------------------------------------------------------------- what is read of K


class Watched(Gram):
    """A Gram that notes which rows and tiles are asked for."""

    def __init__(self, K):
        super().__init__(K)
        self.read, self.tiles = [], []

    def rows(self, index):
        self.read += self._places(index).tolist()
        return super().rows(index)

    def tile(self, rows, columns):
        self.tiles.append((len(self._places(rows)), len(self._places(columns))))
        return super().tile(rows, columns)


def many(n: int = 3000, p: int = 40, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Points of few features, far from the boundary: the support is small."""
    x = draw(n, p)
    y = torch.arange(n) % classes
    x[torch.arange(n), y] += 9.0
    return x, y


def test_only_rows_of_supports_and_working_sets_are_read():
    x, y = many()
    gram = Watched((x @ x.T).float())
    svm = HardMarginSVM().fit(gram, y)
    assert svm.status_ == "optimal"
    assert len(svm.support_) < 60
    assert len(set(gram.read)) < 700  # of 3,000
    assert max(max(shape[0], shape[1]) for shape in gram.tiles if shape[1] < 3000) < 700


def test_ten_classes_are_ten_binary_fits_and_share_their_rows():
    x, y = many(1500, classes=10)
    K = (x @ x.T).float()
    gram = Watched(K)
    svm = HardMarginSVM().fit(gram, y)
    assert svm.status_ == "optimal"
    read = 0
    for c in range(10):
        alone = Watched(K)
        one = HardMarginSVM().fit(alone, y == c)
        read += len(alone.read)
        torch.testing.assert_close(svm.margin_[c].item(), one.margin_, rtol=1e-6, atol=0)
        torch.testing.assert_close(svm.decision_function(K)[:, c], one.decision_function(K), rtol=1e-4, atol=1e-6)
    assert len(gram.read) < read
    assert torch.equal(svm.predict(K), y)


def test_an_asymmetry_of_rounding_counts_as_its_symmetric_part_and_each_row_is_read_once():
    x, y = many(3000)
    K = x @ x.T
    skew = 1e-10 * draw(3000, 3000, seed=5)
    gram = Watched(K + (skew - skew.T))
    assert not gram.exact
    svm = HardMarginSVM().fit(gram, y)
    assert svm.status_ == "optimal"
    assert len(gram.read) == len(set(gram.read))
    torch.testing.assert_close(svm.alpha_, HardMarginSVM().fit(K, y).alpha_, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("capacity", [0, 1, 7, 64])
def test_products_with_kept_rows_are_products(capacity):
    K = draw(64, 64)
    K = K + K.T
    skew = 1e-12 * draw(64, 64, seed=1)
    rows = working_set._Rows(Gram(K + skew - skew.T))
    rows.kept, rows.owner = torch.empty(capacity, 64).double(), torch.full((capacity,), -1)
    for seed in range(9):
        weights = draw(64, 2, seed=seed) * (draw(64, 1, seed=seed + 50) > 0.9 - 0.2 * seed)
        torch.testing.assert_close(rows.product(weights), K @ weights)


# ---------------------------------------------------------------------- a start


@pytest.mark.parametrize("classes", [2, 4])
def test_a_start_changes_the_way_and_not_the_answer(classes):
    x, y = draw(1000, 400), torch.arange(1000) % classes
    x[torch.arange(1000), y] += 3.0
    K = x @ x.T
    z = x + 0.02 * draw(1000, 400, seed=9)
    earlier = HardMarginSVM().fit(z @ z.T, y)
    cold = HardMarginSVM().fit(K, y)
    for start in (earlier, earlier.alpha_, np.asarray(earlier.alpha_) * 7.0):
        warm = HardMarginSVM().fit(K, y, start=start)
        assert warm.status_ == "optimal"
        assert warm.gap_ <= 1e-6
        assert warm.iterations_ < cold.iterations_
        torch.testing.assert_close(warm.margin_, cold.margin_, rtol=1e-6, atol=0)
        torch.testing.assert_close(warm.decision_function(K), cold.decision_function(K), rtol=1e-4, atol=1e-6)
    again = HardMarginSVM().fit(K, y, start=cold)
    assert again.iterations_ == 0
    torch.testing.assert_close(again.alpha_, cold.alpha_, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_a_start_of_random_numbers_is_as_good(small_sets, seed):
    x, y = problem(KINDS[seed], seed)
    start = draw(len(y), seed=seed + 7).abs()
    one, other = HardMarginSVM().fit(x @ x.T, y), HardMarginSVM().fit(x @ x.T, y, start=start)
    assert other.status_ == "optimal"
    torch.testing.assert_close(other.margin_, one.margin_, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1e-320, 1e-170, 1e170, 1e300])
def test_the_size_of_a_start_does_not_matter(factor):
    x, y = draw(40, 60), torch.arange(40) % 2
    K = x @ x.T
    svm = HardMarginSVM().fit(K, y)
    again = HardMarginSVM().fit(K, y, start=factor * svm.alpha_)
    assert again.status_ == "optimal"
    assert again.margin_ == pytest.approx(svm.margin_, rel=1e-6)


def test_a_start_for_points_that_cannot_be_separated():
    x = draw(900, 40)
    y, other = torch.sign(x[:, 0] * x[:, 1]), torch.sign(x[:, 2])
    K = x @ x.T
    assert HardMarginSVM().fit(K, y, start=HardMarginSVM().fit(K, other)).status_ == "not separable"
    assert HardMarginSVM().fit(K, other, start=HardMarginSVM().fit(K, y)).status_ == "optimal"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (HardMarginSVM(), "HardMarginSVM: got no fitted machine; expected fit"),
        (torch.ones(4), r"start: got shape \[4\]; expected \[6\]"),
        (torch.ones(6, 2), r"start: got shape \[6, 2\]; expected \[6\]"),
        (-torch.ones(6), r"start: got a negative value, -1; expected dual variables >= 0"),
        (torch.zeros(6), "start: got zeros; expected dual variables, some > 0 per class"),
        (torch.full((6,), float("nan")), r"start: got nan at index \[0\]; expected finite"),
        (HardMarginSVM().fit(torch.eye(4), [0, 1, 0, 1]), r"start: got shape \[4\]; expected \[6\]. Pass a machine"),
        (HardMarginSVM().fit(torch.eye(6), [0, 1, 2] * 2), r"start: got shape \[6, 3\]"),
    ],
)
def test_refused_starts(start, message):
    with pytest.raises(Refused, match=message):
        HardMarginSVM().fit(torch.eye(6), [0, 1] * 3, start=start)


@pytest.mark.parametrize(("factor", "told"), [(1e-310, "1e-310"), (1e304, "1e+304"), (1.7e308, "inf")])
def test_a_kernel_whose_dual_variables_float64_cannot_hold_is_refused(factor, told):
    with pytest.raises(
        Refused, match=f"K: got a mean diagonal of {re.escape(told)}; expected between 1e-290 and 1e290"
    ):
        HardMarginSVM().fit(factor * torch.eye(3, dtype=torch.float64), [0, 1, 0])


# ---------------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize("factor", [1e-8, 3.0, 1e8])
def test_scaling_a_kernel_of_many_points(factor):
    x, y = many(1100)
    K = x @ x.T
    one, other = HardMarginSVM().fit(K, y), HardMarginSVM().fit(factor * K, y)
    torch.testing.assert_close(other.margin_, one.margin_ * factor**0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.decision_function(factor * K), one.decision_function(K), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_permuting_many_points_permutes_the_answer(seed):
    x, y = many(1100)
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(seed))
    K = x @ x.T
    one, other = HardMarginSVM().fit(K, y), HardMarginSVM().fit(K[order][:, order], y[order])
    assert other.status_ == "optimal"
    torch.testing.assert_close(other.alpha_, one.alpha_[order], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("n", [700, 1500])
def test_a_float32_kernel_of_many_points_is_solved_as_it_is(n):
    x, y = many(n, 2 * n)
    K = (x @ x.T).float()
    one, other = HardMarginSVM().fit(K, y), HardMarginSVM().fit(K.double(), y)
    assert one.status_ == other.status_ == "optimal"
    assert one.gap_ <= 1e-9
    torch.testing.assert_close(one.alpha_, other.alpha_, rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------------- the edges


def test_two_points_and_one():
    K = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
    svm = HardMarginSVM().fit(K, [0, 1])
    assert svm.status_ == "optimal"
    np.testing.assert_allclose(svm.alpha_, [1 / 3, 1 / 3], rtol=1e-12)  # sum(a) = 2 a is (a y)^T K (a y) = 6 a^2
    with pytest.raises(Refused, match="y: got one class, 0; expected two or more"):
        HardMarginSVM().fit(torch.eye(1), [0])
    same = HardMarginSVM().fit(torch.ones(2, 2), [0, 1])
    assert same.status_ == "not separable"
    assert "same features and different labels: 0 and 1" in same.advice_


def test_a_zero_row_among_many_points():
    x, y = many(900)
    x[571] = 0
    svm = HardMarginSVM().fit(x @ x.T, y)
    assert svm.status_ == "not separable"
    assert "Point 571 has a zero feature vector" in svm.advice_


def test_more_zero_rows_than_the_first_working_set_has_points():
    x, y = draw(600, 700), torch.arange(600) % 2
    x += 3.0 * (2 * y[:, None] - 1)
    x[:200] = 0
    svm = HardMarginSVM().fit(x @ x.T, y)
    assert svm.status_ == "not separable"
    assert "Point 0 has a zero feature vector" in svm.advice_


@pytest.mark.parametrize("normed", [False, True])
def test_contradictory_duplicates_among_many_points_are_named(normed):
    x, y = many(900)
    for i, j in [(4, 17), (300, 571)]:
        x[j], y[i], y[j] = x[i], 1, 0
    x = x / x.norm(dim=1, keepdim=True) if normed else x
    svm = HardMarginSVM().fit(x @ x.T, y)
    assert svm.status_ == "not separable"
    assert "different labels: 4 and 17, 300 and 571. " in svm.advice_
    torch.testing.assert_close(svm.alpha_.sum().item(), 1.0)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_random_labels_are_found_not_separable_in_few_steps(kind):
    x = draw(2000, 60)
    K = (x @ x.T).to(kind)
    svm = HardMarginSVM().fit(K, draw(2000, seed=1) > 0)
    assert svm.status_ == "not separable"
    assert svm.iterations_ < 100
    assert svm.gap_ == 1
    assert svm.margin_ == 0


def test_a_kernel_with_a_negative_direction_among_many_points():
    x, y = many(900)
    K = x @ x.T
    signed = torch.zeros(900, dtype=torch.float64)
    signed[:40] = torch.where(y[:40] > 0, 1.0, -1.0).double()
    K -= 2 * torch.outer(K @ signed, K @ signed) / (signed @ K @ signed)  # now signed^T K signed < 0
    K.diagonal().clamp_(min=0)
    svm = HardMarginSVM().fit((K + K.T) / 2, y)
    assert svm.status_ == "inaccurate"
    assert "negative eigenvalues" in svm.advice_


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_the_certificate_of_an_unfinished_fit_is_its_definition(monkeypatch, steps):
    """Far from the optimum: violated margins, or (at a start that is not improved) weights of points above theirs."""
    monkeypatch.setattr(working_set, "_MAX_STEPS", steps)
    x, y = problem("square", 8)
    if not steps:
        x = y[:, None] * (0.5 + draw(len(y), 1) ** 2 + 0.1 * draw(len(y), 3, seed=1))
    K = x @ x.T
    svm = HardMarginSVM().fit(K, y, start=None if steps else torch.ones(len(y)))
    assert svm.status_ == "inaccurate"
    a, margins = svm.alpha_, y * (K @ (svm.alpha_ * y))
    violated, slack = (1 - margins).clamp(min=0).max(), ((a / a.max()) * (margins - 1).abs()).max()
    assert steps or slack > 1.1 * violated
    torch.testing.assert_close(svm.kkt_, max(violated, slack).item(), rtol=1e-9, atol=0)
    primal = (a @ margins) / 2 / margins.min() ** 2  # of the separator at hand, scaled until no margin is violated
    gap = 1 - (a.sum() - (a @ margins) / 2) / primal if margins.min() > 0 else torch.tensor(1.0)
    torch.testing.assert_close(svm.gap_, gap.item(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", [2034, 5228, 7213])
def test_the_gap_is_that_of_exact_sums(seed):
    """Points of sizes from 1e-2 to 1e2 in seven dimensions with noise: the margins lose digits to cancellation."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(22, 7, generator=g, dtype=torch.float64)
    x = x * 10 ** (4 * torch.rand(22, 1, generator=g, dtype=torch.float64) - 2)
    K = x @ x.T
    K = K + 1e-12 * K.abs().max() * torch.randn(22, 22, generator=g, dtype=torch.float64)
    K = (K + K.T) / 2
    y = np.where(torch.rand(22, generator=g).numpy() < 0.5, 1, -1)
    svm = HardMarginSVM().fit(K, y)
    exact, weights = K.numpy().astype(np.longdouble), (svm.alpha_.numpy() * y).astype(np.longdouble)
    margins, energy = y * (exact @ weights), weights @ exact @ weights
    gap = float(1 - (np.abs(weights).sum() * margins.min() / energy) ** 2)
    assert svm.gap_ < 1
    assert gap <= svm.gap_
    assert (svm.status_ == "optimal") is (svm.gap_ <= 1e-6)
