"""A recorded run made again, step by step, and compared with what was recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch
from ntkit.base.checks import refusal
from ntkit.base.progress import task
from ntkit.base.tensors import tensor_hash
from ntkit.jacobian.model_calls import select_parameters
from ntkit.trajectory.optimizer_updates import Update, clip_gradients, known, rebuilt, stepped, updated_parameters
from ntkit.trajectory.recorded_run import Trajectory, assign, read_run, tied_names
from ntkit.trajectory.replay_checks import checked_clip, checked_rates, copied, given, sound_steps
from ntkit.trajectory.train import Problem

HELD = 256 * 2**20  # bytes: what a run that takes less is kept in memory, and need not be made a second time


@dataclass
class Step:
    """One optimisation step: the gradient it used is sum_i J(x_i)^T slope_i, at the parameters before it.

    Its tensors are the replay's own: they are not to be changed.

    Attributes
    ----------
    step : s, from 0.
    rows : the training examples it used, int64 [B].
    x : their inputs: a tensor, a tuple or a dict.
    slope : gradient of the batch's loss by the model's outputs, [B, *outputs].
    before, after : the updated parameters at steps s and s + 1, by name.
    updates : how the gradient, and earlier ones, led from one to the other, by name.
    """

    step: int
    rows: Tensor
    x: Batch
    slope: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    updates: dict[str, Update]


class _Made(NamedTuple):
    """What is kept of a step made again; parameters that were recorded are on disk."""

    slope: Tensor
    updates: dict[str, Update]
    before: dict[str, Tensor] | None
    exact: bool

    def size(self) -> int:
        held = [self.slope, *(self.before or {}).values(), *(update.buffered for update in self.updates.values())]
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))


class _Start(NamedTuple):
    """Where a part of the run starts: parameters, if not recorded, and the optimiser's state."""

    parameters: dict[str, Tensor] | None
    state: dict[Tensor, dict[str, Any]]


class Replay:
    """A run of `train`, or a recorded loop, made again: what each step's update was made of.

    Parameters at recorded steps are the recorded ones, those between are computed again from batches, loss and
    optimiser. The network is run in eval mode; so a run whose forward pass differs in train mode is refused.

    Parameters
    ----------
    trajectory : a run that has ended.
    model : the network; its values do not matter, and it is not changed. As `data` and `loss`, not needed for the
        trajectory that `train` returned.
    data : (x, y), the training data, as for `train`. Rows in a recorded loop are those of these tensors.
    loss : ``loss(model(x), y)`` -> scalar, for the batch of a step.
    clip : for a recorded loop that clips gradients by ``clip_grad_norm_``: its max norm. `train` records its own.

    Attributes
    ----------
    model : a copy of the network, in eval mode, on its device. While `backwards` runs, its updated parameters may be
        set to anything between two steps.
    x, y, n : the training data (a tensor, a tuple or a dict; targets), and the number of examples.
    steps : S, the optimisation steps made; of a diverged loop those to its last sound recorded step.
    names : the parameters that the optimiser updates, a tied one once.
    bitwise : after `check`, whether the replayed run has the recorded bits at every recorded step.

    Raises
    ------
    Refused
        When the run has not ended, a snapshot is missing, the optimiser is not SGD, Adam or AdamW, or model, data,
        loss or clip are missing, wrong or not those of the run; for active dropout and batch normalisation.

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
        data: tuple[Any, Tensor] | None = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        clip: float | None = None,
    ) -> None:
        settings = trajectory.settings
        model, data, loss = given(trajectory, model, data, loss)
        known(settings["optimizer"]["class"])
        self._trajectory = trajectory
        self._loop = settings.get("kind") == "recorded"
        self._problem = Problem(data, loss, None)
        self._clip = checked_clip(settings, self._problem, clip)
        self.steps = sound_steps(trajectory)
        self._recorded = {step for step in trajectory.steps if step <= self.steps}
        self._rates = checked_rates(trajectory, self.steps)
        self.model = copied(model, settings, in_train_mode=not self._loop)
        self._opt = rebuilt(settings["optimizer"], dict(self.model.named_parameters()))
        self._params = updated_parameters(self.model, self._opt)
        self.names = list(self._params)
        select_parameters(self.model, self.names)
        self._whole = not self._loop and settings["batch_size"] is None
        self.x, self.y = self._problem.batch(None)
        self.n = self._problem.n
        self.bitwise = False
        self._checked = False
        self._fixed: dict[str, Tensor] = {}  # what the optimiser does not update
        self._stride = max(1, math.ceil(math.sqrt(self.steps)))
        self._held: list[_Made] | None = None
        self._starts: list[_Start] = []

    def check(self) -> None:
        """Make the whole run again and compare it with what was recorded.

        At a recorded step the bits must be the recorded ones. Where the step before was recorded, too, a difference
        that one step's rounding explains is accepted: ||difference|| <= sqrt(eps) ||update|| + 4 eps ||theta|| for each
        parameter, eps that of its dtype. The replay goes on from the recorded values then, and `bitwise` is False.

        Raises
        ------
        Refused
            When a snapshot is not what the run leads to, naming step, parameter and size of the difference; when
            anything but the updated parameters changed, a loss or a parameter is not finite, a step was recorded
            without indices, or the model does not give one tensor with examples along its first axis.
        """
        if self._checked:
            return
        self._load_start()
        held: list[_Made] | None = []
        exact, size, starts = True, 0, []
        with task("replaying the training run", self.steps) as work, _apart(self.model):
            self._go_to(0, _Start(None, {}))
            for step in range(self.steps):
                if step % self._stride == 0:
                    starts.append(_Start(self._kept(step), self._state()))
                made = self._made(step)
                exact &= made.exact
                size += made.size()
                if held is not None and size <= HELD:
                    held.append(made)
                else:
                    held = None
                work.advance()
        self._held, self._starts = held, starts if held is None else []
        self.bitwise, self._checked = exact, True

    def initial(self) -> dict[str, Tensor]:
        """Give all parameters and buffers at step 0, by name; tied ones under each of their names."""
        return self._read(0)

    def final(self) -> dict[str, Tensor]:
        """Give all parameters and buffers at step S, by name; tied ones under each of their names."""
        return self._read(self.steps)

    def backwards(self) -> Iterator[Step]:
        """Give the steps S - 1, ..., 0, after `check`.

        A run that takes more than 256 MB is made again in parts of sqrt(S) steps, with the same bits: in all twice the
        work of training, and sqrt(S) copies of the parameters and of the optimiser's state, and as many of a part.

        Raises
        ------
        Refused
            As `check`.
        """
        self.check()
        after = self._updated(self.steps)
        for first in reversed(range(0, self.steps, self._stride)):
            part = self._part(first)
            while part:
                made = part.pop()
                step = first + len(part)
                before = self._updated(step) if made.before is None else made.before
                rows = self._rows(step)
                x, _ = self._problem.batch(None if self._whole else rows)
                yield Step(step, rows, x, made.slope, before, after, made.updates)
                after = before

    # --- making steps ----------------------------------------------------------------------------------------

    def _part(self, first: int) -> list[_Made]:
        """Give the steps of the part that starts at `first`: held, or made again."""
        last = min(first + self._stride, self.steps)
        if self._held is not None:
            return self._held[first:last]
        part = []
        with task(f"replaying steps {first} to {last}", last - first) as work, _apart(self.model):
            self._go_to(first, self._starts[first // self._stride])
            for step in range(first, last):
                part.append(self._made(step))
                work.advance()
        return part

    def _go_to(self, step: int, start: _Start) -> None:
        self._set(self._updated(step) if start.parameters is None else start.parameters)
        self._opt.state.clear()
        self._opt.state.update(_copy_of(start.state))

    def _made(self, step: int) -> _Made:
        """Make a step from the parameters at hand; leaves those of the next: recorded ones where recorded."""
        before = {name: p.detach().clone() for name, p in self._params.items()}
        slope = self._slope(step)
        factor = clip_gradients(self._params.values(), self._clip)
        for group, rate in zip(self._opt.param_groups, self._rates[step].tolist(), strict=True):
            group["lr"] = rate
        updates = stepped(self._opt, self._params, factor)
        exact = step + 1 not in self._recorded or self._compared(step + 1, before)
        return _Made(slope, updates, None if step in self._recorded else before, exact)

    def _slope(self, step: int) -> Tensor:
        """Put the gradients of the step's loss in place; give its gradient by the outputs."""
        rows = self._rows(step)
        x, y = self._problem.batch(None if self._whole else rows)
        self.model.zero_grad(set_to_none=True)
        outputs = _checked_outputs(self._problem.outputs(self.model, x), len(rows))
        slopes: list[Tensor] = []
        outputs.register_hook(slopes.append)  # by the outputs as they are now: the loss may write over them
        loss = self._problem.loss_function(outputs, y)
        if not isinstance(loss, Tensor) or loss.ndim or not bool(torch.isfinite(loss)):
            got = f"{loss.tolist()}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise refusal(
                f"loss of step {step}",
                got=got,
                expected="a finite scalar",
                fix="Pass the loss and the data that the run was trained with.",
            )
        if loss.requires_grad:
            loss.backward()
        if not slopes:
            raise refusal(
                "loss",
                got="a value that does not depend on the model's outputs",
                expected="a differentiable function of model(x)",
                fix="Pass the loss that the run was trained with.",
            )
        return slopes[0].contiguous()

    def _rows(self, step: int) -> Tensor:
        rows = self._trajectory.batch(step)
        if len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= self.n:
            raise refusal(
                f"batch of step {step}",
                got=f"rows {int(rows.min())} to {int(rows.max())}" if len(rows) else "no rows",
                expected=f"rows of the training set, 0 to {self.n - 1}",
                fix="Pass the data whose row numbers rec.step() was given.",
            )
        return rows

    def _kept(self, step: int) -> dict[str, Tensor] | None:
        recorded = step in self._recorded
        return None if recorded else {name: p.detach().clone() for name, p in self._params.items()}

    def _state(self) -> dict[Tensor, dict[str, Any]]:
        return _copy_of(self._opt.state)

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self._params.items():
                p.copy_(values[name])

    # --- what was recorded -----------------------------------------------------------------------------------

    def _load_start(self) -> None:
        """Load the initial network, all of it, and check that it is the one the run began with."""
        state = self._read(0)
        path = self._trajectory.path
        assign(self.model, state, f"step 0 of {path.name}")
        found = tensor_hash({name: state[name] for name in self._trajectory.settings["parameters"]})
        if found != (begun := read_run(path)["initial"]):
            raise refusal(
                f"snapshot of step 0 in {path.name}",
                got=f"a network with hash {found[:12]}",
                expected=f"the one that the run began with, {begun[:12]} in run.json",
                fix="One of the two was changed: record the run again, or fetch its folder anew.",
            )
        self._fixed = {name: state[name] for name in self._trajectory.settings["parameters"].keys() - set(self.names)}

    def _compared(self, step: int, before: dict[str, Tensor]) -> bool:
        """Compare the parameters at hand with the recorded ones, and go on from these. Says whether all bits agree."""
        recorded = self._read(step)
        for name, tensor in self._fixed.items():
            if not _same_bits(tensor, recorded[name]):
                raise refusal(
                    f"'{name}' at step {step}",
                    got="another value than at step 0: the network itself changed beside its parameters",
                    expected="a run that changes nothing but what the optimiser updates",
                    fix="Train with frozen statistics (eval mode), or with GroupNorm or LayerNorm.",
                )
        differences = []
        for name, p in self._params.items():
            made = p.detach()
            if not _same_bits(made, recorded[name]):
                size, update, theta = map(_norm, (recorded[name] - made, made - before[name], recorded[name]))
                eps = torch.finfo(made.dtype).eps
                rounding = step - 1 in self._recorded and size <= math.sqrt(eps) * update + 4 * eps * theta
                differences.append((not rounding, size / update if update else math.inf, name))
        if any(refused for refused, _, _ in differences):
            _, size, name = max(differences)
            raise refusal(
                f"snapshot of step {step} in {self._trajectory.path.name}",
                got=f"'{name}' away from the replayed one by {size:.2g} of that step's update",
                expected="the values that the run leads to",
                fix="Look for a changed snapshot, other data, batches (seed), loss, clip or optimiser settings than in "
                "training, an optimiser that was not new, or a forward pass that differs in train mode. "
                "On another machine, number of threads or release of torch, rounding adds up: record='all'.",
            )
        self._set(recorded)
        return not differences

    def _updated(self, step: int) -> dict[str, Tensor]:
        state = self._read(step)
        return {name: state[name] for name in self.names}

    def _read(self, step: int) -> dict[str, Tensor]:
        """Read a recorded network, on the model's devices; the updated parameters are finite."""
        state = self._trajectory.state(step)
        where = f"snapshot of step {step} in {self._trajectory.path.name}"
        for name, told in self._trajectory.settings["parameters"].items():
            found = [list(state[name].shape), str(state[name].dtype)] if name in state else "none"
            if found != told:
                got, expected = f"'{name}' {found}", f"{told}, as in run.json"
                raise refusal(where, got=got, expected=expected, fix="The file was changed: record the run again.")
        if bad := [name for name in self.names if not bool(torch.isfinite(state[name]).all())]:
            raise refusal(
                where,
                got=f"'{bad[0]}' with values that are not finite",
                expected="a run that stays finite",
                fix="Train with a smaller learning rate, or end before that step.",
            )
        devices = {name: tensor.device for names, tensor in tied_names(self.model) for name in names}
        return {name: tensor.to(devices[name]) for name, tensor in state.items()}


def _checked_outputs(outputs: Any, rows: int) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.ndim and len(outputs) == rows and outputs.requires_grad:
        return outputs
    got = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
    raise refusal(
        "the model's output",
        got=got + (", without a gradient" if isinstance(outputs, Tensor) and not outputs.requires_grad else ""),
        expected=f"one tensor of shape [{rows}, ...] that depends on the parameters",
        fix="Wrap the model, in training too, so that it returns one tensor with examples along its first axis.",
    )


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """Gradients on, whoever asks; random numbers, if some are drawn, in a fork; no gradient is left behind."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield
        model.zero_grad(set_to_none=True)


def _copy_of(state: Any) -> dict[Tensor, dict[str, Any]]:
    """Copy an optimiser's state; its keys stay the parameters themselves."""
    return {
        p: {name: value.clone() if isinstance(value, Tensor) else value for name, value in held.items()}
        for p, held in state.items()
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
