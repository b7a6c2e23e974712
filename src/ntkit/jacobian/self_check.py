"""Before the first result on a model: determine which sample owns which rows, and compare with plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, different_samples, has_infinity, take
from ntkit.base.batch import kind as kind_of
from ntkit.base.checks import refusal
from ntkit.jacobian.factors import Gradients
from ntkit.jacobian.graph import (
    Use,
    cotangent_shape,
    find_uses,
    nodes_behind,
    nodes_from,
    own_functions,
    precisions_of,
    shapes_of,
    signatures_of,
    sizes_of,
    with_keys,
)
from ntkit.jacobian.model_calls import hooks, untouched, unwritten, without_fused_rnn
from ntkit.jacobian.model_outputs import refuse_infinite_input
from ntkit.jacobian.ownership import establish
from ntkit.jacobian.pairs import Convolved, Pair, Pairs, Whole
from ntkit.jacobian.rules import RULES
from ntkit.jacobian.structure import PROBE, ExpectedGraph, Irregular, Part, SelfCheckError, Size, Structure

_FUSED_RNN = ("MkldnnRnnLayer", "CudnnRnn", "MiopenRnn")

# Nodes that can move rows depending on data or on the batch's size: behind them the owners of rows are checked in every
# batch.
_MOVERS = ("Index", "Gather", "Scatter", "Sort", "Topk", "Masked", "Flip", "Roll", "Take", "Unique", "Nonzero")


def structure_of(gradients: Gradients, x: Batch, irregular: Mapping[str, str], unseen: bool = False) -> Structure:
    """Establish, once per graph, the structure of the model on inputs like `x`.

    Parameters
    ----------
    gradients : model, parameters, outputs.
    x : the samples at hand; up to three different ones are tried.
    irregular : parameters structure to have no regular rows, and why: they go to the fallback.
    unseen : whether the structure of the last samples of these shapes may be returned without looking at the graph,
        because `Gradients.batch` will compare the whole graph of its samples with the expected one.

    Raises
    ------
    Refused
        When the samples of a batch mix, the forward is random, or the outputs are not usable.
    SelfCheckError
        When a parameter's gradient differs from plain autograd.
    Irregular
        When more parameters than `irregular` have no regular rows.
    """
    kind = kind_of(x)
    structure = gradients.by_shape.get(kind)
    if unseen and structure is not None and structure.expected is not None and structure.covers(count(x)):
        return structure
    with untouched(gradients.model, gradients.params):
        with nullcontext() if kind in gradients.by_shape else unwritten(gradients.model):
            first = gradients.forward(take(x, [0, 0]))
        nodes = nodes_behind(first)
        graph = tuple((node.name(), shapes_of(node)[:1]) for node in nodes)
        uses = tuple(use.signature for use in find_uses(nodes, gradients.params, set()))
        key = (graph, uses, kind)
        structure = gradients.structures.get(key)
        if structure is None or not structure.covers(count(x)):
            if any("CheckpointFunction" in node.name() for node in nodes):
                got = "a reentrant checkpoint"
                expected = "a graph that shows its parameters"
                fix = "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                raise refusal(f"model {type(gradients.model).__name__}", got=got, expected=expected, fix=fix)
            try:
                structure = _establish(gradients, x, irregular)
            except NotImplementedError as error:
                got, expected = f"an operation that has none ({error})", "a derivative for every operation"
                fix = "Replace it, or leave out the parameters before it: params=..."
                raise refusal(f"model {type(gradients.model).__name__}", got=got, expected=expected, fix=fix) from error
            gradients.structures[key] = structure
        gradients.by_shape[kind] = structure
        return structure


def _moves_rows(node: Any) -> bool:
    """Whether a node may move rows: by its name, or because it is the user's own function."""
    name = node.name()
    return any(name.startswith(mover) for mover in _MOVERS) or isinstance(
        node, torch.autograd.function.BackwardCFunction
    )


def _establish(gradients: Gradients, x: Batch, irregular: Mapping[str, str], again: bool = False) -> Structure:
    samples = different_samples(x, PROBE)
    probe = take(x, (samples * PROBE)[:PROBE])
    out = gradients.forward(probe)
    nodes = nodes_behind(out)
    plain_rnn = any(node.name().startswith(_FUSED_RNN) for node in nodes)
    if plain_rnn:
        out = gradients.forward(probe, plain_rnn)
        nodes = nodes_behind(out)
    fewer = nodes_behind(gradients.forward(take(probe, slice(0, 2)), plain_rnn))
    same_nodes = [node.name() for node in fewer] == [node.name() for node in nodes]
    uses, constant = _uses_and_constants(gradients, nodes, fewer if same_nodes else [])
    unused = set(gradients.params) - {name for use in uses for name in use.params}
    structure = Structure(out.shape[1], unused, signatures_of(uses), len(samples), plain_rnn=plain_rnn)
    if getattr(gradients.model, "one_graph", False):
        structure.together = False  # a pass of both ends sets switches of the whole process
    structure.eps = max(torch.finfo(dtype).eps for dtype in {out.dtype, *gradients.dtypes(), *precisions_of(nodes)})
    if any(not use.direct for use in uses):  # else the weight side consists of rearrangements
        structure.names, structure.constant = tuple(node.name() for node in nodes), frozenset(constant)
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, PROBE, out.shape[1], generator=generator, dtype=torch.float64).to(out)
    _compare_repeated(gradients, probe, out, structure)

    masked = torch.zeros(PROBE, PROBE, out.shape[1], dtype=out.dtype, device=out.device)
    masked[range(PROBE), range(PROBE)] = draw[0]
    ruled = [use for use in uses if use.node.name() in RULES]
    with without_fused_rnn(plain_rnn):
        cotangents = gradients.backward(out, [use.node for use in ruled], masked)
    position = {node: i for i, node in enumerate(nodes)}
    shapes = {use.node: cotangent_shape(fewer[position[use.node]]) for use in ruled} if same_nodes else {}
    _assign_owners(structure, uses, cotangents, shapes, any(_moves_rows(node) for node in nodes))
    structure.fallback |= irregular
    hooked = {name: "a gradient hook on it" for name, p in gradients.params.items() if p._backward_hooks}
    structure.fallback |= {name: reason for name, reason in hooked.items() if name not in structure.unused}
    structure.exclude(dict(structure.fallback))
    with without_fused_rnn(plain_rnn):
        factors = gradients.factors(out, uses, structure, draw, PROBE)
    structure.sizes = {name: _size(f, gradients.params[name]) for name, f in factors.items()}
    structure.sizes |= {name: Size(gradients.params[name].numel()) for name in structure.fallback}
    structure.shared = _shared(uses, structure)
    numbers = sum(t[0].numel() for t in cotangents.values())
    structure.bytes_per_sample = 2 * numbers * out.element_size() // PROBE
    floors: dict[str, Tensor] = {}
    for use in ruled:
        for name in use.params:
            floors[name] = torch.maximum(floors.get(name, out.new_zeros(())), cotangents[use.node].norm())
    elsewhere = (lambda: False) if again else lambda: _holds_elsewhere(gradients, x, samples, irregular)
    _compare(gradients, probe, out, uses, factors, draw, floors, structure, elsewhere)
    structure.expected = _expected(nodes, fewer) if same_nodes and not structure.scattered else None
    return structure


def _holds_elsewhere(gradients: Gradients, x: Batch, samples: list[int], irregular: Mapping[str, str]) -> bool:
    """Whether other samples of `x` pass the self-check alone: a kink is at a place, what is wrong is everywhere."""
    n = count(x)
    others = [i for i in torch.linspace(0, n - 1, min(n, 16)).long().tolist() if i not in samples]
    for begin in range(0, min(len(others), 3 * PROBE), PROBE):
        with suppress(SelfCheckError):
            _establish(gradients, take(x, others[begin : begin + PROBE]), irregular, again=True)
            return True
    return False


def _uses_and_constants(gradients: Gradients, nodes: list[Any], fewer: list[Any]) -> tuple[list[Use], set[int]]:
    """The uses of a graph, and the positions of nodes whose results do not grow with the batch.

    `fewer` is the graph of a smaller batch, node by node, or empty if the two differ.
    """
    constant = {
        i
        for i, (node, other) in enumerate(zip(nodes, fewer, strict=False))
        if shapes_of(node) and shapes_of(node) == shapes_of(other)
    }
    # Rows selected by data may happen to be equally many in both batches. A use that takes them in has no rule: its
    # source belongs to the data side after all.
    position = {node: i for i, node in enumerate(nodes)}
    for use in find_uses(nodes, gradients.params, constant):
        if not use.direct and use.node.name() not in RULES:
            constant -= {position[node] for node in nodes_from(use.source)}
    return find_uses(nodes, gradients.params, constant), constant


def _assign_owners(
    structure: Structure,
    uses: list[Use],
    cotangents: dict[Any, Tensor],
    shapes: dict[Any, tuple[int, ...]],
    moved: bool,
) -> None:
    """Determine the layout of every use's rows; what has none goes to the fallback, or is determined in every batch.

    `shapes` are those of the nodes in a batch of two; `moved`: whether some node may move rows.
    """
    for key, use in with_keys(uses):
        if use.node not in cotangents:
            structure.fallback |= dict.fromkeys(use.params, f"no rule for {use.node.name()}")
            continue
        cot, shape = cotangents[use.node], shapes.get(use.node)
        owner, sure = establish(cot, shape, 2) if shape is not None else (None, True)
        if owner is not None:
            structure.owners[key] = owner
            if moved or not sure:
                structure.watched.add(key)
            continue
        reason = f"rows of {use.node.name()} could not be assigned to samples"
        # rows selected by data, each reached by at most one sample
        reached = cot.flatten(2).ne(0).any(-1) if cot.dim() > 2 else cot.ne(0)
        if cot.dim() > 1 and (reached.sum(0) < 2).all() and use.direct:
            structure.scattered |= dict.fromkeys(use.params, reason)
            structure.watched.add(key)
        else:
            structure.fallback |= dict.fromkeys(use.params, reason)


def _expected(three: list[Any], two: list[Any]) -> ExpectedGraph | None:
    """The graph of any number of samples, from those of three and of two."""
    sizes = [(sizes_of(node), sizes_of(other)) for node, other in zip(three, two, strict=True)]
    if any(len(more) != len(base) for more, base in sizes):
        return None
    steps = tuple(tuple(m - b for m, b in zip(more, base, strict=True)) for more, base in sizes)
    return ExpectedGraph(tuple(node.name() for node in three), tuple(base for _, base in sizes), steps)


def _shared(uses: list[Use], structure: Structure) -> dict[str, str]:
    """Biases whose every use is by the nodes that use one factored weight: {bias: weight}.

    The gradient of such a bias is that of the weight with a data factor of ones: its kernel needs no product of its
    own.
    """
    places: dict[str, list[tuple]] = {}
    for use in uses:
        for name in use.params:
            places.setdefault(name, []).append((use.node, use.slot, use.direct))
    nodes = {name: tuple(node for node, _, _ in own) for name, own in places.items()}
    weights = {
        nodes[name]: name
        for name, own in places.items()
        if name in structure.sizes
        and len(structure.sizes[name].parts) == 1
        and structure.sizes[name].parts[0].block is None
        and all(direct for _, _, direct in own)
    }
    shared = {}
    for name, own in places.items():
        plain = all(direct and _is_bias(node, slot) for node, slot, direct in own)
        weight = weights.get(nodes[name])
        if not plain or weight is None or name not in structure.sizes or name in structure.fallback:
            continue
        size = structure.sizes[name]
        if not size.parts and size.entries == structure.sizes[weight].parts[0].cotangent:
            shared[name] = weight
    return shared


def _is_bias(node: Any, slot: int) -> bool:
    if node.name() == "AddmmBackward0":
        return slot == 0 and node._saved_beta == node._saved_alpha == 1
    return node.name() == "ConvolutionBackward0" and slot == 2 and not node._saved_transposed


def _compare_repeated(gradients: Gradients, probe: Batch, out: Tensor, structure: Structure) -> None:
    """Refuse a model whose forward pass gives other outputs when it is repeated: what it remembers changes them."""
    before = [(name, buffer, buffer.detach().clone()) for name, buffer in gradients.model.named_buffers()]
    again = gradients.forward(probe, structure.plain_rnn).detach()
    change = float((again - out.detach()).abs().max())
    changed = [name for name, buffer, value in before if not torch.equal(buffer, value)]
    # on a GPU, sums in another order are no sign of memory
    tolerance = 16 * structure.eps if changed else min(1e3 * structure.eps, 1e-2)
    if change > tolerance * float(out.detach().abs().max()):
        buffers = f" (it changes the buffers {', '.join(changed[:5])})" if changed else ""
        raise refusal(
            f"model {type(gradients.model).__name__}",
            got=f"outputs that change by {change:.2g} when the same forward pass is repeated{buffers}",
            expected="the same output at every call",
            fix="Call model.eval(), or fix what changes at its current value.",
        )


def _compare(
    gradients: Gradients,
    probe: Batch,
    out: Tensor,
    uses: list[Use],
    factors: dict[str, Whole],
    draw: Tensor,
    floors: dict[str, Tensor],
    structure: Structure,
    elsewhere: Callable[[], bool],
) -> None:
    """Raise unless outputs and gradients of the probe equal those of its samples taken one at a time.

    PyTorch rounds a batch of one otherwise than a larger one. Where that puts a sample on two sides of a kink (of a
    ReLU, of a maximum) its gradients differ, and neither is wrong: each sample is then taken among copies of itself, in
    batches of two sizes, between which gradients that depend on the size differ; and other samples must pass alone.
    Not with hooks or a user's own functions, which could mix the copies' gradients.
    """
    for s in range(PROBE):
        gradients.compare_alone(probe, out, s, structure.eps)
    wrong, mixed = _differences(gradients, probe, out, factors, draw, floors, structure, 1)
    if (wrong or mixed) and not _suspects(gradients, out):
        among = (_differences(gradients, probe, out, factors, draw, floors, structure, n) for n in (PROBE, 2 * PROBE))
        if all(found == ({}, "") for found in among) and elsewhere():
            return
    if wrong:
        _explain(gradients, probe, out, uses, draw, structure, wrong)
    if mixed:
        raise _disagreement(gradients, out, mixed, "of a batch differs from the sum over its samples")


def _differences(
    gradients: Gradients,
    probe: Batch,
    out: Tensor,
    factors: dict[str, Whole],
    draw: Tensor,
    floors: dict[str, Tensor],
    structure: Structure,
    copies: int,
) -> tuple[dict[str, str], str]:
    """What is wrong with gradients by factors, {parameter: how}; else a parameter whose samples mix, or "".

    Three ways to a gradient are compared: by factors, by plain autograd of one sample among so many copies, and by
    plain autograd of the whole batch. The second must also be linear in the cotangent, or no Jacobian exists.
    """
    eps, names = structure.eps, list(gradients.params)
    # parameter -> its gradients of single samples, summed
    of_batch = {name: out.new_zeros(p.numel(), dtype=p.dtype) for name, p in gradients.params.items()}
    bound = dict.fromkeys(names, 0.0)
    wrong: dict[str, str] = {}

    def agree(name: str, error: Tensor, own: float, whole: float) -> bool:
        # The floor is for gradients that vanish by symmetry (a bias before a normalization): what is left is the
        # rounding of a sum of cotangents, or, where these vanish already, of the outputs' own.
        floor = min(1e3 * eps, 1e-2) * (whole + float(floors.get(name, 0))) + 16 * eps * float(draw.norm())
        return bool(error.norm() <= eps**0.5 * own + floor)

    for s in range(PROBE):
        both_ways = draw[0, s] - 0.6 * draw[1, s]
        reference = gradients.plain(probe, out, s, names, torch.stack([*draw[:, s], both_ways]), copies)
        whole = float(torch.stack([g[:2].norm().to(out) for g in reference.values()]).norm())
        if not math.isfinite(whole) and has_infinity(probe):
            raise refuse_infinite_input()
        for name, (first, second, both) in reference.items():
            own = float(reference[name].norm())
            if not agree(name, both - (first - 0.6 * second), own, whole):
                raise _disagreement(gradients, out, name, "is not linear in the cotangent")
            of_batch[name] += first
            bound[name] += own
            if name in structure.fallback:
                continue
            with torch.no_grad():
                rows = factors[name].rows()[s].reshape(2, -1) if name in factors else reference[name][:0]
            if rows.shape != reference[name][:2].shape:
                wrong[name] = f"has {rows.numel() // 2} entries, not {rows.shape[1]}"
            elif not agree(name, error := rows - reference[name][:2], own, whole):
                wrong[name] = f"error {error.norm():.3g}, norm {own:.3g}"
    if wrong:
        return wrong, ""
    params = [gradients.params[name] for name in names]
    with without_fused_rnn(structure.plain_rnn):
        of_samples, whole = gradients.in_one_pass(out, params, draw[0]), max(bound.values())
    for name, gradient in zip(names, of_samples, strict=True):
        if not agree(name, gradient.reshape(-1) - of_batch[name], bound[name], whole):
            return {}, name
    return {}, ""


def _explain(
    gradients: Gradients,
    probe: Batch,
    out: Tensor,
    uses: list[Use],
    draw: Tensor,
    structure: Structure,
    wrong: dict[str, str],
) -> None:
    """Send parameters to the fallback that hooks in the forward pass alone make wrong; raise for others."""
    with without_fused_rnn(structure.plain_rnn):
        factors = gradients.factors(out, uses, structure, draw, PROBE, apart=True)
    for s in range(PROBE):
        for name, gradient in gradients.plain(probe, out, s, list(wrong), draw[:, s]).items():
            rows = factors[name].rows()[s].reshape(2, -1) if name in factors else gradient[:0]
            if rows.shape != gradient.shape or (rows - gradient).norm() > structure.eps**0.5 * gradient.norm():
                what = f"differs from plain autograd on the samples of the self-check: {wrong[name]}"
                raise _disagreement(gradients, out, name, what)
    raise Irregular(dict.fromkeys(wrong, "a gradient hook on a value in the forward pass"))


def _suspects(gradients: Gradients, out: Tensor) -> list[str]:
    """What of the user's may change gradients on their way back: hooks, and functions with a backward of their own."""
    return [*hooks(gradients.model), *own_functions(nodes_behind(out))]


def _disagreement(gradients: Gradients, out: Tensor, name: str, what: str) -> Exception:
    """The refusal of gradients that hooks or the user's own functions change; where there are none, our own error."""
    if suspects := _suspects(gradients, out):
        return refusal(
            f"parameter '{name}'",
            got=f"a gradient that {what}",
            expected="a gradient that is linear in the cotangent, and for each sample its own",
            fix=f"Remove what changes gradients on their way back: {', '.join(suspects[:5])}.",
        )
    return SelfCheckError(
        f"gradient of parameter '{name}' {what}. No kernel was computed. Leave it out with params=..., and "
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
