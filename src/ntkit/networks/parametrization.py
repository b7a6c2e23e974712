"""The NTK parametrization of a module: the same function, with gradients that have an infinite-width limit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_number
from ntkit.jacobian.model_calls import check_module
from ntkit.networks.initialization import initial_std

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Scaled(nn.Module):
    """value = factor * original: a weight with factor w_std / √fan_in, or a bias with factor b_std.

    The factor is a buffer, so that it is saved and loaded with the original. It stays in float64 on the CPU when the
    module is converted.
    """

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float64))

    def forward(self, original: Tensor) -> Tensor:
        """Value that the layer uses."""
        return self.factor * original

    def right_inverse(self, value: Tensor) -> Tensor:
        """Original that belongs to a value."""
        return value / self.factor

    def extra_repr(self) -> str:
        """Show the factor in ``print(model)``."""
        return f"factor={float(self.factor):.6g}"

    def _apply(self, fn: Any, recurse: bool = True) -> Scaled:
        return self


@own_context()
def to_ntk_parametrization(model: nn.Module, w_std: float | None = None, b_std: float | None = None) -> nn.Module:
    """Copy of a module that computes the same function with weights in the NTK parametrization.

    Every dense and convolution layer becomes ``z = w_std / √fan_in * W a + b_std * b``, its parameters W and b
    (``layer.parametrizations.weight.original``): gradients, gradient descent and tangent kernels are those of this
    parametrization. With standard normal W and b the kernel tends to `ntkit.InfiniteKernel` as the widths grow. W and b
    are the module's own weights over the factors, whatever `w_std` and `b_std` say, and not standard normal: draw them
    (below), or leave that to `ntkit.monte_carlo` and `ntkit.convergence`.

    Parameters
    ----------
    model : any module whose parameters are those of ``Linear``, ``Conv1d``, ``Conv2d`` (fan_in: channels of a group x
        kernel size), norms and ``PReLU``; the last two kinds do not change.
    w_std : of every weight layer. None: for each layer √fan_in times the `initial_std` of its weight, so that the
        entries of W have variance 1.
    b_std : of every bias. None: for each bias its `initial_std`; a bias of zeros then has b_std = 0, stays zero and is
        not trained (``requires_grad`` off). With a number, a bias of zeros is zero until it is trained.

    Returns
    -------
    nn.Module
        A copy with the same mode, dtype and device; tied weights stay tied.

    Raises
    ------
    Refused
        With the layer's name, for another kind of layer with parameters (also of a class of its own that has more than
        weight and bias), a layer that is parametrized already, tied weights of different fan in or std, weights that
        are all zero or all one constant, a std that is not positive.

    Notes
    -----
    Jacot, Gabriel, Hongler 2018, section 2 (w_std = 1, b_std = beta). The function agrees to rounding. `TangentKernel`
    differentiates through the factors of the copy and forms gradients of weights; `finite_kernel` computes the same
    kernel without them.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 3)
    >>> ntk = to_ntk_parametrization(model, w_std=1.0, b_std=0.1)
    >>> torch.equal(ntk.parametrizations.weight.original, 2 * model.weight)
    True
    >>> stds(ntk)
    (1.0, 0.1)

    A random network with these stds, whose kernel is near the limit where it is wide:

    >>> for p in ntk.parameters():
    ...     _ = torch.nn.init.normal_(p)
    """
    check_module(model)
    fix = "Pass a standard deviation, or None for the module's own initialization."
    w_std, b_std = (
        None if std is None else as_number(std, name, lambda s: 0 < s < float("inf"), "a positive number, or None", fix)
        for name, std in (("w_std", w_std), ("b_std", b_std))
    )
    _check_kinds(model)
    ntk = copy.deepcopy(model)
    owners: dict[int, tuple[str, float]] = {}  # tensor -> the first layer that has it, its factor
    changes = []
    for name, layer in ntk.named_modules():
        factors = _factors(name, layer, w_std, b_std) if isinstance(layer, LAYERS) else {}
        for what, factor in factors.items():
            own = f"{name}.{what}"
            first, first_factor = owners.setdefault(id(getattr(layer, what)), (own, factor))
            if first_factor != factor:
                got = f"{what} tied to {first}, with factor {factor:.6g} instead of {first_factor:.6g}"
                expected = "tied weights of layers with the same fan in and std"
                fix = "Untie them, or pass w_std and b_std if only the initialization differs."
                raise refusal(f"layer '{name}' ({type(layer).__name__})", got=got, expected=expected, fix=fix)
            changes.append((layer, what, factor, first != own))
    for layer, what, factor, tied in changes:
        if factor:
            _scale(layer, what, factor, tied)
        else:
            getattr(layer, what).requires_grad_(False)
    return ntk


def odd_weights(layer: Any) -> str | None:
    """What a dense or convolution layer has in place of, or beside, a weight and a bias of its own; None: nothing."""
    if more := {what for what, _ in layer.named_parameters(recurse=False)} - {"weight", "bias"}:
        return f"parameters of its own ({', '.join(sorted(more))})"
    for what in ("weight", "bias"):
        value = getattr(layer, what)
        if value is not None and not isinstance(value, nn.Parameter) and factor_of(layer, what) is None:
            return f"a {what} that is computed from other tensors"
    return None


def stds(layer: Any) -> tuple[float | None, float | None]:
    """w_std and b_std of a layer in the NTK parametrization; None for a tensor that is not in it (or absent).

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
    """Factor of a layer's "weight" or "bias"; None if it is not in the NTK parametrization."""
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
    """Whether any layer is in the NTK parametrization."""
    return any(factor_of(layer, "weight") is not None for layer in model.modules())


def plain(model: nn.Module) -> nn.Module:
    """Ordinary copy of a module in the NTK parametrization; it computes the same function.

    >>> model = to_ntk_parametrization(nn.Linear(2, 2))
    >>> isinstance(plain(model).weight, nn.Parameter)
    True
    """
    ordinary = copy.deepcopy(model)
    parameters: dict[int, nn.Parameter] = {}  # by the original's identity: tied weights stay tied
    layers: list[Any] = list(ordinary.modules())
    for layer in layers:
        names = [what for what in ("weight", "bias") if factor_of(layer, what) is not None]
        if not names or set(names) != set(layer.parametrizations):
            continue
        values = {}
        for what in names:
            original = layer.parametrizations[what].original
            value = nn.Parameter(getattr(layer, what).detach().clone(), original.requires_grad)
            values[what] = parameters.setdefault(id(original), value)
        # torch's remove_parametrizations would remove the properties from all copies, which share a class
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        for what, value in values.items():
            setattr(layer, what, value)
    return ordinary


def _scale(layer: Any, what: str, factor: float, tied: bool) -> None:
    """Replace a parameter by factor x original, in place; of a tied one the first layer has created the original."""
    original = getattr(layer, what)
    if tied:
        setattr(layer, what, nn.Parameter(original.detach().clone(), original.requires_grad))
    parametrize.register_parametrization(layer, what, Scaled(factor))
    if tied:
        layer.parametrizations[what].original = original


def _check_kinds(model: nn.Module) -> None:
    """Refuse modules with parameters that this parametrization does not cover."""
    for name, layer in model.named_modules():
        where = f"layer '{name}' ({type(layer).__name__})"
        if parametrize.is_parametrized(layer):
            fix = "Remove it with torch.nn.utils.parametrize.remove_parametrizations."
            raise refusal(where, got="a layer that is parametrized already", expected="ordinary weights", fix=fix)
        own = [what for what, p in layer.named_parameters(recurse=False)]
        got = f"parameters of its own ({', '.join(own)})" if own else None
        if isinstance(layer, (*LAYERS, *NORMS, nn.PReLU)):
            got = odd_weights(layer) if isinstance(layer, LAYERS) else None
        if got is not None:
            expected = "parameters in Linear, Conv1d, Conv2d, norms and PReLU only"
            fix = "Build the layer from these; others have no NTK parametrization."
            raise refusal(where, got=got, expected=expected, fix=fix)


def _factors(name: str, layer: Any, w_std: float | None, b_std: float | None) -> dict[str, float]:
    """Factors of the originals of a layer."""
    i, o, where = fan_in(layer), fan_out(layer), f"layer '{name}' ({type(layer).__name__})"
    weight = initial_std(layer.weight, i, o, f"{where}, weight").std if w_std is None else w_std / i**0.5
    if weight == 0:
        expected, fix = "weights drawn at random, which define w_std", "Pass w_std, or draw the weights at random."
        raise refusal(where, got="weights that are all zero", expected=expected, fix=fix)
    factors = {"weight": weight}
    if layer.bias is not None:
        factors["bias"] = initial_std(layer.bias, i, o, f"{where}, bias").std if b_std is None else b_std
    return factors
