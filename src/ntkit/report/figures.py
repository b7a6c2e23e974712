"""The report's figures as plain plotly dictionaries: pure functions of the results.

Colours are written as ``var(--name)`` and resolved in the page from ``style.css``, so that light, dark and print share
one definition of every figure.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ntkit.report.readings import DISRUPTIVE, percent, plain

ROLES = {
    "network": ("network", "var(--network)", "x"),
    "init": ("initialisation", "var(--init)", "circle"),
    "after": ("after kernel", "var(--after)", "diamond"),
    "conjugate": ("conjugate", "var(--conjugate)", "square"),
}
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, sans-serif"
_RAMP = 6  # --ramp-1 .. --ramp-6 in style.css
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Panel:
    """One plot: its id in the page, a heading (or ""), and what plotly draws."""

    id: str
    heading: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A titled group of plots with one legend.

    `label` is the text alternative; `legend` holds (text, colour, symbol) with a symbol of `style.css`.
    """

    id: str
    title: str
    label: str
    panels: list[Panel]
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    wide: bool = False


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
        dot = _dot(kernel, 100 * error["value"], _times(error["error"], 100), len(rows) - 1 - place, label)
        dot |= {"mode": "markers+text", "text": [percent(error, False)], "textposition": "top center"}
        dot["hovertemplate"] = f"{_safe(label)}<br>{percent(error)}<extra></extra>"
        dot["cliponaxis"] = False
        data.append(dot)
    layout = _layout(
        _axis("test error, %", rangemode="tozero"),
        _rows_axis([ROLES.get(kernel, (label,))[0] for kernel, label, _ in rows]),
        height=80 + 48 * len(rows),
    )
    told = "; ".join(f"{label} {percent(error)}" for _, label, error in rows)
    return Figure("machines", "Test error of the machines", f"Dot plot of test errors: {told}.", [
        Panel("plot-machines", "", data, layout)
    ], wide=True)  # fmt: skip


def invariances(results: dict[str, Any]) -> Figure:
    """Cosine between an image and its transform, per kernel and transformation."""
    rows = results["invariances"]["rows"]
    groups = [
        ("gentle", "Small changes (higher: more invariant)", [r for r in rows if r["name"] not in DISRUPTIVE]),
        ("broken", "Broken layout (lower: more global)", [r for r in rows if r["name"] in DISRUPTIVE]),
    ]
    groups = [group for group in groups if group[2]]
    panels, told = [], []
    keys = (("init", "before"), ("after", "after"), ("conjugate", "conjugate"))
    for name, heading, members in groups:
        data = []
        for place, row in enumerate(members):
            for rank, (role, key) in enumerate(keys):
                value = row[key]["value"]
                if value is None:
                    continue
                height = len(members) - 1 - place + 0.22 * (1 - rank)
                dot = _dot(role, value, row[key]["error"], height, row["name"])
                spread = "" if row[key]["error"] is None else f" ± {row[key]['error']:.3f}"
                dot["hovertemplate"] = f"{_safe(row['name'])}, {ROLES[role][0]}<br>{value:.3f}{spread}<extra></extra>"
                data.append(dot)
                told.append(f"{row['name']} {ROLES[role][0]} {value:.2f}")
        layout = _layout(_axis("cosine"), _rows_axis([r["name"] for r in members]), height=80 + 68 * len(members))
        panels.append(Panel(f"plot-invariance-{name}", heading, data, layout))
    label = f"Dot plots of mean cosines between image and transformed image: {', '.join(told)}."
    return Figure("invariance", "Similarity of an image to its own transform", label, panels, _legend(
        "init", "after", "conjugate"
    ), wide=True)  # fmt: skip


def along(results: dict[str, Any]) -> list[Figure]:
    """All figures of the kernel along training; the first snapshot is drawn in the initial kernel's colour."""
    a = results["along"]
    return [_losses(results), _eigenvalues(a), _alignment(a), _distance(a), _energies(a), _size(a), _spectra(a)]


def _losses(results: dict[str, Any]) -> Figure:
    a, training = results["along"], results["training"]
    data = []
    if training is not None:
        # entry s is the loss before step s: at the parameters of snapshot s, like the other curve
        steps = list(range(len(training["losses"])))
        data.append(_line(steps, training["losses"], "minibatch", "var(--faint)", width=1.2))
    data.append(_line(a["steps"], a["losses"], f"{a['points']} points", "var(--after)", ends=True))
    last = max([*a["steps"], len(training["losses"]) if training else 0])
    seen = a["losses"] + (training["losses"] if training else [])
    layout = _layout(_step_axis(last), _log_axis("loss", seen))
    legend = [
        ("each step's own batch", "var(--faint)", "line"),
        (f"all {a['points']} followed points", "var(--after)", "line"),
    ]
    label = f"Loss against step, from {_told(a['losses'][0])} to {_told(a['losses'][-1])}."
    return Figure("loss", "Loss", label, [Panel("plot-loss", "", data, layout)], legend if training else legend[1:])


def _eigenvalues(a: dict[str, Any]) -> Figure:
    count = len(a["eigenvalues"][0])
    data = []
    for i in reversed(range(count)):
        values = [row[i] for row in a["eigenvalues"]]
        trace = _line(a["steps"], values, f"λ<sub>{i + 1}</sub>", "var(--after)", width=1.1, ends=i == 0)
        trace["opacity"] = max(0.25, 0.8 - 0.6 * i / max(1, count - 1)) if i else 1.0
        trace["line"]["width"] = 1.1 if i else 2.6
        data.append(trace)
    legend = [("largest, λ₁", "var(--after)", "line"), (f"the next {count - 1}", "var(--after)", "thin")]
    label = f"Largest {count} eigenvalues against step; the first goes from {_told(a['eigenvalues'][0][0])} to "
    label += f"{_told(a['eigenvalues'][-1][0])}"
    if a["lr"] and a["stable_lr"]:
        bound = 2 * a["points"] / a["lr"]
        ends = [_place(a["steps"][0]), _place(a["steps"][-1])]
        data.append({
            "type": "scatter", "mode": "lines", "x": ends, "y": [bound, bound], "name": "2n / learning rate",
            "line": {"color": "var(--network)", "width": 1.6, "dash": "dash"},
            "hovertemplate": f"2n / learning rate = {bound:.4g}<extra></extra>",
        })  # fmt: skip
        legend.append((f"2n / learning rate = {plain(bound)}", "var(--network)", "dash"))
        label += f"; the bound 2n over learning rate is {plain(bound)}"
    seen = [v for trace in data for v in trace["y"]]
    layout = _layout(_step_axis(a["steps"][-1]), _log_axis("eigenvalue", seen))
    return Figure("eigenvalues", "Largest eigenvalues", label + ".", [
        Panel("plot-eigenvalues", "", data, layout)
    ], legend)  # fmt: skip


def _alignment(a: dict[str, Any]) -> Figure:
    data = [
        _line(a["steps"], a["alignment_centered"], "centred", "var(--after)", ends=True),
        _line(a["steps"], a["alignment"], "not centred", "var(--after)", dash="dot", width=1.6),
    ]
    layout = _layout(_step_axis(a["steps"][-1]), _axis("alignment", range=[-0.02, 1.02]))
    label = f"Alignment with the targets against step; centred, from {_told(a['alignment_centered'][0])} to "
    label += f"{_told(a['alignment_centered'][-1])}."
    return Figure("alignment", "Alignment with the targets", label, [Panel("plot-alignment", "", data, layout)], [
        ("centred", "var(--after)", "line"), ("not centred", "var(--after)", "dot")
    ])  # fmt: skip


def _distance(a: dict[str, Any]) -> Figure:
    data = [_line(a["steps"], a["distance_to_init"], "1 − cosine", "var(--after)", ends=True)]
    layout = _layout(_step_axis(a["steps"][-1]), _axis("1 − cosine", rangemode="tozero"))
    label = f"Distance of the kernel to the initial one against step, ending at {_told(a['distance_to_init'][-1])}."
    return Figure("distance", "Distance to the initial kernel", label, [Panel("plot-distance", "", data, layout)])


def _energies(a: dict[str, Any]) -> Figure:
    ks, panels, legend = a["energy_ks"], [], []
    for name, heading in (
        ("targets", "of the targets"),
        ("outputs", "of the outputs"),
        ("residual", "of the residual"),
    ):
        data = []
        for i, k in enumerate(ks):
            values = [row[i] for row in a[f"energy_{name}"]]
            data.append(_line(a["steps"], values, f"top {k}", _ramp(i, len(ks)), dash=_DASHES[i // _RAMP % 4]))
        layout = _layout(_step_axis(a["steps"][-1]), _axis("", range=[-0.02, 1.02]), height=260)
        layout["margin"] |= {"l": 34, "r": 8}
        panels.append(Panel(f"plot-energy-{name}", heading, data, layout))
    for i, k in enumerate(ks):
        legend.append((f"top {k}", _ramp(i, len(ks)), "line"))
    pairs = ", ".join(
        f"{name} {_told(a[f'energy_{name}'][0][-1])} to {_told(a[f'energy_{name}'][-1][-1])}"
        for name in ("targets", "outputs", "residual")
    )
    label = f"Share of energy in the top {ks[-1]} eigenvectors from first to last step: {pairs}."
    return Figure("energy", "Energy in the top eigenvectors", label, panels, legend, wide=True)


def _size(a: dict[str, Any]) -> Figure:
    panels = []
    for name, heading in (("trace", "trace"), ("effective_rank", "effective rank")):
        data = [_line(a["steps"], a[name], heading, "var(--after)", ends=True)]
        layout = _layout(_step_axis(a["steps"][-1]), _axis("", rangemode="tozero"), height=260)
        panels.append(Panel(f"plot-{name.replace('_', '-')}", heading, data, layout))
    label = f"Trace, from {_told(a['trace'][0])} to {_told(a['trace'][-1])}, and effective rank, from "
    label += f"{_told(a['effective_rank'][0])} to {_told(a['effective_rank'][-1])}, against step."
    return Figure("size", "Trace and effective rank", label, panels)


def _spectra(a: dict[str, Any]) -> Figure:
    data = []
    for row, role, when in ((0, "init", "first"), (-1, "after", "last")):
        whole = a["trace"][row]
        shares = [_times(value, 100 / whole) if whole else None for value in a["eigenvalues"][row]]
        trace = _line([], [], f"step {a['steps'][row]}", ROLES[role][1], dash="solid")
        trace |= {"x": list(range(1, len(shares) + 1)), "y": [_positive(v) for v in shares], "mode": "lines+markers"}
        trace["marker"] = {"symbol": ROLES[role][2], "size": 7, "color": ROLES[role][1]}
        trace["customdata"] = trace["x"]
        trace["hovertemplate"] = f"eigenvalue %{{x}}, {when} step: %{{y:.3g}} %<extra></extra>"
        data.append(trace)
    ticks = [i for i in (1, 2, 5, 10, 20, 50, 100, 200, 500) if i <= len(a["eigenvalues"][0])]
    x = _axis("index", type="log", tickvals=ticks, ticktext=[str(i) for i in ticks])
    seen = [v for trace in data for v in trace["y"]]
    layout = _layout(x, _log_axis("% of the trace", seen), height=286)
    shown = [trace["y"][0] for trace in data]
    label = f"Spectrum at the first and last step; the first eigenvalue holds {_told(shown[0])} and {_told(shown[1])} "
    label += "percent of the trace."
    legend = [("first step", "var(--init)", "circle"), ("last step", "var(--after)", "diamond")]
    return Figure(
        "spectrum", "Spectrum at the start and the end", label, [Panel("plot-spectrum", "", data, layout)], legend
    )


def _dot(role: str, x: float, error: float | None, y: float, name: str) -> dict[str, Any]:
    _, colour, symbol = ROLES.get(role, ("", "var(--network)", "circle"))
    dot: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": _safe(name),
        "marker": {"color": colour, "symbol": symbol, "size": 10},
    }  # fmt: skip
    if error is not None:
        dot["error_x"] = {"type": "data", "array": [error], "color": colour, "thickness": 1.8, "width": 5}
    return dot


def _line(
    steps: Sequence[int],
    values: Sequence[float | None],
    name: str,
    colour: str,
    *,
    dash: str = "solid",
    width: float = 2.2,
    ends: bool = False,
) -> dict[str, Any]:
    """One curve against step; `ends` marks the first snapshot in the initial kernel's colour."""
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "lines", "x": [_place(s) for s in steps], "y": list(values), "name": name,
        "customdata": list(steps), "line": {"color": colour, "width": width, "dash": dash},
        "hovertemplate": f"step %{{customdata}}<br>{name}: %{{y:.4g}}<extra></extra>",
    }  # fmt: skip
    if ends or len(steps) == 1:
        trace["mode"] = "lines+markers"
        trace["marker"] = {"color": ["var(--init)"] + [colour] * (len(steps) - 1), "size": 6}
        trace["marker"]["symbol"] = ["circle"] + ["diamond"] * (len(steps) - 1)
    return trace


def _layout(x: dict[str, Any], y: dict[str, Any], *, height: int = 300) -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    return {
        "height": height, "autosize": True, "showlegend": False, "hovermode": "closest", "uirevision": "keep",
        "paper_bgcolor": clear, "plot_bgcolor": clear, "margin": {"l": 54, "r": 14, "t": 12, "b": 46},
        "font": {"family": _FONT, "size": 12.5, "color": "var(--soft)"},
        "hoverlabel": {
            "bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)", "size": 12.5}
        },
        "xaxis": x, "yaxis": y,
    }  # fmt: skip


def _axis(title: str, **more: Any) -> dict[str, Any]:
    axis = {
        "title": {"text": title, "standoff": 8, "font": {"size": 12.5}},
        "gridcolor": "var(--grid)", "linecolor": "var(--line)",
        "zeroline": False, "showline": True, "ticks": "", "automargin": True, "fixedrange": False,
    }  # fmt: skip
    return axis | more


def _log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Logarithmic axis over the positive values, with a tick at each power of ten (or 1, 2, 5 within two decades)."""
    known = [v for v in values if v is not None and v > 0] or [1.0]
    low, high = _log10(min(known)), _log10(max(known))
    pad = 0.06 * (high - low) or 0.3
    decades = range(math.floor(low - pad), math.ceil(high + pad) + 1)
    parts = (1, 2, 5) if high - low < 2 else (1,)
    every = max(1, len(decades) // 6)
    ticks = [(m, e) for e in decades for m in parts if e % every == 0]
    ticks = [(m, e) for m, e in ticks if low - pad <= _log10(m * 10.0**e) <= high + pad]
    return _axis(
        title,
        type="log",
        range=[low - pad, high + pad],
        tickvals=[m * 10.0**e for m, e in ticks],
        ticktext=[_power(m, e) for m, e in ticks],
    )


def _power(m: int, e: int) -> str:
    if -3 <= e <= 4:
        return f"{m * 10.0**e:.{max(0, -e)}f}"
    exponent = str(e).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{exponent}" if m == 1 else f"{m}·10{exponent}"


def _rows_axis(names: Sequence[str]) -> dict[str, Any]:
    """Names from top to bottom, one per unit."""
    count = len(names)
    places = list(range(count - 1, -1, -1))
    return _axis(
        "",
        range=[-0.6, count - 0.35],
        tickvals=places,
        ticktext=[_safe(n) for n in names],
        showgrid=False,
        fixedrange=True,
    )


def _step_axis(last: int) -> dict[str, Any]:
    """Logarithmic steps with step 0 drawn at 0.5."""
    ticks = [step for decade in range(9) for step in (10**decade,) if step <= max(1, last)]
    if len(ticks) <= 2:
        ticks = [step for step in (1, 2, 5, 10, 20, 50) if step <= max(1, last)]
    texts = [f"{t // 1000}k" if 1000 <= t < 10**6 else f"{t // 10**6}M" if t >= 10**6 else str(t) for t in ticks]
    top = _log10(max(2, last) * 1.25)
    return _axis("step", type="log", tickvals=[0.5, *ticks], ticktext=["0", *texts], range=[_log10(0.4), top])


def _log10(value: float) -> float:
    return round(math.log10(value), 6)


def _place(step: int) -> float:
    return 0.5 if step == 0 else step


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _ramp(i: int, count: int) -> str:
    place = i % _RAMP if count > _RAMP else round(i * (_RAMP - 1) / max(1, count - 1))
    return f"var(--ramp-{place + 1})"


def _legend(*roles: str) -> list[tuple[str, str, str]]:
    return [(ROLES[role][0], ROLES[role][1], ROLES[role][2]) for role in roles]


def _safe(text: str) -> str:
    """Escape user words, for plotly reads a few tags in texts."""
    return html.escape(str(text), quote=False)


def _told(value: float | None) -> str:
    return "undefined" if value is None else plain(value)
