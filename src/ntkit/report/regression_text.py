"""What the report of a regression says in words: pure functions of the results, never more than the numbers allow."""

from __future__ import annotations

import math
from typing import Any

from ntkit.report import judgments, limit_section
from ntkit.report.analysis_text import (
    KERNEL,
    along_finding,
    along_in_a_sentence,
    explained_finding,
    failed_checks,
    fit_warnings,
    lead_on_network,
    looked_at,
    turn_finding,
)
from ntkit.report.words import beside, counted, digits, listed, plain

R2 = 2
"""Decimals of R2, at least."""
_LARGEST_R2 = 1e6  # from which R² has an exponent: no card has room for its digits
_NAMES = {"init": "the kernel at initialization", "conjugate": "the conjugate kernel", "network": "the network itself"}


def interval(entry: dict[str, Any], least: int = 0) -> str:
    """A number with its interval, both to two digits of the interval's width, and to `least` decimals at least.

    >>> interval({"value": 18911.0, "low": 16731.0, "high": 20914.0})
    '18,900 (16,700 to 20,900)'
    >>> interval({"value": -6e-4, "low": -4e-3, "high": 0.003})
    '−0.0006 (−0.0040 to 0.0030)'
    >>> interval({"value": -0.44, "low": -16.0, "high": 0.1}, R2)
    '−0.44 (−16.00 to 0.10)'
    >>> interval({"value": None, "low": None, "high": None})
    'undefined'
    """
    return joined(*separate(entry, least))


def joined(value: str, between: str) -> str:
    """A number with its interval, of which both are text."""
    return f"{value} ({between})" if between else value


def separate(entry: dict[str, Any], least: int = 0) -> tuple[str, str]:
    """A number, and its interval; "" where there is none.

    >>> separate({"value": 0.873, "low": 0.841, "high": 0.9}), separate({"value": -5.7e24, "low": -1e25, "high": -2e24})
    (('0.873', '0.841 to 0.900'), ('−5.7e24', '−1e25 to −2e24'))
    >>> diverged = {"value": -286818969867.68, "low": -791371833331.18, "high": -0.5}
    >>> separate(diverged, R2)
    ('−2.87e11', '−7.91e11 to −0.5')
    """
    value, low, high = entry["value"], entry["low"], entry["high"]
    if value is None or low is None or not low < high:
        return "undefined" if value is None else digits(value), ""
    if max(abs(value), abs(low), abs(high)) >= (_LARGEST_R2 if least else 1e12):
        texts = [plain(v).replace("-", "−") for v in (value, low, high)]
        return texts[0], f"{texts[1]} to {texts[2]}"
    places = min(12, 1 - math.floor(math.log10(high - low)))
    places = max(places, least) if least else places
    texts = [f"{round(v, places) + 0:,.{max(0, places)}f}".replace("-", "−") for v in (value, low, high)]
    return texts[0], f"{texts[1]} to {texts[2]}"


class Parts:
    """How the errors of one run are written: of a single target in its own units, of several in deviations."""

    def __init__(self, results: dict[str, Any]) -> None:
        names = results["data"]["targets"]["names"]
        self.single = names[0] if len(names) == 1 else None
        self.unit = f"units of {self.single}" if self.single else "standard deviations"

    digits = staticmethod(digits)

    def pair(self, errors: dict[str, Any], name: str) -> tuple[str, str]:
        """R2 (``r2``), root mean squared (``rmse``) or mean absolute error (``mae``), and its interval."""
        return separate((errors["targets"][0] if self.single else errors)[name], R2 if name == "r2" else 0)

    def amount(self, errors: dict[str, Any]) -> str:
        """What stands below R2 on a card: its interval, and the root mean squared error."""
        between, error = self.pair(errors, "r2")[1], interval((errors["targets"][0] if self.single else errors)["rmse"])
        return f"{between}{'; ' if between else ''}root mean squared error {error}, in {self.unit}"


Four = tuple[float | None, float | None, float | None, float | None]


def difference(results: dict[str, Any], other: str) -> Four:
    """The after kernel's mean squared error minus another's: interval and value; and the other's."""
    found = next((c for c in (results["comparisons"] or {"compared": []})["compared"] if c["with"] == other), None)
    return (None,) * 4 if found is None else _numbers(found)


def _numbers(found: dict[str, Any]) -> Four:
    return found["low"], found["high"], found["value"], found.get("of")


def answer(results: dict[str, Any]) -> str:
    """Say in a few sentences what was done and what came out."""
    model, data, run = results["model"], results["data"], results["training"]
    how = "whose weights were loaded" if run is None else f"trained for {counted(run['steps'], 'step')}"
    hardly = judgments.fits(results["network"]["train"]["r2"]["value"]) == "hardly"
    return (
        f"{'The network hardly fits its training set. ' if hardly else ''}"
        f"{looked_at(model, how)} on {data['train']:,} training examples of {data['name']} to predict "
        f"{listed(data['targets']['names'])}. {KERNEL} "
        f"The test error of ridge regression on the kernel after training is "
        f"{judgments.SQUARED_ERROR.say(*difference(results, 'init'))} that on the kernel at initialization."
        f"{along_in_a_sentence(results)}"
    )


def warnings(results: dict[str, Any]) -> list[str]:
    """List what the reader must know before believing the numbers."""
    return [*cautions(results), *failed_checks(results)]


def cautions(results: dict[str, Any]) -> list[str]:
    """What is to be known beside failed checks: of the network first, then of the machines."""
    learned = results["network"]["train"]["r2"]["value"]
    shown = "undefined" if learned is None else beside(learned, judgments.LITTLE, 3).replace("-", "−")
    measured = f"Its R² on the training set is {shown}; less than {judgments.LITTLE:g} is little."
    texts = fit_warnings(learned, results["training"], measured)
    for machine in results["machines"]:
        if machine["status"] != "solved":
            texts.append(
                f"Ridge regression on the {machine['label']}: {machine['status']}. {machine['advice']}".strip()
            )
        elif machine["edge"]:
            texts.append(
                f"Ridge regression on the {machine['label']}: the ridge of least leave-one-out error, "
                f"{plain(machine['ridge'])} of the mean diagonal, is at the end of the range that was tried."
            )
    return texts


def in_short(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Findings, each a lead and a sentence."""
    # with one target R2 says what is judged; over several the mean of R2 may go the other way than the squared error
    single = len(results["data"]["targets"]["names"]) == 1
    name, least = ("r2", R2) if single else ("rmse", 0)
    what = "R²" if single else "root mean squared error, in standard deviations,"
    shown = {m["kernel"]: interval(m["test"][name], least) for m in results["machines"]}
    init, after, conjugate = (shown.get(kernel, "undefined") for kernel in ("init", "after", "conjugate"))
    network = interval(results["network"]["test"][name], least)
    texts = {
        "init": f"Test {what} of ridge regression: kernel at initialization {init}, after kernel {after}.",
        "network": f"Test {what} of the network {network}; of ridge regression on the after kernel {after}, on the "
        f"conjugate kernel {conjugate}.",
    }
    first_lead = judgments.LESS_SQUARED_ERROR["loaded" if results["training"] is None else "init"]
    leads = {"init": first_lead.say(*difference(results, "init"))}
    judgment, learned = judgments.LESS_SQUARED_ERROR["network"], results["network"]["train"]["r2"]["value"]
    leads["network"] = lead_on_network(judgment, difference(results, "network"), learned)
    findings = [(leads[other], texts[other]) for other in leads]
    rows = {row["kernel"]: row for row in results["quality"]}
    (first, last), ranks = (
        [rows.get(k, {}).get(name) for k in ("init", "after")] for name in ("alignment_centered", "effective_rank")
    )
    findings.append(turn_finding(first, last, ranks, results["along"], results["data"]["train"]))
    if results["along"]:
        findings.append(along_finding(results["along"]))
    if (found := limit_section.finding(results)) is not None:
        findings.append(found)
    return [*findings, *explained_finding(results)]


def machines(results: dict[str, Any]) -> str:
    """Read the figure of errors."""
    groups: dict[str, list[str]] = {}
    for other, name in _NAMES.items():
        groups.setdefault(judgments.SQUARED_ERROR.say(*difference(results, other)), []).append(name)
    parts = [f"{text} that of {listed(names)}" for text, names in groups.items()]
    return f"The squared test error of ridge regression on the after kernel is {'; '.join(parts)}."


def predictions(results: dict[str, Any]) -> str:
    """Read the figure of predictions."""
    count = len(results["comparisons"]["scatter"]["test_index"])
    return f"{count:,} test examples, in units of the targets; on the line predictions are right."


def neighbors(results: dict[str, Any]) -> str:
    """How far the targets of neighbors are apart, without calling it significant: these are a few examples."""
    apart = results["neighbors"]["distance"]
    return (
        "Mean distance between the target of a test example and those of its neighbors, in standard deviations: "
        f"{plain(apart['init'], 2)} before training, {plain(apart['after'], 2)} after; of any training examples "
        f"{plain(apart['any'], 2)}. A few examples to look at, not a measurement."
    )


def compared(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table of differences: with what, difference, verdict."""
    words = {"below": "lower", "above": "higher", "same": "no", "unknown": "undefined"}
    return [
        (_NAMES[c["with"]], interval(c), words[judgments.different_squares(*_numbers(c))])
        for c in (results["comparisons"] or {"compared": []})["compared"]
    ]
