"""Batches of samples through the model, shared out among workers."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, take
from ntkit.base.batch import kind as kind_of
from ntkit.base.workers import spread, workers
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.lockstep import known, runs_together, three_sets
from ntkit.jacobian.pairs import Whole
from ntkit.jacobian.replicas import in_one_thread, replica
from ntkit.jacobian.structure import Structure

_LONG = 0.2  # seconds of a pass of three samples from which three are enough to look at a model: it takes dozens
Item = TypeVar("Item")
Result = TypeVar("Result")


def parts_of(x: Batch, size: int) -> list[slice]:
    """The samples in order, `size` at a time."""
    n = count(x)
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


def each_batch(
    gradients: Gradients,
    x: Batch,
    parts: Sequence[slice],
    structure: Structure,
    keep: Callable[[slice, dict[str, Whole]], None],
    done: Callable[[slice], None] = lambda _: None,
) -> None:
    """Factors of every part of the samples, as `Gradients.batch` gives them.

    ``keep`` takes those of one part, in the thread of its worker; ``done(part)`` is called once a
    part is kept.
    """
    due = {part.start: gradients.due(part.stop - part.start) for part in parts}

    def work(own: Gradients, part: slice) -> None:
        factors = own.one_batch(take(x, part), structure, None, due[part.start])
        with torch.no_grad():
            keep(part, factors)

    with gradients.at_work(structure):
        share_out(gradients, structure, x, work, parts, done)


def share_out(
    gradients: Gradients,
    structure: Structure,
    x: Batch,
    work: Callable[[Gradients, Item], Result],
    items: Sequence[Item],
    done: Callable[[Item], None] = lambda _: None,
) -> list[Result]:
    """``[work(gradients, item) for item in items]`` by workers, inside `Gradients.at_work`.

    Each thread has `Gradients` of its own, over a copy of the model's modules. A model that several threads may not run
    at once goes through in the caller's.
    """
    together = len(items) > 1 and workers() > 1 and _together(gradients, structure, x)
    owners: dict[int, Gradients] = {}

    def own(item: Item) -> Result:
        thread = threading.get_ident()
        if thread not in owners:
            owners[thread] = copy.copy(gradients)
            owners[thread].model = replica(gradients.model)
        return work(owners[thread], item)

    if together:
        return spread(own, items, done)
    results = []
    for item in items:
        results.append(work(gradients, item))
        done(item)
    return results


def _together(gradients: Gradients, structure: Structure, x: Batch) -> bool:
    """Whether several threads may run the model at once: looked at once per structure."""
    on_cpu = next(iter(gradients.params.values())).device.type == "cpu"
    if not on_cpu or structure.expected is None or in_one_thread(gradients.model):
        return False
    if structure.together is None:
        few = three_sets(x, 3)
        if few is None:  # equal samples show nothing; others may come later
            return False
        params = list(gradients.params.values())

        def run(model: nn.Module, samples: Batch) -> list[Tensor]:
            own = copy.copy(gradients)
            own.model = model
            out = own.forward(samples, structure.plain_rnn, watch=False)
            weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
            grads = torch.autograd.grad([out], params, [weights], allow_unused=True)
            return [out, *(g.to_dense() for g in grads if g is not None)]

        kind = (kind_of(x), gradients.outputs, gradients.select, tuple(gradients.params))

        def look() -> bool:
            start = time.perf_counter()
            run(gradients.model, few[0])
            samples = few if time.perf_counter() - start > _LONG else three_sets(x)
            return samples is not None and runs_together(gradients.model, run, samples)

        with torch.enable_grad():
            structure.together = known(gradients.model, kind, look)
    return structure.together
