"""One rule per operation: its values at both ends, and a mean whose gradient has the mean-value property.

For every rule g(end) - g(start) = D (end - start) holds exactly, at any distance: linear operations are unchanged,
products have their derivative at the midpoints, elementwise functions the slope of their chord, selections (max) mix
the two selected values. A chain of operations with this property has it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ntkit.secant.elementwise import elementwise, ramp
from ntkit.secant.secant_tensor import (
    BOOLEAN_ARGUMENT,
    SECANT_RULES,
    SecantTensor,
    apply,
    at,
    at_both_ends,
    at_mid,
    aten,
    discrete,
    from_graph,
    from_mid,
    from_slopes,
    jump,
    lift,
    named_arguments,
    no_rule,
    random_numbers,
    rule,
    secant_tensors,
)

# ---------------------------------------------------------------------- linear operations


@rule(
    aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.expand, aten.squeeze, aten.unsqueeze,
    aten.slice, aten.select, aten.cat, aten.stack, aten.split, aten.split_with_sizes, aten.unsafe_split,
    aten.unsafe_split_with_sizes, aten.unbind, aten.sum, aten.mean, aten.neg, aten.add, aten.sub, aten.rsub,
    aten.clone, aten.alias, aten.lift_fresh, aten.lift_fresh_copy, aten.repeat, aten.avg_pool2d, aten.avg_pool3d,
    aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.upsample_nearest1d, aten.upsample_nearest2d,
    aten.upsample_nearest3d, aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
    aten.upsample_trilinear3d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.constant_pad_nd,
    aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d, aten.replication_pad1d,
    aten.replication_pad2d, aten.replication_pad3d, aten.roll, aten.flip, aten.tril, aten.triu, aten.unfold,
    aten.im2col, aten.col2im, aten.cumsum, aten.diagonal, aten.trace, aten.diag_embed, aten.pixel_shuffle,
    aten.pixel_unshuffle, aten.view_as_complex, aten.complex, aten._conj, aten._conj_physical, aten._fft_r2c,
    aten._fft_c2r, aten._fft_c2c, aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter, aten.rot90,
    aten.channel_shuffle, aten.fill, aten.view_copy, aten.expand_copy, aten._to_copy,
    aten.index, aten.gather, aten.index_select, aten.index_add, aten.index_put, aten.index_copy, aten.scatter_add,
    aten.masked_scatter, aten.take, aten.masked_select,
)  # fmt: skip
def linear(func: Any, args: Any, kwargs: Any) -> Any:
    """Linear in all arguments that change: unchanged."""
    return from_mid(func, *at_both_ends(func, args, kwargs), at_mid(func, args, kwargs))


@rule(aten.detach)
def detached(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """A stop-gradient is ignored: the outputs change with the detached values."""
    return linear(aten.alias.default, args[:1], {})


@rule(aten.view_as_real)
def real_pairs(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """Real and imaginary parts; a conjugate view must be resolved first (PyTorch does it for plain tensors)."""
    return linear(func, [linear(aten.resolve_conj.default, args, {})], {})


@rule(aten.as_strided)
def strided(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """A view by strides, if they mean the same at both ends and between."""
    z, size, stride = args[:3]
    last = (args[3] if len(args) > 3 else 0) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= z.numel() or any(t.storage_offset() or not t.is_contiguous() for t in (z.start, z.end, z.mid)):
        raise no_rule(func, "strides over a part of a tensor")
    return linear(func, args, kwargs)


@rule(
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty,
)  # fmt: skip
def new_tensor(func: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor, into which values that change may be written."""
    return lift(func(*at(args, "start"), **kwargs))


@rule(aten.scatter, aten.scatter_reduce)
def scattered(func: Any, args: Any, kwargs: Any) -> Any:
    """Linear if it sets, adds or averages; else averaged between the ends."""
    if "reduce" in func._schema.name + func._overloadname and kwargs.get("reduce", args[-1]) not in ("sum", "mean"):
        return SECANT_RULES["other"](func, args, kwargs)
    return linear(func, args, kwargs)


@rule(aten.nll_loss_forward, aten.nll_loss2d_forward)
def nll(func: Any, args: Any, kwargs: Any) -> Any:
    """Linear in the log-probabilities; in class weights that change it is averaged."""
    if isinstance(args[2], SecantTensor):
        return SECANT_RULES["other"](func, args, kwargs)
    return linear(func, args, kwargs)


@rule(aten.embedding)
def embedding(func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of a table; unlike PyTorch's gradient, it includes the padding's row and no scale by frequency."""
    return linear(func, args[:2], {})


@rule(aten._embedding_bag_forward_only)
def bag(func: Any, args: Any, kwargs: Any) -> Any:
    """Sums and means of rows of a table; the maximum has no rule."""
    args = [*args, *(None, None, None, False, 0, False, None, False, -1)[len(args) :]]
    args[3] = args[5] = False  # gradients by frequency, sparse ones
    if args[4] == 2 or secant_tensors(args[1:], kwargs):
        raise no_rule(func)
    o0, o1 = at_both_ends(func, args, kwargs)
    mid = at_mid(aten._embedding_bag, args, kwargs)  # _forward_only has no gradient
    return (SecantTensor(o0[0], o1[0], mid[0]), *o0[1:])


# ---------------------------------------------------------------------- products


@rule(
    aten.mul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten.addmm, aten.baddbmm, aten.addmv, aten.addbmm,
    aten.addr, aten.convolution, aten.addcmul, aten.lerp,
)  # fmt: skip
def product(func: Any, args: Any, kwargs: Any) -> Any:
    """Bilinear: da b_mid + a_mid db, the ordinary derivative at the midpoints."""
    o0, o1 = at_both_ends(func, args, kwargs)
    return from_graph(o0, o1, at_mid(func, args, kwargs))


@rule(aten.div)
def quotient(func: Any, args: Any, kwargs: Any) -> Any:
    """Of q = a / b: (da - q_mid db) / b_mid; where b changes its sign a (1 / b) as a product, which stays finite."""
    if kwargs.get("rounding_mode") is not None:
        return elementwise(func, args, kwargs)
    a, b = args
    if not isinstance(b, SecantTensor):
        return linear(func, args, kwargs)
    o0, o1 = at_both_ends(func, args, kwargs)
    total = b.start + b.end
    inverse = (2 / total).expand(o0.shape)
    slope = (o0 + o1) * inverse * -0.5
    if (across := total.abs() < torch.maximum(b.start.abs(), b.end.abs())).any():
        r0, r1 = 1 / b.start, 1 / b.end
        inverse = torch.where(across, (r0 + r1) / 2, inverse)
        slope = torch.where(across, (at(a, "start") + at(a, "end")) * r0 * r1 * -0.5, slope)
    terms = [(slope, b.mid)]
    if isinstance(a, SecantTensor):
        terms.append((inverse, a.mid))
    return from_slopes(o0, o1, *terms)


@rule(aten.reciprocal)
def reciprocal(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """1/z' - 1/z = -(z' - z) / (z z')."""
    o0, o1 = at_both_ends(func, args, kwargs)
    return from_slopes(o0, o1, (-o0 * o1, args[0].mid))


@rule(aten.cumprod, aten.prod)
def cumulative(func: Any, args: Any, kwargs: Any) -> Any:
    """Products along an axis, one factor after the other."""
    z, whole = args[0], len(args) < 2
    z = z if kwargs.get("dtype") is None else z.to(kwargs["dtype"])
    dim = 0 if whole else args[1]
    parts = list((z.reshape(-1) if whole or not z.dim() else z).unbind(dim))
    products = parts[:1]
    for part in parts[1:]:
        products.append(products[-1] * part)
    if func._overloadpacket is aten.cumprod:
        return torch.stack(products, dim).reshape(z.shape)
    return products[-1].unsqueeze(dim) if len(args) > 2 and args[2] else products[-1]


@rule(aten._trilinear)
def trilinear(func: Any, args: Any, kwargs: Any) -> Any:
    """Products of three, summed: two at a time."""
    product: Any = 1.0
    for factor, places in zip(args[:3], args[3:6], strict=True):
        for place in sorted(places):
            factor = factor.unsqueeze(place)
        product = factor * product
    return product.sum(args[6]) if args[6] else product


# ---------------------------------------------------------------------- selections


def _crossing(gap0: Tensor, gap1: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the step before a gap closes, and the part after; 1/2 each where it is closed at both ends."""
    size0, size1 = gap0.abs(), gap1.abs()
    way = size0 + size1
    return size0.div_(way).nan_to_num_(nan=0.5), size1.div_(way).nan_to_num_(nan=0.5)


@rule(aten.maximum, aten.minimum, aten.fmax, aten.fmin)
def larger(func: Any, args: Any, kwargs: Any) -> SecantTensor:
    """The larger of two, b + max(a - b, 0), or the smaller, a - max(a - b, 0)."""
    a, b = args
    o0, o1 = at_both_ends(func, args, kwargs)
    lead0, lead1 = ((at(a, end) - at(b, end)).nan_to_num_() for end in ("start", "end"))
    lead0, lead1 = (lead0, lead1) if func._overloadpacket in (aten.maximum, aten.fmax) else (-lead0, -lead1)
    t, rest = ramp(lead0, lead1), ramp(-lead0, -lead1)  # not 1 - t: b may be huge where it is not taken
    rest += (1 - t - rest).round_()  # where they stay equal
    return from_slopes(o0, o1, *((c, v.mid) for c, v in ((t, a), (rest, b)) if isinstance(v, SecantTensor)))


@rule(aten.gt, aten.ge, aten.lt, aten.le)
def compared(func: Any, args: Any, kwargs: Any) -> Any:
    """A comparison, with a chord for rules that use it."""
    result = discrete(func, *at_both_ends(func, args, kwargs))
    if isinstance(result, SecantTensor):
        margin: Any = torch.sub(*args)
        way, first, second = margin.end - margin.start, result.start.to(margin.dtype), result.end.to(margin.dtype)
        if margin.mid is not None and torch.isfinite(way).all():
            slope = torch.where(first == second, 0.0, (second - first) / way)
            result.chord = from_slopes(first, second, (slope, margin.mid)).mid
    return result


@rule(aten.where)
def where(func: Any, args: Any, kwargs: Any) -> Any:
    """A selection: linear where it is the same at both ends; else as a maximum, if the branches cross in between.

    Branches a, b that meet without crossing, as in ELU, leave a distance, which the condition adds when it changes by
    dc = 1 or -1. If this distance is larger than the change of the branches, the function jumps.
    """
    condition, a, b = args
    if not isinstance(condition, SecantTensor):
        return linear(func, args, kwargs)
    o0, o1 = at_both_ends(func, args, kwargs)
    first, second = condition.start, condition.end
    (a0, a1), (b0, b1) = ([torch.as_tensor(at(v, end)).to(o0) for end in ("start", "end")] for v in (a, b))
    gap0, gap1, switched = a0 - b0, a1 - b1, first != second
    if o0.is_complex():
        raise jump(func)
    done, left = _crossing(gap0, gap1)
    t = torch.where(switched, torch.where(first, done, left), first.to(o0))  # the part of a
    rest = torch.where(switched, torch.where(first, left, done), second.logical_not().to(o0))
    terms: list[tuple[Tensor, Tensor]] = []
    if (apart := switched & ~(gap0 * gap1 <= 0)).any():
        distance = done * gap1 + left * gap0
        if condition.chord is None or (apart & ~(distance.abs() <= t * (a1 - a0).abs() + rest * (b1 - b0).abs())).any():
            raise jump(func)
        terms.append((torch.where(apart, distance, 0.0), condition.chord))
    terms += [(c, v.mid) for c, v in ((t, a), (rest, b)) if isinstance(v, SecantTensor)]
    return from_slopes(o0, o1, *terms) if terms else lift(o0)  # constants that are the same


@rule(aten.masked_fill)
def masked(func: Any, args: Any, kwargs: Any) -> Any:
    """A constant where a mask is set."""
    z, mask, value = args
    if not isinstance(mask, SecantTensor):
        return linear(func, args, kwargs)
    value = value if isinstance(value, SecantTensor) else torch.as_tensor(value, dtype=z.dtype, device=z.device)
    return where(aten.where.self, (mask, value, z), {})


BOOLEAN_ARGUMENT |= {where: 0, masked: 1}


@rule(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d)
def max_pool(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest in each window: the old and the new selection, mixed where they differ."""
    space = 3 if "3d" in func._schema.name else 2

    def pick(t: Tensor, i: Tensor) -> Tensor:
        return t.flatten(-space).gather(-1, i.flatten(-space)).view(i.shape)

    return _pick(func, args, kwargs, pick)


@rule(aten.max, aten.min, aten.topk, aten.sort, aten.kthvalue, aten.median)
def ordered(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest along an axis, or the sorted values; of a whole tensor by its flat form."""
    z, packet = args[0], func._overloadpacket
    if all(a.name != "dim" for a in func._schema.arguments):
        return packet(z.reshape(-1), 0)[0]
    named = named_arguments(func, args, kwargs)
    dim = named.get("dim", -1)

    def pick(t: Tensor, i: Tensor) -> Tensor:
        return t.gather(dim, i) if i.dim() == t.dim() else t.gather(dim, i.unsqueeze(dim)).squeeze(dim)

    if packet in (aten.max, aten.min) or named.get("k") == 1:
        return _pick(func, args, kwargs, pick)
    (o0, i0), (o1, i1) = at_both_ends(func, args, kwargs)
    places = discrete(func, i0, i1)
    if not isinstance(places, SecantTensor):
        with torch.enable_grad():
            return from_graph(o0, o1, pick(z.mid, places)), places
    values = _sorted(z.transpose(dim, -1)).transpose(dim, -1)
    if named.get("descending") or (packet is aten.topk and named.get("largest", True)):
        values = values.flip(dim)
    if packet is aten.topk:
        values = values.narrow(dim, 0, named["k"])
    elif packet is not aten.sort:  # the median of an even number of values is the lower
        values = values.select(dim, named["k"] - 1 if "k" in named else (z.shape[dim] - 1) // 2)
        values = values.unsqueeze(dim) if named.get("keepdim") else values
    if not (torch.equal(values.start, o0) and torch.equal(values.end, o1)):  # not in order (sorted=False), or NaN
        raise no_rule(func)
    return values, places


def _sorted(z: Any) -> Any:
    """Sorted along the last axis, by a network of comparisons: two lines that cross are the larger and the smaller."""
    for pairs in _network(z.shape[-1]):
        i, j = (torch.tensor(places, device=z.device) for places in zip(*pairs, strict=True))
        a, b = z.index_select(-1, i), z.index_select(-1, j)
        z = z.index_copy(-1, i, torch.minimum(a, b)).index_copy(-1, j, torch.maximum(a, b))
    return z


@cache
def _network(n: int) -> list[list[tuple[int, int]]]:
    """Batcher's odd-even merge sort of n numbers: layers of pairs, each to be put in order.

    >>> _network(4)
    [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(1, 2)]]
    """
    powers = [2**k for k in range(n.bit_length()) if 2**k < n]
    steps = ((p, k) for p in powers for k in reversed(powers) if k <= p)
    layers = [
        [
            (i, i + k)
            for j in range(k % p, n - k, 2 * k)
            for i in range(j, min(j + k, n - k))
            if i // (2 * p) == (i + k) // (2 * p)
        ]
        for p, k in steps
    ]
    return [layer for layer in layers if layer]


def _pick(func: Any, args: Any, kwargs: Any, pick: Callable[[Tensor, Tensor], Tensor]) -> tuple[SecantTensor, Any]:
    """Values selected from the first argument, and their indices, which may differ between the ends.

    Of the values selected at the first and the second end, t d_old + (1 - t) d_new, with t where the two lines cross:
    there the selection changes without a jump. For two equal values t is 1/2.
    """
    z, *rest = args
    results = []
    for end in (z.start, z.end):
        with torch.enable_grad():
            stand_in = z.mid.view_as(z.mid)
            stand_in.data = end  # its gradient goes to the entries that this end selects
            results.append(func(stand_in, *rest, **kwargs))
    (old, i0), (new, i1) = results
    o0, o1 = old.detach(), new.detach()
    t, rest = _crossing(o0 - pick(z.start, i1), pick(z.end, i0) - o1)
    return from_slopes(o0, o1, (t, old), (rest, new)), discrete(func, i0, i1)


@rule(aten.amax, aten.amin)
def extreme(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest (smallest) over some axes, one after the other."""
    z = args[0]
    dims = (args[1] if len(args) > 1 else kwargs.get("dim", [])) or range(z.dim())
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    choose = torch.max if func._overloadpacket is aten.amax else torch.min
    for dim in sorted((d % max(z.dim(), 1) for d in dims), reverse=True):
        z = choose(z, dim, keepdim=keep)[0]
    return z


@rule(aten.rrelu_with_noise)
def random_leaky_relu(func: Any, args: Any, kwargs: Any) -> Any:
    """In eval mode a leaky ReLU with the mean of its slopes."""
    given = named_arguments(func, args, kwargs)
    if given.get("training", False):
        return random_numbers(func)
    return apply(aten.leaky_relu.default, (args[0], (given.get("lower", 1 / 8) + given.get("upper", 1 / 3)) / 2), {})
