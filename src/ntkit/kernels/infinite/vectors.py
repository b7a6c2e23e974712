"""Values of a tape that are vectors at positions, and what moves them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ntkit.kernels.infinite.position_layers import FAR
from ntkit.kernels.infinite.shared_weights import Node, Sum
from ntkit.kernels.infinite.tape import Op, Ref


@dataclass
class Vectors:
    """A value of the tape: one sum at every position.

    shape : positions, the axes beside those of the samples and of the features.
    batch : the axis of the samples; features are the last axis.
    sums : by position.
    """

    shape: tuple[int, ...]
    batch: int
    sums: dict[tuple[int, ...], Sum]


@dataclass
class Joined:
    """Features of several values side by side, with their numbers; a linear layer takes it."""

    parts: list[tuple[int, Vectors]]


def added(parts: list[tuple[float, Sum]]) -> Sum:
    """A sum of sums with factors; equal nodes once."""
    total: dict[int, tuple[float, Node]] = {}
    for factor, terms in parts:
        for c, node in terms:
            total[id(node)] = (total.get(id(node), (0.0, node))[0] + factor * c, node)
    return tuple(total.values())


def moved(op: Op, before: Tensor, value: Vectors) -> Vectors | None:
    """A linear map of positions (indexing, means, transposition), found by running the call; None if it is none.

    before : the value that the call takes.
    """
    shape, features = tuple(before.shape), before.shape[-1]

    def run(z: Tensor) -> Tensor:
        args, kwargs = tree_map(lambda a: z if isinstance(a, Ref) else a, (op.args, op.kwargs))
        return op.func(*args, **kwargs)

    samples = torch.arange(1.0, 4.0, dtype=torch.float64)
    samples = samples.view([3 if axis == value.batch else 1 for axis in range(len(shape))]).expand(shape).clone()
    generator = torch.Generator().manual_seed(0)
    z, other = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    try:
        out = run(samples)
        doubled = [run(s * (z + 2 * other)) / s - run(s * z) / s - 2 * run(s * other) / s for s in (1, FAR)]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if out.dim() < 2 or out.shape[-1] != features or any(float(d.abs().max()) > 1e-9 for d in doubled):
        return None
    ratio = out / out.flatten()[0]
    axes = [a for a in range(out.dim() - 1) if out.shape[a] == 3 and bool((ratio.select(a, 0) == 1).all())]
    axes = [a for a in axes if all(torch.allclose(ratio.select(a, k), ratio.new_tensor(k + 1.0)) for k in range(3))]
    if len(axes) != 1:
        return None
    sums: dict[tuple[int, ...], list[tuple[float, Sum]]] = {}
    after = [n for axis, n in enumerate(out.shape[:-1]) if axis != axes[0]]
    for position, source in value.sums.items():
        mark = torch.zeros(shape, dtype=torch.float64)
        at: list[Any] = [*position[: value.batch], slice(None), *position[value.batch :]]
        mark[tuple(at)] = 1
        found = run(mark).movedim(axes[0], 0)
        if not bool((found == found[:1, ..., :1]).all()):
            return None
        for q in itertools.product(*map(range, after)):
            if factor := float(found[(0, *q, 0)]):
                sums.setdefault(q, []).append((factor, source))
    every = {q: added(sums.get(q, [])) for q in itertools.product(*map(range, after))}
    return Vectors(tuple(after), axes[0], every)
