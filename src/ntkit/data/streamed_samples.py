"""Samples that are read when they are needed: those of a torch dataset, one block at a time, in its order."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ntkit.base.batch import Batch, as_batch, checked, count, leaves
from ntkit.base.checks import Refused, refusal
from ntkit.base.progress import task
from ntkit.data.examples import check_order, restored_random_states, seed_generators

_AT_A_TIME = 256  # samples of the first reading


def in_memory(x: Any) -> Any:
    """All samples of a Dataset or a DataLoader, without labels; anything else as it is.

    >>> in_memory(torch.utils.data.TensorDataset(torch.arange(3.0), torch.arange(3)))
    tensor([0., 1., 2.])
    """
    return with_labels(x, None)[0] if isinstance(x, (Dataset, DataLoader)) else x


def with_labels(x: Any, y: Any = None) -> tuple[Any, Any]:
    """Samples and labels: without `y`, those of a dataset of pairs; arrays of labels as tensors; the rest as it is.

    >>> x, y = with_labels(torch.utils.data.TensorDataset(torch.arange(3.0), torch.arange(3)))
    >>> y
    tensor([0, 1, 2])
    """
    if isinstance(x, (Dataset, DataLoader)):
        samples = StreamedSamples(x)
        x, y = samples.block(slice(len(samples))), samples.labels if y is None else y
    return x, as_batch(y, "y") if isinstance(y, np.ndarray) else y


_NUMPY = "write the samples to a .npy file once and pass numpy.load(file, mmap_mode='r')"


class StreamedSamples:
    """The samples of a map-style dataset, or of a DataLoader in the order of its dataset; never all in memory.

    They are read through once, for their hash. Whenever one is read again it is compared with the first reading.

    Parameters
    ----------
    source : a dataset whose items are samples, or pairs (sample, label), of which the label is left out; or a
        DataLoader of one, whose ``collate_fn`` puts the samples of a block together. Items are read in this process.

    Attributes
    ----------
    first : the first sample, as a batch of one.
    hashes : of all samples, one per tensor of a batch: that of `tensor_hash` of the same samples in memory.
    labels : [n, ...], those of a dataset of pairs; None where they are no tensors, or there are none.

    Raises
    ------
    Refused
        For a DataLoader that shuffles, samples with other weights or drops the last batch; a dataset without a length;
        samples of different shapes, or not finite.

    Examples
    --------
    >>> pairs = torch.utils.data.TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    >>> samples = StreamedSamples(torch.utils.data.DataLoader(pairs, batch_size=4))
    >>> len(samples), samples.block(slice(2, 4))
    (6, tensor([[4., 5.],
            [6., 7.]]))
    """

    def __init__(self, source: Dataset[Any] | DataLoader[Any]) -> None:
        self._dataset: Any = source
        self._collate: Any = default_collate
        if isinstance(source, DataLoader):
            self._dataset, self._collate = source.dataset, source.collate_fn
            check_order(source, "x")
        self._n, self._readings = _length(self._dataset), 0
        self.first = self._read(0, 1)
        self._digests = np.empty(self._n, "u8")
        whole, labels = [hashlib.sha256() for _ in leaves(self.first)], []
        for digest, leaf in zip(whole, leaves(self.first), strict=True):
            digest.update(f" {leaf.dtype} {[self._n, *leaf.shape[1:]]};".encode())
        with task("reading samples", total=self._n) as progress:
            for start in range(0, self._n, _AT_A_TIME):
                block, own = self._read_pairs(start, min(start + _AT_A_TIME, self._n))
                rows = _bytes_of(block)
                labels.append(own)
                for digest, leaf in zip(whole, rows, strict=True):
                    digest.update(leaf.data)
                self._digests[start : start + count(block)] = _digests(rows)
                progress.advance(count(block))
        self.hashes = [digest.hexdigest() for digest in whole]
        self.labels = torch.cat(labels) if all(isinstance(own, Tensor) and own.dim() for own in labels) else None

    def __len__(self) -> int:
        return self._n

    def block(self, index: slice) -> Batch:
        """Read some samples again.

        Raises
        ------
        Refused
            Where one is not what it was at the first reading.
        """
        start, stop, _ = index.indices(self._n)
        block = self._read(start, stop)
        other = np.flatnonzero(_digests(_bytes_of(block)) != self._digests[start:stop])
        if len(other):
            got = f"another sample {start + other[0]} than when it was first read"
            fix = f"Leave out random transforms, or {_NUMPY}."
            raise refusal("x", got=got, expected="the same samples at every reading", fix=fix)
        return block

    def _read(self, start: int, stop: int) -> Batch:
        return self._read_pairs(start, stop)[0]

    def _read_pairs(self, start: int, stop: int) -> tuple[Batch, Any]:
        """Some samples, and their labels where there are any."""
        label = None
        self._readings += 1
        with restored_random_states():
            # other random numbers at each reading: with the same ones a random transform would go unnoticed
            seed_generators(self._readings)
            items = [self._dataset[i] for i in range(start, stop)]
        where = f"x, samples {start} to {stop - 1}"
        try:
            block = self._collate(items)
        except (TypeError, RuntimeError) as error:
            fix = "Make tensors of one shape of them, in the dataset or its transform."
            raise refusal(where, got=str(error), expected="samples that can be put together", fix=fix) from error
        if isinstance(block, (tuple, list)) and len(block) <= 2:  # samples, or pairs
            block, label = block[0], block[1] if len(block) == 2 else None
            block = tuple(block) if isinstance(block, list) else block
        elif isinstance(block, (tuple, list)):
            fix = "Return ((a, b, ...), label), which is passed as model(a, b, ...)."
            raise refusal(where, got=f"items of {len(block)} parts", expected="a sample, or a pair", fix=fix)
        try:
            block = checked(block, where)
        except Refused as error:
            raise Refused(str(error).replace("at index (", f"counted from sample {start}, at index (")) from None
        kinds = [[(t.dtype, t.shape[1:]) for t in leaves(x)] for x in (getattr(self, "first", block), block)]
        if kinds[0] != kinds[1] or count(block) != stop - start:
            expected = f"{stop - start} samples like the first, {[list(shape) for _, shape in kinds[0]]}"
            got = f"{count(block)} of {[list(shape) for _, shape in kinds[1]]}"
            raise refusal(where, got=got, expected=expected, fix="Pad or resize all samples to one shape.")
        return block, label


def _length(dataset: Any) -> int:
    try:
        n = -1 if isinstance(dataset, IterableDataset) else len(dataset)
    except (TypeError, NotImplementedError):
        n = -1
    if n < 1:
        got = "an empty dataset" if n == 0 else f"{type(dataset).__name__}, a stream without places"
        raise refusal("x", got=got, expected="a dataset with dataset[i] and a length", fix=f"Else {_NUMPY}.")
    return n


def _bytes_of(block: Batch) -> list[np.ndarray]:
    """Bytes of each sample, [samples, bytes] per tensor."""
    n = count(block)
    flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for t in leaves(block)]
    return [leaf.reshape(n, -1) for leaf in flat]


def _digests(rows: list[np.ndarray]) -> np.ndarray:
    """Eight bytes per sample that tell it from others."""
    found = []
    for sample in zip(*rows, strict=True):
        digest = hashlib.blake2b(digest_size=8)
        for part in sample:
            digest.update(part.data)
        found.append(digest.digest())
    return np.frombuffer(b"".join(found), "u8")
