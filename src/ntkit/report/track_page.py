"""The report of a tracking: what `ntkit.track` found along a run, one page beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntkit.base.checks import refusal
from ntkit.base.files import read_json, write_text
from ntkit.report import words
from ntkit.report.images import viewer
from ntkit.report.page import page
from ntkit.report.track_figures import sections

FORMAT = "ntkit-track"
_KS = (1, 2, 5, 10, 20, 50, 100)
_CLASSES = 10
_NUMBERS = (
    "loss", "learning_rate", "trace", "effective_rank", "condition", "alignment", "alignment_centered", "distance",
    "cka", "velocity", "sharpness", "residual",
)  # fmt: skip


def render_tracked(folder: str | Path) -> Path:
    """Write ``FOLDER/track.html`` from what `ntkit.track` left there, also while it is still at work.

    Where ``FOLDER/images.safetensors`` is there, the page shows eigenfunctions as images: ``target`` [H, W], ``steps``
    [T], ``eigenfunctions`` [T, q, H, W], and perhaps ``output`` [T, H, W] and ``bandwidth`` [T, q] (cycles per image).
    What was not measured is left out. The same files give the same bytes.

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
    settings = read_json(folder / "track.json")
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        fix = "Name a folder of `ntkit.track`."
        raise refusal(str(folder / "track.json"), got=f"format {found}", expected=f"format {FORMAT}", fix=fix)
    records = read_snapshots(folder)
    if not records:
        fix = "Wait for the first snapshot, or call `ntkit.track` with this path again."
        raise refusal(str(folder), got="no step-*.json", expected="at least one snapshot", fix=fix)
    a = along(settings, records)
    shown = sections(a)
    figures = [figure for pairs in shown.values() for figure, _ in pairs]
    path = folder / "track.html"
    text = page(
        "tracked.html",
        figures,
        title="Spectrum alignment along training",
        source="track.json",
        lede=_lede(a),
        cards=_cards(a),
        settings=settings,
        a=a,
        shown=shown,
        residual=max((r for r in a["residual"] if r is not None), default=None) if "residual" in a else None,
        viewer=viewer(folder, eigenvalues_at(records)),
    )
    write_text(path, text)
    return path


def read_snapshots(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a tracking, by step."""
    return sorted((read_json(file) for file in folder.glob("step-*.json")), key=lambda record: record["step"])


def eigenvalues_at(records: Sequence[dict[str, Any]]) -> dict[int, list[float | None] | None]:
    """Step -> its eigenvalues."""
    return {record["step"]: record.get("eigenvalues") for record in records}


def along(settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the records in the form that the figures along training take; what has no number at all is left out.

    Examples
    --------
    >>> a = along({"points": 9}, [{"step": 0, "loss": 2.0, "cka": None}, {"step": 4, "loss": None, "cka": None}])
    >>> a["steps"], a["losses"], "cka" in a
    ([0, 4], [2.0, None], False)
    """
    a: dict[str, Any] = {"steps": [r["step"] for r in records], "points": settings["points"], "lr": None}
    for name in _NUMBERS:
        a |= _known(name, [r.get(name) for r in records])
    for old, new in (("loss", "losses"), ("distance", "distance_to_init")):
        if old in a:
            a[new] = a.pop(old)
    if "alignment" in a or "alignment_centered" in a:
        empty = [None] * len(records)
        a |= {name: a.get(name, empty) for name in ("alignment", "alignment_centered")}
    a |= _known("eigenvalues", _rows(records, "eigenvalues"))
    energies = {new: _rows(records, f"energy_{old}") for old, new in (
        ("target", "targets"), ("output", "outputs"), ("residual", "residual")
    )}  # fmt: skip
    a["cumulative"] = {name: rows for name, rows in energies.items() if _any(rows)}
    ks = [k for k in _KS if all(k <= len(rows[0]) for rows in a["cumulative"].values())]
    if a["cumulative"]:
        a["energy_ks"] = ks
        a |= {f"energy_{name}": [[row[k - 1] for k in ks] for row in rows] for name, rows in a["cumulative"].items()}
    a |= _known_parts("layers", _by_name(records, "layer_alignment"))
    own = [r.get("per_output") or [] for r in records]  # of outputs="diagonal": each output's own kernel
    classes = [r.get("class_alignment") or [o.get("alignment_centered") for o in own[i]] for i, r in enumerate(records)]
    tops = [[(o.get("eigenvalues") or [None])[0] for o in row] for row in own]
    for name, rows in (("classes", classes), ("tops", tops)):
        width = max(map(len, rows), default=0)
        if width <= _CLASSES:
            a |= _known_parts(name, {f"output {c}": [row[c] if row else None for row in rows] for c in range(width)})
    a |= _known_parts("first_order", _by_name(records, "first_order"))
    return a


def _any(value: Any) -> bool:
    return any(map(_any, value)) if isinstance(value, list) else value is not None


def _known(name: str, values: list) -> dict[str, list]:
    return {name: values} if _any(values) else {}


def _known_parts(name: str, parts: dict[str, list]) -> dict[str, dict[str, list]]:
    known = {key: values for key, values in parts.items() if _any(values)}
    return {name: known} if known else {}


def _rows(records: Sequence[dict[str, Any]], name: str) -> list[list[float | None]]:
    """One list per snapshot, all of one length."""
    rows = [r.get(name) or [] for r in records]
    width = max(map(len, rows))
    return [[*row, *[None] * (width - len(row))] for row in rows]


def _by_name(records: Sequence[dict[str, Any]], name: str) -> dict[str, list[float | None]]:
    """{part: values along training} from one {part: value} per snapshot."""
    found = [r.get(name) or {} for r in records]
    return {key: [part.get(key) for part in found] for key in dict.fromkeys(key for part in found for key in part)}


def _lede(a: dict[str, Any]) -> str:
    steps = a["steps"]
    when = f"at {len(steps)} steps, {steps[0]:,} to {steps[-1]:,}," if len(steps) > 1 else f"at step {steps[0]:,}"
    parts = []
    if "eigenvalues" in a:
        top = [row[0] for row in a["eigenvalues"]]
        parts.append(f"its largest eigenvalue {words.change(top[0], top[-1])}")
    if "energy_targets" in a:
        at, k = words.middle(a["energy_ks"])
        ends = [words.share(a["energy_targets"][row][at]) for row in (0, -1)]
        parts.append(f"the top {k} eigenvectors hold {ends[1]} of the targets at the end and {ends[0]} at the start")
    start = f"The tangent kernel of {a['points']:,} points, followed {when.rstrip(',')}"
    return f"{start}: {'; '.join(parts)}." if parts else f"{start}."


def _cards(a: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers to see first: (name, value, small print)."""
    cards = []
    if "eigenvalues" in a:
        ends = [words.plain(a["eigenvalues"][row][0]) for row in (0, -1)]
        cards.append(("Largest eigenvalue, first → last step", " → ".join(ends), "of the Gram matrix"))
    if "energy_targets" in a:
        at, k = words.middle(a["energy_ks"])
        ends = [words.plain(a["energy_targets"][row][at], 2) for row in (0, -1)]
        cards.append((f"Share of the targets in the top {k} eigenvectors", " → ".join(ends), "1: all of them"))
    if "alignment_centered" in a:
        ends = [words.plain(a["alignment_centered"][row], 2) for row in (0, -1)]
        cards.append(("Alignment with the targets", " → ".join(ends), "centred; 1 is perfect"))
    if "sharpness" in a and "learning_rate" in a:
        sharp, rate = a["sharpness"][-1], a["learning_rate"][-1]
        value = sharp * rate / 2 if sharp is not None and rate is not None else None
        cards.append(
            ("Sharpness / (2 / learning rate) at the last step", words.plain(value, 2), "1: the limit of stability")
        )
    return cards
