"""Examples as tensors, with their targets: from arrays, torch datasets and loaders, converted and checked."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, SequentialSampler, Subset

from ntkit.base.checks import refusal
from ntkit.base.numbers import refuse_masked
from ntkit.data.targets import target_array

Kind = Literal["images", "vectors", "tokens"]


def examples(pair: tuple[Any, Any], subject: str, float_dtype: torch.dtype | None) -> tuple[Tensor, np.ndarray, Kind]:
    """Tensor x, targets y as an array, and the kind of x, of one pair (x, y) as `load` takes it."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = f"a {type(pair).__name__}"
        raise refusal(subject, got=got, expected="a pair (x, y)", fix="Put examples and labels in one tuple.")
    x = _tensor(pair[0], f"{subject}, x")
    if x.ndim < 2 or x.numel() == 0:
        got = f"an empty set, shape {list(x.shape)}" if x.numel() == 0 else f"shape {list(x.shape)}"
        raise refusal(f"{subject}, x", got=got, expected="[n, ...] with n >= 1", fix="Put one example in each row.")
    y = target_array(pair[1], subject)
    if len(x) != len(y):
        got = f"{len(x):,} examples and {len(y):,} labels"
        raise refusal(subject, got=got, expected="one label per example", fix="Check how x and y were built.")
    if x.is_floating_point():
        return _floats(x, float_dtype, subject), y, "images" if x.ndim == 4 else "vectors"
    if x.dtype == torch.uint8 and x.ndim in (3, 4):
        return _images(x, subject), y, "images"
    if x.dtype in (torch.int16, torch.int32, torch.int64) and x.ndim == 2:
        if len(rows := (x < 0).any(1).nonzero()):
            got, fix = f"a token number below 0 in row {int(rows[0]):,}", "Numbers that are no tokens: give floats."
            raise refusal(f"{subject}, x", got=got, expected="token numbers from 0", fix=fix)
        return x.to(torch.int64), y, "tokens"
    expected = "floats, uint8 images [n, h, w] or [n, c, h, w] or [n, h, w, c], or integer tokens [n, t]"
    fix = "Convert x to float32 and scale it as intended."
    raise refusal(f"{subject}, x", got=f"{x.dtype} of shape {list(x.shape)}", expected=expected, fix=fix)


def _tensor(value: Any, subject: str) -> Tensor:
    refuse_masked(value, subject)
    try:
        if isinstance(value, Tensor):
            return value.detach()
        array = np.asarray(value)
        # torch takes neither foreign byte orders nor, without a warning, read-only memory
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError) as error:
        got = f"{type(value).__name__} that is not a numeric array ({error})"
        raise refusal(subject, got=got, expected="a tensor or a numeric array", fix="Convert it first.") from error


def _floats(given: Tensor, dtype: torch.dtype | None, subject: str) -> Tensor:
    """Finite floats, in `dtype` unless that is None; refuses values that it does not hold."""
    x = given if dtype is None else given.to(dtype)
    held, fix = torch.finfo(x.dtype), "Repair or remove these rows."
    name = str(x.dtype).removeprefix("torch.")
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero()
    if len(bad):
        row = int(bad[0])
        value = given[row].flatten()[~torch.isfinite(x[row]).flatten()][0].item()
        got, expected = f"{value:g} in row {row:,} ({len(bad):,} such rows)", "finite values"
        if math.isfinite(value):
            expected, fix = f"values of at most {held.max:.2g}, which {name} holds", "Divide x by a number."
        raise refusal(f"{subject}, x", got=got, expected=expected, fix=fix)
    if x.dtype != given.dtype and given.any() and x.abs().max() < held.tiny:
        got, fix = f"no value above {given.abs().max():.2g}", "Multiply x by a number."
        raise refusal(f"{subject}, x", got=got, expected=f"some above {held.tiny:.2g}, which {name} holds", fix=fix)
    return x


def _images(x: Tensor, subject: str) -> Tensor:
    """Bring uint8 images to [n, c, h, w], the order that is assumed where both are possible."""
    if x.ndim == 3:
        return x[:, None]
    if x.shape[1] in (1, 3):
        return x
    if x.shape[3] in (1, 3):
        return x.permute(0, 3, 1, 2)
    fix = "Give [n, c, h, w] floats, scaled as intended."
    got = f"uint8 of shape {list(x.shape)}"
    raise refusal(f"{subject}, x", got=got, expected="1 or 3 channels, in the second or last place", fix=fix)


def stack(dataset: Any, subject: str) -> tuple[Tensor, np.ndarray]:
    """Stack the items of a map-style dataset of pairs (x, target), or the batches of a DataLoader, in their order."""
    if isinstance(dataset, DataLoader):
        return _concatenated(dataset, subject)
    try:
        size = len(dataset)
    except (TypeError, NotImplementedError):
        size = -1
    if size < 0 or isinstance(dataset, IterableDataset):
        fix = "Pass a DataLoader of it, or collect it into tensors and use from_tensors."
        got = f"{type(dataset).__name__}, {'a stream' if size >= 0 else 'without a length'}"
        raise refusal(subject, got=got, expected="a map-style dataset", fix=fix)
    x, targets = torch.empty(0, 0), []
    for index in range(size):
        item = dataset[index]
        where = f"{subject}, index {index}"
        _check_pair(item, where)
        value = _example(item[0], where)
        if index == 0:
            x = torch.empty((size, *value.shape), dtype=value.dtype)
        elif value.shape != x.shape[1:] or value.dtype != x.dtype:
            expected = f"{list(x.shape[1:])} {x.dtype}, as at index 0"
            got = f"{list(value.shape)} {value.dtype}"
            raise refusal(where, got=got, expected=expected, fix="Resize or pad all examples to one shape.")
        x[index] = value
        targets.append(_target(item[1], targets[0] if targets else None, where))
    return x, np.stack(targets) if targets else np.empty(0, np.int64)


def _check_pair(item: Any, where: str) -> None:
    if not isinstance(item, tuple | list) or len(item) != 2:
        got = f"a {type(item).__name__}"
        raise refusal(where, got=got, expected="a pair (x, label)", fix="Wrap it in a dataset of pairs.")


def _target(value: Any, first: np.ndarray | None, where: str) -> np.ndarray:
    """The target of one item: a number, text, or a vector of numbers, of the kind of the first one."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # numpy has no bfloat16
    target = np.asarray(value)
    kind = "".join(kinds for kinds in ("b", "iu", "f", "U") if target.dtype.kind in kinds)
    if not kind or target.ndim > 1:
        expected = "a label (an integer, text) or numbers"
        raise refusal(where, got=f"label {value!r}", expected=expected, fix="Give one label per example.")
    if first is not None and (first.shape != target.shape or first.dtype.kind not in kind):
        got, expected = f"label {value!r}", f"one like that at index 0 ({first.tolist()!r})"
        raise refusal(where, got=got, expected=expected, fix="Give labels of one kind.")
    return target


def _concatenated(loader: DataLoader, subject: str) -> tuple[Tensor, np.ndarray]:
    """The batches of a loader, one after the other."""
    check_order(loader, subject)
    inputs: list[Tensor] = []
    targets: list[np.ndarray] = []
    for index, batch in enumerate(loader):
        where = f"{subject}, batch {index}"
        _check_pair(batch, where)
        x, y = _tensor(batch[0], where), target_array(batch[1], where)
        if inputs and (x.shape[1:] != inputs[0].shape[1:] or x.dtype != inputs[0].dtype):
            got, expected = f"{list(x.shape[1:])} {x.dtype}", f"{list(inputs[0].shape[1:])} {inputs[0].dtype}"
            raise refusal(where, got=got, expected=expected, fix="Resize or pad all examples to one shape.")
        if len(x) != len(y):
            got = f"{len(x)} examples and {len(y)} labels"
            raise refusal(where, got=got, expected="one label per example", fix="Check the loader's collate_fn.")
        if targets and (y.shape[1:] != targets[0].shape[1:] or y.dtype.kind != targets[0].dtype.kind):
            got = f"labels {y.dtype} {list(y.shape[1:])}"
            expected = f"{targets[0].dtype} {list(targets[0].shape[1:])}, as in batch 0"
            raise refusal(where, got=got, expected=expected, fix="Give labels of one kind.")
        inputs.append(x.cpu())
        targets.append(y)
    if not inputs:
        return torch.empty(0, 0), np.empty(0, np.int64)
    return torch.cat(inputs), np.concatenate(targets)


def check_order(loader: DataLoader[Any], subject: str) -> None:
    """Refuse a loader whose samples are not those of its dataset, in their order: all of them, each once.

    The order of a stream is its own, and is not checked.
    """
    if isinstance(loader.dataset, IterableDataset):
        return
    sampler = loader.sampler if loader.batch_size is not None else loader.batch_sampler
    if not isinstance(sampler, SequentialSampler):
        got = f"a DataLoader with {type(sampler).__name__}" if sampler else "a DataLoader without batches"
        fix = "Make it with shuffle=False and a batch_size, without a sampler; or pass its dataset."
        raise refusal(subject, got=got, expected="the samples in the order of the dataset", fix=fix)
    if loader.drop_last and loader.batch_size and len(loader.dataset) % loader.batch_size:  # type: ignore[arg-type]
        fix = "Make it with drop_last=False, or pass a torch.utils.data.Subset."
        raise refusal(subject, got="a DataLoader that drops samples", expected="all samples", fix=fix)


def names_of_classes(dataset: Any) -> list[str] | None:
    """The names of the classes that a dataset has, or the one that it is a part of, or all of those it joins."""
    if isinstance(dataset, Subset):
        return names_of_classes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        names = [names_of_classes(part) for part in dataset.datasets]
        return names[0] if all(name == names[0] for name in names) else None
    own = getattr(dataset, "classes", None)
    return [str(item) for item in own] if isinstance(own, list | tuple) else None


def _example(value: Any, subject: str) -> Tensor:
    if not (hasattr(value, "getbands") and hasattr(value, "mode")):
        return _tensor(value, subject)
    if value.mode not in ("L", "RGB"):  # a Pillow image, as torchvision's datasets give
        raise refusal(subject, got=f"an image of mode {value.mode}", expected="L or RGB", fix="Convert the images.")
    image = torch.from_numpy(np.array(value))
    return image[None] if image.ndim == 2 else image.permute(2, 0, 1)


@contextmanager
def restored_random_states() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch at the end."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (saved, not used)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def seed_generators(seed: int) -> None:
    """Seed the generators that `restored_random_states` restores."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what transforms draw from)
    torch.default_generator.manual_seed(seed)
