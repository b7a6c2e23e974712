"""Reading the calls on sequences that are no attention: dense layers and norms at each position, sums, means."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.kernels.infinite import tape_calls as calls
from ntkit.kernels.infinite.labels import Labels, moves
from ntkit.kernels.infinite.layers import Affine, Layer, Norm, Sum
from ntkit.kernels.infinite.sequence_inputs import constant_of, embedding, patches, shifted
from ntkit.kernels.infinite.sequence_reader import SequenceReader
from ntkit.kernels.infinite.tape import DROPOUTS, Op, Ref, dropout_rate
from ntkit.kernels.infinite.tape_calls import arguments, factor_of, grid
from ntkit.kernels.infinite.tape_reader import Curve, DerivedWeight, Weight
from ntkit.kernels.infinite.tape_to_layers import added, elementwise
from ntkit.kernels.infinite.weight_layers import norm_parameter, variances


def sequence_value(reader: SequenceReader, op: Op, index: int) -> Any:
    """The value of one call that is no attention, with its labels."""
    inputs = [reader.values[r.index] for r in op.refs]
    weights = [v for v in inputs if isinstance(v, (Weight, DerivedWeight))]
    inner = [v for v in inputs if isinstance(v, (Layer, Curve))]
    if op.func is F.linear:
        return _linear(reader, op, index)
    if op.func in calls.AFFINE and reader.value(op.args[0]) is None:
        return patches(reader, op, index)
    if op.func is F.embedding:
        return embedding(reader, op, index)
    if op.func in (F.layer_norm, torch.layer_norm):
        return _layer_norm(reader, op, index)
    if weights and not inner and None not in inputs:
        return _weight(reader, op, index, weights)
    if op.func in calls.SUMS and (weights or constant_of(op) is not None):
        return shifted(reader, op, index)
    if weights or any(v is None for v in inputs):
        what = "a parameter" if weights else "the input"
        raise reader.refusal(op, f"{op.name} of {what} and a layer", "Only sums of them are supported here.")
    first = op.refs[0]
    labels = reader.of(first)
    if len(inner) == len(op.refs) == 1:
        if op.func in calls.PRODUCTS | calls.NEGATIONS and (factor := factor_of(op)) is not None:
            return reader.put(index, reader.scaled(op, inner[0], factor), labels)
        if op.func in calls.REDUCTIONS:
            return _reduced(reader, op, index)
        if (places := moves(op, reader.tape.ops[first.index].out)) is not None:
            return reader.put(index, inner[0], labels.moved(labels.ids.flatten()[places]))
    if any(not reader.of(r).same(labels) for r in op.refs):
        got = f"{op.name} of values whose numbers are in another order, or at other positions"
        raise reader.refusal(op, got, "Combine values of one layout.")
    if op.func in calls.SUMS:
        return reader.put(index, added(reader, op), labels)
    return reader.put(index, elementwise(reader, op, inner), labels)


def _linear(reader: SequenceReader, op: Op, index: int) -> Layer:
    """A dense layer on the last axis."""
    args = arguments(op, "input", "weight", "bias")
    weight, bias = (reader.value(args.get(name)) for name in ("weight", "bias"))
    if not isinstance(weight, Weight) or not (bias is None or isinstance(bias, Weight)):
        raise reader.refusal(op, "a weight that is not a parameter", "Use the layer's own parameter.")
    x, count = args["input"], weight.parameter.shape[1]
    if not isinstance(x, Ref) or isinstance(reader.value(x), (Weight, DerivedWeight)):
        raise reader.refusal(op, "a parameter or a constant as its input", "Give it the input or a layer.")
    if reader.value(x) is None:
        source, first = _data(reader, op, x.index)
    else:
        source, first, _ = reader.rows(op, x, count)
    reader.use(op, weight, bias)
    laws = variances(reader, op, weight, bias, None)
    one = (1, 1)
    layer = Affine(source.size, reader.where(op), source, one, one, (0, 0), one, *laws)
    reader.add(layer, [source], own=id(layer))
    return reader.put(index, layer, _with_features(first, op.out, len(weight.parameter)))


def _with_features(rows: Labels, out: Tensor, count: int) -> Labels:
    """Labels of new features on the last axis, of a row's samples and positions."""
    samples, positions = (t.reshape(*out.shape[:-1], 1) for t in (rows.sample, rows.position))
    return Labels.at(samples, torch.arange(count), positions, count, rows.positions)


def _data(reader: SequenceReader, op: Op, index: int) -> tuple[Layer, Labels]:
    """The input, or what is computed from it, as [n, positions ..., features]."""
    out = reader.tape.ops[index].out
    size = grid(out.shape[1:-1])
    if out.dim() < 2 or out.shape[0] != 3 or size is None or not out.is_floating_point():
        got = f"an input of shape {tuple(out.shape)} in {out.dtype}"
        raise reader.refusal(op, got, "Pass [n, features] or [n, length, features].")
    key = index, 0, -1
    if key not in reader._inputs:
        reader._inputs[key] = reader.moved_input(op, index, lambda t: t.movedim(-1, 1), size, out.shape[-1])
    places = torch.arange(3 * math.prod(size)).reshape(out.shape[:-1])
    count = math.prod(size)
    return reader._inputs[key], Labels.at(places // count, places * 0, places % count, 1, count)


def _layer_norm(reader: SequenceReader, op: Op, index: int) -> Layer:
    args = arguments(op, "input", "normalized_shape", "weight", "bias", "eps")
    value = reader.value(args["input"])
    if not isinstance(value, (Layer, Curve)):
        raise reader.refusal(op, "the input normalized with trained weights", "Normalize the input outside the model.")
    labels, count = reader.of(args["input"]), math.prod(args["normalized_shape"])
    if count != labels.channels or len(args["normalized_shape"]) != 1:
        got = f"normalized_shape {tuple(args['normalized_shape'])} of {labels.channels} features"
        raise reader.refusal(op, got, "Normalize over all features of each position.")
    source, first, size = reader.rows(op, args["input"], count)
    source = reader.centered(op, source)
    terms = [t for _, t in source.terms] if isinstance(source, Sum) else [source]
    if not all(id(t) in reader.gaussian or id(t) in reader.constants for t in terms):
        got = "values that are not centered (an activation's)"
        raise reader.refusal(op, got, "Normalize before the activation, not after it.")
    weight, weight_ntk = norm_parameter(reader, op, "weight", reader.value(args.get("weight")))
    _, bias_ntk = norm_parameter(reader, op, "bias", reader.value(args.get("bias")))
    layer = Norm(
        size, reader.where(op), source, float(args.get("eps", 1e-5)), weight**2, weight_ntk, bias_ntk, False, True
    )
    reader.add(layer, [source])
    channel = labels.moved(labels.ids.reshape(-1, count)).channel[0]
    positions = first.position.reshape(*op.out.shape[:-1], 1)
    samples = first.sample.reshape(*op.out.shape[:-1], 1)
    return reader.put(index, layer, Labels.at(samples, channel, positions, count, first.positions))


def _weight(reader: SequenceReader, op: Op, index: int, weights: list[Any]) -> Any:
    """A parameter times a number, or some of its entries."""
    if len(weights) > 1 or not isinstance(w := weights[0], Weight):
        return DerivedWeight(" and ".join(w.name for w in weights))
    before = reader.labels.get(op.refs[0].index)
    if (factor := factor_of(op)) is not None:
        if before is not None:
            reader.labels[index] = before
        return Weight(w.parameter, w.factor * factor, w.name)
    if (places := moves(op, reader.tape.ops[op.refs[0].index].out)) is not None:
        ids = places if before is None else before.ids.flatten()[places]
        reader.labels[index] = Labels(ids, 1, 1)
        return w
    return DerivedWeight(w.name)


def _reduced(reader: SequenceReader, op: Op, index: int) -> Layer | Curve:
    """A mean or a sum over positions."""
    dims = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else None)
    labels, layer = reader.of(op.refs[0]), reader.layer(reader.value(op.refs[0]))
    rank = labels.ids.dim()
    axes = sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))})
    keep = [d for d in range(rank) if d not in axes]
    flat = labels.moved(labels.ids.permute(*keep, *axes).flatten(len(keep)))
    sample, channel, position = (t.reshape(-1, t.shape[-1]) for t in (flat.sample, flat.channel, flat.position))
    if not all(torch.equal(t, t[:, :1].expand_as(t)) for t in (sample, channel)):
        raise reader.refusal(op, f"{op.name} over features or samples", "Average over positions.")
    rows, which = position.sort(1)[0].unique(dim=0, return_inverse=True)
    matrix = torch.zeros(len(rows), labels.positions, dtype=torch.float64)
    matrix.scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))
    count = rows.shape[1]
    out = reader.positions(op, layer, matrix / count, (1, len(rows)))
    ids = Labels.at(sample[:, 0], channel[:, 0], which, labels.channels, len(rows))
    total = op.func in (torch.sum, Tensor.sum)
    value = reader.scaled(op, out, float(count)) if total else out
    return reader.put(index, value, ids.moved(ids.ids.reshape(op.out.shape)))


def checked(reader: SequenceReader, op: Op) -> None:
    """Refuse what no value here may be: dropout in train mode, layers without gradients."""
    # not scores and what is computed from them: their gradients vanish with the width
    inner = [r for r in op.refs if isinstance(reader.values[r.index], (Layer, Curve, Weight, DerivedWeight))]
    if op.func in DROPOUTS and dropout_rate(op.args, op.kwargs):
        raise reader.refusal(op, "dropout in train mode", "Call model.eval().")
    if inner and (op.no_grad or op.func in calls.STOPS):
        raise reader.refusal(op, f"{op.name} where no gradients flow", "Freeze layers with requires_grad_(False).")
