"""The command line: a thin layer over the library's functions. torch is imported inside commands only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import App, Parameter

from ntkit import __version__
from ntkit.base.checks import Refused
from ntkit.commands.settings import Settings

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
) -> None:
    """Train or load a network, measure its kernel before, along and after training, and write a report.

    Parameters
    ----------
    settings
        What to analyse, and how.
    out
        Run folder (runs/MODEL-DATA by default).
    from_
        Folder of an earlier run: one that did not end goes on; a complete one is repeated into --out.
    overwrite
        Replace an existing run.
    """
    from ntkit.commands.analyze import analyze as run

    folder = run(settings, out=out, resume=from_, overwrite=overwrite, say=_say)
    _print_summary(folder)


@app.command
def track(
    run: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    points: int = 500,
    k: int = 20,
    outputs: str = "trace",
    memory: str | None = None,
    out: Path | None = None,
    follow: bool = False,
    tensorboard: Path | None = None,
) -> None:
    """Follow the kernel along a recorded run: spectrum, alignment, energies, learning-rate bound, first order.

    Parameters
    ----------
    run
        A run folder of ntkit analyze, or the folder of a recorded trajectory (then name --model and --data).
    model
        As in ntkit analyze.
    data
        As in ntkit analyze.
    data_dir
        Folder with the official files of mnist or cifar10.
    points
        Training examples to follow, spread evenly.
    k
        Eigenpairs.
    outputs
        trace (n x n), full (nC x nC) or diagonal (each output's own).
    memory
        Bytes for Gram matrices, such as "2 GB"; beyond, the kernel is only multiplied with vectors.
    out
        Folder for the numbers (RUN/track by default); a tracking that was stopped goes on there.
    follow
        Wait for further snapshots until the run ends.
    tensorboard
        Folder for TensorBoard events.
    """
    from ntkit.commands.track import track_run

    track_run(
        run, model=model, data=data, data_dir=data_dir, points=points, k=k, outputs=outputs, memory=memory, out=out,
        follow=follow, tensorboard=tensorboard, say=lambda line: print(line, flush=True),
    )  # fmt: skip


@app.command
def study(name: str, *, scale: str = "quick", out: Path | None = None, data_dir: Path | None = None) -> None:
    """Reproduce a paper: run its experiments, judge its claims, write a report.

    Parameters
    ----------
    name
        jacot2018 (the kernel's limit at infinite width), kopitkov2019 (spectrum alignment) or bell2023 (a trained
        network as an exact kernel machine).
    scale
        quick (minutes) or paper (its own sizes, for a GPU); a study that was stopped goes on.
    out
        Run folder (runs/NAME-SCALE by default).
    data_dir
        Folder with the official files of mnist: experiments on it are made, too.
    """
    from ntkit.studies import study as run

    folder = run(cast(Any, name), cast(Any, scale), out, say=_say, data_dir=data_dir)
    _print_claims(folder)


@app.command
def infinite(
    *,
    model: str = "mlp",
    data: str = "digits",
    data_dir: str | None = None,
    train: int | None = None,
    folds: int = 5,
    epochs: int = 20,
    w_std: float | None = None,
    b_std: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Read a network's infinite-width limit off its module, and print how well it classifies.

    Cross-validated accuracy of kernel ridge regression with the tangent kernel (NTK) and the Gaussian process (NNGP) of
    the limit, beside a tuned RBF support vector machine and the network itself, trained.

    Parameters
    ----------
    model
        linear, mlp, package.module:factory or file.py:factory; max-pools and BatchNorm have no limit.
    data
        As in ntkit analyze.
    data_dir
        Folder with the official files of mnist or cifar10.
    train
        Training examples to keep (all by default).
    folds
        Of the cross-validation.
    epochs
        Passes of the network's training.
    w_std
        With --b-std: the NTK parametrization w_std / sqrt(fan_in) W, instead of the module's own initialisation.
    b_std
        Of the biases.
    seed
        For weights, rows kept and folds.
    out
        Folder for run.json and results.json.
    """
    from ntkit.commands.infinite_width import infinite as run

    found = run(
        model, data=data, data_dir=data_dir, train=train, folds=folds, epochs=epochs, w_std=w_std, b_std=b_std,
        seed=seed, out=out, say=_say,
    )  # fmt: skip
    _print_accuracies(found)


@app.command
def report(run: Path) -> None:
    """Make the report of a run anew from its results.

    Parameters
    ----------
    run
        The folder of a run, a tracking or a study.
    """
    from ntkit.report import render

    print(render(run))


def main() -> None:
    """Entry point: refusals are one line on stderr and exit 2; Ctrl-C exits 130."""
    try:
        app()
    except Refused as refused:
        print(f"ntkit: {refused}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "SelfCheckError":  # by name: its module imports torch
            raise
        print(f"ntkit: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_accuracies(found: dict) -> None:
    """Print the table of an infinite network, and how far the module is from it."""
    from rich.console import Console
    from rich.table import Table

    s = found["settings"]
    table = Table(title=f"{s['model']} at infinite width on {s['data']}, {s['train']:,} examples", title_justify="left")
    for column in ("accuracy of", f"{s['folds']} folds, %", "± s.e.", "test set, %"):
        table.add_column(column, justify="left" if column == "accuracy of" else "right", overflow="fold")
    for row in found["accuracies"]:
        test = "-" if row["test"] is None else f"{100 * row['test']:.1f}"
        table.add_row(row["name"], f"{100 * row['mean']:.1f}", f"{100 * row['error']:.1f}", test)
    Console().print(table)
    if found["distance"] is not None:
        print(f"The module's own tangent kernel, at its weights, is {found['distance']:.1%} from the limit.")
    if found["error"]:
        print(f"An activation was computed by quadrature, with a relative error of {found['error']:.0e}.")


def _print_summary(folder: Path) -> None:
    """Print the short table: test errors with their standard errors and certificates, then the report's path."""
    from rich.console import Console
    from rich.table import Table

    from ntkit.base.files import read_json

    results = read_json(folder / "results.json")
    table = Table(title=results["title"], title_justify="left")
    for column in ("test error of", "%", "± s.e.", "certificate"):
        table.add_column(column, justify="right" if column in ("%", "± s.e.") else "left", overflow="fold")

    def row(label: str, number: dict, certificate: str) -> None:
        value = "-" if number["value"] is None else f"{100 * number['value']:.2f}"
        # no error among m examples has no useful binomial standard error
        table.add_row(label, value, f"{100 * number['error']:.2f}" if number["error"] else "-", certificate)

    row("the network", results["network"]["test_error"], "")
    for m in results["machines"]:
        gap = "-" if m["gap"] is None else f"{m['gap']:.1e}"
        row(f"SVM, {m['label']}", m["test_error"], f"{m['status']}, gap {gap}")
    console = Console()
    console.print(table)
    aligned = {q["kernel"]: q["alignment_centered"] for q in results["quality"]}
    first, last = (f"{a:.3f}" if (a := aligned.get(key)) is not None else "-" for key in ("init", "after"))
    console.print(f"alignment with the targets (centred): {first} at initialisation, {last} after")
    failed = [c["what"] for c in results["certificates"] if not c["ok"]]
    console.print(
        f"certificates: {len(results['certificates']) - len(failed)} hold"
        + (f"; NOT: {'; '.join(failed)}" if failed else "")
    )
    print(f"report: {folder / 'report.html'}")


def _print_claims(folder: Path) -> None:
    """Print a study's table: claim, number, whether it holds."""
    from rich.console import Console
    from rich.table import Table

    from ntkit.base.files import read_json

    results = read_json(folder / "results.json")
    paper = results["paper"]
    table = Table(title=f"{paper['authors']} {paper['year']}: {paper['title']}", title_justify="left")
    for column in ("claim", "measured", "holds"):
        table.add_column(column, overflow="fold")
    if certificate := results.get("certificate"):
        Console().print(certificate["text"])
    for claim in results["claims"]:
        table.add_row(claim["claim"], claim["number"], {True: "holds", False: "does NOT", None: "-"}[claim["holds"]])
    Console().print(table)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
