"""Integrals of two functions of a pair of Gaussian variables, by quadrature over a circle and a radius.

With u = sqrt(a) r cos w and v = sqrt(b) r cos(w - t), see `quadrature`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.infinite.activations import Function, values_and_slopes

_REACH = 13  # radius: the density beyond is below 1e-36
_SECTOR = 56  # nodes in w
_CIRCLE = 128  # nodes in x = cos w, see `family_values`
_NOTHING = 1e-15  # relative size up to which a function of a family is left out


def chebyshev_transform(count: int) -> Tensor:
    """Chebyshev coefficients from values at the nodes."""
    k = torch.arange(count)
    # The angles are multiples of pi / (2 count). Their whole numbers are reduced to one period first: large angles lose
    # digits, and every coefficient would have an error of 5e-15.
    turns = ((k[:, None] * (2 * k + 1)) % (4 * count)).double()
    transform = torch.cos(turns * (math.pi / (2 * count))) * (2 / count)
    transform[0] /= 2
    return transform


def chebyshev_nodes(count: int) -> Tensor:
    """Nodes of Chebyshev interpolation on [-1, 1]."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count).cos()


def barycentric(nodes: Tensor, x: Tensor) -> Tensor:
    """Weights of the nodes of Chebyshev (or these, moved and scaled) for values at x, [len(x), nodes]."""
    count = len(nodes)
    angles = (torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count
    weights = angles.sin() * (-1.0) ** torch.arange(count)
    difference = x[:, None] - nodes
    exact = difference == 0
    quotient = weights / difference.masked_fill(exact, 1)
    quotient = torch.where(exact.any(1, keepdim=True), exact.double(), quotient)
    return quotient / quotient.sum(1, keepdim=True)


def _radii(density: int, lowest: float, finer: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the integral of r^(density - 1) exp(-r^2 / 2), equidistant in log r, as far as it counts."""
    step = 0.13 / finer
    r = torch.arange(lowest, math.log(_REACH), step, dtype=torch.float64).exp()
    return r, step * r**density * torch.exp(-r.square() / 2)


def _sectors(count: int, ends: list[float]) -> tuple[Tensor, Tensor]:
    """Nodes and weights between neighbors of `ends`, denser near them, where a steep function changes its sign."""
    nodes, weights = legendre(count)
    places, weights = (3 * nodes - nodes**3) / 2, weights * (3 - 3 * nodes**2) / 2
    at = torch.tensor(ends, dtype=torch.float64)
    middle, half = (at[:-1, None] + at[1:, None]) / 2, at.diff()[:, None] / 2
    return (middle + half * places).flatten(), (half * weights).flatten()


@lru_cache(8)
def legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes in [-1, 1] and weights of Gauss and Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def family_values(function: Function, a: Tensor, squares: Tensor, places: Tensor) -> Tensor:
    """Correlations of values and of slopes for all variances a, at angles pi (1 + places) / 2, [2, angles, a, a].

    On a circle of radius R = sqrt(a) r, s takes the values s(+-R x) for x = cos w from 0 to 1. They are computed once,
    at nodes in x, and split into the even and the odd part, which are uncorrelated. As functions of x they lie in the
    span of a few, found by an SVD. The integral over w is that of products of these few, and depends on the angle only;
    the integral over r is that of products of their coefficients, and depends on the variances only.
    """
    r, of_r = _radii(2, -16.0, 1)
    z = a.sqrt()[:, None, None] * r[:, None] * (nodes := (1 + chebyshev_nodes(_CIRCLE)) / 2) ** 3
    family = torch.empty(4, *z.shape, dtype=torch.float64)  # even and odd values, even and odd slopes; [4, a, r, x]
    for i, f in enumerate(values_and_slopes(function, torch.stack([z, -z]))):
        f *= (of_r / squares[:, i, None]).sqrt()[..., None]
        torch.add(f[0], f[1], out=family[2 * i]).div_(2)
        torch.sub(f[0], f[1], out=family[2 * i + 1]).div_(2)
    _, s, few = torch.linalg.svd(torch.linalg.qr(family.flatten(0, 2), "r")[1], full_matrices=False)
    few = few[: int((s > _NOTHING * s[0]).sum())].T  # [x, few]
    family = (family @ few).mT  # [4, a, few, r]
    products = _angular(few, nodes, places)
    out = torch.zeros(2, len(places), len(a), len(a), dtype=torch.float64)
    for i, part in enumerate(family):
        if not part.any():  # of an odd function, or an even one
            continue
        other = part.movedim(-1, 0).flatten(1)  # [r, a few]
        for k in range(len(a)):
            pairs = (part[k] @ other).unflatten(1, part.shape[:2]).movedim(1, 0).flatten(1)
            out[i // 2, :, k].addmm_(products[i % 2], pairs.T)
    return out


def _angular(few: Tensor, nodes: Tensor, places: Tensor) -> Tensor:
    """Integrals over the circle of products of two functions of x = |cos w|, the second turned by an angle.

    `few` holds their values at x = nodes^3; [2, angles, few * few]: of even functions of cos w, of odd ones.
    """
    products = []
    for t in (math.pi * (1 + places) / 2).tolist():
        w, of_w = _sectors(2 * _SECTOR, [t - math.pi / 2, math.pi / 2, t + math.pi / 2])  # of equal signs, of unequal
        at = torch.stack([w.cos(), (w - t).cos()]).abs() ** (1 / 3)
        one, two = (barycentric(nodes, at.flatten()) @ few).unflatten(0, (2, 2, -1))
        same, opposite = (one * of_w.reshape(2, -1, 1)).mT @ two
        products.append(torch.stack([same + opposite, same - opposite]))
    both = torch.stack(products, 1).flatten(2) / math.pi  # the other half of the circle has the same
    turned = both.flip(1)  # at pi - t
    turned[1].neg_()
    return both.add_(turned).div_(2)


def values_one_by_one(function: Function, a: Tensor, squares: Tensor, places: Tensor) -> Tensor:
    """The same without these shortcuts, for kinks that make them worse."""
    return torch.stack([as_correlations(moments_at(function, a, math.pi * (1 + x) / 2, 1), squares) for x in places], 1)


def as_correlations(moments: Tensor, squares: Tensor) -> Tensor:
    """From moments, since the values of samples of very different size would drown in the rounding of the largest."""
    scale = squares.sqrt().T
    return moments / (scale[:, :, None] * scale[:, None])


def moments_at(function: Function, a: Tensor, angle: Tensor, finer: int) -> Tensor:
    """E[s(u) s(v)] and E[s'(u) s'(v)] for all variances a at one angle, [2, len(a), len(a)]."""
    r, of_r = _radii(2, -16.0, finer)
    half, shift = math.pi / 2, float(angle) / 2
    # u = r cos(w + shift), v = r cos(w - shift): the nodes are symmetric, so v at w equals u at -w
    ends = [-half - shift, -half + shift, half - shift, half + shift, 3 * half - shift]
    w, of_w = _sectors(_SECTOR * finer, ends)
    mirrored = torch.arange(len(w)).reshape(4, -1)[[2, 1, 0, 3]].flip(1).flatten()
    weights = (of_r[:, None] * of_w / (2 * math.pi)).flatten()
    both = values_and_slopes(function, a.sqrt()[:, None, None] * (r[:, None] * (w + shift).cos()))
    return torch.stack([(f.flatten(1) * weights) @ f[..., mirrored].flatten(1).T for f in both])


def mean_squares(function: Function, v: Tensor) -> Tensor:
    """E[s(u)^2] and E[s'(u)^2], [n, 2]."""
    return means(function, v, 2).clamp(min=1e-300)


def means(function: Function, v: Tensor, power: int = 1) -> Tensor:
    """E[s(u)^power] and E[s'(u)^power], [n, 2]."""
    x, weights = _radii(1, -34.0, 1)
    weights = torch.cat([weights, weights]) / math.sqrt(2 * math.pi)
    both = values_and_slopes(function, v.sqrt()[:, None] * torch.cat([x, -x]))
    return torch.stack([f**power @ weights for f in both], 1)
