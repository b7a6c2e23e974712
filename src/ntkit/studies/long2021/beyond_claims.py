"""What the paper did not ask, as sentences with numbers; those that test a change say by how much it must differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ntkit.studies.claim import FALLS, RISES, Bound, Claim, Condition
from ntkit.studies.long2021.beyond import added_runs, main_runs
from ntkit.studies.long2021.by_layer import END
from ntkit.studies.long2021.evidence import (
    INVARIANT,
    SWAP,
    Difference,
    common_seeds,
    difference,
    estimate,
    losses,
    main_settings,
    mean_of,
    measured,
    not_judged,
    number,
    paired,
)
from ntkit.studies.long2021.long_setting import START, TEN
from ntkit.studies.long2021.sentences import accuracy, cosine_claim, percent, shown
from ntkit.studies.part import Result
from ntkit.studies.study import Results

MOST = 0.9  # the part of the machine's gain that counts as most of it


def layers(results: Results) -> Iterator[Claim]:
    """Which layers carry the gain."""
    for setting in dict.fromkeys(setting for setting, _ in main_runs(results.work)):
        runs = measured(results, setting, END, "layers")
        if not runs or not measured(results, setting, START, "layers"):
            continue
        kinds = next(iter(runs.values())).numbers["kinds"]
        seeds = common_seeds(results, (setting, START), (setting, END), experiment="layers")
        changes: list[Difference] = []
        texts = []
        for i, kind in enumerate(kinds):
            path, ends = f"layers.{i}.alone.test_error", ((setting, END), (setting, START))
            change = difference(results, *ends, path, "alone.wrong", i, "layers")
            own = common_seeds(results, *ends, paths=[path], experiment="layers")
            before, after = (estimate(results, setting, moment, path, "layers", own) for moment in (START, END))
            without = estimate(results, setting, END, f"layers.{i}.without.test_error", "layers", seeds)
            changes.append(change)
            texts.append(f"{i + 1} ({kind}) {percent(before)} → {percent(after)}, without it {percent(without)}")
        path = "whole.test_error"
        own = common_seeds(results, (setting, START), (setting, END), paths=[path], experiment="layers")
        whole = (estimate(results, setting, moment, path, "layers", own) for moment in (START, END))
        why = not_judged(results, min(change.seeds for change in changes))
        every = [change.estimate() for change in changes]
        yield Claim(
            f"Not in the paper: each layer’s share alone becomes better: {setting.pair}, {setting.network}",
            f"all layers {' → '.join(percent(value) for value in whole)}; alone: {'; '.join(texts)}",
            [Condition("the change of every layer’s test error is", every, FALLS)] if not why else (),
            "before training → at the end of training" + why,
        )


def along(results: Results) -> Iterator[Claim]:
    """Whether the kernel's machine is ahead of the network, and when most of its gain is made."""
    for setting, runs in results["along"].items():
        ahead, epochs, at_loss = [], [], []
        for run in runs:
            rows = [row for row in run.numbers["steps"] if row["test_error"] is not None]
            later = [row for row in rows if row["step"]]
            if later:
                ahead.append(float(np.mean([row["test_error"] - row["network_error"] for row in later])))
                found = gained(rows)
                if found is not None:
                    epochs.append(found["epochs"])
                    at_loss.append(found["loss"])
        if not ahead:
            continue
        when = "the machine does not gain"
        if epochs:
            when = (
                f"nine tenths of the machine’s gain are there after {shown(mean_of(epochs), '.3g')} epochs, at loss "
                f"{shown(mean_of(at_loss), '.3g')} ({len(epochs)} of {len(runs)} runs gain)"
            )
        change = mean_of(ahead)
        yield Claim(
            f"Not in the paper: the kernel’s machine beside the network along training: {setting.pair}, "
            f"{setting.network}",
            f"test error of the machine minus the network’s, mean over steps: {shown(change, '+.3f')}; {when}",
            note="a number alone: at the first steps the network still guesses",
        )


def linearized(results: Results) -> Iterator[Claim]:
    """The network beside its linearization at the start, trained by the same SGD to the same losses."""
    for setting in main_settings(results):
        runs = measured(results, setting, START)
        texts = []
        for loss in losses(results, setting):
            errors = {
                seed: entry["test_error"]
                for seed, run in runs.items()
                for entry in run.numbers.get("linearized", [])
                if str(entry["loss"]) == loss
            }
            seeds = set(errors) & set(measured(results, setting, loss))
            if seeds:
                network = estimate(results, setting, loss, "test_error", seeds=seeds)
                of_seeds = mean_of([errors[seed] for seed in sorted(seeds)])
                texts.append(f"{loss}: {percent(of_seeds)} against {percent(network)}")
        if texts:
            yield Claim(
                f"Not in the paper: the network linearized before training, beside the network at equal loss: "
                f"{setting.pair}, {setting.network}",
                f"test error by loss: {'; '.join(texts)}",
                note=f"the same SGD on the same batches, at most {results.work.sizes.epochs} epochs",
            )


def gained(rows: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """The first row at which the error has fallen by `MOST` of its fall from the first row to the last one."""
    first, last = rows[0]["test_error"], rows[-1]["test_error"]
    if last >= first:
        return None
    return next(row for row in rows if first - row["test_error"] >= MOST * (first - last))


def agreement(results: Results) -> Iterator[Claim]:
    """Whether machine and network agree more after training."""
    for setting in main_settings(results):
        reached = losses(results, setting)
        if not reached:
            continue
        last = reached[-1]
        first, second = (measured(results, setting, moment) for moment in (last, START))
        change = paired(first, second, lambda run: number(run, "tangent.agreement"), _alike)
        texts = []
        for kernel in ("tangent", "conjugate"):
            path, moments = f"{kernel}.agreement", ((setting, START), (setting, last))
            seeds = common_seeds(results, *moments, paths=[path])
            before, after = (percent(estimate(results, *moment, path, seeds=seeds)) for moment in moments)
            alike = shown(estimate(results, setting, last, f"{kernel}.correlation", seeds=seeds), ".3f")
            texts.append(f"{kernel} kernel {before} → {after}, correlation {alike}")
        why = not_judged(results, change.seeds, setting)
        yield Claim(
            f"Not in the paper: machine and network agree more after training: {setting.pair}, {setting.network}",
            f"test images put in the same class: {'; '.join(texts)} (loss {last})",
            () if why else [Condition("the change with the tangent kernel is", [change.estimate()], RISES)],
            why.removeprefix("; "),
        )


def _alike(run: Result) -> np.ndarray:
    """By test image, 1 where machine and network agree: with two classes, where both are right or both are wrong."""
    return (run.arrays["tangent.wrong"] == run.arrays["network.wrong"]).astype(float)


def added(results: Results) -> Iterator[Claim]:
    """The paper's sentences for ten classes, residual networks and transformers."""
    much: dict[str, list[bool]] = {"ten classes": [], "two classes": []}
    for setting in dict.fromkeys(setting for setting, _ in added_runs(results.work)):
        if not measured(results, setting, START):
            continue
        for claim in accuracy(results, setting, "Not in the paper: the after kernel’s machine is much more accurate"):
            if claim.conditions:  # none: one seed, not judged
                kind = "ten classes" if setting.pair in TEN else "two classes"
                much[kind].append(all(c.holds() for c in claim.conditions))
            yield claim
        where = f"{setting.pair}, {setting.network}"
        for form, words in (("raw", ""), ("centered", ", features centered")):
            text = f"Not in the paper: it is more invariant to small shifts, rotations, zooms{words}: {where}"
            yield from cosine_claim(results, setting, INVARIANT, text, RISES, form=form)
            text = f"Not in the paper: it is more global (cosine under a quadrant swap){words}: {where}"
            yield from cosine_claim(results, setting, [SWAP], text, FALLS, form=form)
    for kind, holds in much.items():
        if holds:
            yield Claim(
                f"Not in the paper: for some networks the after kernel is much more accurate, {kind}",
                f"in {sum(holds)} of {len(holds)} settings",
                [Condition("the number of settings is", [sum(holds)], Bound("at least", 1))],
            )


CLAIMS: Sequence[Callable[[Results], Iterator[Claim]]] = (layers, along, linearized, agreement, added)
