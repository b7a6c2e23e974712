"""The derivative of a trained network with respect to its examples' weights: the run, differentiated from its end.

With w_i a factor on the gradient through example i's outputs, a step is

    G = sum_i w_i J_i(theta_s)^T slope_i(theta_s),  g = G clipped,  d = +-g + coupled theta_s,
    b' = carry b + entering d,  theta' = theta_s - direct d - buffered b' - decoupled theta_s,

(`Update`; for Adam `buffered` depends on its second moments q' = beta2 q + (1 - beta2) d^2). Let V, M, Q be the
derivatives of a measure of the trained network by theta', b', q'. One step backwards:

    M += - buffered V,  Q += V rate b' / (root^2 2 sqrt(q' correction))
    D = entering M - direct V + 2 (1 - beta2) d Q                    derivative by d
    C = the derivative by G: D through sign and clipping             a vector like the parameters, for each measure
    score_i += <C, J_i^T slope_i> for the examples of the batch      d measure / d w_i
    V <- (1 - decoupled) V + coupled D + H C,  M <- carry M,  Q <- beta2 Q

with H C = d <C, G> / d theta, so memory is (test points x parameters). Both <C, J_i^T slope_i> = d <C, G> / d w_i and
H C come out of one backward pass through the graph of G. Of an embedding G and H C are zero but in the rows of the
batch's words, and C is needed in these rows alone: only what is elementwise goes over all rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.base.checks import refusal
from ntkit.base.workers import spread, workers
from ntkit.explanations.step_graph import StepGraph
from ntkit.jacobian.graph import nodes_behind
from ntkit.jacobian.model_calls import without_fused_rnn
from ntkit.trajectory.optimizer_updates import Moments, Update, check_factors
from ntkit.trajectory.replay import Replay, ReplayStep

_SHARE = 2**17  # numbers that a step changes for a worker's test points: fewer cost more to share than they save


class Unrolled:
    """Derivatives of measures of the trained network by the weights of the training examples, from the last step on.

    Parameters
    ----------
    replay : the run; for Adam with its moments.
    start : the measures' derivatives by the parameters at the end of the run, name -> [m, *shape]. They are changed.
    weights : [n], the weights at which the derivative is taken.
    gauss_newton : the Gauss-Newton matrix instead of the Hessian: J^T (d^2 loss / d outputs^2) J.
    layers, steps : whether to return scores per parameter, per step.

    Attributes
    ----------
    scores : [m, n], in float64.
    layers : parameter -> its part of the scores.
    steps : (step, rows [B], scores [m, B]) for each step, the last one first.
    """

    def __init__(
        self,
        replay: Replay,
        start: dict[str, Tensor],
        weights: Tensor,
        gauss_newton: bool = False,
        layers: bool = False,
        steps: bool = False,
    ) -> None:
        self._replay, self._weights, self._gauss_newton = replay, weights, gauss_newton
        self._effects = start  # V
        self._buffers: dict[str, Tensor] = {}  # M
        self._squares: dict[str, Tensor] = {}  # Q
        self._maxima: dict[str, Tensor] = {}  # of amsgrad: of the maximum of q
        self._slopes: dict[str, Tensor] = {}  # of the step in work: d theta' / d q'
        first = next(iter(start.values()))
        self._m = len(first)
        options = {"dtype": torch.float64, "device": first.device}
        self.scores = torch.zeros(self._m, replay.n, **options)
        self.layers = {name: torch.zeros_like(self.scores) for name in start} if layers else {}
        self.steps: list[tuple[int, Tensor, Tensor]] | None = [] if steps else None
        self._models = [copy.deepcopy(replay.model) for _ in range(min(workers(), self._m))]
        self._numbers = 0  # that a step changes for one test point: the last step, by one worker, tells
        self._fused = not any(isinstance(module, nn.RNNBase) for module in replay.model.modules())

    def step(self, step: ReplayStep) -> None:
        """Go back over one more step."""
        check_factors(step.updates, step.step)
        for name, u in step.updates.items():
            self._allocate(name, u)
        self._slopes = {name: _slope(u.moments) for name, u in step.updates.items() if u.moments is not None}
        count = max(1, min(len(self._models), self._m * self._numbers // _SHARE))
        shares = [(k, slice(self._m * k // count, self._m * (k + 1) // count)) for k in range(count)]
        with sdpa_kernel(SDPBackend.MATH), without_fused_rnn(not self._fused):
            results = spread(lambda share: self._share(step, *share), shares)
        rows = step.rows.to(self.scores.device)
        totals = torch.cat([total for total, _ in results])
        self.scores.index_add_(1, rows, totals)
        for name, sum_ in self.layers.items():
            sum_.index_add_(1, rows, torch.cat([by_layer[name] for _, by_layer in results]))
        if self.steps is not None:
            self.steps.append((step.step, step.rows.cpu(), totals.cpu()))

    def _allocate(self, name: str, u: Update) -> None:
        """Derivatives by the optimizer's state, where a step has one: zero after the last step."""
        if name not in self._buffers and (u.entering or u.carry):
            self._buffers[name] = torch.zeros_like(self._effects[name])
        if name not in self._squares and u.moments is not None:
            self._squares[name] = torch.zeros_like(self._effects[name])
            if u.moments.largest is not u.moments.square:
                self._maxima[name] = torch.zeros_like(self._effects[name])

    def _share(self, step: ReplayStep, place: int, points: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """One worker's test points: scores [k, B] of the step's batch, in all and per parameter."""
        graph = StepGraph(self._models[place], step, self._replay, self._weights[step.rows], self._gauss_newton)
        if step.step == self._replay.steps - 1:
            graph.check()
        self._numbers, at_once = graph.numbers, graph.at_once
        totals, layers = [], []
        for start in range(points.start, points.stop, at_once):
            some = slice(start, min(start + at_once, points.stop))
            vectors = self._by_gradient(step, graph, some)
            back, scores = graph.products(vectors)
            for name, value in back.items():
                _add(self._effects[name][some], value, graph.rows.get(name))
            totals.append(scores.double())
            if self.layers:
                layers.append({name: graph.products({name: vectors[name]})[1].double() for name in self.layers})
        return torch.cat(totals), {name: torch.cat([part[name] for part in layers]) for name in self.layers}

    @torch.no_grad()
    def _by_gradient(self, step: ReplayStep, graph: StepGraph, some: slice) -> dict[str, Tensor]:
        """Go back through the optimizer: the derivatives by the batch's gradient, name -> [k, *shape]."""
        vectors: dict[str, Tensor] = {}
        for name, u in step.updates.items():
            effects, own = self._effects[name][some], graph.rows.get(name)
            rows = None if u.coupled else own  # with L2, every row of d depends on the parameters
            by_d = _at(effects, rows) * -u.direct if u.direct else torch.zeros_like(_at(effects, rows))
            if (buffers := self._buffers.get(name)) is not None:
                buffer = buffers[some]
                if isinstance(u.buffered, Tensor):
                    buffer.addcmul_(effects, u.buffered, value=-1)
                else:
                    buffer.sub_(effects, alpha=u.buffered)
                by_d.add_(_at(buffer, rows), alpha=u.entering)
                buffer.mul_(u.carry)
            if u.moments is not None:
                by_square = self._by_square(name, u.moments, effects, some, rows)
                by_d.addcmul_(by_square, _d(step, name, graph), value=2 * (1 - u.moments.beta2))
            if u.decoupled:
                effects.mul_(1 - u.decoupled)
            if u.coupled:
                effects.add_(by_d, alpha=u.coupled)
                by_d = _at(by_d, own)
            vectors[name] = by_d.mul_(u.gradient)
        return self._unclipped(vectors, step, graph)

    def _by_square(self, name: str, moments: Moments, effects: Tensor, some: slice, rows: Tensor | None) -> Tensor:
        """Derivatives by Adam's second moment q'; goes back to q in place, and returns those by q' (in some rows)."""
        square, slope = self._squares[name][some], self._slopes[name]
        if moments.largest is moments.square:
            square.addcmul_(effects, slope)
        else:
            maximum = self._maxima[name][some].addcmul_(effects, slope)
            newest = moments.largest == moments.square
            square.add_(maximum * newest)
            maximum.mul_(~newest)
        by_square = square.clone() if rows is None else _at(square, rows)
        square.mul_(moments.beta2)
        return by_square

    def _unclipped(self, vectors: dict[str, Tensor], step: ReplayStep, graph: StepGraph) -> dict[str, Tensor]:
        """Through the clipping of the gradient's norm: its factor depends on the gradient, too."""
        clip = self._replay.clip
        if clip is None:
            return vectors
        norm = float(torch.stack([torch.linalg.vector_norm(g) for g in graph.gradients.values()]).norm())
        if clip >= norm + 1e-6:
            return vectors
        inner: Any = 0.0
        for name, g in graph.gradients.items():
            inner = inner + (vectors[name] * g)[..., None].flatten(1).sum(1)
        for name, g in graph.gradients.items():
            factor = inner / (norm * (norm + 1e-6))
            vectors[name] -= factor.view(-1, *[1] * g.dim()) * g
        return vectors


def _at(values: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of a parameter's vectors [k, l, ...], a copy; the vectors themselves for None: all rows."""
    return values if rows is None else values.index_select(1, rows)


def _add(total: Tensor, values: Tensor, rows: Tensor | None) -> None:
    """Add vectors that have only some rows, or all."""
    if rows is None:
        total.add_(values)
    else:
        total.index_add_(1, rows, values)


def _d(step: ReplayStep, name: str, graph: StepGraph) -> Tensor:
    """The gradient d that the optimizer takes: of all rows with L2, else of those with a gradient."""
    u = step.updates[name]
    d = graph.gradients[name] * u.gradient
    if not u.coupled:
        return d
    decay = step.before[name] * u.coupled
    _add(decay[None], d[None], graph.rows.get(name))
    return decay


@torch.no_grad()
def _slope(moments: Moments) -> Tensor:
    """The derivative of theta' by Adam's q'; zero where q' is zero: then the mean is, too, and so is the update."""
    scaled = (moments.largest / moments.correction).sqrt()
    root = scaled + moments.eps
    return torch.where(scaled > 0, moments.rate * moments.mean / (2 * moments.correction * scaled * root**2), 0.0)


def _check_checkpoints(outputs: Tensor) -> None:
    """Refuse a checkpoint whose parameters are not in the graph."""
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes_behind(outputs)):
        got, expected = "torch.utils.checkpoint with use_reentrant=True", "a graph that holds all parameters"
        raise refusal("the network", got=got, expected=expected, fix="Pass use_reentrant=False to checkpoint.")


def derivatives_of_measures(
    model: nn.Module, names: Sequence[str], measure: Callable[[int], Tensor], points: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Measures ``measure(j)`` of the test points j, [m] in float64, and their derivatives, name -> [m, *shape]."""
    params = {name: p for name, p in model.named_parameters() if name in set(names)}
    start = {name: p.new_zeros(len(points), *p.shape) for name, p in params.items()}
    values = torch.zeros(len(points), dtype=torch.float64)
    for place, j in enumerate(points):
        with torch.enable_grad():
            value = measure(j)
        if place == 0:
            _check_checkpoints(value)
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for total, grad in zip(start.values(), grads, strict=True):
            if grad is not None:
                total[place] = grad.to_dense() if grad.is_sparse else grad
        values[place] = float(value.detach())
    return values, start
