"""The study of the kernel's limit at a toy size: numbers known from elsewhere, resumed, judged, drawn."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ntkit
from ntkit.base.checks import Refused
from ntkit.studies import jacot2018 as jacot
from ntkit.studies.jacot2018 import component, jacot_setting, random_kernels, regression
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results

TOY = Sizes(
    output_widths=(4, 80, 160), output_seeds=40, gradient_widths=(16, 64), gradient_seeds=3,
    rate_widths=(20, 60), rate_seeds=4, kernel_widths=(20, 200), seeds=3, inputs=8, kernel_steps=5,
    constancy_widths=(16, 64), constancy_seeds=4, constancy_steps=20, sets=5, descent_widths=(30, 60),
    curve_widths=(10, 40), curve_seeds=3, curve_steps=30, flow_widths=(16, 64), flow_seeds=3,
    component_widths=(8, 30), trials=2, batch=24, component_steps=40, component_lr=1.0, batches=2,
    leading_widths=(16, 32), leading_seeds=2, stopping_width=16, stopping_seeds=2, stopping_steps=50,
)  # fmt: skip
PI = torch.tensor([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1], dtype=torch.float64) * math.pi
THETA = {  # worked out apart from this library
    1: (0.51, 0.471940, 0.363553, 0.01, -0.343553, -0.49),
    2: (0.52, 0.454304, 0.340534, 0.096216, -0.020961, -0.011317),
    3: (0.4025, 0.335198, 0.249001, 0.107849, 0.052936, 0.051957),
    4: (0.2825, 0.227084, 0.169971, 0.092702, 0.066036, 0.064354),
}
SIGMA_4 = (0.08125, 0.077510, 0.069867, 0.055760, 0.049239, 0.048097)
GAUSSIAN = {  # angle / pi: mean and deviation after infinite time
    0: (0.04393, 0.13728), 0.25: (0.24310, 0.05103), 0.5: (0.29887, 0.07400), 0.75: (0.24865, 0.03761),
    1: (-0.04634, 0.12848), -0.25: (-0.14453, 0.05103), -0.5: (-0.29297, 0.07400),
}  # fmt: skip


def patched(patch, scale=TOY):
    patch.setattr(jacot, "STUDY", replace(jacot.STUDY, scales=jacot.SCALES | {"quick": scale}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("jacot") / "run", []

    def stop(line):
        said.append(line)
        if line == "curves-40-seed-1":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        with pytest.raises(KeyboardInterrupt):
            ntkit.study("jacot2018", out=place, say=stop)
        assert said.pop().startswith("Stopped.")
        titles = [section["title"] for section in record(place)["sections"]]
        assert (len(titles), titles[-1]) == (5, "Positive definiteness and convergence")  # what was finished
        assert (place / "report.html").exists()
        first = list(said)
        assert ntkit.study("jacot2018", out=place, say=said.append) == place
        assert said[len(first)] == first[-1]  # the stopped part is computed again, nothing else
        assert len(set(said)) == len(said) - 1
        before = (place / "results.json").read_bytes()
        again: list[str] = []
        ntkit.study("jacot2018", out=place, say=again.append)
        assert (place / "results.json").read_bytes() == before  # same run, same bytes
        assert not again
        with pytest.raises(Refused, match="another run"):
            ntkit.study("jacot2018", scale="paper", out=place)
        patched(patch, Sizes(**vars(TOY) | {"inputs": 9}))
        with pytest.raises(Refused, match="another run"):
            ntkit.study("jacot2018", out=place)
    return place


def record(folder):
    return json.loads((folder / "results.json").read_text())


# ---------------------------------------------------------------------- numbers known from elsewhere


@pytest.mark.parametrize("depth", THETA)
def test_the_limit_has_the_known_values(depth):
    found = jacot_setting.limit(depth, jacot_setting.circle(PI[:1]), jacot_setting.circle(PI))[0]
    np.testing.assert_allclose(found, THETA[depth], atol=6e-7)


def test_the_covariance_and_the_overlay():
    found = jacot_setting.limit(4, jacot_setting.circle(PI[:1]), jacot_setting.circle(PI), kind="nngp")[0]
    np.testing.assert_allclose(found, SIGMA_4, atol=6e-7)
    overlay = random_kernels.limit_curve()
    assert float(overlay[random_kernels.ZERO]) == pytest.approx(0.2825, abs=1e-12)
    assert int(overlay.argmax()) == random_kernels.ZERO


def test_the_gaussian_of_trained_networks(monkeypatch):
    monkeypatch.setattr(regression, "ANGLES", torch.tensor(list(GAUSSIAN), dtype=torch.float64) * math.pi)
    found = regression.gaussian.__wrapped__()
    np.testing.assert_allclose(found.mean, [m for m, _ in GAUSSIAN.values()], atol=6e-6)
    np.testing.assert_allclose(found.std, [d for _, d in GAUSSIAN.values()], atol=6e-6)
    low, middle, high = found.percentiles(regression.PERCENTILES)
    np.testing.assert_allclose(high - low, 2 * 1.2815515655 * found.std, rtol=1e-8)
    np.testing.assert_allclose(middle, found.mean, rtol=1e-12)


def test_the_kernel_of_a_network_is_the_layerwise_formula():
    """Sum over layers of (<a, a'> / n + beta^2) <d, d'>, a and d those of z = W a / sqrt(n) + beta b."""
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin = jacot_setting.network(x, 30, 4, seed=3)
    linear = [layer for layer in twin.model if isinstance(layer, torch.nn.Linear)]
    a, slopes = [x], []
    for layer in linear[:-1]:
        z = layer(a[-1])
        slopes.append((z > 0).double())
        a.append(z.relu())
    d = [torch.ones(5, 1, dtype=torch.float64)]
    for layer, slope in zip(linear[:0:-1], slopes[::-1], strict=True):
        d.insert(0, d[0] @ layer.weight * slope)
    expected = sum((u @ u.T / u.shape[1] + jacot_setting.BETA**2) * (v @ v.T) for u, v in zip(a, d, strict=True))
    torch.testing.assert_close(twin(x), expected.detach(), rtol=1e-12, atol=1e-14)
    assert [tuple(layer.weight.shape) for layer in linear] == [(30, 2), (30, 30), (30, 30), (1, 30)]


def test_training_is_gradient_descent_on_half_the_mean_square():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()
    y, seen = x[:, 0] * x[:, 1], []
    twin = jacot_setting.network(x, 4000, 2, seed=0)
    K, f = twin(x), twin.model(x)[:, 0].detach()
    jacot_setting.descend(twin, x, y, 40, lambda step, out: seen.append(out))
    assert len(seen) == 41
    steps = torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - K / 6, 40)
    torch.testing.assert_close(seen[-1], y + steps @ (f - y), rtol=0, atol=0.03)  # a wide network is nearly linear
    assert (seen[-1] - seen[0]).abs().max() > 0.5


def test_draws_of_the_gaussian_are_inside_four_times_in_five():
    shares = regression.inside(regression.gaussian().sample(3000, seed=7).numpy())
    assert np.mean(shares) == pytest.approx(0.8, abs=4 * np.std(shares) / 3000**0.5)
    assert regression.spread() == pytest.approx(np.std(shares), rel=0.05)
    assert 0.05 < regression.spread() < 0.4


def test_the_component_that_is_learned(folder):
    work = Work(TOY, (), ["digits"], folder, progress=lambda line: pytest.fail("computed again"))
    part, eigen = (work.result(p) for p in (component.learning("digits", 30, 1), component.eigenvalues("digits")))
    vectors = eigen.arrays["components"]
    np.testing.assert_allclose(vectors.T @ vectors / TOY.batch, np.eye(3), atol=1e-10)
    assert part.arrays["g"][0] == pytest.approx(0.5, abs=1e-6)
    assert part.arrays["h"][0] < 1e-6
    assert part.numbers["steps"][-1] == TOY.component_steps
    assert part.numbers["pythagoras"] < 1e-12
    values = eigen.numbers["values"]["5 0.1"][0]
    x, _ = component.digits(work, "digits")
    full = torch.linalg.eigvalsh(jacot_setting.limit(5, x)).flip(0)[:3] / TOY.batch
    np.testing.assert_allclose(values, full, rtol=1e-9)
    rate = component._along(jacot_setting.limit(5, x), torch.from_numpy(vectors[:, 1]))
    assert rate == pytest.approx(values[1], rel=1e-9)
    assert component.expected(0.1, np.array([0, 10_000]), 0.001)[1] == pytest.approx(0.5 / math.e, rel=1e-3)
    assert component.expected(0.1, np.array([0, 3]), 2.0)[1] == pytest.approx(0.5 * 0.8**3)


def test_printed_eigenvalues_on_mnist(shared_data, tmp_path):
    work = Work(Sizes(**vars(TOY) | {"batch": 512}), (), ["mnist"], tmp_path, {"mnist": shared_data / "mnist"})
    x, labels = component.digits(work, "mnist")
    assert x.shape == (512, 784)
    assert labels.unique().numel() == 10
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    fits = {depth: component.components(x, depth)[0].numpy() / component.PAPER for depth in component.DEPTHS}
    assert abs(fits[5] - 1).max() < 0.15
    assert abs(fits[4] - 1).max() > 0.3


# ---------------------------------------------------------------------- the study


def test_every_claim_has_a_number_and_a_verdict(folder):
    entry = record(folder)
    assert len(entry["claims"]) == 37
    assert all(c["claim"] and any(ch.isdigit() for ch in c["number"]) and c["how"] for c in entry["claims"])
    assert all(c["holds"] in (True, False, None) for c in entry["claims"])
    assert any("0.282500" in c["number"] for c in entry["claims"])
    assert [c["holds"] for c in entry["claims"] if "eigenvalues are" in c["claim"]] == [None, None]  # not MNIST
    assert json.loads((folder / "run.json").read_text())["status"] == "complete"
    assert entry["sets"] == ["digits"]


def test_the_page_has_all_sections(folder):
    entry, page = record(folder), (folder / "report.html").read_text()
    titles = [section["title"] for section in entry["sections"]]
    figures = [title.split(":")[0] for title in titles if title.startswith("Figure")]
    assert figures == ["Figure 1", "Figure 2", "Figure 3a", "Figures 3b and 3c"]
    assert len(titles) == 11
    assert all(title in page for title in titles)
    assert all(text in page.replace("&#39;", "'") for text in entry["departures"][:1])
    (section,) = (section for section in entry["sections"] if section["title"].startswith("Figure 1"))
    figure = section["items"][0]
    assert [panel["heading"] for panel in figure["panels"]] == ["n = 20", "n = 200"]
    assert len(figure["panels"][0]["series"]) == TOY.seeds + 1
    part = json.loads((folder / "parts" / "kernel-20-seed-0.json").read_text())["numbers"]
    start = figure["panels"][0]["series"][0]
    assert start["name"] == "random networks"
    assert start["y"][random_kernels.ZERO] == pytest.approx(part["before_at_0"], rel=1e-4)


def verdicts(folder):
    """A function: the verdict of the claim with these words, where results of experiments are changed."""
    results = jacot.STUDY.results(Work(TOY, (), ["digits"], folder))

    def holds(words, sets=("digits",), **changes):
        named = {name.replace("_", " "): change for name, change in changes.items()}
        changed = Results(replace(results.work, sets=list(sets)), results.by_experiment | named)
        claims = [claim.record() for claims in jacot.STUDY.claims for claim in claims(changed)]
        (claim,) = (claim for claim in claims if words in claim["claim"])
        return claim["holds"]

    return results, holds


def test_claims_on_kernels_can_fail(folder):
    results, holds = verdicts(folder)

    def rate(**numbers):
        return {"rate": {None: [Result(results.one("rate").numbers | numbers, {})]}}

    assert holds("tends to a limit in closed form", **rate(p=0.02))
    assert not holds("tends to a limit in closed form", **rate(p=0.02, limit_at_0=0.2826))
    assert not holds("tends to a limit in closed form", **rate(p=0.001))
    assert holds("spread less", **rate(slope=-0.45, slope_error=0.05))
    assert not holds("spread less", **rate(slope=-0.3, slope_error=0.05))
    assert not holds("spread less", **rate(slope=-0.7, slope_error=0.05))

    def kernels(narrow, wide, shift=0.0):
        of = {20: narrow, 200: wide}
        return {
            n: [
                Result(part.numbers | {"inflation": of[n] + i / 1000}, {"curves": part.arrays["curves"] + shift})
                for i, part in enumerate(parts)
            ]
            for n, parts in results["kernels"].items()
        }

    assert holds("inflates", kernels=kernels(0.19, 0.04))
    assert not holds("inflates", kernels=kernels(0.19, 0.19))
    assert not holds("inflates", kernels=kernels(-0.01, -0.04))
    assert not holds("mean of the kernel at the start", kernels=kernels(0.19, 0.04, shift=10.0))
    assert not holds("mean of the kernel at the start", kernels=kernels(0.19, 0.04, shift=-10.0))


def gaussian_curves(scale, shift=0.0):
    """Forty curves: draws of the limit's Gaussian, their distances from its mean times a scale, moved."""
    exact = regression.gaussian()
    draws = exact.sample(40, seed=3).numpy()
    curves = exact.mean.numpy() + scale * (draws - exact.mean.numpy()) + shift * exact.std.numpy()
    return {"regression": {n: [Result({"off": 0.0}, {"curve": c}) for c in curves] for n in (10, 40)}}


@pytest.mark.parametrize("words", ["Narrow networks agree", "Wide networks after training are draws"])
def test_bands_are_judged_on_both_sides(folder, words):
    results, _ = verdicts(folder)
    work = replace(results.work, sizes=Sizes(**vars(TOY) | {"curve_seeds": 40}))

    def holds(scale, shift=0.0):
        changed = Results(work, results.by_experiment | gaussian_curves(scale, shift))
        (claim,) = (claim.record() for claim in regression.claims(changed) if words in claim.text)
        return claim["holds"]

    assert holds(1.0)
    assert not holds(0.0)  # forty copies of the mean
    assert not holds(0.4)
    assert not holds(2.0)
    assert not holds(1.0, shift=1.5)
    assert not holds(1.0, shift=-1.5)


def test_claims_on_components_can_fail(folder):
    results, holds = verdicts(folder)
    steps = results["learning"][8][0].numbers["steps"]

    def learned(fast, aside):
        parts = {}
        for n in (8, 30):
            g = component.expected(fast[n] * component.own_rate(results), np.asarray(steps), 1.0)
            parts[n] = [
                Result({"steps": steps, "rates": [0, 0]}, {"g": g * (1 + e), "h": 0 * g + aside[n] + e})
                for e in (0.0, 1e-3)
            ]
        return {"learning": parts}

    for words in ("tends to exp", "beside the component", "Narrower networks converge"):
        assert holds(words, **learned({8: 300, 30: 150}, {8: 0.2, 30: 0.1}))
        assert not holds(words, **learned({8: 150, 30: 300}, {8: 0.1, 30: 0.2}))
    assert not holds("Narrower networks converge", **learned({8: 0.9, 30: 0.95}, {8: 0.2, 30: 0.1}))
    eigen = results.one("eigenvalues").numbers
    values = {key: [list(component.PAPER), [v * 1.1 for v in component.PAPER]] for key in eigen["values"]}
    top = Result(eigen | {"values": values, "means_1": [0.99, 0.9]}, {})
    mnist = {"sets": ["mnist"], "eigenvalues": {None: [top]}}
    assert holds("eigenvalues are 0.0457, 0.00108 and 0.00078: 5", **mnist)
    assert not holds("almost constant", **mnist)
    assert not holds("about ten times", **mnist)
    values["5 0.1"] = [[v * f for v in component.PAPER] for f in (1.5, 1.6)]
    assert not holds("eigenvalues are 0.0457, 0.00108 and 0.00078: 5", **mnist)
