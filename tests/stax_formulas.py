"""Published formulas of the layers of `neural_tangents.stax`, in NumPy: what tests of the page about it compare with.

A state is covariance and tangent kernel, arrays [n, n, positions, positions]. Nothing of ntkit is used.
Sources: Cho & Saul 2009 (rectified monomials), Williams 1997 (erf), Tsuchida et al. 2021 (GELU), Louart et al. 2018
(sin, cos, exp, abs), Yang 2020 (norms, products), Novak et al. 2019 and Arora et al. 2019 (convolutions, pools), Du et
al. 2019 (graphs), Hron et al. 2020 (attention), Schoenholz et al. 2017 (dropout), Price 1958 (slopes).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import erf


class State(NamedTuple):
    """Covariance and tangent kernel."""

    k: np.ndarray
    t: np.ndarray


def dense(state: State, w: float, b: float) -> State:
    """A dense layer at each position, z = w / sqrt(n) W a + b beta: Jacot et al. 2018."""
    k = w**2 * state.k + b**2
    return State(k, w**2 * state.t + k)


def of_samples(x: np.ndarray) -> State:
    """Samples [n, positions, channels]."""
    k = np.einsum("ipc,jqc->ijpq", x, x) / x.shape[2]
    return State(k, 0 * k)


def variances(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance at the first and at the second of each pair."""
    v = np.einsum("iipp->ip", k)
    return v[:, None, :, None] + 0 * k, v[None, :, None, :] + 0 * k


def same(k: np.ndarray) -> np.ndarray:
    """Which entries are a position of a sample with itself."""
    return (np.eye(len(k))[:, :, None, None] * np.eye(k.shape[2])) > 0


def smooth(formula):
    """A layer from E[s(u) s(v)], a function of covariance and variances analytic in the first.

    Price's theorem: E[s'(u) s'(v)] is its derivative by the covariance, here by a complex step.
    """

    def layer(state: State) -> State:
        a, b = variances(state.k)
        slope = formula(state.k + 1e-30j, a, b).imag / 1e-30
        return State(formula(state.k, a, b), state.t * slope)

    return layer


def angles(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles between features and products of their lengths; a position with itself has the angle 0."""
    a, b = variances(k)
    length = np.sqrt(a * b)
    return np.where(same(k), 0, np.arccos(np.clip(k / length, -1, 1))), length


def rectified_linear(state: State, negative: float, positive: float) -> State:
    """Slope `negative` below 0 and `positive` above: half the sum times z, half the difference times |z|."""
    even, odd = (positive - negative) / 2, (positive + negative) / 2
    angle, length = angles(state.k)
    absolute = 2 / math.pi * length * (np.sin(angle) + (math.pi / 2 - angle) * np.cos(angle))
    return State(odd**2 * state.k + even**2 * absolute, state.t * (odd**2 + even**2 * (1 - 2 * angle / math.pi)))


def rectified_square(state: State) -> State:
    """max(z, 0)^2: J_2 of Cho & Saul; its slope 2 max(z, 0)."""
    angle, length = angles(state.k)
    sin, cos = np.sin(angle), np.cos(angle)
    j1 = sin + (math.pi - angle) * cos
    j2 = 3 * sin * cos + (math.pi - angle) * (1 + 2 * cos**2)
    return State(length**2 * j2 / (2 * math.pi), state.t * 4 * length * j1 / (2 * math.pi))


def sign(state: State) -> State:
    """Sheppard's formula; the slope is 0 but at one point."""
    return State(1 - 2 * angles(state.k)[0] / math.pi, 0 * state.t)


def polynomial(*coefficients):
    """E[p(u) p(v)] by the moments E[u^m v^n] of a Gaussian (Isserlis 1918)."""

    def odd(n):
        return math.prod(range(n - 1, 0, -2))

    def moment(m, n, c, a, b):
        ways = [j for j in range(min(m, n) + 1) if (m - j) % 2 == 0 and (n - j) % 2 == 0]
        counts = [math.comb(m, j) * math.comb(n, j) * math.factorial(j) * odd(m - j) * odd(n - j) for j in ways]
        return sum(
            (x * c**j * a ** ((m - j) // 2) * b ** ((n - j) // 2) for j, x in zip(ways, counts, strict=True)), 0 * c
        )

    def formula(c, a, b):
        terms = [(m, n, x * y) for m, x in enumerate(coefficients) for n, y in enumerate(coefficients) if x * y]
        return sum(f * moment(m, n, c, a, b) for m, n, f in terms)

    return smooth(formula)


def erf_layer(scale: float, rate: float, shift: float):
    """scale erf(rate z) + shift: Williams 1997."""
    r = 2 * rate**2
    return smooth(
        lambda c, a, b: scale**2 * 2 / math.pi * np.arcsin(r * c / np.sqrt((1 + r * a) * (1 + r * b))) + shift**2
    )


def sine(scale: float, rate: float, phase: float):
    """scale sin(rate z + phase)."""
    return smooth(
        lambda c, a, b: (
            scale**2
            / 2
            * (
                np.exp(-(rate**2) * (a + b - 2 * c) / 2)
                - math.cos(2 * phase) * np.exp(-(rate**2) * (a + b + 2 * c) / 2)
            )
        )
    )


def exponential(scale: float, rate: float):
    """scale exp(rate z)."""
    return smooth(lambda c, a, b: scale**2 * np.exp(rate**2 * (a + b + 2 * c) / 2))


def bell(scale: float, rate: float):
    """scale exp(-rate z^2): a determinant."""
    r = 2 * rate
    return smooth(lambda c, a, b: scale**2 / np.sqrt((1 + r * a) * (1 + r * b) - (r * c) ** 2))


def gabor(c, a, b):
    """exp(-z^2) sin(z): a sine under the covariance (S^-1 + 2)^-1, times the bell's determinant."""
    d = (1 + 2 * a) * (1 + 2 * b) - 4 * c**2
    a, b, c = (a + 2 * (a * b - c**2)) / d, (b + 2 * (a * b - c**2)) / d, c / d
    return (np.exp(-(a + b - 2 * c) / 2) - np.exp(-(a + b + 2 * c) / 2)) / 2 / np.sqrt(d)


def gelu(c, a, b):
    """z Phi(z): Tsuchida et al. 2021."""
    outer = (1 + a) * (1 + b)
    root = np.sqrt(outer - c**2)
    return c / 4 + ((c**2 + a * b * root**2) / (outer * root) + c * np.arctan(c / root)) / (2 * math.pi)


def by_quadrature(function, slope, nodes: int = 401):
    """Any smooth function by the trapezoidal rule along both axes, to 10 standard deviations."""
    z, step = np.linspace(-10, 10, nodes, retstep=True)
    weight = np.exp(-(z**2) / 2) * step
    weight = np.outer(weight, weight) / (2 * math.pi)

    def layer(state: State) -> State:
        a, b = variances(state.k)
        out, slopes = np.empty_like(state.k), np.empty_like(state.k)
        for at in np.ndindex(*state.k.shape):
            u = math.sqrt(a[at]) * z[:, None]
            along = state.k[at] / math.sqrt(a[at])
            v = along * z[:, None] + math.sqrt(max(b[at] - along**2, 0)) * z
            out[at], slopes[at] = (float((weight * s(u) * s(v)).sum()) for s in (function, slope))
        return State(out, state.t * slopes)

    return layer


def norm(state: State) -> State:
    """A norm over channels, mean 0 and variance 1 at each position."""
    a, b = variances(state.k)
    return State(state.k / np.sqrt(a * b), state.t / np.sqrt(a * b))


def dropout(state: State, dropped: float) -> State:
    """Dropout while training: what a feature has with itself is divided by the share that is kept."""
    factor = np.where(same(state.k), 1 / (1 - dropped), 1)
    return State(state.k * factor, state.t * factor)


def product(one: State, two: State) -> State:
    """Independent branches multiplied."""
    return State(one.k * two.k, one.t * two.k + one.k * two.t)


# ---------------------------------------------------------------------- positions, counted row by row


def mapped(state: State, matrix: np.ndarray) -> State:
    """A linear map of positions, [new, old]."""
    return State(*(np.einsum("pa,ijab,qb->ijpq", matrix, m, matrix) for m in state))


def taps(old: int, new: int, window: int, stride: int, before: int) -> list[np.ndarray]:
    """For each entry of a window of a convolution the positions that it reads, [new^2, old^2]; `before`: padding."""
    found = []
    for dy, dx in np.ndindex(window, window):
        matrix = np.zeros((new * new, old * old))
        for y, x in np.ndindex(new, new):
            row, column = y * stride + dy - before, x * stride + dx - before
            if 0 <= row < old and 0 <= column < old:
                matrix[y * new + x, row * old + column] = 1
        found.append(matrix)
    return found


def convolution(state: State, found: list[np.ndarray], w: float, b: float, shared: bool = True) -> State:
    """A convolution: the mean over the window; with weights of its own per position different ones are independent."""
    k, t = (sum(np.asarray(m) for m in ms) / len(found) for ms in zip(*(mapped(state, m) for m in found), strict=True))
    out = dense(State(k, t), w, b)
    return out if shared else State(*(m * np.eye(k.shape[2]) for m in out))


def pool(found: list[np.ndarray]) -> np.ndarray:
    """The sum over a window."""
    return sum(found, np.zeros_like(found[0]))


def linear_interpolation(old: int, height: int, width: int) -> np.ndarray:
    """Weights between the centers of pixels; beyond the outermost these are repeated."""

    def axis(new: int) -> np.ndarray:
        weights = np.zeros((new, old))
        for i in range(new):
            place = (i + 0.5) * old / new - 0.5
            low = math.floor(place)
            weights[i, min(max(low, 0), old - 1)] += 1 - (place - low)
            weights[i, min(max(low + 1, 0), old - 1)] += place - low
        return weights

    return np.kron(axis(height), axis(width))


def flattened(state: State) -> State:
    """All positions as features: the mean of each with itself."""
    return State(*(np.einsum("ijpp->ij", m)[:, :, None, None] / m.shape[2] for m in state))


def per_sample(state: State, matrices: np.ndarray) -> State:
    """A linear map of positions of each sample's own, [n, new, old]."""
    return State(*(np.einsum("ipa,ijab,jqb->ijpq", matrices, m, matrices) for m in state))


def attention(state: State, scores: float, values: float, b: float) -> State:
    """Softmax of scores that are covariances of keys, whose weights have the std `scores`; `values`: of both others."""
    each = scores**2 * np.einsum("iipq->ipq", state.k)
    weights = np.exp(each - each.max(2, keepdims=True))
    k, t = per_sample(state, weights / weights.sum(2, keepdims=True))
    return State(values**2 * k + b**2, values**2 * (t + 2 * k) + b**2)


# ---------------------------------------------------------------------- a finite network: W2 erf(W1 x + b1) + b2


def slope_of_erf(z):
    """Its derivative."""
    return 2 / math.sqrt(math.pi) * np.exp(-(z**2))


def outputs(parameters, x):
    """[n, C]."""
    w1, b1, w2, b2 = parameters
    return erf(x @ w1.T + b1) @ w2.T + b2


def jacobian(parameters, x):
    """[n, C, P]."""
    w1, b1, w2, _ = parameters
    z = x @ w1.T + b1
    inner = w2[None] * slope_of_erf(z)[:, None]
    identity = np.eye(len(w2))[None] + np.zeros((len(x), 1, 1))
    first = np.einsum("ncj,nk->ncjk", inner, x).reshape(len(x), len(w2), -1)
    second = np.einsum("ncd,nj->ncdj", identity, erf(z)).reshape(len(x), len(w2), -1)
    return np.concatenate([first, inner, second, identity], axis=2)


def curvature(parameters, step, x):
    """The second derivative of the outputs along a step."""
    (w1, b1, w2, _), (d1, e1, d2, _) = parameters, step
    z, dz = x @ w1.T + b1, x @ d1.T + e1
    slope = slope_of_erf(z)
    return (-2 * z * slope * dz**2) @ w2.T + 2 * (slope * dz) @ d2.T
