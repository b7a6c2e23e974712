"""Which closed form a function has: recognized by its values and slopes, not by its name.

Of polynomials, exponentials and affine changes the numbers are computed from derivatives and a few values, and then
compared with the function, at thousands of points.
"""

from __future__ import annotations

import cmath
import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ntkit.kernels.infinite.activations import Activation, Erf, Function, Gelu, Rectifier, values_and_slopes
from ntkit.kernels.infinite.affine_changes import AffineChange
from ntkit.kernels.infinite.exponentials import Exponentials, Term
from ntkit.kernels.infinite.polynomials import MOST, PolynomialActivation

_EXACT = 1e-12  # up to which values and slopes agree, relative to their size and to what an error of z makes of them
_CANCELS = 1e-3  # share of s or s' at 0 in its parts; below, rounding would be amplified

Candidate = PolynomialActivation | Exponentials | AffineChange


def closed_form(function: Function) -> Activation | None:
    """The closed form with this function's values and slopes at thousands of points of both signs and all sizes."""
    z = _places()
    values = values_and_slopes(function, z)
    at_one, at_minus_one = function(torch.tensor([1.0, -1.0], dtype=torch.float64)).tolist()
    slope_at_zero = float(values_and_slopes(function, torch.zeros(1, dtype=torch.float64))[1])
    candidates: list[tuple[Activation, Function]] = [
        (
            Rectifier(at_one, -at_minus_one, slope_at_zero),
            lambda z: torch.where(z > 0, at_one * z, -at_minus_one * z),
        ),
        (Erf(), torch.erf),
        (Gelu(), torch.nn.functional.gelu),
    ]
    for activation, candidate in candidates:
        expected = values_and_slopes(candidate, z)
        if all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(values, expected, strict=True)):
            return activation
    if not all(v.is_floating_point() and v.abs().nanmedian().isfinite() for v in values):
        return None
    try:
        with np.errstate(all="ignore"):
            for candidate in _candidates(function):
                if _agree(candidate, z, values):
                    return candidate
    except (RuntimeError, np.linalg.LinAlgError):  # no derivatives of higher order
        return None
    return None


def _agree(candidate: Candidate, z: Tensor, values: tuple[Tensor, Tensor]) -> bool:
    """Whether values and slopes are those of a candidate."""
    found = derivatives(candidate, z, 2)
    for value, expected, slope in zip(values, found, found[1:], strict=False):
        finite = expected.isfinite() & (expected.abs() < 1e290)
        if (value.abs()[~finite] < 1e280).any() or not value[finite].isfinite().all():
            return False
        rounding = 2e-15 * expected[z.abs() <= 1].abs().max() + 1e-300  # of terms that cancel further out
        size = _EXACT * (expected.abs() + (z * slope).abs()) + rounding
        if ((value - expected).abs() > size)[finite].any():
            return False
    return True


def derivatives(function: Function, z: Tensor, order: int) -> list[Tensor]:
    """The function and its derivatives, by autograd, each time of the one before."""
    found = []
    with torch.enable_grad():
        at = z.detach().clone().requires_grad_()
        value = function(at * 1)
        for n in range(order + 1):
            found.append(value.detach().double())
            if n < order:
                slope = None
                if value.requires_grad:
                    slope = torch.autograd.grad(value.sum(), at, create_graph=True, allow_unused=True)[0]
                value = torch.zeros_like(z) if slope is None else slope
    return found


def _candidates(function: Function) -> Iterator[Candidate]:
    for find in (_polynomial, _exponentials, _bells, _changed_erf, _changed_gelu):
        if (found := find(function)) is not None:
            yield found


def _polynomial(function: Function) -> Candidate | None:
    """The polynomial of the derivatives at 0, if one fits."""
    x = 2 * torch.cos(torch.arange(40, dtype=torch.float64) + 0.5)
    value = function(x).double().numpy()
    fit = np.polynomial.Chebyshev.fit(x.numpy(), value, MOST, domain=[-2, 2])
    scale = np.abs(value).max()
    if scale == 0 or np.abs(fit(x.numpy()) - value).max() > 1e-10 * scale:
        return None
    degree = int(np.nonzero(np.abs(fit.coef) > 1e-10 * scale)[0].max())
    found = derivatives(function, torch.zeros(1, dtype=torch.float64), degree)
    return PolynomialActivation([_short(float(d) / math.factorial(n)) for n, d in enumerate(found)])


def _exponentials(function: Function) -> Candidate | None:
    """R z + t and one exponential, or two: the second derivative g has an equation g'' = alpha g' + gamma g."""
    first = [float(d) for d in derivatives(function, torch.tensor([0.3137], dtype=torch.float64), 4)]
    rate = math.sqrt(abs(first[4] / first[2])) if first[2] else 0.0
    if not 1e-5 < rate < 1e5:
        return None
    z = torch.linspace(-2, 2, 65, dtype=torch.float64) / rate + 0.3137
    _, _, *found = derivatives(function, z, 4)
    slopes = _roots([f.numpy() / rate**k for k, f in enumerate(found)])
    if slopes is None:
        return None
    return _weighted(function, [(_short_complex(b * rate), 0.0) for b in slopes], z.numpy(), 0.0, None)


def _bells(function: Function) -> Candidate | None:
    """R z + t and exp(-q z^2) times one exponential, or two; r and t are seen where the rest has died away."""
    far = torch.tensor([-1e6, -1e5, 1e5, 1e6], dtype=torch.float64)
    value, slope = (t.double() for t in values_and_slopes(function, far))
    r = _short(float(slope[0]))
    t = _short(float(value[1] - r * far[1]))
    if not (slope == slope[0]).all() or not torch.allclose(value - r * far, torch.full_like(far, t), rtol=1e-9):
        return None
    z = _places()[:2401]
    size = (function(z).double() - r * z - t).abs()
    z = z[size > 1e-3 * size.max()]
    if not 12 < len(z) < 2401:
        return None
    z = z[:: max(1, len(z) // 100)]
    middle, width = float(z.mean()), float(z.std())
    found = derivatives(function, z, 2)
    y = ((z - middle) / width).numpy()
    g = [(d - (r * z + t, r, 0)[k]).numpy() * width**k for k, d in enumerate(found)]
    for columns, target in (([g[0], y * g[0]], g[1]), ([g[1], y * g[1], g[0], y * g[0], y * y * g[0]], g[2])):
        solution = _solved(columns, target)
        if solution is None:
            continue
        q = float(-solution[1]) / (2 if len(columns) == 2 else 4)  # g' = (b - 2 q y) g; g'' = a g' - 4 q y g' + ...
        if not q > 0:
            return None
        roots = [complex(solution[0])] if len(columns) == 2 else _roots_of(solution[0], solution[2] + 2 * q)
        decay = _short(q / width**2)
        center = 2 * decay * middle
        slopes = [b / width + center for b in roots]
        slopes = [complex(b.real if abs(b.real) > 1e-13 * (abs(center) + 1 / width) else 0.0, b.imag) for b in slopes]
        return _weighted(function, [(_short_complex(b), decay) for b in slopes], z.numpy(), r, t)
    return None


def _roots(g: list[np.ndarray]) -> list[complex] | None:
    """Slopes of the exponentials in g, from its values and two derivatives."""
    for columns, target in (([g[0]], g[1]), ([g[1], g[0]], g[2])):
        solution = _solved(columns, target)
        if solution is not None:
            return [complex(solution[0])] if len(columns) == 1 else _roots_of(*solution)
    return None


def _solved(columns: list[np.ndarray], target: np.ndarray) -> np.ndarray | None:
    """Coefficients of columns that add up to a target, if there are any."""
    matrix = np.stack([*columns, target], 1)
    size = np.abs(matrix).max(1, keepdims=True)
    if not (np.isfinite(matrix).all() and (size > 0).all()):
        return None
    matrix = matrix / size
    solution = np.linalg.lstsq(matrix[:, :-1], matrix[:, -1], rcond=None)[0]
    return solution if np.abs(matrix[:, :-1] @ solution - matrix[:, -1]).max() < 1e-9 else None


def _roots_of(alpha: float, gamma: float) -> list[complex]:
    """Roots of b^2 = alpha b + gamma; of a conjugate pair the one above."""
    half = float(alpha) / 2 if abs(alpha) > 1e-12 * math.sqrt(abs(gamma)) else 0.0
    inside = half * half + float(gamma)
    if inside < 0:
        return [complex(half, math.sqrt(-inside))]
    return [complex(half + math.sqrt(inside)), complex(half - math.sqrt(inside))]


def _weighted(
    function: Function, terms: list[tuple[complex, float]], z: np.ndarray, r: float, t: float | None
) -> Candidate | None:
    """With the weights of the terms, and with r and t if t is not known."""
    middle = float(z.mean())
    columns = []
    for b, q in terms:  # relative to their size in the middle, which may be a very small number
        wave = np.exp(b * (z - middle) - q * (z**2 - middle**2))
        columns += [wave.real] if b.imag == 0 else [wave.real, wave.imag]
    value = function(torch.from_numpy(z)).double().numpy() - r * z - (t or 0.0)
    width = float(np.abs(z - middle).max())
    linear = [] if t is not None else [(z - middle) / width, np.ones_like(z)]
    solution = _solved([*columns, *linear], value)
    if solution is None:
        return None
    size = np.abs(solution).max()
    weights = iter(np.where(np.abs(solution) > 1e-13 * size, solution, 0.0).tolist())
    found: list[Term] = []
    for b, q in terms:
        weight = complex(next(weights), 0.0 if b.imag == 0 else -next(weights))
        if weight:
            found.append(_term(weight, b, q, middle))
    if t is None:
        r = _short(next(weights) / width)
        t = _short(next(weights) - r * middle)
        t = t if abs(t) > 1e-13 * size else 0.0
    return _unless_it_cancels(function, found, r, t)


def _term(weight: complex, b: complex, q: float, middle: float) -> Term:
    """The real part of weight times the exponential, which is 1 in the middle."""
    log = cmath.log(weight) - b * middle + q * middle**2
    if abs(log.real) < 600:  # a phase of a quarter turn, an even amplitude
        weight = cmath.exp(log)
        weight = complex(*(_short(x) if abs(x) > 1e-13 * abs(weight) else 0.0 for x in (weight.real, weight.imag)))
        log = cmath.log(weight)
    return Term(log, b, q)


def _unless_it_cancels(function: Function, terms: list[Term], r: float, t: float) -> Candidate | None:
    """The sum of exponentials, unless both value and slope at 0 are small remainders of large parts."""
    value, slope = (float(d) for d in derivatives(function, torch.zeros(1, dtype=torch.float64), 1))
    weights = [math.exp(min(term.log_weight.real, 700.0)) for term in terms]
    of_value = sum(weights) + abs(t)
    of_slope = sum(w * abs(term.slope) for w, term in zip(weights, terms, strict=True)) + abs(r)
    if abs(value) < _CANCELS * of_value and abs(slope) < _CANCELS * of_slope:
        return None
    return Exponentials(terms, r, t, (value, slope))


def _changed_erf(function: Function) -> Candidate | None:
    """P erf(q z) + r z + t, from where it has come to its line and from the slope at 0."""
    if (far := _saturated(function)) is None:
        return None
    at, low, high = far
    value, slope = (float(d) for d in derivatives(function, torch.zeros(1, dtype=torch.float64), 1))
    if abs(low[1] - high[1]) > 1e-14 * abs(slope):
        return None
    r = _short(high[1])
    p = _short((high[0] - low[0]) / 2 - r * at)
    if p == 0 or abs(slope) < _CANCELS * abs(slope - r):
        return None
    return AffineChange(Erf(), p, _short((slope - r) * math.sqrt(math.pi) / (2 * p)), r, _short(value))


def _changed_gelu(function: Function) -> Candidate | None:
    """P gelu(q z) + r z + t for q > 0, from the slopes far out and the curvature at 0."""
    if (far := _saturated(function)) is None:
        return None
    _, low, high = far
    value, slope, curvature = (float(d) for d in derivatives(function, torch.zeros(1, dtype=torch.float64), 2))
    rise = high[1] - low[1]
    if rise == 0 or abs(slope) < _CANCELS * abs(rise):
        return None
    q = _short(curvature / rise * math.sqrt(math.pi / 2))
    return AffineChange(Gelu(), _short(rise / q), q, _short(low[1]), _short(value)) if q > 0 else None


def _saturated(function: Function) -> tuple[float, tuple[float, float], tuple[float, float]] | None:
    """The first power of two beyond which slopes are constant on both sides; value and slope at minus it, and at it."""
    z = 2.0 ** torch.arange(-8, 22, dtype=torch.float64)
    (above, slope_above), (below, slope_below) = (values_and_slopes(function, sign * z) for sign in (1, -1))
    rounding = 1e-15 * (slope_above.abs() + slope_below.abs()).max()
    constant = (slope_above.diff().abs() <= rounding) & (slope_below.diff().abs() <= rounding)
    moving = torch.nonzero(~constant)
    place = int(moving.max()) + 1 if len(moving) else 0
    if place == 0 or place > len(z) - 3:
        return None
    low, high = ((float(v[place]), float(s[place])) for v, s in ((below, slope_below), (above, slope_above)))
    steepest = 1e-15 * max(float(slope_above.abs().max()), float(slope_below.abs().max()))
    low, high = ((value, slope if abs(slope) > steepest else 0.0) for value, slope in (low, high))
    return float(z[place]), low, high


def _short(number: float) -> float:
    """The decimal number of twelve digits that it is up to rounding, if it is one."""
    short = float(f"{number:.12g}") + 0.0
    return short if abs(short - number) <= 1e-13 * abs(short) else float(number)


def _short_complex(number: complex) -> complex:
    return complex(_short(number.real), _short(number.imag))


def fingerprint(function: Function) -> str:
    """A hash of the values and slopes by which a function is recognized, equal for two spellings of one function."""
    values = torch.cat(values_and_slopes(function, _places()))
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _places() -> Tensor:
    # far out as dense as to see a feature of a part in 300 of its place
    sizes = torch.from_numpy(np.concatenate([np.geomspace(1e-6, 12, 80), np.geomspace(12, 1e6, 4000)]))
    return torch.cat([torch.linspace(-12, 12, 2401, dtype=torch.float64) + 0.00123, sizes, -sizes])
