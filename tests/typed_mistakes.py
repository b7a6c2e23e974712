"""The same script with ten mistakes, one per line that says so; `tests/test_types.py` expects those and no others."""

import torch
from torch import nn

import ntkit

model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
x, y = torch.randn(6, 2), torch.randn(6, 1)

kernel = ntkit.TangentKernel(model, outputs="trace")
K = kernel(x)
run = ntkit.train(model, (x, y), nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1), steps=4)
decomposition = ntkit.PathKernel(run).decompose(x)
spectrum = ntkit.spectrum(K, k=3)

ntkit.TangentKernel(model, output="trace")  # mistake: the argument is outputs
ntkit.SketchedKernel(model, dim=64, outputs="traces")  # mistake: no such mode
ntkit.TangentKernel("model")  # mistake: a string is no module
ntkit.NeuralKernel(model)  # mistake: no such public name
K.eigenvalues  # mistake: a tensor has no such attribute
spectrum(x)  # mistake: a Spectrum is not a function
ntkit.KernelRidge(1e-3).fit(K)  # mistake: fit takes targets, too
decomposition["contributions"]  # mistake: a decomposition is not a dict
ntkit.train(model, (x, y), nn.functional.mse_loss, torch.optim.SGD, steps="4")  # mistake: steps is an integer
ntkit.InfiniteKernel(model, kind="nnpg")  # mistake: no such kind
