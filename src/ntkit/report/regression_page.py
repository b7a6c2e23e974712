"""The report of `ntkit analyze` for a regression: what its template is filled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ntkit.report import analysis_figures, analysis_text, invariance_text, judgments, training_figures
from ntkit.report import regression_figures as figures
from ntkit.report import regression_text as text
from ntkit.report.analysis_page import (
    SECTION_NAMES,
    Arrays,
    explained_part,
    image_cases,
    neighbor_rows,
    of_kernels,
    used_rules,
)
from ntkit.report.limit_section import limit_section
from ntkit.report.page import page
from ntkit.report.words import measure

_COLUMNS = (
    ("test", "r2", "Test R²"), ("test", "rmse", "Test RMSE"), ("test", "mae", "Test MAE"), ("train", "r2", "Train R²"),
)  # fmt: skip


def regression_page(results: dict[str, Any], arrays: Mapping[str, Arrays]) -> str:
    """Build the HTML text from ``results.json`` and images by stage (empty where the run kept none)."""
    along = training_figures.of_run(results["along"], results["training"]) if results["along"] else []
    pairs = {"machines": (figures.machines(results), text.machines(results))}
    pairs |= of_kernels(results, arrays)
    if results["comparisons"]:
        pairs["predictions"] = figures.scatter(results), text.predictions(results)
    if results["invariances"]:
        pairs["invariances"] = analysis_figures.invariances(results), invariance_text.invariances(results)
    qualities = {q["kernel"]: q for q in results["quality"]}
    aligned = [qualities.get(kernel, {}).get("alignment_centered") for kernel in ("init", "after")]
    losses = [measure(results["network"][f"{part}_loss"]) for part in ("test", "train")]
    own = {"label": "network itself", "certificate": f"test loss {losses[0]}, train loss {losses[1]}"}
    predictions = [("network", results["network"] | own)]
    predictions += [(m["kernel"], m | {"label": f"ridge, {m['label']}"}) for m in results["machines"]]
    names = results["data"]["targets"]["names"]
    by_target = [
        (
            target,
            entry["label"],
            text.interval(own["r2"], text.R2),
            text.interval(own["rmse"]),
            text.interval(own["mae"]),
        )
        for place, target in enumerate(names)
        for _, entry in predictions
        for own in [entry["test"]["targets"][place]]
    ]
    explained = explained_part(results, arrays["explained"])
    curves = explained["along"] if explained else []
    limit = limit_section(results)
    return page(
        "regression.html",
        [figure for figure, _ in (*along, *pairs.values(), *(limit["figures"] if limit else []), *curves)],
        title=results["title"],
        source="results.json",
        r=results,
        kind={"images": "images", "tokens": "sequences"}.get(results["data"]["kind"], "examples"),
        by_kernel={m["kernel"]: m for m in results["machines"]},
        qualities=qualities,
        alignments=" → ".join("–" if value is None else f"{value:.2f}" for value in aligned),
        pairs=pairs,
        along=along,
        lede=text.answer(results),
        findings=(findings := text.in_short(results)),
        places=analysis_text.places(results, findings),
        names=SECTION_NAMES,
        warnings=text.warnings(results),
        checks=analysis_text.certificates(results),
        shared_labels=text.neighbors(results) if results["neighbors"] else "",
        neighbors=neighbor_rows(results, arrays["neighbors"]),
        examples=image_cases(results["invariances"] or {}, arrays["invariances"]),
        limit=limit,
        left_out=results.get("left_out", []),
        explained=explained,
        unexplained=analysis_text.unexplained(results),
        parts=text.Parts(results),
        predictions=predictions,
        columns=_COLUMNS,
        by_target=by_target if len(names) > 1 else [],
        compared=text.compared(results),
        rules=judgments.rules(True, used_rules(results)),
        draws=f"{results['comparisons']['draws']:,}" if results["comparisons"] else "",
        ridges=results["comparisons"]["ridges"] if results["comparisons"] else None,
    )
