"""The linearized network: first order in the parameters, as a module that any optimizer can train."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ntkit.base.checks import refusal
from ntkit.jacobian.graph import nodes_behind
from ntkit.jacobian.model_calls import Params, check_mode, check_module, select_parameters
from ntkit.jacobian.model_outputs import Select, check_select, part_of


class Linearized(nn.Module):
    r"""The model's first-order expansion in its parameters, around their present values.

    See `linearized`. The parameters to train are ``lin.parameters()``: theta, which starts at theta_0, with the
    model's names after ``moving.``. ``lin.start`` is the model at theta_0. The layers inside stay in the model's mode:
    ``lin.train()`` does not change them.
    """

    def __init__(self, model: nn.Module, params: Params = None, *, select: Select | None = None) -> None:
        super().__init__()
        check_mode(model)
        check_select(select)
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            fix = "Pass the module from which it was scripted."
            raise refusal("model", got="a scripted module", expected="a module that runs in Python", fix=fix)
        _load_forward_mode()
        names = set(select_parameters(model, params))
        with torch.no_grad():
            self.start, self.moving = copy.deepcopy(model), copy.deepcopy(model)
        self._select = select
        self._names = tuple(name for name, _ in model.named_parameters() if name in names)
        for name, p in self.moving.named_parameters():
            p.requires_grad_(name in names)
            p.grad = None
        _freeze(self.start)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return f_lin, [n, ...] as the part of the model's output that is looked at; differentiable in theta.

        Raises
        ------
        Refused
            When that part is not one tensor, or the model has an operation without forward-mode derivative (an LSTM).
        """
        now, start = dict(self.moving.named_parameters()), dict(self.start.named_buffers())

        def outputs(theta: dict[str, Tensor]) -> Tensor:
            # copies: a forward pass may write to buffers
            rest = {name: value.clone() for name, value in start.items() if name not in theta}
            out = part_of(torch.func.functional_call(self.start, {**rest, **theta}, args, kwargs), self._select)
            if not isinstance(out, Tensor):
                got, fix = type(out).__name__, "Pick one with select=lambda out: ..., or wrap the model."
                raise refusal(f"the output of {type(self.start).__name__}", got=got, expected="a tensor", fix=fix)
            return out

        at, graph = {name: start[name] for name in self._names}, torch.is_grad_enabled()
        step = {name: now[name] - start[name] for name in self._names}
        try:
            with torch.enable_grad(), _ConstantsWithoutGrad():  # where gradients are off in there, the model wants it
                value, change, *_ = torch.func.jvp(outputs, (at,), (step,))
        except NotImplementedError as error:
            said = str(error).splitlines()[0].rstrip(".")
            got = f"an operation without a forward-mode derivative ({said})"
            expected = "operations with a forward-mode derivative"
            fix = "Write that layer with other torch operations."
            if "attention" in said:
                fix = (
                    'Compute attention step by step: attn_implementation="eager" in Transformers, else call it in '
                    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
                )
            raise refusal(f"model {type(self.start).__name__}", got=got, expected=expected, fix=fix) from error
        except RuntimeError as error:
            if "functorch" not in str(error):
                raise
            raise refusal(
                f"model {type(self.start).__name__}",
                got=f"an operation that torch.func.jvp does not take ({str(error).splitlines()[0].rstrip('.')})",
                expected="operations with a forward-mode derivative",
                fix="Write that layer with other torch operations.",
            ) from error
        self._refuse_other_ways(value, at)
        return value + change if graph else (value + change).detach()

    @staticmethod
    def _refuse_other_ways(value: Tensor, at: dict[str, Tensor]) -> None:
        """Refuse a model that takes a parameter from elsewhere than its layer, where it is still the model's own."""
        if not value.requires_grad:
            return
        leaves = [node.variable for node in nodes_behind(value) if hasattr(node, "variable")]
        reached = {leaf.data_ptr() for leaf in leaves if isinstance(leaf, nn.Parameter)}
        if names := [name for name, p in at.items() if p.numel() and p.data_ptr() in reached]:
            raise refusal(
                f"parameter '{names[0]}'",
                got="a use that is not by its layer's attribute (it is in a list or a closure, too)",
                expected="a model that looks its parameters up where they are registered",
                fix="Use nn.ParameterList, or the attribute, in its forward.",
            )

    def train(self, mode: bool = True) -> Linearized:
        """Set the flag ``training`` of this module only, not of the layers inside."""
        self.training = mode
        return self


def linearized(model: nn.Module, params: Params = None, *, select: Select | None = None) -> Linearized:
    r"""Linearize a network in its parameters, around their present values; any optimizer can train the result.

    .. math:: f_{lin}(x; \theta) = f(x; \theta_0) + J(x) (\theta - \theta_0)

    What has no gradient in the model (under `torch.no_grad`, detached, the padding row of an embedding) is constant.
    Its tangent kernel is constant, that of `model` at theta_0: full-batch gradient descent on 0.5 * MSELoss follows
    ``GradientFlow(lr, momentum)`` on that kernel to rounding.

    Parameters
    ----------
    model : any ``nn.Module`` whose operations have forward-mode derivatives; it is copied. Batch norm in eval mode, and
        no dropout (dropout that is not a layer is not detected).
    params : the parameters to expand in and train, as for `TangentKernel`; None = all that require grad. The others are
        constant.
    select : the part of the model's output that is linearized, as for `TangentKernel`; None: all of it, or its logits.

    Returns
    -------
    Linearized
        A module with the arguments of `model`; at theta_0 it has the bits of f.

    Raises
    ------
    Refused
        For batch norm in train mode, active dropout, a scripted module, or no parameter to train; when it is called,
        for operations without a forward-mode derivative, and parameters that the forward takes from elsewhere than
        their layer (a list, a closure).

    Notes
    -----
    Lee et al. (2019), "Wide Neural Networks of Any Depth Evolve as Linear Models", section 2.2. Holds two copies of the
    model.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> lin, x = linearized(model), torch.ones(3, 2)
    >>> torch.equal(lin(x), model(x))
    True
    >>> optimizer = torch.optim.SGD(lin.parameters(), lr=0.1)
    >>> lin(x).square().mean().backward(), optimizer.step()
    (None, None)
    >>> lin(x).square().mean() < model(x).square().mean()
    tensor(True)
    """
    check_module(model)
    return Linearized(model, params, select=select)


class _ConstantsWithoutGrad(TorchFunctionMode):
    """What reverse mode takes for constants are constants in forward mode, too.

    These are the results under `torch.no_grad`, and the padding row of an embedding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            with forward_ad._set_fwd_grad_enabled(False):
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is F.embedding and kwargs.get("padding_idx") is not None:
            words, weight = args[:2]
            padding = (words == kwargs["padding_idx"] % weight.shape[0])[..., None]
            out = torch.where(padding, out.detach(), out)
        return out


@cache
def _load_forward_mode() -> None:
    """Use forward mode once, without the deprecation warning of a module that torch loads on first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def _freeze(model: nn.Module) -> None:
    """Turn every parameter into a buffer, which no optimizer trains."""
    buffers: dict[int, Tensor] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                del module._parameters[name]
                module.register_buffer(name, buffers.setdefault(id(p), p.detach()))
