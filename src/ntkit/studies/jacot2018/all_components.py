"""All leading kernel principal components, one after the other: the rate of each against its eigenvalue."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ntkit.measures.spectra import spectrum
from ntkit.studies.claim import Bound, Claim, Condition, Estimate, mean
from ntkit.studies.jacot2018.component import DEPTH, digits
from ntkit.studies.jacot2018.interval_tests import ERRORS, power
from ntkit.studies.jacot2018.jacot_setting import by_width, course, limit, network, outputs, short_curve
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, device, lines, table

LEADING = 8
BATCH = 128
LR = 10.0
SIZE = 0.2  # of the component in the target


def parts(work: Work) -> Iterator[StudyPart]:
    """Networks by width."""
    (data,) = work.sets
    for width in work.sizes.leading_widths:
        yield StudyPart("leading", width, f"leading-{data}-{width}", _rates, (data, width))


def leading(x: Tensor) -> tuple[Tensor, Tensor]:
    """Top eigenvalues of Theta_inf / N, [8], and eigenvectors with mean square 1, [N, 8]."""
    top = spectrum(limit(DEPTH, x), k=LEADING)
    return top.eigenvalues / len(x), top.eigenvectors * len(x) ** 0.5


def half_lives(eigenvalues: Tensor) -> list[int]:
    """Steps after which half of each component, or less, is left in the limit: (1 - lr lambda)^steps <= 1/2.

    >>> half_lives(torch.tensor([0.05, 0.001]))
    [1, 69]
    """
    return [int(steps) for steps in torch.ceil(-np.log(2) / torch.log1p(-LR * eigenvalues))]


def _rates(work: Work, data: str, width: int) -> Result:
    """Rates by network and component, [networks, 8], and the eigenvalues, [networks, 8]: a batch for each network."""
    rates, values = [], []
    for seed in range(work.sizes.leading_seeds):
        x, _ = digits(work, data, 700 + seed, BATCH)
        eigenvalues, vectors = leading(x)
        x, vectors = x.float().to(device()), vectors.to(device())
        own = []
        for i, steps in enumerate(half_lives(eigenvalues)):
            twin = network(x, width, DEPTH, 6_000_000 + 1_000 * width + seed)
            target = outputs(twin, x) + (SIZE * vectors[:, i]).float()
            left = (target - course(twin, x, target, steps, LR)[-1]).double() @ vectors[:, i] / len(x)
            own.append((1 - max(float(left) / SIZE, 0.0) ** (1 / steps)) / LR)
        rates.append(own)
        values.append(eigenvalues.tolist())
    return Result({}, {"rates": np.asarray(rates), "eigenvalues": np.asarray(values)})


def slopes(run: Result) -> np.ndarray:
    """Slope of log rate against log eigenvalue, by network: [networks]."""
    pairs = zip(np.log(run.arrays["eigenvalues"]), np.log(run.arrays["rates"]), strict=True)
    return np.asarray([np.polyfit(x, y, 1)[0] for x, y in pairs])


def ranks(run: Result) -> np.ndarray:
    """Rank correlation of rates and eigenvalues, by network: [networks]."""
    pairs = zip(run.arrays["eigenvalues"], run.arrays["rates"], strict=True)
    return np.asarray([stats.spearmanr(x, y).statistic for x, y in pairs])


def claims(results: Results) -> Iterator[Claim]:
    """Each rate against its eigenvalue; the largest first."""
    runs = {n: found[0] for n, found in results["leading"].items()}
    wide = max(runs)
    ratio = {n: mean((run.arrays["rates"] / run.arrays["eigenvalues"]).mean(1)) for n, run in runs.items()}
    slope = {n: mean(slopes(run)) for n, run in runs.items()}
    how = (
        f"the {LEADING} leading components, each alone from the same start, rates from what is left at the "
        "limit’s half-life of each; "
        f"{results.work.sizes.leading_seeds} networks of each width, each with its own batch of {BATCH}"
    )
    yield Claim(
        "Every leading component is learned at the rate of its eigenvalue",
        f"slope of log rate against log eigenvalue {by_width(slope, 3)}; rate over eigenvalue {by_width(ratio, 3)}",
        [power(f"the slope at n = {wide:,} is", slope[wide], 1)],
        how,
    )
    lead = {n: mean(run.arrays["rates"][:, 0] / run.arrays["rates"][:, 1:].max(1)) for n, run in runs.items()}
    order = {n: mean(ranks(run)) for n, run in runs.items()}
    yield Claim(
        "Learning is fastest along the largest components",
        f"rate of the first over the fastest of the others {by_width(lead, 1)}; rank correlation of rates and "
        f"eigenvalues {by_width(order, 2)}",
        [Condition("at every width the first’s is", list(lead.values()), Bound("over", 1, errors=ERRORS)),
         Condition("the rank correlation is", list(order.values()), Bound("over", 0, errors=ERRORS))],
        how,
    )  # fmt: skip


def sections(results: Results) -> list[Section]:
    """Rates over eigenvalues."""
    runs = {n: found[0] for n, found in results["leading"].items()}
    curves, columns = [], []
    for n, run in runs.items():
        x, rates = run.arrays["eigenvalues"].mean(0), [mean(column) for column in run.arrays["rates"].T]
        curves.append(short_curve(f"n = {n:,}", x, [r.value for r in rates], error=[r.error for r in rates]))
        columns.append([_thousandths(r) for r in rates])
    x = next(iter(runs.values())).arrays["eigenvalues"].mean(0)
    curves.append(short_curve("rate = eigenvalue", x, x, dash="dash"))
    rows = [[str(i + 1), f"{1e3 * x[i]:.3f}", *(column[i] for column in columns)] for i in range(LEADING)]
    items = [
        lines("Rate by eigenvalue", "Means over networks and their batches.", "eigenvalue", "rate", [("", curves)],
              log="xy"),
        table("Rates, 10⁻³", ["Component", "Eigenvalue", *(f"n = {n:,}" for n in runs)], rows),
    ]  # fmt: skip
    text = f"The target is the network’s own start and {SIZE:g} of one of the leading components."
    return [Section("All leading components", "All components", text, items)]


def _thousandths(rate: Estimate) -> str:
    return f"{Estimate(1e3 * rate.value, 1e3 * rate.error):.3f}"
