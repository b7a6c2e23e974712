"""A larger network on minibatches: the residual in double and in single precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ntkit.kernels.path.path_kernel import PathKernel
from ntkit.report.words import plain
from ntkit.studies.bell2023.bell_setting import ROUNDING, images, rounding, sgd
from ntkit.studies.bell2023.pictures import accuracy
from ntkit.studies.claim import Bound, Claim, Condition, mean
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, device, table
from ntkit.tracking.losses import cross_entropy
from ntkit.trajectory import train

BATCH, LR, DENSE = 50, 0.1, 100
LEAST = 100_000  # parameters of a realistic network
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


def network(pixels: int, classes: int, seed: int) -> nn.Sequential:
    """Two convolutions (32 and 64 channels) with average pools where the image is large, two dense layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()]
        second: list[nn.Module] = [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        large = pixels > 8
        side = pixels // (4 if large else 2)
        return nn.Sequential(
            *first, *([nn.AvgPool2d(2)] if large else []), *second, nn.Flatten(),
            nn.Linear(64 * side**2, DENSE), nn.ReLU(), nn.Linear(DENSE, classes),
        ).to(device())  # fmt: skip


def parts(work: Work) -> Iterator[StudyPart]:
    """One part for each data set and seed."""
    for name in work.sets:
        for seed in work.seeds:
            yield StudyPart("realistic", name, f"realistic-{name}-seed-{seed}", _rebuilt, (name, seed))


def _rebuilt(work: Work, name: str, seed: int) -> Result:
    """Residuals in both precisions, and the error of gradients at the start of each step."""
    s = work.sizes
    data = images(work, name, s.large_train, s.large_test, whole=True, seed=seed)
    numbers = {"terms": s.large_steps * BATCH}
    for kind, dtype in PRECISIONS.items():
        model = network(data.x.shape[-1], int(data.y.max()) + 1, seed).to(dtype)
        run = train(
            model, (data.x.to(dtype), data.y), cross_entropy, sgd(LR), s.large_steps, batch_size=BATCH, seed=seed,
            resume=True, path=work.trajectory(f"realistic-{name}-{kind}-seed-{seed}"),
        )  # fmt: skip
        folder = work.folder / "runs" / f"realistic-{name}-{kind}-seed-{seed}"  # a stopped sweep goes on from there
        exact = PathKernel(run).decompose(data.x_test.to(dtype), path=folder / "accounting")
        missed = exact.residual.abs() / exact.prediction.abs().max()
        numbers |= {kind: exact.error, f"{kind} mean": float(missed.mean()), f"{kind} replay": exact.bitwise}
        if dtype == torch.float64:
            numbers |= {
                "left": PathKernel(run, integration="left").decompose(data.x_test, path=folder / "left").error,
                "parameters": sum(p.numel() for p in model.parameters()),
                "loss": float(run.losses[-10:].mean()),
                "accuracy": accuracy(exact.prediction, data.y_test),
                "largest_output": float(exact.prediction.abs().max()),
                "cancellation": float(exact.contributions.abs().sum(2).max() / exact.prediction.abs().max()),
            }
    return Result(numbers, {})


def claims(results: Results) -> Iterator[Claim]:
    """Residuals in both precisions."""
    s = results.work.sizes
    for name, runs in results["realistic"].items():
        numbers = [r.numbers for r in runs]
        count = numbers[0]["parameters"]
        for kind, title in (
            ("float64", f"The kernel of a realistic network is computed up to machine precision, {name}"),
            ("float32", f"In single precision, up to that precision, {name}"),
        ):
            units = [r[kind] / rounding(r["terms"], PRECISIONS[kind]) for r in numbers]
            conditions = [Condition("in units of the rounding of the sum every residual is", units, ROUNDING)]
            conditions += [Condition("parameters", [count], Bound("at least", LEAST))]
            yield Claim(
                title,
                f"residual at most {plain(max(r[kind] for r in numbers), 2)} of the largest logit, on average "
                f"{plain(mean([r[f'{kind} mean'] for r in numbers]).value, 2)}; gradients at the start of each step: "
                f"error {mean([r['left'] for r in numbers]):.2g}",
                conditions,
                f"{count:,} parameters, {s.large_train:,} images, {s.large_steps} steps on minibatches of {BATCH}; "
                f"{100 * mean([r['accuracy'] for r in numbers]).value:.0f} % of the {s.large_test} test images right, "
                f"{len(runs)} seeds",
            )


def item(results: Results) -> Item:
    """Residuals by seed."""
    rows = [
        [f"{name}, {r.numbers['parameters']:,} parameters", str(seed), plain(r.numbers["float64"], 2),
         plain(r.numbers["float32"], 2), f"{r.numbers['left']:.3f}", f"{r.numbers['cancellation']:.0f}",
         f"{r.numbers['accuracy']:.2f}", "yes" if r.numbers["float64 replay"] and r.numbers["float32 replay"] else "no"]
        for name, runs in results["realistic"].items()
        for seed, r in zip(results.work.seeds, runs, strict=False)
    ]  # fmt: skip
    return table(
        "Larger networks on minibatches: residual of the rebuilt logits, relative to the largest",
        ["Data", "Seed", "Float64", "Float32", "Start of each step", "Cancellation", "Accuracy", "Replay bitwise"],
        rows,
        "Cancellation: largest sum of absolute contributions to an output, over the largest logit.",
    )
