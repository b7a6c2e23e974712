"""Measures of the study kopitkov2019, against closed forms, runs of their own and kernels with known eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkit
from ntkit.studies.kopitkov2019 import constant_kernel, decay, kopitkov_setting, learned_pictures, learning_speed
from ntkit.studies.kopitkov2019.kopitkov_setting import LearnedPicture
from ntkit.studies.part import Result, Sizes, Work
from ntkit.studies.study import Results
from ntkit.tracking import half_squared

SIZES = Sizes(seeds=2, side=6, width=8, steps=24, lr=0.05, decay=8, k=12, top=5, points=30, digit_steps=20)


@pytest.mark.parametrize("name", kopitkov_setting.PICTURES)
def test_pictures_are_standard_and_the_displaced_copy_has_their_frequencies(name):
    y = kopitkov_setting.picture(name, 24)
    assert y.shape == (576, 1)
    assert float(y.mean()) == pytest.approx(0, abs=1e-12)
    assert float(y.std()) == pytest.approx(1, rel=1e-12)
    moved = kopitkov_setting.displaced(y, 24)
    powers = [torch.fft.fft2(image.reshape(24, 24)).abs() for image in (y, moved)]
    torch.testing.assert_close(*powers)
    assert abs(float((y * moved).mean())) < 0.6  # another picture


def test_the_photograph_is_averaged_pixel_by_pixel():
    fine, coarse = (kopitkov_setting.picture("photograph", side) for side in (20, 10))
    blocks = fine.reshape(10, 2, 10, 2).mean((1, 3)).reshape(-1, 1)
    cosine = torch.nn.functional.cosine_similarity(blocks, coarse, dim=0)
    assert float(cosine) > 0.999  # blocks of the photograph do not divide evenly: not exactly equal


def linear_model(n=16, steps=5, lr=0.3):
    """A model linear in its parameters, whose kernel is constant and whose steps are first order."""
    x = torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = x @ torch.tensor([[3.0], [-2], [2], [-3], [2]], dtype=torch.float64) + 0.1 * noise
    torch.manual_seed(2)
    model = torch.nn.Linear(5, 1).double()
    run = ntkit.train(
        model, (x, y), half_squared, lambda p: torch.optim.SGD(p, lr=lr), steps, record="all",
        schedule=lambda step: kopitkov_setting.decayed(step, 3),
    )  # fmt: skip
    return LearnedPicture(x, y, model, run), ntkit.track(run, x, y, model=model, k=6)


def test_where_first_order_is_exact_each_component_falls_at_its_eigenvalue():
    at, tracked = linear_model()
    arrays = learning_speed.one_step(at, tracked, top=2)
    eigenvalues = np.array(tracked.series["eigenvalues"])
    rates = np.array(tracked.series["learning_rate"])
    np.testing.assert_allclose(arrays["removed"], rates[:, None] * eigenvalues / 16, rtol=1e-8)
    inside = arrays["weight"][:, :2]
    expected = (inside * arrays["removed"][:, :2]).sum(1) / inside.sum(1)
    np.testing.assert_allclose(arrays["removed_parts"][:, 0], expected, rtol=1e-10)
    result = Result({"series": {"learning_rate": rates.tolist()}}, arrays | {"eigenvalues": eigenvalues})
    found, grew = learning_speed.slopes(result, 16)
    assert len(found) > 3
    np.testing.assert_allclose(found, 1, atol=1e-7)
    assert grew == 0


def test_a_step_that_is_not_first_order_has_another_slope():
    at, tracked = linear_model()
    arrays = learning_speed.one_step(at, tracked, top=2)
    arrays |= {"removed": arrays["removed"] ** 2, "eigenvalues": np.array(tracked.series["eigenvalues"])}
    rates = tracked.series["learning_rate"]
    found, _ = learning_speed.slopes(Result({"series": {"learning_rate": rates}}, arrays), 16)
    np.testing.assert_allclose(found, 2, atol=1e-7)


def test_losses_with_a_constant_kernel_are_those_of_a_model_linear_in_its_parameters():
    at, tracked = linear_model()
    at.run.load(at.model, 0)
    K = ntkit.TangentKernel(at.model, "trace")(at.x)
    residual = (at.model(at.x) - at.y).detach().squeeze(1)
    found = constant_kernel.losses(K, residual, tracked.steps, lr=0.3, decay=3)
    np.testing.assert_allclose(found, tracked.series["loss"], rtol=1e-10)
    told = constant_kernel.constant_kernel(at, tracked.steps, 0.3, 3)
    np.testing.assert_allclose(told["first"]["learned"], tracked.series["loss"], rtol=1e-10)
    np.testing.assert_allclose(told["last"]["learned"], told["first"]["learned"], rtol=1e-10)  # it does not change
    assert told["first"]["displaced"] != told["first"]["learned"]


def test_without_the_decay_the_run_is_one_of_constant_rate(tmp_path):
    work = Work(SIZES, (0, 1), ["digits"], tmp_path)
    name = "ripples-depth-6-seed-1-without-decay"
    result = decay._without_decay(work, name, 1)
    at = kopitkov_setting.learned(work, "ripples", 6, 1)
    at.run.load(at.model, 0)
    whole = ntkit.train(
        at.model, (at.x, at.y), half_squared, lambda p: torch.optim.SGD(p, lr=SIZES.lr), SIZES.steps, record=[8, 24]
    )
    other = ntkit.Trajectory.open(work.trajectory(name))
    for step in (8, 24):
        for found, expected in zip(other.state(step - 8).values(), whole.state(step).values(), strict=True):
            assert torch.equal(found, expected)
    with_decay = at.run.state(24)
    assert not all(torch.equal(a, b) for a, b in zip(with_decay.values(), whole.state(24).values(), strict=True))
    assert result.numbers["steps"][0] == 8
    assert result.numbers["steps"][-1] == 24


def test_a_run_that_diverges_is_refused_with_its_rate(tmp_path):
    sizes = Sizes(**vars(SIZES) | {"lr": 1e6})
    with pytest.raises(ntkit.Refused, match=r"learning rate 1000000.0: got a loss that is not finite"):
        kopitkov_setting.learned(Work(sizes, (0, 1), ["digits"], tmp_path), "ripples", 2, 0)


def test_energies_are_those_of_a_spectrum():
    K = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    top = ntkit.spectrum(K @ K.T, k=4)
    values = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for k in (1, 3):
        found = kopitkov_setting.energy_at(top.eigenvectors.numpy(), values, k)
        assert found == pytest.approx(float(top.energy(values)[k - 1]), abs=1e-12)


def test_chance_is_the_mean_distance_to_the_other_seeds():
    x = ntkit.grid(4).float()
    models = [torch.nn.Linear(2, 1), torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))]
    told = kopitkov_setting.initial_kernels([*models, models[0]], x)
    plain = np.array(told["distances"]["plain"])
    a, b = (ntkit.TangentKernel(m, "trace")(x).double() for m in models)
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    np.testing.assert_allclose(plain, [[0, 1 - cosine, 0], [1 - cosine, 0, 1 - cosine], [0, 1 - cosine, 0]], atol=1e-7)
    series = {"distance": [0, 0.5], "cka": [1, 0.25], "trace": [2.0, 200.0]}
    change = kopitkov_setting.changes([Result({"series": series}, {})] * 3, told)
    np.testing.assert_allclose(change.by_chance, [(1 - cosine) / 2, 1 - cosine, (1 - cosine) / 2], atol=1e-7)
    assert change.distance.tolist() == [0.5] * 3
    assert change.centered.tolist() == [0.75] * 3
    np.testing.assert_allclose(change.growth, 2)
    ratio = abs(np.log10(float(a.trace()) / float(b.trace())))
    np.testing.assert_allclose(change.growth_by_chance, [ratio / 2, ratio, ratio / 2], rtol=1e-6)


def test_a_kernel_that_only_smooths_does_not_count_as_turned_to_the_picture(tmp_path):
    """Energies of the learned picture and of others that rise alike: the gain is there, the difference is not."""
    work = Work(SIZES, (0, 1), ["digits"], tmp_path)

    def run(own, copy):
        energies = {"ripples": [0.1, own], "displaced": [0.1, copy], "photograph": [0.2, 0.3]}
        return Result({"energies": energies}, {})

    def verdict(pairs):
        results = Results(work, {"picture": {("ripples", 6): [run(*pair) for pair in pairs]}})
        return [c.holds() for claim in learned_pictures.alignment_claims(results) for c in claim.conditions]

    assert verdict([(0.9, 0.2), (0.88, 0.25)]) == [True, True, True]
    assert verdict([(0.9, 0.9), (0.88, 0.89)]) == [True, False, True]
    assert verdict([(0.1, 0.2), (0.05, 0.2)]) == [False, False, False]
