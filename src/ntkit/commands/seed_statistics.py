"""Differences over seeds and over test examples: Student's intervals, Welch's and paired tests, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkit.commands.kernel_measures import paired
from ntkit.commands.network_measures import finite

LEVEL = 0.95


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of independent runs with Student's interval of 95 %; of one run, or of equal values, without interval.

    Equal values show no spread, which says nothing of the spread of other seeds.

    >>> over_seeds([1.0, 3.0])["mean"], over_seeds([1.0])["low"]
    (2.0, None)
    """
    n, scale = len(values), _scale(values)
    mean, variance = _moments(values, scale)
    half = _quantile(n - 1) * (variance / n) ** 0.5 if n > 1 and variance > 0 else None
    low, high = (None, None) if half is None else (scale * (mean - half), scale * (mean + half))
    return {"n": n, "mean": finite(scale * mean), "low": finite(low), "high": finite(high)}


def welch(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Difference of the means of two groups of independent runs, with Welch's interval of 95 % and p value.

    Needs two runs of each. Where neither group has any spread, there is no interval; p is 1 for equal means and
    undefined (None) for different ones.

    Examples
    --------
    >>> found = welch([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    >>> found["difference"], round(found["p"], 3)
    (-1.0, 0.288)
    """
    from scipy.stats import t

    scale = _scale(first, second)
    (mean, variance), (other, variance_of_other) = (_moments(values, scale) for values in (first, second))
    difference = mean - other
    found: dict[str, Any] = {"difference": finite(scale * difference), "low": None, "high": None, "p": None}
    if min(len(first), len(second)) < 2:
        return found
    parts = variance / len(first), variance_of_other / len(second)
    if sum(parts) == 0:
        return found | {"p": 1.0 if mean == other else None}
    error, shares = sum(parts) ** 0.5, [part / sum(parts) for part in parts]
    freedom = 1 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, (first, second), strict=True))
    low, high = (scale * (difference + sign * _quantile(freedom) * error) for sign in (-1, 1))
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    return found | {"low": finite(low), "high": finite(high), "p": finite(p)}


def paired_errors(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Difference of two error rates on the same examples, and McNemar's exact p value.

    `first`, `second`: wrong answers, booleans [m].

    >>> paired_errors(np.array([True, False, False]), np.array([False, True, True]))["only_second"]
    2
    """
    found = paired(first.astype(bool), second.astype(bool))
    return {
        "difference": found["value"],
        "p": found["p"],
        "only_first": found["only_after"],
        "only_second": found["only_other"],
    }


def paired_squares(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Difference of two mean squared errors on the same examples, and Student's p value of the pairs.

    `first`, `second`: squared errors [m]. p is undefined (None) where one difference recurs in all pairs.

    >>> round(paired_squares(np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.0, 1.0]))["p"], 3)
    0.074
    """
    from scipy.stats import t

    scale = _scale(first, second)
    n, (mean, variance) = len(first), _moments(first / scale - second / scale)
    if n > 1 and variance > 0:
        p: float | None = 2 * float(t.sf(abs(mean) / (variance / n) ** 0.5, n - 1))
    else:
        p = 1.0 if mean == 0 else None
    return {"difference": finite(scale * mean), "p": finite(p), "of_second": finite(float(second.mean()))}


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Give p values after Holm's correction for all that are defined.

    Where each of these below a level is called a difference, the chance of any wrong call is at most that level.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i] or 0.0)
    result: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (ps[i] or 0.0)))
        result[i] = largest
    return result


def _scale(*groups: Sequence[float] | np.ndarray) -> float:
    """A power of two as large as the largest value: divided by it, no square over- or underflows; else 1."""
    largest = max(float(np.abs(np.asarray(values, dtype=np.float64)).max()) for values in groups)
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if 0 < largest < math.inf else 1.0


def _moments(values: Sequence[float] | np.ndarray, scale: float = 1.0) -> tuple[float, float]:
    """Mean and variance over a scale; equal values have a variance of exactly 0, whatever rounding their mean has."""
    array = np.asarray(values, dtype=np.float64) / scale
    if len(array) < 2 or array.min() == array.max():
        return float(array[0]), 0.0
    return float(array.mean()), float(array.var(ddof=1))


def _quantile(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))
