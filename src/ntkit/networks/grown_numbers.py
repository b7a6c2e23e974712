"""Numbers that a user's modules keep and that stand for a hidden width: those that must grow with it.

A forward pass may use ``self.head_dim`` in a reshape or in the scale of attention. Two runs tell: the sizes of the axes
that grow from the network to its larger copy. A number that equals one of them stands for it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ntkit.base.checks import refusal

MAKE = "Pass make=: a function of the factor that builds the network with its hidden widths times that factor."
_POWERS = (-1.0, -0.5, 0.5)
_WIDTH = re.compile(r"dim|size|width|hidden|model|chan|feat|embd|units|^d|^n_?(in|out|hid)")  # names of widths


class Number(NamedTuple):
    """An attribute of a module, and the power of the factor by which it grows."""

    module: str
    attribute: str
    power: float = 1.0

    def grow(self, network: nn.Module, factor: int) -> None:
        """Multiply it in place."""
        module = network.get_submodule(self.module)
        value = getattr(module, self.attribute)
        setattr(module, self.attribute, value * factor if self.power == 1 else value * factor**self.power)


class _Shapes(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes.extend(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def whole_numbers(network: nn.Module, widths: set[int]) -> list[Number]:
    """Integers of the user's modules that equal a hidden width or divide it."""
    return [
        number
        for number, value in _numbers(network)
        if type(value) is int and any(width % value == 0 for width in widths)
    ]


def sets_to_try(numbers: Sequence[Number], network: nn.Module, widths: set[int]) -> Iterator[list[Number]]:
    """Sets of attributes that may have to grow: none, those that equal a width, those with a width's name, others."""
    yield []
    values = {n: getattr(network.get_submodule(n.module), n.attribute) for n in numbers}
    equal = {n.attribute for n in numbers if values[n] in widths}
    alike = {n.attribute for n in numbers if _WIDTH.search(n.attribute)}
    alone = [{a} for a in sorted(equal)]
    tries = [*alone, equal, *({a} | extra for a in sorted(alike - equal) for extra in (set(), equal))]
    tries += [equal | alike, alike, *({a} for a in sorted({n.attribute for n in numbers} - equal - alike))]
    seen: list[set[str]] = [set()]
    for names in tries:
        if names not in seen:
            seen.append(names)
            yield [n for n in numbers if n.attribute in names]


def missing(
    network: nn.Module, larger: nn.Module, example: Tensor, factor: int, grown: Sequence[Number]
) -> list[Number]:
    """Numbers that stand for an axis that grew and did not grow with it, as far as they matter.

    Raises
    ------
    Refused
        For a number that may stand for an axis that grew or for one that did not.
    """
    grew, stayed = _axes(network, larger, example, factor)
    known = {(n.module, n.attribute) for n in grown}
    found = []
    for number, value in _numbers(network):
        if number[:2] in known:
            continue
        powers = {p for n in grew for p in (1.0, *_POWERS) if math.isclose(value, n**p, rel_tol=1e-6)}
        if not powers or not _matters(larger, number, example):
            continue
        others = {p for n in stayed - {1} for p in (1.0, *_POWERS) if math.isclose(value, n**p, rel_tol=1e-6)}
        if len(powers) > 1 or others or not powers <= {1.0, -0.5}:
            where = f"layer '{number.module}'" if number.module else "the model"
            got = f"the number '{number.attribute}' = {value:g}, which may depend on a hidden width"
            raise refusal(where, got=got, expected="numbers whose growth is clear", fix=MAKE)
        found.append(Number(*number[:2], powers.pop()))
    return found


def _numbers(network: nn.Module) -> Iterator[tuple[Number, float]]:
    for name, module in network.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            for attribute, value in vars(module).items():
                if type(value) in (int, float) and value > 0 and value != 1 and math.isfinite(value):
                    yield Number(name, attribute), value


def _axes(network: nn.Module, larger: nn.Module, example: Tensor, factor: int) -> tuple[set[int], set[int]]:
    """Sizes of the axes that grew, and of those that stayed, over all calls of a run."""
    runs = []
    for net in (network, larger):
        with _Shapes() as run, torch.enable_grad():
            copy.deepcopy(net).eval()(example)
        runs.append(run.shapes)
    if [len(shape) for shape in runs[0]] != [len(shape) for shape in runs[1]]:
        raise refusal("the model", got="other operations at other widths", expected="the same ones", fix=MAKE)
    grew, stayed = set(), set()
    for one, two in zip(*runs, strict=True):
        for n, m in zip(one, two, strict=True):
            (stayed if n == m else grew).add(n)
    return grew, stayed


@torch.no_grad()
def _matters(network: nn.Module, number: Number, example: Tensor) -> bool:
    """Whether the output depends on a number."""
    network = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.copy_(values / math.sqrt(max(1, p.numel() // max(1, p.shape[0] if p.dim() else 1))))
    before = network(example)
    number.grow(network, 2)
    try:
        return not torch.equal(network(example), before)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return True
