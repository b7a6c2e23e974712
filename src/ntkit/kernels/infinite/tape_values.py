"""What is known of a network while its tape is read: its values so far, and which of them may meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.activations import Activation, Function, Rectifier, recognised, weighted
from ntkit.kernels.infinite.layers import Everywhere, Flat, Graph, Layer, Norm, Pointwise, Pool, Source, Sum, sources
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.tape import Op, Tape
from ntkit.kernels.infinite.tape_calls import grid


@dataclass
class Weight:
    """A parameter times a number."""

    parameter: nn.Parameter
    factor: float
    name: str


@dataclass
class Made:
    """Something made of parameters in another way: a layer that takes it in has no known distribution."""

    name: str


@dataclass
class Curve:
    """A function, elementwise, of one value of the network."""

    source: Layer
    function: Function | None  # None: the identity
    name: str
    factor: float = 1.0  # that it is multiplied by
    layer: Layer | None = None  # once something took it in
    root: Curve | None = None  # the same without its factor


def no_limit(subject: str, got: str, expected: str, fix: str) -> Exception:
    """Build the refusal of what has no infinite-width limit of this kind."""
    return refusal(subject, got=got, expected=expected, fix=fix)


class Reader:
    """Values by their place on the tape, the layers made of them, and how these depend on weights."""

    def __init__(self, model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> None:
        self.tape, self.stds = tape, None if w_std is None else (w_std, b_std)
        self.kinds = {name: type(m).__name__ for name, m in model.named_modules()}
        self.values: dict[int, Any] = {0: None}  # by place: None for data, else a Weight, Made, Layer or Curve
        self.used: dict[int, str] = {}  # weights and the layer that uses them
        self.found = Graph()
        self.data: dict[int, Source] = {}
        self.independent: dict[int, tuple[set[int], set[int]]] = {}
        self.trained_norms: set[int] = set()  # layers that pass on what a norm with a trained weight gives
        self.gaussian: set[int] = set()  # layers whose channels are independent draws of one Gaussian field

    def _where(self, op: Op) -> str:
        return f"layer '{op.layer}' ({self.kinds[op.layer]})" if op.layer else f"{op.name} in the model's forward"

    def _refuse(self, op: Op, got: str, fix: str) -> Exception:
        return no_limit(self._where(op), got, "an operation whose infinite-width limit is known", fix)

    def _layer(self, value: Any) -> Layer:
        """A value as a layer; a curve becomes an activation when something takes it in."""
        if isinstance(value, Layer):
            return value
        assert isinstance(value, Curve)
        if value.layer is None:
            source = self._layer(value.root) if value.root else value.source
            if value.factor != 1 or value.function is None:
                terms = source.terms if isinstance(source, Sum) else [(1.0, source)]
                terms = [(value.factor * f, t) for f, t in terms]
                value.layer = self._add(Sum(source.size, value.name, terms), [source])
            else:
                value.layer = self._activated(value)
        return value.layer

    def _activated(self, value: Curve) -> Layer:
        assert value.function is not None
        known, source = recognised(value.function), value.source
        if isinstance(known, Rectifier) and known.even == 0:  # the identity, such as dropout in eval mode
            if known.slope == 1:
                return source
            return self._add(Sum(source.size, value.name, [(known.slope, source)]), [source])
        # each position has its own variance: flattened behind the activation, it is the same
        within = source.source if isinstance(source, Flat) else source
        if id(within) not in self.gaussian:
            raise no_limit(
                value.name,
                "values that are not Gaussian (behind an activation, or a sum with one or with flattened positions)",
                "the outputs of weight layers, their sums, pools and norms",
                "Put a weight layer in front of the activation, or the activation in front of nn.Flatten.",
            )
        known = known or Tabulated(value.function, value.name)
        behind_norm = self._weighted_by(value, within)
        layer = self._add(Pointwise(within.size, value.name, within, known, behind_norm), [within])
        return layer if within is source else self._add(Flat((1, 1), value.name, layer), [layer])

    def _weighted_by(self, value: Curve, within: Layer) -> Activation | None:
        """For an activation right behind a norm with a trained weight, that of z s'(z)."""
        if id(within) not in self.trained_norms:
            return None
        if not isinstance(within, Norm) or id(within.source) in self.trained_norms:
            raise no_limit(
                value.name,
                "a sum, pool or norm of what a norm with a trained weight gives",
                "the activation right behind such a norm",
                "Make the norm without affine weights, or freeze its weight.",
            )
        assert value.function is not None
        function = weighted(value.function)
        return recognised(function) or Tabulated(function, value.name)

    def _add(self, layer: Layer, of: list[Layer], own: int | None = None) -> Layer:
        """Keep a layer, with the weights it is linear in (`own`, or those of its sources) and all it depends on."""
        fresh, behind = set(), set()
        for source in of:
            behind |= self.independent[id(source)][1]
        if all(self.independent[id(source)][0] for source in of):  # not what only one of its parts is linear in
            fresh = set().union(*(self.independent[id(source)][0] for source in of))
        if own is not None:
            fresh, behind = {own}, behind | {own}
        elif isinstance(layer, Pointwise):
            fresh = set()
        self.independent[id(layer)] = (fresh, behind)
        linear = isinstance(layer, (Sum, Pool, Everywhere, Norm)) and all(id(s) in self.gaussian for s in of)
        if own is not None or linear:
            self.gaussian.add(id(layer))
        passed = linear and any(id(s) in self.trained_norms for s in of)
        if passed or (isinstance(layer, Norm) and layer.scale_gain):
            self.trained_norms.add(id(layer))
        self.found.layers.append(layer)
        return layer

    def _source(self, place: int, op: Op) -> Source:
        """The input, or what was made of it, where a weight layer takes it in."""
        if place not in self.data:
            out = self.tape.ops[place].out
            if not out.is_floating_point():
                raise self._refuse(op, f"{out.dtype} input", "Encode it in real numbers outside the model.")
            size = grid(out.shape[2:])
            if size is None or out.dim() < 2 or out.shape[0] != 3:
                raise self._refuse(
                    op, f"a value of shape {tuple(out.shape)}", "Pass [n, d], [n, C, L] or [n, C, H, W]."
                )
            source = Source(size, self._where(self.tape.ops[place]) if place else "", place, out.shape[1])
            self.data[place] = source
            self._add(source, [])
        return self.data[place]

    def _once(self, op: Op, *parameters: Weight | None) -> None:
        for p in parameters:
            if p is not None and id(p.parameter) in self.used:
                got = f"the parameter '{p.name}' a second time, after {self.used[id(p.parameter)]}"
                raise self._refuse(op, got, "Give each layer weights of its own.")
            if p is not None:
                self.used[id(p.parameter)] = self._where(op)

    def _batched(self, op: Op, axes: int) -> None:
        """Refuse a value of one axis too few: torch would take its samples for channels."""
        if op.out.dim() != axes + 2:
            got = f"a value of shape {tuple(op.out.shape)}, whose first axis it takes for channels"
            raise self._refuse(op, got, f"Give it [n, channels] and {axes} axes of positions.")

    def _uncorrelated(self, op: Op, one: Layer, two: Layer) -> None:
        """One of the two must be linear in weights the other does not know: then no product of them has a mean."""
        (fresh1, behind1), (fresh2, behind2) = (self.independent[id(v)] for v in (one, two))
        if not (fresh1 and not fresh1 & behind2) and not (fresh2 and not fresh2 & behind1):
            raise self._refuse(
                op, "a sum of branches that depend on each other", "End one branch with a weight layer of its own."
            )

    def _times(self, op: Op, value: Layer | Curve, factor: float) -> Curve:
        if isinstance(value, Layer):
            return Curve(value, None, self._where(op), factor)
        return Curve(value.source, value.function, self._where(op), factor * value.factor, root=value.root or value)


def as_function(value: Layer | Curve) -> Function:
    """A value as a function of its source."""
    if isinstance(value, Layer):
        return lambda z: z
    function, factor = value.function or (lambda z: z), value.factor
    return function if factor == 1 else lambda z: factor * function(z)


def has_flat(layer: Layer) -> bool:
    """Whether its channels are those of positions, each with a kernel of its own."""
    if isinstance(layer, Flat):
        return layer.source.size != (1, 1) or has_flat(layer.source)
    return isinstance(layer, (Sum, Norm, Pointwise)) and any(has_flat(source) for source in sources(layer))
