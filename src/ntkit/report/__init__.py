"""One self-contained HTML file from results: a pure function of the files in their folder."""

from __future__ import annotations

from pathlib import Path

from ntkit.base.checks import refusal
from ntkit.base.files import read_arrays, read_json, write_text
from ntkit.base.versions import RESULTS_FORMAT
from ntkit.report.analysis_page import analysis_page
from ntkit.report.study_page import KIND, render_study
from ntkit.report.track_page import render_tracked

__all__ = ["render", "render_study", "render_tracked"]


def render(run: str | Path) -> Path:
    """Write ``RUN/report.html`` from ``RUN/results.json`` (and ``RUN/arrays/neighbors.safetensors`` if it exists).

    The file needs nothing else: scripts, styles and images are inside, and its Content-Security-Policy forbids any
    request. The same results give the same bytes.

    A folder of a study is rendered by `render_study`, one of `ntkit.track` by `render_tracked`.

    Parameters
    ----------
    run : folder that `ntkit.analyze`, `ntkit.track` or a study wrote.

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
    ntkit.Refused: no-such-run/results.json: got no such file; expected a JSON file. Check the folder's name.
    """
    run = Path(run)
    if not (run / "results.json").exists() and (run / "track.json").exists():
        return render_tracked(run)
    results = read_json(run / "results.json")
    if isinstance(results, dict) and results.get("kind") == KIND:
        return render_study(run)
    written = results.get("format") if isinstance(results, dict) else None
    earlier = written == RESULTS_FORMAT and "neighbors" not in results  # keys as they were before the first release
    if written != RESULTS_FORMAT or earlier:
        got = "keys of an earlier version" if earlier else f"format {written}"
        fix = "Use the version of ntkit that wrote it, or repeat the run: ntkit analyze --from RUN --out NEW."
        raise refusal(str(run / "results.json"), got=got, expected=f"format {RESULTS_FORMAT}", fix=fix)
    images = run / "arrays" / "neighbors.safetensors"
    path = run / "report.html"
    write_text(path, analysis_page(results, read_arrays(images) if images.exists() else {}))
    return path
