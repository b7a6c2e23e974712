"""`ntkit explain`: its numbers beside independent ones, its page, what it refuses, and what it keeps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_case import HOSTILE, Visit, body_of, data_of, words_of

import ntkit
import ntkit.cli
import ntkit.commands.tables
from ntkit.base.checks import Refused
from ntkit.base.files import read_arrays, read_json, write_arrays, write_json
from ntkit.base.tensors import read_tensors_and_metadata, write_tensors
from ntkit.commands import explain as command
from ntkit.commands import explained_points as parts
from ntkit.commands.explain import explain_run
from ntkit.commands.settings import ExplainSettings
from ntkit.commands.track import TrackSettings, track_run
from ntkit.commands.verify import verify
from ntkit.report import render
from ntkit.report.explain_text import trust

NET = """
from torch import nn
def make(outputs):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))
"""
SMALL = {"track_points": 6, "probe_points": 2, "batch_size": 6}


def silent(line: str) -> None:
    """Take the lines of a command."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one output, images."""
    s = ntkit.Settings(classes=("3", "8"), train=30, test=12, model="mlp", epochs=4, weight_decay=0.01, **SMALL)
    return ntkit.analyze(s, out=tmp_path_factory.mktemp("images") / "run")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, vectors, a model and data of the user's own; a smooth network."""
    place = tmp_path_factory.mktemp("vectors")
    (place / "net.py").write_text(NET)
    draw = np.random.default_rng(0)
    y = np.arange(36) % 3
    x = (draw.normal(size=(36, 4)) + 1.5 * np.eye(4)[y]).astype(np.float32)
    np.savez(place / "set.npz", x_train=x[:24], y_train=y[:24], x_test=x[24:], y_test=y[24:])
    s = ntkit.Settings(data=str(place / "set.npz"), model=f"{place}/net.py:make", epochs=6, lr=0.1, **SMALL)
    return ntkit.analyze(s, out=place / "run")


@pytest.fixture(scope="module")
def explained(vectors: Path) -> Path:
    return explain_run(vectors, ExplainSettings(test=(2, 7)), say=silent)


@pytest.fixture(scope="module")
def pictured(images: Path) -> Path:
    return explain_run(images, say=silent)


# The numbers


def opened(run: Path) -> Any:
    return command._opened(run, ExplainSettings(), trust=False)


def final_outputs(run: Path) -> torch.Tensor:
    r = opened(run)
    return r.model(r.task.data.x_test).detach().double()


def test_accounting_sums_to_the_log_odds_of_the_network(explained: Path, vectors: Path) -> None:
    p = final_outputs(vectors).softmax(1)
    for point in read_json(explained / "results.json")["points"]:
        own = p[point["test_index"]]
        assert int(own.argmax()) == int(point["predicted"])
        expected = float((own.max() / (1 - own.max())).log())
        assert point["margin"] == pytest.approx(expected, abs=1e-5)
        total = point["initial"] + point["examples"] + point["weight_decay"]
        assert total - point["margin"] == pytest.approx(point["residual"], abs=1e-12)
        assert abs(point["residual"]) < 1e-5
        assert abs(point["examples"]) > 0.1


def test_one_output_and_weight_decay(pictured: Path, images: Path) -> None:
    out = final_outputs(images)[:, 0]
    for point in read_json(pictured / "results.json")["points"]:
        own = float(out[point["test_index"]])
        assert point["predicted"] == ("8" if own > 0 else "3")
        assert point["margin"] == pytest.approx(abs(own), abs=1e-5)
        assert point["weight_decay"] != 0
        assert abs(point["residual"]) < 1e-5


def test_influence_and_ranks(explained: Path, vectors: Path) -> None:
    r, results = opened(vectors), read_json(explained / "results.json")
    x = r.task.data.x_test[[2, 7]]
    scores = {
        "influence": ntkit.influence(r.trajectory, x, r.model(x).argmax(1), measure="margin", **r.training).scores,
        "accounting": ntkit.PathKernel(r.trajectory, parts.margin, **r.training)
        .decompose(x, r.model(x).argmax(1))
        .contributions[:, 0],
    }
    for j, point in enumerate(results["points"]):
        for method, other in (("influence", "accounting"), ("accounting", "influence")):
            for side, sign in (("helped", 1), ("hurt", -1)):
                order = (sign * scores[method][j]).argsort(descending=True).tolist()
                told, ranks = point[method][side], (sign * scores[other][j]).argsort(descending=True).tolist()
                assert [e["index"] for e in told] == order[: len(told)]
                assert 1 <= len(told) <= 5
                for e in told:
                    assert e["score"] == pytest.approx(float(scores[method][j, e["index"]]), abs=1e-5)
                    assert sign * e["score"] > 0
                    assert ranks[e["rank_there"] - 1] == e["index"]
                    assert e["label"] == str(e["index"] % 3)
    assert results["influence"]["finite_differences"] < 1e-4


def test_scores_along_training(explained: Path, vectors: Path) -> None:
    r, results = opened(vectors), read_json(explained / "results.json")
    x, steps = r.task.data.x_test[[2, 7]], results["training"]["steps_shown"]
    y = r.model(x).argmax(1)
    whole = ntkit.PathKernel(r.trajectory, parts.margin, **r.training).decompose(x, y, steps=True)
    found = ntkit.influence(r.trajectory, x, y, measure="margin", steps=True, **r.training)
    assert (steps[0], steps[-1]) == (0, 24)
    for j, point in enumerate(results["points"]):
        for side in ("helped", "hurt"):
            for e in point["accounting"][side]:
                expected = [0.0, *whole.example_over_time(e["index"])[:, j, 0].tolist()]
                np.testing.assert_allclose(e["along"], [expected[step] for step in steps], atol=1e-6)
                assert e["along"][-1] == pytest.approx(e["score"], abs=1e-6)
            for e in point["influence"][side]:
                shares = np.zeros(25)
                for step, rows, values in found.steps or ():
                    shares[step + 1] = float(values[j][rows == e["index"]].sum())
                np.testing.assert_allclose(e["along"], shares.cumsum()[steps], atol=1e-6)


def test_text_of_examples() -> None:
    vocabulary = ("<padding>", "<unknown>", "small", "words")
    tokens = (torch.tensor([[2, 3, 0], [3, 1, 2]] * 5), torch.arange(10) % 2)
    data = dataclasses.replace(ntkit.data.from_tensors(tokens), vocabulary=vocabulary)
    assert parts._shown(data, torch.tensor([3, 2, 0])) == {"text": "words small"}
    long = ntkit.data.from_tensors((torch.arange(140.0).view(10, 14), torch.arange(10) % 2))
    text = parts._shown(long, torch.arange(14.0))["text"]
    assert text == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … (14 values)"


def trained_without(run: Path, removed: list[int]) -> torch.nn.Module:
    """The run once more, by a loop of its own, without some examples."""
    r = opened(run)
    model, data, kept = copy.deepcopy(r.model), r.task.data, torch.ones(len(r.task.data.x_train))
    kept[removed] = 0
    r.trajectory.load(model, 0)
    opt = r.settings.make_optimizer(model.parameters())
    for step in range(r.trajectory.stop["step"]):
        rows = r.trajectory.batch(step)
        opt.zero_grad()
        losses = r.task.loss(model(data.x_train[rows]), data.y_train[rows], reduction="none")
        (losses * kept[rows]).mean().backward()
        opt.step()
    return model


@pytest.mark.parametrize("which", ["explained", "pictured"])
def test_removals_are_what_really_happens(which: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(which)
    run, results = place.parent, read_json(place / "results.json")
    r = opened(run)
    scores = command._influence(place, r, _points(results), torch.empty(0), torch.empty(0), silent)[0]
    point = results["points"][0]
    i = point["test_index"]
    for method in ("accounting", "influence"):
        told = {d["size"]: d for d in point["deletions"] if d["method"] == method}
        assert list(told) == parts.sizes(len(r.task.data.x_train))
        size = min(told)
        removed = [e["index"] for e in point[method]["helped"]][:size]
        again = trained_without(run, removed)
        y = torch.tensor([r.task.data.classes.index(point["predicted"])])
        after = float(parts.margin(again(r.task.data.x_test[[i]]), y).detach())
        assert told[size]["real"] == pytest.approx(after - point["margin"], abs=1e-5)
        assert told[size]["predicted"] == pytest.approx(-float(scores[0, removed].sum()), abs=1e-12)
        assert told[size]["spread"] is None
    random = [d for d in point["deletions"] if d["method"] == "random"]
    assert [d["size"] for d in random] == parts.sizes(len(r.task.data.x_train))
    assert all(d["spread"] > 0 for d in random)


def test_nothing_removed_changes_nothing(vectors: Path) -> None:
    r = opened(vectors)
    x = r.task.data.x_test[:3]
    again = ntkit.Retrainings(r.trajectory, x, r.model(x).argmax(1), **r.training)
    assert torch.allclose(again.values, again.without([[]])[0], rtol=0, atol=1e-6)
    assert torch.allclose(again.values, parts.margin(r.model(x), r.model(x).argmax(1)).double(), rtol=0, atol=1e-6)


def _points(results: dict[str, Any]) -> list[Any]:
    return [parts.Point(p["test_index"], p["why"], -1) for p in results["points"]]


def test_the_default_points(pictured: Path, images: Path) -> None:
    r, points = opened(images), read_json(pictured / "results.json")["points"]
    out = final_outputs(images)[:, 0]
    right = (out > 0).long() == r.task.data.y_test
    by_why = {p["why"]: p["test_index"] for p in points}
    best = torch.where(right, out.abs(), -1.0)
    assert by_why["right, most confident"] == int(best.argmax())
    if bool((~right).any()):
        assert by_why["wrong, most confident"] == int(torch.where(right, -1.0, out.abs()).argmax())
    else:
        assert "wrong, most confident" not in by_why
    assert by_why["least certain"] == min(
        set(range(12)) - {*by_why.values()} | {by_why["least certain"]}, key=lambda i: out[i].abs()
    )
    assert [p["right"] for p in points] == [bool(right[p["test_index"]]) for p in points]


# The folder


def test_pictures_are_the_examples(pictured: Path, images: Path) -> None:
    data, arrays = opened(images).task.data, read_arrays(pictured / "images.safetensors")
    points = read_json(pictured / "results.json")["points"]
    expected = (255 * data.x_test[[p["test_index"] for p in points], 0]).round().numpy()
    np.testing.assert_array_equal(arrays["test"][..., 0], expected)
    shown = {e["index"] for p in points for m in ("accounting", "influence") for s in p[m].values() for e in s}
    assert arrays["train_index"].tolist() == sorted(shown)
    np.testing.assert_array_equal(arrays["train"][..., 0], (255 * data.x_train[sorted(shown), 0]).round().numpy())


def test_stopped_at_any_part_it_goes_on(vectors: Path, explained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    s, lines = ExplainSettings(test=(2, 7), out=tmp_path / "out"), []
    without, calls = ntkit.Retrainings.without, []

    def stop(*args: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    def counted(self: Any, sets: Any) -> Any:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(sets)
        return without(self, sets)

    for owner, name, replaced in ((command, "influence", stop), (ntkit.Retrainings, "without", counted)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replaced)
            with pytest.raises(KeyboardInterrupt):
                explain_run(vectors, s, say=lines.append)
        assert lines[-1] == "Stopped. What is finished is kept; the same command or call goes on."
    again = []
    monkeypatch.setattr(command, "influence", stop)  # is kept
    monkeypatch.setattr(command, "_check_replay", stop)  # so is the accounting
    run = ntkit.trajectory.reruns.Reruns.run

    def recorded(self: Any, weights: Any, *args: Any, **named: Any) -> Any:
        again.append(len(weights))
        return run(self, weights, *args, **named)

    monkeypatch.setattr(ntkit.trajectory.reruns.Reruns, "run", recorded)
    place = explain_run(vectors, s, say=silent)
    different = {json.dumps(sorted(e)) for e in _all_sets(explained, vectors)}
    assert sum(again) + len({json.dumps(sorted(e)) for e in calls[0]}) == len(different)
    expected, found = read_json(explained / "results.json"), read_json(place / "results.json")
    assert found == expected
    again.clear()
    explain_run(vectors, s, say=silent)
    assert again == []  # complete: only the page is written again


def _all_sets(place: Path, run: Path) -> list[list[int]]:
    r, results = opened(run), read_json(place / "results.json")
    scores = command._influence(place, r, _points(results), torch.empty(0), torch.empty(0), silent)[0]
    x = r.task.data.x_test[[2, 7]]
    added = ntkit.PathKernel(r.trajectory, parts.margin, **r.training).decompose(x, r.model(x).argmax(1))
    sets = parts.removed_sets({"accounting": added.contributions[:, 0], "influence": scores}, parts.sizes(24))
    return [examples for own in sets.values() for examples in own]


def test_another_explanation_is_replaced_only_if_one_says_so(vectors: Path, explained: Path, tmp_path: Path) -> None:
    place = shutil.copytree(explained, tmp_path / "out")
    with pytest.raises(Refused, match=r"got an explanation of test examples 2, 7; .*--overwrite.*--out"):
        explain_run(vectors, ExplainSettings(test=(3,), out=place), say=silent)
    assert read_json(place / "results.json") == read_json(explained / "results.json")
    (place / "mine.txt").write_text("kept")
    explain_run(vectors, ExplainSettings(test=(3,), out=place), overwrite=True, say=silent)
    assert [p["test_index"] for p in read_json(place / "results.json")["points"]] == [3]
    assert (place / "mine.txt").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(Refused, match="got other files"):
        explain_run(vectors, ExplainSettings(test=(3,), out=tmp_path / "other"), say=silent)


def test_a_damaged_file_is_named_or_made_again(vectors: Path, explained: Path, tmp_path: Path) -> None:
    place = shutil.copytree(explained, tmp_path / "out")
    s, lines = ExplainSettings(test=(2, 7), out=place), []
    expected = (place / "results.json").read_bytes()
    for name in ("influence.safetensors", "results.json"):
        blob = bytearray((place / name).read_bytes())
        blob[len(blob) // 2] ^= 1
        (place / name).write_bytes(blob)
    with pytest.raises(Refused, match=r"results\.json: got a damaged file"):
        render(place)
    explain_run(vectors, s, say=lines.append)
    assert any("influence.safetensors" in line and "computed again" in line for line in lines)
    assert (place / "results.json").read_bytes() == expected


def test_verify_and_overwrite_know_the_folder(pictured: Path, images: Path, tmp_path: Path) -> None:
    run = shutil.copytree(images, tmp_path / "run")
    assert {r.status for r in verify(run)} == {"ok"}
    told = read_json(run / "explain" / "results.json")
    write_json(run / "explain" / "results.json", told | {"run": "0" * 16})
    write_arrays(run / "explain" / "images.safetensors", {"test": np.zeros(1)})
    bad = {r.file: r.reason for r in verify(run) if r.status != "ok"}
    assert set(bad) == {"explain/results.json", "explain/images.safetensors"}
    assert "another run" in bad["explain/results.json"]
    settings = ntkit.Settings(classes=("3", "8"), train=10, test=4, model="linear", epochs=1, **SMALL)
    ntkit.analyze(settings, out=run, overwrite=True)
    assert not (run / "explain").exists()


# What it refuses


def refused(run: Path, message: str, **settings: Any) -> None:
    with pytest.raises(Refused, match=message) as caught:
        explain_run(run, ExplainSettings(**settings), say=silent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [(12,), (-1,), (0, 99), ()])
def test_test_examples_out_of_range(index: tuple[int, ...], vectors: Path, tmp_path: Path) -> None:
    refused(vectors, "--test: got .*; expected numbers from 0 to 11", test=index, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_another_kind(vectors: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file")
    refused(vectors / "trajectory", "got a recorded trajectory; expected a run folder of ntkit analyze")
    tracked = track_run(vectors, TrackSettings(points=4, k=2, out=tmp_path / "track"), say=silent)
    refused(tracked, "got a tracking; expected a run folder of ntkit analyze")
    for told, kind in (({"kind": "study"}, "a study"), ({"settings": {}, "versions": {}}, "a run of ntkit infinite")):
        (tmp_path / kind).mkdir()
        write_json(tmp_path / kind / "run.json", told)
        refused(tmp_path / kind, f"got {kind}; expected a run folder of ntkit analyze")


def test_runs_that_cannot_be_replayed(vectors: Path, tmp_path: Path) -> None:
    run = shutil.copytree(vectors, tmp_path / "run", ignore=shutil.ignore_patterns("explain"))
    step = run / "trajectory" / "snapshots" / "step-00000004.safetensors"
    blob = step.read_bytes()
    step.unlink()
    refused(run, "no snapshot of step 4.*record the run again", test=(0,))
    step.write_bytes(blob)
    shutil.rmtree(run / "explain")
    tensors, told = read_tensors_and_metadata(step)
    other = {name: tensor + 1e-3 for name, tensor in tensors.items()}
    write_tensors(step, other, {name: value for name, value in told.items() if name != "sha256"})
    refused(run, "snapshot of step 4 .*To record the run again here: ntkit analyze --from .*run --out NEW", test=(0,))
    (run / "trajectory").rename(run / "elsewhere")
    refused(run, "got a run whose training has not ended.*ntkit analyze --from")


def test_other_data_than_the_runs(vectors: Path, tmp_path: Path) -> None:
    run = shutil.copytree(vectors, tmp_path / "run", ignore=shutil.ignore_patterns("explain"))
    file = vectors.parent / "set.npz"
    blob, arrays = file.read_bytes(), dict(np.load(file))
    try:
        np.savez(file, **arrays | {"x_test": arrays["x_test"] + 1})
        refused(run, "--data .*got data with hash .*Restore the files, or repeat the run")
    finally:
        file.write_bytes(blob)


def test_a_run_of_loaded_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from ntkit.networks.built_in import build

    save_file(build("linear", (1, 8, 8), 1, 0).state_dict(), tmp_path / "w.safetensors")
    s = ntkit.Settings(classes=("3", "8"), train=8, test=4, model="linear", weights=str(tmp_path / "w.safetensors"),
                       track_points=4, probe_points=2)  # fmt: skip
    refused(ntkit.analyze(s, out=tmp_path / "run"), "got a run of ntkit analyze without a training")


def test_a_run_with_dropout(tmp_path: Path) -> None:
    net = (
        "from torch import nn\ndef make(outputs):\n    layers = nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, outputs)\n"
    )
    (tmp_path / "net.py").write_text(net + "    return nn.Sequential(*layers)\n")
    s = ntkit.Settings(classes=("3", "8"), train=8, test=4, model=f"{tmp_path}/net.py:make", epochs=1, **SMALL)
    run = ntkit.analyze(s, out=tmp_path / "run")
    refused(run, "cannot be replayed .layer '1' .Dropout.*Train without dropout")
    assert not (run / "explain").exists()


def test_two_processes(vectors: Path, tmp_path: Path) -> None:
    from ntkit.base.lock import FolderLock

    with FolderLock(tmp_path / "out"):
        refused(vectors, "another process|is writing", test=(0,), out=tmp_path / "out")


# The page


@pytest.fixture(scope="module")
def hostile(explained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for sentences, a low metasmoothness, and names that are no good."""
    results, place = read_json(explained / "results.json"), tmp_path_factory.mktemp("hostile")
    results["title"] = results["points"][0]["label"] = HOSTILE
    results["points"][0]["accounting"]["helped"][0] |= {"label": HOSTILE, "text": HOSTILE + " long" * 60 + "x" * 300}
    results["points"][0]["influence"] = {"helped": [], "hurt": []}
    results["influence"] |= {"metasmoothness": 0.2, "smooth": False, "miss": 1.5, "trusted": False, "own_error": 0.5}
    write_json(place / "results.json", results)
    return render(place)


def test_the_page_says_the_numbers(explained: Path) -> None:
    page, results = explained / "explain.html", read_json(explained / "results.json")
    words, point = words_of(page), results["points"][0]
    assert f"metasmoothness {results['influence']['metasmoothness']:.2f}" in words
    assert "Influence can be used here" in words
    assert "Test 2:" in words
    assert "1 most helpful by accounting" in words
    assert "1 at random, mean of 5 sets" in words
    values = re.findall(r"[-−+]?[\d.]+(?:e-?\d+)?", point["accounting"]["helped"][0]["text"])
    assert len(values) == 4  # the values of a vector
    assert point["accounting"]["helped"][0]["text"] in words
    told = [
        (d["predicted"], d["real"]) for p in results["points"] for d in p["deletions"] if d["method"] == "influence"
    ]
    drawn = next(t for t in data_of(page)["plot-removals"]["data"] if t["name"] == "most helpful by influence")
    assert list(zip(drawn["x"], drawn["y"], strict=True)) == told


@pytest.mark.parametrize(
    ("smooth", "miss", "first"),
    [
        (0.5, 0.5, "Influence can be used here: in a trial"),
        (
            0.49,
            0.5,
            "Training amplifies small changes in this run: its metasmoothness is 0.49, below 0.5. Yet",
        ),
        (0.3, 0.51, "Do not trust the influence in this run: in a trial"),
        (0.9, 0.51, "Do not trust the influence in this run: in a trial"),
        (0.9, None, "Do not trust the influence in this run: in a trial"),
    ],
)
def test_the_first_sentence_follows_from_trial_and_metasmoothness(
    smooth: float, miss: float | None, first: str
) -> None:
    text = trust({"influence": {"metasmoothness": smooth, "miss": miss}})
    assert text.startswith(first)
    share = "an undefined share" if miss is None else f"{100 * miss:.0f}\u00a0%"
    assert f"by {share} of their size" in text
    assert "50\u00a0% is allowed" in text


def test_low_metasmoothness_is_said_first(hostile: Path, capsys: Any) -> None:
    words = words_of(hostile)
    lede = re.search(r'<p class="lede">(.*?)</p>', body_of(hostile), re.DOTALL)
    assert lede
    assert lede[1].startswith("Do not trust the influence in this run: in a trial")
    assert "by 150\u00a0% of their size (at most 50\u00a0% is allowed; metasmoothness 0.20)" in lede[1]
    assert "Finite differences say nothing about the influence here" in words
    ntkit.commands.tables.print_explanation(hostile.parent)
    assert capsys.readouterr().out.startswith("Do not trust the influence in this run")


@pytest.mark.parametrize("which", ["explained", "pictured", "hostile"])
def test_self_contained_and_valid(which: str, request: pytest.FixtureRequest) -> None:
    from plotly.graph_objects import Figure

    path = request.getfixturevalue(which)
    path = path if path.suffix == ".html" else path / "explain.html"
    body = body_of(path)
    assert not re.findall(r'(?:src|srcset|poster|action)="(?!data:)[^"]*"', body)
    links = re.findall(r'<(\w+)[^>]*\bhref="(https?://[^"]+)"', body)
    assert {tag for tag, _ in links} == {"a"}
    assert len(re.findall(r"https?://", body)) == len(links)
    assert "<img src=x" not in body
    assert "window.broken = 1</script>" not in body
    for plot in data_of(path).values():
        Figure(json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(plot))))
    assert not re.search(r"\b(None|nan|NaN|null)\b", words_of(path))
    before = path.read_bytes()
    assert render(path.parent).read_bytes() == before


def test_an_image_that_is_missing_or_another(pictured: Path, tmp_path: Path) -> None:
    place = shutil.copytree(pictured, tmp_path / "out")
    write_arrays(place / "images.safetensors", {"test": np.zeros(1)})
    with pytest.raises(Refused, match=r"images\.safetensors: got a damaged file: not the file that results"):
        render(place)
    (place / "images.safetensors").unlink()
    with pytest.raises(Refused, match="no such file"):
        render(place)


def test_the_command(vectors: Path, explained: Path, capsys: Any) -> None:
    with contextlib.suppress(SystemExit):
        ntkit.cli.app(["explain", str(vectors), "--test", "2", "7"])
    out = capsys.readouterr().out
    assert out.startswith("Influence can be used here")
    assert "by accounting" in out
    assert "real change" in out
    assert str(explained / "explain.html") in out.replace("\n", "")


@pytest.mark.browser
@pytest.mark.parametrize("which", ["explained", "pictured", "hostile"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_page_draws(chromium: Any, which: str, width: int, scheme: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    path = path if path.suffix == ".html" else path / "explain.html"
    visit = Visit(chromium, path, width, scheme)
    visit.check()
    assert len(visit.curves()) == len(data_of(path))
    assert max(visit.curves()) >= 10
    page = visit.page
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert page.evaluate(broken) == 0
    columns = page.evaluate("[...document.querySelectorAll('.near')].map(n => getComputedStyle(n).gridTemplateColumns)")
    assert {len(column.split(" ")) for column in columns} == {1 if width == 390 else 2}
