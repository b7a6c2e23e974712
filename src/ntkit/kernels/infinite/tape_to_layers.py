"""From a tape to the layers of a limit; a call without such a limit is refused by the name of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ntkit.base.checks import NoLimit, refusal
from ntkit.kernels.infinite import tape_calls as calls
from ntkit.kernels.infinite.channel_parts import channel_part, part
from ntkit.kernels.infinite.layers import (
    Concat,
    Dropout,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Layer,
    Pool,
    Product,
    Size,
    Sum,
)
from ntkit.kernels.infinite.position_layers import dim_of, position_function, position_map, positions_side_by_side
from ntkit.kernels.infinite.tape import DROPOUTS, Op, Tape, dropout_rate
from ntkit.kernels.infinite.tape_calls import arguments, factor_of, grid, is_elementwise, pair
from ntkit.kernels.infinite.tape_reader import Curve, DerivedWeight, Reader, Weight, has_several_kernels
from ntkit.kernels.infinite.weight_layers import affine, norm


def check_norms(model: nn.Module) -> None:
    """Refuse norms over a batch or over one channel."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
            got = "statistics over a batch or over one channel"
            expected = "a layer whose kernel depends on the two samples alone"
            fix = "Replace it by nn.GroupNorm(1, channels) or nn.LayerNorm."
            where = f"layer '{name}' ({type(module).__name__})"
            raise NoLimit(str(refusal(where, got=got, expected=expected, fix=fix)))


def read_layers(model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> Graph:
    """The layers of a run."""
    reader = Reader(model, tape, w_std, b_std)
    for index, op in enumerate(tape.ops[1:], start=1):
        if index in tape.parameters:
            name, parameter = tape.parameters[index]
            reader.values[index] = Weight(parameter, 1.0, name)
        else:
            reader.values[index] = _value(reader, op)
    graph, output = reader.graph, output_layer(reader)
    graph.output = next(i for i, layer in enumerate(graph.layers) if layer is output)
    graph.last_index = max((layer.index for layer in graph.layers if isinstance(layer, Input)), default=0)
    return graph


def output_layer(reader: Reader) -> Layer:
    """The layer of the model's output."""
    value, op = reader.values[reader.tape.output], reader.tape.ops[reader.tape.output]
    subject, expected = "the model's output", "a vector of outputs"
    if value is None or isinstance(value, (Weight, DerivedWeight)):
        got = "a value without random weights"
        raise refusal(subject, got=got, expected="a network", fix="Check its forward.")
    layer = reader.layer(value)
    if has_several_kernels(layer):
        got, expected = (
            "flattened positions or several branches, whose kernels differ",
            f"{expected} that all have the same kernel",
        )
        raise refusal(subject, got=got, expected=expected, fix="End with a linear layer.")
    if isinstance(layer.source if isinstance(layer, Flatten) else layer, Product):
        got = "a product of branches, whose tangent kernel stays random at any width"
        raise refusal(subject, got=got, expected=expected, fix="End with a linear layer.")
    if op.out.dim() > 2:  # a value per position: the mean of their kernels
        return reader.add(Flatten((1, 1), "the mean over the output's positions", layer), [layer])
    return layer


def _channels_last(reader: Reader, op: Op) -> Any:
    """The value of a call that moves the channels behind the positions, of the model's output; else None."""
    if op is not reader.tape.ops[reader.tape.output] or len(op.refs) != 1:
        return None
    z = torch.randn(reader.tape.ops[op.refs[0].index].out.shape, generator=torch.Generator().manual_seed(0))
    if z.dim() not in (3, 4) or tuple(op.out.shape) != tuple(z.movedim(1, -1).shape):
        return None
    try:
        moved = torch.equal(position_function(op)(z * 1), z.movedim(1, -1))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return reader.value(op.refs[0]) if moved else None


def _value(reader: Reader, op: Op) -> Any:
    """The value of one call."""
    inputs = [reader.values[r.index] for r in op.refs]
    weights = [v for v in inputs if isinstance(v, (Weight, DerivedWeight))]
    inner = [v for v in inputs if isinstance(v, (Layer, Curve))]
    rate = dropout_rate(op.args, op.kwargs) if op.func in DROPOUTS else 0.0
    if not weights and not inner:
        if rate:
            raise reader.refusal(op, "dropout of the input", "Drop values behind a weight layer, or call model.eval().")
        if op.in_place:
            raise reader.refusal(op, "the input changed in place", "Write it without in-place operations.")
        return None
    if op.no_grad or (op.func in calls.STOPS and inner):
        got = f"{op.name} where no gradients flow (torch.no_grad, detach, .data, or inside an autograd.Function)"
        fix = "Freeze layers with requires_grad_(False). Write activations as PyTorch functions."
        raise reader.refusal(op, got, fix)
    if rate and len(inner) == len(inputs):
        return _dropout(reader, op, rate)
    if op.func in calls.AFFINE | calls.TRANSPOSED and op.refs:
        return affine(reader, op)
    if op.func in calls.NORMS:
        return norm(reader, op)
    if weights and not inner and None not in inputs:
        if len(weights) == 1 and isinstance(w := weights[0], Weight) and (factor := factor_of(op)) is not None:
            return Weight(w.parameter, w.factor * factor, w.name)
        return DerivedWeight(" and ".join(w.name for w in weights))
    if op.func is F.prelu:
        return _curve(reader, op, inner)
    if weights:
        fix = "Only dense and convolution layers and affine norms are supported."
        raise reader.refusal(op, f"{op.name} of a parameter", fix)
    if (last := _channels_last(reader, op)) is not None:
        return last
    if op.func in calls.SUMS:
        return added(reader, op)
    if op.func in calls.CONCATENATIONS and not op.in_place:
        return _concatenation(reader, op)
    if op.func in calls.PRODUCTS - calls.DIVISIONS and len(inner) == 2 and _bases_differ(inner):
        return _product(reader, op)
    if len(inner) == len(inputs) == 1:
        if op.func in calls.PRODUCTS | calls.NEGATIONS and (factor := factor_of(op)) is not None:
            return reader.scaled(op, inner[0], factor)
        for functions, rule in _RULES:
            if op.func in functions:
                return rule(reader, op)
    return _curve(reader, op, inner)


# ---------------------------------------------------------------------- sums


def added(reader: Reader, op: Op) -> Any:
    """A sum of two values, or of one and a number."""
    alpha = float(op.kwargs.get("alpha", 1))
    signs = [1.0, -alpha if op.func in calls.DIFFERENCES else alpha]
    if op.func is torch.Tensor.__rsub__:
        signs = [-1.0, 1.0]
    given = arguments(op, "input", "other")
    values = [reader.value(given[name]) for name in ("input", "other")]
    if any(isinstance(v, (int, float)) and v == 0 for v in values):  # the first term of Python's sum()
        value = next(v for v in values if not isinstance(v, (int, float)))
        sign = signs[values.index(value)]
        return value if sign == 1 else reader.scaled(op, value, sign)
    if not all(isinstance(v, (Layer, Curve)) for v in values):
        if any(v is None for v in values):
            fix = "Put a weight layer on the skip connection: its width can grow."
            raise reader.refusal(op, "the input itself added to a wide layer", fix)
        return _curve(reader, op, [v for v in values if isinstance(v, (Layer, Curve))])
    base = [v.source if isinstance(v, Curve) else v for v in values]
    if base[0] is base[1]:
        if any(isinstance(v, Curve) and v.function for v in values):
            return _curve(reader, op, values)
        factors = [v.factor if isinstance(v, Curve) else 1.0 for v in values]
        return reader.scaled(op, base[0], sum(s * f for s, f in zip(signs, factors, strict=True)))
    parts: dict[int, tuple[float, Layer]] = {}
    for sign, value in zip(signs, values, strict=True):
        layer = reader.layer(value)
        for factor, term in layer.terms if isinstance(layer, Sum) else [(1.0, layer)]:
            parts[id(term)] = (parts.get(id(term), (0.0, term))[0] + sign * factor, term)
    shapes = {tuple(reader.tape.ops[a.index].out.shape) for a in op.args[:2]}
    if len(shapes) > 1:
        raise reader.refusal(op, f"shapes {sorted(shapes)}", "Add values of one shape.")
    terms = list(parts.values())
    for i, (_, one) in enumerate(terms):
        for _, two in terms[:i]:
            reader.check_uncorrelated(op, one, two)
    return reader.add(Sum(terms[0][1].size, reader.where(op), terms), [t for _, t in terms])


def _bases_differ(values: list[Any]) -> bool:
    one, two = (v.source if isinstance(v, Curve) else v for v in values)
    return one is not two


def _product(reader: Reader, op: Op) -> Layer:
    one, two = (reader.layer(reader.value(r)) for r in op.refs)
    shapes = {tuple(reader.tape.ops[r.index].out.shape) for r in op.refs}
    if len(shapes) > 1:
        raise reader.refusal(op, f"shapes {sorted(shapes)}", "Multiply values of one shape.")
    return _multiplied(reader, op, one, two)


def _multiplied(reader: Reader, op: Op, one: Layer, two: Layer) -> Layer:
    if has_several_kernels(one) and has_several_kernels(two):  # the mean of products is not that of the means
        got = "a product of values of several branches or flattened positions"
        raise reader.refusal(op, got, "Multiply before the concatenation, or before nn.Flatten.")
    reader.check_independent(op, one, two)
    return reader.add(Product(one.size, reader.where(op), one, two), [one, two])


def _gated(reader: Reader, op: Op) -> Layer:
    """F.glu: the first half of the channels times the sigmoid of the second."""
    before = reader.tape.ops[op.refs[0].index].out
    axis, count = int(arguments(op, "input", "dim").get("dim", -1)) % before.dim(), before.shape[1]
    if axis != 1:
        raise reader.refusal(op, f"halves along axis {axis}", "Gate with halves of the channels: dim=1.")
    value, half = reader.value(op.refs[0]), count // 2
    one, two = (part(reader, op, value, tuple(range(i, i + half)), count) for i in (0, half))
    curve = two if isinstance(two, Curve) else Curve(two, None, reader.where(op))
    gate = Curve(curve.source, lambda z: torch.sigmoid(curve(z)), reader.where(op))
    return _multiplied(reader, op, reader.layer(one), reader.layer(gate))


def _concatenation(reader: Reader, op: Op) -> Layer:
    values, axis = [reader.value(r) for r in op.refs], dim_of(op)
    if any(v is None for v in values):
        fix = "Put a weight layer on the input: its width can grow."
        raise reader.refusal(op, "the input itself beside a wide layer", fix)
    if axis == 0 or len(op.refs) != len(tree_leaves(op.args[0] if op.args else op.kwargs["tensors"])):
        raise reader.refusal(op, f"{op.name} along the samples, or with constants", "Join channels or positions.")
    if axis > 1:
        return positions_side_by_side(reader, op, axis - 2)
    parts = [reader.layer(v) for v in values]
    widths = [reader.tape.ops[r.index].out.shape[1] for r in op.refs]
    shares = [(width / sum(widths), part) for width, part in zip(widths, parts, strict=True)]
    return reader.add(Concat(parts[0].size, reader.where(op), shares), parts)


def _dropout(reader: Reader, op: Op, rate: float) -> Layer:
    if rate >= 1:
        raise reader.refusal(op, f"dropout p={rate:g}", "Nothing is left of its input. Choose p below 1.")
    if op.func is not F.dropout:
        reader.check_batched(op, 1 if op.func is F.dropout1d else 2)
    source = reader.layer(reader.value(op.refs[0]))
    layer = Dropout(source.size, reader.where(op), source, 1 / (1 - rate), op.func is not F.dropout)
    return reader.add(layer, [source])


# ---------------------------------------------------------------------- positions


def _positions(op: Op) -> Size:
    size = grid(op.out.shape[2:])
    assert size is not None
    return size


def _pool(reader: Reader, op: Op) -> Layer:
    args = arguments(
        op, "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    )
    reader.check_batched(op, 2 if op.func is F.avg_pool2d else 1)
    source, size, dims = reader.layer(reader.value(op.refs[0])), _positions(op), op.out.dim() - 2
    kernel_size = pair(args["kernel_size"], dims)
    stride = pair(args.get("stride") or args["kernel_size"], dims)
    padding = pair(args.get("padding", 0), dims, 0)
    beyond = any(
        (n - 1) * s + k > m + 2 * p
        for n, s, k, m, p in zip(size, stride, kernel_size, source.size, padding, strict=True)
    )
    if beyond or (any(padding) and not args.get("count_include_pad", True)):
        return _mapped(reader, op)
    divisor = float(args.get("divisor_override") or math.prod(kernel_size))
    return reader.add(Pool(size, reader.where(op), source, kernel_size, stride, padding, divisor), [source])


def _mapped(reader: Reader, op: Op) -> Layer:
    layer = position_map(reader, op)
    if layer is None:
        raise reader.refusal(op, f"{op.name}, which mixes channels or positions", calls.SUPPORTED)
    return layer


def _adaptive_pool(reader: Reader, op: Op) -> Layer:
    reader.check_batched(op, 2 if op.func is F.adaptive_avg_pool2d else 1)
    source, size, where = reader.layer(reader.value(op.refs[0])), _positions(op), reader.where(op)
    if size == (1, 1):
        return reader.add(GlobalPool(size, where, source), [source])
    if any(m % n for m, n in zip(source.size, size, strict=True)):
        return _mapped(reader, op)
    window = (source.size[0] // size[0], source.size[1] // size[1])
    return reader.add(Pool(size, where, source, window, window, (0, 0), float(math.prod(window))), [source])


def _mean_or_sum(reader: Reader, op: Op) -> Layer:
    dims = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else None)
    rank = reader.tape.ops[op.refs[0].index].out.dim()
    axes = {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
    source, where = reader.layer(reader.value(op.refs[0])), reader.where(op)
    if axes and axes < set(range(2, rank)):
        return _mapped(reader, op)
    if axes != set(range(2, rank)) or not axes:
        raise reader.refusal(op, f"{op.name} over axes {sorted(axes)}", "Average over all positions, or none.")
    layer = reader.add(GlobalPool((1, 1), where, source), [source])
    if op.func in (torch.sum, Tensor.sum):
        layer = reader.add(Sum((1, 1), where, [(float(math.prod(source.size)), layer)]), [layer])
    return layer


def _view(reader: Reader, op: Op) -> Layer | Curve:
    value, before = reader.value(op.refs[0]), reader.tape.ops[op.refs[0].index].out
    old, new = before.shape, op.out.shape
    if not op.out.is_floating_point() or not before.is_floating_point():
        return _curve(reader, op, [value])  # a cast that rounds, or a cast of a comparison
    if old[:2] == new[:2] and (new[2:] == old[2:] or grid(new[2:]) == grid(old[2:])):
        return value
    if tuple(new) == (old[0], math.prod(old[1:])):
        source = reader.layer(value)
        return reader.add(Flatten((1, 1), reader.where(op), source), [source])
    raise reader.refusal(op, f"shape {tuple(old)} to {tuple(new)}", "Only flattening to [n, features] is supported.")


# ---------------------------------------------------------------------- activations


def _curve(reader: Reader, op: Op, inner: list[Any]) -> Curve | Layer:
    """Any elementwise function of one value of the network, or a map of its positions."""
    bases = {id(base): base for base in (v.source if isinstance(v, Curve) else v for v in inner)}
    if len(bases) != 1 or any(reader.values[r.index] is None for r in op.refs):
        what = "a product or mixture of two branches" if len(inner) > 1 else "a mixture of the input and a layer"
        raise reader.refusal(op, f"{op.name}, {what}", "Branches can be added, each after a weight layer.")
    if len(inner) == len(op.refs) == 1 and not op.in_place:
        for find in (_moved, channel_part):
            if (found := find(reader, op)) is not None:
                return found
    return elementwise(reader, op, inner)


def elementwise(reader: Reader, op: Op, inner: list[Any]) -> Curve:
    """An elementwise function of values that are all functions of one."""
    bases = {id(base): base for base in (v.source if isinstance(v, Curve) else v for v in inner)}
    if len(bases) != 1:
        raise reader.refusal(op, f"{op.name}, a product or mixture of two branches", calls.SUPPORTED)
    constants = [t for t in tree_leaves((op.args, op.kwargs)) if isinstance(t, Tensor)]
    slopes = [w for r in op.refs if isinstance(w := reader.values[r.index], Weight)]
    if any(t.numel() > 1 for t in constants) or any(w.parameter.unique().numel() > 1 for w in slopes):
        raise reader.refusal(op, f"{op.name} with different numbers per channel", "Use one number for all channels.")

    def function(z: Tensor) -> Tensor:
        def argument(a: Any) -> Any:
            value = reader.value(a)
            if isinstance(value, Weight):
                return (value.parameter.detach().flatten()[:1] * value.factor).to(z)
            if isinstance(value, Layer):
                return z
            if isinstance(value, Curve):
                return value(z)
            return value.to(z) if isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tree_map(argument, (op.args, op.kwargs))
        return op.func(*args, **kwargs)

    shape = op.out.shape
    if tuple(shape) != tuple(reader.tape.ops[op.refs[0].index].out.shape) or not is_elementwise(function, shape):
        got = f"{op.name}, which mixes channels or positions"
        raise reader.refusal(op, got, calls.ADVICE.get(op.name, calls.SUPPORTED))

    def any_shape(z: Tensor) -> Tensor:
        return function(z.reshape(-1, *[1] * (len(shape) - 1))).reshape(z.shape)

    return Curve(next(iter(bases.values())), any_shape, reader.where(op))


def _moved(reader: Reader, op: Op) -> Layer | None:
    """A map of positions, if the call has no name of its own for an elementwise function."""
    before = reader.tape.ops[op.refs[0].index].out
    if before.dim() < 3 or not op.out.is_floating_point():
        return None
    if before.shape == op.out.shape and is_elementwise(position_function(op), before.shape):
        return None
    return position_map(reader, op)


_RULES: list[tuple[set[Any], Callable[[Reader, Op], Any]]] = [
    (calls.AVG_POOLS, _pool),
    (calls.ADAPTIVE_POOLS, _adaptive_pool),
    (calls.REDUCTIONS, _mean_or_sum),
    (calls.VIEWS, _view),
    ({F.glu}, _gated),
]
