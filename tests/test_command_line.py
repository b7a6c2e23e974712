"""Options of every command: --quiet, --json, --config; the logger."""

from __future__ import annotations

import inspect
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
from processes import command as started

import ntkit
from ntkit import Refused, cli
from ntkit.base import progress
from ntkit.base.progress import task
from ntkit.commands.compare import compare
from ntkit.commands.explain import explain_run
from ntkit.commands.option_file import of_every_command, with_options_of
from ntkit.commands.settings import CompareSettings, ExplainSettings, Settings, SolveSettings, TrackSettings
from ntkit.commands.track import track_run
from ntkit.studies import study


def python_m_ntkit(*words, cwd):
    """The command line as a user starts it, Python and imports included."""
    return subprocess.run(
        [sys.executable, "-m", "ntkit", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def ntkit_command(*words, cwd):
    return started(*words, cwd=cwd).done()


SMALL = ("--train", 60, "--test", 30, "--model", "mlp", "--epochs", 1, "--track-points", 20, "--probe-points", 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run, asked for as JSON and without notes."""
    folder = tmp_path_factory.mktemp("run")
    done = python_m_ntkit("analyze", "--classes", 3, 8, *SMALL, "--out", folder / "a", "--json", "--quiet", cwd=folder)
    return folder, done


def test_json_and_quiet(run):
    folder, done = run
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # nothing else is on standard output
    assert document["folder"] == str(folder / "a")
    told = json.loads((folder / "a" / "results.json").read_text())
    assert document["network"] == told["network"]
    assert done.stderr == ""


def test_each_command_gives_one_document(run):
    folder, _ = run
    for words, keys in (
        (("verify", folder / "a"), {"files", "summary"}),
        (("report", folder / "a"), {"report"}),
        (("track", folder / "a", "--points", 12, "--k", 3), {"folder", "settings", "snapshots"}),
        (("infinite", "--train", 100, "--epochs", 1, "--folds", 2), {"accuracies", "settings"}),
    ):
        done = ntkit_command(*words, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert keys <= json.loads(done.stdout).keys()


def test_a_refusal_is_said_in_quiet_too(tmp_path):
    done = ntkit_command("--quiet", "--json", "verify", tmp_path / "absent", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ntkit: ")


def test_a_command_without_json_prints_tables(run):
    folder, _ = run
    done = ntkit_command("verify", folder / "a", cwd=folder)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("ok ")


def test_options_from_a_file(run, tmp_path):
    folder, _ = run
    told = folder / "a" / "run.json"
    words = with_options_of(told, ["analyze", "--lr", "0.5", "--out", "b"])
    assert words[:5] == ["analyze", "--lr", "0.5", "--out", "b"]
    rest = words[5:]
    assert rest[rest.index("--classes") + 1 : rest.index("--classes") + 3] == ["3", "8"]
    assert rest[rest.index("--train") + 1] == "60"
    assert "--lr" not in rest  # the command line wins
    assert "--weights" not in rest  # null
    done = ntkit_command("analyze", "--config", told, "--epochs", 2, "--out", tmp_path / "b", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "b" / "run.json").read_text())["settings"]
    assert [settings[name] for name in ("epochs", "train", "model")] == [2, 60, "mlp"]
    assert settings["classes"] == ["3", "8"]


def test_names_of_earlier_versions_in_a_file(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": {"probe_samples": 4}}')
    assert with_options_of(tmp_path / "run.json", ["analyze"]) == ["analyze", "--probe-points", "4"]
    (tmp_path / "run.json").write_text('{"settings": {"sample": 16, "folds": 2}}')
    assert with_options_of(tmp_path / "run.json", ["infinite"]) == ["infinite", "--sample", "16", "--folds", "2"]


@pytest.fixture(scope="module")
def parameters():
    """By command, its parameters: the argument's own names, and those of options."""
    found = {}
    for command in (name for name in cli.app if not name.startswith("-")):
        arguments = cli.app[command].assemble_argument_collection()
        found[command] = [argument for argument in arguments if argument.show]
    return found


COMMANDS = {"analyze", "track", "explain", "compare", "study", "infinite", "gram", "solve", "report", "verify"}


def test_what_a_command_takes_has_one_spelling(parameters):
    """A folder is given by its place, all else by its option; nothing by both."""
    assert parameters.keys() == COMMANDS
    places: dict[str, set[str]] = {}
    for command, arguments in parameters.items():
        for argument in arguments:
            if not argument.names[0].startswith("--"):
                places.setdefault(argument.names[0], set()).add(command)
            else:
                both = command == "gram" and argument.names[0] in ("--model", "--data")  # MODEL DATA, or by --config
                assert both or argument.field_info.kind is argument.field_info.KEYWORD_ONLY, (command, argument.names)
    assert places == {
        "RUN": {"track", "explain", "report", "verify"}, "RUNS": {"compare"}, "STORE": {"solve"}, "NAME": {"study"},
    }  # fmt: skip


def test_options_mean_the_same_in_all_commands(parameters):
    """One name takes one kind of value; what computes a kernel says how much memory it may take, and where."""
    kinds: dict[str, set[str]] = {}
    options: dict[str, set[str]] = {}
    for command, arguments in parameters.items():
        for argument in arguments:
            options.setdefault(argument.names[0], set()).add(command)
            kind = re.sub(r"<class '(.*)'>| \| None", r"\1", str(argument.hint))
            kinds.setdefault(argument.names[0], set()).add(kind)
    # ntkit compare takes several models; ntkit explain RUN --test 3 17 names examples, as many as the others count
    assert {name for name, found in kinds.items() if len(found) > 1} == {"--model", "--test"}
    assert options["--memory"] == {"analyze", "track", "explain", "compare", "gram", "solve"}
    assert options["--device"] == {"analyze", "track", "infinite", "gram", "solve"}  # explain and compare: as the run
    assert options["--model"] == options["--data"] == COMMANDS - {"study", "report", "verify"}
    assert options["--points"] == {"track", "compare"}  # how many


def test_defaults_of_options_are_those_of_the_functions():
    given = {name: p.default for name, p in inspect.signature(ntkit.compare).parameters.items()}
    for name, value in vars(CompareSettings()).items():
        assert str(given[name]) == str(value), name
    given = inspect.signature(ntkit.study).parameters
    for name, parameter in inspect.signature(cli.study).parameters.items():
        assert given[name].default == parameter.default, name
    training, options = inspect.signature(ntkit.train).parameters, Settings()
    assert (training["seed"].default, training["target_loss"].default) == (options.seed, options.target_loss)
    tracking, track_options = inspect.signature(ntkit.track).parameters, TrackSettings()
    for name in ("k", "outputs", "memory"):
        assert tracking[name].default == getattr(track_options, name), name


def test_memory_and_device_are_checked_first(run, tmp_path):
    folder = run[0] / "a"
    for call, message in (
        (lambda: track_run(folder, TrackSettings(device="tpu", out=tmp_path / "t")), "--device: got 'tpu'"),
        (lambda: track_run(folder, TrackSettings(outputs="sum", out=tmp_path / "t")), "--outputs: got 'sum'"),
        (lambda: track_run(folder, TrackSettings(k=0, out=tmp_path / "t")), "--k: got 0"),
        (lambda: explain_run(folder, ExplainSettings(memory="much", out=tmp_path / "e")), "memory: got 'much'"),
        (lambda: compare([folder, folder], memory="much", out=tmp_path / "c"), "memory: got 'much'"),
        (lambda: SolveSettings(spectrum=2, device="tpu").check(), "--device: got 'tpu'"),
    ):
        with pytest.raises(Refused, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "bytes_"), [(None, 3 * 10**9), ("20 MB", 2 * 10**7)])
def test_an_explanation_keeps_to_the_memory_of_its_run_or_its_own(run, tmp_path, monkeypatch, given, bytes_):
    asked = []

    def told(*args, memory, **options):
        asked.append(memory)
        raise KeyboardInterrupt

    monkeypatch.setattr("ntkit.commands.explain.PathKernel", told)
    with pytest.raises(KeyboardInterrupt):
        explain_run(run[0] / "a", ExplainSettings(test=(3,), memory=given, out=tmp_path / "e"), say=str)
    assert asked == [bytes_]


def test_a_study_and_a_tracking_say_that_they_go_on(run, tmp_path):
    """Ctrl-C at the first part of a study and at the second snapshot of a run; the snapshot before it is kept."""
    lines = []

    def stop(line):
        lines.append(line)
        if len(lines) == stop.at:
            raise KeyboardInterrupt

    stop.at = 1
    with pytest.raises(KeyboardInterrupt):
        study("jacot2018", out=tmp_path / "s", say=stop)
    assert lines == ["outputs-8", "Stopped. What is finished is kept; the same command or call goes on."]
    lines, stop.at = [], 3  # the heading and two snapshots
    s = TrackSettings(out=tmp_path / "t", points=8, k=2)
    with pytest.raises(KeyboardInterrupt):
        track_run(run[0] / "a", s, say=stop)
    assert lines[3:] == ["Stopped. What is finished is kept; the same command or call goes on."]
    again, whole = [], []
    track_run(run[0] / "a", s, say=again.append)
    track_run(run[0] / "a", replace(s, out=tmp_path / "u"), say=whole.append)
    assert lines[:3] + again[1:-1] == whole[:-1]
    assert len(again) == 3  # the heading, the snapshot that was left, the report


def test_forms_of_values(tmp_path):
    file = tmp_path / "o.toml"
    file.write_text('batch-size = 8\nfollow = true\nquick = false\nclasses = ["a b", "c"]\nlr = 1e-3\n')
    assert with_options_of(file, ["x", "--batch-size=9"]) == [
        "x", "--batch-size=9", "--follow", "--classes", "a b", "c", "--lr", "0.001",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("o.toml", "lr = ", r"o\.toml: got no TOML"),
        ("o.toml", "[lr]\na = 1", r"--lr: got .*expected a number or a text"),
        ("o.toml", "classes = [[1]]", "--classes: got"),
        ("o.json", "[1]", "o.json: got list; expected options by name"),
        ("o.json", '{"settings": 3}', "expected options by name"),
    ],
)
def test_files_that_hold_no_options(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(Refused, match=message):
        with_options_of(tmp_path / name, ["analyze"])
    with pytest.raises(Refused, match="got no such file"):
        with_options_of(tmp_path / "absent.toml", ["analyze"])


def test_options_of_every_command_in_a_file(run, tmp_path):
    """They belong to no command: as its options they were unknown."""
    folder, _ = run
    file = tmp_path / "o.toml"
    file.write_text("quiet = true\njson = true\nlr = 1\n")
    assert of_every_command(file) == {"quiet": True, "json": True}
    assert with_options_of(file, ["analyze"]) == ["analyze", "--lr", "1"]
    file.write_text("quiet = false\njson = true\n")
    done = ntkit_command("--config", file, "verify", folder / "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"files", "summary"}
    file.write_text('quiet = "yes"')
    with pytest.raises(Refused, match="--quiet: got 'yes'; expected true or false"):
        of_every_command(file)
    file.write_text('config = "other.toml"')
    with pytest.raises(Refused, match=r"--config: got 'other\.toml'; expected no other file of options"):
        with_options_of(file, ["analyze"])


def test_unknown_option_of_a_file(tmp_path):
    (tmp_path / "o.toml").write_text("learning_rate = 0.1")
    done = ntkit_command("analyze", "--config", tmp_path / "o.toml", cwd=tmp_path)
    assert done.returncode != 0
    assert "--learning-rate" in done.stdout + done.stderr


def test_logger_and_quiet_progress(caplog, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)

    def work():
        with task("counting", total=2) as own:
            for _ in range(2):
                time.sleep(0.01)
                own.advance()

    with caplog.at_level(logging.INFO, logger="ntkit"):
        work()
        assert "counting: 100%" in capsys.readouterr().err
        progress.show(False)
        try:
            work()
        finally:
            progress.show(True)
        assert capsys.readouterr().err == ""
    assert [r.getMessage() for r in caplog.records if r.name == "ntkit"] == ["counting: 2 of 2 in 0 s"] * 2


@pytest.mark.parametrize("caused", [True, False])
def test_an_error_that_ctrl_c_caused_is_ctrl_c(caused, monkeypatch):
    def failing():
        try:
            raise KeyboardInterrupt if caused else ValueError("before")
        except BaseException:
            raise RuntimeError("release unlocked lock")  # noqa: B904 (as in Python's own locks)

    monkeypatch.setattr(cli, "app", SimpleNamespace(meta=failing))
    with warnings.catch_warnings(), pytest.raises(SystemExit if caused else RuntimeError) as found:
        cli.main()
    assert not caused or found.value.code == 130
