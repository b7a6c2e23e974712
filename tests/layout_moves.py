"""More operations of the networks in `layout_networks`: pools, attention, tables, indices, linear algebra, layouts."""

from __future__ import annotations

import math

import torch
from layout_ops import OPS, Step, broadcast, op, plain
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------- pools and grids

plain(
    "3",
    max_pool1d=lambda h: F.max_pool1d(h, 2, 1, padding=1),
    avg_pool1d=lambda h: F.avg_pool1d(h, 2, 1, padding=1, count_include_pad=False),
    adaptive_avg_pool1d=lambda h: F.adaptive_avg_pool1d(h, 2),
    adaptive_max_pool1d=lambda h: F.adaptive_max_pool1d(h, 2),
    lp_pool1d=lambda h: F.lp_pool1d(1.5 + torch.tanh(F.pad(h, (0, 1))), 3.0, 2, 1),
    interpolate_linear=lambda h: F.interpolate(h, size=3, mode="linear", align_corners=False),
    interpolate_nearest1d=lambda h: F.interpolate(h, scale_factor=2, mode="nearest"),
)
plain(
    "4",
    max_pool2d=lambda h: F.max_pool2d(h, 2, 1, padding=1),
    max_pool2d_dilated=lambda h: F.max_pool2d(F.pad(h, (1, 1, 1, 1)), 2, 2, dilation=2, ceil_mode=True),
    max_pool2d_indices=lambda h: F.max_pool2d(F.pad(h, (0, 1, 0, 1)), 2, 1, return_indices=True)[0],
    max_unpool2d=lambda h: F.max_unpool2d(
        *F.max_pool2d(F.pad(h, (0, 1, 0, 1), value=-9.0), 2, 2, ceil_mode=True, return_indices=True),
        2,
        output_size=(h.shape[2] + 1, h.shape[3] + 1),
    ),
    avg_pool2d=lambda h: F.avg_pool2d(h, 2, 1, padding=1),
    avg_pool2d_uncounted=lambda h: F.avg_pool2d(h, 3, 2, padding=1, count_include_pad=False, ceil_mode=True),
    adaptive_avg_pool2d=lambda h: F.adaptive_avg_pool2d(h, (2, 1)),
    adaptive_max_pool2d=lambda h: F.adaptive_max_pool2d(h, (1, 2)),
    global_avg_pool=lambda h: F.adaptive_avg_pool2d(h, 1),
    lp_pool2d=lambda h: F.lp_pool2d(1.5 + torch.tanh(F.pad(h, (0, 1, 0, 1))), 2.0, 2, 1),
    max_pool3d=lambda h: F.max_pool3d(h.unsqueeze(1), (1, 2, 1), 1, padding=(0, 1, 0)).squeeze(1),
    avg_pool3d=lambda h: F.avg_pool3d(F.pad(h, (0, 1)).unsqueeze(1), (1, 1, 2), 1).squeeze(1),
    adaptive_avg_pool3d=lambda h: F.adaptive_avg_pool3d(h.unsqueeze(2), (1, 2, 2)).squeeze(2),
    interpolate_nearest=lambda h: F.interpolate(h, size=(3, 2), mode="nearest"),
    interpolate_nearest_exact=lambda h: F.interpolate(h, size=(2, 3), mode="nearest-exact"),
    interpolate_bilinear=lambda h: F.interpolate(h, size=(3, 2), mode="bilinear", align_corners=True),
    interpolate_antialias=lambda h: F.interpolate(h, size=(2, 2), mode="bilinear", antialias=True),
    interpolate_bicubic=lambda h: F.interpolate(h, size=(2, 3), mode="bicubic", align_corners=False),
    interpolate_area=lambda h: F.interpolate(h, size=(2, 2), mode="area"),
    interpolate_trilinear=lambda h: F.interpolate(h.unsqueeze(2), size=(1, 2, 3), mode="trilinear").squeeze(2),
    pixel_shuffle=lambda h: F.pixel_shuffle(torch.cat([h, torch.sin(h), h, torch.cos(h)], 1), 2)[:, :, 1:, :-1],
    pixel_unshuffle=lambda h: F.pixel_unshuffle(F.pad(h, (0, h.shape[3] % 2, 0, h.shape[2] % 2)), 2),
    channel_shuffle=lambda h: F.channel_shuffle(torch.cat([h, torch.tanh(h)], 1), 2),
    fold_of_unfold=lambda h: F.fold(torch.tanh(F.unfold(h, 2, padding=1)), h.shape[2:], 2, padding=1),
    pad_reflect=lambda h: F.pad(h, (h.shape[3] - 1, 0, 0, h.shape[2] - 1), mode="reflect"),
    pad_replicate=lambda h: F.pad(h, (1, 0, 0, 1), mode="replicate"),
    pad_circular=lambda h: F.pad(h, (1, 1, 0, 1), mode="circular"),
    rot90=lambda h: torch.rot90(h, 1, (2, 3)),
    fft2=lambda h: torch.fft.fft2(h).abs().square().log1p(),
    matrix_norm=lambda h: torch.linalg.matrix_norm(h + 0.2)[:, :, None, None] * h,
)


@op("4")
def grid_sample(d, h):
    mode, padding = d.one("mode", "bilinear", "bicubic", "nearest"), d.one("padding", "zeros", "border", "reflection")
    align = d.some("align")

    def run(m, t):
        grid = 0.8 * torch.sin(m.w.expand(len(t), -1, -1, -1) + 0.1 * t.mean((1, 2, 3))[:, None, None, None])
        return F.grid_sample(t, grid, mode, padding, align)

    return Step(run, w=d.parameter(2, 2, 2))


@op("4")
def affine_grid(d, h):
    def run(m, t):
        theta = (0.5 * torch.tanh(m.w)).expand(len(t), -1, -1)
        return F.grid_sample(t, F.affine_grid(theta, list(t.shape), align_corners=False), align_corners=False)

    return Step(run, w=d.parameter(2, 3))


# ---------------------------------------------------------------------- attention, recurrence, tables


@op("3")
def attention(d, h):
    how = d.one("how", "plain", "causal", "mask", "bias", "scale", "expanded", "four axes")

    def run(m, t):
        q, k, v = F.linear(t, m.w).tensor_split(3, -1)
        n, length = t.shape[:2]
        if how == "expanded":
            k, v = m.w[:2, :1].T.expand(n, 1, 2), m.w[2:4, :1].T.expand(n, 1, 2)
        if how == "four axes":
            q, k, v = (a.unflatten(-1, (2, 1)).transpose(1, 2) for a in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        more = {
            "causal": {"is_causal": True},
            "mask": {"attn_mask": torch.ones(length, length, dtype=torch.bool, device=t.device).tril()},
            "bias": {"attn_mask": m.b.expand(n, length, length)},
            "scale": {"scale": 0.3},
        }.get(how, {})
        return F.scaled_dot_product_attention(q, k, v, **more)

    return Step(run, w=d.parameter(6, h.shape[2]), b=d.parameter(h.shape[1]))


@op("3")
def attention_by_hand(d, h):
    def run(m, t):
        scores = t @ m.w @ t.mT + m.b.expand(t.shape[1], -1).tril()
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ t

    return Step(run, w=d.parameter(h.shape[2], h.shape[2]), b=d.parameter(h.shape[1]))


@op("3")
def multihead_attention(d, h):
    first, weights = d.some("batch_first"), d.some("weights")
    size = h.shape[2]
    heads = d.one("heads", 1, size if size < 4 else 2 if size % 2 == 0 else 1)
    bias_kv = d.some("bias_kv")

    def run(m, t):
        t = t if first else t.transpose(0, 1)
        t = m.f(t, t, t, need_weights=weights)[0]
        return t if first else t.transpose(0, 1)

    return Step(run, f=nn.MultiheadAttention(size, heads, batch_first=first, add_bias_kv=bias_kv))


@op("3")
def encoder_layer(d, h):
    norm_first = d.some("norm_first")
    layer = nn.TransformerEncoderLayer(2, 1, 2, 0.0, F.gelu, batch_first=True, norm_first=norm_first)
    return Step(lambda m, t: m.f(F.pad(t, (0, 1))[..., :2]), f=layer)


@op("3")
def queries(d, h):
    return Step(lambda m, t: (m.q @ t.mT).softmax(-1) @ t, q=d.parameter(2, h.shape[2]))


def recurrent(kind):
    def build(d, h):
        first, both, layers = d.some("batch_first"), d.some("bidirectional"), d.one("layers", 1, 1, 2)
        rnn = kind(h.shape[2], 1 if both or layers == 2 else 2, layers, batch_first=first, bidirectional=both)

        def run(m, t):
            out = m.f(t if first else t.transpose(0, 1))[0]
            return out if first else out.transpose(0, 1)

        return Step(run, f=rnn)

    return build


OPS["rnn"] = ("3", recurrent(nn.RNN))
OPS["lstm"] = ("3", recurrent(nn.LSTM))
OPS["gru"] = ("3", recurrent(nn.GRU))


@op("3")
def lstm_last_state(d, h):
    return Step(lambda m, t: torch.cat(m.f(t)[1], -1)[0], f=nn.LSTM(h.shape[2], 2, batch_first=True))


@op("3")
def lstm_packed(d, h):
    def run(m, t):
        lengths = torch.arange(len(t)) % t.shape[1] + 1
        lengths = torch.full_like(lengths, t.shape[1]) if t.shape[1] < 2 else (t[:, 0, 0].detach() > 0).long() + 1
        packed = pack_padded_sequence(t, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m.f(packed)[0], batch_first=True, total_length=t.shape[1])[0]

    return Step(run, f=nn.LSTM(h.shape[2], 2, batch_first=True))


@op("3")
def lstm_cell(d, h):
    def run(m, t):
        state = (t.new_zeros(len(t), 2), t.new_ones(len(t), 2))
        for step in t.unbind(1):
            state = m.f(step, state)
        return state[0]

    return Step(run, f=nn.LSTMCell(h.shape[2], 2))


@op("3")
def gru_cell(d, h):
    def run(m, t):
        state = m.s.expand(len(t), 2)
        for step in t.unbind(1):
            state = m.f(step, state)
        return state

    return Step(run, f=nn.GRUCell(h.shape[2], 2), s=d.parameter(2))


@op("234")
def embedding(d, h):
    return Step(lambda m, t: t + m.f((t > 0.05).long()).squeeze(-1), f=nn.Embedding(3, 1))


@op("23")
def embedding_bag(d, h):
    mode = d.one("mode", "sum", "mean", "weighted")
    bag = nn.EmbeddingBag(3, 2, mode="sum" if mode == "weighted" else mode)

    def run(m, t):
        rows = t.flatten(1)
        words = (rows > 0.1).long() + (rows > 0.8).long()
        return (
            m.f(words, per_sample_weights=torch.tanh(rows)) if mode == "weighted" else m.f(words) + rows.mean(1, True)
        )

    return Step(run, f=bag)


@op("234")
def one_hot_table(d, h):
    return Step(lambda m, t: t * (F.one_hot((t > 0.1).long(), 2).to(t) @ m.w), w=d.parameter(2))


@op("3")
def position(d, h):
    return Step(lambda m, t: t + m.w[: t.shape[1]], w=d.parameter(h.shape[1] + 1, h.shape[2]))


@op("3")
def class_token(d, h):
    return Step(lambda m, t: torch.cat([m.w.expand(len(t), 1, -1), t], 1), w=d.parameter(h.shape[2]))


@op("3")
def relative_bias(d, h):
    def run(m, t):
        i = torch.arange(t.shape[1], device=t.device)
        return (t @ t.mT + m.w[i[:, None] - i[None] + t.shape[1]]).softmax(-1) @ t

    return Step(run, w=d.parameter(2 * h.shape[1] + 1))


# ---------------------------------------------------------------------- along one axis

plain(
    "234",
    cumsum=lambda h: torch.cumsum(h, 1),
    cumprod=lambda h: torch.cumprod(torch.tanh(h), -1),
    cumprod_with_zero=lambda h: torch.cumprod(torch.cat([torch.sin(h), h[..., :1] * 0, torch.cos(h)], -1), -1),
    cummax=lambda h: torch.cummax(h, -1)[0],
    cummin=lambda h: torch.cummin(h, 1)[0],
    logcumsumexp=lambda h: torch.logcumsumexp(h, 1),
    diff=lambda h: torch.diff(h, dim=-1, prepend=h[..., :1] * 0),
    trapezoid=lambda h: torch.cumulative_trapezoid(F.pad(h, (1, 0)), dim=-1),
    prod=lambda h: h + torch.prod(torch.tanh(h), -1, keepdim=True),
    prod_with_zero=lambda h: torch.prod(torch.cat([torch.sin(h), h[..., :1] * 0], -1), -1, keepdim=True) + h,
    logsumexp=lambda h: h - torch.logsumexp(h, 1, keepdim=True),
    mean=lambda h: h - h.mean(-1, keepdim=True),
    variance=lambda h: torch.var(F.pad(h, (0, 1)), -1, keepdim=True) * h,
    standard_deviation=lambda h: torch.std(torch.cat([h, 1 + h * h], 1), 1, keepdim=True) + h,
    sum_expanded=lambda h: h.sum(-1, keepdim=True).expand_as(h),
    amax=lambda h: h - torch.amax(h, -1, keepdim=True),
    aminmax=lambda h: sum(torch.aminmax(h, dim=1, keepdim=True)) * h,
    sort=lambda h: torch.sort(h, -1)[0],
    sort_stable=lambda h: torch.sort(h, dim=1, descending=True, stable=True)[0],
    topk=lambda h: torch.topk(h, max(1, h.shape[-1] - 1), -1)[0],
    kthvalue=lambda h: torch.kthvalue(h, 1, 1, keepdim=True)[0] + h,
    median=lambda h: torch.median(h.contiguous(), -1, keepdim=True)[0] * h,  # of zero strides it is garbage, torch 2.13
    quantile=lambda h: torch.quantile(h, 0.3, -1, keepdim=True) + h,
    vector_norm=lambda h: h / (0.5 + torch.linalg.vector_norm(h + 0.1, dim=1, keepdim=True)),
    vector_norm_three=lambda h: torch.linalg.vector_norm(1.5 + torch.tanh(h), 3, -1, keepdim=True) * h,
    vector_norm_inf=lambda h: torch.linalg.vector_norm(h, math.inf, -1, keepdim=True) + h,
    cosine_similarity=lambda h: F.cosine_similarity(h + 0.3, torch.sin(h) + 0.2, 1).unsqueeze(1) * h,
    pairwise_distance=lambda h: F.pairwise_distance(h, torch.cos(h) + 1)[..., None] + h,
    rfft=lambda h: torch.view_as_real(torch.fft.rfft(h)).flatten(-2),
    fft=lambda h: torch.fft.fft(torch.tanh(h), dim=1).imag + h,
    # copied: of an expanded tensor torch 2.6 has no transform
    fft_ortho=lambda h: torch.fft.ifft(torch.fft.fft(h.contiguous(), norm="ortho") * 1j, norm="ortho").imag,
    hfft=lambda h: torch.fft.hfft(torch.complex(h, h.sin()), n=4),
    own_axis_max=lambda h: torch.max(h, 1, keepdim=True)[0] + h,
)


@op("234")
def fourier_filter(d, h):
    size = h.shape[-1]
    return Step(lambda m, t: torch.fft.irfft(torch.fft.rfft(t) * m.w, n=size), w=d.parameter(size // 2 + 1))


@op("4")
def fourier_filter2(d, h):
    a, b = h.shape[2:]

    def run(m, t):
        return torch.fft.irfft2(torch.fft.rfft2(t) * torch.view_as_complex(m.w), s=(a, b))

    return Step(run, w=d.parameter(a, b // 2 + 1, 2))


# ---------------------------------------------------------------------- indices

plain(
    "234",
    gather=lambda h: torch.gather(h, 1, torch.argsort(h.detach(), 1)),
    take_along=lambda h: torch.take_along_dim(h, torch.argmax(h.detach(), -1, keepdim=True), -1) + h,
    scatter=lambda h: torch.zeros_like(h).scatter(
        1, torch.arange(h.shape[1]).flip(0).view(1, -1, *[1] * (h.dim() - 2)).expand_as(h), h
    ),
    scatter_add=lambda h: torch.sin(h).scatter_add(1, torch.zeros_like(h, dtype=torch.long), h),
    scatter_amax=lambda h: torch.sin(h).scatter_reduce(1, torch.zeros_like(h, dtype=torch.long), h, "amax"),
    scatter_mean=lambda h: torch.sin(h).scatter_reduce(1, torch.zeros_like(h, dtype=torch.long), h, "mean"),
    scatter_prod=lambda h: torch.cos(h).scatter_reduce(1, torch.zeros_like(h, dtype=torch.long), h.sin(), "prod"),
    index_select=lambda h: torch.index_select(h, 1, torch.tensor([h.shape[1] - 1, 0])),
    index_add=lambda h: torch.index_add(torch.tanh(h), 1, torch.tensor([0, 0]), torch.cat([h, h], 1)[:, :2], alpha=0.5),
    index_copy=lambda h: torch.index_copy(torch.tanh(h), 1, torch.tensor([0]), h[:, -1:]),
    index_fill=lambda h: torch.index_fill(h, 1, torch.tensor([0]), 0.3) + 0.1 * h,
    index_put=lambda h: torch.index_put(
        torch.sin(h), (torch.arange(len(h)), torch.zeros(len(h), dtype=torch.long)), h[:, -1], accumulate=True
    ),
    advanced_index=lambda h: h[:, [-1, 0, 0]],
    mask_index=lambda h: torch.where(h > 0, h, 0.0)[:, torch.arange(h.shape[1]) % 2 == 0],
    masked_scatter=lambda h: torch.masked_scatter(
        h, torch.ones_like(h[:, :1], dtype=torch.bool).expand_as(h), torch.sin(h)
    ),
    roll=lambda h: torch.roll(h, (1, 1), (1, -1)),
    flip=lambda h: torch.flip(h, tuple({1, h.dim() - 1})),
    tile=lambda h: h.repeat(1, *[1] * (h.dim() - 2), 2) if h.shape[-1] < 3 else h.tile(2)[..., 1:4],
    repeat_interleave=lambda h: torch.repeat_interleave(h, 2, 1)[:, 1:4],
    cat_views=lambda h: torch.cat([h[..., ::2], h[..., 1::2]], -1),
    stack_mean=lambda h: torch.stack([h, torch.sin(h), h * h], -1).mean(-1),
    split=lambda h: torch.tanh(h.split(1, 1)[0]) + h,
    chunk=lambda h: h.chunk(2, -1)[0] * torch.cos(h.chunk(2, -1)[-1][..., :1]),
    unbind=lambda h: torch.stack([t * (i + 1) for i, t in enumerate(h.unbind(1))], 1),
    select_scatter=lambda h: torch.select_scatter(h, torch.sin(h.select(1, 0)), 1, 0),
    slice_scatter=lambda h: torch.slice_scatter(h, torch.sin(h[..., ::2]), -1, 0, None, 2),
    unfold_view=lambda h: torch.cat([h, h[..., :1]], -1).unfold(-1, 2, 1).prod(-1),
    diag_embed=lambda h: torch.diag_embed(h.flatten(1)[:, :2]),
)
plain(
    "34",
    diagonal=lambda h: torch.diagonal(h @ h.mT, dim1=-2, dim2=-1),
    triangle=lambda h: torch.tril(h) + torch.triu(torch.sin(h), 1),
    diagonal_scatter=lambda h: torch.diagonal_scatter(h, torch.sin(h.diagonal(dim1=-2, dim2=-1)), 0, -2, -1),
    trace_scale=lambda h: h * torch.einsum("...ii->...", h @ h.mT)[..., None, None].tanh(),
)


# ---------------------------------------------------------------------- linear algebra


def square(h):
    """Well-conditioned symmetric matrices [..., 2, 2], from features."""
    a = torch.tanh(F.pad(h, (0, 1, 0, 1))[..., :2, :2])
    return a @ a.mT + torch.diag(torch.tensor([1.0, 2.5], dtype=h.dtype))


plain(
    "34",
    solve=lambda h: torch.linalg.solve(square(h), torch.sin(F.pad(h, (0, 0, 0, 1))[..., :2, :])),
    inverse=lambda h: torch.linalg.inv(square(h)),
    cholesky=lambda h: torch.linalg.cholesky(square(h)),
    slogdet=lambda h: torch.linalg.slogdet(square(h))[1][..., None, None] + h,
    det=lambda h: torch.linalg.det(square(h))[..., None, None] * h,
    matrix_exp=lambda h: torch.linalg.matrix_exp(0.5 * square(h)),
    pinv=lambda h: torch.linalg.pinv(square(h)[..., :1]),
    qr=lambda h: torch.linalg.qr(square(h))[1],
    svdvals=lambda h: torch.linalg.svdvals(square(h)).unsqueeze(-1) * F.pad(h, (0, 0, 0, 1))[..., :2, :],
    eigvalsh=lambda h: torch.linalg.eigvalsh(square(h)).unsqueeze(-2) + h[..., :1],
    matrix_power=lambda h: torch.linalg.matrix_power(0.5 * square(h), 3),
    triangular_solve=lambda h: torch.linalg.solve_triangular(square(h), square(h.sin()), upper=True),
    cholesky_solve=lambda h: torch.cholesky_solve(square(h)[..., :1], torch.linalg.cholesky(square(h.cos()))),
    lstsq=lambda h: (
        torch.linalg.lstsq(square(h), square(h.sin()), driver="gelsd")[0]
        if False
        else torch.linalg.solve(square(h), square(h.sin()))
    ),
    nuclear_norm=lambda h: torch.linalg.matrix_norm(square(h), "nuc")[..., None, None] * h,
    cdist=lambda h: torch.cdist(h, torch.sin(h) + 1.5),
    cross=lambda h: torch.linalg.cross(F.pad(h, (0, 2))[..., :3], torch.cos(F.pad(h, (1, 2))[..., :3])),
    householder=lambda h: torch.linalg.householder_product(square(h), torch.sin(square(h))[..., 0]),
)
del OPS["lstsq"]


@op("3")
def solve_with_weight(d, h):
    return Step(
        lambda m, t: torch.linalg.solve(
            square(m.w), t[:, :1].mT.expand(-1, -1, 1).reshape(len(t), -1, 1)[:, :1].expand(-1, 2, 1)
        ),
        w=d.parameter(2, 2),
    )


@op("234")
def orthogonal_by_exponential(d, h):
    i = h.shape[-1]
    return Step(lambda m, t: t @ torch.linalg.matrix_exp(m.w.triu(1) - m.w.triu(1).T), w=d.parameter(i, i))


@op("234")
def orthogonal_by_cayley(d, h):
    i = h.shape[-1]

    def run(m, t):
        skew, eye = m.w - m.w.T, torch.eye(i, dtype=t.dtype)
        return t @ torch.linalg.solve(eye + skew, eye - skew)

    return Step(run, w=d.parameter(i, i))


# ---------------------------------------------------------------------- in place, checkpoints

plain(
    "234",
    inplace_relu=lambda h: F.relu(h * 1.0, inplace=True),
    inplace_add=lambda h: torch.sin(h).add_(h, alpha=0.5).mul_(0.9),
    inplace_assign=lambda h: _assigned(h.clone(), h),
    inplace_masked=lambda h: (h + 0.1).masked_fill_(h > 0.7, 0.7),
    inplace_view=lambda h: _scaled_view(torch.sin(h)),
    inplace_copy=lambda h: torch.empty_like(h).copy_(h) * 2,
    inplace_transposed=lambda h: (
        (h * 1.5).transpose_(-1, -2).sin_().transpose_(-1, -2) if h.dim() > 2 else h.sin().neg_()
    ),
    checkpointed=lambda h: checkpoint(lambda t: torch.tanh(t) * t, h, use_reentrant=False),
)


def _assigned(out, h):
    out[:, 0] = torch.sin(h[:, -1])
    return out


def _scaled_view(h):
    h[..., ::2].mul_(0.5)
    return h


@op("234")
def inplace_add_weight(d, h):
    return Step(lambda m, t: torch.cos(t).add_(m.w), w=d.odd(h))


@op("234")
def inplace_buffer(d, h):
    def run(m, t):
        out = t.new_zeros(*t.shape[:-1], t.shape[-1] + 1)
        out[..., :-1] = t
        out[..., -1] = m.w
        return out

    return Step(run, w=d.parameter(1))


@op("234")
def checkpointed_linear(d, h):
    layer = nn.Linear(h.shape[-1], 2)
    return Step(lambda m, t: checkpoint(m.f, t, use_reentrant=False).tanh(), f=layer)


@op("234")
def saved_on_cpu(d, h):
    def run(m, t):
        with torch.autograd.graph.save_on_cpu():
            return torch.sin(t @ m.w)

    return Step(run, w=d.parameter(h.shape[-1], 2))


broadcast(inplace_mul_weight=lambda h, w: torch.sin(h).mul_(w), inplace_lerp=lambda h, w: torch.sin(h).lerp_(h, w))

# ---------------------------------------------------------------------- the same numbers, elsewhere in memory


def _transposed(a, b):
    return lambda h: h.transpose(a, b % h.dim()).contiguous().transpose(a, b % h.dim())


def _inside(h):
    """A view with an offset into a larger tensor, whose rows are not adjacent."""
    return F.pad(h, (1, 2) + (0, 0) * (h.dim() - 2) + (1, 0))[1:, ..., 1:-2]


def _every_second(h):
    return torch.stack([h, torch.zeros_like(h)], -1).flatten(-2)[..., ::2]


def _strided(h):
    c = h.contiguous()
    return c.as_strided(c.shape, c.stride(), c.storage_offset())


LAYOUTS = {
    "contiguous": lambda h: h.contiguous(),
    "clone": lambda h: h.clone(memory_format=torch.contiguous_format),
    "samples last": _transposed(0, -1),
    "samples second": _transposed(0, 1),
    "transposed": _transposed(1, -1),
    "channels last": lambda h: (
        h.contiguous(memory_format=torch.channels_last) if h.dim() == 4 else _transposed(1, -1)(h)
    ),
    "channels last, halves": lambda h: (
        torch.cat([h, h], 1).contiguous(memory_format=torch.channels_last)[:, : h.shape[1]] if h.dim() == 4 else h
    ),
    "inside": _inside,
    "every second": _every_second,
    "as_strided": _strided,
    "flipped twice": lambda h: h.flip(-1).flip(-1),
    "rot90 four times": lambda h: torch.rot90(torch.rot90(h, 1, (-2, -1)), 3, (-2, -1)) if h.dim() > 2 else h,
    "unsqueezed": lambda h: (
        h.unsqueeze(1).transpose(1, -1).squeeze(-1) if h.dim() == 2 else h.unsqueeze(-1).squeeze(-1)
    ),
    "expanded": lambda h: h.unsqueeze(2).expand(*h.shape[:2], 3, *h.shape[2:])[:, :, 1],
    "expanded axis": lambda h: h[..., :1].expand_as(h),
    "unfolded": lambda h: torch.cat([h, h[..., :1]], -1).unfold(-1, h.shape[-1], 1)[..., 0, :],
}
