"""Outputs of untrained networks against the Gaussian process of infinite width: marginals, covariance, kurtosis."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ntkit.measures.convergence import Twin
from ntkit.networks.parametrization import to_ntk_parametrization
from ntkit.networks.widening import redraw, reshaped
from ntkit.report.words import plain
from ntkit.studies.claim import Claim, Condition, Estimate, Within, mean
from ntkit.studies.jacot2018.interval_tests import (
    ERRORS,
    jackknife,
    mean_test,
    normal_test,
    not_rejected,
    power,
    rejected,
    slope,
)
from ntkit.studies.jacot2018.jacot_setting import BETA, DEPTH, by_width, circle, limit, outputs, short, template
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, curve, device, lines, table

ANGLES = (-2.6, -1.3, 0.0, 0.7, 2.0)
LEADING = 64  # from this width on the kurtosis is compared with a power of the width


def points() -> Tensor:
    """The five points of the circle at which outputs are compared, [5, 2] float64."""
    return circle(torch.tensor(ANGLES, dtype=torch.float64))


def covariance() -> Tensor:
    """The limit's covariance at the points, [5, 5].

    >>> bool((torch.linalg.eigvalsh(covariance()) > 0).all())
    True
    """
    return limit(DEPTH, points(), kind="nngp")


def parts(work: Work) -> Iterator[StudyPart]:
    """Many random networks of each width."""
    for width in work.sizes.output_widths:
        yield StudyPart("outputs", width, f"outputs-{width}", _outputs, (width,))


def _outputs(work: Work, width: int) -> Result:
    """Outputs f of random networks, [networks, 5], and given their hidden layers f(x)'s variance, [networks, 5]."""
    x = points().to(device())
    network, recipe = reshaped(to_ntk_parametrization(template(x, DEPTH), w_std=1.0, b_std=BETA), width, x[:2])
    factors = {f"{name}.{what}": draw.factor for (name, what), draw in recipe.items() if draw.factor is not None}
    twin = Twin(network, factors, "nngp")
    f, given = [], []
    for seed in range(work.sizes.output_seeds):
        redraw(network, recipe, 1_000_000 + seed)
        f.append(outputs(twin, x))
        given.append(twin(x).diagonal())
    return Result({}, {"f": torch.stack(f).cpu().numpy(), "given": torch.stack(given).detach().cpu().numpy()})


def white(f: np.ndarray) -> np.ndarray:
    """Outputs in coordinates in which the limit's are standard normal, [networks, 5]."""
    return np.linalg.solve(np.linalg.cholesky(covariance().numpy()), f.T).T


def products(f: np.ndarray) -> np.ndarray:
    """f(x) f(x') for every pair of points, [networks, 15], over the root of the limit's variances."""
    i, j = np.triu_indices(len(ANGLES))
    return f[:, i] * f[:, j] / _scale()


def _scale() -> np.ndarray:
    i, j = np.triu_indices(len(ANGLES))
    variance = covariance().diagonal().numpy()
    return np.sqrt(variance[i] * variance[j])


def _expected() -> np.ndarray:
    i, j = np.triu_indices(len(ANGLES))
    return covariance().numpy()[i, j] / _scale()


def excess(given: np.ndarray) -> Estimate:
    """Excess kurtosis of the outputs, mean over the points: 3 Var(v) / E(v)^2, for f is normal with variance v given
    the hidden layers.
    """
    total = jackknife(given / covariance().diagonal().numpy())
    return Estimate(*(3 * part / given.shape[1] for part in total))


def claims(results: Results) -> Iterator[Claim]:
    """The process at the widest networks, that the test can reject, and how fast networks tend to it."""
    runs = {n: found[0].arrays for n, found in results["outputs"].items()}
    narrow, wide = min(runs), max(runs)
    count = f"{results.work.sizes.output_seeds:,} networks with {DEPTH} weight layers, at {len(ANGLES)} points"
    p = {n: normal_test(white(run["f"])) for n, run in runs.items()}
    yield Claim(
        "At the start outputs of wide networks are a Gaussian process: their distribution is normal",
        f"p value {p[wide]:.2f} at n = {wide:,}, {plain(p[narrow], 2)} at n = {narrow}",
        [not_rejected(f"n = {wide:,}", p[wide]), rejected(f"n = {narrow}", p[narrow])],
        f"{count}; Kolmogorov’s test of each whitened coordinate and of their squared length, which must also tell "
        "narrow networks from the process",
    )
    own = mean_test(products(runs[wide]["f"]), _expected())
    ratio = mean((white(runs[wide]["f"]) ** 2).mean(1))
    yield Claim(
        "Their covariance is the limit’s kernel",
        f"mean of z², of whitened outputs z, at n = {wide:,}: {ratio:.3f}; p value of all products {own:.2f}",
        [not_rejected(f"the means of all products f(x) f(x’), n = {wide:,},", own),
         Condition("the mean of z² is", [ratio], Within(ERRORS, of=1, unit=" standard errors"))],
        f"{count}; two-sided t tests of the means of f(x) f(x’)",
    )  # fmt: skip
    kurtosis = {n: excess(run["given"]) for n, run in runs.items()}
    rate = slope({n: k for n, k in kurtosis.items() if n >= LEADING})
    yield Claim(
        "They become normal as the width grows: the excess kurtosis falls as 1/n",
        f"{by_width(kurtosis, 3)}; slope {rate:.3f}",
        [power(f"the slope from n = {LEADING} on is", rate, -1)],
        f"{count}; 3 Var(v)/E(v)², v the variance of f(x) given the hidden layers",
    )


def sections(results: Results) -> list[Section]:
    """Quantiles of the outputs, and the kurtosis by width."""
    runs = {n: found[0].arrays for n, found in results["outputs"].items()}
    grid = np.linspace(0.005, 0.995, 100)
    normal = torch.special.ndtri(torch.from_numpy(grid)).numpy()
    curves = [curve(f"n = {n:,}", short(normal), short(np.quantile(white(run["f"]), grid))) for n, run in runs.items()]
    curves.append(curve("normal", short(normal), short(normal), dash="dash"))
    rows = [
        [f"{n:,}", f"{normal_test(white(run['f'])):.2g}", f"{mean_test(products(run['f']), _expected()):.2g}",
         f"{excess(run['given']):.3f}"]
        for n, run in runs.items()
    ]  # fmt: skip
    items = [
        lines("Quantiles of whitened outputs", "On the dashed line they are normal with the limit’s covariance.",
              "normal quantile", "quantile of the outputs", [("", curves)], ordered=True),
        table("By width", ["Width", "p value: normal", "p value: covariance", "Excess kurtosis"], rows,
              "p values by Bonferroni over coordinates and over products."),
    ]  # fmt: skip
    text = (
        f"Outputs of {results.work.sizes.output_seeds:,} untrained networks of each width at {len(ANGLES)} points of "
        "the circle, in coordinates in which the limit’s are independent and standard normal."
    )
    return [Section("At the start: a Gaussian process", "Start", text, items)]
