"""The tangent kernel against its floors and against its peers: ``python -m benchmarks.engine [NAME ...]``.

With one thread and with all. What is measured and how to read it: benchmarks/README.md. Results are merged into
results/engine.json by workload and number of threads, so that some can be run again, and results/engine.md is made from
that.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

import ntkit
from benchmarks.common import RESULTS, processor
from benchmarks.peers import job as jobs
from benchmarks.peers.setup import interpreter
from benchmarks.workloads import WORKLOADS, Workload

SECONDS = 90.0  # for the repeats of ours and the floors, per workload
LIMIT = 300.0  # for a peer's calls; twice that for its start and compilation
REPEATS = 15
PEERS = ("neural-tangents", "torch.func Jacobian", "torch.func products", "nngeometry")
Row = dict[str, Any]


# ---------------------------------------------------------------- ours and the floors


def timings(work: Callable[[], Any], seconds: float) -> list[float]:
    """Wall times after one warm-up, as many as fit; a warm-up longer than all the time given counts itself."""
    first = timed(work)
    if first > seconds:
        return [first]
    times = [timed(work)]
    while len(times) < REPEATS and first + sum(times) + times[-1] < seconds:
        times.append(timed(work))
    return times


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def gemm_rate(n: int = 2048) -> float:
    """Floating-point operations per second of a float32 matrix product, the best of some."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(8))


def passes(model: nn.Module, sets: Iterable[Tensor], backwards: int) -> None:
    """Forward of every sample, and `backwards` backward passes, in batches of 32."""
    params = list(model.parameters())
    for x in sets:
        for batch in x.split(32):
            out = model(batch)
            for c in range(backwards):
                torch.autograd.grad(out[:, c].sum(), params, retain_graph=c + 1 < backwards)


def measure_ours(w: Workload, seconds: float) -> tuple[Row, Tensor]:
    """Measure one workload without peers; also gives the kernel."""
    model, x1 = w.model(), w.draw(w.n1, 1)
    x2 = None if w.symmetric else w.draw(w.n2, 2)
    other = x2 if w.n1 == w.n2 else w.draw(w.n1, 3)  # for k(x1, other) beside k(x1), at the same size
    kernel = ntkit.TangentKernel(model, outputs=w.outputs)
    classes = model(x1[:1]).shape[1]
    rate = gemm_rate()
    kernel(x1[:3], x1[:2])  # the check at first use
    calls = {"ours": lambda: kernel(x1) if x2 is None else kernel(x1, x2)}
    calls["symmetric"] = (lambda: kernel(x1)) if x2 is not None else calls["ours"]
    calls["general"] = (lambda: kernel(x1, other)) if other is not x2 else calls["ours"]
    distinct = list(dict.fromkeys(calls.values()))
    times = {call: timings(call, 0.75 * seconds / len(distinct)) for call in distinct}
    sets = [x for x in (x1, x2) if x is not None]
    one = timings(lambda: passes(model, sets, 1), 0.1 * seconds)
    plan = kernel.plan(x1) if x2 is None else kernel.plan(x1, x2)
    row: Row = {
        "name": w.name,
        "n1": w.n1,
        "n2": w.n2 or w.n1,
        "k(x1) alone": w.symmetric,
        "outputs": classes,
        "mode": w.outputs,
        "note": w.note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gemm_gflops_per_second": rate / 1e9,
        "plan_gflops": getattr(plan, "flops", sum(step.flops for step in plan.steps)) / 1e9,
        "plan_seconds": getattr(plan, "seconds", None),
        "routes": dict(Counter(step.route for step in plan.steps)),
        **{name: times[call] for name, call in calls.items()},
        "forward_backward": one,
        "forward_c_backwards": one if classes == 1 else timings(lambda: passes(model, sets, classes), 0.15 * seconds),
    }
    return row, calls["ours"]()


# ---------------------------------------------------------------- peers


def measure_peers(w: Workload, row: Row, ours: Tensor, seconds: float, limit: float) -> Row:
    """Run every peer on a workload; each gives a record whose ``status`` says how it went."""
    model, x1 = w.model(), w.draw(w.n1, 1)
    x2 = None if w.symmetric else w.draw(w.n2, 2)
    found: Row = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, w, model, x1, x2)
        for peer in PEERS:
            record = run_peer(peer, w, row, model, folder, min(seconds, limit) / 4, limit)
            if path := record.pop("values", None):
                record["relative_difference"] = difference(np.load(path, mmap_mode="r"), w, ours, peer, x1)
            found[peer] = record
            print(f"  {peer}: {summary(record)}", flush=True)
    return found


def write_inputs(folder: Path, w: Workload, model: nn.Module, x1: Tensor, x2: Tensor | None) -> None:
    """Write model and data, for torch and as arrays."""
    torch.save({"model": model, "x1": x1, "x2": x2, "outputs": w.outputs}, folder / "inputs.pt")
    arrays = {f"param:{name}": p for name, p in model.named_parameters()}
    arrays |= {f"fixed:{name}": b for name, b in model.named_buffers()}
    arrays |= {f"x:{name}": x for name, x in (("x1", x1), ("x2", x2)) if x is not None}
    np.savez(folder / "inputs.npz", **{name: a.detach().numpy() for name, a in arrays.items()})


def run_peer(peer: str, w: Workload, row: Row, model: nn.Module, folder: Path, seconds: float, limit: float) -> Row:
    """Run one peer in its plain form and, where that cannot hold the workload, in tiles."""
    memory = int(psutil.virtual_memory().available * 0.7)
    threads, common = torch.get_num_threads(), {"seconds": seconds, "outputs": w.outputs, "family": w.family}
    torch_job = {**common, "inputs": str(folder / "inputs.pt")}
    entry = 4 * row["outputs"] * row["parameters"]  # bytes of one sample's Jacobian
    needs, samples = 0, w.n1 + w.n2
    if peer == "nngeometry":
        if w.family not in ("sequential", "resnet18"):
            return {"status": "not supported", "why": "raw and tied parameters, or tokens"}
        needs = 4 * (w.n1 * row["outputs"]) ** 2
        module, python, job = "nngeometry", interpreter("torch"), {**torch_job, "batch": 1000}  # the larger, the faster
        tiles: Row = {"batch": 100}
    elif peer == "neural-tangents":
        layers = [
            [type(m).__name__, name, getattr(m, "padding", (0,))[0] if isinstance(m, nn.Conv2d) else 0]
            for name, m in model.named_children()
        ]
        job = {**common, "inputs": str(folder / "inputs.npz"), "layers": layers if w.family == "sequential" else []}
        module, python = "neural_tangents", interpreter("jax")
        both = math.gcd(w.n1, w.n2)  # it wants equal tiles
        tiles = {"batch": max(d for d in range(1, both + 1) if both % d == 0 and d <= max(1, both // 8))}
    else:
        method = peer.split()[1].lower()
        module, python, job = "torch_func", Path(sys.executable), {**torch_job, "method": method}
        needs = entry * (samples if method == "jacobian" else w.n1)
        tiles = torch_tiles(method, w, entry, per_sample(model, w) * row["outputs"], memory)
    if not python.exists():
        return {"status": "not installed"}
    if peer == "neural-tangents":
        return best_layout(w, job, tiles, python, folder, limit, memory, threads)
    if needs > memory:
        plain: Row = {"status": f"needs {needs / 1e9:.0f} GB"}
    else:
        plain = jobs.run(module, python, {**job, "chunked": False}, folder, limit, memory, threads)
    if not tiles or (needs <= memory and plain["status"] != "out of memory"):
        return plain
    again = jobs.run(module, python, {**job, "chunked": True, **tiles}, folder, limit, memory, threads)
    return {**again, "plain": plain["status"], "tiles": tiles}


def best_layout(
    w: Workload, job: Row, tiles: Row, python: Path, folder: Path, limit: float, memory: int, threads: int
) -> Row:
    """Run neural-tangents with images in both layouts, where there are images, and keep the faster."""
    best: Row = {}
    tried = {}
    for layout in ("NHWC", "NCHW") if len(w.shape) == 3 else ("NHWC",):
        settings = {**job, "layout": layout}
        record = jobs.run("neural_tangents", python, {**settings, "chunked": False}, folder, limit, memory, threads)
        if record["status"] == "out of memory":
            again = jobs.run(
                "neural_tangents", python, {**settings, "chunked": True, **tiles}, folder, limit, memory, threads
            )
            record = {**again, "plain": "out of memory", "tiles": tiles}
        tried[layout] = summary(record)
        if path := record.get("values"):
            record["values"] = str(Path(path).replace(folder / f"{layout}.npy"))
        median = statistics.median(record["seconds"]) if record["status"] == "ok" else math.inf
        if not best or median < best["median"]:
            best = {**record, "layout": layout, "median": median}
        if record["status"].endswith("to compile"):
            break  # the other layout has as many steps
    del best["median"]
    return {**best, "layouts": tried}


def torch_tiles(method: str, w: Workload, entry: int, activations: int, memory: int) -> Row:
    """Samples per tile for torch.func: rows as many as fit, since each strip does the columns' Jacobians anew."""
    n2 = w.n2 or w.n1
    if method == "jacobian":
        rows, columns = 0.3 * memory / entry, 0.05 * memory / entry
    else:  # vmap puts the product of every pair with a parameter-sized tangent of its own
        rows = columns = math.sqrt(0.2 * memory / (entry + activations))
    return {"rows": max(1, min(w.n1, int(rows))), "columns": max(1, min(n2, int(columns)))}


def per_sample(model: nn.Module, w: Workload) -> int:
    """Bytes that autograd saves for one more sample: what is saved of the parameters cancels."""
    held = []
    for n in (1, 2):
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(w.draw(n, 1))
        held.append(total)
    return max(1, held[1] - held[0])


def difference(theirs: np.ndarray, w: Workload, ours: Tensor, peer: str, x1: Tensor) -> float:
    """Largest difference to our values, relative to our largest value."""
    if peer == "nngeometry" and not w.symmetric:  # it has k(x1) only
        ours = ntkit.TangentKernel(w.model(), outputs=w.outputs)(x1)
    if theirs.shape != tuple(ours.shape):
        raise ValueError(f"{peer}: shape {theirs.shape}, expected {tuple(ours.shape)}")
    largest = max(float((torch.from_numpy(np.array(a)) - b).abs().max()) for a, b in zip(theirs, ours, strict=True))
    return largest / float(ours.abs().max())


# ---------------------------------------------------------------- what it says


def figures(row: Row) -> Row:
    """Derive a workload's figures from its raw seconds; None where there is none."""
    ours, symmetric = statistics.median(row["ours"]), statistics.median(row["symmetric"])
    gemm = row["plan_gflops"] / row["gemm_gflops_per_second"]
    one, many = (statistics.median(row[key]) for key in ("forward_backward", "forward_c_backwards"))
    ratios = {}
    for peer, record in row["peers"].items():
        if record["status"] == "ok":  # nngeometry has k(x1) only: against our k(x1)
            ratios[peer] = statistics.median(record["seconds"]) / (symmetric if peer == "nngeometry" else ours)
    tutorial = [ratio for peer, ratio in ratios.items() if peer.startswith("torch.func")]
    best = min(ratios, key=ratios.__getitem__, default=None)
    return {
        "ours": ours,
        "best": best,
        "best / ours": ratios[best] if best else None,
        "torch.func / ours": min(tutorial, default=None),
        "gemm": gemm,
        "forward_backward": one,
        "forward_c_backwards": many,
        "ours / floor": ours / (gemm + one),
        "ours / floor C": ours / (gemm + many),
        "symmetric / general": symmetric / statistics.median(row["general"]),
        "difference": row["peers"][best]["relative_difference"] if best else None,
    }


def summary(record: Row) -> str:
    """One peer's outcome in few words."""
    words = f"{statistics.median(record['seconds']):.3g} s" if record["status"] == "ok" else record["status"]
    words += " (first call)" if record.get("cold") else ""
    return f"{words} (in tiles; plain: {record['plain']})" if "plain" in record else words


RATIOS = ("best / ours", "torch.func / ours", "ours / floor", "ours / floor C", "symmetric / general")


def markdown(rows: list[Row]) -> str:
    """Tables of all workloads measured, one for each number of threads."""
    lines = [
        "# Tangent kernel: ours, peers, floors",
        "",
        "Made by `python -m benchmarks.engine`; how to read it: [../README.md](../README.md). Seconds are medians, "
        "float32. Ratios above 1 mean that ntkit is faster.",
    ]
    by_threads = {t: [row for row in rows if threads_of(row) == t] for t in sorted({threads_of(row) for row in rows})}
    for threads, own in by_threads.items():
        lines += ["", f"## {threads} thread{'s' * (threads > 1)}", "", *table(own)]
    if len(by_threads) > 1:
        lines += ["", "## One thread over all", "", *gains(by_threads[min(by_threads)], by_threads[max(by_threads)])]
    return "\n".join(lines) + "\n"


def threads_of(row: Row) -> int:
    """PyTorch's threads while a row was measured."""
    return row["machine"]["threads"]


def table(rows: list[Row]) -> list[str]:
    """Ours, floors and peers, the workloads measured with one number of threads."""
    cell = lambda value, form="{:.3g}": "" if value is None else form.format(value)
    found = {row["name"]: figures(row) for row in rows}
    lines = [
        *sorted({f"- {machine_line(row['machine'])}" for row in rows}),
        "",
        "| workload | ours, s | best peer | best peer / ours | torch.func / ours | GEMM floor, s | forward + backward, "
        "s | ours / floors | C backwards, s | ours / floors, C backwards | k(x1) / k(x1, x2) | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        f = found[row["name"]]
        cells = [
            label(row), cell(f["ours"]), f["best"] or "none", cell(f["best / ours"], "{:.2f}"),
            cell(f["torch.func / ours"], "{:.2f}"), cell(f["gemm"]), cell(f["forward_backward"]),
            cell(f["ours / floor"], "{:.2f}"), cell(f["forward_c_backwards"]), cell(f["ours / floor C"], "{:.2f}"),
            cell(f["symmetric / general"], "{:.2f}"), cell(f["difference"], "{:.0e}"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Geometric means over the workloads where both were measured:", ""]
    for key in RATIOS:
        values = [f[key] for f in found.values() if f[key] is not None]
        if values:
            lines.append(f"- {key}: {statistics.geometric_mean(values):.2f} ({len(values)} of {len(rows)})")
    lines += ["", "Every peer (its seconds and the difference to our values, or why there are none):", ""]
    lines += [f"| workload | {' | '.join(PEERS)} |", "|---" * (len(PEERS) + 1) + "|"]
    for row in rows:
        cells = []
        for peer in PEERS:
            record = row["peers"].get(peer, {"status": "not run"})
            apart = f", {record['relative_difference']:.0e}" if "relative_difference" in record else ""
            cells.append(summary(record) + apart)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def gains(one: list[Row], all_: list[Row]) -> list[str]:
    """What more threads gain, of ours, of the floors and of the tutorial."""
    second = {row["name"]: row for row in all_}
    lines = ["| workload | ours | forward + backward | torch.func Jacobian |", "|---|---|---|---|"]
    for row in one:
        if (other := second.get(row["name"])) is None:
            continue
        cells = [f"{statistics.median(row[k]) / statistics.median(other[k]):.2f}" for k in ("ours", "forward_backward")]
        peers = [r["peers"].get("torch.func Jacobian", {}).get("seconds") for r in (row, other)]
        cells.append(f"{statistics.median(peers[0]) / statistics.median(peers[1]):.2f}" if all(peers) else "")
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def label(row: Row) -> str:
    """Name and sizes of a workload."""
    size = f"k(x1), {row['n1']}" if row["k(x1) alone"] else f"{row['n1']} x {row['n2']}"
    mode = "" if row["outputs"] == 1 else f", {row['mode']}" + (f" ({row['note']})" if row["note"] else "")
    return f"{row['name']}: {size}{mode}"


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ntkit": ntkit.__version__,
    }


def machine_line(found: dict[str, Any]) -> str:
    """Say a machine in one line."""
    return (
        f"{found['processor']}, {found['threads']} of {found['cores']} cores, {found['memory_gb']} GB; "
        f"Python {found['python']}, torch {found['torch']}, ntkit {found['ntkit']}"
    )


def save(row: Row) -> list[Row]:
    """Put a workload's row into the results, in the order of `WORKLOADS`; gives all rows."""
    file, order = RESULTS / "engine.json", [w.name for w in WORKLOADS]
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    found = {(old["name"], threads_of(old)): old for old in [*kept, row]}
    threads = sorted({number for _, number in found})
    rows = [found[name, number] for number in threads for name in order if (name, number) in found]
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (RESULTS / "engine.md").write_text(markdown(rows))
    return rows


def main(
    names: Iterable[str] = (), seconds: float = SECONDS, limit: float = LIMIT, threads: Iterable[int] = ()
) -> None:
    """Measure the workloads named, or all, with each number of threads: one and all, where none is given."""
    wanted, known = list(names), [w.name for w in WORKLOADS]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no workload {', '.join(unknown)}; there are: {', '.join(known)}")
    rows: list[Row] = []
    before = torch.get_num_threads()
    for number in list(threads) or sorted({1, psutil.cpu_count(logical=False) or 1}):
        torch.set_num_threads(number)
        for w in WORKLOADS:
            if wanted and w.name not in wanted:
                continue
            print(f"{w.name}, {number} thread{'s' * (number > 1)}", flush=True)
            row, ours = measure_ours(w, seconds)
            print(f"  ours: {statistics.median(row['ours']):.3g} s", flush=True)
            row["peers"] = measure_peers(w, row, ours, seconds, limit)
            row["machine"] = machine()
            rows = save(row)
    torch.set_num_threads(before)
    print(markdown(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="workloads to measure; all if none is named")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for ours and the floors, per workload")
    parser.add_argument("--limit", type=float, default=LIMIT, help="for each peer's process")
    parser.add_argument("--threads", type=int, nargs="*", default=(), help="numbers of threads; one and all if none")
    given = parser.parse_args()
    main(given.names, given.seconds, given.limit, given.threads)
