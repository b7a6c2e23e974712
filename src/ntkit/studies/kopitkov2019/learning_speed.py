"""How fast each eigenfunction is learned: one plain step of gradient descent from every snapshot."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch

from ntkit.studies.claim import RISES, SURE, Bound, Claim, Condition, Within, mean
from ntkit.studies.kopitkov2019.kopitkov_setting import DEPTHS, LearnedPicture
from ntkit.studies.part import Result
from ntkit.studies.study import Results
from ntkit.tracking import Tracked

EXPECTED = Within(2, of=1, unit=" standard errors")


def one_step(at: LearnedPicture, tracked: Tracked, top: int) -> dict[str, np.ndarray]:
    """What one step at the learning rate of that time does to the residual m, in float64.

    ``removed`` [T, k]: the share of the component along eigenvector i that it removes, 1 - <v_i, m'> / <v_i, m>, to
    first order lr lambda_i / n. ``weight`` [T, k]: <v_i, m>^2 / |m|^2. ``removed_parts`` [T, 2]: the same share of the
    residual's part in the top eigenvectors, 1 - <P m, P m'> / |P m|^2, and of the rest.
    """
    x, y = at.x.double(), at.y.double()
    removed, weight, of_parts = [], [], []
    for step, rate in zip(tracked.steps, tracked.series["learning_rate"], strict=True):
        at.run.load(at.model, step)
        network = copy.deepcopy(at.model).double()
        before = network(x) - y
        slopes = torch.autograd.grad(0.5 * (before**2).mean(), list(network.parameters()))
        with torch.no_grad():
            for p, slope in zip(network.parameters(), slopes, strict=True):
                p -= rate * slope
            after = (network(x) - y).squeeze(1)
        m, V = before.detach().squeeze(1), torch.from_numpy(tracked.eigenvectors(step)).to(x)
        c, d = V.T @ m, V.T @ after
        removed.append(1 - d / c)
        weight.append(c**2 / (m**2).sum())
        inside, kept = (c[:top] ** 2).sum(), (c[:top] * d[:top]).sum()
        of_parts.append(1 - torch.stack([kept / inside, (m @ after - kept) / (m @ m - inside)]))
    rows = {"removed": removed, "weight": weight, "removed_parts": of_parts}
    return {name: torch.stack(values).cpu().numpy() for name, values in rows.items()}


def points(result: Result, row: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """At a snapshot: eigenvalues, and rates (share removed times n / learning rate) that first order says equal them.

    Of the components with at least an equal share 1/n of the residual; the others are mostly what the larger ones
    leave in them at second order.
    """
    a, rate = result.arrays, result.numbers["series"]["learning_rate"][row]
    counts = (a["weight"][row] > 1 / n) & (a["eigenvalues"][row] > 0)
    return a["eigenvalues"][row][counts].astype(float), a["removed"][row][counts] * n / rate


def slopes(result: Result, n: int) -> tuple[list[float], float]:
    """Slope of log rate in log eigenvalue at every snapshot with three components or more; share of those that grew.

    Components that grew in the step have no logarithm and are left out.

    >>> arrays = {"eigenvalues": np.array([[8.0, 4, 2, 1]]), "weight": np.full((1, 4), 0.2)}
    >>> arrays["removed"] = 0.1 * arrays["eigenvalues"] ** 2 / 10
    >>> result = Result({"series": {"learning_rate": [0.1]}}, arrays)
    >>> [round(slope, 12) for slope in slopes(result, 10)[0]]
    [2.0]
    """
    found, grew, count = [], 0, 0
    for row in range(len(result.arrays["removed"])):
        eigenvalues, rates = points(result, row, n)
        falls = rates > 0
        grew, count = grew + int((~falls).sum()), count + len(rates)
        if falls.sum() >= 3:
            found.append(float(np.polyfit(np.log(eigenvalues[falls]), np.log(rates[falls]), 1)[0]))
    return found or [float("nan")], grew / max(count, 1)


def claims(results: Results) -> Iterator[Claim]:
    """Top eigenfunctions against the rest; the rate of each against its eigenvalue."""
    s, deep = results.work.sizes, DEPTHS[-1]
    by_picture = {name: runs for (name, depth), runs in results["picture"].items() if depth == deep}
    for name, runs in by_picture.items():
        parts = np.array([r.arrays["removed_parts"].mean(0) for r in runs])
        more = np.array([_faster(r) for r in runs])
        yield Claim(
            f"Learning along the top eigenfunctions is fast: {name}",
            f"one step removes {100 * mean(parts[:, 0]).value:.2g} % of the residual in the top {s.top}, "
            f"{100 * mean(parts[:, 1]).value:.2g} % of the rest".replace("-", "−")
            + f"; more of it at {100 * mean(more).value:.0f} % of the snapshots",
            [
                Condition("the first share less the second is", [mean(parts[:, 0] - parts[:, 1])], RISES),
                Condition("the share of the snapshots is", [mean(more)], Bound("over", 0.5, errors=SURE)),
            ],
            f"depth {deep}; mean over snapshots; what overshoots counts as removed; typically: at most snapshots",
        )
    for name, runs in by_picture.items():
        found = [slopes(r, s.side**2) for r in runs]
        slope, early, late = (
            mean([float(np.mean(part(of_one))) for of_one, _ in found]) for part in (_all, _first_half, _second_half)
        )
        grew = mean([share for _, share in found]).value
        yield Claim(
            f"Each eigenfunction is learned at the rate of its eigenvalue: {name}",
            f"slope of the rate in the eigenvalue, in logarithms: {slope:.3f}; in the first half of the snapshots "
            f"{early:.3f}, in the second {late:.3f}; {100 * grew:.0f} % of the components grow instead",
            [Condition("the slope is", [slope], EXPECTED), Condition("it is", [slope], RISES)],
            f"depth {deep}; 1 to first order; of the first {s.k} the components with at least 1/n of the residual",
        )


def _all(values: list[float]) -> list[float]:
    return values


def _first_half(values: list[float]) -> list[float]:
    return values[: (len(values) + 1) // 2]


def _second_half(values: list[float]) -> list[float]:
    return values[len(values) // 2 :]


def _faster(result: Result) -> float:
    """Share of the snapshots at which a step removes more of the residual's top part than of the rest."""
    top, rest = result.arrays["removed_parts"].T
    return float((top > rest).mean())
