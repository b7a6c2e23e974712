"""The result of `track`: series by name, eigenvectors, and their folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.checks import refusal
from ntkit.base.files import read_arrays_and_metadata, write_arrays, write_json
from ntkit.base.function_identity import OTHER_VERSION
from ntkit.base.integrity import check_place, damaged
from ntkit.base.notebook_figures import curves
from ntkit.base.numbers import is_integer
from ntkit.base.run_files import read_step, read_steps, read_track_settings, tracking_id
from ntkit.base.shown import Shown

_PLOTTED = ("loss", "trace", "alignment_centered", "distance")
_TRENDS = ("trace", "sharpness", "alignment_centered")


@dataclass(frozen=True, eq=False, repr=False)
class Tracked(Shown):
    """Result of `track`: one entry per snapshot in every series.

    Attributes
    ----------
    settings : points, outputs, k, "dense" or "matrix-free", and the hash of the data.
    steps : the snapshots' steps, ascending.
    series : name -> one value per snapshot (None: undefined there):

        - ``loss``; ``learning_rate`` of that step (first group);
        - ``eigenvalues`` [k], of the Gram matrix; ``residual``: the largest |K v - lambda v| / lambda_1;
        - ``trace``; ``tail``: trace - sum of these eigenvalues; ``effective_rank``: trace / lambda_1;
          ``condition``: lambda_1 / lambda_k;
        - ``energy_target``, ``energy_output``, ``energy_residual`` [k]: cumulative relative energy in the top j
          eigenvectors (residual: derivative of each sample's loss by its outputs; f - y for squared loss);
        - ``alignment``, ``alignment_centered`` with the targets; ``class_alignment`` [C] (centered, per output);
        - ``layer_trace``, ``layer_alignment`` (centered) {layer: ...}: shares of single layers, if K is a matrix;
        - ``distance`` 1 - cos(K, K_0); ``change`` |K - K_0| / |K_0|; ``cka`` (centered cosine) to the first snapshot;
          ``velocity`` (1 - cos(K, K of the snapshot before)) per step; ``change_error``: relative standard error of
          the square of ``change`` where it is estimated from random vectors (matrix-free), 0 where it is exact;
        - ``sharpness``: lambda_max of (1/n) H^1/2 K H^1/2, H the loss's second derivative by the outputs (the
          Gauss-Newton matrix), None if a sample's slope depends on the outputs of others; ``stable_learning_rate``
          2 / sharpness: largest for plain gradient descent. For the loss |f - y|^2 / (2 n) that is 2 n / lambda_1;
          ``sharpness_bound``: largest sharpness at which the run's own optimizer is stable with full batches, None if
          it is not SGD (`trajectory.learning_rates.sharpness_bound`);
        - ``first_order`` {cosine, relative_error, norm_ratio}: the change of all outputs in a gradient descent step on
          these points against its first-order prediction -lr K dL/df;
        - ``per_output`` [{...}]: with outputs="diagonal", the spectral numbers of the kernel of each output.

    path : its folder, or None.
    """

    settings: dict[str, Any]
    steps: list[int]
    series: dict[str, list[Any]]
    vectors: dict[int, np.ndarray]
    path: Path | None = None

    @classmethod
    def open(cls, path: str | Path) -> Tracked:
        """Read the folder of `track`, also while it is still running.

        Raises
        ------
        Refused
            When the folder has no result of `track`, or a file is damaged or missing.
        """
        path = Path(path)
        settings = read_track_settings(path)
        records = read_steps(path, settings)
        tracking = tracking_id(settings)
        vectors = {r["step"]: read_vectors(path, r["step"], tracking)["eigenvectors"] for r in records}
        settings = {name: value for name, value in settings.items() if name not in ("steps", "images")}
        return assembled(settings, records, vectors, path)

    def _shown(self) -> dict[str, Any]:
        told = {name: self.settings[name] for name in ("points", "outputs", "kernel") if name in self.settings}
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if self.steps else ""  # none yet: it is still running
        return {**told, "snapshots": f"{len(self.steps)}{span}",
                "series": ", ".join(self.series), "path": self.path}  # fmt: skip

    def plot(self, *names: str) -> Any:
        """Series of one number per snapshot against the step, as a plotly figure.

        Parameters
        ----------
        names : of `series`; by default trace, alignment (centered), distance and loss, each over its largest value.

        Raises
        ------
        Refused
            For a name that is none of `series`, or whose entries are not single numbers.
        """
        chosen = names or tuple(name for name in _PLOTTED if name in self.series)
        drawn = {}
        for name in chosen:
            values = self.series.get(name)
            if values is None or not all(v is None or isinstance(v, (int, float)) for v in values):
                fix = "See .series for the names."
                raise refusal("names", got=repr(name), expected="a series of single numbers", fix=fix)
            largest = 1.0 if names else max((abs(v) for v in values if v is not None), default=1.0) or 1.0
            drawn[name] = (self.steps, [None if v is None else v / largest for v in values])
        title = "value" if names else "over the largest value"
        return curves("Kernel along training", "step", title, drawn)

    def eigenvectors(self, step: int) -> np.ndarray:
        """Top eigenvectors at a snapshot, [N, k] (outputs="diagonal": [C, n, k])."""
        if not is_integer(step) or step not in self.vectors:
            raise refusal(f"step {step}", got="no snapshot", expected=f"one of {self.steps}", fix="See .steps.")
        return self.vectors[step]

    def phases(self) -> list[dict[str, Any]]:
        """Trends over each phase of constant learning rate, in order: they show the effect of a decay on the spectrum.

        Returns
        -------
        list of dict
            ``start``, ``stop`` (steps of its first and last snapshot), ``learning_rate``, and [first, last] of
            ``lambda_1``, ``trace``, ``sharpness``, ``alignment_centered``; ``stability``: sharpness x learning rate
            / 2 at its last snapshot (1: the limit of plain gradient descent). None where a number is undefined.
        """
        phases: list[dict[str, Any]] = []
        rates = self.series.get("learning_rate", [None] * len(self.steps))
        for i, (step, rate) in enumerate(zip(self.steps, rates, strict=True)):
            now = {name: self.series[name][i] for name in _TRENDS if name in self.series}
            if "eigenvalues" in self.series:
                now["lambda_1"] = (self.series["eigenvalues"][i] or [None])[0]
            if not phases or phases[-1]["learning_rate"] != rate:
                phases.append({"start": step, "learning_rate": rate, **{name: [v, v] for name, v in now.items()}})
            phases[-1]["stop"] = step
            for name, value in now.items():
                phases[-1][name][1] = value
            sharpness = now.get("sharpness")
            phases[-1]["stability"] = None if sharpness is None or rate is None else sharpness * rate / 2
        return phases

    def to_tensorboard(self, folder: str | Path) -> None:
        """Write the scalar series as TensorBoard events (needs the package tensorboard).

        Raises
        ------
        Refused
            When tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            fix = "Run: pip install tensorboard"
            raise refusal("to_tensorboard", got="no tensorboard", expected="the package", fix=fix) from error
        writer = SummaryWriter(str(folder))
        for i, step in enumerate(self.steps):
            for name, value in scalars({key: values[i] for key, values in self.series.items()}).items():
                writer.add_scalar(f"ntkit/{name}", value, step)
        writer.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The scalars of a snapshot, by name: of lists the first ten entries, of energies those at 1, 5, 10, 20.

    >>> scalars({"trace": 2.0, "eigenvalues": [1.5, None], "first_order": {"cosine": 1.0}})
    {'trace': 2.0, 'eigenvalues/1': 1.5, 'first_order/cosine': 1.0}
    """
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{key}": v for key, v in value.items() if isinstance(v, float)}
        elif isinstance(value, list):
            places = (1, 5, 10, 20) if name.startswith("energy") else range(1, 11)
            entries = {j: value[j - 1] for j in places if j <= len(value)}
            numbers |= {f"{name}/{j}": entry for j, entry in entries.items() if isinstance(entry, float)}
        elif isinstance(value, float):
            numbers[name] = value
    return numbers


def _step_file(folder: Path, step: int, kind: str) -> Path:
    return folder / f"step-{step:08d}.{kind}"


def write_snapshot(folder: Path, record: dict[str, Any], arrays: dict[str, np.ndarray], tracking: str) -> None:
    """Write the files of one snapshot; `tracking` is the id of the tracking."""
    step = record["step"]
    write_arrays(_step_file(folder, step, "safetensors"), arrays, {"tracking": tracking, "step": step})
    # the numbers last: a snapshot with numbers is complete
    write_json(_step_file(folder, step, "json"), {**record, "tracking": tracking})


def read_snapshot(folder: Path, step: int, tracking: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read the files of one snapshot; None if it was not measured yet."""
    if not (file := _step_file(folder, step, "json")).exists():
        return None
    return read_step(file, tracking), read_vectors(folder, step, tracking)


def read_vectors(folder: Path, step: int, tracking: str) -> dict[str, np.ndarray]:
    """Read the eigenvectors of one snapshot."""
    path = _step_file(folder, step, "safetensors")
    if not path.exists():
        raise damaged(path, "no such file")
    arrays, metadata = read_arrays_and_metadata(path)
    check_place(path, metadata, tracking=tracking, step=step)
    if "eigenvectors" not in arrays:
        raise damaged(path, "no eigenvectors in it")
    return arrays


def open_folder(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder; refuse a folder with other settings."""
    if not (path / "track.json").exists():
        write_json(path / "track.json", settings)
        return
    stored, new = read_track_settings(path), json.loads(json.dumps(settings))
    names = dict.fromkeys([*new, *(stored.keys() - {"steps", "images"})])  # an option that is left out now is another
    if changed := [name for name in names if stored.get(name) != new.get(name)]:
        got = f"a tracking with another {', '.join(changed)}"
        fix = f"Name another folder (--out). {OTHER_VERSION} Tracked.open and ntkit report read it."
        raise refusal(str(path), got=got, expected="the same run, points and options", fix=fix)


def close_folder(path: Path, settings: dict[str, Any], steps: list[int]) -> None:
    """Write into ``track.json`` which steps were measured, so that a file that is lost later is missed."""
    if read_track_settings(path).get("steps") != steps:
        write_json(path / "track.json", settings | {"steps": steps})


def write_images(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the images that the page of a tracking shows (`ntkit.report.images.viewer`), and that there are some."""
    settings = read_track_settings(path)
    digest = write_arrays(path / "images.safetensors", arrays, {"tracking": tracking_id(settings)})
    if settings.get("images") != digest:
        write_json(path / "track.json", settings | {"images": digest})


def assembled(
    settings: dict[str, Any], records: list[dict[str, Any]], vectors: dict[int, np.ndarray], path: Path | None
) -> Tracked:
    """Result with the series of these records."""
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    series = {name: [record.get(name) for record in records] for name in names}
    return Tracked(settings, [record["step"] for record in records], series, vectors, path)
