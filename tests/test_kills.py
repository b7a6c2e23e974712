"""SIGKILL at random moments in every command that writes a folder: resumed, it has the bytes of an undisturbed run.

In turn a process is killed at a time, uniform over that of an undisturbed run, and before one of its file operations;
some are killed again when they are resumed. `pytest -m fuzz tests/test_kills.py` kills six, the same each time;
`NTKIT_FUZZ=60` kills that many at other moments and prints their seed, `NTKIT_FUZZ=60:SEED` takes them again. Add `-s`
to see what was hit.
"""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest
from kill_case import WORK, prepare, process
from processes import THERE, forked

from ntkit.base.checks import Refused
from ntkit.base.files import read_json, write_json
from ntkit.base.lock import LOCK
from ntkit.commands.stage_files import REPLACED
from ntkit.tracking import Tracked
from ntkit.trajectory import Trajectory

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(not THERE, reason="needs SIGKILL and fork"),
]
ASKED, _, AGAIN = os.environ.get("NTKIT_FUZZ", "").partition(":")
KILLS = int(ASKED or 6)
SEED = int(AGAIN) if AGAIN else random.SystemRandom().randrange(10**9) if ASKED else 0
TIMES = ("seconds", "started")  # of the run.json of `ntkit analyze`: all that may differ


def started(kind: str, folder: Path, often: bool = False, last: int | None = None) -> BaseProcess:
    """A process that has imported torch and begins its work; all that it prints is in `log_of` the folder."""
    receiver, sender = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    child = forked(process, kind, folder, often, last, log_of(folder), sender)
    sender.close()
    receiver.recv()
    receiver.close()
    return child


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def ended(kind: str, folder: Path, often: bool = False) -> tuple[int | None, str, float]:
    """Exit code of a process, what it printed, and its seconds."""
    log_of(folder).unlink(missing_ok=True)
    child, begun = started(kind, folder, often), time.monotonic()
    child.join()
    return child.exitcode, log_of(folder).read_text(), time.monotonic() - begun


class Whole(NamedTuple):
    """An undisturbed run: its folder, its seconds, and how often it opened, renamed or deleted a file there."""

    folder: Path
    seconds: float
    operations: int


def killed(kind: str, folder: Path, often: bool, by: str, share: float, run: Whole) -> bool:
    """Whether a process was killed after this share of the time, or of the file operations; it may have ended."""
    child = started(kind, folder, often, int(share * run.operations) if by == "file operation" else None)
    child.join(share * run.seconds if by == "time" else None)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


class Undisturbed(dict[str, Whole]):
    """An undisturbed run of each kind that is asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self._place = place

    def __missing__(self, kind: str) -> Whole:
        begins_with = {"track": "analyze", "analyze --overwrite": "older"}
        if kind in begins_with:
            _ = self[begins_with[kind]]
        folder = self._place / kind
        prepare(kind, folder, self._place)
        code, printed, seconds = ended(kind, folder)
        assert code == 0, printed
        assert not strays(folder)
        if kind == "analyze --overwrite":
            assert differences(self["analyze"].folder, folder) == []
        self[kind] = Whole(folder, seconds, int(re.findall(r"(\d+) file operations", printed)[-1]))
        return self[kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("whole"))


# ---------------------------------------------------------------------- what is asked of a folder


def strays(folder: Path) -> list[str]:
    """Files and folders that only a process at work may have there."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [name for name in names if re.search(rf"\.ntkit-part$|/?({LOCK}|{REPLACED})(/|$)", name)]


def differences(folder: Path, other: Path) -> list[str]:
    """Names in one of two folders only, and files that differ in a byte, times apart."""
    names = [{path.relative_to(place).as_posix() for path in place.rglob("*")} for place in (folder, other)]
    files = [name for name in sorted(names[0] & names[1]) if not (folder / name).is_dir()]
    _, differ, failed = filecmp.cmpfiles(folder, other, files, shallow=False)
    if "run.json" in differ and without_times(folder) == without_times(other):
        differ.remove("run.json")
    return sorted({*(names[0] ^ names[1]), *differ, *failed})


def without_times(folder: Path) -> str:
    """Text of run.json without its times (and its checksum, which `read_json` checks)."""
    return json.dumps({name: value for name, value in read_json(folder / "run.json").items() if name not in TIMES})


def trouble_of_readers(folder: Path) -> list[str]:
    """What readers cannot read in the folder of a killed process. A refusal where nothing was begun is no trouble."""
    found = []
    starts = [file for file in folder.rglob("run.json") if REPLACED not in file.relative_to(folder).parts]
    for place in {file.parent for file in starts} | {folder}:
        begun = (place / "run.json").exists()
        if begun and not (place / "snapshots").exists():
            continue  # no trajectory
        try:
            trajectory = Trajectory.open(place)
            for step in trajectory.steps:
                trajectory.state(step)
            for step in range(len(trajectory.losses)):
                trajectory.batch(step)
            assert len(trajectory.learning_rates) == len(trajectory.losses)
        except Refused as refused:
            found += [str(refused)] if begun else []
    for file in folder.rglob("track.json"):
        tracked = Tracked.open(file.parent)
        assert [len(tracked.eigenvectors(step)) > 0 for step in tracked.steps] == [True] * len(tracked.steps)
    return found


def is_running(folder: Path) -> bool:
    with suppress(Refused):
        return read_json(folder / "run.json")["status"] == "running"
    return False


def trouble_of_verify(folder: Path) -> list[str]:
    """Lines of ``ntkit verify`` that report damage, or a missing file of a run that is not running."""
    code, printed, _ = ended("verify", folder)
    begun = any(folder.rglob("*.json"))
    if code == 2 and not begun and re.search(r"got no (such folder|file of ntkit)", printed):
        return []
    wrong = [line for line in printed.splitlines() if line.startswith(("damaged", "missing"))]
    if code not in (0, 1) or not re.search(r"^\d+ files?: ", printed, re.MULTILINE) or (code == 1) != bool(wrong):
        return [printed]
    return [line for line in wrong if line.startswith("damaged") or not is_running(folder)]


def moment_of(folder: Path) -> str:
    """What the process did when it was killed: the file that it was writing, or the last one that it had written."""
    files = sorted((path.stat().st_mtime_ns, path) for path in folder.rglob("*") if path.is_file())
    if not files:
        return "before any file"
    partial = [path for _, path in files if path.suffix == ".ntkit-part"]
    name = (partial or [files[-1][1]])[-1].relative_to(folder).as_posix()
    return ("in " if partial else "after ") + re.sub(r"\d+(?=\.)", "N", name.removesuffix(".ntkit-part"))


# ---------------------------------------------------------------------- the law and its test


@pytest.mark.timeout(300 + 60 * KILLS)
@pytest.mark.parametrize("kind", WORK)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(kind, whole, tmp_path):
    print(f"\nNTKIT_FUZZ={KILLS}:{SEED} takes these moments again")
    complete, counts, moments, wrong = whole[kind].folder, Counter(), Counter(), {}
    for number in range(list(WORK).index(kind), KILLS, len(WORK)):
        draw, folder = random.Random(f"{SEED} {number}"), tmp_path / f"{number}"
        by = "time" if number // len(WORK) % 2 == 0 else "file operation"
        often, twice, share = draw.random() < 0.5, draw.random() < 0.4, draw.random()
        prepare(kind, folder, complete.parent)
        while not killed(kind, folder, often, by, share, whole[kind]):
            counts["ended before"] += 1
            shutil.rmtree(folder)
            prepare(kind, folder, complete.parent)
            share *= draw.random()  # the whole run took less than that
        counts[f"killed by {by}"] += 1
        moments[moment_of(folder)] += 1
        troubles = trouble_of_readers(folder) + trouble_of_verify(folder)
        if twice and killed(kind, folder, often, by, draw.uniform(0, 0.5), whole[kind]):
            counts["killed again"] += 1
            moments[f"{moment_of(folder)} (again)"] += 1
            troubles += trouble_of_readers(folder) + trouble_of_verify(folder)
        code, printed, _ = ended(kind, folder, often)
        if code != 0 or re.search(r"damaged|Traceback|warning", printed):
            troubles.append(f"exit {code}: {printed}")
        troubles += [f"another {name}" for name in differences(complete, folder)]
        troubles += [f"stray {name}" for name in strays(folder)] + trouble_of_verify(folder)
        if troubles:
            wrong[number] = troubles
        else:
            counts["identical"] += 1
            shutil.rmtree(folder)
    print(f"{kind} ({whole[kind].seconds:.1f} s, {whole[kind].operations} file operations): {dict(counts)}")
    for moment, count in sorted(moments.items()):
        print(f"  {count} {moment}")
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_comparison_would_notice(whole, tmp_path):
    """Another byte, a file or folder more or less, another setting."""
    complete = whole["analyze"].folder
    changes = {
        "results.json": lambda file: file.write_bytes(file.read_bytes().replace(b"0", b"1", 1)),
        "stages/network.json": lambda file: file.unlink(),
        "run.json": lambda file: write_json(file, read_json(file) | {"settings": {}}),
        "work": lambda file: file.mkdir(),
        "report.html.ntkit-part": lambda file: file.touch(),
        LOCK: lambda file: file.touch(),
    }
    for number, (name, change) in enumerate(changes.items()):
        folder = shutil.copytree(complete, tmp_path / str(number))
        write_json(folder / "run.json", read_json(folder / "run.json") | {"seconds": -1.0, "started": "never"})
        assert differences(complete, folder) == []
        change(folder / name)
        assert differences(complete, folder) == [name]
        assert strays(folder) == ([name] if name in ("report.html.ntkit-part", LOCK) else [])
        assert bool(trouble_of_verify(folder)) == name.endswith("json")
