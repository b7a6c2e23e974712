"""The layers of a limit: what a tape is read as. A grid has two axes: vectors are 1 x 1, sequences 1 x length."""

from __future__ import annotations

from dataclasses import dataclass, field

from ntkit.kernels.infinite.activations import Activation

Size = tuple[int, int]


@dataclass
class Layer:
    """A value of the network: channels (their number tends to infinity) at the positions of a grid."""

    size: Size
    name: str  # of the module that made it


@dataclass
class Source(Layer):
    """What the network makes of its input before any weight: its numbers at a place on the tape."""

    place: int
    channels: int


@dataclass
class Weights(Layer):
    """z = W a + b, W and b drawn independently; a convolution if it has a kernel, one position to one if not.

    weight, bias : variance they bring, fan_in Var W and Var b. weight_gain, bias_gain : what their gradients bring.
    """

    source: Layer
    taps: Size
    stride: Size
    before: Size  # zeros padded in front; those behind follow from the size
    dilation: Size
    weight: float
    bias: float
    weight_gain: float
    bias_gain: float
    read: str = ""  # how the variances were found


@dataclass
class Pointwise(Layer):
    """An activation.

    weighted : that of z s'(z), for the trained weight of a norm right in front: what a unit gets from it is in
        proportion to the unit's own value, so that it meets the slope s' of that very value.
    """

    source: Layer
    activation: Activation
    weighted: Activation | None = None


@dataclass
class Sum(Layer):
    """A sum of values none of which says anything about another, with factors."""

    terms: list[tuple[float, Layer]]


@dataclass
class Pool(Layer):
    """Averages over windows."""

    source: Layer
    taps: Size
    stride: Size
    before: Size
    divisor: float


@dataclass
class Everywhere(Layer):
    """The average over all positions."""

    source: Layer


@dataclass
class Flat(Layer):
    """All positions as features: the layer behind has weights of its own for each."""

    source: Layer


@dataclass
class Norm(Layer):
    """Divided by the root mean square over channels and positions, then an affine map of each channel.

    scale : square of its weight, the same for all channels; its bias is 0.
    scale_gain, shift_gain : 1 where weight and bias are trained.
    by_position : its weights belong to a position each.
    """

    source: Layer
    eps: float
    scale: float
    scale_gain: float
    shift_gain: float
    by_position: bool


@dataclass
class Graph:
    """Layers in the order of the run."""

    layers: list[Layer] = field(default_factory=list)
    output: int = -1
    last_place: int = 0  # on the tape, of a source: the run of a batch can stop there


def sources(layer: Layer) -> list[Layer]:
    """The layers it takes in."""
    if isinstance(layer, Source):
        return []
    return [t for _, t in layer.terms] if isinstance(layer, Sum) else [layer.source]  # pyrefly: ignore
