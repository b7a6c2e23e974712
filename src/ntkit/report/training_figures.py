"""The figures along training, each with its reading: pure functions of the series of a tracking, in every report.

The series bear the names of `ntkit.track`: ``steps``, ``loss``, ``eigenvalues``, ``energy_target`` and so on, each with
one entry per snapshot. ``points`` is the number of points followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ntkit.report import draw
from ntkit.report.draw import Figure, Panel
from ntkit.report.judgments import CHANGED, ends_of, moved
from ntkit.report.words import change, listed, middle, percent, plain, share

Series = Mapping[str, Any]
Values = Sequence[float | None]
FigureAndReading = tuple[Figure, str]

ENERGIES = (("target", "targets"), ("output", "outputs"), ("residual", "residual"))
_LEGEND = 12  # names that a legend can hold
_SHARE = 0.9
_SCALES = {"zero": {"rangemode": "tozero", "exponentformat": "power"}, "unit": {"range": [-0.02, 1.02]}, "fit": {}}
_ENDS = ((0, "init", "first step"), (-1, "after", "last step"))
_LEGEND_OF_ENDS = [(when, *draw.ROLES[role][1:]) for _, role, when in _ENDS]
_PARTS = {
    "tops": "Largest eigenvalue of each output’s own kernel",
    "classes": "Alignment of each output",
    "layers": "Alignment of each layer’s share",
}


def of_run(a: Series, training: dict[str, Any] | None) -> list[FigureAndReading]:
    """All figures of a run of `analyze`; the first snapshot is drawn in the initial kernel's color."""
    measured = any(value is not None for value in a.get("sharpness", []))
    first = [losses(a, training), *([errors(a)] if a.get("test_error") else []), eigenvalues(a)]
    first += [sharpness(a)] if measured else []
    return draw.filled([*first, alignment(a), distance(a), energies(a), size(a), spectra(a)])


def of_tracking(a: Series) -> dict[str, list[FigureAndReading]]:
    """Section -> its figures with their readings; a figure without numbers is left out."""
    tops, classes, layers = (partial(_parts, name=name) for name in _PARTS)
    sections = {
        "stability": (("sharpness", sharpness), ("eigenvalues", eigenvalues), ("tops", tops), ("loss", losses)),
        "energy": (("energy_ks", energies), ("energy_ks", _against_k)),
        "alignment": (("alignment", alignment), ("classes", classes), ("layers", layers)),
        "change": (("distance", distance), ("effective_rank", size)),
        "first_order": (("first_order", _first_order),),
    }
    return {
        section: draw.filled([figure(a) for name, figure in figures if a.get(name)])
        for section, figures in sections.items()
    }


def summary(a: Series) -> str:
    """Say how spectrum and targets moved, as a part of a sentence; "" where neither was measured."""
    parts = []
    if "eigenvalues" in a:
        parts.append(f"its largest eigenvalue {change(a['eigenvalues'][0][0], a['eigenvalues'][-1][0])}")
    if (found := quoted(a, "target")) is not None:
        place, k = found
        first, last = (share(a["energy_target"][row][place]) for row in (0, -1))
        top = "top eigenvector holds" if k == 1 else f"top {k} eigenvectors hold"
        parts.append(f"the {top} {last} of the targets at the end and {first} at the start")
    return "; ".join(parts)


def quoted(a: Series, name: str) -> tuple[int, int] | None:
    """Place and value of the k whose energy sentences quote: the nearest to 10 that is defined first and last."""
    rows = a.get(f"energy_{name}")
    if not rows:
        return None
    known = [i for i in range(len(a["energy_ks"])) if rows[0][i] is not None and rows[-1][i] is not None]
    if not known:
        return None
    place, k = middle([a["energy_ks"][i] for i in known])
    return known[place], k


def distances(a: Series) -> tuple[float | None, float | None]:
    """1 - cosine of the last kernel with the first, not centered and centered."""
    cka = (a.get("cka") or [None])[-1]
    return a["distance"][-1], None if cka is None else 1 - cka


def losses(a: Series, training: dict[str, Any] | None = None) -> FigureAndReading:
    """Loss against step: of the points followed and, where recorded, of test examples and each step's own batch."""
    data = [draw.line(a["steps"], a["loss"], f"{a['points']} points", "var(--after)", ends=True)]
    legend, last, end = [(f"all {a['points']} followed points", "var(--after)", "line")], a["steps"][-1], ""
    if training is not None:
        # entry s is the loss before step s: at the parameters of snapshot s, like the other curve
        batches = training["losses"]
        data.insert(0, draw.line(range(len(batches)), batches, "minibatch", "var(--faint)", width=1.2))
        legend.insert(0, ("each step's own batch", "var(--faint)", "line"))
        last = max(last, len(batches))
        ends = {"diverged": "; training diverged", "target": "; training stopped when it reached its target"}
        end = ends.get(training["stop"], "")
    text = f"From {plain(a['loss'][0])} to {plain(a['loss'][-1])} on the {a['points']:,} followed points"
    if (tests := a.get("test_loss")) is not None:
        data.append(draw.line(a["steps"], tests, "test examples", "var(--network)", dash="dash", width=1.6))
        legend.append(("test examples", "var(--network)", "dash"))
        text += f", from {plain(tests[0])} to {plain(tests[-1])} on the test examples"
    text += f"{end}."
    return _single("loss", "Loss", text, data, last, draw.log_axis("loss", _values(data)), legend)


def errors(a: Series) -> FigureAndReading:
    """The network's own test error against step, with standard errors."""
    told = a["test_error"]
    values = [draw.times(entry["value"], 100) for entry in told]
    trace = draw.line(a["steps"], values, "test error", "var(--network)", ends=True)
    spread = [draw.times(entry["error"], 100) or 0.0 for entry in told]
    trace["error_y"] = {"type": "data", "array": spread, "color": "var(--network)", "thickness": 1.2, "width": 3}
    known = [(entry, step) for entry, step in zip(told, a["steps"], strict=True) if entry["value"] is not None]
    text = "Undefined: the outputs are not finite."
    if known:
        lowest, step = min(known, key=lambda pair: pair[0]["value"])
        text = f"From {percent(told[0])} to {percent(told[-1])}; lowest {percent(lowest)}, at step {step:,}."
    y = draw.axis("test error, %", rangemode="tozero")
    return _single("errors", "The network’s test error", text, [trace], a["steps"][-1], y, [])


def eigenvalues(a: Series) -> FigureAndReading:
    """Largest eigenvalues against step."""
    count, top = len(a["eigenvalues"][0]), [row[0] for row in a["eigenvalues"]]
    data = []
    for i in reversed(range(count)):
        values = [row[i] for row in a["eigenvalues"]]
        width = 1.1 if i else 2.6
        data.append(draw.line(a["steps"], values, f"λ<sub>{i + 1}</sub>", "var(--after)", width=width, ends=i == 0))
        data[-1]["opacity"] = max(0.25, 0.8 - 0.6 * i / max(1, count - 1)) if i else 1.0
    legend = [("largest, λ₁", "var(--after)", "line")]
    if count > 1:
        legend.append((f"the next {count - 1}", "var(--after)", "thin"))
    text = f"The largest eigenvalue {change(top[0], top[-1])}"
    y = draw.log_axis("eigenvalue", _values(data))
    return _single("eigenvalues", "Largest eigenvalues", f"{text}.", data, a["steps"][-1], y, legend)


def sharpness(a: Series) -> FigureAndReading:
    """Sharpness against step, and the bound of stability where the optimizer has one."""
    steps, values = a["steps"], a["sharpness"]
    bound = a.get("sharpness_bound", [None] * len(steps))
    data = [draw.line(steps, [draw.positive(v) for v in values], "sharpness", "var(--after)", ends=True)]
    legend = [("sharpness", "var(--after)", "line")]
    if any(b is not None for b in bound):
        data.append(draw.line(steps, bound, "stable below", "var(--network)", dash="dash", width=1.6))
        data[-1]["line"]["shape"] = "hv"
        legend.append(("stable below, with full batches", "var(--network)", "dash"))
    text, title = _read_sharpness(values, bound), "Sharpness"
    return _single("sharpness", title, text, data, steps[-1], draw.log_axis("sharpness", _values(data)), legend)


def _read_sharpness(values: Values, bound: Values) -> str:
    """Say where sharpness ended, relative to the bound.

    >>> _read_sharpness([1.0, 2.0], [20.0, 20.0])
    'Sharpness grew 2-fold, from 1 to 2, and ends at 0.1 times the bound of stability; above it at none of 2 snapshots.'
    >>> _read_sharpness([1.0, 19.0], [None, None])
    'Sharpness grew 19-fold, from 1 to 19. No bound of stability is known for this optimizer.'
    """
    text = f"Sharpness {change(values[0], values[-1])}"
    pairs = [(s, b) for s, b in zip(values, bound, strict=True) if s is not None and b is not None]
    if all(b is None for b in bound):
        return f"{text}. No bound of stability is known for this optimizer."
    if not pairs or values[-1] is None or bound[-1] is None:
        return f"{text}; where it ends beside the bound of stability is not known."
    above = sum(s > b for s, b in pairs)
    times = f"above it at {above or 'none'} of {len(pairs)} snapshots"
    return f"{text}, and ends at {plain(values[-1] / bound[-1], 2)} times the bound of stability; {times}."


def alignment(a: Series) -> FigureAndReading:
    """Alignment with the targets against step."""
    data = [
        draw.line(a["steps"], a["alignment_centered"], "centered", "var(--after)", ends=True),
        draw.line(a["steps"], a["alignment"], "not centered", "var(--after)", dash="dot", width=1.6),
    ]
    first, last = a["alignment_centered"][0], a["alignment_centered"][-1]
    found = ends_of(a["alignment_centered"])
    text = f"Centered alignment goes from {plain(first)} to {plain(last)} (1: the kernel is the targets’ own)"
    text += f"; the largest move the other way: {plain(found[2], 2)}." if found else "."
    y = draw.axis("alignment", **_SCALES["unit"])
    legend = [("centered", "var(--after)", "line"), ("not centered", "var(--after)", "dot")]
    return _single("alignment", "Alignment with the targets", text, data, a["steps"][-1], y, legend)


def distance(a: Series) -> FigureAndReading:
    """Distance to the first kernel and, where they were measured, centered cosine to it and velocity."""
    panels = _panels(a["steps"], a, (
        ("distance", "1 − cosine to the first", "zero"), ("cka", "centered cosine to the first", "unit"),
        ("velocity", "velocity, per step", "log"),
    ))  # fmt: skip
    last, apart = plain(a["distance"][-1]), distances(a)[1]
    centered = "" if apart is None else f", centered {plain(apart)}"
    text = {
        "undefined": "Undefined.",
        "hardly": f"It ends at {last}{centered}, below {CHANGED:g}: up to scale the kernel hardly moved, as in the "
        "limit of infinite width.",
        "changed": f"It ends at {last}{centered}, at least {CHANGED:g}: not the constant kernel of the infinite-width "
        "limit (0), whatever its scale.",
    }[moved(*distances(a))]
    return _row("distance", "Distance to the initial kernel", text, panels)


def energies(a: Series) -> FigureAndReading:
    """Energy of targets, outputs and residual (those that `a` has) in the top k eigenvectors against step."""
    ks, panels, legend, parts = a["energy_ks"], [], [], []
    place, k = quoted(a, "target") or middle(ks)
    for name, noun in ENERGIES:
        rows = a.get(f"energy_{name}")
        if rows is None:
            continue
        data, legend = draw.family(a["steps"], [(f"top {n}", [row[i] for row in rows]) for i, n in enumerate(ks)])
        panels.append(_energy_panel(f"plot-energy-{name}", noun, data, draw.step_axis(a["steps"][-1])))
        parts.append(f"{share(rows[0][place])} → {share(rows[-1][place])} of the {noun}")
    text = f"In the top {k} eigenvectors, first → last step: {'; '.join(parts)}."
    return _row("energy", "Energy in the top eigenvectors", text, panels, legend)


def _against_k(a: Series) -> FigureAndReading:
    """Energy against the number of eigenvectors, at both ends of training."""
    panels, parts = [], []
    for name, noun in ENERGIES:
        rows = a["cumulative"].get(name)
        if rows is None:
            continue
        data = _both_ends(a["steps"], rows, "top %{x}", "%{y:.3g}")
        for trace in data:
            trace["marker"]["size"] = 5
        panels.append(_energy_panel(f"plot-against-k-{name}", noun, data, draw.index_axis("top k", len(rows[0]))))
        parts.append(f"{_needed(rows[0])} → {_needed(rows[-1])} for the {noun}")
    text = f"Eigenvectors needed for {100 * _SHARE:.0f}\u00a0% of the energy, first → last step: {'; '.join(parts)}."
    return _row("against-k", "Energy against the number of eigenvectors", text, panels, _LEGEND_OF_ENDS)


def _energy_panel(id: str, noun: str, data: list[dict[str, Any]], x: dict[str, Any]) -> Panel:
    layout = draw.layout(x, draw.axis("", **_SCALES["unit"]), height=260)
    layout["margin"] |= {"l": 34, "r": 8}
    return Panel(id, f"of the {noun}", data, layout)


def _needed(energies: Values) -> str:
    """How many eigenvectors hold the share `_SHARE`.

    >>> _needed([0.5, 0.92, 0.99]), _needed([0.1, 0.2])
    ('2', 'more than 2')
    """
    values = [e for e in energies if e is not None]
    if not values:
        return "an undefined number"
    return next((str(i) for i, e in enumerate(values, 1) if e >= _SHARE), f"more than {len(values)}")


def size(a: Series) -> FigureAndReading:
    """Trace and effective rank against step, and the condition number where `a` has it."""
    panels = _panels(a["steps"], a, (
        ("trace", "trace", "zero"), ("effective_rank", "effective rank", "zero"),
        ("condition", "condition number", "log"),
    ))  # fmt: skip
    title = listed([panel.heading for panel in panels])
    ranks = f"{plain(a['effective_rank'][0])} to {plain(a['effective_rank'][-1])}"
    text = f"The trace {change(a['trace'][0], a['trace'][-1])}; the effective rank goes from {ranks}."
    return _row("size", title[0].upper() + title[1:], text, panels)


def spectra(a: Series) -> FigureAndReading:
    """The eigenvalues at both ends of training, as shares of the trace."""
    drawn, totals = [], []
    for row in (0, -1):
        values, trace = a["eigenvalues"][row], a["trace"][row]
        drawn.append([draw.positive(draw.times(value, 100 / trace)) if trace else None for value in values])
        totals.append(share(None if not trace or None in values else sum(values) / trace))
    data = _both_ends(a["steps"], drawn, "eigenvalue %{x}", "%{y:.3g} %")
    count = len(a["eigenvalues"][0])
    text = f"The top {count} eigenvalues hold {totals[0]} of the trace at the start and {totals[1]} at the end."
    layout = draw.layout(draw.index_axis("index", count), draw.log_axis("% of the trace", _values(data)), height=286)
    panels = [Panel("plot-spectrum", "", data, layout)]
    return _row("spectrum", "Spectrum at the start and the end", text, panels, _LEGEND_OF_ENDS)


def _parts(a: Series, name: str) -> FigureAndReading:
    """One thin curve per output or layer."""
    parts, title = a[name], _PARTS[name]
    data, legend = draw.family(a["steps"], list(parts.items()), width=1.5)
    log, unit = draw.log_axis("eigenvalue", _values(data)), draw.axis("centered alignment", **_SCALES["unit"])
    last = sorted((values[-1], part) for part, values in parts.items() if values[-1] is not None)
    text = "Undefined at the last step."
    if last:
        (low, lowest), (high, highest) = last[0], last[-1]
        text = f"At the last step from {plain(low)} ({lowest}) to {plain(high)} ({highest})."
    legend, y = legend if len(legend) <= _LEGEND else [], log if name == "tops" else unit
    return _single(name, title, text, data, a["steps"][-1], y, legend)


def _first_order(a: Series) -> FigureAndReading:
    parts = {f"first_{name}": values for name, values in a["first_order"].items()}
    panels = _panels(a["steps"], parts, (
        ("first_cosine", "cosine", "fit"), ("first_relative_error", "relative error", "log"),
        ("first_norm_ratio", "norm ratio", "fit"),
    ))  # fmt: skip
    ranges = []
    for panel in panels:
        values = [v for v in _values(panel.data) if v is not None]
        ranges.append(f"{panel.heading} {plain(min(values))} to {plain(max(values))}")
    text = f"Over all snapshots: {listed(ranges)}. A step that is exactly linear has cosine 1, error 0 and ratio 1."
    return _row("first-order", "First-order prediction of a gradient descent step", text, panels)


def _values(data: Sequence[dict[str, Any]]) -> list[float | None]:
    return [value for trace in data for value in trace["y"]]


def _both_ends(steps: Sequence[int], rows: Sequence[Values], x: str, y: str) -> list[dict[str, Any]]:
    """The first and the last row against index; `x` and `y` are what the hover text says of each."""
    data = []
    for row, role, when in _ENDS:
        _, color, symbol = draw.ROLES[role]
        data.append(draw.against_index(rows[row], f"step {steps[row]}", color, symbol, f"{x}, {when}: {y}"))
    return data


def _panels(steps: Sequence[int], series: Series, curves: Sequence[tuple[str, str, str]]) -> list[Panel]:
    """One panel per curve (name, heading, scale) that `series` has; a scale is a name of `_SCALES` or "log"."""
    panels = []
    for name, heading, scale in curves:
        if name not in series:
            continue
        y = draw.log_axis("", series[name]) if scale == "log" else draw.axis("", **_SCALES[scale])
        data = [draw.line(steps, series[name], heading, "var(--after)", ends=True)]
        layout = draw.layout(draw.step_axis(steps[-1]), y, height=260)
        panels.append(Panel(f"plot-{name.replace('_', '-')}", heading, data, layout))
    return panels


def _single(
    id: str, title: str, reading: str, data: list, last: int, y: dict[str, Any], legend: list[tuple[str, str, str]]
) -> FigureAndReading:
    """A figure of one plot against step."""
    return _row(id, title, reading, [Panel(f"plot-{id}", "", data, draw.layout(draw.step_axis(last), y))], legend)


def _row(
    id: str, title: str, reading: str, panels: list[Panel], legend: Sequence[tuple[str, str, str]] = ()
) -> FigureAndReading:
    """A figure of panels side by side; its reading is its text alternative, too."""
    return Figure(id, title, f"{title}. {reading}", panels, list(legend), wide=len(panels) > 2), reading
