"""Sections of a study beside its curves along training: curves over anything, scatters, maps, images, tables.

A study's ``sections`` hold a title, a short one, a text and items. Each item has a kind and a title, figures a reading:

- "lines": axes ``x``, ``y`` (title, scale "linear" or "log") and ``panels`` (heading, series of name, x, y, and perhaps
  error and dash); ``style="dots"`` draws no lines, ``ordered`` gives series without a dash the colors of the ramp.
- "scatter": ``x``, ``y`` (axis titles) and panels (heading, names of two arrays), each with its diagonal.
- "maps": ``extent`` [low, high] of a square, names of arrays ``points`` [n, 2] and ``labels`` [n] to draw on it, and
  panels (heading, name of an array [side, side], colours "classes", "ramp" or "signed", perhaps the index of one of
  several such arrays, and of a point to ring).
- "images": ``cases``, each an image, a text and strips of images with captions and values; an image is [name, index].
- "table": ``columns``, ``rows`` of texts, a ``note``; ``folded`` behind its title.

Arrays are those of ``figures.safetensors`` in the study's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ntkit.base.checks import refusal
from ntkit.report import draw
from ntkit.report.draw import RAMP, Figure, Panel
from ntkit.report.images import thumbnail
from ntkit.report.study_curves import SYMBOLS, TONES, tone
from ntkit.report.words import listed, unbroken

Item = dict[str, Any]
Arrays = Mapping[str, np.ndarray]

_HUES = (*TONES[:3], "var(--fifth)", "var(--sixth)", TONES[3])  # gray last: a reference for the others
_FEW = 40  # points of a curve that are marked
_DIGITS = 5  # significant digits of what is drawn from arrays
_MAP = 280  # pixels


def sections(entries: Sequence[Item], arrays: Arrays) -> list[dict[str, Any]]:
    """Build title, text and blocks of each section; a block is a row of figures, images or a table.

    Raises
    ------
    Refused
        When an item names an array that is not there, or is of no known kind.
    """
    return [
        {
            "title": entry["title"],
            "short": entry.get("short", entry["title"]),
            "text": entry.get("text", ""),
            "blocks": _blocks(place, entry["items"], arrays),
        }
        for place, entry in enumerate(entries)
    ]


def _blocks(place: int, items: Sequence[Item], arrays: Arrays) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind = item["kind"]
        if kind == "table":
            blocks.append({"note": "", "folded": False, **item})
        elif kind == "images":
            blocks.append({**item, "cases": [_case(case, arrays) for case in item["cases"]]})
        elif kind in _FIGURES:
            if not blocks or blocks[-1]["kind"] != "figures":
                blocks.append({"kind": "figures", "figures": []})
            blocks[-1]["figures"].append((_FIGURES[kind](f"s{place}-{i}", item, arrays), unbroken(item["reading"])))
        else:
            expected = "lines, scatter, maps, images or table"
            raise refusal("item of a section", got=repr(kind), expected=expected, fix="Use this version of ntkit.")
    for block in blocks:
        if block["kind"] == "figures":
            block["figures"] = draw.filled(block["figures"])
    return blocks


def _array(arrays: Arrays, name: str) -> np.ndarray:
    if name not in arrays:
        fix = "Run the study again: the file and results.json belong together."
        raise refusal("figures.safetensors", got=f"no array '{name}'", expected="all that results.json names", fix=fix)
    return arrays[name]


def _rounded(values: Any) -> list[float]:
    return [float(f"{v:.{_DIGITS}g}") for v in np.ravel(values)]


def _lines(key: str, item: Item, arrays: Arrays) -> Figure:
    series = [s for panel in item["panels"] for s in panel["series"]]
    styles, dots = _styles(series, item.get("ordered", False)), item.get("style") == "dots"
    panels = []
    for p, panel in enumerate(item["panels"]):
        data = [_curve(s, *styles[s["name"]], dots) for s in panel["series"]]
        axes = (_axis(item[axis], [v for s in panel["series"] for v in s[axis]]) for axis in ("x", "y"))
        panels.append(Panel(f"plot-{key}-{p}", panel["heading"], data, draw.layout(*axes)))
    marks = {s["name"]: _dash(s) or (None if _marked(s, dots) else "line") for s in series}
    legend = [(name, color, marks[name] or symbol) for name, (color, symbol) in styles.items()]
    label = f"{item['title']}: {item['y']['title']} against {item['x']['title']}. {item['reading']}"
    return _figure(key, item, label, panels, legend if len(styles) > 1 else [])


def _styles(series: Sequence[Item], ordered: bool) -> dict[str, tuple[str, str]]:
    """Color and symbol of each name: the ramp’s colors for steps of one quantity, gray for what they are beside."""
    names = list(dict.fromkeys(s["name"] for s in series))
    if ordered:
        steps = list(dict.fromkeys(s["name"] for s in series if not _dash(s)))
        colors = {name: draw.ramp(round(i * (RAMP - 1) / max(1, len(steps) - 1)), RAMP) for i, name in enumerate(steps)}
    elif len(TONES) < len(names) <= len(_HUES):
        colors = dict(zip(names, (*_HUES[: len(names) - 1], _HUES[-1]), strict=True))
    else:
        colors = {name: tone(i, len(names))[0] for i, name in enumerate(names)}
    return {name: (colors.get(name, TONES[-1]), SYMBOLS[i % len(SYMBOLS)]) for i, name in enumerate(names)}


def _dash(series: Item) -> str | None:
    return None if series.get("dash", "solid") == "solid" else series["dash"]


def _marked(series: Item, dots: bool) -> bool:
    return dots or (len(series["x"]) <= _FEW and not _dash(series))


def _curve(series: Item, color: str, symbol: str, dots: bool) -> dict[str, Any]:
    name, marked = draw.safe(series["name"]), _marked(series, dots)
    trace = draw.line([], [], name, color, dash=_dash(series) or "solid") | {
        "x": list(series["x"]), "y": list(series["y"]), "customdata": list(series["x"]),
        "mode": "markers" if dots else "lines+markers" if marked else "lines",
        "hovertemplate": f"{name}<br>%{{x:.4g}}: %{{y:.3g}}<extra></extra>",
    }  # fmt: skip
    if marked:
        trace["marker"] = {"color": color, "symbol": symbol, "size": 7, "opacity": 0.6 if dots else 1}
    if series.get("error"):
        trace["error_y"] = {"type": "data", "array": series["error"], "color": color, "thickness": 1.6, "width": 5}
    return trace


def _axis(axis: Item, values: Sequence[float]) -> dict[str, Any]:
    title = draw.safe(axis["title"])
    return draw.log_axis(title, values) if axis["scale"] == "log" else draw.axis(title, exponentformat="power")


def _scatter(key: str, item: Item, arrays: Arrays) -> Figure:
    panels = []
    for p, panel in enumerate(item["panels"]):
        x, y = (_rounded(_array(arrays, panel[axis])) for axis in ("x", "y"))
        ends = [min(x), max(x)]
        line = draw.line([], [], "diagonal", "var(--faint)", width=1.6) | {"x": ends, "y": ends, "hoverinfo": "skip"}
        line.pop("hovertemplate")
        dots = {
            "type": "scatter", "mode": "markers", "x": x, "y": y, "name": draw.safe(panel["heading"]),
            "marker": {"color": TONES[0], "size": 5, "opacity": 0.45},
            "hovertemplate": "%{x:.4g}, %{y:.4g}<extra></extra>",
        }  # fmt: skip
        axes = (draw.axis(draw.safe(item[axis])) for axis in ("x", "y"))
        panels.append(Panel(f"plot-{key}-{p}", panel["heading"], [line, dots], draw.layout(*axes)))
    label = f"{item['title']}: scatter of {item['y']} against {item['x']}. {item['reading']}"
    return _figure(key, item, label, panels, [("diagonal", "var(--faint)", "line")], wide=len(panels) > 1)


def _maps(key: str, item: Item, arrays: Arrays) -> Figure:
    points, labels = _array(arrays, item["points"]), _array(arrays, item["labels"]).astype(int)
    classes = int(labels.max()) + 1
    panels = []
    for p, panel in enumerate(item["panels"]):
        values = _array(arrays, panel["array"])
        values = values[panel["index"]] if "index" in panel else values
        data = [_heat(values, item["extent"], panel["colours"], classes)]
        data += [_points(points[labels == c], c) for c in range(classes)]
        if "ring" in panel:
            ring = {"size": 15, "color": "rgba(0,0,0,0)", "line": {"color": "var(--ink)", "width": 2.2}}
            data.append(_points(points[[panel["ring"]]], 0) | {"marker": ring})
        axes = [draw.axis("", range=item["extent"], showgrid=False, constrain="domain", nticks=5) for _ in range(2)]
        axes[1] |= {"scaleanchor": "x"}
        layout = draw.layout(*axes, height=_MAP)
        layout["margin"] |= {"l": 30, "b": 30, "r": 8 if panel["colours"] == "classes" else 4}
        panels.append(Panel(f"plot-{key}-{p}", panel["heading"], data, layout))
    legend = [(f"class {c + 1}", *_class_tone(c)) for c in range(classes)]
    label = f"{item['title']}: maps of the plane, {listed([panel.heading for panel in panels])}. {item['reading']}"
    return _figure(key, item, label, panels, legend, wide=True)


def _class_tone(c: int) -> tuple[str, str]:
    return TONES[c % len(TONES)], SYMBOLS[c % len(SYMBOLS)]


def _heat(values: np.ndarray, extent: Sequence[float], colors: str, classes: int) -> dict[str, Any]:
    low, high = extent
    places = _rounded(low + (high - low) * (np.arange(len(values)) + 0.5) / len(values))
    hover = "%{x:.2f}, %{y:.2f}: %{z:.3g}"
    if colors != "classes":
        return draw.heat(values, colors, hover) | {"x": places, "y": places}
    scale = [[(c + end) / classes, _class_tone(c)[0]] for c in range(classes) for end in (0, 1)]
    return draw.heat(values, "ramp", hover) | {
        "x": places, "y": places, "colorscale": scale, "zmin": -0.5, "zmax": classes - 0.5, "opacity": 0.32,
        "hoverinfo": "skip", "showscale": False,
    }  # fmt: skip


def _points(points: np.ndarray, c: int) -> dict[str, Any]:
    color, symbol = _class_tone(c)
    return {
        "type": "scatter", "mode": "markers", "x": _rounded(points[:, 0]), "y": _rounded(points[:, 1]),
        "marker": {"color": color, "symbol": symbol, "size": 7, "line": {"color": "var(--card)", "width": 1}},
        "hoverinfo": "skip",
    }  # fmt: skip


def _figure(key: str, item: Item, label: str, panels: list[Panel], legend: list, wide: bool = False) -> Figure:
    return Figure(key, item["title"], label, panels, legend, wide or item.get("wide", False))


_FIGURES: dict[str, Callable[[str, Item, Arrays], Figure]] = {"lines": _lines, "scatter": _scatter, "maps": _maps}


def _case(case: Item, arrays: Arrays) -> Item:
    """A test image and strips of training images, as data URIs."""

    def as_uri(image: Sequence[Any]) -> str:
        return thumbnail(_array(arrays, image[0])[tuple(image[1])])

    strips = [
        {**strip, "images": [{**image, "image": as_uri(image["image"])} for image in strip["images"]]}
        for strip in case["strips"]
    ]
    return {**case, "image": as_uri(case["image"]), "strips": strips}
