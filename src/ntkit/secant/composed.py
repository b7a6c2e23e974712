"""Rules of composite operations: softmax, norms, variances, recurrent cells.

The rules of their parts give the mean-value property. Softmax has its own formula, without overflow or cancellation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ntkit.secant.secant_tensor import (
    SecantTensor,
    at_both_ends,
    aten,
    from_graph,
    from_slopes,
    named_arguments,
    no_rule,
    rule,
)

# ---------------------------------------------------------------------- softmax and logsumexp


def _weights(z: SecantTensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights w with lse(z') - lse(z) = sum_k w_k (z'_k - z_k), of sum 1, and z - lse(z) at both ends.

    With y = z less its largest entry, w_k = L(e^y'_k, e^y_k) / L(S', S), L the logarithmic mean, S = sum_k e^y_k, and
    the difference of their sum from 1 is given to the largest entry (the old and the new one, mixed as by the rule of a
    maximum). So a shift of all entries has no effect, however large, and nothing overflows or cancels.
    """
    z0, z1 = z.start, z.end
    (top0, old), (top1, new) = (t.max(dim, keepdim=True) for t in (z0, z1))
    ahead, behind = top0 - z0.gather(dim, new), top1 - z1.gather(dim, old)
    y0, y1 = z0 - top0.nan_to_num_(neginf=0.0), z1 - top1.nan_to_num_(neginf=0.0)  # in a masked row
    lse0, lse1 = (torch.logsumexp(t, dim, keepdim=True) for t in (y0, y1))
    rise = (lse1 - lse0).nan_to_num_(nan=0.0)
    step = (y1 - y0).nan_to_num_(nan=0.0)
    largest = torch.exp(torch.maximum(y0, y1) - torch.maximum(lse0, lse1)).nan_to_num_(nan=0.0)
    w = largest * _decline(step.abs_()) / _decline(rise.abs_())
    lack, way = 1 - w.sum(dim, keepdim=True), ahead + behind
    w.scatter_add_(dim, old, lack * (ahead / way).nan_to_num_(nan=0.5))
    w.scatter_add_(dim, new, lack * (behind / way).nan_to_num_(nan=0.5))
    return w, y0 - lse0, y1 - lse1


def _decline(a: Tensor) -> Tensor:
    """(1 - exp(-a)) / a for a >= 0, 1 at 0."""
    return torch.where(a == 0, 1.0, -torch.expm1(-a) / a)


def _log_probabilities(z: SecantTensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and mean of z - lse(z)."""
    w, u0, u1 = _weights(z, dim)
    masked_out = z.mid.detach().isinf()  # at both ends: of weight 0
    hide = bool(masked_out.any())
    with torch.enable_grad():
        finite = z.mid.masked_fill(masked_out, 0.0) if hide else z.mid
        mid = finite - (w * finite).sum(dim, keepdim=True)
    return u0, u1, mid


@rule(aten._log_softmax)
def log_softmax(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """Of u = z - logsumexp(z): du = dz - sum_k w_k dz_k."""
    _, _, mid = _log_probabilities(args[0], args[1])
    o0, o1 = at_both_ends(func, args, kwargs)
    return from_graph(o0, o1, mid)


@rule(aten._softmax, aten._safe_softmax)
def softmax(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """exp(z - logsumexp(z)): the chord's slope of exp, without cancellation."""
    u0, u1, mid = _log_probabilities(args[0], args[1])
    o0, o1 = at_both_ends(func, args, kwargs)
    step = torch.where(u0 == u1, 0.0, u1 - u0).abs().nan_to_num_(nan=0.0)  # 0 in a masked row
    return from_slopes(o0, o1, (torch.maximum(o0, o1) * _decline(step), mid))


@rule(aten.logsumexp)
def log_sum(func: Any, args: Any, kwargs: Any) -> Any:
    """Logarithm of a sum of exponentials over one axis, or several."""
    z, dims = args[0], args[1]
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else list(dims)
    for dim in sorted((d % max(z.dim(), 1) for d in dims), reverse=True):
        w, _, _ = _weights(z, dim)
        o0, o1 = (torch.logsumexp(t, dim, keepdim=True) for t in (z.start, z.end))
        masked_out = z.mid.detach().isinf()
        with torch.enable_grad():
            mid = (w * z.mid.masked_fill(masked_out, 0.0)).sum(dim, keepdim=True)
        z = from_graph(o0, o1, mid)
        z = z if keep else z.squeeze(dim)
    return z


# ---------------------------------------------------------------------- norms, composed


def _wide(z: Any) -> Any:
    """In half precision squares overflow or vanish: in float32, as PyTorch's own kernels compute."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _normalized(z: Any, dims: Any, eps: float) -> tuple[Any, Any, Any]:
    """(z - mean) / sqrt(var + eps) over some axes, with mean and the inverse root."""
    z = _wide(z)
    mean = z.mean(dims, keepdim=True)
    centered = z - mean
    root = torch.rsqrt((centered * centered).mean(dims, keepdim=True) + eps)
    return centered * root, mean, root


def _affine(z: Any, weight: Any, bias: Any) -> Any:
    z = z if weight is None else z * weight
    return z if bias is None else z + bias


@rule(aten.native_layer_norm)
def layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Layer norm, composed."""
    z, shape, weight, bias, eps = args
    if isinstance(z, SecantTensor):
        y, mean, root = _normalized(z, list(range(-len(shape), 0)), eps)
    else:  # a constant input with a weight or bias that changes
        y, mean, root = aten.native_layer_norm(z, shape, None, None, eps)
    return _affine(y, weight, bias).to(z.dtype), mean, root


@rule(aten.native_group_norm)
def group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Group norm, composed."""
    z, weight, bias, n, channels, _, groups, eps = args
    y, mean, root = _normalized(z.reshape(n, groups, -1), [2], eps)
    shape = [1, channels] + [1] * (z.dim() - 2)
    weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(y.reshape(z.shape), weight, bias).to(z.dtype), mean, root


@rule(aten.native_batch_norm, aten.cudnn_batch_norm)
def batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Batch norm by its running statistics; by those of the batch where it is an instance norm (or in train mode)."""
    values = named_arguments(func, args, kwargs)
    z, mean, var = (values[name] for name in ("input", "running_mean", "running_var"))
    eps = values["eps"] if "eps" in values else values["epsilon"]
    shape = [1, -1] + [1] * (z.dim() - 2)
    weight, bias = (None if values[p] is None else values[p].reshape(shape) for p in ("weight", "bias"))
    empty = torch.empty(0, dtype=z.dtype, device=z.device)
    rest = [empty] * (len(func._schema.returns) - 1)
    if values["training"]:
        y, _, _ = _normalized(z, [0, *range(2, z.dim())], eps)
        return _affine(y, weight, bias).to(z.dtype), *rest
    factor = torch.rsqrt(_wide(var) + eps).reshape(shape)
    factor, shift = factor if weight is None else factor * weight, mean.reshape(shape)
    return _affine(z, factor, -shift * factor if bias is None else bias - shift * factor).to(z.dtype), *rest


@rule(aten.var_mean, aten.var, aten.std, aten.std_mean)
def variance(func: Any, args: Any, kwargs: Any) -> Any:
    """Variance, standard deviation."""
    values = named_arguments(func, args, kwargs)
    z, dims, keep = values["self"], values.get("dim") or list(range(values["self"].dim())), values.get("keepdim", False)
    correction = 1 if values.get("correction") is None else values["correction"]
    if z.is_complex() or "unbiased" in values:
        raise no_rule(func)
    mean = _wide(z).mean(dims, keepdim=True)
    centered = z - mean
    size = math.prod(z.shape[dim] for dim in dims)
    value = (centered * centered).sum(dims, keepdim=True) / (size - correction)
    name = func._overloadpacket.__name__
    value = torch.sqrt(value) if "std" in name else value
    if not keep:
        value, mean = value.squeeze(dims), mean.squeeze(dims)
    return (value.to(z.dtype), mean.to(z.dtype)) if "mean" in name else value.to(z.dtype)


@rule(aten.linalg_vector_norm, aten.norm)
def vector_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """A vector norm of any order except 0."""
    values = named_arguments(func, args, kwargs)
    order, z = values.get("ord", values.get("p")), values.get("x", values.get("self"))
    order = 2 if order is None else order
    if order == 0:
        raise no_rule(func)
    z = z if values.get("dtype") is None else z.to(values["dtype"])
    dims, keep = values.get("dim") or list(range(z.dim())), values.get("keepdim", False)
    if abs(order) == math.inf:
        return z.abs().amax(dims, keep) if order > 0 else z.abs().amin(dims, keep)
    wide = _wide(z)
    if order == 2 and not z.is_complex():
        return torch.sqrt((wide * wide).sum(dims, keepdim=keep)).to(z.dtype)
    value = (wide.abs() ** order).sum(dims, keepdim=keep) ** (1 / order)
    return value if z.is_complex() else value.to(z.dtype)


@rule(aten._cdist_forward)
def distances(func: Any, args: Any, kwargs: Any) -> Any:
    """Norms of all differences between two sets."""
    a, b, order = args[:3]
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), order, -1)


@rule(aten._weight_norm_interface)
def weight_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """G v / |v| with the norm over all axes except one."""
    v, g = args[:2]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    dims = [d for d in range(v.dim()) if d != dim % v.dim()]
    wide = _wide(v)
    norm = torch.sqrt((wide * wide).sum(dims, keepdim=True))
    return (v * (g / norm)).to(v.dtype), norm


@rule(aten._prelu_kernel)
def prelu(func: Any, args: Any, kwargs: Any) -> Any:
    """max(z, 0) + weight * min(z, 0)."""
    z, weight = args
    return torch.relu(z) - weight * torch.relu(-z)


# ---------------------------------------------------------------------- recurrent cells, fused on a GPU


def _gates(args: Any, parts: int) -> tuple[Any, Any]:
    """Contributions of the input and of the state to each gate."""
    a, b, _, bias_a, bias_b = [*args, None, None][:5]
    sides: list[Any] = [a if bias_a is None else a + bias_a, b if bias_b is None else b + bias_b]
    return sides[0].chunk(parts, 1), sides[1].chunk(parts, 1)


@rule(aten._thnn_fused_lstm_cell)
def lstm_cell(func: Any, args: Any, kwargs: Any) -> Any:
    """State and memory."""
    i, f, g, o = (a + b for a, b in zip(*_gates(args, 4), strict=True))
    memory = torch.sigmoid(f) * args[2] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(memory), memory, memory.new_empty(0)


@rule(aten._thnn_fused_gru_cell)
def gru_cell(func: Any, args: Any, kwargs: Any) -> Any:
    """State."""
    (reset_a, keep_a, a), (reset_b, keep_b, b) = _gates(args, 3)
    new = torch.tanh(a + torch.sigmoid(reset_a + reset_b) * b)
    return new + torch.sigmoid(keep_a + keep_b) * (args[2] - new), new.new_empty(0)
