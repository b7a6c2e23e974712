"""Files that are complete or absent: written under another name, synced, renamed; and checked when they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.checks import Damaged, Refused, refusal
from ntkit.base.integrity import (
    checksum_of,
    damaged,
    metadata_to_seal,
    sealed_json,
    sealed_page,
    sealed_tensors,
    stored_checksum,
    tensor_metadata,
    unsealed,
    warn_without_checksum,
)
from ntkit.base.regular_files import open_regular

_LARGEST_JSON = 2**25  # bytes; a list of lists takes thirty times its file in memory
ASIDE = ".ntkit-part"  # end of the name that a file is written under


def write_atomically(path: str | Path, write: Callable[[Path], object], parents: bool = False) -> None:
    """Call ``write(aside)`` with a name beside `path`, sync that file to disk, then rename it to `path`.

    After any failure (disk full, a kill) `path` is either the old file or the complete new one.

    Parameters
    ----------
    path : the file to write.
    write : writes the content to the path it receives.
    parents : create all folders above the file; else the last one only, so that a run whose folder was deleted ends.

    Raises
    ------
    Refused
        When the file cannot be written; names the folder and the system's reason.
    """
    path = Path(path)
    aside = path.with_name(path.name + ASIDE)
    try:
        path.parent.mkdir(parents=parents, exist_ok=True)
        aside.unlink(missing_ok=True)  # left by a kill, or a link that leads out of the folder
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        write(aside)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except OSError as error:
        _discard(aside)
        raise unwritable(path, error) from error
    except BaseException:
        _discard(aside)
        raise


def unwritable(path: str | Path, error: OSError) -> Refused:
    """Build the refusal of a file that the system did not write or delete; the caller raises it."""
    expected = "a folder that can be written, with room on its disk"
    fix = "Free some space or name another folder. No incomplete file was kept."
    return refusal(str(path), got=f"{error.strerror or error} while writing", expected=expected, fix=fix)


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; refuse where the system does not let us."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unwritable(path, error) from error


def write_bytes(path: str | Path, blob: bytes) -> None:
    """Write bytes (see `write_atomically`)."""
    write_atomically(path, lambda aside: aside.write_bytes(blob))


def write_text(path: str | Path, text: str) -> None:
    """Write text (see `write_atomically`)."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"), parents=True)


def write_page(path: str | Path, text: str) -> None:
    """Write HTML or Markdown with its checksum in a last comment (see `write_atomically`)."""
    write_bytes(path, sealed_page(text))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with its checksum (see `write_atomically`); NaN and infinities, which are not JSON: ValueError."""
    write_bytes(path, sealed_json(value))


def read_bytes(path: str | Path, expected: str, fix: str, most: int | None = None) -> bytes:
    """Read a whole file; refuse all but a regular file of at most `most` bytes, or of what fits in memory."""
    try:
        with open_regular(path, expected, fix) as handle:
            status = os.fstat(handle.fileno())
            if most is not None and status.st_size > most:
                got, expected = f"{status.st_size:,} bytes", f"{expected} of at most {most:,}"
                raise refusal(str(path), got=got, expected=expected, fix=fix)
            if status.st_size > _LARGEST_JSON:
                from ntkit.base.memory import check_room  # it imports torch

                # a file with holes takes more memory than disk; twice: as bytes, and as numbers
                check_room(str(path), 2 * status.st_size, getattr(status, "st_blocks", status.st_size) * 512)
            return handle.read()
    except OSError as error:
        raise refusal(str(path), got=error.strerror or str(error), expected=expected, fix=fix) from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file, after a check of its checksum, which is not in the value (see `read_json_and_checksum`)."""
    return read_json_and_checksum(path)[0]


def read_json_and_checksum(path: str | Path) -> tuple[Any, str | None]:
    """Read a JSON file, after a check of its checksum; an older file has none.

    Raises
    ------
    Damaged
        When the file is not as it was written, or holds no JSON; names the file and what is wrong.
    Refused
        When the file is absent or cannot be read.
    """
    path = Path(path)
    blob = read_bytes(path, "a JSON file", "Check the folder's name.", _LARGEST_JSON)
    digest = stored_checksum(path, blob)
    try:
        value = json.loads(blob.decode(), parse_float=_finite, parse_constant=_finite, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise damaged(path, f"text that is not JSON at line {error.lineno}") from error
    except RecursionError as error:
        raise damaged(path, "JSON nested too deeply to be read") from error
    except ValueError as error:  # text that is not UTF-8, too
        raise damaged(path, f"no JSON: {error}") from error
    if digest is not None:
        return unsealed(value), digest
    if isinstance(value, dict) and ("checksum" in value or "tracking" in value or {"run", "files"} <= value.keys()):
        raise damaged(path, "its checksum is gone, or no longer the last line")  # such files always had one
    warn_without_checksum(path)
    return value, None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}, which JSON does not have")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a whole file, in hex; refuse a file that cannot be read."""
    try:
        with open_regular(path, "a file of a run") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    except Refused as error:
        raise Damaged(str(error)) from error


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, Any] | None = None) -> str:
    """Write named arrays and JSON `metadata` as one safetensors file (see `write_atomically`); return its checksum."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    blob = sealed_tensors(save(contiguous, metadata_to_seal(metadata or {})))
    write_bytes(path, blob)
    return checksum_of(blob)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file, after a check of its checksum (no pickle is ever loaded)."""
    return read_arrays_and_metadata(path)[0]


def read_arrays_and_metadata(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and metadata of a safetensors file, after a check of its checksum."""
    from safetensors.numpy import load

    return parsed(Path(path), load)


def parsed(path: Path, load: Callable[[bytes], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a safetensors file of a run, read once; `load` makes tensors of its bytes."""
    blob = read_bytes(path, "a .safetensors file", "Check the name.")
    digest = stored_checksum(path, blob)
    try:
        found = dict(sorted(load(blob).items())), tensor_metadata(blob)
    except Exception as error:  # of several libraries: whatever they raise, the file is not what was written
        raise damaged(path, f"no complete safetensors file ({error})") from error
    if digest is None:
        warn_without_checksum(path)
    return found


def make_folder(path: str | Path) -> Path:
    """Create a folder, if it is not there.

    Raises
    ------
    Refused
        When the folder cannot be created.
    """
    path = Path(path)
    try:
        if path.is_symlink() and not path.exists():
            got = f"a link to {os.readlink(path)}, which does not exist"
            raise refusal(str(path), got=got, expected="a folder", fix="Create that folder, or name another.")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable_folder(path, error) from error
    return path


def unwritable_folder(path: Path, error: OSError) -> Refused:
    """Build the refusal of a folder in which no file can be created; the caller raises it."""
    got = f"a folder that cannot be written ({error.strerror or error})"
    return refusal(str(path), got=got, expected="a writable folder", fix="Name another folder, e.g. --out runs/mine.")


def ensure_folder(path: str | Path) -> Path:
    """Create a folder, and check that files can be written there.

    Raises
    ------
    Refused
        When the folder cannot be created or written.
    """
    path = make_folder(path)
    probe = path / f"test{ASIDE}"
    try:
        probe.unlink(missing_ok=True)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        _discard(probe)
        raise unwritable_folder(path, error) from error
    return path
