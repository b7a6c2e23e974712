"""The run that `train` writes, with a copy of the last network whose loss was finite: where a diverged run ends."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkit.base.checks import refusal
from ntkit.base.tensors import write_tensors
from ntkit.trajectory.recorded_run import snapshot_path
from ntkit.trajectory.run_writer import RunWriter


class TrainingRun(RunWriter):
    """The folder of a run of `train`, its losses and learning rates, and the network at the last finite loss."""

    def __init__(self, model: nn.Module, opt: Optimizer, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(model, opt, folder, settings)
        self.step = 0
        self._recorded: Collection[int] = ()
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self._network = {name: tensor.clone() for name, tensor in self.tensors().items()}

    def start(self, resume: bool, recorded: Collection[int]) -> None:
        """Write run.json and the first checkpoint, or continue from the last one; `recorded` steps get a snapshot."""
        self._recorded = recorded
        checkpoint = self.begin(self._network, resume, recorded)
        if checkpoint is None:
            return self.checkpoint(0)
        tensors, rest = checkpoint
        self.step, self.losses = rest["step"], tensors["losses"].tolist()
        self.rates = tensors["learning_rates"].tolist()
        self.copy_network()

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers, by name."""
        return {name: tensor.detach().clone() for name, tensor in self.model.named_buffers()}

    def copy_network(self, buffers: dict[str, Tensor] | None = None) -> None:
        """Copy the network as it is now, with these buffers if any are passed."""
        now = self.tensors() | (buffers or {})
        for name, copy in self._network.items():
            if name not in now or (now[name].shape, now[name].dtype) != (copy.shape, copy.dtype):
                got = f"{list(now[name].shape)} {now[name].dtype}" if name in now else "no such tensor"
                expected = f"{list(copy.shape)} {copy.dtype}, as before the training"
                fix = "Let forward keep each buffer's shape; call the model once before if it sets them up then."
                raise refusal(f"model's {name}", got=got, expected=expected, fix=fix)
            copy.copy_(now[name])

    def write(self, step: int, snapshot: bool) -> None:
        """Write the copy of the network as a snapshot if asked, and a checkpoint if one is due."""
        if snapshot:
            write_tensors(snapshot_path(self.folder, step), self._network, self.label(step))
        if self.timer.due(snapshot):
            self.checkpoint(step)

    def checkpoint(self, step: int) -> None:
        """Write the copy of the network, the optimizer's state and the log so far."""
        with self.timer.measured():
            self.write_checkpoint(step, self._network, self._log(step))

    def end(self, step: int, reason: str, loss: float | None, **more: Any) -> None:
        """Put the copy of the network, which is that of `step`, into the model and into the last snapshot."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(self._network[name])
        write_tensors(snapshot_path(self.folder, step), self._network, self.label(step))
        write_tensors(self.folder / "losses.safetensors", self._log(step), {"run": self.id})
        stop = {"reason": reason, "step": step, "loss": loss, **more}
        snapshots = [s for s in self._recorded if s < step]
        self.finish("diverged" if reason == "diverged" else "complete", stop, [*snapshots, step])

    def end_diverged(self, step: int, loss: float) -> None:
        """End at the step before `step`, whose loss (or parameters) are not finite."""
        last = max(step - 1, 0)
        value = self.losses[last] if step > 0 else None
        self.end(last, "diverged", value, diverged_at=step, diverged_loss=str(loss))

    def _log(self, steps: int) -> dict[str, Tensor]:
        rates = torch.tensor(self.rates[:steps], dtype=torch.float64)
        return {
            "losses": torch.tensor(self.losses[:steps], dtype=torch.float64),
            "learning_rates": rates.reshape(len(rates), len(self.opt.param_groups)),
        }
