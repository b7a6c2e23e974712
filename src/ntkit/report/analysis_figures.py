"""The figures of `analyze` that are not along training: pure functions of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ntkit.report import draw
from ntkit.report.analysis_text import against_loss_cosines, against_loss_errors, kernel_errors, shown_error
from ntkit.report.draw import ROLES, Figure, Panel
from ntkit.report.study_curves import tone
from ntkit.report.words import percent

FORMS = {"raw": "Raw", "centered": "Centered"}
_DIFFERENT = ("var(--network)", "dash")  # color and dash of the baseline: two different images


def machines(results: dict[str, Any]) -> Figure:
    """Test error of the network and of the machine on each kernel, with standard errors.

    Examples
    --------
    >>> error = {"value": 0.025, "error": 0.008}
    >>> machines({"network": {"test_error": error}, "machines": []}).panels[0].data[0]["x"]
    [2.5]
    """
    rows = [("network", "network", results["network"]["test_error"])]
    shown = [(m, *shown_error(results, m)) for m in results["machines"]]
    rows += [(m["kernel"], m["label"] + " (ridge)" * (by == "ridge"), error) for m, error, by in shown]
    ridge = {m["kernel"] for m, _, by in shown if by == "ridge"}
    data = []
    for place, (kernel, label, error) in enumerate(rows):
        if error["value"] is None:
            continue
        dot = _dot(kernel, 100 * error["value"], draw.times(error["error"], 100), len(rows) - 1 - place, label)
        dot |= {"mode": "markers+text", "text": [percent(error, False)], "textposition": "top center"}
        data.append(dot | {"hovertemplate": f"{draw.safe(label)}<br>{percent(error)}<extra></extra>"})
        data[-1]["cliponaxis"] = False
    names = draw.rows_axis(
        [ROLES.get(kernel, (label,))[0] + " (ridge)" * (kernel in ridge) for kernel, label, _ in rows]
    )
    layout = draw.layout(draw.axis("test error, %", rangemode="tozero"), names, height=80 + 48 * len(rows))
    errors = "; ".join(f"{label} {percent(error)}" for _, label, error in rows)
    panels = [Panel("plot-machines", "", data, layout)]
    return Figure("machines", "Test error of the machines", f"Dot plot of test errors: {errors}.", panels, wide=True)


def invariances(results: dict[str, Any]) -> Figure:
    """Cosine of each transformation before and after training, as a slope, beside that of two different images."""
    told = results["invariances"]
    rows = [*told["rows"], *([told["different"]] if "different" in told else [])]
    tones = _tones([row["name"] for row in told["rows"]])
    panels, texts = [], []
    for form in FORMS if "different" in told else ["raw"]:
        data, ends = [], {}
        for row in rows:
            values = [(row if form == "raw" else row["centered"])[kernel] for kernel in ("init", "after")]
            if None not in (values[0]["value"], values[1]["value"]):
                data.append(_curve([0, 1], values, row["name"], tones))
                data[-1]["hovertemplate"] = f"{draw.safe(row['name'])}: %{{y:.3f}}<extra></extra>"
                ends[row["name"]] = values[1]["value"]
                texts.append(f"{form} {row['name']} {values[0]['value']:.2f} to {values[1]['value']:.2f}")
        panels.append(Panel(f"plot-slopes-{form}", FORMS[form], *_slopes(data, ends)))
    label = f"Slopes of mean cosines from before to after training: {', '.join(texts)}."
    return Figure("invariance", "Cosine between an image and its transform", label, panels, wide=True)


def _slopes(data: list[dict[str, Any]], ends: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines and layout of one panel of slopes, each line with its name at the right end."""
    values = [y for trace in data for y in trace["y"]] or [0.0, 1.0]
    span = max(max(values) - min(values), 0.05)
    places = _apart(list(ends.values()), 0.075 * span)
    names = {
        "type": "scatter", "mode": "text", "x": [1.07] * len(ends), "y": places, "hoverinfo": "skip",
        "text": [draw.safe(name) for name in ends], "textposition": "middle right", "cliponaxis": False,
        "textfont": {"color": "var(--soft)"},
    }  # fmt: skip
    low, high = min([*values, *places]), max([*values, *places])
    x = draw.axis("", range=[-0.15, 2.1], tickvals=[0, 1], ticktext=["before", "after"], fixedrange=True)
    y = draw.axis("mean cosine", range=[low - 0.08 * span, high + 0.08 * span])
    return [*data, names], draw.layout(x | {"showgrid": False}, y, height=320)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels, near the values in the same order, and at least `gap` apart.

    >>> [round(place, 2) for place in _apart([0.5, 0.1, 0.5], 0.2)]
    [0.4, 0.1, 0.6]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []  # of labels that touch, each centered on its values

    def low(group: list[int]) -> float:
        return sum(values[i] for i in group) / len(group) - gap * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and low(groups[-1]) < low(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = {i: low(group) + gap * rank for group in groups for rank, i in enumerate(group)}
    return [places[i] for i in range(len(values))]


def against_loss(results: dict[str, Any]) -> list[tuple[Figure, str]]:
    """Test errors and cosines against the training loss at some snapshots, each with its reading."""
    told = results.get("against_loss")
    if not told:
        return []
    snapshots = told["snapshots"]
    losses = [draw.positive(s["loss"]) for s in snapshots]
    machine, of = kernel_errors(told)
    roles = {machine: (of, *ROLES["after"][1:]), "network_error": ROLES["network"]}
    data = []
    for key, (name, color, symbol) in roles.items():
        values = [{part: draw.times(s[key][part], 100) for part in ("value", "error")} for s in snapshots]
        data.append(_curve(losses, values, name, {name: (color, symbol)}))
        data[-1]["hovertemplate"] = f"loss %{{x:.3g}}<br>{name}: %{{y:.2f}} %<extra></extra>"
    x = draw.log_axis("training loss", losses)
    panels = [Panel("plot-loss-errors", "", data, draw.layout(x, draw.axis("test error, %", rangemode="tozero")))]
    reading = against_loss_errors(told)
    figures = [
        (
            Figure("loss-errors", "Test error against training loss", reading, panels, [*roles.values()], wide=True),
            reading,
        )
    ]
    if snapshots[0]["cosines"]:
        tones = _tones([row["name"] for row in snapshots[0]["cosines"]])
        panels = []
        for form, heading in FORMS.items():
            data = [
                _curve(losses, [s["cosines"][i][form] for s in snapshots], name, tones) for i, name in enumerate(tones)
            ]
            data.append(_curve(losses, [s["different"][form] for s in snapshots], "two different images", tones))
            panels.append(Panel(f"plot-loss-cosines-{form}", heading, data, draw.layout(x, draw.axis("mean cosine"))))
        legend = [*((name, *look) for name, look in tones.items()), ("two different images", *_DIFFERENT)]
        reading = against_loss_cosines(told)
        title = "Cosines against training loss"
        figures.append((Figure("loss-cosines", title, reading, panels, legend, wide=True), reading))
    return figures


def _tones(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and symbol of each transformation, everywhere the same."""
    return {name: tone(i, len(names)) for i, name in enumerate(names)}


def _curve(
    x: Sequence[float | None], values: Sequence[dict[str, Any]], name: str, tones: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """Line with markers and standard errors; dashed and without markers where `tones` has no color for the name."""
    color, symbol = tones.get(name, _DIFFERENT)
    dashed = name not in tones
    trace = draw.line([], [], draw.safe(name), color, dash="dash" if dashed else "solid") | {
        "x": list(x), "y": [v["value"] for v in values], "mode": "lines" if dashed else "lines+markers",
        "customdata": list(x), "hovertemplate": f"loss %{{x:.3g}}<br>{draw.safe(name)}: %{{y:.3f}}<extra></extra>",
    }  # fmt: skip
    if not dashed:
        trace["marker"] = {"color": color, "symbol": symbol, "size": 7}
    if any(v["error"] is not None for v in values):
        errors = [v["error"] or 0.0 for v in values]
        trace["error_y"] = {"type": "data", "array": errors, "color": color, "thickness": 1.4, "width": 4}
    return trace


def _dot(role: str, x: float, error: float | None, y: float, name: str) -> dict[str, Any]:
    _, color, symbol = ROLES.get(role, ("", "var(--network)", "circle"))
    dot: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": draw.safe(name),
        "marker": {"color": color, "symbol": symbol, "size": 10},
    }  # fmt: skip
    if error is not None:
        dot["error_x"] = {"type": "data", "array": [error], "color": color, "thickness": 1.8, "width": 5}
    return dot
