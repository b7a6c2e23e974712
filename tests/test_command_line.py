"""Options of every command: --quiet, --json, --config; the logger."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import pytest

from ntkit import Refused
from ntkit.base import progress
from ntkit.base.progress import task
from ntkit.commands.option_file import with_options_of


def ntkit_command(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "ntkit", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


SMALL = ("--train", 60, "--test", 30, "--model", "mlp", "--epochs", 1, "--track-points", 20, "--probe-samples", 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run, asked for as JSON and without notes."""
    folder = tmp_path_factory.mktemp("run")
    done = ntkit_command("analyze", "--classes", 3, 8, *SMALL, "--out", folder / "a", "--json", "--quiet", cwd=folder)
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
