"""Calls that a tape may contain: which function does what, and what its arguments mean."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkit.jacobian.model_calls import computes_statistics
from ntkit.kernels.infinite.activations import Function
from ntkit.kernels.infinite.layers import Size
from ntkit.kernels.infinite.tape import Op, Ref, Tape

T = torch.Tensor
AFFINE = {F.linear, F.conv1d, F.conv2d, torch.conv1d, torch.conv2d}
TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, torch.conv_transpose1d, torch.conv_transpose2d}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
NORMS = {F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm}
BATCH_NORMS = {F.batch_norm, torch.batch_norm}
DIFFERENCES = {torch.sub, torch.subtract, T.sub, T.sub_, T.__sub__, T.__isub__, T.subtract}
SUMS = {torch.add, T.add, T.add_, T.__add__, T.__iadd__, T.__radd__, T.__rsub__} | DIFFERENCES
DIVISIONS = {torch.div, torch.true_divide, T.div, T.div_, T.__truediv__, T.__itruediv__, T.__rtruediv__}
PRODUCTS = {torch.mul, torch.multiply, T.mul, T.mul_, T.__mul__, T.__imul__, T.__rmul__} | DIVISIONS
NEGATIONS = {torch.neg, T.neg, T.__neg__, torch.negative}
STOPS = [T.data.__get__, T.detach, torch.detach, T.detach_]  # no gradient flows through  # pyrefly: ignore
COPIES = {T.contiguous, T.clone, torch.clone, T.to, T.float, T.double}
VIEWS = {torch.flatten, T.flatten, T.view, T.reshape, torch.reshape, T.squeeze, torch.squeeze} | COPIES
VIEWS |= {torch.unsqueeze, T.unsqueeze, nn.Identity, T.type}
AVG_POOLS = {F.avg_pool1d, F.avg_pool2d, torch.avg_pool1d}
ADAPTIVE_POOLS = {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.adaptive_avg_pool1d}
REDUCTIONS = {torch.mean, T.mean, torch.sum, T.sum}

SUPPORTED = (
    "Supported are dense and convolution layers, sums, products and concatenations of branches, linear maps of "
    "positions (slices, padding, resizing, average pools), norms over channels, and elementwise functions."
)
POOLING = "Use average pooling: the maximum over positions of a Gaussian field has no kernel in closed form."
ADVICE = {
    "softmax": "Attention and softmax mix channels and have no kernel of this kind. Apply softmax in the loss.",
    "log_softmax": "Apply it in the loss: end the model with its logits.",
} | {name: POOLING for name in ("max_pool2d", "max_pool1d", "boolean_dispatch", "adaptive_max_pool2d", "fn", "amax")}


def is_elementwise(function: Function, shape: torch.Size) -> bool:
    """Test on random numbers: permuted inputs give permuted outputs; a changed number changes only its own output."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    order = torch.randperm(z.numel(), generator=generator)
    changed = z.clone()
    changed.flatten()[0] += 1
    with torch.random.fork_rng([]), torch.no_grad():
        try:
            outs = [function(t).clone() for t in (z * 1, z.flatten()[order].reshape(shape), changed, z * 1)]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    if outs[0].shape != shape or outs[0].is_complex():
        return False
    out, permuted, changed, again = (t.flatten().double() for t in outs)  # of a comparison 0 and 1
    return torch.equal(out, again) and all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
        for a, b in ((out[order], permuted), (changed[1:], out[1:]))
    )


def factor_of(op: Op) -> float | None:
    """The number by which a call multiplies its one value."""
    others = [a for a in op.args if not isinstance(a, Ref)]
    if op.func in COPIES:
        return 1.0 if op.out.is_floating_point() else None  # a cast to whole numbers rounds
    if op.func in NEGATIONS:
        return -1.0
    if op.func not in PRODUCTS or len(others) != 1 or op.kwargs:
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


def arguments(op: Op, *names: str) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, op.args, strict=False)) | op.kwargs


def words_differ(weight: Tensor, padding: int | None) -> bool:
    """Whether an embedding has a word unlike others: the gradient of `padding_idx` is 0, and so its row may be."""
    return padding is not None and (weight.requires_grad or not bool(weight[padding].any()))


def batch_norm_arguments(op: Op) -> dict[str, Any]:
    """The arguments of a batch norm by name."""
    names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    if op.func is torch.batch_norm:
        names[1:5] = "weight", "bias", "running_mean", "running_var"
    return arguments(op, *names)


def mixes_samples(model: nn.Module, tape: Tape | None) -> bool:
    """Whether a batch norm takes its statistics from the batch: a module, or a call on the tape."""
    norms = [op for op in tape.ops if op.func in BATCH_NORMS] if tape else []
    of_call = any(batch_norm_arguments(op).get("training") for op in norms)
    return of_call or any(map(computes_statistics, model.modules()))


def pair(value: Any, dims: int, missing: int = 1) -> Size:
    """A number, or one number per axis, as a pair."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = values * max(dims, 1) if len(values) == 1 else values
    if dims == 0:
        return (missing, missing)
    return (missing, int(values[0])) if dims == 1 else (int(values[0]), int(values[1]))


def grid(shape: Any) -> Size | None:
    """Positions as height and width."""
    return {0: (1, 1), 1: (1, *shape), 2: tuple(shape)}.get(len(shape))  # pyrefly: ignore
