"""The page of `ntkit explain`: predictions with the examples behind them, and what happened without these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.files import read_arrays_and_metadata, write_page
from ntkit.base.integrity import damaged
from ntkit.base.run_files import results_of_kind, understood
from ntkit.report import draw, explain_text
from ntkit.report.draw import Figure, Panel
from ntkit.report.images import thumbnail
from ntkit.report.page import page
from ntkit.report.words import plain

KIND, EXPLAIN_FORMAT = "explanation", 1
_MARKS = {
    "accounting": ("most helpful by accounting", "var(--init)", "circle"),
    "influence": ("most helpful by influence", "var(--after)", "diamond"),
    "random": ("at random", "var(--network)", "x"),
}


def render_explanation(folder: str | Path) -> Path:
    """Write ``FOLDER/explain.html`` from what `ntkit explain` left there. The same files give the same bytes.

    Returns
    -------
    Path
        The file written, whole or not at all.

    Raises
    ------
    Refused
        When the folder holds no explanation, or a damaged one.

    Examples
    --------
    >>> render_explanation("no-such-run")
    Traceback (most recent call last):
    ...
    ntkit.Refused: no-such-run/results.json: got no such file; expected a JSON file. Check the folder's name.
    """
    folder = Path(folder)
    results = results_of_kind(folder, KIND, EXPLAIN_FORMAT, "Name a folder that ntkit explain wrote.")
    with understood(folder / "results.json"):
        text = _page(results, _pictures(folder, results))
    write_page(folder / "explain.html", text)
    return folder / "explain.html"


def _pictures(folder: Path, results: dict[str, Any]) -> Mapping[str, np.ndarray]:
    """Images of test points and training examples; nothing for other data."""
    path, digest = folder / "images.safetensors", results.get("images")
    if digest is None:
        return {}
    if not path.exists():
        raise damaged(path, "no such file")
    arrays, metadata = read_arrays_and_metadata(path)
    if metadata.get("sha256") != digest:
        raise damaged(path, "not the file that results.json was written with")
    return arrays


def _page(r: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    figure, along = _figure(r), curves_along(r["points"], r["training"]["steps_shown"])
    return page(
        "explained.html",
        [figure, *(curves for curves, _ in along)],
        title=f"Who taught it that? {r['title']}",
        source="results.json",
        lede=explain_text.trust(r),
        r=r,
        kind={"images": "images", "tokens": "sequences"}.get(r["data"]["kind"], "examples"),
        cards=_cards(r),
        points=points_shown(r, arrays),
        what=explain_text.quantity(r),
        checks=explain_text.checks(r),
        figure=figure,
        along=along,
        agreement=explain_text.agreement(r),
    )


def _cards(r: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The numbers to see first: (role of the color, name, value, small print)."""
    told = [d for point in r["points"] for d in point["deletions"]]
    missed = explain_text.amount(sum(abs(d["predicted"] - d["real"]) for d in told) / len(told))
    size = explain_text.amount(sum(abs(d["real"]) for d in told) / len(told))
    residual = max(abs(point["residual"]) for point in r["points"])
    miss = r["influence"]["miss"]
    missed_in_trial = "–" if miss is None else plain(miss, 2)  # None: a run of the trial diverged
    trusted = "of their size; influence can be used" if r["influence"]["trusted"] else "do not trust the influence"
    error = explain_text.finite_differences(r)
    beside = "relative; runs in float64" if error else "no check: the run jumps at kinks"
    if explain_text.without_influence(r):
        error, beside = None, "no check: every influence is 0"
    return [
        ("after", "Changes missed in a trial, weights changed by 5 %", missed_in_trial, trusted),
        (
            "init",
            f"Accounting: largest residual of a {explain_text.quantity(r)}",
            plain(residual, 2),
            "sum over all training examples",
        ),
        ("after", "Influence against finite differences", error or "–", beside),
        ("network", "Predicted change against the real one", missed, f"mean miss; changes: {size}"),
    ]


def points_shown(r: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Test points with thumbnails, sentences and rows of their tables, for the template."""
    place = {int(index): i for i, index in enumerate(arrays.get("train_index", ()))}
    points = []
    for j, told in enumerate(r["points"]):
        methods, what = [], explain_text.quantity(told)
        for key, role, other in (("accounting", "init", "influence"), ("influence", "after", "accounting")):
            strips = []
            for side, heading in (("helped", f"raised the {what}"), ("hurt", f"lowered the {what}")):
                examples = [
                    {
                        **e,
                        "image": thumbnail(arrays["train"][place[e["index"]]]) if arrays else "",
                        "same": what == "prediction" or e["label"] == told["predicted"],
                        "score": explain_text.signed(e["score"]),
                        "there": f"#{e['rank_there']}",
                    }
                    for e in told[key][side]
                ]
                strips.append({"heading": heading, "there": f"#: rank by {other}", "examples": examples})
            methods.append({"name": key, "role": role, "strips": strips})
        rows = list(explain_text.removals(told, r["random_sets"]))
        image = thumbnail(arrays["test"][j]) if arrays else ""
        told = told | {
            "image": image,
            "what": what,
            "methods": methods,
            "rows": rows,
            "sum": explain_text.margin_as_sum(told),
        }
        points.append(told)
    return points


def curves_along(points: Sequence[dict[str, Any]], steps: Sequence[int]) -> list[tuple[Figure, str]]:
    """For each point: sums of the strongest examples' shares up to each step, by both methods; and what they say."""
    return [_along(point, steps) for point in points]


def _along(point: dict[str, Any], steps: Sequence[int]) -> tuple[Figure, str]:
    panels, texts = [], []
    for method in ("accounting", "influence"):
        data = [
            draw.line(steps, e["along"], draw.safe(f"training example {e['index']}, {e['label']}"), *look)
            | {"line": {"color": look[0], "width": 1.8, "dash": dash}}
            for side, look, dash in (("helped", ("var(--good)",), "solid"), ("hurt", ("var(--bad)",), "dash"))
            for e in point[method][side]
        ]
        layout = draw.layout(draw.step_axis(steps[-1]), draw.axis("sum up to the step"))
        panels.append(Panel(f"plot-along-{point['test_index']}-{method}", f"By {method}", data, layout))
        for e in point[method]["helped"][:1]:
            half = next(step for step, value in zip(steps, e["along"], strict=True) if value >= e["along"][-1] / 2)
            texts.append(f"by {method}, training example {e['index']}, had half of its sum by step {half:,}")
    reading = "What the strongest examples had added up to each step."
    reading += f" The strongest {'; the strongest '.join(texts)}." if texts else ""
    what = explain_text.quantity(point)
    legend = [(f"raised the {what}", "var(--good)", "line"), (f"lowered the {what}", "var(--bad)", "dash")]
    name, title = f"along-{point['test_index']}", "Along training"
    return Figure(name, title, f"Curves against the step. {reading}", panels, legend, wide=True), reading


def _figure(r: dict[str, Any]) -> Figure:
    """Change of what is explained that influence predicts against the real one, for every removal."""
    what = explain_text.quantity(r)
    told = [(point, d) for point in r["points"] for d in point["deletions"]]
    values = [d[key] for _, d in told for key in ("predicted", "real")] + [0.0]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 1.0
    ends = [low - pad, high + pad]
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "name": "equal", "hoverinfo": "skip",
         "line": {"color": "var(--faint)", "width": 1.2, "dash": "dash"}}
    ]  # fmt: skip
    for method, (name, color, symbol) in _MARKS.items():
        own = [(point, d) for point, d in told if d["method"] == method]
        texts = [f"test {point['test_index']}: {d['size']} {name}" for point, d in own]
        data.append({
            "type": "scatter", "mode": "markers", "x": [d["predicted"] for _, d in own],
            "y": [d["real"] for _, d in own], "name": name, "customdata": texts,
            "marker": {"color": color, "symbol": symbol, "size": 9},
            "hovertemplate": "%{customdata}<br>predicted %{x:.3g}, real %{y:.3g}<extra></extra>",
        })  # fmt: skip
    layout = draw.layout(
        draw.axis(f"change of the {what} that influence predicts", range=ends), draw.axis("real change", range=ends),
        height=380,
    )  # fmt: skip
    legend = [(name, color, symbol) for name, color, symbol in _MARKS.values()]
    legend.append(("prediction equal to the real change", "var(--faint)", "dash"))
    label = f"Scatter plot of real changes against predicted ones. {explain_text.agreement(r)}"
    panels = [Panel("plot-removals", "", data, layout)]
    return Figure("removals", f"Predicted and real change of the {what}", label, panels, legend, wide=True)
