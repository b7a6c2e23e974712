"""Kernel matrices on disk: the same numbers as in memory, however they are computed. Kills: test_store_kills.py."""

from __future__ import annotations

import pickle
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_case import TILE, N, counted, create, files_of, kernel, samples
from torch import Tensor, nn

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.lock import FolderLock
from ntkit.gram import gram_store, store_creation, tile_work
from ntkit.gram.tile_files import TileFiles

pytestmark = pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed store."""
    return create(tmp_path_factory.mktemp("store") / "whole").path


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()


def images(n: int = 11) -> Tensor:
    return torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 2)).double()


KERNELS = {
    "trace": lambda: ntkit.TangentKernel(convolutional(), outputs="trace"),
    "full": lambda: ntkit.TangentKernel(convolutional(), outputs="full"),
    "sum": lambda: ntkit.TangentKernel(convolutional(), outputs="sum"),
    "callable": lambda: ntkit.TangentKernel(convolutional(), outputs=lambda y: y[:, 0] - y[:, 1]),
    "conjugate": lambda: ntkit.ConjugateKernel(convolutional()),
    "sketched": lambda: ntkit.SketchedKernel(convolutional(), 64),
    "infinite": lambda: ntkit.InfiniteKernel(nn.Sequential(nn.Flatten(), *perceptron())),
}


@pytest.mark.parametrize("tile", [4, 11, None])
@pytest.mark.parametrize("kind", KERNELS)
def test_it_is_the_matrix_in_memory(kind, tile, tmp_path, monkeypatch):
    monkeypatch.setattr(gram_store, "BLOCK", 50)
    monkeypatch.setattr("ntkit.gram.gram_matrix.BLOCK", 50)
    k, x = KERNELS[kind](), images()
    K = ntkit.Gram(k(x), kernel=k, x=x)
    store = ntkit.GramStore.create(tmp_path / "store", k, x, tile=tile)
    scale = K.largest
    close = {"rtol": 0, "atol": 1e-13 * scale}
    assert (store.shape, store.outputs, store.dtype, store.exact) == (K.shape, K.outputs, K.dtype, True)
    assert store.identity == K.identity
    assert store.largest == pytest.approx(scale, rel=1e-14)
    expected = K.dense()
    torch.testing.assert_close(store.dense(), expected, **close)
    torch.testing.assert_close(store.diagonal(), expected.diagonal(), **close)
    assert torch.equal(store.dense(), store.dense().T)
    for (here, a), (there, b) in zip(store.blocks(), K.blocks(), strict=True):
        assert here == there
        torch.testing.assert_close(a, b, **close)
    index, other = [len(K) - 1, 0, 3, 3, -2], slice(1, len(K), 4)
    torch.testing.assert_close(store.rows(index), expected[index], **close)
    torch.testing.assert_close(store.tile(other, index), expected[other][:, index], **close)
    for columns in (None, 1, 3):
        v = torch.randn(len(K), *([columns] if columns else []), dtype=torch.float64)
        torch.testing.assert_close(store @ v, expected @ v, rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(store @ v.numpy(), (expected @ v).numpy(), rtol=0, atol=1e-12 * scale)
    sparse = torch.zeros(len(K), dtype=torch.float64)
    sparse[5] = 1.0
    torch.testing.assert_close(store @ sparse, expected[5], **close)
    np.testing.assert_allclose(store.to_dask().compute(), k(x).numpy(), rtol=0, atol=1e-13 * scale)
    store.export(tmp_path / "K.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "K.npy"), store.to_dask().compute())
    assert store.verify() == []


@pytest.mark.parametrize(("blocks", "passes"), [(1.5, 0), (2.5, 8), (3.5, 5), (100, 4)])
def test_blocks_go_through_the_model_as_often_as_memory_asks(blocks, passes, tmp_path, monkeypatch):
    """Four rows of tiles: 4 + 3 + 1 passes with two blocks in memory, 4 + 1 with three, none below two."""
    k, x, prepared = ntkit.TangentKernel(convolutional(), outputs="full"), images(), []
    monkeypatch.setattr(ntkit.TangentKernel, "factors", counted(ntkit.TangentKernel.factors, prepared))
    per_block = 3 * sum(step.bytes_per_sample for step in k.plan_for_tiles(x, 3).steps)
    store = ntkit.GramStore.create(tmp_path / "store", k, x, tile=3, memory=int(blocks * per_block))
    assert len(prepared) == passes
    work = tile_work.TileWork(k, x, 3, int(blocks * per_block), torch.device("cpu"))
    work.follow(store._files)
    work.seconds = [99.0, 10.0]  # of a block's way through the model: the first is slower
    assert work.seconds_for(store._files.grid.tiles, 0.5) == pytest.approx(10.0 * passes + 0.5 * 10)
    torch.testing.assert_close(store.dense(), ntkit.Gram(k(x)).dense(), rtol=0, atol=1e-13 * store.largest)


@pytest.mark.parametrize("outputs", ["trace", "diagonal", "full", "sum"])
def test_factors_of_two_blocks_give_their_kernel(outputs):
    """Also where one block turned out irregular and is planned otherwise than the other."""
    k, x = ntkit.TangentKernel(convolutional(), outputs=outputs), images()
    plan = k.plan_for_tiles(x, 6)
    first, second = k.factors(x[:6], plan), k.factors(x[6:], plan)
    changed = replace(plan, steps=tuple(replace(step, route="fallback", late=False) for step in plan.steps))
    other = replace(second, job=replace(second.job, plan=changed))
    K = ntkit.TangentKernel(convolutional(), outputs=outputs)(x)
    for expected, value in [
        (K[:6, 6:], k.product(first, second)),
        (K[:6, 6:], k.product(first, other)),
        (K[6:, 6:], k.product(second)),
    ]:
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-13 * float(K.abs().max()))


def test_machines_and_measures_take_it(tmp_path):
    k, x = ntkit.TangentKernel(convolutional(), outputs="trace"), images(24)
    K = ntkit.Gram(k(x))
    store = ntkit.GramStore.create(tmp_path / "store", k, x, tile=7)
    y = torch.randn(24, dtype=torch.float64)
    labels = (y > 0).long()
    test = k(images(5), x)

    def same(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)

    ridge = [ntkit.KernelRidge(1e-2).fit(G, y).predict(test) for G in (store, K)]
    same(*ridge)
    machines = [ntkit.HardMarginSVM().fit(G, labels) for G in (store, K)]
    assert [m.status_ for m in machines] == ["optimal"] * 2
    same(*(m.decision_function(test) for m in machines))
    same(*(ntkit.GradientFlow().fit(G, y).predict(test, t=1e-3) for G in (store, K)))
    same(*(ntkit.GaussianProcess(1e-2).fit(G, y).predict(test).mean for G in (store, K)))
    for count in (None, 3):
        same(*(torch.as_tensor(ntkit.spectrum(G, count).eigenvalues) for G in (store, K)))
    for other in (y, K, store):
        for centered in (False, True):
            same(*(torch.tensor(ntkit.alignment(G, other, centered=centered)) for G in (store, K)))
    same(*(torch.tensor(ntkit.effective_rank(G)) for G in (store, K)))


def test_samples_of_any_form(tmp_path):
    """Arrays, a memmap that may only be read, and dicts give the tensors' bytes."""
    x = samples()
    np.save(tmp_path / "x.npy", x.numpy())
    expected = files_of(create(tmp_path / "tensor").path)
    for name, given in {"array": x.numpy(), "memmap": np.load(tmp_path / "x.npy", mmap_mode="r")}.items():
        ntkit.GramStore.create(tmp_path / name, kernel(), given, tile=TILE, memory="50 MB")
        assert files_of(tmp_path / name) == expected

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kernel()._engine.model

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.inner(torch.cat([first, second], 1))

    k = ntkit.TangentKernel(Named(), outputs="trace")
    store = ntkit.GramStore.create(tmp_path / "dict", k, {"first": x[:, :2].numpy(), "second": x[:, 2:]}, tile=TILE)
    torch.testing.assert_close(store.dense().float(), kernel()(x), rtol=1e-5, atol=1e-5)


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    model = nn.Linear(6, 1, bias=False)
    x = samples()
    x[13] *= 1e30  # its square overflows
    with pytest.raises(Refused, match=r"kernel: got inf at index \[13, 13\]"):
        ntkit.GramStore.create(tmp_path / "s", ntkit.TangentKernel(model, outputs="trace"), x, tile=TILE)


# ---------------------------------------------------------------------- what is in the folder


def test_one_chunk_is_one_tile_of_the_upper_triangle(whole):
    import zarr

    assert {name for name in files_of(whole) if name != "zarr.json"} == {
        f"c/{i}/{j}" for i in range(4) for j in range(i, 4)
    }
    array = zarr.open_array(whole, mode="r")
    assert array.metadata.zarr_format == 3
    assert [type(codec).__name__ for codec in array.metadata.codecs] == ["BytesCodec", "Crc32cCodec"]
    assert np.isnan(array[TILE:, :TILE]).all()
    np.testing.assert_allclose(array[:TILE, TILE:], kernel()(samples())[:TILE, TILE:].numpy(), rtol=1e-4, atol=1e-5)


def test_another_process_and_another_open_read_the_same(whole):
    store = ntkit.GramStore.open(whole)
    assert torch.equal(pickle.loads(pickle.dumps(store)).dense(), store.dense())
    assert "18 x 18" in repr(store)


def test_a_store_that_is_there_is_not_computed_again(copy, monkeypatch):
    before = files_of(copy)
    monkeypatch.setattr(TileFiles, "write", None)
    assert create(copy).verify() == []
    assert files_of(copy) == before


@pytest.mark.parametrize("number", [1, 2, 3])
def test_bytes_do_not_depend_on_threads_or_order(number, copy, whole, threads, monkeypatch):
    for place in random.Random(number).sample(range(10), 7):
        list(copy.glob("c/*/*"))[place % len(list(copy.glob("c/*/*")))].unlink()
    order = tile_work.TileWork.bands
    monkeypatch.setattr(tile_work.TileWork, "bands", lambda self, tiles: [b[::-1] for b in order(self, tiles)[::-1]])
    threads(number)
    create(copy)
    assert files_of(copy) == files_of(whole)


CHANGES = {
    "model": lambda folder: ntkit.GramStore.create(folder, kernel(seed=1), samples(), tile=TILE),
    "outputs": lambda folder: ntkit.GramStore.create(folder, kernel(outputs="sum"), samples(), tile=TILE),
    "data": lambda folder: ntkit.GramStore.create(folder, kernel(), samples() + 1e-6, tile=TILE),
    "samples": lambda folder: ntkit.GramStore.create(folder, kernel(), samples(N + 1), tile=TILE),
    "dtype": lambda folder: ntkit.GramStore.create(
        folder, ntkit.TangentKernel(kernel()._engine.model.double(), outputs="trace"), samples().double(), tile=TILE
    ),
    "tile": lambda folder: ntkit.GramStore.create(folder, kernel(), samples(), tile=TILE + 1),
    "kernel": lambda folder: ntkit.GramStore.create(
        folder, ntkit.ConjugateKernel(kernel()._engine.model), samples(), tile=TILE
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_matrix_is_refused_by_what_differs(name, copy):
    before = files_of(copy)
    with pytest.raises(Refused, match=rf"a kernel matrix of another (.*, )?{name} \("):
        CHANGES[name](copy)
    assert files_of(copy) == before


def test_another_version_is_refused(copy, monkeypatch):
    monkeypatch.setattr(store_creation, "versions", lambda: {"ntkit": "9", "torch": torch.__version__})
    with pytest.raises(Refused, match=r"another ntkit \(.*, not 9\)"):
        create(copy)


def test_refusals(tmp_path, whole, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(Refused, match=r"a folder with 'notes.txt'; expected an empty folder"):
        create(tmp_path / "full")
    with pytest.raises(Refused, match="kernel: got Tensor"):
        ntkit.GramStore.create(tmp_path / "new", torch.eye(3), samples())  # pyrefly: ignore
    with pytest.raises(Refused, match="kernel: got one matrix per output"):
        ntkit.GramStore.create(tmp_path / "new", kernel(outputs="diagonal"), samples())
    with pytest.raises(Refused, match="tile: got 0"):
        ntkit.GramStore.create(tmp_path / "new", kernel(), samples(), tile=0)
    with pytest.raises(Refused, match=r"values in torch\.float16"):
        ntkit.GramStore.create(
            tmp_path / "new", ntkit.TangentKernel(nn.Linear(6, 1).half(), outputs="trace"), samples().half()
        )
    with pytest.raises(Refused, match=r"zarr\.json"):
        ntkit.GramStore.open(tmp_path / "full")
    with pytest.raises(Refused, match="got a file; expected a folder"):
        create(tmp_path / "full" / "notes.txt")
    with FolderLock(tmp_path / "held"), pytest.raises(Refused, match="one writer at a time"):
        create(tmp_path / "held")
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "dask", None)
    with pytest.raises(Refused, match=r"no dask in this Python.*pip install dask distributed"):
        ntkit.GramStore.open(whole).to_dask()
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(Refused, match=r"no distributed in this Python.*pip install dask distributed"):
        ntkit.GramStore.create(tmp_path / "new", kernel(), samples(), workers=2)
    assert not (tmp_path / "new").exists()


def test_masks_with_infinities(tmp_path):
    """As the kernel itself: taken where the outputs are finite, refused where they are not."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x, mask):
            return self.out((torch.softmax(self.query(x) @ x.transpose(1, 2) + mask[:, None], -1) @ x).mean(1))

    torch.manual_seed(0)
    kernel, x, mask = ntkit.TangentKernel(Attention(), "trace"), torch.randn(9, 3, 4), torch.zeros(9, 3)
    mask[4:, 2] = -torch.inf
    K = ntkit.GramStore.create(tmp_path / "K", kernel, (x, mask), tile=4)
    torch.testing.assert_close(K.dense().float(), kernel((x, mask)), rtol=1e-5, atol=1e-6)
    with pytest.raises(Refused, match="not finite"):
        ntkit.GramStore.create(tmp_path / "L", kernel, (x, torch.full((9, 3), -torch.inf)), tile=4)
    limit = ntkit.InfiniteKernel(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)))
    with pytest.raises(Refused, match="finite"):
        ntkit.GramStore.create(tmp_path / "M", limit, torch.full((9, 4), torch.inf), tile=4)


def test_another_dataset_of_nested_samples_is_refused(tmp_path):
    """Every tensor of a sample counts, and what is the same for all."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, past, twice=False):
            return self.layer(x * past["k"] + past["z"]) * (2 if twice else 1)

    class Samples(torch.utils.data.Dataset):
        def __init__(self, factor: float, **more: Any) -> None:
            torch.manual_seed(0)
            self.k, self.z, self.x, self.more = torch.randn(6, 3), torch.randn(6, 3), factor * torch.randn(6, 3), more

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"past": {"k": self.k[i], "z": self.z[i]}, "x": self.x[i]}

        def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
            return torch.utils.data.default_collate(items) | self.more

    def loader(samples: Samples) -> Any:
        return torch.utils.data.DataLoader(samples, batch_size=2, collate_fn=samples.collate)

    torch.manual_seed(1)
    kernel = ntkit.TangentKernel(Nested(), "trace")
    K = ntkit.GramStore.create(tmp_path / "K", kernel, Samples(1.0), tile=4)
    torch.testing.assert_close(K.dense().float(), kernel(Samples(1.0)), rtol=1e-5, atol=1e-6)
    with pytest.raises(Refused, match="another"):
        ntkit.GramStore.create(tmp_path / "K", kernel, Samples(2.0), tile=4)
    L = ntkit.GramStore.create(tmp_path / "L", kernel, loader(Samples(1.0, twice=True)), tile=4)
    torch.testing.assert_close(L.dense(), 4 * K.dense(), rtol=1e-5, atol=1e-6)
    with pytest.raises(Refused, match="another"):
        ntkit.GramStore.create(tmp_path / "L", kernel, loader(Samples(1.0, twice=False)), tile=4)
