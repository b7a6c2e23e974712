"""The secant Jacobian of a step: f(theta') - f(theta) = J_sec (theta' - theta), exactly, at any distance.

`Secant` is a network whose ordinary Jacobian is the secant one: it runs the model at both ends of the step and between,
each operation by a rule of `jacobian.secant_rules`. So the engine contracts it as it contracts any other network.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ntkit.jacobian.secant_composed
import ntkit.jacobian.secant_rules  # noqa: F401 (both register their rules)
from ntkit.checks import refusal
from ntkit.jacobian.ends import Ends, Lifted
from ntkit.jacobian.factors import _without_fused_rnn
from ntkit.jacobian.inputs import Outputs, count, reduce_outputs


class Secant(nn.Module):
    """A model between two sets of parameters, as a module: its Jacobian by ``parameters`` is the secant Jacobian.

    With theta and theta' the two ends, f the model's outputs to differentiate [n, C] and J the ordinary Jacobian of
    this module by its parameters, f(theta') - f(theta) = J (theta' - theta) (the mean-value property, by a discrete
    chain rule: linear operations are themselves, products are taken at the midpoints, elementwise functions give the
    slope of their chord). Where theta' = theta it is the model's own Jacobian. One pass costs three forward passes.

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
        self._before, self._after = ({name: end[name] for name in self.params} for end in (before, after))
        with torch.no_grad():
            for name, p in self.params.items():
                torch.lerp(self._before[name], self._after[name], 0.5, out=p)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs between, [n, C]: their mean at the ends; at the ends themselves they are ``ends`` afterwards."""
        ends = {id(self._own[name]): Ends(self._before[name], self._after[name], p) for name, p in self.params.items()}
        n = count(args if args else kwargs)
        with _in_place_of(self._held[0], ends), _as_operations(self._held[0]):
            raw = self._held[0](*args, **kwargs)
            out = reduce_outputs(raw, self._outputs, n)
        if not isinstance(out, Ends):
            raise refusal(
                "outputs", got="values that none of the parameters moves", expected="a function of the parameters",
                fix="Look for torch.no_grad or constants in the model's forward.",
            )  # fmt: skip
        self.ends = out.e0, out.e1
        return out.mid


_ONE = threading.RLock()


@contextmanager
def _in_place_of(model: nn.Module, by_id: Mapping[int, Any]) -> Iterator[None]:
    """Put tensors in the place of a model's parameters, wherever each is used, and the parameters back at the end.

    (`torch.func.functional_call` does not put them back in a module that is used under two names.)
    """
    slots = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if id(p) in by_id]
    recurrent = [(m, m._flat_weights) for m in model.modules() if isinstance(m, nn.RNNBase)]
    with _ONE:
        try:
            for module, key, p in slots:
                module._parameters[key] = by_id[id(p)]
            for module, weights in recurrent:
                module._flat_weights = [by_id.get(id(w), w) for w in weights]
            yield
        finally:
            for module, key, p in slots:
                module._parameters[key] = p
            for module, weights in recurrent:
                module._flat_weights = weights


@contextmanager
def _as_operations(model: nn.Module) -> Iterator[None]:
    """Fused paths off, so that a model shows the operations it is made of."""
    mha = torch.backends.mha
    fast = mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(mha.set_fastpath_enabled, fast)
        mha.set_fastpath_enabled(False)
        for context in (torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Lifted()):
            stack.enter_context(context)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_without_fused_rnn())  # not for others: convolutions are slower without
        yield
