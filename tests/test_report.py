"""The report: pure, whole and safe. How a browser draws it: test_report_browser.py.

Long because each sentence that the report can say has its case.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_case
from page_case import body_of, data_of, words_of

from ntkit.base.checks import Refused
from ntkit.base.files import write_json
from ntkit.report import analysis_text as readings
from ntkit.report import draw, invariance_text, render


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(report_case.write(tmp_path_factory.mktemp("full"), *report_case.full()))


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(report_case.write(tmp_path_factory.mktemp("minimal"), report_case.minimal()))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(report_case.write(tmp_path_factory.mktemp("earlier"), *report_case.earlier()))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(report_case.write(tmp_path_factory.mktemp("hostile"), report_case.hostile()))


def _rows(stage: str) -> list[dict[str, Any]]:
    return report_case.full()[0][stage]["rows"]


# What is in the file


def test_results_appear(full: Path) -> None:
    words = words_of(full)
    results = report_case.full()[0]
    for machine in results["machines"]:
        assert machine["label"] in words
        assert f"{machine['support']} of {machine['n']}" in words
        assert f"{100 * machine['test_error']['value']:.1f} ± {100 * machine['test_error']['error']:.1f} %" in words
    for row in results["invariances"]["rows"]:
        assert f"{row['after']['value']:.3f} ± {row['after']['error']:.3f}" in words
        assert row["parameters"] in words
        centered = row["centered"]["after"]
        assert f"{centered['value']:.2f} ± {centered['error']:.2f}".replace("-", "−") in words
    assert "two different images mean over all pairs 0.52 ± 0.02 centered −0.00520 ± 0.00010 0.31 ± 0.02" in words
    for row in results["quality"]:
        assert f"{row['alignment']:.3f}" in words
    for value in results["similarity"].values():
        assert f"{value:.3f}" in words
    for check in results["certificates"]:
        assert check["what"] in words
    assert "3.1e-15" in words
    assert "1e-10" in words
    for text in (results["reproduce"]["command"], results["data"]["hash"], results["data"]["normalization"]):
        assert text in words
    assert "Conv2d(1, 16" in words
    assert "38,282 parameters" in words


def test_every_figure_has_title_reading_and_text_alternative(full: Path) -> None:
    body, plots = body_of(full), data_of(full)
    blocks = re.findall(r"<figure\b.*?</figure>", body, re.DOTALL)
    assert len(blocks) == 19
    for block in blocks:
        assert re.search(r"<h3>[^<]+</h3>\s*<p class=\"reading\">[^<]{20,}</p>", block), block[:200]
    drawn = re.findall(r'class="plot" id="([\w-]+)" role="img" aria-label="([^"]{20,})"', body)
    assert {name for name, _ in drawn} == set(plots)


def test_curves_are_the_results(full: Path) -> None:
    along, plots = report_case.full()[0]["along"], data_of(full)
    steps = [0.5, *along["steps"][1:]]
    last = {trace["name"]: trace for trace in plots["plot-eigenvalues"]["data"]}
    assert last["λ<sub>3</sub>"]["y"] == [row[2] for row in along["eigenvalues"]]
    assert last["λ<sub>3</sub>"]["x"] == steps
    assert not any("learning rate" in name for name in last)
    axis = plots["plot-eigenvalues"]["layout"]["xaxis"]
    assert dict(zip(axis["tickvals"], axis["ticktext"], strict=True))[0.5] == "0"
    for name in ("target", "output", "residual"):
        drawn = {trace["name"]: trace["y"] for trace in plots[f"plot-energy-{name}"]["data"]}
        for i, k in enumerate(along["energy_ks"]):
            assert drawn[f"top {k}"] == [row[i] for row in along[f"energy_{name}"]]
    shares = plots["plot-spectrum"]["data"][1]["y"]
    assert shares == pytest.approx([100 * v / along["trace"][-1] for v in along["eigenvalues"][-1]])


def test_figures_are_valid_plotly(full: Path) -> None:
    from plotly.graph_objects import Figure

    for plot in data_of(full).values():
        colours = re.findall(r'"var\((--[\w-]+)\)"', json.dumps(plot))
        style = full.read_text(encoding="utf-8")
        assert colours
        for scheme in re.findall(r":root(?:\[data-theme=\"dark\"\])? \{[^}]*\}", style):
            assert not [name for name in colours if f"{name}:" not in scheme]
        Figure(json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plot))))  # refuses unknown properties


def test_thumbnails_are_the_arrays(full: Path) -> None:
    from PIL import Image

    stages = report_case.full()[1]
    arrays = stages["neighbors"]
    body = body_of(full)
    body, _, explained = body.partition('<section id="explained">')
    body, cosines = body[body.index('id="neighbors"') :], body[: body.index('id="neighbors"')]
    found = re.findall(r'<img class="thumb" src="data:image/png;base64,([^"]+)" alt="([^"]+)"', body)
    assert len(found) == 6 * 11
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, _ in found]
    np.testing.assert_array_equal(pixels[11], arrays["test"][1, :, :, 0])
    np.testing.assert_array_equal(pixels[11 + 1 + 2], arrays["init"][1, 2, :, :, 0])
    np.testing.assert_array_equal(pixels[11 + 6 + 4], arrays["after"][1, 4, :, :, 0])
    found = re.findall(r'<img class="thumb" src="data:image/png;base64,([^"]+)" alt="([^"]+)"', cosines)
    assert [name for _, name in found[6:]] == ["test image", *(r["name"] for r in _rows("invariances"))]
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, _ in found]
    np.testing.assert_array_equal(pixels, stages["invariances"]["images"].reshape(12, 8, 8))
    found = re.findall(r'<img class="thumb" src="data:image/png;base64,([^"]+)" alt="([^"]+)"', explained)
    assert len(found) == 2 * 21
    for data, name in found:
        image, index = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), int(re.findall(r"\d+", name)[0])
        array = stages["explained"]["test" if name.startswith("test") else "train"]
        np.testing.assert_array_equal(image, array[index - 40 if name.startswith("test") else index, :, :, 0])


def test_colour_thumbnails_keep_their_colours(tmp_path: Path) -> None:
    from PIL import Image

    results, arrays = report_case.full()
    colour = {name: np.repeat(value, 3, axis=-1) for name, value in arrays["neighbors"].items()}
    colour["test"][0, 2, 3] = (250, 10, 90)
    text = body_of(render(report_case.write(tmp_path, results, {"neighbors": colour})))
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', text)[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((3, 2)) == (250, 10, 90)


def test_other_labels_are_marked_inwords(full: Path) -> None:
    rows = report_case.full()[0]["neighbors"]["rows"]
    other = sum(n["label"] != row["label"] for row in rows for key in ("init", "after") for n in row[key])
    assert other > 0
    assert body_of(full).count('aria-label="other label"') == other
    assert "✗ network says 8" in words_of(full)


def test_same_results_same_bytes(full: Path, tmp_path: Path) -> None:
    again = render(report_case.write(tmp_path, *report_case.full()))
    assert again.read_bytes() == full.read_bytes()
    assert not list(tmp_path.glob("*.ntkit-part"))


# Alone and safe


def test_self_contained(full: Path) -> None:
    text, body = full.read_text(encoding="utf-8"), body_of(full)
    assert len(re.findall(r"\* plotly\.js v\d", text)) == 1
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', body)
    assert policy
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == "'unsafe-inline'"
    assert "http" not in policy[1]
    assert "connect-src" not in rules
    assert not re.findall(r'(?:src|srcset|poster|action)="(?!data:)[^"]*"', body)
    assert not re.findall(r"url\(|@import", body)
    links = re.findall(r'<(\w+)[^>]*\bhref="(https?://[^"]+)"', body)
    assert {tag for tag, _ in links} == {"a"}
    assert len(re.findall(r"https?://", body)) == len(links)
    start, end = body.index('id="definitions"'), body.index('id="reproduce"')
    assert all(start < m.start() < end for m in re.finditer(r"https?://", body))


def test_hostile_names_are_text(hostile: Path) -> None:
    body = body_of(hostile)
    assert "<img src=x" not in body
    assert "<script>window.broken" not in body
    assert "&lt;script&gt;window.broken" in body
    assert body.count("</script>") == len(re.findall(r"<script\b", body))
    for name in ("plot-slopes-raw", "plot-loss-cosines-raw"):
        texts = [trace[key] for trace in data_of(hostile)[name]["data"] for key in ("name", "hovertemplate", "text")
                 if key in trace]  # fmt: skip
        assert any("onerror" in str(text) for text in texts)
        assert not re.search(
            r"<(?!br>|extra></extra>)", json.dumps(texts).replace("</extra>", "").replace("<extra>", "")
        )


def test_nulls_become_sentences(minimal: Path) -> None:
    words, plots = words_of(minimal), data_of(minimal)
    assert list(plots) == ["plot-machines"]
    assert plots["plot-machines"]["data"][0]["x"] == [25.0]
    assert len(plots["plot-machines"]["data"]) == 4  # ridge where the kernel does not separate
    assert "error_x" not in plots["plot-machines"]["data"][0]
    assert "the weights were loaded, so there was no training to follow" in words
    assert "defined for images, and these data are vectors" in words
    assert "there is nothing to show for vectors" in words
    assert "not separable no SVM exists; see ridge" in words
    assert "✗ inaccurate Compute the kernel in float64." in words
    assert "1 check failed: symmetry." in words
    assert "✗ no" in words
    assert "an operation without a rule" in words
    assert not re.search(r"\b(None|nan|NaN|null)\b", words)


def test_images_not_measured_say_so(tmp_path: Path) -> None:
    results = report_case.full()[0]
    for key in ("along", "invariances", "neighbors", "against_loss"):
        results[key] = None
    words = words_of(render(report_case.write(tmp_path, results)))
    assert "not followed along training in this run" in words
    assert "invariances were not measured in this run" in words
    assert "neighbors were not looked up in this run" in words


def test_undefined_values_along_training(tmp_path: Path) -> None:
    results = report_case.full()[0]
    results["training"]["stop"] = "diverged"
    results["training"]["losses"] = [2.3, None, None]
    along = results["along"]
    for key, value in along.items():
        if key == "test_error":
            along[key] = [report_case.number(None)] * len(value)
        elif key not in ("steps", "energy_ks") and isinstance(value, list):
            along[key] = [[None] * len(row) if isinstance(row, list) else None for row in value]
    words = words_of(render(report_case.write(tmp_path, results)))
    assert "Training diverged" in words
    assert not re.search(r"\b(None|nan|NaN)\b", words)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"results\.json: got no such file; expected a JSON file"):
        render(tmp_path)
    weights = tmp_path / "best.pt"
    weights.touch()
    with pytest.raises(Refused, match=r"best.pt: got a file; .* make one: ntkit analyze --weights FILE"):
        render(weights)
    start = tmp_path / "run.json"
    for told, message in [
        ({"format": "ntkit-trajectory"}, "got a recorded trajectory; .* Follow its kernel: ntkit track"),
        ({"format": 1, "identity": {}}, "got a run that is not complete; .* go on with: ntkit analyze --from"),
        ({"kind": "study"}, "got a folder without results; .* End it first"),
    ]:
        write_json(start, told)
        with pytest.raises(Refused, match=message):
            render(tmp_path)
    start.unlink()
    results = report_case.minimal()
    results["format"] = 2
    with pytest.raises(Refused, match=r"got format 2, of a newer ntkit; expected format 1, .*Upgrade ntkit"):
        render(report_case.write(tmp_path, results))
    results["format"] = 1
    results["neighbours"] = results.pop("neighbors")
    with pytest.raises(Refused, match=r"got keys of an earlier version; expected format 1\. .* or repeat the run"):
        render(report_case.write(tmp_path, results))
    assert not (tmp_path / "report.html").exists()


# What it says


def _paired(**pairs: tuple[int, int]) -> dict[str, Any]:
    """Results in which, of 360 test examples, so many are wrong by the after kernel alone, and by the other alone."""
    results = report_case.full()[0]
    told = [
        report_case.paired(other, "svm", *pairs.get(other, (3, 4)), 360) for other in ("init", "conjugate", "network")
    ]
    results["comparisons"]["compared"] = told
    return results


@pytest.mark.parametrize(
    ("pair", "lead"),
    [
        ((2, 18), "Training made a better kernel."),
        ((18, 2), "Training made a worse kernel."),
        ((0, 5), "No difference beyond noise between the kernels before and after training."),  # p = 1/16
        ((0, 6), "Training made a better kernel."),  # p = 1/32
        ((0, 0), "No difference beyond noise between the kernels before and after training."),
    ],
)
def test_findings_follow_the_paired_test(pair: tuple[int, int], lead: str) -> None:
    results = _paired(init=pair)
    assert readings.in_short(results)[0][0] == lead
    assert (
        f"by the after kernel alone: {pair[0]}; by the kernel at initialization alone: {pair[1]} ("
        in (readings.in_short(results)[0][1])
    )
    beyond = "beyond noise" in readings.answer(results)
    assert beyond == lead.startswith("No difference")


def test_nothing_is_claimed_without_a_paired_test() -> None:
    results = _paired(init=(0, 300))
    results["comparisons"]["compared"].pop(0)
    assert "cannot be compared" in readings.in_short(results)[0][0]
    assert "not comparable" in readings.answer(results)
    assert "not comparable" in readings.machines(results)


@pytest.mark.parametrize(
    ("name", "after", "said"),
    [
        ("shift", 0.9, "more invariant to shift"),
        ("shift", 0.3, "less invariant to shift"),
        ("shift", 0.62, "no different, beyond noise, for shift"),
        ("quadrant swap", 0.3, "more global for quadrant swap"),
        ("patch shuffle", 0.9, "less global for patch shuffle"),
    ],
)
def test_invariance_directions(name: str, after: float, said: str) -> None:
    row = {"name": name, "init": report_case.number(0.6, 0.1), "after": report_case.number(after, 0.1)}
    row["change"] = report_case.number(after - 0.6, 0.012)
    assert said in invariance_text.invariances({"invariances": {"rows": [row]}})


def _cosine_case(baseline: tuple[float, float], **after: float) -> dict[str, Any]:
    """Cosines that were 0.6 before training and are `after` it, raw and centered alike."""
    rows = []
    for name, value in after.items():
        row = {"name": name.replace("_", " "), "init": report_case.number(0.6, 0.01)}
        row["after"] = report_case.number(value, 0.01)
        rows.append(row | {"centered": {key: row[key] for key in ("init", "after")}})
    ends = {key: report_case.number(v, 0.01) for key, v in zip(("init", "after"), baseline, strict=True)}
    return {"invariances": {"rows": rows, "different": ends}}


@pytest.mark.parametrize(
    ("baseline", "after", "said"),
    [
        ((0.8, 0.5), {"shift": 0.4, "zoom": 0.7}, "The change for shift is not larger, beyond noise, than that one"),
        (
            (0.8, 0.5),
            {"shift": 0.32},
            "The change for shift is not larger, beyond noise, than that one",
        ),  # 0.28, beyond noise smaller
        ((0.8, 0.78), {"shift": 0.4}, "The changes beyond noise are larger than that one, or go the other way."),
        ((0.5, 0.8), {"shift": 0.4}, "The changes beyond noise are larger than that one, or go the other way."),
        ((0.3, 0.5), {"shift": 0.7, "quadrant_swap": 0.7}, "The change for shift and quadrant swap is not larger"),
    ],
)
def test_a_change_no_larger_than_that_of_different_images_is_said(baseline, after, said) -> None:
    text = invariance_text.invariances(_cosine_case(baseline, **after))
    assert said in text
    assert f"{baseline[0]:.3f} ± 0.010 → {baseline[1]:.3f} ± 0.010" in text
    assert "By centered cosines it is" in text


def test_where_nothing_changed_nothing_is_compared() -> None:
    text = invariance_text.invariances(_cosine_case((0.8, 0.5), shift=0.61))
    assert "no different, beyond noise, for shift" in text
    assert "change for" not in text
    assert "The changes" not in text


def test_the_lead_does_not_count_what_different_images_do_as_well() -> None:
    results = report_case.full()[0]
    results["invariances"]["rows"] = _cosine_case((0, 0), shift=0.4, zoom=0.5)["invariances"]["rows"]
    leads = [lead for lead, _ in readings.in_short(results)]
    assert leads[-2] == "Cosines changed no more, beyond noise, than those of two different images."  # fell by 0.21
    assert leads[-1] == "Influence can be used here."
    results["invariances"]["rows"] = _cosine_case((0, 0), shift=0.4, zoom=0.7)["invariances"]["rows"]
    assert readings.in_short(results)[-2][0] == "Training changed what the kernel ignores."


def test_each_finding_leads_to_its_section(full: Path) -> None:
    results = report_case.full()[0]
    findings = readings.in_short(results)
    places = readings.places(results, findings)
    assert places == ["quality", "quality", "along", "along", "limit", "invariances", "explained"]
    body = body_of(full)
    for place in places:
        assert f'class="to" href="#{place}"' in body
        assert f'<section id="{place}">' in body
    for name in re.findall(r'href="#([\w-]+)"', body):
        assert f'id="{name}"' in body, name
    results["along"] = results["invariances"] = None
    assert set(readings.places(results, readings.in_short(results))) == {"quality", "limit", "explained"}


def test_runs_of_earlier_versions_have_their_report(earlier: Path) -> None:
    words, plots = words_of(earlier), data_of(earlier)
    assert "plot-slopes-raw" in plots
    assert not [name for name in plots if "loss-" in name or "centered" in name]
    assert "The kernel after training is more invariant to shift and rotation" in words
    section = words.split("What is it invariant to?")[1].split("What does it think is alike?")[0]
    assert "two different images" not in section.lower()
    assert not re.search(r"\b(None|nan|NaN)\b", words)


def test_slopes_are_the_cosines_and_the_baseline_is_dashed(full: Path) -> None:
    told, plots = report_case.full()[0]["invariances"], data_of(full)
    for form in ("raw", "centered"):
        drawn = {trace["name"]: trace for trace in plots[f"plot-slopes-{form}"]["data"] if "name" in trace}
        for row in [*told["rows"], told["different"]]:
            entry = row if form == "raw" else row["centered"]
            assert drawn[row["name"]]["x"] == [0, 1]
            assert drawn[row["name"]]["y"] == [entry["init"]["value"], entry["after"]["value"]]
            assert drawn[row["name"]]["error_y"]["array"] == [entry["init"]["error"], entry["after"]["error"]]
            assert (drawn[row["name"]]["line"]["dash"] == "dash") == (row is told["different"])


def _section(path: Path, heading: str, following: str) -> str:
    return words_of(path).split(heading)[1].split(following)[0]


def test_three_predictions_explained(full: Path) -> None:
    told = report_case.full()[0]["explained"]
    words = _section(full, "Why did it say that, and would it change?", "Can the numbers be trusted?")
    assert "Influence can be used here: in a trial with all weights changed at random by 5 %, it missed" in words
    assert "by 6 % of their size (at most 50 % is allowed; metasmoothness 0.62)" in words
    assert "Test 40: 3 (right, most confident)" in words
    assert "✗ network says 9 , it is 8 Margin +2.5: −2.2 before training, training examples +4.8" in words
    assert "the sum misses it by 3e-6" in words
    for row in ("5 most helpful by accounting −0.5 −0.25", "5 most helpful by influence −1.5 −1.2"):
        assert words.count(row) == 2
    assert words.count("5 at random, mean of 3 sets −2.5 −2.2 (sd 0.12)") == 2
    assert "Influence of the strongest example differs from finite differences" in words
    assert "missed the real change of the margin by 0.25 on average" in words
    drawn = {trace["name"]: trace for trace in data_of(full)["plot-along-41-influence"]["data"]}
    for side in ("helped", "hurt"):
        for e in told["points"][1]["influence"][side]:
            assert drawn[f"training example {e['index']}, {e['label']}"]["y"] == e["along"]


def test_sentences_instead_of_pictures(tmp_path: Path) -> None:
    results = report_case.full()[0]
    point = results["explained"]["points"][0]
    point["text"] = point["accounting"]["helped"][2]["text"] = "a <small> film"
    page = render(report_case.write(tmp_path, results))
    section = body_of(page).partition('<section id="explained">')[2].partition("</section>")[0]
    assert section.count("a &lt;small&gt; film") == 2
    assert section.count('class="near sentences pair"') == 2
    assert "<img" not in section


def test_predictions_that_cannot_be_explained(full: Path, minimal: Path, earlier: Path, tmp_path: Path) -> None:
    results, ends = report_case.full()[0], ("Why did it say that, and would it change?", "Can the numbers be trusted?")
    results["explained"] = {"unexplained": "layer 'x' <b> draws random numbers"}
    why = render(report_case.write(tmp_path, results))
    assert _section(why, *ends).strip() == "Not here: layer 'x' <b> draws random numbers."
    assert "weights were loaded, so there was no training to replay" in _section(minimal, *ends)
    assert "no prediction was explained in this run" in _section(earlier, *ends)
    assert "Metasmoothness" in words_of(full)
    assert "Metasmoothness" not in words_of(why)


def test_curves_against_the_loss(full: Path) -> None:
    told, plots, words = report_case.full()[0]["against_loss"], data_of(full), words_of(full)
    losses = [s["loss"] for s in told["snapshots"]]
    kernel, network = plots["plot-loss-errors"]["data"]
    assert kernel["x"] == network["x"] == losses
    assert kernel["y"] == [100 * s["ridge_error"]["value"] for s in told["snapshots"]]  # one kernel does not separate
    assert "Not every kernel separates the points, so there is no SVM to compare." in words
    drawn = {trace["name"]: trace for trace in plots["plot-loss-cosines-centered"]["data"]}
    assert drawn["zoom"]["y"] == [s["cosines"][2]["centered"]["value"] for s in told["snapshots"]]
    assert drawn["two different images"]["y"] == [-0.02] * 6
    assert drawn["two different images"]["line"]["dash"] == "dash"
    assert "Raw cosines are highest at loss 0.021 for shift, rotation, zoom, quadrant swap and patch shuffle." in words
    assert "Two different images (dashed): 0.52 → 0.32." in words
    assert "lowest 1.7 ± 0.7 % at loss 0.021" in words


def test_against_the_loss_without_images(tmp_path: Path) -> None:
    results, _ = report_case.full()
    for snapshot in results["against_loss"]["snapshots"]:
        snapshot.update(cosines=[], different=None, ridge_error=report_case.number(None, None, "inaccurate"))
    results["against_loss"]["samples"] = 0
    path = render(report_case.write(tmp_path, results))
    assert "plot-loss-errors" in data_of(path)
    assert "plot-loss-cosines-raw" not in data_of(path)
    assert "There are too few errors for a curve." in words_of(path)
    assert not re.search(r"\b(None|nan|NaN)\b", words_of(path))


def test_sharpness_stands_beside_a_bound_only_where_there_is_one(full: Path, tmp_path: Path) -> None:
    assert "the bound of stability" in words_of(full)
    bounds = [t for t in data_of(full)["plot-sharpness"]["data"] if t["name"] == "stable below"]
    assert [set(t["y"]) for t in bounds] == [{40.0}]
    results = report_case.full()[0]
    results["along"]["sharpness_bound"] = [None] * 11
    path = render(report_case.write(tmp_path, results))
    assert "No bound of stability is known for this optimizer." in words_of(path)
    assert [t["name"] for t in data_of(path)["plot-sharpness"]["data"]] == ["sharpness"]


def test_ticks_cover_any_range() -> None:
    for values in (
        [1e-12, 1e9],
        [3.0, 3.0],
        [None, 0.0],
        [0.02, 0.9],
        [5e-7, 6e-7],
        [1.0, 1.00001],
        [0.642, 0.694],
        [3, 80],
    ):
        axis = draw.log_axis("", values)
        low, high = axis["range"]
        assert low < high
        assert all(10 ** (low - 1e-9) <= tick <= 10 ** (high + 1e-9) for tick in axis["tickvals"])
        assert 3 <= len(axis["tickvals"]) == len(set(axis["ticktext"])) <= 14
    assert draw.log_axis("", [109, 325])["ticktext"] == ["150", "200", "300"]
    assert draw.log_axis("", [109, 140])["ticktext"] == ["110", "120", "130", "140"]
    assert draw.log_axis("", [0.642, 0.694])["ticktext"] == ["0.64", "0.65", "0.66", "0.67", "0.68", "0.69"]
    assert draw.log_axis("", [1e-9, 1e-2])["ticktext"][0] == "10⁻⁹"


def test_a_machine_that_is_not_optimal_is_no_evidence():
    results, _ = report_case.full()
    for m in results["machines"]:
        m["status"] = "inaccurate"
    assert "not comparable" in readings.answer(results)
    assert "cannot be compared" in readings.in_short(results)[1][0]
    assert len([text for text in readings.warnings(results) if "inaccurate" in text]) == 3


def test_a_kernel_that_does_not_separate_is_a_finding_with_ridge_in_its_place(tmp_path: Path) -> None:
    results, arrays = report_case.full()
    nothing = report_case.number(None, None, "SVM not separable")
    results["machines"][0] |= {"status": "not separable", "advice": "Use KernelRidge.", "gap": 1.0, "support": 51,
                               "test_error": nothing, "train_error": nothing}  # fmt: skip
    results["comparisons"]["compared"][0] = report_case.paired("init", "ridge", 2, 18, 360)
    assert readings.warnings(results) == []
    found = dict(readings.in_short(results))
    lead = "The tangent kernel at initialization does not separate the training classes."
    assert "ridge regression stands in its place: test error 6.9" in found[lead]
    assert "Test error of ridge regression: kernel at initialization 6.9" in found["Training made a better kernel."]
    assert "The test error of ridge regression on the kernel after training is lower than" in readings.answer(results)
    path = render(report_case.write(tmp_path, results, arrays))
    words, plots = words_of(path), data_of(path)
    assert "Ridge on the initial kernel, test error 6.9" in words
    assert "51 of" not in words
    assert "✗" not in words.split("What does it think is alike?")[0]
    assert "initialization (ridge)" in plots["plot-machines"]["layout"]["yaxis"]["ticktext"]


def test_a_network_that_hardly_trained_is_said_first() -> None:
    results = report_case.full()[0]
    results["network"]["fit"]["value"] = 0.0744  # a loss of 0.642 where a constant has 0.694
    results["certificates"][0]["ok"] = False
    first, second = readings.warnings(results)
    assert first.startswith("The network hardly fits its training set: all that follows is about such a network.")
    assert "7.4\u00a0% below that of the best constant prediction; less than 20\u00a0% is little." in first
    assert "failed" in second
    results["network"]["fit"]["value"] = 0.21
    assert len(readings.warnings(results)) == 1
    results["training"]["stop"] = "diverged"
    assert readings.warnings(results)[0].startswith("Training diverged")


def test_a_change_within_the_wander_of_its_curve_is_no_turn() -> None:
    results = report_case.full()[0]
    curve = [0.106, 0.12, 0.06, 0.08, 0.09, 0.1, 0.1, 0.11, 0.11, 0.12, 0.136]
    results["along"]["alignment_centered"] = curve
    leads = dict(readings.in_short(results))
    text = leads["Alignment with the task changed no more than it wanders along training."]
    assert "from 0.106 to 0.136; its largest move the other way was 0.06." in text
    results["along"]["alignment_centered"] = [v + 0.1 * i for i, v in enumerate(curve)]
    assert "The kernel turned towards the task." in dict(readings.in_short(results))
    results["along"] = None  # weights were loaded: no curve, no judgment
    assert "Alignment with the task, before and after training." in dict(readings.in_short(results))


def test_matrices_spectra_and_confusions_are_those_of_the_results(full: Path) -> None:
    arrays, plots, words = report_case.full()[1], data_of(full), words_of(full)
    drawn = np.array(plots["plot-gram-after"]["data"][0]["z"])
    np.testing.assert_allclose(drawn, arrays["gram-after"]["picture"], rtol=1e-4)
    assert plots["plot-gram-init"]["layout"]["xaxis"]["ticktext"] == [str(c) for c in range(10)]
    assert plots["plot-gram-init"]["layout"]["xaxis"]["tickvals"] == [2 * c + 0.5 for c in range(10)]
    assert "of one class, before → after: 0.9 → 0.9; of two classes: 0.5 → 0.5" in words
    spectrum = {trace["name"]: trace for trace in plots["plot-full-spectrum"]["data"]}
    values = arrays["gram-after"]["eigenvalues"]
    assert spectrum["after kernel"]["x"] == list(range(1, 21))
    np.testing.assert_allclose(spectrum["after kernel"]["y"], 100 * values / values.sum(), rtol=1e-3)
    assert plots["plot-confusion-network"]["data"][0]["text"] == report_case.confusion(9)
    assert "network: 9, most often 8 taken for 3 (9 of 36)" in words
    errors = plots["plot-errors"]["data"][0]
    assert errors["y"] == [100 * e["value"] for e in report_case.full()[0]["along"]["test_error"]]
