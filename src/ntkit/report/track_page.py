"""The report of a tracking: the numbers of `ntkit.track` along a run, as one page beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntkit.base.checks import refusal
from ntkit.base.files import write_page
from ntkit.base.run_files import read_steps, read_track_settings, understood
from ntkit.report import training_figures, words
from ntkit.report.images import viewer
from ntkit.report.page import page

_KS = (1, 2, 5, 10, 20, 50, 100)
_CLASSES = 10
_NUMBERS = (
    "loss", "learning_rate", "trace", "effective_rank", "condition", "alignment", "alignment_centered", "distance",
    "cka", "velocity", "sharpness",
    "sharpness_bound", "residual",
)  # fmt: skip


def render_tracked(folder: str | Path) -> Path:
    """Write ``FOLDER/track.html`` from what `ntkit.track` left there, also while tracking goes on.

    If ``FOLDER/images.safetensors`` exists, the page shows eigenfunctions as images: ``target`` [H, W], ``steps`` [T],
    ``eigenfunctions`` [T, q, H, W], and perhaps ``output`` [T, H, W] and ``bandwidth`` [T, q] (cycles per image).
    Numbers that were not measured are left out. The same files give the same bytes.

    Returns
    -------
    Path
        The file written, whole or not at all.

    Raises
    ------
    Refused
        When the folder holds no tracking, no snapshot yet, or images whose shapes do not agree.

    Examples
    --------
    >>> render_tracked("no-such-run")
    Traceback (most recent call last):
    ...
    ntkit.Refused: no-such-run/track.json: got no such file; expected a JSON file. Check the folder's name.
    """
    folder = Path(folder)
    settings = read_track_settings(folder)
    records = read_steps(folder, settings)
    if not records:
        fix = "Wait for the first snapshot, or call `ntkit.track` with this path again."
        raise refusal(str(folder), got="no step-*.json", expected="at least one snapshot", fix=fix)
    with understood(folder / "step-*.json"):
        text = _page(folder, settings, records)
    write_page(folder / "track.html", text)
    return folder / "track.html"


def _page(folder: Path, settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    a = along(settings, records)
    sections = training_figures.of_tracking(a)
    return page(
        "tracked.html",
        [figure for pairs in sections.values() for figure, _ in pairs],
        title="Spectrum alignment along training",
        source="track.json",
        lede=_lede(a),
        cards=_cards(a),
        settings={name: value for name, value in settings.items() if name not in ("steps", "images")},
        a=a,
        sections=sections,
        residual=max((r for r in a["residual"] if r is not None), default=None) if "residual" in a else None,
        viewer=viewer(folder, eigenvalues_at(records), settings),
    )


def eigenvalues_at(records: Sequence[dict[str, Any]]) -> dict[int, list[float | None] | None]:
    """Step -> its eigenvalues."""
    return {record["step"]: record.get("eigenvalues") for record in records}


def along(settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Turn the records, one per snapshot, into series along training; a series without any number is left out.

    Examples
    --------
    >>> a = along({"points": 9}, [{"step": 0, "loss": 2.0, "cka": None}, {"step": 4, "loss": None, "cka": None}])
    >>> a["steps"], a["loss"], "cka" in a
    ([0, 4], [2.0, None], False)
    """
    a: dict[str, Any] = {name: [r.get(name) for r in records] for name in _NUMBERS}
    a["eigenvalues"] = _rows(records, "eigenvalues")
    a["layers"] = _by_name(records, "layer_alignment")
    a["first_order"] = _by_name(records, "first_order")
    own = [r.get("per_output") or [] for r in records]  # of outputs="diagonal": each output's own kernel
    classes = [r.get("class_alignment") or [o.get("alignment_centered") for o in own[i]] for i, r in enumerate(records)]
    tops = [[(o.get("eigenvalues") or [None])[0] for o in row] for row in own]
    for name, rows in (("classes", classes), ("tops", tops)):
        width = max(map(len, rows))
        if width <= _CLASSES:
            series = {f"output {c}": [row[c] if row else None for row in rows] for c in range(width)}
            a[name] = {part: values for part, values in series.items() if _any(values)}
    a = {name: values for name, values in a.items() if _any(values)}
    if "alignment" in a or "alignment_centered" in a:
        a = dict.fromkeys(("alignment", "alignment_centered"), [None] * len(records)) | a
    energies = {name: _rows(records, f"energy_{name}") for name, _ in training_figures.ENERGIES}
    a["cumulative"] = energies = {name: rows for name, rows in energies.items() if _any(rows)}
    a["energy_ks"] = ks = [k for k in _KS if energies and all(k <= len(rows[0]) for rows in energies.values())]
    a |= {f"energy_{name}": [[row[k - 1] for k in ks] for row in rows] for name, rows in energies.items()}
    return a | {"steps": [r["step"] for r in records], "points": settings["points"]}


def _any(value: Any) -> bool:
    """Whether there is a number in nested lists and dicts."""
    if isinstance(value, (list, dict)):
        return any(map(_any, value.values() if isinstance(value, dict) else value))
    return value is not None


def _rows(records: Sequence[dict[str, Any]], name: str) -> list[list[float | None]]:
    """One list per snapshot, all of one length."""
    rows = [r.get(name) or [] for r in records]
    width = max(map(len, rows))
    return [[*row, *[None] * (width - len(row))] for row in rows]


def _by_name(records: Sequence[dict[str, Any]], name: str) -> dict[str, list[float | None]]:
    """{part: values along training} from one {part: value} per snapshot; parts without any number are left out."""
    parts = [r.get(name) or {} for r in records]
    series = {key: [part.get(key) for part in parts] for key in dict.fromkeys(key for part in parts for key in part)}
    return {key: values for key, values in series.items() if _any(values)}


def _lede(a: dict[str, Any]) -> str:
    steps, summary = a["steps"], training_figures.summary(a)
    when = f"at {len(steps)} steps, {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"at step {steps[0]:,}"
    return f"The tangent kernel of {a['points']:,} points, followed {when}{': ' if summary else ''}{summary}."


def _cards(a: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers to see first: (name, value, small print)."""

    def ends(values: Sequence[float | None], digits: int) -> str:
        return f"{words.plain(values[0], digits)} → {words.plain(values[-1], digits)}"

    cards = []
    if "eigenvalues" in a:
        top = ends([row[0] for row in a["eigenvalues"]], 3)
        cards.append(("Largest eigenvalue, first → last step", top, "of the Gram matrix"))
    if (found := training_figures.quoted(a, "target")) is not None:
        place, k = found
        energies = ends([row[place] for row in a["energy_target"]], 2)
        cards.append((f"Share of the targets in the top {k} eigenvectors", energies, "1: all of them"))
    if "alignment_centered" in a:
        cards.append(("Alignment with the targets", ends(a["alignment_centered"], 2), "centered; 1 is perfect"))
    if "sharpness" in a and "sharpness_bound" in a:
        sharp, bound = a["sharpness"][-1], a["sharpness_bound"][-1]
        value = words.plain(sharp / bound if sharp is not None and bound is not None else None, 2)
        cards.append(("Sharpness beside the bound of stability, last step", value, "1: the bound, with full batches"))
    return cards
