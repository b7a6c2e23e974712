"""Everything that needs a GPU, in one call of a few minutes: ``python -m benchmarks.gpu [--device cuda]``.

Values against the CPU in float64, times against the floors and against torch.func, memory against the budget, a device
that really runs out of memory, TF32 asked for and not, sketches equal to the CPU's. ``--device cpu`` tries the script.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import ntkit
from benchmarks.common import save
from benchmarks.peers.torch_func import contract, jacobians
from benchmarks.workloads import WORKLOADS
from ntkit.jacobian.machine_rates import calibrate

Row = dict[str, Any]
SMALL = {"mlp-10-64", "mlp-1-1000", "cnn-10-20", "vgg-1-100", "vgg-10-100", "resnet18-10-32", "vit-10-32", "gpt2-1-16"}


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median wall time after one warm-up, the device waited for."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b.cpu().double()).abs().max() / b.abs().max())


def tutorial(model: nn.Module, x1: Tensor, x2: Tensor, outputs: str) -> Tensor:
    """Contract Jacobians the way the torch.func tutorial does."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (p, buffers), (x[None],))[0]

    j1 = jacobians(single, params, x1)
    return contract(j1, j1 if x2 is x1 else jacobians(single, params, x2), outputs)


def forward_backward(model: nn.Module, params: list[Tensor], sets: tuple[Tensor, ...]) -> None:
    for x in sets:
        torch.autograd.grad(model(x).sum(), params)


def speed(device: torch.device, names: set[str]) -> list[Row]:
    """Ours, the floors, and the Jacobian contraction where it fits."""
    a = torch.randn(4096, 4096, device=device)
    rate = 2 * 4096**3 / seconds(lambda: a @ a, device)
    rows = []
    for workload in (w for w in WORKLOADS if w.name in names):
        model, x1 = workload.model().to(device), workload.draw(workload.n1, 1).to(device)
        sets = (x1,) if workload.symmetric else (x1, workload.draw(workload.n2, 2).to(device))
        kernel = ntkit.TangentKernel(model, workload.outputs)
        plan = kernel.plan(*sets)
        row: Row = {"workload": workload.name, "seconds": seconds(partial(kernel, *sets), device)}
        row["GEMM floor"] = plan.flops / rate
        params = list(model.parameters())
        row["forward + backward"] = seconds(partial(forward_backward, model, params, sets), device)
        row["ours / floors"] = row["seconds"] / (row["GEMM floor"] + row["forward + backward"])
        try:
            peer = partial(tutorial, model, sets[0], sets[-1], workload.outputs)
            row["torch.func / ours"] = seconds(peer, device, 3) / row["seconds"]
            row["difference"] = difference(kernel(*sets), peer())
        except (torch.OutOfMemoryError, RuntimeError) as error:
            row["torch.func / ours"] = type(error).__name__
        rows.append(row)
        print(row, flush=True)
    return rows


def values(device: torch.device) -> list[Row]:
    """Float64 on the device against float64 on the CPU; float32 with and without TF32; sketches."""
    rows = []
    for workload in (w for w in WORKLOADS if w.name in ("mlp-10-64", "cnn-10-20", "vgg-1-100", "vit-10-32")):
        model, x = workload.model(), workload.draw(5, 1)
        exact = ntkit.TangentKernel(copy.deepcopy(model).double())(x.double())
        there = copy.deepcopy(model).to(device)
        row: Row = {"workload": workload.name}
        row["float64"] = difference(ntkit.TangentKernel(copy.deepcopy(there).double())(x.double().to(device)), exact)
        for precision in ("highest", "high"):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                row[f"float32, {precision}"] = difference(ntkit.TangentKernel(there)(x.to(device)), exact)
            finally:
                torch.set_float32_matmul_precision(before)
        here = ntkit.SketchedKernel(copy.deepcopy(model).double(), dim=256)(x.double())
        row["sketch"] = difference(
            ntkit.SketchedKernel(copy.deepcopy(there).double(), dim=256)(x.double().to(device)), here
        )
        rows.append(row)
        print(row, flush=True)
    return rows


def memory(device: torch.device) -> list[Row]:
    """Peak against the budget, and a budget far beyond the device, which must end in halves and in the same values."""
    if device.type != "cuda":
        return []
    workload = next(w for w in WORKLOADS if w.name == "vgg-1-1000")
    model, x = workload.model().to(device), workload.draw(2000, 1).to(device)
    rows, exact = [], ntkit.TangentKernel(model, memory="8 GB")(x)
    for budget in (0.25e9, 1e9, 4e9):
        kernel = ntkit.TangentKernel(model, memory=int(budget))
        kernel(x[:8])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        K = kernel(x)
        peak = torch.cuda.max_memory_allocated() - start - K.numel() * K.element_size()
        rows.append({"budget_GB": budget / 1e9, "peak / budget": peak / budget, "difference": difference(K, exact)})
    free = torch.cuda.mem_get_info()[0]
    hog = torch.empty(int(free - 6e9), dtype=torch.uint8, device=device)  # leaves 6 GB
    K = ntkit.TangentKernel(model, memory="400 GB")(x)
    rows.append({"budget_GB": 400.0, "6 GB free": "went on", "difference": difference(K, exact)})
    del hog
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("names", nargs="*", help="workloads to time; all of moderate size if none")
    words = parser.parse_args()
    device = torch.device(words.device)
    rates = calibrate(torch.zeros(1, device=device))
    result = {"values": values(device), "memory": memory(device)}
    save("gpu", speed(device, set(words.names) or SMALL), rates=str(rates), **result)


if __name__ == "__main__":
    main()
