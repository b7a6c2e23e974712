"""Parts of a study by several processes: the same bytes as by one, errors and Ctrl-C, what parts may use."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import test_bell2023 as bell_case
import test_jacot2018 as jacot_case
import test_tsai2023 as tsai_case
import torch
from threadpoolctl import threadpool_info

from ntkit.base.checks import Refused
from ntkit.studies import bell2023, jacot2018, kopitkov2019, tsai2023
from ntkit.studies.claim import Claim, Condition, Within
from ntkit.studies.part import Result, Sizes, StudyPart, Work
from ntkit.studies.part_processes import processes
from ntkit.studies.study import Study

KOPITKOV = Sizes(seeds=2, side=5, width=4, steps=8, lr=0.05, decay=4, k=6, top=3, points=12, digit_steps=4)


@pytest.fixture(autouse=True)
def room_for_processes(monkeypatch):
    """As many processes as threads, whatever the machine has."""
    monkeypatch.setattr("ntkit.studies.part_processes.free_memory", lambda device: 2**40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def first_parts(work):
    for seed in work.seeds:
        yield StudyPart("square", seed, f"square-{seed}", square, (seed,))


def later_parts(work):
    yield StudyPart("sum", None, "sum", total)


def square(work, seed):
    if seed == work.sizes.refused:
        raise Refused(f"seed: got {seed}; expected another. Choose one.")
    if seed == work.sizes.killed and os.getpid() != work.sizes.parent:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(work.sizes.seconds)
    pools = {library["filepath"]: library["num_threads"] for library in threadpool_info()}
    where = {"process": os.getpid(), "threads": torch.get_num_threads(), "of libraries": max(pools.values())}
    (work.folder / f"where-{seed}").write_text(json.dumps(where))
    return Result({"value": seed**2}, {"values": np.arange(seed + 1)})


def total(work):
    parts = list(first_parts(work))
    assert all(work.finished(part) for part in parts)
    return Result({"value": sum(work.result(part).numbers["value"] for part in parts)}, {})


def claims(results):
    value = results.one("sum").numbers["value"]
    yield Claim("The squares sum up to 30", f"{value}", [Condition("it is", [value], Within(0, of=30))])


SQUARES = Study(
    name="squares",
    title="Squares",
    paper={"authors": "A. Author", "title": "On squares", "year": 2026, "reference": "none"},
    scales={"quick": Sizes(seconds=0.0, refused=-1, killed=-1, parent=os.getpid())},
    parts=[first_parts, later_parts],
    claims=[claims],
    seeds=(1, 2, 3, 4),
)


def with_sizes(**sizes):
    return replace(SQUARES, scales={"quick": Sizes(**vars(SQUARES.scales["quick"]) | sizes)})


def places(folder: Path) -> list[dict[str, int]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("where-*"))]


def test_two_processes_give_the_bytes_of_one(tmp_path, threads):
    said: dict[int, list[str]] = {1: [], 2: []}
    for number in (1, 2):
        threads(number)
        with_sizes(seconds=0.2).run("quick", tmp_path / str(number), said[number].append)
        assert torch.get_num_threads() == number
    one, two = (tmp_path / str(number) for number in (1, 2))
    names = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file() and "where" not in file.name)
    assert [file for file in names if (one / file).read_bytes() != (two / file).read_bytes()] == []
    assert len(names) == 4 * 2 + 1 + 4  # parts, and run, results, claims, report
    assert said[1] == ["square-1", "square-2", "square-3", "square-4", "sum"]
    assert said[2][0] == "4 parts by 2 processes: square-1 to square-4"
    assert [line[:8] for line in said[2][1:-1]] == [f"[{i} of 4]" for i in range(1, 5)]
    assert sorted(line[9:] for line in said[2][1:-1]) == said[1][:-1]
    assert said[2][-1] == "sum"
    assert {place["process"] for place in places(one)} == {os.getpid()}
    others = {place["process"] for place in places(two)}
    assert len(others) == 2
    assert os.getpid() not in others
    assert {place["threads"] for place in (*places(one), *places(two))} == {1}
    assert {place["of libraries"] for place in places(two)} == {1}
    again: list[str] = []
    with_sizes(seconds=0.2).run("quick", two, again.append)
    assert again == []


def test_an_error_of_a_part_is_the_callers_and_the_others_are_kept(tmp_path, threads):
    threads(2)
    with pytest.raises(Refused, match="seed: got 1; expected another"):
        with_sizes(refused=1).run("quick", tmp_path)
    kept = {file.stem for file in (tmp_path / "parts").glob("*.json")}
    assert len(kept) >= 2  # the last one begins when two processes have ended two of the other three
    assert kept <= {"square-2", "square-3", "square-4"}


def test_a_process_that_the_system_ends(tmp_path, threads):
    threads(2)
    with pytest.raises(Refused, match="study: got a process that the system has ended"):
        with_sizes(killed=1).run("quick", tmp_path)
    kept = {file.stem for file in (tmp_path / "parts").glob("*.json")}
    assert len(kept) >= 2
    with_sizes().run("quick", tmp_path / "other")  # by new processes


def test_ctrl_c_ends_the_processes_and_the_same_call_goes_on(tmp_path, threads):
    said = []

    def stop(line):
        said.append(line)
        if line.startswith("[1 of"):
            raise KeyboardInterrupt

    threads(2)
    study, started = with_sizes(seconds=2.0), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        study.run("quick", tmp_path, stop)
    assert len(said) == 2
    time.sleep(3)  # long enough for parts that were in work, if they still were
    kept = {file.stem for file in (tmp_path / "parts").glob("*.json")}
    assert said[1][9:] in kept
    assert len(kept) <= 2
    assert time.monotonic() - started < 60
    again: list[str] = []
    study.run("quick", tmp_path, again.append)
    computed = {line[9:] for line in again if line.startswith("[")}
    assert computed == {"square-1", "square-2", "square-3", "square-4"} - kept
    assert again[-1] == "sum"


def test_as_many_processes_as_threads_where_memory_allows(monkeypatch, threads):
    room = {"bytes": 2**40}
    monkeypatch.setattr("ntkit.studies.part_processes.free_memory", lambda device: room["bytes"])
    for number, bytes_, expected in ((1, 2**40, 1), (5, 2**40, 5), (5, 7 * 2**30, 2), (5, 2**30, 1)):
        threads(number)
        room["bytes"] = bytes_
        assert processes() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes() == 1


@dataclass(frozen=True)
class Watched(Work):
    """Work that notes which results and which training runs a part asks for."""

    asked: list[str] = field(default_factory=list)
    runs: set[str] = field(default_factory=set)

    def result(self, part):
        self.asked.append(part.name)
        return super().result(part)

    def trajectory(self, name):
        self.runs.add(name)
        return super().trajectory(name)


def written(folder: Path) -> dict[Path, int]:
    """When each file of the study's runs was written."""
    return {file: file.stat().st_mtime_ns for file in (folder / "runs").rglob("*") if file.is_file()}


def folders(folder: Path, files: Iterable[Path]) -> set[str]:
    """The runs that files belong to."""
    return {file.relative_to(folder).parts[1] for file in files}


@pytest.mark.parametrize(
    ("study", "sizes"),
    [
        (jacot2018.STUDY, jacot_case.TOY),
        (kopitkov2019.STUDY, KOPITKOV),
        (bell2023.STUDY, bell_case.SMALL),
        (tsai2023.STUDY, tsai_case.TOY),
    ],
    ids=["jacot2018", "kopitkov2019", "bell2023", "tsai2023"],
)
def test_parts_that_may_run_at_the_same_time_share_nothing(study, sizes, tmp_path):
    """Of the parts of one function none asks for another's result, and no two write into the folder of one run."""
    assert "quick" in study.single_thread
    work = Watched(sizes, study.seeds[:2], ["digits"], tmp_path)
    before: dict[Path, int] = {}
    for listed in study.parts:
        parts = list(listed(work))
        names, users, trained = {part.name for part in parts}, {}, folders(tmp_path, before)
        for part in parts:
            work.asked.clear()
            work.runs.clear()
            work.result(part)
            assert not names.intersection(work.asked[1:]), part.name
            after = written(tmp_path)
            new = folders(tmp_path, [file for file in after if after[file] != before.get(file)])
            for run in new | (work.runs - trained):
                assert users.setdefault(run, part.name) == part.name, run
            before = after


def test_a_damaged_part_is_computed_again(tmp_path, threads):
    threads(2)
    SQUARES.run("quick", tmp_path)
    file = tmp_path / "parts" / "square-2.json"
    before = file.read_bytes()
    file.write_bytes(before[:-3])
    said: list[str] = []
    SQUARES.run("quick", tmp_path, said.append)
    assert file.read_bytes() == before
    assert said[0].endswith("This part is computed again.")
    assert said[1:] == ["square-2"]
