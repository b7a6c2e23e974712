"""Matrix-free products with the Jacobian, memory O(P) beside one batch's graph; K v = J (J^T v) never forms K."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.base.batch import Batch, take
from ntkit.base.workers import workers
from ntkit.jacobian.batches import parts_of, share_out
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.structure import Structure


def pulled_back(gradients: Gradients, structure: Structure, x: Batch, v: Tensor, batch: int) -> list[Tensor]:
    """J^T v for a block of vectors, v [n, C, k] -> per parameter [k, *shape].

    One backward pass per batch and vector; each worker adds up those of its own batches.
    """
    parts = parts_of(x, batch)
    shares = [parts[i :: workers()] for i in range(min(workers(), len(parts)))]

    def work(own: Gradients, share: list[slice]) -> list[Tensor]:
        params = list(own.params.values())
        total = [p.new_zeros(v.shape[2], *p.shape) for p in params]
        for part in share:
            out = own.forward(take(x, part), watch=False)
            vectors = v[part].to(out.dtype)
            for column in range(v.shape[2]):
                grads = torch.autograd.grad(
                    [out], params, [vectors[:, :, column]], retain_graph=True, allow_unused=True
                )
                with torch.no_grad():
                    for sum_, grad in zip(total, grads, strict=True):
                        if grad is not None:
                            sum_[column] += grad
        return total

    with gradients.at_work(structure):
        first, *others = share_out(gradients, structure, x, work, shares)
    with torch.no_grad():
        for other in others:
            for sum_, addend in zip(first, other, strict=True):
                sum_ += addend
    return first


def differentiated_twice(
    gradients: Gradients, structure: Structure, x: Batch, u: list[Tensor], batch: int
) -> Tensor | None:
    """J u for a block of parameter directions, u per parameter [k, *shape] -> [n, C, k].

    g(c) = J^T c is linear in c, so its own vector-Jacobian product with u is J u. This works where an operation has no
    forward mode; fused attention has no second derivative, so its plain form is used. None where some other operation
    has no second derivative.
    """
    parts = parts_of(x, batch)
    with gradients.at_work(structure), sdpa_kernel(SDPBackend.MATH):
        # the first alone, to learn whether it can be done at all
        columns = share_out(gradients, structure, x, lambda own, part: _twice(own, take(x, part), u), parts[:1])
        if columns[0] is not None:
            columns += share_out(gradients, structure, x, lambda own, part: _twice(own, take(x, part), u), parts[1:])
    found = [column for column in columns if column is not None]
    return torch.cat(found).to(gradients.dtype) if len(found) == len(parts) else None


def _twice(own: Gradients, x: Batch, u: list[Tensor]) -> Tensor | None:
    params = list(own.params.values())
    out = own.forward(x, watch=False)
    c = torch.ones_like(out, requires_grad=True)  # at 0 some derivatives are not finite
    try:
        pulled = torch.autograd.grad([out], params, [c], create_graph=True, allow_unused=True)
        used = [(g, i) for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        sources = [g for g, _ in used]
        again = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        columns = [
            torch.autograd.grad(sources, [c], [u[i][k] for _, i in used], **again)[0] for k in range(u[0].shape[0])
        ]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a second derivative that does not exist, or is forbidden (once_differentiable)
        return None
    return torch.stack(columns, -1)
