"""Where one step ends the next begins: results of operations at the one, kept for the other.

A sweep over a run takes its steps one after the other, and each shares an end with the step before. There every
operation has the same arguments, so its result need not be computed again. An operation is known by its name and by the
very tensors it took: their identity and their version, which a write changes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of an operation, by place and by name


class _Result(NamedTuple):
    value: Any
    versions: list[int]  # of the tensors in it
    arguments: list[Tensor]  # kept alive: as long as they are, no other tensor has their identity


class Pass:
    """One pass of a model: its inputs, and the results of its operations at the start of the step.

    Parameters
    ----------
    inputs : the tensors of the batch.
    before : a pass over the same inputs, for the step that begins where this one ends.
    limit : bytes of results to keep.
    """

    def __init__(self, inputs: Sequence[Tensor], before: Pass | None, limit: int) -> None:
        self.inputs = list(inputs)
        # of tensors that every pass has its own copy of, the batch and what is computed from it alone: until they are
        # written into
        self._names: dict[int, tuple[Any, int]] = {id(t): (("input", k), t._version) for k, t in enumerate(self.inputs)}
        self._alive: list[Tensor] = []
        self._versions = [t._version for t in self.inputs]
        self._before, self._left = before, limit
        self._results: dict[Any, list[_Result]] = {}

    def at_both_ends(self, func: Any, start: Call, end: Call) -> tuple[Any, Any]:
        """Results of an operation at the start, and at the end."""
        o1 = self._taken(func, end)
        o1 = func(*end[0], **end[1]) if o1 is None else o1
        o0 = func(*start[0], **start[1])
        self._keep(func, start, o0)
        return o0, o1

    def name_constant(self, func: Any, call: Call, value: Any) -> None:
        """Name a result that depends on no parameter by how it came about: every pass computes it again."""
        key = None if torch.Tag.nondeterministic_seeded in func.tags else self._key(func, call, self._alive)
        for k, t in enumerate(_tensors(value) if key is not None else ()):
            self._alive.append(t)
            self._names.setdefault(id(t), ((key, k), t._version))

    def close(self) -> bool:
        """Forget the pass before; whether the inputs are still what they were."""
        self._before = None
        return self._versions == [t._version for t in self.inputs]

    def _taken(self, func: Any, call: Call) -> Any:
        """The result that the pass before has for these arguments, each only once: it may be written into."""
        if self._before is None or (key := self._key(func, call, [])) is None:
            return None
        found = self._before._results.get(key)
        result = found.pop(0) if found else None
        if result is None or result.versions != [t._version for t in _tensors(result.value)]:
            return None
        return result.value

    def _keep(self, func: Any, call: Call, value: Any) -> None:
        held: list[Tensor] = []
        results = _tensors(value)
        if not func.is_view:
            self._left -= sum(t.nbytes for t in results)
        if self._left >= 0 and (key := self._key(func, call, held)) is not None:
            result = _Result(value, [t._version for t in results], held)
            self._results.setdefault(key, []).append(result)

    def _key(self, func: Any, call: Call, held: list[Tensor]) -> Any:
        """What an operation is known by; None where it writes, or has an argument that cannot be compared."""
        if func._schema.is_mutable:
            return None
        try:
            key = (func, self._name(call, held))
            hash(key)
        except TypeError:
            return None
        return key

    def _name(self, value: Any, held: list[Tensor]) -> Any:
        """The value as part of a key; its tensors are put into `held`."""
        if isinstance(value, Tensor):
            held.append(value)
            name, version = self._names.get(id(value), (None, 0))
            return name if name and version == value._version else (id(value), value._version)
        if isinstance(value, (list, tuple)):
            return tuple([self._name(v, held) for v in value])
        if isinstance(value, dict):
            return tuple([(name, self._name(v, held)) for name, v in value.items()])
        return type(value), repr(value) if isinstance(value, float) else value  # 0.0 and -0.0 are two


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in tree_leaves(value) if isinstance(t, Tensor)]


class SharedEnds:
    """The passes of one step, and those of the step before it that had an end in common with it.

    Parameters
    ----------
    limit : bytes of results to keep of all passes of a step.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._left = limit, limit
        self._before: list[Pass] = []
        self._now: list[Pass] = []

    def next_step(self, shared: bool) -> None:
        """Go to another step; `shared`: it ends where the last one began."""
        self._before, self._now = self._now if shared else [], []
        self._left = self._limit

    @contextmanager
    def one_pass(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Keep the results of a pass over these inputs, and use those of the step before."""
        before = next((p for p in self._before if _equal(p.inputs, inputs)), None)
        if before is not None:
            self._before.remove(before)
        current = Pass(inputs, before, self._left)
        _HERE.now = current
        try:
            yield
        finally:
            _HERE.now = None
        if current.close():
            self._left = max(current._left, 0)
            self._now.append(current)


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    alike = len(a) == len(b) and all(s.shape == t.shape and s.dtype == t.dtype for s, t in zip(a, b, strict=True))
    return alike and all(s.stride() == t.stride() and torch.equal(s, t) for s, t in zip(a, b, strict=True))


class _Here(threading.local):
    now: Pass | None = None  # the pass that this thread is in


_HERE = _Here()


def current_pass() -> Pass | None:
    """The pass whose results are kept, if this thread is in one."""
    return _HERE.now
