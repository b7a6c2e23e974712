"""Products of gradients compared with float64, on a few samples, before the first result along a route."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ntkit.base.batch import Batch, count, has_infinity, take
from ntkit.base.checks import refusal
from ntkit.jacobian.contraction import Scratch, multiply, multiply_aligned, prepare
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.model_outputs import refuse_infinite_input
from ntkit.jacobian.pairs import Whole, widened
from ntkit.jacobian.plan import Plan
from ntkit.jacobian.structure import SelfCheckError, Structure


def compare_products(
    gradients: Gradients, x: Batch, structure: Structure, plan: Plan, mode: str, aligned: bool
) -> None:
    """Compare the kernel of up to three samples, along the routes of a plan, with its factors multiplied in float64.

    Two random combinations stand for all outputs. ``aligned``: the plan is for pairs (i, i) only.

    Raises
    ------
    SelfCheckError
        When an entry differs by more than rounding in the precision of the results explains.
    Refused
        Where only entries do that are too small for this precision.
    """
    few = take(x, sorted({0, count(x) // 2, count(x) - 1}))
    n, k = count(few), min(2, structure.outputs)
    draw = torch.Generator().manual_seed(1)
    cotangents = torch.randn(k, n, structure.outputs, generator=draw, dtype=torch.float64)
    combined = replace(structure, outputs=k)  # shares all else with the structure
    recorder = _Recorder(gradients, cotangents)
    tile = prepare(cast(Gradients, recorder), few, combined, replace(plan, batch=n))
    if aligned:
        fast = multiply_aligned(tile, tile, mode).double()
    else:
        fast = multiply(tile, tile, mode, Scratch(plan.scratch)).double()
    products = torch.stack(recorder.products).sum(0)
    if not bool(products.isfinite().all()) and has_infinity(few):
        raise refuse_infinite_input()
    norms = products.diagonal().sqrt()
    exact, bound = (_reduced(matrix.view(n, k, n, k), mode, aligned) for matrix in (products, norms[:, None] * norms))
    eps = _rounding(gradients)
    error = (fast - exact).abs().where(fast.isfinite(), 0.0)  # an overflow of the results' precision shows by itself
    wrong = ~(error <= min(1e3 * eps, eps**0.5) * bound)
    smallest = torch.finfo(gradients.dtype).tiny
    if wrong.any() and (bound < smallest)[wrong].all():
        raise refusal(
            "the kernel",
            got=f"values of {float(bound[wrong].max()):.1g} in {str(gradients.dtype).removeprefix('torch.')}",
            expected=f"values above {smallest:.1g}: smaller ones lose their digits",
            fix="Convert network and samples to float64, or multiply the outputs by a number.",
        )
    if wrong.any():
        worst = float((error / bound).nan_to_num(0.0).max())
        raise SelfCheckError(
            f"products of the gradients of the self-check differ from float64 by {worst:.2g} of their norms, where "
            f"rounding explains {1e3 * eps:.1g}. No kernel was computed. Please report the model and the context of "
            "the call."
        )


def _reduced(products: Tensor, mode: str, aligned: bool) -> Tensor:
    """From products [n, C, n, C] to the values that a kernel of this mode has."""
    full = products.transpose(1, 2)  # [n, n, C, C]
    if aligned:
        full = full.diagonal(dim1=0, dim2=1).movedim(-1, 0)
    if mode == "full":
        return full
    diagonal = full.diagonal(dim1=-2, dim2=-1)
    return diagonal if mode == "diagonal" else diagonal.sum(-1)


class _Recorder:
    """Gradients of random combinations of the outputs, and their products in float64."""

    def __init__(self, gradients: Gradients, cotangents: Tensor) -> None:
        self.gradients, self.cotangents, self.model = gradients, cotangents, gradients.model
        self.dtype, self.params, self.at_work = gradients.dtype, gradients.params, gradients.at_work
        self.products: list[Tensor] = []  # per parameter

    def due(self, n: int) -> bool:
        """No sample is evaluated alone: the self-check has done that."""
        return False

    def one_batch(self, x: Batch, structure: Structure, cotangents: Tensor | None, alone: bool) -> dict[str, Whole]:
        """Factors of the samples: all at once, since they are few."""
        factors = self.gradients.one_batch(x, structure, self.cotangents, alone)
        with torch.no_grad():
            rows = (widened(factor, torch.float64).rows().flatten(0, 1) for factor in factors.values())
            self.products += [r @ r.T for r in rows]
        return factors


def _rounding(gradients: Gradients) -> float:
    """Rounding of a product: of the results' precision, or of the coarser one that the user allows to products."""
    device = next(iter(gradients.params.values())).device.type
    allowed = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    coarse = allowed if gradients.dtype == torch.float32 and device in ("cuda", "cpu") else 0.0
    return max(torch.finfo(gradients.dtype).eps, coarse)
