"""Kinks and jumps of an elementwise function, and the polynomials between them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial

from ntkit.kernels.infinite.activations import Function, values_and_slopes

_DEGREE = 3  # of a polynomial, at most
_MOST = 8  # kinks: the cost of a kernel grows with their square
_ROUNDING = 1e-13  # up to which values agree with the polynomial that makes them, relative to the largest of its terms
_ALIKE = 1e-9  # up to which two polynomials are one, relative likewise
_OF_SLOPES = 1e-7  # up to which slopes agree: PyTorch's one of hardsigmoid is a constant in float32
_LARGEST = 1e6  # up to here functions are compared
_DIVISIONS = 3  # of a cell, each into eight


class Pieces(NamedTuple):
    """Kinks in rising order; coefficients of the polynomials before, between and behind them, lowest power first."""

    kinks: list[float]
    polynomials: list[np.ndarray]


def pieces(function: Function) -> Pieces | None:
    """The polynomials that make up a function with kinks or jumps; None if it is no such function.

    A cell of a grid on which no polynomial fits holds kinks: it is divided. So does the border of cells with different
    ones.
    The place is found by bisection, to the last digit. Values and slopes are then compared at points of all sizes.
    """
    fine, coarse = np.linspace(-12.5, 12.5, 401), np.geomspace(12.5, _LARGEST, 80)[1:]
    ends = np.concatenate([-coarse[::-1], fine, coarse]) + 0.00123
    with np.errstate(all="ignore"):
        runs = _runs(function, _divided(function, ends))
        if not 1 < len(runs) <= _MOST + 1 or runs[0][0] != ends[0] or runs[-1][1] != ends[-1]:
            return None
        kinks = [_border(function, one, two) for one, two in zip(runs, runs[1:], strict=False)]
        if not all(a < b for a, b in zip(kinks, kinks[1:], strict=False)):
            return None
        found = _fitted(function, kinks)
        return found if found is not None and _confirmed(function, found) else None


_Run = tuple[float, float, Polynomial, Polynomial]  # ends, polynomial of the first and of the last cell


def _divided(function: Function, ends: np.ndarray) -> np.ndarray:
    """Cells in which values at many places are not those of one polynomial are divided, down to narrow features."""
    for _ in range(_DIVISIONS):
        width = np.diff(ends)
        bad = np.zeros(len(width), dtype=bool)
        far = np.abs(ends[:-1]) > 12
        for which, count in ((~far, 16), (far, 512)):
            x = -np.cos((np.arange(6) + 0.5) * math.pi / 6)
            dense = np.linspace(-1, 1, count + 2)[1:-1]
            middle, half = (ends[:-1] + width / 2)[which, None], width[which, None] / 2
            at = middle + half * np.concatenate([x, dense])
            with torch.no_grad():
                values = function(torch.from_numpy(at.ravel())).double().numpy().reshape(at.shape)
            fits = np.polynomial.polynomial.polyfit(x, values[:, :6].T, _DEGREE)
            apart = np.abs(np.polynomial.polynomial.polyval(dense, fits) - values[:, 6:])
            bad[which] = ~(apart.max(1) <= 1e-11 * (np.abs(values).max(1) + 1e-300))
        if not bad.any() or bad.sum() > 3 * _MOST:
            return ends
        places = [np.linspace(low, high, 9)[1:-1] for low, high in zip(ends[:-1][bad], ends[1:][bad], strict=True)]
        ends = np.sort(np.concatenate([ends, *places]))
    return ends


def _runs(function: Function, ends: np.ndarray) -> list[_Run]:
    """Neighboring cells on which one polynomial fits; cells on which none fits are left out."""
    x = -np.cos((np.arange(6) + 0.5) * math.pi / 6)
    z = (ends[:-1, None] + ends[1:, None]) / 2 + (ends[1:, None] - ends[:-1, None]) / 2 * x
    values, slopes = _values(function, z)
    scales = _scale(z, values, slopes, 1)
    runs: list[_Run] = []
    for low, high, at, value, scale in zip(ends, ends[1:], z, values, scales, strict=False):
        if not math.isfinite(scale):
            return []
        fit = Polynomial.fit(at, value, _DEGREE, domain=[low, high])
        if np.abs(fit(at) - value).max() > 1e-12 * scale:
            continue
        if runs and runs[-1][1] == low and np.abs(runs[-1][3](at) - value).max() <= _ALIKE * scale:
            runs[-1] = (runs[-1][0], high, runs[-1][2], fit)
        elif len(runs) > _MOST:
            return []
        else:
            runs.append((low, high, fit, fit))
    return runs


def _border(function: Function, one: _Run, two: _Run) -> float:
    """The last number up to which the first run's polynomial has the function's values and slopes."""
    polynomial = one[3]
    slope = polynomial.deriv()
    low, high = (one[1] + polynomial.domain[0]) / 2, (two[0] + two[2].domain[1]) / 2
    scale = [float(np.abs(p(np.array([low, high]))).max()) + 1e-300 for p in (polynomial, slope)]
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high) or abs(middle) < 1e-15:
            break
        value, its_slope = (float(v[0]) for v in _values(function, np.array([middle])))
        apart = abs(value - polynomial(middle)) / scale[0], abs(its_slope - slope(middle)) / max(scale)
        low, high = (middle, high) if apart[0] <= _ALIKE and apart[1] <= _OF_SLOPES else (low, middle)
    return 0.0 if abs(low) < 1e-14 else low


def _fitted(function: Function, kinks: list[float]) -> Pieces | None:
    """Polynomials of lowest degree between the kinks; kinks of higher derivatives are moved to their exact place."""
    polynomials: list[np.ndarray] = []
    for low, high in zip([-math.inf, *kinks], [*kinks, math.inf], strict=False):
        low = max(low, min(high - 2, 3 * high) if high < 0 else high - 2) if low == -math.inf else low
        high = min(high, max(low + 2, 3 * low) if low > 0 else low + 2) if high == math.inf else high
        x = (low + high) / 2 - (high - low) / 2 * 0.999 * np.cos((np.arange(16) + 0.5) * math.pi / 16)
        values, slopes = _values(function, x)
        scale, reach = float(_scale(x, values, slopes, 0)), max(abs(low), abs(high))
        for degree in range(_DEGREE + 1):
            fit = Polynomial.fit(x, values, degree, domain=[low, high])
            if np.abs(fit(x) - values).max() <= _ROUNDING * scale:
                break
        else:
            return None
        coefficients = fit.convert().coef
        coefficients[np.abs(coefficients) * reach ** np.arange(len(coefficients)) <= 10 * _ROUNDING * scale] = 0
        polynomials.append(np.array([_short(float(c)) for c in coefficients]))
    # a border between cells of which the polynomials differed by rounding is none
    real = [i for i, at in enumerate(zip(kinks, polynomials, polynomials[1:], strict=False)) if _jumps(*at)]
    polynomials = [polynomials[0], *(polynomials[i + 1] for i in real)]
    moved = [_moved(*at) for at in zip([kinks[i] for i in real], polynomials, polynomials[1:], strict=False)]
    return Pieces(moved, polynomials) if moved else None


def _jumps(place: float, one: np.ndarray, two: np.ndarray) -> bool:
    """Whether two polynomials differ at their border in any derivative."""
    terms = Polynomial(np.abs(one)) + Polynomial(np.abs(two))
    sizes = [terms.deriv(d)(abs(place)) if d else terms(abs(place)) for d in range(_DEGREE + 1)]
    return bool((np.abs(jumps_at(place, one, two)) > 1e-11 * (np.array(sizes) + 1e-300)).any())


def _moved(place: float, one: np.ndarray, two: np.ndarray) -> float:
    """A kink of a higher derivative is where the jump of the derivative below it is 0."""
    scale = max(np.abs(one).max(), np.abs(two).max())
    for _ in range(60):
        jumps = jumps_at(place, one, two)
        order = next((d for d, jump in enumerate(jumps) if abs(jump) > 1e-6 * scale), 0)
        if order < 2:
            break
        place -= jumps[order - 1] / jumps[order]
    return _short(place)


def _short(number: float) -> float:
    """The decimal number of twelve digits that it is up to rounding, if it is one."""
    short = float(f"{number:.12g}") + 0.0
    return short if abs(short - number) <= 1e-14 * abs(short) else float(number)


def jumps_at(place: float, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Differences of the derivatives of order 0, 1, ... of two polynomials at a place, of the second to the first."""
    difference = Polynomial(two) - Polynomial(one)
    return np.array([difference.deriv(d)(place) if d else difference(place) for d in range(_DEGREE + 1)])


def _confirmed(function: Function, found: Pieces) -> bool:
    """Whether values and slopes are those of the function, at thousands of points and close to all kinks."""
    large = np.concatenate([np.geomspace(1e-6, 12, 80), np.geomspace(12, _LARGEST, 6000)])
    apart = np.geomspace(1e-9, 1, 40)
    near = np.array(found.kinks)[:, None] + np.concatenate([apart, -apart])
    z = np.concatenate([np.linspace(-12, 12, 2401) + 0.00123, large, -large, near.ravel()])
    z = z[np.abs(z[:, None] - found.kinks).min(1) > 1e-12 * np.abs(z)]
    which = np.searchsorted(found.kinks, z)
    values, slopes = _values(function, z)
    for i, coefficients in enumerate(found.polynomials):
        here, terms = z[which == i], Polynomial(np.abs(coefficients))
        polynomial = Polynomial(coefficients)
        size = terms(np.abs(here)) + 1e-300
        if (np.abs(polynomial(here) - values[which == i]) > 1e-12 * size).any():
            return False
        size = terms.deriv()(np.abs(here)) + size / np.maximum(np.abs(here), 1)
        if (np.abs(polynomial.deriv()(here) - slopes[which == i]) > _OF_SLOPES * size).any():
            return False
    return True


def _scale(z: np.ndarray, values: np.ndarray, slopes: np.ndarray, axis: int) -> np.ndarray:
    """What the rounding errors of values are relative to: their own size, or what that of z makes of them."""
    return np.abs(values).max(axis) + np.abs(z * slopes).max(axis) + 1e-300


def _values(function: Function, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and slopes."""
    values, slopes = values_and_slopes(function, torch.from_numpy(z.ravel()))
    return values.double().numpy().reshape(z.shape), slopes.double().numpy().reshape(z.shape)
