"""Image transformations pixel by pixel, and the invariance measure against its formula."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from ntkit import probes
from ntkit.base.checks import Refused
from ntkit.probes import Transform, invariance, rotate, shift, shuffle_patches, standard, swap_quadrants, zoom

ALL = [shift(2, -1), rotate(0.4), zoom(0.6), swap_quadrants(), shuffle_patches(2)]
IDS = [t.name for t in ALL]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Linear:
    """k(x, x') = <x, x'>; no `paired`."""

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        return x1.flatten(1) @ x2.flatten(1).T

    def diagonal(self, x: Tensor) -> Tensor:
        return (x**2).flatten(1).sum(1)


class Paired(Linear):
    """The same with `paired`, and no Gram matrix."""

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        raise AssertionError("paired is there to be used")

    def paired(self, x1: Tensor, x2: Tensor) -> Tensor:
        return (x1 * x2).flatten(1).sum(1)


class PixelSum(Linear):
    """k(x, x') = sum(x) sum(x'): the "Sum" network's kernel, blind to where a pixel is."""

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.outer(x1.flatten(1).sum(1), x2.flatten(1).sum(1))

    def diagonal(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1) ** 2


class Channels(Linear):
    """One linear kernel per channel, as [n, n, C] or, with correlated outputs, [n, n, C, C]."""

    def __init__(self, full: bool):
        self.full = full

    def __call__(self, x1: Tensor, x2: Tensor) -> Tensor:
        K = torch.einsum("icp,jdp->ijcd", x1.flatten(2), x2.flatten(2))
        return K if self.full else K.diagonal(dim1=2, dim2=3)

    def diagonal(self, x: Tensor) -> Tensor:
        K = torch.einsum("icp,idp->icd", x.flatten(2), x.flatten(2))
        return K if self.full else K.diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("transform", ALL, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64])
def test_shape_dtype_and_input_are_kept(transform, dtype):
    x = (draw(3, 2, 6, 8).abs() * 40).clamp(max=200).to(dtype)
    copy = x.clone()
    y = transform(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert torch.equal(x, copy)
    assert not torch.equal(y, x)
    assert torch.equal(transform(x[1:2]), y[1:2])  # an image does not see its batch
    assert torch.equal(transform(x[:, :1]), y[:, :1])  # nor its other channels


@pytest.mark.parametrize("transform", ALL, ids=IDS)
def test_transforms_leave_the_random_state_alone(transform):
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()  # noqa: NPY002
    transform(draw(2, 1, 6, 8))
    shuffle_patches(3, seed=5)
    invariance(Linear(), draw(2, 1, 6, 8), transform)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (-2, 0), (2, -3), (0, 0)])
def test_shift_moves_every_pixel(dx, dy):
    x = draw(2, 3, 5, 7)
    y = shift(dx, dy)(x)
    for r in range(5):
        for c in range(7):
            inside = 0 <= r - dy < 5 and 0 <= c - dx < 7
            expected = x[:, :, r - dy, c - dx] if inside else torch.zeros(2, 3, dtype=x.dtype)
            assert torch.equal(y[:, :, r, c], expected)


def test_shift_one_moves_right_and_down():
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1
    assert shift()(x)[0, 0, 1].tolist() == [0, 0, 1]
    assert shift(0, 1)(x)[0, 0, :, 1].tolist() == [0, 0, 1]


@pytest.mark.parametrize("size", [5, 6])
def test_quarter_turns(size):
    x = draw(2, 3, size, size)
    quarter = rotate(math.pi / 2)
    assert torch.equal(quarter(x), torch.rot90(x, 1, (-2, -1)))
    assert torch.equal(rotate(-math.pi / 2)(x), torch.rot90(x, -1, (-2, -1)))
    assert torch.equal(quarter(quarter(quarter(quarter(x)))), x)
    assert torch.equal(rotate(0.0)(x), x)
    half = draw(2, 3, 4, size)
    assert torch.equal(rotate(math.pi)(half), half.flip(-1, -2))


def test_rotation_against_pixel_by_pixel_and_its_direction():
    x, angle = draw(1, 1, 7, 8), 0.7
    y = rotate(angle)(x)
    for r in range(7):
        for c in range(8):
            # The point (right, up) seen from the centre came from where it is turned back by the angle.
            right, up = c - 3.5, 3 - r
            back = complex(right, up) * complex(math.cos(angle), -math.sin(angle))
            sr, sc = math.floor(3 - back.imag + 0.5), math.floor(3.5 + back.real + 0.5)
            expected = float(x[0, 0, sr, sc]) if 0 <= sr < 7 and 0 <= sc < 8 else 0.0
            assert float(y[0, 0, r, c]) == expected
    mark = torch.zeros(1, 1, 11, 11)
    mark[0, 0, 4:7, 8:] = 1  # on the right of the centre
    rows, columns = rotate(0.5)(mark)[0, 0].nonzero().double().mean(0).tolist()
    assert rows < 4  # goes up: counter-clockwise
    assert columns > 6


@pytest.mark.parametrize(("size", "crop"), [((28, 28), 13 / 14), ((32, 32), 13 / 14), ((10, 14), 0.6)])
def test_zoom_is_crop_and_resize(size, crop):
    x = draw(2, 3, *size)
    kept = [round(s * crop) for s in size]
    top, left = ((s - k) // 2 for s, k in zip(size, kept, strict=True))
    cropped = x[:, :, top : top + kept[0], left : left + kept[1]]
    expected = torch.nn.functional.interpolate(cropped, size=size, mode="bilinear", align_corners=False)
    assert torch.allclose(zoom(crop)(x), expected, atol=1e-13)


def test_zoom_stays_central_and_rounds_integers():
    x = draw(2, 1, 8, 9)
    assert torch.allclose(zoom(7 / 8)(x).flip(-1, -2), zoom(7 / 8)(x.flip(-1, -2)), atol=1e-13)  # 1 pixel off 8
    line = torch.arange(8.0, dtype=torch.float64).expand(1, 1, 8, 8)
    expected = [min(max((i + 0.5) * 7 / 8 - 0.5, 0), 6) + 0.5 for i in range(8)]
    assert zoom(7 / 8)(line)[0, 0, 0].tolist() == pytest.approx(expected, abs=1e-13)
    ints = (x.abs() * 100).to(torch.uint8)
    assert torch.equal(zoom(0.5)(ints), zoom(0.5)(ints.double()).round().to(torch.uint8))
    assert torch.equal(zoom(1)(x), x)
    assert torch.equal(zoom(1.0)(ints), ints)
    flat = torch.full((1, 1, 9, 8), 0.3, dtype=torch.float64)
    assert torch.allclose(zoom(0.3)(flat), flat, atol=1e-15)


@pytest.mark.parametrize(("H", "W"), [(6, 8), (5, 7), (2, 3)])
def test_swap_quadrants(H, W):
    x = draw(2, 3, H, W)
    y = swap_quadrants()(x)
    h, w = H // 2, W // 2
    for r in range(H):
        for c in range(W):
            if r < h and c < w:
                source = (r + H - h, c + W - w)
            elif r >= H - h and c >= W - w:
                source = (r - H + h, c - W + w)
            else:
                source = (r, c)
            assert torch.equal(y[..., r, c], x[..., source[0], source[1]])
    assert torch.equal(swap_quadrants()(y), x)


def test_shuffle_patches_moves_whole_patches_the_same_way():
    H, W, grid = 6, 9, 3
    x = torch.arange(2 * H * W, dtype=torch.float64).reshape(2, 1, H, W)
    y = shuffle_patches(grid, seed=4)(x)
    patches = {}
    for a in range(grid):
        for b in range(grid):
            patches[tuple(x[0, 0, 2 * a : 2 * a + 2, 3 * b : 3 * b + 3].flatten().tolist())] = (a, b)
    order = [
        patches[tuple(y[0, 0, 2 * a : 2 * a + 2, 3 * b : 3 * b + 3].flatten().tolist())]
        for a in range(grid)
        for b in range(grid)
    ]
    assert sorted(order) == sorted(patches.values())
    assert torch.equal(y[1], y[0] + H * W)
    assert torch.equal(shuffle_patches(grid, seed=4)(x), y)
    assert not torch.equal(shuffle_patches(grid, seed=5)(x), y)


def test_shuffle_patches_is_never_the_identity():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    orders = {tuple(shuffle_patches(2, seed)(x).flatten().tolist()) for seed in range(200)}
    assert len(orders) == 23  # all of 4! but one
    assert (0.0, 1.0, 2.0, 3.0) not in orders


def test_standard_set():
    groups = standard((1, 28, 28))
    assert {name: len(group) for name, group in groups.items()} == {
        "shift": 2,
        "rotation": 2,
        "zoom": 1,
        "quadrant swap": 1,
        "patch shuffle": 1,
    }
    x = draw(2, 1, 28, 28)
    right, down = (t(x) for t in groups["shift"])
    assert torch.equal(right, shift(1, 0)(x))
    assert torch.equal(down, shift(0, 1)(x))
    for transform, angle in zip(groups["rotation"], (0.25, -0.25), strict=True):
        assert torch.equal(transform(x), rotate(angle)(x))
    assert torch.equal(groups["zoom"][0](x), zoom(13 / 14)(x))
    assert "13/14" in groups["zoom"][0].parameters
    assert torch.equal(groups["patch shuffle"][0](x), shuffle_patches(4)(x))


@pytest.mark.parametrize(("shape", "grid"), [((1, 8, 8), 4), ((3, 9, 6), 3), ((10, 6), 2), ((1, 7, 8), None)])
def test_standard_set_takes_the_largest_grid_that_fits(shape, grid):
    groups = standard(shape)
    x = draw(2, 1, *shape[-2:])
    assert ("patch shuffle" in groups) == (grid is not None)
    if grid:
        assert torch.equal(groups["patch shuffle"][0](x), shuffle_patches(grid)(x))
    for group in groups.values():
        for transform in group:
            assert not torch.equal(transform(x), x)


def test_standard_zoom_of_tiny_images():
    x = draw(2, 1, 5, 5)
    (small,) = standard((1, 5, 5))["zoom"]
    assert torch.equal(small(x), zoom(3 / 5)(x))
    assert "3/5" in small.parameters


@pytest.mark.parametrize("kernel", [Linear(), Paired()], ids=["blocks", "paired"])
def test_identity_has_cosine_one(kernel):
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
    result = invariance(kernel, x, Transform("identity", "", lambda x: x))
    assert result.per_sample.tolist() == [1.0, 1.0]
    assert (result.mean, result.standard_error, result.undefined, result.name) == (1.0, 0.0, 0, "identity")


@pytest.mark.parametrize("kernel", [Linear(), Paired()], ids=["blocks", "paired"])
@pytest.mark.parametrize("n", [5, 70])  # in one block, in several with a short last one
def test_invariance_against_the_formula(kernel, n):
    x = draw(n, 2, 4, 5)
    T = shift(1)
    rows = [
        float((a * b).sum()) / math.sqrt(float((a * a).sum()) * float((b * b).sum()))
        for a, b in zip(x, T(x), strict=True)
    ]
    result = invariance(kernel, x, T)
    assert result.per_sample.tolist() == pytest.approx(rows, abs=1e-14)
    assert result.mean == pytest.approx(np.mean(rows), abs=1e-14)
    assert result.standard_error == pytest.approx(np.std(rows, ddof=1) / math.sqrt(n), rel=1e-12)
    assert result.name == "shift"


def test_several_transforms_are_averaged_per_sample():
    x = draw(5, 2, 4, 5)
    one, two = (invariance(Linear(), x, t) for t in (shift(1), shift(0, 1)))
    both = invariance(Linear(), x, (shift(1), shift(0, 1)))
    expected = (one.per_sample + two.per_sample) / 2
    assert torch.allclose(both.per_sample, expected, atol=1e-15)
    assert both.standard_error == pytest.approx(float(expected.std()) / math.sqrt(5), rel=1e-12)
    assert both.name == "shift"
    assert invariance(Linear(), x, [shift(1), zoom(0.5)]).name == "shift, zoom"


@pytest.mark.parametrize("full", [True, False])
def test_outputs_are_traced(full):
    x = draw(5, 2, 4, 5)
    traced = invariance(Channels(full), x, shift(1))
    assert torch.allclose(traced.per_sample, invariance(Linear(), x, shift(1)).per_sample, atol=1e-14)


@pytest.mark.parametrize("transform", [swap_quadrants(), shuffle_patches(2), shuffle_patches(3)])
def test_pixel_sum_kernel_does_not_see_pixels_move(transform):
    x = torch.randint(1, 256, (4, 2, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    assert invariance(PixelSum(), x, transform).per_sample.tolist() == [1.0] * 4
    assert invariance(Linear(), x, transform).mean < 0.99


def test_cosines_are_in_range_and_do_not_depend_on_scale():
    x = draw(40, 1, 6, 6).float()
    for group in standard((1, 6, 6)).values():
        result = invariance(Linear(), x, group)
        assert float(result.per_sample.abs().max()) <= 1
        assert result.per_sample.dtype == torch.float64
    big = invariance(Linear(), 1e100 * draw(4, 1, 6, 6), shift(1))
    assert torch.allclose(big.per_sample, invariance(Linear(), draw(4, 1, 6, 6), shift(1)).per_sample, atol=1e-14)
    tiny = invariance(Linear(), 1e-100 * draw(4, 1, 6, 6), shift(1))  # a 1e-4 guard would make these zero
    assert torch.allclose(tiny.per_sample, big.per_sample, atol=1e-14)


def test_a_kernel_that_breaks_cauchy_schwarz_shows():
    class Wrong(Paired):
        def paired(self, x1, x2):
            return 2 * super().paired(x1, x2)

    assert invariance(Wrong(), draw(3, 1, 4, 4), Transform("identity", "", lambda x: x)).mean == pytest.approx(2)


def test_samples_without_norm_are_undefined():
    x = draw(5, 1, 4, 4)
    x[1] = 0  # K(x, x) = 0
    x[3, :, :, :3] = 0  # K(Tx, Tx) = 0: only the last column is left, and it leaves
    result = invariance(Linear(), x, shift(1))
    rest = invariance(Linear(), x[[0, 2, 4]], shift(1))
    assert result.undefined == 2
    assert result.per_sample.isnan().tolist() == [False, True, False, True, False]
    assert result.mean == pytest.approx(rest.mean, abs=1e-15)
    assert result.standard_error == pytest.approx(rest.standard_error, rel=1e-12)
    none = invariance(Linear(), torch.zeros(3, 1, 4, 4), shift(1))
    assert (none.undefined, math.isnan(none.mean), math.isnan(none.standard_error)) == (3, True, True)
    one = invariance(Linear(), x[:2], shift(1))
    assert (one.undefined, math.isnan(one.mean), math.isnan(one.standard_error)) == (1, False, True)


def _with(x: Tensor, value: float, *index: int) -> Tensor:
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 4, 4), r"x: got shape \[3, 4, 4\]; expected images \[n, C, H, W\]"),
        (torch.ones(0, 1, 4, 4), r"x: got shape \[0, 1, 4, 4\]"),
        (np.ones((2, 1, 4, 4)), "x: got ndarray"),
        (torch.ones(1, 1, 4, 4), "x: got 1 sample; expected 2 or more"),
        (_with(torch.ones(2, 1, 4, 4), math.nan, 1, 0, 2, 3), r"x: got nan at index \[1, 0, 2, 3\]"),
        (_with(torch.ones(2, 1, 4, 4), math.inf, 0, 0, 0, 1), r"x: got inf at index \[0, 0, 0, 1\]"),
    ],
)
def test_what_are_no_images_is_refused(x, message):
    with pytest.raises(Refused, match=message):
        invariance(Linear(), x, shift(1))


def test_bad_transforms_and_kernels_are_refused():
    x = draw(3, 1, 4, 4)
    with pytest.raises(Refused, match="transform: got an empty sequence"):
        invariance(Linear(), x, ())
    with pytest.raises(Refused, match=r"transform\(x\): got shape \[3, 1, 4, 2\]; expected \[3, 1, 4, 4\]"):
        invariance(Linear(), x, lambda x: x[..., :2])

    class Bad(Paired):
        def paired(self, x1, x2):
            return torch.full((3,), math.nan)

    with pytest.raises(Refused, match=r"kernel.paired\(x, transform\(x\)\): got nan at index \[0\]"):
        invariance(Bad(), x, shift(1))

    class Misshapen(Linear):
        def diagonal(self, x):
            return torch.ones(2)

    with pytest.raises(Refused, match=r"kernel.diagonal\(x\): got shape \[2\]; expected \[3\], \[3, C\]"):
        invariance(Misshapen(), x, shift(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shift(0.5), "shift: dx: got 0.5; expected an integer"),
        (lambda: shift(1, True), "shift: dy: got True"),
        (lambda: rotate(math.nan), "rotate: angle: got nan"),
        (lambda: zoom(0.0), "zoom: crop: got 0.0; expected a fraction"),
        (lambda: zoom(1.5), "zoom: crop: got 1.5"),
        (lambda: shuffle_patches(1), "shuffle_patches: grid: got 1; expected an integer, 2 or more"),
        (lambda: shuffle_patches(2.0), "shuffle_patches: grid: got 2.0"),
        (lambda: shuffle_patches(2, seed=-1), "shuffle_patches: seed: got -1"),
        (lambda: standard((1, 2, 8)), r"image_shape: got \(1, 2, 8\); expected \(C, H, W\)"),
        (lambda: standard((64,)), r"image_shape: got \(64,\)"),
        (lambda: standard((5, 1, 8, 8)), "image_shape"),
        (
            lambda: shift(4)(torch.ones(1, 1, 9, 4)),
            "shift: got dx=4, dy=0; expected a shift smaller than the image, 4 wide and 9",
        ),
        (lambda: shift(0, -9)(torch.ones(1, 1, 9, 4)), "shift: got dx=0, dy=-9"),
        (lambda: zoom()(torch.ones(1, 1, 6, 9)), "zoom: crop: got 0.9286 of 6 pixels.*Crop to 5/6"),
        (lambda: swap_quadrants()(torch.ones(1, 1, 1, 9)), "swap_quadrants: got 1 x 9 pixels; expected 2 x 2"),
        (
            lambda: shuffle_patches(2)(torch.ones(1, 1, 6, 9)),
            "shuffle_patches: got 6 x 9 pixels; expected multiples of 2",
        ),
        (lambda: shift(1)(torch.ones(4, 4)), r"x: got shape \[4, 4\]; expected images"),
    ],
)
def test_misuse_of_transforms_is_refused(make, message):
    with pytest.raises(Refused, match=message):
        make()


def test_the_module_offers_the_design_names():
    for name in ("shift", "rotate", "zoom", "swap_quadrants", "shuffle_patches", "standard", "invariance"):
        assert callable(getattr(probes, name))
