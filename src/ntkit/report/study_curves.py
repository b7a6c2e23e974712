"""The curves of a study: means over seeds with bands of one standard error, one colour per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ntkit.report import draw
from ntkit.report.draw import Figure, Panel
from ntkit.report.words import listed, measure, plain

_QUANTITIES = (
    ("energy_target", "Energy of the targets in the top {k}", "share", "unit"),
    ("energy_output", "Energy of the outputs in the top {k}", "share", "unit"),
    ("energy_residual", "Energy of the residual in the top {k}", "share", "unit"),
    ("sharpness", "Sharpness against 2 / learning rate", "sharpness", "log"),
    ("lambda_1", "Largest eigenvalue", "eigenvalue", "log"),
    ("alignment_centered", "Centred alignment with the targets", "alignment", "unit"),
    ("distance", "Distance to the initial kernel", "1 − cosine", "zero"),
    ("loss", "Loss", "loss", "log"),
    ("first_order_error", "Error of the first-order prediction", "relative error", "log"),
)
TONES = ("var(--init)", "var(--after)", "var(--conjugate)", "var(--network)")
SYMBOLS = ("circle", "diamond", "square", "x")
_BAND = 0.2  # opacity


def curves(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Build title, sentence on the seeds, and figures with readings, of each entry of a study's ``curves``."""
    return [
        {"title": entry["title"], "seeds": _seeds(entry["groups"]), "figures": _figures(place, entry["groups"])}
        for place, entry in enumerate(entries)
    ]


def _seeds(groups: Sequence[dict[str, Any]]) -> str:
    """Say what the curves are means of.

    >>> _seeds([{"name": "a", "seeds": [0, 1]}, {"name": "b", "seeds": [0, 1]}])
    'Mean over 2 seeds, in a band of one standard error on either side.'
    """
    counts = {len(g["seeds"]) for g in groups}
    if counts <= {1}:
        return "One seed: no standard errors."
    if len(counts) == 1:
        return f"Mean over {counts.pop()} seeds, in a band of one standard error on either side."
    each = listed([f"{g['name']} {len(g['seeds'])}" for g in groups])
    return f"Mean over seeds ({each}), in a band of one standard error on either side."


def _figures(place: int, groups: Sequence[dict[str, Any]]) -> list[tuple[Figure, str]]:
    found = []
    for name, title, axis, kind in _QUANTITIES:
        members = [(i, g) for i, g in enumerate(groups) if _defined(g, name)]
        if members:
            ks = {g.get("energy_k") for _, g in members}
            k = str(ks.pop()) if len(ks) == 1 else "k"
            found.append(_figure(f"{place}-{name}", name, title.format(k=k), axis, kind, members, len(groups)))
    return draw.filled(found)


def _defined(group: dict[str, Any], name: str) -> bool:
    return any(v is not None for v in (group["series"].get(name) or {}).get("mean", []))


def _figure(
    key: str, name: str, title: str, axis: str, kind: str, members: Sequence[tuple[int, dict[str, Any]]], count: int
) -> tuple[Figure, str]:
    bands, bounds, lines, legend, said, seen = [], [], [], [], [], []
    for i, group in members:
        colour, symbol = tone(i, count)
        steps, series = group["steps"], group["series"][name]
        mean = series["mean"]
        error = series.get("error") or [None] * len(mean)
        spread = [(m - e, m + e) if m is not None and e else None for m, e in zip(mean, error, strict=True)]
        seen += [*mean, *[v for pair in spread if pair for v in pair]]
        bands += _band(steps, mean, spread, colour, kind == "log")
        lines.append(_mean(steps, mean, error, group["name"], colour, symbol))
        legend.append((group["name"], colour, symbol))
        last = measure({"value": mean[-1], "error": error[-1]}).replace(" ", "\u00a0")
        said.append(f"{group['name']}: {last}")
        if name == "sharpness" and _defined(group, "bound"):
            bound = group["series"]["bound"]["mean"]
            bounds.append(draw.line(steps, bound, "2 / learning rate", colour, dash="dash", width=1.4))
            bounds[-1]["line"]["shape"] = "hv"
            seen += bound
            said[-1] += f" (bound\u00a0{plain(bound[-1])})"
    if bounds:
        legend.append(("2 / learning rate", "var(--network)", "dash"))
        if all((b["x"], b["y"]) == (bounds[0]["x"], bounds[0]["y"]) for b in bounds):  # one line for all groups
            bounds = [bounds[0] | {"line": bounds[0]["line"] | {"color": "var(--network)"}}]
    span = {"range": [-0.02, 1.02]} if kind == "unit" else {"rangemode": "tozero", "exponentformat": "power"}
    y = draw.log_axis(axis, seen) if kind == "log" else draw.axis(axis, **span)
    last = max(group["steps"][-1] for _, group in members)
    layout = draw.layout(draw.step_axis(last), y)
    text = f"At the last step: {'; '.join(said)}."
    figure = Figure(key, title, f"{title} against step. {text}", [
        Panel(f"plot-{key}", "", [*bands, *bounds, *lines], layout)
    ], legend)  # fmt: skip
    return figure, text


def tone(i: int, count: int) -> tuple[str, str]:
    """Colour and symbol of the i-th of so many groups; more than four groups are told apart by the ramp."""
    colour = TONES[i] if count <= len(TONES) else draw.ramp(i, count)
    return colour, SYMBOLS[i % len(SYMBOLS)]


def _mean(
    steps: Sequence[int],
    mean: Sequence[float | None],
    error: Sequence[float | None],
    name: str,
    colour: str,
    symbol: str,
) -> dict[str, Any]:
    """A curve whose last point carries the group's symbol."""
    trace = draw.line(steps, mean, draw.safe(name), colour)
    trace["mode"] = "lines+markers"
    end = max(i for i, v in enumerate(mean) if v is not None)
    sizes = [9 if i == end else 0 for i in range(len(mean))]
    trace["marker"] = {"color": colour, "symbol": symbol, "size": sizes, "opacity": 1, "line": {"width": 0}}
    trace["text"] = [f" ± {e:.2g}" if e else "" for e in error]
    trace["hovertemplate"] = f"{draw.safe(name)}, step %{{customdata}}<br>%{{y:.4g}}%{{text}}<extra></extra>"
    return trace


def _band(
    steps: Sequence[int],
    mean: Sequence[float | None],
    spread: Sequence[tuple[float, float] | None],
    colour: str,
    log: bool,
) -> list[dict[str, Any]]:
    """One filled outline per stretch of steps that have a standard error."""
    least = min((m for m in mean if m is not None and m > 0), default=1.0) / 1e3  # below a logarithmic axis's range
    stretches: list[list[int]] = []
    for i, pair in enumerate(spread):
        if pair is None:
            continue
        if stretches and stretches[-1][-1] == i - 1:
            stretches[-1].append(i)
        else:
            stretches.append([i])
    found = []
    for stretch in stretches:
        pairs = [pair for i in stretch if (pair := spread[i]) is not None]
        lows = [max(low, least) if log else low for low, _ in pairs]
        x = [draw.place(steps[i]) for i in stretch]
        found.append({
            "type": "scatter", "mode": "lines", "x": x + x[::-1], "y": [high for _, high in pairs] + lows[::-1],
            "fill": "toself", "fillcolor": colour, "opacity": _BAND, "hoverinfo": "skip",
            "line": {"width": 0, "color": colour, "dash": "solid"},
        })  # fmt: skip
    return found
