"""Files that are files: pipes, devices, sockets and folders are refused before anything reads from them."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from ntkit.base.checks import Refused, check_name, refusal

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MODE = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def open_regular(path: str | Path, expected: str, fix: str = "Check its name and permissions.") -> io.BufferedReader:
    """Open a regular file for reading bytes.

    Reading a pipe may wait forever, a device may never end, and opening one may already do something. So the kind is
    looked up first, and again once the file is open.

    Parameters
    ----------
    path : the file; links are followed.
    expected : what it should be, for the refusal.
    fix : what to do.

    Raises
    ------
    Refused
        For anything else than a regular file that can be read; names its kind or the system's reason.

    Examples
    --------
    >>> open_regular("/dev/null", "an .npz file")
    Traceback (most recent call last):
    ...
    ntkit.Refused: /dev/null: got a device; expected an .npz file. Check its name and permissions.
    """
    try:
        _check_kind(os.stat(path).st_mode, path, expected, fix)
        # another process may have put a pipe in its place since: opened like this, none waits
        handle = os.fdopen(os.open(path, _MODE), "rb")
    except Refused:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        missing = isinstance(error, FileNotFoundError)
        got = "no such file" if missing else getattr(error, "strerror", None) or str(error)
        raise refusal(str(path), got=got, expected=expected, fix=fix) from error
    try:
        _check_kind(os.fstat(handle.fileno()).st_mode, path, expected, fix)
    except BaseException:
        handle.close()
        raise
    return handle


def check_regular(path: str | Path, expected: str, fix: str = "Check its name and permissions.") -> int:
    """Size in bytes of a regular file that can be read; refuses as `open_regular`.

    For libraries that open files by name themselves.
    """
    with open_regular(path, expected, fix) as handle:
        return os.fstat(handle.fileno()).st_size


def check_start(path: str | Path, start: bytes, expected: str, fix: str = "Download it again.") -> None:
    """Refuse what often lies in the place of a large file, by its first bytes: a web page, a pointer of Git LFS.

    >>> check_start("w.pt", b"version https://git-lfs.github.com/spec/v1", "weights")
    Traceback (most recent call last):
    ...
    ntkit.Refused: w.pt: got a pointer of Git LFS, not the file itself; expected weights. Fetch it: git lfs pull.
    """
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):  # the page of a proxy or login
        raise refusal(str(path), got="an HTML page (a web page saved as data)", expected=expected, fix=fix)
    if start.startswith(b"version https://git-lfs"):
        got = "a pointer of Git LFS, not the file itself"
        raise refusal(str(path), got=got, expected=expected, fix="Fetch it: git lfs pull.")


def check_folder(path: str | Path | None, option: str) -> None:
    """Refuse a name for a folder of results that no file system, library or terminal takes; it need not exist yet."""
    if path is None:
        return
    check_name(option, str(path), "Name another folder.")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
        raise refusal(f"{option} {path}", got=got, expected="a folder", fix="Name another folder.") from error


def _check_kind(mode: int, path: str | Path, expected: str, fix: str) -> None:
    if not stat.S_ISREG(mode):
        got = _KINDS.get(stat.S_IFMT(mode), "something that is not a file")
        raise refusal(str(path), got=got, expected=expected, fix=fix)
