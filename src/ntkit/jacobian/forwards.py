"""Forward passes of many samples, shared out among workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, kind, take
from ntkit.base.workers import spread, workers
from ntkit.jacobian.lockstep import known, runs_together, three_sets
from ntkit.jacobian.model_calls import call, untouched, unwritten
from ntkit.jacobian.model_outputs import Select, part_of, real_rows, reduce_outputs
from ntkit.jacobian.replicas import in_one_thread, replicas

Modules = dict[nn.Module, nn.Module]


def each_forward(
    model: nn.Module, x: Batch, batch: int, work: Callable[[Modules, Batch], Tensor], select: Select | None = None
) -> list[Tensor]:
    """``work(modules, part)`` for every `batch` samples; ``modules[module]`` is the one to call in that thread.

    ``select``: the part of the model's output that `work` looks at. Call it inside `model_calls.untouched`.
    """
    parts = [take(x, slice(begin, begin + batch)) for begin in range(0, count(x), batch)]
    themselves = {module: module for module in model.modules()}
    if len(parts) == 1 or workers() == 1 or not _together(model, x, select):
        return [work(themselves, part) for part in parts]
    owners: dict[int, Modules] = {}

    def own(part: Batch) -> Tensor:
        thread = threading.get_ident()
        if thread not in owners:
            owners[thread] = replicas(model)
        return work(owners[thread], part)

    return spread(own, parts)


def _together(model: nn.Module, x: Batch, select: Select | None) -> bool:
    """Whether several threads may run the model at once."""
    device, samples = next((p.device.type for p in model.parameters()), "cpu"), three_sets(x)
    if device != "cpu" or in_one_thread(model) or samples is None:
        return False

    def look() -> bool:
        floats = isinstance(out := part_of(call(model, samples[0]), select), Tensor) and out.is_floating_point()
        return floats and runs_together(model, lambda own, x: [part_of(call(own, x), select)], samples)

    return known(model, (kind(x), select), look)


def raw_outputs(model: nn.Module, x: Batch, batch: int = 128, scalar: Callable[[Any], Tensor] | None = None) -> Tensor:
    """Outputs of the model as they are, [n, ...], in batches, without gradients; the model is left as it was.

    ``scalar``: a callable from the outputs to one number per sample, whose values [n, 1] are wanted instead.
    """

    def outputs(modules: Modules, part: Batch) -> Tensor:
        raw = call(modules[model], part)
        return real_rows(raw, count(part)) if scalar is None else reduce_outputs(raw, scalar, count(part))

    with untouched(model, {}), torch.no_grad(), unwritten(model):
        return torch.cat(each_forward(model, x, batch, outputs))


def inputs_of_last_linear(model: nn.Module, x: Tensor) -> tuple[Tensor, str | None]:
    """Inputs [n, features] of the dense layer that gives the outputs, and its name; else the outputs, and None."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda m, x, y, name=name: calls.append((name, x[0].detach(), y)))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        out = raw_outputs(model, x, batch=len(x)).reshape(len(x), -1)
    finally:
        for handle in handles:
            handle.remove()
    if calls:
        name, features, y = calls[-1]
        if features.dim() == 2 and y.shape == out.shape and torch.equal(y.detach(), out):
            return features, name
    return out, None
