"""Samples read block by block: the same matrix as from memory, and no other order or sample unnoticed."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from store_case import TILE, N, Rows, files_of, kernel, samples
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

import ntkit
from ntkit.base.checks import Refused
from ntkit.data.streamed_samples import StreamedSamples

HOW = {"tile": TILE, "memory": "50 MB"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of the store from samples in memory."""
    place = tmp_path_factory.mktemp("store") / "whole"
    return files_of(ntkit.GramStore.create(place, kernel(), samples(), **HOW).path)


SOURCES = {
    "pairs": lambda: Rows(),
    "a loader of pairs": lambda: DataLoader(Rows(), batch_size=4),
    "tuples of one": lambda: TensorDataset(samples()),
    "a loader of two processes": lambda: DataLoader(Rows(), batch_size=7, num_workers=2),
    "a loader that drops nothing": lambda: DataLoader(Rows(), batch_size=9, drop_last=True),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_bytes_as_from_memory(source, whole, tmp_path):
    K = ntkit.GramStore.create(tmp_path / "s", kernel(), SOURCES[source](), **HOW)
    assert files_of(K.path) == whole  # the hash of the data among them
    again = ntkit.GramStore.create(K.path, kernel(), samples(), **HOW)  # and it goes on from memory
    assert torch.equal(again.dense(), K.dense())


def test_workers_read_by_themselves(whole, tmp_path):
    pytest.importorskip("distributed")
    K = ntkit.GramStore.create(tmp_path / "s", kernel(), Rows(), workers=2, **HOW)
    assert files_of(K.path) == whole


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(2, 1)

    def forward(self, a, b):
        return self.a(a) + self.b(b)


class Parts(Dataset):
    def __init__(self, named: bool) -> None:
        self.x, self.named = samples(11), named

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int):
        a, b = self.x[i, :3], self.x[i, 3:5]
        return {"a": a, "b": b} if self.named else ((a, b), i)


@pytest.mark.parametrize("named", [True, False])
def test_samples_of_several_tensors(named, tmp_path):
    torch.manual_seed(0)
    k, x = ntkit.TangentKernel(Sum(), outputs="trace", memory="50 MB"), samples(11)
    memory = {"a": x[:, :3], "b": x[:, 3:5]} if named else (x[:, :3], x[:, 3:5])
    expected = ntkit.GramStore.create(tmp_path / "memory", k, memory, **HOW)
    K = ntkit.GramStore.create(tmp_path / "read", k, Parts(named), **HOW)
    assert files_of(K.path) == files_of(expected.path)


class Counted(Dataset):
    """Counts how many of its samples are in memory."""

    def __init__(self, n: int) -> None:
        self.n, self.most, self.alive = n, 0, weakref.WeakSet()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        sample = torch.full((6,), float(i))
        self.alive.add(sample)
        self.most = max(self.most, len(self.alive))
        return sample


def test_they_are_never_all_in_memory(tmp_path):
    x = Counted(1500)
    ntkit.GramStore.create(tmp_path / "s", kernel(), x, tile=100)
    assert 100 <= x.most <= 300


@pytest.mark.parametrize("wrong", [0, 7, N - 1])
def test_a_sample_that_is_another_one_later_is_refused_by_its_number(wrong, tmp_path):
    with pytest.raises(Refused, match=rf"x: got another sample {wrong} than .*random transforms"):
        ntkit.GramStore.create(tmp_path / "s", kernel(), Rows(wrong=wrong), **HOW)


def test_other_samples_do_not_go_on(whole, tmp_path):
    K = ntkit.GramStore.create(tmp_path / "s", kernel(), Rows(), **HOW)
    other = Rows()
    other.x[3, 2] += 1
    with pytest.raises(Refused, match="a kernel matrix of another data"):
        ntkit.GramStore.create(K.path, kernel(), other, **HOW)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples())


class Ragged(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int):
        return torch.ones(3 + i // 5)


REFUSED = {
    "RandomSampler": lambda: DataLoader(Rows(), batch_size=4, shuffle=True),
    "WeightedRandomSampler": lambda: DataLoader(
        Rows(), batch_size=4, sampler=torch.utils.data.WeightedRandomSampler([1.0] * N, N)
    ),
    "BatchSampler": lambda: DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(Rows()), 4, False)),
    "drops samples": lambda: DataLoader(Rows(), batch_size=4, drop_last=True),
    "a stream without places": lambda: Stream(),
    "Stream, a stream": lambda: DataLoader(Stream(), batch_size=2),
    "an empty dataset": lambda: TensorDataset(samples()[:0]),
    "items of 3 parts": lambda: TensorDataset(samples(), samples(), samples()),
    r"samples 0 to 5: got stack": lambda: Ragged(),
    r"samples 0 to 17: got nan at index \(4, 2\)|counted from sample 0, at index \(4, 2\)": lambda: TensorDataset(
        torch.where(torch.arange(18 * 6).view(18, 6) == 26, torch.nan, samples())
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, tmp_path: Path):
    with pytest.raises(Refused, match=message):
        ntkit.GramStore.create(tmp_path / "s", kernel(), REFUSED[message](), **HOW)
    assert not (tmp_path / "s").exists()


class Augmented(Rows):
    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def __getitem__(self, i: int):
        row, *rest = super().__getitem__(i)
        return row + self.draw(), *rest


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), random.random, np.random.random], ids=["torch", "Python", "NumPy"]
)
def test_random_transforms_are_refused_however_few_the_samples(draw):
    with pytest.raises(Refused, match=r"x: got another sample 0 than when it was first read.*random transforms"):
        kernel()(Augmented(draw))
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    with pytest.raises(Refused, match=r"x: got another sample 0 .*random transforms"):
        ntkit.train(nn.Linear(6, 2), Augmented(draw), nn.functional.cross_entropy, sgd, steps=1)


def test_a_reading_draws_no_random_numbers_of_the_caller():
    before = torch.get_rng_state()
    noise = [(torch.rand(2),) for _ in range(3)]
    torch.set_rng_state(before)

    class Drawing(Rows):
        def __getitem__(self, i: int):
            torch.rand(1)
            return super().__getitem__(i)

    StreamedSamples(Drawing())
    assert torch.equal(torch.rand(2), noise[0][0])
