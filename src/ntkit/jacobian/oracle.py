"""The oracle: per-sample autograd in float64, as plain as it gets. Every fast path must equal it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, leaves, take, with_leaves
from ntkit.jacobian.graph import correct_norms
from ntkit.jacobian.model_calls import Outputs, Params, call, select_parameters, untouched
from ntkit.jacobian.model_outputs import reduce_outputs


def jacobian(
    model: nn.Module, x: Batch, outputs: Outputs = "full", params: Params = None, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Gradients of every output of every sample, one sample and one output at a time.

    Parameters
    ----------
    model : the module; a copy of it in `dtype` is used.
    x : n samples.
    outputs, params : as for `ntkit.TangentKernel`.
    dtype : precision of the copy.

    Returns
    -------
    dict
        Parameter name -> [n, C, entries].

    Examples
    --------
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> jacobian(model, x)["weight"]
    tensor([[[1., 2.]]], dtype=torch.float64)
    """
    oracle = copy.deepcopy(model).to(dtype)
    x = _cast(x, dtype)
    parameters = select_parameters(oracle, params)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    with untouched(oracle, parameters):
        for s in range(count(x)):
            out = reduce_outputs(call(oracle, take(x, slice(s, s + 1))), outputs, 1)[0]
            correct_norms(out)
            per_output: dict[str, list[Tensor]] = {name: [] for name in parameters}
            for value in out:
                grads = [None] * len(parameters)
                if value.requires_grad:
                    grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
                for (name, p), grad in zip(parameters.items(), grads, strict=True):
                    per_output[name].append(
                        torch.zeros(p.numel(), dtype=dtype, device=p.device) if grad is None else grad.reshape(-1)
                    )
            for name, values in per_output.items():
                rows[name].append(torch.stack(values))
    return {name: torch.stack(values) for name, values in rows.items()}


def tangent_kernel(
    model: nn.Module, x1: Batch, x2: Batch | None = None, outputs: Outputs = "full", params: Params = None
) -> Tensor:
    """The tangent kernel by the definition: J(x1) J(x2)^T in float64, reduced as `outputs` says.

    Returns
    -------
    Tensor
        [n1, n2, C, C] "full", [n1, n2, C] "diagonal", [n1, n2] "trace", "sum" and callables.
    """
    j1 = torch.cat(list(jacobian(model, x1, outputs, params).values()), -1)
    j2 = j1 if x2 is None else torch.cat(list(jacobian(model, x2, outputs, params).values()), -1)
    full = torch.einsum("icp,jdp->ijcd", j1, j2)
    if outputs == "full":
        return full
    diagonal = full.diagonal(dim1=2, dim2=3)
    return diagonal if outputs == "diagonal" else diagonal.sum(-1)


def _cast(x: Batch, dtype: torch.dtype) -> Batch:
    def to(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    return with_leaves(x, [to(t) for t in leaves(x)])
