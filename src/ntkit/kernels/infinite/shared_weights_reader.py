"""From a tape to sums of nodes: vectors, and sequences of them, with weights that may be used several times."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ntkit.base.checks import NoLimit, Refused
from ntkit.kernels.infinite import tape_calls as calls
from ntkit.kernels.infinite.activations import Activation, Function, Rectifier
from ntkit.kernels.infinite.batch_norm import BatchNorm
from ntkit.kernels.infinite.piecewise import piecewise
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.infinite.recognition import closed_form, fingerprint
from ntkit.kernels.infinite.shared_weights import CurveNode, DenseNode, InputNode, Program, Sum, Weights, WordNode
from ntkit.kernels.infinite.tape import DROPOUTS, Op, Ref, Tape, dropout_rate, record
from ntkit.kernels.infinite.tape_calls import arguments, factor_of, is_elementwise
from ntkit.kernels.infinite.tape_reader import DerivedWeight, Reader, Weight
from ntkit.kernels.infinite.vectors import Joined, Vectors, added, moved
from ntkit.kernels.infinite.weight_layers import batch_norm
from ntkit.networks.initialization import NORMAL, initial_std

_FUNCTIONS: dict[str, Function] = {"rnn_tanh": torch.tanh, "rnn_relu": torch.relu}
_LIKE = (Tensor.to, Tensor.type_as)  # they may take dtype and device of a weight


def read_program(model: nn.Module, x: Tensor, w_std: float | None, b_std: float | None) -> Program | None:
    """Read a network of vectors; None for anything else.

    Raises
    ------
    NoLimit
        For anything else with batch norm in train mode, which has no limit in another way: by the layer's name.
    Refused
        For a model that does not run on the samples.
    """
    three, tape = torch.cat([x[:1], x[-1:], x[:1]]), None
    try:
        tape = record(model, three)
        program = _ProgramReader(model, tape, w_std, b_std).program()
        program.gram(model, three, None, "ntk")  # refuses values that depend on each other in other ways
        return program
    except Refused as error:
        if tape is None and not isinstance(error, NoLimit):  # it does not run
            raise
        if calls.mixes_samples(model, tape):
            raise NoLimit(f"{error} With batch norm in train mode there is no sample=, either.") from None
        return None


class _ProgramReader:
    def __init__(self, model: nn.Module, tape: Tape, w_std: float | None, b_std: float | None) -> None:
        self.reader = Reader(model, tape, w_std, b_std)
        self.tape, self.curves = tape, list[CurveNode]()
        self.values: dict[int, Any] = {0: None}  # None for data, else a Weight or Vectors
        self._activations: dict[str, Activation] = {}

    def program(self) -> Program:
        """Read all calls."""
        for index, op in enumerate(self.tape.ops[1:], start=1):
            if index in self.tape.parameters:
                name, parameter = self.tape.parameters[index]
                self.values[index] = Weight(parameter, 1.0, name)
            else:
                self.values[index] = self._value(op)
        op, value = self.tape.ops[self.tape.output], self.values[self.tape.output]
        if not isinstance(value, Vectors) or value.shape or value.batch:
            raise self._refusal(op, f"an output of shape {tuple(op.out.shape)}", "End with a linear layer.")
        last = value.sums[()]
        if not last or not all(isinstance(node, (DenseNode, CurveNode)) for _, node in last):
            raise self._refusal(op, "an output without random weights", "End with a linear layer.")
        program = Program(last, [], 0)
        nodes = set(map(id, program.every()))
        program.curves = [curve for curve in self.curves if id(curve) in nodes]
        program.last = max(program.inputs())
        if mixing := [i for i, op in enumerate(self.tape.ops[: program.last]) if op.func in calls.BATCH_NORMS]:
            got = "a batch norm in front of what the model computes from its input alone"
            raise self._refusal(self.tape.ops[mixing[0]], got, "Compute that first in the model's forward.")
        self._check_sources(program)
        return program

    def _check_sources(self, program: Program) -> None:
        """Refuse a weight that multiplies the input at one place and a layer at another: its width is the input's."""
        kinds: dict[Any, set[bool]] = {}
        for node in program.every():
            if isinstance(node, DenseNode):
                own = kinds.setdefault(node.weights.weight, set())
                own |= {isinstance(source, InputNode) for _, source in node.source}
                if len(own) > 1:
                    got = "a weight that multiplies the input at one place and a layer at another"
                    raise NoLimit(f"{node.name}: got {got}; expected weights of its own for each.")

    def _refusal(self, op: Op, got: str, fix: str) -> Refused:
        return NoLimit(str(self.reader.refusal(op, got, fix)))

    def _of(self, argument: Any) -> Any:
        return self.values[argument.index] if isinstance(argument, Ref) else argument

    # ------------------------------------------------------------------ calls

    def _value(self, op: Op) -> Any:
        inputs = [self.values[r.index] for r in op.refs]
        if op.func in DROPOUTS and dropout_rate(op.args, op.kwargs):
            raise self._refusal(op, "dropout in train mode", "Call model.eval().")
        if op.func in calls.BATCH_NORMS:
            return self._batch_norm(op)
        stopped = op.no_grad or op.func in calls.STOPS
        if op.in_place or (stopped and not all(v is None for v in inputs)):
            raise self._refusal(op, f"{op.name} in place or without gradients", "Write it otherwise.")
        if op.func is Tensor.new_zeros or all(v is None for v in inputs):
            return None
        if op.func in _LIKE and op.args and isinstance(op.args[0], Ref) and op.out.is_floating_point():
            return self._of(op.args[0])  # a tensor like a weight
        weights = [v for v in inputs if isinstance(v, (Weight, DerivedWeight))]
        inner = [v for v in inputs if isinstance(v, Vectors)]
        if op.func is F.linear:
            return self._linear(op)
        if op.func is F.embedding:
            return self._embedding(op)
        if op.func in calls.CONCATENATIONS:
            return self._joined(op)
        if any(isinstance(v, Joined) for v in inputs):
            fix = "Put a linear layer behind the concatenation."
            raise self._refusal(op, f"{op.name} of features side by side", fix)
        if op.name in _FUNCTIONS:
            return self._recurrent(op)
        if op.name in (f"{name}_cell" for name in _FUNCTIONS):
            return self._cell(op)
        if weights and not inner:
            return self._weight(op, weights)
        if weights or any(v is None for v in inputs):
            raise self._refusal(op, f"{op.name} of a layer with a parameter or the input", calls.SUPPORTED)
        if op.func in calls.SUMS and len(inner) == 2:
            return self._sum(op)
        if op.func in calls.SUMS and any(type(a) in (int, float) and a == 0 for a in op.args):
            return inner[0]  # the first term of Python's sum()
        if op.func is torch.stack:
            return self._stack(op, inner)
        if len(inner) == 1 and (factor := factor_of(op)) is not None:
            sums = {p: tuple((c * factor, node) for c, node in s) for p, s in inner[0].sums.items()}
            return Vectors(inner[0].shape, inner[0].batch, sums)
        if len(inner) == 1 and op.func not in calls.PRODUCTS:
            other = moved(op, self.tape.ops[op.refs[0].index].out, inner[0])
            return self._curve(op, inner) if other is None else other
        return self._curve(op, inner)

    def _weight(self, op: Op, weights: list[Any]) -> Any:
        if len(weights) == 1 and isinstance(w := weights[0], Weight) and (factor := factor_of(op)) is not None:
            return Weight(w.parameter, w.factor * factor, w.name)
        return DerivedWeight(" and ".join(w.name for w in weights))

    def _linear(self, op: Op) -> Vectors:
        args = arguments(op, "input", "weight", "bias")
        weight, bias = (self._checked(op, args.get(name)) for name in ("weight", "bias"))
        assert weight is not None
        laws = self._weights(op, [weight], [bias], weight.parameter.shape[1])[0]
        if isinstance(joined := self._of(args["input"]), Joined):
            return self._linear_of_joined(op, laws, joined)
        x = self._vectors(op, args["input"])
        sums = {p: self._dense(op, laws, source) for p, source in x.sums.items()}
        return Vectors(x.shape, x.batch, sums)

    def _joined(self, op: Op) -> Joined:
        """Values side by side; each is to keep its share of the features."""
        args = arguments(op, "tensors", "dim")
        parts, axis = args["tensors"], int(args.get("dim", 0)) % op.out.dim()
        vectors = [self._vectors(op, part) for part in parts]
        if axis != op.out.dim() - 1 or len({(v.shape, v.batch) for v in vectors}) > 1:
            raise self._refusal(op, "a concatenation of positions, or of different shapes", "Join features.")
        return Joined([(_width(self, part), v) for part, v in zip(parts, vectors, strict=True)])

    def _linear_of_joined(self, op: Op, laws: Weights, joined: Joined) -> Vectors:
        """A sum of one layer per part; a part's columns of the weight are its own."""
        total = sum(width for width, _ in joined.parts)
        first = joined.parts[0][1]
        sums: dict[tuple[int, ...], Sum] = {p: () for p in first.sums}
        for place, (width, part) in enumerate(joined.parts):
            share = width / total
            own = Weights(
                (laws.weight, place), None if place else laws.bias, laws.weight_var * share,
                0.0 if place else laws.bias_var, laws.weight_gain * share, 0.0 if place else laws.bias_gain, laws.text,
            )  # fmt: skip
            for p, source in part.sums.items():
                sums[p] = (*sums[p], *self._dense(op, own, source))
        return Vectors(first.shape, first.batch, sums)

    def _dense(self, op: Op, weights: Weights, source: Sum) -> Sum:
        return ((1.0, DenseNode(self.reader.where(op), weights, source)),)

    def _embedding(self, op: Op) -> Vectors:
        args = arguments(op, "input", "weight")
        words, weight = args["input"], self._checked(op, args["weight"])
        assert weight is not None
        if self._of(words) is not None or not isinstance(words, Ref) or args.get("max_norm") is not None:
            raise self._refusal(op, "an embedding of computed words, or with max_norm", "Pass the words.")
        p, shape = weight.parameter, tuple(self.tape.ops[words.index].out.shape)
        if calls.words_differ(p, args.get("padding_idx")):
            raise self._refusal(op, "padding_idx, a word whose row is zero or not trained", "Leave it out.")
        # as one axis: torch draws an embedding from the standard normal, whatever its size
        initial = initial_std(p.detach().flatten() * weight.factor, 1, 1, weight.name)
        gain = weight.factor**2 * float(p.requires_grad)
        node = (self.reader.where(op), words.index)
        sums: dict[tuple[int, ...], Sum] = {
            at: ((1.0, WordNode(*node, at, id(p), initial.std**2, gain)),)
            for at in itertools.product(*map(range, shape[1:]))
        }
        return Vectors(shape[1:], 0, sums)

    def _recurrent(self, op: Op) -> Vectors:
        """`nn.RNN`: its outputs at all times, or its last states."""
        x, state, flat, biased, layers, dropout, train, both_ways, batch_first = op.args
        if op.kwargs or (dropout and train) or not _is_zero(self, state):
            raise self._refusal(op, "packed sequences, dropout or an initial state", "Leave them out.")
        value = self._vectors(op, x, 0 if batch_first else 1)
        if len(value.shape) != 1 or value.batch != (0 if batch_first else 1):
            raise self._refusal(op, f"an input of shape {value.shape} per sample", "Pass [n, length, features].")
        function, ways, length = _FUNCTIONS[op.name], 2 if both_ways else 1, value.shape[0]
        size = 4 if biased else 2
        if ways == 2 and (layers > 1 or _item(op) == 0):
            raise self._refusal(op, "states of both directions side by side", "Use one direction.")
        current: list[Sum] = [value.sums[t,] for t in range(length)]
        last: list[Sum] = []
        for layer in range(layers * ways):
            given = [self._checked(op, w) for w in flat[layer * size : (layer + 1) * size]]
            order = range(length) if layer % ways == 0 else range(length - 1, -1, -1)
            states: dict[int, Sum] = {}
            h: Sum = ()
            for t in order:
                h = self._step(op, current[t], h, given, function)
                states[t] = h
            last.append(h)
            if ways == 1:
                current = [states[t] for t in range(length)]
        if _item(op) == 0:
            return Vectors((length,), value.batch, {(t,): s for t, s in enumerate(current)})
        return Vectors((len(last),), 1, {(k,): s for k, s in enumerate(last)})

    def _cell(self, op: Op) -> Vectors:
        x, state, *given = op.args
        value = self._vectors(op, x)
        h: Sum = () if _is_zero(self, state) else self._vectors(op, state).sums[()]
        weights = [self._checked(op, w) for w in given if w is not None]
        function = _FUNCTIONS[op.name.removesuffix("_cell")]
        return Vectors((), 0, {(): self._step(op, value.sums[()], h, weights, function)})

    def _step(self, op: Op, x: Sum, h: Sum, given: list[Any], function: Function) -> Sum:
        """One time step: s(W_ih x + b_ih + W_hh h + b_hh)."""
        biases = given[2:] or [None, None]
        first, second = self._weights(op, given[:2], biases, given[1].parameter.shape[1])
        z = (*self._dense(op, first, x), *self._dense(op, second, h))
        return self._activated(op, z, function)

    # ------------------------------------------------------------------ sums and moves

    def _sum(self, op: Op) -> Vectors:
        alpha = float(op.kwargs.get("alpha", 1))
        signs = [1.0, -alpha if op.func in calls.DIFFERENCES else alpha]
        if op.func is Tensor.__rsub__:
            signs = [-1.0, 1.0]
        one, two = (self._of(r) for r in op.refs)
        if (one.shape, one.batch) != (two.shape, two.batch):
            raise self._refusal(op, f"shapes {one.shape} and {two.shape}", "Add values of one shape.")
        sums = {p: added([(signs[0], one.sums[p]), (signs[1], two.sums[p])]) for p in one.sums}
        return Vectors(one.shape, one.batch, sums)

    def _stack(self, op: Op, inner: list[Vectors]) -> Vectors:
        axis = int(arguments(op, "tensors", "dim").get("dim", 0))
        if any(v.shape or v.batch for v in inner) or axis not in (0, 1) or len(op.args[0]) != len(inner):
            raise self._refusal(op, "a stack along the features, or of sequences", "Stack vectors along the time.")
        return Vectors((len(inner),), 1 - axis, {(t,): v.sums[()] for t, v in enumerate(inner)})

    # ------------------------------------------------------------------ batch norms

    def _batch_norm(self, op: Op) -> Vectors:
        """Statistics of the batch, of the outputs of weight layers."""
        argument, norm = batch_norm(self.reader, op, self._of)
        if (value := self._of(argument)) is None:
            raise self._refusal(op, "batch norm of the input", "Normalize the data outside the model.")
        if not isinstance(value, Vectors) or not _gaussian(value.sums[()]):
            got = "batch norm of values that are not Gaussian (an activation's)"
            raise self._refusal(op, got, "Normalize before the activation, directly behind weight layers.")
        return Vectors((), 0, {(): self._added(op, norm, value.sums[()])})

    def _behind_batch_norm(self, op: Op, factor: float, node: CurveNode, function: Function) -> Sum:
        """An activation of a batch norm's output, which is no Gaussian."""
        norm, rectifier = node.activation, closed_form(function)
        assert isinstance(norm, BatchNorm)
        if not norm.alone or not isinstance(rectifier, Rectifier):
            got = f"{op.name} behind batch norm in train mode ({norm.where})"
            fix = "There it is known for functions with two slopes: nn.ReLU, nn.LeakyReLU, torch.abs, the identity."
            raise self._refusal(op, got, fix)
        return self._added(op, norm.followed_by(rectifier, factor), node.source)

    # ------------------------------------------------------------------ activations

    def _curve(self, op: Op, inner: list[Vectors]) -> Vectors:
        """An elementwise function of one value, at every position."""
        first = inner[0]
        if any(v is not first for v in inner) or len(op.refs) != len(inner):
            raise self._refusal(op, f"{op.name} of several values", calls.SUPPORTED)

        def function(z: Tensor) -> Tensor:
            args, kwargs = tree_map(lambda a: z if isinstance(a, Ref) else a, (op.args, op.kwargs))
            return op.func(*args, **kwargs)

        before = self.tape.ops[op.refs[0].index].out.shape
        moves, rounds = tuple(op.out.shape) != tuple(before), not op.out.is_floating_point()
        if moves or rounds or not is_elementwise(function, before):
            got = f"{op.name}, which {'rounds or compares' if rounds else 'mixes channels or positions'}"
            raise self._refusal(op, got, calls.ADVICE.get(op.name, calls.SUPPORTED))

        def any_shape(z: Tensor) -> Tensor:
            return function(z.reshape(-1, *[1] * (len(before) - 1))).reshape(z.shape)

        return Vectors(first.shape, first.batch, {p: self._activated(op, s, any_shape) for p, s in first.sums.items()})

    def _activated(self, op: Op, source: Sum, function: Function) -> Sum:
        if len(source) == 1 and isinstance(node := source[0][1], CurveNode) and isinstance(node.activation, BatchNorm):
            return self._behind_batch_norm(op, source[0][0], node, function)
        if not _gaussian(source):
            got = f"{op.name} of values that are not Gaussian"
            raise self._refusal(op, got, "Put a weight layer before the activation.")
        key = fingerprint(function)
        if key not in self._activations:
            where = self.reader.where(op)
            self._activations[key] = closed_form(function) or piecewise(function) or Tabulated(function, where)
        return self._added(op, self._activations[key], source)

    def _added(self, op: Op, activation: Activation | BatchNorm, source: Sum) -> Sum:
        curve = CurveNode(self.reader.where(op), activation, source)
        self.curves.append(curve)
        return ((1.0, curve),)

    # ------------------------------------------------------------------ arguments

    def _checked(self, op: Op, argument: Any) -> Weight | None:
        value = self._of(argument)
        if value is not None and not isinstance(value, Weight):
            raise self._refusal(op, "a weight that is not a parameter", "Use the layer's own parameter.")
        return value

    def _vectors(self, op: Op, argument: Any, batch: int = 0) -> Vectors:
        """An argument as vectors; the input, or what is computed from it, as data with the samples at axis `batch`."""
        value = self._of(argument)
        if isinstance(value, Vectors):
            return value
        if value is None and _is_zero(self, argument):
            return Vectors((), 0, {(): ()})
        if not isinstance(argument, Ref) or value is not None:
            raise self._refusal(op, "a constant, or a parameter, as the input of a layer", "Start from zeros.")
        out, name = self.tape.ops[argument.index].out, self.reader.where(op)
        if out.dim() < 2 + batch or out.shape[batch] != 3 or not out.is_floating_point():
            raise self._refusal(op, f"an input of shape {tuple(out.shape)}", "Pass [n, ..., features].")
        shape = (*out.shape[:batch], *out.shape[batch + 1 : -1])
        sums: dict[tuple[int, ...], Sum] = {
            at: ((1.0, InputNode(name, argument.index, at, batch)),) for at in itertools.product(*map(range, shape))
        }
        return Vectors(shape, batch, sums)

    def _weights(self, op: Op, weights: list[Weight | None], biases: list[Weight | None], fan_in: int) -> list[Weights]:
        """Laws of weight matrices; fan_in : the one by which torch draws them."""
        found = []
        for weight, bias in zip(weights, biases, strict=True):
            assert weight is not None
            p, size = weight.parameter, weight.parameter.shape[1]
            trained = float(p.requires_grad)
            bias_trained = float(bias is not None and bias.parameter.requires_grad)
            owners = id(p), None if bias is None else id(bias.parameter)
            if self.reader.stds is not None:
                w, b = self.reader.stds
                b = 0.0 if bias is None or b is None else b
                found.append(Weights(*owners, w**2, b**2, w**2 * trained, b**2 * bias_trained, "as given"))
                continue
            std, text = self._std(op, weight, fan_in)
            law = (size * std**2, 0.0, size * weight.factor**2 * trained, 0.0)
            if bias is not None:
                b_std, b_text = self._std(op, bias, fan_in)
                law, text = (law[0], b_std**2, law[2], bias.factor**2 * bias_trained), f"{text}; bias {b_text}"
            found.append(Weights(*owners, *law, text))
        return found

    def _std(self, op: Op, weight: Weight, fan_in: int) -> tuple[float, str]:
        p, fan_out = weight.parameter, weight.parameter.shape[0]
        if weight.factor != 1 and initial_std(p, fan_in, fan_out, weight.name).name == NORMAL:
            return abs(weight.factor), NORMAL
        initial = initial_std(p.detach() * weight.factor, fan_in, fan_out, weight.name)
        if initial.mean:
            got = f"'{weight.name}' of mean {initial.mean:.3g}, not zero"
            raise self._refusal(op, got, "Draw it with mean zero, or give w_std and b_std.")
        return initial.std, initial.name + (f" ± {initial.error:.2%}" if initial.error else "")


def _gaussian(source: Sum) -> bool:
    """Whether a sum is one of weight layers' outputs."""
    return bool(source) and all(isinstance(node, (DenseNode, WordNode)) for _, node in source)


def _is_zero(reader: _ProgramReader, state: Any) -> bool:
    """Whether an initial state is zero: a constant, or made from the input or a weight without its values."""
    if isinstance(state, Ref):
        op = reader.tape.ops[state.index]
        made = op.func in (Tensor.new_zeros, torch.zeros_like)
        copied = op.func in (Tensor.to, Tensor.type_as) and not isinstance(op.args[0], Ref)
        return reader.values[state.index] is None and (made or (copied and not bool(op.args[0].any())))
    return state is None or (isinstance(state, Tensor) and not bool(state.any()))


def _width(reader: _ProgramReader, argument: Any) -> int:
    """Number of features of a value."""
    out = reader.tape.ops[argument.index].out if isinstance(argument, Ref) else argument
    return int(out.shape[-1])


def _item(op: Op) -> int:
    return int(getattr(op.func, "_index", 0))
