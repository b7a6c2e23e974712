"""What a report may say: every rule with numbers on both sides of its threshold; every sentence is reached."""

from __future__ import annotations

import math

import pytest
from report_case import number

from ntkit.report import compare_judgments, judgments
from ntkit.report.judgments import BETTER, ERROR, LESS_SQUARED_ERROR, SQUARED_ERROR
from ntkit.trajectory.learning_rates import sharpness_bound


def _change(value: float | None, p: float | None) -> dict:
    return number(value, None if value is None else 0.1) | {"p": p}


PAIRED = [((0.0499, -0.1), "below"), ((0.0499, 0.1), "above"), ((0.0501, -0.1), "same"), ((0.0501, 0.1), "same"),
          ((1.0, 0.0), "same"), ((None, None), "unknown")]  # fmt: skip
SQUARES = [((-2.0, -1e-9, -1.0, 9.0), "below"), ((-2.0, 1e-9, -1.0, 9.0), "same"), ((-1e-9, 2.0, 1.0, 9.0), "same"),
           ((1e-9, 2.0, 1.0, 9.0), "above"), ((0.5, 1.5, 1.0, 101.0), "same"), ((0.5, 1.5, 1.0, 99.0), "above"),
           ((None, None, 1.0, 9.0), "unknown"), ((0.5, 1.5, 1.0, None), "unknown")]  # fmt: skip
CHANGES = [((_change(0.02, 0.049),), "above"), ((_change(0.02, 0.051),), "same"), ((_change(0.0099, 0.0),), "same"),
           ((_change(0.0101, 0.0),), "above"), ((_change(-0.0101, 0.049),), "below"),
           ((_change(-0.0099, 0.0),), "same"),
           ((_change(None, None),), "unknown"), ((number(0.0201, 0.01),), "above"), ((number(0.0199, 0.01),), "same"),
           ((number(0.5, None),), "unknown")]  # fmt: skip
CASES = {
    ERROR: PAIRED, **dict.fromkeys(BETTER.values(), PAIRED),
    SQUARED_ERROR: SQUARES, **dict.fromkeys(LESS_SQUARED_ERROR.values(), SQUARES),
    compare_judgments.OVER_SEEDS: PAIRED, compare_judgments.BETWEEN_RUNS: PAIRED,
    compare_judgments.BETWEEN_REGRESSIONS: [
        *PAIRED, ((0.049, -1.0, 99.0), "below"), ((0.049, -1.0, 101.0), "same"), ((0.049, 1.0, 101.0), "same"),
        ((0.049, 1.0, 99.0), "above"), ((0.051, 1.0, 99.0), "same"),
    ],
    judgments.FIT: [((0.1999,), "hardly"), ((-3.0,), "hardly"), ((0.2,), "fits"), ((None,), "unknown"),
                    ((-1e-9, 0.5), "overconfident"), ((-1e-9, 0.499), "hardly"), ((0.01, 0.9), "hardly")],
    judgments.TURN: [
        ((0.10, 0.1199, 0.0), "hardly"), ((0.12, 0.1001, 0.0), "hardly"), ((0.1, 0.1201, 0.02), "towards"),
        ((0.1, 0.1201, 0.0202), "wanders"), ((0.5, 0.4, 0.09), "away"), ((0.5, 0.4, 0.11), "wanders"),
        ((0.106, 0.116, 0.06), "hardly"),
        ((0.1, 0.5, None), "unknown"), ((None, 0.5, None), "undefined"), ((0.5, None, None), "undefined"),
    ],
    judgments.SHAPE: [((0.00999,), "hardly"), ((0.01,), "changed"), ((None,), "undefined"),
                      ((0.001, 0.00999), "hardly"),
                      ((0.001, 0.01), "changed"), ((0.01, 0.001), "changed")],
    judgments.LINEAR: [((0.0999,), "near"), ((0.1,), "between"), ((0.4999,), "between"), ((0.5,), "far"),
                       ((7.0,), "far"), ((None,), "unknown")],
    judgments.INVARIANCE: CHANGES, judgments.LAYOUT: CHANGES, judgments.BEYOND: CHANGES,
    judgments.TRUST: [
        ((0.5, 0.5), "usable"), ((0.501, 0.9), "untrusted"), ((0.5, 0.499), "amplifies"), ((None, 0.9), "untrusted"),
        ((0.9, 0.1), "untrusted"),
    ],
    judgments.SEPARABLE: [
        (("optimal",), "optimal"), (("not separable",), "not separable"), (("inaccurate",), "inaccurate"),
        (("anything else",), "inaccurate"),
    ],
}  # fmt: skip


def test_every_rule_is_here_and_every_sentence_is_reached() -> None:
    all_rules = [judgment for group in judgments.RULES.values() for judgment in group]
    all_rules += compare_judgments.COMPARISONS
    assert {id(j) for j in all_rules} == {id(j) for j in CASES}
    for judgment, cases in CASES.items():
        assert {verdict for _, verdict in cases} == set(judgment.sentences), judgment.rule


@pytest.mark.parametrize("judgment", CASES, ids=lambda j: next(iter(j.sentences.values()))[:30])
def test_the_verdict_changes_at_the_threshold(judgment: judgments.Judgment) -> None:
    for numbers, verdict in CASES[judgment]:
        assert judgment.verdict(*numbers) == verdict, numbers
        assert judgment.say(*numbers) == judgment.sentences[verdict]


def test_rules_print_their_thresholds() -> None:
    every = ("along", "limit", "invariances", "explained")
    printed = dict(judgments.rules(False, every)) | dict(judgments.rules(True, every))
    assert set(printed) == set(judgments.RULES)
    assert "p < 0.05" in printed["Errors on the same test examples"]
    assert "95 %" in printed["Squared errors"]
    assert "less than 20 %" in printed["Fit"]
    assert "at least 0.02" in printed["Turned towards the task"]
    assert "at least 0.01" in printed["Changed shape"]
    assert "less than 0.1 of" in printed["As in the limit of infinite width"]
    assert "at least 0.5 of" in printed["As in the limit of infinite width"]
    for name in ("Invariant, global", "Beside two different images"):
        assert "at least 0.01" in printed[name]
        assert "p < 0.05" in printed[name]
    assert "at least 1 %" in printed["Squared errors"]
    assert "more than 50 %" in printed["Influence"]
    assert "metasmoothness of 0.5" in printed["Influence"]
    for judgment in compare_judgments.COMPARISONS:
        assert "p < 0.05" in judgment.rule
        assert "Holm" in judgment.rule
    assert "at least 1 %" in compare_judgments.BETWEEN_REGRESSIONS.rule
    assert "Invariant, global" not in dict(judgments.rules(False, ("along", "limit", "explained")))
    assert set(dict(judgments.rules(True, ()))) == {"Squared errors", "Fit", "Turned towards the task"}


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        ([0.1, 0.2, 0.3, 0.4], (0.1, 0.4, 0.0)),
        ([0.106, 0.12, 0.06, 0.116], (0.106, 0.116, 0.06)),
        ([0.4, 0.1, 0.35, 0.2], (0.4, 0.2, 0.25)),
        ([0.1, None, 0.3, 0.2, 0.4], (0.1, 0.4, 0.1)),
        ([0.1, None, 0.3, 0.4], None),  # three numbers
        ([None, 0.1, 0.2, 0.3, 0.4], None),
        ([], None),
    ],
)
def test_the_wander_is_the_largest_move_the_other_way(curve: list, found: tuple | None) -> None:
    assert judgments.ends_of(curve) == (None if found is None else pytest.approx(found))


GROUP = {"momentum": 0, "dampening": 0, "nesterov": False, "weight_decay": 0, "maximize": False}


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True},
                                      {"momentum": 0.5, "dampening": 0.5}, {"momentum": 0.9, "weight_decay": 0.3},
                                      {"weight_decay": 0.3}])  # fmt: skip
def test_the_bound_of_sharpness_is_where_a_quadratic_diverges(settings: dict) -> None:
    import torch

    bound = sharpness_bound({"class": "torch.optim.sgd.SGD", "groups": [GROUP | settings]}, 0.1)
    assert bound is not None
    for factor, grows in ((0.99, False), (1.01, True)):
        w = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1, **settings)
        for _ in range(4000):
            w.grad = factor * bound * w.detach()
            optimizer.step()
        size = abs(float(w.detach()))
        assert (size > 1 or not math.isfinite(size)) is grows, (factor, size)


def test_other_optimizers_have_no_bound() -> None:
    for name, groups in (("torch.optim.adamw.AdamW", [{"betas": [0.9, 0.999], "weight_decay": 0.01}]),
                         ("torch.optim.sgd.SGD", [GROUP, GROUP | {"momentum": 0.9}]),
                         ("torch.optim.sgd.SGD", [GROUP | {"maximize": True}]),
                         ("torch.optim.sgd.SGD", [GROUP | {"momentum": 1.0}]),
                         ("mine.SGD", [GROUP])):  # fmt: skip
        assert sharpness_bound({"class": name, "groups": groups}, 0.1) is None
    assert sharpness_bound({"class": "torch.optim.sgd.SGD", "groups": [GROUP]}, math.nan) is None
