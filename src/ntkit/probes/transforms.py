"""Image transformations: those of the after-kernel paper, and patch shuffles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integer, as_number, check_dense, is_integer


@dataclass(frozen=True, eq=False)
class Transform:
    """A named transformation of images [n, C, H, W]: it keeps shape, dtype and device, and leaves its input unchanged.

    Attributes
    ----------
    name : one or two words.
    parameters : its settings, as text.
    apply : the function on [n, C, H, W].
    """

    name: str
    parameters: str
    apply: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the transformed images."""
        check_images(x)
        return self.apply(x)


def shift(dx: int = 1, dy: int = 0) -> Transform:
    """Move the image `dx` pixels to the right and `dy` down (negative: left, up); new pixels are zero.

    Raises
    ------
    Refused
        When dx or dy is not an integer; when called on images no larger than the shift.

    Examples
    --------
    >>> shift(1)(torch.tensor([[[[1, 2, 3]]]])).tolist()
    [[[[0, 1, 2]]]]
    """
    dx = as_integer(dx, "shift: dx", "an integer number of pixels", "Give an integer.")
    dy = as_integer(dy, "shift: dy", "an integer number of pixels", "Give an integer.")

    def apply(x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        if abs(dx) >= W or abs(dy) >= H:
            expected = f"a shift smaller than the image, {W} wide and {H} high"
            raise refusal("shift", got=f"dx={dx}, dy={dy}", expected=expected, fix="Shift by fewer pixels.")
        moved = torch.zeros_like(x)
        moved[..., max(dy, 0) : H + min(dy, 0), max(dx, 0) : W + min(dx, 0)] = x[
            ..., max(-dy, 0) : H - max(dy, 0), max(-dx, 0) : W - max(dx, 0)
        ]
        return moved

    return Transform("shift", f"dx = {dx}, dy = {dy} pixels", apply)


def rotate(angle: float) -> Transform:
    """Rotate about the image center by `angle` radians, counter-clockwise as displayed; nearest neighbor, zero fill.

    Raises
    ------
    Refused
        When the angle is not finite.

    Examples
    --------
    >>> rotate(math.pi / 2)(torch.tensor([[[[1, 2], [3, 4]]]])).tolist()
    [[[[2, 4], [1, 3]]]]
    """
    expected = "a finite number of radians"
    angle = as_number(angle, "rotate: angle", math.isfinite, expected, "Check what computed it.")
    cos, sin = math.cos(angle), math.sin(angle)

    def apply(x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        v = (torch.arange(H, dtype=torch.float64, device="cpu") - (H - 1) / 2)[:, None]
        u = (torch.arange(W, dtype=torch.float64, device="cpu") - (W - 1) / 2)[None, :]
        row = _nearest(u * sin + v * cos + (H - 1) / 2)
        column = _nearest(u * cos - v * sin + (W - 1) / 2)
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        source = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).to(x.device)
        turned = x.flatten(-2)[..., source.flatten()].unflatten(-1, (H, W))
        return torch.where(inside.to(x.device), turned, torch.zeros_like(turned))

    return Transform("rotation", f"{angle:+.4g} rad", apply)


def zoom(crop: float = 13 / 14) -> Transform:
    """Keep the central fraction `crop` of each side, and resize it back to the full size (bilinear).

    Each side keeps round(size * crop) pixels around its center. Pixels are interpolated between their centers, with
    edges repeated, as in ``torch.nn.functional.interpolate(align_corners=False)``. Integer images are rounded.

    Raises
    ------
    Refused
        When crop is not in (0, 1]; when called on images so small that a crop below 1 removes no pixel.

    Examples
    --------
    >>> zoom(0.5)(torch.tensor([[[[0.0, 0.0, 1.0, 0.0]] * 4]]))[0, 0, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    fix = "Give the part of each side to keep."
    crop = as_number(crop, "zoom: crop", lambda c: 0 < c <= 1, "a fraction in (0, 1]", fix)

    def apply(x: Tensor) -> Tensor:
        if crop == 1:
            return x.clone()
        H, W = x.shape[-2:]
        for size in (H, W):
            if _cropped(size, crop) == size:
                got, fix = f"{crop:.4g} of {size} pixels", f"Crop to {size - 1}/{size} or less, or use larger images."
                raise refusal("zoom: crop", got=got, expected="a crop of at least one pixel", fix=fix)
        work = x.to(x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float64)
        work = _resampled(work, -2, _cropped(H, crop))
        work = _resampled(work, -1, _cropped(W, crop))
        return (work if x.is_floating_point() else work.round()).to(x.dtype)

    return Transform("zoom", f"central {Fraction(crop).limit_denominator(1000)} of each side", apply)


def swap_quadrants() -> Transform:
    """Exchange the upper-left and the lower-right quadrant, floor(H/2) x floor(W/2) pixels each.

    It changes the global arrangement and keeps local statistics: a low cosine means a "global" kernel (Long 2021).

    Raises
    ------
    Refused
        When called on images less than 2 pixels high or wide.

    Examples
    --------
    >>> swap_quadrants()(torch.tensor([[[[1, 2], [3, 4]]]])).tolist()
    [[[[4, 2], [3, 1]]]]
    """

    def apply(x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        h, w = H // 2, W // 2
        if not h or not w:
            fix = "Use larger images."
            raise refusal("swap_quadrants", got=f"{H} x {W} pixels", expected="2 x 2 or more", fix=fix)
        swapped = x.clone()
        swapped[..., :h, :w] = x[..., H - h :, W - w :]
        swapped[..., H - h :, W - w :] = x[..., :h, :w]
        return swapped

    return Transform("quadrant swap", "upper left with lower right", apply)


def shuffle_patches(grid: int = 2, seed: int = 0) -> Transform:
    """Cut each image into grid x grid patches and permute them: one permutation for all images, never the identity.

    Raises
    ------
    Refused
        When grid is not an integer above 1; when called on images whose height or width it does not divide.

    Examples
    --------
    >>> x = torch.arange(4).reshape(1, 1, 2, 2)
    >>> sorted(shuffle_patches(2)(x).flatten().tolist())
    [0, 1, 2, 3]
    """
    grid = as_integer(grid, "shuffle_patches: grid", "an integer, 2 or more", "Give an integer.", least=2)
    seed = as_integer(seed, "shuffle_patches: seed", "an integer from 0 to 2^63 - 1", "Give an integer.", least=0)
    generator = torch.Generator("cpu").manual_seed(seed)
    identity = torch.arange(grid * grid, device="cpu")
    order = identity
    while torch.equal(order, identity):
        order = torch.randperm(grid * grid, generator=generator, device="cpu")

    def apply(x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        if H % grid or W % grid:
            fix = "Choose a grid that divides both sides, or crop the images."
            raise refusal("shuffle_patches", got=f"{H} x {W} pixels", expected=f"multiples of {grid}", fix=fix)
        patches = x.unflatten(-2, (grid, H // grid)).unflatten(-1, (grid, W // grid))  # n C row h column w
        patches = patches.transpose(-3, -2).flatten(2, 3)[:, :, order.to(x.device)]
        return patches.unflatten(2, (grid, grid)).transpose(-3, -2).reshape(x.shape)

    return Transform("patch shuffle", f"{grid} x {grid} patches, seed {seed}", apply)


def standard(image_shape: Sequence[int]) -> dict[str, tuple[Transform, ...]]:
    """Return the transformations of the after-kernel paper for images of one size, under their names.

    "shift": 1 pixel right and 1 down, averaged; "rotation": +0.25 and -0.25 radians, averaged; "zoom": 13/14 (if that
    removes no pixel, to size - 2 pixels); "quadrant swap"; "patch shuffle" on the largest grid of 4, 3, 2 that divides
    both sides, left out if none does. ``parameters`` of each transform says which it is.

    Parameters
    ----------
    image_shape : (C, H, W), or (H, W); both sides 3 pixels or more.

    Raises
    ------
    Refused
        When the shape is not one of images, or they are too small.

    References
    ----------
    Long 2021, Properties of the After Kernel, and its code; that code has no patch shuffle.

    Examples
    --------
    >>> [(name, len(group)) for name, group in standard((1, 28, 28)).items()]
    [('shift', 2), ('rotation', 2), ('zoom', 1), ('quadrant swap', 1), ('patch shuffle', 1)]
    """
    sizes = isinstance(image_shape, (tuple, list)) and all(is_integer(s) for s in image_shape)
    if not sizes or len(image_shape) not in (2, 3) or min(image_shape[-2:]) < 3:
        got = tuple(image_shape) if sizes else type(image_shape).__name__
        expected = "(C, H, W) or (H, W), both sides 3 pixels or more"
        raise refusal("image_shape", got=got, expected=expected, fix="Give x.shape[1:] of the images.")
    H, W = image_shape[-2:]
    side = min(H, W)
    crop = 13 / 14 if _cropped(side, 13 / 14) < side else (side - 2) / side
    probes: dict[str, tuple[Transform, ...]] = {
        "shift": (shift(1, 0), shift(0, 1)),
        "rotation": (rotate(0.25), rotate(-0.25)),
        "zoom": (zoom(crop),),
        "quadrant swap": (swap_quadrants(),),
    }
    for grid in (4, 3, 2):
        if H % grid == 0 and W % grid == 0:
            probes["patch shuffle"] = (shuffle_patches(grid),)
            break
    return probes


def check_images(x: Tensor) -> None:
    """Refuse what is not a tensor of images [n, C, H, W], at least one."""
    if isinstance(x, Tensor):
        check_dense(x, "x")
    if isinstance(x, Tensor) and x.is_complex():
        got, fix = f"complex numbers ({x.dtype})", "Give real and imaginary part as channels."
        raise refusal("x", got=got, expected="images of real numbers", fix=fix)
    if not isinstance(x, Tensor) or x.ndim != 4 or x.numel() == 0:
        shape = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        fix = "Give at least one image; add the missing dimensions with reshape."
        raise refusal("x", got=shape, expected="images [n, C, H, W], a tensor, not empty", fix=fix)


def _nearest(position: Tensor) -> Tensor:
    """Round to the nearest pixel; halves are rounded up, also if rounding errors of the sine moved them."""
    return torch.floor(torch.round(position, decimals=9) + 0.5).to(torch.int64)


def _cropped(size: int, crop: float) -> int:
    return max(1, round(size * crop))


def _resampled(x: Tensor, dim: int, part: int) -> Tensor:
    """Stretch the central `part` pixels of one dimension over the whole of it, linearly between pixel centers."""
    size = x.shape[dim]
    margin = (size - part) / 2
    position = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * (part / size) - 0.5
    position = margin + position.clamp(0, part - 1)
    low = position.floor()
    weight = (position - low).to(x).reshape([-1] + [1] * (-dim - 1))
    low = low.to(x.device, torch.int64)
    high = (low + 1).clamp(max=size - 1)
    return x.index_select(dim, low) * (1 - weight) + x.index_select(dim, high) * weight
