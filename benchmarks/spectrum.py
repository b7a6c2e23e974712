"""Top eigenpairs of a tangent kernel, four ways: seconds, peak memory, largest residual. Each in a process of its own.

``python -m benchmarks.spectrum [points [pairs [limit in seconds]]]``: an MLP of 6 layers of 256 on points of the plane,
10,000 points and 100 pairs by default. "gram": the Gram matrix is formed (tiles, float32), then block Krylov iteration
on it. "matrix-free": the same iteration on the operator, O(n k + P) memory. "eigsh": SciPy's ARPACK on the same
operator. "eigh": the Gram matrix and a full dense decomposition.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from torch import nn

import ntkit
from benchmarks.common import save

WAYS = ("gram", "matrix-free", "eigsh", "eigh")


def network() -> nn.Module:
    """Six layers of 256, leaky ReLU: 330,000 parameters."""
    torch.manual_seed(0)
    sizes = [2, 256, 256, 256, 256, 256, 1]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.LeakyReLU())]
    return nn.Sequential(*layers[:-1])


def measure(way: str, n: int, k: int) -> dict[str, float]:
    """Seconds, peak memory beyond the start (GB), largest residual over the largest eigenvalue, sum of the top k."""
    kernel = ntkit.TangentKernel(network(), outputs="trace", memory="1 GB")
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    kernel(x[:64])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if way == "eigsh":
        from scipy.sparse.linalg import eigsh

        operator = kernel.operator(x).to_scipy()
        values, vectors = eigsh(operator, k=k, which="LA", tol=1e-6)
        seconds = time.perf_counter() - start
        residual = float(np.linalg.norm(operator @ vectors - vectors * values, axis=0).max() / values.max())
        total = float(values.sum())
    else:
        K = kernel.operator(x) if way == "matrix-free" else kernel(x)
        top = ntkit.spectrum(K, None if way == "eigh" else k)
        seconds = time.perf_counter() - start
        residual, total = float(top.residuals[:k].max()), float(top.eigenvalues[:k].sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "peak_GB": peak / 1e6, "residual": residual, "sum": total}


def main(n: int = 10_000, k: int = 100, limit: float = 900) -> None:
    """Measure all ways."""
    rows = []
    for way in WAYS:
        row: dict = {"way": way, "points": n, "pairs": k}
        try:
            words = [sys.executable, "-m", "benchmarks.spectrum", "--one", way, str(n), str(k)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=limit)
            row |= json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            row["seconds"] = f"> {limit:g}"
        rows.append(row)
        print(row, flush=True)
    save("spectrum", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main(*map(int, sys.argv[1:]))
