"""The Markdown tables of `benchmarks.attribution`, made from its raw results."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
SETTINGS = ("tanh", "momentum", "chaotic")
CORRELATIONS = ("one left out", "5 %", "50 %", "50 % fresh")
DELETIONS = ("AUC-DEL+", "AUC-DEL-")


def best_settings(rows: list[Row]) -> list[Row]:
    """The best setting of every method, the best method first: by the mean of the four correlations."""
    best: dict[tuple[str, str], Row] = {}
    for row in sorted((row for row in rows if "mean" in row), key=lambda row: -row["mean"]):
        best.setdefault((row["by"], row["method"]), row)
    return list(best.values())


def _name(row: Row) -> str:
    settings = f" ({row['settings']})" if row["settings"] else ""
    return f"{row['by']}: {row['method']}{settings}"


def _number(entry: Row, digits: int = 3) -> str:
    error = "" if entry["error"] is None else f" ± {entry['error']:.{digits}f}"
    return f"{entry['value']:.{digits}f}{error}"


def _table(rows: list[Row]) -> list[str]:
    fresh = next(row["50 % fresh"]["ceiling"] for row in rows)
    lines = [f"| method | one left out | 5 % | 50 % | 50 % fresh (ceiling {fresh:.3f}) | AUC-DEL+ | AUC-DEL- | CPU s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [_number(row[name]) for name in CORRELATIONS] + [_number(row[name], 2) for name in DELETIONS]
        lines.append(f"| {' | '.join([_name(row), *cells, format(row['seconds'], '.3g')])} |")
    return lines


def _sentences(rows: list[Row]) -> str:
    """What the table shows: for every column the best of the library and the best of the others."""
    found = []
    for name in (*CORRELATIONS, *DELETIONS):
        sign = -1 if name == "AUC-DEL+" else 1
        sides = []
        for ours in (True, False):
            some = [row for row in rows if (row["by"] == "ntkit") == ours and row["method"] != "random scores"]
            if some:
                row = max(some, key=lambda row: sign * row[name]["value"])
                sides.append(f"{_number(row[name], 2 if name in DELETIONS else 3)} {_name(row)}")
        found.append(f"- {name}: {'; '.join(sides)}")
    return "\n".join(found)


def _setting(name: str, part: Row) -> list[str]:
    rows = best_settings(part["rows"])
    of_machine = part["machine"]
    lines = [
        f"## {name}: {part['setting']}",
        "",
        f"Test accuracy {part['test_accuracy']:.3f}, metasmoothness {part['metasmoothness']:.3f}, training "
        f"{part['training_seconds']:.2f} CPU s. {of_machine['processor']}, {of_machine['cores']} cores, "
        f"{of_machine['threads']} thread, load {part['load'][1]}; torch {of_machine['torch']}, ntkit {part['ntkit']}; "
        + ", ".join(_library(key, record) for key, record in part["libraries"].items())
        + ".",
        "",
        *_table(rows),
        "",
        "The best of ntkit and the best of the others:",
        "",
        _sentences(rows),
    ]
    failed: dict[str, list[str]] = {}
    for row in part["rows"]:
        if row["status"] != "ok":
            failed.setdefault(f"{row['by']}: {row['method']}: {row['status']}", []).append(row["settings"])
    if failed:
        lines += ["", "Without scores:", ""]
        lines += [f"- {what} ({'; '.join(settings)})" for what, settings in failed.items()]
    return [*lines, ""]


def _library(name: str, record: Row) -> str:
    versions = record.get("versions", {})
    own = " ".join(value for key, value in versions.items() if key != "torch")
    return f"{name} {own or record['status']} (torch {versions.get('torch', '-')})"


def _cost(part: Row) -> list[str]:
    rows = part["rows"]
    lines = [
        "## Cost",
        "",
        f'Setting "tanh": training takes {part["training_seconds"]:.2f} CPU s for {part["steps"]} steps, a plain '
        f"gradient of a batch {1e3 * part['gradient_seconds']:.3f} ms. In brackets: gradients per step and test point. "
        f"Load {part['load'][1]}.",
        "",
        "| test points | influence, CPU s | path kernel, CPU s |",
        "|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[f'{w}_seconds']:.2f} ({row[f'{w}_gradients']:.2f})" for w in ("influence", "path_kernel")]
        lines.append(f"| {row['test_points']} | {' | '.join(cells)} |")
    more = [f"{part[f'{what}_gradients_per_more_point']:.2f}" for what in ("influence", "path_kernel")]
    lines += ["", f"Each further test point, from 10 to 100: {' and '.join(more)} gradients per step."]
    return [*lines, ""]


def _scale(part: Row) -> list[str]:
    return [
        "## Scale",
        "",
        f"CNN of {part['parameters']:,} parameters, {part['training_examples']:,} MNIST examples, {part['steps']:,} "
        f"steps of batch 32, {part['test_points']} test points: {part['influence_seconds']:.0f} s "
        f"({part['influence_cpu_seconds']:.0f} CPU s; training {part['training_seconds']:.0f} s), peak memory "
        f"{part['peak_GB']:.2f} GB, metasmoothness {part['metasmoothness']:.3f}, finite differences differ by "
        f"{part['finite_differences']:.1g}.",
        "",
    ]


def markdown(results: dict[str, Row]) -> str:
    """All tables."""
    lines = [
        "# Attribution",
        "",
        "Rank correlations of what a method predicts with what retrained networks do (mean over test points, standard "
        "error), best method first; how it is measured: `python -m benchmarks.attribution --help`. Of a method with "
        "several settings the best is shown, chosen with hindsight.",
        "",
    ]
    for name in SETTINGS:
        if name in results:
            lines += _setting(name, results[name])
    for name, write in (("cost", _cost), ("scale", _scale)):
        if name in results:
            lines += write(results[name])
    return "\n".join(lines)
