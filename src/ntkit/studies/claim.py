"""What a paper says, tested: values with standard errors, and thresholds that test and print themselves."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from ntkit.report.words import plain


class Estimate(NamedTuple):
    """A value, its standard error, and how many independent values that is of (0: so many that it is normal).

    >>> f"{mean([1.0, 3.0]):.2f}"
    '2.00 ± 1.00'
    """

    value: float
    error: float = math.nan
    trials: int = 0

    def beyond(self, errors: float) -> float:
        """As far from the value as `errors` standard errors of many values: for few Student's test takes more of them.

        >>> round(Estimate(0, 1, 5).beyond(2), 2), round(Estimate(0, 1, 2).beyond(2), 1), Estimate(0, 1).beyond(2)
        (2.87, 14.0, 2)
        """
        few = self.trials > 1
        return self.error * (float(stats.t.ppf(stats.norm.cdf(errors), self.trials - 1)) if few else errors)

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ± {self.error:{spec}}".replace("-", "−")


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean over seeds with its standard error (NaN for one seed)."""
    a = np.asarray(values, dtype=float)
    return Estimate(float(a.mean()), float(a.std(ddof=1) / len(a) ** 0.5) if len(a) > 1 else math.nan, len(a))


_COMPARISONS = {"over": operator.gt, "at least": operator.ge, "under": operator.lt, "at most": operator.le}


@dataclass(frozen=True)
class Bound:
    """A limit for every value, which it must keep by so many standard errors, of few values by more (Student's test).

    >>> str(Bound("over", 1, errors=2)), str(Bound("at most", 1e-12)), str(Bound("under", 6, unit=" %"))
    ('over 1 by more than 2 standard errors (Student’s test for few values)', 'at most 1e-12', 'under 6 %')
    >>> [Bound("over", 1, errors=2).holds([v]) for v in (Estimate(1.3, 0.1), Estimate(1.1, 0.1), Estimate(1.3, 0.1, 3))]
    [True, False, False]
    """

    comparison: Literal["over", "at least", "under", "at most"]
    limit: float
    unit: str = ""
    errors: float = 0  # negative: a value may miss the limit by as many

    def holds(self, values: Sequence[Estimate]) -> bool:
        """Whether every value keeps the limit."""
        sign, compare = 1 if self.comparison in ("over", "at least") else -1, _COMPARISONS[self.comparison]
        return all(compare(v.value - sign * self._distance(v), self.limit) for v in values)

    def _distance(self, value: Estimate) -> float:
        # few values must be farther beyond a limit, but may not miss it by more
        return value.beyond(self.errors) if self.errors > 0 else self.errors * value.error if self.errors else 0

    def __str__(self) -> str:
        margin = f" by more than {_errors(self.errors)}" if self.errors > 0 else ""
        margin = f" within {-self.errors:g} standard errors" if self.errors < 0 else margin
        return f"{self.comparison} {_number(self.limit)}{self.unit}{margin}"


@dataclass(frozen=True)
class Between:
    """Two limits for every value.

    >>> str(Between(10, 30, unit=" %")), Between(10, 30).holds([Estimate(12), Estimate(30)])
    ('between 10 and 30 %', False)
    """

    low: float
    high: float
    unit: str = ""

    def holds(self, values: Sequence[Estimate]) -> bool:
        """Whether every value lies between the limits."""
        return all(self.low < v.value < self.high for v in values)

    def __str__(self) -> str:
        return f"between {_number(self.low)} and {_number(self.high)}{self.unit}"


@dataclass(frozen=True)
class Within:
    """A largest distance of every value from a target: absolute, or in the value's standard errors.

    >>> str(Within(0.2, of=1)), str(Within(3, of=-0.5, unit=" standard errors"))
    ('within 0.2 of 1', 'within 3 standard errors of −0.5')
    >>> Within(3, of=-0.5, unit=" standard errors").holds([Estimate(-0.3, 0.05)])
    False
    """

    distance: float
    of: float
    unit: Literal["", " standard errors", " standard deviations"] = ""

    def holds(self, values: Sequence[Estimate]) -> bool:
        """Whether every value lies within the distance."""
        return all(abs(v.value - self.of) <= self.distance * (v.error if self.unit else 1) for v in values)

    def __str__(self) -> str:
        return f"within {_number(self.distance)}{self.unit} of {_number(self.of)}"


@dataclass(frozen=True)
class Order:
    """An order of the values, one step to the next by more than so many standard errors of their difference.

    >>> str(Order("increase", errors=2)), Order("decrease").holds([Estimate(3), Estimate(1), Estimate(2)])
    ('increase, each by more than 2 standard errors (Student’s test for few values)', False)
    """

    direction: Literal["increase", "decrease"]
    errors: float = 0

    def holds(self, values: Sequence[Estimate]) -> bool:
        """Whether every value is beyond the one before."""
        for a, b in pairwise(values if self.direction == "increase" else values[::-1]):
            if not b.value - a.value > (math.hypot(a.beyond(self.errors), b.beyond(self.errors)) if self.errors else 0):
                return False
        return True

    def __str__(self) -> str:
        return self.direction + (f", each by more than {_errors(self.errors)}" if self.errors else "")


SURE = 2  # standard errors of many values beyond which a difference counts: a two-sided test at 5 %
RISES, FALLS = Bound("over", 0, errors=SURE), Bound("under", 0, errors=SURE)


def _errors(count: float) -> str:
    return f"{count:g} standard errors (Student’s test for few values)"


def _number(value: float) -> str:
    text = plain(abs(value), 6)
    text = text if float(text) == abs(value) else plain(abs(value))  # of 2/3 three digits say as much
    return ("−" if value < 0 else "") + text


class Condition(NamedTuple):
    """Words, values and the threshold that they must meet, which tests itself and prints itself behind the words.

    >>> Condition("they are", [2, 3], Bound("over", 1)).holds(), Condition("they are", [], Bound("over", 1)).holds()
    (True, False)
    """

    words: str
    values: Sequence[Estimate | float]
    threshold: Bound | Between | Within | Order

    def holds(self) -> bool:
        """Whether there are values, and all meet the threshold."""
        values = [v if isinstance(v, Estimate) else Estimate(v) for v in self.values]
        return len(values) > 0 and self.threshold.holds(values)


@dataclass(frozen=True)
class Claim:
    """What a paper says, the number measured here, and the conditions under which the claim holds.

    >>> Claim("It is small", "3e-16", [Condition("the residual is", [3e-16], Bound("at most", 1e-12))]).record()["how"]
    'holds if the residual is at most 1e-12'
    """

    text: str
    number: str
    conditions: Sequence[Condition] = ()  # none: the claim is not tested
    note: str = ""
    further: bool = False  # the paper does not say it: listed apart

    def record(self) -> dict[str, Any]:
        """The claim's entry in ``results.json``; the key "further" is there for further claims alone."""
        rule = " and ".join(f"{c.words} {c.threshold}".strip() for c in self.conditions)
        how = "; ".join(text for text in (self.note, rule and f"holds if {rule}") if text)
        holds = all(c.holds() for c in self.conditions) if self.conditions else None
        record = {"claim": self.text, "number": self.number, "holds": holds, "how": how}
        return record | ({"further": True} if self.further else {})


def as_markdown(title: str, claims: Sequence[dict[str, Any]]) -> str:
    """The records of claims as a table: claim, number, verdict, rule; further claims in a table of their own.

    >>> print(as_markdown("A paper", [Claim("It is small", "3e-16").record()]))
    # A paper
    <BLANKLINE>
    | claim | measured | holds | how |
    |---|---|---|---|
    | It is small | 3e-16 | – |  |
    <BLANKLINE>
    """
    own, further = ([c for c in claims if c.get("further", False) is group] for group in (False, True))
    text = f"# {title}\n\n{_table(own)}"
    return text + (f"\n## Further, not in the paper\n\n{_table(further)}" if further else "")


def _table(claims: Sequence[dict[str, Any]]) -> str:
    verdicts = {True: "yes", False: "no", None: "–"}
    cells = [(c["claim"], c["number"], verdicts[c["holds"]], c["how"]) for c in claims]
    rows = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
    return "\n".join(["| claim | measured | holds | how |", "|---|---|---|---|", *rows, ""])
