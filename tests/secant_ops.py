"""Operations as small functions of two tensors that the parameters move, h and k, both [n, 4, 6], in float64.

Long because of their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

T, S = torch, torch.special
inf = math.inf
Function = Callable[[Tensor, Tensor], Tensor]


def plain(h: Tensor) -> Tensor:
    """Numbers of the same size that nothing moves."""
    return T.linspace(0, 3, h.numel(), dtype=h.dtype).sin().view(h.shape)


def mask(*size: int) -> Tensor:
    return T.ones(*(size or (4, 6)), dtype=T.bool).triu(1)


def image(h: Tensor) -> Tensor:
    return h.view(len(h), 1, 4, 6)


def volume(h: Tensor) -> Tensor:
    return h.view(len(h), 1, 2, 2, 6)


def complexes(h: Tensor) -> Tensor:
    return T.view_as_complex(h.view(len(h), 4, 3, 2))


def real(z: Tensor) -> Tensor:
    return T.view_as_real(z.resolve_conj()).flatten(1)


def each(function: Callable[..., Tensor]) -> Function:
    """Sample by sample."""
    return lambda h, k: T.stack([function(a, b) for a, b in zip(h, k, strict=True)])


def alone(function: Callable[[Tensor], Any]) -> Function:
    return lambda h, k: function(h)


def written(change: Callable[[Tensor, Tensor], Any]) -> Function:
    """A tensor after something has been done to it, or to a view of it."""

    def run(h: Tensor, k: Tensor) -> Tensor:
        h = h * 1
        change(h, k)
        return h

    return run


def put(*place: Any) -> Callable[[Tensor, Tensor], None]:
    return lambda h, k: h.__setitem__(place, k.__getitem__(place) * 2)


def named(room: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(room, name) for name in names.split()}


IDS, FIRST = T.tensor([0, 2, 2, 1]), T.tensor([True, False, True, True])
STATS = T.arange(4.0, dtype=T.float64)


def rows(h: Tensor) -> Tensor:
    return T.tensor([[0, 1, 1]] * len(h))


def index(h: Tensor) -> Tensor:
    return T.zeros(len(h), 2, 6, dtype=T.long)


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    **named(T, "tanh sigmoid sin cos exp exp2 expm1 sinh cosh atan asinh erf erfc relu abs"),
    **named(T, "neg sign floor ceil round trunc frac square sgn sinc positive deg2rad i0"),
    **named(F, "gelu silu mish leaky_relu elu softplus hardtanh hardswish hardsigmoid"),
    **named(F, "hardshrink softshrink celu selu relu6 logsigmoid softsign tanhshrink"),
    "gelu, tanh": lambda h: F.gelu(h, approximate="tanh"),
    "softplus, kink": lambda h: F.softplus(h, 3, 2),
    "threshold": lambda h: F.threshold(h, 0.2, 0.2),
    "round, decimals": lambda h: T.round(h, decimals=1),
    "clamp": lambda h: h.clamp(-0.3, 0.4),
    "clamp min": lambda h: h.clamp(min=-0.2),
    "clamp max": lambda h: T.clamp_max(h, 0.1),
    "erfinv": lambda h: T.erfinv(h.tanh()),
    "acos": lambda h: T.acos(h.tanh()),
    "atanh": lambda h: T.atanh(0.9 * h.tanh()),
    "logit": lambda h: T.logit(h, eps=0.1),
    "log": lambda h: T.log(h.abs() + 0.1),
    "log2": lambda h: T.log2(h.abs() + 0.1),
    "log1p": lambda h: T.log1p(h * h),
    "lgamma": lambda h: T.lgamma(h.abs() + 0.5),
    "log_ndtr": S.log_ndtr,
    "sqrt": lambda h: T.sqrt(h * h + 0.01),
    "rsqrt": lambda h: T.rsqrt(h * h + 0.01),
    "reciprocal": lambda h: T.reciprocal(h * h + 0.1),
    "number / h": lambda h: 2 / (h * h + 0.1),
    "h / number": lambda h: h / 3,
    **{f"h ** {p}": (lambda h, p=p: (h * h + 0.1) ** p) for p in (-2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 5)},
    "relu(h) ** powers": lambda h: h.relu() ** h.new_tensor([0, 1, 2, 3, 2.5, 0.5]),
    "number ** h": lambda h: 2.0**h,
    "fmod": lambda h: T.fmod(h, 0.3),
    "remainder": lambda h: T.remainder(h, 0.3),
    "div floor": lambda h: T.div(h, 0.3, rounding_mode="floor"),
    "number - h": lambda h: T.rsub(h, 2, alpha=3),
    "h * (h > 0)": lambda h: h * (h > 0) + h * (h <= 0.1) + h * (h >= -0.1),
    "h * ~(h < 0).double()": lambda h: h * (~(h[:, None] < 0)).double()[:, 0],
    "nan_to_num": T.nan_to_num,
    "dropout off": lambda h: F.dropout(h, 0.5, training=False),
    "glu": lambda h: F.glu(h, -1),
    "hypot, constant": lambda h: T.hypot(h, T.ones_like(h)),
    "atan2, constant": lambda h: T.atan2(h, T.ones_like(h)),
    "logaddexp, constant": lambda h: T.logaddexp(h, T.zeros_like(h)),
    "copysign": lambda h: T.copysign(h, -1.0),
    "float_power": lambda h: T.float_power(h, 2),
}

OF_TWO: dict[str, Function] = {
    **named(T, "add sub mul maximum minimum fmax fmin hypot logaddexp"),
    "add alpha": lambda h, k: T.add(h, k, alpha=3),
    "div": lambda h, k: h / (k * k + 0.1),
    "div, sign changes": lambda h, k: h / k,
    "plain / h": lambda h, k: plain(h) / h,
    "max": lambda h, k: T.max(h, plain(h)),
    "fmod 2": lambda h, k: T.fmod(h, k.abs() + 0.2),
    "pow": lambda h, k: (h * h + 0.1) ** k,
    "0 ** k": lambda h, k: h.relu() ** (1.5 + k.tanh()),
    "xlogy": lambda h, k: T.xlogy(h, k * k + 0.1),
    "lerp": lambda h, k: T.lerp(h, k, h * k),
    "addcmul": lambda h, k: T.addcmul(h, h, k, value=0.5),
    "addcdiv": lambda h, k: T.addcdiv(h, h, k * k + 0.2, value=0.5),
    "where": lambda h, k: T.where(T.arange(6) % 2 == 0, h, k),
    "where, crossing": lambda h, k: T.where(h > k, 2 * h, 2 * k),
    "where, number": lambda h, k: T.where(h > 0, h, 0.0),
    "where, meeting": lambda h, k: T.where(h > 0, h, T.expm1(h)),
    "where, meeting far off": lambda h, k: T.where(h > 0, h, 1.5 * T.expm1(9 * h)),
    "smooth_l1": lambda h, k: F.smooth_l1_loss(h, T.ones_like(h), reduction="none", beta=0.5),
    "where, written into": lambda h, k: T.where(_turned(h > 0, lambda truth: truth.fill_(True)), h, 0.0),
    "huber": lambda h, k: F.huber_loss(h, k, reduction="none", delta=0.5),
    "masked_fill": lambda h, k: h.masked_fill(T.arange(6) > 3, 0.5),
    "masked_fill, tensor": lambda h, k: h.masked_fill(T.arange(6) > 3, k[0, 0, 0]),
    "masked_fill, moving": lambda h, k: h.masked_fill(h > 0, 0.0),
    "clamp, moving": lambda h, k: T.clamp(h, min=k, max=k + 0.3),
    "clamp plain": lambda h, k: T.clamp(plain(h), min=h, max=k.abs() + 1),
    "complex": lambda h, k: real(T.complex(h, k)),
    "cross": lambda h, k: T.linalg.cross(h[..., :3], k[..., :3]),
    "mse": lambda h, k: F.mse_loss(h, k, reduction="none"),
    "bce": lambda h, k: F.binary_cross_entropy(h.sigmoid(), k.sigmoid(), reduction="none"),
    "bce logits": lambda h, k: F.binary_cross_entropy_with_logits(h, k.sigmoid(), reduction="none"),
    "kl": lambda h, k: F.kl_div(h.log_softmax(-1), k.softmax(-1), reduction="none"),
    "cross entropy": lambda h, k: F.cross_entropy(h, T.ones(len(h), 6, dtype=T.long), reduction="none"),
    "cross entropy, smoothed": lambda h, k: F.cross_entropy(h[:, 0], T.arange(len(h)), label_smoothing=0.1) * h,
    "nll 2d": lambda h, k: F.nll_loss(h[..., None], T.ones(len(h), 6, 1, dtype=T.long), reduction="none"),
    "multi margin": lambda h, k: F.multi_margin_loss(h[:, 0], T.arange(len(h)), reduction="none"),
}

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h.sum((1, 2)),
    "mean": lambda h: h.mean() * h,
    "prod": lambda h: h.prod(1),
    "prod of all": lambda h: h[0].prod() * h,
    "prod, zeros": lambda h: (h * h.new_tensor([0, 1, 0, 1, 1, 1])).prod(-1, keepdim=True),
    "cumprod": lambda h: (h * h.new_tensor([1, 1, 0, 1, 1, 1])).cumprod(-1),
    "cumsum": lambda h: h.cumsum(1),
    "amax": lambda h: h.amax((1, 2), keepdim=True),
    "amin": lambda h: h.amin(-1),
    "aminmax": lambda h: T.aminmax(h, dim=-1)[1],
    "max": lambda h: h.max(1, keepdim=True).values,
    "min of all": lambda h: h.min() * h,
    "median": lambda h: h.median(-1).values,
    "median of all": lambda h: h.median() * h,
    "kthvalue": lambda h: h.kthvalue(3, 1, keepdim=True).values,
    "topk": lambda h: h.topk(3, -1).values,
    "topk, smallest": lambda h: h.topk(2, 1, largest=False).values,
    "topk 1": lambda h: h.topk(1, -1).values,
    "sort": lambda h: h.sort(-1).values,
    "sort, descending": lambda h: h.sort(1, descending=True).values,
    "sort, long": lambda h: T.sort(h.flatten(1), dim=-1, stable=True).values,
    "msort": lambda h: T.msort(h.transpose(0, 1)).transpose(0, 1),
    "quantile": lambda h: T.quantile(h, 0.3, dim=-1),
    "var": lambda h: h.var(-1),
    "var, biased": lambda h: h.var(unbiased=False) * h,
    "var, correction": lambda h: T.var(h, dim=(1, 2), correction=0, keepdim=True),
    "std": lambda h: h.std(1),
    "var_mean": lambda h: T.cat(T.var_mean(h, -1), 1),
    "std_mean": lambda h: T.cat(T.std_mean(h, dim=-1), 1),
    **{f"norm {p}": (lambda h, p=p: h.norm(p, dim=-1)) for p in (0.5, 1, 2, 3, inf, -inf)},
    "norm of all": lambda h: T.linalg.vector_norm(h) * h,
    "norm of zeros": lambda h: T.cat([(h * 0).norm(dim=-1), (h * 0).square().sum(-1).sqrt(), h[:, 0]], 1),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "normalize zeros": lambda h: F.normalize(h * (T.arange(4) > 0)[:, None], dim=-1),
    "cosine": lambda h: F.cosine_similarity(h, h.flip(1), dim=-1),
    "pairwise": lambda h: F.pairwise_distance(h, h.flip(1)),
    "cdist": lambda h: T.cdist(h, h.flip(-1)),
    "cdist 1": lambda h: T.cdist(h, h.flip(-1) + 1, p=1.0),
    "logsumexp": lambda h: h.logsumexp((1, 2)),
    "logsumexp, keep": lambda h: h.masked_fill(mask(), -inf).logsumexp(1, keepdim=True).clamp(min=-9),
    "softmax": lambda h: h.softmax(1),
    "softmin": lambda h: F.softmin(h, -1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "softmax, masked": lambda h: h.masked_fill(mask(), -inf).softmax(-1),
    "log_softmax, masked": lambda h: h.masked_fill(mask(), -inf).log_softmax(-1).clamp(min=-50),
    "softmax, mask added": lambda h: ((h + T.full((4, 6), -inf, dtype=h.dtype).triu(1)) * 0.7).softmax(-1),
    "softmax, -1e9": lambda h: h.masked_fill(mask(), -1e9).softmax(-1),
    "softmax, least number": lambda h: h.masked_fill(mask(), T.finfo(h.dtype).min).softmax(-1),
    "softmax, rows masked out": lambda h: T._safe_softmax(h.masked_fill(mask(4, 6).flip(1), -inf), -1),
    "numbers": lambda h: h * (_number(h).amax(0) + _number(h).logsumexp(0) + _number(h).sort(0).values),
    "trace": lambda h: T.stack([a.trace() for a in h]),
    "diagonal": lambda h: h.diagonal(0, 1, 2),
    "diag_embed": T.diag_embed,
    "tril": lambda h: h.tril() + h.triu(2),
    "nansum": lambda h: h.nansum(-1),
    "cov": lambda h: T.stack([T.cov(a) for a in h]),
}

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda h: h.view(len(h), 24),
    "reshape": lambda h: h.transpose(1, 2).reshape(len(h), -1),
    "t": lambda h: T.stack([a.t() for a in h]),
    "permute": lambda h: h.permute(0, 2, 1),
    "expand": lambda h: h[:, :1].expand(-1, 5, -1) * h[:, :1, :1],
    "squeeze": lambda h: h[:, :1, :1].squeeze((1, 2)).unsqueeze(1),
    "cat": lambda h: T.cat([h, h * h], 1),
    "split": lambda h: T.cat([h.split(3, 1)[0], h.split([1, 3], 1)[1], h.chunk(3, 1)[0], h.unbind(1)[2][:, None]], 1),
    "unsafe split": lambda h: T.unsafe_split(h, 2, 1)[1] + T.unsafe_split_with_sizes(h, [2, 2], 1)[0],
    "clone": lambda h: T.ops.aten.alias(h.clone().contiguous()),
    "repeat": lambda h: h.repeat(1, 2, 1).repeat_interleave(2, 1),
    "roll": lambda h: h.roll(1, 1).flip(1).rot90(1, (1, 2)),
    "unfold": lambda h: h.unfold(2, 3, 2),
    "im2col": lambda h: F.unfold(image(h), 2, padding=1),
    "col2im": lambda h: F.fold(h, (3, 4), (2, 2)),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h.view(len(h), 4, 3, 2), 2),
    "pixel_unshuffle": lambda h: F.pixel_unshuffle(image(h), 2),
    "channel_shuffle": lambda h: F.channel_shuffle(h[..., None], 2),
    "as_strided": lambda h: T.as_strided(h.contiguous(), (len(h), 2, 3), (24, 6, 2), 1),
    "take": lambda h: T.stack([T.take(a, T.tensor([0, 5])) for a in h]),
    "index": lambda h: h[:, IDS, T.tensor([0, 1, 2, 5])],
    "index, truth": lambda h: h[:, FIRST],
    "index_select": lambda h: h.index_select(1, IDS),
    "gather": lambda h: h.gather(1, index(h)),
    "masked_select": lambda h: h.masked_select(T.arange(6) > 2).view(len(h), -1),
    "index_put": lambda h: h.index_put((T.arange(len(h)), T.zeros(len(h), dtype=T.long)), h[:, 1] * h[:, 2]),
    "index_add": lambda h: h.index_add(1, IDS, h * h, alpha=2),
    "index_copy": lambda h: h.index_copy(1, T.tensor([2, 0]), h[:, :2] * h[:, 1:3]),
    "index_fill": lambda h: h.index_fill(1, T.tensor([2, 0]), 3.0),
    "scatter": lambda h: h.scatter(1, index(h)[:, :1], h[:, 1:2] * h[:, 2:3]).scatter(2, index(h)[:, :1], 2.0),
    "scatter_add": lambda h: h.scatter_add(1, index(h), h[:, 1:3]),
    "scatter_reduce": lambda h: h.scatter_reduce(1, index(h), h[:, 1:3], "mean", include_self=False),
    "masked_scatter": lambda h: h.masked_scatter(T.arange(6) > 3, h * h),
    "slice_scatter": lambda h: T.slice_scatter(h, h[:, :2] * h[:, 1:3], 1, 2, 4),
    "select_scatter": lambda h: T.select_scatter(h, h[:, 1] * h[:, 2], 1, 0),
    "diagonal_scatter": lambda h: T.diagonal_scatter(h, h[:, :, 0] * 2, 0, 1, 2),
    "fill": lambda h: T.fill(h, h[0, 0, 0]) * h,
    "copies": lambda h: T.expand_copy(T.view_copy(h, (len(h), 1, 24)), (len(h), 2, 24)),
    "pad": lambda h: F.pad(h, (1, -2), value=3.0),
    "pad, circular": lambda h: F.pad(h, (1, 2), mode="circular"),
    **{
        f"pad, {mode} {n}": (lambda h, mode=mode, view=view, pads=pads: F.pad(view(h), pads, mode=mode))
        for mode in ("reflect", "replicate")
        for n, (view, pads) in enumerate(
            [(lambda h: h, (1, 2)), (image, (1, 2, 1, 1)), (volume, (1, 2, 1, 1, 1, 1))], start=1
        )
    },
    "to and fro": lambda h: h.to(T.complex128).real.type_as(h),
    "new tensors": lambda h: h.new_full((6,), 2.0) + h.new_ones(6) * T.full_like(h, 2.0) * h + T.ones_like(h),
    "lift_fresh": lambda h: T.ops.aten.lift_fresh_copy(T.ops.aten.lift_fresh(h)),
    "stft": lambda h: real(T.stft(h.flatten(1), 8, return_complex=True, window=T.ones(8, dtype=h.dtype))),
}

PRODUCTS: dict[str, Function] = {
    "mm": each(lambda a, b: a @ b.t()),
    "bmm": lambda h, k: T.bmm(h, k.transpose(1, 2)),
    "mv": each(lambda a, b: a @ b[0]),
    "dot": each(lambda a, b: T.dot(a[0], b[0]) + T.vdot(a[1], b[1]) + T.inner(a[2], b[2])),
    "outer": each(lambda a, b: T.addr(T.outer(a[0], b[0]), a[0], b[1], beta=0.5, alpha=2)),
    "addmm": each(lambda a, b: T.addmm(a[:, :4], a, b.t(), beta=0.5, alpha=2)),
    "addmv": each(lambda a, b: T.addmv(a[:, 0], a, b[1], beta=0.5, alpha=2)),
    "addbmm": lambda h, k: T.addbmm(h[0, :, :4], h, k.transpose(1, 2), beta=0.3, alpha=2) * h[:, :1, :1],
    "baddbmm": lambda h, k: T.baddbmm(h[:, :, :4], h, k.transpose(1, 2), beta=0.3, alpha=2),
    "einsum": lambda h, k: T.einsum("nij,nkj,nil->nkl", h, k, h),
    "tensordot": lambda h, k: T.tensordot(h, k[0], dims=([2], [1])),
    "linear": lambda h, k: F.linear(h, k[0], k[1, :, 0]),
    "bilinear": lambda h, k: F.bilinear(h, k, T.stack([k[0].t() @ h[0], h[1].t() @ h[1]]), h[0, 0, :2]),
    "conv 1": lambda h, k: F.conv1d(h, k[:, :, :3], k[0, 0, : len(k)], padding=1),
    "conv 1, groups": lambda h, k: F.conv1d(h, k[0, :, None, :3], k[0, :, 0], groups=4, dilation=2, stride=2),
    "conv 2": lambda h, k: F.conv2d(image(h), image(k)[..., :3, :3], padding="same"),
    "conv 3": lambda h, k: F.conv3d(volume(h), volume(k)[..., :2], padding=1),
    "transposed 1": lambda h, k: F.conv_transpose1d(h, k[0].view(4, 2, 3), k[0, 0, :2], stride=2, output_padding=1),
    "transposed 1, groups": lambda h, k: F.conv_transpose1d(h, k[0].view(4, 2, 3), groups=2, dilation=2),
    "transposed 2": lambda h, k: F.conv_transpose2d(h.view(-1, 4, 2, 3), k[0].view(4, 1, 2, 3), stride=2, padding=1),
    "transposed 3": lambda h, k: F.conv_transpose3d(h.view(-1, 4, 1, 2, 3), k[0].view(4, 1, 1, 2, 3), stride=2),
    "complex product": lambda h, k: real(complexes(h) * complexes(k)),
    "complex quotient": lambda h, k: real(complexes(h) / (complexes(k) + 9)),
    "complex matrices": lambda h, k: real(complexes(h) @ complexes(k).mH),
    "conjugates": lambda h, k: real((complexes(h).conj() * complexes(k)).conj()) + real(complexes(h).conj()),
    "conj_physical": lambda h, k: real(T.conj_physical(complexes(h))),
    "complex parts": lambda h, k: complexes(h).real * complexes(k).conj().imag,
    "complex abs": lambda h, k: complexes(h).abs(),
    "complex norm": lambda h, k: complexes(h).norm(dim=-1),
    "complex exp": lambda h, k: real((complexes(h) * 1j).exp() + complexes(k).tanh() ** -2),
    "complex root": lambda h, k: real((complexes(h) + 9).sqrt()),
    "fft": lambda h, k: T.fft.ifft(T.fft.fft(h) * T.fft.fft(k)).real,
    "rfft": lambda h, k: T.fft.irfft(T.fft.rfft(h) * T.fft.rfft(k), n=6),
    "spectrum": lambda h, k: T.fft.fft2(h).abs(),
}

NETWORKS: dict[str, Callable[[Tensor], Tensor]] = {
    "average 1": lambda h: F.avg_pool1d(h, 2),
    "average 2": lambda h: F.avg_pool2d(image(h), 2, padding=1, count_include_pad=False),
    "average 3": lambda h: F.avg_pool3d(volume(h), 2),
    "adaptive average 1": lambda h: F.adaptive_avg_pool1d(h, 4),
    "adaptive average 2": lambda h: F.adaptive_avg_pool2d(image(h), (3, 2)),
    "adaptive average 3": lambda h: F.adaptive_avg_pool3d(volume(h), (1, 2, 4)),
    "largest 1": lambda h: F.max_pool1d(h, 3, 2, 1),
    "largest 2": lambda h: F.max_pool2d(image(h), 2, dilation=2, ceil_mode=True),
    "largest 3": lambda h: F.max_pool3d(volume(h), 2),
    "adaptive largest 1": lambda h: F.adaptive_max_pool1d(h, 4),
    "adaptive largest 2": lambda h: F.adaptive_max_pool2d(image(h), (3, 2)),
    "adaptive largest 3": lambda h: F.adaptive_max_pool3d(volume(h), (1, 2, 4)),
    "lp pool": lambda h: F.lp_pool1d(h, 2.0, 2),
    **{
        f"{mode} {n}": (lambda h, mode=mode, view=view, size=size: F.interpolate(view(h), size, mode=mode))
        for mode in ("nearest", "nearest-exact", "area")
        for n, (view, size) in enumerate([(lambda h: h, 9), (image, (5, 9)), (volume, (3, 3, 7))], start=1)
    },
    "linear": lambda h: F.interpolate(h, 9, mode="linear"),
    "bilinear": lambda h: F.interpolate(image(h), (5, 9), mode="bilinear", align_corners=True),
    "bicubic": lambda h: F.interpolate(image(h), (5, 9), mode="bicubic"),
    "trilinear": lambda h: F.interpolate(volume(h), (3, 3, 7), mode="trilinear"),
    "smoothed": lambda h: F.interpolate(image(h), (2, 3), mode="bilinear", antialias=True),
    "smoothed, bicubic": lambda h: F.interpolate(image(h), (2, 3), mode="bicubic", antialias=True),
    "grid": lambda h: F.grid_sample(image(h), plain(h).view(-1, 4, 3, 2) * 0.9, align_corners=False),
    "layer norm": lambda h: F.layer_norm(h, (4, 6), h[0], h[1]),
    "layer norm of data": lambda h: F.layer_norm(plain(h), (6,), h[0, 0], h[0, 1]),
    "group norm": lambda h: F.group_norm(h, 2, h[0, :, 0], h[0, :, 1]),
    "group norm of data": lambda h: F.group_norm(plain(h), 2, h[0, :, 0], h[0, :, 1]),
    "instance norm": lambda h: F.instance_norm(h, weight=h[0, :, 0], bias=h[0, :, 1]),
    "instance norm, statistics": lambda h: F.instance_norm(h, STATS, STATS + 1, use_input_stats=False),
    "batch norm": lambda h: F.batch_norm(h, STATS, STATS + 1, h[0, :, 0], h[0, :, 1]),
    "batch norm, bare": lambda h: F.batch_norm(h, STATS, STATS + 1),
    "batch norm of data": lambda h: F.batch_norm(plain(h), STATS, STATS + 1, h[0, :, 0], h[0, :, 1]),
    "batch norm, train": lambda h: F.batch_norm(h, None, None, h[0, :, 0], h[0, :, 1], training=True),
    "rms norm": lambda h: F.rms_norm(h, (6,), h[0, 0]),
    "rms norm of data": lambda h: F.rms_norm(plain(h), (6,), h[0, 0]),
    "local response": lambda h: F.local_response_norm(h, 3),
    "prelu": lambda h: F.prelu(h, h[0, :, 0]) + F.prelu(plain(h), h[0, 0, :1]),
    "embedding": lambda h: F.embedding(rows(h), h[0]),
    "embedding, padding": lambda h: F.embedding(rows(h), h[0], padding_idx=1),
    "embedding, by frequency": lambda h: F.embedding(rows(h), h[0], scale_grad_by_freq=True),
    "bag": lambda h: F.embedding_bag(rows(h), h[0], mode="sum", scale_grad_by_freq=True),
    "bag, mean": lambda h: F.embedding_bag(rows(h), h[0], mode="mean", padding_idx=1),
    "bag, weights": lambda h: F.embedding_bag(
        rows(h), h[0], mode="sum", per_sample_weights=2 * T.ones(len(h), 3, dtype=h.dtype)
    ),
    "attention": lambda h: F.scaled_dot_product_attention(h, h * 2, h.sin(), is_causal=True),
    "attention, rows masked out": lambda h: F.scaled_dot_product_attention(
        h, h * 2, h.sin(), attn_mask=mask(4, 4).transpose(0, 1)
    ),
    "attention, moving bias": lambda h: F.scaled_dot_product_attention(h, 2 * h, h.sin(), attn_mask=h[:, :, :4]),
    "weight norm": lambda h: h @ T._weight_norm(h[0], h[1, :, :1], 0).t() @ T._weight_norm(h[0], h[1, :1, :], 1),
    "truth of a sum": lambda h: h * 2 if (h * 0 == 0).all() else h,
    "own function": lambda h: Own.apply(h),
    "no grad": lambda h: h * _quiet(h),
    "detached": lambda h: h * h.detach().sigmoid() * h.data,
    "straight through": lambda h: h + (h.round() - h).detach(),
}

WRITES: dict[str, Function] = {
    **{
        n: written(lambda h, k, f=f: f(h))
        for n, f in named(Tensor, "relu_ exp_ sigmoid_ tanh_ zero_ neg_ tril_").items()
    },
    **{n: written(lambda h, k, f=f: f(h, k)) for n, f in named(Tensor, "add_ sub_ mul_ copy_").items()},
    "add_ to itself": written(lambda h, k: h.add_(h)),
    "div_": written(lambda h, k: h.div_(k * k + 1)),
    "pow_": written(lambda h, k: h.pow_(2).add_(1).sqrt_()),
    "clamp_": written(lambda h, k: h.clamp_(-0.2, 0.3)),
    "fill_": written(lambda h, k: h[:, 0].fill_(k[0, 0, 0])),
    "fill_ number": written(lambda h, k: h[:, 0].fill_(3.0)),
    "copy_ of a column": written(lambda h, k: h[:, 0].copy_(h[:, 1] * 2)),
    "index": written(put(slice(None), T.tensor([0, 2]))),
    "slice": written(put(slice(None), slice(1, 3))),
    "truth": written(lambda h, k: h.__setitem__(T.arange(len(h)) > 0, 0.0)),
    "index_add_": written(lambda h, k: h.index_add_(1, IDS, k)),
    "scatter_": written(lambda h, k: h.scatter_(1, index(h)[:, :1], k[:, 1:2] * 2)),
    "masked_fill_": written(lambda h, k: h.masked_fill_(T.arange(6) > 3, 2.0)),
    "lerp_": written(lambda h, k: h.lerp_(k, 0.3)),
    "addcmul_": written(lambda h, k: h.addcmul_(k.sin(), k.cos())),
    "cumsum_": written(lambda h, k: h.cumsum_(-1)),
    "view": written(lambda h, k: h.view(len(h), 24)[:, 3:9].mul_(k[:, 0])),
    "diagonal": written(lambda h, k: h.diagonal(0, 1, 2).add_(5)),
    "transposed": written(lambda h, k: h.transpose(1, 2)[:, 0].add_(k[:, :, 1])),
    "data": written(lambda h, k: h.data.mul_(2)),
    "shape": lambda h, k: (h * 1).transpose_(1, 2).unsqueeze_(1).squeeze_(1),
    "detach_": lambda h, k: (h * 1).detach_() * k,
    "in place activations": alone(lambda h: F.hardtanh_(F.elu_(F.leaky_relu_(h * 1)))),
    "zeros": lambda h, k: _rows_of(T.zeros(len(h), 3, 6, dtype=h.dtype), h),
    "empty": lambda h, k: _rows_of(T.empty(len(h), 3, 6, dtype=h.dtype), h),
    "new_zeros": lambda h, k: _rows_of(h.new_zeros(len(h), 3, 6), h),
    "empty_like": lambda h, k: T.empty_like(h).copy_(h) + h.new_empty(h.shape).copy_(k) + T.zeros_like(h),
    "residual": lambda h, k: _plus(h.tanh(), h.sin()),
}

# Functions that decide: exact, or refused by this name, as the ends may be.
DECIDE: dict[str, tuple[Function, str]] = {
    "atan2": (T.atan2, "aten.atan2.default"),  # of 0 and -0
    "copysign": (T.copysign, "aten.copysign.Tensor"),
    "argmax": (lambda h, k: h.gather(-1, h.argmax(-1, keepdim=True)), "aten.gather.default"),
    "argsort": (lambda h, k: h.gather(-1, h.argsort(-1)), "aten.gather.default"),
    "round to int": (lambda h, k: h.to(T.long) * k, "aten.mul.Tensor"),
    "unpool": (
        lambda h, k: F.max_unpool2d(*F.max_pool2d(image(h), 2, return_indices=True), 2),
        "aten.max_unpool2d.default",
    ),
    "where, jump": (lambda h, k: T.where(h > 0, k + 1, k), "aten.where.self"),
    "masked_fill, jump": (lambda h, k: h.masked_fill(k > 0, 9.0), "aten.where.self"),
    "where, complex": (lambda h, k: real(T.where(k[..., :3] > 0, complexes(h), 0)), "aten.where.self"),
    "where, whole numbers": (lambda h, k: k * T.where(T.arange(6) > 2, (h * 9).long(), 0), "aten.mul.Tensor"),
    "truth turned": (
        lambda h, k: k * _turned(h > 0, lambda truth: truth.logical_not_()).double(),
        "aten._to_copy.default",
    ),
    "index, moving": (lambda h, k: h[h > 0].sum() * k, "aten.index.Tensor"),
    "write, moving": (written(lambda h, k: h.__setitem__(h < 0, 0.0)), "aten.index_put.default"),
    "number of rows": (lambda h, k: k * (h > 0).nonzero().shape[0], "aten.nonzero.default"),
    "distinct": (lambda h, k: k * len((h * 10).long().unique()), "aten._unique2.default"),
    "branch": (lambda h, k: k * 2 if h.sum() > 0 else k, "aten._local_scalar_dense.default"),
    "equal": (lambda h, k: k * 2 if T.equal(h[0, 0, 2:3].relu(), h[0, 0, 2:3]) else k, "aten.equal.default"),
    "number": (lambda h, k: k * float(h.detach().sum()), "aten._local_scalar_dense.default"),
    "sort, any order": (lambda h, k: h.topk(3, sorted=False).values, "aten.topk.default"),
}

# No rule: always refused, by this name.
positive = lambda h: h @ h.mT + T.eye(4, dtype=h.dtype)
square = lambda h: h[..., :4]
LENGTHS = T.tensor([3, 2, 1])
AVERAGED: dict[str, tuple[Function, str]] = {  # exact, or refused where the ends are far apart
    "inverse": (alone(lambda h: T.linalg.inv(positive(h))), "aten.linalg_inv_ex.default"),
    "solve": (alone(lambda h: T.linalg.solve(positive(h), h)), "aten._linalg_solve_ex.default"),
    "triangular": (
        alone(lambda h: T.linalg.solve_triangular(positive(h).tril(), h, upper=False)),
        "aten.linalg_solve_triangular.default",
    ),
    "determinant": (alone(lambda h: T.linalg.det(positive(h))), "aten._linalg_det.default"),
    "logarithm of a determinant": (alone(lambda h: T.linalg.slogdet(positive(h))[1]), "aten._linalg_slogdet.default"),
    "cholesky": (alone(lambda h: T.linalg.cholesky(positive(h))), "aten.linalg_cholesky_ex.default"),
    "matrix exponential": (alone(lambda h: T.linalg.matrix_exp(0.1 * square(h))), "aten.linalg_matrix_exp.default"),
    "eigenvalues": (alone(lambda h: T.linalg.eigvalsh(positive(h))), "aten._linalg_eigh.default"),
    "logcumsumexp": (alone(lambda h: h.logcumsumexp(-1)), "aten.logcumsumexp.default"),
    "cummax": (alone(lambda h: h.cummax(-1).values), "aten.cummax.default"),
    "mode": (alone(lambda h: h.mode(-1).values), "aten.mode.default"),
    "rrelu": (alone(lambda h: F.rrelu(h, training=False)), "aten.rrelu_with_noise.default"),
    "scatter, prod": (
        alone(lambda h: h.scatter_reduce(1, index(h), h[:, 1:3], "prod")),
        "aten.scatter_reduce.two",
    ),
    "packed": (
        alone(lambda h: T._VF._pack_padded_sequence(h[:3], LENGTHS[: len(h[:3])], True)[0]),
        "aten._pack_padded_sequence.default",
    ),
    "foreach": (lambda h, k: T._foreach_add([h, k], 1.0)[1], "aten._foreach_add.Scalar"),
}
REFUSED: dict[str, tuple[Function, str]] = {
    "norm 0": (alone(lambda h: h.norm(0, dim=-1)), "aten.linalg_vector_norm.default"),
    "complex angle": (alone(lambda h: complexes(h).angle()), "aten.angle.default"),
    "complex sgn": (alone(lambda h: real(complexes(h).sgn())), "aten.sgn.default"),
    "complex var": (alone(lambda h: complexes(h).var(-1)), "aten.var.correction"),
    "random": (alone(lambda h: h * T.rand_like(h)), "aten.rand_like.default: got random"),
    "bernoulli": (alone(lambda h: h * T.bernoulli(h.sigmoid())), "aten.bernoulli.default: got random"),
    "heaviside": (lambda h, k: T.heaviside(h, k), "aten.heaviside.default"),
    "igamma": (lambda h, k: T.igamma(h.abs() + 0.1, k.abs() + 0.1), "aten.igamma.default"),
    "bag, max": (
        alone(lambda h: F.embedding_bag(rows(h), h[0], mode="max")),
        "aten._embedding_bag_forward_only.default",
    ),
    "class weights": (
        lambda h, k: F.nll_loss(h[:, 0], T.arange(len(h)), weight=k[0, 0], reduction="none"),
        "aten.nll_loss_forward.default",
    ),
    "scatter, multiply": (
        alone(lambda h: T.ops.aten.scatter.value_reduce(h, 1, index(h), 3.0, reduce="multiply")),
        "aten.scatter.value_reduce",
    ),
    "strides over a view": (alone(lambda h: T.as_strided(h[:, 1:], (len(h), 2, 3), (24, 6, 2))), "aten.as_strided"),
    "strides beyond it": (alone(lambda h: T.as_strided(h[0], (len(h), 2, 3), (24, 6, 2))), "aten.as_strided"),
    "other numbers by parts": (
        lambda h, k: F.huber_loss(T.ones(3, 4, 6), k, reduction="none"),
        "aten.huber_loss.default",
    ),
    "out=": (lambda h, k: T.add(h, k, out=T.empty_like(h)), "aten.add.out"),
    "write into data": (lambda h, k: plain(h).clone().add_(h), "aten.add_.Tensor"),
    "numpy": (alone(lambda h: h * T.from_numpy(h.detach().numpy())), "numpy"),
    "list": (alone(lambda h: h * h[0, 0].tolist()[0]), "tolist"),
}


class Own(torch.autograd.Function):
    """x relu(x), with another function's derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clamp(min=0) * h

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def _quiet(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.sigmoid()


def _turned(truth: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    change(truth[:, 0])
    change(truth[:, 1, 0])
    return truth


def _number(h: Tensor) -> Tensor:
    return h[0, 0, 0] * h[1, 1, 1]


def _rows_of(out: Tensor, h: Tensor) -> Tensor:
    for i in range(3):
        out[:, i] = h[:, i] * h[:, i + 1]
    out[:, 2] += h[:, 0]
    return out


def _plus(x: Tensor, y: Tensor) -> Tensor:
    x += y
    x += x.relu()
    return x


HOLDS: dict[str, Function] = {
    f"{group}: {name}": function if group in ("two", "product", "write") else alone(function)
    for group, table in {
        "one": ELEMENTWISE, "two": OF_TWO, "reduction": REDUCTIONS, "shape": SHAPES, "product": PRODUCTS,
        "network": NETWORKS, "write": WRITES,
    }.items()
    for name, function in table.items()
}  # fmt: skip

# Where autograd's own gradient is another, or none: what is detached, custom backward passes, gradients that PyTorch
# drops or scales, a constant that it keeps in float32, values overwritten that it needs.
OTHER_GRADIENT = {
    "one: hardsigmoid", "network: own function", "network: no grad", "network: detached", "network: straight through",
    "network: embedding, padding", "network: embedding, by frequency", "network: bag", "write: data", "write: detach_",
    "write: in place activations", "write: residual", "reduction: norm of zeros", "one: relu(h) ** powers",
    "two: 0 ** k",
}  # fmt: skip
