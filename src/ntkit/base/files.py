"""Files that are complete or absent: each is written under another name, synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkit.base.checks import refusal


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write(aside)`` with a name beside `path`, sync that file to disk, then rename it to `path`.

    After any failure (disk full, a kill) `path` is either the old file or the complete new one.

    Parameters
    ----------
    path : the file to write.
    write : writes the content to the path it receives.

    Raises
    ------
    Refused
        When the file cannot be written; names the folder and the system's reason.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        expected = "a folder that can be written, with room on its disk"
        fix = "Free some space or name another folder. No incomplete file was kept."
        raise refusal(str(path), got=f"{error.strerror or error} while writing", expected=expected, fix=fix) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, blob: bytes) -> None:
    """Write bytes (see `write_atomically`)."""
    write_atomically(path, lambda aside: aside.write_bytes(blob))


def write_text(path: str | Path, text: str) -> None:
    """Write text (see `write_atomically`)."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON (see `write_atomically`); NaN and infinities, which are not JSON, raise ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    Refused
        When the file is absent or is not JSON; names the file and the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise refusal(str(path), got="no such file", expected="a JSON file", fix="Check the folder's name.") from error
    except json.JSONDecodeError as error:
        got, fix = f"text that is not JSON at line {error.lineno}", "Restore the file, or start a new run."
        raise refusal(str(path), got=got, expected="JSON", fix=fix) from error


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as one safetensors file (see `write_atomically`)."""
    from safetensors.numpy import save

    write_bytes(path, save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file (no pickle is ever loaded)."""
    from safetensors.numpy import load_file

    return load_file(str(path))


def ensure_folder(path: str | Path) -> Path:
    """Create a folder, and check that files can be written there.

    Raises
    ------
    Refused
        When the folder cannot be created or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".ntkit-write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        got = f"a folder that cannot be written ({error.strerror or error})"
        fix = "Name another folder, e.g. --out runs/mine."
        raise refusal(str(path), got=got, expected="a writable folder", fix=fix) from error
    return path
