"""One rule per operation: its value at both ends of a step, and between a gradient with the mean-value property.

Whatever the rule, g(e1) - g(e0) = D (e1 - e0) holds exactly, at any distance: linear operations are themselves,
products have their derivative at the midpoints, elementwise functions the slope of their chord, selections (max) mix
the two winners. A chain of such is such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from ntkit.jacobian.ends import (
    _DECIDED,
    Ends,
    at,
    aten,
    between,
    both,
    combined,
    jumps,
    no_rule,
    paired,
    rule,
    settled,
    varying,
)
from ntkit.jacobian.secant_elementwise import elementwise

# ---------------------------------------------------------------------- linear operations


@rule(
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.permute, aten.transpose, aten.t, aten.expand,
    aten.squeeze, aten.unsqueeze, aten.slice, aten.select, aten.cat, aten.stack, aten.split, aten.split_with_sizes,
    aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unbind, aten.sum, aten.mean, aten.neg, aten.add, aten.sub,
    aten.rsub, aten.clone, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.contiguous, aten.repeat,
    aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d,
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten.upsample_linear1d,
    aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten._upsample_bilinear2d_aa,
    aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten.constant_pad_nd, aten.reflection_pad1d,
    aten.reflection_pad2d, aten.reflection_pad3d, aten.replication_pad1d, aten.replication_pad2d,
    aten.replication_pad3d, aten.roll, aten.flip, aten.tril, aten.triu, aten.unfold, aten.im2col, aten.col2im,
    aten.cumsum, aten.diagonal, aten.trace, aten.diag_embed, aten.pixel_shuffle, aten.pixel_unshuffle,
    aten.as_strided, aten.real, aten.imag, aten.view_as_real, aten.view_as_complex, aten._conj, aten.conj_physical,
    aten._fft_r2c, aten._fft_c2r, aten._fft_c2c, aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter,
    aten.rot90, aten.channel_shuffle, aten.native_channel_shuffle, aten.fill, aten.copy, aten.view_copy,
    aten.expand_copy, aten.movedim, aten.unsafe_chunk, aten.to, aten._to_copy,
    aten.nll_loss_forward, aten.nll_loss2d_forward,
)  # fmt: skip
def linear(func: Any, args: Any, kwargs: Any) -> Any:
    """Linear in all that varies: itself."""
    return paired(*both(func, args, kwargs), between(func, args, kwargs))


@rule(
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
)
def made(func: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor of its kind, which may take in what varies."""
    value = func(*at(args, "e0"), **kwargs)
    return Ends(value, value.clone(), value.clone()) if value.is_floating_point() else value


@rule(
    aten.index, aten.gather, aten.index_select, aten.embedding, aten.index_add, aten.index_put, aten.index_copy,
    aten.scatter, aten.scatter_add, aten.scatter_reduce, aten.masked_scatter, aten.take, aten.masked_select,
)  # fmt: skip
def indexed(func: Any, args: Any, kwargs: Any) -> Any:
    """Linear, if what is picked is the same at both ends."""
    return linear(func, args, kwargs)


@rule(aten._embedding_bag_forward_only, aten._embedding_bag)
def bag(func: Any, args: Any, kwargs: Any) -> Any:
    """Sums and means of rows of a table; the maximum has no rule."""
    mode = args[4] if len(args) > 4 else kwargs.get("mode", 0)
    if mode == 2 or any(isinstance(a, Ends) for a in args[1:]) or varying(kwargs):
        raise no_rule(func)
    o0, o1 = both(func, args, kwargs)
    mid = between(aten._embedding_bag, args, kwargs)  # the other one has no gradient
    return (Ends(o0[0], o1[0], mid[0]), *o0[1:])


# ---------------------------------------------------------------------- products


@rule(
    aten.mul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten.addmm, aten.baddbmm, aten.addmv, aten.addbmm,
    aten.addr, aten.convolution, aten.addcmul, aten.matmul, aten.linear, aten.outer,
)  # fmt: skip
def product(func: Any, args: Any, kwargs: Any) -> Any:
    """Bilinear: da b_mid + a_mid db, the ordinary derivative at the midpoints."""
    o0, o1 = both(func, args, kwargs)
    return settled(o0, o1, between(func, args, kwargs))


@rule(aten.div, aten.true_divide)
def quotient(func: Any, args: Any, kwargs: Any) -> Any:
    """Of q = a / b: (da - q_mid db) / b_mid."""
    if kwargs.get("rounding_mode") is not None:
        return elementwise(func, args, kwargs)
    a, b = args
    if not isinstance(b, Ends):
        return linear(func, args, kwargs)
    o0, o1 = both(func, args, kwargs)
    inverse = (2 / (b.e0 + b.e1)).expand(o0.shape)
    terms = [(-torch.lerp(o0, o1, 0.5) * inverse, b.mid)]
    if isinstance(a, Ends):
        terms.append((inverse, a.mid))
    return combined(o0, o1, *terms)


@rule(aten.reciprocal)
def reciprocal(func: Any, args: Any, kwargs: Any) -> Ends:
    """1/z' - 1/z = -(z' - z) / (z z')."""
    o0, o1 = both(func, args, kwargs)
    return combined(o0, o1, (-o0 * o1, args[0].mid))


@rule(aten.cumprod, aten.prod)
def cumulative(func: Any, args: Any, kwargs: Any) -> Any:
    """Products along an axis, one factor after the other."""
    z = args[0]
    if len(args) < 2:
        z, dim = z.reshape(-1), 0
    else:
        dim = args[1]
    parts = list(z.unbind(dim))
    products = [parts[0]]
    for part in parts[1:]:
        products.append(products[-1] * part)
    if func._overloadpacket is aten.cumprod:
        return torch.stack(products, dim)
    keep = (args[2] if len(args) > 2 else kwargs.get("keepdim", False)) if len(args) > 1 else False
    return products[-1].unsqueeze(dim) if keep else products[-1]


@rule(aten._trilinear)
def trilinear(func: Any, args: Any, kwargs: Any) -> Any:
    """Products of three, summed: two at a time."""
    *factors, e1, e2, e3, dims = args[:7]
    spread = [reduce(lambda t, d: t.unsqueeze(d), sorted(e), f) for f, e in zip(factors, (e1, e2, e3), strict=True)]
    return (spread[0] * spread[1] * spread[2]).sum(dims)


# ---------------------------------------------------------------------- selections


def _chosen(o0: Tensor, o1: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]) -> Ends:
    """The value chosen at the first end is a, at the second b, each (e0, e1, mid): t da + (1 - t) db.

    t is where the two lines cross: there the choice changes without a jump. Where they are the same value, either.
    """
    (a0, a1, a), (b0, b1, b) = first, second
    ahead, behind = a0 - b0, b1 - a1  # both >= 0 for a maximum, both <= 0 for a minimum
    t = torch.where(ahead + behind == 0, 0.5, ahead / (ahead + behind))
    return combined(o0, o1, (t, a), (1 - t, b))


@rule(aten.maximum, aten.minimum, aten.fmax, aten.fmin)
def larger(func: Any, args: Any, kwargs: Any) -> Ends:
    """The larger (smaller) of two."""
    a, b = args
    o0, o1 = both(func, args, kwargs)
    three = [[at(v, end).expand(o0.shape) for end in ("e0", "e1", "mid")] for v in (a, b)]
    return _switched(o0, o1, three[0], three[1], o0 == three[0][0], o1 == three[0][1])


def _switched(o0: Tensor, o1: Tensor, a: Any, b: Any, first: Tensor, second: Tensor) -> Ends:
    """Of a and b, each [e0, e1, mid]: a where `first` at the first end, where `second` at the second."""
    with enable_reentrant_dispatch(), torch.enable_grad():
        old = [torch.where(first, p, q) for p, q in zip(a, b, strict=True)]
        new = [torch.where(second, p, q) for p, q in zip(a, b, strict=True)]
    return _chosen(o0, o1, old, new)


@rule(aten.where)
def where(func: Any, args: Any, kwargs: Any) -> Any:
    """A choice by a condition: linear where it is the same at both ends, else as of a maximum, if the branches meet."""
    if len(args) < 3:
        raise jumps(func)
    condition, a, b = args
    if not isinstance(condition, Ends):
        return linear(func, args, kwargs)
    o0, o1 = both(func, args, kwargs)
    first, second = condition.e0, condition.e1
    a, b = ([torch.as_tensor(at(v, end)).to(o0).expand(o0.shape) for end in ("e0", "e1")] +
            [at(v, "mid").expand(o0.shape) if isinstance(v, Ends) else torch.as_tensor(v).to(o0).expand(o0.shape)]
            for v in (a, b))  # fmt: skip
    gap0, gap1 = a[0] - b[0], a[1] - b[1]
    if ((first != second) & (gap0 * gap1 > 0)).any():
        raise jumps(func)
    return _switched(o0, o1, a, b, first.expand(o0.shape), second.expand(o0.shape))


@rule(aten.masked_fill)
def masked(func: Any, args: Any, kwargs: Any) -> Any:
    """A constant where a mask is set."""
    z, mask, value = args
    if not isinstance(mask, Ends):
        return linear(func, args, kwargs)
    return where(aten.where.self, (mask, torch.as_tensor(value, dtype=z.dtype, device=z.device), z), {})


_DECIDED |= {where, masked}


@rule(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d)
def max_pool(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest in each window: the old winner and the new one, mixed where they change."""
    space = 3 if "3d" in func._schema.name else 2

    def pick(t: Tensor, i: Tensor) -> Tensor:
        return t.flatten(-space).gather(-1, i.flatten(-space)).view(i.shape)

    return _picked(func, args, kwargs, pick)


@rule(aten.max, aten.min, aten.topk, aten.sort, aten.kthvalue, aten.median, aten.mode)
def ordered(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest along an axis, or the sorted values; of a whole tensor by its flat form."""
    z = args[0]
    if len(args) > 1 and isinstance(args[1], Ends):
        return larger(aten.maximum.default if "max" in func._schema.name else aten.minimum.default, args, kwargs)
    if "dim" not in [a.name for a in func._schema.arguments]:
        return func._overloadpacket(z.reshape(-1), 0)[0]
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    dim = given.get("dim", -1)

    def pick(t: Tensor, i: Tensor) -> Tensor:
        return t.gather(dim, i) if i.dim() == t.dim() else t.gather(dim, i.unsqueeze(dim)).squeeze(dim)

    return _picked(func, args, kwargs, pick)


def _picked(func: Any, args: Any, kwargs: Any, pick: Callable[[Tensor, Tensor], Tensor]) -> tuple[Ends, Any]:
    """Values picked from the first argument, and the places, which may differ between the ends."""
    z, *rest = args
    found = []
    for end in (z.e0, z.e1):
        with enable_reentrant_dispatch(), torch.enable_grad():
            stand_in = z.mid.view_as(z.mid)
            stand_in.data = end  # the gradient goes where this end picks
            found.append(func(stand_in, *rest, **kwargs))
    (old, i0), (new, i1) = found
    o0, o1 = old.detach(), new.detach()
    return _chosen(o0, o1, (o0, pick(z.e1, i0), old), (pick(z.e0, i1), o1, new)), paired(i0, i1, None)


@rule(aten.amax, aten.amin)
def extreme(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest (smallest) over some axes, one after the other."""
    z = args[0]
    dims = (args[1] if len(args) > 1 else kwargs.get("dim", [])) or range(z.dim())
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    choose = torch.max if func._overloadpacket is aten.amax else torch.min
    for dim in sorted((d % z.dim() for d in dims), reverse=True):
        z = choose(z, dim, keepdim=keep)[0]
    return z


@rule(aten._local_scalar_dense, aten.is_nonzero, aten.item)
def number(func: Any, args: Any, kwargs: Any) -> Any:
    """A number for Python, if it is the same at both ends."""
    o0, o1 = both(func, args, kwargs)
    if o0 != o1:
        raise jumps(func)
    return o0


@rule(aten.nonzero, aten.isfinite, aten.isnan, aten.isinf)
def decided(func: Any, args: Any, kwargs: Any) -> Any:
    """Whole numbers and truth values."""
    return paired(*both(func, args, kwargs), None)
