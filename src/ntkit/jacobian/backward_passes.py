"""Vectors sent back through one graph: all at once where every node can be vmapped, else one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def vector_jacobian_products(outputs: list, inputs: list, vectors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Several vectors through one graph at a time: vmapped, or one by one where some node cannot be."""
    try:
        return batched_products(outputs, inputs, vectors)
    except RuntimeError:
        return looped_products(outputs, inputs, vectors)


def batched_products(outputs: list, inputs: list, vectors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Several vectors through one graph at a time, vmapped.

    Raises
    ------
    RuntimeError
        Where some node cannot be vmapped.
    """
    return torch.autograd.grad(outputs, inputs, vectors, is_grads_batched=True, retain_graph=True, allow_unused=True)


def looped_products(outputs: list, inputs: list, vectors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Several vectors through one graph, one by one."""
    rows = [
        torch.autograd.grad(outputs, inputs, list(row), retain_graph=True, allow_unused=True)
        for row in zip(*vectors, strict=True)
    ]
    return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))


def dense(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient as autograd returned it, as a dense tensor: zeros for None."""
    if grad is None:
        return torch.zeros_like(parameter)
    return grad.to_dense() if grad.is_sparse else grad
