"""The command line: a thin layer over the library's functions. Only commands import torch."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

from cyclopts import App, Group, Parameter

from ntkit import __version__
from ntkit.base import progress
from ntkit.base.checks import Refused
from ntkit.commands import tables
from ntkit.commands.settings import (
    CompareSettings,
    ExplainSettings,
    GramSettings,
    InfiniteSettings,
    Settings,
    SolveSettings,
    TrackSettings,
)

app = App(
    name="ntkit",
    help="See a PyTorch network through its tangent kernel: before, along and after training.",
    version=__version__,
    default_parameter=Parameter(consume_multiple=True, negative=()),
)


app.register_install_completion_command()
app.meta.group_parameters = Group("Options of every command")
_form: dict[str, Any] = {"quiet": False, "json": False}


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
    config: Path | None = None,
) -> None:
    """See a PyTorch network through its tangent kernel: before, along and after training.

    Parameters
    ----------
    quiet
        No notes and no progress; warnings, refusals and the result are printed.
    json_
        The result as one JSON document on standard output, in place of tables.
    config
        A file of options, key = value: .toml, or the run.json of an earlier run. Options of the command line win.
    """
    from ntkit.commands.option_file import of_every_command, with_options_of

    words: Sequence[str] = tokens
    if config is not None:
        of_file = of_every_command(config)
        quiet, json_ = quiet or of_file["quiet"], json_ or of_file["json"]
        words = with_options_of(config, tokens)
    _form.update(quiet=quiet, json=json_, out=sys.stdout)
    progress.show(not quiet)
    if not json_:
        app(words)
        return
    with contextlib.redirect_stdout(sys.stderr):  # what the user's own code prints is no part of the document
        app(words)


@app.command
def analyze(
    *,
    settings: Annotated[Settings | None, Parameter(name="*")] = None,
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

    folder = run(settings, out=out, from_run=from_, overwrite=overwrite, trust=trust, say=_say)
    _answer(lambda: _results_of(folder), lambda: tables.print_summary(folder))


@app.command
def track(
    run: Path, /, *, settings: Annotated[TrackSettings | None, Parameter(name="*")] = None, trust: bool = False
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

    say = _say if _form["json"] else lambda line: print(line, flush=True)
    folder = track_run(run, settings, say=say, trust=trust)
    _answer(lambda: _tracking_of(folder), lambda: None)


@app.command
def explain(
    run: Path,
    /,
    *,
    settings: Annotated[ExplainSettings | None, Parameter(name="*")] = None,
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

    folder = explain_run(run, settings, overwrite=overwrite, trust=trust, say=_say)
    _answer(lambda: _results_of(folder), lambda: tables.print_explanation(folder))


@app.command
def compare(
    runs: Annotated[tuple[Path, ...], Parameter(negative=())],
    /,
    *,
    settings: Annotated[CompareSettings | None, Parameter(name="*")] = None,
    overwrite: bool = False,
    trust: bool = False,
) -> None:
    """Compare runs of ntkit analyze on one page: seeds, learning rates, architectures, on the same data.

    Errors with paired tests over the same test examples and intervals over seeds, kernels aligned with each other,
    spectra, curves of training; which differences are beyond noise. Runs that differ in the seed alone are one setting.

    Parameters
    ----------
    runs
        Two or more run folders of ntkit analyze.
    settings
        On how many points, and where.
    overwrite
        Replace a comparison of other runs.
    trust
        Run the code that the folders name (--model, --data) even if you have never run it here.
    """
    from ntkit.commands.compare import compare as run

    folder = run(runs, **vars(settings or CompareSettings()), overwrite=overwrite, trust=trust, say=_say)
    _answer(lambda: _results_of(folder), lambda: tables.print_comparison(folder))


@app.command
def study(name: str, /, *, scale: str = "quick", out: Path | None = None, data_dir: str | None = None) -> None:
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

    folder = run(cast(Any, name), scale=cast(Any, scale), out=out, say=_say, data_dir=data_dir)
    _answer(lambda: _results_of(folder), lambda: tables.print_claims(folder))


@app.command
def infinite(*, settings: Annotated[InfiniteSettings | None, Parameter(name="*")] = None) -> None:
    """Derive a network's infinite-width limit from its module, and print how well it classifies.

    Cross-validated accuracy of kernel ridge regression with the tangent kernel (NTK) and the Gaussian process (NNGP) of
    the limit, beside a tuned RBF support vector machine and the network itself, trained.

    Parameters
    ----------
    settings
        Which network and data, and how.
    """
    from ntkit.commands.infinite_width import infinite as run

    results = run(settings, say=_say)
    _answer(lambda: results, lambda: tables.print_accuracies(results))


@app.command
def gram(
    model: str, data: str, *, settings: Annotated[GramSettings | None, Parameter(name="*")] = None, out: Path
) -> None:
    """Compute a network's tangent kernel on a data set into a folder, tile by tile; stopped, the same command goes on.

    Parameters
    ----------
    model
        linear, mlp, cnn, vgg, textcnn (text sets), package.module:factory or file.py:factory.
    data
        As --data of ntkit analyze: its training examples; or a .npy file of samples, which may be larger than memory.
    settings
        Which kernel, and who computes it.
    out
        The folder, new or begun by the same command.
    """
    from ntkit.commands.gram_on_disk import gram as run
    from ntkit.commands.gram_on_disk import summary

    store = run(model, data, settings, out=out, say=_say)
    numbers = {"folder": str(store.path), "shape": list(store.shape), "checksum": store.checksum}
    _answer(lambda: numbers, lambda: print("\n".join(summary(store))))


@app.command
def solve(
    store: Path, /, *, settings: Annotated[SolveSettings | None, Parameter(name="*")] = None, trust: bool = False
) -> None:
    """Compute a spectrum, or a classifier and its test error, from a kernel matrix of ntkit gram, and write it there.

    Parameters
    ----------
    store
        A folder of ntkit gram, or of GramStore.create.
    settings
        What to compute: at least one of --spectrum, --ridge and --svm.
    trust
        Run the code that the store names (--model, --data) even if you have never run it here.
    """
    from ntkit.commands.solve_store import SOLVED
    from ntkit.commands.solve_store import solve as run

    results = run(store, settings or SolveSettings(), trust=trust, say=_say)

    def show() -> None:
        tables.print_solved(results)
        print(f"numbers: {store / SOLVED}")

    _answer(lambda: results, show)


@app.command
def report(run: Path, /) -> None:
    """Write the report of a run again from its results.

    Parameters
    ----------
    run
        The folder of a run, a tracking, an explanation, a comparison or a study.
    """
    from ntkit.report import render

    page = render(run)
    _answer(lambda: {"report": str(page)}, lambda: print(page))


@app.command
def verify(run: Path, /) -> None:
    """List the files of a folder, and compare each with its checksum; exit 1 if one is damaged or missing.

    Parameters
    ----------
    run
        The folder of a run, a trajectory, a tracking, a decomposition, an explanation, a comparison or a study; or a
        kernel matrix of ntkit gram, of whose tiles only those are listed that are damaged or missing.
    """
    from ntkit.commands import verify as files

    records = files.verify(run)
    shown = files.without_whole_tiles(records)
    lines = [f"{r.status:<17} {r.file}" + (f": {r.reason}" if r.reason else "") for r in shown]
    document = {"files": [r._asdict() for r in shown], "summary": files.summary(records)}
    _answer(lambda: document, lambda: print("\n".join([*lines, files.summary(records)])))
    if any(record.status in ("damaged", "missing") for record in records):
        sys.exit(1)


def _run() -> None:
    """Run the command. An error that Ctrl-C caused (in a lock that was being released, for one) counts as Ctrl-C."""
    try:
        app.meta()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            cause = cause.__context__
        raise


def main() -> None:
    """Entry point: a refusal prints one line on stderr and exits with 2; Ctrl-C exits with 130."""
    warnings.showwarning = _warn
    # torch 2.14 warns of a function that it calls itself, in forward differentiation
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no UTF-8
        _run()
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
    logging.getLogger("ntkit").info(line)
    if not _form["quiet"]:
        print(line, file=sys.stderr, flush=True)


def _answer(document: Callable[[], Any], show: Callable[[], None]) -> None:
    """Print a command's result: as JSON, or in the form for readers."""
    if _form["json"]:
        print(json.dumps(document(), indent=1, allow_nan=False), file=_form["out"])
    else:
        show()


def _results_of(folder: Path) -> dict[str, Any]:
    """What a folder's results say, and where they are."""
    from ntkit.base.files import read_json

    return {"folder": str(folder), **read_json(folder / "results.json")}


def _tracking_of(folder: Path) -> dict[str, Any]:
    """The numbers of each snapshot."""
    from ntkit.base.run_files import read_steps, read_track_settings

    settings = read_track_settings(folder)
    return {"folder": str(folder), "settings": settings, "snapshots": read_steps(folder, settings)}


if __name__ == "__main__":
    main()
