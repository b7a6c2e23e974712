"""Reading calls that select channels: slices, chunks, splits, permutations.

Channels of a Gaussian layer are independent draws of one field: a part has the kernel of the whole, and parts without
a channel in common do not depend on each other. A part of a later layer is that layer of a part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ntkit.kernels.infinite.layers import Affine, Channels, Concat, Flatten, Input, Layer, Product, Sum, sources
from ntkit.kernels.infinite.position_layers import FAR, position_function
from ntkit.kernels.infinite.tape import Op
from ntkit.kernels.infinite.tape_reader import Curve, Reader

Indices = tuple[int, ...]


def channel_part(reader: Reader, op: Op) -> Layer | Curve | None:
    """The value of a call that selects channels of its one value, or arranges them in another order; else None."""
    before = reader.tape.ops[op.refs[0].index].out
    if len(op.refs) != 1 or before.dim() < 2 or op.in_place:
        return None
    if not (before.is_floating_point() and op.out.is_floating_point()):  # a cast rounds
        return None
    value, indices = reader.value(op.refs[0]), selected(op, before)
    if indices is None:
        return None
    if len(set(indices)) < len(indices):
        raise reader.refusal(op, "channels that it repeats", "Select each channel once.")
    if indices == tuple(range(before.shape[1])):
        return value
    return part(reader, op, value, indices, before.shape[1])


def selected(op: Op, before: torch.Tensor) -> Indices | None:
    """The channels that a call selects, if this is all that it does."""
    shape, function = before.shape, position_function(op)
    channels = torch.arange(shape[1], dtype=torch.float64).reshape(1, -1, *[1] * (len(shape) - 2))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.random.fork_rng([]), torch.no_grad():
        try:
            numbers, values = function(channels.expand(shape) * 1), function(z * 1)
            far = function(z * FAR)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
    same = numbers.dim() == len(shape) and numbers.shape[0] == shape[0] and numbers.shape[2:] == shape[2:]
    if not same or not numbers.numel():
        return None
    found = numbers[0].reshape(numbers.shape[1], -1)[:, 0]
    inside = ((found >= 0) & (found < shape[1]) & (found == found.round())).all()
    picked = z[:, found.long()] if inside else z
    if not inside or not torch.equal(values, picked) or not torch.equal(far, picked * FAR):
        return None
    return tuple(found.long().tolist())


def part(reader: Reader, op: Op, value: Any, indices: Indices, count: int) -> Any:
    """Some of the `count` channels of a value, in this order."""
    if isinstance(value, Curve):
        source = part(reader, op, value.source, indices, count)
        root = part(reader, op, value.root, indices, count) if value.root else None
        return replace(value, source=source, root=root, layer=None)
    key = id(value), indices
    if key not in reader.parts:
        reader.parts[key] = value, _part(reader, op, value, indices, count)  # the first: so that its identity stays
    return reader.parts[key][1]


def _part(reader: Reader, op: Op, layer: Layer, indices: Indices, count: int) -> Layer:
    if isinstance(layer, Concat):
        return _of_several(reader, op, layer, indices, count)
    if isinstance(layer, Channels):
        return part(reader, op, layer.source, tuple(layer.indices[i] for i in indices), layer.count)
    if isinstance(layer, Affine):
        if layer.grouped or id(layer) not in reader.gaussian:
            got = "channels of a layer whose weights are in groups"
            raise reader.refusal(op, got, "Select channels of a layer with groups=1.")
        name = f"{reader.where(op)}, {len(indices)} of {count} channels of {layer.name}"
        channels = Channels(layer.size, name, layer, indices, count)
        return reader.add(channels, sources(layer), own=(id(layer), frozenset(indices)))
    if isinstance(layer, Input) or (isinstance(layer, Flatten) and layer.source.size != (1, 1)):
        got = "features of flattened positions" if isinstance(layer, Flatten) else "channels of the input"
        raise reader.refusal(op, f"some {got}", "Select channels before nn.Flatten.")
    of = [part(reader, op, source, indices, count) for source in sources(layer)]
    if isinstance(layer, Sum):
        changed = replace(layer, terms=[(factor, p) for (factor, _), p in zip(layer.terms, of, strict=True)])
    elif isinstance(layer, Product):
        changed = replace(layer, one=of[0], two=of[1])
    else:
        changed = replace(layer, source=of[0])  # pyrefly: ignore
    return reader.add(changed, of)


def _of_several(reader: Reader, op: Op, layer: Concat, indices: Indices, count: int) -> Layer:
    """Channels of branches side by side: of each branch those that are its own."""
    parts, start = [], 0
    for share, branch in layer.parts:
        width = round(share * count)
        own = tuple(i - start for i in indices if start <= i < start + width)
        start += width
        if own:
            of_branch = branch if own == tuple(range(width)) else part(reader, op, branch, own, width)
            parts.append((len(own) / len(indices), of_branch))
    if len(parts) == 1:
        return parts[0][1]
    if indices != tuple(sorted(indices)):
        got = "channels of several branches in another order"
        raise reader.refusal(op, got, "Select channels of each branch before the concatenation.")
    return reader.add(Concat(layer.size, reader.where(op), parts), [p for _, p in parts])
