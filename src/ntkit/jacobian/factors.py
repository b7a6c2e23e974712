"""Gradients of every sample of a batch, in factored form, from one forward and one (batched) backward pass.

`Gradients` binds a model, its parameters and the outputs to differentiate. What has no rule, or whose rows cannot be
told apart, is computed by plain autograd sample by sample ("fallback"): slower, never wrong. `jacobian.check` finds out
who owns which rows, and compares a few samples with plain autograd, before the first result.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ntkit.checks import refusal
from ntkit.jacobian.graph import Use, find_uses, signature
from ntkit.jacobian.inputs import Batch, Outputs, call, count, reduce_outputs, take, untouched
from ntkit.jacobian.rules import RULES, Factor, Pair, Rows
from ntkit.jacobian.structure import Irregular, Structure


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
        self.structures: dict[tuple, Structure] = {}  # what `jacobian.check` established, by the graph's look
        # rows and results are in the widest precision of the parameters
        self.dtype = reduce(torch.promote_types, (p.dtype for p in params.values()))
        self._batched = True  # vmapped backward; a graph with a node that cannot be vmapped loops instead

    # ------------------------------------------------------------------ a batch

    def forward(self, x: Batch) -> Tensor:
        """Outputs to differentiate, [n, C], with their graph. Call inside `untouched`.

        Raises
        ------
        Refused
            When an output is not finite, none depends on the parameters, or the forward drew random numbers.
        """
        before = _random_state()
        out = reduce_outputs(call(self.model, x), self.outputs, count(x))
        if any(a != b for a, b in zip(before, _random_state(), strict=True)):
            raise refusal(
                f"model {type(self.model).__name__}",
                got="a forward pass that draws random numbers",
                expected="the same output at every call",
                fix="Call model.eval(), or switch off dropout, stochastic depth and sampling.",
            )
        if not (finite := torch.isfinite(out)).all():
            sample = int((~finite).nonzero()[0, 0])
            raise refusal(
                f"model {type(self.model).__name__}",
                got=f"an output that is not finite (sample {sample} of a batch of {len(out)})",
                expected="finite outputs",
                fix="Look for overflow or a division by zero on that input; a diverged network has no kernel.",
            )
        if not out.requires_grad:
            raise refusal(
                f"model {type(self.model).__name__}",
                got="outputs that depend on none of the parameters chosen",
                expected="a differentiable path from parameters to outputs",
                fix="Look for torch.no_grad or .detach() in its forward, reentrant checkpointing "
                "(use use_reentrant=False), or the choice of params.",
            )
        return out

    def batch(self, x: Batch, known: Structure) -> dict[str, Rows | Pair]:
        """Factors of every parameter for the samples of `x`; rows are flat, [n, C, entries], in the parameter's order.

        Raises
        ------
        Irregular
            When this batch's rows do not follow the established layout.
        """
        if count(x) == 1:  # some layers take another path for a batch of one
            pair = self.batch(take(x, [0, 0]), known)
            return {name: _first(factor) for name, factor in pair.items()}
        with untouched(self.model, self.params):
            n = count(x)
            out = self.forward(x)
            self.compare_alone(x, out, n // 2)
            uses = find_uses(out, self.params)
            self._same_graph(uses, known)
            basis = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
            basis = basis[:, None, :].expand(-1, n, -1)
            factors = self.factors(out, uses, known, basis, n)
            if known.fallback:
                names = list(known.fallback)
                values: dict[str, list[Tensor]] = {name: [] for name in names}
                for s in range(n):
                    for name, g in self.single(take(x, slice(s, s + 1)), names, None).items():
                        values[name].append(g)
                factors |= {name: Rows(torch.stack(g)) for name, g in values.items()}
            return factors

    def compare_alone(self, x: Batch, out: Tensor, s: int) -> None:
        """Refuse a model whose output for sample `s` is another one when the sample is evaluated alone."""
        tolerance = max(torch.finfo(t.dtype).eps for t in (out, *self.params.values())) ** 0.5
        out = out.detach()
        gap = (self.forward(take(x, slice(s, s + 1))).detach()[0] - out[s]).abs().max()
        if not gap <= tolerance * out.abs().max() + torch.finfo(out.dtype).tiny:
            raise refusal(
                f"model {type(self.model).__name__}",
                got=f"an output for one sample that changes by {gap:.2g} when the sample is evaluated alone",
                expected="the same output in every batch",
                fix="Look for layers that mix samples (batch statistics, centring over the batch); call model.eval().",
            )

    def _same_graph(self, uses: list[Use], known: Structure) -> None:
        now = by_name(uses)
        changed = [
            name for name in self.params if name not in known.fallback and now.get(name, ()) != known.uses.get(name, ())
        ]
        if changed:
            raise Irregular(dict.fromkeys(changed, "its use in the graph changes from batch to batch"))

    # ------------------------------------------------------------------ factors

    @torch.no_grad()
    def factors(self, out: Tensor, uses: list[Use], known: Structure, basis: Tensor, n: int) -> dict[str, Rows | Pair]:
        """Factors of the parameters on the fast path; basis [K, n, C] holds the K cotangents of the outputs."""
        fast = [(key, use) for key, use in numbered(uses) if use.name not in known.fallback]
        code = _Code(basis) if known.watched else None
        nodes = [use.node for _, use in fast]
        cotangents = self.backward(out, nodes, basis if code is None else code.basis)
        parts: dict[str, list[tuple[Use, Factor]]] = {}
        irregular: dict[str, str] = {}
        for key, use in fast:
            cot, owner = cotangents[use.node], known.owners[key]
            if not owner.fits(tuple(cot.shape[1:]), n):
                irregular[use.name] = "the rows of its layer do not grow with the batch"
                continue
            if code is not None:
                if not code.owned(owner.split(cot, n, lead=1)):
                    irregular[use.name] = "the rows of its layer change owners from batch to batch"
                    continue
                cot = cot[:-1]
            factor = RULES[use.node.name()](use, owner, n, cot)
            if factor is None:
                irregular[use.name] = f"no rule for this use by {use.node.name()}"
                continue
            parts.setdefault(use.name, []).append((use, factor))
        if irregular:
            raise Irregular(irregular)
        result = {name: self._merge(name, found, n, basis.shape[0]) for name, found in parts.items()}
        for name in known.unused:
            result[name] = Rows(out.new_zeros(n, basis.shape[0], self.params[name].numel()))
        return result

    def backward(self, out: Tensor, nodes: list, basis: Tensor) -> dict:
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

    def single(self, x: Batch, names: list[str], basis: Tensor | None) -> dict[str, Tensor]:
        """Plain autograd for one sample: {name: [K, entries]}; basis [K, C] (identity if None)."""
        out = self.forward(x)
        if basis is None:
            basis = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
        params = [self.params[name] for name in names]
        rows = []
        for row in basis.unbind():
            grads = torch.autograd.grad([out], params, [row[None]], retain_graph=True, allow_unused=True)
            rows.append([_dense(g, p) for g, p in zip(grads, params, strict=True)])
        return {name: torch.stack([r[j].reshape(-1) for r in rows]) for j, name in enumerate(names)}


def numbered(uses: list[Use]) -> list[tuple[tuple[str, int], Use]]:
    """Uses with a key that survives other parameters' uses coming and going: (parameter, which of its uses)."""
    seen: dict[str, int] = {}
    keyed = []
    for use in uses:
        keyed.append(((use.name, seen.get(use.name, 0)), use))
        seen[use.name] = seen.get(use.name, 0) + 1
    return keyed


def by_name(uses: list[Use]) -> dict[str, tuple]:
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


class _Code:
    """One more cotangent, each sample's scaled by a number of its own: a row that follows another is another sample's.

    With g a direction of the outputs, the backward pass of s_i g must be s_i times that of g on every row of sample i,
    and nothing else is linear in the same way: foreign rows and mixtures of samples show.
    """

    def __init__(self, basis: Tensor) -> None:
        outputs, n = basis.shape[0], basis.shape[1]
        draw = torch.Generator().manual_seed(n)
        scale = (1 + torch.rand(n, generator=draw)) * (1 - 2 * torch.randint(0, 2, (n,), generator=draw))
        self.scale = scale.to(basis)
        self.direction = (1 + torch.rand(outputs, generator=draw)).to(basis)
        combined = torch.einsum("k,knc->nc", self.direction, basis)
        self.basis = torch.cat([basis, (self.scale[:, None] * combined)[None]])

    def owned(self, cot: Tensor) -> bool:
        """Whether cotangents [n, K + 1, ...] (the coded one last) belong to the samples they are said to."""
        plain = torch.einsum("k,nk...->n...", self.direction, cot[:, :-1])
        expected = self.scale.reshape(-1, *(1,) * (plain.dim() - 1)) * plain
        error = (cot[:, -1] - expected).abs().max() if plain.numel() else plain.sum()
        peak = cot.abs().max() if cot.numel() else error
        return bool(error <= torch.finfo(cot.dtype).eps ** 0.5 * peak)


def _dense(grad: Tensor | None, parameter: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(parameter)
    return grad.to_dense() if grad.is_sparse else grad


def _first(factor: Rows | Pair) -> Rows | Pair:
    if isinstance(factor, Rows):
        return Rows(factor.values[:1])
    return replace(factor, data=factor.data[:1], cotangent=factor.cotangent[:1])


def _random_state() -> tuple[bytes, object, bytes, int]:
    """State of the generators a forward pass on the CPU could draw from."""
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 (looked at, not used)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy["key"].tobytes(), numpy["pos"]
