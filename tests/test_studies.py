"""Studies end to end at a toy size: stopped and resumed, claims tested, pages drawn; refusals; a new study."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ntkit
from ntkit.base.checks import Refused
from ntkit.base.files import read_arrays
from ntkit.studies import kopitkov2019 as kopitkov
from ntkit.studies.claim import FALLS, RISES, Between, Bound, Claim, Condition, Estimate, Order, Within, mean
from ntkit.studies.kopitkov2019 import optimizers
from ntkit.studies.part import Result, Sizes, StudyPart
from ntkit.studies.study import Section, Study, curve, lines, mlp, table

TOY = Sizes(seeds=2, side=6, width=8, steps=24, lr=0.05, decay=8, k=12, top=5, points=30, digit_steps=20)


def small(module, sizes):
    """A module's study with two seeds at these sizes."""
    return replace(module.STUDY, scales=module.SCALES | {"quick": sizes}, seeds=(0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("study") / "run", []

    def stop(line):
        said.append(line)
        if len(said) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kopitkov, "STUDY", small(kopitkov, TOY))
        with pytest.raises(KeyboardInterrupt):
            ntkit.study("kopitkov2019", out=place, say=stop)
        assert not (place / "results.json").exists()
        assert ntkit.study("kopitkov2019", out=place, say=said.append) == place
        before = (place / "results.json").read_bytes()
        again: list[str] = []
        ntkit.study("kopitkov2019", out=place, say=again.append)
        assert (place / "results.json").read_bytes() == before  # same run, same bytes
        assert not again  # nothing is trained or measured twice
    assert said.pop(4) == "Stopped. What is finished is kept; the same command or call goes on."
    assert said[3] == said[4]  # the stopped part is computed again, nothing else
    assert len(set(said)) == len(said) - 1 == 2 * (6 + 1 + 3) + 2
    return place


def test_every_claim_has_a_number_and_a_verdict(folder):
    results = json.loads((folder / "results.json").read_text())
    claims = results["claims"]
    assert len(claims) == 50
    assert all(c["claim"] and any(ch.isdigit() for ch in c["number"]) and c["how"] for c in claims)
    assert all(c["holds"] in (True, False, None) for c in claims)
    assert json.loads((folder / "run.json").read_text())["status"] == "complete"


def test_curves_are_means_over_seeds(folder):
    results = json.loads((folder / "results.json").read_text())
    groups = {g["name"]: g for curve in results["curves"] for g in curve["groups"]}
    pictures = {"ripples", "wide ripples", "narrow ripples", "photograph"}
    assert groups.keys() == {"depth 2", "depth 4", "depth 6", "sgd", "momentum", "adam"} | pictures
    group = groups["depth 6"]
    rows = [
        ntkit.Tracked.open(folder / "runs" / f"ripples-depth-6-seed-{seed}" / "track").series["energy_target"]
        for seed in (0, 1)
    ]
    at = [[row[TOY.top - 1] for row in series] for series in rows]
    assert group["series"]["energy_target"]["mean"] == pytest.approx(
        [(a + b) / 2 for a, b in zip(*at, strict=True)], rel=1e-6
    )
    error = [abs(a - b) / 2 for a, b in zip(*at, strict=True)]  # standard error of two
    assert group["series"]["energy_target"]["error"] == pytest.approx(error, abs=1e-6)
    assert group["series"]["bound"]["mean"][0] == pytest.approx(2 / TOY.lr)
    assert group["series"]["bound"]["mean"][-1] == pytest.approx(4 / TOY.lr)  # after the decay


def test_the_reports_are_there_and_linked(folder):
    results = json.loads((folder / "results.json").read_text())
    page = (folder / "report.html").read_text().replace("\u00a0", " ")
    for run in results["runs"]:
        assert (folder / run["track"] / "track.json").exists()
        assert (folder / run["track"] / "track.html").exists()
        assert run["track"] in page
    assert all(c["number"].split(":")[0] in page for c in results["claims"][:2])


def test_networks_are_seeded():
    a, b, c = (torch.nn.utils.parameters_to_vector(mlp(2, 1, 4, 8, s).parameters()) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len([m for m in mlp(2, 1, 4, 8, 0) if isinstance(m, torch.nn.Linear)]) == 4


def test_refusals(folder):
    with pytest.raises(Refused, match=r"study: got 'kopitkov'.*kopitkov2019"):
        ntkit.study("kopitkov")
    with pytest.raises(Refused, match="scale"):
        ntkit.study("kopitkov2019", scale="huge")
    with pytest.raises(Refused, match="another run"):
        ntkit.study("kopitkov2019", scale="paper", out=folder)


def test_a_folder_without_the_data_is_refused_before_anything_is_run(tmp_path):
    with pytest.raises(Refused, match="train-images"):
        ntkit.study("bell2023", out=tmp_path / "run", data_dir=tmp_path)
    assert not (tmp_path / "run").exists()


def test_mnist_where_its_files_are_at_hand(shared_data, tmp_path):
    toy = Sizes(seeds=2, side=4, width=4, steps=4, lr=0.05, decay=2, k=12, top=2, points=12, digit_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kopitkov, "STUDY", small(kopitkov, toy))
        patch.setattr(optimizers, "OPTIMIZERS", {"sgd": optimizers.OPTIMIZERS["sgd"]})
        place = ntkit.study("kopitkov2019", out=tmp_path / "run", data_dir=shared_data / "mnist")
    results = json.loads((place / "results.json").read_text())
    assert [c["claim"] for c in results["claims"][-6::3]] == [
        f"The kernel changes dramatically with sgd, on {name}" for name in ("digits", "mnist")
    ]
    assert (place / "runs" / "mnist-sgd-seed-0" / "track" / "track.html").exists()


# ---------------------------------------------------------------------- a new study: its experiments only


def coin(work, seed):
    flips = np.random.default_rng(seed).integers(0, 2, work.sizes.flips)
    return Result({"share": float(flips.mean())}, {"flips": flips.astype(np.uint8)})


def deck(work):
    return Result({"hearts": work.sizes.draws / 4}, {})


def coin_parts(work):
    for seed in work.seeds:
        yield StudyPart("coin", "fair", f"coin-{seed}", coin, (seed,))
    yield StudyPart("deck", None, "deck", deck)


def coin_claims(results):
    share = mean([r.numbers["share"] for r in results["coin"]["fair"]])
    yield Claim("A coin is fair", f"{share:.2f}", [Condition("the share is", [share], Between(0.3, 0.7))], "by seed")


def deck_claims(results):
    hearts = results.one("deck").numbers["hearts"]
    yield Claim("All cards are hearts", f"{hearts:g}", [Condition("it is", [hearts], Bound("at least", 8))])


def coin_sections(results):
    runs = results["coin"]["fair"]
    heads = [curve(f"seed {i}", [0, 1], [0, r.numbers["share"]]) for i, r in enumerate(runs)]
    items = [lines("Heads", "They rise to one half.", "flips", "heads", [("", heads)]), table("Deck", ["A"], [["b"]])]
    yield Section("Coins", "Coins", "Two of them.", items, {"flips": runs[0].arrays["flips"]})


COINS = Study(
    name="coins",
    title="Coins and cards",
    paper={"authors": "Nobody", "title": "On chance", "year": 1654, "reference": "a letter"},
    scales={"quick": Sizes(flips=50, draws=8), "paper": Sizes(flips=500, draws=8)},
    parts=[coin_parts],
    claims=[coin_claims, deck_claims],
    sections=[coin_sections],
    seeds=(0, 1),
)


def test_a_new_study_needs_its_experiments_only(tmp_path):
    said = []

    def stop(line):
        said.append(line)
        if line == "coin-1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        COINS.run("quick", tmp_path / "run", stop)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    assert not (tmp_path / "run" / "results.json").exists()
    first = (tmp_path / "run" / "parts" / "coin-0.json").read_bytes()
    COINS.run("quick", tmp_path / "run", said.append)
    assert said == ["coin-0", "coin-1", "coin-1", "deck"]
    assert (tmp_path / "run" / "parts" / "coin-0.json").read_bytes() == first
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(c["claim"], c["holds"]) for c in results["claims"]] == [
        ("A coin is fair", True),
        ("All cards are hearts", False),
    ]
    assert [c["how"] for c in results["claims"]] == [
        "by seed; holds if the share is between 0.3 and 0.7",
        "holds if it is at least 8",
    ]
    assert (results["sizes"], results["seeds"], results["sets"]) == ({"flips": 50, "draws": 8}, [0, 1], ["digits"])
    assert read_arrays(tmp_path / "run" / "figures.safetensors")["flips"].shape == (50,)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "1 of 2 claims holds here, 1 does not." in page
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"
    again, other = [], tmp_path / "other"
    COINS.run("quick", tmp_path / "run", again.append)
    COINS.run("quick", other)
    assert not again
    assert (other / "results.json").read_bytes() == (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(Refused, match="another run"):
        replace(COINS, seeds=(0, 2)).run("quick", tmp_path / "run")


FEW = "2 standard errors (Student’s test for few values)"
THRESHOLDS = [  # threshold, values that meet it, values that do not, its text
    (Bound("over", 0.9), [1, 2], [1, 0.9], "over 0.9"),
    (Bound("at most", 1e-12), [1e-12], [1e-11], "at most 1e-12"),
    (Bound("over", 1, errors=2), [(1.3, 0.1)], [(1.1, 0.1)], f"over 1 by more than {FEW}"),
    (Bound("under", 1, errors=2), [(0.7, 0.1)], [(0.9, 0.1)], f"under 1 by more than {FEW}"),
    (Bound("at least", 80, " %", -2), [(78, 2)], [(75, 2)], "at least 80 % within 2 standard errors"),
    (Bound("over", 0, errors=2), [(1, 0.4)], [(1, math.nan)], f"over 0 by more than {FEW}"),
    (Between(5, 20), [6, 19], [20], "between 5 and 20"),
    (Within(0.2, of=-2), [-2.1], [-2.3, -2], "within 0.2 of −2"),
    (Within(3, 0.5, " standard errors"), [(0.6, 0.05)], [(0.7, 0.05)], "within 3 standard errors of 0.5"),
    (Order("decrease"), [3, 2, 1], [3, 1, 2], "decrease"),
    (Order("increase", 2), [(1, 0.1), (2, 0.1)], [(1, 0.4), (2, 0.4)], f"increase, each by more than {FEW}"),
]


@pytest.mark.parametrize(("threshold", "good", "bad", "text"), THRESHOLDS, ids=[row[3] for row in THRESHOLDS])
def test_thresholds_test_and_print_themselves(threshold, good, bad, text):
    good, bad = ([Estimate(*v) if isinstance(v, tuple) else v for v in values] for values in (good, bad))
    assert Condition("", good, threshold).holds()
    assert not Condition("", bad, threshold).holds()
    assert str(threshold) == text


@pytest.mark.parametrize(("trials", "quantile"), [(2, 13.968), (3, 4.527), (5, 2.869), (10, 2.320), (100, 2.026)])
def test_of_few_values_a_bound_asks_for_more_standard_errors(trials, quantile):
    """Two-sided quantiles of Student's t at 4.55 %, the level of two standard errors, from a table."""
    draws = np.random.default_rng(0).normal(size=trials)
    one = mean(draws)
    assert one.trials == trials
    assert one.beyond(2) == pytest.approx(quantile * draws.std(ddof=1) / trials**0.5, rel=1e-3)
    for factor, holds in ((0.999, False), (1.001, True)):
        value = Estimate(factor * quantile, 1, trials)
        assert Bound("over", 0, errors=2).holds([value]) is holds
        assert Bound("under", 2 * factor * quantile, errors=2).holds([value]) is holds
        assert Order("increase", 2).holds([Estimate(0, 0), value]) is holds
    # a value of few may not miss a limit by more than one of many may
    assert Bound("at most", 0, errors=-2).holds([Estimate(1.999, 1, trials)])
    assert not Bound("at most", 0, errors=-2).holds([Estimate(2.001, 1, trials)])


def test_two_standard_errors_of_few_values_reject_as_often_as_of_many():
    """Means of three draws from a normal distribution around 0 are called different from 0 in 4.55 % of the cases."""
    draws = np.random.default_rng(1).normal(size=(4000, 3))
    found = [mean(row) for row in draws]
    rate = sum(RISES.holds([m]) or FALLS.holds([m]) for m in found) / len(found)
    assert abs(rate - 0.0455) < 4 * (0.0455 * 0.9545 / 4000) ** 0.5


def test_a_claim_without_conditions_is_not_tested():
    assert Claim("It is so", "3").record() == {"claim": "It is so", "number": "3", "holds": None, "how": ""}
