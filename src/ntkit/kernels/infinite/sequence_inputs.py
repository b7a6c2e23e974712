"""Where values of sequences come from: patches of images, words, encodings of positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkit.kernels.infinite import tape_calls as calls
from ntkit.kernels.infinite.labels import Labels
from ntkit.kernels.infinite.layers import Affine, Layer, Sum
from ntkit.kernels.infinite.sequence_reader import SequenceReader
from ntkit.kernels.infinite.tape import Op, Ref
from ntkit.kernels.infinite.tape_calls import arguments, grid
from ntkit.kernels.infinite.tape_reader import Curve, DerivedWeight, Weight
from ntkit.kernels.infinite.weight_layers import variances
from ntkit.networks.initialization import initial_std

_WORDS = 4096  # of a vocabulary: a word is a vector of as many numbers


def patches(reader: SequenceReader, op: Op, index: int) -> Layer:
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


def shifted(reader: SequenceReader, op: Op, index: int) -> Layer:
    """A layer plus a parameter or a constant with values of its own at each position: encodings of positions."""
    weight = next((w for r in op.refs if isinstance(w := reader.values[r.index], (Weight, DerivedWeight))), None)
    ref = next((r for r in op.refs if isinstance(reader.values[r.index], (Layer, Curve))), None)
    if (
        ref is None
        or len(op.refs) > 2
        or op.kwargs
        or op.func in calls.DIFFERENCES
        or isinstance(weight, DerivedWeight)
    ):
        raise reader.refusal(op, f"{op.name} of a parameter", "Add a parameter or a constant to a layer.")
    labels, layer = reader.of(ref), reader.layer(reader.value(ref))
    if tuple(reader.tape.ops[ref.index].out.shape) != tuple(op.out.shape):
        raise reader.refusal(op, "a sum that repeats the layer's values", "Add values of one shape.")
    if weight is None:
        constant = constant_of(op)
        assert constant is not None
        reader.encodings.append(constant)
        table = _by_position(reader, op, labels, constant.detach().double().expand(op.out.shape))
        own = reader.constant_input(op, table, layer.size)
        own.name = f"{reader.where(op)}, constants whose products over their {labels.channels} features are kept"
    else:
        own = _encoding(reader, op, labels, layer, weight)
    reader.check_uncorrelated(op, layer, own)
    terms = [*(layer.terms if isinstance(layer, Sum) else [(1.0, layer)]), (1.0, own)]
    whole = reader.add(Sum(layer.size, reader.where(op), terms), [t for _, t in terms])
    return reader.put(index, whole, labels)


def constant_of(op: Op) -> Tensor | None:
    """A tensor of several numbers among the arguments."""
    found = [a for a in op.args if isinstance(a, Tensor) and a.numel() > 1]
    return found[0] if found else None


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


def embedding(reader: SequenceReader, op: Op, index: int) -> Layer:
    """Rows of a matrix, one per word: a dense layer on vectors that are 1 at the word."""
    args = arguments(op, "input", "weight", "padding_idx", "max_norm")
    words, weight = args["input"], reader.value(args["weight"])
    if not isinstance(words, Ref) or reader.value(words) is not None or not isinstance(weight, Weight):
        raise reader.refusal(op, "an embedding of computed words", "Pass the words.")
    p, out = weight.parameter, reader.tape.ops[words.index].out
    if args.get("max_norm") is not None or calls.words_differ(p, args.get("padding_idx")):
        got = "max_norm, or padding_idx, a word whose row is zero or not trained"
        raise reader.refusal(op, got, "Leave it out: every word is drawn and trained alike.")
    count, size = len(p), grid(out.shape[1:])
    if count > _WORDS or size is None or out.shape[0] != 3:
        got = f"{count} words, or words of shape {tuple(out.shape)}"
        raise reader.refusal(op, got, f"Pass [n, length], of {_WORDS} words at most.")
    reader.use(op, weight)
    initial = initial_std(p.detach().flatten() * weight.factor, 1, 1, weight.name)
    if initial.mean:
        got = f"'{weight.name}' of mean {initial.mean:.3g}, not zero"
        raise reader.refusal(op, got, "Draw it with mean zero.")
    one_hot = lambda t: F.one_hot(t.long(), count).to(p.dtype).movedim(-1, 1)
    source, one = reader.moved_input(op, words.index, one_hot, size, count), (1, 1)
    gain = weight.factor**2 * float(p.requires_grad)
    laws = (count * initial.std**2, 0.0, count * gain, 0.0, initial.name)
    layer = Affine(size, reader.where(op), source, one, one, (0, 0), one, *laws)
    reader.add(layer, [source], own=id(layer))
    places = torch.arange(out.numel()).reshape(*out.shape, 1)
    positions = math.prod(size)
    labels = Labels.at(places // positions, torch.arange(p.shape[1]), places % positions, p.shape[1], positions)
    return reader.put(index, layer, labels)
