"""A tensor at both ends of a step, and between: what flows through a model when its secant Jacobian is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from ntkit.base.checks import Refused, refusal

aten = torch.ops.aten


class NoSecant(Refused):
    """A model on which no secant Jacobian can be taken: an operation without a rule, or one that jumps."""


class Ends(Tensor):
    """A tensor at both ends of a step: values ``e0`` and ``e1``, and ``mid``, their mean, with an autograd graph.

    Every operation of PyTorch on it is done at both ends and, by a rule that makes its gradient the secant one,
    between: g(e1) - g(e0) = D (e1 - e0), where D is the gradient that autograd finds in ``mid``. Of whole numbers and
    truth values (``mid`` is None) an Ends is only made where they differ between the ends; those of a comparison have
    ``chord``, 0 or 1 as a number, with the gradient that makes up their change.
    """

    e0: Tensor
    e1: Tensor
    mid: Any
    _chord: tuple[Tensor, int] | None

    @staticmethod
    def __new__(cls, e0: Tensor, e1: Tensor, mid: Tensor | None) -> Ends:
        """Wrap; the wrapper has the first end's shape and layout."""
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, e0.shape, strides=e0.stride(), dtype=e0.dtype, device=e0.device, requires_grad=False)

    def __init__(self, e0: Tensor, e1: Tensor, mid: Tensor | None) -> None:
        if mid is not None and not mid.requires_grad and not _same(e0, e1):
            raise AssertionError("a secant rule lost the gradient")
        self.e0, self.e1, self.mid, self._chord = e0, e1, mid, None

    @property
    def chord(self) -> Any:
        """As it was set, if nothing has been written into the truth values since."""
        return None if self._chord is None or self._chord[1] != self.e0._version else self._chord[0]

    @chord.setter
    def chord(self, value: Tensor) -> None:
        self._chord = (value, self.e0._version)

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do an operation at both ends and between."""
        # Rules run as code around the model would: with autograd, and with conjugate views taken for what they are.
        with torch._C._ForceDispatchKeyGuard(*AROUND[-1]), torch.no_grad():
            result = apply(func, args, kwargs or {})
        return _bare(result)

    def __repr__(self, **_: Any) -> str:  # pyrefly: ignore[bad-override]
        """Shape only."""
        return f"Ends({list(self.shape)}, {self.dtype})"


Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}  # overload packet -> rule(func, args, kwargs) -> result
DECIDED: dict[Rule, int] = {}  # rules that can do with truth values that differ between the ends, and as which argument
AROUND: list[tuple[Any, Any]] = []  # keys of the dispatcher that are on and off around the models being run


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Make a function the rule of these operations (overload packets of ``torch.ops.aten``)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def apply(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation on arguments some of which are Ends."""
    special, known, known_of_two = _facts(func)
    if special is not None:
        return special(func, args, kwargs)
    found = varying(args, kwargs)
    if len(found) > 1 and len({_moves(e) for e in found}) > 1:
        args, kwargs = (_without_constants(value) for value in (args, kwargs))
        found = varying(args, kwargs)
    known = known_of_two if len(found) <= 2 else known
    if any(e.mid is None for e in found):
        place = DECIDED.get(known) if known is not None else None
        if any(e.mid is None for k, a in enumerate(args) if k != place for e in varying(a)):
            return _of_decisions(func, args, kwargs, found)
    if known is not None:
        return known(func, args, kwargs)
    o0, o1 = both(func, args, kwargs)
    if not any(fractional(t) for t in _flat(o0)):
        return decisions(func, o0, o1)
    if not any(_moves(e) for e in found):
        return lifted(o0)
    result = _decomposed(func, args, kwargs)
    for found, wanted in ((at(result, "e0"), o0), (at(result, "e1"), o1)):
        if not all(_close(a, b) for a, b in zip(_flat(found), _flat(wanted), strict=True) if fractional(b)):
            raise no_rule(func, "a decomposition that gives other values")
    return result


@cache
def _facts(func: Any) -> tuple[Rule | None, Rule | None, Rule | None]:
    """What to do with an operation at once; its rule; and that for one or two Ends: an elementwise function has one."""
    if func._overloadpacket is torch.ops.prim.device:
        return (lambda _, args, kwargs: args[0].e0.device), None, None
    if torch.Tag.nondeterministic_seeded in func.tags:
        return by_chance, None, None
    known = RULES.get(func._overloadpacket)
    return (
        _in_place if func._schema.is_mutable else None,
        known,
        RULES[None] if known is None and torch.Tag.pointwise in func.tags else known,
    )


def at(value: Any, end: str) -> Any:
    """Arguments at one end: ``"e0"``, ``"e1"``, or between: ``"mid"``."""
    if isinstance(value, Ends):
        return getattr(value, end)
    if isinstance(value, (list, tuple)):
        return _rebuilt(value, (at(v, end) for v in value))
    return value


def both(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """An operation's values at both ends."""
    if kwargs:
        k0, k1 = ({name: at(v, end) for name, v in kwargs.items()} for end in ("e0", "e1"))
        return func(*at(args, "e0"), **k0), func(*at(args, "e1"), **k1)
    return func(*at(args, "e0")), func(*at(args, "e1"))


def between(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the values between, with an autograd graph."""
    with torch.enable_grad():
        return func(*at(args, "mid"), **{name: at(v, "mid") for name, v in kwargs.items()})


def paired(func: Any, o0: Any, o1: Any, mid: Any) -> Any:
    """Results as Ends, in the structure they have; what is no number with a fraction passes if it is the same."""
    if isinstance(o0, Tensor):
        return Ends(o0, o1, mid) if fractional(o0) else decisions(func, o0, o1)
    if isinstance(o0, (list, tuple)):
        return _rebuilt(o0, (paired(func, *three) for three in zip(o0, o1, mid, strict=True)))
    return decisions(func, o0, o1)


def combined(value0: Tensor, value1: Tensor, *terms: tuple[Tensor | float, Tensor]) -> Ends:
    """An Ends with these values whose gradient is that of sum_k coefficient_k * mid_k."""
    with torch.enable_grad():
        total = None
        for coefficient, mid in terms:
            term = coefficient * mid
            total = term if total is None else total + term
    assert total is not None
    return settled(value0, value1, total)


def settled(o0: Tensor, o1: Tensor, mid: Tensor) -> Ends:
    """An Ends whose value between is the mean of the ends, whatever the operation on the means gave.

    The graph that made it is kept: no operation used here looks at its own result in its backward pass.
    """
    if mid.stride() != o0.stride():
        mid.data = torch.empty_like(o0)  # whoever takes a view of the first end takes it of this
    torch.mul(o0, 0.5, out=mid.data).add_(o1, alpha=0.5)  # of two equal infinities, too
    return Ends(o0, o1, mid)


def lifted(values: Any) -> Any:
    """Values that are the same at both ends, as Ends that can take in what varies."""
    if isinstance(values, Tensor):
        return Ends(values, values.clone(), values.clone()) if fractional(values) else values
    if isinstance(values, (list, tuple)):
        return _rebuilt(values, (lifted(v) for v in values))
    return values


def varying(*values: Any) -> list[Ends]:
    """All Ends among arguments."""
    found: list[Ends] = []
    for value in values:
        if isinstance(value, Ends):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += varying(*value)
        elif isinstance(value, dict):
            found += varying(*value.values())
    return found


# ---------------------------------------------------------------------- whole numbers and truth values


def decisions(func: Any, o0: Any, o1: Any) -> Any:
    """Whole numbers and truth values: plain where they agree, but for views, which may be written into."""
    if isinstance(o0, Tensor):
        if o0.shape != o1.shape:
            raise jumps(func)
        return o0 if torch.equal(o0, o1) and not func.is_view else Ends(o0, o1, None)
    if isinstance(o0, (list, tuple)):
        return _rebuilt(o0, (decisions(func, a, b) for a, b in zip(o0, o1, strict=True)))
    if o0 != o1:
        raise jumps(func)
    return o0


_COUNTED = {aten.mul, aten.add, aten.sub, aten.rsub, aten.div, aten._to_copy}  # take truth values for 0 and 1
_SHAPED = {
    aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.expand, aten.permute, aten.transpose, aten.t,
    aten.slice, aten.select, aten.clone, aten.alias, aten.detach,
}  # fmt: skip


def _of_decisions(func: Any, args: Any, kwargs: Any, found: list[Ends]) -> Any:
    """An operation that takes in whole numbers or truth values that differ between the ends."""
    o0, o1 = both(func, args, kwargs)
    packet, known = func._overloadpacket, all(e.mid is not None or e.chord is not None for e in found)
    if any(fractional(t) for t in _flat(o0)):
        if not known or packet not in _COUNTED:
            raise jumps(func)
        return apply(func, *(_counted(value) for value in (args, kwargs)))
    result = decisions(func, o0, o1)
    if known and isinstance(result, Ends):
        with torch.enable_grad():
            if packet in _SHAPED:
                result.chord = func(found[0].chord, *args[1:], **kwargs)
            elif packet in (aten.logical_not, aten.bitwise_not):
                result.chord = 1 - found[0].chord
    return result


def _counted(value: Any) -> Any:
    """Truth values as numbers."""
    if isinstance(value, Ends) and value.mid is None and value.chord is not None:
        return Ends(value.e0.to(value.chord.dtype), value.e1.to(value.chord.dtype), value.chord)
    return mapped(_counted, value)


# ---------------------------------------------------------------------- refusals


def jumps(func: Any) -> NoSecant:
    """The refusal of an operation that decides something else at the two ends."""
    return _refused(
        func,
        "a choice made from the parameters that is another one at the two ends of a step",
        "a continuous function of the parameters (routing by argmax, thresholds and rounding are not)",
        "No path kernel is exact there; take smaller steps, or leave the routing out.",
    )


_KNOWN = "an operation of ntkit.secant.secant_rules, or one that PyTorch decomposes into such"


def no_rule(func: Any, got: str = "no secant rule for it", expected: str = _KNOWN) -> NoSecant:
    """The refusal of an operation without a rule."""
    return _refused(func, got, expected, 'Use integration="quadrature", which needs no rules.')


def by_chance(func: Any, *_: Any) -> Any:
    """The refusal of an operation that draws random numbers."""
    raise _refused(func, "random numbers", "the same function at both ends", "Call model.eval(); sample outside of it.")


def _refused(func: Any, got: str, expected: str, fix: str) -> NoSecant:
    return NoSecant(str(refusal(f"operation {func}", got=got, expected=expected, fix=fix)))


# ---------------------------------------------------------------------- parts


def fractional(t: Any) -> bool:
    """Whether something is a tensor of numbers that are not whole ones."""
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a != a)).all())


def _close(a: Tensor, b: Tensor) -> bool:
    bound = torch.finfo(a.dtype).eps ** 0.5
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, bound, bound, equal_nan=True)


def _moves(e: Ends) -> bool:
    return e.mid.requires_grad if e.mid is not None else not torch.equal(e.e0, e.e1)


def _bare(value: Any) -> Any:
    """Plain results without the autograd that rules run with; a dispatch returns none."""
    return value.detach() if type(value) is Tensor else mapped(_bare, value)


def _without_constants(value: Any) -> Any:
    if isinstance(value, Ends):
        return value if _moves(value) else value.e0
    return mapped(_without_constants, value)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with a function's values in the place of what is in it."""
    if isinstance(value, (list, tuple)):
        return _rebuilt(value, (function(v) for v in value))
    if isinstance(value, dict):
        return {name: function(v) for name, v in value.items()}
    return value


def _rebuilt(like: Any, values: Iterable[Any]) -> Any:
    return list(values) if isinstance(like, list) else tuple(values)


def _flat(o: Any) -> Iterable[Any]:
    if isinstance(o, (list, tuple)):
        for value in o:
            yield from _flat(value)
    else:
        yield o


@cache
def _table() -> dict[Any, Any]:
    from torch._decomp import core_aten_decompositions, decomposition_table

    return {**core_aten_decompositions(), **decomposition_table}


def _decomposed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation without a rule: by PyTorch's own table, until it comes down to operations that have one."""
    if func in _table():
        return _table()[func](*args, **kwargs)
    result = func.decompose(*args, **kwargs)
    if result is NotImplemented:
        raise no_rule(func)
    return result


# ---------------------------------------------------------------------- writes


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that writes to its first argument: done aside, then copied there."""
    target, name = args[0], func._schema.name.removeprefix("aten::")
    if name == "detach_":
        return target
    if not isinstance(target, Ends) or not name.endswith("_") or kwargs.get("out") is not None:
        got, expected = "a write of what the parameters move into a tensor that they do not", "one made by torch.zeros"
        raise no_rule(func, got, expected + " and its kind in the forward, or torch.cat and torch.where")
    if torch.Tag.inplace_view in func.tags:
        o0, o1 = both(func, args, kwargs)
        target.e0, target.e1, target.mid = o0, o1, between(func, args, kwargs)
        with no_dispatch():
            func(*args, **kwargs)  # the wrapper's own shape
        return target
    owner = target.mid if target.mid is None or target.mid._base is None else target.mid._base
    if owner is not None and owner.is_leaf and owner.requires_grad:
        raise no_rule(func, "a write into a parameter", "a forward that leaves its parameters alone")
    if name == "copy_":
        result = args[1]
    else:
        functional = _functional(func)
        if functional is None:
            raise no_rule(func)
        with torch.enable_grad():  # a product keeps its factors; they must not change
            aside = Ends(target.e0, target.e1, target.mid if target.mid is None else target.mid.clone())
        result = apply(functional, [aside if a is target else a for a in args], kwargs)
    if target.mid is not None:
        result = _counted(result)
        if isinstance(result, Ends) and result.mid is None:
            raise jumps(func)
        with torch.enable_grad():
            target.mid.copy_(at(result, "mid"))
    for end in ("e0", "e1"):
        getattr(target, end).copy_(at(result, end))
    return target


@cache
def _functional(func: Any) -> Any:
    """The operation that does the same and writes nowhere."""
    packet = getattr(aten, func._schema.name.removeprefix("aten::")[:-1], None)
    wanted = [str(a.type) for a in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if not found._schema.is_mutable and [str(a.type) for a in found._schema.arguments] == wanted:
            return found
    return None
