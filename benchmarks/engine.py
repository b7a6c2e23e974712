"""The tangent kernel against its floors (matrix product, forward and backward) and against torch.func's tutorial."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import ntkit
from benchmarks.common import gemm_rate, median_seconds, save
from ntkit.models import build


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, outputs))


def tutorial_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 26 * 26, 10))


WORKLOADS = [
    ("MLP 784-512-512-10", lambda: mlp(10), (784,), 64, 64),
    ("MLP 784-512-512-1", lambda: mlp(1), (784,), 1000, 1000),
    ("tutorial CNN, 10 outputs", tutorial_cnn, (3, 32, 32), 20, 5),
    ("VGG-38, 1 output", lambda: build("vgg", (1, 28, 28), 1, 0), (1, 28, 28), 100, 100),
    ("VGG-38, 10 outputs", lambda: build("vgg", (1, 28, 28), 10, 0), (1, 28, 28), 50, 50),
]


def tutorial(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """Contract Jacobians the way the torch.func tutorial does."""
    params = {k: v.detach() for k, v in model.named_parameters()}

    def single(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x[None],))[0]

    j1, j2 = (vmap(jacrev(single), (None, 0))(params, x) for x in (x1, x2))
    return torch.stack([torch.einsum("Naf,Mbf->NMab", j1[k].flatten(2), j2[k].flatten(2)) for k in j1]).sum(0)


def forward_backward(model: nn.Module, *sets: Tensor) -> None:
    """One forward and one backward pass of each sample, for one output: the floor of any exact method."""
    for x in sets:
        torch.autograd.grad(model(x).sum(), list(model.parameters()))


def main() -> None:
    torch.manual_seed(0)
    rate, rows = gemm_rate(), []
    for name, make, shape, n1, n2 in WORKLOADS:
        model, x1, x2 = make().eval(), torch.randn(n1, *shape), torch.randn(n2, *shape)
        kernel = ntkit.TangentKernel(model)
        ours = median_seconds(partial(kernel, x1, x2))
        peer = median_seconds(partial(tutorial, model, x1, x2), repeats=3)
        floor = median_seconds(partial(forward_backward, model, x1, x2))
        difference = float((kernel(x1, x2) - tutorial(model, x1, x2)).abs().max() / kernel(x1, x2).abs().max())
        outputs = model(x1[:1]).shape[1]
        rows.append({
            "workload": f"{name}, {n1} x {n2}", "seconds": ours, "torch.func / ours": peer / ours,
            "ours / (outputs x forward+backward)": ours / (outputs * floor),
            "relative difference": difference,
        })  # fmt: skip
    save("engine", rows, gemm_gflops=rate / 1e9)


if __name__ == "__main__":
    main()
