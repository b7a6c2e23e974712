"""From a tape to the layers of a limit, for values laid out in any way: sequences [n, length, features], heads.

What the calls do to layers is as in `tape_to_layers`; beside each value stand the labels of its numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ntkit.kernels.infinite.channel_parts import part
from ntkit.kernels.infinite.labels import Labels
from ntkit.kernels.infinite.layers import (
    Affine,
    Flatten,
    GlobalPool,
    Input,
    Layer,
    Mixture,
    Size,
    Sum,
)
from ntkit.kernels.infinite.tape import Op, Ref, Tape
from ntkit.kernels.infinite.tape_reader import Curve, Reader

Value = TypeVar("Value", bound=Layer | Curve)
Matrix = Tensor  # [positions, positions of the source]


class SequenceReader(Reader):
    """Values as layers and curves, with labels by their index on the tape."""

    def __init__(self, model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> None:
        super().__init__(model, tape, w_std, b_std)
        self.labels: dict[int, Labels] = {}
        self.constants: dict[int, tuple[Input, Tensor]] = {}  # inputs without samples, [positions, channels]
        self.encodings: list[Tensor] = []  # constants that were added to layers
        self._reduced: dict[tuple[int, bytes], Layer] = {}

    def of(self, argument: Any) -> Labels:
        """Labels of an argument."""
        return self.labels[argument.index]

    def put(self, index: int, value: Value, labels: Labels) -> Value:
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
            if len(indices) == 1 < labels.channels:
                fix = "Select a share of the channels, which can grow."
                raise self.refusal(op, "one channel of many, whose values stay random", fix)
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
        if (
            isinstance(layer, Affine)
            and ones
            and layer.kernel_size == (1, 1) == layer.stride
            and not any(layer.padding)
        ):
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
        self.constants[id(layer)] = layer, values
        return layer

    def centered(self, op: Op, layer: Layer) -> Layer:
        """A sum whose constants have mean 0 over the features: a norm over the features takes the mean away."""
        if not isinstance(layer, Sum) or not any(id(t) in self.constants for _, t in layer.terms):
            return layer
        terms = []
        for factor, term in layer.terms:
            if id(term) in self.constants:
                own, values = self.constants[id(term)]
                name, term = own.name, self.constant_input(op, values - values.mean(1, keepdim=True), own.size)
                term.name = f"{name}, without their mean"
            terms.append((factor, term))
        return self.add(Sum(layer.size, layer.name, terms), [t for _, t in terms])

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
