"""Replays a recorded run, step by step, and compares it with its snapshots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, outputs_of
from ntkit.base.caller_context import threads
from ntkit.base.checks import refusal
from ntkit.base.integrity import damaged
from ntkit.base.operation_threads import one_thread, threads_of_caller
from ntkit.base.progress import task
from ntkit.base.tensors import tensor_hash
from ntkit.jacobian.graph import correct_norms
from ntkit.jacobian.model_calls import select_parameters
from ntkit.jacobian.model_outputs import Select
from ntkit.trajectory import optimizer_updates, replay_checks
from ntkit.trajectory.objective import Inputs, Loss, Objective
from ntkit.trajectory.optimizer_updates import Update
from ntkit.trajectory.recorded_run import Trajectory, assign, read_run, snapshot_path, tied_names

MEMORY = 256 * 2**20  # bytes: the steps of a run that takes less stay in memory and are not replayed a second time


@dataclass
class ReplayStep:
    """One optimization step: its gradient is sum_i J(x_i)^T slope_i, at the parameters before it.

    The replay owns the tensors: do not change them.

    Attributes
    ----------
    step : s, from 0.
    rows : the training examples of its batch, int64 [B].
    x, y : their inputs (a tensor, a tuple or a dict) and targets.
    slope : gradient of the batch's loss by the model's outputs, [B, *outputs].
    before, after : the updated parameters at steps s and s + 1, by name.
    updates : `after` minus `before` as a function of this and earlier gradients, by name.
    """

    step: int
    rows: Tensor
    x: Batch
    y: Tensor
    slope: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    updates: dict[str, Update]


class _StepRecord(NamedTuple):
    """What stays in memory of a replayed step; parameters with a snapshot need not: they are on disk."""

    slope: Tensor
    updates: dict[str, Update]
    before: dict[str, Tensor] | None
    exact: bool
    on_disk: bool

    def needed(self) -> _StepRecord:
        """The record without what is on disk."""
        return self._replace(before=None) if self.on_disk else self

    def size(self) -> int:
        values: list[Any] = [self.slope, *(self.before or {}).values()]
        for update in self.updates.values():
            values += [update.buffered, *(update.moments or ())]
        return sum(tensor.nbytes for tensor in values if isinstance(tensor, Tensor))


class _Start(NamedTuple):
    """Start of a part of the run: parameters, if they have no snapshot, and the optimizer's state."""

    parameters: dict[str, Tensor] | None
    state: dict[Tensor, dict[str, Any]]


class _OtherBits(Exception):
    """With one thread the run has other bits than the recorded ones."""


class Replay:
    """Replay of a run of `train` or of a recorded loop: the parts of each step's update.

    Parameters at recorded steps are read from the snapshots; those between are recomputed from batches, loss and
    optimizer. The network runs in eval mode, so a run whose forward pass differs in train mode is refused.

    Parameters
    ----------
    trajectory : a run that has ended.
    model : the network, with any values; it is not changed. `model`, `data` and `loss` are optional for the trajectory
        that `train` returned.
    data : (x, y), the training data, as for `train`. The indices of a recorded loop are rows of these tensors.
    loss : ``loss(model(x), y)`` -> scalar, for the batch of a step.
    clip : for a recorded loop that clips gradients by ``clip_grad_norm_``: its max norm. `train` records it.
    weights : [n], factors on the gradient that comes through each example's outputs. Then another run is computed, with
        the same start, batches, learning rates and optimizer; the snapshots after step 0 have no part in it.
    moments : whether the updates of Adam carry their moments (`optimizer_updates.Moments`).
    select : the part of the model's output that the loss takes, as for `ntkit.TangentKernel`: the model's outputs here.

    Attributes
    ----------
    clip : the bound on the norm of the gradient, or None.
    rates : learning rates of each step, [S, groups].
    optimizer : its settings, as in ``run.json``.
    objective, is_loop : data and loss; whether a loop of the user's own was recorded.
    model : a copy of the network, in eval mode, on its device. Between two steps of `backwards`, its updated parameters
        may be changed.
    x, y, n : the training data (a tensor, a tuple or a dict; targets), and the number of examples.
    steps : S, the number of optimization steps; in a diverged loop up to its last snapshot with a finite loss.
    names : the parameters that the optimizer updates, a tied one once.
    bitwise : after `check`, whether the replayed run has the recorded bits at every recorded step.

    Raises
    ------
    Refused
        When the run has not ended, a snapshot is missing, the optimizer is not SGD, Adam or AdamW, or model, data,
        loss or clip are missing, invalid or not those of the run; for active dropout and batch normalization.

    Examples
    --------
    >>> import ntkit, torch
    >>> x = torch.linspace(-1, 1, 5)[:, None]
    >>> model, sgd = torch.nn.Linear(1, 1), lambda params: torch.optim.SGD(params, lr=0.5)
    >>> replay = Replay(ntkit.train(model, (x, 2 * x), torch.nn.functional.mse_loss, sgd, steps=9, batch_size=2))
    >>> step = next(replay.backwards())
    >>> step.step, step.slope.shape, replay.bitwise
    (8, torch.Size([1, 1]), True)
    >>> gradient = {"weight": step.slope.T @ step.x, "bias": step.slope.sum(0)}
    >>> all(torch.allclose(step.after[k], step.before[k] - 0.5 * gradient[k]) for k in replay.names)
    True
    """

    def __init__(
        self,
        trajectory: Trajectory,
        model: nn.Module | None = None,
        data: tuple[Inputs, Tensor] | None = None,
        loss: Loss | None = None,
        clip: float | None = None,
        weights: Tensor | None = None,
        moments: bool = False,
        select: Select | None = None,
    ) -> None:
        settings, arguments = trajectory.settings, (model, data, loss, select)
        model, data, loss, self.select = replay_checks.training_arguments(trajectory, *arguments)
        optimizer_updates.optimizer_class(settings["optimizer"]["class"])  # refused before anything slow
        self._trajectory = trajectory
        self.objective = Objective(data, loss)
        self.clip = replay_checks.checked_clip(settings, self.objective, clip)
        self.steps = replay_checks.replayable_steps(trajectory)
        self.weights, self._moments = weights, moments
        self._recorded = {step for step in trajectory.steps if step <= self.steps and (weights is None or step == 0)}
        self._end: dict[str, Tensor] = {}  # of a run with weights: it has no snapshot
        self.rates = replay_checks.checked_rates(trajectory, self.steps)
        self.is_loop = loop = settings.get("kind") == "recorded"
        self.model = replay_checks.replay_model(model, settings, not loop, self.select)
        self.optimizer: dict[str, Any] = settings["optimizer"]
        self._opt = optimizer_updates.build_optimizer(self.optimizer, dict(self.model.named_parameters()))
        self._params = optimizer_updates.updated_parameters(self.model, self._opt)
        self.names = list(self._params)
        select_parameters(self.model, self.names)
        self._full_batch = not loop and settings["batch_size"] is None
        self.x, self.y, self.n = self.objective.x, self.objective.y, self.objective.n
        self.bitwise = False
        self._checked = self._alone = False
        self._constants: dict[str, Tensor] = {}  # parameters and buffers that the optimizer does not update
        self._stride = max(1, math.ceil(math.sqrt(self.steps)))
        self._records: list[_StepRecord] | None = None
        self._starts: list[_Start] = []

    def check(self) -> None:
        """Replay the whole run and compare it with its snapshots.

        At a recorded step the bits must be equal. If the step before was recorded, too, a difference that the rounding
        of one step explains is accepted: ||difference|| <= sqrt(eps) ||update|| + 4 eps ||theta|| for each parameter,
        with eps of its dtype. The replay then continues from the recorded values, and `bitwise` is False.

        Raises
        ------
        Refused
            When a snapshot is not what the run leads to, with step, parameter and size of the difference; when
            anything but the updated parameters changed, a loss or a parameter is not finite, a step was recorded
            without indices, or the model does not return one tensor with examples along its first axis.
        """
        if self._checked:
            return
        # One thread is faster, on a busy machine by far. Mostly it gives the bits of several, too.
        self._alone = self.weights is not None or threads() > 1
        try:
            self._replay_run()
        except _OtherBits:
            self._alone = False
            self._replay_run()

    def _replay_run(self) -> None:
        self._load_start()
        records: list[_StepRecord] | None = []
        exact, size, size_with_all, starts = True, 0, 0, []
        with task("replaying the training run", self.steps) as work, _isolated(self.model):
            self._go_to(0, _Start(None, {}))
            for step in range(self.steps):
                if step % self._stride == 0:
                    values = None if step in self._recorded else self._values()
                    starts.append(_Start(values, _copy_of(self._opt.state)))
                record = self._replay_step(step)
                exact &= record.exact
                size += record.needed().size()
                size_with_all += record.size()
                if records is None or size > MEMORY:
                    records = None
                elif size_with_all <= MEMORY:
                    records.append(record)
                else:
                    if size_with_all - record.size() <= MEMORY:
                        records = [r.needed() for r in records]
                    records.append(record.needed())
                work.advance()
            self._end = {} if self.weights is None else self._values()
        self._records, self._starts = records, starts if records is None else []
        self.bitwise, self._checked = exact, True

    def initial(self) -> dict[str, Tensor]:
        """All parameters and buffers at step 0, by name; tied ones under each of their names."""
        return self._read(0)

    def final(self) -> dict[str, Tensor]:
        """All parameters and buffers at step S, by name; tied ones under each of their names."""
        if self.weights is None:
            return self._read(self.steps)
        self.check()
        return self._read(0) | self._end

    def backwards(self) -> Iterator[ReplayStep]:
        """Yield the steps S - 1, ..., 0, after `check`.

        A run that takes more than 256 MB is replayed in parts of sqrt(S) steps, with the same bits: in total twice the
        work of training, and sqrt(S) copies of the parameters and of the optimizer's state, and as many of a part.
        """
        self.check()
        after = self._end or self._updated(self.steps)
        for first in reversed(range(0, self.steps, self._stride)):
            part = self._part(first)
            while part:
                record = part.pop()
                step = first + len(part)
                before = self._updated(step) if record.before is None else record.before
                x, y = self.batch(step)
                yield ReplayStep(step, self.rows(step), x, y, record.slope, before, after, record.updates)
                after = before

    def _part(self, first: int) -> list[_StepRecord]:
        """Steps of the part that starts at `first`: from memory, or replayed."""
        last = min(first + self._stride, self.steps)
        if self._records is not None:
            return self._records[first:last]
        part = []
        with task(f"replaying steps {first} to {last}", last - first) as work, _isolated(self.model):
            self._go_to(first, self._starts[first // self._stride])
            for step in range(first, last):
                part.append(self._replay_step(step).needed())
                work.advance()
        return part

    def _go_to(self, step: int, start: _Start) -> None:
        self._set(self._updated(step) if start.parameters is None else start.parameters)
        self._opt.state.clear()
        self._opt.state.update(_copy_of(start.state))

    def _replay_step(self, step: int) -> _StepRecord:
        """Take a step from the model's parameters to the next ones, which are read from a snapshot if there is one."""
        before = self._values()
        # sums are cut up among threads: another number may give other last bits
        with one_thread() if self._alone else threads_of_caller():
            slope = self._slope(step)
            factor = optimizer_updates.clip_gradients(self._params.values(), self.clip)
            for group, rate in zip(self._opt.param_groups, self.rates[step].tolist(), strict=True):
                group["lr"] = rate
            updates = optimizer_updates.take_step(self._opt, self._params, factor, self._moments)
        exact = step + 1 not in self._recorded or self._equals_snapshot(step + 1, before)
        return _StepRecord(slope, updates, before, exact, step in self._recorded)

    def _slope(self, step: int) -> Tensor:
        """Compute the gradients of the step's loss in place; return its gradient by the outputs."""
        x, y = self.batch(step)
        self.model.zero_grad(set_to_none=True)
        outputs = replay_checks.checked_outputs(outputs_of(self.model, x), len(y))
        slopes: list[Tensor] = []
        factors = None if self.weights is None else self.weights[self.rows(step)].to(outputs)

        def hook(slope: Tensor) -> Tensor:
            slopes.append(slope)
            return slope if factors is None else slope * factors.view(-1, *[1] * (slope.dim() - 1))

        outputs.register_hook(hook)  # before the loss, which may overwrite the outputs
        loss = self.objective.loss(outputs, y)
        if not isinstance(loss, Tensor) or loss.ndim or not bool(torch.isfinite(loss)):
            got = f"{loss.tolist()}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            fix = "Pass the loss and the data that the run was trained with."
            raise refusal(f"loss of step {step}", got=got, expected="a finite scalar", fix=fix)
        if loss.requires_grad:
            if not self.is_loop:  # a loop of the user's own took the gradients as PyTorch gives them
                correct_norms(loss)
            loss.backward()
        if not slopes:
            got, fix = "a value that does not depend on the model's outputs", "Pass the loss of the training."
            raise refusal("loss", got=got, expected="a differentiable function of model(x)", fix=fix)
        return slopes[0].contiguous()

    def batch(self, step: int) -> tuple[Batch, Tensor]:
        """Inputs and targets of a step's batch."""
        return self.objective.batch(None if self._full_batch else self.rows(step))

    def rows(self, step: int) -> Tensor:
        """Training examples in a step's batch, int64 [B]."""
        rows = self._trajectory.batch(step)
        if len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= self.n:
            got = f"rows {int(rows.min())} to {int(rows.max())}" if len(rows) else "no rows"
            expected = f"rows of the training set, 0 to {self.n - 1}"
            fix = "Pass the data whose row numbers were passed to rec.step()."
            raise refusal(f"batch of step {step}", got=got, expected=expected, fix=fix)
        return rows

    def _values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._params.items()}

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self._params.items():
                p.copy_(values[name])

    def _load_start(self) -> None:
        """Load the initial network, and check that the run started with it."""
        state = self._read(0)
        path, names = self._trajectory.path, self._trajectory.settings["parameters"]
        assign(self.model, state, f"step 0 of {path.name}")
        if (found := tensor_hash({name: state[name] for name in names})) != (initial := read_run(path)["initial"]):
            why = f"a network with hash {found[:12]}, not the initial one of the run, {initial[:12]} in run.json"
            raise damaged(snapshot_path(path, 0), why)
        self._constants = {name: state[name] for name in names.keys() - set(self.names)}

    def _equals_snapshot(self, step: int, before: dict[str, Tensor]) -> bool:
        """Compare the parameters with the recorded ones, and load these. Returns whether all bits are equal."""
        recorded = self._read(step)
        for name, tensor in self._constants.items():
            if not replay_checks.same_bits(tensor, recorded[name]):
                got = "another value than at step 0: the forward pass changes it"
                expected = "a run that changes only the parameters of the optimizer"
                fix = "Train with constant statistics (eval mode), or with GroupNorm or LayerNorm."
                raise refusal(f"'{name}' at step {step}", got=got, expected=expected, fix=fix)
        differences = []
        for name, p in self._params.items():
            value = p.detach()
            if not replay_checks.same_bits(value, recorded[name]):
                size, update, theta = map(
                    replay_checks.norm, (recorded[name] - value, value - before[name], recorded[name])
                )
                eps = torch.finfo(value.dtype).eps
                rounding = step - 1 in self._recorded and size <= math.sqrt(eps) * update + 4 * eps * theta
                differences.append((not rounding, size / update if update else math.inf, name))
        if differences and self._alone:
            raise _OtherBits
        if any(refused for refused, _, _ in differences):
            _, size, name = max(differences)
            raise refusal(
                f"snapshot of step {step} in {self._trajectory.path.name}",
                got=f"'{name}' different from its replay by {size:.2g} of that step's update",
                expected="the values that the run leads to",
                fix="Look for a changed snapshot, data (also by augmentation), batches (seed), loss, clip or optimizer "
                "settings other than in training, an optimizer that was not new, dropout or another forward pass that "
                "differs in train mode, or autocast. "
                "On another machine, number of threads or release of torch, and with gradients summed over parts of a "
                "batch, rounding accumulates: use record='all'.",
            )
        self._set(recorded)
        return not differences

    def _updated(self, step: int) -> dict[str, Tensor]:
        state = self._read(step)
        return {name: state[name] for name in self.names}

    def _read(self, step: int) -> dict[str, Tensor]:
        """Read a snapshot onto the model's devices, after a check of names, shapes and finite values."""
        state = self._trajectory.state(step)
        where = f"snapshot of step {step} in {self._trajectory.path.name}"
        for name, recorded in self._trajectory.settings["parameters"].items():
            tensor = [list(state[name].shape), str(state[name].dtype)] if name in state else "none"
            if tensor != recorded:
                got, expected = f"'{name}' {tensor}", f"{recorded}, as in run.json"
                raise refusal(where, got=got, expected=expected, fix="The file was changed: record the run again.")
        if bad := [name for name in self.names if not bool(torch.isfinite(state[name]).all())]:
            got, fix = f"'{bad[0]}' with values that are not finite", "Use a smaller learning rate or fewer steps."
            raise refusal(where, got=got, expected="a run that stays finite", fix=fix)
        devices = {name: tensor.device for names, tensor in tied_names(self.model) for name in names}
        return {name: tensor.to(devices[name]) for name, tensor in state.items()}


@contextmanager
def _isolated(model: nn.Module) -> Iterator[None]:
    """Gradients enabled and random numbers forked; all gradients are removed at the end."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield
        model.zero_grad(set_to_none=True)


def _copy_of(state: Any) -> dict[Tensor, dict[str, Any]]:
    """Copy of an optimizer's state; its keys stay the parameters themselves."""
    return {
        p: {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
        for p, values in state.items()
    }
