"""The tangent kernel of a finite network: exact, tiled under a memory budget, checked against autograd on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.checks import nearest, refusal
from ntkit.jacobian.check import structure_of
from ntkit.jacobian.contract import Plan, Tile, make_plan, multiply, multiply_aligned, prepare
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.inputs import MODES, Batch, Outputs, check_mode, checked, count, select_parameters, take
from ntkit.jacobian.operator import jacobian_times, jacobian_transpose_times
from ntkit.jacobian.structure import Irregular, Size, Structure
from ntkit.kernels.base import Kernel, KernelOperator
from ntkit.progress import task


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
        self, model: nn.Module, outputs: Outputs = "full", params: Any = None, memory: int | str | None = None
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

    # ------------------------------------------------------------------ values

    def layers(self, x1: Batch, x2: Batch | None = None) -> dict[str, Tensor]:
        """Each parameter's share of the kernel, by name; the shares sum to ``k(x1, x2)``.

        A parameter used at several places (tied weights) is one parameter: its share holds the cross terms.
        """
        x1, x2 = checked(x1, "x1"), None if x2 is None else checked(x2, "x2")
        names = list(self._gradients.params)
        shares: dict[str, Tensor] = {}

        def products(t1: Tile, t2: Tile, scratch: int) -> Tensor:
            return torch.stack([multiply(t1.only(name), t2.only(name), self._mode, scratch) for name in names])

        whole = self._tiled(x1, x2, products, lead=(len(names),))
        for name, share in zip(names, whole, strict=True):
            shares[name] = share
        return shares

    def plan(self, x1: Batch, x2: Batch | None = None) -> Plan:
        """How ``k(x1, x2)`` would be computed: route and cost per parameter, samples per tile and forward pass."""
        x1 = checked(x1, "x1")
        return self._planned(x1, x1 if x2 is None else checked(x2, "x2"))[2]

    def fallback(self, x: Batch) -> dict[str, str]:
        """Parameters computed by plain autograd, sample by sample, on inputs like `x`, and why; empty at best."""
        return dict(self._known(checked(x, "x")).fallback)

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
        batch = max(1, min(256, int(self._memory() * 0.3 / (known.bytes_per_sample * 4 * outputs + 1))))

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

    def _gram(self, x1: Batch, x2: Batch | None) -> Tensor:
        def product(t1: Tile, t2: Tile, scratch: int) -> Tensor:
            return multiply(t1, t2, self._mode, scratch)[None]

        return self._tiled(x1, x2, product, lead=(1,))[0]

    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        other = x1 if x2 is None else x2
        while True:
            known1, known2, plan = self._planned(x1, other, aligned=True)
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

    # ------------------------------------------------------------------ tiles

    def _tiled(self, x1: Batch, x2: Batch | None, product: Callable[..., Tensor], lead: tuple[int, ...]) -> Tensor:
        while True:
            known1, known2, plan = self._planned(x1, x1 if x2 is None else x2)
            try:
                return self._fill(x1, x2, known1, known2, plan, product, lead)
            except Irregular as signal:  # seen only in a later batch: that parameter goes sample by sample
                known1.fallback |= signal.reasons
                known2.fallback |= signal.reasons

    def _fill(
        self,
        x1: Batch,
        x2: Batch | None,
        known1: Structure,
        known2: Structure,
        plan: Plan,
        product: Callable[..., Tensor],
        lead: tuple[int, ...],
    ) -> Tensor:
        same = x2 is None
        other = x1 if same else x2
        n1, n2 = count(x1), count(other)
        tail = {"full": (known1.outputs,) * 2, "diagonal": (known1.outputs,)}.get(self._mode, ())
        like = next(iter(self._gradients.params.values()))
        result = torch.empty(*lead, n1, n2, *tail, dtype=self._gradients.dtype, device=like.device)
        scratch = max(self._memory() // 8, 1)
        strips = [slice(i, min(i + plan.tile, n1)) for i in range(0, n1, plan.tile)]
        with (
            task(
                "tangent kernel", total=sum(n1 - s.start if same else s.stop - s.start + n2 for s in strips)
            ) as progress,
            torch.no_grad(),
        ):
            for rows in strips:
                t1 = prepare(self._gradients, take(x1, rows), known1, plan, progress.advance)
                if same:
                    for a, b in _blocks(t1.n, t1.n, plan.block, symmetric=True):
                        block = product(t1.part(a.start, a.stop), t1.part(b.start, b.stop), scratch)
                        _store(result, block, rows.start + a.start, rows.start + b.start, mirrored=True)
                for j in range(rows.stop if same else 0, n2, plan.columns):
                    t2 = prepare(
                        self._gradients, take(other, slice(j, j + plan.columns)), known2, plan, progress.advance
                    )
                    for a, b in _blocks(t1.n, t2.n, plan.block, symmetric=False):
                        block = product(t1.part(a.start, a.stop), t2.part(b.start, b.stop), scratch)
                        _store(result, block, rows.start + a.start, j + b.start, mirrored=same)
                    del t2
                del t1  # its memory is the next one's
        return result

    def _planned(self, x1: Batch, x2: Batch, aligned: bool = False) -> tuple[Structure, Structure, Plan]:
        known1 = self._known(x1)
        known2 = known1 if x2 is x1 else self._known(x2)
        known1 = self._known(x1)  # x2 may have shown more different samples of the same kind
        if known1.outputs != known2.outputs:
            raise refusal(
                "x2",
                got=f"{known2.outputs} outputs",
                expected=f"{known1.outputs}, as for x1",
                fix="Use inputs of one kind.",
            )
        both = known1 if known2 is known1 else _joined(known1, known2)
        like = next(iter(self._gradients.params.values()))
        plan = make_plan(both, self._mode, count(x1), count(x2), self._memory(), like, aligned)
        return known1, known2, plan

    def _known(self, x: Batch) -> Structure:
        """What is known of the model on inputs like `x`; it may have got other parameters since the last call."""
        check_mode(self._model)
        current = select_parameters(self._model, self._params)
        held = self._gradients.params
        if current.keys() != held.keys() or any(current[name] is not p for name, p in held.items()):
            self._gradients = Gradients(self._model, current, self._outputs)
        return structure_of(self._gradients, x)

    def _memory(self) -> int:
        return (
            self._budget
            if self._budget is not None
            else free_memory(next(iter(self._gradients.params.values())).device) // 2
        )


def _blocks(n1: int, n2: int, size: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Cut n1 x n2 into blocks; of a symmetric square only those on and above the diagonal."""
    for a in range(0, n1, size):
        for b in range(a if symmetric else 0, n2, size):
            yield slice(a, min(a + size, n1)), slice(b, min(b + size, n2))


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


def _joined(a: Structure, b: Structure) -> Structure:
    """A structure whose plan serves both sides: factors where both have them, the longer positions for the cost."""
    sizes = {}
    for name, s in a.sizes.items():
        o = b.sizes[name]
        if 0 in (s.positions, o.positions) or (s.gather, s.data_first) != (o.gather, o.data_first):
            sizes[name] = Size(0, 0, 0, s.entries)
        else:
            sizes[name] = s if s.positions >= o.positions else o
    return replace(
        a, sizes=sizes, fallback=a.fallback | b.fallback, bytes_per_sample=max(a.bytes_per_sample, b.bytes_per_sample)
    )


def parse_memory(memory: int | str | None) -> int | None:
    """Bytes from a number or text like "500 MB", "2 GB".

    >>> parse_memory("2 GB")
    2000000000
    """
    if memory is None:
        return None
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    try:
        if isinstance(memory, str):
            digits = memory.strip().rstrip("KMGiBkmgb ").strip()
            value = int(float(digits) * units[memory.strip()[len(digits) :].strip().upper()])
        else:
            value = int(memory)
        if value <= 0:
            raise ValueError(memory)
    except (ValueError, KeyError) as error:
        raise refusal(
            "memory",
            got=repr(memory),
            expected='bytes, or text such as "500 MB" or "2 GB"',
            fix="Give the scratch memory allowed.",
        ) from error
    return value


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
