"""Numbers that a user's modules keep and that stand for a hidden width: those that must grow with it.

A forward pass may use ``self.head_dim`` in a reshape or in the scale of attention. Two runs tell: the sizes of the axes
that grow from the network to its larger copy. A number that equals one of them stands for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.networks.paired_runs import MAKE, MISFITS, Runs, copied

_ROOTS = (-0.5, 0.5)
_POWERS = (1.0, -1.0, *_ROOTS)
_WIDTH = re.compile(r"dim|size|width|hidden|model|chan|feat|embd|units|^d|^n_?(in|out|hid)")  # names of widths
_HEAD = re.compile(r"head\w*(dim|size|width|feat|chan)|(dim|size|width|feat|chan|^d)\w*head|^d_?[hkqv]$|^hs$")
_HEADS = re.compile(r"^(n|nb|num)_?\w*heads?$|^heads?$")  # how many heads: they do not grow
_COUNT = re.compile(r"step|iter|depth|layer|head|group|class|block|time|len|seq|tok|patch|kernel|window|stride|rank")
_SCALE = re.compile(r"scal|sqrt|temperature|norm_factor|^inv|_inv")


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


def whole_numbers(network: nn.Module, widths: set[int]) -> list[Number]:
    """Integers of the user's modules that equal a hidden width or divide it."""
    return [
        number
        for number, value in _numbers(network)
        if type(value) is int and any(width % value == 0 for width in widths)
    ]


def sets_to_try(numbers: Sequence[Number], network: nn.Module, widths: set[int]) -> Iterator[list[Number]]:
    """Sets of attributes that may have to grow: sizes of heads, none, those that equal a width or are named so, others.

    Sizes of heads are first: in a reshape to (-1, size) the number of heads would grow without an error.
    """
    numbers = [n for n in numbers if not _HEADS.search(n.attribute)]
    if heads := [n for n in numbers if _HEAD.search(n.attribute)]:
        yield heads
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
    network: nn.Module, larger: nn.Module, example: Tensor, runs: Runs, grown: Sequence[Number]
) -> list[Number]:
    """Numbers that stand for an axis that grew and did not grow with it, as far as they matter.

    Raises
    ------
    Refused
        For a number that may stand for an axis that grew or for something else.
    """
    known = {(n.module, n.attribute) for n in grown}
    found = []
    for number, value in _numbers(network):
        if number[:2] in known or _HEADS.search(number.attribute):
            continue
        scale = bool(_SCALE.search(number.attribute))
        choice = _ROOTS if scale else (1.0,) if type(value) is int else _POWERS
        if scale and not _powers(value, runs.grew, choice):
            choice = _POWERS
        powers = _powers(value, runs.grew, choice)
        if not powers or not _matters(larger, number, example):
            continue
        beside = {
            int(getattr(network.get_submodule(n.module), n.attribute)) for n in grown if n.module == number.module
        }
        if scale and (roots := _powers(value, beside, _ROOTS)):  # of a size beside it that grew
            found.append(Number(*number[:2], roots.pop()))
            continue
        others = _powers(value, runs.stayed - {1}, choice)
        if len(powers) > 1 or others or not _is_clear(number.attribute, value, *powers):
            where = f"layer '{number.module}'" if number.module else "the model"
            got = f"the number '{number.attribute}' = {value:g}, which may depend on a hidden width"
            raise refusal(where, got=got, expected="numbers whose growth is clear", fix=MAKE)
        found.append(Number(*number[:2], powers.pop()))
    return found


def check_numbers(runs: Runs) -> None:
    """Refuse factors in the forward pass that may stand for an axis that grew: constants, and numbers out of reach."""
    for value in runs.factors:
        choice = (1.0, -1.0) if isinstance(value, int) else _POWERS  # a root is computed in floating point
        if value != 1 and _powers(abs(value), runs.grew, choice):
            got = f"a factor {value:g} in its forward pass, which may depend on a hidden width"
            fix = f"If it does, keep it as a number of a module, 'scale' for instance. If not: {MAKE}"
            raise refusal("the model", got=got, expected="factors whose growth is clear", fix=fix)


def _powers(value: float, sizes: set[int], choice: tuple[float, ...]) -> set[float]:
    return {p for n in sizes for p in choice if math.isclose(value, n**p, rel_tol=1e-6)}


def _is_clear(attribute: str, value: float, power: float) -> bool:
    """Whether a number stands for a width: by its name, or as a root that nobody writes by hand."""
    if power == 1:
        return bool(_WIDTH.search(attribute)) or not _COUNT.search(attribute)
    if _SCALE.search(attribute) and math.log2(value).is_integer():  # 64**-0.5, but not 100**-0.5, which may be 0.1
        return True
    return abs(1000 * value - round(1000 * value)) > 1e-3


def _numbers(network: nn.Module) -> Iterator[tuple[Number, float]]:
    for name, module in network.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            for attribute, value in vars(module).items():
                if type(value) in (int, float) and value > 0 and value != 1 and math.isfinite(value):
                    yield Number(name, attribute), value


@torch.no_grad()
def _matters(network: nn.Module, number: Number, example: Tensor) -> bool:
    """Whether the output depends on a number; one that cannot grow does not stand for what grew."""
    network = copied(network).eval()
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.copy_(values / math.sqrt(max(1, p.numel() // max(1, p.shape[0] if p.dim() else 1))))
    before = network(example)
    number.grow(network, 2)
    try:
        return not torch.equal(network(example), before)
    except MISFITS:
        return False
