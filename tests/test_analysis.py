"""`ntkit analyze` as a user meets it: a run folder, refusals in one line, resume after a kill at any moment."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import command
from safetensors.torch import save_file

import ntkit
from ntkit.base.files import read_arrays, read_json, write_json
from ntkit.networks.built_in import build

SMALL = [
    "--classes",
    "3",
    "8",
    "--train",
    "60",
    "--test",
    "30",
    "--track-points",
    "20",
    "--probe-points",
    "8",
    "--epochs",
    "3",
]
ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tied_model.py"


def python_m_ntkit(*words: object) -> subprocess.CompletedProcess:
    """The command line as a user starts it, Python and imports included."""
    return subprocess.run([sys.executable, "-m", "ntkit.cli", *map(str, words)], capture_output=True, text=True)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def small(**more) -> ntkit.Settings:
    fields = {"classes": ("3", "8"), "train": 60, "test": 30, "epochs": 3, "track_points": 20, "probe_points": 8}
    return ntkit.Settings(**fields | more)


def same_runs(a: Path, b: Path) -> None:
    """Results and every array byte for byte."""
    assert (a / "results.json").read_bytes() == (b / "results.json").read_bytes()
    names = sorted(p.relative_to(a) for p in [*a.glob("arrays/*"), *a.glob("trajectory/snapshots/*")])
    assert len(names) > 8
    assert filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One uninterrupted run of the small analysis, through the command line."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = python_m_ntkit("analyze", *SMALL, "--out", run)
    assert done.returncode == 0, done.stderr
    (run.parent / "stdout").write_text(done.stdout)
    return run


def test_a_run_is_a_whole_folder_and_a_short_table(whole):
    names = {p.name for p in whole.iterdir()}
    assert names == {"run.json", "results.json", "report.html", "arrays", "stages", "trajectory"}
    printed = (whole.parent / "stdout").read_text()
    assert f"report: {whole / 'report.html'}" in printed
    assert "SVM, after kernel" in printed
    run = json.loads((whole / "run.json").read_text())
    assert run["status"] == "complete"
    assert run["identity"]["torch"] == version("torch")
    found = results(whole)
    assert [m["kernel"] for m in found["machines"]] == ["init", "after", "conjugate"]
    assert all(c["ok"] for c in found["certificates"]), found["certificates"]
    assert found["against_loss"] is None  # it would take more than a tenth of so small a run
    assert found["invariances"]["different"]["after"]["value"] < 1
    stages = ("explained", "invariances", "neighbors", "gram-init", "gram-after", "gram-conjugate")
    assert found["files"].keys() == {f"arrays/{stage}.safetensors" for stage in stages}


def test_results_are_what_the_library_says(whole):
    """The numbers of the run, made again from its trajectory with public names."""
    data = ntkit.data.load("digits", classes=("3", "8"), train=60, test=30)
    model = build("cnn", data.input_shape, 1, seed=0)
    trajectory = ntkit.Trajectory.open(whole / "trajectory")
    trajectory.load(model, trajectory.steps[-1])
    kernel = ntkit.TangentKernel(model, outputs="trace")
    K = kernel(data.x_train)
    svm = ntkit.HardMarginSVM().fit(K, data.y_train)
    wrong = (svm.predict(kernel(data.x_test, data.x_train)) != data.y_test).double().mean()
    found = results(whole)
    assert found["machines"][1]["test_error"]["value"] == pytest.approx(float(wrong))
    unit = float(K.diagonal().mean()) ** 0.5
    assert found["machines"][1]["margin"] == pytest.approx(float(svm.margin_) / unit, rel=1e-4)
    assert found["quality"][1]["alignment"] == pytest.approx(ntkit.alignment(K, 2.0 * data.y_train - 1), rel=1e-5)
    out = model(data.x_test)[:, 0] > 0
    assert found["network"]["test_error"]["value"] == pytest.approx(float((out != data.y_test.bool()).double().mean()))
    assert found["along"]["steps"] == trajectory.steps
    assert found["along"]["distance"][0] == pytest.approx(0, abs=1e-12)
    assert [len(e) for e in found["along"]["eigenvalues"]] == [20] * len(trajectory.steps)
    assert read_arrays(whole / "arrays" / "machine-after.safetensors")["alpha"].shape == (60,)


def test_from_a_complete_run_repeats_it_elsewhere_or_makes_its_report(whole, tmp_path):
    done = command("analyze", "--from", whole, "--out", tmp_path / "copy").done()
    assert done.returncode == 0, done.stderr
    same_runs(whole, tmp_path / "copy")
    before = (whole / "report.html").read_bytes()
    (whole / "report.html").unlink()
    assert command("analyze", "--from", whole).wait() == 0
    assert (whole / "report.html").read_bytes() == before
    (whole / "report.html").unlink()
    assert command("report", whole).wait() == 0
    assert (whole / "report.html").read_bytes() == before


def test_killed_at_five_random_moments_the_run_ends_the_same(whole, tmp_path):
    """Undisturbed it has the same bytes; so it has after SIGKILL, five times, each a random time after work began."""
    run, moments = tmp_path / "run", random.Random(3)
    process = command("analyze", *SMALL, "--out", tmp_path / "again")
    process.until((tmp_path / "again" / "run.json").exists)
    begun = time.monotonic()
    assert process.wait() == 0
    seconds, killed = time.monotonic() - begun, 0
    same_runs(whole, tmp_path / "again")
    for _ in range(40):
        started = (run / "run.json").exists()
        words = ["--from", run] if started else [*SMALL, "--out", run, "--overwrite"]
        process = command("analyze", *words)
        process.until((run / "run.json").exists)
        if started:
            process.until(lambda process=process: "\n" in process.stderr)  # "Resuming ..."
        time.sleep(moments.uniform(0.0, 0.3 * seconds))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if killed == 5 or process.returncode == 0:
            break
    assert killed >= 3
    done = command("analyze", "--from", run).done()
    assert done.returncode == 0, done.stderr
    same_runs(whole, run)


@pytest.mark.parametrize(
    "stage", ["network", "gram-after", "machine-init", "along", "neighbors", "explained", "oracle"]
)
def test_stopped_between_any_two_files_the_run_ends_the_same(whole, tmp_path, stage, monkeypatch):
    """As if killed after a stage's arrays were written and before its numbers were."""
    import ntkit.commands.analyze as analysis

    write = analysis.write_json

    def stopping(path, value):
        if Path(path).name == f"{stage}.json":
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(analysis, "write_json", stopping)
    settings = small()
    with pytest.raises(KeyboardInterrupt):
        ntkit.analyze(settings, out=tmp_path / "run")
    monkeypatch.setattr(analysis, "write_json", write)
    assert not (tmp_path / "run" / "results.json").exists()
    ntkit.analyze(from_run=tmp_path / "run")
    same_runs(whole, tmp_path / "run")


def test_the_kernel_against_the_loss_is_resumed_like_the_other_stages(tmp_path, monkeypatch):
    """A run as small as `whole` leaves this stage out; here its cost is replaced by a low one."""
    import ntkit.commands.against_loss as against
    import ntkit.commands.analyze as analysis

    monkeypatch.setattr(against, "affordable", lambda *sizes: 4)
    ntkit.analyze(small(epochs=8), out=tmp_path / "once")
    write = analysis.write_json

    def stopping(path, value):
        if Path(path).name == "against-loss.json":
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(analysis, "write_json", stopping)
    with pytest.raises(KeyboardInterrupt):
        ntkit.analyze(small(epochs=8), out=tmp_path / "twice")
    monkeypatch.setattr(analysis, "write_json", write)
    ntkit.analyze(from_run=tmp_path / "twice")
    same_runs(tmp_path / "once", tmp_path / "twice")
    found = results(tmp_path / "once")
    snapshots = found["against_loss"]["snapshots"]
    assert {s["step"] for s in snapshots} <= set(found["along"]["steps"])
    assert (snapshots[0]["step"], snapshots[-1]["step"]) == (0, found["training"]["steps"])
    assert len(snapshots) in (3, 4)
    assert "Test error against training loss" in (tmp_path / "once" / "report.html").read_text()


def test_ctrl_c_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    process = command("analyze", *SMALL[:-1], "20000", "--out", run)
    process.until((run / "trajectory" / "checkpoint.safetensors").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert f"Resume with: ntkit analyze --from {run}" in process.stderr
    assert ntkit.Trajectory.open(run / "trajectory").status == "running"


def at_most_two_megabytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A real limit of the operating system on the size of a file: the report (5 MB) does not fit."""
    run = tmp_path / "run"
    done = command("analyze", *SMALL, "--out", run, first=at_most_two_megabytes).done()
    assert done.returncode == 2
    assert "report.html: got File too large while writing; expected a folder that can be written" in done.stderr
    assert not list(run.rglob("*.ntkit-part"))
    assert not (run / "report.html").exists()
    assert command("analyze", "--from", run).wait() == 0
    assert (run / "report.html").stat().st_size > 2_000_000


def test_weights_are_analyzed_without_training(whole, tmp_path):
    trajectory = ntkit.Trajectory.open(whole / "trajectory")
    save_file(trajectory.state(trajectory.steps[-1]), tmp_path / "w.safetensors")
    settings = dataclasses.replace(small(), epochs=10, weights=str(tmp_path / "w.safetensors"))
    ntkit.analyze(settings, out=tmp_path / "run")
    found, trained = results(tmp_path / "run"), results(whole)
    assert found["training"] is None
    assert found["along"] is found["against_loss"] is None
    assert found["machines"] == trained["machines"]
    assert found["invariances"] == trained["invariances"]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_users_own_module_on_tokens(tmp_path):
    """An embedding, a LayerNorm and a tied weight, through --model file:factory."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 90)
    np.savez(tmp_path / "tokens.npz", x=(draw.integers(0, 6, (90, 7)) + 6 * y[:, None]).astype(np.int64), y=y)
    done = command(
        "analyze", "--data", tmp_path / "tokens.npz", "--model", f"{EXAMPLE}:make", "--epochs", 4, "--optimizer",
        "adam", "--lr", "0.01", "--track-points", 20, "--out", tmp_path / "run",
    ).done()  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert found["model"]["fallback"] == {}
    assert found["data"]["kind"] == "tokens"
    assert found["invariances"] is None
    assert found["machines"][1]["status"] == "optimal"
    assert all(c["ok"] for c in found["certificates"])


BROKEN = '''
import torch
from torch import nn
def one(outputs): return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs + 3))
def narrow(): return nn.Conv2d(3, 1, 3)
def needs(width): return nn.Linear(width, 1)
def text(): return "no module"
class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 1)
    def forward(self, x): return self.layer(x.flatten(1) - x.flatten(1).mean(0))
class Noisy(Mixing):
    def forward(self, x): return self.layer(nn.functional.dropout(x.flatten(1), 0.5, training=True))
'''  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vg"}, r"--model: got 'vg'; expected a built-in name.*Did you mean vgg\?"),
        ({"model": "no.such:thing"}, "no module no; expected an importable module"),
        ({"model": "FILE:nothing"}, "no factory 'nothing'"),
        ({"model": "FILE:one"}, "got 4 outputs for 2 classes; expected one output per class, or one output"),
        ({"model": "FILE:narrow"}, r"got input \(2, 1, 8, 8\) float32, on which its forward failed.*Check channels"),
        ({"model": "FILE:needs"}, "a factory that could not be called"),
        ({"model": "FILE:text"}, "got str; expected a torch.nn.Module"),
        ({"model": "FILE:Mixing"}, "changes by .* when the sample is evaluated alone"),
        ({"model": "FILE:Noisy"}, "a forward pass that draws random numbers"),
        ({"classes": ("3", "11")}, "11"),
        ({"classes": ("3",)}, "at least two"),
        ({"data": "mnst"}, "Did you mean mnist"),
        ({"data": "mnist"}, "data_dir"),
        ({"optimizer": "sdg"}, "Did you mean sgd"),
        ({"epochs": 0}, "--epochs: got 0"),
        ({"batch_size": 0}, "--batch-size: got 0"),
        ({"lr": -1.0}, r"--lr: got -1\.0"),
        ({"device": "tpu"}, "--device: got 'tpu'"),
        ({"memory": "lots"}, "memory: got 'lots'"),
        ({"weights": "WRONG", "epochs": 10}, r"(?s)missing.*0\.bias"),
        ({"weights": "x.safetensors"}, "--epochs: got 3; expected no training settings with --weights"),
        ({"weights": "nowhere.safetensors", "epochs": 10}, "nowhere.safetensors"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refusals_come_before_any_work(change, message, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    save_file({"0.weight": torch.zeros(2, 2), "9.extra": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    if "model" in change:
        change = {"model": change["model"].replace("FILE", str(tmp_path / "broken.py"))}
    if change.get("weights") == "WRONG":
        change = {"weights": str(tmp_path / "wrong.safetensors"), "epochs": 10}
    with pytest.raises(ntkit.Refused, match=message):
        ntkit.analyze(small(**change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_data_is_refused_by_name(tmp_path):
    x, y = np.random.default_rng(0).random((20, 5)), np.arange(20) % 2
    x[7, 2] = np.nan
    np.savez(tmp_path / "nan.npz", x=x, y=y)
    np.savez(tmp_path / "empty.npz", x=x[:0], y=y[:0])
    with pytest.raises(ntkit.Refused, match=r"nan\.npz.*nan.*7"):
        ntkit.analyze(small(data=str(tmp_path / "nan.npz"), classes=None), out=tmp_path / "run")
    with pytest.raises(ntkit.Refused, match=r"empty\.npz"):
        ntkit.analyze(small(data=str(tmp_path / "empty.npz"), classes=None), out=tmp_path / "run")


def test_a_refusal_with_overwrite_leaves_the_old_run(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(ntkit.Refused, match="Did you mean vgg"):
        ntkit.analyze(small(model="vg"), out=run, overwrite=True)
    same_runs(whole, run)
    ntkit.analyze(small(model="linear"), out=run, overwrite=True)
    assert results(run)["model"]["name"] == "linear"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_from_takes_its_settings_from_the_run(whole, tmp_path):
    done = command("analyze", "--from", whole, "--epochs", "7").done()
    assert done.returncode == 2
    assert "got further settings" in done.stderr
    with pytest.raises(ntkit.Refused, match=r"got another file; expected the run\.json of ntkit analyze"):
        ntkit.analyze(from_run=whole / "trajectory")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    write_json(run / "run.json", read_json(run / "run.json") | {"status": "running"})
    with pytest.raises(ntkit.Refused, match="an unfinished run, and --out"):
        ntkit.analyze(from_run=run, out=tmp_path / "other")


def test_a_network_that_died_or_diverged_is_reported_not_dropped(tmp_path):
    """Huge steps: the measures that have no answer say why; the rest of the report stands."""
    data = ntkit.data.load("digits", classes=("3", "8"), train=60, test=30)
    signs = 2.0 * data.y_train.double() - 1
    for name, settings, stop, without in (
        ("huge", small(lr=1e3), "steps", "machine of the conjugate kernel"),
        ("diverged", small(lr=1e9, momentum=0.0), "diverged", "kernel matrix of the after kernel"),
    ):
        ntkit.analyze(settings, out=tmp_path / name)
        found = results(tmp_path / name)
        net = build(settings.model, data.input_shape, 1, seed=0)
        K = ntkit.TangentKernel(net, "trace")(data.x_train).double()  # at the start all is as ever
        assert found["quality"][0]["alignment"] == pytest.approx(ntkit.alignment(K, signs), rel=1e-4)
        missing = [c["what"] for c in found["certificates"] if "not measured" in c["what"]]
        assert any(text.startswith(without) for text in missing), (name, missing)
        assert any(text.startswith("along: not measured. K: got inf at index [0, 0]") for text in missing)
        assert found["training"]["stop"] == stop
        assert (tmp_path / name / "report.html").exists()


def test_a_model_without_last_hidden_features_still_gets_its_report(tmp_path):
    (tmp_path / "seq.py").write_text(
        "from torch import nn\n"
        "from dataclasses import dataclass\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.token = nn.Linear(8, 1)\n"
        "    def forward(self, x): return self.token(x[:, 0]).tanh().mean(1)\n"
    )
    ntkit.analyze(small(model=f"{tmp_path / 'seq.py'}:Net"), out=tmp_path / "run")
    found = results(tmp_path / "run")
    assert [m["kernel"] for m in found["machines"]] == ["init", "after"]
    reasons = [
        c["what"] for c in found["certificates"] if "conjugate kernel (last hidden layer): not measured" in c["what"]
    ]
    assert "Name a layer" in reasons[0]
    assert found["similarity"]["after_conjugate"] is None


def test_folders_are_never_overwritten_unasked(whole, tmp_path):
    with pytest.raises(ntkit.Refused, match=r"holds a run.*--from"):
        ntkit.analyze(small(), out=whole)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ntkit.Refused, match="got other files"):
        ntkit.analyze(small(), out=tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ntkit.Refused, match="got a folder that cannot be written"):
        ntkit.analyze(small(), out=tmp_path / "file" / "run")


def test_a_run_goes_on_only_with_the_same_data_model_and_versions(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    state = read_json(run / "run.json")
    write_json(run / "run.json", state | {"status": "running", "identity": state["identity"] | {"data": "other"}})
    with pytest.raises(ntkit.Refused, match=r"changed since the run began: data \(was other"):
        ntkit.analyze(from_run=run)
    with pytest.raises(ntkit.Refused, match=r"run\.json: got no such file"):
        ntkit.analyze(from_run=tmp_path / "nowhere")


def test_one_line_on_stderr_and_exit_2():
    done = python_m_ntkit("analyze", "--model", "vg", "--out", "never")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("ntkit: --model: got 'vg'")


@pytest.mark.parametrize(
    ("name", "classes", "train", "test"), [("mnist", ("3", "8"), 11982, 1984), ("cifar10", ("3", "5"), 10000, 2000)]
)
def test_real_data_on_a_sample(name, classes, train, test, shared_data, tmp_path):
    folder = shared_data / {"mnist": "mnist", "cifar10": "cifar-10"}[name]
    full = ntkit.data.load(name, data_dir=folder, classes=classes)
    assert (len(full.x_train), len(full.x_test)) == (train, test)
    ntkit.analyze(small(data=name, data_dir=str(folder), classes=classes, model="mlp", epochs=1), out=tmp_path / "run")
    found = results(tmp_path / "run")
    for m in found["machines"]:  # a few dead features need not separate 60 images: then a status, advice, and no number
        assert (m["status"], m["advice"]) == ("optimal", "") or (
            m["test_error"]["value"] is None and "KernelRidge" in m["advice"]
        )
        assert m["ridge_test_error"]["value"] <= 1
    assert all(c["ok"] for c in found["certificates"] if "SVM" not in c["what"])
