"""Long 2021, Properties of the After Kernel: kernels at equal training loss, not only before and after.

Two classes of MNIST or CIFAR-10 (or of the digits of scikit-learn), the paper's VGG-like and fully connected networks,
plain SGD. At each of several training losses: hard-margin SVMs with the tangent and the conjugate kernel, and the
cosines between images and their transforms.
"""

from __future__ import annotations

from ntkit.studies.long2021 import beyond, beyond_claims, beyond_figures, figures, moments
from ntkit.studies.long2021.long_setting import BATCH, EARLY
from ntkit.studies.long2021.sentences import CLAIMS
from ntkit.studies.part import Sizes
from ntkit.studies.study import Results, Study

SCALES = {
    "quick": Sizes(
        train=2_000, test=500,  # images of two classes at most; None: all
        losses=(0.6, 0.3, 0.1, 0.03), epochs=60, vgg_epochs=12,  # targets of the training loss; most epochs
        seeds=2, few=1, probed=50,  # seeds of the main setting and of the others; test images that are transformed
    ),
    "paper": Sizes(
        train=None, test=None, losses=(0.6, 0.3, 0.1, 0.03, 0.01), epochs=300, vgg_epochs=100,
        seeds=5, few=5, probed=200,
    ),
}  # fmt: skip


def about(results: Results) -> str:
    """What was done, in a paragraph."""
    s = results.work.sizes
    finished = sum(run.numbers["status"] == "measured" for runs in results["moment"].values() for run in runs)
    return (
        "Two classes are learned by the paper’s networks of about 100,000 parameters: four hidden ReLU layers (mlp), "
        "or two blocks of two 3 x 3 convolutions and a max-pool (vgg); Glorot-uniform weights, zero biases, one "
        f"output, logistic loss, plain SGD in batches of {BATCH}. The kernels are computed before training and at the "
        f"first recorded step (quarters of the first {EARLY} epochs, then whole ones) at which the loss over all "
        f"training examples is at most {', '.join(f'{loss:g}' for loss in s.losses)}. {finished} moments are measured "
        "so far, those of the paper’s networks on two classes on the whole training set. ± is one standard error over "
        "seeds; where a claim tests a change, the larger one of that over seeds and that over test images (paired), "
        "unless it says otherwise."
    )


def departures(results: Results) -> list[str]:
    """What differs from the paper."""
    return [
        "The paper trains to one target of the training loss; here every run passes the same targets, so that learning "
        "rates are compared at equal loss and each number is a curve.",
        "The SVM is solved exactly, with a certificate, instead of by a first-order method under a time limit.",
        "Cosines are exact; those with 1e-4 added to each norm, as in the paper’s code, are in the files of the folder "
        "parts (“paper”). Centered cosines, the cosine of different images, patch shuffles and centered features are "
        "not in the paper.",
        "Layers, the time along training, agreement of machine and network, ten classes, residual networks and "
        "transformers are not in the paper.",
        "The paper’s pairs of CIFAR-10 classes are not stated in the sources at hand; cat/dog and airplane/automobile "
        "are ours.",
    ]


STUDY = Study(
    name="long2021",
    title="The after kernel",
    paper={
        "authors": "Long",
        "title": "Properties of the After Kernel",
        "year": 2021,
        "reference": "arXiv 2105.10585",
    },
    scales=SCALES,
    parts=[figures.picture_parts, moments.parts, beyond.parts],
    claims=[*CLAIMS, *beyond_claims.CLAIMS],
    sections=[figures.sections, beyond_figures.sections],
    about=about,
    departures=departures,
    terms=("tangent_kernel", "alignment", "invariance"),
    seeds=(0, 1, 2, 3, 4),
    official={"quick": ("mnist",), "paper": ("mnist", "cifar10")},
    official_only=("paper",),
    unfinished=True,
    single_thread=(),
)
