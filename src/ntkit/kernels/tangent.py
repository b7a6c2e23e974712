"""The tangent kernel of a finite network: exact, tiled under a memory budget, checked against autograd on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count
from ntkit.base.caller_context import own_context
from ntkit.base.checks import nearest, refusal
from ntkit.base.numbers import as_integer
from ntkit.base.shown import of_model
from ntkit.jacobian.engine import Engine
from ntkit.jacobian.kept_factors import KeptFactors, factors_of, plan_for_tiles, product_of
from ntkit.jacobian.model_calls import Outputs, Params
from ntkit.jacobian.plan import Plan, Route
from ntkit.kernels.kernel import Kernel, KernelOperator, check_out, refuse_operator_of_diagonal


class TangentKernel(Kernel):
    """Theta(x, x') = J(x) J(x')^T, J(x) = d f(x) / d parameters [C, P]: the (empirical) neural tangent kernel.

    Parameters
    ----------
    model : any ``nn.Module``, unmodified; batch norm in eval mode, dropout off. At its current parameters: the kernel
        at initialization, along training or after it ("after kernel") is the same object at another time.
    outputs : what is differentiated and how outputs are combined. "full": [n1, n2, C, C]. "diagonal": [n1, n2, C], the
        entries c = c'. "trace": [n1, n2], their **sum** over outputs (neural-tangents' default is the mean). "sum":
        [n1, n2], the kernel of sum_c f_c / sqrt(C) (pseudo-NTK). Or a callable from the model's outputs on a batch to
        one scalar per sample [n]: the kernel of that scalar, [n1, n2].
    select : the part of the model's output whose kernel is wanted, a function such as ``lambda out: out[0]``, where the
        model returns something else than a tensor. Without it: the output, or its ``logits`` if it has any (a callable
        as `outputs` may be written for the object or for its logits).
    params : parameter names, a predicate on names (or on name and parameter), or None for all that require grad.
    memory : bytes of scratch memory (or text such as "2 GB"), beside inputs and result; half of what is free if None.
    routes : parameter name -> "outer", "tokens", "nested" or "rows" (see ``print(kernel.plan(x))``), where the choice
        is not to be the cheapest by the machine's rates.

    Raises
    ------
    Refused
        Batch norm in train mode, active dropout, non-finite or empty input, outputs that are not one row per sample.
    SelfCheckError
        When gradients on the first samples differ from plain autograd; names the parameter.

    Notes
    -----
    Jacot, Gabriel, Hongler 2018, section 4 (NTK); Long 2021 (after kernel). Values are in the network's own dtype:
    convert the model and the input to float64 for reference values.

    Examples
    --------
    A linear model's kernel is X X^T, whatever its weights:

    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    >>> TangentKernel(model, outputs="trace")(x)
    tensor([[5., 2.],
            [2., 2.]])
    """

    _infinite = True

    def __init__(
        self,
        model: nn.Module,
        outputs: Outputs = "full",
        *,
        params: Params = None,
        memory: int | str | None = None,
        routes: Mapping[str, Route] | None = None,
        select: Callable[[Any], Any] | None = None,
    ) -> None:
        self._engine = Engine(model, outputs, params, memory, routes, select=select)

    def __repr__(self) -> str:
        engine = self._engine
        return of_model(type(self), engine.model, engine.params, outputs=engine.outputs)

    # ------------------------------------------------------------------ values

    @own_context()
    def tile(self, x1: Batch, x2: Batch | None, plan: Plan) -> Tensor:
        """``k(x1, x2)`` under a plan made beforehand, ``kernel.plan(x)``: the tile of a larger kernel.

        All tiles of one plan are computed along the same routes in batches of the same size, so a tile's bits depend on
        the plan and its samples, and not on the kernel object, on what it computed before, or on free memory.

        Examples
        --------
        >>> model, x = torch.nn.Linear(3, 2), torch.arange(12.0).view(4, 3)
        >>> kernel = TangentKernel(model, outputs="trace")
        >>> plan = kernel.plan(x)
        >>> torch.equal(kernel.tile(x[:2], x[2:], plan), kernel(x)[:2, 2:])
        True
        """
        x1, x2 = self._checked(x1, "x1"), None if x2 is None else self._checked(x2, "x2")
        return self._finite(self._engine.refresh().gram(x1, x2, plan=plan), x1, x2)

    @own_context()
    def plan_for_tiles(self, x: Batch, size: int, n: int | None = None) -> Plan:
        """How ``k(x)``, or the kernel of `n` samples like `x`, is computed in tiles of `size` x `size` samples.

        Each tile comes from the `factors` of two blocks.
        """
        size = as_integer(size, "size", "samples along a tile, at least 1", "Pass e.g. size=500.", least=1)
        n = None if n is None else as_integer(n, "n", "a number of samples, or None", "None = those of x.", least=1)
        return plan_for_tiles(self._engine.refresh(), self._checked(x, "x"), size, n)

    @own_context()
    def factors(self, x: Batch, plan: Plan) -> KeptFactors:
        """What the products of these samples with any others need, to be kept for `product`.

        Several tiles of a large kernel have a block of samples in common: it goes through the model once. Memory: the
        sum of ``bytes_per_sample`` over the plan's steps, per sample.
        """
        return factors_of(self._engine.refresh(), self._checked(x, "x"), plan)

    @own_context()
    def product(self, first: KeptFactors, second: KeptFactors | None = None) -> Tensor:
        """``k(x1, x2)`` from the factors of both, made under one plan; ``second=None``: ``k(x1)``.

        The bits depend on the plan and the samples alone, as those of `tile`, from which they may differ by rounding.

        Examples
        --------
        >>> model, x = torch.nn.Linear(3, 2), torch.arange(12.0).view(4, 3)
        >>> kernel = TangentKernel(model, outputs="trace")
        >>> plan = kernel.plan_for_tiles(x, 2)
        >>> first, second = kernel.factors(x[:2], plan), kernel.factors(x[2:], plan)
        >>> torch.allclose(kernel.product(first, second), kernel(x)[:2, 2:])
        True
        """
        return product_of(self._engine.refresh(), first, second)

    @own_context()
    def layers(self, x1: Batch, x2: Batch | None = None) -> dict[str, Tensor]:
        """Each parameter's share of the kernel, by name; the shares sum to ``k(x1, x2)``.

        A parameter used at several places (tied weights) is one parameter: its share holds the cross terms.
        """
        x1, x2 = self._checked(x1, "x1"), None if x2 is None else self._checked(x2, "x2")
        engine = self._engine.refresh()
        shares = engine.gram(x1, x2, by_parameter=True)
        return dict(zip(engine.params, self._finite(shares, x1, x2), strict=True))

    @own_context()
    def plan(self, x1: Batch, x2: Batch | None = None) -> Plan:
        """How ``k(x1, x2)`` is computed: route and cost per parameter, samples per tile and forward pass."""
        return self._engine.refresh().plan(self._checked(x1, "x1"), None if x2 is None else self._checked(x2, "x2"))

    @own_context()
    def fallback(self, x: Batch) -> dict[str, str]:
        """Parameters computed by plain autograd, sample by sample, on inputs like `x`, and why; empty at best."""
        return dict(self._engine.refresh().structure(self._checked(x, "x")).fallback)

    @own_context()
    def jvp(self, x: Batch, direction: Mapping[str, Tensor]) -> Tensor:
        """Jacobian times a parameter direction, J(x) u: the outputs' first-order change, [n, C].

        Parameters
        ----------
        x : n samples.
        direction : parameter name -> change, of the parameter's shape; parameters not named do not change.

        Examples
        --------
        >>> model = torch.nn.Linear(2, 1)
        >>> TangentKernel(model).jvp(torch.tensor([[3.0, 4.0]]), {"weight": torch.tensor([[1.0, 10.0]])})
        tensor([[43.]])
        """
        x = self._checked(x, "x")
        engine = self._engine.refresh()
        params = engine.params
        for name, change in direction.items():
            if name not in params:
                raise refusal("direction", got=repr(name), expected="a parameter's name", fix=nearest(name, params))
            _expect(change, tuple(params[name].shape), f"direction '{name}'")
        block = [
            direction[name].to(p)[None] if name in direction else p.new_zeros(1, *p.shape) for name, p in params.items()
        ]
        return self._finite(engine.jvp(x, block)[:, :, 0], x, None, block)

    @own_context()
    def vjp(self, x: Batch, cotangent: Tensor) -> dict[str, Tensor]:
        """Transposed Jacobian times a vector over samples and outputs, J(x)^T v: {parameter name: [*shape]}.

        Parameters
        ----------
        x : n samples.
        cotangent : [n, C].

        Examples
        --------
        >>> model = torch.nn.Linear(2, 1)
        >>> TangentKernel(model).vjp(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))["weight"]
        tensor([[6., 8.]])
        """
        x = self._checked(x, "x")
        engine = self._engine.refresh()
        _expect(cotangent, (count(x), engine.structure(x).outputs), "cotangent")
        pulled = engine.vjp(x, cotangent.to(engine.like)[:, :, None])
        result = {name: p[0] for name, p in zip(engine.params, pulled, strict=True)}
        return self._finite(result, x, None, [cotangent])

    def settings(self) -> dict[str, Any]:
        """Model, outputs and the names of the parameters."""
        return self._engine.settings()

    @own_context()
    def operator(self, x: Batch) -> KernelOperator:
        """Matrix-free k(x): two passes over the data per product, memory O(P) and one batch's graph."""
        x = self._checked(x, "x")
        engine = self._engine.refresh()
        n, outputs, full = count(x), engine.structure(x).outputs, engine.mode == "full"
        if engine.mode == "diagonal":
            raise refuse_operator_of_diagonal()
        batch = engine.vector_batch(x)

        def once(v: Tensor) -> Tensor:
            return self._finite(engine.jvp(x, engine.vjp(x, v, batch), batch), x, None, [v])

        def apply(v: Tensor) -> Tensor:
            if full:
                return once(v.reshape(n, outputs, -1)).reshape(n * outputs, -1)
            # the trace kernel is a sum of one kernel per output
            total = torch.zeros_like(v)
            for c in range(outputs):
                padded = v.new_zeros(n, outputs, v.shape[1])
                padded[:, c] = v
                total += once(padded)[:, c]
            return total

        def diagonal() -> Tensor:
            values = self.diagonal(x)
            return values.diagonal(dim1=1, dim2=2).reshape(-1) if full else values

        return KernelOperator(n * outputs if full else n, apply, diagonal, engine.like)

    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        engine = self._engine.refresh()
        if out is not None:
            n1, n2 = count(x1), count(x1 if x2 is None else x2)
            check_out(out, (n1, n2, *engine.tail(engine.structure(x1, unseen=True).outputs)), engine.dtype)
        return engine.gram(x1, x2, out)

    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        return self._engine.refresh().pairs(x1, x2)


def _expect(t: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(t.shape) != shape:
        raise refusal(what, got=f"shape {tuple(t.shape)}", expected=f"{shape}", fix="Reshape it.")
