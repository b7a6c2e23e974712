"""Tsai, Yeh & Ravikumar 2023: sample-based explanations as global importance times similarity, tested by deletion.

Two classes of digits, MNIST, CIFAR-10 and two text sets; importances at one kernel, kernels at one importance, the new
combination beside existing methods, and exact influence beside all of them, on the same retrained networks.
"""

from __future__ import annotations

from ntkit.studies.part import Sizes
from ntkit.studies.study import Results, Study
from ntkit.studies.tsai2023 import methods, predictions, tsai_figures, wrong_labels
from ntkit.studies.tsai2023.tsai_sentences import CLAIMS
from ntkit.studies.tsai2023.tsai_setting import BATCH, MOMENTUM, TASKS

SCALES = {
    "quick": Sizes(
        train=200, text_train=300, test=12, pixels=14,  # examples; test points; pixels per side at most
        width=8, features=32, channels=32, own_words=True,  # of the networks; words of the sample only
        epochs=20, seeds=2, left=60, sets=30, fresh=2,  # examples left out alone; random sets; fresh runs
    ),
    "paper": Sizes(
        train=500, text_train=500, test=40, pixels=32, width=16, features=160, channels=128, own_words=False,
        epochs=20, seeds=3, left=500, sets=50, fresh=5,
    ),
}  # fmt: skip

OF_TASKS = [task.data for task in TASKS.values() if task.data != "digits"]


def about(results: Results) -> str:
    """What was done, in a paragraph."""
    s = results.work.sizes
    return (
        f"Two classes are learned from {s.train} images by two convolutions and a dense layer, or from {s.text_train} "
        "sentences by embeddings, three convolutions and a dense layer; one output, logistic loss, SGD with momentum "
        f"{MOMENTUM} in batches of {BATCH}, {s.epochs} epochs. The output in favor of the predicted class of {s.test} "
        "test points is explained by every method, and the network is trained again without the examples that a method "
        f"ranks first. {s.seeds} networks per task, each with its own sample; ± is one standard error over test points."
    )


def departures(results: Results) -> list[str]:
    """What differs from the paper."""
    texts = [
        "The paper’s data sets, networks and sizes were not all at hand: its text sets (toxic comments, news) are "
        "replaced by TREC and rt-polarity, its networks by small ones; its numbers are not compared.",
        "Removed examples are left out of the loss in the same batches from the same start, so that a change has no "
        "chance in it; fresh runs are one column of the tables.",
        "The surrogate’s weight of the norm (0.003), the damping of the influence function (0.01) and the ridge of "
        "TRAK (0.001) are ours. TRAK uses one model and exact gradients.",
        "Exact influence, the path kernel, leave-one-out and random sets are not in the paper.",
    ]
    if "trec" not in results.work.sets:
        texts.append("Text sets, MNIST and CIFAR-10 are included only when --data-dir names their files.")
    return texts


STUDY = Study(
    name="tsai2023",
    title="Explanations by training examples, tested by deletion",
    paper={
        "authors": "Tsai, Yeh, Ravikumar",
        "title": "Sample based Explanations via Generalized Representers",
        "year": 2023,
        "reference": "NeurIPS 2023; arXiv 2310.18526",
    },
    scales=SCALES,
    parts=[methods.parts, tsai_figures.parts, predictions.parts, predictions.deletion_parts, wrong_labels.parts],
    claims=(*CLAIMS, wrong_labels.claims),
    sections=[tsai_figures.sections, wrong_labels.sections],
    about=about,
    departures=departures,
    terms=("tangent_kernel", "path_kernel"),
    seeds=(0, 1, 2),
    official=dict.fromkeys(SCALES, tuple(dict.fromkeys(OF_TASKS))),
    unfinished=True,
)
