"""Images of ten classes under three optimizers, held to the same thresholds as the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.data import load
from ntkit.studies.claim import RISES, Claim, Condition, mean
from ntkit.studies.kopitkov2019.kopitkov_setting import energy, energy_at, initial_kernels, numbers_of, text
from ntkit.studies.kopitkov2019.learned_pictures import MOST, change_claim
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, device, mlp
from ntkit.tracking import track
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import train

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}
DEPTH = 4
TOP = 10  # eigenfunctions: one for each class
SHUFFLES = 20  # of the labels, which are not learned


def parts(work: Work) -> Iterator[StudyPart]:
    """Untrained networks, and each optimizer, for each data set."""
    for data in work.sets:
        yield StudyPart("untrained", data, f"untrained-{data}", _untrained, (data,))
        for seed in work.seeds[: work.sizes.seeds]:
            for optimizer in OPTIMIZERS:
                yield StudyPart(data, optimizer, f"{data}-{optimizer}-seed-{seed}", _learned, (data, optimizer, seed))


def _images(work: Work, data: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Training images [n, pixels], labels, rows that the kernel is tracked on, number of classes."""
    images = load(data, work.folder_of(data))
    rows = torch.linspace(0, len(images.x_train) - 1, min(work.sizes.points, len(images.x_train))).long()
    return images.x_train.flatten(1).to(device()), images.y_train.to(device()), rows, len(images.classes)


def _untrained(work: Work, data: str) -> Result:
    """Kernels of untrained networks, compared between seeds."""
    x, _, rows, classes = _images(work, data)
    models = (mlp(x.shape[1], classes, DEPTH, work.sizes.width, seed).to(device()) for seed in work.seeds)
    return Result(initial_kernels(models, x[rows]), {})


def _learned(work: Work, data: str, optimizer: str, seed: int) -> Result:
    """Learn the classes, track the trace kernel; energies of labels that were shuffled and so not learned."""
    s = work.sizes
    x, y, rows, classes = _images(work, data)
    place = work.trajectory(f"{data}-{optimizer}-seed-{seed}")
    model = mlp(x.shape[1], classes, DEPTH, s.width, seed).to(device())
    run = train(
        model, (x, y), cross_entropy, OPTIMIZERS[optimizer], path=place, resume=True, steps=s.digit_steps,
        batch_size=32, seed=seed,
    )  # fmt: skip
    tracked = track(run, x[rows], y[rows], model=model, k=s.k, path=place.parent / "track")
    first, last = (tracked.eigenvectors(step) for step in (tracked.steps[0], tracked.steps[-1]))
    targets, draw = F.one_hot(y[rows], classes), torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(rows), generator=draw) for _ in range(SHUFFLES)]
    shuffled = [
        float(np.mean([energy_at(vectors, targets[order], TOP) for order in orders])) for vectors in (first, last)
    ]
    numbers, arrays = numbers_of(tracked)
    return Result(numbers | {"shuffled": shuffled}, arrays)


def claims(results: Results) -> Iterator[Claim]:
    """Change, alignment and outputs for each data set and optimizer."""
    for data in results.work.sets:
        chance = results["untrained"].get(data, [])
        for optimizer, runs in results[data].items() if chance else ():
            target = [energy(r, "target", TOP) for r in runs]
            gain = np.array([e[-1] - e[0] for e in target])
            shuffled = np.array([r.numbers["shuffled"][1] - r.numbers["shuffled"][0] for r in runs])
            title = f"The kernel changes dramatically with {optimizer}, on {data}"
            yield change_claim(title, runs, chance[0], "trace kernel")
            yield Claim(
                f"The top eigenfunctions turn to the labels with {optimizer}, on {data}",
                f"E(target, {TOP}): {text([e[0] for e in target])} → {text([e[-1] for e in target])}; gain {text(gain)}"
                f", of shuffled labels {text(shuffled)}",
                [
                    Condition("the gain is", [mean(gain)], RISES),
                    Condition("less that of shuffled labels it is", [mean(gain - shuffled)], RISES),
                ],
                "trace kernel, one-hot targets",
            )
            output = [energy(r, "output", TOP) for r in runs]
            least = mean([np.nanmin(e) for e in output])
            yield Claim(
                f"The top eigenfunctions span the outputs with {optimizer}, on {data}",
                f"E(output, {TOP}): at least {least:.2f}, at the end {text([e[-1] for e in output])}",
                [Condition("its least value is", [least], MOST)],
                "least over all snapshots; one eigenfunction for each class",
            )
