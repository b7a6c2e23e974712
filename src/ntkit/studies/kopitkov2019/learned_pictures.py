"""Pictures learned as functions of position: what the top eigenfunctions turn to, and what they span."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from ntkit.base.checks import defined
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.eigenfunctions import bandwidth, eigenfunctions, grid
from ntkit.measures.spectra import spectrum
from ntkit.studies.claim import FALLS, RISES, SURE, Bound, Claim, Condition, Order, mean
from ntkit.studies.kopitkov2019.constant_kernel import constant_kernel
from ntkit.studies.kopitkov2019.kopitkov_setting import (
    DEPTHS,
    DISPLACED,
    PICTURES,
    changes,
    displaced,
    energy,
    energy_at,
    file_of,
    initial_kernels,
    learned,
    numbers_of,
    picture,
    text,
)
from ntkit.studies.kopitkov2019.learning_speed import one_step
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, device, mlp
from ntkit.tracking import Tracked, half_squared, track, write_images
from ntkit.trajectory import Trajectory

DEEP = DEPTHS[-1]
MOST = Bound("over", 0.9, errors=SURE)  # our reading of "almost completely"
DRAWN = 6  # eigenfunctions of the first seed's pages
SHOWN = 4  # eigenfunctions in the report's table of images


def parts(work: Work) -> Iterator[StudyPart]:
    """Untrained networks; every picture by the deepest network, the ripples also by the others."""
    yield StudyPart("untrained", "pictures", "untrained-pictures", _untrained)
    for seed in work.seeds[: work.sizes.seeds]:
        for name in PICTURES:
            for depth in DEPTHS if name == PICTURES[0] else (DEEP,):
                part = file_of(name, depth, seed)
                yield StudyPart("picture", (name, depth), part, _learned, (name, depth, seed))


def deep_runs(results: Results) -> dict[str, list[Result]]:
    """Runs of the deepest network by picture, as far as they are finished."""
    return {name: runs for (name, depth), runs in results["picture"].items() if depth == DEEP}


def _untrained(work: Work) -> Result:
    """Kernels of untrained networks on the points, compared between seeds: what chance alone does."""
    s = work.sizes
    models = (mlp(2, 1, DEEP, s.width, seed).to(device()) for seed in work.seeds)
    return Result(initial_kernels(models, grid(s.side).float().to(device())), {})


def _learned(work: Work, name: str, depth: int, seed: int) -> Result:
    """Learn a picture; track the kernel on its points; measure one step from every snapshot, and constant kernels."""
    s, at = work.sizes, learned(work, name, depth, seed)
    place = work.trajectory(file_of(name, depth, seed)).parent / "track"
    tracked = track(at.run, at.x, at.y, model=at.model, loss=half_squared, k=s.k, path=place)
    if seed == work.seeds[0]:
        write_images(place, _images(at.run, tracked, at.model, name, s.side))
    numbers, arrays = numbers_of(tracked)
    first, last = (tracked.eigenvectors(step) for step in (tracked.steps[0], tracked.steps[-1]))
    others = {other: picture(other, s.side) for other in PICTURES} | {DISPLACED: displaced(at.y, s.side)}
    numbers["energies"] = {
        other: [energy_at(vectors, values, s.top) for vectors in (first, last)] for other, values in others.items()
    }
    numbers["constant_kernel"] = constant_kernel(at, tracked.steps, s.lr, s.decay)
    arrays |= one_step(at, tracked, s.top)
    arrays["bandwidth"] = np.stack([_bandwidths(vectors, s.side) for vectors in (first, last)])
    arrays["shown"] = np.stack([vectors[:, :SHOWN].T.reshape(-1, s.side, s.side) for vectors in (first, last)])
    return Result(numbers, arrays)


def _bandwidths(vectors: np.ndarray, side: int) -> np.ndarray:
    images = torch.from_numpy(np.ascontiguousarray(vectors.T)).reshape(-1, side, side)
    frequencies = defined(bandwidth, images)
    return np.full(len(images), np.nan) if frequencies is None else frequencies.numpy()


def _images(run: Trajectory, tracked: Tracked, model: nn.Module, name: str, side: int) -> dict[str, np.ndarray]:
    """Target, outputs and top eigenfunctions on a grid twice as fine as the points."""
    coarse, size = grid(side).float().to(device()), (2 * side, 2 * side)
    fine = grid(2 * side).to(coarse)
    outputs, functions, widths = [], [], []
    steps = tracked.steps[:: max(1, len(tracked.steps) // 24)]
    steps = [*steps, *([] if steps[-1] == tracked.steps[-1] else [tracked.steps[-1]])]
    kernel = TangentKernel(model, outputs="trace")
    for step in steps:
        run.load(model, step)
        outputs.append(model(fine).detach().reshape(size).cpu().numpy())
        K = kernel(coarse)
        top = spectrum(K, k=DRAWN)
        usable = int((top.eigenvalues > top.floor).sum())  # the others are rounding errors: their images stay empty
        images = np.zeros((DRAWN, *size), dtype=np.float32)
        if usable:
            values = eigenfunctions(kernel, spectrum(K, k=usable), coarse, fine)
            images[:usable] = values.T.reshape(-1, *size).cpu().numpy()
        functions.append(images)
        widths.append(_bandwidths(tracked.eigenvectors(step), side))
    return {
        "target": picture(name, 2 * side).reshape(size).float().numpy(),
        "steps": np.asarray(steps),
        "output": np.stack(outputs),
        "eigenfunctions": np.stack(functions),
        "bandwidth": np.stack(widths),
    }


def change_claims(results: Results) -> Iterator[Claim]:
    """How far the kernel goes from its start, by picture."""
    chance = results["untrained"].get("pictures", [])
    for name, runs in deep_runs(results).items() if chance else ():
        yield change_claim(f"The kernel changes dramatically: {name}", runs, chance[0], f"depth {DEEP}")


def change_claim(title: str, runs: Sequence[Result], chance: Result, note: str) -> Claim:
    """How far kernels go from their start, beside how far untrained networks of other seeds are from each other."""
    change = changes(runs, chance.numbers)
    gaps = [mean(change.distance - change.by_chance), mean(change.centered - change.centered_by_chance)]
    return Claim(
        title,
        f"1 − cosine to the initial kernel {text(change.distance, 3)}, of kernels of other untrained networks "
        f"{text(change.by_chance, 4)}; centered {text(change.centered, 3)} and {text(change.centered_by_chance, 3)}; "
        f"trace × {10 ** mean(change.growth).value:.1f}",
        [
            Condition("the first of both, plain and centered, less the second is", gaps, RISES),
            Condition(
                "the logarithm of the trace’s growth less that between untrained networks is",
                [mean(change.growth - change.growth_by_chance)],
                RISES,
            ),
        ],
        f"{note}; start against end; beyond what chance alone does is our reading of dramatic",
    )


def alignment_claims(results: Results) -> Iterator[Claim]:
    """The learned picture's energy in the top eigenfunctions, beside that of pictures that were not learned."""
    k = results.work.sizes.top
    for name, runs in deep_runs(results).items():
        gains = {
            other: np.array([np.diff(r.numbers["energies"][other])[0] for r in runs])
            for other in runs[0].numbers["energies"]
        }
        start, end = (mean([r.numbers["energies"][name][i] for r in runs]) for i in (0, 1))
        own, copy = gains.pop(name), gains.pop(DISPLACED)
        yield Claim(
            f"The top eigenfunctions turn to the function that is learned: {name}",
            f"E({name}, {k}): {start:.2f} → {end:.2f}; gain {text(own)}, of the same picture displaced {text(copy)}",
            [
                Condition("the gain is", [mean(own)], RISES),
                Condition("less that of the displaced picture it is", [mean(own - copy)], RISES),
            ],
            f"depth {DEEP}; the displaced picture has the same frequencies and was not learned",
        )
        others = np.mean(list(gains.values()), axis=0)
        yield Claim(
            f"They turn to it more than to other pictures: {name}",
            f"gain {text(own)}, at most {1 - start.value:.2f}; of the other pictures {text(others)}: "
            + ", ".join(f"{other} {text(gain)}" for other, gain in gains.items()),
            [Condition("the gain less the mean gain of the others is", [mean(own - others)], RISES)],
            f"depth {DEEP}; those that start low have more room, and ripples have the same symmetry",
        )
    depths = {depth: runs for (name, depth), runs in results["picture"].items() if name == PICTURES[0]}
    if len(depths) == len(DEPTHS):
        ends = {d: mean([energy(r, "target", k)[-1] for r in depths[d]]) for d in DEPTHS}
        yield Claim(
            "Deeper networks align more",
            f"E({PICTURES[0]}, {k}) at the end: " + ", ".join(f"depth {d}: {end:.2f}" for d, end in ends.items()),
            [Condition("the ends by depth", list(ends.values()), Order("increase", errors=SURE))],
        )


def output_claims(results: Results) -> Iterator[Claim]:
    """What the top eigenfunctions hold of the network's output, and of the residual."""
    k = results.work.sizes.top
    for name, runs in deep_runs(results).items():
        output = [energy(r, "output", k) for r in runs]
        least = mean([np.nanmin(e) for e in output])
        yield Claim(
            f"The top eigenfunctions span the network's output during the whole optimization: {name}",
            f"E(output, {k}): at least {least:.2f}, at the end {text([e[-1] for e in output])}",
            [Condition("its least value is", [least], MOST)],
            f"depth {DEEP}; least over all snapshots; 0.9 is our reading of almost completely",
        )
    for name, runs in deep_runs(results).items():
        residual = [energy(r, "residual", k) for r in runs]
        change = mean([e[-1] - e[0] for e in residual])
        yield Claim(
            f"The residual leaves the top eigenfunctions: {name}",
            f"E(residual, {k}): {text([e[0] for e in residual])} → {text([e[-1] for e in residual])}",
            [Condition("the change is", [change], FALLS)],
            f"depth {DEEP}; in between it can rise: see the curves",
        )


def bandwidth_claims(results: Results) -> Iterator[Claim]:
    """How fast eigenfunctions vary down the spectrum."""
    correlations = {
        name: mean([_rank_correlation(r.arrays["bandwidth"][1]) for r in runs])
        for name, runs in deep_runs(results).items()
    }
    if correlations:
        yield Claim(
            "Eigenfunctions further down the spectrum vary faster",
            "rank correlation of bandwidth and place: " + ", ".join(f"{n} {c:.2f}" for n, c in correlations.items()),
            [Condition("each is", list(correlations.values()), RISES)],
            f"depth {DEEP}, the first {results.work.sizes.k} eigenfunctions at the end",
        )


def _rank_correlation(widths: np.ndarray) -> float:
    """Spearman's correlation of the bandwidths with their places; those of rounding errors are left out.

    >>> _rank_correlation(np.array([1.0, 4.0, np.nan, 3.0])), _rank_correlation(np.array([3.0, 2.0, 1.0]))
    (0.5, -1.0)
    """
    ranks = widths[np.isfinite(widths)].argsort().argsort()
    return round(float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1]), 12)
