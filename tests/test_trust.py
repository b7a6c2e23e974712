"""A run folder is data: code that it names runs only if this user has run it here, or names it again, or says so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import types
from pathlib import Path

import pytest

import ntkit
import ntkit.cli
from ntkit.base.factory import READ, find, read_code, source_hash
from ntkit.base.files import read_json, write_json
from ntkit.base.trust import record_folder
from ntkit.commands.explain import explain_run
from ntkit.commands.infinite_width import infinite
from ntkit.commands.settings import InfiniteSettings, TrackSettings
from ntkit.commands.track import track_run

NET = """
import math
from pathlib import Path
from torch import nn
Path(MARK).touch()
def make(shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))
other = make
"""
DATA = """
from pathlib import Path
Path(MARK).touch()
import torch
def points():
    draw = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 3, 3, generator=draw), torch.arange(12) % 2
"""
SMALL = {"train": 8, "test": 2, "epochs": 1, "track_points": 4, "probe_points": 2}


@pytest.fixture(autouse=True)
def own_record(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def mark(tmp_path) -> Path:
    """Exists once any of the code here has run."""
    return tmp_path / "executed"


def write(path: Path, text: str, mark: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("MARK", repr(str(mark))))
    return path


def run_of(folder: Path, model="linear", data="digits", status="running", **identity) -> Path:
    """A run folder as a stranger could have made it, with a trajectory for `track`."""
    (folder / "trajectory").mkdir(parents=True)
    settings = {"model": model, "data": data, **SMALL, "train": 20, "test": 10}
    run = {"format": 1, "status": status, "settings": settings, "identity": identity}
    write_json(folder / "run.json", run | {"started": "2026-01-01T00:00:00Z"})
    return folder


def refused_by_all(run: Path, mark: Path, message: str) -> None:
    for call in (
        lambda: ntkit.analyze(from_run=run),
        lambda: track_run(run, say=lambda line: None),
        lambda: explain_run(run, say=lambda line: None),
    ):
        with pytest.raises(ntkit.Refused, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert not mark.exists()
        assert "--trust" in str(caught.value)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_a_run_names_is_refused_before_import(tmp_path, mark, monkeypatch):
    net = write(tmp_path / "far" / "net.py", NET, mark)
    refused_by_all(
        run_of(tmp_path / "a", f"{net}:make"), mark, f"which would run {net.resolve()} .SHA-256 {sha(net)}.*--model"
    )
    monkeypatch.chdir(tmp_path)
    refused_by_all(run_of(tmp_path / "b", "far/net.py:make"), mark, f"which would run {net.resolve()}")
    refused_by_all(run_of(tmp_path / "c", "b/../far/./net.py:make"), mark, f"which would run {net.resolve()}")
    (tmp_path / "link.py").symlink_to(net)
    refused_by_all(run_of(tmp_path / "d", "link.py:make"), mark, f"which would run {net.resolve()}")
    refused_by_all(run_of(tmp_path / "e", data="far/net.py:make"), mark, "--data far/net.py:make, which would run")
    noted = {"model file": "0" * 16}
    refused_by_all(run_of(tmp_path / "f", "far/net.py:make", **noted), mark, "not the file that the run noted .0000")


def test_a_module_and_its_packages_are_refused_before_import(tmp_path, mark, monkeypatch):
    write(tmp_path / "evil" / "__init__.py", "from pathlib import Path\nPath(MARK).touch()", mark)
    write(tmp_path / "evil" / "sub.py", "def make(): pass", mark)
    write(tmp_path / "space" / "inner" / "deep.py", NET, mark)  # packages without __init__
    monkeypatch.syspath_prepend(tmp_path)
    refused_by_all(run_of(tmp_path / "a", "evil:make"), mark, "evil/__init__.py .SHA-256")
    refused_by_all(run_of(tmp_path / "b", "evil.sub:make"), mark, "evil/__init__.py .SHA-256.*evil/sub.py .SHA-256")
    refused_by_all(run_of(tmp_path / "c", "space.inner.deep:make"), mark, "inner/deep.py .SHA-256")
    refused_by_all(run_of(tmp_path / "d", data="evil.sub:make"), mark, "--data evil.sub:make")
    refused_by_all(run_of(tmp_path / "e", "builtins:print"), mark, "builtins .built-in. .SHA-256 none, part of Python")
    assert "evil" not in sys.modules
    assert "space" not in sys.modules


def test_dotted_names_are_found_where_import_finds_them(tmp_path, mark, monkeypatch):
    write(tmp_path / "pack" / "__init__.py", "seen = []", mark)
    write(tmp_path / "pack" / "nets.py", "from pack import seen\nseen.append(__name__)\n" + NET, mark)
    write(tmp_path / "bare" / "inner" / "deep.py", NET, mark)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pack.nets:make", "bare.inner.deep:make", "torch.nn:ReLU", "collections.abc:Sized", "os.path:join"):
        factory = find("--model", name, ())
        assert factory is getattr(sys.modules[name.split(":")[0]], factory.__name__)
    assert sys.modules["pack.nets"].__file__ == str(tmp_path / "pack" / "nets.py")
    assert sys.modules["pack"].seen == ["pack.nets"]
    for name in (
        "bare:make",
        "bare.inner:make",
        "pack.nothing:make",
        "pack..nets:make",
        ".nets:make",
        "pack.nets.x:make",
        "no such:make",
        "\0:make",
    ):
        with pytest.raises(ntkit.Refused, match="expected an importable module"):
            find("--model", name, ())
    monkeypatch.setitem(sys.modules, "session", types.ModuleType("session"))  # like __main__ of a notebook
    sys.modules["session"].make = len
    assert find("--model", "session:make", ()) is len
    for module in ("pack", "pack.nets", "bare", "bare.inner", "bare.inner.deep"):
        del sys.modules[module]


def test_behind_a_link_the_files_beside_it_are_those_of_its_own_folder(tmp_path, mark):
    """A link to a known file, in a stranger's folder, must not make it import what lies beside the link."""
    write(tmp_path / "mine" / "net.py", "from pathlib import Path\nimport beside_net\nmake = lambda: __file__", mark)
    write(tmp_path / "mine" / "beside_net.py", "", mark)
    write(tmp_path / "theirs" / "beside_net.py", "Path(MARK).touch()", mark)
    (tmp_path / "theirs" / "net.py").symlink_to(tmp_path / "mine" / "net.py")
    assert find("--model", f"{tmp_path}/theirs/net.py:make", ())() == str(tmp_path.resolve() / "mine" / "net.py")
    assert not mark.exists()
    del sys.modules["beside_net"]


def test_what_runs_is_what_was_read(tmp_path, mark, monkeypatch):
    """Neither a file changed since it was hashed nor a compiled copy beside it runs."""
    net = write(tmp_path / "net.py", "def make(): return 1", mark)
    module = write(tmp_path / "quick.py", "def make(): return 1", mark)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{net}:make", "quick:make"):
        code = read_code("--model", name)
        net.write_text("def make(): return 2")
        module.write_text("def make(): return 2")
        assert code.run()() == 1
        token = READ.set({("--model", name): code})
        assert find("--model", name, ())() == 1
        assert source_hash("--model", name) == next(iter(code.files.values()))[:16]
        READ.reset(token)
        sys.modules.pop("quick", None)
        assert find("--model", name, ())() == 2
        sys.modules.pop("quick", None)
        module.write_text("def make(): return 1")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run that this user began, of a model and data of his own, in a folder of the record."""
    home = tmp_path_factory.mktemp("home")
    net, data = write(home / "net.py", NET, home / "ran"), write(home / "points.py", DATA, home / "ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home / "state"))
        ntkit.analyze(ntkit.Settings(model=f"{net}:make", data=f"{data}:points", **SMALL), out=home / "run")
    run = read_json(home / "run" / "run.json")
    assert run["identity"]["model file"] == sha(net)[:16]
    assert run["identity"]["data file"] == sha(data)[:16]
    return home


@pytest.fixture
def home(own_run, tmp_path, monkeypatch):
    """The record and the files of that run, and a copy of its folder to work on, unfinished."""
    shutil.copytree(own_run / "run", tmp_path / "run")
    shutil.copytree(own_run / "state", tmp_path / "state", dirs_exist_ok=True)
    file = tmp_path / "run" / "run.json"
    write_json(file, read_json(file) | {"status": "running"})
    (own_run / "ran").unlink(missing_ok=True)
    yield own_run
    write(own_run / "net.py", NET, own_run / "ran")
    write(own_run / "points.py", DATA, own_run / "ran")


def test_ones_own_run_goes_on_without_a_word(home, tmp_path):
    said = []
    ntkit.analyze(from_run=tmp_path / "run", say=said.append)
    assert said[0] == f"Resuming {tmp_path / 'run'}"
    assert (home / "ran").exists()
    track_run(tmp_path / "run", TrackSettings(points=4, k=2), say=lambda line: None)
    ntkit.analyze(from_run=tmp_path / "run", out=tmp_path / "again", say=said.append)
    assert not [line for line in said if "Differences" in line]


def test_another_file_is_not_ones_own(home, tmp_path):
    """The same content elsewhere, another factory of the same file, a changed file, a changed name: none is known."""
    run = tmp_path / "run" / "run.json"
    saved = read_json(run)
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(home / "net.py", tmp_path / "copy" / "net.py")
    for change in ({"model": f"{copy}:make"}, {"model": f"{home / 'net.py'}:other"}, {"model": "os:abort"}):
        write_json(run, saved | {"settings": saved["settings"] | change})
        refused_by_all(tmp_path / "run", home / "ran", "expected code of which you have run the same file")
    write_json(run, saved)
    (home / "net.py").write_text((home / "net.py").read_text() + "# changed\n")
    noted = saved["identity"]["model file"]
    refused_by_all(tmp_path / "run", home / "ran", f"not the file that the run noted .{noted}.")
    forged = saved["identity"] | {"model file": sha(home / "net.py")[:16]}
    write_json(run, saved | {"identity": forged})
    refused_by_all(tmp_path / "run", home / "ran", "got --model")
    write(home / "net.py", NET, home / "ran")
    (home / "points.py").write_text((home / "points.py").read_text() + "# changed\n")
    write_json(run, saved)
    refused_by_all(tmp_path / "run", home / "ran", "got --data")


def test_named_again_or_trusted_it_runs(home, tmp_path):
    shutil.rmtree(tmp_path / "state")
    run = tmp_path / "run"
    model, data = (read_json(run / "run.json")["settings"][key] for key in ("model", "data"))
    refused_by_all(run, home / "ran", "got --model")
    with pytest.raises(ntkit.Refused, match="got --data"):  # one of two
        ntkit.analyze(ntkit.Settings(model=model), from_run=run)
    assert not (home / "ran").exists()
    with pytest.raises(ntkit.Refused, match=r"--model, with .*: got mlp; expected .*net.py:make, as in the run"):
        ntkit.analyze(ntkit.Settings(model="mlp", data=data), from_run=run)
    with pytest.raises(ntkit.Refused, match="got further settings"):
        ntkit.analyze(ntkit.Settings(model=model, data=data, epochs=9), from_run=run)
    track_run(run, TrackSettings(points=4, k=2), say=lambda line: None, trust=True)
    assert (home / "ran").exists()
    refused_by_all(run, tmp_path / "none", "got --model")  # trusted once, not for ever
    ntkit.analyze(ntkit.Settings(model=model, data=data), from_run=run)
    ntkit.analyze(from_run=run, out=tmp_path / "again")  # named once, known since


def test_the_command_line(tmp_path, mark):
    net = write(tmp_path / "net.py", NET, mark)
    run = run_of(tmp_path / "run", f"{net}:make", status="complete")
    told = json.loads((run / "run.json").read_text())
    del told["checksum"]
    told["identity"]["data"] = ntkit.data.load("digits", train=20, test=10).hash
    write_json(run / "run.json", told)
    write_json(run / "results.json", {})
    again = ("analyze", "--from", run, "--out", tmp_path / "again")

    def cli(*words):
        with contextlib.suppress(SystemExit):
            ntkit.cli.app([*map(str, words)])

    with pytest.raises(ntkit.Refused) as caught:
        cli(*again)
    assert f"would run {net.resolve()} (SHA-256 {sha(net)})" in str(caught.value)
    assert f"give --model {net}:make yourself, or --trust" in str(caught.value)
    assert not mark.exists()
    with pytest.raises(ntkit.Refused, match="trajectory"):  # there is none to follow
        cli("track", run, "--trust")
    assert mark.exists()
    mark.unlink()
    cli(*again, "--model", f"{net}:make")
    assert mark.exists()
    assert (tmp_path / "again" / "report.html").exists()


def test_the_record_is_private_and_its_damage_is_no_error(tmp_path, mark):
    net = write(tmp_path / "net.py", NET, mark)
    settings = InfiniteSettings(model=f"{net}:make", train=100, folds=2, epochs=1)
    infinite(settings)
    (entry,) = record_folder().iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert json.loads(entry.read_text()) == {"factory": "make", "files": {str(net.resolve()): sha(net)}}
    run = run_of(tmp_path / "run", f"{net}:make")
    content = entry.read_bytes()
    mark.unlink()
    entry.chmod(0o666)  # anyone could have written it
    refused_by_all(run, mark, "got --model")
    entry.chmod(0o600)
    for damage in (b"", b"\xff{", content[:-2], content + b" "):
        entry.write_bytes(damage)
        refused_by_all(run, mark, "got --model")
    entry.unlink()
    os.mkfifo(entry)
    refused_by_all(run, mark, "got --model")
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("in the way")
    infinite(settings)
    assert mark.exists()


def test_a_model_file_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nothing.py")
    for name, message in {
        "pipe": "a pipe",
        "folder": "a folder",
        "loop": "symbolic links",
        "gone": "no such file",
        "n" * 300: "name too long",
    }.items():
        with pytest.raises(ntkit.Refused, match=message):
            find("--model", f"{tmp_path / name}.py:make", ())
    for text in ("def make(:", "x = 1\0", "(" * 500, "\xff".encode("latin-1")):
        (tmp_path / "bad.py").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ntkit.Refused, match=r"got no Python: .*Correct"):
            find("--model", f"{tmp_path / 'bad.py'}:make", ())


def test_names_in_refusals_cannot_move_the_cursor(tmp_path, mark):
    net = write(tmp_path / "net\n\x1b[2K\u202e.py", NET, mark)
    refused_by_all(run_of(tmp_path / "run", f"{net}:make"), mark, r"net\\n\\x1b\[2K\\u202e.py")
