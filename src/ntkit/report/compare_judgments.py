"""Sentences of `ntkit compare` that judge: when two settings, or two runs, differ beyond noise."""

from __future__ import annotations

from ntkit.report.judgments import LEVEL, SMALLEST, Judgment, different_errors


def different_runs(p: float | None, difference: float | None, other: float | None = None) -> str:
    """Verdict on two errors by the p value of their difference; of squared errors also beside the other's error.

    >>> different_runs(0.049, -1.0, 9.0), different_runs(0.049, -1.0, 101.0), different_runs(0.05, -1.0)
    ('below', 'same', 'same')
    """
    if p is not None and difference is not None and other is not None and abs(difference) < SMALLEST * other:
        return "same"
    return different_errors(p, difference)


_DIFFERENT = {
    "below": "lower than",
    "above": "higher than",
    "same": "no different, beyond noise, from",
    "unknown": "not judged beside",
}
OVER_SEEDS = Judgment(
    "Two settings, each with two seeds or more: the means of their errors differ beyond noise where Welch’s t test "
    f"over the seeds, after Holm’s correction for all such tests of the page, has p < {LEVEL:g}. It says what other "
    "seeds would show on the same test examples.",
    different_errors,
    _DIFFERENT,
)
"""Of two groups of runs, in `ntkit compare`."""
BETWEEN_RUNS = Judgment(
    "Two networks on the same test examples: beyond noise where McNemar’s exact test, after Holm’s correction for all "
    f"such tests of the page, has p < {LEVEL:g}. It says what other test examples would show of these two networks, "
    "and nothing of other seeds.",
    different_runs,
    _DIFFERENT,
)
"""Of two single runs, in `ntkit compare`."""
BETWEEN_REGRESSIONS = Judgment(
    "Two networks on the same test examples: beyond noise where Student’s t test of the pairs of squared errors, after "
    f"Holm’s correction for all such tests of the page, has p < {LEVEL:g}, and the difference is at least "
    f"{100 * SMALLEST:g} % of the other’s error. It says what other test examples would show of these two networks, "
    "and nothing of other seeds.",
    different_runs,
    _DIFFERENT,
)
"""The same of a regression."""
COMPARISONS = (OVER_SEEDS, BETWEEN_RUNS, BETWEEN_REGRESSIONS)
