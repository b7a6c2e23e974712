"""Reading attention whose scores tend to constants, and so to sums over positions with weights of each sample's own.

Scores sum_c q_c(a) k_c(b) / d over the d features of a head tend to E[q(a) k(b)] (Yang 2019, Hron et al. 2020): of
queries and keys in one layer to its covariance, of two independent layers to 0. What follows, softmax or another
function, masks, divisions, is run on these limits; the values are then mixed by known numbers. The scores depend on
their weights, but their gradients vanish with d: the tangent kernel passes through the values alone.
Divided by sqrt(d) instead, the scores stay random, however large d is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ntkit.kernels.infinite import tape_calls as calls
from ntkit.kernels.infinite.labels import Labels, moves
from ntkit.kernels.infinite.layers import Input, Layer, Mixture, Sum
from ntkit.kernels.infinite.channel_parts import part
from ntkit.kernels.infinite.sequence_reader import SequenceReader, checked, sequence_value
from ntkit.kernels.infinite.tape import DROPOUTS, Op, Ref, Tape, dropout_rate
from ntkit.kernels.infinite.tape_calls import arguments, factor_of
from ntkit.kernels.infinite.tape_reader import Curve, DerivedWeight, Weight

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADVICE = (
    "Scores divided by the size d of a head have a limit in closed form, those divided by sqrt(d) stay random at any "
    "width."
)


class Scale(NamedTuple):
    """Of the scores of one call: the number of features that they sum, and the factors of the sum."""

    op: Op
    features: int
    factors: tuple[float, ...]


@dataclass
class Scores:
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

    def moved(self, places: Tensor) -> Scores:
        """Other of the scores, by their flat indices."""
        sample, rows, columns = (t.flatten()[places] for t in (self.sample, self.rows, self.columns))
        return replace(self, sample=sample, rows=rows, columns=columns)

    def times(self, factor: float) -> Scores:
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

    scores: Scores | None
    start: int
    steps: list[int] = field(default_factory=list)


class AttentionReader(SequenceReader):
    """Values may also be scores and what is computed from them."""

    def __init__(self, model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> None:
        super().__init__(model, tape, w_std, b_std)
        self.scales: list[Scale] = []
        self.given: dict[int, Input] = {}
        self._weightings: dict[int, Weighting] = {}

    def read(self) -> None:
        """The values of all calls."""
        for index, op in enumerate(self.tape.ops[1:], start=1):
            if index in self.tape.parameters:
                name, parameter = self.tape.parameters[index]
                self.values[index] = Weight(parameter, 1.0, name)
            else:
                self.values[index] = self._value(op, index)

    def _value(self, op: Op, index: int) -> Any:
        inputs = [self.values[r.index] for r in op.refs]
        checked(self, op)
        if all(v is None for v in inputs):
            if op.in_place:
                raise self.refusal(op, "the input changed in place", "Write it without in-place operations.")
            return None
        if any(isinstance(v, (Scores, Weighting)) for v in inputs):
            return self._of_scores(op, index, inputs)
        if op.func is F.scaled_dot_product_attention:
            return self._fused(op, index)
        if op.func in _PRODUCTS and len(op.refs) == 2:
            one, two = op.refs
            if all(isinstance(self.values[r.index], (Layer, Curve)) for r in op.refs):
                return self._scores(op, self._laid_out(op, one), self._laid_out(op, two))
        return sequence_value(self, op, index)

    # ------------------------------------------------------------------ scores

    def _laid_out(self, op: Op, argument: Any) -> tuple[Any, Labels]:
        if not isinstance(argument, Ref) or not isinstance(self.value(argument), (Layer, Curve)):
            fix = "Put a weight layer before it: its width can grow."
            raise self.refusal(op, f"{op.name} with the input or a constant", fix)
        return self.value(argument), self.of(argument)

    def _scores(self, op: Op, queries: tuple[Any, Labels], keys: tuple[Any, Labels]) -> Scores:
        """Of queries [..., a, features] and keys [..., features, b]."""
        (q, one), (k, two) = queries, keys
        a, b = one.ids, two.ids.transpose(-1, -2)  # rows of features
        if a.shape[-1] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
            raise self.refusal(op, f"scores of shapes {tuple(a.shape)} and {tuple(b.shape)}", "Write q @ k^T.")
        one, two = one.moved(a), two.moved(b)
        for labels in (one, two):
            for t in (labels.sample, labels.position):
                if not torch.equal(t, t[..., :1].expand_as(t)):
                    fix = "Sum over the features of each position."
                    raise self.refusal(op, f"{op.name} over positions or samples", fix)
        c, d = one.channel[..., :1, :], two.channel[..., :1, :]
        s, t = one.sample[..., 0], two.sample[..., 0]
        per_head = torch.equal(one.channel, c.expand_as(a)) and torch.equal(two.channel, d.expand_as(b))
        if not per_head or not torch.equal(s[..., :, None].expand(*s.shape, t.shape[-1]), t[..., None, :].expand(*s.shape, t.shape[-1])):
            raise self.refusal(op, f"{op.name} of different samples or features", "Write q @ k^T for each head.")
        same = torch.equal(c, d)
        terms, products = self._products(op, (q, one), (k, two), same)
        shape = (*s.shape, t.shape[-1])
        rows = one.position[..., 0][..., :, None].expand(shape)
        columns = two.position[..., 0][..., None, :].expand(shape)
        grid = one.positions, two.positions
        return Scores(terms, products, a.shape[-1], grid, s[..., None].expand(shape), rows, columns)

    def _products(
        self, op: Op, queries: tuple[Any, Labels], keys: tuple[Any, Labels], same: bool
    ) -> tuple[list[tuple[float, Layer]], list[float]]:
        """E[q k] as factors times covariances of layers with themselves, and all factors."""
        sides = []
        for value, labels in (queries, keys):
            indices = tuple(sorted(set(labels.channel.flatten().tolist())))
            whole = len(indices) == labels.channels
            factor = value.factor if isinstance(value, Curve) and value.function is None else 1.0
            base = value.source if isinstance(value, Curve) and value.function is None else value
            if not whole and not same:
                base = part(self, op, base, indices, labels.channels)
            layer = self.layer(base)
            inner = layer.terms if isinstance(layer, Sum) else [(1.0, layer)]
            sides.append([(factor * f, t) for f, t in inner])
        if not same and any(t is u for _, t in sides[0] for _, u in sides[1]):
            fix = "Take the same features in the same order, or layers of their own."
            raise self.refusal(op, "queries and keys that are the features of one layer in another order", fix)
        terms = []
        for f, t in sides[0]:
            for g, u in sides[1]:
                if t is u:
                    terms.append((f * g, t))
                else:
                    self.check_uncorrelated(op, t, u)
        return terms, [f * g for f, _ in sides[0] for g, _ in sides[1]]

    def _used(self, op: Op, scores: Scores) -> Scores:
        """Scores that a function follows: their factors are those of the sum over features."""
        self.scales.append(Scale(op, scores.features, tuple(scores.products)))
        return scores

    # ------------------------------------------------------------------ functions of scores

    def _of_scores(self, op: Op, index: int, inputs: list[Any]) -> Any:
        if op.func in DROPOUTS and dropout_rate(op.args, op.kwargs):
            raise self.refusal(op, "dropout in train mode", "Call model.eval().")
        found = [(r, v) for r, v in zip(op.refs, inputs, strict=True) if isinstance(v, (Scores, Weighting))]
        ref, value = found[0]
        if op.func in _PRODUCTS and len(op.refs) == 2 and isinstance(self.value(op.args[1]), (Layer, Curve)):
            return self._mixed(op, index, self._weighting(op, ref, value), self._laid_out(op, op.args[1]))
        if op.func in _PRODUCTS and isinstance(self.value(op.args[0]), (Layer, Curve)):
            return self._mixed(op, index, self._weighting(op, ref, value), self._laid_out(op, op.args[0]), True)
        if isinstance(value, Scores) and len(op.refs) == 1:
            if op.func in calls.PRODUCTS | calls.NEGATIONS and (factor := factor_of(op)) is not None:
                return value.times(factor)
            if (places := moves(op, self.tape.ops[ref.index].out)) is not None:
                return value.moved(places)
        steps, start = set[int](), None
        for r, v in found:
            of = self._weighting(op, r, v)
            if start not in (None, of.start):
                got = f"{op.name} of the scores of several calls"
                raise self.refusal(op, got, "Sums of scores are not built: use one product of queries and keys.")
            start = of.start
            steps |= set(of.steps)
        for r, v in zip(op.refs, inputs, strict=True):
            if isinstance(v, (Layer, Curve)) or (isinstance(v, DerivedWeight)):
                raise self.refusal(op, f"{op.name} of scores and {type(v).__name__.lower()}", _ADVICE)
            if isinstance(v, Weight) and v.parameter.requires_grad:
                got = f"the trained parameter '{v.name}' in the scores"
                raise self.refusal(op, got, "Freeze it with requires_grad_(False): its gradients do not vanish.")
            if v is None:
                self._datum(op, r.index)
        assert start is not None
        first = next(v for v in (self._weighting(op, r, v) for r, v in found))
        return Weighting(first.scores, start, sorted({*steps, index}))

    def _weighting(self, op: Op, ref: Ref, value: Any) -> Weighting:
        if isinstance(value, Weighting):
            return value
        if ref.index not in self._weightings:
            self._weightings[ref.index] = Weighting(self._used(op, value), ref.index)
        return self._weightings[ref.index]

    def _datum(self, op: Op, index: int) -> None:
        """A value of the input on which the weights depend, as an input of its own."""
        out = self.tape.ops[index].out
        if out.shape[:1] != (3,):
            got = f"weights that depend on a value of shape {tuple(out.shape)}, computed from the input"
            raise self.refusal(op, got, "Compute masks of each sample as [n, ...], constant ones from constants.")
        if index not in self.given:
            flat = lambda t: t.flatten(1).double()
            self.given[index] = self.moved_input(op, index, flat, (1, 1), out[0].numel())
            self.given[index].as_given = True

    def _fused(self, op: Op, index: int) -> Layer:
        """`F.scaled_dot_product_attention`."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        args = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None} | arguments(op, *names)
        if args["dropout_p"] or args.get("enable_gqa"):
            raise self.refusal(op, "dropout_p, or enable_gqa", "Call it without them.")
        if not all(isinstance(self.value(args[name]), (Layer, Curve)) for name in names[:3]):
            raise self.refusal(op, "attention of the input itself", "Put a weight layer before it.")
        (q, one), (k, two), values = (self._laid_out(op, args[name]) for name in names[:3])
        scores = self._scores(op, (q, one), (k, two.moved(two.ids.transpose(-1, -2))))
        scale = 1 / math.sqrt(scores.features) if args["scale"] is None else float(args["scale"])
        scores, mask = self._used(op, scores.times(scale)), args["attn_mask"]
        if isinstance(mask, Ref):
            value = self.values[mask.index]
            if isinstance(value, Weight) and not value.parameter.requires_grad:
                mask = value.parameter.detach() * value.factor
            elif value is None:
                self._datum(op, mask.index)
            else:
                raise self.refusal(op, "a mask that is trained or computed by layers", "Use a constant mask.")

        def function(s: Tensor, given: dict[int, Tensor]) -> Tensor:
            bias = given[mask.index] if isinstance(mask, Ref) else mask
            if args["is_causal"]:
                s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(), -math.inf)
            if bias is not None:
                bias = bias.to(s.device)
                s = s.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else s + bias
            return s.softmax(-1)

        return self._mixture(op, index, scores, function, values, False)

    # ------------------------------------------------------------------ mixtures

    def _mixed(
        self, op: Op, index: int, weighting: Weighting, values: tuple[Any, Labels], before: bool = False
    ) -> Layer:
        """Weights [..., a, b] times values [..., b, features], or values [..., features, b] times weights [..., b, a]."""
        scores = weighting.scores
        assert scores is not None

        def function(s: Tensor, given: dict[int, Tensor]) -> Tensor:
            found = {weighting.start: s, **given}

            def argument(a: Any) -> Any:
                if isinstance(a, Ref):
                    value = self.values[a.index]
                    if isinstance(value, Weight):
                        return (value.parameter.detach() * value.factor).to(s)
                    return found[a.index]
                if isinstance(a, Tensor):
                    return a.to(s) if a.is_floating_point() else a.to(s.device)
                return s.dtype if isinstance(a, torch.dtype) and a.is_floating_point else a

            for step in weighting.steps:
                call = self.tape.ops[step]
                args, kwargs = tree_map(argument, (call.args, call.kwargs))
                found[step] = call.func(*args, **kwargs)
            last = weighting.steps[-1] if weighting.steps else weighting.start
            return found[last].mT if before else found[last]

        if before:
            values = values[0], values[1].moved(values[1].ids.transpose(-1, -2))
        return self._mixture(op, index, scores, function, values, before)

    def _mixture(
        self,
        op: Op,
        index: int,
        scores: Scores,
        function: Callable[[Tensor, dict[int, Tensor]], Tensor],
        values: tuple[Any, Labels],
        turned: bool,
    ) -> Layer:
        value, labels = values
        ids = labels.ids  # [..., b, features]
        channel, position, sample = labels.channel, labels.position, labels.sample
        flat = channel[..., :1, :].expand_as(ids), position[..., :1].expand_as(ids), sample[..., :1, :1].expand_as(ids)
        if not all(map(torch.equal, flat, (channel, position, sample))):
            raise self.refusal(op, "values of several positions or features in one sum", "Mix positions alone.")
        places, owner = position[..., 0], sample[..., 0, 0]  # [..., b], [...]
        given = list(self.given.items())
        like = {i: self.tape.ops[i].out for i, _ in given}
        grid = labels.positions

        def three(s: Tensor, data: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
            """Maps of three samples, [heads x samples, a, positions], and which sample each belongs to."""
            weights = function(scores.at(s), data)
            if weights.shape[:-2] != places.shape[:-1] or weights.shape[-1] != places.shape[-1]:
                shapes = f"weights of shape {tuple(weights.shape)} for values of shape {tuple(ids.shape)}"
                raise self.refusal(op, shapes, "Give weights and values the same heads.")
            maps = weights.new_zeros(*weights.shape[:-1], grid)
            maps.scatter_add_(-1, places.to(s.device)[..., None, :].expand(weights.shape), weights)
            return maps.flatten(0, -3), owner.flatten()

        heads = [int((owner.flatten() == s).nonzero()[0]) for s in range(3)]
        z = torch.randn(3, *scores.grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        maps, of = three(z, like)
        different = any(not torch.allclose(m, maps[heads[int(s)]], rtol=1e-12) for m, s in zip(maps, of, strict=True))
        if different:
            raise self.refusal(op, "heads with different masks or functions", "Use the same in all heads.")

        def by_threes(s: Tensor, data: list[Tensor]) -> Tensor:
            found = []
            for start in range(0, len(s), 3):  # three at a time, as the network was run
                which = torch.arange(start, start + 3).clamp(max=len(s) - 1)
                some = {i: _like(t[which], like[i], s) for (i, _), t in zip(given, data, strict=True)}
                found.append(three(s[which], some)[0][heads][: len(s) - start])
            return torch.cat(found)

        def at_once(s: Tensor, data: list[Tensor]) -> Tensor:
            some = {i: _like(t, like[i], s) for (i, _), t in zip(given, data, strict=True)}
            return function(s.reshape(len(s), *[1] * (owner.dim() - 1), *s.shape[1:]), some).reshape(len(s), -1, grid)

        weights = at_once if _agree(at_once, by_threes, scores.grid, [like[i].flatten(1) for i, _ in given]) else by_threes
        layer, new = self.layer(value), maps.shape[1]
        size = layer.size if new == grid else (1, new)
        inputs = [layer_of for _, layer_of in given]
        mixture = Mixture(size, self.where(op), layer, list(self._terms(scores)), inputs, scores.grid, weights)
        self.add(mixture, [layer])
        out = Labels.at(
            sample[..., :1, :1], channel[..., :1, :], torch.arange(new)[:, None], labels.channels, new
        )
        ids = out.ids.expand(*owner.shape, new, ids.shape[-1])
        self.labels[index] = out.moved(ids.transpose(-1, -2) if turned else ids)
        return mixture

    def _terms(self, scores: Scores) -> list[tuple[float, Layer]]:
        return [(factor * scores.features, layer) for factor, layer in scores.terms]


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
