"""What a weight or a bias was drawn from: read off its values, so that a module tells its own infinite-width limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkit.base.checks import refusal

_WITHIN = 4  # standard errors that the second moment and the shape may be off
_CENTRED = 5  # standard errors that the mean may be off
_SHORT = 14  # entries' worth that the largest of n uniform ones may lie below the bound: chance e^-14

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
_OF_BIASES = (DEFAULT, NORMAL)
# of one entry over its variance: variance of the square; kurtosis and n times the variance of a sample's kurtosis
_SPREAD = {"normal": 2.0, "uniform": 0.8}
_KURTOSIS = {"normal": (3.0, 24.0), "uniform": (1.8, 1.317)}


@dataclass(frozen=True)
class Initial:
    """What values were drawn from.

    Attributes
    ----------
    std : standard deviation of one entry (about the mean).
    name : the distribution recognized, "zeros", or "measured".
    error : relative standard error of `std`; 0 for a distribution that was recognized, whose `std` is exact.
    mean : of the values, where it is not zero by more than five standard errors; else 0.
    """

    std: float
    name: str
    error: float = 0.0
    mean: float = 0.0


def initial_std(values: Tensor, fan_in: int, fan_out: int, subject: str = "values") -> Initial:
    """Standard deviation that the entries of a weight or bias were drawn with, recognized or else measured.

    Known are zeros, torch's default for dense and convolution layers (uniform in ±1/√fan_in: std 1/√(3 fan_in)),
    Kaiming's normal and uniform ones (gain/√fan, gain √2 or 1, either fan), Xavier's (√(2/(fan_in + fan_out))), and
    N(0, 1); of biases the default, zeros and N(0, 1). One is accepted when the mean is within 5 and the second moment
    and the kurtosis within 4 standard errors of its own, and, if it is uniform, no entry lies beyond its bound and the
    largest lies close below. torch's default wins among those accepted, then the one with the closest second moment.
    If none is accepted (trained or custom values), std is the root mean square about the mean.

    Parameters
    ----------
    values : of any shape; a weight's first axis are the outputs; one axis: a bias.
    fan_in, fan_out : inputs of one output, outputs of one input: channels x kernel size for a convolution.
    subject : what a refusal calls the values.

    Returns
    -------
    Initial

    Raises
    ------
    Refused
        No values, values that are not finite, or more than one that are all the same but not zero.

    Notes
    -----
    He et al. 2015, section 2.2 (Kaiming); Glorot & Bengio 2010, section 4.2.1 (Xavier). Of a handful of values the
    first that fits is taken: one that lies in torch's range is taken for torch's default.

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
        raise refusal(subject, got=got, expected="finite real numbers", fix="Look at how the layer was made.")
    low, high = float(v.min()), float(v.max())
    if low == high == 0:
        return Initial(0.0, ZEROS)
    if n > 1 and low == high:
        raise refusal(
            subject,
            got=f"{n} entries that are all {low:g}",
            expected="values drawn at random, or zeros",
            fix="A constant has no distribution whose width could grow; draw it at random, or give the stds.",
        )
    mean = float(v.sum(dtype=torch.float64)) / n
    square = float(torch.linalg.vector_norm(v, 2, dtype=torch.float64)) ** 2 / n
    kurtosis = float(torch.linalg.vector_norm(v, 4, dtype=torch.float64)) ** 4 / n / square**2
    largest, rounding = max(-low, high), 2 * torch.finfo(v.dtype).eps
    accepted = {
        name: abs(square / std**2 - 1)
        for name, (shape, rule) in _RULES.items()
        if (v.dim() > 1 or name in _OF_BIASES)
        and (std := rule(fan_in, fan_out))
        and _fits(shape, std, n, mean, square, kurtosis, largest, rounding)
    }
    if accepted:
        name = DEFAULT if DEFAULT in accepted else min(accepted, key=lambda name: accepted[name])
        return Initial(_RULES[name][1](fan_in, fan_out), name)
    variance = square - mean**2
    shifted = n > 1 and abs(mean) > _CENTRED * (variance / n) ** 0.5
    std = (variance if shifted else square) ** 0.5
    error = (max(kurtosis - 1, _SPREAD["normal"]) / n) ** 0.5 / 2
    told = f"{MEASURED}, mean {mean:.3g} ± {(variance / n) ** 0.5:.1g}" if shifted else MEASURED
    return Initial(std, told, error, mean if shifted else 0.0)


def _fits(
    shape: str, std: float, n: int, mean: float, square: float, kurtosis: float, largest: float, rounding: float
) -> bool:
    """Whether n values with these moments can be draws of a distribution with mean zero and this deviation."""
    bound = 3**0.5 * std
    if shape == "uniform" and not (1 - _SHORT / n) * (1 - rounding) <= largest / bound <= 1 + rounding:
        return False
    expected, spread = _KURTOSIS[shape]
    error = (_SPREAD[shape] / n) ** 0.5
    return (
        abs(mean) <= _CENTRED * std / n**0.5
        and square / std**2 - 1 <= _WITHIN * error
        # downwards in its logarithm: or a few values, however small, could be draws of a wide distribution
        and math.log(square / std**2) >= -_WITHIN * error
        # a sample's kurtosis is below its own, the more the fewer values: only far above, or below for many
        and abs(kurtosis - expected) <= _WITHIN * (spread / n) ** 0.5 + 2 * expected / n
    )


def drawn(
    initial: Initial, shape: tuple[int, ...], fan_in: int, fan_out: int, was: int, generator: torch.Generator
) -> Tensor:
    """Values as `initial_std` found them, for another size: float64 of this shape.

    A recognized distribution is drawn at the new fans. Of measured ones a weight is drawn normal with std √(was / fan
    in), where `was` is the fan in it was measured at, a bias with the same std, both about the same mean.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> float(drawn(Initial(0.1, DEFAULT), (400, 300), 300, 400, 33, g).abs().max()) <= 300**-0.5
    True
    """
    if initial.name == ZEROS:
        return torch.zeros(shape, dtype=torch.float64)
    kind, rule = _RULES.get(initial.name, ("normal", None))
    scale = 1.0 if len(shape) < 2 else math.sqrt(was / fan_in)
    std = initial.std * scale if rule is None else rule(fan_in, fan_out)
    if kind == "uniform":
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * 3**0.5 * std
    return torch.randn(shape, generator=generator, dtype=torch.float64) * std + initial.mean * scale
