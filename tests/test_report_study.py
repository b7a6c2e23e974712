"""Sections of a study's page: curves, scatters, maps, images and tables, from results and arrays alone."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_case import HOSTILE, body_of, data_of, words_of

from ntkit.base.checks import Refused
from ntkit.base.files import write_arrays, write_json
from ntkit.report import render_study
from ntkit.report.study_sections import sections

AXES = {"x": {"title": "nodes", "scale": "log"}, "y": {"title": "error", "scale": "log"}}


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "network": draw.normal(size=(7, 2)),
        "rebuilt": draw.normal(size=(7, 2)),
        "regions": draw.integers(0, 3, (5, 5)).astype(np.uint8),
        "values": draw.normal(size=(2, 5, 5)),
        "points": draw.uniform(-1, 1, (6, 2)),
        "labels": np.array([0, 1, 2, 0, 1, 2]),
        "images": draw.integers(0, 255, (2, 3, 8, 8, 1)).astype(np.uint8),
    }


def results() -> dict[str, Any]:
    curve = {"name": "midpoint", "x": [1, 10, 100], "y": [1e-2, 1e-4, 1e-6], "error": [1e-3, 1e-5, 1e-7]}
    flat = {"name": "secant", "x": [1, 100], "y": [3e-16, 3e-16], "dash": "dash"}
    maps = {"extent": [-2, 2], "points": "points", "labels": "labels"}
    case = {
        "image": ["images", [0, 0]], "text": "Predicted 3, rightly.", "strips": [{"heading": "for it", "images": [
            {"image": ["images", [1, j]], "caption": str(j), "value": f"+{j}.5", "other": j == 2} for j in range(3)
        ]}],
    }  # fmt: skip
    items = [
        {"kind": "lines", "title": "Error", "reading": "It falls from 1e-2 to 1e-6.", **AXES,
         "panels": [{"heading": "", "series": [curve, flat]}]},
        {"kind": "scatter", "title": "Logits", "reading": "They lie on the diagonal.", "x": "network", "y": "kernel",
         "panels": [{"heading": "exact", "x": "network", "y": "rebuilt"}]},
        {"kind": "table", "title": "By rule", "columns": ["Rule", "Error"], "rows": [["left", "0.1"]],
         "note": "Means."},
        {"kind": "maps", "title": "Maps", "reading": "Three of them, all alike.", **maps, "panels": [
            {"heading": "regions", "array": "regions", "colours": "classes"},
            {"heading": "size", "array": "values", "index": 0, "colours": "ramp"},
            {"heading": "sign", "array": "values", "index": 1, "colours": "signed", "ring": 4},
        ]},
        {"kind": "images", "title": "Examples", "cases": [case]},
        {"kind": "lines", "title": "Dots", "reading": "A cloud of two dots only.", "style": "dots",
         "x": {"title": "a", "scale": "linear"}, "y": {"title": "b", "scale": "linear"},
         "panels": [{"heading": "", "series": [{"name": "one", "x": [0, 1], "y": [1, -1]}]}]},
        {"kind": "table", "title": "Folded", "columns": ["A", "B"], "rows": [["c", "d"]], "folded": True},
    ]  # fmt: skip
    table = {"title": "Certificates", "columns": ["Network", "Residual"], "rows": [["MLP", "3e-16"]]}
    cards = [{"name": "Largest relative residual", "big": "3e-16", "small": "21 networks"}]
    return {
        "format": 1, "kind": "study", "title": "A study", "scale": "quick", "command": "ntkit study it",
        "about": "What was done here.", "sections": [{"title": "One section", "text": "Its text.", "items": items}],
        "certificate": {"text": "The largest residual is 3e-16.", "cards": cards, "table": table},
        "claims": [{"claim": "It is exact", "number": "3e-16", "holds": True, "how": "in float64"}],
        "terms": ["path_kernel", "secant", "other_gradients", "novelty", "no_such_term", "__init__"],
    }  # fmt: skip


def written(folder: Path, told: dict[str, Any] | None = None) -> Path:
    write_arrays(folder / "figures.safetensors", arrays())
    write_json(folder / "results.json", told or results())
    return render_study(folder)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("sections"))


def test_the_certificate_comes_first(shown: Path) -> None:
    words = words_of(shown)
    order = [
        "The largest residual is 3e-16.",
        "21 networks",
        "MLP",
        "What was done here.",
        "It is exact",
        "One section",
    ]
    places = [words.index(text, words.index("A study at")) for text in order]
    assert places == sorted(places)
    assert "Exact path kernel" in words
    assert "Sharpness" not in words  # a study names the terms that it uses
    assert "Outside the span, posterior deviation" in words


def test_figures_are_the_numbers(shown: Path) -> None:
    from plotly.graph_objects import Figure

    plots, held, body = data_of(shown, "plots"), arrays(), body_of(shown)
    assert list(plots) == ["plot-s0-0-0", "plot-s0-1-0", *(f"plot-s0-3-{p}" for p in range(3)), "plot-s0-5-0"]
    for plot in plots.values():
        Figure(json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plot))))  # refuses unknown properties
        for name in re.findall(r'"var\((--[\w-]+)\)"', json.dumps(plot)):
            assert body.count(f"{name}:") >= 2, name  # light and dark
    curve, flat = plots["plot-s0-0-0"]["data"]
    assert (curve["x"], curve["y"]) == ([1, 10, 100], [1e-2, 1e-4, 1e-6])
    assert curve["error_y"]["array"] == [1e-3, 1e-5, 1e-7]
    assert (flat["line"]["dash"], flat["mode"]) == ("dash", "lines")
    line, dots = plots["plot-s0-1-0"]["data"]
    np.testing.assert_allclose(dots["x"], held["network"].ravel(), rtol=1e-4)
    np.testing.assert_allclose(dots["y"], held["rebuilt"].ravel(), rtol=1e-4)
    assert line["x"] == line["y"] == [min(dots["x"]), max(dots["x"])]
    regions, *classes = plots["plot-s0-3-0"]["data"]
    np.testing.assert_array_equal(regions["z"], held["regions"])
    assert regions["x"] == regions["y"] == [-1.6, -0.8, 0, 0.8, 1.6]
    assert sum(len(c["x"]) for c in classes) == 6
    signed, *_, ring = plots["plot-s0-3-2"]["data"]
    np.testing.assert_allclose(signed["z"], held["values"][1], rtol=1e-4)
    assert signed["zmin"] == -signed["zmax"]
    np.testing.assert_allclose([ring["x"][0], ring["y"][0]], held["points"][4], rtol=1e-4)
    assert plots["plot-s0-5-0"]["data"][0]["mode"] == "markers"


def test_images_and_tables(shown: Path, tmp_path: Path) -> None:
    body, words = body_of(shown), words_of(shown)
    assert body.count('src="data:image/png;base64,') == 4
    assert body.count('class="other"') == 1
    assert "≠ 2 +2.5" in words
    assert "A dashed frame with ≠" in words
    assert "By rule" in words
    assert "Means." in words
    assert "<summary>Folded</summary>" in body
    assert not re.search(r"\b(None|nan|null|Undefined)\b", words)
    plain = results()
    plain["sections"][0]["items"] = [plain["sections"][0]["items"][4]]
    for image in plain["sections"][0]["items"][0]["cases"][0]["strips"][0]["images"]:
        image["other"] = False
    assert "dashed" not in words_of(written(tmp_path, plain))


def test_same_files_same_bytes(shown: Path, tmp_path: Path) -> None:
    assert written(tmp_path).read_bytes() == shown.read_bytes()


def test_hostile_texts_are_text(tmp_path: Path) -> None:
    def hostile(value: Any, key: str = "") -> Any:
        kept = ("kind", "format", "scale", "array", "colours", "dash", "style", "points", "labels", "image", "terms")
        if key in kept or (key in ("x", "y") and isinstance(value, str) and value in arrays()):
            return value
        if isinstance(value, dict):
            return {k: hostile(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [hostile(v, key) for v in value]
        return HOSTILE if isinstance(value, str) else value

    told = hostile(copy.deepcopy(results()))
    for item, axes in ((0, AXES), (5, {"x": {"title": HOSTILE, "scale": "linear"}})):
        told["sections"][0]["items"][item] |= axes
    body = body_of(written(tmp_path, told))
    assert "<img src=x" not in body
    assert "<script>window.broken" not in body
    assert "&lt;script&gt;window.broken" in body
    assert body.count("</script>") == len(re.findall(r"<script\b", body))


def test_refusals(tmp_path: Path) -> None:
    told = results()
    told["sections"][0]["items"][1]["panels"][0]["x"] = "gone"
    with pytest.raises(
        Refused, match=r"figures\.safetensors: got no array 'gone'; expected all that results\.json names"
    ):
        written(tmp_path, told)
    told = results()
    told["sections"][0]["items"][0]["kind"] = "pie"
    with pytest.raises(Refused, match=r"item of a section: got 'pie'; expected lines, scatter, maps, images or table"):
        written(tmp_path, told)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("count", [3, 5, 6])
def test_the_legend_shows_the_marks_of_its_curves(count: int, ordered: bool) -> None:
    long = list(range(50))  # too many points to mark
    series = [{"name": f"n{i}", "x": [1, 2], "y": [i, i], "dash": "solid"} for i in range(count)]
    series[0] |= {"x": long, "y": long}
    series[2] |= {"dash": "dash"}
    item = {"kind": "lines", "title": "T", "reading": "R", **AXES, "ordered": ordered}
    entry = {"title": "S", "items": [item | {"panels": [{"heading": "", "series": series}]}]}
    figure = sections([entry], {})[0]["blocks"][0]["figures"][0][0]
    curves = figure.panels[0].data
    colors, marks = ([row[k] for row in figure.legend] for k in (1, 2))
    assert colors == [curve["line"]["color"] for curve in curves]
    assert (marks[0], marks[2], curves[0]["mode"]) == ("line", "dash", "lines")
    assert [marks[i] for i in range(count) if i not in (0, 2)] == [
        curve["marker"]["symbol"] for i, curve in enumerate(curves) if i not in (0, 2)
    ]
    assert len(set(colors)) == count
    assert ["ramp" in color for color in colors] == [ordered and i != 2 for i in range(count)]


def test_more_steps_than_the_ramp_has_colors_do_not_begin_again() -> None:
    series = [{"name": f"n = {2**i}", "x": [1, 2], "y": [i, i]} for i in range(8)]
    item = {"kind": "lines", "title": "T", "reading": "R", **AXES, "ordered": True}
    entry = {"title": "S", "items": [item | {"panels": [{"heading": "", "series": series}]}]}
    legend = sections([entry], {})[0]["blocks"][0]["figures"][0][0].legend
    places = [int(re.findall(r"\d", color)[0]) for _, color, _ in legend]
    assert (places, len(set(places))) == (sorted(places), 6)
    assert len({(color, mark) for _, color, mark in legend}) == 8
