"""Numbers as users pass them."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import refusal

_LABELS = 20  # different whole numbers that may be labels of classes; more are quantities


def few_enough_for_labels(distinct: int, count: int) -> bool:
    """Whether so many different whole numbers among `count` may be labels: at most 20, each twice on average.

    >>> few_enough_for_labels(3, 12), few_enough_for_labels(3, 5), few_enough_for_labels(21, 1000)
    (True, False, False)
    """
    return distinct <= min(_LABELS, count / 2)


def check_dense(tensor: Tensor, name: str) -> None:
    """Refuse tensors without values (device "meta"), and sparse, quantized and nested ones."""
    if tensor.is_meta:
        fix = "Pass a tensor with values."
        raise refusal(name, got='a tensor on device "meta", without values', expected="numbers", fix=fix)
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
        convert = {"nested": "to_padded_tensor(0.0)", "quantized": "dequantize()", "sparse": "to_dense()"}[kind]
        mask = ", and a mask of what is padding where the model takes one" if kind == "nested" else ""
        raise refusal(name, got=f"a {kind} tensor", expected="a dense one", fix=f"Pass {name}.{convert}{mask}.")


def refuse_masked(value: Any, name: str) -> None:
    """Refuse a numpy array with a mask: what it hides would count as a number."""
    if isinstance(value, np.ma.MaskedArray):
        fix = "Fill it (x.filled(0.0)), or leave out what is hidden."
        raise refusal(name, got="a masked array, whose mask would be lost", expected="an array of values", fix=fix)


def means_and_deviations(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (over n, not n - 1) of each column, float64, of any size that the values may have.

    >>> means_and_deviations(torch.tensor([[1e200], [3e200]], dtype=torch.float64))
    (tensor([2.0000e+200], dtype=torch.float64), tensor([1.0000e+200], dtype=torch.float64))
    """
    scale = scales(values)
    values = values / scale
    return values.mean(0) * scale, values.std(0, correction=0) * scale


def scales(values: Tensor) -> Tensor:
    """The power of two below the largest size in each column; 1 for zeros.

    Squares of very small or large values over- or underflow; divided by a power of two, no bit of others changes.
    """
    largest = values.abs().amax(0)
    return torch.where(largest > 0, 2.0 ** largest.log2().floor(), 1.0)


def relative_residual(rest: Tensor, y: Tensor) -> float:
    """|rest| / |y| (Frobenius), for values of any size; |rest| where y is zero."""
    scale = scales(y.reshape(-1))
    return (rest / scale).norm().item() / ((y / scale).norm().item() or 1.0)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of Python or numpy; True and False are none.

    >>> [is_integer(value) for value in (3, np.int64(3), 3.0, True, "3")]
    [True, True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_integer(value: Any, name: str, expected: str, fix: str, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """Take one integer from `least` to `most`, as Python's.

    >>> as_integer(np.int64(3), "k", "1 <= k <= 5", "Use a smaller k.", least=1, most=5)
    3
    >>> as_integer(True, "k", "1 <= k <= 5", "Use a smaller k.", least=1, most=5)
    Traceback (most recent call last):
        ...
    ntkit.Refused: k: got True; expected 1 <= k <= 5. Use a smaller k.
    """
    if not is_integer(value) or not least <= value <= most:
        raise refusal(name, got=repr(value)[:80], expected=expected, fix=fix)
    return int(value)


def as_integers(values: Any, name: str, expected: str, fix: str, least: int, most: int = 2**63 - 1) -> list[int]:
    """Take a list of integers (or a tensor or array of one axis) from `least` to `most`, as Python's; not a mask.

    >>> as_integers(np.array([0, 4]), "examples", "0 to 4", "Number them from 0.", least=0, most=4)
    [0, 4]
    >>> as_integers([True, False], "examples", "0 to 4", "Number them from 0.", least=0, most=4)
    Traceback (most recent call last):
        ...
    ntkit.Refused: examples: got True; expected 0 to 4. Number them from 0.
    """
    listed = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    if not isinstance(listed, (list, tuple, range)):
        raise refusal(name, got=repr(values)[:80], expected=expected, fix=fix)
    return [as_integer(value, name, expected, fix, least, most) for value in listed]


def integers_of(value: Any) -> Tensor | None:
    """The integers in a number, a list, an array or a tensor, as int64; None where it holds something else.

    >>> integers_of([1, 2]), integers_of(True), integers_of("2"), integers_of(1.0)
    (tensor([1, 2]), None, None, None)
    """
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.to(torch.int64) if whole else None


def as_number(value: Any, name: str, good: Callable[[float], bool], expected: str, fix: str) -> float:
    """Take one real number (or a tensor or array without axes) that is `good`, as a float.

    >>> as_number("0.1", "ridge", lambda r: r >= 0, "a number >= 0", "It is added to the diagonal.")
    Traceback (most recent call last):
        ...
    ntkit.Refused: ridge: got '0.1'; expected a number >= 0. It is added to the diagonal.
    """
    if isinstance(value, Tensor):
        check_dense(value, name)
    array = isinstance(value, (Tensor, np.ndarray))
    number = value.item() if array and value.ndim == 0 else value
    try:
        ok = isinstance(number, Real) and not isinstance(number, (bool, np.bool_)) and good(float(number))
    except OverflowError:
        ok = False
    if not ok:
        got = f"{type(value).__name__} of shape {list(value.shape)}" if array and value.ndim else repr(number)[:80]
        raise refusal(name, got=got, expected=expected, fix=fix)
    return float(number)
