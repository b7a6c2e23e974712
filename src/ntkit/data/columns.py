"""The columns of a table: standardized on the training set, and shown as they were in the file."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ntkit.base.checks import Refused, refusal
from ntkit.base.numbers import means_and_deviations


class Columns(NamedTuple):
    """Names of the columns of x; their means and standard deviations on the training set; which are numbers.

    The others are indicators of a text: 0 or 1, and left as they are.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    numeric: tuple[bool, ...]

    def shown(self, x: Tensor) -> str:
        """One example [d] as text: numbers as in the file, to about a hundredth of the deviation; texts that it has.

        >>> Columns(("area", "city Bern", "city Oslo"), (100.0, 0, 0), (20.0, 1, 1), (True, False, False)).shown(
        ...     torch.tensor([-0.5123, 0, 1])
        ... )
        'area 89.8, city Oslo'
        """
        deviation = torch.tensor(self.deviation, dtype=torch.float64, device="cpu")
        values = x.double().cpu() * deviation + torch.tensor(self.mean, dtype=torch.float64, device="cpu")
        values[values.abs() < 1e-6 * deviation] = 0  # x is float32
        shown = []
        each = zip(self.names, self.numeric, x.tolist(), values.tolist(), self.deviation, strict=True)
        for name, numeric, scaled, value, unit in each:
            if numeric:
                shown.append(f"{name} {_to_a_hundredth(value, unit) if scaled else f'{value:.6g}'}")
            elif value > 0.5:
                shown.append(name)
        return ", ".join(shown)


def _to_a_hundredth(value: float, unit: float) -> str:
    """A number to a hundredth of a unit, or nearly so, without zeros at its end.

    >>> [_to_a_hundredth(v, u) for v, u in ((1987.0, 10.0), (-0.0236772, 0.0476), (7.91e-5, 0.0476), (1.5e9, 2e8))]
    ['1987', '-0.0237', '0.0001', '1500000000']
    """
    decimals = max(0, 2 - math.floor(math.log10(unit)))
    if decimals > 6 or abs(value) >= 1e15:
        return f"{value:.3g}"
    text = f"{value:z.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def too_far(subject: str, value: float, deviation: float) -> Refused:
    """Refusal of a value whose distance from the mean, in standard deviations, the dtype of the data does not hold."""
    got = f"{value:g}, where the training set's standard deviation is {deviation:.3g}"
    fix = "Correct it, or remove its row."
    return refusal(subject, got=got, expected="values that can be standardized", fix=fix)


def standardized_columns(
    inputs: list[Tensor], names: tuple[str, ...], numeric: tuple[bool, ...], subject: str
) -> tuple[list[Tensor], str, Columns]:
    """Columns of numbers minus their mean on the first set, over their standard deviation there, as float32; in words.

    A column that is constant there is only centered. Values so far from the mean that float32 does not hold their
    distance in deviations are refused.
    """
    mask = torch.tensor(numeric, device="cpu")
    mean, deviation = means_and_deviations(inputs[0])
    constant = mask & (deviation <= 1e-12 * mean.abs())
    mean = torch.where(mask, mean, 0.0)
    deviation = torch.where(mask & ~constant, deviation, 1.0)
    given, inputs = inputs, [((x - mean) / deviation).float() for x in inputs]
    for x, scaled in zip(given, inputs, strict=True):
        if len(bad := (~scaled.isfinite()).nonzero()):
            row, column = bad[0].tolist()
            raise too_far(f"{subject}, column {names[column]}", float(x[row, column]), float(deviation[column]))
    count, fixed, indicators = int(mask.sum()), int(constant.sum()), int((~mask).sum())
    text = f"{count} column{'s' if count > 1 else ''} of numbers standardized on the training set" if count else ""
    text += f" ({fixed} constant there, only centered)" if fixed else ""
    parts = [text, f"{indicators} indicators of text as 0 and 1"] if indicators else [text]
    told = Columns(names, tuple(mean.tolist()), tuple(deviation.tolist()), numeric)
    return inputs, "; ".join(part for part in parts if part), told
