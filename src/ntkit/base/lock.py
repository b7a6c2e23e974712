"""One writer per folder: a lock that the system releases when its holder dies, and who holds it.

The lock is on a file in the folder, which its holder deletes at the end. It is taken with the standard library: the
package filelock keeps the file (or, depending on its version, empties it), and does not show which file it has locked.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

from ntkit.base.checks import Refused, refusal
from ntkit.base.files import ASIDE, make_folder, unwritable_folder

LOCK = ".ntkit-lock"
_PARTS = ("", "snapshots", "log", "stages", "arrays", "work", "parts")  # folders that have no lock of their own
# folders that have one, or hold others
_FOLDERS = ("trajectory", "track", "explain", "accounting", "retrainings", "runs", ".replaced")


def check_unused(folder: Path) -> None:
    """Refuse a file, and a folder that holds anything but a lock.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     check_unused(Path(place))
    ...     check_unused(Path(place) / "new")
    """
    if not folder.exists():
        return
    if not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir()):
        got, fix = "other files" if folder.is_dir() else "a file", "Name another folder (--out)."
        raise refusal(str(folder), got=got, expected="a new or empty folder", fix=fix)


def _try_lock(descriptor: int) -> None:
    """Lock an open file, or raise BlockingIOError at once where another holds it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # beyond the content, which others read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """The lock of a folder; `acquire` takes it, `release` gives it back; a ``with`` statement does both.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, FolderLock(folder):
    ...     try:
    ...         FolderLock(folder).acquire()
    ...     except Refused as refused:
    ...         print(str(refused).partition(": got a ")[2][:14])
    folder that pr
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder, self._file = Path(folder), Path(folder) / LOCK
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, and delete what a killed process left half-written; the folder is created.

        Raises
        ------
        Refused
            When another process is writing into the folder (says which), or the folder cannot be written.
        """
        make_folder(self._folder)
        for name in (*_PARTS[1:], *_FOLDERS):
            if (self._folder / name).is_symlink():  # would lead out of the folder
                got, fix = "a link to another folder", "Remove the link, or name another folder (--out)."
                raise refusal(str(self._folder / name), got=got, expected="a folder of its own", fix=fix)
        for _ in range(100):
            descriptor = self._open()
            try:
                _try_lock(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                raise self._held() from None
            except OSError as error:
                warnings.warn(f"{self._folder}: no lock on this disk ({error.strerror})", stacklevel=3)
            # Its last holder may have deleted the file between our opening and locking it: then it locks nothing.
            if self._is_there(descriptor):
                break
            os.close(descriptor)
        else:
            raise self._held()
        self._descriptor = descriptor
        who = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(who | {"command": " ".join(sys.argv)[:500]}).encode())
        for part in (self._folder / name for name in _PARTS):
            for leftover in part.glob(f"*{ASIDE}"):
                with suppress(OSError):
                    leftover.unlink()

    def release(self) -> None:
        """Delete the file and give the lock back; does nothing where it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):
            if self._is_there(descriptor):
                self._file.unlink()  # before the lock is given back: nobody else holds it yet
        os.close(descriptor)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        """Give the lock back where its owner was dropped."""
        self.release()

    def sweep(self) -> None:
        """Delete what a process left in the folder that was killed, if it left its lock, too."""
        if self._file.exists() and self._descriptor is None:
            self.acquire()
            self.release()

    def check(self) -> None:
        """Refuse a folder that another process is writing, without taking the lock."""
        if self._descriptor is not None or not self._file.exists():
            return
        try:
            descriptor = os.open(self._file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            return
        try:
            _try_lock(descriptor)
        except BlockingIOError:
            raise self._held() from None
        except OSError:
            return
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        regular = True
        with suppress(OSError):
            regular = stat.S_ISREG(os.lstat(self._file).st_mode)
        if not regular:
            got, expected = "a link, or no regular file", "a lock that ntkit wrote"
            raise refusal(str(self._file), got=got, expected=expected, fix="Delete it if you know where it comes from.")
        try:
            return os.open(self._file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise unwritable_folder(self._folder, error) from error

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        except OSError:
            return False

    def _held(self) -> Refused:
        try:
            who = json.loads(self._file.read_text(encoding="utf-8"))
            text = f"process {who['process']} on host {who['host']} is writing since {who['since']} ({who['command']})"
        except (OSError, ValueError, KeyError, TypeError):
            text = "another process is writing"
        expected, fix = "one writer at a time", "Wait for it, stop it, or name another folder (--out)."
        return refusal(f"folder {self._folder}", got=f"a folder that {text}", expected=expected, fix=fix)
