"""Train a network so that the run can be repeated exactly: killed, resumed and replayed with the same bits."""

from __future__ import annotations

import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkit.base.checks import refusal
from ntkit.base.tensors import tensor_hash
from ntkit.trajectory.batch_order import Record, batch_indices, derived_seed, snapshot_steps, steps_per_epoch
from ntkit.trajectory.learning_rates import Rates
from ntkit.trajectory.optimizer_updates import check_clip, clip_gradients, updated_parameters
from ntkit.trajectory.recorded_run import Trajectory
from ntkit.trajectory.run_writer import described
from ntkit.trajectory.training_run import HeldRun

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def train(
    model: nn.Module,
    data: tuple[Inputs, Tensor],
    loss: Callable[[Any, Tensor], Tensor],
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    steps: int,
    batch_size: int | None = None,
    record: Record = "log",
    seed: int = 0,
    path: str | Path | None = None,
    target: float | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = None,
) -> Trajectory:
    """Train `model` in place and record the run: theta_{s+1} = theta_s + update(grad of the loss on batch(s)).

    The run is a pure function of its arguments: the rows of step s depend on (seed, n, batch_size, s) only, and torch's
    random numbers (dropout) are seeded from (seed, s) at each step. So a run that was killed at any moment and resumed
    ends with the same bits as one that was not, wherever torch's own kernels are deterministic (as on a CPU with the
    same number of threads). The caller's random state, train/eval modes, ``requires_grad`` and ``.grad`` are left as
    they were.

    Parameters
    ----------
    model : any module; its parameters with ``requires_grad`` are trained, in train mode.
    data : (x, y) tensors with examples along dimension 0. x may be a tuple or a dict of tensors, passed to the model as
        arguments or keywords.
    loss : ``loss(model(x), y)`` -> scalar, the mean over the batch.
    optimizer : parameters -> any torch optimiser that needs no closure.
    steps : number of optimisation steps.
    batch_size : rows per batch, reshuffled each epoch, the ragged last batch kept; None = all rows at every step.
    record : the steps whose parameters are kept: ``"log"`` (0 and round(2^(k/2))), ``"all"``, an integer n (every
        n-th), a list, or a function step -> bool. The first and the last are always kept.
    seed : seed of batches and of torch's random numbers during training.
    path : folder to write; None = a temporary one that lives as long as the Trajectory.
    target : stop once the training loss is <= target: each step's own loss when full batch, else the loss over all
        rows in eval mode at the end of each epoch.
    resume : go on with the run in `path`, from its last checkpoint (about 10 s before it was killed, or 20 times what
        a checkpoint takes to write); the model's present parameter values do not matter then. A run that has ended is
        loaded. With no run there, start.
    on_step : called as ``on_step(step, loss)``, before that step's update.
    schedule : step -> the factor on every group's learning rate in that step's update, as LambdaLR's; a pure function.
        None = constant rates.
    clip : the norm that the whole gradient, over all parameters the optimiser updates, may have: a longer one is scaled
        down before the update (`torch.nn.utils.clip_grad_norm_`). None = as it is.

    Returns
    -------
    Trajectory
        With ``status`` ``"complete"``, or ``"diverged"`` when a loss was not finite: the model then holds, and the last
        snapshot is, the last step whose loss was finite. Its ``origin`` is (model, data, loss) as they were given here.

    Raises
    ------
    Refused
        When an argument cannot give a run, `path` holds a run and `resume` is False, or `resume` is True and that run
        had other settings, data or parameter shapes.
    KeyboardInterrupt
        On Ctrl-C, after the step in hand, with a checkpoint written; a second Ctrl-C does not wait.

    Notes
    -----
    Memory beyond plain training: one copy of the parameters (so that a divergence keeps the step before it).

    Examples
    --------
    >>> import torch
    >>> x = torch.linspace(-1, 1, 5)[:, None]
    >>> model = torch.nn.Linear(1, 1)
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.5)
    >>> traj = train(model, (x, 2 * x), torch.nn.functional.mse_loss, sgd, steps=500, batch_size=2, target=1e-4)
    >>> traj.stop["reason"], round(model.weight.item(), 1)
    ('target', 2.0)
    """
    problem = Problem(data, loss, batch_size)
    _check_numbers(steps, seed, target, clip)
    recorded = snapshot_steps(record, steps)
    opt = _made(optimizer, model)
    rates = Rates(opt, schedule)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "record": record if isinstance(record, (str, int)) else sorted(recorded),
        "seed": seed,
        "target": target,
        "schedule": schedule and getattr(schedule, "__qualname__", type(schedule).__qualname__),
        "clip": None if clip is None else float(clip),
        "loss": loss_name(loss),
        "n": problem.n,
        "data": problem.hash(),
        **described(model, opt),
    }
    if path is None and resume:
        raise refusal("resume", got="no path", expected="the folder of the run", fix="Pass path=.")
    temporary = TemporaryDirectory(prefix="ntkit-") if path is None else None
    try:
        run = HeldRun(model, opt, Path(temporary.name if temporary else path or ""), settings)
        if not run.ended(resume):
            with _left_as_found(model) as devices, _deferred_interrupt() as interrupted:
                problem.check(model)
                run.start(resume)
                _advance(run, problem, recorded, devices, interrupted, rates, on_step)
        trajectory = Trajectory(run.folder, temporary=temporary)
        trajectory.origin = (model, (data[0], data[1]), loss)
        return trajectory
    except BaseException:
        if temporary is not None:
            temporary.cleanup()
        raise


def _advance(
    run: HeldRun,
    problem: Problem,
    recorded: Any,
    devices: list[int],
    interrupted: threading.Event,
    rates: Rates,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Take the run's remaining steps."""
    model, opt = run.model, run.opt
    steps, seed, target, clip = (run.settings[name] for name in ("steps", "seed", "target", "clip"))
    updated = updated_parameters(model, opt).values()
    full_batch = problem.batch_size is None
    epoch = steps_per_epoch(problem.n, problem.batch_size)
    for step in range(run.step, steps + 1):
        if target is not None and not full_batch and step and step % epoch == 0:
            value = problem.full_loss(model)
            if value <= target:
                run.hold()
                return run.end(step, "target", value)
        if step == steps:
            break
        before = run.buffers()  # a forward in train mode moves them (running statistics)
        _seed(devices, derived_seed("step", seed, step))
        opt.zero_grad(set_to_none=True)
        out = problem.loss(model, None if full_batch else batch_indices(seed, problem.n, problem.batch_size, step))
        value = float(out.detach())
        if not math.isfinite(value):
            return run.end_diverged(step, value)
        # From here to the update the held copy is the network at `step`, known to have a finite loss.
        run.hold(before)
        if target is not None and full_batch and value <= target:
            return run.end(step, "target", value)
        run.keep(step, step in recorded)
        try:
            if on_step is not None:
                on_step(step, value)
            if interrupted.is_set():
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            run.checkpoint(step)
            raise
        out.backward()
        clip_gradients(updated, clip)
        run.rates.append(rates.set(step))
        opt.step()
        run.losses.append(value)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        return run.end_diverged(steps, math.nan)  # the loss there would be, and was not computed
    run.hold()
    return run.end(steps, "steps", None)


class Problem:
    """Data and loss, checked."""

    def __init__(
        self, data: tuple[Inputs, Tensor], loss: Callable[[Any, Tensor], Tensor], batch_size: int | None
    ) -> None:
        if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[1], Tensor):
            raise refusal("data", got=type(data).__name__, expected="(x, y) tensors", fix="Pass data=(x, y).")
        x, self.y = data[0], data[1].detach()
        self.by_name, self.alone = isinstance(x, Mapping), isinstance(x, Tensor)
        inputs: dict[Any, Any] = dict(x if isinstance(x, Mapping) else enumerate([x] if isinstance(x, Tensor) else x))
        for name, value in inputs.items():
            _check_rows("x" if isinstance(x, Tensor) else f"x[{name!r}]", value, self.y)
        _check_rows("y", self.y, self.y)
        self.inputs: dict[Any, Tensor] = {name: value.detach() for name, value in inputs.items()}
        self.n = len(self.y)
        if batch_size is not None and (not _is_integer(batch_size) or not 1 <= batch_size <= self.n):
            raise refusal(
                "batch_size",
                got=batch_size,
                expected=f"1 <= batch_size <= {self.n} rows, or None",
                fix="None = full batch.",
            )
        self.batch_size = batch_size
        self.loss_function = loss

    def hash(self) -> str:
        """Hash all examples, in their order."""
        return tensor_hash({**{f"x.{name}": value for name, value in self.inputs.items()}, "y": self.y})

    def batch(self, rows: Tensor | slice | None) -> tuple[Any, Tensor]:
        """Give inputs (a tensor, a tuple or a dict) and targets of these rows; None = all, as they are."""

        def chosen(value: Tensor) -> Tensor:
            return value if rows is None else value[rows.to(value.device) if isinstance(rows, Tensor) else rows]

        inputs = {name: chosen(value) for name, value in self.inputs.items()}
        x = inputs if self.by_name else tuple(inputs.values())
        return x[0] if self.alone else x, chosen(self.y)

    def outputs(self, model: nn.Module, x: Any) -> Any:
        """Run the model on inputs as `batch` gives them."""
        return model(x) if self.alone else model(**x) if self.by_name else model(*x)

    def loss(self, model: nn.Module, rows: Tensor | slice | None) -> Tensor:
        """Give the loss on these rows."""
        x, y = self.batch(rows)
        return self.loss_function(self.outputs(model, x), y)

    def full_loss(self, model: nn.Module) -> float:
        """Mean loss over all rows, in eval mode, a batch at a time."""
        size, total = self.batch_size or self.n, 0.0
        model.eval()
        with torch.no_grad():
            for start in range(0, self.n, size):
                rows = slice(start, min(start + size, self.n))
                total += float(self.loss(model, rows)) * (rows.stop - rows.start)
        model.train()
        return total / self.n

    def check(self, model: nn.Module) -> None:
        """Try the loss once, in eval mode, so that a wrong one is refused before anything is written."""
        model.eval()
        out = self.loss(model, slice(0, self.batch_size or self.n))
        model.train()
        if not isinstance(out, Tensor) or out.ndim != 0:
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise refusal("loss", got=got, expected="a scalar tensor", fix="Return the mean over the batch.")
        if not out.requires_grad:
            raise refusal(
                "loss",
                got="a value that does not depend on the parameters",
                expected="a differentiable function of model(x)",
                fix="Do not detach, round or argmax the outputs, and leave torch.no_grad out of the model.",
            )


def _check_rows(label: str, value: Any, y: Tensor) -> None:
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        expected = "a tensor with at least one example along dimension 0"
        raise refusal(label, got=got, expected=expected, fix="Check how the data was read.")
    if value.ndim and y.ndim and len(value) != len(y):
        raise refusal(
            label, got=f"{len(value)} rows", expected=f"{len(y)}, as y has", fix="Give one target per example."
        )
    bad = (~torch.isfinite(value).reshape(len(value), -1).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise refusal(
            label,
            got=f"a value that is not finite in row {int(bad[0])} (first of {len(bad)} such rows)",
            expected="finite values",
            fix="Remove or repair those rows.",
        )


def _check_numbers(steps: int, seed: int, target: float | None, clip: float | None) -> None:
    if not _is_integer(steps) or steps < 1:
        raise refusal("steps", got=steps, expected="an integer >= 1", fix="Say how many optimisation steps to take.")
    if not _is_integer(seed):
        raise refusal("seed", got=repr(seed), expected="an integer", fix="Pass e.g. seed=0.")
    if target is not None and not math.isfinite(target):
        raise refusal("target", got=target, expected="a finite loss or None", fix="None = take all the steps.")
    check_clip(clip)


def loss_name(loss: Callable[[Any, Tensor], Tensor]) -> str:
    """Name a loss as run.json does."""
    return getattr(loss, "__qualname__", type(loss).__qualname__)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _made(optimizer: Callable[[list[nn.Parameter]], Optimizer], model: nn.Module) -> Optimizer:
    """Call the user's maker of an optimiser and check what it made."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise refusal(
            "model",
            got="no trainable parameters",
            expected="at least one with requires_grad",
            fix="Call model.requires_grad_(True) or unfreeze a layer.",
        )
    fix = "Pass e.g. optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise refusal(
            "optimizer", got=f"a {type(optimizer).__name__}", expected="a function of the parameters", fix=fix
        )
    made = optimizer(trainable)
    if not isinstance(made, Optimizer):
        raise refusal("optimizer", got=f"a function returning {type(made).__name__}", expected="an Optimizer", fix=fix)
    mine = {id(p) for p in trainable}
    if any(id(p) not in mine for group in made.param_groups for p in group["params"]):
        raise refusal(
            "optimizer",
            got="a parameter that is not a trainable one of the model",
            expected="the parameters it is called with, or some of them",
            fix=fix,
        )
    closure = inspect.signature(type(made).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise refusal(
            "optimizer",
            got=f"{type(made).__name__}, which evaluates the loss several times in a step",
            expected="one gradient per step",
            fix="Use SGD, Adam, AdamW or another optimiser without a closure.",
        )
    return made


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[list[int]]:
    """Train mode, no gradients, random numbers in a fork; everything is put back. Yields the CUDA devices used."""
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
    # Not torch.manual_seed: it would also seed devices that the fork does not put back.
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(seed)


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Let Ctrl-C wait for the end of the step in hand: amid an update there is no state worth keeping."""
    event = threading.Event()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not ours:
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
    if event.is_set():  # it came during the last step
        raise KeyboardInterrupt
