"""From a tape to the layers of a limit, for values laid out in any way: sequences [n, length, features], heads.

What the calls do to layers is as in `tape_to_layers`; beside each value stand the labels of its numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkit.kernels.infinite import tape_calls as calls
from ntkit.kernels.infinite.channel_parts import part
from ntkit.kernels.infinite.labels import Labels, moves
from ntkit.kernels.infinite.layers import (
    Affine,
    Flatten,
    GlobalPool,
    Input,
    Layer,
    Mixture,
    Norm,
    Size,
    Sum,
)
from ntkit.kernels.infinite.tape import DROPOUTS, Op, Ref, Tape, dropout_rate
from ntkit.kernels.infinite.tape_calls import arguments, factor_of, grid
from ntkit.kernels.infinite.tape_reader import Curve, DerivedWeight, Reader, Weight
from ntkit.kernels.infinite.tape_to_layers import added, elementwise
from ntkit.kernels.infinite.weight_layers import norm_parameter, variances
from ntkit.networks.initialization import initial_std

Matrix = Tensor  # [positions, positions of the source]


class SequenceReader(Reader):
    """Values as layers and curves, with labels by their index on the tape."""

    def __init__(self, model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> None:
        super().__init__(model, tape, w_std, b_std)
        self.labels: dict[int, Labels] = {}
        self._reduced: dict[tuple[int, bytes], Layer] = {}

    def of(self, argument: Any) -> Labels:
        """Labels of an argument."""
        return self.labels[argument.index]

    def put(self, index: int, value: Layer | Curve, labels: Labels) -> Layer | Curve:
        """Note the labels of a value."""
        self.labels[index] = labels
        return value

    # ------------------------------------------------------------------ layers of a value as a whole

    def rows(self, op: Op, ref: Ref, count: int) -> tuple[Layer, Labels, Size]:
        """The layer of which each row of `count` numbers is one position, with the rows' labels at their first number.

        Positions that no row has are left out; so are channels. The grid is that of the layer.
        """
        value, labels = self.value(ref), self.of(ref)
        flat = labels.moved(labels.ids.reshape(-1, count))
        sample, channel, position = flat.sample, flat.channel, flat.position
        first = flat.moved(labels.ids.reshape(*labels.ids.shape[: labels.ids.dim() - _axes(labels, count)], -1)[..., 0])
        if not torch.equal(sample, sample[:, :1].expand_as(sample)):
            raise self.refusal(op, "numbers of several samples in one row", "Keep each sample apart.")
        alike = bool((channel == channel[:1]).all()) and len(channel[0].unique()) == count
        if alike and torch.equal(position, position[:, :1].expand_as(position)):
            indices = tuple(channel[0].tolist())
            if len(indices) < labels.channels:
                value = part(self, op, value, indices, labels.channels)
            layer = self.layer(value)
            used = position[:, 0].unique()
            if len(used) < labels.positions:
                matrix = torch.eye(labels.positions, dtype=torch.float64)[used]
                layer = self.positions(op, layer, matrix, (1, len(used)))
                place = torch.full((labels.positions,), -1).scatter(0, used, torch.arange(len(used)))
                first = Labels.at(first.sample, first.channel, place[first.position], labels.channels, len(used))
            return layer, first, layer.size
        if count == labels.channels * labels.positions and bool((flat.ids.sort(1)[0].diff(dim=1) == 1).all()):
            layer = self.layer(value)
            flattened = self.add(Flatten((1, 1), self.where(op), layer), [layer])
            return flattened, Labels.at(first.sample, first.channel * 0, first.position * 0, 1, 1), (1, 1)
        got = f"{op.name} over an axis that is not that of the features"
        raise self.refusal(op, got, "Mix the features at each position, or all of them behind nn.Flatten.")

    def positions(self, op: Op, layer: Layer, matrix: Matrix, size: Size) -> Layer:
        """Sums over positions with constant weights; before a layer that acts on each position, where that is equal."""
        key = id(layer), matrix.numpy().tobytes()
        if key not in self._reduced:
            self._reduced[key] = self._positions(op, layer, matrix, size)
        return self._reduced[key]

    def _positions(self, op: Op, layer: Layer, matrix: Matrix, size: Size) -> Layer:
        if isinstance(layer, Sum):
            terms = [(factor, self.positions(op, term, matrix, size)) for factor, term in layer.terms]
            return self.add(replace(layer, size=size, terms=terms), [t for _, t in terms])
        ones = bool(((matrix.sum(1) - 1).abs() < 1e-14).all())
        if isinstance(layer, Affine) and ones and layer.kernel_size == (1, 1) == layer.stride and not any(layer.padding):
            source = self.positions(op, layer.source, matrix, size)
            return self.add(replace(layer, size=size, source=source), [source], own=id(layer))
        if isinstance(layer, Mixture):
            inner = layer.weights
            composed = replace(layer, size=size, weights=lambda scores, given: matrix.to(scores) @ inner(scores, given))
            return self.add(composed, [layer.source])
        if len(matrix) == 1 and bool((matrix == 1 / matrix.shape[1]).all()):
            return self.add(GlobalPool((1, 1), self.where(op), layer), [layer])
        constant = lambda scores, given: matrix.to(scores).expand(len(scores), *matrix.shape)
        return self.add(Mixture(size, self.where(op), layer, [], [], (1, 1), constant), [layer])

    def constant_input(self, op: Op, values: Tensor, size: Size) -> Input:
        """What is the same for all samples: [positions, channels]."""
        key = -1 - len(self._inputs)
        of_samples = lambda out: values.to(out.device).T.reshape(1, -1, *size).expand(len(out), -1, -1, -1)
        layer = Input(size, f"{self.where(op)}, constant", 0, values.shape[1], 0, key, of_samples)
        self._inputs[key, 0, None] = layer
        self.add(layer, [])
        return layer

    def moved_input(self, op: Op, index: int, as_images: Any, size: Size, channels: int) -> Input:
        """What the network computes from its input, laid out in another way."""
        key = -1 - len(self._inputs)
        layer = Input(size, self.where(self.tape.ops[index]) if index else "", index, channels, 0, key, as_images)
        self._inputs[key, 0, None] = layer
        self.add(layer, [])
        return layer


def _axes(labels: Labels, count: int) -> int:
    """How many of the last axes together have `count` numbers."""
    axes, size = 0, 1
    while size < count:
        axes += 1
        size *= labels.ids.shape[-axes]
    return axes


# ---------------------------------------------------------------------- calls


def sequence_value(reader: SequenceReader, op: Op, index: int) -> Any:
    """The value of one call that is no attention, with its labels."""
    inputs = [reader.values[r.index] for r in op.refs]
    weights = [v for v in inputs if isinstance(v, (Weight, DerivedWeight))]
    inner = [v for v in inputs if isinstance(v, (Layer, Curve))]
    if op.func is F.linear:
        return _linear(reader, op, index)
    if op.func in calls.AFFINE and reader.value(op.args[0]) is None:
        return _patches(reader, op, index)
    if op.func in (F.layer_norm, torch.layer_norm):
        return _layer_norm(reader, op, index)
    if weights and not inner and None not in inputs:
        return _weight(reader, op, index, weights)
    if op.func in calls.SUMS and (weights or _constant(op) is not None):
        return _shifted(reader, op, index)
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


def _patches(reader: SequenceReader, op: Op, index: int) -> Layer:
    """A convolution of the input: a dense layer on its windows, which are data."""
    args = arguments(op, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
    weight, bias = (reader.value(args.get(name)) for name in ("weight", "bias"))
    plain = isinstance(weight, Weight) and (bias is None or isinstance(bias, Weight))
    padding = args.get("padding", 0)
    if not plain or args.get("groups", 1) != 1 or isinstance(padding, str) or weight.parameter.dim() != 4:
        raise reader.refusal(op, "this convolution in front of attention", "Use nn.Conv2d with numbers for padding.")
    reader.use(op, weight, bias)
    settings = {name: args.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    shape, size = weight.parameter.shape, grid(op.out.shape[2:])
    assert size is not None
    windows = lambda t: F.unfold(t, shape[2:], **settings).reshape(len(t), -1, *size)  # pyrefly: ignore
    source = reader.moved_input(op, op.args[0].index, windows, size, math.prod(shape[1:]))
    laws = variances(reader, op, weight, bias, None)
    one = (1, 1)
    layer = Affine(size, reader.where(op), source, one, one, (0, 0), one, *laws)
    reader.add(layer, [source], own=id(layer))
    ids = torch.arange(op.out.numel()).reshape(op.out.shape)
    return reader.put(index, layer, Labels(ids, op.out.shape[1], math.prod(size)))


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
    if id(source) not in reader.gaussian:
        got = "values that are not centered (an activation's, or with constants added)"
        raise reader.refusal(op, got, "Normalize before the activation, not after it.")
    weight, weight_ntk = norm_parameter(reader, op, "weight", args.get("weight"))
    _, bias_ntk = norm_parameter(reader, op, "bias", args.get("bias"))
    if weight == 0:
        raise reader.refusal(op, "a weight of zeros", "Its output is 0. Start from another weight.")
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


def _constant(op: Op) -> Tensor | None:
    """A tensor of several numbers among the arguments."""
    found = [a for a in op.args if isinstance(a, Tensor) and a.numel() > 1]
    return found[0] if found else None


def _shifted(reader: SequenceReader, op: Op, index: int) -> Layer:
    """A layer plus a parameter or a constant with values of its own at each position: encodings of positions."""
    weight = next((w for r in op.refs if isinstance(w := reader.values[r.index], (Weight, DerivedWeight))), None)
    ref = next((r for r in op.refs if isinstance(reader.values[r.index], (Layer, Curve))), None)
    if ref is None or len(op.refs) > 2 or op.kwargs or op.func in calls.DIFFERENCES or isinstance(weight, DerivedWeight):
        raise reader.refusal(op, f"{op.name} of a parameter", "Add a parameter or a constant to a layer.")
    labels, layer = reader.of(ref), reader.layer(reader.value(ref))
    if tuple(reader.tape.ops[ref.index].out.shape) != tuple(op.out.shape):
        raise reader.refusal(op, "a sum that repeats the layer's values", "Add values of one shape.")
    if weight is None:
        constant = _constant(op)
        assert constant is not None
        table = _by_position(reader, op, labels, constant.detach().double().expand(op.out.shape))
        own = reader.constant_input(op, table, layer.size)
        own.name = f"{reader.where(op)}, constants whose products over their {labels.channels} features are kept"
    else:
        own = _encoding(reader, op, labels, layer, weight)
    reader.check_uncorrelated(op, layer, own)
    terms = [*(layer.terms if isinstance(layer, Sum) else [(1.0, layer)]), (1.0, own)]
    whole = reader.add(Sum(layer.size, reader.where(op), terms), [t for _, t in terms])
    return reader.put(index, whole, labels)


def _encoding(reader: SequenceReader, op: Op, labels: Labels, layer: Layer, weight: Weight) -> Layer:
    """A parameter with features of its own at each position: a dense layer on the numbers of the positions."""
    ref = next(r for r in op.refs if isinstance(reader.values[r.index], Weight))
    shape = reader.tape.ops[ref.index].out.shape
    entries = torch.arange(weight.parameter.numel()).reshape(weight.parameter.shape)
    entries = reader.labels[ref.index].ids if ref.index in reader.labels else entries
    table = _by_position(reader, op, labels, entries.reshape(shape).expand(op.out.shape))
    if len(table.unique()) != table.numel():
        got = "a parameter of which several positions or features share an entry"
        raise reader.refusal(op, got, "Add a parameter with features of its own at each position.")
    reader.use(op, weight)
    p, size = weight.parameter, layer.size
    std, text = 0.0, "zeros"
    if bool(p.any()):
        initial = initial_std(p.detach().flatten() * weight.factor, 1, 1, weight.name)
        if initial.mean:
            got, fix = f"'{weight.name}' of mean {initial.mean:.3g}, not zero", "Draw it with mean zero."
            raise reader.refusal(op, got, fix)
        std, text = initial.std, initial.name
    count, gain = math.prod(size), weight.factor**2 * float(p.requires_grad)
    source, one = reader.constant_input(op, torch.eye(count, dtype=torch.float64), size), (1, 1)
    laws = (count * std**2, 0.0, count * gain, 0.0, text)
    own = Affine(size, f"parameter '{weight.name}'", source, one, one, (0, 0), one, *laws)
    return reader.add(own, [source], own=id(own))


def _by_position(reader: SequenceReader, op: Op, labels: Labels, values: Tensor) -> Tensor:
    """[positions, channels] of numbers in the layout of a layer, the same for all samples."""
    table = torch.full((3, labels.channels * labels.positions), -1, dtype=values.dtype)
    table.view(-1)[labels.ids.flatten()] = values.flatten().cpu()
    if len(labels.ids.unique()) != table.numel() or not bool((table == table[0]).all()):
        got = "constants that differ between samples, or at some of the positions only"
        raise reader.refusal(op, got, "Add constants to all positions, the same for all samples.")
    return table[0].reshape(labels.channels, labels.positions).T


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
    inner = [r for r in op.refs if reader.values[r.index] is not None]
    if op.func in DROPOUTS and dropout_rate(op.args, op.kwargs):
        raise reader.refusal(op, "dropout in train mode", "Call model.eval().")
    if inner and (op.no_grad or op.func == calls.DATA):
        raise reader.refusal(op, f"{op.name} where no gradients flow", "Freeze layers with requires_grad_(False).")

