"""The table of an activation with kinks elsewhere than at 0, for variances from 1/16 to 16: seconds and error."""

from __future__ import annotations

import os
import time

import torch
from torch.nn import functional as F

from benchmarks.common import save, words
from ntkit.kernels.infinite import quadrature

FUNCTIONS = {
    "clamped tanh": lambda z: torch.tanh(z).clamp(max=0.5),
    "ELU, moved": lambda z: F.elu(z - 1),
    "a jump beside a kink at 0": lambda z: torch.where(z > 0.5, torch.sigmoid(z), F.elu(z)),
    "z up to 1, then exp(1 - z)": lambda z: torch.where(z > 1, torch.exp(1 - z), z),
    "SiLU that ends at 6": lambda z: F.silu(z).clamp(max=6),
    "SELU that ends at 2": lambda z: F.selu(z).clamp(max=2),
}


def main() -> None:
    rows = []
    for name, function in FUNCTIONS.items():
        for threads in sorted({1, os.cpu_count() or 1}):
            torch.set_num_threads(threads)
            quadrature._TABLES.clear()  # computed once in a process
            begin, table = time.perf_counter(), quadrature.Tabulated(function, name)
            table.diagonal(torch.tensor([1 / 16, 16.0], dtype=torch.float64))
            seconds = time.perf_counter() - begin
            rows.append({"function": name, "threads": threads, "seconds": seconds, "error": table.error})
            print(f"{name}, {threads} threads: {seconds:.1f} s, error {table.error:.1e}")
    save("kinks", rows)


if __name__ == "__main__":
    words(__doc__)
    main()
