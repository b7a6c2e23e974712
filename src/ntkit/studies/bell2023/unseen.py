"""Out of distribution: digits of other classes and patches of photographs against known classes, by kernel scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.imports import same_random_numbers
from ntkit.kernels.conjugate import ConjugateKernel
from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.novelty import novelty
from ntkit.report.words import plain
from ntkit.studies.bell2023.bell_setting import cnn, images, sgd
from ntkit.studies.claim import RISES, SURE, Bound, Claim, Condition, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, table
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import train

CLASSES = ("0", "1", "2", "3", "4")
OTHERS = ("5", "6", "7", "8", "9")
SETS = {"held": "held-out digits", "photographs": "patches of photographs"}
KERNEL_SCORES = {  # a larger score means more novel
    "after outside": "outside the span, after kernel",
    "after deviation": "posterior deviation, after kernel",
    "logit outside": "outside the span, after kernel of the largest logit",
    "logit deviation": "posterior deviation, after kernel of the largest logit",
    "path outside": "outside the span, path kernel",
    "path deviation": "posterior deviation, path kernel",
}
BASELINES = {
    "softmax": "1 − largest softmax probability",
    "energy": "energy, −log Σ exp of the logits",
    "norm": "norm of the outputs’ gradient",
    "gradnorm": "− norm of the gradient of the loss against uniform targets",
    "features": "distance to the nearest training image, last hidden layer",
    "pixels": "distance to the nearest training image, pixels",
}
OWN_SCORE = "path deviation"  # the paper's: named before any result, not the best of several
SCORES = KERNEL_SCORES | BASELINES
_SHRINK = 4  # block of a photograph's pixels averaged into one: its patches are then not flat


def patches(n: int, pixels: int, seed: int) -> Tensor:
    """Gray patches of scikit-learn's two photographs, each scaled to [0, 1]: [n, 1, pixels, pixels]."""
    with same_random_numbers():
        from sklearn.datasets import load_sample_images

    draw, selection, photographs = np.random.default_rng(seed), [], []
    for image in load_sample_images().images:
        h, w = (side // _SHRINK for side in image.shape[:2])
        blocks = image.mean(2)[: h * _SHRINK, : w * _SHRINK].reshape(h, _SHRINK, w, _SHRINK)
        photographs.append(blocks.mean((1, 3)))
    while len(selection) < n:
        photograph = photographs[len(selection) % len(photographs)]
        i, j = (int(draw.integers(side - pixels + 1)) for side in photograph.shape)
        patch = photograph[i : i + pixels, j : j + pixels]
        if patch.max() > patch.min():
            selection.append((patch - patch.min()) / (patch.max() - patch.min()))
    return torch.from_numpy(np.stack(selection))[:, None]


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each data set and seed."""
    for name in work.sets:
        for seed in work.seeds:
            yield StudyPart("unseen", name, f"unseen-{name}-seed-{seed}", _scores, (name, seed))


def _scores(work: Work, name: str, seed: int) -> Result:
    """Scores, and their AUROC against both kinds of images that were not learned."""
    with same_random_numbers():
        from sklearn.metrics import roc_auc_score

    data = images(work, name, work.sizes.train, work.sizes.unseen, classes=CLASSES, seed=seed)
    other = images(work, name, len(OTHERS), work.sizes.unseen, classes=OTHERS, seed=seed)
    digits = other.x_test * other.deviation + other.mean
    sets = {"held": digits, "photographs": patches(work.sizes.unseen, data.x.shape[-1], seed).to(digits)}
    sets = {kind: (x - data.mean) / data.deviation for kind, x in sets.items()}
    model = cnn(data.x.shape[-1], len(CLASSES), work.sizes.width, seed)
    run = train(
        model, (data.x, data.y), cross_entropy, sgd(work.sizes.lr), work.sizes.unseen_steps, seed=seed, resume=True,
        path=work.trajectory(f"unseen-{name}-seed-{seed}"),
    )  # fmt: skip
    everything = torch.cat([data.x_test, *sets.values()])
    kernels = {
        "after": TangentKernel(model, outputs="trace"),
        "logit": TangentKernel(model, outputs=lambda out: out.max(1).values),
        "path": PathKernel(run, outputs="trace"),
    }
    scores, certificates = {}, {}
    for kind, kernel in kernels.items():
        novel = novelty(kernel, data.x, everything)
        scores |= {f"{kind} outside": novel.outside, f"{kind} deviation": novel.deviation}
        certificates[kind] = {"residual": novel.residual, "floor": novel.floor, "rank": novel.rank}
        if kind == "after":
            scores["norm"] = novel.norm
    scores |= _baselines(model, data.x, everything)
    m, numbers = len(data.x_test), {}
    for place, kind in enumerate(sets):
        rows = slice(m + place * work.sizes.unseen, m + (place + 1) * work.sizes.unseen)
        numbers[kind] = {}
        for score in SCORES:
            values = torch.cat([scores[score][:m], scores[score][rows]]).cpu().numpy()
            numbers[kind][score] = float(roc_auc_score(np.arange(len(values)) >= m, values))
    arrays = {score: values.cpu().numpy() for score, values in scores.items()}
    accuracy = float((model(data.x_test).argmax(1) == data.y_test).double().mean())
    return Result({"auroc": numbers, "certificates": certificates, "accuracy": accuracy, "known": m}, arrays)


@torch.no_grad()
def _baselines(model: nn.Module, x_train: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Scores that need no kernel between two samples."""
    logits = model(x)
    last = ConjugateKernel(model)
    uniform = TangentKernel(model, outputs=lambda out: -out.log_softmax(1).mean(1))
    squares = last.diagonal(x)[:, None] + last.diagonal(x_train) - 2 * last(x, x_train)
    return {
        "softmax": 1 - logits.softmax(1).max(1).values,
        "energy": -logits.logsumexp(1),
        "gradnorm": -uniform.diagonal(x).sqrt(),
        "features": squares.clamp(min=0).min(1).values.sqrt(),
        "pixels": torch.cdist(x.flatten(1), x_train.flatten(1)).min(1).values,
    }


def _auroc(runs: list[Result], kind: str, score: str) -> list[float]:
    """Area under the ROC curve, one for each seed."""
    return [r.numbers["auroc"][kind][score] for r in runs]


def claims(results: Results) -> Iterator[Claim]:
    """Novelty against chance and against baselines."""
    for name, runs in results["unseen"].items():
        span = {kind: mean(_auroc(runs, kind, "path outside")) for kind in SETS}
        yield Claim(
            f"Gradients of images of other kinds leave the span of the training gradients, {name}",
            "; ".join(f"AUROC {value:.3f}, {SETS[kind]}" for kind, value in span.items()),
            [Condition("for both kinds it is", list(span.values()), Bound("over", 0.5, errors=SURE))],
            "path kernel with both points along each step, share of the gradient outside the span",
            further=True,
        )
        for rivals, words in ((("pixels",), "the distance to the data"), (BASELINES, "every baseline")):
            texts, gaps = [], []
            for kind, title in SETS.items():
                values = {score: _auroc(runs, kind, score) for score in (OWN_SCORE, *rivals)}
                other = max(rivals, key=lambda s: mean(values[s]).value)
                gaps.append(mean(np.subtract(values[OWN_SCORE], values[other])))
                pair = (f"{mean(values[score]):.3f} ({SCORES[score]})" for score in (OWN_SCORE, other))
                texts.append(f"{title}: {' against '.join(pair)}")
            yield Claim(
                f"The path kernel’s posterior tells them better than {words}, {name}",
                "; ".join(texts),
                [Condition("for both kinds the gain is", gaps, RISES)],
                "path kernel with both points along each step; of the baselines the best for each kind; "
                f"{len(runs)} seeds",
                further=True,
            )


def sections(results: Results) -> Iterator[Section]:
    """The area under the ROC curve of every score."""
    s = results.work.sizes
    for name, runs in results["unseen"].items():
        rows = [
            [title, "kernel" if score in KERNEL_SCORES else "baseline"]
            + [f"{mean(_auroc(runs, kind, score)):.3f}" for kind in SETS]
            for score, title in SCORES.items()
        ]
        certificates = [certificate for r in runs for certificate in r.numbers["certificates"].values()]
        rank = min(r.numbers["certificates"]["path"]["rank"] for r in runs)
        note = (
            f"Mean over {len(runs)} seeds (start, training images). The training gradients of the path kernel span "
            f"{rank} dimensions of {s.train} examples. Largest residual of the solves: "
            f"{plain(max(c['residual'] for c in certificates), 2)}; the span scores are zero up to "
            f"{plain(max(c['floor'] for c in certificates), 2)}."
        )
        yield Section(
            f"Images of other kinds: {name}",
            "Other kinds" if name == "digits" else f"Other kinds, {name}",
            f"A network learns {CLASSES[0]} to {CLASSES[-1]} ({s.train:,} images, {s.unseen_steps} steps). Which of "
            f"{s.unseen} new images of these, {s.unseen} of {OTHERS[0]} to {OTHERS[-1]}, and {s.unseen} patches of "
            "two photographs are of a kind it did not learn? Scores from gradients (ntkit.novelty) beside baselines.",
            [table("Area under the ROC curve (0.5 is chance)", ["Score", "Kind", *SETS.values()], rows, note)],
        )
