"""Kopitkov & Indelman 2020, Neural Spectrum Alignment: the kernel turns towards the target while a network learns it.

Four pictures as functions of position (three ripples and a photograph), full-batch gradient descent with one decay of
the learning rate and a run without it; digits (and MNIST, with its files) under SGD, momentum and Adam.
"""

from __future__ import annotations

from ntkit.studies.kopitkov2019 import (
    constant_kernel,
    decay,
    kopitkov_figures,
    learned_pictures,
    learning_speed,
    optimizers,
)
from ntkit.studies.kopitkov2019.kopitkov_setting import DEPTHS, PICTURES
from ntkit.studies.part import Sizes
from ntkit.studies.study import Results, Study

SCALES = {
    "quick": Sizes(
        seeds=5,
        side=20, width=96, steps=8_000, lr=0.1,  # pixels per side; the network and its training
        decay=2_500,  # the step from which the learning rate is half
        k=60, top=20,  # eigenpairs; k of the energies in the claims
        points=200, digit_steps=1_500,  # digits that the kernel is tracked on; training steps
    ),
    "paper": Sizes(
        seeds=3, side=50, width=256, steps=100_000, lr=0.25, decay=50_000, k=200, top=20, points=1_000,
        digit_steps=30_000,
    ),
}  # fmt: skip


def about(results: Results) -> str:
    """What was done, in a paragraph."""
    s = results.work.sizes
    return (
        f"Gray pictures on {s.side} x {s.side} points of [-1, 1]^2 ({', '.join(PICTURES)}; standardized) are learned "
        f"as functions of position by leaky-ReLU MLPs of width {s.width} and depth {DEPTHS[-1]}, the {PICTURES[0]} "
        f"also by depth {' and '.join(map(str, DEPTHS[:-1]))}, with full-batch gradient descent on half the mean "
        "squared error: "
        f"{s.steps:,} steps at learning rate {s.lr}, halved from step {s.decay:,} on; a second run goes on without the "
        f"decay. Then {' and '.join(results.work.sets)} (ten classes, cross-entropy, minibatches of 32, "
        f"{s.digit_steps:,} steps) by an MLP of depth {optimizers.DEPTH} under SGD, momentum and Adam; the kernel is "
        f"tracked on {s.points} training images. {s.seeds} seeds each; ± is one standard error."
    )


def departures(results: Results) -> list[str]:
    """What differs from the paper."""
    s = results.work.sizes
    return [
        f"The paper’s picture is the Mona Lisa on 10,000 points, its run 600,000 steps; here {s.side**2:,} points and "
        f"{s.steps:,} steps. The scale paper has 2,500 points, 100,000 steps and three seeds, for hours, not weeks.",
        "The pictures: ripples sin(10 |x|), wide ones sin(5 |x|), narrow ones sin(15 |x|), and the middle of "
        "scikit-learn’s photograph of a flower. sin(20 |x|) was tried: at these sizes it is not learned.",
        "Initialization (PyTorch’s default), leaky slope (0.01), range of the inputs and the step of the decay are not "
        "stated in the sources at hand.",
        "The displaced picture, the run without decay, the constant kernels and the comparison with untrained networks "
        "are not in the sources at hand: they say what chance, time and size alone do.",
        "The paper compares SGD and Adam on the picture; here optimizers are compared on digits."
        + ("" if "mnist" in results.work.sets else " MNIST is included only when --data-dir names its files."),
    ]


STUDY = Study(
    name="kopitkov2019",
    title="Neural spectrum alignment",
    paper={
        "authors": "Kopitkov, Indelman",
        "title": "Neural Spectrum Alignment: Empirical Study",
        "year": 2020,
        "reference": "ICANN 2020, LNCS 12397, 168-179; arXiv 1910.08720",
    },
    scales=SCALES,
    parts=[learned_pictures.parts, decay.parts, optimizers.parts],
    claims=[
        learned_pictures.change_claims,
        learned_pictures.alignment_claims,
        learned_pictures.output_claims,
        learning_speed.claims,
        constant_kernel.claims,
        decay.claims,
        learned_pictures.bandwidth_claims,
        optimizers.claims,
    ],
    sections=[kopitkov_figures.sections],
    certificate=kopitkov_figures.certificate,
    about=about,
    departures=departures,
    more=kopitkov_figures.curves_and_runs,
    terms=("tangent_kernel", "energy", "sharpness", "alignment", "first_order"),
    seeds=(0, 1, 2, 3, 4),
)
