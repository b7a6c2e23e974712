"""A peer's run: the parent writes a job and starts it under limits, the child measures and reports.

The child's half needs numpy alone, so that it runs in every environment.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
_REPEATS = 15


# ---------------------------------------------------------------- the child


def read_job() -> dict[str, Any]:
    """Give the job named on the command line."""
    return json.loads(Path(sys.argv[1]).read_text())


def report(job: dict[str, Any], work: Callable[[], Any], **more: Any) -> None:
    """Time `work` until the job's seconds are spent; the record is rewritten after every call, as a kill may come.

    The first call is the warm-up and kept apart, of compiled work too: it can be ten times as slow as the next.
    """
    record: dict[str, Any] = {"seconds": [], "peak_gb": 0.0, **more}
    Path(job["record"] + ".started").touch()
    began = time.perf_counter()
    for call in range(_REPEATS + 1):
        start = time.perf_counter()
        result = work()
        took = time.perf_counter() - start
        if call == 0:
            np.save(job["values"], np.asarray(result))
        if call == 0:
            record["first_seconds"] = took
        else:
            record["seconds"].append(took)
        del result
        record["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        part = Path(job["record"] + ".part")
        part.write_text(json.dumps(record))
        part.replace(job["record"])
        if record["seconds"] and time.perf_counter() - began + took > job["seconds"]:
            return


# ---------------------------------------------------------------- the parent


def run(
    module: str, python: Path, job: dict[str, Any], folder: Path, limit: float, memory: int, threads: int
) -> dict[str, Any]:
    """Run ``benchmarks.peers.MODULE`` on a job, and say how it went.

    Parameters
    ----------
    module, python : the peer's script and its interpreter.
    job : what the script needs; paths for its record and values are added.
    folder : for these files.
    limit : seconds for all its calls; its start, and compilation, may take twice that before.
    memory : bytes it may keep resident.
    threads : cores it may use.

    Returns
    -------
    dict
        ``status`` ("ok", "out of memory", "> 300 s", "failed: ...", "not installed"), the child's record, and the path
        of its ``values`` if there are any.
    """
    if not python.exists():
        return {"status": "not installed"}
    record, values, started = folder / "record.json", folder / "values.npy", folder / "record.json.started"
    for old in (record, values, started):
        old.unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps({**job, "record": str(record), "values": str(values)}))
    command = [python, "-m", f"benchmarks.peers.{module}", folder / "job.json"]
    message = _watched(command, started, limit, memory, threads)
    found = json.loads(record.read_text()) if record.exists() else {}
    if not found:
        return {"status": message}
    if not found["seconds"]:
        found |= {"seconds": [found["first_seconds"]], "cold": True}  # the limit left time for the warm-up alone
    return {"status": "ok", "values": str(values), **found}


def _watched(command: list[Any], started: Path, limit: float, memory: int, threads: int) -> str:
    """Run a command, kill it past its limits, and say what went wrong."""
    import psutil

    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip

    def bounds() -> None:
        os.sched_setaffinity(0, cores)  # XLA takes its thread count from here
        slack = 8 << 30  # reserved, not touched: thread stacks, code, arenas
        resource.setrlimit(resource.RLIMIT_AS, (memory + slack, memory + slack))

    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=errors, stderr=errors, preexec_fn=bounds, start_new_session=True
        )
        watched, start, calling = psutil.Process(child.pid), time.monotonic(), False
        while child.poll() is None:
            time.sleep(0.05)
            try:
                held = watched.memory_info().rss
            except psutil.Error:
                continue
            if not calling and started.exists():
                start, calling = time.monotonic(), True
            late = time.monotonic() - start > (limit if calling else 2 * limit)
            if held > memory or late:
                child.kill()
                child.wait()
                slow = f"> {limit:.0f} s" if calling else f"> {2 * limit:.0f} s to compile"
                return slow if late else "out of memory"
        if child.returncode == 0:
            return "failed: no record"
        errors.seek(0)
        text = errors.read()
    signs = ("MemoryError", "bad_alloc", "allocate memory", "RESOURCE_EXHAUSTED", "not enough memory", "Out of memory")
    if any(sign in text for sign in signs) or child.returncode == -9:
        return "out of memory"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"failed: {lines[-1][:200] if lines else f'exit {child.returncode}'}"
