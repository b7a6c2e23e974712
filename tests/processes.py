"""Processes of their own that begin at once: forked from a server that has imported torch, once for all tests.

An import of torch takes two seconds, of what an optimizer and a report load two more. What is ntkit's is imported by
each process, as by one that a user starts. `tests/test_house.py` and others start Python itself where that matters.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any
from unittest import mock

THERE = "forkserver" in multiprocessing.get_all_start_methods()
IMPORTED = ["torch", "torch._dynamo", "torch.func", "numpy", "scipy.linalg", "scipy.sparse.linalg", "scipy.optimize"]
IMPORTED += [
    "sklearn.datasets",
    "safetensors.torch",
    "safetensors.numpy",
    "plotly.offline",
    "jinja2",
    "cyclopts",
    "zarr",
]


def forked(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls a function, which it has to find in a module."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(IMPORTED)
    child = fork.Process(target=target, args=arguments)
    with mock.patch.dict(sys.modules, {"__main__": types.ModuleType("__main__")}):  # pytest is not to be imported
        child.start()
    return child


def command(*words: object, **how: Any) -> Running:
    """A process that is ``ntkit WORDS``."""
    return Running(_ntkit, ["ntkit", *map(str, words)], **how)


def script(code: str | Path, *words: object, **how: Any) -> Running:
    """A process that is ``python FILE WORDS``, or ``python -c CODE WORDS``."""
    first = code if isinstance(code, Path) else "-c"
    return Running(_script, [str(first), *map(str, words)], code, **how)


class Running:
    """A process, and what it has printed so far; `first` is called in it before all else."""

    def __init__(
        self,
        work: Callable[..., None],
        words: list[str],
        *arguments: Any,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        first: Callable[[], None] | None = None,
    ) -> None:
        self._printed = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
        self.words = words
        for name in ("out", "err"):
            (self._printed / name).touch()
        self._process = forked(_process, self._printed, words, cwd, dict(env or {}), first, work, *arguments)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        return (self._printed / "out").read_text()

    @property
    def stderr(self) -> str:
        return (self._printed / "err").read_text()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        """The exit status; minus the signal that killed it."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutExpired(self.words, timeout, self.stdout, self.stderr)
        return self.returncode

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Wait for it; False where the process ended before."""
        end = time.monotonic() + timeout
        while not condition():
            if self.returncode is not None:
                return condition()
            assert time.monotonic() < end, f"{self.words}: {self.stdout}\n{self.stderr}"
            time.sleep(0.005)
        return True

    def done(self, timeout: float = 120) -> CompletedProcess[str]:
        """Its exit status and all that it printed, as of `subprocess.run`."""
        return CompletedProcess(self.words, self.wait(timeout), self.stdout, self.stderr)


# ---------------------------------------------------------------------- in the process


def _process(
    printed: Path,
    words: list[str],
    cwd: Path | None,
    env: dict[str, str],
    first: Callable[[], None] | None,
    work: Callable[..., None],
    *arguments: Any,
) -> None:
    for stream, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    if first is not None:
        first()
    sys.argv = words
    work(*arguments)


def _ntkit() -> None:
    from ntkit.cli import main

    main()


def _script(code: str | Path) -> None:
    if isinstance(code, Path):
        sys.path.insert(0, str(code.parent))
        runpy.run_path(str(code), run_name="__main__")
    else:
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
