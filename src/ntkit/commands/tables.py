"""The results of commands as tables on a terminal. It imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_SHOWN = 20  # eigenvalues in the terminal, at most


def print_table(title: str, columns: Sequence[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table; ">" before the name of a column aligns it right. Brackets in a text are brackets, no markup."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False).print(table)


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _told(name: str, value: float | None) -> str:
    """A certificate behind a status; nothing where there is none."""
    return "" if value is None else f", {name} {value:.0e}"


def print_accuracies(results: dict) -> None:
    """Print the table of an infinite network, and how far the module is from it."""
    s = results["settings"]
    scores, keys = results.get("r2", results.get("accuracies")), ("mean", "error", "test")
    of, unit = ("R²", "") if "r2" in results else ("accuracy", ", %")
    rows = [
        (r["name"], *(f"{r[key]:.3f}" if of == "R²" and r[key] is not None else _percent(r[key], 1) for key in keys))
        for r in scores
    ]
    title = f"{s['model']} at infinite width on {s['data']}, {s['train']:,} examples"
    print_table(title, (f"{of} of", f">{s['folds']} folds{unit}", ">± s.e.", f">test set{unit}"), rows)
    if results["distance"] is not None:
        print(f"The module's own tangent kernel, at its weights, is {results['distance']:.1%} from the limit.")
    if results["error"]:
        sampled = results["settings"].get("sample") and results["layers"][0].startswith("sampled")
        how = "The kernels are means over random networks" if sampled else "An activation was computed by quadrature"
        print(f"{how}, with a relative error of {results['error']:.0e}.")


def print_summary(folder: Path) -> None:
    """Print test errors with their standard errors and certificates, the checks, and the report's path."""
    from ntkit.base.files import read_json
    from ntkit.base.run_files import understood

    results = read_json(folder / "results.json")
    with understood(folder / "results.json"):
        _print_results(folder, results)


def _print_results(folder: Path, results: dict[str, Any]) -> None:
    (_print_regression if "targets" in results["data"] else _print_errors)(results)
    alignments = {q["kernel"]: q["alignment_centered"] for q in results["quality"]}
    first, last = (f"{a:.3f}" if (a := alignments.get(key)) is not None else "-" for key in ("init", "after"))
    print(f"alignment with the targets (centered): {first} at initialization, {last} after training")
    failed = [c["what"] for c in results["certificates"] if not c["ok"]]
    passed = len(results["certificates"]) - len(failed)
    print(f"checks: {passed} passed" + (f", {len(failed)} FAILED: {'; '.join(failed)}" if failed else ""))
    print(f"report: {folder / 'report.html'}")


def _print_regression(results: dict[str, Any]) -> None:
    from ntkit.report import regression_text as text

    parts = text.Parts(results)
    rows = [("the network", results["network"]["test"], "")]
    rows += [(f"ridge, {m['label']}", m["test"], str(m["ridge"] or "-")) for m in results["machines"]]
    cells = [(name, *(text.joined(*parts.pair(e, key)) for key in ("r2", "rmse")), ridge) for name, e, ridge in rows]
    columns = ("test errors of", ">R² (95 %)", f">root mean squared error in {parts.unit} (95 %)", ">ridge")
    for warning in text.cautions(results):
        print(warning.replace("\u00a0", " "))
    print_table(results["title"], columns, cells)


def _print_errors(results: dict[str, Any]) -> None:
    from ntkit.report import analysis_text as text

    errors = [("the network", results["network"]["test_error"], "")]
    for m in results["machines"]:
        error, machine = text.shown_error(results, m)
        if machine == "ridge":
            separable = "separable" if m["status"] != "not separable" else "not separable"
            errors.append((f"ridge, {m['label']}", error, f"{separable}; {error['certificate']}"))
            continue
        gap = "-" if m["gap"] is None else f"{m['gap']:.1e}"
        errors.append((f"SVM, {m['label']}", error, f"{m['status']}, gap {gap}"))
    # without a single error among the test examples the binomial standard error is 0 and no estimate
    rows = [(name, _percent(e["value"], 2), _percent(e["error"] or None, 2), how) for name, e, how in errors]
    for warning in text.cautions(results):
        print(warning.replace("\u00a0", " "))
    print_table(results["title"], ("test error of", ">%", ">± s.e.", "certificate"), rows)
    for lead, sentence in text.in_short(results)[: 2 + any("ridge," in row[0] for row in rows)]:
        print(f"{lead} {sentence}".replace("\u00a0", " "))


def print_solved(results: dict[str, Any]) -> None:
    """Print the leading eigenvalues with their residuals, and the errors of machines with their certificates."""
    if (found := results.get("spectrum")) is not None:
        shares = [value / found["trace"] for value in found["eigenvalues"]]
        sums = [sum(shares[: i + 1]) for i in range(len(shares))]
        pairs = zip(found["eigenvalues"], sums, found["residuals"], strict=True)
        rows = [(f"{i}", f"{v:.6g}", _percent(s, 2), f"{r:.0e}") for i, (v, s, r) in enumerate(pairs, 1)]
        shown = rows if len(rows) <= _SHOWN else [*rows[: _SHOWN - 1], rows[-1]]
        title = f"spectrum of {results['samples']:,} samples, {found['status']}"
        print_table(title, (">number", ">eigenvalue", ">of the trace so far, %", ">residual"), shown)
    rows, advice = [], []
    for name in ("ridge", "svm"):
        if (found := results.get(name)) is None:
            continue
        if name == "svm":
            label, certificate = "hard-margin SVM", f"{found['status']}{_told('gap', found['gap'])}"
        else:
            passes = f", {found['passes']} passes" if found["passes"] else ""
            label = f"ridge, {found['relative_ridge']:g} of mean diagonal"
            certificate = f"{found['status']}{_told('residual', found['residual'])}{passes}"
        test = found["test_error"] or {"value": None, "error": None}
        errors = (found["training_error"], test["value"], test["error"])
        rows.append((label, *(_percent(value, 2) for value in errors), certificate))
        advice += [f"{label}: {found['advice']}"] if found.get("advice") else []
    if rows:
        title = f"classifiers from {results['samples']:,} samples"
        columns = ("machine", ">training error, %", ">test error, %", ">± s.e.", "certificate")
        print_table(title, columns, rows)
        print(*advice, sep="\n", end="\n" if advice else "")


def print_explanation(folder: Path) -> None:
    """Print, for each test point, the examples by both methods and what happened without them."""
    from ntkit.base.files import read_json
    from ntkit.base.run_files import understood
    from ntkit.report import explain_text as text

    results = read_json(folder / "results.json")
    with understood(folder / "results.json"):
        print(text.trust(results))
        for point in results["points"]:
            print(f"\ntest {point['test_index']} ({point['why']}). {text.answer(point)}")
            columns = ("training examples that", "by accounting", ">share", "by influence", ">score")
            print_table("", columns, text.pairs_of_rows(point))
            removed = text.removals(point, results["random_sets"])
            print_table("", ("removed", ">predicted change", ">real change"), removed)
        print(f"{text.agreement(results)}\n{text.checks(results)}")
    print(f"report: {folder / 'explain.html'}")


def print_comparison(folder: Path) -> None:
    """Print the errors of each setting with intervals over seeds, what differs, and the report's path."""
    from ntkit.base.files import read_json
    from ntkit.base.run_files import understood
    from ntkit.report import compare_text as text

    r = read_json(folder / "results.json")
    with understood(folder / "results.json"):
        for warning in text.warnings(r):
            print(warning)
        names = text.measures(r)
        rows = [
            (group["label"], str(group["seeds"]), *(text.with_interval(r, group["errors"][key]) for key in names))
            for group in r["groups"]
        ]
        title = f"{r['title']}: {text.unit(r).removesuffix(', %')}, mean over seeds (95 %)"
        print_table(title, ("setting", ">seeds", *(f">{name}" for name in names.values())), rows)
        for lead, sentence in text.in_short(r):
            print(f"{lead} {sentence}".rstrip().replace("\u00a0", " "))
    print(f"report: {folder / 'report.html'}")


def print_claims(folder: Path) -> None:
    """Print a study's table: claim, number, whether it holds."""
    from ntkit.base.files import read_json

    results = read_json(folder / "results.json")
    paper = results["paper"]
    if certificate := results.get("certificate"):
        print(certificate["text"])
    verdicts = {True: "holds", False: "does NOT", None: "-"}
    rows = [(claim["claim"], claim["number"], verdicts[claim["holds"]]) for claim in results["claims"]]
    print_table(f"{paper['authors']} {paper['year']}: {paper['title']}", ("claim", "measured", "holds"), rows)
    print(f"report: {folder / 'report.html'}")
