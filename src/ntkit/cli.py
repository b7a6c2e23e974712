"""The command line: a thin layer over the library's functions. Only commands import torch."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

from cyclopts import App, Parameter

from ntkit import __version__
from ntkit.base.checks import Refused
from ntkit.commands.settings import ExplainSettings, InfiniteSettings, Settings, TrackSettings

app = App(
    name="ntkit",
    help="See a PyTorch network through its tangent kernel: before, along and after training.",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative=()),
)


@app.command
def analyze(
    settings: Annotated[Settings | None, Parameter(name="*")] = None,
    *,
    out: Path | None = None,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    overwrite: bool = False,
    trust: bool = False,
) -> None:
    """Train or load a network, measure its kernel before, along and after training, and write a report.

    Parameters
    ----------
    settings
        What to analyze, and how.
    out
        Run folder (runs/MODEL-DATA by default).
    from_
        Folder of an earlier run. An unfinished run is resumed; a complete run is repeated in --out.
    overwrite
        Replace an existing run.
    trust
        With --from: run the code that the folder names (--model, --data) even if you have never run it here.
    """
    from ntkit.commands.analyze import analyze as run

    folder = run(settings, out=out, resume=from_, overwrite=overwrite, trust=trust, say=_say)
    _print_summary(folder)


@app.command
def track(
    run: Path, settings: Annotated[TrackSettings | None, Parameter(name="*")] = None, *, trust: bool = False
) -> None:
    """Follow the kernel along a recorded run: spectrum, alignment, energies, learning-rate bound, first order.

    Parameters
    ----------
    run
        A run folder of ntkit analyze, or the folder of a recorded trajectory (then give --model and --data).
    settings
        What to follow, and how.
    trust
        Run the code that the folder names (--model, --data) even if you have never run it here.
    """
    from ntkit.commands.track import track_run

    track_run(run, settings, say=lambda line: print(line, flush=True), trust=trust)


@app.command
def explain(
    run: Path,
    settings: Annotated[ExplainSettings | None, Parameter(name="*")] = None,
    *,
    overwrite: bool = False,
    trust: bool = False,
) -> None:
    """Explain predictions: which training examples made them, what would change without these, and what really does.

    Accounting (the path kernel) and influence (the exact derivative by each example's weight), side by side; then the
    network is trained again without the most helpful examples of each method, and without as many random ones.

    Parameters
    ----------
    run
        A run folder of ntkit analyze.
    settings
        Which predictions, and where.
    overwrite
        Replace an explanation of other test examples.
    trust
        Run the code that the folder names (--model, --data) even if you have never run it here.
    """
    from ntkit.commands.explain import explain_run

    _print_explanation(explain_run(run, settings, overwrite=overwrite, trust=trust, say=_say))


@app.command
def study(name: str, *, scale: str = "quick", out: Path | None = None, data_dir: Path | None = None) -> None:
    """Reproduce a paper: run its experiments, test its claims, write a report.

    Parameters
    ----------
    name
        jacot2018 (the kernel's limit at infinite width), kopitkov2019 (spectrum alignment), long2021 (the kernel after
        training), bell2023 (a trained network as an exact kernel machine) or tsai2023 (explanations by training
        examples, tested by deletion).
    scale
        quick (minutes) or paper (its own sizes: hours to days). A study that was stopped is resumed.
    out
        Run folder (runs/NAME-SCALE by default).
    data_dir
        Folder with the official files of MNIST, or with folders mnist, cifar-10 and text of such files, for the
        experiments that use them.
    """
    from ntkit.studies import study as run

    folder = run(cast(Any, name), cast(Any, scale), out, say=_say, data_dir=data_dir)
    _print_claims(folder)


@app.command
def infinite(settings: Annotated[InfiniteSettings | None, Parameter(name="*")] = None) -> None:
    """Derive a network's infinite-width limit from its module, and print how well it classifies.

    Cross-validated accuracy of kernel ridge regression with the tangent kernel (NTK) and the Gaussian process (NNGP) of
    the limit, beside a tuned RBF support vector machine and the network itself, trained.

    Parameters
    ----------
    settings
        Which network and data, and how.
    """
    from ntkit.commands.infinite_width import infinite as run

    _print_accuracies(run(settings, say=_say))


@app.command
def report(run: Path) -> None:
    """Write the report of a run again from its results.

    Parameters
    ----------
    run
        The folder of a run, a tracking, an explanation or a study.
    """
    from ntkit.report import render

    print(render(run))


@app.command
def verify(run: Path) -> None:
    """List the files of a folder, and compare each with its checksum; exit 1 if one is damaged or missing.

    Parameters
    ----------
    run
        The folder of a run, a trajectory, a tracking, a decomposition, an explanation or a study.
    """
    from ntkit.commands import verify as files

    records = files.verify(run)
    for record in records:
        print(f"{record.status:<17} {record.file}" + (f": {record.why}" if record.why else ""))
    print(files.summary(records))
    if any(record.status in ("damaged", "missing") for record in records):
        sys.exit(1)


def main() -> None:
    """Entry point: a refusal prints one line on stderr and exits with 2; Ctrl-C exits with 130."""
    warnings.showwarning = _warn
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no UTF-8
        app()
    except Refused as refused:
        print(f"ntkit: {refused}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        sys.stderr.close()
        sys.exit(141)
    except MemoryError:
        print("ntkit: got more data than fits in memory; expected less. Use fewer examples.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # what no check foresaw: a folder deleted meanwhile, a disk that fails
        place = f"{error.filename}: " if error.filename else ""
        text = "expected a file that can be used. Check the folder and its disk."
        print(f"ntkit: {place}got {error.strerror or error}; {text}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "SelfCheckError":  # by name: its module imports torch
            raise
        print(f"ntkit: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = " ".join(str(message).split())
    print(f"ntkit: warning: {text}", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_table(title: str, columns: str, rows: Iterable[Iterable[str]]) -> None:
    """Print a table; `columns` names them, separated by "|", and ">" before a name aligns its column right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns.split("|"):
        table.add_column(column.lstrip(">"), justify="right" if column[0] == ">" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _print_accuracies(results: dict) -> None:
    """Print the table of an infinite network, and how far the module is from it."""
    s = results["settings"]
    scores, keys = results.get("r2", results.get("accuracies")), ("mean", "error", "test")
    of, unit = ("R²", "") if "r2" in results else ("accuracy", ", %")
    rows = [
        (r["name"], *(f"{r[key]:.3f}" if of == "R²" and r[key] is not None else _percent(r[key], 1) for key in keys))
        for r in scores
    ]
    title = f"{s['model']} at infinite width on {s['data']}, {s['train']:,} examples"
    _print_table(title, f"{of} of|>{s['folds']} folds{unit}|>± s.e.|>test set{unit}", rows)
    if results["distance"] is not None:
        print(f"The module's own tangent kernel, at its weights, is {results['distance']:.1%} from the limit.")
    if results["error"]:
        print(f"An activation was computed by quadrature, with a relative error of {results['error']:.0e}.")


def _print_summary(folder: Path) -> None:
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
    columns = f"test errors of|>R² (95 %)|>root mean squared error in {parts.unit} (95 %)|>ridge"
    _print_table(results["title"], columns, cells)
    for warning in text.cautions(results):
        print(warning)


def _print_errors(results: dict[str, Any]) -> None:
    errors = [("the network", results["network"]["test_error"], "")]
    for m in results["machines"]:
        gap = "-" if m["gap"] is None else f"{m['gap']:.1e}"
        errors.append((f"SVM, {m['label']}", m["test_error"], f"{m['status']}, gap {gap}"))
    # without a single error among the test examples the binomial standard error is 0 and no estimate
    rows = [(name, _percent(e["value"], 2), _percent(e["error"] or None, 2), text) for name, e, text in errors]
    _print_table(results["title"], "test error of|>%|>± s.e.|certificate", rows)


def _print_explanation(folder: Path) -> None:
    """Print, for each test point, the examples by both methods and what happened without them."""
    from ntkit.base.files import read_json
    from ntkit.base.run_files import understood
    from ntkit.report import explain_text as text

    results = read_json(folder / "results.json")
    with understood(folder / "results.json"):
        print(text.trust(results))
        for point in results["points"]:
            print(f"\ntest {point['test_index']} ({point['why']}). {text.answer(point)}")
            columns = "training examples that|by accounting|>share|by influence|>score"
            _print_table("", columns, text.pairs_of_rows(point))
            removed = text.removals(point, results["random_sets"])
            _print_table("", "removed|>predicted change|>real change", removed)
        print(f"{text.agreement(results)}\n{text.checks(results)}")
    print(f"report: {folder / 'explain.html'}")


def _print_claims(folder: Path) -> None:
    """Print a study's table: claim, number, whether it holds."""
    from ntkit.base.files import read_json

    results = read_json(folder / "results.json")
    paper = results["paper"]
    if certificate := results.get("certificate"):
        print(certificate["text"])
    verdicts = {True: "holds", False: "does NOT", None: "-"}
    rows = [(claim["claim"], claim["number"], verdicts[claim["holds"]]) for claim in results["claims"]]
    _print_table(f"{paper['authors']} {paper['year']}: {paper['title']}", "claim|measured|holds", rows)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
