"""What the JSON files of a run hold: their descriptions, with which a file is compared before it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from ntkit.base.checks import Damaged, Refused, refusal
from ntkit.base.files import read_json, read_json_and_checksum
from ntkit.base.integrity import check_place, damaged, fingerprint
from ntkit.base.versions import check_format

Number = float | None  # None: undefined there
Numbers = list[Number]


def check_is_folder(run: Path) -> None:
    """Refuse a file in the place of a run's folder, such as a checkpoint; a missing folder is not refused here."""
    if run.is_file():
        fix = "Name the folder. Of weights make one: ntkit analyze --weights FILE --model net.py:make --data DATA."
        raise refusal(str(run), got="a file", expected="the folder of a run", fix=fix)


class AnalysisRun(TypedDict):
    """``run.json`` of `ntkit analyze`."""

    format: int
    status: Literal["running", "complete"]
    settings: dict[str, Any]
    identity: dict[str, Any]
    seconds: NotRequired[float]
    stages: NotRequired[list[str]]


class StageFile(TypedDict):
    """A file of ``stages/``: the numbers of a finished stage, and the digests of the files that it wrote."""

    stage: str
    run: str
    result: Any
    files: dict[str, str]


class OptimizerGroup(TypedDict):
    """A group of parameters of an optimizer, by name."""

    params: list[str]


class OptimizerSettings(TypedDict):
    """An optimizer of a recorded run."""

    groups: list[OptimizerGroup]
    defaults: dict[str, Any]


class RunSettings(TypedDict):
    """Settings of any recorded run."""

    record: Any
    optimizer: OptimizerSettings
    parameters: dict[str, tuple[list[int], str]]
    trainable: list[str]
    aliases: dict[str, str]


class TrainSettings(RunSettings):
    """Settings of a run of `train`."""

    steps: int
    batch_size: int | None
    seed: int
    target: Number
    schedule: NotRequired[str | None]
    clip: NotRequired[Number]
    loss: NotRequired[str]
    n: int
    data: NotRequired[str]
    select: NotRequired[str]


class LoopSettings(RunSettings):
    """Settings of a loop that was recorded."""

    kind: Literal["recorded"]
    budget: int | None


class RunEnd(TypedDict):
    """How a run ended."""

    reason: str
    step: int
    loss: Number
    diverged_at: NotRequired[int]
    diverged_loss: NotRequired[str]


class EndedRun(TypedDict):
    """``run.json`` of a run that has ended; `snapshots` are the steps of its snapshots."""

    stop: RunEnd
    initial: str
    snapshots: NotRequired[list[int]]


class TrackSettingsFile(TypedDict):
    """``track.json``."""

    format: str
    version: NotRequired[int]  # absent: 1
    points: int
    k: NotRequired[int]
    outputs: NotRequired[str]
    outputs_of_model: NotRequired[int]
    kernel: NotRequired[str]
    loss: NotRequired[str | None]
    trained: NotRequired[list[str]]
    steps: NotRequired[list[int]]
    images: NotRequired[str]


class SpectralNumbers(TypedDict, total=False):
    """Numbers of one kernel matrix."""

    eigenvalues: Numbers | None
    residual: Number
    trace: Number
    tail: Number
    effective_rank: Number
    condition: Number
    status: str | None
    energy_target: Numbers | None
    energy_output: Numbers | None
    energy_residual: Numbers | None
    alignment: Number
    alignment_centered: Number
    class_alignment: Numbers | None


class StepRecord(SpectralNumbers):
    """A file ``step-*.json`` of a tracking."""

    step: int
    state: NotRequired[str]
    since: NotRequired[list[int]]
    tracking: NotRequired[str]
    loss: NotRequired[Number]
    learning_rate: NotRequired[Number]
    layer_trace: NotRequired[dict[str, Number] | None]
    layer_alignment: NotRequired[dict[str, Number] | None]
    distance: NotRequired[Number]
    change: NotRequired[Number]
    cka: NotRequired[Number]
    velocity: NotRequired[Number]
    change_error: NotRequired[Number]
    sharpness: NotRequired[Number]
    stable_learning_rate: NotRequired[Number]
    sharpness_bound: NotRequired[Number]
    first_order: NotRequired[dict[str, Number] | None]
    per_output: NotRequired[list[SpectralNumbers] | None]


class PartFile(TypedDict):
    """A file of ``parts/`` of a study."""

    part: str
    study: str
    numbers: dict[str, Any]
    arrays: str | None


TRACK_FORMAT, TRACK_VERSION = "ntkit-track", 1


def tracking_id(settings: dict[str, Any]) -> str:
    """What the files of a tracking have in common and carry: its settings, as 16 hex digits."""
    return fingerprint({name: value for name, value in settings.items() if name not in ("steps", "images")})


def read_track_settings(folder: Path) -> dict[str, Any]:
    """Read ``track.json``; refuse any other file."""
    path = folder / "track.json"
    settings = read_json(path)
    written = settings.get("format") if isinstance(settings, dict) else None
    if written != TRACK_FORMAT:
        fix = "Give a folder that `ntkit.track` wrote."
        raise refusal(str(path), got=f"format {written}", expected=f"format {TRACK_FORMAT}", fix=fix)
    check_format(path, settings.get("version", TRACK_VERSION), TRACK_VERSION, "Track the run again, in a new folder.")
    return described(path, settings, TrackSettingsFile)


def read_step(file: Path, tracking: str) -> dict[str, Any]:
    """Read the record of one snapshot of a tracking, with this id."""
    record, checksum = read_json_and_checksum(file)
    described(file, record, StepRecord)
    check_place(file, record if checksum is None else record | {"sha256": checksum}, tracking=tracking)
    if file.stem != f"step-{record['step']:08d}":
        raise damaged(file, f"the record of step {record['step']}")
    return {name: value for name, value in record.items() if name != "tracking"}


def read_steps(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the records of all snapshots of a tracking, by step; refuse a folder in which one is missing."""
    tracking = tracking_id(settings)
    records = [read_step(file, tracking) for file in sorted(folder.glob("step-*.json"))]
    there = {record["step"] for record in records}
    needed = {step for record in records for step in record.get("since", [])} | set(settings.get("steps", []))
    if missing := sorted(needed - there):
        fix = "Call `ntkit track` again: it is measured."
        raise damaged(folder / f"step-{missing[0]:08d}.json", "no such file", fix)
    return sorted(records, key=lambda record: record["step"])


def described(path: str | Path, value: Any, kind: Any, within: str = "") -> Any:
    """Return a value of a JSON file if it is what the description says.

    Parameters
    ----------
    path : the file.
    value : as it was read.
    kind : a TypedDict, a dataclass (which is then returned) or another type.
    within : the key that the value was found under.

    Raises
    ------
    Damaged
        Names the first key that is missing or holds something else.

    Examples
    --------
    >>> described("run.json", {"reason": "steps", "step": "ten", "loss": None}, RunEnd, "stop")
    Traceback (most recent call last):
    ...
    ntkit.Damaged: run.json: stop.step: got "ten"; expected int. Restore the file, or start a new run.
    """
    import msgspec

    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _refused(path, value, within, str(error)) from error
    return value if isinstance(converted, dict) else converted


def _refused(path: str | Path, value: Any, within: str, text: str) -> Damaged:
    text, _, place = text.partition(" - at `$")
    place = place.rstrip("`")
    for name in re.findall(r"\.?([^.\[\]]+)", place):
        try:
            value = value[int(name) if isinstance(value, list) else name]
        except (KeyError, ValueError, IndexError, TypeError):  # an entry whose key the text does not name
            value = None
            break
    key = (within + place).lstrip(".")
    if missing := re.match(r"Object missing required field `(.+)`", text):
        got, expected = "no such key", "it as ntkit wrote it"
        key = f"{key}.{missing[1]}".lstrip(".")
    else:
        kinds = re.match(r"Expected `(.+?)`(?:, got `(.+?)`)?", text)
        shown = json.dumps(value)
        got = shown if len(shown) <= 40 else shown[:37] + "..."
        if "[...]" in place and kinds and kinds[2]:  # the text does not name this key
            got = f"a value of type {kinds[2]}"
        expected = kinds[1].replace(" | ", " or ") if kinds else text[0].lower() + text[1:]
    subject = f"{path}: {key}" if key else f"{path}"
    return Damaged(f"{subject}: got {got}; expected {expected}. Restore the file, or start a new run.")


def results_of_kind(folder: Path, kind: str, version: int, fix: str) -> dict[str, Any]:
    """Read ``results.json`` of a folder; refuse another kind of results, and another format."""
    results = read_json(folder / "results.json")
    found = (results.get("kind"), results.get("format")) if isinstance(results, dict) else (None, None)
    if found[0] != kind:
        got, expected = f"kind {found[0]}, format {found[1]}", f"kind {kind}, format {version}"
        raise refusal(str(folder / "results.json"), got=got, expected=expected, fix=fix)
    check_format(folder / "results.json", found[1], version, fix)
    return results


@contextmanager
def understood(path: str | Path) -> Iterator[None]:
    """Turn an error about content that no description covers into a refusal that names the file.

    >>> try:
    ...     with understood("results.json"):
    ...         {}["title"]
    ... except Damaged as error:
    ...     print(str(error).partition("; ")[0])
    results.json: got content that cannot be used (KeyError: 'title')
    """
    from jinja2 import TemplateError

    errors = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, TemplateError)
    try:
        yield
    except Refused:
        raise
    except errors as error:
        raise Damaged(
            f"{path}: got content that cannot be used ({type(error).__name__}: {error}); expected it as ntkit wrote "
            "it. Restore the file, or start a new run."
        ) from error
