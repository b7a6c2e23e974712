"""Tests of explanations by what really happens: leave-one-out, datamodeling score, deletion, wrong labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integers, as_number, check_dense
from ntkit.base.shown import Shown
from ntkit.explanations.retrainings import Retrainings, subsets


@dataclass(eq=False, repr=False)
class Evaluation(Shown):
    """How well scores predict what happens to the network, as one number with its error.

    Attributes
    ----------
    value, standard_error : mean over test points and its standard error.
    by_point : [m], the number for each test point, NaN where it is not defined (scores or outcomes that are all equal).
    protocol : what was done, in words: share of examples removed, kind of runs, seeds, numbers of sets and test points.
    ceiling : the value that a perfect prediction of the mean over seeds would get; None where runs have no chance in
        them.
    """

    value: float
    standard_error: float
    by_point: Tensor
    protocol: str
    ceiling: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean, by the normal distribution."""
        return self.value - 1.96 * self.standard_error, self.value + 1.96 * self.standard_error

    def __str__(self) -> str:
        ceiling = "" if self.ceiling is None else f" (ceiling {self.ceiling:.3f})"
        return f"{self.value:.3f} ± {self.standard_error:.3f}{ceiling}: {self.protocol}"

    def record(self) -> dict[str, Any]:
        """Numbers for a report, as plain JSON."""
        return {"value": self.value, "error": self.standard_error, "ceiling": self.ceiling, "protocol": self.protocol}


def leave_one_out(scores: Tensor, retrainings: Retrainings, *, examples: Sequence[int] | None = None) -> Evaluation:
    """Rank correlation of ``-scores[j, i]`` with the change of measure j when example i alone is left out.

    Parameters
    ----------
    scores : [m, n].
    retrainings : retrainings of the run; the same run without each example, one at a time.
    examples : which examples are left out; None = all.

    Examples
    --------
    >>> import ntkit
    >>> from torch import nn
    >>> x, y = torch.linspace(-1, 1, 8).view(8, 1).double(), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    >>> model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    >>> run = ntkit.train(model, (x, y), nn.functional.cross_entropy, sgd, steps=10)
    >>> scores = ntkit.influence(run, x[:2] + 0.1, y[:2]).scores
    >>> leave_one_out(scores, Retrainings(run, x[:2] + 0.1, y[:2])).value > 0.9
    True
    """
    scores = _checked(scores, retrainings)
    expected, fix = f"a list of training examples, 0 to {retrainings.n - 1}", "Of a mask: mask.nonzero().ravel()."
    examples = range(retrainings.n) if examples is None else examples
    chosen = as_integers(examples, "examples", expected, fix, least=0, most=retrainings.n - 1)
    outcome = retrainings.without([[i] for i in chosen])
    return _correlation(
        -scores[:, chosen].T,
        outcome,
        f"each of {len(chosen)} examples left out, the same run; {retrainings.m} test points",
    )


def datamodeling_score(
    scores: Tensor, retrainings: Retrainings, *, share: float = 0.5, sets: int = 50, fresh: int = 0, seed: int = 0
) -> Evaluation:
    """Linear datamodeling score: how well the sum of the remaining scores ranks what happens without random sets.

    Parameters
    ----------
    scores : [m, n].
    retrainings : retrainings of the run.
    share : share of the examples that is removed.
    sets : number of random sets.
    fresh : 0: the same run without them. Else the number of fresh runs per set (new initialization and order), whose
        mean is predicted; the ceiling then comes from the correlation between seeds.
    seed : of the sets.

    Notes
    -----
    Park, Georgiev, Ilyas, Leclerc, Madry 2023 (TRAK): the mean over test points of Spearman's correlation.
    All test points share the sets. So the error has two parts, added in squares: that of the draw of test points, and
    that of the draw of sets, by leaving out one set at a time (jackknife).
    """
    scores = _checked(scores, retrainings)
    removed = subsets(retrainings.n, share, sets, seed)
    outcome = retrainings.without(removed, fresh=fresh)
    kind = f"mean of {fresh} fresh runs" if fresh else "the same run"
    protocol = f"{100 * share:g} % of the examples removed, {sets} random sets, {kind}; {retrainings.m} test points"
    predicted, real = (~removed).double() @ scores.T, outcome.mean(0) if fresh else outcome
    result = _correlation(predicted, real, protocol)
    result.standard_error = math.hypot(result.standard_error, _error_of_rows(predicted, real))
    if fresh > 1:
        pairs = [_correlation(outcome[a], outcome[b], "").value for a in range(fresh) for b in range(a)]
        between = sum(pairs) / len(pairs)
        between = 0.0 if between < 0 else between  # NaN stays
        result.ceiling = math.sqrt(fresh * between / (1 + (fresh - 1) * between))
    return result


@dataclass(eq=False, repr=False)
class Deletion(Shown):
    """What happens to each test point without the examples that an explanation ranks highest, or lowest.

    Attributes
    ----------
    shares : shares of the training set that are removed, k of them.
    changes : [m, k], the measure afterwards minus before, in float64.
    area, error : mean over shares and test points of the change (AUC-DEL), and its standard error over test points.
    protocol : what was done, in words.
    """

    shares: list[float]
    changes: Tensor
    area: float
    standard_error: float
    protocol: str

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the area, by the normal distribution."""
        return self.area - 1.96 * self.standard_error, self.area + 1.96 * self.standard_error

    def __str__(self) -> str:
        return f"{self.area:+.4g} ± {self.standard_error:.2g}: {self.protocol}"


def case_deletion(
    scores: Tensor,
    retrainings: Retrainings,
    *,
    against: bool = False,
    shares: Sequence[float] = (0.02, 0.05, 0.1),
    fresh: int = 0,
) -> Deletion:
    """Remove the examples with the highest scores of each test point (`against`: the lowest), and train again.

    AUC-DEL+ should be as negative as possible: without its most helpful examples a prediction gets worse. AUC-DEL-
    (`against`) should be as positive as possible. Random scores give about zero.

    Parameters
    ----------
    scores : [m, n].
    retrainings : retrainings of the run.
    shares : shares of the training set that are removed.
    fresh : 0: the same run without them; else the number of fresh runs, of which the mean is taken.

    Notes
    -----
    Tsai, Yeh, Ravikumar 2023 (case deletion diagnostics).
    """
    scores = _checked(scores, retrainings)
    n, expected, fix = retrainings.n, "a list of shares above 0 that leave an example", "Use e.g. (0.02, 0.05, 0.1)."
    given = shares.tolist() if isinstance(shares, (Tensor, np.ndarray)) else shares
    if not isinstance(given, (list, tuple)) or not given:
        raise refusal("shares", got=repr(given)[:80], expected=expected, fix=fix)
    good = lambda share: 0 < share < 1 and max(1, round(share * n)) < n
    shares = [as_number(share, "shares", good, expected, fix) for share in given]
    counts = [max(1, round(share * n)) for share in shares]
    order = scores.argsort(dim=1, descending=not against, stable=True)
    removed = torch.zeros(retrainings.m, len(counts), retrainings.n, dtype=torch.bool)
    for place, count in enumerate(counts):
        removed[:, place].scatter_(1, order[:, :count], True)
    outcome = retrainings.without(removed.flatten(0, 1), fresh=fresh)
    outcome = (outcome.mean(0) if fresh else outcome).view(retrainings.m, len(counts), retrainings.m)
    own = outcome[torch.arange(retrainings.m), :, torch.arange(retrainings.m)]
    before = retrainings.values
    if fresh:  # fresh runs are compared with fresh runs on all but as few examples as possible
        few = retrainings.without(subsets(retrainings.n, 1 / retrainings.n, min(10, retrainings.n)), fresh=fresh)
        before = few.mean((0, 1))
    changes = own - before[:, None]
    means = changes.mean(1)
    which = "lowest" if against else "highest"
    kind = f"mean of {fresh} fresh runs" if fresh else "the same run"
    words = ", ".join(f"{100 * share:g}" for share in shares)
    error = float(means.std() / math.sqrt(retrainings.m)) if retrainings.m > 1 else math.inf
    protocol = f"{words} % of the examples removed, those with the {which} scores, {kind}; {retrainings.m} test points"
    return Deletion(list(shares), changes, float(means.mean()), error, protocol)


def query_loss_difference(
    scores: Tensor, retrainings: Retrainings, *, share: float = 0.01, sets: int = 20
) -> Evaluation:
    """Remove the examples that are most helpful to all test points together, and compare with random ones.

    For each test point: the measure after removing the `share` with the largest mean scores, minus the mean after
    removing as many at random. With the loss as measure the helpful ones are those with the most negative scores.
    """
    scores = _checked(scores, retrainings)
    good = lambda share: 0 < share < 1
    count = max(1, round(as_number(share, "share", good, "a share between 0 and 1", "Use e.g. 0.01.") * retrainings.n))
    sign = -1.0 if retrainings.measure == "loss" else 1.0
    chosen = torch.zeros(1, retrainings.n, dtype=torch.bool)
    chosen[0, (sign * scores.mean(0)).topk(count).indices] = True
    random = retrainings.without(subsets(retrainings.n, count / retrainings.n, sets)).mean(0)
    by_point = retrainings.without(chosen)[0] - random
    protocol = f"{100 * share:g} % removed, against {sets} random sets, the same run; {retrainings.m} test points"
    return _mean(by_point, protocol)


def mislabeled(suspicion: Tensor, wrong: Tensor) -> Evaluation:
    """Area under the ROC curve with which examples of a wrong label are found among all, by their suspicion.

    Parameters
    ----------
    suspicion : [n], the larger, the more suspect: an example's loss, |leave-one-out residual|, or how much it does for
        itself. Of `ntkit.influence` on the training set and its labels that is ``scores.diagonal()`` with
        measure="margin", and ``-scores.diagonal()`` with measure="loss": more weight on an example lowers its own loss.
    wrong : bool [n], which labels are wrong.

    Returns
    -------
    Evaluation
        With the standard error of Hanley and McNeil 1982.

    Examples
    --------
    >>> round(mislabeled(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, True, False])).value, 2)
    1.0
    """
    from scipy.stats import rankdata

    for name, tensor in (("suspicion", suspicion), ("wrong", wrong)):
        if not isinstance(tensor, Tensor):
            raise refusal(name, got=type(tensor).__name__, expected="a tensor [n]", fix="Use torch.tensor.")
    suspicion, wrong = suspicion.detach().double().cpu(), wrong.cpu()
    if bool(suspicion.isnan().any()):
        raise refusal("suspicion", got="NaN", expected="numbers that can be ranked", fix="Check how it was computed.")
    if wrong.dtype != torch.bool or wrong.shape != suspicion.shape or wrong.dim() != 1:
        got, expected = f"{wrong.dtype} {list(wrong.shape)}", f"bool {list(suspicion.shape)}"
        raise refusal("wrong", got=got, expected=expected, fix="One entry per training example.")
    bad, good = int(wrong.sum()), int((~wrong).sum())
    if not bad or not good:
        got, fix = f"{bad} wrong labels of {len(wrong)}", "Flip some labels, and not all."
        raise refusal("wrong", got=got, expected="both wrong and right labels", fix=fix)
    ranks = torch.from_numpy(rankdata(suspicion.numpy()))
    area = float((ranks[wrong].sum() - bad * (bad + 1) / 2) / (bad * good))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (bad - 1) * (q1 - area**2) + (good - 1) * (q2 - area**2)) / (bad * good)
    by_point = torch.full((1,), area, dtype=torch.float64)
    return Evaluation(area, math.sqrt(max(variance, 0.0)), by_point, f"{bad} of {len(wrong)} labels wrong")


def _checked(scores: Tensor, retrainings: Retrainings) -> Tensor:
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (retrainings.m, retrainings.n):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        fix = "Explain the same test points by the same training examples."
        raise refusal("scores", got=got, expected=f"({retrainings.m}, {retrainings.n})", fix=fix)
    check_dense(scores, "scores")
    if not bool(torch.isfinite(scores).all()):
        raise refusal(
            "scores", got="values that are not finite", expected="finite scores", fix="Check the explanation."
        )
    return scores.detach().double().cpu()


def _correlation(predicted: Tensor, outcome: Tensor, protocol: str) -> Evaluation:
    """Spearman's correlation over rows [K, m] for each test point."""
    a, b = _ranks(predicted), _ranks(outcome)
    a, b = a - a.mean(0), b - b.mean(0)
    size = (a.square().sum(0) * b.square().sum(0)).sqrt()
    return _mean((a * b).sum(0) / torch.where(size > 0, size, math.nan), protocol)


def _error_of_rows(predicted: Tensor, outcome: Tensor) -> float:
    """Standard error of the mean correlation by the draw of its rows, by leaving out one at a time."""
    k = len(predicted)
    if k < 3:
        return math.inf
    rest = [torch.arange(k) != row for row in range(k)]
    values = [_correlation(predicted[keep], outcome[keep], "").value for keep in rest]
    return math.sqrt((k - 1) * float(torch.tensor(values, dtype=torch.float64).var(unbiased=False)))


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.double().numpy(), axis=0))


def _mean(by_point: Tensor, protocol: str) -> Evaluation:
    finite = by_point[torch.isfinite(by_point)]
    error = float(finite.std() / math.sqrt(len(finite))) if len(finite) > 1 else math.inf
    return Evaluation(float(finite.mean()) if len(finite) else math.nan, error, by_point, protocol)
