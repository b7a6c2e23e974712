"""`ntkit verify`: every file of a folder, compared with its checksum and with what the run says it has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from re import fullmatch
from typing import Any, Literal, NamedTuple

from ntkit.base.checks import Damaged, NewerFormat, Refused, refusal
from ntkit.base.files import ASIDE, file_digest, read_arrays_and_metadata, read_bytes, read_json, read_json_and_checksum
from ntkit.base.integrity import WithoutChecksum, check_place, damaged, fingerprint, stored_checksum
from ntkit.base.lock import LOCK
from ntkit.base.progress import task
from ntkit.base.run_files import (
    AnalysisRun,
    PartFile,
    StageFile,
    check_is_folder,
    described,
    read_step,
    read_steps,
    read_track_settings,
    tracking_id,
)
from ntkit.base.versions import RESULTS_FORMAT, STUDY_FORMAT, check_format
from ntkit.commands.stage_files import REPLACED
from ntkit.gram.tile_files import DESCRIPTION, TileFiles
from ntkit.trajectory.recorded_run import (
    FORMAT,
    read_losses,
    read_run,
    read_snapshot,
    run_id,
    snapshot_path,
    snapshots_in,
)
from ntkit.trajectory.step_log import check_log

_NOT_OF_STUDY = ("versions", "earlier_versions", "status", "parts")
"""Keys of a study's ``run.json`` that its parts do not have in common."""
Status = Literal["ok", "damaged", "missing", "without checksum", "not ntkit's"]
_CHECKED = (".json", ".safetensors", ".html", ".md")
_PLAIN = (r"(run|results|track|explain|compare|solved)\.json|(report|track|explain)\.html|claims\.md|"
          r"(losses|checkpoint|images|figures|decomposition|influence|retrainings-[0-9a-f]+)\.safetensors")  # fmt: skip
_NAMES = (_PLAIN, r"(step-\d+|part-\d+)\.(json|safetensors)", r"(parts|stages|arrays)/[^/]+\.(json|safetensors)",
          r"(snapshots/step-\d+|log/\d+)\.safetensors", r"work/[^/]+\.npy")  # fmt: skip


class FileRecord(NamedTuple):
    """A file of a folder: its place in it, its status, and what is wrong."""

    file: str
    status: Status
    reason: str = ""


def verify(run: str | Path) -> list[FileRecord]:
    """List every file of the folder of a run, a trajectory, a tracking, a decomposition, an explanation or a study.

    Of a kernel matrix on disk (`ntkit.GramStore`), its tiles, too: the record of one that was never computed is
    ``"missing"``.

    A file is ``"ok"``, ``"damaged"`` (changed, cut off, or of another run), ``"missing"``, ``"without checksum"``
    (written by an earlier version) or ``"not ntkit's"``. Nothing is changed, and no code of the run is loaded.

    Raises
    ------
    Refused
        When there is no such folder, or it holds no file of ntkit; when a newer version of ntkit wrote it.

    Examples
    --------
    >>> import ntkit, tempfile, torch
    >>> x, sgd = torch.linspace(-1, 1, 5)[:, None], lambda params: torch.optim.SGD(params, lr=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = ntkit.train(torch.nn.Linear(1, 1), (x, x), torch.nn.functional.mse_loss, sgd, 1, path=folder + "/run")
    ...     for record in verify(folder + "/run"):
    ...         print(record.file, record.status)
    losses.safetensors ok
    run.json ok
    snapshots/step-00000000.safetensors ok
    snapshots/step-00000001.safetensors ok
    """
    folder = Path(run)
    check_is_folder(folder)
    if not folder.is_dir():
        fix = "Check the folder's name."
        raise refusal(str(folder), got="no such folder", expected="the folder of a run", fix=fix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WithoutChecksum)  # the list says it
        return _listed(folder)


def _listed(folder: Path) -> list[FileRecord]:
    found: dict[Path, FileRecord] = {}
    files = sorted(p for p in folder.rglob("*") if not p.is_dir() and p.name != LOCK)
    for file in files:
        if file.name == DESCRIPTION:
            found |= _tiles(file.parent, folder)
    for file in files:
        if file not in found:
            found[file] = _by_itself(file, folder)
    if all(record.status == "not ntkit's" for record in found.values()):
        raise refusal(str(folder), got="no file of ntkit", expected="the folder of a run", fix="Check its name.")
    starts = [f for f in found if f.name in ("run.json", "track.json") and REPLACED not in f.relative_to(folder).parts]
    for file in starts:
        for path, error in _together(file):
            told = found.get(path)
            if error is not None and (told is None or told.status in ("ok", "without checksum")):
                status = "damaged" if path.exists() else "missing"
                found[path] = FileRecord(path.relative_to(folder).as_posix(), status, _why(error))
            elif error is None and told is not None and path.suffix == ".npy":
                found[path] = told._replace(status="ok")
    return sorted(found.values())


def _tiles(store: Path, folder: Path) -> dict[Path, FileRecord]:
    """The files of a kernel matrix on disk."""
    start = store / DESCRIPTION

    def record(file: Path, status: Status, reason: str = "") -> FileRecord:
        return FileRecord(file.relative_to(folder).as_posix(), status, reason)

    try:
        files = TileFiles(store)
    except Damaged as error:
        return {start: record(start, "damaged", _why(error))}
    found = {start: record(start, "ok")}
    with task("checking tiles", total=len(files.grid.tiles)) as progress:
        for (i, j), bad in zip(files.grid.tiles, files.bad(), strict=True):
            file = files.file(i, j)
            status = "ok" if bad is None else "missing" if bad.reason == "missing" else "damaged"
            found[file] = record(file, status, "" if bad is None or status == "missing" else bad.reason)
            progress.advance()
    return found


def summary(records: Iterable[FileRecord]) -> str:
    """Count files by status, in one line.

    >>> summary([FileRecord("run.json", "ok"), FileRecord("x.txt", "not ntkit's")])
    "2 files: 1 ok, 1 not ntkit's"
    """
    statuses = [record.status for record in records]
    order: tuple[Status, ...] = ("ok", "damaged", "missing", "without checksum", "not ntkit's")
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in order if s in statuses)
    return f"{len(statuses)} file{'s' * (len(statuses) != 1)}: {counts}"


def without_whole_tiles(records: Iterable[FileRecord]) -> list[FileRecord]:
    """The records to list: a kernel matrix has too many tiles to list those that are whole."""
    return [
        record for record in records if record.status != "ok" or not fullmatch(r"(.*/)?c/\d+/\d+(/0/0)?", record.file)
    ]


def _why(error: Refused) -> str:
    """What is wrong, without the file's name and the advice."""
    return str(error).partition(": got ")[2].partition("; expected ")[0].removeprefix("a damaged file: ")


def _by_itself(file: Path, folder: Path) -> FileRecord:
    """A file's own checksum."""
    name = file.relative_to(folder).as_posix()
    ours = any(fullmatch(rf"(.*/)?({pattern})", name) for pattern in _NAMES)
    if not ours:
        left = file.name.endswith(ASIDE)
        return FileRecord(name, "not ntkit's", "left by a process that was killed" if left else "")
    if file.suffix == ".npy":
        return FileRecord(name, "without checksum")  # it is in the file of its stage
    try:
        digest = stored_checksum(file, blob := read_bytes(file, "a file of a run", "Check its folder."))
        if digest is None:
            _complete(file, blob)
    except Refused as error:
        return FileRecord(name, "damaged", _why(error))
    return FileRecord(name, "ok" if digest is not None else "without checksum")


def _complete(file: Path, blob: bytes) -> None:
    """Refuse a file without a checksum that is not even whole."""
    if file.suffix == ".html":
        if not blob.rstrip().endswith(b"</html>"):
            raise damaged(file, "cut off")
    elif file.suffix == ".json":
        read_json(file)
    elif file.suffix == ".md":
        raise damaged(file, "cut off")
    else:
        read_arrays_and_metadata(file)


def _together(start: Path) -> Iterator[tuple[Path, Refused | None]]:
    """What the files of one folder say of each other: each file concerned, and what is wrong with it."""
    folder = start.parent
    try:
        told = read_json(start)
        told = told if isinstance(told, dict) else {}
        if start.name == "track.json":
            yield from _tracking(folder)
        elif told.get("format") == FORMAT and not ((folder / "stages").exists() or (folder / "parts").exists()):
            yield from _trajectory(folder, read_run(folder))
        elif told.get("kind") == "study" and not ((folder / "stages").exists() or (folder / "snapshots").exists()):
            check_format(start, told.get("format"), STUDY_FORMAT, "Restore it from a copy.")
            yield from _study(folder, told)
        elif "identity" in told and not ((folder / "parts").exists() or (folder / "snapshots").exists()):
            check_format(start, told.get("format"), RESULTS_FORMAT, "Restore it from a copy.")
            yield from _analysis(folder, described(start, told, AnalysisRun))
        elif told.keys() != {"settings", "versions"}:  # these two: of `ntkit infinite`
            raise damaged(start, "not the run.json of this folder")
    except NewerFormat:
        raise  # whole, but this version does not know what must be there
    except Refused as error:
        yield start, error


def _checked(path: Path, check: Callable[[], object]) -> tuple[Path, Refused | None]:
    try:
        check()
    except Refused as error:
        return path, error
    return path, None


def _tracking(folder: Path) -> Iterator[tuple[Path, Refused | None]]:
    settings = read_track_settings(folder)
    tracking = tracking_id(settings)
    for file in sorted(folder.glob("step-*.json")):
        yield _checked(file, lambda file=file: read_step(file, tracking))
        arrays = file.with_suffix(".safetensors")
        yield _checked(arrays, lambda path=arrays: _placed(path, tracking=tracking, step=int(path.stem[5:])))
    if isinstance(digest := settings.get("images"), str):
        images = folder / "images.safetensors"
        yield _checked(images, lambda: _same_digest(images, digest))
    try:
        read_steps(folder, settings)
    except Damaged as error:
        yield Path(str(error).partition(": got ")[0]), error


def _placed(path: Path, **place: Any) -> None:
    if not path.exists():
        raise damaged(path, "no such file")
    check_place(path, read_arrays_and_metadata(path)[1], **place)


def _trajectory(folder: Path, run: dict[str, Any]) -> Iterator[tuple[Path, Refused | None]]:
    own, settings = run_id(run), run["settings"]
    for step in run.get("snapshots", snapshots_in(folder)):
        yield _checked(snapshot_path(folder, step), lambda step=step: read_snapshot(folder, step, own, settings))
    if run["status"] == "running":
        return
    last = run["stop"]["step"]
    if settings.get("kind") == "recorded":
        try:
            check_log(folder / "log", own, last)
        except Damaged as error:
            yield Path(str(error).partition(": got ")[0]), error
    else:
        losses = folder / "losses.safetensors"
        yield _checked(losses, lambda: read_losses(losses, own, last))


def _analysis(folder: Path, run: dict[str, Any]) -> Iterator[tuple[Path, Refused | None]]:
    own, complete = fingerprint([run["settings"], run["identity"]]), run["status"] == "complete"
    for file in sorted(folder.glob("stages/*.json")):
        if (told := _content(file, "stage")) is None:
            continue
        yield _checked(file, lambda file=file, told=told: _stage(file, told, own))
        for place, digest in told["files"].items() if isinstance(told.get("files"), dict) else ():
            if place.startswith("arrays/") or not complete:  # Grams are deleted when the run is complete
                path = folder / place
                yield _checked(path, lambda path=path, digest=digest: _same_digest(path, digest))
    if complete:
        places = [f"stages/{name}.json" for name in run.get("stages", [])]
        for name in (*places, "results.json", "report.html"):
            yield _checked(folder / name, lambda name=name: read_bytes(folder / name, "a file", "Write it again."))
        if (folder / "results.json").exists():
            yield _checked(folder / "results.json", lambda: _results(folder / "results.json", own))
    explained = folder / "explain" / "results.json"
    if explained.exists():
        yield _checked(explained, lambda: _results(explained, own))
        told = read_json(explained) if _checked(explained, lambda: read_json(explained))[1] is None else None
        if isinstance(told, dict) and isinstance(digest := told.get("images"), str):
            images = explained.with_name("images.safetensors")
            yield _checked(images, lambda: _same_digest(images, digest))


def _content(file: Path, kind: str) -> dict[str, Any] | None:
    """Content of the file of a stage or a part; None if it is damaged, or an earlier version wrote it."""
    try:
        told, checksum = read_json_and_checksum(file)
    except Damaged:
        return None
    told = told if isinstance(told, dict) else {}
    return None if checksum is None and kind not in told else told


def _stage(file: Path, told: dict[str, Any], own: str) -> None:
    described(file, told, StageFile)
    check_place(file, told, stage=file.stem, run=own)


def _results(path: Path, own: str) -> None:
    told, checksum = read_json_and_checksum(path)
    told = told if isinstance(told, dict) else {}
    check_place(path, told if checksum is None else told | {"sha256": checksum}, run=own)
    if "stage" in told:
        raise damaged(path, f"the file of the stage {told['stage']}, not results")


def _same_digest(path: Path, digest: str) -> None:
    if not path.exists():
        raise damaged(path, "no such file")
    now = file_digest(path) if path.suffix == ".npy" else read_arrays_and_metadata(path)[1].get("sha256")
    if now != digest:
        raise damaged(path, "not the file that its stage or part wrote")


def _study(folder: Path, run: dict[str, Any]) -> Iterator[tuple[Path, Refused | None]]:
    own = fingerprint({name: value for name, value in run.items() if name not in _NOT_OF_STUDY})
    for file in sorted(folder.glob("parts/*.json")):
        if (told := _content(file, "part")) is None:
            continue
        yield _checked(file, lambda file=file, told=told: _part(file, told, own))
        if isinstance(digest := told.get("arrays"), str):
            arrays = file.with_suffix(".safetensors")
            yield _checked(arrays, lambda path=arrays, digest=digest: _same_digest(path, digest))
    if run.get("status") == "complete":
        results = folder / "results.json"
        parts = run["parts"] if isinstance(run.get("parts"), list) else []
        for path in (*(folder / "parts" / f"{part}.json" for part in parts), results, folder / "report.html"):
            yield _checked(path, lambda path=path: read_bytes(path, "a file", "Write it again."))
        told = read_json(results) if _checked(results, lambda: read_json(results))[1] is None else None
        names = ("name", "scale", "sets", "seeds", "sizes")
        if told is not None and (not isinstance(told, dict) or any(told.get(n) != run.get(n) for n in names)):
            yield results, damaged(results, "the results of another study than run.json")
        elif isinstance(told, dict) and isinstance(digest := told.get("figures"), str):
            figures = folder / "figures.safetensors"
            yield _checked(figures, lambda: _same_digest(figures, digest))


def _part(file: Path, told: dict[str, Any], own: str) -> None:
    described(file, told, PartFile)
    check_place(file, told, part=file.stem, study=own)
