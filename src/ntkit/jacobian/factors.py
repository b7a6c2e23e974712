"""Gradients of every sample of a batch, in factored form, from one forward and one (batched) backward pass.

`Gradients` binds a model, its parameters and the outputs to differentiate. Before its first use on a model it takes a
few samples, establishes who owns which rows, and compares every parameter's gradient with plain autograd on single
samples; a mismatch raises. What has no rule, or whose rows cannot be told apart, is computed by plain autograd sample
by sample ("fallback"): slower, never wrong.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ntkit.checks import refusal
from ntkit.jacobian.graph import Use, find_uses, signature
from ntkit.jacobian.inputs import Batch, Outputs, call, count, leaves, reduce_outputs, take, untouched
from ntkit.jacobian.ownership import Owner, establish
from ntkit.jacobian.rules import RULES, Factor, Pair, Rows

_PROBE = 3  # samples of the self-check: odd, and more than two, so that a foreign row shows


class SelfCheckError(RuntimeError):
    """The fast path disagreed with plain autograd on the user's model. No result is returned."""


class Irregular(Exception):  # a signal between rooms, not an error
    """A batch whose rows for `name` do not follow the layout established: plan that parameter again."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class Size:
    """Shape of one parameter's gradient in factors: T positions of data [a] and cotangent [o]; T = 0 means rows."""

    positions: int
    a: int
    o: int
    entries: int
    gather: bool = False


@dataclass
class Structure:
    """What the self-check established for one graph: valid for any batch whose graph has the same signature."""

    outputs: int
    owners: dict[tuple[str, int], Owner]  # (parameter, which of its uses) -> owner
    fallback: dict[str, str]  # parameter -> why
    unused: set[str]
    uses: dict[str, tuple]  # parameter -> what its uses look like (`graph.signature`)
    sizes: dict[str, Size] = field(default_factory=dict)
    bytes_per_sample: int = 0  # of saved tensors and cotangents, for one output


class Gradients:
    """Per-sample gradients of a model's outputs, [n, C, P] in factors.

    Parameters
    ----------
    model : any module; used as it is, never changed.
    params : parameter by name.
    outputs : "full", "diagonal", "trace", "sum" or a callable (see `ntkit.TangentKernel`).
    """

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], outputs: Outputs) -> None:
        self.model, self.params, self.outputs = model, params, outputs
        self._structures: dict[tuple, Structure] = {}
        self._batched = True  # vmapped backward; a graph with a node that cannot be vmapped loops instead

    # ------------------------------------------------------------------ a batch

    def forward(self, x: Batch) -> Tensor:
        """Outputs to differentiate, [n, C], with their graph. Call inside `untouched`."""
        return reduce_outputs(call(self.model, x), self.outputs, count(x))

    def structure(self, x: Batch) -> Structure:
        """Establish (once per graph) and return what is known of the model's graph on inputs like `x`."""
        with untouched(self.model, self.params):
            first = take(x, slice(0, 1))
            key = self._key(first, find_uses(self.forward(first), self.params))
            if key not in self._structures:
                self._structures[key] = self._establish(x)
            return self._structures[key]

    def batch(self, x: Batch, known: Structure) -> dict[str, Rows | Pair]:
        """Factors of every parameter for the samples of `x`; rows are flat, [n, C, entries], in the parameter's order.

        Raises
        ------
        Irregular
            When this batch's rows do not follow the established layout.
        """
        with untouched(self.model, self.params):
            n = count(x)
            out = self.forward(x)
            uses = find_uses(out, self.params)
            self._same_graph(uses, known)
            basis = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
            basis = basis[:, None, :].expand(-1, n, -1)
            factors = self._factors(out, uses, known, basis, n)
            if known.fallback:
                names = list(known.fallback)
                values = {name: [] for name in names}
                for s in range(n):
                    for name, g in self._single(take(x, slice(s, s + 1)), names, None).items():
                        values[name].append(g)
                factors |= {name: Rows(torch.stack(g)) for name, g in values.items()}
            return factors

    def _key(self, x: Batch, uses: list[Use]) -> tuple:
        return (signature(uses), tuple((t.dtype, t.shape[1:]) for t in leaves(x)))

    def _same_graph(self, uses: list[Use], known: Structure) -> None:
        now = _by_name(uses)
        for name in self.params:
            if name not in known.fallback and now.get(name, ()) != known.uses.get(name, ()):
                raise Irregular(name, "its use in the graph changes from batch to batch")

    # ------------------------------------------------------------------ factors

    @torch.no_grad()
    def _factors(self, out: Tensor, uses: list[Use], known: Structure, basis: Tensor, n: int) -> dict[str, Rows | Pair]:
        """Factors of the parameters on the fast path; basis [K, n, C] holds the K cotangents of the outputs."""
        fast = [(key, use) for key, use in _numbered(uses) if use.name not in known.fallback]
        cotangents = self._backward(out, [use.node for _, use in fast], basis)
        parts: dict[str, list[tuple[Use, Factor]]] = {}
        for key, use in fast:
            cot = cotangents[use.node]
            if not known.owners[key].fits(tuple(cot.shape[1:]), n):
                raise Irregular(use.name, "the rows of its layer do not grow with the batch")
            factor = RULES[use.node.name()](use, known.owners[key], n, cot)
            if factor is None:
                raise Irregular(use.name, f"no rule for this use by {use.node.name()}")
            parts.setdefault(use.name, []).append((use, factor))
        result = {name: self._merge(name, found, n, basis.shape[0]) for name, found in parts.items()}
        for name in known.unused:
            p = self.params[name]
            result[name] = Rows(out.new_zeros(n, basis.shape[0], p.numel()))
        return result

    def _backward(self, out: Tensor, nodes: list, basis: Tensor) -> dict:
        """Cotangents [K, *node output] of every node for K cotangents of the outputs [K, n, C]."""
        unique = list(dict.fromkeys(nodes))
        edges = [GradientEdge(node, 0) for node in unique]
        if not edges:
            return {}
        grads: tuple[Tensor | None, ...] | None = None
        if self._batched and basis.shape[0] > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*performance drop.*")
                    grads = torch.autograd.grad(
                        [out], edges, [basis], is_grads_batched=True, retain_graph=True, allow_unused=True
                    )
            except RuntimeError:
                self._batched = False
        if grads is None:
            rows = [
                torch.autograd.grad([out], edges, [row], retain_graph=True, allow_unused=True) for row in basis.unbind()
            ]
            grads = tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))
        shapes = (basis.shape[:1] + tuple(node._input_metadata[0].shape) for node in unique)
        return {
            node: out.new_zeros(shape) if grad is None else grad
            for node, grad, shape in zip(unique, grads, shapes, strict=True)
        }

    def _merge(self, name: str, found: list[tuple[Use, Factor]], n: int, outputs: int) -> Rows | Pair:
        """Sum a parameter's uses. Pairs of one kind are joined along positions, so cross terms come by themselves."""
        pairs = [_in_place(use, factor) for use, factor in found]
        first = pairs[0]
        if first is not None and len(pairs) == 1:
            return first
        if first is not None and first.groups == 1 and all(p is not None and _alike(p, first) for p in pairs):
            data = torch.cat([p.data for p in pairs if p], 1)
            return replace(first, data=data, cotangent=torch.cat([p.cotangent for p in pairs if p], 2))
        total: Tensor | None = None
        for (use, factor), pair in zip(found, pairs, strict=True):
            if pair is not None:
                values = pair.rows()
            else:
                values = factor.rows() if isinstance(factor, Pair) else factor.values
                values = self._pull_back(values.reshape(n * outputs, *use.shape), use)
            values = values.reshape(n, outputs, -1)
            total = values if total is None else total + values
        assert total is not None
        return Rows(total)

    def _pull_back(self, values: Tensor, use: Use) -> Tensor:
        """From the weight as the node sees it to the parameter itself, through the views between them."""
        if not use.layout:
            return values
        child, number = use.node.next_functions[use.slot]
        (grad,) = torch.autograd.grad(
            [GradientEdge(child, number)], [self.params[use.name]], [values], is_grads_batched=True, retain_graph=True
        )
        return grad

    def _single(self, x: Batch, names: list[str], basis: Tensor | None) -> dict[str, Tensor]:
        """Plain autograd for one sample: {name: [K, entries]}; basis [K, C] (identity if None)."""
        out = self.forward(x)
        if basis is None:
            basis = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
        params = [self.params[name] for name in names]
        rows = []
        for row in basis.unbind():
            if out.requires_grad:
                grads = torch.autograd.grad([out], params, [row[None]], retain_graph=True, allow_unused=True)
            else:
                grads = [None] * len(params)
            rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)])
        return {name: torch.stack([r[j].reshape(-1) for r in rows]) for j, name in enumerate(names)}

    # ------------------------------------------------------------------ the self-check

    def _establish(self, x: Batch) -> Structure:
        n = count(x)
        spread = torch.tensor([0, n // 2, n - 1])
        probe = take(x, spread)
        out = self.forward(probe)
        uses = find_uses(out, self.params)
        shapes_fewer = self._shapes(take(probe, slice(0, 2)), uses)
        known = Structure(out.shape[1], {}, {}, set(self.params) - {use.name for use in uses}, _by_name(uses))
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(2, _PROBE, out.shape[1], generator=generator, dtype=torch.float64).to(out)

        masked = torch.zeros(_PROBE, _PROBE, out.shape[1], dtype=out.dtype, device=out.device)
        masked[range(_PROBE), range(_PROBE)] = draw[0]
        ruled = [use for use in uses if use.node.name() in RULES]
        cotangents = self._backward(out, [use.node for use in ruled], masked)
        for i, (key, use) in enumerate(_numbered(uses)):
            if use.node not in cotangents:
                known.fallback[use.name] = f"no rule for {use.node.name()}"
                continue
            shape = shapes_fewer.get(i)
            owner = establish(cotangents[use.node], shape, 2) if shape is not None else None
            if owner is None:
                known.fallback[use.name] = f"rows of {use.node.name()} could not be assigned to samples"
            else:
                known.owners[key] = owner
        factors = self._fast_or_fallback(out, uses, known, draw)
        known.sizes = {name: _size(f, self.params[name]) for name, f in factors.items()}
        known.sizes |= {name: Size(0, 0, 0, self.params[name].numel()) for name in known.fallback}
        held = {id(use.node): cotangents[use.node] for use in ruled}
        saved = sum(t[0].numel() for t in held.values()) * out.element_size() // _PROBE
        known.bytes_per_sample = 2 * saved
        self._compare(probe, out, known, factors, draw)
        return known

    def _fast_or_fallback(self, out: Tensor, uses: list[Use], known: Structure, draw: Tensor) -> dict[str, Rows | Pair]:
        while True:
            try:
                return self._factors(out, uses, known, draw, _PROBE)
            except Irregular as signal:
                known.fallback[signal.name] = signal.reason

    def _shapes(self, x: Batch, uses: list[Use]) -> dict[int, tuple[int, ...]]:
        """Output shapes of the same uses on another batch; empty if the graph is another one."""
        others = find_uses(self.forward(x), self.params)
        if signature(others) != signature(uses):
            return {}
        return {i: tuple(use.node._input_metadata[0].shape) for i, use in enumerate(others)}

    def _compare(
        self, probe: Batch, out: Tensor, known: Structure, factors: dict[str, Rows | Pair], draw: Tensor
    ) -> None:
        """Raise unless outputs and gradients of the probe equal those of its samples taken one at a time."""
        tolerance = torch.finfo(out.dtype).eps ** 0.5
        scale = out.detach().abs().max()
        for s in range(_PROBE):
            alone = take(probe, slice(s, s + 1))
            single = self.forward(alone).detach()[0]
            gap = (single - out.detach()[s]).abs().max()
            if not gap <= tolerance * scale + torch.finfo(out.dtype).tiny:
                raise refusal(
                    f"model {type(self.model).__name__}",
                    got=f"an output for one sample that changes by {gap:.2g} when the sample is evaluated alone",
                    expected="the same output in every batch and at every call",
                    fix="Look for layers that mix samples (batch statistics) or draw random numbers; "
                    "call model.eval().",
                )
            reference = self._single(alone, list(factors), draw[:, s]) if factors else {}
            if not reference:
                continue
            whole = torch.stack([g.norm() for g in reference.values()]).norm()
            for name, factor in factors.items():
                fast = (factor.rows() if isinstance(factor, Pair) else factor.values)[s].reshape(draw.shape[0], -1)
                error = (fast - reference[name]).norm()
                # The floor is for gradients that vanish by symmetry (a bias before a normalisation): pure rounding.
                if not error <= tolerance * reference[name].norm() + 1e3 * torch.finfo(out.dtype).eps * whole:
                    raise SelfCheckError(
                        f"gradient of parameter '{name}' differs from plain autograd on sample {s} of the self-check: "
                        f"error {error:.3g}, norm {reference[name].norm():.3g}. No kernel was computed. Leave it out "
                        "with params=..., and please report the layer that uses it."
                    )


def _numbered(uses: list[Use]) -> list[tuple[tuple[str, int], Use]]:
    """Uses with a key that survives other parameters' uses coming and going: (parameter, which of its uses)."""
    seen: dict[str, int] = {}
    keyed = []
    for use in uses:
        keyed.append(((use.name, seen.get(use.name, 0)), use))
        seen[use.name] = seen.get(use.name, 0) + 1
    return keyed


def _by_name(uses: list[Use]) -> dict[str, tuple]:
    """What the uses of each parameter look like."""
    found: dict[str, tuple] = {}
    for use, look in zip(uses, signature(uses), strict=True):
        found[use.name] = (*found.get(use.name, ()), look[1:])
    return found


def _in_place(use: Use, factor: Factor) -> Pair | None:
    """The factor as a pair in the parameter's own layout, when at most a matrix transpose lies between."""
    if not isinstance(factor, Pair):
        return None
    if not use.layout:
        return factor
    transposed = use.layout in (("TBackward0",), ("TransposeBackward0",)) and len(use.shape) == 2
    return replace(factor, data_first=not factor.data_first) if transposed and factor.groups == 1 else None


def _alike(p: Pair, q: Pair) -> bool:
    """Whether two pairs can be joined along positions."""
    return (p.data_first, p.groups, p.data.dtype) == (q.data_first, q.groups, q.data.dtype)


def _size(factor: Rows | Pair, parameter: nn.Parameter) -> Size:
    if isinstance(factor, Rows) or factor.groups > 1:
        return Size(0, 0, 0, parameter.numel())
    gather = factor.data.dtype == torch.int64
    return Size(factor.data.shape[1], factor.a, factor.cotangent.shape[3], parameter.numel(), gather)
