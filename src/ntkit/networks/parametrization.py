"""The NTK parametrization of a module: the same function, with gradients that have an infinite-width limit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ntkit.base.checks import refusal
from ntkit.networks.initialization import initial_std

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LEFT = (*NORMS, nn.PReLU)  # their parameters have no fan in


class Scaled(nn.Module):
    """value = factor * original: a weight with factor w_std / √fan_in, or a bias with factor b_std.

    The factor is a buffer, so that it is saved and loaded with the original; it stays in float64 on the CPU, whatever
    the module around it is converted to.
    """

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float64))

    def forward(self, original: Tensor) -> Tensor:
        """Give the value the layer uses."""
        return self.factor * original

    def right_inverse(self, value: Tensor) -> Tensor:
        """Give the original behind a value."""
        return value / self.factor

    def extra_repr(self) -> str:
        """Show the factor in ``print(model)``."""
        return f"factor={float(self.factor):.6g}"

    def _apply(self, fn: Any, recurse: bool = True) -> Scaled:
        return self


def to_ntk_parametrization(model: nn.Module, w_std: float | None = None, b_std: float | None = None) -> nn.Module:
    """Copy a module so that it computes the same function with weights in the NTK parametrization.

    Every dense and convolution layer becomes ``z = w_std / √fan_in * W a + b_std * b``, its parameters W and b
    (``layer.parametrizations.weight.original``): gradients, gradient descent and tangent kernels are those of this
    parametrization. With standard normal W and b the kernel tends to `ntkit.InfiniteKernel` as the widths grow.

    Parameters
    ----------
    model : any module whose parameters are those of ``Linear``, ``Conv1d``, ``Conv2d`` (fan_in: channels of a group x
        kernel size), norms and ``PReLU``; the last two kinds are left as they are.
    w_std : of every weight layer. None: each layer's own, √fan_in times the `initial_std` of its
        weight, so that the entries of W have variance 1.
    b_std : of every bias. None: each bias's own; one that is zero then has b_std = 0, so it stays zero and is no longer
        trained (``requires_grad`` off). Given, a bias of zeros stays zero until it is trained.

    Returns
    -------
    nn.Module
        A copy with the same mode, dtype and device; weights that were one tensor still are.

    Raises
    ------
    Refused
        By the layer's name: another kind of layer with parameters, a layer parametrized already, tied weights of
        different fan in or std, weights that are all zero or all one constant, a std that is not positive.

    Notes
    -----
    Jacot, Gabriel, Hongler 2018, section 2 (w_std = 1, b_std = beta). The function agrees to rounding. `TangentKernel`
    differentiates through the factors of the copy, which forms gradients of weights; `finite_kernel` gives
    the same kernel without.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 3)
    >>> ntk = to_ntk_parametrization(model, w_std=1.0, b_std=0.1)
    >>> torch.equal(ntk.parametrizations.weight.original, 2 * model.weight)
    True
    >>> stds(ntk)
    (1.0, 0.1)
    """
    for name, value in (("w_std", w_std), ("b_std", b_std)):
        if value is not None and not 0 < value < float("inf"):
            fix = "Give a standard deviation, or None for the module's own initialization."
            raise refusal(name, got=repr(value), expected="a positive number, or None", fix=fix)
    _check_kinds(model)
    made = copy.deepcopy(model)
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, LAYERS)}
    chosen = {name: _factors(name, layer, w_std, b_std) for name, layer in layers.items()}
    seen: dict[int, tuple[str, float]] = {}  # tensor -> the first layer that has it, its factor
    steps = []
    for name, factors in chosen.items():
        for what, factor in factors.items():
            own, tensor = f"{name}.{what}", getattr(layers[name], what)
            first, known = seen.setdefault(id(tensor), (own, factor))
            if known != factor:
                raise refusal(
                    f"layer '{name}' ({type(layers[name]).__name__})",
                    got=f"{what} tied to {first}, with factor {factor:.6g} against {known:.6g}",
                    expected="tied weights of layers with the same fan in and std",
                    fix="Untie them, or give w_std and b_std where only the initialization tells them apart.",
                )
            steps.append((layers[name], what, factor, first != own))
    for layer, what, factor, tied in steps:
        if factor:
            _scale(layer, what, factor, tied)
        else:
            getattr(layer, what).requires_grad_(False)
    return made


def stds(layer: Any) -> tuple[float | None, float | None]:
    """Give w_std and b_std of a layer in the NTK parametrization; None for what is not in it (or not there).

    >>> stds(nn.Linear(2, 2))
    (None, None)
    """
    weight, bias = (factor_of(layer, what) for what in ("weight", "bias"))
    frozen = weight is not None and isinstance(layer.bias, nn.Parameter) and not layer.bias.requires_grad
    return (
        None if weight is None else weight * fan_in(layer) ** 0.5,
        0.0 if frozen and not layer.bias.any() else bias,
    )


def factor_of(layer: Any, what: str) -> float | None:
    """Factor of a layer's "weight" or "bias", None where it is not in the NTK parametrization."""
    if not parametrize.is_parametrized(layer, what):
        return None
    steps = list(layer.parametrizations[what])
    return float(steps[0].factor) if len(steps) == 1 and isinstance(steps[0], Scaled) else None


def fan_in(layer: Any) -> int:
    """Inputs of one output: channels of its group times kernel size.

    >>> fan_in(nn.Conv2d(4, 8, 3, groups=2))
    18
    """
    return layer.weight[0].numel()


def fan_out(layer: Any) -> int:
    """Outputs of one input, as torch counts them: output channels times kernel size."""
    return layer.weight.shape[0] * layer.weight[0, 0].numel()


def in_ntk_parametrization(model: nn.Module) -> bool:
    """Whether any layer is."""
    return any(factor_of(layer, "weight") is not None for layer in model.modules())


def plain(model: nn.Module) -> nn.Module:
    """Copy a module in the NTK parametrization back into an ordinary one that computes the same function.

    >>> model = to_ntk_parametrization(nn.Linear(2, 2))
    >>> isinstance(plain(model).weight, nn.Parameter)
    True
    """
    made = copy.deepcopy(model)
    restored: dict[int, nn.Parameter] = {}  # by the original's identity: tied weights stay tied
    layers: list[Any] = list(made.modules())
    for layer in layers:
        found = [what for what in ("weight", "bias") if factor_of(layer, what) is not None]
        if not found or set(found) != set(layer.parametrizations):
            continue
        values = {}
        for what in found:
            original = layer.parametrizations[what].original
            value = nn.Parameter(getattr(layer, what).detach().clone(), original.requires_grad)
            values[what] = restored.setdefault(id(original), value)
        # by hand: torch's remove_parametrizations takes the properties from all copies, which share their class
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        for what, value in values.items():
            setattr(layer, what, value)
    return made


def _scale(layer: Any, what: str, factor: float, tied: bool) -> None:
    """Write a parameter as factor x original, in place; a tied one has become its original with the first layer."""
    original = getattr(layer, what)
    if tied:
        setattr(layer, what, nn.Parameter(original.detach().clone(), original.requires_grad))
    parametrize.register_parametrization(layer, what, Scaled(factor))
    if tied:
        layer.parametrizations[what].original = original


def _check_kinds(model: nn.Module) -> None:
    """Refuse modules whose own parameters this parametrization does not reach."""
    for name, layer in model.named_modules():
        where = f"layer '{name}' ({type(layer).__name__})"
        if parametrize.is_parametrized(layer):
            fix = "Remove it with torch.nn.utils.parametrize.remove_parametrizations."
            raise refusal(where, got="a layer that is parametrized already", expected="ordinary weights", fix=fix)
        own = [what for what, p in layer.named_parameters(recurse=False) if p is not None]
        if own and not isinstance(layer, (*LAYERS, *_LEFT)):
            raise refusal(
                where,
                got=f"parameters of its own ({', '.join(own)})",
                expected="parameters in Linear, Conv1d, Conv2d, norms and PReLU only",
                fix="Write the layer with these; others have no NTK parametrization here.",
            )


def _factors(name: str, layer: Any, w_std: float | None, b_std: float | None) -> dict[str, float]:
    """What the originals of a layer are multiplied by."""
    i, o, where = fan_in(layer), fan_out(layer), f"layer '{name}' ({type(layer).__name__})"
    weight = initial_std(layer.weight, i, o, f"{where}, weight").std if w_std is None else w_std / i**0.5
    if weight == 0:
        expected, fix = "weights drawn at random, which say what w_std is", "Give w_std, or draw them at random."
        raise refusal(where, got="weights that are all zero", expected=expected, fix=fix)
    found = {"weight": weight}
    if layer.bias is not None:
        found["bias"] = initial_std(layer.bias, i, o, f"{where}, bias").std if b_std is None else b_std
    return found
