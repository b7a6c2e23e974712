"""What the representation says about predictions: posterior and errors, distance as the baseline, what adds most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ntkit.report.words import plain
from ntkit.studies.bell2023 import pictures, plane
from ntkit.studies.bell2023.bell_setting import ROUNDING, errors, images, rounding
from ntkit.studies.bell2023.own_kernel import definiteness, own_kernel, posterior, rank_correlations, ranks
from ntkit.studies.claim import FALLS, RISES, SURE, Bound, Claim, Condition, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, Section, table

RULES = {"tanh": ("gauss", 16), "relu": ("midpoint", 20)}  # of the matrices whose eigenvalues are judged
READINGS = {
    "both_roles": "every point in both roles: asymmetry",
    "jump": "training points asked as new ones: change of the values",
    "single": "one kernel with ratios of slopes: asymmetry",
    "single_least": "one kernel: smallest eigenvalue over the largest",
}
TOP = 10  # examples
EVERY = 5  # on images the posterior's kernel is the mean over each fifth step
_NODES = 2  # midpoints per step for the posterior


def parts(work: Work) -> Iterator[StudyPart]:
    """Definiteness in the plane; the posterior in the plane and on images; contributions to images' predictions."""
    for name in plane.ACTIVATIONS:
        for seed in work.seeds:
            yield StudyPart("definite", name, f"definite-{name}-seed-{seed}", _definite, (name, seed))
            yield StudyPart("posterior", name, f"posterior-{name}-seed-{seed}", _plane_posterior, (name, seed))
    for name in work.sets:
        for seed in work.seeds:
            yield StudyPart("posterior", name, f"posterior-{name}-seed-{seed}", _image_posterior, (name, seed))
            yield StudyPart("made of", name, f"made-of-{name}-seed-{seed}", _made_of, (name, seed))


def _definite(work: Work, activation: str, seed: int) -> Result:
    model, run, x, y = plane.trained(work, activation, seed)
    points = plane.clusters(plane.TEST, 1000 + seed)[0].to(x)
    found = definiteness(model, run, (x, y), plane.LR, points, *RULES[activation])
    return Result(found._asdict() | {"terms": work.sizes.plane_steps * len(y)}, {})


def _plane_posterior(work: Work, activation: str, seed: int) -> Result:
    """Errors all over the plane: distance in total variation from the true shares of the classes there."""
    model, run, x, y = plane.trained(work, activation, seed)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(work.sizes.judged, 2, generator=generator, dtype=x.dtype)
    points = (plane.REACH * (2 * uniform - 1)).to(x)
    squares = torch.cdist(points, torch.tensor(plane.CENTERS).to(x)) ** 2
    truth = (-squares / (2 * plane.SPREAD**2)).softmax(1)
    own = own_kernel(model, run, (x, y), plane.LR, points, _NODES)
    with torch.no_grad():
        network = functional_call(model, {k: v.to(x) for k, v in run.state(run.steps[-1]).items()}, (points,))
    missed = (network.softmax(1) - truth).abs().sum(1) / 2
    rebuilt = {"rebuilt": errors(own.rebuilt, network)["relative"]}
    wrong, distance = network.argmax(1) != truth.argmax(1), torch.cdist(points, x).min(1).values
    return Result(_judged(own, network, missed, wrong, distance) | rebuilt, {})


def _image_posterior(work: Work, name: str, seed: int) -> Result:
    """Errors of test images: their cross-entropy."""
    model, run, learned = pictures.learned(work, name, seed)
    data = images(work, name, work.sizes.train, work.sizes.judged, seed=seed)
    assert torch.equal(data.x, learned.x)  # the same training images
    own = own_kernel(model, run, (data.x, data.y), work.sizes.lr, data.x_test, _NODES, EVERY)
    run.load(model, run.steps[-1])
    with torch.no_grad():
        network = model(data.x_test)
    missed = F.cross_entropy(network, data.y_test, reduction="none")
    distance = torch.cdist(data.x_test.flatten(1), data.x.flatten(1)).min(1).values
    return Result(_judged(own, network, missed, network.argmax(1) != data.y_test, distance), {})


def _judged(own: Any, network: Tensor, missed: Tensor, wrong: Tensor, distance: Tensor) -> dict[str, Any]:
    """How well deviation, distance and the network's own doubt tell large errors."""
    deviation, _ = posterior(own)
    doubt = 1 - network.softmax(1).max(1).values
    numbers: dict[str, Any] = dict(rank_correlations(deviation, distance, missed))
    numbers["doubt"] = rank_correlations(doubt, distance, missed)["score"]
    numbers["beyond doubt"] = rank_correlations(deviation, doubt, missed)["beyond"]
    numbers["wrong"] = float(wrong.double().mean())
    for score, values in (("deviation", deviation), ("distance", distance), ("doubt", doubt)):
        numbers[f"auroc {score}"] = auroc(values, wrong)
    return numbers


def auroc(score: Tensor, positive: Tensor) -> float | None:
    """Share of pairs of a positive and a negative that the score orders rightly; None without such a pair.

    >>> auroc(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([False, True, False]))
    1.0
    """
    score, positive = score.cpu(), positive.cpu()
    count = int(positive.sum())
    if count in (0, len(positive)):
        return None
    above = ranks(score)[positive].sum() - count * (count - 1) / 2
    return float(above / (count * (len(positive) - count)))


def _made_of(work: Work, name: str, seed: int) -> Result:
    """Of each test image: classes of the examples that add most and of the nearest; contributions against distance."""
    data = images(work, name, work.sizes.train, work.sizes.test, seed=seed)
    arrays = work.result(pictures.rebuilt(name, seed)).arrays
    contributions, network = (torch.from_numpy(arrays[key]) for key in ("contributions", "network"))
    labels, predicted = data.y.cpu(), network.argmax(1)
    distance = torch.cdist(data.x_test.flatten(1), data.x.flatten(1)).cpu()
    top, near = contributions.topk(TOP, 1).indices, distance.topk(TOP, 1, largest=False).indices
    same = {key: (labels[rows] == predicted[:, None]).double().mean() for key, rows in (("top", top), ("near", near))}
    own = labels[None] == predicted[:, None]
    correlations = [
        float(torch.corrcoef(torch.stack([ranks(c.abs()[rows]), ranks(d[rows])]))[0, 1])
        for c, d, rows in zip(contributions, distance, own, strict=True)
        if int(rows.sum()) > 2
    ]
    sizes = contributions.abs().sort(1, descending=True).values.cumsum(1)
    half = (sizes < sizes[:, -1:] / 2).sum(1) + 1
    numbers = {f"same {key}": float(value) for key, value in same.items()}
    numbers |= {"by distance": float(np.mean(correlations)), "half": float(half.double().mean() / len(labels))}
    return Result(numbers | {"shared": float((top[:, :, None] == near[:, None]).any(2).double().mean())}, {})


def _of(runs: list[Result], what: str) -> list[float]:
    return [r.numbers[what] for r in runs if r.numbers.get(what) is not None]


def kernel_claims(results: Results) -> Iterator[Claim]:
    """Which kernel is one, and which is not."""
    groups = {plane.LABELS[name]: runs for name, runs in results["definite"].items()}
    runs = [r for own in groups.values() for r in own]
    if not runs:
        return
    smooth = results["definite"]["tanh"]
    units = [r.numbers["error"] / rounding(r.numbers["terms"]) for r in smooth]
    least = _of(runs, "least") + _of(runs, "mean_least")
    yield Claim(
        "The kernel of each step is symmetric and positive semidefinite, with training points held at the step’s start",
        f"smallest eigenvalue over its rounding: at least {plain(min(least), 2)}; the same values rebuild the outputs "
        f"up to {plain(max(_of(smooth, 'error')), 2)} of the largest (tanh)",
        [Condition("every smallest eigenvalue, in units of matrix size x 2⁻⁵² x the largest, is", least,
                   Bound("at least", -1)),
         Condition("for tanh the error of the outputs that these values rebuild, in units of the rounding of the sum, "
                   "is", units, ROUNDING)],
        "values of training points at the start of the step, of new points along it, all pairs of outputs; every step "
        f"and the mean over steps; {plane.TRAIN} training and {plane.TEST} new points, {len(smooth)} seeds each",
    )  # fmt: skip
    texts = [
        f"{name}: both roles {mean(_of(own, 'both_roles')):.2g}, held or not {mean(_of(own, 'jump')):.2g}, one kernel "
        f"{mean(_of(own, 'single')):.2g} with a smallest eigenvalue of {mean(_of(own, 'single_least')):.2g} of the "
        "largest"
        for name, own in groups.items()
    ]
    every = [mean(_of(own, what)) for own in groups.values() for what in ("both_roles", "jump", "single")]
    negative = [mean(_of(own, "single_least")) for own in groups.values()]
    yield Claim(
        "Other readings of the formula are no kernels",
        "asymmetry, " + "; ".join(texts),
        [Condition("every asymmetry or change is", every, RISES),
         Condition("the smallest eigenvalue of the one kernel’s symmetric part is", negative,
                   FALLS)],
        "both roles: each point averaged on the left, at the start on the right; held or not: change of the values "
        "between training points when one side counts as new; one kernel: sum over steps of values times ratios of "
        "slopes; all relative to the norm of the values",
        further=True,
    )  # fmt: skip


def claims(results: Results) -> Iterator[Claim]:
    """Posterior and distance; what predictions are made of."""
    groups = {plane.LABELS.get(name, name): runs for name, runs in results["posterior"].items()}
    flat = {plane.LABELS[name]: groups[plane.LABELS[name]] for name in plane.ACTIVATIONS if results["posterior"]}
    both = {name: mean(_of(runs, "both")) for name, runs in flat.items()}
    yield Claim(
        "The posterior of the representation’s kernel is uncertain far from the data",
        "rank correlation of deviation and distance to the nearest training point: "
        + ", ".join(f"{name} {value:.2f}" for name, value in both.items()),
        [Condition("each is", list(both.values()), RISES)],
        f"{results.work.sizes.judged} points all over the plane; kernel: mean over steps, sum over outputs, training "
        "points held at the start of each step",
    )
    for name, runs in groups.items():
        score, distance = _of(runs, "score"), _of(runs, "distance")
        beyond, pairs = mean(_of(runs, "beyond")), [r for r in runs if r.numbers["auroc distance"] is not None]
        areas = [f"{mean(_of(pairs, f'auroc {w}')):.3f} ({w})" for w in ("deviation", "distance")] if pairs else []
        yield Claim(
            f"The posterior knows something of the network’s errors that the distance to the data does not, {name}",
            f"rank correlation with the error: deviation {mean(score):.2f}, distance {mean(distance):.2f}, difference "
            f"{mean(np.subtract(score, distance)):.2f}; deviation given the distance {beyond:.2f}"
            + (f"; AUROC for wrong classes {', '.join(areas)}" if areas else ""),
            [Condition("the correlation given the distance is", [beyond], RISES)],
            ("error: distance in total variation from the true shares of the classes" if name in flat else
             f"error: cross-entropy; kernel: mean over each {EVERY}th step")
            + f"; given the distance: partial correlation of ranks; {len(runs)} seeds",
        )  # fmt: skip
    doubt = {name: mean(_of(runs, "beyond doubt")) for name, runs in groups.items()}
    yield Claim(
        "The posterior knows something of the network’s errors that the network’s own doubt does not",
        "rank correlation with the error given 1 − largest softmax output: "
        + ", ".join(f"{name} {value:.2f}" for name, value in doubt.items()),
        [Condition("for each network it is", list(doubt.values()), RISES)],
        "the same points and errors",
        further=True,
    )
    for name, runs in results["made of"].items():
        gain = mean(np.subtract(_of(runs, "same top"), _of(runs, "same near")))
        slope, half = mean(_of(runs, "by distance")), mean(_of(runs, "half"))
        yield Claim(
            f"Predictions rest on many examples, above all of their class, {name}",
            f"of the {TOP} examples that add most {100 * mean(_of(runs, 'same top')).value:.1f} % are of the predicted "
            f"class, of the {TOP} nearest images {100 * mean(_of(runs, 'same near')).value:.1f} % (difference "
            f"{gain:.3f}); half of all contributions comes from {half:.3f} of the examples",
            [Condition("the difference is", [gain], RISES),
             Condition("the share of the examples that make up half", [half],
                       Bound("over", TOP / results.work.sizes.train, errors=SURE))],
            f"{results.work.sizes.test} test images, {len(runs)} seeds; {TOP} of {results.work.sizes.train} examples "
            f"are a share of {TOP / results.work.sizes.train:.3f}",
        )  # fmt: skip
        yield Claim(
            f"Within the class the nearer images add more, {name}",
            f"rank correlation of the size of a contribution and the distance in pixels {slope:.2f}",
            [Condition("it is", [slope], FALLS)],
            f"examples of the predicted class; {results.work.sizes.test} test images, {len(runs)} seeds",
        )


def _rows(name: str, runs: list[Result]) -> Iterator[list[str]]:
    wrong = f"{100 * mean(_of(runs, 'wrong')).value:.1f} % wrong"
    for what, words in (("deviation", "posterior deviation"), ("distance", "distance"), ("doubt", "1 − softmax")):
        own, area = _of(runs, {"deviation": "score"}.get(what, what)), _of(runs, f"auroc {what}")
        given = (
            [f"{mean(_of(runs, key)):.2f}" for key in ("beyond", "beyond doubt")] if what == "deviation" else ["–"] * 2
        )
        yield [f"{name} ({wrong}), {words}", f"{mean(own):.2f}", f"{mean(area):.2f}" if area else "–", *given]


def section(results: Results) -> Section:
    """Scores against errors."""
    groups = {plane.LABELS.get(name, name): runs for name, runs in results["posterior"].items()}
    definite = results["definite"]
    rebuilt = max(value for runs in groups.values() for value in _of(runs, "rebuilt"))
    items: list[Item] = [
        table(
            "Which score tells the network’s errors?",
            ["Network, score", "Rank correlation", "AUROC", "Given distance", "Given 1 − softmax"],
            [row for name, runs in groups.items() for row in _rows(name, runs)],
            "Rank correlation with the size of the error; AUROC for wrong classes; given another score: partial "
            f"correlation of ranks. In the plane the values behind the deviation rebuild the logits up to "
            f"{plain(rebuilt, 2)} of the largest.",
        ),
        table(
            "Kernels that the formula could mean, in the plane",
            ["Reading", *(plane.LABELS[name] for name in definite)],
            [["own kernel: smallest eigenvalue over rounding, at least",
              *(plain(min(_of(runs, "least")), 2) for runs in definite.values())]]
            + [[words, *(f"{mean(_of(runs, what)):.2g}" for runs in definite.values())]
               for what, words in READINGS.items()],
            "The own kernel has training points held at the start of each step. Asymmetry and change are relative to "
            "the norm of the values.",
        ),
    ]  # fmt: skip
    return Section(
        "Which kernel, and what does it know?",
        "Own kernel",
        "The representation’s kernel takes gradients of training points at the start of each step and those of new "
        "points along it. Its posterior deviation is compared with the errors of the network, beside the distance to "
        "the nearest training point.",
        items,
    )
