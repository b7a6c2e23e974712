"""One rule per autograd node: from the node's saved tensors and its cotangent to factors of a parameter's gradient.

The gradient of the weight W as the node sees it, for sample i and output c, comes in one of two forms:

- `Rows`: the entries themselves, [n, C, *W.shape]; for small parameters (biases, scales);
- `Pair`: sum over positions t of cotangent[i, c, t, :] (x) data[i, t, :], kept as its two factors; for dense layers and
  convolutions, whose entries would be n x C x P numbers.

A rule is called with the use, the owner of the node's rows, n, and the cotangent [C, *node output shape].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.jacobian.graph import Use
from ntkit.jacobian.ownership import Owner


@dataclass(frozen=True)
class Rows:
    """Gradient entries, [n, C, *W.shape]."""

    values: Tensor


@dataclass(frozen=True)
class Pair:
    """Gradient in factors: W[o, a] += cotangent[i, c, t, o] * data[i, t, a], positions t = 1..T.

    ``data`` is [n, T, a], or integer [n, T] for a row selection (embedding), which stands for one-hot vectors of length
    ``a``. ``data_first``: W is laid out [a, o] instead of [o, a]. ``groups`` > 1: both factors' last axes are cut into
    that many equal parts which meet only each other (grouped convolution), W is [o, a / groups].
    """

    data: Tensor
    cotangent: Tensor
    a: int
    data_first: bool = False
    groups: int = 1

    def rows(self) -> Tensor:
        """Multiply out: [n, C, o * a / groups], in W's own order of entries."""
        n, outputs, _, o = self.cotangent.shape
        if self.data.dtype == torch.int64:
            values = self.cotangent.new_zeros(n, outputs, self.a, o)
            index = self.data[:, None, :, None].expand_as(self.cotangent)
            values.scatter_add_(2, index, self.cotangent)
            return (values if self.data_first else values.transpose(2, 3)).reshape(n, outputs, -1)
        g = self.groups
        left = self.cotangent.unflatten(3, (g, o // g))  # [n, C, T, g, o/g]
        right = self.data.unflatten(2, (g, self.a // g))  # [n, T, g, a/g]
        # One batched product per (sample, group) with all outputs stacked: the data factor is read once.
        left = left.permute(0, 3, 1, 4, 2).reshape(n * g, outputs * (o // g), -1)
        right = right.permute(0, 2, 1, 3).reshape(n * g, -1, self.a // g)
        values = torch.bmm(left, right).reshape(n, g, outputs, o // g, self.a // g).transpose(1, 2)
        if self.data_first:
            values = values.reshape(n, outputs, o, self.a).transpose(2, 3)
        return values.reshape(n, outputs, -1)


Factor = Rows | Pair
Rule = Callable[[Use, Owner, int, Tensor], Factor | None]
RULES: dict[str, Rule] = {}


def rule(*nodes: str) -> Callable[[Rule], Rule]:
    """Register a rule for nodes by name. It returns None where it does not apply: the parameter then falls back."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(nodes, function))
        return function

    return register


def _summed(values: Tensor, use: Use, owner: Owner, n: int, align: int | None = None) -> Rows:
    """Sum [C, *node shape] over positions to W's shape, per sample; W broadcasts from the right, or at axis `align`."""
    per_sample = owner.split(values, n, lead=1)  # [n, C, *shape without the batch]
    rank = per_sample.dim() - 2
    if align is None:
        target = (1,) * (rank - len(use.shape)) + use.shape
    else:
        target = (1,) * align + use.shape + (1,) * (rank - align - len(use.shape))
    over = [d + 2 for d, size in enumerate(target) if size == 1 and per_sample.shape[d + 2] != 1]
    if over:
        per_sample = per_sample.sum(over, keepdim=True)
    return Rows(per_sample.reshape(n, values.shape[0], *use.shape))


@rule("AddmmBackward0", "MmBackward0")
def _matrix_product(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    addmm = node.name() == "AddmmBackward0"
    if addmm and use.slot == 0:
        return _summed(cot * node._saved_beta if node._saved_beta != 1 else cot, use, owner, n)
    weight_second = use.slot == (2 if addmm else 1)
    if addmm and node._saved_alpha != 1:
        cot = cot * node._saved_alpha
    if weight_second:  # out = data @ W: [R, a] @ [a, o]
        data = node._saved_mat1 if addmm else node._saved_self
        if owner.dim != 0:
            return None
        return Pair(owner.split(data, n), owner.split(cot, n, lead=1), data.shape[1], data_first=True)
    data = node._saved_mat2  # out = W @ data: [o, a] @ [a, R]
    if owner.dim != 1:
        return None
    return Pair(owner.split(data, n).transpose(1, 2), owner.split(cot, n, lead=1).transpose(2, 3), data.shape[0])


@rule("ConvolutionBackward0")
def _convolution(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot == 2:
        return _summed(cot, use, owner, n, align=1)
    if use.slot != 1 or owner.dim != 0 or node._saved_transposed:
        return None
    kernel = use.shape[2:]
    patches = _patches(node._saved_input, kernel, node._saved_stride, node._saved_padding, node._saved_dilation)
    data = owner.split(patches, n).transpose(2, 3)  # [n, images per sample, positions, channels * kernel]
    cot = owner.split(cot.flatten(3), n, lead=1).transpose(3, 4)  # [n, C, images per sample, positions, channels out]
    return Pair(data.flatten(1, 2), cot.flatten(2, 3), patches.shape[1], groups=node._saved_groups)


def _patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Receptive fields, [N, channels * prod(kernel), positions], for any number of spatial axes."""
    if len(kernel) == 2:
        return F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    x = F.pad(x, [p for size in reversed(padding) for p in (size, size)])
    out = [(x.shape[2 + d] - dilation[d] * (k - 1) - 1) // stride[d] + 1 for d, k in enumerate(kernel)]
    steps = x.stride()
    view = x.as_strided(
        (*x.shape[:2], *kernel, *out),
        (
            *steps[:2],
            *(s * d for s, d in zip(steps[2:], dilation, strict=True)),
            *(s * d for s, d in zip(steps[2:], stride, strict=True)),
        ),
        x.storage_offset(),
    )
    return view.reshape(x.shape[0], x.shape[1] * math.prod(kernel), math.prod(out))


@rule("EmbeddingBackward0")
def _embedding(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if node._saved_scale_grad_by_freq or cot.dim() - 2 <= owner.dim:
        return None  # frequencies count over the whole batch: not a gradient of one sample
    index = node._saved_indices.long()
    # autograd stores "no padding index" as the largest unsigned number
    if 0 <= node._saved_padding_idx < use.shape[0]:
        cot = cot * (index != node._saved_padding_idx).unsqueeze(-1)
    cot = owner.split(cot, n, lead=1).flatten(2, -2)
    return Pair(owner.split(index, n).flatten(1), cot, use.shape[0], data_first=True)


@rule("NativeLayerNormBackward0")
def _layer_norm(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot == 1:
        cot = cot * ((node._saved_input - node._saved_result1) * node._saved_result2)
    return _summed(cot, use, owner, n) if use.slot in (1, 2) else None


@rule("NativeGroupNormBackward0")
def _group_norm(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot == 1:
        x = node._saved_input
        grouped = x.reshape(*node._saved_result1.shape, -1)
        normal = (grouped - node._saved_result1[..., None]) * node._saved_result2[..., None]
        cot = cot * normal.reshape(x.shape)
    return _summed(cot, use, owner, n, align=1) if use.slot in (1, 2) else None


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
def _batch_norm(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if getattr(node, "_saved_training", True):
        return None
    if use.slot == 1:
        x = node._saved_input
        wide = (-1,) + (1,) * (x.dim() - 2)
        scale = torch.rsqrt(node._saved_running_var + node._saved_eps)
        cot = cot * ((x - node._saved_running_mean.reshape(wide)) * scale.reshape(wide))
    return _summed(cot, use, owner, n, align=1) if use.slot in (1, 2) else None


@rule("AddBackward0", "SubBackward0", "ExpandBackward0")
def _broadcast(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor:
    if use.slot == 1 and use.node.name() != "ExpandBackward0":
        factor = -use.node._saved_alpha if use.node.name() == "SubBackward0" else use.node._saved_alpha
        cot = cot * factor if factor != 1 else cot
    return _summed(cot, use, owner, n)


@rule("MulBackward0")
def _product(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    other = use.node._saved_other if use.slot == 0 else use.node._saved_self
    return None if other.is_complex() or cot.is_complex() else _summed(cot * other, use, owner, n)


@rule("DivBackward0")
def _quotient(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    if use.slot != 0 or cot.is_complex() or use.node._saved_other.is_complex():
        return None
    return _summed(cot / use.node._saved_other, use, owner, n)


@rule("PreluKernelBackward0")
def _prelu(use: Use, owner: Owner, n: int, cot: Tensor) -> Factor | None:
    return _summed(cot * use.node._saved_self.clamp(max=0), use, owner, n) if use.slot == 1 else None
