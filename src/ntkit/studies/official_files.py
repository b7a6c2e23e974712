"""Where the official files of a study's data sets lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ntkit.base.checks import Refused
from ntkit.data import load


def official_files(names: Sequence[str], data_dir: str | Path) -> dict[str, Path]:
    """Where the official files of data sets lie: in the folder, or in one of their own in it.

    Raises
    ------
    Refused
        When there are files of none of them: now, not after the first experiments.
    """
    found, refused = {}, None
    for name in names:
        for place in (Path(data_dir), Path(data_dir) / {"cifar10": "cifar-10"}.get(name, name)):
            if place.is_dir() or refused is None:
                try:
                    load(name, place)
                except Refused as error:
                    refused = refused or error
                else:
                    found[name] = place
                    break
    if not found and refused is not None:
        raise refused
    return found
