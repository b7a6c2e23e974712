"""Exact influence: how a trained network's predictions change with the weight of each training example."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, has_infinity, outputs_of, take
from ntkit.base.batch import checked as checked_batch
from ntkit.base.caller_context import no_context
from ntkit.base.checks import nearest, refusal
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.numbers import as_integer, as_number
from ntkit.base.progress import task
from ntkit.base.shown import Shown
from ntkit.data.streamed_samples import with_labels
from ntkit.explanations.measures_of_outputs import Measure, OutputMeasure
from ntkit.explanations.trust_limits import MISS, SMOOTH
from ntkit.explanations.unrolled import Unrolled, derivatives_of_measures
from ntkit.jacobian.model_outputs import Select, refuse_infinite_input
from ntkit.kernels.path.decomposition import Top
from ntkit.trajectory import Trajectory
from ntkit.trajectory.objective import Inputs, Loss
from ntkit.trajectory.recorded_run import assign
from ntkit.trajectory.replay import Replay
from ntkit.trajectory.replay_checks import check_any_steps
from ntkit.trajectory.reruns import Reruns

Curvature = Literal["hessian", "gauss-newton"]
# Of the weights in finite differences: 1e-6 loses less to rounding, smaller ones cross fewer kinks (ReLU). Where
# metasmoothness is low, kinks lie close, and larger steps would be runs for nothing.
_STEPS, _SMALL_STEPS = (1e-6, 1e-7, 1e-8), (1e-7, 1e-8, 1e-6)
_AGREE = 1e-4  # own error of finite differences that are good enough
_DIRECTION = 0.05  # of the weights in the measurement of metasmoothness


@dataclass(eq=False, repr=False)
class FiniteDifferences(Shown):
    """Derivatives by the weights of a few examples, once more: from runs with slightly other weights, in float64.

    Attributes
    ----------
    examples : int64 [k], those with the largest scores.
    values : [m, k], central differences, (m(w + h) - m(w - h)) / 2 h.
    error : largest over the examples of ||scores - values|| / ||values||.
    own_error : the same of one-sided differences, (m(w + h) - m(w)) / h: how far finite differences can be trusted.
    step : h / w, the first of 1e-6, 1e-7, 1e-8 whose own error is at most 1e-4; else that with the smallest. Where
        1e-6 is too large, weights move units of the network over their kinks. Where the metasmoothness is below 0.5
        that is likely, and 1e-6 comes last.
    """

    examples: Tensor
    values: Tensor
    error: float
    own_error: float
    step: float


@dataclass(eq=False, repr=False)
class Influence(Shown):
    """d measure_j / d weight of training example i: leaving i out changes measure_j by about ``-scores[j, i]``.

    The result of `ntkit.influence`, for m test points and n training examples; all tensors are on the CPU.

    Attributes
    ----------
    scores : [m, n], in float64. Positive: the example raises the measure.
    values : [m], the measures of the trained network.
    measure : the name of the measure.
    curvature, at : as passed.
    metasmoothness : from -1 to 1: how far the parameters move along a straight line when the weights do. Near 1 a
        derivative predicts real changes of the weights; below 0.5 it says little about them. -1 where a run with
        slightly other weights diverged.
    miss : of a trial in which all weights change at random by 5 %: the distance of the changes of the measures that the
        scores predict from the real ones, over the size of these. Above 0.5 the scores are not to be trusted; infinite
        where that run diverged.
    check : the derivatives of a few examples beside finite differences.
    layers : parameter -> its part of the scores, [m, n]; they sum to `scores`. None by default.
    steps : (step, rows int64 [B], scores [m, B]) for each step, in order. None by default.
    bitwise : whether the replayed run had the recorded bits.
    """

    scores: Tensor
    values: Tensor
    measure: str
    curvature: Curvature
    at: float
    metasmoothness: float
    miss: float
    check: FiniteDifferences
    layers: dict[str, Tensor] | None = None
    steps: list[tuple[int, Tensor, Tensor]] | None = field(default=None, repr=False)
    bitwise: bool = True

    @property
    def smooth(self) -> bool:
        """Whether the metasmoothness is at least 0.5."""
        return self.metasmoothness >= SMOOTH

    @property
    def trusted(self) -> bool:
        """Whether the scores missed the changes of the trial by at most half of their size."""
        return self.miss <= MISS

    def __str__(self) -> str:
        m, n = self.scores.shape
        lines = []
        trial = f"in a trial with all weights changed at random by {_DIRECTION:.0%}, the scores missed the changes of "
        trial += f"the {self.measure} by {self.miss:.2g} of their size"
        if not self.trusted:
            lines.append(
                f"Do not trust these scores: {trial} (metasmoothness {self.metasmoothness:.2f}). Use the early-stopped "
                "influence function, ntkit.InfluenceKernel with time=..., or train with a smaller learning rate."
            )
        elif not self.smooth:
            lines.append(
                f"Low metasmoothness ({self.metasmoothness:.2f}): training amplifies small changes. Yet {trial}."
            )
        exact = "." if self.curvature == "hessian" else " (they follow the Hessian, not the Gauss-Newton matrix)."
        k = len(self.check.examples)
        lines += [
            f"Influence of {n} training examples on the {self.measure} of {m} test points, at weight {self.at:g}.",
            f"Metasmoothness {self.metasmoothness:.3f}. Finite differences of {k} example{'s' * (k != 1)} "
            f"(weights changed by {self.check.step:g}) differ by {self.check.error:.1g} of their size{exact}",
        ]
        if self.trusted and self.smooth:
            lines.append(f"{trial.capitalize()}.")
        return "\n".join(lines)

    def top(self, k: int, *, against: bool = False) -> Top:
        """Training examples that raise the measure of each test point most, or that lower it most (`against`)."""
        n = self.scores.shape[1]
        k = as_integer(k, "k", f"1 <= k <= {n} training examples", "Use a smaller k.", least=1, most=n)
        values, examples = self.scores.topk(k, dim=1, largest=not against)
        return Top(examples, values)

    def record(self) -> dict[str, Any]:
        """Numbers for a report, as plain JSON: sizes, certificate; None for what is not finite."""
        m, n = self.scores.shape
        return {
            "test_points": m,
            "training_examples": n,
            "measure": self.measure,
            "curvature": self.curvature,
            "at": self.at,
            "metasmoothness": self.metasmoothness,
            "miss": _finite(self.miss),
            "finite_differences": _finite(self.check.error),
            "bitwise": self.bitwise,
        }


@no_context()
def influence(
    trajectory: Trajectory,
    x_test: Batch,
    y_test: Tensor | None = None,
    *,
    measure: Measure = "margin",
    curvature: Curvature = "hessian",
    at: float = 1.0,
    layers: bool = False,
    steps: bool = False,
    memory: int | str | None = None,
    model: nn.Module | None = None,
    data: tuple[Inputs, Tensor] | None = None,
    loss: Loss | None = None,
    clip: float | None = None,
    checks: int = 3,
    select: Select | None = None,
) -> Influence:
    r"""How the trained network's predictions change with the weight of each training example, exactly.

    Training is run once more from its end to its start, and differentiated on the way:

    .. math:: scores_{ji} = \frac{d\, m(f_{\theta_S(w)}(x_j))}{d w_i},

    where theta_S(w) are the parameters that the recorded run leads to when the gradient through example i's outputs is
    multiplied by w_i: with a mean over the batch, when its loss has weight w_i. So leaving example i out changes the
    measure of test point j by about ``-scores[j, i]``. This is the derivative of the whole run: through every later
    step, momentum, Adam's moments, weight decay, schedules and clipping.

    Parameters
    ----------
    trajectory : a run that has ended, of `ntkit.train` or `ntkit.record` (with indices), under SGD, Adam or AdamW.
        Steps without a snapshot are replayed.
    x_test : m test points.
    y_test : their targets: classes for "margin" and "logit" (the predicted ones if None), targets for "loss".
    measure : what is differentiated. "margin": f_y - log sum_{c != y} exp f_c, the log-odds of class y. "loss": the
        run's loss. "logit": f_y, or the only output. Or a callable from outputs (and targets) to one scalar per sample.
    curvature : "hessian" (exact), or "gauss-newton": each step's Hessian without the network's second derivatives.
    at : the weights at which the derivative is taken. 1.0: the run itself; predicts the removal of few examples best.
        0.5: the same run with all weights 1/2, done once; predicts the removal of a random half best.
    layers : return the part of each parameter, through whose gradient the example acts.
    steps : return the part of each step.
    memory : bytes that may be taken (or text such as "2 GB"); half of what is free if None. Test points that do not fit
        together (points x parameters numbers) are done in parts, each a sweep over the run.
    model, data, loss, clip : of the run, where `trajectory` was opened from disk.
    checks : number of examples, those with the largest scores, that are compared with finite differences, at least 1.
        Each takes two to six runs.
    select : the part of the model's output that the loss and the measure take, as for `ntkit.TangentKernel`.

    Returns
    -------
    Influence
        With its certificate: finite differences of a few examples, from runs in float64 with other weights, and the
        metasmoothness of the run, and a trial of the scores: what they miss when all weights change a little. ``print``
        says them, and first what speaks against trusting the scores.

    Raises
    ------
    Refused
        When the run cannot be replayed (see `ntkit.PathKernel`), an argument is invalid, the loss or the measure gives
        no finite derivative, or an operation can be differentiated only once.

    Notes
    -----
    Time: one to two and a half gradients of a batch per step and test point; for the certificate two runs, and
    1 + 2 `checks` runs in float64 (up to 1 + 6 `checks` where a step is no good). Memory: two to four times test
    points x parameters, never training examples x parameters; for the certificate a few copies of the parameters in
    float64 for each run that is in work.
    ReLU and max-pool are differentiated as autograd does.
    The derivative through training: Maclaurin, Duvenaud, Adams 2015; Hara, Nitanda, Maehara 2019. Metasmoothness:
    Ilyas, Engstrom 2025 (arXiv 2503.13751, definition 2).

    Examples
    --------
    >>> import ntkit
    >>> x, y = torch.linspace(-1, 1, 6).view(6, 1).double(), torch.tensor([0, 0, 1, 1, 0, 0])
    >>> model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9)
    >>> run = ntkit.train(model, (x, y), nn.functional.cross_entropy, sgd, steps=40, batch_size=4)
    >>> result = influence(run, x[:2] + 0.1, y[:2])
    >>> result.scores.shape, result.check.error < 1e-5
    (torch.Size([2, 6]), True)
    """
    if not isinstance(trajectory, Trajectory):
        fix = "Pass what ntkit.train returned, or ntkit.Trajectory.open(folder)."
        raise refusal("trajectory", got=type(trajectory).__name__, expected="an ntkit.Trajectory", fix=fix)
    if curvature not in ("hessian", "gauss-newton"):
        fix = nearest(str(curvature), ["hessian", "gauss-newton"])
        raise refusal("curvature", got=repr(curvature), expected="hessian or gauss-newton", fix=fix)
    fix = "Use 1.0 for single examples, 0.5 for halves of the training set."
    at = as_number(at, "at", lambda weight: 0 < weight < math.inf, "a weight > 0", fix)
    fix = "1 is the least: scores are never returned without a comparison."
    checks = as_integer(checks, "checks", "a number of examples, at least 1", fix, least=1)
    x, y = with_labels(x_test, y_test)
    x = checked_batch(x, "x_test", infinite=True)
    run = Replay(trajectory, model, data, loss, clip, moments=True, select=select)
    check_any_steps(run.steps)
    run.check()
    weights = torch.full((run.n,), float(at), dtype=torch.float64)
    replay = run if at == 1 else Replay(trajectory, model, data, loss, clip, weights, True, select)
    replay.check()
    assign(replay.model, replay.final(), "the end of the run")
    of = OutputMeasure(measure, replay.objective.loss, x, y, replay.model)
    sweeps = _sweeps(replay, x, of, curvature == "gauss-newton", layers, steps, parse_memory(memory))
    scores = torch.cat([sweep.scores for _, sweep in sweeps]).cpu()
    if not bool(torch.isfinite(scores).all()):
        if has_infinity(x) or has_infinity(replay.x):
            raise refuse_infinite_input()
        fix = "Look for a loss or an operation without a second derivative at these values (a norm or a root of 0)."
        raise refusal("scores", got="values that are not finite", expected="finite derivatives", fix=fix)
    values = torch.cat([values for values, _ in sweeps])
    smooth, miss = _trial(replay, weights.double(), scores, x, of)
    found = _certificate(Reruns(replay, torch.float64), weights, scores, x, of, checks, smooth)
    bound = max(torch.finfo(next(replay.model.parameters()).dtype).eps ** 0.25, 10 * found.own_error)
    if curvature == "hessian" and not found.error <= bound:
        warnings.warn(
            f"The derivatives of {len(found.examples)} examples differ from finite differences by {found.error:.1g} of "
            f"their size (expected: up to {bound:.1g}). Either training amplifies rounding (see metasmoothness), or an "
            "operation has a wrong second derivative (a function of its own, a hook, rounding to integers).",
            stacklevel=3,
        )
    return Influence(
        scores, values, of.name, curvature, float(at), smooth, miss, found,
        _joined_layers([sweep.layers for _, sweep in sweeps]),
        _joined_steps([sweep.steps for _, sweep in sweeps]), run.bitwise,
    )  # fmt: skip


def _sweeps(
    replay: Replay, x: Batch, of: OutputMeasure, gauss_newton: bool, layers: bool, steps: bool, budget: int | None
) -> list[tuple[Tensor, Unrolled]]:
    """Sweeps over the run, of as many test points at a time as memory allows."""
    like, m = next(replay.model.parameters()), count(x)
    size = sum(p.numel() for name, p in replay.model.named_parameters() if name in replay.names) * like.element_size()
    room = (budget if budget is not None else free_memory(like.device) // 2) // 2
    fit = max(1, int(room / (4 * size + 8 * replay.n * (1 + layers * len(replay.names)) + 1)))
    end = replay.final()
    result = []
    weights = torch.ones(replay.n) if replay.weights is None else replay.weights

    with task("influence", total=replay.steps * -(-m // fit)) as progress:
        for start in range(0, m, fit):
            part = range(start, min(start + fit, m))
            assign(replay.model, end, "the end of the run")
            values, by_parameters = derivatives_of_measures(
                replay.model,
                replay.names,
                lambda j: of.value(outputs_of(replay.model, take(x, slice(j, j + 1))), j),
                part,
            )
            sweep = Unrolled(replay, by_parameters, weights, gauss_newton, layers, steps)
            for step in replay.backwards():
                sweep.step(step)
                progress.advance()
            result.append((values, sweep))
    return result


def _trial(replay: Replay, weights: Tensor, scores: Tensor, x: Batch, of: OutputMeasure) -> tuple[float, float]:
    """Metasmoothness, and the miss of the scores: from two more runs in the model's own precision.

    All weights change along one random direction.
    """
    direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.stack([weights + j * _DIRECTION * weights * direction for j in (1, 2)])
    values, ends = Reruns(replay).run(rows, lambda outputs, _: of.values(outputs), x)
    start = replay.final()
    assign(replay.model, start, "the end of the run")
    real = values[0] - of.of_network(replay.model, x)
    predicted = scores @ (rows[0] - weights)
    moved, whole = 0.0, 0.0
    for name, (middle, last) in ends.items():
        first = start[name].to(middle)
        change = (last - first).abs().double()
        moved += float((change * (middle - first).sign() * (last - middle).sign()).sum())
        whole += float(change.sum())
    if whole == 0:  # the runs end in the same parameters: outputs that differ, differ by rounding
        real = torch.zeros_like(real)
    miss = float((predicted - real).norm() / real.norm().clamp_min(1e-300))
    if not math.isfinite(moved) or not math.isfinite(miss):
        return -1.0, math.inf  # such a run diverged
    return moved / whole if whole else 1.0, miss


def _certificate(
    reruns: Reruns, weights: Tensor, scores: Tensor, x: Batch, of: OutputMeasure, checks: int, smooth: float
) -> FiniteDifferences:
    """Finite differences of the examples with the largest scores, from runs in float64."""
    examples = scores.norm(dim=0).topk(min(checks, len(weights))).indices
    best: FiniteDifferences | None = None
    middle: Tensor | None = None  # measures of the run itself, the same for all steps
    for step in _STEPS if smooth >= SMOOTH else _SMALL_STEPS:
        found, middle = _differences(reruns, weights, examples, step, middle, scores, x, of)
        best = found if best is None or found.own_error < best.own_error else best
        if found.own_error <= _AGREE:
            break
    assert best is not None
    return best


def _differences(
    reruns: Reruns,
    weights: Tensor,
    examples: Tensor,
    step: float,
    middle: Tensor | None,
    scores: Tensor,
    x: Batch,
    of: OutputMeasure,
) -> tuple[FiniteDifferences, Tensor]:
    """Those of one step, and the measures of the run itself, which are computed if they are None."""
    rows = [weights] if middle is None else []
    for i in examples:
        for h in (1, -1):
            rows.append(weights.clone())
            rows[-1][i] *= 1 + h * step
    values, _ = reruns.run(torch.stack(rows), lambda outputs, _: of.values(outputs), x, keep=0)
    if middle is None:
        middle, values = values[0], values[1:]
    sizes = (step * weights[examples])[:, None]
    central, one_sided = (values[::2] - values[1::2]) / (2 * sizes), (values[::2] - middle) / sizes
    error, own_error = _distance(scores[:, examples].T, central), _distance(one_sided, central)
    return FiniteDifferences(examples, central.T, error, own_error, step), middle


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest relative distance of the rows of a from those of b."""
    distance, size = (a - b).norm(dim=1), b.norm(dim=1)
    return float((distance / size.clamp_min(1e-300)).max())


def _joined_layers(parts: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]} or None


def _joined_steps(parts: list[Any]) -> list[tuple[int, Tensor, Tensor]] | None:
    if parts[0] is None:
        return None
    shares = zip(*parts, strict=True)
    return [(same[0][0], same[0][1], torch.cat([scores for _, _, scores in same])) for same in shares][::-1]
