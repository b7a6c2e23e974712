"""What the self-check establishes of a model's graph, and the two ways in which it can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ntkit.jacobian.ownership import Owner
from ntkit.jacobian.pairs import Block, Place

PROBE = 3  # samples that a structure is established on: odd, and more than two, so that a foreign row shows


class SelfCheckError(RuntimeError):
    """The fast path disagreed with plain autograd on the user's model. No result is returned."""


class Irregular(Exception):
    """A batch in which the rows of some parameters do not follow the established layout: plan these again.

    A signal between modules of the engine: it never reaches the user.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class Part:
    """Shape of one pair of factors (see `jacobian.pairs.Pair`): T positions, sizes, which side is the data's, where."""

    positions: int
    l: int  # noqa: E741 (the formula's own letter)
    r: int
    data_left: bool
    index: bool
    block: Block | None

    @property
    def data(self) -> int:
        """Size of the data factor."""
        return self.l if self.data_left else self.r

    @property
    def cotangent(self) -> int:
        """Size of the cotangent factor."""
        return self.r if self.data_left else self.l


@dataclass(frozen=True)
class Size:
    """Shape of one parameter's gradient: its entries, and its pairs of factors; none if it comes in entries only."""

    entries: int
    parts: tuple[Part, ...] = ()

    @property
    def positions(self) -> int:
        """Positions of all pairs; 0 if the gradient comes in entries only."""
        return sum(part.positions for part in self.parts)


@dataclass(frozen=True)
class ExpectedGraph:
    """The graph that a batch of any size should have: names of its nodes, and their shapes, linear in that size."""

    names: tuple[str, ...]
    two: tuple[tuple[int, ...], ...]  # shapes of each node's results, one behind the other, for two samples
    more: tuple[tuple[int, ...], ...]  # what one more sample adds

    def size_that_tells(self, n: int) -> int:
        """A batch size at which this graph differs from one with two axes swapped: n, unless an axis has that size."""
        fixed = self._fixed
        return n if n not in fixed else next(m for m in range(2, len(fixed) + 3) if m not in fixed)

    @cached_property
    def _fixed(self) -> set[int]:
        """Sizes of axes that do not grow with the batch, of results with one that does."""
        return {s for two, more in zip(self.two, self.more, strict=True) if any(more)
                for s, step in zip(two, more, strict=True) if not step}  # fmt: skip

    def fits(self, names: tuple[str, ...], shapes: list[tuple[int, ...]], n: int) -> bool:
        """Whether a batch of n samples has this graph."""
        if names != self.names or [len(s) for s in shapes] != [len(s) for s in self.two]:
            return False
        return all(
            all(size == base + (n - 2) * step for size, base, step in zip(own, two, more, strict=True))
            for own, two, more in zip(shapes, self.two, self.more, strict=True)
        )


@dataclass(eq=False)
class Structure:
    """What the self-check established for one graph: valid for any batch whose graph has the same signature.

    ``watched``: uses whose owners each batch checks again, because some rows were not reached by any output of the
    samples checked, or (all uses) because rows are moved about by data.
    """

    outputs: int
    unused: set[str]
    signatures: dict[str, tuple]  # parameter -> signatures of its uses
    distinct: int  # number of different samples it was established on
    names: tuple[str, ...] = ()  # of the graph's nodes, in order
    constant: frozenset[int] = frozenset()  # which of them do not grow with the batch
    owners: dict[tuple, Owner] = field(default_factory=dict)  # (parameters, which of their uses) -> owner
    places: dict[tuple, Place | None] = field(default_factory=dict)  # ... -> where its factors belong in the parameter
    scattered: dict[str, str] = field(
        default_factory=dict
    )  # parameter -> why the owners of its rows are determined in every batch
    fallback: dict[str, str] = field(default_factory=dict)  # parameter -> why
    sizes: dict[str, Size] = field(default_factory=dict)
    shared: dict[str, str] = field(
        default_factory=dict
    )  # bias -> weight of the same layer, which has the same cotangent
    watched: set[tuple] = field(default_factory=set)
    eps: float = 0.0  # rounding of the coarsest precision anywhere in the graph
    expected: ExpectedGraph | None = None  # the whole graph by the batch's size, where it is as regular as that
    routes: set[tuple] = field(default_factory=set)  # those whose products were compared with float64
    twice: bool | None = None  # whether differentiating twice gives the Jacobian's products; None: not compared yet
    together: bool | None = None  # whether several threads may run the model at once; None: not looked at yet
    plain_rnn: bool = False  # whether fused recurrent layers are run step by step, since they hide their steps
    bytes_per_sample: int = 0  # of saved tensors and cotangents, for one output

    def exclude(self, reasons: Mapping[str, str]) -> None:
        """Send parameters to the fallback, and with them all that are behind a use of theirs."""
        self.fallback |= reasons
        waiting = list(reasons)
        while waiting:
            name = waiting.pop()
            for signature in self.signatures.get(name, ()):
                together = [other for other in signature[0] if other not in self.fallback]
                self.fallback |= dict.fromkeys(together, f"used together with {name}")
                waiting += together

    def covers(self, n: int) -> bool:
        """Whether it was established on as many different samples as n could show."""
        return self.distinct >= min(n, PROBE)


def joined(a: Structure, b: Structure) -> Structure:
    """A structure whose plan serves both sides: factors where both have them, the longer positions for the cost."""
    sizes = {}
    for name, s in a.sizes.items():
        o = b.sizes[name]
        alike = [replace(p, positions=0) for p in s.parts] == [replace(p, positions=0) for p in o.parts]
        sizes[name] = (s if s.positions >= o.positions else o) if alike else Size(s.entries)
    return replace(
        a,
        sizes=sizes,
        fallback=a.fallback | b.fallback,
        together=False if False in (a.together, b.together) else a.together,
        shared={bias: weight for bias, weight in a.shared.items() if b.shared.get(bias) == weight},
        bytes_per_sample=max(a.bytes_per_sample, b.bytes_per_sample),
    )
