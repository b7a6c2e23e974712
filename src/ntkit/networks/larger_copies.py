"""Copies of a network with all hidden widths multiplied by one number, whose parameters keep their variances.

A weight keeps the variance that it adds to an output: its entries have the module's std over the root of the growth of
its inputs, and its gradients count by the same number, so that the tangent kernel has a limit. The copy tends to the
limit that `ntkit.InfiniteKernel` reads off the module, where there is one in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ntkit.base.checks import Refused, refusal
from ntkit.jacobian.model_outputs import selected_as
from ntkit.networks.grown_numbers import Number, check_numbers, missing, sets_to_try, whole_numbers
from ntkit.networks.initialization import initial_std
from ntkit.networks.layer_axes import (
    CELLS,
    DENSE,
    EMBEDDINGS,
    RECURRENT,
    WEIGHTED,
    Axes,
    axes_of,
    features_axis,
    inputs_of,
    outputs_of,
    set_sizes,
)
from ntkit.networks.made_copies import check_copy, check_growth
from ntkit.networks.paired_runs import MAKE, MISFITS, Outside, check_sums, compared, copied, hooks, reached
from ntkit.networks.parametrization import NORMS, factor_of, plain

Make = Callable[[int], nn.Module]
_PARTLY = "If one layer takes the input beside hidden features, add up a layer on each of them instead."


class Law(NamedTuple):
    """How a parameter of the copy is drawn, and how its gradients count: mean + std N(0, 1), factor."""

    std: float
    mean: float
    factor: float


class LargerCopy(NamedTuple):
    """A copy of the network, the laws of its parameters, and the numbers of the user's modules that grew with it."""

    network: nn.Module
    laws: dict[str, Law]
    grown: list[Number]
    zero_rows: list[tuple[str, int]]  # embedding weights, rows that stay zero

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draw all parameters, in place."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.network.named_parameters():
            std, mean, _ = self.laws[name]
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64) if std else torch.zeros(p.shape)
            p.copy_(values.mul_(std).add_(mean))
        for name, row in self.zero_rows:
            self.network.get_parameter(name)[row] = 0


def hidden_width(model: nn.Module, example: Tensor) -> int:
    """Number of features of the narrowest hidden layer."""
    network = plain(copied(model))
    widths = [n for n in _hidden_outputs(network, _flow(network, example)).values() if n]
    if not widths:
        fix = "Only torch's own layers can grow, and a network of one weight layer is the same at every width."
        raise refusal("the model", got="no hidden layer", expected="layers whose width can grow", fix=fix)
    return min(widths)


def larger_copy(
    model: nn.Module, factor: int, example: Tensor, stds: tuple[float, float] | None = None, make: Make | None = None
) -> LargerCopy:
    """Copy of a network with its hidden widths times `factor`.

    stds : w_std and b_std of all weight layers in the NTK parametrization; None: those of the module's own values.
    make : factor -> the larger network; without it the sizes of torch's own layers are multiplied, and numbers and
        parameters of other modules that stand for a hidden width.

    Raises
    ------
    Refused
        By the layer's name, for what cannot grow, and for parameters whose growth is not clear. For a network of
        `make` that is another one or does not grow.

    Warns
    -----
    UserWarning
        For layers of `make` whose width does not grow, by the names of their parameters.
    """
    network, grown = plain(copied(model)), []
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module):
            got, expected = "a parametrized weight", "plain weights"
            raise _refused(name, module, got, expected, "Remove it with torch.nn.utils.parametrize.")
    if make is not None:
        with torch.random.fork_rng(devices=[]):
            larger = make(factor)
        if not isinstance(larger, nn.Module):
            fix = "Return the larger network."
            raise refusal("make", got=type(larger).__name__, expected="an nn.Module", fix=fix)
        like = next(network.parameters())
        larger = plain(copied(selected_as(larger, network)))
        larger = larger.to(device=like.device, dtype=like.dtype).train(network.training)
        check_copy(network, larger, example)
        widths = _hidden_outputs(network, _flow(network, example))
        if factor > 1:
            check_growth(network, larger, widths)
        check_sums(network, larger, example, set(_raw_parameters(network, set(widths.values()))))
        for p, own in zip(larger.parameters(), network.parameters(), strict=True):
            p.requires_grad_(own.requires_grad)
    else:
        larger, grown = _grown(network, factor, example)
    _statistics(network, larger)
    rows = [(name, row) for name, row in _padding(network) if not network.get_parameter(name)[row].any()]
    return LargerCopy(larger, _laws(model, network, larger, factor, stds), grown, rows)


# ---------------------------------------------------------------------- sizes


class _Flow(NamedTuple):
    """How an example passes a network: its weight layers in their order, the last of them, and the output's shape."""

    layers: dict[str, Any]
    last: set[str]
    output: tuple[int, ...]


def _known(network: nn.Module) -> dict[str, Any]:
    """Layers whose sizes are known, by name; the last layer of an attention is part of it."""
    attentions = {id(m.out_proj) for m in network.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: m
        for name, m in network.named_modules()
        if id(m) not in attentions and (isinstance(m, NORMS) or axes_of(m))
    }


@torch.enable_grad()
def _flow(network: nn.Module, example: Tensor) -> _Flow:
    network = copied(network).requires_grad_(True).eval()
    layers = {name: m for name, m in _known(network).items() if isinstance(m, WEIGHTED)}
    nodes: dict[Any, str] = {}
    starts: dict[str, list[Any]] = {}

    outside = Outside({id(p): name for name, m in layers.items() for p in m.parameters()})

    def before(name: str, layer: Any, inputs: list[Tensor]) -> None:
        starts.setdefault(name, []).extend(t.grad_fn for t in inputs)
        outside.depth += 1

    def after(name: str, layer: Any, outputs: list[Tensor]) -> None:
        nodes.update((t.grad_fn, name) for t in outputs if t.grad_fn is not None)
        outside.depth -= 1

    with hooks(layers, before, after), outside:
        output = network(example)
    if not isinstance(output, Tensor) or output.dim() > 2:
        got = type(output).__name__ if not isinstance(output, Tensor) else f"shape {tuple(output.shape[1:])} per sample"
        fix = "Wrap the model in a module that returns one vector per sample."
        raise refusal("the model's output", got=got, expected="a vector of outputs", fix=fix)
    if outside.found:
        name, got = outside.found[0], "its weights in a sum outside of the layer's call"
        fix = "Use a layer of its own, and no weight_norm or spectral_norm."
        raise _refused(name, layers[name], got, "layers that the model calls as modules", fix)
    before_others = set().union(*(reached(node, nodes) for of in starts.values() for node in of), set())
    last = reached(output.grad_fn, nodes) - before_others  # a layer may be of no use
    for name in last:
        if not isinstance(layers[name], nn.Linear):
            got, expected = "the last weight layer", "a linear layer at the end"
            raise _refused(name, layers[name], got, expected, "End with nn.Linear: its outputs do not grow.")
    sizes, outputs = [outputs_of(layers[name]) or 0 for name in last], output[0].numel()
    if sum(sizes) != outputs and set(sizes) != {outputs}:
        name = next(iter(last))
        got = f"{sizes[0]} features behind the last weight layer, for {outputs} outputs of the model"
        fix = "End with nn.Linear: the features before it grow, and a sum over them needs weights."
        raise _refused(name, layers[name], got, "the last layer's features as outputs", fix)
    return _Flow({name: layers[name] for name in starts}, last, tuple(output.shape))


def _hidden_outputs(network: nn.Module, flow: _Flow) -> dict[str, int]:
    """Widths of the layers that grow, by name."""
    widths = {}
    for name, layer in flow.layers.items():
        width = outputs_of(layer)
        if name not in flow.last and width is not None:
            widths[name] = width
    return widths


def _grown(network: nn.Module, factor: int, example: Tensor) -> tuple[nn.Module, list[Number]]:
    """The larger network, by the first way of growing numbers and parameters of the user's modules that fits."""
    flow = _flow(network, example)
    widths = set(_hidden_outputs(network, flow).values())
    raw = _raw_parameters(network, widths)
    numbers, ways = whole_numbers(network, widths), _choices(raw)
    error: Exception | None = None
    for chosen in sets_to_try(numbers, network, widths):
        for axes in ways:
            try:
                larger = _larger(network, factor, example, flow, chosen, axes)
                runs = compared(network, larger, example, set(raw))
            except (Refused, *MISFITS) as now:
                error = error or now
                continue
            if more := missing(network, larger, example, runs, chosen):
                chosen = [*chosen, *more]
                larger = _larger(network, factor, example, flow, chosen, axes)
                runs = compared(network, larger, example, set(raw))
            check_numbers(runs)
            return larger, chosen
    if isinstance(error, Refused):
        raise error
    got = f"an error when its hidden widths grow ({str(error).splitlines()[0][:160]})"
    raise refusal("the model", got=got, expected="a network whose hidden widths can grow", fix=MAKE)


def _raw_parameters(network: nn.Module, widths: set[int]) -> dict[str, list[int]]:
    """Parameters of other modules than known layers, with the axes as long as a hidden width."""
    known = {id(p) for m in _known(network).values() for p in m.parameters()}
    raw = {name: p for name, p in network.named_parameters() if id(p) not in known}
    return {name: [axis for axis, n in enumerate(p.shape) if n in widths] for name, p in raw.items()}


def _choices(raw: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """Axes of the raw parameters that grow: the last one of each that fits, or all."""
    ways = [{name: axes[-1:] for name, axes in raw.items()}, raw]
    return ways if any(len(axes) > 1 for axes in raw.values()) else ways[:1]


def _larger(
    network: nn.Module,
    factor: int,
    example: Tensor,
    flow: _Flow,
    numbers: list[Number],
    axes: dict[str, list[int]],
) -> nn.Module:
    """Multiply sizes in the order in which the example reaches the layers."""
    larger = copied(network)
    for number in numbers:
        number.grow(larger, factor)
    for name, grown in axes.items():
        p = larger.get_parameter(name)
        shape = [n * factor if axis in grown else n for axis, n in enumerate(p.shape)]
        new = _zeros(p, shape)
        for module in larger.modules():  # a parameter may have several names
            module._parameters.update((own, new) for own, q in list(module._parameters.items()) if q is p)
    layers, done, tied = _known(larger), set(), {}

    def before(name: str, layer: Any, inputs: list[Tensor]) -> None:
        expected = inputs_of(layer)
        features = None if expected is None else inputs[0].shape[features_axis(layer)]
        if name in done:
            if features != expected:
                got = f"{features} features, where an earlier call gave it {expected}"
                raise _refused(name, layer, got, "one number of features", _PARTLY)
            return
        done.add(name)
        growth = Fraction(1) if features is None else Fraction(features, expected or 1)
        if growth not in (1, factor):
            got = f"{features} features, part of which grow with the width and part of which do not"
            raise _refused(name, layer, got, "inputs that all grow, or none", _PARTLY)
        follows = outputs_of(layer) is None
        _resize(name, layer, growth, growth if follows else Fraction(1 if name in flow.last else factor), tied)

    modes = {m: m.training for m in larger.modules()}
    larger.eval()
    with hooks(layers, before, lambda *_: None), torch.enable_grad():  # without gradients torch takes shortcuts
        output = larger(example)
    for m, mode in modes.items():
        m.training = mode
    if tuple(output.shape) != flow.output:
        got = f"outputs of shape {tuple(output.shape)} instead of {flow.output}"
        raise refusal("the model", got=got, expected="outputs that do not grow", fix=MAKE)
    return copied(larger)


def _resize(name: str, layer: Any, inputs: Fraction, outputs: Fraction, tied: dict[int, nn.Parameter]) -> None:
    if isinstance(layer, nn.MultiheadAttention) and not layer._qkv_same_embed_dim:
        got, expected = f"kdim {layer.kdim}, vdim {layer.vdim}", f"embed_dim {layer.embed_dim} for all"
        raise _refused(name, layer, got, expected, MAKE)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) > 1:
        got = f"a norm over the axes {tuple(layer.normalized_shape)}"
        raise _refused(name, layer, got, "one over the features", MAKE)
    if isinstance(layer, RECURRENT) and layer.proj_size:
        raise _refused(name, layer, f"proj_size {layer.proj_size}", "none", MAKE)
    ratios = {"in": inputs, "out": outputs, "": Fraction(1)}
    changes = {}
    for what, axes in axes_of(layer).items():
        p = layer.get_parameter(what)
        changes[what] = p, [int(n * ratios[kind]) for n, kind in zip(p.shape, axes.kinds, strict=True)]
    set_sizes(layer, inputs, outputs)
    if isinstance(layer, nn.MultiheadAttention):
        set_sizes(layer.out_proj, inputs, inputs)
    for what, (p, shape) in changes.items():
        path, _, own = what.rpartition(".")
        new = tied.setdefault(id(p), _zeros(p, shape))
        if list(new.shape) != shape:
            got, expected = f"a weight shared with another layer, {list(new.shape)} there and {shape} here", "one shape"
            raise _refused(name, layer, got, expected, MAKE)
        setattr(layer.get_submodule(path), own, new)
        tied[id(new)] = new


def _zeros(p: Tensor, shape: list[int]) -> nn.Parameter:
    return nn.Parameter(p.detach().new_zeros(shape), requires_grad=p.requires_grad)


def _statistics(network: nn.Module, larger: nn.Module) -> None:
    """Give the norms of a larger network the statistics of the model's own."""
    for name, layer in _known(network).items():
        for what in ("running_mean", "running_var"):
            if (own := getattr(layer, what, None)) is None:
                continue
            new = getattr(larger.get_submodule(name), what)
            if new.shape != own.shape and bool((own != own[0]).any()):
                got = f"a {what} that differs between features"
                raise _refused(name, layer, got, "one value for all features", "Call its reset_running_stats().")
            new.copy_(own if new.shape == own.shape else own[0].expand_as(new))


def _padding(network: nn.Module) -> list[tuple[str, int]]:
    """Weights of embeddings, and their rows for padding."""
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, EMBEDDINGS)]
    return [(f"{name}.weight".lstrip("."), m.padding_idx) for name, m in layers if m.padding_idx is not None]


# ---------------------------------------------------------------------- laws


def _laws(
    model: nn.Module, network: nn.Module, larger: nn.Module, factor: int, stds: tuple[float, float] | None
) -> dict[str, Law]:
    """Laws of the larger network's parameters, from the values of the model's own."""
    known = {f"{n}.{w}".lstrip("."): (n, m, w, a) for n, m in _known(network).items() for w, a in axes_of(m).items()}
    originals = dict(model.named_modules())
    laws = {}
    _check_shared(network)
    for (name, p), new in zip(network.named_parameters(), larger.parameters(), strict=True):
        where, layer, what, axes = known.get(name, ("", None, name, Axes(("",) * p.dim())))
        ratios = [Fraction(n, o) for n, o in zip(new.shape, p.shape, strict=True)]
        if any(ratio not in (1, factor) for ratio in ratios):
            got = f"shape {tuple(new.shape)} instead of {tuple(p.shape)}"
            raise refusal(f"parameter '{name}'", got=got, expected=f"axes 1 or {factor} times as long", fix=_PARTLY)
        if layer is None and p.dim() > 1 and len([r for r in ratios if r != 1]) > 1:
            got, expected = f"a matrix that grows along several axes, {tuple(p.shape)}", "weights of torch's own layers"
            raise refusal(f"parameter '{name}'", got=got, expected=expected, fix="Write it as nn.Linear.")
        growth = 1 if axes.summed is None else ratios[axes.summed]
        values, dense = p.detach(), isinstance(layer, DENSE)
        scale = 1.0 if layer is None else factor_of(originals.get(where), what) or 1.0
        if stds is not None and dense:
            fan_in = new.numel() // new.shape[0 if axes.summed is None else 1 - axes.summed]
            fan_in //= layer.groups if axes.summed == 0 else 1  # of a transposed convolution
            std = stds[1] if "bias" in what else stds[0] / math.sqrt(fan_in)
            laws[name] = Law(std, 0.0, std)
        elif (not isinstance(layer, WEIGHTED) or _is_bias(what, p)) and bool((values == values.flatten()[0]).all()):
            laws[name] = Law(0.0, float(values.flatten()[0]), scale)
        else:
            std = _std(name, layer, values, axes) / math.sqrt(growth)
            laws[name] = Law(std, 0.0, scale / math.sqrt(growth))
    return laws


def _is_bias(what: str, p: Tensor) -> bool:
    """Whether a parameter is a bias of several entries: a constant one is the same at every width."""
    return "bias" in what and p.numel() > 1


def _check_shared(network: nn.Module) -> None:
    """Refuse a parameter over whose axes two layers sum differently: no law fits both."""
    owners: dict[int, tuple[str, int | None]] = {}
    for name, layer in _known(network).items():
        for what, axes in axes_of(layer).items():
            first, summed = owners.setdefault(id(layer.get_parameter(what)), (name, axes.summed))
            if summed != axes.summed:
                got = f"'{what}' shared with layer '{first}', which sums over another axis"
                raise _refused(name, layer, got, "weights of its own", "Give each layer weights of its own.")


def _std(name: str, layer: Any, values: Tensor, axes: Axes) -> float:
    if layer is not None and not isinstance(layer, WEIGHTED):
        got, expected = "values that differ between features", "one value for all features"
        raise refusal(f"parameter '{name}'", got=got, expected=expected, fix="Call the layer's reset_parameters().")
    fans = values.numel() // values.shape[0], values.numel() // values.shape[min(1, values.dim() - 1)]
    if isinstance(layer, (*RECURRENT, *CELLS)):
        fans = layer.hidden_size, layer.hidden_size
    elif values.dim() == 1 and (weight := dict(layer.named_parameters() if layer else ()).get("weight")) is not None:
        fans = weight[0].numel(), weight.numel() // weight.shape[1]
    if isinstance(layer, EMBEDDINGS) and layer.padding_idx is not None and not values[layer.padding_idx].any():
        values = torch.cat([values[: layer.padding_idx], values[layer.padding_idx + 1 :]])
    initial = initial_std(values, *fans, f"parameter '{name}'")
    if initial.mean:
        got, fix = f"a mean of {initial.mean:.3g}, not zero", "Draw it with mean zero, or give w_std and b_std."
        raise refusal(f"parameter '{name}'", got=got, expected="values of mean zero", fix=fix)
    return initial.std


def _refused(name: str, layer: Any, got: str, expected: str, fix: str) -> Refused:
    return refusal(f"layer '{name}' ({type(layer).__name__})", got=got, expected=expected, fix=fix)
