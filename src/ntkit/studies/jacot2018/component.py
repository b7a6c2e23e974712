"""Figure 3: learning one kernel principal component of a batch of digits, by networks of growing width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ntkit.data import Data, load
from ntkit.measures.spectra import spectrum
from ntkit.report.words import listed, plain
from ntkit.studies.claim import Between, Bound, Claim, Condition, Estimate, Order, Within, mean
from ntkit.studies.jacot2018.interval_tests import ERRORS, slope
from ntkit.studies.jacot2018.jacot_setting import BETA, by_width, descend, limit, network, short_curve
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, Section, device, lines, table

DEPTHS = (4, 5)  # the paper does not state the depth: its eigenvalues decide
DEPTH = 5  # of the networks trained
WIDE_BETA = 1.0
TOP = 3
SIZE = 0.5  # of the component that is learned
PAPER = (0.0457, 0.00108, 0.00078)
POINTS = 100  # of the curves
MARKED = (0, 1, 7)  # digits with a color of their own
DIGITS = {"mnist": "MNIST digits", "digits": "scikit-learn digits"}


def digits(work: Work, name: str, seed: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
    """A batch of images with pixels in [0, 1], [N, pixels] float64, and their labels; the study's batch by default."""
    data = _loaded(name, work.folder_of(name))
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))
    order = order[: count or work.sizes.batch]
    return data.x_train[order].flatten(1).double().to(device()), data.y_train[order]


@cache
def _loaded(name: str, folder: Path | None) -> Data:
    return load(name, folder)


def components(x: Tensor, depth: int, beta: float = BETA) -> tuple[Tensor, Tensor, float]:
    """Top eigenvalues of Theta_inf / N, [3], eigenvectors with mean square 1, [N, 3], and their largest residual."""
    top = spectrum(limit(depth, x, beta=beta), k=TOP)
    return top.eigenvalues / len(x), top.eigenvectors * len(x) ** 0.5, float(top.residuals.max())


def parts(work: Work) -> Iterator[StudyPart]:
    """Eigenvalues of the limit; networks that learn a component, by width."""
    (data,) = work.sets
    yield eigenvalues(data)
    yield from (
        learning(data, width, seed) for width in work.sizes.component_widths for seed in range(work.sizes.trials)
    )


def eigenvalues(data: str) -> StudyPart:
    """Eigenvalues for both depths and betas over random batches; the components of the first batch."""
    return StudyPart("eigenvalues", None, f"eigenvalues-{data}", _eigenvalues, (data,))


def _eigenvalues(work: Work, data: str) -> Result:
    values: dict[str, list[list[float]]] = {f"{d} {b}": [] for d in DEPTHS for b in (BETA, WIDE_BETA)}
    residual, flat = 0.0, []
    for seed in range(work.sizes.batches):
        x, _ = digits(work, data, seed)
        for depth in DEPTHS:
            for beta in (BETA, WIDE_BETA):
                top, vectors, residual_of_one = components(x, depth, beta)
                values[f"{depth} {beta}"].append(top.tolist())
                residual = max(residual, residual_of_one)
                if (depth, beta) == (DEPTH, BETA):
                    flat.append(float(vectors[:, 0].mean().abs()))
    x, labels = digits(work, data)
    vectors = components(x, DEPTH)[1]
    numbers = {"values": values, "residual": residual, "means_1": flat}
    return Result(numbers, {"components": vectors.cpu().numpy(), "labels": labels.numpy()})


def learning(data: str, width: int, seed: int) -> StudyPart:
    """One network on its way from f_0 to f_0 + f^(2) / 2: what is left along the component, and beside it.

    With r_t = f_t - f* and <.,.> the mean over the batch, g_t = <r_t, f^(2)> and |h_t|^2 = |r_t|^2 - g_t^2.
    """
    return StudyPart("learning", width, f"component-{data}-{width}-seed-{seed}", _learning, (data, width, seed))


def _learning(work: Work, data: str, width: int, seed: int) -> Result:
    count = work.sizes.component_steps
    x, _ = digits(work, data)
    second = components(x, DEPTH)[1][:, 1]
    x = x.float()
    twin = network(x, width, DEPTH, seed)
    with torch.no_grad():
        target = twin.model(x)[:, 0] + SIZE * second.float()
    every = max(1, count // POINTS)
    steps: list[int] = []
    residuals: list[Tensor] = []

    def watch(step: int, out: Tensor) -> None:
        if step % every == 0 or step == count:
            steps.append(step)
            residuals.append((out - target).double().cpu())

    rates = [_along(twin(x), second)]
    descend(twin, x, target, count, watch, lr=work.sizes.component_lr)
    rates.append(_along(twin(x), second))
    rest = torch.stack(residuals)
    g = rest @ second.cpu() / len(x)
    beside = rest - g[:, None] * second.cpu()
    h = beside.square().mean(1).sqrt()
    certificate = float((g.square() + h.square() - rest.square().mean(1)).abs().max())
    numbers = {"steps": steps, "rates": rates, "pythagoras": certificate}
    return Result(numbers, {"g": g.abs().numpy(), "h": h.numpy()})


def _along(K: Tensor, f: Tensor) -> float:
    """Rate at which a kernel learns a component, <f, K f> / N^2 with <f, f> = N; lambda for its own."""
    return float(f @ K.double() @ f) / len(f) ** 2


def expected(rate: float, steps: np.ndarray, lr: float) -> np.ndarray:
    """What is left of the component at infinite width after steps of gradient descent: SIZE exp(-rate t) in the limit
    of small steps.
    """
    return SIZE * (1 - lr * rate) ** steps


def _spread(results: Results, depth: int, beta: float = BETA) -> list[Estimate]:
    """Mean and standard deviation over batches of the top eigenvalues."""
    values = np.asarray(results.one("eigenvalues").numbers["values"][f"{depth} {beta}"])
    return [Estimate(float(m), float(d)) for m, d in zip(values.mean(0), values.std(0, ddof=1), strict=True)]


def _gap(results: Results, depth: int) -> tuple[float, float]:
    """lambda_1 / lambda_2 with beta = 0.1, and its factor with beta = 1 (means over batches)."""
    values = results.one("eigenvalues").numbers["values"]
    small, wide = (np.asarray(values[f"{depth} {beta}"]) for beta in (BETA, WIDE_BETA))
    ratios = [float((v[:, 0] / v[:, 1]).mean()) for v in (small, wide)]
    return ratios[0], ratios[1] / ratios[0]


def own_rate(results: Results) -> float:
    """lambda_2 of the batch that is learned."""
    return results.one("eigenvalues").numbers["values"][f"{DEPTH} {BETA}"][0][1]


def _steps(results: Results) -> np.ndarray:
    return np.asarray(next(iter(results["learning"].values()))[0].numbers["steps"])


def _by_width(results: Results) -> tuple[dict[int, Estimate], dict[int, Estimate], dict[int, Estimate]]:
    """By width: largest distance of what is left of the component from the limit's, largest residual beside it, and
    interpolated steps until half of the component is learned (infinite where it is not).
    """
    steps, off, beside, half = _steps(results), {}, {}, {}
    exact = expected(own_rate(results), steps, results.work.sizes.component_lr)
    for n, runs in sorted(results["learning"].items()):
        halves = [_crossing(steps, r.arrays["g"], SIZE / 2) for r in runs]
        off[n] = mean([float(np.abs(r.arrays["g"] - exact).max()) for r in runs])
        beside[n] = mean([float(r.arrays["h"].max()) for r in runs])
        half[n] = mean(halves) if math.isfinite(max(halves)) else Estimate(math.inf)
    return off, beside, half


def _half_text(results: Results, half: Estimate) -> str:
    return f"{half:.0f}" if math.isfinite(half.value) else f"not by step {int(_steps(results)[-1]):,}"


def _crossing(t: np.ndarray, values: np.ndarray, level: float) -> float:
    """Where a curve first falls to a level.

    >>> _crossing(np.array([0, 10, 20]), np.array([1.0, 0.6, 0.2]), 0.5)
    12.5
    """
    below = np.flatnonzero(values <= level)
    if not len(below):
        return math.inf
    i = int(below[0])
    return float(t[i] if i == 0 else np.interp(-level, -values[i - 1 : i + 1], t[i - 1 : i + 1]))


def eigenvalue_claims(results: Results) -> Iterator[Claim]:
    """Top eigenvalues, the first component, the gap."""
    s = results.work.sizes
    mnist = results.work.sets == ["mnist"]
    names = ("λ₁", "λ₂", "λ₃")
    for depth in DEPTHS:
        values = _spread(results, depth)
        conditions = [
            Condition(f"{name} is" if not k else name, [value], Within(3, of=PAPER[k], unit=" standard deviations"))
            for k, (name, value) in enumerate(zip(names, values, strict=True))
        ]
        yield Claim(
            f"The top eigenvalues are {listed([f'{v:g}' for v in PAPER])}: {depth} weight layers",
            ", ".join(f"{value:.{k}f}" for value, k in zip(values, (4, 5, 5), strict=True)),
            conditions if mnist else [],
            f"of Θ∞ / N; mean and standard deviation over {s.batches} batches of {s.batch}. The paper does not state "
            "the depth" + ("" if mnist else "; not tested, since its digits are MNIST’s"),
        )
    flat = results.one("eigenvalues").numbers["means_1"]
    yield Claim(
        "The first component is almost constant",
        f"|mean| over root mean square: {mean(flat):.4f}, at least {min(flat):.4f}",
        [Condition("in every batch it is", flat, Bound("over", 0.95))],
        f"1 for a constant, 0.95 our reading of “almost”; {s.batches} batches",
    )
    gaps = {depth: _gap(results, depth) for depth in DEPTHS}
    yield Claim(
        "With β = 1 the gap between the first two eigenvalues is about ten times bigger (footnote 3)",
        ", ".join(f"λ₁/λ₂ {ratio:.1f}, × {factor:.1f} ({d} layers)" for d, (ratio, factor) in gaps.items()),
        [Condition("every factor is", [factor for _, factor in gaps.values()], Between(5, 20))],
        f"half to twice as much, our reading of “about”; means over {s.batches} batches",
    )


def learning_claims(results: Results) -> Iterator[Claim]:
    """Learning along the component and beside it, by width."""
    off, beside, halves = _by_width(results)
    s, rate = results.work.sizes, own_rate(results)
    trials = f"{s.trials} trials each"
    for words, values, what in (
        ("Along a principal component learning tends to exp(−λ₂ t) as the width grows", off, "largest distance to it"),
        ("What is learned beside the component is smaller in wider networks", beside, "largest ‖h‖"),
    ):
        fall = slope(values)
        yield Claim(
            words,
            f"{what}: {by_width(values, 3)}; slope {fall:.3f}",
            [Condition("with the width they", list(values.values()), Order("decrease")),
             Condition("the slope is", [fall], Bound("under", 0, errors=ERRORS))],
            f"λ₂ = {plain(rate)}; {trials}",
        )  # fmt: skip
    infinite = math.log(1 / 2) / math.log(1 - s.component_lr * rate)
    texts = ", ".join(f"{_half_text(results, half)} (n = {n:,})" for n, half in halves.items())
    yield Claim(
        "Narrower networks converge faster",
        f"steps until half of the component is learned: {texts}; limit {infinite:.0f}",
        [Condition("with the width, up to the limit, the steps", [*halves.values(), Estimate(infinite, 0)],
                   Order("increase", errors=2))],
        trials,
    )  # fmt: skip


def eigenvalue_sections(results: Results) -> Iterator[Section]:
    """The principal components and their eigenvalues."""
    s = results.work.sizes
    (data,) = results.work.sets
    eigen = results.one("eigenvalues")
    rows = [
        [f"{depth} weight layers, β = {beta:g}",
         *(_eigenvalue_text(k, e) for k, e in enumerate(_spread(results, depth, beta)))]
        for depth in DEPTHS for beta in (BETA, WIDE_BETA)
    ]  # fmt: skip
    rows.append(["printed in the paper, β = 0.1", *(_eigenvalue_text(k, v) for k, v in enumerate(PAPER))])
    vectors, labels = eigen.arrays["components"], eigen.arrays["labels"]
    groups = [(f"digit {c}", labels == c) for c in MARKED] + [("other digits", ~np.isin(labels, MARKED))]
    classes = [short_curve(name, vectors[mask, 1], vectors[mask, 2]) for name, mask in groups]
    gaps = ", ".join(f"× {_gap(results, depth)[1]:.1f} with {depth} layers" for depth in DEPTHS)
    items = [
        table("Top eigenvalues", ["Network", "λ₁", "λ₂, 10⁻³", "λ₃, 10⁻³"], rows,
              f"β = 1 widens λ₁/λ₂ {gaps}."
              + ("" if data == "mnist" else " The paper’s digits are MNIST’s: not to be compared.")),
        lines("The batch in the second and third component",
              f"{DEPTH} weight layers; components have mean square 1. The first, not drawn, is almost constant: |mean| "
              f"{mean(eigen.numbers['means_1']):.4f}.",
              "second component", "third component", [("", classes)], style="dots", wide=True),
    ]  # fmt: skip
    text = (
        f"Eigenvalues of Θ∞ / N over {s.batches} batches of {s.batch} images, pixels in [0, 1], not centered; ± is the "
        "standard deviation from batch to batch."
    )
    yield Section(f"Figure 3a: principal components of {DIGITS[data]}", "Components", text, items)


def _eigenvalue_text(k: int, value: float | Estimate) -> str:
    """The first eigenvalue as it is, the others in 10⁻³."""
    scale, digits = (1, 4) if k == 0 else (1e3, 2)
    scaled = Estimate(scale * value.value, scale * value.error) if isinstance(value, Estimate) else scale * value
    return f"{scaled:.{digits}f}"


def learning_sections(results: Results) -> Iterator[Section]:
    """Learning along one of them."""
    s, rate, t = results.work.sizes, own_rate(results), _steps(results)
    off, beside, halves = _by_width(results)
    infinite = short_curve("infinite width", t, expected(rate, t, s.component_lr), dash="dash")

    def curves(what: str) -> list[Item]:
        runs = results["learning"]
        return [short_curve(f"n = {n:,}", t, r.arrays[what]) for n in off for r in runs[n]]

    rows = []
    for n in off:
        rates = (mean([1e3 * r.numbers["rates"][i] for r in results["learning"][n]]) for i in (0, 1))
        half = _half_text(results, halves[n])
        rows.append([f"{n:,}", *(f"{value:.3f}" for value in rates), half, f"{off[n]:.3f}", f"{beside[n]:.4f}"])
    columns = ["Width", "Rate at the start, 10⁻³", "at the end, 10⁻³", "Steps to half", "Off the limit’s curve"]
    items = [
        lines("Left along the component, ‖g‖",
              f"Limit ½ exp(−λ₂t), λ₂ = {plain(rate)}. Largest distance to it: {by_width(off, 3)}.",
              "step t", "‖g‖", [("", [*curves("g"), infinite])], ordered=True),
        lines("Beside the component, ‖h‖", f"Largest: {by_width(beside, 3)}.", "step t", "‖h‖", [("", curves("h"))],
              ordered=True),
        table("By width", [*columns, "Largest ‖h‖"], rows,
              f"Rate: ⟨f⁽²⁾, Θ f⁽²⁾⟩ / N² of the network’s own kernel; {1e3 * rate:.3f} · 10⁻³ in the limit."),
    ]  # fmt: skip
    text = (
        "Networks go from f₀ towards f₀ + f⁽²⁾/2. Of the residual, g is the rest along the second component, h the "
        "part beside it; norms are root mean squares over the batch."
    )
    yield Section("Figures 3b and 3c: learning along one component", "Learning", text, items)
