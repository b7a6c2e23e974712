"""Eigenfunctions of a kernel away from the training points, on grids, and how fast they vary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntkit.base.batch import Batch, checked, count, take
from ntkit.base.checks import refusal, undefined
from ntkit.base.numbers import as_integer, as_number
from ntkit.data.streamed_samples import in_memory
from ntkit.gram.arrays import Matrix, as_floats, check_finite
from ntkit.kernels.kernel import Kernel
from ntkit.measures.spectra import Spectrum


def grid(side: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Centers of side x side pixels over [low, high]^2, row by row: [side^2, 2], columns (x, y), float64.

    >>> grid(2).tolist()
    [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]
    """
    side = as_integer(side, "side", "an integer from 1", "It is the pixels along one side.", least=1, most=2**31 - 1)
    low, high = (
        as_number(v, name, math.isfinite, "a finite number", "It is an end of the square.")
        for name, v in (("low", low), ("high", high))
    )
    centers = low + (high - low) * (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def eigenfunctions(kernel: Kernel, spectrum: Spectrum, x: Batch, points: Batch, *, batch_size: int = 1024) -> Tensor:
    """Nystrom extension in tiles: v_i(p) = (1 / lambda_i) sum_j k(p, x_j) v_i[j], on many points.

    A slice of the kernel, k(x_0, .) on a grid, needs no function: it is ``kernel(x_0[None], points)[0]``.

    Parameters
    ----------
    kernel : the kernel whose Gram matrix on `x` gave `spectrum`.
    points : m points to evaluate at; on the training points the result is the eigenvectors.
    batch_size : points at a time: memory is batch_size x n.

    Returns
    -------
    Tensor [m, k], float64
        [m C, k] for a kernel with outputs.

    Raises
    ------
    Refused
        As `Spectrum.extend`: an eigenvalue that is not positive has no eigenfunction.

    References
    ----------
    Kopitkov & Indelman 2020, Neural Spectrum Alignment; Jacot et al. 2018, section 4.

    Examples
    --------
    >>> import ntkit
    >>> x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> kernel = ntkit.TangentKernel(torch.nn.Linear(2, 1).double(), "trace")
    >>> top = ntkit.spectrum(kernel(x), k=3)
    >>> torch.allclose(eigenfunctions(kernel, top, x, x, batch_size=3), top.eigenvectors)
    True
    """
    for name, value, kind in (("kernel", kernel, Kernel), ("spectrum", spectrum, Spectrum)):
        if not isinstance(value, kind):
            fix = "Pass e.g. ntkit.TangentKernel(model, 'trace') and ntkit.spectrum(kernel(x), k=3)."
            raise refusal(name, got=type(value).__name__, expected=f"an ntkit {kind.__name__}", fix=fix)
    batch_size = as_integer(batch_size, "batch_size", "an integer >= 1", "It is the points at a time.", least=1)
    points = checked(in_memory(points), "points")
    parts = [
        spectrum.extend(kernel(take(points, slice(start, start + batch_size)), x))
        for start in range(0, count(points), batch_size)
    ]
    return torch.cat(parts)


def patterns(vectors: Matrix, images: Tensor) -> Tensor:
    """Eigenvectors as images: the points, which are images, weighted by the entries, sum_j v_i[j] x_j.

    Parameters
    ----------
    vectors : [n, k], one entry per image.
    images : [n, channels, H, W]; channels are averaged.

    Returns
    -------
    Tensor [k, H, W], float64

    Examples
    --------
    >>> patterns(torch.tensor([[1.0], [-1.0]]), torch.tensor([[[[3.0, 1.0]]], [[[1.0, 1.0]]]])).tolist()
    [[[2.0, 0.0]]]
    """
    values = as_floats(vectors, "vectors").double()
    if not isinstance(images, Tensor):
        fix = "Pass torch.as_tensor(images)."
        raise refusal("images", got=type(images).__name__, expected="a tensor [n, channels, H, W]", fix=fix)
    images = as_floats(images, "images")
    if images.dim() != 4 or values.dim() != 2 or len(values) != len(images):
        got = f"vectors {list(values.shape)}, images {list(images.shape)}"
        raise refusal("patterns", got=got, expected="[n, k] and [n, channels, H, W]", fix="Give one entry per image.")
    return torch.einsum("nk,nhw->khw", values, images.detach().double().mean(1).to(values.device))


def power(images: Matrix) -> Tensor:
    """Power of the 2-D Fourier transform, mean removed, zero frequency in the middle: [..., H, W] -> [..., H, W]."""
    images = _images(images)
    centered = images - images.mean((-2, -1), keepdim=True)
    return torch.fft.fftshift(torch.fft.fft2(centered).abs() ** 2, dim=(-2, -1))


def bandwidth(images: Matrix) -> Tensor:
    """Mean frequency of images, in cycles per image: sum |q| P(q) / sum P(q), P the power, q without zero.

    Parameters
    ----------
    images : [..., H, W]; values on a grid, such as eigenfunctions.

    Returns
    -------
    Tensor [...], float64
        NaN for a constant image among others.

    Raises
    ------
    Refused
        When every image is constant: it has no frequencies. For values that are not finite.

    Examples
    --------
    Three waves across the image:

    >>> wave = torch.sin(2 * torch.pi * 3 * (torch.arange(32) + 0.5) / 32).expand(32, 32)
    >>> round(float(bandwidth(wave)), 6)
    3.0
    """
    images = _images(images)
    largest = images.abs().amax((-2, -1), keepdim=True)
    images = images / torch.where(largest > 0, largest, 1.0)  # squares of very small or large values are representable
    values = power(images)
    H, W = values.shape[-2:]
    as_values = {"dtype": torch.float64, "device": values.device}
    rows, columns = (torch.fft.fftshift(torch.fft.fftfreq(side, 1 / side, **as_values)) for side in (H, W))
    size = (rows[:, None] ** 2 + columns**2).sqrt()
    total = values.sum((-2, -1))
    mean = (values * size).sum((-2, -1)) / total
    varies = total > 1e-24 * (H * W) ** 2
    if not bool(varies.any()):
        fix = "Leave out constant images."
        raise undefined("images", got="constant images only", expected="one whose pixels differ", fix=fix)
    return torch.where(varies, mean, torch.nan)


def _images(images: Matrix) -> Tensor:
    values = as_floats(images, "images").double()
    if values.ndim < 2 or values.numel() == 0:
        raise refusal(
            "images", got=f"shape {list(values.shape)}", expected="[..., H, W]", fix="Reshape values on a grid."
        )
    return check_finite(values, "images")
