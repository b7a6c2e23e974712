"""When along training the kernel becomes good: machines with the kernel of one recorded step after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ntkit.jacobian.forwards import raw_outputs
from ntkit.kernels.tangent import TangentKernel
from ntkit.studies.long2021.long_setting import (
    BATCH,
    Setting,
    examples,
    extent,
    logistic,
    network,
    sample,
    trained,
)
from ntkit.studies.long2021.moments import agreement, correlation, quality
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import device
from ntkit.trajectory.batch_order import steps_per_epoch

KEPT = ("status", "test_error", "margin", "alignment", "effective_rank")


def along_part(setting: Setting, seed: int) -> StudyPart:
    """The kernels of a run at steps that grow by a constant factor."""
    return StudyPart("along", setting, f"{setting.file(seed)}-along", along, (setting, seed))


def along(work: Work, setting: Setting, seed: int) -> Result:
    """Test error of the machine and of the network, loss and agreement at each step, on a sample of the images."""
    whole, sizes = examples(work, setting), extent(work)
    model = network(setting, whole.input_shape, seed)
    run = trained(work, setting, seed, whole, model)
    data = sample(whole, sizes.kernel_train, sizes.kernel_test)
    x, x_test = data.x_train.to(device()), data.x_test.to(device())
    rows: list[dict[str, Any]] = []
    svm = None  # of the step before
    for step in spaced(run.steps, sizes.ratio):
        run.load(model, step)
        logits, logits_test = (raw_outputs(model, part)[:, 0].cpu() for part in (x, x_test))
        kernel = TangentKernel(model, outputs="trace")
        entry, decision, svm = quality(kernel(x).cpu(), kernel(x_test, x).cpu(), data, start=svm)
        rows.append({
            "step": step,
            "epochs": step / steps_per_epoch(len(whole.x_train), BATCH),
            "loss": float(logistic(logits[:, None], data.y_train)),
            "network_error": float((logits_test > 0).long().ne(data.y_test).double().mean()),
            "agreement": agreement(decision, logits_test),
            "correlation": correlation(decision, logits_test),
            **{name: entry[name] for name in KEPT},
        })  # fmt: skip
    return Result({"seed": seed, "steps": rows}, {})


def spaced(steps: Sequence[int], ratio: float) -> list[int]:
    """Recorded steps from the first on, each at least `ratio` times the one before; and the last.

    >>> spaced([0, 2, 3, 4, 6, 8, 10], 2)
    [0, 2, 4, 8, 10]
    """
    kept = list(steps[:1])
    for step in steps[1:]:
        if step >= ratio * kept[-1] or step == steps[-1]:
            kept.append(step)
    return kept
