"""The test side of a path kernel: gradients averaged over the segment from one step's parameters to the next's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch
from ntkit.base.checks import nearest, refusal
from ntkit.base.numbers import as_integer, as_number
from ntkit.jacobian.engine import Engine
from ntkit.jacobian.forwards import raw_outputs
from ntkit.jacobian.model_calls import call, untouched
from ntkit.secant.secant_jacobian import Secant

Integration = Literal["secant", "quadrature", "left", "ntk"]
Quadrature = Literal["gauss", "midpoint"]
MOST = 4096  # nodes that an adaptive rule may take in a step
_BATCH = 256  # samples a forward pass


class Segment:
    """Gradients of a network's outputs between two sets of parameters, as a weighted sum of Jacobians.

    Parameters
    ----------
    network : gives [n, C] outputs; its parameters are set to those of the segment, and left there.
    params : those that move, by name.
    integration, rule, nodes, tolerance : see `ntkit.PathKernel`.
    memory : bytes of scratch memory for the gradients.
    """

    def __init__(
        self,
        network: nn.Module,
        params: Mapping[str, nn.Parameter],
        integration: str,
        rule: str,
        nodes: int,
        tolerance: float | None,
        memory: int | None = None,
    ) -> None:
        check_integration(integration, rule, nodes, tolerance)
        self.network, self.params = network, dict(params)
        self.integration, self.rule, self.nodes, self.tolerance = integration, rule, nodes, tolerance
        self._secant = Secant(network, self.params) if integration == "secant" else None
        self.engine = (
            Engine(network, memory=memory, selected=self.params)
            if self._secant is None
            else Engine(self._secant, memory=memory, selected=self._secant.params)
        )
        self.origin: Mapping[str, Tensor] = {}  # the initial parameters, for "ntk"
        self.most = 0  # largest number of nodes of a step

    def at(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Set the ends of a step, where the rule has any: before `engine` looks at its graph."""
        if self._secant is not None:
            self._secant.at(before, after)

    def places(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], x: Batch) -> Iterator[float]:
        """Set `engine` to one place of the segment after the other; yields the weight of each."""
        if self._secant is not None:
            self._secant.at(before, after)
            yield 1.0
        elif self.integration == "left":
            self.set(before)
            yield 1.0
        elif self.integration == "ntk":
            self.set(self.origin)
            yield 1.0
        else:
            nodes = self.nodes if self.tolerance is None else self._enough(before, after, x)
            self.most = max(self.most, nodes)
            for t, weight in zip(*points(self.rule, nodes), strict=True):
                self.set({name: torch.lerp(before[name], after[name], float(t)) for name in self.params})
                yield float(weight)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Put parameters into the network."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(values[name])

    def outputs(self, values: Mapping[str, Tensor], x: Batch) -> Tensor:
        """Outputs at some parameters, [n, C]."""
        self.set(values)
        return raw_outputs(self.network, x, _BATCH)

    def ends(self, x: Batch) -> tuple[Tensor, Tensor] | None:
        """Outputs at both ends as the secant rules have them, where the segment stands."""
        if self._secant is None:
            return None
        with untouched(self._secant, {}):
            call(self._secant, x)
        return self._secant.ends

    def _enough(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], x: Batch) -> int:
        """Nodes with which the rule gives the change of the outputs to the tolerance, relative to their size."""
        first, last = self.outputs(before, x), self.outputs(after, x)
        change = [(after[name] - before[name])[None] for name in self.params]
        bound = self.tolerance * max(float(first.abs().max()), float(last.abs().max()))  # pyrefly: ignore
        nodes = max(self.nodes // 4, 1)
        while True:
            total = torch.zeros_like(first)
            for t, weight in zip(*points(self.rule, nodes), strict=True):
                self.set({name: torch.lerp(before[name], after[name], float(t)) for name in self.params})
                total += float(weight) * self.engine.jvp(x, change, _BATCH)[:, :, 0]
            if float((total - (last - first)).abs().max()) <= bound:
                return nodes
            if 2 * nodes > MOST:
                got = f"an error above {self.tolerance:g} of the outputs with {nodes} nodes in a step"
                fix = 'Use integration="secant", which is exact; kinks (ReLU) make quadrature slow.'
                raise refusal("tolerance", got=got, expected="an integral that converges", fix=fix)
            nodes *= 2


def check_integration(integration: str, rule: str, nodes: int, tolerance: float | None) -> None:
    """Refuse settings that name no integration."""
    for label, value, kind in (("integration", integration, Integration), ("rule", rule, Quadrature)):
        if value not in (names := get_args(kind)):
            raise refusal(label, got=repr(value), expected=" or ".join(names), fix=nearest(str(value), names))
    fix = "8 are enough for smooth networks."
    nodes = as_integer(nodes, "nodes", f"an integer from 1 to {MOST}", fix, least=1, most=MOST)
    if tolerance is not None:
        expected, fix = "0 < tolerance < 1, or None", "None keeps the number of nodes fixed."
        as_number(tolerance, "tolerance", lambda t: 0 < t < 1, expected, fix)


def points(rule: str, nodes: int) -> tuple[Any, Any]:
    """Nodes in [0, 1] and weights that sum to 1.

    Examples
    --------
    >>> t, w = points("gauss", 4)
    >>> bool(abs((w * t**7).sum() - 1 / 8) < 1e-15)
    True
    >>> points("midpoint", 2)[0].tolist()
    [0.25, 0.75]
    """
    if rule == "midpoint":
        return (np.arange(nodes) + 0.5) / nodes, np.full(nodes, 1 / nodes)
    t, w = np.polynomial.legendre.leggauss(nodes)
    return (t + 1) / 2, w / 2
