"""The hard-margin SVM: time, gap and, where it is installed, the objective of PIQP on the same problem."""

from __future__ import annotations

import time

import numpy as np
import torch

import ntkit
from benchmarks.common import save
from ntkit.networks.built_in import build


def problems() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random kernels, and the tangent kernel of a CNN on digits (even against odd)."""
    g = torch.Generator().manual_seed(0)
    cases = {}
    for n, d in ((500, 200), (1000, 2000), (3000, 6000)):
        phi = torch.randn(n, d, generator=g, dtype=torch.float64)
        y = torch.sign(phi @ torch.randn(d, generator=g, dtype=torch.float64))
        cases[f"random features, n = {n}, d = {d}"] = (phi @ phi.T / d, y)
    data = ntkit.data.load("digits")
    model = build("cnn", data.input_shape, 1, seed=0)
    K = ntkit.TangentKernel(model, outputs="trace")(torch.cat([data.x_train, data.x_test]))
    cases["digits, CNN tangent kernel, even / odd, n = 1797"] = (
        K,
        (torch.cat([data.y_train, data.y_test]) % 2) * 2.0 - 1,
    )
    return cases


def piqp_objective(K: torch.Tensor, y: torch.Tensor) -> float:
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


def main() -> None:
    rows = []
    for name, (K, y) in problems().items():
        start = time.perf_counter()
        svm = ntkit.HardMarginSVM().fit(K, y)
        seconds = time.perf_counter() - start
        row = {
            "problem": name,
            "seconds": seconds,
            "gap": float(svm.gap_),
            "status": svm.status_,
            "support": len(svm.support_),
        }
        if len(y) <= 3000:
            objective = 0.5 / float(svm.margin_) ** 2
            row["objective / PIQP - 1"] = objective / piqp_objective(K, y) - 1
        rows.append(row)
    save("svm", rows)


if __name__ == "__main__":
    main()
