"""Record a loop that a framework owns: `LightningCallback` and `TransformersCallback`.

Each is a class of that framework, made when it is first asked for, so that this module needs neither of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.trajectory.batch_order import Record
from ntkit.trajectory.record import Recorder


def __getattr__(name: str) -> Any:
    if name not in _MAKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _MAKERS[name]()
    return made


def _lightning() -> type:
    base = _installed("lightning", "lightning.pytorch", "pytorch_lightning").Callback

    class LightningCallback(base):
        """Record a Lightning fit: ``Trainer(callbacks=[LightningCallback("runs/mine", indices="row")])``.

        A step is a step of the optimiser, however many batches are accumulated for it. Its loss is what its gradient
        belongs to: the sum of the batches' losses as Lightning scales them (their mean, for a full accumulation).
        The process of rank zero records. A fit that was killed leaves a readable run; Lightning resumes from its own
        checkpoints, and what follows is recorded in another folder, from there.

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
            As `ntkit.record`; and when there is more than one optimiser, or a batch without that key.
        """

        __qualname__ = "LightningCallback"

        def __init__(
            self, path: str | Path, record: Record = "log", budget: int | str | None = None, indices: str | None = None
        ) -> None:
            super().__init__()
            self.path, self.record, self.budget, self.indices = path, record, budget, indices
            self.recorder: Recorder | None = None
            self._losses: list[Tensor] = []
            self._rows: list[Tensor] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.is_global_zero:
                return
            if len(trainer.optimizers) != 1:
                raise refusal(
                    "LightningCallback",
                    got=f"{len(trainer.optimizers)} optimisers",
                    expected="one",
                    fix="Record such a loop with ntkit.record, with the optimiser whose steps are to count.",
                )
            self._forget()
            recorder = Recorder(
                pl_module, trainer.optimizers[0], self.path, self.record, self.budget, _checkpoints=False
            )
            self.recorder = recorder.__enter__()

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self._forget()  # what came before was used for a step, or for one that was skipped

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
                self._forget()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.recorder is not None:
                self.recorder.__exit__(None, None, None)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if self.recorder is not None:
                self.recorder.__exit__(type(exception), exception, exception.__traceback__)

        def _forget(self) -> None:
            self._losses, self._rows = [], []

    return LightningCallback


def _transformers() -> type:
    base = _installed("transformers", "transformers").TrainerCallback

    class TransformersCallback(base):
        """Record a Hugging Face training: ``Trainer(..., callbacks=[TransformersCallback("runs/mine")])``.

        A step is a step of the optimiser (``state.global_step``). Its loss is the one the Trainer logs where it logs
        every step (``logging_steps=1``); a mean over several steps is no step's loss and is left out. The Trainer
        reports a loss that is not finite as an earlier mean unless ``logging_nan_inf_filter=False``. The Trainer tells
        a callback nothing of the rows in a batch, nor of an exception: a run broken off stays ``"running"``.

        Parameters
        ----------
        path, record, budget : as in `ntkit.record`.

        Attributes
        ----------
        recorder : the `Recorder`, from the start of the training.

        Raises
        ------
        Refused
            As `ntkit.record`; and with ``load_best_model_at_end``, which replaces the last state before a callback
            sees it.
        """

        __qualname__ = "TransformersCallback"

        def __init__(self, path: str | Path, record: Record = "log", budget: int | str | None = None) -> None:
            self.path, self.record, self.budget = path, record, budget
            self.recorder: Recorder | None = None
            self._loss: float | None = None
            self._logged = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            if args.load_best_model_at_end:
                raise refusal(
                    "TransformersCallback",
                    got="load_best_model_at_end=True",
                    expected="a model that keeps its last state until the end",
                    fix="Leave it out and load the best checkpoint after training.",
                )
            self._loss, self._logged = None, state.global_step
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            recorder = Recorder(model, optimizer, self.path, self.record, self.budget, _checkpoints=False)
            self.recorder = recorder.__enter__()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self._loss = logs["loss"] if state.global_step == self._logged + 1 else None
                self._logged = state.global_step

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._take()  # the step before: its loss is logged only after its end

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._take()
            if self.recorder is not None:
                self.recorder.__exit__(None, None, None)

        def _take(self) -> None:
            if self.recorder is not None:
                self.recorder.step(loss=self._loss)
            self._loss = None

    return TransformersCallback


_MAKERS = {"LightningCallback": _lightning, "TransformersCallback": _transformers}


def _installed(package: str, *names: str) -> ModuleType:
    """Import the first of these modules that is there; one the program uses already comes first."""
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise refusal(
        "callback", got=f"no {package} in this Python", expected="it installed", fix=f"Run: pip install {package}"
    )


def _rows(batch: Any, key: str) -> Tensor:
    if not isinstance(batch, Mapping) or key not in batch:
        got = f"a batch with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise refusal(
            "indices",
            got=got,
            expected=f"a batch that is a dict with {key!r}",
            fix="Let the dataset return {..., 'row': index} and pass indices='row'.",
        )
    return torch.as_tensor(batch[key])
