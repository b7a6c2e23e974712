"""Importance of each training example for the whole model: at its end, and along the run that led to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ntkit.base.batch import checked, count
from ntkit.base.caller_context import no_context, own_context
from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integer
from ntkit.base.shown import Shown
from ntkit.data.streamed_samples import with_labels
from ntkit.gram.arrays import as_floats, check_finite
from ntkit.jacobian.model_outputs import Select
from ntkit.kernels.output_loss import OutputLoss, model_outputs
from ntkit.trajectory import Trajectory
from ntkit.trajectory.objective import Inputs, Loss
from ntkit.trajectory.optimizer_updates import Update, sgd_update
from ntkit.trajectory.replay import Replay

_IDLE = Update(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # of a parameter that never had a gradient
_OTHER_WAYS = "Use ntkit.PathKernel(run).decompose(x), which is exact for it, or target_importance."


@dataclass(eq=False, repr=False)
class Importance(Shown):
    """One number per training example and output, the same for every test point: alpha in alpha_i K(x_i, x).

    Attributes
    ----------
    values : float64 [n, C].
    name : of the method.
    certificate : numbers that say how exact the values are, and which model they belong to.
    """

    values: Tensor
    name: str
    certificate: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = as_floats(self.values, "importance")
        if values.ndim not in (1, 2) or values.numel() == 0:
            got, fix = f"shape {list(values.shape)}", "Give one number per training example and output."
            raise refusal("importance", got=got, expected="[n] or [n, C]", fix=fix)
        values = check_finite(values, "importance").to(torch.float64)
        self.values = values[:, None] if values.ndim == 1 else values


@own_context()
def target_importance(
    model: nn.Module, x: Inputs, y: Tensor, loss: Loss, *, select: Select | None = None
) -> Importance:
    """alpha_i = - d loss_i / d f(x_i) at the model as it is: the target derivative.

    Parameters
    ----------
    model : in eval mode; f(x) is one tensor [n, ...].
    x, y : the n training examples.
    loss : ``loss(model(x), y)`` -> scalar, the mean or the sum of one loss per example. Values are those of one
        example's own loss, ``loss`` of a batch of one: they do not depend on n.
    select : the part of the model's output that f and the loss are of, as for `ntkit.TangentKernel`.

    Returns
    -------
    Importance
        values [n, C], in the units of the loss per unit of the output.

    Raises
    ------
    Refused
        When the loss is not separable, x and y do not fit, or the model is in train mode where that matters.

    Notes
    -----
    Tsai, Yeh, Ravikumar 2023 (target derivative). With the influence kernel it gives influence functions.

    Examples
    --------
    >>> model, x = torch.nn.Identity(), torch.tensor([[2.0], [5.0]])
    >>> target_importance(model, x, torch.zeros(2, 1), torch.nn.functional.mse_loss).values.ravel().tolist()
    [-4.0, -10.0]
    """
    inputs, y = with_labels(x, y)
    batch = checked(inputs, "x", infinite=True)
    own = OutputLoss(loss, model_outputs(model, batch, select), checked(y, "y"))
    return Importance(-own.slopes.cpu(), "target", {"examples": float(own.n), "loss_is_mean": float(own.of_mean)})


class TrackingImportance:
    """alpha_i = - sum over the steps with i in the batch of lr_s * slope_(i, s), summed up while a model trains.

    With momentum, dampening, Nesterov's momentum and weight decay it is the exact coefficient: where the model is
    linear in its parameters, f(x) = J(x) theta, every theta_s is ``initial_factor * theta_0 + sum_i J(x_i)^T alpha_i``,
    and so is the momentum buffer; both follow the optimizer's own linear recursion. For such a model

        f_S(x) = initial_factor * f_0(x) + sum_i K(x, x_i) alpha_i,     K(x, x_i) = J(x) J(x_i)^T,

    up to rounding (parameters that do not train add a constant). For other networks that is the kernel machine of the
    same steps under one fixed kernel.

    It cannot see the parameters: begin at the first step of a new optimizer, and let every parameter that the outputs
    depend on have a gradient at each step. `tracking_importance` checks both.

    Parameters
    ----------
    n, outputs : training examples, and outputs of the model (all axes but the first together).

    Notes
    -----
    Tsai, Yeh, Ravikumar 2023 (tracking representers), there for plain SGD. Memory: 8 n C bytes, twice that
    with momentum; time of a step: 8 n C with momentum or decay, else that of the batch.

    Examples
    --------
    In a loop of your own, with the gradient of the batch's loss by the outputs:

    >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]).double(), torch.zeros(3, 1).double()
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> before = model(x).detach()
    >>> optimizer, tracking = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), TrackingImportance(3, 1)
    >>> for rows in torch.tensor([[0, 1], [1, 2], [2, 0]]):
    ...     optimizer.zero_grad()
    ...     out = model(x[rows])
    ...     out.retain_grad()
    ...     torch.nn.functional.mse_loss(out, y[rows]).backward()
    ...     optimizer.step()
    ...     tracking.add(rows, out.grad, optimizer)
    >>> torch.allclose(model(x), before + x @ x.T @ tracking.importance().values)
    True
    """

    def __init__(self, n: int, outputs: int) -> None:
        expected, fix = "an integer of at least 1", "Pass TrackingImportance(len(x), outputs of the model)."
        self.n = n = as_integer(n, "n", expected, fix, least=1)
        self.outputs = outputs = as_integer(outputs, "outputs", expected, fix, least=1)
        self._alpha = torch.zeros(n, outputs, dtype=torch.float64)
        self._buffer: Tensor | None = None  # of momentum, in the same coefficients
        self._initial, self._initial_buffer = 1.0, 0.0
        self._steps = 0

    def add(self, rows: Tensor, slope: Tensor, optimizer: Optimizer, clip_factor: float = 1.0) -> None:
        """Take in one step: call it beside ``optimizer.step()``, before a scheduler changes the learning rate.

        Parameters
        ----------
        rows : int64 [B], the training examples of the batch.
        slope : [B, *outputs], the gradient of the batch's loss by the model's outputs, as it comes (no division by B).
        optimizer : ``torch.optim.SGD``, whose settings of this moment count.
        clip_factor : by which the gradient was scaled down, where it was clipped.

        Raises
        ------
        Refused
            For another optimizer, groups with different settings, a row out of range, or a slope that does not fit.
        """
        if type(optimizer) is not SGD:
            got = f"{type(optimizer).__name__}, whose rates differ from parameter to parameter"
            raise refusal("optimizer", got=got, expected="torch.optim.SGD itself", fix=_OTHER_WAYS)
        updates = [sgd_update(group, clip_factor, self._steps == 0) for group in optimizer.param_groups]
        self.advance(rows, slope, updates[0] if all(u == updates[0] for u in updates) else None)

    def advance(self, rows: Tensor, slope: Tensor, update: Update | None) -> None:
        """Take in one step by the linear form of its update, the same for all parameters (None: there is none)."""
        if update is None or isinstance(update.buffered, Tensor):
            got = "rates or weight decay that differ from parameter to parameter"
            expected = "one learning rate, momentum and weight decay, or no such coefficient exists"
            raise refusal("optimizer", got=got, expected=expected, fix=_OTHER_WAYS)
        rows = torch.as_tensor(rows).detach().cpu()
        values = slope.detach().to("cpu", torch.float64).reshape(len(slope), -1) if slope.ndim else slope.reshape(1, 1)
        if rows.is_floating_point() or rows.ndim != 1 or values.shape != (len(rows), self.outputs):
            got = f"rows {list(rows.shape)} {rows.dtype}, slope {list(slope.shape)}"
            expected = f"int64 [B], and [B, ...] with {self.outputs} outputs of each"
            raise refusal("rows, slope", got=got, expected=expected, fix="Pass out.grad of out = model(x[rows]).")
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < self.n):
            got, fix = f"{int(rows.min())} to {int(rows.max())}", "Number the training examples from 0."
            raise refusal("rows", got=got, expected=f"rows of the training set, 0 to {self.n - 1}", fix=fix)
        check_finite(values, "slope")
        self._steps += 1
        kept = 1 - update.decoupled - update.direct * update.coupled
        if not (update.entering or update.carry):  # no buffer: one fills up at a learning rate of 0, too
            self._alpha.mul_(kept) if kept != 1 else None
            self._alpha.index_add_(0, rows.long(), values, alpha=-update.direct * update.gradient)
            self._initial *= kept
            return
        if self._buffer is None:
            self._buffer = torch.zeros_like(self._alpha)
        buffer, entering = self._buffer, update.entering
        buffer.mul_(update.carry).add_(self._alpha, alpha=entering * update.coupled)
        buffer.index_add_(0, rows.long(), values, alpha=entering * update.gradient)
        self._initial_buffer = update.carry * self._initial_buffer + entering * update.coupled * self._initial
        self._alpha.mul_(kept).sub_(buffer, alpha=update.buffered)
        self._alpha.index_add_(0, rows.long(), values, alpha=-update.direct * update.gradient)
        self._initial = kept * self._initial - update.buffered * self._initial_buffer

    def importance(self) -> Importance:
        """What has been summed up so far; `initial_factor` is in the certificate."""
        certificate = {"steps": float(self._steps), "initial_factor": self._initial}
        return Importance(self._alpha.clone(), "tracking", certificate)


@no_context()
def tracking_importance(
    trajectory: Trajectory,
    *,
    model: nn.Module | None = None,
    data: tuple[Inputs, Tensor] | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    clip: float | None = None,
    select: Select | None = None,
) -> Importance:
    """Importance along a recorded run, from its replay: what `TrackingImportance` sums up in the loop itself.

    Parameters
    ----------
    trajectory : a run of SGD that has ended.
    model, data, loss, clip, select : of the run, where `trajectory` was opened from disk; what `train` returned has
        them.

    Returns
    -------
    Importance
        values [n, C]; its certificate has ``initial_factor`` (what is left of the initial parameters), ``steps``, and
        ``bitwise`` (1 when the replayed run had the recorded bits: then a live sum over the same run has these bits).

    Raises
    ------
    Refused
        As `ntkit.PathKernel`; for Adam and for groups with different rates, where no coefficient of an example exists.

    Notes
    -----
    The slopes of all steps are kept until the sum is made: S x B x C numbers in the precision of the network.

    Examples
    --------
    >>> import ntkit
    >>> x, y = torch.linspace(-1, 1, 6).view(6, 1).double(), torch.linspace(0, 1, 6).view(6, 1).double()
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    >>> run = ntkit.train(model, (x, y), torch.nn.functional.mse_loss, sgd, steps=20, batch_size=4)
    >>> alpha, start = tracking_importance(run).values, run.state(0)["weight"]
    >>> torch.allclose(model(x), x @ start.T + x @ x.T @ alpha)
    True
    """
    if not isinstance(trajectory, Trajectory):
        fix = "Pass what ntkit.train returned, or ntkit.Trajectory.open(folder)."
        raise refusal("trajectory", got=type(trajectory).__name__, expected="an ntkit.Trajectory", fix=fix)
    if not (name := trajectory.settings["optimizer"]["class"]).endswith(".SGD"):
        got = f"{name}, whose rates differ from parameter to parameter"
        raise refusal("optimizer", got=got, expected="torch.optim.SGD, or no such coefficient exists", fix=_OTHER_WAYS)
    replay = Replay(trajectory, model, data, loss, clip, select=select)
    steps, idle = [], set(replay.names)
    for step in replay.backwards():
        steps.append((step.rows, step.slope, step.updates))
        idle &= {parameter for parameter, update in step.updates.items() if update == _IDLE}
    outputs = steps[0][1][0].numel() if steps else model_outputs(replay.model, replay.x)[0].numel()
    tracking = TrackingImportance(count(replay.x), outputs)
    for rows, slope, updates in reversed(steps):
        own = [update for parameter, update in updates.items() if parameter not in idle]
        tracking.advance(rows, slope, own[0] if all(update == own[0] for update in own) else None)
    result = tracking.importance()
    result.certificate["bitwise"] = float(replay.bitwise)
    return result
