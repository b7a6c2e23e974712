"""The report of `ntkit analyze`: what its template is filled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkit.report import analysis_figures as figures
from ntkit.report import analysis_text as text
from ntkit.report import training_figures
from ntkit.report.images import thumbnail
from ntkit.report.page import page


def analysis_page(results: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Build the HTML text from ``results.json`` and the neighbors' images (empty where the run kept none)."""
    along = training_figures.of_run(results["along"], results["training"]) if results["along"] else []
    pairs = {"machines": (figures.machines(results), text.machines(results))}
    if results["invariances"]:
        pairs["invariances"] = figures.invariances(results), text.invariances(results)
    return page(
        "analysis.html",
        [figure for figure, _ in (*along, *pairs.values())],
        title=results["title"],
        source="results.json",
        r=results,
        kind={"images": "images", "tokens": "sequences"}.get(results["data"]["kind"], "examples"),
        by_kernel={m["kernel"]: m for m in results["machines"]},
        qualities={q["kernel"]: q for q in results["quality"]},
        pairs=pairs,
        along=along,
        lede=text.answer(results),
        findings=text.in_short(results),
        warnings=text.warnings(results),
        checks=text.certificates(results),
        shared_labels=text.neighbors(results) if results["neighbors"] else "",
        neighbors=_neighbors(results, arrays),
    )


def _neighbors(results: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of the neighbor table with their thumbnails as data URIs ("" where the run kept no images)."""

    def image(key: str, *place: int) -> str:
        return thumbnail(arrays[key][place]) if key in arrays else ""

    rows = []
    for i, row in enumerate((results["neighbors"] or {}).get("rows", [])):
        groups = []
        for key, heading in (("init", "before training"), ("after", "after training")):
            nearest: list[dict[str, Any]] = [
                {**near, "image": image(key, i, j), "same": near["label"] == row["label"]}
                for j, near in enumerate(row[key])
            ]
            groups.append({"key": key, "heading": heading, "nearest": nearest, "same": sum(n["same"] for n in nearest)})
        rows.append({**row, "image": image("test", i), "groups": groups})
    return rows
