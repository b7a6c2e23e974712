"""Matrix-free products with the kernel: K v = J (J^T v), never forming K, memory O(P) beside one batch's graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.base.batch import Batch, count, take
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.model_calls import untouched
from ntkit.jacobian.self_check import structure_of
from ntkit.jacobian.structure import Irregular


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
    where an operation has no forward mode; fused attention has no second derivative, so its plain form is used. Where
    some other operation has none either, the samples' gradients are formed.
    """
    results = []
    for start in range(0, count(x), batch):
        part = take(x, slice(start, start + batch))
        try:
            results.append(_by_differentiating_twice(gradients, part, u))
        except NotImplementedError:
            results.append(_by_gradients(gradients, part, u))
    return torch.cat(results)


def _by_differentiating_twice(gradients: Gradients, x: Batch, u: list[Tensor]) -> Tensor:
    params = list(gradients.params.values())
    with untouched(gradients.model, gradients.params), sdpa_kernel(SDPBackend.MATH):
        out = gradients.forward(x)
        c = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad([out], params, [c], create_graph=True, allow_unused=True)
        used = [(g, i) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        columns = [
            torch.autograd.grad(
                [g for g, _ in used],
                [c],
                [u[i][k] for _, i in used],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )[0]
            for k in range(u[0].shape[0])
        ]
    return torch.stack(columns, -1)


@torch.no_grad()
def _by_gradients(gradients: Gradients, x: Batch, u: list[Tensor]) -> Tensor:
    known = structure_of(gradients, x)
    while True:
        try:
            factors = gradients.batch(x, known)
            break
        except Irregular as signal:
            known.fallback |= signal.reasons
    shares = [factors[name].rows() @ v.reshape(v.shape[0], -1).T for name, v in zip(gradients.params, u, strict=True)]
    return torch.stack(shares).sum(0)
