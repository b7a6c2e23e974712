"""The hard-margin SVM: its certificate, exact small cases, an interior-point solver; ridge against plain solves."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from ntkit.base.checks import Refused
from ntkit.machines import HardMarginSVM, KernelRidge

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(n: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, generator=generator(seed), dtype=torch.float64)


def rbf(x: torch.Tensor, gamma: float) -> torch.Tensor:
    K = torch.exp(-gamma * torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square())
    return (K + K.T) / 2


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A separable problem: K and labels of +-1."""
    n, p = {"full": (53, 71), "capacity": (101, 53), "wide": (331, 400), "deficient": (211, 7), "rank1": (13, 1)}.get(
        name, (149, 2)
    )
    x = features(n, p)
    if name in ("full", "wide"):
        return x @ x.T, torch.sign(features(n, 1, seed=1)[:, 0])
    if name == "ill-conditioned":  # a smooth kernel: eigenvalues down to the rounding
        return rbf(x, 0.5), torch.where(x[:, 0] > x[:, 1] ** 2, 1.0, -1.0).double()
    if name == "scales":  # feature norms over 4 decades
        x = features(n, 211) * torch.logspace(-4, 0, n, dtype=torch.float64)[:, None]
        return x @ x.T, torch.sign(features(n, 1, seed=1)[:, 0])
    if name == "duplicates":
        x = torch.cat([x, x[:31]])
    return x @ x.T, torch.sign(x[:, 0])


CASES = ["full", "capacity", "wide", "deficient", "rank1", "ill-conditioned", "scales", "duplicates"]


def certificate(K: torch.Tensor, y: torch.Tensor, a: torch.Tensor) -> float:
    """The relative duality gap by the definition: K, y, a alone, in numpy's longdouble."""
    signed = np.asarray(a * y, dtype=np.longdouble)
    values = np.asarray(K, dtype=np.longdouble) @ signed
    energy, smallest = signed @ values, (np.asarray(y) * values).min()
    assert smallest > 0
    dual, primal = np.asarray(a, dtype=np.longdouble).sum() - energy / 2, energy / 2 / smallest**2
    return float((primal - dual) / primal)


@pytest.mark.parametrize("name", CASES)
def test_the_gap_is_closed_and_the_separator_separates(name):
    K, y = case(name)
    svm = HardMarginSVM().fit(K, y)
    assert svm.status_ == "optimal"
    assert svm.advice_ == ""
    assert svm.alpha_.shape == y.shape
    assert (svm.alpha_ >= 0).all()
    assert svm.gap_ <= 1e-6
    assert svm.kkt_ <= 1e-6
    assert certificate(K, y, svm.alpha_) <= 1e-6
    assert torch.equal(svm.support_, torch.nonzero(svm.alpha_ > 0).ravel())
    assert (svm.predict(K) == y).all()
    # the reported gap is that of the definition, and the margin is attained as the docstring says
    signed = svm.alpha_ * y
    attained = (y * (K @ signed)).min() / (signed @ K @ signed).sqrt()
    torch.testing.assert_close(attained.item(), svm.margin_ * (1 - svm.gap_) ** 0.5, rtol=1e-9, atol=0)


def test_the_certificate_fails_on_a_perturbed_answer():
    K, y = case("full")
    a = HardMarginSVM().fit(K, y).alpha_
    a[a.argmax()] *= 1.001
    assert certificate(K, y, a) > 1e-6


def test_rank_one_by_hand():
    K, y = case("rank1")
    x = features(13, 1)[:, 0]
    svm = HardMarginSVM().fit(K, y)
    torch.testing.assert_close(svm.margin_, x.abs().min().item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["full", "capacity", "wide", "deficient", "duplicates"])
def test_the_objective_equals_that_of_an_interior_point_solver(name):
    piqp = pytest.importorskip("piqp")
    K, y = case(name)
    n = len(y)
    Q = (y[:, None] * K * y).numpy()
    solver = piqp.DenseSolver()
    solver.settings.eps_abs = solver.settings.eps_rel = 1e-10
    solver.settings.eps_duality_gap_abs = solver.settings.eps_duality_gap_rel = 1e-10
    solver.setup(Q, -np.ones(n), x_l=np.zeros(n))
    assert solver.solve() == piqp.PIQP_SOLVED
    b = solver.result.x
    reference = b.sum() - b @ Q @ b / 2
    a = HardMarginSVM().fit(K, y).alpha_.numpy()
    np.testing.assert_allclose(a.sum() - a @ Q @ a / 2, reference, rtol=1e-5)


@pytest.mark.parametrize("name", ["full", "capacity", "deficient"])
def test_explicit_weights_separate_with_the_margin(name):
    n, p = {"full": (53, 71), "capacity": (101, 53), "deficient": (211, 7)}[name]
    x, (K, y) = features(n, p), case(name)
    svm = HardMarginSVM().fit(K, y)
    w = x.T @ (svm.alpha_ * y)
    assert (y * (x @ w)).min() >= 1 - 1e-6
    torch.testing.assert_close(w.norm().item(), 1 / svm.margin_, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["full", "ill-conditioned", "scales"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_the_kernel_changes_nothing(name, factor):
    K, y = case(name)
    one, other = HardMarginSVM().fit(K, y), HardMarginSVM().fit(factor * K, y)
    assert torch.equal(one.support_, other.support_)
    assert torch.equal(one.predict(K), other.predict(factor * K))
    torch.testing.assert_close(other.decision_function(factor * K), one.decision_function(K), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other.margin_, one.margin_ * factor**0.5, rtol=1e-6, atol=0)


def test_permuting_the_points_permutes_the_answer():
    K, y = case("wide")
    order = torch.randperm(len(y), generator=generator(3))
    one, other = HardMarginSVM().fit(K, y), HardMarginSVM().fit(K[order][:, order], y[order])
    assert set(order[other.support_].tolist()) == set(one.support_.tolist())
    torch.testing.assert_close(other.alpha_, one.alpha_[order], rtol=1e-5, atol=1e-9)


def test_only_the_supports_matter():
    K, y = case("capacity")
    one = HardMarginSVM().fit(K, y)
    keep = one.support_
    assert len(keep) < len(y)
    other = HardMarginSVM().fit(K[keep][:, keep], y[keep])
    torch.testing.assert_close(other.decision_function(K[:, keep]), one.decision_function(K), rtol=1e-6, atol=1e-8)


def test_one_against_the_rest_is_one_binary_fit_per_class():
    x = features(59, 67)
    K, y = x @ x.T, torch.arange(59) % 3
    svm = HardMarginSVM().fit(K, y)
    assert svm.alpha_.shape == (59, 3)
    assert svm.margin_.shape == (3,)
    assert svm.classes_.tolist() == [0, 1, 2]
    values, gaps = svm.decision_function(K), []
    for c in range(3):
        one = HardMarginSVM().fit(K, (y == c).long())
        torch.testing.assert_close(values[:, c], one.decision_function(K))
        torch.testing.assert_close(svm.margin_[c].item(), one.margin_)
        assert torch.equal(svm.support_[c], one.support_)
        gaps.append(one.gap_)
    assert svm.gap_ == pytest.approx(max(gaps), rel=0, abs=len(y) * torch.finfo(torch.float64).eps)  # sums of n terms
    assert torch.equal(svm.predict(K), y)


def test_labels_and_arrays_come_back_as_they_came():
    K, y = case("full")
    names = np.where(y > 0, "up", "down")
    svm = HardMarginSVM().fit(K.numpy(), names)
    assert isinstance(svm.alpha_, np.ndarray)
    assert svm.classes_.tolist() == ["down", "up"]
    assert (svm.predict(K) == names).all()
    assert isinstance(svm.decision_function(K), torch.Tensor)
    assert isinstance(svm.decision_function(K.numpy()), np.ndarray)
    read_only = K.numpy().copy()[::-1, ::-1]
    read_only.flags.writeable = False
    flipped = HardMarginSVM().fit(read_only, names[::-1].tolist())
    np.testing.assert_allclose(flipped.alpha_[::-1], svm.alpha_, rtol=1e-6, atol=1e-12)
    assert (HardMarginSVM().fit(K, y.int()).predict(K) == y).all()


def test_nothing_outside_changes():
    K, y = case("full")
    K.requires_grad_(True)
    before, state, kept = K.detach().clone(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    HardMarginSVM().fit(K, y)
    KernelRidge(0.1).fit(K, y)
    assert torch.equal(K.detach(), before)
    assert K.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == kept).all()  # noqa: NPY002


def test_contradictory_duplicates_are_named():
    x, y = features(41, 97), torch.ones(41)
    for i, j in [(4, 17), (9, 30), (11, 31), (12, 32)]:
        x[j], y[j] = x[i], -1
    y[20] = -1
    svm = HardMarginSVM().fit(x @ x.T, y)
    assert svm.status_ == "not separable"
    assert svm.margin_ == 0
    assert svm.gap_ == 1
    assert "different labels: 4 and 17, 9 and 30, 11 and 31. " in svm.advice_
    assert "KernelRidge" in svm.advice_
    rough = HardMarginSVM().fit((x @ x.T).float(), y)  # exact copies stay exact copies
    assert rough.status_ == "not separable"
    assert "4 and 17, 9 and 30, 11 and 31" in rough.advice_
    x[[17, 30, 31, 32]] += 1.0
    assert HardMarginSVM().fit(x @ x.T, y).status_ == "optimal"


@pytest.mark.parametrize("n", [4, 23, 331])
def test_points_that_no_plane_separates(n):
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) if n == 4 else features(n, 5)
    y = torch.sign(x[:, 0] * x[:, 1])
    svm = HardMarginSVM().fit(x @ x.T, y)
    assert svm.status_ == "not separable"
    assert "same features" not in svm.advice_
    assert "KernelRidge" in svm.advice_
    # the witness: a non-negative combination of the signed points that cancels, which no separator survives
    assert (svm.alpha_ >= 0).all()
    torch.testing.assert_close(svm.alpha_.sum().item(), 1.0)
    assert (x.double().T @ (svm.alpha_ * y)).norm() < 1e-6


def test_the_status_agrees_with_a_linear_program():
    optimize = pytest.importorskip("scipy.optimize")
    seen = set()
    for seed in range(60):
        draw = generator(seed)
        n, p = int(torch.randint(5, 47, (1,), generator=draw)), int(torch.randint(1, 31, (1,), generator=draw))
        x = torch.randn(n, p, generator=draw, dtype=torch.float64)
        x = x.round() if seed % 3 == 0 else x  # repeated and dependent points
        y = torch.where(torch.rand(n, generator=draw) < 0.5, -1.0, 1.0).double()
        y[:2] = torch.tensor([-1.0, 1.0])
        program = optimize.linprog(np.zeros(p), -(y[:, None] * x).numpy(), -np.ones(n), bounds=[(None, None)] * p)
        svm = HardMarginSVM().fit(x @ x.T, y)
        assert svm.status_ == {0: "optimal", 2: "not separable"}[program.status], seed
        seen.add(svm.status_)
    assert len(seen) == 2


def test_a_zero_feature_vector_is_named():
    x = features(11, 13)
    x[5] = 0
    svm = HardMarginSVM().fit(x @ x.T, torch.arange(11) % 2)
    assert svm.status_ == "not separable"
    assert "Point 5 has a zero feature vector" in svm.advice_


def test_the_class_that_cannot_be_separated_is_named():
    x = features(11, 23)
    x[1], y = x[2], torch.arange(11) % 3
    y[[1, 2]] = torch.tensor([0, 1])
    svm = HardMarginSVM().fit(x @ x.T, y)
    assert svm.status_ == "not separable"
    assert svm.advice_.startswith("Class 0 against the rest. ")
    assert svm.margin_[2] > 0


@pytest.mark.parametrize("name", ["full", "wide", "ill-conditioned", "deficient"])
def test_a_kernel_computed_in_float32(name):
    K, y = case(name)
    rough = K.float()
    if name in ("ill-conditioned", "deficient"):
        assert torch.linalg.eigvalsh(rough.double())[0] < 0  # what makes it hard
    svm = HardMarginSVM().fit(rough, y)
    assert svm.alpha_.dtype == torch.float64
    assert svm.status_ in ("optimal", "inaccurate")
    if svm.status_ == "optimal":
        assert certificate(rough.double(), y, svm.alpha_) <= 1e-6
        torch.testing.assert_close(svm.margin_, HardMarginSVM().fit(K, y).margin_, rtol=1e-2, atol=0)
    else:
        assert "float64" in svm.advice_


@pytest.mark.parametrize("cast", [torch.float32, torch.float64])
def test_rounding_never_makes_inseparable_points_optimal(cast):
    x = features(307, 5)
    y = torch.sign(x[:, 0] * x[:, 1])
    K = (x.float() @ x.float().T).to(cast)
    svm = HardMarginSVM().fit(K, y)
    assert svm.status_ != "optimal"
    assert svm.advice_


def test_a_kernel_with_a_negative_direction_is_not_called_inseparable():
    K, y = torch.tensor([[1.0, 1.1], [1.1, 1.0]]), torch.tensor([0, 1])
    svm = HardMarginSVM().fit(K, y)
    assert svm.status_ == "inaccurate"
    assert "negative eigenvalues" in svm.advice_


def test_an_asymmetry_of_rounding_is_averaged():
    K, y = case("wide")
    skew = features(331, 331, seed=5) * 3e-9  # 0.76 of the largest asymmetry accepted
    svm = HardMarginSVM().fit(K + (skew - skew.T), y)
    assert svm.status_ == "optimal"
    torch.testing.assert_close(svm.alpha_, HardMarginSVM().fit(K, y).alpha_, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not DATA.exists(), reason="the MNIST files are not beside the checkout")
@pytest.mark.parametrize("gamma", [0.003, 0.02])
def test_handwritten_threes_and_eights(gamma):
    read = lambda name, skip: np.frombuffer(gzip.decompress((DATA / name).read_bytes()), np.uint8, offset=skip)
    digits = read("t10k-labels-idx1-ubyte.gz", 8)
    chosen = np.flatnonzero((digits == 3) | (digits == 8))[:701]
    x = torch.from_numpy(read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784)[chosen] / 255.0)
    y = np.where(digits[chosen] == 8, 1, -1)
    K = rbf(x, gamma)
    svm = HardMarginSVM().fit(K, y)
    assert svm.status_ == "optimal"
    assert certificate(K, torch.from_numpy(y), svm.alpha_) <= 1e-6


def shifted(value: float) -> torch.Tensor:
    K = torch.eye(5)
    K[1, 3] = value
    return K


@pytest.mark.parametrize("machine", [HardMarginSVM(), KernelRidge(1.0)], ids=["svm", "ridge"])
@pytest.mark.parametrize(
    ("K", "message"),
    [
        (torch.ones(5, 4), r"K: got shape \[5, 4\]; expected a square matrix.*k\(x_test, x_train\) to predict"),
        (torch.ones(5), r"K: got shape \[5\]; expected a square matrix"),
        (torch.ones(5, 5, 2, 2), r'K: got shape \[5, 5, 2, 2\]; .*"trace" or "sum"'),
        (torch.ones(0, 0), r"K: got shape \[0, 0\]"),
        (shifted(float("nan")), r"K: got nan at index \[1, 3\]; expected finite"),
        (shifted(float("inf")), r"K: got inf at index \[1, 3\]"),
        (shifted(0.5), r"K: got K\[1, 3\] = 0.5 but K\[3, 1\] = 0; expected a symmetric matrix"),
        (-torch.eye(5), r"K: got -1 on the diagonal at index 0; expected a kernel"),
        (torch.eye(5) * 1j, r"K: got complex values; expected real numbers"),
        (np.full((5, 5), "a"), r"K: got <U1 values; expected real numbers"),
        ([[1.0], [1.0, 2.0]], r"K: got rows of unequal length"),
    ],
)
def test_refused_kernels(machine, K, message):
    with pytest.raises(Refused, match=message):
        machine.fit(K, torch.arange(5) % 2)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.arange(4) % 2, r"y: got 4 entries; expected 5, one per row of K"),
        (torch.ones(5), r"y: got one class, 1.0; expected two or more"),
        (torch.ones(5, 1), r"y: got shape \[5, 1\]; expected \[n\] labels"),
        (torch.tensor([0, 1, float("nan"), 1, 0]), r"y: got nan at index 2; expected labels"),
    ],
)
def test_refused_labels(y, message):
    with pytest.raises(Refused, match=message):
        HardMarginSVM().fit(torch.eye(5), y)


def test_other_refusals_of_the_svm():
    with pytest.raises(Refused, match=r"K: got a zero diagonal; expected K\[i, i\] > 0"):
        HardMarginSVM().fit(torch.zeros(3, 3), [0, 1, 1])
    with pytest.raises(Refused, match=r"tol: got 0; expected a number between 0 and 1"):
        HardMarginSVM(tol=0)


@pytest.mark.parametrize("machine", [HardMarginSVM(), KernelRidge(1.0)], ids=["svm", "ridge"])
def test_refused_test_kernels(machine):
    with pytest.raises(Refused, match=f"{type(machine).__name__}: got no fitted machine; expected fit"):
        type(machine)(0.5).predict(torch.eye(5))
    machine.fit(torch.eye(5), torch.arange(5) % 2)
    with pytest.raises(Refused, match=r"K_test: got shape \[5, 3\]; expected \[m, 5\]"):
        machine.predict(torch.ones(5, 3))
    with pytest.raises(Refused, match=r"K_test: got nan at index \[1, 3\]"):
        machine.predict(shifted(float("nan")))


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_ridge_equals_a_plain_solve(columns):
    x, z = features(37, 11), features(5, 11, seed=1)
    y = features(37, columns or 1, seed=2)
    y = y if columns else y[:, 0]
    G = (x @ x.T + 0.3 * torch.eye(37, dtype=torch.float64)).numpy()
    expected = np.linalg.solve(G, y.numpy())
    machine = KernelRidge(0.3).fit(x @ x.T, y)
    assert machine.status_ == "solved"
    assert machine.residual_ < 1e-12
    torch.testing.assert_close(machine.alpha_, torch.from_numpy(expected), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(machine.predict(z @ x.T), z @ x.T @ torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    same = KernelRidge(0.3).fit((x @ x.T).numpy(), y.tolist())
    np.testing.assert_array_equal(same.alpha_, machine.alpha_.numpy())


def test_leave_one_out_equals_refits():
    x, y = features(17, 5), features(17, 2, seed=1)
    K = x @ x.T
    loo = KernelRidge(0.7).fit(K, y).loo_
    for i in range(17):
        rest = [j for j in range(17) if j != i]
        without = KernelRidge(0.7).fit(K[rest][:, rest], y[rest])
        torch.testing.assert_close(loo[i], y[i] - without.predict(K[i : i + 1, rest])[0])


def test_ridge_scales_with_the_kernel():
    x, y = features(17, 5), features(17, 1, seed=1)[:, 0]
    K = x @ x.T
    one, other = KernelRidge(0.7).fit(K, y), KernelRidge(0.7e6).fit(1e6 * K, y)
    torch.testing.assert_close(other.predict(1e6 * K), one.predict(K))
    assert not torch.allclose(KernelRidge(0.7).fit(1e6 * K, y).predict(1e6 * K), one.predict(K))  # ridge is absolute


@pytest.mark.parametrize("n", [7, 61])
def test_a_singular_system_is_a_status(n):
    x = features(n, 5)
    machine = KernelRidge(0.0).fit(x @ x.T, x[:, 0])
    assert machine.status_ == "singular"
    assert "Use a ridge well above" in machine.advice_
    assert machine.alpha_.isnan().all()
    assert machine.loo_.isnan().all()
    assert KernelRidge(1e-3).fit(x @ x.T, x[:, 0]).status_ == "solved"


def test_refusals_of_ridge():
    with pytest.raises(Refused, match=r"ridge: got -1; expected a finite number >= 0"):
        KernelRidge(-1)
    with pytest.raises(Refused, match=r"y: got 4 entries; expected 5"):
        KernelRidge(1.0).fit(torch.eye(5), torch.ones(4))
    with pytest.raises(Refused, match=r"y: got nan at index \[2\]; .*Correct that value of y"):
        KernelRidge(1.0).fit(torch.eye(5), torch.tensor([0, 1, float("nan"), 1, 0]))
    with pytest.raises(Refused, match=r"y: got shape \[5, 1, 1\]"):
        KernelRidge(1.0).fit(torch.eye(5), torch.ones(5, 1, 1))
    with pytest.raises(Refused, match=r"y: got shape \[\]"):
        KernelRidge(1.0).fit(torch.eye(5), 1.0)
