"""The section on the limit of infinite width in the reports of `analyze`: its figures, readings and sentences."""

from __future__ import annotations

from typing import Any

from ntkit.report import draw, judgments
from ntkit.report.draw import Figure, Panel
from ntkit.report.words import beside, counted, p_value, percent, plain, share

_ROLES = {"network": ("network", "var(--network)"), "first_order": ("first-order network", "var(--init)")}


def limit_section(results: dict[str, Any]) -> dict[str, Any] | None:
    """Figures with their readings, and paragraphs; None where the run has no such stage."""
    told = results.get("limit")
    if not told:
        return None
    first = told["first_order"]
    measured = bool(first) and "absent" not in first
    if first is None:
        missing = "No first-order network: the weights were loaded, so there was no training to repeat."
    else:
        missing = f"No first-order network: {first['absent']}." if "absent" in first else ""
    return {
        "figures": [_curves(first)] if measured else [],
        "missing": missing,
        "kernel": kernel(told["kernel"]),
        "notes": told["kernel"].get("notes", []),
    }


def finding(results: dict[str, Any]) -> tuple[str, str] | None:
    """Lead and sentence of the findings; None where no first-order network was trained."""
    first = (results.get("limit") or {}).get("first_order")
    if not first or "absent" in first:
        return None
    last = first["distance"][-1]
    text = (
        "Its first-order network keeps its kernel, as an infinitely wide network does. Trained alike, the two have "
        f"test outputs that differ by {_beside_limits(last)} of how far training moved the network’s. The first-order "
        f"network: {_last_errors(first)}"
    )
    return judgments.LINEAR.say(last), f"{text}."


def _beside_limits(value: float | None) -> str:
    """A share in as many digits as tell it from the nearer threshold."""
    if value is None:
        return "an undefined share"
    near = min((judgments.NEAR, judgments.FAR), key=lambda limit: abs(limit - value))
    return f"{beside(100 * value, 100 * near)}\u00a0%"


def _last_errors(first: dict[str, Any]) -> str:
    """Errors of both networks at the end, with McNemar's test; losses of a regression."""
    if "test_error" not in first:
        losses = [plain(first["test_loss"][name][-1]) for name in ("first_order", "network")]
        return f"test loss {losses[0]}, the network’s {losses[1]}"
    errors = [percent(first["test_error"][name][-1]) for name in ("first_order", "network")]
    found = first["paired"]
    said = judgments.ERROR.say(found["p"], found["value"])
    return f"test error {errors[0]}, {said} the network’s, {errors[1]} ({p_value(found['p'])})"


def _curves(first: dict[str, Any]) -> tuple[Figure, str]:
    """Test error or loss of both networks, and the distance of their outputs, against step."""
    steps, tests = first["steps"], first["tests"]
    losses = [value for name in _ROLES for value in first["test_loss"][name]]
    columns = [("loss", "test loss", draw.log_axis("", losses), first["test_loss"])]
    if "test_error" in first:
        errors = {name: [draw.times(entry["value"], 100) for entry in first["test_error"][name]] for name in _ROLES}
        columns.insert(0, ("error", "test error, %", draw.axis("", rangemode="tozero"), errors))
    panels = []
    for key, heading, y, values in columns:
        data = [
            draw.line(steps, values[name], words, color, dash="dash" if name == "first_order" else "solid")
            for name, (words, color) in _ROLES.items()
        ]
        panels.append(Panel(f"plot-limit-{key}", heading, data, draw.layout(draw.step_axis(steps[-1]), y, height=260)))
    data = [draw.line(steps, first["distance"], "distance", "var(--after)", ends=True)]
    y = draw.axis("", rangemode="tozero")
    layout = draw.layout(draw.step_axis(steps[-1]), y, height=260)
    panels.append(Panel("plot-limit-distance", "distance of the outputs", data, layout))
    known = [(s, d) for s, d in zip(steps, first["distance"], strict=True) if d is not None]
    early = next((s for s, d in known if d >= judgments.NEAR), None)
    reading = f"The first-order network on {counted(tests, 'test example')}: {_last_errors(first)}. "
    when = f"At step {early:,} its outputs first" if early is not None else "At no snapshot its outputs"
    reading += f"{when} differ by {share(judgments.NEAR)} of how far training moved the network’s."
    title = "The network and its first-order network"
    legend = [
        ("network", "var(--network)", "line"), ("first-order network", "var(--init)", "dash"),
        ("their distance, over how far the outputs moved", "var(--after)", "line"),
    ]  # fmt: skip
    return Figure("limit", title, f"{title}. {reading}", panels, legend, wide=True), reading


def kernel(told: dict[str, Any]) -> str:
    """What is said of the network's kernel beside that of infinite width."""
    if "absent" in told:
        return f"The kernel is not compared with that of infinite width: {told['absent']}."
    samples = counted(told["samples"], "training example")
    how = f"computed in closed form on {samples}"
    if told["networks"]:
        spread = f"the standard error is {share(told['error'])} of its norm"
        networks = f"the mean of {told['networks']} random wide networks"
        how = f"estimated on {samples} as {networks}; {spread}. It has no closed form ({told['why']})"
    before, after = (plain(told["cosines"][key]) for key in ("init", "after"))
    return (
        f"The kernel of infinitely wide networks was {how}. The network’s kernel at initialization differs from it by "
        f"{share(told['distance'])} of its norm. Centered cosine with it: {before} at initialization, {after} after "
        "training."
    )
