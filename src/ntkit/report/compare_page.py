"""The report of `ntkit compare`: what its template is filled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ntkit.base.files import read_json, write_page
from ntkit.base.integrity import damaged
from ntkit.base.results_file import ComparisonOfRuns
from ntkit.base.run_files import described, results_of_kind, understood
from ntkit.report import compare_figures as figures
from ntkit.report import compare_text as text
from ntkit.report.compare_judgments import OVER_SEEDS
from ntkit.report.page import page
from ntkit.report.words import counted, plain

KIND, COMPARE_FORMAT = "comparison", 1
_SAID = {"below": "yes, lower", "above": "yes, higher", "same": "no", "unknown": "not judged"}


def render_comparison(folder: str | Path) -> Path:
    """Write ``FOLDER/report.html`` from the ``results.json`` of `ntkit compare`; the same results give the same bytes.

    Returns
    -------
    Path
        The file written, whole or not at all.

    Raises
    ------
    Refused
        When the folder holds no comparison.

    Examples
    --------
    >>> render_comparison("no-such-folder")
    Traceback (most recent call last):
    ...
    ntkit.Refused: no-such-folder/results.json: got no such file; expected a JSON file. Check the folder's name.
    """
    folder = Path(folder)
    fix = "Name a folder that ntkit compare wrote, with this version of ntkit."
    results = results_of_kind(folder, KIND, COMPARE_FORMAT, fix)
    described(folder / "results.json", results, ComparisonOfRuns)
    if (start := folder / "compare.json").exists():
        told = read_json(start)
        if not isinstance(told, dict) or told.get("of") != results["of"]:
            raise damaged(folder / "results.json", "the results of another comparison than compare.json")
    with understood(folder / "results.json"):
        html = _page(results)
    write_page(folder / "report.html", html)
    return folder / "report.html"


def _page(r: dict[str, Any]) -> str:
    found = {"errors": figures.errors(r), "kernels": figures.kernels(r), "spectra": figures.spectra(r)}
    pairs = {name: pair for name, pair in found.items() if pair is not None}
    along = figures.along(r)
    return page(
        "compared.html",
        [figure for figure, _ in (*pairs.values(), *along)],
        title=r["title"],
        source="results.json",
        r=r,
        lede=_together(text.lede(r)),
        findings=[(lead, _together(said)) for lead, said in text.in_short(r)],
        warnings=text.warnings(r),
        checks=text.checks(r),
        cards=_cards(r),
        measures={key: f"{name[0].upper()}{name[1:]}" for key, name in text.measures(r).items()},
        unit=text.unit(r),
        measured=text.unit(r).removesuffix(", %").capitalize(),
        pairs=pairs,
        along=along,
        tones=figures.tones(r),
        groups=_groups(r),
        of_settings=[
            (*row, _SAID[text.verdict(r, test, True)])
            for row, test in zip(figures.table_of_groups(r, r["over_seeds"]), r["over_seeds"], strict=True)
        ],
        of_runs=_of_runs(r),
        judged=sum(test["p"] is not None for test in r["over_seeds"]),
        runs=_runs(r),
        names=[name.replace("_", " ") for name in r["settings"]],
        rules=[("Over seeds", OVER_SEEDS.rule), ("Between two networks", text.rule_of_runs(r).rule)],
    )


def _together(said: str) -> str:
    """No line break before the dots of a setting's name."""
    return said.replace(" · ", "\u00a0· ")


def _cards(r: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The numbers to see first: (whose color, name, value, small print)."""
    cards = []
    for of_groups, name, tests in (
        (True, "Differences between settings beyond noise, over seeds", r["over_seeds"]),
        (False, "Differences between single runs beyond noise", r["between_runs"]),
    ):
        judged = sum(test["p"] is not None for test in tests)
        value = f"{len(text.beyond(r, of_groups))} of {judged}" if judged else "–"
        small = "corrected for as many tests" if judged else "takes two settings with two seeds each"
        cards.append(("network", name, value, small))
    for name, which in text.PAIRS.items():
        if (pair := r["kernels"][name])["pairs"]:
            value = " → ".join(text.cosine(pair[key]) for key in ("init", "after"))
            title = f"Cosine of kernels, before → after training: {which}"
            cards.append(("after", title, value, f"mean of {counted(pair['pairs'], 'pair')}; 1: the same"))
    return cards[:4]


def _groups(r: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of errors, one per group."""
    return [
        {
            "label": group["label"],
            "seeds": group["seeds"],
            "errors": [text.with_interval(r, group["errors"][key]) for key in text.measures(r)],
            "alike": _alike(r, group["runs"]),
            "alignment": " → ".join(
                "–" if (found := group["alignment"][key]) is None else plain(found["mean"], 2)
                for key in ("init", "after")
            ),
        }
        for group in r["groups"]
    ]


def _alike(r: dict[str, Any], runs: list[int]) -> str:
    """Mean cosine of the kernels of two seeds of a group, before and after training."""
    pairs = [(i, j) for i in runs for j in runs if i < j and not (r["runs"][i]["repeats"] or r["runs"][j]["repeats"])]
    texts = []
    for key in ("init", "after"):
        known = [value for i, j in pairs if (value := r["kernels"][key][i][j]) is not None]
        texts.append(text.cosine(sum(known) / len(known) if known else None))
    return " → ".join(texts) if pairs else "–"


def _of_runs(r: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the tests of single runs on the same test examples."""
    rows: list[tuple[str, ...]] = []
    for test in r["between_runs"]:
        first, second = (r["runs"][test[side]]["name"] for side in ("first", "second"))
        alone = f"{test['only_first']}, {test['only_second']}" if "only_first" in test else ""
        p = "–" if test["p"] is None else f"{plain(test['p'], 2)}, {plain(test['p_holm'], 2)}"
        said = _SAID[text.verdict(r, test, False)]
        measured = text.measures(r)[test["of"]]
        rows.append((first, second, measured, text.shown(r, test["difference"], True), alone, p, said))
    return rows


def _runs(r: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of runs."""
    return [
        run
        | {
            "shown": list(run["settings"].values()),
            "errors_shown": [text.shown(r, run["errors"][key]) for key in text.measures(r)],
            "rank": " → ".join(plain(run["effective_rank"][key]) for key in ("init", "after")),
            "turn": " → ".join(plain(run["alignment"][key], 2) for key in ("init", "after")),
            "moved": text.cosine(r["kernels"]["own"][i]),
        }
        for i, run in enumerate(r["runs"])
    ]
