"""The report of `ntkit analyze`: what its template is filled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkit.report import analysis_figures as figures
from ntkit.report import analysis_text as text
from ntkit.report import explain_page, explain_text, invariance_text, judgments, kernel_figures, training_figures
from ntkit.report.images import thumbnail
from ntkit.report.limit_section import finding as limit_section_finding
from ntkit.report.limit_section import limit_section
from ntkit.report.page import page
from ntkit.report.words import percent

Arrays = Mapping[str, np.ndarray]
SECTION_NAMES = {
    "quality": "Quality",
    "along": "Training",
    "limit": "Limit",
    "invariances": "Invariances",
    "explained": "Explained",
}
"""As in the bar, for links."""


def analysis_page(results: dict[str, Any], arrays: Mapping[str, Arrays]) -> str:
    """Build the HTML text from ``results.json`` and images by stage (empty where the run kept none)."""
    along = training_figures.of_run(results["along"], results["training"]) if results["along"] else []
    along += figures.against_loss(results)
    pairs = {"machines": (figures.machines(results), text.machines(results))}
    pairs |= of_kernels(results, arrays)
    if (confused := kernel_figures.confusion(results)) is not None:
        pairs["confusion"] = confused
    if results["invariances"]:
        pairs["invariances"] = figures.invariances(results), invariance_text.invariances(results)
    explained = explained_part(results, arrays["explained"])
    curves = explained["along"] if explained else []
    limit = limit_section(results)
    compared_machines = {"machines": [m for m in results["machines"] if m["kernel"] in ("init", "after")]}
    return page(
        "analysis.html",
        [figure for figure, _ in (*along, *pairs.values(), *(limit["figures"] if limit else []), *curves)],
        title=results["title"],
        source="results.json",
        r=results,
        kind={"images": "images", "tokens": "sequences"}.get(results["data"]["kind"], "examples"),
        cards=[
            (
                key,
                f"{'Ridge' if by == 'ridge' else 'SVM'} on the {name} kernel, test error",
                percent(error),
                "no SVM: not both kernels separate the classes" if by == "ridge" else f"status: {m['status']}",
            )
            for key, name in (("after", "after"), ("init", "initial"))
            for m in results["machines"]
            if m["kernel"] == key
            for error, by in [text.shown_error(compared_machines, m)]
        ],
        compared=text.compared(results),
        rules=judgments.rules(False, used_rules(results)),
        qualities={q["kernel"]: q for q in results["quality"]},
        pairs=pairs,
        along=along,
        lede=text.answer(results),
        findings=(findings := text.in_short(results)),
        places=text.places(results, findings),
        names=SECTION_NAMES,
        warnings=text.warnings(results),
        checks=text.certificates(results),
        shared_labels=text.neighbors(results) if results["neighbors"] else "",
        neighbors=neighbor_rows(results, arrays["neighbors"]),
        examples=image_cases(results["invariances"] or {}, arrays["invariances"]),
        limit=limit,
        left_out=results.get("left_out", []),
        explained=explained,
        unexplained=text.unexplained(results),
    )


def of_kernels(results: dict[str, Any], arrays: Mapping[str, Arrays]) -> dict[str, tuple[Any, str]]:
    """Figures of the kernel matrices with their readings, those that the run kept arrays for."""
    found = {"gram": kernel_figures.gram_pictures(results, arrays), "spectrum": kernel_figures.spectra(results, arrays)}
    return {name: pair for name, pair in found.items() if pair is not None}


def used_rules(results: dict[str, Any]) -> set[str]:
    """Sections of this run that have rules of their own."""
    told = {
        "along": results["along"],
        "limit": limit_section_finding(results),
        "invariances": results["invariances"],
        "explained": "points" in (results.get("explained") or {}),
    }
    return {section for section, there in told.items() if there}


def explained_part(results: dict[str, Any], arrays: Arrays) -> dict[str, Any] | None:
    """Predictions explained, with their figures and sentences; None where there are none."""
    told = results.get("explained")
    if not told or "points" not in told:
        return None
    return {
        "points": explain_page.points_shown(told, arrays),
        "along": explain_page.curves_along(told["points"], told["steps_shown"]),
        "size": max(d["size"] for d in told["points"][0]["deletions"]),
        "what": explain_text.quantity(told),
        "trust": explain_text.trust(told),
        "agreement": explain_text.agreement(told),
        "checks": explain_text.checks(told),
    }


def neighbor_rows(results: dict[str, Any], arrays: Arrays) -> list[dict[str, Any]]:
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


def image_cases(told: dict[str, Any], arrays: Arrays) -> dict[str, Any] | None:
    """Test images with their transforms and cosines; None where the run kept no images."""
    if "images" not in arrays or "examples" not in told:
        return None
    cases = []
    for i, example in enumerate(told["examples"]):
        shown = [
            {
                "image": thumbnail(arrays["images"][i, 1 + j]), "caption": row["name"], "other": False,
                "value": _went(row["raw"]), "more": _went(row["centered"]),
            }
            for j, row in enumerate(example["cosines"])
        ]  # fmt: skip
        different = example["different"]
        text = f"with the other images, on average: {_went(different['raw'])}, centered {_went(different['centered'])}"
        cases.append({
            "image": thumbnail(arrays["images"][i, 0]),
            "text": f"{example['label']} · test {example['test_index']}; {text}",
            "strips": [{"heading": "cosine before → after training; below, centered", "images": shown}],
        })  # fmt: skip
    return {"title": "Images and their transforms", "cases": cases}


def _went(values: dict[str, float | None]) -> str:
    """Value before and after training.

    >>> _went({"init": 0.5, "after": None}), _went({"init": -0.5, "after": -0.001})
    ('0.50 → –', '−0.50 → 0.00')
    """
    texts = ["–" if (v := values.get(kernel)) is None else f"{round(v, 2) + 0:.2f}" for kernel in ("init", "after")]
    return " → ".join(texts).replace("-", "−")
