"""The run that `train` writes: it holds the network at the last sound step, so that a divergence keeps that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkit.base.tensors import write_tensors
from ntkit.trajectory.learning_rates import learning_rates
from ntkit.trajectory.recorded_run import snapshot_path, tied_names
from ntkit.trajectory.run_writer import Run


class HeldRun(Run):
    """A run being written, with a held copy of the network at the last step whose loss was finite."""

    def __init__(self, model: nn.Module, opt: Optimizer, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(model, opt, folder, settings)
        self.step = 0
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self._live = {names[0]: tensor for names, tensor in tied_names(model)}
        trained = {name for name, _ in model.named_parameters()}
        self._buffers = [name for name in self._live if name not in trained]
        self._held = {name: tensor.clone() for name, tensor in self._live.items()}

    def start(self, resume: bool) -> None:
        """Write run.json and the first checkpoint, or take up the one there is."""
        initial = learning_rates(self.opt)
        taken_up = self.begin(self._held, resume)
        if taken_up is None:
            return self.checkpoint(0)
        tensors, rest = taken_up
        self.step, self.losses = rest["step"], tensors["losses"].tolist()
        # A checkpoint of an older release has no rates: it knew no schedule.
        self.rates = tensors["learning_rates"].tolist() if "learning_rates" in tensors else [initial] * self.step
        self.hold()

    def buffers(self) -> list[Tensor]:
        """Copy the buffers."""
        return [self._live[name].clone() for name in self._buffers]

    def hold(self, buffers: list[Tensor] | None = None) -> None:
        """Hold a copy of the network as it is now, with these buffers if given."""
        for name, tensor in self._live.items():
            self._held[name].copy_(tensor)
        for name, tensor in zip(self._buffers, buffers or [], strict=False):
            self._held[name].copy_(tensor)

    def keep(self, step: int, recorded: bool) -> None:
        """Write the held network if `step` is recorded, and a checkpoint if it is time for one."""
        if recorded:
            write_tensors(snapshot_path(self.folder, step), self._held)
        if self.pace.due(recorded):
            self.checkpoint(step)

    def checkpoint(self, step: int) -> None:
        """Write the held network, the optimiser's state and the log so far."""
        with self.pace.measured():
            self.write_checkpoint(step, self._held, self._log(step))

    def end(self, step: int, reason: str, loss: float | None, **more: Any) -> None:
        """Leave the held network, which is that of `step`, in the model and as the last snapshot."""
        with torch.no_grad():
            for name, tensor in self._live.items():
                tensor.copy_(self._held[name])
        write_tensors(snapshot_path(self.folder, step), self._held)
        write_tensors(self.folder / "losses.safetensors", self._log(step))
        stop = {"reason": reason, "step": step, "loss": loss, **more}
        self.finish("diverged" if reason == "diverged" else "complete", stop)

    def end_diverged(self, step: int, loss: float) -> None:
        """End at the step before `step`, whose loss (or parameters) are not finite."""
        last = max(step - 1, 0)
        known = self.losses[last] if step > 0 else None
        self.end(last, "diverged", known, diverged_at=step, diverged_loss=str(loss))

    def _log(self, steps: int) -> dict[str, Tensor]:
        rates = torch.tensor(self.rates[:steps], dtype=torch.float64)
        return {
            "losses": torch.tensor(self.losses[:steps], dtype=torch.float64),
            "learning_rates": rates.reshape(len(rates), len(self.opt.param_groups)),
        }
