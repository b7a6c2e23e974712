"""Timing and records shared by the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def words(document: str | None, *choices: str) -> list[str]:
    """Words of the command line, of these alone; --help prints a benchmark's document and measures nothing."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    if choices:
        parser.add_argument("words", nargs="*", choices=[*choices, []])
    return getattr(parser.parse_args(), "words", [])


def median_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_rate(n: int = 2048) -> float:
    """Floating-point operations per second of a float32 matrix product: the floor's unit."""
    a = torch.randn(n, n)
    return 2 * n**3 / median_seconds(lambda: a @ a)


def processor() -> str:
    """Model name of the CPU."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a benchmark ran on."""
    return {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write raw results with their machine, and print them as a table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n")
    print(f"\n{name}  {more or ''}")
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
