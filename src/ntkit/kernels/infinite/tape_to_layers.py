"""From a tape to the layers of a limit; what has none of this kind is refused by the name of its layer.

A little over 400 lines: one rule per kind of call, in one class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkit.kernels.infinite.layers import Everywhere, Flat, Graph, Layer, Norm, Pool, Source, Sum, Weights
from ntkit.kernels.infinite.tape import Op, Ref, flat, mapped, record
from ntkit.kernels.infinite.tape_calls import (
    ADVICE,
    DATA,
    DIFFERENCES,
    GENERAL,
    NEGATED,
    NORMS,
    SCALINGS,
    SUMS,
    TOTALS,
    VIEWS,
    WEIGHTED,
    elementwise,
    factor_of,
    grid,
    pair,
)
from ntkit.kernels.infinite.tape_values import Curve, Made, Reader, Weight, as_function, has_flat, no_limit
from ntkit.networks.initialization import NORMAL, initial_std


def read(model: nn.Module, x: Tensor, w_std: float | None, b_std: float | None) -> Graph:
    """Read the layers of a module off its run on a few samples.

    Raises
    ------
    Refused
        For a layer without an infinite-width limit of this kind, by its name, with the reason and what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
            raise no_limit(
                f"layer '{name}' ({type(module).__name__})",
                "statistics over a batch or over one channel",
                "a layer whose kernel depends on the two samples alone",
                "Replace it by nn.GroupNorm(1, channels) or nn.LayerNorm.",
            )
    rows = torch.cat([x[:1], x[-1:], x[:1]])
    tape = record(model, rows)
    return _Reading(model, tape, w_std, b_std).graph()


class _Reading(Reader):
    """One rule for each kind of call."""

    def graph(self) -> Graph:
        """All layers up to the output."""
        for place, op in enumerate(self.tape.ops):
            if place == 0:
                continue
            if place in self.tape.parameters:
                self.values[place] = Weight(self.tape.parameters[place], 1.0, self.tape.names[place])
                continue
            self.values[place] = self._value(place, op)
        output = self.values[self.tape.output]
        last = self.tape.ops[self.tape.output]
        if output is None or isinstance(output, (Weight, Made)):
            raise no_limit("the model's output", "a value without random weights", "a network", "Check its forward.")
        layer = self._layer(output)
        if has_flat(layer):
            raise no_limit(
                "the model's output",
                "flattened positions, whose kernels differ",
                "a vector of outputs that all have the same kernel",
                "End with a linear layer.",
            )
        if layer.size != (1, 1) or last.out.dim() > 2:
            raise no_limit(
                "the model's output",
                f"shape {tuple(last.out.shape[1:])} for a sample",
                "a vector of outputs",
                "End with a pool or nn.Flatten, and a linear layer.",
            )
        self.found.output = self.found.layers.index(layer)
        self.found.last_place = max((s.place for s in self.found.layers if isinstance(s, Source)), default=0)
        return self.found

    # ------------------------------------------------------------------ one call

    def _value(self, place: int, op: Op) -> Any:
        taken = [self.values[r.place] for r in op.refs]
        weights = [v for v in taken if isinstance(v, (Weight, Made))]
        inner = [v for v in taken if isinstance(v, (Layer, Curve))]
        if not weights and not inner:
            if op.writes:
                raise self._refuse(op, "the input changed in place", "Write it without in-place operations.")
            return None
        if op.stopped or (op.func == DATA and inner):
            raise self._refuse(
                op,
                f"{op.name} where no gradients flow (torch.no_grad, .data, or inside an autograd.Function)",
                "Freeze layers by requires_grad_(False); write activations in torch's own functions.",
            )
        if op.func in WEIGHTED and op.refs:
            return self._weighted(op)
        if op.func in NORMS:
            return self._norm(op)
        if weights and not inner and not any(v is None for v in taken):
            return self._made(op, weights)
        if op.func is F.prelu:
            return self._curve(op, inner)
        if weights:
            raise self._refuse(
                op, f"{op.name} of a parameter", "Only dense and convolution layers and affine norms are read."
            )
        if op.func in SUMS:
            return self._sum(op)
        if op.func in SCALINGS | NEGATED and len(taken) == 1 and (found := self._scaled(op)) is not None:
            return found
        if len(inner) == 1 and len(taken) == 1:
            for functions, reading in _READINGS:
                if op.func in functions:
                    return reading(self, op)
        return self._curve(op, inner)

    # ------------------------------------------------------------------ weights

    def _made(self, op: Op, weights: list[Any]) -> Any:
        only = weights[0]
        if len(weights) == 1 and isinstance(only, Weight):
            factor = factor_of(op)
            if factor is not None:
                return Weight(only.parameter, only.factor * factor, only.name)
        return Made(" and ".join(w.name for w in weights))

    def _weighted(self, op: Op) -> Layer:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, op.args, strict=False)) | op.kwargs
        x, w, b = given["input"], given["weight"], given.get("bias")
        weight, bias = (self.values[v.place] if isinstance(v, Ref) else v for v in (w, b))
        value = self.values[x.place] if isinstance(x, Ref) else x
        for part, what in ((weight, "weight"), (bias, "bias")):
            if not isinstance(part, Weight) and (part is not None or what == "weight"):
                got = f"a {what} made of {part.name}" if isinstance(part, Made) else f"a {what} that is no parameter"
                raise self._refuse(op, got, "Use the layer's own parameter, drawn at random.")
        assert isinstance(weight, Weight)
        assert bias is None or isinstance(bias, Weight)
        if not isinstance(x, Ref) or isinstance(value, (Weight, Made)):
            raise self._refuse(op, "no input", "Check the forward.")
        source = self._source(x.place, op) if value is None else self._layer(value)
        shape = weight.parameter.shape
        where = self._where(op)
        self._once(op, weight, bias)
        if len(shape) > 2:
            self._batched(op, len(shape) - 2)
        groups = int(given.get("groups", 1))
        if groups > 1 and (value is None or shape[1] == 1):
            raise self._refuse(
                op,
                f"groups={groups} " + ("on the input" if value is None else "of one channel each"),
                "Groups need widths of their own that can grow; use groups=1.",
            )
        taps = grid(shape[2:]) or (1, 1)
        dims = len(shape) - 2
        stride, dilation = (pair(given.get(k, 1), dims) for k in ("stride", "dilation"))
        padding = given.get("padding", 0)
        if padding == "same":
            before = tuple((d * (k - 1)) // 2 for d, k in zip(dilation, taps, strict=True))
        elif padding == "valid":
            before = (0, 0)
        else:
            before = pair(padding, dims, 0)
        if dims == 0 and (op.out.dim() != 2 or source.size != (1, 1)):
            raise self._refuse(
                op, f"an input of shape {tuple(op.out.shape[:-1])} + features", "Flatten or pool positions before it."
            )
        fan_in = math.prod(shape[1:])
        s, g, sb, gb, read = self._variances(op, weight, bias, fan_in, shape)
        size = grid(op.out.shape[2:]) or (1, 1)
        layer = Weights(size, where, source, taps, stride, before, dilation, s, sb, g, gb, read)  # pyrefly: ignore
        return self._add(layer, [source], own=id(layer))

    def _variances(
        self, op: Op, weight: Weight, bias: Weight | None, fan_in: int, shape: Any
    ) -> tuple[float, float, float, float, str]:
        """What weight and bias bring to the covariance, and what their gradients bring to the tangent kernel."""
        trained = float(weight.parameter.requires_grad)
        trained_bias = float(bias is not None and bias.parameter.requires_grad)
        if self.stds is not None:
            w, b = self.stds
            b = 0.0 if bias is None or b is None else b
            return w**2, w**2 * trained, b**2, b**2 * trained_bias, "as given"
        fan_out = math.prod(shape) // shape[1]
        std, read = self._std(op, weight, fan_in, fan_out)
        sb = 0.0
        if bias is not None:
            sb, of_bias = self._std(op, bias, fan_in, fan_out)
            read += f"; bias {of_bias}"
        factor = 0.0 if bias is None else bias.factor
        return fan_in * std**2, fan_in * weight.factor**2 * trained, sb**2, factor**2 * trained_bias, read

    def _std(self, op: Op, weight: Weight, fan_in: int, fan_out: int) -> tuple[float, str]:
        """Standard deviation of the entries as the layer uses them, and how it was found."""
        p = weight.parameter
        if weight.factor != 1 and initial_std(p, fan_in, fan_out, weight.name).name == NORMAL:
            return abs(weight.factor), NORMAL
        found = initial_std(p.detach() * weight.factor, fan_in, fan_out, weight.name)
        if found.mean:  # one number for all channels in common: the values are no longer Gaussian about zero
            raise self._refuse(
                op,
                f"'{weight.name}' of mean {found.mean:.3g}, not zero",
                "Draw it with mean zero, or give w_std and b_std.",
            )
        return found.std, found.name + (f" ± {found.error:.2%}" if found.error else "")

    def _norm(self, op: Op) -> Layer:
        layer_norm = op.func in (F.layer_norm, torch.layer_norm)
        names = ("input", "normalized_shape" if layer_norm else "num_groups", "weight", "bias", "eps")
        given = dict(zip(names, op.args, strict=False)) | op.kwargs
        x = given["input"]
        value = self.values[x.place] if isinstance(x, Ref) else None
        if value is None or isinstance(value, (Weight, Made)):
            raise self._refuse(
                op, "the input normalised with trained weights", "Normalise the input outside the model."
            )
        source = self._layer(value)
        if id(source) not in self.gaussian and not (isinstance(source, Flat) and id(source.source) in self.gaussian):
            raise self._refuse(
                op, "values that are not centred (an activation's)", "Normalise before the activation, not after it."
            )
        out = op.out
        channels = out.shape[1]
        whole = tuple(given.get("normalized_shape", out.shape[1:])) == tuple(out.shape[1:])
        if layer_norm and not whole:
            raise self._refuse(
                op, f"normalized_shape {tuple(given['normalized_shape'])} of {tuple(out.shape[1:])}",
                "Normalise over channels and positions: nn.GroupNorm(1, channels).",
            )  # fmt: skip
        if not layer_norm and channels // int(given["num_groups"]) == 1 and channels > 1:
            raise self._refuse(op, "one channel in a group", "Its width cannot grow: use nn.GroupNorm(1, channels).")
        gains = []
        scale = 1.0
        for key, usual in (("weight", 1.0), ("bias", 0.0)):
            found = given.get(key)
            made = self.values[found.place] if isinstance(found, Ref) else None
            if found is not None and not isinstance(made, Weight):
                raise self._refuse(op, f"a {key} that is no parameter", "Use the layer's own parameter.")
            gains.append(0.0 if made is None else made.factor**2 * float(made.parameter.requires_grad))
            if made is None:
                continue
            self._once(op, made)
            numbers = made.parameter.detach().double() * made.factor
            if float(numbers.max()) != float(numbers.min()) or (key == "bias" and float(numbers.max()) != usual):
                got = f"a {key} '{made.name}' with a number for every channel, or another one than at the start"
                raise self._refuse(op, got, "Call the norm's reset_parameters().")
            scale = float(numbers.flatten()[0]) ** 2 if key == "weight" else scale
        if scale == 0:
            raise self._refuse(op, "a weight of zeros", "Its output is 0: start from another weight.")
        eps = float(given.get("eps", 1e-5))
        by_position = layer_norm and source.size != (1, 1)
        layer = Norm(source.size, self._where(op), source, eps, scale, gains[0], gains[1], by_position)
        return self._add(layer, [source])

    # ------------------------------------------------------------------ sums and scalings

    def _sum(self, op: Op) -> Any:
        args = list(op.args)
        alpha = float(op.kwargs.get("alpha", 1))
        signs = [1.0, -alpha if op.func in DIFFERENCES else alpha]
        if op.func is torch.Tensor.__rsub__:
            signs = [-1.0, 1.0]
        values = [self.values[a.place] if isinstance(a, Ref) else a for a in args[:2]]
        if any(isinstance(v, (int, float)) and v == 0 for v in values):  # as sum() begins
            value = next(v for v in values if not isinstance(v, (int, float)))
            sign = signs[values.index(value)]
            return value if sign == 1 else self._times(op, value, sign)
        if not all(isinstance(v, (Layer, Curve)) for v in values):
            if any(v is None for v in values):
                raise self._refuse(
                    op, "the input itself added to a wide layer", "Put a weight layer on the skip: its width can grow."
                )
            return self._curve(op, [v for v in values if isinstance(v, (Layer, Curve))])
        base = [v.source if isinstance(v, Curve) else v for v in values]
        if base[0] is base[1]:
            if any(isinstance(v, Curve) and v.function for v in values):
                return self._curve(op, values)
            factors = [v.factor if isinstance(v, Curve) else 1.0 for v in values]
            return self._times(op, base[0], sum(s * f for s, f in zip(signs, factors, strict=True)))
        parts: dict[int, tuple[float, Layer]] = {}
        for sign, value in zip(signs, values, strict=True):
            layer = self._layer(value)
            for factor, term in layer.terms if isinstance(layer, Sum) else [(1.0, layer)]:
                parts[id(term)] = (parts.get(id(term), (0.0, term))[0] + sign * factor, term)
        shapes = {tuple(self.tape.ops[a.place].out.shape) for a in args[:2]}
        if len(shapes) > 1:
            raise self._refuse(op, f"shapes {sorted(shapes)}", "Add values of one shape.")
        terms = list(parts.values())
        for i, (_, one) in enumerate(terms):
            for _, two in terms[:i]:
                self._uncorrelated(op, one, two)
        return self._add(Sum(terms[0][1].size, self._where(op), terms), [t for _, t in terms])

    def _scaled(self, op: Op) -> Curve | None:
        factor = factor_of(op)
        return None if factor is None else self._times(op, self.values[op.refs[0].place], factor)

    # ------------------------------------------------------------------ positions

    def _pool(self, op: Op) -> Layer:
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        given = dict(zip(names, op.args, strict=False)) | op.kwargs
        self._batched(op, 2 if op.func is F.avg_pool2d else 1)
        source = self._layer(self.values[op.refs[0].place])
        dims = op.out.dim() - 2
        taps = pair(given["kernel_size"], dims)
        stride = pair(given.get("stride") or given["kernel_size"], dims)
        before = pair(given.get("padding", 0), dims, 0)
        size = grid(op.out.shape[2:])
        assert size is not None
        beyond = any(
            (n - 1) * s + k > m + 2 * p
            for n, s, k, m, p in zip(size, stride, taps, source.size, before, strict=True)
        )  # fmt: skip
        if beyond or (any(before) and not given.get("count_include_pad", True)):
            raise self._refuse(
                op, "windows of several sizes (ceil_mode, or padding not counted)", "Let all windows have one size."
            )
        divisor = float(given.get("divisor_override") or math.prod(taps))
        return self._add(Pool(size, self._where(op), source, taps, stride, before, divisor), [source])

    def _adaptive(self, op: Op) -> Layer:
        self._batched(op, 2 if op.func is F.adaptive_avg_pool2d else 1)
        source = self._layer(self.values[op.refs[0].place])
        size = grid(op.out.shape[2:])
        assert size is not None
        if size == (1, 1):
            return self._add(Everywhere(size, self._where(op), source), [source])
        if any(m % n for m, n in zip(source.size, size, strict=True)):
            raise self._refuse(op, f"{source.size} positions to {size}", "Choose a size that divides the positions.")
        taps = (source.size[0] // size[0], source.size[1] // size[1])
        pool = Pool(size, self._where(op), source, taps, taps, (0, 0), float(math.prod(taps)))
        return self._add(pool, [source])

    def _mean(self, op: Op) -> Layer:
        value = op.refs[0].place
        dims = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else None)
        rank = self.tape.ops[value].out.dim()
        axes = {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
        source = self._layer(self.values[value])
        wanted = set(range(2, rank))
        if axes != wanted or not wanted:
            raise self._refuse(op, f"{op.name} over axes {sorted(axes)}", "Average over all positions, or none.")
        layer: Layer = Everywhere((1, 1), self._where(op), source)
        layer = self._add(layer, [source])
        if op.func in TOTALS:
            scaled = Sum((1, 1), self._where(op), [(float(math.prod(source.size)), layer)])
            layer = self._add(scaled, [layer])
        return layer

    def _view(self, op: Op) -> Layer | Curve:
        value = self.values[op.refs[0].place]
        old, new = self.tape.ops[op.refs[0].place].out.shape, op.out.shape
        if not op.out.is_floating_point() or not self.tape.ops[op.refs[0].place].out.is_floating_point():
            return self._curve(op, [value])  # a cast that rounds, or of a comparison
        if old[:2] == new[:2] and (new[2:] == old[2:] or grid(new[2:]) == grid(old[2:])):
            return value
        if tuple(new) == (old[0], math.prod(old[1:])):
            source = self._layer(value)
            return self._add(Flat((1, 1), self._where(op), source), [source])
        raise self._refuse(op, f"shape {tuple(old)} to {tuple(new)}", "Only flattening to [n, features] is read.")

    # ------------------------------------------------------------------ activations

    def _curve(self, op: Op, inner: list[Any]) -> Any:
        """Any function that works on each number for itself, of one value of the network."""
        bases = {id(v.source if isinstance(v, Curve) else v): v for v in inner}
        if len(bases) != 1 or any(self.values[r.place] is None for r in op.refs):
            what = "a product or mixture of two branches" if len(inner) > 1 else "a mixture of the input and a layer"
            raise self._refuse(op, f"{op.name}, {what}", "Branches can be added, each behind a weight layer.")
        base = inner[0].source if isinstance(inner[0], Curve) else inner[0]
        constants = [t for t in flat((op.args, op.kwargs)) if isinstance(t, Tensor)]
        slopes = [self.values[r.place] for r in op.refs if isinstance(self.values[r.place], Weight)]
        if any(t.numel() > 1 for t in constants) or any(s.parameter.unique().numel() > 1 for s in slopes):
            raise self._refuse(op, f"{op.name} with a number for every channel", "Use one number for all channels.")
        functions = {
            r.place: as_function(v) if isinstance(v := self.values[r.place], (Layer, Curve)) else None for r in op.refs
        }

        def function(z: Tensor) -> Tensor:
            def put(a: Any) -> Any:
                if isinstance(a, Ref):
                    made = functions[a.place]
                    if made is None:
                        w = self.values[a.place]
                        return (w.parameter.detach().flatten()[:1] * w.factor).to(z)
                    return made(z)
                return a.to(z) if isinstance(a, Tensor) and a.is_floating_point() else a

            args, kwargs = mapped((op.args, op.kwargs), put)
            return op.func(*args, **kwargs)

        shape = op.out.shape
        if tuple(shape) != tuple(self.tape.ops[op.refs[0].place].out.shape) or not elementwise(function, shape):
            raise self._refuse(op, f"{op.name}, which mixes channels or positions", ADVICE.get(op.name, GENERAL))
        name = self._where(op)

        def on_any(z: Tensor) -> Tensor:
            return function(z.reshape(-1, *[1] * (len(shape) - 1))).reshape(z.shape)

        return Curve(base, on_any, name)


_READINGS: list[tuple[set[Any], Callable[[_Reading, Op], Any]]] = [
    ({F.avg_pool1d, F.avg_pool2d, torch.avg_pool1d}, _Reading._pool),
    ({F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.adaptive_avg_pool1d}, _Reading._adaptive),
    ({torch.mean, Tensor.mean, torch.sum, Tensor.sum}, _Reading._mean),
    (VIEWS, _Reading._view),
]
