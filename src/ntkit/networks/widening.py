"""The same architecture at another width, freshly drawn from the module's own initialization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ntkit.base.batch import checked
from ntkit.base.checks import Refused, refusal
from ntkit.jacobian.model_calls import call
from ntkit.networks.initialization import Initial, drawn, initial_std
from ntkit.networks.parametrization import LAYERS, NORMS, Scaled, fan_in, fan_out, plain, stds


def widened(model: nn.Module, width: int, example: Tensor, seed: int = 0) -> nn.Module:
    """Make a network of the same architecture whose hidden layers all have `width` features, at a new initialization.

    The inputs of the first weight layers and the outputs of the last stay; every other ``Linear`` has `width` outputs,
    every other convolution `width` channels; all inputs, and the features of norms, follow from what reaches them when
    `example` is passed through, which also proves the result.

    Parameters
    ----------
    model : any module with weights in ``Linear``, ``Conv1d`` and ``Conv2d``, and norms with weight 1 and bias 0. In the
        NTK parametrization (`ntkit.to_ntk_parametrization`) the result is, too: each layer keeps its w_std and b_std.
    width : features, or channels, of every hidden layer.
    example : a batch of inputs, at least one.
    seed : of the weights; the global random state is left as it was.

    Returns
    -------
    nn.Module
        A copy with the model's mode, dtype and device. Weights and biases are drawn as the model's own were
        (`initial_std`), at the new fans; in the NTK parametrization they are standard normal.

    Raises
    ------
    Refused
        By the layer's name: other layers with parameters, tied weights, grouped convolutions other than depthwise,
        norms that were trained, layers that are reached with another arrangement of features than before (a reshape
        with sizes written into the code, a sum with the input) or not at all.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [p.shape[0] for p in widened(model, 50, torch.randn(4, 3)).parameters() if p.dim() == 2]
    [50, 50, 2]
    """
    made, recipe = reshaped(model, width, example)
    redraw(made, recipe, seed)
    for name, layer in made.named_modules():
        for what in ("weight", "bias"):
            if (draw := recipe.get((name, what))) is not None and draw.factor:
                parametrize.register_parametrization(layer, what, Scaled(draw.factor))
    return made


class Draw(NamedTuple):
    """What a parameter is drawn from, and the fan in that was found at; its factor in the NTK parametrization."""

    initial: Initial
    was: int
    factor: float | None


Recipe = dict[tuple[str, str], Draw]  # by layer's name, and "weight" or "bias"


def reshaped(model: nn.Module, width: int, example: Tensor) -> tuple[nn.Module, Recipe]:
    """Give an ordinary network of the new width (see `widened`), its weights zero, and what to draw them from."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise refusal("width", got=repr(width), expected="a positive integer", fix="Give the features of a layer.")
    if not isinstance(example, Tensor):
        fix = "Wrap a model of several inputs in a module of one."
        raise refusal("example", got=type(example).__name__, expected="a tensor, samples first", fix=fix)
    own = {name: stds(layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    made = plain(model)
    layers = _layers(made)
    initials = {name: _initials(name, layer) for name, layer in layers.items() if isinstance(layer, LAYERS)}
    modes = {layer: layer.training for layer in made.modules()}
    made.eval()  # no dropout, and running statistics stay fresh
    _resize(made, layers, _reached(made, layers, example), width, example)
    for layer, mode in modes.items():
        layer.training = mode
    recipe: Recipe = {}
    for name, (was, of) in initials.items():
        w_std, b_std = own[name]
        factors = {"weight": w_std and w_std / fan_in(layers[name]) ** 0.5, "bias": b_std}
        for what, initial in of.items():
            if factor := factors[what]:
                initial = Initial(factor, "NTK parametrization")
            recipe[name, what] = Draw(initial, fan_in(layers[name]) if factors[what] else was, factors[what])
    return made, recipe


@torch.no_grad()
def redraw(made: nn.Module, recipe: Recipe, seed: int) -> None:
    """Draw the weights of a network made by `reshaped`, in place."""
    generator = torch.Generator().manual_seed(seed)
    for (name, what), draw in recipe.items():
        layer = made.get_submodule(name)
        p = getattr(layer, what)
        p.copy_(drawn(draw.initial, tuple(p.shape), fan_in(layer), fan_out(layer), draw.was, generator))


# ---------------------------------------------------------------------- what there is


def _layers(model: nn.Module) -> dict[str, Any]:
    """Layers whose sizes change, by name; refuse those that cannot."""
    found: dict[str, Any] = {}
    owners: dict[int, str] = {}
    layer: Any
    for name, layer in model.named_modules():
        where = f"layer '{name}' ({type(layer).__name__})"
        parameters = dict(layer.named_parameters(recurse=False))
        for what, p in parameters.items():
            if id(p) in owners:
                fix = "Untie them, or make the wider network yourself."
                raise refusal(where, got=f"{what} tied to {owners[id(p)]}", expected="untied weights", fix=fix)
            owners[id(p)] = f"{name}.{what}"
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and not _depthwise(layer):
            got, expected = f"{layer.groups} groups of {layer.in_channels} channels", "one group, or one per channel"
            raise refusal(where, got=got, expected=expected, fix="Make the wider network yourself.")
        if isinstance(layer, NORMS):
            start = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
            held = {what: getattr(layer, what, None) for what in start}
            if any(v is not None and not torch.all(v == start[what]) for what, v in held.items()):
                expected, fix = "weight 1, bias 0, fresh statistics", "Widen the network before it is trained."
                raise refusal(where, got="a norm that was trained", expected=expected, fix=fix)
        elif parameters and not isinstance(layer, LAYERS) and not _single(layer):
            expected = "parameters in Linear, Conv1d, Conv2d and norms only"
            got = f"parameters of its own ({', '.join(parameters)})"
            raise refusal(where, got=got, expected=expected, fix="Make the wider network yourself.")
        if isinstance(layer, (*LAYERS, *NORMS)):
            found[name] = layer
    return found


def _depthwise(layer: Any) -> bool:
    return layer.groups == layer.in_channels == layer.out_channels


def _single(layer: Any) -> bool:
    """Whether a layer has one number for all its features."""
    return isinstance(layer, nn.PReLU) and layer.num_parameters == 1


def _initials(name: str, layer: Any) -> tuple[int, dict[str, Initial]]:
    """Fan in, and what weight and bias were drawn from."""
    where = f"layer '{name}' ({type(layer).__name__})"
    present = [what for what in ("weight", "bias") if getattr(layer, what) is not None]
    i, o = fan_in(layer), fan_out(layer)
    return i, {what: initial_std(getattr(layer, what), i, o, f"{where}, {what}") for what in present}


# ---------------------------------------------------------------------- where features lie


def _feature_axis(layer: Any) -> int:
    """Axis of the features in what reaches a layer: the last, or the second for channels."""
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


def _reached(model: nn.Module, layers: dict[str, Any], example: Tensor) -> dict[str, Any]:
    """Shapes that reach each layer, the shape of the output, and which layers are first and last."""
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}
    entered: dict[str, Any] = {}
    left: dict[Any, str] = {}

    def before(name: str, layer: Any, x: Tensor) -> None:
        shapes[name].append(tuple(x.shape))
        entered.setdefault(name, x.grad_fn)

    def after(name: str, layer: Any, y: Tensor) -> None:
        if isinstance(layer, LAYERS):
            left[y.grad_fn] = name

    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        with _hooks(layers, before, after), torch.enable_grad():
            output = call(model, checked(example, "example"))
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    weighted = [name for name in layers if isinstance(layers[name], LAYERS)]
    behind = {name: _behind(entered.get(name), left) for name in weighted}
    return {
        "shapes": shapes,
        "output": tuple(output.shape),
        "first": {name for name in weighted if not behind[name]},
        "last": set(weighted) - {other for found in behind.values() for other in found},
    }


def _behind(start: Any, left: dict[Any, str]) -> set[str]:
    """Weight layers whose outputs a tensor is made of."""
    found: set[str] = set()
    seen, queue = set(), [start]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in left:
            found.add(left[node])
        queue.extend(child for child, _ in node.next_functions)
    return found


def _resize(model: nn.Module, layers: dict[str, Any], known: dict[str, Any], width: int, example: Tensor) -> None:
    """Give every layer its new sizes, in the order in which the example reaches them."""
    done: dict[str, int] = {}
    at = ""

    def before(name: str, layer: Any, x: Tensor) -> None:
        nonlocal at
        at = name
        axis, times = _feature_axis(layer), done.get(name, 0)
        done[name] = times + 1
        was, now = list(known["shapes"][name][times]), list(x.shape)
        features = now[axis]
        was[axis] = now[axis] = 0
        fixed = name in known["first"] and features != known["shapes"][name][times][axis]
        if was != now or fixed or (times and features != _features_in(layer)):
            got = f"input of shape {tuple(x.shape)}, where it was {known['shapes'][name][times]}"
            raise _cannot(name, layer, got)
        if not times:
            _set_sizes(name, layer, features, None if name in known["last"] else width)

    try:
        with _hooks(layers, before, lambda name, layer, y: None), torch.no_grad():
            output = model(example.detach().clone())
    except Refused:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        layer = layers.get(at, model)
        raise _cannot(at, layer, f"an error at or behind it ({str(error).splitlines()[0]})") from error
    if unseen := [name for name in layers if name not in done]:
        raise _cannot(unseen[0], layers[unseen[0]], "no input: the example does not reach it")
    if tuple(output.shape) != known["output"]:
        raise _cannot(at, layers[at], f"outputs of shape {tuple(output.shape)} instead of {known['output']} behind it")


def _cannot(name: str, layer: Any, got: str) -> Exception:
    return refusal(
        f"layer '{name}' ({type(layer).__name__})",
        got=got,
        expected="a network whose hidden layers can all be given another width",
        fix="Look for sizes written into its forward, or sums of hidden layers with the input.",
    )


def _features_in(layer: Any) -> int:
    return layer.weight.shape[1] * getattr(layer, "groups", 1)


def _set_sizes(name: str, layer: Any, features: int, width: int | None) -> None:
    """New empty parameters for so many input features and `width` output features (None: as many as before)."""
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
            if (kept := getattr(layer, statistic)) is not None:
                setattr(layer, statistic, kept.new_full((features,), float(statistic == "running_var")))
    for what, p in list(layer.named_parameters(recurse=False)):
        setattr(layer, what, _like(p, (features,), float(what == "weight")))


def _like(p: Tensor, shape: tuple[int, ...], value: float) -> nn.Parameter:
    return nn.Parameter(p.detach().new_full(shape, value), requires_grad=p.requires_grad)
