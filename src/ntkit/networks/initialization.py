"""The distribution that a weight or a bias was drawn from, inferred from its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.base.checks import refusal

_MOMENT_ERRORS = 4  # largest deviation of second moment and kurtosis, in standard errors
_MEAN_ERRORS = 5  # largest deviation of the mean, in standard errors
_GAP = 14  # the largest of n uniform entries lies more than this fraction 1/n below the bound with chance e^-14

Rule = Callable[[int, int], float]  # fan in, fan out -> standard deviation of one entry

DEFAULT, NORMAL, ZEROS, MEASURED = "torch's default (uniform)", "standard normal", "zeros", "measured"
_RULES: dict[str, tuple[str, Rule]] = {
    DEFAULT: ("uniform", lambda i, o: (3 * i) ** -0.5),
    NORMAL: ("normal", lambda i, o: 1.0),
    "Kaiming normal, gain √2, fan in": ("normal", lambda i, o: (2 / i) ** 0.5),
    "Kaiming uniform, gain √2, fan in": ("uniform", lambda i, o: (2 / i) ** 0.5),
    "Kaiming normal, gain 1, fan in": ("normal", lambda i, o: i**-0.5),
    "Kaiming uniform, gain 1, fan in": ("uniform", lambda i, o: i**-0.5),
    "Xavier normal": ("normal", lambda i, o: (2 / (i + o)) ** 0.5),
    "Xavier uniform": ("uniform", lambda i, o: (2 / (i + o)) ** 0.5),
    "Kaiming normal, gain √2, fan out": ("normal", lambda i, o: (2 / o) ** 0.5),
    "Kaiming uniform, gain √2, fan out": ("uniform", lambda i, o: (2 / o) ** 0.5),
    "Kaiming normal, gain 1, fan out": ("normal", lambda i, o: o**-0.5),
    "Kaiming uniform, gain 1, fan out": ("uniform", lambda i, o: o**-0.5),
}
_BIAS_RULES = (DEFAULT, NORMAL)
# for one entry divided by its std: variance of the square; kurtosis and n times the variance of a sample's kurtosis
_SQUARE_VARIANCE = {"normal": 2.0, "uniform": 0.8}
_KURTOSIS = {"normal": (3.0, 24.0), "uniform": (1.8, 1.317)}


@dataclass(frozen=True)
class Initial:
    """A distribution of initial values.

    Attributes
    ----------
    std : standard deviation of one entry (about the mean).
    name : name of a known distribution, "zeros", or "measured".
    error : relative standard error of `std`; 0 for a known distribution, whose `std` is exact.
    mean : mean of the values if it differs from zero by more than five standard errors; else 0.
    """

    std: float
    name: str
    error: float = 0.0
    mean: float = 0.0


def initial_std(values: Tensor, fan_in: int, fan_out: int, subject: str = "values") -> Initial:
    """Distribution that the entries of a weight or bias were drawn from: a known one if it fits, else measured.

    Known are zeros, torch's default for dense and convolution layers (uniform in ±1/√fan_in: std 1/√(3 fan_in)),
    Kaiming's normal and uniform ones (gain/√fan, gain √2 or 1, either fan), Xavier's (√(2/(fan_in + fan_out))), and
    N(0, 1); for biases the default, zeros and N(0, 1). A distribution fits if the mean is within 5 and the second
    moment and the kurtosis within 4 standard errors of its own, and, if it is uniform, no entry lies beyond its bound
    and the largest lies close to it. Of several, torch's default is taken, else the one with the closest second moment.
    If none fits (trained or custom values), std is the root mean square about the mean.

    Parameters
    ----------
    values : the entries, in any shape; the first axis of a weight are the outputs; one axis means a bias.
    fan_in, fan_out : inputs of one output, outputs of one input: channels x kernel size for a convolution.
    subject : name of the values in errors.

    Raises
    ------
    Refused
        For no values, values that are not finite, or several equal values other than zero.

    Notes
    -----
    He et al. 2015, section 2.2 (Kaiming); Glorot & Bengio 2010, section 4.2.1 (Xavier). Few values fit several
    distributions: then torch's default is taken if they lie in its range.

    Examples
    --------
    >>> layer = torch.nn.Linear(300, 100)
    >>> initial_std(layer.weight, 300, 100).name
    "torch's default (uniform)"
    >>> round(initial_std(layer.weight, 300, 100).std * 30, 12)
    1.0
    >>> initial_std(0.3 * torch.nn.init.normal_(layer.weight), 300, 100).name
    'measured'
    """
    n, v = values.numel(), values.detach()
    if not n or not v.is_floating_point() or not torch.isfinite(v).all():
        got = "none" if not n else str(v.dtype) if not v.is_floating_point() else "values that are not finite"
        raise refusal(subject, got=got, expected="finite real numbers", fix="Check how the layer was built.")
    low, high = float(v.min()), float(v.max())
    if low == high == 0:
        return Initial(0.0, ZEROS)
    if n > 1 and low == high:
        expected = "values drawn at random, or zeros"
        fix = "A constant has no standard deviation at other widths. Draw the entries at random, or give the stds."
        raise refusal(subject, got=f"{n} entries that are all {low:g}", expected=expected, fix=fix)
    largest, rounding = max(-low, high), 2 * torch.finfo(v.dtype).eps
    known = 1e-60 < largest < 1e60  # beyond, fourth powers do not exist, and no known distribution is
    unit = 1.0 if known else 2.0 ** (math.frexp(largest)[1] - 1)
    v = v if known else v / unit
    mean = float(v.sum(dtype=torch.float64)) / n
    square = float(torch.linalg.vector_norm(v, 2, dtype=torch.float64)) ** 2 / n
    kurtosis = float(torch.linalg.vector_norm(v, 4, dtype=torch.float64)) ** 4 / n / square**2
    accepted = {
        name: abs(square / std**2 - 1)
        for name, (shape, rule) in _RULES.items()
        if known
        and (v.dim() > 1 or name in _BIAS_RULES)
        and (std := rule(fan_in, fan_out))
        and _fits(shape, std, n, mean, square, kurtosis, largest, rounding)
    }
    if accepted:
        name = DEFAULT if DEFAULT in accepted else min(accepted, key=lambda name: accepted[name])
        return Initial(_RULES[name][1](fan_in, fan_out), name)
    # of the deviations themselves: the difference square - mean**2 may have no digit, or another sign
    variance = float(torch.linalg.vector_norm(v.to(torch.float64) - mean)) ** 2 / n
    shifted = n > 1 and abs(mean) > _MEAN_ERRORS * (variance / n) ** 0.5
    std = (variance if shifted else square) ** 0.5
    error = (max(kurtosis - 1, _SQUARE_VARIANCE["normal"]) / n) ** 0.5 / 2
    name = f"{MEASURED}, mean {unit * mean:.3g} ± {unit * (variance / n) ** 0.5:.1g}" if shifted else MEASURED
    return Initial(unit * std, name, error, unit * mean if shifted else 0.0)


def _fits(
    shape: str, std: float, n: int, mean: float, square: float, kurtosis: float, largest: float, rounding: float
) -> bool:
    """Whether n values with these moments fit a distribution with mean zero and this standard deviation."""
    bound = 3**0.5 * std
    if shape == "uniform" and not (1 - _GAP / n) * (1 - rounding) <= largest / bound <= 1 + rounding:
        return False
    expected, spread = _KURTOSIS[shape]
    error = (_SQUARE_VARIANCE[shape] / n) ** 0.5
    return (
        abs(mean) <= _MEAN_ERRORS * std / n**0.5
        and square / std**2 - 1 <= _MOMENT_ERRORS * error
        # below, in its logarithm: else a few values, however small, would fit a wide distribution
        and math.log(square / std**2) >= -_MOMENT_ERRORS * error
        # the kurtosis of a small sample is lower than that of its distribution, hence the last term
        and abs(kurtosis - expected) <= _MOMENT_ERRORS * (spread / n) ** 0.5 + 2 * expected / n
    )


def drawn(
    initial: Initial, shape: tuple[int, ...], fan_in: int, fan_out: int, old_fan_in: int, generator: torch.Generator
) -> Tensor:
    """Draw values from the distribution that `initial_std` inferred, for another size: float64 of this shape.

    A known distribution is drawn at the new fans. A measured one is drawn as a normal: a weight with mean and std times
    √(old_fan_in / fan_in), a bias with the same mean and std.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> float(drawn(Initial(0.1, DEFAULT), (400, 300), 300, 400, 33, g).abs().max()) <= 300**-0.5
    True
    """
    if initial.name == ZEROS:
        return torch.zeros(shape, dtype=torch.float64)
    kind, rule = _RULES.get(initial.name, ("normal", None))
    scale = 1.0 if len(shape) < 2 else math.sqrt(old_fan_in / fan_in)
    std = initial.std * scale if rule is None else rule(fan_in, fan_out)
    if kind == "uniform":
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * 3**0.5 * std
    return torch.randn(shape, generator=generator, dtype=torch.float64) * std + initial.mean * scale
