"""The paper's three questions as claims, one for each task, and what it does not ask: exact influence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ntkit.studies.claim import RISES, Bound, Claim, Condition, Estimate, mean
from ntkit.studies.study import Results
from ntkit.studies.tsai2023.methods import EXACT, EXISTING, IMPORTANCES, KERNELS, METHODS, NEW
from ntkit.studies.tsai2023.predictions import PREDICTIONS

Values = Callable[[Results, str, str], np.ndarray]  # results, task, method -> one number per test point, over seeds


def deleted(direction: str) -> Values:
    """Mean change over the shares removed, for each test point: the larger, the better, for both directions."""

    def values(results: Results, task: str, method: str) -> np.ndarray:
        runs = results["deletion"][task]
        changes = np.concatenate([run.arrays[f"{method}: {direction}"].mean(1) for run in runs])
        return changes if direction == "lowest" else -changes

    return values


def predicted(what: str) -> Values:
    """Rank correlation for each test point."""

    def values(results: Results, task: str, method: str) -> np.ndarray:
        return np.concatenate([run.arrays[f"{method}: {what}"] for run in results["predictions"][task]])

    return values


def area(results: Results, task: str, method: str, direction: str) -> Estimate:
    """AUC-DEL+ (direction "highest") or AUC-DEL- ("lowest"), with its standard error over test points."""
    values = deleted(direction)(results, task, method)
    return mean(values if direction == "lowest" else -values)


def correlation(results: Results, task: str, method: str, what: str) -> Estimate:
    """Mean rank correlation, with its standard error over test points."""
    values = predicted(what)(results, task, method)
    return mean(values[np.isfinite(values)])


def _gaps(results: Results, task: str, values: Values, better: str, others: Sequence[str]) -> list[Estimate]:
    """Paired differences over test points: of a method from each of the others."""
    own = values(results, task, better)
    differences = [own - values(results, task, other) for other in others]
    return [mean(difference[np.isfinite(difference)]) for difference in differences]


def _comparison(
    results: Results, task: str, title: str, better: Sequence[str], others: Sequence[str]
) -> Iterator[Claim]:
    """Claims that some methods are better than others, one for each direction of case deletion."""
    several = len(better) > 1
    for direction, name in (("lowest", "AUC-DEL−"), ("highest", "AUC-DEL+")):
        found = {one: _gaps(results, task, deleted(direction), one, others) for one in better}
        pairs = [
            f"{one + ' ' if several else ''}over {other} {gap:.3f}"
            for one, gaps in found.items()
            for other, gap in zip(others, gaps, strict=True)
        ]
        every = [gap for gaps in found.values() for gap in gaps]
        conditions = [Condition("each difference is", every, RISES)]
        yield Claim(f"{title}: {name}, {task}", ", ".join(pairs), conditions, _protocol(results, task))


def _protocol(results: Results, task: str) -> str:
    runs = results["deletion"][task]
    points = sum(len(run.arrays["random: lowest"]) for run in runs)
    return (
        "differences are paired over test points, in the direction that is better; the network is trained again from "
        f"the same start in the same batches; {points} test points of {len(runs)} trained networks"
    )


def questions(results: Results) -> Iterator[Claim]:
    """The paper's findings, one task after the other."""
    end = KERNELS[2]
    for task in results["deletion"]:
        tracking, *others = (f"{importance} x {end}" for importance in reversed(IMPORTANCES))
        yield from _comparison(
            results, task, "With one kernel, tracking is the best importance", [tracking], tuple(others)
        )
    for task in results["deletion"]:
        better = [f"tracking x {kernel}" for kernel in KERNELS[2:]]
        title = "With one importance, the tangent kernel at the end and the influence kernel beat the last layer"
        yield from _comparison(results, task, title, better, (f"tracking x {KERNELS[0]}",))
    for task in results["deletion"]:
        yield from _comparison(results, task, "The new combination beats existing methods", [NEW], EXISTING)


def exact(results: Results) -> Iterator[Claim]:
    """Claims on what the paper does not ask: whether the derivative through training says what deletion does."""
    for task in results["predictions"]:
        for method, what, words in (
            (EXACT[0], PREDICTIONS[0], "what leaving one example out does"),
            (EXACT[1], PREDICTIONS[2], "what leaving half of the examples out does"),
        ):
            others = tuple(m for m in METHODS if m not in EXACT and m != "random")
            gaps = _gaps(results, task, predicted(what), method, others)
            found = {other: correlation(results, task, other, what) for other in others}
            best = max(found, key=lambda other: found[other].value)
            runs = results["scores"][task]
            smooth = mean([run.numbers["certificates"][f"{method}: metasmoothness"] for run in runs])
            yield Claim(
                f"{method.capitalize()} predicts {words} better than every method that is not exact, {task}",
                f"rank correlation {correlation(results, task, method, what):.3f}; next best: {best}, "
                f"{found[best]:.3f}; metasmoothness {smooth.value:.2f}",
                [Condition("each difference is", gaps, RISES)],
                "the paper does not ask it; differences are paired over test points",
            )


def checks(results: Results) -> Iterator[Claim]:
    """Certificates of the numbers above."""
    found = [run.numbers["certificates"] for runs in results["scores"].values() for run in runs]
    if not found:
        return
    surrogate = [v for c in found for name, v in c.items() if name.endswith("kkt_residual")]
    path = [c["path kernel: error"] for c in found]
    yield Claim(
        "Surrogates solve their problem, and the path kernel’s sums are the predictions",
        f"largest relative residuals: {max(surrogate):.1g} of the surrogates, {max(path):.1g} of the path kernel "
        "(float32)",
        [
            Condition("the surrogates’ are", surrogate, Bound("at most", 1e-8)),
            Condition("the path kernel’s are", path, Bound("at most", 1e-4)),
        ],
        "checks of this study",
    )
    differences = [c[f"{method}: finite_differences"] for c in found for method in EXACT]
    yield Claim(
        "Exact influence is the derivative of training",
        f"largest relative distance from finite differences of whole runs: {max(differences):.1g}",
        [Condition("it is", differences, Bound("at most", 1e-2))],
        "networks in float32, finite differences in float64; a check of this study",
    )


CLAIMS = (questions, exact, checks)
