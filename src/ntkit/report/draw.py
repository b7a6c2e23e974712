"""How a figure is drawn: panels, axes and curves as plain plotly dictionaries, alike in every report.

Colors are written as ``var(--name)`` and resolved in the page from ``style.css``, so that light, dark and print share
one definition of every figure. A step axis is logarithmic, with step 0 drawn at 0.5.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ntkit.report.words import plain

RAMP = 6
"""Colors from light to dark, ``--ramp-1`` to ``--ramp-6`` of ``style.css``."""
DASHES = ("solid", "dash", "dot", "dashdot")
ROLES = {
    "network": ("network", "var(--network)", "x"),
    "init": ("initialization", "var(--init)", "circle"),
    "after": ("after kernel", "var(--after)", "diamond"),
    "conjugate": ("conjugate", "var(--conjugate)", "square"),
}
"""What is compared, everywhere with the same name, color and symbol."""
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Liberation Sans, sans-serif"
_MARKS = {"solid": "line", "dash": "dash"}


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

    `label` is the text alternative; `legend` holds (text, color, symbol) with a symbol of `style.css`.
    """

    id: str
    title: str
    label: str
    panels: list[Panel]
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    wide: bool = False


def line(
    steps: Sequence[int],
    values: Sequence[float | None],
    name: str,
    color: str,
    *,
    dash: str = "solid",
    width: float = 2.2,
    ends: bool = False,
) -> dict[str, Any]:
    """One curve against step; `ends` marks the first snapshot in the initial kernel's color."""
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "lines", "x": [place(s) for s in steps], "y": list(values), "name": name,
        "customdata": list(steps), "line": {"color": color, "width": width, "dash": dash},
        "hovertemplate": f"step %{{customdata}}<br>{name}: %{{y:.4g}}<extra></extra>",
    }  # fmt: skip
    if ends or len(steps) == 1:
        trace["mode"] = "lines+markers"
        trace["marker"] = {"color": ["var(--init)"] + [color] * (len(steps) - 1), "size": 6}
        trace["marker"]["symbol"] = ["circle"] + ["diamond"] * (len(steps) - 1)
    return trace


def layout(x: dict[str, Any], y: dict[str, Any], *, height: int = 300) -> dict[str, Any]:
    """Layout that all plots share, around two axes."""
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


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Linear axis, with plotly's own options on top."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12.5}},
        "gridcolor": "var(--grid)", "linecolor": "var(--line)",
        "zeroline": False, "showline": True, "ticks": "", "automargin": True, "fixedrange": False,
    } | more  # fmt: skip


def log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Logarithmic axis over the positive values: a tick at each power of ten, more of them within two decades."""
    finite = [v for v in values if v is not None and v > 0] or [1.0]
    low, high = _log10(min(finite)), _log10(max(finite))
    pad = 0.06 * (high - low) or 0.3
    decades = range(math.floor(low - pad), math.ceil(high + pad) + 1)
    parts = (1, 2, 5) if high - low < 2 else (1,)
    every = max(1, len(decades) // 6)

    def inside(parts: Sequence[float]) -> list[tuple[float, int]]:
        ticks = [(m, e) for e in decades for m in parts if e % every == 0]
        return [(m, e) for m, e in ticks if low - pad <= _log10(m * 10.0**e) <= high + pad]

    ticks = inside(parts)
    if len(ticks) < 3 and high - low < 1:
        ticks = inside((1, 1.5, 2, 3, 4, 5, 7))
    labels = {m * 10.0**e: _power(m, e) for m, e in ticks}
    if len(labels) < 3:  # too narrow for those
        labels = _even_ticks(10 ** (low - pad), 10 ** (high + pad))
    return axis(title, type="log", range=[low - pad, high + pad], tickvals=list(labels), ticktext=list(labels.values()))


def _even_ticks(low: float, high: float) -> dict[float, str]:
    """Round numbers with equal steps between two numbers, at least three, and their texts.

    >>> _even_ticks(107.0, 142.0)
    {110.0: '110', 120.0: '120', 130.0: '130', 140.0: '140'}
    """
    third = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(third))
    step = max(m * power for m in (1, 2, 5) if m * power <= third)
    digits = 2 + max(0, math.ceil(math.log10(high / step)))
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return {value: plain(value, digits) for value in values}


def _power(m: float, e: int) -> str:
    if -3 <= e <= 4:
        return f"{m * 10.0**e:.{max(0, -e + (m % 1 > 0))}f}"
    exponent = str(e).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{exponent}" if m == 1 else f"{m}·10{exponent}"


def heat(values: Any, colors: str, hover: str) -> dict[str, Any]:
    """A matrix as colors from light to dark ("ramp"), or on both sides of zero ("signed"); NaN is left empty.

    `hover` is what the hover text says of ``%{x}``, ``%{y}`` and ``%{z}``.
    """
    name, count = ("map", 5) if colors == "signed" else ("ramp", RAMP)
    tones = [f"var(--{name}-{i + 1})" for i in range(count)]
    rows = [[None if v != v else float(f"{v:.5g}") for v in row] for row in values]
    largest = max((abs(v) for row in rows for v in row if v is not None), default=0.0) or 1.0
    trace: dict[str, Any] = {
        "type": "heatmap", "z": rows, "showscale": True, "hovertemplate": f"{hover}<extra></extra>",
        "colorscale": [[i / (len(tones) - 1), color] for i, color in enumerate(tones)],
        "colorbar": {"thickness": 9, "len": 0.9, "outlinewidth": 0, "tickfont": {"size": 11}, "nticks": 5},
    }  # fmt: skip
    return trace | ({"zmin": -largest, "zmax": largest} if colors == "signed" else {})


def rows_axis(names: Sequence[str]) -> dict[str, Any]:
    """Names from top to bottom, one per unit."""
    places, texts = list(range(len(names) - 1, -1, -1)), [safe(name) for name in names]
    return axis("", range=[-0.6, len(names) - 0.35], tickvals=places, ticktext=texts, showgrid=False, fixedrange=True)


def step_axis(last: int) -> dict[str, Any]:
    """Logarithmic steps with step 0 drawn at 0.5."""
    ticks = [10**decade for decade in range(9) if 10**decade <= max(1, last)]
    if len(ticks) <= 2:
        ticks = [step for step in (1, 2, 5, 10, 20, 50) if step <= max(1, last)]
    texts = [f"{t // 1000}k" if 1000 <= t < 10**6 else f"{t // 10**6}M" if t >= 10**6 else str(t) for t in ticks]
    top = _log10(max(2, last) * 1.25)
    return axis("step", type="log", tickvals=[0.5, *ticks], ticktext=["0", *texts], range=[_log10(0.4), top])


def _log10(value: float) -> float:
    return round(math.log10(value), 6)


def place(step: int) -> float:
    """Where a step lies on its logarithmic axis."""
    return 0.5 if step == 0 else step


def positive(value: float | None) -> float | None:
    """A value that a logarithmic axis can show, or None."""
    return value if value is not None and value > 0 else None


def times(value: float | None, factor: float) -> float | None:
    """A product, None where there is no value."""
    return None if value is None else value * factor


def ramp(i: int, count: int) -> str:
    """Color of the i-th of `count` curves that have an order."""
    place = i % RAMP if count > RAMP else round(i * (RAMP - 1) / max(1, count - 1))
    return f"var(--ramp-{place + 1})"


def safe(text: str) -> str:
    """Escape a user's text: plotly interprets some tags."""
    return html.escape(str(text), quote=False)


def against_index(values: Sequence[float | None], name: str, color: str, symbol: str, hover: str) -> dict[str, Any]:
    """Markers and line of values numbered from 1; `hover` is what their hover text says of ``%{x}`` and ``%{y}``."""
    index = list(range(1, len(values) + 1))
    return line([], [], name, color) | {
        "x": index, "y": list(values), "mode": "lines+markers", "customdata": index,
        "marker": {"symbol": symbol, "size": 7, "color": color}, "hovertemplate": f"{hover}<extra></extra>",
    }  # fmt: skip


def index_axis(title: str, count: int) -> dict[str, Any]:
    """Logarithmic axis of the numbers 1 to `count`."""
    ticks = [i for i in (1, 2, 5, 10, 20, 50, 100, 200, 500) if i <= count]
    return axis(title, type="log", tickvals=ticks, ticktext=[str(i) for i in ticks])


def family(
    steps: Sequence[int], rows: Sequence[tuple[str, Sequence[float | None]]], *, width: float = 2.2
) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]]]:
    """Curves of ordered things (name, values), with the ramp's colors, then with dashes; and their legend."""
    data, legend = [], []
    for i, (name, values) in enumerate(rows):
        color, dash = ramp(i, len(rows)), DASHES[i // RAMP % len(DASHES)]
        data.append(line(steps, values, safe(name), color, dash=dash, width=width))
        legend.append((name, color, _MARKS.get(dash, "dot")))
    return data, legend


def filled(figures: Sequence[tuple[Figure, str]]) -> list[tuple[Figure, str]]:
    """The same figures for rows of two: one is made wide where half of its row would be empty."""
    result, alone = [], False  # whether the last figure has a row of two to itself so far
    for figure, reading in figures:
        if figure.wide and alone:
            result[-1] = replace(result[-1][0], wide=True), result[-1][1]
        alone = not figure.wide and not alone
        result.append((figure, reading))
    if alone:
        result[-1] = replace(result[-1][0], wide=True), result[-1][1]
    return result
