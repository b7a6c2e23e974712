"""The tangent kernel on a quiet machine and beside as many busy processes as cores: ``python -m benchmarks.busy``.

Each workload with one thread and with all, quiet and busy, in turns within one process. Nothing else may run. Results:
results/busy.json. Read it so: all threads beside busy processes should take no longer than one thread there.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.func import functional_call, jacrev, vmap

import ntkit
from benchmarks.common import save, words
from benchmarks.workloads import WORKLOADS, Workload

SECONDS = 2.0  # per workload, threads and load
TUTORIAL = ("cnn-10-20", "vgg-1-100")  # where the tutorial's Jacobian is measured, too
# left out: minutes each
HEAVY = ("mlp-10-4000", "vgg-1-1000", "vgg-10-1000", "resnet18-10-32", "vit-10-32", "gpt2-1-16")
_BUSY = "import math\nwhile True: math.factorial(3000)"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside some processes that do nothing but compute."""
    running = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    time.sleep(0.5 * bool(processes))
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def median(work: Callable[[], Any]) -> float:
    """Median wall time of as many calls as fit, three at least."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tutorial(w: Workload) -> Callable[[], Any]:
    """The torch.func tutorial's form: Jacobians of single samples, then one product per parameter."""
    model, x1, x2 = w.model(), w.draw(w.n1, 1), w.draw(w.n2, 2)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def rows(x: torch.Tensor) -> list[torch.Tensor]:
        one = lambda p, s: functional_call(model, p, (s[None],))[0]
        return [j.flatten(2) for j in vmap(jacrev(one), (None, 0))(params, x).values()]

    return lambda: sum(torch.einsum("Naf,Mbf->NMab", a, b) for a, b in zip(rows(x1), rows(x2), strict=True))


def measured(label: str, work: Callable[[], Any], cores: int) -> dict[str, Any]:
    """One row: seconds with one thread and with all, quiet and busy, and what that says."""
    row: dict[str, Any] = {"workload": label}
    for load, processes in (("quiet", 0), ("busy", cores)):
        with busy(processes):
            for threads in (1, cores):
                torch.set_num_threads(threads)
                row[f"{threads} threads, {load}"] = median(work)
        row[f"gain, {load}"] = row[f"1 threads, {load}"] / row[f"{cores} threads, {load}"]
    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in row.items()), flush=True)
    return row


def main() -> None:
    """Measure and save."""
    cores = psutil.cpu_count(logical=False) or 1
    before, rows = torch.get_num_threads(), []
    for w in WORKLOADS:
        if w.name in HEAVY:
            continue
        model, x1 = w.model(), w.draw(w.n1, 1)
        kernel, sets = ntkit.TangentKernel(model, outputs=w.outputs), [x1] if w.symmetric else [x1, w.draw(w.n2, 2)]
        rows.append(measured(w.name, lambda kernel=kernel, sets=sets: kernel(*sets), cores))
        if w.name in TUTORIAL:
            rows.append(measured(f"{w.name}, torch.func tutorial", tutorial(w), cores))
        save("busy", rows, cores=cores, processes=cores)
    torch.set_num_threads(before)


if __name__ == "__main__":
    words(__doc__)
    main()
