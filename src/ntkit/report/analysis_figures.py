"""The figures of `analyze` that are not along training: pure functions of its results."""

from __future__ import annotations

from typing import Any

from ntkit.report import draw
from ntkit.report.analysis_text import DISRUPTIVE
from ntkit.report.draw import ROLES, Figure, Panel
from ntkit.report.words import percent


def machines(results: dict[str, Any]) -> Figure:
    """Test error of the network and of the SVM on each kernel, with standard errors.

    Examples
    --------
    >>> error = {"value": 0.025, "error": 0.008}
    >>> machines({"network": {"test_error": error}, "machines": []}).panels[0].data[0]["x"]
    [2.5]
    """
    rows = [("network", "network", results["network"]["test_error"])]
    rows += [(m["kernel"], m["label"], m["test_error"]) for m in results["machines"]]
    data = []
    for place, (kernel, label, error) in enumerate(rows):
        if error["value"] is None:
            continue
        dot = _dot(kernel, 100 * error["value"], draw.times(error["error"], 100), len(rows) - 1 - place, label)
        dot |= {"mode": "markers+text", "text": [percent(error, False)], "textposition": "top center"}
        data.append(dot | {"hovertemplate": f"{draw.safe(label)}<br>{percent(error)}<extra></extra>"})
        data[-1]["cliponaxis"] = False
    names = draw.rows_axis([ROLES.get(kernel, (label,))[0] for kernel, label, _ in rows])
    layout = draw.layout(draw.axis("test error, %", rangemode="tozero"), names, height=80 + 48 * len(rows))
    errors = "; ".join(f"{label} {percent(error)}" for _, label, error in rows)
    panels = [Panel("plot-machines", "", data, layout)]
    return Figure("machines", "Test error of the machines", f"Dot plot of test errors: {errors}.", panels, wide=True)


def invariances(results: dict[str, Any]) -> Figure:
    """Cosine between an image and its transform, per kernel and transformation."""
    rows, kernels = results["invariances"]["rows"], ("init", "after", "conjugate")
    panels, texts = [], []
    for name, heading, disruptive in (
        ("gentle", "Small changes (higher: more invariant)", False),
        ("broken", "Broken layout (lower: more global)", True),
    ):
        members = [row for row in rows if (row["name"] in DISRUPTIVE) == disruptive]
        data = []
        for place, row in enumerate(members):
            for rank, kernel in enumerate(kernels):
                value, error = row[kernel]["value"], row[kernel]["error"]
                if value is None:
                    continue
                dot = _dot(kernel, value, error, len(members) - 1 - place + 0.22 * (1 - rank), row["name"])
                spread = "" if error is None else f" ± {error:.3f}"
                hover = f"{draw.safe(row['name'])}, {ROLES[kernel][0]}<br>{value:.3f}{spread}<extra></extra>"
                data.append(dot | {"hovertemplate": hover})
                texts.append(f"{row['name']} {ROLES[kernel][0]} {value:.2f}")
        if members:
            names = draw.rows_axis([row["name"] for row in members])
            layout = draw.layout(draw.axis("cosine"), names, height=80 + 68 * len(members))
            panels.append(Panel(f"plot-invariance-{name}", heading, data, layout))
    label = f"Dot plots of mean cosines between image and transformed image: {', '.join(texts)}."
    legend = [ROLES[kernel] for kernel in kernels]
    return Figure("invariance", "Similarity of an image to its own transform", label, panels, legend, wide=True)


def _dot(role: str, x: float, error: float | None, y: float, name: str) -> dict[str, Any]:
    _, color, symbol = ROLES.get(role, ("", "var(--network)", "circle"))
    dot: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": draw.safe(name),
        "marker": {"color": color, "symbol": symbol, "size": 10},
    }  # fmt: skip
    if error is not None:
        dot["error_x"] = {"type": "data", "array": [error], "color": color, "thickness": 1.8, "width": 5}
    return dot
