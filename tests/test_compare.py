"""`ntkit compare`: its numbers beside independent ones, planted differences and none, what it refuses and keeps."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import command as started
from scipy import stats

import ntkit
from ntkit.base.files import read_arrays, read_json, write_json
from ntkit.commands import compare as command
from ntkit.commands.compare import compare
from ntkit.commands.explain import explain_run
from ntkit.commands.settings import ExplainSettings, TrackSettings
from ntkit.commands.track import track_run
from ntkit.commands.verify import verify
from ntkit.report import render

NET = """
from torch import nn
def make(outputs):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))
"""
LEFT_OUT = ("limit", "neighbors", "explained")  # which a comparison reads nothing of
SMALL = {"track_points": 6, "probe_points": 2, "batch_size": 12, "without": LEFT_OUT}
SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network and two data sets of vectors: three classes that a trained network separates; numbers."""
    place = tmp_path_factory.mktemp("runs")
    (place / "net.py").write_text(NET)
    draw = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = (draw.normal(size=(120, 4)) + 2.0 * np.eye(4)[y]).astype(np.float32)
    np.savez(place / "set.npz", x_train=x[:36], y_train=y[:36], x_test=x[36:], y_test=y[36:])
    values = (x @ [1.0, -1.0, 0.5, 2.0] + 0.1 * draw.normal(size=120)).astype(np.float32)
    np.savez(place / "numbers.npz", x_train=x[:36], y_train=values[:36], x_test=x[36:], y_test=values[36:])
    return place


def run_in(place: Path, name: str, **changed: Any) -> Path:
    settings = {"data": str(place / "set.npz"), "model": f"{place}/net.py:make", "epochs": 8, "lr": 0.1, **SMALL}
    return ntkit.analyze(ntkit.Settings(**(settings | changed)), out=place / name)


@pytest.fixture(scope="module")
def trained(material: Path) -> list[Path]:
    return [run_in(material, f"trained-{seed}", seed=seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def untrained(material: Path) -> list[Path]:
    """The same start, and a learning rate that leaves the network where it was."""
    return [run_in(material, f"untrained-{seed}", seed=seed, lr=1e-7) for seed in SEEDS]


@pytest.fixture(scope="module")
def compared(material: Path, trained: list[Path], untrained: list[Path]) -> Path:
    return compare([*trained, *untrained], out=material / "compared", points=30)


def results_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "results.json")


def words(folder: Path) -> str:
    body = (folder / "report.html").read_text().partition("<main")[2].partition("</main>")[0]
    body = html.unescape(re.sub(r"<[^>]+>", " ", body)).replace("\u2060", "")  # word joiners
    return re.sub(r"\s+", " ", body)  # \s takes non-breaking blanks, too


def network_wrong(run: Path) -> np.ndarray:
    """Wrong answers on the test set of the run's last weights, by this file's own copy of the network."""
    trajectory = ntkit.Trajectory.open(run / "trajectory")
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    net.load_state_dict(trajectory.state(trajectory.steps[-1]))
    data = np.load(run.parent / "set.npz")
    with torch.no_grad():
        return net(torch.from_numpy(data["x_test"])).argmax(1).numpy() != data["y_test"]


# The numbers


def test_errors_intervals_and_paired_tests(compared: Path, trained: list[Path], untrained: list[Path]) -> None:
    r = results_of(compared)
    wrong = [network_wrong(run) for run in (*trained, *untrained)]
    assert r["test"]["common"] == len(wrong[0]) == 84
    assert [run["errors"]["network"] for run in r["runs"]] == pytest.approx([w.mean() for w in wrong])
    assert [(g["label"], g["seeds"]) for g in r["groups"]] == [("lr 0.1", 4), ("lr 1e-07", 4)]
    sides = [[w.mean() for w in half] for half in (wrong[:4], wrong[4:])]
    for group, values in zip(r["groups"], sides, strict=True):
        expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
        assert (group["errors"]["network"]["low"], group["errors"]["network"]["high"]) == pytest.approx(expected)
    test = next(t for t in r["over_seeds"] if t["of"] == "network")
    assert test["p"] == pytest.approx(stats.ttest_ind(*sides, equal_var=False).pvalue)
    pairs = [t for t in r["between_runs"] if t["of"] == "network"]
    assert [(t["first"], t["second"]) for t in pairs] == list(itertools.combinations(range(8), 2))
    for t in pairs:
        a, b = wrong[t["first"]], wrong[t["second"]]
        alone = int((a & ~b).sum()), int((b & ~a).sum())
        assert (t["only_first"], t["only_second"]) == alone
        assert t["p"] == pytest.approx(stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0)


def test_a_planted_difference_is_found(compared: Path) -> None:
    r = results_of(compared)
    test = next(t for t in r["over_seeds"] if t["of"] == "network")
    assert test["difference"] < -0.2
    assert test["p_holm"] < 0.05
    text = words(compared)
    assert "of the networks: the error of lr 0.1 is lower than that of lr 1e-07" in text
    # machines on initial kernels differ in nothing between these settings: they are not tested
    assert {t["of"] for t in r["over_seeds"]} == {"network", "after"}
    same_start = [t for t in r["between_runs"] if t["of"] == "init" and t["second"] - t["first"] == 4]
    assert same_start == []


def test_kernels_are_aligned_as_by_hand(compared: Path, trained: list[Path], untrained: list[Path]) -> None:
    r = results_of(compared)
    x = torch.from_numpy(np.load(trained[0].parent / "set.npz")["x_test"])
    x = x[torch.linspace(0, 83, 30).long()].double()
    center = np.eye(30) - 1 / 30
    found: dict[str, list[np.ndarray]] = {"init": [], "after": []}
    for run in (*trained, *untrained):
        trajectory = ntkit.Trajectory.open(run / "trajectory")
        for key, step in (("init", 0), ("after", trajectory.steps[-1])):
            net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
            net.load_state_dict(trajectory.state(step))
            rows = []
            for point in x:
                gradients = [torch.autograd.grad(net(point)[c], list(net.parameters())) for c in range(3)]
                rows.append(torch.cat([g.flatten() for each in gradients for g in each]).numpy())
            features = np.stack(rows)
            K = center @ (features @ features.T) @ center
            found[key].append(K / np.linalg.norm(K))
    for key, kernels in found.items():
        expected = [[float((a * b).sum()) for b in kernels] for a in kernels]
        np.testing.assert_allclose(r["kernels"][key], expected, atol=1e-5)
    own = [float((a * b).sum()) for a, b in zip(found["init"], found["after"], strict=True)]
    np.testing.assert_allclose(r["kernels"]["own"], own, atol=1e-5)
    assert r["kernels"]["same_start"]["init"] == pytest.approx(1.0, abs=1e-6)
    within = [found["after"][i] * found["after"][j] for g in (range(4), range(4, 8))
              for i, j in itertools.combinations(g, 2)]  # fmt: skip
    assert r["kernels"]["within"]["after"] == pytest.approx(np.mean([w.sum() for w in within]), abs=1e-5)
    assert r["kernels"]["within"]["pairs"] == 12
    assert all(c["ok"] and c["value"] == 0 for c in r["certificates"])


def test_a_copy_differs_in_nothing_and_is_no_seed(trained: list[Path], tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "copy")
    r = results_of(compare([*trained[:2], tmp_path / "copy"], out=tmp_path / "out"))
    assert [run["repeats"] for run in r["runs"]] == [False, False, True]
    assert r["groups"][0]["seeds"] == r["groups"][0]["errors"]["network"]["n"] == 2
    tests = [t for t in r["between_runs"] if (t["first"], t["second"]) == (0, 2)]
    assert [t["of"] for t in tests] == ["network", "after"]
    assert all(t["p"] == 1.0 and t["difference"] == 0 for t in tests)
    assert r["kernels"]["after"][0][2] == pytest.approx(1.0, abs=1e-12)
    assert r["kernels"]["after"][0][1] < 0.999
    assert r["kernels"]["within"]["pairs"] == 1
    assert "same settings and same seed as an earlier run here" in words(tmp_path / "out")


def test_one_seed_each_is_not_judged_over_seeds(trained: list[Path], untrained: list[Path], tmp_path: Path) -> None:
    folder = compare([trained[0], untrained[0]], out=tmp_path / "out")
    assert all(t["p"] is None for t in results_of(folder)["over_seeds"])
    text = words(folder)
    assert "Over seeds nothing can be said of the settings’ networks" in text
    assert "One seed only: lr 0.1 and lr 1e-07." in text
    assert "No test over seeds was possible" in text


def test_seeds_learn_the_same_examples(material: Path, tmp_path: Path) -> None:
    """`--train` and `--test` choose the same examples for every seed: seeds differ in luck alone."""
    for name in ("set", "numbers"):
        options = {"data": str(material / f"{name}.npz"), "train": 20, "test": 40, "epochs": 2}
        runs = [run_in(material, f"{name}-sample-{seed}", seed=seed, **options) for seed in (0, 1)]
        identities = [read_json(run / "run.json")["identity"] for run in runs]
        assert identities[0]["data"] == identities[1]["data"]
        assert identities[0]["initial parameters"] != identities[1]["initial parameters"]
        r = results_of(compare(runs, out=tmp_path / name, points=5))
        assert (r["test"], r["data"]["hashes"]) == ({"common": 40, "of": [40]}, [identities[0]["data"]])
        assert [group["seeds"] for group in r["groups"]] == [2]
        assert [run["errors"]["network"] is None for run in r["runs"]] == [False, False]


def test_samples_of_one_data_set_share_test_examples(tmp_path: Path) -> None:
    """With another `--test`, only test examples that both runs have are compared."""
    runs = []
    for size in (40, 30):
        s = ntkit.Settings(classes=("3", "8"), model="linear", train=20, test=size, epochs=1, lr=1e-4,
                           track_points=4, probe_points=2)  # fmt: skip
        runs.append(ntkit.analyze(s, out=tmp_path / str(size)))
    data = [ntkit.data.load("digits", classes=("3", "8"), train=20, test=size) for size in (40, 30)]
    same = (data[0].x_test.flatten(1)[:, None] == data[1].x_test.flatten(1)[None]).all(2)
    assert same.sum(0).max() == same.sum(1).max() == 1  # no digit twice
    rows = [same.any(1).nonzero()[:, 0].tolist(), same[same.any(1)].long().argmax(1).tolist()]
    r = results_of(compare(runs, out=tmp_path / "out"))
    assert r["test"] == {"common": 30, "of": [30, 40]}
    assert [len(own) for own in rows] == [30, 30]
    for run, own, told in zip(runs, rows, r["runs"], strict=True):
        wrong = read_arrays(run / "arrays" / "network.safetensors")["wrong"][own]
        assert told["errors"]["network"] == pytest.approx(wrong.mean())


def test_data_that_changed_since_the_run_are_refused(material: Path, tmp_path: Path) -> None:
    """By every command that reads the data of a run again; of a sample, it says that earlier versions chose it."""
    for name in ("net.py", "set.npz"):
        shutil.copy(material / name, tmp_path / name)
    runs = [run_in(tmp_path, f"run-{seed}", seed=seed, train=20, test=40, epochs=1) for seed in (0, 1)]
    arrays = dict(np.load(tmp_path / "set.npz"))
    np.savez(tmp_path / "set.npz", **arrays | {"x_train": arrays["x_train"] + 1})
    message = r"got data with hash .*--from .*run-1 --out NEW\. If an earlier version"
    for read_again in (
        lambda: compare(runs[::-1], out=tmp_path / "out"),
        lambda: explain_run(runs[1], ExplainSettings(), say=lambda line: None),
        lambda: track_run(runs[1], TrackSettings(points=5, k=2), lambda line: None),
    ):
        with pytest.raises(ntkit.Refused, match=message):
            read_again()
    with pytest.raises(ntkit.Refused, match=r"got data with hash .*--from .*run-0 --out NEW$"):
        track_run(runs[0], TrackSettings(points=5, k=2), lambda line: None)


def test_regressions(material: Path, tmp_path: Path) -> None:
    settings = {"data": str(material / "numbers.npz"), "target_loss": None}
    runs = [run_in(material, f"numbers-{lr}-{seed}", seed=seed, lr=lr, **settings) for lr in (0.05, 1e-7)
            for seed in (0, 1)]  # fmt: skip
    r = results_of(compare(runs, out=tmp_path / "out", points=20))
    y = np.load(material / "numbers.npz")
    y = (y["y_test"] - y["y_train"].mean()) / y["y_train"].std()
    squares = [(read_arrays(run / "arrays" / "network.safetensors")["predicted"][:, 0] - y) ** 2 for run in runs]
    assert [run["errors"]["network"] for run in r["runs"]] == pytest.approx([s.mean() for s in squares], rel=1e-4)
    test = next(t for t in r["between_runs"] if t["of"] == "network" and (t["first"], t["second"]) == (0, 2))
    assert test["p"] == pytest.approx(stats.ttest_rel(squares[0], squares[2]).pvalue, rel=1e-3)
    assert test["p_holm"] < 0.05
    assert all(c["ok"] for c in r["certificates"])
    text = words(tmp_path / "out")
    assert "Mean squared test error of the network" in text
    assert "McNemar" not in text


# The command and its folder


def test_the_command(trained: list[Path], untrained: list[Path], tmp_path: Path) -> None:
    """As the README has it: runs in, one page out; the table on a terminal, or one JSON document and nothing else."""
    runs = [*trained[:2], *untrained[:2]]
    words = [sys.executable, "-m", "ntkit.cli", "compare", *map(str, runs), "--out", str(tmp_path / "a")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "lr 1e-07" in done.stdout
    assert done.stdout.endswith(f"report: {tmp_path / 'a' / 'report.html'}\n")
    assert "[4 of 4] kernels on 84 test examples: lr 1e-07 · seed 1" in done.stderr
    done = started(*words[3:], "--json", "--quiet").done()
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "a"), **results_of(tmp_path / "a")}
    done = started(*words[3:5], "--json").done()
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "ntkit: runs: got 1 folder; expected at least two. Name the run folders: ntkit compare RUN RUN.\n"
    )


def test_stopped_it_goes_on_and_gives_the_same_bytes(
    compared: Path, trained: list[Path], untrained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, lines, whole = dict(out=tmp_path / "out", points=30), [], command._networks

    def stopping(run: Any, *rest: Any) -> Any:
        if run.place == 2:
            raise KeyboardInterrupt
        return whole(run, *rest)

    monkeypatch.setattr(command, "_networks", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare([*trained, *untrained], **s, say=lines.append)
    assert lines[-1] == "Stopped. What is finished is kept; the same command or call goes on."
    computed = []
    monkeypatch.setattr(command, "_networks", lambda run, *rest: computed.append(run.place) or whole(run, *rest))
    compare([*trained, *untrained], **s)
    assert computed == [2, 3, 4, 5, 6, 7]
    first, second = (results_of(folder) for folder in (compared, tmp_path / "out"))
    assert first.pop("command") != second.pop("command")
    assert first == second
    compare([*trained, *untrained], **s)
    assert computed == [2, 3, 4, 5, 6, 7]


def test_damaged_kernels_are_computed_again(trained: list[Path], tmp_path: Path) -> None:
    s, lines = dict(out=tmp_path / "out", points=5), []
    before = (compare(trained[:2], **s) / "results.json").read_bytes()
    assert f"--points {s['points']} --out" in json.loads(before)["command"]
    (tmp_path / "out" / "results.json").unlink()
    file = tmp_path / "out" / "arrays" / "kernels-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert {r.file: r.status for r in verify(tmp_path / "out")}["arrays/kernels-2.safetensors"] == "damaged"
    compare(trained[:2], **s, say=lines.append)
    assert any("computed again" in line for line in lines)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert all(record.status == "ok" for record in verify(tmp_path / "out"))


def test_refusals(material: Path, trained: list[Path], untrained: list[Path], tmp_path: Path) -> None:
    def refused(message: str, runs: list[Path], **settings: Any) -> None:
        with pytest.raises(ntkit.Refused, match=message) as caught:
            compare(runs, **({"out": tmp_path / "out"} | settings))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("got 1 folder; expected at least two", trained[:1])
    refused("twice; expected different folders", [trained[0], trained[0].parent / "x" / ".." / trained[0].name])
    refused("--points: got 1", trained, points=1)
    other = run_in(tmp_path, "other", data="digits", model="linear", train=20, test=10, epochs=1)
    refused("got data with hash .* .digits.; expected the data of .* differ in data", [trained[0], other])
    refused("got a recorded trajectory", [trained[0], trained[1] / "trajectory"])
    (tmp_path / "best.pt").touch()
    refused("best.pt: got a file; .* make one: ntkit analyze --weights", [trained[0], tmp_path / "best.pt"])
    for opened in (lambda place: ntkit.analyze(from_run=place), ntkit.verify):
        with pytest.raises(ntkit.Refused, match=r"best.pt: got a file; expected the folder of a run"):
            opened(tmp_path / "best.pt")
    unfinished = shutil.copytree(trained[1], tmp_path / "unfinished")
    write_json(unfinished / "run.json", read_json(unfinished / "run.json") | {"status": "running"})
    refused("not complete; .* go on with: ntkit analyze --from", [trained[0], unfinished])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ntkit.Refused, match="got other files"):
        compare(trained, out=tmp_path / "full")
    place = dict(out=tmp_path / "first", points=5)
    compare(trained[:2], **place)
    with pytest.raises(ntkit.Refused, match=r"comparison of other runs.*--overwrite"):
        compare(untrained[:2], **place)
    compare(untrained[:2], **place, overwrite=True)
    assert "untrained-0" in (tmp_path / "first" / "report.html").read_text()


def test_code_of_a_stranger_is_not_run(
    material: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # nothing has been run here
    with pytest.raises(ntkit.Refused, match=r"which would run .*--trust"):
        compare(trained[:2], out=tmp_path / "out")
    named = dict(out=tmp_path / "out", points=5, model=(f"{material}/net.py:make",))
    assert all(c["ok"] for c in results_of(compare(trained[:2], **named))["certificates"])


def test_a_network_that_answers_otherwise_is_said(tmp_path: Path, material: Path) -> None:
    for name in ("net.py", "set.npz"):
        shutil.copy(material / name, tmp_path / name)
    runs = [run_in(tmp_path, str(seed), seed=seed) for seed in (0, 1)]
    (tmp_path / "net.py").write_text(NET.replace("nn.Tanh()", "nn.Hardshrink(0.9)"))
    s = dict(out=tmp_path / "out", points=5)
    r = results_of(compare(runs, **s, trust=True))
    assert [c["ok"] for c in r["certificates"]] == [False, False]
    assert "A check failed." in words(tmp_path / "out")
    (tmp_path / "net.py").write_text(NET.replace("8", "9"))
    with pytest.raises(ntkit.Refused, match=f"^{runs[0]}: step 0 .*of another shape"):
        compare(runs, out=tmp_path / "other", trust=True)


def test_a_run_that_diverged_or_has_no_kernel_is_compared_with_what_it_has(
    material: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(model: torch.nn.Module, **options: Any) -> Any:
        def kernel(x: torch.Tensor) -> torch.Tensor:
            if max(float(p.detach().abs().max()) for p in model.parameters()) > 1e20:
                raise ntkit.Refused("kernel: got an overflow; expected finite values. Train less.")
            return whole(x)

        whole = ntkit.TangentKernel(model, **options)
        return kernel

    monkeypatch.setattr(command, "TangentKernel", refusing)
    runs = [*trained[:2], run_in(material, "far", lr=1e30), run_in(material, "diverged", lr=1e38)]
    s = dict(out=tmp_path / "out", points=5)
    r = results_of(compare(runs, **s))
    assert r["kernels"]["after"][2] == [None] * 4
    assert r["kernels"]["after"][0][1] is not None
    assert [run["errors"]["network"] for run in r["runs"]] == pytest.approx([network_wrong(run).mean() for run in runs])
    text = words(tmp_path / "out")
    assert "No kernel after training. lr 1e+30 · seed 0: kernel: got an overflow" in text
    assert "Training diverged, and the network is that of the last finite step: lr 1e+38 · seed 0." in text
    before = (tmp_path / "out" / "results.json").read_bytes()
    (tmp_path / "out" / "results.json").unlink()
    compare(runs, **s)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_loaded_weights_have_no_seed(material: Path, trained: list[Path], tmp_path: Path) -> None:
    state = ntkit.Trajectory.open(trained[0] / "trajectory")
    torch.save(state.state(state.steps[-1]), tmp_path / "w.pt")
    fresh = {"epochs": 10, "batch_size": 32, "lr": 0.01}
    runs = [run_in(material, f"loaded-{s}", seed=s, weights=str(tmp_path / "w.pt"), **fresh) for s in (0, 1)]
    r = results_of(compare([trained[0], *runs], out=tmp_path / "out", points=5))
    assert [group["label"] for group in r["groups"]] == ["trained", "w.pt"]
    assert r["settings"] == ["weights"]
    assert [run["repeats"] for run in r["runs"]] == [False, False, True]
    tests = [t for t in r["between_runs"] if t["of"] == "network"]
    assert [t["p"] for t in tests] == [1.0, 1.0, 1.0]


# The page


def test_the_page_is_made_of_the_results_alone(compared: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    shutil.copy(compared / "results.json", tmp_path / "again" / "results.json")
    assert render(tmp_path / "again").read_bytes() == (compared / "report.html").read_bytes()
    broken = results_of(compared)
    del broken["kernels"]["own"]
    write_json(tmp_path / "again" / "results.json", broken)
    with pytest.raises(ntkit.Refused, match=r"results.json: got content that cannot be used"):
        render(tmp_path / "again")


def test_points_of_the_figures_are_the_results(compared: Path) -> None:
    body = (compared / "report.html").read_text()
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', body, re.S)[1])  # type: ignore[index]
    r = results_of(compared)
    dots = [d for d in plots["plot-errors-network"]["data"] if isinstance(d.get("customdata"), list)]
    expected = [[100 * r["runs"][k]["errors"]["network"] for k in g["runs"]] for g in r["groups"]]
    assert [d["x"] for d in dots] == [pytest.approx(e) for e in expected]
    means = [d for d in plots["plot-errors-network"]["data"] if "error_x" in d]
    halves = [100 * (g["errors"]["network"]["high"] - g["errors"]["network"]["mean"]) for g in r["groups"]]
    assert [d["error_x"]["array"][0] for d in means] == pytest.approx(halves)
    np.testing.assert_allclose(plots["plot-kernels-after"]["data"][0]["z"], r["kernels"]["after"], rtol=1e-4)
    assert len(plots["plot-along-loss"]["data"]) == 8
