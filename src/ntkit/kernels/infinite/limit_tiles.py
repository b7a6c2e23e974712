"""How the values of a limit are computed: the model's run before its weights, tiles, tables, and who computes them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.base.progress import task
from ntkit.base.workers import spread, workers
from ntkit.kernels.infinite import all_pairs
from ntkit.kernels.infinite.all_pairs import mixes
from ntkit.kernels.infinite.layers import Affine, Dropout, GlobalPool, Graph, Input, Layer, Mixture, Pointwise
from ntkit.kernels.infinite.piecewise import Piecewise
from ntkit.kernels.infinite.prepared_sides import prepare
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.sample_sides import Side
from ntkit.kernels.infinite.tape import record

_PLANE_ELEMENTS = {"cpu": 1 << 16}  # a few planes of this size fit into a core's cache
_PLANE_ELEMENTS_ELSEWHERE = 1 << 24
_AT_ONCE = 4  # tiles at least, so that workers have something to do
_LEAST_ELEMENTS = 1 << 12  # of a plane of a tile that is cut smaller than need be: below, calls cost more than numbers
_TILE_PAIRS = 1 << 10  # pairs of samples with positions in a tile: 32 x 32, so that each side is prepared for many
BATCH, BATCH_OF_GRIDS = 512, 64
CACHE_BYTES = 256e6  # of prepared sides, kept for the next tiles
_INEXACT = 1e-6  # relative error of an activation above which a warning is given


def outputs_before_weights(model: nn.Module, batch: Tensor, last: int, keep: bool = False) -> list[Tensor]:
    """Outputs of the calls on a batch before the weights; those of the first sample are checked against it alone."""
    outputs = [op.out for op in record(model, batch, last, keep).ops]
    if len(batch) > 1:
        for op, out in zip(record(model, batch[:1], last).ops, outputs, strict=False):
            if op.out.shape[:1] == (1,) and not torch.allclose(op.out, out[:1], rtol=1e-4, atol=1e-6):
                got = f"{op.name}, whose value for a sample depends on the other samples in its batch"
                expected = "a function of each sample alone"
                raise refusal("the model", got=got, expected=expected, fix="Normalize the data outside the model.")
    return outputs


def state_of_model(model: nn.Module) -> Any:
    """What a reading depends on, to tell whether the model has changed since."""
    modules = [(name, id(m), m.training, _settings(m)) for name, m in model.named_modules()]
    tensors = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers())]
    return modules, [(name, t.requires_grad, _numbers(t)) for name, t in tensors]


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's own attributes: numbers, flags and masks as their values, functions by their identity."""
    found: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        if name not in _OF_MODULES:
            of = _numbers(value) if isinstance(value, Tensor) else value if isinstance(value, _PLAIN) else id(value)
            found.append((name, repr(of) if isinstance(of, (list, tuple, dict, set, float)) else of))
    return found


_OF_MODULES = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, list, tuple, dict, set, type(None))


def _numbers(t: Tensor) -> Any:
    """What tells a tensor's values from others."""
    if t.is_complex():
        return t.shape
    total = float(t.detach().sum(dtype=torch.float64))
    if t.requires_grad:  # of these, the distribution counts
        return t.shape, total
    flat = t.detach().flatten().double().nan_to_num()  # masks and encodings: each number at its place
    return t.shape, total, float(flat @ torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device))


def in_float64(t: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def check_size(largest: float, dtype: torch.dtype) -> None:
    """Refuse values that overflow in the dtype of the samples, or all lose digits to underflow."""
    info = torch.finfo(dtype)
    if not largest <= info.max or 0 < largest < 100 * info.tiny:  # NaN, too
        got, expected = f"values up to {largest:.1e}", f"values that {dtype} can represent"
        raise refusal("the kernel", got=got, expected=expected, fix="Scale the data, or pass it in float64.")


def side_of(graph: Graph, data: dict[int, Tensor], samples: slice) -> Side:
    """What the layers need of some samples."""
    part = {index: t[:, :, samples] for index, t in data.items()}
    if mixes(graph):
        return all_pairs.prepare(graph, part)
    return prepare(graph, part, plane_elements(next(iter(part.values()))))


def inexact(graph: Graph) -> list[tuple[Pointwise, Tabulated | Piecewise]]:
    """The activations with an error, with their layers."""
    pairs = [(k, a) for k in graph.layers if isinstance(k, Pointwise) for a in (k.activation, k.weighted)]
    return [(k, a) for k, a in pairs if isinstance(a, (Tabulated, Piecewise))]


def table_versions(graph: Graph) -> list[int]:
    """How often each table was extended."""
    return [a.version for _, a in inexact(graph) if isinstance(a, Tabulated)]


def extend_tables(graph: Graph, data1: dict[int, Tensor], data2: dict[int, Tensor]) -> list[int]:
    """Extend the tables of activations to the variances of all samples; return the tables' versions."""

    def cover() -> None:
        for data in (data1,) if data1 is data2 else (data1, data2):
            for start in range(0, next(iter(data.values())).shape[2], BATCH):
                side_of(graph, data, slice(start, start + BATCH))

    if table_versions(graph):
        spread(lambda work: work(), [cover])  # by one worker: the same table whatever the number of threads
    return table_versions(graph)


def warn_of_masks(graph: Graph) -> None:
    """Warn of dropout in train mode: few users mean its masks."""
    if names := [layer.name for layer in graph.layers if isinstance(layer, Dropout)]:
        warnings.warn(
            f"{names[0]}: dropout is active, so this is the kernel of networks with random masks, larger for a sample "
            "with itself. Call model.eval() for the kernel without masks.",
            stacklevel=4,
        )


def warn_of_errors(activations: Sequence[tuple[Any, Tabulated | Piecewise]]) -> None:
    """Warn of activations that are not exact; each with the layer that has it."""
    for layer, a in activations:
        if a.error > _INEXACT:
            warnings.warn(
                f"{layer.name}: its kernel is computed with a relative error of {a.error:.0e}. Its slope jumps "
                "elsewhere than at 0, or the sizes of its inputs are very different.",
                stacklevel=4,
            )


def plane_elements(like: Tensor) -> int:
    """Elements of a plane that fit into the caches."""
    return _PLANE_ELEMENTS.get(like.device.type, _PLANE_ELEMENTS_ELSEWHERE)


def tile_size(graph: Graph, like: Tensor, n1: int, n2: int) -> int:
    """Samples along each side of a tile; tiles of about equal size, and a few at least if they are large.

    A walk over offsets is shared out itself.
    """
    elements, n = plane_elements(like), max(n1, n2)
    if mixes(graph):  # positions stand beside each other as if they were samples
        size = max(1, math.isqrt(elements) // positions(graph))
        return math.ceil(n / math.ceil(n / size))
    if positions(graph) > 1:
        elements = min(elements, _TILE_PAIRS * max(1, elements >> 16))
    elif like.device.type == "cpu":
        elements += elements // 2  # the calls of so few operations cost more than what leaves the nearest cache
    tiles = math.ceil(n / max(8, math.isqrt(elements)))
    while not walks(graph) and _too_few(tiles, n1, n2, positions(graph), like):
        tiles += 1
    return math.ceil(n / tiles)


def _too_few(tiles: int, n1: int, n2: int, positions: int, like: Tensor) -> bool:
    """Whether there are few tiles though they are large enough to be cut into smaller ones.

    Whatever the number of workers: it must not change the values.
    """
    size, smaller = (math.ceil(max(n1, n2) / number) for number in (tiles, tiles + 1))
    number = math.ceil(n1 / size) * math.ceil(n2 / size)
    large = min(n1, smaller) * min(n2, smaller) * positions >= _LEAST_ELEMENTS and smaller < size
    return large and like.device.type == "cpu" and number < _AT_ONCE


def walks(graph: Graph) -> bool:
    """Whether the limit takes a walk over all offsets."""
    return any(isinstance(layer, GlobalPool) for layer in graph.layers)


def positions(graph: Graph) -> int:
    """Positions of the largest grid."""
    return max(math.prod(layer.size) for layer in graph.layers)


def state_size(graph: Graph) -> int:
    """Elements of a prepared side, per sample."""
    maps = sum(math.prod(k.size) * math.prod(k.source.size) for k in graph.layers if isinstance(k, Mixture))
    return 1 + maps + sum(4 * math.prod(layer.size) for layer in graph.layers if isinstance(layer, Pointwise))


def each(work: Callable, items: list, like: Tensor, here: bool = False) -> list:
    """The results of all items, by workers; `here`, one after the other: where an item's own parts go to workers."""
    here = here or like.device.type != "cpu"
    start, at_once = time.monotonic(), 1 if here else min(workers(), len(items))
    with task("infinite kernel", len(items)) as progress:

        def done(_: object) -> None:
            if progress.done == 0:
                progress.expect((time.monotonic() - start) * (len(items) - 1) / at_once)
            progress.advance()

        if not here:
            return spread(work, items, done)
        results = []
        for item in items:
            results.append(work(item))
            done(item)
        return results


def line_of(layer: Layer) -> str:
    """A layer as `InfiniteKernel.describe` lists it."""
    positions = f"{layer.size[0]} x {layer.size[1]} positions"
    if isinstance(layer, Input):
        return f"{layer.name or 'the input'}, {layer.channels} channels at {positions}"
    if isinstance(layer, Affine):
        return (
            f"{layer.name}: weights of std {math.sqrt(layer.weight_var):.4g} / sqrt(fan in), "
            f"bias of std {math.sqrt(layer.bias_var):.4g} ({layer.initialization})"
        )
    if isinstance(layer, Pointwise):
        return f"{layer.name}: {layer.activation.name}"
    if isinstance(layer, Mixture) and layer.scores:
        return f"{layer.name}: attention, scores that tend to their mean, {positions}"
    kinds = {"GlobalPool": "global pool", "PositionMap": "sums over positions", "Concat": "branches side by side"}
    kind = kinds.get(type(layer).__name__, type(layer).__name__.lower())
    return f"{layer.name}: {kind}, {positions}"
