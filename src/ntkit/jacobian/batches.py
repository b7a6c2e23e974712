"""Batches of samples through the model, shared out among workers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import torch

from ntkit.base.batch import Batch, take
from ntkit.base.workers import spread
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.pairs import Whole
from ntkit.jacobian.replicas import in_one_thread, modes_open, replica
from ntkit.jacobian.structure import Structure


def each_batch(
    gradients: Gradients,
    x: Batch,
    parts: list[slice],
    structure: Structure,
    keep: Callable[[slice, dict[str, Whole]], None],
    done: Callable[[slice], None],
) -> None:
    """Factors of every part of the samples, as `Gradients.batch` gives them.

    ``keep`` takes those of one part, in the thread of its worker; ``done`` is told of parts that are kept.
    """
    due = {part.start: gradients.due(part.stop - part.start) for part in parts}
    owners: dict[int, Gradients] = {}

    def work(part: slice) -> None:
        thread = threading.get_ident()
        if thread not in owners:
            owners[thread] = copy.copy(gradients)
            if together:
                owners[thread].model = replica(gradients.model)
        factors = owners[thread].one_batch(take(x, part), structure, None, due[part.start])
        with torch.no_grad():
            keep(part, factors)

    def work_through(parts: list[slice]) -> None:
        for part in parts:
            work(part)
            done(part)

    on_cpu = next(iter(gradients.params.values())).device.type == "cpu"
    together = on_cpu and structure.together and structure.expected is not None and not in_one_thread(gradients.model)
    with gradients.at_work(structure):
        if together:
            spread(work, parts, done)
        elif on_cpu and not modes_open():
            spread(work_through, [parts])
        else:
            work_through(parts)
