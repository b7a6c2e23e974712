"""What the page of `ntkit compare` says in words: pure functions of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ntkit.report.compare_judgments import BETWEEN_REGRESSIONS, BETWEEN_RUNS, OVER_SEEDS
from ntkit.report.judgments import Judgment
from ntkit.report.words import counted, listed, p_value, plain

Results = dict[str, Any]

PAIRS = {
    "within": "two seeds of one setting",
    "same_start": "two settings from the same start",
    "between": "two settings from different starts",
}
"""Kinds of pairs of runs whose kernels are compared."""


def measures(r: Results) -> dict[str, str]:
    """What is compared: key -> name, in the page's order."""
    machine = "SVM" if r["machine"] == "svm" else "ridge"
    return {"network": "network", "init": f"{machine}, initial kernel", "after": f"{machine}, after kernel"}


def unit(r: Results) -> str:
    """What an error is."""
    return "mean squared test error" if r["data"]["regression"] else "test error, %"


def shown(r: Results, value: float | None, sign: bool = False) -> str:
    """An error, or a difference of two, in the page's unit, without it."""
    if value is None:
        return "–"
    value = value if r["data"]["regression"] else round(100 * value, 1) + 0.0  # no minus before 0.0
    text = plain(value) if r["data"]["regression"] else f"{value:.1f}"
    return ("+" if sign and value > 0 else "") + text.replace("-", "−")


def with_interval(r: Results, found: dict[str, Any] | None, key: str = "mean") -> str:
    r"""A mean over seeds with its interval, such as "2.1 % (1.5 to 2.7)".

    >>> r = {"data": {"regression": False}}
    >>> with_interval(r, {"mean": 0.021, "low": 0.015, "high": 0.027}).replace("\u00a0", " ")
    '2.1 % (1.5 to 2.7)'
    """
    if found is None:
        return "–"
    percent = "" if r["data"]["regression"] else "\u00a0%"
    value = f"{shown(r, found[key], key == 'difference')}{percent}"
    return value if found["low"] is None else f"{value} ({shown(r, found['low'])} to {shown(r, found['high'])})"


def verdict(r: Results, test: dict[str, Any], of_groups: bool) -> str:
    """Verdict on one test by the rule that the page prints."""
    if of_groups:
        return OVER_SEEDS.verdict(test["p_holm"], test["difference"])
    return rule_of_runs(r).verdict(test["p_holm"], test["difference"], test.get("of_second"))


def rule_of_runs(r: Results) -> Judgment:
    """The rule for two single runs."""
    return BETWEEN_REGRESSIONS if r["data"]["regression"] else BETWEEN_RUNS


def beyond(r: Results, of_groups: bool) -> list[dict[str, Any]]:
    """The tests that are beyond noise."""
    tests = r["over_seeds"] if of_groups else r["between_runs"]
    return [test for test in tests if verdict(r, test, of_groups) in ("below", "above")]


def sentence(r: Results, test: dict[str, Any]) -> str:
    """One difference over seeds, such as "network: the error of lr 0.1 is lower than that of lr 0.01, by 2 points"."""
    first, second = (r["groups"][test[side]]["label"] for side in ("first", "second"))
    said = OVER_SEEDS.say(test["p_holm"], test["difference"])
    by = "" if r["data"]["regression"] else " points"
    size = shown(r, abs(test["difference"]))
    beside = f"the error of {first} is {said} that of {second}, by {size}{by}"
    return f"{measures(r)[test['of']]}: {beside} (corrected {p_value(test['p_holm'])})"


def lede(r: Results) -> str:
    """One paragraph that says what was learned."""
    groups = r["groups"]
    seeds = sorted({group["seeds"] for group in groups})
    each = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    settings = counted(len(groups), "setting")
    parts = [
        f"{settings[0].upper()}{settings[1:]} with {each}{' each' if len(groups) > 1 else ''}, on the same "
        f"{counted(r['test']['common'], 'test example')}."
    ]
    errors = [f"{group['label']} {with_interval(r, group['errors']['network'])}" for group in groups]
    what = "Mean squared test error" if r["data"]["regression"] else "Test error"
    many = ", mean over seeds (95 % interval)" if seeds[-1] > 1 else ""
    parts.append(f"{what} of the network{many}: {'; '.join(errors)}.")
    parts.append(_judged(r))
    kernels = r["kernels"]
    told = [
        f"of {which} {cosine(pair['init'])} before and {cosine(pair['after'])} after training"
        for name, which in PAIRS.items()
        if (pair := kernels[name])["init"] is not None and pair["after"] is not None
    ]
    parts += [f"How alike two kernels are, as their mean centered cosine: {'; '.join(told[:2])}."] if told else []
    return " ".join(parts)


def cosine(value: float | None) -> str:
    """A cosine of kernels.

    >>> cosine(0.9), cosine(None)
    ('0.90', '–')
    """
    return "–" if value is None else f"{value:.2f}"


def _judged(r: Results) -> str:
    """What is beyond noise, in a sentence or two."""
    if len(r["groups"]) == 1:
        return _of_single(r)
    tests = [test for test in r["over_seeds"] if test["of"] == "network" and test["p"] is not None]
    if not tests:
        need = "that takes two seeds or more of each, with errors that differ"
        return f"Over seeds nothing can be said of the settings’ networks: {need}. {_of_single(r)}"
    found = [test for test in beyond(r, True) if test["of"] == "network"]
    if not found:
        return f"Over seeds, no difference between the settings’ networks is beyond noise. {_of_single(r)}"
    said = "; ".join(sentence(r, test).partition(": ")[2] for test in found[:3])
    return f"Beyond noise over seeds, of the networks: {said}{'; and others' if len(found) > 3 else ''}."


def _of_single(r: Results) -> str:
    return f"Of single networks and machines, {_counted(beyond(r, False), r['between_runs'], '')} beyond noise."


def _counted(found: Sequence[Any], tests: Sequence[Any], between: str) -> str:
    """How many of so many differences, with the verb."""
    return f"{len(found)} of {counted(len(tests), 'difference')}{between} {'is' if len(found) == 1 else 'are'}"


def in_short(r: Results) -> list[tuple[str, str]]:
    """Leads and sentences of the list at the top."""
    return [*_settings_in_short(r), _runs_in_short(r), *_kernels_in_short(r)]


def _settings_in_short(r: Results) -> list[tuple[str, str]]:
    if len(r["groups"]) == 1:
        return []
    tests, found = [t for t in r["over_seeds"] if t["p"] is not None], beyond(r, True)
    if not tests:
        few = [group["label"] for group in r["groups"] if group["seeds"] < 2]
        why = f"One seed only: {listed(few)}. Analyze other seeds of each."
        why = why if few else "No error differs from seed to seed."
        return [("Settings are not judged over seeds.", why)]
    lead = f"{_counted(found, tests, ' between settings')} beyond noise over seeds."
    text = "; ".join(sentence(r, test) for test in found)
    more = "That does not show that there is none: more seeds find smaller differences."
    return [(lead, f"{text[0].upper()}{text[1:]}." if text else more)]


def _runs_in_short(r: Results) -> tuple[str, str]:
    found, tests = beyond(r, False), r["between_runs"]
    between = " between two single networks or machines"
    lead = f"{_counted(found, tests, between)} beyond noise on the same test examples."
    alone = [t for t in found if r["runs"][t["first"]]["group"] == r["runs"][t["second"]]["group"]]
    count = f"{len(alone)} of them {'is' if len(alone) == 1 else 'are'}" if alone else "Not one of them is"
    text = f"{count} between runs that differ in the seed alone."
    return lead, text if found else ""


def _kernels_in_short(r: Results) -> list[tuple[str, str]]:
    parts = [
        f"{which} {cosine(pair['init'])} → {cosine(pair['after'])}"
        for name, which in PAIRS.items()
        if (pair := r["kernels"][name])["pairs"]
    ]
    own = [value for value in r["kernels"]["own"] if value is not None]
    moved = f"A run’s own two kernels: {_range(own)}." if own else ""
    if not parts:
        return []
    text = f"Mean centered cosine, before → after training: {'; '.join(parts)}. {moved}"
    return [("How alike the kernels of two runs are.", text)]


def _range(values: list[float]) -> str:
    low, high = cosine(min(values)), cosine(max(values))
    return low if low == high else f"{low} to {high}"


def warnings(r: Results) -> list[str]:
    """What to know before reading on."""
    found = [f"A check failed. {c['what']}: {plain(c['value'])}, at most {plain(c['tolerance'])} expected."
             for c in r["certificates"] if not c["ok"]]  # fmt: skip
    whens = {"init": "before", "after": "after"}
    absent = [item for c in r["certificates"] for item in c["absent"].items()]
    found += [f"No kernel {whens[key]} training. {reason}" for key, reason in absent]
    if diverged := [run["name"] for run in r["runs"] if run["stop"] == "diverged"]:
        found.append(f"Training diverged, and the network is that of the last finite step: {listed(diverged)}.")
    if repeated := [run["name"] for run in r["runs"] if run["repeats"]]:
        found.append(
            f"{listed(repeated)}: same settings and same seed as an earlier run here. It is compared on the "
            "test examples, and is no further seed."
        )
    if r["machine"] == "ridge" and not r["data"]["regression"]:
        found.append("No SVM was solved on some kernel: ridge regression is compared in its place.")
    for name, values in r["versions"]["differ"].items():
        found.append(f"The runs were made with different {name}: {', '.join(values)}.")
    return found


def checks(r: Results) -> str:
    """Whether the networks rebuilt answer as their runs have noted."""
    failed = sum(not c["ok"] for c in r["certificates"])
    if failed:
        return f"{failed} of {len(r['certificates'])} do not answer the test set as the run has noted."
    return "All answer the test set as the runs have noted."
