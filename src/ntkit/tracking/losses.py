"""Default losses of `track`, and derivatives of a loss by the outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkit.tracking.snapshot_numbers import finite
from ntkit.trajectory.objective import Loss, paired


def half_squared(out: Any, y: Tensor) -> Tensor:
    """Half the squared distance to the targets, mean over samples: (1 / 2n) sum_i |f(x_i) - y_i|^2."""
    return 0.5 * ((out.reshape(len(y), -1) - y.reshape(len(y), -1)) ** 2).sum(1).mean()


def logistic(out: Any, y: Tensor) -> Tensor:
    """Logistic loss of one output for labels 0 and 1."""
    return F.binary_cross_entropy_with_logits(out.reshape(len(y)), y.to(out))


def cross_entropy(out: Any, y: Tensor) -> Tensor:
    """Cross-entropy of one output per class."""
    return F.cross_entropy(out.reshape(len(y), -1), y)


def check_paired(loss: Loss | None, raw: Tensor, y: Tensor) -> None:
    """Refuse a loss of the caller's that compares each output with each target, as `train` does."""
    if loss is None:
        return
    try:
        paired(loss, raw.double(), y.double() if y.is_floating_point() else y)
    except RuntimeError:  # as in `derivatives`
        paired(loss, raw, y)


def derivatives(loss: Loss, raw: Tensor, y: Tensor) -> tuple[float | None, Tensor, Tensor | None]:
    """Loss, and the derivatives of n times it by each sample's outputs: the first [n, C], the second [n, C, C].

    The second is None where a sample's slope depends on the outputs of others (a root of a mean): it has no such form.
    """
    try:
        return _differentiated(loss, raw.double(), y.double() if y.is_floating_point() else y)
    except RuntimeError:  # a loss with constants (class weights) accepts the network's precision only
        return _differentiated(loss, raw, y)


def _differentiated(loss: Loss, raw: Tensor, y: Tensor) -> tuple[float | None, Tensor, Tensor | None]:
    n = len(raw)
    with torch.enable_grad():
        leaf = raw.detach().clone().requires_grad_()
        value = loss(leaf, y)
        (slope,) = torch.autograd.grad(n * value, leaf, create_graph=True)
        flat = slope.reshape(n, -1)

        def second(weights: Tensor) -> Tensor:
            """Derivative of a weighted sum of the slopes by each sample's outputs, [n, C]."""
            again = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            if not flat.requires_grad:
                return torch.zeros_like(flat)
            return torch.autograd.grad((flat * weights).sum(), leaf, **again)[0].reshape(n, -1)

        curvature = torch.stack([second(row) for row in torch.eye(flat.shape[1]).to(flat)], 1).detach()
        draw = torch.Generator().manual_seed(0)
        weights = torch.randn(flat.shape, generator=draw, dtype=torch.float64).to(flat)
        missed = second(weights).detach() - torch.einsum("ncd,nc->nd", curvature, weights)
    own = bool(missed.abs().max() <= torch.finfo(flat.dtype).eps ** 0.5 * curvature.abs().max())
    return finite(float(value.detach())), flat.detach().double(), curvature.double() if own else None
