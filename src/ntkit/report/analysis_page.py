"""The report of `ntkit analyze`: what its template is filled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkit.report import analysis_figures as figures
from ntkit.report import analysis_text as readings
from ntkit.report.images import thumbnail
from ntkit.report.page import page


def analysis_page(results: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Build the HTML text from ``results.json`` and the neighbours' images (empty where the run kept none)."""
    along = figures.along(results) if results["along"] else []
    shown = {figure.id: figure for figure in along}
    shown["machines"] = figures.machines(results)
    if results["invariances"]:
        shown["invariance"] = figures.invariances(results)
    read = {
        "machines": readings.machines(results),
        "certificates": readings.certificates(results),
        "invariance": readings.invariances(results) if results["invariances"] else "",
        "neighbours": readings.neighbours(results) if results["neighbours"] else "",
    }
    if along:
        names = ("losses", "eigenvalues", "alignment", "distance", "energy", "size", "spectra")
        read |= {figure.id: getattr(readings, name)(results) for figure, name in zip(along, names, strict=True)}
    return page(
        "analysis.html",
        shown.values(),
        title=results["title"],
        source="results.json",
        r=results,
        kind={"images": "images", "vectors": "examples", "tokens": "sequences"}.get(
            results["data"]["kind"], "examples"
        ),
        by_kernel={m["kernel"]: m for m in results["machines"]},
        qualities={q["kernel"]: q for q in results["quality"]},
        shown=shown,
        read=read,
        along=along,
        lede=readings.answer(results),
        findings=readings.in_short(results),
        warnings=readings.warnings(results),
        neighbours=_neighbours(results, arrays),
    )


def _neighbours(results: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of the neighbour table with their thumbnails as data URIs ("" where the run kept no images)."""
    rows = []
    for i, row in enumerate((results["neighbours"] or {}).get("rows", [])):
        groups = []
        for key, heading in (("init", "before training"), ("after", "after training")):
            found: list[dict[str, Any]] = [
                {**near, "image": _thumbnail(arrays, key, i, j), "same": near["label"] == row["label"]}
                for j, near in enumerate(row[key])
            ]
            groups.append({"key": key, "heading": heading, "found": found, "same": sum(n["same"] for n in found)})
        rows.append({**row, "image": _thumbnail(arrays, "test", i), "groups": groups})
    return rows


def _thumbnail(arrays: Mapping[str, np.ndarray], key: str, *place: int) -> str:
    if key not in arrays:
        return ""
    return thumbnail(arrays[key][place])
