"""Versions of the software that results depend on, and the version of the format of results."""

from __future__ import annotations

import platform
from importlib.metadata import version

import ntkit

RESULTS_FORMAT = 1  # of run.json and results.json of `ntkit analyze`


def versions() -> dict[str, str]:
    """Versions of ntkit, Python and the libraries that compute numbers."""
    names = ("torch", "numpy", "scipy", "scikit-learn")
    return {"ntkit": ntkit.__version__, "python": platform.python_version(), **{name: version(name) for name in names}}
