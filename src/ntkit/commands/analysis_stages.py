"""What each stage of `ntkit analyze` computes: its numbers and its arrays."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ntkit.base.checks import Damaged, refusal
from ntkit.base.files import read_arrays
from ntkit.commands import kernel_measures, limit_measures
from ntkit.commands import network_measures as measures
from ntkit.commands import regression_measures as regression
from ntkit.commands.against_loss import affordable_trainings, against_loss, cost_of_kernels
from ntkit.commands.explained_stage import explained_stage
from ntkit.commands.network_measures import LABELS
from ntkit.commands.results import KERNELS
from ntkit.commands.settings import SECTIONS, Settings
from ntkit.commands.stage_files import StageFiles
from ntkit.kernels.tangent import TangentKernel
from ntkit.probes import standard
from ntkit.trajectory import Trajectory

Stage = tuple[Any, dict[str, np.ndarray]]  # the numbers of a stage, and its arrays


class Stages:
    """The stages of one run, in order; a later one may read what an earlier one left.

    numbers : of the finished stages.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        task: measures.TrainingTask,
        models: dict[str, nn.Module],
        trajectory: Trajectory | None,
        files: StageFiles,
        memory: int,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.settings, self.task, self.data = folder, settings, task, task.data
        self.models, self.trajectory, self.files, self.memory, self.say = models, trajectory, files, memory, say
        self.numbers: dict[str, Any] = {}

    def planned(self) -> list[tuple[str, str, Callable[[], Stage]]]:
        """Name of each stage of this run, what it does in words, and the work; `numbers` of the others are None."""
        solver = "hard-margin SVM" if self.data.targets is None else "ridge regression"
        stages: list[tuple[str, str, Callable[[], Stage]]] = [
            ("network", "the network's own error", self._network),
            *[(f"gram-{key}", f"Gram matrices: {LABELS[key]}", lambda key=key: self._gram(key)) for key in KERNELS],
            ("similarity", "alignment between the kernels", self._similarity),
            *[(f"machine-{key}", f"{solver}: {LABELS[key]}", lambda key=key: self._machine(key)) for key in KERNELS],
            ("comparisons", "comparisons on the same test examples", self._comparisons),
            ("along", "kernel along training", self._along),
            ("against-loss", "kernel against training loss", self._against_loss),
            ("limit", "distance from the limit of infinite width", self._limit),
            ("invariances", "invariances", self._invariances),
            ("neighbors", "nearest training examples", self._neighbors),
            ("explained", "three predictions explained, with training again", self._explained),
            ("oracle", "check against per-sample autograd in float64", self._oracle),
        ]  # fmt: skip
        left_out = {stage for section in self.settings.without for stage in SECTIONS[section]}
        self.numbers = dict.fromkeys(left_out)
        return [stage for stage in stages if stage[0] not in left_out]

    # ------------------------------------------------------------------ kernels and their machines

    def _gram(self, key: str) -> Stage:
        kernel = measures.kernels_of(self.models, self.memory)[key]()
        K = kernel(self.data.x_train)
        K_test = kernel(self.data.x_test, self.data.x_train)
        y = self.data.y_train.cpu()
        quality, arrays = kernel_measures.quality(K.cpu(), self.task.targets(y), y)
        self.files.write_gram(f"{key}-train", K)
        self.files.write_gram(f"{key}-test", K_test)
        return {"kernel": key, "label": LABELS[key], **quality}, arrays

    def _similarity(self) -> Stage:
        grams = {key: self._read_gram(f"{key}-train") if self._has_gram(key) else None for key in KERNELS}
        return kernel_measures.similarity(grams), {}

    def _network(self) -> Stage:
        if self.data.targets is not None:
            return regression.network(self.task, self.models["after"])
        return measures.network(self.task, self.models["after"])

    def _machine(self, key: str) -> Stage:
        data = dataclasses.replace(self.data, y_train=self.data.y_train.cpu(), y_test=self.data.y_test.cpu())
        solve = kernel_measures.machine if data.targets is None else regression.machine
        result, arrays = solve(self._read_gram(f"{key}-train"), self._read_gram(f"{key}-test"), data)
        return {"kernel": key, "label": LABELS[key], **result}, arrays

    def _comparisons(self) -> Stage:
        places = {"network": "network", **{key: f"machine-{key}" for key in KERNELS}}
        files = {key: self.folder / "arrays" / f"{stage}.safetensors" for key, stage in places.items()}
        arrays = {key: read_arrays(file) for key, file in files.items() if file.exists()}
        if self.data.targets is None:
            return kernel_measures.comparisons(arrays), {}
        return regression.comparisons({key: a["predicted"] for key, a in arrays.items()}, self.data), {}

    def _along(self) -> Stage:
        if self.trajectory is None:
            return None, {}
        model, points = copy.deepcopy(self.models["init"]), self.settings.track_points
        return measures.along(self.task, model, self.trajectory, points, self.memory)

    def _against_loss(self) -> Stage:
        along = self.numbers["along"]
        if self.trajectory is None or "absent" in along or self.data.targets is not None:
            return None, {}
        model, samples = copy.deepcopy(self.models["init"]), self.settings.probe_points
        return against_loss(self.task, model, self.trajectory, along, samples, self.memory), {}

    def _limit(self) -> Stage:
        own, first = self._cost_of_kernels(), None
        if self.trajectory is not None:
            model = copy.deepcopy(self.models["init"])
            first = limit_measures.first_order(self.task, model, self.trajectory, self.settings, self._affordable())
        return {"first_order": first, "kernel": limit_measures.kernel_beside_limit(self.task, self.models, own)}, {}

    def _affordable(self) -> float:
        """What a section that trains again may take, in gradients of a sample."""
        parameters = sum(p.numel() for p in self.models["init"].parameters())
        return affordable_trainings(self.data, parameters, self._cost_of_kernels())

    def _cost_of_kernels(self) -> float:
        """What the kernels of the run take, in gradients of a sample."""
        transforms = standard(tuple(self.data.x_test.shape[1:])) if self.data.kind == "images" else {}
        followed = {
            "points": min(self.settings.track_points, len(self.data.x_train)),
            "steps": self.trajectory.steps if self.trajectory else [],
        }
        return cost_of_kernels(self.data, followed, self.settings.probe_points, transforms)

    def _invariances(self) -> Stage:
        if self.data.kind != "images":
            return None, {}
        builders = measures.kernels_of(self.models, self.memory)
        kernels = {key: build() for key, build in builders.items() if self._has_gram(key)}
        return measures.invariances(kernels, self.data, self.settings.probe_points)

    def _neighbors(self) -> Stage:
        select = measures.select_examples if self.data.targets is None else regression.select_examples
        examples, predicted = select(self.task, self.models["after"])
        kernels = {}
        for key in ("init", "after"):
            own = measures.kernels_of(self.models, self.memory)[key]().diagonal(self.data.x_test[examples]).cpu()
            K = self._read_gram(f"{key}-test")[examples.cpu()]
            kernels[key] = K, own, self._read_gram(f"{key}-train").diagonal()
        found, arrays = measures.neighbors(self.data, examples, predicted, kernels)
        if self.data.targets is not None:
            found["distance"] = regression.distances_of_targets(found, self.data)
        return found, arrays

    def _explained(self) -> Stage:
        if self.trajectory is None or "absent" in (self.numbers["along"] or {}):
            return None, {}
        return explained_stage(self.task, self.models["after"], self.trajectory, self._affordable(), self.memory)

    def _oracle(self) -> Stage:
        x, after = self.data.x_test, self.models["after"]
        checks = [
            measures.against_oracle(self.models["init"], x, "at initialization"),
            measures.against_oracle(after, x, "after training"),
        ]
        text = repr(after)
        text = text if len(text) < 4000 else text[:4000] + " ..."
        fallback = TangentKernel(after, outputs="trace").fallback(x[:3])
        return {"checks": checks, "fallback": fallback, "text": text}, {}

    # ------------------------------------------------------------------ Gram matrices

    def _has_gram(self, key: str) -> bool:
        return "absent" not in self.numbers[f"gram-{key}"]

    def _read_gram(self, name: str) -> Tensor:
        key = name.rpartition("-")[0]
        if not self._has_gram(key):
            fix = "See why the stage that computes it is absent."
            raise refusal(f"kernel matrix {name}", got="none", expected="one from an earlier stage", fix=fix)
        try:
            return self.files.read_gram(name)
        except Damaged as error:
            self.say(f"{error} It is computed again.")
            self._gram(key)
            return self.files.read_gram(name)
