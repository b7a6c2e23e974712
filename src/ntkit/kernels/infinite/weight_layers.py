"""Reading layers with parameters: dense layers and convolutions, LayerNorm and GroupNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ntkit.kernels.infinite.activations import Rectifier
from ntkit.kernels.infinite.batch_norm import BatchNorm
from ntkit.kernels.infinite.layers import Affine, Concat, Flatten, Layer, Norm
from ntkit.kernels.infinite.position_layers import spread_out
from ntkit.kernels.infinite.tape import Op, Ref
from ntkit.kernels.infinite.tape_calls import TRANSPOSED, arguments, batch_norm_arguments, grid, pair
from ntkit.kernels.infinite.tape_reader import DerivedWeight, Reader, Weight, has_several_kernels
from ntkit.networks.initialization import NORMAL, initial_std


def affine(reader: Reader, op: Op) -> Layer:
    """A dense layer or a convolution."""
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if transposed := op.func in TRANSPOSED:
        names[5:] = "output_padding", "groups", "dilation"
    args = arguments(op, *names)
    x, weight, bias = (reader.value(args.get(name)) for name in ("input", "weight", "bias"))
    for name, part in (("weight", weight), ("bias", bias)):
        if not isinstance(part, Weight) and (part is not None or name == "weight"):
            kind = f"computed from {part.name}" if isinstance(part, DerivedWeight) else "that is not a parameter"
            raise reader.refusal(op, f"a {name} {kind}", "Use the layer's own parameter, drawn at random.")
    if not isinstance(args["input"], Ref) or isinstance(x, (Weight, DerivedWeight)):
        raise reader.refusal(op, "no input", "Check the forward.")
    groups, index, own = int(args.get("groups", 1)), args["input"].index, weight.parameter.shape[1]
    if x is not None:
        inputs = [reader.layer(x)]
    elif groups == 1:
        inputs: list[Layer] = [reader.input(index, op)]
    else:
        inputs = [reader.input(index, op, own, own * group) for group in range(groups)]
    source = inputs[0]
    shape = weight.parameter.shape
    grouped = groups > 1 and x is not None
    if grouped and (shape[0] // groups if transposed else own) > 1 and has_several_kernels(source):
        got = f"groups={groups} of channels of several kinds (branches, positions or groups before it)"
        raise reader.refusal(op, got, "Each group has a kernel of its own, which is not built. Use groups=1.")
    dims = len(shape) - 2
    reader.use(op, weight, bias)
    if dims:
        reader.check_batched(op, dims)
    if groups > 1 and transposed and (x is None or shape[0] == groups):
        got = f"groups={groups} in a transposed convolution " + ("of the input" if x is None else "of single channels")
        raise reader.refusal(op, got, "This is not built. Use groups=1.")
    kernel_size = grid(shape[2:]) or (1, 1)
    stride, dilation = (pair(args.get(k, 1), dims) for k in ("stride", "dilation"))
    padding = args.get("padding", 0)
    if padding == "same":
        padding = tuple((d * (k - 1)) // 2 for d, k in zip(dilation, kernel_size, strict=True))
    else:
        padding = pair(0 if padding == "valid" else padding, dims, 0)
    if dims == 0 and (op.out.dim() != 2 or source.size != (1, 1)):
        got = f"an input of shape {tuple(op.out.shape[:-1])} + features"
        raise reader.refusal(op, got, "Flatten or pool positions before it.")
    size = grid(op.out.shape[2:]) or (1, 1)
    laws = variances(reader, op, weight, bias, shape[0] * math.prod(shape[2:]) // groups if transposed else None)
    if transposed:
        source = spread_out(reader, op, source, stride, padding, dilation, kernel_size)  # pyrefly: ignore
        stride, padding = (1, 1), (0, 0)

    def layer_of(one: Layer) -> Layer:
        layer = Affine(size, reader.where(op), one, kernel_size, stride, padding, dilation, *laws, grouped)  # pyrefly: ignore
        # A channel that is a filter of one channel of a random field is no Gaussian; its mean over channels is known.
        return reader.add(layer, [one], own=id(layer), gaussian=x is None or groups == 1 or shape[1] > 1)

    if groups == 1 or x is not None:
        return layer_of(source)
    # each group of outputs sees channels of the input of its own: branches side by side
    parts = [layer_of(one) for one in inputs]
    return reader.add(Concat(size, reader.where(op), [(1 / groups, part) for part in parts]), parts)


def variances(
    reader: Reader, op: Op, weight: Weight, bias: Weight | None, own_fan_in: int | None
) -> tuple[float, float, float, float, str]:
    """Variances that weight and bias contribute to the covariance and to the tangent kernel; how they are known.

    own_fan_in : inputs of one output where this is not what torch takes for it: of a transposed convolution.
    """
    trained = float(weight.parameter.requires_grad)
    bias_trained = float(bias is not None and bias.parameter.requires_grad)
    if reader.stds is not None:
        w, b = reader.stds
        b = 0.0 if bias is None or b is None else b
        return w**2, b**2, w**2 * trained, b**2 * bias_trained, "as given"
    shape = weight.parameter.shape
    fan_in, fan_out = math.prod(shape[1:]), math.prod(shape) // shape[1]
    std, text = std_of(reader, op, weight, fan_in, fan_out)
    size = own_fan_in or fan_in
    weight_var, weight_ntk = size * std**2, size * weight.factor**2 * trained
    if bias is None:
        return weight_var, 0.0, weight_ntk, 0.0, text
    std, bias_text = std_of(reader, op, bias, fan_in, fan_out)
    return weight_var, std**2, weight_ntk, bias.factor**2 * bias_trained, f"{text}; bias {bias_text}"


def std_of(reader: Reader, op: Op, weight: Weight, fan_in: int, fan_out: int) -> tuple[float, str]:
    """Standard deviation of the entries as the layer uses them, and how it is known."""
    p = weight.parameter
    if weight.factor != 1 and initial_std(p, fan_in, fan_out, weight.name).name == NORMAL:
        return abs(weight.factor), NORMAL
    initial = initial_std(p.detach() * weight.factor, fan_in, fan_out, weight.name)
    if initial.mean:  # a value that all channels share: the outputs are not Gaussian with mean zero
        got = f"'{weight.name}' of mean {initial.mean:.3g}, not zero"
        raise reader.refusal(op, got, "Draw it with mean zero, or give w_std and b_std.")
    return initial.std, initial.name + (f" ± {initial.error:.2%}" if initial.error else "")


def norm(reader: Reader, op: Op) -> Layer:
    """LayerNorm over channels and positions, or GroupNorm."""
    layer_norm = op.func in (F.layer_norm, torch.layer_norm)
    args = arguments(op, "input", "normalized_shape" if layer_norm else "num_groups", "weight", "bias", "eps")
    x = reader.value(args["input"]) if isinstance(args["input"], Ref) else None
    if x is None or isinstance(x, (Weight, DerivedWeight)):
        got = "the input normalized with trained weights"
        raise reader.refusal(op, got, "Normalize the input outside the model.")
    source = reader.layer(x)
    if id(source.source if isinstance(source, Flatten) else source) not in reader.gaussian:
        got = "values that are not centered (an activation's)"
        raise reader.refusal(op, got, "Normalize before the activation, not after it.")
    shape = tuple(op.out.shape[1:])
    if layer_norm and tuple(args["normalized_shape"]) != shape:
        got = f"normalized_shape {tuple(args['normalized_shape'])} of {shape}"
        raise reader.refusal(op, got, "Normalize over channels and positions: nn.GroupNorm(1, channels).")
    if not layer_norm and shape[0] // int(args["num_groups"]) == 1 and shape[0] > 1:
        fix = "The number of channels in a group must be able to grow. Use nn.GroupNorm(1, channels)."
        raise reader.refusal(op, "one channel in a group", fix)
    if not layer_norm and int(args["num_groups"]) > 1 and isinstance(source, Flatten) and source.source.size != (1, 1):
        fix = "Use nn.GroupNorm(1, ...) there, or normalize before flattening."
        raise reader.refusal(op, "groups of flattened positions", fix)
    weight, weight_ntk = norm_parameter(reader, op, "weight", reader.value(args.get("weight")))
    _, bias_ntk = norm_parameter(reader, op, "bias", reader.value(args.get("bias")))
    per_position = layer_norm and source.size != (1, 1)
    eps = float(args.get("eps", 1e-5))
    return reader.add(
        Norm(source.size, reader.where(op), source, eps, weight**2, weight_ntk, bias_ntk, per_position), [source]
    )


def norm_parameter(reader: Reader, op: Op, name: str, weight: Any) -> tuple[float, float]:
    """The one value of a norm's weight or bias, and what its gradient contributes to the tangent kernel."""
    if weight is None:
        return 1.0, 0.0
    if not isinstance(weight, Weight):
        raise reader.refusal(op, f"a {name} that is not a parameter", "Use the layer's own parameter.")
    reader.use(op, weight)
    values = weight.parameter.detach().double() * weight.factor
    if float(values.max()) != float(values.min()) or (name == "bias" and float(values.max()) != 0):
        expected = "differs between channels" if name == "weight" else "is not zero"
        raise reader.refusal(op, f"a {name} '{weight.name}' that {expected}", "Call the norm's reset_parameters().")
    if name == "weight" and float(values.max()) == 0:
        raise reader.refusal(op, "a weight of zeros", "Its output is 0. Start from another weight.")
    return float(values.flatten()[0]), weight.factor**2 * float(weight.parameter.requires_grad)


def batch_norm(reader: Reader, op: Op, value: Callable[[Any], Any]) -> tuple[Any, BatchNorm]:
    """What is normalized by the statistics of the batch, and how; `value` finds that of an argument."""
    args = batch_norm_arguments(op)
    eps = float(args.get("eps", 1e-5))
    if not args.get("training"):
        raise reader.refusal(op, "batch norm by running statistics", "Call model.train() for those of the batch.")
    if op.out.dim() != 2:
        got = "statistics over the samples of a batch and over positions"
        raise reader.refusal(op, got, "These are not built. Use vectors and nn.BatchNorm1d, or nn.GroupNorm.")
    if eps <= 0:
        raise reader.refusal(op, f"eps={eps:g}", "In small batches the derivative is infinite. Take eps > 0.")
    weight, weight_gain = norm_parameter(reader, op, "weight", value(args.get("weight")))
    _, bias_gain = norm_parameter(reader, op, "bias", value(args.get("bias")))
    return args["input"], BatchNorm(reader.where(op), eps, weight**2, weight_gain, bias_gain, Rectifier(1.0, 1.0))
