"""Test points of a trained network, explained: accounting, influence, and training again without the best examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.progress import task as shown_task
from ntkit.commands.network_measures import TrainingTask, as_pixels, outputs_of
from ntkit.data import Data
from ntkit.data.targets import in_digits
from ntkit.explanations.influence import Influence
from ntkit.explanations.retrainings import Retrainings, subsets
from ntkit.kernels.path.decomposition import PathDecomposition

SHOWN = 5  # examples on each side, and the first number of examples that are removed
SHARES = (0.01, 0.05)  # of the training set, removed as well
RANDOM_SETS = 5  # of each size
METHODS = ("accounting", "influence")
_SECONDS = 15.0  # of training again, from one file to the next
_VALUES = 12  # of a vector, that are shown


class Point(NamedTuple):
    """A test point to explain: its index, why it was chosen, and the class that the network says."""

    index: int
    why: str
    predicted: int


def margin(out: Tensor, y: Tensor) -> Tensor:
    """Log-odds of class y, log p_y / (1 - p_y), [n], from outputs [n, C], or [n, 1] for two classes.

    >>> margin(torch.tensor([[1.5], [1.5]]), torch.tensor([1, 0])).tolist()
    [1.5, -1.5]
    >>> margin(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])).item() == 2 - torch.tensor(2.0).log().item()
    True
    """
    out = out.reshape(len(y), -1)
    if out.shape[1] == 1:
        return out[:, 0] * (2 * y - 1).to(out)
    others = torch.arange(out.shape[1] - 1, device=out.device)[None]
    others = others + (others >= y[:, None])
    return out.gather(1, y[:, None])[:, 0] - out.gather(1, others).logsumexp(1)


def measure_of(data: Data) -> Callable[[Tensor, Tensor], Tensor]:
    """What is explained, [n], of outputs [n, C] and y [n]: the margin of class y, or the prediction of target y.

    A prediction is in the target's units, without the target's mean on the training set: beside a large mean, small
    changes would be lost to rounding.
    """
    if data.targets is None:
        return margin
    deviation = data.targets.deviation

    def prediction(out: Tensor, y: Tensor) -> Tensor:
        out = out.reshape(len(y), -1)
        return out.gather(1, y[:, None])[:, 0] * out.new_tensor(deviation)[y]

    return prediction


def chosen_points(task: TrainingTask, model: nn.Module, indices: Sequence[int] | None) -> list[Point]:
    """The points asked for; or the most confident right one, the most confident wrong one and the least certain one."""
    out = outputs_of(model, task.data.x_test)
    if task.data.targets is not None:
        return _by_error(out[:, 0] - task.data.y_test[:, 0], indices)
    predicted = task.predict(out)
    if indices is not None:
        return [Point(i, "asked for", int(predicted[i])) for i in indices]
    margins, right = margin(out, predicted).double().cpu(), (predicted == task.data.y_test).cpu()
    found: list[Point] = []
    for why, allowed, most in (("right, most confident", right, True), ("wrong, most confident", ~right, True),
                               ("least certain", torch.ones_like(right), False)):  # fmt: skip
        free = [i for i in allowed.nonzero().flatten().tolist() if i not in {point.index for point in found}]
        if free:
            index = (max if most else min)(free, key=lambda i: float(margins[i]))
            found.append(Point(index, why, int(predicted[index])))
    return found


def _by_error(error: Tensor, indices: Sequence[int] | None) -> list[Point]:
    """Points of a regression, of which the first target is explained: by the size of its error [m]."""
    if indices is not None:
        return [Point(i, "asked for", 0) for i in indices]
    order = error.double().abs().cpu().argsort(stable=True).tolist()
    ranked = {"largest error": order[-1], "smallest error": order[0], "median error": order[len(order) // 2]}
    return [Point(i, why, 0) for i, why in {i: why for why, i in reversed(ranked.items())}.items()][::-1]


def sizes(n: int) -> list[int]:
    """How many examples are removed: 5, 1 % and 5 %, of n.

    >>> sizes(200), sizes(1437), sizes(4)
    ([2, 5, 10], [5, 14, 72], [2])
    """
    counts = {min(SHOWN, n // 2), *(round(share * n) for share in SHARES)}
    return sorted(count for count in counts if 1 <= count < n) or [1]


def removed_sets(
    scores: dict[str, Tensor], sizes: Sequence[int], random_sets: int = RANDOM_SETS
) -> dict[tuple[str, int, int], list[list[int]]]:
    """What is removed: (method, test point, size) -> sets of examples; the random ones are those of every point (-1).

    `scores` holds those of each method, [m, n]; `random_sets` is how many random ones there are of each size.
    """
    m, n = scores[METHODS[0]].shape
    found: dict[tuple[str, int, int], list[list[int]]] = {}
    for size in sizes:
        for method in METHODS:
            best = scores[method].argsort(dim=1, descending=True, stable=True)[:, :size]
            found |= {(method, j, size): [best[j].tolist()] for j in range(m)}
        masks = subsets(n, size / n, random_sets, seed=size)
        found["random", -1, size] = [mask.nonzero().flatten().tolist() for mask in masks]
    return found


def train_again(again: Retrainings, sets: Sequence[list[int]]) -> Tensor:
    """Measures after training without each set, [K, m]; kept from time to time, with the time that is left."""
    done: list[Tensor] = []
    with shown_task("training again", total=len(sets)) as progress:
        place, at_once = 0, 4
        while place < len(sets):
            began = time.monotonic()
            done.append(again.without(sets[place : place + at_once]))
            each = (time.monotonic() - began) / len(done[-1])
            place += len(done[-1])
            if len(done) == 1:
                progress.expect(each * (len(sets) - place))
            progress.advance(len(done[-1]))
            at_once = max(1, min(128, round(_SECONDS / max(each, 1e-3))))
    return torch.cat(done)


def strongest(scores: Tensor) -> dict[str, Tensor]:
    """The examples with the largest scores of each point, and with the smallest: int64 [m, k]."""
    k = min(SHOWN, scores.shape[1])
    return {
        side: (sign * scores).argsort(dim=1, descending=True, stable=True)[:, :k]
        for side, sign in (("helped", 1), ("hurt", -1))
    }


def steps_shown(steps: int) -> list[int]:
    """Steps of a run at which scores along training are kept, 0 and the last among them.

    >>> steps_shown(5), len(steps_shown(10**5)) <= 40
    ([0, 1, 2, 3, 4, 5], True)
    """
    return sorted({0, steps, *(round(steps ** (i / 37)) for i in range(38))}) if steps else [0]


def along_training(shares: Iterable[tuple[int, Tensor, Tensor]], examples: Tensor, steps: Sequence[int]) -> Tensor:
    """Sums up to some steps: the shares of the examples [m, k] in all steps before, [m, k, len(steps)].

    `shares` holds (step, rows [B], shares [m, B]) of each step, in order.
    """
    total = torch.zeros(examples.shape, dtype=torch.float64)
    sums = {0: total}
    for step, rows, values in shares:
        own = (values.double()[:, None] * (rows == examples[:, :, None])).sum(2)
        total = total + own
        sums[step + 1] = total
    return torch.stack([sums[step] for step in steps], 2)


def strongest_along(
    shares: Sequence[tuple[int, Tensor, Tensor]], scores: Tensor, steps: Sequence[int]
) -> dict[str, Tensor]:
    """Sums along training of the `strongest` examples, by side."""
    return {side: along_training(shares, examples, steps) for side, examples in strongest(scores).items()}


def contributions(parts: PathDecomposition, steps: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of the accounting, [m, n], and those of the strongest examples along training, by side."""
    scores = parts.contributions[:, 0]
    shares = [(share.step, share.rows, share.values[:, 0]) for share in parts.steps or ()]
    return scores, strongest_along(shares, scores, steps)


def explained(
    data: Data,
    points: Sequence[Point],
    parts: PathDecomposition,
    scores: dict[str, Tensor],
    along: dict[str, dict[str, Tensor]],
    again: Retrainings,
    sets: dict[tuple[str, int, int], list[list[int]]],
) -> list[dict[str, Any]]:
    """`told_points` with their deletions, for which networks are trained again without each of the sets."""
    outcomes = train_again(again, [examples for own in sets.values() for examples in own])
    told = told_points(data, points, parts, scores, along)
    deletions = told_deletions(points, sets, outcomes, again.values, scores["influence"])
    return [entry | {"deletions": own} for entry, own in zip(told, deletions, strict=True)]


def told_points(
    data: Data,
    points: Sequence[Point],
    parts: PathDecomposition,
    scores: dict[str, Tensor],
    along: dict[str, dict[str, Tensor]],
) -> list[dict[str, Any]]:
    """What `results.json` says of each point: prediction, sum of the accounting, the examples on both sides.

    `along` holds, for each method and side, the sums along training of the `strongest` examples.
    """
    best = {method: strongest(scores[method]) for method in METHODS}
    ranks = {method: (-scores[method]).argsort(dim=1, stable=True).argsort(dim=1) for method in METHODS}
    told = []
    for j, point in enumerate(points):
        label = data.shown(data.y_test[point.index])
        mean = 0.0 if data.targets is None else data.targets.mean[point.predicted]
        entry: dict[str, Any] = {
            "test_index": point.index,
            "why": point.why,
            "label": label,
            **_answer(data, point, float(parts.prediction[j, 0]) + mean),
            "margin": float(parts.prediction[j, 0]) + mean,
            "initial": float(parts.initial[j, 0]) + mean,
            "examples": float(parts.contributions[j, 0].sum()),
            "weight_decay": float(parts.regularization[j, 0]),
            "residual": float(parts.residual[j, 0]),
            **_shown(data, data.x_test[point.index]),
        }
        for method, other in (METHODS, METHODS[::-1]):
            own = scores[method][j]
            for side, sign in (("helped", 1), ("hurt", -1)):
                entry.setdefault(method, {})[side] = [
                    {
                        "index": i,
                        "label": data.shown(data.y_train[i]),
                        "score": float(own[i]),
                        "rank_there": _rank(int(ranks[other][j, i]), len(own), sign),
                        "along": along[method][side][j, place].tolist(),
                        **_shown(data, data.x_train[i]),
                    }
                    for place, i in enumerate(best[method][side][j].tolist())
                    if sign * float(own[i]) > 0
                ]
        told.append(entry)
    return told


def _answer(data: Data, point: Point, prediction: float) -> dict[str, Any]:
    """What the network says: a class, and whether that is right; or a number, which is the prediction of a target."""
    if data.targets is None:
        said = data.classes[point.predicted]
        return {"predicted": said, "right": point.predicted == int(data.y_test[point.index])}
    name = data.targets.names[point.predicted]
    return {"predicted": in_digits(prediction), "right": None, "quantity": "prediction", "target": name}


def _rank(place: int, n: int, sign: int) -> int:
    """Rank from 1, counted from the most helpful example, or from the most harmful one."""
    return place + 1 if sign > 0 else n - place


def told_deletions(
    points: Sequence[Point],
    sets: dict[tuple[str, int, int], list[list[int]]],
    outcomes: Tensor,
    before: Tensor,
    influence: Tensor,
) -> list[list[dict[str, Any]]]:
    """For each point: size and choice of what was removed, change that influence predicts, and the real one.

    Parameters
    ----------
    outcomes : [K, m], measures without each of the sets, in their order.
    before : [m], measures of the trained network.
    influence : scores [m, n].
    """
    told: list[list[dict[str, Any]]] = [[] for _ in points]
    place = 0
    for (method, point, size), own in sets.items():
        rows = outcomes[place : place + len(own)]
        place += len(own)
        for j in range(len(points)) if point < 0 else [point]:
            predicted = [-float(influence[j, examples].sum()) for examples in own]
            changes = rows[:, j] - before[j]
            told[j].append({
                "method": method, "size": size, "predicted": sum(predicted) / len(own), "real": float(changes.mean()),
                "spread": float(changes.std()) if len(own) > 1 else None,
            })  # fmt: skip
    return told


def pictures(data: Data, told: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The images that the page shows, those of training by their index; nothing for other data."""
    if data.kind != "images":
        return {}
    shown = sorted({e["index"] for t in told for method in METHODS for side in t[method].values() for e in side})
    tests = [t["test_index"] for t in told]
    both = as_pixels(torch.cat([data.x_test[tests], data.x_train[shown]]))
    return {"test": both[: len(tests)], "train": both[len(tests) :], "train_index": np.asarray(shown)}


def influence_in_numbers(result: Influence) -> dict[str, Any]:
    """The certificate of an influence, as plain JSON."""
    found = result.check
    return result.record() | {
        "smooth": result.smooth, "trusted": result.trusted,
        "checked": len(found.examples), "own_error": found.own_error if math.isfinite(found.own_error) else None,
    }  # fmt: skip


def _shown(data: Data, x: Tensor) -> dict[str, str]:
    """The text of an example: its sentence, or the first values of a vector; nothing for an image."""
    if data.kind == "images":
        return {}
    if data.vocabulary is not None:
        return {"text": data.sentence(x)}
    if data.columns is not None:
        return {"text": data.columns.shown(x)}
    values = x.flatten().tolist()
    text = ", ".join(f"{value:.3g}" for value in values[:_VALUES])
    return {"text": text + (f", … ({len(values):,} values)" if len(values) > _VALUES else "")}
