"""What runs of a network and of its larger copy show: the axes that grew, the numbers that multiplied, the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ntkit.base.checks import refusal

MAKE = "Pass make=: a function of the factor that builds the network with its hidden widths times that factor."
# of a run with sizes that do not fit
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, ArithmeticError, AttributeError)
_FACTORS = {
    "mul",
    "multiply",
    "rmul",
    "imul",
    "div",
    "divide",
    "true_divide",
    "truediv",
    "rtruediv",
    "itruediv",
    "rdiv",
}
_PARTS = {
    "getitem", "select", "narrow", "index_select", "gather", "take", "unbind", "split", "split_with_sizes", "topk",
}  # fmt: skip
_SUMS = {"matmul", "rmatmul", "mm", "bmm", "mv", "dot", "einsum", "linear", "addmm", "baddbmm", "tensordot"}


class Runs(NamedTuple):
    """Sizes of the axes that grew, and of those that stayed, over all calls; factors that did not grow."""

    grew: set[int]
    stayed: set[int]
    factors: list[float]


class _Call(NamedTuple):
    name: str
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    factors: list[tuple[float, bool]]  # and whether it is a parameter
    raw: str  # name of a raw parameter that the call may sum over


class _Recorder(TorchFunctionMode):
    """List the calls of a run; `raw` are parameters of the user's modules, by their address."""

    def __init__(self, raw: dict[int, str]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._raw = raw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        numbers = tree_leaves(args) if name in _FACTORS else [kwargs.get(what) for what in ("scale", "alpha", "beta")]
        factors = [pair for value in numbers if (pair := _factor(value))]
        raw = self._sums_over(name, args, inputs)
        shapes = [tuple(t.shape) for t in inputs], [tuple(t.shape) for t in outputs]
        self.calls.append(_Call(name, *shapes, factors, raw))
        return out

    def _sums_over(self, name: str, args: Any, inputs: list[Tensor]) -> str:
        if name in _SUMS:
            operands = tensors(args[1:2]) if name == "linear" else inputs
            return next((n for t in operands if (n := self._raw.get(_address(t)))), "")
        product = args[0].grad_fn if name == "sum" and args and isinstance(args[0], Tensor) else None
        if product is None or product.name() != "MulBackward0":
            return ""
        nodes = [node for node, _ in product.next_functions]
        while nodes:
            node = nodes.pop()
            variable = getattr(node, "variable", None)
            if variable is not None and _address(variable) in self._raw:
                return self._raw[_address(variable)]
            if node is not None and node.name().startswith(("Expand", "Unsqueeze", "View", "Squeeze", "Permute")):
                nodes.extend(child for child, _ in node.next_functions)
        return ""


class Outside(TorchFunctionMode):
    """Names of the layers whose weights are used while no layer is called (`depth` 0)."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.depth, self.found = 0, list[str]()
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.depth and any(t.requires_grad for t in tensors(out)):
            self.found += [self._names[id(t)] for t in tensors((args, kwargs)) if id(t) in self._names]
        return out


def copied(module: nn.Module) -> nn.Module:
    """Copy of a module that may keep tensors of its last run, as attention weights: torch does not copy these."""
    kept = [t for m in module.modules() for t in tensors(list(vars(m).values())) if not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach() for t in kept})


def tensors(values: Any) -> list[Tensor]:
    """All tensors of nested arguments or outputs, of packed sequences their data."""
    leaves = (leaf.data if isinstance(leaf, nn.utils.rnn.PackedSequence) else leaf for leaf in tree_leaves(values))
    return [t for t in leaves if isinstance(t, Tensor)]


@contextmanager
def hooks(layers: dict[str, Any], before: Callable, after: Callable) -> Iterator[None]:
    """Call ``before(name, layer, inputs)`` and ``after(name, layer, outputs)``, positional inputs first."""
    handles = []
    for n, layer in layers.items():

        def first(m: Any, x: Any, named: Any, n: str = n) -> None:
            before(n, m, tensors((x, named)))

        def then(m: Any, x: Any, y: Any, n: str = n) -> None:
            after(n, m, tensors(y))

        handles += [layer.register_forward_pre_hook(first, with_kwargs=True), layer.register_forward_hook(then)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reached(start: Any, nodes: dict[Any, str]) -> set[str]:
    """Names of the layers whose outputs a node of the autograd graph depends on."""
    found: set[str] = set()
    seen, queue = set(), [start]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            found.add(nodes[node])
        queue.extend(child for child, _ in node.next_functions)
    return found


def compared(network: nn.Module, larger: nn.Module, example: Tensor, raw: set[str]) -> Runs:
    """Runs of a network and of its larger copy, call by call.

    raw : names of the parameters of the user's own modules.

    Raises
    ------
    Refused
        For other calls at other widths, a fixed number of features out of those that grow, and a raw parameter that
        the network sums over an axis that grows: whether its entries or another number fall with the width is not
        known.
    """
    runs = _calls(network, larger, example, raw)
    if not _alike(runs):
        raise refusal("the model", got="other operations at other widths", expected="the same ones", fix=MAKE)
    grew, stayed, factors = set(), set(), []
    for one, two in zip(*runs, strict=True):
        for sizes in zip(one.outputs, two.outputs, strict=True):
            for n, m in zip(*sizes, strict=True):
                (stayed if n == m else grew).add(n)
        results = [_growth([a], [b]) for a, b in zip(one.outputs, two.outputs, strict=True)]
        if one.name in _PARTS and any(result < 0.99 * _growth(one.inputs[:1], two.inputs[:1]) for result in results):
            got = f"a fixed number of features out of those that grow, in a call of '{one.name}'"
            raise refusal("the model", got=got, expected="calls on all features, or on a share of them", fix=MAKE)
        _check_sum(one, two)
        for (value, of), (other, _) in zip(one.factors, two.factors, strict=True):
            factors += [value] if of or value == other else []
    return Runs(grew, stayed, factors)


def check_sums(network: nn.Module, larger: nn.Module, example: Tensor, raw: set[str]) -> None:
    """Refuse a raw parameter that is summed over an axis that grows, of a larger copy that the user made.

    Copies with other calls (more heads in a loop) cannot be compared call by call.
    """
    runs = _calls(network, larger, example, raw)
    for one, two in zip(*runs, strict=True) if _alike(runs) else ():
        _check_sum(one, two)


def _calls(network: nn.Module, larger: nn.Module, example: Tensor, raw: set[str]) -> list[list[Any]]:
    runs = []
    for net in (network, larger):
        net = copied(net).eval().requires_grad_(True)
        with _Recorder({_address(p): n for n, p in net.named_parameters() if n in raw}) as run, torch.enable_grad():
            net(example)
        runs.append(run.calls)
    return runs


def _alike(runs: list[list[Any]]) -> bool:
    one, two = ([(c.name, len(c.inputs), [len(s) for s in c.outputs], len(c.factors)) for c in run] for run in runs)
    return one == two


def _check_sum(one: Any, two: Any) -> None:
    growth = _growth(one.inputs, two.inputs)
    if one.raw and any(_growth([a], [b]) < 0.99 * growth for a, b in zip(one.outputs, two.outputs, strict=True)):
        got, expected = "a sum over features that grow", "weights of torch's own layers, or no sum over them"
        raise refusal(f"parameter '{one.raw}'", got=got, expected=expected, fix="Write the sum as nn.Linear.")


def _growth(one: list[tuple[int, ...]], two: list[tuple[int, ...]]) -> float:
    return math.prod(math.prod(b) / max(1, math.prod(a)) for a, b in zip(one, two, strict=True))


def _factor(value: Any) -> tuple[float, bool] | None:
    if isinstance(value, Tensor):
        return (value.detach().item(), value.requires_grad) if value.numel() == 1 and value.grad_fn is None else None
    return (value, False) if type(value) in (int, float) else None


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
