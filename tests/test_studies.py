"""A study end to end at a toy size: stopped and gone on, judged, drawn; and refusals."""

from __future__ import annotations

import json

import pytest
import torch

import ntkit
from ntkit.checks import Refused
from ntkit.studies import kopitkov2019 as kopitkov

TOY = kopitkov.Scale(6, 8, 24, 0.05, 8, 12, 5, 30, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("study") / "run", []

    def stop(line):
        said.append(line)
        if len(said) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kopitkov.SCALES, "quick", TOY)
        patch.setattr(kopitkov, "SEEDS", (0, 1))
        with pytest.raises(KeyboardInterrupt):
            ntkit.study("kopitkov2019", out=place, say=stop)
        assert not (place / "results.json").exists()
        assert ntkit.study("kopitkov2019", out=place, say=said.append) == place
        before = (place / "results.json").read_bytes()
        again: list[str] = []
        ntkit.study("kopitkov2019", out=place, say=again.append)
        assert (place / "results.json").read_bytes() == before  # same run, same bytes
        assert not [line for line in again if line.startswith("picture")]  # nothing is trained or measured twice
    assert len([line for line in said if line.startswith("picture")]) == 7  # three depths, two seeds, one begun twice
    return place


def test_every_claim_has_a_number_and_a_verdict(folder):
    results = json.loads((folder / "results.json").read_text())
    claims = results["claims"]
    assert len(claims) == 8 + 3
    assert all(c["claim"] and any(ch.isdigit() for ch in c["number"]) and c["how"] for c in claims)
    assert all(c["holds"] in (True, False, None) for c in claims)
    assert json.loads((folder / "run.json").read_text())["status"] == "complete"


def test_curves_are_means_over_seeds(folder):
    results = json.loads((folder / "results.json").read_text())
    groups = {g["name"]: g for curve in results["curves"] for g in curve["groups"]}
    assert groups.keys() == {"depth 2", "depth 4", "depth 6", "sgd", "momentum", "adam"}
    group = groups["depth 6"]
    rows = [
        ntkit.Tracked.open(folder / "runs" / f"depth-6-seed-{seed}" / "track").series["energy_target"]
        for seed in (0, 1)
    ]
    at = [[row[TOY.top - 1] for row in series] for series in rows]
    assert group["series"]["energy_target"]["mean"] == pytest.approx([(a + b) / 2 for a, b in zip(*at, strict=True)])
    error = [abs(a - b) / 2 for a, b in zip(*at, strict=True)]  # standard error of two
    assert group["series"]["energy_target"]["error"] == pytest.approx(error, abs=1e-12)
    assert group["series"]["bound"]["mean"][0] == pytest.approx(2 / TOY.lr)
    assert group["series"]["bound"]["mean"][-1] == pytest.approx(4 / TOY.lr)  # after the decay


def test_the_reports_are_there_and_linked(folder):
    results = json.loads((folder / "results.json").read_text())
    page = (folder / "report.html").read_text()
    for run in results["runs"]:
        assert (folder / run["track"] / "track.json").exists()
        assert (folder / run["track"] / "track.html").exists()
        assert run["track"] in page
    assert all(c["number"].split(":")[0] in page for c in results["claims"][:2])


def test_the_picture_is_standard_and_the_networks_are_seeded():
    y = kopitkov.picture(ntkit.grid(24))
    assert float(y.mean()) == pytest.approx(0, abs=1e-12)
    assert float(y.std()) == pytest.approx(1, rel=1e-12)
    a, b, c = (torch.nn.utils.parameters_to_vector(kopitkov.mlp(2, 1, 4, 8, s).parameters()) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len([m for m in kopitkov.mlp(2, 1, 4, 8, 0) if isinstance(m, torch.nn.Linear)]) == 4


def test_refusals(folder):
    with pytest.raises(Refused, match=r"study: got 'kopitkov'.*kopitkov2019"):
        ntkit.study("kopitkov")
    with pytest.raises(Refused, match="scale"):
        ntkit.study("kopitkov2019", scale="huge")
    with pytest.raises(Refused, match="another run"):
        ntkit.study("kopitkov2019", scale="paper", out=folder)


def test_mnist_where_its_files_are_at_hand(shared_data, tmp_path):
    toy = kopitkov.Scale(4, 4, 4, 0.05, 2, 12, 2, 12, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kopitkov.SCALES, "quick", toy)
        patch.setattr(kopitkov, "SEEDS", (0, 1))
        patch.setattr(kopitkov, "OPTIMIZERS", {"sgd": kopitkov.OPTIMIZERS["sgd"]})
        place = ntkit.study("kopitkov2019", out=tmp_path / "run", data_dir=shared_data / "mnist")
    results = json.loads((place / "results.json").read_text())
    assert [c["claim"] for c in results["claims"][-2:]] == [
        f"The same with sgd, on {name}" for name in ("digits", "mnist")
    ]
    assert (place / "runs" / "mnist-sgd-seed-0" / "track" / "track.html").exists()
