"""A process that counts what it does to files, and may kill itself before one of these operations."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


class FileOperations:
    """Counts what this process does to files in a folder, and kills it before the operation with a given number."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.count, self._within, self._last = 0, f"{folder}/", last
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(arguments[0])
        if event in ("os.remove", "os.rmdir") and isinstance(arguments[1], int) and arguments[1] >= 0:  # of a rmtree
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if f"{path}/".startswith(self._within):
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
