"""What the decay of the learning rate does: the run beside one that goes on without it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ntkit.studies.claim import RISES, Claim, Condition, Within, mean
from ntkit.studies.kopitkov2019.kopitkov_setting import (
    DEPTHS,
    PICTURES,
    energy,
    file_of,
    learned,
    numbers_of,
    recorded_steps,
    text,
)
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results
from ntkit.tracking import half_squared, track
from ntkit.trajectory import train

NAME, DEPTH = PICTURES[0], DEPTHS[-1]
PLACES = (1, 2, 5, 10, 20)  # eigenvalues in the table


def parts(work: Work) -> Iterator[StudyPart]:
    """The deepest network's run without decay, for each seed."""
    for seed in work.seeds[: work.sizes.seeds]:
        name = f"{file_of(NAME, DEPTH, seed)}-without-decay"
        yield StudyPart("without decay", None, name, _without_decay, (name, seed))


def _without_decay(work: Work, name: str, seed: int) -> Result:
    """Go on from the snapshot at the decay with the learning rate as it was; track the kernel at the same steps."""
    s, at = work.sizes, learned(work, NAME, DEPTH, seed)
    later = [step - s.decay for step in recorded_steps(s.steps, s.decay) if step >= s.decay]
    at.run.load(at.model, s.decay)
    place = work.trajectory(name)
    run = train(
        at.model, (at.x, at.y), half_squared, partial(torch.optim.SGD, lr=s.lr), path=place, resume=True,
        steps=s.steps - s.decay, record=later, seed=seed,
    )  # fmt: skip
    tracked = track(run, at.x, at.y, model=at.model, loss=half_squared, k=s.k, path=place.parent / "track")
    result = numbers_of(tracked)
    return Result(result.numbers | {"steps": [step + s.decay for step in tracked.steps]}, result.arrays)


def pairs(results: Results) -> list[tuple[Result, Result]]:
    """Runs with decay and without, by seed, from the decay on."""
    with_decay = results["picture"].get((NAME, DEPTH), [])
    return list(zip(with_decay, results["without decay"].get(None, []), strict=False))


def curves_of(result: Result, top: int, decay: int) -> dict[str, np.ndarray]:
    """From the decay on: the largest eigenvalues, the trace, the energy of the target in the top, the loss."""
    from_decay = np.array([step >= decay for step in result.numbers["steps"]])
    series: dict[str, Any] = result.numbers["series"]
    eigenvalues = result.arrays["eigenvalues"].astype(float)
    found = {f"λ{i}": eigenvalues[:, i - 1] for i in PLACES if i <= eigenvalues.shape[1]}
    found |= {"trace": np.array(series["trace"]), "energy": energy(result, "target", top)}
    found["loss"] = np.array(series["loss"])
    return {name: values[from_decay] for name, values in found.items()}


def gaps(results: Results, what: str) -> np.ndarray:
    """Value at the end with decay less that without, by seed; for energies. Others in logarithms (base 10)."""
    s = results.work.sizes
    ends = np.array([[curves_of(r, s.top, s.decay)[what][-1] for r in pair] for pair in pairs(results)])
    ends = ends if what == "energy" else np.log10(ends)
    return ends[:, 0] - ends[:, 1]


def claims(results: Results) -> Iterator[Claim]:
    """The largest eigenvalue at a constant rate, and after the decay beside it."""
    s, both, note = results.work.sizes, pairs(results), f"{NAME}, depth {DEPTH}"
    if both:
        bound, steps = 2 * s.side**2 / s.lr, both[0][1].numbers["steps"]
        late = [i for i, step in enumerate(steps) if step >= s.steps / 2]
        level = mean([float(without.arrays["eigenvalues"][late, 0].mean()) / bound for _, without in both])
        growth = mean([
            math.log10(without.arrays["eigenvalues"][-1, 0] / run.arrays["eigenvalues"][0, 0]) for run, without in both
        ])  # fmt: skip
        at_decay = mean([float(without.arrays["eigenvalues"][0, 0]) / bound for _, without in both])
        yield Claim(
            "At a constant learning rate the largest eigenvalue grows, and levels at 2N / learning rate",
            f"without decay λ₁ grows {10**growth.value:.1f}-fold; of 2N / learning rate it is {at_decay:.2f} at step "
            f"{s.decay:,} and {level:.2f} in the second half of the steps",
            [
                Condition("the logarithm of the factor is", [growth], RISES),
                Condition("the last is", [level], Within(2, of=1, unit=" standard errors")),
            ],
            f"{note}; 1: where gradient descent on a quadratic becomes unstable",
        )
        change = {what: gaps(results, what) for what in ("λ1", "trace", "energy", "loss")}
        rise = mean([float(np.log10(values[-1] / values[0])) for values in _largest(results)])
        yield Claim(
            "After a decay of the learning rate the largest eigenvalue rises",
            f"λ₁ at the end over λ₁ at the decay {10**rise.value:.2f}, over λ₁ of the run without decay "
            f"{10 ** mean(change['λ1']).value:.2f}; logarithms {rise:.2f} and {text(change['λ1'])}",
            [Condition("each logarithm is", [rise, mean(change["λ1"])], RISES)],
            f"{note}; the run without decay goes on from the snapshot at step {s.decay:,}, paired by seed",
        )
        yield Claim(
            "What else the decay changes by the end",
            f"logarithm of trace {text(change['trace'])}, of loss {text(change['loss'])}; "
            f"E({NAME}, {s.top}) {text(change['energy'])}: with decay less without",
            note=f"{note}; trends, in no direction that the paper's summary states",
        )


def _largest(results: Results) -> list[np.ndarray]:
    s = results.work.sizes
    return [curves_of(run, s.top, s.decay)["λ1"] for run, _ in pairs(results)]
