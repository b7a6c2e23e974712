"""Committed results of studies: whole, and those that their parts give."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from ntkit.base.files import read_json
from ntkit.base.integrity import fingerprint
from ntkit.commands.verify import verify
from ntkit.studies import bell2023
from ntkit.studies.bell2023 import other_kernels
from ntkit.studies.claim import as_markdown
from ntkit.studies.study import Work

FOLDERS = sorted((Path(__file__).parents[1] / "studies" / "results").glob("*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_committed_file_is_whole(folder):
    assert [record for record in verify(folder) if record.status != "ok"] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_claims_are_those_of_the_parts(folder):
    told, results = read_json(folder / "run.json"), read_json(folder / "results.json")
    study = import_module(f"ntkit.studies.{told['name']}").STUDY
    header = study.header(told["scale"], told["sets"])
    assert told | header == told  # the study as it is now, not as it once was
    work = Work(study.scales[told["scale"]], study.seeds, told["sets"], folder, {}, id=fingerprint(header))
    finished = study.results(work, finished=True)
    claims = [claim.record() for claims in study.claims for claim in claims(finished)]
    assert claims == results["claims"]
    table = as_markdown("", claims).partition("\n")[2]
    assert table in (folder / "claims.md").read_text(encoding="utf-8")


def test_some_results_are_committed():
    assert {"long2021", "bell2023", "tsai2023"} <= {folder.name for folder in FOLDERS}


def test_a_cheap_number_of_bell2023_is_the_committed_one(tmp_path):
    folder = next(folder for folder in FOLDERS if folder.name == "bell2023")
    work = Work(bell2023.SCALES["quick"], bell2023.STUDY.seeds, ["digits"], tmp_path)
    part = next(part for part in other_kernels.parts(work) if part.name == "formulations-tanh-seed-1")
    again, committed = work.result(part).numbers, read_json(folder / "parts" / f"{part.name}.json")["numbers"]
    for name in other_kernels.FORMULATIONS:
        assert again[name]["relative"] == pytest.approx(committed[name]["relative"], rel=1e-6)
