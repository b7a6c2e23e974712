"""A tensor at both ends of a step, and between: what flows through a model when its secant Jacobian is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from ntkit.checks import Refused, refusal

aten = torch.ops.aten


class NoSecant(Refused):
    """A model on which no secant Jacobian can be taken: an operation without a rule, or one that jumps."""


class Ends(Tensor):
    """A tensor at both ends of a step: values ``e0`` and ``e1``, and ``mid``, their mean, with an autograd graph.

    Every operation of PyTorch on it is done at both ends and, by a rule that makes its gradient the secant one,
    between: g(e1) - g(e0) = D (e1 - e0), where D is the gradient that autograd finds in ``mid``. Of whole numbers and
    truth values (``mid`` is None) an Ends is only made where they differ between the ends.
    """

    e0: Tensor
    e1: Tensor
    mid: Any

    @staticmethod
    def __new__(cls, e0: Tensor, e1: Tensor, mid: Tensor | None) -> Ends:
        """Wrap; the wrapper has the first end's shape and layout."""
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, e0.shape, strides=e0.stride(), dtype=e0.dtype, device=e0.device, requires_grad=False)

    def __init__(self, e0: Tensor, e1: Tensor, mid: Tensor | None) -> None:
        self.e0, self.e1, self.mid = e0, e1, mid

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do an operation at both ends and between."""
        return apply(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # pyrefly: ignore[bad-override]
        """Shape only."""
        return f"Ends({list(self.shape)}, {self.dtype})"


Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}  # overload packet -> rule(func, args, kwargs) -> result


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Make a function the rule of these operations (overload packets of ``torch.ops.aten``)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def apply(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation on arguments some of which are Ends."""
    if func.namespace == "prim" and func._overloadpacket is torch.ops.prim.device:
        return args[0].e0.device
    if func in _IN_PLACE or func._schema.is_mutable:
        return _in_place(func, args, kwargs)
    found = RULES.get(func._overloadpacket)
    if found is None and torch.Tag.pointwise in func.tags and len(varying(args)) == 1:
        found = RULES[None]  # elementwise, of one tensor
    if found is not None:
        if any(e.mid is None for e in varying(args, kwargs)) and found not in _DECIDED:
            raise jumps(func)
        return found(func, args, kwargs)
    o0, o1 = both(func, args, kwargs)
    if all(not t.is_floating_point() and not t.is_complex() for t in _flat(o0)):
        return _decisions(o0, o1)
    if any(e.mid is None for e in varying(args, kwargs)):
        raise jumps(func)
    return _decomposed(func, args, kwargs)


def at(value: Any, end: str) -> Any:
    """Arguments at one end: ``"e0"``, ``"e1"``, or between: ``"mid"``."""
    if isinstance(value, Ends):
        return getattr(value, end)
    if isinstance(value, (list, tuple)):
        return type(value)(at(v, end) for v in value)
    return value


def both(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """An operation's values at both ends."""
    if kwargs:
        k0, k1 = ({name: at(v, end) for name, v in kwargs.items()} for end in ("e0", "e1"))
        return func(*at(args, "e0"), **k0), func(*at(args, "e1"), **k1)
    return func(*at(args, "e0")), func(*at(args, "e1"))


def between(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the values between, with an autograd graph."""
    with enable_reentrant_dispatch(), torch.enable_grad():
        return func(*at(args, "mid"), **{name: at(v, "mid") for name, v in kwargs.items()})


def paired(o0: Any, o1: Any, mid: Any) -> Any:
    """Results as Ends, in the structure they have; what is no floating point number passes if it is the same."""
    if isinstance(o0, Tensor):
        if o0.is_floating_point() or o0.is_complex():
            return Ends(o0, o1, mid)
        return _decisions(o0, o1)
    if isinstance(o0, (list, tuple)):
        return type(o0)(paired(*three) for three in zip(o0, o1, mid, strict=True))
    return o0


def combined(value0: Tensor, value1: Tensor, *terms: tuple[Tensor | float, Tensor]) -> Ends:
    """An Ends with these values whose gradient is that of sum_k coefficient_k * mid_k."""
    with enable_reentrant_dispatch(), torch.enable_grad():
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
    torch.lerp(o0, o1, 0.5, out=mid.data)
    return Ends(o0, o1, mid)


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


def jumps(func: Any) -> NoSecant:
    """The refusal of an operation that decides something else at the two ends."""
    return NoSecant(
        str(
            refusal(
                f"operation {func}",
                got="a choice made from the parameters that is another one at the two ends of a step",
                expected="a continuous function of the parameters (routing by argmax, thresholds and rounding are not)",
                fix="No path kernel is exact there; take smaller steps, or leave the routing out.",
            )
        )
    )


def no_rule(func: Any) -> NoSecant:
    """The refusal of an operation without a rule."""
    return NoSecant(
        str(
            refusal(
                f"operation {func}",
                got="no secant rule for it",
                expected="an operation of ntkit.jacobian.secant_rules, or one that PyTorch decomposes into such",
                fix='Use integration="quadrature", which needs no rules.',
            )
        )
    )


_DECIDED: set[Rule] = set()  # rules that can do with whole numbers that differ between the ends
_IN_PLACE: set[Any] = set()


def _flat(o: Any) -> Iterable[Tensor]:
    if isinstance(o, Tensor):
        yield o
    elif isinstance(o, (list, tuple)):
        for value in o:
            yield from _flat(value)


def _decisions(o0: Any, o1: Any) -> Any:
    """Whole numbers and truth values: plain where they agree."""
    if isinstance(o0, Tensor):
        return o0 if o0.shape == o1.shape and torch.equal(o0, o1) else Ends(o0, o1, None)
    if isinstance(o0, (list, tuple)):
        return type(o0)(_decisions(a, b) for a, b in zip(o0, o1, strict=True))
    return o0


def _decomposed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation without a rule: by PyTorch's own table, until it comes down to operations that have one."""
    from torch._decomp import core_aten_decompositions, decomposition_table

    table = decomposition_table if func in decomposition_table else core_aten_decompositions()
    if func in table:
        return table[func](*args, **kwargs)
    result = func.decompose(*args, **kwargs)
    if result is NotImplemented:
        raise no_rule(func)
    return result


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that writes to its first argument: done aside, then copied there."""
    target = args[0]
    name = func._schema.name.removeprefix("aten::")
    if torch.Tag.inplace_view in func.tags:
        o0, o1 = both(func, args, kwargs)
        target.e0, target.e1, target.mid = o0, o1, between(func, args, kwargs)
        with no_dispatch():
            func(*args, **kwargs)  # the wrapper's own shape
        return target
    if not name.endswith("_") or not isinstance(target, Ends) or kwargs.get("out") is not None:
        raise no_rule(func)
    if name == "copy_":
        result = args[1]
    else:
        packet = getattr(aten, name[:-1], None)
        if packet is None or func._overloadname not in packet.overloads():
            raise no_rule(func)
        with enable_reentrant_dispatch(), torch.enable_grad():
            aside = Ends(target.e0, target.e1, target.mid.clone())  # a product keeps its factors; they must not change
        args = [aside if a is target else a for a in args]
        result = apply(getattr(packet, func._overloadname), args, kwargs)
    for end in ("e0", "e1"):
        getattr(target, end).copy_(at(result, end))
    with enable_reentrant_dispatch(), torch.enable_grad():
        target.mid.copy_(at(result, "mid"))
    return target


class Lifted(TorchDispatchMode):
    """While it is active, new tensors made inside a model can take in what varies (``out = zeros(n); out[i] = h``)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Wrap what a factory makes; pass everything else on."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in _FACTORIES and type(result) is Tensor and result.is_floating_point():
            return Ends(result, result.clone(), result.clone())
        return result


_FACTORIES = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty,
}  # fmt: skip
