"""Each sample's own gradient of a convolution's weight: four exact ways, and which of them is the fastest here.

    dW[i, c, o, a, k] = sum over positions t of cotangent[i, c, o, t] * x[i, a, stride t + dilation k - padding]

Which is the fastest depends on sizes, caches and the library's own kernels, differently on every processor. So it is
measured, once per shape, and kept (see `machine_rates.fastest`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.jacobian.machine_rates import fastest

_ENOUGH = 4  # samples from which a measurement tells something


@dataclass(frozen=True)
class Shape:
    """A convolution: its kernel, and how that moves over the image."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]


def weight_gradients(x: Tensor, cotangent: Tensor, shape: Shape, out: Tensor | None) -> Tensor:
    """Gradients of the weight for every sample and output; one group, one image a sample.

    Parameters
    ----------
    x : [n, a, *space].
    cotangent : [n, C, o, *positions].
    out : where to write them, or None.

    Returns
    -------
    Tensor
        [n, C, o * a * prod(kernel)].
    """
    n, outputs, o = cotangent.shape[:3]
    if out is None:
        out = x.new_empty(n, outputs, o * x.shape[1] * math.prod(shape.kernel))
    ways = _ways(x, cotangent, shape)
    name = next(iter(ways))
    if len(ways) > 1 and n >= _ENOUGH:
        sizes = (x.shape[1:], cotangent.shape[1:], shape.kernel, shape.stride, shape.dilation, shape.padding)
        key = "convolution " + " ".join("x".join(map(str, size)) for size in sizes)
        name = fastest(key, x, {way: lambda f=f: f(x, cotangent, shape, out) for way, f in ways.items()})
    ways[name](x, cotangent, shape, out)
    return out


Way = Callable[[Tensor, Tensor, Shape, Tensor], None]


def _ways(x: Tensor, cotangent: Tensor, shape: Shape) -> dict[str, Way]:
    """The ways open to a shape; the first is taken where nothing can be measured."""
    outputs, o = cotangent.shape[1:3]
    if x.device.type != "cpu" or math.prod(shape.kernel) == 1:
        return {"fields": by_fields}
    ways: dict[str, Way] = {"fields": by_fields}
    if len(shape.kernel) == 2:
        ways |= {"calls": by_calls, "groups": by_groups}
        if set(shape.stride) == set(shape.dilation) == {1}:
            ways["windows"] = by_windows
        # Unfolding writes every input entry prod(kernel) times: with few rows to multiply it costs more than the
        # product. The calls must be large enough, and their sums long enough, to get going (LOG.md).
        positions, fields = math.prod(cotangent.shape[3:]), x.shape[1] * math.prod(shape.kernel)
        few = outputs * o < fields and positions >= 64 and 2 * positions * o * fields >= 4e6
        if few and x.dtype == torch.float32:
            ways = {"calls": by_calls} | ways
    return ways


def by_fields(x: Tensor, cotangent: Tensor, shape: Shape, out: Tensor) -> None:
    """Unfold the receptive fields; one product per sample with all outputs stacked."""
    n, outputs, o = cotangent.shape[:3]
    left, right = cotangent.reshape(n, outputs * o, -1), receptive_fields(x, shape).transpose(1, 2)
    # a product with a transposed view is slower, which pays where there are few rows to multiply
    right = right if outputs * o < right.shape[2] else right.contiguous()
    _product(left, right, out)


def by_windows(x: Tensor, cotangent: Tensor, shape: Shape, out: Tensor) -> None:
    """Channels last, unfolded along rows only; one product per row of the kernel, whose operand is a view.

    That writes every entry as often as the kernel is wide, in runs of consecutive numbers.
    """
    n, outputs, o, height, width = cotangent.shape
    (rows, columns), a = shape.kernel, x.shape[1]
    top, left_side = shape.padding
    last = F.pad(x.permute(0, 2, 3, 1), (0, 0, left_side, left_side, top, top)).contiguous()
    high, wide = last.shape[1:3]
    windows = last.as_strided((n, high, width, columns * a), (high * wide * a, wide * a, a, 1))
    windows = windows.reshape(n, high * width, columns * a)
    left = cotangent.reshape(n, outputs * o, height * width)
    target = out.view(n, outputs * o, a, rows, columns)
    for k in range(rows):
        product = torch.bmm(left, windows[:, k * width : k * width + height * width])
        target[:, :, :, k] = product.view(n, outputs * o, columns, a).transpose(2, 3)


def by_calls(x: Tensor, cotangent: Tensor, shape: Shape, out: Tensor) -> None:
    """One call of the library's own kernel per sample and output."""
    values = out.view(*cotangent.shape[:3], x.shape[1], *shape.kernel)
    for s, image in enumerate(x[:, None].unbind()):
        for c, cot in enumerate(cotangent[s, :, None].unbind()):
            values[s, c] = backward_call(cot, image, shape, 1)


def by_groups(x: Tensor, cotangent: Tensor, shape: Shape, out: Tensor) -> None:
    """One call per output, with the samples as groups of channels."""
    n, outputs, o = cotangent.shape[:3]
    values = out.view(n, outputs, o, x.shape[1], *shape.kernel)
    image = x.reshape(1, n * x.shape[1], *x.shape[2:])
    for c in range(outputs):
        cot = cotangent[:, c].reshape(1, n * o, *cotangent.shape[3:])
        values[:, c] = backward_call(cot, image, shape, n).view_as(values[:, c])


def backward_call(cotangent: Tensor, x: Tensor, shape: Shape, groups: int) -> Tensor:
    """PyTorch's gradient of the weight, [o, a / groups, *kernel], summed over the images of `x`."""
    weight = x.new_empty(()).expand(cotangent.shape[1], x.shape[1] // groups, *shape.kernel)  # only its shape counts
    rest = (None, shape.stride, shape.padding, shape.dilation, False, (0, 0), groups, (False, True, False))
    return torch.ops.aten.convolution_backward(cotangent, x, weight, *rest)[1]


def receptive_fields(x: Tensor, shape: Shape) -> Tensor:
    """Receptive fields of images [n, a, *space]: [n, a * prod(kernel), positions]."""
    if any(shape.padding):
        x = F.pad(x, [p for size in reversed(shape.padding) for p in (size, size)])
    windows = x  # views and one copy: on a CPU two to eight times as fast as F.unfold
    for d, (k, s, step) in enumerate(zip(shape.kernel, shape.stride, shape.dilation, strict=True)):
        # a window of the dilated size, then every step-th entry of it
        windows = windows.unfold(2 + d, step * (k - 1) + 1, s)[..., ::step]
    space = len(shape.kernel)
    windows = windows.permute(0, 1, *range(2 + space, 2 + 2 * space), *range(2, 2 + space))
    return windows.reshape(x.shape[0], x.shape[1] * math.prod(shape.kernel), -1)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Products [n, C * l, T] @ [n, T, r] into [n, C, l * r]."""
    if out.is_contiguous() and out.dtype == left.dtype:
        torch.bmm(left, right, out=out.view(len(left), left.shape[1], right.shape[2]))
    else:
        out.copy_(torch.bmm(left, right).reshape(out.shape))
