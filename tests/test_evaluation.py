"""Tests of explanations by deletion against plain loops, scipy and scikit-learn; retrainings against training again."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

import ntkit
from ntkit.explanations import retrainings as module
from ntkit.explanations.retrainings import subsets
from ntkit.trajectory.batch_order import batch_indices

M, N = 7, 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Outcomes:
    """In the place of retrainings: a measure that is a function of which examples remain, with noise by seed."""

    def __init__(self, measure: str = "margin", noise: float = 0.5) -> None:
        self.m, self.n, self.measure, self.noise = M, N, measure, noise
        self.true = draw(M, N, seed=1)
        self.values = self.of(torch.ones(N), 0)

    def of(self, kept: Tensor, seed: int) -> Tensor:
        places = torch.arange(N, dtype=torch.float64)
        luck = torch.sin(places[None] * (1 + seed) + 3 * torch.arange(M)[:, None]) * self.noise
        return (self.true + luck) @ kept.double()

    def without(self, removed: Tensor, *, fresh: int = 0) -> Tensor:
        masks = torch.zeros(len(removed), N, dtype=torch.bool)
        for mask, out in zip(masks, removed, strict=True):
            mask[torch.as_tensor(out)] = True
        runs = [torch.stack([self.of(~mask, seed) for mask in masks]) for seed in range(1, fresh + 1) or [0]]
        return torch.stack(runs) if fresh else runs[0]


def rank_correlations(predicted: Tensor, real: Tensor) -> np.ndarray:
    """Of the columns, by scipy."""
    return np.array([spearmanr(a, b).statistic for a, b in zip(predicted.T, real.T, strict=True)])


def check_mean(found, by_point: np.ndarray) -> None:
    assert found.by_point.tolist() == pytest.approx(by_point.tolist(), abs=1e-12)
    assert found.value == pytest.approx(by_point.mean(), abs=1e-12)


@pytest.mark.parametrize("examples", [None, [3, 17, 4, 9, 11]])
def test_leave_one_out_is_the_rank_correlation(examples):
    again, scores = Outcomes(), draw(M, N, seed=2) + draw(M, N, seed=1)
    chosen = list(range(N)) if examples is None else examples
    real = torch.stack([again.of(torch.arange(N) != i, 0) for i in chosen])
    expected = rank_correlations(-scores[:, chosen].T, real)
    found = ntkit.leave_one_out(scores, again, examples=examples)
    check_mean(found, expected)
    assert found.standard_error == pytest.approx(expected.std(ddof=1) / M**0.5)
    assert expected.mean() > 0.3  # scores that know something, so that a sign is seen


@pytest.mark.parametrize("fresh", [0, 1, 3])
def test_datamodeling_score_its_error_and_its_ceiling(fresh):
    again, scores = Outcomes(), draw(M, N, seed=2) + draw(M, N, seed=1)
    found = ntkit.datamodeling_score(scores, again, share=0.25, sets=12, fresh=fresh, seed=5)
    removed = subsets(N, 0.25, 12, 5)
    assert removed.sum(1).tolist() == [6] * 12
    runs = [torch.stack([again.of(~mask, seed) for mask in removed]) for seed in range(1, fresh + 1) or [0]]
    predicted = torch.stack([torch.stack([scores[j][~mask].sum() for j in range(M)]) for mask in removed])
    real = sum(runs) / len(runs)
    expected = rank_correlations(predicted, real)
    check_mean(found, expected)
    without = [
        rank_correlations(predicted[kept], real[kept]).mean()
        for kept in ([k for k in range(12) if k != out] for out in range(12))
    ]
    jackknife = 11 / 12 * ((np.array(without) - np.mean(without)) ** 2).sum()
    assert found.standard_error == pytest.approx((expected.var(ddof=1) / M + jackknife) ** 0.5, rel=1e-12)
    if fresh < 2:
        assert found.ceiling is None
    else:  # Spearman and Brown: the reliability of a mean of `fresh` runs, and the correlation with its expectation
        between = np.mean([rank_correlations(a, b).mean() for a, b in itertools.combinations(runs, 2)])
        assert 0.2 < between < 0.98
        assert found.ceiling == pytest.approx(math.sqrt(fresh * between / (1 + (fresh - 1) * between)), rel=1e-12)


@pytest.mark.parametrize("fresh", [0, 2])
@pytest.mark.parametrize("against", [False, True])
def test_case_deletion_removes_the_extremes_of_each_test_point(against, fresh):
    again, scores, shares = Outcomes(), draw(M, N, seed=1) + 0.1 * draw(M, N, seed=2), (0.02, 0.1, 0.25)
    seeds = range(1, fresh + 1) or [0]
    before = again.values
    if fresh:  # fresh runs without one example
        few = subsets(N, 1 / N, 10)
        before = torch.stack([again.of(~mask, seed) for mask in few for seed in seeds]).mean(0)
    changes = torch.empty(M, 3, dtype=torch.float64)
    for j, (place, count) in itertools.product(range(M), enumerate((1, 2, 6))):
        kept = torch.ones(N)
        kept[sorted(range(N), key=lambda i, j=j: float(scores[j, i]), reverse=not against)[:count]] = 0
        changes[j, place] = sum(again.of(kept, seed)[j] for seed in seeds) / len(seeds) - before[j]
    found = ntkit.case_deletion(scores, again, against=against, shares=shares, fresh=fresh)
    torch.testing.assert_close(found.changes, changes, rtol=1e-12, atol=1e-12)
    assert found.area == pytest.approx(float(changes.mean()))
    assert found.standard_error == pytest.approx(float(changes.mean(1).std() / M**0.5))
    assert (found.area > 0) is against  # what has high scores helped


@pytest.mark.parametrize("measure", ["loss", "margin"])
def test_query_loss_difference_removes_what_helps_all(measure):
    """With the loss as measure the helpful examples are those of negative scores."""
    again, scores = Outcomes(measure), draw(M, N, seed=2) + draw(M, N, seed=1)
    order = scores.mean(0).argsort(descending=measure == "margin")
    kept = torch.ones(N)
    kept[order[:5]] = 0
    random = torch.stack([again.of(~mask, 0) for mask in subsets(N, 5 / N, 20)])
    expected = again.of(kept, 0) - random.mean(0)
    check_mean(ntkit.query_loss_difference(scores, again, share=0.2), expected.numpy())
    assert (float(expected.mean()) > 0) is (measure == "loss")


def test_wrong_labels_by_the_area_under_the_curve():
    draws = np.random.default_rng(0)
    for _ in range(5):
        suspicion, wrong = draws.integers(0, 9, size=40), draws.random(40) < 0.3  # with ties
        found = ntkit.mislabeled(torch.tensor(suspicion), torch.tensor(wrong))
        check_mean(found, np.array([roc_auc_score(wrong, suspicion)]))
    wrong, areas, squares = torch.arange(50) < 20, [], []
    for _ in range(3000):  # of exponential distributions, for which Hanley and McNeil's error is derived
        suspicion = torch.from_numpy(draws.exponential(size=50)) * torch.where(wrong, 2.5, 1.0)
        found = ntkit.mislabeled(suspicion, wrong)
        areas.append(found.value)
        squares.append(found.standard_error**2)
    assert np.mean(areas) == pytest.approx(2.5 / 3.5, abs=5 * np.std(areas) / 3000**0.5)
    assert np.mean(squares) == pytest.approx(np.var(areas), rel=5 * (2 / 3000) ** 0.5)


# ---------------------------------------------------------------------- retrainings


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


X, Y = draw(10, 3), torch.arange(10) % 2
TEST, GOAL = draw(4, 3, seed=3), torch.tensor([0, 1, 1, 0])
REMOVED = [[2], [0, 5, 9], []]


def margins(net: nn.Module) -> Tensor:
    out = net(TEST).detach()
    sign = torch.where(GOAL == 1, 1.0, -1.0)
    return sign * (out[:, 1] - out[:, 0])  # of two classes, the logit less the other's


@pytest.fixture(scope="module")
def run():
    sgd = lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.5, weight_decay=0.01)
    net = make(0)
    return net, ntkit.train(net, (X, Y), F.cross_entropy, sgd, steps=9, batch_size=4, seed=2)


def again(net: nn.Module, batches: list[Tensor], weights: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5, weight_decay=0.01)
    for rows in batches:
        optimizer.zero_grad()
        losses = F.cross_entropy(net(X[rows]), Y[rows], reduction="none")
        ((losses * weights[rows]).sum() / len(rows)).backward()
        optimizer.step()
    return margins(net)


def test_the_same_run_is_that_with_the_loss_of_some_examples_left_out(run):
    net, trajectory = run
    found = ntkit.Retrainings(trajectory, TEST, GOAL).without(REMOVED)
    batches = [trajectory.batch(step) for step in range(9)]
    for removed, values in zip(REMOVED, found, strict=True):
        weights = torch.ones(10).double()
        weights[torch.tensor(removed, dtype=torch.int64)] = 0
        torch.testing.assert_close(values, again(make(0), batches, weights), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2], margins(net), rtol=1e-10, atol=1e-10)


def test_fresh_runs_start_anew_on_what_remains(run):
    """Three epochs of 10 examples in batches of 4; of 9 that is as many steps, of 7 it is 3 x 2."""
    found = ntkit.Retrainings(run[1], TEST, GOAL, make=make).without(REMOVED[:2], fresh=2)
    assert found.shape == (2, 2, 4)
    for seed, (k, removed) in itertools.product((1, 2), enumerate(REMOVED[:2])):
        mask = torch.zeros(10, dtype=torch.bool)
        mask[removed] = True
        kept, own = (~mask).nonzero()[:, 0], module._seed(mask, seed)
        batches = [kept[batch_indices(own, len(kept), 4, step)] for step in range((9, 6)[k])]
        torch.testing.assert_close(
            found[seed - 1, k], again(make(own), batches, torch.ones(10).double()), rtol=1e-10, atol=1e-10
        )


def test_examples_in_any_list_of_integers_and_no_mask():
    """A mask was read as the numbers 0 and 1, and 3.7 as 3."""
    scores, again = draw(M, N), Outcomes()
    expected = ntkit.leave_one_out(scores, again, examples=[3, 17, 4]).value
    for examples in (np.array([3, 17, 4]), torch.tensor([3, 17, 4]), (np.int64(3), 17, 4)):
        assert ntkit.leave_one_out(scores, again, examples=examples).value == expected
    for wrong in (torch.arange(N) < 3, [True, False], [3.7, 4.0], [-1, 2], [N], 3, "34"):
        with pytest.raises(ntkit.Refused, match=r"examples: got .*; expected a list of training examples, 0 to 23"):
            ntkit.leave_one_out(scores, again, examples=wrong)


@pytest.mark.parametrize("share", [math.nan, "0.1", None, True, 0, 1, -0.1])
def test_refused_shares(share):
    scores, again = draw(M, N), Outcomes()
    for call in (
        lambda: ntkit.case_deletion(scores, again, shares=[0.1, share]),
        lambda: ntkit.datamodeling_score(scores, again, share=share),
        lambda: ntkit.query_loss_difference(scores, again, share=share),
    ):
        with pytest.raises(ntkit.Refused, match=r"shares?: got "):
            call()


@pytest.mark.parametrize("sets", [0, 2.0, True])
def test_refused_numbers_of_sets(sets):
    with pytest.raises(ntkit.Refused, match="sets: got "):
        ntkit.datamodeling_score(draw(M, N), Outcomes(), sets=sets)


def test_shares_in_an_array():
    scores, again = draw(M, N), Outcomes()
    expected = ntkit.case_deletion(scores, again, shares=(0.1, 0.2)).area
    assert ntkit.case_deletion(scores, again, shares=np.array([0.1, 0.2])).area == expected
