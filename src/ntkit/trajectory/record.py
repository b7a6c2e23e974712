"""Record a training loop that is the user's own: one line before it, one line in it."""

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
from ntkit.base.tensors import serialised, write_bytes
from ntkit.trajectory.batch_order import Record, recorded_at, thinned
from ntkit.trajectory.recorded_run import read_run, snapshot_path, tied_names
from ntkit.trajectory.run_writer import Run, described
from ntkit.trajectory.step_log import Entry, Log

SKIPPED = 20  # a gradient scaler that starts at 2^16 and halves at each step it skips is below one by then


def record(
    model: nn.Module,
    optimizer: Optimizer,
    path: str | Path,
    record: Record = "log",
    budget: int | str | None = None,
    resume: bool = False,
) -> Recorder:
    """Record a training loop as it runs; `Trajectory.open(path)` reads it, during the run and after.

    Use it as ``with ntkit.record(...) as rec:`` around the loop and call ``rec.step(indices, loss)`` after each
    ``optimizer.step()``; ``rec.done`` is the number of optimiser steps made so far. Step s of the trajectory is the
    model after s optimiser steps, buffers included. An update that did not take place (a gradient scaler skipped it)
    is no step. Learning rates are read when the optimiser makes its update, so a scheduler may be stepped anywhere.
    Leaving the block keeps the last state and ends the run; leave it before changing the model in another way. After an
    exception the run can be resumed.

    Parameters
    ----------
    model : any module. Of a compiled or data-parallel one the module inside is recorded, under its own names.
    optimizer : any torch optimiser of parameters of `model`.
    path : folder to write.
    record : the steps whose parameters are kept: ``"log"`` (0 and round(2^(k/2))), ``"all"``, an integer n (every
        n-th), a list, or a pure function step -> bool. The first and the last are always kept.
    budget : bytes, or text such as ``"2 GB"``, that all snapshots together may take: older ones are given up such that
        the rest stays evenly spaced in log(1 + step). None = no limit. Log and checkpoint (model and optimiser state
        once; gone when the run has ended) come on top.
    resume : go on with the run in `path`: on entering the block, the last checkpoint (about 10 s before the run was
        killed, or 20 times what a checkpoint takes to write) is put into model and optimiser, and ``rec.done`` is its
        step. Of an ended run the last state is loaded. With no run there, start.

    Returns
    -------
    Recorder
        The context manager. A run with a loss that is not finite gets status ``"diverged"``.

    Raises
    ------
    Refused
        When an argument cannot be recorded; on entering, when `path` holds a run and `resume` is False, or that run
        had another model, optimiser or schedule; by ``rec.step``, see there; on leaving, when an optimiser step was
        not followed by ``rec.step``.

    Notes
    -----
    A resumed run has the same bits as one never killed if your loop is a function of the step and of what model and
    optimiser hold: batches and random numbers seeded by the step, and a learning rate such as
    ``LambdaLR(optimizer, factor, last_epoch=rec.done - 1)``, made inside the block.

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
    return Recorder(model, optimizer, path, record, budget, resume)


class Recorder:
    """A loop being recorded; made by `record`.

    Attributes
    ----------
    path : the folder.
    done : optimiser steps recorded so far; of a resumed run those of its checkpoint, too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        path: str | Path,
        record: Record = "log",
        budget: int | str | None = None,
        resume: bool = False,
        *,
        _checkpoints: bool = True,  # not where a framework owns the loop: it resumes from its own
    ) -> None:
        self.path = Path(path)
        self._model, self._opt = _unwrapped(model, optimizer)
        if isinstance(record, Iterable) and not isinstance(record, str):
            record = list(record)  # once: it may be an iterator
        self._recorded = recorded_at(record)
        self._budget = parse_bytes(budget, "budget", "Say how much disk all snapshots together may take.")
        self._resume, self._checkpoints = resume, _checkpoints
        self._owners = [
            (f"{prefix}.{key}".lstrip("."), module._buffers, key)
            for prefix, module in self._model.named_modules()
            for key in module._buffers
        ]
        self._buffers: dict[str, Tensor] = {}
        if self._budget is not None and self._budget < 3 * (size := len(serialised(self._network()))):
            raise refusal(
                "budget",
                got=f"{self._budget} bytes",
                expected=f"room for 3 snapshots of {size} bytes each",
                fix=f"Allow at least {3 * size}.",
            )
        settings = {
            "kind": "recorded",
            "record": _as_json(record),
            "budget": self._budget,
            **described(self._model, self._opt),
        }
        self._run = Run(self._model, self._opt, self.path, settings)
        self._log = Log(self.path / "log")
        self._kept: dict[int, int] = {}  # recorded steps and their bytes
        self._hooks: list[Any] = []
        self._ended_at: int | None = None
        self._depth = 0  # optimiser steps begun and not finished: an optimiser may call its parent's step in its own
        self._updates = 0  # finished since the last rec.step()
        self._idle = 0  # calls of rec.step() without one
        self._began = 0  # where this block starts
        self._rates: list[float | Tensor] = []

    @property
    def done(self) -> int:
        """Optimiser steps recorded so far."""
        return len(self._log) if self._ended_at is None else self._ended_at

    def __enter__(self) -> Recorder:
        if self._run.ended(self._resume):
            self._ended_at = read_run(self.path)["stop"]["step"]
            for group in self._opt.param_groups:  # a scheduler made for step `done` finds what a checkpoint would hold
                group.setdefault("initial_lr", group.get("lr"))
            return self
        held = self._run.begin(self._network(), self._resume)
        self._keep_buffers()
        rest = {} if held is None else held[1]
        self._kept = {int(step): size for step, size in rest.get("kept", {}).items()}
        for file in snapshot_path(self.path, 0).parent.glob("step-*.safetensors"):
            if int(file.stem.removeprefix("step-")) not in self._kept:
                file.unlink()  # made after the checkpoint, as are these steps of the log
        self._log.cut(rest.get("step", 0), rest.get("diverged"))
        if self.done == 0 or self._recorded(self.done):
            self._snapshot()
        self._checkpoint()
        self._depth = self._updates = self._idle = 0
        self._began = self.done
        self._hooks = [
            self._opt.register_step_pre_hook(self._before_update),
            self._opt.register_step_post_hook(self._after_update),
        ]
        return self

    def step(self, indices: Sequence[int] | Tensor | None = None, loss: float | Tensor | None = None) -> None:
        """Record the optimiser step just made; nothing if there was none since the last call.

        Parameters
        ----------
        indices : the rows of the training set it used (integers, one dimension), if they are to be kept.
        loss : its loss, before the update: a number or a scalar tensor. Tensors are read when the log is written, so
            that a device is not waited for.

        Raises
        ------
        Refused
            When the optimiser made more than one step, or stopped within one; when `indices` or `loss` are not such; or
            when the run has ended.
        """
        if not self._hooks:
            raise refusal(
                "rec.step",
                got="a call outside the block" if self._ended_at is None else "a step of a run that has ended",
                expected="a call inside 'with ntkit.record(...) as rec:', for step in range(rec.done, ...)",
                fix="Record a further run in another folder." if self._ended_at is not None else "Move it there.",
            )
        if self._depth or self._updates > 1:
            raise refusal(
                "rec.step",
                got="an optimizer.step() that was broken off" if self._depth else f"{self._updates} optimiser steps",
                expected="one whole optimizer.step() since the last rec.step()",
                fix="Call rec.step() once after each optimizer.step().",
            )
        if self._updates == 0:
            self._idle += 1
            return
        self._log.append(Entry(_checked_loss(loss), self._rates, _checked_indices(indices)))  # now `done` is one more
        self._keep_buffers()
        # Last: a Ctrl-C before this line leaves a step that looks unfinished, and no checkpoint will be made of it.
        self._updates = 0
        recorded = self._recorded(self.done)
        if recorded:
            self._snapshot()
            self._log.flush()
        if self._run.pace.due(recorded):
            self._checkpoint()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if not self._hooks:
            return
        self._hooks = []
        whole = not (self._depth or self._updates)
        if kind is not None:
            with suppress(Refused):  # a full disk, say: the last checkpoint is still there, and this error counts more
                self._log.flush()
                if whole:
                    self._checkpoint()
            return
        self._log.flush()
        if not whole:
            raise refusal(
                "rec.step",
                got="an optimizer.step() with no rec.step() after it",
                expected="rec.step() after each optimizer.step()",
                fix="Call it as the last line of the loop; what was recorded so far is one step late if it came first.",
            )
        if self.done == self._began and self._idle > SKIPPED:
            raise refusal(
                "optimizer",
                got=f"no step of this {type(self._opt).__name__} in {self._idle} calls of rec.step()",
                expected="the optimiser whose step() the loop calls",
                fix="Pass that one; and leave its step out of a captured CUDA graph.",
            )
        self._snapshot()
        stop: dict[str, Any] = {"reason": "ended", "step": self.done, "loss": None}
        if self._log.diverged is not None:
            at, value = self._log.diverged
            stop |= {"reason": "diverged", "diverged_at": at, "diverged_loss": value}
        self._run.finish("complete" if self._log.diverged is None else "diverged", stop)

    def _before_update(self, opt: Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth == 0:
            self._rates = [_kept_value(group.get("lr")) for group in opt.param_groups]
        self._depth += 1

    def _after_update(self, opt: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        # A fused optimiser under a GradScaler is called also for an update it then skips.
        skipped = getattr(opt, "found_inf", None)
        if self._depth == 0 and not (skipped is not None and bool(skipped)):
            self._updates += 1

    def _keep_buffers(self) -> None:
        """Copy the buffers: a forward pass moves them (running statistics), and may come to nothing."""
        live = ((name, owner[key]) for name, owner, key in self._owners)
        self._buffers = {name: tensor.clone() for name, tensor in live if tensor is not None}

    def _network(self) -> dict[str, Tensor]:
        """Parameters as they are, buffers as they were at the last step."""
        return {names[0]: self._buffers.get(names[0], tensor) for names, tensor in tied_names(self._model)}

    def _snapshot(self) -> None:
        path = snapshot_path(self.path, self.done)
        if self.done in self._kept and path.exists():
            return
        blob = serialised(self._network())
        kept = self._kept | {self.done: len(blob)}
        for step in thinned(kept, self._budget):
            del kept[step]
            snapshot_path(self.path, step).unlink(missing_ok=True)
        write_bytes(path, blob)
        self._kept = kept

    def _checkpoint(self) -> None:
        """Write what a resumed run starts from. The log first: it may be ahead of the checkpoint, never behind."""
        with self._run.pace.measured():
            self._log.flush()
            if self._checkpoints:
                rest = {"kept": self._kept, "diverged": self._log.diverged}
                self._run.write_checkpoint(self.done, self._network(), {}, **rest)


def _unwrapped(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Check model and optimiser, and take them out of what others put around them."""
    if not isinstance(model, nn.Module):
        got = f"a {type(model).__name__}"
        raise refusal("model", got=got, expected="a torch.nn.Module", fix="Pass the network that is trained.")
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(inner := getattr(model, "module" if isinstance(model, wrapped) else "_orig_mod", None), nn.Module):
        model = inner  # `_orig_mod` is how torch.compile names it
    if type(optimizer).__module__.startswith("accelerate."):
        optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, Optimizer):
        raise refusal(
            "optimizer",
            got=f"a {type(optimizer).__name__}",
            expected="a torch.optim.Optimizer",
            fix="Pass the optimiser itself, as in ntkit.record(model, optimizer, path).",
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            raise refusal(
                f"model's {name}",
                got="a tensor without values yet",
                expected="parameters that exist",
                fix="Run one batch through the model, or move it to a device, before recording.",
            )
    mine = {id(p) for p in model.parameters()}
    if any(id(p) not in mine for group in optimizer.param_groups for p in group["params"]):
        raise refusal(
            "optimizer",
            got="a parameter that is not the model's",
            expected="an optimiser of the model's parameters",
            fix="Pass a module that holds all that is trained: torch.nn.ModuleList([model, head]).",
        )
    return model, optimizer


def _as_json(record: Record) -> Any:
    if callable(record):
        return getattr(record, "__qualname__", type(record).__qualname__)
    if isinstance(record, Iterable) and not isinstance(record, str):
        return sorted(map(int, record))
    return int(record) if isinstance(record, Integral) else record


def _kept_value(rate: float | Tensor | None) -> float | Tensor:
    if isinstance(rate, Tensor):
        return rate.detach().clone()  # read later: a device is not waited for
    return math.nan if rate is None else float(rate)


def _checked_loss(loss: float | Tensor | None) -> float | Tensor | None:
    if isinstance(loss, Tensor) and loss.ndim == 0 and not loss.is_complex():
        # A copy: with CUDA graphs the next step writes over the same memory.
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
        raise refusal(
            "indices",
            got=what,
            expected="integers in one dimension: the rows of the training set in this batch",
            fix="Give the dataset's own row numbers, e.g. from a dataset that returns them with each example.",
        )
    return rows.to(torch.int64, copy=True)


_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
