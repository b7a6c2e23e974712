"""Solvers that need only products with a kernel matrix, each beside its dense oracle; one thread, CPU seconds.

python -m benchmarks.solvers                                    # digits
python -m benchmarks.solvers --data-dir FOLDER                  # the official MNIST files: 2,000 and 8,000 points
python -m benchmarks.solvers --data-dir FOLDER --ridge 20000    # and ridge regression of so many, to its residual

The kernel is the tangent kernel of a 784-512-512-1 MLP at initialization, in float32; ten one-hot targets, less their
mean; ridge and noise are 1e-3 of the mean diagonal. "passes": products with the matrix, and the rows read by themselves
as a share of it. "error": largest difference from the oracle, relative to its largest value (for predictions: to 1).
Oracles are dense, in float64: an eigendecomposition, a Cholesky factor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import ntkit
import ntkit.gram.gram_matrix as gram_matrix
from benchmarks.common import save

SIZES = (2000, 8000)
RIDGE = 1e-3
PAIRS = 50
TESTED = 256
Row = dict[str, Any]


class Counted(ntkit.Gram):
    """Counts passes over the matrix."""

    def __init__(self, K: Tensor) -> None:
        super().__init__(K)
        self.products, self.entries, self._inside = 0, 0, False

    @property
    def passes(self) -> float:
        """Products, and single rows as a share of the matrix."""
        return self.products + self.entries / len(self) ** 2

    def tile(self, rows: Any, columns: Any) -> Tensor:
        """As in any Gram, and counted."""
        result = super().tile(rows, columns)
        self.entries += 0 if self._inside else result.numel()
        return result

    def _product(self, block: Tensor) -> Tensor:
        used = int(block.reshape(len(self), -1).any(1).sum())
        if 2 * used <= len(self):  # rows only: `tile` counts them
            return super()._product(block)
        self.products, self._inside = self.products + 1, True
        result = super()._product(block)
        self._inside = False
        return result


def kernel_of(data: Any, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """K, K_test, the diagonal of the test points, targets, labels."""
    torch.manual_seed(0)
    inputs = data.x_train[0].numel()
    layers = (nn.Flatten(), nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))
    kernel = ntkit.TangentKernel(nn.Sequential(*layers), outputs="trace")
    x, x_test, y = data.x_train[:n], data.x_test[:TESTED], data.y_train[:n]
    targets = one_hot(y, 10).double()
    return kernel(x), kernel(x_test, x), kernel.diagonal(x_test).double(), targets - targets.mean(0), y


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def streamed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Without room for a dense matrix."""
    with patch.object(gram_matrix, "free_memory", lambda device: 0):
        return timed(work)


def off(found: Tensor, exact: Tensor, scale: float | None = None) -> float:
    return float((found - exact).abs().max()) / (float(exact.abs().max()) if scale is None else scale)


def spectra(K: Tensor, K_test: Tensor, Y: Tensor) -> list[Row]:
    """The top of the spectrum, energies, gradient flow: beside a dense eigendecomposition."""
    n, rows = len(K), []
    exact, dense = timed(lambda: ntkit.spectrum(K))
    gram = Counted(K)
    top, seconds = streamed(lambda: ntkit.spectrum(gram, PAIRS))
    row = {"solver": f"top {PAIRS} eigenpairs", "n": n, "error": off(top.eigenvalues, exact.eigenvalues[:PAIRS])}
    row |= {"certificate": float(top.residuals.max()), "passes": gram.passes, "seconds": seconds, "dense": dense}
    rows.append(row)
    energies = off(top.energy(Y), exact.energy(Y)[:PAIRS], 1.0)
    rows.append({"solver": "energies of the targets", "n": n, "error": energies, "passes": 0.0})
    gram = Counted(K)
    flow, seconds = streamed(lambda: ntkit.GradientFlow(k=PAIRS).fit(gram, Y))
    gap = exact.eigenvectors.T @ -Y
    for multiple in (0.1, 1.0, 5.0):
        t = multiple * n / float(exact.eigenvalues[PAIRS])
        done = -torch.expm1(-t * exact.eigenvalues.clamp(min=0) / n) / exact.eigenvalues.clamp(min=1e-30)
        wanted = K_test.double() @ (exact.eigenvectors @ (-done[:, None] * gap))
        bound = float(flow.error_bound(K_test, t).max())
        row = {"solver": f"gradient flow, t = {multiple:g} n / eigenvalue {PAIRS + 1}", "n": n}
        row |= {"error": off(flow.predict(K_test, t), wanted, 1.0), "certificate": bound}
        rows.append(row | {"passes": gram.passes, "seconds": seconds, "dense": dense})
    return rows


def solves(K: Tensor, K_test: Tensor, prior: Tensor, Y: Tensor) -> list[Row]:
    """Ridge regression, and the mean and variances of a Gaussian process, beside Cholesky."""
    n, rows, shift = len(K), [], RIDGE * float(K.diagonal().double().mean())
    exact, dense = timed(lambda: ntkit.KernelRidge(shift).fit(K, Y))
    gram = Counted(K)
    ridge, seconds = streamed(lambda: ntkit.KernelRidge(shift).fit(gram, Y))
    row = {"solver": "ridge, ten targets", "n": n, "error": off(ridge.predict(K_test), exact.predict(K_test), 1.0)}
    row |= {"certificate": ridge.residual_, "passes": gram.passes, "seconds": seconds, "dense": dense}
    rows.append(row | {"status": ridge.status_})
    exact, dense = timed(lambda: ntkit.GaussianProcess(shift).fit(K, Y).predict(K_test, prior))
    gram = Counted(K)
    gp = streamed(lambda: ntkit.GaussianProcess(shift).fit(gram, Y))[0]
    fitted = gram.passes
    found, seconds = streamed(lambda: gp.predict(K_test, prior))
    scale = float(prior.mean())
    row = {"solver": f"GP variance, {TESTED} points", "n": n, "error": off(found.covariance, exact.covariance, scale)}
    row |= {"certificate": float(found.variance_error.max()) / scale, "passes": gram.passes - fitted}
    rows.append(row | {"seconds": seconds, "dense": dense, "status": gp.status_})
    return rows


def others(K: Tensor, Y: Tensor, y: Tensor) -> list[Row]:
    """Alignment and the hard-margin SVM, which have one algorithm: what they read."""
    gram = Counted(K)
    value, seconds = streamed(lambda: ntkit.alignment(gram, Y, centered=True))
    H = K.double() - K.double().mean(0) - K.double().mean(1, keepdim=True) + K.double().mean()
    exact = float((Y * (H @ Y)).sum() / (H.norm() * (Y.T @ Y).norm()))
    row = {"solver": "centered alignment", "n": len(K), "error": abs(value - exact), "passes": gram.passes}
    rows = [row | {"seconds": seconds}]
    gram = Counted(K)
    svm, seconds = streamed(lambda: ntkit.HardMarginSVM().fit(gram, y))
    row = {"solver": "SVM, ten classes", "n": len(K), "certificate": svm.gap_, "passes": gram.passes}
    return [*rows, row | {"seconds": seconds, "status": svm.status_}]


def ridge_at(data: Any, n: int) -> Row:
    """Ridge regression of many points, certified by its residual."""
    K, _, _, Y, _ = kernel_of(data, n)
    gram = Counted(K)
    shift = RIDGE * float(K.diagonal().double().mean())
    machine, seconds = streamed(lambda: ntkit.KernelRidge(shift).fit(gram, Y))
    row = {"solver": "ridge, ten targets", "n": n, "certificate": machine.residual_, "passes": gram.passes}
    return row | {"seconds": seconds, "status": machine.status_}


def main() -> None:
    from threadpoolctl import threadpool_limits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--ridge", type=int, metavar="N")
    options = parser.parse_args()
    name = "digits" if options.data_dir is None else "mnist"
    data = ntkit.data.load(name, data_dir=options.data_dir)
    torch.set_num_threads(1)
    rows = []
    with threadpool_limits(1):
        for n in sorted({min(n, len(data.x_train)) for n in SIZES}):
            K, K_test, prior, Y, y = kernel_of(data, n)
            for part in (spectra(K, K_test, Y), solves(K, K_test, prior, Y), others(K, Y, y)):
                rows += part
                print(*part, sep="\n", flush=True)
        rows += [ridge_at(data, options.ridge)] if options.ridge else []
    save("solvers", rows, data=name)


if __name__ == "__main__":
    main()
