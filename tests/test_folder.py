"""The folder of a run: one writer, links, disks that are full or cannot be written, folders that are deleted midway."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from damage_case import SETTINGS, STUDY, X, Y, looped, mse, net, sgd, trained
from processes import command

import ntkit
from ntkit.base import files
from ntkit.base.checks import Refused
from ntkit.base.files import read_json, write_json
from ntkit.base.lock import LOCK, FolderLock
from ntkit.commands import analyze as analysis
from ntkit.commands.settings import TrackSettings
from ntkit.commands.stage_files import REPLACED
from ntkit.commands.track import track_run
from ntkit.commands.verify import verify
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report import render
from ntkit.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("short_pages")
HELD = r"got a folder that process {} on host .* is writing since .*; expected one writer at a time\. Wait for it"
LINEAR = ntkit.Settings(classes=("3", "8"), train=12, test=6, epochs=1, track_points=6, probe_points=2, model="linear")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names_in(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def run(tmp_path_factory, short_pages) -> Path:
    return ntkit.analyze(LINEAR, out=tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def holder():
    """Starts another process that holds the lock of a folder."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        script = "import sys, time; from ntkit.base.lock import FolderLock; lock = FolderLock(sys.argv[1]);"
        script += "lock.acquire(); print('held', flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


# --- the lock ------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_by_every_writer_and_readers_are_not(run, holder, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    copy, pid = tmp_path / "run", {}
    trained(tmp_path / "trained")
    places = {
        "run": copy, "trajectory": tmp_path / "trained", "track": copy / "track", "loop": tmp_path / "loop",
        "study": tmp_path / "study", "decomposition": tmp_path / "decomposition",
    }  # fmt: skip
    for name, place in places.items():
        pid[name] = holder(place).pid
    kernel = PathKernel(Trajectory.open(tmp_path / "trained"), model=net(), data=(X, Y), loss=mse)
    write_json(copy / "run.json", read_json(copy / "run.json") | {"status": "running"})
    writers = {
        "run": [
            lambda: ntkit.analyze(from_run=copy),
            lambda: ntkit.analyze(LINEAR, out=copy, overwrite=True),
            lambda: ntkit.analyze(LINEAR, out=copy),
        ],
        "trajectory": [lambda: trained(tmp_path / "trained")],
        "track": [lambda: track_run(copy, TrackSettings(points=6, k=2), say=lambda line: None)],
        "loop": [lambda: looped(tmp_path / "loop"), lambda: looped(tmp_path / "loop", resume=True)],
        "study": [lambda: STUDY.run("quick", tmp_path / "study")],
        "decomposition": [lambda: kernel.decompose(X[:2], path=tmp_path / "decomposition")],
    }
    for name, calls in writers.items():
        for call in calls:
            with pytest.raises(Refused, match=HELD.format(pid[name])):
                call()
    assert Trajectory.open(tmp_path / "trained").state(8)
    assert Trajectory.open(copy / "trajectory").losses.numel()
    render(copy)


def test_the_lock_of_a_killed_process_is_taken_over_and_leaves_no_trace(holder, tmp_path):
    process = holder(tmp_path / "loop")
    assert json.loads((tmp_path / "loop" / LOCK).read_text())["process"] == process.pid
    (tmp_path / "loop" / "snapshots").mkdir()
    (tmp_path / "loop" / "snapshots" / "step-00000000.safetensors.ntkit-part").write_bytes(b"half")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    looped(tmp_path / "loop")
    looped(tmp_path / "whole")
    assert bytes_of(tmp_path / "loop") == bytes_of(tmp_path / "whole")


def test_two_analyses_of_one_folder(tmp_path):
    """The second is refused with the first one's process; the first ends with the right results."""
    words = ["analyze", "--classes", "3", "8", "--train", "12", "--test", "6", "--model", "linear", "--epochs", "1"]
    first = command(*words, "--out", tmp_path / "run")
    assert first.until((tmp_path / "run" / "run.json").exists), first.stderr
    with pytest.raises(Refused, match=HELD.format(first.pid)):
        ntkit.analyze(from_run=tmp_path / "run")
    assert first.wait() == 0, first.stderr
    assert LOCK not in names_in(tmp_path / "run")
    assert read_json(tmp_path / "run" / "run.json")["status"] == "complete"


def test_one_of_many_gets_the_lock(tmp_path):
    """Processes that take and give back the lock as fast as they can: never two at once, though its file is deleted."""
    script = """
        import os, sys, time
        from ntkit.base.checks import Refused
        from ntkit.base.lock import FolderLock
        place, until, taken = sys.argv[1], time.monotonic() + 2, 0
        while time.monotonic() < until:
            try:
                with FolderLock(place):
                    os.close(os.open(place + "/alone", os.O_CREAT | os.O_EXCL))  # fails where another holds it, too
                    os.unlink(place + "/alone")
                    taken += 1
            except Refused as refused:
                assert "writing" in str(refused), refused
        print(taken)
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) > 0
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_dropped_is_given_back(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    with pytest.raises(Refused, match=HELD.format(os.getpid())):
        FolderLock(tmp_path).acquire()
    del lock
    FolderLock(tmp_path).acquire()


# --- links ---------------------------------------------------------------------------------------------------


def test_a_run_in_a_linked_folder_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    ntkit.analyze(LINEAR, out=tmp_path / "link")
    before = read_json(tmp_path / "disk" / "run.json")
    ntkit.analyze(LINEAR, out=tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert read_json(tmp_path / "disk" / "run.json")["settings"] == before["settings"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert not names_in(tmp_path / "disk") & {LOCK, ".replaced"}


def test_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for call in (lambda: ntkit.analyze(LINEAR, out=tmp_path / "link"), lambda: trained(tmp_path / "link")):
        with pytest.raises(Refused, match=r"link: got a link to .*none, which does not exist"):
            call()
    assert not (tmp_path / "none").exists()


# --- disks ---------------------------------------------------------------------------------------------------

ERRORS = {errno.ENOSPC: "No space left on device", errno.EROFS: "Read-only file system", errno.EACCES: "Permission"}


@pytest.mark.parametrize("code", ERRORS)
def test_a_disk_that_fails_at_any_write_is_one_line_and_nothing_stray(run, tmp_path, monkeypatch, code):
    """Each write of an analysis in turn fails; then the run goes on, and is the same."""
    names = [f"stages/{p.name}" for p in (run / "stages").iterdir()] + ["results.json", "report.html", "run.json"]
    names += ["losses.safetensors", "checkpoint.safetensors", "step-00000001.safetensors", "init-train.npy"]
    draw = random.Random(code)
    replace = os.replace
    for name in draw.sample(names, 4):

        def failing(source, target, name=name):
            if str(target).endswith(name):
                raise OSError(code, os.strerror(code), str(target))
            return replace(source, target)

        folder = tmp_path / name.replace("/", "-")
        monkeypatch.setattr(files.os, "replace", failing)
        with pytest.raises(Refused, match=rf"{name.rpartition('/')[2]}: got {ERRORS[code]}.*while writing") as refused:
            ntkit.analyze(LINEAR, out=folder)
        assert "\n" not in str(refused.value)
        monkeypatch.setattr(files.os, "replace", replace)
        left = names_in(folder) if folder.exists() else set()
        assert not [n for n in left if n.endswith(".ntkit-part") or n in (LOCK, ".replaced")]
        if (folder / "run.json").exists():
            ntkit.analyze(from_run=folder)
            assert (folder / "results.json").read_bytes() == (run / "results.json").read_bytes()


def test_overwrite_on_a_full_disk_keeps_the_old_run(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    before, replace = bytes_of(tmp_path / "run"), os.replace

    def failing(source, target):
        if str(target).endswith("run.json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(Refused, match=r"run\.json: got No space left on device"):
        ntkit.analyze(LINEAR, out=tmp_path / "run", overwrite=True)
    assert bytes_of(tmp_path / "run") == before


def test_a_process_killed_while_it_replaced_a_run_loses_neither(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    analysis.put_aside(tmp_path / "run")  # and then it was killed
    with pytest.raises(Refused, match="holds a run"):
        ntkit.analyze(LINEAR, out=tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(run)


@pytest.mark.parametrize("moved", range(8))
def test_a_process_killed_amid_the_replacement_leaves_no_run_with_missing_files(run, tmp_path, monkeypatch, moved):
    """Killed before each renaming of `put_aside`: what is seen then, and what the old run is afterwards."""
    shutil.copytree(run, tmp_path / "run")
    rename, renamed = Path.rename, []

    def stopping(path, target):
        if len(renamed) == moved:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopping)
    with contextlib.suppress(KeyboardInterrupt):
        analysis.put_aside(tmp_path / "run")
    monkeypatch.undo()
    assert len(renamed) == min(moved, len(list(run.iterdir())))
    assert {record.status for record in verify(tmp_path / "run")} == {"ok"}
    ntkit.analyze(from_run=tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(run)


@pytest.mark.parametrize("deleted", [0, 3])
def test_a_process_killed_while_it_deletes_the_replaced_run(run, tmp_path, deleted):
    """The new run has begun: it is resumed, or replaced in its turn."""
    whole = ntkit.analyze(dataclasses.replace(LINEAR, seed=1), out=tmp_path / "whole")
    for name in ("resumed", "replaced"):
        folder = tmp_path / name
        shutil.copytree(run, folder / REPLACED)
        shutil.copy(whole / "run.json", folder)
        write_json(folder / "run.json", read_json(whole / "run.json") | {"status": "running"})
        for file in sorted(folder.rglob("*.safetensors"))[:deleted]:
            file.unlink()
        assert {record.status for record in verify(folder)} == {"ok"}
    ntkit.analyze(from_run=tmp_path / "resumed")
    ntkit.analyze(dataclasses.replace(LINEAR, seed=1), out=tmp_path / "replaced", overwrite=True)
    for name in ("resumed", "replaced"):
        assert bytes_of(tmp_path / name).keys() == bytes_of(whole).keys()
        assert (tmp_path / name / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_the_lock_that_a_complete_run_was_left_with_is_deleted(run, tmp_path):
    """Killed after its last file, or while it writes its seconds."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / LOCK).write_text("{}")
    (tmp_path / "run" / "run.json.ntkit-part").write_text("{")
    ntkit.analyze(from_run=tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(run)


def test_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch):
    """As root no permission is refused: the system's answer is put in its place."""
    shutil.copytree(run, tmp_path / "run")
    before, opened = bytes_of(tmp_path / "run"), os.open

    def refusing(path, flags, *more, **named):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *more, **named)

    def refusing_bytes(self, data):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(Path, "write_bytes", refusing_bytes)
    calls = [
        lambda: render(tmp_path / "run"),
        lambda: ntkit.analyze(from_run=tmp_path / "run"),
        lambda: ntkit.analyze(LINEAR, out=tmp_path / "run", overwrite=True),
        lambda: track_run(tmp_path / "run", TrackSettings(points=6, k=2), say=lambda line: None),
        lambda: trained(tmp_path / "new"),
        lambda: looped(tmp_path / "new"),
        lambda: STUDY.run("quick", tmp_path / "new"),
    ]
    for call in calls:
        with pytest.raises(Refused, match="Read-only file system") as refused:
            call()
        assert "\n" not in str(refused.value)
    monkeypatch.undo()
    assert bytes_of(tmp_path / "run") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run").chmod(0o555)
    try:
        with pytest.raises(Refused, match="Permission denied"):
            render(tmp_path / "run")
    finally:
        (tmp_path / "run").chmod(0o755)


# --- deleted midway --------------------------------------------------------------------------------------------


def test_a_training_whose_folder_is_deleted_ends_in_one_line(tmp_path):
    def delete(step, loss):
        if step == 3:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(Refused, match="got No such file or directory while writing"):
        trained(tmp_path / "run", on_step=delete)
    assert not (tmp_path / "run").exists()
    model = net()
    opt = sgd(model.parameters())

    def loop():
        with ntkit.record(model, opt, tmp_path / "loop", record="all") as rec:
            for step in range(6):
                mse(model(X), Y).backward()
                opt.step()
                rec.step(torch.arange(8))
                if step == 3:
                    shutil.rmtree(tmp_path / "loop")

    with pytest.raises(Refused, match="got No such file or directory while writing"):
        loop()
    assert not (tmp_path / "loop").exists()


def test_an_analysis_whose_folder_is_deleted_ends_in_one_line(tmp_path):
    def say(line):
        if "alignment between" in line:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(Refused) as refused:
        ntkit.analyze(SETTINGS, out=tmp_path / "run", say=say)
    assert re.search(r"run\S*: got No such file or directory", str(refused.value))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
