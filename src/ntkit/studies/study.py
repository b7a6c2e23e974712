"""A study of a paper: parts that are computed once, claims that test themselves, sections of a report.

A new study is a folder in this package with a `Study` called ``STUDY``; its name is added to `STUDIES`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ntkit.base.checks import nearest, refusal
from ntkit.base.files import read_json, write_arrays, write_json, write_page
from ntkit.base.integrity import fingerprint
from ntkit.base.lock import FolderLock
from ntkit.base.progress import stop_note
from ntkit.base.versions import STUDY_FORMAT, check_format, earlier_versions, versions
from ntkit.studies.claim import Claim, as_markdown
from ntkit.studies.official_files import official_files
from ntkit.studies.part import Result, Sizes, StudyPart, Work
from ntkit.studies.part_processes import compute, one_thread, processes

STUDIES = ("jacot2018", "kopitkov2019", "long2021", "bell2023", "tsai2023")
SCALES = ("quick", "paper")
PAUSE = 60  # seconds at least between two reports on unfinished work
Item = dict[str, Any]


def study(
    name: Literal["jacot2018", "kopitkov2019", "long2021", "bell2023", "tsai2023"],
    *,
    scale: Literal["quick", "paper"] = "quick",
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    data_dir: str | Path | None = None,
) -> Path:
    """Reproduce a paper: run its experiments, test its claims, write a report.

    Parameters
    ----------
    name : "jacot2018", "kopitkov2019", "long2021", "bell2023" or "tsai2023".
    scale : "quick" (minutes on two cores) or "paper" (the paper's own sizes: hours to days).
    out : run folder, runs/NAME-SCALE by default. A study that was stopped is resumed there.
    say : called with a line before each experiment.
    data_dir : folder with the official files of MNIST (or with a folder ``mnist`` of them); the study then includes its
        experiments on MNIST. tsai2023 and, at the paper's scale, long2021 also take CIFAR-10, there or in
        ``cifar-10``; tsai2023 also text sets, there or in ``text``.

    Returns
    -------
    Path
        The folder: ``results.json`` (claims, curves), ``claims.md``, ``report.html``, ``parts/`` (finished
        experiments), ``runs/`` (trajectories and trackings).

    Raises
    ------
    Refused
        For an unknown name or scale, a `data_dir` without the files, or a folder with another study.
    """
    for what, value, options in (("study", name, STUDIES), ("scale", scale, SCALES)):
        if value not in options:
            raise refusal(what, got=repr(value), expected=" or ".join(options), fix=nearest(value, options))
    folder = Path(out) if out is not None else Path("runs") / f"{name}-{scale}"
    with stop_note(say):
        return import_module(f"ntkit.studies.{name}").STUDY.run(scale, folder, say, data_dir)


@dataclass(frozen=True)
class Results:
    """Results of finished parts: ``results[experiment][case]`` is a list over seeds; experiments that miss some."""

    work: Work
    by_experiment: dict[str, dict[Any, list[Result]]]
    missing: frozenset[str] = frozenset()

    def __getitem__(self, experiment: str) -> dict[Any, list[Result]]:
        return self.by_experiment.get(experiment, {})

    def complete(self, *experiments: str) -> bool:
        """Whether every part of these experiments is finished."""
        return not self.missing.intersection(experiments)

    def one(self, experiment: str, case: Any = None) -> Result:
        """The result of a part that has one seed."""
        return self[experiment][case][0]


def once_complete(listed: Callable[[Results], Iterable[Any]], *experiments: str) -> Callable[[Results], Iterable[Any]]:
    """The same claims or sections where every part of these experiments is finished, and none before."""
    return lambda results: listed(results) if results.complete(*experiments) else ()


@dataclass(frozen=True)
class Section:
    """A section of the report: items as `ntkit.report.study_sections` describes them, and the arrays they name."""

    title: str
    short: str
    text: str
    items: Sequence[Item]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The section's entry in ``results.json``."""
        return {"title": self.title, "short": self.short, "text": self.text, "items": list(self.items)}


def lines(
    title: str,
    reading: str,
    x: str,
    y: str,
    panels: Sequence[tuple[str, Sequence[Item]]],
    log: Literal["", "x", "xy"] = "",
    **more: Any,
) -> Item:
    """A figure of curves: axis titles, and panels, each a heading and `curve`s; `log` names the logarithmic axes."""
    axes = {name: {"title": title, "scale": "log" if name in log else "linear"} for name, title in (("x", x), ("y", y))}
    parts = [{"heading": heading, "series": list(series)} for heading, series in panels]
    return {"kind": "lines", "title": title, "reading": reading, **axes, "panels": parts, **more}


def curve(name: str, x: Iterable[float], y: Iterable[float], **more: Any) -> Item:
    """A curve of a figure; `more` may hold its standard ``error`` and its ``dash``."""
    return {"name": name, "x": list(x), "y": list(y), **more}


def table(title: str, columns: Sequence[str], rows: list[list[str]], note: str = "", folded: bool = False) -> Item:
    """A table of texts; a folded one is opened by a click on its title."""
    return {"kind": "table", "title": title, "columns": list(columns), "rows": rows, "note": note, "folded": folded}


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mlp(
    inputs: int, outputs: int, depth: int, width: int, seed: int, activation: type[nn.Module] = nn.LeakyReLU
) -> nn.Sequential:
    """`depth` weight matrices with activations between them, PyTorch's default initialization with this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(inputs if i == 0 else width, outputs if i == depth - 1 else width), activation()]
        return nn.Sequential(*layers[:-1])


def _is_another(start: Path, header: dict[str, Any]) -> bool:
    """Whether ``run.json`` is of another study, or of this one at another scale."""
    old = read_json(start)
    if isinstance(old, dict) and old.get("kind") == "study":
        check_format(start, old.get("format"), STUDY_FORMAT, "Name another folder with --out.")
    return not isinstance(old, dict) or old | header != old


@dataclass(frozen=True)
class Study:
    """A paper's experiments and claims.

    Attributes
    ----------
    name, title : name on the command line, title of the report.
    paper : authors, title, year, reference.
    scales : sizes of the experiments by name of the scale.
    parts : functions that list the parts, in the order in which they run. Parts of one function may run at the same
        time, on a scale of one thread; they may use what parts of earlier functions left, and not each other.
    claims, sections : functions that list claims and report sections from the results, in the report's order.
    about, departures : what was done, in a paragraph; what differs from the paper.
    certificate : text, cards and table at the top of the report; empty where there is none yet.
    more : further entries of ``results.json``: "curves" and "runs", as `ntkit.report.render_study` reads them.
    terms : terms that the report defines.
    seeds : seeds that the parts use.
    official : data sets that the study uses where it is given their files, by scale.
    official_only : scales at which, with such files, the digits of scikit-learn are left out.
    unfinished : whether claims and sections take what is finished: then the report is also written
        in between, once a minute at most, and when it is stopped.
    single_thread : scales whose networks are small: each part runs on one thread, several parts in several processes.
    """

    name: str
    title: str
    paper: dict[str, Any]
    scales: Mapping[str, Sizes]
    parts: Sequence[Callable[[Work], Iterable[StudyPart]]]
    claims: Sequence[Callable[[Results], Iterable[Claim]]]
    sections: Sequence[Callable[[Results], Iterable[Section]]] = ()
    about: Callable[[Results], str] = lambda results: ""
    departures: Callable[[Results], list[str]] = lambda results: []
    certificate: Callable[[Results], dict[str, Any]] | None = None
    more: Callable[[Results], dict[str, Any]] = lambda results: {}
    terms: Sequence[str] = ()
    seeds: Sequence[int] = ()
    official: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict.fromkeys(SCALES, ("mnist",)))
    official_only: Sequence[str] = ()
    unfinished: bool = False
    single_thread: Sequence[str] = ("quick",)

    def run(
        self,
        scale: str,
        folder: Path,
        progress: Callable[[str], None] = lambda line: None,
        data_dir: str | Path | None = None,
    ) -> Path:
        """Compute the parts that are not finished, test the claims, write results and report; return the folder."""
        files = {} if data_dir is None else official_files(self.official[scale], data_dir)
        sets = [*([] if files and scale in self.official_only else ["digits"]), *files]
        header = self.header(scale, sets)
        work = Work(self.scales[scale], self.seeds, sets, folder, files, progress, fingerprint(header))
        start = folder / "run.json"
        with FolderLock(folder):
            if start.exists() and _is_another(start, header):
                fix = "Name another folder with --out."
                raise refusal(str(folder), got="another run", expected="this study at this scale", fix=fix)
            told = header | {"versions": versions()}
            if start.exists() and (earlier := earlier_versions(read_json(start))):
                work = replace(work, earlier={"earlier_versions": earlier})
                progress(f"Finished parts are kept. Other versions worked here before: {earlier}")
            told |= work.earlier
            write_json(start, told | {"status": "running"})
            number = processes() if scale in self.single_thread else 1
            with one_thread() if scale in self.single_thread else nullcontext():
                self._compute(work, header, number)
                results = self.results(work)
            self._write(results, header)
            write_json(start, told | {"status": "complete", "parts": [part.name for part in self._parts(work)]})
        return folder

    def _compute(self, work: Work, header: dict[str, Any], number: int) -> None:
        """Compute the parts that are not finished; write the report in between, where it shows unfinished work."""
        changed, written = self.unfinished, -math.inf  # parts may have come from another machine

        def between(new: bool, pause: float = PAUSE) -> None:
            nonlocal changed, written
            changed = changed or (self.unfinished and new)
            if changed and time.monotonic() - written > pause:
                self._write(self.results(work, finished=True), header)
                changed, written = False, time.monotonic()

        try:
            for listed in self.parts:
                compute(work, list(listed(work)), number, between)
        except KeyboardInterrupt:
            between(new=False, pause=-1)
            raise

    def header(self, scale: str, sets: Sequence[str]) -> dict[str, Any]:
        """What the study is, at a scale and on some data sets: two folders with the same can share their parts."""
        header: dict[str, Any] = {"format": STUDY_FORMAT, "kind": "study", "name": self.name, "scale": scale}
        header |= {"sets": list(sets)} | ({"seeds": list(self.seeds)} if self.seeds else {})
        sizes = vars(self.scales[scale]).items()
        return header | {"sizes": {k: list(v) if isinstance(v, tuple) else v for k, v in sizes}}

    def results(self, work: Work, finished: bool = False) -> Results:
        """Results of all parts, computed or read; or of the finished ones alone."""
        by_experiment: dict[str, dict[Any, list[Result]]] = {}
        missing = set()
        for part in self._parts(work):
            if work.finished(part) or not finished:
                by_experiment.setdefault(part.experiment, {}).setdefault(part.case, []).append(work.result(part))
            else:
                missing.add(part.experiment)
        return Results(work, by_experiment, frozenset(missing))

    def _parts(self, work: Work) -> Iterator[StudyPart]:
        return (part for parts in self.parts for part in parts(work))

    def _write(self, results: Results, header: dict[str, Any]) -> None:
        """Write ``results.json``, ``figures.safetensors``, the report, and a page for each run that has one."""
        from ntkit.report import render_study, render_tracked

        folder, option = results.work.folder, " --data-dir FOLDER" if results.work.files else ""
        record = header | {
            "title": self.title,
            "paper": self.paper,
            "command": f"ntkit study {self.name} --scale {header['scale']}{option}",
            "about": self.about(results),
            "departures": self.departures(results),
            "claims": [claim.record() for claims in self.claims for claim in claims(results)],
            "settings": header["sizes"],
            "versions": versions(),
        }
        sections = [section for listed in self.sections for section in listed(results)]
        if sections:
            record["sections"] = [section.record() for section in sections]
        if arrays := {name: array for section in sections for name, array in section.arrays.items()}:
            record["figures"] = write_arrays(folder / "figures.safetensors", arrays)
        record |= results.work.earlier
        if self.certificate is not None and (certificate := self.certificate(results)):
            record["certificate"] = certificate
        if self.terms:
            record["terms"] = list(self.terms)
        record |= self.more(results)
        write_json(folder / "results.json", record)
        write_page(folder / "claims.md", as_markdown(f"{self.paper['title']}: claims", record["claims"]))
        for run in record.get("runs", []):
            render_tracked(folder / run["track"])
        render_study(folder)
