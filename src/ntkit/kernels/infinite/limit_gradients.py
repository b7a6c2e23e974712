"""Values of the limit that autograd follows back to the samples and to `w_std` and `b_std`, tile by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ntkit.base.caller_context import grad_mode
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_number
from ntkit.kernels.infinite.differentiable_planes import (
    DifferentiablePlanes,
    Half,
    Scales,
    check_derivatives,
    variances,
)
from ntkit.kernels.infinite.kept_planes import splits
from ntkit.kernels.infinite.layers import GlobalPool, Graph, Pool, PositionMap, Size

Std = float | Tensor
Data = dict[int, Tensor]

_ELEMENTS = 1 << 22  # of the values of all layers in a tile: about 15 numbers of each are kept for the way back
_MOST = 1e100


def as_std(value: Any, name: str) -> Std:
    """A standard deviation; a tensor that requires a gradient stays one.

    Raises
    ------
    Refused
        When it is no real number from 0 to 1e100.
    """
    number = _number(value, name)
    return value if isinstance(value, Tensor) and value.requires_grad else number


def as_numbers(stds: tuple[Std, Std] | None) -> tuple[float, float] | None:
    """The standard deviations as they are now: a tensor's value may have changed since."""
    return None if stds is None else (_number(stds[0], "w_std"), _number(stds[1], "b_std"))


def _number(value: Any, name: str) -> float:
    value = value.detach() if isinstance(value, Tensor) else value
    return as_number(value, name, lambda s: 0 <= s <= _MOST, "a number from 0 to 1e100", "Give a standard deviation.")


def wants_gradients(*values: Any) -> bool:
    """Whether the caller's grad mode is on and one of the values requires a gradient."""
    return grad_mode() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


@dataclass
class LimitGradients:
    """The differentiable limit of one graph, which was read with `w_std` and `b_std` of 1 if these are given."""

    graph: Graph
    stds: tuple[Std, Std] | None
    tangent: bool

    def __post_init__(self) -> None:
        check_derivatives(self.graph)

    def matrix(self, data1: Data, data2: Data | None) -> Tensor:
        """k(x1, x2), [n1, n2], of samples at the input layers; for data2 = None, exactly symmetric."""
        scales, labels = self._scales(data1), _labels(data1, data2)
        size = max(1, math.isqrt(_ELEMENTS // _elements(self.graph)))
        several = max(len(t) for t in labels) > size and not splits(self.graph)
        one = self._halves(data1, labels[0], scales, size)
        two = one if data2 is None else self._halves(data2, labels[1], scales, size)

        def tile(i: int, j: int) -> Tensor:
            def compute() -> Tensor:
                return DifferentiablePlanes(self.graph, one[i], two[j], scales, False, self.tangent).output()

            return _again(compute) if several else compute()

        if data2 is not None:
            return torch.cat([torch.cat([tile(i, j) for j in range(len(two))], 1) for i in range(len(one))])
        rows: list[list[Tensor]] = []
        for i in range(len(one)):
            below = [rows[j][i].T for j in range(i)]
            upper = tile(i, i).triu(1)
            rows.append([*below, upper + upper.T, *(tile(i, j) for j in range(i + 1, len(one)))])
        # of a sample with itself: a smooth function of the sample, which that of two samples is not
        return torch.cat([torch.cat(row, 1) for row in rows]) + self.pairs(data1, None).diag()

    def pairs(self, data1: Data, data2: Data | None) -> Tensor:
        """k(x1_i, x2_i), [n]."""
        scales, labels = self._scales(data1), _labels(data1, data2)
        size = max(1, _ELEMENTS // _elements(self.graph))
        one = self._halves(data1, labels[0], scales, size)
        two = one if data2 is None else self._halves(data2, labels[1], scales, size)

        def some(i: int) -> Tensor:
            def compute() -> Tensor:
                return DifferentiablePlanes(self.graph, one[i], two[i], scales, True, self.tangent).output()[:, 0]

            return _again(compute) if len(one) > 1 and not splits(self.graph) else compute()

        return torch.cat([some(i) for i in range(len(one))])

    def _scales(self, data: Data) -> Scales:
        like = next(iter(data.values()))
        stds = zip(self.stds or (1.0, 1.0), ("w_std", "b_std"), strict=True)
        w, b = (torch.as_tensor(as_std(s, name), dtype=like.dtype).to(like) for s, name in stds)
        return Scales(w * w, b * b)

    def _halves(self, data: Data, labels: Tensor, scales: Scales, size: int) -> list[Half]:
        """The samples of a side in parts."""
        parts = []
        for start in range(0, len(labels), size):
            some = slice(start, start + size)
            part = {index: t[:, :, some] for index, t in data.items()}
            compute = lambda part=part, some=some: variances(self.graph, part, labels[some], scales)
            parts.append(_again(compute) if len(labels) > size else compute())
        return parts


def _again(compute: Any) -> Any:
    """Compute now without keeping what is between, and once more when gradients pass."""
    return checkpoint(compute, use_reentrant=False, preserve_rng_state=False)


def _elements(graph: Graph) -> int:
    """Numbers of all layers per pair of samples that are kept at a time, of the planes of all offsets kept."""
    kinds = {type(layer) for layer in graph.layers}

    def planes(size: Size) -> int:
        if splits(graph):  # one row of offsets, see `_global_pool`
            return size[1]
        return math.prod(size) if kinds & {GlobalPool, Pool, PositionMap} else 1

    return sum(math.prod(layer.size) * planes(layer.size) for layer in graph.layers)


def _labels(data1: Data, data2: Data | None) -> list[Tensor]:
    """Equal integers for samples that are equal to the last bit."""
    sides = [data1] if data2 is None else [data1, data2]
    rows = [torch.cat([t.detach().movedim(2, 0).flatten(1) for t in data.values()], 1) for data in sides]
    found = torch.unique(torch.cat(rows), dim=0, return_inverse=True)[1]
    return list(found.split([len(r) for r in rows]))


def refused(subject: str, got: str, fix: str) -> Exception:
    """The refusal of what has no gradients."""
    got, fix = f"{got}, with samples or stds that require grad", f"{fix} in torch.no_grad()."
    return refusal(subject, got=got, expected="values without gradients", fix=fix)
