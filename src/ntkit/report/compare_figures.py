"""The figures of `ntkit compare`: pure functions of its results, each with its reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ntkit.report import draw
from ntkit.report.compare_text import measures, shown, unit, with_interval
from ntkit.report.draw import Figure, Panel
from ntkit.report.study_curves import tone
from ntkit.report.words import plain

FigureAndReading = tuple[Figure, str]
Results = dict[str, Any]

_WHEN = {"init": "before training", "after": "after training"}
_NAMED = 26  # characters of a name on an axis
_WRITTEN = 8  # runs up to which cosines are written into a matrix


def tones(r: Results) -> list[tuple[str, str]]:
    """Color and symbol of each group."""
    return [tone(i, len(r["groups"])) for i in range(len(r["groups"]))]


def legend(r: Results) -> list[tuple[str, str, str]]:
    """Legend of the groups by symbols."""
    return [(group["label"], *tones(r)[i]) for i, group in enumerate(r["groups"])]


def _lines(r: Results) -> list[tuple[str, str, str]]:
    """Legend of the groups by lines."""
    return [(group["label"], tones(r)[i][0], "line") for i, group in enumerate(r["groups"])]


def short(name: str) -> str:
    """A name as an axis has room for.

    >>> short("a" * 40)
    'aaaaaaaaaaaaaaaaaaaaaaaaa…'
    """
    return name if len(name) <= _NAMED else f"{name[: _NAMED - 1]}…"


def errors(r: Results) -> FigureAndReading:
    """Each error: a point per run, and per group the mean over seeds with its interval."""
    panels, texts = [], []
    scale = 1.0 if r["data"]["regression"] else 100.0
    for key, name in measures(r).items():
        data: list[dict[str, Any]] = []
        for i, group in enumerate(r["groups"]):
            color, symbol = tones(r)[i]
            y = len(r["groups"]) - 1 - i
            values = [(r["runs"][k]["name"], r["runs"][k]["errors"][key]) for k in group["runs"]]
            known = [(n, v) for n, v in values if v is not None]
            data.append({
                "type": "scatter", "mode": "markers", "x": [scale * v for _, v in known], "y": [y - 0.16] * len(known),
                "customdata": [draw.safe(n) for n, _ in known], "name": draw.safe(group["label"]),
                "marker": {"color": color, "symbol": symbol, "size": 7, "opacity": 0.6},
                "hovertemplate": "%{customdata}: %{x:.4g}<extra></extra>", "cliponaxis": False,
            })  # fmt: skip
            found = group["errors"][key]
            if found is not None and found["mean"] is not None:  # of a network that diverged there may be none
                data.append(_mean(r, found, scale, y + 0.12, (color, symbol), group["label"]))
        names = draw.rows_axis([short(group["label"]) for group in r["groups"]])
        x = draw.axis(unit(r), rangemode="tozero")
        panels.append(
            Panel(f"plot-errors-{key}", name, data, draw.layout(x, names, height=100 + 46 * len(r["groups"])))
        )
        told = [f"{group['label']} {with_interval(r, group['errors'][key])}" for group in r["groups"]]
        texts.append(f"{name}: {', '.join(told)}")
    reading = (
        "Small symbols are runs; the large symbol above them is the mean over seeds, with Student’s interval (95 %) "
        "where two seeds or more differ."
    )
    label = f"Dot plots of errors. {'; '.join(texts)}."
    return Figure("errors", "Errors on the same test examples", label, panels, legend(r), wide=True), reading


def _mean(
    r: Results, found: dict[str, Any], scale: float, y: float, look: tuple[str, str], label: str
) -> dict[str, Any]:
    """The mean of a group with its interval."""
    color, symbol = look
    dot: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "x": [scale * found["mean"]], "y": [y], "name": draw.safe(label),
        "marker": {"color": color, "symbol": symbol, "size": 12}, "cliponaxis": False,
        "hovertemplate": f"{draw.safe(label)}, mean of {found['n']}: {with_interval(r, found)}<extra></extra>",
    }  # fmt: skip
    if found["low"] is not None:
        half = scale * (found["high"] - found["mean"])
        dot["error_x"] = {"type": "data", "array": [half], "color": color, "thickness": 1.8, "width": 5}
    return dot


def kernels(r: Results) -> FigureAndReading | None:
    """Centered cosines of the kernels of each two runs, before and after training; runs by their numbers."""
    panels = []
    numbers = [str(k + 1) for k in range(len(r["runs"]))]
    names = [draw.safe(run["name"]) for run in r["runs"]]
    known = [v for key in _WHEN for row in r["kernels"][key] for v in row if v is not None]
    if not known:
        return None
    for key, when in _WHEN.items():
        values = r["kernels"][key]
        if not any(v is not None for row in values for v in row):
            continue  # plotly fails on a matrix without any number
        cells = [[float("nan") if v is None else v for v in row] for row in values]
        heat = draw.heat(cells, "ramp", "%{customdata}<br>cosine %{z:.3f}")
        heat |= {"zmin": min([0.99, *known]), "zmax": 1.0, "x": numbers, "y": numbers}
        heat["customdata"] = [[f"{a}<br>{b}" for b in names] for a in names]
        if len(names) <= _WRITTEN:
            heat |= {"text": [["" if v is None else f"{v:.2f}" for v in row] for row in values]}
            heat |= {"texttemplate": "%{text}", "textfont": {"size": 11}}
        axes = [draw.axis("run", showgrid=False, type="category", constrain="domain") for _ in range(2)]
        axes[1] |= {"scaleanchor": "x", "autorange": "reversed"}
        layout = draw.layout(*axes, height=340)
        layout["margin"] |= {"l": 40, "r": 8}
        panels.append(Panel(f"plot-kernels-{key}", when, [heat], layout))
    reading = (
        f"Centered cosine between the tangent kernels of two runs on the same {r['kernels']['points']} test examples; "
        "1: the same kernel up to scale and a constant. Both matrices have one scale of colors."
    )
    runs = [(f"{number} {run['name']}", *tones(r)[run["group"]])
            for number, run in zip(numbers, r["runs"], strict=True)]  # fmt: skip
    label = f"Matrices of cosines. {reading}"
    return Figure("kernels", "Kernels of two runs", label, panels, runs, wide=True), reading


def spectra(r: Results) -> FigureAndReading | None:
    """Eigenvalues of each run's kernels on its training set, as shares of the trace."""
    panels = []
    for key, when in _WHEN.items():
        data = []
        for run in r["runs"]:
            if (found := run["spectrum"][key]) is None:
                continue
            shares = [100 * v for v in found["share"]]
            color = tones(r)[run["group"]][0]
            name = draw.safe(run["name"])
            trace = draw.line([], [], name, color, width=1.6)
            trace |= {"x": found["index"], "y": shares, "customdata": found["index"]}
            data.append(trace | {"hovertemplate": f"{name}<br>eigenvalue %{{x}}: %{{y:.3g}} %<extra></extra>"})
        if data:
            y = draw.log_axis("% of the trace", [v for trace in data for v in trace["y"]])
            most = max(x for trace in data for x in trace["x"])
            layout = draw.layout(draw.index_axis("index", most), y, height=320)
            panels.append(Panel(f"plot-spectra-{key}", when, data, layout))
    if not panels:
        return None
    reading = "Eigenvalues of each run’s kernel on its training set, none below rounding; one curve per run."
    if r["kernels"]["same_start"]["pairs"]:
        reading += " Before training, the curves of runs from the same start lie on one another."
    label = f"Curves of eigenvalues against index. {reading}"
    return Figure("spectra", "Spectra", label, panels, _lines(r), wide=True), reading


_CURVES = (
    ("loss", "Training loss", "loss", True),
    ("distance", "Distance of the kernel from its start", "1 − cosine", False),
    ("alignment_centered", "Alignment with the targets", "centered alignment", False),
)


def along(r: Results) -> list[FigureAndReading]:
    """Curves along training, one per run, those that were recorded."""
    figures = []
    for key, title, name, logarithmic in _CURVES:
        data, ends = [], []
        for run in r["runs"]:
            curve = run["along"]
            if curve is None or not any(v is not None for v in curve.get(key, [])):
                continue
            color = tones(r)[run["group"]][0]
            values: Sequence[float | None] = curve[key]
            data.append(draw.line(curve["steps"], [draw.positive(v) if logarithmic else v for v in values],
                                  draw.safe(run["name"]), color, width=1.8))  # fmt: skip
            ends.append((run["group"], values[-1], curve["steps"][-1]))
        if not data:
            continue
        numbers = [v for trace in data for v in trace["y"]]
        y = draw.log_axis(name, numbers) if logarithmic else draw.axis(name)
        layout = draw.layout(draw.step_axis(max(end for *_, end in ends)), y)
        told = []
        for i, group in enumerate(r["groups"]):
            last = [v for g, v, _ in ends if g == i and v is not None]
            if last:
                low, high = plain(min(last), 2), plain(max(last), 2)
                told.append(f"{group['label']} {low}" + ("" if low == high else f" to {high}"))
        reading = f"At the end: {'; '.join(told)}." if told else "No run has a value at its end."
        panel = Panel(f"plot-along-{key}", "", data, layout)
        figures.append((Figure(f"along-{key}", title, f"{title} against step. {reading}", [panel], _lines(r)), reading))
    return draw.filled(figures)


def table_of_groups(r: Results, tests: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the tests over seeds: first, second, of what, difference, interval, p values."""
    rows: list[tuple[str, ...]] = []
    for test in tests:
        first, second = (r["groups"][test[side]]["label"] for side in ("first", "second"))
        interval = "–" if test["low"] is None else f"{shown(r, test['low'])} to {shown(r, test['high'])}"
        p = "–" if test["p"] is None else f"{plain(test['p'], 2)}, {plain(test['p_holm'], 2)}"
        rows.append((first, second, measures(r)[test["of"]], shown(r, test["difference"], True), interval, p))
    return rows
