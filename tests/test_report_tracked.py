"""The pages of a tracking and of a study: from their files alone, whole, safe, and drawn."""

from __future__ import annotations

import base64
import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_case import HOSTILE, Visit, body_of, data_of, words_of

from ntkit.base.checks import Refused
from ntkit.base.files import write_arrays, write_json
from ntkit.base.run_files import tracking_id
from ntkit.report import images, render, render_study, render_tracked

STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10000]


# Examples as `track` and a study write them, with plausible numbers


def settings() -> dict[str, Any]:
    return {
        "format": "ntkit-track", "points": 1024, "k": 50, "outputs": "trace", "outputs_of_model": 1, "kernel": "dense",
        "loss": "half_squared", "data": "5f1d0c0f9b7a43b2e6d1c8a45be07f21", "initial": "0a1b2c3d4e5f60718293a4b5c6d7",
    }  # fmt: skip


def records(depth: int = 4) -> list[dict[str, Any]]:
    """One output: everything that `track` can say of it."""
    found, k = [], 50
    for i, step in enumerate(STEPS):
        t = i / (len(STEPS) - 1)
        values = 900.0 * (1 + 22 * t**1.5) * np.arange(1, k + 1) ** (-1.5 + 0.3 * t)
        trace = float(values.sum() * 1.05)
        rate = 0.1 if step < 2048 else 0.05
        sharp = float(values[0] / 1024)
        reach = np.arange(1, k + 1) / k
        known = k if i else 44  # the last eigenvalues at first are rounding
        found.append({
            "step": step, "loss": float(0.5 * np.exp(-3 * t) + 1e-3), "learning_rate": rate,
            "eigenvalues": [*values[:known].tolist(), *[None] * (k - known)], "residual": 3e-13, "trace": trace,
            "tail": trace - float(values.sum()), "effective_rank": trace / float(values[0]),
            "condition": float(values[0] / values[known - 1]), "status": "converged",
            "energy_target": [*(1 - (1 - reach[:known]) ** (1 + 9 * t)).tolist(), *[None] * (k - known)],
            "energy_output": [*(1 - 0.4 * (1 - reach[:known]) ** (2 + 9 * t)).tolist(), *[None] * (k - known)],
            "energy_residual": [*(reach[:known] ** (1 + 2 * t)).tolist(), *[None] * (k - known)],
            "alignment": 0.2 + 0.5 * t, "alignment_centered": 0.1 + 0.7 * t**1.3,
            "layer_trace": {f"layers.{d}": trace / depth for d in range(depth)},
            "layer_alignment": {f"layers.{d}": 0.1 + 0.6 * t**1.3 + 0.05 * d for d in range(depth)},
            "distance": 0.4 * t**2, "change": 8 * t, "cka": 1 - 0.6 * t**2,
            "velocity": None if i == 0 else 1e-2 / (1 + step), "change_error": 0.0,
            "sharpness": sharp, "stable_learning_rate": 2 / sharp, "sharpness_bound": 2 / rate,
            "first_order": {"cosine": 1 - 1e-3 * t, "relative_error": 1e-3 + 4e-2 * t, "norm_ratio": 1 + 1e-2 * t},
        })  # fmt: skip
    return found


def pictures(T: int = len(STEPS), q: int = 8, size: int = 24) -> dict[str, np.ndarray]:
    """Waves that turn towards the target as training goes on; their signs jump about."""
    v, u = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    target = 0.5 + 0.5 * np.tanh(4 * (0.5 - u**2 - (v - 0.2) ** 2)) * (0.6 + 0.4 * np.sin(7 * u))
    waves = [
        np.cos(np.pi * (a * u + b * v)) for a, b in ((0, 1), (1, 0), (1, 1), (1, -1), (2, 0), (0, 2), (2, 1), (3, 0))
    ]
    functions = np.empty((T, q, size, size), np.float32)
    draw = np.random.default_rng(0)
    for t in range(T):
        part = t / max(1, T - 1)
        for i in range(q):
            functions[t, i] = (1 - part) * waves[i] + part * (target - 0.5) * np.cos(i * u)
            functions[t, i] *= draw.choice([-1, 1]) / np.linalg.norm(functions[t, i])
    part = np.linspace(0, 1, T)[:, None, None]
    return {
        "target": target.astype(np.float32), "steps": np.array(STEPS[:T], np.int64),
        "output": (part * target + (1 - part) * 0.4).astype(np.float32), "eigenfunctions": functions,
        "bandwidth": np.linspace(0.5, 4, T * q).reshape(T, q),
    }  # fmt: skip


def write_track(folder: Path, found: list[dict], arrays: dict | None = None, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "track.json", settings() | changed)
    for record in found:
        place = {"tracking": tracking_id(settings() | changed)}
        write_json(folder / f"step-{record['step']:08d}.json", record | place)
    if arrays is not None:
        write_arrays(folder / "images.safetensors", arrays)
    return folder


def study() -> dict[str, Any]:
    draw = np.random.default_rng(1)
    t = np.linspace(0, 1, len(STEPS))

    def series(mean: np.ndarray, error: float) -> dict[str, Any]:
        return {"mean": mean.tolist(), "error": (error * mean * (0.5 + draw.random(len(t)))).tolist()}

    groups = []
    for depth in (2, 4, 6):
        bound = np.where(np.array(STEPS) < 2048, 20.0, 40.0 if depth > 2 else 30.0)
        sharp = series((0.2 + 0.15 * depth) * (1 + 20 * t**1.5), 0.06)
        sharp["mean"][3] = sharp["error"][3] = None
        groups.append({
            "name": f"depth {depth}", "seeds": [0, 1, 2], "steps": STEPS, "energy_k": 20, "series": {
                "energy_target": series(0.3 + 0.1 * depth * t, 0.03), "energy_output": series(0.9 + 0.02 * t, 0.01),
                "energy_residual": series(0.6 - 0.05 * depth * t, 0.08), "sharpness": sharp,
                "bound": {"mean": bound.tolist(), "error": [0.0] * len(t)}, "loss": series(np.exp(-depth * t), 0.1),
                "lambda_1": series(1024 * (1 + 20 * t), 0.05), "first_order_error": series(1e-3 * (1 + 40 * t), 1.2),
                "alignment_centered": series(0.2 + 0.1 * depth * t, 0.05), "distance": series(4e-4 * t, 0.1),
            },
        })  # fmt: skip
    return {
        "format": 1, "kind": "study", "name": "kopitkov2019", "title": "Spectrum alignment of the tangent kernel",
        "paper": {"authors": "Dmitry Kopitkov and Vadim Indelman", "year": 2020, "reference": "arXiv 1910.08720",
                  "title": "Neural Spectrum Alignment: Empirical Study"},
        "scale": "quick", "command": "ntkit study kopitkov2019 --scale quick --out runs/kopitkov",
        "about": "Fully connected networks of depth 2, 4 and 6 learn an image as a function of pixel coordinates by "
        "full-batch gradient descent; their tangent kernel is followed on all training points.",
        "departures": ["The paper does not state the seed; three are used.", "256 hidden units instead of 1024."],
        "claims": [
            {"claim": "The top eigenvectors align with the target along training.", "number": "energy in the top 20: "
             "0.41 → 0.97 (depth 6)", "holds": True, "how": "mean over 3 seeds, first against last snapshot"},
            {"claim": "Deeper networks align more.", "number": "0.4, 0.6, 0.9", "holds": True, "how": "depth 2, 4, 6"},
            {"claim": "The residual lies in the bottom of the spectrum.", "number": "0.3", "holds": False, "how": "-"},
            {"claim": "The same holds for Adam.", "number": "not run", "holds": None, "how": "left out at this scale"},
        ],
        "settings": {"learning_rate": 0.1, "widths": [256, 256], "decay": {"at": 2048, "by": 0.5}},
        "versions": {"ntkit": "0.1.0", "torch": "2.13.0"},
        "curves": [{"title": "Depth", "groups": groups}],
        "runs": [
            {"name": "depth-2-seed-0", "title": "Depth 2, seed 0", "track": "runs/depth-2-seed-0/track"},
            {"name": "depth-6-seed-0", "title": "Depth 6, seed 0", "track": "runs/depth-6-seed-0/track"},
        ],
    }  # fmt: skip


def write_study(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_track(folder / "runs" / "depth-2-seed-0" / "track", records(2))
    render_tracked(write_track(folder / "runs" / "depth-6-seed-0" / "track", records(6), pictures()))
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_tracked(write_track(tmp_path_factory.mktemp("track"), records(), pictures()))


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_study(write_study(tmp_path_factory.mktemp("study"), study()))


# Both pages


@pytest.mark.parametrize("which", ["full", "studied"])
def test_self_contained(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    text, body = path.read_text(encoding="utf-8"), body_of(path)
    assert len(re.findall(r"\* plotly\.js v\d", text)) == 1
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', body)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'unsafe-inline'")
    assert not re.findall(r'(?:src|srcset|poster|action)="(?!data:)[^"]*"', body)
    assert not re.findall(r"url\(|@import", body)
    links = re.findall(r'<(\w+)[^>]*\bhref="(https?://[^"]+)"', body)
    assert {tag for tag, _ in links} == {"a"}
    assert len(re.findall(r"https?://", body)) == len(links)


@pytest.mark.parametrize("which", ["full", "studied"])
def test_figures_are_valid_and_said_inwords(which: str, request: pytest.FixtureRequest) -> None:
    from plotly.graph_objects import Figure

    path = request.getfixturevalue(which)
    plots, body = data_of(path, "plots"), body_of(path)
    for plot in plots.values():
        Figure(json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plot))))  # refuses unknown properties
        for name in re.findall(r'"var\((--[\w-]+)\)"', json.dumps(plot)):
            assert body.count(f"{name}:") >= 2, name  # light and dark
    drawn = re.findall(r'class="plot" id="([\w-]+)" role="img" aria-label="([^"]{20,})"', body)
    assert {name for name, _ in drawn} == set(plots)
    for block in re.findall(r"<figure id.*?</figure>", body, re.DOTALL):
        assert re.search(r"<h3>[^<]+</h3>\s*<p class=\"reading\">[^<]{15,}</p>", block), block[:200]
    assert not re.search(r"\b(None|nan|NaN|null)\b", words_of(path))


def test_same_files_same_bytes(full: Path, studied: Path, tmp_path: Path) -> None:
    again = render(write_track(tmp_path / "track", records(), pictures()))
    assert (again.name, again.read_bytes()) == ("track.html", full.read_bytes())
    again = render(write_study(tmp_path / "study", study()))
    assert (again.name, again.read_bytes()) == ("report.html", studied.read_bytes())
    assert not list(tmp_path.rglob("*.ntkit-part"))


# A tracking


def test_curves_are_the_records(full: Path) -> None:
    plots, found = data_of(full, "plots"), records()
    sharp, bound = plots["plot-sharpness"]["data"]
    assert sharp["y"] == [r["sharpness"] for r in found]
    assert sharp["x"] == [0.5, *STEPS[1:]]
    assert bound["y"] == [r["sharpness_bound"] for r in found]
    assert (bound["line"]["dash"], bound["line"]["shape"]) == ("dash", "hv")
    for name, record in (("target", "energy_target"), ("output", "energy_output"), ("residual", "energy_residual")):
        drawn = {trace["name"]: trace["y"] for trace in plots[f"plot-energy-{name}"]["data"]}
        assert list(drawn) == [f"top {k}" for k in (1, 2, 5, 10, 20, 50)]
        assert drawn["top 20"] == [r[record][19] for r in found]
        first, last = plots[f"plot-against-k-{name}"]["data"]
        assert (first["y"], last["y"]) == (found[0][record], found[-1][record])
    layers = {trace["name"]: trace["y"] for trace in plots["plot-layers"]["data"]}
    assert layers["layers.2"] == [r["layer_alignment"]["layers.2"] for r in found]
    assert plots["plot-first-cosine"]["data"][0]["y"] == [r["first_order"]["cosine"] for r in found]
    assert plots["plot-condition"]["data"][0]["y"] == [r["condition"] for r in found]
    assert plots["plot-velocity"]["data"][0]["y"][0] is None


def test_what_it_says(full: Path) -> None:
    words = words_of(full)
    sharp = records()[-1]["sharpness"]
    assert f"ends at {sharp / 40:.2g} times the bound of stability; above it at none of 15 snapshots" in words
    assert "followed at 15 steps, 0 to 10,000: its largest eigenvalue grew 23-fold, from 900 to 20,700;" in words
    assert "first → last step: more than 44 → 11 for the targets" in words  # the others are rounding at first
    assert "largest residual 3e-13 of λ" in words


def test_images_are_the_arrays(full: Path) -> None:
    data, arrays = data_of(full, "images"), pictures()
    T, size = len(STEPS), 24
    assert (data["steps"], data["height"], data["width"]) == (STEPS, size, size)
    shown = np.frombuffer(base64.b64decode(data["functions"]), np.uint8).reshape(T, 6, size, size).astype(float)
    true = arrays["eigenfunctions"][:, :6]
    true = true / np.abs(true).max((2, 3), keepdims=True)
    sign = np.sign((true * (shown - 128)).sum((2, 3), keepdims=True))
    np.testing.assert_allclose((shown - 128) / 127, sign * true, atol=0.51 / 127)
    assert ((shown[1:] - 128) * (shown[:-1] - 128)).sum((2, 3)).min() > 0  # no jumps from sign to sign
    grey = np.frombuffer(base64.b64decode(data["output"]), np.uint8).reshape(T, size, size)
    target = np.frombuffer(base64.b64decode(data["target"]), np.uint8).reshape(size, size)
    assert (target.min(), target.max()) == (0, 255)
    np.testing.assert_array_equal(grey[-1], target)
    assert data["captions"][0][0] == "λ₁\u00a0=\u00a0900, 0.5\u00a0cycles"
    assert 'aria-label="Eigenfunction 6 at step 10000"' in body_of(full)
    assert re.search(
        r'<label for="snapshot">[^<]+</label>\s*<input type="range" id="snapshot" min="0" max="14"', body_of(full)
    )


def test_large_images_become_small(tmp_path: Path) -> None:
    arrays = pictures(T=3, q=2, size=200)
    found = images.viewer(write_track(tmp_path, [], arrays), {}, told={})
    assert found is not None
    assert (found["data"]["height"], found["data"]["width"], found["count"]) == (66, 66, 2)
    assert found["data"]["captions"][0][1].startswith("λ₂, ")


def test_what_is_absent_is_left_out(tmp_path: Path) -> None:
    """No targets, no loss, no trace, one snapshot; a kernel of one output's own."""
    bare = {"step": 0, "loss": None, "learning_rate": None, "eigenvalues": [3.0, None], "trace": None, "tail": None}
    page = render_tracked(write_track(tmp_path / "bare", [bare], loss=None, k=2))
    assert list(data_of(page, "plots")) == ["plot-eigenvalues"]
    words = words_of(page)
    assert "Does the kernel predict the next step?" not in words
    assert not re.search(r"\b(None|nan|null)\b", words)
    own = {"eigenvalues": [3.0, 1.0], "trace": 5.0, "alignment_centered": 0.3}
    found = [{"step": s, "distance": 0.0, "per_output": [own, own | {"eigenvalues": [None]}]} for s in (0, 1)]
    page = render_tracked(write_track(tmp_path / "own", found, outputs="diagonal", outputs_of_model=2))
    assert set(data_of(page, "plots")) == {"plot-tops", "plot-classes", "plot-distance"}


def test_dead_network(tmp_path: Path) -> None:
    dead = records()
    for record in dead[3:]:
        for name, value in record.items():
            if name != "step":
                record[name] = [None] * 50 if isinstance(value, list) else None
    words = words_of(render_tracked(write_track(tmp_path, dead)))
    assert not re.search(r"\b(None|nan|null)\b", words)


def test_more_layers_than_a_legend_holds(tmp_path: Path) -> None:
    page = render_tracked(write_track(tmp_path, records(depth=14)))
    block = re.search(r'<figure id="figure-layers".*?</figure>', body_of(page), re.DOTALL)
    assert block
    assert 'class="legend"' not in block[0]
    assert len(data_of(page, "plots")["plot-layers"]["data"]) == 14


def test_hostile_names_are_text(tmp_path: Path) -> None:
    found = records()
    for record in found:
        record["layer_alignment"] = {HOSTILE: 0.5}
    page = render_tracked(write_track(tmp_path / "track", found, pictures(), loss=HOSTILE, outputs=HOSTILE))
    results = study()
    for key in ("title", "about", "command", "scale"):
        results[key] = HOSTILE
    results["paper"] = dict.fromkeys(results["paper"], HOSTILE)
    results["claims"][0] |= {"claim": HOSTILE, "number": HOSTILE, "how": HOSTILE}
    results["departures"], results["settings"], results["versions"] = [HOSTILE], {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}
    results["curves"][0]["title"] = results["curves"][0]["groups"][0]["name"] = results["runs"][0]["title"] = HOSTILE
    results["runs"][0]["track"] = "javascript:alert(1)"
    for path in (page, render_study(write_study(tmp_path / "study", results))):
        body = body_of(path)
        assert "<img src=x" not in body
        assert "<script>window.broken" not in body
        assert "&lt;script&gt;window.broken" in body
        assert body.count("</script>") == len(re.findall(r"<script\b", body))
        assert 'href="javascript' not in body


# A study


def test_claims_and_runs(studied: Path) -> None:
    words, body = words_of(studied), body_of(studied)
    assert "2 of 4 claims hold here, 1 does not, 1 is not judged." in words
    assert (words.count("✓ holds"), words.count("✗ does not")) == (2, 1)
    for claim in study()["claims"]:
        assert claim["claim"] in words
        assert claim["number"] in words
    assert 'href="runs/depth-6-seed-0/track/track.html"' in body
    assert body.count("track.html") == 1  # the other run has no page
    assert "as functions on the input plane, with their eigenvalues, in one run: Depth 6, seed 0." in words
    for text in (*study()["departures"], study()["command"], '{"at": 2048, "by": 0.5}', "256, 256"):
        assert text in words


def test_curves_are_the_means(studied: Path, tmp_path: Path) -> None:
    plots, group = data_of(studied, "plots"), study()["curves"][0]["groups"][1]
    names = (
        "energy_target",
        "energy_output",
        "energy_residual",
        "sharpness",
        "lambda_1",
        "alignment_centered",
        "distance",
        "loss",
    )
    names = (*names, "first_order_error")
    assert list(plots) == [f"plot-0-{name}" for name in names]
    for name in names:
        series = group["series"][name]
        lines = {t["name"]: t for t in plots[f"plot-0-{name}"]["data"] if "name" in t}
        assert lines["depth 4"]["y"] == series["mean"]
    bands = [t for t in plots["plot-0-sharpness"]["data"] if t.get("fill") == "toself"]
    assert len(bands) == 6  # a missing snapshot cuts each band in two
    energy, mean = [t for t in plots["plot-0-energy_target"]["data"] if t.get("fill") == "toself"][1], group["series"]
    high = [m + e for m, e in zip(mean["energy_target"]["mean"], mean["energy_target"]["error"], strict=True)]
    assert energy["y"][: len(STEPS)] == high
    assert min(v for t in plots["plot-0-first_order_error"]["data"] for v in t["y"] if v is not None) > 0  # logarithmic
    bounds = [t for t in plots["plot-0-sharpness"]["data"] if t.get("name") == "2 / learning rate"]
    assert [t["line"]["dash"] for t in bounds] == ["dash"] * 3
    assert len({t["line"]["color"] for t in bounds}) == 3
    results = study()
    for group in results["curves"][0]["groups"]:
        group["series"]["bound"] = {"mean": [20.0] * len(STEPS)}
    alike = data_of(render_study(write_study(tmp_path, results)), "plots")["plot-0-sharpness"]["data"]
    assert [t["line"]["color"] for t in alike if t.get("name") == "2 / learning rate"] == ["var(--network)"]
    assert "Mean over 3 seeds, in a band of one standard error on either side." in words_of(studied)


def test_small_study(tmp_path: Path) -> None:
    results = study()
    keep = ("format", "kind", "title", "scale", "command", "about")
    results = {key: results[key] for key in keep}
    one = copy.deepcopy(study()["curves"][0]["groups"][0])
    one |= {"seeds": [7], "series": {"loss": {"mean": [None, *one["series"]["loss"]["mean"][1:]]}, "sharpness": None}}
    results["curves"] = [{"title": "One", "groups": [one]}]
    write_json(tmp_path / "results.json", results)
    page = render_study(tmp_path)
    assert list(data_of(page, "plots")) == ["plot-0-loss"]
    words = words_of(page)
    assert "One seed: no standard errors." in words
    assert not re.search(r"\b(None|nan|null)\b|Claims|Departures|The runs", words)


# Wrong folders


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"track\.json: got no such file; expected a JSON file"):
        render_tracked(tmp_path)
    with pytest.raises(Refused, match=r"results\.json: got no such file; expected a JSON file"):
        render_study(tmp_path)
    write_track(tmp_path, [])
    with pytest.raises(Refused, match=r"got no step-\*\.json; expected at least one snapshot"):
        render(tmp_path)
    write_json(tmp_path / "track.json", {"format": "other"})
    with pytest.raises(Refused, match=r"got format other; expected format ntkit-track\. Give a folder"):
        render_tracked(tmp_path)
    for wrong, got in (({"format": 1}, "kind None, format 1"), ([], "kind None, format None")):
        write_json(tmp_path / "results.json", wrong)
        with pytest.raises(Refused, match=rf"got {got}; expected kind study, format 1"):
            render_study(tmp_path)
    for track in ("/elsewhere", "runs/../../elsewhere"):
        results = study()
        results["runs"][0]["track"] = track
        write_json(tmp_path / "results.json", results)
        with pytest.raises(Refused, match=rf"run depth-2-seed-0: got {track}; expected a folder inside the study"):
            render_study(tmp_path)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "got no target; expected images with a target and steps"),
        (
            {"steps": np.arange(3)},
            r"eigenfunctions: got shape \(15, 8, 24, 24\); expected images \(24, 24\) at 3 steps",
        ),
        ({"output": np.zeros((15, 4, 4))}, r"output: got shape \(15, 4, 4\); expected images \(24, 24\) at 15 steps"),
        ({"eigenfunctions": np.zeros((15, 24, 24))}, r"eigenfunctions: got shape \(15, 24, 24\)"),
    ],
)
def test_images_that_do_not_agree(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = {name: value for name, value in (pictures() | change).items() if value is not None}
    with pytest.raises(Refused, match=message):
        render_tracked(write_track(tmp_path, records(), arrays))


# In a browser


@pytest.mark.browser
@pytest.mark.parametrize("which", ["full", "studied"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_page_draws(chromium: Any, which: str, width: int, scheme: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    visit = Visit(chromium, path, width, scheme)
    visit.check()
    assert len(visit.curves()) == len(data_of(path))
    assert min(visit.curves()) >= 1
    page = visit.page

    def pixel(selector: str) -> str:
        return page.evaluate(f"document.querySelector('{selector}').toDataURL()")

    chosen, last = 'canvas[data-frame=""][data-index="2"]', 'canvas[data-frame="14"][data-index="2"]'
    assert pixel(chosen) == pixel('canvas[data-frame="0"][data-index="2"]') != pixel(last)
    page.focus("#snapshot")
    page.keyboard.press("End")
    assert page.inner_text("#at") == "step 10,000"
    assert page.get_attribute("#snapshot", "aria-valuetext") == "step 10,000"
    assert pixel(chosen) == pixel(last)
    assert page.inner_text(f"{chosen} + .caption") == page.inner_text(f"{last} + .caption")
    before = pixel(chosen)
    page.click("#theme")
    page.wait_for_timeout(150)
    assert pixel(chosen) != before  # the colour map follows the theme
    visit.check()
