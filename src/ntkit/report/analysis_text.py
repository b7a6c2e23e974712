"""What the report says in words: pure functions of the results, never more than the numbers allow."""

from __future__ import annotations

from typing import Any, TypeGuard

from ntkit.report.words import change, compare, listed, middle, percent, plain, share

DISRUPTIVE = ("quadrant swap", "patch shuffle")
"""Transformations that keep local statistics and break the layout: a low cosine means a global kernel."""


def answer(results: dict[str, Any]) -> str:
    """Say in two sentences what was done and what came out."""
    model, data, training = results["model"], results["data"], results["training"]
    how = "whose weights were loaded" if training is None else f"trained for {training['steps']:,} steps"
    start = (
        f"The network {model['name']} ({model['parameters']:,} parameters), {how}, on {data['train']:,} training "
        f"examples of {data['name']}, seen through its tangent kernel."
    )
    init, after = _machine(results, "init"), _machine(results, "after")
    verdict = _compare_errors(results, after, init)
    words = {
        "below": "Training made the kernel better: a plain kernel machine errs less on the trained network’s kernel "
        "than on the kernel at initialisation.",
        "above": "Training made the kernel worse: a plain kernel machine errs more on the trained network’s kernel "
        "than on the kernel at initialisation.",
        "same": "On this test set a plain kernel machine does no better and no worse, beyond noise, on the trained "
        "network’s kernel than on the kernel at initialisation.",
        "unknown": "Whether training made the kernel better cannot be judged here: a machine is not optimal, or a test "
        "error or its standard error is missing.",
    }
    return f"{start} {words[verdict]}"


def in_short(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Three to five findings, each a lead and a sentence."""
    findings = [_kernel_finding(results), _network_finding(results), _task_finding(results)]
    if results["along"]:
        findings.append(_along_finding(results["along"]))
    if results["invariances"]:
        findings.append(_invariance_finding(results["invariances"]))
    return findings


def warnings(results: dict[str, Any]) -> list[str]:
    """List what the reader must know before believing the numbers."""
    told = []
    failed = [c for c in results["certificates"] if not c["ok"]]
    if failed:
        names = "; ".join(c["what"] for c in failed)
        told.append(f"{_count(len(failed), 'check')} failed: {names}.")
    for machine in results["machines"]:
        if machine["status"] != "optimal":
            told.append(f"SVM on the {machine['label']}: {machine['status']}. {machine['advice']}".strip())
    training = results["training"]
    if training is not None and training["stop"] == "diverged":
        told.append("Training diverged: the after kernel is that of a network that did not learn.")
    return told


def machines(results: dict[str, Any]) -> str:
    """Read the figure of test errors."""
    after, network = _machine(results, "after"), results["network"]["test_error"]
    parts = []
    for name, against in (("initialisation", _machine(results, "init")), ("conjugate", _machine(results, "conjugate"))):
        verdict = _compare_errors(results, after, against)
        where = "the kernel at initialisation" if name == "initialisation" else "the conjugate kernel"
        words = {"below": f"below {where}", "above": f"above {where}", "unknown": f"not comparable with {where}"}
        parts.append(words.get(verdict, f"no different, beyond noise, from {where}"))
    own = {"below": "below the network’s own", "above": "above the network’s own"}
    own |= {
        "unknown": "not comparable with the network’s own",
        "same": "no different, beyond noise, from the network’s own",
    }
    verdict = compare(after["test_error"], network, _floor(results)) if _solved(after) else "unknown"
    return f"The after kernel’s test error is {parts[0]}, {parts[1]}, and {own[verdict]}."


def losses(results: dict[str, Any]) -> str:
    """Read the loss curve."""
    a, training = results["along"], results["training"]
    first, last = a["losses"][0], a["losses"][-1]
    text = f"From {plain(first)} to {plain(last)} on the {a['points']:,} followed points"
    if training is not None and training["stop"] == "diverged":
        return f"{text}; training diverged."
    if training is not None and training["stop"] == "target":
        return f"{text}; training stopped when its target was reached."
    return f"{text}."


def eigenvalues(results: dict[str, Any]) -> str:
    """Read the largest eigenvalues, against the bound 2 n / learning rate where both are known."""
    a = results["along"]
    top = [row[0] for row in a["eigenvalues"]]
    text = f"The largest eigenvalue {change(top[0], top[-1])}"
    if not (a["lr"] and a["stable_lr"]):
        return f"{text}."
    bound = 2 * a["points"] / a["lr"]
    over = [value is not None and value > bound for value in top]
    state = "above 2n / learning rate at times" if any(over) else "always below 2n / learning rate"
    if over[-1]:
        since = len(over) - next((i for i, above in enumerate(reversed(over)) if not above), len(over))
        if not any(over[:since]):
            state = f"above 2n / learning rate from step {a['steps'][since]} on"
    return (
        f"{text}, {state}. That line bounds stable full-batch gradient descent on squared loss; with other losses, "
        "minibatches or momentum it is only a landmark."
    )


def alignment(results: dict[str, Any]) -> str:
    """Read the alignment with the targets."""
    a = results["along"]
    first, last = a["alignment_centered"][0], a["alignment_centered"][-1]
    return f"Centred alignment goes from {plain(first)} to {plain(last)} (1: the kernel is the targets’ own)."


def distance(results: dict[str, Any]) -> str:
    """Read the distance to the initial kernel."""
    last = results["along"]["distance_to_init"][-1]
    if last is None:
        return "Undefined: one of the kernels is zero."
    if last < 0.01:
        return f"It ends at {plain(last)}: up to scale the kernel hardly moved, as in the infinite-width limit."
    return f"It ends at {plain(last)}: not the constant kernel of the infinite-width limit (0), whatever its scale."


def energy(results: dict[str, Any]) -> str:
    """Read the energies at the middle k: where targets, outputs and residual lie."""
    a = results["along"]
    place, k = middle(a["energy_ks"])
    pairs = []
    for name in ("targets", "outputs", "residual"):
        if f"energy_{name}" in a:
            first, last = a[f"energy_{name}"][0][place], a[f"energy_{name}"][-1][place]
            pairs.append(f"{share(first)} → {share(last)} of the {name}")
    return f"In the top {k} eigenvectors, first → last step: {'; '.join(pairs)}."


def size(results: dict[str, Any]) -> str:
    """Read trace and effective rank."""
    a = results["along"]
    return (
        f"The trace {change(a['trace'][0], a['trace'][-1])}; the effective rank goes from "
        f"{plain(a['effective_rank'][0])} to {plain(a['effective_rank'][-1])}."
    )


def spectra(results: dict[str, Any]) -> str:
    """Read the spectra at both ends."""
    a = results["along"]
    sums = []
    for row in (0, -1):
        whole, parts = a["trace"][row], a["eigenvalues"][row]
        sums.append(sum(parts) / whole if whole and None not in parts else None)
    start, end = share(sums[0]), share(sums[1])
    return (
        f"The top {len(a['eigenvalues'][0])} eigenvalues hold {start} of the trace at the start and {end} at the end."
    )


def invariances(results: dict[str, Any]) -> str:
    """Read the cosines, transformation by transformation."""
    gentle, broken = _invariance_verdicts(results["invariances"])
    parts = []
    words = {"above": "more invariant to", "below": "less invariant to", "same": "no different beyond noise for"}
    parts += [f"{words[v]} {listed(gentle[v])}" for v in words if gentle[v]]
    words = {"below": "more global for", "above": "less global for", "same": "no more and no less global for"}
    parts += [f"{words[v]} {listed(broken[v])}" for v in words if broken[v]]
    unknown = gentle["unknown"] + broken["unknown"]
    if unknown:
        parts.append(f"not comparable for {listed(unknown)}")
    return f"After training the kernel is {'; '.join(parts)}." if parts else "No transformation was measured."


def neighbours(results: dict[str, Any]) -> str:
    """Count how many neighbours share the label, without calling it significant: these are a few examples."""
    rows = results["neighbours"]["rows"]
    counts = {}
    for key in ("init", "after"):
        found = [(row["label"], n["label"]) for row in rows for n in row[key]]
        counts[key] = f"{sum(a == b for a, b in found)} of {len(found)}"
    return (
        f"Neighbours with the test image’s own label: {counts['init']} before training, {counts['after']} after. "
        "A few examples to look at, not a measurement."
    )


def certificates(results: dict[str, Any]) -> str:
    """Count the checks."""
    checks = results["certificates"]
    good = sum(bool(c["ok"]) for c in checks)
    if not checks:
        return "No check was made."
    return f"All {len(checks)} checks hold." if good == len(checks) else f"{good} of {len(checks)} checks hold."


def _kernel_finding(results: dict[str, Any]) -> tuple[str, str]:
    init, after = _machine(results, "init"), _machine(results, "after")
    verdict = _compare_errors(results, after, init)
    leads = {
        "below": "Training made a better kernel.",
        "above": "Training made a worse kernel.",
        "same": "No difference beyond noise between the kernels before and after training.",
        "unknown": "The kernels before and after training cannot be compared.",
    }
    errors = [percent(m["test_error"]) if m else "undefined" for m in (init, after)]
    text = f"Test error of a hard-margin SVM: kernel at initialisation {errors[0]}, after kernel {errors[1]}."
    return leads[verdict], text


def _network_finding(results: dict[str, Any]) -> tuple[str, str]:
    after, conjugate = _machine(results, "after"), _machine(results, "conjugate")
    network = results["network"]["test_error"]
    leads = {
        "below": "The after kernel does better than its network.",
        "above": "The network does better than its after kernel.",
        "same": "The after kernel does as well as its network, within noise.",
        "unknown": "The after kernel cannot be compared with its network.",
    }
    verdict = compare(after["test_error"], network, _floor(results)) if _solved(after) else "unknown"
    errors = [percent(m["test_error"]) if m else "undefined" for m in (after, conjugate)]
    text = f"Test error: network {percent(network)}, after kernel {errors[0]}, conjugate kernel {errors[1]}."
    return leads[verdict], text


def _task_finding(results: dict[str, Any]) -> tuple[str, str]:
    found = {row["kernel"]: row for row in results["quality"]}
    first, last = found.get("init", {}), found.get("after", {})
    a, b = first.get("alignment_centered"), last.get("alignment_centered")
    if a is None or b is None:
        return "Alignment with the task is undefined.", "Centring leaves nothing of one of the kernels."
    lead = "The kernel turned towards the task." if b > a else "The kernel turned away from the task."
    if abs(b - a) < 0.01:
        lead = "Alignment with the task hardly changed."
    ranks = f"{plain(first.get('effective_rank'))} to {plain(last.get('effective_rank'))}"
    text = (
        f"Its centred alignment with the targets went from {plain(a)} to {plain(b)}, its effective rank from {ranks}."
    )
    return lead, text


def _along_finding(a: dict[str, Any]) -> tuple[str, str]:
    moved = a["distance_to_init"][-1]
    lead = (
        "The kernel changed along training."
        if moved is not None and moved >= 0.01
        else "The kernel hardly changed shape."
    )
    lead = "The kernel died along training." if moved is None else lead
    place, _ = middle(a["energy_ks"])
    first, last = a["energy_targets"][0][place], a["energy_targets"][-1][place]
    text = f"Its largest eigenvalue {change(a['eigenvalues'][0][0], a['eigenvalues'][-1][0])}; the top "
    text += f"{a['energy_ks'][place]} eigenvectors hold {share(last)} of the targets (at first {share(first)})."
    return lead, text


def _invariance_finding(invariances: dict[str, Any]) -> tuple[str, str]:
    gentle, broken = _invariance_verdicts(invariances)
    parts = []
    words = {"above": "more invariant to", "below": "less invariant to"}
    parts += [f"{words[v]} {listed(gentle[v])}" for v in words if gentle[v]]
    words = {"below": "lower (more global) under", "above": "higher (less global) under"}
    parts += [f"{words[v]} {listed(broken[v])}" for v in words if broken[v]]
    same = gentle["same"] + broken["same"]
    if not parts:
        return (
            "No invariance changed beyond noise.",
            f"Compared: {listed(same + gentle['unknown'] + broken['unknown'])}.",
        )
    tail = f"; no difference beyond noise for {listed(same)}" if same else ""
    return "Training changed what the kernel ignores.", f"It is {'; '.join(parts)}{tail}."


def _invariance_verdicts(invariances: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    gentle: dict[str, list[str]] = {key: [] for key in ("above", "below", "same", "unknown")}
    broken: dict[str, list[str]] = {key: [] for key in gentle}
    for row in invariances["rows"]:
        group = broken if row["name"] in DISRUPTIVE else gentle
        group[compare(row["after"], row["before"])].append(row["name"])
    return gentle, broken


def _machine(results: dict[str, Any], kernel: str) -> dict[str, Any] | None:
    return next((m for m in results["machines"] if m["kernel"] == kernel), None)


def _floor(results: dict[str, Any]) -> float:
    return 1 / max(1, results["data"]["test"])


def _compare_errors(results: dict[str, Any], a: dict[str, Any] | None, b: dict[str, Any] | None) -> str:
    if not _solved(a) or not _solved(b):
        return "unknown"
    return compare(a["test_error"], b["test_error"], _floor(results))


def _solved(machine: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Only a machine with an optimal certificate is evidence; the others' errors are shown, not judged."""
    return machine is not None and machine["status"] == "optimal"


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
