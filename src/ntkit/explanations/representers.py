"""Generalized representers: what a training example did for a prediction, as its importance times a similarity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntkit.base.batch import Batch, checked, count, take
from ntkit.base.caller_context import own_context
from ntkit.base.checks import refusal
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.numbers import as_integer, integers_of
from ntkit.base.progress import task
from ntkit.base.shown import Shown
from ntkit.data.streamed_samples import in_memory, with_labels
from ntkit.explanations.importances import Importance
from ntkit.gram.arrays import Matrix, as_floats, as_matrix, check_finite
from ntkit.kernels.kernel import Kernel
from ntkit.kernels.path.decomposition import PathDecomposition, Top
from ntkit.trajectory.objective import Inputs

AnyKernel = Kernel | Callable[[Any, Any], Any]


@dataclass(eq=False, repr=False)
class Explanation(Shown):
    """Scores of n training examples for m test points: what each did for the output that is explained.

    Any scores become an Explanation: ``Explanation(scores)``; those of a path kernel by `Explanation.of_path`.

    Attributes
    ----------
    scores : float64 [m, n], on the CPU.
    name : of the method.
    outputs : int64 [m], the output explained at each test point; None where that means nothing.
    expected : float64 [m], the part of the prediction that the scores of a point should sum to; None if there is none.
    certificate : numbers that say how exact the scores are.

    Examples
    --------
    >>> top = Explanation(torch.tensor([[0.5, -2.0, 1.0]])).top(1, against=True)
    >>> top.examples, top.values
    (tensor([[1]]), tensor([[-2.]], dtype=torch.float64))
    """

    scores: Tensor
    name: str = "scores"
    outputs: Tensor | None = None
    expected: Tensor | None = None
    certificate: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = as_matrix(self.scores, "scores", "Test points lie along the rows.").to("cpu", torch.float64)
        for name in ("outputs", "expected"):
            if (value := getattr(self, name)) is None:
                continue
            values = check_finite(as_floats(value, name), name).cpu()
            if values.shape != self.scores.shape[:1]:
                fix = "Give one value per test point."
                raise refusal(name, got=f"shape {list(values.shape)}", expected=f"[{len(self.scores)}]", fix=fix)
            setattr(self, name, values.to(torch.int64 if name == "outputs" else torch.float64))

    @classmethod
    def of_path(cls, decomposition: PathDecomposition, output: int | Tensor | None = None) -> Explanation:
        """Contributions of a path kernel to one output (see `PathDecomposition.top`), with what they should sum to."""
        m = len(decomposition.prediction)
        chosen = decomposition.chosen_outputs(output)
        rest = decomposition.prediction - decomposition.initial - decomposition.regularization
        expected = rest[torch.arange(m), chosen]
        return cls(decomposition.of(chosen), "path kernel", chosen, expected, {"error": decomposition.error})

    @property
    def total(self) -> Tensor:
        """Sum over the training examples, float64 [m]."""
        return self.scores.sum(1)

    @property
    def residual(self) -> Tensor:
        """`total` - `expected`, float64 [m]."""
        if self.expected is None:
            fix = "Pass expected= to explain."
            raise refusal("expected", got="nothing", expected="what the scores should sum to", fix=fix)
        return self.total - self.expected

    def top(self, k: int, *, against: bool = False) -> Top:
        """The k training examples with the largest scores of each test point, or with the most negative (`against`)."""
        n = self.scores.shape[1]
        k = as_integer(k, "k", f"1 <= k <= {n} training examples", "Use a smaller k.", least=1, most=n)
        values, examples = self.scores.topk(k, dim=1, largest=not against)
        return Top(examples, values)


@own_context()
def explain(
    kernel: AnyKernel,
    importance: Importance | Matrix,
    x_train: Inputs,
    x_test: Inputs,
    *,
    output: int | Tensor | None = None,
    expected: Matrix | None = None,
    memory: int | str | None = None,
) -> Explanation:
    r"""Scores phi_ji = sum_{c'} K(x_j, x_i)_{c c'} alpha_{i c'} of training example i for output c of test point j.

    Parameters
    ----------
    kernel : any `ntkit.Kernel`, or a callable ``k(x1, x2)`` -> [n1, n2], or [n1, n2, C, C]. A scalar kernel counts as
        the same for each output: phi_ji = K(x_j, x_i) alpha_ic.
    importance : alpha, an `Importance` or numbers [n] or [n, C].
    x_train, x_test : n and m samples: a tensor, a tuple or a dict of tensors.
    output : c: one for all test points, one for each (int64 [m]), or None for the largest of `expected`, or else of the
        outputs that the scores sum to.
    expected : [m] or [m, C], what the scores should sum to (the model's outputs, less the share of its initial ones).
    memory : bytes of kernel values at a time (or text such as "2 GB"); half of what is free if None. Test points that
        do not fit together are done in strips.

    Returns
    -------
    Explanation
        scores [m, n] and the output explained.

    Raises
    ------
    Refused
        When sizes do not fit, a value is not finite, or an output is out of range.

    Notes
    -----
    Tsai, Yeh, Ravikumar 2023 (generalized representers). With one kernel value per pair a score is one importance times
    one similarity; with a C x C block it is a sum of C such products, which need not satisfy `check_axioms`. Kernels of
    the paper: ``ConjugateKernel`` (last layer), ``TangentKernel`` (at the model's current parameters),
    ``InfluenceKernel``; sums over checkpoints: `tracin`.

    Examples
    --------
    >>> import ntkit
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> explain(lambda a, b: a @ b.T, torch.tensor([1.0, -1.0]), x, x).scores
    tensor([[ 1., -2.],
            [ 2., -4.]], dtype=torch.float64)
    """
    if not callable(kernel):
        fix = "Pass e.g. ntkit.TangentKernel(model)."
        raise refusal("kernel", got=f"a {type(kernel).__name__}", expected="a kernel, or a function k(x1, x2)", fix=fix)
    weights = importance if isinstance(importance, Importance) else Importance(torch.as_tensor(importance), "given")
    train, test = (checked(in_memory(x), name, infinite=True) for x, name in ((x_train, "x_train"), (x_test, "x_test")))
    m, (n, C) = count(test), weights.values.shape
    if count(train) != n:
        fix = "Pass the training examples that the importance belongs to, in its order."
        raise refusal("x_train", got=f"{count(train)} samples", expected=f"{n}, as the importance has", fix=fix)
    target = None if expected is None else _checked_expected(expected, m, C)
    chosen = None if output is None else checked_outputs(output, m, C)
    if chosen is None and target is not None and target.ndim == 2:
        chosen = target.argmax(1)
    budget = parse_memory(memory) or free_memory(torch.device("cpu")) // 2
    strip = max(1, int(budget / (24 * n * C * C)))
    scores, outputs = torch.empty(m, n, dtype=torch.float64), torch.empty(m, dtype=torch.int64)
    with task("explanations", total=m) as progress:
        for start in range(0, m, strip):
            rows = slice(start, min(start + strip, m))
            values = _values(kernel, take(test, rows), train, rows.stop - start, n, C)
            outputs[rows] = _sums(values, weights.values).argmax(1) if chosen is None else chosen[rows]
            scores[rows] = _scores(values, weights.values, outputs[rows])
            progress.advance(rows.stop - start)
    if target is not None and target.ndim == 2:
        target = target.gather(1, outputs[:, None])[:, 0]
    name = f"{weights.name} x {getattr(kernel, '__name__', type(kernel).__name__)}"
    return Explanation(scores, name, outputs, target, dict(weights.certificate))


def checked_outputs(output: int | Tensor, m: int, C: int) -> Tensor:
    """Take one output for all test points, or one for each: int64 [m]."""
    index = integers_of(output)
    if index is None or index.shape not in ((), (m,)) or not bool(((index >= 0) & (index < C)).all()):
        got = repr(output)[:80] if index is None or not index.ndim else f"outputs {index.tolist()[:20]}"
        expected, fix = f"an integer from 0 to {C - 1}, or {m} of them", "Outputs are numbered from 0."
        raise refusal("output", got=got, expected=expected, fix=fix)
    return index.cpu().expand(m)


def _checked_expected(expected: Matrix, m: int, C: int) -> Tensor:
    values = check_finite(as_floats(expected, "expected"), "expected").to("cpu", torch.float64)
    if list(values.shape) not in ([m], [m, C]):
        fix = "Give one value per test point (and output)."
        raise refusal("expected", got=f"shape {list(values.shape)}", expected=f"[{m}] or [{m}, {C}]", fix=fix)
    return values


def _values(kernel: AnyKernel, test: Batch, train: Batch, m: int, n: int, C: int) -> Tensor:
    """Kernel values in float64, [m, n] or [m, n, C, C]."""
    values = as_floats(kernel(test, train), "kernel").cpu()
    if list(values.shape) not in ([m, n], [m, n, C, C]):
        expected = f"[{m}, {n}], or [{m}, {n}, {C}, {C}] as the importance has {C} outputs"
        fix = (
            'Use outputs="full" (one value per pair of outputs), or a scalar kernel, and the importance of that model.'
        )
        raise refusal("kernel", got=f"values of shape {list(values.shape)}", expected=expected, fix=fix)
    return check_finite(values, "kernel").to(torch.float64)


def _sums(values: Tensor, alpha: Tensor) -> Tensor:
    """Scores summed over training examples, for each output: [m, C]."""
    if values.ndim == 2:
        return values @ alpha
    return values.permute(0, 2, 1, 3).flatten(2) @ alpha.reshape(-1)


def _scores(values: Tensor, alpha: Tensor, outputs: Tensor) -> Tensor:
    """Scores for one output of each test point, [m, n]."""
    if values.ndim == 2:
        return values * alpha.T[outputs]
    rows = values[torch.arange(len(values)), :, outputs]  # [m, n, C]
    return (rows * alpha).sum(2)


class Explainer:
    """Any scores under the interfaces of other libraries; neither has to be installed.

    ``explain(test_data, targets)`` and ``self_influence()`` are what quanda's metrics call; ``influence(inputs, k=None,
    proponents=True)`` is Captum's.

    Parameters
    ----------
    scores : a function of test points and, for each, the output (or class) that is explained (int64 [m], or None) ->
        an `Explanation` or scores [m, n].
    x_train, y_train : the training examples, and the outputs (or classes) to explain them by, for `self_influence`.
    batch_size : test points per call of `scores` in `self_influence`.

    Examples
    --------
    >>> x, alpha = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, -1.0])
    >>> explainer = Explainer(lambda test, targets: explain(lambda a, b: a @ b.T, alpha, x, test), x)
    >>> explainer.self_influence()
    tensor([ 1., -4.], dtype=torch.float64)
    >>> explainer.influence(x, k=1)[0]
    tensor([[0],
            [0]])
    """

    def __init__(
        self,
        scores: Callable[[Any, Tensor | None], Explanation | Matrix],
        x_train: Inputs,
        y_train: Tensor | None = None,
        *,
        batch_size: int = 256,
    ) -> None:
        if not callable(scores):
            fix = "Pass e.g. lambda x, targets: ntkit.explain(kernel, importance, x_train, x, output=targets)."
            raise refusal("scores", got=f"a {type(scores).__name__}", expected="a function of test points", fix=fix)
        self._scores, self._batch = scores, batch_size
        x_train, y_train = with_labels(x_train, y_train)
        self._train, self._targets = checked(x_train, "x_train", infinite=True), y_train
        if y_train is not None and len(y_train) != count(self._train):
            fix = "Give one per training example."
            raise refusal("y_train", got=f"{len(y_train)} values", expected=f"{count(self._train)}", fix=fix)

    def explain(self, test_data: Inputs, targets: Any = None) -> Tensor:
        """Scores float64 [m, n] of the training examples for test points and the outputs explained."""
        test = checked(in_memory(test_data), "test_data", infinite=True)
        m, n = count(test), count(self._train)
        goal = None if targets is None else torch.as_tensor(targets)
        if goal is not None and (goal.ndim != 1 or len(goal) != m):
            fix = "Give one per test point."
            raise refusal("targets", got=f"shape {list(goal.shape)}", expected=f"[{m}]", fix=fix)
        found = self._scores(test, goal)
        result = found if isinstance(found, Explanation) else Explanation(torch.as_tensor(found))
        if result.scores.shape != (m, n):
            got, fix = f"shape {list(result.scores.shape)}", "Test points lie along the rows."
            raise refusal("scores", got=got, expected=f"[{m}, {n}]", fix=fix)
        return result.scores

    def self_influence(self, batch_size: int | None = None) -> Tensor:
        """Score of each training example for itself, float64 [n]."""
        n, step, parts = count(self._train), batch_size or self._batch, []
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            goal = None if self._targets is None else self._targets[rows]
            parts.append(self.explain(take(self._train, rows), goal)[:, rows].diagonal())
        return torch.cat(parts)

    def influence(self, inputs: Inputs, k: int | None = None, proponents: bool = True) -> Tensor | Top:
        """Scores [m, n]; with k the k largest (or smallest) of each test point: their examples and values."""
        result = Explanation(self.explain(inputs))
        return result.scores if k is None else result.top(k, against=not proponents)
