"""Claims on the sentences of Jacot's abstract: each passes on results as the theory has them and fails on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ntkit.studies.jacot2018 import (
    all_components,
    definiteness,
    early_stopping,
    function_space,
    interval_tests,
    kernel_constancy,
    kernel_gradient,
    outputs_at_start,
)
from ntkit.studies.jacot2018.jacot_setting import circle, course, limit, network
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results

SIZES = Sizes(
    output_seeds=800, gradient_seeds=10, constancy_seeds=20, constancy_steps=100, sets=10, flow_seeds=10,
    leading_seeds=10, stopping_seeds=10, stopping_steps=100, stopping_width=100, batch=24,
)  # fmt: skip
WIDTHS = (64, 256, 1024)


def verdict(module, words, by_experiment):
    results = Results(Work(SIZES, (), ["digits"], Path()), by_experiment)
    (claim,) = (claim.record() for claim in module.claims(results) if words in claim.text)
    return claim["holds"]


def scattered(mean, relative, count=10, seed=0):
    """Values around a mean, with a relative deviation and exactly this mean."""
    z = np.random.default_rng(seed).normal(size=count)
    return mean * (1 + relative * (z - z.mean()) / z.std())


# ---------------------------------------------------------------------- the tests themselves


def test_a_level_is_a_level():
    """Of many draws as the hypothesis has them, each test rejects about as many as its level says, at most."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 20, 4))
    rejected = {
        "means": np.mean([interval_tests.mean_test(s, np.zeros(4)) < 0.05 for s in x]),
        "variances": np.mean([interval_tests.variance_test(s, np.zeros(4), np.ones(4)) < 0.05 for s in x]),
        "normal": np.mean([interval_tests.normal_test(s) < 0.05 for s in x]),
    }
    assert all(0.02 < share < 0.08 for share in rejected.values()), rejected


def test_the_error_of_a_variance_is_its_spread():
    rng = np.random.default_rng(1)
    found = [interval_tests.jackknife(rng.normal(size=(30, 5))) for _ in range(400)]
    assert np.mean([f.value for f in found]) == pytest.approx(5, rel=0.03)
    assert np.mean([f.error for f in found]) == pytest.approx(np.std([f.value for f in found]), rel=0.1)


def test_slopes():
    exact = interval_tests.slope({n: interval_tests.Estimate(3 / n, 0.1 / n) for n in WIDTHS})
    assert exact.value == pytest.approx(-1)
    assert exact.error == pytest.approx(0.1 / 3 / (2 * np.log(4) ** 2) ** 0.5)
    line = interval_tests.against([1, 2, 4, 8], [1, 2, 4, 9])
    assert line.value == pytest.approx((1.5 * np.log(9) + 0.5 * np.log(2)) / (5 * np.log(2)))
    _, covariance = np.polyfit(np.log([1, 2, 4, 8]), np.log([1, 2, 4, 9]), 1, cov=True)
    assert line.error == pytest.approx(covariance[0, 0] ** 0.5)


# ---------------------------------------------------------------------- at the start


def random_outputs(scale=1.0, heavy=False, power=-1.0):
    rng = np.random.default_rng(2)
    root = np.linalg.cholesky(outputs_at_start.covariance().numpy())
    own = np.diag(root @ root.T)
    parts = {}
    for n in (8, 64, 256, 1024):
        z = rng.normal(size=(800, 5))
        if n == 8 or heavy:
            z = z * np.exp(rng.normal(size=(800, 1)))
        given = own * (1 + np.sqrt(5 / 64 * (n / 64) ** power) * rng.normal(size=(800, 1)))
        parts[n] = [Result({}, {"f": scale * z @ root.T, "given": given})]
    return {"outputs": parts}


def test_the_process_is_judged():
    normal, covariance, kurtosis = "distribution is normal", "covariance is the limit", "excess kurtosis"
    judged = lambda words, **how: verdict(outputs_at_start, words, random_outputs(**how))
    assert judged(normal)
    assert not judged(normal, heavy=True)
    assert not judged(normal, scale=0.8)
    assert not judged(normal, scale=0.0)
    assert judged(covariance)
    assert not judged(covariance, scale=0.85)
    assert not judged(covariance, scale=1.15)
    assert not judged(covariance, scale=0.0)
    assert judged(kurtosis)
    assert not judged(kurtosis, power=0.0)
    assert not judged(kurtosis, power=-1.5)


def test_random_networks_have_the_variance_that_their_outputs_show():
    """Outputs given the hidden layers: f / root of that variance is standard normal at every width."""
    part = outputs_at_start._outputs(Work(Sizes(output_seeds=600), (), ["digits"], Path()), 6)
    z = part.arrays["f"] / np.sqrt(part.arrays["given"])
    assert all(interval_tests.normal_test(z[:, [i]]) > 1e-3 for i in range(5))
    assert interval_tests.normal_test(outputs_at_start.white(part.arrays["f"])) < 1e-3


# ---------------------------------------------------------------------- the kernel gradient


def gradients(central=1e-9, order=2, power=-0.5):
    rates = np.asarray(kernel_gradient.RATES)
    errors = [list(e * rates ** (order - 1)) for e in (0.1, 0.2)]
    parts = {
        n: [Result({
            cost: {"central": [central, 1e-10], "errors": errors, "limit": scattered(3 * n**power, 0.2)}
            for cost in kernel_gradient.COSTS
        }, {})] for n in WIDTHS
    }  # fmt: skip
    return {"gradient": parts}


def test_the_kernel_gradient_is_judged():
    judged = lambda words, **how: verdict(kernel_gradient, words, gradients(**how))
    assert judged("follows the kernel gradient")
    assert not judged("follows the kernel gradient", central=1e-4)
    assert not judged("follows the kernel gradient", order=1)
    assert not judged("follows the kernel gradient", order=3)
    for cost in kernel_gradient.COSTS:
        assert judged(f"limit’s: {cost}")
        assert not judged(f"limit’s: {cost}", power=0.0)
        assert not judged(f"limit’s: {cost}", power=-1.0)


def test_one_step_follows_the_kernel_and_no_other():
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, twin = x[:4].prod(1), network(x, 40, 3, seed=1)
    before = [p.detach().clone() for p in twin.model.parameters()]
    f = twin.model(x)[:, 0].detach()
    slopes = (f[:4] - y) / 4
    torch.testing.assert_close(kernel_gradient.cost_gradient(kernel_gradient.COSTS["square"], f[:4], y), slopes)
    near = 1e-6
    ahead, behind = (kernel_gradient.moved(twin, x, y, kernel_gradient.COSTS["square"], r) for r in (near, -near))
    found = (ahead - behind) / (2 * near)
    expected = -twin(x, x[:4]) @ slopes
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert kernel_gradient._distance(found, 1.01 * expected) > kernel_gradient.NEAR
    assert all(torch.equal(p, old) for p, old in zip(twin.model.parameters(), before, strict=True))


# ---------------------------------------------------------------------- constancy


def kernels(power=-1.0, change=-1.0, learned=0.9):
    rng = np.random.default_rng(3)
    exact = limit(4, circle(kernel_constancy.PROBES)).numpy()[np.triu_indices(8)]
    parts = {}
    for n in WIDTHS:
        start = exact * (1 + 3 * n ** (power / 2) * rng.normal(size=(20, 36)))
        moved = np.outer(scattered(50 * n**change, 0.2, 20), [0.5, 1.0, 0.9])
        losses = [[1.0, 1 - value] for value in scattered(learned, 0.01, 20)]
        parts[n] = [Result({"losses": losses}, {"start": start, "change": moved})]
    return {"constancy": parts}


def test_constancy_is_judged():
    judged = lambda words, **how: verdict(kernel_constancy, words, kernels(**how))
    assert judged("kernel is random")
    assert not judged("kernel is random", power=0.0)
    assert not judged("kernel is random", power=-2.0)
    assert judged("kernel is constant")
    assert judged("kernel is constant", change=-0.5)
    assert not judged("kernel is constant", change=-0.25)
    assert not judged("kernel is constant", change=0.0)
    assert not judged("kernel is constant", learned=-0.5)


# ---------------------------------------------------------------------- definiteness


def descents(relu=0.05, singular=1e-16, own=0.01, speed=1.0, power=-0.5, floor=1.0, rest=0.01):
    values = {name: [relu] * 10 for name in definiteness.DEFINITE} | {n: [singular] * 10 for n in definiteness.SINGULAR}
    lows = np.linspace(0.01, 0.03, 10)
    steps = 2 * np.arange(200)

    def run(rates, floors):
        costs = {
            f"cost {i}": f + (1 - definiteness.LR * r) ** steps
            for i, (r, f) in enumerate(zip(rates, floors, strict=True))
        }
        numbers = {"limit": list(lows), "own": list(own / 0.01 * lows), "points": [3] * 10, "floor": list(floors)}
        return Result(numbers, costs)

    off = np.where(np.arange(10) % 2, 1.0, -1.0)
    parts = {
        n: [run(speed * lows * (1 + scattered(0.19, 0.2) * off * (n / 64) ** power), np.zeros(10))] for n in WIDTHS
    }
    twice = run(rest / 0.01 * lows, np.full(10, 0.5))
    twice = Result(twice.numbers | {"floor": [0.5 * floor] * 10}, twice.arrays)
    return {"definiteness": {None: [Result(values, {})]}, "descent": parts | {"twice": [twice]}}


def test_definiteness_and_convergence_are_judged():
    judged = lambda words, **how: verdict(definiteness, words, descents(**how))
    assert judged("positive definite with two or more layers")
    assert not judged("positive definite with two or more layers", relu=1e-14)
    assert not judged("positive definite with two or more layers", relu=-0.01)
    assert not judged("positive definite with two or more layers", singular=1e-6)
    assert judged("makes training converge", own=0.005)
    assert not judged("makes training converge", own=0.02)
    assert judged("at last at the rate")
    assert not judged("at last at the rate", speed=0.8)
    assert not judged("at last at the rate", speed=1.25)
    assert not judged("at last at the rate", power=0.0)
    assert judged("does not go to zero", rest=0.02)
    assert not judged("does not go to zero", rest=0.005)
    assert not judged("does not go to zero", rest=0.02, floor=1.1)


def test_the_limit_is_definite_where_it_should_be():
    found = definiteness._eigenvalues(Work(Sizes(sets=3), (), ["digits"], Path())).numbers
    assert all(min(found[name]) > 1e-3 for name in definiteness.DEFINITE)
    assert all(max(found[name]) < 1e-14 for name in definiteness.SINGULAR)


# ---------------------------------------------------------------------- function space


def flows(power=-0.5, gap=0.1, error=-0.5, bias=0.0):
    parts = {}
    for n in WIDTHS:
        own = np.outer(scattered(2 * n**power, 0.2), np.ones(5))
        arrays = {"ntk_train": own, "ntk_new": own, "nngp_new": own + scattered(gap, 0.3, seed=1)[:, None]}
        signs = np.where(np.arange(10) % 2, 1.0, -1.0)
        ratios = np.outer(1 + bias + signs * scattered(n**error, 0.2), np.ones(5))
        errors = {"network": ratios.tolist(), "limit": np.ones((10, 5)).tolist()}
        parts[n] = [Result({"errors": errors}, arrays)]
    return {"function space": parts}


def test_function_space_is_judged():
    judged = lambda words, **how: verdict(function_space, words, flows(**how))
    times = (f"until time {8 * function_space.STEPS[moment]:,}" for moment in function_space.MOMENTS)
    what = ("linear differential equation in training", "what they answer at new inputs")
    for words in (f"{one}, {time}" for time in times for one in what):
        assert judged(words)
        assert not judged(words, power=0.0)
        assert not judged(words, power=-1.0)
    assert judged("not the covariance")
    assert not judged("not the covariance", gap=-0.1)
    assert judged("Test errors")
    assert not judged("Test errors", error=0.0)
    assert not judged("Test errors", bias=0.2)
    assert not judged("Test errors", bias=-0.2)


def test_a_course_and_its_closed_form():
    """With the network's own kernel in place of the limit's the closed form meets a very wide network."""
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, twin = x.prod(1), network(x, 3000, 2, seed=0)
    K, start = twin(x) / 5, twin.model(x)[:, 0].detach()
    seen = course(twin, x, y, 6, 2.0)
    assert torch.equal(seen[0], start)
    assert len(seen) == 7
    steps = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - 2.0 * K, 6)
    torch.testing.assert_close(seen[-1], y + steps @ (start - y), rtol=0, atol=0.02)


# ---------------------------------------------------------------------- components, early stopping


def components(power=1.0, first=1.0):
    values = np.tile(np.geomspace(0.05, 0.0004, 8), (10, 1))
    rates = values**power * (1 + 0.05 * np.random.default_rng(5).normal(size=values.shape))
    rates[:, 0] *= first
    return {"leading": {n: [Result({}, {"rates": rates, "eigenvalues": values})] for n in WIDTHS}}


def test_components_are_judged():
    judged = lambda words, **how: verdict(all_components, words, components(**how))
    assert judged("Every leading component")
    assert not judged("Every leading component", power=0.9)
    assert not judged("Every leading component", power=1.1)
    assert judged("fastest along")
    assert not judged("fastest along", first=0.3)
    assert not judged("fastest along", power=-1.0)
    assert not judged("fastest along", power=0.0)


def stops(gain=0.3, clean=0.0):
    rng = np.random.default_rng(6)

    def run(worse, kinds, steps):
        m, errors = len(early_stopping.moments(steps)), {}
        down, up = np.linspace(2, 1, m), np.linspace(0, 1, m) ** 2
        for kind in kinds:
            shape = down + 2.5 * worse * up + 0.02 * rng.normal(size=(10, 1))
            errors |= {f"{kind}_validation": shape + 0.01 * rng.normal(size=shape.shape), f"{kind}_test": shape}
        return [Result({}, errors)]

    cases = {"clean": clean, "wrong": gain}
    return {
        "stopping": {c: run(worse, early_stopping.KINDS, SIZES.stopping_steps) for c, worse in cases.items()},
    } | {
        f"stopping of {train}": {c: run(worse, ["end"], early_stopping.LONG) for c, worse in cases.items()}
        for train in (early_stopping.TRAIN, early_stopping.MORE)
    }


def test_early_stopping_is_judged():
    for words in ("networks of width", "as many steps", "60 digits", "500 digits"):
        judged = lambda words=words, **how: verdict(early_stopping, words, stops(**how))
        assert judged(gain=0.8)
        assert not judged(gain=0.0)
        assert not judged(gain=0.8, clean=1.6)
