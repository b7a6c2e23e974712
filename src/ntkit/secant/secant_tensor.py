"""A tensor with a value at both ends of a step: what flows through a model whose secant Jacobian is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

from ntkit.base.checks import Refused, refusal

aten = torch.ops.aten


class NoSecant(Refused):
    """A model without a secant Jacobian: one of its operations has no rule, or jumps between the ends."""


class SecantTensor(Tensor):
    """A tensor at both ends of a step, ``start`` and ``end``, and their mean ``mid``, which has an autograd graph.

    Every PyTorch operation on it is evaluated at both ends. A rule for the operation gives ``mid`` a graph whose
    gradient D is the secant one: g(end) - g(start) = D (end - start). For boolean and integer tensors ``mid`` is None;
    a SecantTensor of these exists only where they differ between the ends. Results of comparisons have a ``chord``: 0
    or 1 as a floating-point number, with the gradient that accounts for its change.
    """

    start: Tensor
    end: Tensor
    mid: Any
    _chord: tuple[Tensor, int] | None

    @staticmethod
    def __new__(cls, start: Tensor, end: Tensor, mid: Tensor | None) -> SecantTensor:
        """Create the wrapper, with the shape and layout of `start`."""
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, start.shape, strides=start.stride(), dtype=start.dtype, device=start.device)

    def __init__(self, start: Tensor, end: Tensor, mid: Tensor | None) -> None:
        if mid is not None and not mid.requires_grad and not _same(start, end):
            raise AssertionError("a secant rule lost the gradient")
        self.start, self.end, self.mid, self._chord = start, end, mid, None

    @property
    def chord(self) -> Any:
        """As it was set, unless the boolean values have been written into since."""
        return None if self._chord is None or self._chord[1] != self.start._version else self._chord[0]

    @chord.setter
    def chord(self, value: Tensor) -> None:
        self._chord = (value, self.start._version)

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Evaluate an operation at both ends and at the mean."""
        # Rules run as code outside the model would: with autograd, and with conjugate views resolved.
        with torch._C._ForceDispatchKeyGuard(*DISPATCH_KEYS[-1]), torch.no_grad():
            result = apply(func, args, kwargs or {})
        return _without_graph(result)

    def __repr__(self, **_: Any) -> str:  # pyrefly: ignore[bad-override]
        """Shape only."""
        return f"SecantTensor({list(self.shape)}, {self.dtype})"


Rule = Callable[..., Any]
SECANT_RULES: dict[Any, Rule] = {}  # overload packet -> rule(func, args, kwargs) -> result; None: elementwise
BOOLEAN_ARGUMENT: dict[Rule, int] = {}  # rules that accept a boolean argument that differs between the ends; which
DISPATCH_KEYS: list[tuple[Any, Any]] = []  # included and excluded by the dispatcher outside the running models


def rule(*packets: Any) -> Callable[[Rule], Rule]:
    """Enter a function into SECANT_RULES as the rule of these overload packets of ``torch.ops.aten``."""

    def register(function: Rule) -> Rule:
        SECANT_RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def apply(func: Any, args: Any, kwargs: Any) -> Any:
    """Apply one operation to arguments some of which are SecantTensors."""
    special, own_rule, rule_for_two = _rules_for(func)
    if special is not None:
        return special(func, args, kwargs)
    tensors = secant_tensors(args, kwargs)
    if len(tensors) > 1 and len({_moves(t) for t in tensors}) > 1:
        args, kwargs = (_without_constants(value) for value in (args, kwargs))
        tensors = secant_tensors(args, kwargs)
    chosen_rule = rule_for_two if len(tensors) <= 2 else own_rule
    if any(t.mid is None for t in tensors):
        place = BOOLEAN_ARGUMENT.get(chosen_rule) if chosen_rule is not None else None
        if any(t.mid is None for k, a in enumerate(args) if k != place for t in secant_tensors(a)):
            return _of_discrete(func, args, kwargs, tensors)
    if chosen_rule is not None:
        return chosen_rule(func, args, kwargs)
    o0, o1 = at_both_ends(func, args, kwargs)
    if not any(is_float(t) for t in tree_leaves(o0)):
        return discrete(func, o0, o1)
    if not any(_moves(t) for t in tensors):
        return lift(o0)
    result = _decomposed(func, args, kwargs)
    for values, expected in ((at(result, "start"), o0), (at(result, "end"), o1)):
        pairs = zip(tree_leaves(values), tree_leaves(expected), strict=True)
        if not all(_close(a, b) for a, b in pairs if is_float(b)):
            raise no_rule(func, "a decomposition that gives other values")
    return result


@cache
def _rules_for(func: Any) -> tuple[Rule | None, Rule | None, Rule | None]:
    """The special treatment of an operation, its rule, and its rule for one or two SecantTensors."""
    if func._overloadpacket is torch.ops.prim.device:
        return (lambda _, args, kwargs: args[0].start.device), None, None
    own_rule = SECANT_RULES.get(func._overloadpacket)
    if torch.Tag.nondeterministic_seeded in func.tags:
        return (random_numbers, None, None) if own_rule is None else (None, own_rule, own_rule)
    elementwise = own_rule is None and torch.Tag.pointwise in func.tags
    return (
        _in_place if func._schema.is_mutable else None,
        own_rule,
        SECANT_RULES[None] if elementwise else own_rule,
    )


def at(value: Any, point: str) -> Any:
    """Arguments at ``"start"``, ``"end"`` or ``"mid"``."""
    return getattr(value, point) if isinstance(value, SecantTensor) else map_structure(partial(at, point=point), value)


def at_both_ends(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """An operation's values at both ends."""
    return func(*at(args, "start"), **at(kwargs, "start")), func(*at(args, "end"), **at(kwargs, "end"))


def at_mid(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the means, with an autograd graph."""
    with torch.enable_grad():
        return func(*at(args, "mid"), **at(kwargs, "mid"))


def from_mid(func: Any, o0: Any, o1: Any, mid: Any) -> Any:
    """Results as SecantTensors, in their structure; boolean and integer tensors as by `discrete`."""
    if isinstance(o0, Tensor):
        return SecantTensor(o0, o1, mid) if is_float(o0) else discrete(func, o0, o1)
    if isinstance(o0, (list, tuple)):
        return _rebuilt(o0, (from_mid(func, *parts) for parts in zip(o0, o1, mid, strict=True)))
    return discrete(func, o0, o1)


def from_slopes(value0: Tensor, value1: Tensor, *terms: tuple[Tensor | float, Tensor]) -> SecantTensor:
    """A SecantTensor with these values whose gradient is that of sum_k slope_k * mid_k."""
    with torch.enable_grad():
        (slope, mid), *rest = terms
        total = slope * mid
        for slope, mid in rest:
            total = total + slope * mid
    return from_graph(value0, value1, total)


def from_graph(o0: Tensor, o1: Tensor, mid: Tensor) -> SecantTensor:
    """A SecantTensor with the graph of `mid`, whose values are replaced by the mean of the ends.

    No operation used here reads its own result in its backward pass, so that this is safe.
    """
    if mid.stride() != o0.stride():
        mid.data = torch.empty_like(o0)  # a view of `start` is then a view of `mid`, too
    torch.mul(o0, 0.5, out=mid.data).add_(o1, alpha=0.5)  # exact for two equal infinities, too
    return SecantTensor(o0, o1, mid)


def lift(values: Any) -> Any:
    """Values that are the same at both ends, as SecantTensors into which the model can write."""
    if is_float(values):
        return SecantTensor(values, values.clone(), values.clone())
    return values if isinstance(values, Tensor) else map_structure(lift, values)


def secant_tensors(*values: Any) -> list[SecantTensor]:
    """All SecantTensors among arguments."""
    tensors: list[SecantTensor] = []
    for value in values:
        if isinstance(value, SecantTensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += secant_tensors(*value)
        elif isinstance(value, dict):
            tensors += secant_tensors(*value.values())
    return tensors


# ---------------------------------------------------------------------- boolean and integer tensors


def discrete(func: Any, o0: Any, o1: Any) -> Any:
    """Boolean and integer results: plain if they agree at the ends, except views, which may be written into."""
    if isinstance(o0, Tensor):
        if o0.shape != o1.shape:
            raise jump(func)
        return o0 if torch.equal(o0, o1) and not func.is_view else SecantTensor(o0, o1, None)
    if isinstance(o0, (list, tuple)):
        return _rebuilt(o0, (discrete(func, a, b) for a, b in zip(o0, o1, strict=True)))
    if o0 != o1:
        raise jump(func)
    return o0


_ARITHMETIC = {aten.mul, aten.add, aten.sub, aten.rsub, aten.div, aten._to_copy}  # take booleans as 0 and 1
_VIEWS = {
    aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.expand, aten.permute, aten.transpose, aten.t,
    aten.slice, aten.select, aten.clone, aten.alias, aten.detach,
}  # fmt: skip


def _of_discrete(func: Any, args: Any, kwargs: Any, tensors: list[SecantTensor]) -> Any:
    """An operation on boolean or integer tensors that differ between the ends."""
    o0, o1 = at_both_ends(func, args, kwargs)
    packet, has_chords = func._overloadpacket, all(t.mid is not None or t.chord is not None for t in tensors)
    if any(is_float(t) for t in tree_leaves(o0)):
        if not has_chords or packet not in _ARITHMETIC:
            raise jump(func)
        return apply(func, *(_as_floats(value) for value in (args, kwargs)))
    result = discrete(func, o0, o1)
    if has_chords and isinstance(result, SecantTensor):
        with torch.enable_grad():
            if packet in _VIEWS:
                result.chord = func(tensors[0].chord, *args[1:], **kwargs)
            elif packet in (aten.logical_not, aten.bitwise_not):
                result.chord = 1 - tensors[0].chord
    return result


def _as_floats(value: Any) -> Any:
    """Boolean values as numbers."""
    if isinstance(value, SecantTensor) and value.mid is None and value.chord is not None:
        return SecantTensor(value.start.to(value.chord.dtype), value.end.to(value.chord.dtype), value.chord)
    return map_structure(_as_floats, value)


# ---------------------------------------------------------------------- refusals


def jump(func: Any) -> NoSecant:
    """The refusal of an operation that decides differently at the two ends."""
    return _refusal(
        func,
        "a choice made from the parameters that differs between the two ends of a step",
        "a continuous function of the parameters (routing by argmax, thresholds and rounding are not)",
        "No path kernel is exact for such a model. Take smaller steps, or remove the routing.",
    )


_EXPECTED = "an operation of ntkit.secant.secant_rules, or one that PyTorch decomposes into these"


def no_rule(func: Any, got: str = "no secant rule for it", expected: str = _EXPECTED) -> NoSecant:
    """The refusal of an operation without a rule."""
    return _refusal(func, got, expected, 'Use integration="quadrature", which needs no rules.')


def random_numbers(func: Any, *_: Any) -> Any:
    """Refuse an operation that draws random numbers."""
    fix = "Call model.eval(), and sample outside the model."
    raise _refusal(func, "random numbers", "the same function at both ends", fix)


def _refusal(func: Any, got: str, expected: str, fix: str) -> NoSecant:
    return NoSecant(str(refusal(f"operation {func}", got=got, expected=expected, fix=fix)))


# ---------------------------------------------------------------------- helpers


def is_float(t: Any) -> bool:
    """Whether it is a tensor of floating-point or complex numbers."""
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def named_arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operation by the names in its schema."""
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a != a)).all())


def _close(a: Tensor, b: Tensor) -> bool:
    bound = torch.finfo(a.dtype).eps ** 0.5
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, bound, bound, equal_nan=True)


def _moves(t: SecantTensor) -> bool:
    return t.mid.requires_grad if t.mid is not None else not torch.equal(t.start, t.end)


def _without_graph(value: Any) -> Any:
    """Plain tensors without the autograd graph of the rules; a dispatch function returns none."""
    return value.detach() if type(value) is Tensor else map_structure(_without_graph, value)


def _without_constants(value: Any) -> Any:
    if isinstance(value, SecantTensor):
        return value if _moves(value) else value.start
    return map_structure(_without_constants, value)


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the items of a list, tuple or dict; other values are returned as they are."""
    if isinstance(value, (list, tuple)):
        return _rebuilt(value, map(function, value))
    if isinstance(value, dict):
        return {name: function(v) for name, v in value.items()}
    return value


def _rebuilt(like: Any, values: Iterable[Any]) -> Any:
    return list(values) if isinstance(like, list) else tuple(values)


@cache
def _decompositions() -> dict[Any, Any]:
    from torch._decomp import core_aten_decompositions, decomposition_table

    return {**core_aten_decompositions(), **decomposition_table}


def _decomposed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation without a rule, by PyTorch's decomposition into operations that have one."""
    if func in _decompositions():
        return _decompositions()[func](*args, **kwargs)
    result = func.decompose(*args, **kwargs)
    return SECANT_RULES["other"](func, args, kwargs) if result is NotImplemented else result


# ---------------------------------------------------------------------- writes


def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that writes into its first argument: its functional form, then a copy."""
    target, name = args[0], func._schema.name.removeprefix("aten::")
    if name == "detach_":
        return target
    if not isinstance(target, SecantTensor) or not name.endswith("_") or kwargs.get("out") is not None:
        got = "a write of values that depend on the parameters into a tensor that does not"
        expected = "a tensor created in the forward by torch.zeros or a similar function, torch.cat or torch.where"
        raise no_rule(func, got, expected)
    if torch.Tag.inplace_view in func.tags:
        (target.start, target.end), target.mid = at_both_ends(func, args, kwargs), at_mid(func, args, kwargs)
        with no_dispatch():
            func(*args, **kwargs)  # the wrapper's own shape
        return target
    owner = target.mid if target.mid is None or target.mid._base is None else target.mid._base
    if owner is not None and owner.is_leaf and owner.requires_grad:
        raise no_rule(func, "a write into a parameter", "a forward that does not change its parameters")
    if name == "copy_":
        result = args[1]
    else:
        functional = _functional(func)
        if functional is None:
            raise no_rule(func)
        with torch.enable_grad():  # a product saves its factors for the backward pass: they must not change
            mid = target.mid if target.mid is None else target.mid.clone()
            copy = SecantTensor(target.start, target.end, mid)
        result = apply(functional, [copy if a is target else a for a in args], kwargs)
    if target.mid is not None:
        result = _as_floats(result)
        if isinstance(result, SecantTensor) and result.mid is None:
            raise jump(func)
        with torch.enable_grad():
            target.mid.copy_(at(result, "mid"))
    for point in ("start", "end"):
        getattr(target, point).copy_(at(result, point))
    return target


@cache
def _functional(func: Any) -> Any:
    """The overload that computes the same and writes nowhere."""
    packet = getattr(aten, func._schema.name.removeprefix("aten::")[:-1], None)
    types = [str(a.type) for a in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        if not candidate._schema.is_mutable and [str(a.type) for a in candidate._schema.arguments] == types:
            return candidate
    return None
