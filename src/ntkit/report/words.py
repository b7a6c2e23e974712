"""Numbers as text: how reports write values, errors, shares and changes. What they judge is in `judgments`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

Number = dict[str, Any]


def percent(number: Number, unit: bool = True) -> str:
    r"""Write an error rate as percent with its standard error.

    >>> percent({"value": 0.025, "error": 0.0082}).replace("\u00a0", " ")
    '2.5 ± 0.8 %'
    """
    if number["value"] is None:
        return "undefined"
    value, error = 100 * number["value"], number["error"]
    digits = 2 if (error is not None and 0 < error < 1e-3) else 1
    spread = f"\u00a0±\u00a0{100 * error:.{digits}f}" if error else ""  # a binomial error of 0 says nothing
    unit_text = "\u00a0%" if unit else ""
    return f"{value:.{digits}f}{spread}{unit_text}"


def plain(value: float | None, digits: int = 3) -> str:
    """Write a number with a few significant digits; None becomes a dash.

    >>> plain(0.123456), plain(1731.0), plain(3.1e-10), plain(-0.87), plain(None)
    ('0.123', '1731', '3.1e-10', '−0.87', '–')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if value < 0:
        return f"−{plain(-value, digits)}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text or abs(value) >= 10**digits else text


def digits(value: float | None) -> str:
    """A number with three significant digits, large ones with separators.

    >>> digits(253503.7), digits(0.01234), digits(-1234.5), digits(None)
    ('254,000', '0.0123', '−1,230', '–')
    """
    if value is None:
        return "–"
    if abs(value) < 1000 or abs(value) >= 1e12:
        return plain(value).replace("-", "−")
    rounded = round(value, 2 - math.floor(math.log10(abs(value))))
    return f"{rounded:,.0f}".replace("-", "−")


def spread(value: float | list[float] | None) -> str:
    """Write one value, or the range of several (one per class of one-vs-rest machines)."""
    if isinstance(value, list):
        values = [v for v in value if v is not None]
        return f"{plain(min(values))} to {plain(max(values))}" if values else "–"
    return plain(value)


def measure(number: dict[str, Any]) -> str:
    """Write a number with its standard error, to the digits the error supports.

    >>> measure({"value": 0.6123, "error": 0.0114})
    '0.612 ± 0.011'
    """
    value, error = number["value"], number["error"]
    if value is None:
        return "undefined"
    if not error:
        return plain(value)
    digits = max(0, (1 if f"{error:.1e}"[0] == "1" else 0) - math.floor(math.log10(error)))
    if digits >= 6:
        return f"{plain(value)} ± {error:.1e}"
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def change(first: float | None, last: float | None) -> str:
    """Say how a positive number changed.

    >>> change(2.0, 7.0), change(11443.0, 4.27e6)
    ('grew 3.5-fold, from 2 to 7', 'grew 373-fold, from 11,400 to 4,270,000')
    >>> change(1.0, 1.01).replace("\u00a0", " ")
    'changed by less than 5 %, to 1.01'
    """
    if first is None or last is None or first <= 0 or last <= 0:
        return f"goes from {digits(first)} to {digits(last)}"
    ratio = last / first
    if 0.95 < ratio < 1.05:
        return f"changed by less than 5\u00a0%, to {digits(last)}"
    verb, times = "grew" if ratio > 1 else "shrank", max(ratio, 1 / ratio)
    return f"{verb} {plain(times, 2 if times >= 2 else 3)}-fold, from {digits(first)} to {digits(last)}"


def beside(value: float, limit: float, digits: int = 2) -> str:
    """A number in as many digits as tell it from a limit that it is judged by.

    >>> beside(0.04996, 0.05), beside(0.25, 0.05), beside(0.05, 0.05), beside(0.0, 0.05)
    ('0.04996', '0.25', '0.05', 'below 1e-300')
    """
    if value == 0:
        return "below 1e-300"
    while digits < 12 and value != limit and plain(value, digits) == plain(limit, digits):
        digits += 1
    return plain(value, digits)


def p_value(value: float) -> str:
    """A p value beside the level of the judgments.

    >>> p_value(0.25), p_value(0.0)
    ('p = 0.25', 'p below 1e-300')
    """
    text = beside(value, 0.05)
    return f"p {text}" if text.startswith("below") else f"p = {text}"


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "step"), counted(2000, "step")
    ('1 step', '2,000 steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def unbroken(text: str) -> str:
    r"""Prevent a line break inside numbers such as 3e-16, and between a number, its error and the percent sign.

    >>> unbroken("about 3e-16") == "about 3e-\u206016", unbroken("of 3 ± 1 %") == "of 3\xa0±\xa01\xa0%"
    (True, True)
    """
    text = re.sub(r"(\de-)(\d)", "\\1\u2060\\2", text)
    return re.sub(r"(?<=\d) (?=%|± )|(?<=\d ±) (?=\d)", "\u00a0", text)


def fixed(value: float, digits: int, plus: bool = False) -> str:
    """Write a number with so many digits after the point, perhaps with a plus.

    >>> fixed(2, 1), fixed(2, 1, plus=True), fixed(-0.25, 2)
    ('2.0', '+2.0', '−0.25')
    """
    return f"{value:{'+' if plus else ''}.{digits}f}".replace("-", "−")


def share(value: float | None) -> str:
    """Write a share of 1 as percent."""
    return "an undefined share" if value is None else f"{100 * value:.0f}\u00a0%"


def middle(ks: Sequence[int]) -> tuple[int, int]:
    """Index and value of the k nearest to 10, which sentences quote.

    >>> middle([1, 2, 5, 10, 20])
    (3, 10)
    """
    return min(enumerate(ks), key=lambda pair: abs(pair[1] - 10))


def listed(words: list[str]) -> str:
    """Join words as in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"
