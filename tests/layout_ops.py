"""Operations of the networks in `layout_networks`: over 200 small functions of features, by name.

Features are [n, d], [n, T, d] or [n, c, h, w], samples along the first axis. An operation is a builder: it draws its
parameters and numbers for features of a given shape and returns a `Step`. No step mixes samples.

Long because of their number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize


class Step(nn.Module):
    """One operation: a function of itself and the features; it closes over numbers only, so that copies are apart."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run, self.text = run, ""
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, h: Tensor) -> Tensor:
        return self.run(self, h)


class Draw:
    """Random numbers of one network, and the parameters so far: an equal shape may be tied."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.notes, self.known = rng, [], []

    def one(self, name: str, *options: Any) -> Any:
        """Draw an option, and note it."""
        value = self.rng.choice(options)
        self.notes.append(f"{name}={value}")
        return value

    def some(self, name: str) -> bool:
        return self.one(name, False, True)

    def parameter(self, *shape: int) -> nn.Parameter:
        """A parameter away from zero; now and then an earlier one of that shape."""
        tied = [p for p in self.known if tuple(p.shape) == shape]
        if tied and self.rng.random() < 0.15:
            self.notes.append("tied")
            return tied[0]
        p = nn.Parameter(away_from_zero(*shape))
        self.known.append(p)
        return p

    def odd(self, h: Tensor) -> nn.Parameter:
        """A parameter that broadcasts against features in some way."""
        shape = [size if self.rng.random() < 0.6 else 1 for size in h.shape[1:]]
        while shape and shape[0] == 1 and self.rng.random() < 0.5:
            del shape[0]
        self.notes.append(f"shape={tuple(shape)}")
        return self.parameter(*shape)


def away_from_zero(*shape: int) -> Tensor:
    size = torch.rand(shape, dtype=torch.float64) + 0.4
    return size * (1 - 2 * torch.randint(0, 2, shape))


Builder = Callable[[Draw, Tensor], Step]
OPS: dict[str, tuple[str, Builder]] = {}  # name -> how many axes the features may have ("23": two or three), builder


def op(axes: str) -> Callable[[Builder], Builder]:
    """Register an operation under its function's name."""

    def register(builder: Builder) -> Builder:
        assert builder.__name__ not in OPS
        OPS[builder.__name__] = (axes, builder)
        return builder

    return register


def plain(axes: str, **functions: Callable[[Tensor], Tensor]) -> None:
    """Register functions of the features alone."""
    for name, function in functions.items():
        assert name not in OPS
        OPS[name] = (axes, lambda d, h, f=function: Step(lambda m, t: f(t)))


def broadcast(**functions: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Register functions of the features and one raw parameter that broadcasts against them."""
    for name, function in functions.items():
        assert name not in OPS
        OPS[name] = ("234", lambda d, h, f=function: Step(lambda m, t: f(t, m.w), w=d.odd(h)))


# ---------------------------------------------------------------------- entry by entry

plain(
    "234",
    tanh=torch.tanh,
    sigmoid=torch.sigmoid,
    gelu=F.gelu,
    gelu_tanh=lambda h: F.gelu(h, approximate="tanh"),
    silu=F.silu,
    softplus=F.softplus,
    softplus_beta=lambda h: F.softplus(h, beta=2.0, threshold=1.0),
    mish=F.mish,
    selu=F.selu,
    elu=F.elu,
    celu=lambda h: F.celu(h, 0.7),
    sin=torch.sin,
    cos=torch.cos,
    tan=lambda h: torch.tan(0.5 * torch.tanh(h)),
    exp=lambda h: torch.exp(torch.tanh(h)),
    exp2=lambda h: torch.exp2(torch.tanh(h)),
    expm1=lambda h: torch.expm1(torch.sin(h)),
    log=lambda h: torch.log(1.2 + h.square()),
    log1p=lambda h: torch.log1p(h.square()),
    erf=torch.erf,
    erfc=torch.erfc,
    erfinv=lambda h: torch.erfinv(0.8 * torch.tanh(h)),
    atan=torch.atan,
    asinh=torch.asinh,
    acosh=lambda h: torch.acosh(1.5 + h.square()),
    atanh=lambda h: torch.atanh(0.8 * torch.sin(h)),
    asin=lambda h: torch.asin(0.8 * torch.tanh(h)),
    acos=lambda h: torch.acos(0.8 * torch.tanh(h)),
    sinh=lambda h: torch.sinh(torch.tanh(h)),
    cosh=lambda h: torch.cosh(torch.tanh(h)),
    sinc=torch.sinc,
    square=lambda h: torch.square(torch.tanh(h)),
    cube=lambda h: torch.tanh(h) ** 3,
    sqrt=lambda h: torch.sqrt(1 + h.square()),
    rsqrt=lambda h: torch.rsqrt(1 + h.square()),
    reciprocal=lambda h: torch.reciprocal(2 + torch.tanh(h)),
    logsigmoid=F.logsigmoid,
    softsign=F.softsign,
    tanhshrink=F.tanhshrink,
    lgamma=lambda h: torch.lgamma(2.5 + torch.tanh(h)),
    digamma=lambda h: torch.digamma(2.5 + torch.tanh(h)),
    i0=lambda h: torch.i0(torch.tanh(h)),
    log_ndtr=lambda h: torch.special.log_ndtr(torch.tanh(h)),
    logit=lambda h: torch.logit(torch.sigmoid(h), eps=1e-6),
    entropy=lambda h: torch.special.entr(torch.sigmoid(h)),
    xlog1py=lambda h: torch.special.xlog1py(torch.tanh(h), h.square()),
    relu=F.relu,
    relu6=F.relu6,
    leaky_relu=lambda h: F.leaky_relu(h, 0.2),
    hardtanh=F.hardtanh,
    hardswish=F.hardswish,
    hardsigmoid=F.hardsigmoid,
    softshrink=lambda h: F.softshrink(h, 0.3),
    threshold=lambda h: F.threshold(h, 0.1, 0.1),
    clamp=lambda h: torch.clamp(h, -0.7, 0.9),
    absolute=torch.abs,
    rrelu=lambda h: F.rrelu(h, training=False),
    remainder=lambda h: torch.remainder(h, 1.7) + torch.fmod(h, 3.1),
    frac=lambda h: torch.frac(h) + h,
    huber=lambda h: F.huber_loss(h, torch.zeros_like(h), reduction="none", delta=0.6),
    smooth_l1=lambda h: F.smooth_l1_loss(h, torch.ones_like(h), reduction="none"),
    nan_to_num=lambda h: torch.nan_to_num(torch.sin(h)),
    where=lambda h: torch.where(h > 0.1, torch.sin(h), 0.5 * h),
    copysign=lambda h: torch.copysign(h, torch.cos(h)),
    complex_abs=lambda h: torch.complex(h, torch.cos(h)).abs(),
    polar=lambda h: torch.view_as_real(torch.polar(1 + h.square(), h)).sum(-1),
    complex_square=lambda h: (torch.complex(torch.sin(h), torch.tanh(h)) ** 2).imag,
    complex_exp=lambda h: torch.exp(1j * torch.tanh(h)).conj().imag,
    angle=lambda h: torch.angle(torch.complex(1.5 + torch.tanh(h), h)),
    complex_tanh=lambda h: torch.tanh(torch.complex(0.5 * torch.sin(h), 0.3 * torch.cos(h))).real,
)
broadcast(
    scale=lambda h, w: h * w,
    shift=lambda h, w: h + w,
    divide=lambda h, w: h / w,
    divided_by=lambda h, w: w / (2 + torch.tanh(h)),
    subtract_from=lambda h, w: torch.sub(w, h, alpha=0.5),
    addcmul=lambda h, w: torch.addcmul(h, w, torch.sin(h), value=0.5),
    addcdiv=lambda h, w: torch.addcdiv(h, w, 2 + torch.tanh(h), value=0.7),
    lerp_weight=lambda h, w: torch.lerp(h, torch.tanh(h), w),
    lerp_end=lambda h, w: torch.lerp(h, w.expand_as(h), 0.3),
    where_parameter=lambda h, w: torch.where(h > 0, h, w),
    power=lambda h, w: (1.5 + torch.tanh(h)) ** w,
    power_of_weight=lambda h, w: w.abs() ** torch.tanh(h),
    maximum=torch.maximum,
    minimum=lambda h, w: torch.minimum(w, h),
    fmax=torch.fmax,
    logaddexp=torch.logaddexp,
    logaddexp2=torch.logaddexp2,
    hypot=torch.hypot,
    atan2=torch.atan2,
    xlogy=lambda h, w: torch.xlogy(w, 1.2 + h.square()),
    exp_scale=lambda h, w: h * w.exp(),
    softplus_of_weight=lambda h, w: torch.tanh(h) * F.softplus(w),
    twice_used=lambda h, w: w * torch.tanh(h) * w + w,
    complex_scale=lambda h, w: (torch.complex(h, torch.sin(h)) * torch.polar(torch.ones_like(w), w)).real,
    complex_divide=lambda h, w: (torch.complex(h, h * h) / torch.complex(w, w.square())).imag,
    clamp_by_weight=lambda h, w: torch.clamp(h, min=w - 1.5, max=w + 1.5),
    expanded_weight=lambda h, w: h * w.expand_as(h).contiguous(),
    weight_as_strided=lambda h, w: h + w.reshape(-1).as_strided((1,), (1,), w.numel() - 1),
    broadcast_tensors=lambda h, w: torch.mul(*torch.broadcast_tensors(torch.sin(h), w)),
    masked_fill_weight=lambda h, w: torch.where(torch.isfinite(h), h, 0.0).masked_fill(w.detach() > 0.9, 0.2) * w,
)


class Product(torch.autograd.Function):
    """h * w, w along the last axis, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        return h * w

    @staticmethod
    def backward(ctx, grad):
        h, w = ctx.saved_tensors
        return grad * w, (grad * h).sum(tuple(range(h.dim() - 1)))


class Cubed(torch.autograd.Function):
    """h^3 whose gradient is returned transposed in memory, as an own backward pass may."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h**3

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return (3 * h.square() * grad).transpose(0, -1).contiguous().transpose(0, -1)


plain("234", own_cube=lambda h: Cubed.apply(torch.tanh(h)))


@op("234")
def own_product(d, h):
    return Step(lambda m, t: Product.apply(t, m.w), w=d.parameter(h.shape[-1]))


@op("234")
def prelu(d, h):
    return Step(lambda m, t: F.prelu(t, m.w), w=d.parameter(d.one("weights", 1, h.shape[1])))


# ---------------------------------------------------------------------- products


def width(d: Draw) -> int:
    return d.one("width", 1, 2, 3)


@op("234")
def linear(d, h):
    return Step(lambda m, t: m.f(t), f=nn.Linear(h.shape[-1], width(d), bias=d.some("bias")))


@op("234")
def matmul(d, h):
    return Step(lambda m, t: t @ m.w, w=d.parameter(h.shape[-1], width(d)))


@op("34")
def matmul_left(d, h):
    return Step(lambda m, t: m.w @ t, w=d.parameter(width(d), h.shape[-2]))


@op("234")
def linear_transposed_weight(d, h):
    return Step(lambda m, t: F.linear(t, m.w.T, m.b), w=d.parameter(h.shape[-1], 2), b=d.parameter(2))


@op("2")
def addmm(d, h):
    o = width(d)
    return Step(
        lambda m, t: torch.addmm(m.b, t, m.w, beta=0.5, alpha=2.0), w=d.parameter(h.shape[1], o), b=d.parameter(o)
    )


@op("2")
def mv(d, h):
    return Step(lambda m, t: torch.mv(t, m.w)[:, None], w=d.parameter(h.shape[1]))


@op("3")
def bmm_expanded(d, h):
    return Step(lambda m, t: torch.bmm(t, m.w.expand(len(t), -1, -1)), w=d.parameter(h.shape[2], 2))


@op("3")
def baddbmm(d, h):
    parts = {"w": d.parameter(h.shape[1], h.shape[2], 2), "b": d.parameter(h.shape[1], 1, 2)}
    return Step(lambda m, t: torch.baddbmm(m.b, t.transpose(0, 1), m.w, beta=0.5).transpose(0, 1), **parts)


@op("3")
def gram(d, h):
    return Step(lambda m, t: torch.bmm(torch.tanh(t), torch.tanh(t).mT))


@op("234")
def einsum(d, h):
    return Step(lambda m, t: torch.einsum("...i,oi->...o", t, m.w), w=d.parameter(2, h.shape[-1]))


@op("4")
def einsum_channels(d, h):
    return Step(lambda m, t: torch.einsum("nchw,cd->ndhw", t, m.w), w=d.parameter(h.shape[1], 2))


@op("34")
def tensordot(d, h):
    return Step(lambda m, t: torch.tensordot(t, m.w, dims=([1], [0])), w=d.parameter(h.shape[1], 2))


@op("2")
def kron(d, h):
    return Step(lambda m, t: torch.kron(t.contiguous(), m.w), w=d.parameter(1, 2))


@op("234")
def bilinear(d, h):
    i = min(h.shape[-1], 3)
    return Step(lambda m, t: m.f(torch.tanh(t[..., :i]), torch.sin(t[..., -i:])), f=nn.Bilinear(i, i, 2))


@op("2")
def multi_dot(d, h):
    return Step(
        lambda m, t: torch.linalg.multi_dot([t, m.a, m.b]), a=d.parameter(h.shape[1], 2), b=d.parameter(2, width(d))
    )


@op("234")
def lora(d, h):
    i = h.shape[-1]
    return Step(lambda m, t: t @ (m.w + m.a @ m.b), w=d.parameter(i, 2), a=d.parameter(i, 1), b=d.parameter(1, 2))


@op("234")
def softmax_of_weight(d, h):
    return Step(lambda m, t: t @ m.w.softmax(0), w=d.parameter(h.shape[-1], 2))


@op("234")
def weight_by_network(d, h):
    return Step(
        lambda m, t: t @ torch.tanh(m.v @ m.w).view(t.shape[-1], 2), v=d.parameter(2), w=d.parameter(2, 2 * h.shape[-1])
    )


@op("234")
def outer_with_weight(d, h):
    return Step(lambda m, t: (t.unsqueeze(-1) * m.w).flatten(-2), w=d.parameter(2))


@op("234")
def weight_norm(d, h):
    return Step(lambda m, t: m.f(t), f=parametrizations.weight_norm(nn.Linear(h.shape[-1], 2), dim=d.one("dim", 0, 1)))


@op("234")
def spectral_norm(d, h):
    return Step(lambda m, t: m.f(t), f=parametrizations.spectral_norm(nn.Linear(h.shape[-1], 2)))


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


@op("234")
def parametrized_symmetric(d, h):
    layer = nn.Linear(h.shape[-1], h.shape[-1])
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return Step(lambda m, t: m.f(t), f=layer)


@op("4")
def weight_norm_conv(d, h):
    return Step(lambda m, t: m.f(t), f=parametrizations.weight_norm(nn.Conv2d(h.shape[1], 2, (1, 2), padding=(0, 1))))


# ---------------------------------------------------------------------- convolutions


def convolution(d: Draw, h: Tensor, n: int, transposed: bool) -> nn.Module:
    c = h.shape[1]
    groups = d.one("groups", 1, c if c <= 3 else 1)
    out = groups * d.one("out", 1, 2) if groups > 1 or c > 3 else 2
    kernel = tuple(
        d.one("kernel", 1, 2) if size == 1 or i else d.one("kernel", 2, 3) for i, size in enumerate(h.shape[2:])
    )
    stride, bias = d.one("stride", 1, 1, 2), d.some("bias")
    if transposed:
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
        extra = d.one("output_padding", 0, stride - 1)
        return layer(c, out, kernel, stride, 0, extra, groups, bias, dilation=d.one("dilation", 1, 2))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    modes = ["zeros", "replicate", "circular"] + ["reflect"] * (min(h.shape[2:]) > 1)
    mode, odd = d.one("mode", *modes), all(size % 2 for size in kernel)
    padding = d.one("padding", 1, "same") if stride == 1 and odd else 1
    return layer(c, out, kernel, stride, padding, 1, groups, bias, mode)


@op("4")
def conv2d(d, h):
    return Step(lambda m, t: m.f(t), f=convolution(d, h, 2, False))


@op("4")
def conv2d_dilated(d, h):
    return Step(lambda m, t: m.f(t), f=nn.Conv2d(h.shape[1], 2, 2, padding=2, dilation=2, bias=d.some("bias")))


@op("4")
def conv2d_one_by_one(d, h):
    return Step(lambda m, t: m.f(t), f=nn.Conv2d(h.shape[1], 2, 1, stride=d.one("stride", 1, 2)))


@op("4")
def conv2d_channels_last_weight(d, h):
    layer = nn.Conv2d(h.shape[1], 2, 2, padding=1).to(memory_format=torch.channels_last)
    return Step(lambda m, t: m.f(t), f=layer)


@op("4")
def conv_transpose2d(d, h):
    return Step(lambda m, t: m.f(t), f=convolution(d, h, 2, True))


@op("3")
def conv1d(d, h):
    return Step(lambda m, t: m.f(t.transpose(1, 2)).transpose(1, 2), f=convolution(d, h.transpose(1, 2), 1, False))


@op("3")
def conv1d_over_features(d, h):
    return Step(lambda m, t: m.f(t), f=convolution(d, h, 1, False))


@op("3")
def conv_transpose1d(d, h):
    return Step(lambda m, t: m.f(t), f=convolution(d, h, 1, True))


@op("4")
def conv3d(d, h):
    return Step(
        lambda m, t: m.f(t.unsqueeze(1)).flatten(1, 2),
        f=nn.Conv3d(1, 2, (1, 2, 2), padding=d.one("padding", 1, (0, 1, 1))),
    )


@op("4")
def conv_transpose3d(d, h):
    return Step(lambda m, t: m.f(t.unsqueeze(2)).flatten(1, 2), f=nn.ConvTranspose3d(h.shape[1], 1, (1, 2, 1)))


@op("4")
def conv_of_unfolded(d, h):
    return Step(lambda m, t: m.w @ F.unfold(t, 2, padding=1), w=d.parameter(2, 4 * h.shape[1]))


@op("4")
def conv_functional_shared(d, h):
    weight = d.parameter(2, 1, 1, 2)
    return Step(lambda m, t: F.conv2d(t, m.w.expand(-1, t.shape[1], -1, -1), padding=(0, 1)), w=weight)


# ---------------------------------------------------------------------- normalizations


def batch_norm_of(d: Draw, c: int, n: int) -> nn.Module:
    layer = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1](c, affine=d.one("affine", True, True, False))
    return layer


@op("23")
def batch_norm1d(d, h):
    return Step(lambda m, t: m.f(t), f=batch_norm_of(d, h.shape[1], 1))


@op("3")
def batch_norm1d_tokens(d, h):
    return Step(lambda m, t: m.f(t.transpose(1, 2)).transpose(1, 2), f=batch_norm_of(d, h.shape[2], 1))


@op("4")
def batch_norm2d(d, h):
    return Step(lambda m, t: m.f(t), f=batch_norm_of(d, h.shape[1], 2))


@op("3")
def batch_norm2d_of_tokens(d, h):
    return Step(
        lambda m, t: m.f(t.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2), f=batch_norm_of(d, h.shape[2], 2)
    )


@op("4")
def batch_norm3d(d, h):
    return Step(lambda m, t: m.f(t.unsqueeze(3)).squeeze(3), f=batch_norm_of(d, h.shape[1], 3))


@op("234")
def batch_norm_functional(d, h):
    c = h.shape[1]
    parts = {"mean": torch.randn(c).double(), "var": torch.rand(c).double() + 0.5}
    parts |= {"w": d.parameter(c), "b": d.parameter(c)} if d.some("affine") else {"w": None, "b": None}
    return Step(lambda m, t: F.batch_norm(t, m.mean, m.var, m.w, m.b, eps=1e-3), **parts)


@op("4")
def instance_norm2d(d, h):
    layer = nn.InstanceNorm2d(h.shape[1], affine=d.some("affine"), track_running_stats=d.some("tracked"), eps=0.1)
    return Step(lambda m, t: m.f(F.pad(t, (0, 1))), f=layer)


@op("3")
def instance_norm1d(d, h):
    layer = nn.InstanceNorm1d(h.shape[1], affine=d.some("affine"), track_running_stats=d.some("tracked"), eps=0.1)
    return Step(lambda m, t: m.f(F.pad(t, (0, 1))), f=layer)


@op("4")
def instance_norm3d(d, h):
    layer = nn.InstanceNorm3d(h.shape[1], affine=d.some("affine"), track_running_stats=d.some("tracked"), eps=0.1)
    return Step(lambda m, t: m.f(F.pad(t, (0, 1)).unsqueeze(2)).squeeze(2), f=layer)


def _safe(t):
    """Features for a group norm: PyTorch 2.13 crashes where they are channels-last and their gradient is not wanted."""
    return t if t.requires_grad else t.clone(memory_format=torch.contiguous_format)


@op("234")
def group_norm(d, h):
    c = 2 * h.shape[1]
    layer = nn.GroupNorm(d.one("groups", 1, c // 2), c, eps=0.1, affine=d.some("affine"))
    return Step(lambda m, t: m.f(_safe(torch.cat([t, torch.sin(t)], 1))), f=layer)


@op("4")
def group_norm_alone(d, h):
    c = h.shape[1]
    layer = nn.GroupNorm(d.one("groups", 1, c), c, eps=0.1)
    return Step(lambda m, t: m.f(_safe(t if t[0, 0].numel() > 1 else F.pad(t, (0, 1)))), f=layer)


@op("234")
def layer_norm(d, h):
    k = d.one("axes", *range(1, h.dim()))
    return Step(lambda m, t: m.f(t), f=nn.LayerNorm(h.shape[-k:], eps=0.1, elementwise_affine=d.some("affine")))


@op("4")
def layer_norm_channels(d, h):
    return Step(lambda m, t: m.f(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), f=nn.LayerNorm(h.shape[1], eps=0.1))


@op("234")
def rms_norm(d, h):
    return Step(lambda m, t: m.f(t), f=nn.RMSNorm(h.shape[-1], eps=0.1, elementwise_affine=d.some("affine")))


plain(
    "34",
    local_response_norm=lambda h: F.local_response_norm(h, 2, alpha=0.5),
    normalize=lambda h: F.normalize(h + 0.1, dim=1),
    normalize_l1=lambda h: F.normalize(h, p=1.0, dim=-1),
)
plain(
    "234",
    softmax=lambda h: F.softmax(h, -1),
    softmax_first=lambda h: F.softmax(h, 1),
    log_softmax=lambda h: F.log_softmax(h, 1),
    softmin=lambda h: F.softmin(h, -1),
    glu=lambda h: F.glu(torch.cat([h, torch.sin(h)], 1), 1),
    standardized=lambda h: (h - h.mean(-1, keepdim=True)) / (0.3 + h.var(-1, keepdim=True, correction=0)).sqrt(),
)
