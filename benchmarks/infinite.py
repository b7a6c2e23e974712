"""Infinite-width kernels beside neural-tangents, in one run: ``python -m benchmarks.infinite [WORDS OF A CASE ...]``.

Tangent kernels of ReLU networks: dense, 4 weight layers, 2,000 x 2,000 inputs of 256 numbers; 8 convolutions of 3 x 3
with a global average pool and a dense layer on images of 16 x 16 (16 x 16 pairs) and 32 x 32 (8 x 8 pairs; for
neural-tangents in its own batches of 4, as its arrays over all pairs of pixels grow with the square). Dense tanh, for
which neural-tangents has Gauss-Hermite quadrature of two axes with 25 nodes each (`stax.ElementwiseNumerical` with its
suggested number), 500 x 500. Two transposed convolutions, from 4 x 4 to 16 x 16; a network like a U-Net on 16 x 16 (a
skip beside a pool, a convolution and a transposed one, joined along channels); softmax attention on 32 positions, of
scores over their size. float64 and float32, on one thread and on all. Each way runs in a process of its own, one after
the other; compilation is not counted. Also the symmetric call k(x), for which neural-tangents has no shortcut.
Cases named on the command line are merged into the results.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, save
from benchmarks.peers import job
from benchmarks.peers.setup import interpreter

CASES: dict[str, dict[str, Any]] = {
    "dense, 4 layers, 2,000 x 2,000": {"shape": [256], "depth": 3, "n1": 2000, "n2": 2000, "batch": 0},
    "8 convolutions, 16 x 16, 16 x 16 pairs": {"shape": [3, 16, 16], "depth": 8, "n1": 16, "n2": 16, "batch": 0},
    "8 convolutions, 32 x 32, 8 x 8 pairs": {"shape": [3, 32, 32], "depth": 8, "n1": 8, "n2": 8, "batch": 4},
    "dense tanh, 4 layers, 500 x 500": {
        "shape": [256],
        "depth": 3,
        "n1": 500,
        "n2": 500,
        "batch": 0,
        "activation": "tanh",
    },
    "dense, symmetric": {"shape": [256], "depth": 3, "n1": 2000, "n2": 0, "batch": 0},
    "8 convolutions, 16 x 16, symmetric": {"shape": [3, 16, 16], "depth": 8, "n1": 16, "n2": 0, "batch": 0},
    "transposed convolutions, 4 x 4 to 16 x 16, 16 x 16 pairs": {
        "network": "transposed",
        "shape": [3, 4, 4],
        "n1": 16,
        "n2": 16,
        "batch": 0,
    },
    "U-Net-like, 16 x 16, 16 x 16 pairs": {"network": "U-Net", "shape": [3, 16, 16], "n1": 16, "n2": 16, "batch": 0},
    "attention, 32 positions, 16 x 16 pairs": {
        "network": "attention",
        "shape": [32, 8],
        "n1": 16,
        "n2": 16,
        "batch": 0,
    },
}
_MEMORY = 24 << 30


def main(words: Sequence[str] = ()) -> None:
    """All cases, or those with one of these words in their names; the geometric mean of the ratios."""
    file = RESULTS / "infinite.json"
    kept = json.loads(file.read_text())["rows"] if words and file.exists() else []
    known = {_key(row): row for row in kept}
    order = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        for name, case in CASES.items():
            for dtype in ("float64", "float32"):
                order.append((name, dtype, threads))
                if not words or any(word in name for word in words):
                    row = _row(name, dtype, threads, _measured({**case, "dtype": dtype}, threads))
                    known[_key(row)] = row
                    print(row, flush=True)
    rows = [known[key] for key in order if key in known]
    ratios = [row["times_as_fast"] for row in rows if "times_as_fast" in row]
    mean = math.exp(statistics.mean(map(math.log, ratios))) if ratios else None
    save("infinite", rows, geometric_mean_times_as_fast=mean)


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["case"], row["dtype"], row["threads"]


def _measured(case: dict[str, Any], threads: int) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for who, python in (("ntkit", Path(sys.executable)), ("neural-tangents", interpreter("jax"))):
            settings = {**case, "who": who, "threads": threads, "seconds": 40}
            one = job.run("limits", python, settings, Path(folder), limit=400, memory=_MEMORY, threads=threads)
            if one["status"] == "ok":
                one["values"] = np.load(one["values"])
            found[who] = one
    return found


def _row(name: str, dtype: str, threads: int, found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": name, "dtype": dtype, "threads": threads}
    for who, one in found.items():
        if one["status"] == "ok":
            row |= {f"{who} seconds": one["seconds"], f"{who} GB": one["peak_gb"] - one["before_gb"]}
        else:
            row[who] = one["status"]
    if all(one["status"] == "ok" for one in found.values()):
        ours, theirs = (found[who] for who in ("ntkit", "neural-tangents"))
        row["times_as_fast"] = statistics.median(theirs["seconds"]) / statistics.median(ours["seconds"])
        gap = np.abs(ours["values"] - theirs["values"]).max() / np.abs(theirs["values"]).max()
        row["largest difference / largest value"] = float(gap)
    return row


if __name__ == "__main__":
    main(sys.argv[1:])
