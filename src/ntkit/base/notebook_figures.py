"""Figures for notebooks: plotly's, with the names of axes and curves that a reader needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ntkit.base.imports import same_random_numbers

_SIZE = {"width": 640, "height": 420}


def curves(
    title: str,
    x_title: str,
    y_title: str,
    series: Mapping[str, tuple[Sequence[Any], Sequence[Any]]],
    log_x: bool = False,
    log_y: bool = False,
) -> Any:
    """Curves by name, each (x, y), as a plotly figure."""
    figure = _figure()
    for name, (x, y) in series.items():
        figure.add_scatter(x=list(x), y=list(y), name=name, mode="lines+markers")
    figure.update_xaxes(title=x_title, type="log" if log_x else "linear")
    figure.update_yaxes(title=y_title, type="log" if log_y else "linear", exponentformat="power")
    return _titled(figure, title, len(series) > 1)


def bars(title: str, x_title: str, y_title: str, names: Sequence[str], values: Sequence[float]) -> Any:
    """Horizontal bars, the first one on top."""
    figure = _figure()
    colors = ["#2a7f62" if value >= 0 else "#b5462f" for value in values]
    figure.add_bar(x=list(values), y=list(names), orientation="h", marker_color=colors)
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title, autorange="reversed", type="category")
    return _titled(figure, title, False)


def matrix(title: str, values: Any, axis: str, bounds: Sequence[float] = ()) -> Any:
    """A matrix as an image, the first row on top, with lines before some rows and columns."""
    figure = _figure()
    figure.add_heatmap(z=values, colorscale="Viridis")
    figure.update_yaxes(autorange="reversed", scaleanchor="x", title=axis)
    figure.update_xaxes(title=axis, constrain="domain")
    for at in bounds:
        figure.add_hline(y=at - 0.5, line_width=1, line_color="white")
        figure.add_vline(x=at - 0.5, line_width=1, line_color="white")
    return _titled(figure, title, False)


def _figure() -> Any:
    with same_random_numbers():
        from plotly.graph_objects import Figure

    return Figure()


def _titled(figure: Any, title: str, legend: bool) -> Any:
    return figure.update_layout(title=title, template="simple_white", showlegend=legend, **_SIZE)
