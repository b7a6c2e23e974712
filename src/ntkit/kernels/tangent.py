"""The tangent kernel of a finite network: exact, tiled under a memory budget, checked against autograd on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, alike, checked, count, join, take
from ntkit.base.checks import nearest, parse_bytes, refusal
from ntkit.base.progress import task
from ntkit.jacobian.contraction import Scratch, Tile, blocks, multiply, multiply_aligned, prepare, triangle
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.model_calls import MODES, Outputs, check_mode, select_parameters
from ntkit.jacobian.plan import ROUTES, Plan, make_plan
from ntkit.jacobian.products import jacobian_times, jacobian_transpose_times
from ntkit.jacobian.self_check import structure_of
from ntkit.jacobian.structure import Irregular, Structure, joined
from ntkit.kernels.kernel import Kernel, KernelOperator, check_out

_LEAF = 128  # samples: smaller products are not worth saving half of


class TangentKernel(Kernel):
    """Theta(x, x') = J(x) J(x')^T, J(x) = d f(x) / d parameters [C, P]: the (empirical) neural tangent kernel.

    Parameters
    ----------
    model : any ``nn.Module``, unmodified; batch norm in eval mode, dropout off. At its current parameters: the kernel
        at initialisation, along training or after it ("after kernel") is the same object at another time.
    outputs : what is differentiated and how outputs are combined. "full": [n1, n2, C, C]. "diagonal": [n1, n2, C], the
        entries c = c'. "trace": [n1, n2], their **sum** over outputs (neural-tangents' default is the mean). "sum":
        [n1, n2], the kernel of sum_c f_c / sqrt(C) (pseudo-NTK). Or a callable from the model's outputs on a batch to
        one scalar per sample [n]: the kernel of that scalar, [n1, n2].
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

    def __init__(
        self,
        model: nn.Module,
        outputs: Outputs = "full",
        params: Any = None,
        memory: int | str | None = None,
        routes: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise refusal(
                "model", got=type(model).__name__, expected="a torch.nn.Module", fix="Wrap the function in a module."
            )
        if not callable(outputs) and outputs not in MODES:
            raise refusal(
                "outputs", got=repr(outputs), expected="a mode or a callable", fix=nearest(str(outputs), MODES)
            )
        self._model, self._outputs = model, outputs
        self._mode = outputs if outputs in ("full", "diagonal") else "trace"
        self._budget = parse_memory(memory)
        self._params = params
        self._gradients = Gradients(model, select_parameters(model, params), outputs)
        self._routes = dict(routes or {})
        for name, route in self._routes.items():
            if name not in self._gradients.params or route not in ROUTES:
                known = self._gradients.params if name not in self._gradients.params else ROUTES
                raise refusal(
                    "routes",
                    got=f"{name!r}: {route!r}",
                    expected="a parameter's name and a route",
                    fix=nearest(name if known is not ROUTES else route, known),
                )

    # ------------------------------------------------------------------ values

    def layers(self, x1: Batch, x2: Batch | None = None) -> dict[str, Tensor]:
        """Each parameter's share of the kernel, by name; the shares sum to ``k(x1, x2)``.

        A parameter used at several places (tied weights) is one parameter: its share holds the cross terms.
        """
        x1, x2 = checked(x1, "x1"), None if x2 is None else checked(x2, "x2")
        names = list(self._gradients.params)

        def products(t1: Tile, t2: Tile, scratch: Scratch) -> Tensor:
            shares = []
            for name in names:
                own = t1.only(name)
                shares.append(multiply(own, own if t1 is t2 else t2.only(name), self._mode, scratch))
            return torch.stack(shares)

        return dict(zip(names, self._tiled(x1, x2, products, lead=(len(names),)), strict=True))

    def plan(self, x1: Batch, x2: Batch | None = None) -> Plan:
        """How ``k(x1, x2)`` would be computed: route and cost per parameter, samples per tile and forward pass."""
        x1 = checked(x1, "x1")
        return self._planned(x1, None if x2 is None else checked(x2, "x2"))[2]

    def fallback(self, x: Batch) -> dict[str, str]:
        """Parameters computed by plain autograd, sample by sample, on inputs like `x`, and why; empty at best."""
        return dict(self._known(checked(x, "x")).fallback)

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
        x = checked(x, "x")
        known = self._known(x)
        params = self._gradients.params
        for name, change in direction.items():
            if name not in params:
                raise refusal("direction", got=repr(name), expected="a parameter's name", fix=nearest(name, params))
            _expect(change, tuple(params[name].shape), f"direction '{name}'")
        block = [
            direction[name].to(p)[None] if name in direction else p.new_zeros(1, *p.shape) for name, p in params.items()
        ]
        return jacobian_times(self._gradients, x, block, self._vector_batch(known))[:, :, 0]

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
        x = checked(x, "x")
        known = self._known(x)
        _expect(cotangent, (count(x), known.outputs), "cotangent")
        params = self._gradients.params
        vector = cotangent.to(next(iter(params.values())))[:, :, None]
        pulled = jacobian_transpose_times(self._gradients, x, vector, self._vector_batch(known))
        return {name: p[0] for name, p in zip(params, pulled, strict=True)}

    def _vector_batch(self, known: Structure) -> int:
        """Samples a forward pass may hold when vectors are multiplied."""
        return max(1, min(256, int(self._memory() * 0.3 / (known.bytes_per_sample * 4 * known.outputs + 1))))

    def operator(self, x: Batch) -> KernelOperator:
        """Matrix-free k(x): two passes over the data per product, memory O(P) and one batch's graph."""
        x = checked(x, "x")
        known = self._known(x)
        n, outputs, full = count(x), known.outputs, self._mode == "full"
        if self._mode == "diagonal":
            raise refusal(
                'operator of outputs="diagonal"',
                got="one matrix per output",
                expected="one matrix",
                fix='Use outputs="full", or a callable that picks the output: lambda y: y[:, 0].',
            )
        like = next(iter(self._gradients.params.values()))
        batch = self._vector_batch(known)

        def once(v: Tensor) -> Tensor:
            pulled = jacobian_transpose_times(self._gradients, x, v, batch)
            return jacobian_times(self._gradients, x, pulled, batch)

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

        return KernelOperator(n * outputs if full else n, apply, diagonal, like)

    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        def product(t1: Tile, t2: Tile, scratch: Scratch) -> Tensor:
            return multiply(t1, t2, self._mode, scratch)[None]

        return self._tiled(x1, x2, product, lead=(1,), out=out)[0]

    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        other = x1 if x2 is None else x2
        while True:
            known1, known2, plan = self._planned(x1, x2, aligned=True)
            parts = []
            try:
                for start in range(0, count(x1), plan.tile):
                    part = slice(start, start + plan.tile)
                    t1 = prepare(self._gradients, take(x1, part), known1, plan)
                    t2 = t1 if x2 is None else prepare(self._gradients, take(other, part), known2, plan)
                    parts.append(multiply_aligned(t1, t2, self._mode))
                return torch.cat(parts)
            except Irregular as signal:
                known1.fallback |= signal.reasons
                known2.fallback |= signal.reasons
            except torch.OutOfMemoryError:
                self._halve(plan)

    # ------------------------------------------------------------------ tiles

    def _tiled(
        self,
        x1: Batch,
        x2: Batch | None,
        product: Callable[..., Tensor],
        lead: tuple[int, ...],
        out: Tensor | None = None,
    ) -> Tensor:
        n1, n2 = count(x1), count(x1 if x2 is None else x2)
        result: Tensor | None = None
        done = 0  # rows of the result that are final
        with task("tangent kernel", total=n1 + n2) as progress, torch.no_grad():
            while done < n1:
                known1, known2, plan = self._planned(x1, x2)
                if result is None:
                    result = self._result(out, lead, n1, n2, known1)
                rows = slice(done, min(done + plan.tile, n1))
                try:
                    self._strip(result, rows, x1, x2, known1, known2, plan, product, progress.advance)
                except Irregular as signal:  # seen only in a later batch: that parameter goes sample by sample
                    known1.fallback |= signal.reasons
                    known2.fallback |= signal.reasons
                    done = 0
                    continue
                except torch.OutOfMemoryError:
                    self._halve(plan)
                    continue
                done = rows.stop
        assert result is not None
        return result

    def _result(self, out: Tensor | None, lead: tuple[int, ...], n1: int, n2: int, known: Structure) -> Tensor:
        """Where the values go: [*lead, n1, n2, ...], new, or the user's own."""
        tail = {"full": (known.outputs,) * 2, "diagonal": (known.outputs,)}.get(self._mode, ())
        dtype = self._gradients.dtype
        if out is None:
            device = next(iter(self._gradients.params.values())).device
            return torch.empty(*lead, n1, n2, *tail, dtype=dtype, device=device)
        check_out(out, (n1, n2, *tail), dtype)
        return out[None]

    def _strip(
        self,
        result: Tensor,
        rows: slice,
        x1: Batch,
        x2: Batch | None,
        known1: Structure,
        known2: Structure,
        plan: Plan,
        product: Callable[..., Tensor],
        advance: Callable[[int], None],
    ) -> None:
        """One strip of rows: of a symmetric kernel only from the diagonal on, and its mirror image."""
        same = x2 is None
        other = x1 if same else x2
        scratch = Scratch(plan.scratch)
        n1, n2 = count(x1), count(other)
        t2: Tile | None = None
        if (
            not same
            and known1 is known2
            and alike(x1, other)
            and n1 + n2 <= plan.batch
            and n1 <= plan.tile
            and n2 <= plan.columns
        ):
            # few samples: one pass through the model for both sides
            whole = prepare(self._gradients, join(x1, other), known1, plan, advance)
            t1, t2 = whole.part(0, n1), whole.part(n1, n1 + n2)
        else:
            t1 = prepare(self._gradients, take(x1, rows), known1, plan, advance)
        if same:
            # leaves of an eighth: the squares on the diagonal, done whole, then cost an eighth of the half saved
            for a, b in triangle(0, t1.n, plan.block, max(_LEAF, t1.n // 16)):
                left = t1.part(a.start, a.stop)
                block = product(left, left if a == b else t1.part(b.start, b.stop), scratch)
                _store(result, block, rows.start + a.start, rows.start + b.start, mirrored=True)
        for j in range(rows.stop if same else 0, n2, plan.columns):
            if t2 is None:
                t2 = prepare(self._gradients, take(other, slice(j, j + plan.columns)), known2, plan, advance)
            for a, b in blocks(t1.n, t2.n, plan.block):
                block = product(t1.part(a.start, a.stop), t2.part(b.start, b.stop), scratch)
                _store(result, block, rows.start + a.start, j + b.start, mirrored=same)
            t2 = None

    def _halve(self, plan: Plan) -> None:
        """After the device ran out of memory: half the budget, unless it is down to single samples."""
        if plan.tile == plan.batch == 1:
            raise
        torch.cuda.empty_cache()
        self._budget = max(self._memory() // 2, 1)

    def _planned(self, x1: Batch, x2: Batch | None, aligned: bool = False) -> tuple[Structure, Structure, Plan]:
        self._renew()
        known1 = known2 = structure_of(self._gradients, x1, unseen=True)
        if x2 is not None:
            known2 = structure_of(self._gradients, x2, unseen=True)
            if known1 not in self._gradients.structures.values():  # x2 has shown more different samples of that kind
                known1 = structure_of(self._gradients, x1, unseen=True)
        if known1.outputs != known2.outputs:
            raise refusal(
                "x2",
                got=f"{known2.outputs} outputs",
                expected=f"{known1.outputs}, as for x1",
                fix="Use inputs of one kind.",
            )
        both = known1 if known2 is known1 else joined(known1, known2)
        like = next(iter(self._gradients.params.values()))
        n1, n2 = count(x1), count(x1 if x2 is None else x2)
        plan = make_plan(
            both, self._mode, n1, n2, self._memory(), like, same=x2 is None, aligned=aligned, routes=self._routes
        )
        return known1, known2, plan

    def _known(self, x: Batch) -> Structure:
        """What is known of the model on inputs like `x`."""
        self._renew()
        return structure_of(self._gradients, x)

    def _renew(self) -> None:
        """Look at the model again: it may have got another mode or other parameters since the last call."""
        check_mode(self._model)
        current = select_parameters(self._model, self._params)
        if not self._gradients.current(current):
            self._gradients = Gradients(self._model, current, self._outputs)

    def _memory(self) -> int:
        return (
            self._budget
            if self._budget is not None
            else free_memory(next(iter(self._gradients.params.values())).device) // 2
        )


def _store(result: Tensor, block: Tensor, i: int, j: int, mirrored: bool) -> None:
    """Write a block [lead, m1, m2, ...] at (i, j), and its mirror image at (j, i)."""
    m1, m2 = block.shape[1:3]
    result[:, i : i + m1, j : j + m2] = block
    if not mirrored:
        return
    full = block.dim() == 5
    if i == j:  # rounding may differ between the halves: the upper one counts
        _mirror(result[:, i : i + m1, j : j + m2], full)
        return
    flipped = block.transpose(1, 2)
    result[:, j : j + m2, i : i + m1] = flipped.transpose(3, 4) if full else flipped


def _mirror(block: Tensor, full: bool) -> None:
    """Copy the upper triangle of [lead, n, n, ...] to the lower."""
    n = block.shape[1]
    i, j = torch.triu_indices(n, n, 1, device=block.device)
    upper = block[:, i, j]
    block[:, j, i] = upper.transpose(-1, -2) if full else upper
    if full:  # and each sample's own C x C block
        own = block[:, range(n), range(n)]
        block[:, range(n), range(n)] = own.triu() + own.triu(1).transpose(-1, -2)


def _expect(t: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(t.shape) != shape:
        raise refusal(what, got=f"shape {tuple(t.shape)}", expected=f"{shape}", fix="Reshape it.")


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes of scratch memory from a number or text like "500 MB"."""
    return parse_bytes(memory, "memory", "Give the scratch memory allowed.")


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
