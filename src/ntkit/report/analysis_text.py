"""What the report of `analyze` says in words: pure functions of the results, never more than the numbers allow."""

from __future__ import annotations

from typing import Any, TypeGuard

from ntkit.report import training_figures as training
from ntkit.report.words import compare, listed, percent, plain

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
_LEADS = {
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
        verdicts = {verdict for group in _invariance_verdicts(results["invariances"]) for verdict in group}
        changed = "Training changed what the kernel ignores."
        lead = changed if verdicts & {"above", "below"} else "No invariance changed beyond noise."
        findings.append((lead, invariances(results)))
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
    """Read the cosines, transformation by transformation."""
    parts = []
    for words, names in zip((_INVARIANCE, _GLOBALITY), _invariance_verdicts(results["invariances"]), strict=True):
        parts += [f"{text} {listed(names[verdict])}" for verdict, text in words.items() if verdict in names]
    return f"After training the kernel is {'; '.join(parts)}." if parts else "No transformation was measured."


def neighbors(results: dict[str, Any]) -> str:
    """Count how many neighbors share the label, without calling it significant: these are a few examples."""
    counts = []
    for key in ("init", "after"):
        same = [n["label"] == row["label"] for row in results["neighbors"]["rows"] for n in row[key]]
        counts.append(f"{sum(same)} of {len(same)}")
    return (
        f"Neighbors with the test image’s own label: {counts[0]} before training, {counts[1]} after. "
        "A few examples to look at, not a measurement."
    )


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
    return [(_LEADS[other][_against(results, other)], text) for other, text in texts.items()]


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


def _invariance_verdicts(invariances: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Verdict -> transformations, of those that keep the layout and of those that break it."""
    gentle: dict[str, list[str]] = {}
    broken: dict[str, list[str]] = {}
    for row in invariances["rows"]:
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
