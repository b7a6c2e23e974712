"""The two ways of the torch.func tutorial on neural tangent kernels, written anew: run by `benchmarks.engine`.

``jacobian``: per-sample Jacobians by vmap(jacrev), contracted. ``products``: kernel entries as Jacobian-vector products
of vector-Jacobian products, never a Jacobian. Both plain, as the tutorial has them; with ``chunked`` tile by tile, for
sizes that the plain form cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from benchmarks.peers.job import read_job, report

Params = dict[str, Tensor]
Single = Callable[[Params, Tensor], Tensor]


def jacobians(single: Single, params: Params, x: Tensor) -> Params:
    """Per-sample Jacobians by parameter, [n, C, entries]."""
    return {name: j.flatten(2) for name, j in vmap(jacrev(single), (None, 0))(params, x).items()}


def contract(j1: Params, j2: Params, outputs: str) -> Tensor:
    """Sum over parameters of J1 J2^T: [n1, n2, C, C] "full", [n1, n2] "trace"."""
    form = "naf,maf->nm" if outputs == "trace" else "naf,mbf->nmab"
    return torch.stack([torch.einsum(form, j1[name], j2[name]) for name in j1]).sum(0)


def products(single: Single, params: Params, x1: Tensor, x2: Tensor, outputs: str) -> Tensor:
    """Kernel by products with unit vectors of the outputs."""

    def entry(a: Tensor, b: Tensor) -> Tensor:
        out, pull = vjp(lambda p: single(p, a), params)

        def row(unit: Tensor) -> Tensor:
            return jvp(lambda p: single(p, b), (params,), pull(unit))[1]

        block = vmap(row)(torch.eye(out.numel(), dtype=out.dtype))
        return block.diagonal().sum() if outputs == "trace" else block

    return vmap(vmap(entry, (None, 0)), (0, None))(x1, x2)


def main() -> None:
    job = read_job()
    data = torch.load(job["inputs"], weights_only=False)
    model, x1 = data["model"], data["x1"]
    symmetric, outputs = data["x2"] is None, data["outputs"]
    x2 = x1 if symmetric else data["x2"]
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(p: Params, x: Tensor) -> Tensor:
        return functional_call(model, (p, buffers), (x[None],))[0]

    def plain() -> Tensor:
        if job["method"] == "products":
            return products(single, params, x1, x2, outputs)
        j1 = jacobians(single, params, x1)
        return contract(j1, j1 if symmetric else jacobians(single, params, x2), outputs)

    def chunked() -> Tensor:
        strips = []
        for a in x1.split(job["rows"]):
            parts = x2.split(job["columns"])
            if job["method"] == "products":
                strips.append(torch.cat([products(single, params, a, b, outputs) for b in parts], 1))
                continue
            pieces = [jacobians(single, params, part) for part in a.split(job["columns"])]
            j1 = {name: torch.cat([piece.pop(name) for piece in pieces]) for name in params}
            strips.append(torch.cat([contract(j1, jacobians(single, params, b), outputs) for b in parts], 1))
        return torch.cat(strips)

    with torch.no_grad():
        report(job, chunked if job["chunked"] else plain, versions={"torch": torch.__version__})


if __name__ == "__main__":
    main()
