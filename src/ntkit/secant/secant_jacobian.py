"""The secant Jacobian of a step: f(theta') - f(theta) = J_sec (theta' - theta), exactly, at any distance.

`Secant` is a module whose ordinary Jacobian is the secant one: it runs the model at both ends of the step and at their
mean, each operation by its rule in SECANT_RULES. So the engine contracts it as it contracts any other network.
The rules are defined in `secant_rules`, `elementwise` and `composed`; importing these modules enters them.
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

from ntkit.base.batch import count
from ntkit.base.checks import Refused, refusal
from ntkit.jacobian.model_calls import Outputs, without_fused_rnn
from ntkit.jacobian.model_outputs import reduce_outputs
from ntkit.secant import averaged, composed, secant_rules  # noqa: F401 (enters their rules into SECANT_RULES)
from ntkit.secant.secant_tensor import DISPATCH_KEYS, NoSecant, SecantTensor, aten, lift, map_structure, no_rule


class Secant(nn.Module):
    """A model between two sets of parameters, as a module: its Jacobian by ``parameters`` is the secant Jacobian.

    With theta and theta' the two ends, f the model's outputs to differentiate [n, C] and J the ordinary Jacobian of
    this module by its parameters, f(theta') - f(theta) = J (theta' - theta) (the mean-value property, by a discrete
    chain rule: linear operations are unchanged, products are differentiated at the midpoints, elementwise functions
    have the slope of their chord). For theta' = theta it is the model's own Jacobian, except that stop-gradients are
    ignored: everything that changes the outputs counts. One pass costs three forward passes.

    Parameters
    ----------
    model : any module, in eval mode; it is not changed.
    params : the parameters that change, by name (any names). Others are constants.
    outputs : "full" or a callable to one scalar per sample (see `ntkit.TangentKernel`).

    Raises
    ------
    NoSecant
        When an operation has no rule, or decides differently at the two ends (routing, rounding).

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

    # Some operations multiply several matrices in an order that depends on the batch's size (multi_dot, einsum), and
    # each order has a secant of its own: all gradients of a sample must come from one graph.
    one_graph = True

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], outputs: Outputs = "full") -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no submodule with parameters of its own
        self._outputs = outputs
        self._own = dict(params)
        self.middle = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in params.values()])
        self.params: dict[str, nn.Parameter] = dict(zip(params, self.middle, strict=True))
        self._before: dict[str, Tensor] = {name: p.detach() for name, p in params.items()}
        self._after = self._before
        self.ends: tuple[Tensor, Tensor] | None = None
        self.eval()

    def at(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Secant:
        """Set the ends of the step: tensors by parameter name, which are not changed."""
        self._before, self._after = (
            {name: _in_layout(end[name], p) for name, p in self.params.items()} for end in (before, after)
        )
        with torch.no_grad():
            for name, p in self.params.items():
                torch.lerp(self._before[name], self._after[name], 0.5, out=p)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean of the outputs at the two ends, [n, C]; ``ends`` then has the outputs at each end."""
        model, n = self._model[0], count(args if args else kwargs)
        moving = []
        for name, p in self.params.items():
            mid = p if p.requires_grad else p.detach().requires_grad_()  # the graph shows which values depend on it
            value = SecantTensor(self._before[name].detach(), self._after[name].detach(), mid)
            moving.append((self._own[name], value))
        with _LOCK, _as_operations(model, moving), _in_place_of(model, moving):
            try:
                out = reduce_outputs(model(*args, **kwargs), self._outputs, n)
            except (Refused, torch.OutOfMemoryError):
                raise
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
                raise _cannot_follow(model, error) from error
        if not isinstance(out, SecantTensor) or not out.mid.requires_grad:
            got, fix = (
                "values that depend on no parameter",
                "Look for torch.no_grad or constants in the model's forward.",
            )
            raise refusal("outputs", got=got, expected="a function of the parameters", fix=fix)
        self.ends = out.start, out.end
        return out.mid


def _in_layout(t: Tensor, like: Tensor) -> Tensor:
    """The same numbers in the same layout: a view of one end is then a view of the other."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t.detach())


_LOCK = threading.RLock()  # the parameters of the model and the switches of PyTorch are shared by all threads
_Moving = Sequence[tuple[nn.Parameter, SecantTensor]]


@contextmanager
def _in_place_of(model: nn.Module, moving: _Moving) -> Iterator[None]:
    """Put SecantTensors in the place of a model's parameters; afterwards restore the attributes of its modules.

    (`torch.func.functional_call` does not restore them in a module that is used under two names.)
    """
    by_id = {id(p): value for p, value in moving}
    modules = list(model.modules())
    owners: list[Any] = [own for m in modules for own in (vars(m), m._parameters, m._buffers) if isinstance(own, dict)]
    copies = [(own, dict(own)) for own in owners]
    try:
        for module in modules:
            for key, p in module._parameters.items():
                module._parameters[key] = by_id.get(id(p), p)  # pyrefly: ignore
        yield
    finally:
        for own, copy in copies:
            for key in own.keys() - copy.keys():
                del own[key]
            own.update((key, value) for key, value in copy.items() if own.get(key) is not value)


@contextmanager
def _as_operations(model: nn.Module, moving: _Moving) -> Iterator[None]:
    """Switch fused implementations off, so that the model calls elementary operations."""
    mha = torch.backends.mha
    fast = mha.get_fastpath_enabled()
    ids = {id(p) for p, _ in moving}
    constants = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in ids]
    with ExitStack() as stack:
        stack.callback(mha.set_fastpath_enabled, fast)
        mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(without_fused_rnn(True))  # only where needed: convolutions are slower then
        mode = SecantMode(moving, constants)
        for context in (torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), mode):
            stack.enter_context(context)
        yield


class SecantMode(TorchDispatchMode):
    """Replace parameters by their SecantTensors, however the model holds them.

    New tensors that a model creates can take values that depend on the parameters (``out = zeros(n); out[i] = h``).

    Parameters
    ----------
    moving : the parameters that change, with their SecantTensors.
    constants : the model's other tensors.
    """

    def __init__(self, moving: _Moving, constants: Iterable[Tensor]) -> None:
        super().__init__()
        self._values = {id(p): value for p, value in moving}
        self._storages = {_storage(p) for p, _ in moving} - {_storage(t) for t in constants} - {0}

    def __enter__(self) -> SecantMode:
        DISPATCH_KEYS.append((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        DISPATCH_KEYS.pop()
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Lift new tensors; leave other results as they are."""
        result = func(*self._replaced(args), **self._replaced(kwargs or {}))
        return lift(result) if func._overloadpacket in _FACTORIES and type(result) is Tensor else result

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, SecantTensor):
            if id(value) in self._values:
                return self._values[id(value)]
            if _storage(value) in self._storages:
                got = "a view of it from before the model's forward"
                raise no_rule("on a parameter", got, "views of parameters created in the forward")
            return value
        return map_structure(self._replaced, value)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else 0


_FACTORIES = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.eye, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.empty_strided,
    aten.new_empty_strided,
}  # fmt: skip


def _cannot_follow(model: nn.Module, error: Exception) -> NoSecant:
    message = refusal(
        f"model {type(model).__name__}",
        got=f"a forward that cannot be evaluated at both ends of a step ({error})",
        expected="PyTorch operations on tensors (no numpy, no lists of numbers)",
        fix='Use integration="quadrature", which only runs the model.',
    )
    return NoSecant(str(message))
