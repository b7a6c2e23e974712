"""What is known of a model's graph, and how it is said that something does not hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from ntkit.jacobian.ownership import Owner


class SelfCheckError(RuntimeError):
    """The fast path disagreed with plain autograd on the user's model. No result is returned."""


class Irregular(Exception):
    """A batch in which some parameters' rows do not follow the layout established: plan those again.

    A signal between the engine's own rooms: it never reaches the user.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class Size:
    """Shape of one parameter's gradient in factors: T positions of data [a] and cotangent [o]; T = 0 means rows."""

    positions: int
    a: int
    o: int
    entries: int
    gather: bool = False
    data_first: bool = False


@dataclass
class Structure:
    """What the self-check established for one graph: valid for any batch whose graph looks the same.

    ``watched``: rows are moved about by data, or some rows were not reached by any output of the samples checked, so
    each batch checks again who owns what.
    """

    outputs: int
    unused: set[str]
    uses: dict[str, tuple]  # parameter -> what its uses look like (`graph.signature`)
    distinct: int  # how many different samples it was established on
    owners: dict[tuple[str, int], Owner] = field(default_factory=dict)  # (parameter, which of its uses) -> owner
    fallback: dict[str, str] = field(default_factory=dict)  # parameter -> why
    sizes: dict[str, Size] = field(default_factory=dict)
    watched: bool = False
    bytes_per_sample: int = 0  # of saved tensors and cotangents, for one output
