"""Which axes of a layer's parameters are its inputs, which its outputs: what grows with a network's widths."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn

from ntkit.networks.parametrization import NORMS

CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DENSE = (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS, *TRANSPOSED, *RECURRENT, *CELLS)
WEIGHTED = (*DENSE, *EMBEDDINGS)


class Axes(NamedTuple):
    """Axes of one parameter.

    kinds : for each axis "in", "out" or "" (taps of a convolution, words, heads).
    summed : the axis over which the layer sums its inputs; None for biases, embeddings and norms.
    """

    kinds: tuple[str, ...]
    summed: int | None = None


def is_depthwise(layer: Any) -> bool:
    """Whether every channel has filters of its own."""
    return layer.groups == layer.in_channels > 1


def axes_of(layer: Any) -> dict[str, Axes]:
    """Axes of a layer's own parameters by name; empty for a layer that is not known here."""
    own = dict(layer.named_parameters(recurse=False))
    taps = ("",) * len(layer.kernel_size) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else ()
    if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        depthwise = taps and is_depthwise(layer)
        weight = Axes(("out", "", *taps)) if depthwise else Axes(("out", "in", *taps), 1)
        found = {"weight": weight, "bias": Axes(("out",))}
    elif isinstance(layer, TRANSPOSED):
        depthwise = is_depthwise(layer)
        weight = Axes(("in", "", *taps)) if depthwise else Axes(("in", "out", *taps), 0)
        found = {"weight": weight, "bias": Axes(("out",))}
    elif isinstance(layer, EMBEDDINGS):
        found = {"weight": Axes(("", "out"))}
    elif isinstance(layer, nn.MultiheadAttention):
        weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        found = {name: Axes(("in", "in"), 1) for name in weights}
        found |= {"in_proj_bias": Axes(("in",))}
        found |= {name: Axes(("", "", "in")) for name in ("bias_k", "bias_v")}
        found |= {"out_proj.weight": Axes(("in", "in"), 1), "out_proj.bias": Axes(("in",))}
        own |= {name: p for name, p in layer.named_parameters() if name.startswith("out_proj.")}
    elif isinstance(layer, (*RECURRENT, *CELLS)):
        found = {}
        for name in own:
            first = name in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
            weight = Axes(("out", "in" if first else "out"), 1)
            found[name] = weight if name.startswith("weight") else Axes(("out",))
    elif isinstance(layer, (*NORMS, nn.PReLU)):
        single = isinstance(layer, nn.PReLU) and layer.num_parameters == 1
        found = {name: Axes(("",) * p.dim() if single else ("in",) * p.dim()) for name, p in own.items()}
    else:
        return {}
    return {name: axes for name, axes in found.items() if name in own}


def features_axis(layer: Any) -> int:
    """Axis of the features in the layer's input."""
    channels = (*CONVOLUTIONS, *TRANSPOSED, nn.GroupNorm, nn.PReLU, nn.modules.batchnorm._NormBase)
    return 1 if isinstance(layer, channels) else -1


def inputs_of(layer: Any) -> int | None:
    """Number of features that the layer expects; None for words."""
    if isinstance(layer, EMBEDDINGS):
        return None
    for name in ("in_features", "in_channels", "embed_dim", "input_size", "num_channels", "num_features"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    if isinstance(layer, nn.PReLU):
        return int(layer.num_parameters)
    return int(layer.normalized_shape[-1])


def outputs_of(layer: Any) -> int | None:
    """Number of features that the layer computes; None where it keeps those of its input."""
    for name in ("out_features", "out_channels", "hidden_size", "embedding_dim"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return None


def set_sizes(layer: Any, inputs: Fraction, outputs: Fraction) -> None:
    """Multiply the numbers of features that the layer keeps as attributes."""
    grown = {
        "in_features": inputs, "in_channels": inputs, "embed_dim": inputs, "kdim": inputs, "vdim": inputs,
        "head_dim": inputs, "input_size": inputs, "num_channels": inputs, "num_features": inputs,
        "out_features": outputs, "out_channels": outputs, "hidden_size": outputs, "embedding_dim": outputs,
    }  # fmt: skip
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) and is_depthwise(layer):
        grown["groups"] = inputs
    if isinstance(layer, nn.GroupNorm) and layer.num_groups == layer.num_channels > 1:  # each channel by itself
        grown["num_groups"] = inputs
    for name, ratio in grown.items():
        if hasattr(layer, name):
            setattr(layer, name, int(getattr(layer, name) * ratio))
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        layer.num_parameters = int(layer.num_parameters * inputs)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        layer.normalized_shape = (int(layer.normalized_shape[-1] * inputs),)
    for name in ("running_mean", "running_var"):
        if inputs != 1 and getattr(layer, name, None) is not None:
            value = getattr(layer, name)
            setattr(layer, name, value[:1].repeat(int(len(value) * inputs)))
