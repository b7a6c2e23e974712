"""Versions of the software that results depend on, and the numbers of the formats on disk."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ntkit.base.checks import NewerFormat, refusal

RESULTS_FORMAT = 1  # of run.json and results.json of `ntkit analyze`
STUDY_FORMAT = 1  # of those of a study


def versions() -> dict[str, str]:
    """Versions of ntkit, Python and the libraries that compute numbers."""
    import ntkit  # here: type checkers lose names of the package in a circle of imports

    names = ("torch", "numpy", "scipy", "scikit-learn")
    return {"ntkit": ntkit.__version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def earlier_versions(told: dict[str, Any]) -> list[dict[str, str]]:
    """Versions other than those at hand of software that worked in a folder before, by its ``run.json``."""
    found = [*told.get("earlier_versions", []), *([told["versions"]] if "versions" in told else [])]
    return [one for i, one in enumerate(found) if one != versions() and one not in found[:i]]


def check_format(path: str | Path, written: Any, reads: int, fix: str) -> None:
    """Refuse a file of another format than this version reads: a higher number is that of a newer ntkit.

    Whoever adds content that a reader may not leave out, or changes what a number means, raises the number.

    Parameters
    ----------
    path : the file.
    written : the number in it.
    reads : the number of this version.
    fix : what to do with a file that is not of a newer ntkit.

    Raises
    ------
    NewerFormat
        For a higher number.
    Refused
        For a lower one, or none.

    Examples
    --------
    >>> check_format("run.json", 2, reads=1, fix="")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ntkit.base.checks.NewerFormat: run.json: got format 2, of a newer ntkit; expected format 1, which ntkit ... reads. Upgrade ntkit, or use the version that wrote it.
    """  # noqa: E501
    import ntkit

    if isinstance(written, int) and not isinstance(written, bool) and written > reads:
        raise NewerFormat(
            f"{path}: got format {written}, of a newer ntkit; expected format {reads}, which ntkit {ntkit.__version__} "
            "reads. Upgrade ntkit, or use the version that wrote it."
        )
    if written != reads or isinstance(written, bool):
        raise refusal(str(path), got=f"format {written}", expected=f"format {reads}", fix=fix)
