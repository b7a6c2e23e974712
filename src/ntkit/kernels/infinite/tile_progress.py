"""Work on the tiles of a limit, shared out among workers, with its progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from ntkit.base.progress import task
from ntkit.base.workers import spread, workers


def each(work: Callable, items: list, like: Tensor, here: bool = False) -> list:
    """The results of all items, by workers; `here`, one after the other: where an item's own parts go to workers."""
    here = here or like.device.type != "cpu"
    start, at_once = time.monotonic(), 1 if here else min(workers(), len(items))
    with task("infinite kernel", len(items)) as progress:

        def done(_: object) -> None:
            if progress.done == 0:
                progress.expect((time.monotonic() - start) * (len(items) - 1) / at_once)
            progress.advance()

        if not here:
            return spread(work, items, done)
        results = []
        for item in items:
            results.append(work(item))
            done(item)
        return results
