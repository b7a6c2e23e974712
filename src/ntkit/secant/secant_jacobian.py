"""The secant Jacobian of a step: f(theta') - f(theta) = J_sec (theta' - theta), exactly, at any distance.

`Secant` is a network whose ordinary Jacobian is the secant one: it runs the model at both ends of the step and between,
each operation by a rule of `jacobian.secant_rules`. So the engine contracts it as it contracts any other network.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import ntkit.secant.composed
import ntkit.secant.secant_rules  # noqa: F401 (both register their rules)
from ntkit.base.batch import count
from ntkit.base.checks import Refused, refusal
from ntkit.jacobian.factors import _without_fused_rnn
from ntkit.jacobian.model_calls import Outputs, reduce_outputs
from ntkit.secant.secant_tensor import AROUND, Ends, NoSecant, aten, lifted, mapped, no_rule


class Secant(nn.Module):
    """A model between two sets of parameters, as a module: its Jacobian by ``parameters`` is the secant Jacobian.

    With theta and theta' the two ends, f the model's outputs to differentiate [n, C] and J the ordinary Jacobian of
    this module by its parameters, f(theta') - f(theta) = J (theta' - theta) (the mean-value property, by a discrete
    chain rule: linear operations are themselves, products are taken at the midpoints, elementwise functions give the
    slope of their chord). Where theta' = theta it is the model's own Jacobian, stop-gradients apart: what moves the
    outputs counts, detached or not. One pass costs three forward passes.

    Parameters
    ----------
    model : any module, in eval mode; used as it is, never changed.
    params : the parameters that move, by name (any names). Others are constants.
    outputs : "full" or a callable to one scalar per sample (see `ntkit.TangentKernel`).

    Raises
    ------
    NoSecant
        When an operation has no rule, or decides something else at the two ends (routing, rounding).

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    >>> params = dict(model.named_parameters())
    >>> before = {name: p.detach().clone() for name, p in params.items()}
    >>> after = {name: 3 * p + 1 for name, p in before.items()}
    >>> secant = Secant(model, params).at(before, after)
    >>> x = torch.linspace(-1, 1, 6).view(3, 2).double()
    >>> gradients = torch.autograd.grad(secant(x)[1].sum(), list(secant.params.values()))
    >>> change = sum((g * (after[n] - before[n])).sum() for g, n in zip(gradients, secant.params))
    >>> torch.allclose(change, torch.func.functional_call(model, after, x)[1].sum() - model(x)[1].sum())
    True
    """

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], outputs: Outputs = "full") -> None:
        super().__init__()
        self._held = (model,)  # not a submodule: its parameters are none of this module's
        self._outputs = outputs
        self._own = dict(params)
        self.middle = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in params.values()])
        self.params: dict[str, nn.Parameter] = dict(zip(params, self.middle, strict=True))
        self._before: dict[str, Tensor] = {name: p.detach() for name, p in params.items()}
        self._after = self._before
        self.ends: tuple[Tensor, Tensor] | None = None
        self.eval()

    def at(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Secant:
        """Take these as the ends of the step; tensors by parameter name, kept as they are."""
        self._before, self._after = (
            {name: _laid_out(end[name], p) for name, p in self.params.items()} for end in (before, after)
        )
        with torch.no_grad():
            for name, p in self.params.items():
                torch.lerp(self._before[name], self._after[name], 0.5, out=p)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs between, [n, C]: their mean at the ends; at the ends themselves they are ``ends`` afterwards."""
        model, n = self._held[0], count(args if args else kwargs)
        ends = []
        for name, p in self.params.items():
            mid = p if p.requires_grad else p.detach().requires_grad_()  # a graph tells what moves
            ends.append((self._own[name], Ends(self._before[name].detach(), self._after[name].detach(), mid)))
        with _ONE, _as_operations(model, ends), _in_place_of(model, ends):
            try:
                out = reduce_outputs(model(*args, **kwargs), self._outputs, n)
            except (Refused, torch.OutOfMemoryError):
                raise
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
                raise _cannot_follow(model, error) from error
        if not isinstance(out, Ends) or not out.mid.requires_grad:
            raise refusal(
                "outputs", got="values that none of the parameters moves", expected="a function of the parameters",
                fix="Look for torch.no_grad or constants in the model's forward.",
            )  # fmt: skip
        self.ends = out.e0, out.e1
        return out.mid


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """The same numbers in the same layout: a view of one end is then a view of the other."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t.detach())


_ONE = threading.RLock()  # at a time: what is switched and put in place is everybody's
_Moving = Sequence[tuple[nn.Parameter, Ends]]


@contextmanager
def _in_place_of(model: nn.Module, ends: _Moving) -> Iterator[None]:
    """Put Ends in the place of a model's parameters; afterwards its modules hold what they held, whatever happened.

    (`torch.func.functional_call` does not put them back in a module that is used under two names.)
    """
    by_id = {id(p): e for p, e in ends}
    modules = list(model.modules())
    owned: list[Any] = [own for m in modules for own in (vars(m), m._parameters, m._buffers) if isinstance(own, dict)]
    kept = [(own, dict(own)) for own in owned]
    try:
        for module in modules:
            for key, p in module._parameters.items():
                module._parameters[key] = by_id.get(id(p), p)  # pyrefly: ignore
        yield
    finally:
        for own, held in kept:
            for key in own.keys() - held.keys():
                del own[key]
            own.update((key, value) for key, value in held.items() if own.get(key) is not value)


@contextmanager
def _as_operations(model: nn.Module, ends: _Moving) -> Iterator[None]:
    """Fused paths off, so that a model shows the operations it is made of."""
    mha = torch.backends.mha
    fast = mha.get_fastpath_enabled()
    moving = {id(p) for p, _ in ends}
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in moving]
    with ExitStack() as stack:
        stack.callback(mha.set_fastpath_enabled, fast)
        mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_without_fused_rnn())  # not for others: convolutions are slower without
        modes = torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Lifted(ends, others)
        for context in modes:
            stack.enter_context(context)
        yield


class Lifted(TorchDispatchMode):
    """While it is active, parameters are their Ends, however a model holds them.

    New tensors made inside a model can take in what varies (``out = zeros(n); out[i] = h``).

    Parameters
    ----------
    ends : of the parameters that move, with those.
    others : tensors of the model that do not move.
    """

    def __init__(self, ends: _Moving, others: Iterable[Tensor]) -> None:
        super().__init__()
        self._ends = {id(p): e for p, e in ends}
        self._parts = {_storage(p) for p, _ in ends} - {_storage(t) for t in others} - {0}

    def __enter__(self) -> Lifted:
        AROUND.append((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        AROUND.pop()
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Wrap what a factory makes; pass everything else on."""
        result = func(*self._moved(args), **self._moved(kwargs or {}))
        return lifted(result) if func._overloadpacket in _FACTORIES and type(result) is Tensor else result

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, Ends):
            if id(value) in self._ends:
                return self._ends[id(value)]
            if _storage(value) in self._parts:
                got = "a part of it that was taken before the model's forward"
                raise no_rule("on a parameter", got, "views of parameters taken in the forward")
            return value
        return mapped(self._moved, value)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else 0


_FACTORIES = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.eye, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.empty_strided,
    aten.new_empty_strided,
}  # fmt: skip


def _cannot_follow(model: nn.Module, error: Exception) -> NoSecant:
    return NoSecant(
        str(
            refusal(
                f"model {type(model).__name__}",
                got=f"a forward that cannot be followed at both ends of a step ({error})",
                expected="operations of PyTorch on tensors (no numpy, no lists of numbers)",
                fix='Use integration="quadrature", which only runs the model.',
            )
        )
    )
