"""Before the first result on a model: find out who owns which rows, and compare a few samples with plain autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, leaves, take
from ntkit.base.checks import refusal
from ntkit.jacobian.factors import Gradients, looks_of, numbered
from ntkit.jacobian.graph import Use, find_uses, nodes_behind, nodes_from, shapes_of, sizes_of
from ntkit.jacobian.model_calls import untouched
from ntkit.jacobian.ownership import establish
from ntkit.jacobian.pairs import Convolved, Pair, Pairs, Whole
from ntkit.jacobian.rules import RULES
from ntkit.jacobian.structure import PROBE, Expected, Part, SelfCheckError, Size, Structure

# Nodes that can move rows depending on data or on the batch's size: behind them each batch checks who owns what.
_FUSED_RNN = ("MkldnnRnnLayer", "CudnnRnn", "MiopenRnn")

_MOVERS = ("Index", "Gather", "Scatter", "Sort", "Topk", "Masked", "Flip", "Roll", "Take", "Unique", "Nonzero")


def structure_of(gradients: Gradients, x: Batch, irregular: Mapping[str, str], unseen: bool = False) -> Structure:
    """Establish (once per graph) and return what is known of the model's graph on inputs like `x`.

    Parameters
    ----------
    gradients : model, parameters, outputs.
    x : the samples at hand; up to three different ones are tried.
    irregular : parameters known to have no regular rows, and why: they go to the fallback.
    unseen : whether what held for the last samples of these shapes may be returned without a look at the graph, when
        `Gradients.batch` is to compare the whole graph of its samples with the one expected.

    Raises
    ------
    Refused
        When the samples of a batch mix, the forward is random, or the outputs are not usable.
    SelfCheckError
        When a parameter's gradient differs from plain autograd.
    Irregular
        When more parameters than `irregular` have no regular rows.
    """
    kind = tuple((t.dtype, t.shape[1:]) for t in leaves(x))
    known = gradients.usual.get(kind)
    if unseen and known is not None and known.expected is not None and known.covers(count(x)):
        return known
    with untouched(gradients.model, gradients.params):
        first = gradients.forward(take(x, [0, 0]))
        nodes = nodes_behind(first)
        look = tuple((node.name(), shapes_of(node)[:1]) for node in nodes)
        uses = tuple(use.look for use in find_uses(nodes, gradients.params, set()))
        key = (look, uses, kind)
        known = gradients.structures.get(key)
        if known is None or not known.covers(count(x)):
            if any("CheckpointFunction" in node.name() for node in nodes):
                raise refusal(
                    f"model {type(gradients.model).__name__}",
                    got="a reentrant checkpoint",
                    expected="a graph that shows its parameters",
                    fix="Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
                )
            known = _establish(gradients, x, irregular)
            gradients.structures[key] = known
        gradients.usual[kind] = known
        return known


def _moves_rows(node: Any) -> bool:
    """Whether a node may move rows: by its name, or because it is the user's own function."""
    name = node.name()
    return any(name.startswith(mover) for mover in _MOVERS) or isinstance(
        node, torch.autograd.function.BackwardCFunction
    )


def _different_samples(x: Batch) -> list[int]:
    """Up to three samples that differ from each other: equal ones could not show that samples mix."""
    n = count(x)
    candidates = dict.fromkeys([0, n // 2, n - 1, *torch.linspace(0, n - 1, min(n, 16)).long().tolist()])
    chosen: list[int] = []
    for i in candidates:
        if all(any(not torch.equal(t[i], t[j]) for t in leaves(x)) for j in chosen):
            chosen.append(i)
        if len(chosen) == PROBE:
            break
    return chosen


def _establish(gradients: Gradients, x: Batch, irregular: Mapping[str, str]) -> Structure:
    chosen = _different_samples(x)
    probe = take(x, (chosen * PROBE)[:PROBE])
    out = gradients.forward(probe)
    nodes = nodes_behind(out)
    plain_rnn = any(node.name().startswith(_FUSED_RNN) for node in nodes)
    if plain_rnn:
        out = gradients.forward(probe, plain_rnn)
        nodes = nodes_behind(out)
    fewer = nodes_behind(gradients.forward(take(probe, slice(0, 2)), plain_rnn))
    names = tuple(node.name() for node in nodes)
    comparable = tuple(node.name() for node in fewer) == names
    constant = {
        i
        for i, (node, other) in enumerate(zip(nodes, fewer, strict=False))
        if comparable and shapes_of(node) and shapes_of(node) == shapes_of(other)
    }
    uses = find_uses(nodes, gradients.params, constant)
    # Rows that data chose may happen to be as many in both batches. What then takes them in is no rule's business: they
    # are the data's after all.
    position = {node: i for i, node in enumerate(nodes)}
    for use in uses:
        if not use.direct and use.node.name() not in RULES:
            constant -= {position[node] for node in nodes_from(use.source)}
    uses = find_uses(nodes, gradients.params, constant)
    unused = set(gradients.params) - {name for use in uses for name in use.params}
    known = Structure(out.shape[1], unused, looks_of(uses), len(chosen), plain_rnn=plain_rnn)
    known.eps = max(torch.finfo(dtype).eps for dtype in {out.dtype, *gradients.dtypes(), *_precisions(nodes)})
    if any(not use.direct for use in uses):  # else rearrangements are all there is on the weight side
        known.names, known.constant = names, frozenset(constant)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, PROBE, out.shape[1], generator=generator, dtype=torch.float64).to(out)

    masked = torch.zeros(PROBE, PROBE, out.shape[1], dtype=out.dtype, device=out.device)
    masked[range(PROBE), range(PROBE)] = draw[0]
    ruled = [use for use in uses if use.node.name() in RULES]
    cotangents = gradients.backward(out, [use.node for use in ruled], masked)
    moved = any(_moves_rows(node) for node in nodes)
    for key, use in numbered(uses):
        if use.node not in cotangents:
            known.fallback |= dict.fromkeys(use.params, f"no rule for {use.node.name()}")
            continue
        shape = shapes_of(fewer[position[use.node]])[0] if comparable else None
        cot = cotangents[use.node]
        owner, sure = establish(cot, shape, 2) if shape is not None else (None, True)
        if owner is not None:
            known.owners[key] = owner
            if moved or not sure:
                known.watched.add(key)
            continue
        reason = f"rows of {use.node.name()} could not be assigned to samples"
        # rows that data chose, each reached by one sample at most
        reached = cot.flatten(2).ne(0).any(-1) if cot.dim() > 2 else cot.ne(0)
        apart = cot.dim() > 1 and bool((reached.sum(0) < 2).all())
        if apart and use.direct:
            known.scattered |= dict.fromkeys(use.params, reason)
            known.watched.add(key)
        else:
            known.fallback |= dict.fromkeys(use.params, reason)
    known.fallback |= irregular
    factors = gradients.factors(out, uses, known, draw, PROBE)
    known.sizes = {name: _size(f, gradients.params[name]) for name, f in factors.items()}
    known.sizes |= {name: Size(gradients.params[name].numel()) for name in known.fallback}
    known.shared = _shared(uses, known)
    held = sum(t[0].numel() for t in cotangents.values())
    known.bytes_per_sample = 2 * held * out.element_size() // PROBE
    size = {node: t.norm() for node, t in cotangents.items()}
    floors: dict[str, Tensor] = {}
    for use in ruled:
        for name in use.params:
            floors[name] = torch.maximum(floors.get(name, out.new_zeros(())), size[use.node])
    _compare(gradients, probe, out, factors, draw, floors, known.eps)
    known.expected = _expected(nodes, fewer) if comparable and not known.scattered else None
    return known


def _expected(three: list[Any], two: list[Any]) -> Expected | None:
    """The graph of any number of samples, from those of three and of two."""
    sizes = [(sizes_of(node), sizes_of(other)) for node, other in zip(three, two, strict=True)]
    if any(len(more) != len(base) for more, base in sizes):
        return None
    steps = tuple(tuple(m - b for m, b in zip(more, base, strict=True)) for more, base in sizes)
    return Expected(tuple(node.name() for node in three), tuple(base for _, base in sizes), steps)


def _precisions(nodes: list[Any]) -> set[torch.dtype]:
    """Floating-point types of the results of nodes."""
    found = {m.dtype for node in nodes if not hasattr(node, "variable") for m in node._input_metadata}
    return {dtype for dtype in found if dtype.is_floating_point or dtype.is_complex}


def _shared(uses: list[Use], known: Structure) -> dict[str, str]:
    """Biases whose every use is by the nodes that use one factored weight: {bias: weight}.

    The bias's gradient is then the weight's with a data factor of ones, and its kernel costs no product of its own.
    """
    nodes: dict[str, list[tuple]] = {}
    for use in uses:
        for name in use.params:
            nodes.setdefault(name, []).append((use.node, use.slot, use.direct))
    weights = {
        tuple(node for node, _, _ in found): name
        for name, found in nodes.items()
        if name in known.sizes and len(known.sizes[name].parts) == 1 and known.sizes[name].parts[0].block is None
        and all(direct for _, _, direct in found)
    }  # fmt: skip
    shared = {}
    for name, found in nodes.items():
        plain = all(direct and _is_bias(node, slot) for node, slot, direct in found)
        weight = weights.get(tuple(node for node, _, _ in found))
        if not plain or weight is None or name not in known.sizes or name in known.fallback:
            continue
        size = known.sizes[name]
        if not size.parts and size.entries == known.sizes[weight].parts[0].cotangent:
            shared[name] = weight
    return shared


def _is_bias(node: Any, slot: int) -> bool:
    if node.name() == "AddmmBackward0":
        return slot == 0 and node._saved_beta == node._saved_alpha == 1
    return node.name() == "ConvolutionBackward0" and slot == 2 and not node._saved_transposed


def _compare(
    gradients: Gradients,
    probe: Batch,
    out: Tensor,
    factors: dict[str, Whole],
    draw: Tensor,
    floors: dict[str, Tensor],
    eps: float,
) -> None:
    """Raise unless outputs and gradients of the probe equal those of its samples taken one at a time."""
    for s in range(PROBE):
        gradients.compare_alone(probe, out, s)
        if not factors:
            continue
        reference = gradients.single(take(probe, slice(s, s + 1)), list(factors), draw[:, s])
        whole = torch.stack([g.norm().to(out) for g in reference.values()]).norm()
        for name, factor in factors.items():
            with torch.no_grad():
                rows = factor.rows()
            fast = rows[s].reshape(draw.shape[0], -1)
            error, own = (fast - reference[name]).norm(), reference[name].norm()
            # The floor is for gradients that vanish by symmetry (a bias before a normalisation): what is left is the
            # rounding of a sum of cotangents, or, where these vanish already, of the outputs' own.
            floor = min(1e3 * eps, 1e-2) * (whole + floors.get(name, 0)) + 16 * eps * draw.norm()
            if not error <= eps**0.5 * own + floor:
                raise SelfCheckError(
                    f"gradient of parameter '{name}' differs from plain autograd on sample {s} of the self-check: "
                    f"error {error:.3g}, norm {own:.3g}. No kernel was computed. Leave it out with params=..., and "
                    "please report the layer that uses it."
                )


def _size(factor: Whole, parameter: nn.Parameter) -> Size:
    entries = parameter.numel()
    if isinstance(factor, Convolved) and factor.groups == 1:
        return Size(entries, (Part(factor.positions, factor.l, factor.r, False, False, None),))
    if isinstance(factor, Pairs):
        return Size(entries, tuple(part_of(p) for p in factor.parts))
    return Size(entries)


def part_of(p: Pair) -> Part:
    """Shape of a pair."""
    return Part(p.positions, p.l, p.r, p.data_left, p.data.dtype == torch.int64, p.block)
