"""Tests marked ``gpu``, without a GPU: on a device in the memory of the CPU, from which nothing may be left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = ["test_gpu", "test_tangent", "test_sketch", "test_path", "test_infinite", "test_limit"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests marked gpu run on the GPU")
@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="no C++ compiler, or no ninja")
def test_what_runs_on_the_cpu_runs_on_another_device():
    tests = Path(__file__).parent
    words = ["-m", "pytest", "-p", "second_device", "-m", "gpu", "--tb=short", *(tests / f"{f}.py" for f in FILES)]
    path = os.pathsep.join([str(tests), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tests.parent, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert not re.search(r"\d+ (failed|error|skipped)", done.stdout)
