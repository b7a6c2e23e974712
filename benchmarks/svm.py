"""The hard-margin SVM beside libsvm on ready kernel matrices, one thread: CPU seconds, certificate, memory, margin.

python -m benchmarks.svm --data-dir FOLDER   # the official MNIST files: 3 against 8, up to 11,982 points
python -m benchmarks.svm                     # digits

libsvm (``SVC(kernel="precomputed", C=1e10)``) solves another problem, with a bias, of the same size: its seconds are
comparable, its margin is not. "jst1" is the solver of Long (2021), from Ji, Srebro, Telgarsky (2021), Algorithm 1, in
kernel form: the margin it reaches, over the largest.
"""

from __future__ import annotations

import argparse
import ctypes
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ntkit
from benchmarks.common import save

SIZES = (2000, 4000, 8000, 11982)
STATUS = Path("/proc/self/status")
Row = dict[str, Any]


def network(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """A small CNN: its kernel takes less time than the comparison."""
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=1 + (shape[-1] > 8)),
        nn.ReLU(),
        nn.Flatten(),
    )
    features = convolutions(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*convolutions, nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, outputs))


def kernels(x: Tensor, y: Tensor, outputs: int) -> dict[str, Tensor]:
    """The tangent kernel at initialization, and after one epoch of SGD."""
    model = network(tuple(x.shape[1:]), outputs)
    kernel = ntkit.TangentKernel(model, outputs="trace")
    initial = kernel(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(32):
        out = model(x[batch])
        logits = out if outputs > 1 else torch.cat([torch.zeros_like(out), out], dim=1)
        optimizer.zero_grad()
        cross_entropy(logits, y[batch]).backward()
        optimizer.step()
    return {"initial": initial, "after training": kernel(x)}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and CPU seconds: the median of three calls."""
    times = []
    for _ in range(3):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return result, sorted(times)[1]


def extra_memory(work: Callable[[], Any]) -> float | None:
    """Largest resident memory during a call beyond that before it, in GB; on Linux."""
    if not STATUS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory freed before is no longer ours
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    read = lambda key: next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key))
    before = read("VmRSS")
    work()
    return (read("VmHWM") - before) / 1e6


def libsvm(K: Tensor, y: Tensor) -> Row:
    from sklearn.svm import SVC

    values, labels = K.double().numpy(), y.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted, seconds = timed(lambda: SVC(kernel="precomputed", C=1e10, tol=1e-6).fit(values, labels))
    return {"SVC seconds": seconds, "SVC support": len(fitted.support_)}


def jst1(K: Tensor, y: Tensor, steps: int) -> float:
    """Margin reached by w <- w - (g + grad), g <- (g + grad) t / (t + 1) on log sum exp(-y_i <w, x_i>), w = X^T b.

    As in the paper, features are divided by 1e-4 plus their mean norm; the margin is given in those of K.
    """
    size = 1e-4 + K.diagonal().sqrt().mean().item()
    Q = K / size**2
    b, g, values = (torch.zeros(len(y), dtype=K.dtype) for _ in range(3))
    for t in range(steps):
        gradient = -y * torch.softmax(-y * values, dim=0)
        b -= g + gradient
        g = (g + gradient) * t / (t + 1)
        values = Q @ b
    return size * float((y * values).min() / (b @ values).sqrt())


def piqp_objective(K: Tensor, y: Tensor) -> float:
    """Dual objective of the same problem (no bias) by an interior-point solver."""
    import piqp

    n = len(y)
    Q = (K.double() * y[:, None] * y[None]).numpy()
    solver = piqp.DenseSolver()
    solver.settings.eps_abs = solver.settings.eps_rel = 1e-9
    solver.setup(Q, -np.ones(n), x_l=np.zeros(n), x_u=np.full(n, np.inf))
    solver.solve()
    a = solver.result.x
    return float(a.sum() - 0.5 * a @ Q @ a)


def ours(K: Tensor, y: Tensor) -> Row:
    """One fit: seconds with K as it is, then what it found."""
    svm, seconds = timed(lambda: ntkit.HardMarginSVM().fit(K, y))
    norm = float(K.diagonal().double().mean()) ** 0.5
    kind = str(K.dtype).removeprefix("torch.")
    return {
        f"{kind} seconds": seconds, f"{kind} memory / K": extra_memory(lambda: ntkit.HardMarginSVM().fit(K, y)),
        "status": svm.status_, "gap": float(svm.gap_), "kkt": float(svm.kkt_), "support": len(svm.support_),
        "steps": svm.iterations_, "margin / feature norm": float(svm.margin_) / norm,
    }  # fmt: skip


def compare(name: str, K: Tensor, y: Tensor) -> Row:
    """One binary problem, by all solvers that its size allows."""
    n = len(y)
    row = {"problem": name, "n": n, **ours(K.double(), y), **ours(K.float(), y)}
    for kind, bytes_ in (("float32", 4), ("float64", 8)):
        extra = row[f"{kind} memory / K"]
        row[f"{kind} memory / K"] = None if extra is None else extra * 1e9 / (bytes_ * n**2)
    row |= libsvm(K, y)
    row["float32 seconds / SVC"] = row["float32 seconds"] / row["SVC seconds"]
    signs = torch.where(y == y.max(), 1.0, -1.0).double()
    margin = ntkit.HardMarginSVM().fit(K, y).margin_
    if n <= 2000:
        for steps in (100, 1000):
            row[f"jst1 margin, {steps} steps"] = jst1(K.double(), signs, steps) / float(margin)
    if n <= 1000:
        row["objective / PIQP - 1"] = 0.5 / float(margin) ** 2 / piqp_objective(K, signs) - 1
    return row


def one_vs_rest(name: str, K: Tensor, y: Tensor) -> Row:
    """All classes at once beside each alone."""
    classes = y.unique().tolist()
    svm, together = timed(lambda: ntkit.HardMarginSVM().fit(K, y))
    alone = [timed(lambda c=c: ntkit.HardMarginSVM().fit(K, y == c))[1] for c in classes]
    return {
        "problem": name, "n": len(y), "classes": len(classes), "status": svm.status_, "gap": float(svm.gap_),
        "seconds": together, "seconds of one, mean": sum(alone) / len(alone), "seconds of one, most": max(alone),
        "support, mean": sum(len(s) for s in svm.support_) / len(classes),
        "together / mean of one": together * len(alone) / sum(alone),
    }  # fmt: skip


def random_problems() -> dict[str, tuple[Tensor, Tensor]]:
    """Random kernels: many points are support."""
    g = torch.Generator().manual_seed(0)
    cases = {}
    for n, d in ((500, 200), (1000, 2000), (3000, 6000)):
        phi = torch.randn(n, d, generator=g, dtype=torch.float64)
        y = torch.sign(phi @ torch.randn(d, generator=g, dtype=torch.float64))
        cases[f"random features, d = {d}"] = (phi @ phi.T / d, y)
    return cases


def main() -> None:
    from threadpoolctl import threadpool_limits

    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path)
    folder = parser.parse_args().data_dir
    torch.set_num_threads(1)
    source: Row = {"name_or_path": "digits" if folder is None else "mnist", "data_dir": folder}
    with threadpool_limits(1):
        rows = [compare(name, K, y) for name, (K, y) in random_problems().items()]
        pair = ntkit.data.load(**source, classes=(3, 8))
        for when, K in kernels(pair.x_train, pair.y_train, 1).items():
            for n in sorted({min(n, len(K)) for n in SIZES}):
                rows.append(compare(f"3 against 8, {when}", K[:n, :n].contiguous(), pair.y_train[:n]))
        ten = ntkit.data.load(**source, train=None if folder is None else 4000)
        for when, K in kernels(ten.x_train, ten.y_train, 10).items():
            rows.append(one_vs_rest(f"ten classes, {when}", K, ten.y_train))
    save("svm", rows, data=source["name_or_path"])


if __name__ == "__main__":
    main()
