"""Intervals and tests over seeds and test examples, beside scipy's and beside definitions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from ntkit.commands import seed_statistics as statistics
from ntkit.commands.network_measures import _mean as mean_change
from ntkit.commands.regression_measures import _paired as paired_regressions
from ntkit.report.judgments import more_invariant


def test_intervals_and_tests_are_scipys() -> None:
    draw = np.random.default_rng(1)
    for n, m in ((2, 2), (3, 5), (8, 4)):
        a, b = draw.normal(size=n), draw.normal(0.7, 3.0, size=m)
        own, theirs = statistics.over_seeds(a), stats.t.interval(0.95, n - 1, a.mean(), stats.sem(a))
        assert (own["low"], own["high"]) == pytest.approx(theirs)
        test, found = stats.ttest_ind(a, b, equal_var=False), statistics.welch(a, b)
        assert (found["difference"], found["p"]) == pytest.approx((a.mean() - b.mean(), test.pvalue))
        assert (found["low"], found["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
        c, d = draw.normal(size=20) ** 2, draw.normal(size=20) ** 2
        assert statistics.paired_squares(c, d)["p"] == pytest.approx(stats.ttest_rel(c, d).pvalue)


def test_no_spread_gives_no_interval_and_no_verdict() -> None:
    thirds = [0.1, 0.1, 0.1]  # whose computed mean is not 0.1
    assert statistics.over_seeds(thirds) == {"n": 3, "mean": pytest.approx(0.1), "low": None, "high": None}
    assert statistics.welch(thirds, thirds)["p"] == 1.0
    assert statistics.welch(thirds, [0.2, 0.2])["p"] is None
    assert statistics.welch([0.1], [0.2, 0.3])["p"] is None
    same = np.array([0.1, 0.1, 0.1])
    assert statistics.paired_squares(same, same)["p"] == 1.0
    assert statistics.paired_squares(same + 1, same)["p"] is None


def test_holm_is_the_closure_of_bonferroni() -> None:
    """Of each test, the largest Bonferroni p value over all sets of tests that it belongs to."""
    draw = np.random.default_rng(2)
    for n in (1, 2, 5, 7):
        ps = draw.uniform(size=n) ** 3
        sets = [s for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]
        expected = [max(min(1.0, len(s) * min(ps[j] for j in s)) for s in sets if i in s) for i in range(n)]
        assert statistics.holm(list(ps)) == pytest.approx(expected)


@pytest.mark.parametrize("exponent", [-320, -300, -170, 90, 160, 300])
def test_numbers_of_any_size_have_the_statistics_of_others(exponent: int) -> None:
    """Their squares are 0 or infinite: p was 1 of large differences, and an interval ended in a division by zero."""
    draw = np.random.default_rng(3)
    a, b = np.round(draw.normal(size=(2, 6)), 3)
    factor = 2.0 ** round(exponent * np.log2(10))
    pairs = [(statistics.welch(v[0], v[1]), statistics.paired_squares(*v)) for v in ((a, b), (a * factor, b * factor))]
    rel = 1e-12 if exponent > -310 else 1e-3  # numbers below 2.2e-308 have fewer digits
    for plain, scaled in zip(*pairs, strict=True):
        assert scaled["p"] == pytest.approx(plain["p"], rel=rel)
        for name in {"difference", "low", "high"} & plain.keys():
            assert scaled[name] == pytest.approx(plain[name] * factor, rel=rel)
    plain, scaled = (statistics.over_seeds(v) for v in (a, a * factor))
    assert scaled["low"] == pytest.approx(plain["low"] * factor, rel=rel)


def test_one_difference_that_recurs_has_no_interval_of_its_mean() -> None:
    assert paired_regressions(np.full(3, 0.1))["low"] is None
    assert paired_regressions(np.zeros(3))["low"] == 0.0
    a = np.random.default_rng(4).normal(size=7)
    found = paired_regressions(a)
    assert (found["low"], found["high"]) == pytest.approx(stats.t.interval(0.95, 6, a.mean(), stats.sem(a)))


def jackknife(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> float:
    """Standard error of a statistic of samples, from what it is without each of them."""
    n = len(values)
    without = np.array([statistic(np.delete(values, i)) for i in range(n)])
    return float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))


@pytest.mark.parametrize("n", [3, 4, 7, 30])
def test_errors_of_changes_of_cosines_are_the_jackknifes(n: int) -> None:
    """Of the mean over all pairs, and of what a transform's change has beyond it, by leaving out image by image."""
    draw = np.random.default_rng(n)
    pairs = draw.normal(size=(n, n))
    pairs, own, samples = pairs + pairs.T, draw.normal(size=n), np.arange(n)
    np.fill_diagonal(pairs, np.nan)
    of_pairs = torch.from_numpy(np.nanmean(pairs, 1))

    def mean_of_pairs(kept: np.ndarray) -> float:
        return float(np.nanmean(pairs[np.ix_(kept, kept)]))

    found = mean_change(of_pairs, of_pairs)
    assert found["value"] == pytest.approx(mean_of_pairs(samples))
    assert found["error"] == pytest.approx(jackknife(samples, mean_of_pairs))
    found = mean_change(torch.from_numpy(own) - of_pairs, -of_pairs)
    expected = jackknife(samples, lambda kept: own[kept].mean() - mean_of_pairs(kept))
    assert found["error"] == pytest.approx(expected)
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(found["value"]) / expected, n - 1))
    assert mean_change(torch.from_numpy(own))["p"] == pytest.approx(stats.ttest_1samp(own, 0).pvalue)


def test_two_images_have_one_pair_and_no_spread() -> None:
    change = torch.tensor([0.3, 0.3], dtype=torch.float64)
    for found in (mean_change(change, change), mean_change(change)):
        assert (found["error"], found["p"]) == (None, None)
        assert more_invariant(found) == "unknown"
    assert mean_change(0 * change)["p"] == 1.0
