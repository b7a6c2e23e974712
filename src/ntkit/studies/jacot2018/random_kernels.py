"""Figure 1: the kernel of random networks, its spread, its limit, and its growth in training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ntkit.measures.convergence import convergence
from ntkit.networks.parametrization import to_ntk_parametrization
from ntkit.report.words import listed
from ntkit.studies.claim import Bound, Claim, Condition, Estimate, Order, Within, mean
from ntkit.studies.jacot2018.interval_tests import ERRORS, mean_test, means_test, not_rejected, power
from ntkit.studies.jacot2018.jacot_setting import (
    BETA,
    DEPTH,
    by_width,
    circle,
    descend,
    limit,
    network,
    short,
    short_curve,
    template,
)
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, device, lines, table

ANGLES = torch.linspace(-3, 3, 61, dtype=torch.float64)
TESTED = range(0, 61, 10)
ZERO = 30  # where the angle is 0: the diagonal
AT_0 = 0.2825  # of the closed form, computed independently of this library
_PROBES = torch.arange(8, dtype=torch.float64) * math.pi / 4


def parts(work: Work) -> Iterator[StudyPart]:
    """The rate of convergence; kernels in training by width."""
    yield StudyPart("rate", None, "kernel-rate", _rate)
    for width in work.sizes.kernel_widths:
        for seed in range(work.sizes.seeds):
            yield StudyPart("kernels", width, f"kernel-{width}-seed-{seed}", _training, (width, seed))


def _rate(work: Work) -> Result:
    """Distance of the kernels of untrained networks to their limit, against their width."""
    x = circle(_PROBES).to(device())
    model = to_ntk_parametrization(template(x, DEPTH), w_std=1.0, b_std=BETA)
    rate = convergence(model, x, widths=work.sizes.rate_widths, seeds=work.sizes.rate_seeds)
    mean, error, exact = (t[0].cpu().numpy() for t in (rate.mean[-1], rate.standard_error[-1], rate.limit))
    numbers = {
        "widths": list(rate.widths),
        "seeds": rate.seeds,
        "slope": rate.slope,
        "slope_error": rate.slope_error,
        "agrees": rate.agrees,
        "limit_at_0": float(rate.limit[0, 0]),
        **{n: getattr(rate, n).tolist() for n in ("distance", "distance_error", "mean_distance", "mean_error")},
        "p": means_test(mean, error, exact, rate.seeds),
        "mean_at_0": rate.mean[:, 0, 0].tolist(),
        "deviation_at_0": rate.deviation[:, 0, 0].tolist(),
    }
    return Result(numbers, {})


def limit_curve() -> Tensor:
    """The limit along the circle, Theta_inf(x_0, x(g)), [angles]."""
    return limit(DEPTH, circle(ANGLES[ZERO : ZERO + 1]), circle(ANGLES))[0]


def _training(work: Work, width: int, seed: int) -> Result:
    """Kernel of one network along the circle before and after training, float32: [2, angles]."""
    s = work.sizes
    x = torch.randn(s.inputs, 2, generator=torch.Generator().manual_seed(1000 + seed)).to(device())
    around = circle(ANGLES).to(x)
    twin = network(x, width, DEPTH, seed)
    before = twin(around[ZERO : ZERO + 1], around)[0]
    losses: list[float] = []
    y = x[:, 0] * x[:, 1]

    def watch(step: int, out: Tensor) -> None:
        if step in (0, s.kernel_steps):
            losses.append(float((out - y).square().mean() / 2))

    descend(twin, x, y, s.kernel_steps, watch)
    after = twin(around[ZERO : ZERO + 1], around)[0]
    numbers = {"losses": losses, "before_at_0": float(before[ZERO]), "inflation": float(after[ZERO] / before[ZERO]) - 1}
    return Result(numbers, {"curves": torch.stack([before, after]).cpu().double().numpy()})


def _kernels(runs: list[Result], time: int) -> np.ndarray:
    """Kernels along the circle before (0) or after training (1), [seeds, angles]."""
    return np.stack([r.arrays["curves"][time] for r in runs])


def _distance(runs: list[Result]) -> float:
    """Distance of the untrained networks' mean kernel from the limit, in Monte-Carlo errors (of the whole curve)."""
    kernels, exact = _kernels(runs, 0), limit_curve().numpy()
    error = kernels.std(0, ddof=1) / len(kernels) ** 0.5
    return float(np.linalg.norm(kernels.mean(0) - exact) / np.linalg.norm(error))


def _inflation(results: Results) -> dict[int, Estimate]:
    """Growth of the kernel at angle 0 in training, in percent, by width."""
    return {n: mean([100 * r.numbers["inflation"] for r in runs]) for n, runs in results["kernels"].items()}


def claims(results: Results) -> Iterator[Claim]:
    """The limit, the spread around it, and the kernel's growth."""
    s = results.work.sizes
    rate = results.one("rate").numbers
    value, slope = rate["limit_at_0"], Estimate(rate["slope"], rate["slope_error"])
    yield Claim(
        f"The kernel of a random network tends to a limit in closed form: Θ∞ at angle 0, {DEPTH} weight layers",
        f"{value:.6f}; the {rate['seeds']} widest networks (n = {rate['widths'][-1]:,}) have "
        f"{Estimate(rate['mean_at_0'][-1], rate['deviation_at_0'][-1] / rate['seeds'] ** 0.5):.4f}",
        [Condition("the limit is", [value], Within(1e-9, of=AT_0)),
         not_rejected(f"the widest networks’ mean kernel, at {len(_PROBES)} angles,", rate["p"])],
        "the paper’s recursion gives this value, and the figure’s axis fits it",
    )  # fmt: skip
    constants = [d * n**0.5 for d, n in zip(rate["deviation_at_0"], rate["widths"], strict=True)]
    yield Claim(
        "Wider networks’ kernels spread less: as 1/√n",
        f"slope of log distance against log width {slope:.3f}; standard deviation at "
        f"angle 0 times √n: {', '.join(f'{c:.2f}' for c in constants)}",
        [power("the slope is", slope, -0.5)],
        f"{rate['seeds']} networks each of widths {listed([f'{n:,}' for n in rate['widths']])}; the paper shows that "
        "it falls",
    )
    p = {n: mean_test(_kernels(runs, 0)[:, TESTED], limit_curve().numpy()[TESTED])
         for n, runs in results["kernels"].items()}  # fmt: skip
    at_0 = {n: mean(_kernels(runs, 0)[:, ZERO]) for n, runs in results["kernels"].items()}
    yield Claim(
        "The mean of the kernel at the start is the limit’s for both widths",
        f"at angle 0 {by_width(at_0, 4)}, limit {value:.4f}; p values {by_width(p, 2)}",
        [not_rejected(f"n = {n:,}", p[n]) for n in p],
        f"{s.seeds} networks each, two-sided t tests at {len(TESTED)} angles, together",
    )
    inflation = _inflation(results)
    narrow, wide = min(inflation), max(inflation)
    yield Claim(
        "The kernel inflates in training, much less in wide networks",
        f"at angle 0 after {s.kernel_steps} steps: {by_width({n: inflation[n] for n in (narrow, wide)}, 1, ' %')}",
        [Condition("in the narrow networks it is", [inflation[narrow]], Bound("over", 0, errors=ERRORS)),
         Condition("from them to the wide ones it does", [inflation[narrow], inflation[wide]],
                   Order("decrease", errors=ERRORS))],
        f"{s.seeds} networks each; the paper gives no number",
    )  # fmt: skip


def sections(results: Results) -> list[Section]:
    """Kernels along the circle, their mean, their distance to the limit."""
    s = results.work.sizes
    rate, infinite = results.one("rate").numbers, short_curve("infinite width", ANGLES, limit_curve(), dash="dash")
    random, means, rows = [], [], []
    inflation = _inflation(results)
    for n, runs in results["kernels"].items():
        before, after = _kernels(runs, 0), _kernels(runs, 1)
        random.append((f"n = {n:,}", [*(short_curve("random networks", ANGLES, k) for k in before), infinite]))
        kinds = (("mean at the start", before), (f"mean after {s.kernel_steps} steps", after))
        means.append((f"n = {n:,}", [*(short_curve(name, ANGLES, k.mean(0)) for name, k in kinds), infinite]))
        deviation = before[:, ZERO].std(ddof=1)
        rows.append([
            f"{n:,}", str(len(runs)), f"{mean(before[:, ZERO]):.4f}", f"{deviation:.4f}", f"{deviation * n**0.5:.2f}",
            f"{_distance(runs):.1f}", f"{inflation[n]:.1f} %",
        ])  # fmt: skip
    widths = np.asarray(rate["widths"], dtype=float)
    half_power = rate["distance"][0] * (widths / widths[0]) ** -0.5
    distances = [
        short_curve("single networks", widths, rate["distance"], error=short(rate["distance_error"])),
        short_curve("their mean", widths, rate["mean_distance"]),
        short_curve("Monte-Carlo error of the mean", widths, rate["mean_error"], dash="dash"),
        short_curve("slope −1/2", widths, half_power, dash="dot"),
    ]
    columns = ["Width", "Networks", "Θ at 0", "Deviation", "times √n", "Mean off the limit", "Inflation"]
    items = [
        lines("Tangent kernels along the circle, at the start",
              f"{s.seeds} networks of each width; their deviation at γ = 0 is in the table.",
              "angle γ", "Θ(x₀, x)", random, wide=True),
        lines("Their mean, before and after training", f"At γ = 0 the kernel grows by {by_width(inflation, 1, ' %')}.",
              "angle γ", "Θ(x₀, x)", means, wide=True),
        lines("Distance to the limit",
              f"Single networks: slope {Estimate(rate['slope'], rate['slope_error']):.3f} (−1/2 expected). The mean of "
              f"{rate['seeds']} of the largest width is {100 * rate['mean_distance'][-1]:.1f} % off; the Monte-Carlo "
              f"error is {100 * rate['mean_error'][-1]:.1f} %.",
              "width n", "|K − Θ∞| / |Θ∞|", [("", distances)], log="xy", wide=True),
        table("At angle 0", columns, rows,
              f"Limit {rate['limit_at_0']:.4f}. Mean off the limit: over the whole curve, in Monte-Carlo errors."),
    ]  # fmt: skip
    text = (
        f"Θ(x₀, x) with x₀ = (1, 0) and x at angle γ on the circle, of {s.seeds} networks with {DEPTH} weight layers, "
        "before and after training, beside the limit of infinite width."
    )
    return [Section("Figure 1: the kernel of random networks", "Kernel", text, items)]
