"""What the report of `analyze` says in words: pure functions of the results, never more than the numbers allow."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from ntkit.report import training_figures as training
from ntkit.report.words import compare, listed, measure, percent, plain

DISRUPTIVE = ("quadrant swap", "patch shuffle")
"""Transformations that keep local statistics and break the layout: a low cosine means a global kernel."""
_ERROR = {
    "below": "lower than",
    "above": "higher than",
    "same": "no different, beyond noise, from",
    "unknown": "not comparable with",
}
_INVARIANCE = {
    "above": "more invariant to",
    "below": "less invariant to",
    "same": "no different beyond noise for",
    "unknown": "not comparable for",
}
_GLOBALITY = {
    "below": "more global for",
    "above": "less global for",
    "same": "no more and no less global for",
    "unknown": "not comparable for",
}
LEADS = {
    "init": {
        "below": "Training made a better kernel.",
        "above": "Training made a worse kernel.",
        "same": "No difference beyond noise between the kernels before and after training.",
        "unknown": "The kernels before and after training cannot be compared.",
    },
    "network": {
        "below": "The after kernel does better than its network.",
        "above": "The network does better than its after kernel.",
        "same": "The after kernel does as well as its network, within noise.",
        "unknown": "The after kernel cannot be compared with its network.",
    },
}


def answer(results: dict[str, Any]) -> str:
    """Say in two sentences what was done and what came out."""
    model, data, run = results["model"], results["data"], results["training"]
    how = "whose weights were loaded" if run is None else f"trained for {run['steps']:,} steps"
    return (
        f"The network {model['name']} ({model['parameters']:,} parameters), {how}, on {data['train']:,} training "
        f"examples of {data['name']}, seen through its tangent kernel. The test error of a support vector machine on "
        f"the trained network’s kernel is {_ERROR[_against(results, 'init')]} that on the kernel at initialization."
    )


def in_short(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Three to five findings, each a lead and a sentence."""
    findings = [*_error_findings(results), _task_finding(results)]
    if results["along"]:
        findings.append(_along_finding(results["along"]))
    if results["invariances"]:
        findings.append((_invariance_lead(results["invariances"]), _raw_cosines(results["invariances"])))
    return findings


def warnings(results: dict[str, Any]) -> list[str]:
    """List what the reader must know before believing the numbers."""
    texts = []
    failed = [c["what"] for c in results["certificates"] if not c["ok"]]
    if failed:
        texts.append(f"{len(failed)} check{'' if len(failed) == 1 else 's'} failed: {'; '.join(failed)}.")
    for machine in results["machines"]:
        if machine["status"] != "optimal":
            texts.append(f"SVM on the {machine['label']}: {machine['status']}. {machine['advice']}".strip())
    if results["training"] is not None and results["training"]["stop"] == "diverged":
        texts.append("Training diverged: the after kernel is that of a network that did not learn.")
    return texts


def machines(results: dict[str, Any]) -> str:
    """Read the figure of test errors."""
    init, conjugate, network = (_ERROR[_against(results, other)] for other in ("init", "conjugate", "network"))
    return (
        f"The after kernel’s test error is {init} that of the kernel at initialization, {conjugate} that of the "
        f"conjugate kernel, and {network} the network’s own."
    )


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
    parts = []
    for words, names in zip((_INVARIANCE, _GLOBALITY), _invariance_verdicts(rows), strict=True):
        parts += [f"{text} {listed(names[verdict])}" for verdict, text in words.items() if verdict in names]
    return "; ".join(parts) or "not measured"


def _changed(told: dict[str, Any]) -> list[dict[str, Any]]:
    """Transformations whose raw cosine changed beyond noise."""
    return [row for row in told["rows"] if compare(row["after"], row["init"]) in ("above", "below")]


def _no_larger(told: dict[str, Any]) -> list[str]:
    """Names of those whose raw cosine changed beyond noise, but not more than that of two different images.

    Only changes in the same direction are compared: one in the other direction is not the baseline's.
    """
    size, baseline = _change(told["different"])
    changes = [(row["name"], *_change(row)) for row in _changed(told)]
    return [name for name, one, change in changes if baseline * change > 0 and compare(one, size) != "above"]


def _change(row: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Size of a change from before to after training, with its standard error; and the change (0 if undefined)."""
    before, after = row["init"], row["after"]
    if None in (before["value"], after["value"], before["error"], after["error"]):
        return {"value": None, "error": None}, 0.0
    change = after["value"] - before["value"]
    return {"value": abs(change), "error": math.hypot(before["error"], after["error"])}, change


def against_loss_errors(told: dict[str, Any]) -> str:
    """Read the test errors against the training loss."""
    snapshots = [s for s in told["snapshots"] if s["kernel_error"]["value"] is not None and s["loss"] is not None]
    text = f"An SVM on each kernel: {told['points']:,} of the followed points, {told['tests']:,} test examples."
    if len(snapshots) < 2:
        return f"{text} Too few kernels separate the points."
    first, last = snapshots[0], snapshots[-1]
    best = min(snapshots, key=lambda s: s["kernel_error"]["value"])
    ends = " → ".join(f"{percent(s['kernel_error'])} (loss {plain(s['loss'])})" for s in (first, last))
    lowest = f"{percent(best['kernel_error'])} at loss {plain(best['loss'])}"
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


def _error_findings(results: dict[str, Any]) -> list[tuple[str, str]]:
    errors = {m["kernel"]: percent(m["test_error"]) for m in results["machines"]}
    init, after, conjugate = (errors.get(kernel, "undefined") for kernel in ("init", "after", "conjugate"))
    network = percent(results["network"]["test_error"])
    texts = {
        "init": f"Test error of a hard-margin SVM: kernel at initialization {init}, after kernel {after}.",
        "network": f"Test error: network {network}, after kernel {after}, conjugate kernel {conjugate}.",
    }
    return [(LEADS[other][_against(results, other)], text) for other, text in texts.items()]


def _task_finding(results: dict[str, Any]) -> tuple[str, str]:
    qualities = {row["kernel"]: row for row in results["quality"]}
    init, after = qualities.get("init", {}), qualities.get("after", {})
    first, last = init.get("alignment_centered"), after.get("alignment_centered")
    if first is None or last is None:
        return "Alignment with the task is undefined.", "Centering leaves nothing of one of the kernels."
    lead = f"The kernel turned {'towards' if last > first else 'away from'} the task."
    if abs(last - first) < 0.01:
        lead = "Alignment with the task hardly changed."
    ranks = f"{plain(init.get('effective_rank'))} to {plain(after.get('effective_rank'))}"
    went = f"from {plain(first)} to {plain(last)}"
    return lead, f"Its centered alignment with the targets went {went}, its effective rank from {ranks}."


def _along_finding(a: dict[str, Any]) -> tuple[str, str]:
    leads = {
        None: "The kernel vanished along training.",
        False: "The kernel hardly changed shape.",
        True: "The kernel changed along training.",
    }
    text = training.summary(a)
    return leads[training.moved(a)], f"{text[0].upper()}{text[1:]}."


def _invariance_lead(told: dict[str, Any]) -> str:
    changed = len(_changed(told))
    if not changed:
        return "No invariance changed beyond noise."
    if "different" in told and changed == len(_no_larger(told)):
        return "Cosines changed no more than those of two different images."
    return "Training changed what the kernel ignores."


def _invariance_verdicts(rows: list[dict[str, Any]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Verdict -> transformations, of those that keep the layout and of those that break it."""
    gentle: dict[str, list[str]] = {}
    broken: dict[str, list[str]] = {}
    for row in rows:
        group = broken if row["name"] in DISRUPTIVE else gentle
        group.setdefault(compare(row["after"], row["init"]), []).append(row["name"])
    return gentle, broken


def _machine(results: dict[str, Any], kernel: str) -> dict[str, Any] | None:
    return next((m for m in results["machines"] if m["kernel"] == kernel), None)


def _against(results: dict[str, Any], other: str) -> str:
    """How the after kernel's test error compares with that of another kernel, or with the network's."""
    after = _machine(results, "after")
    rival = results["network"] if other == "network" else _machine(results, other)
    if not _solved(after) or rival is None or not (other == "network" or _solved(rival)):
        return "unknown"
    return compare(after["test_error"], rival["test_error"], 1 / max(1, results["data"]["test"]))


def _solved(machine: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Only a machine with an optimal certificate is evidence; the errors of others are printed without a verdict."""
    return machine is not None and machine["status"] == "optimal"
