"""A user's script without a mistake; `tests/test_types.py` has type checkers read it. It is never run."""

from pathlib import Path

import torch
from torch import nn

import ntkit

model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
x, y = torch.randn(6, 2), torch.randn(6, 1)

kernel = ntkit.TangentKernel(model, outputs="trace", memory="1 GB")
K = kernel(x)
spectrum = ntkit.spectrum(K, k=3)
values = spectrum.eigenvalues
likeness: float = ntkit.alignment(K, y)
ridge = ntkit.KernelRidge(1e-3).fit(K, y)
svm = ntkit.HardMarginSVM().fit(K, torch.tensor([-1.0, 1.0] * 3))
run = ntkit.train(model, (x, y), nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1), steps=4)
last = run.state(4)
decomposition = ntkit.PathKernel(run, integration="quadrature", rule="midpoint").decompose(x)
error: float = decomposition.error
limit = ntkit.InfiniteKernel(model, kind="nngp", w_std=1.0, b_std=0.1)
sketch = ntkit.SketchedKernel(model, dim=64, outputs="sum")
settings = ntkit.Settings(data="digits", epochs=3)
folder: Path = ntkit.study("jacot2018", scale="quick")
digits = ntkit.data.load("digits", classes=(3, 8))
