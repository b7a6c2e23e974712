"""Does the cost model choose well? Every route open to a parameter is timed, and the chosen one compared with the best.

``python -m benchmarks.routes``; a parameter's kernel is computed alone, forward and backward passes included in all.
"""

from __future__ import annotations

from functools import partial

import ntkit
from benchmarks.common import median_seconds, save, words
from benchmarks.workloads import WORKLOADS
from ntkit.jacobian.plan import ROUTES

SAMPLES = {"mlp-10-64": 64, "mlp-1-1000": 1000, "cnn-10-20": 20, "vgg-1-100": 100, "vgg-10-100": 50,
           "resnet18-10-32": 8, "vit-10-32": 8, "gpt2-1-16": 8}  # fmt: skip
HOPELESS = 10  # times the chosen route's time by the model: not timed, or one shape takes the morning
LARGEST = 1e6  # entries: the rows of a larger one need more memory than they are worth timing


def main() -> None:
    rows = []
    for workload in WORKLOADS:
        if workload.name not in SAMPLES:
            continue
        model, x = workload.model(), workload.draw(SAMPLES[workload.name], 1)
        seen = set()
        for name, parameter in model.named_parameters():
            kernel = ntkit.TangentKernel(model, workload.outputs, params=[name])
            size = kernel._engine.structure(x).sizes[name]  # the shape of its gradient: one parameter of each
            if size in seen or parameter.dim() < 2 or parameter.numel() > LARGEST:
                continue
            seen.add(size)
            plan = kernel.plan(x)
            chosen = plan.route(name)
            seconds = {}
            for route in ROUTES:
                forced = ntkit.TangentKernel(model, workload.outputs, params=[name], routes={name: route})
                try:
                    expected = forced.plan(x).seconds
                except ntkit.Refused:
                    continue  # its gradient does not come in that form
                if expected > HOPELESS * max(plan.seconds, 1e-3):
                    continue
                seconds[route] = median_seconds(partial(forced, x), repeats=3)
            best = min(seconds, key=lambda route: seconds[route])
            rows.append({
                "workload": workload.name, "samples": len(x), "parameter": name, "chosen": chosen, "best": best,
                "chosen / best": seconds[chosen] / seconds[best], "seconds": seconds,
            })  # fmt: skip
            print(rows[-1], flush=True)
    save("routes", rows, worst=max(row["chosen / best"] for row in rows))


if __name__ == "__main__":
    words(__doc__)
    main()
