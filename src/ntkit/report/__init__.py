"""One self-contained HTML file from results: a pure function of the files in their folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ntkit.base.checks import refusal
from ntkit.base.files import read_arrays_and_metadata, read_json, write_page
from ntkit.base.integrity import damaged, fingerprint
from ntkit.base.results_file import DRAWN, AnalysisResults, RegressionResults
from ntkit.base.run_files import AnalysisRun, check_is_folder, described, understood
from ntkit.base.versions import RESULTS_FORMAT, check_format
from ntkit.report.analysis_page import analysis_page
from ntkit.report.compare_page import KIND as COMPARISON
from ntkit.report.compare_page import render_comparison
from ntkit.report.explain_page import KIND as EXPLANATION
from ntkit.report.explain_page import render_explanation
from ntkit.report.regression_page import regression_page
from ntkit.report.study_page import KIND, render_study
from ntkit.report.track_page import render_tracked

__all__ = ["render", "render_comparison", "render_explanation", "render_study", "render_tracked"]


def render(run: str | Path) -> Path:
    """Write ``RUN/report.html`` from ``RUN/results.json`` (and the images in ``RUN/arrays``, where there are any).

    The file needs nothing else: scripts, styles and images are inside, and its Content-Security-Policy forbids any
    request. The same results give the same bytes.

    A folder of a study is rendered by `render_study`, one of `ntkit.track` by `render_tracked`, one of `ntkit explain`
    by `render_explanation`, one of `ntkit compare` by `render_comparison`.

    Parameters
    ----------
    run : folder that `ntkit.analyze`, `ntkit.track`, `ntkit explain`, `ntkit compare` or a study wrote.

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
    check_is_folder(run)
    if not (run / "results.json").exists() and (run / "run.json").exists():
        raise _without_results(run)
    results = read_json(run / "results.json")
    if isinstance(results, dict) and results.get("kind") == KIND:
        return render_study(run)
    if isinstance(results, dict) and results.get("kind") == EXPLANATION:
        return render_explanation(run)
    if isinstance(results, dict) and results.get("kind") == COMPARISON:
        return render_comparison(run)
    again = f"ntkit analyze --from {shlex.quote(str(run))} --out NEW"
    fix = f"Use the version of ntkit that wrote it, or repeat the run: {again}"
    written = results.get("format") if isinstance(results, dict) else None
    check_format(run / "results.json", written, RESULTS_FORMAT, fix)
    if "neighbors" not in results:  # keys as they were before the first release
        expected = f"format {RESULTS_FORMAT}"
        raise refusal(str(run / "results.json"), got="keys of an earlier version", expected=expected, fix=fix)
    is_regression = isinstance(results.get("data"), dict) and "targets" in results["data"]
    described(run / "results.json", results, RegressionResults if is_regression else AnalysisResults)
    arrays = _images(run, results)
    path = run / "report.html"
    with understood(run / "results.json"):
        text = (regression_page if is_regression else analysis_page)(results, arrays)
    write_page(path, text)
    return path


def _without_results(run: Path) -> Exception:
    told, place = read_json(run / "run.json"), shlex.quote(str(run))
    told = told if isinstance(told, dict) else {}
    got, fix = "a folder without results", "End it first, with the command that began it."
    if told.get("format") == "ntkit-trajectory":
        got, fix = "a recorded trajectory", f"Follow its kernel: ntkit track {place} --model net.py:make --data DATA."
    elif "identity" in told:
        got, fix = "a run that is not complete", f"Let it end, or go on with: ntkit analyze --from {place}"
    return refusal(str(run), got=got, expected="a folder with results.json", fix=fix)


def _images(run: Path, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Images of the results by stage, after a check that results, images and ``run.json`` are of one run."""
    if "run" in results and (start := run / "run.json").exists():
        told = described(start, read_json(start), AnalysisRun)
        if fingerprint([told["settings"], told["identity"]]) != results["run"]:
            raise damaged(run / "results.json", "the results of another run than run.json")
    return {stage: _arrays(run, f"arrays/{stage}.safetensors", results) for stage in DRAWN}


def _arrays(run: Path, name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a file, empty where the run kept none."""
    digest = results.get("files", {}).get(name)
    if not (run / name).exists():
        if digest is not None:
            raise damaged(run / name, "no such file")
        return {}
    arrays, metadata = read_arrays_and_metadata(run / name)
    if digest is not None and metadata.get("sha256") != digest:
        raise damaged(run / name, "not the file that results.json was written with")
    return arrays
