"""What the layers need of the samples on one side, computed from the first layer to the last."""

from __future__ import annotations

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.kernels.infinite.layers import Graph, Layer, Norm, Pointwise
from ntkit.kernels.infinite.planes import Planes
from ntkit.kernels.infinite.sample_sides import Side, State


def prepare(graph: Graph, data: dict[int, Tensor], plane_elements: int) -> Side:
    """Compute what the layers need of a side: variances, from the first layer to the last."""
    side = Side(data)
    planes = Planes(graph, side, side, True, True, tangent=False, plane_elements=plane_elements, cache_all=True)
    for layer in graph.layers:
        if isinstance(layer, Pointwise):
            v = planes(layer.source)[0][..., 0]
            check_range(layer, v)
            for key, activation in ((id(layer), layer.activation), (-id(layer), layer.weighted)):
                if activation is not None:
                    side.states[key], side.diagonal[key] = activation.state(v), activation.diagonal(v)
                    check_moments(layer, side.diagonal[key], v)
        elif isinstance(layer, Norm):
            v = planes(layer.source)[0][..., 0]
            side.states[id(layer)] = (((v if layer.alone else v.mean((0, 1), keepdim=True)) + layer.eps).rsqrt(),)
    return side


def check_moments(layer: Layer, moments: State, v: Tensor) -> None:
    """Refuse moments that overflow."""
    if not all(t.isfinite().all() for t in moments):
        got = f"moments that overflow at standard deviations up to {float(v.max()) ** 0.5:.2g}"
        fix = "Scale the data or the weights down."
        raise refusal(layer.name, got=got, expected="an activation with finite moments", fix=fix)


def check_range(layer: Layer, v: Tensor) -> None:
    """Refuse variances whose products would overflow or underflow."""
    info = torch.finfo(v.dtype)
    largest = v.amax((0, 1))
    if not bool((largest < info.max**0.5 / 4).all()) or bool(((largest > 0) & (largest < 10 * info.tiny**0.5)).any()):
        got = f"variances from {float(largest.min()):.0e} to {float(largest.max()):.0e} in {v.dtype}"
        expected = "values whose fourth powers the dtype can represent"
        raise refusal(layer.name, got=got, expected=expected, fix="Scale the data, or pass it in float64.")
