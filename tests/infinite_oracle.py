"""The limit by brute force: arrays over all pairs of samples and of positions, one module at a time, nothing shared.

Activations by two-dimensional quadrature in polar coordinates (any function, kinks at 0 included). Slow; small inputs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


class Add(nn.Module):
    """Branches added up."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(b(x) for b in self.branches[1:]) + self.branches[0](x)


class Mul(Add):
    """Branches multiplied."""

    def forward(self, x):
        return self.branches[0](x) * self.branches[1](x)


class Cat(Add):
    """Branches side by side; of channels, with their shares."""

    def __init__(self, *branches, axis=1, shares=None):
        super().__init__(*branches)
        self.axis, self.shares = axis, shares or [1 / len(branches)] * len(branches)

    def forward(self, x):
        return torch.cat([b(x) for b in self.branches], self.axis)


class Move(nn.Module):
    """A function that moves or adds up positions."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Act(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


_R, _WR = np.polynomial.legendre.leggauss(160)
_W, _WW = np.polynomial.legendre.leggauss(40)


def gaussian(function, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """E[s(u) s(v)] and E[s'(u) s'(v)], elementwise, by quadrature over four sectors of the plane."""
    a, b, c = torch.broadcast_tensors(a, b, c)
    root = (a * b).sqrt().clamp(min=1e-300)
    correlation = c / root
    correlation = torch.where(correlation > 1 - 1e-14, torch.ones_like(c), correlation)  # rounding would be amplified
    angle = torch.acos(correlation.clamp(-1, 1))
    value, slope = torch.zeros_like(c), torch.zeros_like(c)
    r = torch.from_numpy((_R + 1) * 6.5)
    of_r = torch.from_numpy(_WR * 6.5) * r * torch.exp(-r * r / 2)
    starts = [-math.pi / 2 + 0 * angle, angle - math.pi / 2, math.pi / 2 + 0 * angle, angle + math.pi / 2]
    starts.append(torch.full_like(angle, 3 * math.pi / 2))
    with torch.enable_grad():
        for begin, end in zip(starts, starts[1:], strict=False):
            for node, weight in zip(_W, _WW, strict=True):
                w = begin + (end - begin) * (node + 1) / 2
                u = (a.sqrt() * torch.cos(w))[..., None] * r
                v = (b.sqrt() * torch.cos(w - angle))[..., None] * r
                u, v = u.requires_grad_(), v.requires_grad_()
                fu, fv = function(u), function(v)
                gu, gv = torch.autograd.grad(fu.sum(), u)[0], torch.autograd.grad(fv.sum(), v)[0]
                share = (end - begin) / 2 * weight / (2 * math.pi)
                value += share * ((fu * fv).detach() @ of_r)
                slope += share * ((gu * gv) @ of_r)
    return value, slope


def of_all_pairs(function, variances: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """`gaussian` of variances [n, H, W] and covariances [n, n, H, W, H, W], which are symmetric: each pair once."""
    (n, h, w), size = variances.shape, variances.numel()
    own, flat = variances.reshape(size), K.permute(0, 2, 3, 1, 4, 5).reshape(size, size)
    rows, columns = torch.triu_indices(size, size)
    found = []
    for values in gaussian(function, own[rows], own[columns], flat[rows, columns]):
        whole = torch.empty_like(flat)
        whole[rows, columns] = whole[columns, rows] = values
        found.append(whole.reshape(n, h, w, n, h, w).permute(0, 3, 1, 2, 4, 5))
    return found[0], found[1]


class Oracle:
    """Covariances and tangent kernel of all samples and positions, [n, n, H, W, H, W] each."""

    def __init__(self, w: float, b: float) -> None:
        self.w2, self.b2 = w * w, b * b

    def __call__(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        grid = x.reshape(*x.shape[:2], *(1,) * (4 - x.dim()), *x.shape[2:])
        K = torch.einsum("ichw,jcxy->ijhwxy", grid, grid) / grid.shape[1]
        K, T, late = self.go(model, (K, torch.zeros_like(K), torch.zeros_like(K)))
        T = T + late * K
        assert K.shape[2:] == (1, 1, 1, 1)
        return K[:, :, 0, 0, 0, 0], T[:, :, 0, 0, 0, 0]

    def go(self, m: nn.Module, s):
        if isinstance(m, nn.Sequential):
            for child in m:
                s = self.go(child, s)
            return s
        if isinstance(m, Mul):
            (K1, T1, _), (K2, T2, _) = (joined(self.go(b, s)) for b in m.branches)
            return K1 * K2, K1 * T2 + T1 * K2, torch.zeros_like(K1)
        if isinstance(m, Cat):
            branches = [joined(self.go(b, s)) for b in m.branches]
            if m.axis == 1:
                return tuple(sum(w * t for w, t in zip(m.shares, p, strict=True)) for p in zip(*branches, strict=True))
            return tuple(blocks(parts, m.axis) for parts in zip(*branches, strict=True))
        if isinstance(m, Move):
            return tuple(moved(t, [matrix_of(m.function, t)]) for t in joined(s))
        if isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            taps = [matrix_of(one, s[0]) for one in single_taps(m)]
            return self.weights(tuple(moved(t, taps) / len(taps) for t in joined(s)))
        if isinstance(m, Add):
            branches = [self.go(b, s) for b in m.branches]
            return tuple(sum(parts) for parts in zip(*branches, strict=True))
        if isinstance(m, (nn.Identity, nn.Dropout)):
            return s
        if isinstance(m, nn.Linear):
            return self.weights(joined(s))
        if isinstance(m, (nn.Conv1d, nn.Conv2d)):
            two = [(1, *t) if isinstance(m, nn.Conv1d) else t for t in (m.kernel_size, m.stride, m.dilation)]
            if m.padding == "same":  # one more behind than in front, if odd
                total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
                pad = [(t // 2, t - t // 2) for t in total]
            else:
                pad = [(p, p) for p in m.padding]
            pad = [(0, 0), *pad] if isinstance(m, nn.Conv1d) else pad
            size = two[0][0] * two[0][1]
            if m.padding_mode != "zeros":
                around = m._reversed_padding_repeated_twice
                pad = lambda z: nn.functional.pad(z, around, mode=m.padding_mode)
                s = tuple(moved(t, [matrix_of(pad, t, isinstance(m, nn.Conv1d))]) for t in joined(s))
                return self.weights(tuple(self.windows(t, two[0], two[1], [(0, 0)] * 2, two[2]) / size for t in s))
            return self.weights(tuple(self.windows(t, two[0], two[1], pad, two[2]) / size for t in joined(s)))
        if isinstance(m, (nn.AvgPool1d, nn.AvgPool2d)):

            def two(v):
                v = v if isinstance(v, tuple) else (v,) * (1 if isinstance(m, nn.AvgPool1d) else 2)
                return v if len(v) == 2 else (1, *v)

            k, st = two(m.kernel_size), two(m.stride)
            p = m.padding if isinstance(m.padding, tuple) else (m.padding,) * (1 if isinstance(m, nn.AvgPool1d) else 2)
            p = p if len(p) == 2 else (0, *p)
            return tuple(self.all_windows(t, k, st, p) / (k[0] * k[1]) ** 2 for t in joined(s))
        if isinstance(m, (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool1d)):
            return tuple(t.mean((2, 3, 4, 5), keepdim=True) for t in joined(s))
        if isinstance(m, nn.Flatten):
            return tuple(_own(t).mean(-1).mean(-1)[..., None, None, None, None] for t in joined(s))
        if isinstance(m, (nn.LayerNorm, nn.GroupNorm)):
            v = _own(_self(s[0])).mean((-1, -2)) + m.eps
            scale = (v[:, None] * v).rsqrt()[..., None, None, None, None]
            affine = m.elementwise_affine if isinstance(m, nn.LayerNorm) else m.affine
            here = torch.full_like(s[0], float(affine))
            if affine and isinstance(m, nn.LayerNorm) and s[0].shape[2:] != (1, 1, 1, 1):
                h, w = s[0].shape[2:4]
                here = here * torch.eye(h * w, dtype=s[0].dtype).reshape(h, w, h, w)
            return s[0] * scale, s[1] * scale + here, here  # the last: of the weight, still to meet the next slope
        function = m.function if isinstance(m, Act) else m
        variances = _own(_self(s[0]))  # [n, H, W]
        K, slope = of_all_pairs(function, variances, s[0])
        T = s[1] * slope
        if s[2].any():
            T = T + s[2] * of_all_pairs(lambda z: z * slope_of(function, z), variances, s[0])[0]
        return K, T, torch.zeros_like(K)

    def weights(self, mixed):
        K = self.w2 * mixed[0] + self.b2  # what a norm's weight brought is in `mixed` by now
        return K, self.w2 * mixed[1] + K, torch.zeros_like(K)

    @staticmethod
    def windows(t, k, stride, pad, dilation):
        """Sums over taps, the same for both positions."""
        h, w = t.shape[2:4]
        sizes = zip((h, w), pad, dilation, k, stride, strict=True)
        out = [(n + sum(p) - d * (m - 1) - 1) // s + 1 for n, p, d, m, s in sizes]
        big = nn.functional.pad(t, (*pad[1], *pad[0]) * 2)
        total = 0
        for i in range(k[0]):
            for j in range(k[1]):
                rows = slice(i * dilation[0], i * dilation[0] + stride[0] * (out[0] - 1) + 1, stride[0])
                columns = slice(j * dilation[1], j * dilation[1] + stride[1] * (out[1] - 1) + 1, stride[1])
                total = total + big[:, :, rows, columns, rows, columns]
        return total

    @staticmethod
    def all_windows(t, k, stride, pad):
        """Sums over both windows of two positions."""
        t = nn.functional.pad(t, (pad[1], pad[1], pad[0], pad[0]) * 2)
        for dim, size, step in ((2, k[0], stride[0]), (3, k[1], stride[1]), (4, k[0], stride[0]), (5, k[1], stride[1])):
            t = t.unfold(dim, size, step).sum(-1)
        return t


def matrix_of(function, t: Tensor, sequence: bool | None = None):
    """A linear map of positions as one matrix [positions, positions before], and its new grid."""
    h, w = t.shape[2:4]
    basis = torch.eye(h * w, dtype=t.dtype).reshape(
        h * w, 1, *((w,) if sequence or (sequence is None and h == 1) else (h, w))
    )
    out = function(basis)
    size = (1,) * (4 - out.dim()) + tuple(out.shape[2:])
    return out.reshape(h * w, -1).T, size


def moved(t: Tensor, matrices):
    """Sum over matrices A of A t A^T, for both positions of a kernel."""
    flat = t.reshape(*t.shape[:2], t.shape[2] * t.shape[3], -1)
    size = matrices[0][1]
    return sum(A @ flat @ A.T for A, _ in matrices).reshape(*t.shape[:2], *size, *size)


def single_taps(m):
    """The transposed convolutions of single weights of one."""
    transposed = nn.functional.conv_transpose1d if isinstance(m, nn.ConvTranspose1d) else nn.functional.conv_transpose2d
    settings = (m.stride, m.padding, m.output_padding, 1, m.dilation)
    count = math.prod(m.kernel_size)
    for one in torch.eye(count, dtype=torch.float64):
        yield lambda z, one=one: transposed(z, one.reshape(1, 1, *m.kernel_size).to(z), None, *settings)


def blocks(parts, axis: int) -> Tensor:
    """Kernels on the diagonal of a kernel of all their positions, joined along height (2) or width (3)."""
    h, w = parts[0].shape[2:4]
    size = [h, w]
    size[axis - 2] = sum(p.shape[axis] for p in parts)
    out, start = parts[0].new_zeros(*parts[0].shape[:2], *size, *size), 0
    for p in parts:
        count = p.shape[axis]
        out.narrow(axis, start, count).narrow(axis + 2, start, count).copy_(p)
        start += count
    return out


def slope_of(function, z: Tensor) -> Tensor:
    """s'(z), differentiable."""
    at = z if z.requires_grad else z.detach().requires_grad_()
    return torch.autograd.grad(function(at).sum(), at, create_graph=True)[0]


def joined(s):
    """A norm's weight that met no activation: its share of the tangent kernel is its own covariance."""
    return s[0], s[1] + s[2] * s[0], torch.zeros_like(s[2])


def _self(t: Tensor) -> Tensor:
    """A sample with itself, [n, H, W, H, W]."""
    return t.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def _own(t: Tensor) -> Tensor:
    """A position with itself: the last four axes to two."""
    return t.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)
