"""A recorded run again, with weights on its training examples: many such runs at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.base.batch import Batch, leaves, take, with_leaves
from ntkit.base.checks import refusal
from ntkit.base.progress import task
from ntkit.base.workers import spread, workers
from ntkit.jacobian.graph import correct_norms
from ntkit.trajectory.optimizer_updates import build_optimizer
from ntkit.trajectory.recorded_run import assign
from ntkit.trajectory.replay import Replay

_SIZE = 2**24  # runs x parameters x examples of a batch in common operations: beyond, they gain no more
_TOGETHER = 64  # runs in common operations at a time, at most

Rows = Callable[[int], Tensor]  # step -> rows of the training set, [B], or [K, B]: other ones for each run


class Reruns:
    """Runs like a recorded one, in which the gradient through example i's outputs is multiplied by a weight w_i.

    With a loss that is a mean over its batch this is the run on the loss (1 / |B|) sum_{i in B} w_i loss_i: weight 0
    leaves an example out, in the same batches, from the same start, with the same learning rates. Weight 1 everywhere
    is the recorded run.

    Parameters
    ----------
    replay : the run, not changed.
    dtype : precision of the runs; None = the model's own.

    Notes
    -----
    Small networks run together, their parameters stacked, [K, ...]; larger ones one by one, shared out among workers.
    Results differ by rounding from runs one by one.
    """

    def __init__(self, replay: Replay, dtype: torch.dtype | None = None) -> None:
        self._replay, self._dtype = replay, dtype
        state = replay.initial()
        assign(replay.model, state, "step 0")
        self.model = self._converted(copy.deepcopy(replay.model))
        self._initial = {name: self._converted(state[name]) for name in replay.names}
        self._x, self._y = self._batch_converted(replay.x), replay.y
        if dtype is not None and self._y.is_floating_point():
            self._y = self._y.to(dtype)

    def run(
        self,
        weights: Tensor,
        measure: Callable[[Any, int], Tensor],
        x: Batch,
        initial: Mapping[str, Tensor] | None = None,
        rows: Rows | None = None,
        steps: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs with K sets of weights, and what they lead to.

        Parameters
        ----------
        weights : [K, n].
        measure : ``measure(outputs, k)`` of the outputs on `x` after run k -> a tensor, of one shape for all k.
        x : samples on which the network is evaluated afterwards.
        initial : parameters at the start by name, [K, ...] each; None = those of the recorded run.
        rows : batches, instead of those of the recorded run.
        steps : number of steps, instead of the recorded one; at most that.

        Returns
        -------
        tuple
            Measures [K, ...] in float64, and the parameters at the end by name, [K, ...] each.

        Raises
        ------
        Refused
            For weights of another shape.
        """
        if weights.dim() != 2 or weights.shape[1] != self._replay.n or not len(weights):
            expected = f"[K, {self._replay.n}], one row per run and one weight per training example"
            raise refusal(
                "weights", got=list(weights.shape), expected=expected, fix="Pass torch.ones(1, n) for one run."
            )
        x = self._batch_converted(x)
        size = sum(p.numel() for p in self._initial.values()) * len(self._replay.rows(0))
        steps = self._replay.steps if steps is None else steps

        def work(part: slice) -> dict[str, Tensor]:
            start = {name: value[part] for name, value in initial.items()} if initial else None
            return self._some(weights[part], start, _part(rows, part), steps)

        def all_runs(together: int) -> list[dict[str, Tensor]]:
            parts = [slice(k, min(k + together, len(weights))) for k in range(0, len(weights), together)]
            context = _plain_attention() if together > 1 else nullcontext()
            with task("training again", len(parts)) as progress, context:
                return spread(work, parts, lambda _: progress.advance())

        together = max(1, min(_TOGETHER, _SIZE // size, -(-len(weights) // workers())))
        try:
            ended = all_runs(together)
        except (RuntimeError, NotImplementedError):  # an operation that cannot be done for several networks at once
            if together == 1:
                raise
            ended = all_runs(1)
        final = {name: torch.cat([end[name] for end in ended]) for name in ended[0]}
        with torch.no_grad():
            values = [
                measure(self._outputs({name: p[k] for name, p in final.items()}, x), k) for k in range(len(weights))
            ]
        return torch.stack(values).double().cpu(), final

    def _outputs(self, params: Mapping[str, Tensor], x: Batch) -> Any:
        return torch.func.functional_call(self.model, dict(params), *_arguments(x))

    def _some(
        self, weights: Tensor, initial: Mapping[str, Tensor] | None, rows: Rows | None, steps: int
    ) -> dict[str, Tensor]:
        """Some runs, stacked; a single one of a larger network without a first axis."""
        runs, model = len(weights), copy.deepcopy(self.model)
        start = initial or {name: value.expand(runs, *value.shape) for name, value in self._initial.items()}
        params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        opt = build_optimizer(self._replay.optimizer, params)
        weights = weights.to(next(iter(params.values())))
        for step in range(steps):
            batch = self._replay.rows(step) if rows is None else rows(step)
            x, y, factors = take(self._x, batch), self._y[batch], _columns(weights, batch)
            opt.zero_grad(set_to_none=True)
            with torch.enable_grad():
                _weighted_backward(model, params, x, y, factors, self._replay)
            if self._replay.clip is not None:
                _clip(params, self._replay.clip)
            for group, rate in zip(opt.param_groups, self._replay.rates[step].tolist(), strict=True):
                group["lr"] = rate
            opt.step()
        return {name: p.detach() for name, p in params.items()}

    def _converted(self, value: Any) -> Any:
        if self._dtype is None or (isinstance(value, Tensor) and not value.is_floating_point()):
            return value
        return value.to(self._dtype)

    def _batch_converted(self, x: Batch) -> Batch:
        return with_leaves(x, [self._converted(t) for t in leaves(x)])


def _part(rows: Rows | None, part: slice) -> Rows | None:
    if rows is None:
        return None
    given = rows

    def own(step: int) -> Tensor:
        batch = given(step)
        return batch if batch.dim() == 1 else batch[part]

    return own


def _columns(weights: Tensor, rows: Tensor) -> Tensor:
    return weights[:, rows] if rows.dim() == 1 else weights.gather(1, rows)


def _weighted_backward(
    model: nn.Module, params: Mapping[str, Tensor], x: Batch, y: Tensor, weights: Tensor, replay: Replay
) -> None:
    """Gradients of K runs, each with its weights [K, B], in ``.grad`` of the stacked parameters."""
    runs = len(weights)
    own_rows = y.dim() > replay.y.dim()
    if runs == 1:
        args, kwargs = _arguments(take(x, 0) if own_rows else x)
        one = {name: p[0] for name, p in params.items()}
        outputs = torch.func.functional_call(model, one, args, kwargs)[None]
    else:

        def network(own: Mapping[str, Tensor], batch: Batch) -> Tensor:
            return torch.func.functional_call(model, dict(own), *_arguments(batch))

        outputs = torch.func.vmap(network, (0, 0 if own_rows else None))(dict(params), x)
    factors = weights.view(*weights.shape, *[1] * (outputs.dim() - 2))
    outputs.register_hook(lambda slope: slope * factors)
    targets = y if own_rows else [y] * runs
    losses = [replay.objective.loss(outputs[k].clone(), targets[k]) for k in range(runs)]
    total = torch.stack(losses).sum()
    if runs == 1 and not replay.is_loop:
        correct_norms(total)
    total.backward()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention without fused operations: vmap has no rules for them, and hides that a gradient will be asked for."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(before)


def _arguments(x: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(x)) if isinstance(x, dict) else (tuple(leaves(x)), {})


def _clip(params: Mapping[str, Tensor], clip: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, for each run on its own."""
    grads = [p.grad for p in params.values() if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]).norm(dim=0)
    factors = torch.clamp(clip / (norms + 1e-6), max=1.0)
    for g in grads:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))
