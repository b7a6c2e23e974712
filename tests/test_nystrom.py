"""Eigenfunctions on grids and their frequencies against the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.gram.krylov import leading
from ntkit.measures.eigenfunctions import bandwidth, eigenfunctions, grid, power


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


@pytest.mark.parametrize("mode", ["trace", "full"])
def test_the_extension_returns_the_eigenvectors_in_any_tiles(mode):
    kernel, x = ntkit.TangentKernel(network(2), mode), grid(5)
    top = ntkit.spectrum(kernel(x), k=4)
    found = eigenfunctions(kernel, top, x, x, batch_size=7)
    assert torch.allclose(found, top.eigenvectors, atol=1e-8)
    points = grid(3, 0.0, 2.0)
    whole = top.extend(kernel(points, x))
    assert torch.allclose(eigenfunctions(kernel, top, x, points, batch_size=2), whole, atol=1e-12)


def test_grid_is_row_by_row():
    points = grid(3, -3, 3)
    assert points.shape == (9, 2)
    assert points[1].tolist() == [0.0, -2.0]  # the second pixel of the first row: x grows, y stays


@pytest.mark.parametrize(("rows", "columns"), [(0, 2), (3, 0), (3, 4)])
def test_bandwidth_of_waves(rows, columns):
    y, x = np.meshgrid((np.arange(24) + 0.5) / 24, (np.arange(20) + 0.5) / 20, indexing="ij")
    wave = np.cos(2 * math.pi * (rows * y + columns * x)) + 5.0  # a constant has no frequency
    assert float(bandwidth(wave)) == pytest.approx(math.hypot(rows, columns), rel=1e-9)
    assert torch.allclose(bandwidth(np.stack([wave, 3 * wave])), bandwidth(wave).expand(2))


def test_power_keeps_the_energy_and_a_constant_has_no_bandwidth():
    image = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(power(image).sum()) == pytest.approx(float(((image - image.mean()) ** 2).sum()) * 48, rel=1e-12)
    assert float(power(image)[4, 3]) == pytest.approx(0, abs=1e-20)  # zero frequency in the middle
    constant = torch.full((4, 4), 0.1)
    assert bandwidth(torch.stack([constant, torch.eye(4)])).isnan().tolist() == [True, False]
    with pytest.raises(Refused, match="images: got constant images only"):
        bandwidth(constant)
    with pytest.raises(Refused, match=r"got shape \[3\]"):
        bandwidth(torch.ones(3))


@pytest.mark.parametrize("copies", [1, 5, 50])  # more copies than a block has vectors
def test_block_krylov_finds_every_copy(copies):
    values = np.repeat([5.0, 3.0, 2.0], copies)
    rest = np.linspace(1.5, 0, 400 - len(values))
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((400, 400)))[0]
    K = (Q * np.concatenate([values, rest])) @ Q.T
    k = 2 * copies + 1
    found, vectors, residuals, status = leading(lambda v: K @ v, 400, k, 1e-10)
    assert status == "converged"
    assert found == pytest.approx(values[:k], rel=1e-9)
    assert np.allclose(vectors.T @ vectors, np.eye(k), atol=1e-10)
    assert residuals.max() <= 1e-9 * 5
    assert np.allclose(residuals, np.linalg.norm(K @ vectors - vectors * found, axis=0), atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_copies_that_the_first_search_missed_are_found_though_a_random_vector_has_little_of_them(seed):
    draw = np.random.default_rng(seed)
    copies, second = int(draw.integers(34, 60)), float(draw.choice([0.999, 0.9, 0.5]))
    values = np.concatenate([np.ones(copies), np.full(60, second), np.zeros(300)])
    Q = np.linalg.qr(draw.standard_normal((len(values), len(values))))[0]
    K = (Q * values) @ Q.T
    found, _, _, status = leading(lambda v: K @ v, len(K), copies + 3, 1e-12)
    assert status == "converged"
    assert found == pytest.approx(values[: copies + 3], rel=1e-9)


def test_block_krylov_with_a_decaying_spectrum_and_negative_values():
    Q = np.linalg.qr(np.random.default_rng(1).standard_normal((300, 300)))[0]
    values = np.concatenate([np.exp(-np.arange(299) / 9.0), [-7.0]])  # the largest in size is not the largest
    K = (Q * values) @ Q.T
    found, _, residuals, status = leading(lambda v: K @ v, 300, 30, 1e-12)
    assert status == "converged"
    assert found == pytest.approx(values[:30], abs=1e-12)
    assert residuals.max() < 1e-8
