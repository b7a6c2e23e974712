"""The user's own code by name: ``package.module:factory`` or ``file.py:factory``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ntkit.base.checks import nearest, refusal


def find(option: str, name: str, built_in: Iterable[str]) -> Callable[..., Any]:
    """Find what ``package.module:attribute`` or ``file.py:attribute`` names.

    Parameters
    ----------
    option : what a refusal calls it, e.g. option.
    name : as the user wrote it.
    built_in : names that need no place, for the nearest-name hint.

    Raises
    ------
    Refused
        When the file, the module or the attribute is not there.
    """
    place, _, attribute = name.rpartition(":")
    if not place:
        raise refusal(
            option,
            got=repr(name),
            expected="a built-in name, package.module:factory or file.py:factory",
            fix=nearest(name, built_in),
        )
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise refusal(f"{option} {name}", got=f"no file {place}", expected="a Python file", fix="Check the path.")
        spec = importlib.util.spec_from_file_location(f"ntkit_user_{Path(place).stem}", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses, among others, look their module up
        sys.path.insert(0, str(Path(place).resolve().parent))  # as python does for a script: its neighbours import
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.pop(0)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise refusal(
                f"{option} {name}",
                got=f"no module {error.name}",
                expected="an importable module",
                fix="Install it, or run from its folder, or name the file: path/file.py:factory.",
            ) from error
    if not callable(found := getattr(module, attribute, None)):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise refusal(
            f"{option} {name}",
            got=f"no factory '{attribute}' in {place}",
            expected="a callable",
            fix=nearest(attribute, names),
        )
    return found


def source_hash(name: str) -> str | None:
    """SHA-256 (first 16 characters) of the file a factory lives in; None for built-in names."""
    place = name.rpartition(":")[0]
    if place and not place.endswith(".py"):
        spec = importlib.util.find_spec(place)
        place = spec.origin or "" if spec is not None else ""
    path = Path(place)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if place.endswith(".py") and path.is_file() else None
