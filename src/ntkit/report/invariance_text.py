"""Cosines of images and their transforms in words: what the kernel became more or less invariant to."""

from __future__ import annotations

import math
from typing import Any

from ntkit.report import judgments
from ntkit.report.words import listed, measure

DISRUPTIVE = ("quadrant swap", "patch shuffle")
"""Transformations that keep local statistics and break the layout: a low cosine means a global kernel."""


def invariance_finding(told: dict[str, Any], loaded: bool) -> tuple[str, str]:
    """Lead and sentence on the raw cosines; `loaded`: the weights were loaded, and fresh random ones stand beside."""
    return _lead(told, loaded), _raw_cosines(told, loaded)


def _lead(told: dict[str, Any], loaded: bool) -> str:
    verdicts = {judgments.more_invariant(change_of(row)) for row in told["rows"]}
    if verdicts <= {"unknown"}:
        return "The invariances are undefined."
    changed = len(_changed(told))
    if not changed:
        return "No invariance changed beyond noise." if not loaded else "No invariance differs beyond noise."
    if "different" in told and changed == len(_no_larger(told)):
        return "Cosines changed no more, beyond noise, than those of two different images."
    return (
        "The loaded weights ignore other things than fresh ones."
        if loaded
        else "Training changed what the kernel ignores."
    )


def invariances(results: dict[str, Any]) -> str:
    """Read the cosines, transformation by transformation: raw, beside those of two different images, and centered."""
    told, loaded = results["invariances"], results.get("training", {}) is None
    if "different" not in told:
        return _raw_cosines(told, loaded)
    centered = _verdicts_in_words([row["centered"] | {"name": row["name"]} for row in told["rows"]])
    return f"{_raw_cosines(told, loaded)} By centered cosines it is {centered}."


def _raw_cosines(told: dict[str, Any], loaded: bool = False) -> str:
    raw = _verdicts_in_words(told["rows"])
    kernel = (
        "the kernel of the loaded weights, beside that of fresh random ones," if loaded else "the kernel after training"
    )
    if "different" not in told:
        return f"{kernel[0].upper()}{kernel[1:]} is {raw}."
    text = f"By raw cosines {kernel} is {raw}."
    if change_of(told["different"])["value"] is None:
        return f"{text} The cosine of two different images is undefined."
    baseline = " → ".join(measure(told["different"][kernel]) for kernel in ("init", "after"))
    text += f" Two different images have a cosine, too: {baseline}."
    if small := _no_larger(told):
        each = "that transformation" if len(small) == 1 else "these transformations"
        text += f" The change for {listed(small)} is not larger, beyond noise, than that one: it says little of {each}."
    elif _changed(told):
        text += " The changes beyond noise are larger than that one, or go the other way."
    return text


def _verdicts_in_words(rows: list[dict[str, Any]]) -> str:
    groups: dict[str, list[str]] = {}  # what is said -> transformations, those that keep the layout first
    for broken in (False, True):
        judgment = judgments.LAYOUT if broken else judgments.INVARIANCE
        own = [row for row in rows if (row["name"] in DISRUPTIVE) is broken]
        for verdict in judgment.sentences:
            names = [row["name"] for row in own if judgment.verdict(change_of(row)) == verdict]
            if names:
                groups.setdefault(judgment.sentences[verdict], []).extend(names)
    return "; ".join(f"{text} {listed(names)}" for text, names in groups.items()) or "not measured"


def change_of(row: dict[str, Any]) -> dict[str, Any]:
    """Change of a cosine from before to after training: over the same images or, in earlier runs, of the means."""
    if "change" in row:
        return row["change"]
    before, after = row["init"], row["after"]
    if None in (before["value"], after["value"], before["error"], after["error"]):
        return {"value": None, "error": None}
    return {"value": after["value"] - before["value"], "error": math.hypot(before["error"], after["error"])}


def _changed(told: dict[str, Any]) -> list[dict[str, Any]]:
    """Transformations whose raw cosine changed beyond noise."""
    return [row for row in told["rows"] if judgments.more_invariant(change_of(row)) in ("above", "below")]


def _no_larger(told: dict[str, Any]) -> list[str]:
    """Names of those whose raw cosine changed beyond noise, but not more than that of two different images.

    Only changes in the same direction are compared: one in the other direction is not the baseline's.
    """
    baseline = change_of(told["different"])
    names = []
    for row in _changed(told):
        change = change_of(row)
        if not baseline["value"] or baseline["value"] * change["value"] <= 0:
            continue
        sign = 1.0 if change["value"] > 0 else -1.0
        error = math.hypot(change["error"] or 0.0, baseline["error"] or 0.0)
        beyond = row.get("beyond") or {"value": change["value"] - baseline["value"], "error": error}
        if beyond["value"] is None or judgments.BEYOND.say(beyond | {"value": sign * beyond["value"]}) != "beyond":
            names.append(row["name"])
    return names
