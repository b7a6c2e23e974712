"""Are contributions faithful? Examples are removed, and the network is retrained from the same start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkit.studies.bell2023.bell_setting import Images, cnn, images, sgd, weighted, weighted_cross_entropy
from ntkit.studies.bell2023.pictures import rebuilt
from ntkit.studies.claim import RISES, Claim, Condition, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, curve, lines, table
from ntkit.trajectory import train

CHOICES = {"top": "top contributors", "near": "nearest images", "random": "random, same class"}


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each test image."""
    for name in work.sets:
        for point in range(work.sizes.removals):
            yield StudyPart("removal", name, f"{name}-removed-{point:03d}", _remove, (name, point))


def _remove(work: Work, name: str, point: int) -> Result:
    """Change of one test image's prediction when training examples are removed, by share and choice."""
    seed, row = work.seeds[point % len(work.seeds)], point // len(work.seeds)
    data = images(work, name, work.sizes.train, work.sizes.test, seed=seed)
    arrays = work.result(rebuilt(name, seed)).arrays
    before = torch.from_numpy(arrays["network"])[row]
    c = int(before.argmax())
    contributions = torch.from_numpy(arrays["contributions"])[row]
    own = (data.y.cpu() == c).nonzero()[:, 0]
    distance = torch.cdist(data.x_test[row].reshape(1, -1), data.x.flatten(1)).cpu()[0]
    numbers: dict[str, Any] = {"point": row, "seed": seed, "predicted": c, "removed": []}
    for share in work.sizes.shares:
        k = min(round(share * work.sizes.train), len(own))
        generator = torch.Generator().manual_seed(1000 * point + k)
        removals = [("top", contributions.topk(k).indices), ("near", own[distance[own].topk(k, largest=False).indices])]
        removals += [
            ("random", own[torch.randperm(len(own), generator=generator)[:k]]) for _ in range(work.sizes.draws)
        ]
        for choice, rows in removals:
            after = retrained(work, data, rows, seed)[row]
            numbers["removed"].append({
                "share": share,
                "count": k,
                "kind": choice,
                "logit": float(after[c] - before[c]),
                "margin": _margin(after, c) - _margin(before, c),
                "told": -float(contributions[rows].sum()),
                "flipped": int(after.argmax()) != c,
                "same_class": float((data.y.cpu()[rows] == c).double().mean()),
            })  # fmt: skip
    return Result(numbers, {})


def retrained(work: Work, data: Images, removed: Tensor, seed: int = 0) -> Tensor:
    """Test logits after training from the same start and with the same batches, without some examples."""
    model = cnn(data.x.shape[-1], int(data.y.max()) + 1, work.sizes.width, seed)
    steps, targets = work.sizes.steps, weighted(data.y, removed)
    train(model, (data.x, targets), weighted_cross_entropy, sgd(work.sizes.lr), steps, record=[steps], seed=seed)
    with torch.no_grad():
        return model(data.x_test).cpu()


def _margin(logits: Tensor, c: int) -> float:
    others = torch.cat([logits[:c], logits[c + 1 :]])
    return float(logits[c] - others.max())


def _removals(runs: list[Result]) -> list[dict[str, Any]]:
    return [removal for r in runs for removal in r.numbers["removed"]]


def _means(runs: list[Result], share: float, choice: str, what: str) -> list[float]:
    """A number about removing examples, one for each network: the mean over its test images and draws."""
    by_seed: dict[int, list[float]] = {}
    for r in runs:
        values = [d[what] for d in r.numbers["removed"] if d["share"] == share and d["kind"] == choice]
        by_seed.setdefault(r.numbers["seed"], []).append(float(np.mean(values)))
    return [float(np.mean(values)) for values in by_seed.values()]


def claims(results: Results) -> Iterator[Claim]:
    """Top contributors against other examples; the sum of contributions against the true change."""
    s = results.work.sizes
    for name, runs in results["removal"].items():
        for other, which in (("random", "random examples"), ("near", "the nearest images")):
            words = f"{which} of the same class"
            gaps = {
                share: mean(np.subtract(_means(runs, share, other, "margin"), _means(runs, share, "top", "margin")))
                for share in s.shares
            }
            yield Claim(
                f"Without its top contributors a prediction changes more than without {words}, {name}",
                "additional fall of the margin: "
                + ", ".join(f"{gap:.2f} ({100 * share:g} % removed)" for share, gap in gaps.items()),
                [Condition("for each share it is", list(gaps.values()), RISES)],
                f"retrained from the same start with the same batches; {len(runs)} test images of "
                f"{len(_means(runs, s.shares[0], other, 'margin'))} networks, the error is over networks"
                + (f"; {s.draws} draws each" if other == "random" else ""),
                further=True,
            )
        removals = _removals(runs)
        expected, true = (np.array([r[what] for r in removals]) for what in ("told", "logit"))
        yield Claim(
            f"The sum of the removed contributions predicts the change, {name}",
            f"correlation {np.corrcoef(expected, true)[0, 1]:.2f} over {len(removals)} removals; true change over sum: "
            f"{float(expected @ true / (expected @ expected)):.3f}",
            note="the retrained network makes up for most of what was removed: contributions say what was learned from "
            "an example, not what would be missing without it",
            further=True,
        )


def sections(results: Results) -> Iterator[Section]:
    """Falls of the margin; predicted and true changes."""
    s = results.work.sizes
    for name, runs in results["removal"].items():
        rows, curves = [], []
        percents = [100 * share for share in s.shares]
        for choice, words in CHOICES.items():
            falls = [mean(np.negative(_means(runs, share, choice, "margin"))) for share in s.shares]
            curves.append(curve(words, percents, [f.value for f in falls], error=[f.error for f in falls]))
            for share, fall in zip(s.shares, falls, strict=True):
                logit, flipped = (mean(_means(runs, share, choice, what)) for what in ("logit", "flipped"))
                falls_text = [f"{fall:.2f}", f"{logit._replace(value=-logit.value):.2f}"]
                rows.append([f"{words}, {100 * share:g} %", *falls_text, f"{100 * flipped.value:.0f} %"])
        removals = _removals(runs)
        own = np.mean([r["same_class"] for r in removals if r["kind"] == "top"])
        correlation = np.corrcoef([r["told"] for r in removals], [r["logit"] for r in removals])[0, 1]
        dots = [
            curve(words, *([r[what] for r in removals if r["kind"] == choice] for what in ("told", "logit")))
            for choice, words in CHOICES.items()
        ]
        margins = ", ".join(f"{row[0].rsplit(',', 1)[0]} {row[1]}" for row in rows[len(s.shares) - 1 :: len(s.shares)])
        columns = ["Removed", "Margin falls by", "Output falls by", "Another class predicted"]
        yield Section(
            f"Are contributions faithful? {name.capitalize()}",
            "Faithfulness" if name == "digits" else f"Faithfulness, {name}",
            f"For {len(runs)} test images some training examples are removed, and the network is retrained from the "
            f"same start with the same batches. {100 * own:.0f} % of the top contributors are of the predicted class.",
            [
                lines(
                    "How much the margin falls without some examples",
                    f"Predicted output minus the next. With {100 * s.shares[-1]:g} % removed: {margins}.",
                    "% of the training set removed", "fall of the margin", [("", curves)],
                ),
                lines(
                    "Predicted and true change",
                    f"One dot per removal; correlation {correlation:.2f}. The true change is far smaller: the "
                    "remaining examples make up for most of it.",
                    "− sum of the removed contributions", "change of the predicted output", [("", dots)], style="dots",
                ),
                table("Without some examples", columns, rows),
            ],
        )  # fmt: skip
