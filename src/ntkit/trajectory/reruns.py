"""A recorded run again, with weights on its training examples: many such runs at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ntkit.base.batch import Batch, arguments, copied, leaves, main_output, outputs_of, take, with_leaves
from ntkit.base.checks import refusal
from ntkit.base.progress import task
from ntkit.base.workers import spread, workers
from ntkit.jacobian.graph import correct_norms, saved_numbers
from ntkit.jacobian.model_calls import PlainWeightNorm
from ntkit.trajectory.optimizer_updates import build_optimizer
from ntkit.trajectory.recorded_run import assign
from ntkit.trajectory.replay import Replay

_SIZE = 2**24  # runs x parameters x examples of a batch in common operations: beyond, they gain no more
_NUMBERS = 2**23  # that the graphs of such runs may keep
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
        self.model = copy.deepcopy(replay.model)
        assign(self.model, state, "step 0")
        if dtype is not None:
            _convert(self.model, dtype)
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
        keep: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs with K sets of weights, and what they lead to.

        Parameters
        ----------
        weights : [K, n].
        measure : ``measure(outputs, k)`` of the outputs on `x` after run k -> a tensor, of one shape for all k.
        x : samples on which the network is evaluated afterwards.
        initial : parameters at the start by name, [K, ...] each; None = those of the recorded run.
        rows : batches, instead of those of the recorded run.
        steps : number of steps, instead of the recorded one; at most that. It goes through the whole schedule.
        keep : number of runs, the first ones, whose parameters are returned; None = all.

        Returns
        -------
        tuple
            Measures [K, ...] in float64, and the parameters at the end by name, [keep, ...] each.

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
        steps = self._replay.steps if steps is None else steps

        def work(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            start = {name: value[part] for name, value in initial.items()} if initial else None
            model, params = self._some(weights[part], start, _part(rows, part), steps)
            with torch.no_grad(), self._precision():
                ends = [{name: p[k] for name, p in params.items()} for k in range(part.stop - part.start)]
                outputs = (main_output(torch.func.functional_call(model, end, *arguments(copied(x)))) for end in ends)
                values = torch.stack([measure(output, part.start + k) for k, output in enumerate(outputs)])
            kept = len(ends) if keep is None else min(max(keep - part.start, 0), len(ends))
            return values.double().cpu(), {name: p[:kept].clone() for name, p in params.items()}

        def all_runs(together: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
            parts = [slice(k, min(k + together, len(weights))) for k in range(0, len(weights), together)]
            context = sdpa_kernel(SDPBackend.MATH) if together > 1 else nullcontext()
            with plain_attention(), task("training again", len(parts)) as progress, context:
                return spread(work, parts, lambda _: progress.advance())

        together = min(self._together(), -(-len(weights) // workers()))
        try:
            ended = all_runs(together)
        except RuntimeError:  # an operation that cannot be done for several networks at once
            if together == 1:
                raise
            ended = all_runs(1)
        final = {name: torch.cat([end[name] for _, end in ended]) for name in ended[0][1]}
        return torch.cat([values for values, _ in ended]), final

    def _together(self) -> int:
        """Runs in common operations: as many as gain by it, and as memory holds."""
        rows = self._replay.rows(0)
        size = sum(p.numel() for p in self._initial.values()) * len(rows)
        args, kwargs = arguments(take(self._x, rows))
        with torch.enable_grad(), self._precision():
            kept = saved_numbers(main_output(self.model(*args, **kwargs)))
        return max(1, min(_TOGETHER, _SIZE // size, _NUMBERS // (kept + 1)))

    def _some(
        self, weights: Tensor, initial: Mapping[str, Tensor] | None, rows: Rows | None, steps: int
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Some runs, stacked; a single one of a larger network without a first axis."""
        runs, model = len(weights), copy.deepcopy(self.model)
        start = initial or {name: value.expand(runs, *value.shape) for name, value in self._initial.items()}
        params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        if runs == 1:  # the model's own parameters: a checkpoint calls it once more in the backward pass
            for name, p in model.named_parameters():
                if name in params:
                    p.data = params[name].data[0]
        opt = build_optimizer(self._replay.optimizer, params)
        weights = weights.to(next(iter(params.values())))
        for step in range(steps):
            batch = self._replay.rows(step) if rows is None else rows(step)
            x, y, factors = take(self._x, batch), self._y[batch], _columns(weights, batch)
            opt.zero_grad(set_to_none=True)
            model.zero_grad(set_to_none=True)
            with torch.enable_grad(), self._precision():
                _weighted_backward(model, params, x, y, factors, self._replay)
            if self._replay.clip is not None:
                _clip(params, self._replay.clip)
            place = step * self._replay.steps // steps  # a shorter run goes through the whole schedule
            for group, rate in zip(opt.param_groups, self._replay.rates[place].tolist(), strict=True):
                group["lr"] = rate
            opt.step()
        return model, {name: p.detach() for name, p in params.items()}

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else _Promoted(self._dtype)

    def _converted(self, value: Any) -> Any:
        if self._dtype is None or (isinstance(value, Tensor) and not value.is_floating_point()):
            return value
        return value.to(self._dtype)

    def _batch_converted(self, x: Batch) -> Batch:
        return with_leaves(x, [self._converted(t) for t in leaves(x)])


class _Promoted(TorchFunctionMode):
    """In a network that was converted to `dtype`: what model, loss and measure bring along in another one is, too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float and args[0].dtype == self._dtype:
            return args[0]
        if func is Tensor.to and args[0].dtype == self._dtype and torch.float32 in [*args, *kwargs.values()]:
            return args[0]
        tensors, structure = tree_flatten((args, kwargs))
        real = [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.is_floating_point()]
        name = getattr(func, "__name__", "")
        changes = name.endswith("_") or "out" in kwargs  # also __setitem__: writes into a tensor of its own
        if not changes and any(tensors[i].dtype == self._dtype for i in real):
            for i in real:
                tensors[i] = tensors[i].to(self._dtype)
            args, kwargs = tree_unflatten(tensors, structure)
        return func(*args, **kwargs)


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert what is real: ``model.to`` would leave out the imaginary parts of complex buffers."""
    wide = torch.complex(torch.zeros((), dtype=dtype), torch.zeros((), dtype=dtype)).dtype
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(wide if tensor.is_complex() else dtype)


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
        outputs = outputs_of(model, take(x, 0) if own_rows else x)[None]
    else:

        def network(own: Mapping[str, Tensor], tensors: list[Tensor]) -> Tensor:
            return main_output(torch.func.functional_call(model, dict(own), *arguments(with_leaves(x, tensors))))

        with PlainWeightNorm():  # vmap has no rule for PyTorch's own
            outputs = torch.func.vmap(network, (0, 0 if own_rows else None))(dict(params), leaves(x))
    factors = weights.view(*weights.shape, *[1] * (outputs.dim() - 2))
    outputs.register_hook(lambda slope: slope * factors)
    targets = y if own_rows else [y] * runs
    losses = [replay.objective.loss(outputs[k].clone(), targets[k]) for k in range(runs)]
    total = torch.stack(losses).sum()
    if runs == 1 and not replay.is_loop:
        correct_norms(total)
    total.backward()
    for name, p in model.named_parameters() if runs == 1 else ():
        if name in params and p.grad is not None:
            params[name].grad = p.grad.to_dense()[None]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as in training, without the faster path for inference.

    That has other outputs where a mask leaves tokens out. It has no rules for vmap, too, which hides that a gradient
    will be asked for.
    """
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def _clip(params: Mapping[str, Tensor], clip: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, for each run on its own."""
    grads = [p.grad for p in params.values() if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g[..., None].flatten(1), dim=1) for g in grads]).norm(dim=0)
    factors = torch.clamp(clip / (norms + 1e-6), max=1.0)
    for g in grads:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))
