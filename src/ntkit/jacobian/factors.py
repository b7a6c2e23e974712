"""Per-sample gradients of a model in factors: one forward pass, one batched backward pass, one rule per use.

No weight gradient is formed here unless its factors would be larger. What has no rule goes through plain autograd, one
sample at a time: slow, but exact. `jacobian.self_check` establishes, once per graph, who owns which rows, and compares
a few samples with plain autograd, before the first result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ntkit.base.batch import Batch, count, take
from ntkit.base.checks import refusal
from ntkit.jacobian.backward_passes import batched_products, dense, looped_products, vector_jacobian_products
from ntkit.jacobian.graph import (
    Use,
    correct_norms,
    ends_process,
    find_uses,
    nodes_behind,
    results_of,
    shapes_of,
    signatures_of,
    sizes_of,
    with_keys,
)
from ntkit.jacobian.model_calls import Outputs, call, drew, random_forward, untouched, without_fused_rnn
from ntkit.jacobian.model_outputs import check_finite_outputs, picked, reduce_outputs
from ntkit.jacobian.ownership import Code, Owner
from ntkit.jacobian.pairs import Convolved, Factor, Pair, Pairs, Rows, Whole, comparable, widened
from ntkit.jacobian.rules import RULES
from ntkit.jacobian.structure import Irregular, Structure

_ALONE = 1024  # samples from one check of a sample alone to the next


class Gradients:
    """Per-sample gradients of a model's outputs, [n, C, P] in factors.

    Parameters
    ----------
    model : any module; used as it is, never changed.
    params : parameter by name.
    outputs : "full", "diagonal", "trace", "sum" or a callable (see `ntkit.TangentKernel`).
    select : a function that picks a part of the model's output, or None.
    """

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], outputs: Outputs, select: Any = None) -> None:
        self.model, self.params, self.outputs, self.select = model, params, outputs, select
        # what `jacobian.self_check` established, by the signature of the graph
        self.structures: dict[tuple, Structure] = {}
        self.by_shape: dict[tuple, Structure] = {}  # the last one used, by the shapes of the samples
        # rows and results are in the widest precision of the parameters
        self.dtype = reduce(torch.promote_types, (p.dtype for p in params.values()))
        self._kinds = _kinds(params)
        self._batched = True  # vmapped backward; a graph with a node that cannot be vmapped loops instead
        self._checked: dict[int, int] = {}  # batch size -> samples since one of them was last evaluated alone

    def current(self, params: dict[str, nn.Parameter]) -> bool:
        """Whether these are its parameters, neither converted nor moved to another device since."""
        return _kinds(params) == self._kinds

    def dtypes(self) -> set[torch.dtype]:
        """Precisions of the parameters."""
        return {p.dtype for p in self.params.values()}

    # ------------------------------------------------------------------ a batch

    def forward(self, x: Batch, plain_rnn: bool = False, watch: bool = True) -> Tensor:
        """Outputs to differentiate, [n, C], with their graph. Call inside `untouched`.

        ``plain_rnn``: recurrent layers step by step instead of fused, so that the graph shows their parameters.
        ``watch``: check at once whether random numbers were drawn; `untouched` checks at its end.

        Raises
        ------
        Refused
            When an output is not finite, none depends on the parameters, or the forward drew random numbers.
        """
        with without_fused_rnn(plain_rnn):
            out = reduce_outputs(picked(call(self.model, x), self.select), self.outputs, count(x))
        if watch and drew():
            raise random_forward(self.model)
        check_finite_outputs(self.model, out)
        if not out.requires_grad:
            raise refusal(
                f"model {type(self.model).__name__}",
                got="outputs that depend on none of the selected parameters",
                expected="a differentiable path from parameters to outputs",
                fix="Look for torch.no_grad or .detach() in its forward, reentrant checkpointing "
                "(use use_reentrant=False), or the choice of params.",
            )
        correct_norms(out)
        return out

    def batch(self, x: Batch, structure: Structure, cotangents: Tensor | None = None) -> dict[str, Whole]:
        """Factors of every parameter for the samples of `x`, in the parameter's own layout.

        ``cotangents`` [K, n, C] of the outputs; by default each output's own, K = C.

        Raises
        ------
        Irregular
            When this batch's rows do not follow the established layout.
        """
        with self.at_work(structure):
            return self.one_batch(x, structure, cotangents, self.due(count(x)))

    @contextmanager
    def at_work(self, structure: Structure) -> Iterator[None]:
        """Around batches: the model is left as it was."""
        try:
            with untouched(self.model, self.params), without_fused_rnn(structure.plain_rnn):
                yield
        except BaseException:
            self._checked.clear()  # those that were due may not have been evaluated
            raise

    def due(self, n: int) -> bool:
        """Whether the next batch of n samples has one of them evaluated alone: some may mix in large batches only."""
        since = self._checked.get(n, _ALONE) + n
        self._checked[n] = 0 if since > _ALONE else since
        return since > _ALONE

    def one_batch(self, x: Batch, structure: Structure, cotangents: Tensor | None, alone: bool) -> dict[str, Whole]:
        """`batch`, inside `at_work`; ``alone``: whether one of the samples is evaluated alone, too."""
        if count(x) == 1:  # some layers take another path for a batch of one
            twice = None if cotangents is None else cotangents[:, [0, 0]]
            pair = self.one_batch(take(x, [0, 0]), structure, twice, alone)
            return {name: factor.first() for name, factor in pair.items()}
        n = count(x)
        out = self.forward(x, structure.plain_rnn, watch=False)
        nodes = nodes_behind(out)
        names = tuple(node.name() for node in nodes)
        if structure.expected is not None and not self._as_expected(x, structure, nodes, n):
            structure.expected = None  # from now on the graph of every call is looked at
            raise Irregular({})
        if alone:
            for s in {0, n // 2}:  # one alone may be the one that the others are mixed with
                self.compare_alone(x, out, s, structure.eps)
        constant = structure.constant if names == structure.names else ()
        uses = find_uses(nodes, self.params, set(constant))
        self._same_graph(uses, structure)
        if cotangents is None:
            basis = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)[:, None, :].expand(-1, n, -1)
        else:
            basis = cotangents.to(out)
        factors = self.factors(out, uses, structure, basis, n)
        if structure.fallback:
            names = list(structure.fallback)
            values: dict[str, list[Tensor]] = {name: [] for name in names}
            for s in range(n):
                for name, g in self.plain(x, out, s, names, basis[:, s]).items():
                    values[name].append(g)
            factors |= {name: Rows(torch.stack(g)) for name, g in values.items()}
        return factors

    def _as_expected(self, x: Batch, structure: Structure, nodes: list, n: int) -> bool:
        """Whether the graph of a batch is the one established, and not one that only happens to have its shapes."""
        expected = structure.expected
        assert expected is not None
        few = expected.size_that_tells(n)
        graphs = [(n, nodes)]
        if few != n:
            graphs.append((few, nodes_behind(self.forward(take(x, [0] * few), structure.plain_rnn))))
        return all(
            expected.fits(tuple(node.name() for node in graph), [sizes_of(node) for node in graph], m)
            for m, graph in graphs
        )

    def compare_alone(self, x: Batch, out: Tensor, s: int, eps: float) -> None:
        """Refuse a model whose output for sample `s` is another one when the sample is evaluated alone.

        ``eps``: rounding of the coarsest precision anywhere in the graph.
        """
        tolerance = eps**0.5
        out, alone = out.detach(), self.forward(take(x, slice(s, s + 1)))
        gap = (alone.detach()[0] - out[s]).abs().max()
        if gap <= tolerance * out.abs().max() + torch.finfo(out.dtype).tiny:
            return
        # Outputs that vanish by symmetry are nothing but rounding: of terms as large as a parameter times its gradient.
        params = list(self.params.values())
        grads = torch.autograd.grad(alone.sum(), params, allow_unused=True)
        terms = max(float((g * p.detach()).abs().sum()) for g, p in zip(grads, params, strict=True) if g is not None)
        if not gap <= tolerance**2 * 1e3 * terms:
            got = f"an output for one sample that changes by {gap:.2g} when the sample is evaluated alone"
            expected = "the same output in every batch"
            fix = "Look for layers that mix samples (batch statistics, centering over the batch); call model.eval()."
            raise refusal(f"model {type(self.model).__name__}", got=got, expected=expected, fix=fix)

    def _same_graph(self, uses: list[Use], structure: Structure) -> None:
        now = signatures_of(uses)
        changed = {
            name
            for name in self.params
            if name not in structure.fallback and now.get(name, ()) != structure.signatures.get(name, ())
        }
        if structure.scattered:
            for name in structure.unused & changed:  # an expert that no sample was handed to before
                structure.scattered[name] = "handed to no sample of the self-check"
                structure.unused.discard(name)
            changed -= structure.scattered.keys()
        if changed:
            raise Irregular(dict.fromkeys(changed, "its use in the graph changes from batch to batch"))

    # ------------------------------------------------------------------ factors

    @torch.no_grad()
    def factors(
        self, out: Tensor, uses: list[Use], structure: Structure, basis: Tensor, n: int, apart: bool = False
    ) -> dict[str, Whole]:
        """Factors of the parameters on the fast path; basis [K, n, C] holds the K cotangents of the outputs.

        ``apart``: a backward pass for each use, which takes in hooks on intermediate values. (In a common pass PyTorch
        returns the gradient of a value before its hooks, if the pass goes on from there.)
        """
        fast = [(key, use) for key, use in with_keys(uses) if not structure.fallback.keys() & set(use.params)]
        code = Code(basis, structure.eps) if structure.watched else None
        nodes = [use.node for _, use in fast]
        coded = basis if code is None else code.basis
        passes = [[node] for node in nodes] if apart else [nodes]
        cotangents = {node: cot for own in passes for node, cot in self.backward(out, own, coded).items()}
        parts: dict[str, list[Factor]] = {}
        irregular: dict[str, str] = {}
        for key, use in fast:
            cot = cotangents[use.node]
            if cot.is_complex():  # a complex product's gradient takes conjugates, which the rules do not
                irregular |= dict.fromkeys(use.params, f"complex numbers in {use.node.name()}")
                continue
            loose = not structure.scattered.keys().isdisjoint(use.params)
            owner = code.assign(cot) if loose and code is not None else structure.owners.get(key)
            if owner is None:
                irregular |= dict.fromkeys(use.params, "the rows of its layer belong to no single sample")
                continue
            if isinstance(owner, Owner):
                if not owner.fits(tuple(cot.shape[1:]), n):
                    irregular |= dict.fromkeys(use.params, "the rows of its layer do not grow with the batch")
                    continue
                if code is not None and key in structure.watched and not code.owned(owner.split(cot, n, lead=1)):
                    irregular |= dict.fromkeys(use.params, "the rows of its layer change owners from batch to batch")
                    continue
            cot = cot if code is None else cot[:-1]
            factor = RULES[use.node.name()](use, owner, n, cot)
            if factor is None:
                irregular |= dict.fromkeys(use.params, f"no rule for this use by {use.node.name()}")
                continue
            factor = widened(factor, self.dtype)
            if loose and not isinstance(factor, Rows):
                factor = Rows(factor.rows())  # another number of positions in every batch
            for name, own in self._in_place(key, use, factor, structure).items():
                parts.setdefault(name, []).append(own)
        if irregular:
            raise Irregular(irregular)
        result = {name: self._merged(name, uses_of) for name, uses_of in parts.items()}
        for name in structure.unused | structure.scattered.keys() - result.keys() - structure.fallback.keys():
            result[name] = Rows(out.new_zeros(n, basis.shape[0], self.params[name].numel()))
        return result

    def _in_place(self, key: tuple, use: Use, factor: Factor, structure: Structure) -> dict[str, Factor]:
        """From the source as the node sees it to the parameters behind it: by relabeling, or through autograd."""
        if not use.direct or (use.chain and isinstance(factor, Rows)):
            return self._pulled_back(use, factor.rows())
        (name,) = use.params
        if isinstance(factor, Rows) or not use.chain:
            return {name: factor}
        if key not in structure.places:
            structure.places[key] = self.place(use, factor) if isinstance(factor, Pair) else None
        place = structure.places[key]
        if place is None or not isinstance(factor, Pair):
            return self._pulled_back(use, factor.rows())
        return {name: factor.placed(place)}

    def place(self, use: Use, factor: Pair) -> tuple[bool, tuple[int, int] | None] | None:
        """Where a factored gradient of a rearranged parameter belongs in it, determined by numbering its entries."""
        (name,) = use.params
        parameter = self.params[name]
        chain = [
            node.split("Backward")[0] for node in use.chain or () if not node.startswith(("Alias", "Clone", "ToCopy"))
        ]
        if not chain:
            return False, None
        if chain in (["T"], ["Transpose"]) and parameter.dim() == 2:
            return True, None
        if any(node.startswith("ToCopy") for node in use.chain or ()) or parameter.dtype not in (
            torch.float32,
            torch.float64,
        ):
            return None  # their numbers cannot count that far
        number = torch.arange(factor.l * factor.r, device=parameter.device)
        digits = torch.stack([number // 4096, number % 4096, torch.ones_like(number)]).to(parameter.dtype)
        high, low, reached = self._pulled_back(use, digits[:, None])[name].rows()[:, 0].long()
        at = reached.nonzero()[:, 0]
        where = torch.empty_like(number).index_copy_(0, (high * 4096 + low)[at], at).view(factor.l, factor.r)
        offset = int(where[0, 0])
        down = int(where[1, 0]) - offset if factor.l > 1 else 0
        along = int(where[0, 1]) - offset if factor.r > 1 else 0
        width = parameter.numel() // parameter.shape[0]
        for turned, across, step in ((False, down, along), (True, along, down)):
            rows, columns = (factor.r, factor.l) if turned else (factor.l, factor.r)
            if (rows > 1 and across != width) or (columns > 1 and step != 1) or offset % width + columns > width:
                continue
            i, j = torch.arange(factor.l, device=at.device)[:, None], torch.arange(factor.r, device=at.device)
            grid = offset + (j * width + i if turned else i * width + j)
            if torch.equal(grid, where):
                return turned, None if rows * columns == parameter.numel() else divmod(offset, width)
        return None

    def _pulled_back(self, use: Use, values: Tensor) -> dict[str, Factor]:
        """Entries [n, K, source] through the weight side's own derivative to every parameter behind the source."""
        n, outputs = values.shape[:2]
        params = [self.params[name] for name in use.params]
        flat = values.reshape(n * outputs, *use.shape)
        edge = [GradientEdge(use.source, use.number)]
        grads = vector_jacobian_products(edge, params, [flat])
        return {
            name: Rows(flat.new_zeros(n, outputs, p.numel()) if g is None else g.reshape(n, outputs, -1))
            for name, p, g in zip(use.params, params, grads, strict=True)
        }

    def _merged(self, name: str, uses: list[Factor]) -> Whole:
        """Sum a parameter's uses. Pairs of one kind are joined along positions, so cross terms come by themselves."""
        if len(uses) == 1 and isinstance(uses[0], (Rows, Convolved)):
            return uses[0]
        if any(isinstance(f, Rows) or (isinstance(f, Convolved) and f.groups > 1) for f in uses):
            return Rows(sum((self._merged(name, [f]).rows() for f in uses[1:]), self._merged(name, uses[:1]).rows()))
        kinds: dict[tuple, list[Pair]] = {}
        for factor in uses:
            pair = factor.pair() if isinstance(factor, Convolved) else factor
            assert isinstance(pair, Pair)
            kinds.setdefault((pair.l, pair.r, pair.block, pair.data_left, pair.data.dtype), []).append(pair)
        joined = tuple(
            p[0]
            if len(p) == 1
            else replace(p[0], left=torch.cat([q.left for q in p], 2), right=torch.cat([q.right for q in p], 2))
            for p in kinds.values()
        )
        parameter = self.params[name]
        rows = joined[0].l if joined[0].block is None else parameter.shape[0]
        whole = Pairs(joined, (rows, parameter.numel() // rows))
        if any(comparable(p, q) is None for p in joined for q in joined):
            return Rows(whole.rows())
        return whole

    def backward(self, out: Tensor, nodes: list, basis: Tensor) -> dict:
        """Cotangents [K, *`cotangent_shape`] of every node for K cotangents of the outputs [K, n, C]."""
        unique = list(dict.fromkeys(nodes))
        edges = [GradientEdge(node, i) for node in unique for i in range(results_of(node))]
        if not edges:
            return {}
        grads: tuple[Tensor | None, ...] | None = None
        if self._batched and basis.shape[0] > 1:
            try:
                grads = batched_products([out], edges, [basis])
            except RuntimeError:
                self._batched = False
        if grads is None:
            grads = looped_products([out], edges, [basis])
        found: dict[Any, list[Tensor]] = {}
        for edge, grad in zip(edges, grads, strict=True):
            shape = basis.shape[:1] + shapes_of(edge.node)[edge.output_nr]
            found.setdefault(edge.node, []).append(out.new_zeros(shape) if grad is None else grad)
        return {node: parts[0] if len(parts) == 1 else torch.cat(parts, -1) for node, parts in found.items()}

    def plain(
        self, x: Batch, out: Tensor, s: int, names: list[str], basis: Tensor, copies: int = 1
    ) -> dict[str, Tensor]:
        """Plain autograd for sample `s` of a batch: {name: [K, entries]}; basis [K, C].

        The sample is evaluated alone, or as number `s` of so many copies of it; a `Secant` in its batch, since of
        several exact secants it is another one alone.
        """
        if getattr(self.model, "one_graph", False):
            params, rows = [self.params[name] for name in names], torch.zeros_like(out).expand(len(basis), *out.shape)
            rows = rows.index_put((torch.arange(len(basis)), torch.tensor(s)), basis)
            whole = [self.in_one_pass(out, params, row) for row in rows]
        else:
            whole = self._alone(take(x, [s] * copies), s % copies, names, basis)
        return {name: torch.stack([row[j].reshape(-1) for row in whole]) for j, name in enumerate(names)}

    def _alone(self, x: Batch, place: int, names: list[str], basis: Tensor) -> list[list[Tensor]]:
        out = self.forward(x)
        params = [self.params[name] for name in names]
        inputs = [GradientEdge(*node.next_functions[0]) for node in nodes_behind(out) if ends_process(node)]
        wanted: list[Any] = [*params, *inputs]
        rows = []
        for row in basis.unbind():
            cotangent = torch.zeros_like(out)
            cotangent[place] = row
            grads = torch.autograd.grad([out], wanted, [cotangent], retain_graph=True, allow_unused=True)
            rows.append([dense(g, p) for g, p in zip(grads, params, strict=False)])
        return rows

    def in_one_pass(self, out: Tensor, params: list[nn.Parameter], cotangent: Tensor) -> list[Tensor]:
        """Plain autograd of a whole batch: gradients of the sum of its outputs, weighted by a cotangent [n, C]."""
        grads = torch.autograd.grad([out], params, [cotangent], retain_graph=True, allow_unused=True)
        return [dense(g, p) for g, p in zip(grads, params, strict=True)]


def _kinds(params: dict[str, nn.Parameter]) -> list[tuple]:
    return [(name, id(p), p.dtype, p.device, tuple(p._backward_hooks or ())) for name, p in params.items()]
