"""The limit by several workers: the same values, however the work is cut; what a walk over offsets keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkit import InfiniteKernel
from ntkit.kernels.infinite import limit_tiles, planes
from ntkit.kernels.infinite.kept_planes import kept_elements, shared_out
from ntkit.kernels.infinite.layers import GlobalPool
from ntkit.kernels.infinite.planes import Planes

END = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]


class UNet(nn.Module):
    """A skip beside a pool and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.joined = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.down = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.up, self.end = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1), nn.Sequential(nn.ReLU(), *END)

    def forward(self, x):
        skip = self.first(x)
        return self.end(self.joined(torch.cat([skip, self.up(self.down(skip))], 1)))


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


NETWORKS = {
    "U-Net": UNet(),
    "two pools": nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        conv(),
        nn.ReLU(),
        nn.AvgPool2d(3, 1, 1),
        conv(),
        *END,
    ),
    "upsampled": nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"), conv(), nn.ReLU(), *END
    ),
    "strides": nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), *END
    ),
    "no pools": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), conv(), nn.ReLU(), *END),
    "flattened": nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 1)
    ),
    "dense": nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_do_not_depend_on_the_number_of_threads(name, threads, monkeypatch):
    monkeypatch.setattr(limit_tiles, "_LEAST_ELEMENTS", 8)  # so that these small tiles are cut, too
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.float64) for n in (5, 3))
    found = {}
    for number in (1, 2, 3, 16):
        threads(number)
        kernel = InfiniteKernel(NETWORKS[name], w_std=1.4, b_std=0.2)
        found[number] = kernel(x1, x2), kernel(x1), kernel.diagonal(x1), kernel.paired(x1[:3], x2)
    for number, values in found.items():
        for one, other in zip(values, found[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0, msg=f"{number} threads")
    pairs, square, diagonal, paired = found[16]
    assert torch.equal(square, square.T)
    torch.testing.assert_close(square.diagonal(), diagonal, rtol=1e-12, atol=0)
    torch.testing.assert_close(pairs.diagonal(), paired, rtol=1e-12, atol=0)


def test_all_workers_have_work(threads, monkeypatch):
    threads(2)
    given = []
    monkeypatch.setattr(planes, "spread", lambda work, items: given.append(len(items)) or [work(i) for i in items])
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    InfiniteKernel(NETWORKS["U-Net"], w_std=1.4, b_std=0.2)(x)
    assert given == [2]
    size = lambda name, n1, n2: limit_tiles.tile_size(_graph(name, x), x, n1, n2)
    assert size("flattened", 16, 16) == 8  # four tiles of one offset
    assert size("dense", 128, 128) == 64
    assert size("dense", 16, 16) == 16  # too small to be worth a call more


def _graph(name, x):
    return InfiniteKernel(NETWORKS[name], w_std=1.4, b_std=0.2)._read(x)[0]


@pytest.mark.parametrize("name", ["U-Net", "two pools", "upsampled", "strides"])
def test_a_walk_keeps_what_it_is_said_to_keep_and_computes_no_plane_twice(name, threads, monkeypatch):
    threads(1)
    most, computed = 0, {}
    plain = Planes.up_to_factor

    def counted(self, layer, offset):
        nonlocal most
        if self.tangent and (id(layer), offset) not in self.cache:
            computed[id(layer), offset] = computed.get((id(layer), offset), 0) + 1
        found = plain(self, layer, offset)
        if self.tangent:
            most = max(most, sum(t.numel() for t in self.cache.values()))
        return found

    monkeypatch.setattr(Planes, "up_to_factor", counted)
    x1, x2 = (torch.randn(n, 2, 8, 8, dtype=torch.float64) for n in (2, 3))
    kernel = InfiniteKernel(NETWORKS[name], w_std=1.4, b_std=0.2)
    kernel(x1, x2)
    graph = kernel._read(x1)[0]
    last = next(layer for layer in graph.layers if isinstance(layer, GlobalPool))
    assert 0 < most <= 6 * kept_elements(graph, last.source)
    assert most > 3 * kept_elements(graph, last.source)  # not far from it
    assert set(computed.values()) == {1}


@pytest.mark.parametrize("costs", [[1], [1, 2, 3, 2, 1], [8, 1, 1, 1], [1, 1, 1, 9], list(range(31))])
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_ranges_of_about_equal_cost(costs, number):
    ranges = shared_out(costs, number)
    assert [i for part in ranges for i in range(len(costs))[part]] == list(range(len(costs)))
    assert len(ranges) <= number
    assert all(part.stop > part.start for part in ranges)
    largest = max(sum(costs[part]) for part in ranges)
    assert largest <= sum(costs) / number + max(costs)
