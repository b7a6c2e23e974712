"""The hard-margin SVM on a kernel matrix in a file: ``python -m benchmarks.svm_file [POINTS]``, 60,000 if none.

A Gaussian kernel of points in 20 dimensions, two classes with a curved boundary and no points near it, float32, written
to a temporary folder (14.4 GB for 60,000 points) and read as a read-only ``numpy.memmap`` in a process of its own, with
one thread: wall time of the check of the matrix and of the fit, certificate, peak of anonymous memory (pages of the
file are the system's). Results: results/svm_file.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ntkit
from benchmarks.common import save

ROWS = 500  # of the matrix, written at a time


def write(folder: Path, n: int) -> None:
    """Write the labels and the matrix: the upper triangle is computed, the lower one copied, so K = K^T exactly."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3 * n, 20, generator=g)
    height = x[:, 0] + 0.5 * torch.sin(2 * x[:, 1])
    far = (height.abs() > 0.4).nonzero()[:n, 0]
    x, height = x[far], height[far]
    np.save(folder / "y.npy", (height > 0).long().numpy())
    K = np.memmap(folder / "K", np.float32, "w+", shape=(n, n))
    square = x.square().sum(1)
    for i in range(0, n, ROWS):
        rows = slice(i, i + ROWS)
        distance = square[rows, None] + square[i:] - 2 * x[rows] @ x[i:].T
        values = torch.exp(-distance / 40)
        own = len(values)
        values[:, :own] = values[:, :own].triu() + values[:, :own].triu(1).T
        K[rows, i:], K[i:, rows] = values.numpy(), values.T.numpy()
    K.flush()


def anonymous() -> float:
    """Anonymous memory of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


def measure(folder: Path) -> dict[str, Any]:
    """Check and fit the matrix of a folder."""
    torch.set_num_threads(1)
    y, done, peak = np.load(folder / "y.npy"), threading.Event(), [0.0]
    K = np.memmap(folder / "K", np.float32, "r", shape=(len(y), len(y)))

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], anonymous())

    watcher, before, start = threading.Thread(target=watch), anonymous(), time.perf_counter()
    watcher.start()
    gram = ntkit.Gram(K)
    checked = time.perf_counter()
    svm = ntkit.HardMarginSVM().fit(gram, y)
    end = time.perf_counter()
    done.set()
    watcher.join()
    return {
        "points": len(y), "GB of the file": K.nbytes / 1e9, "check seconds": checked - start,
        "fit seconds": end - checked, "status": svm.status_, "gap": float(svm.gap_), "kkt": float(svm.kkt_),
        "support": len(svm.support_), "steps": svm.iterations_, "GB before": before, "peak GB": peak[0],
    }  # fmt: skip


def main(n: int = 60_000) -> None:
    """Write the file, measure in another process, and save."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), n)
        words = [sys.executable, "-m", "benchmarks.svm_file", "--one", folder]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    save("svm_file", [json.loads(done.stdout.splitlines()[-1])])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    elif sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
    else:
        main(*map(int, sys.argv[1:]))
