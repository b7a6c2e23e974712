"""The tangent kernel of the whole MNIST training set on disk, its spectrum, and a ten-class ridge classifier from it.

python -m benchmarks.mnist_gram --data-dir FOLDER [--n 60000] [--workers 2] [--store FOLDER]

The kernel: an MLP 784-512-512-1 at initialization, float32, one output, upper triangle in tiles of 2,000 samples,
by worker processes of one thread each. "floor": the matrix products that such a tile needs, alone, in as many processes
at the same time, times the number of tiles. "peak": the largest resident memory of this process, and
of its largest worker. A store that was begun goes on; the seconds are then those of the last call.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import ntkit
from benchmarks.common import save

WIDTHS = (784, 512, 512, 1)
TILE, PAIRS, RIDGE, STRIP = 2000, 50, 1e-2, 1000  # the ridge in units of the mean diagonal


def network() -> nn.Module:
    """The network at its initialization."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)]
    return nn.Sequential(*layers)


def floor_of_a_tile(repeats: int) -> float:
    """Seconds for the products of one tile: inputs and slopes of each layer, each pair of samples once."""
    torch.set_num_threads(1)
    sizes = [*WIDTHS[:-1], *WIDTHS[1:]]
    factors = [(torch.randn(TILE, size), torch.randn(TILE, size)) for size in sizes]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for a, b in factors:
            a @ b.T
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def floor(tiles: int, workers: int) -> float:
    """Seconds of all tiles' products, by that many processes at once."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        seconds = list(pool.map(floor_of_a_tile, [15] * workers))
    return max(seconds) * tiles / workers


def timed(work: Any) -> tuple[Any, float]:
    """A result and its wall time."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def peak() -> dict[str, float]:
    """Largest resident memory in GB: of this process, and of its largest child."""
    unit = 2**20
    return {
        "peak GB, this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "peak GB, largest worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--n", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(options.data_dir, options.n, options.workers, options.store or Path(temporary) / "kernel")


def measure(data_dir: str, n: int, workers: int, store: Path) -> None:
    """All steps; each is saved as soon as it is done."""
    data = ntkit.data.load("mnist", data_dir, train=n if n < 60_000 else None)
    x, y = data.x_train.flatten(1), data.y_train
    x_test, y_test = data.x_test.flatten(1), data.y_test
    kernel = ntkit.TangentKernel(network(), outputs="trace", memory="2 GB")
    strips = math.ceil(n / TILE)
    tiles = strips * (strips + 1) // 2
    row: dict[str, Any] = {"n": n, "tiles": tiles, "workers": workers, "floor before, s": floor(tiles, workers)}
    K, row["store, s"] = timed(
        lambda: ntkit.GramStore.create(store, kernel, x, workers=workers, tile=TILE, memory="2 GB", say=print)
    )
    row["floor after, s"] = floor(tiles, workers)
    row["ratio"] = row["store, s"] / ((row["floor before, s"] + row["floor after, s"]) / 2)
    row["disk GB"] = sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) / 1e9
    row |= peak()
    save("mnist_gram", [row])
    spectrum, row["spectrum, s"] = timed(lambda: ntkit.spectrum(K, k=PAIRS))
    row["largest eigenvalue"], row["eigenvalue 50"] = (float(spectrum.eigenvalues[i]) for i in (0, PAIRS - 1))
    row["largest residual / largest eigenvalue"] = float(spectrum.residuals.max() / spectrum.eigenvalues[0])
    save("mnist_gram", [row | peak()])
    targets = one_hot(y).double() - 0.1
    ridge = RIDGE * float(K.diagonal().mean())
    machine, row["ridge, s"] = timed(lambda: ntkit.KernelRidge(ridge).fit(K, targets))
    row |= {"ridge residual": machine.residual_, "passes": machine.passes_, "status": machine.status_}
    save("mnist_gram", [row | peak()])
    wrong, row["prediction, s"] = timed(lambda: errors(machine, kernel, x_test, y_test, x))
    row["test error, %"] = 100 * wrong / len(y_test)
    save("mnist_gram", [row | peak()])


def errors(machine: ntkit.KernelRidge, kernel: ntkit.TangentKernel, x_test: Tensor, y_test: Tensor, x: Tensor) -> int:
    """Test examples of which another class has the largest output, in strips of rows."""
    wrong = 0
    for start in range(0, len(x_test), STRIP):
        rows = slice(start, start + STRIP)
        predicted = torch.as_tensor(machine.predict(kernel(x_test[rows], x))).argmax(1)
        wrong += int((predicted != y_test[rows]).sum())
    return wrong


if __name__ == "__main__":
    main()
