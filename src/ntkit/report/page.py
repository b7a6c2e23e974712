"""One HTML file around a report's text and figures: the same head, drawing script and style for every report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from ntkit.report import words
from ntkit.report.draw import Figure

if TYPE_CHECKING:
    from jinja2 import Environment


def page(template: str, figures: Iterable[Figure], **context: Any) -> str:
    """Fill a template of this package, with scripts, styles and the figures' data inside.

    Parameters
    ----------
    template : name of a template that extends ``base.html``.
    figures : all the figures that it shows.
    context : what it says; at least ``title`` and ``source``, the file it is made from.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    plots = {panel.id: {"data": panel.data, "layout": panel.layout} for f in figures for panel in f.panels}
    form = _environment().get_template(template)
    return form.render(
        context,
        style=Markup(_part("style.css")),
        plotlyjs=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        plots=plots,
    )


@cache  # it keeps the templates that it has compiled, which takes longer than to fill them
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    env = Environment(
        loader=FunctionLoader(_part), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {name: getattr(words, name) for name in ("percent", "plain", "spread", "measure", "unbroken")}
    env.filters["embed"] = lambda value: Markup(embed(value))
    return env


def embed(value: Any) -> str:
    r"""JSON that cannot end the script element it stands in.

    >>> embed("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return resources.files("ntkit.report").joinpath(name).read_text(encoding="utf-8")
