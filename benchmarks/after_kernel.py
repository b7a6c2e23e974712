"""The after kernel of a whole pair of MNIST's classes: ``python -m benchmarks.after_kernel [THREADS ...]``.

The tangent kernel of the paper's VGG-like network (95,267 parameters, one output) on 11,982 images, in float32: wall
time, the peak of resident memory with everything (libraries, images, result), and the floor, which is one symmetric
matrix product of all per-sample gradients at the rate of a large product, and one forward and backward pass of all
samples in batches of 32. Each number of threads in a process of its own. Results: results/after_kernel.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
from torch.nn import functional as F

import ntkit
from benchmarks.common import gemm_rate, save
from ntkit.networks.built_in import build

IMAGES, BATCH = 11_982, 32


def passes(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Seconds of a forward and backward pass per sample."""
    some = x[: 16 * BATCH].split(BATCH)
    start = time.perf_counter()
    for part in some:
        F.softplus(model(part)).sum().backward()
    return (time.perf_counter() - start) / (len(some) * BATCH)


def measure(threads: int) -> dict[str, Any]:
    """Time, floor and memory with so many threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, model = torch.rand(IMAGES, 1, 28, 28), build("vgg", (1, 28, 28), 1, 0)
    parameters = sum(p.numel() for p in model.parameters())
    passes(model, x)
    each, rate = passes(model, x), gemm_rate()
    kernel = ntkit.TangentKernel(model, outputs="trace", memory="4 GB")
    kernel(x[:64])
    start = time.perf_counter()
    K = kernel(x)
    seconds = time.perf_counter() - start
    products, backward = IMAGES**2 * parameters / rate, IMAGES * each
    return {
        "threads": threads, "images": IMAGES, "parameters": parameters, "seconds": seconds,
        "products, floor": products, "forward and backward, floor": backward,
        "seconds / floor": seconds / (products + backward),
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "GB of the result": K.nbytes / 1e9,
    }  # fmt: skip


def main(numbers: list[int]) -> None:
    """Measure each in a process of its own, and save."""
    rows = []
    for threads in numbers or [1, psutil.cpu_count(logical=False) or 1]:
        words = [sys.executable, "-m", "benchmarks.after_kernel", "--one", str(threads)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    save("after_kernel", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]))))
    elif sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
    else:
        main([int(word) for word in sys.argv[1:]])
