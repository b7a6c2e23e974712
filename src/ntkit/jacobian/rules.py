"""One rule per autograd node: from the node's saved tensors and its cotangent to a factor of a weight's gradient.

A rule is called with the use, the owner of the node's rows, n, and the cotangent [C, *node output shape]. It returns
the gradient of the source as the node sees it (`Rows`, `Pair` or `Convolved`: see `jacobian.pairs`), per sample and
output, or None where it does not apply: the parameters behind that source then fall back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.jacobian.convolution_gradients import Shape
from ntkit.jacobian.graph import Use
from ntkit.jacobian.ownership import Assigned, Owner
from ntkit.jacobian.pairs import Convolved, Factor, Pair, Rows

Rule = Callable[[Use, Owner | Assigned, int, Tensor], Factor | None]
RULES: dict[str, Rule] = {}


def rule(*nodes: str) -> Callable[[Rule], Rule]:
    """Register a rule for nodes by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(nodes, function))
        return function

    return register


def _summed(values: Tensor, use: Use, owner: Owner | Assigned, n: int, align: int | None = None) -> Rows | None:
    """Sum [C, *node shape] over positions to W's shape, per sample; W broadcasts from the right, or at axis `align`.

    None where samples share out the rows of W itself: which rows are a sample's is then lost.
    """
    per_sample = owner.split(values, n, lead=1)  # [n, C, *shape without the batch]
    rank = per_sample.dim() - 2
    if align is None:
        target = (1,) * (rank - len(use.shape)) + use.shape
    else:
        target = (1,) * align + use.shape + (1,) * (rank - align - len(use.shape))
    if isinstance(owner, Assigned) and target[owner.dim] != 1:
        return None
    over = [d + 2 for d, size in enumerate(target) if size == 1 and per_sample.shape[d + 2] != 1]
    if over:
        per_sample = per_sample.sum(over, keepdim=True)
    return Rows(per_sample.reshape(n, values.shape[0], -1))


def _split(t: Tensor, owner: Owner | Assigned, n: int) -> Tensor:
    """Data saved by a node, by sample and with an axis for the outputs: [n, 1, ...]."""
    return owner.split(t, n)[:, None]


# ---------------------------------------------------------------------- products


@rule("AddmmBackward0", "MmBackward0")
def _matrix_product(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    addmm = node.name() == "AddmmBackward0"
    if addmm and use.slot == 0:
        return _summed(cot * node._saved_beta if node._saved_beta != 1 else cot, use, owner, n)
    if addmm and node._saved_alpha != 1:
        cot = cot * node._saved_alpha
    if use.slot == (2 if addmm else 1):  # out = data @ W: [R, a] @ [a, o]
        data = node._saved_mat1 if addmm else node._saved_self
        if owner.dim != 0:
            return None
        return Pair(_split(data, owner, n), owner.split(cot, n, lead=1), *use.shape, data_left=True)
    data = node._saved_mat2  # out = W @ data: [o, a] @ [a, R]
    if owner.dim != 1:
        return None
    data, cot = _split(data, owner, n).transpose(2, 3), owner.split(cot, n, lead=1).transpose(2, 3)
    return Pair(cot, data, *use.shape, data_left=False)


@rule("BmmBackward0", "BaddbmmBackward0")
def _batched_product(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    first = 0 if node.name() == "BmmBackward0" else 1
    if first:
        if use.slot == 0:
            return _summed(cot * node._saved_beta, use, owner, n)
        cot = cot * node._saved_alpha
    if use.slot == first + 1:  # out[g] = data[g] @ W[g]
        data = node._saved_batch1 if first else node._saved_self
        if owner.dim == 1:
            left, right = _split(data, owner, n), owner.split(cot, n, lead=1)  # [n, 1 | C, g, T, a | o]
        else:
            return None  # a weight of every sample's own: it was expanded, and that is its use
    else:  # out[g] = W[g] @ data[g]
        data = node._saved_batch2 if first else node._saved_mat2
        if owner.dim != 2:
            return None
        left, right = owner.split(cot, n, lead=1).transpose(3, 4), _split(data, owner, n).transpose(3, 4)
    if use.shape[0] == 1:
        return Pair(left[:, :, 0], right[:, :, 0], *use.shape[1:], data_left=use.slot == first + 1)
    return Rows((left.transpose(3, 4) @ right).flatten(2))


@rule("MvBackward0")
def _matrix_times_vector(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    data = use.node._saved_self  # out = data @ w: [R, a] @ [a]
    if use.slot != 1 or owner.dim != 0:
        return None
    return Rows((owner.split(cot, n, lead=1)[:, :, None] @ _split(data, owner, n))[:, :, 0])


@rule("TrilinearBackward0")
def _bilinear(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot != 1 or owner.dim != 0 or cot.dim() != 3:
        return None
    x1, x2 = _split(node._saved_i1, owner, n), _split(node._saved_i3, owner, n)
    x1, x2 = x1.squeeze(3), x2.squeeze(3)  # [n, 1, T, a1], [n, 1, T, a2]: nn.Bilinear's own call
    if x1.dim() != 4 or x2.dim() != 4 or use.shape[1:] != (x1.shape[3], x2.shape[3]):
        return None
    data = (x1[..., :, None] * x2[..., None, :]).flatten(3)
    return Pair(owner.split(cot, n, lead=1), data, use.shape[0], data.shape[3], data_left=False)


@rule("EmbeddingBackward0")
def _embedding(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if node._saved_scale_grad_by_freq or cot.dim() - 2 <= owner.dim:
        return None  # frequencies count over the whole batch: not a gradient of one sample
    index = node._saved_indices.long()
    # autograd stores "no padding index" as the largest unsigned number
    if 0 <= node._saved_padding_idx < use.shape[0]:
        cot = cot * (index != node._saved_padding_idx).unsqueeze(-1)
    cot = owner.split(cot, n, lead=1).flatten(2, -2)
    return Pair(_split(index, owner, n).flatten(2), cot, *use.shape, data_left=True)


@rule("EmbeddingBagBackward0")
def _embedding_bag(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    index, bags, weights = node._saved_indices.long(), cot.shape[1], node._saved_per_sample_weights
    if use.slot != 0 or owner.dim != 0 or node._saved_scale_grad_by_freq or node._saved_mode == 2:  # 2: max
        return None
    length = index.numel() // bags
    equal = torch.equal(node._saved_offsets[:bags], length * torch.arange(bags, device=index.device))
    if not length or index.numel() != length * bags or not equal:
        return None  # bags of different lengths
    share = cot.new_ones(bags, length)
    if 0 <= node._saved_padding_idx < use.shape[0]:
        share = (index != node._saved_padding_idx).to(share).view(bags, length)
    if node._saved_mode == 1:  # the mean
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    elif weights is not None:
        share = share * weights.view(bags, length)
    index = owner.split(index.view(bags, length), n).flatten(1)[:, None]
    cot = owner.split(cot[:, :, None] * share[..., None], n, lead=1).flatten(2, 3)
    return Pair(index, cot, *use.shape, data_left=True)


@rule("IndexBackward0")
def _rows_by_index(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    indices = [i for i in use.node._saved_indices if i is not None]
    if len(indices) != 1 or use.node._saved_indices[0] is None or indices[0].dtype == torch.bool:
        return None
    index = indices[0].long()
    if owner.dim >= index.dim():
        return None
    index = torch.where(index < 0, index + use.shape[0], index)
    cot = cot.flatten(1 + index.dim()) if cot.dim() > 1 + index.dim() else cot.unsqueeze(-1)
    cot = owner.split(cot, n, lead=1).flatten(2, -2)
    return Pair(_split(index, owner, n).flatten(2), cot, use.shape[0], math.prod(use.shape[1:]), data_left=True)


# ---------------------------------------------------------------------- convolutions


@rule("ConvolutionBackward0")
def _convolution(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot == 2:
        return _summed(cot, use, owner, n, align=1)
    if use.slot != 1 or owner.dim != 0:
        return None
    x, kernel, groups = node._saved_input, use.shape[2:], node._saved_groups
    stride, dilation, padding = (
        _each_axis(numbers, len(kernel)) for numbers in (node._saved_stride, node._saved_dilation, node._saved_padding)
    )
    geometry = (tuple(kernel), stride, dilation)
    if not node._saved_transposed:
        return Convolved(owner.split(x, n), owner.split(cot, n, lead=1), Shape(*geometry, padding), groups)
    # The transposed convolution of x is the convolution's gradient: weight [a, o / groups, *kernel] sums over places of
    # x the receptive fields of the cotangent.
    cot = F.pad(cot, [p for size in reversed(padding) for p in (size, size)]) if any(padding) else cot
    bare = Shape(*geometry, (0,) * len(padding))
    cot, x = owner.split(cot, n, lead=1), owner.split(x, n)  # [n, C, F, o, *space], [n, F, a, *places]
    outputs = cot.shape[1]
    swapped = Convolved(cot.flatten(0, 1), _each(x, outputs)[:, None], bare, groups)
    places = tuple(
        (size - step * (k - 1) - 1) // s + 1 for size, k, s, step in zip(cot.shape[4:], *geometry, strict=True)
    )
    if places != tuple(x.shape[3:]):  # output padding leaves places that no input reaches
        keep = (
            ...,
            *(slice(0, (p - 1) * s + step * (k - 1) + 1) for p, k, s, step in zip(x.shape[3:], *geometry, strict=True)),
        )
        swapped = Convolved(cot[keep].flatten(0, 1), swapped.cotangent, bare, groups)
    if groups > 1:
        return Rows(swapped.rows().unflatten(0, (n, outputs))[:, :, 0])
    fields = swapped.pair()
    left = x.flatten(3).transpose(2, 3).reshape(n, 1, -1, x.shape[2])
    return Pair(left, fields.right[:, 0].unflatten(0, (n, outputs)), fields.l, fields.r, data_left=True)


def _each_axis(numbers: Sequence[int], axes: int) -> tuple[int, ...]:
    """A convolution's numbers, one for each axis: autograd stores a single one where it was given so ("valid", [1])."""
    return tuple(numbers) * axes if len(numbers) == 1 else tuple(numbers)


def _each(x: Tensor, times: int) -> Tensor:
    """Repeat every sample's entry for every output, as a view where possible: [n, ...] -> [n * times, ...]."""
    return x[:, None].expand(-1, times, *(-1,) * (x.dim() - 1)).flatten(0, 1)


# ---------------------------------------------------------------------- normalizations


@rule("NativeLayerNormBackward0")
def _layer_norm(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot == 1:
        cot = cot * ((node._saved_input - node._saved_result1) * node._saved_result2)
    return _summed(cot, use, owner, n) if use.slot in (1, 2) else None


@rule("FusedRmsNormBackward0")
def _rms_norm(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    return _summed(cot * (node._saved_input * node._saved_result1), use, owner, n) if use.slot == 1 else None


@rule("NativeGroupNormBackward0")
def _group_norm(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot == 1:
        x = node._saved_input
        grouped = x.reshape(*node._saved_result1.shape, -1)
        normal = (grouped - node._saved_result1[..., None]) * node._saved_result2[..., None]
        cot = cot * normal.reshape(x.shape)
    return _summed(cot, use, owner, n, align=1) if use.slot in (1, 2) else None


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
def _batch_norm(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if getattr(node, "_saved_training", True):
        return None
    if use.slot == 1:
        x = node._saved_input
        wide = (-1,) + (1,) * (x.dim() - 2)
        scale = torch.rsqrt(node._saved_running_var + node._saved_eps)
        cot = cot * ((x - node._saved_running_mean.reshape(wide)) * scale.reshape(wide))
    return _summed(cot, use, owner, n, align=1) if use.slot in (1, 2) else None


# ---------------------------------------------------------------------- cells of recurrent layers on a GPU


@rule("ThnnFusedLstmCellBackward0")
def _lstm_cell(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    """The biases of c' = f c + i g, h' = o tanh(c'): both are added to all gates; `cot` has those of h' and of c'."""
    if use.slot not in (3, 4):
        return None
    node, (by_h, by_c) = use.node, cot.chunk(2, -1)
    i, f, g, o = node._saved_result2.chunk(4, -1)  # behind their activations
    t = node._saved_result1.tanh()
    by_c = by_c + by_h * o * (1 - t * t)
    gates = by_c * g * i * (1 - i), by_c * node._saved_cx * f * (1 - f), by_c * i * (1 - g * g), by_h * t * o * (1 - o)
    return _summed(torch.cat(gates, -1), use, owner, n)


@rule("ThnnFusedGruCellBackward0")
def _gru_cell(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    """The biases of h' = (1 - z) g + z h with g = tanh(a + r s): of the gates r, z and a, or of r, z and s."""
    if use.slot not in (3, 4):
        return None
    r, z, g, h, s = use.node._saved_result1.chunk(5, -1)
    by_g = cot * (1 - z) * (1 - g * g)
    gates = by_g * s * r * (1 - r), cot * (h - g) * z * (1 - z), by_g if use.slot == 3 else by_g * r
    return _summed(torch.cat(gates, -1), use, owner, n)


# ---------------------------------------------------------------------- entry by entry


@rule("AddBackward0", "SubBackward0", "ExpandBackward0")
def _broadcast(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    if use.slot == 1 and use.node.name() != "ExpandBackward0":
        factor = -use.node._saved_alpha if use.node.name() == "SubBackward0" else use.node._saved_alpha
        cot = cot * factor if factor != 1 else cot
    return _summed(cot, use, owner, n)


@rule("RepeatBackward0")
def _repeat(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    if isinstance(owner, Assigned):
        return None
    per_sample = owner.split(cot, n, lead=1)
    lead = per_sample.dim() - 2 - len(use.shape)
    per_sample = per_sample.sum(tuple(range(2, 2 + lead))) if lead else per_sample
    for d, size in enumerate(use.shape):
        if per_sample.shape[2 + d] % max(size, 1):
            return None
        per_sample = per_sample.unflatten(2 + d, (-1, size)).sum(2 + d)
    return Rows(per_sample.flatten(2) if use.shape else per_sample[:, :, None])


@rule("MulBackward0")
def _product(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    return _summed(cot * (use.node._saved_other if use.slot == 0 else use.node._saved_self), use, owner, n)


@rule("DivBackward0")
def _quotient(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    below = use.node._saved_other
    if use.slot == 0:
        return _summed(cot / below, use, owner, n)
    return _summed(-cot * use.node._saved_self / below.square(), use, owner, n)


@rule("AddcmulBackward0")
def _scaled_product(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    node = use.node
    if use.slot:
        cot = cot * (node._saved_tensor2 if use.slot == 1 else node._saved_tensor1) * node._saved_value
    return _summed(cot, use, owner, n)


@rule("PowBackward1")
def _power(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    if use.slot != 1:
        return None
    base, power = use.node._saved_self, use.node._saved_result
    return _summed(cot * torch.where(base == 0, 0, power * base.log()), use, owner, n)


@rule("WhereBackward0")
def _choice(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    chosen = use.node._saved_condition if use.slot == 0 else ~use.node._saved_condition  # the condition has no slot
    return _summed(cot * chosen, use, owner, n)


@rule("PreluKernelBackward0")
def _prelu(use: Use, owner: Owner | Assigned, n: int, cot: Tensor) -> Factor | None:
    return _summed(cot * use.node._saved_self.clamp(max=0), use, owner, n) if use.slot == 1 else None
