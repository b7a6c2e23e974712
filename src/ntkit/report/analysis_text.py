"""What the report of `analyze` says in words: pure functions of the results, never more than the numbers allow."""

from __future__ import annotations

from typing import Any

from ntkit.report import explain_text, judgments, limit_section
from ntkit.report import training_figures as training
from ntkit.report.invariance_text import invariance_finding
from ntkit.report.words import beside, counted, listed, p_value, percent, plain, share

SVM = {"svm": "a hard-margin SVM", "ridge": "ridge regression"}
"""What compares two kernels."""
KERNEL = "It sees the network through its tangent kernel, which says how alike two examples are to the network."


def answer(results: dict[str, Any]) -> str:
    """Say in a few sentences what was done and what came out."""
    model, data, run = results["model"], results["data"], results["training"]
    how = "whose weights were loaded" if run is None else f"trained for {counted(run['steps'], 'step')}"
    found, verdict = comparison(results, "init"), judgments.fits(*fit_of(results))
    first = judgments.FIT.sentences[verdict].split(":")[0].rstrip(".") + ". " if verdict != "fits" else ""
    return (
        f"{first}{looked_at(model, how)} on {data['train']:,} training examples of {data['name']}. {KERNEL} "
        f"The test error of {SVM[found['machine']]} on the kernel after training is "
        f"{judgments.ERROR.say(found['p'], found['value'])} that on the kernel at initialization."
        f"{along_in_a_sentence(results)}"
    )


def looked_at(model: dict[str, Any], how: str) -> str:
    """Begin the paragraph on top: the network, and how it came by its weights."""
    return f"This page looks at the network {model['name']} ({model['parameters']:,} parameters), {how}"


def along_in_a_sentence(results: dict[str, Any]) -> str:
    """The leads on the kernel and the task, and on the limit, of a network that was trained here."""
    if not results["along"]:
        return ""
    limit = limit_section.finding(results)
    return f" {_task_finding(results)[0]}" + (f" {limit[0]}" if limit else "")


def in_short(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Findings, each a lead and a sentence."""
    findings = [*_separable_findings(results), *_error_findings(results), _task_finding(results)]
    if results["along"]:
        findings.append(along_finding(results["along"]))
    if (found := limit_section.finding(results)) is not None:
        findings.append(found)
    if results["invariances"]:
        findings.append(invariance_finding(results["invariances"], results["training"] is None))
    return [*findings, *explained_finding(results)]


def explained_finding(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Whether the influence on the explained predictions can be used; nothing where none was explained."""
    told = results.get("explained")
    if not told or "points" not in told:
        return []
    lead, _, text = explain_text.trust(told).partition(": ")
    return [(f"{lead}.", f"{text[0].upper()}{text[1:]}")]


def warnings(results: dict[str, Any]) -> list[str]:
    """List what the reader must know before believing the numbers."""
    return [*cautions(results), *failed_checks(results)]


def failed_checks(results: dict[str, Any]) -> list[str]:
    """One sentence on all checks that failed; none without any."""
    failed = [c["what"].removesuffix(".") for c in results["certificates"] if not c["ok"]]
    return [f"{len(failed)} check{'' if len(failed) == 1 else 's'} failed: {'; '.join(failed)}."] if failed else []


def cautions(results: dict[str, Any]) -> list[str]:
    """What is to be known beside failed checks: of the network first, then of the machines."""
    learned, right = fit_of(results)
    below = "Its training loss is above that of the best constant prediction"
    if learned is not None and learned >= 0:
        below = f"Its training loss is {_percent_beside(learned)} below that of the best constant prediction"
    measured = f"{below}; less than {share(judgments.LITTLE)} is little."
    texts = fit_warnings(learned, results["training"], measured, right)
    for machine in results["machines"]:
        if judgments.separable(machine["status"]) == "inaccurate":
            texts.append(f"SVM on the {machine['label']}: {machine['status']}. {machine['advice']}".strip())
    return texts


def fit_of(results: dict[str, Any]) -> tuple[float | None, float]:
    """Share of the training loss that is explained, and of the best constant answer's training errors avoided."""
    network = results["network"] or {}
    if "fit" not in network:  # of an earlier version: nothing is said
        return 1.0, 1.0
    return network["fit"]["value"], (network.get("right") or {"value": 0.0})["value"] or 0.0


def _percent_beside(value: float) -> str:
    return f"{beside(100 * value, 100 * judgments.LITTLE)}\u00a0%"


def fit_warnings(learned: float | None, run: dict[str, Any] | None, measured: str, right: float = 0.0) -> list[str]:
    """What is to be known of the network: that its training diverged, or that it hardly fits its training set."""
    if run is not None and run["stop"] == "diverged":
        return ["Training diverged: the after kernel is that of a network that did not learn."]
    text = judgments.FIT.say(learned, right)
    return [text if learned is None else f"{text} {measured}"] if text else []


def lead_on_network(
    judgment: judgments.Judgment, numbers: tuple[Any, ...], learned: float | None, right: float = 0.0
) -> str:
    """The lead on the network beside its kernel; where one is better and the network hardly fits, that belongs into it.

    >>> lead_on_network(judgments.BETTER["network"], (0.01, -0.1), 0.07)
    'The after kernel does better than its network, which hardly fits its training set.'
    """
    lead = judgment.say(*numbers)
    if judgment.verdict(*numbers) in ("below", "above") and judgments.fits(learned, right) == "hardly":
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
    words = {"below": "lower", "above": "higher", "same": "no"}
    rows = []
    for other, name in names.items():
        found = comparison(results, other)
        if found["p"] is None:
            continue
        rows.append((
            name,
            {"svm": "hard-margin SVM", "ridge": "ridge regression"}[found["machine"]],
            f"{found['only_after']:,}, {found['only_other']:,}",
            percent(found, False).replace("-", "−"),
            f"{words[judgments.different_errors(found['p'], found['value'])]}, {p_value(found['p'])}",
        ))  # fmt: skip
    return rows


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


def shown_error(results: dict[str, Any], machine: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Test error of a kernel's machine, and which it is: one for all kernels, the SVM if all separate, or ridge."""
    if any(judgments.separable(m["status"]) == "not separable" for m in results["machines"]):
        return machine["ridge_test_error"], "ridge"
    return machine["test_error"], "svm"


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
    for other in ("init", "network"):
        judgment = judgments.BETTER[other]
        found = comparison(results, other)
        key = "test_error" if found["machine"] == "svm" else "ridge_test_error"
        init, after, conjugate = (
            "none" if k in told and told[k]["status"] == "not separable" and key == "test_error"
            else percent(told[k][key]) if k in told else "undefined"
            for k in ("init", "after", "conjugate")
        )  # fmt: skip
        by = SVM[found["machine"]]
        text = (
            f"Test error of {by}: kernel at initialization {init}, after kernel {after}."
            if other == "init"
            else f"Test error: network {network}; {by}: after kernel {after}, conjugate kernel {conjugate}."
        )
        numbers = found["p"], found["value"]
        if other == "network":
            lead = lead_on_network(judgment, numbers, *fit_of(results))
        else:
            lead = judgments.BETTER["loaded" if results["training"] is None else other].say(*numbers)
        findings.append((lead, text + _counts(found)))
    return findings


def _counts(found: dict[str, Any]) -> str:
    """The numbers of McNemar's test."""
    if found["p"] is None:
        return ""
    other = "the network" if found["with"] == "network" else "the kernel at initialization"
    return (
        f" Of {counted(found['examples'], 'test example')}, wrong by the after kernel alone: {found['only_after']:,}; "
        f"by {other} alone: {found['only_other']:,} ({p_value(found['p'])})."
    )


def places(results: dict[str, Any], findings: list[tuple[str, str]]) -> list[str]:
    """The section that each finding is shown in."""
    along = [*judgments.TURN.sentences.values(), *judgments.SHAPE.sentences.values()]
    own = dict.fromkeys(along, "along" if results["along"] else "quality")
    own |= dict.fromkeys(judgments.LINEAR.sentences.values(), "limit")
    if results["invariances"]:
        own[invariance_finding(results["invariances"], results["training"] is None)[0]] = "invariances"
    own |= {f"{sentence}.": "explained" for sentence in judgments.TRUST.sentences.values()}
    return [own.get(lead, "quality") for lead, _ in findings]


def _task_finding(results: dict[str, Any]) -> tuple[str, str]:
    rows = {row["kernel"]: row for row in results["quality"]}
    (first, last), ranks = (
        [rows.get(kernel, {}).get(name) for kernel in ("init", "after")]
        for name in ("alignment_centered", "effective_rank")
    )
    return turn_finding(first, last, ranks, results["along"], results["data"]["train"])


def turn_finding(
    first: float | None, last: float | None, ranks: list[float | None], along: dict[str, Any] | None, training: int
) -> tuple[str, str]:
    """What became of the alignment with the targets, judged by its curve along training on all points or some."""
    found = judgments.ends_of(along["alignment_centered"]) if along else None
    lead = judgments.TURN.say(*(found or (first, last, None)))
    text = "On all training points"
    if found and along:
        text = (
            f"Centered alignment with the targets of the {along['points']:,} points followed: from {plain(found[0])} "
            f"to {plain(found[1])}; its largest move the other way was {plain(found[2], 2)}"
        )
        if along["points"] == training:
            return lead, f"{text}. The effective rank went from {plain(ranks[0])} to {plain(ranks[1])}."
        text += ". On all training points"
    text += (
        f" it went from {plain(first)} to {plain(last)}"
        if found
        else f": from {plain(first)} to {plain(last)}, centered"
    )
    return lead, f"{text}; the effective rank from {plain(ranks[0])} to {plain(ranks[1])}."


def along_finding(a: dict[str, Any]) -> tuple[str, str]:
    """What became of the kernel along training."""
    text = training.summary(a)
    return judgments.SHAPE.say(*training.distances(a)), f"{text[0].upper()}{text[1:]}."
