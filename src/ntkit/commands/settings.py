"""The settings of commands: a dataclass each, for the command line and Python. It imports no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from ntkit.base.checks import Refused, check_name, nearest, refusal

_LARGEST = 3e38  # of float32
FULL_BATCH = 10**9  # examples; as --batch-size more than any training set, which means all of it
_DEVICES = ("auto", "cpu", "cuda")
SECTIONS = {
    "training": ("along", "against-loss"),
    "limit": ("limit",),
    "invariances": ("invariances",),
    "neighbors": ("neighbors",),
    "explained": ("explained",),
}
"""Sections of the report of `ntkit analyze` that can be left out, and their stages."""
_FORMER_NAMES = {"probe_samples": "probe_points"}  # before 1.0.0
TASKS = ("classification", "regression")  # as in `ntkit.data`, which imports torch


@dataclass(frozen=True, kw_only=True)
class PartOfData:
    """Which part of the data, and how it is read, for every command."""

    data_dir: str | None = None
    """Folder with the official files of mnist, cifar10 or a text set. Nothing is downloaded."""
    classes: tuple[str, ...] | None = None
    """Classes to keep, e.g. --classes 3 8. With two classes the network gets one output."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes for reports, in the order of their labels."""
    task: str | None = None
    """classification or regression, where the targets do not say it: floats are a regression, all else classes."""
    target: tuple[str, ...] | None = None
    """Of a table: the column to predict, or several columns of numbers."""
    resize: int | None = None
    """Of a folder of images: pixels of each side after resizing the shorter side and cutting out the center."""
    train: int | None = None
    """Training examples to keep (all by default): the same ones whatever --seed is."""
    test: int | None = None
    """Test examples to keep (all by default): the same ones whatever --seed is."""

    def __post_init__(self) -> None:
        """Accept numbers, paths and single names in place of text: classes=(3, 8), data=Path(...), target="price".

        Integers of numpy become Python's.
        """
        for name, value in vars(self).items():
            if isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, name, int(value))
        for name in ("classes", "class_names", "target", "without"):
            if (value := getattr(self, name, None)) is not None:
                values = (value,) if isinstance(value, str) else value
                object.__setattr__(self, name, tuple(str(item) for item in values))
        for name in ("data", "data_dir", "model", "weights"):
            if (value := getattr(self, name, None)) is not None:
                object.__setattr__(self, name, str(value))

    def check_data(self) -> None:
        """Refuse invalid values of these settings, by the option's name."""
        for name in ("data", "data_dir"):
            value = getattr(self, name, None)
            check_name("--" + name.replace("_", "-"), value or "", "Rename it: reports name it.")
        _check_at_least(self, 1, "train", "test", "resize")
        if self.task is not None and self.task not in TASKS:
            raise _bad("task", self.task, " or ".join(TASKS), nearest(str(self.task), TASKS))

    def load_named(self, data: str) -> Any:
        """The `Data` of these settings, of the data set of this name.

        Its samples are drawn by a seed of their own, so that runs that differ in `seed` learn the same examples.
        """
        from ntkit.data import load

        return load(
            data, data_dir=self.data_dir, classes=self.classes, train=self.train, test=self.test,
            class_names=self.class_names, task=cast(Any, self.task), target=self.target, resize=self.resize,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSettings(PartOfData):
    """Which data, for every command that names it by an option."""

    data: str | None = "digits"
    """digits (embedded), mnist, cifar10, trec, sst2, rt-polarity, subj, an .npz file, a table (.csv, .tsv, .jsonl,
    .parquet; then give --target), a folder of class-named image folders, or file.py:factory."""

    def load_data(self) -> Any:
        """The `Data` of these settings."""
        return self.load_named(self.data or "digits")


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """What to analyze, and how."""

    data: str = "digits"
    model: str = "cnn"
    """linear, mlp, cnn, vgg, textcnn (text sets), package.module:factory or file.py:factory."""
    weights: str | None = None
    """A file of weights (.safetensors, .pt, .pth, .ckpt) or a folder of Hugging Face: analyze these weights instead of
    training. Excludes all options of training."""
    epochs: int = 10
    """Passes over the training set."""
    batch_size: int | None = 32
    """Examples per step; the size of the training set, or more, means full batch."""
    optimizer: str = "sgd"
    """sgd or adam."""
    lr: float = 0.01
    """Learning rate."""
    momentum: float = 0.9
    """Momentum of sgd; adam ignores it."""
    weight_decay: float = 0.0
    """L2 penalty that the optimizer adds to the gradients."""
    target_loss: float | None = None
    """Stop training when the training loss is at most this."""
    seed: int = 0
    """Seed of the initial weights and of the batches."""
    track_points: int = 500
    """Training examples on which the kernel is followed along training."""
    probe_points: int = 200
    """Test images on which invariances are measured."""
    memory: str = "3 GB"
    """Memory that a kernel computation may use at a time, such as "3 GB"."""
    device: str = "auto"
    """auto, cpu or cuda."""
    without: tuple[str, ...] = ()
    """Sections of the report to leave out: training, limit, invariances, neighbors, explained."""

    def check(self) -> None:
        """Refuse invalid values.

        Raises
        ------
        Refused
            Names the option as the command line spells it.
        """
        self.check_data()
        for section in self.without:
            if section not in SECTIONS:
                raise _bad("without", section, f"sections among {', '.join(SECTIONS)}", nearest(section, SECTIONS))
        for name in ("model", "weights"):
            check_name("--" + name, getattr(self, name) or "", "Rename it: reports name it.")
        _check_at_least(self, 1, "epochs", "batch_size", "track_points")
        _check_at_least(self, 2, "probe_points")
        _check_sizes(self, "lr", "momentum", "weight_decay", "target_loss")
        for name in ("epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "target_loss"):
            value = getattr(self, name)
            if self.weights is not None and value != getattr(Settings, name):
                raise _bad(name, value, "no training settings with --weights", "Leave it out.")
        check_seed(self.seed)
        _check_choices(self, optimizer=("sgd", "adam"), device=_DEVICES)

    def slug(self) -> str:
        """Short folder name, at most 60 characters: a name may have 255 bytes."""
        model = Path(self.model.rpartition(":")[0] or self.model).stem
        return re.sub(r"[/\\]", "_", "-".join([model, Path(self.data).stem, *(self.classes or ())]))[:60]

    def named_code(self, *, changed: bool = False) -> dict[str, str]:
        """Option and name of what may be the user's own code; with `changed` only what differs from the defaults."""
        names = {"--model": self.model, "--data": self.data}
        return {o: n for o, n in names.items() if not changed or n != getattr(Settings, o[2:])}

    def arguments(self) -> list[str]:
        """Command-line arguments for these settings: data and model, and all that differ from the defaults."""
        arguments: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default or field.name in ("data", "model"):
                value = FULL_BATCH if value is None else value  # None is the default of all others that may be None
                values = value if isinstance(value, tuple) else (value,)
                arguments += ["--" + field.name.replace("_", "-"), *map(str, values)]
        return arguments

    def make_optimizer(self, params: Any) -> Any:
        """Optimizer of these parameters."""
        import torch

        if self.optimizer == "adam":
            return torch.optim.Adam(params, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def describe_optimizer(self) -> str:
        """Text such as "SGD, lr 0.05, momentum 0.9"."""
        parts = [self.optimizer.upper() if self.optimizer == "sgd" else self.optimizer.capitalize(), f"lr {self.lr:g}"]
        if self.optimizer == "sgd" and self.momentum:
            parts.append(f"momentum {self.momentum:g}")
        if self.weight_decay:
            parts.append(f"weight decay {self.weight_decay:g}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class TrackSettings(DataSettings):
    """What to follow along a run, and how."""

    model: str | None = None
    """As in ntkit analyze."""
    data: str | None = None
    points: int = 500
    """Training examples to follow, spread evenly."""
    k: int = 20
    """Number of eigenpairs."""
    outputs: str = "trace"
    """trace (n x n), full (nC x nC) or diagonal (each output's own)."""
    memory: str | None = None
    """Memory for kernel matrices, such as "3 GB" (half of the free memory by default). A larger kernel is not formed,
    only multiplied with vectors."""
    device: str = "auto"
    """auto, cpu or cuda."""
    out: Path | None = None
    """Folder for the numbers (RUN/track by default). A tracking that was stopped is resumed there."""
    follow: bool = False
    """Wait for further snapshots until the run ends."""
    tensorboard: Path | None = None
    """Folder for TensorBoard events."""

    def check(self) -> None:
        """Refuse invalid values, as `Settings.check`."""
        _check_at_least(self, 1, "points", "k")
        _check_choices(self, outputs=("trace", "full", "diagonal"), device=_DEVICES)
        self.check_data()


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """Which predictions of a run to explain, and where."""

    test: tuple[int, ...] | None = None
    """Which test examples, numbered from 0 (by default a confident right, a confident wrong and an uncertain one)."""
    memory: str | None = None
    """Memory that a computation may use at a time, such as "3 GB" (by default as the run)."""
    model: str | None = None
    """The run's --model again, if it is code that you have not run here."""
    data: str | None = None
    """The run's --data again, if it is code that you have not run here."""
    out: Path | None = None
    """Folder for the results (RUN/explain by default). An explanation that was stopped goes on there."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """How `ntkit compare` compares runs, and where."""

    points: int = 200
    """Test examples on which the kernels of all runs are compared, spread evenly."""
    memory: str | None = None
    """Memory that a kernel computation may use at a time, such as "3 GB" (by default as each run)."""
    model: tuple[str, ...] | None = None
    """The --model of runs again, if it is code that you have not run here."""
    data: str | None = None
    """The --data of the runs again, if it is code that you have not run here."""
    out: Path = Path("runs/comparison")
    """Folder for the results. A comparison that was stopped goes on there."""

    def check(self) -> None:
        """Refuse invalid values, as `Settings.check`."""
        _check_at_least(self, 2, "points")


@dataclass(frozen=True, kw_only=True)
class InfiniteSettings(DataSettings):
    """Which network and data `ntkit infinite` compares in the limit, and how."""

    model: str = "mlp"
    """linear, mlp, package.module:factory or file.py:factory. Max pooling and most attention need --sample."""
    data: str = "digits"
    folds: int = 5
    """Number of folds of the cross-validation, stratified by class."""
    epochs: int = 20
    """Passes over the training set, when the network is trained."""
    w_std: float | None = None
    """With --b-std: the NTK parametrization w_std / sqrt(fan_in) W, instead of the module's own initialization."""
    b_std: float | None = None
    """Standard deviation of the biases in the NTK parametrization."""
    sample: int | None = None
    """Number of random wide networks whose mean is taken where the limit has no closed form, such as 16."""
    seed: int = 0
    """Seed of the weights and of the folds."""
    device: str = "auto"
    """Where the kernels are computed and the network is trained: auto, cpu or cuda."""
    out: Path | None = None
    """Folder for run.json and results.json; without it no file is written."""

    def check(self) -> None:
        """Refuse invalid values, as `Settings.check`."""
        _check_at_least(self, 2, "folds")
        _check_at_least(self, 1, "epochs")
        _check_choices(self, device=_DEVICES)
        check_seed(self.seed)
        self.check_data()
        if self.w_std == 0:
            raise refusal("--w-std", got=0, expected="more than 0", fix="With weights of 0 all samples are the same.")


@dataclass(frozen=True, kw_only=True)
class GramSettings(PartOfData):
    """Which kernel `ntkit gram` computes, and who computes it."""

    weights: str | None = None
    """A file of the network's weights, as in ntkit analyze; without it, the initial ones of --seed."""
    outputs: str = "trace"
    """trace (n x n, the sum over outputs), sum (n x n, of the outputs' sum / sqrt(C)) or full (n x n x C x C)."""
    dtype: str = "float32"
    """float32 or float64: of the network, the data and the matrix."""
    seed: int = 0
    """Seed of the initial weights."""
    tile: int | None = None
    """Samples along a side of a tile (by default tiles have at most 16 MiB)."""
    workers: int = 1
    """Processes of this machine, of one thread each; 1: this process, with its own threads."""
    scheduler: str | None = None
    """Address of a running Dask scheduler, whose workers compute: tcp://10.0.0.1:8786."""
    memory: str | None = None
    """Memory for what tiles have in common, such as "3 GB" (a quarter of the free memory by default); with
    --scheduler: of each worker."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def check(self) -> None:
        """Refuse invalid values, as `Settings.check`."""
        _check_choices(self, outputs=("trace", "sum", "full"), dtype=("float32", "float64"), device=_DEVICES)
        _check_at_least(self, 1, "tile", "workers")
        self.check_data()
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class SolveSettings:
    """What `ntkit solve` computes from a kernel matrix on disk."""

    spectrum: int | None = None
    """Number of leading eigenvalues."""
    ridge: float | None = None
    """Kernel ridge regression of the classes, with this many times the mean of the matrix's diagonal as ridge."""
    svm: bool = False
    """The hard-margin support vector machine, one class against the rest."""
    labels: Path | None = None
    """A .npy file of a label for each sample; by default those of the data set that ntkit gram took."""
    model: str | None = None
    """The MODEL of ntkit gram again, if it is code that you have not run here."""
    data: str | None = None
    """The DATA of ntkit gram again, if it is code that you have not run here."""
    memory: str | None = None
    """Memory that the kernel of the test examples may use at a time, such as "3 GB" (half of the free memory by
    default)."""
    device: str = "auto"
    """Where the kernel of the test examples is computed: auto, cpu or cuda."""

    def check(self) -> None:
        """Refuse invalid values, as `Settings.check`."""
        if self.spectrum is None and self.ridge is None and not self.svm:
            fix = "Give at least one of them."
            raise refusal("solve", got="nothing to do", expected="--spectrum K, --ridge R or --svm", fix=fix)
        _check_choices(self, device=_DEVICES)
        _check_at_least(self, 1, "spectrum")
        _check_sizes(self, "ridge")


def in_present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a ``run.json`` under their names of today.

    >>> in_present_names({"probe_samples": 4, "lr": 0.1})
    {'probe_points': 4, 'lr': 0.1}
    """
    return {_FORMER_NAMES.get(name, name): value for name, value in settings.items()}


def _check_choices(settings: Any, **choices: tuple[str, ...]) -> None:
    for name, names in choices.items():
        value = getattr(settings, name)
        if value not in names:
            raise _bad(name, value, f"one of {', '.join(names)}", nearest(str(value), names))


def check_seed(seed: int) -> None:
    """Refuse a seed that no random generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise _bad("seed", seed, "an integer from 0 to 2^63 - 1", "Give such a number.")


def _given(settings: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Settings of these names, without those that are None where None is allowed."""
    optional = {f.name for f in dataclasses.fields(settings) if str(f.type).endswith("| None")}
    for name in names:
        if (value := getattr(settings, name)) is not None or name not in optional:
            yield name, value


def _check_at_least(settings: Any, least: int, *names: str) -> None:
    for name, value in _given(settings, names):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _bad(name, value, f"an integer of at least {least}", "Give a larger number.")


def _check_sizes(settings: Any, *names: str) -> None:
    for name, value in _given(settings, names):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= _LARGEST:
            raise _bad(name, value, f"a number from 0 to {_LARGEST:g}", "Give such a number.")


def _bad(name: str, value: Any, expected: str, fix: str) -> Refused:
    return refusal("--" + name.replace("_", "-"), got=repr(value), expected=expected, fix=fix)
