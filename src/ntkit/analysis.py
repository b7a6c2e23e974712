"""`ntkit analyze`: from data and a model to a run folder with results and a report.

A run is a folder: ``run.json`` (resolved settings, versions, hashes) is written first; each stage leaves its numbers
in ``stages/`` and its arrays in ``arrays/`` when it is whole, so that a run killed at any moment goes on where it was;
Grams wait in ``work/`` until the run is complete. ``results.json`` holds no time and no date: the same run gives the
same bytes.
"""

from __future__ import annotations

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

import ntkit
from ntkit import measures
from ntkit.checks import nearest, refusal
from ntkit.data import Data, load
from ntkit.factory import source_hash
from ntkit.files import ensure_folder, read_json, write_arrays, write_atomically, write_json
from ntkit.kernels.tangent import TangentKernel, parse_memory
from ntkit.models import build
from ntkit.progress import task
from ntkit.results import FORMAT, KERNELS, assemble, versions
from ntkit.settings import OPTIMIZERS, Settings
from ntkit.spectra import alignment
from ntkit.trajectory import Trajectory, load_weights, tensor_hash, train


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
    settings : what to do (`ntkit.settings.Settings`); the default is a CNN on the embedded digits.
    out : run folder; ``runs/MODEL-DATA`` if None.
    resume : folder of an earlier run. One that did not end goes on in place. A complete one is repeated into `out`, or,
        without `out`, only its report is made anew.
    overwrite : replace an existing run in `out`.
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
    if resume is not None:
        before = read_json(Path(resume) / "run.json")
        settings = Settings.of(before["settings"])
        if out is None:
            if before["status"] == "complete" and (Path(resume) / "results.json").exists():
                say("The run is complete; its report is made anew.")
                return _report(Path(resume))
            return _Run(Path(resume), settings, say, before).go()
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
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise refusal(
            str(folder),
            got="a file or folder with other things in it",
            expected="a new or empty folder",
            fix="Name another --out.",
        )
    return _Run(folder, settings, say, None).go()


class _Run:
    """One run in its folder."""

    def __init__(self, folder: Path, settings: Settings, say: Callable[[str], None], before: dict | None) -> None:
        self.folder, self.settings, self.say, self.before = folder, settings, say, before
        settings.check()
        self.memory = parse_memory(settings.memory) or 0
        device = settings.device
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
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
                self.say(
                    f"Stopped; nothing done is lost. go on with: ntkit analyze --from {shlex.quote(str(self.folder))}"
                )
            raise

    def _go(self) -> Path:
        s, started = self.settings, time.monotonic()
        self._open()
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
            done[name] = self._stage(name, f"{number}/{len(stages) + 1}", work)
        results = assemble(s, self.task, self.models["after"], self.trajectory, done, self.device, self.memory)
        write_json(self.folder / "results.json", results)
        report = _report(self.folder)
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        run = read_json(self.folder / "run.json")
        run |= {"status": "complete", "seconds": round(run.get("seconds", 0) + time.monotonic() - started, 1)}
        write_json(self.folder / "run.json", run)
        return report

    def _stage(self, name: str, place: str, work: Callable[[], tuple[dict, dict[str, np.ndarray]]]) -> Any:
        """Do a stage, or read what it left when it was whole."""
        file = self.folder / "stages" / f"{name}.json"
        if file.exists():
            return read_json(file)
        self.say(f"[{place}] {_SAY[name.partition('-')[0]]}{measures.LABELS.get(name.partition('-')[2], '')}")
        result, arrays = work()
        if arrays:
            write_arrays(self.folder / "arrays" / f"{name}.safetensors", arrays)
        write_json(file, result)
        return result

    # ------------------------------------------------------------------ opening and training

    def _open(self) -> None:
        s = self.settings
        if s.optimizer not in OPTIMIZERS:
            raise refusal(
                "--optimizer", got=repr(s.optimizer), expected="a known name", fix=nearest(s.optimizer, OPTIMIZERS)
            )
        self.data = load(s.data, s.data_dir, s.classes, s.train, s.test, s.seed)
        outputs = 1 if len(self.data.classes) == 2 else len(self.data.classes)
        model = build(s.model, self.data.input_shape, outputs, s.seed)
        self.data = dataclasses.replace(
            self.data,
            **{part: getattr(self.data, part).to(self.device) for part in ("x_train", "y_train", "x_test", "y_test")},
        )
        self.models = {
            "init": model.to(self.device),
            "after": build(s.model, self.data.input_shape, outputs, s.seed).to(self.device),
        }
        if s.weights is not None:
            load_weights(self.models["after"], s.weights)
        self.task = measures.Task(model, self.data)
        TangentKernel(model, outputs="trace").plan(
            self.data.x_train[:3]
        )  # refusals and the self-check come before any work
        identity = {
            "data": self.data.hash,
            "initial parameters": tensor_hash(model.state_dict()),
            "model file": source_hash(s.model),
            "ntkit": ntkit.__version__,
            "torch": torch.__version__,
        }
        if self.before is not None:
            old = self.before["identity"]
            changed = [f"{k} (was {old.get(k)}, is {v})" for k, v in identity.items() if old.get(k) != v]
            if changed:
                raise refusal(
                    f"--from {self.folder}",
                    got="changed since the run began: " + "; ".join(changed),
                    expected="the same data, model and versions",
                    fix="Restore them, or start a new run.",
                )
            self.say(f"Going on with {self.folder}")
            return
        ensure_folder(self.folder)
        for part in ("stages", "arrays", "work"):
            ensure_folder(self.folder / part)
        run = {
            "format": FORMAT,
            "status": "running",
            "settings": dataclasses.asdict(s),
            "identity": identity,
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(self.folder / "run.json", run)

    def _train(self) -> None:
        s = self.settings
        self.trajectory: Trajectory | None = None
        if s.weights is not None:
            return
        n = len(self.data.x_train)
        batch = None if s.batch_size is None or s.batch_size >= n else s.batch_size
        steps = s.epochs * -(-n // (batch or n))
        self.say(f"[1/13] training {s.model}: {steps:,} steps ({s.epochs} epochs)")
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
                on_step=lambda step, loss: progress.advance(),
            )
        self.models["after"].eval()

    # ------------------------------------------------------------------ stages

    def _gram(self, key: str) -> tuple[dict, dict[str, np.ndarray]]:
        kernel = measures.kernels_of(self.models, self.memory)[key]()
        K = kernel(self.data.x_train)
        self._keep(f"{key}-train", K)
        self._keep(f"{key}-test", kernel(self.data.x_test, self.data.x_train))
        found = measures.quality(K.cpu(), self.task.targets(self.data.y_train.cpu()))
        return {"kernel": key, "label": measures.LABELS[key], **found}, {}

    def _similarity(self) -> tuple[dict, dict[str, np.ndarray]]:
        result = {}
        for a, b in (("init", "after"), ("after", "conjugate"), ("init", "conjugate")):
            K1, K2 = self._kept(f"{a}-train"), self._kept(f"{b}-train")
            result[f"{a}_{b}"] = alignment(K1, K2)
            result[f"{a}_{b}_centered"] = alignment(K1, K2, centered=True)
        return result, {}

    def _machine(self, key: str) -> tuple[dict, dict[str, np.ndarray]]:
        data = dataclasses.replace(self.data, y_train=self.data.y_train.cpu(), y_test=self.data.y_test.cpu())
        result, arrays = measures.machine(self._kept(f"{key}-train"), self._kept(f"{key}-test"), data)
        return {"kernel": key, "label": measures.LABELS[key], **result}, arrays

    def _along(self) -> tuple[Any, dict[str, np.ndarray]]:
        if self.trajectory is None:
            return None, {}
        s = self.settings
        model = build(s.model, self.data.input_shape, self.task.outputs, s.seed).to(self.device)
        lr = s.lr if s.optimizer == "sgd" and s.momentum == 0 else None
        return measures.along(self.task, model, self.trajectory, s.track_points, self.memory, lr)

    def _invariances(self) -> tuple[Any, dict[str, np.ndarray]]:
        if self.data.kind != "images":
            return None, {}
        kernels = {key: make() for key, make in measures.kernels_of(self.models, self.memory).items()}
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

    render(folder)
    return folder
