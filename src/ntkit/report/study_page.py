"""The report of a study: a paper's claims, the curves behind them, and what was run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from ntkit.base.checks import refusal
from ntkit.base.files import read_arrays_and_metadata, read_json, write_page
from ntkit.base.integrity import damaged
from ntkit.base.results_file import StudyResults
from ntkit.base.run_files import described, read_steps, read_track_settings, results_of_kind, understood
from ntkit.base.versions import STUDY_FORMAT
from ntkit.report.images import viewer
from ntkit.report.page import page
from ntkit.report.study_curves import curves
from ntkit.report.study_sections import sections
from ntkit.report.track_page import eigenvalues_at
from ntkit.report.words import unbroken

KIND = "study"
TERMS = ("tangent_kernel", "energy", "sharpness", "alignment", "first_order")  # defined when results name none
_MACROS = {
    *TERMS,
    "invariance",
    "path_kernel",
    "secant",
    "other_gradients",
    "novelty",
}  # of terms.html, for the terms of a study


def render_study(folder: str | Path) -> Path:
    """Write ``FOLDER/report.html`` from a study's ``results.json``, ``figures.safetensors`` and images of its runs.

    The page links to each run that has a page of its own (`render_tracked`). Entries that the results lack are left
    out. The same files give the same bytes.

    Returns
    -------
    Path
        The file written, whole or not at all.

    Raises
    ------
    Refused
        When the folder holds no study, or a run lies outside of it.

    Examples
    --------
    >>> render_study("no-such-study")
    Traceback (most recent call last):
    ...
    ntkit.Refused: no-such-study/results.json: got no such file; expected a JSON file. Check the folder's name.
    """
    folder = Path(folder)
    results = results_of_kind(
        folder, KIND, STUDY_FORMAT, "Name a folder that a study wrote, with this version of ntkit."
    )
    described(folder / "results.json", results, StudyResults)
    if (start := folder / "run.json").exists():
        told = read_json(start)
        names = ("name", "scale", "sets", "seeds", "sizes")
        if not isinstance(told, dict) or any(told.get(name) != results.get(name) for name in names):
            raise damaged(folder / "results.json", "the results of another study than run.json")
    path = folder / "report.html"
    with understood(folder / "results.json"):
        text = _page(folder, results)
    write_page(path, text)
    return path


def _page(folder: Path, results: dict[str, Any]) -> str:
    runs = [_run(folder, run) for run in results.get("runs", [])]
    groups = curves(results.get("curves", []))
    pictured = next((run for run in runs if _has_images(folder / run["track"])), None)
    images = None
    if pictured is not None:
        track = folder / pictured["track"]
        told = read_track_settings(track)
        images = viewer(track, eigenvalues_at(read_steps(track, told)), told)
    parts = sections(results.get("sections", []), _arrays(folder, results))
    figures = [figure for group in groups for figure, _ in group["figures"]]
    figures += [f for part in parts for block in part["blocks"] for f, _ in block.get("figures", [])]
    certificate, about = results.get("certificate"), results.get("about", "")
    claims = results.get("claims", [])
    own, further = ([c for c in claims if c.get("further", False) is group] for group in (False, True))
    return page(
        "study.html",
        figures,
        title=results["title"],
        source="results.json",
        lede=unbroken(certificate["text"]) if certificate else about,
        about=about if certificate else "",
        certificate=certificate,
        r=results,
        claims=own,
        verdict=_verdict(own),
        further=further,
        further_verdict=_verdict(further),
        groups=groups,
        parts=parts,
        terms=[name for name in results.get("terms", TERMS) if name in _MACROS],
        runs=runs,
        pictured=pictured,
        viewer=images,
        settings=[(name.replace("_", " "), _text(value)) for name, value in results.get("settings", {}).items()],
    )


def _has_images(track: Path) -> bool:
    """Whether a tracking has images, or had some that are gone."""
    return (track / "images.safetensors").exists() or (
        (track / "track.json").exists() and "images" in read_track_settings(track)
    )


def _arrays(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Arrays of the figures, after a check that they were written with these results."""
    path, digest = folder / "figures.safetensors", results.get("figures")
    if not path.exists():
        if digest is not None:
            raise damaged(path, "no such file")
        return {}
    arrays, metadata = read_arrays_and_metadata(path)
    if digest is not None and metadata.get("sha256") != digest:
        raise damaged(path, "not the file that results.json was written with")
    return arrays


def _run(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """A run with the link to its page, or None where there is no page."""
    track = PurePosixPath(run["track"])
    if track.is_absolute() or ".." in track.parts:
        fix = "Name the run's folder relative to the study's."
        raise refusal(f"run {run['name']}", got=run["track"], expected="a folder inside the study", fix=fix)
    link = quote(f"{track}/track.html") if (folder / track / "track.html").exists() else None
    return {**run, "track": str(track), "link": link}


def _verdict(claims: Sequence[dict[str, Any]]) -> str:
    """Count the claims that hold, do not, and are not judged.

    >>> _verdict([{"holds": True}, {"holds": None}])
    '1 of 2 claims holds here, 1 is not judged.'
    """
    holds, fails = (sum(c["holds"] is value for c in claims) for value in (True, False))
    rest = len(claims) - holds - fails
    parts = [f"{holds} of {len(claims)} claims hold{'s' if holds == 1 else ''} here"]
    parts += [f"{fails} {'does' if fails == 1 else 'do'} not"] if fails else []
    parts += [f"{rest} {'is' if rest == 1 else 'are'} not judged"] if rest else []
    return f"{', '.join(parts)}."


def _text(value: Any) -> str:
    """Write a setting.

    >>> _text([2, 4]), _text({"lr": 0.1}), _text(True)
    ('2, 4', '{"lr": 0.1}', 'true')
    """
    if isinstance(value, list) and not any(isinstance(v, (list, dict)) for v in value):
        return ", ".join(_text(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
