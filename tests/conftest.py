"""One thread per test process: two processes share two cores, and tiny sums gain nothing from threads."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared_data() -> Path:
    """Folder of the real data sets beside the project, where there is one."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside the project")
    return SHARED / "data"
