"""Kopitkov & Indelman 2020, Neural Spectrum Alignment: the kernel turns towards the target while a network learns it.

Part one: a picture as a function of position, full-batch gradient descent, one decay of the learning rate, MLPs of
three depths. Part two: digits (and MNIST, where its files are at hand), an MLP under SGD, momentum and Adam. Three
seeds each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.base.checks import refusal
from ntkit.base.files import ensure_folder, read_arrays, read_json, write_arrays, write_json
from ntkit.base.versions import versions
from ntkit.data import load
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.eigenfunctions import bandwidth, eigenfunctions, grid
from ntkit.measures.spectra import spectrum
from ntkit.studies.judged import claimed, device, mean_error, told
from ntkit.tracking import Tracked, half_squared, track
from ntkit.trajectory import Trajectory, train

PAPER = {
    "authors": "Kopitkov, Indelman",
    "title": "Neural Spectrum Alignment: Empirical Study",
    "year": 2020,
    "reference": "ICANN 2020, LNCS 12397, 168-179; arXiv 1910.08720",
}
FORMAT = 1
SEEDS = (0, 1, 2)
DEPTHS = (2, 4, 6)
SHOWN = 6  # eigenfunctions drawn

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    """Sizes: pixels a side, width, steps, learning rate, eigenpairs kept, and k of the energies judged."""

    side: int
    width: int
    steps: int
    lr: float
    decay: int  # the step from which the learning rate is half
    k: int
    top: int
    points: int  # digits followed
    digit_steps: int


SCALES = {
    "quick": Scale(24, 128, 16_000, 0.05, 4_000, 60, 20, 400, 3_000),
    "paper": Scale(100, 256, 600_000, 0.25, 100_000, 400, 20, 1_000, 30_000),
}


def picture(x: Tensor) -> Tensor:
    """The built-in grey picture, ripples around the centre: sin(10 |x|) on [-1, 1]^2, standardised. [n, 1]."""
    values = torch.sin(10 * x.norm(dim=1, keepdim=True))
    return (values - values.mean()) / values.std()


def mlp(inputs: int, outputs: int, depth: int, width: int, seed: int) -> nn.Sequential:
    """`depth` weight matrices, leaky ReLU between them, PyTorch's own initialisation; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(inputs if i == 0 else width, outputs if i == depth - 1 else width), nn.LeakyReLU()]
        return nn.Sequential(*layers[:-1])


def decayed(step: int, at: int) -> float:
    """Half the learning rate from step `at` on."""
    return 1.0 if step < at else 0.5


def run(scale: str, folder: Path, say: Say, data_dir: str | Path | None = None) -> Path:
    """Run what is not done yet, judge, write results and report."""
    s = SCALES[scale]
    ensure_folder(folder)
    sets = ["digits", *([] if data_dir is None else ["mnist"])]
    header = {"format": FORMAT, "kind": "study", "name": "kopitkov2019", "scale": scale, "sets": sets}
    start = folder / "run.json"
    if start.exists() and (found := read_json(start)) | header != found:
        raise refusal(str(folder), got="another run", expected="this study at this scale", fix="Name another --out.")
    write_json(start, header | {"sizes": vars(s), "versions": versions(), "status": "running"})
    picture_runs = {depth: [_picture(s, depth, seed, folder, say) for seed in SEEDS] for depth in DEPTHS}
    classified = {
        name: {o: [_classes(s, name, data_dir, o, seed, folder, say) for seed in SEEDS] for o in OPTIMIZERS}
        for name in sets
    }
    images = read_arrays(folder / "runs" / f"depth-{DEPTHS[-1]}-seed-0" / "track" / "images.safetensors")
    results: dict[str, Any] = header | {
        "title": "Neural spectrum alignment",
        "paper": PAPER,
        "command": f"ntkit study kopitkov2019 --scale {scale}",
        "about": (
            f"A grey picture (ripples around the centre, {s.side} x {s.side} points of [-1, 1]^2, standardised) is "
            f"learned as a function of position by leaky-ReLU MLPs of width {s.width} and depth "
            f"{', '.join(map(str, DEPTHS))} with full-batch gradient descent on half the mean squared error: "
            f"{s.steps:,} steps at learning rate {s.lr}, halved after step {s.decay:,}. Then {' and '.join(sets)} (ten "
            f"classes, cross-entropy, minibatches of 32, {s.digit_steps:,} steps) by an MLP of depth 4 under SGD, "
            f"momentum and Adam; kernel followed on {s.points} training images. {len(SEEDS)} seeds each; +- is one "
            f"standard error."
        ),
        "departures": [
            "The paper's picture is the Mona Lisa on 10,000 points, its run 600,000 steps; the scale paper has these "
            "sizes, with the built-in picture.",
            "Initialisation (PyTorch's default), leaky slope (0.01), range of the inputs and the decay's place are not "
            "stated in the sources at hand.",
            "The paper compares SGD and Adam on the picture; here optimisers are compared on digits."
            + ("" if data_dir else " MNIST only where --data-dir names its files."),
        ],
        "claims": [
            *_picture_claims(s, picture_runs, images),
            *(claim for name, runs in classified.items() for claim in _class_claims(name, runs)),
        ],
        "settings": vars(s),
        "versions": versions(),
        "curves": [
            {"title": "A picture, by depth", "groups": [
                _group(f"depth {depth}", runs, s.top) for depth, runs in picture_runs.items()
            ]},
            *({"title": f"{name}, by optimiser", "groups": [_group(o, runs, 10) for o, runs in found.items()]}
              for name, found in classified.items()),
        ],
        "runs": [
            {"name": name, "title": title, "track": f"runs/{name}/track"}
            for name, title in (
                *((f"depth-{d}-seed-{SEEDS[0]}", f"picture, depth {d}") for d in reversed(DEPTHS)),
                *((f"{name}-{o}-seed-{SEEDS[0]}", f"{name}, {o}") for name in sets for o in OPTIMIZERS),
            )
        ],
    }  # fmt: skip
    write_json(folder / "results.json", results)
    from ntkit.report import render_study, render_tracked

    for shown in results["runs"]:
        render_tracked(folder / shown["track"])
    render_study(folder)
    write_json(start, read_json(start) | {"status": "complete"})
    return folder


# ---------------------------------------------------------------------- experiments


def _trained(
    model: nn.Module, place: Path, data: tuple[Tensor, Tensor], loss: Any, optimizer: Any, **settings: Any
) -> Trajectory:
    return train(model, data, loss, optimizer, path=place / "trajectory", resume=True, **settings)


def _picture(s: Scale, depth: int, seed: int, folder: Path, say: Say) -> Tracked:
    """Learn the picture, follow the kernel on its points, draw the eigenfunctions."""
    name = f"depth-{depth}-seed-{seed}"
    place, x = folder / "runs" / name, grid(s.side).float().to(device())
    y, model = picture(x), mlp(2, 1, depth, s.width, seed).to(device())
    if (place / "track" / "images.safetensors").exists():
        return Tracked.open(place / "track")
    say(f"picture, depth {depth}, seed {seed}")
    around = [s.decay - 1, s.decay, s.decay + 1, s.decay + s.decay // 8, s.decay + s.decay // 2]
    record = sorted({0, s.steps, *(round(2 ** (j / 2)) for j in range(2 * int(math.log2(s.steps)) + 1)), *around})
    sgd = partial(_sgd, lr=s.lr)
    trajectory = _trained(
        model, place, (x, y), half_squared, sgd, steps=s.steps, record=record,
        schedule=partial(decayed, at=s.decay), seed=seed,
    )  # fmt: skip
    tracked = track(trajectory, x, y, model=model, loss=half_squared, k=s.k, path=place / "track")
    write_arrays(place / "track" / "images.safetensors", _drawn(trajectory, tracked, model, x, s.side))
    return tracked


def _drawn(trajectory: Trajectory, tracked: Tracked, model: nn.Module, x: Tensor, side: int) -> dict[str, np.ndarray]:
    """Target, outputs and top eigenfunctions on a grid twice as fine as the points."""
    fine, size = grid(2 * side).to(x), (2 * side, 2 * side)
    outputs, functions, widths = [], [], []
    steps = tracked.steps[:: max(1, len(tracked.steps) // 24)]
    steps = [*steps, *([] if steps[-1] == tracked.steps[-1] else [tracked.steps[-1]])]
    kernel = TangentKernel(model, outputs="trace")
    for step in steps:
        trajectory.load(model, step)
        outputs.append(model(fine).detach().reshape(size).cpu().numpy())
        K = kernel(x)
        top = spectrum(K, k=SHOWN)
        usable = int((top.eigenvalues > top.noise).sum())  # the others are rounding: drawn empty
        drawn = np.zeros((SHOWN, *size), dtype=np.float32)
        if usable:
            found = eigenfunctions(kernel, spectrum(K, k=usable), x, fine)
            drawn[:usable] = found.T.reshape(-1, *size).cpu().numpy()
        functions.append(drawn)
        vectors = torch.from_numpy(np.ascontiguousarray(tracked.eigenvectors(step).T)).reshape(-1, side, side)
        widths.append(bandwidth(vectors).numpy())
    return {
        "target": picture(fine).reshape(size).cpu().numpy(),
        "steps": np.asarray(steps),
        "output": np.stack(outputs),
        "eigenfunctions": np.stack(functions),
        "bandwidth": np.stack(widths),
    }


def _sgd(params: list[nn.Parameter], lr: float, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=momentum)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": partial(_sgd, lr=0.05),
    "momentum": partial(_sgd, lr=0.01, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3),
}


def _cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


def _classes(
    s: Scale, name: str, data_dir: str | Path | None, optimizer: str, seed: int, folder: Path, say: Say
) -> Tracked:
    """Learn images of ten classes with an optimiser, follow the trace kernel on some of them."""
    place = folder / "runs" / f"{name}-{optimizer}-seed-{seed}"
    data = load(name, None if name == "digits" else str(data_dir))
    chosen = torch.linspace(0, len(data.x_train) - 1, min(s.points, len(data.x_train))).long()
    x, y = data.x_train.flatten(1).to(device()), data.y_train.to(device())
    model = mlp(x.shape[1], len(data.classes), 4, s.width, seed).to(device())
    say(f"{name}, {optimizer}, seed {seed}")
    trajectory = _trained(
        model, place, (x, y), _cross_entropy, OPTIMIZERS[optimizer], steps=s.digit_steps, batch_size=32, seed=seed
    )
    return track(trajectory, x[chosen], y[chosen], model=model, k=s.k, path=place / "track")


# ---------------------------------------------------------------------- claims


def _energy(tracked: Tracked, name: str, k: int) -> list[float]:
    return [row[k - 1] if row[k - 1] is not None else math.nan for row in tracked.series[f"energy_{name}"]]


def _picture_claims(s: Scale, runs: dict[int, list[Tracked]], images: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    deep, k, steps = runs[DEPTHS[-1]], s.top, runs[DEPTHS[-1]][0].steps
    depth = f"depth {DEPTHS[-1]}"
    target = [_energy(t, "target", k) for t in deep]
    output = [_energy(t, "output", k) for t in deep]
    residual = [_energy(t, "residual", k) for t in deep]
    first, last = [e[0] for e in target], [e[-1] for e in target]
    top = [[row[0] for row in t.series["eigenvalues"]] for t in deep]
    levels = {i: t for i, t in enumerate(steps) if s.decay / 2 <= t < s.decay}
    ratio = [float(np.mean([lam[i] * s.lr / (2 * s.side**2) for i in levels])) for lam in top]
    before = steps.index(s.decay)
    rise = [lam[-1] / lam[before] for lam in top]
    growth = [lam[before] / lam[0] for lam in top]
    ends = {d: [_energy(t, "target", k)[-1] for t in found] for d, found in runs.items()}
    ordered = all(
        mean_error(ends[b])[0] - mean_error(ends[a])[0] > 2 * math.hypot(mean_error(ends[a])[1], mean_error(ends[b])[1])
        for a, b in zip(DEPTHS, DEPTHS[1:], strict=False)
    )
    cosines = [
        float(np.mean([f["cosine"] for step, f in zip(t.steps, t.series["first_order"], strict=True) if f and step]))
        for t in deep
    ]
    widths = images["bandwidth"][-1]
    half = len(widths) // 2
    return [
        claimed(
            "The top eigenfunctions align with the target",
            f"E(target, {k}): {told(first)} → {told(last)}",
            mean_error(first)[0] < 0.3 and mean_error(last)[0] > 0.9,
            f"{depth}; holds if it rises from under 0.3 to over 0.9",
        ),
        claimed(
            "The top eigenfunctions span the network's output during the whole optimisation",
            f"E(output, {k}): at least {told([min(e) for e in output])}, at the end {told([e[-1] for e in output])}",
            mean_error([min(e) for e in output])[0] > 0.9,
            f"{depth}; the least over all snapshots; holds if it stays over 0.9",
        ),
        claimed(
            "The residual leaves the top eigenfunctions",
            f"E(residual, {k}): {told([e[0] for e in residual])} → {told([e[-1] for e in residual], 4)}",
            mean_error([e[-1] / e[0] for e in residual])[0] < 0.5,
            f"{depth}; holds if it ends under half its start. In between it can rise: see the curves",
        ),
        claimed(
            "The largest eigenvalue grows and levels near 2N / learning rate",
            f"λ₁ grows {told(growth, 1)}-fold, levels at {told(ratio)} of 2N / learning rate",
            mean_error(growth)[0] > 3 and 0.8 < mean_error(ratio)[0] < 1.2,
            f"{depth}; mean of the snapshots of the second half before the decay; holds within 0.8 to 1.2",
        ),
        claimed(
            "A decay of the learning rate makes it rise again",
            f"λ₁ at the end / λ₁ at the decay: {told(rise)}",
            mean_error(rise)[0] - 2 * mean_error(rise)[1] > 1,
            f"{depth}; holds if over 1 by two standard errors",
        ),
        claimed(
            "Deeper networks align more",
            f"E(target, {k}) at the end: " + ", ".join(f"depth {d}: {told(ends[d])}" for d in DEPTHS),
            ordered,
            "holds if each step in depth adds more than two standard errors",
        ),
        claimed(
            "Eigenfunctions further down the spectrum vary faster",
            f"bandwidth, cycles per picture: {np.nanmean(widths[:half]):.1f} (upper half of the top {len(widths)}), "
            f"{np.nanmean(widths[half:]):.1f} (lower half)",
            bool(np.nanmean(widths[half:]) > np.nanmean(widths[:half])),
            f"{depth}, seed 0, at the end",
        ),
        claimed(
            "A step of gradient descent is mostly first order",
            f"cosine of the true and the first-order change of the outputs: {told(cosines, 4)}",
            None,
            f"{depth}; mean over snapshots. The paper's figure has it, its number is not at hand",
        ),
    ]


def _class_claims(name: str, runs: dict[str, list[Tracked]]) -> list[dict[str, Any]]:
    claims = []
    for optimizer, found in runs.items():
        first = [_energy(t, "target", 10)[0] for t in found]
        last = [_energy(t, "target", 10)[-1] for t in found]
        gain = [b - a for a, b in zip(first, last, strict=True)]
        claims.append(
            claimed(
                f"The same with {optimizer}, on {name}",
                f"E(target, 10): {told(first)} → {told(last)}",
                mean_error(gain)[0] > 2 * mean_error(gain)[1],
                "trace kernel, one-hot targets; holds if it rises by more than two standard errors",
            )
        )
    return claims


def _group(name: str, runs: list[Tracked], k: int) -> dict[str, Any]:
    """Means over seeds and their standard errors, for the curves."""
    series: dict[str, list[list[float]]] = {
        f"energy_{what}": [_energy(t, what, k) for t in runs] for what in ("target", "output", "residual")
    }
    plain = ("loss", "sharpness", "alignment_centered", "distance")
    series |= {what: [_numbers(t.series[what]) for t in runs] for what in plain}
    if name not in ("momentum", "adam"):  # 2 / learning rate bounds plain steps
        series["bound"] = [_numbers([2 / lr if lr else None for lr in t.series["learning_rate"]]) for t in runs]
    series["lambda_1"] = [_numbers([row[0] for row in t.series["eigenvalues"]]) for t in runs]
    errors = [[f and f["relative_error"] for f in t.series["first_order"]] for t in runs]
    series["first_order_error"] = [_numbers(row) for row in errors]
    curves = {}
    for what, rows in series.items():
        a = np.asarray(rows, dtype=float)
        mean, error = a.mean(0), a.std(0, ddof=1) / len(a) ** 0.5
        curves[what] = {"mean": _listed(mean), "error": _listed(error)}
    return {"name": name, "seeds": list(SEEDS), "steps": runs[0].steps, "series": curves, "energy_k": k}


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]
