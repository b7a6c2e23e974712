"""One thread per test process: two processes share two cores, and tiny sums gain nothing from threads."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # measured rates: not in the developer's home
os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"]  # the record of the code run here

from pathlib import Path

import pytest

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # ignored in a run begun in the background, and in its children

# Whether bytes are on the disk shows after a loss of power only, which no test has. Processes that tests start do sync.
os.fsync = os.fstat

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """What the imported modules hold, a million objects, is not searched again at every collection of garbage."""
    gc.collect()
    gc.freeze()


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A setter of PyTorch's number of threads, put back at the end."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def shared_data() -> Path:
    """Folder of the real data sets beside the project, where there is one."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside the project")
    return SHARED / "data"


@pytest.fixture(scope="module")
def short_pages() -> Iterator[None]:
    """Pages without the five million bytes of plotly, which every check of a folder would read again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plotly.offline.get_plotlyjs", lambda: "")
        yield


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser. Of one module: while it is open, no other event loop can run in its thread."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()
