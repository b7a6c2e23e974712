"""Explained predictions in words: sentences for the page of `ntkit explain` and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ntkit.explanations.trust_limits import MISS, SMOOTH
from ntkit.report import judgments
from ntkit.report.words import beside, digits, plain, share

METHODS = ("accounting", "influence", "random")
_LABEL = 28  # characters of a sentence in the terminal


def signed(value: float) -> str:
    """Number with its sign and two digits.

    >>> signed(0.123), signed(-4.0), signed(0.0), signed(-12345.6)
    ('+0.12', '−4', '0', '−12,300')
    """
    text = plain(abs(value), 2) if abs(value) < 1000 else digits(abs(value))
    return ("+" if value > 0 else "−" if value < 0 else "") + text


def amount(value: float) -> str:
    """A number that is not negative, with as many digits as those with signs."""
    return signed(value).removeprefix("+")


def quantity(told: dict[str, Any]) -> str:
    """What is explained in results, or of a point: the margin of a class, or the prediction of a number."""
    return told.get("quantity", "margin")


def trust(r: dict[str, Any]) -> str:
    """Whether influence can be trusted in this run; the first thing to say."""
    found = r["influence"]
    if found["miss"] == 0 and without_influence(r):
        return (
            f"{judgments.TRUST.sentences['usable']}: no training example has an influence on these {quantity(r)}s, and "
            "in a trial with all weights changed at random by 5 % they did not change."
        )
    trial = (
        f"in a trial with all weights changed at random by 5 %, it missed the changes of the {quantity(r)}s by "
        f"{_share_beside(found['miss'])} of their size"
    )
    smooth = f"{found['metasmoothness']:.2f}"
    smooth = smooth if float(smooth) != SMOOTH else beside(found["metasmoothness"], SMOOTH)
    verdict = judgments.trusted(found["miss"], found["metasmoothness"])
    limit = f"(at most {share(MISS)} is allowed; metasmoothness {smooth})"
    return {
        "untrusted": f"{judgments.TRUST.sentences['untrusted']}: {trial} {limit}. The accounting holds.",
        "amplifies": f"{judgments.TRUST.sentences['amplifies']}: its metasmoothness is {smooth}, below {SMOOTH:g}. Yet "
        f"influence can be used: {trial}, of which {share(MISS)} is allowed.",
        "usable": f"{judgments.TRUST.sentences['usable']}: {trial} {limit}.",
    }[verdict]


def _share_beside(miss: float | None) -> str:
    """A share in percent, with the digits that tell it from the limit."""
    return share(miss) if miss is None or share(miss) != share(MISS) else f"{beside(100 * miss, 100 * MISS)}\u00a0%"


def finite_differences(r: dict[str, Any]) -> str | None:
    """Error of the influence beside finite differences; None where these say nothing.

    Their own error, times ten, is what the comparison allows. From 1 on it would allow any score: the run jumps, since
    small changes of the weights cross kinks of the network.
    """
    found = r["influence"]
    known = found["own_error"] is not None and found["finite_differences"] is not None
    return plain(found["finite_differences"], 2) if known and 10 * found["own_error"] < 1 else None


def without_influence(r: dict[str, Any]) -> bool:
    """Whether the influence of every training example on every point is 0, as in a run at learning rate 0."""
    return not any(point["influence"][side] for point in r["points"] for side in ("helped", "hurt"))


def checks(r: dict[str, Any]) -> str:
    """Certificates of both methods in one sentence each."""
    found = r["influence"]
    bits = "the recorded bits" if r["accounting"]["bitwise"] else "the recorded values to rounding"
    sums = max(abs(point["residual"]) for point in r["points"])
    error = finite_differences(r)
    if without_influence(r):
        beside = "No training example has an influence: there is nothing to compare with finite differences."
        return _sums(r, bits, sums) + beside
    beside = (
        f"Influence of the {_strongest(found['checked'])} differs from finite differences, from runs in float64 "
        f"with slightly other weights, by {plain(found['finite_differences'], 2)} of its size."
        if error is not None
        else "Finite differences say nothing about the influence here: two formulas for them differ by "
        f"{share(found['own_error'])}, since small changes of the weights cross kinks of the network (ReLU, "
        "max-pooling) and the run jumps. The real changes are the check."
    )
    return _sums(r, bits, sums) + beside


def _sums(r: dict[str, Any], bits: str, residual: float) -> str:
    missed = plain(residual, 2)
    return (
        f"The replayed run has {bits}. Sums of the accounting miss the network’s {quantity(r)}s by at most {missed}. "
    )


def _strongest(count: int) -> str:
    return "strongest example" if count == 1 else f"{count} strongest examples"


def answer(point: dict[str, Any]) -> str:
    """What the network says of a test point, and what that is the sum of."""
    if quantity(point) == "prediction":
        return f"The network says {point['predicted']}; it is {point['label']}. {margin_as_sum(point)}"
    verdict = "right" if point["right"] else f"wrong: it is {point['label']}"
    return f"The network says {point['predicted']}, which is {verdict}. {margin_as_sum(point)}"


def margin_as_sum(point: dict[str, Any]) -> str:
    """The parts of a margin, or of a predicted number, and how far their sum misses it."""
    decay = f", weight decay {signed(point['weight_decay'])}" if point["weight_decay"] else ""
    name, whole = "Margin", signed
    if quantity(point) == "prediction":
        name, whole = f"Prediction of {point['target']}", digits
    return (
        f"{name} {whole(point['margin'])}: {whole(point['initial'])} before training, "
        f"training examples {signed(point['examples'])}{decay}; "
        f"the sum misses it by {plain(abs(point['residual']), 2)}."
    )


def removal(d: dict[str, Any], sets: int, helpful: str = "most helpful") -> str:
    """What was removed from the training set.

    >>> removal({"method": "random", "size": 5}, 3), removal({"method": "influence", "size": 5}, 3)
    ('5 at random, mean of 3 sets', '5 most helpful by influence')
    """
    if d["method"] == "random":
        return f"{d['size']} at random, mean of {sets} sets"
    return f"{d['size']} {helpful} by {d['method']}"


def strongest(told: dict[str, Any]) -> str:
    """The name of the examples that are removed: those that raised most what is explained."""
    return "most helpful" if quantity(told) == "margin" else "that raised it most,"


def removals(point: dict[str, Any], sets: int) -> Iterable[tuple[str, str, str]]:
    """Rows of a table: what was removed, predicted change and real change; small removals first."""
    for d in sorted(point["deletions"], key=lambda d: (d["size"], METHODS.index(d["method"]))):
        yield removal(d, sets, strongest(point)), signed(d["predicted"]), real_change(d)


def real_change(d: dict[str, Any]) -> str:
    """Real change of the margin, with the standard deviation over random sets."""
    spread = "" if d["spread"] is None else f" (sd {amount(d['spread'])})"
    return signed(d["real"]) + spread


def agreement(r: dict[str, Any]) -> str:
    """How far the predicted changes were from the real ones."""
    told = [d for point in r["points"] for d in point["deletions"]]
    missed = sum(abs(d["predicted"] - d["real"]) for d in told) / len(told)
    size = sum(abs(d["real"]) for d in told) / len(told)
    means = {m: [d["real"] for d in told if d["method"] == m] for m in METHODS}
    parts = ", ".join(f"{signed(sum(v) / len(v))} ({name})" for name, v in means.items() if v)
    return (
        f"Over {len(told)} removals, influence missed the real change of the {quantity(r)} by {amount(missed)} on "
        f"average; the changes were {amount(size)} on average. Mean change by choice of examples: {parts}."
    )


def pairs_of_rows(point: dict[str, Any]) -> Iterable[tuple[str, str, str, str, str]]:
    """Rows of the terminal's table: side, and example and score by both methods."""
    for side, text in (("helped", f"raised the {quantity(point)}"), ("hurt", "lowered it")):
        both = [point[method][side] for method in ("accounting", "influence")]
        for i in range(max(map(len, both))):
            cells = [(_named(own[i]), signed(own[i]["score"])) if i < len(own) else ("-", "") for own in both]
            yield (text if i == 0 else "", *cells[0], *cells[1])


def _named(example: dict[str, Any]) -> str:
    text = example.get("text", "")
    cut = text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"
    return f"{example['index']} {example['label']}" + (f": {cut}" if cut else "")
