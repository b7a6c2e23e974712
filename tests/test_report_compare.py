"""The page of `ntkit compare`, from made-up results: what it says on both sides of its rules, and in a browser."""

from __future__ import annotations

import copy
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from page_case import HOSTILE, Visit

from ntkit.base.files import write_json
from ntkit.commands.tables import print_comparison
from ntkit.report import compare_figures as figures
from ntkit.report import compare_text as text
from ntkit.report import render

STEPS = [0, 1, 8, 64]


def over(mean: float, half: float | None, n: int = 2) -> dict[str, Any]:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"n": n, "mean": mean, "low": low, "high": high}


def made_up(label: str = "lr 0.1", regression: bool = False) -> dict[str, Any]:
    """Two settings with two seeds each; the first network is better, beyond noise."""
    keys = ("network", "init", "after")
    runs = [
        {
            "name": f"{name} · seed {seed}", "folder": f"runs/{group}-{seed}", "group": group, "seed": seed,
            "repeats": False, "settings": {"lr": name[3:]}, "parameters": 1000, "steps": 64, "stop": "steps",
            "errors": {key: 0.02 + 0.1 * group + 0.01 * seed for key in keys}, "loss": {"train": 0.1, "test": 0.2},
            "alignment": {"init": 0.2, "after": 0.6}, "effective_rank": {"init": 2.0, "after": None},
            "spectrum": {key: {"index": [1, 2, 5, 20], "share": [0.5, 0.2, 0.1, 0.001]} for key in ("init", "after")},
            "along": {"steps": STEPS, "loss": [2.0, 1.0, 0.5, 0.1 + group], "distance": [0.0, 0.1, 0.2, 0.3],
                      "alignment_centered": [0.2, None, 0.4, 0.6]},
        }
        for group, name in enumerate((label, "lr 0.01"))
        for seed in (0, 1)
    ]  # fmt: skip
    groups = [
        {
            "label": name, "runs": [2 * i, 2 * i + 1], "seeds": 2,
            "errors": {key: over(0.025 + 0.1 * i, 0.03) for key in keys},
            "alignment": {key: over(0.4, 0.1) for key in ("init", "after")},
        }
        for i, name in enumerate((label, "lr 0.01"))
    ]  # fmt: skip
    over_seeds = [
        {"first": 0, "second": 1, "of": key, "difference": -0.1, "low": -0.15, "high": -0.05, "p": p, "p_holm": 2 * p}
        for key, p in (("network", 0.02), ("after", 0.03))
    ]
    more = {"of_second": 0.12} if regression else {"only_first": 1, "only_second": 9}
    between = [
        {"first": i, "second": j, "of": key, "difference": -0.1 if i < 2 <= j else 0.0, **more,
         "p": 1e-4 if i < 2 <= j else 1.0, "p_holm": 0.002 if i < 2 <= j else 1.0}
        for i in range(4) for j in range(i + 1, 4) for key in keys
    ]  # fmt: skip
    matrix = [[1.0 if i == j else 0.8 if i // 2 == j // 2 else 0.6 for j in range(4)] for i in range(4)]
    return {
        "format": 1, "kind": "comparison", "of": ["a", "b", "c", "d"], "points": 30, "title": "4 runs on digits",
        "data": {"name": "digits", "kind": "images", "classes": [] if regression else ["3", "8"],
                 "input_shape": [1, 8, 8], "normalization": "pixels / 16", "regression": regression, "hashes": ["ab"]},
        "test": {"common": 72, "of": [72]}, "machine": "ridge" if regression else "svm", "settings": ["lr"],
        "runs": runs, "groups": groups, "over_seeds": over_seeds, "between_runs": between,
        "kernels": {"init": matrix, "after": matrix, "own": [0.9, 0.8, None, 0.7], "points": 30,
                    "within": {"pairs": 2, "init": 0.8, "after": 0.8},
                    "same_start": {"pairs": 2, "init": 1.0, "after": 0.6},
                    "between": {"pairs": 2, "init": 0.6, "after": None}},
        "certificates": [{"what": "rebuilt", "value": 0.0, "tolerance": 0.0, "ok": True, "absent": {}}],
        "versions": {"now": {"ntkit": "1"}, "differ": {}}, "command": "ntkit compare a b c d --out e",
    }  # fmt: skip


def page_of(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir()
    write_json(folder / "results.json", results)
    return render(folder)


def words(page: Path) -> str:
    body = page.read_text().partition("<main")[2].partition("</main>")[0]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def changed(**places: Any) -> dict[str, Any]:
    """Made-up results with other numbers in the test of the network over seeds."""
    results = made_up()
    results["over_seeds"][0] |= places
    return results


# What it says


@pytest.mark.parametrize(
    ("p", "difference", "said"),
    [
        (0.0499, -0.1, "of the networks: the error of lr 0.1 is lower than that of lr 0.01, by 10.0 points"),
        (0.0499, 0.1, "of the networks: the error of lr 0.1 is higher than that of lr 0.01, by 10.0 points"),
        (0.05, -0.1, "no difference between the settings’ networks is beyond noise"),
        (1.0, 0.0, "no difference between the settings’ networks is beyond noise"),
    ],
)
def test_settings_are_judged_by_the_corrected_p_value(p: float, difference: float, said: str) -> None:
    assert said in text.lede(changed(p=p / 2, p_holm=p, difference=difference))


def test_no_test_no_verdict() -> None:
    results = changed(p=None, p_holm=None)
    assert "nothing can be said of the settings’ networks" in text.lede(results)
    assert text.verdict(results, results["over_seeds"][0], True) == "unknown"


def test_counts_of_differences(tmp_path: Path) -> None:
    found = words(page_of(tmp_path / "a", made_up()))
    assert "1 of 2 differences between settings is beyond noise over seeds." in found
    assert "12 of 18 differences between two single networks or machines are beyond noise" in found
    assert "Not one of them is between runs that differ in the seed alone." in found
    results = made_up()
    results["between_runs"][0] |= {"p_holm": 0.01, "difference": 0.2}  # of two seeds of one setting
    assert "1 of them is between runs that differ in the seed alone." in words(page_of(tmp_path / "b", results))


def test_squared_errors_need_a_smallest_difference() -> None:
    results = made_up(regression=True)
    test = next(t for t in results["between_runs"] if t["p_holm"] < 0.05)
    assert text.verdict(results, test, False) == "below"
    assert text.verdict(results, test | {"of_second": 10.1}, False) == "same"
    assert text.verdict(results, test | {"of_second": 9.9}, False) == "below"


def test_one_setting_only(tmp_path: Path) -> None:
    results = made_up()
    results |= {"runs": results["runs"][:2], "groups": results["groups"][:1], "over_seeds": [], "settings": []}
    results["between_runs"] = [t for t in results["between_runs"] if t["second"] < 2]
    for key in ("init", "after"):
        results["kernels"][key] = [row[:2] for row in results["kernels"][key][:2]]
    results["kernels"] |= {name: {"pairs": 0, "init": None, "after": None} for name in ("same_start", "between")}
    results["kernels"]["own"] = [0.9, 0.8]
    for run in results["runs"]:
        run["settings"] = {}
    found = words(page_of(tmp_path / "a", results))
    assert "1 setting with 2 seeds, on the same 72 test examples." in found
    assert "Differences between settings, over seeds" not in found
    assert "none but the seed" in found


def test_warnings() -> None:
    results = made_up()
    assert text.warnings(results) == []
    results["certificates"][0] |= {"ok": False, "value": 3.0, "absent": {"after": "overflow"}}
    results["runs"][1]["repeats"] = True
    results["runs"][2]["stop"] = "diverged"
    results["versions"]["differ"] = {"torch": ["2.1", "2.2"]}
    results["machine"] = "ridge"
    found = " ".join(text.warnings(results))
    for said in ("A check failed. rebuilt: 3, at most 0 expected.", "No kernel after training. overflow", "diverged",
                 "lr 0.1 · seed 1: same settings and same seed", "different torch: 2.1, 2.2",
                 "ridge regression is compared"):  # fmt: skip
        assert said in found


def test_the_terminal_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_of(tmp_path / "a", made_up())
    print_comparison(tmp_path / "a")
    printed = capsys.readouterr().out
    for said in ("lr 0.01", "1 of 2 differences between settings is beyond noise over seeds.", "report.html"):
        assert said in printed


# The file


@pytest.mark.parametrize("key", ["network", "init", "after"])
def test_a_mean_that_is_not_finite_is_a_dash(key: str, tmp_path: Path) -> None:
    """As that of a network whose outputs overflow on the test examples."""
    r = made_up(regression=True)
    r["groups"][0]["errors"][key] = over(0.0, None, 1) | {"mean": None}
    for run in r["runs"][:2]:
        run["errors"][key] = None
    assert "lr 0.1 –" in words(page_of(tmp_path / "page", r)) or key != "network"
    panels = text_of_panels(r)
    assert panels[key] == 1
    assert sum(panels.values()) == 5


def text_of_panels(r: dict[str, Any]) -> dict[str, int]:
    """Number of means that the figure of errors draws, by error."""
    (figure, _) = figures.errors(r)
    return {
        panel.id.removeprefix("plot-errors-"): sum(trace["marker"]["size"] == 12 for trace in panel.data)
        for panel in figure.panels
    }


def test_no_sign_before_zero() -> None:
    classes, numbers = ({"data": {"regression": regression}} for regression in (False, True))
    assert [text.shown(classes, v, True) for v in (-4e-4, 4e-4, -6e-4, 6e-4, -0.0)] == [
        "0.0",
        "0.0",
        "−0.1",
        "+0.1",
        "0.0",
    ]
    assert [text.shown(numbers, v, True) for v in (-1e-300, 1e300, 0.0)] == ["−1e−300", "+1e300", "0"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    hostile = made_up(HOSTILE)
    hostile["title"] = hostile["data"]["name"] = hostile["command"] = hostile["settings"][0] = HOSTILE
    for run in hostile["runs"]:
        run["folder"], run["settings"] = HOSTILE, {HOSTILE: HOSTILE}
    bare = made_up()
    for run in bare["runs"]:
        run |= {"along": None, "steps": None, "stop": None, "spectrum": {"init": None, "after": None}}
        run["errors"] = dict.fromkeys(run["errors"])
    for group in bare["groups"]:
        group["errors"], group["alignment"] = dict.fromkeys(group["errors"]), {"init": None, "after": None}
    bare |= {"over_seeds": [], "between_runs": []}
    for key in ("init", "after"):
        bare["kernels"][key] = [[None] * 4 for _ in range(4)]
    kinds = {"full": made_up(), "numbers": made_up(regression=True), "hostile": hostile, "bare": bare}
    return {name: page_of(place / name, results) for name, results in kinds.items()}


@pytest.mark.parametrize("which", ["full", "numbers", "hostile", "bare"])
def test_figures_are_valid_and_said_in_words(pages: dict[str, Path], which: str) -> None:
    from plotly.graph_objects import Figure

    content = pages[which].read_text()
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', content, re.S)[1])  # type: ignore[index]
    for plot in plots.values():
        Figure(json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plot))))  # refuses unknown properties
    drawn = re.findall(r'class="plot" id="([\w-]+)" role="img" aria-label="([^"]{20,})"', content)
    assert {name for name, _ in drawn} == set(plots)
    assert not re.search(r"\b(None|nan|NaN|null|undefined)\b", words(pages[which]))
    assert "<img" not in content.partition("<main")[2].partition("</main>")[0]


@pytest.mark.browser
@pytest.mark.parametrize("which", ["full", "numbers", "hostile", "bare"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_page_draws_without_a_complaint(
    chromium: Any, pages: dict[str, Path], which: str, width: int, scheme: str
) -> None:
    visit = Visit(chromium, pages[which], width, scheme)
    visit.check()
    page = visit.page
    drawn = page.evaluate("[...document.querySelectorAll('div.plot')].filter(p => p.querySelector('svg')).length")
    assert drawn == page.evaluate("document.querySelectorAll('div.plot').length") >= 3


def test_the_same_results_give_the_same_bytes(pages: dict[str, Path], tmp_path: Path) -> None:
    assert page_of(tmp_path / "again", copy.deepcopy(made_up())).read_bytes() == pages["full"].read_bytes()
