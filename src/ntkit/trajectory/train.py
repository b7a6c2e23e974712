"""Train a network so that the run can be repeated exactly: interrupted, resumed and replayed with the same bits."""

from __future__ import annotations

import inspect
import math
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from ntkit.base.checks import refusal
from ntkit.base.function_identity import function_identity
from ntkit.base.numbers import as_number, is_integer
from ntkit.jacobian.graph import correct_norms, has_norms
from ntkit.jacobian.model_calls import check_module
from ntkit.jacobian.model_outputs import Select
from ntkit.trajectory.batch_order import batch_indices, derived_seed, steps_per_epoch
from ntkit.trajectory.learning_rates import RateSchedule
from ntkit.trajectory.objective import Inputs, Loss, Objective, loss_name
from ntkit.trajectory.optimizer_updates import check_clip, clip_gradients, updated_parameters
from ntkit.trajectory.recorded_run import Trajectory
from ntkit.trajectory.run_writer import network_and_optimizer
from ntkit.trajectory.snapshots import SnapshotSteps, snapshot_steps
from ntkit.trajectory.training_run import TrainingRun


def train(
    model: nn.Module,
    data: tuple[Inputs, Tensor] | Dataset[Any] | DataLoader[Any],
    loss: Loss,
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    steps: int,
    *,
    batch_size: int | None = None,
    record: SnapshotSteps = "log",
    seed: int = 0,
    path: str | Path | None = None,
    target_loss: float | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = None,
    select: Select | None = None,
) -> Trajectory:
    """Train `model` in place and record the run: theta_{s+1} = theta_s + update(grad of the loss on batch(s)).

    The run is a pure function of its arguments: the rows of step s depend on (seed, n, batch_size, s) only, and torch's
    random numbers (dropout) are seeded from (seed, s) at each step. So a run that was killed at any moment and resumed
    ends with the same bits as an uninterrupted one, wherever torch's own kernels are deterministic (as on a CPU with
    the same number of threads). The caller's random state, train/eval modes, ``requires_grad`` and ``.grad`` do not
    change.

    Parameters
    ----------
    model : any module; its parameters with ``requires_grad`` are trained, in train mode.
    data : (x, y) tensors with examples along dimension 0. x may be a tuple or a dict of tensors, passed to the model as
        arguments or keywords. Or a dataset of such pairs, or a DataLoader of one that does not shuffle (`seed` and
        `batch_size` do), which is read into memory.
    loss : ``loss(model(x), y)`` -> scalar, the mean over the batch.
    optimizer : parameters -> any torch optimizer without a closure.
    steps : number of optimization steps.
    batch_size : rows per batch, reshuffled each epoch; the last batch of an epoch may be smaller. None = all rows at
        every step.
    record : the steps whose parameters are recorded: ``"log"`` (0 and round(2^(k/2))), ``"all"``, an integer n (every
        n-th), a list, or a function step -> bool. The first and the last are always recorded.
    seed : seed of batches and of torch's random numbers during training.
    path : folder to write; None = a temporary one that lives as long as the Trajectory.
    target_loss : stop once the training loss is at most this: the loss of each step for full batch, else
        (1 / n) sum_b |b| loss(b) over the epoch's batches in order, in eval mode at its end: the loss of all rows if
        `loss` is a mean, a mean of sums over a batch if it is a sum (``reduction="sum"``).
    resume : continue the run in `path` from its last checkpoint (at most about 10 s before it was killed, or 20 times
        the time that a checkpoint takes to write), whatever the values of the model's parameters. A run that has ended
        is loaded. A folder without a run gets a new one. A run with a damaged or missing file starts from the
        beginning, with a warning, if `model` has its initial parameters.
    on_step : called as ``on_step(step, loss)``, before that step's update.
    schedule : step -> the factor on every group's learning rate in that step's update, as LambdaLR's; a pure function.
        None = constant rates.
    clip : largest norm of the gradient over all parameters that the optimizer updates; a longer gradient is scaled down
        before the update (`torch.nn.utils.clip_grad_norm_`). None = no clipping.
    select : the part of the model's output that the loss takes, a function such as ``lambda out: out[0]``. None: all of
        it, or its ``logits`` if it has any.

    Returns
    -------
    Trajectory
        With ``status`` ``"complete"``, or ``"diverged"`` when a loss was not finite: model and last snapshot are then
        those of the last step whose loss was finite. Its ``origin`` is (model, data, loss).

    Raises
    ------
    Refused
        When an argument is invalid, `path` holds a run and `resume` is False, or `resume` is True and that run had
        other settings, data or parameter shapes, or a damaged file; when another process is writing into `path`.
    KeyboardInterrupt
        On Ctrl-C, after the current step and a checkpoint; a second Ctrl-C does not wait.

    Notes
    -----
    Memory beyond plain training: one copy of the parameters (so that a divergence keeps the step before it).

    Examples
    --------
    >>> import torch
    >>> x = torch.linspace(-1, 1, 5)[:, None]
    >>> model = torch.nn.Linear(1, 1)
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.5)
    >>> traj = train(model, (x, 2 * x), torch.nn.functional.mse_loss, sgd, steps=500, batch_size=2, target_loss=1e-4)
    >>> traj.stop["reason"], round(model.weight.item(), 1)
    ('target', 2.0)
    """
    check_module(model, fix="Pass the network to train.")
    objective = Objective(data, loss, select)
    _check_numbers(steps, seed, target_loss, clip, batch_size, objective.n)
    steps, seed, batch_size = int(steps), int(seed), None if batch_size is None else int(batch_size)  # also numpy's
    recorded = snapshot_steps(record, steps)
    opt = _new_optimizer(optimizer, model)
    rates = RateSchedule(opt, schedule)
    every = int(record) if is_integer(record) else None
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "record": every or (record if isinstance(record, str) else sorted(recorded)),
        "seed": seed,
        "target": None if target_loss is None else float(target_loss),
        "schedule": schedule and getattr(schedule, "__qualname__", type(schedule).__qualname__),
        "clip": None if clip is None else float(clip),
        "loss": loss_name(loss),
        "n": objective.n,
        "data": objective.data_hash(),
        **({} if select is None else {"select": function_identity(select)}),
        **network_and_optimizer(model, opt),
    }
    if path is None and resume:
        raise refusal("resume", got="no path", expected="the folder of the run", fix="Pass path=.")
    temporary = TemporaryDirectory(prefix="ntkit-") if path is None else None
    try:
        run = TrainingRun(model, opt, Path(temporary.name if temporary else path or ""), settings)
        if not run.load_if_ended(resume):
            with _train_mode(model) as devices, _deferred_interrupt() as interrupted:
                objective.check(model, batch_size or objective.n)
                with run.lock:
                    if not run.load_if_ended(resume):  # another process may have ended it
                        run.start(resume, recorded)
                        _run_steps(run, objective, recorded, devices, interrupted, rates, on_step)
        trajectory = Trajectory(run.folder, temporary=temporary)
        examples = (data[0], data[1]) if isinstance(data, (tuple, list)) else (objective.x, objective.y)
        trajectory.origin, trajectory.select = (model, examples, loss), select
        return trajectory
    except BaseException:
        if temporary is not None:
            temporary.cleanup()
        raise


def _run_steps(
    run: TrainingRun,
    objective: Objective,
    recorded: Collection[int],
    devices: list[int],
    interrupted: threading.Event,
    rates: RateSchedule,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Take the remaining steps of a run."""
    model, opt, n = run.model, run.opt, objective.n
    names = ("steps", "seed", "target", "clip", "batch_size")
    steps, seed, target, clip, batch_size = (run.settings[name] for name in names)
    updated = updated_parameters(model, opt).values()
    epoch = steps_per_epoch(n, batch_size)
    norms: bool | None = None  # whether there are layers whose gradients are corrected
    for step in range(run.step, steps + 1):
        if target is not None and batch_size is not None and step and step % epoch == 0:
            value = objective.mean(model, batch_size)
            if value <= target:
                run.copy_network()
                return run.end(step, "target", value)
        if step == steps:
            break
        before = run.buffers()  # a forward pass in train mode changes them (running statistics)
        _seed(devices, derived_seed("step", seed, step))
        opt.zero_grad(set_to_none=True)
        out = objective.value(model, None if batch_size is None else batch_indices(seed, n, batch_size, step))
        value = float(out.detach())
        if not math.isfinite(value):
            return run.end_diverged(step, value)
        # From here to the update the run's copy is the network at `step`, whose loss is finite.
        run.copy_network(before)
        if target is not None and batch_size is None and value <= target:
            return run.end(step, "target", value)
        run.write(step, step in recorded)
        try:
            if on_step is not None:
                on_step(step, value)
            if interrupted.is_set():
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            run.checkpoint(step)
            raise
        norms = has_norms(out) if norms is None else norms
        if norms:
            correct_norms(out)
        out.backward()
        clip_gradients(updated, clip)
        run.rates.append(rates.set(step))
        opt.step()
        run.losses.append(value)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        return run.end_diverged(steps, math.nan)  # the loss after the last step is not computed
    run.copy_network()
    return run.end(steps, "steps", None)


def _check_numbers(
    steps: int, seed: int, target: float | None, clip: float | None, batch_size: int | None, n: int
) -> None:
    if not is_integer(steps) or steps < 1:
        raise refusal("steps", got=steps, expected="an integer >= 1", fix="Pass the number of optimization steps.")
    if not is_integer(seed):
        raise refusal("seed", got=repr(seed), expected="an integer", fix="Pass e.g. seed=0.")
    if target is not None:
        as_number(target, "target_loss", math.isfinite, "a finite loss or None", "None = take all the steps.")
    if batch_size is not None and (not is_integer(batch_size) or not 1 <= batch_size <= n):
        expected = f"1 <= batch_size <= {n} rows, or None"
        raise refusal("batch_size", got=batch_size, expected=expected, fix="None = full batch.")
    check_clip(clip)


def _new_optimizer(optimizer: Callable[[list[nn.Parameter]], Optimizer], model: nn.Module) -> Optimizer:
    """Call the user's function and check the optimizer that it returns."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        fix = "Call model.requires_grad_(True) or unfreeze a layer."
        expected = "at least one parameter with requires_grad"
        raise refusal("model", got="no trainable parameters", expected=expected, fix=fix)
    fix = "Pass e.g. optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        got = f"a {type(optimizer).__name__}"
        raise refusal("optimizer", got=got, expected="a function of the parameters", fix=fix)
    opt = optimizer(trainable)
    if not isinstance(opt, Optimizer):
        raise refusal("optimizer", got=f"a function returning {type(opt).__name__}", expected="an Optimizer", fix=fix)
    trainable_ids = {id(p) for p in trainable}
    if any(id(p) not in trainable_ids for group in opt.param_groups for p in group["params"]):
        got = "a parameter that is not a trainable one of the model"
        expected = "the parameters that the function is called with, or some of them"
        raise refusal("optimizer", got=got, expected=expected, fix=fix)
    if opt.defaults.get("differentiable"):
        got, fix = "differentiable=True, with which PyTorch takes no step in place", "Remove differentiable=True."
        raise refusal("optimizer", got=got, expected="an optimizer that changes its parameters", fix=fix)
    closure = inspect.signature(type(opt).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        got = f"{type(opt).__name__}, which evaluates the loss several times per step"
        fix = "Use SGD, Adam, AdamW or another optimizer without a closure."
        raise refusal("optimizer", got=got, expected="one gradient per step", fix=fix)
    return opt


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[list[int]]:
    """Train mode, no gradients, forked random numbers; all are restored at the end. Yields the CUDA devices in use."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for p, _ in grads:
                p.grad = None
            model.train()
            yield devices
        finally:
            for module, mode in modes:
                module.training = mode
            for p, grad in grads:
                p.grad = grad


def _seed(devices: list[int], seed: int) -> None:
    # Not torch.manual_seed: it would also seed devices that the fork does not restore.
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(seed)


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Delay Ctrl-C until the end of the current step: within an update no state can be resumed."""
    event = threading.Event()
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield event
        return

    def later(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, later)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if event.is_set():  # Ctrl-C during the last step
        raise KeyboardInterrupt
