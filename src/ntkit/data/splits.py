"""Stratified random choices that are the same on every machine and with every version of NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal


def draw(y: Tensor, count: int, where: str, seed: int, part: int) -> Tensor:
    """Rows, ascending, of a stratified choice of `count` examples with labels `y`; `where` names it in a refusal."""
    for subject, value, low in ((where, count, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < low:
            expected = f"an integer of at least {low}"
            raise refusal(subject, got=repr(value), expected=expected, fix="Give a number, or leave it out.")
    if count > len(y):
        got = f"{count:,} examples"
        raise refusal(where, got=got, expected=f"at most {len(y):,}, all there are", fix="Ask for fewer, or for all.")
    sizes = y.bincount()
    return stratified(y, _quotas(sizes, count, sizes), [seed, part])


def held_out_quotas(y: Tensor, subject: str) -> Tensor:
    """Examples per class of a test set: a fifth of all if there is room, each class keeping one to train on."""
    sizes = y.bincount()
    room = (sizes - 1).clamp(min=0)  # every class keeps at least one example to train on
    total = min(-(-len(y) // 5), int(room.sum()))
    if total == 0:
        got = f"{len(y)} examples, no class with two"
        raise refusal(subject, got=got, expected="enough to split off a test set", fix="Give a test set.")
    return _quotas(sizes, total, room)


def _quotas(sizes: Tensor, total: int, room: Tensor) -> Tensor:
    """Share `total` out in proportion to `sizes`, none above `room`, and none without if it can be helped."""
    quotas = torch.minimum(sizes * total // sizes.sum(), room)
    if total >= int((room > 0).sum()):
        quotas = torch.maximum(quotas, (room > 0).long())
    while (excess := int(quotas.sum()) - total) != 0:
        owed = sizes * total - quotas * sizes.sum()  # integers: ties fall the same way everywhere
        never = torch.iinfo(torch.int64).min
        if excess > 0:
            quotas[(-owed).masked_fill(quotas <= 1, never).argmax()] -= 1
        else:
            quotas[owed.masked_fill(quotas >= room, never).argmax()] += 1
    return quotas


def stratified(y: Tensor, quotas: Tensor, seed: int | list[int]) -> Tensor:
    """Rows, ascending, of a random choice of ``quotas[c]`` examples of each class c."""
    # Raw bits of a bit generator are the one random stream NumPy promises never to change between versions.
    keys = np.random.PCG64(seed).random_raw(len(y))
    shuffled = np.argsort(keys, kind="stable")
    by_class = shuffled[np.argsort(y.numpy()[shuffled], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(y.bincount().numpy())])
    parts = [by_class[start : start + int(quota)] for start, quota in zip(starts, quotas, strict=False)]
    return torch.from_numpy(np.sort(np.concatenate(parts)))
