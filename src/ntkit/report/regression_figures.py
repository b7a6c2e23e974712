"""The figures of a regression: R2 of each prediction, and predictions beside true values."""

from __future__ import annotations

from typing import Any

from ntkit.report import draw
from ntkit.report.draw import ROLES, Figure, Panel
from ntkit.report.regression_text import R2, interval, predictions, separate

_MOST = 3  # targets whose predictions are drawn


def machines(results: dict[str, Any]) -> Figure:
    """Test R2 of the network and of ridge regression on each kernel, with intervals."""
    rows = [("network", "network", results["network"]["test"]["r2"])]
    rows += [(m["kernel"], f"ridge, {m['label']}", m["test"]["r2"]) for m in results["machines"]]
    data = []
    for place, (role, label, entry) in enumerate(rows):
        if entry["value"] is None:
            continue
        _, color, symbol = ROLES[role]
        trace: dict[str, Any] = {
            "type": "scatter", "mode": "markers+text", "x": [entry["value"]], "y": [len(rows) - 1 - place],
            "name": draw.safe(label), "marker": {"color": color, "symbol": symbol, "size": 10},
            "text": [separate(entry, R2)[0]], "textposition": "top center", "cliponaxis": False,
            "hovertemplate": f"{draw.safe(label)}<br>{interval(entry, R2)}<extra></extra>",
        }  # fmt: skip
        if entry["low"] is not None:
            trace["error_x"] = {
                "type": "data", "symmetric": False, "array": [entry["high"] - entry["value"]],
                "arrayminus": [entry["value"] - entry["low"]], "color": color, "thickness": 1.8, "width": 5,
            }  # fmt: skip
        data.append(trace)
    names = draw.rows_axis([ROLES[role][0] for role, _, _ in rows])
    layout = draw.layout(draw.axis("test R²", nticks=8), names, height=80 + 48 * len(rows))
    texts = "; ".join(f"{label} {interval(entry, R2)}" for _, label, entry in rows)
    panels = [Panel("plot-machines", "", data, layout)]
    title = "Test R² of the network and of ridge regression"
    return Figure("machines", title, f"Dot plot of test R²: {texts}.", panels, wide=True)


def scatter(results: dict[str, Any]) -> Figure:
    """Predictions and residuals against true values, of the network and of ridge regression on the after kernel."""
    told = results["comparisons"]["scatter"]
    roles = [role for role in ("network", "after") if role in told["targets"][0]]
    panels = []
    for number, target in enumerate(told["targets"][:_MOST]):
        true = target["true"]
        ends = [min(true), max(true)]
        for what in ("predicted", "residual"):
            line = ends if what == "predicted" else [0.0, 0.0]
            data: list[dict[str, Any]] = [{
                "type": "scatter", "mode": "lines", "x": ends, "y": line, "hoverinfo": "skip",
                "line": {"color": "var(--faint)", "width": 1.4, "dash": "dash"},
            }]  # fmt: skip
            for role in roles:
                name, color, symbol = ROLES[role]
                pairs = zip(target[role], true, strict=True)
                values = [None if p is None else p - (t if what == "residual" else 0) for p, t in pairs]
                data.append({
                    "type": "scatter", "mode": "markers", "x": true, "y": values, "name": name, "opacity": 0.65,
                    "marker": {"color": color, "symbol": symbol, "size": 5}, "customdata": told["test_index"],
                    "hovertemplate": f"test %{{customdata}}<br>true %{{x:.4g}}<br>{what} %{{y:.4g}}<extra></extra>",
                })  # fmt: skip
            title = draw.safe(target["name"])
            x, y = draw.axis(f"true {title}", nticks=5), draw.axis("predicted" if what == "predicted" else "residual")
            heading = "Predicted against true" if what == "predicted" else "Residual (predicted − true)"
            heading += f": {target['name']}" if len(told["targets"]) > 1 else ""
            panels.append(Panel(f"plot-{what}-{number}", heading, data, draw.layout(x, y, height=320)))
    legend = [ROLES["network"], ("ridge on the after kernel", *ROLES["after"][1:])][: len(roles)]
    return Figure("predictions", "Predictions of test examples", predictions(results), panels, legend, wide=True)
