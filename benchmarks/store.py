"""A kernel matrix on disk against the same in memory: processor time, space, products, worker processes."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ntkit
from benchmarks.common import save, words

N, TILE, SCRATCH, REPEATS = 4000, 1000, "1 GB", 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Processor and wall time of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def in_one_process(folder: Path) -> dict[str, Any]:
    """In turn, so that both meet the same neighbors on the machine; medians of the processor time."""
    kernel, x = ntkit.TangentKernel(network(), outputs="trace", memory=SCRATCH), torch.randn(N, 784)
    ntkit.GramStore.create(folder / "first", kernel, x[:64], tile=32)
    place, times = folder / "kernel", {"memory": [], "store": []}
    for _ in range(REPEATS):
        shutil.rmtree(place, ignore_errors=True)
        times["memory"].append(seconds(lambda: kernel(x))[0])
        times["store"].append(seconds(lambda: ntkit.GramStore.create(place, kernel, x, tile=TILE, memory=SCRATCH))[0])
    K, v = ntkit.GramStore.open(place), torch.randn(N, 10, dtype=torch.float64)
    array = K.to_dask().astype("f8")
    memory, store = (statistics.median(values) for values in times.values())
    return {
        "n": N, "tile": TILE, "CPU s in memory": memory, "CPU s on disk": store, "ratio": store / memory,
        "MB": size_of(place) / 1e6, "MB of both halves": 4e-6 * N**2,
        "K v, CPU s": seconds(lambda: ntkit.GramStore.open(place) @ v)[0],
        "K v by a graph of Dask, CPU s": seconds(lambda: (array @ v.numpy()).compute(scheduler="synchronous"))[0],
        "check, CPU s": seconds(K.verify)[0],
    }  # fmt: skip


def by_workers(folder: Path, n: int = 4 * N) -> dict[str, Any]:
    """Wall time of worker processes that are already there, and the processor time of the busiest and of all."""
    from distributed import Client, LocalCluster

    kernel, x, found = ntkit.TangentKernel(network(), outputs="trace", memory=SCRATCH), torch.randn(n, 784), {"n": n}
    for workers in (1, 2):
        place, here = folder / f"{workers}", {"n_workers": workers, "threads_per_worker": 1, "memory_limit": None}
        with LocalCluster(**here, dashboard_address=":0") as cluster, Client(cluster) as client:
            where = {"scheduler": cluster.scheduler_address, "memory": SCRATCH}
            ntkit.GramStore.create(folder / f"first {workers}", kernel, x[:64], tile=16, **where)
            before = client.run(time.process_time)
            wall = seconds(lambda p=place, w=where: ntkit.GramStore.create(p, kernel, x, tile=TILE, **w))[1]
            busy = [after - before[name] for name, after in client.run(time.process_time).items()]
        what = {"wall s": wall, "CPU s of the busiest": max(busy), "CPU s of all": sum(busy)}
        found |= {f"{workers} workers, {name}": value for name, value in what.items()}
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [in_one_process(Path(folder)), by_workers(Path(folder))]
    save("store", rows)


if __name__ == "__main__":
    words(__doc__)
    main()
