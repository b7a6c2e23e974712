"""Spectra, energies and alignment of a Gram that cannot be formed, against the dense ones."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from streamed_gram import LargestTensor, StreamedGram
from torch import Tensor

import ntkit
import ntkit.gram.gram_matrix as gram_matrix


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rbf(n: int) -> Tensor:
    x = draw(n, 6)
    return torch.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 8)


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(gram_matrix, "free_memory", lambda device: 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_pairs_are_those_of_the_dense_matrix(no_room, dtype):
    n, k = 1103, 50
    K = rbf(n).to(dtype)
    values, vectors = torch.linalg.eigh(K.double())
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    gram = StreamedGram(K)
    with LargestTensor(K) as largest:
        top = ntkit.spectrum(gram, k)
    assert top.status == "converged"
    assert torch.allclose(top.eigenvalues, values, rtol=1e-12)
    assert float((top.eigenvectors.T @ vectors).abs().diagonal().min()) > 1 - 1e-9
    again = (K.double() @ top.eigenvectors - top.eigenvectors * top.eigenvalues).norm(dim=0) / values[0]
    assert torch.allclose(top.residuals, again, atol=1e-14)
    assert bool((top.residuals <= 1e-12).all())
    # one pass per block of 16 vectors, at least as many as 50 vectors need, and no row by itself
    assert gram.widest == 16
    assert k / 16 <= gram.products <= 40
    assert gram.rows_read == 0
    assert n * 16 <= largest.numbers <= n * (2 * k + 6 * 16) < n * n / 4


def test_energies_of_targets_are_the_dense_ones(no_room):
    K, y = rbf(307), draw(307, 3, seed=2)
    dense = torch.linalg.eigh(K).eigenvectors.flip(1)[:, :20]
    energies = ((dense.T @ y) ** 2).sum(1).cumsum(0) / (y**2).sum()
    assert torch.allclose(ntkit.spectrum(StreamedGram(K), 20).energy(y), energies, atol=1e-10)


def test_all_pairs_without_room_are_refused_and_many_are_iterated(no_room):
    K = rbf(151)
    with pytest.raises(ntkit.Refused, match="all 151 eigenpairs"):
        ntkit.spectrum(StreamedGram(K))
    top = ntkit.spectrum(StreamedGram(K), 70)  # above a third: dense, were there room
    assert torch.allclose(top.eigenvalues, torch.linalg.eigvalsh(K).flip(0)[:70], rtol=1e-10, atol=1e-13)


def test_an_iteration_that_fails_is_said_where_there_is_no_room(no_room, monkeypatch):
    monkeypatch.setattr("ntkit.gram.krylov._ROUNDS", 2)
    top = ntkit.spectrum(StreamedGram(rbf(400)), 30)
    assert top.status != "converged"
    assert float(top.residuals.max()) > 1e-9


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("against", ["targets", "kernel"])
def test_alignment_reads_blocks_of_rows(no_room, centered, against):
    n = 1607
    K, y = rbf(n), draw(n, 2, seed=4)
    other = rbf(n) ** 2 + draw(n, 1, seed=5) @ draw(n, 1, seed=5).T
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    A, B = K, other if against == "kernel" else y @ y.T
    A, B = (H @ A @ H, H @ B @ H) if centered else (A, B)
    exact = float((A * B).sum() / (A.norm() * B.norm()))
    gram, second = StreamedGram(K), StreamedGram(other)
    with LargestTensor(K, other) as largest:
        value = ntkit.alignment(gram, second if against == "kernel" else y, centered=centered)
    assert value == pytest.approx(exact, rel=1e-10)
    passes = 2 if centered else 1
    assert gram.rows_read == passes * n
    assert second.rows_read == (passes * n if against == "kernel" else 0)
    assert largest.numbers <= 2**18


def test_effective_rank_takes_products(no_room):
    K = rbf(311)
    gram = StreamedGram(K)
    assert ntkit.effective_rank(gram) == pytest.approx(float(K.trace() / torch.linalg.eigvalsh(K)[-1]), rel=1e-10)
    assert gram.rows_read == 0


def test_memory_is_a_few_blocks_of_vectors(no_room):
    n, k = 2003, 12
    gram = StreamedGram(rbf(n))
    tracemalloc.start()  # the basis is numpy's
    try:
        top = ntkit.spectrum(gram, k)
        peak = tracemalloc.get_traced_memory()[1] / 8
    finally:
        tracemalloc.stop()
    assert top.status == "converged"
    # basis and its image, up to 2 k + 6 blocks of 16 each, twice while they grow; Ritz vectors, residuals, new blocks
    assert 2 * n * k <= peak <= n * (2 * 2 * (2 * k + 6 * 16) + 2 * (k + 16) + 4 * 16) < n * n / 3
