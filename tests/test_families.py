"""Model families of today are exact, and on the fast path as far as they say; those without a kernel are refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import script
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import coverage
from benchmarks.families import FAMILIES, Family

import ntkit

QUICK = [name for name, family in FAMILIES.items() if not family.slow and not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]


@pytest.mark.parametrize("name", QUICK)
def test_family_equals_the_oracle_and_is_fast(name):
    family = FAMILIES[name]
    if reason := family.missing():
        pytest.skip(reason)
    row = coverage.measure(family)
    assert row.error <= coverage.BOUND, row
    assert row.share_error <= coverage.BOUND, row
    assert row.share >= family.share, row.fallback
    assert family.share == 1 or family.note, "say why"


@pytest.mark.parametrize("name", REFUSED)
def test_family_is_refused(name):
    model, x1, x2 = FAMILIES[name].draw()
    with pytest.raises(ntkit.Refused, match="the model's output"):
        ntkit.TangentKernel(model, outputs=FAMILIES[name].outputs)(x1, x2)


def test_the_table_notices_a_wrong_number(monkeypatch):
    exact = coverage.reference_shares

    def off(model, x1, x2, outputs):
        shares = exact(model, x1, x2, outputs)
        smallest = min(shares, key=lambda name: shares[name].abs().max())
        return shares | {smallest: shares[smallest] * (1 + 1e-8)}

    assert coverage.attempt("LeNet").good()
    monkeypatch.setattr(coverage, "reference_shares", off)
    assert not coverage.attempt("LeNet").good()


def test_the_table_notices_a_refusal_and_its_absence(monkeypatch):
    monkeypatch.setitem(FAMILIES, "tuple output", replace(FAMILIES["tuple output"], refused=False))
    monkeypatch.setitem(FAMILIES, "MLP", replace(FAMILIES["MLP"], refused=True))
    assert coverage.main(["tuple output"]) == 1
    assert coverage.main(["MLP"]) == 1


def test_the_table_says_what_was_not_run(monkeypatch):
    monkeypatch.setitem(FAMILIES, "MLP", Family(nn.Identity, FAMILIES["MLP"].data, source="transformers"))
    monkeypatch.setattr("benchmarks.families._missing", lambda library: f"{library} is not there")
    row = coverage.attempt("MLP")
    assert row.skipped == "transformers is not there"
    assert "not run: transformers is not there" in coverage.document([row])
    assert "1 not run" in coverage.summary([row])


def test_the_table_runs_as_a_file_and_lists_every_family():
    done = script(coverage.ROOT / "benchmarks" / "coverage.py", "MLP", *REFUSED, cwd=coverage.ROOT / "tests").done()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused, as it should be") == len(REFUSED)
    rows = (coverage.ROOT / "docs" / "coverage.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in rows if line.startswith("| ")][1:] == list(FAMILIES)
