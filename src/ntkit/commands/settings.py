"""What `ntkit analyze` can be told: one dataclass for the command line, ``run.json`` and Python. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkit.base.checks import Refused, nearest, refusal


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to analyse, and how."""

    data: str = "digits"
    """digits (embedded), mnist, cifar10, an .npz file, a folder of class-named image folders, or file.py:factory."""
    data_dir: str | None = None
    """Folder with the official files of mnist or cifar10. Nothing is downloaded."""
    classes: tuple[str, ...] | None = None
    """Classes to keep, e.g. --classes 3 8. With two classes the network gets one output."""
    train: int | None = None
    """Training examples to keep (all by default)."""
    test: int | None = None
    """Test examples to keep (all by default)."""
    model: str = "cnn"
    """linear, mlp, cnn, vgg, package.module:factory or file.py:factory."""
    weights: str | None = None
    """A .safetensors file: analyse these weights instead of training (then no training option may be given)."""
    epochs: int = 10
    """Passes over the training set."""
    batch_size: int | None = 32
    """Examples per step; a number at least the size of the set means full batch."""
    optimizer: str = "sgd"
    """sgd or adam."""
    lr: float = 0.01
    """Learning rate."""
    momentum: float = 0.9
    """Momentum of sgd (adam has its own and does not look at this)."""
    weight_decay: float = 0.0
    """L2 penalty (sgd) or its Adam form."""
    target: float | None = None
    """Stop when the training loss is at most this."""
    seed: int = 0
    """Seed of initial weights, batches and sub-samples."""
    track_points: int = 500
    """Training points on which the kernel is followed along training."""
    probe_samples: int = 200
    """Test images on which invariances are measured."""
    memory: str = "3 GB"
    """Scratch memory of the kernel computation."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        """Take numbers and paths where words are meant: classes=(3, 8), data=Path(...)."""
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))
        for name in ("data", "data_dir", "model", "weights"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(value))

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Settings:
        """Settings from ``run.json`` (JSON has lists where settings have tuples)."""
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()}
        return cls(**fields)

    def check(self) -> None:
        """Refuse values that no run can have.

        Raises
        ------
        Refused
            Names the option as the command line spells it.
        """
        for name in ("train", "test", "epochs", "batch_size", "track_points", "probe_samples"):
            value, low = getattr(self, name), 2 if name == "probe_samples" else 1
            if value is not None and (not isinstance(value, int) or value < low):
                raise _bad(name, value, f"an integer of at least {low}", "Give a larger number.")
        for name, low in (("lr", 0.0), ("momentum", 0.0), ("weight_decay", 0.0), ("target", 0.0)):
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise _bad(name, value, "a finite number of at least 0", "Give such a number.")
        for field in dataclasses.fields(self):
            training = field.name in ("epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "target")
            if self.weights is not None and training and getattr(self, field.name) != field.default:
                raise _bad(
                    field.name, getattr(self, field.name), "no training settings beside --weights", "Leave it out."
                )
        for name, known in (("optimizer", tuple(OPTIMIZERS)), ("device", ("auto", "cpu", "cuda"))):
            value = getattr(self, name)
            if value not in known:
                raise _bad(name, value, "a known name", nearest(str(value), known))

    def slug(self) -> str:
        """Short folder name."""
        model = Path(self.model.rpartition(":")[0] or self.model).stem
        return "-".join([model, Path(self.data).stem, *(self.classes or ())])

    def arguments(self) -> list[str]:
        """Command-line words that give these settings: those that differ from the defaults, data and model always."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default and field.name not in ("data", "model"):
                continue
            values = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
            words += ["--" + field.name.replace("_", "-"), *values]
        return words

    def describe_optimizer(self) -> str:
        """For people, e.g. "SGD, lr 0.05, momentum 0.9"."""
        parts = [self.optimizer.upper() if self.optimizer == "sgd" else self.optimizer.capitalize(), f"lr {self.lr:g}"]
        if self.optimizer == "sgd" and self.momentum:
            parts.append(f"momentum {self.momentum:g}")
        if self.weight_decay:
            parts.append(f"weight decay {self.weight_decay:g}")
        return ", ".join(parts)


def _bad(name: str, value: Any, expected: str, fix: str) -> Refused:
    return refusal("--" + name.replace("_", "-"), got=repr(value), expected=expected, fix=fix)


def _sgd(s: Settings) -> Callable[[Any], Any]:
    import torch

    return lambda params: torch.optim.SGD(params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)


def _adam(s: Settings) -> Callable[[Any], Any]:
    import torch

    return lambda params: torch.optim.Adam(params, lr=s.lr, weight_decay=s.weight_decay)


OPTIMIZERS: dict[str, Callable[[Settings], Callable[[Any], Any]]] = {"sgd": _sgd, "adam": _adam}
