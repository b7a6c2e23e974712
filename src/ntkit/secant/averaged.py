"""The rule of last resort: the Jacobian of a smooth operation, averaged over the line between the ends.

    f(z1) - f(z0) = (integral over t from 0 to 1 of J(z0 + t (z1 - z0)) dt) (z1 - z0)

is a secant like any other. The integral is a Gauss-Legendre sum with as many nodes as it takes for this equation to
hold to rounding; if 64 are not enough, a kink or a jump lies between the ends, and the operation is refused. So what
has a derivative and no rule is exact: inverse, solve, determinant, matrix exponential, eigenvalues, packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ntkit.secant.secant_tensor import (
    SecantTensor,
    at_both_ends,
    discrete,
    is_float,
    jump,
    map_structure,
    no_rule,
    rule,
    secant_tensors,
)

_MOST = 64  # nodes


@rule("other")
def averaged(func: Any, args: Any, kwargs: Any) -> Any:
    """Results of an operation as SecantTensors, by its averaged Jacobian.

    Raises
    ------
    NoSecant
        When it has no derivative, when numbers are complex, or when the integral does not converge.
    """
    moving = list({id(t): t for t in secant_tensors(args, kwargs)}.values())
    if any(t.mid is None for t in moving):
        raise jump(func)
    o0, o1 = at_both_ends(func, args, kwargs)
    numbers = [t for t in (*tree_leaves(o0), *(t.start for t in moving)) if is_float(t)]
    if any(t.is_complex() for t in numbers):
        raise no_rule(func, "complex numbers")
    line = _Line(func, args, kwargs, moving)
    ends = [(a, b) for a, b in zip(tree_leaves(o0), tree_leaves(o1), strict=True) if is_float(a)]
    nodes = [line.enough(k, a, b) for k, (a, b) in enumerate(ends)]
    if not any(nodes):
        raise no_rule(func, "no rule for it, and an integral between the ends of a step that does not converge")
    with torch.enable_grad():
        means = [torch.lerp(a, b, 0.5) for a, b in ends]
        results = iter(_Averaged.apply(line.pulled_back(nodes), means, *(t.mid for t in moving)))

    def wrapped(start: Any, end: Any) -> Any:
        if isinstance(start, Tensor):
            return SecantTensor(start, end, next(results)) if is_float(start) else discrete(func, start, end)
        if isinstance(start, (list, tuple)):
            return type(start)([wrapped(a, b) for a, b in zip(start, end, strict=True)])
        return discrete(func, start, end)

    return wrapped(o0, o1)


class _Averaged(torch.autograd.Function):
    """Given values whose gradient is a given function of the cotangents."""

    @staticmethod
    def forward(ctx: Any, pulled_back: Callable[..., Any], values: list[Tensor], *mids: Tensor) -> Any:
        ctx.pulled_back = pulled_back
        ctx.set_materialize_grads(True)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (None, None, *ctx.pulled_back(cotangents))


class _Line:
    """An operation along the straight line between the ends of its arguments."""

    def __init__(self, func: Any, args: Any, kwargs: Any, moving: Sequence[SecantTensor]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.ends = [(t.start.detach().clone(), t.end.detach().clone()) for t in moving]
        self._place = {id(t): k for k, t in enumerate(moving)}

    def enough(self, place: int, o0: Tensor, o1: Tensor) -> int:
        """Nodes with which the averaged Jacobian times the step is the change of a result; 0 if 64 are not enough.

        The result is known by its `place`. It may have no derivative (a factorization kept beside a solution).
        """
        results = self._results([start for start, _ in self.ends])[1]
        if not results[place].requires_grad:
            return 0
        draw = torch.Generator().manual_seed(0)
        cotangents = [torch.zeros_like(o) for o in results]
        cotangents[place] = v = torch.randn(o0.shape, generator=draw, dtype=torch.float64).to(o0)
        change, size = float((v * (o1 - o0)).sum()), float((v.abs() * (o0.abs() + o1.abs())).sum())
        eps, nodes, before = torch.finfo(o0.dtype).eps, 1, math.inf
        while nodes <= _MOST:
            pulled = self.pulled_back([nodes] * len(results))(cotangents)
            terms = [g * (end - start) for g, (start, end) in zip(pulled, self.ends, strict=True)]
            error = abs(sum(float(t.sum()) for t in terms) - change)
            error /= size + sum(float(t.abs().sum()) for t in terms) + torch.finfo(o0.dtype).tiny
            # done, or as near as the rounding of an ill-conditioned derivative allows
            if error <= 16 * eps or (nodes >= 16 and before / 4 <= error <= eps**0.75):
                return nodes
            nodes, before = 2 * nodes, error
        return 0

    def pulled_back(self, nodes: Sequence[int]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """From cotangents of the results to those of the arguments, by the averaged Jacobian with so many nodes."""
        at, weights = np.polynomial.legendre.leggauss(max(nodes))

        def apply(cotangents: Sequence[Tensor]) -> list[Tensor]:
            if any(not n and bool(c.any()) for n, c in zip(nodes, cotangents, strict=True)):
                raise no_rule(self.func, "a result without a derivative, or with a jump between the ends of a step")
            total = [torch.zeros_like(start) for start, _ in self.ends]
            for t, weight in zip((at + 1) / 2, weights / 2, strict=True):
                leaves, results = self._results([torch.lerp(start, end, float(t)) for start, end in self.ends])
                own = [k for k, n in enumerate(nodes) if n and results[k].requires_grad]
                outputs, vectors = [results[k] for k in own], [cotangents[k] for k in own]
                with _refused(self.func):
                    grads = torch.autograd.grad(outputs, leaves, vectors, allow_unused=True, materialize_grads=True)
                total = [sum_ + float(weight) * g for sum_, g in zip(total, grads, strict=True)]
            return total

        return apply

    def _results(self, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves with these values, and the results that are numbers, with their graph."""
        with torch.enable_grad():
            leaves = [value.clone().requires_grad_() for value in values]

            def put(value: Any) -> Any:
                return leaves[self._place[id(value)]] if isinstance(value, SecantTensor) else map_structure(put, value)

            with _refused(self.func):
                out = self.func(*put(self.args), **put(self.kwargs))
        return leaves, [o for o in tree_leaves(out) if is_float(o)]


@contextmanager
def _refused(func: Any) -> Iterator[None]:
    """Turn the error of an operation without a derivative into a refusal."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise no_rule(func) from error
