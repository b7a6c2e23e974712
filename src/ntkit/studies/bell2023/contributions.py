"""What predictions are made of: contributions of training images to a few test images' outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.path.decomposition import PathDecomposition
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report.words import fixed, plain
from ntkit.studies.bell2023.bell_setting import gray
from ntkit.studies.bell2023.pictures import learned, rebuilt
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, Section, curve, lines, table

CASES, IMAGES = 4, 5  # test images; training images for and against each


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each data set."""
    yield from (StudyPart("explained", name, f"{name}-explained", _explain, (name,)) for name in work.sets)


def _explain(work: Work, name: str) -> Result:
    """For some test images: training images for and against, sums by class, contributions over time."""
    _, run, data = learned(work, name, 0)
    network = torch.from_numpy(work.result(rebuilt(name, 0)).arrays["network"])
    labels, truth = data.y.cpu(), data.y_test.cpu()
    rows = spread(network, truth)
    parts = PathKernel(run).decompose(data.x_test[rows], steps=True)
    best, worst = parts.top(IMAGES), parts.top(IMAGES, against=True)
    predicted = parts.prediction.argmax(1)
    cases = []
    for i, index in enumerate(rows.tolist()):
        c = int(predicted[i])
        cases.append({
            "index": index,
            "predicted": c,
            "label": int(truth[index]),
            "initial": float(parts.initial[i, c]),
            "logit": float(parts.prediction[i, c]),
            "for": {"labels": labels[best.examples[i]].tolist(), "values": best.values[i].tolist()},
            "against": {"labels": labels[worst.examples[i]].tolist(), "values": worst.values[i].tolist()},
            "classes": parts.by_class(labels)[i, c].tolist(),
            "half": _half(parts.contributions[i, c]),
            "over_time": _over_time(parts, labels, i, c),
        })  # fmt: skip
    arrays = {
        "test": gray(data.x_test[rows], data),
        "for": gray(data.x[best.examples.to(data.x.device)], data),
        "against": gray(data.x[worst.examples.to(data.x.device)], data),
    }
    return Result({"cases": cases, "error": parts.error, "largest_output": float(parts.prediction.abs().max())}, arrays)


def spread(network: Tensor, truth: Tensor) -> Tensor:
    """Test images from the worst margin of the true class to the best, evenly spread over the ranks."""
    own = network.gather(1, truth[:, None])[:, 0]
    others = network.scatter(1, truth[:, None], -math.inf).max(1).values
    ranked = (own - others).argsort()
    return ranked[torch.linspace(0, len(ranked) - 1, min(CASES, len(ranked))).round().long()]


def _half(contributions: Tensor) -> int:
    """Number of examples that make up half of the sum of absolute contributions."""
    sizes = contributions.abs().sort(descending=True).values.cumsum(0)
    return int((sizes < sizes[-1] / 2).sum()) + 1


def _over_time(parts: PathDecomposition, labels: Tensor, i: int, c: int) -> dict[str, list[float]]:
    """Sum of contributions up to each step: of the examples of class `c`, of all others, and the logit."""
    own, rest = [], []
    for share in parts.steps or []:
        of_class = labels[share.rows] == c
        own.append(float(share.values[i, c, of_class].sum()))
        rest.append(float(share.values[i, c, ~of_class].sum()))
    totals = {"own": np.cumsum([0.0, *own]), "others": np.cumsum([0.0, *rest])}
    totals["logit"] = float(parts.initial[i, c]) + totals["own"] + totals["others"]
    return {name: value.tolist() for name, value in totals.items()}


def section(results: Results, name: str) -> Section:
    """Training images for and against, contributions over time and by class."""
    result = results.one("explained", name)
    cases = result.numbers["cases"]
    names = [f"predicted {case['predicted']}, is a {case['label']}" for case in cases]
    panels = [(heading, _over_time_curves(case["over_time"])) for case, heading in zip(cases, names, strict=True)]
    rows = [
        [
            heading,
            fixed(case["initial"], 2),
            *(fixed(v, 1, plus=True) for v in case["classes"]),
            fixed(case["logit"], 2),
        ]
        for case, heading in zip(cases, names, strict=True)
    ]
    classes = [f"of {c}" for c in range(len(cases[0]["classes"]))]
    train = results.work.sizes.train
    return Section(
        f"What predictions are made of: {name}",
        "Contributions" if name == "digits" else f"Contributions, {name}",
        "The predicted output of four test images, from the worst margin to the best, as a sum over the training "
        f"images; it equals the network’s own up to {plain(result.numbers['error'], 2)} of the largest.",
        [
            {"kind": "images", "title": "Training images for and against", "cases": [
                _case(name, i, case, train) for i, case in enumerate(cases)
            ]},
            lines(
                "The predicted output, summed up step by step",
                "Examples of the predicted class push its output up, all others down: the output is the small "
                "difference of large sums.",
                "step", "sum of contributions", panels, wide=True,
            ),
            table("Contributions to the predicted output, by class of the training images",
                  ["Test image", "Initial", *classes, "Output"], rows),
        ],
        {f"explained/{name}/{key}": array for key, array in result.arrays.items()},
    )  # fmt: skip


def _over_time_curves(sums: dict[str, list[float]]) -> list[Item]:
    steps = range(len(sums["logit"]))
    kinds = (("own", "examples of the predicted class"), ("others", "all other examples"))
    curves = [curve(words, steps, sums[key]) for key, words in kinds]
    return [*curves, curve("the output", steps, sums["logit"], dash="dash")]


def _case(name: str, i: int, case: Item, n: int) -> Item:
    right = "correctly" if case["predicted"] == case["label"] else f"wrongly: it is a {case['label']}"
    strips = []
    for side, heading in (("for", "largest positive contributions"), ("against", "largest negative contributions")):
        images = [
            {"image": [f"explained/{name}/{side}", [i, j]], "caption": str(label), "value": fixed(value, 2, plus=True),
             "other": side == "for" and label != case["predicted"]}
            for j, (label, value) in enumerate(zip(case[side]["labels"], case[side]["values"], strict=True))
        ]  # fmt: skip
        strips.append({"heading": heading, "images": images})
    return {
        "image": [f"explained/{name}/test", [i]],
        "text": f"Predicted {case['predicted']}, {right}. Output {fixed(case['logit'], 2)} = "
        f"{fixed(case['initial'], 2)} at the start {fixed(case['logit'] - case['initial'], 2, plus=True)} by training; "
        f"{case['half']} of {n:,} examples make up half of all contributions.",
        "strips": strips,
    }
