"""How alike a kernel finds an image and its transform, and two different images: cosines in its feature space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ntkit.base.checks import refusal
from ntkit.probes.transforms import check_images, standard

Function = Callable[[Tensor], Tensor]

_LARGEST = 2**22  # numbers of a kernel that are held at a time, beside those between the images themselves
_PAPER_SHIFT = 1e-4  # the paper's code adds it to each feature norm
_ROUNDING = 1  # a centered square norm below so many epsilons of what it is a sum of is rounding alone


@dataclass(frozen=True, eq=False)
class Invariance:
    """Mean cosine, in the kernel's feature space, between images and their transforms: 1 means invariant.

    Attributes
    ----------
    mean : over the samples where the cosine is defined; NaN if there is none.
    standard_error : sample standard deviation (n - 1) over sqrt(n); NaN below two defined samples.
    per_sample : Tensor [n], float64; NaN where undefined.
    name : of the transform.
    undefined : number of samples whose cosine is undefined, because K(x, x) or K(Tx, Tx) is 0; not in the mean.
    """

    mean: float
    standard_error: float
    per_sample: Tensor
    name: str
    undefined: int


@dataclass(frozen=True, eq=False)
class Cosines:
    """The same cosines in three forms.

    Attributes
    ----------
    raw : of the features, as by `invariance`.
    centered : of the features minus their mean over the images (not over their transforms). Undefined, too, where
        centering leaves no more than rounding.
    paper : raw, but with 1e-4 added to each feature's norm, as in the code of the after-kernel paper. That makes every
        cosine too small, also an image's with itself; 0 where a norm is zero.
    """

    raw: Invariance
    centered: Invariance
    paper: Invariance


class ImageCosines(NamedTuple):
    """Cosines of images with their transforms, and of different images: see `cosines`.

    Attributes
    ----------
    by_transform : by name of the transform.
    different : of two different images: per image, the mean cosine with all other images. The standard error of their
        mean is the jackknife's, since each pair counts for two images.
    """

    by_transform: dict[str, Cosines]
    different: Cosines


def invariance(kernel: Any, x: Tensor, transform: Function | Sequence[Function]) -> Invariance:
    """Measure how invariant a kernel is to a transformation: the mean of ``K(x, Tx) / sqrt(K(x, x) K(Tx, Tx))``.

    The norms are exact. An image whose norm is zero is counted as undefined. Two different images have a large cosine,
    too, and training changes it: `ntkit.probes.cosines` measures both.

    Parameters
    ----------
    kernel : any kernel with ``kernel.diagonal(x)`` ([n], [n, C] or [n, C, C]; summed over outputs) and, for K(x, Tx),
        ``kernel.paired(x1, x2)`` (the same shapes); without that, diagonals of blocks ``kernel(x1, x2)``.
    x : images [n, C, H, W], at least two.
    transform : one, or several, whose cosines are first averaged per sample.

    Returns
    -------
    Invariance

    Raises
    ------
    Refused
        When x has fewer than two images or is not finite, a transform changes the shape, or the kernel's values are not
        finite or have another shape.

    References
    ----------
    Long 2021, Properties of the After Kernel (there over the first test examples).

    Examples
    --------
    >>> from ntkit.probes import shift
    >>> class Linear:
    ...     def __call__(self, x1, x2):
    ...         return x1.flatten(1) @ x2.flatten(1).T
    ...
    ...     def diagonal(self, x):
    ...         return (x**2).flatten(1).sum(1)
    >>> x = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]).reshape(2, 1, 1, 4)
    >>> result = invariance(Linear(), x, shift(1))
    >>> round(result.mean, 6), round(result.standard_error, 6)
    (0.5, 0.0)
    """
    transforms = _group(transform)
    _check(kernel, x)
    own = _numbers(kernel.diagonal(x), x.shape[:1], "kernel.diagonal(x)")
    found = []
    for one in transforms:
        moved = _moved(one, x)
        other = _numbers(kernel.diagonal(moved), x.shape[:1], "kernel.diagonal(transform(x))")
        cosine = _cosine(_paired(kernel, x, moved), own, other)
        found.append(torch.where(cosine.abs() < 1 + 1e-5, cosine.clamp(-1, 1), cosine))  # rounding only
    names = dict.fromkeys(str(getattr(one, "name", getattr(one, "__name__", "transform"))) for one in transforms)
    return _over_images(", ".join(names), torch.stack(found).mean(0))


def cosines(
    kernel: Any, x: Tensor, transforms: Mapping[str, Function | Sequence[Function]] | None = None
) -> ImageCosines:
    """Measure cosines between images and their transforms, and between different images: the baseline beside them.

    Raw: ``K(a, b) / sqrt(K(a, a) K(b, b))``. Centered: the same of K minus its means over the images,
    ``K(a, b) - mean_j K(a, x_j) - mean_i K(x_i, b) + mean_ij K(x_i, x_j)``. Values are as computed: in float32 rounding
    may leave a cosine 1e-7 above 1.

    Parameters
    ----------
    kernel : any kernel ``kernel(x1, x2)``, ``kernel(x)`` ([n1, n2], [n1, n2, C] or [n1, n2, C, C]; summed over outputs)
        with ``kernel.diagonal(x)``. It is called once with all images and transforms, if that is a small matrix, else
        in blocks: beside a block, only the n x n values between the images themselves are kept.
    x : images [n, C, H, W], at least two.
    transforms : by name a transform, or several, whose cosines are first averaged per image; by default `standard`.

    Returns
    -------
    ImageCosines

    Raises
    ------
    Refused
        As `invariance`; when `transforms` is not a mapping.

    References
    ----------
    Long 2021, Properties of the After Kernel; neither centered cosines nor those of different images are in it.

    Examples
    --------
    >>> from ntkit.probes import shift
    >>> class Linear:
    ...     def __call__(self, x1, x2=None):
    ...         return x1.flatten(1) @ (x1 if x2 is None else x2).flatten(1).T
    ...
    ...     def diagonal(self, x):
    ...         return (x**2).flatten(1).sum(1)
    >>> x = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]).reshape(2, 1, 1, 4)
    >>> found = cosines(Linear(), x, {"shift": shift(1)})
    >>> shifted = found.by_transform["shift"]
    >>> [round(c.mean, 6) for c in (shifted.raw, shifted.centered, found.different.raw)]
    [0.5, -0.276393, 0.5]
    """
    if transforms is not None and not isinstance(transforms, Mapping):
        fix = "Give a dict, or use invariance for one transform."
        raise refusal("transforms", got=type(transforms).__name__, expected="transforms by name", fix=fix)
    _check(kernel, x)
    groups = {k: _group(t) for k, t in (standard(tuple(x.shape[1:])) if transforms is None else transforms).items()}
    n, sets = len(x), [x, *(_moved(one, x) for group in groups.values() for one in group)]
    own, means, between, pairs, rounding = _values(kernel, torch.cat(sets), n)
    whole = means[:n].mean()
    own_centered = own - 2 * means + whole
    own_centered[own_centered < rounding * (own.abs() + 2 * means.abs() + whole.abs())] = 0
    firsts = means[:n].repeat(len(sets))
    forms = (
        (between, own, pairs, 0.0),
        (between - firsts - means + whole, own_centered, pairs - means[:n] - means[:n, None] + whole, 0.0),
        (between, own, pairs, _PAPER_SHIFT),
    )
    by_form, different = [], []
    for products, norms, among, shift in forms:
        table = _cosine(products, norms[:n].repeat(len(sets)), norms, shift).reshape(len(sets), n)
        places = iter(table[1:])
        by_form.append({name: torch.stack([next(places) for _ in group]).mean(0) for name, group in groups.items()})
        alike = _cosine(among, norms[:n, None], norms[:n], shift).fill_diagonal_(math.nan)
        different.append(_over_images("different images", alike.nanmean(1), pairs=True))
    measured = {name: Cosines(*(_over_images(name, form[name]) for form in by_form)) for name in groups}
    return ImageCosines(measured, Cosines(*different))


def _values(kernel: Any, everything: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """What the cosines need of a kernel on images and their transforms, of which the first n are the images.

    Returns
    -------
    tuple
        K(a, a) and the mean of K(a, x_j) over the images, [N]; K(a, x_i) for the image x_i that a was made from, [N];
        K of the images, [n, n]; below which part of a sum of such values there is rounding alone.
    """
    N, sample = len(everything), kernel.diagonal(everything[:2])
    _numbers(sample, (2,), "kernel.diagonal(x)")
    numbers = sample[0].numel()  # per pair of samples
    blocks: Iterator[Tensor]
    if N * N * numbers <= _LARGEST:  # each sample's gradient is then computed once
        K = _numbers(kernel(everything), (N, N), "kernel(x)")
        own, blocks = K.diagonal(), iter([K[:, :n]])
    else:
        own = _numbers(kernel.diagonal(everything), (N,), "kernel.diagonal(x)")
        parts = everything.split(max(1, _LARGEST // (n * numbers)))
        blocks = (_numbers(kernel(part, everything[:n]), (len(part), n), "kernel(x1, x2)") for part in parts)
    means, between, pairs, done = [], [], [], 0
    for block in blocks:
        rows = torch.arange(done, done + len(block), device=block.device)
        means.append(block.mean(1))
        between.append(block.gather(1, (rows % n)[:, None])[:, 0])
        pairs.append(block[: max(0, n - done)].clone())
        done += len(block)
    epsilon = torch.finfo(sample.dtype).eps if sample.is_floating_point() else 0.0
    return own, torch.cat(means), torch.cat(between), torch.cat(pairs), _ROUNDING * epsilon


def _cosine(product: Tensor, one: Tensor, other: Tensor, shift: float = 0.0) -> Tensor:
    """Product over both norms, whose squares are given, each norm plus `shift`; NaN where a norm is zero."""
    if shift:
        return product / (one.clamp_min(0).sqrt() + shift) / (other.clamp_min(0).sqrt() + shift)
    one, other = (norm.where(norm > 0, math.nan) for norm in (one, other))
    return (product / one) / (other / one).sqrt()  # a product of norms could overflow


def _over_images(name: str, per_sample: Tensor, pairs: bool = False) -> Invariance:
    """Mean and standard error over the images where a cosine is defined; `pairs`: each image's mean with the others."""
    valid = per_sample[~per_sample.isnan()]
    n = len(valid)
    error = float(valid.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    if pairs:
        error = error * 2 * (n - 1) / (n - 2) if n > 2 else math.nan
    return Invariance(float(valid.mean()) if n else math.nan, error, per_sample, name, len(per_sample) - n)


def _group(transform: Any) -> list[Function]:
    """One transform or several, as a list."""
    transforms = list(transform) if isinstance(transform, Sequence) else [transform]
    if not transforms:
        raise refusal("transform", got="an empty sequence", expected="one or more", fix="Give a transform.")
    for one in transforms:
        if not callable(one):
            fix = "Give one of ntkit.probes, or a function of images."
            raise refusal("transform", got=type(one).__name__, expected="a function", fix=fix)
    return transforms


def _check(kernel: Any, x: Tensor) -> None:
    """Refuse what is no kernel, and images on which nothing can be measured."""
    methods = [getattr(kernel, name, None) for name in ("__call__", "diagonal")]
    if not all(map(callable, methods)) or isinstance(kernel, Tensor):
        fix = "Give one of ntkit's kernels."
        raise refusal("kernel", got=type(kernel).__name__, expected="a kernel with .diagonal(x)", fix=fix)
    check_images(x)
    if x.shape[0] < 2:
        got = f"{x.shape[0]} sample"
        raise refusal("x", got=got, expected="2 or more, for a standard error", fix="Give more images.")
    _finite(x, "x")


def _moved(transform: Function, x: Tensor) -> Tensor:
    """The transformed images, which must keep their shape."""
    moved = transform(x)
    if not isinstance(moved, Tensor) or moved.shape != x.shape:
        got = f"shape {list(moved.shape)}" if isinstance(moved, Tensor) else type(moved).__name__
        fix = "Use a transform that keeps the shape."
        raise refusal("transform(x)", got=got, expected=f"{list(x.shape)}", fix=fix)
    return moved


def _paired(kernel: Any, x1: Tensor, x2: Tensor, block: int = 32) -> Tensor:
    """K(x1_i, x2_i) for each i, summed over outputs: [n], float64."""
    if hasattr(kernel, "paired"):
        return _numbers(kernel.paired(x1, x2), x1.shape[:1], "kernel.paired(x, transform(x))")
    parts = []
    for a, b in zip(x1.split(block), x2.split(block), strict=True):
        K = kernel(a, b)  # [b, b], [b, b, C] or [b, b, C, C]
        parts.append(K.diagonal(dim1=0, dim2=1).movedim(-1, 0))
    return _numbers(torch.cat(parts), x1.shape[:1], "kernel(x, transform(x))")


def _numbers(values: Tensor, sizes: Sequence[int], name: str) -> Tensor:
    """One float64 number per sample or pair: [*sizes], from that, [*sizes, C] or [*sizes, C, C]; on the CPU."""
    shape, wanted = list(values.shape), list(sizes)
    outputs = shape[len(wanted) :]
    if shape[: len(wanted)] != wanted or len(outputs) > 2 or (len(outputs) == 2 and outputs[0] != outputs[1]):
        fix = "Use one of ntkit's kernels, or follow their shapes."
        text = ", ".join(map(str, wanted))
        raise refusal(name, got=f"shape {shape}", expected=f"[{text}], [{text}, C] or [{text}, C, C]", fix=fix)
    values = values.detach().to("cpu", torch.float64)
    _finite(values, name)
    if len(outputs) == 2:
        values = values.diagonal(dim1=-2, dim2=-1)
    return values.sum(-1) if outputs else values


def _finite(values: Tensor, name: str) -> None:
    good = values.isfinite()
    if not bool(good.all()):
        first = (~good).nonzero()[0].tolist()
        got = f"{float(values[tuple(first)])} at index {first}"
        raise refusal(name, got=got, expected="finite values", fix="Check the data and the parameters.")
