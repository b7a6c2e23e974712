"""Options from a file: TOML, or the ``run.json`` of an earlier run. It imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ntkit.base.checks import refusal
from ntkit.base.files import read_bytes
from ntkit.commands.settings import FULL_BATCH, in_present_names

_OF_EVERY_COMMAND = ("quiet", "json")


def of_every_command(file: Path) -> dict[str, bool]:
    r"""Whether a file of options, as `with_options_of` takes it, says ``quiet`` and ``json``.

    Raises
    ------
    Refused
        When one of them is neither true nor false; as `with_options_of`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "mine.toml")
    ...     _ = file.write_text("quiet = true\nlr = 0.1")
    ...     of_every_command(file)
    {'quiet': True, 'json': False}
    """
    told = _read(file)
    values = {name: told.get(name, False) for name in _OF_EVERY_COMMAND}
    for name, value in values.items():
        if not isinstance(value, bool):
            fix = "Write it without quotes, or leave it out."
            raise refusal(f"{file}, --{name}", got=repr(value)[:80], expected="true or false", fix=fix)
    return values


def with_options_of(file: Path, tokens: Iterable[str]) -> list[str]:
    r"""The words of a command line, and behind them the options of a file that they do not name.

    Parameters
    ----------
    file : a TOML file of ``key = value``, or a JSON file of such keys or with them under "settings". A key is an
        option's name, with "-" or "_". True stands for the option alone, a list for several values; false and null are
        left out (null as a batch size is all examples), and so is what `of_every_command` takes.
    tokens : the words of the command line; an option among them wins.

    Raises
    ------
    Refused
        When the file is neither, a value is a table, or it names another file of options.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "mine.toml")
    ...     _ = file.write_text('batch_size = 8\nclasses = [3, 8]\nlr = 0.1')
    ...     with_options_of(file, ["analyze", "--lr", "0.5"])
    ['analyze', '--lr', '0.5', '--batch-size', '8', '--classes', '3', '8']
    """
    words = list(tokens)
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for key, value in in_present_names(_read(file)).items():
        option = "--" + key.replace("_", "-")
        if option.removeprefix("--") in _OF_EVERY_COMMAND:
            continue
        if option == "--config":
            fix = "Write its options here, or name it on the command line."
            raise refusal(f"{file}, {option}", got=repr(value)[:80], expected="no other file of options", fix=fix)
        if option == "--batch-size" and value is None:  # of a run made in Python: all examples, not the default
            value = FULL_BATCH
        if option not in given:
            words += _words(file, option, value)
    return words


def _read(file: Path) -> Mapping[str, Any]:
    kind = "TOML" if file.suffix.lower() == ".toml" else "JSON"
    blob = read_bytes(file, f"a {kind} file of options", "Check the name.")
    try:
        told = tomllib.loads(blob.decode("utf-8-sig")) if kind == "TOML" else json.loads(blob)
    except (ValueError, RecursionError) as error:
        got, fix = f"no {kind}: {error}", "Correct it."
        if file.suffix.lower() not in (".toml", ".json"):
            got, fix = f"a file that is no {kind}", "Write a .toml file of key = value, or name a run.json."
        raise refusal(str(file), got=got, expected="options by name", fix=fix) from error
    settings = told.get("settings", told) if isinstance(told, dict) else told
    if kind == "TOML" and settings is not told and len(told) > 1:
        fix = "Write all options in one place."
        raise refusal(str(file), got="options beside a table [settings]", expected="one of both", fix=fix)
    if not isinstance(settings, dict):
        fix = "Write a .toml file of key = value, or name a run.json."
        raise refusal(str(file), got=type(told).__name__, expected="options by name", fix=fix)
    return settings


def _words(file: Path, option: str, value: Any) -> Iterator[str]:
    if value is None or value is False:
        return
    if isinstance(value, str) and value.startswith("-"):
        yield f"{option}={value}"
        return
    yield option
    if value is True:
        return
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, (dict, list)) or one is None:
            fix = "Write it as on the command line: a number, a text, or a list of them."
            raise refusal(f"{file}, {option}", got=repr(one)[:80], expected="a number or a text", fix=fix)
        if isinstance(one, str) and one.startswith("-"):
            fix = "Rename it."
            raise refusal(f"{file}, {option}", got=repr(one), expected="texts without a dash before them", fix=fix)
        yield str(one)
