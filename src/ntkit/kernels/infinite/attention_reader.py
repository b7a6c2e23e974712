"""Reading attention whose scores tend to constants, and so to sums over positions with weights of each sample's own.

Scores sum_c q_c(a) k_c(b) / d over the d features of a head tend to E[q(a) k(b)] (Yang 2019, Hron et al. 2020): of
queries and keys in one layer to its covariance, of two independent layers to 0. What follows, softmax or another
function, masks, divisions, is run on these limits; the values are then mixed by known numbers. The scores depend on
their weights, but their gradients vanish with d: the tangent kernel passes through the values alone.
Divided by sqrt(d) instead, the scores stay random, however large d is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkit.kernels.infinite import tape_calls as calls
from ntkit.kernels.infinite.attention_weights import (
    Function,
    Given,
    HeadScores,
    Scale,
    Weighting,
    nothing,
    replayed,
    weights_of,
)
from ntkit.kernels.infinite.channel_parts import part
from ntkit.kernels.infinite.labels import Labels, moves
from ntkit.kernels.infinite.layers import Input, Layer, Mixture, Sum
from ntkit.kernels.infinite.sequence_layers import checked, sequence_value
from ntkit.kernels.infinite.sequence_reader import SequenceReader
from ntkit.kernels.infinite.tape import DROPOUTS, Op, Ref, Tape, dropout_rate
from ntkit.kernels.infinite.tape_calls import arguments, factor_of
from ntkit.kernels.infinite.tape_reader import Curve, DerivedWeight, Weight

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADVICE = (
    "Scores divided by the size d of a head have a limit in closed form, those divided by sqrt(d) stay random at any "
    "width."
)


Move = Callable[[Tensor], Tensor]


def _as_is(t: Tensor) -> Tensor:
    return t


def _turned(t: Tensor) -> Tensor:
    return t.mT


class AttentionReader(SequenceReader):
    """Values may also be scores and what is computed from them."""

    def __init__(self, model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> None:
        super().__init__(model, tape, w_std, b_std)
        self.scales: list[Scale] = []
        self.given: dict[int, Input] = {}
        self.frozen: set[str] = set()  # names of parameters in the scores
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
        if any(isinstance(v, (HeadScores, Weighting)) for v in inputs):
            return self._einsum(op, index) if op.func is torch.einsum else self._of_scores(op, index, inputs)
        if op.func is F.scaled_dot_product_attention:
            return self._fused(op, index)
        if "multi_head_attention" in op.name or "transformer_encoder" in op.name:
            got = f"{op.name}, whose scores are divided by the square root of their features and stay random"
            raise self.refusal(op, got, "Write it with scores over the number of features: these tend to their means.")
        if len(op.refs) == 2 and not any(isinstance(v, (Weight, DerivedWeight)) for v in inputs):
            if op.func is torch.einsum:
                return self._einsum(op, index)
            if op.func in _PRODUCTS and None in inputs:
                return self._of_scores(op, index, inputs)
            if op.func in _PRODUCTS:
                return self._scores(op, self._laid_out(op, op.refs[0]), self._laid_out(op, op.refs[1]))
            if op.func in calls.PRODUCTS and None in inputs:
                return self._masked(op, index)
        return sequence_value(self, op, index)

    # ------------------------------------------------------------------ scores

    def _laid_out(self, op: Op, argument: Any) -> tuple[Any, Labels]:
        if not isinstance(argument, Ref) or not isinstance(self.value(argument), (Layer, Curve)):
            fix = "Put a weight layer before it: its width can grow."
            raise self.refusal(op, f"{op.name} with the input or a constant", fix)
        return self.value(argument), self.of(argument)

    def _scores(self, op: Op, queries: tuple[Any, Labels], keys: tuple[Any, Labels]) -> HeadScores:
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
        if not per_head or not bool((s[..., :, None] == t[..., None, :]).all()):
            raise self.refusal(op, f"{op.name} of different samples or features", "Write q @ k^T for each head.")
        same = torch.equal(c, d)
        terms, products = self._products(op, (q, one), (k, two), same)
        shape = (*s.shape, t.shape[-1])
        rows = one.position[..., 0][..., :, None].expand(shape)
        columns = two.position[..., 0][..., None, :].expand(shape)
        grid = one.positions, two.positions
        return HeadScores(terms, products, a.shape[-1], grid, s[..., None].expand(shape), rows, columns)

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

    def _used(self, op: Op, scores: HeadScores) -> HeadScores:
        """Scores that a function follows: their factors are those of the sum over features."""
        self.scales.append(Scale(op, scores.features, tuple(scores.products)))
        return scores

    # ------------------------------------------------------------------ functions of scores

    def _of_scores(self, op: Op, index: int, inputs: list[Any]) -> Any:
        if op.func in DROPOUTS and dropout_rate(op.args, op.kwargs):
            raise self.refusal(op, "dropout in train mode", "Call model.eval().")
        pairs = list(zip(op.refs, inputs, strict=True))
        found = [(r, v) for r, v in pairs if isinstance(v, (HeadScores, Weighting))] or [
            p for p in pairs if p[1] is None
        ]
        ref, value = found[0]
        if op.func in _PRODUCTS and len(op.refs) == 2 and isinstance(self.value(op.args[1]), (Layer, Curve)):
            weighting = self._weighting(op, ref, value)
            function = replayed(self, weighting, _as_is)
            return self._mixture(op, index, weighting.scores, function, self._laid_out(op, op.args[1]))
        if op.func in _PRODUCTS and isinstance(self.value(op.args[0]), (Layer, Curve)):
            weighting, (layer, labels) = self._weighting(op, ref, value), self._laid_out(op, op.args[0])
            values = layer, labels.moved(labels.ids.mT)
            return self._mixture(op, index, weighting.scores, replayed(self, weighting, _turned), values, _turned)
        if isinstance(value, HeadScores) and len(op.refs) == 1:
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
            if isinstance(v, (Layer, Curve, DerivedWeight)):
                raise self.refusal(op, f"{op.name} of scores and {type(v).__name__.lower()}", _ADVICE)
            if isinstance(v, Weight):
                if v.parameter.requires_grad:
                    got = f"the trained parameter '{v.name}' in the scores"
                    raise self.refusal(op, got, "Freeze it with requires_grad_(False): its gradients do not vanish.")
                self.frozen.add(v.name)
            if v is None:
                self._datum(op, r.index)
        assert start is not None
        first = next(v for v in (self._weighting(op, r, v) for r, v in found))
        return Weighting(first.scores, start, sorted({*steps, index}))

    def _weighting(self, op: Op, ref: Ref, value: Any) -> Weighting:
        if isinstance(value, Weighting):
            return value
        if value is None:
            self._datum(op, ref.index)
            return Weighting(nothing(), ref.index)
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
                self.frozen.add(value.name)
                mask = self.tape.ops[mask.index].out.detach()
            elif value is None:
                self._datum(op, mask.index)
            else:
                raise self.refusal(op, "a mask that is trained or computed by layers", "Use a constant mask.")

        def function(s: Tensor, given: dict[int, Tensor]) -> Tensor:
            bias = given[mask.index] if isinstance(mask, Ref) else mask
            if args["is_causal"]:
                s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(), -math.inf)
            if bias is not None:
                bias = torch.as_tensor(bias).to(s.device)
                s = s.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else s + bias
            return s.softmax(-1)

        return self._mixture(op, index, scores, function, values)

    # ------------------------------------------------------------------ mixtures

    def _mixture(
        self,
        op: Op,
        index: int,
        scores: HeadScores,
        function: Function,
        values: tuple[Any, Labels],
        back: Move = _as_is,
    ) -> Layer:
        """Values [..., keys, features] in sums over keys; `back` arranges [..., queries, features] as the call does."""
        value, labels = values
        ids, channel, position, sample = labels.ids, labels.channel, labels.position, labels.sample
        flat = channel[..., :1, :].expand_as(ids), position[..., :1].expand_as(ids), sample[..., :1, :1].expand_as(ids)
        if not all(map(torch.equal, flat, (channel, position, sample))):
            raise self.refusal(op, "values of several positions or features in one sum", "Mix positions alone.")
        weights, new = weights_of(self, op, scores, function, list(self.given), labels)
        layer = self.layer(value)
        size = layer.size if new == labels.positions else (1, new)
        terms = [(factor * scores.features, term) for factor, term in scores.terms]
        mixture = Mixture(size, self.where(op), layer, terms, list(self.given.values()), scores.grid, weights)
        self.add(mixture, [layer])
        out = Labels.at(sample[..., :1, :1], channel[..., :1, :], torch.arange(new)[:, None], labels.channels, new)
        self.labels[index] = out.moved(back(out.ids.expand(*ids.shape[:-2], new, ids.shape[-1])))
        return mixture

    def _einsum(self, op: Op, index: int) -> Any:
        """Products of two values over one axis, for each of the axes that both and the result have."""
        equation, *operands = op.args[0], *(op.args[1] if isinstance(op.args[1], (list, tuple)) else op.args[1:])
        found = re.fullmatch(r"(\w+),(\w+)->(\w+)", str(equation).replace(" ", ""))
        if found is None or len(operands) != 2:
            raise self.refusal(op, f"einsum '{equation}'", "Write two operands and the result, without an ellipsis.")
        one, two, out = found.groups()
        if isinstance(self.value(operands[1]), (HeadScores, Weighting)) or self.value(operands[1]) is None:
            (one, two), operands = (two, one), operands[::-1]
        shared = [c for c in one if c in two and c in out]
        summed = [c for c in one if c in two and c not in out]
        rows, columns = ([c for c in out if c in s and c not in shared] for s in (one, two))
        once = len(set(one)) == len(one) == len(shared) + 2 == len(two) == len(set(two))
        if not once or list(map(len, (summed, rows, columns))) != [1, 1, 1]:
            fix = "Sum over one axis of queries and keys, or of weights and values."
            raise self.refusal(op, f"einsum '{equation}'", fix)
        first = lambda t: t.permute([one.index(c) for c in (*shared, *rows, *summed)])
        second = lambda t: t.permute([two.index(c) for c in (*shared, *summed, *columns)])
        inner = [*shared, *rows, *columns]
        back = lambda t: t.permute([inner.index(c) for c in out])
        value, labels = self._laid_out(op, operands[1])
        keys = value, labels.moved(second(labels.ids))
        start = self.value(operands[0])
        if isinstance(start, (Layer, Curve)):
            own = self.of(operands[0])
            scores = self._scores(op, (start, own.moved(first(own.ids))), keys)
            return replace(scores, **{name: back(getattr(scores, name)) for name in ("sample", "rows", "columns")})
        weighting = self._weighting(op, operands[0], start)
        return self._mixture(op, index, weighting.scores, replayed(self, weighting, first), keys, back)

    def _masked(self, op: Op, index: int) -> Layer:
        """A layer times numbers of the input, one for each position of a sample, or divided by them."""
        ref, by = op.refs if self.values[op.refs[0].index] is not None else op.refs[::-1]
        labels, out, factors = self.of(ref), op.out, self.tape.ops[by.index].out
        value = self.values[ref.index]
        if tuple(labels.ids.shape) != tuple(out.shape) or (op.func in calls.DIVISIONS and by is op.refs[0]):
            raise self.refusal(op, f"{op.name} of the input and a layer", "Multiply by one number per position.")
        self._datum(op, by.index)
        divided = op.func in calls.DIVISIONS

        def table(given: Given) -> Tensor:
            numbers = given[by.index].double()
            numbers = (1 / numbers if divided else numbers).expand(out.shape)
            found = numbers.new_zeros(3, labels.positions)
            found[labels.sample, labels.position] = numbers
            return found

        numbers = table({by.index: factors})
        wanted = (1 / factors.double() if divided else factors.double()).expand(out.shape)
        if not torch.equal(numbers[labels.sample, labels.position], wanted):
            got = f"{op.name} of a layer and numbers of the input that differ between its features"
            raise self.refusal(op, got, "Multiply by one number per position.")
        samples, positions = torch.arange(3)[:, None, None], torch.arange(labels.positions)[:, None]
        whole = Labels.at(samples, torch.zeros(1, dtype=torch.long), positions, 1, labels.positions)
        diagonal = lambda s, given: torch.diag_embed(table(given))
        weights, _ = weights_of(self, op, nothing(), diagonal, list(self.given), whole)
        layer = self.layer(value)
        mixture = Mixture(layer.size, self.where(op), layer, [], list(self.given.values()), (1, 1), weights)
        self.labels[index] = labels
        return self.add(mixture, [layer])
