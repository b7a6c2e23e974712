"""Updates of SGD, Adam and AdamW as linear functions of gradients and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ntkit.base.checks import refusal
from ntkit.base.numbers import as_number

OptimizerClass = type[SGD] | type[Adam]  # AdamW is a subclass of Adam

_CLASSES: dict[str, OptimizerClass] = {f"{c.__module__}.{c.__qualname__}": c for c in (SGD, Adam, AdamW)}


class Moments(NamedTuple):
    """Adam's state after a step, where the second moments are not to count as constants.

    u = - rate * mean / (sqrt(largest / correction) + eps), square_{s+1} = beta2 square_s + (1 - beta2) d_s^2, and
    largest = square_{s+1}, or with amsgrad its maximum so far.
    """

    mean: Tensor
    square: Tensor
    largest: Tensor
    rate: float | Tensor
    correction: float | Tensor
    eps: float
    beta2: float


@dataclass(frozen=True)
class Update:
    """One parameter's update u_s = theta_{s+1} - theta_s, as a linear function of gradients g and parameters theta.

    With b the optimizer's buffer (momentum, or Adam's mean gradient; zero before its first use):

    d_s = gradient * g_s + coupled * theta_s
    b_{s+1} = carry * b_s + entering * d_s
    u_s = - direct * d_s - buffered * b_{s+1} - decoupled * theta_s

    A parameter that got no gradient keeps its value and its buffer.

    Attributes
    ----------
    gradient : factor of the gradient: clipping, times -1 where the optimizer maximizes.
    coupled : weight decay that goes through the gradient (L2).
    carry : factor of the previous buffer; 0 without one, and at its first use.
    entering : factor of d_s in the buffer: 1 - dampening (1 at the first use), 1 - beta1 for Adam; 0 without one.
    direct : learning rate of d_s itself, without momentum and with Nesterov's; else 0.
    buffered : learning rate of the buffer; for Adam an elementwise tensor, lr / ((1 - beta1^t) (sqrt(vhat) + eps)).
        Adam's second moments depend on the gradients, too: here they are constants.
    decoupled : learning rate times weight decay, where it acts on the parameter itself (AdamW); else 0.
    moments : Adam's, if asked for.
    """

    gradient: float
    coupled: float
    carry: float
    entering: float
    direct: float
    buffered: float | Tensor
    decoupled: float
    moments: Moments | None = None


def optimizer_class(name: str) -> OptimizerClass:
    """Optimizer with this class name, as in ``run.json``; refuse any other, also a subclass: its update may differ."""
    if name not in _CLASSES:
        fix = "Train with one of these; the updates of others are not implemented as functions of each gradient."
        raise refusal("optimizer", got=name, expected="torch.optim.SGD, Adam or AdamW itself", fix=fix)
    return _CLASSES[name]


def build_optimizer(settings: Mapping[str, Any], params: Mapping[str, nn.Parameter]) -> Optimizer:
    """Optimizer without state, with ``settings["optimizer"]`` of a run, for these parameters by name."""
    groups = settings["groups"]
    opt = optimizer_class(settings["class"])([{"params": [params[name] for name in g["params"]]} for g in groups])
    for group, values in zip(opt.param_groups, groups, strict=True):
        for name in group.keys() & (values.keys() - {"params"}):
            value = values[name]
            group[name] = tuple(value) if isinstance(value, list) else value
        if group.get("capturable") and not all(p.is_cuda for p in group["params"]):
            group["capturable"] = False  # torch refuses it on this device; the formula is the same
    return opt


def updated_parameters(model: nn.Module, opt: Optimizer) -> dict[str, nn.Parameter]:
    """The model's parameters that the optimizer updates, by name and in the model's order."""
    updated = {id(p) for group in opt.param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in updated}


def check_clip(clip: float | None) -> None:
    """Refuse an invalid bound on the norm of the gradient."""
    if clip is not None:
        as_number(clip, "clip", lambda c: 0 < c < math.inf, "a finite norm > 0, or None", "None = no clipping.")


def clip_gradients(params: Iterable[Tensor], clip: float | None) -> float:
    """Scale gradients in place such that their common norm is at most `clip`; return the factor."""
    if clip is None:
        return 1.0
    params = list(params)
    if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
        fix = "Build that layer with sparse=False, or remove clip."
        raise refusal("clip", got="a sparse gradient", expected="dense ones, whose norm PyTorch computes", fix=fix)
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    return float(torch.clamp(clip / (norm + 1e-6), max=1.0))  # the formula of clip_grad_norm_


def take_step(
    opt: Optimizer, params: Mapping[str, nn.Parameter], factor: float = 1.0, moments: bool = False
) -> dict[str, Update]:
    """Call ``opt.step()`` and return the `Update` of each parameter by name; for SGD, Adam and AdamW only.

    `factor` is that of `clip_gradients`; the gradient in an update is the one before this scaling. `moments` says
    whether Adam's are returned.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([2.0])
    >>> update = take_step(torch.optim.SGD([p], lr=0.5), {"p": p})["p"]
    >>> update.direct, p.item()
    (0.5, 0.0)
    """
    optimizer_class(f"{type(opt).__module__}.{type(opt).__qualname__}")
    first = {name for name, p in params.items() if _buffer(opt, p) is None}
    opt.step()
    groups = {id(p): group for group in opt.param_groups for p in group["params"]}
    updates = {}
    for name, p in params.items():
        if p.grad is None:
            updates[name] = Update(0.0, 0.0, float(name not in first), 0.0, 0.0, 0.0, 0.0)
        else:
            group, state = groups[id(p)], opt.state[p]
            if isinstance(opt, SGD):
                updates[name] = sgd_update(group, factor, name in first)
            else:
                updates[name] = _adam_update(opt, group, state, factor, name in first, moments)
    return updates


def check_factors(updates: Mapping[str, Update], step: int) -> None:
    """Refuse a step of Adam whose factors are infinite in the parameters' precision."""
    for name, u in updates.items():
        if isinstance(u.buffered, Tensor) and not bool(u.buffered.isfinite().all()):
            precision = str(u.buffered.dtype).removeprefix("torch.")
            got = f"second moments of Adam that vanish in {precision}, by whose root its update is divided"
            fix = "Train in float32 or bfloat16."
            raise refusal(f"'{name}' at step {step}", got=got, expected="an update that is a finite factor", fix=fix)


def _buffer(opt: Optimizer, p: Tensor) -> Tensor | None:
    state = opt.state.get(p, {})
    return state.get("momentum_buffer", state.get("exp_avg"))


def sgd_update(group: Mapping[str, Any], factor: float, first: bool) -> Update:
    """The `Update` of a step of SGD with the settings of a group; `first`: before it there was no momentum buffer."""
    lr, momentum = float(group["lr"]), float(group["momentum"])
    gradient = -factor if group["maximize"] else factor
    decay = float(group["weight_decay"])
    if momentum == 0:
        return Update(gradient, decay, 0.0, 0.0, lr, 0.0, 0.0)
    # The first buffer is d_s itself: neither momentum nor dampening applies.
    carry, entering = (0.0, 1.0) if first else (momentum, 1 - group["dampening"])
    direct, buffered = (lr, lr * momentum) if group["nesterov"] else (0.0, lr)
    return Update(gradient, decay, carry, entering, direct, buffered, 0.0)


def _adam_update(
    opt: Optimizer, group: dict[str, Any], state: dict[str, Tensor], factor: float, first: bool, moments: bool
) -> Update:
    lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
    # A captured step computes the powers on the device, in the precision of its count.
    count = state["step"] if group["capturable"] else float(state["step"])
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    rate, correction = lr / (1 - beta1**count), 1 - beta2**count
    root = second.sqrt() / correction**0.5 + group["eps"]
    kept = None
    if moments:
        square = state["exp_avg_sq"].clone()
        largest = second.clone() if group["amsgrad"] else square
        kept = Moments(state["exp_avg"].clone(), square, largest, rate, correction, group["eps"], beta2)
    gradient = -factor if group["maximize"] else factor
    decay = float(group["weight_decay"])
    # AdamW has no such entry before torch 2.7.
    decoupled = isinstance(opt, AdamW) or group.get("decoupled_weight_decay", False)
    return Update(
        gradient=gradient,
        coupled=0.0 if decoupled else decay,
        carry=0.0 if first else beta1,
        entering=1 - beta1,
        direct=0.0,
        buffered=rate / root,
        decoupled=lr * decay if decoupled else 0.0,
        moments=kept,
    )
