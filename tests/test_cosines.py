"""Cosines of images, their transforms and different images, against explicit features: gradients one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ntkit import ConjugateKernel, TangentKernel
from ntkit.base.checks import Refused
from ntkit.jacobian.oracle import jacobian
from ntkit.probes import Cosines, Transform, cosines, invariance, shift, similarity, standard, swap_quadrants
from ntkit.studies.long2021 import moments
from ntkit.studies.long2021.long_setting import PixelSum


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(outputs: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, outputs)]
    return nn.Sequential(*layers).double()


class Features:
    """k(x, x') = <f(x), f(x')>; remembers the largest matrix that it was asked for."""

    def __init__(self, f=lambda x: x.flatten(1)):
        self.f, self.largest = f, 0

    def __call__(self, x1, x2=None):
        K = self.f(x1) @ self.f(x1 if x2 is None else x2).T
        self.largest = max(self.largest, K.numel())
        return K

    def diagonal(self, x):
        return (self.f(x) ** 2).sum(1)


def cosine(a: Tensor, b: Tensor, added: float = 0.0) -> float:
    return float(a @ b / ((a.norm() + added) * (b.norm() + added)))


def naive(features, x: Tensor) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """Cosines by image from feature vectors, in loops: by transform and form, and of different images by form."""
    mean = features(x).mean(0)
    forms = {"raw": (0, 0.0), "centered": (mean, 0.0), "paper": (0, 1e-4)}
    transformed: dict[str, dict[str, list[float]]] = {}
    for name, group in standard(tuple(x.shape[1:])).items():
        transformed[name] = {
            form: [
                float(np.mean([cosine(a - m, features(t(x))[i] - m, added) for t in group]))
                for i, a in enumerate(features(x))
            ]
            for form, (m, added) in forms.items()
        }
    different = {}
    for form, (m, added) in forms.items():
        f, n = features(x) - m, len(x)
        different[form] = [np.mean([cosine(f[i], f[j], added) for j in range(n) if j != i]) for i in range(n)]
    return transformed, different


def same(found: Cosines, expected: dict[str, list[float]]) -> None:
    for form, values in expected.items():
        per_sample = getattr(found, form).per_sample.tolist()
        assert per_sample == pytest.approx(values, abs=1e-11), form
        assert getattr(found, form).mean == pytest.approx(np.mean(values), abs=1e-11)


@pytest.mark.parametrize("outputs", ["trace", "diagonal", "full"])
def test_tangent_kernel_against_gradients_one_by_one(outputs):
    model, x = network(), draw(6, 1, 6, 6)

    def features(x):
        return torch.cat([g.flatten(1) for g in jacobian(model, x).values()], 1)

    transformed, different = naive(features, x)
    found, others = cosines(TangentKernel(model, outputs=outputs), x)
    assert list(found) == list(transformed)
    for name, values in transformed.items():
        same(found[name], values)
        error = np.std(values["centered"], ddof=1) / math.sqrt(6)
        assert found[name].centered.standard_error == pytest.approx(error, rel=1e-9)
        assert found[name].raw.name == name
    same(others, different)


def test_conjugate_kernel_against_its_features():
    model, x = network(), draw(5, 1, 6, 6)
    kernel = ConjugateKernel(model)
    transformed, different = naive(kernel.features, x)
    found, others = cosines(kernel, x)
    for name, values in transformed.items():
        same(found[name], values)
    same(others, different)


def test_it_agrees_with_invariance():
    x = draw(7, 2, 6, 6)
    found, _ = cosines(Features(), x)
    for name, group in standard((2, 6, 6)).items():
        one = invariance(Features(), x, group)
        assert torch.allclose(found[name].raw.per_sample, one.per_sample, atol=1e-13)
        assert found[name].raw.standard_error == pytest.approx(one.standard_error, rel=1e-9)


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_many_images_are_taken_in_blocks(limit, monkeypatch):
    x, whole = draw(20, 1, 6, 6), Features()
    expected = cosines(whole, x)
    assert whole.largest == (8 * 20) ** 2
    monkeypatch.setattr(similarity, "_LARGEST", limit)
    blocks = Features()
    found = cosines(blocks, x)
    assert blocks.largest <= max(limit, 20)  # one row is the least
    for a, b in [*zip(found[0].values(), expected[0].values(), strict=True), (found[1], expected[1])]:
        for form in ("raw", "centered", "paper"):
            assert torch.allclose(getattr(a, form).per_sample, getattr(b, form).per_sample, atol=1e-12)


def test_identity_has_cosine_one():
    x = torch.randint(0, 9, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1)).double()
    found, _ = cosines(Features(), x, {"none": Transform("identity", "", lambda x: x), "shift": shift(1)})
    assert found["none"].raw.per_sample.tolist() == [1.0] * 6
    assert found["none"].centered.per_sample.tolist() == [1.0] * 6
    assert found["none"].raw.standard_error == 0
    assert 0.999 < float(found["none"].paper.per_sample.max()) < 1  # the paper's code makes it too small
    assert found["shift"].raw.mean < 0.99


def test_a_network_of_the_sum_of_the_pixels_does_not_see_the_swap():
    x = draw(6, 1, 8, 8).abs()
    found, _ = cosines(TangentKernel(PixelSum(0).double(), outputs="trace"), x)
    for name in ("quadrant swap", "patch shuffle"):
        for form in ("raw", "centered"):
            assert getattr(found[name], form).per_sample.tolist() == pytest.approx([1.0] * 6, abs=1e-9)
    other, _ = cosines(TangentKernel(network(1), outputs="trace"), x[..., :6, :6])
    assert other["quadrant swap"].raw.mean < 0.99


def test_the_order_of_hidden_units_does_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 1)).double()
    x, order = draw(5, 1, 6, 6), torch.tensor([3, 0, 6, 1, 2, 5, 4])
    kernel = TangentKernel(model, outputs="trace")
    K, before = kernel(x), cosines(kernel, x)
    with torch.no_grad():
        for p in (model[1].weight, model[1].bias):
            p.copy_(p[order])
        model[3].weight.copy_(model[3].weight[:, order])
    assert torch.allclose(kernel(x), K, rtol=1e-13)
    after = cosines(kernel, x)
    for a, b in [*zip(after[0].values(), before[0].values(), strict=True), (after[1], before[1])]:
        for form in ("raw", "centered", "paper"):
            assert torch.allclose(getattr(a, form).per_sample, getattr(b, form).per_sample, atol=1e-12)


@pytest.mark.parametrize("value", [1.0, 0.1])  # with 0.1 centering leaves rounding, not zero
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_have_no_centered_cosine(value, dtype):
    def constant(x):
        return torch.full((len(x), 3), value, dtype=dtype)

    found, different = cosines(Features(constant), draw(7, 1, 6, 6))
    for three in (*found.values(), different):
        assert three.raw.per_sample.tolist() == pytest.approx([1.0] * 7, abs=1e-6)
        assert three.centered.undefined == 7
        assert math.isnan(three.centered.mean)
        assert math.isnan(three.centered.standard_error)


def test_images_without_a_cosine_are_counted_and_left_out():
    x = draw(6, 1, 4, 4)
    x[2] = 0
    x[4] = x[[0, 1, 3, 5]].sum(0) / 5  # the mean of all six, when this one is among them
    found, different = cosines(Features(), x)
    assert found["shift"].raw.undefined == 1
    assert found["shift"].raw.per_sample.isnan().nonzero().flatten().tolist() == [2]
    assert found["shift"].centered.per_sample.isnan().nonzero().flatten().tolist() == [4]
    assert found["shift"].paper.undefined == 0
    assert float(found["shift"].paper.per_sample[2]) == 0
    assert different.raw.undefined == different.centered.undefined == 1
    rest = [i for i in range(6) if i != 2]
    _, without = cosines(Features(), x[rest])
    assert different.raw.per_sample[rest].tolist() == pytest.approx(without.raw.per_sample.tolist(), abs=1e-14)


def test_the_error_of_different_images_is_the_jackknifes():
    x, n = draw(9, 1, 4, 4), 9
    _, different = cosines(Features(), x, {})
    without = [cosines(Features(), x[[j for j in range(n) if j != i]], {})[1].raw.mean for i in range(n)]
    jackknife = math.sqrt((n - 1) / n * sum((m - np.mean(without)) ** 2 for m in without))
    assert different.raw.standard_error == pytest.approx(jackknife, rel=1e-9)
    assert math.isnan(cosines(Features(), x[:2], {})[1].raw.standard_error)  # one pair


def test_centered_cosines_do_not_depend_on_what_all_images_share():
    x = draw(8, 1, 4, 4)
    found, different = cosines(Features(), x)
    shifted, others = cosines(Features(lambda x: x.flatten(1) + 5), x)
    for a, b in [*zip(found.values(), shifted.values(), strict=True), (different, others)]:
        assert torch.allclose(a.centered.per_sample, b.centered.per_sample, atol=1e-10)
    assert others.raw.mean > 0.9 > different.raw.mean


def test_the_studys_numbers():
    """The formula of the study's first runs: one matrix of images and all transforms."""
    x = draw(5, 1, 6, 6)
    kernel = TangentKernel(network(1), outputs="trace")
    found = moments.cosines(kernel, x)
    groups = standard((1, 6, 6))
    K, n = kernel(torch.cat([x, *(t(x) for group in groups.values() for t in group)])), 5
    means = K[:, :n].mean(1)
    centered = K - means - means[:, None] + means[:n].mean()
    assert list(found.numbers) == [*groups, "pairs"]
    for form, values, added in (("raw", K, 0.0), ("paper", K, 1e-4), ("centered", centered, 0.0)):
        norms, place, rows = values.diagonal().sqrt() + added, n, []
        for name, group in groups.items():
            each = []
            for _ in group:
                moved = slice(place, place := place + n)
                each.append(values[moved, :n].diagonal() / (norms[moved] * norms[:n]))
            rows.append(torch.stack(each).mean(0))
            told = found.numbers[name][form]
            assert told["mean"] == pytest.approx(float(rows[-1].mean()), abs=1e-9)
            assert told["error"] == pytest.approx(float(rows[-1].std() / n**0.5), abs=1e-9)
        alike = (values[:n, :n] / (norms[:n, None] * norms[:n])).fill_diagonal_(0).sum(1) / (n - 1)
        assert found.numbers["pairs"][form]["mean"] == pytest.approx(float(alike.mean()), abs=1e-9)
        cosine = values[:n, :n] / (norms[:n, None] * norms[:n])
        kept = [[i for i in range(n) if i != out] for out in range(n)]
        without = torch.stack([cosine[k][:, k][~torch.eye(n - 1, dtype=torch.bool)].mean() for k in kept])
        jackknife = ((n - 1) / n * ((without - without.mean()) ** 2).sum()) ** 0.5
        assert found.numbers["pairs"][form]["error"] == pytest.approx(float(jackknife), abs=1e-9)
        if form != "paper":
            assert found.arrays[form] == pytest.approx(torch.stack(rows).numpy(), abs=1e-6)  # kept in float32
            assert found.arrays[form].dtype == np.float32
    assert set(found.arrays) == {"raw", "centered"}


@pytest.mark.parametrize(
    ("kernel", "x", "transforms", "message"),
    [
        (Features(), draw(3, 1, 6, 6), [shift(1)], "transforms: got list; expected transforms by name"),
        (Features(), draw(3, 1, 6, 6), {"a": ()}, "transform: got an empty sequence"),
        (Features(), draw(3, 1, 6, 6), {"a": "shift"}, "transform: got str"),
        (Features(), draw(3, 1, 6, 6), {"a": lambda x: x[:2]}, r"transform\(x\): got shape \[2, 1, 6, 6\]"),
        (Features(), draw(1, 1, 6, 6), None, "x: got 1 sample; expected 2 or more"),
        (Features(), draw(3, 6, 6), None, r"x: got shape \[3, 6, 6\]"),
        (Features(), draw(3, 1, 6, 6) / 0, None, "x: got -?inf at index"),
        (draw(3, 3), draw(3, 1, 6, 6), None, "kernel: got Tensor"),
        (Features(lambda x: x.flatten(1) * math.nan), draw(3, 1, 6, 6), None, r"kernel.diagonal\(x\): got nan"),
    ],
)
def test_refusals(kernel, x, transforms, message):
    with pytest.raises(Refused, match=message):
        cosines(kernel, x, transforms)


@pytest.mark.parametrize("limit", [1, 10**9])
def test_values_of_another_shape_are_refused(limit, monkeypatch):
    class Ragged(Features):
        def __call__(self, x1, x2=None):
            return super().__call__(x1, x2)[:, 1:]

    monkeypatch.setattr(similarity, "_LARGEST", limit)
    with pytest.raises(Refused, match=r"kernel\(x.*\): got shape"):
        cosines(Ragged(), draw(3, 1, 6, 6), {"swap": swap_quadrants()})
