"""Tests of means, variances, distributions and powers of the width, two-sided, at one level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ntkit.measures.convergence import fitted_slope
from ntkit.studies.claim import Bound, Condition, Estimate, Within

LEVEL = 0.01
ERRORS = 3  # standard errors: of 10 trials 1.5 % beyond, of many 0.3 %; a bound takes more of few trials


def not_rejected(words: str, p: float) -> Condition:
    """The condition that a test does not reject at the level."""
    return Condition(f"the p value of {words} is", [p], Bound("at least", LEVEL))


def rejected(words: str, p: float) -> Condition:
    """The condition that a test rejects at the level."""
    return Condition(f"the p value of {words} is", [p], Bound("under", LEVEL))


def power(words: str, slope: Estimate, of: float) -> Condition:
    """The condition that a slope on logarithmic axes is the expected one within its error, on both sides."""
    return Condition(words, [slope], Within(ERRORS, of=of, unit=" standard errors"))


def mean_test(samples: np.ndarray, target: np.ndarray) -> float:
    """P value for the means of the columns of [trials, m] being the target: m two-sided t tests, by Bonferroni.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(20, 3))
    >>> mean_test(x, np.zeros(3)) > 0.01, mean_test(x + 1, np.zeros(3)) > 0.01, mean_test(x - 1, np.zeros(3)) > 0.01
    (True, False, False)
    """
    n = len(samples)
    return means_test(samples.mean(0), samples.std(0, ddof=1) / n**0.5, target, n)


def means_test(means: np.ndarray, errors: np.ndarray, target: np.ndarray, trials: int) -> float:
    """The same from the means, [m], and their standard errors, [m]; 0 where there is no spread around a wrong mean.

    >>> means_test(np.array([1.0]), np.array([0.0]), np.array([2.0]), 10)
    0.0
    """
    off = np.abs(means - target)
    t = np.divide(off, errors, out=np.where(off > 0, np.inf, 0.0), where=errors > 0)
    return _smallest(2 * stats.t.sf(t, trials - 1))


def variance_test(samples: np.ndarray, means: np.ndarray, deviations: np.ndarray) -> float:
    """P value for columns of [trials, m] having these variances, if normal: m chi-squared tests on both sides.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(40, 3))
    >>> [bool(variance_test(scale * x, np.zeros(3), np.ones(3)) > 0.01) for scale in (0, 0.5, 1, 2)]
    [False, False, True, False]
    """
    square = (((samples - means) / deviations) ** 2).sum(0)
    low = stats.chi2.cdf(square, len(samples))
    return _smallest(2 * np.minimum(low, 1 - low))


def normal_test(white: np.ndarray) -> float:
    """P value for the rows of [trials, m] being standard normal draws: Kolmogorov's test of each column against the
    normal distribution and of the squared length against chi squared, by Bonferroni.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(500, 3))
    >>> normal_test(x) > 0.01, normal_test(0.8 * x) > 0.01, normal_test(rng.standard_t(3, size=(500, 3))) > 0.01
    (True, False, False)
    """
    p = [stats.kstest(column, "norm").pvalue for column in white.T]
    p.append(stats.kstest((white**2).sum(1), stats.chi2(white.shape[1]).cdf).pvalue)
    return _smallest(np.asarray(p))


def _smallest(p: np.ndarray) -> float:
    return float(min(1.0, p.min() * p.size))


def jackknife(samples: np.ndarray) -> Estimate:
    """Sum over the columns of [trials, m] of the sample variance, with its jackknife standard error.

    >>> found = jackknife(np.random.default_rng(0).normal(size=(2000, 1)))
    >>> bool(abs(found.value - 1) < 3 * found.error), bool(0.02 < found.error < 0.05)
    (True, True)
    """
    n = len(samples)
    square = ((samples - samples.mean(0)) ** 2).sum(1)
    total = square.sum()
    without = (total - square * n / (n - 1)) / (n - 2)  # the variance without each trial
    return Estimate(float(total / (n - 1)), float(((n - 1) * without.var()) ** 0.5), n)


def slope(values: Mapping[int, Estimate]) -> Estimate:
    """Slope of the logarithm of a quantity against that of the width, weighted by its errors.

    >>> round(slope({10: Estimate(1.0, 0.01), 100: Estimate(0.1, 0.001)}).value, 9)
    -1.0
    """
    found = fitted_slope(list(values), [v.value for v in values.values()], [v.error for v in values.values()])
    return Estimate(*found)


def against(x: ArrayLike, y: ArrayLike) -> Estimate:
    """Slope of the line through (log x, log y) by least squares, and its standard error from the scatter.

    >>> against([1, 10, 100], [2, 20, 200])
    Estimate(value=1.0, error=0.0, trials=2)
    """
    found = stats.linregress(np.log(x), np.log(y))
    return Estimate(round(float(found.slope), 12), round(float(found.stderr), 12), np.size(x) - 1)  # Student's n - 2
