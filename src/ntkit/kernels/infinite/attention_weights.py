"""Weights of attention as functions of the limits of its scores: the network's own calls, run on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ntkit.kernels.infinite.labels import Labels
from ntkit.kernels.infinite.layers import Layer
from ntkit.kernels.infinite.sequence_reader import SequenceReader
from ntkit.kernels.infinite.tape import Op, Ref
from ntkit.kernels.infinite.tape_reader import Weight

Given = dict[int, Tensor]  # values of the input by their index on the tape
Function = Callable[[Tensor, Given], Tensor]  # of scores in the layout of their call
Weights = Callable[[Tensor, list[Tensor]], Tensor]  # scores [n, P, Q], values of the input -> [n, positions, positions]


class Scale(NamedTuple):
    """Of the scores of one call: the number of features that they sum, and the factors of the sum."""

    op: Op
    features: int
    factors: tuple[float, ...]


@dataclass
class HeadScores:
    """Products of queries and keys, summed over features: their limit is a sum of covariances between positions.

    terms : factors and layers, before `features`.
    products : factors of all products, of independent layers, too.
    rows, columns, sample : positions and sample of each score, in the shape of the value.
    """

    terms: list[tuple[float, Layer]]
    products: list[float]
    features: int
    grid: tuple[int, int]
    sample: Tensor
    rows: Tensor
    columns: Tensor

    def moved(self, places: Tensor) -> HeadScores:
        """Other of the scores, by their flat indices."""
        sample, rows, columns = (t.flatten()[places] for t in (self.sample, self.rows, self.columns))
        return replace(self, sample=sample, rows=rows, columns=columns)

    def times(self, factor: float) -> HeadScores:
        """All scores times a number."""
        terms = [(factor * f, layer) for f, layer in self.terms]
        return replace(self, terms=terms, products=[factor * f for f in self.products])

    def at(self, whole: Tensor) -> Tensor:
        """The value of scores [3, P, Q]."""
        return whole[self.sample, self.rows, self.columns]


@dataclass
class Weighting:
    """What a network computes from scores alone, or from its input: calls to be run on the scores' limits.

    start : the scores' call on the tape.
    steps : the calls behind it.
    """

    scores: HeadScores
    start: int
    steps: list[int] = field(default_factory=list)


def nothing() -> HeadScores:
    """The scores of weights that depend on the input alone."""
    zero = torch.zeros((), dtype=torch.long)
    return HeadScores([], [], 0, (1, 1), zero, zero, zero)


def replayed(reader: SequenceReader, weighting: Weighting, lay: Callable[[Tensor], Tensor]) -> Function:
    """The calls between scores and their use, once more; `lay` arranges the result as [..., queries, keys]."""

    def function(s: Tensor, given: Given) -> Tensor:
        found = {weighting.start: s, **given}

        def argument(a: Any) -> Any:
            if isinstance(a, Ref):
                if isinstance(reader.values[a.index], Weight):  # as it was indexed or turned
                    return reader.tape.ops[a.index].out.detach().to(s)
                return found[a.index]
            if isinstance(a, Tensor):
                return a.to(s) if a.is_floating_point() else a.to(s.device)
            return s.dtype if isinstance(a, torch.dtype) and a.is_floating_point else a

        for step in weighting.steps:
            call = reader.tape.ops[step]
            args, kwargs = tree_map(argument, (call.args, call.kwargs))
            found[step] = call.func(*args, **kwargs)
        return lay(found[weighting.steps[-1] if weighting.steps else weighting.start])

    return function


def weights_of(
    reader: SequenceReader, op: Op, scores: HeadScores, function: Function, given: list[int], values: Labels
) -> tuple[Weights, int]:
    """Weights of all samples between new positions and those of values [..., keys, features]; how many are new.

    Raises
    ------
    Refused
        For heads whose weights differ, and weights that depend on other samples.
    """
    places, owner = values.position[..., 0], values.sample[..., 0, 0]  # [..., keys], [...]
    like = {i: reader.tape.ops[i].out for i in given}
    heads = [int((owner.flatten() == s).nonzero()[0]) for s in range(3)]

    def three(s: Tensor, data: Given) -> Tensor:
        """Of three samples, [heads x samples, queries, positions]."""
        weights = function(scores.at(s), data).to(s)
        if weights.shape[:-2] != places.shape[:-1] or weights.shape[-1] != places.shape[-1]:
            shapes = f"weights of shape {tuple(weights.shape)} for values of shape {tuple(values.ids.shape)}"
            raise reader.refusal(op, shapes, "Give weights and values the same heads.")
        maps = weights.new_zeros(*weights.shape[:-1], values.positions)
        maps.scatter_add_(-1, places.to(s.device)[..., None, :].expand(weights.shape), weights)
        return maps.flatten(0, -3)

    def by_threes(s: Tensor, data: list[Tensor]) -> Tensor:
        found = []
        for start in range(0, len(s), 3):  # three at a time, as the network was run
            which = torch.arange(start, start + 3).clamp(max=len(s) - 1)
            some = {i: _like(t[which], like[i], s) for i, t in zip(given, data, strict=True)}
            found.append(three(s[which], some)[heads][: len(s) - start])
        return torch.cat(found)

    def at_once(s: Tensor, data: list[Tensor]) -> Tensor:
        some = {i: _like(t, like[i], s) for i, t in zip(given, data, strict=True)}
        laid_out = s.reshape(len(s), *[1] * (owner.dim() - 1), *s.shape[1:])
        return function(laid_out, some).to(s).reshape(len(s), -1, values.positions)

    data = [like[i].flatten(1).double() for i in given]
    new = _check_heads(reader, op, three, owner.flatten(), heads, scores.grid, like)
    return (at_once if _agree(at_once, by_threes, scores.grid, data) else by_threes), new


def _check_heads(
    reader: SequenceReader,
    op: Op,
    three: Callable[[Tensor, Given], Tensor],
    owner: Tensor,
    heads: list[int],
    grid: tuple[int, int],
    like: Given,
) -> int:
    """All heads of a sample must have the same weights, and these must depend on its own scores and input alone."""
    generator = torch.Generator().manual_seed(0)
    s, other = (torch.randn(3, *grid, generator=generator, dtype=torch.float64) for _ in range(2))
    maps = three(s, like)
    if any(not torch.allclose(m, maps[heads[int(of)]], rtol=1e-12) for m, of in zip(maps, owner, strict=True)):
        raise reader.refusal(op, "heads with different masks or functions", "Use the same in all heads.")
    for sample in range(3):
        changed = torch.where(torch.arange(3)[:, None, None] == sample, s, other)
        turned = {i: torch.stack([t[k] if k == sample else t[sample - k] for k in range(3)]) for i, t in like.items()}
        if not torch.equal(three(changed, turned)[heads[sample]], maps[heads[sample]]):
            raise reader.refusal(op, "weights that depend on other samples", "Compute them from each sample alone.")
    return maps.shape[1]


def _like(data: Tensor, out: Tensor, scores: Tensor) -> Tensor:
    """Values of the input in the shape and kind of a call's output, for other samples."""
    return data.reshape(len(data), *out.shape[1:]).to(scores if out.is_floating_point() else out.dtype)


def _agree(one: Any, two: Any, grid: tuple[int, int], data: list[Tensor]) -> bool:
    """Whether two ways to compute weights do the same, for three samples and for two, on random scores."""
    s = 3 * torch.randn(3, *grid, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for count in (3, 2):
        some = [t[:count].double() for t in data]
        try:
            found, wanted = one(s[:count], some), two(s[:count], some)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-12, atol=1e-14, equal_nan=True):
            return False
    return True
