"""Kopitkov & Indelman 2020, Neural Spectrum Alignment: the kernel turns towards the target while a network learns it.

Experiment one: a picture as a function of position, full-batch gradient descent, one decay of the learning rate, MLPs
of three depths. Experiment two: digits (and MNIST, with its files), an MLP under SGD, momentum and Adam. Three seeds
each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.checks import defined
from ntkit.data import load
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.eigenfunctions import bandwidth, eigenfunctions, grid
from ntkit.measures.spectra import spectrum
from ntkit.studies.claim import Bound, Claim, Condition, Order, Within, mean
from ntkit.studies.study import Result, Results, Sizes, Study, StudyPart, Work, device, mlp
from ntkit.tracking import Tracked, half_squared, track, write_images
from ntkit.tracking.losses import cross_entropy
from ntkit.tracking.snapshot_numbers import finite
from ntkit.trajectory import Trajectory, train

DEPTHS = (2, 4, 6)
FUNCTIONS = 6  # eigenfunctions drawn

SCALES = {
    "quick": Sizes(
        side=24, width=128, steps=16_000, lr=0.05,  # pixels per side; the network and its training
        decay=4_000,  # the step from which the learning rate is half
        k=60, top=20,  # eigenpairs; k of the energies in the claims
        points=400, digit_steps=3_000,  # digits that the kernel is tracked on; training steps
    ),
    "paper": Sizes(
        side=100, width=256, steps=600_000, lr=0.25, decay=100_000, k=400, top=20, points=1_000, digit_steps=30_000
    ),
}  # fmt: skip


def picture(x: Tensor) -> Tensor:
    """The built-in gray picture, ripples around the center: sin(10 |x|) on [-1, 1]^2, standardized. [n, 1]."""
    values = torch.sin(10 * x.norm(dim=1, keepdim=True))
    return (values - values.mean()) / values.std()


def decayed(step: int, at: int) -> float:
    """Half the learning rate from step `at` on."""
    return 1.0 if step < at else 0.5


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}


def parts(work: Work) -> Iterator[StudyPart]:
    """The picture by depth, then each data set by optimizer."""
    for depth in DEPTHS:
        for seed in work.seeds:
            yield StudyPart("picture", depth, f"depth-{depth}-seed-{seed}", _picture, (depth, seed))
    for data in work.sets:
        for optimizer in OPTIMIZERS:
            for seed in work.seeds:
                yield StudyPart(data, optimizer, f"{data}-{optimizer}-seed-{seed}", _classes, (data, optimizer, seed))


def _picture(work: Work, depth: int, seed: int) -> Result:
    """Learn the picture, track the kernel on its points, draw the eigenfunctions."""
    s = work.sizes
    place, x = work.trajectory(f"depth-{depth}-seed-{seed}"), grid(s.side).float().to(device())
    y, model = picture(x), mlp(2, 1, depth, s.width, seed).to(device())
    around = [s.decay - 1, s.decay, s.decay + 1, s.decay + s.decay // 8, s.decay + s.decay // 2]
    record = sorted({0, s.steps, *(round(2 ** (j / 2)) for j in range(2 * int(math.log2(s.steps)) + 1)), *around})
    run = train(
        model, (x, y), half_squared, partial(torch.optim.SGD, lr=s.lr), path=place, resume=True, steps=s.steps,
        record=record, schedule=partial(decayed, at=s.decay), seed=seed,
    )  # fmt: skip
    tracked = track(run, x, y, model=model, loss=half_squared, k=s.k, path=place.parent / "track")
    images = _images(run, tracked, model, x, s.side)
    write_images(place.parent / "track", images)
    return Result({"steps": tracked.steps, "series": tracked.series}, {"bandwidth": images["bandwidth"][-1]})


def _images(run: Trajectory, tracked: Tracked, model: nn.Module, x: Tensor, side: int) -> dict[str, np.ndarray]:
    """Target, outputs and top eigenfunctions on a grid twice as fine as the points."""
    fine, size = grid(2 * side).to(x), (2 * side, 2 * side)
    outputs, functions, widths = [], [], []
    steps = tracked.steps[:: max(1, len(tracked.steps) // 24)]
    steps = [*steps, *([] if steps[-1] == tracked.steps[-1] else [tracked.steps[-1]])]
    kernel = TangentKernel(model, outputs="trace")
    for step in steps:
        run.load(model, step)
        outputs.append(model(fine).detach().reshape(size).cpu().numpy())
        K = kernel(x)
        top = spectrum(K, k=FUNCTIONS)
        usable = int((top.eigenvalues > top.noise).sum())  # the others are rounding errors: their images stay empty
        images = np.zeros((FUNCTIONS, *size), dtype=np.float32)
        if usable:
            values = eigenfunctions(kernel, spectrum(K, k=usable), x, fine)
            images[:usable] = values.T.reshape(-1, *size).cpu().numpy()
        functions.append(images)
        vectors = torch.from_numpy(np.ascontiguousarray(tracked.eigenvectors(step).T)).reshape(-1, side, side)
        frequencies = defined(bandwidth, vectors)
        widths.append(np.full(len(vectors), np.nan) if frequencies is None else frequencies.numpy())
    return {
        "target": picture(fine).reshape(size).cpu().numpy(),
        "steps": np.asarray(steps),
        "output": np.stack(outputs),
        "eigenfunctions": np.stack(functions),
        "bandwidth": np.stack(widths),
    }


def _classes(work: Work, data: str, optimizer: str, seed: int) -> Result:
    """Learn images of ten classes with an optimizer, track the trace kernel on some of them."""
    s = work.sizes
    place = work.trajectory(f"{data}-{optimizer}-seed-{seed}")
    images = load(data, work.folder_of(data))
    rows = torch.linspace(0, len(images.x_train) - 1, min(s.points, len(images.x_train))).long()
    x, y = images.x_train.flatten(1).to(device()), images.y_train.to(device())
    model = mlp(x.shape[1], len(images.classes), 4, s.width, seed).to(device())
    run = train(
        model, (x, y), cross_entropy, OPTIMIZERS[optimizer], path=place, resume=True, steps=s.digit_steps,
        batch_size=32, seed=seed,
    )  # fmt: skip
    tracked = track(run, x[rows], y[rows], model=model, k=s.k, path=place.parent / "track")
    return Result({"steps": tracked.steps, "series": tracked.series}, {})


def _series(result: Result, name: str) -> list[Any]:
    return result.numbers["series"][name]


def _energy(result: Result, name: str, k: int) -> list[float]:
    return [math.nan if row[k - 1] is None else row[k - 1] for row in _series(result, f"energy_{name}")]


def energy_claims(results: Results) -> Iterator[Claim]:
    """Energies in the top eigenfunctions while the deepest network learns the picture; and at the end, by depth."""
    k, deep, depth = results.work.sizes.top, results["picture"][DEPTHS[-1]], f"depth {DEPTHS[-1]}"
    target, output, residual = ([_energy(r, name, k) for r in deep] for name in ("target", "output", "residual"))
    first, last = mean([e[0] for e in target]), mean([e[-1] for e in target])
    yield Claim(
        "The top eigenfunctions align with the target",
        f"E(target, {k}): {first:.2f} → {last:.2f}",
        [Condition("the energy starts", [first], Bound("under", 0.3)), Condition("ends", [last], Bound("over", 0.9))],
        depth,
    )
    least = mean([min(e) for e in output])
    yield Claim(
        "The top eigenfunctions span the network's output during the whole optimization",
        f"E(output, {k}): at least {least:.2f}, at the end {mean([e[-1] for e in output]):.2f}",
        [Condition("the energy stays", [least], Bound("over", 0.9))],
        f"{depth}; the smallest value over all snapshots",
    )
    yield Claim(
        "The residual leaves the top eigenfunctions",
        f"E(residual, {k}): {mean([e[0] for e in residual]):.2f} → {mean([e[-1] for e in residual]):.4f}",
        [Condition("the end divided by the start is", [mean([e[-1] / e[0] for e in residual])], Bound("under", 0.5))],
        f"{depth}; in between it can rise: see the curves",
    )


def eigenvalue_claims(results: Results) -> Iterator[Claim]:
    """The largest eigenvalue before and after the decay of the learning rate."""
    s, deep, depth = results.work.sizes, results["picture"][DEPTHS[-1]], f"depth {DEPTHS[-1]}"
    steps, top = deep[0].numbers["steps"], [[row[0] for row in _series(r, "eigenvalues")] for r in deep]
    level = [i for i, t in enumerate(steps) if s.decay / 2 <= t < s.decay]
    ratio = mean([float(np.mean([lam[i] * s.lr / (2 * s.side**2) for i in level])) for lam in top])
    decay = steps.index(s.decay)
    growth, rise = mean([lam[decay] / lam[0] for lam in top]), mean([lam[-1] / lam[decay] for lam in top])
    yield Claim(
        "The largest eigenvalue grows and levels near 2N / learning rate",
        f"λ₁ grows {growth:.1f}-fold, levels at {ratio:.2f} of 2N / learning rate",
        [Condition("the factor is", [growth], Bound("over", 3)), Condition("the level", [ratio], Within(0.2, of=1))],
        f"{depth}; level: mean of the snapshots of the second half before the decay",
    )
    yield Claim(
        "A decay of the learning rate makes it rise again",
        f"λ₁ at the end / λ₁ at the decay: {rise:.2f}",
        [Condition("it is", [rise], Bound("over", 1, errors=2))],
        depth,
    )


def other_picture_claims(results: Results) -> Iterator[Claim]:
    """Depth, bandwidth of the eigenfunctions, and the first-order prediction."""
    k, deep, depth = results.work.sizes.top, results["picture"][DEPTHS[-1]], f"depth {DEPTHS[-1]}"
    ends = {d: mean([_energy(r, "target", k)[-1] for r in runs]) for d, runs in results["picture"].items()}
    yield Claim(
        "Deeper networks align more",
        f"E(target, {k}) at the end: " + ", ".join(f"depth {d}: {end:.2f}" for d, end in ends.items()),
        [Condition("the ends by depth", list(ends.values()), Order("increase", errors=2))],
    )
    widths = deep[0].arrays["bandwidth"]
    upper, lower = (float(np.nanmean(half)) for half in (widths[: len(widths) // 2], widths[len(widths) // 2 :]))
    yield Claim(
        "Eigenfunctions further down the spectrum vary faster",
        f"bandwidth, cycles per picture: {upper:.1f} (upper half of the top {len(widths)}), {lower:.1f} (lower half)",
        [Condition("the bandwidths down the spectrum", [upper, lower], Order("increase"))],
        f"{depth}, first seed, at the end",
    )
    cosines = [
        float(np.mean([
            f["cosine"] for step, f in zip(r.numbers["steps"], _series(r, "first_order"), strict=True) if f and step
        ])) for r in deep
    ]  # fmt: skip
    yield Claim(
        "A step of gradient descent is mostly first order",
        f"cosine of the true and the first-order change of the outputs: {mean(cosines):.4f}",
        note=f"{depth}; mean over snapshots. The paper shows it in a figure; its number is not known here",
    )


def class_claims(results: Results) -> Iterator[Claim]:
    """Alignment on images of ten classes, by optimizer."""
    for data in results.work.sets:
        for optimizer, runs in results[data].items():
            first, last = ([_energy(r, "target", 10)[i] for r in runs] for i in (0, -1))
            gain = mean([b - a for a, b in zip(first, last, strict=True)])
            yield Claim(
                f"The same with {optimizer}, on {data}",
                f"E(target, 10): {mean(first):.2f} → {mean(last):.2f}",
                [Condition("the gain is", [gain], Bound("over", 0, errors=2))],
                "trace kernel, one-hot targets",
            )


def about(results: Results) -> str:
    """What was done, in a paragraph."""
    s = results.work.sizes
    return (
        f"A gray picture (ripples around the center, {s.side} x {s.side} points of [-1, 1]^2, standardized) is learned "
        f"as a function of position by leaky-ReLU MLPs of width {s.width} and depth {', '.join(map(str, DEPTHS))} with "
        f"full-batch gradient descent on half the mean squared error: {s.steps:,} steps at learning rate {s.lr}, "
        f"halved after step {s.decay:,}. Then {' and '.join(results.work.sets)} (ten classes, cross-entropy, "
        f"minibatches of 32, {s.digit_steps:,} steps) by an MLP of depth 4 under SGD, momentum and Adam; the kernel is "
        f"tracked on {s.points} training images. {len(results.work.seeds)} seeds each; ± is one standard error."
    )


def departures(results: Results) -> list[str]:
    """What differs from the paper."""
    return [
        "The paper's picture is the Mona Lisa on 10,000 points, its run 600,000 steps; the scale paper has these "
        "sizes, with the built-in picture.",
        "Initialization (PyTorch's default), leaky slope (0.01), range of the inputs and the step of the decay are not "
        "stated in the sources at hand.",
        "The paper compares SGD and Adam on the picture; here optimizers are compared on digits."
        + ("" if "mnist" in results.work.sets else " MNIST is included only when --data-dir names its files."),
    ]


def curves_and_runs(results: Results) -> dict[str, Any]:
    """Curves as means over seeds, and the runs that have pages of their own."""
    s, seeds = results.work.sizes, results.work.seeds
    curves = [{"title": "A picture, by depth", "groups": [
        _group(f"depth {depth}", runs, s.top, seeds) for depth, runs in results["picture"].items()
    ]}]  # fmt: skip
    pages = [(f"depth-{depth}-seed-{seeds[0]}", f"picture, depth {depth}") for depth in reversed(DEPTHS)]
    for data in results.work.sets:
        groups = [_group(optimizer, runs, 10, seeds) for optimizer, runs in results[data].items()]
        curves.append({"title": f"{data}, by optimizer", "groups": groups})
        pages += [(f"{data}-{optimizer}-seed-{seeds[0]}", f"{data}, {optimizer}") for optimizer in results[data]]
    runs = [{"name": name, "title": title, "track": f"runs/{name}/track"} for name, title in pages]
    return {"curves": curves, "runs": runs}


def _group(name: str, runs: list[Result], k: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Means over seeds and their standard errors, for the curves."""
    series: dict[str, list[list[Any]]]
    series = {f"energy_{what}": [_energy(r, what, k) for r in runs] for what in ("target", "output", "residual")}
    plain = ("loss", "sharpness", "alignment_centered", "distance")
    series |= {what: [_series(r, what) for r in runs] for what in plain}
    if name not in ("momentum", "adam"):  # 2 / learning rate bounds plain steps
        series["bound"] = [[2 / lr if lr else None for lr in _series(r, "learning_rate")] for r in runs]
    series["lambda_1"] = [[row[0] for row in _series(r, "eigenvalues")] for r in runs]
    series["first_order_error"] = [[f and f["relative_error"] for f in _series(r, "first_order")] for r in runs]
    curves = {}
    for what, rows in series.items():
        a = np.asarray(rows, dtype=float)  # None becomes NaN
        by_step = {"mean": a.mean(0), "error": a.std(0, ddof=1) / len(a) ** 0.5}
        curves[what] = {name: [finite(v) for v in values.tolist()] for name, values in by_step.items()}
    return {"name": name, "seeds": list(seeds), "steps": runs[0].numbers["steps"], "series": curves, "energy_k": k}


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
    parts=[parts],
    claims=[energy_claims, eigenvalue_claims, other_picture_claims, class_claims],
    about=about,
    departures=departures,
    more=curves_and_runs,
    seeds=(0, 1, 2),
    single_thread=(),
)
