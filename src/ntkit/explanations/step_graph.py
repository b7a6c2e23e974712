"""The graph of a step's gradient, and products of vectors with the gradient's derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import outputs_of
from ntkit.base.checks import Refused, refusal
from ntkit.explanations.embedding_lookups import find_lookups
from ntkit.jacobian.graph import correct_norms, nodes_behind, nodes_from, own_functions, saved_numbers
from ntkit.jacobian.model_calls import PlainWeightNorm
from ntkit.trajectory.replay import Replay, ReplayStep

_NUMBERS = 2**21  # that the graphs of test points in one pass may keep: more of them are not faster, and take memory
_AT_ONCE = 20  # test points in one pass, at most
_FEW = 4  # in one pass they are no faster than one by one

Input = Any  # Tensor | torch.autograd.graph.GradientEdge: of a derivative


class StepGraph:
    """The graph of a step's weighted gradient G(theta, w), for products with its derivatives.

    Of an embedding only the rows that the batch looks up take part, where its weight has no other use: gradients and
    vectors are then [r, d] for these r rows.

    Attributes
    ----------
    gradients : G by parameter, before clipping; without those that have none.
    rows : parameter -> the rows that take part, int64 [r]; only of such embeddings.
    at_once : vectors that are sent back in one pass.
    numbers : that one vector's pass keeps or changes: the work, roughly.
    """

    def __init__(self, model: nn.Module, step: ReplayStep, replay: Replay, weights: Tensor, gauss_newton: bool) -> None:
        own = dict(model.named_parameters())
        params = {name: own[name] for name in replay.names}
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(step.before[name])
        with torch.enable_grad():
            with PlainWeightNorm():
                outputs = outputs_of(model, step.x)
            values = outputs.detach().clone().requires_grad_() if gauss_newton else None
            at = outputs if values is None else values
            loss = replay.objective.loss(at.clone(), step.y)  # which may overwrite what it gets
            if not replay.is_loop:
                correct_norms(outputs)
            weights = weights.to(outputs).requires_grad_()
            factors = weights.view(-1, *[1] * (outputs.dim() - 1))
            (slope,) = torch.autograd.grad(loss, at, create_graph=True)
            self._values, self._slope = values, slope * factors
            cotangent = self._slope if values is None else self._slope.detach().clone().requires_grad_()
            self._lookups = find_lookups(outputs, params)
            self._inputs: dict[str, list[Input]] = {name: [p] for name, p in params.items()}
            self._inputs |= {name: [*lookups.edges] for name, lookups in self._lookups.items()}
            self._every = [t for inputs in self._inputs.values() for t in inputs]
            found = torch.autograd.grad(outputs, self._every, cotangent, create_graph=True, allow_unused=True)
        self._outputs, self._weights, self._cotangent = outputs, weights, cotangent
        self._graph = {name: own for name, own in self._by_name(found).items() if any(g is not None for g in own)}
        for name, own in self._graph.items():
            self._graph[name] = [_zeros(t) if g is None else g for t, g in zip(self._inputs[name], own, strict=True)]
        self.gradients = {
            name: self._joined(name, [g.detach()[None] for g in own])[0] for name, own in self._graph.items()
        }
        self.rows = {name: lookups.rows for name, lookups in self._lookups.items()}
        saved = saved_numbers(outputs)
        self.numbers = saved + sum(p.numel() for p in params.values())
        at_once = min(_AT_ONCE, _NUMBERS // (saved + 1))
        self.at_once = at_once if at_once >= _FEW else 1

    def products(self, vectors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """H C by parameter, [k, *shape], and d <C, G> / d w, [k, B], for k vectors C; for some parameters' G alone."""
        k = len(next(iter(vectors.values())))
        sources, cotangents = [], []
        for name, own in self._graph.items():
            if name not in vectors:
                continue
            looked_up = self._lookups[name].gathered(vectors[name]) if name in self._lookups else [vectors[name]]
            for g, cotangent in zip(own, looked_up, strict=True):
                if g.requires_grad:
                    sources.append(g)
                    cotangents.append(cotangent)
        try:
            if self._values is None:
                *back, scores = self._pulled(sources, [*self._every, self._weights], cotangents, k)
            else:
                (along,) = self._pulled(sources, [self._cotangent], cotangents, k)  # J C, [k, B, ...]
                curved, scores = self._pulled([self._slope], [self._values, self._weights], [along], k)
                back = self._pulled([self._outputs], self._every, [curved], k)
        except RuntimeError as error:
            if "derivative for" not in str(error):
                raise
            raise _once(str(error).replace("\n", " ")) from error
        return {name: self._joined(name, own) for name, own in self._by_name(back).items()}, scores

    def _by_name(self, values: Sequence[Any]) -> dict[str, list[Any]]:
        """Values for all inputs of the graph, one list for each parameter."""
        each = iter(values)
        return {name: [next(each) for _ in inputs] for name, inputs in self._inputs.items()}

    def _joined(self, name: str, values: list[Tensor]) -> Tensor:
        """Derivatives [k, ...] by a parameter, or by its rows, from those by the inputs of the graph."""
        return self._lookups[name].summed(values) if name in self._lookups else values[0]

    def check(self) -> None:
        """Refuse a function marked as differentiable only once: PyTorch leaves out what lies behind it, silently."""
        starts = {g.grad_fn for own in self._graph.values() for g in own if g.grad_fn is not None}
        if any(node.name() == "torch::autograd::Error" for start in starts for node in nodes_from(start)):
            raise _once(", ".join(own_functions(nodes_behind(self._outputs))) or "a function of its own")

    def _pulled(self, sources: list[Tensor], inputs: Sequence[Input], vectors: list[Tensor], k: int) -> list[Tensor]:
        """Products of k vectors with the derivative of `sources` by `inputs`, [k, *shape] each; else zeros."""
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        batched = self.at_once > 1 and k > 1
        rows: list[Any] = []
        if batched and sources:
            try:
                rows = [torch.autograd.grad(sources, inputs, vectors, is_grads_batched=True, **options)]
            except RuntimeError:  # a node without a rule for many vectors
                self.at_once, batched = 1, False
        if not batched and sources:
            rows = [torch.autograd.grad(sources, inputs, [v[i] for v in vectors], **options) for i in range(k)]
        found = []
        for place, t in enumerate(inputs):
            column = [row[place] for row in rows if row[place] is not None]
            total = _zeros(t, k) if not column else column[0] if batched else torch.stack(column)
            found.append(total)
        return found


def _zeros(t: Input, *lead: int) -> Tensor:
    """Zeros [*lead, ...] of a tensor's shape, or of that of a value in the graph."""
    like = t if isinstance(t, Tensor) else t.node._input_metadata[t.output_nr]
    return torch.zeros(*lead, *like.shape, dtype=like.dtype, device=like.device)


def _once(what: str) -> Refused:
    got = f"an operation that PyTorch can differentiate only once ({what})"
    fix = "Write that layer with operations that have a second derivative."
    return refusal("the network", got=got, expected="operations that can be differentiated twice", fix=fix)
