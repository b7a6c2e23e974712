"""Rules of operations that are composed: softmax and its kin, norms, variances.

The rules of their parts give the mean-value property; softmax is written out so that nothing overflows or cancels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from ntkit.jacobian.ends import Ends, aten, both, combined, no_rule, rule, settled

# ---------------------------------------------------------------------- softmax and its kin


def _weights(z: Ends, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights w with lse(z') - lse(z) = sum_k w_k (z'_k - z_k), and the logarithms of the sums at both ends.

    w_k = L(e^z'_k, e^z_k) / L(S', S), L the logarithmic mean, S = sum_k e^z_k; written so that nothing overflows and
    nothing cancels.
    """
    z0, z1 = z.e0, z.e1
    lse0, lse1 = (torch.logsumexp(t, dim, keepdim=True) for t in (z0, z1))
    rise = torch.where(lse1 == lse0, 0.0, lse1 - lse0)
    step = torch.where(z0 == z1, 0.0, z1 - z0).abs()
    top = torch.maximum(lse0, lse1)
    largest = torch.where(torch.isneginf(top), 0.0, torch.exp(torch.maximum(z0, z1) - top))
    return largest * _decline(step) / _decline(rise.abs()), lse0, lse1


def _decline(a: Tensor) -> Tensor:
    """(1 - exp(-a)) / a for a >= 0, 1 at 0."""
    return torch.where(a == 0, 1.0, -torch.expm1(-a) / a)


def _centred(z: Ends, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and the one between of z - lse(z)."""
    w, lse0, lse1 = _weights(z, dim)
    masked_out = z.mid.detach().isinf()  # at both ends: of weight 0
    hide = bool(masked_out.any())
    with enable_reentrant_dispatch(), torch.enable_grad():
        finite = z.mid.masked_fill(masked_out, 0.0) if hide else z.mid
        mid = finite - (w * finite).sum(dim, keepdim=True)
    return z.e0 - lse0, z.e1 - lse1, mid


@rule(aten._log_softmax)
def log_softmax(func: Any, args: Any, kwargs: Any) -> Ends:
    """Of u = z - logsumexp(z): du = dz - sum_k w_k dz_k."""
    _, _, mid = _centred(args[0], args[1])
    o0, o1 = both(func, args, kwargs)
    return settled(o0, o1, mid)


@rule(aten._softmax, aten._safe_softmax)
def softmax(func: Any, args: Any, kwargs: Any) -> Ends:
    """exp(z - logsumexp(z)): the chord's slope of exp, without cancellation."""
    u0, u1, mid = _centred(args[0], args[1])
    o0, o1 = both(func, args, kwargs)
    step = torch.where(u0 == u1, 0.0, u1 - u0).abs()
    return combined(o0, o1, (torch.maximum(o0, o1) * _decline(step), mid))


@rule(aten.logsumexp)
def log_sum(func: Any, args: Any, kwargs: Any) -> Any:
    """Logarithm of a sum of exponentials over one axis, or several."""
    z, dims = args[0], args[1]
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else list(dims)
    for dim in sorted((d % z.dim() for d in dims), reverse=True):
        w, o0, o1 = _weights(z, dim)
        masked_out = z.mid.detach().isinf()
        with enable_reentrant_dispatch(), torch.enable_grad():
            mid = (w * z.mid.masked_fill(masked_out, 0.0)).sum(dim, keepdim=True)
        z = settled(o0, o1, mid)
        z = z if keep else z.squeeze(dim)
    return z


# ---------------------------------------------------------------------- norms, composed


def _normalised(z: Any, dims: Any, eps: float) -> tuple[Any, Any, Any]:
    """(z - mean) / sqrt(var + eps) over some axes, with mean and the inverse root."""
    mean = z.mean(dims, keepdim=True)
    centred = z - mean
    root = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return centred * root, mean, root


def _affine(z: Any, weight: Any, bias: Any) -> Any:
    z = z if weight is None else z * weight
    return z if bias is None else z + bias


@rule(aten.native_layer_norm)
def layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Layer norm, composed."""
    z, shape, weight, bias, eps = args
    y, mean, root = (
        _normalised(z, list(range(-len(shape), 0)), eps) if isinstance(z, Ends) else _plain_norm(z, shape, eps)
    )
    return _affine(y, weight, bias), mean, root


def _plain_norm(z: Tensor, shape: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """A constant input, a weight that varies."""
    return aten.native_layer_norm(z, shape, None, None, eps)


@rule(aten.native_group_norm)
def group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Group norm, composed."""
    z, weight, bias, n, channels, _, groups, eps = args
    y, mean, root = _normalised(z.reshape(n, groups, -1), [2], eps)
    shape = [1, channels] + [1] * (z.dim() - 2)
    weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(y.reshape(z.shape), weight, bias), mean, root


@rule(
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm, aten._batch_norm_no_update, aten._batch_norm_with_update,
)  # fmt: skip
def batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Batch norm in eval mode, by its running statistics: one factor and one shift per channel."""
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    z, weight, bias, mean, var, eps = (
        given.get(name) for name in ("input", "weight", "bias", "running_mean", "running_var", "eps")
    )
    if given.get("training", False) or mean is None or given.get("epsilon") is not None:
        return _instance_norm(func, given)
    factor = torch.rsqrt(var + eps)
    factor = factor if weight is None else factor * weight
    shift = -mean * factor if bias is None else bias - mean * factor
    shape = [1, -1] + [1] * (z.dim() - 2)
    empty = z.new_empty(0) if not isinstance(z, Ends) else z.e0.new_empty(0)
    return z * factor.reshape(shape) + shift.reshape(shape), empty, empty


def _instance_norm(func: Any, given: dict[str, Any]) -> Any:
    """Statistics of the batch itself: what instance norm is made of, whose samples stay apart."""
    z = given["input"]
    dims = [0, *range(2, z.dim())]
    y, mean, root = _normalised(z, dims, given.get("eps", given.get("epsilon", 1e-5)))
    shape = [1, -1] + [1] * (z.dim() - 2)
    weight, bias = (None if given.get(p) is None else given[p].reshape(shape) for p in ("weight", "bias"))
    return _affine(y, weight, bias), mean.reshape(-1), root.reshape(-1)


@rule(aten.var_mean, aten.var, aten.std, aten.std_mean)
def variance(func: Any, args: Any, kwargs: Any) -> Any:
    """Variance, standard deviation."""
    z = args[0]
    dims = args[1] if len(args) > 1 and not isinstance(args[1], bool) else kwargs.get("dim")
    unbiased = args[2] if len(args) > 2 else kwargs.get("unbiased", True)
    correction = kwargs.get("correction", 1 if unbiased else 0)
    correction = 1 if correction is None else correction
    keep = args[3] if len(args) > 3 else kwargs.get("keepdim", False)
    dims = list(range(z.dim())) if not dims else [dims] if isinstance(dims, int) else list(dims)
    mean = z.mean(dims, keepdim=True)
    centred = z - mean
    size = 1
    for dim in dims:
        size *= z.shape[dim]
    value = (centred * centred).sum(dims, keepdim=True) / (size - correction)
    name = func._overloadpacket.__name__
    value = torch.sqrt(value) if "std" in name else value
    if not keep:
        value, mean = value.squeeze(dims), mean.squeeze(dims)
    return (value, mean) if "mean" in name else value


@rule(aten.linalg_vector_norm, aten.norm)
def vector_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Euclidean norm; others have no rule."""
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    order = given.get("ord", given.get("p", 2))
    z = given.get("x", given.get("self"))
    if order not in (1, 2, None):
        raise no_rule(func)
    dims = given.get("dim") or list(range(z.dim()))
    total = (z.abs() if order == 1 else z * z).sum(dims, keepdim=bool(given.get("keepdim", False)))
    return total if order == 1 else torch.sqrt(total)


@rule(aten._weight_norm_interface, aten._weight_norm)
def weight_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Of g v / |v|, the norm over all axes but one."""
    v, g = args[:2]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    dims = [d for d in range(v.dim()) if d != dim % v.dim()]
    norm = torch.sqrt((v * v).sum(dims, keepdim=True))
    return v * (g / norm), norm


@rule(aten._prelu_kernel, aten.prelu)
def prelu(func: Any, args: Any, kwargs: Any) -> Any:
    """max(z, 0) + weight * min(z, 0)."""
    z, weight = args
    if not isinstance(z, Ends):
        return torch.relu(z) - weight * torch.relu(-z)
    return torch.relu(z) - weight * torch.relu(-z)
