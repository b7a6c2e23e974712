"""Record the user's own training loop: one line before it, one line in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ntkit.base.checks import Refused, parse_bytes, refusal
from ntkit.base.files import remove, write_bytes
from ntkit.base.tensors import safetensors_bytes
from ntkit.jacobian.model_calls import check_module
from ntkit.trajectory.recorded_run import read_run, snapshot_path, tied_names
from ntkit.trajectory.run_writer import RunWriter, network_and_optimizer
from ntkit.trajectory.snapshots import SnapshotSteps, snapshot_rule, surplus_snapshots
from ntkit.trajectory.step_log import LogEntry, StepLog

MOST_SKIPPED = 20  # a gradient scaler that starts at 2^16 and is halved at each skipped step is below one by then


def record(
    model: nn.Module,
    optimizer: Optimizer,
    path: str | Path,
    *,
    record: SnapshotSteps = "log",
    budget: int | str | None = None,
    resume: bool = False,
) -> Recorder:
    """Record a training loop as it runs; `Trajectory.open(path)` reads it, during the run and after.

    Use it as ``with ntkit.record(...) as rec:`` around the loop and call ``rec.step(indices, loss)`` after each
    ``optimizer.step()``; ``rec.done`` is the number of optimizer steps so far. Step s of the trajectory is the model
    after s optimizer steps, buffers included. An update that a gradient scaler skips is not a step. Learning rates are
    read when the optimizer makes its update, so a scheduler may be stepped anywhere. The end of the block records the
    last state and ends the run; do not change the model in another way before. After an exception the run can be
    resumed.

    Parameters
    ----------
    model : any module. Of a compiled or data-parallel one the module inside is recorded, under its own names.
    optimizer : any torch optimizer of parameters of `model`.
    path : folder to write.
    record : the steps whose parameters are recorded, as in `ntkit.train`; a function must be pure.
    budget : bytes, or text such as ``"2 GB"``, for all snapshots together: older ones are deleted such that the rest
        stays evenly spaced in log(1 + step). None = no limit. Log and checkpoint (one copy of model and optimizer
        state, deleted when the run ends) are not counted.
    resume : continue the run in `path`: at the start of the block, the last checkpoint (at most about 10 s before the
        run was killed, or 20 times the time that a checkpoint takes to write) is loaded into model and optimizer, and
        ``rec.done`` is its step. Of a run that has ended the last state is loaded. A folder without a run gets a new
        one.

    Returns
    -------
    Recorder
        The context manager. A run with a loss that is not finite gets status ``"diverged"``.

    Raises
    ------
    Refused
        When an argument cannot be recorded; at the start of the block, when `path` holds a run and `resume` is False,
        or that run had another model, optimizer or schedule, or a damaged file (unless the model has its initial
        parameters: then it starts from the beginning, with a warning), or another process is writing into `path`; as
        `Recorder.step`; at the end of the block, when an optimizer step was not followed by ``rec.step``.

    Notes
    -----
    A resumed run has the same bits as an uninterrupted one if the loop depends only on the step and on the state of
    model and optimizer: batches and random numbers seeded by the step, and a learning rate such as
    ``LambdaLR(optimizer, factor, last_epoch=rec.done - 1)``, created inside the block.

    Examples
    --------
    >>> import tempfile, ntkit, torch
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> folder = tempfile.TemporaryDirectory()
    >>> with record(model, optimizer, folder.name + "/mine") as rec:
    ...     for step in range(rec.done, 6):
    ...         rows = torch.tensor([step, step + 1])
    ...         loss = ((model(x[rows]) - 2 * x[rows]) ** 2).mean()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    ...         rec.step(rows, loss)
    >>> trajectory = ntkit.Trajectory.open(folder.name + "/mine")
    >>> trajectory.steps, trajectory.batch(3), trajectory.learning_rates[3]
    ([0, 1, 2, 3, 4, 6], tensor([3, 4]), tensor([0.1000], dtype=torch.float64))
    >>> folder.cleanup()
    """
    return Recorder(model, optimizer, path, record, budget, resume=resume)


class Recorder:
    """Context manager of `record`, around the loop; its folder is ``path``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        path: str | Path,
        record: SnapshotSteps,
        budget: int | str | None,
        *,
        resume: bool = False,
        checkpoints: bool = True,  # False where a framework runs the loop: it resumes from its own checkpoints
    ) -> None:
        self.path = Path(path)
        self._model, self._opt = _unwrap(model, optimizer)
        if isinstance(record, Iterable) and not isinstance(record, str):
            record = list(record)  # it may be an iterator
        self._has_snapshot = snapshot_rule(record)
        self._budget = parse_bytes(budget, "budget", "Pass the disk space for all snapshots together.")
        self._resume, self._checkpoints = resume, checkpoints
        self._owners = [
            (f"{prefix}.{key}".lstrip("."), module._buffers, key)
            for prefix, module in self._model.named_modules()
            for key in module._buffers
        ]
        self._buffers: dict[str, Tensor] = {}
        settings = {
            "kind": "recorded",
            "record": _as_json(record),
            "budget": self._budget,
            **network_and_optimizer(self._model, self._opt),
        }
        self._run = RunWriter(self._model, self._opt, self.path, settings)
        self._log = StepLog(self.path / "log")
        self._sizes: dict[int, int] = {}  # bytes of the snapshot of each step
        self._hooks: list[Any] = []
        self._ended_at: int | None = None
        if self._budget is not None and self._budget < 3 * (size := len(self._blob())):
            expected = f"enough for 3 snapshots of {size} bytes each"
            raise refusal("budget", got=f"{self._budget} bytes", expected=expected, fix=f"Pass at least {3 * size}.")
        self._depth = 0  # optimizer steps begun and not finished: an optimizer's step may call its parent's
        self._updates = 0  # finished since the last rec.step()
        self._idle = 0  # calls of rec.step() without one
        self._first = 0  # first step of this block
        self._rates: list[float | Tensor] = []

    @property
    def done(self) -> int:
        """Optimizer steps recorded so far, in a resumed run including those of its checkpoint."""
        return len(self._log) if self._ended_at is None else self._ended_at

    def __enter__(self) -> Recorder:
        if not self._run.load_if_ended(self._resume):
            self._run.lock.acquire()
            try:
                if not self._run.load_if_ended(self._resume):  # another process may have ended it
                    self._start()
                    return self
            except BaseException:
                self._run.lock.release()
                raise
            self._run.lock.release()
        self._ended_at = read_run(self.path)["stop"]["step"]
        for group in self._opt.param_groups:  # for a scheduler that starts at step `done`, as a checkpoint has it
            group.setdefault("initial_lr", group.get("lr"))
        return self

    def _start(self) -> None:
        checkpoint = self._run.begin(self._network(), self._resume)
        self._log.run = self._run.id
        self._copy_buffers()
        rest = {} if checkpoint is None else checkpoint[1]
        self._sizes = {int(step): size for step, size in rest.get("kept", {}).items()}
        kept = {snapshot_path(self.path, step) for step in self._sizes}
        for file in snapshot_path(self.path, 0).parent.glob("step-*.safetensors"):
            if file not in kept:
                remove(file)  # written after the checkpoint, as were the steps that the log deletes here
        self._log.truncate(rest.get("step", 0), rest.get("diverged"))
        if self.done == 0 or self._has_snapshot(self.done):
            self._snapshot()
        self._checkpoint()
        self._depth = self._updates = self._idle = 0
        self._first = self.done
        self._hooks = [
            self._opt.register_step_pre_hook(self._before_update),
            self._opt.register_step_post_hook(self._after_update),
        ]

    def step(self, indices: Sequence[int] | Tensor | None = None, loss: float | Tensor | None = None) -> None:
        """Record the optimizer step since the last call; does nothing if there was none.

        Parameters
        ----------
        indices : the rows of the training set that the step used (integers, one dimension); None = not recorded.
        loss : its loss, before the update: a number or a scalar tensor. Tensors are read when the log is written, so
            that no call waits for a device.

        Raises
        ------
        Refused
            When the optimizer made more than one step, or stopped within one; when `indices` or `loss` have another
            form; or when the run has ended.
        """
        if not self._hooks:
            ended = self._ended_at is not None
            got = "a step of a run that has ended" if ended else "a call outside the block"
            expected = "a call inside 'with ntkit.record(...) as rec:', for step in range(rec.done, ...)"
            fix = "Record a new run in another folder." if ended else "Move the call into that block."
            raise refusal("rec.step", got=got, expected=expected, fix=fix)
        if self._depth or self._updates > 1:
            got = "an optimizer.step() that was interrupted" if self._depth else f"{self._updates} optimizer steps"
            expected = "one complete optimizer.step() since the last rec.step()"
            fix = "Call rec.step() once after each optimizer.step()."
            raise refusal("rec.step", got=got, expected=expected, fix=fix)
        if self._updates == 0:
            self._idle += 1
            return
        self._log.append(LogEntry(_checked_loss(loss), self._rates, _checked_indices(indices)))  # increments `done`
        self._copy_buffers()
        # Last: after a Ctrl-C before this line the step counts as unfinished, and gets no checkpoint.
        self._updates = 0
        snapshot = self._has_snapshot(self.done)
        if snapshot:
            self._snapshot()
            self._log.flush()
        if self._run.timer.due(snapshot):
            self._checkpoint()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if not self._hooks:
            return
        self._hooks = []
        try:
            self._end(kind)
        finally:
            self._run.lock.release()

    def _end(self, kind: type[BaseException] | None) -> None:
        """Write what is not written yet; after an exception (of class `kind`) leave a run that can be resumed."""
        complete = not (self._depth or self._updates)
        if kind is not None:
            with suppress(Refused):  # e.g. a full disk: the last checkpoint still exists, and `error` matters more
                self._log.flush()
                if complete:
                    self._checkpoint()
            return
        self._log.flush()
        if not complete:
            expected = "rec.step() after each optimizer.step()"
            fix = "Call it as the last line of the loop. As its first line it records each state one step late."
            raise refusal("rec.step", got="an optimizer.step() with no rec.step() after it", expected=expected, fix=fix)
        if self.done == self._first and self._idle > MOST_SKIPPED:
            got = f"no step of this {type(self._opt).__name__} in {self._idle} calls of rec.step()"
            fix = "Pass that optimizer, and call its step() outside a captured CUDA graph."
            raise refusal("optimizer", got=got, expected="the optimizer whose step() the loop calls", fix=fix)
        self._snapshot()
        stop: dict[str, Any] = {"reason": "ended", "step": self.done, "loss": None}
        if self._log.diverged is not None:
            at, value = self._log.diverged
            stop |= {"reason": "diverged", "diverged_at": at, "diverged_loss": value}
        self._run.finish("complete" if self._log.diverged is None else "diverged", stop, self._sizes)

    def _before_update(self, opt: Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth == 0:
            self._rates = [_rate(group.get("lr")) for group in opt.param_groups]
        self._depth += 1

    def _after_update(self, opt: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        # A fused optimizer under a GradScaler is called for skipped updates, too.
        skipped = getattr(opt, "found_inf", None)
        if self._depth == 0 and not (skipped is not None and bool(skipped)):
            self._updates += 1

    def _copy_buffers(self) -> None:
        """Copy the buffers: a forward pass changes them (running statistics) even if no update follows."""
        tensors = ((name, owner[key]) for name, owner, key in self._owners)
        self._buffers = {name: tensor.clone() for name, tensor in tensors if tensor is not None}

    def _network(self) -> dict[str, Tensor]:
        """Parameters now, and buffers as they were after the last step."""
        return {names[0]: self._buffers.get(names[0], tensor) for names, tensor in tied_names(self._model)}

    def _blob(self) -> bytes:
        """Bytes of a snapshot; their number does not depend on the step."""
        return safetensors_bytes(self._network(), self._run.label(self.done))

    def _snapshot(self) -> None:
        path = snapshot_path(self.path, self.done)
        if self.done in self._sizes and path.exists():
            return
        blob = self._blob()
        sizes = self._sizes | {self.done: len(blob)}
        for step in surplus_snapshots(sizes, self._budget):
            del sizes[step]
            remove(snapshot_path(self.path, step))
        write_bytes(path, blob)
        self._sizes = sizes

    def _checkpoint(self) -> None:
        """Write log and checkpoint, in this order: the log may be ahead of the checkpoint, never behind."""
        with self._run.timer.measured():
            self._log.flush()
            if self._checkpoints:
                rest = {"kept": self._sizes, "diverged": self._log.diverged}
                self._run.write_checkpoint(self.done, self._network(), {}, **rest)


def _unwrap(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Check model and optimizer, and remove the wrappers of torch and Accelerate."""
    check_module(model, fix="Pass the network that is trained.")
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(inner := getattr(model, "module" if isinstance(model, wrapped) else "_orig_mod", None), nn.Module):
        model = inner  # `_orig_mod` is how torch.compile names it
    if type(optimizer).__module__.startswith("accelerate."):
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, Optimizer):
        fix = "Pass the optimizer itself, as in ntkit.record(model, optimizer, path)."
        raise refusal("optimizer", got=f"a {type(optimizer).__name__}", expected="a torch.optim.Optimizer", fix=fix)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            expected = "parameters with values"
            fix = "Run one batch through the model, or move it to a device, before recording."
            raise refusal(f"model's {name}", got="a tensor without values yet", expected=expected, fix=fix)
    parameters = {id(p) for p in model.parameters()}
    if any(id(p) not in parameters for group in optimizer.param_groups for p in group["params"]):
        expected = "an optimizer of the model's parameters"
        fix = "Pass a module with all trained parameters: torch.nn.ModuleList([model, head])."
        raise refusal("optimizer", got="a parameter that is not the model's", expected=expected, fix=fix)
    return model, optimizer


def _as_json(record: SnapshotSteps) -> Any:
    if callable(record):
        return getattr(record, "__qualname__", type(record).__qualname__)
    if isinstance(record, Iterable) and not isinstance(record, str):
        return sorted(map(int, record))
    return int(record) if isinstance(record, Integral) else record


def _rate(rate: float | Tensor | None) -> float | Tensor:
    if isinstance(rate, Tensor):
        return rate.detach().clone()  # read later, so that no call waits for a device
    return math.nan if rate is None else float(rate)


def _checked_loss(loss: float | Tensor | None) -> float | Tensor | None:
    if isinstance(loss, Tensor) and loss.ndim == 0 and not loss.is_complex():
        # A copy: with CUDA graphs the next step overwrites the same memory.
        return float(loss.detach()) if loss.device.type == "cpu" else loss.detach().clone()
    if loss is None or (isinstance(loss, Real) and not isinstance(loss, Tensor)):
        return None if loss is None else float(loss)
    got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise refusal("loss", got=got, expected="a real number or a scalar tensor", fix="Pass the mean over the batch.")


def _checked_indices(indices: Sequence[int] | Tensor | None) -> Tensor | None:
    if indices is None:
        return None
    try:
        rows = indices if isinstance(indices, Tensor) else torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        rows = None
    if rows is not None and rows.numel() == 0:
        rows = rows.to(torch.int64)  # an empty list has no type
    if rows is None or rows.ndim != 1 or rows.dtype not in _INTEGERS:
        what = type(indices).__name__ if rows is None else f"{rows.dtype} of shape {list(rows.shape)}"
        expected = "integers in one dimension: the rows of the training set in this batch"
        fix = "Pass the row numbers of the data set, e.g. from a data set that returns them with each example."
        raise refusal("indices", got=what, expected=expected, fix=fix)
    return rows.to(torch.int64, copy=True)


_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
