"""The linearized network: first order in the parameters, and a module that any optimizer can train."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.jacobian.model_calls import check_mode, select_parameters


class Linearized(nn.Module):
    r"""The model's first-order expansion in its parameters, around those it has now.

    .. math:: f_{lin}(x; \theta) = f(x; \theta_0) + J(x) (\theta - \theta_0)

    Made by `linearized`. The parameters to train are ``lin.parameters()``: theta, which starts at theta_0, under the
    model's own names after ``moving.``; theta_0 and all else of the model are held in ``lin.start``. The layers inside
    stay in the mode that the model was in: ``lin.train()`` does not reach them.
    """

    def __init__(self, model: nn.Module, params: Any = None) -> None:
        super().__init__()
        check_mode(model)
        _load_forward_mode()
        chosen = set(select_parameters(model, params))
        with torch.no_grad():
            self.start, self.moving = copy.deepcopy(model), copy.deepcopy(model)
        self._names = tuple(name for name, _ in model.named_parameters() if name in chosen)
        for name, p in self.moving.named_parameters():
            p.requires_grad_(name in chosen)
            p.grad = None
        _freeze(self.start)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return f_lin, [n, ...] as the model itself; differentiable in theta (and nothing of the model is changed).

        Raises
        ------
        Refused
            When the model does not return one tensor, or has an operation without forward-mode derivative (an LSTM).
        """
        now, held = dict(self.moving.named_parameters()), dict(self.start.named_buffers())

        def outputs(theta: dict[str, Tensor]) -> Tensor:
            own = {
                name: value.clone() for name, value in held.items() if name not in theta
            }  # a forward may write to them
            found = torch.func.functional_call(self.start, {**own, **theta}, args, kwargs)
            if not isinstance(found, Tensor):
                got, fix = type(found).__name__, "Wrap the model so that it returns one."
                raise refusal(f"the output of {type(self.start).__name__}", got=got, expected="a tensor", fix=fix)
            return found

        start = {name: held[name] for name in self._names}
        moved = {name: now[name] - held[name] for name in self._names}
        try:
            value, change, *_ = torch.func.jvp(outputs, (start,), (moved,))
        except NotImplementedError as error:
            raise refusal(
                f"model {type(self.start).__name__}",
                got=f"an operation without a forward-mode derivative ({str(error).splitlines()[0]})",
                expected="operations that have one",
                fix="Write that layer in plain torch operations.",
            ) from error
        return value + change

    def train(self, mode: bool = True) -> Linearized:
        """Set the flag ``training`` of this module alone: the layers inside stay as they were."""
        self.training = mode
        return self


def linearized(model: nn.Module, params: Any = None) -> Linearized:
    r"""Linearize a network in its parameters, where it stands; train the result with any optimizer.

    .. math:: f_{lin}(x; \theta) = f(x; \theta_0) + J(x) (\theta - \theta_0)

    Its tangent kernel is that of `model` at theta_0, and stays so: full-batch gradient descent on 0.5 * MSELoss follows
    ``GradientFlow(lr, momentum)`` on that kernel to rounding.

    Parameters
    ----------
    model : any ``nn.Module`` whose operations have forward-mode derivatives; copied, and left as it is. Batch norm in
        eval mode, dropout off (drop-out that is not a layer is not seen).
    params : which parameters to expand in and train, as for `TangentKernel`; None for all that require grad. The others
        stay fixed.

    Returns
    -------
    Linearized
        A module called like `model`; f_lin at theta = theta_0 is f to the last bit.

    Raises
    ------
    Refused
        For batch norm in train mode, active dropout, or no parameter to train.

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
    if not isinstance(model, nn.Module):
        raise refusal("model", got=type(model).__name__, expected="a torch.nn.Module", fix="Wrap it in a module.")
    return Linearized(model, params)


@cache
def _load_forward_mode() -> None:
    """Use forward mode once: on first use torch loads a module of its own that warns of another one's future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


def _freeze(model: nn.Module) -> None:
    """Turn every parameter into a buffer: part of the state, moved with the module, and trained by nobody."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                del module._parameters[name]
                module.register_buffer(name, made.setdefault(id(p), p.detach()))
