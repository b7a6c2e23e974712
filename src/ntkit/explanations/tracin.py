"""TracIn: importance times tangent kernel, summed over the checkpoints of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ntkit.base.batch import checked
from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_number
from ntkit.data.streamed_samples import in_memory
from ntkit.explanations.importances import target_importance
from ntkit.explanations.representers import Explanation, checked_outputs, explain
from ntkit.jacobian.model_calls import Params
from ntkit.jacobian.model_outputs import Select
from ntkit.kernels.output_loss import model_outputs
from ntkit.kernels.tangent import TangentKernel
from ntkit.trajectory import Trajectory
from ntkit.trajectory.objective import Inputs, Loss, Objective
from ntkit.trajectory.recorded_run import assign
from ntkit.trajectory.replay_checks import checked_clip, checked_rates, replayable_steps, training_arguments

Checkpoint = tuple[Mapping[str, Tensor], float]


@own_context()
def tracin(
    trajectory: Trajectory | Sequence[Checkpoint],
    x_test: Inputs,
    *,
    output: int | Tensor | None = None,
    steps: Iterable[int] | None = None,
    model: nn.Module | None = None,
    data: tuple[Inputs, Tensor] | None = None,
    loss: Loss | None = None,
    params: Params = None,
    memory: int | str | None = None,
    select: Select | None = None,
) -> Explanation:
    r"""Scores :math:`\sum_t \eta_t \sum_{c'} \Theta_t(x_j, x_i)_{c c'} \alpha^t_{i c'}` over checkpoints t.

    Theta_t is the tangent kernel and alpha^t = - d loss_i / d f(x_i) at the parameters of checkpoint t: a term is the
    change of output c that a step of length eta_t on example i alone makes, to first order. A sum of generalized
    representers is none itself: `check_axioms` tells.

    Parameters
    ----------
    trajectory : a run that has ended, or a list of (state, eta): parameters by name, and a learning rate.
    x_test : m test points.
    output : c: one for all test points, one for each (int64 [m]), or None for the largest at the last checkpoint.
    steps : of a trajectory: the recorded steps that count; by default all of them. eta_t is the learning rate of step t
        (of the last step, for the end of the run), times -1 where the optimizer maximizes.
    model, data, loss : as for training; optional for the trajectory that `ntkit.train` returned.
    params, memory : as for `ntkit.TangentKernel` and `explain`.
    select : the part of the model's output that is explained and that the loss is of; as in training.

    Returns
    -------
    Explanation
        scores [m, n].

    Raises
    ------
    Refused
        As `target_importance` and `explain`; for a run that has not ended, a step that was not recorded, other data,
        groups of parameters with different learning rates, and an empty list.

    Notes
    -----
    Pruthi, Liu, Kale, Sundararajan 2020 (TracInCP), there for the loss of the test point instead of an output.

    Examples
    --------
    >>> import ntkit
    >>> x, y = torch.linspace(-1, 1, 6).view(6, 1), torch.linspace(0, 1, 6).view(6, 1)
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    >>> run = ntkit.train(torch.nn.Linear(1, 1), (x, y), torch.nn.functional.mse_loss, sgd, steps=4)
    >>> tracin(run, x[:2]).scores.shape
    torch.Size([2, 6])
    """
    if isinstance(trajectory, Trajectory):
        model, data, loss, select = training_arguments(trajectory, model, data, loss, select)
        checked_clip(trajectory.settings, Objective(data, loss), None)
        checkpoints = _recorded(trajectory, steps)
    else:
        checkpoints = _given(trajectory, steps)
        if model is None or data is None or loss is None:
            fix = "Pass model=, data=(x, y) and loss=: a list of checkpoints does not have them."
            raise refusal("model, data, loss", got="not all of them", expected="all three", fix=fix)
    objective = Objective(data, loss)
    network, test = copy.deepcopy(model).eval(), checked(in_memory(x_test), "x_test", infinite=True)
    assign(network, checkpoints[-1][0], "the last checkpoint")
    last = model_outputs(network, test, select)[..., None].flatten(1)
    chosen = last.argmax(1).cpu() if output is None else checked_outputs(output, *last.shape)
    kernel = TangentKernel(network, "full", params=params, select=select)
    scores: Any = 0.0
    for state, eta in checkpoints:
        assign(network, state, "a checkpoint")
        alpha = target_importance(network, objective.x, objective.y, loss, select=select)
        scores = scores + eta * explain(kernel, alpha, objective.x, test, output=chosen, memory=memory).scores
    return Explanation(scores, "TracIn", chosen, certificate={"checkpoints": float(len(checkpoints))})


def _recorded(run: Trajectory, steps: Iterable[int] | None) -> list[Checkpoint]:
    last = replayable_steps(run)
    rates = checked_rates(run, last)
    if not last or not bool((rates == rates[:, :1]).all()):
        got = "groups of parameters with different ones" if last else "a run without steps"
        fix = "Pass a list of (state, eta) with rates of your choice."
        raise refusal("learning rates", got=got, expected="one learning rate per step", fix=fix)
    ascent = {bool(group.get("maximize")) for group in run.settings["optimizer"]["groups"]}
    if len(ascent) > 1:
        got, fix = "groups of parameters of which some are maximized", "Pass a list of (state, eta) instead."
        raise refusal("optimizer", got=got, expected="one direction for all parameters", fix=fix)
    chosen = [s for s in run.steps if s <= last] if steps is None else list(steps)
    sign = -1.0 if ascent.pop() else 1.0  # what a step adds has the opposite sign where the optimizer maximizes
    return [(run.state(step), sign * float(rates[min(step, last - 1), 0])) for step in chosen] or _given([], None)


def _given(run: Any, steps: Any) -> list[Checkpoint]:
    pairs = list(run) if isinstance(run, (list, tuple)) else []
    if not pairs or not all(isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[0], Mapping) for p in pairs):
        got = "no checkpoint" if isinstance(run, (list, tuple)) and not pairs else f"a {type(run).__name__}"
        fix = "Pass what ntkit.train returned, or [(model.state_dict(), learning rate), ...]."
        raise refusal(
            "trajectory", got=got, expected="an ntkit.Trajectory, or a list of (state, learning rate)", fix=fix
        )
    if steps is not None:
        raise refusal(
            "steps", got="steps of a list", expected="steps of a trajectory", fix="Leave them out of the list."
        )
    fix = "It is a learning rate."
    return [
        (state, as_number(eta, "eta", lambda v: v == v and abs(v) != float("inf"), "a finite number", fix))
        for state, eta in pairs
    ]
