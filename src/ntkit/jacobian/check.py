"""Before the first result on a model: find out who owns which rows, and compare a few samples with plain autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ntkit.checks import refusal
from ntkit.jacobian.factors import Gradients, by_name, numbered
from ntkit.jacobian.graph import Use, find_uses, nodes_behind, signature
from ntkit.jacobian.inputs import Batch, count, leaves, take, untouched
from ntkit.jacobian.ownership import establish
from ntkit.jacobian.rules import RULES, Pair, Rows
from ntkit.jacobian.structure import Irregular, SelfCheckError, Size, Structure

_PROBE = 3  # samples: odd, and more than two, so that a foreign row shows

# Nodes that can move rows depending on data or on the batch's size: behind them each batch checks who owns what.
_MOVERS = ("Index", "Gather", "Scatter", "Sort", "Topk", "Masked", "Flip", "Roll", "Take", "Unique", "Nonzero")


def structure_of(gradients: Gradients, x: Batch) -> Structure:
    """Establish (once per graph) and return what is known of the model's graph on inputs like `x`.

    Parameters
    ----------
    gradients : model, parameters, outputs.
    x : the samples at hand; up to three different ones are tried.

    Raises
    ------
    Refused
        When the samples of a batch mix, the forward is random, or the outputs are not usable.
    SelfCheckError
        When a parameter's gradient differs from plain autograd.
    """
    with untouched(gradients.model, gradients.params):
        first = gradients.forward(take(x, [0, 0]))
        nodes = nodes_behind(first)
        look = tuple((node.name(), tuple(m.shape) if (m := _metadata(node)) is not None else ()) for node in nodes)
        key = (look, signature(find_uses(first, gradients.params)), tuple((t.dtype, t.shape[1:]) for t in leaves(x)))
        known = gradients.structures.get(key)
        if known is None or (known.distinct < _PROBE and count(x) > known.distinct):
            if any("CheckpointFunction" in node.name() for node in nodes):
                raise refusal(
                    f"model {type(gradients.model).__name__}",
                    got="a reentrant checkpoint",
                    expected="a graph that shows its parameters",
                    fix="Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
                )
            known = _establish(gradients, x)
            known.watched |= any(_moves_rows(node) for node in nodes)
            gradients.structures[key] = known
        return known


def _metadata(node: Any) -> Any:
    return node._input_metadata[0] if getattr(node, "_input_metadata", None) else None


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
        if len(chosen) == _PROBE:
            break
    return chosen


def _establish(gradients: Gradients, x: Batch) -> Structure:
    chosen = _different_samples(x)
    probe = take(x, (chosen * _PROBE)[:_PROBE])
    out = gradients.forward(probe)
    uses = find_uses(out, gradients.params)
    shapes_fewer = _shapes(gradients, take(probe, slice(0, 2)), uses)
    unused = set(gradients.params) - {use.name for use in uses}
    known = Structure(out.shape[1], unused, by_name(uses), len(chosen))
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, _PROBE, out.shape[1], generator=generator, dtype=torch.float64).to(out)

    masked = torch.zeros(_PROBE, _PROBE, out.shape[1], dtype=out.dtype, device=out.device)
    masked[range(_PROBE), range(_PROBE)] = draw[0]
    ruled = [use for use in uses if use.node.name() in RULES]
    cotangents = gradients.backward(out, [use.node for use in ruled], masked)
    for i, (key, use) in enumerate(numbered(uses)):
        if use.node not in cotangents:
            known.fallback[use.name] = f"no rule for {use.node.name()}"
            continue
        shape = shapes_fewer.get(i)
        owner, sure = establish(cotangents[use.node], shape, 2) if shape is not None else (None, True)
        if owner is None:
            known.fallback[use.name] = f"rows of {use.node.name()} could not be assigned to samples"
        else:
            known.owners[key] = owner
            known.watched |= not sure
    while True:
        try:
            factors = gradients.factors(out, uses, known, draw, _PROBE)
            break
        except Irregular as signal:
            known.fallback |= signal.reasons
    known.sizes = {name: _size(f, gradients.params[name]) for name, f in factors.items()}
    known.sizes |= {name: Size(0, 0, 0, gradients.params[name].numel()) for name in known.fallback}
    held = sum(t[0].numel() for t in cotangents.values())
    known.bytes_per_sample = 2 * held * out.element_size() // _PROBE
    _compare(gradients, probe, out, factors, draw)
    return known


def _shapes(gradients: Gradients, x: Batch, uses: list[Use]) -> dict[int, tuple[int, ...]]:
    """Output shapes of the same uses on another batch; empty if the graph is another one."""
    others = find_uses(gradients.forward(x), gradients.params)
    if signature(others) != signature(uses):
        return {}
    return {i: tuple(use.node._input_metadata[0].shape) for i, use in enumerate(others)}


def _compare(gradients: Gradients, probe: Batch, out: Tensor, factors: dict[str, Rows | Pair], draw: Tensor) -> None:
    """Raise unless outputs and gradients of the probe equal those of its samples taken one at a time."""
    eps = max(torch.finfo(t.dtype).eps for t in (out, *gradients.params.values()))
    for s in range(_PROBE):
        gradients.compare_alone(probe, out, s)
        if not factors:
            continue
        reference = gradients.single(take(probe, slice(s, s + 1)), list(factors), draw[:, s])
        whole = torch.stack([g.norm().to(out) for g in reference.values()]).norm()
        for name, factor in factors.items():
            fast = (factor.rows() if isinstance(factor, Pair) else factor.values)[s].reshape(draw.shape[0], -1)
            error, own = (fast - reference[name]).norm(), reference[name].norm()
            # The floor is for gradients that vanish by symmetry (a bias before a normalisation): pure rounding.
            if not error <= eps**0.5 * own + min(1e3 * eps, 1e-2) * whole:
                raise SelfCheckError(
                    f"gradient of parameter '{name}' differs from plain autograd on sample {s} of the self-check: "
                    f"error {error:.3g}, norm {own:.3g}. No kernel was computed. Leave it out with params=..., and "
                    "please report the layer that uses it."
                )


def _size(factor: Rows | Pair, parameter: nn.Parameter) -> Size:
    if isinstance(factor, Rows) or factor.groups > 1:
        return Size(0, 0, 0, parameter.numel())
    gather = factor.data.dtype == torch.int64
    return Size(factor.data.shape[1], factor.a, factor.cotangent.shape[3], parameter.numel(), gather, factor.data_first)
