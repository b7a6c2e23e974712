"""Names of compared runs: short where that says enough, longer where other runs would have the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ntkit.commands import compared_runs
from ntkit.commands.compared_runs import ComparedRun
from ntkit.commands.settings import Settings


def run(folder: str, n: int = 100, identity: dict[str, Any] | None = None, **settings: Any) -> ComparedRun:
    of = {"model file": None, "weights": settings.get("weights")} | (identity or {})
    return ComparedRun(Path(folder), folder, Settings(**settings), of, {"data": {"train": n}}, {})


def named(*runs: ComparedRun) -> list[str]:
    """Names of runs; no two are the same, and the tables of their settings are made."""
    compared_runs._name(runs)
    names = compared_runs.differing(runs)
    for one in runs:
        assert compared_runs.settings_shown(one, names, runs).keys() == set(names)
    found = [one.name for one in runs]
    assert len(set(found)) == len(found)
    return found


def test_files_of_one_name_are_told_apart_by_their_folders() -> None:
    runs = [run(place, weights=place) for place in ("a/best.pt", "b/best.pt", "last.pt")]
    assert named(*runs) == ["a/best.pt · seed 0", "b/best.pt · seed 0", "last.pt · seed 0"]
    deep = [run(place, weights=place) for place in ("a/x/w.pt", "b/x/w.pt")]
    assert named(*deep) == ["a/x/w.pt · seed 0", "b/x/w.pt · seed 0"]
    assert named(run("one", weights="/w.pt"), run("two", weights="w.pt")) == ["/w.pt · seed 0", "w.pt · seed 0"]


def test_a_file_that_was_written_again_is_told_apart_by_its_runs() -> None:
    runs = [run(f"runs/{c}/net", identity={"weights": c}, weights="best.pt") for c in "ab"]
    assert named(*runs) == ["best.pt (a/net) · seed 0", "best.pt (b/net) · seed 0"]


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (("net.py:small", "net.py:large", "other.py:make"), ("net:small", "net:large", "other")),
        (("a/net.py:make", "b/net.py:make"), ("a/net:make", "b/net:make")),
        (("lab.nets:make", "lab.convs:make", "mlp"), ("nets", "convs", "mlp")),
        (("mlp", "mlp.py:make", "cnn"), ("mlp", "mlp:make", "cnn")),
    ],
)
def test_models_are_told_apart_by_factories_and_folders(models: tuple[str, ...], expected: tuple[str, ...]) -> None:
    runs = [run(f"runs/{i}", model=model) for i, model in enumerate(models)]
    assert named(*runs) == [f"{name} · seed 0" for name in expected]


def test_repeated_runs_are_told_apart_by_their_folders() -> None:
    runs = [run("one/net"), run("two/net"), run("net", seed=1)]
    assert named(*runs) == ["cnn · seed 0 (one/net)", "cnn · seed 0 (two/net)", "cnn · seed 1"]
    assert [one.repeats for one in runs] == [False, True, False]


def test_numbers_are_written_with_the_digits_that_differ() -> None:
    assert named(run("a", lr=0.12345671), run("b", lr=0.12345672), run("c", lr=0.5)) == [
        "lr 0.12345671 · seed 0", "lr 0.12345672 · seed 0", "lr 0.5 · seed 0",
    ]  # fmt: skip


def test_all_examples_are_one_setting_however_they_are_asked_for() -> None:
    runs = [run("a", train=None), run("b", train=100, seed=1), run("c", train=50, n=50)]
    assert named(*runs) == ["100 examples · seed 0", "100 examples · seed 1", "50 examples · seed 0"]
    assert [one.group for one in runs] == [0, 0, 1]
