"""The path kernel: cost of a step beside its floor, the paper's midpoint rule, and explaind, in one run.

``python -m benchmarks.path`` runs the comparison: ReLU MLP (64-256-256-10) and a small CNN on digits, batches of 64,
200 test points. ``python -m benchmarks.path scale`` the large case: a CNN of 100,000 parameters, 5,000 training
examples, 2,000 steps of SGD with momentum, batches of 64, 200 test points, all 10 outputs, 8 GB.

The floors of a step: one forward and backward pass of batch and test points together (one output), and for all C
outputs one forward and C backward passes of the test points beside the batch's. Ours is everything: the run made again
and checked, and the sweep.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntkit
from benchmarks.common import save, words

BATCH, TEST, STEPS = 64, 200, 60
NODES_STEPS = 2  # steps of a run on which the midpoint rule is timed: its cost is the same in each


def margin(out: Tensor) -> Tensor:
    """One output: 3 against 8."""
    return out[:, 3] - out[:, 8]


def network(kind: str) -> nn.Module:
    """The two networks: 85,000 and 43,000 parameters."""
    torch.manual_seed(0)
    if kind == "mlp":
        sizes = [64, 256, 256, 10]
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])
    conv = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def optimizer(name: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Plain gradient descent, momentum, or AdamW."""
    if name == "adamw":
        return lambda p: torch.optim.AdamW(p, lr=1e-3)
    return lambda p: torch.optim.SGD(p, lr=0.1 if name == "sgd" else 0.02, momentum=0.0 if name == "sgd" else 0.9)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def floors(model: nn.Module, batch: Tensor, test: Tensor) -> tuple[float, float]:
    """Seconds of one forward and backward of both together; and with one backward per output of the test points."""
    both = torch.cat([batch, test])

    def one() -> None:
        model(both).sum().backward()

    def all_outputs() -> None:
        model(batch).sum().backward()
        out = model(test)
        for c in range(out.shape[1]):
            out[:, c].sum().backward(retain_graph=True)

    return timed(one), timed(all_outputs)


def measure(kind: str, optim: str, outputs: str, dtype: torch.dtype) -> dict[str, Any]:
    """Times of a step, interleaved with its floors; the certificate; the midpoint rule where it is run."""
    data = ntkit.data.load("digits")
    x, test = data.x_train.to(dtype), data.x_test[:TEST].to(dtype)
    model = network(kind).to(dtype)
    way: dict[str, Any] = {} if outputs == "all" else {"outputs": margin}
    run = ntkit.train(
        model, (x, data.y_train), F.cross_entropy, optimizer(optim), steps=STEPS, batch_size=BATCH, record="all"
    )
    ours, one, every = [], [], []
    error = 0.0
    for _ in range(3):
        found = []
        ours.append(timed(lambda: found.append(ntkit.PathKernel(run, **way).decompose(test))) / STEPS)  # noqa: B023
        error = found[0].error
        pairs = [floors(model, x[:BATCH], test) for _ in range(5)]
        one.append(statistics.median(p[0] for p in pairs))
        every.append(statistics.median(p[1] for p in pairs))
    row: dict[str, Any] = {
        "network": kind, "optimizer": optim, "outputs": outputs, "dtype": str(dtype).removeprefix("torch."),
        "ms_a_step": 1e3 * statistics.median(ours),
        "of_floor": statistics.median(a / b for a, b in zip(ours, one, strict=True)),
        "of_floor_all_outputs": statistics.median(a / b for a, b in zip(ours, every, strict=True)),
        "error": error,
    }  # fmt: skip
    if optim == "sgd" and dtype == torch.float64:
        short = ntkit.train(
            network(kind).to(dtype), (x, data.y_train), F.cross_entropy, optimizer(optim), steps=NODES_STEPS,
            batch_size=BATCH, record="all",
        )  # fmt: skip
        midpoint = ntkit.PathKernel(short, integration="quadrature", rule="midpoint", nodes=100, **way)
        found = []
        seconds = timed(lambda: found.append(midpoint.decompose(test))) / NODES_STEPS
        again = timed(lambda: ntkit.PathKernel(run, **way).decompose(test)) / STEPS
        row |= {"midpoint_100_times": seconds / again, "midpoint_100_error": found[0].error}
    return row


def beside_explaind() -> dict[str, Any]:
    """The same run, decomposed by explaind with 100 nodes a step and by us."""
    from benchmarks.peers import explaind

    case = explaind.digits(batch=200, dtype="float64")
    theirs = explaind.measure(case, nodes=100, matrices=False, seconds=60, limit=900, threads=1)
    x, y, test = (torch.from_numpy(case[name]) for name in ("x", "y", "x_test"))
    sizes = [64, 128, 128, 10]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1], nn.LogSoftmax(1)).to(x.dtype)
    named = {name.removeprefix("param:"): torch.from_numpy(v) for name, v in case.items() if name.startswith("param:")}
    model.load_state_dict(named)
    lr, steps = float(case["lr"]), len(case["batches"])
    run = ntkit.train(model, (x, y), F.nll_loss, lambda p: torch.optim.SGD(p, lr=lr), steps=steps, record="all")
    ntkit.PathKernel(run).decompose(test)
    found: list[ntkit.PathDecomposition] = []
    seconds = statistics.median(timed(lambda: found.append(ntkit.PathKernel(run).decompose(test))) for _ in range(5))
    network_gap = float((found[0].prediction - torch.as_tensor(theirs["network"])).abs().max())
    return {
        "network": "mlp 64-128-128-10, log-softmax", "optimizer": "sgd, full batch of 200", "steps": steps,
        "explaind_seconds": theirs["seconds"], "explaind_relative_error": theirs["error"],
        "ours_seconds": seconds, "ours_relative_error": found[0].error,
        "times": statistics.median(theirs["seconds"]) / seconds,
        "largest_difference_of_the_trained_outputs": network_gap,
    }  # fmt: skip


def scale() -> dict[str, Any]:
    """The large case; digits enlarged to 16 x 16 and shifted to 5,000 examples."""
    data = ntkit.data.load("digits")
    x = F.interpolate(data.x_train, scale_factor=2, mode="bilinear")
    y = data.y_train
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(x), (5_000,), generator=generator)
    shifts = torch.randint(-1, 2, (5_000, 2), generator=generator)
    x = torch.stack([x[i].roll((int(a), int(b)), (1, 2)) for i, (a, b) in zip(chosen, shifts, strict=True)])
    y = y[chosen]
    test = F.interpolate(data.x_test[:200], scale_factor=2, mode="bilinear")
    torch.manual_seed(0)
    conv = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*conv, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 180), nn.ReLU(), nn.Linear(180, 10))
    start = time.perf_counter()
    run = ntkit.train(
        model, (x, y), F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), steps=2_000, batch_size=64
    )
    training = time.perf_counter() - start
    start = time.perf_counter()
    found = ntkit.PathKernel(run, memory="7 GB").decompose(test)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "training_examples": 5_000, "steps": 2_000,
        "test_points": 200, "outputs": 10, "training_seconds": training,
        "decomposition_seconds": time.perf_counter() - start, "error": found.error, "bitwise": found.bitwise,
        "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    """All cases."""
    rows = []
    cases = [("sgd", "one", torch.float64), ("sgd", "all", torch.float64), ("sgd", "all", torch.float32)]
    cases += [("momentum", "one", torch.float64), ("adamw", "one", torch.float64)]
    for kind in ("mlp", "cnn"):
        for case in cases:
            rows.append(measure(kind, *case))
            print(rows[-1], flush=True)
    rows.append(beside_explaind())
    save("path", rows)


if __name__ == "__main__":
    if words(__doc__, "scale"):
        save("path_scale", [scale()])
    else:
        main()
