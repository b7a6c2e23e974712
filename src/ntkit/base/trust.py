"""Which code a run folder may name: a folder is data, and data must not choose what runs.

Code that the user names himself runs, and is noted in a record of this user's own, outside every run folder: its files'
resolved paths and full SHA-256. Code that a run folder names runs only if the record has it, or if the user names it
again, or trusts the folder. All of that is decided before anything is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ntkit.base.checks import Refused, refusal
from ntkit.base.factory import READ, Read, UserCode, is_code, read_code
from ntkit.base.regular_files import open_regular


@contextmanager
def code_of_user(names: Mapping[str, str]) -> Iterator[None]:
    """Read the code that the user has named, note it in the record, and let it run in this context.

    Parameters
    ----------
    names : option to name, e.g. ``{"--model": "net.py:make", "--data": "digits"}``; names that are no code are fine.

    Raises
    ------
    Refused
        When a file or module does not exist.
    """
    read = _read(names)
    _note([code for code in read.values() if code is not None])
    with _only(read):
        yield


@contextmanager
def code_of_run(
    run: Path, names: Mapping[str, str], identity: Any, given: Mapping[str, str | None], trust: bool
) -> Iterator[None]:
    """Read the code that the folder `run` names, and let it run in this context if the user has run or named it.

    Parameters
    ----------
    run : the folder.
    names : option to name, as in the folder's ``run.json``.
    identity : what the folder notes: under "model file" and "data file" the first 16 characters of their SHA-256.
    given : option to what the user has named himself: the same, or None.
    trust : let it run in any case.

    Raises
    ------
    Refused
        For code that the user has not run here, before any of it is imported; names the files with their hashes. When
        the user names something else than the folder does.
    """
    for option, name in names.items():
        own = given.get(option)
        if own is not None and own != name:
            expected = f"{name}, as in the run, or no {option}"
            raise refusal(f"{option}, with {run}", got=own, expected=expected, fix="Leave it out, or begin a new run.")
    read = _read(names)
    by_user = [code for code in read.values() if code is not None and given.get(code.option) is not None]
    for code in read.values():
        if code is None or trust or code in by_user:
            continue
        old = identity.get(f"{code.option[2:]} file") if isinstance(identity, dict) else None
        new = list(code.files.values())[-1][:16]
        if not _is_known(code) or old not in (None, new):
            raise _refused(run, code, None if old in (None, new) else str(old))
    _note(by_user)
    with _only(read):
        yield


@contextmanager
def code_of_sender(names: Mapping[str, str], hashes: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Read the code that another process of this user has sent the names of, and let it run in this context.

    Parameters
    ----------
    names : option to name.
    hashes : what `code_hashes` gave there.

    Raises
    ------
    Refused
        When a file is not here, or is another one, before any of it is imported.
    """
    read = _read(names)
    for (option, name), code in read.items():
        here = () if code is None else tuple(code.files.values())
        if hashes[option] != here:
            got = f"{', '.join(here) or 'no code'} (SHA-256 of {', '.join(code.files) if code else 'nothing'})"
            fix = "Let all workers see the same file under the same path, and have the same packages."
            raise refusal(f"{option} {name}", got=got, expected=", ".join(hashes[option]), fix=fix)
    with _only(read):
        yield


def code_hashes(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Option to the SHA-256 of each file that its name would run, of what was read for this context; () for no code."""
    read = READ.get() or {}
    codes = {option: read.get((option, name)) for option, name in names.items()}
    return {option: () if code is None else tuple(code.files.values()) for option, code in codes.items()}


def _refused(run: Path, code: UserCode, old: str | None) -> Refused:
    files = ", ".join(f"{path} (SHA-256 {sha256 or 'none, part of Python'})" for path, sha256 in code.files.items())
    got = f"{code.option} {code.name}, which would run {files}"
    if old is not None:
        got += f", not the file that the run noted ({old})"
    expected = "code of which you have run the same file under the same path"
    fix = f"Nothing of it was run. Read it; then give {code.option} {code.name} yourself, or --trust."
    return refusal(f"{run / 'run.json'}", got=got, expected=expected, fix=fix)


def _read(names: Mapping[str, str]) -> Read:
    return {(o, name): read_code(o, name) if is_code(o, name) else None for o, name in names.items()}


@contextmanager
def _only(read: Read) -> Iterator[None]:
    """`ntkit.base.factory.find` runs what was read, not what lies under its name by then."""
    before = READ.set(read)
    try:
        yield
    finally:
        READ.reset(before)


# ---------------------------------------------------------------------- the record


def record_folder() -> Path:
    """The record, in the user's own state folder: a JSON file per factory and content of its files."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base) / "ntkit" / "code-run-here"


def _entry(code: UserCode) -> tuple[Path, str]:
    """File of the record and its text: one file each, so that two processes never write the same one differently."""
    text = json.dumps({"factory": code.attribute, "files": code.files}, indent=1, sort_keys=True) + "\n"
    return record_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json", text


def _is_known(code: UserCode) -> bool:
    file, text = _entry(code)
    try:
        with open_regular(file, "an entry of the record") as handle:
            status = os.fstat(handle.fileno())
            mine = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
            return mine and handle.read(len(text) + 1) == text.encode()
    except (OSError, Refused):
        return False


def _note(codes: list[UserCode]) -> None:
    for code in codes:
        if _is_known(code):
            continue
        file, text = _entry(code)
        with suppress(OSError):  # without the record the user is asked again
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            aside = file.with_suffix(f".{os.getpid()}.part")
            try:
                with open(
                    os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
                ) as handle:
                    handle.write(text)
                os.replace(aside, file)
            finally:
                aside.unlink(missing_ok=True)
