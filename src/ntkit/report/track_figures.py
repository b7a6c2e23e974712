"""The figures of a tracking, each with what it says: pure functions of its numbers along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ntkit.report import analysis_figures as figures
from ntkit.report import analysis_text as readings
from ntkit.report import draw
from ntkit.report.draw import Figure, Panel
from ntkit.report.words import change, listed, plain

Told = tuple[Figure, str]
Values = Sequence[float | None]
_LEGEND = 12  # names that a legend can hold
_SHARE = 0.9


def sections(a: dict[str, Any]) -> dict[str, list[Told]]:
    """Section -> its figures with their readings; a figure without numbers is left out."""
    whole = {"along": a, "training": None}
    found: dict[str, list[Told]] = {"stability": [], "energy": [], "alignment": [], "change": [], "first_order": []}
    if "sharpness" in a:
        found["stability"].append(_sharpness(a))
    if "eigenvalues" in a:
        found["stability"].append((figures.eigenvalues(a), readings.eigenvalues(whole)))
    if "tops" in a:
        title = "Largest eigenvalue of each output’s own kernel"
        found["stability"].append(_parts(a["steps"], "tops", title, a["tops"], log=True))
    if "losses" in a:
        found["stability"].append((figures.losses(a, None), readings.losses(whole)))
    if a.get("energy_ks"):
        found["energy"] = [(figures.energies(a), readings.energy(whole)), _against_k(a)]
    if "alignment" in a:
        found["alignment"].append((figures.alignment(a), readings.alignment(whole)))
    for name, title in (("classes", "Alignment of each output"), ("layers", "Alignment of each layer’s share")):
        if name in a:
            found["alignment"].append(_parts(a["steps"], name, title, a[name]))
    if "distance_to_init" in a:
        found["change"].append(_change(a))
    if "trace" in a and "effective_rank" in a:
        found["change"].append((figures.size(a), readings.size(whole)))
    if "first_order" in a:
        found["first_order"].append(_first_order(a))
    return {section: draw.filled(told) for section, told in found.items()}


def _sharpness(a: dict[str, Any]) -> Told:
    steps, sharp = a["steps"], a["sharpness"]
    rates = a.get("learning_rate", [None] * len(steps))
    bound = [2 / rate if rate else None for rate in rates]
    data = [draw.line(steps, [draw.positive(v) for v in sharp], "sharpness", "var(--after)", ends=True)]
    legend = [("sharpness", "var(--after)", "line")]
    if any(b is not None for b in bound):
        data.append(draw.line(steps, bound, "2 / learning rate", "var(--network)", dash="dash", width=1.6))
        data[-1]["line"]["shape"] = "hv"
        legend.append(("2 / learning rate", "var(--network)", "dash"))
    layout = draw.layout(draw.step_axis(steps[-1]), draw.log_axis("sharpness", [*sharp, *bound]))
    label = (
        f"Sharpness against step, from {draw.told(sharp[0])} to {draw.told(sharp[-1])}; 2 over learning rate ends at "
    )
    figure = Figure("sharpness", "Sharpness against 2 / learning rate", f"{label}{draw.told(bound[-1])}.", [
        Panel("plot-sharpness", "", data, layout)
    ], legend)  # fmt: skip
    return figure, _read_sharpness(sharp, bound)


def _read_sharpness(sharp: Values, bound: Values) -> str:
    """Say where sharpness ended, relative to the bound.

    >>> _read_sharpness([1.0, 19.0], [20.0, 20.0])
    'Sharpness grew 19-fold, from 1 to 19, and ends at 0.95 times 2 / learning rate; it never was above.'
    """
    text = f"Sharpness {change(sharp[0], sharp[-1])}"
    pairs = [(s, b) for s, b in zip(sharp, bound, strict=True) if s is not None and b is not None]
    if not pairs or sharp[-1] is None or bound[-1] is None:
        return f"{text}; its relation to 2 / learning rate at the end is not known."
    over = sum(s > b for s, b in pairs)
    times = "it never was above" if not over else f"it was above at {over} of {len(pairs)} snapshots"
    return f"{text}, and ends at {plain(sharp[-1] / bound[-1], 2)} times 2 / learning rate; {times}."


def _against_k(a: dict[str, Any]) -> Told:
    """Energy against the number of eigenvectors, at both ends of training."""
    panels, said = [], []
    for name, heading in figures.ENERGIES:
        rows = a["cumulative"].get(name)
        if rows is None:
            continue
        data = []
        for row, role, when in ((0, "init", "first"), (-1, "after", "last")):
            _, colour, symbol = figures.ROLES[role]
            hover = f"top %{{x}}, {when} step: %{{y:.3g}}"
            data.append(draw.against_index(rows[row], f"step {a['steps'][row]}", colour, symbol, hover))
            data[-1]["marker"]["size"] = 5
        layout = draw.layout(draw.index_axis("top k", len(rows[0])), draw.axis("", range=[-0.02, 1.02]), height=260)
        layout["margin"] |= {"l": 34, "r": 8}
        panels.append(Panel(f"plot-against-k-{name}", heading, data, layout))
        said.append(f"{_needed(rows[0])} → {_needed(rows[-1])} for the {name}")
    legend = [("first step", "var(--init)", "circle"), ("last step", "var(--after)", "diamond")]
    label = (
        f"Energy against the number of eigenvectors at the first and last step; needed for nine tenths: {listed(said)}."
    )
    text = f"Eigenvectors needed for {100 * _SHARE:.0f}\u00a0% of the energy, first → last step: {'; '.join(said)}."
    return Figure("against-k", "Energy against the number of eigenvectors", label, panels, legend, wide=True), text


def _needed(energies: Values) -> str:
    """How many eigenvectors hold the share `_SHARE`.

    >>> _needed([0.5, 0.92, 0.99]), _needed([0.1, 0.2])
    ('2', 'more than 2')
    """
    known = [e for e in energies if e is not None]
    if not known:
        return "an undefined number"
    return next((str(i) for i, e in enumerate(known, 1) if e >= _SHARE), f"more than {len(known)}")


def _parts(steps: Sequence[int], name: str, title: str, parts: Mapping[str, Values], log: bool = False) -> Told:
    """One thin curve per output or layer."""
    data, legend = draw.family(steps, list(parts.items()), width=1.5)
    if log:
        y = draw.log_axis("eigenvalue", [v for values in parts.values() for v in values])
    else:
        y = draw.axis("centred alignment", range=[-0.02, 1.02])
    last = sorted((values[-1], part) for part, values in parts.items() if values[-1] is not None)
    said = "Undefined at the last step."
    if last:
        (low, lowest), (high, highest) = last[0], last[-1]
        said = f"At the last step from {plain(low)} ({lowest}) to {plain(high)} ({highest})."
    layout = draw.layout(draw.step_axis(steps[-1]), y)
    panel = Panel(f"plot-{name}", "", data, layout)
    return Figure(name, title, f"{title} against step. {said}", [panel], legend if len(legend) <= _LEGEND else []), said


def _change(a: dict[str, Any]) -> Told:
    """Distance and centred cosine to the first kernel, and how fast the kernel turns."""
    panels = [_panel(a["steps"], "distance", "1 − cosine to the first", a["distance_to_init"], "zero")]
    if "cka" in a:
        panels.append(_panel(a["steps"], "cka", "centred cosine to the first", a["cka"], "unit"))
    if "velocity" in a:
        panels.append(_panel(a["steps"], "velocity", "velocity, per step", a["velocity"], "log"))
    label = f"Distance of the kernel to the first one against step, ending at {draw.told(a['distance_to_init'][-1])}."
    text = readings.distance({"along": a})
    return Figure("distance", "Distance to the initial kernel", label, panels, wide=len(panels) > 2), text


def _first_order(a: dict[str, Any]) -> Told:
    parts = a["first_order"]
    names = (
        ("cosine", "cosine", "fit"),
        ("relative_error", "relative error", "log"),
        ("norm_ratio", "norm ratio", "fit"),
    )
    panels = [
        _panel(a["steps"], f"first-{name}", heading, parts[name], kind)
        for name, heading, kind in names
        if name in parts
    ]
    said = []
    for name, heading, _ in names:
        known = [v for v in parts.get(name, []) if v is not None]
        if known:
            said.append(f"{heading} {plain(min(known))} to {plain(max(known))}")
    text = f"Over all snapshots: {listed(said)}. A step that is exactly linear has cosine 1, error 0 and ratio 1."
    label = f"True against predicted change of the outputs: {listed(said)}."
    title = "First-order prediction of a gradient descent step"
    return Figure("first-order", title, label, panels, wide=True), text


def _panel(steps: Sequence[int], name: str, heading: str, values: Values, kind: str) -> Panel:
    """One curve in a row of plots; its axis starts at zero, spans 0 to 1, fits the values or is logarithmic."""
    data = [draw.line(steps, values, heading, "var(--after)", ends=True)]
    y = {
        "zero": draw.axis("", rangemode="tozero", exponentformat="power"),
        "unit": draw.axis("", range=[-0.02, 1.02]),
        "fit": draw.axis(""),
        "log": draw.log_axis("", values),
    }[kind]
    return Panel(f"plot-{name}", heading, data, draw.layout(draw.step_axis(steps[-1]), y, height=260))
