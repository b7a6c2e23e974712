"""The exact kernel of MNIST's training set on disk, its spectrum and a ridge classifier, by three commands.

python -m benchmarks.mnist_on_disk --data-dir FOLDER                      # 60,000 images: 7.4 GB
python -m benchmarks.mnist_on_disk --data-dir FOLDER --points 5000 --threads 1

The tangent kernel of a 784-512-512-1 MLP at initialization, in float32. Each command is a process of its own: processor
and wall time, peak memory. "floor": the floating-point operations of the plan at the rate of a float32 product of two
2048 x 2048 matrices. A run that was stopped goes on where its folder (--out) has tiles; its times are then of the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ntkit
from benchmarks.common import gemm_rate, save
from ntkit.networks.built_in import build

NETWORK = """
from torch import nn

def make():
    layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)
    return nn.Sequential(nn.Flatten(), *layers)
"""
PAIRS, RIDGE = 50, 1e-3


def measured(folder: Path, threads: int, *words: Any) -> dict[str, Any]:
    """What a command of ntkit takes."""
    code = "import sys; from ntkit.cli import main; sys.argv[0] = 'ntkit'; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"ntkit {words[0]} ended with {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    seconds = {"CPU s": cpu, "wall s": time.perf_counter() - start}
    return {"command": f"ntkit {words[0]}", **seconds, "peak MB": usage.ru_maxrss / 1e3}


def floor(data: Path, points: int, folder: Path) -> float:
    """Seconds of one core for the products of the plan."""
    x = ntkit.data.load("mnist", data, train=points).x_train
    model = build(f"{folder}/net.py:make", (1, 28, 28), 1, 0)
    plan = ntkit.TangentKernel(model, outputs="trace").plan_for_tiles(x, 2000)
    return plan.flops / gemm_rate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--points", type=int, default=60_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="folder for the kernel; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "net.py").write_text(NETWORK)
        data = options.data_dir.absolute()
        how = ["--data-dir", data, "--train", options.points]
        row = measured(folder, options.threads, "gram", "net.py:make", "mnist", *how, "--out", "kernel")
        row["GB"] = sum(file.stat().st_size for file in (folder / "kernel").rglob("*") if file.is_file()) / 1e9
        rows = [row | {"floor, CPU s": floor(data, options.points, folder)}]
        rows += [measured(folder, options.threads, "verify", "kernel")]
        for words in (("--spectrum", PAIRS), ("--ridge", RIDGE)):
            row = measured(folder, options.threads, "solve", "kernel", *words)
            rows.append(row | {"what": words[0][2:]})
        solved = json.loads((folder / "kernel" / "solved.json").read_text())
    spectrum, ridge = solved["spectrum"], solved["ridge"]
    rows[-2] |= {"status": spectrum["status"], "largest residual": max(spectrum["residuals"])}
    rows[-1] |= {name: ridge[name] for name in ("method", "passes", "residual", "status")}
    rows[-1] |= {"test error": ridge["test error"]["value"], "standard error": ridge["test error"]["standard error"]}
    save("mnist_on_disk", rows, points=options.points, threads=options.threads)


if __name__ == "__main__":
    main()
