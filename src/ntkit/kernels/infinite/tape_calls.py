"""Calls that a tape may hold: which function is what, and what its arguments say."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkit.kernels.infinite.activations import Function
from ntkit.kernels.infinite.layers import Size
from ntkit.kernels.infinite.tape import Op, Ref

T = torch.Tensor
WEIGHTED = {F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d}
NORMS = {F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm}
DIFFERENCES = {torch.sub, torch.subtract, T.sub, T.sub_, T.__sub__, T.__isub__, T.subtract}
SUMS = {torch.add, T.add, T.add_, T.__add__, T.__iadd__, T.__radd__, T.__rsub__} | DIFFERENCES
DIVISIONS = {torch.div, torch.true_divide, T.div, T.div_, T.__truediv__, T.__itruediv__, T.__rtruediv__}
SCALINGS = {torch.mul, torch.multiply, T.mul, T.mul_, T.__mul__, T.__imul__, T.__rmul__} | DIVISIONS
NEGATED = {torch.neg, T.neg, T.__neg__, torch.negative}
DATA = T.data.__get__  # pyrefly: ignore
SAME = {T.contiguous, T.clone, torch.clone, T.to, T.float, T.double}
TOTALS = {torch.sum, T.sum}
VIEWS = {torch.flatten, T.flatten, T.view, T.reshape, torch.reshape, T.squeeze, torch.squeeze, T.contiguous, T.clone}
VIEWS |= {torch.clone, T.to, T.float, T.double, torch.unsqueeze, T.unsqueeze, nn.Identity, T.type}

GENERAL = "Read are dense and convolution layers, sums, average pools, norms over channels, and elementwise functions."
POOLING = "Use average pooling: the maximum over positions of a Gaussian field has no kernel in closed form."
ADVICE = {
    "softmax": "Attention and softmax mix channels in a way that no kernel follows; leave it to the loss.",
    "log_softmax": "Leave it to the loss: end the model with its logits.",
} | {name: POOLING for name in ("max_pool2d", "max_pool1d", "boolean_dispatch", "adaptive_max_pool2d", "fn", "amax")}


def elementwise(function: Function, shape: torch.Size) -> bool:
    """By experiment: a permutation of all numbers is passed through, and one changed number changes only its own."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    order = torch.randperm(z.numel(), generator=generator)
    with torch.random.fork_rng([]), torch.no_grad():
        try:
            out = function(z * 1).clone()
            mixed = function(z.flatten()[order].reshape(shape)).flatten().clone()
            other = z.clone()
            other.flatten()[0] += 1
            changed = function(other).flatten()
            again = function(z * 1)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    if not isinstance(out, Tensor) or out.shape != shape or out.is_complex():
        return False
    if not out.is_floating_point():  # a comparison
        return bool(
            (out.flatten()[order] == mixed).all() and (changed[1:] == out.flatten()[1:]).all() and out.equal(again)
        )
    same = torch.allclose(out.flatten()[order], mixed, rtol=1e-12, atol=1e-12, equal_nan=True) and torch.equal(
        out, again
    )
    return same and torch.allclose(changed[1:], out.flatten()[1:], rtol=1e-12, atol=1e-12, equal_nan=True)


def factor_of(op: Op) -> float | None:
    """The number that a call multiplies its one value by."""
    others = [a for a in op.args if not isinstance(a, Ref)]
    if op.func in SAME:
        return 1.0
    if op.func in NEGATED:
        return -1.0
    if op.func not in SCALINGS or len(others) != 1 or op.kwargs:
        return None
    number = others[0]
    if isinstance(number, Tensor):
        number = number.item() if number.numel() == 1 else None
    if not isinstance(number, (int, float)):
        return None
    if op.func in DIVISIONS:
        reverse = op.func is T.__rtruediv__  # the number is divided by the value
        return 1 / number if isinstance(op.args[0], Ref) and number and not reverse else None
    return float(number)


def pair(value: Any, dims: int, missing: int = 1) -> Size:
    """A number or one per axis, as two."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = values * max(dims, 1) if len(values) == 1 else values
    if dims == 0:
        return (missing, missing)
    return (missing, int(values[0])) if dims == 1 else (int(values[0]), int(values[1]))


def grid(shape: Any) -> Size | None:
    """Positions as height and width."""
    return {0: (1, 1), 1: (1, *shape), 2: tuple(shape)}.get(len(shape))  # pyrefly: ignore
