"""Matrix-free products with the kernel: K v = J (J^T v), never forming K, memory O(P) beside one batch's graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.inputs import Batch, count, take, untouched


def jacobian_transpose_times(gradients: Gradients, x: Batch, v: Tensor, batch: int) -> list[Tensor]:
    """J^T v for a block of vectors: v [n, C, k] -> per parameter [k, *shape].

    One backward pass per batch and vector.
    """
    params = list(gradients.params.values())
    total = [p.new_zeros(v.shape[2], *p.shape) for p in params]
    with untouched(gradients.model, gradients.params):
        for start in range(0, count(x), batch):
            part = slice(start, start + batch)
            out = gradients.forward(take(x, part))
            for column in range(v.shape[2]):
                grads = torch.autograd.grad([out], params, [v[part, :, column]], retain_graph=True, allow_unused=True)
                for sum_, grad in zip(total, grads, strict=True):
                    if grad is not None:
                        sum_[column] += grad
    return total


def jacobian_times(gradients: Gradients, x: Batch, u: list[Tensor], batch: int) -> Tensor:
    """J u for a block of parameter directions: u per parameter [k, *shape] -> [n, C, k].

    By differentiating twice: g(c) = J^T c is linear in c, so its own vector-Jacobian product with u is J u. This works
    where an operation has no forward mode; fused attention has no second derivative, so its plain form is used.
    """
    params = list(gradients.params.values())
    vectors = u[0].shape[0]
    results = []
    with untouched(gradients.model, gradients.params), sdpa_kernel(SDPBackend.MATH):
        for start in range(0, count(x), batch):
            out = gradients.forward(take(x, slice(start, start + batch)))
            c = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad([out], params, [c], create_graph=True, allow_unused=True)
            used = [(g, i) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
            columns = []
            for k in range(vectors):
                directions = [u[i][k] for _, i in used]
                (column,) = torch.autograd.grad(
                    [g for g, _ in used], [c], directions, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                columns.append(column)
            results.append(torch.stack(columns, -1))
    return torch.cat(results)
