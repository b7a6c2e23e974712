"""`ntkit analyze`: from data and a model to a run folder with results and a report.

A run is a folder. ``run.json`` (resolved settings, versions, hashes) is written first. Each finished stage leaves its
numbers in ``stages/`` and its arrays in ``arrays/``, so that a run killed at any moment can be resumed. Gram matrices
stay in ``work/`` until the run is complete. ``results.json`` holds no time and no date: the same run gives the same
bytes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkit.base.checks import Damaged, Refused, refusal
from ntkit.base.files import read_json, remove, unwritable, write_json
from ntkit.base.integrity import fingerprint
from ntkit.base.lock import FolderLock, check_unused
from ntkit.base.memory import parse_memory
from ntkit.base.progress import task
from ntkit.base.regular_files import check_folder
from ntkit.base.results_file import DRAWN
from ntkit.base.tensors import chosen_device
from ntkit.base.trust import code_of_run, code_of_user
from ntkit.base.versions import RESULTS_FORMAT
from ntkit.commands import network_measures as measures
from ntkit.commands import regression_measures as regression
from ntkit.commands.analysis_stages import Stage, Stages
from ntkit.commands.estimate import estimate
from ntkit.commands.results import assemble, earlier_run, identity_of_run, settings_of
from ntkit.commands.settings import Settings
from ntkit.commands.stage_files import REPLACED, StageFiles, put_aside, put_back, recover
from ntkit.data import Data
from ntkit.kernels.tangent import TangentKernel
from ntkit.networks.built_in import build
from ntkit.report import render
from ntkit.trajectory import Trajectory, load_weights, train


def analyze(
    settings: Settings | None = None,
    *,
    out: str | Path | None = None,
    from_run: str | Path | None = None,
    overwrite: bool = False,
    trust: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train or load a network, measure its kernel before, along and after training, explain three predictions, report.

    Parameters
    ----------
    settings : what to do (`ntkit.Settings`); the default is a CNN on the embedded digits.
    out : run folder; ``runs/MODEL-DATA`` if None.
    from_run : folder of an earlier run, whose settings are used. An unfinished run is resumed in place. A complete run
        is repeated in `out`; without `out` only its report is written again.
    overwrite : replace an existing run in `out`, once all settings have passed their checks.
    trust : with `from_run`, run code that the folder names. Else it must have run here, or be named in `settings`
        again.
    say : receives one line per stage.

    Returns
    -------
    Path
        The run folder, with ``run.json``, ``results.json``, ``arrays/``, ``trajectory/`` and ``report.html``.

    Raises
    ------
    Refused
        For anything that cannot give a right result; names it and what to do. When another process is writing into the
        folder. A damaged file of a resumed run is computed again, in one line to `say`.
    """
    earlier, code = None, contextlib.nullcontext()
    check_folder(out, "--out")
    if from_run is not None:
        recover(Path(from_run))
        earlier = earlier_run(Path(from_run), settings and dataclasses.replace(settings, model="cnn", data="digits"))
        given = {} if settings is None else settings.named_code(changed=True)
        settings = stored = settings_of(Path(from_run) / "run.json", earlier)
        code = code_of_run(Path(from_run), stored.named_code(), earlier.get("identity"), given, trust)
        complete = earlier["status"] == "complete" and (Path(from_run) / "results.json").exists()
        if out is None and complete:
            FolderLock(from_run).sweep()  # a process was killed between its last file and the end of its lock
            try:
                report = render(from_run)
            except Damaged as error:
                say(f"{error} Its stages are put together again.")
            else:
                say("The run is complete. Its report is written again.")
                return report.parent
        if out is None:
            with code:
                return _Run(Path(from_run), stored, say, earlier, resumed=True).run()
        if not complete:
            expected = "no --out: an unfinished run is resumed in its own folder"
            fix = "Leave out --out. Repeat the run elsewhere when it is complete."
            raise refusal(f"--from {from_run}", got="an unfinished run, and --out", expected=expected, fix=fix)
    settings = settings or Settings()
    folder = Path(out) if out is not None else Path("runs") / settings.slug()
    recover(folder)
    if (folder / "run.json").exists():
        if not overwrite:
            FolderLock(folder).check()
            resumed = f"--from {shlex.quote(str(folder))}"
            fix = f"Resume the run ({resumed}), replace it (--overwrite) or name another folder (--out)."
            raise refusal(str(folder), got="a folder that holds a run", expected="a new folder", fix=fix)
        earlier_run(folder, None)  # the run.json of another program is refused
    else:
        check_unused(folder)
    with code if earlier is not None else code_of_user(settings.named_code()):
        return _Run(folder, settings, say, earlier).run()


class _Run:
    """One run in its folder, a new or a resumed one; ``earlier`` is the ``run.json`` of the run to repeat or resume."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        say: Callable[[str], None],
        earlier: dict[str, Any] | None,
        resumed: bool = False,
    ) -> None:
        self.folder, self.settings, self.say, self.earlier, self.resumed = folder, settings, say, earlier, resumed
        settings.check()
        self.memory = parse_memory(settings.memory) or 0
        self.device: torch.device = chosen_device(settings.device)
        self.data: Data
        self.task: measures.TrainingTask
        self.models: dict[str, nn.Module] = {}
        self.lock, self.files = FolderLock(folder), StageFiles(folder)

    # ------------------------------------------------------------------ the whole

    def run(self) -> Path:
        """Do what is not done yet; finished stages are kept, whatever stops the run."""
        started = time.monotonic()
        try:
            if self.resumed:
                self.lock.acquire()
            self._open()
            try:
                return self._work()
            finally:
                with contextlib.suppress(Refused):  # a full disk was reported already
                    run = read_json(self.folder / "run.json")
                    seconds = round(run.get("seconds", 0) + time.monotonic() - started, 1)
                    write_json(self.folder / "run.json", run | {"seconds": seconds})
        except KeyboardInterrupt:
            if (self.folder / "run.json").exists():
                place = shlex.quote(str(self.folder))
                self.say(f"Stopped. Finished stages are kept. Resume with: ntkit analyze --from {place}")
            raise
        finally:
            self.lock.release()

    def _work(self) -> Path:
        self._train()
        stages = Stages(
            self.folder, self.settings, self.task, self.models, self.trajectory, self.files, self.memory, self.say
        )
        planned = stages.planned()
        for number, (name, text, work) in enumerate(planned, 2):
            stages.numbers[name] = self._stage(name, f"[{number} of {len(planned) + 1}] {text}", work)
        results = assemble(
            self.settings, self.task, self.models["after"], self.trajectory, stages.numbers, self.device, self.memory
        )
        images = [f"arrays/{stage}.safetensors" for stage in DRAWN]
        results["files"] = {place: digest for place, digest in self.files.digests.items() if place in images}
        results["run"] = self.files.run
        write_json(self.folder / "results.json", results)
        report = render(self.folder).parent
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        ended = {"status": "complete", "stages": [name for name, *_ in planned]}
        write_json(self.folder / "run.json", read_json(self.folder / "run.json") | ended)
        return report

    def _stage(self, name: str, line: str, work: Callable[[], Stage]) -> Any:
        """Do a stage, or read the numbers that it left when it was finished."""
        try:
            if (told := self.files.stage(name)) is not None:
                return told["result"]
        except Damaged as error:
            self.say(f"{error} This stage is computed again.")
        self.say(line)
        before = set(self.files.digests)
        try:
            result, arrays = work()
        except Damaged:
            raise  # a file is bad, not the network: resumed, the run makes the file again
        except Refused as refused:
            # All input was checked before training, so this is a result of training: a dead or overflowing network, or
            # a layer that a measure cannot use. The other measures still hold; this one says why it is absent.
            if isinstance(refused.__cause__, OSError):
                raise
            result, arrays = {"absent": str(refused)}, {}
        write_json(*self.files.finished(name, result, arrays, before))
        return result

    # ------------------------------------------------------------------ opening and training

    def _open(self) -> None:
        s = self.settings
        self.data = s.load_data()
        if note := _unlearned(self.data):
            self.say(note)
        model = build(s.model, self.data.input_shape, self.data.outputs, s.seed, self.data.tokens)
        parts = ("x_train", "y_train", "x_test", "y_test")
        self.data = dataclasses.replace(self.data, **{p: getattr(self.data, p).to(self.device) for p in parts})
        model = model.to(self.device)
        self.models = {"init": model, "after": copy.deepcopy(model)}
        if s.weights is not None:
            self.say(load_weights(self.models["after"], s.weights))
        self.task = regression.task_of(model, self.data)
        measures.check_size(len(self.data.x_train))
        # The kernel checks model and data here, before any training.
        TangentKernel(model, outputs="trace").plan(self.data.x_train[:3])
        identity = identity_of_run(s, self.data.hash, model, self.models["after"], self.device)
        old = {} if self.earlier is None else self.earlier["identity"]
        changed = [f"{k} (was {old.get(k)}, is {v})" for k, v in identity.items() if old and old.get(k) != v]
        self.files.run = fingerprint([dataclasses.asdict(s), identity])
        if self.resumed and self.earlier is not None:
            if lacking := sorted(dataclasses.asdict(s).keys() - self.earlier["settings"].keys()):
                changed.append(f"version of ntkit (settings without {', '.join(lacking)})")  # whose stages differ
            if changed:
                got = "changed since the run began: " + "; ".join(changed)
                new = f"ntkit analyze {shlex.join(s.arguments())} --out NEW"
                fix = f"Restore them, or start a new run: {new}"
                expected = "the same data, model, versions and number of threads"
                raise refusal(f"--from {self.folder}", got=got, expected=expected, fix=fix)
            self.say(f"Resuming {self.folder}")
            return
        if changed:
            self.say("Differences from the repeated run: " + "; ".join(changed))
        self._begin(identity)

    def _begin(self, identity: dict[str, Any]) -> None:
        """Write ``run.json``; a run that was in the folder is deleted once the new one has begun."""
        self.lock.acquire()
        for inner in ("trajectory", "track", "explain"):
            FolderLock(self.folder / inner).check()
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run = {"format": RESULTS_FORMAT, "status": "running", "settings": dataclasses.asdict(self.settings)}
        try:
            put_aside(self.folder)
            write_json(self.folder / "run.json", run | {"identity": identity, "started": started})
        except BaseException as error:
            with contextlib.suppress(OSError):
                put_back(self.folder)
            if isinstance(error, OSError):
                raise unwritable(self.folder, error) from error
            raise
        remove(self.folder / REPLACED)

    def _train(self) -> None:
        s = self.settings
        self.trajectory: Trajectory | None = None
        n = len(self.data.x_train)
        batch = None if s.batch_size is None or s.batch_size >= n else s.batch_size
        steps = s.epochs * -(-n // (batch or n))
        if not self.resumed and (line := estimate(self.task, self.models["init"], s, steps, batch)) is not None:
            self.say(line)
        if s.weights is not None:
            return
        self.say(f"[1] training {s.model}: {steps:,} steps ({s.epochs} epochs)")
        try:
            self.trajectory = self._trained(steps, batch)
        except Damaged as error:
            self.say(f"{error} The network is trained again.")
            remove(self.folder / "trajectory")
            self.models["after"] = copy.deepcopy(self.models["init"])
            self.trajectory = self._trained(steps, batch)
        self.models["after"].eval()

    def _trained(self, steps: int, batch: int | None) -> Trajectory:
        s = self.settings
        with task("training", total=steps) as progress:
            return train(
                self.models["after"],
                (self.data.x_train, self.data.y_train),
                self.task.loss,
                s.make_optimizer,
                steps=steps,
                batch_size=batch,
                seed=s.seed,
                target_loss=s.target_loss,
                path=self.folder / "trajectory",
                resume=(self.folder / "trajectory" / "run.json").exists(),
                on_step=lambda step, loss: progress.advance(step + 1 - progress.done),
            )


def _unlearned(data: Data) -> str:
    """A note on classes that the test set has and the training set lacks; empty if there are none."""
    if not data.classes:
        return ""
    train, test = (y.cpu().bincount(minlength=len(data.classes)) for y in (data.y_train, data.y_test))
    alone = ((train == 0) & (test > 0)).nonzero().flatten().tolist()
    if not alone:
        return ""
    names = ", ".join(data.classes[i] for i in alone[:5]) + ", …" * (len(alone) > 5)
    return (
        f"{int(test[alone].sum()):,} of {len(data.y_test):,} test examples are of classes without a training example "
        f"({names}): nothing here can learn these, and they count as errors."
    )
