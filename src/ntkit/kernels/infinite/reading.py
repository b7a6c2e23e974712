"""A module's layers: as a stack of layers on images, or as layers on sequences with attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkit.base.checks import NoLimit, Refused, refusal
from ntkit.kernels.infinite.all_pairs import check_layers
from ntkit.kernels.infinite.attention_reader import AttentionReader
from ntkit.kernels.infinite.attention_weights import Scale
from ntkit.kernels.infinite.layers import Graph, Input, Layer, Mixture, sources
from ntkit.kernels.infinite.tape import DROPOUTS, Op, Ref, Tape, dropout_rate, record
from ntkit.kernels.infinite.tape_reader import Curve
from ntkit.kernels.infinite.tape_to_layers import check_norms, output_layer, read_layers
from ntkit.networks.larger_copies import larger_copy
from ntkit.networks.paired_runs import copied

_SEQUENCES = {F.linear, F.scaled_dot_product_attention, torch.softmax, F.softmax, Tensor.softmax}


def read(model: nn.Module, x: Tensor, w_std: float | None, b_std: float | None) -> Graph:
    """Read the layers of a module from its run on a few samples.

    Raises
    ------
    NoLimit
        For a layer without an infinite-width limit of this kind, by its name, with the reason and what to do.
    Refused
        For a model that does not run on the samples, or not in a way that can be recorded.
    """
    three, tape = torch.cat([x[:1], x[-1:], x[:1]]), None
    try:
        check_norms(model)
        tape = record(model, three)
        try:
            graph = read_layers(model, tape, w_std, b_std)
            _check_samples(graph, model, three)
            return graph
        except Refused as error:
            if not any(op.out.dim() > 2 for op in tape.ops):
                raise NoLimit(str(error)) from None
            first = error
        return _sequences(model, tape, three, (w_std, b_std), first)
    except NoLimit as error:
        if tape is not None and not _can_sample(model, tape, three):
            raise
        raise NoLimit(f"{error} Or estimate it from random wide networks: InfiniteKernel(model, sample=16).") from None


def _can_sample(model: nn.Module, tape: Tape, three: Tensor) -> bool:
    """Whether random copies have a kernel to estimate: of vectors, each of its own sample, without random masks."""
    out = tape.ops[tape.output].out.detach()
    masks = any(op.func in DROPOUTS and dropout_rate(op.args, op.kwargs) for op in tape.ops)
    if masks or out.dim() != 2 or len(out) != 3:
        return False
    try:
        other = record(model, three[:2])
    except Refused:
        return False
    two = other.ops[other.output].out
    return two.shape == out[:2].shape and torch.allclose(two, out[:2], rtol=1e-3, atol=1e-3 * float(out.abs().max()))


def _check_samples(graph: Graph, model: nn.Module, three: Tensor) -> None:
    """What enters the first weights must have the samples at its first axis, also where others are as long."""
    inputs = [layer for layer in graph.layers if isinstance(layer, Input) and layer.index]
    ops = record(model, three[:2]).ops if inputs else []
    for layer in inputs:
        if (count := layer.values(ops[layer.index].out).shape[2]) != 2:
            got, expected = f"{count} samples of a batch of 2", "as many as in the input"
            fix = "Keep the samples at the first axis."
            raise NoLimit(str(refusal(layer.name, got=got, expected=expected, fix=fix)))


def _sequences(
    model: nn.Module, tape: Tape, three: Tensor, stds: tuple[float | None, float | None], first: Refused
) -> Graph:
    reader = AttentionReader(model, tape, *stds)
    try:
        reader.read()
        op = tape.ops[tape.output]
        if isinstance(reader.values[tape.output], (Layer, Curve)):
            reader.values[tape.output] = _output(reader, op)
        layer = output_layer(reader)
        reader.graph = _needed(reader.graph, layer)
        check_layers(reader.graph)
        _check_given(reader, model, three)
        _check_samples(reader.graph, model, three)
        _check_scales(reader, model, three, stds)
    except Refused as error:
        own = reader.scales or any(
            op.func in _SEQUENCES or "multi_head" in op.name for op in tape.ops if op.out.dim() > 2
        )
        raise NoLimit(str(error if own else first)) from None
    return reader.graph


def _output(reader: AttentionReader, op: Op) -> Layer:
    """The layer of the model's output, [n, C], or with the features last."""
    layer, rows, size = reader.rows(op, Ref(reader.tape.output), op.out.shape[-1])
    count = math.prod(size)
    if not torch.equal(rows.sample.flatten(), torch.arange(3).repeat_interleave(rows.sample.numel() // 3)):
        fix = "Return the samples in the order of the input."
        raise reader.refusal(op, "an output of samples in another order", fix)
    if not torch.equal(rows.position.flatten(), torch.arange(count).repeat(3)):
        raise reader.refusal(op, "an output of positions in another order", "Return the positions in their order.")
    return layer


def _needed(graph: Graph, output: Layer) -> Graph:
    """The layers on which the output depends, in their order."""
    needed = {id(output)}
    for layer in reversed(graph.layers):
        if id(layer) in needed:
            of = [*sources(layer), *([k for _, k in layer.scores] + layer.given if isinstance(layer, Mixture) else [])]
            needed |= {id(k) for k in of}
    layers = [layer for layer in graph.layers if id(layer) in needed]
    place = next(i for i, layer in enumerate(layers) if layer is output)
    last = max((layer.index for layer in layers if isinstance(layer, Input)), default=0)
    return Graph(layers, place, last)


def _check_given(reader: AttentionReader, model: nn.Module, three: Tensor) -> None:
    """What weights take of the input must be of each sample: of two samples there are two."""
    calls = record(model, three[:2]).ops if reader.given else []
    for index in reader.given:
        if calls[index].out.shape[:1] != (2,):
            got = f"weights that depend on a value of shape {tuple(calls[index].out.shape)} of two samples"
            fix = "Compute constant masks without the input."
            raise reader.refusal(reader.tape.ops[index], got, fix)


def _check_scales(
    reader: AttentionReader, model: nn.Module, three: Tensor, stds: tuple[float | None, float | None]
) -> None:
    """Scores must fall as 1 / features: a copy of twice the width tells."""
    if not reader.scales:
        return
    known = None if stds[0] is None or stds[1] is None else (stds[0], stds[1])
    model = _with_buffers(_with_parameters(model, reader.encodings), reader.frozen)
    if reader.tape.ops[reader.tape.output].out.dim() > 2:
        model = _MeanOverPositions(model)
    larger = larger_copy(model, 2, three, known)
    larger.draw(0)
    other = AttentionReader(larger.network, record(larger.network, three), 1.0, 1.0)
    other.read()
    for one, two in zip(reader.scales, other.scales, strict=True):
        _check_scale(reader, one, two)


def _check_scale(reader: AttentionReader, one: Scale, two: Scale) -> None:
    growth = two.features / one.features
    ratios = [b / a for a, b in zip(one.factors, two.factors, strict=True)]
    if growth > 1 and all(math.isclose(ratio * growth, 1, rel_tol=1e-9) for ratio in ratios):
        return
    if growth == 1:
        got = f"scores that sum {one.features} features at any width, and so stay random"
    elif all(math.isclose(ratio**2 * growth, 1, rel_tol=1e-9) for ratio in ratios):
        got = f"scores over the square root of their {one.features} features, which stay random at any width"
    else:
        got = f"scores of {one.features} features with a factor that does not fall as 1 / features"
    fix = "Divide the scores by the number of features: they then tend to their means, and the limit is in closed form."
    raise refusal(reader.where(one.op), got=got, expected="scores with a deterministic limit", fix=fix)


class _MeanOverPositions(nn.Module):
    """A network with a value per position as one with a vector of outputs: only such can be enlarged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(1, -2).mean(1)


def _with_buffers(model: nn.Module, names: set[str]) -> nn.Module:
    """Frozen parameters in the scores as buffers of a copy: these neither grow nor are drawn."""
    model = copied(model) if names else model
    for name in names:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        value = getattr(module, own).detach()
        delattr(module, own)
        module.register_buffer(own, value)
    return model


def _with_parameters(model: nn.Module, constants: list[Tensor]) -> nn.Module:
    """Encodings of positions that the model keeps as buffers, as random parameters of a copy: these grow with it."""
    places = {t.untyped_storage().data_ptr() for t in constants}
    buffers = [
        (module_name, name, buffer)
        for module_name, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.untyped_storage().data_ptr() in places
    ]
    if not buffers:
        return model
    model = copied(model)
    for module_name, name, buffer in buffers:
        values = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(0)).to(buffer)
        module = model.get_submodule(module_name)
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(values - values.mean(), requires_grad=False))
    return model
