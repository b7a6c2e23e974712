"""Early stopping: test errors along training with wrong labels and without, the stop chosen on other examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.explanations.retrainings import subsets
from ntkit.machines.flow import GradientFlow
from ntkit.measures.convergence import Twin
from ntkit.studies.claim import Bound, Claim, Condition, mean
from ntkit.studies.jacot2018.component import digits
from ntkit.studies.jacot2018.interval_tests import ERRORS
from ntkit.studies.jacot2018.jacot_setting import DEPTH, descend, limit, network, outputs, short_curve
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Results, Section, lines

TRAIN, VALIDATION, TEST = 60, 200, 400
WRONG = 0.25  # share of the training labels
LR = 8.0
KINDS = ("network", "limit")
LONG = 1_000_000  # steps, of the limit alone
MORE = 500  # training digits, of the limit alone
EXPERIMENTS = ("stopping", *(f"stopping of {train}" for train in (TRAIN, MORE)))


def parts(work: Work) -> Iterator[StudyPart]:
    """One part without wrong labels, one with them."""
    (data,) = work.sets
    for case, share in (("clean", 0.0), ("wrong", WRONG)):
        yield StudyPart("stopping", case, f"stopping-{data}-{case}", _errors, (data, share))
        for train in (TRAIN, MORE):
            name = f"stopping-late-{data}-{case}-{train}"
            yield StudyPart(f"stopping of {train}", case, name, _limit_errors, (data, share, train))


def moments(steps: int) -> list[int]:
    """Steps at which errors are computed, about evenly spaced on a logarithmic axis.

    >>> moments(100)[:4], moments(100)[-1]
    ([0, 1, 2, 3], 100)
    """
    return [0, *sorted({round(steps**share) for share in np.linspace(0, 1, 30)})]


class Trial(NamedTuple):
    """Digits, their right labels, those given for training, and a network at its start with its outputs."""

    x: Tensor
    y: Tensor
    given: Tensor
    twin: Twin
    start: Tensor


def trial(work: Work, data: str, share: float, seed: int, train: int = TRAIN) -> Trial:
    """A trial with a share of the training labels flipped; labels are 1 for digits from 5 on, -1 for the others."""
    x, labels = digits(work, data, 900 + seed, train + VALIDATION + TEST)
    y = torch.where(labels >= 5, 1.0, -1.0).double().to(x.device)
    given = y[:train].clone()
    if share:
        wrong = subsets(train, share, 1, seed)[0].to(x.device)
        given = torch.where(wrong, -given, given)
    twin = network(x.float(), work.sizes.stopping_width, DEPTH, 7_000_000 + seed)
    return Trial(x, y, given, twin, outputs(twin, x.float()).double())


def closed_form(of: Trial, at: list[int]) -> Tensor:
    """Outputs in the limit from the network's start after so many steps, [moments, n]."""
    train = len(of.given)
    K = limit(DEPTH, of.x, of.x[:train])
    flow = GradientFlow(lr=LR).fit(K[:train], of.given, initial=of.start[:train])
    return flow.predict(K, t=at, initial=of.start)


def _errors(work: Work, data: str, share: float) -> Result:
    """Squared errors along training against right labels, of networks and of the limit: [trials, moments]."""
    at, errors = moments(work.sizes.stopping_steps), []
    for seed in range(work.sizes.stopping_seeds):
        of = trial(work, data, share, seed)
        seen, done = [], 0
        for step in at:
            descend(of.twin, of.x[:TRAIN].float(), of.given.float(), step - done, lr=LR)
            done = step
            seen.append(outputs(of.twin, of.x.float()).double())
        errors.append(squared(of, "network", torch.stack(seen)) | squared(of, "limit", closed_form(of, at)))
    return Result({}, {name: np.asarray([e[name] for e in errors]) for name in errors[0]})


def _limit_errors(work: Work, data: str, share: float, train: int) -> Result:
    """The same of the limit alone, for much longer, from so many digits."""
    trials = (trial(work, data, share, seed, train) for seed in range(work.sizes.stopping_seeds))
    errors = [squared(of, "end", closed_form(of, moments(LONG))) for of in trials]
    return Result({}, {name: np.asarray([e[name] for e in errors]) for name in errors[0]})


def squared(of: Trial, kind: str, f: Tensor) -> dict[str, list[float]]:
    """Mean squared errors of outputs, [moments, n], against right labels on the validation and the test digits."""
    off = (f - of.y).square()[:, len(of.given) :]
    validation, test = off[:, :VALIDATION], off[:, VALIDATION:]
    return {f"{kind}_validation": validation.mean(1).tolist(), f"{kind}_test": test.mean(1).tolist()}


def gains(run: Result, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """By trial: the moment of the smallest validation error, and the test error at the end less that at this moment.

    >>> error = np.array([[3.0, 1.0, 2.0]])
    >>> [values.tolist() for values in gains(Result({}, {"a_validation": error, "a_test": 2 * error}), "a")]
    [[1], [2.0]]
    """
    stop = run.arrays[f"{kind}_validation"].argmin(1)
    test = run.arrays[f"{kind}_test"]
    return stop, test[:, -1] - test[np.arange(len(test)), stop]


def claims(results: Results) -> Iterator[Claim]:
    """Stopping early helps where labels are wrong, in networks and in the limit."""
    s = results.work.sizes
    for experiment, kind, steps, train, words in (
        ("stopping", "network", s.stopping_steps, TRAIN, f"networks of width {s.stopping_width:,}"),
        ("stopping", "limit", s.stopping_steps, TRAIN, "the limit’s closed form, as many steps"),
        (f"stopping of {TRAIN}", "end", LONG, TRAIN, f"the limit’s closed form to its end, {TRAIN} digits"),
        (f"stopping of {MORE}", "end", LONG, MORE, f"the limit’s closed form to its end, {MORE} digits"),
    ):
        clean, wrong = (results.one(experiment, case) for case in ("clean", "wrong"))
        at = moments(steps)
        (stop, gain), (_, without) = gains(wrong, kind), gains(clean, kind)
        won, more = mean(gain), mean(gain - without)
        before = mean([np.log10(max(at[i], 1) / at[-1]) for i in stop])
        end = mean(wrong.arrays[f"{kind}_test"][:, -1])
        yield Claim(
            f"What is learned late is not worth learning where labels are wrong: early stopping helps, {words}",
            f"squared test error at the end {end:.3f}, less at the stop {won:.3f}; that gain less the one with right "
            f"labels {more:.3f}; the stop at 10^({before:.2f}) of the time",
            [Condition("the gain is", [won], Bound("over", 0, errors=ERRORS)),
             Condition("the gain over that with right labels is", [more], Bound("over", 0, errors=ERRORS)),
             Condition("the logarithm of the stop’s share of the time is", [before], Bound("under", 0, errors=ERRORS))],
            f"{s.stopping_seeds} trials, each with its own {train} digits, {100 * WRONG:g} % of their labels wrong, "
            f"and its own network; the stop is chosen on {VALIDATION} digits, judged on {TEST} others; {at[-1]:,} "
            f"steps at rate {LR:g}; errors against right labels",
        )  # fmt: skip


def sections(results: Results) -> list[Section]:
    """Test errors along training."""
    at, late = moments(results.work.sizes.stopping_steps)[1:], moments(LONG)[1:]
    panels = []
    for case, heading in (("clean", "right labels"), ("wrong", f"{100 * WRONG:g} % wrong labels")):
        network_errors = results.one("stopping", case).arrays["network_test"].mean(0)[1:]
        curves = [short_curve("networks", at, network_errors)]
        for train in (TRAIN, MORE):
            limit_errors = results.one(f"stopping of {train}", case).arrays["end_test"].mean(0)[1:]
            curves.append(short_curve(f"limit, {train} digits", late, limit_errors))
        panels.append((heading, curves))
    figure = lines("Test error along training", "Squared error against right labels, mean over trials.",
                   "step", "error", panels, log="xy", wide=True)  # fmt: skip
    text = (
        f"Networks of width {results.work.sizes.stopping_width:,} learn whether a digit is at least 5 from {TRAIN} "
        f"digits; the limit’s closed form starts from their outputs, and learns from {MORE} digits, too."
    )
    return [Section("Early stopping", "Stopping", text, [figure])]
