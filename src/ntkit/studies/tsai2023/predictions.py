"""What really happens without some examples, and which methods said so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ntkit.explanations.evaluation import case_deletion, datamodeling_score, leave_one_out
from ntkit.explanations.retrainings import subsets
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.tsai2023.methods import METHODS, score_part
from ntkit.studies.tsai2023.tsai_setting import file_of, retrainings, tasks, trained

SHARES = (0.02, 0.05, 0.1)  # of the training set, removed for each test point
FEW, HALF = 0.05, 0.5  # shares of random sets
PREDICTIONS = ("leave-one-out", "5 % of the examples", "half of the examples", "half, fresh runs")


def parts(work: Work) -> Iterator[StudyPart]:
    """Retrainings without random sets."""
    for task, seed in tasks(work):
        yield StudyPart("predictions", task, f"{file_of(task, seed)}-predictions", _predictions, (task, seed))


def deletion_parts(work: Work) -> Iterator[StudyPart]:
    """Retrainings without each method's own sets, in the folders of those that `parts` has made."""
    for task, seed in tasks(work):
        yield StudyPart("deletion", task, f"{file_of(task, seed)}-deletion", _deletion, (task, seed))


def _predictions(work: Work, task: str, seed: int) -> Result:
    """Rank correlations of each method's scores with what happens: by test point."""
    scores, again, s = (
        work.result(score_part(task, seed)).arrays,
        retrainings(work, trained(work, task, seed)),
        work.sizes,
    )
    left = list(range(again.n))  # examples left out one at a time
    if s.left < again.n:
        left = subsets(again.n, s.left / again.n, 1, seed)[0].nonzero()[:, 0].tolist()
    numbers: dict[str, Any] = {}
    arrays = {}
    for method in METHODS:
        own = torch.from_numpy(scores[method])
        found = dict(zip(PREDICTIONS, (
            leave_one_out(own, again, examples=left),
            datamodeling_score(own, again, share=FEW, sets=s.sets, seed=seed),
            datamodeling_score(own, again, share=HALF, sets=s.sets, seed=seed),
            datamodeling_score(own, again, share=HALF, sets=s.sets, fresh=s.fresh, seed=seed),
        ), strict=True))  # fmt: skip
        numbers[method] = {name: evaluation.record() for name, evaluation in found.items()}
        arrays |= {f"{method}: {name}": evaluation.by_point.numpy() for name, evaluation in found.items()}
    return Result(numbers, arrays)


def _deletion(work: Work, task: str, seed: int) -> Result:
    """Changes of each test point's own output without the examples that a method ranks highest, and lowest."""
    scores, again = work.result(score_part(task, seed)).arrays, retrainings(work, trained(work, task, seed))
    numbers: dict[str, Any] = {}
    arrays = {}
    for method in METHODS:
        for against in (False, True):
            found = case_deletion(torch.from_numpy(scores[method]), again, against=against, shares=SHARES)
            name = f"{method}: {'lowest' if against else 'highest'}"
            arrays[name] = found.changes.numpy()
            numbers[name] = {"area": found.area, "error": found.standard_error, "protocol": found.protocol}
    return Result(numbers, arrays)
