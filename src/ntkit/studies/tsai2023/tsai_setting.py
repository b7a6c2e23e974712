"""What the experiments share: tasks of two classes, networks with one output, the recorded run, test points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.data import Data, load
from ntkit.explanations.retrainings import Retrainings, subsets
from ntkit.networks.text_network import TextNetwork
from ntkit.studies.part import Work
from ntkit.trajectory import Trajectory, train
from ntkit.trajectory.batch_order import steps_per_epoch


class TwoClasses(NamedTuple):
    """Two classes of a data set, and how they are learned."""

    data: str
    classes: tuple[str | int, str | int]
    text: bool
    lr: float


TASKS = {
    "digits 3/8": TwoClasses("digits", (3, 8), text=False, lr=0.02),
    "MNIST 3/8": TwoClasses("mnist", (3, 8), text=False, lr=0.02),
    "CIFAR-10 airplane/automobile": TwoClasses("cifar10", ("airplane", "automobile"), text=False, lr=0.01),
    "TREC description/entity": TwoClasses("trec", ("description", "entity"), text=True, lr=0.01),
    "rt-polarity": TwoClasses("rt-polarity", ("negative", "positive"), text=True, lr=0.01),
}
MOMENTUM, BATCH = 0.9, 25
CHECKPOINTS = 10  # of TracIn


def tasks(work: Work) -> Iterator[tuple[str, int]]:
    """Tasks whose data are at hand, and seeds."""
    for name, task in TASKS.items():
        if task.data in work.sets:
            for seed in work.seeds[: work.sizes.seeds]:
                yield name, seed


def file_of(task: str, seed: int) -> str:
    """Name of a task's files and of its run's folder."""
    return f"{task.lower().replace(' ', '-').replace('/', '-')}-seed-{seed}"


def logistic(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean logistic loss of one output, classes 0 and 1."""
    return F.binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype))


def signed(outputs: Tensor, sign: Tensor) -> Tensor:
    """The output in favor of the predicted class: what is explained."""
    return outputs[:, 0] * sign.to(outputs.dtype)


class Trained(NamedTuple):
    """A task's network after training, and what its predictions are explained by."""

    name: str
    seed: int
    data: Data
    network: nn.Module
    run: Trajectory
    sign: Tensor  # [m]: 1 or -1, the predicted class of each test point

    @property
    def x(self) -> Tensor:
        """Training examples."""
        return self.data.x_train

    @property
    def x_test(self) -> Tensor:
        """Test points."""
        return self.data.x_test

    @property
    def y(self) -> Tensor:
        """Classes of the training examples, 0 or 1."""
        return self.data.y_train


def images_or_tokens(work: Work, task: TwoClasses, seed: int) -> Data:
    """Training and test examples of a seed; images are averaged down to the study's pixels and standardized."""
    s = work.sizes
    n = s.text_train if task.text else s.train
    data = load(task.data, data_dir=work.folder_of(task.data), classes=task.classes, train=n, test=s.test, seed=seed)
    if task.text:
        return _own_words(data) if s.own_words else data
    x, x_test = data.x_train, data.x_test
    if x.shape[-1] > s.pixels:
        x, x_test = (F.adaptive_avg_pool2d(part, s.pixels) for part in (x, x_test))
    mean, deviation = x.mean(), x.std()
    return replace(data, x_train=(x - mean) / deviation, x_test=(x_test - mean) / deviation)


def _own_words(data: Data) -> Data:
    """The sentences with a vocabulary of the sample's own training words: the others would never be trained."""
    words = data.vocabulary or ()
    kept = torch.cat([torch.tensor([0, 1]), data.x_train.unique()]).unique()  # padding, the unknown word, and those
    number = torch.ones(len(words), dtype=torch.int64)
    number[kept] = torch.arange(len(kept))
    x, x_test = number[data.x_train], number[data.x_test]
    longest = int((x > 0).sum(1).max())
    return replace(data, x_train=x[:, :longest], x_test=x_test[:, :longest], vocabulary=tuple(words[i] for i in kept))


def network(work: Work, task: TwoClasses, data: Data, seed: int) -> nn.Module:
    """Two convolutions for images, three for sentences; one output."""
    s = work.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if task.text:
            return TextNetwork(data.tokens or 0, 1, s.features, s.channels)
        channels, side = data.x_train.shape[1], data.x_train.shape[2] // 2
        return nn.Sequential(
            nn.Conv2d(channels, s.width, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(s.width, 2 * s.width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * s.width * side**2, 1),
        )


def trained(work: Work, name: str, seed: int, flipped: float = 0.0) -> Trained:
    """The recorded run of a task and a seed, trained if it is not there; with a share of the labels flipped."""
    task = TASKS[name]
    data = images_or_tokens(work, task, seed)
    if flipped:
        wrong = subsets(len(data.y_train), flipped, 1, seed)[0]
        data = replace(data, y_train=torch.where(wrong, 1 - data.y_train, data.y_train))
    model, steps = network(work, task, data, seed), work.sizes.epochs * steps_per_epoch(len(data.y_train), BATCH)
    sgd = partial(torch.optim.SGD, lr=task.lr, momentum=MOMENTUM)
    record = sorted({round(steps * k / CHECKPOINTS) for k in range(CHECKPOINTS + 1)})
    path = work.trajectory(file_of(name, seed) + "-flipped" * bool(flipped))
    run = train(
        model,
        (data.x_train, data.y_train),
        logistic,
        sgd,
        steps,
        batch_size=BATCH,
        record=record,
        seed=seed,
        path=path,
        resume=path.exists(),
    )
    with torch.no_grad():
        sign = torch.where(model.eval()(data.x_test)[:, 0] > 0, 1.0, -1.0)
    return Trained(name, seed, data, model, run, sign)


def retrainings(work: Work, at: Trained) -> Retrainings:
    """Networks trained again without some examples, kept in the run's folder."""
    task = TASKS[at.name]
    folder = work.folder / "runs" / file_of(at.name, at.seed) / "retrainings"
    return Retrainings(
        at.run, at.x_test, at.sign, measure=signed, path=folder, make=lambda seed: network(work, task, at.data, seed)
    )
