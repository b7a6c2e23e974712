"""Examples with a wrong label, found by what they do for themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F

from ntkit.explanations.evaluation import mislabeled
from ntkit.studies.claim import Claim, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, table
from ntkit.studies.tsai2023.methods import EXACT, METHODS, Scores
from ntkit.studies.tsai2023.tsai_setting import file_of, tasks, trained

TASK, SHARE = "digits 3/8", 0.05
BASELINES = ("loss at the end", "mean loss along training")


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each seed."""
    for task, seed in tasks(work):
        if task == TASK:
            yield StudyPart("wrong labels", task, f"{file_of(task, seed)}-wrong-labels", _wrong, (task, seed))


def _wrong(work: Work, task: str, seed: int) -> Result:
    """Flip some labels, train, and rank the examples by each method's score of an example for itself."""
    at = trained(work, task, seed, flipped=SHARE)
    own = torch.where(at.y > 0, 1.0, -1.0)
    itself = at._replace(data=replace(at.data, x_test=at.x, y_test=at.y), sign=own)
    wrong = at.y != trained(work, task, seed).y
    scores, numbers = Scores(itself), {}
    for method in METHODS:
        numbers[method] = mislabeled(scores.of(method).diagonal(), wrong).record()
    losses = []
    for step in at.run.steps:
        at.run.load(at.network, step)
        with torch.no_grad():
            outputs = at.network(at.x)[:, 0]
        losses.append(F.binary_cross_entropy_with_logits(outputs, at.y.to(outputs.dtype), reduction="none"))
    for name, suspicion in zip(BASELINES, (losses[-1], torch.stack(losses).mean(0)), strict=True):
        numbers[name] = mislabeled(suspicion, wrong).record()
    return Result(numbers, {})


def claims(results: Results) -> Iterator[Claim]:
    """How well wrong labels are found; the paper does not ask it."""
    for task, runs in results["wrong labels"].items():
        areas = {name: mean([run.numbers[name]["value"] for run in runs]) for name in (*METHODS, *BASELINES)}
        best = max(METHODS, key=lambda name: areas[name].value)
        yield Claim(
            f"Examples with a wrong label are found by their scores for themselves, {task}",
            f"area under the ROC curve: {EXACT[0]} {areas[EXACT[0]].value:.3f}, best method {best} "
            f"{areas[best].value:.3f}; " + ", ".join(f"{name} {areas[name].value:.3f}" for name in BASELINES),
            note=f"the paper does not say it; {100 * SHARE:g} % of the labels flipped, {len(runs)} trained networks",
        )


def sections(results: Results) -> Iterator[Section]:
    """Areas under the ROC curve of every method."""
    for task, runs in results["wrong labels"].items():
        rows = [
            [name, *(f"{run.numbers[name]['value']:.3f} ± {run.numbers[name]['error']:.3f}" for run in runs)]
            for name in (*METHODS, *BASELINES)
        ]
        columns = ["Ranked by", *(f"network {k + 1}" for k in range(len(runs)))]
        note = "Area under the ROC curve with the standard error of Hanley and McNeil; 0.5 is chance."
        yield Section(
            f"Wrong labels: {task}",
            "Wrong labels",
            f"{runs[0].numbers['random']['protocol']}; the network learns them, too. Each example is ranked by what it "
            "does, by each method, for the output in favor of its own label.",
            [table("Wrong labels found", columns, rows, note)],
        )
