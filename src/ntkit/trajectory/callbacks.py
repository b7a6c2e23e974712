"""Record a loop that a framework runs: `LightningCallback` and `TransformersCallback`.

Each derives from its framework's callback and is created on first use, so that this module imports neither framework.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, IterableDataset, Sampler

from ntkit.base.checks import refusal
from ntkit.trajectory.record import Recorder
from ntkit.trajectory.snapshots import SnapshotSteps


class _Callback:
    """Starts and ends a `Recorder`."""

    def __init__(self, path: str | Path, record: SnapshotSteps = "log", budget: int | str | None = None) -> None:
        super().__init__()
        self.path, self.record, self.budget = path, record, budget
        self.recorder: Recorder | None = None

    def _start(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.recorder = Recorder(model, optimizer, self.path, self.record, self.budget, checkpoints=False).__enter__()

    def _end(self, error: BaseException | None = None) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(type(error) if error is not None else None, error, None)


class _LightningCallback(_Callback):
    """Record a Lightning fit: ``Trainer(callbacks=[LightningCallback("runs/mine", indices="row")])``.

    A step is a step of the optimizer, however many batches are accumulated for it. Its loss is the one that its
    gradient belongs to: the sum of the batches' losses as Lightning scales them (their mean, for a full accumulation).
    Only the process of rank zero records. A fit that was killed leaves a readable run; Lightning resumes from its own
    checkpoints, and the steps after that are recorded in another folder.

    Parameters
    ----------
    path, record, budget : as in `ntkit.record`.
    indices : the key under which a batch (a dict) holds its rows of the training set; None = not recorded.

    Attributes
    ----------
    recorder : the `Recorder`, from the start of the fit.

    Raises
    ------
    Refused
        As `ntkit.record`; and when there is more than one optimizer, or a batch without that key.
    """

    def __init__(
        self,
        path: str | Path,
        record: SnapshotSteps = "log",
        budget: int | str | None = None,
        indices: str | None = None,
    ) -> None:
        super().__init__(path, record, budget)
        self.indices = indices
        self._reset()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if len(trainer.optimizers) != 1:
            fix = "Record such a loop with ntkit.record, with the optimizer whose steps are to count."
            raise refusal("LightningCallback", got=f"{len(trainer.optimizers)} optimizers", expected="one", fix=fix)
        self._reset()
        self._start(pl_module, trainer.optimizers[0])

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._reset()  # the batches so far belong to an earlier step, or to one that was skipped

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.recorder is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().sum())
        if self.indices is not None:
            self._rows.append(_rows(batch, self.indices))
        before = self.recorder.done
        loss = torch.stack(self._losses).sum() if self._losses else None
        self.recorder.step(torch.cat(self._rows) if self._rows else None, loss)
        if self.recorder.done > before:
            self._reset()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(exception)

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []


class _TransformersCallback(_Callback):
    """Record a Hugging Face training: ``Trainer(..., callbacks=[TransformersCallback("runs/mine")])``.

    A step is a step of the optimizer (``state.global_step``). Its loss is the one that the Trainer logs if it logs
    every step (``logging_steps=1``); a mean over several steps is not recorded. Set ``logging_nan_inf_filter=False``:
    else the Trainer reports an earlier mean for a loss that is not finite. The rows of each batch are recorded from the
    loader's sampler: not of a training that is resumed, of several processes, or of a dataset without places. The
    Trainer passes no exception to a callback: an interrupted run stays ``"running"``.

    Parameters
    ----------
    path, record, budget : as in `ntkit.record`.

    Attributes
    ----------
    recorder : the `Recorder`, from the start of the training.

    Raises
    ------
    Refused
        As `ntkit.record`; and with ``load_best_model_at_end``, which replaces the last state before a callback sees it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if args.load_best_model_at_end:
            expected = "a model that keeps its last state until the end"
            fix = "Remove that argument and load the best checkpoint after training."
            raise refusal("TransformersCallback", got="load_best_model_at_end=True", expected=expected, fix=fix)
        self._loss, self._logged = None, state.global_step
        self._order = _Order.of(kwargs.get("train_dataloader")) if state.global_step == 0 else None
        self._batches, self._rows = 0, None
        self._start(kwargs["model"], kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.recorder is not None and logs and "loss" in logs:
            self._loss = logs["loss"] if state.global_step == self._logged + 1 else None
            self._logged = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_step()  # the step before: its loss is logged only after its end

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recorder is not None and self._order is not None:
            self._order.begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rows = None if self._order is None else self._order.rows(self._batches + 1)
        self._batches = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_step()
        self._end()

    def _record_step(self) -> None:
        if self.recorder is not None:
            self.recorder.step(self._rows, self._loss)
            self._loss = None


class _Order(Sampler[int]):
    """A loader's sampler that keeps what it gave out, to tell which rows are in a batch; batches may be read ahead."""

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self._sampler, self._size = sampler, batch_size
        self._given: list[list[int]] = []  # of each pass over the data, whoever reads it
        self._place = (0, 0)  # the pass that trains, and rows of it that are used

    @classmethod
    def of(cls, loader: Any) -> _Order | None:
        """Put one into a loader; None where batches are not consecutive rows of a sampler."""
        batches = getattr(loader, "batch_sampler", None)
        if type(batches) is not BatchSampler or isinstance(loader.dataset, IterableDataset):
            return None
        order = cls(batches.sampler, batches.batch_size)
        batches.sampler = order
        return order

    def __iter__(self) -> Iterator[int]:
        given: list[int] = []
        self._given.append(given)
        for row in self._sampler:
            given.append(row)
            yield row

    def __len__(self) -> int:
        return len(self._sampler)

    def begin(self) -> None:
        """The next pass that begins is one of the training."""
        self._place = (len(self._given), 0)

    def rows(self, batches: int) -> Tensor:
        """Rows of the next batches of this pass."""
        rows: list[int] = []
        for _ in range(batches):
            epoch, used = self._place
            own = self._given[epoch][used : used + self._size]
            self._place = (epoch, used + len(own))
            rows += own
        return torch.tensor(rows)


# public name: package to install, its modules, base class, our class
_CLASSES = {
    "LightningCallback": ("lightning", ("lightning.pytorch", "pytorch_lightning"), "Callback", _LightningCallback),
    "TransformersCallback": ("transformers", ("transformers",), "TrainerCallback", _TransformersCallback),
}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, modules, base, ours = _CLASSES[name]
    for module in sorted(modules, key=lambda module: module not in sys.modules):  # imported ones first
        try:
            framework = import_module(module)
        except ImportError:
            continue
        globals()[name] = callback = type(
            name, (ours, getattr(framework, base)), {"__doc__": ours.__doc__, "__module__": __name__}
        )
        return callback
    fix = f"Run: pip install {package}"
    raise refusal("callback", got=f"no {package} in this Python", expected=f"the package {package}", fix=fix)


def _rows(batch: Any, key: str) -> Tensor:
    if not isinstance(batch, Mapping) or key not in batch:
        got = f"a batch with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        fix = "Let the dataset return {..., 'row': index} and pass indices='row'."
        raise refusal("indices", got=got, expected=f"a batch that is a dict with {key!r}", fix=fix)
    return torch.as_tensor(batch[key])
