"""A larger copy of a network that the user made: whether it is the same network, and which widths grew."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.networks.layer_axes import outputs_of
from ntkit.networks.paired_runs import copied

_FIX = "Build the same network, wider."


def check_copy(network: nn.Module, larger: nn.Module, example: Tensor) -> None:
    """Refuse a network of the user's that has other parameters, other layers or another output."""
    names, own = dict(larger.named_parameters()), dict(network.named_parameters())
    if list(names) != list(own):
        other = sorted(set(names) ^ set(own))
        got = f"other parameters ({', '.join(other[:3])})" if other else "parameters in another order"
        raise refusal("make", got=got, expected="the model's own, larger", fix=_FIX)
    with torch.no_grad():
        shapes = [tuple(copied(net).eval()(example).shape) for net in (network, larger)]
    if shapes[0] != shapes[1]:
        fix = "Let the hidden widths grow alone."
        raise refusal("make", got=f"outputs of shape {shapes[1]}", expected=f"{shapes[0]}", fix=fix)


def check_growth(network: nn.Module, larger: nn.Module, widths: dict[str, int]) -> None:
    """Refuse a copy in which no hidden width grows, and warn of those that do not.

    widths : of the network's hidden layers, by name.
    """
    still = []
    for name, width in widths.items():
        one, two = network.get_submodule(name), larger.get_submodule(name)
        if type(one) is not type(two):
            got, expected = f"{type(two).__name__} as layer '{name}'", type(one).__name__
            raise refusal("make", got=got, expected=expected, fix=_FIX)
        if outputs_of(two) == width:
            still.append(next((f"{name}.{what}".lstrip(".") for what, _ in one.named_parameters()), name))
    listed = ", ".join(f"'{name}'" for name in still[:5]) + (", ..." if len(still) > 5 else "")
    if len(still) == len(widths):
        fix = "Multiply every hidden width by the factor."
        raise refusal("make", got=f"hidden widths as before ({listed})", expected="larger ones", fix=fix)
    if still:
        warnings.warn(
            f"make: the outputs of {listed} do not grow with the factor. Their width stays finite in the sampled "
            "limit; multiply it by the factor, too, unless it stands for something else (experts, heads, classes).",
            stacklevel=2,
        )
