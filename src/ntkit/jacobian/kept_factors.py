"""Factors of a block of samples, kept for products with many other blocks: the tiles of a large kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntkit.base.batch import Batch
from ntkit.base.workers import workers
from ntkit.jacobian.contraction import Tile
from ntkit.jacobian.engine import Engine
from ntkit.jacobian.plan import Job, Plan
from ntkit.jacobian.strip import Strip


@dataclass(frozen=True)
class KeptFactors:
    """Prepared factors of the samples `x` under `plan`; `job` has the plan as it fits these samples."""

    x: Batch
    plan: Plan
    job: Job
    tile: Tile


def plan_for_tiles(engine: Engine, x: Batch, size: int, n: int | None = None) -> Plan:
    """Plan the kernel of `x`, or of `n` samples like `x`, in square tiles, each shared out among the workers."""
    plan = engine.plan(x, n=n)
    return replace(plan, tile=size, columns=size, strip=max(1, min(plan.strip, -(-size // (2 * workers())))))


def factors_of(engine: Engine, x: Batch, plan: Plan) -> KeptFactors:
    """Send samples through the model. The bits depend on the plan and the samples alone."""
    return engine.run(lambda job: KeptFactors(x, plan, job, engine.tile(x, job.left, job.plan)), x, plan=plan)


def product_of(engine: Engine, first: KeptFactors, second: KeptFactors | None) -> Tensor:
    """Kernel of two blocks of samples; ``second=None``: of the first with itself, exactly symmetric."""
    if second is not None and first.job.plan != second.job.plan:  # a graph turned out irregular in between
        return engine.gram(first.x, second.x, plan=first.plan)
    right = first if second is None else second
    like, shape = first.tile.rows, (1, first.tile.n, right.tile.n, *engine.tail(first.job.left.outputs))
    with torch.no_grad():
        result = torch.empty(shape, dtype=engine.dtype, device=like.device)
        job = Job(first.job.left, right.job.left, first.job.plan)
        strip = Strip(engine.gradients, job, engine.mode, names=None, advance=lambda _: None)
        strip.multiply(result, first.tile, right.tile)
    return result[0]
