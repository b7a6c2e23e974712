"""What the experiments share: pairs of classes, networks, training, and the steps at which a loss is first reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.data import Data, load
from ntkit.jacobian.forwards import raw_outputs
from ntkit.networks.built_in import build
from ntkit.studies.long2021 import long_networks
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import device
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import Trajectory, train
from ntkit.trajectory.batch_order import steps_per_epoch

BATCH = 32
START = "start"  # the moment before training; the others are training losses
PAIRS: dict[str, tuple[str, tuple[str | int, str | int]]] = {
    "digits 3/8": ("digits", (3, 8)),
    "MNIST 3/8": ("mnist", (3, 8)),
    "CIFAR-10 cat/dog": ("cifar10", ("cat", "dog")),
    "CIFAR-10 airplane/automobile": ("cifar10", ("airplane", "automobile")),
}
SECOND = "CIFAR-10 airplane/automobile"
TEN = {"digits ten classes": "digits", "MNIST ten classes": "mnist", "CIFAR-10 ten classes": "cifar10"}
ADDED = ("residual", "transformer")  # networks that are not in the paper
QUICK_VGG = 1_000  # training images of the VGG-like network at the scale quick, whose kernels take longest
EARLY = 8  # epochs whose quarters are recorded, later ones whole


class Setting(NamedTuple):
    """A training run without its seed."""

    pair: str
    network: str
    lr: float = 0.01
    augmented: bool = False

    def __str__(self) -> str:
        return f"{self.pair}, {self.network}, learning rate {self.lr:g}" + ", augmented" * self.augmented

    @property
    def added(self) -> bool:
        """Whether the paper has no such setting: it is learned from a sample of the images."""
        return self.pair in TEN or self.network in ADDED

    def file(self, seed: int) -> str:
        """Name of its files and of its run's folder."""
        pair = self.pair.lower().replace(" ", "-").replace("/", "-")
        return f"{pair}-{self.network}-{self.lr:g}{'-augmented' * self.augmented}-seed-{seed}"


class Extent(NamedTuple):
    """Sizes of what is not in the paper."""

    train: int  # images that ten classes and other networks are learned from
    test: int
    epochs: int
    seeds: int  # of the runs whose kernels are taken apart
    added: int  # seeds of ten classes and of other networks
    kernel_train: int  # images of the kernels of each layer and along training
    kernel_test: int
    ratio: float  # of the steps at which kernels are computed along training
    probed: int  # test images of ten classes that are transformed


QUICK = Extent(train=200, test=100, epochs=100, seeds=2, added=1, kernel_train=200, kernel_test=100, ratio=2, probed=10)
PAPER = Extent(
    train=1_500, test=1_000, epochs=100, seeds=3, added=3, kernel_train=1_500, kernel_test=1_000, ratio=1.5, probed=50
)


def extent(work: Work) -> Extent:
    """Sizes of what is not in the paper, at the scale of the study."""
    return PAPER if work.sizes.train is None else QUICK


def settings(work: Work) -> Iterator[tuple[Setting, int]]:
    """The runs, in the order of their value: the paper's main setting first; setting and seed."""
    pairs = [pair for pair, (data, _) in PAIRS.items() if data in work.sets and pair != SECOND]
    s, few = work.sizes, work.seeds[: work.sizes.few]
    for network in ("mlp", "vgg"):
        yield from product([Setting(pair, network) for pair in pairs], work.seeds[: s.seeds])
    for network in ("mlp", "vgg"):
        yield from product([Setting(pair, network, 0.1) for pair in pairs], few)
    for network in ("mlp", "vgg"):
        yield from product([Setting(pair, network, augmented=True) for pair in pairs], few)
    if "cifar10" in work.sets:
        yield from product([Setting(SECOND, network) for network in ("mlp", "vgg")], few)
    yield from product([Setting(pair, "sum") for pair in pairs], few)


def most_seeds(work: Work, setting: Setting) -> int:
    """Seeds of a setting when all are finished."""
    if setting.added:
        return extent(work).added
    few = setting.pair == SECOND or setting.lr > 0.01 or setting.augmented or setting.network == "sum"
    return work.sizes.few if few else work.sizes.seeds


def images(work: Work, pair: str) -> Data:
    """Images of two classes, pixels in [0, 1]; label 1 for the second class."""
    data, classes = PAIRS[pair]
    train_size, test_size = (None, None) if data == "digits" else (work.sizes.train, work.sizes.test)
    return load(data, work.folder_of(data), classes=classes, train=train_size, test=test_size)


def examples(work: Work, setting: Setting) -> Data:
    """What a setting learns: a pair of classes; or, where the paper has no such setting, a sample of a pair or of all.

    Pixels in [0, 1]. At the scale quick the VGG-like network has fewer images.
    """
    if not setting.added:
        whole = images(work, setting.pair)
        small = setting.network == "vgg" and work.sizes.train is not None
        return sample(whole, QUICK_VGG, len(whole.x_test)) if small else whole
    name, classes = (TEN[setting.pair], None) if setting.pair in TEN else PAIRS[setting.pair]
    return sample(load(name, work.folder_of(name), classes=classes), extent(work).train, extent(work).test)


def sample(data: Data, train: int, test: int) -> Data:
    """The first images of each class, as many of each where there are: at most `train` and `test` of them."""

    def rows(y: Tensor, most: int) -> Tensor:
        each = most // len(data.classes)
        return torch.cat([(y == c).nonzero()[:each, 0] for c in range(len(data.classes))]).sort().values

    train_rows, test_rows = rows(data.y_train, train), rows(data.y_test, test)
    return replace(
        data,
        x_train=data.x_train[train_rows], y_train=data.y_train[train_rows],
        x_test=data.x_test[test_rows], y_test=data.y_test[test_rows],
    )  # fmt: skip


class PixelSum(nn.Module):
    """The paper's control: the sum of all pixels, a hidden ReLU layer, one output. It sees no arrangement at all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        width = 33_333  # the smallest with at least 100,000 parameters
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden, self.last = nn.Linear(1, width), nn.Linear(width, 1)
            for layer in (self.hidden, self.last):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 1]."""
        return self.last(F.relu(self.hidden(x.flatten(1).sum(1, keepdim=True))))


class Augmented(nn.Module):
    """A network whose training images are rotated by up to 15 degrees and shifted by up to one pixel each way."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Outputs; of changed images in train mode."""
        return self.network(augmented(x) if self.training else x)


def augmented(x: Tensor) -> Tensor:
    """Rotate each image by an angle in [-15, 15] degrees (bilinear) and shift it by -1, 0 or 1 pixel each way."""
    n, size = len(x), torch.tensor([x.shape[-1], x.shape[-2]], device=x.device)
    angle = (2 * torch.rand(n, device=x.device) - 1) * (torch.pi / 12)
    shift = 2.0 * torch.randint(-1, 2, (n, 2), device=x.device) / size  # the image's sides have length 2
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], 2).to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def network(setting: Setting, shape: tuple[int, ...], seed: int) -> nn.Module:
    """The network of a setting before training: Glorot-uniform weights, zero biases; one output for two classes."""
    outputs = 10 if setting.pair in TEN else 1
    name = f"{long_networks.__name__}:{setting.network}" if setting.network in ADDED else setting.network
    model = PixelSum(seed) if name == "sum" else build(name, shape, outputs, seed)
    return (Augmented(model) if setting.augmented else model).to(device()).eval()


def logistic(out: Tensor, y: Tensor) -> Tensor:
    """Mean logistic loss of outputs [n, 1] for labels 0 and 1."""
    return F.binary_cross_entropy_with_logits(out[:, 0], y.to(out))


def training_loss(setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """Logistic loss of two classes, cross-entropy of ten."""
    return cross_entropy if setting.pair in TEN else logistic


def most_epochs(work: Work, setting: Setting) -> int:
    """Epochs after which a run ends, whatever its loss."""
    if setting.added:
        return extent(work).epochs
    return work.sizes.vgg_epochs if setting.network == "vgg" else work.sizes.epochs


def trained(work: Work, setting: Setting, seed: int, data: Data, model: nn.Module) -> Trajectory:
    """Train by plain SGD in batches of 32 to the lowest of the losses or the last epoch; resumed where it stopped."""
    epochs, epoch = most_epochs(work, setting), steps_per_epoch(len(data.x_train), BATCH)
    quarters = {round(i * epoch / 4) for i in range(4 * min(EARLY, epochs))}
    return train(
        model, (data.x_train.to(device()), data.y_train.to(device())), training_loss(setting),
        partial(torch.optim.SGD, lr=setting.lr), steps=epochs * epoch, batch_size=BATCH, seed=seed,
        record=sorted(quarters | set(range(0, epochs * epoch + 1, epoch))), target_loss=min(work.sizes.losses),
        path=work.trajectory(setting.file(seed)), resume=True,
    )  # fmt: skip


def training_part(setting: Setting, seed: int) -> StudyPart:
    """The run itself: the steps at which each loss is first reached."""
    name = f"{setting.file(seed)}-training"
    return StudyPart("training", setting, name, training, (setting, seed))


def training(work: Work, setting: Setting, seed: int) -> Result:
    """Train, and find the first recorded step at which the loss over all training examples is at most each target."""
    data = examples(work, setting)
    model, of_outputs = network(setting, data.input_shape, seed), training_loss(setting)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)  # VGG: 0.7 of the time a step on CIFAR-10
    run = trained(work, setting, seed, data, model)
    steps, epoch = dict.fromkeys(map(str, work.sizes.losses)), steps_per_epoch(len(data.x_train), BATCH)
    curve, wanted = [], sorted(work.sizes.losses, reverse=True)
    # at every step: the losses of batches, which lag behind and may be of augmented images, would pass some over
    for step in run.steps:
        if not wanted:
            break
        run.load(model, step)
        loss = float(of_outputs(raw_outputs(model, data.x_train.to(device())).cpu(), data.y_train))
        curve.append([step, loss])
        while wanted and loss <= wanted[0]:
            steps[str(wanted.pop(0))] = step
    numbers: dict[str, Any] = {"steps": steps, "curve": curve, "steps_per_epoch": epoch, "last": run.steps[-1]}
    numbers |= {"status": run.status, "not_reached": wanted, "lowest": min(loss for _, loss in curve)}
    return Result(numbers, {})


def at_loss(
    work: Work, setting: Setting, seed: int, moment: str, data: Data
) -> tuple[nn.Module, dict[str, Any]] | Result:
    """The network of a moment, `START` or a target of the training loss, and what is known of it.

    A loss that was not reached: a result that says so.
    """
    model, step = network(setting, data.input_shape, seed), 0
    if moment != START:
        told = work.result(training_part(setting, seed)).numbers
        step = told["steps"][moment]
        if step is None:
            told = {"lowest": told["lowest"], "run": told["status"]}
            return Result({"seed": seed, "status": "not reached", **told}, {})
        trained(work, setting, seed, data, model).load(model, step)
    epochs = step / steps_per_epoch(len(data.x_train), BATCH)
    inner = model.network if isinstance(model, Augmented) else model
    return inner, {"seed": seed, "status": "measured", "step": step, "epochs": epochs}
