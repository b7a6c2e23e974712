"""Limits of networks that use a weight several times: recurrent networks, and vectors that depend on each other.

Every value is a sum of nodes. The covariance of two nodes, at any samples and any times, follows from that of their
sources: outputs of one weight matrix have covariance w^2 E[u v] + b^2 whatever the times, outputs of two have none
(Yang 2019, Tensor Programs I and II). The tangent kernel is carried along: T <- w^2 T + w^2 S + b^2 where both nodes
are outputs of one matrix, T <- T E[s'(u) s'(v)] at activations (Alemohammad et al. 2021, The recurrent NTK). Only pairs
that the outputs need are computed. With BatchNorm in train mode, all samples of the batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import NoLimit, Refused, refusal
from ntkit.kernels.infinite.activations import Activation
from ntkit.kernels.infinite.batch_norm import BatchNorm
from ntkit.kernels.infinite.limit_tiles import BATCH, each, outputs_before_weights
from ntkit.kernels.infinite.piecewise import Piecewise
from ntkit.kernels.infinite.quadrature import Tabulated
from ntkit.kernels.kernel import mirrored

_TILE = 256  # samples along each side of a tile

Sum = tuple[tuple[float, "Node"], ...]  # coefficients and nodes


@dataclass(eq=False)
class Node:
    """A vector per sample, whose features are independent draws, or the input."""

    name: str


@dataclass(eq=False)
class InputNode(Node):
    """The input, or what is computed from it before any weight: features at one position; samples at axis `batch`."""

    index: int
    position: tuple[int, ...]
    batch: int = 0


@dataclass(eq=False)
class WordNode(Node):
    """Rows of an embedding: var and gain (of the tangent kernel) where the words are equal, else 0."""

    index: int
    position: tuple[int, ...]
    weight: int  # identity of the parameter
    var: float
    gain: float


@dataclass(frozen=True)
class Weights:
    """A weight matrix and its bias by their identities, with what they add to covariance and tangent kernel."""

    weight: Any  # of some of its columns: with their place
    bias: int | None
    weight_var: float
    bias_var: float
    weight_gain: float
    bias_gain: float
    text: str


@dataclass(eq=False)
class DenseNode(Node):
    """z = W u + b."""

    weights: Weights
    source: Sum


@dataclass(eq=False)
class CurveNode(Node):
    """An elementwise function of a Gaussian sum, or BatchNorm of it in front of one."""

    activation: Activation | BatchNorm
    source: Sum


@dataclass
class SideOf:
    """Samples of one side: values of the tape's calls by index, in float64, and the states of activations."""

    values: dict[int, Tensor]
    states: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    diagonal: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(next(iter(self.values.values())))

    def prepare(self, curve: CurveNode, variances: Tensor) -> None:
        """Keep what an activation needs of the samples."""
        assert isinstance(curve.activation, Activation)
        v = variances.reshape(1, 1, -1)
        self.states[id(curve)] = curve.activation.state(v)
        value, slope = curve.activation.diagonal(v)
        self.diagonal[id(curve)] = value.flatten(), slope.flatten()


Both = tuple[Tensor, Tensor]  # covariance and tangent kernel


class NodePairs:
    """Covariance and tangent kernel of sums, for all pairs of samples, or sample i with sample i only."""

    def __init__(self, one: SideOf, two: SideOf, paired: bool) -> None:
        self.one, self.two, self.paired = one, two, paired
        self._known: dict[tuple[int, int], Both | None] = {}

    def sums(self, a: Sum, b: Sum) -> Both:
        """Of two sums."""
        total = self._zero(), self._zero()
        for p, node in a:
            for q, other in b:
                if (both := self.nodes(node, other)) is not None:
                    total[0].add_(both[0], alpha=p * q)
                    total[1].add_(both[1], alpha=p * q)
        return total

    def nodes(self, a: Node, b: Node) -> Both | None:
        """Of two nodes; None where both are zero."""
        key = id(a), id(b)
        if key not in self._known:
            self._known[key] = self._both(a, b)
        return self._known[key]

    def _zero(self) -> Tensor:
        shape = (self.one.count,) if self.paired else (self.one.count, self.two.count)
        like = next(iter(self.one.values.values()))
        return torch.zeros(shape, dtype=torch.float64, device=like.device)

    def _both(self, a: Node, b: Node) -> Both | None:
        if isinstance(a, InputNode) and isinstance(b, InputNode):
            u, v = self.one.values[a.index][:, *a.position], self.two.values[b.index][:, *b.position]
            if u.shape[1] != v.shape[1]:
                raise NoLimit(f"{a.name}: got features of two sizes for one weight; expected one size.")
            K = (u * v).sum(1) if self.paired else u @ v.T
            return K / u.shape[1], torch.zeros_like(K)
        if isinstance(a, WordNode) and isinstance(b, WordNode):
            if a.weight != b.weight:
                return None
            u, v = self.one.values[a.index][:, *a.position], self.two.values[b.index][:, *b.position]
            same = (u == v if self.paired else u[:, None] == v).double()
            return same * a.var, same * a.gain
        if isinstance(a, DenseNode) and isinstance(b, DenseNode):
            return self._dense(a, b)
        if isinstance(a, CurveNode) and isinstance(b, CurveNode):
            return self._curves(a, b)
        curve, other = (a, b) if isinstance(a, CurveNode) else (b, a)
        if isinstance(curve, CurveNode) and not isinstance(other, InputNode):  # E[s(u) v] = E[s'(u)] Cov(u, v)
            first, second = ((curve.source, ((1.0, other),)), (((1.0, other),), curve.source))[curve is b]
            if any(bool(t.any()) for t in self.sums(first, second)):
                got = "an activation's output and its own input, into one weight or one sum"
                raise NoLimit(f"{curve.name}: got {got}; expected values that do not depend on each other.")
        return None

    def _dense(self, a: DenseNode, b: DenseNode) -> Both | None:
        u, v = a.weights, b.weights
        same_bias = u.bias is not None and u.bias == v.bias
        if u.weight != v.weight:
            if not same_bias or u.bias_var == u.bias_gain == 0:
                return None
            K = self._zero()
            return K + u.bias_var, K + u.bias_gain
        K, T = self.sums(a.source, b.source)
        T = (T * u.weight_var).add_(K, alpha=u.weight_gain)
        K = K * u.weight_var
        return (K.add_(u.bias_var), T.add_(u.bias_gain)) if same_bias else (K, T)

    def _curves(self, a: CurveNode, b: CurveNode) -> Both:
        if a.activation is not b.activation:
            raise NoLimit(f"{b.name}: got another activation than at {a.name}, of values that depend on each other.")
        K, T = self.sums(a.source, b.source)
        if isinstance(a.activation, BatchNorm):
            return a.activation.moments(K, T)
        same = a is b and self.one is self.two
        if same and self.paired:
            value, slope = self.one.diagonal[id(a)]
            return value.clone(), T.mul_(slope)
        # activations take planes: [1, 1, p, q], or [1, 1, p, 1] of pairs
        first = tuple(t[..., None] for t in self.one.states[id(a)])
        second = tuple(t[..., None] if self.paired else t[..., None, :] for t in self.two.states[id(b)])
        before = T.diagonal().clone() if same else None
        shape = (1, 1, len(K), 1 if self.paired else K.shape[1])
        factor = a.activation.apply(K.view(shape), T.view(shape), first, second)
        if factor != 1:
            K.mul_(factor)
            T.mul_(factor)
        if before is not None:  # free of the rounding that angles near 0 amplify
            value, slope = self.one.diagonal[id(a)]
            K.diagonal().copy_(value)
            T.diagonal().copy_(before * slope)
        return K, T


@dataclass
class Program:
    """A network as sums of nodes.

    output : the sum that each output is a draw of.
    curves : activations in the order of the run.
    last : index of the last call on the tape that is read before a weight.
    """

    output: Sum
    curves: list[CurveNode]
    last: int

    @property
    def batch_norm(self) -> BatchNorm | None:
        """The first layer that makes every value depend on the whole batch."""
        return next((c.activation for c in self.curves if isinstance(c.activation, BatchNorm)), None)

    @property
    def error(self) -> float:
        """Largest relative error of an activation so far."""
        activations = (c.activation for c in self.curves)
        return max((a.error for a in activations if isinstance(a, (BatchNorm, Piecewise, Tabulated))), default=0.0)

    def inexact(self) -> list[tuple[CurveNode, Tabulated | Piecewise]]:
        """The activations with an error, each once, with the first layer that has it."""
        found: dict[int, tuple[CurveNode, Tabulated | Piecewise]] = {}
        for curve in self.curves:
            if isinstance(curve.activation, (Piecewise, Tabulated)):
                found.setdefault(id(curve.activation), (curve, curve.activation))
        return list(found.values())

    def inputs(self) -> set[int]:
        """Indices of the calls whose values are needed."""
        return {node.index for node in self.every() if isinstance(node, (InputNode, WordNode))}

    def every(self) -> Iterator[Node]:
        """All nodes, each once."""
        seen: set[int] = set()
        queue = [node for _, node in self.output]
        while queue:
            node = queue.pop()
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                queue += [source for _, source in getattr(node, "source", ())]

    def gram(self, model: nn.Module, x1: Tensor, x2: Tensor | None, kind: str) -> Tensor:
        """Values for all pairs, [n1, n2] in float64: tangent kernel ("ntk") or covariance."""
        if self.batch_norm:
            if x2 is not None:
                raise _mixed(self.batch_norm, "two sets of samples")
            return self._of_batch(self.batch_norm, model, x1, kind)
        first = self._values(model, x1)
        second = first if x2 is None else self._values(model, x2)
        n1, n2 = len(x1), len(x1 if x2 is None else x2)
        out = torch.empty(n1, n2, dtype=torch.float64, device=x1.device)
        versions = self._extended(first, second)
        tiles = [(i, j) for i in range(0, n1, _TILE) for j in range(i if x2 is None else 0, n2, _TILE)]

        def tile(at: tuple[int, int]) -> None:
            i, j = at
            one = self._side(first, slice(i, i + _TILE))
            two = one if x2 is None and i == j else self._side(second, slice(j, j + _TILE))
            out[i : i + _TILE, j : j + _TILE] = self._output(NodePairs(one, two, paired=False), kind)

        each(tile, tiles, out, here=True)
        if self._versions() != versions:  # another thread extended a table
            return self.gram(model, x1, x2, kind)
        if x2 is None:
            for i in range(0, n1, _TILE):
                out[i : i + _TILE, :i] = out[:i, i : i + _TILE].T
                block = out[i : i + _TILE, i : i + _TILE]
                block.copy_(mirrored(block))
        return out

    def pairs(self, model: nn.Module, x1: Tensor, x2: Tensor | None, kind: str) -> Tensor:
        """Values for sample i with sample i, [n] in float64."""
        if self.batch_norm:
            raise _mixed(self.batch_norm, "pairs of samples")
        first = self._values(model, x1)
        second = first if x2 is None else self._values(model, x2)
        versions, parts = self._extended(first, second), []
        for start in range(0, len(x1), BATCH):
            one = self._side(first, slice(start, start + BATCH))
            two = one if x2 is None else self._side(second, slice(start, start + BATCH))
            parts.append(self._output(NodePairs(one, two, paired=True), kind))
        return torch.cat(parts) if self._versions() == versions else self.pairs(model, x1, x2, kind)

    def _of_batch(self, norm: BatchNorm, model: nn.Module, x: Tensor, kind: str) -> Tensor:
        """Values for all pairs of a batch."""
        if len(x) == 1:
            raise _mixed(norm, "a single sample")
        side, versions = SideOf(self._values(model, x)), self._versions()
        pairs = NodePairs(side, side, paired=False)
        for curve in self.curves:
            if isinstance(curve.activation, Activation):
                side.prepare(curve, pairs.sums(curve.source, curve.source)[0].diagonal())
            pairs.nodes(curve, curve)
        if self._versions() != versions:  # a table was extended, here or by another thread
            return self._of_batch(norm, model, x, kind)
        return mirrored(self._output(pairs, kind))

    def _extended(self, *sides: dict[int, Tensor]) -> list[int]:
        """Extend the tables of activations to the variances of all samples; return how often each was extended."""
        if self._versions():
            for values in sides:
                for start in range(0, len(next(iter(values.values()))), BATCH):
                    self._side(values, slice(start, start + BATCH))
        return self._versions()

    def _versions(self) -> list[int]:
        return [c.activation.version for c in self.curves if isinstance(c.activation, Tabulated)]

    def _output(self, pairs: NodePairs, kind: str) -> Tensor:
        for curve in self.curves:  # from the first on: a long recursion would exceed Python's stack
            pairs.nodes(curve, curve)
        return pairs.sums(self.output, self.output)[kind == "ntk"]

    @torch.no_grad()
    def _values(self, model: nn.Module, x: Tensor) -> dict[int, Tensor]:
        """Values of the calls that the nodes refer to."""
        axes = {
            node.index: getattr(node, "batch", 0) for node in self.every() if isinstance(node, (InputNode, WordNode))
        }
        parts: dict[int, list[Tensor]] = {index: [] for index in axes}
        for start in range(0, len(x), BATCH):
            batch = x[start : start + BATCH]
            outputs = [batch] if self.last == 0 else outputs_before_weights(model, batch, self.last)
            for index, part in parts.items():
                part.append(outputs[index].movedim(axes[index], 0))
        values = {index: torch.cat(part) for index, part in parts.items()}
        return {index: t.double() if t.is_floating_point() else t for index, t in values.items()}

    def _side(self, values: dict[int, Tensor], samples: slice) -> SideOf:
        """Prepare samples: the variances that activations need, in the order of the run."""
        side = SideOf({index: t[samples] for index, t in values.items()})
        pairs = NodePairs(side, side, paired=True)
        for curve in self.curves:
            side.prepare(curve, pairs.sums(curve.source, curve.source)[0])
        return side

    def describe(self) -> list[str]:
        """One line per weight and activation, in the order of the run from the output back."""
        lines = []
        for node in self.every():
            if isinstance(node, WordNode):
                lines.append(f"{node.name}: embedding of std {math.sqrt(node.var):.4g}")
            elif isinstance(node, DenseNode):
                w = node.weights
                lines.append(
                    f"{node.name}: weights of std {math.sqrt(w.weight_var):.4g} / sqrt(fan in), "
                    f"bias of std {math.sqrt(w.bias_var):.4g} ({w.text})"
                )
            elif isinstance(node, CurveNode):
                lines.append(f"{node.name}: {node.activation.name}")
        counts = {line: lines.count(line) for line in lines}
        return [line + (f", {n} times" if n > 1 else "") for line, n in reversed(counts.items())]


def _mixed(norm: BatchNorm, got: str) -> Refused:
    """The refusal of values that no batch defines."""
    expected = "one whole batch, kernel(x): in train mode every value depends on all samples of its batch"
    fix = (
        "Call kernel(x) once, with the whole batch, and take entries and the diagonal of the result. A kernel of two "
        "samples needs statistics that are given: model.eval(), with InfiniteKernel(model, sample=16)."
    )
    return refusal(norm.where, got=got, expected=expected, fix=fix)
