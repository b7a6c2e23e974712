"""Spectrum, Nystrom extension, alignment and effective rank against slow independent computations."""

from __future__ import annotations

import math
import pickle
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ntkit.gram.gram_matrix as gram_matrix
import ntkit.gram.krylov as krylov
from ntkit.base.checks import Refused, Undefined
from ntkit.measures.spectra import alignment, effective_rank, spectrum


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(n: int, rank: int = 17, seed: int = 0) -> Tensor:
    F = draw(n, rank, seed=seed)
    return F @ F.T


def full(n: int, C: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[n, n, C, C] from features, and the same as an n C x n C matrix with row i C + c."""
    F = draw(n, C, 2 * n * C, seed=seed)
    flat = F.reshape(n * C, -1)
    return torch.einsum("icp,jdp->ijcd", F, F), flat @ flat.T


class Operator:
    """K known only through its products."""

    def __init__(self, K: np.ndarray, dtype: type = np.float64):
        self.K, self.shape, self.dtype, self.products = K.astype(dtype), K.shape, dtype, 0

    def __matmul__(self, v):
        return self.K @ v

    def to_scipy(self):
        from scipy.sparse.linalg import LinearOperator

        def product(v):
            self.products += 1
            return self.K @ v.astype(self.dtype)

        return LinearOperator(self.shape, matvec=product, matmat=product, dtype=self.dtype)


class WithDiagonal(Operator):
    def diagonal(self):
        return torch.from_numpy(np.diag(self.K).copy()).requires_grad_()


class WithTrace(Operator):
    def trace(self):
        return np.trace(self.K)


def test_eigenpairs_against_the_definition():
    K = gram(13)
    s = spectrum(K)
    V, lam = s.eigenvectors, s.eigenvalues
    assert s.status == "converged"
    assert bool((lam[:-1] >= lam[1:]).all())
    assert torch.allclose(V.T @ V, torch.eye(13, dtype=torch.float64), atol=1e-13)
    assert torch.allclose((V * lam) @ V.T, K, atol=1e-11)
    assert float(s.residuals.max()) <= 1e-8
    assert torch.allclose(s.residuals, (K @ V - V * lam).norm(dim=0) / lam[0], atol=1e-14)
    assert s.trace == pytest.approx(float((draw(13, 17) ** 2).sum()), rel=1e-13)  # sum_i |J(x_i)|^2
    assert float(lam.sum()) == pytest.approx(s.trace, rel=1e-13)
    assert abs(s.tail) < 1e-11 * s.trace
    assert bool((V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all())


def test_full_kernel_rows_are_sample_major():
    K4, K2 = full(5, 3)
    a, b = spectrum(K4), spectrum(K2)
    assert a.eigenvectors.shape == (15, 15)
    assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-12)
    assert torch.allclose(a.eigenvectors, b.eigenvectors, atol=1e-9)
    assert (a.outputs, b.outputs) == (3, 1)


@pytest.mark.parametrize("wrap", [lambda K: K, lambda K: K.numpy(), lambda K: Operator(K.numpy())])
def test_top_k_is_the_top_of_the_dense_one(wrap):
    K = gram(60)
    dense, top = spectrum(K), spectrum(wrap(K), k=7)
    assert top.eigenvectors.shape == (60, 7)
    assert torch.allclose(top.eigenvalues, dense.eigenvalues[:7], rtol=1e-12)
    assert torch.allclose(top.eigenvectors, dense.eigenvectors[:, :7], atol=1e-9)
    assert float(top.residuals.max()) < 1e-12
    again = spectrum(wrap(K), k=7)
    assert torch.equal(again.eigenvectors, top.eigenvectors)


def test_top_k_does_not_form_the_operator_and_large_k_is_dense():
    K = gram(200, rank=300)
    operator = WithDiagonal(K.numpy())
    top = spectrum(operator, k=2)
    assert operator.products < 150
    assert top.trace == pytest.approx(float(K.diagonal().sum()))
    assert top.tail == pytest.approx(float(torch.linalg.eigvalsh(K)[:-2].sum()), rel=1e-10)
    most = spectrum(WithTrace(K.numpy()), k=150)
    assert torch.allclose(most.eigenvalues, spectrum(K).eigenvalues[:150], rtol=1e-11)
    assert most.trace == pytest.approx(float(np.trace(K.numpy())))
    nothing = spectrum(Operator(K.numpy()), k=1)
    assert nothing.trace is None
    assert nothing.tail is None


@pytest.mark.parametrize("copies", [3, 10])
def test_repeated_eigenvalues_are_all_found(copies):
    # G (x) I: one Krylov vector sees each eigenspace once; plain Lanczos loses a copy in the second case.
    Q = torch.linalg.qr(draw(60, 60))[0]
    G = (Q * torch.arange(60, 0, -1, dtype=torch.float64)) @ Q.T
    K = torch.kron((G + G.T) / 2, torch.eye(copies, dtype=torch.float64))
    k = copies + 2
    expected = torch.tensor([60.0] * copies + [59.0] * 2, dtype=torch.float64)
    top = spectrum(K, k=k)
    assert torch.allclose(top.eigenvalues, expected, rtol=1e-11)
    assert torch.allclose(top.eigenvectors.T @ top.eigenvectors, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(spectrum(torch.eye(30), k=9).eigenvalues, torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e200, 1e300])
@pytest.mark.parametrize("k", [5, None])
def test_scales_whose_squares_are_not_representable(scale, k):
    values = torch.linspace(1, 0, 60, dtype=torch.float64)
    Q = torch.linalg.qr(draw(60, 60))[0]
    K = (Q * values) @ Q.T * scale
    found = spectrum((K + K.T) / 2, k)
    assert torch.allclose(found.eigenvalues / scale, values[:k], atol=1e-12)
    assert 0 < float(found.residuals.max()) < 1e-7
    assert effective_rank((K + K.T) / 2) == pytest.approx(float(values.sum()), rel=1e-12)


def test_top_k_beyond_the_rank():
    top = spectrum(gram(60, rank=3), k=8)
    assert torch.allclose(top.eigenvalues[:3], spectrum(gram(60, rank=3)).eigenvalues[:3], rtol=1e-12)
    assert float(top.eigenvalues[3:].abs().max()) < top.floor


def test_single_precision_operator():
    K = gram(150, rank=40)
    top = spectrum(Operator(K.numpy(), np.float32), k=5)
    assert torch.allclose(top.eigenvalues, spectrum(K).eigenvalues[:5], rtol=1e-5)
    assert top.eigenvalues.dtype == torch.float64
    assert top.floor == pytest.approx(float(top.eigenvalues[0]) * 2.0**-23)


def test_iteration_that_does_not_converge_is_a_status(monkeypatch):
    monkeypatch.setattr(krylov, "_ROUNDS", 2)
    K = gram(300, rank=400)
    lost = spectrum(Operator(K.numpy()), k=2)
    assert "did not converge" in lost.status
    assert float(lost.residuals.max()) > 1e-8  # how far it got
    kept = spectrum(K, k=2)  # in memory the dense route stands in
    assert kept.status == "converged"
    assert torch.allclose(kept.eigenvalues, spectrum(K).eigenvalues[:2])


def test_precisions_and_inputs():
    K = gram(11)
    exact = spectrum(K)
    for other in (
        K.float(),
        K.numpy(),
        K.numpy().astype(np.longdouble),
        K.clone().requires_grad_(),
        K.numpy()[::1, ::1],
    ):
        s = spectrum(other)
        assert s.eigenvalues.dtype == torch.float64
        assert torch.allclose(s.eigenvalues, exact.eigenvalues, atol=1e-5 * float(exact.eigenvalues[0]))
    locked = K.numpy().copy()
    locked.flags.writeable = False
    assert torch.equal(spectrum(locked).eigenvalues, exact.eigenvalues)
    assert spectrum([[2, 0], [0, 1]]).eigenvalues.tolist() == [2.0, 1.0]
    half = spectrum(K.half()).eigenvalues
    assert torch.allclose(half, exact.eigenvalues, atol=2e-3 * float(exact.eigenvalues[0]))
    tilted = K + 1e-12 * K.triu(1)  # rounding-level asymmetry: the spectrum of the symmetric part
    assert torch.allclose(
        spectrum(tilted).eigenvalues, torch.linalg.eigvalsh((tilted + tilted.T) / 2).flip(0), atol=1e-12
    )


def test_energy_laws():
    K = gram(13)
    s = spectrum(K)
    y = draw(13, seed=3)
    E = s.energy(y)
    slow = [sum(float(s.eigenvectors[:, i] @ y) ** 2 for i in range(k + 1)) / float(y @ y) for k in range(13)]
    assert E.tolist() == pytest.approx(slow, abs=1e-13)
    assert bool((E[1:] >= E[:-1]).all())
    assert float(E[-1]) == pytest.approx(1, abs=1e-13)
    step = s.energy(s.eigenvectors[:, 4])
    assert torch.allclose(step, (torch.arange(13) >= 4).double(), atol=1e-13)
    assert torch.allclose(s.energy(1e-200 * y), E, atol=1e-13)
    assert torch.allclose(s.energy(y.numpy()), E)
    with pytest.raises(Undefined, match="v: got zeros only; expected values that differ from zero"):
        s.energy(torch.zeros(13))


def test_energy_of_several_columns():
    s = spectrum(gram(13))
    Y = draw(13, 2, seed=4)
    weights = (Y**2).sum(0)
    expected = (s.energy(Y[:, 0]) * weights[0] + s.energy(Y[:, 1]) * weights[1]) / weights.sum()
    assert torch.allclose(s.energy(Y), expected, atol=1e-13)
    K4, K2 = full(5, 3)
    Y = draw(5, 3, seed=5)
    flat = torch.stack([Y[i, c] for i in range(5) for c in range(3)])
    expected = spectrum(K2).energy(flat)
    assert torch.allclose(spectrum(K4).energy(Y), expected, atol=1e-9)
    assert torch.allclose(spectrum(Operator(K2.numpy()), k=15).energy(Y), expected, atol=1e-9)


def test_nystrom():
    K = gram(13)
    s = spectrum(K)
    assert torch.allclose(s.extend(K), s.eigenvectors, atol=1e-9)
    F, G = draw(13, 17), draw(4, 17, seed=9)
    slow = torch.tensor(
        [
            [
                sum(float(G[x] @ F[j] * s.eigenvectors[j, i]) for j in range(13)) / float(s.eigenvalues[i])
                for i in range(3)
            ]
            for x in range(4)
        ],
        dtype=torch.float64,
    )
    assert torch.allclose(spectrum(K, k=3).extend((G @ F.T).numpy()), slow, atol=1e-10)
    K4, K2 = full(5, 3)
    assert torch.allclose(spectrum(K4).extend(K4), spectrum(K2).eigenvectors, atol=1e-8)
    assert spectrum(K4).extend(K4[:2]).shape == (6, 15)


def test_extend_refuses_what_has_no_eigenfunction():
    K = gram(13, rank=5)
    with pytest.raises(Refused, match=r"eigenvalue 6 of 13.*Only the top 5 of the 13 are usable.*k=5"):
        spectrum(K).extend(K)
    top = spectrum(K, k=5)
    assert torch.allclose(top.extend(K), top.eigenvectors, atol=1e-9)
    with pytest.raises(Refused, match="None is usable"):
        spectrum(-torch.eye(3)).extend(torch.eye(3))
    # Rounding of a float32 kernel leaves small positive eigenvalues: still noise.
    single = draw(13, 5).float() @ draw(13, 5).float().T
    with pytest.raises(Refused, match="Only the top 5"):
        spectrum((single + single.T) / 2).extend(single)


def test_alignment_against_the_formula():
    K1, K2 = gram(11), gram(11, seed=1)
    naive = sum(float(K1[i, j] * K2[i, j]) for i in range(11) for j in range(11)) / float(K1.norm() * K2.norm())
    assert alignment(K1, K2) == pytest.approx(naive, rel=1e-13)
    assert alignment(K1.numpy(), K2.float()) == pytest.approx(naive, rel=1e-6)
    assert alignment(K1, K1) == 1.0
    y, Y = draw(11, seed=2), draw(11, 3, seed=3)
    assert alignment(K1, y) == pytest.approx(alignment(K1, torch.outer(y, y)), rel=1e-12)
    assert alignment(K1, y[:, None].numpy()) == pytest.approx(alignment(K1, y), rel=1e-14)
    assert alignment(K1, Y) == pytest.approx(alignment(K1, Y @ Y.T), rel=1e-12)
    assert alignment(K1, [1] * 5 + [-1] * 6) == pytest.approx(
        alignment(K1, torch.tensor([1.0] * 5 + [-1.0] * 6)), rel=1e-14
    )
    assert alignment(K1 * 1e200, y * 1e-200) == pytest.approx(alignment(K1, y), rel=1e-13)


def test_alignment_from_the_spectrum():
    K, y = gram(11), draw(11, seed=2)
    s = spectrum(K)
    projections = (s.eigenvectors.T @ y) ** 2
    expected = float((s.eigenvalues * projections).sum() / (s.eigenvalues.norm() * (y @ y)))
    assert alignment(K, y) == pytest.approx(expected, rel=1e-12)


def test_centered_alignment_against_the_formula_and_its_invariances():
    n = 11
    K1, K2, y, Y = gram(n), gram(n, seed=1), draw(n, seed=2), draw(n, 3, seed=3)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    A, B = H @ K1 @ H, H @ K2 @ H
    assert alignment(K1, K2, centered=True) == pytest.approx(float((A * B).sum() / (A.norm() * B.norm())), rel=1e-12)
    assert alignment(K1, Y, centered=True) == pytest.approx(alignment(A, H @ Y @ Y.T @ H), rel=1e-12)
    assert alignment(K1, y + 7, centered=True) == pytest.approx(alignment(K1, y, centered=True), rel=1e-12)
    F, G = draw(n, 5, seed=6), draw(n, 4, seed=7)
    Q = torch.linalg.qr(draw(5, 5, seed=8))[0]
    moved = 3 * F @ Q + draw(5, seed=9)  # scale, rotation and offset of features leave CKA as it is
    assert alignment(moved @ moved.T, G @ G.T, centered=True) == pytest.approx(
        alignment(F @ F.T, G @ G.T, centered=True), rel=1e-11
    )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    assert alignment(K1[order][:, order], y[order], centered=True) == pytest.approx(
        alignment(K1, y, centered=True), rel=1e-12
    )
    constant = torch.full((n, n), 0.1)
    for one, other, name in ((K1, constant[0], "y"), (constant, y, "K1"), (constant, K2, "K1"), (K1, constant, "K2")):
        with pytest.raises(
            Undefined, match=rf"alignment: {name}: got one constant .*of which centering leaves nothing"
        ):
            alignment(one, other, centered=True)


@pytest.mark.parametrize("centered", [False, True])
def test_alignment_of_full_kernels(centered):
    n, C = 5, 3
    (K4, K2), (L4, L2) = full(n, C), full(n, C, seed=1)
    Y = draw(n, C, seed=2)
    y = torch.stack([Y[i, c] for i in range(n) for c in range(C)])
    H = torch.eye(n * C, dtype=torch.float64)
    if centered:
        H = torch.kron(torch.eye(n, dtype=torch.float64) - 1 / n, torch.eye(C, dtype=torch.float64))
    A, B, z = H @ K2 @ H, H @ L2 @ H, H @ y
    assert alignment(K4, L4, centered=centered) == pytest.approx(
        float((A * B).sum() / (A.norm() * B.norm())), rel=1e-12
    )
    assert alignment(K4, Y, centered=centered) == pytest.approx(float(z @ A @ z / (A.norm() * (z @ z))), rel=1e-12)


@pytest.mark.parametrize("centered", [False, True])
def test_blocks_do_not_change_the_alignment(monkeypatch, centered):
    (K4, _), (L4, _) = full(7, 2), full(7, 2, seed=1)
    Y = draw(7, 2, seed=2)
    whole = alignment(K4, L4, centered=centered), alignment(K4, Y, centered=centered)
    monkeypatch.setattr(gram_matrix, "BLOCK", 3 * 7 * 4)  # three rows at a time, the last block one row
    assert (alignment(K4, L4, centered=centered), alignment(K4, Y, centered=centered)) == pytest.approx(
        whole, rel=1e-13
    )
    K4[6, 2, 0, 1] = math.nan
    with pytest.raises(Refused, match=r"nan at index \[6, 2, 0, 1\]"):
        alignment(K4, Y, centered=centered)


def test_float32_alignment_accumulates_in_float64():
    # 1e8 entries' worth of one size next to a small structure: float32 sums would lose the structure.
    n = 600
    K = torch.full((n, n), 1.0, dtype=torch.float32)
    K += 1e-3 * torch.eye(n)
    exact = (n * n + 2e-3 * n + 1e-6 * n, n * n + 1e-3 * n)
    expected = exact[1] / math.sqrt(exact[0]) / n
    assert 1 - alignment(K, torch.ones(n)) == pytest.approx(1 - expected, rel=1e-3)


def test_effective_rank():
    assert effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-13)
    u = draw(9)
    assert effective_rank(torch.outer(u, u)) == pytest.approx(1, rel=1e-12)
    K = gram(31)
    assert effective_rank(K) == pytest.approx(float(K.trace() / torch.linalg.matrix_norm(K, 2)), rel=1e-12)
    assert effective_rank(5 * K) == pytest.approx(effective_rank(K), rel=1e-12)
    assert effective_rank(WithDiagonal(K.numpy())) == pytest.approx(effective_rank(K), rel=1e-12)
    K4, K2 = full(5, 3)
    assert effective_rank(K4) == pytest.approx(effective_rank(K2), rel=1e-12)
    with pytest.raises(Undefined, match="effective_rank: got largest eigenvalue -1; expected a positive one"):
        effective_rank(-torch.eye(3))
    with pytest.raises(Refused, match=r"without trace.*\.diagonal\(\)"):
        effective_rank(Operator(K.numpy()))


def _with(K: Tensor, value: float, *index: int) -> Tensor:
    K = K.clone()
    K[index] = value
    return K


@pytest.mark.parametrize(
    ("K", "message"),
    [
        (torch.ones(3, 4), r"shape \[3, 4\]; expected a square"),
        (torch.ones(3, 3, 2, 1), r"shape \[3, 3, 2, 1\]"),
        (torch.ones(3), r"shape \[3\]"),
        (torch.ones(0, 0), r"shape \[0, 0\], empty"),
        (torch.zeros(3, 3), "zeros only"),
        (_with(gram(5), math.nan, 3, 1), r"nan at index \[3, 1\]"),
        (_with(gram(5), math.inf, 4, 4), r"inf at index \[4, 4\]"),
        (_with(full(3, 2)[0], math.nan, 1, 2, 0, 1), r"nan at index \[1, 2, 0, 1\]"),
        (gram(5) + 1e-8 * gram(5).triu(), "symmetric matrix.*1e-10 in torch.float64.*K.T"),
        (gram(5).float() + 1e-3 * gram(5).float().triu(1), "symmetric matrix.*1e-04 in torch.float32"),
        (_with(full(3, 2)[0], 50.0, 1, 1, 0, 1), "symmetric matrix"),
        (torch.eye(3, dtype=torch.complex128), "real numbers"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(K, message):
    with pytest.raises(Refused, match=message):
        spectrum(K)
    with pytest.raises(Refused, match=message):
        alignment(K, torch.ones(3))
    with pytest.raises(Refused, match=message):
        effective_rank(K)


def test_rounding_asymmetry_is_let_through():
    spectrum(gram(5) + 1e-12 * gram(5).triu(1))
    spectrum(gram(5).float() + 1e-6 * gram(5).float().triu(1))


@pytest.mark.parametrize("k", [0, -1, 6, 2.0, True])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(Refused, match=r"k: got .*expected an integer from 1 to 5"):
        spectrum(gram(5), k=k)


def test_bad_operators_are_refused():
    with pytest.raises(Refused, match="k: got None with an operator"):
        spectrum(Operator(gram(5).numpy()))
    with pytest.raises(Refused, match="an integer from 1 to 5"):
        spectrum(Operator(gram(5).numpy()), k=6)
    with pytest.raises(Refused, match=r"operator: got shape \[5, 4\]"):
        spectrum(Operator(gram(5).numpy()[:, :4]), k=1)
    with pytest.raises(Refused, match="operator @ vector: got nan at index"):
        spectrum(Operator(_with(gram(5), math.nan, 2, 2).numpy()), k=1)
    with pytest.raises(Refused, match="operator: got zeros only"):
        spectrum(Operator(np.zeros((5, 5))), k=1)


def test_wrong_shapes_of_vectors_are_refused():
    s, s4 = spectrum(gram(6)), spectrum(full(3, 2)[0])
    for v in (torch.ones(5), torch.ones(2, 3), torch.ones(6, 1, 1), torch.ones(6, 0), torch.tensor(1.0)):
        with pytest.raises(Refused, match=r"v: got shape.*expected \[6\] or \[6, C\]"):
            s.energy(v)
    with pytest.raises(Refused, match=r"expected \[6\] or \[3, 2\]"):  # transposed targets have the right size
        s4.energy(torch.ones(2, 3))
    with pytest.raises(Refused, match=r"v: got nan at index \[2\]"):
        s.energy([0, 0, math.nan, 0, 0, 0])
    with pytest.raises(Refused, match=r"K_test: got shape \[4, 5\]; expected \[m, 6\]"):
        s.extend(torch.ones(4, 5))
    with pytest.raises(Refused, match=r"K_test: got shape \[4, 2, 2, 2\]; expected \[m, 3, 2, 2\]"):
        s4.extend(torch.ones(4, 2, 2, 2))
    with pytest.raises(Refused, match=r"K_test: got nan at index \[1, 2\]"):
        s.extend(_with(torch.ones(4, 6), math.nan, 1, 2))


def test_wrong_targets_are_refused():
    K, K4 = gram(6), full(3, 2)[0]
    for other in (torch.ones(5), torch.ones(5, 5), torch.ones(6, 6, 2, 2), torch.ones(6, 0)):
        with pytest.raises(Refused, match=r"K2_or_y: got shape.*expected \[6, 6\], \[6\] or \[6, C\]"):
            alignment(K, other)
    for other in (torch.ones(6), torch.ones(3), torch.ones(2, 3), torch.ones(6, 6)):
        with pytest.raises(Refused, match=r"expected \[3, 3, 2, 2\] or \[3, 2\]"):
            alignment(K4, other)
    with pytest.raises(Refused, match="y: got zeros only"):
        alignment(K, torch.zeros(6))
    with pytest.raises(Refused, match=r"y: got nan at index \[1\]"):
        alignment(K, [0, math.nan, 0, 0, 0, 0])
    with pytest.raises(Refused, match=r"K2: got zeros only"):
        alignment(K, torch.zeros(6, 6))
    with pytest.raises(Refused, match=r"K2: got K2\[0, 3\] = .* but K2\[3, 0\] = .*; expected a symmetric matrix"):
        alignment(K, draw(6, 6))


def test_class_labels_are_refused_since_their_numbering_would_count():
    K, y = gram(12), torch.arange(12) % 3
    values = y.double()
    one_hot = torch.nn.functional.one_hot(y)
    for labels in (y, y.numpy(), y.tolist(), y[:, None], y.to(torch.int8)):
        for call in (spectrum(K, k=3).energy, lambda v: alignment(K, v), lambda v: alignment(K, v, centered=True)):
            with pytest.raises(Refused, match=r"got integers of 3 values \(0 to 2\) .*expected numbers.*one_hot"):
                call(labels)
    for two in (y > 1, (y > 1).long()):
        with pytest.raises(Refused, match=r"Two classes: give 2.0 \* y - 1"):
            alignment(K, two)
        # of two classes the centered alignment does not depend on their numbers
        assert alignment(K, two, centered=True) == pytest.approx(alignment(K, 2.0 * two - 1, centered=True), rel=1e-12)
    assert alignment(K, one_hot) == pytest.approx(alignment(K, one_hot @ one_hot.T + 0.0), rel=1e-12)
    assert alignment(K, values) == pytest.approx(alignment(K, values.outer(values)), rel=1e-12)
    assert alignment(K, torch.arange(12)) == pytest.approx(alignment(K, torch.arange(12.0)), rel=1e-14)  # no two alike
    flat = torch.nn.functional.one_hot(torch.tensor([0, 1, 1])).flatten()  # of all outputs
    assert float(spectrum(full(3, 2)[0]).energy(flat)[-1]) == pytest.approx(1, rel=1e-12)


def test_nothing_global_changes():
    K = gram(40)
    copy = K.clone()
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()  # noqa: NPY002
    s = spectrum(K, k=3)
    s.energy(K[0])
    s.extend(K)
    alignment(K, K[0], centered=True)
    effective_rank(WithDiagonal(K.numpy()))
    assert torch.equal(K, copy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the times of threads from /proc")
def test_one_thread_is_one_also_in_numpy(threads):
    """NumPy's own threads wait actively: beside another process, small operations took several times as long."""

    def ticks() -> dict[str, int]:
        """Processor time of each thread but this one."""
        tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(threading.get_native_id())]
        return {task.name: sum(map(int, (task / "stat").read_text().rsplit(")")[-1].split()[11:13])) for task in tasks}

    threads(1)
    K = (gram(700, 9) + 9) ** 3
    before = ticks()
    for _ in range(3):
        assert spectrum(K, k=60).status == "converged"
    after = ticks()
    assert sum(after[name] - before.get(name, 0) for name in after) <= 1
