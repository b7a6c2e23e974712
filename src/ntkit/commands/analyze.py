"""`ntkit analyze`: from data and a model to a run folder with results and a report.

A run is a folder: ``run.json`` (resolved settings, versions, hashes) is written first; each stage leaves its numbers
in ``stages/`` and its arrays in ``arrays/`` when it is whole, so that a run killed at any moment goes on where it was;
Grams wait in ``work/`` until the run is complete. ``results.json`` holds no time and no date: the same run gives the
same bytes.
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

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.checks import Refused, refusal
from ntkit.base.factory import source_hash
from ntkit.base.files import ensure_folder, read_json, write_arrays, write_atomically, write_json
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.progress import task
from ntkit.base.tensors import tensor_hash
from ntkit.base.versions import RESULTS_FORMAT
from ntkit.commands import network_measures as measures
from ntkit.commands.results import KERNELS, assemble, versions
from ntkit.commands.settings import OPTIMIZERS, Settings
from ntkit.data import Data, load
from ntkit.kernels.tangent import TangentKernel
from ntkit.measures.spectra import alignment
from ntkit.networks.built_in import build
from ntkit.trajectory import Trajectory, load_weights, train


def analyze(
    settings: Settings | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train or load a network, measure its kernel before, along and after training, and write a report.

    Parameters
    ----------
    settings : what to do (`ntkit.commands.settings.Settings`); the default is a CNN on the embedded digits.
    out : run folder; ``runs/MODEL-DATA`` if None.
    resume : folder of an earlier run, whose settings are used. One that did not end goes on in place. A complete one is
        repeated into `out`, or, without `out`, only its report is made anew.
    overwrite : replace an existing run in `out`, once everything asked for is known to be possible.
    say : receives one line per stage.

    Returns
    -------
    Path
        The run folder, with ``run.json``, ``results.json``, ``arrays/``, ``trajectory/`` and ``report.html``.

    Raises
    ------
    Refused
        For anything that cannot give a right result; names it and what to do.
    """
    before = None
    if resume is not None:
        before = _before(Path(resume), settings)
        settings = Settings.of(before["settings"])
        complete = before["status"] == "complete" and (Path(resume) / "results.json").exists()
        if out is None:
            if complete:
                say("The run is complete; its report is made anew.")
                return _report(Path(resume))
            return _Run(Path(resume), settings, say, before, goes_on=True).go()
        if not complete:
            raise refusal(
                f"--from {resume}",
                got="a run that did not end, and --out",
                expected="one of them: it goes on in its own folder",
                fix="Leave out --out, and repeat the run elsewhere when it is complete.",
            )
    settings = settings or Settings()
    folder = Path(out) if out is not None else Path("runs") / settings.slug()
    if (folder / "run.json").exists():
        if not overwrite:
            raise refusal(
                str(folder),
                got="a folder that holds a run",
                expected="a new folder",
                fix=f"Go on with it (--from {folder}), replace it (--overwrite) or name another (--out).",
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise refusal(
            str(folder),
            got="a file or folder with other things in it",
            expected="a new or empty folder",
            fix="Name another --out.",
        )
    return _Run(folder, settings, say, before).go()


def _before(folder: Path, settings: Settings | None) -> dict[str, Any]:
    """Read the ``run.json`` of an earlier run, or refuse what is none, and settings beside it."""
    before = read_json(folder / "run.json")
    known = {field.name for field in dataclasses.fields(Settings)}
    if before.get("format") != RESULTS_FORMAT or not set(before.get("settings", ())) <= known:
        raise refusal(
            str(folder / "run.json"),
            got="a file that no ntkit analyze of this version wrote",
            expected=f"the run.json of a run (format {RESULTS_FORMAT})",
            fix="Name the run's own folder; trajectory/ inside it is not one.",
        )
    if settings not in (None, Settings()):
        raise refusal(
            f"--from {folder}",
            got="other settings beside it",
            expected="none: they come from the run",
            fix="Leave them out, or start a new run without --from.",
        )
    return before


class _Run:
    """One run in its folder: a new one, or (``goes_on``) one not ended; ``before`` is an earlier ``run.json``."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        say: Callable[[str], None],
        before: dict[str, Any] | None,
        goes_on: bool = False,
    ) -> None:
        self.folder, self.settings, self.say, self.before, self.goes_on = folder, settings, say, before, goes_on
        settings.check()
        self.memory = parse_memory(settings.memory) or 0
        gpu = torch.cuda.is_available()
        if settings.device == "cuda" and not gpu:
            raise refusal("--device", got="cuda", expected="a device that is there", fix="Use --device cpu.")
        self.device = torch.device(("cuda" if gpu else "cpu") if settings.device == "auto" else settings.device)
        self.data: Data
        self.task: measures.Task
        self.models: dict[str, nn.Module] = {}

    # ------------------------------------------------------------------ the whole

    def go(self) -> Path:
        """Do what is not done yet; whatever stops it, what is done is kept."""
        try:
            return self._go()
        except KeyboardInterrupt:
            if (self.folder / "run.json").exists():
                place = shlex.quote(str(self.folder))
                self.say(f"Stopped; nothing done is lost. To go on with it: ntkit analyze --from {place}")
            raise

    def _go(self) -> Path:
        started = time.monotonic()
        self._open()
        try:
            return self._work()
        finally:
            with contextlib.suppress(Refused):  # a full disk was said already
                run = read_json(self.folder / "run.json")
                seconds = round(run.get("seconds", 0) + time.monotonic() - started, 1)
                write_json(self.folder / "run.json", run | {"seconds": seconds})

    def _work(self) -> Path:
        self._train()
        stages: list[tuple[str, Callable[[], tuple[dict, dict[str, np.ndarray]]]]] = [
            ("network", lambda: (measures.network(self.task, self.models["after"]), {})),
            *[(f"gram-{key}", lambda key=key: self._gram(key)) for key in KERNELS],
            ("similarity", self._similarity),
            *[(f"machine-{key}", lambda key=key: self._machine(key)) for key in KERNELS],
            ("along", self._along),
            ("invariances", self._invariances),
            ("neighbours", self._neighbours),
            ("oracle", self._oracle),
        ]
        done: dict[str, Any] = {}
        for number, (name, work) in enumerate(stages, 2):
            done[name] = self._stage(name, f"{number} of {len(stages) + 1}", work)
        results = assemble(
            self.settings, self.task, self.models["after"], self.trajectory, done, self.device, self.memory
        )
        write_json(self.folder / "results.json", results)
        report = _report(self.folder)
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        write_json(self.folder / "run.json", read_json(self.folder / "run.json") | {"status": "complete"})
        return report

    def _stage(self, name: str, place: str, work: Callable[[], tuple[dict, dict[str, np.ndarray]]]) -> Any:
        """Do a stage, or read what it left when it was whole."""
        file = self.folder / "stages" / f"{name}.json"
        if file.exists():
            return read_json(file)
        self.say(f"[{place}] {_SAY[name.partition('-')[0]]}{measures.LABELS.get(name.partition('-')[2], '')}")
        try:
            result, arrays = work()
        except Refused as refused:
            # The door was passed before training, so this is what training left: a dead or overflowing network, or a
            # layer that a measure cannot use. The other measures still hold; this one says why it is absent.
            if isinstance(refused.__cause__, OSError):
                raise
            result, arrays = {"absent": str(refused)}, {}
        if arrays:
            write_arrays(self.folder / "arrays" / f"{name}.safetensors", arrays)
        write_json(file, result)
        return result

    # ------------------------------------------------------------------ opening and training

    def _open(self) -> None:
        s = self.settings
        self.data = load(s.data, s.data_dir, s.classes, s.train, s.test, s.seed)
        outputs = 1 if len(self.data.classes) == 2 else len(self.data.classes)
        model = build(s.model, self.data.input_shape, outputs, s.seed)
        self.data = dataclasses.replace(
            self.data,
            **{part: getattr(self.data, part).to(self.device) for part in ("x_train", "y_train", "x_test", "y_test")},
        )
        model = model.to(self.device)
        self.models = {"init": model, "after": copy.deepcopy(model)}
        if s.weights is not None:
            load_weights(self.models["after"], s.weights)
        self.task = measures.Task(model, self.data)
        self._check_size()
        # Refusals and the self-check come before any work.
        TangentKernel(model, outputs="trace").plan(self.data.x_train[:3])
        identity = {
            "data": self.data.hash,
            "initial parameters": tensor_hash(model.state_dict()),
            "weights": s.weights and tensor_hash(self.models["after"].state_dict()),
            "model file": source_hash(s.model),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            **versions(),
        }
        old = {} if self.before is None else self.before["identity"]
        changed = [f"{k} (was {old.get(k)}, is {v})" for k, v in identity.items() if old and old.get(k) != v]
        if self.goes_on:
            if changed:
                raise refusal(
                    f"--from {self.folder}",
                    got="changed since the run began: " + "; ".join(changed),
                    expected="the same data, model, versions and number of threads",
                    fix="Restore them, or start a new run.",
                )
            self.say(f"Going on with {self.folder}")
            return
        if changed:
            self.say("Not the same as the run repeated: " + "; ".join(changed))
        replaced = self.folder.with_name(self.folder.name + ".replaced")
        if (self.folder / "run.json").exists():  # the old run goes when the new one stands
            shutil.rmtree(replaced, ignore_errors=True)
            self.folder.replace(replaced)
        ensure_folder(self.folder)
        run = {
            "format": RESULTS_FORMAT,
            "status": "running",
            "settings": dataclasses.asdict(s),
            "identity": identity,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(self.folder / "run.json", run)
        shutil.rmtree(replaced, ignore_errors=True)

    def _check_size(self) -> None:
        """Refuse what cannot fit: a Gram matrix in float32, and twice in float64 while a machine is solved."""
        n, free = len(self.data.x_train), free_memory(torch.device("cpu"))
        if 20 * n**2 > free:
            raise refusal(
                f"{n:,} training examples",
                got=f"kernel matrices of about {20 * n**2 / 1e9:.0f} GB while they are solved",
                expected=f"at most {free / 1e9:.0f} GB, what is free here",
                fix=f"Keep fewer, e.g. --train {int((free / 40) ** 0.5) // 100 * 100}.",
            )

    def _train(self) -> None:
        s = self.settings
        self.trajectory: Trajectory | None = None
        if s.weights is not None:
            return
        n = len(self.data.x_train)
        batch = None if s.batch_size is None or s.batch_size >= n else s.batch_size
        steps = s.epochs * -(-n // (batch or n))
        self.say(f"[1] training {s.model}: {steps:,} steps ({s.epochs} epochs)")
        with task("training", total=steps) as progress:
            self.trajectory = train(
                self.models["after"],
                (self.data.x_train, self.data.y_train),
                self.task.loss,
                OPTIMIZERS[s.optimizer](s),
                steps=steps,
                batch_size=batch,
                seed=s.seed,
                target=s.target,
                path=self.folder / "trajectory",
                resume=(self.folder / "trajectory" / "run.json").exists(),
                on_step=lambda step, loss: progress.advance(step + 1 - progress.done),
            )
        self.models["after"].eval()

    # ------------------------------------------------------------------ stages

    def _gram(self, key: str) -> tuple[dict, dict[str, np.ndarray]]:
        kernel = measures.kernels_of(self.models, self.memory)[key]()
        K = kernel(self.data.x_train)
        K_test = kernel(self.data.x_test, self.data.x_train)
        found = measures.quality(K.cpu(), self.task.targets(self.data.y_train.cpu()))
        self._keep(f"{key}-train", K)
        self._keep(f"{key}-test", K_test)
        return {"kernel": key, "label": measures.LABELS[key], **found}, {}

    def _similarity(self) -> tuple[dict, dict[str, np.ndarray]]:
        result: dict[str, float | None] = {}
        for a, b in (("init", "after"), ("after", "conjugate"), ("init", "conjugate")):
            if not all((self.folder / "work" / f"{key}-train.npy").exists() for key in (a, b)):
                result |= {f"{a}_{b}": None, f"{a}_{b}_centered": None}
                continue
            K1, K2 = self._kept(f"{a}-train"), self._kept(f"{b}-train")
            result[f"{a}_{b}"] = measures.finite(alignment(K1, K2))
            result[f"{a}_{b}_centered"] = measures.finite(alignment(K1, K2, centered=True))
        return result, {}

    def _machine(self, key: str) -> tuple[dict, dict[str, np.ndarray]]:
        data = dataclasses.replace(self.data, y_train=self.data.y_train.cpu(), y_test=self.data.y_test.cpu())
        result, arrays = measures.machine(self._kept(f"{key}-train"), self._kept(f"{key}-test"), data)
        return {"kernel": key, "label": measures.LABELS[key], **result}, arrays

    def _along(self) -> tuple[Any, dict[str, np.ndarray]]:
        if self.trajectory is None:
            return None, {}
        s = self.settings
        model = copy.deepcopy(self.models["init"])
        lr = s.lr if s.optimizer == "sgd" and s.momentum == 0 else None
        return measures.along(self.task, model, self.trajectory, s.track_points, self.memory, lr)

    def _invariances(self) -> tuple[Any, dict[str, np.ndarray]]:
        if self.data.kind != "images":
            return None, {}
        made = measures.kernels_of(self.models, self.memory)
        kernels = {key: make() for key, make in made.items() if (self.folder / "work" / f"{key}-train.npy").exists()}
        return measures.invariances(kernels, self.data.x_test, self.settings.probe_samples), {}

    def _neighbours(self) -> tuple[Any, dict[str, np.ndarray]]:
        shown, predicted = measures.shown_tests(self.task, self.models["after"])
        values = {}
        for key in ("init", "after"):
            kernel = TangentKernel(self.models[key], outputs="trace", memory=self.memory)
            own = kernel.diagonal(self.data.x_test[shown]).cpu()
            values[key] = (self._kept(f"{key}-test")[shown.cpu()], own, self._kept(f"{key}-train").diagonal())
        return measures.neighbours(self.data, shown, predicted, values)

    def _oracle(self) -> tuple[Any, dict[str, np.ndarray]]:
        x = self.data.x_test
        checks = [
            measures.against_oracle(self.models[k], x, when)
            for k, when in (("init", "at initialisation"), ("after", "after training"))
        ]
        kernel = TangentKernel(self.models["after"], outputs="trace")
        text = repr(self.models["after"])
        return {
            "checks": checks,
            "fallback": kernel.fallback(x[:3]),
            "text": text if len(text) < 4000 else text[:4000] + " ...",
        }, {}

    # ------------------------------------------------------------------ files and results

    def _keep(self, name: str, K: Tensor) -> None:
        def write(aside: Path) -> None:
            with open(aside, "wb") as handle:
                np.save(handle, K.cpu().numpy(), allow_pickle=False)

        write_atomically(self.folder / "work" / f"{name}.npy", write)

    def _kept(self, name: str) -> Tensor:
        if not (self.folder / "work" / f"{name}.npy").exists():
            raise refusal(name, got="no kernel matrix", expected="one", fix="See why its own stage is absent.")
        return torch.from_numpy(np.load(self.folder / "work" / f"{name}.npy", allow_pickle=False))


_SAY = {
    "network": "the network's own error",
    "gram": "Gram matrices: ",
    "similarity": "alignment between the kernels",
    "machine": "hard-margin SVM: ",
    "along": "kernel along training",
    "invariances": "invariances",
    "neighbours": "nearest training examples",
    "oracle": "check against per-sample autograd in float64",
}


def _report(folder: Path) -> Path:
    from ntkit.report import render

    return render(folder).parent
