"""Peak memory of a kernel computation against its budget, each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil
import torch

import ntkit
from benchmarks.common import save
from ntkit.networks.built_in import build

CASES = [  # budget in GB, outputs mode, samples, outputs of the network
    (0.1, "trace", 600, 1),
    (0.3, "trace", 1500, 1),
    (0.3, "full", 200, 10),
    (1.0, "trace", 3000, 1),
]


def measure(budget: float, mode: str, n: int, outputs: int) -> float:
    """Give the peak of resident memory beyond the start and the result, as a share of the budget."""
    torch.manual_seed(0)
    x = torch.rand(n, 1, 28, 28)
    kernel = ntkit.TangentKernel(build("vgg", (1, 28, 28), outputs, 0), outputs=mode, memory=int(budget * 1e9))
    kernel(x[:8])
    process = psutil.Process()
    start, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    K = kernel(x)
    done.set()
    watcher.join()
    return (peak - start - K.numel() * K.element_size()) / (budget * 1e9)


def main() -> None:
    rows = []
    for case in CASES:
        words = [sys.executable, "-m", "benchmarks.memory", *map(str, case)]
        share = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        names = ("budget_GB", "mode", "n", "outputs")
        rows.append({"network": "VGG-38", **dict(zip(names, case, strict=True)), "peak / budget": share})
    save("memory", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(float(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        main()
