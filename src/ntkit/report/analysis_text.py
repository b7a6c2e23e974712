"""What the report of `analyze` says in words: pure functions of the results, never more than the numbers allow."""

from __future__ import annotations

import math
from typing import Any

from ntkit.report import judgments
from ntkit.report import training_figures as training
from ntkit.report.words import listed, measure, percent, plain, share

DISRUPTIVE = ("quadrant swap", "patch shuffle")
"""Transformations that keep local statistics and break the layout: a low cosine means a global kernel."""
SVM = {"svm": "a hard-margin SVM", "ridge": "ridge regression"}
"""What compares two kernels."""


def answer(results: dict[str, Any]) -> str:
    """Say in two sentences what was done and what came out."""
    model, data, run = results["model"], results["data"], results["training"]
    how = "whose weights were loaded" if run is None else f"trained for {run['steps']:,} steps"
    found = comparison(results, "init")
    return (
        f"The network {model['name']} ({model['parameters']:,} parameters), {how}, on {data['train']:,} training "
        f"examples of {data['name']}, seen through its tangent kernel. The test error of {SVM[found['machine']]} on "
        f"the trained network’s kernel is {judgments.ERROR.say(found['p'], found['value'])} that on the kernel at "
        "initialization."
    )


def in_short(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Findings, each a lead and a sentence."""
    findings = [*_separable_findings(results), *_error_findings(results), _task_finding(results)]
    if results["along"]:
        findings.append(along_finding(results["along"]))
    if results["invariances"]:
        findings.append((_invariance_lead(results["invariances"]), _raw_cosines(results["invariances"])))
    return findings


def warnings(results: dict[str, Any]) -> list[str]:
    """List what the reader must know before believing the numbers."""
    return [*cautions(results), *failed_checks(results)]


def failed_checks(results: dict[str, Any]) -> list[str]:
    """One sentence on all checks that failed; none without any."""
    failed = [c["what"].removesuffix(".") for c in results["certificates"] if not c["ok"]]
    return [f"{len(failed)} check{'' if len(failed) == 1 else 's'} failed: {'; '.join(failed)}."] if failed else []


def cautions(results: dict[str, Any]) -> list[str]:
    """What is to be known beside failed checks: of the network first, then of the machines."""
    learned = (results["network"] or {}).get("fit", {"value": 1.0})["value"]
    below = f"Its training loss is {share(learned)} below that of the best constant prediction"
    if learned is not None and learned < 0:
        below = "Its training loss is above that of the best constant prediction"
    texts = fit_warnings(learned, results["training"], f"{below}; less than {share(judgments.LITTLE)} is little.")
    for machine in results["machines"]:
        if judgments.separable(machine["status"]) == "inaccurate":
            texts.append(f"SVM on the {machine['label']}: {machine['status']}. {machine['advice']}".strip())
    return texts


def fit_warnings(learned: float | None, run: dict[str, Any] | None, measured: str) -> list[str]:
    """What is to be known of the network: that its training diverged, or that it hardly fits its training set."""
    if run is not None and run["stop"] == "diverged":
        return ["Training diverged: the after kernel is that of a network that did not learn."]
    text = judgments.FIT.say(learned)
    return [text if learned is None else f"{text} {measured}"] if text else []


def lead_on_network(judgment: judgments.Judgment, numbers: tuple[Any, ...], learned: float | None) -> str:
    """The lead on the network beside its kernel; where one is better and the network hardly fits, that belongs into it.

    >>> lead_on_network(judgments.BETTER["network"], (0.01, -0.1), 0.07)
    'The after kernel does better than its network, which hardly fits its training set.'
    """
    lead = judgment.say(*numbers)
    if judgment.verdict(*numbers) in ("below", "above") and judgments.fits(learned) == "hardly":
        return f"{lead[:-1]}, which hardly fits its training set."
    return lead


def machines(results: dict[str, Any]) -> str:
    """Read the figure of test errors."""
    parts = []
    for other, name in (("init", "the kernel at initialization"), ("conjugate", "the conjugate kernel")):
        found = comparison(results, other)
        by = " by ridge regression" if found["machine"] == "ridge" else ""
        parts.append(f"{judgments.ERROR.say(found['p'], found['value'])} that of {name}{by}")
    found = comparison(results, "network")
    return (
        f"The after kernel’s test error is {parts[0]}, {parts[1]}, and "
        f"{judgments.ERROR.say(found['p'], found['value'])} that of the network itself."
    )


def compared(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows of the table of paired comparisons: with what, machine, counts, difference, verdict."""
    names = {"init": "kernel at initialization", "conjugate": "conjugate kernel", "network": "network itself"}
    words = {"below": "lower", "above": "higher", "same": "no", "unknown": "undefined"}
    return [
        (
            names[c["with"]],
            {"svm": "hard-margin SVM", "ridge": "ridge regression"}[c["machine"]],
            f"{c['only_after']}, {c['only_other']}",
            percent(c).replace("-", "−"),
            f"{words[judgments.different_errors(c['p'], c['value'])]}, p = {plain(c['p'], 2)}",
        )
        for c in (results.get("comparisons") or {"compared": []})["compared"]
    ]


def comparison(results: dict[str, Any], other: str) -> dict[str, Any]:
    """The after kernel's machine beside that of another kernel, or the network, on the same test examples."""
    told = (results.get("comparisons") or {"compared": []})["compared"]
    nothing: dict[str, Any] = {"with": other, "machine": "svm", "p": None, "value": None}
    found = next((c for c in told if c["with"] == other), nothing)
    kernels = ("after",) if other == "network" else ("after", other)
    statuses = [judgments.separable(m["status"]) for m in results["machines"] if m["kernel"] in kernels]
    if found["machine"] == "svm" and "inaccurate" in statuses:  # only an optimal machine is evidence
        return nothing
    return found


def shown_error(machine: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Test error of a kernel's machine, and which it is: the SVM or, where the kernel does not separate, ridge."""
    if judgments.separable(machine["status"]) == "not separable":
        return machine["ridge_test_error"], "ridge"
    return machine["test_error"], "svm"


def invariances(results: dict[str, Any]) -> str:
    """Read the cosines, transformation by transformation: raw, beside those of two different images, and centered."""
    told = results["invariances"]
    if "different" not in told:
        return _raw_cosines(told)
    centered = _verdicts_in_words([row["centered"] | {"name": row["name"]} for row in told["rows"]])
    return f"{_raw_cosines(told)} By centered cosines it is {centered}."


def _raw_cosines(told: dict[str, Any]) -> str:
    raw = _verdicts_in_words(told["rows"])
    if "different" not in told:
        return f"After training the kernel is {raw}."
    baseline = " → ".join(measure(told["different"][kernel]) for kernel in ("init", "after"))
    text = f"By raw cosines the kernel after training is {raw}. Two different images have a cosine, too: {baseline}."
    if small := _no_larger(told):
        text += f" The change for {listed(small)} is no larger than that one, so it says little of the transformation."
    elif _changed(told):
        text += " The changes beyond noise are larger than that one, or go the other way."
    return text


def _verdicts_in_words(rows: list[dict[str, Any]]) -> str:
    groups: dict[str, list[str]] = {}  # what is said -> transformations, those that keep the layout first
    for broken in (False, True):
        judgment = judgments.LAYOUT if broken else judgments.INVARIANCE
        own = [row for row in rows if (row["name"] in DISRUPTIVE) is broken]
        for verdict in judgment.sentences:
            names = [row["name"] for row in own if judgment.verdict(change_of(row)) == verdict]
            if names:
                groups.setdefault(judgment.sentences[verdict], []).extend(names)
    return "; ".join(f"{text} {listed(names)}" for text, names in groups.items()) or "not measured"


def change_of(row: dict[str, Any]) -> dict[str, Any]:
    """Change of a cosine from before to after training: over the same images or, in earlier runs, of the means."""
    if "change" in row:
        return row["change"]
    before, after = row["init"], row["after"]
    if None in (before["value"], after["value"], before["error"], after["error"]):
        return {"value": None, "error": None}
    return {"value": after["value"] - before["value"], "error": math.hypot(before["error"], after["error"])}


def _changed(told: dict[str, Any]) -> list[dict[str, Any]]:
    """Transformations whose raw cosine changed beyond noise."""
    return [row for row in told["rows"] if judgments.more_invariant(change_of(row)) in ("above", "below")]


def _no_larger(told: dict[str, Any]) -> list[str]:
    """Names of those whose raw cosine changed beyond noise, but not more than that of two different images.

    Only changes in the same direction are compared: one in the other direction is not the baseline's.
    """
    baseline = change_of(told["different"])
    names = []
    for row in _changed(told):
        change = change_of(row)
        if not baseline["value"] or baseline["value"] * change["value"] <= 0:
            continue
        sign = 1.0 if change["value"] > 0 else -1.0
        error = math.hypot(change["error"] or 0.0, baseline["error"] or 0.0)
        beyond = row.get("beyond") or {"value": change["value"] - baseline["value"], "error": error}
        if beyond["value"] is None or judgments.BEYOND.say(beyond | {"value": sign * beyond["value"]}) != "beyond":
            names.append(row["name"])
    return names


def kernel_errors(told: dict[str, Any]) -> tuple[str, str]:
    """Key and name of the machine whose errors are drawn against the loss: one for all snapshots."""
    if told.get("machine") == "ridge":
        return "ridge_error", "ridge regression on the tangent kernel"
    return "kernel_error", "SVM on the tangent kernel"


def against_loss_errors(told: dict[str, Any]) -> str:
    """Read the test errors against the training loss."""
    key, name = kernel_errors(told)
    snapshots = [s for s in told["snapshots"] if s[key]["value"] is not None and s["loss"] is not None]
    text = f"{name[0].upper()}{name[1:]}: {told['points']:,} of the followed points, {told['tests']:,} test examples."
    if told.get("machine") == "ridge":
        text += " Not every kernel separates the points, so there is no SVM to compare."
    if len(snapshots) < 2:
        return f"{text} There are too few errors for a curve."
    first, last = snapshots[0], snapshots[-1]
    best = min(snapshots, key=lambda s: s[key]["value"])
    ends = " → ".join(f"{percent(s[key])} (loss {plain(s['loss'])})" for s in (first, last))
    lowest = f"{percent(best[key])} at loss {plain(best['loss'])}"
    return f"{text} From {ends}; lowest {lowest}. Training goes from right to left."


def against_loss_cosines(told: dict[str, Any]) -> str:
    """Read the cosines against the training loss."""
    snapshots = told["snapshots"]
    highest: dict[str, list[str]] = {}
    for i, row in enumerate(snapshots[0]["cosines"]):
        known = [s for s in snapshots if s["cosines"][i]["raw"]["value"] is not None]
        if known:
            best = max(known, key=lambda s: s["cosines"][i]["raw"]["value"])
            highest.setdefault(plain(best["loss"]), []).append(row["name"])
    places = "; ".join(f"at loss {loss} for {listed(names)}" for loss, names in highest.items())
    baseline = " → ".join(plain(snapshots[k]["different"]["raw"]["value"], 2) for k in (0, -1))
    return (
        f"{told['samples']} test images. Raw cosines are highest {places or 'nowhere: they are undefined'}. "
        f"Two different images (dashed): {baseline}. Training goes from right to left."
    )


def neighbors(results: dict[str, Any]) -> str:
    """Count how many neighbors share the label, without calling it significant: these are a few examples."""
    counts = []
    for key in ("init", "after"):
        same = [n["label"] == row["label"] for row in results["neighbors"]["rows"] for n in row[key]]
        counts.append(f"{sum(same)} of {len(same)}")
    return (
        f"Neighbors with the test example’s own label: {counts[0]} before training, {counts[1]} after. "
        "A few examples to look at, not a measurement."
    )


def unexplained(results: dict[str, Any]) -> str:
    """Why no prediction is explained."""
    if results["training"] is None:
        return "Not here: the weights were loaded, so there was no training to replay."
    why = (results.get("explained") or {}).get("unexplained")
    return f"Not here: {why or 'no prediction was explained in this run'}."


def certificates(results: dict[str, Any]) -> str:
    """Count the checks."""
    passed = [bool(c["ok"]) for c in results["certificates"]]
    if not passed:
        return "No check was made."
    return f"All {len(passed)} checks hold." if all(passed) else f"{sum(passed)} of {len(passed)} checks hold."


def _separable_findings(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Kernels that do not separate the classes: a finding, with ridge regression in the SVM's place."""
    found = [m for m in results["machines"] if judgments.separable(m["status"]) == "not separable"]
    if not found:
        return []
    names = listed([f"the {m['label']}" for m in found])
    lead = f"T{names[1:]} {'does' if len(found) == 1 else 'do'} not separate the training classes."
    errors = listed([percent(m["ridge_test_error"]) for m in found])
    return [(lead, f"No hard-margin SVM exists there; ridge regression stands in its place: test error {errors}.")]


def _error_findings(results: dict[str, Any]) -> list[tuple[str, str]]:
    told = {m["kernel"]: m for m in results["machines"]}
    network = percent(results["network"]["test_error"])
    findings = []
    for other, judgment in judgments.BETTER.items():
        found = comparison(results, other)
        key = "test_error" if found["machine"] == "svm" else "ridge_test_error"
        init, after, conjugate = (
            percent(told[k][key]) if k in told else "undefined" for k in ("init", "after", "conjugate")
        )
        by = SVM[found["machine"]]
        text = (
            f"Test error of {by}: kernel at initialization {init}, after kernel {after}."
            if other == "init"
            else f"Test error: network {network}; {by}: after kernel {after}, conjugate kernel {conjugate}."
        )
        numbers = found["p"], found["value"]
        learned = (results["network"].get("fit") or {"value": None})["value"]
        lead = lead_on_network(judgment, numbers, learned) if other == "network" else judgment.say(*numbers)
        findings.append((lead, text + _counts(found)))
    return findings


def _counts(found: dict[str, Any]) -> str:
    """The numbers of McNemar's test."""
    if found["p"] is None:
        return ""
    other = "the network" if found["with"] == "network" else "the kernel at initialization"
    return (
        f" Of {found['examples']:,} test examples {found['only_after']:,} are wrong by the after kernel alone and "
        f"{found['only_other']:,} by {other} alone (p = {plain(found['p'], 2)})."
    )


def _task_finding(results: dict[str, Any]) -> tuple[str, str]:
    rows = {row["kernel"]: row for row in results["quality"]}
    (first, last), ranks = (
        [rows.get(kernel, {}).get(name) for kernel in ("init", "after")]
        for name in ("alignment_centered", "effective_rank")
    )
    if first is None or last is None:
        return judgments.TURN.sentences["undefined"], "Centering leaves nothing of one of the kernels."
    return turn_finding(first, last, ranks, results["along"])


def turn_finding(
    first: float | None, last: float | None, ranks: list[float | None], along: dict[str, Any] | None
) -> tuple[str, str]:
    """What became of the alignment with the targets, judged by its curve along training."""
    found = judgments.ends_of(along["alignment_centered"]) if along else None
    lead = judgments.TURN.say(*(found or (first, last, None)))
    text = f"Its centered alignment with the targets went from {plain(first)} to {plain(last)}, its effective rank "
    text += f"from {plain(ranks[0])} to {plain(ranks[1])}."
    if found and along:
        text += f" On the {along['points']:,} points followed along training the alignment went from "
        text += f"{plain(found[0])} to {plain(found[1])}; its largest move the other way was {plain(found[2], 2)}."
    return lead, text


def along_finding(a: dict[str, Any]) -> tuple[str, str]:
    """What became of the kernel along training."""
    text = training.summary(a)
    return judgments.SHAPE.say(a["distance"][-1]), f"{text[0].upper()}{text[1:]}."


def _invariance_lead(told: dict[str, Any]) -> str:
    changed = len(_changed(told))
    if not changed:
        return "No invariance changed beyond noise."
    if "different" in told and changed == len(_no_larger(told)):
        return "Cosines changed no more than those of two different images."
    return "Training changed what the kernel ignores."
