"""Random networks, drawn step by step: typed programs over vectors, token sequences and images, printed as their ops.

Whatever is drawn is a valid network whose samples do not see each other. Parameters are random, and none is near zero
unless a branch is meant to be dead.

Long because every operation is a function here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

WORDS = 7  # in the vocabulary
LARGEST = 150  # numbers per sample between two steps
IMAGES = ("i1", "i2", "i3")
# Kinds of features: vectors [N, D]; tokens [N, T, D]; sequence-major tokens [T, N, D]; images [N, C, *sizes].
ANY = ("v", "t", "s", *IMAGES)


class Op(nn.Module):
    """One step of a network: a function of itself and the features, with modules and parameters as attributes.

    The function closes over numbers only, so that a deep copy of the network shares nothing with it.
    """

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run, self.text = run, ""
        for name, part in parts.items():
            setattr(self, name, nn.ModuleList(part) if isinstance(part, list) else part)

    def forward(self, *h: Tensor) -> Tensor:
        return self.run(self, *h)


class Drawer:
    """What has been drawn so far: features `h` of two example samples, their kind, and parts to use again."""

    def __init__(self, choices: bytes) -> None:
        self.choices, self.notes = iter(choices), []
        self.keep, self.fresh, self.depth = False, False, 0
        self.live = False  # whether the features depend on some parameter
        self.made: list[tuple[str, tuple[int, ...], Op]] = []  # ops that can be used again where features are the same
        self.matrices: list[nn.Parameter] = []  # that others may share
        self.dead: list[nn.Parameter] = []
        self.kind, self.h = "v", torch.zeros(2, 1)

    def pick(self, options: Iterable[Any]) -> Any:
        """Draw one of the options; the first is the simplest, and what is drawn when the choices are used up."""
        options = list(options)
        return options[next(self.choices, 0) % len(options)] if len(options) > 1 else options[0]

    def one(self, name: str, options: Iterable[Any]) -> Any:
        """Draw one of the options, and note it."""
        value = self.pick(options)
        self.notes.append(f"{name}={value}")
        return value

    def maybe(self, name: str) -> bool:
        return self.one(name, (False, True))

    def width(self, now: int) -> int:
        return now if self.keep else self.one("width", (2, 3, 4, 6))

    def divisor(self, name: str, *numbers: int) -> int:
        return self.one(name, [k for k in (1, 2, 3) if not any(n % k for n in numbers)])

    @property
    def batch_axis(self) -> int:
        return 1 if self.kind == "s" else 0

    @property
    def time_axis(self) -> int:
        return 0 if self.kind == "s" else 1

    def axis(self) -> int:
        """Some axis that is not the batch."""
        return self.one("axis", [a for a in range(self.h.dim()) if a != self.batch_axis])

    def shape(self) -> tuple[int, ...]:
        """Some shape that broadcasts against the features and is the same for every sample."""
        full = [1 if a == self.batch_axis else size for a, size in enumerate(self.h.shape)]
        shape = [size if size == 1 or self.one("whole", (True, False)) else 1 for size in full]
        while shape and shape[0] == 1 and self.maybe("short"):
            del shape[0]
        return tuple(shape)

    def step(self, keep: bool = False, name: str | None = None) -> Op:
        """Draw an op that fits the features at hand and put them through it; `keep`: it must keep their shape."""
        fits = [
            key
            for key, (_, kinds, keeps, often) in OPS.items()
            for _ in range(often)
            if self.kind in kinds and (keeps or not keep) and (self.depth < 2 or key not in NESTED)
        ]
        kind, before, fresh, live = self.kind, self.h, self.fresh, self.live
        outer, self.notes, self.keep, self.depth = (self.notes, self.keep), [], keep, self.depth + 1
        name = name or self.pick(fits)
        found = OPS[name][0](self)
        op, new = found if isinstance(found, tuple) else (found, kind)
        if op is not None:
            after = op(before.clone() if fresh else before)
        if op is None or after[0].numel() > LARGEST:
            name, op, new, after, self.notes = "tanh", Op(lambda m, h: torch.tanh(h)), kind, torch.tanh(before), []
        op.text = f"{name}({', '.join(self.notes)})"
        (self.notes, self.keep), self.depth = outer, self.depth - 1
        if new == kind and name not in ("inplace", "again"):
            shape = tuple(size for a, size in enumerate(before.shape) if a != self.batch_axis)
            self.made.append((kind, shape, op))
        self.h, self.kind, self.fresh, self.live = after.detach(), new, name in FRESH, live or after.requires_grad
        return op

    def branch(self, *counts: int) -> list[Op]:
        """Draw some steps that keep the shape of the features at hand, which stay where they are."""
        h, kind, self.fresh = self.h, self.kind, False
        ops = [self.step(keep=True) for _ in range(self.pick(counts or (1, 2)))]
        self.notes.append(" > ".join(op.text for op in ops))
        self.h, self.kind = h, kind
        return ops

    def matrix(self, i: int, o: int) -> Op:
        """Draw a weight [i, o]: a parameter, an earlier layer's, or an expression in parameters."""
        forms = [form for form in WEIGHTS if not form.startswith("tied") and (i == o or form not in SQUARE)]
        for form, shape in (("tied", (i, o)), ("tied transposed", (o, i))):
            forms += [form] * 3 * any(p.shape == shape for p in self.matrices)
        form = self.one("weight", forms)
        shape = {"transposed": (o, i), "tied transposed": (o, i), "part": (i * o + 3,)}.get(form, (i, o))
        if form.startswith("tied"):
            known = [p for p in self.matrices if p.shape == shape]
            w = known[self.one("which", range(len(known)))]
        else:
            w = parameter(*shape)
            if len(shape) == 2:
                self.matrices.append(w)
        more = {"scaled": [(1,)], "lora": [(i, 1), (1, o)], "joined": [(1, o)], "made": [(i * o, 2), (2,)]}
        parts = dict(zip("uv", (parameter(*s) for s in more.get(form, [])), strict=False))
        run = WEIGHTS[form]
        return Op(lambda m: run(m).reshape(i, o), w=w, **parts)


def parameter(*shape: int) -> nn.Parameter:
    """A random parameter, away from zero."""
    size = torch.rand(shape, dtype=torch.float64) + 0.4
    return nn.Parameter(size * (1 - 2 * torch.randint(0, 2, shape)))


def run_all(ops: Iterable[Op], h: Tensor) -> Tensor:
    for op in ops:
        h = op(h)
    return h


OPS: dict[str, tuple[Callable[[Drawer], Any], tuple[str, ...], bool, int]] = {}


def op(*kinds: str, keeps: bool = False, often: int = 2) -> Callable[[Callable], Callable]:
    """Register an op by name, for some kinds of features; `keeps` if it keeps their shape when `d.keep` says so.

    The function draws the op, and what kind of features it makes if another; None where it does not apply.
    """

    def register(function: Callable) -> Callable:
        OPS[function.__name__] = (function, kinds, keeps, often)
        return function

    return register


# ---------------------------------------------------------------------- products with weights

SQUARE = ("square", "symmetric")
WEIGHTS: dict[str, Callable[[Any], Tensor]] = {
    "plain": lambda m: m.w,
    "transposed": lambda m: m.w.T,
    "tied": lambda m: m.w,
    "tied transposed": lambda m: m.w.T,
    "scaled": lambda m: m.w * m.u,
    "lora": lambda m: m.w + 0.5 * m.u @ m.v,
    "tril": lambda m: m.w.tril(1),
    "softmax": lambda m: m.w.softmax(0),
    "part": lambda m: m.w[1:-2],
    "flipped": lambda m: m.w.flip(0),
    "joined": lambda m: torch.cat([m.w[1:], m.u]),
    "made": lambda m: m.w + (m.u @ m.v).view_as(m.w),
    "normed": lambda m: F.normalize(m.w, dim=0),
    "power": lambda m: m.w * m.w,
    "square": lambda m: m.w @ m.w,
    "symmetric": lambda m: m.w @ m.w.T,
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "h @ W": lambda h, w: h @ w,
    "linear": lambda h, w: F.linear(h, w.T),
    "einsum": lambda h, w: torch.einsum("...i,io->...o", h, w),
    "W.T @ h": lambda h, w: (w.T @ h.unsqueeze(-1)).squeeze(-1),
    "W.T @ h.T": lambda h, w: (w.T @ h.transpose(-1, -2)).transpose(-1, -2),
    "tensordot": lambda h, w: torch.tensordot(h, w, 1),
    "by hand": lambda h, w: (h.unsqueeze(-1) * w).sum(-2),
    "addmm": lambda h, w: torch.addmm(w[0], h.reshape(-1, len(w)), w, beta=0.5, alpha=2.0).unflatten(0, h.shape[:-1]),
    "h @ W @ W.T @ W": lambda h, w: h @ w @ w.T @ w,
    "vmap": lambda h, w: torch.vmap(lambda one: one @ w)(h),
}


@op(*ANY, keeps=True, often=4)
def linear(d):
    i = d.h.shape[-1]
    layer, how = nn.Linear(i, d.width(i), bias=not d.maybe("no_bias")), d.one("how", ("plain", "weight", "spectral"))
    if how == "plain":
        d.matrices.append(layer.weight)
    wrap = {"plain": lambda m: m, "weight": weight_norm, "spectral": spectral_norm}[how]
    return Op(lambda m, h: m.f(h), f=wrap(layer))


@op(*ANY, keeps=True, often=4)
def matrix(d):
    i = d.h.shape[-1]
    o = d.width(i)
    product, w, b = PRODUCTS[d.one("form", PRODUCTS)], d.matrix(i, o), parameter(o) if d.maybe("bias") else None
    return Op(lambda m, h: product(h, m.w()) + (0 if m.b is None else m.b), w=w, b=b)


@op(*ANY, keeps=True)
def lora(d):
    i = d.h.shape[-1]
    o, rank = d.width(i), d.one("rank", (1, 2))
    base, a, b = nn.Linear(i, o), nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)
    d.dead += [b.weight] * d.maybe("at_start")
    return Op(lambda m, h: m.base(h) + m.b(m.a(h)), base=base, a=a, b=b)


@op("v", "t", "s", keeps=True)
def bilinear(d):
    i = d.h.shape[-1]
    return Op(lambda m, h: m.f(torch.tanh(h), torch.tanh(h)), f=nn.Bilinear(i, i, d.width(i)))


@op("t", "s", keeps=True)
def over_time(d):
    axis = d.time_axis
    size = d.h.shape[axis]
    return Op(lambda m, h: m.f(h.transpose(axis, -1)).transpose(axis, -1), f=nn.Linear(size, d.width(size)))


@op("t", "s", keeps=True, often=3)
def per_position(d):
    t, i = d.h.shape[d.time_axis], d.h.shape[-1]
    o, batch_first, form = d.width(i), d.kind == "t", d.one("form", ("einsum", "bmm", "baddbmm"))

    def run(m, h):
        h = h.transpose(0, 1) if batch_first else h
        if form == "einsum":
            h = torch.einsum("tnd,tde->tne", h, m.w)
        else:
            h = torch.bmm(h, m.w) if form == "bmm" else torch.baddbmm(m.b, h, m.w, beta=0.5)
        return h.transpose(0, 1) if batch_first else h

    return Op(run, w=parameter(t, i, o), b=parameter(t, 1, o))


@op("v", keeps=True)
def experts(d):
    i = d.h.shape[-1]
    o, routed = d.width(i), d.maybe("routed")

    def run(m, h):
        if not routed:
            return torch.einsum("nk,ni,kio->no", m.gate(h).softmax(1), h, m.w)
        choice, out = (h[:, 0] > 0.1).long(), h.new_zeros(len(h), o)
        for k in range(2):
            rows = (choice == k).nonzero().flatten()
            out = out.index_put((rows,), h[rows] @ m.w[k])
        return out

    return Op(run, gate=nn.Linear(i, 2), w=parameter(2, i, o))


@op("t", "s", keeps=True)
def queries(d):
    q = d.h.shape[d.time_axis] if d.keep else d.one("number", (1, 2, 3))
    batch_first = d.kind == "t"

    def run(m, h):
        h = h if batch_first else h.transpose(0, 1)
        h = (m.q @ h.transpose(1, 2)).softmax(-1) @ h
        return h if batch_first else h.transpose(0, 1)

    return Op(run, q=parameter(q, d.h.shape[-1]))


# ---------------------------------------------------------------------- entry by entry

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sin": torch.sin,
    "hardswish": F.hardswish,
    "dropout": lambda h: F.dropout(h, 0.5, training=False),
    "detached gate": lambda h: h * h.detach().sigmoid(),
}
ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "h * w": lambda h, w: h * w,
    "h + w": lambda h, w: h + w,
    "h - w": lambda h, w: h - w,
    "w - 2h": lambda h, w: torch.sub(w, h, alpha=2),
    "h / w": lambda h, w: h / w,
    "w / h": lambda h, w: w / (2 + torch.tanh(h)),
    "w * h * w": lambda h, w: w * h * w,
    "addcmul": lambda h, w: torch.addcmul(h, w, torch.sin(h), value=0.5),
    "lerp": lambda h, w: torch.lerp(h, torch.tanh(h), w),
    "expanded": lambda h, w: torch.lerp(h, w.expand_as(h), 0.3),
    "h * exp(w)": lambda h, w: h * w.exp(),
    "where": lambda h, w: torch.where(h > 0, h, w),
    "where, times": lambda h, w: torch.where(h > 0, h * w, h),
    "maximum": lambda h, w: torch.maximum(h, w),
    "h ** w": lambda h, w: (1.5 + torch.tanh(h)) ** w,
}


@op(*ANY, keeps=True)
def score(d):
    return Op(lambda m, h: h * torch.tanh(h @ m.w).unsqueeze(-1), w=parameter(d.h.shape[-1]))


class OwnProduct(torch.autograd.Function):
    """h * w, w along the last axis, with a backward pass written by hand."""

    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        return h * w

    @staticmethod
    def backward(ctx, grad):
        h, w = ctx.saved_tensors
        return grad * w, (grad * h).sum(tuple(range(h.dim() - 1)))


@op(*ANY, keeps=True)
def act(d):
    function = ACTIVATIONS[d.one("f", ACTIVATIONS)]
    return Op(lambda m, h: function(h))


@op(*ANY, keeps=True, often=3)
def affine(d):
    function = ELEMENTWISE[d.one("form", ELEMENTWISE)]
    return Op(lambda m, h: function(h, m.w), w=parameter(*d.shape()))


@op(*ANY, keeps=True, often=1)
def prelu(d):
    return Op(lambda m, h: m.f(h), f=nn.PReLU(1 if d.kind == "s" or d.maybe("single") else d.h.shape[1]))


@op(*ANY, keeps=True, often=1)
def own_function(d):
    return Op(lambda m, h: OwnProduct.apply(h, m.w), w=parameter(d.h.shape[-1]))


@op(*ANY, keeps=True, often=1)
def fourier(d):
    size = d.h.shape[-1]
    return Op(lambda m, h: torch.fft.irfft(torch.fft.rfft(h) * m.w, n=size), w=parameter(size // 2 + 1))


INPLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda h, w: F.relu(h, inplace=True),
    "add": lambda h, w: h.add_(w),
    "mul": lambda h, w: h.mul_(0.5),
    "leaky_relu": lambda h, w: F.leaky_relu(h, inplace=True),
}


@op(*ANY, keeps=True, often=3)
def inplace(d):
    if not d.fresh:  # the step before keeps its output, or there is none
        return None
    function = INPLACE[d.one("f", INPLACE)]
    return Op(lambda m, h: function(h, m.w), w=parameter(d.h.shape[-1]))


@op(*ANY, keeps=True, often=1)
def assign(d):
    axis, how = d.axis(), d.one("how", ("=", "+=", "*="))

    def run(m, h):
        h = h * 1
        part = h.select(axis, 0)
        if how == "=":
            part.copy_(m.w.expand_as(part))
        elif how == "+=":
            part += m.w
        else:
            part *= 0.5
        return h

    return Op(run, w=parameter(1))


@op(*ANY, keeps=True, often=1)
def unused(d):
    return Op(lambda m, h: h * 1, w=parameter(3), f=nn.Linear(2, 2))


# ---------------------------------------------------------------------- normalisation


@op("v", "t", *IMAGES, keeps=True)
def batch_norm(d):
    if d.kind == "t":
        return Op(lambda m, h: m.f(h.transpose(1, 2)).transpose(1, 2), f=nn.BatchNorm1d(d.h.shape[2]))
    kind = {"v": nn.BatchNorm1d, "i1": nn.BatchNorm1d, "i2": nn.BatchNorm2d, "i3": nn.BatchNorm3d}[d.kind]
    return Op(lambda m, h: m.f(h), f=kind(d.h.shape[1]))


@op(*ANY, keeps=True)
def layer_norm(d):
    axes = 1 if d.kind == "s" else d.one("axes", range(1, d.h.dim()))
    kind = d.one("kind", ("LayerNorm", "no bias", "RMSNorm"))
    shape = d.h.shape[-axes:]
    layer = nn.RMSNorm(shape, eps=1e-5) if kind == "RMSNorm" else nn.LayerNorm(shape, bias=kind == "LayerNorm")
    return Op(lambda m, h: m.f(h), f=layer)


@op("v", *IMAGES, keeps=True)
def group_norm(d):
    channels, rest = d.h.shape[1], math.prod(d.h.shape[2:])
    groups = d.divisor("groups", channels)
    if channels // groups * rest == 1:
        return None
    # PyTorch (2.13, CPU) crashes in the backward pass of a channels-last input that needs no gradient itself.
    return Op(lambda m, h: m.f(h.contiguous()), f=nn.GroupNorm(groups, channels))


@op(*IMAGES, keeps=True)
def instance_norm(d):
    kind = {"i1": nn.InstanceNorm1d, "i2": nn.InstanceNorm2d, "i3": nn.InstanceNorm3d}[d.kind]
    stats = d.maybe("running_stats")
    if math.prod(d.h.shape[2:]) == 1:
        return None
    layer = kind(d.h.shape[1], affine=d.one("affine", (True, False)), track_running_stats=stats)
    return Op(lambda m, h: m.f(h), f=layer)


# ---------------------------------------------------------------------- images


@op(*IMAGES, "t", keeps=True, often=4)
def conv(d):
    over_time = d.kind == "t"
    k = 1 if over_time else int(d.kind[1])
    i, sizes = (d.h.shape[2], d.h.shape[1:2]) if over_time else (d.h.shape[1], d.h.shape[2:])
    o = d.width(i)
    groups, bias, wrapped = d.divisor("groups", i, o), not d.maybe("no_bias"), d.maybe("weight_norm")
    if d.keep:
        mode = d.one("mode", ("zeros", "reflect", "circular", "replicate") if min(sizes) > 1 else ("zeros",))
        more = {"padding": d.one("padding", ("same", 1)), "padding_mode": mode}
        size = (3,) * k
    else:
        size = tuple(d.one("kernel", range(1, min(3, s) + 1)) for s in sizes)
        more = {"stride": d.one("stride", (1, 2)), "padding": d.one("padding", (0, 1))}
        if max(size) <= 2 and min(sizes) > 2:
            more["dilation"] = d.one("dilation", (1, 2))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[k - 1](i, o, size, groups=groups, bias=bias, **more)
    if wrapped:
        layer = weight_norm(layer)
    if over_time:
        return Op(lambda m, h: m.f(h.transpose(1, 2)).transpose(1, 2), f=layer)
    return Op(lambda m, h: m.f(h), f=layer)


@op(*IMAGES)
def conv_transpose(d):
    k, i, o = int(d.kind[1]), d.h.shape[1], d.width(d.h.shape[1])
    stride = d.one("stride", (1, 2))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[k - 1](
        i,
        o,
        d.one("kernel", (1, 2)),
        stride,
        output_padding=d.one("output_padding", range(stride)),
        groups=d.divisor("groups", i, o),
        bias=not d.maybe("no_bias"),
    )
    return Op(lambda m, h: m.f(h), f=layer)


@op(*IMAGES)
def conv_weight(d):
    k, i, o = int(d.kind[1]), d.h.shape[1], d.width(d.h.shape[1])
    size = min(2, *d.h.shape[2:])
    function = (F.conv1d, F.conv2d, F.conv3d)[k - 1]
    return Op(lambda m, h: function(h, m.w().T.reshape(o, i, *[size] * k)), w=d.matrix(i * size**k, o))


@op(*IMAGES)
def pool(d):
    k, name = int(d.kind[1]), d.one("kind", ("avg", "max", "adaptive avg", "adaptive max", "lp"))
    if min(d.h.shape[2:]) < 2:
        return None
    table = {
        "avg": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
        "adaptive avg": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        "adaptive max": (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
        "lp": (F.lp_pool1d, F.lp_pool2d, F.lp_pool3d),
    }
    function, size = table[name][k - 1], d.one("size", (2, 1)) if name.startswith("adaptive") else 2
    if name == "lp":
        return Op(lambda m, h: function(torch.sigmoid(h), 2.0, size))
    return Op(lambda m, h: function(h, size))


@op(*IMAGES)
def upsample(d):
    smooth = {"i1": "linear", "i2": "bilinear", "i3": "trilinear"}[d.kind]
    mode = d.one("mode", ("nearest", smooth))
    return Op(lambda m, h: F.interpolate(h, scale_factor=2, mode=mode))


# ---------------------------------------------------------------------- sequences


@op("t", "s", keeps=True, often=4)
def attention(d):
    width, batch_first, causal = d.h.shape[-1], d.kind == "t", d.maybe("causal")
    key = d.one("key", (width, 1))  # a key of another width: three weights instead of one packed
    layer = nn.MultiheadAttention(
        width,
        d.divisor("heads", width),
        bias=not d.maybe("no_bias"),
        add_bias_kv=d.maybe("bias_kv"),
        kdim=key,
        vdim=width,
        batch_first=batch_first,
    )
    weights = d.maybe("need_weights")

    def run(m, h):
        t = h.shape[1 if batch_first else 0]
        mask = torch.ones(t, t, dtype=torch.bool).triu(1) if causal else None
        return m.f(h, h[..., :key], h, need_weights=weights, attn_mask=mask)[0]

    return Op(run, f=layer)


@op("t", keeps=True, often=4)
def sdpa(d):
    width, causal, packed = d.h.shape[-1], d.maybe("causal"), d.maybe("packed")
    heads = d.divisor("heads", width)

    def run(m, h):
        q, k, v = m.f(h).chunk(3, -1) if packed else (m.f(h), m.g(h), h)
        q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    return Op(run, f=nn.Linear(width, 3 * width if packed else width), g=nn.Linear(width, width))


@op("t", "s", keeps=True)
def encoder_layer(d):
    width = d.h.shape[-1]
    more = {"batch_first": d.kind == "t", "norm_first": d.maybe("norm_first"), "dropout": 0.0}
    return Op(lambda m, h: m.f(h), f=nn.TransformerEncoderLayer(width, d.divisor("heads", width), 3, **more))


@op("t", "s", often=4)
def recurrent(d):
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}[d.one("kind", ("LSTM", "GRU", "RNN"))]
    sizes = {"num_layers": d.one("layers", (1, 2)), "bidirectional": d.maybe("both_ways")}
    layer = kind(d.h.shape[-1], d.one("width", (2, 3)), batch_first=d.kind == "t", bias=not d.maybe("no_bias"), **sizes)
    return Op(lambda m, h: m.f(h)[0], f=layer)


@op("t", "s", often=3)
def cell(d):
    width, axis = d.one("width", (2, 3)), d.time_axis
    kind = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}[d.one("kind", ("LSTM", "GRU", "RNN"))]

    def run(m, h):
        steps, state = [], None
        for part in h.unbind(axis):
            state = m.f(part, state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(steps, axis)

    return Op(run, f=kind(d.h.shape[-1], width))


@op("t", "s", keeps=True)
def position(d):
    t, batch_first, first = d.h.shape[d.time_axis], d.kind == "t", d.one("from", (0, 1))

    def run(m, h):
        at = m.f(torch.arange(first, t + first))
        return h + (at if batch_first else at[:, None])

    return Op(run, f=nn.Embedding(t + 1, d.h.shape[-1]))


@op("t", "s")
def class_token(d):
    at, width = d.time_axis, d.h.shape[-1]

    def run(m, h):
        shape = (len(h), 1, width) if at == 1 else (1, h.shape[1], width)
        return torch.cat([m.w.expand(shape), h], at)

    return Op(run, w=parameter(1, 1, width))


# ---------------------------------------------------------------------- rearranging

REORDER: dict[str, Callable[[Tensor, int], Tensor]] = {
    "roll": lambda h, axis: h.roll(1, axis),
    "flip": lambda h, axis: h.flip(axis),
    "index": lambda h, axis: h.index_select(axis, torch.tensor([0, *range(h.shape[axis] - 1)])),
    "gather": lambda h, axis: h.gather(axis, (h > 0).long() % h.shape[axis]),
    "advanced": lambda h, axis: h.movedim(axis, 0)[list(range(h.shape[axis]))[::-1]].movedim(0, axis),
    "sort": lambda h, axis: h.sort(axis).values,
    "cumsum": lambda h, axis: h.cumsum(axis),
    "softmax": lambda h, axis: h.softmax(axis),
    "split": lambda h, axis: torch.cat(h.tensor_split(2, axis)[::-1], axis),
    "masked": lambda h, axis: h.masked_fill(h > h.mean(axis, keepdim=True), 0.3),
}
TO_VECTOR: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.flatten(1),
    "mean": lambda h: h.mean(1),
    "max": lambda h: h.amax(1),
    "first": lambda h: h[:, 0],
    "last": lambda h: h[:, -1],
}
RESHAPE: dict[str, dict[str, tuple[str, Callable[[Tensor], Tensor]]]] = {
    "v": {
        "columns": ("t", lambda h: h[:, :, None]),
        "row": ("t", lambda h: h[:, None]),
        "pairs": ("t", lambda h: torch.stack([h, h.flip(1)], 1)),
        "signal": ("i1", lambda h: h[:, None]),
        "outer": ("i2", lambda h: torch.tanh(h[:, None, :, None] * h[:, None, None, :])),
    },
    "t": {
        "transpose": ("s", lambda h: h.transpose(0, 1)),
        "contiguous": ("s", lambda h: h.transpose(0, 1).contiguous()),
        "channels": ("i1", lambda h: h.transpose(1, 2)),
        "picture": ("i2", lambda h: h[:, None]),
    },
    "s": {"transpose": ("t", lambda h: h.transpose(0, 1)), "channels": ("i1", lambda h: h.permute(1, 2, 0))},
    "i1": {"tokens": ("t", lambda h: h.transpose(1, 2)), "picture": ("i2", lambda h: h.unsqueeze(1))},
    "i2": {
        "tokens": ("t", lambda h: h.flatten(2).transpose(1, 2)),
        "signal": ("i1", lambda h: h.flatten(2)),
        "turned": ("i2", lambda h: h.transpose(2, 3)),
        "channels last": ("i2", lambda h: h.to(memory_format=torch.channels_last)),
        "unfolded": ("t", lambda h: F.unfold(h, 2, padding=1).transpose(1, 2)),
    },
    "i3": {"tokens": ("t", lambda h: h.flatten(2).transpose(1, 2)), "picture": ("i2", lambda h: h.flatten(3))},
}


@op(*ANY, keeps=True)
def reorder(d):
    function, axis = REORDER[d.one("how", REORDER)], d.axis()
    return Op(lambda m, h: function(h, axis))


@op(*ANY, often=4)
def reshape(d):
    kind, function = RESHAPE[d.kind][d.one("to", RESHAPE[d.kind])]
    return Op(lambda m, h: function(h)), kind


@op("t", "s", *IMAGES)
def to_vector(d):
    function, sequence = TO_VECTOR[d.one("how", TO_VECTOR)], d.kind == "s"

    def run(m, h):
        h = h.transpose(0, 1) if sequence else h.flatten(2).transpose(1, 2) if h.dim() > 3 else h
        return function(h)

    return Op(run), "v"


# ---------------------------------------------------------------------- made of others


@op(*ANY, keeps=True)
def residual(d):
    gate = d.one("gate", ("none", "parameter", "zero"))
    w = parameter(1)
    d.dead += [w] * (gate == "zero")
    return Op(lambda m, h: h + run_all(m.f, h) * (1 if gate == "none" else m.w), w=w, f=d.branch())


@op(*ANY)
def join(d):
    how, axis = d.one("how", ("cat", "mean", "product")), 1 if d.kind in IMAGES else d.h.dim() - 1

    def run(m, h):
        other = run_all(m.f, h)
        if how == "cat":
            return torch.cat([h, other], axis)
        return torch.stack([h, other]).mean(0) if how == "mean" else torch.tanh(h) * other

    return Op(run, f=d.branch())


@op(*ANY, keeps=True)
def checkpointed(d):
    def run(m, h):
        return checkpoint(lambda t: run_all(m.f, t), h, use_reentrant=False, preserve_rng_state=False)

    return Op(run, f=d.branch())


@op(*ANY, keeps=True, often=1)
def loop(d):
    times = d.one("times", (2, 3))

    def run(m, h):
        for _ in range(times):
            h = torch.tanh(run_all(m.f, h))
        return h

    return Op(run, f=d.branch(1))


@op(*ANY, keeps=True, often=3)
def again(d):
    shape = tuple(size for a, size in enumerate(d.h.shape) if a != d.batch_axis)
    fits = [o for kind, s, o in d.made if (kind, s) == (d.kind, shape) and (not d.keep or o(d.h).shape == d.h.shape)]
    if not fits:
        return None
    chosen = d.pick(fits)
    d.notes.append(chosen.text)
    return Op(lambda m, h: m.f(h), f=chosen)


@op("t", "s", *IMAGES, keeps=True, often=3)
def folded(d):
    """Other axes folded into the batch: tokens as rows, channels as images."""
    h, kind = d.h, d.kind
    d.h, d.kind = (h.flatten(0, 1), "v") if kind in "ts" else (h.flatten(0, 1).unsqueeze(1), kind)
    ops = d.branch()
    d.h, d.kind = h, kind
    return Op(
        lambda m, h: run_all(m.f, h.flatten(0, 1) if kind in "ts" else h.flatten(0, 1)[:, None]).reshape(h.shape), f=ops
    )


NESTED = ("residual", "join", "checkpointed", "loop", "folded")
FRESH = ("linear", "matrix", "conv", "layer_norm", "group_norm", "batch_norm", "over_time", "join", "upsample")


# ---------------------------------------------------------------------- inputs, heads, networks


@op("ids")
def embed(d):
    how, width = d.one("how", ("module", "weight[ids]", "one-hot", "bag")), d.one("width", (2, 3, 4, 6))
    more = {"padding_idx": d.one("padding_idx", (None, 0, 2))}
    if how == "bag":
        more["mode"] = d.one("mode", ("mean", "sum", "max"))
    layer = (nn.EmbeddingBag if how == "bag" else nn.Embedding)(WORDS, width, **more)
    d.matrices.append(layer.weight)
    if how == "bag":
        return Op(lambda m, x: m.f(x), f=layer), "v"
    if how == "one-hot":
        return Op(lambda m, x: F.one_hot(x, WORDS).to(m.f.weight) @ m.f.weight, f=layer), "t"
    return Op(lambda m, x: m.f(x) if how == "module" else m.f.weight[x], f=layer), "t"


FINISH: dict[str, Callable[[Tensor], Tensor]] = {
    "[n, C]": lambda y: y,
    "tanh": torch.tanh,
    "[n]": lambda y: y[:, 0],
    "[n, 1, C]": lambda y: y[:, None],
    "[n, C, 2]": lambda y: torch.stack([y, y.sin()], 2),
    "log_softmax": lambda y: y.log_softmax(1),
}


@op()
def outputs(d):
    i = d.h.shape[1]
    tied = any(p.shape == (WORDS, i) for p in d.matrices) and d.maybe("vocabulary")
    o = WORDS if tied else d.one("number", (1, 2, 3, 4))
    finish, b = FINISH[d.one("as", FINISH)], parameter(o) if d.maybe("bias") else None
    return Op(lambda m, h: finish(h @ m.w() if m.b is None else torch.addmm(m.b, h, m.w())), w=d.matrix(i, o), b=b)


class Network(nn.Module):
    """Ops in a row, on one input or on a vector beside token ids."""

    def __init__(self, ops: list[Op], start: str) -> None:
        super().__init__()
        self.ops, self.start = nn.ModuleList(ops), start

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        if ids is None:
            return run_all(self.ops, x)
        h = self.ops[0](ids)
        return run_all(self.ops[1:], torch.cat([x, h if h.dim() == 2 else h.mean(1)], 1))

    def __repr__(self) -> str:
        return f"{self.start} > " + " > ".join(o.text for o in self.ops)


SHAPES = {"v": [(3,), (5,)], "t": [(3, 4), (4, 2)], "i1": [(2, 5)], "i2": [(2, 4, 4), (1, 5, 6)], "i3": [(1, 4, 4, 3)]}


def inputs(start: str, shape: tuple[int, ...], n: int) -> Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]:
    """Random samples for a network; from torch's global generator."""
    x, ids = torch.randn(n, *shape, dtype=torch.float64), torch.randint(0, WORDS, (n, 4))
    return ids if start == "ids" else (x, ids) if start == "tuple" else {"x": x, "ids": ids} if start == "dict" else x


def draw_network(choices: bytes) -> tuple[Network, str, tuple[int, ...]]:
    """A network in float64 and eval mode, and what `inputs` needs to know. Parameters are from torch's generator."""
    d = Drawer(choices)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        start = d.one("input", ("v", "t", "i2", "ids", "i1", "t", "i2", "ids", "i3", "tuple", "dict"))
        shape = d.one("shape", SHAPES.get(start, [(3,)]))
        ops: list[Op] = []
        x, ids = inputs("tuple", shape, 2)
        d.h, d.kind = (x, start) if start in SHAPES else (ids, "ids")
        if start not in SHAPES:
            ops.append(d.step())
        if start in ("tuple", "dict"):
            d.h, d.kind = torch.cat([x, d.h if d.h.dim() == 2 else d.h.mean(1)], 1), "v"
        d.fresh = False
        ops += [d.step() for _ in range(d.one("depth", range(1, 9)))]
        while d.kind != "v":
            ops.append(d.step(name="to_vector"))
        bare = d.h.shape[1] <= 4 and d.maybe("bare")
        if not bare or not d.live:
            ops.append(d.step(name="outputs"))
        net = Network(ops, f"{start}{list(shape)}").eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not name.endswith("original"):  # spectral norm's own estimate of its largest singular value would be off
                p.copy_(parameter(*p.shape) * (0.6 if p.dim() > 1 else 1))
        for p in d.dead:
            p.zero_()
        for name, b in net.named_buffers():
            if "running_" in name:
                b.uniform_(0.5, 2)
    return net, start, shape
