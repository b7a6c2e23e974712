"""How results and kernels are shown: one line in a terminal, a short table in a notebook."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

_LONGEST = 60  # characters of a text


class Shown:
    """A dataclass of numbers, shown by the shapes and ranges of its fields instead of by all of their values.

    Examples
    --------
    >>> import torch
    >>> @dataclasses.dataclass(repr=False)
    ... class Sizes(Shown):
    ...     values: Tensor
    ...     name: str
    >>> Sizes(torch.tensor([1.0, 2.5]), "mine")
    Sizes(values=[2], 1 to 2.5, name=mine)
    """

    def _shown(self) -> dict[str, Any]:
        """What is shown, by name; None is left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        error = getattr(type(self), "error", None)
        return values | ({"error": self.error} if isinstance(error, property) else {})  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        told = {name: short(value) for name, value in self._shown().items() if value is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in told.items())})"

    def _repr_html_(self) -> str:
        return as_table(type(self).__name__, {n: short(v) for n, v in self._shown().items() if v is not None})


def short(value: Any) -> str:
    """A value in a few words: a tensor's shape and range, the number of entries of a list."""
    if isinstance(value, (Tensor, np.ndarray)):
        return _of_array(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        names = ", ".join(map(str, value))
        return f"{len(value)} of {names}" if 0 < len(names) <= _LONGEST else f"{len(value)} entries"
    if isinstance(value, (list, tuple)) and len(value) > 3:
        return f"{len(value)} entries"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    text = str(value)
    if isinstance(value, Path):
        return text
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _of_array(value: Any) -> str:
    shape = list(value.shape)
    if not value.size if isinstance(value, np.ndarray) else not value.numel():
        return f"{shape}"
    try:
        low, high = float(value.min()), float(value.max())
    except (RuntimeError, TypeError, ValueError):  # without an order, or without values
        return f"{shape} {value.dtype}"
    if not shape:
        return f"{low:.4g}"
    if math.isnan(low) or math.isnan(high):
        return f"{shape}, with nan"
    return f"{shape}, {low:.4g} to {high:.4g}"


def as_table(title: str, rows: Mapping[str, str]) -> str:
    """A table of names and values for a notebook."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>{html.escape(text)}</td>"
        "</tr>"
        for name, text in rows.items()
    )
    return f"<table><caption style='text-align:left'>{html.escape(title)}</caption>{cells}</table>"


def of_model(kind: type, model: nn.Module, params: Mapping[str, Tensor] | None = None, **more: Any) -> str:
    """One line on a kernel: its class, its network, the number of parameters, settings."""
    chosen = dict(model.named_parameters()) if params is None else params
    count = sum(p.numel() for p in chosen.values())
    told = "".join(f", {name}={short(value)}" for name, value in more.items() if value is not None)
    return f"{kind.__name__}({type(model).__name__}, {count:,} parameters{told})"
