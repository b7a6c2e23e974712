"""The layers of a limit, as read from a tape. A grid has two axes: vectors are 1 x 1, sequences 1 x length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ntkit.kernels.infinite.activations import Activation

Size = tuple[int, int]


@dataclass
class Layer:
    """A value of the network: channels, whose number tends to infinity, at the positions of a grid."""

    size: Size
    name: str  # of the module that computes it


@dataclass
class Input(Layer):
    """What the network computes from its input before any weight: the output of one call on the tape.

    key : of its values among those of all inputs.
    as_images : the call's output as [n, channels, positions ...], where it is something else.
    as_given : its values are not divided by the root of the number of channels.
    """

    index: int
    channels: int
    first: int = 0  # of the call's channels, where it is some of them only
    key: int = 0
    as_images: Callable[[Tensor], Tensor] | None = None
    as_given: bool = False

    def values(self, out: Tensor) -> Tensor:
        """[H, W, n, channels] of the call's output."""
        t = out if self.as_images is None else self.as_images(out)
        return t.reshape(*t.shape[:2], *(1,) * (4 - t.dim()), *t.shape[2:]).permute(2, 3, 0, 1)


@dataclass
class Affine(Layer):
    """z = W a + b with independent random W and b: a convolution, or a dense layer on a 1 x 1 grid.

    weight_var, bias_var : variance that they contribute, fan_in Var W and Var b.
    weight_ntk, bias_ntk : what their gradients contribute to the tangent kernel.
    """

    source: Layer
    kernel_size: Size
    stride: Size
    padding: Size  # zeros in front; the number of zeros behind follows from the size
    dilation: Size
    weight_var: float
    bias_var: float
    weight_ntk: float
    bias_ntk: float
    initialization: str = ""  # how the variances are known
    grouped: bool = False  # each group of outputs sees channels of its own


@dataclass
class Pointwise(Layer):
    """An activation function, applied to each number.

    weighted : the activation z s'(z), needed directly after a norm with a trained weight: a unit receives from that
        weight a term proportional to its own value, which is multiplied by the slope s' at the same value.
    """

    source: Layer
    activation: Activation
    weighted: Activation | None = None


@dataclass
class Sum(Layer):
    """A sum of uncorrelated values, with factors."""

    terms: list[tuple[float, Layer]]


@dataclass
class Pool(Layer):
    """Averages over windows."""

    source: Layer
    kernel_size: Size
    stride: Size
    padding: Size
    divisor: float


@dataclass
class GlobalPool(Layer):
    """The average over all positions."""

    source: Layer


@dataclass
class PositionMap(Layer):
    """Sums over positions, the same for all channels: slices, flips, padding of any mode, resizing, uneven pools.

    maps : matrices [positions, positions of the source] along height and width: out = rows @ in @ columns^T.
    exchanged : height and width of the result are exchanged.
    by_offset : for an axis and an offset of the result, the offsets of the source with their matrices, once computed.
    """

    source: Layer
    maps: tuple[Tensor, Tensor]
    exchanged: bool = False
    by_offset: dict[tuple[int, int], list[tuple[int, Tensor]]] = field(default_factory=dict)


@dataclass
class Mixture(Layer):
    """Sums over all positions with weights of each sample's own: attention whose scores do not stay random.

    scores : the scores are the sum of these covariances between the positions of a sample, times factors.
    given : values of the input on which the weights depend.
    score_grid : numbers of positions of the scores' two sides.
    weights : scores [n, P, Q], values of `given` -> weights [n, positions, positions of the source].
    """

    source: Layer
    scores: list[tuple[float, Layer]]
    given: list[Input]
    score_grid: Size
    weights: Callable[[Tensor, list[Tensor]], Tensor]


@dataclass
class Concat(Layer):
    """Channels of several branches side by side, each with its share of the channels."""

    parts: list[tuple[float, Layer]]


@dataclass
class Channels(Layer):
    """Some channels of a weight layer: independent of its others, with the same kernel.

    indices : which, in their order, of `count`.
    """

    source: Layer
    indices: tuple[int, ...]
    count: int


@dataclass
class Product(Layer):
    """The product of two branches that do not depend on each other."""

    one: Layer
    two: Layer


@dataclass
class Dropout(Layer):
    """Values that are zero at random, and else larger by 1 / (1 - rate): masks of different samples are independent.

    scale : of the square of a value, 1 / (1 - rate).
    whole : whether it drops whole channels: one mask for all positions of a sample.
    """

    source: Layer
    scale: float
    whole: bool


@dataclass
class Flatten(Layer):
    """All positions as features: the next layer has separate weights for each."""

    source: Layer


@dataclass
class Norm(Layer):
    """Division by the root mean square over channels and positions, then an affine map of each channel.

    alone : each position is divided by the root mean square over its own channels.
    weight_sq : square of its weight, the same for all channels; its bias is 0.
    weight_ntk, bias_ntk : 1 where weight and bias are trained.
    per_position : each position has a weight of its own.
    """

    source: Layer
    eps: float
    weight_sq: float
    weight_ntk: float
    bias_ntk: float
    per_position: bool
    alone: bool = False


@dataclass
class Graph:
    """Layers in the order of the run."""

    layers: list[Layer] = field(default_factory=list)
    output: int = -1
    last_index: int = 0  # of an input layer on the tape: the run of a batch can stop there


def sources(layer: Layer) -> list[Layer]:
    """The layers it depends on directly."""
    if isinstance(layer, Input):
        return []
    if isinstance(layer, Product):
        return [layer.one, layer.two]
    if isinstance(layer, (Sum, Concat)):
        return [t for _, t in (layer.terms if isinstance(layer, Sum) else layer.parts)]
    return [layer.source]  # pyrefly: ignore
