"""The state of reading a tape: values so far, the layers that compute them, and which of them are correlated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from ntkit.base.checks import Refused, refusal
from ntkit.kernels.infinite.activations import Activation, Function, Rectifier, times_slope
from ntkit.kernels.infinite.layers import (
    Affine,
    Concat,
    Flatten,
    GlobalPool,
    Graph,
    Input,
    Layer,
    Mixture,
    Norm,
    Pointwise,
    Pool,
    PositionMap,
    Product,
    Sum,
    sources,
)
from ntkit.kernels.infinite.piecewise import piecewise
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.recognition import closed_form
from ntkit.kernels.infinite.tape import Op, Ref, Tape
from ntkit.kernels.infinite.tape_calls import grid

Token = int | tuple[int, frozenset[int]]  # the weights of a layer, or those of some of its channels


@dataclass
class Weight:
    """A parameter times a number."""

    parameter: nn.Parameter
    factor: float
    name: str


@dataclass
class DerivedWeight:
    """Any other function of parameters: a layer that uses it has no known distribution."""

    name: str


@dataclass
class Curve:
    """An elementwise function of one value of the network."""

    source: Layer
    function: Function | None  # None: the identity
    name: str
    factor: float = 1.0  # by which it is multiplied
    layer: Layer | None = None  # once another layer uses it
    root: Curve | None = None  # the same without its factor

    def __call__(self, z: Any) -> Any:
        """Evaluate it at values of its source."""
        out = z if self.function is None else self.function(z)
        return out if self.factor == 1 else self.factor * out


class Reader:
    """Values by their index on the tape, the layers that compute them, and how these depend on weights."""

    def __init__(self, model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> None:
        self.tape, self.stds = tape, None if w_std is None else (w_std, b_std)
        self.kinds = {name: type(m).__name__ for name, m in model.named_modules()}
        # by index: None for data, else a Weight, DerivedWeight, Layer or Curve
        self.values: dict[int, Any] = {0: None}
        self.graph = Graph()
        self._uses: dict[int, str] = {}  # by parameter, the layer that uses it
        self._inputs: dict[tuple[int, int, int | None], Input] = {}  # by index, first channel and number of channels
        # by layer: the weights in which it is linear, and all weights on which it depends
        self._weights: dict[int, tuple[set[Token], set[Token]]] = {}
        # by value and channels, with the value
        self.parts: dict[tuple[int, tuple[int, ...]], tuple[Any, Any]] = {}
        self._after_trained_norm: set[int] = set()  # norms with a trained weight, and linear maps of their outputs
        self.gaussian: set[int] = set()  # layers whose channels are independent draws of one Gaussian field

    def where(self, op: Op) -> str:
        """Name the layer of a call, for an error message."""
        return f"layer '{op.layer}' ({self.kinds[op.layer]})" if op.layer else f"{op.name} in the model's forward"

    def refusal(self, op: Op, got: str, fix: str) -> Refused:
        """Build the refusal of a call."""
        return refusal(self.where(op), got=got, expected="an operation whose infinite-width limit is known", fix=fix)

    def value(self, argument: Any) -> Any:
        """The value of an argument: of an earlier call, or a constant."""
        return self.values[argument.index] if isinstance(argument, Ref) else argument

    def layer(self, value: Any) -> Layer:
        """A value as a layer; a curve becomes an activation when another layer uses it."""
        if isinstance(value, Layer):
            return value
        assert isinstance(value, Curve)
        if value.layer is None:
            source = self.layer(value.root) if value.root else value.source
            if value.factor != 1 or value.function is None:
                terms = source.terms if isinstance(source, Sum) else [(1.0, source)]
                terms = [(value.factor * f, t) for f, t in terms]
                value.layer = self.add(Sum(source.size, value.name, terms), [source])
            else:
                value.layer = self._activation(value, value.function)
        return value.layer

    def _activation(self, value: Curve, function: Function) -> Layer:
        activation, source = closed_form(function), value.source
        if isinstance(activation, Rectifier) and activation.even == 0:  # the identity, such as dropout in eval mode
            if activation.slope == 1:
                return source
            return self.add(Sum(source.size, value.name, [(activation.slope, source)]), [source])
        # Each position has its own variance. Flattening after the activation gives the same values.
        grid_source = source.source if isinstance(source, Flatten) else source
        if isinstance(grid_source, Concat):  # channels of several kinds, each with its own kernel
            parts = [(share, self._activation(replace(value, source=p), function)) for share, p in grid_source.parts]
            layer = self.add(Concat(grid_source.size, value.name, parts), [part for _, part in parts])
            return layer if grid_source is source else self.add(Flatten((1, 1), value.name, layer), [layer])
        if id(grid_source) not in self.gaussian:
            got = "values that are not Gaussian (after an activation, or a sum with one or with flattened positions)"
            expected = "the outputs of weight layers, their sums, pools and norms"
            fix = "Put a weight layer before the activation, or the activation before nn.Flatten."
            raise refusal(value.name, got=got, expected=expected, fix=fix)
        weighted = self._weighted(value.name, function, grid_source)
        activation = activation or piecewise(function) or Tabulated(function, value.name)
        layer = self.add(Pointwise(grid_source.size, value.name, grid_source, activation, weighted), [grid_source])
        return layer if grid_source is source else self.add(Flatten((1, 1), value.name, layer), [layer])

    def _weighted(self, name: str, function: Function, source: Layer) -> Activation | None:
        """For an activation directly after a norm with a trained weight, the activation z s'(z)."""
        if id(source) not in self._after_trained_norm:
            return None
        if not isinstance(source, Norm) or id(source.source) in self._after_trained_norm:
            got = "a sum, pool or norm of the output of a norm with a trained weight"
            fix = "Create the norm without affine weights, or freeze its weight."
            raise refusal(name, got=got, expected="the activation directly after such a norm", fix=fix)
        function = times_slope(function)
        return closed_form(function) or piecewise(function) or Tabulated(function, name)

    def add(self, layer: Layer, of: list[Layer], own: Token | None = None, gaussian: bool = True) -> Layer:
        """Append a layer, with the weights in which it is linear (`own`, or those of its sources) and all it uses.

        gaussian : whether a weight layer's channels are independent draws of one Gaussian field.
        """
        linear_in: set[Token] = set()
        uses: set[Token] = set()
        for source in of:
            uses |= self._weights[id(source)][1]
        if all(self._weights[id(source)][0] for source in of):  # not weights in which only one source is linear
            linear_in = set().union(*(self._weights[id(source)][0] for source in of))
        if own is not None:
            linear_in, uses = {own}, uses | {own}
        elif isinstance(layer, Pointwise):
            linear_in = set()
        elif isinstance(layer, Product):  # in the weights of one factor that the other does not use
            (linear1, uses1), (linear2, uses2) = (self._weights[id(source)] for source in of)
            linear_in = (
                linear1 if linear1 and not meet(linear1, uses2) else {t for t in linear2 if not meet({t}, uses1)}
            )
        self._weights[id(layer)] = (linear_in, uses)
        linear = isinstance(layer, (Sum, Pool, GlobalPool, PositionMap, Mixture, Norm)) and all(
            id(s) in self.gaussian for s in of
        )
        if (own is not None and gaussian) or linear:
            self.gaussian.add(id(layer))
        if (linear and any(id(s) in self._after_trained_norm for s in of)) or (
            isinstance(layer, Norm) and layer.weight_ntk
        ):
            self._after_trained_norm.add(id(layer))
        self.graph.layers.append(layer)
        return layer

    def input(self, index: int, op: Op, channels: int | None = None, first: int = 0) -> Input:
        """The input, or a function of it, or some of its channels, where a weight layer uses it."""
        key = index, first, channels
        if key not in self._inputs:
            out = self.tape.ops[index].out
            if not out.is_floating_point():
                raise self.refusal(op, f"{out.dtype} input", "Encode it in real numbers outside the model.")
            size = grid(out.shape[2:])
            if size is None or out.dim() < 2 or out.shape[0] != 3:
                got = f"a value of shape {tuple(out.shape)}"
                raise self.refusal(op, got, "Pass [n, d], [n, C, L] or [n, C, H, W].")
            layer = Input(
                size, self.where(self.tape.ops[index]) if index else "", index, channels or out.shape[1], first, index
            )
            self._inputs[key] = layer
            self.add(layer, [])
        return self._inputs[key]

    def use(self, op: Op, *weights: Weight | None) -> None:
        """Note that a layer uses weights, and refuse a second use."""
        for w in weights:
            if w is None:
                continue
            if id(w.parameter) in self._uses:
                got = f"the parameter '{w.name}' a second time, after {self._uses[id(w.parameter)]}"
                raise self.refusal(op, got, "Give each layer weights of its own.")
            self._uses[id(w.parameter)] = self.where(op)

    def check_batched(self, op: Op, axes: int) -> None:
        """Refuse a value with one axis too few: torch would take its samples for channels."""
        if op.out.dim() != axes + 2:
            got = f"a value of shape {tuple(op.out.shape)}, whose first axis it takes for channels"
            raise self.refusal(op, got, f"Pass [n, channels] followed by {axes} axes of positions.")

    def check_independent(self, op: Op, one: Layer, two: Layer) -> None:
        """One of two factors must be Gaussian given the other, with a covariance that is the same for all channels."""
        for a, b in ((one, two), (two, one)):
            linear, uses = self._weights[id(a)][0], self._weights[id(b)][1]
            if id(a.source if isinstance(a, Flatten) else a) in self.gaussian and linear and not meet(linear, uses):
                return
        got = "a product of branches that depend on each other, or of none that is directly behind a weight layer"
        raise self.refusal(op, got, "End one branch with a weight layer of its own that mixes channels.")

    def check_uncorrelated(self, op: Op, one: Layer, two: Layer) -> None:
        """One of the two must be linear in weights that the other does not use: then their product has mean 0."""
        (linear1, uses1), (linear2, uses2) = (self._weights[id(v)] for v in (one, two))
        if not (linear1 and not meet(linear1, uses2)) and not (linear2 and not meet(linear2, uses1)):
            fix = "End one branch with a weight layer of its own."
            raise self.refusal(op, "a sum of branches that depend on each other", fix)

    def scaled(self, op: Op, value: Layer | Curve, factor: float) -> Curve:
        """A value times a number."""
        if isinstance(value, Layer):
            return Curve(value, None, self.where(op), factor)
        return Curve(value.source, value.function, self.where(op), factor * value.factor, root=value.root or value)


def meet(one: set[Token], two: set[Token]) -> bool:
    """Whether some weights are in both."""
    if one & two:
        return True
    layers1, layers2 = ({t if isinstance(t, int) else t[0] for t in tokens} for tokens in (one, two))
    shared = layers1 & layers2
    return any(
        not isinstance(a, tuple) or not isinstance(b, tuple) or bool(a[1] & b[1])
        for layer in shared
        for a, b in product(*([t for t in s if layer in (t, t[0] if isinstance(t, tuple) else t)] for s in (one, two)))
    )


def has_several_kernels(layer: Layer) -> bool:
    """Whether its channels are those of several positions or branches, each with a kernel of its own."""
    if isinstance(layer, Concat) or (isinstance(layer, Flatten) and layer.source.size != (1, 1)):
        return True
    mixed = isinstance(layer, Affine) and not layer.grouped
    return not mixed and any(map(has_several_kernels, sources(layer)))
