"""One self-contained HTML file from the results of a run: a pure function of the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.checks import refusal
from ntkit.files import read_arrays, read_json, write_text
from ntkit.report import figures, readings
from ntkit.settings import FORMAT

_THUMB = 112  # pixels, twice the size shown: enough for a dense screen


def render(run: str | Path) -> Path:
    """Write ``RUN/report.html`` from ``RUN/results.json`` (and ``RUN/arrays/neighbours.safetensors`` if there).

    The file needs nothing else: scripts, styles and images are inside, and its Content-Security-Policy forbids any
    request. The same results give the same bytes.

    Parameters
    ----------
    run : folder of a run, as `ntkit.analyze` leaves it.

    Returns
    -------
    Path
        The file written, whole or not at all.

    Raises
    ------
    Refused
        When the results are absent, are of another format, or the folder cannot be written.

    Examples
    --------
    >>> render("no-such-run")
    Traceback (most recent call last):
    ...
    ntkit.checks.Refused: no-such-run/results.json: got no such file; expected a JSON file. Check the folder's name.
    """
    run = Path(run)
    results = read_json(run / "results.json")
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        fix = "Render it with the version of ntkit that wrote it, or run `ntkit analyze --from` on the folder again."
        raise refusal(str(run / "results.json"), got=f"format {found}", expected=f"format {FORMAT}", fix=fix)
    images = run / "arrays" / "neighbours.safetensors"
    path = run / "report.html"
    write_text(path, _page(results, read_arrays(images) if images.exists() else {}))
    return path


def _page(results: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Build the HTML text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": readings.percent, "plain": readings.plain, "spread": _spread, "measure": _measure}
    along = figures.along(results) if results["along"] else []
    shown = {figure.id: figure for figure in along}
    shown["machines"] = figures.machines(results)
    if results["invariances"]:
        shown["invariance"] = figures.invariances(results)
    read = {
        "machines": readings.machines(results),
        "certificates": readings.certificates(results),
        "invariance": readings.invariances(results) if results["invariances"] else "",
        "neighbours": readings.neighbours(results) if results["neighbours"] else "",
    }
    if along:
        names = ("losses", "eigenvalues", "alignment", "distance", "energy", "size", "spectra")
        read |= {figure.id: getattr(readings, name)(results) for figure, name in zip(along, names, strict=True)}
    plots = {panel.id: {"data": panel.data, "layout": panel.layout} for f in shown.values() for panel in f.panels}
    return env.from_string(_part("template.html")).render(
        r=results,
        shown=shown,
        read=read,
        along=along,
        answer=readings.answer(results),
        findings=readings.in_short(results),
        warnings=readings.warnings(results),
        neighbours=_neighbours(results, arrays),
        style=Markup(_part("style.css")),
        plotlyjs=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        plots=Markup(_embed(plots)),
    )


def _part(name: str) -> str:
    return resources.files("ntkit.report").joinpath(name).read_text(encoding="utf-8")


def _embed(value: Any) -> str:
    r"""JSON that cannot end the script element it stands in.

    >>> _embed("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _neighbours(results: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of the neighbour table with their thumbnails as data URIs ("" where the run kept no images)."""
    rows = []
    for i, row in enumerate((results["neighbours"] or {}).get("rows", [])):
        groups = []
        for key, heading in (("init", "before training"), ("after", "after training")):
            found: list[dict[str, Any]] = [
                {**near, "image": _thumbnail(arrays, key, i, j), "same": near["label"] == row["label"]}
                for j, near in enumerate(row[key])
            ]
            groups.append({"key": key, "heading": heading, "found": found, "same": sum(n["same"] for n in found)})
        rows.append({**row, "image": _thumbnail(arrays, "test", i), "groups": groups})
    return rows


def _thumbnail(arrays: Mapping[str, np.ndarray], key: str, *place: int) -> str:
    if key not in arrays:
        return ""
    import base64
    import io

    from PIL import Image

    pixels = np.ascontiguousarray(arrays[key][place])
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_THUMB, _THUMB))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _spread(value: float | list[float] | None) -> str:
    """One value, or the range of the values of the one-vs-rest machines."""
    if isinstance(value, list):
        known = [v for v in value if v is not None]
        return f"{readings.plain(min(known))} to {readings.plain(max(known))}" if known else "–"
    return readings.plain(value)


def _measure(number: dict[str, Any]) -> str:
    """Write a number with its standard error, to the digits the error supports.

    >>> _measure({"value": 0.6123, "error": 0.0114})
    '0.612 ± 0.011'
    """
    value, error = number["value"], number["error"]
    if value is None:
        return "undefined"
    if not error:
        return readings.plain(value)
    import math

    digits = max(0, (1 if f"{error:.1e}"[0] == "1" else 0) - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}" if digits < 6 else f"{readings.plain(value)} ± {error:.1e}"
