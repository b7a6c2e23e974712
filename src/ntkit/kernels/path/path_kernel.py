"""The path kernel: a trained network as a kernel machine, exactly, from the steps that it really took."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, checked, count, take, tensors_to_hash
from ntkit.base.caller_context import no_context
from ntkit.base.checks import refusal
from ntkit.base.function_identity import function_identity
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.progress import task
from ntkit.base.shown import of_model
from ntkit.base.tensors import tensor_hash
from ntkit.jacobian.model_calls import Outputs, check_mode, required_arguments
from ntkit.jacobian.model_outputs import Select, reduce_outputs
from ntkit.jacobian.structure import SelfCheckError
from ntkit.kernels.kernel import Kernel, KernelOperator, written
from ntkit.kernels.path.decomposition import PathDecomposition, StepShare
from ntkit.kernels.path.decomposition_files import DecompositionFiles
from ntkit.kernels.path.integration import Integration, Quadrature, Segment
from ntkit.kernels.path.sweep import Sweep, prepended
from ntkit.kernels.tangent import TangentKernel
from ntkit.trajectory import Trajectory
from ntkit.trajectory.recorded_run import read_run
from ntkit.trajectory.replay import Replay
from ntkit.trajectory.replay_checks import check_any_steps

_COMPARED = 64  # test points whose outputs at both ends of the run are compared with the network's own


class PathKernel(Kernel):
    """The tangent kernel along a training run, and the run's predictions as a sum over training examples.

    At step s the parameters went from theta_s to theta_{s+1} by the optimizer's update, which is linear in the
    gradients of the examples in its batch, J_i(theta_s)^T slope_i, slope_i = d loss / d outputs_i. With Phi_s(x) the
    Jacobian of the outputs for x averaged over the segment between, f_{s+1}(x) - f_s(x) = Phi_s(x) (theta_{s+1} -
    theta_s), so the trained network is

        f_S(x) = f_0(x) - sum_s lr_s sum_i [Phi_s(x) J_i(theta_s)^T] slope_i        (here for plain gradient descent)

    and `decompose` gives each term, for momentum, weight decay, Adam, schedules, clipping and minibatches, too. By
    default Phi_s is the secant Jacobian: exact at any step size and through kinks, from one backward pass
    (`ntkit.secant.secant_jacobian`, docs/math.md). `integration="quadrature"` takes the paper's integral.

    As a kernel, ``k(x1, x2)`` is the mean over steps of the tangent kernel integrated over each segment,
    (1 / S) sum_s int_0^1 J(x1) J(x2)^T dt: symmetric, positive semidefinite. With ``integration="secant"`` it is the
    mean of Phi_s(x1) Phi_s(x2)^T.

    Parameters
    ----------
    trajectory : a run that has ended, of `ntkit.train` or `ntkit.record` (with indices), under SGD, Adam or AdamW.
        Steps without a snapshot are replayed; the replay must give the recorded bits (or, with ``record="all"``, the
        recorded values of each step up to rounding).
    outputs : the outputs to decompose. "full": all C outputs. Or a callable from the outputs of a batch (and targets if
        it takes a second argument) to one scalar per sample: a margin, the loss.
    integration : "secant" (exact), "quadrature", "left" (gradients at the start of each step only: the discretized path
        kernel of Domingos 2020) or "ntk" (all gradients at initialization; slopes as they were).
    rule, nodes : of the quadrature: "gauss" (Gauss-Legendre) or "midpoint", and nodes per step.
    tolerance : the nodes of a step are doubled until the error of the change of the outputs, relative to their size, is
        at most this.
    memory : bytes that may be taken (or text such as "2 GB"); half of what is free if None. Test points that do not fit
        together (points x outputs x parameters numbers) are done in parts, each a sweep over the run.
    model, data, loss, clip : of the run, where `trajectory` was opened from disk; the one that `train` returned has
        them.
    select : the part of the model's output that the loss and `outputs` take, as for `ntkit.TangentKernel`.

    Raises
    ------
    Refused
        When the run cannot be replayed: a changed or missing snapshot, other data, order, loss or settings, an
        unknown optimizer, active dropout, batch norm in train mode; each message names the difference.
    NoSecant
        From `decompose`: when an operation of the network has no secant rule, or is not continuous.

    Notes
    -----
    Bell, Geyer, Glickenstein, Fernandez, Moore 2023, theorem 3.1 (path integral, full-batch gradient descent); the
    secant form and other optimizers: docs/math.md. Domingos 2020 (path kernel).

    Examples
    --------
    >>> import ntkit
    >>> x, y = torch.linspace(-1, 1, 6).view(6, 1).double(), torch.tensor([0, 0, 1, 1, 0, 0])
    >>> model = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9)
    >>> run = ntkit.train(model, (x, y), nn.functional.cross_entropy, sgd, steps=40, batch_size=4)
    >>> result = PathKernel(run).decompose(x[:2] + 0.1)
    >>> result.contributions.shape, result.error < 1e-12
    (torch.Size([2, 2, 6]), True)
    """

    _infinite = True

    @no_context()
    def __init__(
        self,
        trajectory: Trajectory,
        outputs: Outputs = "full",
        *,
        integration: Integration = "secant",
        rule: Quadrature = "gauss",
        nodes: int = 8,
        tolerance: float | None = None,
        memory: int | str | None = None,
        model: nn.Module | None = None,
        data: tuple[Any, Tensor] | None = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        clip: float | None = None,
        select: Select | None = None,
    ) -> None:
        if not isinstance(trajectory, Trajectory):
            fix = "Pass what ntkit.train returned, or ntkit.Trajectory.open(folder)."
            raise refusal("trajectory", got=type(trajectory).__name__, expected="an ntkit.Trajectory", fix=fix)
        if not callable(outputs) and (not isinstance(outputs, str) or outputs not in ("full", "trace")):
            modes = '"full", "trace" (as a kernel only) or a callable'
            raise refusal("outputs", got=repr(outputs), expected=modes, fix="Pick a scalar by a callable.")
        self._replay = Replay(trajectory, model, data, loss, clip, select=select)
        self._select = self._replay.select
        check_mode(self._replay.model)
        self._trajectory, self._outputs = trajectory, outputs
        self._budget = parse_memory(memory)
        self._how: tuple[str, str, int, float | None] = (integration, rule, nodes, tolerance)
        self._network = self._replay.model
        self._params = {name: p for name, p in self._network.named_parameters() if name in self._replay.names}
        self._readout = _Readout(self._network, "full" if outputs == "trace" else outputs)
        self._segment(self._readout)  # checks the settings
        self._how = (integration, rule, int(nodes), tolerance)

    def __repr__(self) -> str:
        return of_model(type(self), self._network, self._params, steps=self._replay.steps, integration=self._how[0])

    # ------------------------------------------------------------------ the decomposition

    @no_context()
    def decompose(
        self,
        x_test: Batch,
        y_test: Tensor | None = None,
        *,
        layers: bool = False,
        steps: bool = False,
        path: str | Path | None = None,
    ) -> PathDecomposition:
        """The trained network's outputs for `x_test` as a sum: one number per training example.

        Parameters
        ----------
        x_test : m test points.
        y_test : their targets, for an `outputs` that takes them.
        layers : return the share of each parameter, too: [m, C, n] numbers per parameter.
        steps : return the share of each step, too: [m, C, batch] numbers per step.
        path : folder for the result, and from time to time for the state of a long sweep. A call with the same folder
            resumes there (after a kill, too), or returns the stored result.

        Returns
        -------
        PathDecomposition
            With the residual that certifies it; `error` is its largest value relative to the outputs.

        Raises
        ------
        Refused, NoSecant
            See the class.
        SelfCheckError
            When the traced operations do not give the outputs of the network.
        """
        x = self._with_targets(self._checked(x_test, "x_test"), y_test)
        with DecompositionFiles(path, self._identity(x, layers, steps) if path is not None else {}) as files:
            return self._decomposed(x, layers, steps, files)

    def _decomposed(self, x: Batch, layers: bool, steps: bool, files: DecompositionFiles) -> PathDecomposition:
        """The decomposition, from its folder or computed."""
        if (result := files.result()) is not None:
            return result
        replay = self._replay
        replay.check()
        segment = self._segment(self._readout)
        first, last = replay.initial(), replay.final()
        segment.origin = {name: first[name] for name in self._params}
        initial, prediction = (segment.outputs(end, x).double() for end in (first, last))
        m, outputs = prediction.shape
        fit = files.size(self._fit(outputs, layers))
        parts: list[Sweep] = []
        with task("path kernel", total=replay.steps * -(-m // fit)) as progress:
            for start in range(0, m, fit):
                part, some = take(x, slice(start, start + fit)), slice(start, min(start + fit, start + _COMPARED))
                sweep = Sweep(
                    segment, self._network, self._params, part, replay.n, outputs, self._memory() // 4, layers, steps
                )
                last_step = files.restore(sweep, start)
                for step in replay.backwards() if last_step != 0 else ():
                    if last_step is None or step.step < last_step:
                        sweep.step(step)
                        if step.step in (0, replay.steps - 1):
                            own = initial[some], prediction[some]
                            _compare(segment, take(x, some), *own, step.step == 0, self._precision())
                        files.keep(sweep, start, fit, step.step)
                    progress.advance()
                parts.append(sweep)
        contributions = torch.cat([p.contributions for p in parts]).cpu().contiguous()
        regularization = torch.cat([p.regularization for p in parts]).cpu()
        initial, prediction = initial.cpu(), prediction.cpu()
        result = PathDecomposition(
            contributions,
            initial,
            regularization,
            prediction,
            initial + contributions.sum(2) + regularization - prediction,
            _joined_layers(parts),
            _joined_steps(parts),
            self._rule_in_words(segment),
            replay.bitwise,
        )
        eps, missed = self._precision(), float(result.residual.abs().max())
        # outputs that vanish by symmetry are nothing but rounding
        if segment.integration == "secant" and not (result.error <= eps**0.5 or missed <= 1e3 * eps):
            warnings.warn(
                f"The sum over the training examples misses the network's outputs by {result.error:.1g} of their size. "
                "The run was no gradient descent on this network (a wrong gradient of PyTorch, a hook), or some "
                'operation decides by its parameters (a mask, rounding). Compare with integration="quadrature".',
                stacklevel=3,
            )
        files.finish(result)
        return result

    def _fit(self, outputs: int, layers: bool) -> int:
        """Test points whose sweep fits into memory."""
        largest = max(p.element_size() for p in self._params.values())
        size = sum(p.numel() for p in self._params.values()) * largest
        own = outputs * (2 * size + 16 * self._replay.n * (1 + layers * len(self._params)))
        return max(1, int(0.5 * self._memory() / (own + 1)))

    def _identity(self, x: Batch, layers: bool, steps: bool) -> dict[str, Any]:
        """All that the numbers of a decomposition depend on."""
        run = read_run(self._trajectory.path)
        outputs: Any = self._outputs
        name = outputs if isinstance(outputs, str) else function_identity(outputs)
        return {
            "run": {name: run[name] for name in ("initial", "stop", "settings")},
            "x": tensor_hash(tensors_to_hash(x)),
            "outputs": name,
            "loss": function_identity(self._replay.objective.loss),
            "integration": list(self._how),
            "layers": layers,
            "steps": steps,
            **({} if self._select is None else {"select": function_identity(self._select)}),
        }

    def _rule_in_words(self, segment: Segment) -> str:
        integration, rule, nodes, tolerance = self._how
        if integration != "quadrature":
            return integration
        bound, most = ("", nodes) if tolerance is None else ("at most ", segment.most)
        return f"{rule}, {bound}{most} node{'s' * (most != 1)} per step"

    def _segment(self, network: nn.Module) -> Segment:
        return Segment(network, self._params, *self._how, self._memory() // 4)

    def _with_targets(self, x: Batch, y: Tensor | None) -> Batch:
        if self._readout.takes_targets != (y is not None):
            got = "targets" if y is not None else "no targets"
            raise refusal(
                "y_test", got=f"{got}, while outputs takes {'two arguments' if y is None else 'one'}",
                expected="targets if outputs is a callable of outputs and targets",
                fix="Pass y_test, or outputs=lambda out, y: ... that uses it.",
            )  # fmt: skip
        if y is None:
            return x if isinstance(x, (tuple, dict)) else (x,)
        return checked(prepended(torch.as_tensor(y), x, "ntkit_targets"), "x and y", infinite=True)

    def _memory(self) -> int:
        return self._budget if self._budget is not None else free_memory(self._like().device) // 2

    def _precision(self) -> float:
        """Of the coarsest parameter."""
        return max(torch.finfo(p.dtype).eps for p in self._params.values())

    def _like(self) -> Tensor:
        return next(iter(self._params.values()))

    # ------------------------------------------------------------------ as a kernel

    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        return written(self._mean(lambda kernel: kernel(x1, x2)), out)

    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        return self._mean(lambda kernel: kernel.diagonal(x1) if x2 is None else kernel.paired(x1, x2))

    def operator(self, x: Batch) -> KernelOperator:
        """Matrix-free k(x): every product replays the whole run."""
        x = self._checked(x, "x")
        operators = TangentKernel(self._network, self._mode(), params=list(self._params)).operator(x)

        def apply(v: Tensor) -> Tensor:
            return self._mean(lambda kernel: kernel.operator(x) @ v)

        def diagonal() -> Tensor:
            values = self.diagonal(x)
            return values if values.dim() == 1 else values.diagonal(dim1=1, dim2=2).reshape(-1)

        return KernelOperator(operators.shape[0], apply, diagonal, self._like())

    def _mode(self) -> Any:
        if self._readout.takes_targets:
            raise refusal(
                "outputs", got="a callable that takes targets", expected='"full", "trace" or a callable of outputs',
                fix="A kernel takes no targets; use decompose(x, y).",
            )  # fmt: skip
        return self._outputs

    @no_context()
    def _mean(self, values: Callable[[TangentKernel], Tensor]) -> Tensor:
        """Mean over the run of what a tangent kernel gives, integrated over each step."""
        mode = self._mode()
        check_any_steps(self._replay.steps)
        network = _Readout(self._network, mode if callable(mode) else "full")
        segment = self._segment(network)
        first = self._replay.initial()
        segment.origin = {name: first[name] for name in self._params}
        engine = segment.engine
        own = {id(p) for p in engine.params.values()}
        outputs = "trace" if callable(mode) else mode
        kernel = TangentKernel(engine.model, outputs, params=lambda name, p: id(p) in own, memory=self._budget)
        total: Any = 0.0
        now = self._like()
        with task("path kernel", total=self._replay.steps) as progress:
            for step in self._replay.backwards():
                for weight in segment.places(step.before, step.after, ()):
                    now = values(kernel)
                    total = total + weight * now.double()  # a long sum in half precision would stop to grow
                progress.advance()
        return (total / self._replay.steps).to(now.dtype)


class _Readout(nn.Module):
    """The outputs to decompose, [n, C], from the network's outputs and targets."""

    def __init__(self, network: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.network, self._outputs = network, outputs
        self.takes_targets = callable(outputs) and required_arguments(outputs) > 1
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs to decompose; targets, if any, come first."""
        targets = None
        if self.takes_targets:
            targets, args = (kwargs.pop("ntkit_targets"), args) if kwargs else (args[0], args[1:])
        raw = self.network(*args, **kwargs)
        n = count(args if args else kwargs)
        if targets is None:
            return reduce_outputs(raw, self._outputs, n)
        outputs: Any = self._outputs
        return reduce_outputs(raw, lambda out: outputs(out, targets), n)


def _compare(segment: Segment, x: Batch, initial: Tensor, prediction: Tensor, at_start: bool, eps: float) -> None:
    """Raise unless the secant rules give the outputs of the network itself."""
    if (ends := segment.ends(x)) is None:
        return
    followed, own = (ends[0], initial) if at_start else (ends[1], prediction)
    eps = max(eps, torch.finfo(followed.dtype).eps)
    gap, size = float((followed - own).abs().max()), float(own.abs().max())
    if not gap <= eps**0.5 * (size + 1e-30):
        raise SelfCheckError(
            f"the traced operations of the network give outputs that differ from its own by {gap:.3g} (outputs up to "
            f'{size:.3g}); no path kernel was computed. Use integration="quadrature", and please report the network.'
        )


def _joined_layers(parts: list[Sweep]) -> dict[str, Tensor] | None:
    whole = {name: torch.cat([p.layers[name] for p in parts]).cpu().contiguous() for name in parts[0].layers}
    return whole or None


def _joined_steps(parts: list[Sweep]) -> list[StepShare] | None:
    if parts[0].steps is None:
        return None
    rows = zip(*(p.steps for p in parts if p.steps is not None), strict=True)
    shares = [StepShare(same[0][0], same[0][1], torch.cat([values for _, _, values in same])) for same in rows]
    return shares[::-1]
