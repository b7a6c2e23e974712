"""Intervals and tests over seeds and test examples, beside scipy's and beside definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from ntkit.commands import seed_statistics as statistics


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
