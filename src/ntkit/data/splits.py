"""Classes, and stratified random samples that are the same on every machine and with every version of NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import nearest, refusal

_SPLIT_SEED = 0  # of every train/test split here: the same split for every `seed` of the sample


def draw(y: Tensor, count: int, where: str, seed: int, part: int) -> Tensor:
    """Rows, ascending, of a stratified sample of `count` examples with labels `y`; errors name it `where`."""
    for subject, value, low in ((where, count, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < low:
            expected = f"an integer of at least {low}"
            raise refusal(subject, got=repr(value), expected=expected, fix="Give a number, or leave it out.")
    if count > len(y):
        got = f"{count:,} examples"
        raise refusal(where, got=got, expected=f"at most {len(y):,}", fix="Ask for fewer, or for all.")
    sizes = y.bincount()
    return stratified(y, _quotas(sizes, count, sizes), [seed, part])


def held_out(y: Tensor, subject: str) -> tuple[Tensor, Tensor, str]:
    """Rows for training and for testing, ascending, of data without a test set; and the split in words."""
    test = stratified(y, _held_out_quotas(y, subject), _SPLIT_SEED)
    in_training = torch.ones(len(y), dtype=torch.bool, device="cpu")
    in_training[test] = False
    train = in_training.nonzero().squeeze(1)
    kind = "stratified split" if int(y.max()) else "split"
    how = f"; fixed {kind}, {len(train):,} train / {len(test):,} test, independent of seed"
    return train, test, how


def _held_out_quotas(y: Tensor, subject: str) -> Tensor:
    """Test examples per class: a fifth of all if possible, but each class keeps one for training."""
    sizes = y.bincount()
    most = (sizes - 1).clamp(min=0)
    total = min(-(-len(y) // 5), int(most.sum()))
    if total == 0:
        got = f"{len(y)} example{'s, no class with two' if len(y) > 1 else ''}"
        raise refusal(subject, got=got, expected="enough for a test set", fix="Pass a test set.")
    return _quotas(sizes, total, most)


def _quotas(sizes: Tensor, total: int, most: Tensor) -> Tensor:
    """Divide `total` in proportion to `sizes`: at most `most` each, and at least one each if possible."""
    quotas = torch.minimum(sizes * total // sizes.sum(), most)
    if total >= int((most > 0).sum()):
        quotas = torch.maximum(quotas, (most > 0).long())
    while (excess := int(quotas.sum()) - total) != 0:
        owed = sizes * total - quotas * sizes.sum()  # integers: ties fall the same way everywhere
        never = torch.iinfo(torch.int64).min
        if excess > 0:
            quotas[(-owed).masked_fill(quotas <= 1, never).argmax()] -= 1
        else:
            quotas[owed.masked_fill(quotas >= most, never).argmax()] += 1
    return quotas


def stratified(y: Tensor, quotas: Tensor, seed: int | list[int]) -> Tensor:
    """Rows, ascending, of a random sample of ``quotas[c]`` examples of each class c."""
    # Raw bits of a bit generator are the one random stream NumPy promises never to change between versions.
    keys = np.random.PCG64(seed).random_raw(len(y))
    shuffled = np.argsort(keys, kind="stable")
    by_class = shuffled[np.argsort(y.numpy()[shuffled], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(y.bincount().numpy())])
    parts = [by_class[start : start + int(quota)] for start, quota in zip(starts, quotas, strict=False)]
    return torch.from_numpy(np.sort(np.concatenate(parts)))


def class_indices(classes: Sequence[str | int], names: tuple[str, ...]) -> list[int]:
    """Indices of classes given by name or by index."""
    expected = "a sequence of at least two different classes, by name or index"
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise refusal("classes", got=repr(classes), expected=expected, fix="For example classes=(3, 8).")
    indices = []
    for item in classes:
        word = str(item)
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            raise refusal("classes", got=repr(item), expected="a class of the data", fix=nearest(word, names))
        indices.append(names.index(word) if word in names else int(word))
    if len(set(indices)) < max(2, len(indices)):
        got = ", ".join(map(str, classes)) or "none"
        raise refusal("classes", got=got, expected=expected, fix="Name each class once, and at least two.")
    return indices
