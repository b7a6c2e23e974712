"""Reading calls that move or add up positions: their matrices are found by running them, whatever they are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ntkit.kernels.infinite.activations import Function
from ntkit.kernels.infinite.layers import Layer, PositionMap, Size, Sum
from ntkit.kernels.infinite.tape import Op, Ref
from ntkit.kernels.infinite.tape_calls import arguments, grid
from ntkit.kernels.infinite.tape_reader import Reader

Matrices = tuple[Tensor, Tensor]

FAR = 1024.0  # random numbers times this: a clamp at -4 leaves most draws of a normal as they are


def position_map(reader: Reader, op: Op) -> Layer | None:
    """The layer of a call that is linear in positions along each axis and does the same to all channels, else None.

    Slices, indices, flips, rolls, `F.pad` of any mode, `F.interpolate`, pools with windows of several sizes, means and
    sums over one axis, transposed positions. Its matrix along height is read off from rows of ones, that along width
    likewise; on random numbers the call then has to give what the matrices say.
    """
    before = reader.tape.ops[op.refs[0].index].out
    old, new = grid(before.shape[2:]), grid(op.out.shape[2:])
    same_channels = before.dim() > 2 and op.out.dim() >= 2 and before.shape[:2] == op.out.shape[:2]
    if not same_channels or old is None or new is None or 0 in new or len(op.refs) != 1:
        return None
    function = position_function(op)
    with torch.random.fork_rng([]), torch.no_grad():
        for exchanged in (False, True):
            try:
                maps = _matrices(function, before.shape, new, exchanged)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
            if maps is not None:
                source = reader.layer(reader.value(op.refs[0]))
                return mapped(reader, reader.where(op), source, maps, exchanged)
    return None


def mapped(reader: Reader, where: str, source: Layer, maps: Matrices, exchanged: bool = False) -> Layer:
    """The layer of these matrices; of two in a row, one."""
    size = (len(maps[0]), len(maps[1]))
    if isinstance(source, PositionMap) and not source.exchanged:
        maps, source = (maps[0] @ source.maps[0], maps[1] @ source.maps[1]), source.source
    return reader.add(PositionMap(size[::-1] if exchanged else size, where, source, maps, exchanged), [source])


def position_function(op: Op) -> Function:
    """The call as a function of its one value."""

    def function(z: Tensor) -> Tensor:
        def argument(a: Any) -> Any:
            return z if isinstance(a, Ref) else a.to(z) if isinstance(a, Tensor) and a.is_floating_point() else a

        args, kwargs = tree_map(argument, (op.args, op.kwargs))
        return op.func(*args, **kwargs)

    return function


def _matrices(function: Function, shape: torch.Size, new: Size, exchanged: bool) -> Matrices | None:
    """The matrices of a call on values of this shape, if there are such ones."""
    generator = torch.Generator().manual_seed(0)
    old = grid(shape[2:])
    assert old is not None

    def run(grids: Tensor) -> Tensor:
        """Of grids [count, H, W], as many at once as there are channels."""
        slots, outs = shape[0] * shape[1], []
        for start in range(0, len(grids), slots):
            part = grids[start : start + slots]
            z = part.new_zeros(slots, *old)
            z[: len(part)] = part
            out = function(z.reshape(shape)).reshape(slots, *new)[: len(part)]
            outs.append(out.mT if exchanged else out)
        return torch.cat(outs)

    other = [1 + torch.rand(n, generator=generator, dtype=torch.float64) for n in old]
    rows = run(torch.eye(old[0], dtype=torch.float64)[:, :, None] * other[1])  # [i, o, columns @ other]
    columns = run(torch.eye(old[1], dtype=torch.float64)[:, None, :] * other[0][:, None])
    # one number is in both: that of all rows and all columns
    whole = torch.einsum("iow,i->ow", rows, other[0])
    place = int(whole.abs().argmax())
    at = divmod(place, whole.shape[1])
    scale = whole[at]
    if scale == 0 or not whole.isfinite().all():
        return None
    size = columns[:, at[0]].flatten()[columns[:, at[0]].abs().argmax()]  # only the product of both has a scale
    maps = rows[:, :, at[1]].T * (size / scale), columns[:, at[0]].T / size
    # zeros and ones without the rounding errors of the reading
    maps = [torch.where((m - m.round()).abs() < 1e-14, m.round(), m).contiguous() for m in maps]
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    wanted = maps[0] @ z.reshape(*shape[:2], *old) @ maps[1].T
    got = function(z).reshape(*shape[:2], *new)
    got = got.mT if exchanged else got
    close = torch.allclose(got, wanted, rtol=1e-11, atol=1e-11 * float(wanted.abs().max()))
    return (maps[0], maps[1]) if close else None


# ---------------------------------------------------------------------- side by side, and transposed convolutions


def positions_side_by_side(reader: Reader, op: Op, axis: int) -> Layer:
    """Values concatenated along an axis of positions: each placed on the whole grid, then added."""
    size = grid(op.out.shape[2:])
    assert size is not None
    which = axis + 2 - len(op.out.shape[2:])  # 0: height, 1: width
    placed: dict[int, tuple[Matrices, Layer]] = {}
    start = 0
    for ref in op.refs:
        layer = reader.layer(reader.value(ref))
        count = layer.size[which]
        maps = [torch.eye(n, dtype=torch.float64) for n in layer.size]
        maps[which] = torch.eye(size[which], dtype=torch.float64)[:, start : start + count]
        start += count
        if isinstance(layer, PositionMap) and not layer.exchanged:
            maps, layer = [m @ inner for m, inner in zip(maps, layer.maps, strict=True)], layer.source
        if id(layer) in placed:  # of one value, in several places
            before = placed[id(layer)][0]
            if not torch.equal(before[1 - which], maps[1 - which]):
                fix = "Join parts that differ along one axis only."
                raise reader.refusal(op, f"{op.name} of several parts of one value", fix)
            maps[which] = maps[which] + before[which]
        placed[id(layer)] = (maps[0], maps[1]), layer
    parts = [mapped(reader, reader.where(op), layer, maps) for maps, layer in placed.values()]
    for i, one in enumerate(parts):
        for two in parts[:i]:
            reader.check_uncorrelated(op, one, two)
    return parts[0] if len(parts) == 1 else reader.add(Sum(size, reader.where(op), [(1.0, p) for p in parts]), parts)


def spread_out(reader: Reader, op: Op, source: Layer, stride: Size, padding: Size, dilation: Size, taps: Size) -> Layer:
    """The input of a transposed convolution with zeros between its positions: a convolution follows.

    Its output o adds up weight t times the input at q for all o = q stride - padding + t dilation.
    """
    size = grid(op.out.shape[2:])
    assert size is not None
    maps = []
    for n, m, s, p, d, k in zip(size, source.size, stride, padding, dilation, taps, strict=True):
        reach = d * (k - 1)
        matrix = torch.zeros(n + reach, m, dtype=torch.float64)
        for q in range(m):
            if 0 <= (row := q * s - p + reach) < len(matrix):
                matrix[row, q] = 1
        maps.append(matrix)
    return mapped(reader, reader.where(op), source, (maps[0], maps[1]))


def dim_of(op: Op) -> int:
    """The axis along which a call joins its values, counted from the first."""
    return int(arguments(op, "tensors", "dim").get("dim", 0)) % op.out.dim()
