"""The representation of networks of many kinds, and of a model that is no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report.words import plain
from ntkit.studies.bell2023 import plane
from ntkit.studies.bell2023.bell_setting import ROUNDING, images, relative, rounding, sgd
from ntkit.studies.claim import RISES, Claim, Condition, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, table
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import train

TRAIN, TEST, LR = 60, 10, 0.1
PIXELS, CLASSES = 8, 10


class ResidualBlock(nn.Module):
    """Two dense layers around which the input goes, behind a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Input plus block."""
        return x + self.block(x)


class Attention(nn.Module):
    """Rows of an image as words: embedding, one layer of self-attention, mean."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Linear(PIXELS, width)
        self.places = nn.Parameter(0.1 * torch.randn(PIXELS, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for images [n, 1, 8, 8]."""
        return self.readout(self.layer(self.embedding(x[:, 0]) + self.places).mean(1))


class Recurrent(nn.Module):
    """Rows of an image one after the other, a gated recurrent unit."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cell, self.readout = nn.GRU(PIXELS, width, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for images [n, 1, 8, 8]."""
        return self.readout(self.cell(x[:, 0])[0][:, -1])


class Prototypes(nn.Module):
    """No network: a Gaussian bump around each of some movable images, of its own width and weights."""

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(count, PIXELS**2))
        self.log_widths = nn.Parameter(torch.zeros(count))
        self.weights = nn.Parameter(torch.randn(count, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for images [n, 1, 8, 8]."""
        squares = (x.flatten(1)[:, None] - self.centers).square().mean(2)
        return torch.exp(-squares * self.log_widths.exp()) @ self.weights


KINDS: dict[str, Callable[[], nn.Module]] = {
    "softmax regression": lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS**2, CLASSES)),
    "convolutions, group norm, max-pool": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, CLASSES)
    ),
    "residual, layer norm, GELU": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(PIXELS**2, 24), ResidualBlock(24), ResidualBlock(24), nn.Linear(24, CLASSES)
    ),
    "transformer": Attention,
    "recurrent (GRU)": Recurrent,
    "Gaussian bumps (no network)": Prototypes,
}


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each kind and seed."""
    for place, name in enumerate(KINDS):
        for seed in work.seeds:
            yield StudyPart("architectures", name, f"architecture-{place}-seed-{seed}", _rebuilt, (name, seed))


def _rebuilt(work: Work, name: str, seed: int) -> Result:
    """Residual of the exact form, and of initial gradients, for one model."""
    data = images(work, "digits", TRAIN, TEST, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[name]().to(data.x)
    model.eval()
    steps = work.sizes.kind_steps
    run = train(model, (data.x, data.y), cross_entropy, sgd(LR), steps, record="all", seed=seed)
    numbers = {"terms": steps * TRAIN, "parameters": sum(p.numel() for p in model.parameters())}
    by_method = {
        method: {"relative": PathKernel(run, integration=method).decompose(data.x_test).error}
        for method in ("secant", "left")
    }
    losses = {"first_loss": float(run.losses[0]), "loss": float(run.losses[-1])}
    return Result(numbers | losses | {"errors": by_method}, {})


def claims(results: Results) -> Iterator[Claim]:
    """Residuals of every model of this study that full-batch gradient descent trained."""
    groups = {f"three clusters, {plane.LABELS[name]} MLP": runs for name, runs in results["plane"].items()}
    groups |= {f"{name}, CNN": runs for name, runs in results["images"].items()}
    groups |= results["architectures"]
    units = [v / rounding(r.numbers["terms"]) for runs in groups.values()
             for v, r in zip(relative(runs, "secant"), runs, strict=True)]  # fmt: skip
    falls = [mean([r.numbers["first_loss"] - r.numbers["loss"] for r in runs])
             for runs in results["architectures"].values()]  # fmt: skip
    yield Claim(
        "A model trained by gradient descent is a kernel machine, to machine precision, whatever its architecture",
        "largest relative residual: "
        + ", ".join(f"{name} {plain(max(relative(runs, 'secant')), 2)}" for name, runs in groups.items()),
        [Condition("in units of the rounding of the sum every residual is", units, ROUNDING),
         Condition("the fall of each model’s loss in training is", falls,
                   RISES)],
        f"float64, {len(next(iter(groups.values())))} seeds each; relative to the largest logit; rounding: √(steps x "
        "examples) x 2⁻⁵²",
    )  # fmt: skip


def item(results: Results) -> Item:
    """Residuals by kind."""
    rows = [
        [name, f"{runs[0].numbers['parameters']:,}", plain(max(relative(runs, "secant")), 2),
         f"{mean(relative(runs, 'left')):.2g}", f"{mean([r.numbers['loss'] for r in runs]):.2f}"]
        for name, runs in results["architectures"].items()
    ]  # fmt: skip
    return table(
        "Other models, on digits: error of the rebuilt logits, relative to the largest",
        ["Model", "Parameters", "Exact, at most", "Start of each step", "Loss at the end"],
        rows,
        f"{TRAIN} images, {results.work.sizes.kind_steps} steps at learning rate {LR}; {TEST} test images.",
    )
