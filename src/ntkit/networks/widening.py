"""The same architecture at another width, with weights drawn from the module's own initialization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ntkit.base.batch import checked
from ntkit.base.caller_context import own_context
from ntkit.base.checks import Refused, refusal
from ntkit.base.numbers import as_integer
from ntkit.jacobian.model_calls import call, check_module
from ntkit.jacobian.model_outputs import Select, check_select, part_of, real_rows
from ntkit.networks.initialization import Initial, drawn, initial_std
from ntkit.networks.paired_runs import reached
from ntkit.networks.parametrization import LAYERS, NORMS, Scaled, fan_in, fan_out, odd_weights, plain, stds


@own_context()
def widened(model: nn.Module, width: int, example: Tensor, *, seed: int = 0, select: Select | None = None) -> nn.Module:
    """Network of the same architecture whose hidden layers all have `width` features, newly initialized.

    The inputs of the first weight layers and the outputs of the last do not change; every other ``Linear`` has `width`
    outputs, every other convolution `width` channels; all inputs, and the features of norms, follow from a forward pass
    of `example`, which also tests the result.

    Parameters
    ----------
    model : any module with weights in ``Linear``, ``Conv1d`` and ``Conv2d``, and norms with weight 1 and bias 0. In the
        NTK parametrization (`ntkit.to_ntk_parametrization`) the result is, too, with the w_std and b_std of each layer.
    width : features, or channels, of every hidden layer.
    example : a batch of inputs, at least one.
    seed : of the weights; the global random state does not change.
    select : the part of the model's output whose shape must stay, as for `TangentKernel`; the result returns all of it.

    Returns
    -------
    nn.Module
        A copy with the model's mode, dtype and device. Weights and biases are drawn as the model's own were
        (`initial_std`), at the new fans; in the NTK parametrization they are standard normal.

    Raises
    ------
    Refused
        With the layer's name, for other layers with parameters, tied weights, grouped convolutions (except depthwise),
        trained norms, and layers whose input has another arrangement of features than before (a reshape with constant
        sizes, a sum with the input) or that get none.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [p.shape[0] for p in widened(model, 50, torch.randn(4, 3)).parameters() if p.dim() == 2]
    [50, 50, 2]
    """
    seed = as_integer(seed, "seed", "an integer >= 0", "Any will do: it is of the weights.", least=0)
    network, recipe = reshaped(model, width, example, select)
    redraw(network, recipe, seed)
    for name, layer in network.named_modules():
        for what in ("weight", "bias"):
            if (draw := recipe.get((name, what))) is not None and draw.factor:
                parametrize.register_parametrization(layer, what, Scaled(draw.factor))
    return network


class Draw(NamedTuple):
    """Distribution of a parameter, the fan in of that distribution, and the factor in the NTK parametrization."""

    initial: Initial
    fan_in: int
    factor: float | None


Recipe = dict[tuple[str, str], Draw]  # by name of the layer, and "weight" or "bias"


def reshaped(model: nn.Module, width: int, example: Tensor, select: Select | None = None) -> tuple[nn.Module, Recipe]:
    """Ordinary network of the new width (see `widened`) with zero weights, and the distributions to draw them from."""
    width = as_integer(width, "width", "a positive integer", "Pass the features of a layer.", least=1)
    check_module(model)
    check_select(select)
    if not isinstance(example, Tensor):
        fix = "Wrap a model with several inputs in a module with one."
        raise refusal("example", got=type(example).__name__, expected="a tensor, samples first", fix=fix)
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS) and (got := odd_weights(layer)) is not None:
            expected, fix = "a weight and a bias of its own", "Build the wider network yourself."
            raise refusal(f"layer '{name}' ({type(layer).__name__})", got=got, expected=expected, fix=fix)
    ntk_stds = {name: stds(layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    network = plain(model)
    layers = _layers(network)
    initials = {name: _initials(name, layer) for name, layer in layers.items() if isinstance(layer, LAYERS)}
    modes = {layer: layer.training for layer in network.modules()}
    network.eval()  # no dropout, and running statistics do not change
    _resize(network, layers, _flow(network, layers, example, select), width, example, select)
    for layer, mode in modes.items():
        layer.training = mode
    recipe: Recipe = {}
    for name, (old_fan_in, distributions) in initials.items():
        w_std, b_std = ntk_stds[name]
        new_fan_in = fan_in(layers[name])
        factors = {"weight": w_std and w_std / new_fan_in**0.5, "bias": b_std}
        for what, initial in distributions.items():
            if factor := factors[what]:
                recipe[name, what] = Draw(Initial(factor, "NTK parametrization"), new_fan_in, factor)
            else:
                recipe[name, what] = Draw(initial, old_fan_in, factor)
    return network, recipe


@torch.no_grad()
def redraw(network: nn.Module, recipe: Recipe, seed: int) -> None:
    """Draw the weights of a network of `reshaped`, in place."""
    generator = torch.Generator().manual_seed(seed)
    for (name, what), draw in recipe.items():
        layer = network.get_submodule(name)
        p = getattr(layer, what)
        p.copy_(drawn(draw.initial, tuple(p.shape), fan_in(layer), fan_out(layer), draw.fan_in, generator))


def _layers(model: nn.Module) -> dict[str, Any]:
    """Layers whose sizes change, by name; refuse those that cannot."""
    layers: dict[str, Any] = {}
    owners: dict[int, str] = {}
    layer: Any
    for name, layer in model.named_modules():
        where = f"layer '{name}' ({type(layer).__name__})"
        parameters = dict(layer.named_parameters(recurse=False))
        single = isinstance(layer, nn.PReLU) and layer.num_parameters == 1  # one for all features
        for what, p in parameters.items():
            if id(p) in owners:
                fix = "Untie them, or build the wider network yourself."
                raise refusal(where, got=f"{what} tied to {owners[id(p)]}", expected="untied weights", fix=fix)
            owners[id(p)] = f"{name}.{what}"
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and not _depthwise(layer):
            got, expected = f"{layer.groups} groups of {layer.in_channels} channels", "one group, or one per channel"
            raise refusal(where, got=got, expected=expected, fix="Build the wider network yourself.")
        if isinstance(layer, NORMS):
            start = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
            values = {what: getattr(layer, what, None) for what in start}
            if any(v is not None and not torch.all(v == start[what]) for what, v in values.items()):
                expected, fix = "weight 1, bias 0, initial statistics", "Widen the network before it is trained."
                raise refusal(where, got="a norm that was trained", expected=expected, fix=fix)
        elif parameters and not isinstance(layer, LAYERS) and not single:
            expected = "parameters in Linear, Conv1d, Conv2d and norms only"
            got = f"parameters of its own ({', '.join(parameters)})"
            raise refusal(where, got=got, expected=expected, fix="Build the wider network yourself.")
        if isinstance(layer, (*LAYERS, *NORMS)):
            layers[name] = layer
    return layers


def _depthwise(layer: Any) -> bool:
    return layer.groups == layer.in_channels == layer.out_channels


def _initials(name: str, layer: Any) -> tuple[int, dict[str, Initial]]:
    """Fan in, and the distributions of weight and bias."""
    where = f"layer '{name}' ({type(layer).__name__})"
    present = [what for what in ("weight", "bias") if getattr(layer, what) is not None]
    i, o = fan_in(layer), fan_out(layer)
    return i, {what: initial_std(getattr(layer, what), i, o, f"{where}, {what}") for what in present}


def _feature_axis(layer: Any) -> int:
    """Axis of the features in the input of a layer: the last, or the second for channels."""
    return -1 if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) else 1


@contextmanager
def _hooks(layers: dict[str, Any], before: Any, after: Any) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(lambda m, x, n=n: before(n, m, x[0])) for n, layer in layers.items()]
    handles += [layer.register_forward_hook(lambda m, x, y, n=n: after(n, m, y)) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Flow(NamedTuple):
    """How an example passes a network: shapes at each layer's calls and of the output, first and last weight layers."""

    shapes: dict[str, list[tuple[int, ...]]]
    output: tuple[int, ...]
    first: set[str]
    last: set[str]


def _flow(model: nn.Module, layers: dict[str, Any], example: Tensor, select: Select | None) -> _Flow:
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}
    input_nodes: dict[str, Any] = {}
    output_nodes: dict[Any, str] = {}  # node of the autograd graph -> name of the layer

    def before(name: str, layer: Any, x: Tensor) -> None:
        shapes[name].append(tuple(x.shape))
        input_nodes.setdefault(name, x.grad_fn)

    def after(name: str, layer: Any, y: Tensor) -> None:
        if isinstance(layer, LAYERS):
            output_nodes[y.grad_fn] = name

    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        with _hooks(layers, before, after), torch.enable_grad():
            output = real_rows(part_of(call(model, checked(example, "example")), select), len(example))
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    weighted = [name for name in layers if isinstance(layers[name], LAYERS)]
    sources = {name: reached(input_nodes.get(name), output_nodes) for name in weighted}
    first = {name for name in weighted if not sources[name]}
    return _Flow(shapes, tuple(output.shape), first, set(weighted).difference(*sources.values()))


def _resize(
    model: nn.Module, layers: dict[str, Any], flow: _Flow, width: int, example: Tensor, select: Select | None
) -> None:
    """Give every layer its new sizes, in the order in which the example reaches them."""
    calls: dict[str, int] = {}
    at_first: dict[str, int] = {}  # features of the first call
    current = ""

    def before(name: str, layer: Any, x: Tensor) -> None:
        nonlocal current
        current = name
        axis, call_index = _feature_axis(layer), calls.get(name, 0)
        calls[name] = call_index + 1
        old = flow.shapes[name][call_index]
        old_rest, rest, features = list(old), list(x.shape), x.shape[axis]
        old_rest[axis] = rest[axis] = 0
        new_input = name in flow.first and features != old[axis]
        if old_rest != rest or new_input or features != at_first.setdefault(name, features):
            raise _cannot(name, layer, f"input of shape {tuple(x.shape)}, where it was {old}")
        if not call_index:
            _set_sizes(name, layer, features, None if name in flow.last else width)

    try:
        with _hooks(layers, before, lambda name, layer, y: None), torch.no_grad():
            output = part_of(model(example.detach().clone()), select)
    except Refused:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        layer = layers.get(current, model)
        raise _cannot(current, layer, f"an error at or after it ({str(error).splitlines()[0]})") from error
    if unused := [name for name in layers if name not in calls]:
        raise _cannot(unused[0], layers[unused[0]], "no input: the example does not reach it")
    if (shape := tuple(output.shape)) != flow.output:
        raise _cannot(current, layers[current], f"outputs of shape {shape} instead of {flow.output} after it")


def _cannot(name: str, layer: Any, got: str) -> Exception:
    return refusal(
        f"layer '{name}' ({type(layer).__name__})",
        got=got,
        expected="a network whose hidden layers can all have another width",
        fix="Look for constant sizes in its forward pass, or sums of hidden layers with the input.",
    )


def _set_sizes(name: str, layer: Any, features: int, width: int | None) -> None:
    """New constant parameters for this number of input features and `width` outputs (None: as many as before)."""
    if isinstance(layer, LAYERS):
        conv: Any = layer
        depthwise = getattr(conv, "groups", 1) > 1
        if depthwise:
            conv.groups = width = features
        outputs = width or layer.weight.shape[0]
        if isinstance(layer, nn.Linear):
            layer.in_features, layer.out_features = features, outputs
        else:
            layer.in_channels, layer.out_channels = features, outputs
        shape = (outputs, 1 if depthwise else features, *layer.weight.shape[2:])
        layer.weight = _like(layer.weight, shape, 0.0)
        if layer.bias is not None:
            layer.bias = _like(layer.bias, (outputs,), 0.0)
        return
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        if len(layer.normalized_shape) > 1:
            raise _cannot(name, layer, f"a norm over several axes, {tuple(layer.normalized_shape)}")
        layer.normalized_shape = (features,)
    elif isinstance(layer, nn.GroupNorm):
        groups = features if layer.num_groups == layer.num_channels > 1 else layer.num_groups
        if features % groups:
            raise _cannot(name, layer, f"{features} features for {groups} groups")
        layer.num_groups, layer.num_channels = groups, features
    else:
        layer.num_features = features
        for statistic in ("running_mean", "running_var"):
            if (value := getattr(layer, statistic)) is not None:
                setattr(layer, statistic, value.new_full((features,), float(statistic == "running_var")))
    for what, p in list(layer.named_parameters(recurse=False)):
        setattr(layer, what, _like(p, (features,), float(what == "weight")))


def _like(p: Tensor, shape: tuple[int, ...], value: float) -> nn.Parameter:
    return nn.Parameter(p.detach().new_full(shape, value), requires_grad=p.requires_grad)
