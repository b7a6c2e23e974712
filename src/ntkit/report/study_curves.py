"""The curves of a study: means over seeds with bands of one standard error, one color per group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from ntkit.report import draw
from ntkit.report.draw import Figure, Panel
from ntkit.report.words import listed, measure, plain

_QUANTITIES = {  # series of a group: title, axis, kind of the axis
    "energy_target": ("Energy of the targets in the top {k}", "share", "unit"),
    "energy_output": ("Energy of the outputs in the top {k}", "share", "unit"),
    "energy_residual": ("Energy of the residual in the top {k}", "share", "unit"),
    "sharpness": ("Sharpness against 2 / learning rate", "sharpness", "log"),
    "lambda_1": ("Largest eigenvalue", "eigenvalue", "log"),
    "alignment_centered": ("Centered alignment with the targets", "alignment", "unit"),
    "distance": ("Distance to the initial kernel", "1 − cosine", "zero"),
    "loss": ("Loss", "loss", "log"),
    "first_order_error": ("Error of the first-order prediction", "relative error", "log"),
}
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
    each = listed([f"{g['name']} {len(g['seeds'])}" for g in groups])
    seeds = f"{counts.pop()} seeds" if len(counts) == 1 else f"seeds ({each})"
    return f"Mean over {seeds}, in a band of one standard error on either side."


def _figures(place: int, groups: Sequence[dict[str, Any]]) -> list[tuple[Figure, str]]:
    figures = []
    for name in _QUANTITIES:
        members = [(tone(i, len(groups)), g) for i, g in enumerate(groups) if _defined(g, name)]
        if members:
            figures.append(_figure(f"{place}-{name}", name, members))
    return draw.filled(figures)


def _defined(group: dict[str, Any], name: str) -> bool:
    return any(v is not None for v in (group["series"].get(name) or {}).get("mean", []))


def _figure(key: str, name: str, members: Sequence[tuple[tuple[str, str], dict[str, Any]]]) -> tuple[Figure, str]:
    title, axis, kind = _QUANTITIES[name]
    ks = {group.get("energy_k") for _, group in members}
    title = title.format(k=ks.pop() if len(ks) == 1 else "k")
    bands, bounds, means, legend, ends, values = [], [], [], [], [], []
    for (color, symbol), group in members:
        steps, mean = group["steps"], group["series"][name]["mean"]
        error = group["series"][name].get("error") or [None] * len(mean)
        spread = [(m - e, m + e) if m is not None and e else None for m, e in zip(mean, error, strict=True)]
        values += [*mean, *[v for pair in spread if pair for v in pair]]
        bands += _bands(steps, mean, spread, color, kind == "log")
        means.append(_mean(steps, mean, error, draw.safe(group["name"]), color, symbol))
        legend.append((group["name"], color, symbol))
        last = measure({"value": mean[-1], "error": error[-1]}).replace(" ", "\u00a0")
        ends.append(f"{group['name']}: {last}")
        if name == "sharpness" and _defined(group, "bound"):
            bound = group["series"]["bound"]["mean"]
            bounds.append(draw.line(steps, bound, "2 / learning rate", color, dash="dash", width=1.4))
            bounds[-1]["line"]["shape"] = "hv"
            values += bound
            ends[-1] += f" (bound\u00a0{plain(bound[-1])})"
    if bounds:
        legend.append(("2 / learning rate", "var(--network)", "dash"))
        if all((a["x"], a["y"]) == (b["x"], b["y"]) for a, b in pairwise(bounds)):  # one line for all groups
            bounds = [bounds[0] | {"line": bounds[0]["line"] | {"color": "var(--network)"}}]
    span = {"range": [-0.02, 1.02]} if kind == "unit" else {"rangemode": "tozero", "exponentformat": "power"}
    y = draw.log_axis(axis, values) if kind == "log" else draw.axis(axis, **span)
    layout = draw.layout(draw.step_axis(max(group["steps"][-1] for _, group in members)), y)
    reading = f"At the last step: {'; '.join(ends)}."
    panel = Panel(f"plot-{key}", "", [*bands, *bounds, *means], layout)
    return Figure(key, title, f"{title} against step. {reading}", [panel], legend), reading


def tone(i: int, count: int) -> tuple[str, str]:
    """Color and symbol of the i-th of so many groups; more than four groups get the colors of the ramp."""
    return TONES[i] if count <= len(TONES) else draw.ramp(i, count), SYMBOLS[i % len(SYMBOLS)]


def _mean(
    steps: Sequence[int],
    mean: Sequence[float | None],
    error: Sequence[float | None],
    name: str,
    color: str,
    symbol: str,
) -> dict[str, Any]:
    """A curve whose last point carries the group's symbol."""
    end = max(i for i, v in enumerate(mean) if v is not None)
    sizes = [9 if i == end else 0 for i in range(len(mean))]
    return draw.line(steps, mean, name, color) | {
        "mode": "lines+markers",
        "marker": {"color": color, "symbol": symbol, "size": sizes, "opacity": 1, "line": {"width": 0}},
        "text": [f" ± {e:.2g}" if e else "" for e in error],
        "hovertemplate": f"{name}, step %{{customdata}}<br>%{{y:.4g}}%{{text}}<extra></extra>",
    }


def _bands(
    steps: Sequence[int], mean: Sequence[float | None], spread: Sequence[Any], color: str, log: bool
) -> Iterator[dict[str, Any]]:
    """One filled outline per stretch of steps that have a standard error."""
    least = min((m for m in mean if m is not None and m > 0), default=1.0) / 1e3  # below a logarithmic axis's range
    places = [i for i, pair in enumerate(spread) if pair]
    starts = [k for k, i in enumerate(places) if not k or places[k - 1] != i - 1]
    for start, stop in pairwise([*starts, len(places)]):
        stretch = places[start:stop]
        x = [draw.place(steps[i]) for i in stretch]
        lows = [max(spread[i][0], least) if log else spread[i][0] for i in stretch]
        yield {
            "type": "scatter", "mode": "lines", "x": x + x[::-1], "y": [spread[i][1] for i in stretch] + lows[::-1],
            "fill": "toself", "fillcolor": color, "opacity": _BAND, "hoverinfo": "skip",
            "line": {"width": 0, "color": color, "dash": "solid"},
        }  # fmt: skip
