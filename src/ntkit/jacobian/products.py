"""Matrix-free products with the Jacobian, memory O(P) beside one batch's graph; K v = J (J^T v) never forms K."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkit.base.batch import Batch, count, take
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.model_calls import untouched


def pulled_back(gradients: Gradients, x: Batch, v: Tensor, batch: int) -> list[Tensor]:
    """J^T v for a block of vectors, v [n, C, k] -> per parameter [k, *shape].

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


def differentiated_twice(gradients: Gradients, x: Batch, u: list[Tensor]) -> Tensor | None:
    """J u for a block of parameter directions, u per parameter [k, *shape] -> [n, C, k].

    g(c) = J^T c is linear in c, so its own vector-Jacobian product with u is J u. This works where an operation has no
    forward mode; fused attention has no second derivative, so its plain form is used. None where some other operation
    has no second derivative.
    """
    params = list(gradients.params.values())
    with untouched(gradients.model, gradients.params), sdpa_kernel(SDPBackend.MATH):
        out = gradients.forward(x)
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
