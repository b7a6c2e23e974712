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
    """Return the object that ``package.module:attribute`` or ``file.py:attribute`` names.

    Parameters
    ----------
    option : the option's name in error messages, e.g. --model.
    name : as the user wrote it.
    built_in : names that need no module, to list in the error message.

    Raises
    ------
    Refused
        When the file, the module or the attribute does not exist.
    """
    place, _, attribute = name.rpartition(":")
    if not place:
        expected = "a built-in name, package.module:factory or file.py:factory"
        raise refusal(option, got=repr(name), expected=expected, fix=nearest(name, built_in))
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise refusal(f"{option} {name}", got=f"no file {place}", expected="a Python file", fix="Check the path.")
        spec = importlib.util.spec_from_file_location(f"ntkit_user_{Path(place).stem}", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses, among others, look up their module by name
        sys.path.insert(0, str(Path(place).resolve().parent))  # as for a script: it may import the files beside it
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.pop(0)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            got = f"no module {error.name}"
            fix = "Install it, or run from its folder, or name the file: path/file.py:factory."
            raise refusal(f"{option} {name}", got=got, expected="an importable module", fix=fix) from error
    if not callable(factory := getattr(module, attribute, None)):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        got = f"no factory '{attribute}' in {place}"
        raise refusal(f"{option} {name}", got=got, expected="a callable", fix=nearest(attribute, names))
    return factory


def source_hash(name: str) -> str | None:
    """SHA-256 (first 16 characters) of the file that defines a factory; None for built-in names."""
    place = name.rpartition(":")[0]
    if place and not place.endswith(".py"):
        spec = importlib.util.find_spec(place)
        place = spec.origin or "" if spec is not None else ""
    path = Path(place)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if place.endswith(".py") and path.is_file() else None
