"""Batches of samples: a tensor, a tuple of tensors (``model(*x)``) or a dict of tensors (``model(**x)``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ntkit.base.checks import refusal
from ntkit.base.numbers import check_dense

Batch = Any  # Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def leaves(x: Batch) -> list[Tensor]:
    """Tensors of a batch."""
    if isinstance(x, Tensor):
        return [x]
    return list(x.values()) if isinstance(x, dict) else list(x)


def with_leaves(x: Batch, tensors: list[Tensor]) -> Batch:
    """Batch like `x` with other tensors."""
    if isinstance(x, Tensor):
        return tensors[0]
    return dict(zip(x, tensors, strict=True)) if isinstance(x, dict) else tuple(tensors)


def call_with(function: Callable[..., Any], x: Batch) -> Any:
    """Call a function (a model) with the tensors of a batch: as arguments, or of a dict as keywords."""
    return function(**x) if isinstance(x, dict) else function(*leaves(x))


def take(x: Batch, index: Any) -> Batch:
    """Index every tensor of a batch along its samples."""
    return with_leaves(x, [t[index] for t in leaves(x)])


def alike(x1: Batch, x2: Batch) -> bool:
    """Whether two batches can be concatenated."""
    if type(x1) is not type(x2) or (isinstance(x1, dict) and x1.keys() != x2.keys()):
        return False
    first, second = ([(t.shape[1:], t.dtype, t.device) for t in leaves(x)] for x in (x1, x2))
    return first == second


def join(x1: Batch, x2: Batch) -> Batch:
    """Concatenate two batches."""
    second = {name: x2[name] for name in x1} if isinstance(x1, dict) else x2
    return with_leaves(x1, [torch.cat(pair) for pair in zip(leaves(x1), leaves(second), strict=True)])


def count(x: Batch) -> int:
    """Number of samples."""
    return leaves(x)[0].shape[0]


def checked(x: Batch, name: str) -> Batch:
    """Refuse what is not a batch of samples (no tensors, empty, ragged, not finite); return it without its graph."""
    tensors = leaves(x) if isinstance(x, (Tensor, tuple, list, dict)) else []
    if not tensors or not all(isinstance(t, Tensor) and t.dim() for t in tensors):
        expected = "a tensor with samples along its first axis, or a tuple or dict of such tensors"
        fix = "Convert it with torch.as_tensor; a tuple is passed as model(*x), a dict as model(**x)."
        raise refusal(name, got=type(x).__name__, expected=expected, fix=fix)
    if any(unpack_dual(t).tangent is not None for t in tensors):
        got, fix = (
            "a dual tensor of forward-mode differentiation",
            "Pass torch.autograd.forward_ad.unpack_dual(x).primal.",
        )
        raise refusal(name, got=got, expected="plain tensors", fix=fix)
    for tensor in tensors:
        check_dense(tensor, name)
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) > 1:
        fix = "Give all tensors the same number of samples."
        raise refusal(name, got=f"tensors with {sorted(sizes)} samples", expected="one number of samples", fix=fix)
    if sizes == {0}:
        raise refusal(name, got="an empty set", expected="at least one sample", fix="Check the selection of samples.")
    for tensor in tensors:
        # a finite sum means finite values; another sum may only have overflowed, so then each value is checked
        if not (tensor.is_floating_point() or tensor.is_complex()) or torch.isfinite(tensor.sum()):
            continue
        if not (finite := torch.isfinite(tensor)).all():
            index = tuple(int(i) for i in (~finite).nonzero()[0])
            got, fix = f"{tensor[index].item()} at index {index}", "Remove or repair that sample."
            raise refusal(name, got=got, expected="finite values", fix=fix)
    with torch.inference_mode(False):
        return with_leaves(x, [t.clone() if t.is_inference() else t.detach() for t in tensors])
